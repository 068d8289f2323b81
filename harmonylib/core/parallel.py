"""One function over many items in several processes: results in order, bounded by the number of cores."""

import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from .errors import HarmonyError, note
from .progress import progress

ALONE_SECONDS = 2.0  # less work than that is not worth the start of processes, which import all that it needs

# That worker processes which have grown are replaced is nothing to worry about.
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")


def parallel_map(function: Callable, items: Iterable, desc: str, unit: str, workers: int | None = None) -> Iterator:
    """Yield function(item) of every item in order, worked out by `workers` processes, with a bar.

    None: one process a core that this one may use, unless it is done in 2 seconds alone. Exceptions and warnings come
    through. Where there can be no processes (no /dev/shm), this one does it all. Raises HarmonyError when one dies.
    """
    items = list(items)
    yield from progress(_results(function, deque(items), desc, workers), total=len(items), desc=desc, unit=unit)


def _results(function: Callable, items: deque, desc: str, workers: int | None) -> Iterator:
    start = time.monotonic()
    while items and workers is None and time.monotonic() - start < ALONE_SECONDS:
        yield function(items.popleft())
    if not items:
        return
    try:
        multiprocessing.Lock()  # joblib would go on in one process, too, but say so less clearly
        import joblib
    except (OSError, ImportError) as error:
        note(f"{desc}: no worker processes here ({error}); one process does it all, so it takes longer")
        yield from map(function, items)
        return
    workers = min(workers or joblib.cpu_count(), len(items))
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        pool = joblib.Parallel(workers, return_as="generator", max_nbytes=None)
    try:
        for result, warned in pool(joblib.delayed(_call)(function, os.getcwd(), item) for item in items):
            for warning in warned:
                warnings.warn(warning, stacklevel=2)
            yield result
    except BrokenProcessPool as error:
        if "un-serialize" in str(error):
            raise HarmonyError(f"{desc}: worker processes cannot import {function}; move it to a module") from None
        why = "probably for want of memory; free some, try again"
        raise HarmonyError(f"{desc}: a worker process died, {why}") from None


def _call(function: Callable, folder: str, item) -> tuple:
    """(function(item), what it warned of), in a worker process, which may have served a call from another folder."""
    os.chdir(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(item), [warning.message for warning in caught]
