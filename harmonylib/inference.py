"""One call from a composite of any size to a harmonized picture."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .devices import autocast, pick_device
from .errors import HarmonyError
from .images import MASK_THRESHOLD, fit, open_image, read_mask, to_rgb, to_tensor, to_uint8
from .pipeline import DiffHarmonyPipeline
from .resunet import ContrastiveResUNet
from .seeds import generator

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained"
MODELS = ("diffharmony++", "diffharmony", "contrastive-resunet")


def harmonize(image, mask, model="diffharmony++", seed: int = 0, device=None) -> Image.Image:
    """Harmonize one composite; the output has the input's size and its background, to the pixel.

    image: path, PIL or HxWx3 uint8; mask: likewise, foreground above 127. model: "diffharmony++", "diffharmony",
    "contrastive-resunet" or the folder of a trained one. The model runs at its own working size; what it changed is
    carried to full size as a colour map of the foreground (`carry_over`), so that no detail is lost.
    Raises HarmonyError for unreadable files, sizes that differ, a mask without foreground, or missing weights.
    """
    pixels = _read_image(image)
    region = _read_mask(mask)
    if region.shape != pixels.shape[:2]:
        raise HarmonyError(f"the mask is {region.shape[::-1]} but the image is {pixels.shape[1::-1]}; resize the mask")
    if not region.any():
        raise HarmonyError("the mask has no foreground (no pixel above 127); paint the foreground white")
    loaded = load_model(str(model), str(pick_device(device)))
    small, small_region = fit(pixels, region, working_size(loaded))
    if not small_region.any():
        raise HarmonyError("the foreground vanishes at the model's working size; crop the image around it")
    changed = run_model(loaded, small, small_region, seed)
    return Image.fromarray(carry_over(pixels, region, small, changed, small_region))


def _read_image(image) -> np.ndarray:
    if isinstance(image, (str, Path)):
        image = open_image(image)
    pixels = np.asarray(to_rgb(image)) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise HarmonyError(f"the image is {pixels.dtype} {pixels.shape}; give HxWx3 uint8, PIL or a path")
    return pixels


def _read_mask(mask) -> np.ndarray:
    if isinstance(mask, (str, Path)):
        return read_mask(mask)
    values = np.asarray(to_rgb(mask).convert("L")) if isinstance(mask, Image.Image) else np.asarray(mask)
    if values.ndim != 2:
        raise HarmonyError(f"the mask is {values.shape}; give HxW, PIL or a path")
    return values if values.dtype == bool else values > MASK_THRESHOLD


def model_folder(name: str) -> Path:
    """The folder of a shipped model or of a trained one. Raises HarmonyError when there is none."""
    folder = SHIPPED / name if name in MODELS else Path(name)
    if name == "diffharmony":
        folder = SHIPPED / "diffharmony++"
    if not folder.is_dir():
        raise HarmonyError(f"{folder}: no weights there; use {', '.join(MODELS)} or the folder of a trained model")
    return folder


@functools.lru_cache(maxsize=2)
def load_model(name: str, device: str):
    """A DiffHarmonyPipeline or ContrastiveResUNet in eval mode, kept for the next call."""
    folder = model_folder(name)
    if (folder / "model_index.json").is_file():
        vae = (
            DiffHarmonyPipeline.from_pretrained(SHIPPED / "base", device=device).vae if name == "diffharmony" else None
        )
        pipeline = DiffHarmonyPipeline.from_pretrained(folder, vae=vae, device=device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, json.JSONDecodeError):
        kind = None
    if kind != "ContrastiveResUNet":
        raise HarmonyError(
            f"{folder}: neither a DiffHarmony pipeline nor a ContrastiveResUNet; name a trained model's folder"
        )
    return ContrastiveResUNet.from_pretrained(folder, torch_dtype=torch.float32).eval().to(device)


def working_size(model) -> int:
    """The long side in pixels a model was trained for (`sample_size` in its config)."""
    return (model.vae if isinstance(model, DiffHarmonyPipeline) else model).config.sample_size


@torch.inference_mode()
def run_model(model, pixels: np.ndarray, region: np.ndarray, seed: int) -> np.ndarray:
    """The model's raw output for HxWx3 uint8 and HxW bool, as HxWx3 uint8; no pasting."""
    image, mask = to_tensor(pixels)[None], to_tensor(region)[None]
    if isinstance(model, DiffHarmonyPipeline):
        noise = generator(seed, "harmonize")
        return to_uint8(model(image, mask, generator=noise, paste=False, output_type="pt").images * 2 - 1)[0]
    device = model.device
    with autocast(device):
        output = model(image.to(device), mask.to(device))
    return to_uint8(output)[0]


def _monomials(pixels: np.ndarray) -> np.ndarray:
    """1, r, g, b, their squares and products of Nx3 colours in [0, 1]: Nx10."""
    r, g, b = pixels.T
    return np.stack([np.ones_like(r), r, g, b, r * r, g * g, b * b, r * g, g * b, b * r], axis=1)


def carry_over(pixels, region, small, changed, small_region, ridge: float = 1e-3) -> np.ndarray:
    """Apply to `pixels` the change from `small` to `changed`: a quadratic colour map fitted on the foreground.

    pixels HxWx3 uint8 and region HxW bool at full size; small, changed and small_region at working size. The map is a
    ridge regression of the change on ten colour monomials, so it cannot blur or add texture.
    """
    before, after = (array[small_region].astype(np.float64) / 255 for array in (small, changed))
    features = _monomials(before)
    gram = features.T @ features + ridge * len(features) * np.diag([0.0] + [1.0] * 9)
    weights = np.linalg.lstsq(gram, features.T @ (after - before), rcond=None)[0].astype(np.float32)
    colours = pixels[region].astype(np.float32) / 255
    result = pixels.copy()
    for start in range(0, len(colours), 1_000_000):  # bounds the memory of large photos
        block = colours[start : start + 1_000_000]
        colours[start : start + 1_000_000] = block + _monomials(block) @ weights
    result[region] = np.clip(colours * 255 + 0.5, 0, 255).astype(np.uint8)
    return result
