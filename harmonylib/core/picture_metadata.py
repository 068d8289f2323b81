"""Photo files for the harmonizer: what a file carries beside its colours survives the way in and out.

A picture is an upright PIL image of mode RGB or RGBA. Its `info` has what `write_picture` puts back: "exif" (of JPEG,
PNG and WebP; less the rotation, which is applied), "icc_profile", "dpi", and of a JPEG "qtables" and "subsampling".
"turned" is the EXIF orientation that was applied. What is damaged, or what the kind of file written cannot hold, is
left out with a warning. Colours are never converted: the numbers are read as if they were sRGB and keep the profile
they came with.
"""

import contextlib
import io
import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import get_sampling

from . import decoding
from .decoding import KINDS, MASK_THRESHOLD, MAX_PIXELS
from .errors import HarmonyError, note
from .files import atomic_path

METADATA = ("exif", "icc_profile", "dpi")
NOT_HELD = {"BMP": ("exif", "icc_profile"), "TIFF": ("exif",)}  # there EXIF would pass for the file's own layout
JPEG = ("qtables", "subsampling")
WRITTEN = tuple(suffix for suffix in KINDS if suffix != ".avif")  # lossy, and a picture was never one before
LONGEST = {"WEBP": 16_383, "JPEG": 65_500}  # pixels of a side that the format (the library) can hold


def open_picture(source, name=None, limit: int = MAX_PIXELS) -> Image.Image:
    """The picture in a path or binary file that messages call `name`. Raises HarmonyError as `picture` does."""
    return picture(decoding.open_image(source, name, limit), name or source)


def picture(image: Image.Image, name="the image") -> Image.Image:
    """An upright RGB or RGBA picture of any PIL image; 16 bits become 8.

    Raises HarmonyError for CMYK, Lab and HSV, and for animations and other files of more than one picture.
    """
    if image.mode == "CMYK":
        raise HarmonyError(f"{name}: its colours are CMYK; convert it to RGB first")
    decoding.one_frame(image, name)
    upright = decoding.plain(image, name)
    turned, lost = decoding.orientation(image), []
    upright.info = {key: image.info[key] for key in METADATA if key in image.info} | {"turned": turned}
    block = image.info.get("exif", image.info.get("Raw profile type exif"))  # or a text, as old programs write PNGs
    if isinstance(block, str) or (block and turned > 1):  # else it is kept byte for byte
        try:
            exif = Image.Exif()
            exif.load(bytes.fromhex("".join(block.split("\n")[3:])) if isinstance(block, str) else block)
            exif[ExifTags.Base.Orientation] = 1
            upright.info["exif"] = exif.tobytes()
        except Exception:  # Pillow raises many kinds
            upright.info.pop("exif", None)
            lost.append("exif")
    if "icc_profile" in upright.info and not _describes_rgb(upright.info["icc_profile"]):
        del upright.info["icc_profile"]
        lost.append("colour profile")
    if lost:
        note(f"{name}: its {' and '.join(lost)} cannot be used with the picture and is left out")
    upright.info |= {key: image.info[key] for key in (*JPEG, "turned") if key in image.info}  # a picture already
    if image.format in ("JPEG", "MPO") and image.mode == "RGB":
        tables = [image.quantization[table] for *_, table in image.layer]  # of each component
        upright.info["qtables"] = tables if tables[1] != tables[2] else tables[:2]
        upright.info["subsampling"] = max(0, get_sampling(image))  # -1: a kind that cannot be written
    return upright


def _describes_rgb(profile: bytes) -> bool:
    """Whether a colour profile is whole and not of greys."""
    with contextlib.suppress(OSError):
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip() == "RGB"
    return False


def read_levels(source, name=None, mask_from: str = "auto", limit: int = MAX_PIXELS) -> np.ndarray:
    """HxW uint8 of a mask, upright: a path, binary file, PIL image, HxW bool or HxW of levels 0 to 255.

    mask_from as `source` of `decoding.mask_levels`. A JPEG is black and white: its levels between are noise.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise HarmonyError(f"the mask is {source.shape}; give HxW, PIL or a path")
        return source * np.uint8(255) if source.dtype == bool else source.clip(0, 255).astype(np.uint8)
    image = source if isinstance(source, Image.Image) else decoding.open_image(source, name, limit)
    levels = decoding.mask_levels(image, name or ("the mask" if image is source else source), mask_from)
    return (levels > MASK_THRESHOLD) * np.uint8(255) if image.format in ("JPEG", "MPO") else levels


def check_output(path, force: bool = False) -> None:
    """Raise HarmonyError when `save_picture` could not or, without `force`, should not write `path`."""
    path = Path(path)
    if path.suffix.lower() not in WRITTEN:
        raise HarmonyError(f"{path}: cannot write this kind of file; use one of {' '.join(WRITTEN)}")
    if path.is_dir():
        raise HarmonyError(f"{path}: is a folder; name a file in it")
    if path.exists() and not force:
        raise HarmonyError(f"{path}: exists already; choose another name or add --force")


def check_kind(image: Image.Image, kind: str, name) -> None:
    """Raise HarmonyError when a file `name` of this kind cannot hold the picture."""
    if kind == "JPEG" and decoding.transparent(image):
        raise HarmonyError(f"{name}: JPEG cannot hold the picture's transparency; write .png")
    limit = LONGEST.get(kind, math.inf)
    if max(image.size) > limit:
        raise HarmonyError(f"{name}: {max(image.size)} pixels, {kind} holds {limit} a side at most; write .png")


def write_picture(image: Image.Image, target, kind: str, name="the picture") -> None:
    """Save a picture to a path or binary file as `kind` ("PNG", "JPEG", "WEBP", ...), with what its info keeps.

    PNG, lossless WebP, TIFF and BMP hold every value. A JPEG that was one before gets the same quantisation again, so
    that blocks without foreground stay as they are but for rounding; others get quality 95 without chroma subsampling.
    Messages call the file `name`. Raises HarmonyError as `check_kind`.
    """
    check_kind(image, kind, name)
    info = image.info
    options = {key: info[key] for key in METADATA if key in info}
    lost = [key for key in NOT_HELD.get(kind, ()) if options.pop(key, None)]
    if kind == "JPEG":
        image = image.convert("RGB")
        options |= {key: info[key] for key in JPEG if key in info} or {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    elif kind == "PNG":
        options["compress_level"] = 4  # of Pillow's 6 takes 2.4 times as long for 1 % less
    for dropped in ((), ("dpi",), ("exif",), METADATA):  # Pillow raises many kinds for what a format does not know
        lost += [key for key in dropped if options.pop(key, None)]
        if hasattr(target, "truncate"):
            target.truncate(target.seek(0))
        try:
            image.save(target, kind, **options)
            break
        except OSError:
            raise
        except Exception:
            if dropped == METADATA:
                raise
    if lost:
        note(f"{name}: {' and '.join(lost)} cannot be kept in this file of kind {kind} and is left out")


def save_picture(image: Image.Image, path) -> None:
    """`write_picture` to a file that is complete or not there, of the kind its suffix names."""
    with atomic_path(path) as temporary:
        write_picture(image, temporary, KINDS[Path(path).suffix.lower()], path)
