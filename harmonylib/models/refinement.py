"""The stage-2 refiner of DiffHarmony (grey rows of DiffHarmony++ Table 4): a residual UNet without time embedding."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from ..core.cache import cached_array, weights_digest
from ..core.errors import HarmonyError
from ..core.images import resize
from ..core.progress import progress
from ..core.seeds import generator, rng
from ..data.batches import TripleSet, batch_indices
from .diffusion import unscale_latents
from .pipeline import DiffHarmonyPipeline
from .vae import HarmonyVAE
from .weights import LegacyAttention, load_strict


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=in_channels, out_channels=out_channels, temb_channels=None, eps=1e-6, groups=groups
    )  # fmt: skip


class _Block(nn.Module):
    """Resnets, then at most one down- or upsampler, under diffusers' names."""

    def __init__(self, resnets, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if downsampler:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler:
            self.upsamplers = nn.ModuleList([upsampler])


class _MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([
            Attention(channels, heads=1, dim_head=channels, eps=1e-6, norm_num_groups=groups, bias=True,
                      residual_connection=True, upcast_softmax=True, _from_deprecated_attn_block=True)
        ])  # fmt: skip
        self.resnets = nn.ModuleList([_resnet(channels, channels, groups) for _ in range(2)])

    def forward(self, hidden):
        return self.resnets[1](self.attentions[0](self.resnets[0](hidden, None)), None)


class RefinementUNet(LegacyAttention, ModelMixin, ConfigMixin):
    """Refine a stage-1 output: forward(Bx7xHxW) -> Bx3xHxW, input [stage-1 output | mask | composite] (facts: 91.40 M).

    The output is the network's plus the first three input channels. H and W that do not divide by 8 are padded inside.
    block_out_channels: base (128, 256, 512, 512); small (64, 128, 256, 256); large (256, 512, 1024, 1024).
    Raises HarmonyError for another number of input channels.
    """

    @register_to_config
    def __init__(self, in_channels: int = 7, out_channels: int = 3, block_out_channels: tuple = (128, 256, 512, 512),
                 layers_per_block: int = 2, norm_num_groups: int = 32):  # fmt: skip
        super().__init__()
        channels, groups = list(block_out_channels), norm_num_groups
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        skips, self.down_blocks = [channels[0]], nn.ModuleList()
        for i, out in enumerate(channels):
            before = channels[max(0, i - 1)]
            last = i == len(channels) - 1
            resnets = [_resnet(before if j == 0 else out, out, groups) for j in range(layers_per_block)]
            down = None if last else Downsample2D(out, use_conv=True, out_channels=out, padding=0, name="op")
            self.down_blocks.append(_Block(resnets, downsampler=down))
            skips += [out] * (layers_per_block + (not last))
        self.mid_block = _MidBlock(channels[-1], groups)
        self.up_blocks, current = nn.ModuleList(), channels[-1]
        for i, out in enumerate(reversed(channels)):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(_resnet(current + skips.pop(), out, groups))
                current = out
            up = None if i == len(channels) - 1 else Upsample2D(out, use_conv=True, out_channels=out)
            self.up_blocks.append(_Block(resnets, upsampler=up))
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    @classmethod
    def from_pretrained(cls, folder, **options) -> "RefinementUNet":
        """ModelMixin's, strict: HarmonyError names what is missing or foreign (`weights.load_strict`)."""
        return load_strict(super().from_pretrained, folder, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise HarmonyError(f"the refiner takes Bx{self.config.in_channels}xHxW, not {tuple(x.shape)}")
        height, width = x.shape[-2:]
        factor = 2 ** (len(self.down_blocks) - 1)
        hidden = self.conv_in(F.pad(x, (0, -width % factor, 0, -height % factor), mode="replicate"))
        skips = [hidden]
        for block in self.down_blocks:
            for resnet in block.resnets:
                hidden = resnet(hidden, None)
                skips.append(hidden)
            for downsampler in getattr(block, "downsamplers", ()):
                hidden = downsampler(hidden)
                skips.append(hidden)
        hidden = self.mid_block(hidden)
        for block in self.up_blocks:
            for resnet in block.resnets:
                hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), None)
            for upsampler in getattr(block, "upsamplers", ()):
                hidden = upsampler(hidden)
        hidden = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return hidden[..., :height, :width] + x[:, : self.config.out_channels]


def sample_latents(pipeline: DiffHarmonyPipeline, data: TripleSet, seed: int, steps=5, batch_size=16) -> np.ndarray:
    """Scaled latents (N x C x h x w float32) of every composite of `data` at its size, cached; noise seeded by name."""
    parts = [weights_digest(part) for part in (pipeline.unet, pipeline.vae, pipeline.prompt)]
    key = {
        "latents": data.key(),
        "weights": parts,
        "scheduler": dict(pipeline.scheduler.config),
        "draws": [seed, steps],
    }
    side = -(-data.composites.shape[1] // pipeline.factor)

    def fill(array):
        for chosen in _batches(data, batch_size, "sampling"):
            batch = data.batch(chosen)
            noise = [generator(seed, "stage one", data.triples[i].name) for i in chosen]
            output = pipeline(batch["composite"], batch["mask"], steps, generator=noise, output_type="latent")
            array[chosen] = output.images.float().cpu().numpy()

    return cached_array(key, (len(data), pipeline.vae.config.latent_channels, side, side), np.float32, fill)


def decode_latents(vae, latents: np.ndarray, data: TripleSet, size: int, seed: int, batch_size=16) -> np.ndarray:
    """Stage-1 outputs: N x 3 x size x size float16 in [-1, 1], decoded from `sample_latents`, cached.

    A HarmonyVAE also sees the composites of `data`. The outputs are resized (antialiased) to `size`, never quantised.
    """
    key = {"stage one": Path(latents.filename).stem, "vae": weights_digest(vae), "size": size, "seed": seed}

    @torch.inference_mode()
    def fill(array):
        for chosen in _batches(data, batch_size, "decoding"):
            z = unscale_latents(torch.from_numpy(latents[chosen]).to(vae.device), vae)
            condition = {}
            if isinstance(vae, HarmonyVAE):
                batch = data.batch(chosen)
                noise = [generator(seed, "decode", data.triples[i].name) for i in chosen]
                condition = {"image": batch["composite"].to(z), "mask": batch["mask"].to(z), "generator": noise}
            array[chosen] = resize(vae.decode(z, **condition).sample.float().clamp(-1, 1), size).cpu().numpy()

    return cached_array(key, (len(data), 3, size, size), np.float16, fill)


def _batches(data, batch_size, name):
    starts = progress(range(0, len(data), batch_size), desc=name, unit="batch")
    return (list(range(start, min(start + batch_size, len(data)))) for start in starts)


def refinement_loss(model: RefinementUNet, batch: dict, generator=None) -> dict[str, torch.Tensor]:
    """MSE over the whole image (facts: stage 2). batch: "output" (stage 1), "mask", "composite" and "real"."""
    output = model(torch.cat([batch["output"], batch["mask"], batch["composite"]], dim=1))
    return {"loss": F.mse_loss(output.float(), batch["real"])}


@torch.inference_mode()
def refine(model: RefinementUNet, outputs: np.ndarray, data: TripleSet, batch_size=16) -> np.ndarray:
    """Refined stage-1 outputs (N x 3 x S x S float32 in [-1, 1]); `data` at the same size S."""
    refined = np.empty(outputs.shape, np.float32)
    for chosen in _batches(data, batch_size, "refining"):
        batch = data.batch(chosen)
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
