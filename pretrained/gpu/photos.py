"""A folder of photos in memory, as `recipes.Composites` takes it: squares of them, their masks and pieces of these."""

from functools import partial

import numpy as np
import torch

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import to_square
from harmonylib.core.parallel import parallel_map
from harmonylib.data.build import BenchmarkSettings, _plan, draw_pair, mask_shares, shrink
from harmonylib.data.layout import SUBSETS
from harmonylib.data.sources import folder_photos


def read_photos(folder, index=None, size: int = 256, pieces: int = 4000, seed: int = 0) -> tuple:
    """The photos of the train split (`sources.folder_photos`), each with its whole mask, and for each subset `pieces`
    masks that cover what genuine ones do (`build.draw_pair`), as tensors (images, masks, photo, kind).

    images Nx3xSxS uint8, S = size, a multiple of 4; masks Mx(S*S/8) uint8, eight pixels a byte; photo (M): the image
    that a mask is of; kind (M): 0 where it is whole, else 1 + the number in `layout.SUBSETS` of the subset.
    A photo that cannot be used is left out. Raises HarmonyError where fewer than two are left, and as `folder_photos`.
    """
    files = [file for file in folder_photos(folder, seed, index) if file.split == "train"]
    read = list(parallel_map(partial(_whole, size), files, "reading photos", "photo"))
    files = [file for file, found in zip(files, read, strict=True) if found]
    if len(files) < 2:
        raise HarmonyError(f"{folder}: {len(files)} photos of the train split can be used; give at least two")
    images, masks, shares = zip(*filter(None, read), strict=True)
    settings = BenchmarkSettings(pieces, 0, size=size, min_crop=1.0)
    jobs = _plan(folder, files, shares, settings, seed, SUBSETS)
    cut = parallel_map(
        partial(_piece, settings, seed), [(files[job[2]], *job) for job in jobs], "drawing masks", "mask"
    )
    photo = [*range(len(files)), *(job[2] for job in jobs)]
    kind = [0] * len(files) + [1 + SUBSETS.index(job[0]) for job in jobs]
    return tuple(torch.from_numpy(np.array(part)) for part in (images, [*masks, *cut], photo, kind))


def _whole(size: int, photo) -> tuple | None:
    """(3xSxS uint8, packed mask, shares of its masks) of a photo; None where there is nothing to use."""
    try:
        image, mask = shrink(photo, photo.image, photo.masks["foreground"], size)
    except HarmonyError:
        return None
    return to_square(image, size, "squash").transpose(2, 0, 1), _packed(mask, size), mask_shares(photo)


def _piece(settings: BenchmarkSettings, seed: int, job: tuple) -> np.ndarray:
    photo, subset, split, _, number, share = job
    return _packed(draw_pair(photo, number, share, settings, (seed, subset, split))[1], settings.size)


def _packed(mask: np.ndarray, size: int) -> np.ndarray:
    return np.packbits(to_square(mask, size, "squash"))
