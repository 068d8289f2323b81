"""A fresh clone: README's commands as they stand there, and a wheel used without the clone (`make test-long`)."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmonylib.data.layout import read_triples
from harmonylib.inference import MODELS
from harmonylib.tools.app import examples

ROOT = Path(__file__).parents[2]
CUT_OFF = """import socket
def refused(*words, **options):
    raise OSError("the network is cut off")
socket.getaddrinfo = socket.socket.connect = refused
"""  # of every Python of an environment
FENCES = re.findall(
    r"^(<!-- long -->\n)?```((?!bibtex)\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)


def call(*words, folder, input=None, **variables):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path, "DVC_NO_ANALYTICS": "1"} | {name: str(value) for name, value in variables.items()}
    options = {"input": input, "stdout": subprocess.PIPE if input else None, "text": True}
    return subprocess.run([str(word) for word in words], cwd=folder, env=environment, check=True, **options)


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


def lent(folder) -> Path:
    """An empty environment in `folder`, to which this one lends all packages but harmonylib; its programs' folder."""
    call(sys.executable, "-m", "venv", folder, folder=folder.parent)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_hosted_notebook(clone, tmp_path):
    """The first cell of a notebook, where nothing is installed: it fetches, installs, and what follows it works."""
    notebook = json.loads((ROOT / "notebooks/01_data.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"][:3]
    (tmp_path / "cells.py").write_text("\n".join([*cells, "print(run.profile, os.getcwd())"]), encoding="utf-8")
    python, options = lent(tmp_path / "env") / "python", {"PIP_NO_DEPS": 1, "PIP_NO_BUILD_ISOLATION": 1}
    said = call(python, "cells.py", folder=tmp_path, input=f"{clone}\n", **options).stdout
    assert said.splitlines()[-1] == f"Address of the repository: mini {tmp_path}/harmonization"


def test_wheel(clone, tmp_path):
    """Installed into an empty environment, which this one lends all packages but harmonylib, without the network."""
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        clone,
        folder=clone,
    )
    harmonylib = lent(tmp_path / "env") / "harmonylib"
    call(harmonylib.with_name("pip"), "install", "-q", "--no-deps", next(tmp_path.glob("*.whl")), folder=tmp_path)
    packages = next(tmp_path.glob("env/lib/python*/site-packages"))
    (packages / "sitecustomize.py").write_text(CUT_OFF)
    check = f"import harmonylib; assert harmonylib.__file__.startswith({str(packages)!r}), harmonylib.__file__"
    call(harmonylib.with_name("python"), "-c", check, folder=tmp_path)
    call(harmonylib, "--help", folder=tmp_path)
    home = {"HOME": tmp_path / "home", "HF_HOME": tmp_path / "home"}  # nothing cached
    before, region = (
        Image.open(clone / "examples/composite.jpg"),
        np.asarray(Image.open(clone / "examples/mask.png")) > 127,
    )
    for model in MODELS:
        words = [
            "harmonize",
            clone / "examples/composite.jpg",
            clone / "examples/mask.png",
            "-o",
            f"{model}.png",
            "--model",
            model,
        ]
        call(harmonylib, *words, folder=tmp_path, **home)
        changed = (np.asarray(Image.open(tmp_path / f"{model}.png")) != np.asarray(before)).any(-1)
        assert changed[region].mean() > 0.5 and not changed[~region].any()
    cut = before.convert("RGB")
    cut.putalpha(Image.open(clone / "examples/mask.png"))
    cut.save(tmp_path / "cut.png")
    call(
        harmonylib,
        "compose",
        clone / "examples/composite.jpg",
        "cut.png",
        "-o",
        "laid.png",
        "--harmonize",
        folder=tmp_path,
        **home,
    )
    assert Image.open(tmp_path / "laid.png").size == before.size
    check = (
        "from harmonylib.tools.app import application; print(application('127.0.0.1', [], 'cpu').settings['models'])"
    )
    call(harmonylib.with_name("python"), "-c", check, folder=tmp_path, **home)
    for number, files in enumerate(examples().values()):
        for copy in range(2):
            for part, name in (("picture", "images/{}.jpg"), ("mask", "masks/{}.png")):
                path = tmp_path / "photos" / name.format(f"{number}x{copy}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files[part])
    call(harmonylib, "make-data", "photos", "set", "--size", "64", folder=tmp_path)
    for triple in read_triples(tmp_path / "set", "test"):
        path = tmp_path / "out" / triple.subset / f"{triple.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(triple.composite).save(path)
    call(harmonylib, "evaluate", "out", "set", "--json", "scores.json", folder=tmp_path)
    assert (tmp_path / "scores.json").is_file()
    packaged = {"augmentation/data_card.md", "evaluation/study.html", "tools/app_page/cutout.js", "py.typed"}
    packaged |= {"pretrained/LICENSE", f"pretrained/{MODELS[0]}/README.md"}
    assert all((packages / "harmonylib" / file).is_file() for file in packaged)
