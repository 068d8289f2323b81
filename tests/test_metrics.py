"""Scores with values worked out by hand, protocol by protocol, and the summaries made of them."""

import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from harmonylib.core.errors import HarmonyError
from harmonylib.evaluation.metrics import METRICS, PROTOCOLS, buckets, compare, score, summarise

NAMES = tuple(PROTOCOLS)


def grey(value, side=256, dtype=np.uint8):
    return np.full((side, side, 3), value, dtype)


def quarter():
    """The left 64 of 256 columns: a quarter of the area."""
    mask = np.zeros((256, 256), bool)
    mask[:, :64] = True
    return mask


@pytest.fixture
def flat():
    """Real 100; the prediction is 110 in the foreground (error 10) and 102 in the background (error 2)."""
    pred = grey(102)
    pred[quarter()] = 110
    return pred, grey(100), quarter()


# mse = 1/4 * 10^2 + 3/4 * 2^2 = 28 with the predicted background, 25 with the real one pasted
@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("standard", {"mse": 28, "psnr": 10 * math.log10(65025 / 28), "fmse": 100, "bmse": 4}),
        ("diffharmony", {"mse": 25, "psnr": 34.15140352195873, "fmse": 100, "bmse": 0}),
        ("saic", {"mse": 28, "psnr": 10 * math.log10(100**2 / 28), "fmse": 100, "bmse": 4}),  # peak: max of real
        ("hdnet", {"mse": 28, "psnr": 10 * math.log10(65025 / 28), "fmse": 28 * 4, "bmse": 4}),  # whole error / area
        ("dovenet", {"mse": 28, "psnr": 10 * math.log10(8**2 / 28), "fmse": 100, "bmse": 4}),  # peak: range of pred
        ("iih", {"mse": 28, "psnr": 10 * math.log10(65025 / 28), "fmse": 100, "bmse": 4}),
    ],
)
def test_flat_images_by_hand(flat, protocol, expected):
    result = score(*flat, protocol)
    assert set(result) == set(METRICS)
    for metric, value in expected.items():
        assert result[metric] == pytest.approx(value, rel=1e-6), metric


# A float prediction of 110.6 on 100: rounded 111, truncated 110, kept 110.6
@pytest.mark.parametrize(
    ("protocol", "fmse"),
    [("standard", 121), ("diffharmony", 100), ("hdnet", 100), ("dovenet", 100), ("iih", 100), ("saic", 10.6**2)],
)
def test_quantisation_of_float_predictions(protocol, fmse):
    everything = np.ones((256, 256), bool)
    result = score(grey(110.6, dtype=np.float32), grey(100), everything, protocol)
    assert result["fmse"] == pytest.approx(fmse, rel=1e-5)


# 260 on 255: clipped to 255 everywhere, but HDNet's cast wraps to 4
@pytest.mark.parametrize("protocol", NAMES)
def test_predictions_out_of_range(protocol):
    mse = score(grey(260.0, dtype=np.float64), grey(255), np.ones((256, 256), bool), protocol)["mse"]
    assert mse == (251**2 if protocol == "hdnet" else 0)


def test_soft_masks_weigh_squared_errors_once(flat):
    # foreground weight 1/2: sum(m d^2) / sum(m) stays 100, where (m d)^2 would give 50
    # background: (1/4 * 1/2 * 10^2 + 3/4 * 2^2) / (1/4 * 1/2 + 3/4) = 15.5 / 0.875
    pred, real, mask = flat
    result = score(pred, real, mask * 0.5, "saic")
    assert result["fmse"] == pytest.approx(100)
    assert result["bmse"] == pytest.approx(15.5 / 0.875)


def test_ssim_is_scikit_images():
    rng = np.random.default_rng(0)
    real = np.array(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((256, 256)))
    pred = np.clip(real + rng.integers(-9, 10, real.shape), 0, 255).astype(np.uint8)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for protocol, options in (("standard", gaussian), ("hdnet", {})):
        value, full = structural_similarity(pred, real, data_range=255, channel_axis=2, full=True, **options)
        result = score(pred, real, quarter(), protocol)
        assert (result["ssim"], result["fssim"]) == pytest.approx((value, full[quarter()].mean()), abs=2e-6)


def test_ssim_of_flat_images_by_hand():
    # No variance: only (2 * 100 * 110 + C1) / (100^2 + 110^2 + C1) is left, C1 = 2.55^2 (IIH: 1e-4, inside)
    inside = np.zeros((256, 256), bool)
    inside[64:128, 64:128] = True
    for protocol in ("standard", "hdnet"):
        result = score(grey(110), grey(100), inside, protocol)
        assert result["ssim"] == pytest.approx(22006.5025 / 22106.5025, abs=1e-6)
        assert result["fssim"] == pytest.approx(22006.5025 / 22106.5025, abs=1e-6)
    assert score(grey(110), grey(100), inside, "iih")["fssim"] == pytest.approx(22000.0001 / 22100.0001, abs=1e-7)


def test_iih_ssim_pads_with_zeros():
    # In the corner the window covers weight s = q^2 with q = (1 + middle tap) / 2, the rest sees 0. So the means are
    # 100 s and 110 s, the variances 100^2 and 110^2 times s (1 - s), and the covariance 100 * 110 * s (1 - s).
    taps = [math.exp(-(k**2) / 4.5) for k in range(-5, 6)]
    s = ((1 + taps[5] / sum(taps)) / 2) ** 2
    spread = s * (1 - s)
    luminance = (2 * 11000 * s**2 + 1e-4) / (22100 * s**2 + 1e-4)
    structure = (2 * 11000 * spread + 9e-4) / (22100 * spread + 9e-4)
    corner = np.zeros((256, 256), bool)
    corner[0, 0] = True
    assert score(grey(110), grey(100), corner, "iih")["fssim"] == pytest.approx(luminance * structure, rel=1e-9)


@pytest.mark.parametrize("protocol", NAMES)
def test_real_against_itself(protocol):
    real = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    mask = np.arange(200) < np.full((300, 1), 50)
    result = score(real, real, mask, protocol)
    assert result["mse"] == result["fmse"] == result["bmse"] == 0
    similar = 1 if "ssim" in PROTOCOLS[protocol].reports else math.nan
    assert [result["ssim"], result["fssim"]] == pytest.approx([similar] * 2, abs=1e-6, nan_ok=True)
    assert result["psnr"] == math.inf if protocol != "saic" else 107 < result["psnr"] < 108.2  # 10 log10(peak^2 / 1e-6)


@pytest.mark.parametrize("protocol", NAMES)
def test_empty_and_full_masks(flat, protocol):
    pred, real, mask = flat
    empty = score(pred, real, np.zeros_like(mask), protocol)
    assert math.isnan(empty["fmse"]) and math.isnan(empty["fssim"]) and math.isfinite(empty["bmse"])
    full = score(pred, real, np.ones_like(mask), protocol)
    assert math.isnan(full["bmse"]) and full["fmse"] == pytest.approx(28)  # here the foreground is the image


@pytest.mark.parametrize("protocol", [name for name in NAMES if name != "saic"])
def test_errors_are_the_digits_of_plain_sums(protocol):
    rng = np.random.default_rng(2)
    pred, real = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    mask = rng.random((256, 256)) > 0.7
    pred = np.where(mask[..., None], pred, real) if protocol == "diffharmony" else pred
    squares = (pred.astype(np.int64) - real) ** 2
    result, whole = score(pred, real, mask, protocol), PROTOCOLS[protocol].whole_fmse
    assert result["mse"] == squares.sum() / (3 * 256 * 256)
    assert result["fmse"] == pytest.approx(squares[slice(None) if whole else mask].sum() / (3 * mask.sum()), rel=1e-15)
    assert result["bmse"] == squares[~mask].sum() / (3 * (~mask).sum())


def test_small_images_and_a_peak_of_zero():
    small = score(grey(1, 2), grey(2, 2), np.ones((2, 2), bool), "standard")
    assert small["mse"] == 1 and math.isnan(small["ssim"]) and math.isnan(small["fssim"])  # smaller than the window
    assert score(grey(90), grey(100), quarter(), "dovenet")["psnr"] == -math.inf  # a flat prediction
    assert score(grey(90), grey(0), quarter(), "saic")["psnr"] == -math.inf  # a black real image
    assert score(grey(0), grey(255), quarter(), "standard")["psnr"] == 0  # differences of uint8 do not wrap


def test_composite_background_is_pasted(flat):
    pred, real, mask = flat
    composite = grey(101)
    result = score(pred, real, mask, "standard", composite=composite)
    assert (result["fmse"], result["bmse"]) == (100, 1)
    assert score(pred, real, mask, "diffharmony", composite=composite)["bmse"] == 0  # the real one still wins
    assert pred[0, 255, 0] == 102  # the caller's array is untouched


@pytest.mark.parametrize("protocol", NAMES)
def test_views_score_like_copies(protocol):
    rng = np.random.default_rng(1)
    pred, real = rng.integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    mask = rng.random((40, 60)) > 0.5
    flipped = [array[::-1, ::-1] for array in (pred, real, mask)]
    expected = score(*(np.ascontiguousarray(array) for array in flipped), protocol)
    assert score(*flipped, protocol) == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "lpips"}, "protocol 'lpips'"),
        ({"pred": grey(1, 128)}, "pred: 128x128x3 instead of 256x256x3"),
        ({"pred": grey(1)[..., 0]}, "pred: 256x256 instead"),
        ({"pred": Image.new("RGB", (256, 256))}, "pred: None instead of uint8 or floats"),
        ({"pred": grey(1, dtype=np.int32)}, "pred: int32"),
        ({"pred": grey(np.nan, dtype=np.float32)}, "pred: has NaN"),
        ({"pred": grey(0.5, dtype=np.float32)}, "0..255; scale them"),
        ({"real": grey(1, dtype=np.float32)}, "real: float32 instead of uint8"),
        ({"real": None}, "real: nothing"),
        ({"mask": np.zeros((128, 128), bool)}, "mask: 128x128"),
        ({"mask": np.zeros((256, 256), np.uint8)}, "mask > 127"),
        ({"mask": np.full((256, 256), 255.0), "protocol": "saic"}, "divide an 8-bit mask by 255"),
        ({"composite": grey(1, 128)}, "composite: 128x128"),
    ],
)
def test_bad_input(flat, change, words):
    arguments = dict(zip(("pred", "real", "mask"), flat, strict=True)) | change
    with pytest.raises(HarmonyError, match=words) as caught:
        score(**arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def table():
    """Two models on two photos of two composites each, one of another subset."""
    images = [("a1", "A", "pa", 0.05, 10.0), ("a2", "A", "pa", 0.02, 30.0), ("b1", "B", "pb", 1.0, 50.0),
              ("b2", "B", "pb", 0.5, 70.0)]  # fmt: skip
    rows = [(*image, mse, model) for model in ("composite", "ours") for *image, mse in images]
    rows = pd.DataFrame(rows, columns=["name", "subset", "photo", "foreground_ratio", "mse", "model"])
    rows = rows.assign(psnr=30.0, fmse=2 * rows["mse"], ssim=0.9, fssim=0.8)
    rows.loc[rows["model"] == "ours", "mse"] -= 4
    return rows


def test_summarise(table):
    result = summarise(table)
    assert list(result) == ["composite", "ours"] and list(result["ours"]) == ["all", "A", "B"]
    whole = result["ours"]["all"]
    assert (whole["n"], whole["photos"], whole["mse"], whole["psnr"]) == (4, 2, 36.0, 30.0)
    assert whole["interval"]["mse"] == [16.0, 56.0]  # with two photos the extremes are one photo drawn twice
    assert whole["interval"]["psnr"] == [30.0, 30.0]
    assert "status" not in whole and result["ours"]["B"]["mse"] == 56.0
    alone = result["ours"]["A"]  # one photo: a mean but no interval
    assert np.isnan(alone["interval"]["mse"]).all() and "one photo" in alone["status"]


def test_summarise_documents_what_is_not_a_number(table):
    table.loc[0, ["psnr", "fmse"]] = [np.inf, np.nan]
    whole = summarise(table)["composite"]["all"]
    assert whole["psnr"] == math.inf and whole["fmse"] == pytest.approx((60 + 100 + 140) / 3)
    assert whole["status"] == "psnr: infinite for 1 of 4 images; fmse: undefined, left out for 1 of 4 images"


def test_missing_and_repeated_predictions_are_errors(table):
    with pytest.raises(HarmonyError, match=r"ours: 1 of 4 predictions are missing \(B/b2"):
        summarise(table.drop(index=7))
    with pytest.raises(HarmonyError, match="a1 occurs twice for composite"):
        summarise(pd.concat([table, table.iloc[:1]]))
    with pytest.raises(HarmonyError, match="no column photo"):
        summarise(table.drop(columns="photo"))
    with pytest.raises(HarmonyError, match="no rows"):
        summarise(table.iloc[:0])
    for wrong in (table.drop(index=7), table.assign(model="composite")):
        with pytest.raises(HarmonyError, match="ours and composite: not the same images"):
            compare(wrong, "ours", "composite")


def test_buckets(table):
    # 0.05 belongs to the second bucket, 1.0 stays in the third
    result = buckets(table)["ours"]
    assert list(result) == ["all", "0-5%", "5-15%", "15-100%"]
    assert [result[name]["n"] for name in result] == [4, 1, 1, 2]
    assert [result[name]["mse"] for name in result] == [36.0, 26.0, 6.0, 56.0]
    empty = buckets(table[table["name"] != "a2"])["ours"]["0-5%"]
    assert (empty["n"], empty["photos"], empty["mse"], empty["interval"]["mse"]) == (0, 0, None, [None, None])
    with pytest.raises(HarmonyError, match="outside"):
        buckets(table.assign(foreground_ratio=np.nan))


@pytest.mark.parametrize(
    ("protocol", "counts"),  # of 0-5%, 5-15%, 15-100% (facts of each code base): edges below, above or on both sides
    [("standard", [1, 1, 3]), ("diffharmony", [1, 1, 2]), ("hdnet", [1, 1, 2]), ("saic", [2, 2, 3])],
)
def test_buckets_close_where_the_protocol_does(table, protocol, counts):
    ours = table[table["model"] == "ours"]
    rows = pd.concat([ours.assign(name=ours["name"] + str(k)) for k in range(2)]).iloc[:5]
    rows = rows.assign(foreground_ratio=[0.0, 0.05, 0.15, 0.5, 1.0])
    result = buckets(rows, protocol=protocol)["ours"]
    assert [result[name]["n"] for name in ("0-5%", "5-15%", "15-100%")] == counts and result["all"]["n"] == 5


def test_compare(table):
    # ours is 4 better on every image, so resampling changes nothing
    result = compare(table, "ours", "composite")
    assert (result["n"], result["photos"]) == (4, 2) and "status" not in result
    assert result["mse"] == (-4, -4, -4) and result["fmse"] == result["psnr"] == (0, 0, 0)
    assert compare(table.iloc[::-1], "ours", "composite")["mse"] == (-4, -4, -4)  # by name, not by place
    table.loc[0, ["psnr", "fmse"]] = [np.inf, np.nan]
    table["ssim"] = np.nan
    result = compare(table, "ours", "composite")
    assert result["psnr"] == (0, 0, 0) and result["mse"] == (-4, -4, -4) and "ssim" not in result
    assert result["status"].startswith("psnr: infinite or undefined, left out for 1 of 4 images; fmse:")
