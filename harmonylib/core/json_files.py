"""Metrics files: JSON that any reader accepts (no NaN, no infinity), written atomically."""

import json
import math
from pathlib import Path

import numpy as np

from .errors import HarmonyError
from .files import atomic_path


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path, value) -> None:
    """Write `value` with NaN and infinities as null."""
    with atomic_path(path) as temporary:
        text = json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own escapes of lone surrogates


def read_json(path):
    """Read a JSON file. Raises HarmonyError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such file; run the stage that writes it (`dvc repro`)") from None
    except (ValueError, RecursionError) as error:  # damaged, not UTF-8, or nested beyond reason
        raise HarmonyError(f"{path}: not valid JSON ({error}); delete it and run its stage again") from None
