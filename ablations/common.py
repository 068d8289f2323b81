"""What the ablation tables share: variants x seeds -> per-image scores -> rows and paired differences with intervals.

A variant is a row's name, as published, and a function seed -> table of per-image scores as `methods.evaluate` returns
it (columns subset, name, photo and metrics; others are ignored): it trains and scores one run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from harmonylib import trainers
from harmonylib.core.errors import HarmonyError
from harmonylib.data.batches import TripleSet
from harmonylib.evaluation.metrics import METRICS, summarise
from harmonylib.evaluation.published import load
from harmonylib.evaluation.statistics import paired_difference, verdict
from harmonylib.training import TrainingDiverged, TrainSettings

PAPERS = {"start": None, "head": "residual", "encoder": None, "error": "l1", "weights": (0.4, 0.5, 0.1), "jitter": 0.0}
HIGHER_IS_BETTER = ("psnr", "ssim", "fssim")
IMAGE = ["subset", "name", "photo"]


@dataclass(frozen=True)
class Ablation:
    """The runs of one table: per-image scores by (variant, seed), and for each run that diverged the reason."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[tuple[str, int], pd.DataFrame]
    failures: dict[tuple[str, int], str]

    def __str__(self) -> str:
        """How many runs finished, and why the others did not."""
        lost = "".join(f"\n{name}, seed {seed}: {reason}" for (name, seed), reason in self.failures.items())
        return f"{len(self.runs)} of {len(self.variants) * len(self.seeds)} runs finished{lost}"

    def finished(self, *variants: str) -> list[int]:
        """The seeds with which all of these variants finished."""
        return [seed for seed in self.seeds if all((name, seed) in self.runs for name in variants)]

    def scores(self, variant: str, seeds: Iterable[int]) -> pd.DataFrame:
        """One row an image: its mean over the variant's runs with these seeds."""
        table = pd.concat([self.runs[variant, seed] for seed in seeds])
        return table.groupby(IMAGE, sort=False)[[m for m in METRICS if m in table]].mean().reset_index()

    def rows(self, metrics: Iterable[str], subsets=("all",)) -> dict:
        """{variant: row}, each row a mean over images of their means over seeds.

        row = {metric: mean, "interval": {metric: [lo, hi] over photos}, "n", "photos", "status", "runs": each run's
        means}; with subsets other than ("all",) the summaries lie one deeper, under the subset's name. What no run
        measured is None. Raises HarmonyError when the variants cover different images.
        """
        names, metrics = [name for name in self.variants if self.finished(name)], list(metrics)
        scores = [self.scores(name, self.finished(name)).assign(model=name) for name in names]
        means = summarise(pd.concat(scores)) if scores else {}
        rows = {}
        for name in self.variants:
            parts = {subset: _part(means.get(name, {}).get(subset), metrics) for subset in subsets}
            runs = []
            for seed in self.seeds:
                done = self.runs.get((name, seed))
                run = dict.fromkeys(metrics) if done is None else done[metrics].mean().to_dict()
                runs.append({"seed": seed, **run, "status": self.failures.get((name, seed), "ok")})
            rows[name] = parts["all"] if tuple(subsets) == ("all",) else parts
            status = [f"{len(self.finished(name))} of {len(self.seeds)} seeds finished", rows[name].get("status")]
            rows[name] |= {"status": "; ".join(filter(None, status)), "runs": runs}
        return rows

    def difference(self, after: str, before: str, metric: str, subset="all", terms: dict | None = None) -> dict:
        """By how much `after` is better than `before` on the same images and seeds, interval over photos.

        Positive is better, for errors (MSE) too; None where no seed has both. terms: {variant: weight} for another
        effect than after - before, such as the difference of two gains; `after` and `before` then only name it.
        """
        terms = terms or {after: 1, before: -1}
        seeds, sign = self.finished(*terms), 1 if metric in HIGHER_IS_BETTER else -1
        effect, photos = (None, None, None), 0
        if seeds:
            columns = {name: self.scores(name, seeds).set_index(IMAGE)[metric] for name in terms}
            value = sum(sign * weight * columns[name] for name, weight in terms.items())
            value = value if subset == "all" else value.xs(subset, level="subset", drop_level=False)
            labels = value.index.get_level_values("photo")
            effect, photos = paired_difference(value, np.zeros(len(value)), labels), labels.nunique()
        return {
            "before": before, "after": after, "metric": metric, "subset": subset, "improvement": effect[0],
            "interval": effect[1:], "verdict": verdict(*effect, photos), "photos": photos,
            "status": f"{len(seeds)} of {len(self.seeds)} seeds",
        }  # fmt: skip


def _part(summary: dict | None, metrics: list[str]) -> dict:
    if summary is None:
        return dict.fromkeys(metrics) | {"interval": dict.fromkeys(metrics)}
    part = {key: summary[key] for key in (*metrics, "n", "photos", "status") if key in summary}
    return part | {"interval": {metric: summary["interval"][metric] for metric in metrics}}


def run_variants(variants: dict[str, Callable[[int], pd.DataFrame]], seeds: Iterable[int]) -> Ablation:
    """Run every variant with every seed. A run that diverges is recorded, and the others go on.

    Raises HarmonyError when there is nothing to run; other errors of a run pass through.
    """
    seeds = tuple(seeds)
    if not variants or not seeds:
        raise HarmonyError("the ablation has nothing to run; give it a variant and set ablations.seeds above 0")
    runs, failures = {}, {}
    for seed in seeds:
        for name, run in variants.items():
            try:
                runs[name, seed] = run(seed)
            except TrainingDiverged as error:
                failures[name, seed] = str(error)
    return Ablation(tuple(variants), seeds, runs, failures)


def train_resunet(run, data: TripleSet, seed: int, observe=None, **changes):
    """(model, history) of the paper's ResUNet, trained from nothing for the ablations' steps, some settings changed.

    run: the settings of params.yaml; changes: options of `trainers.contrastive_resunet`. The rest are those of
    run.resunet, but for its head, encoder and losses, which are the paper's.
    """
    settings = replace(TrainSettings.of(run, "resunet"), steps=run.ablations.resunet_steps)
    known = trainers.contrastive_resunet.__kwdefaults__
    options = {name: value for name, value in vars(run.resunet).items() if name in known}
    options |= PAPERS | changes
    return trainers.contrastive_resunet(
        data, settings, seed=seed, device=run.device, observe=observe, checkpoints="artifacts/checkpoints", **options
    )


def printed(table: str) -> dict:
    """{(row, subset, metric): value} of a published table, in our units (SSIM and fSSIM are printed times 100)."""
    cells = load().query("table == @table")
    keys = zip(cells["row"], cells["subset"], cells["metric"].str.removesuffix("_x100"), strict=True)
    return dict(zip(keys, cells["value"] / np.where(cells["metric"].str.endswith("_x100"), 100, 1), strict=True))


def report(table: str, ablation: Ablation, metrics, pairs, subsets=("all",), **about) -> dict:
    """What a table's notebook writes to reports/metrics/table_<table>.json, in the form that `claims` reads.

    pairs: (after, before) or (after, before, terms), as `Ablation.difference` takes them, tested on every metric and
    subset. Rows and differences carry "published" where the paper has the values. about: more top-level keys.
    """
    rows, cells, differences = ablation.rows(metrics, subsets), printed(table), []
    for name, row in rows.items():
        for subset in subsets:
            part = row if tuple(subsets) == ("all",) else row[subset]
            part["published"] = {m: cells[name, subset, m] for m in metrics if (name, subset, m) in cells}
    for after, before, *terms in pairs:
        weights = terms[0] if terms else {after: 1, before: -1}
        for subset in subsets:
            for metric in metrics:
                found = ablation.difference(after, before, metric, subset, weights)
                claim = [w * cells.get((name, subset, metric), np.nan) for name, w in weights.items()]
                found["published"] = sum(claim) * (1 if metric in HIGHER_IS_BETTER else -1)
                differences.append(found)
    images = next(iter(ablation.runs.values()), pd.DataFrame(columns=IMAGE))
    counts = {"seeds": len(ablation.seeds), "n": len(images), "photos": int(images["photo"].nunique())}
    return {"table": table, "protocol": "standard, composite background pasted", **about, **counts,
            "rows": rows, "differences": differences}  # fmt: skip


def _flat(rows: dict) -> dict:
    """{label: summary} of a report's rows, with or without subsets."""
    flat = {}
    for name, row in rows.items():
        parts = {f"{name}, {k}": v for k, v in row.items() if isinstance(v, dict) and "interval" in v}
        flat |= parts or {name: row}
    return flat


def side_by_side(data: dict, metrics) -> pd.DataFrame:
    """A report's rows as a table: ours, with the composite left alone, and the published values if there are any."""
    rows = _flat(data["rows"])
    ours = pd.DataFrame({name: {m: row[m] for m in metrics} for name, row in rows.items()}, dtype=float).T
    if "composite" in data:
        ours.loc["composite left alone"] = data["composite"]
    theirs = pd.DataFrame({name: row["published"] for name, row in rows.items()}, index=metrics, dtype=float).T
    return pd.concat({"ours": ours, "published": theirs}, axis=1).dropna(axis=1, how="all")


def gains(data: dict, metric: str = "psnr") -> pd.DataFrame:
    """A report's differences in one metric as a table, one row a pair: ours with its interval, published, verdict."""
    found = [d for d in data["differences"] if d["metric"] == metric]
    numbers = ["improvement", "low", "high", "published"]
    table = pd.DataFrame(found, columns=["after", "before", "subset", *numbers, "verdict"])
    table[["low", "high"]] = [d["interval"] for d in found]
    return table.astype(dict.fromkeys(numbers, float))


def plot(data: dict, metric: str = "psnr", label: str = "PSNR, dB"):
    """Rows and differences of one metric with their intervals; single runs as dots, published gains as diamonds."""
    rows, gains = _flat(data["rows"]), [d for d in data["differences"] if d["metric"] == metric]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * max(len(rows), len(gains)) + 1.4))
    for place, row in enumerate(rows.values()):
        for run in row.get("runs", ()):
            left.plot(np.nan if run[metric] is None else run[metric], place, "o", color="grey", markersize=4)
        _bar(left, place, row[metric], row["interval"][metric])
    for place, gain in enumerate(gains):
        _bar(right, place, gain["improvement"], gain["interval"])
        right.plot(gain["published"], place, "D", color="C1")
    if "composite" in data:
        left.axvline(data["composite"][metric], color="black", linestyle=":")
    right.axvline(0, color="black", linewidth=1)
    names = [f"{g['after']}\nover {g['before']}" + (f", {g['subset']}" if g["subset"] != "all" else "") for g in gains]
    for axis, ticks, text in ((left, list(rows), label), (right, names, f"gain in {label} (◆ published)")):
        axis.set(yticks=range(len(ticks)), yticklabels=ticks, ylim=(len(ticks) - 0.5, -0.5), xlabel=text)
        axis.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


def _bar(axis, place, value, interval):
    if value is not None:
        axis.plot([x if x is not None else np.nan for x in interval], [place, place], color="C0", linewidth=2)
        axis.plot(value, place, "s", color="C0")
