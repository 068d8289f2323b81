"""Candidate composites from the inverse model, and the choice among them (DiffHarmony++ Sec. 4).

On disk, below one root: a folder named after a hash of weights and settings, in it `<subset>/composite_images/
<pair>_g<index>.png` and, written when these are complete, `<subset>/pairs/<pair>.json`. When every pair has its file,
`manifest.json` lists the candidates of all; only what it lists counts. Candidate i of a pair depends on (seed, subset,
pair, i), the weights and the settings; not on order, other pairs or how many processes.
"""

import contextlib
import hashlib
import json
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage.color import rgb2lab

from ..core.cache import file_digest, pipeline_digest
from ..core.devices import actual_precision, autocast
from ..core.distributed import all_here, rank_and_world
from ..core.errors import HarmonyError
from ..core.files import inside, only_one
from ..core.images import read_image, read_mask, read_pair, resize_image, resize_mask, to_tensor, to_uint8
from ..core.json_files import read_json, write_json
from ..core.progress import progress
from ..core.seeds import generator
from ..data.layout import Triple, write_composite
from ..data.recipes import foreground_delta_e
from ..models.diffusion import latent_mask
from ..models.pipeline import DiffHarmonyPipeline, pad_to_multiple

MANIFEST = "manifest.json"
WRITERS = 4  # threads that encode images while the next pair is computed
COLUMNS = ["subset", "pair", "index", "path", "strength", "inputs"]  # of `read_candidates`


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Pair:
    """A real photo with one mask; `name` (PHOTO_MASK) is what its composites are named after."""

    subset: str
    name: str
    photo: str
    real: Path
    mask: Path
    mask_from: str = "auto"

    @property
    def key(self) -> tuple[str, str]:
        return self.subset, self.name

    @property
    def mark(self) -> str:
        """The file, below a run's folder, that says that the pair is finished."""
        return f"{self.subset}/pairs/{self.name}.json"

    def load(self, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(real HxWx3 uint8, mask HxW bool), the longest side resized to `size` pixels (None: as it is)."""
        real, mask = read_pair(self.real, self.mask, self.mask_from)
        shape = scaled(mask.shape, size)
        return resize_image(real, shape), resize_mask(mask, shape)

    def digest(self) -> str:
        """Hash of what candidates are made from: both files, and what of the mask counts."""
        return _digest([file_digest(self.real), file_digest(self.mask), self.mask_from])


def scaled(shape: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) with the longest side at `size` pixels (None: as it is)."""
    return shape if size is None else tuple(max(1, round(side * (size / max(shape)))) for side in shape)


def pairs_of(triples: list[Triple]) -> list[Pair]:
    """The distinct (real, mask) pairs of some triples, in order of first appearance."""
    return list(dict.fromkeys(Pair(*t.pair, t.photo, t.real, t.mask) for t in triples))


def has_latent_foreground(mask: np.ndarray, factor: int, size: int | None = None) -> bool:
    """Whether an HxW bool mask, its longest side resized to `size`, keeps any foreground on the latent grid.

    factor: pixels of a cell of the grid (`pipeline.factor`).
    """
    mask = resize_mask(mask, scaled(mask.shape, size))
    padded = pad_to_multiple(to_tensor(mask)[None], factor, "constant")
    return bool(latent_mask(padded, [side // factor for side in padded.shape[-2:]]).any())


def visible_pairs(pairs: list[Pair], size: int | None, factor: int) -> list[Pair]:
    """The pairs of whose foreground something is left on the latent grid (see `has_latent_foreground`)."""
    shown = progress(pairs, desc="reading masks", unit="mask")
    return [pair for pair in shown if has_latent_foreground(read_mask(pair.mask, pair.mask_from), factor, size)]


def generate_candidates(pipeline: DiffHarmonyPipeline, pairs: list[Pair], root_out, k: int, seed: int,
                        size: int | None = None, steps: int = 5, temperature: float = 1.0,
                        suffix: str = ".png", precision: str = "auto") -> dict | None:  # fmt: skip
    """K candidate composites of every pair, the real's background pasted back; returns the manifest.

    size: longest side the pair is resized to (None: its own). suffix: ".png" is exact, ".jpg" lossy. A pair is
    conditioned once and its candidates are one batch. Finished pairs of the same weights, files and settings are kept,
    so a killed run continues; candidates of other settings are removed. Under torchrun each process takes its share and
    returns when all have; with a RANK and WORLD_SIZE alone, those that finish before the others return None. Files are
    equal byte for byte whatever the number of processes if each has the same number of threads.
    The manifest holds "settings" (with the weights' hash) and "candidates", each with its status: "ok", "nan" or
    "equal" (to the real); only "ok" ones have a file and count. Raises HarmonyError for k, steps, temperature or suffix
    out of bounds, no pairs, a mask that is empty on the latent grid, or another run that writes to the same root.
    """
    if k < 1 or steps < 1 or not 0 < temperature < float("inf"):
        raise HarmonyError(f"k {k}, steps {steps}, temperature {temperature}: k and steps are >= 1, temperature is > 0")
    if suffix not in (".png", ".jpg"):
        raise HarmonyError(f"suffix {suffix!r} is unknown; use .png or .jpg")
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: pair.key)
    if not pairs:
        raise HarmonyError("no (real, mask) pairs to generate from; the training list is empty")
    settings = {"k": k, "seed": seed, "size": size, "steps": steps, "temperature": temperature, "suffix": suffix}
    settings |= {"precision": actual_precision(pipeline.device, precision), "model": pipeline_digest(pipeline)}
    root = Path(root_out)
    folder = root / f"settings-{_digest(settings)}"
    rank, world = rank_and_world()
    pipeline.set_progress_bar_config(disable=True)
    with contextlib.nullcontext() if rank else only_one(root), ThreadPoolExecutor(WRITERS) as pool:
        todo = [pair for pair in pairs[rank::world] if _finished(folder, pair) is None]
        if todo:
            (root / MANIFEST).unlink(missing_ok=True)  # it speaks of files that are about to change
            for other in set(root.glob("settings-" + 32 * "[0-9a-f]")) - {folder}:
                shutil.rmtree(other, ignore_errors=True)
        saving = deque()
        for pair in progress(todo, desc="candidates", unit="pair"):
            saving.append(pool.submit(_save, folder, pair, suffix, *_draw(pipeline, pair, settings)))
            if len(saving) > WRITERS:
                saving.popleft().result()
        for job in saving:
            job.result()
        all_here(pipeline.device)
        finished = [_finished(folder, pair) for pair in pairs]
        if None in finished:
            return None  # other processes are at work
        for half_written in folder.rglob(".*"):  # by a run that was killed
            half_written.unlink(missing_ok=True)
        manifest = {"settings": settings, "candidates": [row for rows in finished for row in rows]}
        write_json(root / MANIFEST, manifest)
    return manifest


def _draw(pipeline, pair: Pair, settings: dict):
    """(real, mask, K candidates KxHxWx3 uint8, whether each was finite) of one pair."""
    real, mask = pair.load(settings["size"])
    if not has_latent_foreground(mask, pipeline.factor):
        raise HarmonyError(
            f"{pair.mask}: no foreground is left on the latent grid at {mask.shape[1]}x{mask.shape[0]}; "
            "generate at a larger size or leave the pair out"
        )
    noise = [generator(settings["seed"], "generate", *pair.key, index) for index in range(settings["k"])]
    with torch.inference_mode(), autocast(pipeline.device, settings["precision"]):
        images = pipeline(
            to_tensor(real)[None], to_tensor(mask)[None], num_inference_steps=settings["steps"], generator=noise,
            candidates=settings["k"], temperature=settings["temperature"], paste=True, output_type="pt",
        ).images  # fmt: skip
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    return real, mask, to_uint8(images.nan_to_num() * 2 - 1), finite


def _save(folder: Path, pair: Pair, suffix: str, real, mask, images, finite) -> None:
    """Write the usable candidates of one pair, then its list of all."""
    about, rows = {"subset": pair.subset, "pair": pair.name, "inputs": pair.digest()}, []
    for index, (image, good) in enumerate(zip(images, finite, strict=True)):
        status = "nan" if not good else "equal" if np.array_equal(image, real) else "ok"
        row = about | {"index": index, "status": status}
        if status == "ok":
            line = write_composite(folder, pair.subset, pair.name, f"g{index}", image, suffix)
            row |= {"file": f"{folder.name}/{line}", "bytes": (folder / line).stat().st_size}
            row["strength"] = round(foreground_delta_e(real, image, mask), 4)
        rows.append(row)
    write_json(folder / pair.mark, rows)


def _finished(folder: Path, pair: Pair) -> list[dict] | None:
    """All candidates of a pair, if they are whole and were made of its files as they are now, else None."""
    inputs = pair.digest()
    try:
        rows = read_json(folder / pair.mark)
        sizes = {inside(folder.parent, row["file"]): row["bytes"] for row in rows if row["status"] == "ok"}
        whole = all(file.stat().st_size == size for file, size in sizes.items())
        return rows if whole and all(row["inputs"] == inputs for row in rows) else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        return None


def read_candidates(root, strength: tuple[float, float] = (0.0, float("inf"))) -> pd.DataFrame:
    """The usable candidates of a finished run whose strength lies within the bounds, sorted by pair and index.

    A row each: subset, pair, index, path, strength (mean foreground ΔE (CIE76) to the real) and inputs (`Pair.digest`).
    Raises HarmonyError for a missing or damaged manifest, a listed file that is missing, or bounds the wrong way round.
    """
    if strength[0] > strength[1]:
        raise HarmonyError(f"strength bounds {tuple(strength)}: the lower one is above the upper one")
    path, again = Path(root, MANIFEST), "run `harmonylib generate` again"
    if not path.is_file():
        raise HarmonyError(f"{path}: not there, so the candidates are incomplete; {again}")
    try:
        rows = [row for row in read_json(path)["candidates"] if row["status"] == "ok"]
        rows = [{**row, "path": inside(root, row["file"])} for row in rows]
        table = pd.DataFrame([[row[name] for name in COLUMNS] for row in rows], columns=COLUMNS)
        table = table[table["strength"].between(*strength)].reset_index(drop=True)
    except (KeyError, TypeError) as error:
        raise HarmonyError(f"{path}: not a manifest of candidates ({error!r}); {again}") from None
    for file in table["path"]:
        if not file.is_file():
            raise HarmonyError(f"{file}: listed in {path} but missing; {again}")
    return table


def select(classifier, candidates: pd.DataFrame) -> pd.DataFrame:
    """The candidates sorted by pair, with their probability (P(composite)), and kept: the likeliest of each (Sec. 4.2).

    Of equals the first is kept.
    """
    scored = candidates.assign(probability=classifier.predict(classifier.extract(list(candidates["path"]))))
    order = {"subset": True, "pair": True, "probability": False, "index": True}
    scored = scored.sort_values(list(order), ascending=list(order.values()), ignore_index=True)
    return scored.assign(kept=~scored.duplicated(["subset", "pair"]))


def pairwise_delta_e(images, mask: np.ndarray) -> float:
    """Mean foreground ΔE (CIE76) over all pairs of HxWx3 uint8 images; NaN for a single one. mask: HxW bool."""
    labs = [rgb2lab(image[mask]) for image in images]
    distances = [np.linalg.norm(a - b, axis=-1).mean() for a, b in combinations(labs, 2)]
    return float(np.mean(distances)) if distances else float("nan")


def candidate_diversity(pairs: list[Pair], candidates: pd.DataFrame) -> pd.DataFrame:
    """How much the candidates of a pair differ in the foreground: mean pairwise ΔE (CIE76), near 0 when modes collapse.

    A row for each pair: subset, pair, n (candidates) and delta_e, which is NaN for a pair with one candidate.
    """
    known, rows = {pair.key: pair for pair in pairs}, []
    for key, group in candidates.groupby(["subset", "pair"]):
        images = [read_image(path) for path in group["path"]]
        mask = resize_mask(known[key].load()[1], images[0].shape[:2])
        rows.append({"subset": key[0], "pair": key[1], "n": len(group), "delta_e": pairwise_delta_e(images, mask)})
    return pd.DataFrame(rows)
