"""Where to compute and in which precision."""

import contextlib
import os

import torch

from .errors import HarmonyError

AREA = 1024 * 1024  # pixels that go through a network at once outside of training: under 8 GB in Stable Diffusion's


def pick_device(name: str | None = "auto") -> torch.device:
    """ "auto" (or None) is cuda, then mps, then cpu; under torchrun "cuda" is the process's own GPU.

    Raises HarmonyError for a device that is not there.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise HarmonyError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try device: auto") from None


def idle_cores(seconds: float = 0.5) -> int:
    """How many CPU cores a stage should use, at least 1: those that this process may use (its affinity, its container's
    share) and that other programs, watched for so long, leave idle.

    Threads of one operation wait for the slowest: two beside a busy program take 3 times as long as one. The number
    changes the last digits of results. OMP_NUM_THREADS in the environment goes before it.
    """
    import joblib
    import psutil

    cores = psutil.cpu_count() or 1
    return max(1, min(joblib.cpu_count(), round(cores * (1 - psutil.cpu_percent(seconds) / 100))))


def has_bf16(device: torch.device) -> bool:
    """True on CUDA with bf16 units and on CPUs with AVX512-bf16 or AMX, where bf16 autocast is 1.3-1.7x faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def actual_precision(device: torch.device, precision: str = "auto") -> str:
    """ "fp32", "bf16" or "fp16"; of "auto" it is bf16 where the hardware has it, else fp32.

    Raises HarmonyError for fp16 on a CPU, which has no fp16 kernels worth the name, and for unknown names.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise HarmonyError(f"precision {precision!r} is unknown; use auto, fp32, bf16 or fp16")
    if precision == "fp16" and device.type == "cpu":
        raise HarmonyError("precision fp16 does not run on a CPU; use precision: auto or fp32")
    return precision if precision != "auto" else "bf16" if has_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str = "auto"):
    """Context for mixed precision, as `actual_precision` says, which raises HarmonyError."""
    actual = actual_precision(device, precision)
    if actual == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if actual == "fp16" else torch.bfloat16)


def rows_at_once(pixels: int) -> int:
    """How many pictures of so many pixels `in_parts` takes at a time."""
    return max(1, AREA // pixels)


def in_parts(call, *tensors: torch.Tensor, pixels: int) -> torch.Tensor:
    """call(*tensors), tensors of B rows, computed `rows_at_once` and joined: a large batch needs no more memory.

    pixels: of the picture that a row stands for. While gradients are recorded all rows go at once.
    """
    rows = rows_at_once(pixels)
    if torch.is_grad_enabled() or len(tensors[0]) <= rows:
        return call(*tensors)
    return torch.cat([call(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])
