"""Composites without a ground truth: what can be measured of them, a blind preference study, and what its votes say."""

import base64
import hashlib
import io
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from skimage.color import rgb2lab

from ..core.decoding import pictures_in
from ..core.errors import HarmonyError
from ..core.files import atomic_path, stem_of
from ..core.images import paste, read_image, resize_image, resize_mask
from ..core.json_files import read_json
from ..core.seeds import rng
from ..data.embedded_photos import CATALOGUE, load_photos
from ..data.readers import detect, read_examples
from .statistics import LEVEL, REPEATS


def read_composites(folder=None, size: int = 256) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, composite SxSx3 uint8, mask SxS bool) of RealHM's folder or of images/ + masks/ (DIH99, your own), as
    squares. None or the embedded photos' file: each embedded test photo's first object laid on every other test photo
    that is no portrait.

    Raises HarmonyError for missing or empty masks and as `read_examples`.
    """
    square, found = (size, size), []
    if folder is None or Path(folder).name == CATALOGUE.name:
        for front, back in itertools.permutations(load_photos("test"), 2):
            if not back.portrait:
                thing, mask = next(iter(front.masks.items()))
                images, region = [resize_image(p.image, square) for p in (front, back)], resize_mask(mask, square)
                found.append((f"{thing} on {back.name}", paste(*images, region), region))
        return found
    kind = "realhm" if detect(folder) == "realhm" else "dih99"
    for example in read_examples(folder, kind):
        mask = resize_mask(example.read_mask(), square)
        if not mask.any():
            raise HarmonyError(f"{example.mask}: no foreground at {size} px (no pixel above 127); paint it white")
        found.append((example.name, resize_image(read_image(example.composite), square), mask))
    return found


def no_reference(output, composite, mask) -> dict:
    """Sanity figures of one result where nobody knows the right answer; none of them says which result is better.

    output, composite: HxWx3 uint8; mask: HxW bool. background_change: largest difference outside the mask, in grey
    levels. change: mean CIE76 difference of the foreground to the composite's. gap: CIE76 distance between the mean
    colours of foreground and background (NaN without background). detail: correlation of the foreground's high-passed
    lightness with the composite's, 1 where texture is kept (NaN for flat ones). clipped: share of foreground values
    that newly reach 0 or 255. Raises HarmonyError for an empty mask.
    """
    if not mask.any():
        raise HarmonyError("no_reference: an empty mask; paint the foreground white")
    before, after = (rgb2lab(image).astype(np.float32) for image in (composite, output))
    weight = mask.astype(np.float32)  # the means are of foreground pixels only
    area = np.maximum(cv2.blur(weight, (5, 5)), 1e-6)
    fine = [(lab[..., 0] - cv2.blur(lab[..., 0] * weight, (5, 5)) / area)[mask] for lab in (before, after)]
    outside = np.abs(output.astype(int) - composite)[~mask]
    clipped = np.isin(output, (0, 255)) & ~np.isin(composite, (0, 255))
    return {
        "background_change": int(outside.max(initial=0)),
        "change": float(np.linalg.norm(after - before, axis=-1)[mask].mean()),
        "gap": float(np.linalg.norm(after[mask].mean(0) - after[~mask].mean(0))) if outside.size else float("nan"),
        "detail": float(np.corrcoef(*fine)[0, 1]) if min(map(np.std, fine)) > 1e-3 else float("nan"),
        "clipped": float(clipped[mask].mean()),
    }


def read_folders(folders: dict[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """{image: {method: HxWx3 uint8}} of {method: folder}. Raises HarmonyError unless all have the same file stems."""
    files = {}
    for method, folder in folders.items():
        if not Path(folder).is_dir():
            raise HarmonyError(f"{folder}: no such folder of {method}'s pictures")
        files[method] = {stem_of(path): path for path in pictures_in(folder)[0]}
    first = next(iter(files))
    for method, found in files.items():
        if odd := sorted(found.keys() ^ files[first].keys()):
            raise HarmonyError(f"{odd[0]}: in only one of {folders[first]} and {folders[method]}; give both all images")
    return {name: {method: read_image(found[name]) for method, found in files.items()} for name in files[first]}


def write_page(path, scenes: dict[str, dict[str, np.ndarray]]) -> None:
    """Write the study as one HTML file that works offline: {image: {method: HxWx3 uint8}}.

    Nothing readable names a method, and every participant sees the scenes, and the versions of each, in an order of
    their own (contrastive paper, Sec. IV-C). Equal inputs give equal bytes. Raises HarmonyError for no scenes or
    fewer than two methods.
    """
    if not scenes or any(len(versions) < 2 for versions in scenes.values()):
        raise HarmonyError(f"{path}: a study needs an image and two methods at least; give METHOD=FOLDER twice")
    key, groups = [], []
    for name, versions in scenes.items():
        methods = rng("study", name).permutation(sorted(versions)).tolist()
        key.append((name, methods))
        groups.append([_data_uri(versions[method]) for method in methods])
    data = {"scenes": groups, "key": base64.b64encode(json.dumps(key).encode()).decode()}
    data["id"] = hashlib.blake2b(json.dumps(data).encode(), digest_size=8).hexdigest()
    page = Path(__file__).with_name("study.html").read_text(encoding="utf-8").replace("STUDY_DATA", json.dumps(data))
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_votes(files) -> pd.DataFrame:
    """Columns participant, image, choice, shown (a tuple) of the files that the study page saved.

    A participant may have stopped early: the votes that were cast count. Raises HarmonyError for a file that is none of
    these, one without votes, files of different studies, or a participant who comes twice.
    """
    rows, studies, owners = [], {}, {}
    for path in files:
        data = read_json(path)
        try:
            study, participant = data["study"], data["participant"]
            votes = [(str(v["image"]), str(v["choice"]), tuple(map(str, v["shown"]))) for v in data["votes"]]
        except (TypeError, KeyError):
            votes = []
        images = {image for image, choice, shown in votes if choice in shown}
        if not votes or len(images) < len(votes):
            raise HarmonyError(f"{path}: not a votes file of a study page, or without votes; ask for the saved file")
        if studies and study not in studies:
            raise HarmonyError(f"{path}: of another study than {next(iter(studies.values()))}; count them apart")
        if participant in owners:
            raise HarmonyError(f"{path}: the same participant as in {owners[participant]}; keep the later file")
        studies[study], owners[participant] = path, path
        rows += [(participant, *vote) for vote in votes]
    return pd.DataFrame(rows, columns=["participant", "image", "choice", "shown"])


def count_votes(votes: pd.DataFrame) -> dict:
    """The contrastive paper's Table V of `read_votes`' rows, in the form of evaluation.json.

    {"n": votes, "photos": images, "participants", "models": {method: {"all": {"n", "photos", "votes",
    "preference_percent", "interval": {"preference_percent": [lo, hi]}}}}, "paired": {"A vs composite": {"all": ...}}},
    methods by votes, ties by name. Intervals (95 %) resample participants and images at once, since votes of one person
    and votes on one image go together; with one of both they are NaN: there is nothing to resample.
    """
    people, images = (pd.factorize(votes[column]) for column in ("participant", "image"))
    cast = votes["choice"].value_counts()
    methods = sorted({method for shown in votes["shown"] for method in shown}, key=lambda m: (-cast.get(m, 0), m))
    counts = np.zeros((len(people[1]), len(images[1]), len(methods)))
    np.add.at(counts, (people[0], images[0], [methods.index(choice) for choice in votes["choice"]]), 1)
    draw = rng(0, "votes")
    weights = [draw.multinomial(n, np.full(n, 1 / n), REPEATS).astype(float) for n in counts.shape[:2]]
    drawn = np.einsum("rp,pim,ri->rm", weights[0], counts, weights[1], optimize=True)
    with np.errstate(invalid="ignore"):
        drawn = 100 * drawn / drawn.sum(1, keepdims=True)  # NaN where nobody of the resample saw its images
    share = 100 * counts.sum((0, 1)) / counts.sum()
    about = {"n": len(votes), "photos": len(images[1])}

    def interval(values):
        ends = LEVEL / 2, 1 - LEVEL / 2
        return [float("nan")] * 2 if counts[..., 0].size == 1 else np.nanquantile(values, ends).tolist()

    models, paired = {}, {}
    for k, method in enumerate(methods):
        part = about | {"votes": int(counts[..., k].sum()), "preference_percent": float(share[k])}
        models[method] = {"all": part | {"interval": {"preference_percent": interval(drawn[:, k])}}}
        if "composite" in methods and method != "composite":
            base = methods.index("composite")
            difference = [float(share[k] - share[base]), *interval(drawn[:, k] - drawn[:, base])]
            paired[f"{method} vs composite"] = {"all": about | {"preference_percent": difference}}
    return about | {"participants": len(people[1]), "models": models, "paired": paired}
