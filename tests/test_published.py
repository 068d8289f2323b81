"""The transcribed tables against themselves and one another: most typos would break a weighted mean."""

import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.evaluation.published import PAPERS, load

PLUS, CONTRASTIVE = PAPERS
SUBSETS = ["HCOCO", "HAdobe5k", "HFlickr", "Hday2night"]


@pytest.fixture(scope="module")
def value():
    """Look-up of one number by (paper, table, row, subset, metric)."""
    return load().set_index(["paper", "table", "row", "subset", "metric"])["value"].sort_index()


def weighted(value, *row_and_metric):
    paper, table, row, metric = row_and_metric
    counts = value[CONTRASTIVE, "I", "Testing"].droplevel("metric")
    return sum(counts[s] * value[paper, table, row, s, metric] for s in SUBSETS) / counts["all"]


def test_shape():
    table = load()
    assert list(table.columns) == ["paper", "table", "row", "subset", "metric", "value", "note"]
    assert not table.duplicated(["paper", "table", "row", "subset", "metric"]).any()
    sizes = table.groupby(["paper", "table"]).size()
    # Table 1: 12 methods x 15 cells less 2 x 5 dashes; II: 10 x 10 and 7 sizes
    assert sizes[PLUS].to_dict() == {"1": 170, "2": 12, "3": 42, "4": 18, "5": 12}
    assert sizes[CONTRASTIVE].to_dict() == {"I": 10, "II": 107, "III": 60, "IV": 21, "V": 10, "VI": 12, "VII": 12}
    assert table.note.map(type).eq(str).all()
    assert table[table.value.isna()].row.unique().tolist() == ["Ec, random init"]  # printed NaN
    assert len(load(PLUS)) + len(load(CONTRASTIVE)) == len(table)
    with pytest.raises(HarmonyError, match="dovenet"):
        load("dovenet")


def test_the_composite_row_of_table_1_is_s2am(value):
    for subset in [*SUBSETS, "all"]:
        ours = value[PLUS, "1", "Composite", subset, "fmse"]
        assert ours == value[CONTRASTIVE, "III", "S2AM", subset, "fmse"]
        assert ours != value[CONTRASTIVE, "III", "input composite", subset, "fmse"]


def test_averages_are_weighted_by_the_test_images(value):
    table = load()
    table = table[(table.subset == "all") & table.table.isin(["1", "II", "III"]) & (table.metric != "params_millions")]
    wrong = set()
    for row in table.itertuples():
        mean = weighted(value, row.paper, row.table, row.row, row.metric)
        slips = abs(mean - row.value) > 0.011
        wrong |= {(row.table, row.row, row.metric)} if slips else set()
        assert slips == (f"weighted by their test images is {mean:.2f}" in row.note)
        assert slips == ("weighted by their test images" in row.note)
    assert wrong == {
        *(("1", row, metric) for row in ("RainNet", "Li et al.") for metric in ("psnr", "mse")),
        ("1", "GIFT", "psnr"),
        ("1", "iS2AM", "mse"),
        ("1", "SCS-Co", "mse"),
        *(("1", row, "fmse") for row in ("Composite", "DoveNet", "BargainNet", "RainNet", "SCS-Co")),
        *(("II", "IIH", metric) for metric in ("mse", "psnr")),
        ("II", "Ours", "mse"),
        *(("III", row, "fmse") for row in ("DIH", "S2AM", "DoveNet", "IIH")),
        ("III", "Ours", "fssim_x100"),
    }


def test_table_3_puts_the_peer_ahead_overall(value):
    def bucketed(row, metric, data="iHarmony4"):
        return np.array([value[PLUS, "3", row, f"{data} {bucket}", metric] for bucket in ("0-5%", "5-15%", "15-100%")])

    counts = bucketed("N_samples", "n")
    assert counts.sum() == 7404 and bucketed("N_samples", "n", "Human Harmony").sum() == 2946
    for row, psnr, fmse in (("HDNet512", 41.73, 141.99), ("DiffHarmony++", 41.64, 153.48)):
        means = [counts @ bucketed(row, metric) / 7404 for metric in ("psnr", "fmse")]
        assert means == pytest.approx([psnr, fmse], abs=0.005)


def test_tables_that_repeat_one_another(value):
    for metric in ("psnr", "mse", "fmse"):
        slip = 0.01 if metric == "psnr" else 0  # Table 4 prints 40.98, Table 1 40.97
        again = value[PLUS, "4", "1024px", "all", metric]
        assert again == pytest.approx(value[PLUS, "1", "DiffHarmony", "all", metric] + slip, abs=1e-9)
        assert value[PLUS, "4", "1024px + Harmony-VAE", "all", metric] == value[PLUS, "1", "Ours", "all", metric]
        again = value[PLUS, "5", "Ec + D, zero init", "all", metric]
        assert again == value[PLUS, "4", "512px + Harmony-VAE", "all", metric]
    ours = value[CONTRASTIVE, "II", "Ours", "all", "psnr"]
    repeated = [("IV", "Ours", "HAdobe5k 256px"), ("VII", "K = 256", "all")]
    assert all(value[CONTRASTIVE, *cell, "psnr"] == ours for cell in repeated)
    for split in ("Training", "Testing"):
        counts = value[CONTRASTIVE, "I", split].droplevel("metric")
        assert counts[SUBSETS].sum() == counts["all"]


def test_votes(value):
    votes, share = (value[CONTRASTIVE, "V"].xs(name, level="metric") for name in ("votes", "preference_percent"))
    assert len(votes) == 5 and votes.sum() == 28 * 99
    assert share.to_numpy() == pytest.approx(100 * votes.to_numpy() / votes.sum(), abs=0.0051)
