"""One call from a composite of any size to a harmonized picture.

The diffusion pipeline takes seconds to import, so it is imported only for its models.
"""

import functools
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
from .core.json_files import read_json
from .core.picture_metadata import open_picture, picture, read_region
from .core.seeds import generator
from .models.colour_map import TERMS, apply_map, fit_map
from .models.resunet import ContrastiveResUNet
from .models.weights import SHIPPED

MODELS = ("contrastive-resunet", "diffharmony++", "diffharmony")
BLOCK = 1_000_000  # pixels that are recoloured at a time
SMALL_FOREGROUND = 0.01  # share of the picture below which a model is shown a window instead of everything
RIDGE = 3e-3  # of `colour_map`, a pixel


def harmonize(
    image, mask, model=MODELS[0], seed: int = 0, device=None, strength=1.0, feather=0.0, fit_mask=False, draws: int = 1,
    mask_from: str = "auto",
) -> Image.Image:  # fmt: skip
    """Harmonize one composite; the output has the input's size, transparency, EXIF and colour profile (in `.info`).

    image: path, PIL or HxWx3 uint8; mask: likewise, foreground above 127 (`fit_mask` resizes one of another size;
    mask_from: "alpha" or "luminance" where both could be meant, see `decoding.mask_levels`).
    model: "contrastive-resunet", "diffharmony++", "diffharmony" or a folder (`load_model`). It runs at its own working
    size; its colour map, or the one that fits its output best (`carry_over`), times `strength` (0 to 1) is applied at
    full size, so that no detail is lost. The change falls to 0 over the outermost `feather` pixels of the foreground.
    Background and fully transparent pixels keep their values. EXIF rotation is applied. draws: of a diffusion model
    the mean of so many outputs is taken, which is nearer the real photo on average.
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
    if isinstance(loaded, ContrastiveResUNet) and loaded.config.head == "colour":
        found, rest = predicted_map(loaded, small, small_region), None
    else:
        found, rest = carry_over(small, run_model(loaded, small, small_region, seed, draws), small_region)
    colours = recolored(pixels, region[window], found, rest, strength)
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
    if (folder / "config.json").is_file():
        if read_json(folder / "config.json").get("_class_name") != "ContrastiveResUNet":
            raise HarmonyError(f"{folder}: not a ContrastiveResUNet; name the folder of a whole pipeline")
        return ContrastiveResUNet.from_pretrained(folder).eval().to(device)
    from .models.pipeline import DiffHarmonyPipeline, HarmonyVAE

    vae = None
    if name == "diffharmony":
        vae = DiffHarmonyPipeline.from_pretrained(SHIPPED / "base", device=device).vae
    elif (folder / "condition_vae").is_dir():
        folder, vae = folder / "base", HarmonyVAE.from_pretrained(folder / "condition_vae")
    if not (folder / "model_index.json").is_file():
        kinds = "neither a DiffHarmony pipeline nor a ContrastiveResUNet"
        raise HarmonyError(f"{folder}: {kinds}; name a trained model's folder")
    pipeline = DiffHarmonyPipeline.from_pretrained(folder, vae=vae, device=device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def working_size(model) -> int:
    """The long side in pixels a model was trained for (`sample_size` in its config; of a pipeline the larger of the
    autoencoder's and the UNet's, whose size counts latents: Stable Diffusion's 64 are 512 px)."""
    if isinstance(model, ContrastiveResUNet):
        return model.config.sample_size
    return max(model.vae.config.sample_size, (model.unet.config.sample_size or 0) * model.factor)


@torch.inference_mode()
def run_model(model, pixels: np.ndarray, region: np.ndarray, seed: int, draws: int = 1) -> np.ndarray:
    """The model's raw output for HxWx3 uint8 and HxW bool, as HxWx3 uint8; no pasting. draws as in `harmonize`."""
    image, mask = to_tensor(pixels)[None].to(model.device), to_tensor(region)[None].to(model.device)
    with autocast(model.device):
        if isinstance(model, ContrastiveResUNet):
            return to_uint8(model(image, mask))[0]
        options = {"paste": False, "output_type": "pt", "candidates": draws}
        outputs = model(image, mask, generator=generator(seed, "harmonize"), **options).images
    return to_uint8(outputs.mean(0) * 2 - 1)


@torch.inference_mode()
def predicted_map(model: ContrastiveResUNet, pixels: np.ndarray, region: np.ndarray) -> torch.Tensor:
    """The colour map (1x10x3) that the model predicts for HxWx3 uint8 and HxW bool at its working size."""
    return model.colour_map(to_tensor(pixels)[None].to(model.device), to_tensor(region)[None].to(model.device)).cpu()


def recolored(pixels: np.ndarray, region: np.ndarray, colour_map, rest: np.ndarray | None, strength: float):
    """HxWx3 uint8: `pixels` with the foreground's colours moved by `strength` times what a colour map and `rest` say.

    colour_map: 1x10x3 (`models.colour_map`); rest: more of the change by place, in [-1, 1] colours at a lower
    resolution (hxwx3), or None. At any size, in blocks that bound the memory of large photos.
    """
    colours = pixels[region]
    if rest is not None:
        rest = cv2.resize(rest, region.shape[::-1], interpolation=cv2.INTER_LINEAR)[region]
    for start in range(0, len(colours), BLOCK):
        block = slice(start, start + BLOCK)
        before = torch.from_numpy(colours[block]).float().div(127.5).sub(1)
        after = apply_map(strength * colour_map, before.T[None])[0].T
        if rest is not None:
            after = after + strength * torch.from_numpy(rest[block])
        colours[block] = to_uint8(after.T[..., None])[:, 0]
    result = pixels.copy()
    result[region] = colours
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


def colour_map(before: np.ndarray, after: np.ndarray, ridge: float = RIDGE) -> torch.Tensor:
    """The colour map (1x10x3) fitted to Nx3 pairs of colours in [-1, 1]; it can neither blur nor add texture."""
    before, after = (torch.from_numpy(np.ascontiguousarray(x.T, np.float32))[None] for x in (before, after))
    weights, prior = torch.ones(1, before.shape[2]), torch.zeros(1, TERMS, 3)
    return fit_map(before, after, weights, prior, torch.full((1, TERMS), ridge * before.shape[2]))


def smooth(values: np.ndarray, region: np.ndarray, sigma: float) -> np.ndarray:
    """HxWx3 float32 averaged by a Gaussian over the HxW bool region alone; 0 far from it."""
    weight = region.astype(np.float32)
    blur = functools.partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=sigma, borderType=cv2.BORDER_CONSTANT)
    return blur(values * weight[..., None]) / np.maximum(blur(weight), 1e-6)[..., None]


def carry_over(small, changed, small_region, fit_sigma: float = 1.0, rest_sigma: float = 3.0):
    """(colour map, rest) for `recolored`: what takes `small` to `changed` at any other size.

    HxWx3 uint8 twice and HxW bool, at working size. Most of the change is one colour map, fitted on colours averaged
    over `fit_sigma` pixels, which the model's own blur and noise mislead less; what it leaves (light that varies across
    the foreground) is averaged over `rest_sigma` pixels and added as it is. `benchmarks/carry_over.py` compares this
    with other ways.
    """
    before, after = (array.astype(np.float32) / 127.5 - 1 for array in (small, changed))
    found = colour_map(*(smooth(array, small_region, fit_sigma)[small_region] for array in (before, after)))
    mapped = apply_map(found, torch.from_numpy(before).movedim(-1, 0)[None])[0].movedim(0, -1).numpy()
    return found, smooth(after - mapped, small_region, rest_sigma)
