"""Worker processes: results, errors and warnings come back in order, and what happens where there can be none."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from harmonylib.core.devices import idle_cores
from harmonylib.core.errors import HarmonyError, HarmonyWarning, note
from harmonylib.core.parallel import parallel_map

SCRIPT = """
from harmonylib.core.parallel import parallel_map
print(list(parallel_map(lambda number: -number, [1, 2], "counting", "number", workers=2)))
"""


def read(name):
    if name == "bad":
        raise HarmonyError("bad: not a number")
    note(f"{name}: read")
    return os.getpid(), Path(name).read_text()


def die(item):
    os._exit(9)


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_results_warnings_and_errors_come_through(tmp_path, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)  # where workers of an earlier call are not
    for name in "abc":
        Path(name).write_text(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processes, texts = zip(*parallel_map(read, "abc", "reading", "file", workers), strict=True)
    assert texts == ("a", "b", "c") and [str(w.message) for w in caught] == ["a: read", "b: read", "c: read"]
    assert (os.getpid() in processes) == (workers != 2)  # little work is done alone
    with pytest.raises(HarmonyError, match="^bad: not a number$"):
        list(parallel_map(read, ["bad", "bad"], "reading", "file", workers))


def test_a_worker_that_dies():
    with pytest.raises(HarmonyError, match="measuring: a worker process died, probably for want of memory"):
        list(parallel_map(die, range(4), "measuring", "photo", workers=2))


def test_no_semaphores(monkeypatch):
    def refuse():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    with pytest.warns(HarmonyWarning, match="counting: no worker processes here"):
        assert list(parallel_map(abs, [-1, -2], "counting", "number", workers=2)) == [1, 2]


def test_a_script_needs_no_guard(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    ran = subprocess.run([sys.executable, tmp_path / "mine.py"], cwd=Path(__file__).parents[1], env=os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True)  # fmt: skip
    assert ran.stdout == "[-1, -2]\n" and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.parametrize(("allowed", "busy", "cores"), [(2, 0, 2), (2, 50, 1), (1, 0, 1), (2, 100, 1), (2, 20, 2)])
def test_a_stage_takes_what_other_programs_leave(monkeypatch, allowed, busy, cores):
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: busy)
    monkeypatch.setattr("joblib.cpu_count", lambda: allowed)
    assert idle_cores() == cores
