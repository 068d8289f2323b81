"""What goes wrong in long runs, injected: docs/faults.md says what happens then.

Of a run that was stopped or killed, the next one ends with the same weights, or the same files, as one undisturbed.
"""

import functools
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import forks
import nbformat
import pytest
import torch
import trainers
import typer
from nbformat import v4
from safetensors.torch import load_file
from test_training import SETTINGS, problem, run

from harmonylib.augmentation import candidates
from harmonylib.core.errors import HarmonyError
from harmonylib.data.layout import read_triples
from harmonylib.tools import cli
from harmonylib.training import TrainingDiverged

_, toy_loss, toy_batch = problem()


def toy_train(folder, loss=toy_loss, batch=toy_batch) -> dict[str, torch.Tensor]:
    model = problem()[0]
    run(model, loss, batch, replace(SETTINGS, steps=60), checkpoints=folder)
    return model.state_dict()


def slow_toy(folder, log=lambda step: None):
    return toy_train(folder, batch=lambda step: log(step) or time.sleep(0.005) or toy_batch(step))


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole():
    return toy_train(None)


def saved(folder) -> list[Path]:
    return sorted(Path(folder).glob("*/step-*.pt"))


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def stop_at(step, signals=()):
    """Batches that stop the training at a step: by an exception, or by signals to this process."""

    def batch(now):
        if now == step and not signals:
            raise KeyboardInterrupt
        for number in signals if now == step else ():
            os.kill(os.getpid(), number)
        return toy_batch(now)

    return batch


def stopped(owner, name, call, function, *arguments, rank="0", number=signal.SIGKILL, pause=0.0):
    """Call a function, in whose course the nth call of owner.name sends a signal to this process, if of this rank."""
    owner = pkgutil.resolve_name(owner)
    original, count = getattr(owner, name), []

    def counted(*words):
        count.append(1)
        time.sleep(pause)
        if len(count) == call and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), number)
        return original(*words)

    with patch.object(owner, name, counted):
        return function(*arguments)


def on_a_full_disk(limit: int, function, *arguments):
    import resource  # not on Windows, where this file is skipped (forks.py)

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the kernel fails what is written beyond it
    try:
        function(*arguments)
    except OSError:
        os._exit(7)


# ---- training ----


def test_killed_while_saving(tmp_path, whole):
    assert forks.codes([forks.start(stopped, "os", "replace", 5, toy_train, tmp_path)]) == [-signal.SIGKILL]
    assert [path.stem for path in saved(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list(tmp_path.rglob(".step-*.pt"))) == 1  # half-written
    assert same(toy_train(tmp_path), whole)
    assert not list(tmp_path.rglob(".step-*.pt"))


def test_every_trainer_resumes(tmp_path):
    trainers.make_set(tmp_path / "set")
    third_save = (stopped, "harmonylib.core.checkpoints:Checkpoints", "save", 3)
    for before, code in ((third_save, -signal.SIGKILL), ((), 0)):
        runs = [(trainers.write_trained, name, tmp_path, f"{name}.pt", 5, "checkpoints") for name in trainers.TRAINERS]
        assert forks.codes([forks.start(*before, *run) for run in runs]) == [code] * len(runs)
    for trainer in trainers.TRAINERS:
        assert same(load(tmp_path / f"{trainer}.pt"), trainers.trained(trainer, tmp_path)), trainer


def test_interrupted(tmp_path, whole):
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt) as stop:
            toy_train(folder, batch=stop_at(20, [number]))
        done = int(re.search(r"after step (\d+)", str(stop.value))[1])
        assert saved(folder)[-1].stem == f"step-{done:08d}" and done <= 21
        assert same(toy_train(folder), whole)
    assert signal.getsignal(signal.SIGINT) is before

    app = typer.Typer()
    app.command()(lambda: toy_train(tmp_path / "command", batch=stop_at(20, [signal.SIGINT])))
    assert cli.run(app, "x", ["--"]) == 130


@pytest.mark.parametrize("damage", ["cut", "flipped bit"])
def test_damaged_checkpoint(tmp_path, whole, damage):
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, batch=stop_at(30))
    newest = saved(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        tensor = next(iter(load(newest)["modules"][0].values()))
        data[data.index(tensor.numpy().tobytes()) + 1] ^= 4  # inside the first weight
    newest.write_bytes(data)
    steps = []
    again = toy_train(tmp_path, batch=lambda step: steps.append(step) or toy_batch(step))
    assert steps[:2] == [0, 29] and same(again, whole)  # 0: the batch that is part of the key


def test_nan_in_the_loss_or_the_gradient(tmp_path):
    def poisoned(net, batch, draws):
        terms = toy_loss(net, batch, draws)
        return {"loss": terms["loss"] * (float("nan") if torch.equal(batch["x"], toy_batch(5)["x"]) else 1.0)}

    with pytest.raises(TrainingDiverged, match=r"loss or gradient is not finite at step 6; .*; lower learning_rate"):
        toy_train(tmp_path / "loss", poisoned)
    assert torch.equal(load_file(next(tmp_path.rglob("*.safetensors")))["x"], toy_batch(5)["x"])
    last = load(saved(tmp_path / "loss")[-1])
    assert last["step"] == 5 and all(value.isfinite().all() for value in last["modules"][0].values())
    with pytest.raises(TrainingDiverged, match="not finite at step 1;"):
        toy_train(tmp_path / "gradient", lambda net, batch, draws: {"loss": (net(batch["x"]) * 0).sum().sqrt()})
    assert not saved(tmp_path / "gradient")  # before a checkpoint can hold it


def test_full_disk(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, batch=stop_at(10))
    before = saved(tmp_path)
    limit = before[-1].stat().st_size // 2
    assert forks.codes([forks.start(on_a_full_disk, limit, toy_train, tmp_path)]) == [7]
    assert saved(tmp_path) == before and len(list(before[0].parent.glob("*.pt"))) == 2  # nothing half-written
    assert same(toy_train(tmp_path), whole)


def test_two_trainers(tmp_path, whole):
    process = forks.start(slow_toy, tmp_path)
    wait_for(lambda: saved(tmp_path))
    with pytest.raises(HarmonyError, match="another process is writing there; wait for it or stop it"):
        toy_train(tmp_path)
    process.join(60)
    assert same(toy_train(tmp_path), whole)


def test_dead_trainer(tmp_path):
    trainers.make_set(tmp_path / "set")
    run = (trainers.write_trained, "harmony_vae", tmp_path, "a.pt", 6, "checkpoints")
    dies = functools.partial(stopped, "harmonylib.training", "generator", 4, rank="1")
    assert forks.codes(forks.start_group(dies, *run)) == [1, -signal.SIGKILL]
    assert len(saved(tmp_path / "checkpoints")) == 2
    for again in (run, (*run[:3], "b.pt", 6, None)):
        assert forks.codes(forks.start_group(*again)) == [0, 0]
    assert same(load(tmp_path / "a.pt"), load(tmp_path / "b.pt"))


# ---- generation ----


DRAW = ("harmonylib.augmentation.candidates", "_draw")


def generated(root, out):
    pairs = candidates.pairs_of(read_triples(root / "set", "train"))
    candidates.generate_candidates(trainers.inverse_pipeline(), pairs, root / out, 3, 0, steps=2, precision="fp32")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def set_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    trainers.make_set(root / "set")
    generated(root, "whole")
    return root


def finished_later(root, out) -> bool:
    """Whether the stopped run counts for nothing, and the next one makes the same files as one undisturbed."""
    with pytest.raises(HarmonyError, match="incomplete"):
        candidates.read_candidates(root / out)
    finished = {path: path.stat().st_mtime_ns for path in (root / out).rglob("pairs/*.json")}
    generated(root, out)
    kept = all(path.stat().st_mtime_ns == before for path, before in finished.items())
    return kept and contents(root / out) == contents(root / "whole")


def test_killed_generation(set_root):
    assert forks.codes([forks.start(stopped, *DRAW, 3, generated, set_root, "killed")]) == [-signal.SIGKILL]
    next((set_root / "killed").rglob("composite_images")).joinpath(".f2_1_g0.half.png").touch()  # being written
    assert finished_later(set_root, "killed")
    dies = functools.partial(stopped, *DRAW, 1, rank="1")
    assert forks.codes(forks.start_group(dies, generated, set_root, "rank")) == [1, -signal.SIGKILL]
    assert finished_later(set_root, "rank")  # whatever the number of processes


def test_interrupted_generation(set_root):
    app = typer.Typer()
    app.command()(lambda: stopped(*DRAW, 3, generated, set_root, "stopped", number=signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores Ctrl-C
    try:
        assert cli.run(app, "x", ["--"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list((set_root / "stopped").rglob("pairs/*.json"))) == 2
    assert finished_later(set_root, "stopped")


def test_full_disk_in_generation(set_root):
    limit = min(path.stat().st_size for path in (set_root / "whole").rglob("*.png")) // 2
    assert forks.codes([forks.start(on_a_full_disk, limit, generated, set_root, "full")]) == [7]
    assert not list((set_root / "full").rglob("*.png")) and not list((set_root / "full").rglob("pairs/*.json"))
    assert finished_later(set_root, "full")


def test_cut_candidate(set_root):
    generated(set_root, "cut")
    path = next((set_root / "cut").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:50])
    generated(set_root, "cut")
    assert contents(set_root / "cut") == contents(set_root / "whole")


def test_two_generators(set_root):
    process = forks.start(functools.partial(stopped, *DRAW, 0, pause=0.3), generated, set_root, "twice")
    wait_for(lambda: list((set_root / "twice").rglob("pairs/*.json")))
    with pytest.raises(HarmonyError, match="another process is writing there"):
        generated(set_root, "twice")
    assert forks.codes([process]) == [0]


# ---- a pipeline ----


NOTEBOOK = """\
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import test_faults
Path("pid").write_text(str(os.getpid()))
weights = test_faults.slow_toy("artifacts/checkpoints", lambda step: print(step, file=open("steps", "a")))
torch.save(weights, "weights.pt")
"""


def test_killed_stage(tmp_path, whole):
    """`kill -9` of `dvc repro`, the notebook runner and its kernel in the middle of a training."""
    tests, dvc = Path(__file__).parent, [sys.executable, "-m", "dvc"]
    names = {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(tests.parent)}
    options = {"cwd": tmp_path, "env": os.environ | names}
    command = f"{sys.executable} -m harmonylib.tools.notebooks run a.ipynb"
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {command}\n    outs: [weights.pt]\n")
    (tmp_path / "params.yaml").touch()
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(NOTEBOOK.format(tests=str(tests)))]), tmp_path / "a.ipynb")
    subprocess.run([*dvc, "init", "-q", "--no-scm"], check=True, **options)

    first = subprocess.Popen([*dvc, "repro", "-q"], start_new_session=True, **options)
    wait_for(lambda: len(saved(tmp_path / "artifacts/checkpoints")) == 2, 240)
    os.killpg(first.pid, signal.SIGKILL)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    first.wait(60)
    before = len((tmp_path / "steps").read_text().split())
    subprocess.run([*dvc, "repro", "-q"], check=True, **options)
    steps = [int(step) for step in (tmp_path / "steps").read_text().split()]
    assert steps[before] == 0 and 1 < steps[before + 1] <= before  # 0: the batch that is part of the key
    assert same(load(tmp_path / "weights.pt"), whole)
    assert not list((tmp_path / "artifacts/checkpoints").glob("*/*.pt"))
