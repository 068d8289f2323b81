"""One ablation table: rows x seeds of scores, runs that diverged, paired differences, and the file that claims read."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from .evaluate import Method
from .metrics import METRICS, summarise
from .stats import bootstrap_mean, verdict
from .training import TrainingDiverged

SIGN = {"mse": -1, "fmse": -1}  # an improvement is positive, also where smaller is better


def stored_method(name: str, images: np.ndarray) -> Method:
    """A method that hands out N x 3 x S x S images in [-1, 1], made before for a test set and in its order.

    Raises TrainingDiverged where they are not finite: the model that made them is broken.
    """
    if not np.isfinite(images).all():
        raise TrainingDiverged(f"{name}: the outputs are not finite")
    rest = iter(images)
    return Method(name, lambda composite, mask, names: torch.from_numpy(np.stack([next(rest) for _ in names])))


class Ablation:
    """Collects runs of named rows with several seeds.

    composite: the per-image table (`evaluate`) of leaving the composite alone, on the images that every run is scored
    on. A row is the mean over images of each image's mean over seeds, its interval a bootstrap over photos.
    """

    def __init__(self, rows, seeds, composite: pd.DataFrame, metrics=("psnr", "mse", "fmse")):
        self.rows, self.seeds, self.composite, self.metrics = list(rows), list(seeds), composite, list(metrics)
        self.photos = composite["photo"].nunique()
        self.runs, self.failures = {}, {}

    def run(self, row: str, seed: int, work) -> None:
        """Keep the per-image table that work() returns; where training diverges, the reason, and go on."""
        try:
            self.runs[row, seed] = work()
        except TrainingDiverged as error:
            self.failures[row, seed] = str(error)

    def status(self, row: str) -> str:
        done = [seed for seed in self.seeds if (row, seed) in self.runs]
        reasons = {self.failures[row, seed] for seed in self.seeds if (row, seed) in self.failures}
        return ": ".join([f"{len(done)} of {len(self.seeds)} seeds finished", *sorted(reasons)])

    def scores(self, row: str, seeds=None) -> pd.DataFrame | None:
        """One line per image: its mean over the runs of a row (with these seeds); None when there is none."""
        tables = [self.runs[row, seed] for seed in (seeds or self.seeds) if (row, seed) in self.runs]
        if not tables:
            return None
        columns = [metric for metric in METRICS if metric in tables[0]]
        means = pd.concat(tables).groupby(["subset", "name", "photo"], sort=False)[columns].mean().reset_index()
        return means.assign(model=row)

    def summary(self) -> dict:
        """{row: {metric: mean, "interval"}} of the composite and of the rows with a finished run."""
        tables = [self.composite, *(table for row in self.rows if (table := self.scores(row)) is not None)]
        return {name: parts["all"] for name, parts in summarise(pd.concat(tables)).items()}

    def difference(self, after: str, before: str, metric: str, weights: dict | None = None) -> dict:
        """Improvement of `after` over `before` within the same image, as `claims` reads it, from seeds both finished.

        weights: {row: factor} whose weighted sum is the effect; by default after minus before. No seed in common: null.
        """
        weights = weights or {after: 1, before: -1}
        entry = {"after": after, "before": before, "metric": metric}
        seeds = [seed for seed in self.seeds if all((row, seed) in self.runs for row in weights)]
        effect = (None, None, None)
        if seeds:
            values = sum(factor * self.scores(row, seeds)[metric] for row, factor in weights.items())
            effect = bootstrap_mean(SIGN.get(metric, 1) * values, self.scores(next(iter(weights)))["photo"])
        else:
            entry["status"] = "; ".join(f"{row}: {self.status(row)}" for row in weights)
        return entry | {
            "improvement": effect[0], "interval": list(effect[1:]), "verdict": verdict(*effect, self.photos)
        }  # fmt: skip

    def to_json(self, about: dict, differences: list[dict], notes: dict | None = None) -> dict:
        """The file's content (see `claims`). A row with no finished run is null, with a status; notes: {row: more}."""
        summary, rows = self.summary(), {}
        empty = dict.fromkeys(self.metrics)
        for row in self.rows:
            found = summary.get(row, empty | {"interval": empty})
            single = [
                {"seed": seed, "status": self.failures.get((row, seed), "ok")}
                | {m: self.runs[row, seed][m].mean() if (row, seed) in self.runs else None for m in self.metrics}
                for seed in self.seeds
            ]
            rows[row] = {m: found[m] for m in self.metrics}
            rows[row] |= {"interval": {m: found["interval"][m] for m in self.metrics}, "status": self.status(row)}
            rows[row] |= {"runs": single} | (notes or {}).get(row, {})
        about |= {"protocol": "standard, composite background pasted", "seeds": len(self.seeds)}
        about |= {"n": len(self.composite), "photos": self.photos}
        composite = {m: summary["composite"][m] for m in self.metrics}
        return about | {"composite": composite, "rows": rows, "differences": differences}

    def plot(self, metric: str = "psnr", label: str = "PSNR, dB"):
        """Every row with its interval, its single seeds as dots, and the composite left alone as a line."""
        summary = self.summary()
        figure, axis = plt.subplots(figsize=(7, 0.45 * len(self.rows) + 1.2))
        for place, row in enumerate(self.rows):
            for seed in self.seeds:
                if (row, seed) in self.runs:
                    axis.plot(self.runs[row, seed][metric].mean(), place, "o", color="grey", markersize=4)
            if row in summary:
                axis.plot(summary[row]["interval"][metric], [place, place], color="C0", linewidth=2)
                axis.plot(summary[row][metric], place, "s", color="C0")
            else:
                axis.text(0.02, place, "no finite run", transform=axis.get_yaxis_transform(), va="center")
        axis.axvline(summary["composite"][metric], color="black", linestyle=":")
        ends = (len(self.rows) - 0.5, -0.5)
        axis.set(yticks=range(len(self.rows)), yticklabels=self.rows, ylim=ends, xlabel=label)
        figure.tight_layout()
        plt.close(figure)
        return figure
