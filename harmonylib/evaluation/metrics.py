"""Scores of harmonized images under the protocols of five code bases and our own, and their summaries.

Peers' numbers differ by definition before they differ by model. `PROTOCOLS` writes each definition down as data; the
choices were read in the code that published the numbers, which `PROTOCOLS` names (that DoveNet and IIH truncate is
inferred: they cast to uint8 or save as such), except "standard", which is ours:

===========  =============  =================  ================  ==========  ==================  ====================
protocol     resize to 256  mask               float prediction  background  PSNR peak           fMSE denominator
===========  =============  =================  ================  ==========  ==================  ====================
standard     no             hard               rounded           predicted   255                 3 * area
diffharmony  PIL bilinear   dithered, nearest  truncated         real        255                 3 * area
saic         cv2 linear     soft, linear       clamped, float    predicted   max of real image   3 * area + 1e-6
hdnet        PIL bilinear   dithered, nearest  truncated, wraps  predicted   255                 area, whole MSE * HW
dovenet      PIL bilinear   dithered, nearest  truncated         predicted   prediction's range  3 * area
iih          PIL bicubic    dithered, nearest  truncated         predicted   255                 3 * area
===========  =============  =================  ================  ==========  ==================  ====================

How a mask file becomes an array (`Protocol.mask`) is the work of `folder`. What IIH does to predictions and HDNet to
its model's input happens before there is anything to score: `Protocol.note` says it. Where a code base defines no
metric (see `Protocol.reports`), "standard" fills in on its arrays (HDNet: its own map).
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from ..core.errors import HarmonyError
from ..core.images import paste, resize_mask
from .statistics import bootstrap_mean, paired_difference

METRICS = ("mse", "psnr", "fmse", "bmse", "ssim", "fssim")
SIDE = 256


@dataclass(frozen=True)
class SSIM:
    """Choices of one structural similarity: `window` 1-D taps (separable), `border` of the filter, constants C1 and C2,
    variances as `unbiased` sample estimates, `cropped`: whether the mean leaves out half a window along the edges."""

    window: tuple
    border: int
    c1: float
    c2: float
    unbiased: bool
    cropped: bool
    precision: type  # float32 is exact to 1e-5 unless C2 is tiny


def _gaussian(radius: int, sigma: float) -> tuple:
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return tuple(taps / taps.sum())


_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# skimage structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
STANDARD_SSIM = SSIM(_gaussian(5, 1.5), cv2.BORDER_REFLECT, _C1, _C2, False, True, np.float32)
# skimage's defaults: uniform 7x7 window, sample covariance
UNIFORM_SSIM = SSIM((1 / 7,) * 7, cv2.BORDER_REFLECT, _C1, _C2, True, True, np.float32)
# IIH: zero padding, and constants meant for values in 0..1 used on 0..255, so flat regions score lower
IIH_SSIM = SSIM(_gaussian(5, 1.5), cv2.BORDER_CONSTANT, 0.01**2, 0.03**2, False, False, np.float64)


@dataclass(frozen=True)
class Protocol:
    """The choices of one evaluation code (the table above). `reports` names the metrics that the code itself prints."""

    reports: tuple
    resize: str | None = "pil-bilinear"  # or "pil-bicubic", "cv2-linear"; None keeps the size
    quantise: str = "truncate"  # of float predictions; or "round", "wrap" (modulo 256), "clamp" (stays float)
    background: str = "predicted"  # or "real": pasted after the resize
    mask: str = "dithered"  # of files: PIL's mode "1"; or "hard" (grey > 127), "soft" (0..1, weighs squares once)
    peak: str = "255"  # of the PSNR; or "real-max", "predicted-range"
    closed: str = "left"  # edge that a foreground-ratio bucket holds; or "right", "both" (edges count twice)
    full: bool = True  # whether masks of 100 % are in the last bucket
    note: str = ""  # what its code does before there is anything to score
    epsilon: float = 0.0  # added to the MSE under the PSNR and to fMSE's denominator
    whole_fmse: bool = False  # fMSE = whole-image MSE * HW / area: background errors count
    ssim: SSIM = STANDARD_SSIM


PROTOCOLS = {
    "standard": Protocol(METRICS, resize=None, quantise="round", mask="hard"),
    # nicecv/DiffHarmony, run as its script does: with the real background pasted (bmse is therefore 0)
    "diffharmony": Protocol(("mse", "psnr", "fmse", "bmse"), background="real", full=False),
    # SamsungLabs/image_harmonization (saic): float predictions, soft masks, the peak is the real image's maximum
    "saic": Protocol(
        ("mse", "psnr", "fmse"),
        resize="cv2-linear",
        quantise="clamp",
        mask="soft",
        peak="real-max",
        epsilon=1e-6,
        closed="both",
    ),
    # chenhaoxing/HDNet: uint8 cast without clipping, whole-image error divided by the foreground's area
    "hdnet": Protocol(
        ("mse", "psnr", "fmse", "ssim"),
        quantise="wrap",
        whole_fmse=True,
        ssim=UNIFORM_SSIM,
        closed="right",
        note="its code gives the model the real photo's background",
    ),
    # bcmi/Image-Harmonization-Dataset-iHarmony4 (DoveNet): the peak is the prediction's range: flat ones lose
    "dovenet": Protocol(("mse", "psnr"), peak="predicted-range"),
    # zhenglab/IntrinsicHarmony (IIH): own SSIM and fSSIM, which the contrastive paper's Table III quotes x100
    "iih": Protocol(
        ("mse", "psnr", "fmse", "ssim", "fssim"),
        resize="pil-bicubic",
        ssim=IIH_SSIM,
        note="its code reads predictions that it saved as JPEG; save yours so to compare",
    ),
}


def score(pred, real, mask, protocol="diffharmony", composite=None) -> dict:
    """Metrics of one prediction against the real image, on the 0..255 scale: mse, psnr, fmse, bmse, ssim, fssim.

    pred: HxWx3 uint8, or float in 0..255 (how it becomes uint8 is the protocol's choice), of real's size or, where the
    protocol resizes, 256x256. real: HxWx3 uint8.
    mask: HxW bool, True = foreground; for "saic" also float in 0..1. composite: HxWx3 uint8; where given, its
    background is pasted on the prediction first, at full size. protocol: a name in `PROTOCOLS` (this module's table).

    Documented values: identical images have mse 0, ssim 1 and psnr inf ("saic": 10 log10(peak^2 / 1e-6)); a psnr peak
    of 0 gives -inf. A mask that is empty (after the resize) has fmse and fssim nan; one that covers everything has
    bmse nan. ssim and fssim are nan for images smaller than the window.
    Raises HarmonyError for an unknown protocol, sizes that differ, a wrong dtype or shape, NaN, or values out of range.
    """
    if protocol not in PROTOCOLS:
        raise HarmonyError(f"protocol {protocol!r}: unknown; choose one of {', '.join(PROTOCOLS)}")
    choice = PROTOCOLS[protocol]
    _check_image("real", real)
    small = choice.resize and composite is None and np.shape(pred)[:2] == (SIDE, SIDE)
    _check_image("pred", pred, size=None if small else real.shape[:2], floats=True)
    mask = _check_mask(mask, real.shape[:2], choice.mask == "soft", protocol)
    pred = _quantise(pred, choice.quantise)
    if composite is not None:
        _check_image("composite", composite, size=real.shape[:2])
        pred = paste(pred, composite, mask > 0.5).astype(pred.dtype)
    pred, real, mask = _resize(pred, real, mask, choice.resize)
    if choice.background == "real":
        pred = paste(pred, real, mask)
    return _measure(pred, real, mask, choice)


def _measure(pred, real, mask, choice: Protocol) -> dict:
    """The metrics of prepared arrays: pred uint8 or float32, real uint8, mask bool or float32."""
    difference = pred.astype(np.float32) - real
    squared = _over_channels(difference * difference, 1.0)  # whole numbers below 2^24 for uint8: exact
    pixels, area = mask.size, float(mask.sum(dtype=np.float64))
    total = float(squared.sum(dtype=np.float64))
    inside = float((squared * mask).sum(dtype=np.float64))
    mse = total / (3 * pixels)
    similarity = _ssim_map(pred, real, choice.ssim)
    fmse = fssim = bmse = ssim = math.nan
    if area > 0:
        fmse = mse * pixels / area if choice.whole_fmse else inside / (3 * area + choice.epsilon)
    if area < pixels:
        bmse = (total - inside) / (3 * (pixels - area))
    if similarity is not None:
        edge = len(choice.ssim.window) // 2 if choice.ssim.cropped else 0
        kept = similarity[edge : len(similarity) - edge, edge : similarity.shape[1] - edge]
        ssim = float(kept.mean(dtype=np.float64))
        fssim = float((similarity * mask).sum(dtype=np.float64)) / area if area > 0 else math.nan
    return {
        "mse": mse,
        "psnr": _psnr(mse + choice.epsilon, _peak(pred, real, choice.peak)),
        "fmse": fmse,
        "bmse": bmse,
        "ssim": ssim,
        "fssim": fssim,
    }


def _peak(pred, real, rule: str) -> float:
    if rule == "real-max":
        return float(real.max())
    return float(pred.max()) - float(pred.min()) if rule == "predicted-range" else 255.0


def _psnr(mse: float, peak: float) -> float:
    if mse == 0:
        return math.inf
    return 10 * math.log10(peak**2 / mse) if peak > 0 else -math.inf


def _over_channels(array, weight: float) -> np.ndarray:
    """HxWx3 -> HxW, the weighted sum of the channels (numpy's sum over a last axis of 3 takes 40 times as long)."""
    return cv2.transform(array, np.full((1, 3), weight))


def _ssim_map(pred, real, choice: SSIM) -> np.ndarray | None:
    """HxW similarity averaged over the channels (Wang et al. 2004); None for images smaller than the window.

    Equal to scikit-image's where its definition is the same, and several times as fast (`benchmarks/evaluation.py`).
    """
    if min(real.shape[:2]) < len(choice.window):
        return None
    number = choice.precision
    taps = np.asarray(choice.window)

    def local_mean(values):
        return cv2.sepFilter2D(values, -1, taps, taps, borderType=choice.border)

    # Variances do not change when both images are shifted towards 0, and float32 then keeps them; zero padding does.
    shift = number(np.rint(real.mean()) if choice.border == cv2.BORDER_REFLECT else 0)
    x, y = pred.astype(number) - shift, real.astype(number) - shift
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x + y * y) - (mean_x * mean_x + mean_y * mean_y)
    covariance = local_mean(x * y) - mean_x * mean_y
    if choice.unbiased:
        samples = len(choice.window) ** 2
        variances *= number(samples / (samples - 1))
        covariance *= number(samples / (samples - 1))
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c1, c2 = number(choice.c1), number(choice.c2)
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2)
    return _over_channels(similarity, 1 / 3)


def _quantise(pred, rule: str) -> np.ndarray:
    """Float predictions as uint8, or clamped float32; uint8 passes through."""
    if pred.dtype == np.uint8:
        return pred
    if rule == "wrap":
        return np.trunc(pred).astype(np.int64).astype(np.uint8)
    pred = np.clip(pred, 0, 255)
    if rule == "clamp":
        return pred.astype(np.float32)
    return (np.rint(pred) if rule == "round" else pred).astype(np.uint8)


def _resize(pred, real, mask, rule: str | None):
    """Everything at 256x256 by the protocol's filter; images that have this size stay untouched."""
    size = (SIDE, SIDE)
    if rule is None:
        return pred, real, mask
    if rule == "cv2-linear":  # not antialiased; the mask too, which makes its edges soft
        return tuple(cv2.resize(array, size, interpolation=cv2.INTER_LINEAR) for array in (pred, real, mask))
    resampling = Image.Resampling.BILINEAR if rule == "pil-bilinear" else Image.Resampling.BICUBIC
    images = (
        a if a.shape[:2] == size else np.asarray(Image.fromarray(a).resize(size, resampling)) for a in (pred, real)
    )
    return *images, resize_mask(mask, size)


def _check_image(name, array, size=None, floats=False) -> None:
    wanted = "HxWx3 uint8 array" + (" (or float in 0..255)" if floats else "")
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        shape = getattr(array, "shape", type(array).__name__)
        raise HarmonyError(f"{name}: expected a {wanted}, got {shape}; use harmonylib.core.images.read_image")
    if size is not None and array.shape[:2] != size:
        got, want = "x".join(map(str, array.shape[:2])), "x".join(map(str, size))
        raise HarmonyError(f"{name}: {got} pixels (HxW) but real has {want}; predict at the real image's size")
    if floats and np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise HarmonyError(f"{name}: has NaN or infinite pixels; the model diverged or divided by zero")
        if 0 < array.max() <= 1:
            raise HarmonyError(f"{name}: float values up to {array.max():g}; scale them to 0..255")
    elif array.dtype != np.uint8:
        raise HarmonyError(f"{name}: expected a {wanted}, got {array.dtype}; convert it")


def _check_mask(mask, size, soft: bool, protocol: str) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.shape != size:
        shape = getattr(mask, "shape", type(mask).__name__)
        raise HarmonyError(f"mask: expected an array of shape {size} like real's, got {shape}")
    if mask.dtype == bool:
        return mask.astype(np.float32) if soft else mask
    if not soft or not np.issubdtype(mask.dtype, np.floating):
        hint = "HxW bool or float in 0..1" if soft else "HxW bool"
        raise HarmonyError(f"mask: protocol {protocol!r} takes {hint}, got {mask.dtype}; threshold it (mask > 127)")
    if not (mask.min() >= 0 and mask.max() <= 1):  # False for NaN as well
        raise HarmonyError("mask: has NaN or values outside 0..1; divide an 8-bit mask by 255")
    return mask.astype(np.float32)


def summarise(table: pd.DataFrame, groups="subset", repeats=2000, seed=0) -> dict:
    """Averages over images (per-image values first, then the mean), over all and per value of the column `groups`.

    table: one row per model and image with columns name, photo, model, subset (or `groups`) and any of `METRICS`.
    Returns {model: {"all" | group: {"n", "photos", metric: mean, "interval": {metric: [lo, hi]}}}}; the intervals are
    95 % bootstraps over photos. Undefined values (fmse of an empty mask) are left out and identical images make psnr
    inf: either adds a "status" line; a group without rows has n 0 and None for every metric.
    Raises HarmonyError when columns are missing, an image occurs twice, or models cover different images: a missing
    prediction must never become a smaller average.
    """
    _check_table(table, groups)
    column = table[groups]
    labels = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else sorted(column.unique())
    result = {}
    for model, rows in table.groupby("model", sort=False):
        parts = {"all": rows} | {str(label): rows[rows[groups] == label] for label in labels}
        result[str(model)] = {label: _summary(part, repeats, seed) for label, part in parts.items()}
    return result


def _check_table(table: pd.DataFrame, groups: str) -> None:
    missing = [column for column in ("name", "photo", "model", groups) if column not in table]
    if missing or not any(metric in table for metric in METRICS):
        raise HarmonyError(f"per-image table: no column {', '.join(missing) or 'with a metric'}; add it")
    if table.empty:
        raise HarmonyError("per-image table: no rows; score at least one image")
    key = ["subset", "name"] if "subset" in table else ["name"]
    twice = table.duplicated(["model", *key])
    if twice.any():
        row = table[twice].iloc[0]
        raise HarmonyError(f"per-image table: {row['name']} occurs twice for {row['model']}; keep one row")
    images = table[key].drop_duplicates()
    for model, rows in table.groupby("model", sort=False):
        if len(rows) < len(images):
            absent = images.merge(rows[key], how="left", indicator=True).query("_merge == 'left_only'")
            first, count = "/".join(map(str, absent[key].iloc[0])), f"{len(absent)} of {len(images)}"
            raise HarmonyError(f"{model}: {count} predictions are missing ({first}, ...); make them or score all alike")


def _summary(rows: pd.DataFrame, repeats: int, seed: int) -> dict:
    metrics = [metric for metric in METRICS if metric in rows]
    summary = {"n": len(rows), "photos": int(rows["photo"].nunique())}
    if rows.empty:
        return summary | dict.fromkeys(metrics) | {"interval": {metric: [None, None] for metric in metrics}}
    values = rows[metrics].to_numpy(np.float64)
    mean, lo, hi = bootstrap_mean(values, rows["photo"].to_numpy(), repeats=repeats, seed=seed)
    summary |= {metric: float(value) for metric, value in zip(metrics, mean, strict=True)}
    summary["interval"] = {metric: [float(low), float(high)] for metric, low, high in zip(metrics, lo, hi, strict=True)}
    status = []
    for metric, column in zip(metrics, values.T, strict=True):
        for count, word in ((np.isinf(column).sum(), "infinite"), (np.isnan(column).sum(), "undefined, left out")):
            if count:
                status.append(f"{metric}: {word} for {count} of {len(rows)} images")
    if summary["photos"] == 1:
        status.append("interval: one photo, nothing to resample")
    return summary | ({"status": "; ".join(status)} if status else {})


def compare(table: pd.DataFrame, first: str, second: str, repeats=2000, seed=0) -> dict:
    """Paired differences first - second of two models, image by image: {"n", "photos", metric: (mean, lo, hi)}.

    table as of `summarise`; intervals are 95 % bootstraps over photos. An image where either value is undefined or
    infinite is left out, which adds a "status" line; a metric that has no image left is absent.
    Raises HarmonyError where a model has no rows or the two cover different images.
    """
    a, b = (table[table["model"] == model].set_index(["subset", "name"]) for model in (first, second))
    if a.empty or len(a) != len(b) or not a.index.isin(b.index).all():
        raise HarmonyError(f"{first} and {second}: not the same images, or none; score both on one list")
    b = b.loc[a.index]
    result, status = {"n": len(a), "photos": int(a["photo"].nunique())}, []
    for metric in (metric for metric in METRICS if metric in table):
        known = np.isfinite(a[metric]) & np.isfinite(b[metric])
        if known.any():
            values = (rows[metric][known] for rows in (a, b))
            result[metric] = paired_difference(*values, a["photo"][known], repeats, seed=seed)
        if not known.all():
            status.append(f"{metric}: infinite or undefined, left out for {(~known).sum()} of {len(a)} images")
    return result | ({"status": "; ".join(status)} if status else {})


def buckets(table: pd.DataFrame, edges=(0, 0.05, 0.15, 1), repeats=2000, seed=0, protocol="standard") -> dict:
    """Averages by foreground ratio (DiffHarmony++ Table 3): {model: {"all" | "0-5%" | "5-15%" | "15-100%": ...}}.

    Parts are as in `summarise`. A bucket of the "standard" protocol holds its lower edge and not its upper one, except
    the last, which holds both. Other protocols have the rule of their code: "diffharmony" drops masks of 100 %, "hdnet"
    closes buckets above, "saic" on both sides, so that an edge counts twice. Empty buckets have n 0 and None for every
    metric. Raises HarmonyError as `summarise`, and for ratios outside the edges or missing.
    """
    if "foreground_ratio" not in table:
        raise HarmonyError("per-image table: no column foreground_ratio; add mask.mean()")
    table = table.reset_index(drop=True)  # rows are chosen by number below
    ratio, last = table["foreground_ratio"], edges[-1]
    if not ratio.between(edges[0], last).all():
        raise HarmonyError(f"foreground_ratio: values outside {edges[0]}..{last} or NaN; give the mask's mean")
    _check_table(table, "model")
    choice, result = PROTOCOLS[protocol], {}
    parts = {"all": ratio.notna()}
    for low, high in zip(edges, edges[1:], strict=False):
        inside = ratio.between(low, high, choice.closed)
        if high == last and choice.closed == "left" and choice.full:
            inside |= ratio == last
        parts[f"{100 * low:g}-{100 * high:g}%"] = inside
    for model, rows in table.groupby("model", sort=False):
        result[str(model)] = {name: _summary(rows[inside[rows.index]], repeats, seed) for name, inside in parts.items()}
    return result
