"""A fresh clone: README's commands as they stand there, and a package used without the clone (`make test-long`)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmonylib.data.layout import read_triples
from harmonylib.inference import MODELS

ROOT = Path(__file__).parents[2]
NO_SOCKETS = """import socket
def refused(*words, **options):
    raise OSError("the network is cut off")
socket.getaddrinfo = socket.socket.connect = refused
"""
UNREACHABLE = """import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 5)
except OSError:
    raise SystemExit
raise SystemExit("error: the network is not cut off")
"""
IN_PYTHON = """from pathlib import Path
import harmonylib as hl
from harmonylib.tools.app import application, examples
assert hl.__file__.startswith({packages!r}), hl.__file__
assert list(application("127.0.0.1", [], "cpu").settings["models"]) == {models}
hl.harmonize("examples/composite.jpg", "examples/mask.png").save("python.png")
for name, files in examples().items():  # a folder of photos, for make-data
    for copy in "ab":
        for part, place in (("picture", "images/{{}}.jpg"), ("mask", "masks/{{}}.png")):
            path = Path("photos", place.format(name + copy))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[part])
"""
FENCES = re.findall(
    r"^(<!-- long -->\n)?```((?!bibtex)\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)


def call(*words, folder, input=None, **variables):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path, "DVC_NO_ANALYTICS": "1"} | {name: str(value) for name, value in variables.items()}
    options = {"input": input, "stdout": subprocess.PIPE if input else None, "text": True}
    return subprocess.run([str(word) for word in words], cwd=folder, env=environment, check=True, **options)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    call("git", "clone", "--quiet", "--no-hardlinks", ROOT, folder, folder=ROOT)
    return folder


@pytest.mark.parametrize(("language", "text"), [fence[1:] for fence in FENCES if not fence[0]])
def test_readme(clone, language, text):
    (clone / "harmonized.png").unlink(missing_ok=True)
    shell = [sys.executable, "-c"] if language == "python" else ["bash", "-ec"]
    call(*shell, text, folder=clone, PYTHONPATH=clone, DVC_SITE_CACHE_DIR=clone.parent / "dvc")
    if "harmonized.png" in text:
        assert Image.open(clone / "harmonized.png").size == Image.open(clone / "examples/composite.jpg").size


def test_hosted_notebook(clone, tmp_path):
    """The first cell of a notebook, where nothing of ours is installed (the other packages are lent): it fetches,
    installs, and what follows it works."""
    notebook = json.loads((ROOT / "notebooks/01_data.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"][:3]
    (tmp_path / "cells.py").write_text("\n".join([*cells, "print(run.profile, os.getcwd())"]), encoding="utf-8")
    call(sys.executable, "-m", "venv", "env", folder=tmp_path)
    (next(tmp_path.glob("env/lib/python*/site-packages")) / "lent.pth").write_text(sysconfig.get_path("purelib"))
    options = {"PIP_NO_DEPS": 1, "PIP_NO_BUILD_ISOLATION": 1}
    said = call(tmp_path / "env/bin/python", "cells.py", folder=tmp_path, input=f"{clone}\n", **options).stdout
    assert said.splitlines()[-1] == f"Address of the repository: mini {tmp_path}/harmonization"


def cut_off(packages: Path) -> list[str]:
    """What runs a command without the network: a namespace of its own; or, where none is to be had, nothing, but every
    Python that has these site-packages opens no socket."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which(words[0]) and not subprocess.run([*words, "true"], capture_output=True).returncode:
        return words
    (packages / "sitecustomize.py").write_text(NO_SOCKETS)
    return []


def test_installed_anywhere(clone, tmp_path):
    """`pip install .` into an empty environment, every package from the index; then another folder and no network."""
    call(sys.executable, "-m", "venv", "env", folder=tmp_path)
    call(tmp_path / "env/bin/pip", "install", "-q", "-c", "requirements.lock", ".", folder=clone)
    shutil.copytree(clone / "examples", tmp_path / "examples")
    packages = next(tmp_path.glob("env/lib/python*/site-packages"))
    alone, home = cut_off(packages), {"HOME": tmp_path / "home", "HF_HOME": tmp_path / "home"}  # nothing cached

    def run(program, *words):
        call(*alone, tmp_path / "env/bin" / program, *words, folder=tmp_path, **home)

    with socket.create_server(("127.0.0.1", 0)) as server:
        run("python", "-c", UNREACHABLE.format(port=server.getsockname()[1]))
    run("python", "-c", IN_PYTHON.format(packages=str(packages), models=[*MODELS]))
    before, region = pixels(clone / "examples/composite.jpg"), pixels(clone / "examples/mask.png") > 127
    for model in MODELS:
        words = ["examples/composite.jpg", "examples/mask.png", "-o", f"{model}.png", "--model", model]
        run("harmonylib", "harmonize", *words)
        changed = (pixels(tmp_path / f"{model}.png") != before).any(-1)
        assert changed[region].mean() > 0.5 and not changed[~region].any()
    assert np.array_equal(pixels(tmp_path / f"{MODELS[0]}.png"), pixels(tmp_path / "python.png"))
    run("harmonylib", "compose", "examples/background.jpg", "examples/cutout.png", "-o", "laid.png", "--harmonize")
    assert (pixels(tmp_path / "laid.png") != pixels(clone / "examples/background.jpg")).any()
    run("harmonylib", "make-data", "photos", "set", "--size", "64")
    for triple in read_triples(tmp_path / "set", "test"):
        path = tmp_path / "out" / triple.subset / f"{triple.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(triple.composite).save(path)
    run("harmonylib", "evaluate", "out", "set", "--json", "scores.json")
    assert (tmp_path / "scores.json").is_file()
    packaged = {"augmentation/data_card.md", "evaluation/study.html", "tools/app_page/cutout.js", "py.typed"}
    packaged |= {"pretrained/LICENSE", f"pretrained/{MODELS[0]}/README.md"}
    assert all((packages / "harmonylib" / file).is_file() for file in packaged)
