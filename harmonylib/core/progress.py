"""Progress bars that show in a terminal and never in an executed notebook.

The notebook runner names a file in HARMONYLIB_PROGRESS_FILE; bars drawn by the kernel and its child processes go there,
and the runner copies what arrives to its own stderr. Without the variable a bar is tqdm's usual one.
"""

import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

PROGRESS_FILE = "HARMONYLIB_PROGRESS_FILE"
QUIET_SECONDS = 30.0  # between two states of one bar where stderr is a log, not a terminal


class Appender:
    """A text stream that appends to a file. A full disk costs the bar, never the work it counts."""

    encoding = "utf-8"

    def __init__(self, path):
        self.path = path

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError), open(self.path, "a", encoding=self.encoding) as file:
            file.write(text)

    def flush(self) -> None:
        pass


def progress(iterable=None, total: int | None = None, desc: str = "", unit: str = "it") -> tqdm:
    """A tqdm bar over `iterable`, or one to `update()` by hand. Silent in all but the first process of a torchrun."""
    options = {"total": total, "desc": desc, "unit": unit, "disable": os.environ.get("RANK", "0") != "0"}
    path = os.environ.get(PROGRESS_FILE)
    if path:
        return tqdm(iterable, file=Appender(path), ncols=100, mininterval=0.5, **options)
    return auto_tqdm(iterable, **options)


class _Copier:
    """Copies a bar's text: as it is to a terminal; to a log each bar's last state, and one every 30 s meanwhile."""

    def __init__(self, stream):
        self.stream = stream
        self.terminal = stream.isatty()
        self.pending = ""
        self.shown = time.monotonic()

    def feed(self, text: str) -> None:
        if self.terminal:
            self._show(text)
            return
        *done, self.pending = (self.pending + text).split("\n")
        for line in done:
            self._line(line)
        self.pending = self.pending[self.pending.rfind("\r", 0, -1) + 1 :]
        if self.pending.strip() and time.monotonic() - self.shown > QUIET_SECONDS:
            self._line(self.pending)

    def _line(self, text: str) -> None:
        states = [state.rstrip() for state in text.replace("\x1b[A", "").split("\r") if state.strip()]
        if states:
            self._show(states[-1] + "\n")

    def _show(self, text: str) -> None:
        self.shown = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()


@contextlib.contextmanager
def relay(stream=None):
    """Yield the path of a file whose growth is copied to `stream` (stderr) by a thread until the block ends."""
    copier = _Copier(stream or sys.stderr)
    stop = threading.Event()
    handle, name = tempfile.mkstemp(prefix="harmonylib-progress-")
    os.close(handle)

    def copy() -> None:
        with open(name, encoding="utf-8", errors="replace", newline="") as file:
            while True:
                last = stop.is_set()  # read before the text, so that nothing written before the stop is missed
                text = file.read()
                if text:
                    copier.feed(text)
                if last:
                    return
                stop.wait(0.2)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield Path(name)
    finally:
        stop.set()
        thread.join()
        os.unlink(name)
