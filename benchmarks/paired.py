"""Time and memory of two ways of doing one thing, turn by turn, so that a busy or slow machine hits both alike."""

import contextlib
import ctypes
import shutil
import time
from collections.abc import Callable

import numpy as np
import torch


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: on the CPU it needs a C++ compiler."""
    return device.type == "cuda" or shutil.which("g++") is not None


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, the GPU's queue included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(ours: Callable[[], object], baseline: Callable[[], object], repeats: int = 7) -> dict:
    """Call both once to warm up, then `repeats` times in turn, the first of each pair alternating.

    Returns {"ours", "baseline": median seconds a call, "ratio": median of baseline / ours over the pairs (above 1: ours
    is faster), "spread": its quartiles [25 %, 75 %], "unit": "s"}. A benchmark's row is {"name": ..., **paired(...)}.
    """
    ours(), baseline()
    return compared(lambda: seconds(ours), lambda: seconds(baseline), repeats, "s")


def compared(ours: Callable[[], float], baseline: Callable[[], float], repeats: int, unit: str) -> dict:
    """As `paired`, of what both return, less being better; they are called `repeats` times and not to warm up."""
    pairs = []
    for turn in range(repeats):
        if turn % 2:
            second, first = baseline(), ours()
        else:
            first, second = ours(), baseline()
        pairs.append((first, second))
    mine, plain = np.array(pairs).T
    low, middle, high = np.quantile(plain / mine, (0.25, 0.5, 0.75)).tolist()
    return {
        "ours": float(np.median(mine)),
        "baseline": float(np.median(plain)),
        "ratio": middle,
        "spread": [low, high],
        "unit": unit,
    }


def peak_megabytes(work) -> float | None:
    """Memory that work() needs at its peak beyond what is in use before, or None where it cannot be read."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def read(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))

    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, which would count as in use before
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak starts again from what is resident now
        before = read("VmRSS")
    except OSError:
        return None
    work()
    return read("VmHWM") - before


def paired_memory(ours: Callable[[], object], baseline: Callable[[], object], repeats: int = 3) -> dict | None:
    """As `paired`, of `peak_megabytes` (MiB) and without warming up; None where it cannot be read."""
    if peak_megabytes(lambda: None) is None:
        return None
    return compared(lambda: peak_megabytes(ours), lambda: peak_megabytes(baseline), repeats, "MiB")
