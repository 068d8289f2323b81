"""Make an iHarmony4-layout data set from photos with masks, by our construction recipes."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.errors import HarmonyError
from ..core.images import shrink_pair
from ..core.parallel import parallel_map
from ..core.seeds import rng, seed_for
from .embedded_photos import Photo, foreground_of_share, random_crop
from .genuine import GENUINE, draw
from .layout import SPLITS, SUBSETS, plain_name, write_composite, write_list, write_pair
from .recipes import EDITS, RecipeSettings, jitter, make_composite, restyle

CHOICE = 16  # photos among which the one is taken whose masks fit a drawn share of the picture best


@dataclass(frozen=True)
class BenchmarkSettings:
    """How much to make: pairs and variants (composites per pair) of each subset, long side in pixels.

    restyle_share: share of training pairs whose photo is restyled as a whole first (`recipes.restyle`).
    min_crop: shortest side of a pair's random window of its photo, as a share of the longest one; 1: the whole photo.
    parts: whether masks that do not cover what genuine ones do give way to a part of them or a piece of the picture.
    jitter: up to so many pixels are masks dilated or eroded before composites are made (`recipes.jitter`).
    """

    train_pairs: int = 100
    test_pairs: int = 12
    train_variants: int = 3
    test_variants: int = 2
    size: int = 192
    restyle_share: float = 0.0
    min_crop: float = 0.6
    parts: bool = True
    jitter: int = 0


@dataclass(frozen=True)
class _Job:
    """One (real, mask) pair to make: `number` counts the pairs that a subset takes from the photo, `share` is how much
    of the picture its foreground should cover."""

    subset: str
    split: str
    photo: int
    number: int
    share: float


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

    Train and test are made of different photos (Photo.split). Foregrounds cover as much of their pictures, and are
    changed as strongly, as the genuine ones of their subset (`genuine`), as far as the photos allow. The set is built
    beside `root` and renamed when complete, by `workers` processes (None: one a core) whose number changes no byte.
    Returns one row per composite: subset, split, name, photo, and what `make_composite` says.
    Raises HarmonyError when a split has fewer than two photos (a recipe needs a second one for reference).
    """
    root = Path(root)
    building = root.with_name(f".{root.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    shares = [row for row in parallel_map(_shares, photos, "looking at masks", "photo", workers)]
    jobs = _plan(root, photos, shares, settings, seed, subsets)
    make = partial(_make_pair, building, photos, settings, recipes, seed)
    made = parallel_map(make, jobs, "making composites", "pair", workers)
    rows = pd.DataFrame([row for pair in made for row in pair])
    lines = rows.pop("line")
    for split in SPLITS:
        write_list(building, split, lines[rows["split"] == split])
    shutil.rmtree(root, ignore_errors=True)
    building.rename(root)
    return rows


def _shares(photo: Photo) -> list[float]:
    return [float(mask.mean()) for mask in photo.masks.values()]


def _plan(root, photos, shares, settings, seed, subsets) -> list[_Job]:
    jobs = []
    for split in SPLITS:
        chosen = [index for index, photo in enumerate(photos) if photo.split == split]
        pairs = settings.train_pairs if split == "train" else settings.test_pairs
        if pairs and len(chosen) < 2:
            raise HarmonyError(f"{root}: the {split} split has {len(chosen)} photos; give at least two with masks")
        for subset in subsets:
            draws, queue = rng(seed, subset, split, "plan"), []
            for number in range(pairs):
                share = 0.5 * draws.random() if subset not in GENUINE else draw(GENUINE[subset].share, draws)
                share = float(min(max(share, 0.005), 0.9))
                queue = queue or draws.permutation(chosen).tolist()  # every photo once, then all of them again
                misfit = [min(abs(np.log(share / own)) for own in shares[photo]) for photo in queue[:CHOICE]]
                photo = queue.pop(int(np.argmin(misfit)))
                jobs.append(_Job(subset, split, photo, number // len(chosen), share))
    if not jobs:
        raise HarmonyError(f"{root}: nothing to make; set train_pairs or test_pairs above 0 and name a subset")
    return jobs


def _make_pair(root, photos, settings: BenchmarkSettings, recipes: RecipeSettings, seed: int, job: _Job) -> list[dict]:
    """Write one pair and its composites; one row per composite."""
    photo = photos[job.photo]
    others = [other for other in photos if other.split == job.split and other is not photo]
    real, mask = draw_pair(photo, job.number, job.share, settings, (seed, job.subset, job.split))
    label = plain_name(photo.name)
    name = f"{label}-{job.number:03d}"
    restyling = rng(seed, job.subset, name, "restyle")
    if job.split == "train" and restyling.random() < settings.restyle_share:
        real = restyle(real, restyling, recipes)
    if settings.jitter:
        mask = jitter(mask, rng(seed, job.subset, name, "jitter"), settings.jitter)
    pair = write_pair(root, job.subset, name, 1, real, mask)
    rows = []
    for variant in range(1, 1 + (settings.train_variants if job.split == "train" else settings.test_variants)):
        words = (seed, job.subset, name, variant)
        reference = None if job.subset in EDITS else partial(_reference, others, settings.size, words)
        composite, info = make_composite(job.subset, real, mask, words, reference, recipes)
        line = write_composite(root, job.subset, pair, variant, composite)
        row = {"subset": job.subset, "split": job.split, "name": f"{pair}_{variant}", "photo": label, "line": line}
        rows.append(row | {key: value for key, value in info.items() if key != "recipe"})
    return rows


def _reference(photos, size: int, words: tuple, attempt: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo, with its masks as one, that a try of a composite takes its colours from."""
    other = photos[int(rng(*words, "reference", attempt).integers(len(photos)))]
    return shrink(other, other.image, np.any(list(other.masks.values()), axis=0), size)


def draw_pair(photo: Photo, number: int, share: float, settings: BenchmarkSettings, words: tuple):
    """One (real, mask) pair of a photo: a random window of it, and a foreground that covers about `share` of that.

    Returns HxWx3 uint8 and HxW bool with a long side of at most settings.size; the words and number decide all draws.
    """
    random = rng(*words, photo.name, number)
    own = [photo.masks[name] for name in sorted(photo.masks)]
    mask = own[int(np.argmin([abs(np.log(share / mask.mean())) for mask in own]))]
    image = photo.image
    if settings.min_crop < 1:
        image, mask = random_crop(image, mask, random, settings.min_crop)
    image, mask = shrink(photo, image, mask, settings.size)
    if settings.parts:
        mask = foreground_of_share(image, mask, share, seed_for(*words, photo.name, number, "part"))
    return image, mask


def shrink(photo: Photo, image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`images.shrink_pair`. Raises HarmonyError naming the photo when its mask is empty or full at that size."""
    image, mask = shrink_pair(image, mask, size)
    if mask.all() or not mask.any():
        gone = "background" if mask.all() else "foreground"
        raise HarmonyError(f"photo {photo.name}: at {size} px no {gone} is left; enlarge size or remove the photo")
    return image, mask
