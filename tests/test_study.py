"""The preference study: pages that give nothing away, votes that add up to the published table."""

import base64
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import write_image
from harmonylib.evaluation import study
from harmonylib.evaluation.published import load
from harmonylib.tools import cli

METHODS = ("composite", "ours", "theirs")
COLUMNS = ["participant", "image", "choice", "shown"]


def scenes():
    return {f"scene {i}": {m: np.full((8, 8, 3), 40 * i + k, np.uint8) for k, m in enumerate(METHODS)} for i in (1, 2)}


def run(*arguments):
    return cli.run(cli.app, "harmonylib", [str(argument) for argument in arguments])


def page_data(path):
    return json.loads(re.search(r'(?s)id="study">(.*?)</script>', path.read_text()).group(1))


def test_page_is_blind_offline_and_stable(tmp_path):
    study.write_page(tmp_path / "a.html", scenes())
    study.write_page(tmp_path / "b.html", scenes())
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    assert not re.search(r"https?:|//cdn|src=\"|ours|theirs", text)
    data = page_data(tmp_path / "a.html")
    assert [len(versions) for versions in data["scenes"]] == [3, 3]
    key = json.loads(base64.b64decode(data["key"]))
    assert [(scene, sorted(methods)) for scene, methods in key] == [(name, sorted(METHODS)) for name in scenes()]


def test_a_browser_saves_what_was_chosen(tmp_path, browser):
    study.write_page(tmp_path / "page.html", scenes())
    data = page_data(tmp_path / "page.html")
    key = dict(json.loads(base64.b64decode(data["key"])))
    page, chosen = browser.new_page(), {}
    page.goto((tmp_path / "page.html").as_uri())
    for _ in scenes():
        source = page.locator("#options img").first.get_attribute("src")
        scene, place = next((s, v.index(source)) for s, v in zip(key, data["scenes"], strict=True) if source in v)
        chosen[scene] = key[scene][place]
        page.keyboard.press("1")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "votes.json")
    page.close()
    votes = study.read_votes([tmp_path / "votes.json"])
    assert dict(zip(votes["image"], votes["choice"], strict=True)) == chosen
    assert all(sorted(shown) == sorted(METHODS) for shown in votes["shown"])


def test_from_folders_to_votes(tmp_path, capsys):
    for name, versions in scenes().items():
        for method, image in versions.items():
            write_image(tmp_path / method / f"{name}.png", image)
    folders = [f"{method}={tmp_path / method}" for method in METHODS]
    assert run("study", tmp_path / "page.html", *folders) == 0
    identity = page_data(tmp_path / "page.html")["id"]
    files = []
    for person, choices in {"p": ("ours", "ours"), "q": ("ours", "composite")}.items():
        cast = [{"image": s, "choice": c, "shown": METHODS} for s, c in zip(scenes(), choices, strict=True)]
        files.append(tmp_path / f"{person}.json")
        files[-1].write_text(json.dumps({"study": identity, "participant": person, "votes": cast}))
    assert run("votes", *files, "--json", tmp_path / "votes.json") == 0
    table = json.loads((tmp_path / "votes.json").read_text())
    assert (table["n"], table["participants"], table["photos"]) == (4, 2, 2)
    assert {m: part["all"]["votes"] for m, part in table["models"].items()} == {"ours": 3, "composite": 1, "theirs": 0}
    ours = table["models"]["ours"]["all"]
    # q's second scene is the one lost vote: resamples hold it never, or nothing else
    assert ours["preference_percent"] == 75 and ours["interval"]["preference_percent"] == [0, 100]
    assert table["paired"]["ours vs composite"]["all"]["preference_percent"][0] == 50
    assert "4 votes of 2 participants" in capsys.readouterr().out


def test_the_published_table():
    """28 people x 99 images with the printed votes give the printed preferences."""
    printed = load("region_wise_contrastive").query("table == 'V'").pivot(index="row", columns="metric", values="value")
    choices = np.repeat(printed.index, printed["votes"].astype(int))
    choices = np.random.default_rng(0).permutation(choices)
    rows = pd.DataFrame({"participant": np.arange(28 * 99) // 99, "image": np.arange(28 * 99) % 99, "choice": choices})
    table = study.count_votes(rows.assign(shown=[tuple(printed.index)] * len(rows)))
    assert list(table["models"])[0] == "Ours" and table["photos"] == 99
    for method, row in printed.iterrows():
        part = table["models"][method]["all"]
        assert part["votes"] == row["votes"]
        assert part["preference_percent"] == pytest.approx(row["preference_percent"], abs=0.0051)
        share = part["preference_percent"] / 100
        low, high = part["interval"]["preference_percent"]
        theory = 100 * 3.92 * math.sqrt(share * (1 - share) / len(rows))  # independent votes: never narrower than that
        assert 0.95 * theory < high - low < 2.5 * theory


def test_ties_go_by_name_and_one_vote_has_no_interval():
    rows = pd.DataFrame([("p", "a", "theirs", METHODS), ("p", "b", "ours", METHODS)], columns=COLUMNS)
    assert list(study.count_votes(rows)["models"]) == ["ours", "theirs", "composite"]
    part = study.count_votes(rows[1:])["models"]["ours"]["all"]
    assert part["preference_percent"] == 100 and np.isnan(part["interval"]["preference_percent"]).all()


VOTE = {"image": "a", "choice": "ours", "shown": ["ours", "theirs"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"votes": []}], "not a votes file"),
        ([{"study": "s", "participant": "p", "votes": []}], "without votes"),
        ([{"study": "s", "participant": "p", "votes": [VOTE, VOTE]}], "not a votes file"),
        ([{"study": "s", "participant": "p", "votes": [VOTE | {"choice": "x"}]}], "not a votes file"),
        ([{"study": s, "participant": s, "votes": [VOTE]} for s in "st"], "of another study than"),
        ([{"study": "s", "participant": "p", "votes": [VOTE]}] * 2, "the same participant as in"),
    ],
)
def test_broken_votes_are_one_line(tmp_path, capsys, files, message):
    paths = [tmp_path / f"{i}.json" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_text(json.dumps(data))
    assert run("votes", *paths, "--json", tmp_path / "out.json") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_studies_that_cannot_be_made(tmp_path, capsys):
    for method in METHODS[:2]:
        write_image(tmp_path / method / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_image(tmp_path / "ours/b.png", np.zeros((4, 4, 3), np.uint8))
    page = tmp_path / "page.html"
    both = [f"{method}={tmp_path / method}" for method in METHODS[:2]]
    for arguments, message in (
        (both, "b: in only one of"),
        (both[:1], "two methods at least"),
        ([both[0], both[0]], "each method once"),
        ([str(tmp_path / "ours")], "must be METHOD=FOLDER"),
        ([both[0], "x=/nonexistent"], "no such folder of x's pictures"),
    ):
        assert run("study", page, *arguments) == 1 and message in capsys.readouterr().err
    assert not page.exists()


def test_no_reference_by_hand():
    composite = np.full((20, 20, 3), 100, np.uint8)
    composite[::2] = 120
    mask = np.zeros((20, 20), bool)
    mask[:10] = True
    same = study.no_reference(composite, composite, mask)
    assert (same["background_change"], same["change"], same["clipped"]) == (0, 0, 0)
    assert same["detail"] == pytest.approx(1) and same["gap"] == pytest.approx(0, abs=1e-3)
    brighter = composite.copy()
    brighter[mask] += 30
    moved = study.no_reference(brighter, composite, mask)
    assert moved["detail"] > 0.99 and moved["change"] == pytest.approx(moved["gap"], rel=0.01) and moved["gap"] > 10
    white = study.no_reference(np.full_like(composite, 255), composite, mask)
    assert white["clipped"] == 1 and white["background_change"] == 155 and math.isnan(white["detail"])
    assert math.isnan(study.no_reference(composite, composite, np.ones_like(mask))["gap"])
    with pytest.raises(HarmonyError, match="empty mask"):
        study.no_reference(composite, composite, ~np.ones_like(mask))


def test_composites_of_a_folder_and_of_the_embedded_photos(tmp_path):
    image = np.full((30, 20, 3), 9, np.uint8)
    write_image(tmp_path / "images/x.png", image)
    write_image(tmp_path / "masks/x.png", np.ones((30, 20), bool))
    ((name, composite, mask),) = study.read_composites(tmp_path, 16)
    assert (name, composite.shape, mask.shape, mask.all()) == ("x", (16, 16, 3), (16, 16), True)
    write_image(tmp_path / "masks/x.png", np.zeros((30, 20), bool))
    with pytest.raises(HarmonyError, match=r"x\.png: no foreground"):
        study.read_composites(tmp_path, 16)
    embedded = study.read_composites("harmonylib/data/embedded_masks.json", size=32)
    assert [name for name, _, _ in embedded] == [name for name, _, _ in study.read_composites(size=32)]
    assert len({name for name, _, _ in embedded}) == len(embedded) == 4
    assert all(0 < mask.mean() < 1 and composite.shape == (32, 32, 3) for _, composite, mask in embedded)
