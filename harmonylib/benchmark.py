"""Make an iHarmony4-layout data set from photos with masks, by our construction recipes."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import HarmonyError
from .images import fit, to_tensor, to_uint8
from .layout import SPLITS, SUBSETS, plain_name, write_composite, write_list, write_pair
from .parallel import parallel_map
from .photos import Photo, random_crop, region_masks
from .recipes import RecipeSettings, make_composite, restyle
from .seeds import rng, seed_for


@dataclass(frozen=True)
class BenchmarkSettings:
    """How much to make: pairs and variants (composites per pair) of each subset, long side in pixels.

    region_share: share of pairs whose foreground is a superpixel region instead of a photo's own mask.
    restyle_share: share of training pairs whose photo is restyled as a whole first (`recipes.restyle`).
    crops: whether a pair is a random window of its photo, or all of it.
    """

    train_pairs: int = 100
    test_pairs: int = 12
    train_variants: int = 3
    test_variants: int = 2
    size: int = 192
    region_share: float = 0.3
    restyle_share: float = 0.0
    crops: bool = True


@dataclass(frozen=True)
class _Job:
    """One (real, mask) pair to make: `number` counts the pairs that a subset takes from the photo."""

    subset: str
    split: str
    photo: int
    number: int


def make_benchmark(
    root,
    photos: list[Photo],
    settings: BenchmarkSettings,
    recipes: RecipeSettings,
    seed: int,
    subsets=SUBSETS,
    workers: int | None = None,
) -> pd.DataFrame:
    """Write `<subset>/{composite_images,masks,real_images}/` and the two lists under root, replacing what is there.

    Train and test are made of different photos (Photo.split), each subset going through them in an order of its own.
    The set is built beside `root` and renamed when complete, by `workers` processes (None: one a core) whose number
    changes no byte. Returns one row per composite: subset, split, name, photo, plausible, delta_e, tries, reason.
    Raises HarmonyError when a split has fewer than two photos (a recipe needs a second one for reference).
    """
    root = Path(root)
    building = root.with_name(f".{root.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    jobs = _plan(root, photos, settings, seed, subsets)
    make = partial(_make_pair, building, photos, settings, recipes, seed)
    made = parallel_map(make, jobs, "making composites", "pair", workers)
    rows = pd.DataFrame([row for pair in made for row in pair])
    lines = rows.pop("line")
    for split in SPLITS:
        write_list(building, split, lines[rows["split"] == split])
    shutil.rmtree(root, ignore_errors=True)
    building.rename(root)
    return rows


def _plan(root, photos, settings, seed, subsets) -> list[_Job]:
    jobs = []
    for split in SPLITS:
        chosen = [index for index, photo in enumerate(photos) if photo.split == split]
        pairs = settings.train_pairs if split == "train" else settings.test_pairs
        if pairs and len(chosen) < 2:
            raise HarmonyError(f"{root}: the {split} split has {len(chosen)} photos; give at least two with masks")
        for subset in subsets:
            order = rng(seed, subset, split, "order").permutation(chosen)
            jobs += [_Job(subset, split, int(order[n % len(chosen)]), n // len(chosen)) for n in range(pairs)]
    if not jobs:
        raise HarmonyError(f"{root}: nothing to make; set train_pairs or test_pairs above 0 and name a subset")
    return jobs


def _make_pair(root, photos, settings: BenchmarkSettings, recipes: RecipeSettings, seed: int, job: _Job) -> list[dict]:
    """Write one pair and its composites; one row per composite."""
    photo = photos[job.photo]
    others = [other for other in photos if other.split == job.split and other is not photo]
    real, mask = draw_pair(photo, job.number, settings, (seed, job.subset, job.split))
    label = plain_name(photo.name)
    name = f"{label}-{job.number:03d}"
    draw = rng(seed, job.subset, name, "restyle")
    if job.split == "train" and draw.random() < settings.restyle_share:
        real = to_uint8(restyle(to_tensor(real)[None] / 2 + 0.5, [draw], recipes)[0] * 2 - 1)
    pair = write_pair(root, job.subset, name, 1, real, mask)
    rows = []
    for variant in range(1, 1 + (settings.train_variants if job.split == "train" else settings.test_variants)):
        words = (seed, job.subset, name, variant)
        other = others[int(rng(*words, "reference").integers(len(others)))]
        reference = _shrink(other, other.image, np.any(list(other.masks.values()), axis=0), settings.size)
        composite, info = make_composite(job.subset, real, mask, words, reference, recipes)
        line = write_composite(root, job.subset, pair, variant, composite)
        row = {"subset": job.subset, "split": job.split, "name": f"{pair}_{variant}", "photo": label, "line": line}
        rows.append(row | {key: info[key] for key in ("plausible", "delta_e", "tries", "reason")})
    return rows


def draw_pair(photo: Photo, number: int, settings: BenchmarkSettings, words: tuple) -> tuple[np.ndarray, np.ndarray]:
    """One (real, mask) pair of a photo: a random crop around one of its masks, or a superpixel region of such a crop.

    Returns HxWx3 uint8 and HxW bool with a long side of at most settings.size; the words and number decide all draws.
    """
    draw = rng(*words, photo.name, number)
    image, mask = photo.image, photo.masks[sorted(photo.masks)[int(draw.integers(len(photo.masks)))]]
    if settings.crops:
        image, mask = random_crop(image, mask, draw)
    image, mask = _shrink(photo, image, mask, settings.size)
    if draw.random() < settings.region_share:
        mask = region_masks(image, seed_for(*words, photo.name, number, "region"), 1)[0]
    return image, mask


def _shrink(photo: Photo, image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`images.fit`. Raises HarmonyError naming the photo when its mask is empty or full at that size."""
    image, mask = fit(image, mask, size)
    if mask.all() or not mask.any():
        gone = "background" if mask.all() else "foreground"
        raise HarmonyError(f"photo {photo.name}: at {size} px no {gone} is left; enlarge size or remove the photo")
    return image, mask
