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
