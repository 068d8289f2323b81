"""`harmonylib harmonize` on one picture or on a folder: which file goes where, then one after the other."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from ..core.decoding import IMAGE_SUFFIXES, KINDS, pictures_in
from ..core.devices import pick_device
from ..core.distributed import rank_and_world
from ..core.errors import HarmonyError
from ..core.files import natural, stem_of
from ..core.picture_metadata import check_kind, check_output, open_picture, save_picture
from ..core.progress import progress
from ..inference import apply_change, find_change, load_model, open_scene

STEADY = 6.0  # frames: the deviation of the Gaussian that colour maps are averaged by


class Job(NamedTuple):
    """One picture to harmonize."""

    composite: Path
    mask: Path
    output: Path
    unread: HarmonyError | None = None  # why there is nothing to do


def plan(composite, mask, output, force: bool = False, kind: str = "png", steady: bool = False) -> list[Job]:
    """The jobs of a picture and its mask, or of two folders paired by stem; a folder's outputs are `<stem>.<kind>`.

    A composite without a mask of its own takes the one named after its stem less the last "_" part, as in iHarmony4.
    A file of no type that is read is a job, too, which fails (`Job.unread`).
    Under torchrun these are the process's share of a folder, which may be none.
    steady: the folder's pictures are frames, in the order of the numbers in their names.
    Raises HarmonyError, before any work, for a picture without a mask, two pictures of one stem, an output that exists
    (without `force`) or cannot be written.
    """
    composite, mask, output = Path(composite), Path(mask), Path(output)
    if composite.is_dir() != mask.is_dir() and composite.exists() and mask.exists():
        raise HarmonyError(f"{composite} and {mask}: give two files or two folders")
    if steady and (not composite.is_dir() or rank_and_world()[1] > 1):
        raise HarmonyError(f"{composite}: --steady takes a folder of frames, and one process; leave it away")
    jobs, folder = [Job(composite, mask, output)], output.absolute().parent
    if composite.is_dir():
        rank, world = rank_and_world()
        jobs, folder = _pairs(composite, mask, output, kind)[rank::world], output.absolute()
        if output.exists() and not output.is_dir():
            raise HarmonyError(f"{output}: is a file; name a folder for the harmonized pictures")
    if steady:
        jobs.sort(key=lambda job: natural(job.composite))
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


def run(jobs: list[Job], found, applied, fit_mask: bool = False, mask_from: str = "auto", steady: bool = False) -> None:
    """Harmonize and save every job; `found` and `applied` are options of `find_change` and `apply_change`.

    steady: first all colour maps are found, then each is averaged with those of the frames around it (STEADY) and
    applied alone. One bad picture of several, whatever it raises, is named on stderr and the others go on. Raises
    HarmonyError at the end if any failed.
    """
    if len(jobs) > 1:  # weights that are missing fail once, not for every picture
        load_model(str(found["model"]), str(pick_device(found["device"])))
    failed = 0

    def scene_of(job: Job):
        if job.unread:
            raise job.unread
        before = open_picture(job.composite)
        check_kind(before, KINDS[job.output.suffix.lower()], job.output)
        return open_scene(before, job.mask, fit_mask, mask_from)

    def save(job: Job, change=None) -> None:
        scene = scene_of(job)
        save_picture(apply_change(scene, *(change or find_change(scene, **found)), **applied), job.output)

    def each(work, todo: list, what: str) -> dict:
        nonlocal failed
        done = {}
        for job in progress(todo, desc=what, unit="picture") if len(jobs) > 1 else todo:
            try:
                done[job] = work(job)
            except Exception as error:
                told = error if isinstance(error, HarmonyError) else f"{job.composite}: {type(error).__name__}: {error}"
                if len(jobs) == 1:
                    raise error if isinstance(error, (HarmonyError, OSError)) else HarmonyError(told) from error
                failed += 1
                tqdm.write(f"error: {' '.join(str(told).splitlines())}", file=sys.stderr)
        return done

    if steady:
        maps = each(lambda job: find_change(scene_of(job), **found)[0], jobs, "looking")
        mean = dict(zip(maps, smoothed(list(maps.values())), strict=True))
        each(lambda job: save(job, (mean[job], None)), list(maps), "harmonizing")
    else:
        each(save, jobs, "harmonizing")
    if failed:
        raise HarmonyError(f"{failed} of {len(jobs)} pictures could not be harmonized; the others are written")


def smoothed(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Colour maps (1x10x3) of frames in order, each the mean of those around it by a Gaussian of STEADY frames.

    What a map does is linear in it, so this is the mean of the frames' own results.
    """
    return list(torch.from_numpy(gaussian_filter1d(torch.stack(maps).numpy(), STEADY, axis=0, mode="nearest")))
