"""Where a killed training run goes on: durable resume points in folders keyed by what decides the result."""

import contextlib
import functools
import hashlib
import json
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path

from .files import atomic_path, only_one

RESUME_POINTS = "artifacts/checkpoints"  # where notebooks keep them
FINISHED = "finished.pt"
KEY = "key.json"
WORDS = {
    "settings": "settings",
    "start": "network or starting weights",
    "batches": "photos or options",
    "loss": "loss",
    "code": "code",
}
TRAINED_BY = ("core", "data", "models", "training.py")  # of this library; see code_hash


class Checkpoints:
    """Resume points of one run in a folder named after the hash of `key`; the last two are kept.

    A finished run leaves `finished.pt`, so that a stage that fails later does not train again (`discard_finished`).
    """

    def __init__(self, root, key: dict):
        text = json.dumps(key, sort_keys=True, default=str)
        self.key = json.loads(text)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]

    def _write(self, name: str, state: dict) -> None:
        import torch  # here, because the notebook runner needs this module but not torch

        for leftover in self.folder.glob(".*.pt"):  # of a run killed while saving: gigabytes each
            leftover.unlink()
        with atomic_path(self.folder / name, durable=True) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)  # a file of ours, so that a full disk is an OSError
        for old in sorted(self.folder.glob("step-*.pt"))[: None if name == FINISHED else -2]:
            old.unlink()

    def save(self, state: dict) -> None:
        if not (self.folder / KEY).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / KEY).write_text(json.dumps(self.key), encoding="utf-8")
        self._write(f"step-{state['step']:08d}.pt", state)

    def finish(self, state: dict) -> None:
        self._write(FINISHED, state)

    def load(self) -> dict | None:
        """The finished or else the newest readable state, or None. A damaged file is removed, the one before used."""
        import torch

        for path in (self.folder / FINISHED, *sorted(self.folder.glob("step-*.pt"), reverse=True)):
            try:
                if zipfile.ZipFile(path).testzip():  # torch itself does not look at the checksums it writes
                    raise ValueError("damaged")
                state = torch.load(path, map_location="cpu", weights_only=True)
                path.touch()  # in use: see discard_finished
                return state
            except FileNotFoundError:
                continue
            except Exception:  # torch raises many kinds on damaged files
                path.unlink(missing_ok=True)
        return None

    def tell_of_others(self) -> None:
        """Say on stderr in what stopped runs of the same name differ from this one, which starts anew."""
        for path in sorted({step.parent for step in self.folder.parent.glob("*/step-*.pt")} - {self.folder}):
            with contextlib.suppress(OSError, ValueError):  # of a run killed while it wrote its key
                other = json.loads((path / KEY).read_text(encoding="utf-8"))
                changed = " and ".join(word for name, word in WORDS.items() if other.get(name) != self.key[name])
                if other["name"] == self.key["name"]:
                    print(f"{other['name']}: {path} is not resumed, since it had other {changed}", file=sys.stderr)


@contextlib.contextmanager
def stop_signals():
    """Yield a list that Ctrl-C and SIGTERM add to, so that a step is never cut in two; the second one interrupts."""
    caught, before = [], {}

    def catch(number, frame):
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # Python lets no other thread set them
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def discard_finished(root, since: float = 0.0) -> None:
    """Remove the runs below `root` that finished or were taken up again at or after the time `since` (seconds)."""
    for path in Path(root).glob(f"*/{FINISHED}"):
        if path.stat().st_mtime >= since:
            shutil.rmtree(path.parent, ignore_errors=True)


def discard_all(root) -> int:
    """Remove the resume points of all runs below `root`, stopped ones too; returns the bytes freed.

    Raises HarmonyError, with nothing of it removed, for a run that is being trained.
    """
    size = 0
    for folder in [path for path in Path(root).glob("*") if path.is_dir()]:
        with only_one(folder):
            size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
    return size


def training_sources() -> list[Path]:
    """The files of this library that a training runs through; a test follows the imports and finds no others."""
    library = Path(__file__).parents[1]
    found = [path for part in TRAINED_BY for path in (library / part, *(library / part).rglob("*.py"))]
    return sorted(path for path in found if path.is_file())


@functools.cache
def code_hash() -> str:
    """Hash of what trainings run through, so that changed code never resumes an older run; other code may change."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in training_sources())).hexdigest()[:16]
