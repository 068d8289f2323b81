"""The notebook runner and the stripper, on tiny notebooks. A kernel costs seconds, so each run checks much."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from harmonylib.core.errors import HarmonyError
from harmonylib.tools import notebooks

REPOSITORY = Path(__file__).parents[1]
PARAMETERS = 'task = "harmonize"  # or "inverse"\nseed = 0\nrate = 1e-4\nfast: bool = True\nlimit = None'
NOISY = """\
import sys, os, warnings
from pathlib import Path
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm
from harmonylib.core.settings import enter_root
from harmonylib.core.progress import progress
enter_root()
print("in", Path.cwd() == Path("params.yaml").resolve().parent, task, seed, rate, fast, limit)
warnings.warn("a path and a line number")
for _ in progress(range(3), desc="ours"): pass
for _ in tqdm(range(3), desc="plain"): pass
for _ in auto_tqdm(range(3), desc="auto"): pass
print("end")
object()
"""
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(hash('a string'))"


def write(path, *cells):
    nodes = [v4.new_markdown_cell("# Title"), *(v4.new_code_cell(source) for source in cells)]
    if len(nodes) > 1:
        nodes[1].metadata.tags = ["parameters"]
    nbformat.write(v4.new_notebook(cells=nodes), path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments):
    return notebooks.run_application(notebooks.app, "notebooks", [str(argument) for argument in arguments])


def test_run_is_stable_typed_and_quiet(root, monkeypatch, capfd):
    write(root / "notebooks/03_x.ipynb", PARAMETERS, NOISY, FIGURE)
    executed = root / "reports/notebooks/03_x-inverse-3.ipynb"
    executed.parent.mkdir(parents=True)
    executed.with_suffix(".failed.ipynb").write_text("of an earlier run")
    arguments = ["-p", "task=inverse", "-p", "seed=3"]
    assert command("run", "notebooks/03_x.ipynb", *arguments) == 0
    first = executed.read_bytes()
    terminal = capfd.readouterr().err
    assert "ours: 100%" in terminal and "plain: 100%" in terminal and "a path and a line" in terminal

    monkeypatch.chdir(root / "notebooks")
    assert command("run", "03_x.ipynb", *arguments) == 0
    assert executed.read_bytes() == first
    assert [path.name for path in executed.parent.iterdir()] == [executed.name]

    book = nbformat.read(executed, as_version=4)
    assert [cell.id for cell in book.cells] == [f"cell-{index}" for index in range(5)]
    assert book.cells[2].metadata.tags == ["injected-parameters"]
    stream, result = book.cells[3].outputs
    assert stream.text == "in True inverse 3 0.0001 True None\nend\n"
    assert result.data["text/plain"] == "<object at 0x…>"
    assert "image/png" in book.cells[4].outputs[0].data
    assert set(book.metadata) == {"kernelspec", "language_info"}


def test_a_users_settings_change_nothing(root, monkeypatch):
    for name, text in (
        (".ipython/profile_default/ipython_kernel_config.py", "get_config().InlineBackend.figure_formats = {'svg'}\n"),
        (".config/matplotlib/matplotlibrc", "axes.facecolor: red\n"),
    ):
        (root / "home" / name).parent.mkdir(parents=True)
        (root / "home" / name).write_text(text)
    for name in ("IPYTHONDIR", "MPLCONFIGDIR", "MATPLOTLIBRC", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(root / "home"))
    write("a.ipynb", "import matplotlib.pyplot as plt\nprint(plt.rcParams['axes.facecolor'])\nplt.plot([1, 2]);")
    text = notebooks.run_notebook("a.ipynb").read_text()
    assert "image/png" in text and "svg" not in text and "white" in text and "red" not in text


def test_a_failing_cell_and_a_dying_kernel(root, capfd):
    write(root / "notebooks/a.ipynb", "x = 1", "print('before')", "raise ValueError('the reason\\nand more')", "x")
    good = root / "reports/notebooks/a.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("the last good run")
    assert command("run", "notebooks/a.ipynb") == 1
    error = capfd.readouterr().err
    assert error.startswith("error: notebooks/a.ipynb, cell In [3]: ValueError: the reason;") and error.count("\n") == 1
    assert error.rstrip().endswith("reports/notebooks/a.failed.ipynb")
    assert good.read_text() == "the last good run"
    partial = nbformat.read(root / "reports/notebooks/a.failed.ipynb", as_version=4)
    assert any(output.get("text") == "before\n" for cell in partial.cells for output in cell.get("outputs", []))
    write(root / "a.ipynb", "x = 1", "import os; os.kill(os.getpid(), 9)", "x")
    assert command("run", "a.ipynb") == 1
    error = capfd.readouterr().err
    assert error.startswith("error: a.ipynb, cell In [2]: the kernel died") and error.count("\n") == 1


def test_a_killed_run_leaves_nothing(root):
    write(root / "a.ipynb", "x = 1", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(root / "tmp")}
    (root / "tmp").mkdir()
    process = subprocess.Popen([sys.executable, "-m", "harmonylib.tools.notebooks", "run", "a.ipynb"], env=environment)
    deadline = time.monotonic() + 120
    while not ((root / "pid").exists() and (root / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((root / "pid").read_text()), 0)
    assert not (root / "reports").exists() and not list((root / "tmp").glob("harmonylib-*"))


def test_a_notebook_as_a_program(root):
    later = "def later():\n    train()"
    works = "train = [task, rate].copy\ndone = train()"
    write(root / "a.ipynb", PARAMETERS, works, "done += train()", "done += 1")
    space = {}
    exec(notebooks.program("a.ipynb", {"task": "inverse", "rate": 2.0}), space)
    assert space["done"] == 2 * ["inverse", 2.0]  # as far as the last
    write(root / "a.ipynb", PARAMETERS, works, later, "run_variants = dir\nfound = run_variants()", "train()")
    assert notebooks.program("a.ipynb").endswith(works)
    assert notebooks.program("a.ipynb", calls=notebooks.APART).endswith("found = run_variants()")
    write(root / "a.ipynb", PARAMETERS, "done = run_variants")
    with pytest.raises(HarmonyError, match="a.ipynb: no cell calls train or train_base .* itself"):
        notebooks.program("a.ipynb")
    write(root / "a.ipynb", PARAMETERS, later, "later()")
    with pytest.raises(HarmonyError, match="a.ipynb: calls train in a function; call it in a cell, or through run_var"):
        notebooks.share_out("a.ipynb", [], 2)
    assert command("train", "a.ipynb", "-p", "tusk=x") == 1


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("tusk=inverse", "no parameter tusk; did you mean task?"),
        ("colour=1", "no parameter colour (it has task, seed, rate, fast, limit)"),
        ("seed=x", "parameter seed must be of type int like 0, not 'x'"),
        ("seed=true", "parameter seed must be of type int like 0, not True"),
        ("fast=0", "parameter fast must be of type bool like True, not 0"),
        ("task=3", """parameter task must be of type str like 'harmonize', not 3; to pass text: -p task='"3"'"""),
        ("seed", "-p seed: must be NAME=VALUE"),
        ("seed=[1", "-p seed=[1, line 1: not valid YAML"),
    ],
)
def test_wrong_parameters_never_start_a_kernel(root, capsys, parameter, message):
    write(root / "a.ipynb", PARAMETERS)
    assert command("run", "a.ipynb", "-p", parameter) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (root / "reports").exists()


def test_values_are_typed():
    pairs = ["a=false", "b=1e-4", "c=inverse", "d=[1, 2]", "e=null", "f=", "g=x=y"]
    assert notebooks.parse_parameters(pairs) == dict(a=False, b=1e-4, c="inverse", d=[1, 2], e=None, f=None, g="x=y")


def test_damaged_notebooks_are_named(root):
    for text in ("", "{", "{}", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'):
        (root / "a.ipynb").write_text(text)
        with pytest.raises(HarmonyError, match="^a.ipynb: not a valid notebook"):
            notebooks.read_notebook("a.ipynb")
    with pytest.raises(HarmonyError, match="^b.ipynb: no such notebook"):
        notebooks.read_notebook("b.ipynb")


def test_strip(root, capsys):
    path = write(root / "a.ipynb", PARAMETERS, "1 + 1")
    book = nbformat.read(path, as_version=4)
    book.cells[2].update(outputs=[v4.new_output("stream", text="2")], execution_count=7)
    book.cells[2].metadata.update(collapsed=True)
    book.metadata.language_info = {"name": "python", "version": "3.9"}
    nbformat.write(book, path)
    before = path.read_bytes()
    assert command("strip", "--check", path) == 1
    assert path.read_bytes() == before and "strip" in capsys.readouterr().err
    assert command("strip", path) == 0
    stripped = path.read_bytes()
    assert stripped != before and command("strip", "--check", path) == 0
    assert command("strip", path) == 0 and path.read_bytes() == stripped
    book = nbformat.read(path, as_version=4)
    assert book.cells[1].metadata.tags == ["parameters"] and book.cells[1].source == PARAMETERS
    assert book.cells[2] == {
        "cell_type": "code", "execution_count": None, "id": "cell-2", "metadata": {}, "outputs": [], "source": "1 + 1"
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["notebooks", "ablations"])
def test_the_repositorys_notebooks(folder):
    """They are stripped, and no cell draws into an Output widget: headless, it sends each picture back to the kernel
    while the cell's reply is on its way; with large pictures the reply was lost now and then, and the notebook hung for
    ever. ipywidgets.Image does without.
    """
    for path in sorted((REPOSITORY / folder).rglob("*.ipynb")):
        assert not notebooks.strip(path, check=True), f"run: python -m harmonylib.tools.notebooks strip {path}"
        code = "\n".join(cell.source for cell in notebooks.read_notebook(path).cells if cell.cell_type == "code")
        assert not re.search(r"\b(interact\w*|Output)\(", code), path


def test_every_notebook_has_exercises_with_solutions():
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        last = nbformat.read(path, as_version=4).cells[-1].source
        exercises = re.findall(r"(?m)^\d\. ", last)
        assert last.startswith("## Exercises") and 2 <= len(exercises) <= 4 and f"solutions/{path.name}" in last, path
        assert (path.parent / "solutions" / path.name).is_file(), path


@pytest.mark.parametrize(("name", "words"), [("together", "done = train()"), ("apart", "done = run_variants()")])
def test_a_stage_by_two_processes(root, monkeypatch, name, words):
    """What they share runs in both, the rest of the notebook in its own run; one that shares nothing starts none."""
    rest = "from pathlib import Path\nassert not Path('rest').exists()\nPath('rest').touch()"
    who = "os.environ.get('RANK', os.environ.get('HARMONYLIB_SHARE', 'own').split('/')[0])"
    both = f"import os\ndef train():\n    open({who}, 'w')\nrun_variants = train"
    write(root / "a.ipynb", both, words, rest)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(notebooks.PROCESSES, "2")
    assert command("run", "a.ipynb") == 0
    assert all((root / made).exists() for made in ("0", "1", "own", "rest"))


def test_which_notebooks_many_processes_share():
    """What trains, draws, extracts, cleans or scores; none is shared out in vain, none trains where it would not be."""
    shared = {}
    for path in (path for folder in ("notebooks", "ablations") for path in (REPOSITORY / folder).glob("*.ipynb")):
        notebook = notebooks.read_notebook(path)
        kinds = {
            name: notebooks.shared_cells(path, notebook, getattr(notebooks, name)) for name in ("TOGETHER", "APART")
        }
        shared[path.stem] = {name for name, cells in kinds.items() if cells}
    assert {name for name, kinds in shared.items() if not kinds} == {"00_tour", "01_data", "10_report", "candidates"}
    assert {name for name, kinds in shared.items() if "APART" in kinds} == {
        name for name in shared if name.startswith("table") and name != "table_human_harmony"
    }
    both = {"table_4_resolutions", "table_5_initialisation"}  # latents by all, then each its own trainings
    assert {name for name, kinds in shared.items() if len(kinds) == 2} == both


def test_threads_are_the_idle_cores_or_what_the_user_says(monkeypatch):
    monkeypatch.setattr(notebooks, "idle_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert notebooks._kernel_environment(REPOSITORY, "")["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert notebooks._kernel_environment(REPOSITORY, "")["OMP_NUM_THREADS"] == "1"
