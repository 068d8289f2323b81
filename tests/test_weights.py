import json
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import trainers
from conftest import COLOUR, save_resunet
from safetensors.torch import load_file

from harmonylib.core.errors import HarmonyError
from harmonylib.inference import MODELS, harmonize, load_model, model_folder
from harmonylib.models import weights
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.models.weights import at_revision, ship


def test_shipped_weights_are_halves_that_load(tmp_path):
    model = ContrastiveResUNet(4, 2, 0, sample_size=32).eval()
    torch.nn.init.normal_(model.residual_head.weight)
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained/training.json").write_text("[]")
    config = json.loads((tmp_path / "trained/config.json").read_text())
    (tmp_path / "trained/config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/model"}))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/README.md").write_text("a card")
    ship(tmp_path / "trained", tmp_path / "shipped")
    names = {path.name for path in (tmp_path / "shipped").iterdir()}
    assert names == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "training.json"}
    assert "someone" not in (tmp_path / "shipped/config.json").read_text()
    stored = load_file(tmp_path / "shipped/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    loaded = load_model(str(tmp_path / "shipped"), "cpu")
    assert next(loaded.parameters()).dtype == torch.float32
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.ones(1, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded(image, mask), model(image, mask), atol=0.05)


OFFLINE = """\
from harmonylib.core.errors import HarmonyError
from harmonylib.models.pipeline import DiffHarmonyPipeline
pipeline = DiffHarmonyPipeline.from_pretrained("some/base@" + "1" * 40, device="cpu")
print(sum(p.numel() for p in pipeline.unet.parameters()), pipeline.prompt.embeds.shape[-1])
try:
    DiffHarmonyPipeline.from_pretrained("some/base@" + "2" * 40, device="cpu")
except HarmonyError as error:
    print("refused:", str(error)[:60])
"""


def test_a_revision_of_a_hub_id_is_the_one_that_is_loaded(tmp_path):
    """From a hub cache on disk, without a network: the revision asked for, and no other one."""
    assert at_revision("some/base@abc") == ("some/base", {"revision": "abc"})
    assert at_revision("some/base") == ("some/base", {})
    (tmp_path / "a@b").mkdir()
    assert at_revision(tmp_path / "a@b") == (str(tmp_path / "a@b"), {})
    snapshot = tmp_path / "hub/models--some--base/snapshots" / ("1" * 40)
    trainers.inverse_pipeline().save_pretrained(snapshot)
    (tmp_path / "hub/models--some--base/refs").mkdir()
    (tmp_path / "hub/models--some--base/refs/main").write_text("3" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    unet = trainers.inverse_pipeline().unet
    assert first == f"{sum(p.numel() for p in unet.parameters())} 8", done.stderr
    assert second.startswith("refused: some/base@2222")


def test_nothing_to_ship(tmp_path):
    with pytest.raises(HarmonyError, match="no weights"):
        ship(tmp_path, tmp_path / "shipped")
    words = [sys.executable, "-m", "harmonylib.models.weights", str(tmp_path / "none"), str(tmp_path / "shipped")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "shipped").exists()


def test_where_shipped_weights_are_looked_for(tmp_path, monkeypatch):
    """Their own folder first, then the installed package, then the clone."""
    places = [tmp_path / name for name in ("own", "package", "clone")]
    monkeypatch.setattr(weights, "PRETRAINED", places[1:])
    monkeypatch.setenv("HARMONYLIB_PRETRAINED", str(places[0]))
    with pytest.raises(HarmonyError, match="clone/contrastive-resunet: no weights there"):
        model_folder(MODELS[0])
    for place in reversed(places):
        (place / MODELS[0]).mkdir(parents=True)
        assert model_folder(MODELS[0]) == place / MODELS[0]
    monkeypatch.delenv("HARMONYLIB_PRETRAINED")
    assert model_folder(MODELS[0]) == places[1] / MODELS[0]


def test_a_model_of_the_hubs_cache(tmp_path, monkeypatch):
    """As huggingface_hub lays it out: a name and a revision, a branch or a commit, without the network."""
    commit = "0123456789" * 4
    cache = tmp_path / "hub/models--someone--harmonizer"
    saved = save_resunet(cache / "snapshots" / commit, **COLOUR, map_std=1.0)
    (cache / "refs").mkdir()
    (cache / "refs/v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    image, mask = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3), np.zeros((24, 32), bool)
    mask[6:18, 8:24] = True
    wanted = np.asarray(harmonize(image, mask, model=saved, device="cpu"))
    for revision in ("v1", commit):
        found = harmonize(image, mask, model=f"someone/harmonizer@{revision}", device="cpu")
        assert np.array_equal(np.asarray(found), wanted) and not np.array_equal(wanted, image)
    missing, wrong = "on disk and there is no network; go online once", "not on the hub either .*; mend the name"
    for name, told in {"someone/harmonizer@v2": missing, "someone/other@v1": missing, "not a name@v1": wrong}.items():
        with pytest.raises(HarmonyError, match=f"^{name} is .*{told}"):
            model_folder(name)
