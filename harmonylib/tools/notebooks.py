"""Run notebooks as pipeline stages, and keep those in the repository free of outputs.

    python -m harmonylib.tools.notebooks run notebooks/03_harmony_vae.ipynb -p task=harmonize
    torchrun --nproc-per-node 8 -m harmonylib.tools.notebooks train notebooks/03_harmony_vae.ipynb -p task=harmonize
    python -m harmonylib.tools.notebooks strip [--check] FILES...

The executed copy in reports/notebooks/ has the same bytes after every equal run: numbered cell ids, no timings, no
progress bars, no warnings (stderr goes to the terminal). It appears only when every cell has run.
"""

import ast
import contextlib
import importlib.util
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import nbformat
import typer

from ..core.checkpoints import RESUME_POINTS, discard_finished
from ..core.devices import idle_cores
from ..core.distributed import SHARE
from ..core.errors import HarmonyError
from ..core.files import atomic_path
from ..core.progress import PLAIN_BARS
from ..core.settings import did_you_mean, find_root, parse_yaml, settings
from .terminal import run as run_application

EXECUTED = Path("reports/notebooks")
PROCESSES = "HARMONYLIB_GPUS"  # how many processes a stage may use: `harmonylib repro --gpus N`
TRAINING = ("train", "train_base")
TOGETHER = (  # calls whose work the processes of a group share,
    *TRAINING, "clean_photos", "decode_latents", "evaluate", "extract", "extract_regions", "extract_undone",
    "generate_candidates", "sample_latents", "select",
)  # fmt: skip
APART = ("run_variants",)  # and that whose runs are trained in a process each
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def read_notebook(path):
    """A notebook as nbformat 4. Raises HarmonyError naming the file when it is missing or damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):  # of cells without ids, which get theirs here
            notebook = _numbered(nbformat.reads(text, as_version=4))
            nbformat.validate(notebook)
        return notebook
    except (FileNotFoundError, IsADirectoryError):
        raise HarmonyError(f"{path}: no such notebook") from None
    except OSError:
        raise
    except Exception as error:  # nbformat raises many kinds on damaged files
        reason = (str(error).splitlines() or [""])[0][:200]
        raise HarmonyError(f"{path}: not a valid notebook ({reason}); restore it from git") from None


def _text(notebook) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def _write_notebook(path, notebook) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(_text(notebook), encoding="utf-8")


def _numbered(notebook):
    """Fixed metadata and cell ids, in place: what every notebook on disk has in common."""
    notebook.metadata = type(notebook)(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = type(notebook)({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    return notebook


def strip(path, check: bool = False) -> bool:
    """Remove outputs, execution counts and editor metadata from a notebook file; True if it had any.

    With `check` the file is left as it is.
    """
    notebook = read_notebook(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    changed = _text(notebook) != Path(path).read_text(encoding="utf-8")
    if changed and not check:
        _write_notebook(path, notebook)
    return changed


def stable(notebook, keep_stderr: bool = False):
    """An executed notebook without what differs between two equal runs, in place."""
    for cell in _numbered(notebook).cells:
        outputs = []
        for output in cell.get("outputs", []):
            data, stream = output.get("data", {}), output.get("name")
            if WIDGET in data or (stream == "stderr" and not keep_stderr):
                continue
            if "text/plain" in data:
                data["text/plain"] = ADDRESS.sub(" at 0x…", data["text/plain"])
            if stream and outputs and outputs[-1].get("name") == stream:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


def parameter_defaults(notebook) -> dict:
    """Names assigned in the cell tagged "parameters", with their literal defaults (None where it is no literal)."""
    defaults = {}
    cells = (cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for node in ast.parse(next(cells, "")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            try:
                defaults[name] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                defaults[name] = None
    return defaults


def check_parameters(path, notebook, parameters: dict) -> None:
    """Raise HarmonyError for a parameter the notebook does not have, or a value of another type than its default."""
    defaults = parameter_defaults(notebook)
    for name, value in parameters.items():
        if name not in defaults:
            hint = did_you_mean(name, defaults) or f" (it has {', '.join(defaults) or 'none'})"
            raise HarmonyError(f"{path}: no parameter {name}{hint}")
        default, kind = defaults[name], type(defaults[name])
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if default is not None and not fits:
            quote = f"""; to pass text: -p {name}='"{value}"'""" if kind is str else ""
            raise HarmonyError(
                f"{path}: parameter {name} must be of type {kind.__name__} like {default!r}, not {value!r}{quote}"
            )


def parse_parameters(pairs: list[str]) -> dict:
    """["seed=1", "task=harmonize"] -> {"seed": 1, "task": "harmonize"}: values typed as YAML types them."""
    parameters = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise HarmonyError(f"-p {pair}: must be NAME=VALUE")
        parameters[name] = parse_yaml(text, f"-p {pair}")
    return parameters


def run_notebook(path, parameters: dict | None = None, output=None) -> Path:
    """Execute a notebook in the repository root and return the path of the executed copy.

    `parameters` replace those of its parameters cell. The copy is `output`, by default
    reports/notebooks/<stem>[-<value>…].ipynb; it is written only if every cell ran. Otherwise HarmonyError names the
    cell and the error, an earlier copy stays as it was, and what there is goes to <name>.failed.ipynb beside it.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    path, parameters, root = Path(path), parameters or {}, find_root()
    notebook = read_notebook(path)
    check_parameters(path, notebook, parameters)
    values = [re.sub(r"[^A-Za-z0-9._]+", "_", str(value)) for value in parameters.values()]
    target = root / (output or EXECUTED / ("-".join([path.stem, *values]) + ".ipynb"))
    failed = target.with_suffix(".failed.ipynb")
    started = time.time()
    for name in ("papermill", "asyncio"):  # what they have to say is in the errors raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="harmonylib-") as folder:
        partial = Path(folder, "partial.ipynb")
        try:
            with patch.dict(os.environ, _kernel_environment(root, folder)):
                executed = papermill.execute_notebook(
                    notebook, partial, parameters, kernel_name="python3", progress_bar=False, cwd=root,
                    start_timeout=300, iopub_timeout=120,  # a busy machine is slow to hand over large figures
                    stderr_file=sys.stderr, extra_arguments=["--log-level=CRITICAL"],
                )  # fmt: skip
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            reason = "the kernel died; most often memory ran out"
            if isinstance(error, papermill.PapermillExecutionError):
                reason = f"{error.ename}: {str(error.evalue).strip().partition(chr(10))[0][:500]}"
            reached = nbformat.read(partial, as_version=4)
            begun = [c for c in reached.cells if c.cell_type == "code" and c.metadata.papermill.start_time]
            _write_notebook(failed, stable(reached, keep_stderr=True))
            shown = failed.relative_to(root) if failed.is_relative_to(root) else failed
            raise HarmonyError(f"{path}, cell In [{len(begun)}]: {reason}; the notebook up to there: {shown}") from None
    _write_notebook(target, stable(executed))
    failed.unlink(missing_ok=True)
    discard_finished(root / RESUME_POINTS, started)
    return target


def _kernel_environment(root: Path, folder: str) -> dict[str, str]:
    matplotlib = Path(importlib.util.find_spec("matplotlib").origin).parent  # found without importing it
    return {
        PLAIN_BARS: "1",
        "TQDM_MININTERVAL": "2" if sys.stderr.isatty() else "30",  # seconds; a log keeps every state of a bar
        "TQDM_NCOLS": "100",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(matplotlib / "mpl-data/matplotlibrc"),  # the user's changes no figure,
        "IPYTHONDIR": f"{folder}/ipython",  # nor does the user's kernel
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one of the same name in the home folder
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(idle_cores()),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def called(cell, later: bool = False) -> set[str]:
    """Names of the functions that a code cell calls as it runs, and with `later` in functions that it defines, too."""
    found, todo = set(), []
    if cell.cell_type == "code":
        with contextlib.suppress(SyntaxError):  # commands that only notebooks know
            todo = list(ast.parse(cell.source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call):
            found.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
        if later or not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return found


def shared_cells(path, notebook, calls) -> list:
    """A notebook's code cells up to the last that several processes have work in, [] where none has.

    calls: TOGETHER, before the first cell that calls one of APART; or APART. Raises HarmonyError for a notebook that
    trains where neither would find it: its training would run in one process.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    apart = next((place for place, cell in enumerate(cells) if called(cell) & set(APART)), len(cells))
    hidden = set().union(*(called(cell, later=True) - called(cell) for cell in cells)) & set(TRAINING)
    if hidden and apart == len(cells):
        raise HarmonyError(f"{path}: calls {hidden.pop()} in a function; call it in a cell, or through run_variants")
    if calls is APART:
        return cells[: apart + 1] if apart < len(cells) else []
    last = max((place for place, cell in enumerate(cells[:apart]) if called(cell) & set(TOGETHER)), default=-1)
    return cells[: last + 1]


def program(path, parameters: dict | None = None, calls=TOGETHER) -> str:
    """What `shared_cells` gives as a plain program with these parameters. Raises HarmonyError where that is nothing."""
    notebook, parameters = read_notebook(path), parameters or {}
    check_parameters(path, notebook, parameters)
    cells = []
    for cell in shared_cells(path, notebook, calls):
        cells.append(cell.source)
        if "parameters" in cell.metadata.get("tags", []):
            cells += [f"{name} = {value!r}" for name, value in parameters.items()]
    if not cells:
        raise HarmonyError(f"{path}: no cell calls {' or '.join(calls)} itself; there is nothing to share out")
    return "\n\n".join(cells)


app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
PARAMETERS = typer.Option([], "-p", "--parameter", help="NAME=VALUE, may be given several times")


def share_out(path, parameters: list[str], processes: int) -> None:
    """Run what a notebook can share in several processes, one a GPU; its own run then takes up what they have made.

    Most is shared by a group (torchrun); then, of an ablation, each process takes some whole runs. Raises HarmonyError
    where one fails, and as `shared_cells`.
    """
    notebook, threads = read_notebook(path), str(max(1, idle_cores() // processes))
    command = ["-m", "harmonylib.tools.notebooks", "train", str(path), *(f"-p{text}" for text in parameters)]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "LOKY_MAX_CPU_COUNT": threads, "MPLBACKEND": "agg"}
    environment[PLAIN_BARS] = "1"
    if shared_cells(path, notebook, TOGETHER):
        group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        _run_all(path, group + command, [environment])
    if shared_cells(path, notebook, APART):
        places = [{SHARE: f"{n}/{processes}", "CUDA_VISIBLE_DEVICES": str(n)} for n in range(processes)]
        _run_all(path, command, [environment | place for place in places])


def _run_all(path, command: list[str], environments: list[dict]) -> None:
    started = [subprocess.Popen([sys.executable, *command], env=some, stdout=sys.stderr) for some in environments]
    try:
        if any([process.wait() for process in started]):
            raise HarmonyError(f"{path}: one of several processes failed; what it said stands above")
    finally:
        for process in started:
            process.terminate()
            process.wait()


@app.command("run")
def run_command(
    notebook: Path,
    parameter: list[str] = PARAMETERS,
    output: Path = typer.Option(None, "-o", "--output", help="the executed copy; default: in reports/notebooks/"),
) -> None:
    """Execute a notebook in the repository root."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwind: no kernel or file left over
    if (find_root() / "profiles").is_dir():  # our repository: a mistake in any section is named before the first stage
        settings()
    started = time.monotonic()
    if (processes := int(os.environ.get(PROCESSES, "1"))) > 1:
        share_out(notebook, parameter, processes)
    target = run_notebook(notebook, parse_parameters(parameter), output)
    typer.echo(f"{notebook} -> {os.path.relpath(target)} ({time.monotonic() - started:.0f} s)", err=True)


@app.command("train")
def train_command(notebook: Path, parameter: list[str] = PARAMETERS) -> None:
    """Run a notebook as far as its shared work goes, in every process of a torchrun; its stage takes up the result.

    Refused for notebooks without any, or that train where they would not share; `harmonylib repro` starts it.
    """
    source = program(notebook, parse_parameters(parameter), APART if os.environ.get(SHARE) else TOGETHER)
    os.chdir(find_root())
    with tempfile.TemporaryDirectory(prefix="harmonylib-") as folder:
        script = Path(folder, f"{notebook.stem}.py")
        script.write_text(source, encoding="utf-8")
        runpy.run_path(str(script))


@app.command("strip")
def strip_command(
    notebooks: list[Path], check: bool = typer.Option(False, "--check", help="change nothing, exit 1 for outputs")
) -> None:
    """Remove outputs from notebook files."""
    changed = [path for path in notebooks if strip(path, check)]
    for path in changed:
        typer.echo(f"{path}: {'has outputs or editor metadata' if check else 'stripped'}")
    if check and changed:
        raise HarmonyError(f"run: python -m harmonylib.tools.notebooks strip {' '.join(map(str, changed))}")


if __name__ == "__main__":
    sys.exit(run_application(app, "python -m harmonylib.tools.notebooks"))
