"""docs/published-weights.md, step by step, on tiny folders of the published layout."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trainers
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image

import harmonylib as hl
from harmonylib.data.batches import TripleSet
from harmonylib.data.layout import read_triples
from harmonylib.inference import load_model
from harmonylib.models.base import build_autoencoder
from harmonylib.models.refinement import decode_latents, refine, sample_latents
from harmonylib.models.start import initial_unet, start_folder
from harmonylib.tools import cli
from harmonylib.training import TrainSettings, train


@pytest.fixture
def archive(tmp_path):
    """weights/{base,condition_vae}, and composite_images/ and masks/ named as in iHarmony4."""
    base = tmp_path / "weights/base"
    channels = {"block_out_channels": (32, 32), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(
        in_channels=9, down_block_types=blocks[0], up_block_types=blocks[1], cross_attention_dim=16, **channels
    )
    unet.save_pretrained(base / "unet", safe_serialization=False)
    vae = build_autoencoder((8, 8, 16))
    vae.register_to_config(sample_size=32)
    vae.save_pretrained(base / "vae", safe_serialization=False)
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(base / "scheduler")
    text = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformers.CLIPTextModel(text).save_pretrained(base / "text_encoder")
    words = tmp_path / "words"
    words.mkdir()
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words, model_max_length=8)
    tokenizer.save_pretrained(base / "tokenizer")
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    hl.HarmonyVAE.from_vae(vae).save_pretrained(tmp_path / "weights/condition_vae")

    for folder in ("composite_images", "masks"):
        (tmp_path / folder).mkdir()
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).save(tmp_path / "composite_images/f800_1_2.png")
    mask = np.zeros((24, 32), np.uint8)
    mask[4:20, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "masks/f800_1.png")
    return tmp_path


def harmonize(root, model):
    arguments = ["harmonize", str(root / "composite_images"), str(root / "masks"), "-o", str(root / f"out-{model}")]
    assert cli.run(cli.app, "harmonylib", [*arguments, "--model", str(root / model), "--device", "cpu"]) == 0
    return np.asarray(Image.open(root / f"out-{model}" / "f800_1_2.png"))


def test_the_archive_and_our_own_copy_of_it(archive):
    before = np.asarray(Image.open(archive / "composite_images/f800_1_2.png"))
    after = harmonize(archive, "weights")
    assert (before != after).any() and np.array_equal(before[:4], after[:4])
    pipeline = load_model(str(archive / "weights"), "cpu")
    assert isinstance(pipeline.vae, hl.HarmonyVAE)
    pipeline.save_pretrained(archive / "ready")
    assert np.array_equal(harmonize(archive, "ready"), after)
    again = load_model(str(archive / "ready"), "cpu")
    assert torch.equal(again.prompt.embeds, pipeline.prompt.embeds) and again.prompt.embeds.any()


def test_a_stable_diffusion_folder(archive):
    (archive / "weights/base").rename(archive / "sd")
    harmonize(archive, "sd")
    assert type(load_model(str(archive / "sd"), "cpu").vae) is AutoencoderKL


def test_the_inverse_model(archive):
    """`inverse/` has no unet/ but weights-STEP/ with the UNet's files."""
    trainers.make_set(archive / "data", pairs=1)
    inverse = archive / "weights/inverse"
    (archive / "weights/base").rename(inverse)
    (inverse / "weights-9").mkdir()  # an older one, not complete
    (inverse / "unet").rename(inverse / "weights-102800")
    words = ["generate", str(archive / "data"), str(archive / "out"), "--model", str(inverse), "-k", "2"]
    assert cli.run(cli.app, "harmonylib", [*words, "--steps", "2", "--device", "cpu"]) == 0
    assert len(list((archive / "out").rglob("f0_1_g*.png"))) == 2


def test_harmony_vae_around_a_published_unet(archive):
    """`start: FOLDER` without steps keeps the UNet; each task takes its own part of the folder where there is one."""
    folder, both = archive / "weights/base", archive / "both"
    base, section = load_model(folder, "cpu"), SimpleNamespace(mask_start="zero")
    published = torch.load(folder / "unet/diffusion_pytorch_model.bin")
    unet = initial_unet(section, start_folder(str(folder), "harmonize"), base)
    assert train(unet, lambda *_: {}, lambda step: {}, TrainSettings(0, 4), name="nothing", seed=0, device="cpu") == []
    assert all(torch.equal(value, published[name]) for name, value in unet.state_dict().items())
    both.mkdir()
    (both / "inverse").symlink_to(folder)
    assert start_folder(str(both), "inverse") == both / "inverse" and start_folder(str(both), "harmonize") == both


def test_the_refiner(archive, monkeypatch):
    monkeypatch.chdir(archive)
    trainers.make_set(archive / "data", pairs=1)
    hl.RefinementUNet(block_out_channels=(8, 16), norm_num_groups=4).save_pretrained("weights/refinement")
    triples, model = read_triples("data", "test"), load_model("weights/base", "cpu")
    latents = sample_latents(model, TripleSet(triples, 32), seed=0)
    outputs = decode_latents(model.vae, latents, TripleSet(triples, 32), size=16, seed=0)
    refined = refine(hl.RefinementUNet.from_pretrained("weights/refinement").eval(), outputs, TripleSet(triples, 16))
    assert refined.shape == (2, 3, 16, 16) and np.isfinite(refined).all()
