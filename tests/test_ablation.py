import json

import numpy as np
import pandas as pd
import pytest

from harmonylib.ablation import Ablation, stored_method
from harmonylib.claims import from_ablation
from harmonylib.jsonio import write_json
from harmonylib.training import TrainingDiverged


def table(psnr, model="x", photos=24):
    names = [f"a{i}" for i in range(photos)]
    noise = np.random.default_rng(0).normal(0, 0.1, photos)
    return pd.DataFrame(
        {
            "model": model,
            "subset": "s",
            "name": names,
            "photo": names,
            "psnr": psnr + noise,
            "mse": 90 - psnr,
            "fmse": 1.0,
        }
    )


def diverges():
    raise TrainingDiverged("the loss is not finite at step 3")


@pytest.fixture
def ablation():
    ablation = Ablation(["zero", "random", "nan"], [0, 1], table(30.0, "composite"))
    for seed in (0, 1):
        ablation.run("zero", seed, lambda seed=seed: table(33.0 + seed))
        ablation.run("nan", seed, diverges)
    ablation.run("random", 0, diverges)
    ablation.run("random", 1, lambda: table(31.0))
    return ablation


def test_a_run_that_diverges_is_null_with_its_status(ablation, tmp_path):
    content = ablation.to_json(
        {"table": "5"}, [ablation.difference("zero", "nan", "psnr")], {"zero": {"note": "first"}}
    )
    write_json(tmp_path / "t.json", content)
    data = json.loads((tmp_path / "t.json").read_text())
    lost = data["rows"]["nan"]
    assert lost["psnr"] is None and lost["interval"] == {"psnr": None, "mse": None, "fmse": None}
    assert lost["status"] == "0 of 2 seeds finished: the loss is not finite at step 3"
    assert data["rows"]["random"]["status"].startswith("1 of 2") and data["rows"]["random"]["runs"][0]["psnr"] is None
    assert data["rows"]["zero"]["psnr"] == pytest.approx(33.5, abs=0.1) and data["rows"]["zero"]["note"] == "first"
    assert data["n"] == data["photos"] == 24 and data["composite"]["psnr"] == pytest.approx(30, abs=0.1)
    (gone,) = data["differences"]
    assert gone["improvement"] is None and gone["verdict"] == "not run" and "nan: 0 of 2" in gone["status"]
    read = from_ablation(data)
    assert read["paired"]["zero vs nan"]["all"]["status"] and read["models"]["nan"]["all"]["psnr"] is None
    assert ablation.plot().axes[0].texts[0].get_text() == "no finite run"


def test_differences_use_the_seeds_both_have_and_the_signs_of_their_metric(ablation):
    gain = ablation.difference("zero", "random", "psnr")
    assert gain["improvement"] == pytest.approx(3.0) and gain["verdict"] == "holds here"  # seed 1 alone: 34 against 31
    assert ablation.difference("random", "zero", "mse")["improvement"] == pytest.approx(-3.0)
    weighted = ablation.difference("a", "b", "psnr", {"zero": 2, "random": -2})
    assert weighted["improvement"] == pytest.approx(6.0)


def test_without_any_finished_run():
    ablation = Ablation(["nan"], [0], table(30.0, "composite"))
    ablation.run("nan", 0, diverges)
    assert ablation.to_json({}, [])["rows"]["nan"]["psnr"] is None


def test_stored_images_come_in_order_and_finite():
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones((5, 3, 2, 2), np.float32)
    method = stored_method("x", images)
    batches = [method.call(None, None, names) for names in (["a", "b"], ["a", "b"], ["a"])]
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    images[3] = np.nan
    with pytest.raises(TrainingDiverged, match="not finite"):
        stored_method("x", images)
