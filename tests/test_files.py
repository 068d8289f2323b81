"""Files and locks where the system gives less than usual: shares, buckets, clusters."""

import errno
import os
import stat

import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError, HarmonyWarning
from harmonylib.core.files import as_written, atomic_path, is_hidden, only_one
from harmonylib.core.images import write_image
from harmonylib.core.json_files import read_json, write_json


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read(tmp_path, monkeypatch, umask):
    def refuse(*words, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)  # as on a mounted share
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def test_links_are_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.txt").symlink_to("real/b.txt")
    for text in ("new", "again"):
        with atomic_path(tmp_path / "a.txt", durable=True) as temporary:
            temporary.write_text(text)
        assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "real/b.txt").read_text() == text


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "\u753b" * 83 + ".png"])
def test_a_name_that_fits_can_be_written(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.suffix == ".png"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_image(tmp_path / "a.png", np.zeros((3, 3, 7), np.uint8))
    assert not list(tmp_path.iterdir())


def test_json_holds_numbers_of_numpy_and_no_nan(tmp_path):
    value = {"a": np.float32(0.5), 1: np.arange(2), "path": tmp_path, "none": [float("nan"), -np.inf], "b": np.True_}
    write_json(tmp_path / "a.json", value)
    again = {"a": 0.5, "1": [0, 1], "path": str(tmp_path), "none": [None, None], "b": True}
    assert read_json(tmp_path / "a.json") == again
    for name, text, words in (("none.json", None, "no such file"), ("bad.json", "[1", "not valid JSON")):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(HarmonyError, match=f"{name}: {words}"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_one_process_at_a_time_with_file_locks_and_without(tmp_path, monkeypatch, number, recwarn):
    def refuse(*words):
        raise OSError(number, os.strerror(number))

    (tmp_path / ".out.lock").touch()  # left over
    if number:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    for _ in range(2):
        with (
            only_one(tmp_path / "out"),
            pytest.raises(HarmonyError, match="another process"),
            only_one(tmp_path / "out"),
        ):
            pass
    said = [str(w.message) for w in recwarn if w.category is HarmonyWarning]
    assert all("has no file locks" in text for text in said) and bool(said) == bool(number)
    assert not list(tmp_path.iterdir())


def test_names(tmp_path):
    (tmp_path / "cafe\u0301").touch()
    assert as_written(tmp_path / "caf\u00e9").is_file() and not as_written(tmp_path / "tea").exists()
    assert is_hidden(tmp_path / ".a/b.png", tmp_path) and not is_hidden(tmp_path / "a/b.png", tmp_path)
