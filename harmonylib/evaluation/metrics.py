"""Scores of harmonized images under the protocols of five code bases and our own, and their summaries.

Peers' numbers differ by definition before they differ by model: `PROTOCOLS` writes each definition down as data. What
IIH does to predictions and HDNet to its model's input happens before there is anything to score (`Protocol.note`).
Where a code base has an error that it does not report (`Protocol.reports`), "standard" fills in on its arrays (HDNet's
fSSIM: its own SSIM map). Similarity takes half of the time, so protocols that report none have none.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from ..core.errors import HarmonyError
from ..core.images import paste, resize_mask
from .statistics import bootstrap_mean

METRICS = ("mse", "psnr", "fmse", "bmse", "ssim", "fssim")
SIDE = 256
EDGES = (0, 0.05, 0.15, 1)  # of the foreground's share (DiffHarmony++, Table 3)
GAUSSIAN = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
SSIM = {  # kind: (window per axis, size of the sample that variances are estimated from, range of values, border)
    "gaussian": (GAUSSIAN / GAUSSIAN.sum(), math.inf, 255, cv2.BORDER_REFLECT),
    "uniform": (np.full(7, 1 / 7), 49, 255, cv2.BORDER_REFLECT),
    "zero-padded": (GAUSSIAN / GAUSSIAN.sum(), math.inf, 1, cv2.BORDER_CONSTANT),  # values are 0..255 all the same
}


@dataclass(frozen=True)
class Protocol:
    """The choices of one evaluation code."""

    resize: str | None  # to 256x256 by "pil-bilinear", "pil-bicubic" or "cv2-linear"; None keeps the size
    quantise: str  # of float predictions: "truncate", "round", "wrap" (modulo 256), "clamp" (stays float)
    background: str  # "predicted", or "real": pasted after the resize
    mask: str  # of files: "dithered" (PIL's mode "1"), "hard" (grey > 127), "soft" (0..1, weighs squares once)
    peak: str  # of the PSNR: "255", "real-max" or "predicted-range"
    closed: str  # edge that a foreground-share bucket holds: "left", "right", "both" (edges count twice)
    reports: tuple = METRICS  # the metrics that the code itself prints
    full: bool = True  # whether masks of 100 % are in the last bucket
    epsilon: float = 0.0  # added to the MSE under the PSNR and to fMSE's denominator
    whole_fmse: bool = False  # fMSE = whole-image MSE * HW / area: background errors count
    ssim: str = "gaussian"  # of `SSIM`
    note: str = ""  # what its code does before there is anything to score


# Read in the code of nicecv/DiffHarmony (run as its script does), SamsungLabs/image_harmonization (saic),
# chenhaoxing/HDNet, bcmi/Image-Harmonization-Dataset-iHarmony4 (DoveNet: flat predictions lose) and
# zhenglab/IntrinsicHarmony (IIH: the contrastive paper's Table III quotes its SSIM and fSSIM x100). That DoveNet and
# IIH truncate is inferred: they cast to uint8 or save as such. "standard" is ours.
PROTOCOLS = {
    "standard": Protocol(None, "round", "predicted", "hard", "255", "left"),
    "diffharmony": Protocol("pil-bilinear", "truncate", "real", "dithered", "255", "left", METRICS[:4], full=False),
    "saic": Protocol("cv2-linear", "clamp", "predicted", "soft", "real-max", "both", METRICS[:3], epsilon=1e-6),
    "hdnet": Protocol(
        "pil-bilinear", "wrap", "predicted", "dithered", "255", "right", ("mse", "psnr", "fmse", "ssim"),
        whole_fmse=True, ssim="uniform", note="its code gives the model the real photo's background"),
    "dovenet": Protocol("pil-bilinear", "truncate", "predicted", "dithered", "predicted-range", "left", METRICS[:2]),
    "iih": Protocol(
        "pil-bicubic", "truncate", "predicted", "dithered", "255", "left", ("mse", "psnr", "fmse", "ssim", "fssim"),
        ssim="zero-padded", note="its code reads predictions that it saved as JPEG; save yours so to compare"),
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """Raises HarmonyError for a name that is not in `PROTOCOLS`."""
    if name not in PROTOCOLS:
        raise HarmonyError(f"protocol {name!r}: unknown; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def score(
    pred: np.ndarray, real: np.ndarray, mask: np.ndarray, protocol: str = "diffharmony",
    composite: np.ndarray | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of one prediction against the real image, on the 0..255 scale: mse, psnr, fmse, bmse, ssim, fssim.

    pred: HxWx3 uint8, or float in 0..255 (how it becomes uint8 is the protocol's choice), of real's size or, where the
    protocol resizes, 256x256. real: HxWx3 uint8.
    mask: HxW bool, True = foreground; for "saic" also float in 0..1. composite: HxWx3 uint8; where given, its
    background is pasted on the prediction first, at full size. protocol: a name in `PROTOCOLS`.

    Documented values: identical images have mse 0, ssim 1 and psnr inf ("saic": 10 log10(peak^2 / 1e-6)); a psnr peak
    of 0 gives -inf. A mask that is empty (after the resize) has fmse and fssim nan; one that covers everything has
    bmse nan. ssim and fssim are nan for images smaller than the window and where the protocol has no ssim.
    Raises HarmonyError for an unknown protocol, sizes that differ, a wrong dtype or shape, NaN, or values out of range.
    """
    choice = find_protocol(protocol)
    size, soft = np.shape(real)[:2], choice.mask == "soft"
    small = choice.resize and composite is None and np.shape(pred)[:2] == (SIDE, SIDE)
    _check("real", real, size)
    _check("pred", pred, (SIDE, SIDE) if small else size, floats=True)
    _check("mask", mask, size, floats=soft)
    mask = mask.astype(np.float32) if soft else mask
    pred = _quantise(pred, choice.quantise)
    if composite is not None:
        _check("composite", composite, size)
        pred = paste(pred, composite, mask > 0.5).astype(pred.dtype)
    pred, real, mask = _resize(pred, real, mask, choice.resize)
    if choice.background == "real":
        pred = paste(pred, real, mask)

    pixels, area = mask.size, float(mask.sum(dtype=np.float64))
    if soft:
        difference = pred.astype(np.float32) - real
        squared = cv2.transform(difference * difference, np.ones((1, 3)))
        total, inside = (float(values.sum(dtype=np.float64)) for values in (squared, squared * mask))
    else:  # of uint8: whole numbers, of which OpenCV returns a squared root
        where = mask.view(np.uint8)
        total, inside = (round(cv2.norm(pred, real, cv2.NORM_L2SQR, mask=m)) for m in (None, where))
    mse, fmse = total / (3 * pixels), math.nan
    if area > 0:
        fmse = mse * pixels / area if choice.whole_fmse else inside / (3 * area + choice.epsilon)
    bmse = (total - inside) / (3 * (pixels - area)) if area < pixels else math.nan
    peak = {"255": 255.0, "real-max": float(real.max()), "predicted-range": float(np.ptp(pred))}[choice.peak]
    noise = mse + choice.epsilon
    psnr = math.inf if noise == 0 else 10 * math.log10(peak**2 / noise) if peak > 0 else -math.inf
    similarity = _ssim(pred, real, mask, choice.ssim) if "ssim" in choice.reports else (math.nan, math.nan)
    return dict(zip(METRICS, (mse, psnr, fmse, bmse, *similarity), strict=True))


def _ssim(pred, real, mask, kind: str) -> tuple[float, float]:
    """Structural similarity (Wang et al. 2004) of the image and of the mask, as scikit-image defines it, at a quarter
    of its time; zero-padded, the image's edges count, too."""
    window, sample, scale, border = SSIM[kind]
    edge, padded = len(window) // 2, border == cv2.BORDER_CONSTANT
    if min(mask.shape) < len(window):
        return math.nan, math.nan
    number = np.float64 if padded else np.float32  # float32 keeps the variances of values around 0
    shift = number(0 if padded else np.rint(real.mean()))
    x, y = pred.astype(number) - shift, real.astype(number) - shift
    mean_x, mean_y, squares, products = (cv2.sepFilter2D(values, -1, window, window, borderType=border)
                                         for values in (x, y, x * x + y * y, x * y))  # fmt: skip
    unbiased = number(1 / (1 - 1 / sample))
    variances, covariance = unbiased * (squares - mean_x**2 - mean_y**2), unbiased * (products - mean_x * mean_y)
    c1, c2, mean_x, mean_y = number((0.01 * scale) ** 2), number((0.03 * scale) ** 2), mean_x + shift, mean_y + shift
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    similarity = cv2.transform(similarity, np.full((1, 3), 1 / 3))  # their mean, at a fraction of numpy's time
    fssim = float((similarity * mask).sum(dtype=np.float64) / mask.sum(dtype=np.float64)) if mask.any() else math.nan
    inner = similarity if padded else similarity[edge:-edge, edge:-edge]
    return float(inner.mean(dtype=np.float64)), fssim


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
    resampling = Image.Resampling[rule.removeprefix("pil-").upper()]
    images = [a if a.shape[:2] == size else np.asarray(Image.fromarray(a).resize(size, resampling))
              for a in (pred, real)]  # fmt: skip
    return *images, resize_mask(mask, size)


def _check(name: str, array, size, floats: bool = False) -> None:
    """Raises HarmonyError unless `array` is an image, or the mask, of this size and of a dtype that is allowed."""
    dtype, shape, allowed = getattr(array, "dtype", None), (*size, 3), np.uint8
    if name == "mask":
        shape, allowed = tuple(size), bool
    if np.shape(array) != shape or not np.size(array):
        got, want = ("x".join(map(str, numbers)) for numbers in (np.shape(array), shape))
        raise HarmonyError(f"{name}: {got or 'nothing'} instead of {want} (height, width, colours) like real; mend it")
    real_valued = floats and np.issubdtype(dtype or object, np.floating)
    if dtype != allowed and not real_valued:
        either = " or floats" if floats else ""
        raise HarmonyError(f"{name}: {dtype} instead of {allowed.__name__}{either}; convert it (a mask: mask > 127)")
    if real_valued and not np.isfinite(array).all():
        raise HarmonyError(f"{name}: has NaN or infinite values; the model diverged or divided by zero")
    if real_valued and (not 0 <= array.min() <= array.max() <= 1 if name == "mask" else 0 < array.max() <= 1):
        wanted = "0..1; divide an 8-bit mask by 255" if name == "mask" else "0..255; scale them"
        raise HarmonyError(f"{name}: floats from {array.min():g} to {array.max():g} instead of {wanted}")


def summarise(table: pd.DataFrame, parts: dict[str, pd.Series] | None = None) -> dict:
    """Averages over images (per-image values first, then the mean), over all and per part.

    table: one row per model and image with columns model, subset, name, photo and any of `METRICS`. parts: {name: a
    bool for each row}; None: the subsets.
    Returns {model: {"all" | part: {"n", "photos", metric: mean, "interval": {metric: [lo, hi]}}}}; the intervals are
    95 % bootstraps over photos. Undefined values (fmse of an empty mask) are left out and identical images make psnr
    inf: either adds a "status" line. Empty parts have n 0 and None for every metric.
    Raises HarmonyError when columns are missing, an image occurs twice, or models cover different images: a missing
    prediction must never become a smaller average.
    """
    missing = [column for column in ("model", "subset", "name", "photo") if column not in table]
    if missing or table.empty:
        raise HarmonyError(f"per-image table: no rows, or no column {', '.join(missing)}; score at least one image")
    counts = table.groupby(["subset", "name", "model"], sort=False).size().unstack(fill_value=0)
    for model, count in counts.items():
        if count.max() > 1:
            raise HarmonyError(f"per-image table: {'/'.join(count.idxmax())} occurs twice for {model}; keep one row")
        if count.min() < 1:
            lost = f"{(count < 1).sum()} of {len(count)} predictions are missing ({'/'.join(count.idxmin())}, ...)"
            raise HarmonyError(f"{model}: {lost}; make them or score all alike")
    if parts is None:
        parts = {name: table["subset"] == name for name in sorted(table["subset"].unique())}
    parts, models = {"all": table["name"].notna()} | parts, table["model"]
    return {model: {name: _summary(table[(models == model) & inside]) for name, inside in parts.items()}
            for model in models.unique()}  # fmt: skip


def buckets(table: pd.DataFrame, protocol="standard") -> dict:
    """Averages by foreground ratio (DiffHarmony++ Table 3): `summarise` with the parts "0-5%", "5-15%" and "15-100%".

    A bucket of the "standard" protocol holds its lower edge and not its upper one, except the last, which holds both.
    Other protocols have the rule of their code: "diffharmony" drops masks of 100 %, "hdnet" closes buckets above,
    "saic" on both sides, so that an edge counts twice. Raises HarmonyError for ratios outside 0..1 or missing.
    """
    choice, ratio, parts = PROTOCOLS[protocol], table["foreground_ratio"], {}
    if not ratio.between(0, 1).all():
        raise HarmonyError("foreground_ratio: values outside 0..1 or NaN; give the mask's mean")
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        last = high == 1 and choice.closed == "left" and choice.full
        parts[f"{100 * low:g}-{100 * high:g}%"] = ratio.between(low, high, "both" if last else choice.closed)
    return summarise(table, parts)


def _summary(rows: pd.DataFrame) -> dict:
    metrics = [metric for metric in METRICS if metric in rows]
    summary = {"n": len(rows), "photos": int(rows["photo"].nunique())}
    if rows.empty:
        return summary | dict.fromkeys(metrics) | {"interval": {metric: [None, None] for metric in metrics}}
    estimates = dict(zip(metrics, np.transpose(bootstrap_mean(rows[metrics], rows["photo"])).tolist(), strict=True))
    summary |= {metric: mean for metric, (mean, *_) in estimates.items()}
    summary["interval"] = {metric: ends for metric, (_, *ends) in estimates.items()}
    status = []
    for metric in metrics:
        odd = {"infinite": np.isinf(rows[metric]).sum(), "undefined, left out": rows[metric].isna().sum()}
        status += [f"{metric}: {word} for {count} of {len(rows)} images" for word, count in odd.items() if count]
    if summary["photos"] == 1:
        status.append("interval: one photo, nothing to resample")
    return summary | ({"status": "; ".join(status)} if status else {})


def compare(table: pd.DataFrame, first: str, second: str) -> dict:
    """Paired differences first - second of two models, image by image: {"n", "photos", metric: (mean, lo, hi)}.

    table as of `summarise`; intervals are 95 % bootstraps over photos. An image where either value is undefined or
    infinite is left out, which adds a "status" line; a metric that has no image left is absent.
    Raises HarmonyError where a model has no rows or the two cover different images.
    """
    a, b = (table[table["model"] == model].set_index(["subset", "name"]) for model in (first, second))
    if a.empty or len(a) != len(b) or not a.index.isin(b.index).all():
        raise HarmonyError(f"{first} and {second}: not the same images, or none; score both on one list")
    result, status = {"n": len(a), "photos": int(a["photo"].nunique())}, []
    for metric in (metric for metric in METRICS if metric in table):
        difference = (a[metric] - b[metric].loc[a.index]).replace([np.inf, -np.inf], np.nan).dropna()
        if len(difference):
            result[metric] = bootstrap_mean(difference, a["photo"].loc[difference.index])
        if left_out := len(a) - len(difference):
            status.append(f"{metric}: infinite or undefined, left out for {left_out} of {len(a)} images")
    return result | ({"status": "; ".join(status)} if status else {})
