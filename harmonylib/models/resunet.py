"""ContrastiveResUNet: residual U-Net with spatial-separated attention and external style fusion.

"Image Harmonization with Region-wise Contrastive Learning" (Liang & Pun), Sec. III-A. It has no official code. The
layer table (1 + 3 convolutions a block, attention on the concatenated skip) is that of the authors' earlier network
and reproduces the paper's 28.37 M parameters. For figures: hooks on `down[i]` (E_i) and `up[i].style` (D_i).
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .colour_head import ColourHead
from .colour_map import apply_inside
from .encoder import PretrainedEncoder
from .weights import FolderModel

COARSE_LEVEL = 2  # of the levels' strides 1, 2, 4, ...: where the decoder of a colour head ends
DEEPEST_STRIDE = 32  # of a pre-trained encoder
SIGMA_FLOOR = 1e-2  # a channel that is dead in the reference region would otherwise blow the other region up


def region_statistics(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel mean and (biased) standard deviation over the pixels where mask > 0.5, both BxCx1x1 float32.

    features BxCxHxW, mask Bx1xHxW. Mean 0 where the region is empty, deviation 1 where it has fewer than two pixels,
    else at least SIGMA_FLOOR. Eq. 1-3 multiply by the mask; an average of that over HxW would mix in its zeros.
    """
    features, inside = features.float(), (mask > 0.5).float()
    count = inside.sum((2, 3), keepdim=True)
    mean = (features * inside).sum((2, 3), keepdim=True) / count.clamp_min(1)
    variance = ((features - mean).square() * inside).sum((2, 3), keepdim=True) / count.clamp_min(1)
    deviation = variance.clamp_min(SIGMA_FLOOR**2).sqrt()
    return mean, torch.where(count < 2, torch.ones_like(deviation), deviation)


def style_fusion(decoder, encoder, mask):
    """External style fusion: (foreground by the encoder background's statistics (Eq. 4), background by its own (5))."""
    encoder_mean, encoder_std = region_statistics(encoder, 1 - mask)
    decoder_mean, decoder_std = region_statistics(decoder, 1 - mask)
    return (decoder - encoder_mean) / encoder_std, (decoder - decoder_mean) / decoder_std


def adain(decoder, encoder, mask):
    """AdaIN with the decoder background as style: the foreground takes its mean and deviation, the background stays."""
    mean, std = region_statistics(decoder, mask)
    style_mean, style_std = region_statistics(decoder, 1 - mask)
    styled = (decoder - mean) / std * style_std + style_mean
    return torch.where((mask <= 0.5).any(3, True).any(2, True), styled, decoder), decoder


def rain(decoder, encoder, mask):
    """Region-aware adaptive instance normalisation (RainNet): AdaIN's foreground, and the background by its own."""
    mean, std = region_statistics(decoder, 1 - mask)
    return adain(decoder, encoder, mask)[0], (decoder - mean) / std


class RegionStyle(nn.Module):
    """Normalise foreground and background apart, then (1 + gamma) x + beta per channel and region (Eq. 6, 7).

    gamma and beta start at 0 ("all the hyper-parameters are initialized as 0"); read literally, s x + b would then
    erase the features, hence 1 + gamma. shared_affine: one pair for both regions, as in the paper's notation.
    affine: "constant", learnt numbers; or "function", as Eq. 6 and 7 are written: affine functions of x itself, at each
    pixel, of which the constants are the offsets. Its 2 C^2 further weights a region and block give 28.54 M parameters
    (shared) where the paper prints 28.37, hence the constants. Without `normalise` the features stay as they are.
    """

    def __init__(self, normalise, channels: int, shared_affine: bool = False, affine: str = "constant"):
        super().__init__()
        self.normalise, self.slope, regions = normalise, None, 1 if shared_affine else 2
        if normalise:
            self.gamma, self.beta = (nn.Parameter(torch.zeros(regions, channels)) for _ in range(2))
        if normalise and affine == "function":
            self.slope = nn.Parameter(torch.zeros(regions, 2 * channels, channels))

    def forward(self, decoder: torch.Tensor, encoder: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """decoder and encoder BxCxHxW, mask Bx1xHxW in {0, 1} -> BxCxHxW in decoder's dtype; computed in float32."""
        if not self.normalise:
            return decoder
        with torch.autocast(decoder.device.type, enabled=False):
            foreground, background = self.normalise(decoder.float(), encoder.float(), mask)
            foreground, background = self._fused(foreground, 0), self._fused(background, -1)
            return torch.where(mask > 0.5, foreground, background).to(decoder.dtype)

    def _fused(self, x, region: int):
        gamma, beta = (numbers[region].float()[:, None, None] for numbers in (self.gamma, self.beta))
        if self.slope is not None:
            more = torch.einsum("oc,bchw->bohw", self.slope[region].float(), x).chunk(2, dim=1)
            gamma, beta = gamma + more[0], beta + more[1]
        return (1 + gamma) * x + beta


NORMALISATIONS = {"style-fusion": style_fusion, "adain": adain, "rain": rain, "none": None}
STYLES = {name: partial(RegionStyle, normalise) for name, normalise in NORMALISATIONS.items()}


def pool_mask(mask: torch.Tensor, stride: int) -> torch.Tensor:
    """Bx1xHxW -> Bx1x(H/stride)x(W/stride) in {0, 1}: S2AM's 2x2 average at that stride, rounded (a half becomes 0)."""
    return (F.avg_pool2d(mask, 2, stride) if stride > 1 else mask).round()


def soften(mask: torch.Tensor) -> torch.Tensor:
    """Blur a Bx1xHxW mask with S2AM's normalised 5x5 Gaussian exp(-(d / 2)^2), borders reflected; H and W above 2."""
    line = torch.signal.windows.gaussian(5, std=2**0.5, device=mask.device)
    kernel = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(F.pad(mask, (2, 2, 2, 2), mode="reflect"), kernel[None, None].to(mask.dtype))


class ChannelGate(nn.Module):
    """Scale channels by sigmoid(MLP([average; max])), with C/16 hidden units."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 16)
        self.mlp = nn.Sequential(nn.Linear(2 * channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.mlp(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))[:, :, None, None]


class SpatialSeparatedAttention(nn.Module):
    """S2AM (Cun & Pun, TIP 2020): gate background and foreground channels apart, mixed along a soft mask edge.

    out = G_bg(x) (1 - m) + (L(G_fg(x)) + G_mix(x)) m, with m the blurred mask.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.background, self.mix, self.foreground = (ChannelGate(channels) for _ in range(3))
        self.learn = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ELU(inplace=True),
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ELU(inplace=True),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x BxCxHxW, mask Bx1xHxW in {0, 1} at the same size -> BxCxHxW."""
        soft = soften(mask).to(x.dtype)
        return self.background(x) * (1 - soft) + (self.learn(self.foreground(x)) + self.mix(x)) * soft


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels))


class ConvBlock(nn.Module):
    """3x3 convolution + BatchNorm + ReLU, then `residual_convs` units relu(x + BatchNorm(conv(x)))."""

    def __init__(self, in_channels: int, out_channels: int, residual_convs: int):
        super().__init__()
        self.first = _conv(in_channels, out_channels)
        self.residual = nn.ModuleList(_conv(out_channels, out_channels) for _ in range(residual_convs))

    def forward(self, x):
        x = F.relu(self.first(x))
        for unit in self.residual:
            x = F.relu(x + unit(x))
        return x


class UpBlock(nn.Module):
    """2x2 transposed convolution, skip, S2AM on the 2C channels, ConvBlock 2C -> C, style module."""

    def __init__(self, below: int, channels: int, residual_convs: int, style: str, *affine):
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(below, channels, 2, stride=2), nn.BatchNorm2d(channels))
        self.attention = SpatialSeparatedAttention(2 * channels)
        self.block = ConvBlock(2 * channels, channels, residual_convs)
        self.style = STYLES[style](channels, *affine)

    def forward(self, x, encoder, mask):
        x = torch.cat([encoder, F.relu(self.up(x))], dim=1)
        return self.style(self.block(self.attention(x, mask)), encoder, mask)


class ContrastiveResUNet(FolderModel):
    """The harmonization network of the region-wise contrastive paper; 28.37 M parameters at the defaults.

    base_channels double at each of `depth` levels; `residual_convs` follow the first convolution of every block;
    style ("style-fusion", "adain", "rain", "none") ends every decoder block, with shared_affine and affine as of
    `RegionStyle`; sample_size: of training, pixels.

    head "residual": the paper does not say what the head predicts; here it is the change, zero at first.
    head "colour" (ours): the network sees a `view` of that many pixels and decodes only to a quarter of it; region
    statistics of what it decodes, and the mask's edge at the image's own size, give one colour map of the foreground
    (`colour_head`), which `colour_map` returns for use at any size. head_width, head_layers and strips are its sizes;
    with view 0 it is alone and the rest of the network is left out.
    encoder: None, the paper's own, or a timm name (`encoder.PretrainedEncoder`; only with the head "colour").
    Raises HarmonyError for an encoder that timm does not have.
    """

    def __init__(
        self,
        base_channels: int = 32,
        depth: int = 5,
        residual_convs: int = 3,
        style: str = "style-fusion",
        shared_affine: bool = False,
        sample_size: int = 256,
        head: str = "residual",
        encoder: str | None = None,
        view: int = 96,
        head_width: int = 96,
        head_layers: int = 2,
        strips: int = 128,
        affine: str = "constant",
    ):
        super().__init__(locals())
        assert style in STYLES and head in ("residual", "colour") and affine in ("constant", "function")
        assert depth > (COARSE_LEVEL if head == "colour" and view and not encoder else 1)
        assert not encoder or (head == "colour" and view)
        if head == "colour" and view == 0:
            widths = []
        elif encoder:
            self.pretrained = PretrainedEncoder(encoder)
            widths = self.pretrained.channels
        else:
            widths = [base_channels << level for level in range(depth)]
            inputs = [4, *widths[:-1]]
            self.down = nn.ModuleList(ConvBlock(i, o, residual_convs) for i, o in zip(inputs, widths, strict=True))
            widths = widths[COARSE_LEVEL:] if head == "colour" else widths
        levels = reversed(list(zip(widths[1:], widths[:-1], strict=True)))
        self.up = nn.ModuleList(UpBlock(below, w, residual_convs, style, shared_affine, affine) for below, w in levels)
        if head == "colour":
            self.colour_head = ColourHead([4 * width for width in reversed(widths)], head_width, head_layers, strips)
        else:
            self.residual_head = nn.Conv2d(base_channels, 3, 1)
            nn.init.zeros_(self.residual_head.weight)
            nn.init.zeros_(self.residual_head.bias)

    def forward(self, image: torch.Tensor, mask: torch.Tensor, generator=None) -> torch.Tensor:
        """Composite Bx3xHxW in [-1, 1] and mask Bx1xHxW in {0, 1} -> harmonized Bx3xHxW, about [-1, 1], not clamped.

        With the head "residual" the background changes too, with "colour" it is the composite's. generator: for
        training with "colour", draws the pixels that it looks at.
        """
        if self.config.head == "colour":
            return apply_inside(self.colour_map(image, mask, generator), image, mask)
        features = self._decoded(image, mask)[-1]
        return image + self.residual_head(features)[:, :, : image.shape[2], : image.shape[3]]

    def colour_map(self, image: torch.Tensor, mask: torch.Tensor, generator=None) -> torch.Tensor:
        """The foreground's colour map, Bx10x3 (`colour_map.apply_map`), of arguments as `forward` takes them."""
        assert mask.shape == (len(image), 1, *image.shape[2:])
        context = self._context(image, mask.to(image.dtype)) if self.config.view else []
        return self.colour_head(image, mask, context, generator)

    def _context(self, image: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Statistics of both regions in what is decoded from the view, from coarse to fine: a list of Bx4C."""
        size, context = (self.config.view, self.config.view), []
        area = F.interpolate(mask, size=size, mode="area")
        for x in self._decoded(F.interpolate(image, size=size, mode="bilinear", antialias=True), area):
            inside = F.interpolate(area, size=x.shape[2:], mode="area")
            context.append(torch.cat([y for m in (inside, 1 - inside) for y in soft_statistics(x, m)], dim=1))
        return context

    def _decoded(self, image: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """The deepest features and those of every decoder block, from coarse to fine.

        Any H and W: borders are replicated up to a multiple of the deepest stride, and at least two of those.
        """
        height, width = image.shape[2:]
        unit = DEEPEST_STRIDE if self.config.encoder else 2 ** (len(self.down) - 1)
        padding = (0, max(-width % unit, 2 * unit - width), 0, max(-height % unit, 2 * unit - height))
        x = F.pad(torch.cat([image, mask.to(image.dtype)], dim=1), padding, mode="replicate")
        padded_mask = (x[:, 3:] > 0.5).to(x.dtype)
        finest = COARSE_LEVEL if self.config.head == "colour" else 0
        if self.config.encoder:
            skips = self.pretrained(x[:, :3], x[:, 3:])
        else:
            skips = []
            for level, block in enumerate(self.down):
                x = block(F.max_pool2d(x, 2) if level else x)
                skips.append(x)
            skips = skips[finest:]
        decoded = [skips[-1]]
        for level, block in zip(reversed(range(len(self.up))), self.up, strict=True):
            decoded.append(block(decoded[-1], skips[level], pool_mask(padded_mask, 2 ** (level + finest))))
        return decoded


def build(size: int, **architecture) -> ContrastiveResUNet:
    """A network to train on images of `size` pixels: random weights, and a pre-trained encoder's ImageNet ones."""
    model = ContrastiveResUNet(**architecture, sample_size=size)
    if model.config.encoder:
        model.pretrained.load_imagenet_weights()
    return model


def soft_statistics(features: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (BxC each, float32) of BxCxHxW features by weights Bx1xHxW in [0, 1]; 0 where all are 0."""
    features, weight = features.float(), weight.float()
    total = weight.sum((2, 3), keepdim=True).clamp_min(1e-3)
    mean = (features * weight).sum((2, 3), keepdim=True) / total
    variance = ((features - mean).square() * weight).sum((2, 3)) / total[..., 0, 0]
    return mean[..., 0, 0], (variance + 1e-4).sqrt()
