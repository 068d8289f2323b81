"""Worker processes: how many, and what happens where there can be none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harmonylib.core import parallel
from harmonylib.core.errors import HarmonyWarning

SCRIPT = """
import multiprocessing, harmonylib.core.parallel
multiprocessing.set_start_method("spawn", force=True)
print(list(harmonylib.core.parallel.parallel_map(abs, [-1, -2], "counting", "number", workers=2)))
"""


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_of_a_container(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert parallel.available_cores(tmp_path) == cores


def test_no_semaphores(monkeypatch):
    def refuse(*words, **options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", refuse)
    with pytest.warns(HarmonyWarning, match="counting: no worker processes here"):
        assert list(parallel.parallel_map(abs, [-1, -2], "counting", "number", workers=2)) == [1, 2]


@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":\n    '])
def test_a_script_without_a_guard(tmp_path, guard):
    lines = SCRIPT.strip().splitlines()
    (tmp_path / "mine.py").write_text("\n".join([lines[0], f"{guard}{lines[1]}", f"{guard}{lines[2]}"]))
    environment = os.environ | {"PYTHONPATH": str(Path(parallel.__file__).parents[1])}
    ran = subprocess.run([sys.executable, tmp_path / "mine.py"], env=environment, capture_output=True, text=True)
    if guard:
        assert ran.stdout == "[1, 2]\n", ran.stderr
    else:
        assert ran.stderr.count("Traceback") == 1  # of the script itself, none of its workers
        assert "mine.py starts anew in each; put what it does under `if __name__" in ran.stderr
