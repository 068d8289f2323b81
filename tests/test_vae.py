import json
import os

import pytest
import torch
from conftest import keys_digest
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from harmonylib.core.errors import HarmonyError
from harmonylib.models.vae import HarmonyVAE, harmony_vae_loss, load_autoencoder

LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def legacy(state_dict, convolutions=True):
    """The tensors under the attention names of old files, weights as 1x1 convolutions."""
    old = {}
    for name, tensor in state_dict.items():
        for new, before in LEGACY.items():
            if f"attentions.0.{new}.weight" in name and convolutions:
                tensor = tensor[..., None, None]
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    return old


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def inputs(size=32, batch=2):
    mask = torch.zeros(batch, 1, size, size)
    mask[..., 8:20, 4:24] = 1
    return torch.randn(batch, 4, size // 8, size // 8), torch.rand(batch, 3, size, size) * 2 - 1, mask


def decoded(model, latents, *condition, **options):
    with torch.no_grad():
        return model.decode(latents, *condition, **options).sample


def test_published_size_and_keys():
    with torch.device("meta"):
        model = HarmonyVAE()
    assert count(model) == 119_740_419
    assert count(model.conditional_encoder) == 36_086_536
    model.set_trainable(decoder=True)
    assert count(model, trainable=True) == 85_576_735
    model.set_trainable(decoder=False)
    assert count(model, trainable=True) == 36_086_556
    assert len(model.state_dict()) == 384
    assert keys_digest(model.state_dict()) == "13b45a12d8ea4a26"


def test_initialisations(tiny_vae):
    """A new one, also around the autoencoder of a trained one, equals the plain autoencoder bit for bit."""
    latents, image, mask = inputs()
    plain = decoded(tiny_vae, latents)
    random = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    for model in (HarmonyVAE.from_vae(tiny_vae), HarmonyVAE.from_vae(random)):
        assert torch.equal(decoded(model, latents, image, mask), plain) and torch.equal(decoded(model, latents), plain)
        assert not model.conditional_encoder.add_conv_in.weight.any()
    assert not torch.allclose(decoded(random, latents, image, mask), plain)
    assert HarmonyVAE.from_vae(tiny_vae, mask_init="default").conditional_encoder.add_conv_in.weight.any()
    with pytest.raises(HarmonyError, match="skip_init"):
        HarmonyVAE.from_vae(tiny_vae, skip_init="ones")


def test_skip_order(tiny_vae):
    """idx k is added after the (k+1)-th decoder resnet from the end (facts of the published system)."""
    model = HarmonyVAE.from_vae(tiny_vae)
    resnets = [resnet for block in model.decoder.up_blocks for resnet in block.resnets]
    latents, image, mask = inputs()
    seen = {}
    for resnet in resnets:
        resnet.register_forward_hook(lambda module, given, out: seen.__setitem__(module, given[0].detach()))

    def heard(skips):
        with torch.no_grad():
            model.decode_with(latents, condition._replace(skips=list(skips)))
        return dict(seen)

    condition = model.encode_condition(image, mask)
    silence = [torch.zeros_like(skip) for skip in condition.skips]
    before = heard(silence)
    for index, place in enumerate(reversed(range(len(resnets)))):
        after = heard([torch.full_like(skip, 3.0) if k == index else skip for k, skip in enumerate(silence)])
        same = [torch.equal(after[resnet], before[resnet]) for resnet in resnets]
        assert same == [True] * (place + 1) + [False] * index


def test_condition_is_heard_after_a_step(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae).train()
    model.set_trainable()
    latents, image, mask = inputs()
    moments = torch.cat([latents, torch.full_like(latents, -4)], 1)
    batch = {"moments": moments, "target": image, "condition": image, "mask": mask}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    harmony_vae_loss()(model, batch, torch.Generator().manual_seed(0))["loss"].backward()
    optimiser.step()
    assert all(conv.weight.norm() > 0 for conv in model.skip_convs())
    a, b = (decoded(model, latents, x, mask, sample_posterior=False) for x in (image, -image))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_is_over_the_whole_image(tiny_vae, kind):
    latents, image, mask = inputs()
    batch = {"moments": torch.cat([latents, torch.full_like(latents, -30)], 1), "target": image, "condition": image}
    with torch.no_grad():
        terms = harmony_vae_loss(kind)(HarmonyVAE.from_vae(tiny_vae), batch | {"mask": mask}, torch.Generator())
    error = decoded(tiny_vae, latents) - image  # fresh: the plain decoder
    assert torch.allclose(terms["loss"], (error.abs() if kind == "l1" else error.square()).mean(), atol=1e-5)
    assert torch.allclose(terms["mse"], error.square().mean(), atol=1e-5)
    with pytest.raises(HarmonyError, match="unknown"):
        harmony_vae_loss("l3")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_published_folder_with_old_names(tiny_vae, tmp_path, suffix):
    """As the published folder is: class ConditionVAE, a config of old diffusers, old attention names and shapes."""
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("latents_mean", "latents_std", "shift_factor", "use_quant_conv", "use_post_quant_conv"):
        config.pop(key)
    config |= {"_class_name": "ConditionVAE", "_diffusers_version": "0.26.3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    write = save_file if suffix == "safetensors" else torch.save
    write(legacy(model.state_dict()), tmp_path / f"diffusion_pytorch_model.{suffix}")
    again = HarmonyVAE.from_pretrained(tmp_path)
    assert same(model, again) and not again.training
    again.save_pretrained(tmp_path / "copy")
    assert same(model, HarmonyVAE.from_pretrained(tmp_path / "copy"))
    assert json.loads((tmp_path / "copy/config.json").read_text())["additional_in_channels"] == 1
    assert load_file(tmp_path / "copy/diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()


def test_old_autoencoder_files(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(legacy(tiny_vae.state_dict()), tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is AutoencoderKL and same(tiny_vae, loaded)
    with pytest.raises(HarmonyError, match="conditional_encoder"):
        HarmonyVAE.from_pretrained(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_foreign_folders_are_named(tiny_vae, tmp_path):
    model = HarmonyVAE.from_vae(tiny_vae)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    for change, message in (
        ({"latent_skip_conv.bias": None}, r"1 missing keys \(latent_skip_conv.bias\); not the weights of a HarmonyVAE"),
        ({"alien.weight": torch.zeros(1)}, r"1 unexpected keys \(alien.weight\)"),
        ({"latent_skip_conv.bias": torch.zeros(5)}, "cannot be loaded .*latent_skip_conv.bias"),
    ):
        save_file({name: x for name, x in (model.state_dict() | change).items() if x is not None}, weights)
        with pytest.raises(HarmonyError, match=message):
            HarmonyVAE.from_pretrained(tmp_path)
    weights.unlink()
    torch.save({"latent_skip_conv.bias": Evil(tmp_path / "was here")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(HarmonyError, match="cannot be loaded"):
        HarmonyVAE.from_pretrained(tmp_path)
    assert not (tmp_path / "was here").exists()
    with pytest.raises(HarmonyError, match="nowhere cannot be loaded"):
        HarmonyVAE.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("images", [1, 2])
def test_one_condition_for_several_candidates(tiny_vae, images, monkeypatch):
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs(batch=4)
    each = [x[:images].repeat_interleave(4 // images, dim=0) for x in (image, mask)]
    seeds = lambda: [torch.Generator().manual_seed(s) for s in (1, 2, 3, 4)]  # noqa: E731
    shared = decoded(model, latents, image[:images], mask[:images], generator=seeds())
    assert torch.allclose(shared, decoded(model, latents, *each, generator=seeds()), atol=1e-5)
    monkeypatch.setattr("harmonylib.core.devices.rows_at_once", lambda pixels: 1)
    parts = decoded(model, latents, image[:images], mask[:images], generator=seeds())
    assert torch.allclose(parts, shared, atol=1e-5)
    mode = decoded(model, latents, image[:images], mask[:images], sample_posterior=False)
    assert mode.shape == image.shape and not torch.allclose(mode, shared)
