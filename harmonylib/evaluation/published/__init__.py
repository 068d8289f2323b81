"""The numbers printed in both papers, one CSV row per number, with what is wrong or odd about it in `note`."""

from importlib.resources import files

import pandas as pd

from ...core.errors import HarmonyError

PAPERS = ("diffharmony_plus_plus", "region_wise_contrastive")


def load(paper: str | None = None) -> pd.DataFrame:
    """Published numbers of one paper of `PAPERS`, or of both: columns paper, table, row, subset, metric, value, note.

    table is as printed ("1" to "5", "I" to "VII"), subset "all" is the tables' Average/All, value a float (NaN where
    the paper prints NaN), note "" or a remark. Cells printed as "-" have no row. Raises HarmonyError for another name.
    """
    if paper is not None and paper not in PAPERS:
        raise HarmonyError(f"paper {paper!r}: no published numbers; choose one of {', '.join(PAPERS)}")
    options = {"dtype": {"table": str, "value": float}, "keep_default_na": False, "na_values": {"value": [""]}}
    tables = [pd.read_csv(files(__package__) / f"{name}.csv", **options) for name in PAPERS if paper in (None, name)]
    return pd.concat(tables, ignore_index=True)


# What a table's published cells were scored by, as far as it is known: DiffHarmony++'s by its own code; the contrastive
# paper quotes the fSSIM of IIH, whose code its Tables III and VI are taken to follow. All else: ours.
PROTOCOLS = dict.fromkeys("12345", "diffharmony") | dict.fromkeys(("III", "VI"), "iih")


def protocols(*tables: str) -> tuple[str, ...]:
    """The protocols to score the outputs of these tables' rows by: "standard", and the published cells' own."""
    return tuple(dict.fromkeys(["standard", *(PROTOCOLS.get(table, "standard") for table in tables)]))
