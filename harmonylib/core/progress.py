"""Progress bars that show in a terminal and never in an executed notebook."""

import os

from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

PLAIN_BARS = "HARMONYLIB_PLAIN_BARS"  # set by the notebook runner, which passes the kernel's stderr on to its own


def progress(iterable=None, total: int | None = None, desc: str = "", unit: str = "it") -> tqdm:
    """A tqdm bar over `iterable`, or one to `update()` by hand. Silent in all but the first process of a torchrun."""
    bar = tqdm if PLAIN_BARS in os.environ else auto_tqdm
    return bar(iterable, total=total, desc=desc, unit=unit, disable=os.environ.get("RANK", "0") != "0")
