"""Training examples: harmonization triples and plain photos with masks, decoded once and kept in memory."""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from . import cache, transforms
from .errors import HarmonyError
from .images import fit, read_image, read_mask, to_tensor
from .progress import progress
from .recipes import recolor_batch, restyle
from .seeds import generator, rng
from .training import batch_indices


def load_pairs(pairs, longest: int = 256) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read (image, mask) paths into memory, shrunk to `longest`. Raises HarmonyError where their sizes differ."""
    loaded = []
    for image_path, mask_path in progress(pairs, desc="reading photos", unit="photo"):
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise HarmonyError(
                f"{mask_path}: mask is {mask.shape[::-1]} but its photo is {image.shape[1::-1]}; resize it"
            )
        loaded.append(fit(image, mask, longest))
    return loaded


class PhotoBatches:
    """make_batch(step) of random crops of (image, mask) arrays: "real" Bx3xSxS in [-1, 1], "mask" Bx1xSxS in {0, 1}."""

    def __init__(self, photos, size: int, batch_size: int, seed, scale=(0.25, 1.0)):
        self.photos, self.batch_size, self.seed = photos, batch_size, seed
        self.transform = transforms.random_crop(size, scale)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        reals, masks = [], []
        for place, index in enumerate(batch_indices(step, len(self.photos), self.batch_size, self.seed)):
            image, mask = self.photos[index]
            out = transforms.apply(self.transform, (self.seed, "crop", step, place), mask, real=image)
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
        self.triples = list(triples)
        reals, masks = (list(dict.fromkeys(getattr(t, part) for t in self.triples)) for part in ("real", "mask"))
        real_number, mask_number = ({path: number for number, path in enumerate(paths)} for paths in (reals, masks))
        self.real_of = np.array([real_number[t.real] for t in self.triples])
        self.mask_of = np.array([mask_number[t.mask] for t in self.triples])
        self.composites = cache.pixels([t.composite for t in self.triples], size, geometry)
        self.reals = cache.pixels(reals, size, geometry)
        self.masks = cache.pixels(masks, size, geometry, mask=True)

    def __len__(self) -> int:
        return len(self.triples)

    @property
    def key(self) -> str:
        """What identifies the data to checkpoints: a hash of the cache entries' names (contents) and the pairs."""
        arrays = "".join(Path(array.filename).stem for array in (self.composites, self.reals, self.masks))
        return blake2b(arrays.encode() + self.real_of.tobytes() + self.mask_of.tobytes(), digest_size=16).hexdigest()

    def batch(self, indices, images: bool = True) -> dict[str, torch.Tensor]:
        """{"mask": Bx1xSxS in {0, 1}, "composite", "real": Bx3xSxS in [-1, 1]} of the given triples."""
        indices = list(indices)
        batch = {"mask": torch.from_numpy(self.masks[self.mask_of[indices]]).float()[:, None]}
        if images:
            batch["composite"] = _pixels_to_tensor(self.composites[indices])
            batch["real"] = _pixels_to_tensor(self.reals[self.real_of[indices]])
        return batch


def _pixels_to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class LatentBatches:
    """make_batch(step) for the latent models, with cached posterior moments and random mirroring.

    task "harmonize": target real, condition composite; "inverse": the other way (Sec. 4.1). Batches hold "target",
    "condition" (Bx3xSxS), "mask", "moments" and "condition_moments" (Bx2Cxhxw). crop: side in pixels of a random window
    aligned to the latent grid (0: the whole square). pixels=False leaves the images out (the UNet needs none).
    """

    def __init__(self, data: TripleSet, vae, task: str, batch_size: int, seed, device, crop=0, pixels=True, flip=True):
        if task not in TASKS:
            raise HarmonyError(f"task {task!r} is unknown; use {' or '.join(TASKS)}")
        self.data, self.task, self.batch_size, self.seed = data, task, batch_size, seed
        self.crop, self.pixels, self.flip = crop, pixels, flip
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = data.composites.shape[1]
        if not 0 <= crop <= side or crop % self.factor:
            raise HarmonyError(f"crop {crop} must be 0 or at most {side} and a multiple of {self.factor}; change it")
        self.composite_moments = cache.moments(vae, data.composites, device)
        self.real_moments = cache.moments(vae, data.reals, device)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        data, draw = self.data, rng(self.seed, "flip and crop", step)
        indices = np.array(batch_indices(step, len(data), self.batch_size, self.seed))
        mirrored = draw.integers(2, size=len(indices)) if self.flip else np.zeros(len(indices), int)
        images = data.batch(indices, self.pixels)
        side = images["mask"].shape[-1] // self.factor
        flips = torch.from_numpy(mirrored).bool()
        batch = {k: torch.where(flips.view(-1, 1, 1, 1), v.flip(-1), v) for k, v in images.items()}
        batch["composite_moments"] = torch.from_numpy(self.composite_moments[mirrored, indices]).float()
        batch["real_moments"] = torch.from_numpy(self.real_moments[mirrored, data.real_of[indices]]).float()
        if self.crop:
            window = self.crop // self.factor
            top, left = (int(draw.integers(side - window + 1)) for _ in range(2))
            for name, value in batch.items():
                f = 1 if name.endswith("moments") else self.factor
                batch[name] = value[..., top * f : (top + window) * f, left * f : (left + window) * f]
        target, condition = ("real", "composite") if self.task == "harmonize" else ("composite", "real")
        out = {"mask": batch["mask"], "moments": batch[f"{target}_moments"]}
        out["condition_moments"] = batch[f"{condition}_moments"]
        return out | ({"target": batch[target], "condition": batch[condition]} if self.pixels else {})


class PixelBatches:
    """make_batch(step) for image-to-image models: "composite", "real" and "mask", each triple with a crop
    and a flip of its own.

    crop: side of the random window (0: the whole square). recolor: share of each batch that is made anew, so that small
    sets do not run out of composites: the real image restyled as a whole, then its foreground by the batched recipes.
    """

    def __init__(self, data: TripleSet, batch_size: int, seed, crop=0, recolor: float = 0.0):
        side = data.composites.shape[1]
        if not 0 <= crop <= side:
            raise HarmonyError(f"crop {crop} must be between 0 and the images' {side} pixels; change it")
        self.data, self.batch_size, self.seed, self.crop, self.recolor = data, batch_size, seed, crop, recolor

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        draw = rng(self.seed, "flip and crop", step)
        batch = self.data.batch(batch_indices(step, len(self.data), self.batch_size, self.seed))
        flips = torch.from_numpy(draw.integers(2, size=self.batch_size)).bool().view(-1, 1, 1, 1)
        batch = {name: torch.where(flips, value.flip(-1), value) for name, value in batch.items()}
        if self.recolor:
            seeds = draw.integers(2**62, size=self.batch_size)
            real = restyle(batch["real"] / 2 + 0.5, [np.random.default_rng(n) for n in seeds]) * 2 - 1
            composite = recolor_batch(real, batch["mask"], generator(self.seed, "recolor", step))
            chosen = torch.from_numpy(draw.random(self.batch_size) < self.recolor).view(-1, 1, 1, 1)
            batch["real"] = torch.where(chosen, real, batch["real"])
            batch["composite"] = torch.where(chosen, composite, batch["composite"])
        if self.crop:
            corners = draw.integers(batch["mask"].shape[-1] - self.crop + 1, size=(self.batch_size, 2)).tolist()
            windows = [(..., slice(y, y + self.crop), slice(x, x + self.crop)) for y, x in corners]
            batch = {k: torch.stack([v[w] for v, w in zip(vs, windows, strict=True)]) for k, vs in batch.items()}
        return batch
