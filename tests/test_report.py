import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.json_files import read_json, write_json
from harmonylib.evaluation.metrics import buckets, summarise
from harmonylib.evaluation.published import load
from harmonylib.evaluation.statistics import ABSENT, HOLDS, NOT_RUN, TOO_FEW
from report.claims import CLAIMS, PLUS, Claim, from_ablation, measure_claim
from report.site import build_site, check_site, notebook_html
from report.tables import TABLES, table_html

MODELS = ("composite", "diffharmony", "diffharmony++", "contrastive-resunet")


def a_png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), "teal").save(path)


@pytest.fixture
def run(tmp_path):
    """A tiny fake run: metrics, one figure and one executed notebook."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "subset": subset, "name": f"{photo}_1_1", "photo": photo, "foreground_ratio": 0.1}
        | {m: float(rng.uniform(1, 40)) for m in ("mse", "psnr", "fmse", "ssim", "fssim")}
        for model in MODELS
        for subset in ("HCOCO", "HFlickr")
        for photo in ("a", "b", "c")
    ]
    table = pd.DataFrame(rows)
    paired = {"diffharmony++ vs diffharmony": {"all": {"n": 6, "photos": 3, "psnr": [1.25, 0.5, 2.0]}}}
    write_json(
        tmp_path / "metrics/evaluation_details.json",
        {"protocol": "standard", "profile": "fake", "data": "embedded demonstration data", "n": 6, "photos": 3}
        | {"models": summarise(table), "paired": paired, "buckets": {"benchmark": buckets(table)}}
        | {"counts": {"train": {"HCOCO": 1234}, "test": {"HCOCO": 6}}}
        | {"cost": {"contrastive-resunet": {"parameters": 28_370_000}}},
    )  # fmt: skip
    a_png(tmp_path / "figures/evaluation/qualitative.png")
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    cells = [
        nbformat.v4.new_markdown_cell(
            "# A *title*\n\nSee [another](05_other.ipynb) and [paper](https://example.org/p)."
        ),
        nbformat.v4.new_markdown_cell("## Errors\n\nBlack is right. Yellow is wrong."),
        nbformat.v4.new_code_cell(
            "show()",
            outputs=[nbformat.v4.new_output("display_data", data={"image/png": picture, "text/plain": "<Figure>"})],
        ),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    (tmp_path / "executed").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "executed/01_one.ipynb")
    return tmp_path


def build(run, notebooks=("01_one",)):
    return build_site(notebooks, run / "site", run / "metrics", run / "figures", run / "executed")


def read(run, page):
    return (run / "site" / page).read_text(encoding="utf-8")


def test_site_is_complete_offline_and_described(run):
    report = build(run)
    assert report["profile"] == "fake"
    assert set(report["pages"]) == {
        "index.html", "tables.html", "figures.html", "claims.html", "metrics.html", "notebooks/01_one.html"
    }  # fmt: skip
    assert sorted(p.relative_to(run / "site").as_posix() for p in (run / "site").rglob("*.html")) == report["pages"]
    assert check_site(run / "site") == []
    index = read(run, "index.html")
    assert "profile" in index.lower() and "3 photos" in index and "no verdict is drawn" in index
    assert 'src="figures/evaluation/qualitative.png"' in index and "A *title*" in index
    assert not list(run.glob(".site*"))


def test_building_twice_gives_the_same_bytes(run):
    build(run)
    first = {path.name: path.read_bytes() for path in (run / "site").rglob("*") if path.is_file()}
    write_json(run / "metrics/report.json", {"pages": []})  # its own output is no input
    build(run)
    assert first == {path.name: path.read_bytes() for path in (run / "site").rglob("*") if path.is_file()}


def test_missing_inputs_are_one_clear_line_and_keep_the_old_site(run):
    build(run)
    with pytest.raises(HarmonyError, match="02_two.ipynb: no such executed notebook"):
        build(run, ("02_two",))
    assert check_site(run / "site") == []
    (run / "metrics/evaluation_details.json").unlink()
    with pytest.raises(HarmonyError, match=r"evaluation_details\.json: no such file"):
        build(run)


def test_a_broken_page_is_refused(run):
    notebook = nbformat.read(run / "executed/01_one.ipynb", 4)
    notebook.cells[1].source = '<img src="https://example.org/x.png" alt="x">'
    nbformat.write(notebook, run / "executed/01_one.ipynb")
    with pytest.raises(HarmonyError, match="loaded from the network"):
        build(run)
    assert not (run / "site").exists()


def test_notebook_figures_are_described_and_dead_links_dropped(run):
    title, body = notebook_html(run / "executed/01_one.ipynb")
    assert title == "A *title*"
    assert 'alt="Figure. Errors: Black is right."' in body
    assert "05_other.ipynb" not in body and "another" in body
    assert '<a href="https://example.org/p">paper</a>' in body


@pytest.mark.parametrize(
    "html, problem",
    [
        ('<a href="gone.html">x</a>', "broken link gone.html"),
        ('<a href="#gone">x</a>', "no anchor #gone"),
        ('<a href="other.html#gone">x</a>', "no anchor other.html#gone"),
        ('<img src="other.html">', "without alt text"),
        ('<img alt="" src="other.html">', "without alt text"),
        ('<link rel="stylesheet" href="https://cdn.example.org/a.css">', "loaded from the network"),
        ('<img alt="x" src="//cdn.example.org/a.png">', "loaded from the network"),
        ("<script>1</script>", "script"),
        ("<style>@import 'https://cdn.example.org/a.css';</style>", "style sheet"),
    ],
)
def test_check_site_finds(tmp_path, html, problem):
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "other.html").write_text('<p id="here"></p><a href="https://example.org">cited</a>')
    (found,) = check_site(tmp_path)
    assert problem in found and found.startswith("page.html")


def test_check_site_wants_pages(tmp_path):
    assert len(check_site(tmp_path)) == 1


def a_claim(**more):
    return Claim("It helps", PLUS, "Table 4", "file", ("paired", "a vs b", "all"), **more)


def judged(effect, photos=40, **more):
    metrics = {"file": {"profile": "p", "paired": {"a vs b": {"all": {"n": 80, "photos": photos, "psnr": effect}}}}}
    return measure_claim(a_claim(**more), metrics, load())


def test_verdicts_follow_the_interval():
    assert judged([1.0, 0.5, 1.5])["verdict"] == HOLDS
    assert judged([1.0, -0.5, 2.5])["verdict"] == ABSENT
    assert judged([-1.0, -1.5, -0.5])["verdict"] == ABSENT
    assert judged([1.0, 0.5, 1.5], photos=19)["verdict"] == TOO_FEW
    assert judged([1.0, None, None])["verdict"] == ABSENT
    turned = judged([-1.0, -1.5, -0.5], sign=-1)
    assert (turned["verdict"], turned["effect"], turned["interval"]) == (HOLDS, 1.0, [0.5, 1.5])


def test_claims_of_equality_need_the_whole_interval_within_the_margin():
    assert judged([0.05, -0.1, 0.15], margin=0.2)["verdict"] == HOLDS
    assert judged([0.05, -0.1, 0.25], margin=0.2)["verdict"] == ABSENT
    assert judged([-0.3, -0.4, -0.25], margin=0.2)["verdict"] == ABSENT


def test_no_verdict_without_a_number():
    for metrics in (
        {},
        {"file": {"profile": "p"}},
        {"file": {"profile": "p", "paired": {"a vs b": {"all": {"n": 3}}}}},
    ):
        result = measure_claim(a_claim(), metrics, load())
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
        "rows": {"base": {"HFlickr": part}, "augmented": {"HFlickr": part}},
    }
    write_json(run / "metrics/table_2.json", file | {"differences": [difference | {"subset": "HFlickr"}]})
    claims = {c["claim"]: c for c in build(run)["claims"]}
    assert claims["Augmentation helps small sets: HFlickr"]["effect"] == 1.5
    assert claims["Augmentation helps small sets: HFlickr"]["verdict"] == TOO_FEW
    assert claims["Augmentation helps small sets: Hday2night"]["verdict"] == NOT_RUN
    assert "30.50" in read(run, "tables.html").split('id="table-2"')[1].split("</section>")[0]


def test_published_effects_are_the_papers_arithmetic():
    effects = {claim.text: measure_claim(claim, {}, load())["published"] for claim in CLAIMS}
    assert effects["Harmony-VAE improves on the plain autoencoder"] == "+1.99 dB"  # 40.11 - 38.12
    assert effects["Harmony-VAE helps more at low resolution than at high"] == "+1.31 dB"  # 1.99 - 0.68
    assert effects["The contrastive loss helps"] == "+0.49 dB"  # 37.50 - 37.01
    hdnet = next(value for text, value in effects.items() if "peer (HDNet) leads" in text)
    assert hdnet == "+0.09 dB"  # 41.73 - 41.64
    assert all(effects[c.text] for c in CLAIMS if c.place != "Table 1")


def test_every_claim_of_a_full_run_traces_to_a_file(run):
    report = build(run)
    assert len(report["claims"]) == len(CLAIMS)
    found = [c for c in report["claims"] if c["effect"] is not None]
    assert [c["claim"] for c in found] == ["Harmony-VAE improves on the plain autoencoder"]
    assert found[0]["source"] == "evaluation_details.json: paired / diffharmony++ vs diffharmony / all / psnr"
    assert found[0]["verdict"] == TOO_FEW and found[0]["effect"] == 1.25
    assert "+1.25 dB" in read(run, "claims.html") and 'href="metrics.html#evaluation_details"' in read(
        run, "claims.html"
    )


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
    votes = {
        "n": 6,
        "photos": 2,
        "participants": 3,
        "models": {"ours": {"all": {"votes": 6, "preference_percent": 1e2}}},
    }
    write_json(run / "metrics/votes.json", votes)
    report = build_site(("01_one",), run / "site", run / "metrics", run / "figures", run / "executed", file)
    known = set().union(*(numbers(read_json(path)) for path in [*(run / "metrics").glob("*.json"), file]))
    counts = read_json(run / "metrics/evaluation_details.json")["counts"]
    known |= {f"{sum(split.values()):,}" for split in counts.values()}  # Table I's totals
    index, tables, claims = (read(run, f"{name}.html") for name in ("index", "tables", "claims"))
    cells = re.findall(r'<td class="own">(.*?)</td>', tables) + re.findall(r"<td>(.*?)</td>", index)
    effects = re.findall(r'data-label="Here"><div>[+−]([\d.]+)', claims)
    assert len(effects) == sum(claim["effect"] is not None for claim in report["claims"]) > 0
    assert set(effects) <= known
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
    for _, _, tables in TABLES:
        for table in tables:
            assert f'id="table-{table.number}"' in page
    assert page.count("Ours: not run") == 7  # 2, 4, 5, IV, V, VI, VII
    assert "1,234" in page and "28.37" in page
    for value in load()["value"]:
        assert any(f">{form}<" in page for form in (f"{value:.2f}", f"{value:,.0f}", f"{value:g}", "NaN"))


def test_our_cells_stand_beside_the_printed_ones():
    table = next(t for _, _, tables in TABLES for t in tables if t.number == "VI")
    printed = load("region_wise_contrastive").query("table == 'VI'")
    part = {"n": 8, "photos": 4, "psnr": 31.234, "mse": None, "fssim": 0.5, "status": "mse: infinite"}
    part["interval"] = {"psnr": [30.0, 32.0], "fssim": [None, None]}
    page = table_html(table, printed, {"profile": "mini", "data": "embedded", "models": {"1: L1": {"all": part}}})
    assert "31.23<small>30.00–32.00</small>" in page and "50.00" in page and "mse: infinite" in page
    assert "ours, mini" in page and "n = 8 composites of 4 photos" in page and "34.56" in page


def test_empty_buckets_are_printed(run):
    build(run)
    section = read(run, "tables.html").split('id="table-3"')[1].split("</section>")[0]
    assert "ours, fake" in section and '<td class="own">0</td>' in section and '<td class="own">6</td>' in section
