"""Files that are either complete or not there, and folders that one process at a time may write."""

import contextlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import HarmonyError


@contextlib.contextmanager
def atomic_path(path, durable: bool = False):
    """Yield a temporary path beside `path` that replaces it on success and vanishes on failure.

    durable: bytes and name are on the disk before this returns, so that a power cut cannot leave an empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
        if durable and os.name == "posix":
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(root, name) -> Path:
    """root/name. Raises HarmonyError for a name that a file gives and that leads out of `root`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in str(name):
        raise HarmonyError(f"{root}: {str(name)!r} is no file inside it; mend the list that names it")
    return Path(root, name)


def stamp(path) -> tuple:
    """What changes when a file, or any file of a folder, is written again; () where there is nothing."""
    path = Path(path)
    parts = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in parts)


@contextlib.contextmanager
def only_one(folder):
    """Hold `folder` while the block runs; a killed process lets go of it. Raises HarmonyError if another holds it."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise HarmonyError(f"{folder}: another process is writing there; wait for it or stop it") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            os.unlink(lock.lock_file)
        lock.release()
