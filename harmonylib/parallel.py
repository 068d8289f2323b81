"""One function over many items in several processes: results in order, bounded by the number of cores."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from threadpoolctl import threadpool_limits

from .errors import HarmonyError
from .progress import progress

_function: Callable | None = None  # of this worker process


def _start(function: Callable) -> None:
    global _function
    _function = function
    threadpool_limits(1)  # one thread a process: more would fight over the cores


def _call(item):
    return _function(item)


def parallel_map(function: Callable, items: Iterable, desc: str, unit: str, workers: int | None = None) -> Iterator:
    """Yield function(item) of every item in order, worked out by `workers` processes (None: one a core), with a bar.

    function: of module level, or a functools.partial of one; it is sent to each process once. Exceptions come through.
    Raises HarmonyError when a process dies.
    """
    items = list(items)
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers <= 1:
        yield from map(function, progress(items, desc=desc, unit=unit))
        return
    chunk = max(1, min(8, len(items) // (4 * workers)))
    try:
        with ProcessPoolExecutor(workers, initializer=_start, initargs=(function,)) as pool:
            yield from progress(pool.map(_call, items, chunksize=chunk), total=len(items), desc=desc, unit=unit)
    except BrokenProcessPool:
        raise HarmonyError(
            f"{desc}: a worker process died, probably for want of memory; free some, try again"
        ) from None
