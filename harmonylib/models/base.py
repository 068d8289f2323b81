"""The small latent-diffusion base: an autoencoder and a 9-channel inpainting UNet trained on photos.

It is to the `mini` profile what Stable Diffusion inpainting is to `paper`: it has never seen a harmonization pair.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..core.cache import weights_digest
from ..core.devices import pick_device
from ..data.batches import PhotoBatches
from ..training import TrainSettings, train
from .diffusion import base_scheduler, denoising_loss, latent_mask, scale_latents, training_scheduler
from .identity_init import copy_colours, copy_condition
from .pipeline import DiffHarmonyPipeline, PromptEmbedding, open_autoencoder


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
        norm_num_groups=2,  # wide enough for channels that carry colours (`identity_init`)
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
        norm_num_groups=4,
    )


YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-R BT.601


def autoencoder_loss(vae, batch, generator) -> dict[str, torch.Tensor]:
    """L1 of pixels and of 8x8 block means in YCbCr with heavier chroma, and a small KL term; batch: "real" Bx3xHxW.

    With plain RGB L1 a small autoencoder spends its four channels on edges and reproduces a grey picture, which is of
    no use to harmonization: natural photos vary far less in chroma than in luma.
    """
    posterior = vae.encode(batch["real"]).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    difference = torch.einsum("ij,bjhw->bihw", torch.tensor(YCBCR).to(noise.device), reconstruction - batch["real"])
    luma, cb, cr = (d.abs().mean() + F.avg_pool2d(d, 8).abs().mean() for d in difference.unbind(1))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return {"loss": luma + 4.0 * (cb + cr) + 1e-5 * kl, "luma": luma, "chroma": cb + cr, "kl": kl}


@torch.no_grad()
def set_latent_statistics(vae, photos, size: int, seed: int) -> None:
    """Write the mean and deviation of each channel of crops' latents into the config: latents_mean, latents_std."""
    batches = PhotoBatches(photos, size, 32, seed)
    latents = torch.cat([vae.encode(batches(step)["real"].to(vae.device)).latent_dist.mean for step in range(8)])
    mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    vae.register_to_config(latents_mean=mean, latents_std=std)


def inpainting_loss(pipeline: DiffHarmonyPipeline):
    """Loss of the pipeline's UNet: from [noisy latents | mask | latents of the masked image] to the image's latents."""
    scheduler, prompt = training_scheduler(pipeline.scheduler.config), pipeline.prompt.embeds
    vae = pipeline.vae.eval().requires_grad_(False)

    def loss(model, batch, generator):
        with torch.no_grad():
            images = torch.cat([batch["real"], batch["real"] * (batch["mask"] < 0.5)])
            target, condition = scale_latents(vae.encode(images).latent_dist.mean, vae).chunk(2)
        mask = latent_mask(batch["mask"], target.shape[-2:])
        value = denoising_loss(model, scheduler, target, condition, mask, prompt, generator, foreground=False)
        return {"loss": value}

    loss.key = [weights_digest(vae), weights_digest(pipeline.prompt)]
    return loss


def open_base(settings, seed: int) -> DiffHarmonyPipeline:
    """The base that the `base` section of params.yaml names, as a pipeline on the CPU.

    source "pipeline": a saved DiffHarmonyPipeline folder; "stable-diffusion": an SD inpainting folder or hub id, with
    `vae` (a plain autoencoder or a Harmony-VAE) replacing its own; "small": a new small base, which starts by copying.
    """
    if settings.source == "pipeline":
        return DiffHarmonyPipeline.from_pretrained(settings.path, device="cpu")
    if settings.source == "stable-diffusion":
        vae = open_autoencoder(settings.vae, torch_dtype=torch.float32) if settings.vae else None
        return DiffHarmonyPipeline.from_pretrained(settings.path, vae, device="cpu")
    assert settings.source == "small", settings.source
    torch.manual_seed(seed)
    vae = copy_colours(build_autoencoder(settings.autoencoder_channels, size=settings.size))
    torch.manual_seed(seed)
    unet, prompt = copy_condition(build_unet(settings.unet_channels)), PromptEmbedding(1, 32)
    return DiffHarmonyPipeline(vae, unet, base_scheduler("v_prediction"), prompt)


def train_base(pipeline, photos, run, checkpoints=None, folder=None) -> dict[str, list[dict]]:
    """Train the parts of `pipeline` that section `base` gives steps, on (image, mask) arrays: autoencoder, then UNet.

    Returns {"autoencoder": history, "unet": history}, an empty history for a part that is kept as it is. folder: where
    the pipeline will be saved; the curves of what is trained go there as vae/training.json and unet/training.json.
    """
    section, histories = run.base, {"autoencoder": [], "unet": []}
    pipeline.to(pick_device(run.device))
    loop = {"seed": run.seed, "device": run.device, "checkpoints": checkpoints}
    curve = {part: folder and f"{folder}/{part}/training.json" for part in ("vae", "unet")}
    if section.autoencoder_steps:
        settings = replace(TrainSettings.of(run, "base", "autoencoder"), schedule="cosine", ema_decay=0.995)
        size = getattr(section, "autoencoder_size", min(64, section.size))
        batches = PhotoBatches(photos, size, section.batch_size, run.seed)
        options = {"name": "base autoencoder", "curve": curve["vae"], **loop}
        histories["autoencoder"] = train(pipeline.vae, autoencoder_loss, batches, settings, **options)
        set_latent_statistics(pipeline.vae, photos, section.size, run.seed)
    if section.unet_steps:
        settings = replace(TrainSettings.of(run, "base", "unet"), schedule="cosine", ema_decay=0.998)
        batches = PhotoBatches(photos, section.size, section.batch_size, run.seed, scale=(0.4, 1.0), inpainting=True)
        options = {"name": "base UNet", "curve": curve["unet"], **loop}
        histories["unet"] = train(pipeline.unet, inpainting_loss(pipeline), batches, settings, **options)
    return histories
