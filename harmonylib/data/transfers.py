"""Classical colour transfer between two sets of pixels.

Every transfer is `f(source, reference) -> result` on Nx3 and Mx3 RGB in [0, 1] (float64, N and M > 0); the result is
Nx3, clipped to [0, 1]. Statistics are taken on the encoded (sRGB) values, as the papers do. Equal sets give the source
back.
"""

from collections.abc import Callable

import numpy as np
from skimage.color import rgb2ycbcr, ycbcr2rgb
from skimage.exposure import match_histograms

from ..core.errors import HarmonyError
from ..core.seeds import rng

# Reinhard et al. 2001: RGB to LMS, and log LMS to l-alpha-beta. Exact inverses are used, not their rounded ones.
RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LMS_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]])
LOG_OFFSET = 1 / 255  # one level added before the logarithm, so that black is finite and the way back is exact
LOG_MAX = 1.0  # an upper bound on log10(LMS): ten times white, where a far outlier would overflow
VARIANCE_FLOOR = 1e-8  # a flat region keeps its flatness instead of dividing by zero
YCBCR_STEP = 0.01  # of 255: equal colours must not be told apart by the rounding of a matrix product
IDT_STEPS = 12
IDT_QUANTILES = 256
IDT_PIXELS = 2048


def _match_mean_std(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    variance = source.var(0)
    scale = np.where(variance > VARIANCE_FLOOR, reference.std(0) / np.sqrt(np.maximum(variance, VARIANCE_FLOOR)), 1.0)
    return (source - source.mean(0)) * scale + reference.mean(0)


def mean_std(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean and standard deviation matching per RGB channel, the plainest baseline."""
    return _match_mean_std(source, reference).clip(0, 1)


def reinhard(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean and standard deviation matching in l-alpha-beta (Reinhard et al. 2001, "Color Transfer between Images")."""
    source, reference = (np.log10(x @ RGB_TO_LMS.T + LOG_OFFSET) @ LMS_TO_LAB.T for x in (source, reference))
    logs = _match_mean_std(source, reference) @ np.linalg.inv(LMS_TO_LAB).T
    return ((10 ** logs.clip(max=LOG_MAX) - LOG_OFFSET) @ np.linalg.inv(RGB_TO_LMS).T).clip(0, 1)


def _principal(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations (3), floored where the region is flat, along its principal axes (3x3, in columns)."""
    values, axes = np.linalg.eigh(np.cov(pixels.T, bias=True))
    return np.sqrt(values.clip(min=0) + VARIANCE_FLOOR), axes


def xiao_ma(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean and covariance matching in RGB (Xiao and Ma 2006, "Color Transfer in Correlated Color Space").

    Principal axes go onto principal axes. An axis has no direction of its own: it is taken so that it does not turn by
    more than a right angle.
    """
    (own_std, own_axes), (std, axes) = _principal(source), _principal(reference)
    direction = np.where((own_axes * axes).sum(0) < 0, -1.0, 1.0)
    matrix = (axes * direction * (std / own_std)) @ own_axes.T
    return ((source - source.mean(0)) @ matrix.T + reference.mean(0)).clip(0, 1)


def histogram_match(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cumulative histogram matching of each YCbCr channel (Fecker et al. 2008, "Histogram-Based Prefiltering for
    Luminance and Chrominance Compensation of Multiview Video")."""
    source, reference = (np.rint(rgb2ycbcr(x) / YCBCR_STEP) * YCBCR_STEP for x in (source, reference))
    return ycbcr2rgb(match_histograms(source, reference, channel_axis=-1)).clip(0, 1)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """IDT_QUANTILES evenly spaced quantiles of every column: of IDT_PIXELS of the values, but for the two ends."""
    ordered = np.sort(values[:: -(-len(values) // IDT_PIXELS)], axis=0)
    found = ordered[np.rint(np.linspace(0, len(ordered) - 1, IDT_QUANTILES)).astype(int)]
    found[0], found[-1] = values.min(0), values.max(0)
    return found


def distribution_transfer(source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Iterative N-dimensional distribution transfer in RGB (Pitié et al. 2007, "Automated colour grading using colour
    distribution transfer"): match the marginals along the axes of one rotation after another.

    The rotations are random but always the same ones; the first is the identity. No regraining.
    """
    draws = rng("color", "rotations").standard_normal((IDT_STEPS - 1, 3, 3))
    for rotation in (np.eye(3), *np.linalg.qr(draws)[0]):
        rotated = source @ rotation.T
        own, wanted = _quantiles(rotated), _quantiles(reference @ rotation.T)
        matched = np.stack([np.interp(rotated[:, axis], own[:, axis], wanted[:, axis]) for axis in range(3)], axis=1)
        source = source + (matched - rotated) @ rotation
    return source.clip(0, 1)


TRANSFERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "reinhard": reinhard,
    "xiao-ma": xiao_ma,
    "histogram": histogram_match,
    "distribution": distribution_transfer,
}
BASELINES = {"reinhard": reinhard, "histogram": histogram_match, "mean-std": mean_std}


def harmonize_classically(image: np.ndarray, mask: np.ndarray, method: str) -> np.ndarray:
    """A classical baseline: the foreground takes the statistics of the image's own background.

    image HxWx3 uint8; mask HxW bool; method one of BASELINES. Returns HxWx3 uint8 with the background untouched.
    Raises HarmonyError for an unknown method or a mask without foreground or without background.
    """
    if method not in BASELINES:
        raise HarmonyError(f"baseline {method!r} is unknown; use {', '.join(BASELINES)}")
    if mask.all() or not mask.any():
        raise HarmonyError("mask has no foreground or no background; the baseline needs both")
    result = image.copy()
    result[mask] = np.rint(BASELINES[method](image[mask] / 255.0, image[~mask] / 255.0) * 255).astype(np.uint8)
    return result
