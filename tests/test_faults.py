"""What goes wrong in long runs, injected, and what happens then: the table of docs/faults.md, checked against it.

Each test returns what it saw. `WRITE_FAULTS=1 python -m pytest tests/test_faults.py` writes the table anew.
"""

import functools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import nbformat
import pytest
import torch
import trainers
import typer
from nbformat import v4
from safetensors.torch import load_file
from torch import nn

from harmonylib import training
from harmonylib.augmentation.candidates import generate_candidates, pairs_of, read_manifest
from harmonylib.core import cache, files
from harmonylib.core.checkpoints import Checkpoints
from harmonylib.core.errors import HarmonyError
from harmonylib.core.parallel import parallel_map
from harmonylib.data.layout import read_triples
from harmonylib.tools import cli
from harmonylib.training import TrainingDiverged, TrainSettings, train

PAGE = Path(__file__).parents[1] / "docs/faults.md"
TESTS, SEEN = [], {}
SAME = "the next run ends with the same weights, bit by bit"


def fault(part: str, injected: str):
    """Enter what the decorated test returns into the table."""

    def decorate(test):
        TESTS.append((part, injected))

        @functools.wraps(test)
        def wrapper(*arguments, **options):
            SEEN[part, injected] = re.sub(r"\S*/(pytest-of|tmp)\S*/", "…/", test(*arguments, **options))

        return wrapper

    return decorate


# ---- a toy training run ----


def toy_loss(net, batch, draws):
    noise = 0.1 * torch.randn(batch["x"].shape, generator=draws)
    return {"loss": (net(batch["x"] + noise) - batch["x"]).square().mean()}


def toy_batch(step):
    return {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(step % 7))}


def toy_train(folder, loss=toy_loss, batch=toy_batch, steps=60) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    settings = TrainSettings(steps, 4, 0.01, ema_decay=0.9, checkpoint_seconds=0)
    train(model, loss, batch, settings, name="toy", seed=0, device="cpu", checkpoints=folder)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def whole():
    return toy_train(None)


def slow_toy(folder, log=lambda step: None):
    return toy_train(folder, batch=lambda step: log(step) or time.sleep(0.005) or toy_batch(step))


def saved(folder) -> list[Path]:
    return sorted(Path(folder).glob("*/step-*.pt"))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@fault("training", "`kill -9` at three random moments of one DiffHarmony run")
def test_killed_at_random(tmp_path):
    trainers.make_set(tmp_path / "set")
    points, long_run = tmp_path / "checkpoints", ("diffharmony", tmp_path, "long.pt", 60, "checkpoints")
    for _ in range(3):
        before = saved(points)
        process = forks.start(trainers.write_trained, *long_run)
        wait_for(lambda before=before: saved(points) != before)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        assert forks.codes([process]) == [-signal.SIGKILL]
        assert len(saved(points)) >= 1
    assert forks.codes([forks.start(trainers.write_trained, *long_run)]) == [0]
    resumed, undisturbed = torch.load(tmp_path / "long.pt", weights_only=True), trainers.trained(*long_run[:2], 60)
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())
    return SAME


def killed_while_saving(folder):
    replace, count = os.replace, []

    def die(source, target):
        count.append(target)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die
    toy_train(folder)


@fault("training", "`kill -9` while a checkpoint is being written")
def test_killed_while_saving(tmp_path, whole):
    assert forks.codes([forks.start(killed_while_saving, tmp_path)]) == [-signal.SIGKILL]
    assert [path.stem for path in saved(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list(tmp_path.rglob(".step-*.pt"))) == 1  # half-written
    assert same(toy_train(tmp_path), whole)
    assert not list(tmp_path.rglob(".step-*.pt"))
    return "the last two whole checkpoints stay; " + SAME


def train_and_die(trainer, root, out):
    save, count = Checkpoints.save, []

    def then_die(self, state):
        save(self, state)
        count.append(state)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = then_die
    trainers.write_trained(trainer, root, out, 5, "checkpoints")


@fault("training", "`kill -9` of every trainer (Harmony-VAE, DiffHarmony, ResUNet, refiner, the base) after two steps")
def test_every_trainer_resumes(tmp_path):
    trainers.make_set(tmp_path / "set")
    killed = [forks.start(train_and_die, name, tmp_path, f"{name}.pt") for name in trainers.TRAINERS]
    assert forks.codes(killed) == [-signal.SIGKILL] * len(killed)
    again = [forks.start(trainers.write_trained, t, tmp_path, f"{t}.pt", 5, "checkpoints") for t in trainers.TRAINERS]
    assert forks.codes(again) == [0] * len(again)
    for trainer in trainers.TRAINERS:
        resumed = torch.load(tmp_path / f"{trainer}.pt", weights_only=True)
        undisturbed = trainers.trained(trainer, tmp_path)
        assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items()), trainer
    return SAME


def interrupt_at(step, number):
    return lambda now: (os.kill(os.getpid(), number) if now == step else None) or toy_batch(now)


@fault("training", "Ctrl-C or SIGTERM")
def test_interrupted(tmp_path, whole):
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt) as stop:
            toy_train(folder, batch=interrupt_at(20, number))
        done = int(re.search(r"after step (\d+)", str(stop.value))[1])
        assert saved(folder)[-1].stem == f"step-{done:08d}" and done <= 21
        assert same(toy_train(folder), whole)
    assert signal.getsignal(signal.SIGINT) is before

    app = typer.Typer()
    app.command()(lambda: toy_train(tmp_path / "command", batch=interrupt_at(20, signal.SIGINT)))
    assert cli.run(app, "x", ["--"]) == 130
    return "the step is ended and saved, exit code 130; " + SAME


def stop_at(step):
    def batch(now):
        if now == step:
            raise KeyboardInterrupt
        return toy_batch(now)

    return batch


@pytest.mark.parametrize("damage", ["cut", "flipped bit"])
def test_damaged_checkpoint(tmp_path, whole, damage):
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, batch=stop_at(30))
    newest = saved(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        tensor = next(iter(torch.load(newest, weights_only=True)["modules"][0].values()))
        data[data.index(tensor.numpy().tobytes()) + 1] ^= 4  # inside the first weight
    newest.write_bytes(data)
    steps = []
    again = toy_train(tmp_path, batch=lambda step: steps.append(step) or toy_batch(step))
    assert steps[:2] == [0, 29] and same(again, whole)  # 0: the batch that is part of the key
    SEEN["training", "the newest checkpoint cut in half; a bit of it flipped"] = "the one before is used; " + SAME


TESTS.append(("training", "the newest checkpoint cut in half; a bit of it flipped"))


@fault("training", "NaN in the loss")
def test_nan_loss(tmp_path):
    def poisoned(net, batch, draws):
        terms = toy_loss(net, batch, draws)
        return {"loss": terms["loss"] * (float("nan") if torch.equal(batch["x"], toy_batch(5)["x"]) else 1.0)}

    with pytest.raises(TrainingDiverged) as stop:
        toy_train(tmp_path, poisoned)
    assert torch.equal(load_file(next(tmp_path.rglob("*.safetensors")))["x"], toy_batch(5)["x"])
    last = torch.load(saved(tmp_path)[-1], weights_only=True)
    assert last["step"] == 5 and all(value.isfinite().all() for value in last["modules"][0].values())
    return re.sub(r"\S*/diverged", "…/diverged", str(stop.value))


@fault("training", "NaN in the gradient only")
def test_nan_gradient(tmp_path):
    with pytest.raises(TrainingDiverged, match="not finite at step 1;"):
        toy_train(tmp_path, lambda net, batch, draws: {"loss": (net(batch["x"]) * 0).sum().sqrt()})
    assert not saved(tmp_path)
    return "as above, before a checkpoint can hold it"


def train_on_a_full_disk(folder):
    limit = saved(folder)[-1].stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the kernel fails what is written beyond it
    try:
        toy_train(folder)
    except OSError:
        os._exit(7)


@fault("training", "no room for the checkpoint (the kernel fails the write half way)")
def test_full_disk(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, batch=stop_at(10))
    before = saved(tmp_path)
    assert forks.codes([forks.start(train_on_a_full_disk, tmp_path)]) == [7]
    assert saved(tmp_path) == before and len(list(before[0].parent.glob("*.pt"))) == 2  # nothing half-written
    assert same(toy_train(tmp_path), whole)
    return "an error of the operating system, the two checkpoints stay; with room again " + SAME


@fault("training", "a second process trains the same")
def test_two_trainers(tmp_path, whole):
    process = forks.start(slow_toy, tmp_path)
    wait_for(lambda: saved(tmp_path))
    with pytest.raises(HarmonyError, match="another process is writing there") as stop:
        toy_train(tmp_path)
    process.join(60)
    assert same(toy_train(tmp_path), whole)
    return "the second: " + re.sub(r"\S+: another", "another", str(stop.value))


def second_trainer_dies(root, out):
    if os.environ["RANK"] == "1":
        draws, count = training.generator, []

        def die(*words):
            count.append(words)
            if len(count) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return draws(*words)

        training.generator = die
    trainers.write_trained("harmony_vae", root, out, 6, "checkpoints")


@fault("training", "one of two processes dies")
def test_dead_trainer(tmp_path):
    trainers.make_set(tmp_path / "set")
    assert forks.codes(forks.start_group(second_trainer_dies, tmp_path, "x.pt")) == [1, -signal.SIGKILL]
    assert len(saved(tmp_path / "checkpoints")) == 2
    for out in ("a.pt", "b.pt"):
        folder = "checkpoints" if out == "a.pt" else None
        group = forks.start_group(trainers.write_trained, "harmony_vae", tmp_path, out, 6, folder)
        assert forks.codes(group) == [0, 0]
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    return "the other one stops with an error; " + SAME


# ---- generation ----


def toy_pairs(root):
    return pairs_of(read_triples(root / "set", "train"))


def generated(root, out, die_after=None, pause=0.0, number=signal.SIGKILL):
    """Candidates of the set below root; with die_after the process signals itself before that pair's record."""
    from harmonylib.augmentation import candidates

    draw, count = candidates._draw, []

    def counted(*words):
        count.append(1)
        if len(count) == die_after:
            os.kill(os.getpid(), number)
        time.sleep(pause)
        return draw(*words)

    candidates._draw = counted
    try:
        pipeline = trainers.inverse_pipeline()
        generate_candidates(pipeline, toy_pairs(root), root / out, 3, 0, steps=2, precision="fp32")
    finally:
        candidates._draw = draw


def second_dies(root, out):
    generated(root, out, 1 if os.environ["RANK"] == "1" else None)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def set_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    trainers.make_set(root / "set")
    generated(root, "whole")
    return root


@fault("generation", "`kill -9` between two pairs")
def test_killed_generation(set_root):
    assert forks.codes([forks.start(generated, set_root, "killed", 3)]) == [-signal.SIGKILL]
    with pytest.raises(HarmonyError, match="incomplete"):
        read_manifest(set_root / "killed")
    (set_root / "killed/HFlickr/composite_images/.f2_1_g0.half.png").touch()  # killed while it wrote this one, too
    generated(set_root, "killed")
    assert contents(set_root / "killed") == contents(set_root / "whole")
    return "no manifest, so nothing counts; the next run adds what is missing, the set is the same byte for byte"


@fault("generation", "one of two processes dies")
def test_dead_rank(set_root):
    assert forks.codes(forks.start_group(second_dies, set_root, "rank")) == [0, -signal.SIGKILL]
    with pytest.raises(HarmonyError, match="incomplete"):
        read_manifest(set_root / "rank")
    generated(set_root, "rank")
    assert contents(set_root / "rank") == contents(set_root / "whole")
    return "as above, whatever the number of processes of the next run"


@fault("generation", "Ctrl-C")
def test_interrupted_generation(set_root):
    app = typer.Typer()
    app.command()(lambda: generated(set_root, "stopped", 3, number=signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores Ctrl-C
    try:
        assert cli.run(app, "x", ["--"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(HarmonyError, match="incomplete"):
        read_manifest(set_root / "stopped")
    records = list((set_root / "stopped").glob("*/pairs/*.json"))
    assert len(records) == 2
    before = {path: path.stat().st_mtime_ns for path in records}
    generated(set_root, "stopped")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # finished pairs are kept
    assert contents(set_root / "stopped") == contents(set_root / "whole")
    return "pairs in work are written, exit code 130; the next run adds what is missing, the set is the same"


def generate_on_a_full_disk(root):
    smallest = min(path.stat().st_size for path in (root / "whole").rglob("*.png"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, smallest // 2))  # the kernel fails what lies beyond
    try:
        generated(root, "full")
    except OSError:
        os._exit(7)


@fault("generation", "no room for a candidate (the kernel fails the write half way)")
def test_full_disk_in_generation(set_root):
    assert forks.codes([forks.start(generate_on_a_full_disk, set_root)]) == [7]
    assert not list((set_root / "full").rglob("*.png")) and not list((set_root / "full").glob("*/pairs/*.json"))
    with pytest.raises(HarmonyError, match="incomplete"):
        read_manifest(set_root / "full")
    generated(set_root, "full")
    assert contents(set_root / "full") == contents(set_root / "whole")
    return "an error of the operating system, nothing half-written; with room again the set is the same byte for byte"


@fault("generation", "a candidate's file cut short")
def test_cut_candidate(set_root):
    generated(set_root, "cut")
    path = next((set_root / "cut").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:50])
    generated(set_root, "cut")
    assert contents(set_root / "cut") == contents(set_root / "whole")
    return "its pair is made again"


@fault("generation", "a second process writes to the same folder")
def test_two_generators(set_root):
    process = forks.start(generated, set_root, "twice", None, 0.3)
    wait_for(lambda: list(set_root.glob("twice/*/pairs/*.json")))
    with pytest.raises(HarmonyError, match="another process is writing there"):
        generated(set_root, "twice")
    assert forks.codes([process]) == [0]
    return "the second: another process is writing there; wait for it or stop it"


# ---- caches, workers, pipelines ----


@fault("cache", "the cache's folder cannot be written")
def test_read_only_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")

    def refuse(size):
        raise PermissionError(13, "Permission denied", str(cache.ROOT))

    monkeypatch.setattr(files.secrets, "token_hex", refuse)  # permission bits do not stop root
    app = typer.Typer()
    app.command()(lambda: cache.cached_array({"a": 1}, (2,), "f4", lambda array: None))
    assert cli.run(app, "x", ["--"]) == 1
    return f"one line, exit code 1: `{capsys.readouterr().err.strip()}`"


@fault("cache", "a flipped bit in an entry, an entry cut short, an entry in a folder that cannot be written")
def test_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")

    def entry():
        cache._checked.clear()  # as another process begins
        return cache.cached_array({"a": 1}, (50,), "f4", lambda array: array.fill(7))

    path = Path(entry().filename)
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-30], b""):
        path.write_bytes(damaged)
        assert (entry() == 7).all() and path.read_bytes() == whole

    def refuse(*words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert (entry() == 7).all()
    return "made anew; made anew; read as usual"


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


@fault("workers", "a worker process dies")
def test_dead_worker():
    with pytest.raises(HarmonyError, match="died") as stop:
        list(parallel_map(die, range(4), "measuring", "photo", workers=2))
    return str(stop.value)


DVC = """\
stages:
  slow:
    cmd: touch started && until [ -f go ]; do sleep 0.1; done && touch out
    outs: [out]
"""


@fault("pipelines", "a second `dvc repro` in one checkout")
def test_two_pipelines(tmp_path):
    environment = os.environ | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    (tmp_path / "dvc.yaml").write_text(DVC)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], check=True, **options)
    first = subprocess.Popen([*dvc, "repro", "-q"], cwd=tmp_path, env=environment)
    wait_for((tmp_path / "started").exists, 120)
    second = subprocess.run([*dvc, "repro"], **options, timeout=120)
    (tmp_path / "go").touch()
    assert second.returncode and "busy" in second.stderr + second.stdout, second
    assert first.wait(120) == 0
    return "DVC refuses the second: its outputs are busy, blocked by the first"


NOTEBOOK = """\
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import test_faults
Path("pid").write_text(str(os.getpid()))
model = test_faults.slow_toy("artifacts/checkpoints", lambda step: print(step, file=open("steps", "a")))
torch.save(model.state_dict(), "weights.pt")
"""


def notebook_stage(root):
    """(how to start DVC, options) in a folder whose one stage is a notebook that trains."""
    environment = os.environ | {
        "DVC_SITE_CACHE_DIR": str(root / "site"),
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": str(PAGE.parents[1]),
    }
    command = f"{sys.executable} -m harmonylib.tools.notebooks run a.ipynb"
    (root / "dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {command}\n    outs: [weights.pt]\n")
    (root / "params.yaml").touch()
    cell = v4.new_code_cell(NOTEBOOK.format(tests=str(Path(__file__).parent)))
    nbformat.write(v4.new_notebook(cells=[cell]), root / "a.ipynb")
    dvc, options = [sys.executable, "-m", "dvc"], {"cwd": root, "env": environment}
    subprocess.run([*dvc, "init", "-q", "--no-scm"], check=True, **options)
    return dvc, options


@fault("pipelines", "`kill -9` of `dvc repro`, the notebook runner and its kernel in the middle of a training")
def test_killed_stage(tmp_path, whole):
    dvc, options = notebook_stage(tmp_path)
    first = subprocess.Popen([*dvc, "repro", "-q"], start_new_session=True, **options)
    wait_for(lambda: len(saved(tmp_path / "artifacts/checkpoints")) == 2, 240)
    os.killpg(first.pid, signal.SIGKILL)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    first.wait(60)
    before = len((tmp_path / "steps").read_text().split())
    subprocess.run([*dvc, "repro", "-q"], check=True, **options)
    steps = [int(step) for step in (tmp_path / "steps").read_text().split()]
    assert steps[before] == 0 and 1 < steps[before + 1] <= before  # 0: the batch that is part of the key
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in whole.state_dict().items())
    assert not list((tmp_path / "artifacts/checkpoints").glob("*/*.pt"))
    return SAME


def render() -> str:
    rows = "".join(f"| {part} | {injected} | {SEEN[part, injected]} |\n" for part, injected in TESTS)
    return f"""# Faults

What was injected into long runs, and what happened. The rows are what the tests in `tests/test_faults.py` see;
`WRITE_FAULTS=1 python -m pytest tests/test_faults.py` writes this page, and without the variable the test compares it.

| in | injected | what happens |
|---|---|---|
{rows}"""


def test_page_is_what_was_seen():
    if missing := [row for row in TESTS if row not in SEEN]:
        pytest.skip(f"needs all tests of this file; not run or failed: {missing}")
    if os.environ.get("WRITE_FAULTS"):
        PAGE.write_text(render(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == render(), "changed; see the top of this file"
