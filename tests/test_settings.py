"""Settings: what is accepted, and that each kind of mistake is named."""

import os
from pathlib import Path

import pytest

from harmonylib.core import settings
from harmonylib.core.errors import HarmonyError

MINI = """\
# the schema
seed: 0
train:
  steps: 100
  rate: 1e-4   # YAML 1.2: a number
  ema: true
  sizes: [64, 128]
data:
  path: null
  name: photos
"""
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "profiles/mini.yaml").write_text(MINI)
    (tmp_path / "profiles/gpu.yaml").write_text(MINI.replace("null", "/photos").replace("steps: 100", "steps: 9"))
    (tmp_path / "params.yaml").write_text(MINI)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_root_is_found_from_below(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    assert settings.find_root() == root
    assert settings.enter_root() == root == Path(os.getcwd())


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HarmonyError, match=r"no params.yaml and dvc.yaml"):
        settings.find_root()


def test_values_are_typed_as_dvc_types_them(root):
    values = settings.load_params()
    assert values["train"] == {"steps": 100, "rate": 1e-4, "ema": True, "sizes": [64, 128]}
    assert values["data"]["path"] is None


def test_settings_have_attributes(root):
    run = settings.settings()
    assert (run.seed, run.train.steps, run.train.rate, run.data.path) == (0, 100, 1e-4, None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  steps: 100", "  stepz: 100", "unknown key train.stepz; did you mean train.steps"),
        ("seed: 0", "seed: 0\nextra: {a: 1}", "unknown key extra"),
        ("  name: photos\n", "", "missing key data.name"),
        ("steps: 100", "steps: many", r"train.steps must be an int, not 'many' \(a string\)"),
        ("steps: 100", "steps: 1.5", "train.steps must be an int"),
        ("steps: 100", "steps: true", "train.steps must be an int"),
        ("ema: true", "ema: 1", "train.ema must be true or false, not 1"),
        ("ema: true", "ema: yes", "train.ema must be true or false, not 'yes'"),
        ("rate: 1e-4", "rate: null", "train.rate must be a float, not None"),
        ("[64, 128]", "[64, big]", "train.sizes must be a list"),
        ("[64, 128]", "64", "train.sizes must be a list"),
        (MINI.split("train:")[1].split("data:")[0], " 3\n", "unknown|must be a mapping|missing key train.steps"),
        ("seed: 0", "seed: [0", "line 3: not valid YAML"),
        ("seed: 0", "seed: 0\nseed: 1", "duplicate key"),
        (MINI, "", "must be a mapping"),
    ],
)
def test_mistakes_are_named(root, old, new, message):
    assert old in MINI
    (root / "params.yaml").write_text(MINI.replace(old, new))
    with pytest.raises(HarmonyError, match=message) as caught:
        settings.load_params()
    assert "\n" not in str(caught.value) and "params.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"), [("rate: 1e-4", "rate: 1"), ("path: null", "path: {a: [1]}"), ("[64, 128]", "[]")]
)
def test_what_may_differ(root, old, new):
    (root / "params.yaml").write_text(MINI.replace(old, new))
    settings.load_params()


def test_profile_is_written_with_its_comments(root):
    (root / "params.yaml").unlink()
    assert settings.write_profile("gpu") == root / "params.yaml"
    text = (root / "params.yaml").read_text()
    assert text.startswith("# Written by") and "# the schema" in text
    assert settings.load_params()["data"]["path"] == "/photos"


def test_bad_profiles_leave_params_alone(root):
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(HarmonyError, match=r"no profile mina; did you mean mini\? \(profiles/ has gpu, mini\)"):
        settings.write_profile("mina")
    (root / "profiles/odd.yaml").write_text(MINI + "color: red\n")
    with pytest.raises(HarmonyError, match="profiles/odd.yaml: unknown key color"):
        settings.write_profile("odd")
    with pytest.raises(HarmonyError, match="profiles/odd.yaml"):
        settings.check_profiles()
    assert (root / "params.yaml").read_bytes() == before
    assert sorted(path.name for path in root.iterdir()) == ["dvc.yaml", "notebooks", "params.yaml", "profiles"]


def test_the_repository_has_four_alike_profiles(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert set(settings.check_profiles()) >= {"smoke", "mini", "gpu", "paper"}
    settings.load_params()
