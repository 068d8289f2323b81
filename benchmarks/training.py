"""The training loop, candidates and the classifier: prefetching, two processes, files and all, cost against size."""

import contextlib
import itertools
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from harmonylib import training
from harmonylib.augmentation.candidates import Pair, generate_candidates
from harmonylib.core import cache
from harmonylib.core.devices import autocast, has_bf16, pick_device
from harmonylib.core.distributed import join_group
from harmonylib.core.images import read_image, read_mask, to_tensor, write_image
from harmonylib.core.seeds import generator, rng
from harmonylib.data.batches import PixelBatches, TripleSet
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.models import diffusion
from harmonylib.models.classifier import HarmonyClassifier
from harmonylib.models.contrastive import ResUNetLoss
from harmonylib.models.diffusion import denoising_loss, training_scheduler
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.models.resunet import ContrastiveResUNet

from .paired import can_compile, paired

SIZE = 96  # pixels, as in the `mini` profile
BASE = "pretrained/base"
PLUS = "pretrained/diffharmony++"  # built as the inverse model is, which is not shipped


def write_set(root, pairs: int = 8, size: int = SIZE) -> None:
    """A set of noise photos with a box of foreground, in iHarmony4's layout."""
    lines = []
    for number in range(pairs):
        real = rng("benchmark", number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), bool)
        mask[size // 4 : -size // 4, size // 4 : -size // 4] = True
        pair = write_pair(root, "HFlickr", f"f{number}", 1, real, mask)
        lines += [write_composite(root, "HFlickr", pair, variant, 255 - real) for variant in (1, 2)]
    write_list(root, "train", lines)


def prefetching(device) -> dict:
    """Steps of a small ResUNet whose composites are half made on the fly, the next batch in a thread or in line."""
    with tempfile.TemporaryDirectory() as folder:
        cache.ROOT = Path(folder, "cache")
        write_set(folder)
        data = TripleSet(read_triples(folder, "train"), SIZE)
        batches = PixelBatches(data, 8, 0, crop=64, recolor=0.5)
        settings = training.TrainSettings(12, 8)
        model = ContrastiveResUNet(16, 4, 1)

        loss = ResUNetLoss((0.4, 0.5, 0.0))

        def train():
            training.train(model, loss, batches, settings, name="resunet", seed=0, device=device)

        def in_line():
            ahead = training.prefetched
            training.prefetched = lambda batches, steps, **options: ((step, batches(step)) for step in steps)
            train()
            training.prefetched = ahead

        return {"name": f"12 training steps of a small ResUNet, {device}: next batch in a thread / in line",
                **paired(train, in_line, 5)}  # fmt: skip


def generation(device, k: int = 10) -> dict:
    """K candidates of a pair, PNG files included, against a call for each candidate that encodes the pair again."""
    pipeline = DiffHarmonyPipeline.from_pretrained(PLUS, device=device)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        write_set(folder, pairs=1)
        files = Path(folder, "HFlickr/real_images/f0.jpg"), Path(folder, "HFlickr/masks/f0_1.png")
        turn = iter(range(1000))

        def ours():
            pair = Pair("HFlickr", "f0_1", "f0", *files)
            generate_candidates(pipeline, [pair], Path(folder, str(next(turn))), k, 0)

        def plain():
            out = Path(folder, str(next(turn)))
            for index in range(k):
                image, mask = to_tensor(read_image(files[0]))[None], to_tensor(read_mask(files[1]))[None]
                with autocast(pipeline.device):
                    drawn = pipeline(image, mask, generator=generator(index)).images[0]
                write_image(out / f"{index}.png", np.asarray(drawn))

        times = paired(ours, plain, 5)
        rates = {name: k / times[name] for name in ("ours", "baseline")}
        name = f"{k} candidates at {SIZE} px with their files, {device}: a batch / one by one"
        return {"name": name, **times, **rates, "unit": "candidates/s"}


def features(device) -> dict:
    """The classifier's features of 16 pictures out of the cache, against a first look at them."""
    classifier = HarmonyClassifier().eval().to(device)  # random weights cost the same
    with tempfile.TemporaryDirectory() as folder:
        write_set(folder)
        paths = [triple.composite for triple in read_triples(folder, "train")]
        roots = (Path(folder, f"cache {turn}") for turn in itertools.count())

        def extract(root):
            cache.ROOT = root
            classifier.extract(paths)

        times = paired(lambda: extract(Path(folder, "cache")), lambda: extract(next(roots)), 5)
        return {"name": f"classifier features of {len(paths)} pictures, {device}: cache / network", **times}


def unet_run(device, batch: int, size: int = SIZE, **options):
    """(run, batch) of the base's UNet with cached latents, as DiffHarmony trains it; options of TrainSettings."""
    base = DiffHarmonyPipeline.from_pretrained(BASE, device=device)
    side, channels = size // base.factor, base.vae.config.latent_channels
    tensors = {name: torch.randn(batch, channels, side, side) for name in ("target", "condition")}
    tensors["mask"] = (torch.rand(batch, 1, side, side) > 0.5).float()
    prompt, scheduler = base.prompt.embeds.to(device), training_scheduler(base.scheduler.config)

    def loss(unet, batch, draws):
        return {"loss": denoising_loss(unet, scheduler, batch["target"], batch["condition"], batch["mask"], prompt,
                                       draws)}  # fmt: skip

    settings = training.TrainSettings(100, batch, **options)
    return training._Run(base.unet.requires_grad_(True), loss, settings, device), tensors


def attention(device) -> dict:
    """A UNet step with the attention that `diffusion.training_attention` picks, against PyTorch's fused one."""
    run, batch = unet_run(device, 16, 64)

    def fused():
        pick = diffusion.training_attention
        diffusion.training_attention = lambda latents: contextlib.nullcontext()
        run.step(0, batch, generator(0))
        diffusion.training_attention = pick

    times = paired(lambda: run.step(0, batch, generator(0)), fused)
    return {"name": f"UNet step, batch 16 at 64 px, {device}: our choice of attention / the fused one", **times}


def compiled(device) -> list[dict]:
    """A UNet step through torch.compile (`compile: true`), against the eager one; no row without a compiler."""
    if not can_compile(device):
        return []
    (fast, batch), (eager, _) = unet_run(device, 16, compile=True), unet_run(device, 16)
    times = paired(lambda: fast.step(0, batch, generator(0)), lambda: eager.step(0, batch, generator(0)))
    return [{"name": f"UNet step, batch 16 at {SIZE} px, {device}: compiled / eager", **times}]


def _member(rank: int, port: int, queue) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    device = torch.device("cpu")
    join_group(device)
    (shared, batch), (alone, _) = unet_run(device, 16), unet_run(device, 16)
    shared.share_out(0)
    alone.rank, alone.world = 0, 1

    def together():
        shared.step(0, batch, generator(0))
        torch.distributed.barrier()

    def one():
        if rank == 0:
            alone.step(0, batch, generator(0))
        torch.distributed.barrier()

    result = paired(together, one, 8)
    if rank == 0:
        queue.put(result)


def two_processes() -> dict:
    """A UNet step at global batch 16 by two processes of one thread each, against one such process."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    group = [context.Process(target=_member, args=(rank, port, queue)) for rank in range(2)]
    for process in group:
        process.start()
    result = queue.get(timeout=300)
    for process in group:
        process.join()
    return {"name": "UNet step, global batch 16, one thread a process, cpu: 2 processes / 1", **result}


def matrix_rate(device) -> dict:
    """Arithmetic rate of a UNet step against that of a large matrix product in the same precision."""
    run, batch = unet_run(device, 16)
    with FlopCounterMode(display=False) as counter:
        run.step(0, batch, generator(0))
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    times = paired(lambda: run.step(0, batch, generator(0)), lambda: a @ b, 7)
    share = counter.get_total_flops() / (2 * side**3)  # of the product's work that a step does
    return {
        "name": f"arithmetic of a UNet step, {str(dtype)[6:]}, {device}: step / matrix product",
        "ours": counter.get_total_flops() / times["ours"] / 1e9,
        "baseline": 2 * side**3 / times["baseline"] / 1e9,
        "ratio": times["ratio"] * share,
        "spread": [value * share for value in times["spread"]],
        "unit": "GFLOP/s",
    }


def cost_of_size(device) -> list[dict]:
    """Time of a UNet step per image, and per pixel, at four times as much: ratio 1 is linear, below 1 dearer."""

    def timing(name, batch, size, share):
        (large, big), (small, little) = unet_run(device, batch, size), unet_run(device, 4)
        times = paired(lambda: large.step(0, big, generator(0)), lambda: small.step(0, little, generator(0)), 7)
        spread = [value * share for value in times["spread"]]
        return {"name": name, **times, "ours": times["ours"] / share, "ratio": times["ratio"] * share, "spread": spread}

    return [timing(f"UNet step per image, {device}: 16 images / 4", 16, SIZE, 4),
            timing(f"UNet step per pixel, {device}: {2 * SIZE} px / {SIZE} px", 4, 2 * SIZE, 4)]  # fmt: skip


def rows() -> list[dict]:
    device = pick_device()
    found = [measure(device) for measure in (prefetching, generation, features, attention, matrix_rate)]
    return [*found, *compiled(device), two_processes(), *cost_of_size(device)]
