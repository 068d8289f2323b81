import socket

import numpy as np
import pytest
from scipy.ndimage import label

from harmonylib import photos
from harmonylib.errors import HarmonyError
from harmonylib.seeds import rng


def _refuse(*arguments):
    raise AssertionError("the embedded photos must not use the network")


@pytest.fixture(scope="module")
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        return photos.load_photos()


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
    mask = photos.rasterise([square, hole], (100, 200))
    assert mask.shape == (100, 200)
    assert mask[20, 40] and not mask[50, 100] and not mask[5, 100]
    assert mask.mean() == pytest.approx(0.64 - 0.04, abs=0.02)


def test_splits_are_disjoint_and_each_has_a_portrait(embedded):
    train, test = photos.load_photos("train"), photos.load_photos("test")
    assert {p.name for p in train} | {p.name for p in test} == {p.name for p in embedded}
    assert not {p.name for p in train} & {p.name for p in test}
    assert len(test) == 3
    assert [sum(p.portrait for p in split) for split in (train, test)] == [1, 1]
    assert {"motorcycle_left", "motorcycle_right"} <= {p.name for p in train}  # one scene, one split


def test_unknown_split_and_missing_file_are_named():
    with pytest.raises(HarmonyError, match="'val'"):
        photos.load_photos("val")
    with pytest.raises(HarmonyError, match="scikit-image.*reinstall"):
        photos._locate("scikit-image", "skimage/data/no_such_photo.png")
    with pytest.raises(HarmonyError, match="nowhere"):
        photos._locate("nowhere", "no_such_package_/a.png")


def test_regions_are_deterministic_connected_and_bounded(embedded):
    image = embedded[1].image
    first = photos.region_masks(image, seed=3, count=4)
    again = photos.region_masks(image, seed=3, count=4)
    other = photos.region_masks(image, seed=4, count=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({mask.tobytes() for mask in first}) == 4
    for mask in first:
        assert mask.dtype == bool and mask.shape == image.shape[:2]
        assert 0.02 <= mask.mean() <= 0.5
        assert label(mask)[1] == 1
        assert not _has_hole(mask)


def _has_hole(mask):
    _, count = label(np.pad(~mask, 1, constant_values=True))
    return count > 1


def test_region_bounds_hold_and_impossible_ones_are_refused(embedded):
    image = embedded[1].image[::2, ::2]
    for mask in photos.region_masks(image, seed=0, count=5, min_fraction=0.1, max_fraction=0.15):
        assert 0.1 <= mask.mean() <= 0.15
    with pytest.raises(HarmonyError, match="min_fraction"):
        photos.region_masks(image, seed=0, count=1, min_fraction=0.5, max_fraction=0.2)
    with pytest.raises(HarmonyError, match="widen"):
        photos.region_masks(image, seed=0, count=1, min_fraction=1e-7, max_fraction=2e-7)


def test_regions_keep_to_one_colour():
    """On two flat halves a region of under half the area should rarely cross the border."""
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :100], image[:, 100:] = (200, 30, 30), (30, 30, 200)
    masks = photos.region_masks(image, seed=0, count=10, min_fraction=0.05, max_fraction=0.3)
    crossing = [min(mask[:, :100].sum(), mask[:, 100:].sum()) / mask.sum() for mask in masks]
    assert np.mean(crossing) < 0.05


def test_crops_stay_in_bounds(embedded):
    for photo in embedded:
        for name, mask in photo.masks.items():
            draw = rng(0, photo.name, name)
            for _ in range(5):
                image, part = photos.random_crop(photo.image, mask, draw)
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
    a, a_mask = photos.random_crop(image, mask, rng(1))
    b, _ = photos.random_crop(image, mask, rng(1))
    assert np.array_equal(a, b)
    top, left = a[0, 0, :2]
    assert np.array_equal(a, image[top : top + a.shape[0], left : left + a.shape[1]])
    assert np.array_equal(a_mask, mask[top : top + a.shape[0], left : left + a.shape[1]])


def test_a_crop_without_foreground_falls_back_to_the_photo():
    image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    cropped, part = photos.random_crop(image, mask, rng(0))
    assert cropped.shape == image.shape and part.shape == mask.shape
    with pytest.raises(HarmonyError, match="one size"):
        photos.random_crop(image, mask[:30], rng(0))
    with pytest.raises(HarmonyError, match="min_scale"):
        photos.random_crop(image, mask, rng(0), min_scale=0)
