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
from pathlib import Path

from PIL import Image

from ..core.errors import HarmonyError
from ..core.images import paste, read_image, resize_image, resize_mask, write_image
from ..core.json_files import write_json
from ..core.progress import progress
from ..core.seeds import rng
from ..data.embedded_photos import Photo, load_photos, random_crop
from ..data.layout import COMPOSITES, MASKS, REALS, plain_name, read_triples, write_list, write_pair
from ..data.readers import imaterialist_pairs, photo_pairs
from .candidates import (
    Candidate,
    Choice,
    Pair,
    by_pair,
    check_inputs,
    has_latent_foreground,
    pairs_of,
    read_candidates,
    read_manifest,
    scaled,
)

SUMMARY = "made_by_harmonylib.json"  # only folders that hold it are ever replaced
TEST_SHARE = Fraction(7404, 73146)  # iHarmony4's
HUMAN = "HumanHarmony"
BORDER = 0.05  # share of the shorter side that counts as a photo's border


def mix_count(gamma: float, n_composites: int, n_pairs: int, k: int | None = None) -> int:
    """⌈γ N₂ / N₁⌉ generated composites per (real, mask) pair (Sec. 4.1).

    γ counts as written in decimals: 0.1 is exactly 1/10. k: candidates there are per pair. Raises HarmonyError for
    gamma < 0, no pairs, or a count above k.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise HarmonyError(f"gamma is {gamma}; it must be a number >= 0")
    if n_pairs < 1:
        raise HarmonyError("there are no (real, mask) pairs to mix into; the training list is empty")
    count = math.ceil(Fraction(str(gamma)) * n_composites / n_pairs)
    if k is not None and count > k:
        raise HarmonyError(
            f"gamma {gamma} asks for {count} generated composites per pair ({n_composites} composites, {n_pairs} "
            f"pairs) but there are {k}; lower gamma or raise k"
        )
    return count


def mix(root, candidates_root, out, gamma: float, seed: int, subsets=None, strength=(0.0, float("inf")),
        leave_out=()) -> dict:  # fmt: skip
    """Write the training set of `root` plus `mix_count` candidates of each (real, mask) pair, in iHarmony4's layout.

    N₁ and N₂ are counted on the training list, per subset; which candidates is drawn from (seed, pair), and a larger
    gamma keeps those of a smaller one. subsets limits both lists; the test list stays as it is. Candidates of another
    size are brought to the real's, its background pasted back. strength: bounds on their foreground ΔE. leave_out: keys
    of pairs that get nothing (too small for the latent grid) but count in N₁ and N₂.
    Returns {subset: {"pairs", "composites", "per_pair", "generated"}}. Raises HarmonyError for an empty list, a bad
    gamma or a pair with too few usable candidates, before anything is written.
    """
    train = read_triples(root, "train", subsets)
    test = read_triples(root, "test", subsets) if Path(root, "IHD_test.txt").is_file() else []
    candidates = by_pair(read_candidates(candidates_root, strength)) if gamma else {}
    k = read_manifest(candidates_root)["settings"]["k"] if gamma else None
    report, chosen = {}, []
    for subset in dict.fromkeys(triple.subset for triple in train):
        composites = [triple for triple in train if triple.subset == subset]
        pairs = pairs_of(composites)
        count = mix_count(gamma, len(composites), len(pairs), k)
        usable = [pair for pair in pairs if pair.key not in leave_out]
        chosen += [(pair, c) for pair in usable for c in _draw(candidates.get(pair.key, []), pair, count, gamma, seed)]
        report[subset] = {"pairs": len(pairs), "composites": len(composites), "per_pair": count,
                          "generated": count * len(usable)}  # fmt: skip
    if {triple.name for triple in train} & {candidate.path.stem for _, candidate in chosen}:
        raise HarmonyError(f"{root}: has generated composites already; mix into the original set")
    if chosen:
        check_inputs(candidates_root, dict.fromkeys(pair for pair, _ in chosen))
    with _replacing(out, root, candidates_root) as folder:
        lines = [_add(folder, candidate, pair) for pair, candidate in progress(chosen, desc="mixing", unit="image")]
        for triple in (*train, *test):
            for path in (triple.composite, triple.mask, triple.real):
                _link(path, folder / triple.subset / path.parent.name / path.name)
        write_list(folder, "train", [*train, *lines])
        if test:
            write_list(folder, "test", test)
        write_json(folder / SUMMARY, {"gamma": gamma, "seed": seed, "strength": list(strength), "subsets": report})
    return report


def _draw(group: list[Candidate], pair: Pair, count: int, gamma: float, seed: int) -> list[Candidate]:
    if count > len(group):
        raise HarmonyError(
            f"{'/'.join(pair.key)}: gamma {gamma} asks for {count} generated composites but {len(group)} are usable; "
            "lower gamma, raise k or widen the strength bounds"
        )
    return [group[i] for i in sorted(rng(seed, "mix", *pair.key).permutation(len(group))[:count])]


def _add(folder: Path, candidate: Candidate, pair: Pair) -> str:
    """Put one candidate into the set at the real's size; returns its list line."""
    line = f"{pair.subset}/{COMPOSITES}/{candidate.path.name}"
    if _size(candidate.path) == _size(pair.real):
        _link(candidate.path, folder / line)
    else:
        real, mask = pair.load()
        write_image(folder / line, paste(resize_image(read_image(candidate.path), mask.shape), real, mask))
    return line


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:
        return file.size


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


@contextlib.contextmanager
def _replacing(out, *sources):
    """Yield a new folder beside `out` that takes its place on success and vanishes on failure."""
    out = Path(out).resolve()
    for source in sources:
        source = Path(source).resolve()
        if out == source or out in source.parents:
            raise HarmonyError(f"{out}: holds what the new set is made from; choose another folder")
    if out.exists() and not (out / SUMMARY).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise HarmonyError(f"{out}: exists and was not made by this command; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(temporary / "old")
        folder.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def photo_pairs_of(paths: list[tuple[Path, Path]], subset: str = HUMAN) -> list[Pair]:
    """Pairs of photos with one mask each, (image, mask) paths as from `readers.photo_pairs`.

    The photo's name is its stem with "-" turned into "_", since the layout reads a scene's name before the first "-";
    stems that occur in several folders get their folder's name first. Raises HarmonyError when two are still alike.
    """
    stems = Counter(image.stem for image, _ in paths)
    names = [i.stem if stems[i.stem] == 1 else f"{i.parent.parent.name}_{i.stem}" for i, _ in paths]
    names = [name.replace("-", "_") for name in names]
    for name, count in Counter(names).items():
        if count > 1:
            raise HarmonyError(f"{count} photos are named {name} ('-' read as '_'); rename them")
    return [Pair(subset, f"{name}_1", name, *files) for name, files in zip(names, paths, strict=True)]


def clean_photos(pairs: list[Pair], size: int | None = None, factor: int = 8, foreground=(0.01, 0.95), min_side=64,
                 min_border_std=6.0) -> tuple[list[Pair], dict[str, list[str]]]:  # fmt: skip
    """Leave out photos that cannot teach harmonization; returns (kept, {reason: names}).

    Reasons: "small" (a side under min_side pixels), "foreground" (share outside the bounds, or nothing left on the
    latent grid at `size`, `factor` pixels a cell) and "plain" (the border outside the foreground varies by less than
    min_border_std grey levels: product shots, which the paper removed by means it does not tell, and studio backdrops).
    Raises HarmonyError when no photo is left.
    """
    kept, dropped = [], {"small": [], "foreground": [], "plain": []}
    for pair in progress(pairs, desc="cleaning", unit="photo"):
        real, mask = pair.load()
        width = max(1, round(BORDER * min(mask.shape)))
        border = ~mask
        border[width:-width, width:-width] = False
        small = resize_mask(mask, scaled(mask.shape, size))
        if min(mask.shape) < min_side:
            dropped["small"].append(pair.name)
        elif not (foreground[0] <= mask.mean() <= foreground[1] and has_latent_foreground(small, factor)):
            dropped["foreground"].append(pair.name)
        elif not border.any() or real[border].std(0).mean() < min_border_std:
            dropped["plain"].append(pair.name)
        else:
            kept.append(pair)
    if not kept:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in dropped.items())
        raise HarmonyError(f"no photo is left after cleaning ({reasons}); give others or a larger size")
    return kept, dropped


def human_photos(settings, folder, seed: int) -> tuple[list[Pair], dict[str, tuple[str, str]], set[str] | None]:
    """What the settings section `human_harmony` asks for: (pairs, photo -> (source, licence), test photos or None).

    source "embedded": settings.pairs crops of the packages' portraits (`portrait_pairs`), tested on those that the
    benchmark tests on; "photos" or "imaterialist": the folder settings.path, as `readers` reads it. What has to be
    written goes below `folder`. Raises HarmonyError for an unknown source.
    """
    if settings.source == "embedded":
        portraits = [photo for photo in load_photos() if photo.portrait]
        pairs = portrait_pairs(portraits, folder, settings.pairs, seed)
        sources = {plain_name(photo.name): (photo.credit, photo.licence) for photo in portraits}
        return pairs, sources, {plain_name(photo.name) for photo in portraits if photo.split == "test"}
    if settings.source not in ("photos", "imaterialist") or not settings.path:
        raise HarmonyError(
            f"params.yaml: human_harmony.source {settings.source!r}, path {settings.path!r}: the source is embedded, "
            "or photos or imaterialist with the path of its folder"
        )
    if settings.source == "photos":
        found, origin = photo_pairs(settings.path), ("own photos", "not stated")
    else:
        found = imaterialist_pairs(settings.path, Path(folder, MASKS))
        origin = ("iMaterialist-fashion-2020 (FGVC7)", "see the competition's rules; research use")
    pairs = photo_pairs_of(found)
    return pairs, dict.fromkeys((pair.photo for pair in pairs), origin), None


def portrait_pairs(portraits: list[Photo], folder, crops: int, seed: int) -> list[Pair]:
    """Write `crops` random windows around the person of each portrait in turn below `folder`, and return their pairs.

    All windows of a portrait are one photo: its name stands before the "-" of theirs. Raises HarmonyError for crops
    under one.
    """
    if crops < 1:
        raise HarmonyError(f"params.yaml: human_harmony.pairs is {crops}; the embedded portraits need at least 1")
    pairs = []
    for number in range(crops):
        photo = portraits[number % len(portraits)]
        stem = f"{plain_name(photo.name)}-{number // len(portraits):03d}"
        window = random_crop(photo.image, photo.masks["person"], rng(seed, "human harmony", stem))
        name = write_pair(folder, HUMAN, stem, 1, *window, ".png")
        files = (Path(folder, HUMAN, part, f"{file}.png") for part, file in ((REALS, stem), (MASKS, name)))
        pairs.append(Pair(HUMAN, name, plain_name(photo.name), *files))
    return pairs


def build_human_harmony(pairs: list[Pair], choices: list[Choice], out, seed: int, size: int | None = None,
                        sources: dict[str, tuple[str, str]] | None = None, test: set[str] | None = None,
                        dropped: dict[str, list[str]] | None = None) -> dict:  # fmt: skip
    """Write real photos, masks and the chosen candidates as an iHarmony4-layout set with a data card (README.md).

    pairs and size as in `generate_candidates`, choices from `select`. The photos of the test list are `test`, or else
    drawn by iHarmony4's share (7,404 of 73,146). Reals are written at the candidates' size and in their format, so that
    no codec tells the two apart. sources: photo name -> (source, licence); dropped as from `clean_photos`: both for the
    card. Returns the counts that it shows. Raises HarmonyError for a list without photos, a choice without its pair or
    a candidate of another size.
    """
    known = {pair.key: pair for pair in pairs}
    if lost := [choice.kept.path for choice in choices if choice.kept.key not in known]:
        raise HarmonyError(f"{lost[0]}: chosen, but its pair is not given; give the pairs it was made from")
    photos = sorted({known[choice.kept.key].photo for choice in choices})
    rule = "as the embedded photos are" if test else "by iHarmony4's share (7,404 test images of 73,146)"
    if test is None:
        count = max(1, round(len(photos) * TEST_SHARE))
        test = set(rng(seed, "human harmony", "split").permutation(photos)[:count].tolist())
    if not 0 < len(test & set(photos)) < len(photos):
        empty = "training" if test & set(photos) else "test"
        raise HarmonyError(f"{out}: the {empty} list has no photo left of {len(photos)}; add some")
    lists, large = {"train": [], "test": []}, 0
    made_from = {c.kept.path.parent for c in choices} | {pair.real.parent for pair in pairs}
    with _replacing(out, *made_from) as folder:
        for choice in progress(choices, desc="Human Harmony", unit="image"):
            pair, kept = known[choice.kept.key], choice.kept
            real, mask = pair.load(size)
            if _size(kept.path) != mask.shape[::-1]:
                found = "{}x{}".format(*_size(kept.path))
                raise HarmonyError(f"{kept.path}: is {found}, not {mask.shape[1]}x{mask.shape[0]}; give its own size")
            write_pair(folder, pair.subset, *pair.name.rsplit("_", 1), real, mask, kept.path.suffix)
            line = f"{pair.subset}/{COMPOSITES}/{kept.path.name}"
            _link(kept.path, folder / line)
            lists["test" if pair.photo in test else "train"].append(line)
            large += bool(mask.mean() > 0.2)
        for split, lines in lists.items():
            write_list(folder, split, lines)
        counts = {"photos": len(photos), "composites": len(choices), **{s: len(lines) for s, lines in lists.items()},
                  "foreground_over_0.2": large / len(choices)}  # fmt: skip
        origins = Counter((sources or {}).get(photo, ("not stated", "not stated")) for photo in photos)
        (folder / "README.md").write_text(_card(counts, origins, choices, rule, dropped or {}), encoding="utf-8")
        write_json(folder / SUMMARY, {"seed": seed, "size": size, **counts})
    return counts


def _card(counts: dict, origins: dict, choices: list[Choice], rule: str, dropped: dict) -> str:
    numbers = sorted({1 + len(choice.rejected) for choice in choices})
    drawn = " to ".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))
    left_out = ", ".join(f"{len(names)} {reason}" for reason, names in dropped.items() if names) or "nothing"
    rows = "\n".join(f"| {source} | {licence} | {n:,} |" for (source, licence), n in sorted(origins.items()))
    return f"""# Human Harmony

Real photos of people and, for each, a composite whose foreground colours an inverse harmonization model changed. The
real photo is the ground truth of its composite. Layout and list files are iHarmony4's.

| photos | composites | training list | test list | foreground over a fifth |
|---|---|---|---|---|
| {counts["photos"]:,} | {counts["composites"]:,} | {counts["train"]:,} | {counts["test"]:,} | \
{counts["foreground_over_0.2"]:.0%} |

Cleaning left out: {left_out}. For each photo and mask the model drew {drawn} usable candidates, and the harmony
classifier kept the one it found most likely to be a composite. Backgrounds are the photo's own. Photos, not composites,
were split {rule}.

| source | licence of the photos | photos |
|---|---|---|
{rows}

Composites are derived from these photos and stay under their licences; where these allow research only, so does the
set. The photos show people: do not use the set to identify them.
"""
