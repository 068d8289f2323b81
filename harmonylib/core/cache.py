"""Memory-mapped caches of what never changes: resized pixels and posterior moments of the frozen autoencoder.

A cache entry is one .npy file named after the hash of what went into it (file contents, weights, settings), written
beside its final place and renamed when complete, so that a killed run leaves nothing half-made; a damaged entry is made
anew. Of several processes that want one entry, one makes it and the others wait. All entries together stay below
HARMONYLIB_CACHE_GB gigabytes (a variable of the environment, since it changes no result): the ones not used for longest
make room.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from .distributed import rank_and_world
from .errors import HarmonyError
from .files import atomic_path, locked
from .images import read_image, read_mask, to_square
from .progress import progress

ROOT = Path("artifacts/cache")
DEFAULT_GB = 50.0


def file_digest(path) -> str:
    """Hash of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of a model's weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return hashlib.blake2b(save(tensors), digest_size=16).hexdigest()


def settings_of(config) -> dict:
    """What a diffusers config says, without the entries that tell where and by what it was written."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def cached_array(key: dict, shape, dtype, fill) -> np.ndarray:
    """The read-only array stored under `key`; on the first call `fill(array)` makes it.

    Raises HarmonyError for an entry over the cache's bound, or over what the disk has left.
    """
    path = _path(key)
    with contextlib.suppress(FileNotFoundError):
        if _whole(path):
            with contextlib.suppress(OSError):  # a read-only cache
                os.utime(path)  # used now
            return np.load(path, mmap_mode="r")
    _make(key, shape, dtype, fill)
    return cached_array(key, shape, dtype, fill)


def _make(key: dict, shape, dtype, fill, part_of: dict | None = None) -> None:
    """Write the entry of `key` unless it is there, or the entry `part_of`; waits where another process writes it."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not _whole(path) and not (part_of and _path(part_of).is_file()):
            for leftover in ROOT.glob(f".{path.stem}.*"):  # of a killed process, since the lock is ours
                leftover.unlink()
            _make_room(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
            with atomic_path(path) as temporary:
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=tuple(shape))
                fill(array)
                array.flush()
                del array
                path.with_suffix(".sum").write_text(_checksum(temporary))
            _checked.add(path)


def _path(key: dict) -> Path:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    return ROOT / f"{digest}.npy"


def _remove(path: Path) -> None:
    """Delete an entry. Arrays in use stay readable (POSIX)."""
    for part in (path, path.with_suffix(".sum")):
        part.unlink(missing_ok=True)


_checked: set[Path] = set()  # entries whose checksum this process has compared


def _checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return str(value)


def _whole(path: Path) -> bool:
    """Whether the entry is there and as it was written (looked at once by each process, at some GB a second)."""
    if path not in _checked and path.is_file():
        with contextlib.suppress(FileNotFoundError):
            if path.with_suffix(".sum").read_text() == _checksum(path):
                _checked.add(path)
    return path in _checked and path.is_file()


def limit() -> float:
    """The bound of the cache in bytes. Raises HarmonyError when HARMONYLIB_CACHE_GB is no number above 0."""
    text = os.environ.get("HARMONYLIB_CACHE_GB", str(DEFAULT_GB))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise HarmonyError(f"HARMONYLIB_CACHE_GB={text}: must be a number of gigabytes above 0")
    return value * 1e9


def _make_room(size: int) -> None:
    """Delete the entries not used for longest until `size` more bytes fit."""
    bound = limit()
    if size > bound:
        raise HarmonyError(
            f"{ROOT}: an entry needs {size / 1e9:.1f} GB, the cache has {bound / 1e9:g}; set HARMONYLIB_CACHE_GB higher"
        )
    entries = {}
    for path in ROOT.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            entries[path] = path.stat()
    total = size + sum(entry.st_size for entry in entries.values())
    for path, entry in sorted(entries.items(), key=lambda item: item[1].st_mtime):
        if total <= bound:
            break
        total -= entry.st_size
        _remove(path)
    if size > shutil.disk_usage(ROOT).free:
        raise HarmonyError(f"{ROOT}: no room for {size / 1e9:.1f} GB; free some, or run `harmonylib cache clear`")


def pixels(paths, size: int, geometry: str, mask: bool = False) -> np.ndarray:
    """Decoded squares of image or mask files: N x size x size x 3 uint8, or N x size x size bool.

    geometry as in `images.to_square`.
    """
    paths = list(paths)
    key = {"files": [file_digest(p) for p in paths], "size": size, "geometry": geometry, "mask": mask}
    read = read_mask if mask else read_image

    def fill(array):
        for i, path in enumerate(progress(paths, desc="caching masks" if mask else "caching images", unit="file")):
            array[i] = to_square(read(path), size, geometry)

    return cached_array(key, (len(paths), size, size) + (() if mask else (3,)), bool if mask else np.uint8, fill)


def moments(vae, images: np.ndarray, device, batch_size: int = 32) -> np.ndarray:
    """Posterior moments of images (N x S x S x 3 uint8) and of their mirror images: 2 x N x 2C x h x w float16.

    The autoencoder's encoder is frozen in every stage, so this is computed once per image (Sec. 3.2). Under torchrun
    each process encodes its share, and one of them puts the shares together.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = images.shape[1] // factor
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=16).hexdigest()
    encoder = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    key = {"images": digest, "weights": [weights_digest(m) for m in encoder.values()], "kind": "moments"}
    rank, world = rank_and_world()

    @torch.inference_mode()
    def encode(first, last, array):
        for start in progress(range(first, last, batch_size), desc="encoding", unit="batch"):
            batch = torch.from_numpy(np.array(images[start : min(start + batch_size, last)])).permute(0, 3, 1, 2)
            batch = batch.to(device).float().div(127.5).sub(1.0)
            for mirrored, tensor in enumerate((batch, batch.flip(-1))):
                values = vae.encode(tensor).latent_dist.parameters
                array[mirrored, start - first : start - first + len(tensor)] = values.float().cpu().numpy()

    def entry(key, first, last, fill):
        return key, (2, last - first, 2 * vae.config.latent_channels, side, side), np.float16, fill

    if world == 1:
        return cached_array(*entry(key, 0, len(images), partial(encode, 0, len(images))))

    batches = -(-len(images) // batch_size)  # shares are of whole batches, so that their number changes no rounding
    bounds = [min(len(images), batches * number // world * batch_size) for number in range(world + 1)]
    shares = [
        entry(key | {"share": [number, world]}, first, last, partial(encode, first, last))
        for number, (first, last) in enumerate(pairwise(bounds))
    ]

    def join(array):
        for share, (first, last) in zip(shares, pairwise(bounds), strict=True):
            array[:, first:last] = cached_array(*share)  # waits where its process is at work

    if not _path(key).is_file():
        _make(*shares[rank], part_of=key)  # not opened here: the others may have joined and removed it by now
    joined = cached_array(*entry(key, 0, len(images), join))
    for share_key, *_ in shares:
        _remove(_path(share_key))
    return joined


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
