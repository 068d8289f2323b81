"""DiffHarmony's five-step sampler as a diffusers pipeline; with a Harmony-VAE in it, it is DiffHarmony++."""

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

from .devices import pick_device
from .diffusion import latent_mask, sampling_scheduler, scale_latents, unscale_latents
from .errors import HarmonyError
from .images import MASK_THRESHOLD, paste, to_rgb, to_tensor, to_uint8
from .vae import HarmonyVAE


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
        return image if image.ndim == 4 else image[None]
    images = image if isinstance(image, (list, tuple)) else [image]
    return torch.stack([to_tensor(np.asarray(to_rgb(i)) if isinstance(i, Image.Image) else i) for i in images])


def _mask_batch(mask) -> torch.Tensor:
    """PIL, HxW uint8 or bool, Bx1xHxW tensor in {0, 1}, or a list of the first two -> Bx1xHxW tensor in {0, 1}."""
    if isinstance(mask, torch.Tensor):
        return ((mask if mask.ndim == 4 else mask[None]) >= 0.5).float()
    masks = mask if isinstance(mask, (list, tuple)) else [mask]
    arrays = [np.asarray(m.convert("L")) if isinstance(m, Image.Image) else np.asarray(m) for m in masks]
    return torch.stack([to_tensor(a if a.dtype == bool else a > MASK_THRESHOLD) for a in arrays])


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
    ):
        """Harmonize a batch.

        image, mask: PIL, arrays, tensors (Bx3xHxW in [-1, 1], Bx1xHxW in {0, 1}) or lists; any size and aspect, padded
        to a multiple of 8 inside. height and width squash the input to that size first (the papers' protocol), and are
        then the output's. generator: None, one, or one per output image. paste: put the input's background back.
        output_type: "pil", "pt" (Bx3xHxW in [0, 1]) or "latent" (scaled). candidates: outputs per image, conditioned
        once; temperature scales the initial noise. Random draws per generator, in order: initial latents, posterior of
        the composite, one per step, posterior of the condition in the decoder.
        Raises HarmonyError for unequal sizes, empty masks, fp16 on a CPU or a generator list of the wrong length.
        """
        image, mask = read_inputs(image, mask)
        device, dtype = self.unet.device, self.unet.dtype
        if dtype == torch.float16 and device.type == "cpu":
            raise HarmonyError("fp16 weights do not run on a CPU; load with torch_dtype=torch.float32")
        if isinstance(generator, list) and len(generator) != len(image) * candidates:
            raise HarmonyError(f"{len(generator)} generators for {len(image) * candidates} outputs; give one for each")
        if height or width:
            size = (height or image.shape[-2], width or image.shape[-1])
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(-1, 1)
            mask = F.interpolate(mask, size=size, mode="nearest")
        full_height, full_width = image.shape[-2:]
        padded = pad_to_multiple(image, self.factor, "replicate").to(device, dtype)
        padded_mask = pad_to_multiple(mask, self.factor, "constant").to(device, dtype)
        latents = self._denoise(
            padded, padded_mask, num_inference_steps, generator, prompt_embeds, candidates, temperature
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        output = self._decode(latents, padded, padded_mask, generator)
        output = output[..., :full_height, :full_width].float().clamp(-1, 1).cpu()
        if paste:
            output = _paste_background(output, image, mask, candidates)
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
        """Load what `save_pretrained` wrote (a folder or hub id). vae replaces the folder's own autoencoder.

        Raises HarmonyError naming the part that is missing or damaged.
        """
        vae_part = HarmonyVAE if _has_condition(folder) else AutoencoderKL
        parts = {"vae": vae_part, "unet": UNet2DConditionModel, "scheduler": DDPMScheduler, "prompt": PromptEmbedding}
        loaded = {"vae": vae} if vae is not None else {}
        for name in parts.keys() - loaded.keys():
            try:
                dtype = {} if name == "scheduler" else {"torch_dtype": torch_dtype}
                loaded[name] = parts[name].from_pretrained(folder, subfolder=name, **dtype)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise HarmonyError(
                    f"{folder}/{name} cannot be loaded ({reason}); train it or restore the folder"
                ) from None
        return cls(**loaded).to(pick_device(device))

    @classmethod
    def from_stable_diffusion(cls, folder, vae=None, device="auto") -> "DiffHarmonyPipeline":
        """Build from a Stable Diffusion inpainting folder or hub id; the empty caption is encoded once and cached.

        vae replaces the folder's autoencoder (sd-vae-ft-mse, a HarmonyVAE). Needs the `sd` extra (transformers).
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise HarmonyError(
                'Stable Diffusion\'s text encoder needs transformers: pip install "harmonylib[sd]"'
            ) from None
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        with torch.no_grad():
            embeds = encoder(tokens.input_ids)[0].float()
        prompt = PromptEmbedding(*embeds.shape[1:])
        prompt.embeds.data.copy_(embeds)
        return cls(
            vae=vae or AutoencoderKL.from_pretrained(folder, subfolder="vae"),
            unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
            scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
            prompt=prompt,
        ).to(pick_device(device))


def _has_condition(folder) -> bool:
    try:
        return "additional_in_channels" in HarmonyVAE.load_config(folder, subfolder="vae")
    except OSError:
        return False


def _paste_background(output, image, mask, candidates):
    repeat = lambda t: t.repeat_interleave(candidates, dim=0)  # noqa: E731
    return paste(output, repeat(image).float().cpu(), repeat(mask).cpu())
