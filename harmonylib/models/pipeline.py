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
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..core.decoding import to_rgb
from ..core.devices import in_parts, pick_device
from ..core.errors import HarmonyError
from ..core.images import read_mask, to_tensor, to_uint8
from .diffusion import latent_mask, sampling_scheduler, scale_latents, set_steps, unscale_latents
from .edge_prompt import EdgePrompt
from .vae import HarmonyVAE, load_autoencoder
from .weights import at_revision, load_part, load_strict

OUTPUT_TYPES = ("pil", "pt", "latent")


class PromptEmbedding(ModelMixin, ConfigMixin):
    """One cached prompt embedding `.embeds` (1, tokens, dim): what a text encoder says of the empty caption.

    Zeros for the small base; for Stable Diffusion filled from CLIP once, by `DiffHarmonyPipeline.from_pretrained`.
    """

    @register_to_config
    def __init__(self, tokens: int = 77, dim: int = 768):
        super().__init__()
        self.embeds = torch.nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)

    def forward(self, image: torch.Tensor, mask=None, generator=None) -> torch.Tensor:
        """The embedding for each of a batch's images, BxTxD."""
        return self.embeds.expand(len(image), -1, -1)


def _batch(images, read) -> torch.Tensor:
    """BxCxHxW of a tensor, or of one or a list of what `read` makes an array of."""
    if isinstance(images, torch.Tensor):
        return images if images.ndim == 4 else images[None]
    images = images if isinstance(images, (list, tuple)) else [images]
    return torch.stack([to_tensor(np.asarray(read(image))) for image in images])


def read_inputs(image, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Bx3xHxW in [-1, 1] and Bx1xHxW in {0, 1}. Raises HarmonyError for shapes that do not fit or an empty mask."""
    try:
        image = _batch(image, lambda i: to_rgb(i) if isinstance(i, Image.Image) else i)
        mask = (_batch(mask, read_mask) >= 0.5).float()
        fits = image.shape[1:] == (3, *mask.shape[2:]) and mask.shape == (len(image), 1, *image.shape[2:])
    except RuntimeError:  # torch's, of lists of unequal sizes and of arrays with more or fewer axes
        fits = False
    if not fits:
        pass_these = "pass HxWx3 and HxW, or Bx3xHxW and Bx1xHxW tensors"
        raise HarmonyError(f"image and mask do not fit; {pass_these}, and resize the mask to the image")
    if not mask.flatten(1).any(dim=1).all():
        raise HarmonyError("the mask has no foreground (no pixel above 127); paint the foreground white")
    return image, mask


def pad_to_multiple(tensor: torch.Tensor, multiple: int, mode: str) -> torch.Tensor:
    """Pad right and bottom so that H and W divide by `multiple`; mode "replicate" or "constant" (zeros)."""
    height, width = tensor.shape[-2:]
    return F.pad(tensor, (0, -width % multiple, 0, -height % multiple), mode=mode)


def decode(vae: AutoencoderKL, latents: torch.Tensor, image, mask, generator=None) -> torch.Tensor:
    """Unscaled latents -> Bx3xHxW, few at a time (`in_parts`); a HarmonyVAE also sees image and mask (`decode`)."""
    if isinstance(vae, HarmonyVAE):
        return vae.decode(latents, image, mask, generator=generator).sample
    return in_parts(lambda part: vae.decode(part).sample, latents, pixels=image.shape[-2] * image.shape[-1])


class DiffHarmonyPipeline(DiffusionPipeline):
    """Harmonize composites with a latent diffusion model (DiffHarmony, Sec. 3.1 of DiffHarmony++).

    vae: AutoencoderKL (DiffHarmony) or HarmonyVAE (DiffHarmony++); unet: 2C+1 input channels, ordered [noisy latent |
    mask | composite latent]; scheduler: any of the base's, sampled by Euler ancestral; prompt: PromptEmbedding or
    EdgePrompt; steps: denoising steps unless a call says otherwise (5 in Sec. 5.2).
    Raises HarmonyError when the UNet's input channels do not fit the autoencoder.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet2DConditionModel, scheduler, prompt, steps: int = 5):
        super().__init__()
        given, needed = unet.config.in_channels, 2 * vae.config.latent_channels + 1
        if given != needed:
            message = f"the UNet takes {given} channels, not {needed} (latent + mask + latent)"
            raise HarmonyError(f"{message}; use an inpainting UNet")
        self.register_modules(vae=vae, unet=unet, scheduler=sampling_scheduler(scheduler.config), prompt=prompt)
        self.register_to_config(steps=steps)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image,
        mask,
        num_inference_steps: int | None = None,
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
        inside to what the autoencoder divides by. height and width squash the input to that size first (the papers'
        protocol), and are then the output's. generator: None, one, or one per output image. paste: put the input's
        background back. output_type: "pil", "pt" (Bx3xHxW in [0, 1]) or "latent" (scaled). candidates: outputs per
        image, conditioned once; temperature scales the initial noise. Random draws per generator, in order: initial
        latents, posterior of the composite, one per step, posterior of the condition.
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
        if size != image.shape[-2:]:
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(-1, 1)
            mask = F.interpolate(mask, size=size, mode="nearest")
        padded = pad_to_multiple(image, self.factor, "replicate").to(device, dtype)
        padded_mask = pad_to_multiple(mask, self.factor, "constant").to(device, dtype)
        embeds = self.prompt(padded, padded_mask) if prompt_embeds is None else prompt_embeds
        latents = self._denoise(
            padded, padded_mask, num_inference_steps or self.config.steps, generator, embeds, candidates, temperature
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        output = decode(self.vae, unscale_latents(latents, self.vae), padded, padded_mask, generator)
        output = output[..., : size[0], : size[1]].float().clamp(-1, 1).cpu()
        if paste:
            image, mask = (t.float().cpu().repeat_interleave(candidates, dim=0) for t in (image, mask))
            output = torch.where(mask > 0.5, output, image)
        if output_type == "pt":
            return ImagePipelineOutput(images=output / 2 + 0.5)
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in to_uint8(output)])

    def _denoise(self, image, mask, steps, generator, embeds, candidates, temperature):
        draw = {"generator": generator, "device": image.device, "dtype": image.dtype}
        pixels = image.shape[-2] * image.shape[-1]
        moments = in_parts(lambda part: self.vae.encode(part).latent_dist.parameters, image, pixels=pixels)
        posterior = DiagonalGaussianDistribution(moments)
        mean, std = (p.repeat_interleave(candidates, dim=0) for p in (posterior.mean, posterior.std))
        set_steps(self.scheduler, steps, image.device)
        latents = randn_tensor(mean.shape, **draw) * self.scheduler.init_noise_sigma * temperature
        composite = scale_latents(mean + std * randn_tensor(mean.shape, **draw), self.vae)
        small = latent_mask(mask, mean.shape[-2:]).to(image.dtype).repeat_interleave(candidates, dim=0)
        embeds = embeds.to(image).expand(len(image), -1, -1).repeat_interleave(candidates, dim=0)
        for t in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(latents, t)
            inputs = torch.cat([noisy, small, composite], dim=1)
            prediction = in_parts(lambda x, e, t=t: self.unet(x, t, e).sample, inputs, embeds, pixels=pixels)
            latents = self.scheduler.step(prediction, t, latents, generator=generator).prev_sample
        return latents

    @classmethod
    def from_pretrained(cls, folder, vae=None, device="auto", torch_dtype=torch.float32) -> "DiffHarmonyPipeline":
        """Load a folder or hub id (`ID@REVISION` pins it): one that `save_pretrained` wrote, or Stable Diffusion's.

        vae replaces the folder's own autoencoder (sd-vae-ft-mse, a published ConditionVAE as HarmonyVAE). Stable
        Diffusion's text encoder needs the `sd` extra (transformers); the empty caption is encoded once and cached.
        Raises HarmonyError naming the part that is missing or damaged.
        """
        dtype = {"torch_dtype": torch_dtype}
        config = _config(cls, folder, default={"prompt": ["", "PromptEmbedding"]})
        prompt = _load_prompt(folder, config, **dtype)
        vae = vae or open_autoencoder(folder, subfolder="vae", **dtype)
        unet = _open_unet(folder, **dtype)
        scheduler = load_part(DDPMScheduler.from_pretrained, folder, subfolder="scheduler")
        for network in (vae, unet):
            network.to(memory_format=torch.channels_last)  # else convolutions copy what they read: 1.2x the peak memory
        return cls(vae, unet, scheduler, prompt, config.get("steps", 5)).to(pick_device(device))


def _load_prompt(folder, config: dict, **options) -> PromptEmbedding | EdgePrompt:
    """The prompt of a pipeline's folder, whose index is `config`; of Stable Diffusion's the empty caption."""
    if "prompt" not in config:
        return _empty_caption(folder)
    if config["prompt"][1] == "EdgePrompt":
        return load_strict(EdgePrompt.from_pretrained, folder, subfolder="prompt")  # its sums need float32
    return load_strict(PromptEmbedding.from_pretrained, folder, subfolder="prompt", **options)


def _empty_caption(folder) -> PromptEmbedding:
    """What the text encoder of a Stable Diffusion folder says of the empty caption."""
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        message = "Stable Diffusion's text encoder needs transformers"
        raise HarmonyError(f'{message}: pip install "harmonylib[sd]"') from None
    tokenizer = load_part(CLIPTokenizer.from_pretrained, folder, subfolder="tokenizer")
    encoder = load_strict(CLIPTextModel.from_pretrained, folder, subfolder="text_encoder")
    if len(tokenizer) != encoder.config.vocab_size:  # transformers makes an empty one where files are missing
        raise HarmonyError(f"{folder}/tokenizer: is not that of text_encoder; restore the folder")
    length = encoder.config.max_position_embeddings
    tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = encoder(tokens.input_ids)[0].float()
    prompt = PromptEmbedding(*embeds.shape[1:])
    prompt.embeds.data.copy_(embeds)
    return prompt


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
