"""The report: one offline HTML site made of executed notebooks and of the numbers in reports/metrics/*.json.

Every measured number is read from a metrics file (report.claims has their form) and names it; what is missing is
reported as "not run". Nothing on a page is loaded from the network, and nothing runs.
"""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.json_files import read_json
from harmonylib.evaluation.published import load
from harmonylib.evaluation.statistics import ABSENT, HOLDS, NOT_RUN, TOO_FEW

from .claims import CLAIMS, CONTRASTIVE, PLUS, from_ablation, measure_claim
from .tables import TABLES, rows_of, scroll, small, source_link, table_html, text_of

HEADLINE = {"psnr": "PSNR, dB ↑", "mse": "MSE ↓", "fmse": "fMSE ↓", "ssim": "SSIM ↑", "fssim": "fSSIM ↑"}

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
KEY_FIGURES = ("evaluation/qualitative.png", "evaluation/bars_psnr.png")

CLAIMS_INTRO = """<h1>Claims</h1><p>What the papers say, and what this run measured. A positive effect supports the
claim; claims that something <em>stays the same</em> hold where the whole interval lies within the margin named. A
verdict needs a number and at least 20 photos. <em>Here</em> is profile {}: {}.</p>"""
TABLES_INTRO = """<h1>Tables of both papers</h1><p>As printed, and in tinted cells what this run measured. They stand
side by side to show the layout and the order of methods, not to be compared digit by digit: the data here are
<strong>{}</strong>.</p>"""

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _claims_html(claims: list[dict]) -> str:
    styles = {HOLDS: "holds", ABSENT: "absent"}
    names = ("Verdict", "Here", "95 % interval", "n", "Paper", "Where", "Source")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Claim", *names))
    body = ""
    for c in claims:
        unit = {"psnr": " dB", "preference_percent": " points"}.get(c["metric"], "")
        lo, hi = c["interval"]
        file = c["source"].split(".json")[0]
        cells = (
            f'<span class="badge {styles.get(c["verdict"], "")}">{c["verdict"]}</span>{small(c["status"])}',
            "–" if c["effect"] is None else f"{c['effect']:+.2f}{unit}".replace("-", "−"),
            "–" if lo is None else f"{lo:+.2f} to {hi:+.2f}".replace("-", "−"),
            "–" if c["n"] is None else f"{c['n']} {'votes' if unit == ' points' else 'images'}, {c['photos']} photos",
            text_of(c["published"]),
            text_of(c["place"]),
            f"no {file}.json"
            if c["profile"] is None
            else source_link(file) + small(c["profile"] and f"profile {c['profile']}"),
        )
        labelled = zip(names, cells, strict=True)
        body += f'<tr><th scope="row">{text_of(c["claim"])}</th>'
        body += "".join(f'<td data-label="{name}"><div>{cell}</div></td>' for name, cell in labelled) + "</tr>"
    table = f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroll(table, "Claims of the papers")


class _Page(HTMLParser):
    """Links, ids, images without a description and resources that a browser would fetch, of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.problems = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        target = attrs.get("href") or attrs.get("src") or ""
        if tag == "img" and (not attrs.get("alt") or attrs["alt"].startswith("No description")):
            self.problems.append(f"image without alt text: {target[:60]}")
        if tag == "script":
            self.problems.append(f"script: {target[:60]}")
        if re.match(r"(?:https?:)?//", target) and (tag != "a"):
            self.problems.append(f"<{tag}> is loaded from the network: {target[:80]}")
        elif target and not re.match(r"[a-z]+:|//", target):
            self.links.append(target)


def check_site(folder) -> list[str]:
    """What is wrong with the pages under `folder`: broken links and anchors, images without alt text, scripts, and
    anything a browser would fetch from elsewhere. An empty list when all is well."""
    folder = Path(folder).resolve()
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.html"))}
    pages = {path: _Page(text) for path, text in texts.items()}
    problems = [f"{folder}: no pages"] if not pages else []
    for path, page in pages.items():
        name = path.relative_to(folder)
        problems += [f"{name}: {problem}" for problem in page.problems]
        styles = "".join(re.findall(r"(?s)<style.*?</style>", texts[path]))
        if re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", styles):
            problems.append(f"{name}: a style sheet loads from the network")
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = (path.parent / unquote(file)).resolve() if file else path
            if not target.is_file():
                problems.append(f"{name}: broken link {link}")
            elif anchor and target in pages and not {anchor, unquote(anchor)} & pages[target].ids:
                problems.append(f"{name}: no anchor {link}")
    return problems


def notebook_html(path) -> tuple[str, str]:
    """(title, HTML fragment) of an executed notebook, figures inside and described by the text above them.

    Relative links of the markdown cells lose their target: a page stands on its own.
    """
    import nbformat
    from nbconvert import HTMLExporter

    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such executed notebook; `dvc repro` makes it") from None
    title, heading, sentence = Path(path).stem, "", ""
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
    body, _ = HTMLExporter(template_name="basic", exclude_anchor_links=True).from_notebook_node(notebook)
    body = re.sub(r'(?s)<a href="(?!#|[a-z]+:)[^"]*">(.*?)</a>', r"\1", body)
    return title, body


def _figure(source: Path, folder: Path, site: Path, caption: str) -> str:
    """Copy a PNG into the site and return its <figure>; caption is also the alt text."""
    target = site / "figures" / source.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with Image.open(source) as image:
        width, height = image.size
    link = html.escape(target.relative_to(site).as_posix())
    return (f'<figure><a href="{link}"><img src="{link}" width="{width}" height="{height}" loading="lazy" '
            f'alt="{text_of(caption)}"></a><figcaption>{text_of(caption)}</figcaption></figure>')  # fmt: skip


def _figures_page(folder: Path, site: Path) -> str:
    body = "<h1>Figures</h1><p>The papers' figures and what this run has to put beside them.</p>"
    for paper, number, caption, patterns in FIGURES:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        heading = f"<h2>{text_of(paper)}" + (f", Figure {number}" if number else "") + "</h2>"
        body += heading if heading not in body else ""
        shown = [_figure(p, folder, site, f"{caption} ({p.stem})" if len(found) > 1 else caption) for p in found]
        body += "".join(shown) or f"<p>{text_of(caption)}: {NOT_RUN}.</p>"
    return body


def _metrics_page(metrics: dict) -> str:
    def short(value):
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, list) and len(value) > 12:
            return [f"{len(value)} entries"]
        return [short(item) for item in value] if isinstance(value, list) else value

    body = (
        "<h1>Metrics files</h1><p>The numbers of all pages, as the stages wrote them to <code>reports/metrics/</code>."
    )
    body += " Long lists (training histories) are only counted here.</p>"
    for name, data in metrics.items():
        text = html.escape(json.dumps(short(data), indent=1, ensure_ascii=False))
        body += f'<details id="{text_of(name)}"><summary>{text_of(name)}.json</summary><pre>{text}</pre></details>'
    return body


def _headline(data: dict) -> str:
    head = "<tr><th></th>" + "".join(f'<th scope="col">{label}</th>' for label in HEADLINE.values()) + "</tr>"
    cells = {(r["row"], r["metric"]): r["text"] for r in rows_of(data["models"], HEADLINE) if r["subset"] == "all"}
    body = ""
    for model in data["models"]:
        values = "".join(f"<td>{cells[model, metric]}</td>" for metric in HEADLINE)
        body += f'<tr><th scope="row">{text_of(model)}</th>{values}</tr>'
    return scroll(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>", "Test set, averages")


def _cost_html(counted: dict, timed: dict | None) -> str:
    """What the run's models cost, counted; and the shipped ones, timed by the benchmarks in processes of their own."""
    found = _cost_table(counted, "This run's models", "Counted, at the test set's size.", "evaluation_details")
    if timed:
        about = f"The models of <code>pretrained/</code> on {text_of(timed['machine'])}, one image at a time."
        found += _cost_table(timed["models"], "Shipped models, timed", about, "complexity")
    else:
        found += '<p class="soft">Speed and memory: not run.</p>'
    return f'<h2 id="costs">What each model costs</h2>{found}'


def _cost_table(models: dict, title: str, about: str, source: str) -> str:
    columns = {"parameters": "Parameters", "gflops_per_image": "GFLOP an image", "size": "Pixels",
               "images_per_second": "Images/s", "peak_megabytes": "Peak memory, MB"}  # fmt: skip
    columns = {key: label for key, label in columns.items() if any(row.get(key) is not None for row in models.values())}
    head = "<tr><th></th>" + "".join(f'<th scope="col">{label}</th>' for label in columns.values()) + "</tr>"
    body = ""
    for model, row in models.items():
        values = ["–" if row.get(key) is None else f"{row[key]:,}" for key in columns]
        body += f'<tr><th scope="row">{text_of(model)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
    table = scroll(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>", title)
    return f'<h3>{title}</h3>{table}<p class="soft">{about} Source: {source_link(source)}.</p>'


def _index_page(data: dict, claims: list[dict], costs: str, titles: dict, figures: Path, site: Path) -> str:
    tally = {word: sum(c["verdict"] == word for c in claims) for word in (HOLDS, ABSENT, TOO_FEW, NOT_RUN)}
    few = " That is under 20 photos: the numbers show that the chain works, and no verdict is drawn from them."
    few = few if data["photos"] < 20 else ""
    body = f"""<h1>Image harmonization: two papers, one run</h1>
<p>DiffHarmony++ (Harmony-VAE and inverse harmonization) and region-wise contrastive learning, made by one pipeline.
Each page is made from what that pipeline wrote, and each number names its file.</p>
<p class="note">Profile <strong>{text_of(data["profile"])}</strong>, {text_of(data.get("data", ""))}: n = {data["n"]}
test composites of {data["photos"]} photos at {data.get("size")} px. Protocol: {text_of(data["protocol"])}.{few}</p>
<h2>Test set</h2>{_headline(data)}<p class="soft">Averages over images; small: 95 % interval over photos. Source:
{source_link("evaluation_details")}. Beside the printed tables: <a href="tables.html">Tables</a>.</p>
<h2>The papers' claims</h2><p>{"; ".join(f"{n} × {word}" for word, n in tally.items())}.
<a href="claims.html">All claims</a> with effect, interval and n.</p><h2>Key figures</h2>"""
    captions = ("One test image of each subset: composite (foreground outlined), methods, real photo",
                f"Mean PSNR of each method with its 95 % interval over {data['photos']} photos")  # fmt: skip
    for name, caption in zip(KEY_FIGURES, captions, strict=True):
        body += _figure(figures / name, figures, site, caption) if (figures / name).is_file() else ""
    links = ""
    for name, title in titles.items():
        links += (
            f'<li><a href="notebooks/{text_of(name)}.html">{text_of(title)}</a> <small>{text_of(name)}</small></li>'
        )
    return body + costs + f'<h2 id="notebooks">Notebooks</h2><ul>{links}</ul>'


def _page(title: str, body: str, current: str, up: str = "", style: str = "") -> str:
    names = {"index.html": "Overview", "tables.html": "Tables", "figures.html": "Figures", "claims.html": "Claims",
             "index.html#notebooks": "Notebooks", "metrics.html": "Metrics"}  # fmt: skip
    links = ""
    for link, name in names.items():
        links += f'<a href="{up}{link}"' + (' aria-current="page"' if link == current else "") + f">{name}</a>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_of(title)}</title><style>{STYLE}{style}</style></head>
<body><header><nav aria-label="Pages">{links}</nav></header><main>{body}</main>
<footer>Made by harmonylib from executed notebooks and metrics files.</footer></body></html>
"""


def build_site(notebooks, site="reports/site", metrics="reports/metrics", figures="reports/figures",
               executed="reports/notebooks", complexity="benchmarks/complexity.json") -> dict:  # fmt: skip
    """Write the site, replacing what is there, and return {"profile", "pages", "claims"}.

    complexity: what `python -m benchmarks.complexity` wrote, if it did (times differ from run to run: no stage's work).
    notebooks: names of executed notebooks in `executed`, without suffix, in reading order. Equal inputs give equal
    bytes. Raises HarmonyError for a missing notebook or evaluation_details.json, or when a page fails `check_site`.
    """
    from pygments.formatters import HtmlFormatter

    site, figures = Path(site), Path(figures)
    written = {path.stem: read_json(path) for path in sorted(Path(metrics).glob("*.json")) if path.stem != "report"}
    files = {name: from_ablation(file) for name, file in written.items()}
    data = files.get("evaluation_details") or read_json(Path(metrics, "evaluation_details.json"))
    timed = read_json(complexity) if Path(complexity).is_file() else None
    written |= {"complexity": timed} if timed else {}
    building = site.with_name(f".{site.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "notebooks").mkdir(parents=True)

    pages, titles = {}, {}
    for name in notebooks:
        titles[name], body = notebook_html(Path(executed, f"{name}.ipynb"))
        code = HtmlFormatter(style="default").get_style_defs(".highlight")
        pages[f"notebooks/{name}.html"] = _page(titles[name], body, "index.html#notebooks", "../", code)
    label = data.get("data", "")
    claims, claims_body, tables_body = (
        [],
        CLAIMS_INTRO.format(text_of(data["profile"]), text_of(label)),
        TABLES_INTRO.format(text_of(label)),
    )
    for paper, key, tables in TABLES:
        printed = load(key)
        found = [measure_claim(claim, files, printed) for claim in CLAIMS if claim.paper == paper]
        claims += found
        claims_body += f"<h2>{text_of(paper)}</h2>{_claims_html(found)}"
        shown = [table_html(t, printed[printed["table"] == t.number], files.get(t.file), label) for t in tables]
        tables_body += f"<h2>{text_of(paper)}</h2>{''.join(shown)}"
    bodies = {
        "index": _index_page(data, claims, _cost_html(data.get("cost", {}), timed), titles, figures, building),
        "tables": tables_body,
        "figures": _figures_page(figures, building),
        "claims": claims_body,
        "metrics": _metrics_page(written),
    }
    for name, body in bodies.items():
        pages[f"{name}.html"] = _page(name.capitalize() if name != "index" else "Report", body, f"{name}.html")
    for name, text in pages.items():
        (building / name).write_text(text, encoding="utf-8")
    problems = check_site(building)
    if problems:
        raise HarmonyError(
            f"{building}: {len(problems)} problems, the first: {problems[0]}; mend that notebook or page"
        )
    shutil.rmtree(site, ignore_errors=True)
    building.rename(site)
    return {"profile": data["profile"], "pages": sorted(pages), "claims": claims}
