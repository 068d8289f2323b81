"""Settings: what is accepted, that each kind of mistake is named, and profiles."""

import os
import shutil
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from harmonylib.core import settings, settings_schema
from harmonylib.core.errors import HarmonyError
from harmonylib.data import layout, transfers
from harmonylib.models import resunet
from harmonylib.tools import notebooks

REPOSITORY = Path(__file__).parents[1]
MINI = (REPOSITORY / "profiles/mini.yaml").read_text(encoding="utf-8")


@pytest.fixture
def root(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text(MINI, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_root_is_found_from_below(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    assert settings.enter_root() == root == Path(os.getcwd())
    monkeypatch.chdir(root.parent)
    with pytest.raises(HarmonyError, match=r"no params.yaml and dvc.yaml"):
        settings.find_root()


def test_values_are_typed_as_dvc_types_them(root):
    (root / "params.yaml").write_text(MINI.replace("1e-05", "1e-4").replace("gamma: 1.0", "gamma: 1"), encoding="utf-8")
    run = settings.settings()
    assert (run.diffharmony.learning_rate, run.augmentation.gamma) == (1e-4, 1)  # YAML 1.2; an int for a float
    assert run.base.vae is None and run.base.unet_channels == [64, 128] and vars(run.resunet)["style"] == "style-fusion"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("style: style-fusion", "style: adian", r"resunet.style is 'adian'; it must be .*; did you mean adain"),
        ("steps: 300", "steps: -3", "harmony_vae.steps is -3; it must be greater than or equal to 0"),
        ("steps: 300", "stepz: 300", r"unknown key harmony_vae.stepz; did you mean harmony_vae.steps"),
        ("seed: 0", "seed: 0\nresunets: {a: 1}", r"unknown key resunets; did you mean resunet"),
        ("seed: 0", "seed: 0\n1: 2", "unknown key 1"),
        ("  train_decoder: true", "", "missing key harmony_vae.train_decoder; profiles/mini.yaml shows it"),
        ("steps: 300", "steps: 1.5", "harmony_vae.steps is 1.5; it must be a valid integer"),
        ("train_decoder: true", "train_decoder: yes", "train_decoder is 'yes'; it must be a valid boolean"),
        ("[HFlickr, Hday2night]", "[HFlikr]", "augmentation.subsets has 'HFlikr'; it must be some of HAdobe5k, HC"),
        ("[reinhard, xiao-ma,", "[reinhart,", r"data.transfers.0 is 'reinhart'; .*; did you mean reinhard\?"),
        ("weights: [0.0, 1.0, 0.0]", "weights: [1.0]", r"weights is \[1.0\]; it must have at least 3 items$"),
        ("strength: [0.0, 100.0]", "strength: [9, 1]", r"strength is \[9, 1\]; the first must not be above"),
        ("crop: 64", "crop: 129", "harmony_vae.crop is 129; it must not be above size, 128"),
        ("pairs: 24", "pairs: 0", "human_harmony.pairs is 0; source: embedded needs at least 1"),
        ("device: auto", "device: gpu", "device is 'gpu'; it must match"),
        (MINI[MINI.index("\nevaluation:") :], "\nevaluation: 3", "evaluation is 3; it must be a valid dictionary"),
        ("seed: 0", "seed: [0", "line 5: not valid YAML"),
        (MINI, "", "^params.yaml: the file is None; it must be a valid dictionary"),
    ],
)
def test_mistakes_are_named_in_one_line(root, old, new, message):
    (root / "params.yaml").write_text(MINI.replace(old, new), encoding="utf-8")
    with pytest.raises(HarmonyError, match=message) as caught:
        settings.settings()
    assert "\n" not in str(caught.value) and "params.yaml" in str(caught.value)


def test_a_stage_begins_with_a_check_of_all_settings(root, capfd):
    (root / "params.yaml").write_text(MINI.replace("style: style-fusion", "style: adian"), encoding="utf-8")
    assert notebooks.run_application(notebooks.app, "notebooks", ["run", "notebooks/none.ipynb"]) == 1
    assert capfd.readouterr().err.startswith("error: params.yaml: resunet.style is 'adian'")


def test_names_are_those_that_the_code_offers():
    ours = settings_schema.ResUNet.model_fields | settings_schema.Data.model_fields
    for key, offered in (("style", resunet.STYLES), ("transfers", transfers.TRANSFERS)):
        accepted = get_args(ours[key].annotation)
        assert set(accepted) == set(offered) or set(get_args(accepted[0])) == set(offered), key
    assert layout.SUBSETS == settings_schema.SUBSETS


@pytest.mark.parametrize("name", [path.stem for path in sorted((REPOSITORY / "profiles").glob("*.yaml"))])
def test_a_profile_holds_what_differs_and_is_written_in_full(root, name):
    (root / "params.yaml").unlink()
    assert settings.write_profile(name) == root / "params.yaml"
    assert settings.settings() == settings.read_profile(name) and settings.settings().profile == name
    assert (root / settings.SCHEMA).read_bytes() == (REPOSITORY / settings.SCHEMA).read_bytes()  # else commit it
    text = (root / "params.yaml").read_text(encoding="utf-8")
    assert all(line.partition("#")[2] in text for line in MINI[MINI.index("profile:") :].splitlines())  # comments, too
    own, mini = (YAML(typ="safe").load(root / f"profiles/{which}.yaml") for which in (name, "mini"))
    sections = [s for s in own if isinstance(own[s], dict)] if name != "mini" else []
    same = [f"{s}.{k}" for s in sections for k in own[s] if own[s][k] == mini[s][k]]
    assert not same, f"{name}.yaml repeats mini.yaml: {same}"


def test_bad_profiles_leave_params_alone(root):
    with pytest.raises(HarmonyError, match=r"no profile mina; did you mean mini\? \(profiles/ has evidence, gpu, mini"):
        settings.write_profile("mina")
    (root / "profiles/odd.yaml").write_text("data: {colour: red}\n")
    with pytest.raises(HarmonyError, match="profiles/odd.yaml: unknown key data.colour"):
        settings.write_profile("odd")
    assert (root / "params.yaml").read_text(encoding="utf-8") == MINI
    assert sorted(path.name for path in root.iterdir()) == ["dvc.yaml", "notebooks", "params.yaml", "profiles"]
