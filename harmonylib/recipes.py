"""Making composites from real photos: four seeded recipes after iHarmony4 (Cong et al. 2020, "DoveNet", Sec. 3).

The foreground is recoloured in place, as if cut from another photo (HCOCO, HFlickr), another retoucher's version
(HAdobe5k) or another capture condition (Hday2night) of the same scene; the background keeps every byte. A filter stands
in for the data set's human screening. `recolor_batch` does the same to tensors, for composites made during training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.color import rgb2lab
from torch.nn.utils.rnn import pad_sequence

from .color import BATCH_TRANSFERS, TRANSFERS, transfer_region
from .errors import HarmonyError
from .images import paste
from .seeds import rng as seeded_rng

LUMA = (0.299, 0.587, 0.114)
GAMMA = 2.2  # light is about the encoded value to this power; 2 ** (stops / GAMMA) is a gain on encoded values
MID_GREY = 0.18 ** (1 / GAMMA)

# Five tastes, each in [-1, 1]: exposure, warmth, tint (+ magenta), mid-tones (+ dark), contrast, saturation.
EXPERTS = np.array(
    [
        (0.7, 0.5, 0.0, -0.4, 0.3, 0.3),  # bright and warm
        (-0.6, -0.5, 0.0, 0.3, 0.6, -0.2),  # dark, cool and contrasty
        (0.3, -0.2, 0.4, -0.6, -0.6, -0.7),  # faded
        (-0.2, 0.6, -0.2, 0.3, 0.4, 0.8),  # rich and golden
        (0.5, -0.6, -0.4, 0.0, 0.1, 0.5),  # bright, cool and vivid
    ]
)
# Five capture conditions, each in [-1, 1]: exposure, warmth, contrast, vignetting.
CONDITIONS = np.array(
    [
        (0.8, 0.0, 0.4, -0.2),  # noon
        (0.0, 0.9, 0.1, 0.2),  # golden hour
        (-0.5, 0.3, -0.5, 0.3),  # dusk
        (-1.0, -0.8, 0.4, 0.8),  # night
        (0.2, -0.5, -0.8, 0.0),  # overcast
    ]
)


@dataclass(frozen=True)
class RecipeSettings:
    """Strengths of the recipes and bounds of the filter (ranges are low, high; stops are doublings of light).

    The defaults bring the mean PSNR of whole composites at 256 px near iHarmony4's for each subset.
    """

    hcoco_strength: tuple[float, float] = (0.1, 0.36)  # blend of the colour transfer, 1 = full
    hflickr_strength: tuple[float, float] = (0.3, 0.66)
    retouch_exposure: float = 1.7  # stops
    retouch_warmth: float = 1.1  # stops between red and blue, halved for tint
    retouch_tone: float = 0.7  # mid-tone exponent (in doublings) and S-curve
    retouch_saturation: float = 0.8  # doublings
    retouch_gradient: float = 0.6  # stops from the middle of the foreground to its edge
    relight_exposure: float = 0.85  # stops
    relight_warmth: float = 0.6  # stops between red and blue
    relight_contrast: float = 0.2
    relight_vignette: float = 0.4  # stops from the centre of the image to its corners
    extra_share: float = 0.25  # on-the-fly composites that get a second, halved retouch
    delta_e: tuple[float, float] = (2.0, 30.0)  # mean CIE76 difference of the foreground
    clipped: float = 0.1  # share of foreground pixels that newly reach 0 or 255

    def __post_init__(self):
        for name in ("hcoco_strength", "hflickr_strength", "delta_e"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise HarmonyError(f"recipes: {name} must be two numbers, 0 <= low <= high, not {low}, {high}")
        for name, value in vars(self).items():
            if not isinstance(value, (tuple, list)) and value < 0:
                raise HarmonyError(f"recipes: {name} must not be negative, not {value}")


DEFAULTS = RecipeSettings()


# ---- parameters: drawn with numpy for arrays and tensors alike ----


def draw_retouch(rng: np.random.Generator, settings: RecipeSettings) -> np.ndarray:
    """Eight parameters of `retouch`: one expert's taste and the day's mood in equal parts."""
    s = settings
    taste = 0.5 * EXPERTS[rng.integers(len(EXPERTS))] + 0.5 * rng.uniform(-1, 1, EXPERTS.shape[1])
    scale = (s.retouch_exposure, s.retouch_warmth, s.retouch_warmth / 2, s.retouch_tone, s.retouch_tone)
    return np.concatenate([taste * (*scale, s.retouch_saturation), rng.uniform(-1, 1, 2) * s.retouch_gradient])


def draw_relight(rng: np.random.Generator, settings: RecipeSettings) -> np.ndarray:
    """Four parameters of `relight`: one condition, varied."""
    s = settings
    condition = 0.5 * CONDITIONS[rng.integers(len(CONDITIONS))] + 0.5 * rng.uniform(-1, 1, CONDITIONS.shape[1])
    return condition * (s.relight_exposure, s.relight_warmth, s.relight_contrast, s.relight_vignette)


# ---- edits: (image ...x3xHxW in [0, 1], mask ...x1xHxW in {0, 1}, parameters ...xP), arrays or tensors ----


def _like(values, image):
    """`values` as an array or tensor of the kind, type and device of `image`."""
    if isinstance(image, torch.Tensor):
        return torch.as_tensor(values, dtype=image.dtype, device=image.device)
    return np.asarray(values, dtype=image.dtype)


def _columns(parameters, image):
    parameters = _like(parameters, image)[..., None, None, None]
    return [parameters[..., k, :, :, :] for k in range(parameters.shape[-4])]


def _grid(image):
    height, width = image.shape[-2:]
    return _like(np.linspace(-1, 1, height)[:, None], image), _like(np.linspace(-1, 1, width)[None], image)


def _across(mask, coordinate):
    """`coordinate` measured from the middle of the foreground in units of twice its spread, within [-1, 1]."""
    share = mask / mask.sum((-1, -2), keepdims=True).clip(1, None)
    middle = (share * coordinate).sum((-1, -2), keepdims=True)
    spread = (share * (coordinate - middle) ** 2).sum((-1, -2), keepdims=True) ** 0.5
    return ((coordinate - middle) / (2 * spread + 1e-3)).clip(-1, 1)


def retouch(image, mask, parameters):
    """A retoucher's edit: exposure with a gradient across the foreground, white balance, tone curve, saturation.

    parameters come from `draw_retouch`. Returns the whole image, in [0, 1].
    """
    exposure, warmth, tint, tone, contrast, saturation, down, right = _columns(parameters, image)
    balance = warmth * _like([[[0.5]], [[0.0]], [[-0.5]]], image) + tint * _like([[[0.5]], [[-0.5]], [[0.5]]], image)
    rows, columns = _grid(image)
    stops = exposure + balance + down * _across(mask, rows) + right * _across(mask, columns)
    x = (image * 2 ** (stops / GAMMA)).clip(0, 1) ** 2**tone
    x = x + contrast * x * (1 - x) * (2 * x - 1)  # an S-curve that stays monotone for |contrast| <= 1
    luma = (x * _like(LUMA, image)[:, None, None]).sum(-3, keepdims=True)
    return (luma + (x - luma) * 2**saturation).clip(0, 1)


def relight(image, mask, parameters):
    """Another capture condition: exposure, colour temperature, contrast about mid-grey, vignetting of the whole image.

    parameters come from `draw_relight`; the mask plays no part. Returns the whole image, in [0, 1].
    """
    exposure, warmth, contrast, vignette = _columns(parameters, image)
    rows, columns = _grid(image)
    balance = warmth * _like([[[0.5]], [[0.0]], [[-0.5]]], image)
    stops = exposure + balance - vignette * (rows**2 + columns**2) / 2
    return ((image * 2 ** (stops / GAMMA) / MID_GREY) ** (1 + contrast) * MID_GREY).clip(0, 1)


def restyle(image: torch.Tensor, rngs, settings: RecipeSettings = DEFAULTS) -> torch.Tensor:
    """The whole photo by another retoucher under another light: Bx3xHxW in [0, 1], one numpy generator an image.

    Ours, no recipe of iHarmony4's: both regions change alike and stay in harmony, so that a network that sees few
    photos learns how regions relate instead of the photos' own colours.
    """
    everywhere = torch.ones_like(image[:, :1])
    retouched = retouch(image, everywhere, np.stack([draw_retouch(rng, settings) for rng in rngs]))
    return relight(retouched, everywhere, np.stack([draw_relight(rng, settings) for rng in rngs]))


# ---- the recipes: (real, mask, rng, reference, settings) -> composite ----


def _transferred(real, mask, rng, reference, strengths) -> np.ndarray:
    if reference is None:
        raise HarmonyError("this recipe takes its colours from another photo; give reference=(image, mask)")
    image, region = reference
    transfer = TRANSFERS[list(TRANSFERS)[rng.integers(len(TRANSFERS))]]
    return transfer_region(real, mask, image[region] / 255.0, transfer, rng.uniform(*strengths))


EDITS = {"HAdobe5k": (retouch, draw_retouch), "Hday2night": (relight, draw_relight)}


def _edited(recipe, real, mask, rng, settings) -> np.ndarray:
    edit, draw = EDITS[recipe]
    image = np.moveaxis(real, -1, 0).astype(np.float32) / 255
    changed = edit(image, mask[None].astype(np.float32), draw(rng, settings))
    return paste(np.rint(np.moveaxis(changed, 0, -1) * 255).astype(np.uint8), real, mask)


def hcoco(real, mask, rng, reference=None, settings: RecipeSettings = DEFAULTS) -> np.ndarray:
    """The foreground takes colour statistics of another photo's foreground, in part, by a randomly drawn transfer."""
    return _transferred(real, mask, rng, reference, settings.hcoco_strength)


def hflickr(real, mask, rng, reference=None, settings: RecipeSettings = DEFAULTS) -> np.ndarray:
    """As `hcoco`, more strongly."""
    return _transferred(real, mask, rng, reference, settings.hflickr_strength)


def hadobe5k(real, mask, rng, reference=None, settings: RecipeSettings = DEFAULTS) -> np.ndarray:
    """The foreground comes from another expert's retouched version of the photo (parametric in place of human)."""
    return _edited("HAdobe5k", real, mask, rng, settings)


def hday2night(real, mask, rng, reference=None, settings: RecipeSettings = DEFAULTS) -> np.ndarray:
    """The foreground comes from the scene under another capture condition (parametric in place of a webcam's)."""
    return _edited("Hday2night", real, mask, rng, settings)


RECIPES: dict[str, Callable] = {
    "HCOCO": hcoco,
    "HAdobe5k": hadobe5k,
    "HFlickr": hflickr,
    "Hday2night": hday2night,
}


def foreground_delta_e(real: np.ndarray, composite: np.ndarray, mask: np.ndarray) -> float:
    """Mean CIE76 colour difference over the foreground of two HxWx3 uint8 images."""
    return float(np.linalg.norm(rgb2lab(real[mask]) - rgb2lab(composite[mask]), axis=-1).mean())


def plausible(real, composite, mask, settings: RecipeSettings = DEFAULTS) -> tuple[bool, str, float]:
    """Whether the foreground changed enough to see, not absurdly, and without clipping; else the reason why not.

    real and composite HxWx3 uint8, mask HxW bool. The reason is "" for a plausible composite; the third value is the
    change itself, the mean CIE76 difference of the foreground.
    """
    if not mask.any():
        raise HarmonyError("the mask is empty; a composite needs a foreground")
    change = foreground_delta_e(real, composite, mask)
    low, high = settings.delta_e
    if change < low:
        return False, f"too little change: delta E {change:.1f} < {low:g}", change
    if change > high:
        return False, f"too much change: delta E {change:.1f} > {high:g}", change
    ends = [((image[mask] == 0) | (image[mask] == 255)).any(-1) for image in (real, composite)]
    clipped = float((ends[1] & ~ends[0]).mean())
    if clipped > settings.clipped:
        return False, f"clipped: {clipped:.0%} of the foreground > {settings.clipped:.0%}", change
    return True, "", change


def make_composite(
    recipe: str, real, mask, seed_words: tuple, reference=None, settings: RecipeSettings = DEFAULTS, tries: int = 8
) -> tuple[np.ndarray, dict]:
    """Draw composites until one is plausible; the last one otherwise. The same words give the same composite.

    recipe one of RECIPES; real HxWx3 uint8; mask HxW bool; reference (image, mask) for HCOCO and HFlickr.
    Returns HxWx3 uint8 and {"recipe", "tries", "delta_e", "plausible", "reason"}.
    Raises HarmonyError for an unknown recipe, an empty mask or a missing reference.
    """
    if recipe not in RECIPES:
        raise HarmonyError(f"recipe {recipe!r} is unknown; use {', '.join(RECIPES)}")
    for attempt in range(max(1, tries)):
        rng = seeded_rng(*seed_words, recipe, attempt)
        composite = RECIPES[recipe](real, mask, rng, reference, settings)
        good, reason, change = plausible(real, composite, mask, settings)
        if good:
            break
    info = {"recipe": recipe, "tries": attempt + 1, "delta_e": change, "plausible": good, "reason": reason}
    return composite, info


# ---- composites made on the fly ----

STRENGTHS = {"HCOCO": "hcoco_strength", "HFlickr": "hflickr_strength"}


def transfer_batch(transfer: str, image, mask, reference, reference_mask, strength) -> torch.Tensor:
    """One of `color.TRANSFERS` between the foregrounds of Bx3xHxW in [0, 1], blended by B strengths.

    Where a mask is empty its whole image stands in. Equals the array transfer on the foreground; the rest is kept.
    """

    def regions(images, masks):  # the pixels that count, padded to the largest region: Bx3xN, with weights Bx1xN
        chosen = [m.flatten().nonzero()[:, 0] if m.any() else torch.arange(m.numel(), device=m.device) for m in masks]
        pixels = [x.flatten(1)[:, places].T for x, places in zip(images, chosen, strict=True)]
        weights = pad_sequence([x.new_ones(len(x), 1) for x in pixels], batch_first=True)
        return chosen, pad_sequence(pixels, batch_first=True).mT, weights.mT

    chosen, source, weights = regions(image, mask)
    changed = BATCH_TRANSFERS[transfer](source, weights, *regions(reference, reference_mask)[1:])
    changed = source + _like(strength, image)[:, None, None] * (changed - source)
    result = image.flatten(2).clone()
    for row, pixels, places in zip(result, changed, chosen, strict=True):
        row[:, places] = pixels[:, : len(places)]
    return result.view(image.shape)


@torch.no_grad()
def recolor_batch(real, mask, generator: torch.Generator, settings: RecipeSettings = DEFAULTS) -> torch.Tensor:
    """Composites of a batch, each foreground recoloured by one of RECIPES, on the batch's device.

    real Bx3xHxW in [-1, 1]; mask Bx1xHxW in {0, 1}. Transfers take their colours from another image of the batch (a
    lone image is only edited), and `extra_share` of the images get a second, weaker retouch. Returns Bx3xHxW in
    [-1, 1], not rounded to levels, with the background equal to `real`. Every draw follows the generator. The filter of
    implausible composites is left out.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    rngs = [np.random.default_rng((seed, index)) for index in range(len(real))]
    names = list(RECIPES) if len(real) > 1 else list(EDITS)
    ring = np.random.default_rng(seed).permutation(len(real))
    partner = np.empty_like(ring)
    partner[ring] = np.roll(ring, 1)

    groups = {}  # images that are treated alike, with their parameters
    for index, rng in enumerate(rngs):
        recipe = names[rng.integers(len(names))]
        if recipe in EDITS:
            groups.setdefault(recipe, []).append((index, EDITS[recipe][1](rng, settings)))
        else:
            transfer = list(TRANSFERS)[rng.integers(len(TRANSFERS))]
            groups.setdefault(transfer, []).append((index, rng.uniform(*getattr(settings, STRENGTHS[recipe]))))

    image, result = (real + 1) / 2, torch.empty_like(real)
    for name, members in groups.items():
        chosen, parameters = (np.array(column) for column in zip(*members, strict=True))
        rows = torch.from_numpy(chosen).to(real.device)
        if name in EDITS:
            result[rows] = EDITS[name][0](image[rows], mask[rows], parameters)
        else:
            other = torch.from_numpy(partner[chosen]).to(real.device)
            result[rows] = transfer_batch(name, image[rows], mask[rows], image[other], mask[other], parameters)

    more = np.flatnonzero([rng.random() < settings.extra_share for rng in rngs])
    if len(more):
        rows, extra = torch.from_numpy(more).to(real.device), [0.5 * draw_retouch(rngs[i], settings) for i in more]
        result[rows] = retouch(result[rows], mask[rows], np.stack(extra))
    return paste(result * 2 - 1, real, mask)
