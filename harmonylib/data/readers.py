"""Readers: each kind of data set becomes a list of `Example`s, the rows of one manifest (`audit.audit`).

| kind | on disk | what an example has |
|---|---|---|
| iharmony4 | `layout`: lists at the root, or `<subset>/<subset>_{train,test}.txt` | composite, mask, real |
| photos | `images/` + `masks/` with equal stems at any depth, or a CSV index | mask, real |
| imaterialist | iMaterialist-fashion-2020: `train.csv`, `train/`; only `ids.txt` if there | mask (run lengths), real |
| realhm | RealHM: `*_composite.*`, `*_mask.*`, `*_gt.*` at any depth | composite, mask, real (harmonized by hand) |
| dih99 | DIH99: `images/` + `masks/` with equal stems | composite, mask; there is no ground truth |
"""

import glob
import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.decoding import IMAGE_SUFFIXES, MAX_PIXELS, open_image, orientation, pictures_in
from ..core.errors import HarmonyError
from ..core.files import as_written, inside, stem_of
from ..core.images import read_mask, write_image
from ..core.parallel import parallel_map
from .layout import SPLITS, list_lines, pictures_of, read_lines, read_text, triple_of


@dataclass(frozen=True)
class Runs:
    """A mask as run-length strings "start length ...": down the columns, starts counted from 1, united."""

    encoded: tuple[str, ...]
    shape: tuple[int, int]
    source: str

    def decode(self) -> np.ndarray:
        """HxW bool. Raises HarmonyError naming `source` for runs that are no numbers or leave the image."""
        flat = np.zeros(self.shape[0] * self.shape[1], bool)
        for text in self.encoded:
            words = text.split()
            runs = np.array(words if all(re.fullmatch("[0-9]{1,15}", word) for word in words) else [0], dtype=np.int64)
            if not len(runs) or len(runs) % 2 or (runs < 1).any() or (runs[::2] + runs[1::2] - 1 > flat.size).any():
                size = f"{self.shape[1]}x{self.shape[0]}"
                raise HarmonyError(f"{self.source}: run lengths do not fit a {size} image; mend or remove the rows")
            for start, length in runs.reshape(-1, 2):
                flat[start - 1 : start - 1 + length] = True
        return flat.reshape(self.shape, order="F")


@dataclass(frozen=True)
class Example:
    """A composite, a real photo, or both, with the mask of the foreground. split: "train", "test" or "" (no split)."""

    subset: str
    split: str
    name: str
    mask: Path | Runs
    composite: Path | None = None
    real: Path | None = None

    def read_mask(self) -> np.ndarray:
        """HxW bool."""
        return self.mask.decode() if isinstance(self.mask, Runs) else read_mask(self.mask)


def detect(root) -> str:
    """The kind of the data set at `root` (DIH99 looks like a folder of photos: name it). Raises HarmonyError."""
    root = Path(root)
    if not root.is_dir():
        raise HarmonyError(f"{root}: no such data folder; see data/README.md")
    if any(any(root.glob(mark)) for mark in ("IHD_*.txt", "*/*_train.txt", "*/*_test.txt", "*/composite_images")):
        return "iharmony4"
    if (root / "train.csv").is_file():
        return "imaterialist"
    if any(any(folder.glob("[!.]*_composite.*")) for folder in _folders(root)):
        return "realhm"
    return "photos"


def scan(root, kind: str = "auto", index=None) -> Iterator[Example | HarmonyError]:
    """Every example of a data set, and in place of each broken one the HarmonyError that names file and mend.

    index: for photos, a CSV with columns image, mask (relative to root) and split, also with semicolons or tabs, in
    UTF-16 and with backslashes, as spreadsheets and Windows write it. Raises HarmonyError for a missing
    folder, an unknown kind or a data set without any file of its kind.
    """
    kind = detect(root) if kind == "auto" else kind
    if kind not in READERS:
        raise HarmonyError(f"data set kind {kind!r} is unknown; use auto, {', '.join(READERS)}")
    yield from (_indexed(Path(root), index) if index else READERS[kind](Path(root)))


def read_examples(root, kind: str = "auto", index=None) -> list[Example]:
    """All examples of a data set, as `scan`. Raises the first HarmonyError there is, also when there are none."""
    found = list(scan(root, kind, index))
    for item in found:
        if isinstance(item, HarmonyError):
            raise item
    if not found:
        raise HarmonyError(f"{root}: no pictures here; see data/README.md")
    return found


def photo_pairs(root, index=None, split: str | None = None) -> list[tuple[Path, Path]]:
    """(image, mask) paths of a folder of photos, or of the rows of one split of its CSV index.

    Raises HarmonyError when there is no such folder, an image has no mask, or the index has no such row.
    """
    chosen = [e for e in read_examples(root, "photos", index) if split in (None, e.split)]
    if not chosen:
        raise HarmonyError(f"{index or root}: no row with split {split}")
    return [(e.real, e.mask) for e in chosen]


def _iharmony4(root: Path) -> Iterator[Example | HarmonyError]:
    pictures = pictures_of(root)
    lists = {split: list_lines(root, split) for split in SPLITS}
    if not any(lists.values()):
        raise HarmonyError(f"{root}: no IHD_train.txt or IHD_test.txt with a composite in it; write one a line")
    for split, lines in lists.items():
        if lines is not None and not lines:
            yield HarmonyError(f"{root}: the {split} list is empty; write composites into it or remove it")
        for line in lines or ():
            try:
                t = triple_of(pictures, line)
                yield Example(t.subset, split, t.name, t.mask, t.composite, t.real)
            except HarmonyError as error:
                yield error


def _folders(root: Path) -> list[Path]:
    """`root` and all folders below it but hidden ones; symbolic links are followed, and each folder comes once."""
    found = {}
    for folder, below, _ in os.walk(root, followlinks=True):
        if found.setdefault(os.path.realpath(folder), Path(folder)) != Path(folder):
            below.clear()
        below[:] = sorted(name for name in below if name[0] != ".")
    return list(found.values())


def _side_by_side(root: Path, part: str, subset: str | None = None) -> Iterator[Example | HarmonyError]:
    """`images/` beside `masks/`, at any depth; part: what the images are, "real" or "composite"."""
    folders = sorted(f / "images" for f in _folders(root) if (f / "images").is_dir() and (f / "masks").is_dir())
    if not folders:
        raise HarmonyError(f"{root}: no images/ folder beside a masks/ folder; put photos and masks there")
    for folder in folders:
        images, unread = pictures_in(folder)
        masks, odd = pictures_in(folder.parent / "masks")
        for paths in (images, masks):
            for one, other in itertools.pairwise(sorted(paths, key=lambda path: (stem_of(path), path.suffix))):
                if stem_of(one) == stem_of(other):
                    yield HarmonyError(f"{other}: a second file beside {one.name}; keep the right one")
        masks = {stem_of(mask): mask for mask in masks}
        for image in images:
            if stem_of(image) in masks:
                name = subset or folder.parent.name
                yield Example(name, "", image.stem, masks[stem_of(image)], **{part: image})
            else:
                yield HarmonyError(f"{image}: no mask named {image.stem}.* in {folder.parent / 'masks'}; add it")
        yield from unread + odd
        for stem in sorted(masks.keys() - {stem_of(image) for image in images}):
            yield HarmonyError(f"{masks[stem]}: no picture named {stem}.* in {folder}; add it or remove the mask")


def _indexed(root: Path, index) -> Iterator[Example | HarmonyError]:
    try:
        text = re.sub(r"^sep=.*\s+", "", read_text(index))  # Excel's own first line
        head = (text.splitlines() or [""])[0]
        options = {"sep": max(",;\t", key=head.count), "skipinitialspace": True, "index_col": False, "dtype": str}
        table = pd.read_csv(io.StringIO(text), keep_default_na=False, **options)
    except HarmonyError:
        raise
    except (OSError, ValueError) as error:
        raise HarmonyError(f"{index}: {error}; give a CSV with columns image, mask and split") from None
    table.columns = [str(name).strip().lower() for name in table.columns]
    missing = {"image", "mask", "split"} - set(table.columns)
    if missing:
        raise HarmonyError(f"{index}: no column {', '.join(sorted(missing))}; an index has image, mask and split")
    for number, row in enumerate(table[["image", "mask", "split"]].itertuples(index=False), start=2):
        split = row.split.strip().lower()
        if not "".join(row).strip():
            continue  # as spreadsheets end a table
        paths = (text.strip().replace("\\", "/") for text in (row.image, row.mask))
        try:
            image, mask = (as_written(inside(root, path)) for path in paths)
        except HarmonyError as error:
            yield HarmonyError(f"{index}, line {number}: {error}")
            continue
        lost = [str(path) for path in (image, mask) if not path.is_file()]
        if split not in SPLITS:
            yield HarmonyError(f"{index}, line {number}: split {row.split!r} is unknown; use train or test")
        elif lost:
            yield HarmonyError(f"{index}, line {number}: {lost[0]}: no such file; mend the index")
        else:
            yield Example(image.parent.parent.name, split, image.stem, mask, real=image)


def _realhm(root: Path) -> Iterator[Example | HarmonyError]:
    composites = sorted(p for folder in _folders(root) for p in folder.glob("[!.]*_composite.*"))
    composites = [p for p in composites if p.suffix.lower() in IMAGE_SUFFIXES]
    for composite in composites:
        stem = composite.stem.removesuffix("_composite")
        parts = {part: sorted(composite.parent.glob(f"{glob.escape(stem)}_{part}.*")) for part in ("mask", "gt")}
        lost = [f"{stem}_{part}.*" for part, files in parts.items() if not files]
        if lost:
            yield HarmonyError(f"{composite}: no {lost[0]} beside it; add the file or remove the composite")
        else:
            yield Example("RealHM", "test", stem, parts["mask"][0], composite, parts["gt"][0])


def _imaterialist(root: Path) -> Iterator[Example | HarmonyError]:
    csv, columns = root / "train.csv", ["ImageId", "EncodedPixels", "Height", "Width"]
    try:
        table = pd.read_csv(csv, usecols=columns, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise HarmonyError(f"{csv}: {error}; give the data set's train.csv") from None
    photos = {name.removesuffix(".jpg"): rows for name, rows in table.groupby("ImageId", sort=True)}
    chosen = root / "ids.txt"
    for name in read_lines(chosen) if chosen.is_file() else photos:
        try:
            image = inside(root / "train", f"{name}.jpg")
        except HarmonyError as error:
            yield error
            continue
        if name not in photos:
            yield HarmonyError(f"{chosen}: {name} is not in {csv}; mend the list")
        elif not image.is_file():
            yield HarmonyError(f"{image}: no such photo, though {csv} has it; add it or remove its rows")
        else:
            rows = photos[name]
            texts = rows["Height"].iloc[0], rows["Width"].iloc[0]
            shape = tuple(int(text) if re.fullmatch("[0-9]{1,6}", text) else 0 for text in texts)
            mask = Runs(tuple(rows["EncodedPixels"]), shape, f"{csv}, {name}")
            if 0 < shape[0] * shape[1] < MAX_PIXELS:
                yield Example("iMaterialist", "train", name, mask, real=image)
            else:
                yield HarmonyError(f"{mask.source}: {' x '.join(texts)} is no size of a photo; mend or remove its rows")


READERS = {
    "iharmony4": _iharmony4,
    "photos": partial(_side_by_side, part="real"),
    "imaterialist": _imaterialist,
    "realhm": _realhm,
    "dih99": partial(_side_by_side, part="composite", subset="DIH99"),
}


def imaterialist_pairs(root, out, workers: int | None = None) -> list[tuple[Path, Path]]:
    """iMaterialist-fashion-2020 as (image, mask) paths: the union masks (Sec. 5.1.2) are written to `out`.

    `sets.clean_photos` leaves the product-only photos out. Raises HarmonyError for a broken train.csv or a photo of
    another size than it says.
    """
    found = read_examples(root, "imaterialist")
    masks = parallel_map(partial(_write_union, Path(out)), found, "union masks", "photo", workers)
    return [(example.real, mask) for example, mask in zip(found, masks, strict=True)]


def _write_union(out: Path, example: Example) -> Path:
    mask, image = example.read_mask(), open_image(example.real)
    size = image.size
    if orientation(image) > 1:
        raise HarmonyError(f"{example.real}: turned by its EXIF orientation, its mask is not; save it upright")
    if size != mask.shape[::-1]:
        found = "{}x{}".format(*size)
        raise HarmonyError(f"{example.real}: is {found}, {example.mask.source} says {mask.shape[1]}x{mask.shape[0]}")
    write_image(out / f"{example.name}.png", mask)
    return out / f"{example.name}.png"
