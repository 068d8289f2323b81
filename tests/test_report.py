"""The report's pages: complete, offline and true to the metrics files; claims and verdicts."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.json_files import read_json, write_json
from harmonylib.evaluation.metrics import buckets, summarise
from harmonylib.evaluation.published import load
from harmonylib.evaluation.statistics import ABSENT, HOLDS, NOT_RUN, OPPOSITE, TOO_FEW
from report.claims import CLAIMS, PLUS, Claim, from_ablation, measure_claim
from report.site import build_site, notebook_html
from report.tables import TABLES, side_by_side

MODELS = ("composite", "diffharmony", "diffharmony++", "contrastive-resunet")
METRICS = ("mse", "psnr", "fmse", "ssim", "fssim")
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def run(tmp_path):
    """A tiny fake run: metrics, one figure and one executed notebook."""
    index = pd.MultiIndex.from_product([MODELS, ["HCOCO", "HFlickr"], list("abc")], names=["model", "subset", "photo"])
    scores = np.random.default_rng(0).uniform(1, 40, (len(index), len(METRICS)))
    table = pd.DataFrame(scores, index, METRICS).reset_index().assign(foreground_ratio=0.1)
    table["name"] = table["photo"] + "_1_1"
    paired = {"diffharmony++ vs diffharmony": {"all": {"n": 6, "photos": 3, "psnr": [1.25, 0.5, 2.0]}}}
    about = {"protocol": "standard", "profile": "fake", "data": "embedded demonstration data", "n": 6, "photos": 3}
    about |= {"models": summarise(table), "paired": paired, "buckets": {"benchmark": buckets(table)}}
    about |= {"counts": {"train": {"HCOCO": 1234}, "test": {"HCOCO": 6}}}
    write_json(
        tmp_path / "metrics/evaluation_details.json",
        about | {"cost": {"contrastive-resunet": {"parameters": 28_370_000}}},
    )
    (tmp_path / "figures/evaluation").mkdir(parents=True)
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "figures/evaluation/qualitative.png")
    shown = new_output("display_data", data={"image/png": PICTURE, "text/plain": "<Figure>"})
    cells = [
        new_markdown_cell("# A *title*\n\nSee [another](05_other.ipynb) and [paper](https://example.org/p)."),
        new_markdown_cell("## Errors\n\nBlack is right. Yellow is wrong."),
        new_code_cell("show()", outputs=[shown]),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    (tmp_path / "executed").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "executed/01_one.ipynb")
    return tmp_path


def build(run, notebooks=("01_one",), complexity="none"):
    return build_site(notebooks, *(run / name for name in ("site", "metrics", "figures", "executed")), complexity)


def read(run, page):
    return (run / "site" / page).read_text(encoding="utf-8")


def problems(site: Path):
    """What is wrong with pages: dead links and anchors, images without a description, scripts, and anything that a
    browser would fetch from elsewhere."""
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.rglob("*.html")}
    for path, page in pages.items():
        yield from (f"{path.name}: script" for _ in page("script"))
        yield from (f"{path.name}: no alt text" for image in page("img") if not image.get("alt"))
        if re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", " ".join(style.text for style in page("style"))):
            yield f"{path.name}: a style sheet from elsewhere"
        for element in page.find_all(lambda tag: tag.get("href") or tag.get("src")):
            target = element.get("href") or element.get("src")
            file, _, anchor = unquote(target).partition("#")
            other = (path.parent / file).resolve() if file else path
            if re.match(r"(?:https?:)?//", target):
                if element.name != "a":
                    yield f"{path.name}: from elsewhere {target}"
            elif not re.match(r"[a-z]+:", target) and not other.is_file():
                yield f"{path.name}: dead link {target}"
            elif other in pages and anchor and not pages[other].find(id=anchor):
                yield f"{path.name}: no anchor {target}"


@pytest.mark.parametrize(
    "html",
    [
        '<a href="gone.html">x</a>',
        '<a href="other.html#gone">x</a>',
        '<img src="other.html">',
        '<link rel="stylesheet" href="https://cdn.example.org/a.css">',
        "<style>@import 'https://cdn.example.org/a.css';</style>",
    ],
)
def test_problems_are_found(tmp_path, html):
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "other.html").write_text('<p id="here"></p><a href="https://example.org">cited</a>')
    assert len(list(problems(tmp_path))) == 1


def test_site_is_complete_offline_and_described(run):
    report = build(run)
    assert report["profile"] == "fake" and list(problems(run / "site")) == []
    names = ("claims.html", "figures.html", "index.html", "metrics.html", "notebooks/01_one.html", "tables.html")
    assert report["pages"] == sorted(names)
    index = read(run, "index.html")
    assert "3 photos" in index and "no verdict is drawn" in index
    assert 'src="figures/evaluation/qualitative.png"' in index and "A *title*" in index
    first = {path.name: path.read_bytes() for path in (run / "site").rglob("*") if path.is_file()}
    write_json(run / "metrics/report.json", {"pages": []})  # its own output is no input
    build(run)
    assert first == {path.name: path.read_bytes() for path in (run / "site").rglob("*") if path.is_file()}
    assert not list(run.glob(".site*"))


def test_our_notebooks_show_nothing_from_elsewhere():
    for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, 4).cells
        text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
        assert not re.search(r"!\[[^]]*\]\(\s*(https?:)?//|<(img|script|link|iframe)\b", text), path.name


def test_missing_inputs_are_one_clear_line_and_keep_the_old_site(run):
    build(run)
    with pytest.raises(HarmonyError, match="02_two.ipynb: no such executed notebook"):
        build(run, ("02_two",))
    (run / "metrics/evaluation_details.json").unlink()
    with pytest.raises(HarmonyError, match=r"evaluation_details\.json: no such file"):
        build(run)
    assert "fake" in read(run, "index.html")


def test_notebook_figures_are_described_and_dead_links_dropped(run):
    title, body = notebook_html(run / "executed/01_one.ipynb")
    assert title == "A *title*"
    assert 'alt="Figure. Errors: Black is right."' in body
    assert "05_other.ipynb" not in body and "another" in body
    assert '<a href="https://example.org/p">paper</a>' in body


def judged(part, **more):
    claim = Claim("It helps", PLUS, "Table 4", "file", ("paired", "a vs b", "all"), **more)
    return measure_claim(claim, {"file": {"profile": "p", "paired": {"a vs b": {"all": part}}}}, load())


@pytest.mark.parametrize(
    ("effect", "photos", "more", "verdict"),
    [
        ([1.0, 0.5, 1.5], 40, {}, HOLDS),
        ([1.0, -0.5, 2.5], 40, {}, ABSENT),
        ([1.0, None, None], 40, {}, ABSENT),
        ([1.0, 0.5, 1.5], 19, {}, TOO_FEW),
        ([0.05, -0.1, 0.15], 40, {"margin": 0.2}, HOLDS),  # equality: the whole interval within the margin
        ([0.05, -0.1, 0.25], 40, {"margin": 0.2}, ABSENT),
        ([-0.3, -0.4, -0.25], 40, {"margin": 0.2}, OPPOSITE),
        ([-0.3, -0.4, -0.15], 40, {"margin": 0.2}, ABSENT),
        ([-1.0, -1.5, -0.5], 40, {}, OPPOSITE),
        (None, 40, {}, NOT_RUN),
    ],
)
def test_verdicts_follow_the_interval(effect, photos, more, verdict):
    assert judged({"n": 80, "photos": photos, "psnr": effect}, **more)["verdict"] == verdict


def test_signs_are_turned_and_nothing_is_judged_without_a_number():
    turned = judged({"n": 80, "photos": 40, "psnr": [-1.0, -1.5, -0.5]}, sign=-1)
    assert (turned["verdict"], turned["effect"], turned["interval"]) == (HOLDS, 1.0, [0.5, 1.5])
    for metrics in ({}, {"file": {"profile": "p"}}):
        result = measure_claim(Claim("It helps", PLUS, "Table 4", "file", ("paired", "a vs b")), metrics, load())
        assert result["verdict"] == NOT_RUN and result["effect"] is None


def test_an_ablation_file_is_read_for_claims_and_tables(run):
    """As ablations/table_VI_losses.ipynb writes it."""
    rows = {"1: L1": {"psnr": 30.5, "interval": {"psnr": [30.0, 31.0]}, "published": {"psnr": 34.56}, "runs": []}}
    rows["2: L1 + Lpixel"] = {"psnr": None, "interval": {"psnr": None}, "status": "0 of 2 seeds finished"}
    difference = {"before": "1: L1", "after": "2: L1 + Lpixel", "metric": "psnr"}
    file = {"profile": "fake", "n": 80, "photos": 40, "rows": rows}
    measured = file | {"differences": [difference | {"improvement": 0.5, "interval": [0.25, 0.75]}]}
    unmeasured = file | {"differences": [difference | {"improvement": None, "interval": [None, None]}]}
    claim = next(c for c in CLAIMS if c.text == "The foreground loss helps")
    result = measure_claim(claim, {"table_VI": from_ablation(measured)}, load())
    assert (result["verdict"], result["effect"], result["interval"], result["n"]) == (HOLDS, 0.5, [0.25, 0.75], 80)
    assert measure_claim(claim, {"table_VI": from_ablation(unmeasured)}, load())["verdict"] == NOT_RUN
    write_json(run / "metrics/table_VI.json", measured)
    assert build(run)["claims"][CLAIMS.index(claim)]["verdict"] == HOLDS
    page = read(run, "tables.html")
    assert "30.50<small>30.00–31.00</small>" in page and "0 of 2 seeds finished" in page
    assert "n = 80 composites of 40 photos" in page and page.count("Ours: not run") == 6


def test_an_ablation_by_subset(run):
    """Table 2: rows hold subsets, differences name theirs."""
    part = {"psnr": 30.5, "interval": {"psnr": [30.0, 31.0]}, "n": 9, "photos": 3}
    difference = {"before": "base", "after": "augmented", "metric": "psnr", "improvement": 1.5, "interval": [1.0, 2.0]}
    file = {
        "profile": "fake",
        "n": 18,
        "photos": 3,
        "rows": {name: {"HFlickr": part} for name in ("base", "augmented")},
    }
    write_json(run / "metrics/table_2.json", file | {"differences": [difference | {"subset": "HFlickr"}]})
    claims = {c["claim"]: (c["effect"], c["verdict"]) for c in build(run)["claims"]}
    assert claims["Augmentation helps small sets: HFlickr"] == (1.5, TOO_FEW)
    assert claims["Augmentation helps small sets: Hday2night"] == (None, NOT_RUN)
    assert "30.50" in read(run, "tables.html").split('id="table-2"')[1].split("</section>")[0]


def test_published_effects_are_the_papers_arithmetic():
    effects = {claim.text: measure_claim(claim, {}, load())["published"] for claim in CLAIMS}
    assert effects["Harmony-VAE improves on the plain autoencoder"] == "+1.99 dB"  # 40.11 - 38.12
    assert effects["Harmony-VAE helps more at low resolution than at high"] == "+1.31 dB"  # 1.99 - 0.68
    assert effects["The contrastive loss helps"] == "+0.49 dB"  # 37.50 - 37.01
    assert next(v for text, v in effects.items() if "peer (HDNet) leads" in text) == "+0.09 dB"  # 41.73 - 41.64
    assert all(effects[c.text] for c in CLAIMS if c.place != "Table 1")


def test_every_claim_of_a_full_run_traces_to_a_file(run):
    report = build(run)
    assert len(report["claims"]) == len(CLAIMS)
    (found,) = (c for c in report["claims"] if c["effect"] is not None)
    assert found["claim"] == "Harmony-VAE improves on the plain autoencoder" and found["verdict"] == TOO_FEW
    assert found["source"] == "evaluation_details.json: paired / diffharmony++ vs diffharmony / all / psnr"
    page = read(run, "claims.html")
    assert "+1.25 dB" in page and 'href="metrics.html#evaluation_details"' in page


def numbers(value):
    """Every number of a metrics file, as the pages write it."""
    if isinstance(value, (dict, list)):
        return set().union(*map(numbers, value.values() if isinstance(value, dict) else value))
    known = isinstance(value, (int, float)) and value == value
    return {f"{value:.2f}", f"{100 * value:.2f}", f"{value / 1e6:.2f}", f"{value:,}"} if known else set()


def test_every_number_of_ours_traces_to_a_metrics_file(run):
    file = run / "complexity.json"
    cost = {"parameters": 123456, "gflops_per_image": 4.5, "size": 96, "images_per_second": 7.75, "peak_megabytes": 81}
    write_json(file, {"machine": "a test", "models": {"diffharmony": cost}})
    votes = {"models": {"ours": {"all": {"votes": 6, "preference_percent": 1e2}}}}
    write_json(run / "metrics/votes.json", votes | {"n": 6, "photos": 2, "participants": 3})
    claims = build(run, complexity=file)["claims"]
    known = set().union(*(numbers(read_json(path)) for path in [*(run / "metrics").glob("*.json"), file]))
    counts = read_json(run / "metrics/evaluation_details.json")["counts"]
    known |= {f"{sum(split.values()):,}" for split in counts.values()}  # Table I's totals
    index, tables = read(run, "index.html"), read(run, "tables.html")
    effects = re.findall(r'data-label="Here"><div>[+−]([\d.]+)', read(run, "claims.html"))
    assert len(effects) == sum(claim["effect"] is not None for claim in claims) > 0 and set(effects) <= known
    cells = re.findall(r'<td><span class="own">(.*?)</td>', tables) + re.findall(r"<td>(.*?)</td>", index)
    found = set(re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(cells)))
    assert len(found) > 100 and found <= known, found - known
    assert "n = 6 votes of 3 participants on 2 images" in tables and "123,456" in index and "7.75" in index


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_in_a_browser(run, browser, width):
    """No page is wider than the window, lacks a picture or asks for anything outside the site."""
    pages = build(run)["pages"]
    page, asked = browser.new_page(viewport={"width": width, "height": 860}), []
    page.on("request", lambda request: asked.append(request.url))
    for name in pages:
        page.goto((run / "site" / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.evaluate("for (const image of document.images) image.loading = 'eager'")  # those below the fold, too
        page.wait_for_function("[...document.images].every(image => image.complete)")
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), name
    page.close()
    assert len(pages) == 6 and all(url.startswith(((run / "site").as_uri(), "data:")) for url in asked)


def test_all_printed_numbers_stand_in_the_tables(run):
    build(run)
    page = read(run, "tables.html")
    assert all(f'id="table-{table.number}"' in page for _, _, tables in TABLES for table in tables)
    assert page.count("Ours: not run") == 7  # 2, 4, 5, IV, V, VI, VII
    assert "1,234" in page and "28.37" in page
    for value in load()["value"]:
        assert any(f">{form}<" in page for form in (f"{value:.2f}", f"{value:,.0f}", f"{value:g}", "NaN"))
    section = page.split('id="table-3"')[1].split("</section>")[0]  # empty buckets are printed
    assert (
        "ours, fake" in section and '<span class="own">0</span>' in section and '<span class="own">6</span>' in section
    )


def test_published_columns_get_what_their_own_protocol_scored(run):
    path = run / "metrics/evaluation_details.json"
    data = json.loads(path.read_text())
    part = {"n": 5, "photos": 3, "psnr": 43.21, "fmse": 7.65, "interval": {}}
    scored = {"protocol": "diffharmony", "models": {name: {"all": part} for name in (*MODELS, "HDNet")}}
    sizes = {model: {"15-100%": part} for model in ("diffharmony++", "HDNet")}
    published = {"1": scored, "3": {"protocol": "diffharmony", "buckets": {"benchmark": sizes}}}
    write_json(path, data | {"scored_at": 256, "external": ["HDNet"], "as_published": published})
    with_human = {"diffharmony++ + Human Harmony": {"15-100%": part | {"psnr": 44.44}}}
    write_json(run / "metrics/table_3.json", {"as_published": {"3": {"buckets": {"benchmark": with_human}}}})
    build(run)
    page = read(run, "tables.html")
    first, third = (page.split(f'id="table-{n}"')[1].split("</section>")[0] for n in "13")
    assert "Protocol: diffharmony, at 256 px" in first and "43.21" in first and "HDNet" in first
    assert "n = 5 composites of 3 photos" in first  # the standard protocol scored 6
    assert "43.21" in third and "HDNet" in third and "44.44" in third and "+ Human Harmony" in third
    assert "43.21" not in page.split('id="table-II"')[1].split("</section>")[0]  # the standard protocol's


def test_our_cells_stand_beside_the_printed_ones():
    table = next(t for _, _, tables in TABLES for t in tables if t.number == "VI")
    printed = load("region_wise_contrastive").query("table == 'VI'")
    part = {"n": 8, "photos": 4, "psnr": 31.234, "mse": None, "fssim": 0.5, "status": "mse: infinite"}
    part["interval"] = {"psnr": [30.0, 32.0], "fssim": [None, None]}
    found = side_by_side(table, printed, {"profile": "mini", "data": "embedded", "models": {"1: L1": {"all": part}}})
    assert found["ours"] == "ours, mini" and found["count"] == "n = 8 composites of 4 photos"
    for text in ("31.23<small>30.00–32.00</small>", "50.00", "mse: infinite", "34.56"):
        assert text in found["grid"]
