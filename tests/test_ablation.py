from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from imports import ROOT, notebook_code

from ablations import common
from harmonylib import HarmonyError
from harmonylib.core import cache
from harmonylib.core.images import write_image
from harmonylib.core.json_files import read_json, write_json
from harmonylib.core.settings import read_profile
from harmonylib.data.batches import TripleSet
from harmonylib.data.layout import Triple
from harmonylib.evaluation.published import PROTOCOLS
from harmonylib.training import TrainingDiverged
from report.claims import from_ablation


def scores(psnr, mse=1.0, both=False):
    """Four images of three photos in two subsets; psnr: one value an image. both: under IIH's protocol, too."""
    table = pd.DataFrame({"subset": ["a", "a", "b", "b"], "name": list("wxyz"), "photo": [1, 1, 2, 3]})
    table = table.assign(model="any", protocol="standard", scored_at=64, psnr=np.array(psnr, float), mse=mse)
    return pd.concat([table, table.assign(protocol="iih", mse=mse + 10)]) if both else table


def diverge(seed):
    raise TrainingDiverged(f"lost at seed {seed}")


def once(seed):
    return scores([10, 10, 10, 10]) if seed else diverge(seed)


def variants():
    return {"low": lambda seed: scores([20, 22, 24, 26], 4.0),
            "high": lambda seed: scores(np.array([21, 23, 26, 30]) + 2 * seed, 3.0),
            "once": once, "never": diverge}  # fmt: skip


def test_rows_are_means_over_seeds_then_images_and_failures_are_null():
    table = common.run_variants(variants(), range(2))
    rows = table.rows(["psnr", "mse"])
    assert rows["high"]["psnr"] == np.mean([22, 24, 27, 31]) and (rows["high"]["n"], rows["high"]["photos"]) == (4, 3)
    assert [run["psnr"] for run in rows["high"]["runs"]] == [25, 27]
    low, high = rows["high"]["interval"]["psnr"]
    assert 23 <= low < rows["high"]["psnr"] < high <= 31
    assert rows["once"]["status"] == "1 of 2 seeds finished" and rows["once"]["psnr"] == 10
    assert rows["once"]["runs"][0] == {"seed": 0, "psnr": None, "mse": None, "status": "lost at seed 0"}
    assert rows["never"]["psnr"] is None and rows["never"]["interval"] == {"psnr": None, "mse": None}
    assert rows["never"]["status"] == "0 of 2 seeds finished"
    assert table.rows(["psnr"], ["b"])["high"]["b"]["psnr"] == np.mean([27, 31])
    assert str(table).startswith("5 of 8 runs finished\nonce, seed 0: lost at seed 0\nnever, seed 0: lost")


def test_differences_are_paired_on_images_and_on_the_seeds_that_both_finished():
    table = common.run_variants(variants(), range(2))
    gain = table.difference("high", "low", "psnr")
    assert gain["improvement"] == np.mean([2, 2, 3, 5]) and 2 <= gain["interval"][0] <= gain["interval"][1] <= 5
    assert gain["verdict"] == "too few photos for a verdict" and gain["photos"] == 3
    assert table.difference("high", "low", "mse")["improvement"] == 1  # positive is better
    assert table.difference("high", "low", "psnr", "b")["improvement"] == 4
    partly = table.difference("high", "once", "psnr")  # seed 1 alone
    assert partly["improvement"] == 27 - 10 and partly["status"] == "1 of 2 seeds"
    gains = table.difference("up", "down", "psnr", terms={"high": 1, "low": -1, "once": 2})
    assert gains["improvement"] == 27 - 23 + 20
    never = table.difference("never", "low", "psnr")
    assert never["improvement"] is None and never["verdict"] == "not run"


def test_shuffled_images_are_matched_by_name_and_missing_ones_refused():
    shuffled = {"a": lambda s: scores([1, 2, 3, 4]), "b": lambda s: scores([1, 2, 3, 9]).iloc[::-1]}
    gain = common.run_variants(shuffled, [0]).difference("b", "a", "psnr")
    assert gain["improvement"] == 5 / 4
    short = common.run_variants({"a": lambda s: scores([1, 2, 3, 4]), "b": lambda s: scores([1, 2, 3, 4])[:3]}, [0])
    with pytest.raises(HarmonyError, match="b: 1 of 4 predictions are missing"):
        short.rows(["psnr"])


@pytest.mark.parametrize("subsets", [("all",), ("a", "b")])
def test_a_report_is_what_the_claims_read(tmp_path, subsets):
    table = common.run_variants(variants(), range(2))
    pairs = [("high", "low"), ("never", "low"), ("up", "down", {"high": 2, "low": -2})]
    data = common.report("T", table, ["psnr", "mse"], pairs, subsets, profile="fake", steps=3)
    write_json(tmp_path / "table.json", data)
    read = from_ablation(read_json(tmp_path / "table.json"))
    assert (read["profile"], read["steps"], read["seeds"], read["n"], read["photos"]) == ("fake", 3, 2, 4, 3)
    effect = read["paired"]["high vs low"][subsets[0]]
    assert effect["psnr"][0] == (3 if subsets == ("all",) else 2) and len(effect["psnr"]) == 3
    assert read["paired"]["up vs down"][subsets[0]]["psnr"][0] == 2 * effect["psnr"][0]
    assert "psnr" not in read["paired"]["never vs low"][subsets[0]]
    assert read["models"]["low"][subsets[0]]["mse"] == 4
    assert read["models"]["never"][subsets[0]]["psnr"] is None
    assert len(common.plot(data).axes) == 2
    assert list(common.side_by_side(data, ["psnr"]).columns) == [("ours", "psnr")]
    gains = common.gains(data)
    assert len(gains) == len(pairs) * len(subsets) and gains["improvement"].tolist()[0] == effect["psnr"][0]
    never = gains[gains["after"] == "never"]
    assert never[["improvement", "low", "high", "published"]].isna().all(None) and (never["verdict"] == "not run").all()


def test_published_values_stand_beside_ours_in_our_units():
    names = ["1: L1", "2: L1 + Lpixel"]
    table = common.run_variants(
        {name: lambda s: scores([1, 2, 3, 4], 1, True).assign(fssim=0.5) for name in names}, [0]
    )
    composite = scores([1, 1, 1, 1], 2.0, True)
    data = common.report("VI", table, ["psnr", "mse"], [names[::-1]], composite=composite)
    assert (data["protocol"], data["scored_at"]) == ("standard, composite background pasted", 64)
    assert data["as_published"]["VI"]["protocol"] == "iih" and data["rows"]["1: L1"]["scored_at"] == 64
    assert (data["rows"]["1: L1"]["mse"], data["composite"]["mse"], data["n"]) == (1, 2, 4)
    assert (common.as_published(data)["rows"]["1: L1"]["mse"], common.as_published(data)["composite"]["mse"]) == (
        11,
        12,
    )
    assert from_ablation(data)["as_published"]["VI"]["models"]["1: L1"]["all"]["mse"] == 11
    gone = scores([1, 2, 3, 4], 1, True).assign(fssim=0.5).query("protocol != 'standard' or name != 'w'")
    fewer = common.report("VI", common.run_variants({names[0]: lambda s: gone}, [0]), ["psnr"], [])
    assert (fewer["n"], common.as_published(fewer)["n"]) == (3, 4)  # a composite without a standard row
    assert common.side_by_side(data, ["mse"])["ours", "mse"].tolist() == [11, 11, 12]
    data = common.report("VI", table, ["psnr", "mse", "fssim"], [names[::-1]])
    assert data["rows"]["1: L1"]["published"] == pytest.approx({"psnr": 34.56, "mse": 54.55, "fssim": 0.8568})
    assert [d["published"] for d in data["differences"]] == pytest.approx([0.97, 12.41, 0.0246])
    assert common.side_by_side(data, ["psnr", "mse"])["published", "psnr"].tolist() == [34.56, 35.53]
    assert common.gains(data)["published"].tolist() == pytest.approx([0.97])


def test_nothing_to_run_is_named_and_other_errors_pass():
    with pytest.raises(HarmonyError, match="nothing to run"):
        common.run_variants(variants(), [])
    with pytest.raises(ZeroDivisionError):
        common.run_variants({"a": lambda seed: 1 / 0}, [0])


def test_the_resunet_trains_with_the_runs_settings_and_the_rows_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    paths = [tmp_path / name for name in ("composite.png", "mask.png", "real.png")]
    picture = np.random.default_rng(0).integers(256, size=(16, 16, 3))
    for path, array in zip(paths, (picture, np.eye(16) * 255, np.zeros((16, 16, 3))), strict=True):
        write_image(path, array.astype(np.uint8))
    section = SimpleNamespace(steps=9, batch_size=2, size=64, base_channels=2, depth=2, residual_convs=0, style="none",
                              patches=4, reading="B", masked_patches=True, affine="constant", view=0,
                              crop=0, flip=True, recolor=0.0, restyle=0.0)  # fmt: skip
    run = SimpleNamespace(seed=0, resunet=section, ablations=SimpleNamespace(resunet_steps=3), device="cpu",
                          precision="fp32", compile=False, accumulation=1, checkpointing=False)  # fmt: skip
    data, seen = TripleSet([Triple("a", "x", *paths)], 16), []

    def trained(**changes):
        model, history = common.train_resunet(
            run, data, 0, lambda m: seen.append(m.config.style) or {"psnr": 1.0}, **changes
        )
        return model, history, torch.cat([parameter.flatten() for parameter in model.parameters()])

    model, history, weights = trained(style="rain")
    assert model.config.style == "rain" and model.config.base_channels == 2 and not model.training
    assert seen == ["rain"] * 3 and len(history) == 3 and "contrastive" in history[0]
    assert torch.equal(trained(style="rain")[2], weights)
    assert "contrastive" not in trained(weights=(0.4, 0.5, 0.0))[1][0]
    assert not torch.equal(trained(style="adain")[2], weights)  # starts with the same weights, and must not resume
    common.train_resunet(run, data, 0, style="none")
    assert "psnr" in trained(style="none")[1][0]  # a finished run that nobody looked at has no such history

    run.resunet = SimpleNamespace(
        **vars(section) | common.PAPERS | {"steps": 3, "start": None, "size": 16, "style": "rain"}
    )
    run.resunet.weights = list(run.resunet.weights)
    model.save_pretrained(common.MAIN_MODEL)
    write_json(common.MAIN_MODEL / "training.json", [{"step": 3, "loss": 7.0}])
    same, history = common.train_resunet(run, data, 0)
    assert history == [{"step": 3, "loss": 7.0}] and torch.equal(same.up[0].up[0].weight, model.up[0].up[0].weight)
    for seed, changes in ((1, {}), (0, {"style": "adain"}), (0, {"patches": 5})):
        assert common.train_resunet(run, data, seed, **changes)[1][-1].get("loss") != 7.0


def test_under_paper_the_rows_that_are_the_main_model_are_not_trained_again():
    """Table IV's Ours, row 4 of VI and K = 256 of VII; one seed, as long as the model they ablate."""
    run = read_profile("paper")
    assert (run.ablations.seeds, run.ablations.resunet_size, run.evaluation.size) == (1, run.resunet.size, 256)
    assert run.ablations.sizes == [256, 512, 1024] and run.diffharmony.size == 512
    main = [{"style": run.resunet.style}, {"patches": 256}, {"style": "style-fusion", "weights": (0.4, 0.5, 0.1)}]
    for changes in (*main, {"patches": 128}, {"weights": (0.4, 0.5, 0.0)}):
        section = common.changed(run.resunet, size=run.ablations.resunet_size, **common.PAPERS | changes)
        assert common.is_main_model(run, section, run.seed) == (changes in main)
    assert not common.is_main_model(read_profile("mini"), read_profile("mini").resunet, 0)


def test_under_paper_tables_are_scored_at_the_published_size_by_the_published_protocol():
    """256 px, Table IV at its rows' sizes; what the JSON of a run says, tests/long/paper_smoke.py reads."""
    run = read_profile("paper")
    assert run.evaluation.size == 256 and run.ablations.sizes == [256, 512, 1024]
    assert run.diffharmony.size == 512 and run.ablations.resolutions == [512, 1024]  # Tables 2, 5 and 4 infer at
    notebooks = {path.stem.split("_")[1]: path for path in ROOT.glob("ablations/table_*.ipynb")}
    notebooks |= {"3": notebooks.pop("human"), "9": ROOT / "notebooks/09_evaluation.ipynb"}
    code = {table: notebook_code(path) for table, path in notebooks.items()}
    for table, text in code.items():
        assert ("A.sizes" in text or "ablations.sizes" in text) == (table == "IV"), table
        assert "evaluation.size" in text or "run.evaluation\n" in text or table == "IV", table
        if PROTOCOLS.get(table) is not None:
            assert f'protocols("{table}")' in text, table
    assert 'TABLES = ("1", "3", "III")' in code["9"] and "protocols(*TABLES)" in code["9"]
