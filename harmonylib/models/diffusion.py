"""Latents, noise and the denoising objective (DiffHarmony++ Eq. 1; channel order as published)."""

import contextlib

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.cache import settings_of, weights_digest

NUM_TRAIN_TIMESTEPS = 1000
SMALL_LATENTS = 24 * 24  # up to which plain attention trains faster on a CPU than PyTorch's fused one


def scale_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """Autoencoder -> diffusion latents: (z - mean) / std per channel where the config has them, else z * factor."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return latents * vae.config.scaling_factor
    shape = (1, -1, 1, 1)
    return (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(shape)


def unscale_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """Diffusion latents -> autoencoder latents; the inverse of scale_latents."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return latents / vae.config.scaling_factor
    shape = (1, -1, 1, 1)
    return latents * latents.new_tensor(std).view(shape) + latents.new_tensor(mean).view(shape)


def latent_mask(mask: torch.Tensor, size) -> torch.Tensor:
    """Bx1xHxW mask -> Bx1xhxw by nearest neighbour (the top-left pixel of each block, as published)."""
    return F.interpolate((mask >= 0.5).float(), size=tuple(size), mode="nearest")


def foreground_weighted_mse(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Published default loss: MSE of (prediction * mask, target * mask) over all of HxW, times clamp(HW/|fg|, 1, 5)."""
    error = ((prediction.float() - target.float()) * mask).square().mean(dim=(1, 2, 3))
    weight = (mask[0].numel() / mask.sum(dim=(1, 2, 3)).clamp(min=1)).clamp(1, 5)
    return (error * weight).mean()


def sample_posterior(moments: torch.Tensor, generator) -> torch.Tensor:
    """Latents BxCxhxw drawn from posterior moments Bx2Cxhxw, with noise of a CPU generator."""
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean + posterior.std * noise.to(moments.device)


def training_attention(latents: torch.Tensor):
    """Context for a forward pass that will be followed by a backward pass, on latents ...xhxw.

    The fused attention's backward pass on CPUs takes much of a small UNet's step: without it a step of the small base
    at batch 16 is 1.25 to 1.4 times as fast at 16x16 latents and slower at 32x32 (`benchmarks/training.py`).
    """
    small = latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS
    return sdpa_kernel(SDPBackend.MATH) if small else contextlib.nullcontext()


def denoising_loss(unet, scheduler, target, condition, mask, prompt, generator, foreground=True, first=0.0):
    """One training step's loss (Eq. 1).

    target, condition: BxCxhxw diffusion latents; mask: Bx1xhxw; prompt: BxTxD or 1xTxD. Noise and time steps come from
    `generator` on the CPU: the share `first` of the steps are the sampler's first (pure noise), the others uniform.
    The scheduler's config decides between epsilon and v. UNet input: [noisy | mask | condition].
    """
    noise = torch.randn(target.shape, generator=generator).to(target.device)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(target),), generator=generator)
    if first:
        at_first = torch.rand(len(target), generator=generator) < first
        steps = steps.masked_fill(at_first, scheduler.config.num_train_timesteps - 1)
    steps = steps.to(target.device)
    noisy = scheduler.add_noise(target, noise, steps)
    inputs = torch.cat([noisy, mask, condition], dim=1)
    again = getattr(unet, "is_gradient_checkpointing", False)  # the backward pass would choose another attention
    with contextlib.nullcontext() if again else training_attention(target):
        prediction = unet(inputs, steps, prompt.to(target.device).expand(len(target), -1, -1)).sample
    goal = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(target, noise, steps)
    if foreground:
        return foreground_weighted_mse(prediction, goal, mask)
    return F.mse_loss(prediction.float(), goal.float())


def training_scheduler(config) -> DDPMScheduler:
    """The DDPM scheduler of a base's scheduler config (num_train_timesteps, betas and prediction type are kept)."""
    return DDPMScheduler.from_config(config)


def sampling_scheduler(config) -> EulerAncestralDiscreteScheduler:
    """Euler ancestral with "linspace" time steps (999, 749.25, 499.5, 249.75, 0 at five steps), whatever was saved."""
    return EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="linspace", steps_offset=0)


def set_steps(scheduler, steps: int, device) -> None:
    """Choose so many time steps of a sampling scheduler, the noisiest first; a single one is the noisiest."""
    scheduler.set_timesteps(max(steps, 2), device=device)
    if steps == 1:  # the only step of "linspace" would be t = 0, where nothing is decided
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[:1], scheduler.sigmas[[0, -1]]


def base_scheduler(prediction_type: str) -> DDPMScheduler:
    """Stable Diffusion's noise schedule (scaled linear, 0.00085 to 0.012); with "v_prediction" it ends in pure noise.

    Stable Diffusion's own leaves a little of the image at its noisiest step, which training sees and sampling does not
    (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", Sec. 3.1): a small UNet would read
    the foreground's mean colour off it.
    """
    return DDPMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="linspace",
        rescale_betas_zero_snr=prediction_type == "v_prediction",
    )


# ---- training ----


def edge_and_first_step(section, task: str) -> tuple[bool, float]:
    """Whether the prompt reads the mask's edge, and the share of training at the sampler's first step (both ours).

    By the section `diffharmony` for "harmonize"; neither for "inverse", whose outputs should differ.
    """
    return (section.edge, section.first_step) if task == "harmonize" else (False, 0.0)


def diffharmony_batches(vae, data, task: str, section, seed: int, recipes=None):
    """The `LatentBatches` that `DiffHarmonyLoss` takes, for "harmonize" or "inverse", by the section `diffharmony`."""
    from ..data.batches import DEFAULTS, LatentBatches, augmentation  # which a finished model does without

    options = {"seed": (seed, "diffharmony", task), "recipes": recipes or DEFAULTS, **augmentation(section)}
    return LatentBatches(data, vae, task, pixels=edge_and_first_step(section, task)[0], **options)


class DiffHarmonyLoss(nn.Module):
    """Loss for `training.train` of a UNet (Eq. 1): batch {"moments", "condition_moments", "mask"} and, for an
    `EdgePrompt`, which is trained along, "condition".

    base: a DiffHarmonyPipeline, whose autoencoder and scheduler stay as they are; prompt: its own or an EdgePrompt;
    foreground: the published foreground-weighted loss (True) or the plain one; first: see `denoising_loss`.
    """

    def __init__(self, base, prompt, foreground: bool = True, first: float = 0.0):
        super().__init__()
        self.prompt, self.foreground, self.first = prompt, foreground, first
        self.fixed = (base.vae.requires_grad_(False), training_scheduler(base.scheduler.config))  # no owner of these
        self.key = [foreground, first, weights_digest(base.vae), settings_of(base.scheduler.config)]

    def forward(self, unet, batch, generator) -> dict[str, torch.Tensor]:
        vae, scheduler = self.fixed
        target, condition = (
            scale_latents(sample_posterior(batch[name], generator), vae) for name in ("moments", "condition_moments")
        )
        mask = latent_mask(batch["mask"], target.shape[-2:])
        prompt = self.prompt(batch.get("condition", mask), batch["mask"], generator)
        loss = denoising_loss(unet, scheduler, target, condition, mask, prompt, generator, self.foreground, self.first)
        return {"loss": loss}
