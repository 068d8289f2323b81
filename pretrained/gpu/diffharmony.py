"""`python -m pretrained.gpu.diffharmony PHOTOS OUT --index all.csv`: train a base and DiffHarmony++ on one GPU.

Four phases: the autoencoder, the inpainting UNet, the harmonizer with its edge prompt, Harmony-VAE.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import typer
from torch.nn import functional as F

from harmonylib.core.devices import pick_device
from harmonylib.core.json_files import write_json
from harmonylib.core.seeds import generator, rng
from harmonylib.data.batches import inpainting_masks
from harmonylib.models.base import autoencoder_loss, inpainting_loss, open_base
from harmonylib.models.diffusion import DiffHarmonyLoss
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.models.start import initial_harmony_vae, initial_prompt, initial_unet
from harmonylib.models.vae import harmony_vae_loss
from harmonylib.tools.terminal import run
from harmonylib.training import TrainSettings

from .loop import train
from .photos import read_photos
from .recipes import Composites

BASE = {"autoencoder_channels": (16, 32, 64, 128), "unet_channels": (64, 128), "size": 192}
HOW = SimpleNamespace(edge=True, first_step=0.8, mask_start="zero", mask_init="zero", train_decoder=True)
Minutes, Counts = tuple[float, float, float, float], tuple[int, int, int, int]
app = typer.Typer(add_completion=False)


def halved(batch: dict) -> dict[str, torch.Tensor]:
    """A batch at half its size; where nothing would be left of a mask it keeps all that it touches."""
    mask = (F.avg_pool2d(batch["mask"], 2) >= 0.5).float()
    mask = torch.where(mask.amax((2, 3), True) > 0, mask, F.max_pool2d(batch["mask"], 2))
    return {"mask": mask} | {name: F.avg_pool2d(batch[name], 2) for name in ("composite", "real")}


def pictures(composites, step: int) -> dict[str, torch.Tensor]:
    """For the autoencoder: photos, composites and windows of photos at their full size, a third each."""
    batch, third, half = composites(step), composites.batch_size // 3, composites.side // 2
    small, (y, x) = halved(batch), rng(*composites.seed, "window", step).integers(half + 1, size=2)
    windows = batch["real"][2 * third :, :, y : y + half, x : x + half]
    return {"real": torch.cat([small["real"][:third], small["composite"][third : 2 * third], windows])}


def holes(composites, step: int) -> dict[str, torch.Tensor]:
    """For the inpainting UNet; masks are drawn on the CPU."""
    small = halved(composites(step))
    return small | {"mask": inpainting_masks(small["mask"].cpu(), *composites.seed, step).to(composites.device)}


def latents(vae, large: bool, composites, step: int) -> dict[str, torch.Tensor]:
    """For Harmony-VAE, or the harmonizer (large), whose prompt reads the edge at the full size in 3 steps of 4."""
    batch = composites(step)
    small = halved(batch)
    with torch.no_grad():
        moments = vae.encode(torch.cat([small["real"], small["composite"]])).latent_dist.parameters
    read = batch if large and step % 4 else small
    out = {"target": small["real"], "condition": read["composite"], "mask": read["mask"]}
    return out | dict(zip(("moments", "condition_moments"), moments.chunk(2), strict=True))


@app.command()
def main(photos: Path, out: Path, index: Path = None, start: Path = None, minutes: Minutes = (1.75, 1.25, 3.1, 1.75),
         steps: Counts = (0, 0, 0, 0), batch_sizes: Counts = (128, 256, 256, 96), pieces: int = 4000, size: int = 256,
         seed: int = 0, device: str = "auto"):  # fmt: skip
    """Train on composites of PHOTOS and save OUT/base and OUT/diffharmony++. start: a folder of these two (the second
    may be missing) to go on from; what has no minutes stays as it is; steps, if any, go before minutes."""
    at, data, histories = pick_device(device), read_photos(photos, index, size, pieces, seed), {}

    def phase(number: int, name: str, model, loss, make, rate: float = 1e-3):
        if not (steps if any(steps) else minutes)[number]:
            return
        settings = TrainSettings(steps[number] or 10_000, batch_sizes[number], rate, 0.05, "cosine", weight_decay=0.01)
        batches = partial(make, Composites(data, batch_sizes[number], (seed, name), at, whole=0.4))
        how = (settings, None if any(steps) else minutes[number], generator(seed, name))
        histories[name] = train(name, model, loss, batches, *how)

    source = {"source": "pipeline", "path": start / "base"} if start else {"source": "small"}
    pipeline = open_base(SimpleNamespace(**BASE, **source), seed).to(at)
    vae = pipeline.vae
    phase(0, "autoencoder", vae, autoencoder_loss, pictures)
    if "autoencoder" in histories:
        sample = Composites(data, batch_sizes[0], (seed, "latents"), at, whole=0.4)
        with torch.no_grad():
            found = torch.cat([vae.encode(pictures(sample, step)["real"]).latent_dist.mean for step in range(10)])
        mean, std = found.mean((0, 2, 3)).tolist(), found.std((0, 2, 3)).tolist()
        vae.register_to_config(latents_mean=mean, latents_std=std)
    phase(1, "inpainting UNet", pipeline.unet, inpainting_loss(pipeline), holes)
    pipeline.save_pretrained(out / "base")

    folder = start / "diffharmony++" if start and (start / "diffharmony++").is_dir() else None
    prompt, unet = initial_prompt(HOW, folder, pipeline, "harmonize"), initial_unet(HOW, folder, pipeline)
    loss = DiffHarmonyLoss(pipeline, prompt, first=HOW.first_step)
    phase(2, "harmonizer", unet, loss, partial(latents, vae, True))
    harmony_vae = initial_harmony_vae(HOW, folder, vae, seed)
    phase(3, "Harmony-VAE", harmony_vae, harmony_vae_loss("l2"), partial(latents, vae, False), 5e-4)
    harmony_vae.register_to_config(sample_size=size // 2)
    DiffHarmonyPipeline(harmony_vae, unet, pipeline.scheduler, prompt, 2).save_pretrained(out / "diffharmony++")
    write_json(out / "training.json", histories)


if __name__ == "__main__":
    sys.exit(run(app, "python -m pretrained.gpu.diffharmony"))
