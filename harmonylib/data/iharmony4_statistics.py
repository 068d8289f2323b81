"""What genuine composites are like: iHarmony4's official test list (7,404 composites, full resolution), by subset.

The recipes aim at these figures: how strongly a foreground was changed (fMSE, mean squared error inside it on the
0-255 scale) and how much of the picture it covers. Both were computed from published scores of the untouched
composites: the share is MSE / fMSE.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
OUTERMOST = (0.02, 0.98)  # levels that stand for all beyond: the table says nothing about the ends


class Quantiles(NamedTuple):
    """Quantiles at LEVELS of the foreground's mean squared error and of its share of the picture."""

    fmse: tuple[float, ...]
    share: tuple[float, ...]


GENUINE = {
    "HCOCO": Quantiles((252, 404, 738, 1413, 2466), (0.012, 0.016, 0.031, 0.077, 0.165)),
    "HAdobe5k": Quantiles((272, 619, 1402, 2822, 5076), (0.015, 0.036, 0.086, 0.206, 0.357)),
    "HFlickr": Quantiles((309, 561, 1091, 2009, 3635), (0.017, 0.041, 0.114, 0.248, 0.419)),
    "Hday2night": Quantiles((240, 449, 893, 1725, 3420), (0.005, 0.009, 0.021, 0.069, 0.226)),
}


def draw(values: tuple, rng: np.random.Generator, size=None):
    """Random numbers with the given quantiles: log values interpolated over normal scores, ends carried on."""
    scores, logs = ndtri(LEVELS), np.log(values)
    rise, run = np.diff(logs), np.diff(scores)
    at = ndtri(np.clip(rng.uniform(size=size), *OUTERMOST))
    ends = np.minimum(at - scores[0], 0) * rise[0] / run[0] + np.maximum(at - scores[-1], 0) * rise[-1] / run[-1]
    return np.exp(np.interp(at, scores, logs) + ends)


def beside(rows: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of a set's composites beside the genuine ones: columns (figure, "made" | "genuine" | "ratio").

    rows: one per composite with "subset", "fmse" and "share". The index is (subset, quantile); subsets that iHarmony4
    does not have are left out.
    """
    figures = list(Quantiles._fields)
    made = rows[rows["subset"].isin(list(GENUINE))].groupby("subset", sort=False)[figures].quantile(list(LEVELS))
    tables = {subset: pd.DataFrame(GENUINE[subset]._asdict(), LEVELS) for subset in made.index.unique(0)}
    genuine = pd.concat(tables) if tables else made
    parts = {"made": made, "genuine": genuine, "ratio": made / genuine}
    table = pd.concat({(figure, part): parts[part][figure] for figure in figures for part in parts}, axis=1)
    return table.rename_axis(["subset", "quantile"])
