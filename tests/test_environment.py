"""pyproject.toml is the one list of versions: environment.yml points to it, and the code imports nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
OURS = {"harmonylib", "report", "ablations"}
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
    for path in sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for module in {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names):
                owners = {canonical(owner) for owner in distributions.get(module, [module])}
                if not owners & declared:
                    missing.add(f"{path.name}: {module}")
    assert not missing


STUB = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *platform*) exec "{python}" -c "import platform
platform.system, platform.machine = lambda: '{system}', lambda: '{machine}'
$2";; *install*) exit 1;; esac
"""  # a Python of a certain machine that installs nothing


@pytest.mark.parametrize(
    ("git", "machine", "line"),
    [
        (False, ("Linux", "x86_64"), "git init"),
        (True, ("Darwin", "x86_64"), "no torch 2.13 for Intel Macs"),
        (True, ("Linux", "x86_64"), "the installation failed"),
    ],
)
def test_make_says_what_is_missing(tmp_path, git, machine, line):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    stub, log = tmp_path / "python-stub", tmp_path / "log"
    stub.write_text(STUB.format(log=log, python=sys.executable, system=machine[0], machine=machine[1]))
    stub.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(stub)
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    if git:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    words = ["make", "repro", f"PYTHON={stub}"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [text for text in ran.stderr.splitlines() if text.startswith("error: ")]
    assert ran.returncode and len(errors) == 1 and line in errors[0], ran.stderr
    called = log.read_text() if log.exists() else ""
    assert ("install" in called) == (line == "the installation failed")


def test_line_ends_stay_as_they_are():
    names = ["Makefile", ".ci/run", ".ci/smoke", "dvc.lock", "harmonylib/tools/cli.py"]
    ran = subprocess.run(["git", "check-attr", "eol", *names], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip("no git checkout")
    assert ran.stdout.splitlines() == [f"{name}: eol: lf" for name in names]
