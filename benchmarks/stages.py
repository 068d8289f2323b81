"""`python -m benchmarks.stages [PROFILE]`: where the time of a chain goes, by stage, in a temporary clone of HEAD.

Every notebook is run as its stage runs it, without DVC, under `mini` unless another profile is named; printed are its
seconds: until the kernel is there ("start"), in cells that train, in cells that show figures or tables, in other cells
that import something, and in the rest. (What each stage took in a whole run is in the log of `make repro`.)
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pandas as pd

from harmonylib.tools import notebooks

REPOSITORY = Path(__file__).parents[1]


def kind(cell) -> str:
    """What a code cell spends its time on."""
    names = notebooks.called(cell)
    if names & {*notebooks.TRAINING, *notebooks.APART}:
        return "training"
    return "figures" if names & {"display", "show"} else "imports" if "import " in cell.source else "rest"


def spent(executed) -> dict[str, float]:
    """Seconds of a notebook as papermill executed it, by `kind`, with the start-up that no cell has."""
    found = dict.fromkeys(("start", "imports", "training", "figures", "rest"), 0.0)
    for cell in (cell for cell in executed.cells if cell.cell_type == "code"):
        found[kind(cell)] += cell.metadata.papermill.duration or 0.0
    return found | {"start": executed.metadata.papermill.duration - sum(found.values())}


def profile(path: Path, parameters: dict) -> dict[str, float]:
    """Run one notebook in the current directory's repository; its seconds as `spent`."""
    seen, strip = [], notebooks.stable

    def keep(executed, **options):
        seen.append(spent(executed))
        return strip(executed, **options)

    with patch.object(notebooks, "stable", keep):
        notebooks.run_notebook(path, parameters)
    return seen[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
        os.chdir(clone)
        os.environ["PYTHONPATH"] = str(clone)
        words = [sys.executable, "-m", "harmonylib.tools.cli", "profile", *(sys.argv[1:] or ["mini"])]
        subprocess.run(words, check=True)
        table = {}
        for path in sorted(Path("notebooks").glob("*.ipynb")):
            several = path.stem.startswith(("03", "04"))
            for parameters in [{"task": "harmonize"}, {"task": "inverse"}] if several else [{}]:
                table["-".join([path.stem, *parameters.values()])] = profile(path, parameters)
                print(path, parameters, file=sys.stderr)
        os.chdir(REPOSITORY)
    frame = pd.DataFrame(table).T
    frame["all"] = frame.sum(axis=1)
    frame.loc["all"] = frame.sum()
    print(frame.round(0).astype(int).to_string())


if __name__ == "__main__":
    main()
