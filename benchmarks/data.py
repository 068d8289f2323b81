"""Loading, auditing and making data, on composites of the embedded photos (embedded scenes, long side 256 to 384)."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from harmonylib.core import cache
from harmonylib.core.images import read_image, to_square, to_tensor
from harmonylib.data.audit import audit
from harmonylib.data.batches import TripleSet
from harmonylib.data.build import BenchmarkSettings, make_benchmark
from harmonylib.data.embedded_photos import load_photos
from harmonylib.data.layout import read_triples
from harmonylib.data.recipes import RECIPES, RecipeSettings, recolor

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
    amounts = BenchmarkSettings(pairs, 2, 1, 1, size)
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
    """Images a second by the recipes in turn, against reading the composite that training would take instead."""
    triples = read_triples(_set(folder / "large", 8, 384), "train")[:BATCH]
    arrays = [[to_square(array, SIDE, "squash") for array in triple.load()] for triple in triples]
    draw, names = np.random.default_rng(0), list(RECIPES)

    def make():
        for number, (_, mask, real) in enumerate(arrays):
            _, other_mask, other = arrays[number - 1]
            recolor(names[number % len(names)], real, mask, draw, (other, other_mask))

    def read():
        return [to_square(read_image(triple.composite), SIDE, "squash") for triple in triples]

    times = paired(make, read)
    rates = {side: len(arrays) / times[side] for side in ("ours", "baseline")}
    return {"name": "composites at 256 px: made on the fly / read from files", **times, **rates, "unit": "images/s"}
