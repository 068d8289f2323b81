"""The stage-2 refiner of DiffHarmony (grey rows of DiffHarmony++ Table 4): a residual UNet without time embedding."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D
from torch import nn
from torch.nn import functional as F

from ..core.cache import shared_array, weights_digest
from ..core.devices import actual_precision, autocast
from ..core.images import resize
from ..core.progress import progress
from ..core.seeds import generator, rng
from ..data.batches import TripleSet, batch_indices
from .diffusion import unscale_latents
from .pipeline import DiffHarmonyPipeline, decode, pad_to_multiple
from .weights import Published


class RefinementUNet(Published, ModelMixin, ConfigMixin):
    """Refine a stage-1 output: forward(Bx7xHxW) -> Bx3xHxW, input [stage-1 output | mask | composite] (facts: 91.40 M).

    The output is the network's plus the first three input channels. H and W that do not divide by 8 are padded inside.
    block_out_channels: base (128, 256, 512, 512); small (64, 128, 256, 256); large (256, 512, 1024, 1024).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 7,
        out_channels: int = 3,
        block_out_channels: tuple = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        channels, last = list(block_out_channels), len(block_out_channels) - 1
        shape = {"temb_channels": None, "resnet_groups": norm_num_groups}
        down = shape | {"num_layers": layers_per_block, "downsample_padding": 0}
        up = shape | {"num_layers": layers_per_block + 1}
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            self.down_blocks.append(DownBlock2D(channels[max(i - 1, 0)], width, add_downsample=i < last, **down))
        self.mid_block = UNetMidBlock2D(channels[-1], attention_head_dim=channels[-1], **shape)
        for i, width in reversed(list(enumerate(channels))):
            below, skip = channels[min(i + 1, last)], channels[max(i - 1, 0)]
            self.up_blocks.append(UpBlock2D(skip, below, width, add_upsample=i > 0, **up))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(pad_to_multiple(x, 2 ** (len(self.down_blocks) - 1), "replicate"))
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, more = block(hidden)
            skips += more
        hidden = self.mid_block(hidden)
        for block in self.up_blocks:
            count = len(block.resnets)
            hidden, skips = block(hidden, skips[-count:]), skips[:-count]
        hidden = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return hidden[..., : x.shape[-2], : x.shape[-1]] + x[:, : self.config.out_channels]


def sample_latents(pipeline: DiffHarmonyPipeline, data: TripleSet, seed: int, steps=5, batch_size=16,
                   precision: str = "auto") -> np.ndarray:  # fmt: skip
    """Scaled latents (N x C x h x w float32) of every composite of `data` at its size, cached; noise seeded by name."""
    precision = actual_precision(pipeline.device, precision)
    parts = [weights_digest(part) for part in (pipeline.unet, pipeline.vae, pipeline.prompt)]
    key = {"latents": data.key(), "weights": parts, "scheduler": dict(pipeline.scheduler.config)}
    side = -(-data.size // pipeline.factor)

    def fill(array, first, last):
        for chosen, batch in _batches(data, batch_size, "sampling", first, last):
            noise = [generator(seed, "stage one", data.triples[i].name) for i in chosen]
            with autocast(pipeline.device, precision):
                output = pipeline(batch["composite"], batch["mask"], steps, generator=noise, output_type="latent")
            array[chosen.start - first : chosen.stop - first] = output.images.float().cpu().numpy()

    shape = (len(data), pipeline.vae.config.latent_channels, side, side)
    return shared_array(key | {"draws": [seed, steps, precision]}, shape, np.float32, fill, batch_size)


def decode_latents(vae, latents: np.ndarray, data: TripleSet, size: int, seed: int, batch_size=16,
                   precision: str = "auto") -> np.ndarray:  # fmt: skip
    """Stage-1 outputs: N x 3 x size x size float16 in [-1, 1], decoded from `sample_latents`, cached.

    A HarmonyVAE also sees the composites of `data`. The outputs are resized (antialiased) to `size`, never quantised.
    """
    precision = actual_precision(vae.device, precision)
    key = {"stage one": Path(latents.filename).stem, "vae": weights_digest(vae), "size": size}
    key |= {"draws": [seed, precision]}

    @torch.inference_mode()
    def fill(array, first, last):
        for chosen, batch in _batches(data, batch_size, "decoding", first, last):
            z = unscale_latents(torch.from_numpy(latents[chosen]).to(vae.device), vae)
            noise = [generator(seed, "decode", data.triples[i].name) for i in chosen]
            with autocast(vae.device, precision):
                output = decode(vae, z, batch["composite"].to(z), batch["mask"].to(z), noise)
            array[chosen.start - first : chosen.stop - first] = resize(output.float().clamp(-1, 1), size).cpu().numpy()

    return shared_array(key, (len(data), 3, size, size), np.float16, fill, batch_size)


def _batches(data, batch_size, name, first=0, last=None):
    """Yield (indices, batch) of `data` from `first` to `last`, in order."""
    last = len(data) if last is None else last
    for start in progress(range(first, last, batch_size), desc=name, unit="batch"):
        chosen = range(start, min(start + batch_size, last))
        yield chosen, data.batch(chosen)


def refinement_loss(model: RefinementUNet, batch: dict, generator=None) -> dict[str, torch.Tensor]:
    """MSE over the whole image (facts: stage 2). batch: "output" (stage 1), "mask", "composite" and "real"."""
    output = model(torch.cat([batch["output"], batch["mask"], batch["composite"]], dim=1))
    return {"loss": F.mse_loss(output.float(), batch["real"])}


@torch.inference_mode()
def refine(model: RefinementUNet, outputs: np.ndarray, data: TripleSet, batch_size=16) -> np.ndarray:
    """Refined stage-1 outputs (N x 3 x S x S float32 in [-1, 1]); `data` at the same size S."""
    refined = np.empty(outputs.shape, np.float32)
    for chosen, batch in _batches(data, batch_size, "refining"):
        x = torch.cat([torch.from_numpy(outputs[chosen]).float(), batch["mask"], batch["composite"]], dim=1)
        refined[chosen] = model(x.to(model.device)).float().clamp(-1, 1).cpu().numpy()
    return refined


# ---- training ----


def initial_refiner(channels, seed: int) -> RefinementUNet:
    """A refiner with random weights whose last convolution is zero (ours): it starts from the stage-1 output."""
    torch.manual_seed(seed)
    model = RefinementUNet(block_out_channels=tuple(channels), norm_num_groups=min(32, channels[0] // 2))
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def refinement_batches(outputs, data: TripleSet, batch_size: int, seed: int):
    """What `refinement_loss` takes; outputs: stage-1 outputs of the composites of `data` (`decode_latents`).

    The published code makes these anew in every step; here they are made once, with one draw of noise each.
    """

    def batches(step):
        indices = batch_indices(step, len(data), batch_size, (seed, "refinement"))
        batch = data.batch(indices) | {"output": torch.from_numpy(outputs[indices]).float()}
        mirrored = rng(seed, "refinement", "flip", step).random() < 0.5
        return {name: value.flip(-1) if mirrored else value for name, value in batch.items()}

    batches.key = [data.key(), Path(outputs.filename).stem]
    return batches
