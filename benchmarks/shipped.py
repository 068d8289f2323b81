"""`python -m benchmarks.shipped DATA [DATA ...] [--models MODEL[:DRAWS],...]`: what `hl.harmonize` does, for the cards.

DATA: sets in iHarmony4's layout, each judged by its test list; the folder's name is the set's. MODEL:4 is the mean of
four draws of a diffusion model. Every composite is harmonized as a user would do it, at the file's own size, and scored
against the real photo (protocol "standard"), beside the classical transfers to the photo's own background. Each real
photo is harmonized with its own mask, too: nothing should change. All goes to pretrained/scores.json, from which
`python -m benchmarks.cards` writes the figures of the model cards.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from harmonylib.core.json_files import write_json
from harmonylib.core.progress import progress
from harmonylib.data.layout import read_triples
from harmonylib.data.transfers import harmonize_classically
from harmonylib.evaluation.methods import CLASSICAL
from harmonylib.evaluation.metrics import compare, score, summarise
from harmonylib.evaluation.statistics import reduction
from harmonylib.inference import MODELS, harmonize

SCORES = Path(__file__).parents[1] / "pretrained/scores.json"
STRENGTHS = (0, 260, 500, 1000, 2000, np.inf)  # fMSE of the composite; below 260 lies a tenth of the genuine ones
UNTOUCHED = 60.0  # dB that a real photo counts that comes back byte for byte
SHARES = (0, 0.05, 0.15, 1)  # foreground's share of the picture (DiffHarmony++, Table 3)


def measure(data, models: dict[str, tuple[str, int]]) -> dict:
    """Averages, gains and error reductions by model for all and by subset, strength and foreground share.

    models: {name: (model, draws)} of `hl.harmonize`. Intervals are over photos.
    """
    triples, rows, kept = read_triples(data, "test"), [], []
    seen = set()

    def harmonized(image, mask) -> dict[str, np.ndarray]:
        return {name: np.asarray(harmonize(image, mask, m, draws=n)) for name, (m, n) in models.items()}

    for triple in progress(triples, desc=Path(data).name, unit="image"):
        composite, mask, real = triple.load()
        about = {"subset": triple.subset, "name": triple.name, "photo": triple.photo, "foreground_ratio": mask.mean()}
        outputs = {"composite": composite}
        outputs |= {name: harmonize_classically(composite, mask, name) for name in CLASSICAL}
        outputs |= harmonized(composite, mask)
        rows += [about | {"model": name} | score(image, real, mask, "standard") for name, image in outputs.items()]
        if triple.photo not in seen:
            seen.add(triple.photo)
            about |= {"subset": "real"}
            again = harmonized(real, mask).items()
            kept += [about | {"model": name} | score(image, real, mask, "standard") for name, image in again]
    table, kept = pd.DataFrame(rows), pd.DataFrame(kept)
    kept["psnr"] = kept["psnr"].clip(upper=UNTOUCHED)
    before = table[table["model"] == "composite"].set_index(["subset", "name"])["fmse"]
    strength = table.set_index(["subset", "name"]).index.map(before)
    groups = {
        "subset": table["subset"],
        "strength": pd.cut(strength, STRENGTHS, right=False).astype(str),
        "share": pd.cut(table["foreground_ratio"], SHARES, include_lowest=True).astype(str),
    }
    return {
        "n": len(triples),
        "photos": len(seen),
        "models": summarise(table),
        "against_composite": {name: _gains(table, groups, name) for name in (*CLASSICAL, *models)},
        "real_photos": {name: parts["all"] for name, parts in summarise(kept).items()},
    }


def _gains(table: pd.DataFrame, groups: dict, model: str) -> dict:
    """{"all" | "subset" | "strength" | "share": ...} of {"n", "photos", "psnr": gain, "reduction": of fMSE}."""

    def part(rows):
        found = compare(rows, model, "composite")
        after, before = (rows[rows["model"] == name].set_index(["subset", "name"]) for name in (model, "composite"))
        errors = after["fmse"], before["fmse"].loc[after.index], after["photo"]
        return {"n": found["n"], "photos": found["photos"], "psnr": found["psnr"], "reduction": reduction(*errors)}

    ordered = {name: sorted(dict.fromkeys(labels), key=lambda t: float(t.strip("[(").split(",")[0]) if "," in t else 0)
               for name, labels in groups.items()}  # fmt: skip
    found = {name: {label: part(table[groups[name] == label]) for label in ordered[name]} for name in groups}
    return {"all": part(table)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    models = {name: (name.partition(":")[0], int(name.partition(":")[2] or 1)) for name in arguments.models.split(",")}
    found = {"protocol": "standard, composite background pasted", "sets": {}}
    for data in arguments.data:
        found["sets"][Path(data).name] = result = measure(data, models)
        for name in models:
            gain = result["against_composite"][name]["all"]
            (d, low, high), (r, least, most) = gain["psnr"], gain["reduction"]
            print(f"{Path(data).name}, n = {gain['n']} ({gain['photos']} photos), {name}: {d:+.2f} dB ({low:+.2f} to "
                  f"{high:+.2f}), fMSE {-r:+.1%} ({-least:+.1%} to {-most:+.1%}), real photos "
                  f"{result['real_photos'][name]['psnr']:.1f} dB")  # fmt: skip
    write_json(SCORES, found)


if __name__ == "__main__":
    main()
