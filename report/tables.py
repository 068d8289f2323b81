"""The papers' tables as HTML, laid out as printed, with the cells of our metrics files beside them."""

import html
import itertools
from dataclasses import dataclass

import pandas as pd

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
SCALED = {"fssim_x100": ("fssim", 100), "ssim_x100": ("ssim", 100)}


def text_of(value) -> str:
    return html.escape(str(value))


def scroll(table: str, label: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text_of(label)}">{table}</div>'


def source_link(file: str) -> str:
    return f'<a href="metrics.html#{file}">{file}.json</a>'


def rows_of(models: dict, wanted, subset=lambda name: name) -> list[dict]:
    """Long rows (row, subset, metric, text) of `summarise`'s form, for the metrics of a published table."""
    rows = []
    for (model, parts), metric in itertools.product(models.items(), wanted):
        key, factor = SCALED.get(metric, (metric, 1))
        for name, part in parts.items():
            value, (lo, hi) = part.get(key), part.get("interval", {}).get(key) or (None, None)
            if value is None:
                text = "–" + small(part.get("status"))
            elif metric in ("n", "votes"):
                text = f"{value:,}"
            else:
                text = f"{factor * value:.2f}"
                text += "" if lo is None else small(f"{factor * lo:.2f}–{factor * hi:.2f}")
            rows.append({"row": model, "subset": subset(name), "metric": metric, "text": text})
    return rows


def small(text) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


def _own(table: Table, data: dict, wanted: list[str]) -> list[dict]:
    """Our long rows for one published table."""
    models = data.get("models", {})
    if table.number == "I":
        names = {"train": "Training", "test": "Testing"}
        counts = {split: subsets | {"all": sum(subsets.values())} for split, subsets in data.get("counts", {}).items()}
        models = {names[split]: {s: {"n": n} for s, n in subsets.items()} for split, subsets in counts.items()}
    elif table.number == "3":
        sets = (("benchmark", "test set"), ("human_harmony", "our Human Harmony"))
        rows = []
        for key, label in sets:
            found = data.get("buckets", {}).get(key, {})
            kept = {m: {b: p for b, p in found[m].items() if b != "all"} for m in AGAINST.split(" vs ") if m in found}
            sizes = {"N_samples": parts for parts in list(kept.values())[:1]}  # noqa: B035
            rows += rows_of(sizes, ["n"], lambda bucket, label=label: f"{label} {bucket}")
            rows += rows_of(kept, [m for m in wanted if m != "n"], lambda bucket, label=label: f"{label} {bucket}")
        return rows
    elif table.number in ("1", "II", "III"):
        shown = ("composite", *(("diffharmony", "diffharmony++") if table.number == "1" else ()), "contrastive-resunet")
        models = {name: models[name] for name in shown if name in models}
        rows = rows_of(models, [m for m in wanted if m != "params_millions"])
        for name in models.keys() & data.get("cost", {}).keys() if "params_millions" in wanted else ():
            size = data["cost"][name]["parameters"] / 1e6
            rows.append({"row": name, "subset": "all", "metric": "params_millions", "text": f"{size:.2f}"})
        return rows
    return rows_of(models, wanted)


def table_html(table: Table, printed: pd.DataFrame, data: dict | None, label: str = "") -> str:
    """One published table as an HTML section with our cells, if any, beside it; label says what our data are."""
    wanted = list(dict.fromkeys(printed["metric"]))
    rows = [
        r | {"source": "published", "text": _as_printed(r["value"], r["metric"])} for r in printed.to_dict("records")
    ]
    name = ", ".join(filter(None, ("ours", (data or {}).get("profile"))))
    rows += [r | {"source": name} for r in _own(table, data, wanted)] if data else []
    for row in rows:
        if table.split:
            column, separator = table.split
            row["part"], _, row["detail"] = row[column].rpartition(separator)
        row["subset"] = TOTALS.get(table.number, "All") if row["subset"] == "all" else row["subset"]
        row["metric"] = METRIC_NAMES.get(row["metric"], row["metric"])
    cells = {(tuple(r[k] for k in table.down), tuple(r[k] for k in table.across)): r for r in rows}
    about = "Ours: not run" + (" (<code>make ablations</code>)" if table.file.startswith("table_") else "") + "."
    if data:
        about = f"{name.capitalize()}, <strong>{text_of(data.get('data', label))}</strong>; {_count(data)}; "
        about += f"small: 95 % interval. Source: {source_link(table.file)}."
        if table.number in ("III", "VI"):
            about += " Printed fSSIM follows IIH's definition, ours the standard one: not comparable."
    notes = {}
    for row in printed[printed["note"] != ""].to_dict("records"):
        cell = (row["row"], row["subset"], METRIC_NAMES.get(row["metric"], row["metric"]))
        notes.setdefault(row["note"], []).append(", ".join(part for part in cell if part != "all"))
    remarks = ""
    for note, places in notes.items():
        where = "; ".join(places) if len(places) <= 6 else f"{len(places)} cells"
        remarks += f"<li>{text_of(where)}: {text_of(note)}</li>"
    remarks = f"<details><summary>Remarks on the printed numbers ({len(notes)})</summary><ul>{remarks}</ul></details>"
    title = f"Table {table.number}: {table.title}"
    return (f'<section id="table-{table.number}"><h3>{text_of(title)}</h3><p class="soft">{about}</p>'
            f"{scroll(_grid(cells, len(table.down)), title)}{remarks if notes else ''}</section>")  # fmt: skip


def _as_printed(value: float, metric: str) -> str:
    if value != value:
        return "NaN"
    if metric in ("n", "votes"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if round(value, 2) == value else f"{value:g}"


def _count(data: dict) -> str:
    if "participants" in data:
        return f"n = {data['n']} votes of {data['participants']} participants on {data['photos']} images"
    parts = [part for model in data.get("models", {}).values() for part in model.values()]
    n, photos = (data.get(key) or max((part.get(key) or 0 for part in parts), default=0) for key in ("n", "photos"))
    return f"n = {n} composites of {photos} photos"


def _grid(cells: dict, depth: int) -> str:
    """An HTML table of {(row labels, column labels): row}; equal neighbouring labels share a header cell."""

    def ordered(position):
        labels = list(dict.fromkeys(key[position] for key in cells))  # by first appearance on every level
        ranks = [{v: i for i, v in enumerate(dict.fromkeys(x[k] for x in labels))} for k in range(len(labels[0]))]
        if position:  # wide tables start with our columns: what is right of the window is seen by few
            ranks[0] |= {v: -1 for v in ranks[0] if v.startswith("ours")}
        return sorted(labels, key=lambda label: [rank[v] for rank, v in zip(ranks, label, strict=True)])

    down, across = ordered(0), ordered(1)
    own = lambda labels: ' class="own"' if any(str(v).startswith("ours") for v in labels) else ""  # noqa: E731
    head = ""
    for level in range(len(across[0])):
        head += "<tr>" + (f'<td colspan="{depth}" rowspan="{len(across[0])}"></td>' if level == 0 else "")
        for prefix, group in itertools.groupby(across, key=lambda labels: labels[: level + 1]):
            head += f'<th scope="col" colspan="{len(list(group))}"{own(prefix)}>{text_of(prefix[-1])}</th>'
        head += "</tr>"
    body, opened = "", ()
    for labels in down:
        body += "<tr>"
        for level in range(depth):
            if opened[: level + 1] != labels[: level + 1]:
                span = sum(other[: level + 1] == labels[: level + 1] for other in down)
                body += f'<th scope="row" rowspan="{span}"{own(labels)}>{text_of(labels[level])}</th>'
        opened = labels
        for column in across:
            row = cells.get((labels, column))
            body += f"<td{own((*labels, *column))}>{row['text'] if row else '–'}</td>"
        body += "</tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
