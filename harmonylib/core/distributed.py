"""The processes that torchrun starts: who is who, and noise that does not depend on how many there are."""

import os
from datetime import timedelta

import torch
from torch.overrides import TorchFunctionMode

from .devices import pick_device

SHARE = "HARMONYLIB_SHARE"  # "number/count" of a process that takes whole runs of an ablation


def rank_and_world() -> tuple[int, int]:
    """(this process's number, how many there are) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_group(device: torch.device):
    """accelerate's PartialState; on its first call this process joins the others (NCCL on CUDA, else gloo)."""
    from accelerate import PartialState

    # one that has done its share may wait for days; of a process that dies torchrun ends the others
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))


def share_of(jobs: list) -> list:
    """This process's part of jobs that several processes do apart from one another, told by the variable SHARE."""
    number, count = map(int, os.environ.get(SHARE, "0/1").split("/"))
    return jobs[number::count]


def all_here(device="auto") -> None:
    """Return when every process has come here; at once where no address is given to meet at."""
    if rank_and_world()[1] > 1 and "MASTER_ADDR" in os.environ:
        join_group(pick_device(device)).wait_for_everyone()


def by_first(write, device="auto") -> None:
    """Call `write` in the first process; all return when it has."""
    if rank_and_world()[0] == 0:
        write()
    all_here(device)


class ShareOfDraws(TorchFunctionMode):
    """Inside, torch.rand, randn and randint with `generator` give share `number` of `count` its rows of all draws.

    rows: of the batch in the share; a draw's first dimension must be a multiple of it (twice, for images and their
    partners: each half is shared out). So a step's noise is the same for any number of shares. Draws from other
    generators and draws of single numbers pass through.
    """

    def __init__(self, generator: torch.Generator, rows: int, number: int, count: int):
        super().__init__()
        self.generator, self.rows, self.number, self.count = generator, rows, number, count

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        ours = function in (torch.rand, torch.randn, torch.randint) and options.get("generator") is self.generator
        size = tuple(arguments if isinstance(arguments[-1], int) else arguments[-1]) if ours else ()
        if not size:
            return function(*arguments, **options)
        times, rest = divmod(size[0], self.rows)
        assert not rest, f"a draw of {size} cannot be shared: its first dimension is not the batch's {self.rows}"
        bounds = arguments[:-1] if function is torch.randint else ()
        drawn = function(*bounds, (size[0] * self.count, *size[1:]), **options)
        return drawn.unflatten(0, (times, self.count, self.rows))[:, self.number].reshape(size)
