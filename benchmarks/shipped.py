"""`python -m benchmarks.shipped DATA [MODEL[:DRAWS] ...]`: what `hl.harmonize` does to a test list, for model cards.

DATA: a set in iHarmony4's layout. MODEL:4 is the mean of four draws of a diffusion model. Every test composite is
harmonized as a user would do it, at the file's own size, and scored against the real photo (protocol "standard"); so
are the classical transfers to the photo's own background. Also harmonized is each real photo with its mask, where
nothing should change. The results go to pretrained/scores.json.
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
from harmonylib.metrics import buckets, compare, score, summarise
from harmonylib.progress import progress

SCORES = Path(__file__).parents[1] / "pretrained/scores.json"


def measure(data, models) -> dict:
    """Averages and intervals by model for all, each subset and each foreground size, and of untouched real photos."""
    triples, rows, kept = read_triples(data, "test"), [], []
    seen = set()

    def harmonized(image, mask) -> dict[str, np.ndarray]:
        parts = {name: name.partition(":") for name in models}
        return {name: np.asarray(harmonize(image, mask, m, draws=int(n or 1))) for name, (m, _, n) in parts.items()}

    for triple in progress(triples, desc="test composites", unit="image"):
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
    table = pd.DataFrame(rows)
    found = {"protocol": "standard, composite background pasted", "n": len(triples), "photos": len(seen)}
    return found | {
        "models": summarise(table),
        "buckets": buckets(table),
        "gains": {name: compare(table, name, "composite") for name in models},
        "real_photos": {name: parts["all"] for name, parts in summarise(pd.DataFrame(kept)).items()},
    }


def table(found: dict) -> str:
    """The figures of a model card in Markdown: PSNR and fMSE with intervals, PSNR by recipe, PSNR / fMSE by size."""
    models, sizes = found["models"], found["buckets"]
    subsets = [name for name in models["composite"] if name != "all"]
    columns = [f"{size} (n = {part['n']})" for size, part in sizes["composite"].items() if size != "all"]
    lines = [["", "PSNR ↑", "MSE ↓", "fMSE ↓", *subsets, *columns], ["---"] * (4 + len(subsets) + len(columns))]
    for name, parts in models.items():
        whole = parts["all"]
        psnr, fmse = (" – ".join(f"{end:.{d}f}" for end in whole["interval"][m]) for m, d in (("psnr", 2), ("fmse", 0)))
        lines.append([name, f"{whole['psnr']:.2f} ({psnr})", f"{whole['mse']:.0f}", f"{whole['fmse']:.0f} ({fmse})"])
        lines[-1] += [f"{parts[subset]['psnr']:.2f}" for subset in subsets]
        lines[-1] += [f"{p['psnr']:.2f} / {p['fmse']:.0f}" for size, p in sizes[name].items() if size != "all"]
    lines = ["| " + " | ".join(line) + " |" for line in lines] + [""]
    for name, gain in found["gains"].items():
        difference, low, high = gain["psnr"]
        lines.append(f"{name} over the composite: {difference:+.2f} dB ({low:+.2f} to {high:+.2f})")
        whole = found["real_photos"][name]
        low, high = whole["interval"]["psnr"]
        lines.append(f"{name} on a real photo: {whole['psnr']:.1f} dB ({low:.1f} to {high:.1f})")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("error: name the data set's folder (see `harmonylib make-data`)")
    found = measure(sys.argv[1], sys.argv[2:] or MODELS)
    write_json(SCORES, found)
    print(table(found))


if __name__ == "__main__":
    main()
