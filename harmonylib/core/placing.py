"""Where a cut-out goes: scaled, turned and moved onto a canvas, its transparency kept."""

import math

import cv2
import numpy as np
from PIL import Image

from .decoding import MASK_THRESHOLD, MAX_PIXELS, transparent
from .errors import HarmonyError

LONGEST = 32_000  # pixels of a side that OpenCV turns


def parse_place(text: str) -> tuple[int, int]:
    """(x, y) of "X,Y". Raises HarmonyError for anything else."""
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise HarmonyError(f"--at {text}: must be X,Y, two whole numbers of pixels") from None
    return x, y


def place(
    cutout: Image.Image, size, at=None, scale: float = 1.0, angle: float = 0.0, name="the cut-out"
) -> Image.Image:
    """An RGBA layer of `size` (width, height) with the RGBA picture `cutout` in it; its colours are not premultiplied.

    at: pixel (x, y) of its upper left corner once scaled, None centres it; angle: degrees counter-clockwise, about its
    centre. Without scale and angle every visible value is kept. Raises HarmonyError for a cut-out without transparency,
    numbers out of range, and where nothing of it would be seen.
    """
    if not transparent(cutout):
        raise HarmonyError(f"{name}: has no transparency; give a cut-out, a PNG whose background is transparent")
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(angle)):
        raise HarmonyError(f"scale {scale:g}, angle {angle:g}: use a scale above 0 and degrees")
    width, height = (max(1, round(side * scale)) for side in cutout.size)
    if width * height >= MAX_PIXELS or max(width, height, *size) > LONGEST:
        raise HarmonyError(f"scale {scale:g}: the cut-out would be {width}x{height} on {size[0]}x{size[1]}; use less")
    left, top = at or ((full - side) // 2 for full, side in zip(size, (width, height), strict=True))
    bands = np.asarray(cutout).astype(np.float32)
    bands[..., :3] *= bands[..., 3:]  # premultiplied: what is transparent has no colour to mix in
    if scale != 1:
        bands = cv2.resize(bands, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1) + [[0, 0, left], [0, 0, top]]
    layer = cv2.warpAffine(bands, turn, size)
    layer[..., :3] /= np.maximum(layer[..., 3:], 1e-3)
    layer = Image.fromarray(np.rint(layer).clip(0, 255).astype(np.uint8))
    if layer.getchannel("A").getextrema()[1] <= MASK_THRESHOLD:
        raise HarmonyError(f"{name}: nothing of it lies in the picture at {left},{top}; choose another place")
    return layer
