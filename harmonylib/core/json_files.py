"""Metrics files: JSON that any reader accepts (no NaN, no infinity), written atomically."""

import json
from pathlib import Path

from .errors import HarmonyError
from .files import atomic_path


def write_json(path, value) -> None:
    """Write `value`, which may hold paths, arrays and numpy's numbers, with NaN and infinities as null."""
    plain = json.dumps(value, default=lambda item: str(item) if isinstance(item, Path) else item.tolist())
    value = json.loads(plain, parse_constant=lambda name: None)
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own escapes of lone surrogates


def read_json(path):
    """Read a JSON file. Raises HarmonyError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such file; run the stage that writes it (`dvc repro`)") from None
    except (ValueError, RecursionError) as error:  # damaged, not UTF-8, or nested beyond reason
        raise HarmonyError(f"{path}: not valid JSON ({error}); delete it and run its stage again") from None
