"""The audit of a data set: everything that would spoil a training or an evaluation, each with its file and its mend."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from skimage.metrics import peak_signal_noise_ratio

from ..core import decoding
from ..core.errors import HarmonyError
from ..core.files import is_hidden
from ..core.images import resize_image
from ..core.parallel import parallel_map
from .layout import SPLITS, Triple, pictures_of, read_lines
from .readers import Runs, detect, scan
from .recipes import foreground_delta_e, foreground_mse

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
HASH_SIDE = 16
HASH_BITS = 12  # of 256 that duplicates may differ in
HASH_COLOUR = 8  # levels that the mean colours of duplicates may differ by
PSNR_SIDE = 256  # pixels; the papers score composites at this size
SHOWN = 20  # findings of a kind that are printed


class Finding(NamedTuple):
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
        found = {"kind": self.kind, "counts": self.counts.to_dict("records"), "notes": self.notes}
        found["by_kind"] = Counter(finding.kind for finding in self.findings)
        return found | {"findings": [finding._asdict() for finding in self.findings]}

    def as_text(self) -> str:
        """What the command prints: counts, notes, and SHOWN findings of each kind."""
        lines = [f"data set of kind {self.kind}", self.counts.to_string(index=False), *self.notes]
        for kind, number in self.as_json()["by_kind"].items():
            messages = [finding.message for finding in self.findings if finding.kind == kind]
            lines += [f"{kind}: {number}", *(f"  {message}" for message in messages[:SHOWN])]
            lines += [f"  and {number - SHOWN} more (--json has them all)"] * (number > SHOWN)
        text = "\n".join([*lines, f"{len(self.findings)} findings" if self.findings else "nothing wrong"])
        return text.encode(errors="backslashreplace").decode()  # names that are not UTF-8


MANIFEST = ["subset", "split", "name", "composite", "mask", "real", "width", "height", "foreground_ratio", "digest"]
MANIFEST += ["fmse", "delta_e", "psnr"]


def audit(root, kind: str = "auto", workers: int | None = None, mask_from: str = "auto") -> Audit:
    """Read every file of a data set once, in `workers` processes (None: one a core), and report what is wrong.

    root and kind as in `readers.scan`, mask_from as in `decoding.mask_levels`. Finds unreadable files, missing
    partners, sizes that differ, pictures that are not plain 8-bit RGB, empty, full, inverted, soft, coloured and faint
    masks, backgrounds that differ beyond JPEG noise, composites equal to their real image, lines listed twice, and
    photos that stand in training and test.
    In the manifest digest is blake2b of the composite's (else the photo's) bytes, fmse and delta_e are the mean squared
    and the mean CIE76 difference of the foreground, and psnr is that of the whole composite, both pictures resized to
    256 x 256; nan where there are not both. Raises HarmonyError where there is no data set at all.
    """
    root = Path(root)
    kind = detect(root) if kind == "auto" else kind
    findings, triples, photos = [], [], {}
    for item in scan(root, kind):
        if isinstance(item, HarmonyError):
            findings.append(Finding("missing", str(item)))
        else:
            triples.append(item)
            photos.setdefault(item.real or item.composite, []).append(item)
    findings += _repeated_lines(root) if kind == "iharmony4" else []
    read = parallel_map(partial(_inspect, mask_from=mask_from), photos.items(), "reading pictures", "photo", workers)
    rows, prints, found = zip(*read, strict=True) if photos else ((), (), ())
    findings += itertools.chain(*found)
    manifest = pd.DataFrame(itertools.chain(*rows), columns=MANIFEST)
    splits = [{triple.split for triple in group} for group in photos.values()]
    looks = [look for look in zip(photos, splits, prints, strict=True) if look[-1] is not None]
    return Audit(kind, manifest, _counts(manifest, triples), findings + _shared_photos(looks), _notes(root, triples))


# ---- one photo with all its masks and composites, in a worker process ----


def _inspect(group: tuple[Path, list[Triple]], mask_from: str) -> tuple[list[tuple], np.ndarray | None, list[Finding]]:
    """(rows of MANIFEST, `fingerprint` of the photo, findings)."""
    (photo, triples), rows, findings, look = group, [], [], None

    @lru_cache(maxsize=3)  # a photo, one of its masks and one of their composites
    def pixels(source, read: Callable) -> np.ndarray | None:
        try:
            array, wrong = read(source)
        except HarmonyError as error:
            array, wrong = None, [Finding("unreadable", str(error))]
        findings.extend(wrong)
        return array

    read_mask = partial(_mask, mask_from=mask_from)
    for triple in sorted(triples, key=lambda triple: str(triple.mask)):
        files = {triple.real: _picture, triple.mask: read_mask, triple.composite: _picture}
        arrays = {source: pixels(source, read) for source, read in files.items() if source}
        if any(array is None for array in arrays.values()):
            continue
        composite, mask, real = (arrays.get(source) for source in (triple.composite, triple.mask, triple.real))
        findings += _compare(triple, composite, mask, real)
        look = fingerprint(arrays[photo]) if look is None else look
        names = (str(source or "") for source in (triple.composite, triple.mask, triple.real))
        digest = blake2b((triple.composite or triple.real).read_bytes(), digest_size=16).hexdigest()
        about = (triple.subset, triple.split, triple.name, *names, *mask.shape[::-1], float(mask.mean()), digest)
        rows.append(about + _change(composite, mask, real))
    return rows, look, findings


def _change(composite, mask, real) -> tuple[float, float, float]:
    """(fMSE, mean CIE76 difference of the foreground, PSNR at the papers' size)"""
    if composite is None or real is None or not composite.shape[:2] == mask.shape == real.shape[:2] or not mask.any():
        return (np.nan,) * 3
    small = [resize_image(image, (PSNR_SIDE, PSNR_SIDE)) for image in (real, composite)]
    with np.errstate(divide="ignore"):  # equal pictures: infinity
        psnr = float(peak_signal_noise_ratio(*small, data_range=255))
    return foreground_mse(real, composite, mask), foreground_delta_e(real, composite, mask), psnr


def _wrong(source, *checks: tuple[str, str, bool]) -> list[Finding]:
    """A finding for each (kind, text, whether it is so) that is so."""
    return [Finding(kind, f"{source}: {text}") for kind, text, is_so in checks if is_so]


def _picture(path: Path) -> tuple[np.ndarray, list[Finding]]:
    image = decoding.open_image(path)
    odd = {
        "CMYK colours, which readers convert differently": image.mode == "CMYK",
        "more than 8 bits a channel": image.info["deep"] or image.mode.startswith(("I", "F")),
        "greyscale, so there is no colour to harmonize": image.mode in ("1", "L", "LA"),
        "transparent pixels": decoding.transparent(image),
        "turned by its EXIF orientation, which many readers ignore": decoding.orientation(image) > 1,
    }
    checks = [("format", f"{what}; save it as upright 8-bit RGB", is_so) for what, is_so in odd.items()]
    return np.asarray(decoding.to_rgb(image, path)), _wrong(path, *checks)


def _mask(source: Path | Runs, mask_from: str) -> tuple[np.ndarray, list[Finding]]:
    if isinstance(source, Runs):
        mask, wrong = source.decode(), []
    else:
        image = decoding.open_image(source)
        values, levels = np.asarray(decoding.to_rgb(image, source)), decoding.mask_levels(image, source, mask_from)
        top, grey = int(levels.max(initial=0)), float(((levels >= GREY[0]) & (levels <= GREY[1])).mean())
        cut = decoding.MASK_THRESHOLD
        mask = levels > cut
        faint = f"its brightest value is {top}, white is above {cut}; stretch it to 0 and 255"
        soft = f"{grey:.1%} of the pixels are grey; cut it at {cut} and save it as PNG"
        wrong = _wrong(
            source,
            ("mask", "transparent pixels; save it without an alpha channel", decoding.transparent(image)),
            ("mask", "turned by its EXIF orientation; save it upright", decoding.orientation(image) > 1),
            ("mask", "has colours; draw it in black and white", np.ptp(values, axis=-1).max() > 16),
            ("faint mask", faint, 0 < top <= cut),
            ("soft mask", soft, grey > SOFT_SHARE and top > cut),
        )
    return mask, wrong + _wrong(
        source,
        ("empty mask", "no foreground; draw it, or remove what uses it", not mask.any() and not wrong),
        ("full mask", "no background; redraw it, or remove what uses it", mask.all()),
    )


def _compare(triple: Triple, composite, mask, real) -> list[Finding]:
    """Findings about the parts of one example beside each other."""
    parts = [(triple.composite, composite), (triple.mask, mask), (triple.real, real)]
    sizes = {str(source): f"{part.shape[1]}x{part.shape[0]}" for source, part in parts if source}
    if len(set(sizes.values())) > 1:
        pairs = ", ".join(f"{Path(name).name} {size}" for name, size in sizes.items())
        return [Finding("size", f"{next(iter(sizes))}: sizes differ ({pairs}); bring them to one size")]
    if mask.all() or not mask.any():
        return []
    if composite is None or real is None:
        frame = np.ones_like(mask)
        frame[1:-1, 1:-1] = False
        inverted = mask[frame].mean() > FRAME_SHARE
        return _wrong(triple.mask, ("inverted mask", "white along the whole border; invert it", inverted))
    square = np.square(cv2.absdiff(composite, real), dtype=np.uint16)
    outside, inside = (np.mean(cv2.mean(square, region.astype(np.uint8))[:3]) for region in (~mask, mask))
    if outside > NOISE and inside <= NOISE:
        return [Finding("inverted mask", f"{triple.mask}: what changed is the black part; invert it")]
    differs = f"its background differs from the real image's (MSE {outside:.1f}, over {NOISE:g}); paste the real one's"
    return _wrong(
        triple.composite,
        ("background", differs, outside > NOISE),
        ("unchanged", "equals its real image; make it anew or remove it", outside == inside == 0),
    )


# ---- across the whole set ----


def fingerprint(photo: np.ndarray) -> np.ndarray:
    """Difference hash (horizontal, 256 bits as 32 bytes) and mean colour (3 bytes)."""
    small = resize_image(photo, (HASH_SIDE, HASH_SIDE + 1)).astype(np.int16)
    bits = np.packbits(np.diff(small.sum(-1), axis=1) > 0)
    return np.concatenate([bits, small.mean((0, 1)).round().astype(np.uint8)])


def _shared_photos(looks: list[tuple[Path, set[str], np.ndarray]]) -> list[Finding]:
    """Of (photo, its splits, fingerprint): test photos that are, or look like, a training photo or its mirror image."""
    names, prints = ({s: [look[part] for look in looks if s in look[1]] for s in SPLITS} for part in (0, 2))
    if not all(names.values()):
        return []
    train, findings = np.stack(prints["train"]), []
    for name, own in zip(names["test"], prints["test"], strict=True):
        colours = np.abs(train[:, -3:].astype(np.int16) - own[-3:]).max(1)
        rising = np.unpackbits(own[:-3]).reshape(HASH_SIDE, HASH_SIDE)
        turned = np.packbits(1 - rising[:, ::-1])  # of the mirror image: rows run backwards, and what rose falls
        as_it_is, mirrored = (np.bitwise_count(train[:, :-3] ^ bits).sum(1) for bits in (own[:-3], turned))
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
        for number, line in enumerate(read_lines(path, unique=False), start=1):
            place = f"{path.name}, line {number}"
            first = seen.setdefault((path.parent, Path(line).parts[-3:]), place)
            if line and first != place:
                text = f"{path}, line {number}: {line} is in {first} already; remove one of them"
                findings.append(Finding("listed twice", text))
    return findings


def _counts(manifest: pd.DataFrame, triples: list[Triple]) -> pd.DataFrame:
    listed = Counter((triple.subset, triple.split) for triple in triples)
    rows = []
    for (subset, split), number in listed.items():
        own = manifest[(manifest["subset"] == subset) & (manifest["split"] == split)]
        published = PUBLISHED.get(subset, (0, 0))[split == "test"] if split else 0
        rows.append([subset, split, number, own["mask"].nunique(), own["real"].nunique(), published])
    return pd.DataFrame(rows, columns=["subset", "split", "composites", "pairs", "photos", "published"])


def _notes(root: Path, triples: list[Triple]) -> list[str]:
    pictures, used = pictures_of(root), {source for t in triples for source in (t.composite, t.mask, t.real)}
    files = {p for p in pictures.rglob("*") if p.is_file() and p.suffix.lower() not in decoding.UNLISTED}
    left = {p for p in files - used if not is_hidden(p, pictures)}
    known = {p for p in left if p.suffix.lower() in decoding.IMAGE_SUFFIXES}
    texts = {"pictures belong to no example": known, "files are of no type that is read": left - known}
    return [f"{len(chosen)} {text}, for example {min(chosen)}" for text, chosen in texts.items() if chosen]
