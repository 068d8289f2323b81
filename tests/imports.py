"""Who imports whom, read from the source: modules of the library, of report/ and of ablations/, and notebooks."""

import ast
import json
from functools import cache
from pathlib import Path

import harmonylib

ROOT = Path(__file__).parents[1]
PACKAGES = ("harmonylib", "report", "ablations")


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
EMPTY = {name for name, path in FILES.items() if len(ast.parse(path.read_text(encoding="utf-8")).body) < 2}
MODULES = {name: path for name, path in FILES.items() if name not in EMPTY | {"harmonylib"}}  # without bare packages
PUBLIC = {name: f"harmonylib.{module}" for name, module in harmonylib._PUBLIC.items()}


def notebook_code(path) -> str:
    """The code cells of a notebook as one program."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def imported(source: str, package: str = "") -> set[str]:
    """The modules of ours that a source names: imports anywhere in it, and public names of the library (`hl.score`).

    package: the dotted name that relative imports start from.
    """
    tree, found, library = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            library |= {alias.asname or alias.name for alias in node.names if alias.name == "harmonylib"}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {module, *names}
            found |= {PUBLIC[alias.name] for alias in node.names if module == "harmonylib" and alias.name in PUBLIC}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in library:
            found |= {PUBLIC[node.attr]} if node.attr in PUBLIC else set()
    return found & set(MODULES)


@cache
def graph() -> dict[str, set[str]]:
    """module -> the modules that it imports, at its top or within a function."""
    found = {}
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = imported(path.read_text(encoding="utf-8"), package) - {name}
    return found


def reached(start: set[str]) -> set[str]:
    """`start` and all that it imports, directly or through others."""
    found, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph()[name]
    return found
