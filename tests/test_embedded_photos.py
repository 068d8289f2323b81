import socket

import numpy as np
import pytest
from scipy.ndimage import label

from harmonylib.core.errors import HarmonyError
from harmonylib.core.seeds import rng
from harmonylib.data.embedded_photos import _load, foreground_of_share, load_photos, random_crop, rasterise


def _refuse(*arguments):
    raise AssertionError("the embedded photos must not use the network")


@pytest.fixture(scope="module")
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        return {photo.name: photo for photo in load_photos()}


def test_every_photo_is_a_colour_photo_with_masks(embedded):
    assert len(embedded) == 9
    for photo in embedded.values():
        assert photo.image.dtype == np.uint8 and photo.image.shape[2] == 3
        assert np.ptp(photo.image.astype(int), axis=2).mean() > 5, f"{photo.name} has no colour"
        assert photo.credit and photo.licence and 1 <= len(photo.masks) <= 4
        for name, mask in photo.masks.items():
            assert mask.dtype == bool and mask.shape == photo.image.shape[:2]
            assert 0.01 <= mask.mean() <= 0.8, f"{photo.name}/{name} covers {mask.mean():.3f}"


def test_masks_lie_on_their_objects(embedded):
    """Colours that the outlines must separate: a mirrored, shifted or swapped polygon fails."""

    def redness(name, mask):
        pixels = embedded[name].image[mask].astype(float)
        return (pixels[:, 0] - pixels[:, 2]).mean()

    flowers = embedded["flower"].masks
    background = ~(flowers["flower"] | flowers["second_flower"])
    assert redness("flower", flowers["flower"]) > 80 > 0 > redness("flower", background)
    for view in ("motorcycle_left", "motorcycle_right"):
        assert redness(view, embedded[view].masks["tank"]) > 90
    astronaut = embedded["astronaut"].masks
    assert redness("astronaut", astronaut["person"]) > 60 and not (astronaut["helmet"] & astronaut["shuttle"]).any()
    hopper, coffee = embedded["grace_hopper"].masks, embedded["coffee"].masks
    assert (hopper["hat"] & hopper["person"]).sum() > 0.97 * hopper["hat"].sum()
    assert all((coffee[part] & coffee["set"]).sum() > 0.97 * coffee[part].sum() for part in ("cup", "coffee", "spoon"))


def test_a_ring_inside_a_ring_is_a_hole():
    square = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
    hole = [[0.4, 0.4], [0.6, 0.4], [0.6, 0.6], [0.4, 0.6]]
    mask = rasterise([square, hole], (100, 200))
    assert mask.shape == (100, 200) and mask[20, 40] and not mask[50, 100] and not mask[5, 100]
    assert mask.mean() == pytest.approx(0.64 - 0.04, abs=0.02)


def test_splits_are_disjoint_and_each_has_a_portrait(embedded):
    train, test = load_photos("train"), load_photos("test")
    assert {p.name for p in train} | {p.name for p in test} == set(embedded)
    assert len(train) == 6 and len(test) == 3
    assert [sum(p.portrait for p in split) for split in (train, test)] == [1, 1]
    assert {"motorcycle_left", "motorcycle_right"} <= {p.name for p in train}  # one scene, one split


@pytest.mark.parametrize("package, file", [("scikit-image", "skimage/data/no.png"), ("nowhere", "no_package_/a.png")])
def test_a_missing_file_is_named(package, file):
    with pytest.raises(HarmonyError, match=f"{package}.*reinstall"):
        _load(package, file, {})


@pytest.mark.parametrize("share", (0.01, 0.05, 0.1, 0.35))
def test_foregrounds_have_about_the_wanted_share(embedded, share):
    ratios = []
    for photo in embedded.values():
        for mask in photo.masks.values():
            part = foreground_of_share(photo.image, mask, share, seed=0)
            assert part.dtype == bool and part.shape == mask.shape and 0 < part.mean() < 1
            ratios.append(part.mean() / share)
    assert 0.8 < np.median(ratios) < 1.25 and np.mean([0.5 < ratio < 2 for ratio in ratios]) > 0.75


def test_a_mask_stays_whole_or_loses_or_gives_way_to_a_superpixel(embedded):
    image, mask = embedded["coffee"].image, embedded["coffee"].masks["set"]
    assert foreground_of_share(image, mask, mask.mean() * 1.2, seed=0) is mask
    part, again, *others = (foreground_of_share(image, mask, mask.mean() / 6, seed) for seed in (0, *range(6)))
    assert (part & mask).sum() > 0.9 * part.sum() and label(part)[1] == 1
    np.testing.assert_array_equal(part, again)
    assert len({other.tobytes() for other in others}) > 1
    piece = foreground_of_share(image, embedded["coffee"].masks["spoon"], 0.2, seed=0)
    assert piece.mean() == pytest.approx(0.2, rel=0.6)


def test_superpixels_keep_to_one_colour():
    """On two flat halves a piece of under half the area should rarely cross the border; on one, there is a box."""
    image, speck = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), bool)
    assert 0.1 < foreground_of_share(image, ~np.zeros_like(speck), 0.2, seed=0).mean() < 0.4
    image[:, :100], image[:, 100:], speck[50, 50] = (200, 30, 30), (30, 30, 200), True
    pieces = [foreground_of_share(image, speck, share, seed=0) for share in (0.05, 0.1, 0.2, 0.3)]
    crossing = [min(piece[:, :100].sum(), piece[:, 100:].sum()) / piece.sum() for piece in pieces]
    assert np.mean(crossing) < 0.05


def test_crops_are_windows_in_bounds_and_the_generator_decides(embedded):
    for photo in embedded.values():
        for name, mask in photo.masks.items():
            places = np.arange(mask.size, dtype=np.int64).reshape(*mask.shape, 1)
            for number in range(5):
                window, part = random_crop(places, mask, rng(number, photo.name, name))
                np.testing.assert_array_equal(part, mask.ravel()[window[..., 0]])
                assert min(0.02, mask.mean()) <= part.mean() <= 0.8
                height, width = part.shape
                assert part.shape == mask.shape or 0.74 <= width / height <= 1.35
                assert min(height, width) >= 0.5 * 0.74 * min(mask.shape)
            np.testing.assert_array_equal(random_crop(places, mask, rng(4, photo.name, name))[0], window)


def test_a_crop_without_foreground_falls_back_to_the_photo():
    image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    cropped, part = random_crop(image, mask, rng(0))
    assert cropped.shape == image.shape and part.shape == mask.shape
