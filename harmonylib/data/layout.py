"""iHarmony4's layout on disk: `<subset>/{composite_images,masks,real_images}/` and `IHD_train.txt`, `IHD_test.txt`.

A composite `a0002_1_4.jpg` belongs to the mask `a0002_1.png` and to the real photo `a0002.jpg`. Names before the first
"-" are the scene: `d90000008-3` and `d90000008-7` are captures of one scene and never independent photos.
"""

import codecs
import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..core.decoding import pictures_in
from ..core.errors import HarmonyError
from ..core.files import as_written, atomic_path, composed, stem_of
from ..core.images import read_image, read_mask, write_image

SUBSETS = ("HCOCO", "HAdobe5k", "HFlickr", "Hday2night")
SPLITS = ("train", "test")
COMPOSITES, MASKS, REALS = "composite_images", "masks", "real_images"


@dataclass(frozen=True)
class Triple:
    """A composite, its real photo, or both (a data set may lack either), with the mask of the foreground.

    mask: a file, or `readers.Runs`. split: "train", "test" or "" (the data set has none).
    """

    subset: str
    name: str
    composite: Path | None
    mask: Path
    real: Path | None
    split: str = field(default="", compare=False)

    @property
    def pair(self) -> tuple[str, str]:
        """The (real, mask) pair this composite belongs to, as (subset, mask stem)."""
        return self.subset, self.mask.stem

    @property
    def photo(self) -> str:
        """The photo (scene) the triple comes from: what intervals are bootstrapped over."""
        return self.real.stem.split("-")[0]

    def read_mask(self) -> np.ndarray:
        """HxW bool."""
        return read_mask(self.mask) if isinstance(self.mask, Path) else self.mask.decode()

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(composite HxWx3 uint8, mask HxW bool, real HxWx3 uint8). Raises HarmonyError where sizes differ."""
        composite, mask, real = read_image(self.composite), self.read_mask(), read_image(self.real)
        if not composite.shape[:2] == mask.shape == real.shape[:2]:
            sizes = f"{composite.shape[1::-1]}, {mask.shape[::-1]}, {real.shape[1::-1]}"
            raise HarmonyError(f"{self.composite}: composite, mask and real differ in size ({sizes}); make them equal")
        return composite, mask, real


def encoding_of(path) -> str:
    """UTF-8, or UTF-16 where a file begins with the mark that Windows writes."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_lines(path, unique: bool = True) -> list[str]:
    """The lines of a list file, stripped, with "/" for every backslash; unique: without empty lines and doubles.

    Raises HarmonyError for a file that is not text in `encoding_of` it.
    """
    try:
        text = Path(path).read_text(encoding_of(path))
    except UnicodeDecodeError:
        raise HarmonyError(f"{path}: not a UTF-8 text file; save it as one") from None
    lines = [line.strip().replace("\\", "/") for line in text.splitlines()]
    return list(dict.fromkeys(filter(None, lines))) if unique else lines


def list_lines(root, split: str) -> list[str] | None:
    """The lines of a split's list: IHD_<split>.txt at the root, or else of each <subset>/<subset>_<split>.txt.

    The latter may name composites without their folders. None where there is no list.
    """
    if Path(root, f"IHD_{split}.txt").is_file():
        return read_lines(Path(root, f"IHD_{split}.txt"))
    own = [p for p in sorted(Path(root).glob(f"*/*_{split}.txt")) if p.stem == f"{p.parent.name}_{split}"]
    lines = [f"{p.parent.name}/{COMPOSITES}/{line.split('/')[-1]}" for p in own for line in read_lines(p)]
    return lines if own else None


def pictures_of(root) -> Path:
    """Where the pictures of a set's lists are: its root, or the folder that a file ROOT in it names.

    Raises HarmonyError when ROOT names no folder.
    """
    pointer = Path(root, "ROOT")
    if not pointer.is_file():
        return Path(root)
    folder = "".join(read_lines(pointer)[:1])
    if not folder or not Path(folder).is_dir():
        raise HarmonyError(f"{pointer}: {folder!r} is no folder; write there where the pictures are")
    return Path(folder)


def plain_name(text: str) -> str:
    """`text` cut down to letters and digits, since the layout's file names give "-" and "_" a meaning."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def by_stem(folder: Path) -> tuple[dict[str, list[Path]], list[HarmonyError]]:
    """The pictures of a folder, which need not be there, by `stem_of`, and what `pictures_in` says of other files."""
    pictures, errors = pictures_in(folder) if folder.is_dir() else ((), [])
    return {stem: list(paths) for stem, paths in itertools.groupby(sorted(pictures, key=stem_of), stem_of)}, errors


def triple_of(root, line: str, split: str = "", listed=by_stem) -> Triple:
    """The triple of a line like `HFlickr/composite_images/f55_1_1.jpg`. Raises HarmonyError for a missing partner.

    listed: `by_stem`, cached where many lines are read.
    """
    path = Path(line)
    parts = path.parts[-3:]
    inside = parts[:1] not in (("..",), (path.anchor,)) and all(len(part.encode()) < 256 for part in parts)
    if not inside or len(parts) != 3 or parts[1] != COMPOSITES or path.stem.count("_") < 2:
        raise HarmonyError(f"{line!r} is not SUBSET/{COMPOSITES}/PHOTO_MASK_VARIANT.jpg; mend the list")
    composite = as_written(Path(root, *parts))
    if not composite.is_file():
        raise HarmonyError(f"{composite}: listed but missing; add the file or remove the line from the list")
    photo, number, _ = composite.stem.rsplit("_", 2)
    files = []
    for part, stem in ((MASKS, f"{photo}_{number}"), (REALS, photo)):
        found = listed(composite.parents[1] / part)[0].get(composed(stem), [])
        if not found:
            mend = "add the file or remove the line from the list"
            raise HarmonyError(f"{composite}: no {part}/{stem}.* for it; {mend}")
        if len(found) > 1:
            raise HarmonyError(f"{found[1]}: a second file beside {found[0].name}; keep the right one")
        files += found
    return Triple(parts[0], composite.stem, composite, *files, split)


def read_triples(root, split: str, subsets=None) -> list[Triple]:
    """The triples of one split ("train" or "test"), in list order, optionally of some subsets only.

    The lists are those of `list_lines`, the pictures those of `pictures_of`.
    Raises HarmonyError for a missing folder, list or partner file, or when nothing is left.
    """
    if not Path(root).is_dir():
        raise HarmonyError(f"{root}: no such data folder; see data/README.md")
    lines = list_lines(root, split)
    if lines is None:
        raise HarmonyError(f"{root}/IHD_{split}.txt: no such list; add it, or each subset's own <subset>_{split}.txt")
    pictures, listed = pictures_of(root), lru_cache(by_stem)
    triples = [triple_of(pictures, line, split, listed) for line in lines]
    triples = [t for t in triples if subsets is None or t.subset in subsets]
    if not triples:
        raise HarmonyError(f"{root}: the {split} list has no composites of {', '.join(subsets or SUBSETS)}")
    return triples


def write_list(root, split: str, lines) -> None:
    """Write IHD_<split>.txt from lines or triples."""
    lines = [f"{t.subset}/{COMPOSITES}/{t.composite.name}" if isinstance(t, Triple) else t for t in lines]
    with atomic_path(Path(root) / f"IHD_{split}.txt") as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_pair(root, subset: str, photo: str, mask_id: int, real: np.ndarray, mask: np.ndarray, suffix=".jpg") -> str:
    """Write a (real, mask) pair; returns the mask stem, `PHOTO_MASK`, that its composites are named after."""
    folder = Path(root) / subset
    write_image(folder / REALS / f"{photo}{suffix}", real)
    write_image(folder / MASKS / f"{photo}_{mask_id}.png", mask)
    return f"{photo}_{mask_id}"


def write_composite(root, subset: str, pair: str, variant, composite: np.ndarray, suffix=".jpg") -> str:
    """Write one composite of a pair; returns its list line."""
    write_image(Path(root) / subset / COMPOSITES / f"{pair}_{variant}{suffix}", composite)
    return f"{subset}/{COMPOSITES}/{pair}_{variant}{suffix}"
