import socket

import numpy as np
import pytest
from scipy.ndimage import label

from harmonylib.core.errors import HarmonyError
from harmonylib.core.seeds import rng
from harmonylib.data import embedded_photos


def _refuse(*arguments):
    raise AssertionError("the embedded photos must not use the network")


@pytest.fixture(scope="module")
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        return embedded_photos.load_photos()


def test_every_photo_is_a_colour_photo_with_masks(embedded):
    assert len(embedded) == 9
    assert len({photo.name for photo in embedded}) == 9
    for photo in embedded:
        assert photo.image.dtype == np.uint8 and photo.image.shape[2] == 3
        assert np.ptp(photo.image.astype(int), axis=2).mean() > 5, f"{photo.name} has no colour"
        assert photo.credit and photo.licence
        assert 1 <= len(photo.masks) <= 4
        for name, mask in photo.masks.items():
            assert mask.dtype == bool and mask.shape == photo.image.shape[:2]
            assert 0.01 <= mask.mean() <= 0.8, f"{photo.name}/{name} covers {mask.mean():.3f}"


def test_masks_lie_on_their_objects(embedded):
    """Colours that the outlines must separate: a mirrored, shifted or swapped polygon fails."""
    by_name = {photo.name: photo for photo in embedded}

    def redness(name, mask):
        pixels = by_name[name].image[mask].astype(float)
        return (pixels[:, 0] - pixels[:, 2]).mean()

    flower = by_name["flower"].masks["flower"]
    assert redness("flower", flower) > 80 > 0 > redness("flower", ~(flower | by_name["flower"].masks["second_flower"]))
    for view in ("motorcycle_left", "motorcycle_right"):
        assert redness(view, by_name[view].masks["tank"]) > 90
    astronaut = by_name["astronaut"]
    assert redness("astronaut", astronaut.masks["person"]) > 60
    assert not (astronaut.masks["helmet"] & astronaut.masks["shuttle"]).any()
    hopper = by_name["grace_hopper"].masks
    assert (hopper["hat"] & hopper["person"]).sum() > 0.97 * hopper["hat"].sum()
    coffee = by_name["coffee"].masks
    assert all((coffee[part] & coffee["set"]).sum() > 0.97 * coffee[part].sum() for part in ("cup", "coffee", "spoon"))


def test_a_ring_inside_a_ring_is_a_hole():
    square = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
    hole = [[0.4, 0.4], [0.6, 0.4], [0.6, 0.6], [0.4, 0.6]]
    mask = embedded_photos.rasterise([square, hole], (100, 200))
    assert mask.shape == (100, 200)
    assert mask[20, 40] and not mask[50, 100] and not mask[5, 100]
    assert mask.mean() == pytest.approx(0.64 - 0.04, abs=0.02)


def test_splits_are_disjoint_and_each_has_a_portrait(embedded):
    train, test = embedded_photos.load_photos("train"), embedded_photos.load_photos("test")
    assert {p.name for p in train} | {p.name for p in test} == {p.name for p in embedded}
    assert not {p.name for p in train} & {p.name for p in test}
    assert len(test) == 3
    assert [sum(p.portrait for p in split) for split in (train, test)] == [1, 1]
    assert {"motorcycle_left", "motorcycle_right"} <= {p.name for p in train}  # one scene, one split


def test_unknown_split_and_missing_file_are_named():
    with pytest.raises(HarmonyError, match="'val'"):
        embedded_photos.load_photos("val")
    with pytest.raises(HarmonyError, match="scikit-image.*reinstall"):
        embedded_photos._locate("scikit-image", "skimage/data/no_such_photo.png")
    with pytest.raises(HarmonyError, match="nowhere"):
        embedded_photos._locate("nowhere", "no_such_package_/a.png")


@pytest.mark.parametrize("share", (0.01, 0.05, 0.1, 0.35))
def test_foregrounds_have_about_the_wanted_share(embedded, share):
    ratios = []
    for photo in embedded:
        for mask in photo.masks.values():
            part = embedded_photos.foreground_of_share(photo.image, mask, share, seed=0)
            assert part.dtype == bool and part.shape == mask.shape and 0 < part.mean() < 1
            ratios.append(part.mean() / share)
    assert 0.8 < np.median(ratios) < 1.25 and np.mean([0.5 < ratio < 2 for ratio in ratios]) > 0.75


def test_a_mask_stays_whole_or_loses_or_gives_way_to_a_superpixel(embedded):
    photo = next(photo for photo in embedded if photo.name == "coffee")
    mask = photo.masks["set"]
    assert embedded_photos.foreground_of_share(photo.image, mask, mask.mean() * 1.2, seed=0) is mask
    part = embedded_photos.foreground_of_share(photo.image, mask, mask.mean() / 6, seed=0)
    assert (part & mask).sum() > 0.9 * part.sum() and label(part)[1] == 1
    again, *others = (
        embedded_photos.foreground_of_share(photo.image, mask, mask.mean() / 6, seed) for seed in range(6)
    )
    np.testing.assert_array_equal(part, again)
    assert len({other.tobytes() for other in others}) > 1
    piece = embedded_photos.foreground_of_share(photo.image, photo.masks["spoon"], 0.2, seed=0)
    assert piece.mean() == pytest.approx(0.2, rel=0.6)


def test_superpixels_keep_to_one_colour():
    """On two flat halves a piece of under half the area should rarely cross the border."""
    image, speck = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), bool)
    image[:, :100], image[:, 100:], speck[50, 50] = (200, 30, 30), (30, 30, 200), True
    pieces = [embedded_photos.foreground_of_share(image, speck, share, seed=0) for share in (0.05, 0.1, 0.2, 0.3)]
    crossing = [min(piece[:, :100].sum(), piece[:, 100:].sum()) / piece.sum() for piece in pieces]
    assert np.mean(crossing) < 0.05


def test_crops_stay_in_bounds(embedded):
    for photo in embedded:
        for name, mask in photo.masks.items():
            draw = rng(0, photo.name, name)
            for _ in range(5):
                image, part = embedded_photos.random_crop(photo.image, mask, draw)
                assert image.shape[:2] == part.shape
                assert min(0.02, mask.mean()) <= part.mean() <= 0.8
                if part.shape != mask.shape:
                    height, width = part.shape
                    assert part.mean() >= 0.02
                    assert 0.74 <= width / height <= 1.35
                    assert height >= 0.5 * 0.74 * min(mask.shape) and width >= 0.5 * 0.74 * min(mask.shape)


def test_crops_are_windows_of_the_photo_and_depend_on_the_generator_only():
    grid = np.indices((60, 90)).transpose(1, 2, 0)
    image = np.concatenate([grid, np.zeros((60, 90, 1), int)], 2).astype(np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[20:40, 30:60] = True
    a, a_mask = embedded_photos.random_crop(image, mask, rng(1))
    b, _ = embedded_photos.random_crop(image, mask, rng(1))
    assert np.array_equal(a, b)
    top, left = a[0, 0, :2]
    assert np.array_equal(a, image[top : top + a.shape[0], left : left + a.shape[1]])
    assert np.array_equal(a_mask, mask[top : top + a.shape[0], left : left + a.shape[1]])


def test_a_crop_without_foreground_falls_back_to_the_photo():
    image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    cropped, part = embedded_photos.random_crop(image, mask, rng(0))
    assert cropped.shape == image.shape and part.shape == mask.shape
    with pytest.raises(HarmonyError, match="one size"):
        embedded_photos.random_crop(image, mask[:30], rng(0))
    with pytest.raises(HarmonyError, match="min_scale"):
        embedded_photos.random_crop(image, mask, rng(0), min_scale=0)
