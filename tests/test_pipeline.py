import numpy as np
import pytest
import torch
from PIL import Image

from harmonylib.diffusion import base_scheduler, foreground_weighted_mse, latent_mask, sampling_scheduler
from harmonylib.errors import HarmonyError
from harmonylib.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.pretrain import build_unet


def example(height=40, width=50, batch=1):
    mask = torch.zeros(batch, 1, height, width)
    mask[..., 10:30, 10:30] = 1
    return torch.rand(batch, 3, height, width) * 2 - 1, mask


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_published_time_steps_and_sigmas(tmp_path):
    scheduler = sampling_scheduler(base_scheduler("epsilon").config)
    scheduler.save_pretrained(tmp_path)
    for sampler in (scheduler, sampling_scheduler(type(scheduler).from_pretrained(tmp_path).config)):
        sampler.set_timesteps(5)
        assert sampler.timesteps.tolist() == [999.0, 749.25, 499.5, 249.75, 0.0]
        expected = torch.tensor([14.6146, 4.0861, 1.6156, 0.6952, 0.02917, 0.0])
        assert torch.allclose(sampler.sigmas, expected, atol=5e-5)
        assert abs(float(sampler.init_noise_sigma) - 14.6146) < 1e-4


def test_background_is_pasted_and_sizes_kept(tiny_pipeline):
    image, mask = example(41, 53)
    output = tiny_pipeline(image, mask, generator=seeds(0), output_type="pt").images
    assert output.shape == image.shape
    outside = (mask == 0).expand_as(image)
    assert torch.allclose(output[outside], image[outside] / 2 + 0.5, atol=1e-6)
    raw = tiny_pipeline(image, mask, generator=seeds(0), output_type="pt", paste=False).images
    assert not torch.allclose(raw[outside], output[outside])


def test_seed_decides_whatever_the_batch(tiny_pipeline):
    image, mask = example(batch=3)
    together = tiny_pipeline(image, mask, generator=seeds(5, 6, 7), output_type="pt").images
    alone = tiny_pipeline(image[1:2], mask[1:2], generator=seeds(6), output_type="pt").images
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other = tiny_pipeline(image[1:2], mask[1:2], generator=seeds(8), output_type="pt").images
    assert not torch.allclose(other, alone, atol=1e-2)


def test_candidates_share_the_condition_and_differ(tiny_pipeline):
    image, mask = example()
    many = tiny_pipeline(image, mask, generator=seeds(1, 2, 3), candidates=3, output_type="pt").images
    alone = tiny_pipeline(image, mask, generator=seeds(2), output_type="pt").images
    assert len(many) == 3 and torch.allclose(many[1:2], alone, atol=1e-4)
    assert not torch.allclose(many[0], many[2], atol=1e-2)


def test_random_draws_in_the_published_order(tiny_pipeline, monkeypatch):
    """Initial latents, composite posterior, one per step (also the last), condition posterior in the decoder."""
    import diffusers.models.autoencoders.vae as vae_module
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as euler

    import harmonylib.pipeline as pipeline_module

    calls = []
    for module, name in ((pipeline_module, "pipeline"), (euler, "step"), (vae_module, "decoder")):
        original = module.randn_tensor
        record = lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", record)
    tiny_pipeline(*example(), generator=seeds(0))
    assert calls == ["pipeline", "pipeline", *["step"] * 5, "decoder"]


def test_input_and_output_kinds_agree(tiny_pipeline):
    image, mask = example()
    array = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    region = (mask[0, 0].numpy() * 255).astype(np.uint8)
    (pil,) = tiny_pipeline(Image.fromarray(array), Image.fromarray(region), generator=seeds(0)).images
    (same,) = tiny_pipeline(array, region > 127, generator=seeds(0)).images
    assert isinstance(pil, Image.Image) and pil.size == (50, 40)
    assert np.array_equal(np.asarray(pil), np.asarray(same))
    assert np.array_equal(np.asarray(pil)[region == 0], array[region == 0])
    latents = tiny_pipeline(image, mask, generator=seeds(0), output_type="latent").images
    assert latents.shape == (1, 4, 5, 7)


def test_height_and_width_squash(tiny_pipeline):
    assert tiny_pipeline(*example(), height=32, width=64, output_type="pt").images.shape == (1, 3, 32, 64)


def test_save_and_load(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    again = DiffHarmonyPipeline.from_pretrained(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is type(tiny_pipeline.vae)
    image, mask = example()
    first, second = (p(image, mask, generator=seeds(0), output_type="pt").images for p in (tiny_pipeline, again))
    assert torch.allclose(first, second, atol=1e-5)


def test_bad_input(tiny_pipeline, tmp_path):
    image, mask = example()
    with pytest.raises(HarmonyError, match="resize the mask"):
        tiny_pipeline(image, mask[..., :20])
    with pytest.raises(HarmonyError, match="no foreground"):
        tiny_pipeline(image, torch.zeros_like(mask))
    with pytest.raises(HarmonyError, match="generators"):
        tiny_pipeline(image, mask, generator=seeds(0, 1))
    with pytest.raises(HarmonyError, match="channels"):
        DiffHarmonyPipeline(
            tiny_pipeline.vae, build_unet((32, 32), latent_channels=3), tiny_pipeline.scheduler, PromptEmbedding(1, 32)
        )
    with pytest.raises(HarmonyError, match="fp16"):
        tiny_pipeline.unet.half()
        tiny_pipeline(image, mask)
    with pytest.raises(HarmonyError, match="cannot be loaded"):
        DiffHarmonyPipeline.from_pretrained(tmp_path)


def test_everything_foreground_and_one_pixel(tiny_pipeline):
    image, mask = example()
    assert torch.isfinite(tiny_pipeline(image, torch.ones_like(mask), output_type="pt").images).all()
    tiny = tiny_pipeline(image[..., :1, :1], torch.ones(1, 1, 1, 1), output_type="pt").images
    assert tiny.shape == (1, 3, 1, 1) and torch.isfinite(tiny).all()


def test_latent_mask_takes_the_top_left_pixel():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 0, 0] = 1
    mask[..., 9, 9] = 1
    assert latent_mask(mask, (2, 2)).flatten().tolist() == [1, 0, 0, 0]


def test_foreground_weight_is_clamped_between_1_and_5():
    prediction, target = torch.ones(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., :5, :] = 1  # half: error 0.5, weight 2
    assert foreground_weighted_mse(prediction, target, mask).item() == pytest.approx(1.0)
    mask.zero_()
    mask[..., 0, 0] = 1  # one of a hundred: error 0.01, weight clamped to 5
    assert foreground_weighted_mse(prediction, target, mask).item() == pytest.approx(0.05)
