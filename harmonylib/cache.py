"""Memory-mapped caches of what never changes: resized pixels and posterior moments of the frozen autoencoder.

A cache entry is one .npy file named after the hash of what went into it (file contents, weights, settings), written
beside its final place and renamed when complete, so that a killed run leaves nothing half-made.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from .files import atomic_path
from .images import read_image, read_mask, resize_image, resize_mask
from .progress import progress

ROOT = Path("artifacts/cache")


def file_digest(path) -> str:
    """Hash of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of a model's weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return hashlib.blake2b(save(tensors), digest_size=16).hexdigest()


def cached_array(key: dict, shape, dtype, fill) -> np.ndarray:
    """The read-only array stored under `key`; on the first call `fill(array)` makes it."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = ROOT / f"{digest}.npy"
    if not path.is_file():
        with atomic_path(path) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=tuple(shape))
            fill(array)
            array.flush()
            del array
    return np.load(path, mmap_mode="r")


def centre_square(array: np.ndarray) -> np.ndarray:
    """The centred square of an HxW or HxWxC array."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def pixels(paths, size: int, geometry: str, mask: bool = False) -> np.ndarray:
    """Decoded squares of image or mask files: N x size x size x 3 uint8, or N x size x size bool.

    geometry: "squash" resizes whatever the aspect; "centre-crop" takes the centred square first (equal to resizing the
    shorter side and cropping the centre).
    """
    paths = list(paths)
    key = {"files": [file_digest(p) for p in paths], "size": size, "geometry": geometry, "mask": mask}
    read, resize = (read_mask, resize_mask) if mask else (read_image, resize_image)

    def fill(array):
        for i, path in enumerate(progress(paths, desc="caching masks" if mask else "caching images", unit="file")):
            pixels = read(path)
            array[i] = resize(centre_square(pixels) if geometry == "centre-crop" else pixels, (size, size))

    return cached_array(key, (len(paths), size, size) + (() if mask else (3,)), bool if mask else np.uint8, fill)


def moments(vae, images: np.ndarray, device, batch_size: int = 32) -> np.ndarray:
    """Posterior moments of images (N x S x S x 3 uint8) and of their mirror images: 2 x N x 2C x h x w float16.

    The autoencoder's encoder is frozen in every stage, so this is computed once per image (Sec. 3.2).
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = images.shape[1] // factor
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=16).hexdigest()
    encoder = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    key = {"images": digest, "weights": [weights_digest(m) for m in encoder.values()], "kind": "moments"}

    @torch.inference_mode()
    def fill(array):
        for start in progress(range(0, len(images), batch_size), desc="encoding", unit="batch"):
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).permute(0, 3, 1, 2)
            batch = batch.to(device).float().div(127.5).sub(1.0)
            for mirrored, tensor in enumerate((batch, batch.flip(-1))):
                values = vae.encode(tensor).latent_dist.parameters
                array[mirrored, start : start + len(tensor)] = values.float().cpu().numpy()

    shape = (2, len(images), 2 * vae.config.latent_channels, side, side)
    return cached_array(key, shape, np.float16, fill)


def clear() -> int:
    """Delete the cache; returns the bytes freed."""
    size = sum(path.stat().st_size for path in ROOT.glob("*.npy")) if ROOT.is_dir() else 0
    shutil.rmtree(ROOT, ignore_errors=True)
    return size
