import json

import numpy as np
import odd
import pytest
import torch
from conftest import COLOUR, save_resunet
from PIL import Image

import harmonylib as hl
from harmonylib.core.devices import autocast
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import shrink_pair, to_tensor, to_uint8
from harmonylib.core.seeds import generator
from harmonylib.inference import (
    blend,
    carry_over,
    load_model,
    model_window,
    predicted_map,
    recolored,
    run_model,
    working_size,
)
from harmonylib.models.colour_map import apply_map


@pytest.fixture
def composite():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[10:40, 20:70] = True
    return image, mask


@pytest.fixture
def resunet(tmp_path):
    """The folder of a random ResUNet that works at 32 px."""
    return save_resunet(tmp_path / "net")


def test_background_untouched_at_any_size(tiny_pipeline, tmp_path, composite):
    tiny_pipeline.vae.register_to_config(sample_size=32)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    image, mask = composite
    output = np.asarray(hl.harmonize(image, mask, model=tmp_path / "model", device="cpu"))
    assert output.shape == image.shape and np.array_equal(output[~mask], image[~mask])
    assert not np.array_equal(output[mask], image[mask])
    again = np.asarray(hl.harmonize(image, mask, model=tmp_path / "model", device="cpu"))
    assert np.array_equal(output, again)


def test_strength_feather_and_mask_size(resunet, composite):
    image, mask = composite
    mask[40:60, 20:70] = True  # down to the picture's border

    def run(**options):
        return np.asarray(hl.harmonize(image, mask, model=resunet, device="cpu", **options)).astype(int)

    full, half, none = run(), run(strength=0.5), run(strength=0)
    assert np.array_equal(none, image)
    inner = (full > 0) & (full < 255)  # the change is halved before it is clipped
    assert np.abs(half - (image + full) / 2)[inner].max() <= 0.5 and np.abs(full - image).max() > 2
    soft = run(feather=8)
    assert np.array_equal(soft[~mask], image[~mask])
    change, whole = np.abs(soft - image)[..., 0].astype(float), np.abs(full - image)[..., 0]
    assert np.array_equal(soft[30:60, 32:58], full[30:60, 32:58])  # deep inside and at the border: all of it
    assert change[10, 30:60].sum() < 0.3 * whole[10, 30:60].sum()  # at the mask's edge: an eighth
    small = Image.fromarray(mask[::2, ::2])
    with pytest.raises(HarmonyError, match="45x30 but the picture is 90x60.*--resize-mask"):
        hl.harmonize(image, small, model=resunet, device="cpu")
    assert np.array_equal(np.asarray(hl.harmonize(image, small, model=resunet, device="cpu", fit_mask=True)), full)


def test_the_mean_of_draws(tiny_pipeline, composite):
    image, mask = composite[0][:48, :64], composite[1][:48, :64]
    one, mean = (run_model(tiny_pipeline, image, mask, 3, draws).astype(float) for draws in (1, 4))
    noise = generator(3, "harmonize")
    inputs = to_tensor(image)[None], to_tensor(mask)[None]
    with autocast(tiny_pipeline.device):
        drawn = tiny_pipeline(*inputs, generator=noise, paste=False, output_type="pt", candidates=4).images
    assert np.abs(mean - 255 * drawn.mean(0).permute(1, 2, 0).numpy()).max() <= 1
    assert np.abs(mean - one).max() > 1


def test_a_colour_map_is_applied_at_full_size_as_strongly_as_asked(tmp_path, composite, monkeypatch):
    monkeypatch.setattr("harmonylib.inference.BLOCK", 700)  # several blocks
    folder = save_resunet(tmp_path / "net", **COLOUR, map_std=2.0)
    image, mask = composite[0] // 2 + 60, composite[1]
    image[20, 30:40] = image[20, 30]  # one colour: one colour after, at any size and without blur

    def run(**options):
        return np.asarray(hl.harmonize(image, mask, model=folder, device="cpu", **options))

    model = load_model(str(folder), "cpu")
    found = predicted_map(model, *shrink_pair(image, mask, working_size(model)))
    colours = to_tensor(image)[None]
    for strength in (0.0, 0.3, 1.0):
        mapped = to_uint8(colours + strength * (apply_map(found, colours) - colours))[0].astype(int)
        result = run(strength=strength)
        assert np.abs(result[mask] - mapped[mask]).max() <= 1 and np.array_equal(result[~mask], image[~mask])
        assert (result[20, 30:40] == result[20, 30]).all()
    full = run()
    assert np.abs(full[mask].astype(int) - image[mask]).mean() > 5 and np.array_equal(full, run(seed=3))
    soft = run(feather=8)
    assert np.array_equal(soft[20:30, 30:60], full[20:30, 30:60]) and not np.array_equal(soft[10], full[10])


def test_blend_is_linear_in_depth():
    region = np.ones((9, 9), bool)
    region[:, 0] = False
    pixels, colours = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 200, np.uint8)
    levels = region * np.uint8(255)
    result = blend(pixels, colours, levels, 4)
    assert result[4, :, 0].tolist() == [0, 50, 100, 150, 200, 200, 200, 200, 200]
    assert blend(pixels, colours, levels)[4, :, 0].tolist() == [0] + [200] * 8


def test_transparency_and_metadata(resunet, composite):
    image, mask = composite
    alpha = np.full(mask.shape, 255, np.uint8)
    alpha[:, 60:] = 0
    before = Image.fromarray(np.dstack([image, alpha]))
    before.info["icc_profile"] = odd.SRGB
    after = hl.harmonize(before, mask, model=resunet, device="cpu")
    bands = np.asarray(after)
    assert after.mode == "RGBA" and after.info == before.info and np.array_equal(bands[..., 3], alpha)
    same = ~mask | (alpha == 0)
    assert np.array_equal(bands[same], np.asarray(before)[same]) and not np.array_equal(
        bands[..., :3][mask], image[mask]
    )


def test_a_small_foreground_gets_a_window():
    region = np.zeros((400, 1000), bool)
    region[390:396, 5:45] = True
    rows, columns = model_window(region, 64)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (336, 400, 0, 120)
    region[:, 500:] = True
    assert model_window(region, 64) == (slice(0, 400), slice(0, 1000))


def test_carry_over_repeats_a_known_colour_change(composite):
    """A change that is a colour map at working size is the same map at full size, and light across it is kept."""
    ramp = np.linspace(0, 1, 90)[None, :, None] * [90, 60, 30] + np.linspace(60, 120, 60)[:, None, None]
    image, mask = ramp.astype(np.uint8), composite[1]
    light = 1 + 0.2 * np.sin(np.linspace(0, 3, 60))[:, None, None]
    for gain, bound in ((0.9, 2), (light, 4)):
        changed = np.clip(image * gain + np.array([8, 0, -6]), 0, 255).round().astype(np.uint8)
        small, small_changed, small_mask = image[::2, ::2], changed[::2, ::2], mask[::2, ::2]
        result = recolored(image, mask, *carry_over(small, small_changed, small_mask), 1.0)
        assert np.abs(result[mask].astype(int) - changed[mask]).max() <= bound
        assert np.array_equal(result[~mask], image[~mask])


def test_bad_input(composite, tmp_path, resunet):
    image, mask = composite
    for bad, match in (
        ((image, mask[:, :50]), "50x60 but the picture is 90x60"),
        ((image, mask & False), "no foreground"),
        ((image, mask | True), "all is foreground"),
        ((image[..., 0], mask), "HxWx3"),
        ((tmp_path / "a.png", mask), "no such file"),
    ):
        with pytest.raises(HarmonyError, match=match):
            hl.harmonize(*bad, model=resunet)
    wrong = ({"strength": 1.5}, "strength is 1.5"), ({"feather": -1}, "feather is -1"), ({"draws": 0}, "draws is 0")
    for options, match in wrong:
        with pytest.raises(HarmonyError, match=match):
            hl.harmonize(image, mask, model=resunet, **options)


def test_the_working_size_is_what_the_unet_saw(tiny_pipeline):
    tiny_pipeline.vae.register_to_config(sample_size=32)
    assert working_size(tiny_pipeline) == 32
    tiny_pipeline.unet.register_to_config(sample_size=64)  # as Stable Diffusion's: latents
    assert working_size(tiny_pipeline) == 64 * tiny_pipeline.factor


def test_weights_saved_anew_are_loaded_anew(tmp_path):
    first = load_model(str(save_resunet(tmp_path)), "cpu")
    assert load_model(str(tmp_path), "cpu") is first
    with torch.no_grad():
        next(first.parameters()).add_(1)
    first.save_pretrained(tmp_path)
    second = load_model(str(tmp_path), "cpu")
    assert second is not first and torch.equal(next(second.parameters()), next(first.parameters()))


def test_missing_and_damaged_weights(tmp_path, resunet, tiny_pipeline):
    with pytest.raises(HarmonyError, match="no weights"):
        load_model(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(HarmonyError, match="neither"):
        load_model(str(tmp_path), "cpu")
    tiny_pipeline.save_pretrained(tmp_path / "model")
    for folder, name in ((resunet, resunet), (tmp_path / "model", "model/unet")):
        weights = tmp_path / name / "diffusion_pytorch_model.safetensors"
        for damage in (lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.unlink()):
            damage(weights)
            with pytest.raises(HarmonyError, match=f"{name} cannot be loaded"):
                load_model(str(folder), "cpu")
    config = json.loads((resunet / "config.json").read_text())
    (resunet / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(HarmonyError, match="not a ContrastiveResUNet"):
        load_model(str(resunet), "cpu")
