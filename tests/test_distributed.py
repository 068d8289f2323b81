"""Many processes give what one gives: training within rounding, generation and caches byte for byte, DVC elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import forks
import nbformat
import numpy as np
import pytest
import torch
import trainers
from nbformat import v4

from harmonylib import training
from harmonylib.core import cache
from harmonylib.core.distributed import ShareOfDraws
from harmonylib.core.errors import HarmonyError
from harmonylib.core.seeds import generator
from harmonylib.models.base import build_autoencoder

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    trainers.make_set(root / "set")
    return root


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
    assert (away / moved).sqrt() < (0.1 if trainer == "pretrain" else 0.02)  # two models in turn, saved in fp16


def test_processes_share_out_what_is_encoded_into_the_cache(root):
    """14 pictures and their mirror images: one process's work is shared by batches; the entry is the same file."""
    single = forks.start(trainers.encode_cache, root, "alone")
    group = forks.start_group(trainers.encode_cache, root, "shared", world=2)
    assert forks.codes([single, *group]) == [0, 0, 0]
    assert [int((root / f"{name}.txt").read_text()) for name in ("alone-0", "shared-0", "shared-1")] == [28, 16, 12]
    (one,), (two,) = ([*(root / name).glob("*.npy")] for name in ("alone", "shared"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_a_share_is_encoded_once_though_another_process_joins_and_removes_it(tmp_path, monkeypatch):
    """The second process writes its share; before it goes on, the first does all the rest."""
    vae, images = build_autoencoder((8, 16), size=16), np.zeros((14, 16, 16, 3), np.uint8)
    encode, make, encoded = vae.encode, cache._make, []
    vae.encode = lambda batch: encoded.append(len(batch)) or encode(batch)

    def moments(rank):
        monkeypatch.setenv("RANK", rank)
        return cache.moments(vae, images, "cpu", batch_size=4)

    def make_and_wait(*entry, **options):
        make(*entry, **options)
        if os.environ["RANK"] == "1":
            moments("0")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    monkeypatch.setattr(cache, "_make", make_and_wait)
    assert np.array_equal(moments("1"), moments("0")) and sum(encoded) == 28
    monkeypatch.setattr(cache, "_make", make)
    assert moments("1").shape[1] == 14 and sum(encoded) == 28  # one that comes late
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_a_step_draws_the_same_whatever_the_number_of_processes(monkeypatch):
    def draw(rows, source):
        return [
            torch.randn((rows, 3), generator=source),
            torch.rand(2 * rows, 5, generator=source),  # images and their partners
            torch.randint(0, 1000, (rows,), generator=source),
            torch.randint(2**40, (), generator=source),
        ]

    whole, shares = draw(6, generator("draws")), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        source = generator("draws")
        with ShareOfDraws(source, 2):
            shares.append(draw(2, source))
            assert torch.equal(torch.rand(3, generator=generator("x")), torch.rand(3, generator=generator("x")))
            with pytest.raises(HarmonyError, match="cannot be shared"):
                torch.rand(3, generator=source)
    assert torch.equal(torch.cat([share[0] for share in shares]), whole[0])
    halves = [torch.cat([share[1][half] for share in shares]) for half in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), whole[1])
    assert torch.equal(torch.cat([share[2] for share in shares]), whole[2])
    assert all(share[3] == whole[3] for share in shares)


def test_batches_that_do_not_divide(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(HarmonyError, match="batch_size 4 does not divide by 3 processes"):
        trainers.trained("harmony_vae", root)


def test_the_command_under_torchrun_writes_the_same_bytes(root):
    trainers.inverse_pipeline().save_pretrained(root / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = ["-m", "harmonylib.tools.cli", "generate", "set", "--model", "model", "-k", "3", "--steps", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launch, out in (([], "one"), (torchrun, "two")):
        subprocess.run([sys.executable, *launch, *command, out], cwd=root, env=environment, check=True)
    assert contents(root / "one") == contents(root / "two")
    assert len(list((root / "one").rglob("*.png"))) == 9


SHARED = """\
import sys
import torch
sys.path.insert(0, {tests!r})
import trainers
weights = trainers.trained("harmony_vae", ".", 4, "artifacts/checkpoints")
torch.save(weights, name)
"""


def test_a_stage_takes_up_what_two_processes_trained(root, monkeypatch):
    """`torchrun -m harmonylib.tools.notebooks train`, then the stage's own run: it trains nothing anew."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    cells = [v4.new_code_cell("name = 'a.pt'", metadata={"tags": ["parameters"]}),
             v4.new_code_cell(SHARED.format(tests=str(Path(__file__).parent))),
             v4.new_code_cell("raise SystemExit('a cell after the training')")]  # fmt: skip
    nbformat.write(v4.new_notebook(cells=cells), root / "train.ipynb")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "harmonylib.tools.notebooks", "train", "train.ipynb", "-p", "name=two.pt"]
    subprocess.run([sys.executable, *launch, *command], cwd=root, env=environment, check=True)
    assert len(list(root.glob("artifacts/checkpoints/*/finished.pt"))) == 1
    monkeypatch.setattr(training._Run, "step", None)  # a step would fail
    weights, two = (
        trainers.trained("harmony_vae", root, 4, "artifacts/checkpoints"),
        torch.load(root / "two.pt", weights_only=True),
    )
    assert all(torch.equal(value, two[name]) for name, value in weights.items())


def test_dvc_remote_carries_results_to_another_machine(tmp_path):
    """Push from one clone, pull in another: the weights are there and `dvc repro` has nothing to do; a sweep runs."""
    first, second = tmp_path / "first", tmp_path / "second"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the queue's worker calls `dvc`
    environment = os.environ | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1", "PATH": path}

    def call(*words, folder=first):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert not done.returncode, done.stderr
        return done.stdout

    def dvc(*words, folder=first):
        return call(sys.executable, "-m", "dvc", *words, folder=folder)

    first.mkdir()
    (first / "dvc.yaml").write_text(
        "stages:\n  train:\n    cmd: python -c \"open('weights', 'w').write('${seed}' * 3)\"\n"
        "    params: [seed]\n    outs: [weights]\n"
    )
    (first / "params.yaml").write_text("seed: 7\n")
    call("git", "init", "-q")
    dvc("init", "-q")
    dvc("remote", "add", "-q", "-d", "shared", str(tmp_path / "remote"))
    dvc("repro", "-q")
    dvc("push", "-q")
    call("git", "add", ".")
    call("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "trained")
    call("git", "clone", "-q", str(first), str(second), folder=tmp_path)
    assert not (second / "weights").exists()
    dvc("pull", "-q", folder=second)
    assert (second / "weights").read_text() == "777"
    assert "up to date" in dvc("repro", folder=second)
    dvc("exp", "run", "-q", "--queue", "-S", "seed=1,2", folder=second)
    dvc("exp", "run", "-q", "--run-all", folder=second)
    done = [line for line in dvc("exp", "show", "--csv", folder=second).splitlines() if ",Success," in line]
    assert sorted(line.rsplit(",", 1)[1] for line in done) == ["1", "2"]
