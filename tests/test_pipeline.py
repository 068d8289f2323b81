import contextlib
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_vae import legacy

from harmonylib.core.errors import HarmonyError
from harmonylib.inference import load_model
from harmonylib.models import diffusion
from harmonylib.models.base import build_autoencoder, build_unet, open_base
from harmonylib.models.diffusion import (
    base_scheduler,
    denoising_loss,
    latent_mask,
    sampling_scheduler,
)
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding, open_autoencoder, read_inputs
from harmonylib.models.vae import HarmonyVAE


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
    """Of images, and of candidates, which share the condition."""
    image, mask = example(batch=3)
    together = tiny_pipeline(image, mask, generator=seeds(5, 6, 7), output_type="pt").images
    alone = tiny_pipeline(image[1:2], mask[1:2], generator=seeds(6), output_type="pt").images
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    many = tiny_pipeline(image[1:2], mask[1:2], generator=seeds(8, 6), candidates=2, output_type="pt").images
    assert torch.allclose(many[1:], alone, atol=1e-4) and not torch.allclose(many[:1], alone, atol=1e-2)


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_against_the_formulas(prediction, foreground):
    """Eq. 1 with uniform time steps, input [noisy | mask | condition], foreground-weighted or plain."""
    target, condition, output = torch.randn(3, 2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, :3], mask[1, :, 0, 0] = 1, 1  # weights 2, and 36 clamped to 5
    prompt, seen = torch.randn(1, 3, 8), []
    unet = lambda *args: seen.append(args) or SimpleNamespace(sample=output)  # noqa: E731
    scheduler, draw = base_scheduler(prediction), torch.Generator().manual_seed(3)
    loss = denoising_loss(unet, scheduler, target, condition, mask, prompt, draw, foreground)
    draw.manual_seed(3)
    noise, t = torch.randn(target.shape, generator=draw), torch.randint(0, 1000, (2,), generator=draw)
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).sqrt()
    if prediction == "v_prediction":  # ends in pure noise: Lin et al. 2024, Algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha = root[t].square().view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * target + (1 - alpha).sqrt() * noise
    goal = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * target
    inputs, steps, embeds = seen[0]
    assert torch.allclose(inputs, torch.cat([noisy, mask, condition], 1), atol=1e-5) and torch.equal(steps, t)
    assert torch.equal(embeds, prompt.expand(2, 3, 8))
    error = (output - goal).square()
    weighted = (error * mask).mean((1, 2, 3)) * torch.tensor([2.0, 5.0])
    assert torch.allclose(loss, weighted.mean() if foreground else error.mean(), atol=1e-5)


def test_the_attention_of_training_changes_no_result(tiny_pipeline, monkeypatch):
    images = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    target, condition, mask = images[0], images[1], (images[2, :, :1] > 0).float()
    unet, prompt, gradients = tiny_pipeline.unet, tiny_pipeline.prompt.embeds, []
    for pick in (diffusion.training_attention, lambda latents: contextlib.nullcontext()):
        monkeypatch.setattr(diffusion, "training_attention", pick)
        draw = torch.Generator().manual_seed(1)
        loss = denoising_loss(unet, base_scheduler("epsilon"), target, condition, mask, prompt, draw)
        gradients.append(torch.autograd.grad(loss, unet.conv_in.weight)[0])
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6) and gradients[0].any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_against_the_formulas(tiny_pipeline, prediction):
    """Euler ancestral written out, with the published order of draws from one generator: initial latents, posterior of
    the composite, one noise per step (the last too), posterior of the condition in the decoder."""
    vae, unet = tiny_pipeline.vae, tiny_pipeline.unet
    vae.latent_skip_conv.reset_parameters()  # so that the last draw is heard
    tiny_pipeline.scheduler = sampling_scheduler(base_scheduler(prediction).config)
    image, mask = example(40, 48)
    sigmas = [14.6146, 4.0861, 1.6156, 0.6952, 0.02917, 0.0]  # rounded, as printed in the facts
    if prediction == "v_prediction":  # our base's: rescaled to end in pure noise
        sigmas = [4096.0, 5.40664, 1.77132, 0.72915, 0.02917, 0.0]
    draw = torch.Generator().manual_seed(3)
    noise = lambda: torch.randn(1, 4, 5, 6, generator=draw)  # noqa: E731
    with torch.no_grad():
        latents = noise() * sigmas[0]
        posterior = vae.encode(image).latent_dist
        composite = (posterior.mean + posterior.std * noise()) * vae.config.scaling_factor
        small = mask[..., ::8, ::8]
        for t, now, after in zip([999, 749.25, 499.5, 249.75, 0], sigmas[:-1], sigmas[1:], strict=True):
            x = torch.cat([latents / (now**2 + 1) ** 0.5, small, composite], dim=1)
            out = unet(x, t, tiny_pipeline.prompt.embeds).sample
            if prediction == "epsilon":
                clean = latents - now * out
            else:
                clean = latents / (now**2 + 1) - out * now / (now**2 + 1) ** 0.5
            up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
            down = (after**2 - up**2) ** 0.5
            latents = latents + (latents - clean) / now * (down - now) + noise() * up
        skips, mid, moments = vae.conditional_encoder(image, mask)
        mean, logvar = vae.quant_conv(moments).chunk(2, dim=1)
        z = mean + (logvar.clamp(-30, 20) / 2).exp() * noise()
        z = vae.post_quant_conv(latents / vae.config.scaling_factor) + vae.latent_skip_conv(vae.post_quant_conv(z))
        expected = vae.decoder(z)  # the other skips are still zero
    result = tiny_pipeline(image, mask, generator=seeds(3)[0], paste=False, output_type="pt").images
    sampled = tiny_pipeline(image, mask, generator=seeds(3)[0], output_type="latent").images
    assert torch.allclose(sampled, latents, atol=2e-3)
    assert torch.allclose(result * 2 - 1, expected.clamp(-1, 1), atol=5e-3)


@pytest.mark.parametrize("steps, times", [(1, [999]), (2, [999, 0]), (3, [999, 499.5, 0])])
def test_the_noisiest_step_is_always_taken(tiny_pipeline, monkeypatch, steps, times):
    seen, forward = [], tiny_pipeline.unet.forward
    monkeypatch.setattr(tiny_pipeline.unet, "forward", lambda x, t, e: seen.append(float(t)) or forward(x, t, e))
    tiny_pipeline(*example(), steps)
    assert seen == times


def test_what_is_drawn_at_the_first_step_is_noise_alone(tiny_pipeline):
    """With our base's schedule nothing of the target is left in the input there, and every sample is drawn there."""
    inputs = []

    def unet(x, steps, prompt):
        inputs.append((x[:, :4], steps))
        return SimpleNamespace(sample=torch.zeros_like(x[:, :4]))

    mask, prompt = torch.ones(2, 1, 8, 8), tiny_pipeline.prompt.embeds
    for target in (torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 9.0)):
        draw = torch.Generator().manual_seed(0)
        denoising_loss(unet, base_scheduler("v_prediction"), target, target, mask, prompt, draw, first=1.0)
    assert torch.equal(inputs[0][0], inputs[1][0]) and all((steps == 999).all() for _, steps in inputs)


def test_input_and_output_kinds_agree(tiny_pipeline):
    image, mask = example()
    array = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    region = (mask[0, 0].numpy() * 255).astype(np.uint8)
    (pil,) = tiny_pipeline(Image.fromarray(array), Image.fromarray(region), generator=seeds(0)).images
    (same,) = tiny_pipeline(array, region > 127, generator=seeds(0)).images
    assert isinstance(pil, Image.Image) and pil.size == (50, 40)
    assert np.array_equal(np.asarray(pil), np.asarray(same))
    assert np.array_equal(np.asarray(pil)[region == 0], array[region == 0])
    prompts = ({}, {"prompt_embeds": torch.randn(1, 1, 32)})
    cached, other = (
        tiny_pipeline(image, mask, generator=seeds(0), output_type="latent", **prompt).images for prompt in prompts
    )
    assert cached.shape == (1, 4, 5, 7) and not torch.equal(cached, other)


def test_sizes(tiny_pipeline):
    """Whatever the input's; height and width squash it; a base with quarter latents."""
    image, mask = example(41, 53)
    for few in (image[..., :1, :1], image):
        output = tiny_pipeline(few, torch.ones_like(few[:, :1]), output_type="pt").images
        assert output.shape == few.shape and output.isfinite().all()
    assert tiny_pipeline(image, mask, height=32, width=64, output_type="pt").images.shape == (1, 3, 32, 64)
    vae = HarmonyVAE.from_vae(build_autoencoder((8, 8, 16))).eval()
    pipeline = DiffHarmonyPipeline(vae, tiny_pipeline.unet, tiny_pipeline.scheduler, tiny_pipeline.prompt)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(image, mask, output_type="latent").images.shape == (1, 4, 11, 14)
    assert pipeline(image, mask, output_type="pt").images.shape == image.shape


def test_bad_input(tiny_pipeline, tmp_path):
    """Sizes that differ, within a list too, stacked arrays, alpha channels, empty masks and options."""
    image, mask = example()
    first, second, region = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 24, 3), np.uint8), np.ones((16, 16), bool)
    for images, masks in (
        ([first, second], [region, np.ones((16, 24), bool)]),
        (np.stack([first, first]), [region, region]),
        (np.zeros((16, 16, 4), np.uint8), region),
        (torch.zeros(1, 4, 16, 16), region),
        (first, torch.zeros(1, 3, 16, 16)),
        (image, mask[..., :20]),
    ):
        with pytest.raises(HarmonyError, match="pass .* resize the mask"):
            tiny_pipeline(images, masks)
    for message, masks, options in (
        ("no foreground", torch.zeros_like(mask), {}),
        ("2 generators for 1", mask, {"generator": seeds(0, 1)}),
        ("output_type 'np'", mask, {"output_type": "np"}),
    ):
        with pytest.raises(HarmonyError, match=message):
            tiny_pipeline(image, masks, **options)
    with pytest.raises(HarmonyError, match="takes 7 channels, not 9"):
        DiffHarmonyPipeline(
            tiny_pipeline.vae, build_unet((32, 32), latent_channels=3), tiny_pipeline.scheduler, PromptEmbedding(1, 32)
        )
    with pytest.raises(HarmonyError, match="cannot be loaded"):
        DiffHarmonyPipeline.from_pretrained(tmp_path)
    with pytest.raises(HarmonyError, match="fp16"):
        tiny_pipeline.unet.half()
        tiny_pipeline(image, mask)
    levels = np.zeros((16, 16), np.uint16)
    levels[:4], levels[8:] = 300, 65535  # a 16-bit mask is read by its share of white
    assert read_inputs(Image.fromarray(first), Image.fromarray(levels))[1].sum() == 8 * 16


def test_a_folder_that_names_modules_as_they_were_once(tiny_pipeline, tmp_path):
    """What was saved before modules moved loads as it is: the classes of the parts are known without their names."""
    tiny_pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    written = json.loads(index.read_text())
    assert written["prompt"] == ["harmonylib.models.pipeline", "PromptEmbedding"]
    old = {"prompt": ["harmonylib.pipeline", "PromptEmbedding"], "vae": ["harmonylib.vae", written["vae"][1]]}
    index.write_text(json.dumps(written | old))
    loaded = load_model(tmp_path, "cpu")
    assert type(loaded.vae) is HarmonyVAE
    inputs = example()
    first, second = (p(*inputs, generator=seeds(0), output_type="pt").images for p in (tiny_pipeline, loaded))
    assert torch.allclose(first, second, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text()) == written


def test_saved_configs_do_not_tell_where_the_parts_were(tiny_pipeline, tiny_vae, tmp_path):
    """Else the hashes of artifacts would differ between folders."""
    tiny_pipeline.save_pretrained(tmp_path / "first")
    tiny_vae.save_pretrained(tmp_path / "plain")
    AutoencoderKL.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "plain")  # diffusers names the folder
    assert str(tmp_path) in (tmp_path / "plain/config.json").read_text()
    for vae in (None, open_autoencoder(tmp_path / "plain")):
        loaded = DiffHarmonyPipeline.from_pretrained(tmp_path / "first", vae, device="cpu")
        loaded.save_pretrained(tmp_path / "again")
        HarmonyVAE.from_vae(loaded.vae).save_pretrained(tmp_path / "again/condition_vae")
        texts = [path.read_text() for path in (tmp_path / "again").rglob("*.json")]
        assert len(texts) == 6 and not any("_name_or_path" in text or str(tmp_path) in text for text in texts)


@pytest.fixture
def sd_folder(tiny_vae, tmp_path):
    """A random folder in the layout of Stable Diffusion inpainting: .bin files, old attention names, PNDM scheduler."""
    tiny_vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    torch.save(legacy(tiny_vae.state_dict()), tmp_path / "vae/diffusion_pytorch_model.bin")
    build_unet((32, 32)).half().save_pretrained(tmp_path / "unet", safe_serialization=False)
    for name in ("scheduler", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"):
        (tmp_path / name).mkdir()
    scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_schedule": "scaled_linear"}
    scheduler |= {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "set_alpha_to_one": False}
    scheduler |= {"skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    return tmp_path


def test_stable_diffusion_folder(sd_folder, tiny_vae, monkeypatch):
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (sd_folder / "tokenizer/vocab.json").write_text(json.dumps(words))
    (sd_folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(sd_folder / "tokenizer").save_pretrained(sd_folder / "tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config).eval()
    encoder.save_pretrained(sd_folder / "text_encoder")
    open_it = partial(DiffHarmonyPipeline.from_pretrained, sd_folder, device="cpu")
    pipeline = open_it()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        assert torch.allclose(pipeline.prompt.embeds, encoder(torch.tensor([[0] + [1] * 76]))[0], atol=1e-5)
    image, mask = example()
    assert pipeline(image, mask, generator=seeds(0), output_type="pt").images.shape == image.shape
    assert pipeline.scheduler.timesteps.tolist() == [999.0, 749.25, 499.5, 249.75, 0.0]
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.unet.dtype == torch.float32
    pipeline.save_pretrained(sd_folder / "saved")
    again = DiffHarmonyPipeline.from_pretrained(sd_folder / "saved", device="cpu")
    assert torch.equal(again.prompt.embeds, pipeline.prompt.embeds)

    assert open_it(tiny_vae).vae is tiny_vae
    settings = SimpleNamespace(source="stable-diffusion", path=str(sd_folder), vae=str(sd_folder / "vae"))
    assert torch.equal(open_base(settings, 0).vae.decoder.conv_in.weight, tiny_vae.decoder.conv_in.weight)
    HarmonyVAE.from_vae(tiny_vae).save_pretrained(sd_folder / "condition_vae")
    settings.vae = str(sd_folder / "condition_vae")
    assert isinstance(open_base(settings, 0).vae, HarmonyVAE)

    shutil.rmtree(sd_folder / "unet")
    with pytest.raises(HarmonyError, match="unet cannot be loaded"):
        open_it()
    shutil.rmtree(sd_folder / "tokenizer")
    with pytest.raises(HarmonyError, match="tokenizer: is not that of text_encoder"):
        open_it()
    weights = sd_folder / "text_encoder/model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "final_layer_norm.weight" not in k}, weights)
    with pytest.raises(HarmonyError, match="text_encoder: 1 missing keys .*final_layer_norm.weight"):
        open_it()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HarmonyError, match=r"harmonylib\[sd\]"):
        open_it()


def test_latent_mask_takes_the_top_left_pixel():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 0, 0] = 1
    mask[..., 9, 9] = 1
    assert latent_mask(mask, (2, 2)).flatten().tolist() == [1, 0, 0, 0]
