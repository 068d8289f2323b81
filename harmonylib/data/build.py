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
from .iharmony4_statistics import GENUINE, draw
from .layout import SPLITS, SUBSETS, plain_name, write_composite, write_list, write_pair
from .recipes import EDITS, RecipeSettings, jitter, make_composite, restyle

CHOICE = 16  # photos among which the one is taken whose masks fit a drawn share of the picture best
SHARES = (0.005, 0.9)  # bounds on the drawn ones


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


def make_benchmark(root, photos: list[Photo], settings: BenchmarkSettings, recipes: RecipeSettings, seed: int,
                   subsets=SUBSETS, workers: int | None = None, shares=None) -> pd.DataFrame:  # fmt: skip
    """Write `<subset>/{composite_images,masks,real_images}/` and the two lists under root, replacing what is there.

    Train and test are made of different photos (Photo.split). Foregrounds cover as much of their pictures, and are
    changed as strongly, as the genuine ones of their subset (`iharmony4_statistics`), as far as the photos allow. The
    set is built beside `root` and renamed when complete, by `workers` processes (None: one a core) whose number changes
    no byte.
    shares: `mask_shares` of each photo, where they are known. Returns one row per composite: subset, split, name,
    photo, and what `make_composite` says. Raises HarmonyError when a split has fewer than two photos (a recipe needs a
    second one for reference).
    """
    root = Path(root)
    building = root.with_name(f".{root.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    shares = shares or list(parallel_map(mask_shares, photos, "looking at masks", "photo", workers))
    jobs = _plan(root, photos, shares, settings, seed, subsets)
    make = partial(_make_pair, building, photos, settings, recipes, seed)
    made = parallel_map(make, jobs, "making composites", "pair", workers)
    rows = pd.DataFrame([row for pair in made for row in pair]).drop(columns="recipe")  # that is the subset
    lines = rows.pop("line")
    for split in SPLITS:
        write_list(building, split, lines[rows["split"] == split])
    shutil.rmtree(root, ignore_errors=True)
    building.rename(root)
    return rows


def mask_shares(photo: Photo) -> list[float]:
    """How much of the picture each of a photo's masks covers."""
    return [float(mask.mean()) for mask in photo.masks.values()]


def _plan(root, photos, shares, settings, seed, subsets) -> list[tuple]:
    """(subset, split, index of the photo, how many pairs of this kind it gave before, share that its mask is to cover)
    of each pair."""
    jobs = []
    for split, pairs in zip(SPLITS, (settings.train_pairs, settings.test_pairs), strict=True):
        chosen = [index for index, photo in enumerate(photos) if photo.split == split]
        if pairs and len(chosen) < 2:
            raise HarmonyError(f"{root}: the {split} split has {len(chosen)} photos; give at least two with masks")
        for subset in subsets:
            draws, queue = rng(seed, subset, split, "plan"), []
            for number in range(pairs):
                share = 0.5 * draws.random() if subset not in GENUINE else draw(GENUINE[subset].share, draws)
                share = float(np.clip(share, *SHARES))
                queue = queue or draws.permutation(chosen).tolist()  # every photo once, then all of them again
                misfit = [min(abs(np.log(share / own)) for own in shares[photo]) for photo in queue[:CHOICE]]
                jobs.append((subset, split, queue.pop(int(np.argmin(misfit))), number // len(chosen), share))
    if not jobs:
        raise HarmonyError(f"{root}: nothing to make; set train_pairs or test_pairs above 0 and name a subset")
    return jobs


def _make_pair(root, photos, settings: BenchmarkSettings, recipes: RecipeSettings, seed: int, job: tuple) -> list[dict]:
    """Write one pair and its composites; one row per composite."""
    subset, split, index, number, share = job
    photo, others = photos[index], [p for i, p in enumerate(photos) if p.split == split and i != index]
    real, mask = draw_pair(photo, number, share, settings, (seed, subset, split))
    label = plain_name(photo.name)
    name = f"{label}-{number:03d}"
    restyling = rng(seed, subset, name, "restyle")
    if split == "train" and restyling.random() < settings.restyle_share:
        real = restyle(real, restyling)
    if settings.jitter:
        mask = jitter(mask, rng(seed, subset, name, "jitter"), settings.jitter)
    pair, rows = write_pair(root, subset, name, 1, real, mask), []

    def reference(words: tuple, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        other = others[int(rng(*words, "reference", attempt).integers(len(others)))]
        return shrink(other, other.image, np.any(list(other.masks.values()), axis=0), settings.size)

    for variant in range(1, 1 + (settings.train_variants if split == "train" else settings.test_variants)):
        words = (seed, subset, name, variant)
        colours = None if subset in EDITS else partial(reference, words)
        composite, info = make_composite(subset, real, mask, words, colours, recipes)
        row = {"subset": subset, "split": split, "name": f"{pair}_{variant}", "photo": label}
        rows.append(row | info | {"line": write_composite(root, subset, pair, variant, composite)})
    return rows


def draw_pair(photo: Photo, number: int, share: float, settings: BenchmarkSettings, words: tuple):
    """One (real, mask) pair of a photo: a random window of it, and a foreground that covers about `share` of that.

    Returns HxWx3 uint8 and HxW bool with a long side of at most settings.size; the words and number decide all draws.
    """
    random = rng(*words, photo.name, number)
    image, mask = photo.image, min(photo.masks.values(), key=lambda mask: abs(np.log(share / mask.mean())))
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
