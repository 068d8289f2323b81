"""`python -m benchmarks.shipped DATA [MODEL ...]`: what `hl.harmonize` does to a test list, for the model cards.

DATA: a set in iHarmony4's layout. Every test composite is harmonized as a user would do it, at the file's own size, and
scored against the real photo (protocol "standard"); so are the classical transfers to the photo's own background. Also
harmonized is each real photo with its mask, where nothing should change. The results go to pretrained/scores.json.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from harmonylib.color import harmonize_classically
from harmonylib.evaluate import CLASSICAL
from harmonylib.inference import MODELS, harmonize
from harmonylib.jsonio import write_json
from harmonylib.layout import read_triples
from harmonylib.metrics import METRICS, buckets, score, summarise
from harmonylib.progress import progress

SCORES = Path(__file__).parents[1] / "pretrained/scores.json"


def measure(data, models) -> dict:
    """Averages and intervals by model for all, each subset and each foreground size, and of untouched real photos."""
    triples, rows, kept = read_triples(data, "test"), [], []
    seen = set()
    for triple in progress(triples, desc="test composites", unit="image"):
        composite, mask, real = triple.load()
        about = {"subset": triple.subset, "name": triple.name, "photo": triple.photo, "foreground_ratio": mask.mean()}
        outputs = {"composite": composite}
        outputs |= {name: harmonize_classically(composite, mask, name) for name in CLASSICAL}
        outputs |= {name: np.asarray(harmonize(composite, mask, name)) for name in models}
        rows += [about | {"model": name} | score(image, real, mask, "standard") for name, image in outputs.items()]
        if triple.photo not in seen:
            seen.add(triple.photo)
            again = {name: np.asarray(harmonize(real, mask, name)) for name in models}
            about |= {"subset": "real"}
            kept += [about | {"model": name} | score(image, real, mask, "standard") for name, image in again.items()]
    table = pd.DataFrame(rows)
    found = {"protocol": "standard, composite background pasted", "n": len(triples), "photos": len(seen)}
    return found | {
        "models": summarise(table),
        "buckets": buckets(table),
        "real_photos": {name: parts["all"] for name, parts in summarise(pd.DataFrame(kept)).items()},
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("error: name the data set's folder (see `harmonylib make-data`)")
    found = measure(sys.argv[1], sys.argv[2:] or MODELS)
    write_json(SCORES, found)
    for title, tables in (("", found["models"]), ("by foreground size", found["buckets"])):
        for name, parts in tables.items():
            for group, part in parts.items():
                values = "  ".join(f"{metric} {part[metric]:.4g}" for metric in METRICS if part[metric] is not None)
                print(f"{title} {name}, {group} (n = {part['n']}): {values}")
    for name, part in found["real_photos"].items():
        print(f"real photos, {name}: psnr {part['psnr']:.2f} {part['interval']['psnr']}")


if __name__ == "__main__":
    main()
