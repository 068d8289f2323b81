"""Ways to carry a model's change from its working size to a photo's own: which comes nearest the real photo?

Run: python -m benchmarks.carry_over. The embedded photos get a foreground recoloured by two recipes at full size. The
"model" answers with the real photo at working size: exactly ("perfect"), or blurred by 1 px and with noise of 6 levels
("imperfect", like an autoencoder's decoder). Printed: mean foreground PSNR in dB over all composites.
"""

import cv2
import numpy as np
import pandas as pd

from harmonylib.core.images import shrink_pair
from harmonylib.core.seeds import rng
from harmonylib.data.embedded_photos import load_photos
from harmonylib.data.recipes import make_composite
from harmonylib.inference import carry_over, colour_map, recolored, smooth

RECIPES = ("HFlickr", "HAdobe5k")
KINDS = ("perfect", "imperfect")


def _finish(pixels, region, change):
    """`pixels` with an HxWx3 change (1 is 255 levels) added to the foreground."""
    changed = np.clip(pixels + 255 * change, 0, 255).round().astype(np.uint8)
    return np.where(region[..., None], changed, pixels)


def _enlarged(values, region):
    return cv2.resize(values, region.shape[::-1], interpolation=cv2.INTER_LINEAR)


def one_map(pixels, region, small, changed, small_region):
    """One quadratic colour map for the whole foreground."""
    found = colour_map(*(array[small_region] / 127.5 - 1 for array in (small, changed)))
    return recolored(pixels, region, found, None, strength=1.0)


def ours(pixels, region, small, changed, small_region, **sigmas):
    """One colour map, and what it leaves."""
    return recolored(pixels, region, *carry_over(small, changed, small_region, **sigmas), strength=1.0)


def difference(pixels, region, small, changed, small_region):
    """The difference itself, averaged over 1 px and enlarged."""
    return _finish(
        pixels, region, _enlarged(smooth((changed - small.astype(np.float32)) / 255, small_region, 1), region)
    )


def guided(pixels, region, small, changed, small_region, radius=16, epsilon=1e-3):
    """Local affine colour maps, their coefficients enlarged: the fast guided filter (He & Sun 2015, colour guide)."""
    guide, target = small.astype(np.float32) / 255, (changed - small.astype(np.float32)) / 255
    weight = small_region.astype(np.float32)
    sums = lambda x: cv2.boxFilter(x, -1, (2 * radius + 1,) * 2, normalize=False, borderType=cv2.BORDER_CONSTANT)  # noqa: E731
    total = np.maximum(sums(weight), 1e-3)[..., None]
    mean = lambda x: np.stack([sums(c * weight) for c in np.moveaxis(x, -1, 0)], -1) / total  # noqa: E731
    outer = lambda x, y: (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:2], 9)  # noqa: E731
    centre, middle = mean(guide), mean(target)
    square, cross = (
        mean(outer(guide, guide)) - outer(centre, centre),
        mean(outer(guide, target)) - outer(centre, middle),
    )
    square, cross = (x.reshape(*weight.shape, 3, 3) for x in (square, cross))
    slopes = np.linalg.solve(square + epsilon * np.eye(3, dtype=np.float32), cross)
    offset = middle - np.einsum("hwi,hwij->hwj", centre, slopes)
    slopes, offset = mean(slopes.reshape(*weight.shape, 9)), mean(offset)
    slopes = np.concatenate([_enlarged(slopes[..., i : i + 3], region) for i in (0, 3, 6)], -1)
    slopes = slopes.reshape(*region.shape, 3, 3)
    return _finish(pixels, region, np.einsum("hwi,hwij->hwj", pixels / 255, slopes) + _enlarged(offset, region))


METHODS = {
    "nothing": lambda pixels, *_: pixels,
    "enlarged difference": difference,
    "guided filter": guided,
    "one colour map": one_map,
    "map and rest, fit unsmoothed": lambda *given: ours(*given, fit_sigma=0.01),
    "map and rest (ours)": ours,
}


def compare(size: int, imperfect: bool) -> dict[str, float]:
    """{method: mean foreground PSNR in dB} at one working size."""
    photos, found = load_photos(), {name: [] for name in METHODS}
    for index, photo in enumerate(photos):
        other = photos[(index + 3) % len(photos)]
        name, mask = next(iter(photo.masks.items()))
        for recipe in RECIPES:
            words, reference = (0, "carry over", photo.name, name), (other.image, next(iter(other.masks.values())))
            composite, _ = make_composite(recipe, photo.image, mask, words, reference, tries=1)
            small, small_mask = shrink_pair(composite, mask, size)
            answer, _ = shrink_pair(photo.image, mask, size)
            if imperfect:
                noise = rng(*words, recipe).normal(0, 6, answer.shape)
                answer = cv2.GaussianBlur(answer.astype(np.float32), (0, 0), 1) + noise
                answer = np.clip(answer, 0, 255).round().astype(np.uint8)
            for method, carry in METHODS.items():
                error = carry(composite, mask, small, answer, small_mask)[mask].astype(float) - photo.image[mask]
                found[method].append(10 * np.log10(255**2 / np.mean(error**2)))
    return {method: float(np.mean(values)) for method, values in found.items()}


def main() -> None:
    cases = {f"{size} px, {kind}": compare(size, kind == "imperfect") for size in (96, 256) for kind in KINDS}
    print(pd.DataFrame(cases).round(2).to_string())


if __name__ == "__main__":
    main()
