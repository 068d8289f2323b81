"""dvc.yaml and ablations/dvc.yaml against the notebooks: what these import and which settings they read."""

import ast

import pytest
from imports import MODULES, ROOT, imported, notebook_code, reached
from ruamel.yaml import YAML

FOLDERS = {
    "data": ["data.path"],
    "human_harmony": ["human_harmony.path"],
    "evaluation": ["evaluation.composites[0]", "evaluation.composites[-1]"],
}
MADE = ("data/", "artifacts/", "reports/", "${")  # by other stages, or named by the settings
SECTIONS = set(YAML(typ="safe").load(ROOT / "params.yaml"))


def stages():
    """(notebooks, the dependencies of each, their parameters) of every stage; a `foreach` has several notebooks."""
    for folder in ("notebooks", "ablations"):
        file = ROOT / ("dvc.yaml" if folder == "notebooks" else "ablations/dvc.yaml")
        for name, stage in YAML(typ="safe").load(file)["stages"].items():
            items = list(stage.get("foreach", {"": ""}).values())
            stage = stage.get("do", stage)
            notebook = f"{folder}/{stage['cmd'].split()[0].removeprefix('${run}/')}"
            deps = [[dep.replace("${item}", item) for dep in stage["deps"]] for item in items]
            notebooks = [notebook.replace("${item}", item) for item in items]
            yield pytest.param(notebooks, deps, stage.get("params", []), id=name)


def sources(module: str) -> set[str]:
    """A module's file, and the files beside it that it names: pages, tables, masks."""
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    beside = [p for p in path.parent.rglob("*.*") if p.suffix not in (".py", ".pyc") and p.name in text]
    return {p.relative_to(ROOT).as_posix() for p in (path, *beside)}


class Settings(ast.NodeVisitor):
    """Collects the settings that a program reads, as dotted names; `known` maps its variables to what they hold."""

    def __init__(self, known: dict[str, str]):
        self.known, self.found = dict(known), set()

    def dotted(self, node) -> str | None:
        """As "resunet.steps" of run.resunet.steps, "" of run itself, None of what is no setting."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            above = self.dotted(node.value)
            return None if above is None else f"{above}.{node.attr}".removeprefix(".")
        return None

    def visit_Assign(self, node):
        for target in node.targets:
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
            for name, value in pairs:
                if ast.unparse(value) == "settings()":
                    self.known[name.id] = ""
                elif isinstance(name, ast.Name) and self.dotted(value):
                    self.known[name.id] = self.dotted(value)  # P = run.resunet reads nothing yet
                else:
                    self.visit(value)

    def visit_Call(self, node):
        names = [self.dotted(argument) for argument in node.args]
        if "" in names and ast.unparse(node.func) != "getattr":
            # all of `run`: what the function reads of it, and the section that it is told by name
            texts = {value.value for value in node.args if isinstance(value, ast.Constant)}
            self.found |= texts & SECTIONS | settings_of(ast.unparse(node.func).split(".")[-1], names.index(""))
        for argument in (node.func, *node.args, *node.keywords):
            if self.dotted(argument) != "":
                self.visit(argument)

    def visit_Attribute(self, node):
        if name := self.dotted(node):
            self.found.add(name)
        else:
            self.generic_visit(node)

    def visit_Name(self, node):
        if self.known.get(node.id) and isinstance(node.ctx, ast.Load):
            self.found.add(self.known[node.id])  # a whole section


def settings_of(function: str, place: int) -> set[str]:
    """What a function of ours reads of the settings, which it takes as its argument number `place`."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
                reader = Settings({arguments[place]: ""})
                for statement in node.body:
                    reader.visit(statement)
                return reader.found
    raise AssertionError(f"no function {function}")


def read_settings(notebook: str) -> set[str]:
    reader = Settings({})
    reader.visit(ast.parse(notebook_code(ROOT / notebook)))
    return reader.found


def below(name: str, other: str, mark: str) -> bool:
    return name == other or name.startswith(other + mark)


def test_what_an_edit_reruns():
    """What `dvc status` names after it: the stages that list the file or a folder above it."""
    listed = {stage.id: set().union(*stage.values[1]) for stage in stages()}

    def reruns(file: str) -> set[str]:
        return {stage for stage, deps in listed.items() if any(below(file, dep, "/") for dep in deps)}

    assert not reruns("harmonylib/tools/app.py") | reruns("harmonylib/tools/app_page/app.js")
    training = reruns("harmonylib/training.py")
    assert {"base", "harmony_vae", "diffharmony", "resunet"} <= training <= reruns("harmonylib/data/batches.py")
    assert {"evaluation", "report"} <= reruns("harmonylib/evaluation/statistics.py")


@pytest.mark.parametrize(("notebooks", "deps", "params"), stages())
def test_a_stage_depends_on_what_its_notebook_imports(notebooks, deps, params):
    for notebook, listed in zip(notebooks, deps, strict=True):
        modules = reached(imported(notebook_code(ROOT / notebook)))
        assert not [module for module in modules if module.startswith("harmonylib.tools")]
        needed = {source for module in modules for source in sources(module)}
        code = [dep for dep in listed if dep.split("/")[0] in ("harmonylib", "report") or dep.endswith(".py")]
        assert notebook in listed
        assert not (missing := {s for s in needed if not any(below(s, dep, "/") for dep in code)}), f"add {missing}"
        assert not (idle := {dep for dep in code if not any(below(s, dep, "/") for s in needed)}), f"remove {idle}"
        assert not [dep for dep in listed if not dep.startswith(MADE) and not (ROOT / dep).exists()]


@pytest.mark.parametrize(("notebooks", "deps", "params"), stages())
def test_a_stage_depends_on_the_settings_that_its_notebook_reads(notebooks, deps, params):
    read = set().union(*map(read_settings, notebooks))
    assert not (missing := {r for r in read if not any(below(r, p, ".") for p in params)}), f"add {missing}"
    idle = [p for p in params if not any(below(r, p, ".") or below(p, r, ".") for r in read)]
    assert not idle, f"remove {idle}"
    for section, folders in FOLDERS.items():
        for folder in folders:
            assert (f"${{{folder}}}" in deps[0]) == (section in read), f"${{{folder}}}"
