"""pyproject.toml names all that the code imports, requirements.lock its versions; environment.yml points to both."""

import ast
import inspect
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

import harmonylib

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
    assert pip == ["-c requirements.lock", "-e .[dev]"]
    named = {canonical(re.split("[=<>]", entry)[0]) for entry in plain}
    assert not named & {canonical(requirement.name) for requirement in REQUIREMENTS + EXTRAS}


def test_the_lock_is_what_is_installed_and_within_the_ranges():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert not [
        line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+( ; (sys_)?platform\w* *[!=]= *'\w+')?", line)
    ]
    locked = {canonical(r.name): r.specifier for r in map(Requirement, lines) if not r.marker or r.marker.evaluate()}
    wrong = [f"{name}{pin}" for name, pin in locked.items() if not pin.contains(version(name), prereleases=True)]
    assert not wrong, f"run make lock: {wrong}"
    for requirement in (r for r in REQUIREMENTS + EXTRAS if r.name != PROJECT["name"]):
        assert canonical(requirement.name) in locked, f"run make lock: {requirement.name} is not in it"
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


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


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "harmonylib/__init__.py").read_text())
    seen = {f.names[0].asname: f.module for f in ast.walk(tree) if isinstance(f, ast.ImportFrom) and f.names[0].asname}
    assert seen == harmonylib._PUBLIC and (ROOT / "harmonylib/py.typed").is_file()
    for function in (harmonylib.harmonize, harmonylib.compose, harmonylib.score):
        assert {*inspect.signature(function).parameters, "return"} == set(function.__annotations__)


STUB = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *platform*) exec "{python}" -c "import platform
platform.system, platform.machine = lambda: '{system}', lambda: '{machine}'
$2";; *install*) exit 1;; esac
"""  # a Python of a certain machine that installs nothing


@pytest.mark.skipif(os.name == "nt", reason="make and a shell")
@pytest.mark.parametrize(
    ("git", "machine", "line"),
    [
        (False, ("Linux", "x86_64"), "git init"),
        (True, ("Darwin", "x86_64"), "no torch 2.13 for Intel Macs"),
        (True, ("Linux", "x86_64"), "the installation failed"),
    ],
)
def test_make_says_what_is_missing(tmp_path, git, machine, line):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    stub, log = tmp_path / "python-stub", tmp_path / "log"
    stub.write_text(STUB.format(log=log, python=sys.executable, system=machine[0], machine=machine[1]))
    stub.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(stub)
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    if git:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    words = ["make", "repro", f"PYTHON={stub}", "TORCH_INDEX=https://cpu.example"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [text for text in ran.stderr.splitlines() if text.startswith("error: ")]
    assert ran.returncode and len(errors) == 1 and line in errors[0], ran.stderr
    called = log.read_text() if log.exists() else ""
    assert ("install" in called) == (line == "the installation failed")
    assert "install" not in called or "--extra-index-url https://cpu.example -c requirements.lock -e .[dev]" in called


def test_line_ends_stay_as_they_are():
    names = ["Makefile", ".ci/run", ".ci/smoke", "dvc.lock", "harmonylib/tools/cli.py"]
    ran = subprocess.run(["git", "check-attr", "eol", *names], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip("no git checkout")
    assert ran.stdout.splitlines() == [f"{name}: eol: lf" for name in names]
