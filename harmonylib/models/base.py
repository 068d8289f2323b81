"""The small latent-diffusion base: an autoencoder and a 9-channel inpainting UNet trained on photos.

It is to the `mini` profile what Stable Diffusion inpainting is to `paper`: it has never seen a harmonization pair.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..core.checkpoints import discard_finished
from ..core.devices import pick_device
from ..core.distributed import join_group, rank_and_world
from ..core.errors import HarmonyError
from ..core.json_files import write_json
from ..data.batches import PhotoBatches, inpainting_masks
from ..training import TrainSettings, train
from .diffusion import base_scheduler, denoising_loss, latent_mask, scale_latents
from .pipeline import DiffHarmonyPipeline, PromptEmbedding, open_autoencoder


@dataclass(frozen=True)
class BaseSettings:
    """Architecture and training of the small base. sizes are training crops in pixels; latents are 1/8 of them."""

    autoencoder: TrainSettings
    unet: TrainSettings
    autoencoder_size: int = 128
    unet_size: int = 192
    autoencoder_channels: tuple[int, ...] = (16, 32, 64, 128)
    unet_channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    latent_channels: int = 4
    prompt_dim: int = 32
    kl_weight: float = 1e-5
    chroma_weight: float = 4.0


def build_autoencoder(channels, layers: int = 1, latent_channels: int = 4, size: int = 64) -> AutoencoderKL:
    """A diffusers AutoencoderKL of Stable Diffusion's topology with other widths (three: 1/4 latents, four: 1/8).

    Without attention in the middle, which took half of a decode on a CPU. size: the resolution in pixels that it is
    meant for (`sample_size` in its config).
    """
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=size,
    )


def build_unet(channels, layers: int = 1, latent_channels: int = 4, prompt_dim: int = 32) -> UNet2DConditionModel:
    """A 9-channel (for 4-channel latents) UNet of Stable Diffusion's kind; self-attention from the second level on."""
    deeper = len(channels) - 1
    return UNet2DConditionModel(
        in_channels=2 * latent_channels + 1,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        cross_attention_dim=prompt_dim,
        attention_head_dim=32,
        norm_num_groups=16,
    )


YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-R BT.601


def autoencoder_loss(kl_weight: float, chroma_weight: float):
    """L1 of pixels and of 8x8 block means in YCbCr with heavier chroma, and a small KL term.

    With plain RGB L1 a small autoencoder spends its four channels on edges and reproduces a grey picture, which is of
    no use to harmonization: natural photos vary far less in chroma than in luma.
    """

    def loss(vae, batch, generator):
        posterior = vae.encode(batch["real"]).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        difference = torch.einsum("ij,bjhw->bihw", torch.tensor(YCBCR).to(noise.device), reconstruction - batch["real"])
        luma, cb, cr = (d.abs().mean() + F.avg_pool2d(d, 8).abs().mean() for d in difference.unbind(1))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        value = luma + chroma_weight * (cb + cr) + kl_weight * kl
        return {"loss": value, "luma": luma, "chroma": cb + cr, "kl": kl}

    return loss


@torch.no_grad()
def measure_latents(vae, make_batch, batches: int = 8) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the posterior means, for `latents_mean` and `latents_std`."""
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(make_batch(step)["real"].to(device)).latent_dist.mean for step in range(batches)])
    return [latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()]


def pretrain_autoencoder(vae, photos, settings: BaseSettings, seed, **loop) -> list[dict]:
    """Train `vae` on random crops, then write its latent statistics into its config. Returns the history."""
    make_batch = PhotoBatches(photos, settings.autoencoder_size, settings.autoencoder.batch_size, seed)
    loss = autoencoder_loss(settings.kl_weight, settings.chroma_weight)
    history = train(vae, loss, make_batch, settings.autoencoder, name="base autoencoder", seed=seed, **loop)
    statistics = PhotoBatches(photos, settings.unet_size, 32, seed)
    mean, std = measure_latents(vae, statistics)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return history


def pretrain_unet(unet, vae, prompt, photos, settings: BaseSettings, seed, *, device="auto", **loop):
    """Train `unet` to inpaint: input [noisy latents | mask | latents of the masked image], v-prediction."""
    scheduler = base_scheduler("v_prediction")
    vae = vae.to(pick_device(device)).eval().requires_grad_(False)
    batches = PhotoBatches(photos, settings.unet_size, settings.unet.batch_size, seed, scale=(0.4, 1.0))

    def make_batch(step):
        batch = batches(step)
        return {"real": batch["real"], "mask": inpainting_masks(batch["mask"], seed, "inpainting", step)}

    def loss(model, batch, generator):
        with torch.no_grad():
            images = torch.cat([batch["real"], batch["real"] * (batch["mask"] < 0.5)])
            target, condition = scale_latents(vae.encode(images).latent_dist.mean, vae).chunk(2)
        mask = latent_mask(batch["mask"], target.shape[-2:])
        embeds = prompt.to(target.device)
        value = denoising_loss(model, scheduler, target, condition, mask, embeds, generator, foreground=False)
        return {"loss": value}

    return train(unet, loss, make_batch, settings.unet, name="base UNet", seed=seed, device=device, **loop)


def build_base(seed: int, autoencoder_channels, unet_channels, size: int, layers=1, latent_channels=4, prompt_dim=32):
    """The small base, a DiffHarmonyPipeline with random weights on the CPU; see the functions above."""
    torch.manual_seed(seed)
    vae = build_autoencoder(autoencoder_channels, layers, latent_channels, size)
    torch.manual_seed(seed)
    unet = build_unet(unet_channels, layers, latent_channels, prompt_dim)
    return DiffHarmonyPipeline(vae, unet, base_scheduler("v_prediction"), PromptEmbedding(1, prompt_dim))


def train_parts(pipeline, pairs, settings: BaseSettings, seed: int, **loop) -> dict[str, list[dict]]:
    """Train the parts of `pipeline` that have more than 0 steps, on (image, mask) arrays: autoencoder, then UNet.

    Returns {"autoencoder": history, "unet": history}, an empty history for a part that is kept as it is.
    """
    histories = {"autoencoder": [], "unet": []}
    if settings.autoencoder.steps:
        histories["autoencoder"] = pretrain_autoencoder(pipeline.vae, pairs, settings, seed, **loop)
    if settings.unet.steps:
        prompt = pipeline.prompt.embeds
        histories["unet"] = pretrain_unet(pipeline.unet, pipeline.vae, prompt, pairs, settings, seed, **loop)
    return histories


def pretrain(pairs, out, settings: BaseSettings, seed: int, device="auto", checkpoints=None, start=None) -> None:
    """Train a base from (image, mask) arrays and save it to `out`: a DiffHarmonyPipeline folder in fp16.

    start: the folder of a base that is trained further, instead of one with random weights; the architecture is then
    its own. `training.json` beside the weights holds the settings and the loss curves. Of several processes the first
    one writes, and all return when it has.
    """
    if start:
        pipeline = DiffHarmonyPipeline.from_pretrained(start, device="cpu")
    else:
        sizes = (settings.layers, settings.latent_channels, settings.prompt_dim)
        channels = (settings.autoencoder_channels, settings.unet_channels)
        pipeline = build_base(seed, *channels, settings.unet_size, *sizes)
    histories = train_parts(pipeline, pairs, settings, seed, device=device, checkpoints=checkpoints)
    rank, world = rank_and_world()
    if rank == 0:
        pipeline.to(torch.float16).save_pretrained(out)
        about = {"settings": asdict(settings), "seed": seed, "start": start and str(start), "histories": histories}
        write_json(Path(out) / "training.json", about)
        if checkpoints:
            discard_finished(checkpoints)
    if world > 1:
        join_group(pick_device(device)).wait_for_everyone()


def open_base(settings, seed: int) -> DiffHarmonyPipeline:
    """The base that the `base` section of params.yaml names, as a pipeline on the CPU.

    source "pipeline": a saved DiffHarmonyPipeline folder; "stable-diffusion": an SD inpainting folder or hub id, with
    `vae` (a plain autoencoder or a Harmony-VAE) replacing its own; "small": the small base with random weights.
    """
    if settings.source == "pipeline":
        return DiffHarmonyPipeline.from_pretrained(settings.path, device="cpu")
    if settings.source == "stable-diffusion":
        vae = open_autoencoder(settings.vae, torch_dtype=torch.float32) if settings.vae else None
        return DiffHarmonyPipeline.from_pretrained(settings.path, vae, device="cpu")
    if settings.source != "small":
        raise HarmonyError(f"base.source {settings.source!r} is unknown; use small, pipeline or stable-diffusion")
    return build_base(seed, settings.autoencoder_channels, settings.unet_channels, settings.size)


def continue_training(pipeline, pairs, run, **loop) -> dict[str, list[dict]]:
    """`train_parts` by a run's settings (params.yaml), mostly its section `base`."""
    section = run.base
    common = {"batch_size": section.batch_size, "learning_rate": section.learning_rate, "schedule": "cosine"}
    common |= {"precision": run.precision, "compile": run.compile}
    base = BaseSettings(
        autoencoder=TrainSettings(steps=section.autoencoder_steps, ema_decay=0.995, **common),
        unet=TrainSettings(steps=section.unet_steps, ema_decay=0.998, **common),
        autoencoder_size=min(64, section.size),
        unet_size=section.size,
    )
    return train_parts(pipeline, pairs, base, run.seed, device=run.device, **loop)
