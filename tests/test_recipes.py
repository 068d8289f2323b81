from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonylib.color import TRANSFERS
from harmonylib.errors import HarmonyError
from harmonylib.images import to_tensor, to_uint8
from harmonylib.photos import load_photos
from harmonylib.recipes import (
    CONDITIONS,
    DEFAULTS,
    EDITS,
    EXPERTS,
    RECIPES,
    RecipeSettings,
    draw_relight,
    draw_retouch,
    foreground_delta_e,
    make_composite,
    plausible,
    recolor_batch,
    relight,
    restyle,
    retouch,
    transfer_batch,
)


def scene(seed, height=40, width=48):
    """A smooth colourful picture with some noise and an elliptical foreground."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slopes, base = draw.uniform(-80, 80, (2, 3)), draw.uniform(90, 160, 3)
    image = (
        base
        + slopes[0] * (y[..., None] - 0.5)
        + slopes[1] * (x[..., None] - 0.5)
        + draw.normal(0, 12, (height, width, 3))
    )
    mask = (y - draw.uniform(0.4, 0.6)) ** 2 + (x - draw.uniform(0.4, 0.6)) ** 2 < 0.08
    return image.clip(0, 255).astype(np.uint8), mask


@pytest.mark.parametrize("name", RECIPES)
def test_background_stays_and_seeds_decide(name):
    real, mask = scene(0)
    before = real.copy()
    composite, info = make_composite(name, real, mask, (0, "photo"), reference=scene(1))
    assert info["plausible"] and info["recipe"] == name and info["delta_e"] > 1 and composite.dtype == np.uint8
    np.testing.assert_array_equal(composite[~mask], real[~mask])
    np.testing.assert_array_equal(real, before)
    assert (composite[mask] != real[mask]).any()
    again, _ = make_composite(name, real, mask, (0, "photo"), reference=scene(1))
    np.testing.assert_array_equal(again, composite)
    other, _ = make_composite(name, real, mask, (0, "other photo"), reference=scene(1))
    assert (other != composite).any()


@pytest.mark.parametrize("name", ("HCOCO", "HFlickr"))
def test_transfer_recipes_move_towards_the_reference(name):
    real, mask = scene(0)
    reference, region = scene(1)
    composite = RECIPES[name](real, mask, np.random.default_rng(0), (reference, region))
    goal = reference[region].mean(0)
    assert np.abs(composite[mask].mean(0) - goal).sum() < np.abs(real[mask].mean(0) - goal).sum()


def test_all_four_transfers_are_drawn(monkeypatch):
    real, mask = scene(0)
    seen = set()
    for name, function in list(TRANSFERS.items()):
        monkeypatch.setitem(TRANSFERS, name, lambda *pair, name=name, f=function: seen.add(name) or f(*pair))
    for seed in range(40):
        RECIPES["HCOCO"](real, mask, np.random.default_rng(seed), scene(1))
    assert seen == set(TRANSFERS)


def test_reference_is_the_photo_itself_changes_next_to_nothing():
    real, mask = scene(0)
    for seed in range(8):
        composite = RECIPES["HFlickr"](real, mask, np.random.default_rng(seed), (real, mask))
        assert np.abs(composite.astype(int) - real).max() <= 1


def test_zero_strengths_are_the_identity():
    real, mask = scene(0)
    names = [name for name in vars(DEFAULTS) if name.startswith(("retouch", "relight"))]
    still = replace(DEFAULTS, hcoco_strength=(0, 0), hflickr_strength=(0, 0), **dict.fromkeys(names, 0.0))
    for recipe in RECIPES.values():
        composite = recipe(real, mask, np.random.default_rng(0), scene(1), still)
        np.testing.assert_array_equal(composite, real)


def test_stronger_settings_change_more():
    real, mask = scene(0)
    weak = replace(DEFAULTS, retouch_exposure=0.1, retouch_warmth=0.1, retouch_tone=0.1, retouch_saturation=0.1)

    def change(settings):
        made = [RECIPES["HAdobe5k"](real, mask, np.random.default_rng(s), None, settings) for s in range(10)]
        return np.mean([foreground_delta_e(real, composite, mask) for composite in made])

    assert change(DEFAULTS) > 2 * change(weak)


def test_exposure_by_hand():
    image, mask = np.full((3, 4, 4), 0.25), np.ones((1, 4, 4))
    one_stop = 0.25 * 2 ** (1 / 2.2)
    np.testing.assert_allclose(retouch(image, mask, [1.0, 0, 0, 0, 0, 0, 0, 0]), one_stop)
    np.testing.assert_allclose(relight(image, mask, [1.0, 0, 0, 0]), one_stop)
    warm = relight(image, mask, [0, 1.0, 0, 0])
    assert warm[0, 0, 0] > 0.25 > warm[2, 0, 0] and warm[1, 0, 0] == pytest.approx(0.25)
    dim = relight(image, mask, [0, 0, 0, 1.0])  # one stop at the corners
    np.testing.assert_allclose(dim[:, 0, 0], 0.25 / 2 ** (1 / 2.2))
    assert dim[0, 1, 1] > dim[0, 0, 1] > dim[0, 0, 0]


def test_saturation_contrast_and_gradient_by_hand():
    mask = np.zeros((1, 8, 8))
    mask[:, 2:6, 1:4] = 1
    image = np.stack([np.full((8, 8), value) for value in (0.6, 0.5, 0.4)])
    grey = retouch(image, mask, [0, 0, 0, 0, 0, -60.0, 0, 0])
    np.testing.assert_allclose(grey, 0.299 * 0.6 + 0.587 * 0.5 + 0.114 * 0.4)
    steep = retouch(np.stack([image[1] - 0.2] * 3), mask, [0, 0, 0, 0, 0.5, 0, 0, 0])
    np.testing.assert_allclose(steep, 0.3 - 0.5 * 0.3 * 0.7 * 0.4)
    lit = retouch(image, mask, [0, 0, 0, 0, 0, 0, 1.0, 0])
    rows = lit[0, 2:6, 2]
    assert (np.diff(rows) > 0).all() and rows[0] < 0.6 < rows[-1]
    assert np.allclose(rows[:2].mean() / 0.6, 1, atol=0.3)


def test_parameters_stay_within_their_strengths():
    draw = np.random.default_rng(0)
    s = DEFAULTS
    bounds = [s.retouch_exposure, s.retouch_warmth, s.retouch_warmth / 2, s.retouch_tone, s.retouch_tone]
    bounds += [s.retouch_saturation, s.retouch_gradient, s.retouch_gradient]
    assert (np.abs([draw_retouch(draw, s) for _ in range(200)]) <= bounds).all()
    bounds = [s.relight_exposure, s.relight_warmth, s.relight_contrast, s.relight_vignette]
    assert (np.abs([draw_relight(draw, s) for _ in range(200)]) <= bounds).all()
    assert max(np.abs(EXPERTS).max(), np.abs(CONDITIONS).max()) <= 1


def test_filter_refuses_no_change_and_absurd_change():
    real, mask = scene(0)
    assert plausible(real, real, mask) == (False, "too little change: delta E 0.0 < 2", 0)
    inverted, burnt, fair = real.copy(), real.copy(), real.copy()
    inverted[mask] = real[mask][:, ::-1] // 4
    good, reason, _ = plausible(real, inverted, mask)
    assert not good and "too much" in reason
    burnt[mask] = np.where(real[mask] > 150, 255, real[mask])
    good, reason, _ = plausible(real, burnt, mask)
    assert not good and "clipped" in reason
    fair[mask] = (real[mask] * 0.85).astype(np.uint8)
    assert plausible(real, fair, mask)[:2] == (True, "")


def test_pixels_clipped_in_the_photo_already_are_not_held_against_it():
    real, mask = np.full((8, 8, 3), 255, np.uint8), np.ones((8, 8), bool)
    composite = real.copy()
    composite[..., 2] = 235
    assert plausible(real, composite, mask)[0]


def test_redraws_until_plausible_or_says_so():
    real, mask = scene(0)
    picky = replace(DEFAULTS, delta_e=(9.0, 12.0))
    tries = [make_composite("HAdobe5k", real, mask, (k,), settings=picky, tries=30)[1] for k in range(5)]
    assert (
        all(info["plausible"] and 9 <= info["delta_e"] <= 12 for info in tries) and max(i["tries"] for i in tries) > 1
    )
    _, info = make_composite("HAdobe5k", real, mask, (0,), settings=replace(DEFAULTS, delta_e=(90.0, 99.0)), tries=3)
    assert not info["plausible"] and info["tries"] == 3 and "too little" in info["reason"]


def test_errors():
    real, mask = scene(0)
    with pytest.raises(HarmonyError, match="Hnope"):
        make_composite("Hnope", real, mask, (0,))
    with pytest.raises(HarmonyError, match="reference"):
        make_composite("HCOCO", real, mask, (0,))
    for name in RECIPES:
        with pytest.raises(HarmonyError, match="empty"):
            make_composite(name, real, np.zeros_like(mask), (0,), reference=scene(1))
        if name in ("HCOCO", "HFlickr"):
            with pytest.raises(HarmonyError, match="empty"):
                make_composite(name, real, mask, (0,), reference=(real, np.zeros_like(mask)))
    with pytest.raises(HarmonyError, match="delta_e"):
        RecipeSettings(delta_e=(5, 2))
    with pytest.raises(HarmonyError, match="retouch_tone"):
        RecipeSettings(retouch_tone=-1)


# ---- on the fly ----


def batch(count=6):
    scenes = [scene(seed) for seed in range(count)]
    tensors = [(to_tensor(image), to_tensor(mask)) for image, mask in scenes]
    return scenes, torch.stack([image for image, _ in tensors]), torch.stack([mask for _, mask in tensors])


@pytest.mark.parametrize("recipe", EDITS)
def test_batched_edit_equals_the_recipe(recipe):
    scenes, real, mask = batch()
    edit, draw = EDITS[recipe]
    parameters = np.stack([draw(np.random.default_rng(seed), DEFAULTS) for seed in range(len(scenes))])
    changed = to_uint8(edit((real + 1) / 2, mask, parameters) * 2 - 1)
    for seed, ((image, region), row) in enumerate(zip(scenes, changed, strict=True)):
        composite = RECIPES[recipe](image, region, np.random.default_rng(seed))
        assert np.abs(composite[region].astype(int) - row[region]).max() <= 1
        assert (composite[region] != image[region]).mean() > 0.5


@pytest.mark.parametrize("name", TRANSFERS)
def test_batched_transfer_equals_the_array_transfer(name):
    from harmonylib.color import transfer_region

    scenes, _, mask = batch()
    strength = np.linspace(0.3, 1, len(scenes))
    levels = torch.stack([torch.from_numpy(photo) for photo, _ in scenes]).permute(0, 3, 1, 2)
    for dtype in (torch.float64, torch.float32):
        image = levels.to(dtype) / 255
        weights = mask.to(dtype)
        changed = transfer_batch(name, image, weights, image.roll(1, 0), weights.roll(1, 0), strength) * 255
        for k, (photo, region) in enumerate(scenes):
            other, other_region = scenes[k - 1]
            expected = transfer_region(photo, region, other[other_region] / 255, TRANSFERS[name], strength[k])
            apart = np.abs(changed[k].permute(1, 2, 0).numpy()[region] - expected[region])
            assert apart.max() < 3 and apart.mean() < 0.35  # the array's rounding alone makes 0.25 on average
            if dtype == torch.float64:  # histograms: ranks of values that are equal but for rounding may swap
                assert (apart > 0.51).mean() < (0.01 if name == "histogram" else 1e-9)


def test_batched_histograms_take_the_ties_of_real_photos_alike():
    """Equal chroma values must stay equal through the rounding of float32: a tie that breaks moves whole ranks."""
    from harmonylib.color import transfer_region
    from harmonylib.images import to_square

    photos = [
        (to_square(p.image, 96, "squash"), to_square(next(iter(p.masks.values())), 96, "squash")) for p in load_photos()
    ]
    image = torch.stack([torch.from_numpy(photo.copy()) for photo, _ in photos]).permute(0, 3, 1, 2).float() / 255
    mask = torch.stack([torch.from_numpy(region.copy()) for _, region in photos])[:, None].float()
    strength = np.ones(len(photos))
    changed = transfer_batch("histogram", image, mask, image.roll(1, 0), mask.roll(1, 0), strength) * 255
    for k, (photo, region) in enumerate(photos):
        other, other_region = photos[k - 1]
        expected = transfer_region(photo, region, other[other_region] / 255, TRANSFERS["histogram"])
        assert np.abs(changed[k].permute(1, 2, 0).numpy()[region] - expected[region]).max() < 1.5


def test_recolor_batch_keeps_the_background_and_follows_the_generator():
    _, real, mask = batch(12)
    before = real.clone()
    first, again, other = (recolor_batch(real, mask, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == real.shape and first.dtype == real.dtype and first.abs().max() <= 1
    assert torch.equal(real, before) and torch.equal(first, again) and not torch.equal(first, other)
    outside = (mask < 0.5).expand_as(real)
    assert torch.equal(first[outside], real[outside])
    assert ((first - real).abs() * mask).amax((1, 2, 3)).min() > 0.01  # every foreground changed


def test_recolor_batch_draws_every_recipe_and_transfer(monkeypatch):
    from harmonylib import recipes

    seen = set()

    def noted(name, function):
        return lambda *args: seen.add(name) or function(*args)

    for name, (edit, draw) in list(EDITS.items()):
        monkeypatch.setitem(recipes.EDITS, name, (noted(name, edit), draw))
    for name, transfer in list(recipes.BATCH_TRANSFERS.items()):
        monkeypatch.setitem(recipes.BATCH_TRANSFERS, name, noted(name, transfer))
    _, real, mask = batch(12)
    for seed in range(4):
        recolor_batch(real, mask, torch.Generator().manual_seed(seed))
    assert seen == {*EDITS, *TRANSFERS}


def test_recolor_batch_changes_about_as_much_as_the_recipes():
    scenes, real, mask = batch(16)
    made = [to_uint8(recolor_batch(real, mask, torch.Generator().manual_seed(seed))) for seed in range(3)]
    on_the_fly = np.mean([foreground_delta_e(a, b, m) for rows in made for (a, m), b in zip(scenes, rows, strict=True)])
    recipes = np.mean(
        [
            make_composite(name, *scenes[k], (k,), reference=scenes[k - 1])[1]["delta_e"]
            for k in range(len(scenes))
            for name in RECIPES
        ]
    )
    assert 0.5 < on_the_fly / recipes < 2


def test_recolor_batch_takes_lone_images_and_empty_masks():
    _, real, mask = batch(4)
    lone = recolor_batch(real[:1], mask[:1], torch.Generator().manual_seed(0))
    assert not torch.equal(lone, real[:1])
    mask[0] = 0
    for seed in range(6):
        result = recolor_batch(real, mask, torch.Generator().manual_seed(seed))
        assert result.isfinite().all() and torch.equal(result[0], real[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recolor_batch_on_cuda_equals_cpu():
    _, real, mask = batch(12)
    here = recolor_batch(real, mask, torch.Generator().manual_seed(0))
    there = recolor_batch(real.cuda(), mask.cuda(), torch.Generator().manual_seed(0))
    assert there.device.type == "cuda"
    assert (there.cpu() - here).abs().max() <= 2 / 255


def test_restyle_changes_every_photo_as_a_whole_and_by_its_own_generator():
    image = torch.full((2, 3, 12, 16), 0.5)
    first, again = (restyle(image, [np.random.default_rng(n) for n in (0, 1)]) for _ in range(2))
    assert torch.equal(first, again) and first.shape == image.shape and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first[0], first[1])
    assert ((first - image).abs().amax((1, 2, 3)) > 0.02).all()
    assert torch.equal(restyle(image[1:], [np.random.default_rng(1)])[0], first[1])
