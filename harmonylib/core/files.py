"""Files that are either complete or not there, and folders that one process at a time may write."""

import contextlib
import errno
import os
import re
import secrets
import unicodedata
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from .errors import HarmonyError, note

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def atomic_path(path, durable: bool = False):
    """Yield a temporary path beside `path` that replaces it on success and vanishes on failure.

    A link is written through. Who may read the file is what the umask says; nothing calls chmod, which mounted shares
    and buckets refuse. durable: the bytes are on the disk before the name is, so that a power cut leaves no empty file.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")  # short: 255 bytes is a limit
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if durable:
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def is_hidden(path, root) -> bool:
    """Whether `path`, or a folder between it and `root`, is one that people do not mean: ._a.png, .ipynb_checkpoints"""
    return any(part.startswith(".") for part in Path(path).relative_to(root).parts)


def composed(text: str) -> str:
    """`text` in NFC, in which names are compared: Macs and archives of theirs write é as two characters."""
    return unicodedata.normalize("NFC", text)


def stem_of(path) -> str:
    """A file's name without its suffix, composed."""
    return composed(Path(path).stem)


def natural(path) -> list:
    """The key that sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", Path(path).stem)]


def as_written(path: Path) -> Path:
    """`path`, or the file beside it whose name differs only in how é is written."""
    if path.name.isascii() or path.exists() or not path.parent.is_dir():
        return path
    return next((p for p in path.parent.iterdir() if composed(p.name) == composed(path.name)), path)


@contextlib.contextmanager
def locked(path, timeout: float = -1):
    """Hold the lock file `path`; a killed process lets go of it. timeout: seconds to wait (-1: for ever).

    Where the file system has no locks, a file that is there while it is held stands for one. Raises filelock.Timeout.
    """
    try:  # filelock's own fallback knows one kind of error only, and takes a leftover for a held lock
        lock = FileLock(path, timeout=timeout, fallback_to_soft=False).acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note(f"{Path(path).parent}: has no file locks; files *.held stand for them, remove them after a crash")
        lock = SoftFileLock(f"{path}.held", timeout=timeout).acquire()
    with lock:
        yield


@contextlib.contextmanager
def only_one(folder):
    """Hold `folder` while the block runs; a killed process lets go of it. Raises HarmonyError if another holds it."""
    path = Path(folder).with_name(f".{Path(folder).name[:80]}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except Timeout:
            raise HarmonyError(f"{folder}: another process is writing there; wait for it or stop it") from None
        if os.name == "posix":  # elsewhere it is removed as it is let go of
            stack.callback(path.unlink, missing_ok=True)
        yield
