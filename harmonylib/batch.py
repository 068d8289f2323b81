"""`harmonylib harmonize` on one picture or on a folder: which file goes where, then one after the other."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .devices import pick_device
from .distributed import rank_and_world
from .errors import HarmonyError
from .images import IMAGE_SUFFIXES
from .inference import MODELS, harmonize, load_model
from .picture import check_output, open_picture, save_picture
from .progress import progress


class Job(NamedTuple):
    """One picture to harmonize."""

    composite: Path
    mask: Path
    output: Path


def plan(composite, mask, output, force: bool = False, kind: str = "png") -> list[Job]:
    """The jobs of a picture and its mask, or of two folders paired by stem; a folder's outputs are `<stem>.<kind>`.

    A composite without a mask of its own takes the one named after its stem less the last "_" part, as in iHarmony4.
    Under torchrun these are the process's share of a folder, which may be none.
    Raises HarmonyError, before any work, for a picture without a mask, two pictures of one stem, an output that exists
    (without `force`) or cannot be written.
    """
    composite, mask, output = Path(composite), Path(mask), Path(output)
    if composite.is_dir() != mask.is_dir() and composite.exists() and mask.exists():
        raise HarmonyError(f"{composite} and {mask}: give two files or two folders")
    if composite.is_dir():
        rank, world = rank_and_world()
        jobs, folder = _pairs(composite, mask, output, kind)[rank::world], output.absolute()
        if output.exists() and not output.is_dir():
            raise HarmonyError(f"{output}: is a file; name a folder for the harmonized pictures")
    else:
        jobs, folder = [Job(composite, mask, output)], output.absolute().parent
    for job in jobs:
        check_output(job.output, force=force)
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise HarmonyError(f"{folder}: cannot be written to; choose another output")
    return jobs


def _pairs(composites: Path, masks: Path, output: Path, kind: str) -> list[Job]:
    pictures = _pictures(composites)
    by_stem = {path.stem: path for path in _pictures(masks)}
    if not pictures:
        raise HarmonyError(f"{composites}: no pictures ({' '.join(IMAGE_SUFFIXES)})")
    jobs, stems = [], {}
    for path in pictures:
        mask = by_stem.get(path.stem) or by_stem.get(path.stem.rsplit("_", 1)[0])
        if mask is None:
            raise HarmonyError(f"{path}: no mask named {path.stem}.* in {masks}; add it")
        if path.stem in stems:
            raise HarmonyError(f"{path}: {stems[path.stem].name} would have the same output; rename one")
        stems[path.stem] = path
        jobs.append(Job(path, mask, output / f"{path.stem}.{kind}"))
    return jobs


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def run(jobs: list[Job], device="auto", model=MODELS[0], **options) -> None:
    """Harmonize and save every job; `options` go to `inference.harmonize`.

    One bad picture of several is named on stderr and the others go on. Raises HarmonyError at the end if any failed.
    """
    failed = 0
    if len(jobs) > 1:
        load_model(str(model), str(pick_device(device)))  # weights that are missing fail once, not for every picture
    for job in progress(jobs, desc="harmonizing", unit="picture") if len(jobs) > 1 else jobs:
        try:
            before = open_picture(job.composite)
            check_output(job.output, transparent=before.mode == "RGBA", force=True)
            save_picture(harmonize(before, job.mask, model=model, device=device, **options), job.output)
        except HarmonyError as error:
            if len(jobs) == 1:
                raise
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    if failed:
        raise HarmonyError(f"{failed} of {len(jobs)} pictures could not be harmonized; the others are written")
