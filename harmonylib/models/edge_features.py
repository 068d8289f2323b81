"""What the two sides of a mask's edge look like: strips of pixels across it, and colour statistics of both regions.

A surface that crosses the edge of the foreground shows how its colours were changed. All of it is read at the size of
the images given (256 px or more; at 64 px the edge is gone) and costs little, since only some pixels are looked at.
"""

import torch
from torch.nn import functional as F

DEPTHS = (-12, -8, -5, -3, -2, -1, 0, 1, 2, 3, 5, 8, 12)  # pixels across the edge; 0 is the foreground's last one
INSIDE = DEPTHS.index(0) + 1  # how many of them lie inside
SIDESTEPS = (0, -3, 3)  # pixels along the edge
STRIP_FEATURES = len(DEPTHS) * len(SIDESTEPS) * 4 + 2
QUANTILES, QUANTILE_PIXELS = 16, 256
STATISTICS = 2 * (3 * QUANTILES + 3 + 9) + 1


def nth_pixels(region: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """BxK flat indices of the pixels where region (BxHxW or BxP, bool) is set that have these ranks (BxK, from 0).

    The whole batch at once, without waiting for a GPU. A region without such a pixel gives 0.
    """
    passed = region.flatten(1).cumsum(1, dtype=torch.int32)
    found = torch.searchsorted(passed, ranks.int() + 1)
    return torch.where(ranks < passed[:, -1:], found, 0)


def draw_pixels(region: torch.Tensor, count: int, generator=None) -> torch.Tensor:
    """BxK flat indices of pixels where region (BxHxW bool) is set, spread evenly in reading order.

    With a generator each is drawn inside its own K-th of the list, without one it is the middle. Repeated where a
    region has fewer, 0 where it is empty.
    """
    if region.is_cuda:
        return _draw_at_once(region, count, generator)
    out = torch.zeros(len(region), count, dtype=torch.long, device=region.device)
    steps = torch.arange(count, device=region.device)
    for row, pixels in zip(out, region.flatten(1), strict=True):
        found = pixels.nonzero()[:, 0]
        if len(found) >= count:
            shift = 0.5 if generator is None else torch.rand(count, generator=generator).to(region.device)
            row.copy_(found[((steps + shift) * (len(found) / count)).long().clamp_max(len(found) - 1)])
        elif len(found):
            row.copy_(found[steps % len(found)])
    return out


def _draw_at_once(region: torch.Tensor, count: int, generator=None) -> torch.Tensor:
    """`draw_pixels` for a GPU, which would be waited for at each row; draws are made for rows with few pixels, too."""
    total, shift = region.flatten(1).sum(1, keepdim=True), 0.5
    if generator is not None:
        shift = torch.rand(len(region), count, generator=generator, device=generator.device).to(region.device)
    steps = torch.arange(count, device=region.device)
    spread = ((steps + shift) * (total / count)).long().minimum(total - 1)
    return nth_pixels(region, torch.where(total >= count, spread, steps % total.clamp_min(1)))


def edge_pixels(inside: torch.Tensor) -> torch.Tensor:
    """The foreground's pixels beside a background pixel (BxHxW bool twice); the picture's own border is no edge."""
    outside = (~inside).float()
    beside = F.max_pool2d(outside, (3, 1), 1, (1, 0)) + F.max_pool2d(outside, (1, 3), 1, (0, 1))
    return inside & (beside > 0)


def _outward(mask: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (row, column; BxK each) away from the mask's weight around the pixels, by a 9x9 Gaussian window."""
    height, width = mask.shape[-2:]
    offsets = torch.arange(-4, 5, device=mask.device)
    down, right = offsets.repeat_interleave(9), offsets.repeat(9)
    window = torch.exp(-(down**2 + right**2) / 8.0)
    rows, columns = (y[..., None] + down).clamp(0, height - 1), (x[..., None] + right).clamp(0, width - 1)
    near = mask.flatten(1).gather(1, (rows * width + columns).flatten(1)).view(rows.shape) * window
    dy, dx = -(near * down).sum(-1), -(near * right).sum(-1)
    length = (dy**2 + dx**2).sqrt().clamp_min(1e-6)
    return dy / length, dx / length


def edge_strips(image: torch.Tensor, mask: torch.Tensor, count: int, generator=None):
    """(colours BxKxDxSx3, masks BxKxDxS, places BxKx2) at DEPTHS and SIDESTEPS of K edge pixels.

    image Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}; places are (column, row) in [-1, 1]. Pixels are read as they are,
    never interpolated; a strip that would leave the picture repeats its border.
    """
    height, width = mask.shape[-2:]
    chosen = draw_pixels(edge_pixels(mask[:, 0] > 0.5), count, generator)
    y, x = chosen // width, chosen % width
    dy, dx = (part[..., None, None] for part in _outward(mask, y, x))
    depth = torch.tensor(DEPTHS, device=mask.device).view(1, 1, -1, 1)
    aside = torch.tensor(SIDESTEPS, device=mask.device).view(1, 1, 1, -1)
    rows = (y[..., None, None] + depth * dy + aside * dx).round().long().clamp(0, height - 1)
    columns = (x[..., None, None] + depth * dx - aside * dy).round().long().clamp(0, width - 1)
    at = (rows * width + columns).flatten(1)
    colours = image.flatten(2).gather(2, at[:, None].expand(-1, 3, -1)).view(len(image), 3, *rows.shape[1:])
    masks = mask.flatten(1).gather(1, at).view(rows.shape)
    return colours.movedim(1, -1), masks, torch.stack([x / width, y / height], -1) * 2 - 1


def region_colours(image: torch.Tensor, mask: torch.Tensor, generator=None) -> torch.Tensor:
    """Bx121: of foreground and background colour quantiles, deviation and covariance, and the log of the mask's share.

    image Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}; taken from QUANTILE_PIXELS pixels of each region.
    """
    inside, parts = mask[:, 0] > 0.5, []
    for region in (inside, ~inside):
        at = draw_pixels(region, QUANTILE_PIXELS, generator)
        pixels = image.flatten(2).gather(2, at[:, None].expand(-1, 3, -1))
        centred = pixels - pixels.mean(2, keepdim=True)
        covariance = centred @ centred.mT * (4 / QUANTILE_PIXELS)
        quantiles = pixels.sort(2).values[:, :, :: QUANTILE_PIXELS // QUANTILES]
        parts += [quantiles.flatten(1), pixels.std(2), covariance.flatten(1)]
    return torch.cat([*parts, mask.mean((2, 3)).clamp_min(1e-4).log()], dim=1)
