import numpy as np
import pytest

from harmonylib.data.recipes import (
    EDITS,
    RECIPES,
    RecipeSettings,
    foreground_mse,
    implausible,
    jitter,
    make_composite,
    recolor,
    relight,
    restyle,
    retouch,
    soften,
    widened,
)
from harmonylib.data.transfers import TRANSFERS

RED = np.full((3, 3), (0.6, 0.5, 0.4), np.float32)
ROW = np.float32([(0, -1), (0, 0), (1, 1)])  # left, centre and lower right corner of a picture


def scene(seed, height=40, width=48):
    """A smooth colourful picture with some noise and an elliptical foreground."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slopes, base = draw.uniform(-80, 80, (2, 3)), draw.uniform(90, 160, 3)
    image = base + slopes[0] * (y[..., None] - 0.5) + slopes[1] * (x[..., None] - 0.5)
    image += draw.normal(0, 12, (height, width, 3))
    mask = (y - draw.uniform(0.4, 0.6)) ** 2 + (x - draw.uniform(0.4, 0.6)) ** 2 < 0.08
    return image.clip(0, 255).astype(np.uint8), mask


@pytest.mark.parametrize("name", RECIPES)
def test_background_stays_and_seeds_decide(name):
    real, mask = scene(0)
    before = real.copy()
    composite, info = make_composite(name, real, mask, (0, "photo"), reference=scene(1))
    assert info["recipe"] == name and composite.dtype == np.uint8 and info["plausible"] == (not info["reason"])
    np.testing.assert_array_equal(composite[~mask], real[~mask])
    np.testing.assert_array_equal(real, before)
    assert info["fmse"] == foreground_mse(real, composite, mask) > 20 and info["share"] == mask.mean()
    again, _ = make_composite(name, real, mask, (0, "photo"), reference=scene(1))
    np.testing.assert_array_equal(again, composite)
    others = [make_composite(name, real, mask, (0, "photo", k), reference=scene(1))[0] for k in range(5)]
    assert any((other != composite).any() for other in others)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_as_strong_as_it_was_drawn(name):
    for fmse in (300, 1000):
        reached = [
            foreground_mse(real, recolor(name, real, mask, np.random.default_rng(seed), fmse=fmse), mask)
            for seed in range(20)
            for real, mask in (scene(seed),)
        ]
        assert np.median(reached) == pytest.approx(fmse, rel=0.1)


@pytest.mark.parametrize("name", ("HCOCO", "HFlickr"))
def test_transfers_are_as_strong_as_drawn_and_never_overdone(name):
    real, mask = scene(0)
    reference, region = scene(1)
    goal, reached = reference[region].mean(0), []
    for seed in range(20):
        composite = recolor(name, real, mask, np.random.default_rng(seed), (reference, region), fmse=150)
        reached.append(foreground_mse(real, composite, mask))
        assert np.abs(composite[mask].mean(0) - goal).sum() < np.abs(real[mask].mean(0) - goal).sum()
        full = recolor(name, real, mask, np.random.default_rng(seed), (reference, region), fmse=60000)
        np.testing.assert_allclose(full[mask].mean(0), goal, atol=6)
        same = recolor(name, real, mask, np.random.default_rng(seed), (real, mask), fmse=1000)
        assert np.abs(same.astype(int) - real).max() <= 2  # a photo has nothing to take from itself
    assert np.median(reached) == pytest.approx(150, rel=0.1)


@pytest.mark.parametrize("kept", (tuple(TRANSFERS), ("reinhard", "xiao-ma")))
def test_transfers_left_out_are_not_drawn(monkeypatch, kept):
    real, mask = scene(0)
    seen = set()
    for name, function in list(TRANSFERS.items()):
        monkeypatch.setitem(TRANSFERS, name, lambda *pair, name=name, f=function: seen.add(name) or f(*pair))
    for seed in range(40):
        recolor("HCOCO", real, mask, np.random.default_rng(seed), scene(1), RecipeSettings(transfers=list(kept)))
    assert seen == set(kept)


def test_exposure_by_hand():
    grey, stop = np.full((3, 3), 0.25, np.float32), 0.25 * 2 ** (1 / 2.2)
    np.testing.assert_allclose(retouch(grey, ROW, [1, *[0] * 10]), stop, rtol=1e-5)
    np.testing.assert_allclose(relight(grey, ROW, [1, 0, 0, 0]), stop, rtol=1e-5)
    warm = relight(grey, ROW, [0, 1, 0, 0])[0]
    assert warm[0] > 0.25 > warm[2] and warm[1] == pytest.approx(0.25)
    dim = relight(grey, ROW, [0, 0, 0, 1])[:, 0]  # one stop at the corners, half of one in the middle of a side
    np.testing.assert_allclose(dim, 0.25 * 2 ** (-np.array([0.5, 0, 1]) / 2.2), rtol=1e-5)


def test_saturation_contrast_curves_and_gradient_by_hand():
    grey = retouch(RED, ROW, [0, 0, 0, 0, 0, -60, *[0] * 5])
    np.testing.assert_allclose(grey, 0.299 * 0.6 + 0.587 * 0.5 + 0.114 * 0.4, rtol=1e-5)
    steep = retouch(np.full((3, 3), 0.3, np.float32), ROW, [0, 0, 0, 0, 0.5, *[0] * 6])
    np.testing.assert_allclose(steep, 0.3 - 0.5 * 0.3 * 0.7 * 0.4, rtol=1e-5)
    curved = retouch(RED, ROW, [0, 0, 0, 0, 0, 0, 1, 0, -1, 0, 0])[0]
    np.testing.assert_allclose(curved, (0.6**2, 0.5, 0.4**0.5), rtol=1e-5)
    lit = retouch(RED, ROW, [*[0] * 10, 1])[:, 0]
    assert (np.diff(lit) > 0).all() and lit[0] < 0.6 and lit[1] == pytest.approx(0.6) and lit[2] > 0.6


def test_the_filter_refuses_what_is_newly_clipped():
    real, mask = scene(0)
    burnt = real.copy()
    burnt[mask] = np.where(real[mask] > 150, 255, real[mask])
    assert "clipped" in implausible(real, burnt, mask) and not implausible(real, real // 2 + 40, mask)
    assert not implausible(burnt, burnt, mask)  # clipped in the photo already
    assert not implausible(real, burnt, mask, RecipeSettings(clipped=1.0))


def test_redraws_until_plausible_or_says_so():
    real, mask = scene(0)
    picky = [make_composite("HAdobe5k", real, mask, (k,), settings=RecipeSettings(clipped=0.02))[1] for k in range(9)]
    assert max(info["tries"] for info in picky) > 1 and all(info["plausible"] for info in picky if info["tries"] < 8)
    tried = []
    _, info = make_composite("HCOCO", real, mask, (0,), lambda n: tried.append(n) or (real, mask), tries=3)
    assert tried == [0, 1, 2] and info["tries"] == 3 and not info["plausible"] and "too weak" in info["reason"]


def test_restyle_changes_the_whole_photo():
    real, mask = scene(0)
    first, again, other = (restyle(real, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and first.shape == real.shape and (first != other).any()
    assert all((first[region] != real[region]).any(-1).mean() > 0.9 for region in (mask, ~mask))


def test_jitter_moves_the_edge_by_some_pixels_and_never_empties():
    square = np.zeros((20, 20), bool)
    square[6:14, 6:14] = True
    middle = [int(jitter(square, np.random.default_rng(seed))[10].sum()) for seed in range(60)]
    assert set(middle) == {2, 4, 6, 8, 10, 12, 14}
    speck = np.zeros((9, 9), bool)
    speck[4, 4] = True
    for mask in (speck, ~speck):
        assert all(0 < jitter(mask, np.random.default_rng(seed)).mean() < 1 for seed in range(30))


def test_soften_mixes_both_sides_of_the_edge_and_nothing_else():
    mask = np.zeros((30, 30), bool)
    mask[5:25, 5:25] = True
    real = np.full((30, 30, 3), 50, np.uint8)
    changed = np.where(widened(mask)[..., None], np.uint8(150), real)
    row = soften(changed, real, mask, sigma=0.8)[15, :16, 0].astype(int)
    assert (np.diff(row) >= 0).all() and row[2] == 50 and row[-1] == 150
    assert 50 < row[4] < 100 < row[5] < 150  # the pixels beside the edge


def test_a_reference_without_foreground_gives_the_colours_of_the_whole_photo():
    real, mask = scene(0)
    reference, region = scene(1)
    whole, empty = (
        recolor("HCOCO", real, mask, np.random.default_rng(0), (reference, m)) for m in (region >= 0, region < 0)
    )
    np.testing.assert_array_equal(whole, empty)
