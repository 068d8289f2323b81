"""Reading, writing and converting images and masks.

Arrays are HxWx3 uint8 RGB and HxW bool (True = foreground). Tensors are 3xHxW in [-1, 1] and 1xHxW in {0, 1}.
What deals with arrays alone does without torch, whose import takes longer than scoring 500 pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

from .decoding import MASK_THRESHOLD, open_image, orientation, to_rgb, turn_along
from .errors import HarmonyError
from .picture_metadata import read_levels, save_picture


def read_image(path) -> np.ndarray:
    """HxWx3 uint8 RGB."""
    return np.asarray(to_rgb(open_image(path), path))


def read_mask(source, mask_from: str = "auto") -> np.ndarray:
    """HxW bool, True where the level is above 127; arguments as `read_levels`."""
    return read_levels(source, mask_from=mask_from) > MASK_THRESHOLD


def read_pair(path, mask_path, mask_from: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """(HxWx3 uint8, HxW bool) of a photo and its mask, which is turned with the photo where it was drawn on its raw
    pixels. Raises HarmonyError where the sizes differ."""
    photo = open_image(path)
    image = np.asarray(to_rgb(photo, path))
    mask = turn_along(read_mask(mask_path, mask_from), image.shape, orientation(photo))
    if image.shape[:2] != mask.shape:
        raise HarmonyError(f"{mask_path}: mask is {mask.shape[::-1]} but its photo is {image.shape[1::-1]}; resize it")
    return image, mask


def write_image(path, array: np.ndarray) -> None:
    """Write HxWx3 uint8 or an HxW bool mask, atomically. JPEG is written at quality 95 without chroma subsampling."""
    save_picture(Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array), path)


def resize_image(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, antialiased resize of HxWx3 uint8 to (height, width)."""
    if array.shape[:2] == tuple(size):
        return array
    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize of an HxW mask, bool or uint8, to (height, width)."""
    small = Image.fromarray(mask.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(small).astype(mask.dtype)


def to_square(array: np.ndarray, size: int, geometry: str) -> np.ndarray:
    """size x size of an image (HxWx3 uint8) or a mask (HxW bool), as a paper's model takes it.

    geometry "squash": whatever the aspect (the latent models, the contrastive paper and the published evaluation);
    "centre-crop": the centred square, which equals resizing the shorter side and cropping the centre (Harmony-VAE's
    training).
    """
    assert geometry in ("squash", "centre-crop"), geometry
    if geometry == "centre-crop":
        side = min(array.shape[:2])
        top, left = ((length - side) // 2 for length in array.shape[:2])
        array = array[top : top + side, left : left + side]
    return (resize_mask if array.dtype == bool else resize_image)(array, (size, size))


def shrink_pair(image: np.ndarray, mask: np.ndarray, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Shrink so that the long side is at most `longest` pixels; never enlarge."""
    sides = image.shape[:2]
    factor = 1.0 if longest is None else min(1.0, longest / max(sides))
    size = tuple(max(1, round(side * factor)) for side in sides)
    return resize_image(image, size), resize_mask(mask, size)


def resize(image: torch.Tensor, size: int | None) -> torch.Tensor:
    """Antialiased bilinear resize to size x size."""
    if size is None or image.shape[-2:] == (size, size):
        return image
    from torch.nn import functional as F

    return F.interpolate(image, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """HxWx3 uint8 -> 3xHxW float32 in [-1, 1]; HxW bool -> 1xHxW float32 in {0, 1}."""
    import torch

    if array.dtype == bool:
        return torch.from_numpy(array.astype(np.float32))[None]
    return torch.from_numpy(np.array(array, copy=True)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    """...x3xHxW in [-1, 1] -> ...xHxWx3 uint8, clamped and rounded to nearest."""
    tensor = tensor.detach().float().add(1.0).mul(127.5).round_().clamp_(0, 255).byte()
    return tensor.movedim(-3, -1).cpu().numpy()


def paste(foreground, background, mask):
    """`foreground` where the mask is set, `background` elsewhere (arrays with an HxW mask, or tensors with Bx1xHxW)."""
    if isinstance(mask, np.ndarray):
        return np.where(mask[..., None], foreground, background)
    return foreground.where(mask > 0.5, background)
