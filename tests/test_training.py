import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from harmonylib.core import checkpoints
from harmonylib.core.checkpoints import Checkpoints, discard_all, discard_finished
from harmonylib.core.errors import HarmonyError
from harmonylib.core.files import only_one
from harmonylib.training import TrainingDiverged, TrainSettings, batch_indices, learning_rate_at, train


def problem():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data, target = torch.randn(64, 4), torch.randn(64, 1)

    def make_batch(step):
        indices = batch_indices(step, len(data), 8, "test")
        return {"x": data[indices], "y": target[indices]}

    def loss(net, batch, generator):
        noise = 0.01 * torch.randn(batch["y"].shape, generator=generator)
        return {"loss": (net(batch["x"]) - batch["y"] + noise).square().mean()}

    return model, loss, make_batch


def run(model, loss, make_batch, steps=40, ema=0.9, **extra):
    settings = TrainSettings(steps=steps, batch_size=8, learning_rate=0.05, ema_decay=ema, checkpoint_seconds=0)
    return train(model, loss, make_batch, settings, name="test", seed=0, device="cpu", **extra)


def test_loss_falls_and_history_is_recorded():
    model, loss, make_batch = problem()
    history = run(model, loss, make_batch, observe=lambda m: {"norm": m.weight.norm().item()})
    assert history[-1]["loss"] < history[0]["loss"]
    assert [entry["step"] for entry in history] == list(range(1, 41)) and "norm" in history[-1]
    assert not model.training


def test_same_seed_same_weights():
    results = []
    for _ in range(2):
        model, loss, make_batch = problem()
        run(model, loss, make_batch)
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_ema_is_kept_apart_and_left_in_the_model():
    model, loss, make_batch = problem()
    plain, with_ema = copy.deepcopy(model), copy.deepcopy(model)
    seen = []
    run(plain, loss, make_batch, ema=0.0)
    run(with_ema, loss, make_batch, observe=lambda m: seen.append(m.weight.detach().clone()) or {})
    assert torch.equal(seen[-1], with_ema.weight)  # what was observed last is what is kept
    assert not torch.allclose(plain.weight, with_ema.weight, atol=1e-4)


@pytest.mark.parametrize("killed_at", [7, 19, 33])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, killed_at):
    model, loss, make_batch = problem()
    whole = copy.deepcopy(model)
    history = run(whole, loss, make_batch)

    def dies(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return make_batch(step)

    with pytest.raises(KeyboardInterrupt):
        run(copy.deepcopy(model), loss, dies, checkpoints=tmp_path)
    assert len(list(tmp_path.rglob("step-*.pt"))) == 2
    resumed, steps = copy.deepcopy(model), []
    again = run(resumed, loss, lambda step: steps.append(step) or make_batch(step), checkpoints=tmp_path)
    assert steps[:2] == [0, killed_at] and torch.equal(resumed.weight, whole.weight) and again == history
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["finished.pt"]
    once_more = copy.deepcopy(model)
    assert run(once_more, loss, make_batch, checkpoints=tmp_path) == history  # nothing is trained twice
    assert torch.equal(once_more.weight, whole.weight) and not once_more.training
    discard_finished(tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_changed_data_never_resumes(tmp_path):
    model, loss, make_batch = problem()
    run(copy.deepcopy(model), loss, make_batch, checkpoints=tmp_path)
    other = copy.deepcopy(model)
    run(other, loss, lambda step: {k: v + 1 for k, v in make_batch(step).items()}, checkpoints=tmp_path)
    assert len(list(tmp_path.rglob("finished.pt"))) == 2


def test_damaged_checkpoint_falls_back(tmp_path):
    store = Checkpoints(tmp_path, {"a": 1})
    for step in (1, 2, 3):
        store.save({"step": step})
    paths = sorted(tmp_path.rglob("*.pt"))
    assert len(paths) == 2
    paths[-1].write_bytes(b"broken")
    assert store.load()["step"] == 2


def test_divergence_is_reported():
    model, _, make_batch = problem()
    with pytest.raises(TrainingDiverged, match="not finite at step 1; lower"):
        run(model, lambda net, batch, generator: {"loss": net(batch["x"]).mean() * float("nan")}, make_batch)


def test_schedule_and_order():
    settings = TrainSettings(steps=100, batch_size=1, learning_rate=1.0, warmup=0.1, schedule="cosine")
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[-1] < 0.001
    seen = [i for step in range(5) for i in batch_indices(step, 10, 4, 0)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    with pytest.raises(HarmonyError, match="empty"):
        batch_indices(0, 0, 4, 0)
    with pytest.raises(HarmonyError, match="schedule"):
        TrainSettings(steps=1, batch_size=1, schedule="linear")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_ends_near_the_plain_one():
    results, compiled = [], []
    for switch in (False, True):
        model, loss, make_batch = problem()
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        settings = TrainSettings(10, 8, 0.05, ema_decay=0.9, compile=switch)

        def watched(net, batch, generator, loss=loss):
            compiled.append(hasattr(net, "_orig_mod"))
            return loss(net, batch, generator)

        history = train(model, watched, make_batch, settings, name="test", seed=0, device="cpu")
        results.append((model.weight.detach().clone(), history[-1]["loss"]))
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert compiled == [False] * 10 + [True] * 10
    assert torch.allclose(results[0][0], results[1][0], atol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


def test_resume_points_that_nobody_needs_are_removed(tmp_path):
    model, loss, make_batch = problem()
    run(model, loss, make_batch, checkpoints=tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with only_one(folder), pytest.raises(HarmonyError, match="another process"):
        discard_all(tmp_path)
    assert discard_all(tmp_path) > 1000 and not any(path.is_dir() for path in tmp_path.iterdir())
    assert discard_all(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(("file", "counts"), [("core/files.py", True), ("training.py", True), ("models/vae.py", True),
                                              ("tools/app.py", False), ("evaluation/figures.py", False)])  # fmt: skip
def test_code_that_training_runs_through_decides_the_resume_point(file, counts, tmp_path, monkeypatch):
    library = tmp_path / "harmonylib"
    shutil.copytree(Path(checkpoints.__file__).parents[1], library, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(checkpoints, "__file__", str(library / "core/checkpoints.py"))
    before = checkpoints.code_hash.__wrapped__()
    with open(library / file, "a", encoding="utf-8") as source:
        source.write("# edited\n")
    assert (checkpoints.code_hash.__wrapped__() != before) == counts
