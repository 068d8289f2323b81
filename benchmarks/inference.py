"""Seconds and memory that `hl.harmonize` needs, by model and picture size.

Run: python -m benchmarks.inference [--device cuda]. Pictures are the embedded coffee photo enlarged, 3:2, with its cup
as the foreground; times are whole calls with the model loaded, on this machine.
"""

import argparse
import functools
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from PIL import Image

from benchmarks.paired import paired, seconds
from harmonylib.core.devices import pick_device
from harmonylib.core.images import resize_mask
from harmonylib.core.progress import progress
from harmonylib.data.embedded_photos import load_photos
from harmonylib.inference import MODELS, harmonize, load_model, run_model

SIDES = {"256 px": 256, "512 px": 512, "1024 px": 1024, "12 MP": 4243}  # long side
COMPARED = 512  # long side at which the whole network is run for comparison


@functools.cache
def scene(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo at a long side in pixels (HxWx3 uint8) and its foreground (HxW bool)."""
    photo = next(photo for photo in load_photos() if photo.name == "coffee")
    image = Image.fromarray(photo.image).resize((side, round(side * 2 / 3)), Image.Resampling.BICUBIC)
    return np.asarray(image), resize_mask(photo.masks["cup"], image.size[::-1])


def table(device="auto", repeats: int = 3) -> pd.DataFrame:
    """Median seconds a picture of `repeats` calls after one to warm up: a row a model, a column a size."""
    rows = {model: {} for model in MODELS}
    for model, label in progress([(m, s) for m in MODELS for s in SIDES], desc="timing"):
        call = functools.partial(harmonize, *scene(SIDES[label]), model=model, device=device)
        call()
        rows[model][label] = float(np.median([seconds(call) for _ in range(repeats)]))
    return pd.DataFrame(rows).T


def rows(device="auto", repeats: int = 5) -> list[dict]:
    """Ours (working size, then carried to full size) against the network at the picture's own size, 512 px."""
    image, mask = scene(COMPARED)
    found = []
    for name in ("diffharmony++", "contrastive-resunet"):
        ours = functools.partial(harmonize, image, mask, model=name, device=device)
        whole = functools.partial(run_model, load_model(name, str(pick_device(device))), image, mask, 0)
        label = f"harmonize {COMPARED} px, {name}, against the network at full size"
        found.append({"name": label, **paired(ours, whole, repeats)})
    return found


def peak_memory(model: str, label: str, device="cpu") -> float:
    """Peak resident memory in GiB of a fresh process that harmonizes one picture (imports and weights included)."""
    command = [sys.executable, "-m", "benchmarks.inference", "--peak", model, label, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "SIZE"), help="run once and print the peak memory in GiB")
    options = parser.parse_args()
    if options.peak:
        harmonize(*scene(SIDES[options.peak[1]]), model=options.peak[0], device=options.device)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    print(f"{pick_device(options.device)}, {torch.get_num_threads()} threads; seconds a picture:")
    result = table(options.device)
    result["12 MP, GiB"] = [peak_memory(model, "12 MP", options.device) for model in result.index]
    print(result.round(2).to_string())
    for row in rows(options.device):
        print(f"{row['name']}: {row['ours']:.2f} s, {row['baseline']:.2f} s, ratio {row['ratio']:.2f} {row['spread']}")


if __name__ == "__main__":
    main()
