"""`harmonylib pretrain`: the small base from random weights, and a base trained further."""

import json

import torch

from harmonylib.core.images import write_image
from harmonylib.core.seeds import rng
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.tools import cli


def test_a_base_and_its_continuation(tmp_path):
    for name in ("a", "b"):
        pixels = rng("photo", name).integers(0, 256, (72, 80, 3), dtype="uint8")
        mask = pixels[..., 0] * 0
        mask[20:50, 20:60] = 255
        for part, array in (("images", pixels), ("masks", mask)):
            (tmp_path / "photos" / part).mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / f"photos/{part}/{name}.png", array)
    words = ["pretrain", str(tmp_path / "photos")]
    steps = ["--autoencoder-steps", "2", "--unet-steps", "2", "--batch-size", "2", "--device", "cpu"]
    assert cli.run(cli.app, "harmonylib", [*words, str(tmp_path / "base"), *steps]) == 0
    base = DiffHarmonyPipeline.from_pretrained(tmp_path / "base", device="cpu")
    assert all(value > 0 for value in base.vae.config.latents_std)

    steps[1] = "0"
    start = ["--start", str(tmp_path / "base"), "--seed", "1"]
    assert cli.run(cli.app, "harmonylib", [*words, str(tmp_path / "further"), *steps, *start]) == 0
    further = DiffHarmonyPipeline.from_pretrained(tmp_path / "further", device="cpu")
    kept, changed = (
        [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
        for one, two in ((base.vae, further.vae), (base.unet, further.unet))
    )
    assert all(kept) and not all(changed)
    assert further.vae.config.latents_std == base.vae.config.latents_std
    about = json.loads((tmp_path / "further/training.json").read_text())
    assert about["start"] == str(tmp_path / "base") and about["seed"] == 1 and about["settings"]["unet_steps"] == 2
    assert about["histories"]["autoencoder"] == [] and len(about["histories"]["unet"]) == 2
    assert not list(tmp_path.glob("*/.checkpoints/*/*.pt"))

    assert cli.run(cli.app, "harmonylib", [*words, str(tmp_path / "none"), *steps, "--start", "nowhere"]) == 1
    assert not (tmp_path / "none").exists()
