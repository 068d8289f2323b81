"""The command line: exit codes, and one line on stderr for each mistake."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from harmonylib.core import images
from harmonylib.core.errors import HarmonyError, note
from harmonylib.data import layout
from harmonylib.tools import cli, cli_pictures

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return cli.run(cli.app, "harmonylib", list(arguments))


def test_profile(root, capsys):
    assert run("profile", "smoke") == 0
    assert "profile: smoke" in (root / "params.yaml").read_text()
    assert capsys.readouterr().out == "params.yaml written from profiles/smoke.yaml\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["profile", "smok"], 1, "no profile smok"),
        (["profile"], 2, "Missing argument"),
        (["profil"], 2, "No such command"),
        (["profile", "mini", "--fast"], 2, "No such option"),
    ],
)
def test_mistakes(root, capsys, arguments, code, message):
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not (root / "params.yaml").exists()


@pytest.mark.parametrize(
    ("work", "unwanted"),
    [
        ("run(['harmonize', 'c.png', 'm.png', '-o', 'o.png'])", "diffusers transformers timm torchvision"),
        ("run(['evaluate', 'p', 'd'])", "torch"),
        ("None", "torch numpy"),
    ],
)  # fmt: skip
def test_commands_import_only_what_they_use(tmp_path, work, unwanted):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:30] = True
    images.write_image(tmp_path / "c.png", pixels)
    images.write_image(tmp_path / "m.png", mask)
    pair = layout.write_pair(tmp_path / "d", "HCOCO", "a", 1, pixels, mask)
    layout.write_list(tmp_path / "d", "test", [layout.write_composite(tmp_path / "d", "HCOCO", pair, 1, pixels)])
    images.write_image(tmp_path / f"p/{pair}_1.png", pixels)
    program = "import sys, harmonylib\ndef run(words):\n    from harmonylib.tools import cli\n"
    program += f"    assert cli.run(cli.app, 'harmonylib', words) == 0\n{work}\n"
    program += f"print('there:', *set('{unwanted}'.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["there:"], done.stderr


@pytest.mark.parametrize(
    ("models", "said", "threads"),
    [(["contrastive-resunet"], "", 1), ([], "", 1), (["my/folder"], "", 2), (["diffharmony++"], "2", 2)],
)
def test_shipped_models_run_on_one_thread(monkeypatch, models, said, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    torch.set_num_threads(2)
    cli_pictures._one_thread(models)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == threads


def commands(work) -> typer.Typer:
    application = typer.Typer()
    application.command()(work)
    return application


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (HarmonyError("a.png: no such file"), 1, "error: a.png: no such file\n"),
        (OSError(28, "No space left on device", "out.png"), 1, "error: out.png: No space left on device; make room"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def fail():
        raise error

    assert cli.run(commands(fail), "fail", ["--"]) == code
    assert capsys.readouterr().err.startswith(line)


def test_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(commands(lambda: 1 / 0), "fail", ["--"])


def test_the_command_itself(tmp_path):
    """The console script: outside a repository there is one clear line. And the module under its former name."""
    script, options = Path(sys.executable).with_name("harmonylib"), {"capture_output": True, "text": True}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([script, "profile", "mini"], cwd=tmp_path, env=environment, **options)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    words = [sys.executable, "-m", "harmonylib.cli", "profile", "--help"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, **options)
    assert ran.returncode == 0 and "Usage: harmonylib profile" in ran.stdout, ran.stderr


def test_help(capsys):
    for command in ([], *([command.name or command.callback.__name__] for command in cli.app.registered_commands)):
        assert run(*command, "--help") == 0
        assert "Usage: harmonylib" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-8"])
def test_terminals_that_lack_characters(monkeypatch, encoding):
    """What cannot be printed is escaped: the work is done, and the exit code says so."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in "12"]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def work():
        print("\u51fa\u529b \u00e9 \u2013 \udce9")
        note("\u51fa\u529b.png: left out")
        raise HarmonyError("\u51fa\u529b \u00e9 \udce9: no such file")

    assert cli.run(commands(work), "x", ["--"]) == 1
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding).splitlines() for stream in streams)
    assert len(out) == 1 and len(err) == 2 and err[0].startswith("warning: ") and err[1].startswith("error: ")
    assert "\\udce9" in out[0] and ("\u51fa" in err[0]) == (encoding in ("cp932", "utf-8"))
