"""The harmony classifier: the probability that an image is a composite (DiffHarmony++ Sec. 4.2 and 5.2).

It sees no mask, and composites and reals often went through different codecs, which is easier to see than a wrong
colour; so every image read here takes the same JPEG round trip, and `extract_undone` gives the features of composites
whose colour change was taken back: an AUC that stays high on those does not come from harmony.
"""

import io
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from torch import nn

from ..core.cache import file_digest, shared_array, weights_digest
from ..core.errors import HarmonyError
from ..core.images import read_image, read_pair, resize, to_tensor
from ..core.progress import progress
from ..core.seeds import rng
from ..data.layout import Triple
from .encoder import PACKAGED, create, imagenet_state, normalised

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

    def train(self, mode: bool = True) -> "HarmonyClassifier":
        """Training mode for the head only: the backbone's batch statistics stay ImageNet's."""
        super().train(mode)
        self.network.eval()
        return self

    def load_imagenet_weights(self) -> "HarmonyClassifier":
        """Fill the backbone with `encoder.imagenet_state`, which raises HarmonyError."""
        self.network.load_state_dict(imagenet_state(self.config.backbone))
        return self

    def features(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Globally pooled backbone features: Bx3xHxW in [-1, 1] -> BxD.

        With a mask, Bx1xHxW in [0, 1], the means inside and outside of it: Bx2D (ours: the paper's sees no mask).
        """
        image = normalised(resize(image, self.config.size), self.network)
        if mask is None:
            return self.network(image)
        maps = self.network.forward_features(image)
        inside = nn.functional.interpolate(mask, size=maps.shape[2:], mode="area")
        means = [(maps * w).sum((2, 3)) / w.sum((2, 3)).clamp_min(1e-6) for w in (inside, 1 - inside)]
        return torch.cat(means, dim=1)

    def probability(self, features: torch.Tensor) -> torch.Tensor:
        """Calibrated P(composite), shape B, of BxD features."""
        slope, intercept = self.calibration
        return torch.sigmoid(slope * self.head(features)[:, 0] + intercept)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.probability(self.features(image))

    def extract(self, paths, batch_size: int = 32) -> np.ndarray:
        """NxD float32 features of image files after `round_trip_codec`, cached by the files' content."""
        return self._extract("file", [[path] for path in paths], lambda path: (read_image(path), None), batch_size)

    def extract_regions(self, pairs, batch_size: int = 32) -> np.ndarray:
        """Nx2D float32 features, inside and outside the mask, of (image, mask) files, cached likewise."""
        return self._extract("regions", pairs, read_pair, batch_size)

    def extract_undone(self, triples: list[Triple], batch_size: int = 32) -> np.ndarray:
        """NxD float32 features of the triples' composites after `undo_color_change`, cached likewise."""
        files = {(t.composite, t.mask, t.real): t for t in triples}
        return self._extract("undone", list(files), lambda *f: (undo_color_change(*files[f].load()), None), batch_size)

    def _extract(self, kind: str, files, load, batch_size: int) -> np.ndarray:
        if not files:
            raise HarmonyError("no images to classify; the list is empty")
        digests = [[file_digest(path) for path in group] for group in files]
        key = {"files": digests, "kind": kind, "quality": JPEG_QUALITY, "size": self.config.size}

        @torch.inference_mode()
        def fill(array, first, last):
            for start in progress(range(first, last, batch_size), desc="classifier features", unit="batch"):
                some = files[start : min(start + batch_size, last)]
                images, masks = zip(*(load(*group) for group in some), strict=True)
                images = (to_tensor(round_trip_codec(image))[None] for image in images)
                batch = [torch.cat([resize(image, self.config.size) for image in images]).to(self.device)]
                if kind == "regions":
                    side = (self.config.size, self.config.size)
                    masks = (nn.functional.interpolate(to_tensor(mask)[None], side, mode="area") for mask in masks)
                    batch.append(torch.cat(list(masks)).to(self.device))
                array[start - first : start - first + len(some)] = self.features(*batch).float().cpu().numpy()

        key |= {"weights": weights_digest(self.network)}
        width = self.network.num_features * (2 if kind == "regions" else 1)
        return shared_array(key, (len(files), width), np.float32, fill, batch_size)

    @torch.inference_mode()
    def predict(self, features: np.ndarray) -> np.ndarray:
        """N calibrated probabilities of NxD features (`extract`)."""
        return self.probability(torch.tensor(np.asarray(features), device=self.device).float()).cpu().numpy()

    def fit_head(self, features, labels, photos, regularisation=(0.1,), folds: int = 5) -> dict:
        """Fit the linear head and its calibration: `fit_probe`, whose scores it returns."""
        probe = fit_probe(features, labels, photos, regularisation, folds)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(probe.weight)[None])
            self.head.bias.fill_(probe.bias)
            self.calibration.copy_(torch.tensor(probe.calibration))
        return probe.scores


class Probe(NamedTuple):
    """P(composite) = sigmoid(slope (weight . features + bias) + intercept), calibration = (slope, intercept)."""

    weight: np.ndarray
    bias: float
    calibration: tuple[float, float]
    scores: dict

    def predict(self, features: np.ndarray) -> np.ndarray:
        """N calibrated probabilities of NxD features."""
        slope, intercept = self.calibration
        return expit(slope * (features @ self.weight + self.bias) + intercept)


def fit_probe(features, labels, photos, regularisation=(0.1,), folds: int = 5) -> Probe:
    """Logistic regression, with its calibration (Platt) on scores of photos that the scoring head had not seen.

    features NxD; labels N, 1 for composites; both classes weigh the same. photos: N names, never split between the
    folds of the cross-validation that gives those scores. regularisation: weights of half the head's squared norm
    beside the mean log loss, features standardised; that of the highest cross-validated AUC is taken. scores:
    `evaluate_classifier` of the cross-validated scores, a little too good where several were tried, and
    "regularisation". Raises HarmonyError for fewer than two photos, or where a fold leaves a class out.
    """
    features, labels, photos = np.asarray(features, np.float64), np.asarray(labels).astype(int), np.asarray(photos)
    folds = min(folds, len(np.unique(photos)))
    splits = list(GroupKFold(folds).split(features, labels, photos)) if folds > 1 else []
    if not splits or any(len(np.unique(labels[fitted])) < 2 for fitted, _ in splits):
        raise HarmonyError(f"the classifier's photos ({len(set(photos))}) lack reals or composites; add photos")
    tried = sorted(regularisation, reverse=True)
    logits = {strength: np.zeros(len(labels)) for strength in tried}
    options = {"class_weight": "balanced", "max_iter": 1000}
    for fitted, unseen in progress(splits, desc="classifier folds", unit="fold"):
        scaler = StandardScaler().fit(features[fitted])
        x, y = scaler.transform(features[fitted]), scaler.transform(features[unseen])
        linear = LogisticRegression(warm_start=True, **options)  # each goes on from the stronger one before
        for strength in tried:
            linear.set_params(C=1 / (strength * len(labels)))
            logits[strength][unseen] = linear.fit(x, labels[fitted]).decision_function(y)
    best = max(tried, key=lambda strength: _auc(labels, logits[strength]))
    scores, spread = logits[best], logits[best].std() + 1e-6
    platt = LogisticRegression(class_weight="balanced").fit(scores[:, None] / spread, labels)
    slope, intercept = max(platt.coef_[0, 0] / spread, MIN_SLOPE), platt.intercept_[0]
    scaler = StandardScaler().fit(features)
    linear = LogisticRegression(C=1 / (best * len(labels)), **options).fit(scaler.transform(features), labels)
    weight = linear.coef_[0] / scaler.scale_
    found = evaluate_classifier(expit(slope * scores + intercept), labels, photos=photos) | {"regularisation": best}
    return Probe(weight, float(linear.intercept_[0] - weight @ scaler.mean_), (float(slope), float(intercept)), found)


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


def labelled_images(triples: list[Triple], masks: bool = False) -> tuple[list, np.ndarray, list[str], list[str]]:
    """(paths, labels, subsets, photos) of every composite (label 1) and of every real once (label 0).

    masks: (image, mask) paths for paths, with every mask that a real has.
    """
    rows = [((t.composite, t.mask) if masks else t.composite, 1, t.subset, t.photo) for t in triples]
    rows += dict.fromkeys(((t.real, t.mask) if masks else t.real, 0, t.subset, t.photo) for t in triples)
    paths, labels, subsets, photos = (list(column) for column in zip(*rows, strict=True))
    return paths, np.array(labels), subsets, photos


def evaluate_classifier(probabilities, labels, subsets=None, photos=None, bins: int = 10, seed: int = 0) -> dict:
    """How well P(composite) tells composites (label 1) from reals (0), in all and per subset.

    {"n", "photos", "composites", "auc", "auc_interval", "accuracy", "calibration", "subsets"}. accuracy is the mean of
    both classes' rates at 0.5, and calibration bins (from, to, n, predicted, observed) weigh the classes equally: sets
    hold several composites to a real. auc_interval: 95 % bootstrap over photos, NaN without photos or under two of
    them. AUC and accuracy are NaN where a class is missing.
    """
    table = pd.DataFrame({"p": np.asarray(probabilities, np.float64), "label": np.asarray(labels).astype(int)})
    table = table.assign(subset=subsets, photo=photos)
    report = _scores(table, bins, seed)
    if subsets is not None:
        report["subsets"] = {str(s): _scores(part, bins, seed) for s, part in table.groupby("subset", sort=False)}
    return report


def _scores(table: pd.DataFrame, bins: int, seed: int) -> dict:
    labels, p = table["label"].to_numpy(), table["p"].to_numpy()
    weight = 1 / np.bincount(labels)[labels]
    places, calibration = np.minimum((p * bins).astype(int), bins - 1), []
    for b in np.unique(places):
        predicted, observed = (float(np.average(x[places == b], weights=weight[places == b])) for x in (p, labels))
        row = {"from": b / bins, "to": (b + 1) / bins, "n": int((places == b).sum())}
        calibration.append(row | {"predicted": predicted, "observed": observed})
    return {
        "n": len(table),
        "photos": table["photo"].nunique() or None,
        "composites": int(labels.sum()),
        "auc": _auc(labels, p),
        "auc_interval": _auc_interval(table, seed),
        "accuracy": float(balanced_accuracy_score(labels, p >= 0.5)) if 0 < labels.mean() < 1 else float("nan"),
        "calibration": calibration,
    }


def _auc(labels, p) -> float:
    return float(roc_auc_score(labels, p)) if 0 < labels.mean() < 1 else float("nan")


def _auc_interval(table, seed: int, repeats: int = 500) -> list[float]:
    clusters = [part[["label", "p"]].to_numpy().T for _, part in table.groupby("photo")]
    if len(clusters) < 2 or table["label"].nunique() < 2:
        return [float("nan")] * 2
    draw = rng(seed, "classifier", "bootstrap")
    drawn = (draw.integers(len(clusters), size=len(clusters)) for _ in range(repeats))
    values = [_auc(*np.concatenate([clusters[i] for i in some], axis=1)) for some in drawn]
    return np.nanquantile(values, [0.025, 0.975]).tolist()
