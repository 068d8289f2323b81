"""What each stage trains: a model, a loss closure and batches, handed to the one loop in `training`."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .core.cache import settings_of, weights_digest
from .core.devices import pick_device
from .core.errors import HarmonyError
from .core.seeds import rng
from .data.batches import LatentBatches, PixelBatches, TripleSet
from .data.recipes import DEFAULTS, RecipeSettings
from .models.contrastive import RegionContrastiveLoss, harmonization_loss
from .models.diffusion import denoising_loss, latent_mask, scale_latents, training_scheduler
from .models.refinement import RefinementUNet, refinement_loss
from .models.resunet import ContrastiveResUNet, build
from .models.vae import HarmonyVAE, harmony_vae_loss
from .training import TrainSettings, batch_indices, train


def harmony_vae(
    vae,
    data: TripleSet,
    task: str,
    settings: TrainSettings,
    *,
    seed: int,
    start: HarmonyVAE | None = None,
    loss: str = "l2",
    decoder: bool = True,
    crop=0,
    recolor: float = 0.0,
    jitter: float = 0.0,
    recipes: RecipeSettings = DEFAULTS,
    mask_init: str = "zero",
    skip_init: str = "zero",
    device="auto",
    checkpoints=None,
) -> tuple[HarmonyVAE, list[dict]]:
    """Train a Harmony-VAE around `vae` (DiffHarmony++ Sec. 3.2, 5.2).

    task: "harmonize" (target real, condition composite) or "inverse". start: one to go on from, trained in place.
    decoder=False trains the conditional encoder only (Table 5). crop, recolor, jitter and recipes as in
    `batches.PixelBatches`. The history carries `skip_norms`, the norms of the zero
    convolutions' weights, ordered as `skip_convs`.
    """
    device = pick_device(device)
    torch.manual_seed(seed)
    model = (start or HarmonyVAE.from_vae(vae, mask_init=mask_init, skip_init=skip_init)).to(device)
    model.set_trainable(decoder)
    words, anew = (seed, "harmony_vae", task), {"recolor": recolor, "jitter": jitter, "recipes": recipes}
    batches = LatentBatches(data, model, task, settings.batch_size, words, device, crop, **anew)

    history = train(
        model,
        harmony_vae_loss(loss),
        batches,
        settings,
        name=f"harmony-vae {task}",
        seed=seed,
        device=device,
        observe=lambda vae: {"skip_norms": [conv.weight.norm().item() for conv in vae.skip_convs()]},
        checkpoints=checkpoints,
        key=[data.key(recolor < 1), loss, decoder, crop, repr(anew)],
    )
    return model.requires_grad_(True), history


def diffharmony(
    base,
    data: TripleSet,
    task: str,
    settings: TrainSettings,
    *,
    seed: int,
    foreground: bool = True,
    mask_start: str = "base",
    crop=0,
    recolor: float = 0.0,
    jitter: float = 0.0,
    recipes: RecipeSettings = DEFAULTS,
    device="auto",
    checkpoints=None,
):
    """Fine-tune a base's inpainting UNet to harmonize, or to do the inverse (DiffHarmony++ Eq. 1, Sec. 4.1).

    base: a DiffHarmonyPipeline whose autoencoder stays frozen; its UNet is trained in place. foreground: the published
    foreground-weighted loss (True) or the plain one. crop, recolor, jitter and recipes as in `batches.PixelBatches`.
    mask_start: "base" keeps the base's weights for the mask channel (as published); "zero" (ours) sets them to zero, so
    that training starts from copying the composite instead of from filling a hole, which small bases need.
    Returns (unet, history). Raises HarmonyError for an unknown mask_start.
    """
    if mask_start not in ("base", "zero"):
        raise HarmonyError(f"mask_start {mask_start!r} is unknown; use base (as published) or zero")
    device = pick_device(device)
    vae, scheduler = base.vae.to(device).requires_grad_(False), training_scheduler(base.scheduler.config)
    prompt = base.prompt.embeds.to(device)
    if mask_start == "zero":
        base.unet.conv_in.weight.data[:, vae.config.latent_channels] = 0.0
    words = (seed, "diffharmony", task)
    noise = settings_of(base.scheduler.config)
    anew = {"recolor": recolor, "jitter": jitter, "recipes": recipes}
    batches = LatentBatches(data, vae, task, settings.batch_size, words, device, crop, pixels=False, **anew)

    def loss(unet, batch, generator):
        target, condition = (
            scale_latents(sample_posterior(batch[name], generator), vae) for name in ("moments", "condition_moments")
        )
        mask = latent_mask(batch["mask"], target.shape[-2:])
        return {"loss": denoising_loss(unet, scheduler, target, condition, mask, prompt, generator, foreground)}

    history = train(
        base.unet,
        loss,
        batches,
        settings,
        name=f"diffharmony {task}",
        seed=seed,
        device=device,
        checkpoints=checkpoints,
        key=[
            data.key(recolor < 1),
            foreground,
            crop,
            repr(anew),
            weights_digest(vae),
            weights_digest(base.prompt),
            noise,
        ],
    )
    return base.unet, history


def refinement(
    outputs,
    data: TripleSet,
    settings: TrainSettings,
    *,
    channels=(128, 256, 512, 512),
    seed: int,
    device="auto",
    checkpoints=None,
) -> tuple[RefinementUNet, list[dict]]:
    """Train a refiner on stage-1 outputs (N x 3 x S x S, `refinement.decode_latents`) of the composites of `data`.

    The published code makes them anew in every step; here they are made once, with one draw of noise each. The last
    convolution starts at zero (ours), so that training starts from the stage-1 output.
    """
    torch.manual_seed(seed)
    model = RefinementUNet(block_out_channels=tuple(channels), norm_num_groups=min(32, channels[0] // 2))
    torch.nn.init.zeros_(model.conv_out.weight)
    torch.nn.init.zeros_(model.conv_out.bias)

    def make_batch(step):
        indices = batch_indices(step, len(data), settings.batch_size, (seed, "refinement"))
        batch = data.batch(indices) | {"output": torch.from_numpy(outputs[indices]).float()}
        mirrored = rng(seed, "refinement", "flip", step).random() < 0.5
        return {name: value.flip(-1) if mirrored else value for name, value in batch.items()}

    key = [data.key(), Path(outputs.filename).stem]
    loop = {"name": "refinement", "seed": seed, "device": device, "checkpoints": checkpoints, "key": key}
    return model, train(model, refinement_loss, make_batch, settings, **loop)


def sample_posterior(moments: torch.Tensor, generator) -> torch.Tensor:
    """Latents BxCxhxw drawn from posterior moments Bx2Cxhxw, with noise of a CPU generator."""
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean + posterior.std * noise.to(moments.device)


def contrastive_resunet(
    data: TripleSet,
    settings: TrainSettings,
    *,
    seed: int,
    start: ContrastiveResUNet | None = None,
    base_channels: int = 32,
    depth: int = 5,
    residual_convs: int = 3,
    style: str = "style-fusion",
    head: str = "residual",
    encoder: str | None = None,
    view: int = 96,
    weights=(0.4, 0.5, 0.1),
    error: str = "l1",
    reading: str = "B",
    patches: int = 256,
    crop=0,
    recolor: float = 0.0,
    restyle: float = 0.0,
    jitter: float = 0.0,
    recipes: RecipeSettings = DEFAULTS,
    device="auto",
    observe=None,
    checkpoints=None,
):
    """Train the ResUNet with L1, foreground error and the region-wise contrastive term (contrastive paper, Eq. 13).

    start: a network to go on from, trained in place; None builds one of the given architecture, a pre-trained encoder
    with its ImageNet weights. crop, recolor, restyle, jitter and recipes as in `batches.PixelBatches`; error as in
    `contrastive.foreground_error`. A weight of 0 switches its term off (Table VI).
    observe(model) -> dict of numbers goes into the history, ten times in a run (Figures 8, 9).
    Returns (model, history).
    """
    device = pick_device(device)
    torch.manual_seed(seed)
    shape = {"base_channels": base_channels, "depth": depth, "residual_convs": residual_convs, "style": style}
    model = start or build(data.size, head=head, encoder=encoder, view=view, **shape)
    contrast = RegionContrastiveLoss(reading, patches) if weights[2] else None
    words = (seed, "resunet")
    batches = PixelBatches(data, settings.batch_size, words, crop, recolor, restyle, jitter, recipes)

    def loss(net, batch, generator):
        composite, real, mask = batch["composite"], batch["real"], batch["mask"]
        output = net(composite, mask, generator)
        return harmonization_loss(output, real, mask, contrast, composite, weights, generator, error)

    history = train(
        model,
        loss,
        batches,
        settings,
        name="contrastive resunet",
        seed=seed,
        device=device,
        extra_modules=(contrast,) if contrast else (),
        observe=observe,
        checkpoints=checkpoints,
        key=[
            data.key(recolor < 1),
            style,
            weights,
            error,
            reading,
            patches,
            crop,
            recolor,
            restyle,
            jitter,
            repr(recipes),
        ],
    )
    return model, history
