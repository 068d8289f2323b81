"""The recipes of `harmonylib.data.recipes` for batches of tensors: thousands of composites a second on a GPU.

Pixels are Bx3xP in [0, 1], places Bx2xP (row, column) in [-1, 1] of the picture. Nothing waits for the GPU but one
eigendecomposition, and no product of colours is rounded to TF32.
"""

from functools import cache

import cv2
import numpy as np
import torch
from scipy.special import ndtri
from torch.nn import functional as F

from harmonylib.core.seeds import rng, seed_for
from harmonylib.data import transfers as arrays
from harmonylib.data.iharmony4_statistics import GENUINE, LEVELS, OUTERMOST
from harmonylib.data.recipes import CONDITIONS, EXPERTS, GAIN, GAMMA, LUMA, MID_GREY, OWN, RELIGHT, RETOUCH, SAMPLE
from harmonylib.models.edge_features import nth_pixels

STATISTICS = 2048  # pixels of each region that a transfer takes its statistics from
JITTER = 3  # pixels that masks are dilated or eroded by, at most
DISCS = [cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * by + 1,) * 2) for by in range(JITTER + 1)]
CONSTANTS = {
    "luma": LUMA[:, None],
    "to lms": arrays.RGB_TO_LMS,
    "to lab": arrays.LMS_TO_LAB,
    "from lms": np.linalg.inv(arrays.RGB_TO_LMS),
    "from lab": np.linalg.inv(arrays.LMS_TO_LAB),
    "rotations": [np.eye(3), *np.linalg.qr(rng("color", "rotations").standard_normal((arrays.IDT_STEPS - 1, 3, 3)))[0]],
    "discs": [np.pad(disc, JITTER - by) for by, disc in enumerate(DISCS)],
    "HAdobe5k": (*EXPERTS * RETOUCH, RETOUCH),  # kinds of an edit, then its scale
    "Hday2night": (*CONDITIONS * RELIGHT, RELIGHT),
    "own": OWN,
    "levels": ndtri(LEVELS),
    "fmse": {name: np.log(quantiles.fmse) for name, quantiles in GENUINE.items()},
}


@cache
def constant(name: str, device: torch.device, key: str = "") -> torch.Tensor:
    """One of CONSTANTS as float32 on a device, copied there once."""
    value = CONSTANTS[name][key] if key else CONSTANTS[name]
    return torch.as_tensor(np.array(value), dtype=torch.float32, device=device)


def turned(matrix: torch.Tensor | str, pixels: torch.Tensor) -> torch.Tensor:
    """3x3 (one of CONSTANTS, too) or Bx3x3 times Bx3xP."""
    matrix = constant(matrix, pixels.device) if isinstance(matrix, str) else matrix
    return sum(matrix[..., i, None] * pixels[:, None, i] for i in range(3))


# ---- edits; middle and extent Bx2x1: mean and deviation of the foreground's places ----


def retouch(pixels, places, middle, extent, parameters) -> torch.Tensor:
    """`recipes.retouch`; parameters Bx11."""
    exposure, warmth, tint, tone, contrast, saturation = parameters[:, :6, None, None].unbind(1)
    curves, gradient = parameters[:, 6:9, None], parameters[:, 9:, None]
    across = ((places - middle) / (2 * extent + 1e-3)).clamp(-1, 1)
    stops = exposure + (across * gradient).sum(1, keepdim=True)
    stops = stops + torch.cat([warmth / 2 + tint / 2, -tint / 2, tint / 2 - warmth / 2], 1)
    x = (pixels * 2 ** (stops / GAMMA)).clamp(0, 1) ** 2 ** (tone + curves)
    x = x + contrast.clamp(-1, 1) * x * (1 - x) * (2 * x - 1)
    luma = (x * constant("luma", x.device)).sum(1, keepdim=True)
    return (luma + (x - luma) * 2**saturation).clamp(0, 1)


def relight(pixels, places, middle, extent, parameters) -> torch.Tensor:
    """`recipes.relight`; parameters Bx4. Where the foreground lies does not matter."""
    exposure, warmth, contrast, vignette = parameters[:, :, None, None].unbind(1)
    stops = exposure - vignette * places.square().sum(1, keepdim=True) / 2
    stops = stops + torch.cat([warmth / 2, 0 * warmth, -warmth / 2], 1)
    return ((pixels * 2 ** (stops / GAMMA) / MID_GREY) ** (1 + contrast.clamp_min(-0.9)) * MID_GREY).clamp(0, 1)


# ---- transfers: pixels Bx3xP, of which `own` Bx3xN are a sample, to the colours of `reference` Bx3xM ----


def reinhard(pixels, own, reference) -> torch.Tensor:
    """`transfers.reinhard`."""
    x, own, reference = (
        turned("to lab", (turned("to lms", v) + arrays.LOG_OFFSET).log10()) for v in (pixels, own, reference)
    )
    (variance, mean), (wanted, centre) = (torch.var_mean(v, 2, correction=0, keepdim=True) for v in (own, reference))
    scale = (wanted / variance.clamp_min(arrays.VARIANCE_FLOOR)).sqrt()
    scale = torch.where(variance > arrays.VARIANCE_FLOOR, scale, 1.0)
    logs = turned("from lab", (x - mean) * scale + centre).clamp(max=arrays.LOG_MAX)
    return turned("from lms", 10**logs - arrays.LOG_OFFSET).clamp(0, 1)


def xiao_ma(pixels, own, reference) -> torch.Tensor:
    """`transfers.xiao_ma`."""
    mean, centre = own.mean(2, keepdim=True), reference.mean(2, keepdim=True)
    covariances = torch.stack([(x[:, :, None] * x[:, None]).mean(3) for x in (own - mean, reference - centre)])
    values, (own_axes, axes) = torch.linalg.eigh(covariances.double())  # waits for the GPU
    own_std, std = (values.clamp_min(0) + arrays.VARIANCE_FLOOR).sqrt()
    direction = torch.where((own_axes * axes).sum(1) < 0, -1.0, 1.0)
    matrix = (axes * (direction * std / own_std)[:, None]) @ own_axes.mT
    return (turned(matrix.float(), pixels - mean) + centre).clamp(0, 1)


def distribution(pixels, own, reference) -> torch.Tensor:
    """`transfers.distribution_transfer` with quantiles of the samples; what lies beyond their ends moves along."""
    count, x = own.shape[2], torch.cat([own, pixels], 2)
    for rotation in constant("rotations", pixels.device):
        now, goal = turned(rotation, x), turned(rotation, reference)
        have, want = (_quantiles(v) for v in (now[:, :, :count], goal))
        k = torch.searchsorted(have, now, right=True).clamp(1, have.shape[2] - 1)
        (x0, y0), (x1, y1) = ((have.gather(2, i), want.gather(2, i)) for i in (k - 1, k))
        inner = y0 + (y1 - y0) * ((now - x0) / (x1 - x0).clamp_min(1e-6)).clamp(0, 1)
        x = x + turned(rotation.mT, inner - now.clamp(have[:, :, :1], have[:, :, -1:]))
    return x[:, :, count:].clamp(0, 1)


def _quantiles(values) -> torch.Tensor:
    at = torch.linspace(0, values.shape[2] - 1, arrays.IDT_QUANTILES, dtype=torch.float64, device=values.device)
    return values.sort(2).values[:, :, at.round().long()].contiguous()


EDITS = {"HAdobe5k": retouch, "Hday2night": relight}
TRANSFERS = (reinhard, xiao_ma, distribution)  # "histogram" is left out, to be judged on


def _rounded(pixels) -> torch.Tensor:
    """To whole levels."""
    return pixels.mul(255).round() / 255


class Composites:
    """batches(step) -> {"composite", "real", "mask"} as `batches.PixelBatches` gives, on a device; a quarter by each
    recipe, in the order of `iharmony4_statistics.GENUINE`. The seed and the step decide all draws.

    photos: of `read_photos`. whole: share of the masks that are a photo's own; crop: share of the pictures that are a
    window of the photo; restyle, jitter: as in `PixelBatches`; weak: share of composites far weaker than genuine ones.
    """

    def __init__(self, photos, batch_size: int, seed, device, whole=0.45, crop=0.5, restyle=0.35, jitter=0.5, weak=0.1):
        self.batch_size, self.seed, self.device, self.side = batch_size, seed, device, photos[0].shape[-1]
        self.whole, self.crop, self.restyle, self.jitter, self.weak = whole, crop, restyle, jitter, weak
        self.images, self.masks, self.photo, kind = (tensor.to(device) for tensor in photos)
        self.pools = [(kind == number).nonzero()[:, 0] for number in range(1 + len(GENUINE))]
        ends = [batch_size * part // len(GENUINE) for part in range(len(GENUINE) + 1)]
        self.quarters = dict(zip(GENUINE, map(slice, ends, ends[1:]), strict=False))
        self.draws, self.bits = torch.Generator(device), (2 ** torch.arange(7, -1, -1, device=device)).byte()
        line = torch.linspace(-1, 1, self.side, device=device)
        self.places = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)[None]

    def _uniform(self, *shape, low=0.0, high=1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.draws, device=self.device)

    def _chosen(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows[torch.randint(len(rows), (count,), generator=self.draws, device=self.device)]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        self.draws.manual_seed(seed_for(self.seed, "composites", step))
        real, original = self._windows(*self._pairs())
        pixels = _rounded(self._restyled(real.flatten(2)))
        jittered = (self._uniform(len(real)) < self.jitter)[:, None, None, None]
        mask = torch.where(jittered, self._jittered(original), original)
        region = torch.where(jittered, F.max_pool2d(mask, 5, 1, 2), mask).flatten(1)  # `recipes.widened`
        looks = (pixels, *self._looks(pixels, region, original))
        made = [self._recoloured(recipe, *(part[rows] for part in looks)) for recipe, rows in self.quarters.items()]
        changed = torch.where(region[:, None] > 0.5, _rounded(torch.cat(made)), pixels).view_as(real)
        real = pixels.view_as(real)
        soft = _rounded(real + self._blurred(mask) * (changed - real))  # `recipes.soften`
        return {"composite": 2 * torch.where(jittered, soft, changed) - 1, "real": 2 * real - 1, "mask": mask}

    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Photos Bx3xSxS in [0, 1] and masks Bx1xSxS."""
        parts = zip(self.pools[1:], self.quarters.values(), strict=True)
        pieces = torch.cat([self._chosen(pool, rows.stop - rows.start) for pool, rows in parts])
        whole = self._chosen(self.pools[0], self.batch_size)
        pick = torch.where(self._uniform(self.batch_size) < self.whole, whole, pieces)
        mask = (self.masks[pick][:, :, None] & self.bits) > 0
        return self.images[self.photo[pick]].float() / 255, mask.view(-1, 1, self.side, self.side).float()

    def _windows(self, real, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows of some pictures, with a pixel of the foreground in each; half of all mirrored. A box in the middle
        is the mask where hardly any foreground or background is left."""
        count, side = self.batch_size, self.side
        scale, aspect = self._uniform(count, low=0.55), self._uniform(count, low=-0.2, high=0.2).exp()
        sides = torch.stack([scale * aspect, scale / aspect]).clamp(max=1)  # across, down
        sides = torch.where(self._uniform(count) < self.crop, sides, 1.0)
        at = self._drawn(mask, 1)[:, 0]
        middle = (torch.stack([at % side, at // side]) + 0.5) / side * 2 - 1 + self._uniform(2, count, low=-1) * sides
        theta = torch.zeros(count, 2, 3, device=self.device)
        theta[:, 0, 0] = torch.where(self._uniform(count) < 0.5, -sides[0], sides[0])
        theta[:, 1, 1], theta[:, :, 2] = sides[1], middle.clamp(sides - 1, 1 - sides).T
        grid = F.affine_grid(theta, real.shape, align_corners=False)
        seen = F.grid_sample(torch.cat([real, mask], 1), grid, padding_mode="border", align_corners=False)
        mask = (seen[:, 3:] >= 0.5).float()
        usable = (mask.sum((1, 2, 3), True) >= 4) & (mask.mean((1, 2, 3), True) < 0.985)
        return seen[:, :3], torch.where(usable, mask, (self.places.abs().amax(1) < 0.3).float().view(1, 1, side, side))

    def _drawn(self, mask, count: int) -> torch.Tensor:
        """BxK flat indices of pixels of the mask, drawn with replacement."""
        region = mask.flatten(1) > 0.5
        total = region.sum(1, keepdim=True)
        return nth_pixels(region, (self._uniform(len(region), count) * total).long().minimum(total - 1))

    def _parameters(self, recipe: str, count: int) -> torch.Tensor:
        """`recipes.draw_parameters` for `count` foregrounds."""
        *kinds, scale = constant(recipe, self.device)
        mixed = 0.5 * self._chosen(torch.stack(kinds), count) + 0.5 * self._uniform(count, len(scale), low=-1) * scale
        own = self._uniform(count, len(OWN), low=-1) * constant("own", self.device)
        return torch.cat([mixed, own], 1) if recipe == "HAdobe5k" else mixed

    def _restyled(self, pixels) -> torch.Tensor:
        """`recipes.restyle` for a fixed share of the pictures."""
        count = round(self.restyle * len(pixels))
        rows = torch.randperm(len(pixels), generator=self.draws, device=self.device)[:count]
        changed, extent = pixels[rows], self.places.std(2, correction=0, keepdim=True)
        for recipe, edit in EDITS.items():
            changed = edit(changed, self.places, 0.0, extent, self._parameters(recipe, count))
        return pixels.index_copy(0, rows, changed)

    def _jittered(self, mask) -> torch.Tensor:
        """`recipes.jitter`."""
        by = torch.randint(-JITTER, JITTER + 1, (len(mask), 1, 1, 1), generator=self.draws, device=self.device)
        discs = constant("discs", self.device)[by.abs().flatten()][:, None]
        grown = torch.where(by < 0, 1 - mask, mask).transpose(0, 1)
        grown = (F.conv2d(grown, discs, padding=JITTER, groups=len(mask)) > 0.5).float().transpose(0, 1)
        out = torch.where(by < 0, 1 - grown, grown)
        return torch.where((out.amax((2, 3), True) > 0) & (out.amin((2, 3), True) < 1), out, mask)

    def _looks(self, pixels, region, original) -> tuple[torch.Tensor, ...]:
        """What foregrounds are recoloured by: a sample Bx3xSAMPLE of each, its places, the mean and deviation (Bx2x1)
        of all its places, a larger sample, and one of another picture's foreground."""
        total = region.sum(1)[:, None, None]
        middle = (self.places * region[:, None]).sum(2, keepdim=True) / total
        extent = (((self.places - middle).square() * region[:, None]).sum(2, keepdim=True) / total).sqrt()
        at, own = (self._drawn(region, count)[:, None] for count in (SAMPLE, STATISTICS))
        other = torch.randperm(len(pixels), generator=self.draws, device=self.device)
        reference = pixels[other].take_along_dim(self._drawn(original[other], STATISTICS)[:, None], 2)
        sample, places = (values.take_along_dim(at, 2) for values in (pixels, self.places))
        return sample, places, middle, extent, pixels.take_along_dim(own, 2), reference

    def _strengths(self, recipe: str, count: int) -> torch.Tensor:
        """`iharmony4_statistics.draw` of fMSE, but for the weak ones."""
        scores, logs = constant("levels", self.device), constant("fmse", self.device, recipe)
        at = torch.special.ndtri(self._uniform(count).clamp(*OUTERMOST))
        k = torch.bucketize(at, scores).clamp(1, len(LEVELS) - 1)
        drawn = logs[k - 1] + (logs[k] - logs[k - 1]) * (at - scores[k - 1]) / (scores[k] - scores[k - 1])
        return torch.where(self._uniform(count) < self.weak, 200 * self._uniform(count).square(), drawn.exp())

    def _recoloured(self, recipe: str, pixels, sample, places, middle, extent, own, reference) -> torch.Tensor:
        """`recipes.recolor` of whole pictures: Bx3xP; arguments as `_looks` returns them."""
        if recipe in EDITS:
            parameters, given = self._parameters(recipe, len(pixels))[:, None], (places, self.places)

            def changed(gain, x, places):
                return EDITS[recipe](x, places, middle, extent, (gain * parameters)[:, 0])
        else:
            both = torch.cat([sample, pixels], 2)
            parts = zip(TRANSFERS, *(x.chunk(len(TRANSFERS)) for x in (both, own, reference)), strict=False)
            given = (torch.cat([transfer(*part) for transfer, *part in parts]) - both).tensor_split([SAMPLE], 2)

            def changed(gain, x, change):
                return x + gain.clamp(max=1) * change

        wanted = self._strengths(recipe, len(pixels))[:, None, None] / 255**2
        gain = torch.full_like(wanted, 0.5)
        for _ in range(6):
            reached = (changed(gain, sample, given[0]) - sample).square().mean((1, 2), keepdim=True)
            gain = (gain * (wanted / reached.clamp_min(1e-9)).sqrt()).clamp(*GAIN)
        return changed(gain, pixels, given[1])

    def _blurred(self, mask) -> torch.Tensor:
        """Each mask blurred by a sigma of its own."""
        sigma = self._uniform(len(mask), 1, low=0.4)
        line = (-torch.arange(-2, 3, device=self.device).square() / (2 * sigma.square())).exp()
        line = (line / line.sum(1, keepdim=True)).view(-1, 1, 5, 1)
        x = F.pad(mask, (2,) * 4, mode="reflect").transpose(0, 1)
        return F.conv2d(F.conv2d(x, line, groups=len(mask)), line.mT, groups=len(mask)).transpose(0, 1)
