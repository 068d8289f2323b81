import math

import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.evaluation.statistics import bootstrap_mean, reduction, verdict


def test_mean_is_over_images_and_resampling_over_photos():
    # Two photos with means 0 (3 images) and 8 (1 image): draws give 0, 2 or 8, so the interval spans them all.
    mean, lo, hi = bootstrap_mean([0, 0, 0, 8], ["a", "a", "a", "b"])
    assert (mean, lo, hi) == (2.0, 0.0, 8.0)


def test_interval_of_independent_photos_matches_theory():
    values = np.random.default_rng(1).normal(10, 2, 400)
    mean, lo, hi = bootstrap_mean(values, np.arange(400))
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert lo == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert hi == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_many_metrics_at_once_equal_one_by_one():
    values = np.random.default_rng(4).normal(size=(40, 3))
    photos = np.arange(40) // 2
    together = np.transpose(bootstrap_mean(values, photos))
    assert together == pytest.approx(np.array([bootstrap_mean(column, photos) for column in values.T]))


def test_blocks_of_resamples_cover_every_photo():
    photos = np.arange(3000)  # 1333 repeats a block, so 2000 take two
    mean, lo, hi = bootstrap_mean(photos.astype(float), photos)
    assert lo < mean < hi and hi - lo == pytest.approx(2 * 1.96 * 3000 / math.sqrt(12 * 3000), rel=0.1)


def test_undefined_infinite_and_single():
    assert bootstrap_mean([1.0, math.nan, 1.0], ["a", "b", "c"])[0] == 1.0
    mean, lo, hi = bootstrap_mean([1.0, math.inf], ["a", "b"])
    assert mean == math.inf and math.isnan(lo) and math.isnan(hi)
    mean, lo, hi = bootstrap_mean([1.0, 3.0], ["a", "a"])
    assert mean == 2.0 and math.isnan(lo) and math.isnan(hi)
    assert all(map(math.isnan, bootstrap_mean([math.nan, math.nan], ["a", "b"])))


@pytest.mark.parametrize("effect", [0.0, 0.3])
@pytest.mark.parametrize(("photos", "skewed"), [(20, False), (60, False), (60, True), (300, False), (300, True)])
def test_intervals_cover_and_nothing_gives_few_verdicts(photos, skewed, effect):
    """1,000 runs: photos with 1 to 5 composites each, which share most of their difference; two models on each."""
    rng, runs = np.random.default_rng(photos + skewed), 1000
    labels = np.repeat(np.arange(photos), rng.integers(1, 6, size=photos))
    shape = (len(labels), runs)
    own = rng.exponential(size=(photos, runs)) - 1 if skewed else rng.normal(size=(photos, runs))
    hard = rng.normal(30, 5, size=(photos, runs))[labels]  # both models meet it
    a, b = hard + effect + own[labels] + rng.normal(scale=0.5, size=shape), hard + rng.normal(scale=0.5, size=shape)
    mean, low, high = bootstrap_mean(a - b, labels)
    covered = np.mean((low <= effect) & (effect <= high))
    assert 0.93 <= covered <= 0.97
    if not effect:
        found = [verdict(*one, photos) for one in zip(mean, low, high, strict=True)]
        assert 1 - found.count("does not show here") / runs <= 0.06


def test_bad_input():
    for values, photos in (([], []), ([1, 2], ["a"])):
        with pytest.raises(HarmonyError, match="one photo label per image"):
            bootstrap_mean(values, photos)


def test_reduction():
    assert reduction([1, 1, 2], [2, 2, 4], ["a", "b", "c"]) == (0.5, 0.5, 0.5)
    assert reduction([1, 3], [2, 2], ["a", "b"]) == (0, -0.5, 0.5)  # of photo b alone, and of photo a alone
    assert np.isnan(reduction([1, 3], [2, 2], ["a", "a"])[1:]).all()


@pytest.mark.parametrize(
    ("effect", "photos", "words"),
    [
        ((1.0, 0.5, 1.5), 20, "holds here"),
        ((1.0, -0.1, 2.1), 20, "does not show here"),
        ((1.0, 0.0, 2.0), 20, "does not show here"),
        ((-1.0, -1.5, -0.5), 200, "the opposite shows"),
        ((-1.0, -1.5, 0.0), 200, "does not show here"),
        ((1.0, 0.5, 1.5), 19, "too few photos for a verdict"),
        ((1.0, None, None), 30, "does not show here"),
        ((1.0, math.nan, math.nan), 30, "does not show here"),
        ((None, None, None), 100, "not run"),
    ],
)
def test_verdict(effect, photos, words):
    assert verdict(*effect, photos) == words
