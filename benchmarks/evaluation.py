"""Scoring 1,000 predictions at 256 px, beside the plain way: a thread pool around Pillow and scikit-image."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from benchmarks.paired import paired
from harmonylib.core.images import resize_image, resize_mask, write_image
from harmonylib.data.embedded_photos import load_photos
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.evaluation.folder import find_predictions, score_folder
from harmonylib.evaluation.metrics import METRICS

SIDE = 256


def make_set(root: Path, images: int) -> None:
    """Noisy versions of the embedded photos: a data set in root/set and its composites as predictions in root/ours."""
    photos, lines, draw = load_photos(), [], np.random.default_rng(0)
    for number in range(images):
        photo = photos[number % len(photos)]
        real = resize_image(photo.image, (SIDE, SIDE))
        mask = resize_mask(next(iter(photo.masks.values())), (SIDE, SIDE))
        composite = np.clip(real + draw.integers(-20, 20, real.shape) * mask[..., None], 0, 255).astype(np.uint8)
        pair = write_pair(root / "set", "HCOCO", f"p{number % len(photos)}", 1, real, mask)
        lines.append(write_composite(root / "set", "HCOCO", pair, number, composite))
        write_image(root / f"ours/{pair}_{number}.png", composite)
    write_list(root / "set", "test", lines)


def plain_scores(path, triple) -> dict:
    """The metrics of the protocol "standard" by scikit-image."""
    pred, real = (np.asarray(Image.open(name).convert("RGB")) for name in (path, triple.real))
    mask = np.asarray(Image.open(triple.mask).convert("L")) > 127
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim, full = structural_similarity(pred, real, data_range=255, channel_axis=2, full=True, **gaussian)
    return {
        "mse": mean_squared_error(real, pred),
        "psnr": peak_signal_noise_ratio(real, pred, data_range=255),
        "fmse": mean_squared_error(real[mask], pred[mask]),
        "bmse": mean_squared_error(real[~mask], pred[~mask]),
        "ssim": ssim,
        "fssim": full[mask].mean(),
    }


def rows(images: int = 1000, repeats: int = 3) -> list[dict]:
    """One row; raises AssertionError when the two ways disagree by more than 1e-4 of a value."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_set(root, images)
        triples = read_triples(root / "set", "test")
        paths = find_predictions(root / "ours", triples)
        results = {}

        def ours():
            results["ours"] = score_folder(root / "ours", root / "set")[list(METRICS)].to_numpy()

        def plain():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = list(pool.map(plain_scores, paths, triples))
            results["plain"] = np.array([[row[metric] for metric in METRICS] for row in found])

        row = paired(ours, plain, repeats)
        np.testing.assert_allclose(results["ours"], results["plain"], rtol=1e-4)
    return [{"name": f"evaluation: {images} images at {SIDE} px, {os.cpu_count()} cores", **row}]
