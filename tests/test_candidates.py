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
    read_manifest,
    select,
)
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, read_mask, resize_mask, write_image
from harmonylib.core.json_files import write_json
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
    return generate_candidates(
        pipeline, pairs, root, **({"k": 3, "seed": 0, "steps": 2, "precision": "fp32"} | changes)
    )


@pytest.fixture(scope="module")
def whole(pipeline, pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run(pipeline, pairs, root)
    return root


def test_pairs_are_counted_once(pairs):
    assert [pair.key for pair in pairs] == [("HFlickr", f"f{n}_1") for n in range(3)]
    assert [pair.photo for pair in pairs] == ["f0", "f1", "f2"]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_candidate_has_its_own_noise(pipeline, batch):
    image, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    latents = []
    for start in range(0, 16, batch):
        noise = [generator(0, "generate", "HFlickr", "f0_1", index) for index in range(start, start + batch)]
        out = pipeline(image, mask, 1, generator=noise, candidates=batch, output_type="latent")
        latents.append(out.images)
    latents = torch.cat(latents)
    assert len({tuple(x.flatten().tolist()) for x in latents}) == 16
    alone = pipeline(image, mask, 1, generator=generator(0, "generate", "HFlickr", "f0_1", 15), output_type="latent")
    assert torch.allclose(latents[15], alone.images[0], atol=1e-4)  # the same noise at any batch size


def test_the_manifest_has_the_precision_that_was_used(pipeline, pairs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("harmonylib.core.devices.has_bf16", lambda device: False)
    assert run(pipeline, pairs, tmp_path, precision="auto")["settings"]["precision"] == "fp32"
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_all_k_candidates_differ(pipeline, pairs, tmp_path, k):
    run(pipeline, pairs[:1], tmp_path, k=k, steps=1)
    candidates = read_candidates(tmp_path)
    assert len(candidates) == k
    assert len({c.path.read_bytes() for c in candidates}) == k


def test_a_pair_is_conditioned_once_and_its_candidates_are_one_batch(pipeline, pairs, tmp_path):
    vae, seen = pipeline.vae, []
    modules = {"encoder": vae.encoder, "condition": vae.conditional_encoder, "unet": pipeline.unet}
    modules["decoder"] = vae.decoder.mid_block
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, len(inputs[0]))))
        for name, module in modules.items()
    ]
    run(pipeline, pairs[:2], tmp_path, k=3, steps=2)
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
    candidates = read_candidates("out")
    assert [c.path.name for c in candidates] == ["f0_1_g0.jpg", "f1_1_g0.jpg", "f2_1_g0.jpg"]
    for candidate, pair in zip(candidates, pairs, strict=True):
        real, mask = pair.load()
        assert np.abs(read_image(candidate.path)[~mask].astype(int) - real[~mask]).mean() < 4  # noise, quality 95


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
    assert [record["pair"] for record in read_manifest(tmp_path / "out")["pairs"]] == ["a_1"]


def test_names_in_records_stay_in_their_folder(pipeline, pairs, tmp_path):
    """A record from outside must not make a run delete or read files elsewhere."""
    (tmp_path / "secret.txt").write_text("keep")
    record = {"settings": {}, "inputs": [], "candidates": [{"index": 0, "status": "ok", "file": "../secret.txt"}]}
    path = tmp_path / "out" / pairs[0].subset / "pairs" / f"{pairs[0].name}.json"
    write_json(path, record)
    with pytest.raises(HarmonyError, match="no file inside it"):
        generate_candidates(pipeline, pairs, tmp_path / "out", 1, 0, steps=1)
    assert (tmp_path / "secret.txt").read_text() == "keep"
    row = {"index": 0, "status": "ok", "strength": 1.0, "file": "/etc/hostname"}
    pair = {"subset": "a", "pair": "b", "inputs": [], "candidates": [row]}
    write_json(tmp_path / "bad/manifest.json", {"settings": {"k": 1}, "pairs": [pair]})
    with pytest.raises(HarmonyError, match="no file inside it"):
        read_candidates(tmp_path / "bad")


def test_background_is_the_real_photos(whole, pairs):
    for candidate in read_candidates(whole):
        pair = next(p for p in pairs if p.key == candidate.key)
        image, real, mask = read_image(candidate.path), read_image(pair.real), read_mask(pair.mask)
        assert np.array_equal(image[~mask], real[~mask])
        assert not np.array_equal(image[mask], real[mask])
        difference = np.abs(image[mask].astype(int) - real[mask])
        assert (candidate.strength > 0) == (difference.max() > 0)


def test_same_set_whatever_the_order(pipeline, pairs, whole, tmp_path):
    run(pipeline, pairs[::-1], tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_other_seeds_give_other_candidates(pipeline, pairs, whole, tmp_path):
    run(pipeline, pairs[:1], tmp_path, seed=1)
    old = {c.path.name: c.path.read_bytes() for c in read_candidates(whole)}
    assert all(old[c.path.name] != c.path.read_bytes() for c in read_candidates(tmp_path))


def test_two_processes_share_the_work(pipeline, pairs, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(pipeline, pairs, tmp_path) is None
    with pytest.raises(HarmonyError, match="incomplete"):
        read_manifest(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert run(pipeline, pairs, tmp_path) == read_manifest(whole)
    assert contents(tmp_path) == contents(whole)


def test_resuming_a_killed_run_gives_the_same_bytes(pipeline, pairs, whole, tmp_path, monkeypatch):
    calls, real_call = [], DiffHarmonyPipeline.__call__

    def killed(self, *words, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_call(self, *words, **options)

    monkeypatch.setattr(DiffHarmonyPipeline, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, pairs, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    run(pipeline, pairs, tmp_path)
    assert len(calls) == 4  # one pair was kept, two were made
    assert contents(tmp_path) == contents(whole)


def test_lost_files_and_changed_settings_are_made_again(pipeline, pairs, whole, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    read_candidates(root)[4].path.unlink()
    with pytest.raises(HarmonyError, match="missing"):
        read_candidates(root)
    run(pipeline, pairs, root)
    assert contents(root) == contents(whole)
    run(pipeline, pairs, root, k=1)
    assert len(list(root.rglob("*.png"))) == 3
    assert read_manifest(root)["settings"]["k"] == 1


def test_changed_photos_and_weights_are_noticed(pipeline, pairs, tmp_path):
    real = tmp_path / "f9.png"
    shutil.copy(pairs[0].real, real)
    pair = Pair("HFlickr", "f9_1", "f9", real, pairs[0].mask)
    first = run(pipeline, [pair], tmp_path / "out", k=1)
    write_image(real, 255 - read_image(real))
    second = run(pipeline, [pair], tmp_path / "out", k=1)
    assert first["pairs"][0]["inputs"] != second["pairs"][0]["inputs"]
    bias = pipeline.unet.conv_out.bias.data
    saved = bias.clone()
    bias += 1
    third = run(pipeline, [pair], tmp_path / "out", k=1)
    bias.copy_(saved)
    assert third["settings"]["model"] != second["settings"]["model"]


def test_size_is_the_longest_side(pipeline, pairs, tmp_path):
    run(pipeline, pairs[:1], tmp_path, k=1, size=70)
    (candidate,) = read_candidates(tmp_path)
    real, mask = pairs[0].load(70)
    image = read_image(candidate.path)
    assert image.shape == (50, 70, 3)
    assert np.array_equal(image[~mask], real[~mask])


def test_nan_and_unchanged_candidates_are_never_counted(pipeline, pairs, tmp_path, monkeypatch):
    real_call = DiffHarmonyPipeline.__call__

    def faulty(self, image, *words, **options):
        output = real_call(self, image, *words, **options)
        output.images[0, :, 10, 10] = float("nan")
        output.images[2] = image[0] / 2 + 0.5
        return output

    monkeypatch.setattr(DiffHarmonyPipeline, "__call__", faulty)
    manifest = run(pipeline, pairs[:1], tmp_path)
    assert [row["status"] for row in manifest["pairs"][0]["candidates"]] == ["nan", "ok", "equal"]
    assert [c.index for c in read_candidates(tmp_path)] == [1]
    assert len(list(tmp_path.rglob("*.png"))) == 1
    monkeypatch.undo()
    assert run(pipeline, pairs[:1], tmp_path) == manifest  # finished: a resumed run does not try again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k 0"),
        ({"steps": 0}, "steps 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"suffix": ".gif"}, ".gif"),
    ],
)
def test_bad_settings(pipeline, pairs, tmp_path, changes, message):
    with pytest.raises(HarmonyError, match=message):
        run(pipeline, pairs, tmp_path, **changes)
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


def test_full_disk_leaves_nothing_that_counts(pipeline, pairs, whole, tmp_path, monkeypatch):
    replace, count = os.replace, []

    def full(source, target):
        count.append(target)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run(pipeline, pairs[:1], tmp_path)
    monkeypatch.undo()
    with pytest.raises(HarmonyError, match="incomplete"):
        read_candidates(tmp_path)
    run(pipeline, pairs, tmp_path)
    assert contents(tmp_path) == contents(whole)


class RedCounts:
    """P(composite) is the mean red of the file, so the choice is known."""

    def extract(self, paths):
        return np.array([[read_image(path)[..., 0].mean() / 255] for path in paths])

    def predict(self, features):
        return features[:, 0]


def test_select_keeps_one_candidate_a_pair(whole):
    candidates = read_candidates(whole)
    choices = select(RedCounts(), candidates[::-1])
    assert [choice.kept.key for choice in choices] == [("HFlickr", f"f{n}_1") for n in range(3)]
    for choice in choices:
        probabilities = [p for _, p in choice.rejected]
        assert len(probabilities) == 2 and probabilities == sorted(probabilities, reverse=True)
        assert choice.probability >= probabilities[0]
        assert choice.probability == pytest.approx(read_image(choice.kept.path)[..., 0].mean() / 255)


def test_diversity_shows_a_collapse(whole, pairs, tmp_path):
    report = candidate_diversity(pairs, read_candidates(whole))
    assert report["min"] > 1 and [row["n"] for row in report["pairs"]] == [3, 3, 3]
    shutil.copytree(whole, tmp_path / "copy")
    candidates = read_candidates(tmp_path / "copy")[:3]
    for other in candidates[1:]:
        shutil.copy(candidates[0].path, other.path)
    assert candidate_diversity(pairs, candidates)["mean"] == 0
    assert np.isnan(candidate_diversity(pairs, candidates[:1])["mean"])
    with pytest.raises(HarmonyError, match="no such pair"):
        candidate_diversity(pairs[1:], candidates)


def test_strength_bounds(whole):
    strengths = sorted(c.strength for c in read_candidates(whole))
    assert len(read_candidates(whole, (strengths[2], strengths[6]))) == 5
    with pytest.raises(HarmonyError, match="bounds"):
        read_candidates(whole, (2.0, 1.0))
