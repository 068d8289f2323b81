"""Where the benchmark comes from: the embedded photos, a folder of photos and masks, or iHarmony4 itself."""

import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
from skimage.metrics import peak_signal_noise_ratio

from ..core.decoding import IMAGE_SUFFIXES
from ..core.errors import HarmonyError
from ..core.files import atomic_path, stamp
from ..core.images import read_image, read_pair, resize_image
from ..core.parallel import parallel_map
from ..core.seeds import rng, seed_for
from .build import BenchmarkSettings, make_benchmark, shrink
from .embedded_photos import foreground_of_share, load_photos
from .layout import SPLITS, Triple, plain_name, read_triples, write_list
from .readers import Example, read_examples
from .recipes import DEFAULTS, RecipeSettings, foreground_delta_e, foreground_mse

TEST_SHARE = 0.1  # of a folder's photos
FEW = 50  # pairs a subset: with fewer there is no speaking of a distribution of sizes, and masks stay whole
PSNR_SIDE = 256  # pixels; the papers score composites at this size


@dataclass(frozen=True)
class PhotoFile:
    """A photo of a folder that reads like `embedded_photos.Photo`, decoded when asked for: folders of any size fit."""

    name: str
    split: str
    image_file: Path
    mask_file: Path | None
    mask_from: str = "auto"

    @property
    def image(self) -> np.ndarray:
        """HxWx3 uint8."""
        return self._decoded()[0]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """{"foreground": HxW bool}: its mask, or without one a superpixel of about a third of the picture.

        Raises HarmonyError for a mask of another size, an empty or a full one.
        """
        return {"foreground": self._decoded()[1]}

    def _decoded(self) -> tuple[np.ndarray, np.ndarray]:
        files = (self.image_file, self.mask_file) if self.mask_file else (self.image_file,)
        return _decode(self.image_file, self.mask_file, self.mask_from, *map(stamp, files))


@lru_cache(maxsize=8)
def _decode(image_file: Path, mask_file: Path | None, mask_from: str, *stamps) -> tuple[np.ndarray, np.ndarray]:
    if mask_file is None:
        image = read_image(image_file)
        everything = np.ones(image.shape[:2], dtype=bool)
        return image, foreground_of_share(image, everything, 1 / 3, seed_for("photo without a mask", image_file.name))
    image, mask = read_pair(image_file, mask_file, mask_from)
    if mask.all() or not mask.any():
        kind = "no background" if mask.all() else "no foreground"
        raise HarmonyError(f"{mask_file}: the mask has {kind} (white is foreground); mend it or remove the photo")
    return image, mask


def folder_photos(path, seed: int, index=None, mask_from: str = "auto") -> list[PhotoFile]:
    """The photos of `images/` + `masks/` below path, a seeded tenth (at least two) of them for the test split.

    index: a CSV with columns image, mask and split that names the photos and decides the split instead. Names are made
    plain (`layout.plain_name`) and unique. mask_from as in `decoding.mask_levels`. Where there is no folder `masks` at
    all, superpixels stand in for objects, and a line says so. Raises HarmonyError when there is no such folder, a photo
    has no mask, or there are fewer than four photos.
    """
    found = [] if index else _without_masks(Path(path))
    if found:
        print(f"{path}: no masks; pieces of the pictures (superpixels) stand in for objects", file=sys.stderr)
    found = found or read_examples(path, "photos", index)
    if len(found) < 4:
        raise HarmonyError(f"{path}: {len(found)} photos; give at least four, two for each split")
    tests = rng(seed, "test photos").permutation(len(found))[: max(2, round(TEST_SHARE * len(found)))]
    drawn = np.where(np.isin(np.arange(len(found)), tests), "test", "train").tolist()
    rows = zip(_labels(example.name for example in found), drawn, found, strict=True)
    return [PhotoFile(label, e.split or split, e.real, e.mask, mask_from) for label, split, e in rows]


def _without_masks(folder: Path) -> list[Example]:
    """The photos of a folder of `images/` at any depth beside which there is no `masks/`."""
    if any(path.is_dir() for path in folder.rglob("masks")):
        return []
    files = sorted(file for images in folder.rglob("images") for file in images.rglob("*"))
    return [Example("", None, f.stem, None, None, f) for f in files if f.suffix.lower() in IMAGE_SUFFIXES]


def _labels(stems) -> list[str]:
    labels, used = [], set()
    for number, stem in enumerate(stems):
        label = plain_name(stem) or "photo"
        while label.lower() in used:
            label += f"x{number}"
        used.add(label.lower())
        labels.append(label)
    return labels


def make_data(photos, out, index=None, pairs: int | None = None, variants: int = 1, size: int = 256, seed: int = 0,
              recipes: RecipeSettings = DEFAULTS, jitter: int = 0, force: bool = False, workers: int | None = None,
              mask_from: str = "auto"):  # fmt: skip
    """An iHarmony4-layout set at `out` made of whole photos with masks; rows as `build.make_benchmark`.

    index and mask_from as in `folder_photos`. pairs: photos per subset and split (None: all of them); variants:
    composites of each; size: long side in pixels; jitter as in `build.BenchmarkSettings`. Of fewer than FEW pairs the
    masks stay whole. A photo that cannot be used is left out: rows.attrs["left_out"] has a line of why for each. Raises
    HarmonyError where `out` exists (with force: where it is no data set) or holds the photos, or no photo can be used.
    """
    photos, out = Path(photos).resolve(), Path(out)
    if out.resolve() in (photos, *photos.parents):
        raise HarmonyError(f"{out}: holds the photos; choose another folder")
    if out.exists() and not (force and (out / "IHD_train.txt").is_file()):
        mend = "is no data set; choose another folder" if force else "exists; choose another folder or add --force"
        raise HarmonyError(f"{out}: {mend}")
    files = folder_photos(photos, seed, index, mask_from)
    problems = list(parallel_map(partial(_problem, size), files, "reading photos", "photo", workers))
    left_out = [problem for problem in problems if problem]
    files = [file for file, problem in zip(files, problems, strict=True) if not problem]
    if not files:
        raise HarmonyError(left_out[0])
    counts = [sum(file.split == split for file in files) for split in SPLITS]
    counts = counts if pairs is None else [min(pairs, count) for count in counts]
    how = {"min_crop": 1.0, "parts": max(counts) >= FEW, "jitter": jitter}
    amounts = BenchmarkSettings(*counts, variants, variants, size, **how)
    rows = make_benchmark(out, files, amounts, recipes, seed, workers=workers)
    rows.attrs["left_out"] = left_out
    return rows


def _problem(size: int, file: PhotoFile) -> str:
    """Why a photo cannot be used at `size`, or ""."""
    try:
        shrink(file, file.image, file.masks["foreground"], size)
    except HarmonyError as error:
        return str(error)
    return ""


def prepare(data, root, seed: int) -> pd.DataFrame:
    """Fill root with the benchmark that the settings section `data` asks for, replacing what is there.

    data.source: "embedded" and "photos" (a folder, data.path) make composites by our recipes; "iharmony4" writes only
    the lists, with the subsets of data.subsets, a file ROOT that names data.path, and a file PICTURES that changes with
    the pictures, so that what is made of them knows; numbers and sizes are then the data set's own.
    Returns one row per composite: subset, split, name, photo, plausible, tries (0: not ours), reason.
    Raises HarmonyError for an unknown source, a missing or unfit folder, or a broken list.
    """
    root = Path(root)
    if data.source == "embedded":
        return _make(root, load_photos(), data, seed)
    if data.source not in ("photos", "iharmony4"):
        raise HarmonyError(f"params.yaml: data.source {data.source!r} is unknown; use embedded, photos or iharmony4")
    path = _data_folder(data, root)
    return _make(root, folder_photos(path, seed), data, seed) if data.source == "photos" else _point(root, path, data)


def _data_folder(data, root: Path) -> Path:
    if not data.path:
        raise HarmonyError(f"params.yaml: data.source {data.source} needs data.path, the folder to read")
    path = Path(data.path).resolve()
    if not path.is_dir():
        raise HarmonyError(f"params.yaml: data.path {data.path}: no such folder; see data/README.md")
    if root.resolve() in (path, *path.parents):
        raise HarmonyError(f"params.yaml: data.path {data.path} lies in {root}, which this stage replaces; move it")
    return path


def _make(root: Path, photos, data, seed: int) -> pd.DataFrame:
    amounts = BenchmarkSettings(
        train_pairs=data.train_pairs,
        test_pairs=data.test_pairs,
        train_variants=data.train_variants,
        test_variants=data.test_variants,
        size=data.size,
        restyle_share=data.restyle_share,
    )
    recipes = RecipeSettings(transfers=data.transfers, clipped=data.clipped)
    return make_benchmark(root, photos, amounts, recipes, seed, data.subsets)


def _point(root: Path, path: Path, data) -> pd.DataFrame:
    triples = {split: read_triples(path, split, data.subsets) for split in SPLITS}
    shutil.rmtree(root, ignore_errors=True)
    for split in SPLITS:
        write_list(root, split, triples[split])
    with atomic_path(root / "ROOT") as temporary:
        temporary.write_text(f"{path}\n", encoding="utf-8")
    with atomic_path(root / "PICTURES") as temporary:
        temporary.write_text(f"{_digest(path, triples)}\n", encoding="utf-8")
    rows = pd.DataFrame([_about(triple, split) for split in SPLITS for triple in triples[split]])
    return rows.assign(plausible=True, tries=0, reason="")


def _digest(path: Path, triples: dict[str, list[Triple]]) -> str:
    """Of the names and sizes of all pictures below `path`: a look at each file, not into it."""
    files = {file for split in triples.values() for t in split for file in (t.composite, t.mask, t.real)}
    lines = [f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n" for file in sorted(files)]
    return blake2b("".join(lines).encode(), digest_size=16).hexdigest()


def _about(triple: Triple, split: str) -> dict:
    return {"subset": triple.subset, "split": split, "name": triple.name, "photo": triple.photo}


def measure(root, at_most: int, seed: int, workers: int | None = None) -> pd.DataFrame:
    """What the files of a benchmark hold: subset, split, name, photo, share, fmse, delta_e and psnr of composites.

    share: of the foreground in the picture; fmse and delta_e: mean squared and mean CIE76 difference of the foreground;
    psnr: of the whole composite, both pictures resized to 256 x 256.
    at_most: composites per subset and split, a seeded sample where there are more. Raises HarmonyError as Triple.load.
    """
    jobs = []
    for split in SPLITS:
        triples = read_triples(root, split)
        for subset in dict.fromkeys(t.subset for t in triples):
            own = [t for t in triples if t.subset == subset]
            picks = np.sort(rng(seed, "measure", subset, split).permutation(len(own))[:at_most])
            jobs += [(split, own[pick]) for pick in picks]
    return pd.DataFrame(parallel_map(_measure, jobs, "measuring composites", "composite", workers))


def _measure(job: tuple[str, Triple]) -> dict:
    split, triple = job
    composite, mask, real = triple.load()
    if not mask.any():
        raise HarmonyError(f"{triple.mask}: the mask has no foreground; remove its composites from the list")
    small = [resize_image(image, (PSNR_SIDE, PSNR_SIDE)) for image in (real, composite)]
    with np.errstate(divide="ignore"):  # equal pictures: infinity
        psnr = float(peak_signal_noise_ratio(*small, data_range=255))
    change = {"fmse": foreground_mse(real, composite, mask), "delta_e": foreground_delta_e(real, composite, mask)}
    return _about(triple, split) | {"share": float(mask.mean()), **change, "psnr": psnr}
