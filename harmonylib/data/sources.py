"""Where the benchmark comes from: the embedded photos, a folder of photos and masks, or iHarmony4 itself."""

import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.decoding import IMAGE_SUFFIXES
from ..core.errors import HarmonyError
from ..core.files import atomic_path
from ..core.images import read_image, read_pair
from ..core.parallel import parallel_map
from ..core.seeds import rng, seed_for
from .build import BenchmarkSettings, make_benchmark, mask_shares, shrink
from .embedded_photos import foreground_of_share, load_photos
from .layout import SPLITS, plain_name, read_triples, write_list
from .readers import read_examples
from .recipes import DEFAULTS, RecipeSettings

TEST_SHARE = 0.1  # of a folder's photos
FEW = 50  # pairs a subset: with fewer there is no speaking of a distribution of sizes, and masks stay whole


@dataclass(frozen=True, eq=False)
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
        return _decoded(self)[0]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """{"foreground": HxW bool}: its mask, or without one a superpixel of about a third of the picture.

        Raises HarmonyError for a mask of another size, an empty or a full one.
        """
        return {"foreground": _decoded(self)[1]}


@lru_cache(maxsize=8)
def _decoded(photo: PhotoFile) -> tuple[np.ndarray, np.ndarray]:
    if photo.mask_file is None:
        image = read_image(photo.image_file)
        seed = seed_for("photo without a mask", photo.image_file.name)
        return image, foreground_of_share(image, np.ones(image.shape[:2], bool), 1 / 3, seed)
    image, mask = read_pair(photo.image_file, photo.mask_file, photo.mask_from)
    if mask.all() or not mask.any():
        kind = f"no {'background' if mask.all() else 'foreground'} (white is foreground)"
        raise HarmonyError(f"{photo.mask_file}: the mask has {kind}; mend it or remove the photo")
    return image, mask


def folder_photos(path, seed: int, index=None, mask_from: str = "auto") -> list[PhotoFile]:
    """The photos of `images/` + `masks/` below path, a seeded tenth (at least two) of them for the test split.

    index: a CSV with columns image, mask and split that names the photos and decides the split instead. Names are made
    plain (`layout.plain_name`) and unique. mask_from as in `decoding.mask_levels`. Where there is no folder `masks` at
    all, superpixels stand in for objects, and a line says so. Raises HarmonyError when there is no such folder, a photo
    has no mask, or there are fewer than four photos.
    """
    images = [] if index or any(Path(path).rglob("masks/")) else sorted(Path(path).rglob("images/**/*"))
    found = [(file, None, "") for file in dict.fromkeys(images) if file.suffix.lower() in IMAGE_SUFFIXES]
    if found:
        print(f"{path}: no masks; pieces of the pictures (superpixels) stand in for objects", file=sys.stderr)
    found = found or [(triple.real, triple.mask, triple.split) for triple in read_examples(path, "photos", index)]
    if len(found) < 4:
        raise HarmonyError(f"{path}: {len(found)} photos; give at least four, two for each split")
    tests = set(rng(seed, "test photos").permutation(len(found))[: max(2, round(TEST_SHARE * len(found)))].tolist())
    photos, used = [], set()
    for number, (image, mask, split) in enumerate(found):
        label = plain_name(image.stem) or "photo"
        while label.lower() in used:
            label += f"x{number}"
        used.add(label.lower())
        photos.append(PhotoFile(label, split or ("test" if number in tests else "train"), image, mask, mask_from))
    return photos


def make_data(photos, out, index=None, pairs: int | None = None, variants: int = 1, size: int = 256, seed: int = 0,
              recipes: RecipeSettings = DEFAULTS, jitter: int = 0, force: bool = False, workers: int | None = None,
              mask_from: str = "auto", test_pairs: int | None = None):  # fmt: skip
    """An iHarmony4-layout set at `out` made of whole photos with masks; rows as `build.make_benchmark`.

    index and mask_from as in `folder_photos`. pairs: photos per subset and split (None: all of them), test_pairs: of
    the test split instead; variants: composites of each; size: long side in pixels; jitter as in
    `build.BenchmarkSettings`. Of fewer than FEW pairs the masks stay whole. A photo that cannot be used is left out:
    rows.attrs["left_out"] has a line of why for each. Raises HarmonyError where `out` exists (with force: where it is
    no data set) or holds the photos, or no photo can be used.
    """
    photos, out = Path(photos).resolve(), Path(out)
    if out.resolve() in (photos, *photos.parents):
        raise HarmonyError(f"{out}: holds the photos; choose another folder")
    if out.exists() and not (force and (out / "IHD_train.txt").is_file()):
        mend = "is no data set; choose another folder" if force else "exists; choose another folder or add --force"
        raise HarmonyError(f"{out}: {mend}")
    if not recipes.transfers:
        raise HarmonyError(f"all colour transfers are left out; keep some of {', '.join(DEFAULTS.transfers)}")
    files = folder_photos(photos, seed, index, mask_from)
    shares = list(parallel_map(partial(_shares_at, size), files, "reading photos", "photo", workers))
    left_out = [why for why in shares if isinstance(why, str)]
    usable = [(file, found) for file, found in zip(files, shares, strict=True) if not isinstance(found, str)]
    if not usable:
        raise HarmonyError(left_out[0])
    files, shares = zip(*usable, strict=True)
    counts = [sum(file.split == split for file in files) for split in SPLITS]
    wanted = (pairs, pairs if test_pairs is None else test_pairs)
    counts = [count if most is None else min(most, count) for most, count in zip(wanted, counts, strict=True)]
    how = {"min_crop": 1.0, "parts": max(counts) >= FEW, "jitter": jitter}
    amounts = BenchmarkSettings(*counts, variants, variants, size, **how)
    rows = make_benchmark(out, files, amounts, recipes, seed, workers=workers, shares=shares)
    rows.attrs["left_out"] = left_out
    return rows


def _shares_at(size: int, photo: PhotoFile) -> list[float] | str:
    """`build.mask_shares`, or why the photo cannot be used at `size`."""
    try:
        shrink(photo, photo.image, photo.masks["foreground"], size)
        return mask_shares(photo)
    except HarmonyError as error:
        return str(error)


def prepare(data, root, seed: int) -> pd.DataFrame:
    """Fill root with the benchmark that the settings section `data` asks for, replacing what is there.

    data.source: "embedded" and "photos" (a folder, data.path) make composites by our recipes; "iharmony4" writes only
    the lists, with the subsets of data.subsets, a file ROOT that names data.path, and a file PICTURES that changes with
    the pictures, so that what is made of them knows; numbers and sizes are then the data set's own.
    Returns one row per composite: subset, split, name, photo, plausible, tries (0: not ours), reason.
    Raises HarmonyError for a missing or unfit folder, or a broken list.
    """
    root = Path(root)
    if data.source == "embedded":
        photos = load_photos()
    else:
        path = _data_folder(data, root)
        if data.source == "iharmony4":
            return _point(root, path, data.subsets)
        photos = folder_photos(path, seed)
    names = ("train_pairs", "test_pairs", "train_variants", "test_variants", "size", "restyle_share")
    amounts = BenchmarkSettings(**{name: getattr(data, name) for name in names})
    recipes = RecipeSettings(transfers=data.transfers, clipped=data.clipped)
    return make_benchmark(root, photos, amounts, recipes, seed, data.subsets)


def _data_folder(data, root: Path) -> Path:
    path = Path(data.path).resolve()
    if not path.is_dir():
        raise HarmonyError(f"params.yaml: data.path {data.path}: no such folder; see data/README.md")
    if root.resolve() in (path, *path.parents):
        raise HarmonyError(f"params.yaml: data.path {data.path} lies in {root}, which this stage replaces; move it")
    return path


def _point(root: Path, path: Path, subsets) -> pd.DataFrame:
    triples = {split: read_triples(path, split, subsets) for split in SPLITS}
    files = sorted({file for split in SPLITS for t in triples[split] for file in (t.composite, t.mask, t.real)})
    looks = "".join(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n" for file in files)
    shutil.rmtree(root, ignore_errors=True)
    for split in SPLITS:
        write_list(root, split, triples[split])
    for name, line in (("PICTURES", blake2b(looks.encode(), digest_size=16).hexdigest()), ("ROOT", path)):
        with atomic_path(root / name) as temporary:
            temporary.write_text(f"{line}\n", encoding="utf-8")
    rows = [(t.subset, t.split, t.name, t.photo) for split in SPLITS for t in triples[split]]
    rows = pd.DataFrame(rows, columns=["subset", "split", "name", "photo"])
    return rows.assign(plausible=True, tries=0, reason="")
