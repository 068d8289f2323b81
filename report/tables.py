"""The papers' tables as HTML, laid out as printed, with the cells of our metrics files beside them."""

import itertools
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup, escape

from .claims import AGAINST, CONTRASTIVE, PLUS

TOTALS = {"1": "Average", "I": "Total"}  # what the tables call "all"; the others: All


@dataclass(frozen=True)
class Table:
    """A published table, our metrics file for it, and which of source, row, subset, metric go down and which across.

    split: a column and a separator; its last piece becomes "detail" and what is before it "part".
    """

    number: str
    title: str
    file: str
    down: tuple
    across: tuple
    split: tuple | None = None


TABLES = (
    (PLUS, "diffharmony_plus_plus", (
        Table("1", "Four sub-datasets of iHarmony4", "evaluation_details", ("subset", "metric"), ("source", "row")),
        Table("2", "Data augmentation on two small subsets", "table_2", ("subset", "metric"), ("source", "row")),
        Table("3", "By foreground ratio", "evaluation_details", ("source", "part", "row", "metric"), ("detail",),
              ("subset", " ")),
        Table("4", "Harmony-VAE and refinement at several resolutions", "table_4", ("source", "row"), ("metric",)),
        Table("5", "Initialisation and trained parts", "table_5", ("source", "part", "metric"), ("detail",),
              ("row", ", ")),
    )),
    (CONTRASTIVE, "region_wise_contrastive", (
        Table("I", "Composites per sub-dataset", "evaluation_details", ("source", "row"), ("subset",)),
        Table("II", "MSE, PSNR and parameters", "evaluation_details", ("source", "row"), ("subset", "metric")),
        Table("III", "Foreground errors", "evaluation_details", ("source", "row"), ("subset", "metric")),
        Table("IV", "Resolutions (PSNR)", "table_IV", ("source", "subset"), ("row",)),
        Table("V", "User study", "votes", ("source", "metric"), ("row",)),
        Table("VI", "Loss terms and style fusion", "table_VI", ("source", "row"), ("metric",)),
        Table("VII", "Number of patches", "table_VII", ("source", "row"), ("metric",)),
    )),
)  # fmt: skip
METRIC_NAMES = {"psnr": "PSNR", "mse": "MSE", "fmse": "fMSE", "fssim_x100": "fSSIM ×100", "ssim_x100": "SSIM ×100",
                "params_millions": "M parameters", "preference_percent": "preference, %"}  # fmt: skip
COUNTS = ("n", "votes")
SCALED = {"fssim_x100": ("fssim", 100), "ssim_x100": ("ssim", 100)}


def html_table(frame: pd.DataFrame) -> Markup:
    """A table of texts as HTML; equal neighbouring labels share a header cell."""
    frame = frame.fillna("–").map(escape).rename(index=escape, columns=escape)
    with pd.option_context("display.max_colwidth", None):
        return Markup(frame.to_html(escape=False, border=0))


def rows_of(models: dict, wanted) -> list[dict]:
    """Long rows (row, subset, metric, text) of `summarise`'s form, for the metrics of a published table."""
    rows = []
    for (model, parts), metric in itertools.product(models.items(), wanted):
        key, factor = SCALED.get(metric, (metric, 1))
        for subset, part in parts.items():
            value, (lo, hi) = part.get(key), part.get("interval", {}).get(key) or (None, None)
            if value is None:
                text, small = "–", part.get("status")
            elif metric in COUNTS:
                text, small = f"{value:,}", None
            else:
                text, small = f"{factor * value:.2f}", None if lo is None else f"{factor * lo:.2f}–{factor * hi:.2f}"
            text += Markup("<small>{}</small>").format(small) if small else ""
            rows.append({"row": model, "subset": subset, "metric": metric, "text": text})
    return rows


def _our_rows(table: Table, data: dict, wanted: list[str]) -> list[dict]:
    """Our long rows for one published table."""
    models, others = data.get("models", {}), data.get("external", ())
    if table.number == "I":
        splits = {"Training": data.get("counts", {}).get("train"), "Testing": data.get("counts", {}).get("test")}
        splits = {name: counts | {"all": sum(counts.values())} for name, counts in splits.items() if counts}
        models = {name: {subset: {"n": n} for subset, n in counts.items()} for name, counts in splits.items()}
    elif table.number == "3":
        rows = []
        for key, label in (("benchmark", "test set"), ("human_harmony", "our Human Harmony")):
            found = data.get("buckets", {}).get(key, {})
            retrained = [model for model in found if model.endswith("Human Harmony")]
            found = {m: found[m] for m in (*AGAINST.split(" vs "), *retrained, *others) if m in found}
            new = rows_of({"N_samples": parts for parts in list(found.values())[:1]}, ["n"])  # noqa: B035
            new += rows_of(found, [metric for metric in wanted if metric != "n"])
            rows += [row | {"subset": f"{label} {row['subset']}"} for row in new if row["subset"] != "all"]
        return rows
    elif table.number in ("1", "II", "III"):
        shown = ("composite", *(("diffharmony", "diffharmony++") if table.number == "1" else ()), "contrastive-resunet",
                 *others)  # fmt: skip
        models, size = {name: models[name] for name in shown if name in models}, "params_millions"
        costs = {name: cost["parameters"] / 1e6 for name, cost in data.get("cost", {}).items() if name in models}
        sizes = rows_of({name: {"all": {size: millions}} for name, millions in costs.items()}, {size} & set(wanted))
        return rows_of(models, [metric for metric in wanted if metric != size]) + sizes
    return rows_of(models, wanted)


def side_by_side(table: Table, printed: pd.DataFrame, data: dict | None) -> dict:
    """What tables.html needs for one published table, `printed`, with the cells of our metrics file, if any: those that
    the published cells' own protocol scored."""
    own = data.get("as_published", {}).get(table.number, {}) if data else {}
    data = data and data | own
    wanted = list(dict.fromkeys(printed["metric"]))
    texts = [_as_printed(*cell) for cell in zip(printed["value"], printed["metric"], strict=True)]
    rows = printed.assign(source="published", text=texts).to_dict("records")
    ours = ", ".join(filter(None, ("ours", data.get("profile")))) if data else None
    source = Markup('<span class="own">{}</span>').format(ours)  # the style sheet tints what holds this class
    for row in _our_rows(table, data, wanted) if data else ():
        rows.append(row | {"source": source, "text": Markup('<span class="own">{}</span>').format(row["text"])})
    cells = pd.DataFrame(rows)
    if table.split:
        column, separator = table.split
        cells[["part", "detail"]] = [(p, d) for p, _, d in cells[column].str.rpartition(separator).to_numpy()]
    cells["subset"] = cells["subset"].replace("all", TOTALS.get(table.number, "All"))
    cells["metric"] = cells["metric"].replace(METRIC_NAMES)
    for level in (*table.down, *table.across):  # on every level the order of first appearance
        cells[level] = pd.Categorical(cells[level], cells[level].unique())
    if data and table.across[0] == "source":  # wide tables start with ours: what is right of the window is seen by few
        cells["source"] = cells["source"].cat.reorder_categories([source, "published"])
    grid = cells.pivot(index=list(table.down), columns=list(table.across), values="text")
    grid = grid.sort_index(axis=0).sort_index(axis=1).rename_axis(index=[None] * grid.index.nlevels)
    remarks = {}
    for note, *cell in printed.loc[printed["note"] != "", ["note", "row", "subset", "metric"]].to_numpy():
        place = ", ".join(METRIC_NAMES.get(part, part) for part in cell if part != "all")
        remarks.setdefault(note, []).append(place)
    about = {key: data.get(key) for key in ("data", "protocol", "scored_at")} if data else {}
    about |= {"count": _count(data, own)} if data else {}
    return about | {"number": table.number, "title": table.title, "file": table.file, "ours": ours, "remarks": remarks,
                    "grid": html_table(grid.rename_axis(columns=[None] * grid.columns.nlevels))}  # fmt: skip


def _as_printed(value: float, metric: str) -> str:
    if value != value:
        return "NaN"
    if metric in COUNTS:
        return f"{value:,.0f}"
    return f"{value:.2f}" if round(value, 2) == value else f"{value:g}"


def _count(data: dict, own: dict) -> str:
    """own: the part of it that the published cells' protocol scored, which may be more composites than the standard."""
    if "participants" in data:
        return f"n = {data['n']} votes of {data['participants']} participants on {data['photos']} images"
    scored = own.get("models") or own.get("buckets", {}).get("benchmark")
    parts = [part for model in (scored or data.get("models", {})).values() for part in model.values()]

    def most(key):
        found = max((part.get(key) or 0 for part in parts), default=0)
        return own.get(key) or (found if scored else data.get(key) or found)

    return f"n = {most('n')} composites of {most('photos')} photos"
