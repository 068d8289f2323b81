"""Training examples: harmonization triples and plain photos with masks, decoded once and kept in memory."""

from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from ..core import cache
from ..core.errors import HarmonyError
from ..core.images import read_pair, shrink_pair, to_tensor
from ..core.progress import progress
from ..core.seeds import rng
from ..training import batch_indices
from . import crops
from .recipes import DEFAULTS, RECIPES, RecipeSettings, jitter, recolor, restyle, soften, widened


def load_pairs(pairs, longest: int = 256) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read (image, mask) paths into memory, shrunk to `longest`. Raises HarmonyError where their sizes differ."""
    paths = progress(pairs, desc="reading photos", unit="photo")
    return [shrink_pair(*read_pair(image, mask), longest) for image, mask in paths]


class PhotoBatches:
    """make_batch(step) of random crops of (image, mask) arrays: "real" Bx3xSxS in [-1, 1], "mask" Bx1xSxS in {0, 1}."""

    def __init__(self, photos, size: int, batch_size: int, seed, scale=(0.25, 1.0)):
        self.photos, self.batch_size, self.seed = photos, batch_size, seed
        self.transform = crops.random_crop(size, scale)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        reals, masks = [], []
        for place, index in enumerate(batch_indices(step, len(self.photos), self.batch_size, self.seed)):
            image, mask = self.photos[index]
            out = crops.apply(self.transform, (self.seed, "crop", step, place), mask, real=image)
            reals.append(to_tensor(out["real"]))
            masks.append(to_tensor(out["mask"]))
        return {"real": torch.stack(reals), "mask": torch.stack(masks)}


def inpainting_masks(masks: torch.Tensor, *seed_words) -> torch.Tensor:
    """Masks for inpainting training (Bx1xHxW): the object, a random box or everything, drawn per image."""
    draw, out = rng(*seed_words), masks.clone()
    height, width = masks.shape[-2:]
    for mask in out:
        kind = draw.random()
        if kind < 0.1:
            mask.fill_(1.0)
        elif kind < 0.6 or not mask.any():
            h, w = (int(side * draw.uniform(0.2, 0.8)) for side in (height, width))
            top, left = int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1))
            mask.zero_()[..., top : top + h, left : left + w] = 1.0
    return out


TASKS = ("harmonize", "inverse")


class TripleSet:
    """Triples as memory-mapped squares: composites, reals and masks, each file decoded once.

    geometry: "squash" or "centre-crop" (see images.to_square). Composites of one pair share their real and mask entry.
    """

    def __init__(self, triples, size: int, geometry: str = "squash"):
        self.triples, self.size, self.geometry = list(triples), size, geometry
        reals, masks = (list(dict.fromkeys(getattr(t, part) for t in self.triples)) for part in ("real", "mask"))
        real_number, mask_number = ({path: number for number, path in enumerate(paths)} for paths in (reals, masks))
        self.real_of = np.array([real_number[t.real] for t in self.triples])
        self.mask_of = np.array([mask_number[t.mask] for t in self.triples])
        self.reals = cache.pixels(reals, size, geometry)
        self.masks = cache.pixels(masks, size, geometry, mask=True)

    def __len__(self) -> int:
        return len(self.triples)

    @cached_property
    def composites(self) -> np.ndarray:
        """N x S x S x 3 uint8, decoded when first asked for: training on composites made on the fly needs none."""
        return cache.pixels([triple.composite for triple in self.triples], self.size, self.geometry)

    def key(self, composites: bool = True) -> str:
        """What identifies the data to caches and checkpoints: a hash of the cache entries' names and of the pairs.

        composites: whether the composites' contents count; they do not where all are made anew.
        """
        arrays = [self.reals, self.masks, *([self.composites] if composites else [])]
        names = "".join(Path(array.filename).stem for array in arrays)
        return blake2b(names.encode() + self.real_of.tobytes() + self.mask_of.tobytes(), digest_size=16).hexdigest()

    def arrays(self, indices, images: bool = True, composites: bool = True) -> dict[str, np.ndarray]:
        """{"mask": BxSxS bool, "composite", "real": BxSxSx3 uint8} of the given triples.

        composites=False: the reals stand in for composites that the caller makes itself.
        """
        indices = list(indices)
        arrays = {"mask": self.masks[self.mask_of[indices]]}
        if images:
            arrays["real"] = self.reals[self.real_of[indices]]
            arrays["composite"] = self.composites[indices] if composites else arrays["real"].copy()
        return arrays

    def batch(self, indices, images: bool = True) -> dict[str, torch.Tensor]:
        """{"mask": Bx1xSxS in {0, 1}, "composite", "real": Bx3xSxS in [-1, 1]} of the given triples."""
        return to_tensors(self.arrays(indices, images))


def to_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Batches of masks (BxHxW bool) and images (BxHxWx3 uint8) as float tensors."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {
        name: x.float()[:, None] if x.dtype == torch.bool else x.float().div_(127.5).sub_(1.0).permute(0, 3, 1, 2)
        for name, x in tensors.items()
    }


class PixelBatches:
    """make_batch(step) for image-to-image models: "composite", "real" and "mask", each triple with a crop
    and a flip of its own.

    crop: side of the random windows (0: the whole square), whose corners lie on a grid of `grid` pixels. recolor: share
    of the composites that are made anew from their real image by their subset's recipe, so that a network never sees
    one twice; restyle: share of these whose real image is restyled as a whole first, for sets of few photos; jitter:
    share of these whose mask is dilated or eroded first, as masks drawn by hand are, and whose edge is softened. A
    transfer takes its colours from another image of the batch.
    """

    def __init__(
        self,
        data: TripleSet,
        batch_size: int,
        seed,
        crop=0,
        recolor=0.0,
        restyle=0.0,
        jitter=0.0,
        recipes: RecipeSettings = DEFAULTS,
        grid: int = 1,
    ):
        side = data.size
        if not 0 <= crop <= side or crop % grid:
            raise HarmonyError(f"crop {crop} must be 0 or at most {side} and a multiple of {grid}; change it")
        if recolor < 1:
            data.composites  # noqa: B018 - decoded here and not in the training loop's thread
        self.data, self.batch_size, self.seed, self.crop, self.grid = data, batch_size, seed, crop, grid
        self.recolor, self.restyle, self.jitter, self.recipes = recolor, restyle, jitter, recipes

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        return self.augmented(step, *self.drawn(step))

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A step's triples, whether each is mirrored (0 or 1), and their windows' corners (Bx2, in grid cells)."""
        draw = rng(self.seed, "flip and crop", step)
        indices = np.array(batch_indices(step, len(self.data), self.batch_size, self.seed))
        room = (self.data.size - self.crop) // self.grid if self.crop else 0
        return indices, draw.integers(2, size=len(indices)), draw.integers(room + 1, size=(len(indices), 2))

    def augmented(self, step: int, indices, mirrored, corners, images: bool = True) -> dict[str, torch.Tensor]:
        """The batch of what `drawn` says; images=False leaves all but the masks out."""
        arrays = self.data.arrays(indices, images, composites=self.recolor < 1)
        if self.recolor and images:
            self._recolor(step, indices, arrays)
        for array in arrays.values():  # as bytes: a quarter of the work that it is on floats
            array[mirrored == 1] = array[mirrored == 1, :, ::-1]
        batch = to_tensors(arrays)
        return windows(batch, corners * self.grid, self.crop) if self.crop else batch

    def _recolor(self, step: int, indices, arrays: dict[str, np.ndarray]) -> None:
        """Replace composites (and what they are made of) by new ones, in place."""
        draw = rng(self.seed, "recolor", step)
        partner = draw.permutation(len(indices))
        originals = list(zip(arrays["real"].copy(), arrays["mask"].copy(), strict=True))
        for row, index in enumerate(indices):
            own = np.random.default_rng(draw.integers(2**62))
            anew, restyled, jittered = own.random(3) < (self.recolor, self.restyle, self.jitter)
            if not anew or not arrays["mask"][row].any():  # an object too small for this size
                continue
            if restyled:
                arrays["real"][row] = restyle(arrays["real"][row], own, self.recipes)
            if jittered:
                arrays["mask"][row] = jitter(arrays["mask"][row], own)
            real, mask = arrays["real"][row], arrays["mask"][row]
            subset = self.data.triples[index].subset
            recipe = subset if subset in RECIPES else list(RECIPES)[own.integers(len(RECIPES))]
            reference = originals[partner[row]]
            region = widened(mask) if jittered else mask
            # a tenth is far weaker than genuine ones, so that what fits already is left as it is
            fmse = 200 * own.random() ** 2 if own.random() < 0.1 else None
            composite = recolor(recipe, real, region, own, reference, self.recipes, fmse)
            arrays["composite"][row] = soften(composite, real, mask, own.uniform(0.4, 1.0)) if jittered else composite


def windows(batch: dict[str, torch.Tensor], corners, side: int) -> dict[str, torch.Tensor]:
    """Each image's square of `side` pixels whose top left corner is given (Bx2), of every tensor of a batch."""
    slices = [(..., slice(y, y + side), slice(x, x + side)) for y, x in np.asarray(corners).tolist()]
    return {name: torch.stack([v[s] for v, s in zip(vs, slices, strict=True)]) for name, vs in batch.items()}


class LatentBatches:
    """make_batch(step) for the latent models: `PixelBatches` with posterior moments of both images.

    task "harmonize": target real, condition composite; "inverse": the other way (Sec. 4.1). Batches hold "target",
    "condition" (Bx3xSxS), "mask", "moments" and "condition_moments" (Bx2Cxhxw). Windows lie on the latent grid.
    Moments are cached for all images and their mirror images; with `recolor` (one of the options `anew`, which are
    those of `PixelBatches`) they are made in every step.
    pixels=False leaves the images out (the UNet needs none).
    """

    def __init__(self, data: TripleSet, vae, task: str, batch_size: int, seed, device, crop=0, pixels=True, **anew):
        if task not in TASKS:
            raise HarmonyError(f"task {task!r} is unknown; use {' or '.join(TASKS)}")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.batches = PixelBatches(data, batch_size, seed, crop, grid=factor, **anew)
        self.task, self.pixels, self.vae, self.device, self.window = task, pixels, vae, device, crop // factor
        if not self.batches.recolor:
            self.moments = {"composite": cache.moments(vae, data.composites, device)}
            self.moments["real"] = cache.moments(vae, data.reals, device)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        anew = bool(self.batches.recolor)
        drawn = self.batches.drawn(step)
        batch = self.batches.augmented(step, *drawn, images=self.pixels or anew)
        names = ("real", "composite") if self.task == "harmonize" else ("composite", "real")
        moments = self._encoded(batch, names) if anew else self._cached(*drawn)
        out = {"mask": batch["mask"], "moments": moments[names[0]], "condition_moments": moments[names[1]]}
        return out | ({"target": batch[names[0]], "condition": batch[names[1]]} if self.pixels else {})

    @torch.no_grad()
    def _encoded(self, batch, names) -> dict[str, torch.Tensor]:
        images = torch.cat([batch[name] for name in names]).to(self.device)
        return dict(zip(names, self.vae.encode(images).latent_dist.parameters.cpu().chunk(2), strict=True))

    def _cached(self, indices, mirrored, corners) -> dict[str, torch.Tensor]:
        rows = {"composite": indices, "real": self.batches.data.real_of[indices]}
        batch = {k: torch.from_numpy(self.moments[k][mirrored, rows[k]]).float() for k in rows}
        return windows(batch, corners, self.window) if self.window else batch
