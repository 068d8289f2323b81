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
from scipy.ndimage import label as connected
from skimage.measure import regionprops
from skimage.segmentation import slic

from ..core.errors import HarmonyError
from ..core.images import read_image, resize_mask, shrink_pair
from ..core.seeds import rng as seeded

SUPERPIXELS = 200  # at most, so that the smallest are objects and not texture
SUPERPIXEL_SIDE = 128  # pixels at which they are made
LIKE_COLOUR = 40.0  # levels of a channel that count as much as a quarter of the side
FITS = 1.25  # factor within which a mask's share of the picture is near enough to the wanted one
CROP_FOREGROUND = (0.02, 0.8)
CROP_TRIES = 30
CATALOGUE = Path(__file__).with_name("embedded_masks.json")


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
    """All photos, or those of one split ("train" or "test"), in the order of the catalogue.

    Both views of the motorcycle belong to one scene and to one split. Raises HarmonyError naming the package whose
    photo is missing.
    """
    assert split in (None, "train", "test"), split
    entries = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return [_load(**entry) for entry in entries if split in (None, entry["split"])]


def _load(package: str, file: str, objects: dict[str, list], **about) -> Photo:
    spec = importlib.util.find_spec(file.split("/")[0])  # without importing the package
    paths = [Path(folder).parent / file for folder in (spec and spec.submodule_search_locations) or []]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        mend = f"reinstall it (pip install --force-reinstall {package})"
        raise HarmonyError(f"{package}: its photo {file} is missing; {mend}")
    image = read_image(path)
    return Photo(**about, image=image, masks={n: rasterise(rings, image.shape[:2]) for n, rings in objects.items()})


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


def foreground_of_share(image: np.ndarray, mask: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The HxW bool mask where it covers about `share` of the picture, else a part of it or a piece of the picture.

    Within a factor of FITS the mask stays whole. Where it is too large, neighbouring superpixels of like colours (SLIC,
    Achanta et al. 2012), together of about the wanted size, are cut out of it; where too small, out of the picture.
    Depends on the arguments only.
    """
    own = mask.mean()
    small, inside = shrink_pair(image, mask, SUPERPIXEL_SIDE)
    if share / FITS <= own <= share * FITS or not inside.any():
        return mask
    labels = slic(small, n_segments=int(np.clip(3 / share, 24, SUPERPIXELS)), compactness=10, start_label=1)
    labels = labels * inside if own > share else labels
    pieces = [(piece.label, piece.area, *piece.centroid, *piece.intensity_mean) for piece in regionprops(labels, small)]
    names, areas, *features = np.array(pieces).T
    first = int(seeded(seed, "part").choice(len(names), p=areas / areas.sum()))
    parts = []
    for like in (LIKE_COLOUR, 4 * LIKE_COLOUR, np.inf):  # what is cut off, being apart, is less the less colour counts
        place = np.stack(features, axis=1) / ([SUPERPIXEL_SIDE / 4] * 2 + [like] * 3)
        nearest = np.argsort(((place - place[first]) ** 2).sum(1), kind="stable")
        count = 1 + int(np.abs(np.log(np.cumsum(areas[nearest]) / labels.size / share)).argmin())
        joined = connected(np.isin(labels, names[nearest[:count]]))[0]
        parts.append(binary_fill_holes(joined == 1 + np.bincount(joined.ravel())[1:].argmax()))  # the largest piece
    part = resize_mask(min(parts, key=lambda found: abs(np.log(found.mean() / share))), mask.shape)
    if part.any() and not part.all():
        return part
    if not mask.all():
        return mask
    rows, columns = (np.abs(np.linspace(-1, 1, side)) <= share**0.5 for side in mask.shape)
    return rows[:, None] & columns  # a picture of one colour has one superpixel: a box in the middle


def random_crop(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, min_scale: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of HxWx3 `image` and HxW bool `mask` whose foreground covers 2 to 80 % of it.

    The aspect (width / height) is drawn between 3/4 and 4/3, the sides between `min_scale`, in (0, 1], and 1 of the
    largest window of that aspect. When no try succeeds, the whole photo is returned.
    """
    height, width = mask.shape
    assert image.shape[:2] == mask.shape and 0 < min_scale <= 1
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
