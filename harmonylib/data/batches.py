"""Training examples: harmonization triples and plain photos with masks, decoded once and kept in memory.

A `batches` object is called with the step and returns a dict of CPU tensors, a pure function of its seed and the step.
Its `key` says what decides them (data and options), for resume points.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import cv2
import joblib
import numpy as np
import torch

from ..core import cache
from ..core.devices import autocast
from ..core.errors import HarmonyError
from ..core.images import read_pair, shrink_pair, to_tensor
from ..core.progress import progress
from ..core.seeds import rng, seed_for
from .recipes import DEFAULTS, RECIPES, RecipeSettings, jitter, recolor, restyle, soften, widened

TASKS = ("harmonize", "inverse")
STORED = 512  # pixels
cv2.setNumThreads(0)  # albumentations' crops run beside the training


def batch_indices(step: int, count: int, batch_size: int, seed) -> list[int]:
    """The data-set indices of one step: shuffled epochs laid end to end, a pure function of (seed, step)."""
    if count < 1:
        raise HarmonyError("the training list is empty; check the data folder with `harmonylib check-data`")
    indices, position = [], step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, count)
        order = rng(seed, "order", epoch).permutation(count)[offset : offset + batch_size - len(indices)]
        indices += order.tolist()
        position += len(order)
    return indices


def prefetched(batches, steps: range, device: torch.device, precision: str = "fp32"):
    """(step, batch) in order; one thread makes the next batch while the caller uses this.

    Networks that batches call run in `precision` (in fp32 where that is fp16, which overflows in autoencoders).
    """
    threads = torch.get_num_threads()
    mixed = autocast(device, "fp32" if precision == "fp16" else precision)

    def settle():
        torch.get_num_threads()  # a new thread takes the common number with its first operation, and would do so later
        torch.set_num_threads(1)  # else a second team of threads would start beside the caller's
        mixed.__enter__()  # for good: leaving it would drop the cast weights that the caller's own step goes on using
        torch.set_autocast_cache_enabled(False)  # nor does the caller get weights that were cast without gradients

    def prepare(step):
        batch = batches(step)
        return {name: value.pin_memory() for name, value in batch.items()} if device.type == "cuda" else batch

    with ThreadPoolExecutor(1, "prefetch") as pool:
        pool.submit(settle).result()
        torch.set_num_threads(threads)  # the common number, which the thread has changed, too
        ahead = pool.submit(prepare, steps[0]) if steps else None
        for step in steps:
            batch = ahead.result()
            ahead = pool.submit(prepare, step + 1) if step + 1 in steps else None
            yield step, batch


# ---- photos with masks ----


def load_pairs(pairs, longest: int = 256) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read (image, mask) paths into memory, shrunk to `longest`. Raises HarmonyError where their sizes differ."""
    paths = progress(pairs, desc="reading photos", unit="photo")
    return [shrink_pair(*read_pair(image, mask), longest) for image, mask in paths]


class PhotoBatches:
    """Random crops of (image, mask) arrays: "real" Bx3xSxS in [-1, 1], "mask" Bx1xSxS in {0, 1}.

    A crop has a share within `scale` of the picture's area (DiffHarmony's augmentation), and half are mirrored.
    inpainting: masks are drawn anew, see `inpainting_masks`.
    """

    def __init__(self, photos, size: int, batch_size: int, seed, scale=(0.25, 1.0), inpainting: bool = False):
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for its version
        import albumentations as A  # here: it is slow to import, and only this class needs it

        self.photos, self.batch_size, self.seed, self.inpainting = photos, batch_size, seed, inpainting
        methods = {"interpolation": cv2.INTER_AREA, "mask_interpolation": cv2.INTER_NEAREST}
        crop = A.RandomResizedCrop((size, size), scale=scale, **methods)
        self.transform = A.Compose([crop, A.HorizontalFlip(p=0.5)])

    @property
    def key(self) -> list:
        return [joblib.hash(self.photos), str(self.seed), repr(self.transform)]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        crops = []
        for place, index in enumerate(batch_indices(step, len(self.photos), self.batch_size, self.seed)):
            image, mask = self.photos[index]
            # albumentations ignores numpy's global seed
            self.transform.set_random_seed(seed_for(self.seed, "crop", step, place) % 2**32)
            crops.append(self.transform(image=image, mask=mask.astype(np.uint8)))
        masks = torch.stack([to_tensor(crop["mask"] > 0) for crop in crops])
        if self.inpainting:
            masks = inpainting_masks(masks, self.seed, "inpainting", step)
        return {"real": torch.stack([to_tensor(crop["image"]) for crop in crops]), "mask": masks}


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


# ---- harmonization triples ----


class TripleSet:
    """Triples as squares: composites, reals and masks, each file decoded once and memory-mapped.

    geometry: "squash" or "centre-crop" (see images.to_square). Composites of one pair share their real and mask entry.
    Above STORED pixels a set may be larger than a disk: there files are decoded whenever they are asked for.
    """

    def __init__(self, triples, size: int, geometry: str = "squash"):
        self.triples, self.size, self.geometry = list(triples), size, geometry
        reals, masks = (list(dict.fromkeys(getattr(t, part) for t in self.triples)) for part in ("real", "mask"))
        real_number, mask_number = ({path: number for number, path in enumerate(paths)} for paths in (reals, masks))
        self.real_of = np.array([real_number[t.real] for t in self.triples])
        self.mask_of = np.array([mask_number[t.mask] for t in self.triples])
        composites = [triple.composite for triple in self.triples]
        self.files = {"composite": cache.Squares(composites, size, geometry),
                      "real": cache.Squares(reals, size, geometry),
                      "mask": cache.Squares(masks, size, geometry, mask=True)}  # fmt: skip

    def __len__(self) -> int:
        return len(self.triples)

    def _squares(self, part: str):
        return self.files[part] if self.size > STORED else self.files[part].stored()

    @cached_property
    def composites(self):
        """N x S x S x 3 uint8, decoded when first asked for, as the others: training on made-up ones needs none."""
        return self._squares("composite")

    @cached_property
    def reals(self):
        return self._squares("real")

    @cached_property
    def masks(self):
        return self._squares("mask")

    def key(self, composites: bool = True) -> str:
        """What identifies the data to caches and checkpoints: a hash of the files' contents, names and pairs.

        composites: whether the composites' contents count; they do not where all are made anew.
        """
        parts = [self.files[part].key() for part in ("real", "mask", *(["composite"] if composites else []))]
        return joblib.hash([parts, [f"{t.subset}/{t.name}" for t in self.triples], self.real_of, self.mask_of])

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


def augmentation(section) -> dict:
    """The options of `PixelBatches` that a section of the settings has."""
    names = ("batch_size", "crop", "flip", "recolor", "restyle", "jitter")
    return {name: getattr(section, name) for name in names if hasattr(section, name)}


class PixelBatches:
    """For image-to-image models: "composite", "real" and "mask", each triple with a crop and a flip of its own.

    crop: side of the random windows (0: the whole square), whose corners lie on a grid of `grid` pixels; flip: mirror
    half of the triples. recolor: share of the composites that are made anew from their real image by their subset's
    recipe, so that a network never sees one twice; restyle: share of these whose real image is restyled as a whole
    first, for sets of few photos; jitter: share of these whose mask is dilated or eroded first, as masks drawn by hand
    are, and whose edge is softened. A transfer takes its colours from another image of the batch. Raises HarmonyError
    for a crop that does not fit.
    """

    def __init__(self, data: TripleSet, batch_size: int, seed, crop=0, recolor=0.0, restyle=0.0, jitter=0.0, flip=True,
                 recipes: RecipeSettings = DEFAULTS, grid: int = 1, images: bool = True):  # fmt: skip
        if not 0 <= crop <= data.size or crop % grid:
            raise HarmonyError(f"crop {crop} must be 0 or at most {data.size} and a multiple of {grid}; change it")
        for part in ("masks", *(["reals"] if images else []), *(["composites"] if images and recolor < 1 else [])):
            getattr(data, part)  # decoded here and not in the training loop's thread
        self.data, self.batch_size, self.seed, self.crop, self.grid = data, batch_size, seed, crop, grid
        self.recolor, self.restyle, self.jitter, self.recipes, self.flip = recolor, restyle, jitter, recipes, flip

    @property
    def key(self) -> list:
        options = [self.crop, self.flip, self.recolor, self.restyle, self.jitter, repr(self.recipes)]
        return [self.data.key(self.recolor < 1), str(self.seed), *options]

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A step's triples, whether each is mirrored (0 or 1), and their windows' corners (Bx2, in grid cells)."""
        draw = rng(self.seed, "flip and crop", step)
        indices = np.array(batch_indices(step, len(self.data), self.batch_size, self.seed))
        room = (self.data.size - self.crop) // self.grid if self.crop else 0
        return indices, draw.integers(2, size=len(indices)) * self.flip, draw.integers(room + 1, size=(len(indices), 2))

    def __call__(self, step: int, images: bool = True) -> dict[str, torch.Tensor]:
        """The step's batch; images=False leaves all but the masks out."""
        indices, mirrored, corners = self.drawn(step)
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
                arrays["real"][row] = restyle(arrays["real"][row], own)
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


class LatentBatches(PixelBatches):
    """For the latent models: posterior moments of both images, with the mask and unless pixels=False the images.

    task "harmonize": target real, condition composite; "inverse": the other way (Sec. 4.1). Batches hold "target",
    "condition" (Bx3xSxS), "mask", "moments" and "condition_moments" (Bx2Cxhxw). Windows lie on the latent grid. Moments
    are cached for all images and their mirror images. With `recolor` those of composites are made in every step, and
    those of real images where these are restyled or cut (a network must not tell the two apart by how they were made).
    augmentation: options of `PixelBatches`.
    """

    def __init__(self, data: TripleSet, vae, task: str, batch_size: int, seed, pixels: bool = True, **augmentation):
        assert task in TASKS, task
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        images = pixels or augmentation.get("recolor", 0) > 0
        super().__init__(data, batch_size, seed, grid=factor, images=images, **augmentation)
        self.vae, self.pixels = vae, pixels
        self.names = ("real", "composite") if task == "harmonize" else ("composite", "real")
        kept = self.names if not self.recolor else () if self.restyle or self.crop else ("real",)
        self.moments = {name: cache.moments(vae, data.files[name], vae.device) for name in kept}

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch = super().__call__(step, images=self.pixels or self.recolor > 0)
        moments = self._cached(*self.drawn(step)) | self._encoded(batch)
        target, condition = self.names
        out = {"mask": batch["mask"], "moments": moments[target], "condition_moments": moments[condition]}
        return out | ({"target": batch[target], "condition": batch[condition]} if self.pixels else {})

    @torch.no_grad()
    def _encoded(self, batch) -> dict[str, torch.Tensor]:
        names = [name for name in self.names if name not in self.moments]
        if not names:
            return {}
        images = torch.cat([batch[name] for name in names]).to(self.vae.device)
        moments = self.vae.encode(images).latent_dist.parameters.float().cpu()
        return dict(zip(names, moments.chunk(len(names)), strict=True))

    def _cached(self, indices, mirrored, corners) -> dict[str, torch.Tensor]:
        rows = {"composite": indices, "real": self.data.real_of[indices]}
        batch = {name: torch.from_numpy(kept[mirrored, rows[name]]).float() for name, kept in self.moments.items()}
        return windows(batch, corners, self.crop // self.grid) if self.crop else batch
