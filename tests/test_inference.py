import numpy as np
import pytest

import harmonylib as hl
from harmonylib.errors import HarmonyError
from harmonylib.inference import carry_over


@pytest.fixture
def composite():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[10:40, 20:70] = True
    return image, mask


def test_background_untouched_at_any_size(tiny_pipeline, tmp_path, composite):
    tiny_pipeline.vae.register_to_config(sample_size=32)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    image, mask = composite
    output = np.asarray(hl.harmonize(image, mask, model=tmp_path / "model", device="cpu"))
    assert output.shape == image.shape and np.array_equal(output[~mask], image[~mask])
    assert not np.array_equal(output[mask], image[mask])
    again = np.asarray(hl.harmonize(image, mask, model=tmp_path / "model", device="cpu"))
    assert np.array_equal(output, again)


def test_carry_over_repeats_a_known_colour_change(composite):
    """A change that is a colour map at working size is the same map at full size."""
    image, mask = composite
    image = (image // 2 + 40).astype(np.uint8)
    changed = np.clip(image * 0.9 + np.array([8, 0, -6]), 0, 255).round().astype(np.uint8)
    small, small_changed, small_mask = image[::2, ::2], changed[::2, ::2], mask[::2, ::2]
    result = carry_over(image, mask, small, small_changed, small_mask)
    assert np.abs(result[mask].astype(int) - changed[mask]).max() <= 2
    assert np.array_equal(result[~mask], image[~mask])


def test_bad_input(composite, tmp_path):
    image, mask = composite
    for bad, match in (
        ((image, mask[:, :50]), "resize"),
        ((image, mask & False), "no foreground"),
        ((image[..., 0], mask), "HxWx3"),
    ):
        with pytest.raises(HarmonyError, match=match):
            hl.harmonize(*bad, model=tmp_path)
    with pytest.raises(HarmonyError, match="no weights"):
        hl.harmonize(image, mask, model=tmp_path / "nothing")
    with pytest.raises(HarmonyError, match="neither"):
        hl.harmonize(image, mask, model=tmp_path)
    with pytest.raises(HarmonyError, match="no such file"):
        hl.harmonize(tmp_path / "a.png", mask)
