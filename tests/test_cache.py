"""The cache: its bound, its damage, its killed and its simultaneous writers."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def entry(number, megabytes=1):
    return cache.cached_array({"n": number}, (megabytes, 1000, 1000), np.uint8, lambda array: array.fill(number))


def entries():
    return sorted(path.name for path in cache.ROOT.glob("*.npy"))


def test_the_bound_drops_what_was_not_used_for_longest():
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text("cache_gb: 0.0025")
    first, second = entry(1), entry(2)
    for age, array in ((20, second), (10, first)):
        os.utime(array.filename, (time.time() - age,) * 2)
    entry(1)  # used again: now the second is the oldest
    before = entries()
    entry(3)
    assert set(before) - set(entries()) == {os.path.basename(second.filename)} and len(entries()) == 2
    assert (second == 2).all()  # an array in use stays readable
    with pytest.raises(HarmonyError, match="needs 0.0 GB, cache_gb is 0.0025; set it higher"):
        entry(4, megabytes=3)
    assert len(entries()) == 2


def test_a_full_disk_is_found_out_beforehand(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(HarmonyError, match="no room for"):
        entry(1)


def test_entries_cut_off_are_made_anew_and_a_folder_that_cannot_be_written_is_read(monkeypatch):
    path = Path(entry(7).filename)
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[:20], b""):
        path.write_bytes(damaged)
        assert (entry(7) == 7).all() and path.read_bytes() == whole

    def refuse(*words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert (entry(7) == 7).all()


def test_a_failure_or_a_killed_process_leaves_nothing_behind(folder):
    def fail(array):
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        cache.cached_array({"n": 1}, (10,), np.uint8, fail)
    assert not entries() and not list(folder.glob(".*"))
    name = entry(1).filename
    os.rename(name, f"{folder}/.{os.path.basename(name)[:-4]}.abc.npy")  # as a process leaves it that was killed
    assert (entry(1) == 1).all() and not list(folder.glob(".*")) and len(entries()) == 1
    assert cache.clear() > 1e6 and not folder.exists() and cache.clear() == 0


def test_clearing_a_cache_on_another_disk_keeps_the_disk(folder, tmp_path):
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    folder.symlink_to(tmp_path / "disk")
    entry(1)
    assert cache.clear() > 1e6 and os.listdir(tmp_path / "disk") == ["lost+found"] and folder.is_symlink()
    assert (entry(1) == 1).all()


def _worker(root, queue):
    cache.ROOT = root

    def fill(array):
        queue.put(os.getpid())
        time.sleep(0.3)
        array.fill(7)

    queue.put(int(cache.cached_array({"n": 1}, (100,), np.uint8, fill).sum()))


def test_of_several_processes_one_makes_the_entry(folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(folder, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=30) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert results.count(700) == 3 and len(entries()) == 1  # the fourth word is the one maker's id
