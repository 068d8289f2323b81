"""pyproject.toml is the one list of versions: environment.yml points to it, and the code imports nothing else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_conda_environment_is_the_project():
    environment = YAML(typ="safe").load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in plain
    assert pip == ["-e .[dev]"]
    named = {canonical(re.split("[=<>]", entry)[0]) for entry in plain}
    assert not named & {canonical(requirement.name) for requirement in REQUIREMENTS + EXTRAS}


def test_what_decides_numbers_is_pinned():
    pinned = {requirement.name for requirement in REQUIREMENTS if str(requirement.specifier).startswith("==")}
    assert pinned >= {"torch", "torchvision", "diffusers", "timm", "albumentations", "scikit-image", "numpy", "pillow"}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_installed_versions(requirement):
    installed = version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{requirement} declared, {installed} installed"


def test_imports_are_declared():
    declared = {canonical(requirement.name) for requirement in REQUIREMENTS + EXTRAS}
    distributions = packages_distributions()
    missing = set()
    for path in sorted((ROOT / "harmonylib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for module in {name.split(".")[0] for name in names} - {"harmonylib"} - set(sys.stdlib_module_names):
                owners = {canonical(owner) for owner in distributions.get(module, [module])}
                if not owners & declared:
                    missing.add(f"{path.name}: {module}")
    assert not missing
