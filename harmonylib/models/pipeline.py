"""DiffHarmony's five-step sampler as a diffusers pipeline; with a Harmony-VAE in it, it is DiffHarmony++."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..core.decoding import MASK_THRESHOLD, mask_levels, to_rgb
from ..core.devices import pick_device
from ..core.errors import HarmonyError
from ..core.images import to_tensor, to_uint8
from .diffusion import latent_mask, sampling_scheduler, scale_latents, unscale_latents
from .vae import HarmonyVAE
from .weights import at_revision, first_line, load_autoencoder, load_strict

OUTPUT_TYPES = ("pil", "pt", "latent")
STRICT_SIZE = 256  # pixels of the square that `strict` starts from


class PromptEmbedding(ModelMixin, ConfigMixin):
    """One cached prompt embedding `.embeds` (1, tokens, dim): what a text encoder says of the empty caption.

    Zeros for the small base; filled from CLIP once for Stable Diffusion (`from_stable_diffusion`).
    """

    @register_to_config
    def __init__(self, tokens: int = 77, dim: int = 768):
        super().__init__()
        self.embeds = torch.nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.embeds


def _image_batch(image) -> torch.Tensor:
    """PIL, HxWx3 uint8, Bx3xHxW tensor in [-1, 1], or a list of the first two -> Bx3xHxW tensor."""
    if isinstance(image, torch.Tensor):
        return _checked(image if image.ndim == 4 else image[None], 3)
    images = image if isinstance(image, (list, tuple)) else [image]
    return _stack([np.asarray(to_rgb(i)) if isinstance(i, Image.Image) else np.asarray(i) for i in images], 3)


def _mask_batch(mask) -> torch.Tensor:
    """PIL, HxW uint8 or bool, Bx1xHxW tensor in {0, 1}, or a list of the first two -> Bx1xHxW tensor in {0, 1}."""
    if isinstance(mask, torch.Tensor):
        return (_checked(mask if mask.ndim == 4 else mask[None], 1) >= 0.5).float()
    masks = mask if isinstance(mask, (list, tuple)) else [mask]
    arrays = [mask_levels(m) if isinstance(m, Image.Image) else np.asarray(m) for m in masks]
    return _stack([a if a.dtype == bool else a > MASK_THRESHOLD for a in arrays], 2)


def _checked(batch: torch.Tensor, channels: int) -> torch.Tensor:
    if batch.ndim != 4 or batch.shape[1] != channels:
        raise HarmonyError(f"tensor {tuple(batch.shape)} is not Bx{channels}xHxW; pass images Bx3xHxW, masks Bx1xHxW")
    return batch


def _stack(arrays: list[np.ndarray], ndim: int) -> torch.Tensor:
    """HxWx3 (ndim 3) or HxW (2) arrays of one size as a batch."""
    shapes = {array.shape for array in arrays}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != ndim or shape[2:] not in ((), (3,)):
        raise HarmonyError(f"shapes {sorted(shapes)}: pass HxWx3 images and HxW masks of one size, in lists")
    return torch.stack([to_tensor(array) for array in arrays])


def read_inputs(image, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Bx3xHxW in [-1, 1] and Bx1xHxW in {0, 1}. Raises HarmonyError for unequal sizes or an empty mask."""
    image, mask = _image_batch(image), _mask_batch(mask)
    if image.shape[-2:] != mask.shape[-2:] or len(image) != len(mask):
        raise HarmonyError(
            f"image is {tuple(image.shape)} but mask is {tuple(mask.shape)}; resize the mask to the image"
        )
    if not mask.flatten(1).any(dim=1).all():
        raise HarmonyError("the mask has no foreground (no pixel above 127); paint the foreground white")
    return image, mask


def pad_to_multiple(tensor: torch.Tensor, multiple: int, mode: str) -> torch.Tensor:
    """Pad right and bottom so that H and W divide by `multiple`; mode "replicate" or "constant" (zeros)."""
    height, width = tensor.shape[-2:]
    return F.pad(tensor, (0, -width % multiple, 0, -height % multiple), mode=mode)


def squash(image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (bilinear, antialiased) and mask (nearest) at `size`, whatever the aspect."""
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(-1, 1)
    return image, F.interpolate(mask, size=size, mode="nearest")


class DiffHarmonyPipeline(DiffusionPipeline):
    """Harmonize composites with a latent diffusion model (DiffHarmony, Sec. 3.1 of DiffHarmony++).

    vae: AutoencoderKL (DiffHarmony) or HarmonyVAE (DiffHarmony++); unet: 2C+1 input channels, ordered [noisy latent |
    mask | composite latent]; scheduler: any of the base's, sampled by Euler ancestral; prompt: PromptEmbedding.
    Raises HarmonyError when the UNet's input channels do not fit the autoencoder.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet2DConditionModel, scheduler, prompt: PromptEmbedding):
        super().__init__()
        expected = 2 * vae.config.latent_channels + 1
        if unet.config.in_channels != expected:
            raise HarmonyError(
                f"the UNet takes {unet.config.in_channels} channels, not {expected} (latent + mask + latent); "
                "use an inpainting UNet"
            )
        self.register_modules(vae=vae, unet=unet, scheduler=sampling_scheduler(scheduler.config), prompt=prompt)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image,
        mask,
        num_inference_steps: int = 5,
        height: int | None = None,
        width: int | None = None,
        generator=None,
        prompt_embeds=None,
        paste: bool = True,
        output_type: str = "pil",
        candidates: int = 1,
        temperature: float = 1.0,
        strict: bool = False,
    ):
        """Harmonize a batch.

        image, mask: PIL, arrays, tensors (Bx3xHxW in [-1, 1], Bx1xHxW in {0, 1}) or lists; any size and aspect, padded
        inside to what the autoencoder divides by. height and width squash the input to that size first (the papers'
        protocol), and are then the output's. strict: reduce the input to 256x256 before anything else, so that a large
        height and width use no more information than methods at 256 px have (a pasted background is the reduced one,
        too). generator: None, one, or one per output image. paste: put the input's background back. output_type: "pil",
        "pt" (Bx3xHxW in [0, 1]) or "latent" (scaled). candidates: outputs per image, conditioned once; temperature
        scales the initial noise. Random draws per generator, in order: initial latents, posterior of the composite, one
        per step, posterior of the condition.
        Raises HarmonyError for unequal sizes, empty masks, fp16 on a CPU, a generator list of the wrong length or an
        unknown output_type.
        """
        if output_type not in OUTPUT_TYPES:
            raise HarmonyError(f"output_type {output_type!r} is unknown; use {', '.join(OUTPUT_TYPES)}")
        image, mask = read_inputs(image, mask)
        device, dtype = self.unet.device, self.unet.dtype
        if dtype == torch.float16 and device.type == "cpu":
            raise HarmonyError("fp16 weights do not run on a CPU; load with torch_dtype=torch.float32")
        if isinstance(generator, list) and len(generator) != len(image) * candidates:
            raise HarmonyError(f"{len(generator)} generators for {len(image) * candidates} outputs; give one for each")
        size = (height or image.shape[-2], width or image.shape[-1])
        if strict:
            image, mask = squash(image, mask, (STRICT_SIZE, STRICT_SIZE))
        if size != image.shape[-2:]:
            image, mask = squash(image, mask, size)
        padded = pad_to_multiple(image, self.factor, "replicate").to(device, dtype)
        padded_mask = pad_to_multiple(mask, self.factor, "constant").to(device, dtype)
        latents = self._denoise(
            padded, padded_mask, num_inference_steps, generator, prompt_embeds, candidates, temperature
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        output = self._decode(latents, padded, padded_mask, generator)
        output = output[..., : size[0], : size[1]].float().clamp(-1, 1).cpu()
        if paste:
            image, mask = (t.float().cpu().repeat_interleave(candidates, dim=0) for t in (image, mask))
            output = torch.where(mask > 0.5, output, image)
        if output_type == "pt":
            return ImagePipelineOutput(images=output / 2 + 0.5)
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in to_uint8(output)])

    def _denoise(self, image, mask, steps, generator, prompt_embeds, candidates, temperature):
        device, dtype, vae = image.device, image.dtype, self.vae
        posterior = vae.encode(image).latent_dist
        mean, std = (p.repeat_interleave(candidates, dim=0) for p in (posterior.mean, posterior.std))
        self.scheduler.set_timesteps(steps, device=device)
        latents = randn_tensor(mean.shape, generator=generator, device=device, dtype=dtype)
        latents = latents * self.scheduler.init_noise_sigma * temperature
        composite = scale_latents(
            mean + std * randn_tensor(mean.shape, generator=generator, device=device, dtype=dtype), vae
        )
        small = latent_mask(mask, mean.shape[-2:]).to(dtype).repeat_interleave(candidates, dim=0)
        embeds = self.prompt.embeds if prompt_embeds is None else prompt_embeds
        embeds = embeds.to(device, dtype).expand(len(latents), -1, -1)
        for t in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(latents, t)
            prediction = self.unet(torch.cat([noisy, small, composite], dim=1), t, embeds).sample
            latents = self.scheduler.step(prediction, t, latents, generator=generator).prev_sample
        return latents

    def _decode(self, latents, image, mask, generator):
        latents = unscale_latents(latents, self.vae)
        if not isinstance(self.vae, HarmonyVAE):
            return self.vae.decode(latents).sample
        return self.vae.decode(latents, image, mask, generator=generator).sample

    @classmethod
    def from_pretrained(cls, folder, vae=None, device="auto", torch_dtype=torch.float32) -> "DiffHarmonyPipeline":
        """Load a folder or hub id (`ID@REVISION` pins it): what `save_pretrained` wrote, or Stable Diffusion (see
        `from_stable_diffusion`).

        vae replaces the folder's own autoencoder. Raises HarmonyError naming the part that is missing or damaged.
        """
        if "prompt" not in _config(cls, folder, default=("prompt",)):
            return cls.from_stable_diffusion(folder, vae, device=device, torch_dtype=torch_dtype)
        prompt = load_strict(PromptEmbedding.from_pretrained, folder, subfolder="prompt", torch_dtype=torch_dtype)
        return cls(prompt=prompt, **_base_parts(folder, vae, None, torch_dtype)).to(pick_device(device))

    @classmethod
    def from_stable_diffusion(cls, folder, vae=None, unet=None, device="auto", torch_dtype=torch.float32):
        """Build from a Stable Diffusion inpainting folder or hub id; the empty caption is encoded once and cached.

        vae replaces the folder's autoencoder (sd-vae-ft-mse, a published ConditionVAE as HarmonyVAE), unet its UNet (a
        fine-tuned one saved apart). Needs the `sd` extra (transformers). Raises HarmonyError as `from_pretrained`.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise HarmonyError(
                'Stable Diffusion\'s text encoder needs transformers: pip install "harmonylib[sd]"'
            ) from None
        try:
            name, revision = at_revision(folder)
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **revision)
            encoder = load_strict(CLIPTextModel.from_pretrained, folder, subfolder="text_encoder")
        except Exception as error:
            reason = first_line(error)
            raise HarmonyError(f"{folder}: tokenizer or text_encoder cannot be loaded ({reason}); restore it") from None
        length = encoder.config.max_position_embeddings
        tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            embeds = encoder(tokens.input_ids)[0].float()
        prompt = PromptEmbedding(*embeds.shape[1:])
        prompt.embeds.data.copy_(embeds)
        return cls(prompt=prompt.to(torch_dtype), **_base_parts(folder, vae, unet, torch_dtype)).to(pick_device(device))


def _config(kind, folder, default=(), **options):
    """The config that a folder or hub id has for a diffusers class, else `default`: the loader says what is wrong."""
    try:
        name, revision = at_revision(folder)
        return kind.load_config(name, **revision, **options)
    except Exception:
        return default


def open_autoencoder(folder, **options) -> AutoencoderKL:
    """A HarmonyVAE where the folder's config has a conditional encoder, else a plain AutoencoderKL; both strictly."""
    config = _config(AutoencoderKL, folder, subfolder=options.get("subfolder"))
    return (HarmonyVAE.from_pretrained if "additional_in_channels" in config else load_autoencoder)(folder, **options)


def _open_unet(folder, **options) -> UNet2DConditionModel:
    """folder/unet; where there is none, folder/weights-STEP (the published inverse model), of several the last."""
    apart = [path for path in Path(folder).glob("weights-*") if path.name.removeprefix("weights-").isdecimal()]
    if apart and not Path(folder, "unet").is_dir():
        folder = max(apart, key=lambda path: int(path.name.removeprefix("weights-")))
    else:
        options["subfolder"] = "unet"
    return load_strict(UNet2DConditionModel.from_pretrained, folder, **options)


def _base_parts(folder, vae, unet, torch_dtype) -> dict:
    """Autoencoder, UNet and scheduler of a pipeline folder, or those given."""
    dtype = {"torch_dtype": torch_dtype}
    vae = vae or open_autoencoder(folder, subfolder="vae", **dtype)
    unet = unet or _open_unet(folder, **dtype)
    try:
        name, revision = at_revision(folder)
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **revision)
    except Exception as error:
        raise HarmonyError(f"{folder}/scheduler cannot be loaded ({first_line(error)}); restore the folder") from None
    return {"vae": vae, "unet": unet, "scheduler": scheduler}
