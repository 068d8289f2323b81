"""The report: one offline HTML site made of executed notebooks and of the numbers in reports/metrics/*.json.

Every measured number is read from a metrics file (report.claims has their form) and names it; what is missing is
reported as "not run". Nothing on a page is loaded from the network, and nothing runs.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.json_files import read_json
from harmonylib.evaluation.published import load
from harmonylib.evaluation.statistics import ABSENT, HOLDS, LEVEL, MINIMUM_PHOTOS, NOT_RUN, OPPOSITE, TOO_FEW

from .claims import CLAIMS, CONTRASTIVE, PLUS, from_ablation, measure_claim, measure_evidence, read_evidence
from .tables import TABLES, html_table, rows_of, side_by_side

HEADLINE = {"psnr": "PSNR, dB ↑", "mse": "MSE ↓", "fmse": "fMSE ↓", "ssim": "SSIM ↑", "fssim": "fSSIM ↑"}
COSTS = {"parameters": "Parameters", "gflops_per_image": "GFLOP an image", "size": "Pixels",
         "images_per_second": "Images/s", "peak_megabytes": "Peak memory, MB"}  # fmt: skip
FIGURES = (  # (paper's figure, what ours shows, patterns under reports/figures)
    (PLUS, "2", "How large foregrounds are, per data set", ("human_harmony/cumulative_foreground.png",)),
    (PLUS, "3", "What Harmony-VAE repairs in decoding", ("harmony_vae-harmonize/reconstruction.png",)),
    (PLUS, "3", "Methods side by side on test images", ("evaluation/qualitative.png",)),
    (PLUS, "4", "Methods side by side on the Human Harmony test list", ("evaluation/human_harmony.png",)),
    (CONTRASTIVE, "2", "Patches of both regions, embedded", ("resunet/patches.png", "resunet/embeddings.png")),
    (CONTRASTIVE, "3", "Layout of the preference study, versions in random order", ("evaluation/study.png",)),
    (CONTRASTIVE, "4", "Every method beside the real photo", ("evaluation/qualitative.png",)),
    (CONTRASTIVE, "5 and 6", "Composites without ground truth", ("evaluation/real_composites.png",)),
    (CONTRASTIVE, "7", "What each part of the method changes", ("table_VI/*.png",)),
    (CONTRASTIVE, "8 and 9", "Style modules over training", ("table_style/*.png",)),
    (CONTRASTIVE, "10", "Background features of encoder and decoder", ("resunet/encoder_decoder.png",)),
    ("Ablations", "", "Table 2: training with generated composites and without", ("table_2/*.png",)),
    ("Ablations", "", "Table 4: resolution, Harmony-VAE and refinement", ("table_4/*.png",)),
    ("Ablations", "", "Table 5: initialisation and trained parts of Harmony-VAE", ("table_5/*.png",)),
    ("Ablations", "", "Table IV: resolutions", ("table_IV/*.png",)),
    ("Ablations", "", "Table VII: number of patches", ("table_VII/*.png",)),
    ("Ablations", "", "Readings of the contrastive loss (Eq. 10)", ("table_readings/*.png",)),
    ("Evaluation", "", "Differences image by image, with intervals", ("evaluation/paired.png",)),
    ("Evaluation", "", "The same prediction, raw and with the background pasted", ("evaluation/paste.png",)),
    ("Evaluation", "", "Worst and median images of each model", ("evaluation/failures-*.png",)),
)
PAGES = Environment(loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, trim_blocks=True)


def notebook_html(path) -> tuple[str, Markup]:
    """(title, HTML fragment) of an executed notebook, figures inside and described by the text above them.

    Relative links of the markdown cells lose their target: a page stands on its own.
    """
    import nbformat
    from nbconvert import HTMLExporter

    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such executed notebook; `dvc repro` makes it") from None
    title = describe(notebook, Path(path).stem)
    body, _ = HTMLExporter(template_name="basic", exclude_anchor_links=True).from_notebook_node(notebook)
    body = re.sub(r'(?s)<a href="(?!#|[a-z]+:)[^"]*">(.*?)</a>', r"\1", body)
    return title, Markup(body)


def describe(notebook, title: str) -> str:
    """Give each figure of a notebook the text above it as alternative text; returns its heading, or else `title`."""
    heading, sentence = "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"(?m)^#+ +(.+)$", cell.source)
            title = headings[0] if headings and not heading else title
            heading = headings[-1] if headings else heading
            prose = " ".join(line for line in cell.source.splitlines() if line and not line.startswith(("#", "|", "-")))
            sentence = re.split(r"(?<=[.:?!]) ", prose)[0]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = re.sub(r"[*_`$]", "", f"{heading}: {sentence}".strip(": "))[:240]
                output.metadata["image/png"] = {"alt": f"Figure. {alt}"}
    return title


def _copied(source: Path, folder: Path, site: Path, caption: str) -> dict:
    """A figure in the site: link, size and caption, which is also the alternative text."""
    target = site / "figures" / source.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with Image.open(source) as image:
        width, height = image.size
    return {"link": target.relative_to(site).as_posix(), "width": width, "height": height, "caption": caption}


def _figures(folder: Path, site: Path):
    """(paper, number, caption, figures found) of each entry of FIGURES."""
    for paper, number, caption, patterns in FIGURES:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        captions = [f"{caption} ({path.stem})" if len(found) > 1 else caption for path in found]
        yield paper, number, caption, [_copied(p, folder, site, c) for p, c in zip(found, captions, strict=True)]


def _headline(models: dict) -> Markup:
    rows = pd.DataFrame(rows_of({name: {"all": parts["all"]} for name, parts in models.items()}, HEADLINE))
    return html_table(rows.pivot(index="row", columns="metric", values="text").loc[list(models), list(HEADLINE)]
                      .rename(columns=HEADLINE).rename_axis(index=None, columns=None))  # fmt: skip


def _costs(models: dict) -> Markup:
    texts = {name: {key: f"{cost[key]:,}" for key in COSTS if key in cost} for name, cost in models.items()}
    return html_table(pd.DataFrame(texts).T.rename(columns=COSTS))


def _shortened(value):
    """A metrics file without its long lists, which are only counted."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [f"{len(value)} entries"] if len(value) > 12 else [_shortened(item) for item in value]
    return value


def build_site(notebooks, site="reports/site", metrics="reports/metrics", figures="reports/figures",
               executed="reports/notebooks", complexity="benchmarks/complexity.json",
               evidence="reports/evidence") -> dict:  # fmt: skip
    """Write the site, replacing what is there, and return {"profile", "pages", "claims"}.

    evidence: what `make evidence` left, if it did. complexity: what `python -m benchmarks.complexity` wrote, if it did
    (times differ from run to run: no stage's work). notebooks: names of executed notebooks in `executed`, without
    suffix, in reading order. Equal inputs give equal bytes. Raises HarmonyError for a missing notebook or
    evaluation_details.json.
    """
    from pygments.formatters import HtmlFormatter

    site, figures = Path(site), Path(figures)
    written = {path.stem: read_json(path) for path in sorted(Path(metrics).glob("*.json")) if path.stem != "report"}
    files = {name: from_ablation(file) for name, file in written.items()}
    data = files.get("evaluation_details") or read_json(Path(metrics, "evaluation_details.json"))
    own = data.get("as_published", {}).get("3", {}).get("buckets", {})
    for name, models in files.get("table_3", {}).get("as_published", {}).get("3", {}).get("buckets", {}).items():
        own[name] = own.get(name, {}) | models
    timed = read_json(complexity) if Path(complexity).is_file() else {}
    written |= {"complexity": timed} if timed else {}
    proof = read_evidence(evidence)
    executed = {name: notebook_html(Path(executed, f"{name}.ipynb")) for name in notebooks}
    building = site.with_name(f".{site.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "notebooks").mkdir(parents=True)

    def write(page: str, template: str, title: str, **content) -> None:
        text = PAGES.get_template(template).render(title=title, data=data, minimum=MINIMUM_PHOTOS, **content)
        (building / page).write_text(text, encoding="utf-8")

    code = Markup(HtmlFormatter(style="default").get_style_defs(".highlight"))
    for name, (title, body) in executed.items():
        options = {"body": body, "style": code, "current": "index.html#notebooks", "up": "../"}
        write(f"notebooks/{name}.html", "page.html", title, **options)
    claims, tables = [], []
    for paper, key, published in TABLES:
        printed = load(key)
        claims += [measure_claim(claim, files, printed) | {"evidence": measure_evidence(claim, proof, printed)}
                   for claim in CLAIMS if claim.paper == paper]  # fmt: skip
        for table in published:
            part = side_by_side(table, printed[printed["table"] == table.number], files.get(table.file))
            tables.append(part | {"paper": paper})
    verdicts = (HOLDS, ABSENT, OPPOSITE)
    tally = Counter(dict.fromkeys((*verdicts, TOO_FEW, NOT_RUN), 0) | Counter(c["verdict"] for c in claims))
    tested = sum(claim["evidence"]["verdict"] in verdicts for claim in claims)
    key_figures = {
        "evaluation/qualitative.png": "One test image of each subset: composite (outlined foreground), methods, real",
        "evaluation/bars_psnr.png": f"Mean PSNR of each method with its 95 % interval over {data['photos']} photos",
    }
    paths = {figures / name: caption for name, caption in key_figures.items()}
    contents = {
        "index": {
            "headline": _headline(data["models"]), "tally": tally,
            "notebooks": {name: title for name, (title, _) in executed.items()},
            "figures": [_copied(path, figures, building, c) for path, c in paths.items() if path.is_file()],
            "counted": _costs(data.get("cost", {})), "timed": timed and _costs(timed["models"]),
            "machine": timed.get("machine"),
        },
        "tables": {"tables": tables},
        "figures": {"figures": list(_figures(figures, building))},
        "claims": {
            "claims": claims, "badges": {HOLDS: "holds", ABSENT: "absent", OPPOSITE: "absent"}, "holds": HOLDS,
            "tested": tested, "chance": LEVEL * tested, "run": proof.get("shipped", {}).get("evidence"),
        },
        "metrics": {"files": {name: json.dumps(_shortened(file), indent=1, ensure_ascii=False)
                              for name, file in written.items()}},
    }  # fmt: skip
    for name, content in contents.items():
        title = "Report" if name == "index" else name.capitalize()
        write(f"{name}.html", f"{name}.html", title, current=f"{name}.html", **content)
    shutil.rmtree(site, ignore_errors=True)
    building.rename(site)
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return {"profile": data["profile"], "pages": pages, "claims": claims}
