import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harmonylib.core import checkpoints
from harmonylib.core.checkpoints import discard_all, discard_finished
from harmonylib.core.errors import HarmonyError
from harmonylib.core.files import only_one
from harmonylib.core.json_files import read_json
from harmonylib.data.batches import batch_indices
from harmonylib.training import TrainSettings, learning_rate_at, train

SETTINGS = TrainSettings(40, 8, 0.05, ema_decay=0.9, checkpoint_seconds=0)


def problem():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data, target = torch.randn(64, 4), torch.randn(64, 1)

    def batches(step):
        indices = batch_indices(step, len(data), 8, "test")
        return {"x": data[indices], "y": target[indices]}

    def loss(net, batch, generator):
        noise = 0.01 * torch.randn(batch["y"].shape, generator=generator)
        return {"loss": (net(batch["x"]) - batch["y"] + noise).square().mean()}

    return model, loss, batches


def run(model, loss, batches, settings=SETTINGS, **extra):
    return train(model, loss, batches, settings, name="test", seed=0, device="cpu", **extra)


def test_loss_falls_and_what_was_observed_with_the_ema_weights_is_kept():
    model, loss, batches = problem()
    plain, seen = copy.deepcopy(model), []
    history = run(model, loss, batches, observe=lambda m: seen.append(m.weight.detach().clone()) or {"norm": 1.0})
    assert history[-1]["loss"] < history[0]["loss"]
    assert [entry["step"] for entry in history] == list(range(1, 41)) and "norm" in history[-1]
    assert torch.equal(seen[-1], model.weight) and not model.training
    run(plain, loss, batches, TrainSettings(40, 8, 0.05, ema_decay=0.0))
    assert not torch.allclose(plain.weight, model.weight, atol=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, killed_at=19):
    model, loss, batches = problem()
    whole = copy.deepcopy(model)
    history = run(whole, loss, batches)

    def dies(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        run(copy.deepcopy(model), loss, dies, checkpoints=tmp_path)
    assert len(list(tmp_path.rglob("step-*.pt"))) == 2
    resumed, steps = copy.deepcopy(model), []
    curve, shown = tmp_path / "curve.json", []

    def watched(step):
        steps.append(step)
        shown.append(len(read_json(curve)) if curve.exists() else 0)
        return batches(step)

    again = run(resumed, loss, watched, checkpoints=tmp_path, curve=curve)
    assert read_json(curve) == history and killed_at < min(filter(None, shown)) < max(shown)  # written as it went
    assert steps[:2] == [0, killed_at] and torch.equal(resumed.weight, whole.weight) and again == history
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["finished.pt"]
    once_more = copy.deepcopy(model)
    curve.unlink()
    again = run(once_more, loss, batches, checkpoints=tmp_path, curve=curve)
    assert again == read_json(curve) == history  # nothing is trained twice
    assert torch.equal(once_more.weight, whole.weight) and not once_more.training
    discard_finished(tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_what_changes_the_result_changes_the_resume_point(tmp_path, capsys):
    model, loss, batches = problem()

    def stops(step):
        if step == 9:
            raise KeyboardInterrupt
        return batches(step)

    def keyed(function, key):
        wrapped = lambda *arguments: function(*arguments)  # noqa: E731
        wrapped.key = key
        return wrapped

    def edited(net, batch, generator):
        return {"loss": 2 * loss(net, batch, generator)["loss"]}

    with pytest.raises(KeyboardInterrupt):
        run(copy.deepcopy(model), loss, stops, checkpoints=tmp_path)
    other_data = lambda step: {name: value + 1 for name, value in batches(step).items()}  # noqa: E731
    pairs = [(loss, other_data), (loss, keyed(batches, "jitter")), (keyed(loss, "l1"), batches),
             (keyed(loss, "l2"), batches), (edited, batches)]  # fmt: skip
    for count, pair in enumerate(pairs, 1):
        run(copy.deepcopy(model), *pair, checkpoints=tmp_path)
        assert len(list(tmp_path.rglob("finished.pt"))) == count
    frozen = copy.deepcopy(model)
    frozen.bias.requires_grad_(False)
    run(frozen, loss, batches, checkpoints=tmp_path)
    assert len(list(tmp_path.rglob("finished.pt"))) == len(pairs) + 1
    said = capsys.readouterr().err
    assert "is not resumed, since it had other photos or options\n" in said
    assert "is not resumed, since it had other loss\n" in said
    assert "is not resumed, since it had other network or starting weights\n" in said


def test_a_loss_with_weights_trains_along_and_they_are_part_of_the_key(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, net, batch, generator):
            return {"loss": (self.factor * net(batch["x"]) - batch["y"]).square().mean()}

    results = []
    for factor in (1.0, 1.0, 2.0):
        model, _, batches = problem()
        loss = Scaled(factor)
        run(model, loss, batches, checkpoints=tmp_path)
        results.append((loss.factor.item(), model.weight))
    assert results[0][0] == results[1][0] != 1.0 and torch.equal(results[0][1], results[1][1])
    assert len(list(tmp_path.rglob("finished.pt"))) == 2


def test_schedule_and_order():
    settings = TrainSettings(steps=100, batch_size=1, learning_rate=1.0, warmup=0.1, schedule="cosine")
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[-1] < 0.001
    seen = [i for step in range(5) for i in batch_indices(step, 10, 4, 0)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    with pytest.raises(HarmonyError, match="empty"):
        batch_indices(0, 0, 4, 0)


def test_a_sections_settings_by_task():
    section = SimpleNamespace(steps=3, inverse_steps=5, batch_size=2, learning_rate=0.1, size=64, unet_steps=7)
    run = SimpleNamespace(section=section, precision="fp32", compile=False, accumulation=1, checkpointing=False)
    tasks = [TrainSettings.of(run, "section", task) for task in ("harmonize", "inverse", "unet")]
    assert [found.steps for found in tasks] == [3, 5, 7] and {found.learning_rate for found in tasks} == {0.1}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_ends_near_the_plain_one():
    results, compiled = [], []
    for switch in (False, True):
        model, loss, batches = problem()
        before = {name: id(parameter) for name, parameter in model.named_parameters()}

        def watched(net, batch, generator, loss=loss):
            compiled.append(hasattr(net, "_orig_mod"))
            return loss(net, batch, generator)

        history = run(model, watched, batches, TrainSettings(10, 8, 0.05, ema_decay=0.9, compile=switch))
        results.append((model.weight.detach().clone(), history[-1]["loss"]))
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert compiled == [False] * 10 + [True] * 10
    assert torch.allclose(results[0][0], results[1][0], atol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


def test_resume_points_that_nobody_needs_are_removed(tmp_path):
    model, loss, batches = problem()
    run(model, loss, batches, checkpoints=tmp_path)
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
