"""Candidate composites from the inverse model, and the choice among them (DiffHarmony++ Sec. 4).

On disk, below one root: `<subset>/composite_images/<pair>_g<index>.png`, one `<subset>/pairs/<pair>.json` for each
finished pair and, when every pair is finished, `manifest.json`. Only what the manifest lists counts. Candidate i of a
pair depends on (seed, subset, pair, i), the weights and the settings; not on order, other pairs or how many processes.
"""

import contextlib
import glob
import hashlib
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import torch
from skimage.color import rgb2lab

from ..core.cache import file_digest, settings_of, weights_digest
from ..core.devices import actual_precision, autocast
from ..core.distributed import rank_and_world
from ..core.errors import HarmonyError
from ..core.files import inside, only_one
from ..core.images import read_image, read_mask, read_pair, resize_image, resize_mask, to_tensor, to_uint8
from ..core.json_files import read_json, write_json
from ..core.progress import progress
from ..core.seeds import generator
from ..data.layout import COMPOSITES, Triple, write_composite
from ..data.recipes import foreground_delta_e
from ..models.diffusion import latent_mask
from ..models.pipeline import DiffHarmonyPipeline, pad_to_multiple

MANIFEST = "manifest.json"
PAIRS = "pairs"
WRITERS = 4  # threads that encode images while the next pair is computed
SUFFIXES = (".png", ".jpg")


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

    def load(self, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(real HxWx3 uint8, mask HxW bool), the longest side resized to `size` pixels (None: as it is)."""
        real, mask = read_pair(self.real, self.mask, self.mask_from)
        shape = scaled(mask.shape, size)
        return resize_image(real, shape), resize_mask(mask, shape)


@dataclass(frozen=True)
class Candidate:
    """A usable candidate composite of a pair; strength is its mean foreground ΔE (CIE76) to the real."""

    subset: str
    pair: str
    index: int
    path: Path
    strength: float

    @property
    def key(self) -> tuple[str, str]:
        return self.subset, self.pair


@dataclass(frozen=True)
class Choice:
    """The candidate kept for one pair, its P(composite), and the others with theirs, likeliest first."""

    kept: Candidate
    probability: float
    rejected: tuple[tuple[Candidate, float], ...]


def scaled(shape: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) with the longest side at `size` pixels (None: as it is)."""
    return shape if size is None else tuple(max(1, round(side * (size / max(shape)))) for side in shape)


def pairs_of(triples: list[Triple]) -> list[Pair]:
    """The distinct (real, mask) pairs of some triples, in order of first appearance."""
    return list(dict.fromkeys(Pair(*t.pair, t.photo, t.real, t.mask) for t in triples))


def has_latent_foreground(mask: np.ndarray, factor: int) -> bool:
    """Whether an HxW bool mask keeps any foreground on the latent grid, `factor` pixels a cell (`pipeline.factor`)."""
    padded = pad_to_multiple(to_tensor(mask)[None], factor, "constant")
    return bool(latent_mask(padded, [side // factor for side in padded.shape[-2:]]).any())


def visible_pairs(pairs: list[Pair], size: int | None, factor: int) -> list[Pair]:
    """The pairs of whose foreground something is left on the latent grid at `size` (see `has_latent_foreground`)."""
    masks = ((p, read_mask(p.mask, p.mask_from)) for p in progress(pairs, desc="reading masks", unit="mask"))
    return [p for p, mask in masks if has_latent_foreground(resize_mask(mask, scaled(mask.shape, size)), factor)]


def model_digest(pipeline: DiffHarmonyPipeline) -> str:
    """Hash of everything in a pipeline that decides its output: weights and configs of all parts."""
    parts = {name: weights_digest(getattr(pipeline, name)) for name in ("vae", "unet", "prompt")}
    for name in ("vae", "unet", "scheduler"):
        parts[f"{name} config"] = settings_of(getattr(pipeline, name).config)
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def generate_candidates(pipeline: DiffHarmonyPipeline, pairs: list[Pair], root_out, k: int, seed: int,
                        size: int | None = None, steps: int = 5, temperature: float = 1.0,
                        suffix: str = ".png", precision: str = "auto") -> dict | None:  # fmt: skip
    """K candidate composites of every pair, the real's background pasted back; returns the manifest.

    size: longest side the pair is resized to (None: its own). suffix: ".png" is exact, ".jpg" lossy. A pair is
    conditioned once and its candidates are one batch. Finished pairs of the same weights, files and settings are kept,
    all else is made anew, so a killed run continues. Under torchrun each process takes its share, and those that finish
    before the others return None. Files are equal byte for byte whatever the number of processes if each has the same
    number of threads.
    The manifest lists "settings" (with the weights' hash), and for each pair its candidates with status: "ok", "nan" or
    "equal" (to the real); only "ok" ones have a file and count. Raises HarmonyError for k < 1, no pairs, steps < 1,
    temperature <= 0, an unknown suffix, unequal sizes, a mask that is empty on the latent grid, or another run that
    writes to the same root.
    """
    if k < 1 or steps < 1 or not 0 < temperature < float("inf"):
        raise HarmonyError(f"k {k}, steps {steps}, temperature {temperature}: k and steps are >= 1, temperature is > 0")
    if suffix not in SUFFIXES:
        raise HarmonyError(f"suffix {suffix!r} is unknown; use {' or '.join(SUFFIXES)}")
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: pair.key)
    if not pairs:
        raise HarmonyError("no (real, mask) pairs to generate from; the training list is empty")
    root = Path(root_out)
    settings = {"k": k, "seed": seed, "size": size, "steps": steps, "temperature": temperature, "suffix": suffix,
                "precision": actual_precision(pipeline.device, precision), "model": model_digest(pipeline)}  # fmt: skip
    rank, world = rank_and_world()
    pipeline.set_progress_bar_config(disable=True)
    with contextlib.nullcontext() if rank else only_one(root):
        todo = [pair for pair in pairs[rank::world] if _record(root, pair, settings) is None]
        if todo:
            (root / MANIFEST).unlink(missing_ok=True)  # it speaks of files that are about to change
        _generate(pipeline, todo, root, settings)
        return _finish(root, pairs, settings)


def _generate(pipeline, todo: list[Pair], root: Path, settings: dict) -> None:
    """Draw and save the candidates of the pairs, writing those of a few pairs while the next is drawn."""
    saving = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for pair in progress(todo, desc="candidates", unit="pair"):
            real, mask, images, finite = _draw(pipeline, pair, settings)
            saving.append(pool.submit(_save, root, pair, settings, real, mask, images, finite))
            if len(saving) > WRITERS:
                saving.popleft().result()
        for job in saving:
            job.result()


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


def _save(root: Path, pair: Pair, settings: dict, real, mask, images, finite) -> None:
    """Write the usable candidates of one pair, then its record: a pair without a record has no candidates."""
    _discard(root, pair)
    rows = []
    for index, (image, good) in enumerate(zip(images, finite, strict=True)):
        row = {"index": index, "status": "ok" if good else "nan"}
        if good and np.array_equal(image, real):
            row["status"] = "equal"
        if row["status"] == "ok":
            line = write_composite(root, pair.subset, pair.name, f"g{index}", image, settings["suffix"])
            row |= {
                "file": line,
                "bytes": (root / line).stat().st_size,
                "strength": round(foreground_delta_e(real, image, mask), 4),
            }
        rows.append(row)
    record = {"subset": pair.subset, "pair": pair.name, "inputs": _inputs(pair), "candidates": rows}
    write_json(_record_path(root, pair), {"settings": settings, **record})


def _record_path(root: Path, pair: Pair) -> Path:
    return root / pair.subset / PAIRS / f"{pair.name}.json"


def _discard(root: Path, pair: Pair) -> None:
    """Remove what an earlier run with other settings, or one that was killed while writing, left of a pair."""
    path = _record_path(root, pair)
    for half_written in (root / pair.subset / COMPOSITES).glob(f".{glob.escape(pair.name)}_g*"):
        half_written.unlink(missing_ok=True)
    rows = (_read_record(path) or {"candidates": []})["candidates"]
    path.unlink(missing_ok=True)
    for row in rows:
        if "file" in row:
            inside(root, row["file"]).unlink(missing_ok=True)


def _read_record(path: Path) -> dict | None:
    try:
        return read_json(path)
    except HarmonyError:
        return None


def _inputs(pair: Pair) -> list[str]:
    other = [] if pair.mask_from == "auto" else [pair.mask_from]
    return [file_digest(pair.real), file_digest(pair.mask), *other]


def _record(root: Path, pair: Pair, settings: dict) -> dict | None:
    """The record of a pair that is finished under these settings and inputs with all its files whole, else None."""
    record = _read_record(_record_path(root, pair))
    if record is None or record.pop("settings") != settings or record["inputs"] != _inputs(pair):
        return None
    files = {inside(root, row["file"]): row.get("bytes") for row in record["candidates"] if row["status"] == "ok"}
    return record if all(file.is_file() and file.stat().st_size == size for file, size in files.items()) else None


def _finish(root: Path, pairs: list[Pair], settings: dict) -> dict | None:
    """Write the manifest when every pair is finished, whichever process that finds it so."""
    records = [_record(root, pair, settings) for pair in pairs]
    if None in records:
        return None
    manifest = {"settings": settings, "pairs": records}
    write_json(root / MANIFEST, manifest)
    return manifest


def read_candidates(root, strength: tuple[float, float] = (0.0, float("inf"))) -> list[Candidate]:
    """The usable candidates of a finished run whose strength lies within the bounds, sorted by pair and index.

    Raises HarmonyError for a missing or damaged manifest, a listed file that is missing, or bounds the wrong way round.
    """
    if strength[0] > strength[1]:
        raise HarmonyError(f"strength bounds {tuple(strength)}: the lower one is above the upper one")
    candidates = []
    for pair in read_manifest(root)["pairs"]:
        for row in pair["candidates"]:
            if row["status"] == "ok" and strength[0] <= row["strength"] <= strength[1]:
                path = inside(root, row["file"])
                if not path.is_file():
                    raise HarmonyError(f"{path}: listed in {MANIFEST} but missing; run `harmonylib generate` again")
                candidates.append(Candidate(pair["subset"], pair["pair"], row["index"], path, row["strength"]))
    return candidates


def read_manifest(root) -> dict:
    """The manifest of a finished run. Raises HarmonyError when the run has not finished or the file is damaged."""
    path = Path(root, MANIFEST)
    if not path.is_file():
        raise HarmonyError(f"{path}: not there, so the candidates are incomplete; run `harmonylib generate` again")
    manifest = read_json(path)
    try:
        _ = manifest["settings"]["k"] < 1
        for pair in manifest["pairs"]:
            for row in pair["candidates"]:
                if row["status"] == "ok":
                    _ = pair["inputs"], pair["subset"], pair["pair"]
                    _ = row["index"], row["strength"] < 0, inside(root, row["file"])
    except (KeyError, TypeError) as error:
        raise HarmonyError(
            f"{path}: not a manifest of candidates ({error!r}); run `harmonylib generate` again"
        ) from None
    return manifest


def check_inputs(root, pairs) -> None:
    """Raise HarmonyError for a pair whose photo or mask is not the one that the candidates in `root` were made from."""
    made = {(record["subset"], record["pair"]): record["inputs"] for record in read_manifest(root)["pairs"]}
    for pair in pairs:
        if made[pair.key] != _inputs(pair):
            raise HarmonyError(f"{pair.real}: changed (or its mask did) after {root}; run `harmonylib generate` again")


def by_pair(candidates: list[Candidate]) -> dict[tuple[str, str], list[Candidate]]:
    """Candidates grouped by their (subset, pair), each group sorted by index."""
    ordered = sorted(candidates, key=lambda c: (c.key, c.index))
    return {key: list(group) for key, group in groupby(ordered, key=lambda c: c.key)}


def select(classifier, candidates: list[Candidate]) -> list[Choice]:
    """For each (real, mask) pair the candidate of the highest P(composite), sorted by pair (Sec. 4.2).

    Of equals the first is kept.
    """
    groups = by_pair(candidates)
    ordered = [candidate for group in groups.values() for candidate in group]
    probabilities = classifier.predict(classifier.extract([c.path for c in ordered]))
    scored = dict(zip(ordered, probabilities.tolist(), strict=True))
    choices = []
    for group in groups.values():
        kept, *rest = sorted(group, key=lambda c: (-scored[c], c.index))
        choices.append(Choice(kept, scored[kept], tuple((c, scored[c]) for c in rest)))
    return choices


def pairwise_delta_e(images, mask: np.ndarray) -> float:
    """Mean foreground ΔE (CIE76) over all pairs of HxWx3 uint8 images; NaN for a single one. mask: HxW bool."""
    labs = [rgb2lab(image[mask]) for image in images]
    distances = [np.linalg.norm(a - b, axis=-1).mean() for a, b in combinations(labs, 2)]
    return float(np.mean(distances)) if distances else float("nan")


def candidate_diversity(pairs: list[Pair], candidates: list[Candidate]) -> dict:
    """How much the candidates of a pair differ in the foreground: mean pairwise ΔE (CIE76), near 0 when modes collapse.

    {"mean", "median", "min" over pairs, "pairs": [{"subset", "pair", "n", "delta_e"}]}; pairs with one candidate have
    delta_e NaN and stay out of the statistics. Raises HarmonyError for candidates of a pair that is not given.
    """
    known, rows = {pair.key: pair for pair in pairs}, []
    for key, group in by_pair(candidates).items():
        if key not in known:
            raise HarmonyError(f"candidates of {'/'.join(key)} but no such pair; give the pairs they were made from")
        images = [read_image(candidate.path) for candidate in group]
        value = pairwise_delta_e(images, resize_mask(known[key].load()[1], images[0].shape[:2]))
        rows.append({"subset": key[0], "pair": key[1], "n": len(group), "delta_e": value})
    values = [row["delta_e"] for row in rows if row["n"] > 1] or [float("nan")]
    statistics = {"mean": np.mean(values), "median": np.median(values), "min": np.min(values)}
    return {name: float(value) for name, value in statistics.items()} | {"pairs": rows}
