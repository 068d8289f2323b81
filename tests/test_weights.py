import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from harmonylib.errors import HarmonyError
from harmonylib.inference import load_model
from harmonylib.resunet import ContrastiveResUNet
from harmonylib.weights import ship


def test_shipped_weights_are_halves_that_load(tmp_path):
    model = ContrastiveResUNet(4, 2, 0, sample_size=32).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained/training.json").write_text("[]")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/README.md").write_text("a card")
    ship(tmp_path / "trained", tmp_path / "shipped")
    names = {path.name for path in (tmp_path / "shipped").iterdir()}
    assert names == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "training.json"}
    stored = load_file(tmp_path / "shipped/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}
    loaded = load_model(str(tmp_path / "shipped"), "cpu")
    assert next(loaded.parameters()).dtype == torch.float32
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.ones(1, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded(image, mask), model(image, mask), atol=0.05)


def test_nothing_to_ship(tmp_path):
    with pytest.raises(HarmonyError, match="no weights"):
        ship(tmp_path, tmp_path / "shipped")
    words = [sys.executable, "-m", "harmonylib.weights", str(tmp_path / "none"), str(tmp_path / "shipped")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "shipped").exists()
