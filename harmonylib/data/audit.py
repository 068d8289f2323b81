"""The audit of a data set: everything that would spoil a training or an evaluation, each with its file and its mend."""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.decoding import (
    IMAGE_SUFFIXES,
    MASK_THRESHOLD,
    UNLISTED,
    mask_levels,
    open_image,
    orientation,
    to_rgb,
    transparent,
)
from ..core.errors import HarmonyError
from ..core.files import is_hidden
from ..core.images import resize_image
from ..core.parallel import parallel_map
from .layout import SPLITS, all_lines, pictures_of
from .readers import Example, Runs, detect, scan

# Published composites (train, test); iHarmony4's from its paper, Human Harmony's from DiffHarmony++ Sec. 5.1.2.
PUBLISHED = {
    "HCOCO": (38545, 4283),
    "HAdobe5k": (19437, 2160),
    "HFlickr": (7449, 828),
    "Hday2night": (311, 133),
    "HumanHarmony": (26157, 2946),
}
NOISE = 10.0  # mean squared difference of a background; genuine triples reach 2.7, another JPEG pass at 75 adds 3.4
SOFT_SHARE = 0.01  # of a mask's pixels that may be neither black nor white
GREY = (16, 239)  # levels between which a mask is neither
FRAME_SHARE = 0.95  # of the outermost pixels in the foreground: a mask without a composite to judge it by is inverted
STRIP = 256  # rows that are compared at a time
HASH_SIDE = 16
HASH_BITS = 12  # of 256 that duplicates may differ in
HASH_COLOUR = 8  # levels that the mean colours of duplicates may differ by
SHOWN = 20  # findings of a kind that are printed


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; the message names the file and says how to mend it."""

    kind: str
    message: str


@dataclass(frozen=True)
class Audit:
    """What `audit` found. manifest: one row per readable example; counts: subset, split, composites, pairs, photos
    and published (composites; 0: no such number); notes: information, nothing wrong."""

    kind: str
    manifest: pd.DataFrame
    counts: pd.DataFrame
    findings: list[Finding]
    notes: list[str]

    def as_json(self) -> dict:
        """A plain dict of everything but the manifest."""
        return {
            "kind": self.kind,
            "counts": self.counts.to_dict("records"),
            "notes": self.notes,
            "by_kind": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def as_text(self) -> str:
        """What the command prints: counts, notes, and SHOWN findings of each kind."""
        lines = [f"data set of kind {self.kind}", self.counts.to_string(index=False), *self.notes]
        for kind, number in Counter(finding.kind for finding in self.findings).items():
            shown = [finding.message for finding in self.findings if finding.kind == kind][:SHOWN]
            more = [f"  and {number - SHOWN} more (--json has them all)"] if number > SHOWN else []
            lines += [f"{kind}: {number}", *(f"  {message}" for message in shown), *more]
        text = "\n".join([*lines, f"{len(self.findings)} findings" if self.findings else "nothing wrong"])
        return text.encode(errors="backslashreplace").decode()  # names that are not UTF-8


MANIFEST = ["subset", "split", "name", "composite", "mask", "real", "width", "height", "foreground_ratio", "digest"]


def audit(root, kind: str = "auto", workers: int | None = None, mask_from: str = "auto") -> Audit:
    """Read every file of a data set once, in `workers` processes (None: one a core), and report what is wrong.

    root and kind as in `readers.scan`, mask_from as in `decoding.mask_levels`. Finds unreadable files, missing
    partners, sizes that differ, pictures that are not plain 8-bit RGB, empty, full, inverted, soft, coloured and faint
    masks, backgrounds that differ beyond JPEG noise, composites equal to their real image, lines listed twice, and
    photos that stand in training and test.
    digest: blake2b of the composite's (else the photo's) bytes. Raises HarmonyError where there is no data set at all.
    """
    root = Path(root)
    kind = detect(root) if kind == "auto" else kind
    found = list(scan(root, kind))
    findings = [Finding("missing", str(item)) for item in found if isinstance(item, HarmonyError)]
    examples = [item for item in found if isinstance(item, Example)]
    findings += _repeated_lines(root) if kind == "iharmony4" else []
    groups: dict[Path, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.real or example.composite, []).append(example)
    rows, prints = [], {}
    inspect = partial(_inspect, mask_from=mask_from)
    for made, hashed, wrong in parallel_map(inspect, groups.values(), "reading pictures", "photo", workers):
        rows += made
        findings += wrong
        if hashed is not None:
            prints[made[0]["real"] or made[0]["composite"]] = (hashed, {row["split"] for row in made})
    findings += _shared_photos(prints)
    manifest = pd.DataFrame(rows, columns=MANIFEST)
    return Audit(kind, manifest, _counts(manifest, examples), findings, _notes(root, examples))


# ---- one photo with all its masks and composites, in a worker process ----


def _inspect(group: list[Example], mask_from: str) -> tuple[list[dict], np.ndarray | None, list[Finding]]:
    """(manifest rows, perceptual hash and mean colour of the photo, findings)."""
    findings: list[Finding] = []
    read = {}

    def pixels(source, reader) -> np.ndarray | None:
        """The array of a file, read once; None where it cannot be read."""
        if source is not None and source not in read:
            try:
                read[source], wrong = reader(source)
                findings.extend(wrong)
            except HarmonyError as error:
                read[source] = None
                findings.append(Finding("unreadable", str(error)))
        return read.get(source)

    rows = []
    for example in group:
        real, mask = pixels(example.real, _picture), pixels(example.mask, partial(_mask, mask_from=mask_from))
        composite = pixels(example.composite, _picture)
        read.pop(example.composite, None)  # the only one that no other example of the group needs
        parts = {example.real: real, example.mask: mask, example.composite: composite}
        if any(array is None for source, array in parts.items() if source is not None):
            continue
        findings += _compare(example, composite, mask, real)
        own = example.composite or example.real
        rows.append(
            {name: getattr(example, name) for name in ("subset", "split", "name")}
            | {part: _text(getattr(example, part)) for part in ("composite", "mask", "real")}
            | {"width": mask.shape[1], "height": mask.shape[0], "foreground_ratio": float(mask.mean())}
            | {"digest": blake2b(own.read_bytes(), digest_size=16).hexdigest()}
        )
    photo = real if group[0].real else composite
    return rows, None if photo is None or not rows else fingerprint(photo), findings


def _text(source) -> str:
    return source.source if isinstance(source, Runs) else str(source or "")


def _picture(path: Path) -> tuple[np.ndarray, list[Finding]]:
    image = open_image(path)
    odd = {
        "CMYK colours, which readers convert differently": image.mode == "CMYK",
        "more than 8 bits a channel": image.info["deep"] or image.mode.startswith(("I", "F")),
        "greyscale, so there is no colour to harmonize": image.mode in ("1", "L", "LA"),
        "transparent pixels": transparent(image),
        "turned by its EXIF orientation, which many readers ignore": orientation(image) > 1,
    }
    wrong = [Finding("format", f"{path}: {what}; save it as upright 8-bit RGB") for what, is_so in odd.items() if is_so]
    return np.asarray(to_rgb(image, path)), wrong


def _mask(source: Path | Runs, mask_from: str) -> tuple[np.ndarray, list[Finding]]:
    if isinstance(source, Runs):
        mask, wrong = source.decode(), []
    else:
        image = open_image(source)
        values, levels = np.asarray(to_rgb(image, source)), mask_levels(image, source, mask_from)
        mask, top = levels > MASK_THRESHOLD, int(levels.max(initial=0))
        grey = float(((levels >= GREY[0]) & (levels <= GREY[1])).mean())
        wrong = [
            ("mask", "transparent pixels; save it without an alpha channel", transparent(image)),
            ("mask", "turned by its EXIF orientation; save it upright", orientation(image) > 1),
            ("mask", "has colours; draw it in black and white", np.ptp(values, axis=-1).max() > 16),
            ("faint mask", f"its brightest value is {top}, white is above {MASK_THRESHOLD}; stretch it to 0 and 255",
             0 < top <= MASK_THRESHOLD),
            ("soft mask", f"{grey:.1%} of the pixels are grey; cut it at {MASK_THRESHOLD} and save it as PNG",
             grey > SOFT_SHARE and top > MASK_THRESHOLD),
        ]  # fmt: skip
    wrong = [Finding(kind, f"{source}: {text}") for kind, text, is_so in wrong if is_so]
    if not mask.any() and not wrong:
        wrong.append(Finding("empty mask", f"{_text(source)}: no foreground; draw it, or remove what uses it"))
    if mask.all():
        wrong.append(Finding("full mask", f"{_text(source)}: no background; redraw it, or remove what uses it"))
    return mask, wrong


def _compare(example: Example, composite, mask, real) -> list[Finding]:
    """Findings about the parts of one example beside each other."""
    present = [array for array in (composite, real) if array is not None]
    if any(array.shape[:2] != mask.shape for array in present):
        names = [_text(s) for s in (example.composite, example.mask, example.real) if s]
        sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (composite, mask, real) if a is not None]
        pairs = ", ".join(f"{Path(name).name} {size}" for name, size in zip(names, sizes, strict=True))
        return [Finding("size", f"{names[0]}: sizes differ ({pairs}); bring them to one size")]
    if mask.all() or not mask.any():
        return []
    if len(present) < 2:
        frame = np.ones_like(mask)
        frame[1:-1, 1:-1] = False
        if mask[frame].mean() > FRAME_SHARE:
            return [Finding("inverted mask", f"{_text(example.mask)}: white along the whole border; invert it")]
        return []
    sums = np.zeros(2)  # of background and foreground, a strip at a time: photos may have 24 megapixels
    for top in range(0, len(mask), STRIP):
        part = slice(top, top + STRIP)
        square = (composite[part].astype(np.float32) - real[part]).__pow__(2).mean(-1, dtype=np.float64)
        sums += np.bincount(mask[part].ravel(), square.ravel(), 2)
    outside, inside = (sums / np.bincount(mask.ravel(), minlength=2)).tolist()
    if outside > NOISE and inside <= NOISE:
        return [Finding("inverted mask", f"{_text(example.mask)}: what changed is the black part; invert it")]
    if outside > NOISE:
        text = f"its background differs from the real image's (MSE {outside:.1f}, over {NOISE:g}); paste the real one's"
        return [Finding("background", f"{example.composite}: {text}")]
    if not sums.any():
        return [Finding("unchanged", f"{example.composite}: equals its real image; make it anew or remove it")]
    return []


# ---- across the whole set ----


def fingerprint(photo: np.ndarray) -> np.ndarray:
    """Difference hash (horizontal, 256 bits as 32 bytes) and mean colour (3 bytes)."""
    small = resize_image(photo, (HASH_SIDE, HASH_SIDE + 1)).astype(np.int16)
    bits = np.packbits(np.diff(small.sum(-1), axis=1) > 0)
    return np.concatenate([bits, small.mean((0, 1)).round().astype(np.uint8)])


def mirrored_bits(bits: np.ndarray) -> np.ndarray:
    """The 32 bytes of a fingerprint's hash as the mirror image's: rows run backwards, and what rose falls."""
    return np.packbits(1 - np.unpackbits(bits).reshape(HASH_SIDE, HASH_SIDE)[:, ::-1])


def _shared_photos(prints: dict[str, tuple[np.ndarray, set[str]]]) -> list[Finding]:
    """Photos of the test split that are, or look like, one of the training split or its mirror image."""
    names = {split: [name for name, (_, splits) in prints.items() if split in splits] for split in SPLITS}
    if not all(names.values()):
        return []
    train, test = (np.stack([prints[name][0] for name in names[split]]) for split in SPLITS)
    findings = []
    for name, own in zip(names["test"], test, strict=True):
        colours = np.abs(train[:, -3:].astype(np.int16) - own[-3:]).max(1)
        as_it_is, mirrored = (
            np.bitwise_count(train[:, :-3] ^ bits).sum(1) for bits in (own[:-3], mirrored_bits(own[:-3]))
        )
        for twin in np.flatnonzero((np.minimum(as_it_is, mirrored) <= HASH_BITS) & (colours <= HASH_COLOUR)):
            other, turned_over = names["train"][twin], " mirrored" if mirrored[twin] < as_it_is[twin] else ""
            same = f"looks like {other} of the training split{turned_over}"
            same = "is in the training split, too" if other == name else same
            findings.append(Finding("train and test", f"{name}: {same}; keep it in one of them"))
    return findings


def _repeated_lines(root: Path) -> list[Finding]:
    """Composites that stand twice in one list, or in the training and the test list of one folder."""
    findings, seen = [], {}
    for path in sorted((*root.glob("IHD_*.txt"), *root.glob("*/*_train.txt"), *root.glob("*/*_test.txt"))):
        for number, line in enumerate(all_lines(path), start=1):
            key = path.parent, Path(line).parts[-3:]
            if key in seen:
                text = f"{path}, line {number}: {line} is in {seen[key]} already; remove one of them"
                findings.append(Finding("listed twice", text))
            elif line:
                seen[key] = f"{path.name}, line {number}"
    return findings


def _counts(manifest: pd.DataFrame, examples: list[Example]) -> pd.DataFrame:
    listed = Counter((example.subset, example.split) for example in examples)
    rows = []
    for (subset, split), number in listed.items():
        own = manifest[(manifest["subset"] == subset) & (manifest["split"] == split)]
        published = PUBLISHED.get(subset, (0, 0))[split == "test"] if split else 0
        rows.append([subset, split, number, own["mask"].nunique(), own["real"].nunique(), published])
    return pd.DataFrame(rows, columns=["subset", "split", "composites", "pairs", "photos", "published"])


def _notes(root: Path, examples: list[Example]) -> list[str]:
    used = {source for e in examples for source in (e.composite, e.mask, e.real) if isinstance(source, Path)}
    files = {p for p in pictures_of(root).rglob("*") if p.is_file() and p.suffix.lower() not in UNLISTED}
    files = {p for p in files if not is_hidden(p, pictures_of(root))} - used
    notes = []
    for text, chosen in (
        ("pictures belong to no example", {p for p in files if p.suffix.lower() in IMAGE_SUFFIXES}),
        ("files are of no type that is read", {p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES}),
    ):
        if chosen:
            notes.append(f"{len(chosen)} {text}, for example {min(chosen)}")
    return notes
