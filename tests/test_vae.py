import pytest
import torch
from conftest import keys_digest
from diffusers import AutoencoderKL

from harmonylib.errors import HarmonyError
from harmonylib.vae import HarmonyVAE, harmony_vae_loss


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


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_round_trip_and_legacy_names(tiny_vae, tmp_path, suffix):
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    model.save_pretrained(tmp_path, safe_serialization=suffix == "safetensors")
    if suffix == "bin":
        path = tmp_path / "diffusion_pytorch_model.bin"
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        legacy = {}
        for name, tensor in torch.load(path, weights_only=True).items():
            for new, old in names.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            legacy[name] = tensor
        torch.save(legacy, path)
    again = HarmonyVAE.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_tiling_agrees_roughly_and_slicing_exactly(tiny_vae):
    model = HarmonyVAE.from_vae(tiny_vae, skip_init="random")
    latents, image, mask = inputs(size=128, batch=2)
    with torch.no_grad():
        whole = model.decode(latents, image, mask, sample_posterior=False).sample
        model.enable_slicing()
        assert torch.allclose(model.decode(latents, image, mask, sample_posterior=False).sample, whole, atol=1e-4)
        model.enable_tiling()
        model.tile_latent_min_size = 12
        tiled = model.decode(latents, image, mask, sample_posterior=False).sample
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    assert (tiled - whole).abs().mean() < 0.25 * whole.std()


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
    with pytest.raises(HarmonyError, match="unknown"):
        harmony_vae_loss("l3")


def test_plain_autoencoder_folder_is_refused(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path) is not None
    with pytest.raises(HarmonyError, match="conditional_encoder"):
        HarmonyVAE.from_pretrained(tmp_path)
