"""What each model costs: parameters, FLOPs, images a second and peak memory, each measured in a process of its own.

    python -m benchmarks.complexity

writes benchmarks/complexity.json, which the report shows. Times differ from run to run: no stage of the pipeline makes
them.
"""

import multiprocessing
import os
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from harmonylib.core.devices import pick_device
from harmonylib.core.images import resize_image, resize_mask
from harmonylib.core.json_files import write_json
from harmonylib.core.progress import progress
from harmonylib.data.embedded_photos import load_photos
from harmonylib.inference import MODELS, load_model, run_model, working_size
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.models.resunet import ContrastiveResUNet

PAPER = "contrastive-resunet, the paper's size"  # untrained: weights do not change what a model costs


def _resident_peak() -> float:
    """Bytes of memory this process has held at most."""
    import resource

    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name: str, repeats: int = 7) -> dict:
    """Costs of one model, one image at a time at its working size; the fastest of the repeats after one to warm up."""
    device = pick_device()
    before = _resident_peak()
    if name == PAPER:
        model, size = ContrastiveResUNet().eval().to(device), 256
    else:
        model = load_model(name, str(device))
        size = working_size(model)
    photo = load_photos("test")[0]
    image, mask = resize_image(photo.image, (size, size)), resize_mask(next(iter(photo.masks.values())), (size, size))
    with FlopCounterMode(display=False) as counter:
        run_model(model, image, mask, seed=0)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run_model(model, image, mask, seed=0)  # ends with a copy to the CPU, so the GPU's queue is empty
        seconds.append(time.perf_counter() - start)
    modules = [model.vae, model.unet] if isinstance(model, DiffHarmonyPipeline) else [model]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_peak() - before
    return {
        "parameters": sum(p.numel() for module in modules for p in module.parameters()),
        "gflops_per_image": round(counter.get_total_flops() / 1e9, 3),
        "size": size,
        "images_per_second": float(f"{1 / min(seconds):.3g}"),
        "peak_megabytes": round(peak / 1e6),
    }


def main() -> None:
    device = pick_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    machine += f", load average {os.getloadavg()[0]:.0f} at the start"
    models = {}
    for name in progress([*MODELS, PAPER], desc="measuring", unit="model"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            models[name] = pool.apply(measure, (name,))
    write_json("benchmarks/complexity.json", {"machine": machine, "models": models})


if __name__ == "__main__":
    main()
