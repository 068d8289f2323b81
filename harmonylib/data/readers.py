"""Readers: each kind of data set becomes a list of `layout.Triple`s, the rows of one manifest (`audit.audit`).

| kind | on disk | what a triple has |
|---|---|---|
| iharmony4 | `layout`: lists at the root, or `<subset>/<subset>_{train,test}.txt` | composite, mask, real |
| photos | `images/` + `masks/` with equal stems at any depth, or a CSV index | mask, real |
| imaterialist | iMaterialist-fashion-2020: `train.csv`, `train/`; only `ids.txt` if there | mask (run lengths), real |
| realhm | RealHM: `*_composite.*`, `*_mask.*`, `*_gt.*` at any depth | composite, mask, real (harmonized by hand) |
| dih99 | DIH99: `images/` + `masks/` with equal stems | composite, mask; there is no ground truth |
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.decoding import MAX_PIXELS, open_image, orientation
from ..core.errors import HarmonyError
from ..core.files import as_written, inside
from ..core.images import write_image
from ..core.parallel import parallel_map
from .layout import SPLITS, Triple, by_stem, encoding_of, list_lines, pictures_of, read_lines, triple_of


@dataclass(frozen=True)
class Runs:
    """A mask as run-length strings "start length ...": down the columns, starts counted from 1, united."""

    encoded: tuple[str, ...]
    shape: tuple[int, int]
    source: str

    def __str__(self) -> str:
        return self.source

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


def detect(root) -> str:
    """The kind of the data set at `root` (DIH99 looks like a folder of photos: name it). Raises HarmonyError."""
    root = Path(root)
    if not root.is_dir():
        raise HarmonyError(f"{root}: no such data folder; see data/README.md")
    if any(any(root.glob(mark)) for mark in ("IHD_*.txt", "*/*_train.txt", "*/*_test.txt", "*/composite_images")):
        return "iharmony4"
    if (root / "train.csv").is_file():
        return "imaterialist"
    return "realhm" if any(any(folder.glob("[!.]*_composite.*")) for folder in _folders(root)) else "photos"


def scan(root, kind: str = "auto", index=None) -> Iterator[Triple | HarmonyError]:
    """Every triple of a data set, and in place of each broken one the HarmonyError that names file and mend.

    index: for photos, a CSV with columns image, mask (relative to root) and split, as `_table` reads it. Raises
    HarmonyError for a missing folder, an unknown kind or a data set without any file of its kind.
    """
    kind = detect(root) if kind == "auto" else kind
    if kind not in READERS:
        raise HarmonyError(f"data set kind {kind!r} is unknown; use auto, {', '.join(READERS)}")
    yield from (_indexed(Path(root), index) if index else READERS[kind](Path(root)))


def read_examples(root, kind: str = "auto", index=None) -> list[Triple]:
    """All triples of a data set, as `scan`. Raises the first HarmonyError there is, also when there are none."""
    found = list(scan(root, kind, index))
    for item in found or [HarmonyError(f"{root}: no pictures here; see data/README.md")]:
        if isinstance(item, HarmonyError):
            raise item
    return found


def photo_pairs(root, index=None, split: str | None = None) -> list[tuple[Path, Path]]:
    """(image, mask) paths of a folder of photos, or of the rows of one split of its CSV index.

    Raises HarmonyError when there is no such folder, an image has no mask, or the index has no such row.
    """
    chosen = [(t.real, t.mask) for t in read_examples(root, "photos", index) if split in (None, t.split)]
    if not chosen:
        raise HarmonyError(f"{index or root}: no row with split {split}")
    return chosen


def _or_error(read, *arguments, place: str = "") -> Triple | HarmonyError:
    try:
        return read(*arguments)
    except HarmonyError as error:
        return HarmonyError(place + str(error))


def _iharmony4(root: Path) -> Iterator[Triple | HarmonyError]:
    pictures, listed = pictures_of(root), lru_cache(by_stem)
    lists = {split: list_lines(root, split) for split in SPLITS}
    if not any(lists.values()):
        raise HarmonyError(f"{root}: no IHD_train.txt or IHD_test.txt with a composite in it; write one a line")
    for split, lines in lists.items():
        if lines == []:
            yield HarmonyError(f"{root}: the {split} list is empty; write composites into it or remove it")
        yield from (_or_error(triple_of, pictures, line, split, listed) for line in lines or ())


def _folders(root: Path) -> list[Path]:
    """`root` and all folders below it but hidden ones; symbolic links are followed, and each folder comes once."""
    found = {}
    for folder, below, _ in os.walk(root, followlinks=True):
        if found.setdefault(os.path.realpath(folder), Path(folder)) != Path(folder):
            below.clear()
        below[:] = sorted(name for name in below if name[0] != ".")
    return list(found.values())


def _side_by_side(root: Path, part: str, subset: str | None = None) -> Iterator[Triple | HarmonyError]:
    """`images/` beside `masks/`, at any depth; part: what the images are, "real" or "composite"."""
    folders = sorted(f / "images" for f in _folders(root) if (f / "images").is_dir() and (f / "masks").is_dir())
    if not folders:
        raise HarmonyError(f"{root}: no images/ folder beside a masks/ folder; put photos and masks there")
    for folder in folders:
        (images, unread), (masks, odd) = by_stem(folder), by_stem(folder.parent / "masks")
        for one, *others in (*images.values(), *masks.values()):
            yield from (HarmonyError(f"{p}: a second file beside {one.name}; keep the right one") for p in others)
        for stem, (image, *_) in images.items():
            if stem in masks:
                files = {"composite": None, "real": None, "mask": masks[stem][0], part: image}
                yield Triple(subset or folder.parent.name, image.stem, **files)
            else:
                yield HarmonyError(f"{image}: no mask named {image.stem}.* in {folder.parent / 'masks'}; add it")
        yield from unread + odd
        for stem in sorted(masks.keys() - images.keys()):
            yield HarmonyError(f"{masks[stem][0]}: no picture named {stem}.* in {folder}; add it or remove the mask")


def _table(path, columns: list[str], what: str) -> pd.DataFrame:
    """Columns of a CSV as text, as spreadsheets and Windows write it: with semicolons, tabs or Excel's line `sep=;`, in
    UTF-16 or with a byte order mark, with capitals and spaces in its header. Raises HarmonyError: give `what`."""
    try:
        encoding = encoding_of(path)
        with open(path, encoding=encoding) as file:
            head = file.readline()
            of_excel = head.startswith("sep=")
            head = file.readline() if of_excel else head
        options = {"sep": max(",;\t", key=head.count), "skiprows": int(of_excel), "encoding": encoding}
        options |= {"skipinitialspace": True, "index_col": False, "dtype": str, "keep_default_na": False}
        table = pd.read_csv(path, usecols=lambda name: name.strip().lower() in columns, **options)
    except (OSError, ValueError) as error:
        raise HarmonyError(f"{path}: {error}; give {what}") from None
    table.columns = table.columns.str.strip().str.lower()
    if missing := sorted(set(columns) - set(table)):
        raise HarmonyError(f"{path}: no column {', '.join(missing)}; give {what}")
    return table[columns]


def _indexed(root: Path, index) -> Iterator[Triple | HarmonyError]:
    table = _table(index, ["image", "mask", "split"], "a CSV with columns image, mask and split")
    for number, row in enumerate(table.itertuples(index=False), start=2):
        if "".join(row).strip():  # else as spreadsheets end a table
            yield _or_error(_row, root, *row, place=f"{index}, line {number}: ")


def _row(root: Path, image: str, mask: str, split: str) -> Triple:
    image, mask = (as_written(inside(root, text.strip().replace("\\", "/"))) for text in (image, mask))
    if split.strip().lower() not in SPLITS:
        raise HarmonyError(f"split {split!r} is unknown; use train or test")
    for path in (image, mask):
        if not path.is_file():
            raise HarmonyError(f"{path}: no such file; mend the index")
    return Triple(image.parent.parent.name, image.stem, None, mask, image, split.strip().lower())


def _realhm(root: Path) -> Iterator[Triple | HarmonyError]:
    for folder in _folders(root):
        files = {stem: paths[0] for stem, paths in by_stem(folder)[0].items()}
        for name in [stem.removesuffix("_composite") for stem in files if stem.endswith("_composite")]:
            parts = {part: files.get(f"{name}_{part}") for part in ("composite", "mask", "gt")}
            lost = [f"{name}_{part}.*" for part, path in parts.items() if path is None]
            if lost:
                yield HarmonyError(f"{parts['composite']}: no {lost[0]} beside it; add it or remove the composite")
            else:
                yield Triple("RealHM", name, *parts.values(), "test")


def _imaterialist(root: Path) -> Iterator[Triple | HarmonyError]:
    table = _table(root / "train.csv", ["imageid", "encodedpixels", "height", "width"], "the data set's train.csv")
    photos = {name.removesuffix(".jpg"): rows for name, rows in table.groupby("imageid", sort=True)}
    chosen = read_lines(root / "ids.txt") if (root / "ids.txt").is_file() else photos
    yield from (_or_error(_fashion, root, name, photos.get(name)) for name in chosen)


def _fashion(root: Path, name: str, rows: pd.DataFrame | None) -> Triple:
    image, source = inside(root / "train", f"{name}.jpg"), f"{root / 'train.csv'}, {name}"
    if rows is None:
        raise HarmonyError(f"{root / 'ids.txt'}: {name} is not in {root / 'train.csv'}; mend the list")
    if not image.is_file():
        raise HarmonyError(f"{image}: no such photo, though {root / 'train.csv'} has it; add it or remove its rows")
    texts = rows["height"].iloc[0], rows["width"].iloc[0]
    height, width = (int(text) if re.fullmatch("[0-9]{1,6}", text) else 0 for text in texts)
    if not 0 < height * width < MAX_PIXELS:
        raise HarmonyError(f"{source}: {' x '.join(texts)} is no size of a photo; mend or remove its rows")
    mask = Runs(tuple(rows["encodedpixels"]), (height, width), source)
    return Triple("iMaterialist", name, None, mask, image, "train")


READERS = {
    "iharmony4": _iharmony4,
    "photos": partial(_side_by_side, part="real"),
    "imaterialist": _imaterialist,
    "realhm": _realhm,
    "dih99": partial(_side_by_side, part="composite", subset="DIH99"),
}


def imaterialist_pairs(root, out, workers: int | None = None) -> tuple[list[tuple[Path, Path]], list[str]]:
    """iMaterialist-fashion-2020 as (image, mask) paths, and a line on each photo that is left out for its bad rows,
    another size than they say or an EXIF turn that its mask does not share.

    The union masks (Sec. 5.1.2) are written to `out`; `sets.clean_photos` leaves the product-only photos out. Raises
    HarmonyError for a train.csv that cannot be read, or where no photo is left.
    """
    found = scan(root, "imaterialist")
    results = list(parallel_map(partial(_write_union, Path(out)), found, "union masks", "photo", workers))
    pairs, left_out = ([result for result in results if isinstance(result, kind)] for kind in (tuple, str))
    if not pairs:
        raise HarmonyError(left_out[0] if left_out else f"{root}: no photos here; see data/README.md")
    return pairs, left_out


def _write_union(out: Path, triple: Triple | HarmonyError) -> tuple[Path, Path] | str:
    try:
        if isinstance(triple, HarmonyError):
            raise triple
        mask, photo = triple.read_mask(), open_image(triple.real)
        if orientation(photo) > 1:
            return f"{triple.real}: turned by its EXIF orientation, its mask is not; save it upright"
        if photo.size != mask.shape[::-1]:
            found, said = "x".join(map(str, photo.size)), "x".join(map(str, mask.shape[::-1]))
            return f"{triple.real}: is {found}, {triple.mask} says {said}"
    except HarmonyError as error:
        return str(error)
    write_image(out / f"{triple.name}.png", mask)
    return triple.real, out / f"{triple.name}.png"
