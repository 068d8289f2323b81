"""What DVC and papermill cost: pipeline stages by `dvc repro` against the same notebooks as plain scripts.

Both run in a temporary clone of HEAD under `smoke`, where little training hides the cost. The plain way starts one
Python process a notebook; ours starts a Jupyter kernel for it, checks parameters, writes the executed notebook and its
figures, and hashes and caches what the stage made. The difference is a stage's fixed cost. The second row sets it
against what the last documented run of `mini` took (docs/course/run.json): its bare time is what is left.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harmonylib.core.json_files import read_json
from harmonylib.tools.notebooks import program

from .paired import paired

REPOSITORY = Path(__file__).parents[1]
STAGES = {"data": "01_data", "base": "02_base_autoencoder", "classifier": "05_harmony_classifier"}


def whole_run(name: str, run: float, stages: int, per_stage: dict) -> dict:
    """The row of a pipeline run of `run` seconds, given a `paired` row of len(STAGES) stages; ratio: bare / whole."""
    fixed, low, high = (
        stages / len(STAGES) * per_stage["baseline"] * (1 / ratio - 1)
        for ratio in (per_stage["ratio"], *per_stage["spread"])
    )
    bare = [1 - cost / run for cost in (fixed, low, high)]
    label = f"a {name} run of {stages} stages: DVC and papermill / bare (at {fixed / stages:.1f} s a stage)"
    return {"name": label, "ours": run, "baseline": run - fixed, "ratio": bare[0], "spread": bare[1:], "unit": "s"}


def rows() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
        own = {"PYTHONPATH": str(clone), "DVC_SITE_CACHE_DIR": f"{folder}/dvc", "MPLBACKEND": "agg"}

        def call(*words) -> str:
            command = [sys.executable, *words]
            return subprocess.run(command, cwd=clone, env=os.environ | own, check=True, stdout=subprocess.PIPE).stdout

        def repro(*words):
            call("-m", "dvc", "repro", "-q", *words)

        call("-m", "harmonylib.tools.cli", "profile", "smoke")
        repro(*STAGES)
        for name in STAGES.values():
            (clone / f"{name}.py").write_text(program(clone / f"notebooks/{name}.ipynb"), encoding="utf-8")
        found = paired(
            lambda: repro("--force", "--single-item", *STAGES),
            lambda: [call(f"{name}.py") for name in STAGES.values()],
            repeats=2,
        )
    took = [notebook["seconds"] for notebook in read_json(REPOSITORY / "docs/course/run.json")["notebooks"].values()]
    name = f"{len(STAGES)} stages under smoke: DVC and papermill / plain scripts"
    return [{"name": name, **found}, whole_run("mini", float(sum(took)), len(took), found)]
