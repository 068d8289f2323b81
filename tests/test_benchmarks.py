"""The benchmarks' arithmetic and table; what they measure is `make bench`'s."""

import pytest

from benchmarks.overhead import STAGES, whole_run
from benchmarks.paired import paired
from benchmarks.run import table


def test_pairs_are_alternated_and_summarised():
    calls = []
    row = paired(lambda: calls.append("ours"), lambda: calls.append("plain"), repeats=2)
    assert calls == ["ours", "plain"] * 2 + ["plain", "ours"]
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    line = table([{"name": "a", **row, "ratio": 1.23, "spread": [1.0, 4.56]}]).splitlines()[1]
    assert line.split()[-2:] == ["1.23", "1.00–4.56"]


def test_the_fixed_cost_of_stages_in_a_whole_run():
    per_stage = {"baseline": 10.0 * len(STAGES), "ratio": 0.5, "spread": [0.4, 0.8]}  # 10 s a stage, and 10 s more
    row = whole_run("mini", 1200.0, 12, per_stage)
    assert "at 10.0 s a stage" in row["name"]
    assert (row["ours"], row["baseline"]) == (1200.0, pytest.approx(1080.0))
    assert row["ratio"] == pytest.approx(0.9) and row["spread"] == pytest.approx([0.85, 0.975])
