"""The harmony classifier: the probability that an image is a composite (DiffHarmony++ Sec. 4.2 and 5.2).

A linear probe on the pooled features of a frozen ImageNet network. It sees no mask, and composites and reals often went
through different codecs, which is easier to see than a wrong colour; so every image read here takes the same JPEG round
trip, and `extract_undone` gives the features of composites whose colour change was taken back: an AUC that stays high
on those does not come from harmony.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn

from ..core.cache import cached_array, file_digest, weights_digest
from ..core.errors import HarmonyError
from ..core.images import read_image, to_tensor
from ..core.progress import progress
from ..core.seeds import rng
from ..data.layout import Triple
from .encoder import PACKAGED, create, imagenet_state

JPEG_QUALITY = 90
MIN_SLOPE = 1e-3  # calibration never reverses the head's order


class HarmonyClassifier(ModelMixin, ConfigMixin):
    """Frozen timm backbone, linear head and Platt calibration: forward(image) -> P(composite), shape B.

    image Bx3xHxW in [-1, 1], resized (antialiased) to size x size and normalised inside. backbone: any timm name, with
    `@REVISION` to pin what the hub has of it; weights are random until `load_imagenet_weights` or `from_pretrained`.
    Probabilities are calibrated for equally many reals and composites; an unfitted head says 0.5.
    """

    @register_to_config
    def __init__(self, backbone: str = PACKAGED, size: int = 224):
        super().__init__()
        self.network = create(backbone, num_classes=0).requires_grad_(False).eval()
        self.head = nn.Linear(self.network.num_features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # slope and intercept on the head's logit
        for name in ("mean", "std"):
            value = torch.tensor(self.network.pretrained_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> "HarmonyClassifier":
        """Training mode for the head only: the backbone's batch statistics stay ImageNet's."""
        super().train(mode)
        self.network.eval()
        return self

    def load_imagenet_weights(self) -> "HarmonyClassifier":
        """Fill the backbone with `encoder.imagenet_state`, which raises HarmonyError."""
        self.network.load_state_dict(imagenet_state(self.config.backbone))
        return self

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Globally pooled backbone features: Bx3xHxW in [-1, 1] -> BxD."""
        unit = _resize(image, self.config.size) / 2 + 0.5
        return self.network((unit - self.mean) / self.std)

    def probability(self, features: torch.Tensor) -> torch.Tensor:
        """Calibrated P(composite), shape B, of BxD features."""
        slope, intercept = self.calibration
        return torch.sigmoid(slope * self.head(features)[:, 0] + intercept)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.probability(self.features(image))

    def extract(self, paths, batch_size: int = 32) -> np.ndarray:
        """NxD float32 features of image files after `round_trip_codec`, cached by the files' content."""
        paths = list(paths)
        return self._extract("file", [[path] for path in paths], lambda i: read_image(paths[i]), batch_size)

    def extract_undone(self, triples: list[Triple], batch_size: int = 32) -> np.ndarray:
        """NxD float32 features of the triples' composites after `undo_color_change`, cached likewise."""
        files = [[t.composite, t.mask, t.real] for t in triples]
        return self._extract("undone", files, lambda i: undo_color_change(*triples[i].load()), batch_size)

    def _extract(self, kind: str, files, load, batch_size: int) -> np.ndarray:
        if not files:
            raise HarmonyError("no images to classify; the list is empty")
        key = {"files": [[file_digest(path) for path in group] for group in files], "kind": kind,
               "quality": JPEG_QUALITY, "size": self.config.size, "weights": weights_digest(self.network)}  # fmt: skip

        @torch.inference_mode()
        def fill(array):
            for start in progress(range(0, len(files), batch_size), desc="classifier features", unit="batch"):
                indices = range(start, min(start + batch_size, len(files)))
                images = (to_tensor(round_trip_codec(load(i)))[None] for i in indices)
                batch = torch.cat([_resize(image, self.config.size) for image in images])
                array[indices.start : indices.stop] = self.features(batch.to(self.device)).float().cpu().numpy()

        return cached_array(key, (len(files), self.network.num_features), np.float32, fill)

    @torch.inference_mode()
    def predict(self, features: np.ndarray) -> np.ndarray:
        """N calibrated probabilities of NxD features (`extract`)."""
        return self.probability(torch.tensor(np.asarray(features), device=self.device).float()).cpu().numpy()

    def fit_head(self, features, labels, photos, regularisation: float = 0.1, folds: int = 5) -> dict:
        """Fit the linear head, and its calibration (Platt) on scores of photos that the scoring head had not seen.

        features NxD; labels N, 1 for composites; both classes weigh the same. photos: N names, never split between the
        folds of the cross-validation that gives those scores. regularisation: weight of half the head's squared norm
        beside the mean log loss, features standardised. Returns `evaluate_classifier` of the cross-validated scores.
        Raises HarmonyError for fewer than two photos, or where a fold leaves a class out.
        """
        features, labels, photos = np.asarray(features, np.float64), np.asarray(labels).astype(int), np.asarray(photos)
        folds = min(folds, len(np.unique(photos)))
        splits = list(GroupKFold(folds).split(features, labels, photos)) if folds > 1 else []
        if not splits or any(len(np.unique(labels[fitted])) < 2 for fitted, _ in splits):
            raise HarmonyError(f"the classifier's photos ({len(set(photos))}) lack reals or composites; add photos")
        weights = compute_sample_weight("balanced", labels)
        mean, std = features.mean(0), features.std(0) + 1e-6
        scaled = (features - mean) / std
        probe = LogisticRegression(C=1 / (regularisation * len(labels)), max_iter=1000)
        logits = cross_val_predict(
            probe, scaled, labels, cv=splits, method="decision_function", params={"sample_weight": weights}
        )
        spread = logits.std() + 1e-6
        platt = LogisticRegression().fit(logits[:, None] / spread, labels, sample_weight=weights)
        calibration = torch.tensor([max(platt.coef_[0, 0] / spread, MIN_SLOPE), platt.intercept_[0]])
        probe.fit(scaled, labels, sample_weight=weights)
        weight = probe.coef_[0] / std
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight)[None])
            self.head.bias.copy_(torch.tensor([probe.intercept_[0] - weight @ mean]))
            self.calibration.copy_(calibration)
        return evaluate_classifier(expit(logits * calibration[0].item() + calibration[1].item()), labels, photos=photos)


def _resize(image: torch.Tensor, size: int) -> torch.Tensor:
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, size=(size, size), mode="bilinear", antialias=True)


def round_trip_codec(array: np.ndarray) -> np.ndarray:
    """HxWx3 uint8 encoded as JPEG (quality 90) and decoded: reals, composites and candidates leave alike."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer))


def undo_color_change(composite: np.ndarray, mask: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The composite with its foreground's mean and standard deviation per channel set back to the real's.

    composite, real HxWx3 uint8, mask HxW bool, as `Triple.load` gives them. What is left of the change are its traces:
    rounding, clipping, codec. Raises HarmonyError for an empty mask.
    """
    if not mask.any():
        raise HarmonyError("undo_color_change: the mask has no foreground; leave the image out")
    changed, original = composite[mask].astype(np.float64), real[mask].astype(np.float64)
    scale = original.std(0) / np.maximum(changed.std(0), 1e-6)
    restored = composite.copy()
    restored[mask] = np.clip(np.rint((changed - changed.mean(0)) * scale + original.mean(0)), 0, 255)
    return restored


def labelled_images(triples: list[Triple]) -> tuple[list[Path], np.ndarray, list[str], list[str]]:
    """(paths, labels, subsets, photos) of every composite (label 1) and of every real once (label 0)."""
    rows = [(t.composite, 1, t.subset, t.photo) for t in triples]
    rows += dict.fromkeys((t.real, 0, t.subset, t.photo) for t in triples)
    paths, labels, subsets, photos = (list(column) for column in zip(*rows, strict=True))
    return paths, np.array(labels), subsets, photos


def evaluate_classifier(probabilities, labels, subsets=None, photos=None, bins: int = 10, seed: int = 0) -> dict:
    """How well P(composite) tells composites (label 1) from reals (0), in all and per subset.

    {"n", "photos", "composites", "auc", "auc_interval", "accuracy", "calibration", "subsets"}. accuracy is the mean of
    both classes' rates at 0.5, and calibration bins (from, to, n, predicted, observed) weigh the classes equally: sets
    hold several composites to a real. auc_interval: 95 % bootstrap over photos, NaN without photos or under two of
    them. AUC and accuracy are NaN where a class is missing. Raises HarmonyError for lengths that differ.
    """
    for name, values in (("labels", labels), ("subsets", subsets), ("photos", photos)):
        if values is not None and len(values) != len(probabilities):
            raise HarmonyError(f"{len(probabilities)} probabilities but {len(values)} {name}; give one for each image")
    table = pd.DataFrame({"p": np.asarray(probabilities, np.float64), "label": np.asarray(labels).astype(int)})
    table = table.assign(subset=subsets, photo=photos)
    report = _scores(table, bins, seed)
    if subsets is not None:
        report["subsets"] = {str(s): _scores(part, bins, seed) for s, part in table.groupby("subset", sort=False)}
    return report


def _scores(table: pd.DataFrame, bins: int, seed: int) -> dict:
    p, labels = table["p"].to_numpy(), table["label"].to_numpy()
    counts = np.bincount(labels, minlength=2)
    weighed = table.assign(weight=1 / counts[labels], bin=np.minimum((p * bins).astype(int), bins - 1))
    calibration = []
    for b, part in weighed.groupby("bin"):
        predicted, observed = (float(np.average(part[name], weights=part["weight"])) for name in ("p", "label"))
        calibration.append(
            {"from": b / bins, "to": (b + 1) / bins, "n": len(part), "predicted": predicted, "observed": observed}
        )
    return {
        "n": len(table),
        "photos": table["photo"].nunique() or None,
        "composites": int(counts[1]),
        "auc": _auc(p, labels),
        "auc_interval": _auc_interval(table, seed),
        "accuracy": float(np.mean([((p >= 0.5) == c)[labels == c].mean() if counts[c] else np.nan for c in (0, 1)])),
        "calibration": calibration,
    }


def _auc(p, labels) -> float:
    """Share of (composite, real) pairs in the right order, ties half (Mann-Whitney); NaN where a class is missing."""
    n = labels.sum()
    pairs = n * (len(labels) - n)
    return float((rankdata(p)[labels == 1].sum() - n * (n + 1) / 2) / pairs) if pairs else float("nan")


def _auc_interval(table, seed: int, repeats: int = 500) -> list[float]:
    clusters = [part[["p", "label"]].to_numpy() for _, part in table.groupby("photo")]
    if len(clusters) < 2 or table["label"].nunique() < 2:
        return [float("nan")] * 2
    draw, values = rng(seed, "classifier", "bootstrap"), []
    for _ in range(repeats):
        rows = np.concatenate([clusters[i] for i in draw.integers(len(clusters), size=len(clusters))])
        values.append(_auc(rows[:, 0], rows[:, 1]))
    return np.nanquantile(values, [0.025, 0.975]).tolist()
