"""Intervals over photos: composites of one photo are not independent, so whole photos are resampled."""

import math

import numpy as np

from ..core.errors import HarmonyError

HOLDS = "holds here"
ABSENT = "does not show at this scale"
NOT_RUN = "not run"
TOO_FEW = "too few photos for a verdict"


def bootstrap_mean(values, photos, repeats=2000, level=0.95, seed=0):
    """Mean over images and its percentile bootstrap interval, resampling photos (the cluster bootstrap).

    values: N, or NxM for M metrics at once. photos: N labels, equal for images made from one photo.
    Returns (mean, lo, hi), floats for N values and arrays of M for NxM. NaN values (undefined, as fmse under an empty
    mask) are left out. With one photo, or where a value is infinite, lo and hi are NaN: there is nothing to resample.
    The same photos, repeats and seed draw the same resamples, so the columns and repeated calls are comparable.
    Raises HarmonyError for no values, lengths that differ, or a level outside (0, 1).
    """
    table = np.asarray(values, dtype=np.float64)
    single = table.ndim == 1
    table = table[:, None] if single else table
    photos = np.asarray(photos)
    if table.ndim != 2 or not table.size or photos.shape != table.shape[:1]:
        raise HarmonyError(
            f"values {np.shape(values)} and photos {photos.shape}: give values and one photo label per image"
        )
    if not 0 < level < 1 or repeats < 1:
        raise HarmonyError(f"level {level}, repeats {repeats}: level lies between 0 and 1, repeats is at least 1")
    defined = ~np.isnan(table)
    clusters, cluster = np.unique(photos, return_inverse=True)
    sums, counts = np.zeros((2, len(clusters), table.shape[1]))
    np.add.at(sums, cluster, np.where(defined, table, 0.0))
    np.add.at(counts, cluster, defined)

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / counts.sum(0)
        resampled = _resample(sums, counts, repeats, seed)
    lo, hi = np.full((2, table.shape[1]), np.nan)
    if len(clusters) > 1:
        for column in np.flatnonzero(np.isfinite(mean)):
            draws = resampled[:, column]  # NaN where a resample holds no defined value
            lo[column], hi[column] = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    if single:
        return float(mean[0]), float(lo[0]), float(hi[0])
    return mean, lo, hi


def _resample(sums, counts, repeats, seed) -> np.ndarray:
    """Means of `repeats` resamples of the clusters (rows of sums and counts), repeats x M; memory is bounded."""
    rng, n = np.random.default_rng(seed), len(sums)
    sums = np.where(np.isfinite(sums), sums, 0.0)  # columns with infinities get no interval
    means, block = [], max(1, 4_000_000 // n)
    for start in range(0, repeats, block):
        rows = min(block, repeats - start)
        drawn = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        means.append((weights @ sums) / (weights @ counts))
    return np.concatenate(means)


def paired_difference(a, b, photos, repeats=2000, level=0.95, seed=0):
    """Mean of a - b per image with its interval over photos: (mean, lo, hi).

    a, b: N values of one metric for two models on the same images in the same order. Pairs without a defined
    difference (NaN, or two infinite PSNRs) are left out. Raises HarmonyError as `bootstrap_mean`, and for lengths that
    differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise HarmonyError(f"a {a.shape} and b {b.shape}: give both models' values for the same images")
    with np.errstate(invalid="ignore"):
        return bootstrap_mean(a - b, photos, repeats, level, seed)


def reduction(after, before, photos, repeats=2000, level=0.95, seed=0):
    """1 - mean(after) / mean(before) of a squared error with its interval over photos: (value, lo, hi).

    after, before: N values on the same images. Raises HarmonyError as `bootstrap_mean`.
    """
    table, photos = np.stack([after, before], axis=1).astype(np.float64), np.asarray(photos)
    value = 1 - table[:, 0].mean() / table[:, 1].mean()
    clusters, cluster = np.unique(photos, return_inverse=True)
    sums = np.zeros((len(clusters), 2))
    np.add.at(sums, cluster, table)
    if len(clusters) < 2:
        return float(value), float("nan"), float("nan")
    draws = _resample(sums, np.ones_like(sums), repeats, seed)
    lo, hi = np.quantile(1 - draws[:, 0] / draws[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(value), float(lo), float(hi)


def verdict(difference, lo, hi, n_photos, minimum_photos=20) -> str:
    """What a measured effect says about a claim; never a verdict without a number.

    difference, lo, hi: the effect and its interval, positive where it supports the claim (turn the sign for MSE; for
    "stays the same" claims pass margin - |effect|). None or NaN as difference: "not run". Fewer than `minimum_photos`
    photos: "too few photos for a verdict". Else "holds here" when the whole interval lies above 0, otherwise
    "does not show at this scale".
    """
    if difference is None or math.isnan(difference):
        return NOT_RUN
    if n_photos < minimum_photos:
        return TOO_FEW
    return HOLDS if difference > 0 and lo is not None and lo > 0 and hi >= lo else ABSENT
