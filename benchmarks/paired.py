"""Timing two ways of doing one thing, turn by turn, so that a busy or slow machine hits both alike."""

import time
from collections.abc import Callable

import numpy as np
import torch


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
    times = []
    for turn in range(repeats):
        if turn % 2:
            second, first = seconds(baseline), seconds(ours)
        else:
            first, second = seconds(ours), seconds(baseline)
        times.append((first, second))
    mine, plain = np.array(times).T
    low, middle, high = np.quantile(plain / mine, (0.25, 0.5, 0.75)).tolist()
    return {
        "ours": float(np.median(mine)),
        "baseline": float(np.median(plain)),
        "ratio": middle,
        "spread": [low, high],
        "unit": "s",
    }
