"""Nothing in the repository loads what could run code: an audit of every call in the modules and notebooks."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("harmonylib", "notebooks", "report", "ablations", "benchmarks")
SOURCES = [
    path for folder in FOLDERS for kind in ("py", "ipynb") for path in sorted((ROOT / folder).rglob(f"*.{kind}"))
]
IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
CALLS = {"eval", "exec", "os.system", "joblib.load", "yaml.load", "pd.read_pickle", "pandas.read_pickle"}


def unsafe(source: str) -> list[str]:
    """What a module's source does that could run the code of others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in names if name.split(".")[0] in IMPORTS or name in CALLS]
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS or (name == "torch.load" and options.get("weights_only") != "True"):
            found.append(name)
        on = [word for word in ("trust_remote_code", "allow_pickle", "shell") if options.get(word, "False") != "False"]
        found += on + [name] * name.endswith(("extractall", "unpack_archive"))
    return found


def source_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return "\n".join(line for cell in cells for line in "".join(cell["source"]).split("\n") if not line.startswith("%"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe(path):
    assert not unsafe(source_of(path))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "torch.load('x')", "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)",
     "from joblib import load", "joblib.load('x')", "eval('1')", "A.from_pretrained('x', trust_remote_code=True)",
     "run('ls', shell=True)", "zipfile.ZipFile('x').extractall()"],
)  # fmt: skip
def test_the_audit_sees(source):
    assert unsafe(source)
