"""Intervals over photos: composites of one photo are not independent, so whole photos are resampled."""

import math

import numpy as np
from scipy.special import ndtr, stdtrit

from ..core.errors import HarmonyError

HOLDS = "holds here"
ABSENT = "does not show here"
OPPOSITE = "the opposite shows"
NOT_RUN = "not run"
TOO_FEW = "too few photos for a verdict"
MINIMUM_PHOTOS = 20  # for a verdict
REPEATS, LEVEL = 2000, 0.05


def bootstrap_mean(values, photos):
    """Mean over images and its 95 % bootstrap interval, resampling photos (the cluster bootstrap, `_ends`).

    values: N, or NxM for M metrics at once. photos: N labels, equal for images made from one photo.
    Returns (mean, lo, hi), floats for N values and arrays of M for NxM. NaN values (undefined, as fmse under an empty
    mask) are left out. With one photo, or where a value is infinite, lo and hi are NaN: there is nothing to resample.
    Equal photos draw equal resamples, so columns and calls are comparable.
    Raises HarmonyError for no values, or another number of photos.
    """
    values = np.asarray(values, np.float64)
    if not values.size or len(values) != len(photos):
        raise HarmonyError(f"values {values.shape}, {len(photos)} photos: give values and one photo label per image")
    mean, draws = _resampled(values.reshape(len(values), -1), photos)
    ends = np.full((2, len(mean)), np.nan)
    for column in np.flatnonzero(np.isfinite(mean)) if len(draws) else ():
        ends[:, column] = np.nanquantile(draws[:, column], _ends(photos))  # NaN: a resample without a defined value
    return tuple(map(float, (mean[0], *ends[:, 0]))) if values.ndim == 1 else (mean, *ends)


def _ends(photos) -> tuple[float, float]:
    """The quantiles of the resampled means that an interval lies between: those of the expanded percentile bootstrap.

    Plain percentiles are too narrow for few photos: at 20 they cover 92 % (Hesterberg 2015, section 4.3).
    """
    n = len(np.unique(photos))
    low = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, LEVEL / 2)))
    return low, 1 - low


def _resampled(table, photos) -> tuple[np.ndarray, np.ndarray]:
    """Means of an NxM table over images: M, and REPEATSxM of resampled photos (none of one photo)."""
    clusters, cluster = np.unique(photos, return_inverse=True)
    defined, n = ~np.isnan(table), len(clusters)
    sums, counts = np.zeros((2, n, table.shape[1]))
    np.add.at(sums, cluster, np.where(defined, table, 0.0))
    np.add.at(counts, cluster, defined)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / counts.sum(0)
        sums = np.where(np.isfinite(sums), sums, 0.0)  # columns with infinities get no interval
        rng, draws, block = np.random.default_rng(0), [], max(1, 4_000_000 // n)  # blocks bound the memory
        for start in range(0, REPEATS if n > 1 else 0, block):
            rows = min(block, REPEATS - start)
            drawn = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
            weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
            draws.append((weights @ sums) / (weights @ counts))
    return mean, np.concatenate(draws) if draws else np.empty((0, table.shape[1]))


def reduction(after, before, photos):
    """1 - mean(after) / mean(before) of a squared error on N images, with its interval over photos: (value, lo, hi)."""
    mean, draws = _resampled(np.stack([after, before], axis=1).astype(np.float64), photos)
    ends = np.quantile(1 - draws[:, 0] / draws[:, 1], _ends(photos)) if len(draws) else (math.nan, math.nan)
    return tuple(map(float, (1 - mean[0] / mean[1], *ends)))


def verdict(difference, lo, hi, n_photos) -> str:
    """What a measured effect says about a claim; never a verdict without a number.

    difference, lo, hi: the effect and its interval, positive where it supports the claim (turn the sign for MSE; for
    "stays the same" claims pass margin - |effect|). None or NaN as difference: "not run". Fewer than 20 photos: "too
    few photos for a verdict". Else "holds here" when the whole interval lies above 0, "the opposite shows" when it lies
    below, otherwise "does not show here".
    """
    if difference is None or math.isnan(difference):
        return NOT_RUN
    if n_photos < MINIMUM_PHOTOS:
        return TOO_FEW
    if lo is None or not lo <= hi:  # nothing to resample
        return ABSENT
    return HOLDS if lo > 0 else OPPOSITE if hi < 0 else ABSENT
