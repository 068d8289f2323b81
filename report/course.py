"""`python -m report.course [LOG]`: the executed course as Markdown with small pictures in docs/course/, to be read on a
code host before anything runs here.

Reads the executed notebooks of the last run (reports/notebooks/) and, for the minutes, LOG: what `make repro` printed.
docs/course/run.json says what the pages were made of; tests/test_docs.py compares it with dvc.lock. `make docs` is it.
"""

import base64
import hashlib
import io
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.files import atomic_path
from harmonylib.core.json_files import read_json, write_json
from harmonylib.tools.notebooks import read_notebook

from .site import describe

ROOT = Path(__file__).parents[1]
WIDTH, QUALITY, COLOURS = 900, 75, 64  # of pictures: pixels, JPEG's quality, a chart's palette
LINES = 30  # of an output; the rest is counted
TOOK = re.compile(r"-> reports/notebooks/(\S+)\.ipynb \((\d+) s\)")
INDEX = """# The course, executed

Every notebook as one run of the profile `mini` left it, its figures made small. The notebooks of that run took
{minutes} minutes on two CPU cores. Made by `make docs`; edit the notebooks instead.

"""
MOVING = {  # packages whose change may move an out
    "albumentations", "diffusers", "matplotlib", "numpy", "opencv-python-headless", "pandas", "pillow", "scikit-image",
    "scikit-learn", "scipy", "seaborn", "timm", "torch", "torchvision",
}  # fmt: skip
FACTS = re.compile(r"(?m)^- \*\*(Goal|You should know|Run before|Time)\*\*: (.+)\.$")


def picture(png: bytes) -> tuple[str, bytes]:
    """(suffix, file) of a picture made small: JPEG of a photo, PNG of a chart, whichever takes fewer bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    photo, chart = io.BytesIO(), io.BytesIO()
    image.save(photo, "JPEG", quality=QUALITY, optimize=True)
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(chart, "PNG", optimize=True)
    return min((".jpg", photo.getvalue()), (".png", chart.getvalue()), key=lambda kind: len(kind[1]))


def table(html: str) -> str:
    """The tables of an HTML output as code hosts show them: no style, no class, no blank line."""
    found = "\n\n".join(re.findall(r"(?s)<table.*?</table>", html))
    plain = re.sub(r"<(\w+)[^>]*?((?: (?:colspan|rowspan)=\"\d+\")*)[^>]*>", r"<\1\2>", found)
    return re.sub(r"\s*\n\s*(?=<)", "", plain)


def fenced(text: str, language: str = "text") -> str:
    lines = text.rstrip().splitlines()
    more = [f"… and {len(lines) - LINES} lines more"] if language == "text" and len(lines) > LINES else []
    return "\n".join([f"```{language}", *(lines[:LINES] if more else lines), *more, "```"])


def page(notebook, stem: str, folder: Path) -> str:
    """An executed notebook as Markdown; its pictures are written to folder/pictures."""
    describe(notebook, stem)
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!#|[a-z]+:)", "](../../notebooks/", cell.source))
            continue
        parts.append(fenced(cell.source, "python"))
        for count, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                suffix, content = picture(base64.b64decode(data["image/png"]))
                name = f"pictures/{stem}-{number}-{count}{suffix}"
                (folder / name).write_bytes(content)
                parts.append(f"![{output.metadata['image/png']['alt'].replace('[', '(').replace(']', ')')}]({name})")
            elif "<table" in data.get("text/html", ""):
                parts.append(table(data["text/html"]))
            elif text := data.get("text/markdown"):
                parts.append(text)
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(fenced(text))
    return "\n\n".join(part for part in parts if part.strip())


def facts(path) -> dict:
    """What a notebook says about itself in its first cell: title, Goal, You should know, Run before, Time."""
    source = read_notebook(path).cells[0].source
    return {"title": source.splitlines()[0].removeprefix("# "), **dict(FACTS.findall(source))}


def contents(notebooks: str, pages: str) -> str:
    """The course as a table; its arguments: where the links lead, from where the table stands."""
    lines = ["| notebook | see it executed | goal | run before | minutes: run + read |", "|---|---|---|---|---|"]
    run = read_json(ROOT / "docs/course/run.json")["notebooks"]
    for number, path in enumerate(sorted((ROOT / "notebooks").glob("*.ipynb"))):
        about = facts(path)
        seen = {stem.removeprefix(path.stem).lstrip("-") or "page": stem for stem in run if stem.startswith(path.stem)}
        links = ", ".join(f"[{word}]({pages}{stem}.md)" for word, stem in seen.items())
        before, minutes = (
            re.findall(r"(\d+)" + end, about[key]) for key, end in (("Run before", ""), ("Time", " min"))
        )
        before = ["all"] if number > 1 and len(before) == number else before or ["nothing"]
        more = f"{about['Goal']} | {', '.join(before)} | {' + '.join(minutes)}"
        lines.append(f"| [{about['title']}]({notebooks}{path.name}) | {links} | {more} |")
    return "\n".join(lines) + "\n"


def renderer() -> str:
    return hashlib.md5(Path(__file__).read_bytes()).hexdigest()


def packages() -> dict[str, str]:
    """{name: version} of the packages in requirements.lock that decide numbers and figures; DVC does not watch them."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines) if name.lower() in MOVING}


def build(executed: Path, folder: Path, seconds: dict[str, int]) -> dict:
    """Write the pages of every executed notebook below `executed`, replacing `folder`; returns what run.json holds.

    seconds: {name: what its run took}; what is not in it keeps what run.json said. Raises HarmonyError for no notebook.
    """
    paths = sorted(path for path in executed.glob("*.ipynb") if ".failed" not in path.name)
    if not paths:
        raise HarmonyError(f"{executed}: no executed notebook; `make repro` makes them")
    before = read_json(folder / "run.json")["notebooks"] if (folder / "run.json").is_file() else {}
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "pictures").mkdir(parents=True)
    run = {"renderer": renderer(), "packages": packages(), "notebooks": {}}
    for number, path in enumerate(paths):
        took = seconds.get(path.stem, before.get(path.stem, {}).get("seconds"))
        run["notebooks"][path.stem] = {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "seconds": took}
        links = [f"[← {paths[number - 1].stem}]({paths[number - 1].stem}.md)"] if number else []
        links += ["[Contents](README.md)", f"[the notebook](../../notebooks/{path.stem.partition('-')[0]}.ipynb)"]
        links += [f"[{p.stem} →]({p.stem}.md)" for p in paths[number + 1 : number + 2]]
        bar = " · ".join(links)
        text = f"{bar}\n\n{page(read_notebook(path), path.stem, building)}\n\n{bar}\n"
        (building / f"{path.stem}.md").write_text(text, encoding="utf-8")
    write_json(building / "run.json", run)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return run


def main(words: list[str]) -> None:
    log = Path(words[0]).read_text(encoding="utf-8") if words else ""
    folder = ROOT / "docs/course"
    run = build(ROOT / "reports/notebooks", folder, {name: int(took) for name, took in TOOK.findall(log)})
    total = sum(entry["seconds"] or 0 for entry in run["notebooks"].values())
    with atomic_path(folder / "README.md") as temporary:
        text = INDEX.format(minutes=round(total / 60)) + contents("../../notebooks/", "")
        temporary.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*.*"))
    print(f"{folder.relative_to(ROOT)}: {len(run['notebooks'])} notebooks, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (HarmonyError, OSError) as error:
        sys.exit(f"error: {error}")
