"""Many processes give what one gives: training within rounding, generation and caches byte for byte."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import nbformat
import pytest
import torch
import trainers
from nbformat import v4
from ruamel.yaml import YAML

import harmonylib as hl
from harmonylib import training
from harmonylib.core.distributed import ShareOfDraws
from harmonylib.core.json_files import read_json
from harmonylib.core.seeds import generator
from harmonylib.tools import train

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    trainers.make_set(root / "set")
    return root


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def python(root, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, *words], cwd=root, env=environment, check=True)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trainer", [name for name in trainers.TRAINERS if name != "contrastive_resunet"])  # BatchNorm
def test_two_processes_train_as_one(root, trainer):
    single = forks.start(trainers.write_trained, trainer, root, f"{trainer}-1.pt", 4)
    group = forks.start_group(trainers.write_trained, trainer, root, f"{trainer}-2.pt", 4)
    assert forks.codes([single, *group]) == [0, 0, 0]
    one, two = (torch.load(root / f"{trainer}-{n}.pt", weights_only=True) for n in (1, 2))
    start = trainers.trained(trainer, root, 0)
    away = sum((two[name] - value).square().sum() for name, value in one.items())
    moved = sum((start[name] - value).square().sum() for name, value in one.items())
    # Adam turns the rounding of gradients near zero into whole steps, so single weights may differ; their norm may not.
    assert (away / moved).sqrt() < (0.1 if trainer == "pretrain" else 0.02)  # two models in turn


def test_processes_share_out_what_is_encoded_into_the_cache(root):
    """14 pictures and their mirror images: one process's work is shared by batches; the entry is the same file."""
    trainers.noise_pictures(root)
    single = forks.start(trainers.encode_cache, root, "alone")
    group = forks.start_group(trainers.encode_cache, root, "shared", world=2)
    assert forks.codes([single, *group]) == [0, 0, 0]
    assert [int((root / f"{name}.txt").read_text()) for name in ("alone-0", "shared-0", "shared-1")] == [28, 16, 12]
    (one,), (two,) = ([*(root / name).glob("*.npy")] for name in ("alone", "shared"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_processes_share_out_what_is_scored(root):
    """Six composites: half in each process, the same table in all; and nothing is scored again."""
    single = forks.start(trainers.score_set, root, "own")
    group = forks.start_group(trainers.score_set, root, "halves")
    assert forks.codes([single, *group]) == [0, 0, 0]
    assert [int((root / f"{name}.txt").read_text()) for name in ("own-0", "halves-0", "halves-1")] == [6, 3, 3]
    one, *others = ((root / f"{name}.csv").read_text() for name in ("own-0", "halves-0", "halves-1"))
    assert others == [one, one]
    for name in ("own", "halves"):
        (root / f"{name}-0.txt").unlink()
    assert forks.codes([forks.start(trainers.score_set, root, "halves")]) == [0]
    assert (root / "halves-0.csv").read_text() == one and not (root / "halves-0.txt").exists()


def test_a_step_draws_the_same_whatever_the_number_of_processes():
    def draw(rows, source):
        return [
            torch.randn((rows, 3), generator=source),
            torch.rand(2 * rows, 5, generator=source),  # images and their partners
            torch.randint(0, 1000, (rows,), generator=source),
            torch.randint(2**40, (), generator=source),
        ]

    whole, shares = draw(6, generator("draws")), []
    for rank in range(3):
        source = generator("draws")
        with ShareOfDraws(source, 2, rank, 3):
            shares.append(draw(2, source))
            assert torch.equal(torch.rand(3, generator=generator("x")), torch.rand(3, generator=generator("x")))
    assert torch.equal(torch.cat([share[0] for share in shares]), whole[0])
    halves = [torch.cat([share[1][half] for share in shares]) for half in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), whole[1])
    assert torch.equal(torch.cat([share[2] for share in shares]), whole[2])
    assert all(share[3] == whole[3] for share in shares)


@pytest.mark.parametrize("trainer", ["harmony_vae", "diffharmony"])
def test_a_batch_in_parts_trains_as_a_whole_one(root, trainer):
    """Four images in two parts with checkpointing, by one process and by three, which all compute the whole batch."""
    settings = {"accumulation": 2, "checkpointing": True}
    single = forks.start(trainers.write_trained, trainer, root, "whole.pt", 4)
    parts = forks.start(trainers.write_trained, trainer, root, "parts.pt", 4, None, settings)
    group = forks.start_group(trainers.write_trained, trainer, root, "three.pt", 4, None, settings, world=3)
    assert forks.codes([single, parts, *group]) == [0] * 5
    whole, *others = (torch.load(root / f"{name}.pt", weights_only=True) for name in ("whole", "parts", "three"))
    start = trainers.trained(trainer, root, 0)
    moved = sum((start[name] - value).square().sum() for name, value in whole.items())
    for other in others:
        assert (sum((other[k] - v).square().sum() for k, v in whole.items()) / moved).sqrt() < 0.02


def test_the_command_under_torchrun_writes_the_same_bytes(root):
    trainers.inverse_pipeline().save_pretrained(root / "model")
    command = ["-m", "harmonylib.tools.cli", "generate", "set", "--model", "model", "-k", "3", "--steps", "2"]
    for launch, out in (([], "one"), (TORCHRUN, "two")):
        python(root, *launch, *command, out)
    assert contents(root / "one") == contents(root / "two")
    assert len(list((root / "one").rglob("*.png"))) == 9


SHARED = """\
import sys
import torch
sys.path.insert(0, {tests!r})
import trainers
train = trainers.trained
weights = train("harmony_vae", ".", 4, "artifacts/checkpoints")
torch.save(weights, name)
"""


def test_a_stage_takes_up_what_two_processes_trained(root, monkeypatch):
    """`torchrun -m harmonylib.tools.notebooks train`, then the stage's own run: it trains nothing anew."""
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    cells = [v4.new_code_cell("name = 'a.pt'", metadata={"tags": ["parameters"]}),
             v4.new_code_cell(SHARED.format(tests=str(Path(__file__).parent))),
             v4.new_code_cell("raise SystemExit('a cell after the training')")]  # fmt: skip
    nbformat.write(v4.new_notebook(cells=cells), root / "train.ipynb")
    python(root, *TORCHRUN, "-m", "harmonylib.tools.notebooks", "train", "train.ipynb", "-p", "name=two.pt")
    assert len(list(root.glob("artifacts/checkpoints/*/finished.pt"))) == 1
    monkeypatch.setattr(training._Run, "step", None)  # a step would fail
    weights = trainers.trained("harmony_vae", root, 4, "artifacts/checkpoints")
    two = torch.load(root / "two.pt", weights_only=True)
    assert all(torch.equal(value, two[name]) for name, value in weights.items())


def test_training_without_a_notebook(root, monkeypatch):
    """`python -m harmonylib.training`, by two processes and one: the stages' folders, and nothing trained twice."""
    monkeypatch.chdir(root)
    shutil.copytree(REPOSITORY / "profiles", "profiles")
    Path("dvc.yaml").touch()
    shutil.copytree("set", "data/benchmark")
    yaml = YAML()
    values = yaml.load(REPOSITORY / "params.yaml")
    common = {"size": 32, "crop": 0, "steps": 2, "batch_size": 2, "start": None}
    values["device"], values["precision"] = "cpu", "fp32"
    values["base"] |= {"source": "small", "size": 32, "autoencoder_steps": 1, "batch_size": 2}
    values["base"] |= {"autoencoder_channels": [16, 16], "unet_channels": [64, 64]}
    values["harmony_vae"] |= common | {"inverse_steps": 2}
    values["diffharmony"] |= common | {"inverse_steps": 2}
    values["resunet"] |= common | {"encoder": None, "head": "residual", "base_channels": 2, "depth": 2}
    yaml.dump(values, Path("params.yaml"))

    def command(*words):
        return train.run_application(train.app, "train", ["params.yaml", *words])

    for words, launch in ((["base"], []), (["harmony_vae", "--task", "inverse"], TORCHRUN)):
        python(root, *launch, "-m", "harmonylib.training", "params.yaml", *words)
    assert command("diffharmony", "--task", "inverse") == command("resunet") == 0
    assert (
        hl.DiffHarmonyPipeline.from_pretrained("artifacts/diffharmony/inverse", device="cpu").vae.config.sample_size
        == 32
    )
    assert len(read_json("artifacts/contrastive_resunet/training.json")) == 2
    assert len(read_json("artifacts/base/vae/training.json")) == 1
    monkeypatch.setattr(training._Run, "step", None)  # a step would fail
    assert command("harmony_vae", "--task", "inverse") == 0
    assert "skip_norms" in read_json("artifacts/harmony_vae/inverse/training.json")[-1]


def test_what_cannot_be_trained_without_a_notebook(capsys):
    words = (["resunets"], ["resunet", "--task", "harmonise"])
    assert [train.run_application(train.app, "train", ["params.yaml", *some]) for some in words] == [1, 1]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: resunets cannot be trained; did you mean resunet?") and len(said) == 2
