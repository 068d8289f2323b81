"""One call from a composite of any size, or from a cut-out and a background, to a harmonized picture.

The diffusion pipeline takes seconds to import, so it is imported only for its models.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from .core.decoding import MASK_THRESHOLD, alike, to_rgb, transparent, turn_along
from .core.devices import autocast, pick_device
from .core.errors import HarmonyError
from .core.files import stamp
from .core.images import paste, resize_mask, shrink_pair, to_tensor, to_uint8
from .core.json_files import read_json
from .core.picture_metadata import open_picture, picture, read_levels
from .core.placing import place
from .core.seeds import generator
from .models.colour_map import TERMS, apply_map, fit_map
from .models.resunet import ContrastiveResUNet
from .models.weights import at_revision, hub_folder, shipped_folder

MODELS = ("contrastive-resunet", "diffharmony++", "diffharmony")
BLOCK = 1_000_000  # pixels that are recoloured at a time
SMALL_FOREGROUND = 0.01  # share of the picture below which a model is shown a window instead of everything
RIDGE = 3e-3  # of `colour_map`, a pixel
Picture = str | Path | Image.Image | np.ndarray


class Scene(NamedTuple):
    """A composite taken apart; arrays of one height and width, uint8."""

    bands: np.ndarray  # HxWx3 or HxWx4: what lies behind the foreground; a copy of it becomes the result
    view: np.ndarray  # HxWx3: the composite, which models look at
    colours: np.ndarray  # HxWx3: the foreground's own colours, where known not mixed with what lies behind
    levels: np.ndarray  # HxW: its mask; above 127 is foreground to models and statistics, 1 to 254 blend
    info: dict  # of the picture to make


def harmonize(
    image: Picture, mask: Picture, model: str | Path = MODELS[0], seed: int = 0, device: str | None = None,
    strength: float = 1.0, feather: float = 0.0, fit_mask: bool = False, draws: int = 1, mask_from: str = "auto",
) -> Image.Image:  # fmt: skip
    """Harmonize one composite; the output has the input's size, transparency, EXIF and colour profile (in `.info`).

    image: path, PIL or HxWx3 uint8; mask: likewise, or HxW. Foreground is above 127 and levels 1 to 254 blend
    (`fit_mask` resizes a mask of another size; mask_from: "alpha" or "luminance" where both could be meant, see
    `decoding.mask_levels`). model: "contrastive-resunet", "diffharmony++", "diffharmony", a folder or ORG/NAME@REVISION
    (`load_model`). It runs at its own working size; its colour map, or the one that fits its output best
    (`carry_over`), times `strength` (0 to 1) is applied at full size, so that no detail is lost. The change falls to 0
    over the outermost `feather` pixels of the foreground. Background (level 0) and fully transparent pixels keep their
    values. EXIF rotation is applied. draws: of a diffusion model the mean of so many outputs is taken, which is nearer
    the real photo on average.
    Raises HarmonyError for unreadable files, sizes that differ, a mask without foreground or background, numbers out of
    range, or missing weights.
    """
    scene = open_scene(image, mask, fit_mask, mask_from)
    return apply_change(scene, *find_change(scene, model, seed, device, draws), strength, feather)


def compose(
    background: Picture, cutout: Picture, at: tuple[int, int] | None = None, scale: float = 1.0, angle: float = 0.0,
    harmonized: bool = False, model: str | Path = MODELS[0], seed: int = 0, device: str | None = None,
    strength: float = 1.0, feather: float = 0.0, draws: int = 1,
) -> Image.Image:  # fmt: skip
    """A cut-out laid on a background, whose size and metadata the result has; where alpha is 0, it stays as it is.

    background: path, PIL or HxWx3 uint8, opaque; cutout: path or PIL with transparency. at, scale, angle: as in
    `placing.place`. harmonized: the cut-out's own colours, not those mixed with the background along its edge, are
    changed as `harmonize` would do it (with the remaining arguments) and then blended by its alpha.
    Raises HarmonyError as `harmonize` and `place` do, for a background that can be seen through and a cut-out that
    cannot, or that covers everything where it is to be harmonized.
    """
    behind = _picture(background)
    if transparent(behind):
        raise HarmonyError(f"{_name(background, 'the background')}: has transparency; save it without (flattened)")
    layer = place(_picture(cutout), behind.size, at, scale, angle, _name(cutout, "the cut-out"))
    bands, front = np.asarray(behind.convert("RGB")), np.asarray(layer)
    colours, levels = front[..., :3], front[..., 3]
    scene = Scene(bands, blend(bands, colours, levels), colours, levels, _kept(behind))
    if not harmonized:
        return _image(scene.view, scene.info)
    _check_regions(levels, True, _name(cutout, "the cut-out"))
    return apply_change(scene, *find_change(scene, model, seed, device, draws), strength, feather)


def open_scene(image: Picture, mask: Picture, fit_mask: bool = False, mask_from: str = "auto") -> Scene:
    """A composite and its mask as `harmonize` takes them."""
    before = _picture(image)
    bands = np.array(before)
    view = bands if bands.shape[2] == 3 else np.asarray(to_rgb(before))
    levels = _levels(mask, before, bands, fit_mask, mask_from)
    return Scene(bands, view, bands[..., :3], levels, _kept(before))


def find_change(scene: Scene, model=MODELS[0], seed: int = 0, device=None, draws: int = 1):
    """(colour map 1x10x3, the rest of the change by place or None) that a model finds, as `recolored` takes them."""
    if draws < 1:
        raise HarmonyError(f"draws is {draws}; use 1 or more")
    loaded = load_model(str(model), str(pick_device(device)))
    region, size = scene.levels > MASK_THRESHOLD, working_size(loaded)
    window = model_window(region, size)
    small, small_region = shrink_pair(scene.view[window], region[window], size)
    if not small_region.any():
        raise HarmonyError("the foreground is too thin for the model's working size; thicken the mask")
    if isinstance(loaded, ContrastiveResUNet) and loaded.config.head == "colour":
        return predicted_map(loaded, small, small_region), None
    edge_size = getattr(getattr(loaded, "prompt", None), "edge_size", None)  # of an EdgePrompt, which is not imported
    edge = shrink_pair(scene.view[window], region[window], edge_size) if edge_size else None
    found, rest = carry_over(small, run_model(loaded, small, small_region, seed, draws, edge), small_region)
    if region[window].shape == region.shape:
        return found, rest
    whole = np.zeros(scene.view.shape, np.float32)
    whole[window] = cv2.resize(rest, region[window].shape[::-1], interpolation=cv2.INTER_LINEAR)
    return found, whole


def apply_change(scene: Scene, found, rest, strength: float = 1.0, feather: float = 0.0) -> Image.Image:
    """The scene with its foreground recoloured by what `find_change` gives, and blended by the mask's levels."""
    if not 0 <= strength <= 1:
        raise HarmonyError(f"strength is {strength:g}; use 0 (no change) to 1 (all of it)")
    if not 0 <= feather < float("inf"):
        raise HarmonyError(f"feather is {feather:g}; use a number of pixels, 0 or more")
    bands = scene.bands.copy()
    colours = recolored(scene.colours, scene.levels > 0, found, rest, strength)
    bands[..., :3] = blend(bands[..., :3], colours, scene.levels, feather)
    return _image(bands, scene.info)


def _image(bands: np.ndarray, info: dict) -> Image.Image:
    result = Image.fromarray(bands)
    result.info = info
    return result


def _kept(before: Image.Image) -> dict:
    """What a result keeps of its picture's `info`."""
    return {key: value for key, value in before.info.items() if key != "turned"}


def _name(source, other: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else other


def _picture(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return picture(image)
    if isinstance(image, (str, Path)):
        return open_picture(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise HarmonyError(f"the image is {pixels.dtype} {pixels.shape}; give HxWx3 uint8, PIL or a path")
    return Image.fromarray(pixels)


def _levels(mask, before: Image.Image, bands: np.ndarray, fit_mask: bool, mask_from: str) -> np.ndarray:
    """The HxW uint8 mask for HxWx3 or HxWx4 `bands` of the picture `before`, 0 where that is fully transparent."""
    name = _name(mask, "the mask")
    levels = turn_along(read_levels(mask, mask_from=mask_from), bands.shape, before.info.get("turned", 1))
    if levels.shape != bands.shape[:2]:
        sizes = " but the picture is ".join(f"{width}x{height}" for height, width in (levels.shape, bands.shape[:2]))
        if not alike(levels.shape, bands.shape) and alike(levels.shape[::-1], bands.shape):
            raise HarmonyError(f"{name}: is {sizes}; one of them is turned, so turn it upright")
        if not fit_mask:
            raise HarmonyError(f"{name}: is {sizes}; give one of that size or add --resize-mask")
        levels = resize_mask(levels, bands.shape[:2])
    visible = bands[..., 3] > 0 if bands.shape[2] == 4 else True
    _check_regions(levels, visible, name)
    return levels * visible


def _check_regions(levels: np.ndarray, visible, name: str) -> None:
    region = levels > MASK_THRESHOLD
    if not (region & visible).any():
        raise HarmonyError(f"{name}: no foreground (no pixel above 127); paint the foreground white")
    if not (~region & visible).any():
        raise HarmonyError(f"{name}: all is foreground, nothing is left to match; paint the background black")


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
    """The folder of a shipped model, of a trained one or of one of the hub, in its cache (`hub_folder`).

    Raises HarmonyError when there is none.
    """
    hub, revision = at_revision(name)
    if name in MODELS:
        folder = shipped_folder("diffharmony++" if name == "diffharmony" else name)
    else:
        folder = hub_folder(hub, **revision) if revision else Path(name)
    if not folder.is_dir():
        known = f"{', '.join(MODELS)}, the folder of a trained model or ORG/NAME@REVISION of the hub"
        raise HarmonyError(f"{folder}: no weights there; use {known}")
    return folder


def load_model(name: str, device: str):
    """A DiffHarmonyPipeline or ContrastiveResUNet in eval mode, kept for the next call unless its files change.

    name: one of MODELS, or a folder or ORG/NAME@REVISION of the hub: of either class (`save_pretrained`), of Stable
    Diffusion inpainting, or the published DiffHarmony++ archive (`base/` and `condition_vae/`). Raises HarmonyError
    when it cannot be loaded.
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
        vae = DiffHarmonyPipeline.from_pretrained(shipped_folder("base"), device=device).vae
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
def run_model(model, pixels: np.ndarray, region: np.ndarray, seed: int, draws: int = 1, edge=None) -> np.ndarray:
    """The model's raw output for HxWx3 uint8 and HxW bool, as HxWx3 uint8; no pasting. draws as in `harmonize`.

    edge: the same pair, larger, for the prompt of a diffusion model that reads the mask's edge.
    """
    pairs = (pixels, region, *(edge or (pixels, region)))
    image, mask, *edge = (to_tensor(array)[None].to(model.device) for array in pairs)
    with autocast(model.device):
        if isinstance(model, ContrastiveResUNet):
            return to_uint8(model(image, mask))[0]
        options = {"paste": False, "output_type": "pt", "candidates": draws, "prompt_embeds": model.prompt(*edge)}
        outputs = model(image, mask, generator=generator(seed, "harmonize"), **options).images
    return to_uint8(outputs.mean(0) * 2 - 1)


@torch.inference_mode()
def predicted_map(model: ContrastiveResUNet, pixels: np.ndarray, region: np.ndarray) -> torch.Tensor:
    """The colour map (1x10x3) that the model predicts for HxWx3 uint8 and HxW bool at its working size."""
    return model.colour_map(to_tensor(pixels)[None].to(model.device), to_tensor(region)[None].to(model.device)).cpu()


def recolored(pixels: np.ndarray, region: np.ndarray, colour_map, rest: np.ndarray | None, strength: float):
    """HxWx3 uint8: `pixels` with the foreground's colours moved by `strength` times what a colour map and `rest` say.

    colour_map: 1x10x3 (`models.colour_map`); rest: more of the change by place, in [-1, 1] colours at a lower
    or equal resolution (hxwx3), or None. At any size, in blocks that bound the memory of large photos.
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


def blend(pixels: np.ndarray, colours: np.ndarray, levels: np.ndarray, feather: float = 0.0) -> np.ndarray:
    """`colours` by level / 255 and `pixels` by the rest, rounded; where the level is 0 or 255 exactly one of them.

    Arrays HxWx3 uint8 and HxW uint8. feather: in the mask's outermost pixels the level falls inward from its edge, in a
    straight line from 0 just outside to all of it at that depth; the picture's own border is no edge.
    """
    weight = levels.astype(np.float32) / 255
    if feather:
        touched = np.pad(levels, 1, mode="edge") > 0
        depth = cv2.distanceTransform(touched.astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        weight *= np.clip(depth / feather, 0, 1)
    result, mixed = paste(colours, pixels, weight == 1), (weight > 0) & (weight < 1)
    before = pixels[mixed].astype(np.float32)
    result[mixed] = np.rint(before + weight[mixed, None] * (colours[mixed] - before))
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
