"""Folders of predictions: averages by hand, and one clear line for everything that does not belong together."""

import json
import os
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harmonylib.core import decoding, images
from harmonylib.core.errors import HarmonyError
from harmonylib.data import layout
from harmonylib.evaluation import folder
from harmonylib.evaluation.folder import score_folder
from harmonylib.evaluation.metrics import PROTOCOLS
from harmonylib.tools import cli

SIDE = 256


@pytest.fixture
def folders(tmp_path):
    """Four composites of two grey photos (100) with a quarter of foreground; predictions are off by 10, 20, 30, 40 in
    the foreground and by 2 in the background."""
    real = np.full((SIDE, SIDE, 3), 100, np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 4] = True
    lines = []
    for number, (subset, photo) in enumerate([("HCOCO", "b"), ("HCOCO", "a"), ("HFlickr", "b"), ("HFlickr", "a")], 1):
        pair = layout.write_pair(tmp_path / "set", subset, photo, 1, real, mask, ".png")
        lines.append(layout.write_composite(tmp_path / "set", subset, pair, number, real + 1, ".png"))
        prediction = np.where(mask[..., None], real + 10 * number, real + 2)
        layout.write_image(tmp_path / f"ours/{subset}/{photo}_1_{number}.png", prediction)
    layout.write_list(tmp_path / "set", "test", lines)
    return tmp_path


def run(folders, *more):
    arguments = [str(folders / "ours"), str(folders / "set"), *map(str, more)]
    return cli.run(cli.app, "harmonylib", ["evaluate", *arguments])


def enlarge(folder):
    """Every picture of a data set at twice the size, hard."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST).save(path)


def test_rows_are_in_list_order_and_right(folders):
    for workers in (1, 2):
        table = score_folder(folders / "ours", folders / "set", workers=workers)
        assert list(table["name"]) == ["b_1_1", "a_1_2", "b_1_3", "a_1_4"] and set(table["model"]) == {"ours"}
        assert list(table["fmse"]) == [100, 400, 900, 1600]
        assert list(table["mse"]) == [fmse / 4 + 3 for fmse in (100, 400, 900, 1600)]
        assert (table["bmse"] == 4).all() and (table["foreground_ratio"] == 0.25).all()
    assert (score_folder(folders / "ours", folders / "set", paste=True)["bmse"] == 1).all()  # composite: off by 1
    official = score_folder(folders / "ours", folders / "set", "diffharmony")
    assert (official["bmse"] == 0).all() and "ssim" not in official  # its code has none


def test_each_file_is_decoded_once(folders, monkeypatch):
    """A second composite of a pair, in a row in the list, shares the first one's real and mask."""
    shutil.copy(folders / "set/HCOCO/composite_images/b_1_1.png", folders / "set/HCOCO/composite_images/b_1_9.png")
    shutil.copy(folders / "ours/HCOCO/b_1_1.png", folders / "ours/HCOCO/b_1_9.png")
    listed, opened = folders / "set/IHD_test.txt", []
    listed.write_text("HCOCO/composite_images/b_1_9.png\n" + listed.read_text())
    opens = decoding.open_image
    for module in (folder, images, decoding):
        monkeypatch.setattr(module, "open_image", lambda path, *more: opened.append(path) or opens(path, *more))
    assert list(score_folder(folders / "ours", folders / "set", workers=1, paste=True)["name"])[:2] == [
        "b_1_9",
        "b_1_1",
    ]
    assert len(opened) == len(set(opened)) == 2 * 5 + 2 * 4


def test_protocols_without_similarity_have_a_dash(folders, capsys):
    assert run(folders, "--protocol", "diffharmony", "--json", folders / "a.json") == 0
    found = json.loads((folders / "a.json").read_text())["models"]["ours"]["all"]
    assert "–" in capsys.readouterr().out and "ssim" not in found and "status" not in found


def test_command_writes_averages_and_rows(folders, capsys):
    assert run(folders, "--json", folders / "a.json", "--csv", folders / "a.csv", "--protocol", "iih") == 0
    written = json.loads((folders / "a.json").read_text())
    parts = written["models"]["ours"]
    assert (written["protocol"], written["n"], written["photos"]) == ("iih", 4, 2)
    assert [parts[name]["fmse"] for name in ("all", "HCOCO", "HFlickr")] == [750, 250, 1250]
    assert parts["all"]["interval"]["fmse"] == [500, 1000]  # of photo b alone, and of photo a alone
    assert written["buckets"]["ours"]["15-100%"]["n"] == 4 and written["buckets"]["ours"]["0-5%"]["mse"] is None
    assert len(pd.read_csv(folders / "a.csv")) == 4
    assert "HFlickr" in capsys.readouterr().out


def test_two_models_are_compared_image_by_image(folders, capsys):
    for path in (folders / "ours").rglob("*.png"):  # theirs: 10 off in every foreground, 2 in the background
        with Image.open(path) as image:
            array = np.asarray(image).copy()
        array[:, : SIDE // 4] = 110
        layout.write_image(folders / "theirs" / path.relative_to(folders / "ours"), array)
    assert run(folders, "--against", folders / "theirs", "--json", folders / "a.json", "--csv", folders / "a.csv") == 0
    written = json.loads((folders / "a.json").read_text())
    assert list(written["models"]) == ["ours", "theirs"] and (written["n"], written["photos"]) == (4, 2)
    part = written["paired"]["ours vs theirs"]["all"]
    assert (part["n"], part["photos"], part["fmse"]) == (4, 2, [650, 400, 900])  # photo b: (0 + 800) / 2 and so on
    assert list(written["paired"]["ours vs theirs"]) == ["all", "HCOCO", "HFlickr"]
    assert part["mse"] == [162.5, 100, 225] and part["bmse"] == [0, 0, 0] and "status" not in part
    assert len(pd.read_csv(folders / "a.csv")) == 8 and "ours vs theirs, image by image" in capsys.readouterr().out
    (folders / "other").mkdir()
    shutil.move(folders / "theirs", folders / "other/ours")
    assert run(folders, "--against", folders / "other/ours") == 1
    assert "names tell models apart" in capsys.readouterr().err


def test_small_predictions_are_for_protocols_that_resize(folders):
    enlarge(folders / "set")
    for protocol in ("diffharmony", "saic"):
        table = score_folder(folders / "ours", folders / "set", protocol, workers=1)
        assert table["bmse"].to_list() == pytest.approx([0 if protocol == "diffharmony" else 4] * 4, abs=0.3)
    with pytest.raises(HarmonyError, match=r"\.png.*256x256x3 instead of 512x512x3"):
        score_folder(folders / "ours", folders / "set")
    with pytest.raises(HarmonyError, match="256x256"):
        score_folder(folders / "ours", folders / "set", "hdnet", paste=True)


def test_float_predictions_and_nan(folders):
    path = folders / "ours/HCOCO/b_1_1.png"
    path.unlink()
    values = np.full((SIDE, SIDE, 3), 110.6, np.float32)
    np.save(path.with_suffix(".npy"), values)
    assert score_folder(folders / "ours", folders / "set")["fmse"][0] == 121
    assert score_folder(folders / "ours", folders / "set", "saic")["fmse"][0] == pytest.approx(10.6**2, rel=1e-5)
    np.save(path.with_suffix(".npy"), values * np.nan)
    with pytest.raises(HarmonyError, match=r"b_1_1\.npy.*NaN"):
        score_folder(folders / "ours", folders / "set", workers=2)  # across processes too
    path.with_suffix(".npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(HarmonyError, match=r"b_1_1\.npy: not a readable array"):
        score_folder(folders / "ours", folders / "set")


def grey(path):
    Image.new("L", (SIDE, SIDE)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "ours/HCOCO/b_1_1.png").unlink(), "1 of 4 predictions are missing (HCOCO/b_1_1); make them"),
        (lambda f: shutil.rmtree(f / "ours"), "no such folder of predictions"),
        (lambda f: grey(f / "ours/HCOCO/c_1_1.png"), "belongs to no composite of the list"),
        (lambda f: grey(f / "ours/HCOCO/b_1_1.jpg"), "a second prediction beside b_1_1.jpg"),
        (lambda f: grey(f / "ours/HCOCO/b_1_1.png"), "b_1_1.png: mode L instead of RGB"),
        (lambda f: (f / "ours/HCOCO/b_1_1.png").write_bytes(b"x"), "not a readable image"),
        (lambda f: grey(f / "set/HCOCO/real_images/b.png") or (f / "set/HCOCO/masks/b_1.png").unlink(), "no masks/b_1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folders, capsys, spoil, message):
    spoil(folders)
    assert run(folders, "--json", folders / "a.json", "--csv", folders / "a.csv") == 1
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line and captured.out == ""
    assert not (folders / "a.json").exists() and not (folders / "a.csv").exists()


def test_flat_folders_need_names_that_differ(folders):
    for path in list((folders / "ours").rglob("*.png")):
        path.rename(folders / "ours" / path.name)
    assert len(score_folder(folders / "ours", folders / "set")) == 4
    lines = layout.read_lines(folders / "set/IHD_test.txt")
    shutil.copy(folders / "set" / lines[0], folders / "set" / lines[0].replace("HCOCO", "HFlickr"))
    layout.write_list(folders / "set", "test", [*lines, lines[0].replace("HCOCO", "HFlickr")])
    with pytest.raises(HarmonyError, match="several subsets have a composite of this name"):
        score_folder(folders / "ours", folders / "set")


def test_a_foreground_that_vanishes_is_left_out_and_said(folders):
    speck = np.zeros((SIDE * 2, SIDE * 2), np.uint8)
    speck[0, 0] = 255  # the nearest pixels to the centres of a 256-px grid are the odd ones
    enlarge(folders / "set")
    Image.fromarray(speck).save(folders / "set/HCOCO/masks/b_1.png")
    assert run(folders, "--protocol", "hdnet", "--json", folders / "a.json") == 0
    whole = json.loads((folders / "a.json").read_text())["models"]["ours"]["all"]
    assert whole["fmse"] is not None and "fmse: undefined, left out for 1 of 4 images" in whole["status"]


@pytest.fixture
def sample(tmp_path):
    """Genuine composites where HARMONYLIB_SAMPLE names some, else smooth noise with a soft mask; not 256 px."""
    if folder := os.environ.get("HARMONYLIB_SAMPLE"):
        return layout.read_triples(folder, "train")
    draw, smooth = np.random.default_rng(0), Image.Resampling.BICUBIC
    photo, change = (
        Image.fromarray(draw.integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 300), smooth) for _ in "ab"
    )
    level = Image.fromarray(draw.integers(0, 256, (4, 5), np.uint8)).resize((400, 300), smooth)
    pair = layout.write_pair(tmp_path / "set", "HCOCO", "a", 1, np.array(photo), np.ones((300, 400), bool), ".png")
    level.save(tmp_path / f"set/HCOCO/masks/{pair}.png")
    composite = np.array(Image.composite(Image.blend(photo, change, 0.2), photo, level))
    layout.write_list(
        tmp_path / "set", "train", [layout.write_composite(tmp_path / "set", "HCOCO", pair, 1, composite)]
    )
    return layout.read_triples(tmp_path / "set", "train")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_are_scored_as_the_code_bases_do(tmp_path, sample, protocol):
    """The composites as predictions, by the files and independently of `score`, under every protocol."""
    for triple in sample:
        (tmp_path / "ours" / triple.subset).mkdir(parents=True, exist_ok=True)
        shutil.copy(triple.composite, tmp_path / "ours" / triple.subset)
    table = score_folder(tmp_path / "ours", sample[0].composite.parents[2], protocol, "train", workers=1).set_index(
        "name"
    )
    size, resampling = (256, 256), Image.Resampling.BICUBIC if protocol == "iih" else Image.Resampling.BILINEAR
    for triple in sample:
        row, level = table.loc[triple.name], Image.open(triple.mask).convert("L")
        files = [Image.open(path).convert("RGB") for path in (triple.composite, triple.real)]
        if protocol == "standard":
            a, b, m = (*(np.asarray(image, float) for image in files), (np.asarray(level) > 127).astype(float))
        elif protocol == "saic":
            a, b = (cv2.resize(np.asarray(image), size).astype(float) for image in files)
            m = cv2.resize(np.asarray(level) / 255, size)
        else:
            a, b = (np.asarray(image.resize(size, resampling), float) for image in files)
            m = np.asarray(level.convert("1").resize(size)).astype(float)
        if protocol == "diffharmony":
            a = np.where(m[..., None] > 0, a, b)
        squared = ((a - b) ** 2).sum(-1)
        mse, inside = squared.mean() / 3, (squared * m).sum() / (3 * m.sum())
        peak = {"saic": b.max(), "dovenet": np.ptp(a)}.get(protocol, 255)
        assert row["mse"] == pytest.approx(mse, rel=1e-5)
        assert row["fmse"] == pytest.approx(mse * m.size / m.sum() if protocol == "hdnet" else inside, rel=1e-5)
        assert row["psnr"] == pytest.approx(10 * np.log10(peak**2 / mse), abs=1e-5)
