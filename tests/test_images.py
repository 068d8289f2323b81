import numpy as np
import torch
from PIL import Image

from harmonylib.core.images import (
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    to_square,
    to_tensor,
    to_uint8,
)


def soft_disc(side=64):
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return (255 / (1 + np.exp(12 * (np.hypot(x, y) - 0.6)))).astype(np.uint8)


def test_soft_masks_are_cut_and_not_dithered(tmp_path):
    """PIL's conversion to mode "1" would scatter pixels along a soft edge."""
    grey = soft_disc()
    Image.fromarray(grey).save(tmp_path / "soft.png")
    mask = read_mask(tmp_path / "soft.png")
    np.testing.assert_array_equal(mask, grey > 127)
    assert (np.asarray(Image.fromarray(grey).convert("1")) != mask).any()


def test_masks_stay_masks_when_resized():
    mask = np.zeros((40, 60), bool)
    mask[:, 30:] = True
    for size in ((20, 30), (17, 23), (80, 120)):
        small = resize_mask(mask, size)
        assert small.dtype == bool and small.shape == size and abs(small.mean() - 0.5) < 0.05
    image = np.where(mask[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
    assert len(np.unique(resize_image(image, (17, 23)))) > 2  # images are blended, masks above were not


def test_geometries():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255
    assert (to_square(image, 10, "centre-crop") == 255).all()
    assert to_square(image, 10, "squash")[:, :2].max() < 20
    mask = to_square(image[..., 0] > 0, 10, "squash")
    assert mask.dtype == bool and mask.mean() == 0.5


def test_transparency_is_laid_on_white(tmp_path):
    layer = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    layer.putpixel((1, 0), (10, 20, 30, 0))
    layer.save(tmp_path / "layer.png")
    assert read_image(tmp_path / "layer.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_tensors_and_back():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_tensor(array)), array)
    assert to_tensor(array[..., 0] > 99).unique().tolist() == [0, 1]
    assert to_uint8(torch.full((3, 1, 1), 99 / 127.5 - 1 + 0.9 / 255)).tolist() == [[[99] * 3]]  # rounds, not truncates
