"""Seconds and memory that `hl.harmonize` needs, by model and picture size, on two threads and on one; and a cold start.

Pictures are the embedded coffee photo enlarged, 3:2, with its cup as the foreground; times are whole calls with the
model loaded.
"""

import functools
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.paired import compared, paired, paired_memory
from harmonylib.core.devices import pick_device
from harmonylib.core.images import resize_mask, write_image
from harmonylib.data.embedded_photos import load_photos
from harmonylib.inference import MODELS, harmonize, load_model, run_model
from harmonylib.tools.harmonize_files import plan, run

SIDES = {"256 px": 256, "1024 px": 1024, "12 MP": 4243}  # long side
COMPARED = 512  # long side at which the whole network is run for comparison


@functools.cache
def scene(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo at a long side in pixels (HxWx3 uint8) and its foreground (HxW bool)."""
    photo = next(photo for photo in load_photos() if photo.name == "coffee")
    image = Image.fromarray(photo.image).resize((side, round(side * 2 / 3)), Image.Resampling.BICUBIC)
    return np.asarray(image), resize_mask(photo.masks["cup"], image.size[::-1])


def on(threads: int, call):
    """`call` on so many threads of torch's."""

    def work():
        torch.set_num_threads(threads)
        call()

    return work


def harmonize_folder(root: Path, pictures: int, device) -> None:
    """What `harmonylib harmonize` does with a folder of so many PNG files of 1024 px, by the default model."""
    image, mask = scene(1024)
    for number in range(pictures):
        for folder, array in (("composites", image), ("masks", mask)):
            if not (path := root / f"{pictures}/{folder}/{number}.png").exists():
                write_image(path, array)
    jobs = plan(root / f"{pictures}/composites", root / f"{pictures}/masks", root / f"{pictures}/out", force=True)
    run(jobs, {"model": MODELS[0], "device": device}, {})


def folders(device) -> list[dict]:
    """Pictures a second of a folder, and whether a longer one takes more memory."""
    with tempfile.TemporaryDirectory() as root:
        short, long = (functools.partial(harmonize_folder, Path(root), count, device) for count in (12, 36))
        short(), long()  # which write the pictures
        times = paired(on(2, short), on(1, short), 3)
        memory = paired_memory(long, short)
    rates = {side: 12 / times[side] for side in ("ours", "baseline")}
    name = f"a folder of PNG files at 1024 px, {MODELS[0]}"
    found = [{"name": f"{name}: two threads / one", **times, **rates, "unit": "pictures/s"}]
    return found + ([{"name": f"{name}, peak memory: 36 pictures / 12", **memory}] if memory else [])


def cold_start() -> dict:
    """CPU seconds of the command on one picture of 512 px in a fresh process, against one that imports torch alone."""
    with tempfile.TemporaryDirectory() as root:
        for name, array in zip(("image", "mask"), scene(COMPARED), strict=True):
            write_image(Path(root, f"{name}.png"), array)
        files = [f"{root}/{name}.png" for name in ("image", "mask")]
        ours = ["-m", "harmonylib.tools.cli", "harmonize", *files, "-o", f"{root}/out.png", "--force"]

        def spent(words: list[str]) -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

        row = compared(lambda: spent(ours), lambda: spent(["-c", "import torch"]), 5, "CPU s")
    return {"name": f"harmonize one picture, {MODELS[0]}, a fresh process / import torch alone", **row}


def rows(device="auto", repeats: int = 5) -> list[dict]:
    """Every model at every size; ours (working size, then carried to full size) against the network at 512 px."""
    found = []
    for model in MODELS:
        for label, side in SIDES.items():
            call = functools.partial(harmonize, *scene(side), model=model, device=device)
            times = paired(on(2, call), on(1, call), repeats)
            found.append({"name": f"harmonize {label}, {model}: two threads / one", **times})
    image, mask = scene(COMPARED)
    name = "diffharmony++"
    whole = functools.partial(run_model, load_model(name, str(pick_device(device))), image, mask, 0)
    times = paired(functools.partial(harmonize, image, mask, model=name, device=device), whole, repeats)
    found.append({"name": f"harmonize {COMPARED} px, {name}, against the network at full size", **times})
    return [*found, *folders(device), cold_start()]
