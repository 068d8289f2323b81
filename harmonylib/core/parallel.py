"""One function over many items in several processes: results in order, bounded by the number of cores."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import current_process, get_start_method
from pathlib import Path

from threadpoolctl import threadpool_limits

from .errors import HarmonyError, note
from .progress import progress

_function: Callable | None = None  # of this worker process


def _start(function: Callable) -> None:
    global _function
    _function = function
    threadpool_limits(1)  # one thread a process: more would fight over the cores


def _call(item):
    return _function(item)


def available_cores(root="/sys/fs/cgroup") -> int:
    """The cores that this process may use: its affinity, and its share where a cgroup (`root`) bounds that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # not there; "max", no bound
            quota, period = map(int, " ".join(Path(root, name).read_text() for name in names).split())
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def parallel_map(function: Callable, items: Iterable, desc: str, unit: str, workers: int | None = None) -> Iterator:
    """Yield function(item) of every item in order, worked out by `workers` processes (None: one a core), with a bar.

    function: of module level, or a functools.partial of one; it is sent to each process once. Exceptions come through.
    Where there can be no processes (no /dev/shm), this one does it all. Raises HarmonyError when a process dies.
    """
    items = list(items)
    workers = min(workers or available_cores(), len(items))
    if getattr(current_process(), "_inheriting", False):  # a worker that runs its parent's script without a guard
        sys.exit(1)
    pool = _pool(function, workers, desc) if workers > 1 else None
    if pool is None:
        yield from map(function, progress(items, desc=desc, unit=unit))
        return
    chunk = max(1, min(8, len(items) // (4 * workers)))
    try:
        with pool:
            yield from progress(pool.map(_call, items, chunksize=chunk), total=len(items), desc=desc, unit=unit)
    except BrokenProcessPool:
        why = "probably for want of memory; free some, try again"
        if get_start_method() != "fork" and (script := _unguarded()):
            why = f'because {script} starts anew in each; put what it does under `if __name__ == "__main__":`'
        raise HarmonyError(f"{desc}: a worker process died, {why}") from None


def _pool(function: Callable, workers: int, desc: str) -> ProcessPoolExecutor | None:
    try:
        return ProcessPoolExecutor(workers, initializer=_start, initargs=(function,))
    except (OSError, ImportError, NotImplementedError) as error:  # no semaphores
        note(f"{desc}: no worker processes here ({error}); one process does it all, so it takes longer")
        return None


def _unguarded() -> str | None:
    """The script that was started, if it has no `__main__` guard."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    with contextlib.suppress(OSError, TypeError):
        return None if "__main__" in Path(script).read_text(encoding="utf-8", errors="replace") else script
