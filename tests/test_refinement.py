import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import keys_digest
from test_batches import data  # noqa: F401
from test_vae import legacy

from harmonylib.core.errors import HarmonyError
from harmonylib.data.batches import TripleSet
from harmonylib.models.diffusion import DiffHarmonyLoss, diffharmony_batches, unscale_latents
from harmonylib.models.refinement import (
    RefinementUNet,
    decode_latents,
    initial_refiner,
    refine,
    refinement_batches,
    refinement_loss,
    sample_latents,
)
from harmonylib.models.start import initial_harmony_vae, initial_unet
from harmonylib.models.vae import harmony_vae_batches, harmony_vae_loss, skip_norms
from harmonylib.training import TrainSettings, train

SETTINGS = TrainSettings(steps=12, batch_size=2, learning_rate=5e-3, ema_decay=0.0)


def test_the_published_refiner(tmp_path):
    with torch.device("meta"):
        model = RefinementUNet()
    assert sum(p.numel() for p in model.parameters()) == 91_402_627
    assert keys_digest(model.state_dict()) == "207ec666e45a108d"
    tiny = RefinementUNet(block_out_channels=(8, 8, 16, 16), norm_num_groups=4).eval()
    x = torch.randn(1, 7, 21, 30)
    tiny.save_pretrained(tmp_path, safe_serialization=False)
    torch.save(legacy(tiny.state_dict()), tmp_path / "diffusion_pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DCustom", "sample_size": 256}))
    with torch.no_grad():
        assert torch.equal(RefinementUNet.from_pretrained(tmp_path)(x), tiny(x))
        torch.nn.init.zeros_(tiny.conv_out.weight)
        torch.nn.init.zeros_(tiny.conv_out.bias)
        assert torch.equal(tiny(x), x[:, :3])
    torch.save({"conv_in.bias": tiny.conv_in.bias.data}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(HarmonyError, match="missing keys .*not the weights of a RefinementUNet"):
        RefinementUNet.from_pretrained(tmp_path)


def test_stage_one_is_cached_and_seeded_by_name(data, tiny_pipeline, tiny_vae, monkeypatch):  # noqa: F811
    all_three, last = TripleSet(data, 32), TripleSet(data[2:], 32)
    latents = sample_latents(tiny_pipeline, all_three, 0, steps=2, precision="fp32")
    assert latents.shape == (3, 4, 4, 4)
    assert np.allclose(
        sample_latents(tiny_pipeline, last, 0, steps=2, precision="fp32")[0], latents[2], atol=1e-4
    )  # whatever the batch
    assert not np.allclose(sample_latents(tiny_pipeline, all_three, 1, steps=2, precision="fp32"), latents)
    outputs = decode_latents(tiny_pipeline.vae, latents, all_three, 16, 0, precision="fp32")
    assert outputs.shape == (3, 3, 16, 16) and np.abs(outputs).max() <= 1
    plain = decode_latents(tiny_vae, latents, all_three, 32, 0, precision="fp32")
    with torch.no_grad():
        by_hand = tiny_vae.decode(unscale_latents(torch.from_numpy(np.array(latents)), tiny_vae)).sample
    assert np.allclose(plain, by_hand.clamp(-1, 1).numpy(), atol=2e-3)
    monkeypatch.setattr(type(tiny_pipeline), "__call__", lambda *a, **k: pytest.fail("sampled twice"))
    assert np.array_equal(sample_latents(tiny_pipeline, all_three, 0, steps=2, precision="fp32"), latents)


def test_training_a_refiner(data, tiny_pipeline):  # noqa: F811
    triples = TripleSet(data, 32)
    latents = sample_latents(tiny_pipeline, triples, 0, steps=1)
    outputs = decode_latents(tiny_pipeline.vae, latents, triples, 32, 0)
    model, batches = initial_refiner((8, 8), 0), refinement_batches(outputs, triples, 2, 0)
    assert np.allclose(refine(model, outputs, triples), outputs, atol=1e-3)
    history = train(model, refinement_loss, batches, SETTINGS, name="refinement", seed=0, device="cpu")
    error = lambda images: np.square(images - triples.batch(range(3))["real"].numpy()).mean()  # noqa: E731
    assert error(refine(model, outputs, triples)) < error(outputs) and history[-1]["loss"] < history[0]["loss"]


def test_latent_models_train_on_crops(data, tiny_pipeline, tiny_vae):  # noqa: F811
    triples, seen = TripleSet(data, 32), []
    section = SimpleNamespace(batch_size=2, crop=16, mask_start="zero", mask_init="zero", train_decoder=False,
                              edge=False, first_step=0.0)  # fmt: skip
    tiny_pipeline.vae, loop = tiny_vae, {"name": "test", "seed": 0, "device": "cpu"}
    unet = initial_unet(section, None, tiny_pipeline)
    assert not unet.conv_in.weight[:, 4].any()
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    batches = diffharmony_batches(tiny_vae, triples, "harmonize", section, 0)
    train(unet, DiffHarmonyLoss(tiny_pipeline, tiny_pipeline.prompt), batches, SETTINGS, **loop)
    assert set(seen) == {(2, 9, 2, 2)}
    model = initial_harmony_vae(section, None, tiny_vae, 0)
    batches = harmony_vae_batches(model, triples, "inverse", section, 0)
    norms = train(model, harmony_vae_loss(), batches, SETTINGS, observe=skip_norms, **loop)[-1]["skip_norms"]
    assert len(norms) == len(model.skip_convs()) and all(norm > 0 for norm in norms)
    assert torch.equal(model.decoder.conv_in.weight, tiny_vae.decoder.conv_in.weight)
    for section.crop in (12, 40):
        with pytest.raises(HarmonyError, match="multiple of 8"):
            diffharmony_batches(tiny_vae, triples, "harmonize", section, 0)
