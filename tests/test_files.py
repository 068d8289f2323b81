"""Files and locks where the system gives less than usual: shares, buckets, clusters."""

import errno
import fcntl
import os
import stat

import pytest

from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError, HarmonyWarning
from harmonylib.core.files import as_written, atomic_path, is_hidden, only_one


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_no_file_locks(tmp_path, monkeypatch, number):
    def refuse(*words):
        raise OSError(number, os.strerror(number))

    (tmp_path / ".out.lock").touch()  # left over
    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with (
            pytest.warns(HarmonyWarning, match="has no file locks"),
            only_one(tmp_path / "out"),
            pytest.raises(HarmonyError, match="another process"),
            only_one(tmp_path / "out"),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_names(tmp_path):
    (tmp_path / "cafe\u0301").touch()
    assert as_written(tmp_path / "caf\u00e9").is_file() and not as_written(tmp_path / "tea").exists()
    assert is_hidden(tmp_path / ".a/b.png", tmp_path) and not is_hidden(tmp_path / "a/b.png", tmp_path)


def test_a_cache_on_a_disk_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.npy").write_bytes(bytes(7))
    assert cache.clear() == 7 and [path.name for path in tmp_path.iterdir()] == ["lost+found"]
