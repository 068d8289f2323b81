import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.data.transfers import (
    BASELINES,
    TRANSFERS,
    distribution_transfer,
    harmonize_classically,
    histogram_match,
    mean_std,
    reinhard,
    xiao_ma,
)

each = pytest.mark.parametrize("transfer", (TRANSFERS | BASELINES).values(), ids=TRANSFERS | BASELINES)


def cloud(seed, count=3000, mean=(0.5, 0.45, 0.4), spread=0.05):
    """Pixels well inside (0, 1) with correlated channels."""
    draw = np.random.default_rng(seed)
    mixing = np.eye(3) + 0.5 * draw.standard_normal((3, 3))
    return (np.array(mean) + spread * draw.standard_normal((count, 3)) @ mixing).clip(0.02, 0.98)


@each
def test_equal_sets_give_the_source_back(transfer):
    pixels = np.concatenate([cloud(1), [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]]])
    np.testing.assert_allclose(transfer(pixels, pixels.copy()), pixels, atol=2e-3)


@each
def test_shape_range_and_determinism(transfer):
    source, reference = cloud(1, 500), np.random.default_rng(0).random((700, 3))
    before = source.copy()
    result = transfer(source, reference)
    assert result.shape == source.shape and result.min() >= 0 and result.max() <= 1
    np.testing.assert_array_equal(result, transfer(source, reference))
    np.testing.assert_array_equal(source, before)


@each
def test_flat_and_single_pixels_are_finite(transfer):
    flat = np.full((50, 3), 0.3)
    for source, reference in ((flat, cloud(1)), (flat[:1], cloud(1)), (np.zeros((9, 3)), flat)):
        assert np.isfinite(transfer(source, reference)).all()
    np.testing.assert_allclose(transfer(cloud(1), flat).mean(0), 0.3, atol=0.01)
    outlier = np.full((20000, 3), 0.3)
    outlier[0] = 1
    assert np.isfinite(transfer(outlier, cloud(1, 100))).all()


def test_mean_std_by_hand():
    source = np.array([[0.2, 0.5, 0.5], [0.4, 0.5, 0.5]])
    reference = np.array([[0.3, 0.6, 0.1], [0.7, 0.6, 0.3]])
    # red: mean 0.3, std 0.1 -> mean 0.5, std 0.2; flat channels only move to the reference's mean
    np.testing.assert_allclose(mean_std(source, reference), [[0.3, 0.6, 0.2], [0.7, 0.6, 0.2]], atol=1e-12)


def test_reinhard_matches_moments_in_log_opponent_space():
    def opponent(pixels):
        lms = np.array([[0.3811, 0.1967, 0.0241], [0.5783, 0.7244, 0.1288], [0.0402, 0.0782, 0.8444]])
        long, medium, short = np.log10(pixels @ lms).T
        spread = (long + medium - 2 * short) / 6**0.5
        return np.stack([(long + medium + short) / 3**0.5, spread, (long - medium) / 2**0.5])

    reference = cloud(2, mean=(0.35, 0.5, 0.6))
    result, target = opponent(reinhard(cloud(1), reference)), opponent(reference)
    np.testing.assert_allclose(result.mean(1), target.mean(1), atol=2e-3)
    np.testing.assert_allclose(result.std(1), target.std(1), rtol=0.03)


def test_xiao_ma_matches_mean_and_covariance_and_mirrors_no_channel():
    source, reference = cloud(1), cloud(2, mean=(0.4, 0.5, 0.6))
    result = xiao_ma(source, reference)
    np.testing.assert_allclose(result.mean(0), reference.mean(0), atol=1e-4)
    np.testing.assert_allclose(np.cov(result.T), np.cov(reference.T), atol=2e-5)
    wider = (source - 0.5) * (1.1, 1.2, 1.3) + 0.5
    assert all(np.corrcoef(xiao_ma(source, wider)[:, c], source[:, c])[0, 1] > 0.9 for c in range(3))


def test_histogram_match_keeps_order_and_takes_grey_values():
    source = np.repeat([[0.1], [0.4], [0.6], [0.2]], 3, axis=1)
    reference = np.repeat([[0.5], [0.3], [0.9], [0.7]], 3, axis=1)
    np.testing.assert_allclose(histogram_match(source, reference)[:, 0], [0.3, 0.7, 0.9, 0.5], atol=1e-3)


def test_distribution_transfer_takes_over_a_shape_that_moments_cannot():
    source = cloud(1)
    two = np.concatenate([cloud(4, 1500, (0.25, 0.3, 0.7), 0.01), cloud(5, 1500, (0.75, 0.6, 0.2), 0.01)])
    result = distribution_transfer(source, two)
    between = np.abs(result[:, 0] - 0.5) < 0.15
    assert between.mean() < 0.02 < 0.5 < (np.abs(source[:, 0] - 0.5) < 0.15).mean()
    np.testing.assert_allclose(np.cov(result.T), np.cov(two.T), atol=0.004)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_pull_the_foreground_to_the_background(method):
    image, mask = np.random.default_rng(0).integers(60, 200, (24, 20, 3), dtype=np.uint8), np.zeros((24, 20), bool)
    mask[5:15, 4:12] = True
    image[mask] = image[mask] // 3
    before, result = image.copy(), harmonize_classically(image, mask, method)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(result[~mask], image[~mask])
    gap = abs(result[mask].mean() - image[~mask].mean())
    assert result.dtype == np.uint8 and gap < 0.15 * abs(image[mask].mean() - image[~mask].mean())
    with pytest.raises(HarmonyError, match="'magic' is unknown; use reinhard"):
        harmonize_classically(image, mask, "magic")
    for region in (np.zeros_like(mask), np.ones_like(mask)):
        with pytest.raises(HarmonyError, match="no foreground or no background"):
            harmonize_classically(image, region, method)
