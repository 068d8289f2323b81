"""The audit: one kind of damage a test, on a hand-made data set that is otherwise clean."""

import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from odd import encoded
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, write_image
from harmonylib.data.audit import audit
from harmonylib.data.layout import write_composite, write_list, write_pair
from harmonylib.tools.cli import app, run

COMPOSITE, MASK, REAL = "HCOCO/composite_images/c1_1_1.png", "HCOCO/masks/c1_1.png", "HCOCO/real_images/c1.png"
TEST = "HFlickr/composite_images/f2_1_1.png"


def picture(seed):
    """Large blocks of colour with some noise."""
    draw = np.random.default_rng(seed)
    blocks = np.kron(draw.integers(30, 220, (6, 8, 3)), np.ones((8, 8, 1))) + draw.normal(0, 3, (48, 64, 3))
    return blocks.clip(0, 255).astype(np.uint8)


def disc(size=(48, 64)):
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    return x**2 + y**2 < 0.3


def add(root, subset, name, real, suffix=".png"):
    """A darkened disc on `real`; returns its list line."""
    mask = disc(real.shape[:2])
    pair = write_pair(root, subset, name, 1, real, mask, suffix)
    composite = np.where(mask[..., None], (real * 0.6).astype(np.uint8), real)
    return write_composite(root, subset, pair, 1, composite, suffix)


def make(root, suffix=".png"):
    write_list(root, "train", [add(root, "HCOCO", "c1", picture(1), suffix)])
    write_list(root, "test", [add(root, "HFlickr", "f2", picture(2), suffix)])
    return root


@pytest.fixture
def data(tmp_path):
    return make(tmp_path / "data")


def findings(root):
    return audit(root, workers=1).findings


def kinds(root):
    return sorted({finding.kind for finding in findings(root)})


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".PNG"])
def test_a_clean_set(tmp_path, suffix):
    report = audit(make(tmp_path / "Мои фото 1", suffix), workers=2)
    assert report.kind == "iharmony4" and not report.findings and not report.notes
    assert report.counts.to_dict("records") == [
        {"subset": "HCOCO", "split": "train", "composites": 1, "pairs": 1, "photos": 1, "published": 38545},
        {"subset": "HFlickr", "split": "test", "composites": 1, "pairs": 1, "photos": 1, "published": 828},
    ]
    row = report.manifest.iloc[0]
    assert (row["name"], row["width"], row["height"]) == ("c1_1_1", 64, 48) and len(row["digest"]) == 32
    assert row["foreground_ratio"] == pytest.approx(disc().mean()) and Path(row["real"]).is_file()


def test_the_manifest_measures_the_change(tmp_path):
    real, mask = np.full((64, 64, 3), 100, np.uint8), np.zeros((64, 64), bool)
    mask[:, :16] = True
    pair = write_pair(tmp_path, "HCOCO", "c1", 1, real, mask, ".png")
    changed = np.where(mask[..., None], np.uint8(110), real)
    write_list(tmp_path, "train", [write_composite(tmp_path, "HCOCO", pair, 1, changed, ".png")])
    (row,) = audit(tmp_path, workers=1).manifest.to_dict("records")
    assert row["fmse"] == pytest.approx(100) and row["delta_e"] == pytest.approx(4, abs=0.3)  # L* 42.4 -> 46.4
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / (100 / 4)), abs=0.1)  # the edge is blurred


@pytest.mark.parametrize("part", [COMPOSITE, MASK, REAL])
@pytest.mark.parametrize("content", [b"", encoded(Image.fromarray(picture(1)), "JPEG")[:-400]])
def test_unreadable_files_are_named(data, part, content):
    (data / part).write_bytes(content)
    (finding,) = findings(data)
    assert finding.kind == "unreadable" and finding.message.startswith(str(data / part)) and ";" in finding.message


def sixteen_bits(path):
    """Pillow reads such a picture as 8-bit RGB without a word."""
    cv2.imwrite(str(path), picture(1)[..., ::-1].astype(np.uint16) * 257)


@pytest.mark.parametrize(
    "suffix, write, word",
    [
        (".tif", lambda path: Image.fromarray(picture(1)).convert("CMYK").save(path), "CMYK"),
        (".tif", lambda path: Image.fromarray(picture(1)).convert("L").save(path), "greyscale"),
        (".tif", lambda path: Image.fromarray(picture(1)[..., 0].astype(np.uint16)).save(path), "more than 8 bits"),
        (".tif", sixteen_bits, "more than 8 bits"),
        (".png", sixteen_bits, "more than 8 bits"),
        (".tif", lambda path: Image.fromarray(np.dstack([picture(1), disc()])).save(path), "transparent"),
    ],
)
def test_odd_pictures_are_reported(data, suffix, write, word):
    (data / REAL).unlink()
    write((data / REAL).with_suffix(suffix))
    found = [f.message for f in findings(data) if f.kind == "format"]
    assert len(found) == 1 and word in found[0] and f"c1{suffix}" in found[0]


@pytest.mark.parametrize("part, kind", [(REAL, "format"), (MASK, "mask")])
def test_exif_rotation_is_obeyed_and_reported(data, part, kind):
    """The pixels lie on their side and the tag sets them upright: no other finding."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.rot90(read_image(data / part))).save(data / part, exif=exif)
    assert kinds(data) == [kind]


def grey(array):
    return Image.fromarray(array.astype(np.uint8))


@pytest.mark.parametrize(
    "image, expected",
    [
        pytest.param(grey(disc() + 254), "full mask", id="full"),
        pytest.param(grey(disc() * 0), "empty mask", id="empty"),
        pytest.param(Image.fromarray(disc()), None, id="PIL mode 1"),
        pytest.param(Image.fromarray(~disc()), "inverted mask", id="inverted"),
        pytest.param(grey(np.tile(np.linspace(0, 255, 64), (48, 1))), "soft mask", id="soft"),
        pytest.param(Image.fromarray(disc((24, 32))), "size", id="size"),
        pytest.param(Image.fromarray(disc()[..., None] * np.uint8([255, 200, 0])), "mask", id="coloured"),
        pytest.param(Image.merge("LA", [grey(disc() * 0 + 255), grey(disc() * 255)]), "mask", id="transparent"),
        pytest.param(grey(disc()), None, id="0 and 1"),
        pytest.param(grey(disc() * 2), "faint mask", id="0 and 2"),
        pytest.param(grey(disc() * 100), "faint mask", id="0 and 100"),
        pytest.param(grey(disc() * 254), None, id="0 and 254"),
    ],
)
def test_masks(data, image, expected):
    image.save(data / MASK)
    found = kinds(data)
    assert expected in found if expected else not found


def test_masks_saved_as_jpeg_may_ring(data):
    mask = disc((480, 640))
    real = np.kron(read_image(data / REAL), np.ones((10, 10, 1), np.uint8))
    grey(mask * 255).save(data / "HCOCO/masks/c1_1.jpg", quality=80)
    (data / MASK).unlink()
    write_image(data / REAL, real)
    write_image(data / COMPOSITE, np.where(mask[..., None], real // 2, real))
    assert kinds(data) == []


def test_backgrounds(data):
    """Two levels of noise are what a codec does; four are not. Equal pictures are reported as well."""
    composite, real = read_image(data / COMPOSITE), read_image(data / REAL)
    noise = np.random.default_rng(0).normal(0, 1, real.shape)
    for scale, found in ((2, []), (4, ["background"])):
        write_image(data / COMPOSITE, (composite + scale * noise).clip(0, 255).astype(np.uint8))
        assert kinds(data) == found
    write_image(data / COMPOSITE, real)
    assert kinds(data) == ["unchanged"]


@pytest.mark.parametrize("part", [COMPOSITE, MASK, REAL])
def test_missing_partners_and_what_is_left_over(data, part):
    (data / part).unlink()
    report = audit(data, workers=1)
    assert [f.kind for f in report.findings] == ["missing"] and "c1_1_1.png" in report.findings[0].message
    assert len(report.manifest) == 1 and "2 pictures belong to no example" in report.notes[0]


def test_lines_listed_twice_or_of_nothing(data):
    lines = [COMPOSITE, f"/elsewhere/iHarmony4/{COMPOSITE}", f"{COMPOSITE[:-5]}9.png", "../secret.png"]
    (data / "IHD_train.txt").write_text("\n".join(lines))
    (data / "IHD_test.txt").write_text("\n")
    *missing, empty, twice = findings(data)
    assert "the test list is empty" in empty.message
    assert [f.kind for f in missing] == ["missing", "missing"] and twice.kind == "listed twice"
    assert "line 2" in twice.message and "IHD_train.txt, line 1" in twice.message
    (data / "HCOCO/HCOCO_train.txt").write_bytes(b"c\xe9_1_1.png\n")  # though not in use
    with pytest.raises(HarmonyError, match=r"HCOCO_train\.txt: not a UTF-8 text file"):
        audit(data, workers=1)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_photo_in_both_splits(data, mirrored):
    """The same file, or a smaller and recompressed copy under another name."""
    write_list(data, "test", [TEST, COMPOSITE])
    assert kinds(data) == ["listed twice", "train and test"]
    copy = np.asarray(Image.fromarray(picture(1)).resize((56, 42), Image.Resampling.BILINEAR))
    write_list(data, "test", [TEST, add(data, "HFlickr", "f3", copy[:, ::-1] if mirrored else copy, ".jpg")])
    (finding,) = findings(data)
    assert finding.kind == "train and test" and "f3.jpg: looks like " in finding.message
    assert finding.message.endswith("mirrored; keep it in one of them") == mirrored


def test_other_files_are_not_passed_over(data):
    (data / "HCOCO/composite_images/holiday.heic").write_bytes(b"x")
    shutil.copy(data / COMPOSITE, data / "HCOCO/composite_images/c1_1_2.png")
    notes = audit(data, workers=1).notes
    assert len(notes) == 2 and "c1_1_2.png" in notes[0] and "holiday.heic" in notes[1]


def command(folder, tmp_path):
    """(exit code, what --json wrote, lines of --manifest)."""
    files = [str(tmp_path / name) for name in ("report.json", "manifest.csv")]
    arguments = ["check-data", str(folder), "--workers", "1", "--json", files[0], "--manifest", files[1]]
    code = run(app, "harmonylib", arguments)
    return code, json.loads(Path(files[0]).read_text()), Path(files[1]).read_text().splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_photos_of_inverted_masks_and_names_that_are_no_utf8(tmp_path, capfd):
    write_image(tmp_path / "photos/images/a.png", picture(0))
    for mask, found in ((~disc(), ["inverted mask"]), (disc(), [])):
        write_image(tmp_path / "photos/masks/a.png", mask)
        assert kinds(tmp_path / "photos") == found
    path = os.fsencode(tmp_path / "photos/images") + b"/\xff.png"
    Path(os.fsdecode(path)).write_bytes(b"x")
    code, report, _ = command(tmp_path / "photos", tmp_path)
    assert code == 1 and r"\udcff.png: no mask named" in capfd.readouterr().out
    (finding,) = report["findings"]
    assert os.fsencode(finding["message"]).startswith(path)


def test_the_command(data, tmp_path, capsys):
    code, _, manifest = command(data, tmp_path)
    assert code == 0 and "nothing wrong" in capsys.readouterr().out and len(manifest) == 3
    (data / MASK).write_bytes(b"")
    code, report, _ = command(data, tmp_path)
    printed = capsys.readouterr().out
    assert code == 1 and "unreadable: 1" in printed and str(data / MASK) in printed
    assert report["by_kind"] == {"unreadable": 1} and len(report["findings"]) == 1 and len(report["counts"]) == 2
    assert run(app, "harmonylib", ["check-data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such data folder" in capsys.readouterr().err
