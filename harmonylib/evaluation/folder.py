"""Score a folder of predictions against a data set: one row per composite, one image at a time in each process."""

from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.decoding import IMAGE_SUFFIXES, open_image, to_rgb
from ..core.errors import HarmonyError
from ..core.files import composed, is_hidden
from ..core.images import read_image, read_mask
from ..core.parallel import parallel_map
from ..data.layout import Triple, read_triples
from .metrics import PROTOCOLS, find_protocol, score


def score_folder(predictions, data, protocol="standard", split="test", paste=False, workers=None) -> pd.DataFrame:
    """Scores of PREDICTIONS/[SUBSET/]NAME.* for every composite NAME of one split of a data set in iHarmony4's layout.

    Predictions are 8-bit RGB images, or .npy arrays HxWx3 in 0..255 for protocols that score floats. Masks are opened
    as the protocol opens them (`Protocol.mask`). paste: put the composite's background on the predictions first.
    Returns, in list order, the columns model (the folder's name), subset, name, photo, foreground_ratio (of the mask
    file) and those of `metrics.score` that the protocol has. Memory holds one image a process; what composites in a row
    share, their real and mask, is decoded once.
    Raises HarmonyError naming the file for missing, surplus or doubled predictions and for whatever `score` refuses.
    """
    find_protocol(protocol)
    triples = read_triples(data, split)
    predicted = zip(triples, find_predictions(predictions, triples), strict=True)
    groups = [list(group) for _, group in groupby(predicted, key=lambda pair: (pair[0].real, pair[0].mask))]
    work = partial(_score_group, protocol=protocol, paste=paste)
    table = pd.DataFrame(chain(*parallel_map(work, groups, "scoring", "photo", workers)))
    table.insert(0, "model", Path(predictions).resolve().name)
    return table if "ssim" in PROTOCOLS[protocol].reports else table.drop(columns=["ssim", "fssim"])


def _score_group(pairs: list[tuple[Triple, Path]], protocol: str, paste: bool) -> list[dict]:
    """Rows of composites that share their real and mask."""
    first, rows = pairs[0][0], []
    real, mask = read_image(first.real), read_mask_as(first.mask, PROTOCOLS[protocol].mask)
    ratio = float(mask.mean())
    for triple, path in pairs:
        prediction, composite = read_prediction(path), read_image(triple.composite) if paste else None
        about = {"subset": triple.subset, "name": triple.name, "photo": triple.photo, "foreground_ratio": ratio}
        try:
            rows.append(about | score(prediction, real, mask, protocol, composite))
        except HarmonyError as error:
            raise HarmonyError(f"{path}, real {triple.real}, mask {triple.mask}: {error}") from None
    return rows


def find_predictions(folder, triples: list[Triple]) -> list[Path]:
    """The prediction of each triple: FOLDER/SUBSET/NAME.* or FOLDER/NAME.*, NAME being the composite's.

    Raises HarmonyError unless predictions and triples belong together one by one.
    """
    folder, files = Path(folder), {}
    if not folder.is_dir():
        raise HarmonyError(f"{folder}: no such folder of predictions")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (*IMAGE_SUFFIXES, ".npy") and not is_hidden(path, folder):
            other = files.setdefault(composed(path.relative_to(folder).with_suffix("").as_posix()), path)
            if other is not path:
                raise HarmonyError(f"{path}: a second prediction beside {other.name}; keep one of them")
    found = [files.get(composed(f"{t.subset}/{t.name}"), files.get(composed(t.name))) for t in triples]
    missing = [f"{t.subset}/{t.name}" for t, path in zip(triples, found, strict=True) if path is None]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise HarmonyError(f"{folder}: {len(missing)} of {len(triples)} predictions are missing ({few}); make them")
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise HarmonyError(f"{twice}: several subsets have a composite of this name; put predictions into SUBSET/")
    if surplus := sorted(set(files.values()) - set(found)):
        count = f"belongs to no composite of the list ({len(surplus)} such files)"
        raise HarmonyError(f"{surplus[0]}: {count}; remove it or take its list")
    return found


def read_prediction(path: Path) -> np.ndarray:
    """HxWx3 uint8 of an 8-bit RGB image, or the array of an .npy file. Raises HarmonyError for any other mode."""
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise HarmonyError(f"{path}: not a readable array ({error}); write it again with numpy.save") from None
    image = open_image(path)
    if image.mode != "RGB":
        raise HarmonyError(f"{path}: mode {image.mode} instead of RGB; save predictions as 8-bit RGB")
    return np.asarray(to_rgb(image))


def read_mask_as(path, kind: str) -> np.ndarray:
    """A mask file as a protocol opens it: "hard" HxW bool, grey > 127; "soft" HxW float32 in 0..1; "dithered" HxW bool
    by PIL's mode "1", which scatters the greys of soft edges into black and white."""
    if kind == "hard":
        return read_mask(path)
    image = open_image(path)
    return np.asarray(image.convert("L"), np.float32) / 255 if kind == "soft" else np.asarray(image.convert("1"))
