"""What the ablation tables share: variants x seeds -> per-image scores -> rows and paired differences with intervals.

A variant is a row's name, as published, and a function seed -> table of per-image scores as `methods.evaluate` returns
it (columns subset, name, photo and metrics; others are ignored): it trains and scores one run.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from harmonylib.core.checkpoints import RESUME_POINTS
from harmonylib.core.devices import pick_device
from harmonylib.core.distributed import SHARE, share_of
from harmonylib.core.errors import HarmonyError
from harmonylib.core.json_files import read_json
from harmonylib.data.batches import TripleSet
from harmonylib.evaluation.figures import intervals
from harmonylib.evaluation.metrics import METRICS, summarise
from harmonylib.evaluation.published import PROTOCOLS, load, protocols
from harmonylib.evaluation.statistics import bootstrap_mean, verdict
from harmonylib.models.contrastive import resunet_batches, resunet_loss
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.models.start import initial_resunet
from harmonylib.training import TrainingDiverged, TrainSettings, train

MAIN_MODEL = Path("artifacts/contrastive_resunet")
PAPERS = {"head": "residual", "encoder": None, "error": "l1", "weights": (0.4, 0.5, 0.1), "jitter": 0.0}
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

    def under(self, protocol: str) -> "Ablation":
        """The same runs, as this protocol scored them."""
        return replace(self, runs={key: run[run["protocol"] == protocol] for key, run in self.runs.items()})

    def scores(self, variant: str, seeds: Iterable[int]) -> pd.DataFrame:
        """One row an image: its mean over the variant's runs with these seeds."""
        table = pd.concat([self.runs[variant, seed] for seed in seeds])
        return table.groupby(IMAGE, sort=False)[[m for m in METRICS if m in table]].mean().reset_index()

    def rows(self, metrics: Iterable[str], subsets=("all",)) -> dict:
        """{variant: row}, of the images' means over seeds; None for what no run measured.

        row = {metric: mean, "interval": {metric: [lo, hi] over photos}, "n", "photos", "status", "scored_at": pixels,
        "runs": each run's means}; with subsets other than ("all",) the summaries lie one deeper, under their names.
        """
        done = {name: seeds for name in self.variants if (seeds := self.finished(name))}
        scores = [self.scores(name, seeds).assign(model=name) for name, seeds in done.items()]
        metrics, rows = list(metrics), {}
        means = summarise(pd.concat(scores)[[*IMAGE, "model", *metrics]]) if scores else {}
        for name in self.variants:
            nothing = dict.fromkeys(metrics) | {"interval": dict.fromkeys(metrics)}
            parts = {subset: means.get(name, {}).get(subset, nothing) for subset in subsets}
            row = parts["all"] if tuple(subsets) == ("all",) else parts
            status = f"{len(done.get(name, ()))} of {len(self.seeds)} seeds finished"
            sizes = [int(self.runs[name, seed]["scored_at"].iloc[0]) for seed in done.get(name, ())]
            rows[name] = row | {"status": "; ".join(filter(None, (status, row.get("status"))))}
            rows[name] |= {"scored_at": sizes[0] if sizes else None, "runs": []}
            for seed in self.seeds:
                table = self.runs.get((name, seed))
                run = dict.fromkeys(metrics) if table is None else table[metrics].mean().to_dict()
                rows[name]["runs"].append({"seed": seed, **run, "status": self.failures.get((name, seed), "ok")})
        return rows

    def difference(self, after: str, before: str, metric: str, subset="all", terms: dict | None = None) -> dict:
        """By how much `after` is better than `before` (positive, for errors too) on the same images and seeds.

        None where no seed has both; the interval is over photos. terms: {variant: weight} for another effect than
        after - before, such as the difference of two gains; `after` and `before` then only name it.
        """
        terms = terms or {after: 1, before: -1}
        seeds, sign = self.finished(*terms), 1 if metric in HIGHER_IS_BETTER else -1
        effect, photos = (None, None, None), 0
        if seeds:
            value = sum(sign * w * self.scores(name, seeds).set_index(IMAGE)[metric] for name, w in terms.items())
            value = value if subset == "all" else value.xs(subset, level="subset", drop_level=False)
            labels = value.index.get_level_values("photo")
            effect, photos = bootstrap_mean(value, labels), labels.nunique()
        return {
            "before": before, "after": after, "metric": metric, "subset": subset, "improvement": effect[0],
            "interval": effect[1:], "verdict": verdict(*effect, photos), "photos": photos,
            "status": f"{len(seeds)} of {len(self.seeds)} seeds",
        }  # fmt: skip


def run_variants(variants: dict[str, Callable[[int], pd.DataFrame]], seeds: Iterable[int]) -> Ablation:
    """Run every variant with every seed. A run that diverges is recorded, and the others go on.

    Raises HarmonyError when there is nothing to run.
    """
    seeds = tuple(seeds)
    if not variants or not seeds:
        raise HarmonyError("the ablation has nothing to run; give it a variant and set ablations.seeds above 0")
    runs, failures = {}, {}
    for name, seed in share_of([(name, seed) for seed in seeds for name in variants]):
        try:
            runs[name, seed] = variants[name](seed)
        except TrainingDiverged as error:
            failures[name, seed] = str(error)
        except HarmonyError:
            if SHARE not in os.environ:
                raise  # else another process trains the same network, or this notebook's own run will say what is wrong
    return Ablation(tuple(variants), seeds, runs, failures)


def changed(section, **changes) -> SimpleNamespace:
    """A copy of a section of the settings with other values."""
    return SimpleNamespace(**vars(section) | changes)


def is_main_model(run, section, seed: int) -> bool:
    """Whether notebook 8 has trained just this: section's settings, from nothing, with this seed, as long."""
    own = {"steps": run.ablations.resunet_steps, "start": None, "weights": list(section.weights)}
    return seed == run.seed and vars(section) | own == vars(run.resunet)


def train_resunet(run, data: TripleSet, seed: int, observe=None, **changes):
    """(model, history) of the paper's ResUNet, trained from nothing for the ablations' steps, some settings changed.

    run: the settings of params.yaml; changes: of its section `resunet`, whose head, encoder and losses are the paper's.
    Where that is the model of notebook 8, as under `paper`, it is read and not trained again, unless to `observe` it.
    """
    section = changed(run.resunet, size=data.size, **PAPERS | changes)
    if is_main_model(run, section, seed) and observe is None:
        model = ContrastiveResUNet.from_pretrained(MAIN_MODEL).eval().to(pick_device(run.device))
        return model, read_json(MAIN_MODEL / "training.json")
    model = initial_resunet(section, None, seed)
    loss = resunet_loss(section)
    settings = replace(TrainSettings.of(run, "resunet"), steps=run.ablations.resunet_steps)
    options = {"seed": seed, "device": run.device, "observe": observe, "checkpoints": RESUME_POINTS}
    history = train(model, loss, resunet_batches(data, section, seed), settings, name="contrastive resunet", **options)
    return model, history


def printed(table: str) -> dict:
    """{(row, subset, metric): value} of a published table, in our units (SSIM and fSSIM are printed times 100)."""
    cells = load().query("table == @table")
    keys = zip(cells["row"], cells["subset"], cells["metric"].str.removesuffix("_x100"), strict=True)
    return dict(zip(keys, cells["value"] / np.where(cells["metric"].str.endswith("_x100"), 100, 1), strict=True))


def report(table: str, ablation: Ablation, metrics, pairs, subsets=("all",), composite=None, **about) -> dict:
    """What a table's notebook writes to reports/metrics/table_<table>.json, in the form that the report reads.

    pairs: (after, before) or (after, before, terms), as `Ablation.difference` takes them, tested on every metric and
    subset. Rows and differences carry "published" where the paper has the values. composite: `methods.evaluate` of the
    composites left alone. about: more top-level keys. The runs, and the composite, are scored under
    `published.protocols(table)`: "rows", "differences" and "composite" are those of the standard protocol, and
    "as_published" has {table: the same under the published cells' own, with its "protocol"}.
    """
    own = PROTOCOLS.get(table, "standard")
    parts = {
        protocol: _scored(table, ablation.under(protocol), metrics, pairs, subsets)
        | ({} if composite is None else {"composite": _means(composite.query("protocol == @protocol"), metrics)})
        | _counts(ablation.under(protocol))
        for protocol in protocols(table)
    }
    sizes = sorted({row["scored_at"] for row in parts["standard"]["rows"].values()} - {None})
    return {"table": table, "protocol": "standard, composite background pasted",
            "scored_at": sizes[0] if len(sizes) == 1 else sizes, **about,
            "seeds": len(ablation.seeds), **parts["standard"],
            "as_published": {table: {"protocol": own} | (parts[own] if own != "standard" else {})}}  # fmt: skip


def _counts(ablation: Ablation) -> dict:
    """{"n", "photos"}: what was scored."""
    images = next(iter(ablation.runs.values()), pd.DataFrame(columns=IMAGE))
    return {"n": len(images), "photos": int(images["photo"].nunique())}


def _means(scores: pd.DataFrame, metrics) -> dict:
    """{metric: mean over images}, and the same of each subset under its name."""
    by_subset = scores.groupby("subset", sort=False)[list(metrics)].mean()
    return {**scores[list(metrics)].mean(), **by_subset.to_dict("index")}


def _scored(table: str, ablation: Ablation, metrics, pairs, subsets) -> dict:
    """{"rows", "differences"} of a report."""
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
    return {"rows": rows, "differences": differences}


def as_published(data: dict) -> dict:
    """A report with the rows, differences and composite that the published cells' own protocol scored."""
    return data | data["as_published"][data["table"]]


def _flat(rows: dict) -> dict:
    """{label: summary} of a report's rows, with or without subsets."""
    flat = {}
    for name, row in rows.items():
        parts = {f"{name}, {k}": v for k, v in row.items() if isinstance(v, dict) and "interval" in v}
        flat |= parts or {name: row}
    return flat


def side_by_side(data: dict, metrics) -> pd.DataFrame:
    """A report's rows as a table: ours, with the composite left alone, and the published values if there are any.

    This and the two below show what the published cells' own protocol scored.
    """
    data = as_published(data)
    rows = _flat(data["rows"])
    ours = pd.DataFrame({name: {m: row[m] for m in metrics} for name, row in rows.items()}, dtype=float).T
    if "composite" in data:
        ours.loc["composite left alone"] = pd.Series(data["composite"])[list(metrics)]
    theirs = pd.DataFrame({name: row["published"] for name, row in rows.items()}, index=metrics, dtype=float).T
    return pd.concat({"ours": ours, "published": theirs}, axis=1).dropna(axis=1, how="all")


def gains(data: dict, metric: str = "psnr") -> pd.DataFrame:
    """A report's differences in one metric as a table, one row a pair: ours with its interval, published, verdict."""
    differences = as_published(data)["differences"]
    found = [d | dict(zip(("low", "high"), d["interval"], strict=True)) for d in differences]
    numbers = ["improvement", "low", "high", "published"]
    table = pd.DataFrame(found).query("metric == @metric")[["after", "before", "subset", *numbers, "verdict"]]
    return table.astype(dict.fromkeys(numbers, float)).reset_index(drop=True)


def plot(data: dict, metric: str = "psnr", label: str = "PSNR, dB"):
    """Rows and differences of one metric with their intervals; single runs as dots, published gains as diamonds."""
    data = as_published(data)
    rows, gains = _flat(data["rows"]), [d for d in data["differences"] if d["metric"] == metric]
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * max(len(rows), len(gains)) + 1.4))
    for place, row in enumerate(rows.values()):
        runs = np.array([run[metric] for run in row.get("runs", ())], float)
        left.plot(runs, [place] * len(runs), "o", color="grey", markersize=4)
    if "composite" in data:
        left.axvline(data["composite"][metric], color="black", linestyle=":")
    nothing = (None, None)
    means = {name: (row[metric], *(row["interval"][metric] or nothing)) for name, row in rows.items()}
    intervals(means, label, axis=left)
    names = [f"{g['after']}\nover {g['before']}" + (f", {g['subset']}" if g["subset"] != "all" else "") for g in gains]
    effects = {name: (g["improvement"], *(g["interval"] or nothing)) for name, g in zip(names, gains, strict=True)}
    right.plot([gain["published"] for gain in gains], range(len(gains)), "D", color="C1")
    return intervals(effects, f"gain in {label} (◆ published)", zero=True, axis=right)
