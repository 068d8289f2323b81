import json
import os

import pytest
import torch
from conftest import keys_digest
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from harmonylib.core.errors import HarmonyError
from harmonylib.models.vae import HarmonyVAE, harmony_vae_loss
from harmonylib.models.weights import load_autoencoder

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


def test_starts_as_the_plain_autoencoder_bit_for_bit(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae)
    latents, image, mask = inputs()
    with torch.no_grad():
        plain = tiny_vae.decode(latents).sample
        assert torch.equal(model.decode(latents, image, mask).sample, plain)
        assert torch.equal(model.decode(latents).sample, plain)
    assert torch.count_nonzero(model.conditional_encoder.add_conv_in.weight) == 0


def test_starts_anew_around_the_autoencoder_of_a_trained_one(tiny_vae):
    trained = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs()
    with torch.no_grad():
        again = HarmonyVAE.from_vae(trained).decode(latents, image, mask).sample
        assert torch.equal(again, tiny_vae.decode(latents).sample)


def test_other_initialisations(tiny_vae):
    default = HarmonyVAE.from_vae(tiny_vae, mask_init="default")
    assert torch.count_nonzero(default.conditional_encoder.add_conv_in.weight) > 0
    random = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs()
    with torch.no_grad():
        assert not torch.allclose(random.decode(latents, image, mask).sample, tiny_vae.decode(latents).sample)
    with pytest.raises(HarmonyError, match="skip_init"):
        HarmonyVAE.from_vae(tiny_vae, skip_init="ones")


def test_skip_order(tiny_vae):
    """idx k is added after the (k+1)-th decoder resnet from the end (facts of the published system)."""
    model = HarmonyVAE.from_vae(tiny_vae)
    resnets = [resnet for block in model.decoder.up_blocks for resnet in block.resnets]
    latents, image, mask = inputs()
    condition = model.encode_condition(image, mask)
    for index, resnet in enumerate(reversed(resnets)):
        skips = [torch.zeros_like(skip) for skip in condition.skips]
        skips[index] = torch.full_like(skips[index], 3.0)
        seen = {}
        handles = [
            r.register_forward_hook(
                lambda module, args, out, seen=seen: seen.__setitem__(module, (args[0].detach(), out.detach()))
            )
            for r in resnets
        ]
        with torch.no_grad():
            model.decode_with(latents, condition._replace(skips=[torch.zeros_like(s) for s in skips]))
            before = dict(seen)
            model.decode_with(latents, condition._replace(skips=skips))
        for handle in handles:
            handle.remove()
        place = resnets.index(resnet)
        assert all(torch.equal(seen[r][1], before[r][1]) for r in resnets[: place + 1])
        assert all(not torch.equal(seen[r][0], before[r][0]) for r in resnets[place + 1 :])


def test_condition_is_heard_after_a_step(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae).train()
    model.set_trainable()
    latents, image, mask = inputs()
    batch = {
        "moments": torch.cat([latents, torch.full_like(latents, -4)], 1),
        "target": image,
        "condition": image,
        "mask": mask,
    }
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    harmony_vae_loss()(model, batch, torch.Generator().manual_seed(0))["loss"].backward()
    optimiser.step()
    assert all(conv.weight.norm() > 0 for conv in model.skip_convs())
    with torch.no_grad():
        a, b = (model.decode(latents, x, mask, sample_posterior=False).sample for x in (image, -image))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_is_over_the_whole_image(tiny_vae, kind):
    latents, image, mask = inputs()
    batch = {"moments": torch.cat([latents, torch.full_like(latents, -30)], 1), "target": image, "condition": image}
    with torch.no_grad():
        terms = harmony_vae_loss(kind)(HarmonyVAE.from_vae(tiny_vae), batch | {"mask": mask}, torch.Generator())
        error = tiny_vae.decode(latents).sample - image  # fresh: the plain decoder
    assert torch.allclose(terms["loss"], (error.abs() if kind == "l1" else error.square()).mean(), atol=1e-5)
    assert torch.allclose(terms["mse"], error.square().mean(), atol=1e-5)


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
    written = json.loads((tmp_path / "copy/config.json").read_text())
    assert written["additional_in_channels"] == 1
    assert load_file(tmp_path / "copy/diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()


def test_old_autoencoder_files(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(legacy(tiny_vae.state_dict()), tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is AutoencoderKL and same(tiny_vae, loaded)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_and_foreign_folders_are_named(tiny_vae, tmp_path):
    model = HarmonyVAE.from_vae(tiny_vae)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = model.state_dict()
    for change, message in (
        ({"latent_skip_conv.bias": None}, r"1 missing keys \(latent_skip_conv.bias\); not the weights of a HarmonyVAE"),
        ({"alien.weight": torch.zeros(1)}, r"1 unexpected keys \(alien.weight\)"),
        ({"latent_skip_conv.bias": torch.zeros(5)}, "cannot be loaded .*latent_skip_conv.bias"),
    ):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, weights)
        with pytest.raises(HarmonyError, match=message):
            HarmonyVAE.from_pretrained(tmp_path)
    weights.unlink()
    torch.save({"latent_skip_conv.bias": Evil(tmp_path / "was here")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(HarmonyError, match="cannot be loaded"):
        HarmonyVAE.from_pretrained(tmp_path)
    assert not (tmp_path / "was here").exists()
    with pytest.raises(HarmonyError, match="nowhere cannot be loaded"):
        HarmonyVAE.from_pretrained(tmp_path / "nowhere")


def test_slicing_is_exact_and_tiling_close(tiny_vae):
    """Both with a condition and sampled posteriors: the noise is one draw, whatever is cut how."""
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs(size=128, batch=2)
    seeds = lambda: [torch.Generator().manual_seed(s) for s in (1, 2, 3, 4)]  # noqa: E731
    with torch.no_grad():
        both = latents.repeat_interleave(2, dim=0)
        whole = model.decode(both, image, mask, generator=seeds()).sample
        assert not torch.allclose(whole[0], whole[1])
        model.enable_slicing()
        assert torch.allclose(model.decode(both, image, mask, generator=seeds()).sample, whole, atol=1e-4)
        model.enable_tiling()
        model.tile_latent_min_size = 12
        tiled = model.decode(both, image, mask, generator=seeds()).sample
        model.tile_latent_min_size = 16  # not larger than a tile: whole
        assert torch.allclose(model.decode(both, image, mask, generator=seeds()).sample, whole, atol=1e-4)
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    assert 0 < (tiled - whole).abs().mean() < 0.25 * whole.std()


def test_tiles_cover_any_shape_and_hear_their_own_condition(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    model.enable_tiling()
    model.tile_latent_min_size = 8
    latents, image = torch.randn(1, 4, 5, 21), torch.rand(1, 3, 40, 168) * 2 - 1
    mask = torch.ones(1, 1, 40, 168)
    with torch.no_grad():
        before = model.decode(latents, image, mask, sample_posterior=False).sample
        image[..., 120:] *= -1
        after = model.decode(latents, image, mask, sample_posterior=False).sample
    assert before.shape == image.shape and torch.isfinite(before).all()
    assert torch.equal(before[..., :48], after[..., :48]) and not torch.allclose(before[..., 120:], after[..., 120:])


def test_one_condition_for_several_candidates(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs(batch=4)
    with torch.no_grad():
        shared = model.decode(latents, image[:1], mask[:1], sample_posterior=False).sample
        each = model.decode(latents, image[:1].repeat(4, 1, 1, 1), mask[:1].repeat(4, 1, 1, 1), sample_posterior=False)
    assert torch.allclose(shared, each.sample, atol=1e-5)


def test_bad_input(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae)
    latents, image, mask = inputs()
    with pytest.raises(HarmonyError, match="both"):
        model.decode(latents, image)
    with pytest.raises(HarmonyError, match="must be"):
        model.decode(latents, image[..., :24, :], mask)
    with pytest.raises(HarmonyError, match="shared"):
        model.decode(latents, image, mask[:1])
    with pytest.raises(HarmonyError, match="unknown"):
        harmony_vae_loss("l3")


def test_plain_autoencoder_folder_is_refused(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    with pytest.raises(HarmonyError, match="conditional_encoder"):
        HarmonyVAE.from_pretrained(tmp_path)
