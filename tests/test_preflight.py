"""`harmonylib preflight`: everything that is missing in one list, each with its true reason."""

import os
from pathlib import Path

import numpy as np
import pytest

from harmonylib.core.files import stamp
from harmonylib.core.settings import read_profile
from harmonylib.data.layout import write_composite, write_list, write_pair
from harmonylib.tools import cli, preflight
from harmonylib.tools.terminal import run as run_application

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def paper(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    run = read_profile("paper")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_network", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return run


def missing(run) -> str:
    return "\n".join(preflight.preflight(run).missing)


def test_all_that_a_paper_run_lacks_is_in_one_list(paper):
    said = missing(paper)
    for part in ("data: data/iHarmony4: no such data folder",
                 "human_harmony: data/imaterialist-fashion-2020 is not there",
                 "base: stable-diffusion-v1-5/stable-diffusion-inpainting@", "base: stabilityai/sd-vae-ft-mse@",
                 "classifier: timm/resnet50", "on disk and there is no network"):  # fmt: skip
        assert part in said, part


def test_the_command_lists_it_and_makes_nothing(paper, tmp_path, monkeypatch, capsys):
    for name in ("profiles", "dvc.yaml"):
        os.symlink(REPOSITORY / name, name)
    text = (REPOSITORY / "params.yaml").read_text().replace("path: harmonylib/data", "path: nowhere", 1)
    Path("params.yaml").write_text(text)
    before = stamp(tmp_path)
    assert run_application(cli.app, "harmonylib", ["preflight"]) == 1
    assert "missing 1: data: nowhere/embedded_masks.json is not there" in capsys.readouterr().out
    assert stamp(tmp_path) == before


def test_half_downloaded_weights_and_their_folder(paper, tmp_path):
    folder = tmp_path / "sd"
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    base = paper.base.model_copy(update={"path": str(folder), "vae": None})
    said = missing(paper.model_copy(update={"base": base}))
    assert f"base: {folder} lacks unet/diffusion_pytorch_model.safetensors, tokenizer/vocab.json" in said
    assert "restore the folder" in said


def test_a_half_downloaded_hub_folder_and_one_without_a_revision(paper, tmp_path, monkeypatch):
    """Timm's weights come at the hub's newest commit unless the setting names one: it is told, and which is here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name, _, commit = paper.base.path.partition("@")
    for repo, at, files in (
        (name, commit, ["unet/config.json"]),
        ("timm/resnet50.tv_in1k", "0" * 40, ["model.safetensors"]),
    ):
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        for file in files:
            path = root / "snapshots" / at / file
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        (root / "refs").mkdir()
        (root / "refs/main").write_text(at)
    found = preflight.preflight(paper)
    assert any(f"base: {paper.base.path} is half-downloaded (unet/diffusion" in line for line in found.missing)
    assert f"classifier: timm/resnet50.tv_in1k is on disk (commit {'0' * 40})" in found.lines
    assert any("write timm/resnet50.tv_in1k@COMMIT to pin it" in note for note in found.notes)
    assert not any("stable-diffusion" in note for note in found.notes)


def test_a_bound_that_is_too_small_and_a_disk_that_would_fill(paper, monkeypatch):
    assert "cache: " not in missing(paper)
    assert "for the largest entry (DiffHarmony: masks, 512 px)" in missing(paper.model_copy(update={"cache_gb": 3.0}))
    usage = type("Usage", (), {"free": 20e9})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    assert "are needed, 20 are there; make room" in missing(paper)


def test_a_resized_copy_and_masks_that_vanish_are_told_of_before_anything_runs(paper, tmp_path):
    root, lines = tmp_path / "data/iHarmony4", []
    for photo, side in (("a1", 60), ("a2", 2)):
        mask = np.zeros((200, 256), bool)
        mask[101 : 101 + side, 101 : 101 + side] = True
        pair = write_pair(root, "HFlickr", photo, 1, np.full((200, 256, 3), 90, np.uint8), mask)
        lines.append(write_composite(root, "HFlickr", pair, 1, np.full((200, 256, 3), 90, np.uint8)))
    write_list(root, "train", lines[:1])
    write_list(root, "test", lines)

    def check(vanished):
        small = paper.evaluation.model_copy(update={"diffusion_size": 256, "vanished": vanished})
        return preflight.preflight(paper.model_copy(update={"evaluation": small}))

    found = check("left-out")
    assert "data: 1 training and 2 test composites in data/iHarmony4" in found.lines
    assert any("longer than 256 pixels: a resized copy" in note for note in found.notes)
    told = "evaluation: 1 of 2 test composites have a mask that vanishes on the latent grid at 256 pixels (the first: "
    (note,) = [note for note in found.notes if note.startswith(told)]
    assert "a2_1.png" in note and note.endswith(", and are left out of the standard tables")
    assert any("evaluation: 0 of 2" in line and "at 1024 pixels, and" in line for line in found.lines)  # of Table 4
    assert any(note.startswith(told) and note.endswith("scored as the others") for note in check("scored").notes)
    write_list(root, "test", lines[1:])
    assert any("none would be left; raise the size" in line for line in check("left-out").missing)
    assert not any("vanishes" in line for line in check("scored").missing)
