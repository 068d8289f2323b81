"""The report: one offline HTML site made of executed notebooks and of the numbers in reports/metrics/*.json.

Every measured number is read from a metrics file. evaluation.json has the form that notebooks/09_evaluation.ipynb writes;
an ablation writes table_<T>.json (T = 2, 4, 5, IV, VI, VII or "style") of the same form, rows named as published:

    {"profile", "data", "models": {row: {"all" | subset: {"n", "photos", metric: mean, "interval": {metric: [lo, hi]}}}},
     "paired": {"ROW vs ROW": {"all" | subset: {"n", "photos", metric: [mean, lo, hi], "status"?}}}}

What is missing is reported as "not run".
"""

import html
import itertools
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
from PIL import Image

from .errors import HarmonyError
from .jsonio import read_json
from .published import load
from .stats import ABSENT, HOLDS, NOT_RUN, TOO_FEW, verdict

PLUS, CONTRASTIVE = "DiffHarmony++", "Region-wise contrastive"
ALL = {"all": "Average"}
AGAINST = "diffharmony++ vs contrastive-resunet"
BUCKETS = {"0-5%": 3835 / 7404, "5-15%": 1951 / 7404, "15-100%": 1618 / 7404}  # the weights of Table 3's N_samples


@dataclass(frozen=True)
class Claim:
    """One claim and where its measured effect lies: `path` inside reports/metrics/<file>.json, ending at the dict that
    holds `metric` as [mean, lo, hi] with "n" and "photos". sign turns effects so that positive supports the claim; with
    a margin the claim is that the effect stays within it. published: (table, {(row, subset): weight}), a sum of PSNRs.
    """

    text: str
    paper: str
    place: str
    file: str
    path: tuple
    metric: str = "psnr"
    sign: int = 1
    margin: float | None = None
    published: tuple | str = ""


def _versus(text, paper, table, a, b, subset="all", place=None, **more):
    """A claim about two rows of one published table."""
    cells = (table, {(a, subset): 1, (b, subset): -1})
    path = ("paired", f"{a} vs {b}", subset)
    return Claim(text, paper, place or f"Table {table}", f"table_{table}", path, published=cells, **more)


LOW, HIGH, WITH = "512px", "1024px", " + Harmony-VAE"
CLAIMS = (
    Claim("DiffHarmony++ comes closer to the real image than the composite does", PLUS, "Table 1", "evaluation",
          ("paired", "diffharmony++ vs composite", "all")),
    Claim("Harmony-VAE improves on the plain autoencoder", PLUS, "Table 4", "evaluation",
          ("paired", "diffharmony++ vs diffharmony", "all"), published=("4", {(LOW + WITH, "all"): 1, (LOW, "all"): -1})),
    Claim("Harmony-VAE helps more at low resolution than at high", PLUS, "Table 4", "table_4",
          ("paired", "Harmony-VAE gain, low vs high resolution", "all"),
          published=("4", {(LOW + WITH, "all"): 1, (LOW, "all"): -1, (HIGH + WITH, "all"): -1, (HIGH, "all"): 1})),
    Claim("Refinement adds little once there is Harmony-VAE (under 0.2 dB)", PLUS, "Table 4", "table_4",
          ("paired", "refinement on Harmony-VAE", "all"), margin=0.2,
          published=("4", {(HIGH + WITH + " + refinement", "all"): 1, (HIGH + WITH, "all"): -1})),
    _versus("Zero initialisation is needed", PLUS, "5", "Ec + D, zero init", "Ec + D, random init"),
    _versus("Training the decoder too adds to training the conditional encoder", PLUS, "5", "Ec + D, zero init", "Ec, zero init"),
    *(_versus(f"Augmentation helps small sets: {s}", PLUS, "2", "augmented", "base", s) for s in ("HFlickr", "Hday2night")),
    Claim("Human Harmony foregrounds are large (share above 20 % of the image, minus the benchmark's share)", PLUS,
          "Figure 2", "evaluation", ("above_a_fifth",), "difference", published="about 70 % against under 15 %"),
    *(Claim(f"Diffusion wins on large foregrounds (15-100 %): {label}; comparator here: contrastive ResUNet", PLUS, "Table 3",
            "evaluation", ("paired_large", key),
            published=("3", {("DiffHarmony++", f"{label} 15-100%"): 1, ("HDNet512", f"{label} 15-100%"): -1}))
      for label, key in (("iHarmony4", "benchmark"), ("Human Harmony", "human_harmony"))),
    Claim("By Table 3's own buckets the peer (HDNet) leads overall; comparator here: contrastive ResUNet", PLUS,
          "Table 3, recomputed", "evaluation", ("paired", AGAINST, "all"), sign=-1,
          published=("3", {(row, f"iHarmony4 {b}"): sign * w for row, sign in (("HDNet512", 1), ("DiffHarmony++", -1))
                           for b, w in BUCKETS.items()})),
    Claim("The contrastive ResUNet comes closer to the real image than the composite does", CONTRASTIVE, "Table II",
          "evaluation", ("paired", "contrastive-resunet vs composite", "all"),
          published=("II", {("Ours", "all"): 1, ("input composite", "all"): -1})),
    _versus("The foreground loss helps", CONTRASTIVE, "VI", "2: L1 + Lpixel", "1: L1"),
    _versus("Style fusion helps", CONTRASTIVE, "VI", "3: L1 + Lpixel + style fusion", "2: L1 + Lpixel"),
    _versus("The contrastive loss helps", CONTRASTIVE, "VI", "4: L1 + Lpixel + style fusion + LHCL", "3: L1 + Lpixel + style fusion"),
    *(Claim(f"Style fusion beats {name}", CONTRASTIVE, "Figures 8 and 9", "table_style",
            ("paired", f"style-fusion vs {name.lower()}", "all"), published="curves only") for name in ("AdaIN", "RAIN")),
    *(_versus(f"K = 256 patches are better than {k}", CONTRASTIVE, "VII", "K = 256", f"K = {k}") for k in (128, 512, 1024)),
    Claim("Quality is stable across resolutions (within 0.5 dB)", CONTRASTIVE, "Table IV", "table_IV",
          ("paired", "high vs low resolution", "all"), margin=0.5,
          published=("IV", {("Ours", "HAdobe5k 1024px"): 1, ("Ours", "HAdobe5k 256px"): -1})),
    Claim("People prefer the contrastive network on real composites", CONTRASTIVE, "Table V", "votes",
          ("paired", "contrastive-resunet vs composite", "all"), "preference_percent",
          published=("V", {("Ours", "DIH99"): 1, ("Copy-paste", "DIH99"): -1})),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A published table: its title, our metrics file, and which of source, row, subset, metric (or part, detail: a split
    of the row or the subset) go down and which across."""

    number: str
    title: str
    file: str
    down: tuple
    across: tuple
    split: tuple | None = None  # (column, separator)


TABLES = (
    (PLUS, "diffharmony_plus_plus", (
        Table("1", "Four sub-datasets of iHarmony4", "evaluation", ("subset", "metric"), ("source", "row")),
        Table("2", "Data augmentation on two small subsets", "table_2", ("subset", "metric"), ("source", "row")),
        Table("3", "By foreground ratio", "evaluation", ("source", "part", "row", "metric"), ("detail",), ("subset", " ")),
        Table("4", "Harmony-VAE and refinement at several resolutions", "table_4", ("source", "row"), ("metric",)),
        Table("5", "Initialisation and trained parts", "table_5", ("source", "part", "metric"), ("detail",), ("row", ", ")),
    )),
    (CONTRASTIVE, "region_wise_contrastive", (
        Table("I", "Composites per sub-dataset", "evaluation", ("source", "row"), ("subset",)),
        Table("II", "MSE, PSNR and parameters", "evaluation", ("source", "row"), ("subset", "metric")),
        Table("III", "Foreground errors", "evaluation", ("source", "row"), ("subset", "metric")),
        Table("IV", "Resolutions (PSNR)", "table_IV", ("source", "subset"), ("row",)),
        Table("V", "User study", "votes", ("source", "metric"), ("row",)),
        Table("VI", "Loss terms and style fusion", "table_VI", ("source", "row"), ("metric",)),
        Table("VII", "Number of patches", "table_VII", ("source", "row"), ("metric",)),
    )),
)  # fmt: skip
SCALED = {"fssim_x100": ("fssim", 100), "ssim_x100": ("ssim", 100)}
HEADLINE = {"psnr": "PSNR, dB ↑", "mse": "MSE ↓", "fmse": "fMSE ↓", "ssim": "SSIM ↑", "fssim": "fSSIM ↑"}

FIGURES = (  # (paper's figure, what ours shows, patterns under reports/figures)
    (PLUS, "2", "How large foregrounds are, per data set", ("human_harmony/*cumulative*", "human_harmony/*ratio*")),
    (PLUS, "3", "What Harmony-VAE repairs in decoding", ("harmony_vae-harmonize/reconstruction.png",)),
    (PLUS, "3", "Methods side by side on test images", ("evaluation/qualitative.png",)),
    (PLUS, "4", "Methods side by side on the Human Harmony test list", ("evaluation/human_harmony.png",)),
    (CONTRASTIVE, "3", "Layout of the preference study", ("votes/*.png",)),
    (CONTRASTIVE, "4", "Every method beside the real photo", ("evaluation/qualitative.png",)),
    (CONTRASTIVE, "5 and 6", "Real composites (DIH99, RealHM)", ("real_composites/*.png",)),
    (CONTRASTIVE, "7", "What each part of the method changes", ("table_VI/*.png", "ablations/table_VI*.png")),
    (CONTRASTIVE, "8 and 9", "Style modules over training", ("table_style/*.png", "ablations/table_style*.png")),
    (CONTRASTIVE, "10", "Background features of encoder and decoder", ("resunet/*feature*.png",)),
    ("Evaluation", "–", "Differences image by image, with intervals", ("evaluation/paired.png",)),
    ("Evaluation", "–", "The same prediction, raw and with the background pasted", ("evaluation/paste.png",)),
    ("Evaluation", "–", "Worst and median images of each model", ("evaluation/failures-*.png",)),
)
KEY_FIGURES = ("evaluation/qualitative.png", "evaluation/bars_psnr.png")

STYLE = """
:root{--ink:#1f2430;--soft:#5c6370;--line:#dfe3ea;--paper:#fff;--tint:#f5f7fa;--accent:#0b6e99;--own:#e8f4ec}
*{box-sizing:border-box}body{margin:0;color:var(--ink);background:var(--paper);font:17px/1.6 system-ui,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}header,main,footer{max-width:72rem;margin:auto;padding:0 1.25rem}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:1rem 0;border-bottom:1px solid var(--line)}
nav a[aria-current]{color:var(--ink);font-weight:600;text-decoration:none}a{color:var(--accent)}
h1{font-size:1.9rem;line-height:1.2;margin:1.6rem 0 .6rem}h2{font-size:1.35rem;margin:2.2rem 0 .5rem}h3{margin:1.6rem 0 .4rem}
p,li{max-width:46rem}.soft,caption,small,footer{color:var(--soft)}footer{margin-top:3rem;padding-bottom:2rem;font-size:.85rem}
.scroll,.output_html,.output_area{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.88rem;
font-variant-numeric:tabular-nums;margin:.5rem 0}th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);
text-align:right;vertical-align:top}th{background:var(--tint);font-weight:600}tbody th,td.text{text-align:left}
thead th{text-align:center}th.own,td.own{background:var(--own)}td small{display:block;white-space:nowrap;font-size:.78rem}
td.text{min-width:9rem}.badge{white-space:nowrap;border-radius:1rem;padding:.1rem .6rem;background:var(--tint);font-weight:600}
.holds{background:#d7efdd}.absent{background:#fbe3cf}img,svg{max-width:100%;height:auto}figure{margin:1.5rem 0}
figcaption{color:var(--soft);font-size:.9rem}pre{overflow-x:auto;background:var(--tint);padding:.7rem .9rem;border-radius:.4rem;
font-size:.82rem;line-height:1.45}.output_area pre{background:none;padding:.3rem .9rem;margin:.3rem 0}.prompt,.anchor-link{
display:none}.note{background:var(--tint);border-left:4px solid var(--accent);padding:.6rem 1rem;max-width:46rem}
@media(max-width:40rem){body{font-size:16px}h1{font-size:1.5rem}header,main,footer{padding:0 .9rem}th,td{padding:.25rem .4rem}}
"""


def measure_claim(claim: Claim, metrics: dict, published: pd.DataFrame) -> dict:
    """A claim with its effect (oriented so that positive supports it), interval, n, photos, source and verdict."""
    file = metrics.get(claim.file)
    found = file
    for key in claim.path:
        found = found.get(key) if isinstance(found, dict) else None
    found = found or {}
    effect, lo, hi = found.get(claim.metric) or (None, None, None)
    if effect is not None:
        low, high = sorted((claim.sign * lo, claim.sign * hi)) if None not in (lo, hi) else (None, None)
        effect = claim.sign * effect
        judged = (effect, low, high)
        if claim.margin is not None:
            ends = (claim.margin - max(abs(low), abs(high)), claim.margin) if low is not None else (None, None)
            judged = (claim.margin - abs(effect), *ends)
    else:
        low = high = None
        judged = (None, None, None)
    photos = found.get("photos")
    return {
        "claim": claim.text, "paper": claim.paper, "place": claim.place, "metric": claim.metric,
        "published": _published_effect(claim, published), "effect": effect, "interval": [low, high],
        "n": found.get("n"), "photos": photos, "profile": file.get("profile") if file else None,
        "verdict": verdict(*judged, photos or 0), "status": found.get("status"),
        "source": f"{claim.file}.json" + ("" if effect is None else ": " + " / ".join((*claim.path, claim.metric))),
    }  # fmt: skip


def _published_effect(claim: Claim, published: pd.DataFrame) -> str:
    if not claim.published or isinstance(claim.published, str):
        return claim.published
    table, weights = claim.published
    metric = "preference_percent" if claim.metric == "preference_percent" else "psnr"
    rows = published[(published["table"] == table) & (published["metric"] == metric)]
    values = rows.set_index(["row", "subset"])["value"]
    unit = " points" if metric != "psnr" else " dB"
    return f"{sum(weight * values[cell] for cell, weight in weights.items()):+.2f}{unit}"


def _rows_of(models: dict, wanted, subset=lambda name: name) -> list[dict]:
    """Long rows (row, subset, metric, text) of `summarise`'s form, for the metrics of a published table."""
    rows = []
    for (model, parts), metric in itertools.product(models.items(), wanted):
        key, factor = SCALED.get(metric, (metric, 1))
        for name, part in parts.items():
            value, (lo, hi) = part.get(key), part.get("interval", {}).get(key, (None, None))
            if value is None:
                text = "–" + _small(part.get("status"))
            elif metric == "n":
                text = f"{value:,}"
            else:
                text = f"{factor * value:.2f}" + ("" if lo is None else f"<small>{factor * lo:.2f}–{factor * hi:.2f}</small>")
            rows.append({"row": model, "subset": subset(name), "metric": metric, "text": text})
    return rows


def _small(text) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


def _own(table: Table, data: dict, wanted: list[str]) -> list[dict]:
    """Our long rows for one published table."""
    models = data.get("models", {})
    if table.number == "I":
        names = {"train": "Training", "test": "Testing"}
        counts = {split: subsets | {"all": sum(subsets.values())} for split, subsets in data.get("counts", {}).items()}
        models = {names[split]: {s: {"n": n} for s, n in subsets.items()} for split, subsets in counts.items()}
    elif table.number == "3":
        sets = (("benchmark", "iHarmony4"), ("human_harmony", "Human Harmony"))
        rows = []
        for key, label in sets:
            found = {m: parts for m, parts in data.get("buckets", {}).get(key, {}).items() if m in data["models"]}
            kept = {m: {b: p for b, p in found[m].items() if b != "all"} for m in found if m in AGAINST.split(" vs ")}
            first = dict(list(kept.items())[:1])
            rows += _rows_of({"N_samples": parts for parts in first.values()}, ["n"], lambda b, label=label: f"{label} {b}")
            rows += _rows_of(kept, [m for m in wanted if m != "n"], lambda b, label=label: f"{label} {b}")
        return rows
    elif table.number in ("1", "II", "III"):
        shown = ("composite", *(("diffharmony", "diffharmony++") if table.number == "1" else ()), "contrastive-resunet")
        models = {name: models[name] for name in shown if name in models}
        rows = _rows_of(models, [m for m in wanted if m != "params_millions"])
        for name in models.keys() & data.get("cost", {}).keys() if "params_millions" in wanted else ():
            size = data["cost"][name]["parameters"] / 1e6
            rows.append({"row": name, "subset": "all", "metric": "params_millions", "text": f"{size:.2f}"})
        return rows
    return _rows_of(models, wanted)


def table_html(table: Table, printed: pd.DataFrame, data: dict | None) -> str:
    """One published table as an HTML section with our cells, if there are any, beside it."""
    wanted = list(dict.fromkeys(printed["metric"]))
    rows = [r | {"source": "published", "text": f"{r['value']:g}" if r["value"] == r["value"] else "NaN"}
            for r in printed[["row", "subset", "metric", "value"]].to_dict("records")]  # fmt: skip
    source = f"ours, {data.get('profile')}" if data else ""
    rows += [r | {"source": source} for r in _own(table, data, wanted)] if data else []
    for row in rows:
        if table.split:
            column, separator = table.split
            row["part"], _, row["detail"] = row[column].rpartition(separator)
        row["subset"] = ALL.get(row["subset"], row["subset"])
        row["metric"] = row["metric"].replace("_x100", " ×100").replace("_", " ")
    cells = {(tuple(r[k] for k in table.down), tuple(r[k] for k in table.across)): r for r in rows}
    about = "Ours: not run" + (" (<code>make ablations</code>)" if table.file.startswith("table_") else "") + "."
    if data:
        about = f"Ours: profile {_text(data.get('profile'))}, <strong>{_text(data.get('data', 'see the file'))}</strong>; "
        about += f"{_count(data)}; small: 95 % interval over photos. Source: {_source(table.file)}."
        if "fssim ×100" in {r["metric"] for r in rows} and table.number == "III":
            about += " Printed fSSIM follows IIH's definition, ours the standard one: not comparable."
    notes = list(dict.fromkeys(note for note in printed["note"] if note))
    remarks = "".join(f"<li>{_text(note)}</li>" for note in notes)
    remarks = f"<details><summary>Remarks on the printed numbers ({len(notes)})</summary><ul>{remarks}</ul></details>"
    title = f"Table {table.number}: {table.title}"
    return (f'<section id="table-{table.number}"><h3>{_text(title)}</h3><p class="soft">{about}</p>'
            f"{_scroll(_grid(cells, len(table.down)), title)}{remarks if notes else ''}</section>")  # fmt: skip


def _count(data: dict) -> str:
    n, photos = data.get("n"), data.get("photos")
    return f"n = {n} composites of {photos} photos" if n and photos else "n in the file"


def _grid(cells: dict, depth: int) -> str:
    """An HTML table of {(row labels, column labels): row}; equal neighbouring labels share a header cell."""

    def ordered(position):
        labels = list(dict.fromkeys(key[position] for key in cells))  # by first appearance on every level
        ranks = [{v: i for i, v in enumerate(dict.fromkeys(x[k] for x in labels))} for k in range(len(labels[0]))]
        return sorted(labels, key=lambda label: [rank[v] for rank, v in zip(ranks, label, strict=True)])

    down, across = ordered(0), ordered(1)
    own = lambda labels: ' class="own"' if any(str(v).startswith("ours, ") for v in labels) else ""  # noqa: E731
    head = ""
    for level in range(len(across[0])):
        head += "<tr>" + (f'<td colspan="{depth}" rowspan="{len(across[0])}"></td>' if level == 0 else "")
        for prefix, group in itertools.groupby(across, key=lambda labels: labels[: level + 1]):
            head += f'<th scope="col" colspan="{len(list(group))}"{own(prefix)}>{_text(prefix[-1])}</th>'
        head += "</tr>"
    body, opened = "", ()
    for labels in down:
        body += "<tr>"
        for level in range(depth):
            if opened[: level + 1] != labels[: level + 1]:
                span = sum(other[: level + 1] == labels[: level + 1] for other in down)
                body += f'<th scope="row" rowspan="{span}"{own(labels)}>{_text(labels[level])}</th>'
        opened = labels
        for column in across:
            row = cells.get((labels, column))
            body += f"<td{own((*labels, *column))}>{row['text'] if row else '–'}</td>"
        body += "</tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _text(value) -> str:
    return html.escape(str(value))


def _scroll(table: str, label: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(label)}">{table}</div>'


def _source(file: str) -> str:
    return f'<a href="metrics.html#{file}">{file}.json</a>'


def _claims_html(claims: list[dict]) -> str:
    styles = {HOLDS: "holds", ABSENT: "absent"}
    head = "".join(f'<th scope="col">{name}</th>' for name in
                   ("Claim", "Where", "Paper", "Here", "95 % interval", "n", "Verdict", "Source"))  # fmt: skip
    body = ""
    for c in claims:
        unit = {"psnr": " dB", "preference_percent": " points"}.get(c["metric"], "")
        here = "–" if c["effect"] is None else f"{c['effect']:+.2f}{unit}"
        lo, hi = c["interval"]
        interval = "–" if lo is None else f"{lo:+.2f} to {hi:+.2f}"
        n = "–" if c["n"] is None else f"{c['n']} of {c['photos']} photos"
        file = c["source"].split(".json")[0]
        source = "–" if c["profile"] is None else _source(file) + _small(f"profile {c['profile']}")
        verdict_cell = f'<span class="badge {styles.get(c["verdict"], "")}">{c["verdict"]}</span>{_small(c["status"])}'
        cells = (_text(c["published"] or "–"), here, interval, n)
        body += f'<tr><th scope="row">{_text(c["claim"])}</th><td class="text">{_text(c["place"])}</td>'
        body += "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="text">{verdict_cell}</td>'
        body += f'<td class="text">{source}</td></tr>'
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", "Claims of the papers")
