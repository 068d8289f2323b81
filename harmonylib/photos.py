"""The embedded photos: colour photographs that our own dependencies carry inside their packages, with our own masks.

The masks in `embedded_masks.json` were drawn by hand as polygons and, where it helped, refined once with GrabCut. The
right view of the motorcycle pair has the left one's polygons moved by the pair's disparity. Lattice towers, wheels and
galleries are outlined, not cut out bar by bar. Nothing is downloaded. Eight scenes make a demonstration, not a
benchmark.
"""

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes
from skimage.color import rgb2lab
from skimage.segmentation import slic

from .errors import HarmonyError
from .images import read_image
from .seeds import rng as seeded

SPLITS = ("train", "test")
SUPERPIXELS = 200
COLOUR_SCALE = 15.0  # Lab distance at which a neighbouring superpixel becomes an unlikely companion
CROP_FOREGROUND = (0.02, 0.8)
CROP_TRIES = 30
_CATALOGUE = Path(__file__).with_name("embedded_masks.json")


@dataclass(frozen=True)
class Photo:
    """One photo: `image` HxWx3 uint8 RGB, `masks` object name -> HxW bool (True = foreground; objects may overlap)."""

    name: str
    split: str
    portrait: bool
    credit: str
    licence: str
    image: np.ndarray
    masks: dict[str, np.ndarray]


def load_photos(split: str | None = None) -> list[Photo]:
    """All photos, or those of one split, in the order of the catalogue.

    Both views of the motorcycle belong to one scene and to one split. Raises HarmonyError on an unknown split, or
    naming the package whose photo is missing.
    """
    if split is not None and split not in SPLITS:
        raise HarmonyError(f"photos: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    entries = json.loads(_CATALOGUE.read_text(encoding="utf-8"))
    return [_load(entry) for entry in entries if split in (None, entry["split"])]


def _load(entry: dict) -> Photo:
    image = read_image(_locate(entry["package"], entry["file"]))
    return Photo(
        name=entry["name"],
        split=entry["split"],
        portrait=entry["portrait"],
        credit=entry["credit"],
        licence=entry["licence"],
        image=image,
        masks={name: rasterise(rings, image.shape[:2]) for name, rings in entry["objects"].items()},
    )


def _locate(package: str, file: str) -> Path:
    """The path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(file.split("/")[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).parent / file
        if path.is_file():
            return path
    raise HarmonyError(
        f"{package}: its photo {file} is missing; reinstall it (pip install --force-reinstall {package})"
    )


def rasterise(rings: list, size: tuple[int, int]) -> np.ndarray:
    """HxW bool from rings of [x, y] in [0, 1]; size is (height, width). A ring inside another cuts a hole."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    for ring in rings:
        layer = Image.new("L", (width, height))
        points = [(round(x * width - 0.5), round(y * height - 0.5)) for x, y in ring]
        ImageDraw.Draw(layer).polygon(points, fill=1, outline=1)
        mask ^= np.asarray(layer, dtype=bool)
    return mask


def region_masks(
    image: np.ndarray, seed: int, count: int, min_fraction: float = 0.02, max_fraction: float = 0.5
) -> list[np.ndarray]:
    """`count` connected HxW bool regions of an HxWx3 uint8 image, each covering a fraction within the bounds.

    SLIC superpixels (Achanta et al. 2012): a random one is merged with random neighbours, similar colours first, until
    a random area is reached; holes are filled. Depends on the image and the seed only, mask i not on `count`; give each
    photo a seed of its own (seeds.seed_for), or their regions start at like places. Raises HarmonyError when the bounds
    cannot be met.
    """
    if not 0 < min_fraction < max_fraction <= 1:
        raise HarmonyError(f"region_masks: need 0 < min_fraction {min_fraction} < max_fraction {max_fraction} <= 1")
    labels = slic(image, n_segments=SUPERPIXELS, compactness=10, start_label=0)
    labels = np.unique(labels, return_inverse=True)[1].reshape(image.shape[:2])
    areas = np.bincount(labels.ravel())
    colours = np.stack([np.bincount(labels.ravel(), channel.ravel()) for channel in np.moveaxis(rgb2lab(image), 2, 0)])
    graph = _Superpixels(labels, areas / labels.size, (colours / areas).T, _adjacency(labels))
    return [graph.region(seeded(seed, "region", index), min_fraction, max_fraction) for index in range(count)]


def _adjacency(labels: np.ndarray) -> list[set[int]]:
    neighbours = [set() for _ in range(labels.max() + 1)]
    for first, second in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        edge = first != second
        for a, b in np.unique(np.stack([first[edge], second[edge]], 1), axis=0).tolist():
            neighbours[a].add(b)
            neighbours[b].add(a)
    return neighbours


@dataclass(frozen=True)
class _Superpixels:
    labels: np.ndarray  # HxW
    fractions: np.ndarray  # N
    colours: np.ndarray  # Nx3 Lab
    neighbours: list[set[int]]

    def region(self, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
        for _ in range(50):
            mask = self._grow(rng, rng.uniform(low, high), high)
            if low <= mask.mean() <= high:
                return mask
        raise HarmonyError(f"region_masks: no region covers {low} to {high} of the image; widen the bounds")

    def _grow(self, rng: np.random.Generator, target: float, high: float) -> np.ndarray:
        chosen = {int(rng.integers(len(self.fractions)))}
        area = self.fractions[list(chosen)].sum()
        while area < target:
            frontier = set().union(*(self.neighbours[i] for i in chosen)) - chosen
            frontier = [i for i in sorted(frontier) if area + self.fractions[i] <= high]
            if not frontier:
                break
            members = sorted(chosen)
            mean = np.average(self.colours[members], axis=0, weights=self.fractions[members])
            distance = np.linalg.norm(self.colours[frontier] - mean, axis=1) / COLOUR_SCALE
            weight = np.exp(distance.min() - distance)
            pick = frontier[rng.choice(len(frontier), p=weight / weight.sum())]
            chosen.add(pick)
            area += self.fractions[pick]
        return binary_fill_holes(np.isin(self.labels, list(chosen)))


def random_crop(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, min_scale: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of HxWx3 `image` and HxW bool `mask` whose foreground covers 2 to 80 % of it.

    The aspect (width / height) is drawn between 3/4 and 4/3, the sides between `min_scale` and 1 of the largest window
    of that aspect. When no try succeeds, the whole photo is returned. Raises HarmonyError on unequal sizes or a
    `min_scale` outside (0, 1].
    """
    height, width = mask.shape
    if image.shape[:2] != mask.shape:
        raise HarmonyError(f"random_crop: image is {image.shape[:2]}, mask {mask.shape}; they must have one size")
    if not 0 < min_scale <= 1:
        raise HarmonyError(f"random_crop: min_scale is {min_scale}; use a value in (0, 1]")
    for _ in range(CROP_TRIES):
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        scale = rng.uniform(min_scale, 1)
        full = min(width, height * aspect)
        w, h = max(1, round(scale * full)), max(1, min(height, round(scale * full / aspect)))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        window = (slice(y, y + h), slice(x, x + w))
        if CROP_FOREGROUND[0] <= mask[window].mean() <= CROP_FOREGROUND[1]:
            return image[window], mask[window]
    return image, mask
