"""Small networks that start by copying (ours): what they have to learn is then only what must change.

A network with random weights spends thousands of images on passing colours through, and GroupNorm takes absolute
colours away, which harmonization is about. So a few channels of the residual stream carry them from the first layer to
the last, beside two constants of +-LEVEL that make up most of their group's variance, so that normalising scales all
pictures alike; as x and -x, since silu(x) - silu(-x) = x. Residual branches start at zero. All of it can be trained.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

LEVEL = 4.0


@torch.no_grad()
def _begin(conv: nn.Conv2d, first: int, count: int, group: int) -> int:
    """Make channels first, ... of the input the outputs 0, ..., negated ones after them, then two constants.

    The other outputs of the first `group` start at zero. Returns how many channels are carried.
    """
    conv.weight[:group], conv.bias[:group] = 0, 0
    middle = conv.kernel_size[0] // 2
    for i in range(count):
        conv.weight[i, first + i, middle, middle] = 1
        conv.weight[count + i, first + i, middle, middle] = -1
    conv.bias[2 * count], conv.bias[2 * count + 1] = LEVEL, -LEVEL
    return 2 * count + 2


@torch.no_grad()
def _carry(conv: nn.Conv2d, carried: int, group: int, kernel, offset: int = 0) -> None:
    """Pass the `carried` input channels from `offset` on to the outputs 0, ...; the rest of `group` starts at zero."""
    conv.weight[:group], conv.bias[:group] = 0, 0
    for i in range(carried):
        conv.weight[i, offset + i] = torch.as_tensor(kernel)


@torch.no_grad()
def _end(conv: nn.Conv2d, count: int, group: int, variance: float, sign: float = 1.0) -> None:
    """Undo the normalisation of the carried channels, whose inputs have the given mean square, and read them out."""
    scale = ((2 * count * variance + 2 * LEVEL**2) / group) ** 0.5
    conv.weight[:count], conv.bias[:count] = 0, 0
    middle = conv.kernel_size[0] // 2
    for i in range(count):
        conv.weight[i, i, middle, middle] = sign * scale
        conv.weight[i, count + i, middle, middle] = -sign * scale


def _zero_branches(model: nn.Module) -> list[ResnetBlock2D]:
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    return blocks


@torch.no_grad()
def copy_colours(vae: AutoencoderKL) -> AutoencoderKL:
    """Let a new autoencoder start with the means of colour of blocks as its latents 0-2, and their interpolation."""
    groups, latents = vae.config.norm_num_groups, vae.config.latent_channels
    first, last = vae.config.block_out_channels[0], vae.config.block_out_channels[-1]
    box, ramp = torch.zeros(3, 3), torch.tensor([0.25, 0.5, 0.25])
    box[:2, :2] = 0.25
    carried = _begin(vae.encoder.conv_in, 0, 3, first // groups)
    _begin(vae.decoder.conv_in, 0, 3, last // groups)
    for block in _zero_branches(vae):
        if block.conv_shortcut is not None:
            _carry(block.conv_shortcut, carried, block.out_channels // groups, torch.ones(1, 1))
    for block in vae.encoder.down_blocks:
        for sampler in block.downsamplers or ():
            _carry(sampler.conv, carried, sampler.out_channels // groups, box)
    for block in vae.decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _carry(sampler.conv, carried, sampler.out_channels // groups, ramp[:, None] * ramp)
    _end(vae.encoder.conv_out, 3, last // groups, variance=0.3)
    _end(vae.decoder.conv_out, 3, first // groups, variance=0.3)
    vae.encoder.conv_out.weight[latents:], vae.encoder.conv_out.bias[latents:] = 0, -6  # a posterior of little noise
    for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):
        conv.weight[:], conv.bias[:] = torch.eye(conv.out_channels)[:, :, None, None], 0
    return vae


@torch.no_grad()
def copy_condition(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let a new inpainting UNet for v-prediction start with -condition, the answer at the noisiest step if the
    condition already were the target."""
    count, group = unet.config.out_channels, unet.conv_norm_out.num_channels // unet.conv_norm_out.num_groups
    _zero_branches(unet)
    carried = _begin(unet.conv_in, count + 1, count, group)  # inputs: noisy latents, mask, condition
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut  # of the last skip, which is what conv_in put out
    _carry(shortcut, carried, group, torch.ones(1, 1), shortcut.in_channels - unet.conv_in.out_channels)
    _end(unet.conv_out, count, group, variance=1.0, sign=-1.0)
    return unet
