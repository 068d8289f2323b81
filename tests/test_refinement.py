import json

import numpy as np
import pytest
import torch
from conftest import keys_digest
from test_batches import data  # noqa: F401
from test_vae import legacy

from harmonylib import trainers
from harmonylib.core.errors import HarmonyError
from harmonylib.data.batches import TripleSet
from harmonylib.models.diffusion import unscale_latents
from harmonylib.models.refinement import RefinementUNet, decode_latents, refine, sample_latents
from harmonylib.training import TrainSettings

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
    latents = sample_latents(tiny_pipeline, all_three, 0, steps=2)
    assert latents.shape == (3, 4, 4, 4)
    assert np.allclose(sample_latents(tiny_pipeline, last, 0, steps=2)[0], latents[2], atol=1e-4)  # whatever the batch
    assert not np.allclose(sample_latents(tiny_pipeline, all_three, 1, steps=2), latents)
    outputs = decode_latents(tiny_pipeline.vae, latents, all_three, 16, 0)
    assert outputs.shape == (3, 3, 16, 16) and np.abs(outputs).max() <= 1
    plain = decode_latents(tiny_vae, latents, all_three, 32, 0)
    with torch.no_grad():
        by_hand = tiny_vae.decode(unscale_latents(torch.from_numpy(np.array(latents)), tiny_vae)).sample
    assert np.allclose(plain, by_hand.clamp(-1, 1).numpy(), atol=2e-3)
    monkeypatch.setattr(type(tiny_pipeline), "__call__", lambda *a, **k: pytest.fail("sampled twice"))
    assert np.array_equal(sample_latents(tiny_pipeline, all_three, 0, steps=2), latents)


def test_training_a_refiner(data, tiny_pipeline):  # noqa: F811
    triples = TripleSet(data, 32)
    latents = sample_latents(tiny_pipeline, triples, 0, steps=1)
    outputs = decode_latents(tiny_pipeline.vae, latents, triples, 32, 0)
    model, history = trainers.refinement(outputs, triples, SETTINGS, channels=(8, 8), seed=0, device="cpu")
    error = lambda images: np.square(images - triples.batch(range(3))["real"].numpy()).mean()  # noqa: E731
    assert error(refine(model, outputs, triples)) < error(outputs) and history[-1]["loss"] < history[0]["loss"]
    untrained, _ = trainers.refinement(
        outputs, triples, TrainSettings(steps=0, batch_size=2), channels=(8, 8), seed=0, device="cpu"
    )
    assert np.allclose(refine(untrained, outputs, triples), outputs, atol=1e-3)


def test_latent_models_train_on_crops(data, tiny_pipeline, tiny_vae):  # noqa: F811
    triples = TripleSet(data, 32)
    seen = []
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    tiny_pipeline.vae = tiny_vae
    options = {"seed": 0, "device": "cpu"}
    trainers.diffharmony(tiny_pipeline, triples, "harmonize", SETTINGS, crop=16, mask_start="zero", **options)
    hook.remove()
    assert set(seen) == {(2, 9, 2, 2)}
    model, history = trainers.harmony_vae(tiny_vae, triples, "inverse", SETTINGS, crop=16, decoder=False, **options)
    norms = history[-1]["skip_norms"]
    assert len(norms) == len(model.skip_convs()) and all(norm > 0 for norm in norms)
    assert torch.equal(model.decoder.conv_in.weight, tiny_vae.decoder.conv_in.weight)
    for crop in (12, 40):
        with pytest.raises(HarmonyError, match="multiple of 8"):
            trainers.diffharmony(tiny_pipeline, triples, "harmonize", SETTINGS, crop=crop, **options)
