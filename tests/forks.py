"""Child processes to kill or to connect, forked from a server that has imported torch already: they start at once."""

import faulthandler
import multiprocessing
import os
import socket

import pytest

if os.name == "nt":
    pytest.skip("processes are forked and killed here", allow_module_level=True)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["harmonylib.models.base", "harmonylib.augmentation.candidates"])


def start(function, *arguments, **environment):
    """A running child process with these environment variables; functions are of module level."""
    process = CONTEXT.Process(target=_child, args=(function, arguments, environment))
    process.start()
    return process


def start_group(function, *arguments, world: int = 2) -> list:
    """The running processes of a group, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    return [start(function, *arguments, RANK=rank, LOCAL_RANK=rank, **names) for rank in range(world)]


def codes(processes) -> list[int]:
    """Exit codes: 0 for success, 1 for an exception, minus the signal for a killed process."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _child(function, arguments, environment):
    import torch

    faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs says where
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)
