"""`harmonylib harmonize` on one picture or on a folder: which file goes where, then one after the other."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..core.decoding import IMAGE_SUFFIXES, KINDS, pictures_in
from ..core.devices import pick_device
from ..core.distributed import rank_and_world
from ..core.errors import HarmonyError
from ..core.files import stem_of
from ..core.picture_metadata import check_kind, check_output, open_picture, save_picture
from ..core.progress import progress
from ..inference import MODELS, harmonize, load_model


class Job(NamedTuple):
    """One picture to harmonize."""

    composite: Path
    mask: Path
    output: Path
    unread: HarmonyError | None = None  # why there is nothing to do


def plan(composite, mask, output, force: bool = False, kind: str = "png") -> list[Job]:
    """The jobs of a picture and its mask, or of two folders paired by stem; a folder's outputs are `<stem>.<kind>`.

    A composite without a mask of its own takes the one named after its stem less the last "_" part, as in iHarmony4.
    A file of no type that is read is a job, too, which fails (`Job.unread`).
    Under torchrun these are the process's share of a folder, which may be none.
    Raises HarmonyError, before any work, for a picture without a mask, two pictures of one stem, an output that exists
    (without `force`) or cannot be written.
    """
    composite, mask, output = Path(composite), Path(mask), Path(output)
    if composite.is_dir() != mask.is_dir() and composite.exists() and mask.exists():
        raise HarmonyError(f"{composite} and {mask}: give two files or two folders")
    jobs, folder = [Job(composite, mask, output)], output.absolute().parent
    if composite.is_dir():
        rank, world = rank_and_world()
        jobs, folder = _pairs(composite, mask, output, kind)[rank::world], output.absolute()
        if output.exists() and not output.is_dir():
            raise HarmonyError(f"{output}: is a file; name a folder for the harmonized pictures")
    for job in jobs:
        check_output(job.output, force=force)
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise HarmonyError(f"{folder}: cannot be written to; choose another output")
    return jobs


def _pairs(composites: Path, masks: Path, output: Path, kind: str) -> list[Job]:
    pictures, unread = pictures_in(composites)
    by_stem = {stem_of(path): path for path in pictures_in(masks)[0]}
    if not pictures:
        raise HarmonyError(f"{composites}: no pictures ({' '.join(IMAGE_SUFFIXES)})")
    jobs = {}
    for path in pictures:
        stem = stem_of(path)
        mask = by_stem.get(stem) or by_stem.get(stem.rsplit("_", 1)[0])
        if mask is None:
            raise HarmonyError(f"{path}: no mask named {path.stem}.* in {masks}; add it")
        if stem in jobs:
            raise HarmonyError(f"{path}: {jobs[stem].composite.name} would have the same output; rename one")
        jobs[stem] = Job(path, mask, output / f"{path.stem}.{kind}")
    failed = [Job(composites, masks, output / f"{number}.{kind}", error) for number, error in enumerate(unread)]
    return [*jobs.values(), *failed]


def run(jobs: list[Job], device="auto", model=MODELS[0], **options) -> None:
    """Harmonize and save every job; `options` go to `inference.harmonize`.

    One bad picture of several, whatever it raises, is named on stderr and the others go on. Raises HarmonyError at the
    end if any failed.
    """
    failed, several = 0, len(jobs) > 1
    if several:
        load_model(str(model), str(pick_device(device)))  # weights that are missing fail once, not for every picture
    for job in progress(jobs, desc="harmonizing", unit="picture") if several else jobs:
        try:
            if job.unread:
                raise job.unread
            before = open_picture(job.composite)
            check_kind(before, KINDS[job.output.suffix.lower()], job.output)
            save_picture(harmonize(before, job.mask, model=model, device=device, **options), job.output)
        except Exception as error:
            told = error if isinstance(error, HarmonyError) else f"{job.composite}: {type(error).__name__}: {error}"
            if not several:
                raise error if isinstance(error, (HarmonyError, OSError)) else HarmonyError(told) from error
            failed += 1
            tqdm.write(f"error: {' '.join(str(told).splitlines())}", file=sys.stderr)
    if failed:
        raise HarmonyError(f"{failed} of {len(jobs)} pictures could not be harmonized; the others are written")
