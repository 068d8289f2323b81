"""`python -m benchmarks.run [MODULE ...]`: every module here that has `rows()`, in a process of its own, in one table.

A row is {"name", "ours", "baseline", "ratio", "unit", "spread"}; a ratio above 1 is in our favour. All rows go to
benchmarks/results.json with each module's machine, seconds and peak memory; rows of modules that were not asked for
stay. What got slower since the committed table is named at the end.
"""

import importlib
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from harmonylib.core.devices import has_bf16, pick_device
from harmonylib.core.json_files import read_json, write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"


def machine() -> dict:
    """What the numbers were measured on."""
    device = pick_device()
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "bf16": has_bf16(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _measure(name: str, queue) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    rows = [{"module": name, **row} for row in module.rows()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)
    queue.put((json.dumps(rows), {"GB": peak, "GPU GB": torch.cuda.max_memory_allocated() / 1e9}))


def measure(name: str) -> tuple[list[dict], dict]:
    """(rows, peak memory) of one module. Raises RuntimeError when its process fails."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(name, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"benchmarks/{name}.py failed; see above")
    rows, memory = queue.get()
    return json.loads(rows), memory


def table(rows: list[dict]) -> str:
    """The rows as text, seconds and rates with three digits."""
    lines = [("", "ours", "plain", "", "ratio", "quartiles")]
    for row in rows:
        spread = "–".join(f"{value:.2f}" for value in row["spread"])
        lines.append(
            (row["name"], f"{row['ours']:.3g}", f"{row['baseline']:.3g}", row["unit"], f"{row['ratio']:.2f}", spread)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def committed() -> dict:
    """The table of the last commit, empty outside of a clone."""
    words = ["git", "-C", str(FOLDER), "show", "HEAD:./results.json"]
    found = subprocess.run(words, capture_output=True, text=True)
    return json.loads(found.stdout) if found.returncode == 0 else {"rows": [], "machines": {}}


def slower(now: dict, before: dict) -> list[str]:
    """Rows of both tables whose ratio fell (the upper quartile lies below the lower one of before), and on an equal
    machine those that take a third longer."""
    known, found = {row["name"]: row for row in before["rows"]}, []
    for row in (row for row in now["rows"] if row["name"] in known):
        old, module = known[row["name"]], row["module"]
        if row["spread"][1] < old["spread"][0]:
            found.append(f"{row['name']}: ratio {old['ratio']:.2f}, now {row['ratio']:.2f}")
        elif now["machines"].get(module) == before["machines"].get(module):
            more = old["ours"] / row["ours"] if "/s" in row["unit"] else row["ours"] / old["ours"]
            if more > 4 / 3:
                found.append(f"{row['name']}: {old['ours']:.3g} {row['unit']}, now {row['ours']:.3g}")
    return found


def main() -> None:
    found = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef rows(" in path.read_text(encoding="utf-8"))
    names = sys.argv[1:] or found
    if unknown := set(names) - set(found):
        sys.exit(f"error: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    now = {"machines": {}, "rows": [], "memory": {}, "seconds": {}}
    if RESULTS.is_file():
        now |= read_json(RESULTS)
    now["rows"] = [row for row in now["rows"] if row["module"] not in names]
    for name in names:
        started, now["machines"][name] = time.monotonic(), machine()
        rows, now["memory"][name] = measure(name)
        now["rows"] += rows
        now["seconds"][name] = round(time.monotonic() - started)
        write_json(RESULTS, now)  # module by module: what was measured is kept whatever happens to the next
    print(table(now["rows"]))
    for name in names:
        peak = ", ".join(f"{value:.2f} {unit}" for unit, value in now["memory"][name].items() if value)
        print(f"{name}: {now['seconds'][name]} s, peak memory {peak}")
    fell = slower(now, committed())
    print("slower than in the committed table:", *(fell or ["nothing"]), sep="\n  ")


if __name__ == "__main__":
    main()
