"""What the pixels of a file mean: any picture as 8-bit colours, any mask as levels of which those above 127 are it.

Metadata never costs a picture: what Pillow stumbles over is left out with a warning (`errors.note`).
"""

import contextlib
import io
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
BLACK, WHITE = 16, 239  # levels up to and from which a mask's colours count as drawn in black and white
LABELS = 40  # values up to which, beside 255 alone, a grey mask is a list of labels with a void border
_T = Image.Transpose
TURNS = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM}  # how EXIF orientations are undone
TURNS |= {5: _T.TRANSPOSE, 6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}


def pictures_in(folder) -> tuple[list[Path], list[HarmonyError]]:
    """The pictures of a folder, sorted, and an error that names each other file but hidden ones and lists."""
    paths = [p for p in sorted(Path(folder).iterdir()) if p.name[0] != "." and p.is_file()]
    odd = [p for p in paths if p.suffix.lower() not in IMAGE_SUFFIXES + UNLISTED]
    errors = [HarmonyError(f"{p}: {p.suffix} is no type that is read; convert or remove it") for p in odd]
    return [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES], errors


def open_image(source, name=None, limit: int = MAX_PIXELS) -> Image.Image:
    """Decode an image, a path or a binary file that messages call `name`, completely.

    `info["deep"]`: whether Pillow cut more than 8 bits a channel down to 8. Raises HarmonyError in one line when the
    image is missing, broken or of `limit` pixels or more.
    """
    name, lost = name or source, None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of metadata, and of large pictures: our limit is stricter
        for prepare in (bytes, _bare):
            try:
                file = source if hasattr(source, "read") else io.BytesIO(Path(source).read_bytes())
                file.seek(0)
                image = Image.open(io.BytesIO(prepare(file.read())))
                if image.width * image.height >= limit:
                    size = f"{image.width}x{image.height}"
                    raise HarmonyError(f"{name}: {size} is {limit // 10**6} megapixels or more; make it smaller")
                deep = ";16" in str(image.tile)
                image.load()
                image.info["deep"] = deep
                if lost:
                    note(f"{name}: its texts or other details cannot be read ({lost}); they are left out")
                return image
            except FileNotFoundError:
                raise HarmonyError(f"{name}: no such file") from None
            except HarmonyError:
                raise
            except Exception as error:  # Pillow raises many kinds on damaged files
                lost = error
    known = {UnidentifiedImageError: "of no kind that is known"}
    known[Image.DecompressionBombError] = f"over {limit // 10**6} megapixels"
    raise HarmonyError(f"{name}: not a readable image ({known.get(type(lost), lost)}); replace the file")


def _bare(data: bytes) -> bytes:
    """A PNG with little but what says what its pixels are, since Pillow may fail over the rest."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    kept, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end])
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and checksum == zlib.crc32(data[at + 4 : end - 4])):
            kept += data[at:end]
        at = end
    return kept


def orientation(image: Image.Image) -> int:
    """How EXIF (or XMP) says that the stored pixels are to be turned, 2 to 8; 1: not at all, or it cannot be read."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):  # Pillow raises many kinds
        value = image.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in TURNS else 1
    return 1


def one_frame(image: Image.Image, name) -> None:
    """Raise HarmonyError for an animation and other files of more than one picture."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a preview behind it
        raise HarmonyError(f"{name}: has {image.n_frames} frames; save the one you want as PNG or JPEG")


def plain(image: Image.Image, name="the image", mask: bool = False) -> Image.Image:
    """An upright 8-bit RGB picture of any PIL image, RGBA where that has transparency; its `info` is empty.

    16 bits are divided by 257, float values from 0 to 1 multiplied by 255; in a mask 1, 255, 65535 or the largest value
    is white. Raises HarmonyError for Lab, HSV and deep values of another meaning.
    """
    if image.mode in ("LAB", "HSV"):
        raise HarmonyError(f"{name}: its colours are {image.mode}; convert it to RGB first")
    clear = image.info.get("transparency")
    if image.mode[0] in "IF":
        result = _grey(image, name, mask).convert("RGB")
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
    return image.getchannel("A").getextrema()[0] < 255 if "A" in image.getbands() else "transparency" in image.info


def to_rgb(image: Image.Image, name="the image") -> Image.Image:
    """`plain` with transparency laid on white: an upright 8-bit RGB copy."""
    image = plain(image, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _grey(image: Image.Image, name, mask: bool) -> Image.Image:
    """The 8-bit grey levels of an image of 16 or 32 bits or floats."""
    values = np.asarray(image).astype(np.float32)
    sixteen, real = image.mode.startswith("I;16"), image.mode == "F"
    if sixteen and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:
        values = 65535 - values  # white is zero: Pillow turns fewer bits over by itself
    low, top = float(values.min(initial=0)), float(values.max(initial=0))
    sound = np.isfinite(low + top) and low > -0.01 * max(top, 1)  # resampled float pictures overshoot a little
    if not (sound and (mask or (top <= 65535 and not (real and 1.01 < top < 16)))):
        raise HarmonyError(f"{name}: its values run from {low:g} to {top:g}; use 8 or 16 bits, or float from 0 to 1")
    if mask:
        white = next((white for white in (1, 255, 65535) if top <= white + 0.01), top)
    else:
        white = 1 if real and top <= 1.01 else 65535 if sixteen or top > 255 else 255
    return Image.fromarray(np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8))


def mask_levels(image: Image.Image, name="the mask", source: str = "auto") -> np.ndarray:
    """HxW uint8 of a mask, upright; above MASK_THRESHOLD is foreground. Never dithered, as PIL's mode "1" would be.

    Alpha that varies is the mask (a cut-out's subject is opaque), else white is; source "alpha" or "luminance" decides.
    Raises HarmonyError where both are masks of different regions, for labels and for several frames.
    """
    if source not in MASK_SOURCES:
        raise HarmonyError(f"--mask-from {source!r} is unknown; use {', '.join(MASK_SOURCES)}")
    one_frame(image, name)
    if image.mode[0] in "IF" and source != "alpha":
        return np.asarray(plain(image, name, mask=True).convert("L"))
    layers = plain(image, name)
    colours = np.asarray(layers.convert("RGB"))
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    if source == "luminance":
        return grey
    if layers.mode == "RGBA":
        alpha = np.asarray(layers.getchannel("A"))
        opaque = alpha > MASK_THRESHOLD
        if source == "auto" and opaque.any() and not opaque.all() and _another_mask(colours, grey, opaque):
            choice = "--mask-from alpha or --mask-from luminance"
            raise HarmonyError(f"{name}: its alpha and its luminance are masks that differ; choose one: {choice}")
        if source == "alpha" or (alpha.min() < alpha.max() and not opaque.all()):
            return alpha
    elif source == "alpha":
        raise HarmonyError(f"{name}: has no transparency; leave --mask-from alpha away")
    return _unlabelled(image, colours, grey, name)


def _another_mask(colours: np.ndarray, grey: np.ndarray, opaque: np.ndarray) -> bool:
    """Whether colours are a black and white mask of another region than the opaque one, not a cut-out or paint."""
    drawn = ((grey <= BLACK) | (grey >= WHITE)) & (np.ptp(colours, axis=-1) <= BLACK)
    white = grey > MASK_THRESHOLD
    if drawn[opaque].mean() < 0.9:
        return False
    if 0.01 < white[opaque].mean() < 0.99:
        return True
    two_colours = 0.001 < white.mean() < 0.999
    return two_colours and drawn[~opaque].mean() > 0.9 and (white & opaque).sum() < 0.8 * (white | opaque).sum()


def _unlabelled(image: Image.Image, colours: np.ndarray, grey: np.ndarray, name) -> np.ndarray:
    """`grey`, 0 and 1 stretched to 0 and 255. Raises HarmonyError for labels: colours of a palette, a void border."""
    counts = np.bincount(grey.ravel(), minlength=256)
    labels = counts[255] and not counts[LABELS + 1 : 255].any() and counts[1 : LABELS + 1].sum() > counts[255]
    if labels or (image.mode == "P" and np.ptp(colours, axis=-1).max(initial=0) > BLACK):
        values = np.unique(np.asarray(image)).tolist()
        shown = ", ".join(map(str, values[:5] + ["..."] * (len(values) > 5)))
        shown += "; 255 is a void border" * (values[-1] == 255)
        kind = "indices of a palette" if image.mode == "P" else "labels"
        raise HarmonyError(f"{name}: holds {kind} ({shown}); paint the foreground white and the rest black")
    return grey if counts[2:].any() else grey * np.uint8(255)


def alike(shape, other) -> bool:
    """Whether two (height, width, ...) have the same aspect, give or take the rounding of a resize."""
    return abs(shape[0] * other[1] - shape[1] * other[0]) <= max(other[:2])


def turn_along(mask: np.ndarray, shape, turn: int) -> np.ndarray:
    """An HxW mask turned as the EXIF orientation `turn` has turned its photo, now of `shape`, where only that fits."""
    if turn < 5 or alike(mask.shape, shape) or not alike(mask.shape[::-1], shape):
        return mask
    return np.asarray(Image.fromarray(mask).transpose(TURNS[turn]))
