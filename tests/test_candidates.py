import os
import shutil

import numpy as np
import pytest
import torch

from harmonylib.augmentation.candidates import (
    Pair,
    candidate_diversity,
    generate_candidates,
    has_latent_foreground,
    pairs_of,
    read_candidates,
    select,
)
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, read_mask, resize_mask, write_image
from harmonylib.core.json_files import read_json, write_json
from harmonylib.core.seeds import generator, rng
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.diffusion import base_scheduler
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.vae import HarmonyVAE
from harmonylib.tools import cli


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    vae = HarmonyVAE.from_vae(build_autoencoder((8, 8, 16, 16)), skip_init="random")
    unet = build_unet((32, 32), prompt_dim=8)
    return DiffHarmonyPipeline(vae, unet, base_scheduler("v_prediction"), PromptEmbedding(2, 8)).to("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    lines, draw = [], rng("photos")
    for number, (height, width) in enumerate([(40, 56), (48, 32), (32, 32)]):
        real = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), bool)
        mask[8:30, 8:28] = True
        pair = write_pair(root, "HFlickr", f"f{number}", 1, real, mask, suffix=".png")
        lines += [write_composite(root, "HFlickr", pair, v, 255 - real, suffix=".png") for v in (1, 2)]
    write_list(root, "train", lines)
    return pairs_of(read_triples(root, "train"))


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run(pipeline, pairs, root, **changes):
    options = {"k": 3, "seed": 0, "steps": 2, "precision": "fp32"}
    return generate_candidates(pipeline, pairs, root, **(options | changes))


@pytest.fixture(scope="module")
def whole(pipeline, pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run(pipeline, pairs, root)
    return root


def test_candidates_of_every_pair(whole, pairs):
    assert [(pair.key, pair.photo) for pair in pairs] == [(("HFlickr", f"f{n}_1"), f"f{n}") for n in range(3)]
    candidates = read_candidates(whole)
    assert list(candidates["pair"]) == ["f0_1"] * 3 + ["f1_1"] * 3 + ["f2_1"] * 3
    assert list(candidates["index"]) == [0, 1, 2] * 3
    assert len({path.read_bytes() for path in candidates["path"]}) == 9
    for candidate, pair in zip(candidates.itertuples(), np.repeat(pairs, 3), strict=True):
        image, real, mask = read_image(candidate.path), read_image(pair.real), read_mask(pair.mask)
        assert np.array_equal(image[~mask], real[~mask]) and not np.array_equal(image[mask], real[mask])
        assert candidate.strength > 0
    strengths = sorted(candidates["strength"])
    assert len(read_candidates(whole, (strengths[2], strengths[6]))) == 5
    with pytest.raises(HarmonyError, match="bounds"):
        read_candidates(whole, (2.0, 1.0))


def test_a_candidates_noise_is_its_own_at_any_batch_size(pipeline):
    image, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    noise = [generator(0, "generate", "HFlickr", "f0_1", index) for index in range(16)]
    latents = pipeline(image, mask, 1, generator=noise, candidates=16, output_type="latent").images
    assert len({tuple(x.flatten().tolist()) for x in latents}) == 16
    alone = pipeline(image, mask, 1, generator=generator(0, "generate", "HFlickr", "f0_1", 15), output_type="latent")
    assert torch.allclose(latents[15], alone.images[0], atol=1e-4)


def test_a_pair_is_conditioned_once_and_its_candidates_are_one_batch(pipeline, pairs, tmp_path):
    vae, seen = pipeline.vae, []
    parts = {"encoder": vae.encoder, "condition": vae.conditional_encoder, "unet": pipeline.unet}
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, len(inputs[0]))))
        for name, part in (parts | {"decoder": vae.decoder.mid_block}).items()
    ]
    run(pipeline, pairs[:2], tmp_path)
    for hook in hooks:
        hook.remove()
    assert seen == [("encoder", 1), ("unet", 3), ("unet", 3), ("condition", 1), ("decoder", 3)] * 2


def test_the_command_reads_each_subsets_own_list_and_writes_jpeg(pipeline, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("model")
    shutil.copytree(pairs[0].real.parents[2], "set")
    os.rename("set/IHD_train.txt", "set/HFlickr/HFlickr_train.txt")
    words = ["generate", "set", "out", "--model", "model", "--steps", "1", "--suffix", ".jpg", "--device", "cpu", "-k"]
    assert cli.run(cli.app, "harmonylib", [*words, "0"]) == 1 and "error: k 0" in capsys.readouterr().err
    assert cli.run(cli.app, "harmonylib", [*words, "1"]) == 0
    paths = list(read_candidates("out")["path"])
    assert [path.name for path in paths] == ["f0_1_g0.jpg", "f1_1_g0.jpg", "f2_1_g0.jpg"]
    for path, pair in zip(paths, pairs, strict=True):
        real, mask = pair.load()
        assert np.abs(read_image(path)[~mask].astype(int) - real[~mask]).mean() < 4  # noise, quality 95


def test_the_command_leaves_tiny_masks_out(pipeline, tmp_path, monkeypatch, capsys):
    dot = np.zeros((32, 32), bool)
    dot[1, 1] = True  # off the latent grid
    for name, mask in (("a", np.eye(32, dtype=bool)), ("dot", dot)):
        write_image(tmp_path / f"photos/images/{name}.png", np.full((32, 32, 3), 90, np.uint8))
        write_image(tmp_path / f"photos/masks/{name}.png", mask)
    monkeypatch.setattr(DiffHarmonyPipeline, "from_pretrained", lambda *_, **__: pipeline)
    words = ["generate", tmp_path / "photos", tmp_path / "out", "-k", "1", "--steps", "1"]
    assert cli.run(cli.app, "harmonylib", list(map(str, words))) == 0
    assert "1 of 2 masks are too small" in capsys.readouterr().err
    assert list(read_candidates(tmp_path / "out")["pair"]) == ["a_1"]


def test_names_in_records_stay_in_their_folder(pipeline, pairs, whole, tmp_path):
    """A record from outside must not make a run delete or read files elsewhere."""
    (tmp_path / "secret.txt").write_text("keep")
    root = tmp_path / "out"
    shutil.copytree(whole, root)
    (record,) = root.rglob("f0_1.json")
    write_json(record, [row | {"file": "../secret.txt", "bytes": 4} for row in read_json(record)])
    run(pipeline, pairs, root)
    assert contents(root) == contents(whole) and (tmp_path / "secret.txt").read_text() == "keep"
    manifest = read_json(root / "manifest.json")
    for file in ("/etc/hostname", "../secret.txt"):
        manifest["candidates"][0]["file"] = file
        write_json(root / "manifest.json", manifest)
        with pytest.raises(HarmonyError, match="no file inside it"):
            read_candidates(root)


@pytest.mark.parametrize("manifest", [{"candidates": [{"status": "ok"}]}, [], {"candidates": 3}])
def test_a_damaged_manifest(tmp_path, manifest):
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(HarmonyError, match="not a manifest of candidates"):
        read_candidates(tmp_path)


def test_order_and_precision_change_nothing_and_seeds_all(pipeline, pairs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("harmonylib.core.devices.has_bf16", lambda device: False)
    manifest = run(pipeline, pairs[::-1], tmp_path, precision="auto")
    assert manifest["settings"]["precision"] == "fp32" and contents(tmp_path) == contents(whole)
    old = {path.name: path.read_bytes() for path in read_candidates(whole)["path"]}
    run(pipeline, pairs[:1], tmp_path, seed=1)
    assert all(old[path.name] != path.read_bytes() for path in read_candidates(tmp_path)["path"])


def test_processes_that_finish_first_write_no_manifest(pipeline, pairs, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # tests/test_faults.py and test_distributed.py: kills, real processes
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        manifest = run(pipeline, pairs, tmp_path)
        assert (manifest is None) == (rank == 0) == (not (tmp_path / "manifest.json").exists())
    assert contents(tmp_path) == contents(whole)


def test_what_changed_is_made_again_and_nothing_of_others_goes(pipeline, pairs, whole, tmp_path):
    root, real = tmp_path / "copy", tmp_path / "f9.png"
    shutil.copytree(whole, root)
    read_candidates(root)["path"][4].unlink()
    with pytest.raises(HarmonyError, match="missing"):
        read_candidates(root)
    run(pipeline, pairs, root)
    assert contents(root) == contents(whole)
    (root / "settings-mine").mkdir()
    run(pipeline, pairs, root, k=1)  # other settings: their candidates take the place of these
    assert len(list(root.rglob("*.png"))) == 3 and (root / "settings-mine").is_dir()
    shutil.copy(pairs[0].real, real)
    pair = Pair("HFlickr", "f9_1", "f9", real, pairs[0].mask)
    first = run(pipeline, [pair], root, k=1)
    write_image(real, 255 - read_image(real))
    second = run(pipeline, [pair], root, k=1)
    assert first["settings"] == second["settings"] and first["candidates"] != second["candidates"]
    bias = pipeline.unet.conv_out.bias.data
    saved = bias.clone()
    bias += 1
    third = run(pipeline, [pair], root, k=1)
    bias.copy_(saved)
    assert third["settings"]["model"] != second["settings"]["model"]


def test_size_is_the_longest_side(pipeline, pairs, tmp_path):
    run(pipeline, pairs[:1], tmp_path, k=1, size=70)
    (path,) = read_candidates(tmp_path)["path"]
    real, mask = pairs[0].load(70)
    image = read_image(path)
    assert image.shape == (50, 70, 3) and np.array_equal(image[~mask], real[~mask])


def test_nan_and_unchanged_candidates_are_never_counted(pipeline, pairs, tmp_path, monkeypatch):
    real_call = DiffHarmonyPipeline.__call__

    def faulty(self, image, *words, **options):
        output = real_call(self, image, *words, **options)
        output.images[0, :, 10, 10] = float("nan")
        output.images[2] = image[0] / 2 + 0.5
        return output

    monkeypatch.setattr(DiffHarmonyPipeline, "__call__", faulty)
    manifest = run(pipeline, pairs[:1], tmp_path)
    assert [row["status"] for row in manifest["candidates"]] == ["nan", "ok", "equal"]
    assert list(read_candidates(tmp_path)["index"]) == [1] and len(list(tmp_path.rglob("*.png"))) == 1
    monkeypatch.undo()
    assert run(pipeline, pairs[:1], tmp_path) == manifest  # finished: a resumed run does not try again


def test_bad_settings(pipeline, pairs, tmp_path):
    for name, value in (
        ("k", 0),
        ("steps", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("suffix", ".gif"),
    ):
        with pytest.raises(HarmonyError, match=f"{name} '?{value}"):
            run(pipeline, pairs, tmp_path, **{name: value})
    with pytest.raises(HarmonyError, match="no .* pairs"):
        run(pipeline, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_foreground_that_vanishes_on_the_latent_grid(pipeline, pairs, tmp_path):
    mask = np.zeros((40, 56), bool)
    mask[1:8, 1:8] = True  # published masks take the top-left pixel of each 8x8 block
    assert not has_latent_foreground(mask, 8) and has_latent_foreground(mask, 4)
    assert has_latent_foreground(~mask, 8) and has_latent_foreground(np.eye(13, dtype=bool), 8)
    write_image(tmp_path / "m.png", mask)
    pair = Pair("HFlickr", "f0_2", "f0", pairs[0].real, tmp_path / "m.png")
    with pytest.raises(HarmonyError, match="m.png: no foreground is left"):
        run(pipeline, [pair], tmp_path / "out")
    write_image(tmp_path / "m.png", resize_mask(mask, (20, 20)))
    with pytest.raises(HarmonyError, match="m.png: mask is .*; resize it"):
        run(pipeline, [pair], tmp_path / "out")


class RedCounts:
    """P(composite) is the mean red of the file, so the choice is known."""

    def extract(self, paths):
        return np.array([[read_image(path)[..., 0].mean() / 255] for path in paths])

    def predict(self, features):
        return features[:, 0]


def test_select_keeps_one_candidate_a_pair(whole):
    candidates = read_candidates(whole)
    choices = select(RedCounts(), candidates[::-1])
    assert list(choices["kept"]) == [True, False, False] * 3 and len(choices) == len(candidates)
    for _, group in choices.groupby("pair"):
        assert group["probability"].is_monotonic_decreasing
        assert group["probability"].tolist() == [read_image(path)[..., 0].mean() / 255 for path in group["path"]]


def test_diversity_shows_a_collapse(whole, pairs, tmp_path):
    report = candidate_diversity(pairs, read_candidates(whole))
    assert report["delta_e"].min() > 1 and list(report["n"]) == [3, 3, 3]
    shutil.copytree(whole, tmp_path / "copy")
    candidates = read_candidates(tmp_path / "copy")[:3]
    for other in candidates["path"][1:]:
        shutil.copy(candidates["path"][0], other)
    assert candidate_diversity(pairs, candidates)["delta_e"].tolist() == [0]
    assert candidate_diversity(pairs, candidates[:1])["delta_e"].isna().all()
