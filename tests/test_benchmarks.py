"""The benchmarks' arithmetic and table; what they measure is `make bench`'s."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from benchmarks.overhead import STAGES, whole_run
from benchmarks.paired import paired
from benchmarks.run import slower, table
from benchmarks.stages import spent


def test_pairs_are_alternated_and_summarised():
    calls = []
    row = paired(lambda: calls.append("ours"), lambda: calls.append("plain"), repeats=2)
    assert calls == ["ours", "plain"] * 2 + ["plain", "ours"]
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    line = table([{"name": "a", **row, "ratio": 1.23, "spread": [1.0, 4.56]}]).splitlines()[1]
    assert line.split()[-2:] == ["1.23", "1.00–4.56"]


def test_what_got_slower():
    def result(ratio, ours, unit="s", cpu="a"):
        row = {"module": "m", "name": "n", "ratio": ratio, "spread": [ratio - 0.1, ratio + 0.1], "ours": ours}
        return {"machines": {"m": cpu}, "rows": [row | {"unit": unit}]}

    before = result(1.0, 3.0)
    assert not slower(result(0.9, 3.5), before) and not slower(before, {"rows": [], "machines": {}})
    assert slower(result(0.7, 3.0), before) == ["n: ratio 1.00, now 0.70"]
    assert slower(result(1.0, 4.5), before) == ["n: 3 s, now 4.5"] and not slower(result(1.0, 4.5, cpu="b"), before)
    assert slower(result(1.0, 2.0, "images/s"), before) and not slower(result(1.0, 4.5, "images/s"), before)


def test_seconds_of_a_notebook_by_what_its_cells_do():
    sources = ["import torch", "train(model)", "import x\ndisplay(figure)", "a = 1", "a += 1"]
    cells = [new_code_cell(source, metadata={"papermill": {"duration": 2.0**n}}) for n, source in enumerate(sources)]
    cells[-1].metadata.papermill.duration = None  # as of a cell without code
    notebook = new_notebook(cells=[new_markdown_cell("train(model)"), *cells], metadata={"papermill": {"duration": 18}})
    assert spent(notebook) == {"start": 3, "imports": 1, "training": 2, "figures": 4, "rest": 8}


def test_the_fixed_cost_of_stages_in_a_whole_run():
    per_stage = {"baseline": 10.0 * len(STAGES), "ratio": 0.5, "spread": [0.4, 0.8]}  # 10 s a stage, and 10 s more
    row = whole_run("mini", 1200.0, 12, per_stage)
    assert "at 10.0 s a stage" in row["name"]
    assert (row["ours"], row["baseline"]) == (1200.0, pytest.approx(1080.0))
    assert row["ratio"] == pytest.approx(0.9) and row["spread"] == pytest.approx([0.85, 0.975])
