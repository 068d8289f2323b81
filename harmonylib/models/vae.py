"""Harmony-VAE: an autoencoder whose decoder also sees the composite (DiffHarmony++ Sec. 3.2)."""

import inspect
from functools import partial
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.devices import in_parts
from ..core.errors import HarmonyError
from .diffusion import sample_posterior
from .weights import Published


class Condition(NamedTuple):
    """What the decoder is told: skip features (in encoder order) and the mid feature, one an image, and the condition's
    latents, one a latent."""

    skips: list[torch.Tensor]
    mid: torch.Tensor
    latent: torch.Tensor


def recomputed(module: nn.Module, layer, hidden: torch.Tensor) -> torch.Tensor:
    """layer(hidden), which the backward pass computes again if the module has gradient checkpointing switched on."""
    if module.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, hidden, use_reentrant=False)
    return layer(hidden)


def _zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ConditionalEncoder(Encoder):
    """The autoencoder's encoder with a mask input and zero-initialised 1x1 convolutions on its intermediate features.

    A skip is taken after the input convolution, after every resnet and after every downsampler; idx k feeds the
    (k+1)-th decoder resnet from the end. The mask enters through a convolution of its own (`add_conv_in`).
    """

    def __init__(self, additional_in_channels, block_out_channels, layers_per_block, **encoder):
        super().__init__(block_out_channels=block_out_channels, layers_per_block=layers_per_block, **encoder)
        first, last = block_out_channels[0], block_out_channels[-1]
        self.add_conv_in = nn.Conv2d(additional_in_channels, first, 3, padding=1) if additional_in_channels else None
        targets = [channels for channels in block_out_channels for _ in range(layers_per_block + 1)]
        sources = [first, *targets[:-1]]
        self.down_block_skip_convs = nn.ModuleList(map(_zero_conv, sources, targets))
        self.mid_block_skip_conv = _zero_conv(last, last)

    def forward(self, image: torch.Tensor, mask: torch.Tensor):
        """image Bx3xHxW, mask Bx1xHxW -> (skips, mid skip, posterior moments before quant_conv)."""
        hidden = self.conv_in(image)
        hidden = hidden if self.add_conv_in is None else hidden + self.add_conv_in(mask)
        convs = iter(self.down_block_skip_convs)
        skips = [next(convs)(hidden)]  # at once: a feature is freed when the next one is there
        for block in self.down_blocks:
            for layer in (*(partial(resnet, temb=None) for resnet in block.resnets), *(block.downsamplers or ())):
                hidden = recomputed(self, layer, hidden)
                skips.append(next(convs)(hidden))
        hidden = self.mid_block(hidden)
        moments = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return skips, self.mid_block_skip_conv(hidden), moments


class HarmonyVAE(Published, AutoencoderKL):
    """AutoencoderKL plus a conditional encoder whose features reach the decoder through zero convolutions.

    Built from a plain autoencoder by `from_vae`, its output equals that autoencoder's bit for bit. With Stable
    Diffusion's widths it has 119,740,419 parameters and reads the published `ConditionVAE` folders.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        additional_in_channels: int = 1,
    ):
        super().__init__(**{name: self.config[name] for name in inspect.signature(AutoencoderKL).parameters})
        names = inspect.signature(Encoder).parameters.keys() & self.config.keys()
        shape = {name: self.config[name] for name in names} | {"out_channels": latent_channels}
        self.conditional_encoder = ConditionalEncoder(additional_in_channels, **shape)
        self.latent_skip_conv = _zero_conv(latent_channels, latent_channels)
        for module in self.modules():
            if isinstance(module, nn.SiLU):  # its input is always a fresh tensor, which nothing else reads
                module.inplace = True

    @classmethod
    def from_vae(cls, vae: AutoencoderKL, mask_init: str = "zero", skip_init: str = "zero") -> "HarmonyVAE":
        """A Harmony-VAE around `vae`: encoder, decoder and quantisation copied, conditional encoder a copy of encoder.

        Of a `vae` that is a Harmony-VAE itself the plain autoencoder is taken; its condition starts anew.
        mask_init: "zero" (paper) or "default" (torch's default initialisation, as the published code has it);
        skip_init: "zero" (paper) or "random" (torch's default, the ablation of Table 5).
        """
        if mask_init not in ("zero", "default"):
            raise HarmonyError(f"mask_init {mask_init!r} is unknown; use zero or default")
        if skip_init not in ("zero", "random"):
            raise HarmonyError(f"skip_init {skip_init!r} is unknown; use zero or random")
        names = set(inspect.signature(AutoencoderKL).parameters) & set(vae.config)
        model = cls(**{name: vae.config[name] for name in names})
        own = ("conditional_encoder.", "latent_skip_conv.")
        plain = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(own)}
        model.load_state_dict(plain, strict=False)
        model.conditional_encoder.load_state_dict(vae.encoder.state_dict(), strict=False)
        if mask_init == "zero":
            nn.init.zeros_(model.conditional_encoder.add_conv_in.weight)
            nn.init.zeros_(model.conditional_encoder.add_conv_in.bias)
        if skip_init == "random":
            for conv in model.skip_convs():
                conv.reset_parameters()
        if vae.dtype != torch.float32:  # else diffusers warns
            model = model.to(vae.dtype)
        return model.to(vae.device).train(vae.training)

    def skip_convs(self) -> list[nn.Conv2d]:
        """All zero-initialised convolutions, from full resolution down, then mid, then latent."""
        encoder = self.conditional_encoder
        return [*encoder.down_block_skip_convs, encoder.mid_block_skip_conv, self.latent_skip_conv]

    def set_trainable(self, decoder: bool = True) -> None:
        """Train the conditional encoder, the skips and, if `decoder`, the decoder (Table 5); freeze the rest."""
        self.requires_grad_(False)
        self.conditional_encoder.requires_grad_(True)
        self.latent_skip_conv.requires_grad_(True)
        self.decoder.requires_grad_(decoder)

    def encode_condition(self, image, mask, noise=None) -> Condition:
        """Features of a condition image Bx3xHxW in [-1, 1] and its mask Bx1xHxW in {0, 1} (H, W as for `decode`).

        noise: for sampling the condition's posterior, one per latent (of one image there may be several); None takes
        its mode.
        """
        skips, mid, moments = self.conditional_encoder(image, mask)
        posterior = DiagonalGaussianDistribution(moments if self.quant_conv is None else self.quant_conv(moments))
        latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        latent = latent if self.post_quant_conv is None else self.post_quant_conv(latent)
        return Condition(skips, mid, self.latent_skip_conv(latent))

    def decode_with(self, latents: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Decode unscaled latents BxCxhxw with an encoded condition -> Bx3xHxW.

        It takes the condition's skips out of their list one by one, so that each is freed when it has been added.
        """
        hidden = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        decoder, skips = self.decoder, condition.skips
        hidden = decoder.conv_in(hidden + condition.latent)
        hidden = decoder.mid_block(hidden, None) + condition.mid
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                hidden = recomputed(decoder, partial(resnet, temb=None), hidden) + skips.pop()
            for upsampler in block.upsamplers or ():
                hidden = recomputed(decoder, upsampler, hidden)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))

    def _decode_several(self, latents, image, mask, noise, pixels: int) -> torch.Tensor:
        """Latents that all have one image as their condition, which is encoded once."""
        skips, mid, latent = self.encode_condition(image, mask, noise)

        def decode(z, own):
            return self.decode_with(z, Condition(list(skips), mid, own))

        return in_parts(decode, latents, latent.expand(len(latents), -1, -1, -1), pixels=pixels)

    def decode(self, latents, image=None, mask=None, sample_posterior=True, generator=None, return_dict=True):
        """Decode unscaled latents; with `image` (composite) and `mask` the decoder is conditioned on them.

        latents BxCxhxw; image Bx3xHxW in [-1, 1]; mask Bx1xHxW in {0, 1}; H = 8h, W = 8w with four widths. Without a
        condition: the plain decoder. With K times as many latents as images, each image is the condition of K latents
        in a row and encoded once. The noise of all posteriors is one draw of the latents' shape. Large batches are
        decoded `in_parts`. `enable_tiling` is about `encode` and the plain decoder: a 1024 px picture needs no tiles.
        """
        if image is None and mask is None:
            return super().decode(latents, return_dict=return_dict)
        factor, pixels = 2 ** (len(self.config.block_out_channels) - 1), image.shape[-2] * image.shape[-1]
        assert image is not None and mask is not None, "decode needs both image and mask, or neither"
        assert image.shape[-2:] == mask.shape[-2:] == tuple(side * factor for side in latents.shape[-2:])
        assert len(image) == len(mask) and len(latents) % len(image) == 0
        options = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
        draws = [randn_tensor(latents.shape, **options)] if sample_posterior else []
        if len(latents) == len(image):
            sample = in_parts(
                lambda z, *condition: self.decode_with(z, self.encode_condition(*condition)),
                *(latents, image, mask, *draws), pixels=pixels,
            )  # fmt: skip
        else:
            each = len(latents) // len(image)
            noises = draws[0].split(each) if draws else [None] * len(image)
            images = zip(latents.split(each), image.split(1), mask.split(1), noises, strict=True)
            sample = torch.cat([self._decode_several(*one, pixels) for one in images])
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class _PublishedAutoencoder(Published, AutoencoderKL):
    pass


def load_autoencoder(folder, **options) -> AutoencoderKL:
    """A plain autoencoder, as `Published` says."""
    vae = _PublishedAutoencoder.from_pretrained(folder, **options)
    vae.__class__ = AutoencoderKL  # the same layout; saved folders must name the class that everybody has
    return vae


# ---- training ----


def harmony_vae_batches(vae: HarmonyVAE, data, task: str, section, seed: int, recipes=None):
    """The `LatentBatches` that `harmony_vae_loss` takes, for "harmonize" or "inverse", by the section `harmony_vae`."""
    from ..data.batches import DEFAULTS, LatentBatches, augmentation  # which a finished model does without

    options = {"seed": (seed, "harmony_vae", task), "recipes": recipes or DEFAULTS, **augmentation(section)}
    return LatentBatches(data, vae, task, **options)


def harmony_vae_loss(kind: str = "l2"):
    """Loss for `training.train` (Eq. 2): batch {"moments", "target", "condition", "mask"}.

    moments: Bx2Cxhxw posterior moments of the target; kind: "l2" (paper) or "l1" (published code). Raises HarmonyError
    for another kind.
    """
    if kind not in ("l1", "l2"):
        raise HarmonyError(f"loss {kind!r} is unknown; use l2 (paper) or l1 (published code)")
    distance = F.mse_loss if kind == "l2" else F.l1_loss

    def loss(vae, batch, generator):
        latents = sample_posterior(batch["moments"], generator)
        output = vae.decode(latents, batch["condition"], batch["mask"], generator=generator).sample
        error = (output.float() - batch["target"]).square().mean()
        return {"loss": distance(output.float(), batch["target"]), "mse": error}

    loss.key = kind
    return loss


def skip_norms(vae: HarmonyVAE) -> dict[str, list[float]]:
    """{"skip_norms": norms of the zero convolutions' weights, ordered as `skip_convs`}, to be observed in training."""
    return {"skip_norms": [conv.weight.norm().item() for conv in vae.skip_convs()]}
