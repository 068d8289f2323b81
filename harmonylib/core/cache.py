"""Memory-mapped caches of what never changes: resized pixels and posterior moments of the frozen autoencoder.

An entry is one .npy file named after the hash of what went into it. Killed runs leave nothing half-made. Of several
processes one makes it and the others wait, or under torchrun each makes a share (`shared_array`). All stay below
`cache_gb` of params.yaml (it changes no result): those not used for longest make room.
"""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from .devices import rows_at_once
from .distributed import rank_and_world
from .errors import HarmonyError
from .files import atomic_path, locked
from .images import read_image, read_mask, to_square
from .progress import progress
from .settings import find_root, read_yaml

ROOT = Path("artifacts/cache")


def _digest(data) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path) -> str:
    """Hash of a file's bytes."""
    return _digest(Path(path).read_bytes())


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of a model's weights, one tensor after the other: no second copy of all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pipeline_digest(pipeline) -> str:
    """Hash of all in a DiffHarmonyPipeline that decides its output: weights and configs of its parts."""
    weights = [weights_digest(getattr(pipeline, name)) for name in ("vae", "unet", "prompt")]
    configs = [settings_of(getattr(pipeline, name).config) for name in ("vae", "unet", "scheduler")]
    return _digest(json.dumps([weights, configs], sort_keys=True).encode())


def settings_of(config) -> dict:
    """What a diffusers config says, without the entries that tell where and by what it was written."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _path(key: dict) -> Path:
    return ROOT / f"{_digest(json.dumps(key, sort_keys=True).encode())}.npy"


def cached_array(key: dict, shape, dtype, fill) -> np.ndarray:
    """The read-only array stored under `key`; on the first call `fill(array)` makes it, while other processes wait.

    Raises HarmonyError for an entry over the cache's bound, or over what the disk has left.
    """
    path = _path(key)
    if (stored := _stored(path)) is not None:
        return stored
    ROOT.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if (stored := _stored(path)) is not None:
            return stored
        for leftover in ROOT.glob(f".{path.stem}.*"):  # of a killed process, since the lock is ours
            leftover.unlink()
        _make_room(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        with atomic_path(path, durable=True) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=tuple(shape))
            fill(array)
            del array
        return np.load(path, mmap_mode="r")


def shared_array(key: dict, shape, dtype, fill, rows: int = 1, axis: int = 0) -> np.ndarray:
    """`cached_array` whose part from `first` to `last` along an axis fill(array, first, last) makes.

    Under torchrun each process makes a share, of whole blocks of `rows` so that their number changes no rounding, and
    one of them puts the shares together.
    """
    (rank, world), count = rank_and_world(), shape[axis]
    if world == 1:
        return cached_array(key, shape, dtype, lambda array: fill(array, 0, count))
    blocks = -(-count // rows)
    bounds = list(pairwise(min(count, blocks * n // world * rows) for n in range(world + 1)))

    def share(first, last):
        part = (*shape[:axis], last - first, *shape[axis + 1 :])
        return key | {"share": [first, last]}, part, dtype, lambda array: fill(array, first, last)

    def join(array):
        for first, last in bounds:
            made = cached_array(*share(first, last))  # waits where its process is at work
            np.moveaxis(array, axis, 0)[first:last] = np.moveaxis(made, axis, 0)

    if not _path(key).is_file():
        cached_array(*share(*bounds[rank]))
    joined = cached_array(key, shape, dtype, join)
    for bound in bounds:
        _path(share(*bound)[0]).unlink(missing_ok=True)
    return joined


def _stored(path: Path) -> np.ndarray | None:
    """An entry, marked as used now; None where there is none or it was cut off."""
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):
        array = np.load(path, mmap_mode="r")
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(path)
        return array
    return None


def cache_gb() -> float:
    """What params.yaml allows; 50 outside of a repository."""
    with contextlib.suppress(HarmonyError):
        return float((read_yaml(find_root() / "params.yaml") or {}).get("cache_gb", 50))
    return 50.0


def _make_room(size: int) -> None:
    """Delete the entries not used for longest until `size` more bytes fit; arrays in use stay readable (POSIX)."""
    if size > (bound := 1e9 * cache_gb()):
        raise HarmonyError(f"{ROOT}: an entry needs {size / 1e9:.1f} GB, cache_gb is {cache_gb():g}; set it higher")
    entries = []
    for path in ROOT.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = size + sum(held for _, held, _ in entries)
    for _, held, path in sorted(entries):
        if total > bound:
            total -= held
            path.unlink(missing_ok=True)
    if size > shutil.disk_usage(ROOT).free:
        raise HarmonyError(f"{ROOT}: no room for {size / 1e9:.1f} GB; free some, or run `harmonylib cache clear`")


class Squares:
    """Image or mask files as squares, N x S x S x 3 uint8 or N x S x S bool, decoded when some are asked for.

    geometry as in `images.to_square`. `stored` is the same as a cache entry.
    """

    def __init__(self, paths, size: int, geometry: str, mask: bool = False):
        self.paths, self.size, self.geometry, self.mask = list(paths), size, geometry, mask
        self.shape = (len(self.paths), size, size) + (() if mask else (3,))

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digests(self) -> list[str]:
        return [file_digest(path) for path in self.paths]

    def key(self) -> dict:
        """What decides their pixels."""
        return {"files": self.digests, "size": self.size, "geometry": self.geometry, "mask": self.mask}

    def _read(self, number: int) -> np.ndarray:
        path = self.paths[number]
        return to_square(read_mask(path) if self.mask else read_image(path), self.size, self.geometry)

    def __getitem__(self, rows) -> np.ndarray:
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            return self._read(int(chosen))
        with ThreadPoolExecutor(min(8, len(chosen)) or 1) as pool:  # decoders let go of Python's lock
            return np.array(list(pool.map(self._read, chosen.tolist()))).reshape(-1, *self.shape[1:])

    def stored(self) -> np.ndarray:
        def fill(array, first, last):
            name = "caching masks" if self.mask else "caching images"
            for start in progress(range(first, last, 32), desc=name, unit="32 files"):
                array[start - first : start - first + 32] = self[start : min(start + 32, last)]

        return shared_array(self.key(), self.shape, bool if self.mask else np.uint8, fill, 32)


def moments(vae, images: Squares, device, batch_size: int = 32) -> np.ndarray:
    """Posterior moments of images and of their mirror images: 2 x N x 2C x h x w float16.

    The autoencoder's encoder is frozen in every stage, so this is computed once per image (Sec. 3.2), of files that are
    decoded on the way.
    """
    batch_size = min(batch_size, rows_at_once(images.size**2))
    side = images.size // 2 ** (len(vae.config.block_out_channels) - 1)
    weights = [weights_digest(part) for part in (vae.encoder, vae.quant_conv)]

    @torch.inference_mode()
    def encode(array, first, last):
        for start in progress(range(first, last, batch_size), desc="encoding", unit="batch"):
            batch = torch.from_numpy(images[start : min(start + batch_size, last)]).permute(0, 3, 1, 2)
            batch = batch.to(device).float().div(127.5).sub(1.0)
            for mirrored, tensor in enumerate((batch, batch.flip(-1))):
                values = vae.encode(tensor).latent_dist.parameters
                array[mirrored, start - first : start - first + len(tensor)] = values.float().cpu().numpy()

    key = {"images": images.key(), "weights": weights, "kind": "moments"}
    shape = (2, len(images), 2 * vae.config.latent_channels, side, side)
    return shared_array(key, shape, np.float16, encode, batch_size, axis=1)


def clear() -> int:
    """Delete the cache, with what killed processes left in it; returns the bytes freed."""
    size = 0
    for path in list(ROOT.iterdir()) if ROOT.is_dir() else []:
        if path.is_symlink() or not path.is_dir():  # a disk that is mounted here has its lost+found
            size += path.stat().st_size
            path.unlink()
    with contextlib.suppress(OSError):  # not there, a link to another disk, or in use again
        ROOT.rmdir()
    return size
