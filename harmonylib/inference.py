"""One call from a composite of any size to a harmonized picture."""

import functools
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from .core.decoding import alike, to_rgb, turn_along
from .core.devices import autocast, pick_device
from .core.errors import HarmonyError
from .core.files import stamp
from .core.images import paste, resize_mask, shrink_pair, to_tensor, to_uint8
from .core.picture_metadata import open_picture, picture, read_region
from .core.seeds import generator
from .models.colour_map import apply_map
from .models.pipeline import DiffHarmonyPipeline
from .models.resunet import ContrastiveResUNet
from .models.vae import HarmonyVAE
from .models.weights import SHIPPED, load_strict

MODELS = ("contrastive-resunet", "diffharmony++", "diffharmony")
BLOCK = 1_000_000  # pixels that are recoloured at a time
SMALL_FOREGROUND = 0.01  # share of the picture below which a model is shown a window instead of everything


def harmonize(
    image, mask, model=MODELS[0], seed: int = 0, device=None, strength=1.0, feather=0.0, fit_mask=False, draws: int = 1,
    mask_from: str = "auto",
) -> Image.Image:  # fmt: skip
    """Harmonize one composite; the output has the input's size, transparency, EXIF and colour profile (in `.info`).

    image: path, PIL or HxWx3 uint8; mask: likewise, foreground above 127 (`fit_mask` resizes one of another size;
    mask_from: "alpha" or "luminance" where both could be meant, see `decoding.mask_levels`).
    model: "contrastive-resunet", "diffharmony++", "diffharmony" or a folder (`load_model`). The model runs at its
    own working size; its colour map, or the one that fits its output best (`carry_over`), is multiplied by `strength`
    (0 to 1) and applied at full size, so that no detail is lost. The change falls to 0 over the outermost `feather`
    pixels of the foreground.
    Background and fully transparent pixels keep their values. EXIF rotation is applied. draws: of a diffusion
    model, each of whose outputs is one of many that it thinks likely, the mean of so many is taken, which is nearer
    the real photo on average.
    Raises HarmonyError for unreadable files, sizes that differ, a mask without foreground or background, numbers out of
    range, or missing weights.
    """
    if not 0 <= strength <= 1:
        raise HarmonyError(f"strength is {strength:g}; use 0 (no change) to 1 (all of it)")
    if not 0 <= feather < float("inf"):
        raise HarmonyError(f"feather is {feather:g}; use a number of pixels, 0 or more")
    if draws < 1:
        raise HarmonyError(f"draws is {draws}; use 1 or more")
    before = _picture(image)
    bands = np.array(before)
    region = _region(mask, before, bands, fit_mask, mask_from)
    loaded = load_model(str(model), str(pick_device(device)))
    view = bands if bands.shape[2] == 3 else np.asarray(to_rgb(before))
    size = working_size(loaded)
    window = model_window(region, size)
    small, small_region = shrink_pair(view[window], region[window], size)
    if not small_region.any():
        raise HarmonyError("the foreground is too thin for the model's working size; thicken the mask")
    pixels = bands[window][..., :3]
    if maps_colours(loaded):
        change, rest = predicted_map(loaded, small, small_region), None
    else:
        change, rest = carry_over(small, run_model(loaded, small, small_region, seed, draws), small_region)
    colours = recolored(pixels, region[window], change, rest, strength)
    bands[window][..., :3] = blend(pixels, colours, region[window], feather)
    result = Image.fromarray(bands)
    result.info = {key: value for key, value in before.info.items() if key != "turned"}
    return result


def _picture(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return picture(image)
    if isinstance(image, (str, Path)):
        return open_picture(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise HarmonyError(f"the image is {pixels.dtype} {pixels.shape}; give HxWx3 uint8, PIL or a path")
    return Image.fromarray(pixels)


def _region(mask, before: Image.Image, bands: np.ndarray, fit_mask: bool, mask_from: str) -> np.ndarray:
    """The HxW bool foreground for HxWx3 or HxWx4 `bands` of the picture `before`, less what is fully transparent."""
    name = mask if isinstance(mask, (str, Path)) else "the mask"
    region = turn_along(read_region(mask, mask_from=mask_from), bands.shape, before.info.get("turned", 1))
    if region.shape != bands.shape[:2]:
        sizes = " but the picture is ".join(f"{width}x{height}" for height, width in (region.shape, bands.shape[:2]))
        if not alike(region.shape, bands.shape) and alike(region.shape[::-1], bands.shape):
            raise HarmonyError(f"{name}: is {sizes}; one of them is turned, so turn it upright")
        if not fit_mask:
            raise HarmonyError(f"{name}: is {sizes}; give one of that size or add --resize-mask")
        region = resize_mask(region, bands.shape[:2])
    visible = bands[..., 3] > 0 if bands.shape[2] == 4 else True
    if not (region & visible).any():
        raise HarmonyError(f"{name}: no foreground (no pixel above 127); paint the foreground white")
    if not (~region & visible).any():
        raise HarmonyError(f"{name}: all is foreground, nothing is left to match; paint the background black")
    return region & visible


def model_window(region: np.ndarray, size: int) -> tuple[slice, slice]:
    """What a model is shown: everything, or around a foreground of less than SMALL_FOREGROUND a window of `size` pixels
    or three times the foreground's own sides, whichever is more, as far as the picture reaches.
    """
    if region.mean() >= SMALL_FOREGROUND:
        return slice(0, region.shape[0]), slice(0, region.shape[1])
    window = []
    for length, used in zip(region.shape, (region.any(1), region.any(0)), strict=True):
        first, last = np.flatnonzero(used)[[0, -1]]
        side = min(length, max(size, 3 * int(last - first + 1)))
        start = int(np.clip((first + last + 1 - side) // 2, 0, length - side))
        window.append(slice(start, start + side))
    return tuple(window)


def model_folder(name: str) -> Path:
    """The folder of a shipped model or of a trained one. Raises HarmonyError when there is none."""
    folder = SHIPPED / ("diffharmony++" if name == "diffharmony" else name) if name in MODELS else Path(name)
    if not folder.is_dir():
        raise HarmonyError(f"{folder}: no weights there; use {', '.join(MODELS)} or the folder of a trained model")
    return folder


def load_model(name: str, device: str):
    """A DiffHarmonyPipeline or ContrastiveResUNet in eval mode, kept for the next call unless its files change.

    name: one of MODELS, or a folder: of either class (`save_pretrained`), of Stable Diffusion inpainting, or the
    published DiffHarmony++ archive (`base/` and `condition_vae/`). Raises HarmonyError when it cannot be loaded.
    """
    folder = model_folder(name)
    return _load(folder, name, device, stamp(folder))


@functools.lru_cache(maxsize=2)
def _load(folder: Path, name: str, device: str, written: tuple):
    try:
        if (folder / "config.json").is_file():
            return _load_resunet(folder).to(device)
        pipeline = _load_pipeline(folder, name, device)
    except HarmonyError:
        raise
    except Exception as error:  # diffusers, safetensors and torch raise many kinds on damaged files
        raise HarmonyError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); restore the folder") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_resunet(folder: Path) -> ContrastiveResUNet:
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name") != "ContrastiveResUNet":
        raise HarmonyError(f"{folder}: not a ContrastiveResUNet; name the folder of a whole pipeline")
    return load_strict(ContrastiveResUNet.from_pretrained, folder, torch_dtype=torch.float32).eval()


def _load_pipeline(folder: Path, name: str, device: str) -> DiffHarmonyPipeline:
    vae = None
    if name == "diffharmony":
        vae = DiffHarmonyPipeline.from_pretrained(SHIPPED / "base", device=device).vae
    elif (folder / "condition_vae").is_dir():
        folder, vae = folder / "base", HarmonyVAE.from_pretrained(folder / "condition_vae")
    if not (folder / "model_index.json").is_file():
        raise HarmonyError(
            f"{folder}: neither a DiffHarmony pipeline nor a ContrastiveResUNet; name a trained model's folder"
        )
    return DiffHarmonyPipeline.from_pretrained(folder, vae=vae, device=device)


def working_size(model) -> int:
    """The long side in pixels a model was trained for (`sample_size` in its config; of a pipeline the larger of the
    autoencoder's and the UNet's, whose size counts latents: Stable Diffusion's 64 are 512 px)."""
    if not isinstance(model, DiffHarmonyPipeline):
        return model.config.sample_size
    return max(model.vae.config.sample_size, (model.unet.config.sample_size or 0) * model.factor)


@torch.inference_mode()
def run_model(model, pixels: np.ndarray, region: np.ndarray, seed: int, draws: int = 1) -> np.ndarray:
    """The model's raw output for HxWx3 uint8 and HxW bool, as HxWx3 uint8; no pasting. draws as in `harmonize`."""
    image, mask = to_tensor(pixels)[None], to_tensor(region)[None]
    if isinstance(model, DiffHarmonyPipeline):
        options = {"paste": False, "output_type": "pt", "candidates": draws}
        with autocast(model.device):
            outputs = model(image, mask, generator=generator(seed, "harmonize"), **options).images
        return to_uint8(outputs.mean(0, keepdim=True) * 2 - 1)[0]
    with autocast(model.device):
        return to_uint8(model(image.to(model.device), mask.to(model.device)))[0]


def maps_colours(model) -> bool:
    """Whether a model predicts a colour map, which applies at any size, and not a picture."""
    return isinstance(model, ContrastiveResUNet) and model.config.head == "colour"


@torch.inference_mode()
def predicted_map(model: ContrastiveResUNet, pixels: np.ndarray, region: np.ndarray):
    """The change that the model's colour map makes: a function from Nx3 float32 colours in [0, 1] to Nx3.

    pixels HxWx3 uint8 and region HxW bool at the model's working size.
    """
    image, mask = to_tensor(pixels)[None].to(model.device), to_tensor(region)[None].to(model.device)
    found = model.colour_map(image, mask).cpu()

    @torch.inference_mode()
    def change(colours: np.ndarray) -> np.ndarray:
        before = torch.from_numpy(colours).T[None] * 2 - 1
        return ((apply_map(found, before) - before) / 2)[0].T.numpy()

    return change


def recolored(pixels: np.ndarray, region: np.ndarray, change, rest: np.ndarray | None, strength: float) -> np.ndarray:
    """HxWx3 uint8: `pixels` with the foreground's colours moved by `strength` times change(colours) + rest.

    change: a function from Nx3 float32 colours in [0, 1] to their change; rest: more of it by place, at a lower
    resolution (hxwx3), or None. At any size, in blocks that bound the memory of large photos.
    """
    colours = pixels[region].astype(np.float32) / 255
    if rest is not None:
        rest = cv2.resize(rest, region.shape[::-1], interpolation=cv2.INTER_LINEAR)[region]
    for start in range(0, len(colours), BLOCK):
        block = slice(start, start + BLOCK)
        colours[block] += strength * (change(colours[block]) + (0 if rest is None else rest[block]))
    result = pixels.copy()
    result[region] = np.rint(np.clip(colours, 0, 1) * 255)
    return result


def blend(pixels: np.ndarray, colours: np.ndarray, region: np.ndarray, feather: float = 0.0) -> np.ndarray:
    """`colours` in the foreground, `pixels` elsewhere, and in the foreground's outermost `feather` pixels a mixture.

    Arrays HxWx3 uint8 and HxW bool. Feathering goes inward from the mask's edge, in a straight line from 0 just outside
    to 1 at depth `feather`; the picture's own border is no edge. Outside the region nothing changes.
    """
    if not feather:
        return paste(colours, pixels, region)
    depth = cv2.distanceTransform(np.pad(region, 1, mode="edge").astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    before, result = pixels[region].astype(np.float32), pixels.copy()
    result[region] = np.rint(before + np.clip(depth[region, None] / feather, 0, 1) * (colours[region] - before))
    return result


def _monomials(colours: np.ndarray) -> np.ndarray:
    """1, r, g, b, their squares and products of Nx3 colours in [0, 1]: Nx10."""
    r, g, b = colours.T
    return np.stack([np.ones_like(r), r, g, b, r * r, g * g, b * b, r * g, g * b, b * r], axis=1)


def colour_map(before: np.ndarray, after: np.ndarray, ridge: float = 1e-3):
    """A function from Nx3 float32 colours in [0, 1] to their change, fitted on Nx3 pairs.

    Ridge regression of the change on ten monomials: one quadratic map for all of a foreground, which can neither blur
    nor add texture.
    """
    features = _monomials(before.astype(np.float64))
    gram = features.T @ features + ridge * len(features) * np.diag([0.0] + [1.0] * 9)
    weights = np.linalg.lstsq(gram, features.T @ (after - before), rcond=None)[0].astype(np.float32)
    return lambda colours: _monomials(colours) @ weights


def smooth(values: np.ndarray, region: np.ndarray, sigma: float) -> np.ndarray:
    """HxWx3 float32 averaged by a Gaussian over the HxW bool region alone; 0 far from it."""
    weight = region.astype(np.float32)
    blur = functools.partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=sigma, borderType=cv2.BORDER_CONSTANT)
    return blur(values * weight[..., None]) / np.maximum(blur(weight), 1e-6)[..., None]


def carry_over(small, changed, small_region, fit_sigma: float = 1.0, rest_sigma: float = 3.0):
    """(change, rest) for `recolored`: what takes `small` to `changed` at any other size.

    HxWx3 uint8 twice and HxW bool, at working size. Most of the change is one colour map, fitted on colours averaged
    over `fit_sigma` pixels, which the model's own blur and noise mislead less; what it leaves (light that varies across
    the foreground) is averaged over `rest_sigma` pixels and added as it is. `benchmarks/carry_over.py` compares this
    with other ways.
    """
    small, changed = (array.astype(np.float32) / 255 for array in (small, changed))
    change = colour_map(*(smooth(array, small_region, fit_sigma)[small_region] for array in (small, changed)))
    rest = changed - small - change(small.reshape(-1, 3)).reshape(small.shape)
    return change, smooth(rest, small_region, rest_sigma)
