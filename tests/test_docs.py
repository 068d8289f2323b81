"""README and docs: links that lead somewhere, pages made of the run that dvc.lock holds, one version everywhere."""

import base64
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from nbformat import writes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from ruamel.yaml import YAML

import harmonylib
from benchmarks import cards
from harmonylib.core.json_files import read_json
from harmonylib.data.embedded_photos import load_photos
from report import course

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("data/*.md"),
         *ROOT.glob("pretrained/*/*.md")]  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = read_json(ROOT / "docs/course/run.json")
yaml = YAML(typ="safe")


def slug(heading: str) -> str:
    """A heading's anchor as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        file, _, anchor = unquote(target).partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))}, target


def locks() -> list[dict]:
    """dvc.lock as it lies here and as it is committed: a run of one's own is not what the pages were made of."""
    ran = subprocess.run(["git", "show", "HEAD:dvc.lock"], cwd=ROOT, capture_output=True, text=True)
    texts = [(ROOT / "dvc.lock").read_text(encoding="utf-8"), *([ran.stdout] if ran.returncode == 0 else [])]
    return [yaml.load(text)["stages"] for text in texts]


def test_the_course_is_that_of_the_run_in_the_lock():
    made = {name: entry["md5"] for name, entry in RUN["notebooks"].items()}
    held = [
        {Path(out["path"]).stem: out["md5"] for stage in lock.values() for out in stage["outs"]
         if out["path"].endswith(".ipynb")}
        for lock in locks()
    ]  # fmt: skip
    assert made in held and RUN["renderer"] == course.renderer(), "run: make docs LOG=what make repro printed"
    assert RUN["packages"] == course.packages(), "packages changed: dvc repro --force, make docs, look at the figures"
    assert sum(path.stat().st_size for path in (ROOT / "docs/course").rglob("*.*")) < 8e6


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/results.md", *ROOT.glob("pretrained/*/README.md")],
                         ids=lambda path: path.relative_to(ROOT).as_posix())  # fmt: skip
def test_figures_are_those_of_the_metrics(path):
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "reports/metrics"], cwd=ROOT).returncode:
        pytest.skip("the metrics here are not those that are committed")
    text = path.read_text(encoding="utf-8")
    assert cards.texts().get(path, text) == text, "run: make docs"


def stages() -> dict[str, tuple[set[str], list[str]]]:
    """notebook number -> (what its stage writes, what it reads), from dvc.yaml; matrices up to their variable."""
    found = {}
    for stage in yaml.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values():
        written = [
            next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"] + stage.get("metrics", [])
        ]
        number = re.search(r"(\d\d)_", stage["cmd"])[1]
        found[number] = [{out.partition("$")[0] for out in written}, stage["deps"]]
    return found


def before(number: str) -> set[str]:
    """The notebooks that must have run before, one after the other."""
    found = set()
    for other, (written, _) in stages().items():
        if other != number and any(dep.startswith(out) for dep in stages()[number][1] for out in written):
            found |= {other} | before(other)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_needs(path):
    about = course.facts(path)
    assert set(about) == {"title", "Goal", "You should know", "Run before", "Time"}
    assert set(re.findall(r"\b\d\d\b", about["Run before"])) == before(path.stem[:2])
    minutes = int(re.match(r"(\d+) min to run", about["Time"])[1])
    seconds = max(entry["seconds"] for name, entry in RUN["notebooks"].items() if name.startswith(path.stem))
    assert seconds / 60 / 2 <= minutes <= 1 + 2 * seconds / 60, f"the recorded run took {seconds} s"


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    newest = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[1]
    cited = yaml.load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert version == harmonylib.__version__ == newest == cited


def test_examples_fit_together():
    files = {path.name: path for path in (ROOT / "examples").glob("*.*")}
    mask = np.asarray(Image.open(files["mask.png"]))
    assert Image.open(files["composite.jpg"]).size == mask.shape[::-1] and set(np.unique(mask)) == {0, 255}
    cutout = Image.open(files["cutout.png"])
    assert cutout.mode == "RGBA" and len(np.unique(np.asarray(cutout)[..., 3])) > 50  # a soft edge
    photos, text = {photo.name: photo for photo in load_photos()}, files["README.md"].read_text(encoding="utf-8")
    for name in ("coffee", "astronaut", "rocket"):
        assert photos[name].credit in text and photos[name].licence in text


def test_a_page_of_an_executed_notebook(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    png = base64.b64encode((tmp_path / "noise.png").read_bytes()).decode()
    html = '<style>x</style><table class="a">\n <tr>\n<th colspan="2" style="b">h</th></tr></table>'
    outputs = [
        new_output("stream", text="\n".join(map(str, range(100)))),
        new_output("display_data", {"image/png": png}),
        new_output("display_data", {"text/html": html, "text/plain": "h"}),
    ]
    cells = [new_markdown_cell("# Title\n\nA figure of noise. See [it](solutions/a.ipynb)."),
             new_code_cell("a = 1", outputs=outputs)]  # fmt: skip
    (tmp_path / "executed").mkdir()
    with pytest.raises(course.HarmonyError, match="no executed notebook"):
        course.build(tmp_path / "executed", tmp_path / "course", {})
    for name in ("00_a", "01_b"):
        (tmp_path / f"executed/{name}.ipynb").write_text(writes(new_notebook(cells=cells)), encoding="utf-8")
    run = course.build(tmp_path / "executed", tmp_path / "course", {"00_a": 7})
    assert [entry["seconds"] for entry in run["notebooks"].values()] == [7, None]
    again = course.build(tmp_path / "executed", tmp_path / "course", {"01_b": 8})
    assert [entry["seconds"] for entry in again["notebooks"].values()] == [7, 8]  # what a log does not say stays
    text = (tmp_path / "course/00_a.md").read_text(encoding="utf-8")
    assert "… and 70 lines more" in text and '<table><tr><th colspan="2">h</th></tr></table>' in text
    assert "](../../notebooks/solutions/a.ipynb)" in text and "[01_b →](01_b.md)" in text
    ((alt, name),) = re.findall(r"!\[(.+)\]\((pictures/.+)\)", text)
    assert alt == "Figure. Title: A figure of noise." and Image.open(tmp_path / "course" / name).width == course.WIDTH
