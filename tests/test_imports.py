"""The rooms of the library: no import cycles, and what may import what."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

from imports import EMPTY, FILES, MODULES, PACKAGES, ROOT, graph, notebook_code, reached

from harmonylib.core.checkpoints import training_sources

ROOMS = ("core", "data", "training", "models", "augmentation", "evaluation", "inference", "tools")
ROOMS += ("report", "ablations", "cli")


def room(module: str) -> str:
    """The folder or top-level module that a module stands in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "harmonylib" else parts[0]


def test_no_module_imports_itself_through_others():
    assert "harmonylib.core.files" in graph()["harmonylib.core.cache"]  # the graph is there
    assert "harmonylib.tools.app" in graph()["harmonylib.tools.cli_pictures"]  # with imports within functions
    list(TopologicalSorter(graph()).static_order())  # raises CycleError with the modules of a cycle


def test_folders_import_only_from_those_before_them():
    for module, others in graph().items():
        allowed = ROOMS[: ROOMS.index(room(module)) + 1]
        wrong = {other for other in others if room(other) not in allowed}
        assert not wrong, f"{module} imports {wrong}"
        assert not {"report", "ablations"} & {room(other) for other in others} - {room(module)}


def test_packages_export_nothing_of_their_modules():
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    assert packages - EMPTY == {"harmonylib", "harmonylib.evaluation.published"}


def test_the_resume_key_covers_what_training_runs_through_and_no_tools():
    covered = {path.relative_to(ROOT).as_posix() for path in training_sources()}
    starts = {
        "harmonylib.training",
        "harmonylib.models.base",
        "harmonylib.models.start",
        "harmonylib.models.refinement",
    }
    needed = {MODULES[name].relative_to(ROOT).as_posix() for name in reached(starts)}
    assert needed <= covered
    others = covered - {Path(name).as_posix() for name in needed}
    assert not [name for name in others if name.split("/")[1] not in ("core", "data", "models")]


def test_what_notebooks_import_is_there():
    paths = [*ROOT.glob("notebooks/**/*.ipynb"), *ROOT.glob("ablations/*.ipynb")]
    for path in paths:
        for node in ast.walk(ast.parse(notebook_code(path))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                for name in [alias.name for alias in node.names]:
                    there = f"{node.module}.{name}" in FILES or hasattr(importlib.import_module(node.module), name)
                    assert there, f"{path.name}: {node.module} has no {name}"
    assert len(paths) > 20
