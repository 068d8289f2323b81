"""What DVC and papermill cost: pipeline stages by `dvc repro` against the same notebooks as plain scripts.

Both run in a temporary clone of HEAD under the `smoke` profile, where little training hides the cost. The plain way
starts one Python process a notebook; ours starts a Jupyter kernel for it, checks parameters, writes the executed
notebook and its figures, and hashes and caches what the stage made.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .paired import paired

REPOSITORY = Path(__file__).parents[1]
STAGES = {"base": "02_base_autoencoder", "classifier": "05_harmony_classifier", "resunet": "08_contrastive_resunet"}


def rows() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
        own = {"PYTHONPATH": str(clone), "DVC_SITE_CACHE_DIR": f"{folder}/dvc", "MPLBACKEND": "agg"}

        def call(*words):
            command = [sys.executable, *words]
            subprocess.run(command, cwd=clone, env=os.environ | own, check=True, stdout=subprocess.DEVNULL)

        def repro(*words):
            call("-m", "dvc", "repro", "-q", *words)

        call("-m", "harmonylib.cli", "profile", "smoke")
        repro(*STAGES)
        notebooks = [f"notebooks/{name}.ipynb" for name in STAGES.values()]
        call("-m", "jupyter", "nbconvert", "--to", "script", "--output-dir", "scripts", *notebooks)
        found = paired(
            lambda: repro("--force", "--single-item", *STAGES),
            lambda: [call(f"scripts/{name}.py") for name in STAGES.values()],
            repeats=3,
        )
    return [{"name": f"{len(STAGES)} stages under smoke: DVC and papermill / plain scripts", **found}]
