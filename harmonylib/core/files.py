"""Files that are either complete or not there, and folders that one process at a time may write."""

import contextlib
import errno
import os
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
    and buckets refuse. durable: bytes and name are on the disk before this returns, so that a power cut cannot leave an
    empty file.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")  # short: 255 bytes is a limit
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
        if durable and os.name == "posix":
            with contextlib.suppress(OSError):  # some file systems cannot
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


def is_hidden(path, root) -> bool:
    """Whether `path`, or a folder between it and `root`, is one that people do not mean: ._a.png, .ipynb_checkpoints"""
    return any(part.startswith(".") for part in Path(path).relative_to(root).parts)


def composed(text: str) -> str:
    """`text` in NFC, in which names are compared: Macs and archives of theirs write é as two characters."""
    return unicodedata.normalize("NFC", text)


def stem_of(path) -> str:
    """A file's name without its suffix, composed."""
    return composed(Path(path).stem)


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
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)  # which would take any leftover for a held lock
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        lock = SoftFileLock(f"{path}.held", timeout=timeout)
        note(f"{Path(path).parent}: has no file locks; files *.held stand for them, remove them after a crash")
        lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def only_one(folder):
    """Hold `folder` while the block runs; a killed process lets go of it. Raises HarmonyError if another holds it."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name[:80]}.lock")
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(path, timeout=0))
        except Timeout:
            raise HarmonyError(f"{folder}: another process is writing there; wait for it or stop it") from None
        try:
            yield
        finally:
            for name in {str(path), lock.lock_file}:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    os.unlink(name)
