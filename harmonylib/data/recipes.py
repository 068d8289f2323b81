"""Making composites from real photos: four seeded recipes after iHarmony4 (Cong et al. 2020, "DoveNet", Sec. 3).

The foreground is recoloured in place, as if cut from another photo (HCOCO, HFlickr), another retoucher's version
(HAdobe5k) or another capture condition (Hday2night) of the same scene; the background keeps every byte. A recipe draws
the direction of the change; how far it goes is set by the foreground, so that composites are as strong as the genuine
ones of their subset (`iharmony4_statistics`). A filter stands in for the data set's human screening.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.color import rgb2lab

from ..core.seeds import rng as seeded_rng
from .iharmony4_statistics import GENUINE, draw
from .transfers import TRANSFERS

LUMA = np.float32((0.299, 0.587, 0.114))
GAMMA = 2.2  # light is about the encoded value to this power; 2 ** (stops / GAMMA) is a gain on encoded values
MID_GREY = 0.18 ** (1 / GAMMA)
SAMPLE = 512  # foreground pixels by which the strength of an edit is found
REFERENCE = 4096  # pixels of a reference photo that a transfer takes its statistics from
WEAK = 0.7  # a composite that reaches less of the drawn fMSE is drawn again
GAIN = (0.03, 6.0)  # bounds on what an edit's drawn parameters are multiplied by

# Five tastes, each in [-1, 1]: exposure, warmth, tint (+ magenta), mid-tones (+ dark), contrast, saturation.
EXPERTS = np.array([
    (0.7, 0.5, 0.0, -0.4, 0.3, 0.3),  # bright and warm
    (-0.6, -0.5, 0.0, 0.3, 0.6, -0.2),  # dark, cool and contrasty
    (0.3, -0.2, 0.4, -0.6, -0.6, -0.7),  # faded
    (-0.2, 0.6, -0.2, 0.3, 0.4, 0.8),  # rich and golden
    (0.5, -0.6, -0.4, 0.0, 0.1, 0.5),  # bright, cool and vivid
])  # fmt: skip
# Five capture conditions, each in [-1, 1]: exposure, warmth, contrast, vignetting.
CONDITIONS = np.array([
    (0.8, 0.0, 0.4, -0.2),  # noon
    (0.0, 0.9, 0.1, 0.2),  # golden hour
    (-0.5, 0.3, -0.5, 0.3),  # dusk
    (-1.0, -0.8, 0.4, 0.8),  # night
    (0.2, -0.5, -0.8, 0.0),  # overcast
])  # fmt: skip

# What 1 stands for: stops (doublings of light), stops between red and blue and of tint, doublings of the mid-tones'
# exponent, S-curve, doublings of saturation; and of a foreground's own doublings of each channel's exponent and stops
# from its middle to its edge, down and right.
RETOUCH, OWN = (1.7, 1.1, 0.55, 0.7, 0.7, 0.8), (0.25, 0.25, 0.25, 0.4, 0.4)
RELIGHT = (0.85, 0.6, 0.2, 0.4)  # stops, stops between red and blue, contrast, stops from the centre to the corners


@dataclass(frozen=True)
class RecipeSettings:
    """Which transfers of `transfers.TRANSFERS` HCOCO and HFlickr draw from, and the share of foreground pixels that may
    newly reach 0 or 255 (`clipped`). How far a recipe goes follows `iharmony4_statistics.GENUINE`."""

    transfers: Sequence[str] = tuple(TRANSFERS)
    clipped: float = 0.1


DEFAULTS = RecipeSettings()


def draw_parameters(edit: Callable, rng: np.random.Generator) -> np.ndarray:
    """Eleven parameters of `retouch` (an expert's taste, curves, a gradient) or four of `relight` (a condition).

    Taste and condition are mixed with the day's mood in equal parts.
    """
    kinds, scale = (EXPERTS, RETOUCH) if edit is retouch else (CONDITIONS, RELIGHT)
    mixed = 0.5 * kinds[rng.integers(len(kinds))] + 0.5 * rng.uniform(-1, 1, kinds.shape[1])
    own = rng.uniform(-1, 1, 5) * OWN if edit is retouch else ()
    return np.concatenate([mixed * scale, own])


# ---- edits: (pixels Nx3 float32 in [0, 1], places Nx2, those of `draw_parameters`) -> Nx3 in [0, 1] ----


def retouch(pixels: np.ndarray, places: np.ndarray, parameters) -> np.ndarray:
    """A retoucher's edit: exposure with a gradient across the foreground, white balance, curves, saturation.

    places are (row, column) in [-1, 1] of the picture.
    """
    exposure, warmth, tint, tone, contrast, saturation, *rest = np.float32(parameters)
    curves, gradient = np.array(rest[:3], np.float32), np.array(rest[3:], np.float32)
    across = (places - places.mean(0)) / (2 * places.std(0) + 1e-3)
    stops = (exposure + across.clip(-1, 1) @ gradient)[:, None]
    stops = stops + np.float32([warmth / 2 + tint / 2, -tint / 2, tint / 2 - warmth / 2])
    x = (pixels * 2 ** (stops / GAMMA)).clip(0, 1) ** 2 ** (tone + curves)
    x = x + contrast.clip(-1, 1) * x * (1 - x) * (2 * x - 1)  # an S-curve, monotone within these bounds
    luma = (x @ LUMA)[:, None]
    return (luma + (x - luma) * 2**saturation).clip(0, 1)


def relight(pixels: np.ndarray, places: np.ndarray, parameters) -> np.ndarray:
    """Another capture condition: exposure, colour temperature, contrast about mid-grey, vignetting."""
    exposure, warmth, contrast, vignette = np.float32(parameters)
    stops = (exposure - vignette * (places**2).sum(1) / 2)[:, None] + np.float32([warmth / 2, 0, -warmth / 2])
    contrast = max(contrast, np.float32(-0.9))
    return ((pixels * 2 ** (stops / GAMMA) / MID_GREY) ** (1 + contrast) * MID_GREY).clip(0, 1)


def restyle(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The whole photo (HxWx3 uint8) by another retoucher under another light.

    Ours, no recipe of iHarmony4's: both regions change alike and stay in harmony, so that a network that sees few
    photos learns how regions relate instead of the photos' own colours.
    """
    places = _places(np.ones(image.shape[:2], bool))
    pixels = np.float32(image.reshape(-1, 3)) / 255
    for edit in (retouch, relight):
        pixels = edit(pixels, places, draw_parameters(edit, rng))
    return np.rint(pixels * 255).astype(np.uint8).reshape(image.shape)


def _places(mask: np.ndarray) -> np.ndarray:
    """(row, column) of the mask's pixels, each in [-1, 1] of the picture: Nx2 float32."""
    return (2 * np.argwhere(mask) / np.maximum(np.array(mask.shape) - 1, 1) - 1).astype(np.float32)


# ---- recipes ----

RECIPES = tuple(GENUINE)
EDITS = {"HAdobe5k": retouch, "Hday2night": relight}  # need no reference photo


def _edited(edit, pixels, places, rng) -> Callable:
    """(gain, rows) -> these pixels by one edit, its parameters multiplied by gain."""
    parameters = draw_parameters(edit, rng)
    return lambda gain, rows: edit(pixels[rows], places[rows], gain * parameters)


def _transferred(pixels, reference, rng, names) -> Callable:
    """(share, rows) -> these pixels, that share of the way to one of the transfers `names`."""
    image, region = reference
    source = image[region] if region.any() else image.reshape(-1, 3)  # an object too small for this size
    if len(source) > REFERENCE:
        source = source[rng.integers(len(source), size=REFERENCE)]
    transfer = TRANSFERS[names[rng.integers(len(names))]]
    change = np.float32(transfer(np.float64(pixels), np.float64(np.float32(source) / 255)) - pixels)
    return lambda share, rows: pixels[rows] + min(share, 1.0) * change[rows]


def _gain(change: Callable, pixels: np.ndarray, fmse: float, rng: np.random.Generator) -> float:
    """What `change` is to be multiplied by so that it changes pixels in [0, 1] by a mean square of `fmse`.

    Found on SAMPLE pixels by repeating gain *= sqrt(wanted / reached): the change is about proportional to its gain.
    """
    rows = rng.integers(len(pixels), size=min(len(pixels), SAMPLE))
    gain = 0.5
    for _ in range(6):
        reached = float(np.square(change(gain, rows) - pixels[rows]).mean())
        gain = float(np.clip(gain * np.sqrt(fmse / max(reached, 1e-9)), *GAIN))
    return gain


def recolor(recipe, real, mask, rng, reference=None, settings: RecipeSettings = DEFAULTS, fmse=None) -> np.ndarray:
    """One composite: the foreground recoloured by one of RECIPES as strongly as `fmse` says.

    real HxWx3 uint8; mask HxW bool, not empty; reference (image, mask) for all but EDITS; fmse on the 0-255 scale,
    None: drawn from the genuine ones of this recipe. A transfer is never overdone: it stays weaker where the reference
    is too much like the foreground. Returns HxWx3 uint8, rounded, with the background untouched.
    """
    assert recipe in RECIPES, recipe
    assert mask.any() and (reference or recipe in EDITS), "a composite needs a foreground, a transfer a reference"
    fmse = draw(GENUINE[recipe].fmse, rng) if fmse is None else fmse
    pixels = np.float32(real[mask]) / 255
    if recipe in EDITS:
        change = _edited(EDITS[recipe], pixels, _places(mask), rng)
    else:
        change = _transferred(pixels, reference, rng, settings.transfers)
    changed = change(_gain(change, pixels, fmse / 255**2, rng), slice(None))
    composite = real.copy()
    composite[mask] = np.rint(changed * 255).clip(0, 255).astype(np.uint8)
    return composite


# ---- masks as people draw them ----


def jitter(mask: np.ndarray, rng: np.random.Generator, pixels: int = 3) -> np.ndarray:
    """An HxW bool mask dilated or eroded by 0 to `pixels` pixels; as it was where nothing or everything would be left.

    A real mask is never exact: a loose one takes in some of the surroundings, a tight one cuts into the object.
    """
    by = int(rng.integers(-pixels, pixels + 1))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(by) + 1,) * 2)
    out = (cv2.dilate if by > 0 else cv2.erode)(mask.astype(np.uint8), kernel) > 0
    return out if out.any() and not out.all() else mask


def widened(mask: np.ndarray, pixels: int = 2) -> np.ndarray:
    """An HxW bool mask and so many pixels around it."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


def soften(changed: np.ndarray, real: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """A composite whose edge is as in a picture that was made smaller: pixels there belong to both sides in part.

    changed: `real` recoloured inside the `widened` mask; HxWx3 uint8 twice and HxW bool; sigma in pixels, up to 1.
    """
    weight = cv2.GaussianBlur(mask.astype(np.float32), (5, 5), sigma)[..., None]
    return np.rint(real + weight * (changed.astype(np.float32) - real)).astype(np.uint8)


# ---- measures and the filter ----


def foreground_delta_e(real: np.ndarray, composite: np.ndarray, mask: np.ndarray) -> float:
    """Mean CIE76 colour difference over the foreground of two HxWx3 uint8 images."""
    return float(np.linalg.norm(rgb2lab(real[mask]) - rgb2lab(composite[mask]), axis=-1).mean())


def foreground_mse(real: np.ndarray, composite: np.ndarray, mask: np.ndarray) -> float:
    """fMSE: mean squared difference over the foreground of two HxWx3 uint8 images, on the 0-255 scale."""
    return float(np.square(np.float32(real[mask]) - composite[mask]).mean())


def implausible(real, composite, mask, settings: RecipeSettings = DEFAULTS) -> str:
    """Why a composite would not do: too many pixels with a channel newly at 0 or 255. "" where it does."""
    before, after = (((image[mask] == 0) | (image[mask] == 255)).any(-1) for image in (real, composite))
    clipped = float((after & ~before).mean())
    return f"clipped: {clipped:.0%} of the foreground > {settings.clipped:.0%}" if clipped > settings.clipped else ""


def make_composite(
    recipe: str, real, mask, seed_words: tuple, reference=None, settings: RecipeSettings = DEFAULTS, tries: int = 8
) -> tuple[np.ndarray, dict]:
    """Draw composites of one strength until one is plausible; the last one otherwise. The same words, the same one.

    Arguments as `recolor`, but that reference may also be a function of the try's number that gives one.
    Returns HxWx3 uint8 and {"recipe", "tries", "fmse", "share", "delta_e", "plausible", "reason"}. The strength is
    drawn once, so that the filter does not prefer weak changes.
    """
    fmse = draw(GENUINE[recipe].fmse, seeded_rng(*seed_words, recipe, "fmse"))
    for attempt in range(tries):
        colours = reference(attempt) if callable(reference) else reference
        composite = recolor(recipe, real, mask, seeded_rng(*seed_words, recipe, attempt), colours, settings, fmse)
        reached = foreground_mse(real, composite, mask)
        reason = implausible(real, composite, mask, settings)
        if not reason and reached < WEAK * fmse:
            reason = f"too weak: fMSE {reached:.0f} of the {fmse:.0f} that were drawn"
        if not reason:
            break
    about = {"fmse": reached, "share": float(mask.mean()), "delta_e": foreground_delta_e(real, composite, mask)}
    return composite, {"recipe": recipe, "tries": attempt + 1} | about | {"plausible": not reason, "reason": reason}
