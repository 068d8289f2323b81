"""Photo files for the harmonizer: what a file carries beside its colours survives the way in and out.

A picture is an upright PIL image of mode RGB or RGBA. Its `info` has what `write_picture` puts back: "exif" (of JPEG,
PNG and WebP; less the rotation, which is applied), "icc_profile", "dpi" and, of a JPEG, "qtables" and "subsampling".
Colours are never converted: the numbers are read as if they were sRGB and keep the profile they came with.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import get_sampling

from .errors import HarmonyError
from .files import atomic_path
from .images import IMAGE_SUFFIXES, MASK_THRESHOLD, MAX_PIXELS, open_image, to_rgb

METADATA = ("exif", "icc_profile", "dpi")
JPEG = ("qtables", "subsampling")


def open_picture(source, name=None, limit: int = MAX_PIXELS) -> Image.Image:
    """The picture in a path or binary file that messages call `name`. Raises HarmonyError as `picture` does."""
    return picture(open_image(source, name, limit), name or source)


def picture(image: Image.Image, name="the image") -> Image.Image:
    """An upright RGB or RGBA picture of any PIL image; 16 bits become 8.

    Raises HarmonyError for CMYK, Lab and HSV, and for animations and other files of more than one picture.
    """
    if image.mode in ("CMYK", "LAB", "HSV"):
        raise HarmonyError(f"{name}: its colours are {image.mode}; convert it to RGB first")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a preview behind it
        raise HarmonyError(f"{name}: has {image.n_frames} frames; save the one you want as PNG or JPEG")
    upright = ImageOps.exif_transpose(image)
    info = {key: upright.info[key] for key in METADATA + JPEG if key in upright.info}
    if info.get("icc_profile", b"")[16:20] != b"RGB ":
        info.pop("icc_profile", None)  # a grey profile does not fit RGB
    if image.format in ("JPEG", "MPO") and image.mode == "RGB" and get_sampling(image) >= 0:
        info |= {"qtables": image.quantization, "subsampling": get_sampling(image)}
    upright = upright.convert("RGBA") if upright.has_transparency_data else to_rgb(upright)
    upright.info = info
    return upright


def read_region(source, name=None) -> np.ndarray:
    """HxW bool of a mask: a path, binary file, PIL image, HxW bool or HxW uint8; True where above 127, upright."""
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise HarmonyError(f"the mask is {source.shape}; give HxW, PIL or a path")
        return source if source.dtype == bool else source > MASK_THRESHOLD
    image = source if isinstance(source, Image.Image) else open_image(source, name)
    if getattr(image, "n_frames", 1) > 1:
        raise HarmonyError(f"{name or source}: the mask has {image.n_frames} frames; save one as PNG")
    return np.asarray(to_rgb(image).convert("L")) > MASK_THRESHOLD


def check_output(path, transparent: bool = False, force: bool = False) -> None:
    """Raise HarmonyError when `write_picture` could not or, without `force`, should not write `path`."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise HarmonyError(f"{path}: cannot write this kind of file; use one of {' '.join(IMAGE_SUFFIXES)}")
    if transparent and path.suffix.lower() in (".jpg", ".jpeg"):
        raise HarmonyError(f"{path}: JPEG cannot hold the picture's transparency; write .png")
    if path.is_dir():
        raise HarmonyError(f"{path}: is a folder; name a file in it")
    if path.exists() and not force:
        raise HarmonyError(f"{path}: exists already; choose another name or add --force")


def write_picture(image: Image.Image, target, kind: str) -> None:
    """Save a picture to a path or binary file as `kind` ("PNG", "JPEG", "WEBP", ...), with what its info keeps.

    PNG, lossless WebP, TIFF and BMP hold every value. A JPEG that was one before gets the same quantisation again, so
    that blocks without foreground stay as they are but for rounding; others get quality 95 without chroma subsampling.
    """
    options = {key: image.info[key] for key in METADATA if key in image.info}
    if kind == "JPEG":
        options |= {key: image.info[key] for key in JPEG if key in image.info} or {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    image.save(target, kind, **options)


def save_picture(image: Image.Image, path) -> None:
    """`write_picture` to a file that is complete or not there, of the kind its suffix names."""
    with atomic_path(path) as temporary:
        write_picture(image, temporary, Image.registered_extensions()[Path(path).suffix.lower()])
