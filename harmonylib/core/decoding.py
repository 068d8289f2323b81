"""What the pixels of a file mean: any picture as 8-bit colours, any mask as levels of which those above 127 are it.

Metadata never costs a picture: what Pillow stumbles over is left out with a warning (`errors.note`).
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import HarmonyError, note

MASK_THRESHOLD = 127
MAX_PIXELS = 100_000_000
KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".png": "PNG", ".webp": "WEBP"}
KINDS |= {".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF"}
IMAGE_SUFFIXES = tuple(KINDS)
UNLISTED = (".txt", ".csv", ".json", ".md", ".db", ".ini", "")  # suffixes of files beside pictures that nobody misses
MASK_SOURCES = ("auto", "alpha", "luminance")
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
)), strict=True))  # fmt: skip
TIFF_TAGS = {*range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 317, *range(320, 326), 338, 339, 347}
TIFF_TAGS |= {*range(529, 533)}  # those that say what the pixels are
BLACK, WHITE = 16, 239  # levels up to and from which a mask's colours count as drawn in black and white
LABELS = 40  # values up to which, beside 255 alone, a grey mask is a list of labels with a void border


def pictures_in(folder) -> tuple[list[Path], list[HarmonyError]]:
    """The pictures of a folder, sorted, and an error that names each other file but hidden ones and lists."""
    paths = [p for p in sorted(Path(folder).iterdir()) if p.name[0] != "." and p.is_file()]
    paths = [p for p in paths if p.suffix.lower() not in UNLISTED]
    odd = [p for p in paths if p.suffix.lower() not in IMAGE_SUFFIXES]
    errors = [HarmonyError(f"{p}: {p.suffix} is no type that is read; convert or remove it") for p in odd]
    return [p for p in paths if p not in odd], errors


def open_image(source, name=None, limit: int = MAX_PIXELS) -> Image.Image:
    """Decode an image, a path or a binary file that messages call `name`, completely.

    `info["deep"]`: whether Pillow cut more than 8 bits a channel down to 8. Raises HarmonyError in one line when the
    image is missing, broken or of `limit` pixels or more.
    """
    name = name or source
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of metadata, and of large pictures: our limit is stricter
            return _decoded(source, name, limit)
    except FileNotFoundError:
        raise HarmonyError(f"{name}: no such file") from None
    except HarmonyError:
        raise
    except Image.DecompressionBombError:
        raise HarmonyError(f"{name}: is over {limit // 10**6} megapixels; make it smaller") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        why = "of no kind that is known" if isinstance(error, UnidentifiedImageError) else error
        raise HarmonyError(f"{name}: not a readable image ({why}); replace the file") from None


def _decoded(source, name, limit: int) -> Image.Image:
    try:
        return _loaded(Image.open(source), name, limit)
    except (FileNotFoundError, IsADirectoryError, HarmonyError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:
        if hasattr(source, "read"):
            source.seek(0)
        data = source.read() if hasattr(source, "read") else Path(source).read_bytes()
        image = _loaded(Image.open(io.BytesIO(_bare(data))), name, limit)
        note(f"{name}: its texts or other details cannot be read ({error}); they are left out")
        return image


def _loaded(image: Image.Image, name, limit: int) -> Image.Image:
    if image.width * image.height >= limit:
        size = f"{image.width}x{image.height}"
        raise HarmonyError(f"{name}: {size} is {limit // 10**6} megapixels or more; make it smaller")
    deep = ";16" in str(image.tile)
    image.load()
    image.info["deep"] = deep
    return image


def _bare(data: bytes) -> bytes:
    """A PNG, TIFF or JPEG with little but what says what its pixels are, since Pillow may fail for the rest."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[:8] + b"".join(_png_chunks(data))
    if data[:2] == b"\xff\xd8":
        return data[:2] + b"".join(_jpeg_segments(data))
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return data
    (start,) = struct.unpack_from(order + "I", data, 4)
    end = start + 2 + 12 * struct.unpack_from(order + "H", data, start)[0]
    entries = [data[at : at + 12] for at in range(start + 2, end, 12)]
    kept = ((struct.unpack_from(order + "HHI", entry), entry) for entry in entries)
    entries = [entry for (tag, *form), entry in kept if tag in TIFF_TAGS and (tag != 274 or form == [3, 1])]
    table = struct.pack(order + "H", len(entries)) + b"".join(entries) + data[end : end + 4]
    return data[:4] + struct.pack(order + "I", len(data)) + data[8:] + table


def _png_chunks(data: bytes):
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name, whole = data[at + 4 : at + 8], data[end - 4 : end] == zlib.crc32(data[at + 4 : end - 4]).to_bytes(4)
        if name[:1].isupper() or (whole and name in (b"tRNS", b"eXIf")):
            yield data[at:end]
        at = end


def _jpeg_segments(data: bytes):
    at = 2
    while 0xE0 <= data[at + 1] <= 0xEF:  # that is, before the picture's tables
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        name = data[at + 4 : at + 8]
        if name == b"Exif" or (name in (b"JFIF", b"Adob") and end - at >= 16):
            yield data[at:end]
        at = end
    yield data[at:]


def orientation(image: Image.Image) -> int:
    """How EXIF (or XMP) says that the stored pixels are to be turned, 2 to 8; 1: not at all, or it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            value = image.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in TURNS else 1
    except Exception:  # Pillow raises many kinds on damaged EXIF
        return 1


def plain(image: Image.Image, name="the image") -> Image.Image:
    """An upright 8-bit RGB picture of any PIL image, RGBA where that has transparency; its `info` is empty.

    16 bits are divided by 257, float values from 0 to 1 multiplied by 255. Raises HarmonyError for Lab, HSV and deep
    values of another meaning.
    """
    if image.mode in ("LAB", "HSV"):
        raise HarmonyError(f"{name}: its colours are {image.mode}; convert it to RGB first")
    clear = image.info.get("transparency")
    if _deep(image):
        result = Image.fromarray(_scaled(image, name)).convert("RGB")
        if isinstance(clear, int):
            result.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    else:
        if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, of which Pillow keeps the upper eight
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        result = image.convert("RGBA" if image.has_transparency_data else "RGB")
    turn = orientation(image)
    result = result.transpose(TURNS[turn]) if turn in TURNS else result
    result.info = {}
    return result


def transparent(image: Image.Image) -> bool:
    """Whether any pixel may be seen through."""
    if "A" in image.getbands():
        return image.getchannel("A").getextrema()[0] < 255
    return "transparency" in image.info


def to_rgb(image: Image.Image, name="the image") -> Image.Image:
    """`plain` with transparency laid on white: an upright 8-bit RGB copy."""
    image = plain(image, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _values(image: Image.Image, name) -> tuple[np.ndarray, float]:
    """HxW float32 values of a deep image, white the largest, and the largest there is."""
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:
        values = 65535 - values  # white is zero: Pillow turns fewer bits over by itself
    low, top = float(values.min(initial=0)), float(values.max(initial=0))
    if not (np.isfinite(low + top) and low > -0.01 * max(top, 1)):  # resampled float pictures overshoot a little
        raise HarmonyError(f"{name}: its values run from {low:g} to {top:g}; save it with 8 or 16 bits")
    return values, top


def _scaled(image: Image.Image, name) -> np.ndarray:
    """HxW uint8 of a deep picture."""
    values, top = _values(image, name)
    if top > 65535 or (image.mode == "F" and 1.01 < top < 16):
        raise HarmonyError(f"{name}: its values reach {top:g}; save it with 8 or 16 bits, or as float from 0 to 1")
    if image.mode == "F" and top <= 1.01:
        values *= 255
    elif image.mode.startswith("I;16") or top > 255:
        values /= 257
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def mask_levels(image: Image.Image, name="the mask", source: str = "auto") -> np.ndarray:
    """HxW uint8 of a mask, upright; above MASK_THRESHOLD is foreground. Never dithered, as PIL's mode "1" would be.

    Alpha that varies is the mask (a cut-out's subject is opaque), else white is. source: "alpha" or "luminance" says
    so. Values of 0 and 1 are black and white, as are 0 and the largest of 16 and 32 bits. Raises HarmonyError where
    colours and alpha are masks of different regions, for labels (colours of a palette, a void border) and for several
    frames.
    """
    if source not in MASK_SOURCES:
        raise HarmonyError(f"--mask-from {source!r} is unknown; use {', '.join(MASK_SOURCES)}")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise HarmonyError(f"{name}: the mask has {image.n_frames} frames; save one as PNG")
    if _deep(image) and source != "alpha":
        values, top = _values(image, name)
        full = next((full for full in (1.01, 255, 65535) if top <= full), top)
        levels = Image.fromarray(np.clip(values * (255 / int(full)) + 0.5, 0, 255).astype(np.uint8))
        turn = orientation(image)
        return np.asarray(levels.transpose(TURNS[turn]) if turn in TURNS else levels)
    layers = plain(image, name)
    colours = layers.convert("RGB")
    grey = np.asarray(colours.convert("L"))
    if layers.mode == "RGBA" and source != "luminance":
        alpha = np.asarray(layers.getchannel("A"))
        opaque = alpha > MASK_THRESHOLD
        if source == "alpha" or (alpha.min() < alpha.max() and not opaque.all()):
            if source == "auto" and opaque.any() and _another_mask(np.asarray(colours), grey, opaque):
                choice = "--mask-from alpha or --mask-from luminance"
                raise HarmonyError(f"{name}: its alpha and its luminance are masks that differ; choose one: {choice}")
            return alpha
    if source == "alpha":
        raise HarmonyError(f"{name}: has no transparency; leave --mask-from alpha away")
    return _unlabelled(image, np.asarray(colours), grey, name) if source == "auto" else grey


def _another_mask(colours: np.ndarray, grey: np.ndarray, opaque: np.ndarray) -> bool:
    """Whether colours are a black and white mask of another region than the opaque one, not a cut-out or paint."""
    drawn = ((grey <= BLACK) | (grey >= WHITE)) & (np.ptp(colours, axis=-1) <= BLACK)
    white = grey > MASK_THRESHOLD
    if drawn[opaque].mean() < 0.9:
        return False
    if 0.01 < white[opaque].mean() < 0.99:
        return True
    one_colour = not 0.001 < white.mean() < 0.999
    return not one_colour and drawn[~opaque].mean() > 0.9 and (white & opaque).sum() < 0.8 * (white | opaque).sum()


def _unlabelled(image: Image.Image, colours: np.ndarray, grey: np.ndarray, name) -> np.ndarray:
    """`grey` of a mask without alpha, 0 and 1 stretched to 0 and 255. Raises HarmonyError for labels."""
    counts = np.bincount(grey.ravel(), minlength=256)
    labels = counts[255] and not counts[LABELS + 1 : 255].any() and counts[1 : LABELS + 1].sum() > counts[255]
    if labels or (image.mode == "P" and np.ptp(colours, axis=-1).max(initial=0) > BLACK):
        values = np.unique(np.asarray(image)).tolist()
        void = "; 255 is a void border" if values[-1] == 255 else ""
        values = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
        kind = "indices of a palette" if image.mode == "P" else "labels"
        raise HarmonyError(f"{name}: holds {kind} ({values}{void}); paint the foreground white and the rest black")
    return grey if counts[2:].any() else grey * np.uint8(255)


def alike(shape, other) -> bool:
    """Whether two (height, width, ...) have the same aspect, give or take the rounding of a resize."""
    return abs(shape[0] * other[1] - shape[1] * other[0]) <= max(other[:2])


def turn_along(mask: np.ndarray, shape, turn: int) -> np.ndarray:
    """HxW bool turned as the EXIF orientation `turn` has turned its photo, now of `shape`, where only that fits."""
    if turn < 5 or alike(mask.shape, shape) or not alike(mask.shape[::-1], shape):
        return mask
    return np.asarray(Image.fromarray(mask).transpose(TURNS[turn]))
