"""The colour-map head: from the mask's edge, colour statistics and the network's features to one colour map.

Ours. Strips across the edge become tokens of a small transformer, which finds those where one surface crosses; their
inner and outer colours are then pairs of a weighted ridge regression (`colour_map.fit_map`) that draws towards a map
predicted from everything at once. A second round sees what the first map leaves of each pair and weighs anew.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .colour_map import TERMS, apply_map, fit_map
from .edge_features import DEPTHS, INSIDE, STATISTICS, STRIP_FEATURES, edge_strips, region_colours


class Layer(nn.Module):
    """A transformer layer, normalised first: self-attention over tokens BxTxW, then two linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.mix(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3xBxHxTxD
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class Round(nn.Module):
    """Transformer layers, then one ridge regression from weighted pairs and a prior."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, max(1, width // 24)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.prior = nn.Linear(width, TERMS * 3)
        self.ridge = nn.Linear(width, TERMS)
        self.pair = nn.Linear(width, 1 + len(DEPTHS))  # of a strip: log weight, and which depths its two colours are
        for layer in (self.prior, self.ridge, self.pair):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens, across, before: torch.Tensor):
        """(tokens, colour map Bx10x3, what the map leaves of each strip's pair BxKx3).

        tokens BxTxW, the first two general and the last K strips; across BxKxDx3; before: the map so far, Bx10x3.
        """
        strips = across.shape[1]
        for layer in self.layers:
            tokens = layer(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = self.norm(tokens.float())
            pair = self.pair(tokens[:, -strips:])
            inner = self._mixed(pair[..., 1 : 1 + INSIDE], across[:, :, :INSIDE])
            outer = self._mixed(pair[..., 1 + INSIDE :], across[:, :, INSIDE:])
            weights = F.softplus(pair[..., 0]) * (8 / strips)
            prior = before + 0.3 * self.prior(tokens[:, 0]).unflatten(1, (TERMS, 3))
            colour_map = fit_map(inner, outer, weights, prior, F.softplus(self.ridge(tokens[:, 1])) + 1e-3)
            return tokens, colour_map, (outer - apply_map(colour_map, inner)).mT

    @staticmethod
    def _mixed(scores: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Colours (BxKxDx3) mixed over the depths by softmax of scores (BxKxD): Bx3xK."""
        return (scores.softmax(-1)[..., None] * colours).sum(2).mT


class ColourHead(nn.Module):
    """forward(image, mask, context) -> colour maps Bx10x3 (`colour_map.apply_map`).

    context_channels: widths of the context vectors BxC that the network adds as tokens; width of the transformer and
    layers in each of its rounds; strips: how many edge pixels are looked at. At the start the map is close to the
    identity: priors are zero and all pairs weigh alike.
    """

    def __init__(self, context_channels=(), width: int = 96, layers: int = 2, strips: int = 128, rounds: int = 2):
        super().__init__()
        self.strips = strips
        self.strip = nn.Sequential(nn.Linear(STRIP_FEATURES, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.statistics = nn.Sequential(nn.Linear(STATISTICS, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.context = nn.ModuleList(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width)) for c in context_channels)
        for layer in self.context:  # tokens without a say at first: a head that was trained alone stays as good
            nn.init.zeros_(layer[1].weight)
            nn.init.zeros_(layer[1].bias)
        self.rounds = nn.ModuleList(Round(width, layers) for _ in range(rounds))
        self.left = nn.ModuleList(nn.Linear(6, width) for _ in range(rounds - 1))

    def forward(self, image, mask, context=(), generator=None) -> torch.Tensor:
        """image Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}, context a list of BxC -> Bx10x3 float32.

        generator: for training, draws which edge pixels are looked at. A mask without edge gives the identity.
        """
        _, colour_map = self.read(image, mask, context, generator)
        both = ((mask > 0.5).flatten(1).any(1) & (mask <= 0.5).flatten(1).any(1))[:, None, None]
        return torch.where(both, colour_map, torch.zeros_like(colour_map))

    def read(self, image, mask, context=(), generator=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens BxTxW after the last round, its colour maps), of what `forward` takes."""
        colours, masks, places = edge_strips(image, mask, self.strips, generator)
        seen = torch.cat([colours.flatten(2), masks.flatten(2) * 2 - 1, places], dim=2)
        general = self.statistics(region_colours(image, mask, generator)).unflatten(1, (2, -1))
        extra = [layer(vector)[:, None] for layer, vector in zip(self.context, context, strict=True)]
        tokens = torch.cat([general, *extra, self.strip(seen)], dim=1)
        across, colour_map = colours[:, :, :, 0].float(), image.new_zeros(len(image), TERMS, 3, dtype=torch.float32)
        for number, one_round in enumerate(self.rounds):
            tokens, colour_map, left = one_round(tokens, across, colour_map)
            if number < len(self.left):
                news = self.left[number](torch.cat([left, left.abs().clamp_min(1e-3).log()], dim=2))
                tokens = torch.cat([tokens[:, : -self.strips], tokens[:, -self.strips :] + news], dim=1)
        return tokens, colour_map
