"""Data sets made of generated composites: the γ-mix and Human Harmony (DiffHarmony++ Sec. 4.1, 4.2 and 5.1.2).

Both are written beside their final place and moved there when complete.
"""

import contextlib
import math
import os
import shutil
import tempfile
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Template
from PIL import Image
from skimage.data import lbp_frontal_face_cascade_filename
from skimage.feature import Cascade

from ..core.cache import file_digest, shared_array
from ..core.errors import HarmonyError
from ..core.images import paste, read_image, resize_image, shrink_pair, write_image
from ..core.json_files import write_json
from ..core.parallel import parallel_map
from ..core.progress import progress
from ..core.seeds import rng
from ..data.embedded_photos import Photo, load_photos, random_crop
from ..data.layout import COMPOSITES, MASKS, REALS, plain_name, read_triples, write_list, write_pair
from ..data.readers import imaterialist_pairs, photo_pairs
from .candidates import Pair, has_latent_foreground, pairs_of, read_candidates

SUMMARY = "made_by_harmonylib.json"  # only folders that hold it are ever replaced
TEST_SHARE = Fraction(7404, 73146)  # iHarmony4's
HUMAN = "HumanHarmony"
CARD = Path(__file__).with_name("data_card.md")
FACE_SIDE = 256  # pixels of the long side at which faces are looked for


def mix_count(gamma: float, n_composites: int, n_pairs: int) -> int:
    """⌈γ N₂ / N₁⌉ generated composites per (real, mask) pair (Sec. 4.1).

    γ counts as written in decimals: 0.1 is exactly 1/10. Raises HarmonyError for gamma < 0 or no pairs.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise HarmonyError(f"gamma is {gamma}; it must be a number >= 0")
    if n_pairs < 1:
        raise HarmonyError("there are no (real, mask) pairs to mix into; the training list is empty")
    return math.ceil(Fraction(str(gamma)) * n_composites / n_pairs)


def mix(root, candidates_root, out, gamma: float, seed: int, subsets=None, strength=(0.0, float("inf")),
        leave_out=()) -> dict:  # fmt: skip
    """Write the training set of `root` plus `mix_count` candidates of each (real, mask) pair, in iHarmony4's layout.

    N₁ and N₂ are counted on the training list, per subset; which candidates is drawn from (seed, pair), and a larger
    gamma keeps those of a smaller one. subsets limits both lists. Candidates of another size are brought to the real's,
    its background pasted back. strength: bounds on their foreground ΔE. leave_out: keys of pairs that get nothing (too
    small for the latent grid) but count in N₁ and N₂.
    Returns {subset: {"pairs", "composites", "per_pair", "generated"}}. Raises HarmonyError, before anything is written,
    for an empty list, a bad gamma, too few usable candidates of a pair, or a photo that changed after they were made.
    """
    train = read_triples(root, "train", subsets)
    test = read_triples(root, "test", subsets) if Path(root, "IHD_test.txt").is_file() else []
    candidates = read_candidates(candidates_root, strength).groupby(["subset", "pair"]) if gamma else []
    groups = {key: list(zip(rows["path"], rows["inputs"], strict=True)) for key, rows in candidates}
    report, chosen = {}, []
    for subset in dict.fromkeys(triple.subset for triple in train):
        composites = [triple for triple in train if triple.subset == subset]
        pairs = pairs_of(composites)
        count = mix_count(gamma, len(composites), len(pairs))
        numbers = {"pairs": len(pairs), "composites": len(composites), "per_pair": count, "generated": 0}
        for pair in [pair for pair in pairs if count and pair.key not in leave_out]:
            group = groups.get(pair.key, [])
            if count > len(group):
                raise HarmonyError(
                    f"{'/'.join(pair.key)}: gamma {gamma} asks for {count} generated composites but {len(group)} are "
                    "usable; lower gamma, raise k or widen the strength bounds"
                )
            if group[0][1] != pair.digest():
                again = "run `harmonylib generate` again"
                raise HarmonyError(f"{pair.real}: changed (or its mask did) after {candidates_root}; {again}")
            chosen += [(pair, group[i][0]) for i in sorted(rng(seed, "mix", *pair.key).permutation(len(group))[:count])]
            numbers["generated"] += count
        report[subset] = numbers
    if {triple.name for triple in train} & {path.stem for _, path in chosen}:
        raise HarmonyError(f"{root}: has generated composites already; mix into the original set")
    with _replacing(out, root, candidates_root) as folder:
        lines = []
        for pair, path in progress(chosen, desc="mixing", unit="image"):
            lines.append(f"{pair.subset}/{COMPOSITES}/{path.name}")
            if _size(path) == _size(pair.real):
                _link(path, folder / lines[-1])
            else:
                real, mask = pair.load()
                write_image(folder / lines[-1], paste(resize_image(read_image(path), mask.shape), real, mask))
        for triple in (*train, *test):
            for path in (triple.composite, triple.mask, triple.real):
                _link(path, folder / triple.subset / path.parent.name / path.name)
        write_list(folder, "train", [*train, *lines])
        if test:
            write_list(folder, "test", test)
        write_json(folder / SUMMARY, {"gamma": gamma, "seed": seed, "strength": list(strength), "subsets": report})
    return report


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:
        return file.size


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source, target)


@contextlib.contextmanager
def _replacing(out, *sources):
    """Yield a new folder beside `out` that takes its place on success and vanishes on failure."""
    out = Path(out).resolve()
    for source in map(Path, sources):
        if out in (source.resolve(), *source.resolve().parents):
            raise HarmonyError(f"{out}: holds what the new set is made from; choose another folder")
    if out.exists() and not (out / SUMMARY).is_file() and any(out.iterdir()):
        raise HarmonyError(f"{out}: exists and was not made by this command; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(temporary, "old"))
        folder.rename(out)


def photo_pairs_of(paths: list[tuple[Path, Path]], subset: str = HUMAN) -> list[Pair]:
    """Pairs of photos with one mask each, (image, mask) paths as from `readers.photo_pairs`.

    The photo's name is its stem with "-" turned into "_", since the layout reads a scene's name before the first "-";
    stems that occur in several folders get their folder's name first. Raises HarmonyError when two are still alike.
    """
    stems, pairs = Counter(image.stem for image, _ in paths), {}
    for image, mask in paths:
        name = image.stem if stems[image.stem] == 1 else f"{image.parent.parent.name}_{image.stem}"
        name = name.replace("-", "_")
        if name in pairs:
            raise HarmonyError(f"{image}: a second photo named {name} ('-' read as '_'); rename one")
        pairs[name] = Pair(subset, f"{name}_1", name, image, mask)
    return list(pairs.values())


def clean_photos(pairs: list[Pair], size: int | None = None, factor: int = 8, foreground=(0.01, 0.95), min_side=64,
                 faces=False) -> tuple[list[Pair], dict[str, list[str]]]:  # fmt: skip
    """Leave out photos that cannot teach harmonization; returns (kept, {reason: names}).

    Reasons: "small" (a side under min_side pixels), "foreground" (share outside the bounds, or nothing left on the
    latent grid at `size`, `factor` pixels a cell) and, with `faces`, "no face" (scikit-image's detector of frontal ones
    finds none: product shots, which the paper removed by means it does not tell, and people who turn away).
    Raises HarmonyError when no photo is left.
    """
    options = {"size": size, "factor": factor, "foreground": foreground, "min_side": min_side, "faces": faces}
    key = {"cleaning": [pair.digest() for pair in pairs], **options, "code": file_digest(__file__)}
    groups = {"kept": [], "small": [], "foreground": [], "no face": []}

    def fill(array, first, last):
        reasons = parallel_map(partial(_reason, **options), pairs[first:last], "cleaning", "photo")
        array[:] = [list(groups).index(reason) for reason in reasons]

    for pair, number in zip(pairs, shared_array(key, (len(pairs),), np.uint8, fill), strict=True):
        list(groups.values())[number].append(pair)
    kept = groups.pop("kept")
    dropped = {reason: [pair.name for pair in group] for reason, group in groups.items()}
    if not kept:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in dropped.items())
        raise HarmonyError(f"no photo is left after cleaning ({reasons}); give others or a larger size")
    return kept, dropped


def _reason(pair: Pair, size, factor, foreground, min_side, faces) -> str:
    real, mask = pair.load()
    if min(mask.shape) < min_side:
        return "small"
    if not (foreground[0] <= mask.mean() <= foreground[1] and has_latent_foreground(mask, factor, size)):
        return "foreground"
    return "kept" if not faces or has_face(real) else "no face"


def has_face(image) -> bool:
    """Whether a frontal face is found in HxWx3 uint8 (skimage.feature.Cascade, its own training file; 0.5 s)."""
    small, _ = shrink_pair(image, np.zeros(image.shape[:2], bool), FACE_SIDE)
    sizes = {"min_size": (24, 24), "max_size": (FACE_SIDE, FACE_SIDE)}
    detector = Cascade(lbp_frontal_face_cascade_filename())
    return bool(detector.detect_multi_scale(np.ascontiguousarray(small), scale_factor=1.2, step_ratio=1, **sizes))


def human_photos(settings, folder, seed: int):
    """What the settings section `human_harmony` asks for: (pairs, photo -> (source, licence), test photos or None, a
    line on each photo that cannot be used).

    source "embedded": settings.pairs crops of the packages' portraits (`portrait_pairs`), tested on those that the
    benchmark tests on; "photos" or "imaterialist": the folder settings.path, as `readers` reads it. What has to be
    written goes below `folder`.
    """
    if settings.source == "embedded":
        portraits = [photo for photo in load_photos() if photo.portrait]
        pairs = portrait_pairs(portraits, folder, settings.pairs, seed)
        sources = {plain_name(photo.name): (photo.credit, photo.licence) for photo in portraits}
        return pairs, sources, {plain_name(photo.name) for photo in portraits if photo.split == "test"}, []
    if settings.source == "photos":
        found, left_out, origin = photo_pairs(settings.path), [], ("own photos", "not stated")
    else:
        found, left_out = imaterialist_pairs(settings.path, Path(folder, MASKS))
        origin = ("iMaterialist-fashion-2020 (FGVC7)", "see the competition's rules; research use")
    pairs = photo_pairs_of(found)
    return pairs, dict.fromkeys((pair.photo for pair in pairs), origin), None, left_out


def portrait_pairs(portraits: list[Photo], folder, crops: int, seed: int) -> list[Pair]:
    """Write `crops` random windows around the person of each portrait in turn, and return their pairs.

    All windows of a portrait are one photo: its name stands before the "-" of theirs.
    """
    pairs = []
    for number in range(crops):
        photo = portraits[number % len(portraits)]
        stem = f"{plain_name(photo.name)}-{number // len(portraits):03d}"
        window = random_crop(photo.image, photo.masks["person"], rng(seed, "human harmony", stem))
        name = write_pair(folder, HUMAN, stem, 1, *window, ".png")
        files = (Path(folder, HUMAN, part, f"{file}.png") for part, file in ((REALS, stem), (MASKS, name)))
        pairs.append(Pair(HUMAN, name, plain_name(photo.name), *files))
    return pairs


def build_human_harmony(pairs: list[Pair], choices: pd.DataFrame, out, seed: int, size: int | None = None,
                        sources: dict[str, tuple[str, str]] | None = None, test: set[str] | None = None,
                        dropped: dict[str, list[str]] | None = None) -> dict:  # fmt: skip
    """Write real photos, masks and the chosen candidates as an iHarmony4-layout set with a data card (README.md).

    pairs and size as in `generate_candidates`, choices from `select`. The photos of the test list are `test`, or else
    drawn by iHarmony4's share (7,404 of 73,146). Reals are written at the candidates' size and in their format, so that
    no codec tells the two apart. sources: photo name -> (source, licence); dropped as from `clean_photos`: both for the
    card. Returns the counts that it shows. Raises HarmonyError for a list without photos.
    """
    of_pair = {pair.key: pair for pair in pairs}
    kept = [(of_pair[row.subset, row.pair], row.path) for row in choices[choices["kept"]].itertuples()]
    photos = sorted({pair.photo for pair, _ in kept})
    rule = "as the embedded photos are" if test else "by iHarmony4's share (7,404 test images of 73,146)"
    if test is None:
        count = max(1, round(len(photos) * TEST_SHARE))
        test = set(rng(seed, "human harmony", "split").permutation(photos)[:count].tolist())
    if not 0 < len(test & set(photos)) < len(photos):
        empty = "training" if test & set(photos) else "test"
        raise HarmonyError(f"{out}: the {empty} list has no photo left of {len(photos)}; add some")
    lists, large = {"train": [], "test": []}, 0
    made_from = {path.parent for pair, composite in kept for path in (pair.real, composite)}
    with _replacing(out, *made_from) as folder:
        for pair, composite in progress(kept, desc="Human Harmony", unit="image"):
            real, mask = pair.load(size)
            assert _size(composite) == mask.shape[::-1], f"{composite}: made at another size than {size}"
            write_pair(folder, pair.subset, *pair.name.rsplit("_", 1), real, mask, composite.suffix)
            line = f"{pair.subset}/{COMPOSITES}/{composite.name}"
            _link(composite, folder / line)
            lists["test" if pair.photo in test else "train"].append(line)
            large += bool(mask.mean() > 0.2)
        counts = {"photos": len(photos), "composites": len(kept)}
        for split, lines in lists.items():
            write_list(folder, split, lines)
            counts[split] = len(lines)
        counts["foreground_over_0.2"] = large / len(kept)
        drawn = choices.groupby(["subset", "pair"]).size()
        card = Template(CARD.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
            counts=counts,
            left_out=[f"{len(names)} {reason}" for reason, names in (dropped or {}).items() if names],
            drawn=sorted({drawn.min(), drawn.max()}),
            rule=rule,
            origins=Counter((sources or {}).get(photo, ("not stated", "not stated")) for photo in photos),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / SUMMARY, {"seed": seed, "size": size, **counts})
    return counts
