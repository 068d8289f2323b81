"""Photo files for the harmonizer: what a file carries beside its colours survives the way in and out.

A picture is an upright PIL image of mode RGB or RGBA. Its `info` has what `write_picture` puts back: "exif" (of JPEG,
PNG and WebP; less the rotation, which is applied), "icc_profile", "dpi", of a JPEG "qtables" and "subsampling", and of
a PNG "gamma" and "srgb". "turned" is the EXIF orientation that was applied. What is damaged, or what the kind of file
written cannot hold, is left out with a warning. Colours are never converted: the numbers are read as if they were sRGB
and keep the profile they came with.
"""

import math
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import get_sampling
from PIL.PngImagePlugin import PngInfo

from .decoding import (
    KINDS,
    MASK_THRESHOLD,
    MAX_PIXELS,
    TIFF_TAGS,
    mask_levels,
    open_image,
    orientation,
    plain,
    transparent,
)
from .errors import HarmonyError, note
from .files import atomic_path

METADATA = ("exif", "icc_profile", "dpi")
JPEG = ("qtables", "subsampling")
PNG = ("gamma", "srgb")
KEPT = (*JPEG, *PNG, "turned")  # of a PNG, or of what was a picture already
WRITTEN = tuple(suffix for suffix in KINDS if suffix != ".avif")  # lossy, and a picture was never one before
LONGEST = {"WEBP": 16_383, "JPEG": 65_500}  # pixels of a side that the format (the library) can hold
EXIF_BYTES = 65_533  # of a JPEG's one segment


def open_picture(source, name=None, limit: int = MAX_PIXELS) -> Image.Image:
    """The picture in a path or binary file that messages call `name`. Raises HarmonyError as `picture` does."""
    return picture(open_image(source, name, limit), name or source)


def picture(image: Image.Image, name="the image") -> Image.Image:
    """An upright RGB or RGBA picture of any PIL image; 16 bits become 8.

    Raises HarmonyError for CMYK, Lab and HSV, and for animations and other files of more than one picture.
    """
    if image.mode == "CMYK":
        raise HarmonyError(f"{name}: its colours are CMYK; convert it to RGB first")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a preview behind it
        raise HarmonyError(f"{name}: has {image.n_frames} frames; save the one you want as PNG or JPEG")
    upright = plain(image, name)
    found = {key: image.info[key] for key in METADATA if key in image.info}
    if "Raw profile type exif" in image.info:
        found.setdefault("exif", image.info["Raw profile type exif"])
    sound = {key: SOUND[key](value) for key, value in found.items()}
    if lost := [key.replace("icc_profile", "colour profile") for key, value in sound.items() if value is None]:
        note(f"{name}: its {' and '.join(lost)} cannot be used with the picture and is left out")
    info = {key: value for key, value in sound.items() if value is not None}
    info |= {"turned": orientation(image)} | {key: image.info[key] for key in KEPT if key in image.info}
    if image.format in ("JPEG", "MPO") and image.mode == "RGB":
        tables = [image.quantization[table] for *_, table in image.layer]  # of each component
        tables = tables if tables[1] != tables[2] else tables[:2]
        info |= {"qtables": tables, "subsampling": max(0, get_sampling(image))}  # -1: a kind that cannot be written
    upright.info = info
    return upright


def _sound_exif(block) -> bytes | None:
    """An EXIF block with the rotation taken out; None for one without a readable list of entries."""
    try:
        block = bytes.fromhex("".join(block.split("\n")[3:])) if isinstance(block, str) else block
        data = bytearray(block.removeprefix(b"Exif\0\0"))
        order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(data[:4])]
        (start,) = struct.unpack_from(order + "I", data, 4)
        for number in range(struct.unpack_from(order + "H", data, start)[0]):
            at = start + 2 + 12 * number
            if struct.unpack_from(order + "H", data, at)[0] == ExifTags.Base.Orientation:
                struct.pack_into(order + "HHIHH", data, at, ExifTags.Base.Orientation, 3, 1, 1, 0)
        return b"Exif\0\0" + bytes(data)
    except (AttributeError, KeyError, ValueError, struct.error):
        return None


def _sound_profile(data) -> bytes | None:
    """A whole RGB profile; a grey one does not fit the picture."""
    if not isinstance(data, bytes) or data[16:20] != b"RGB " or data[36:40] != b"acsp":
        return None
    size = int.from_bytes(data[:4])
    return data[:size] if len(data) >= size else None  # some programs write it twice


def _sound_dpi(dpi) -> tuple[float, float] | None:
    try:
        return dpi if all(math.isfinite(value) and 0 < value < 65_536 for value in dpi) else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None


SOUND = {"exif": _sound_exif, "icc_profile": _sound_profile, "dpi": _sound_dpi}


def read_region(source, name=None, mask_from: str = "auto", limit: int = MAX_PIXELS) -> np.ndarray:
    """HxW bool of a mask: a path, binary file, PIL image, HxW bool or HxW uint8; True where above 127, upright.

    mask_from as `source` of `decoding.mask_levels`.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise HarmonyError(f"the mask is {source.shape}; give HxW, PIL or a path")
        return source if source.dtype == bool else source > MASK_THRESHOLD
    image = source if isinstance(source, Image.Image) else open_image(source, name, limit)
    return mask_levels(image, name or ("the mask" if image is source else source), mask_from) > MASK_THRESHOLD


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
    if kind == "JPEG" and transparent(image):
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
    options = {key: image.info[key] for key in METADATA if key in image.info}
    lost = [key for key in ("exif", "icc_profile") if kind == "BMP" and options.pop(key, None)]
    if kind == "JPEG":
        image = image.convert("RGB") if image.mode == "RGBA" else image
        lost += ["exif"] if len(options.get("exif", b"")) > EXIF_BYTES and options.pop("exif") else []
        options |= {key: image.info[key] for key in JPEG if key in image.info} or {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    if kind == "PNG":
        options["pnginfo"] = _colour_chunks(image.info)
    elif abs(image.info.get("gamma", 0.45455) - 0.45455) > 0.001 and "srgb" not in image.info:
        lost.append("gamma")
    try:
        if kind == "TIFF" and "exif" in options:
            options["exif"] = _descriptive(options["exif"])
        image.save(target, kind, **options)
    except OSError:
        raise
    except Exception:  # Pillow raises many kinds for entries that a format does not know
        lost += [key for key in METADATA if options.pop(key, None)]
        if not lost:
            raise
        if hasattr(target, "truncate"):
            target.seek(0)
            target.truncate()
        image.save(target, kind, **options)
    if lost:
        note(f"{name}: {' and '.join(lost)} cannot be kept in this file of kind {kind} and is left out")


def _descriptive(block: bytes) -> Image.Exif:
    """EXIF less the entries that would pass for the TIFF's own size and layout."""
    exif = Image.Exif()
    exif.load(block)
    for tag in TIFF_TAGS & exif.keys():
        del exif[tag]
    return exif


def _colour_chunks(info: dict) -> PngInfo:
    chunks = PngInfo()
    if "gamma" in info:
        chunks.add(b"gAMA", struct.pack(">I", round(info["gamma"] * 100_000)))
    if "srgb" in info:
        chunks.add(b"sRGB", bytes([info["srgb"]]))
    return chunks


def save_picture(image: Image.Image, path) -> None:
    """`write_picture` to a file that is complete or not there, of the kind its suffix names."""
    with atomic_path(path) as temporary:
        write_picture(image, temporary, KINDS[Path(path).suffix.lower()], path)
