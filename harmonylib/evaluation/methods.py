"""Run every method over a test set and score it: one row per method and image."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..core.cache import file_digest, pipeline_digest, settings_of, shared_array, weights_digest
from ..core.checkpoints import code_hash
from ..core.devices import actual_precision, autocast
from ..core.errors import HarmonyError
from ..core.images import paste, resize, resize_image, to_tensor, to_uint8
from ..core.progress import progress
from ..core.seeds import generator
from ..data.batches import TripleSet
from ..data.transfers import harmonize_classically
from ..training import TrainingDiverged
from .folder import find_predictions, read_prediction
from .metrics import METRICS, score

CLASSICAL = ("mean-std", "reinhard", "histogram")


class Method(NamedTuple):
    """A named harmonizer: call(composite Bx3xSxS in [-1, 1], mask Bx1xSxS, names) -> Bx3xSxS on any device.

    key: what decides its outputs, as JSON takes it; by it `evaluate` keeps its scores. None: they are not kept.
    """

    name: str
    call: Callable
    key: list | None = None


def identity_method() -> Method:
    """The composite itself: what every method has to beat."""
    return Method("composite", lambda composite, mask, names: composite, ["composite"])


def classical_method(transfer: str) -> Method:
    """Foreground statistics matched to the image's own background: "mean-std", "reinhard" or "histogram"."""

    def call(composite, mask, names):
        pairs = zip(to_uint8(composite), mask[:, 0].numpy() > 0.5, strict=True)
        return torch.stack([to_tensor(harmonize_classically(image, region, transfer)) for image, region in pairs])

    return Method(transfer, call, [transfer])


def resunet_method(model, name: str = "contrastive-resunet", size: int | None = None, precision="auto") -> Method:
    """A ContrastiveResUNet, run at `size` (None: the images' own) and resized back."""

    @torch.inference_mode()
    def call(composite, mask, names):
        device = next(model.parameters()).device
        with autocast(device, precision):
            output = model(*resize_pair(composite.to(device), mask.to(device), size))
        return resize(output.float(), composite.shape[-1])

    actual = actual_precision(next(model.parameters()).device, precision)
    return Method(name, call, [weights_digest(model), settings_of(model.config), size, actual])


def diffusion_method(pipeline, name: str, seed: int, size: int | None = None, steps: int = 5, larger=(),
                     precision="auto") -> Method:  # fmt: skip
    """A DiffHarmonyPipeline, run at `size` (None: the images' own), with noise seeded per image name.

    larger: TripleSets of the same images at `size`, read instead of enlarging the scored ones: the papers' protocol,
    which gives the model more information than methods at the scored size have. Without them it is the strict one.
    Where a mask vanishes at `size`, the composite is left as it is.
    """
    at = {_key(triple): (data, number) for data in larger for number, triple in enumerate(data.triples)}

    def call(composite, mask, names):
        image, region = resize_pair(composite, mask, size)
        if names and all(image_name in at for image_name in names):
            batches = [data.batch([number]) for data, number in map(at.get, names)]
            image, region = (torch.cat([batch[part] for batch in batches]) for part in ("composite", "mask"))
        output, seen = image.float().clone(), region.flatten(1).any(1).cpu().numpy()  # objects too small for this size
        generators = [generator(seed, "evaluate", name) for name, there in zip(names, seen, strict=True) if there]
        if generators:
            embeds = pipeline.prompt(*(part[seen].to(pipeline.device) for part in (composite, mask)))
            options = {"generator": generators, "paste": False, "output_type": "pt", "prompt_embeds": embeds}
            with autocast(pipeline.device, precision):
                made = pipeline(image[seen], region[seen], steps, **options).images
            output[seen] = made.float().to(output.device) * 2 - 1
        return resize(output, composite.shape[-1])

    decisive = [pipeline_digest(pipeline), seed, size, steps, [data.key() for data in larger]]
    return Method(name, call, [*decisive, actual_precision(pipeline.device, precision)])


def external_method(name: str, folder, triples) -> Method:
    """Predictions of a method that runs elsewhere: FOLDER/[SUBSET/]NAME.* of every triple, of any size.

    Raises HarmonyError as `folder.find_predictions` and `folder.read_prediction`.
    """
    files = dict(zip(map(_key, triples), find_predictions(folder, triples), strict=True))

    def call(composite, mask, names):
        images = (np.clip(np.rint(read_prediction(files[name])), 0, 255).astype(np.uint8) for name in names)
        return torch.stack([to_tensor(resize_image(image, composite.shape[2:])) for image in images])

    return Method(name, call, [file_digest(path) for path in files.values()])


def stored_method(name: str, images: np.ndarray) -> Method:
    """A method that hands out images made before, Nx3xSxS in [-1, 1], for a test set and in its order.

    Raises TrainingDiverged where they are not finite: the model that made them is broken.
    """
    if not np.isfinite(images).all():
        raise TrainingDiverged(f"{name}: the outputs are not finite")
    rest = iter(images)
    return Method(name, lambda composite, mask, names: torch.from_numpy(np.stack([next(rest) for _ in names])))


def visible(data: TripleSet, vae, size: int | None = None, larger=()) -> np.ndarray:
    """Which masks keep a cell on the latent grid of this autoencoder: N bools.

    size and larger as of `diffusion_method`, whose UNet does not see where the foreground of the others is.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    data = next((other for other in larger if other.triples == data.triples), data)
    found = [np.empty(0, bool)]
    for start in range(0, len(data), 64):
        mask = data.batch(range(start, min(start + 64, len(data))), images=False)["mask"]
        found.append(on_latent_grid(resize_mask(mask, size), factor).numpy())
    return np.concatenate(found)


def on_latent_grid(mask: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """Which of Bx1xHxW masks keep a cell of `factor` pixels (`latent_mask`: its top left one counts)."""
    return (mask[..., ::factor, ::factor] >= 0.5).flatten(1).any(1)


def resize_mask(mask, size):
    """Nearest: what `diffusion_method` gives its model."""
    return mask if size is None else F.interpolate(mask, size=(size, size), mode="nearest")


def resize_pair(image, mask, size):
    """Image bilinear, mask nearest."""
    return resize(image, size), resize_mask(mask, size)


def _key(triple) -> str:
    return f"{triple.subset}/{triple.name}"


def _run(method: Method, data: TripleSet, batch_size: int, first: int = 0, last: int | None = None):
    """Yield (triple, composite, mask, real, output), the output as the method gave it: HxWx3 float32 in 0..255."""
    last = len(data) if last is None else last
    for start in progress(range(first, last, batch_size), desc=method.name, unit="batch"):
        triples = data.triples[start : min(start + batch_size, last)]
        batch = data.batch(range(start, start + len(triples)))
        composite, mask = batch["composite"], batch["mask"]
        output = method.call(composite, mask, [_key(triple) for triple in triples]).float().cpu()
        if output.shape != composite.shape or not output.isfinite().all():
            shapes = f"{tuple(output.shape)} for {tuple(composite.shape)}"
            raise HarmonyError(f"{method.name}: predictions of shape {shapes} or with NaN; mend the method")
        output = output.clamp(-1, 1).add(1).mul(127.5).movedim(1, -1).numpy()
        yield from zip(triples, to_uint8(composite), mask[:, 0].numpy() > 0.5, to_uint8(batch["real"]), output,
                       strict=True)  # fmt: skip


def predict(method: Method, data: TripleSet, batch_size: int = 16):
    """Yield (triple, composite, mask, real, output) as uint8/bool arrays, the composite's background pasted back."""
    for triple, composite, mask, real, output in _run(method, data, batch_size):
        yield triple, composite, mask, real, paste(output.round().astype(np.uint8), composite, mask)


def evaluate(methods: list[Method], data: TripleSet, batch_size: int = 16, protocols=("standard",),
             seen=None) -> pd.DataFrame:  # fmt: skip
    """Scores of every method on every triple: columns model, subset, name, photo, protocol, scored_at (pixels of the
    square), foreground_ratio and the metrics.

    Each method runs once, and its output is scored under every protocol (names in `metrics.PROTOCOLS`): "standard" with
    the composite's background pasted, the others as their code has it; a protocol with a size of its own resizes what
    is not of that size. Masks are hard. Scores of a method with a key are kept in the cache; under torchrun each
    process makes its share of them. seen: N bools (`visible`); of the other composites no method has a "standard" row,
    whereas published protocols score what their code scores: all. Raises HarmonyError for an output of another size or
    with NaN, and where none is seen.
    """
    seen = np.ones(len(data), bool) if seen is None else seen
    if not np.any(seen):
        message = f"all {len(data)} masks vanish on the latent grid"
        raise HarmonyError(f"evaluation: {message}; run at a larger size or set evaluation.vanished to scored")
    rows = []
    for method in methods:
        scores = _scores(method, data, batch_size, protocols)
        for triple, there, (ratio, *values) in zip(data.triples, seen, scores, strict=True):
            about = {"model": method.name, "subset": triple.subset, "name": triple.name, "photo": triple.photo}
            for number, name in enumerate(protocols):
                choice = {"protocol": name, "scored_at": data.size, "foreground_ratio": ratio}
                found = values[number * len(METRICS) : (number + 1) * len(METRICS)]
                if there or name != "standard":
                    rows.append(about | choice | dict(zip(METRICS, found, strict=True)))
    return pd.DataFrame(rows)


def _scores(method: Method, data: TripleSet, batch_size: int, protocols) -> list[list[float]]:
    """Of every triple the foreground's share of the picture, and the metrics of each protocol after one another."""

    def fill(array, first, last):
        for row, (_, composite, mask, real, output) in zip(
            array, _run(method, data, batch_size, first, last), strict=True
        ):
            if output.max() <= 1:  # a black picture, which `score` would take for one in 0..1
                output = output.round().astype(np.uint8)
            row[0] = mask.mean()
            scored = (score(output, real, mask, p, composite if p == "standard" else None) for p in protocols)
            row[1:] = [values[metric] for values in scored for metric in METRICS]

    shape = (len(data), 1 + len(protocols) * len(METRICS))
    if method.key is None:
        fill(table := np.empty(shape), 0, len(data))
        return table.tolist()
    code = [code_hash(), *map(file_digest, sorted(Path(__file__).parent.glob("*.py")))]
    key = {"scores": method.key, "data": data.key(), "batch": batch_size, "protocols": list(protocols), "code": code}
    return shared_array(key, shape, np.float64, fill, batch_size).tolist()
