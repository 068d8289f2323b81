"""Loading, auditing and making data, on composites of the embedded photos (embedded scenes, long side 256 to 384)."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from harmonylib import cache
from harmonylib.benchmark import BenchmarkSettings, make_benchmark
from harmonylib.check import audit
from harmonylib.datasets import TripleSet
from harmonylib.images import to_square, to_tensor
from harmonylib.layout import read_triples
from harmonylib.photos import load_photos
from harmonylib.recipes import RECIPES, RecipeSettings, recolor_batch

from .paired import paired

SIDE, BATCH = 256, 16


def rows() -> list[dict]:
    """One row per comparison; see `paired`. Times of whole sets are scaled to 1,000 pictures or composites."""
    before, folder = cache.ROOT, Path(tempfile.mkdtemp())
    cache.ROOT = folder / "cache"
    try:
        return [_load(folder), _audit(folder), _make(folder), _recolour(folder)]
    finally:
        cache.ROOT = before
        shutil.rmtree(folder)


def _set(root: Path, pairs: int, size: int, workers: int = 2) -> Path:
    amounts = BenchmarkSettings(pairs, 2, 1, 1, size, region_share=0.0)
    if not (root / "IHD_train.txt").exists():
        make_benchmark(root, load_photos(), amounts, RecipeSettings(), seed=0, workers=workers)
    return root


def _squares(triple) -> list[torch.Tensor]:
    return [to_tensor(to_square(array, SIDE, "squash")) for array in triple.load()]


def _load(folder: Path) -> dict:
    triples = read_triples(_set(folder / "large", 8, 384), "train")[:BATCH]
    data = TripleSet(triples, SIDE)

    def decode():
        composites, masks, reals = zip(*(_squares(triple) for triple in triples), strict=True)
        return {"composite": torch.stack(composites), "mask": torch.stack(masks), "real": torch.stack(reals)}

    assert all(torch.equal(value, data.batch(range(BATCH))[name]) for name, value in decode().items())
    return {"name": "a batch of 16 at 256 px: cache / decoding", **paired(lambda: data.batch(range(BATCH)), decode)}


def _scaled(row: dict, count: int) -> dict:
    return row | {key: row[key] * 1000 / count for key in ("ours", "baseline")}


def _audit(folder: Path) -> dict:
    root = _set(folder / "small", 120, SIDE)  # enough that starting the workers is little of it
    pictures = sum(path.suffix in (".jpg", ".png") for path in root.rglob("*"))
    times = paired(lambda: audit(root, workers=2), lambda: audit(root, workers=1), repeats=3)
    return {"name": "check-data, 1,000 pictures at 256 px: 2 workers / 1", **_scaled(times, pictures)}


def _make(folder: Path) -> dict:
    pairs, subsets = 60, len(RECIPES)

    def make(workers):
        shutil.rmtree(folder / "new", ignore_errors=True)
        _set(folder / "new", pairs, SIDE, workers)

    times = paired(lambda: make(2), lambda: make(1), repeats=2)
    return {"name": "make 1,000 composites at 256 px: 2 workers / 1", **_scaled(times, (pairs + 2) * subsets)}


def _recolour(folder: Path) -> dict:
    """A batch made on the fly, against the array recipes (one draw each) and the way to tensors."""
    triples = read_triples(_set(folder / "large", 8, 384), "train")[:BATCH]
    arrays = [[to_square(array, SIDE, "squash") for array in triple.load()] for triple in triples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    real, mask = (torch.stack([to_tensor(row[k]) for row in arrays]).to(device) for k in (2, 1))
    settings, draw = replace(RecipeSettings(), extra_share=0.0), np.random.default_rng(0)

    def plain():
        made = []
        for number, (_, region, photo) in enumerate(arrays):
            reference = arrays[number - 1][2], arrays[number - 1][1]
            recipe = list(RECIPES.values())[number % len(RECIPES)]
            made.append(to_tensor(recipe(photo, region, draw, reference, settings)))
        return torch.stack(made).to(device)

    generator = torch.Generator().manual_seed(0)
    times = paired(lambda: recolor_batch(real, mask, generator, settings), plain)
    return {"name": f"16 composites at 256 px on the fly, {device}: batched / one by one", **times}
