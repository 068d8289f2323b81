"""The audit: one kind of damage a test, on a hand-made data set that is otherwise clean."""

import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, read_mask, write_image
from harmonylib.data.audit import audit
from harmonylib.data.layout import write_composite, write_list, write_pair
from harmonylib.tools.cli import app, run

TRAIN, TEST = "HCOCO/composite_images/c1_1_1.png", "HFlickr/composite_images/f2_1_1.png"
COMPOSITE, MASK, REAL = TRAIN, "HCOCO/masks/c1_1.png", "HCOCO/real_images/c1.png"


def picture(seed, size=(48, 64)):
    """Large blocks of colour with some noise."""
    draw = np.random.default_rng(seed)
    blocks = np.kron(draw.integers(30, 220, (6, 8, 3)), np.ones((8, 8, 1))) + draw.normal(0, 3, (48, 64, 3))
    image = Image.fromarray(blocks.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize(size[::-1])) if size != (48, 64) else np.asarray(image)


def disc(size=(48, 64)):
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    return x**2 + y**2 < 0.3


def make(root, suffix=".png"):
    for split, subset, name, seed in (("train", "HCOCO", "c1", 1), ("test", "HFlickr", "f2", 2)):
        real, mask = picture(seed), disc()
        composite = np.where(mask[..., None], (real * 0.6).astype(np.uint8), real)
        pair = write_pair(root, subset, name, 1, real, mask, suffix)
        write_list(root, split, [write_composite(root, subset, pair, 1, composite, suffix)])
    return root


@pytest.fixture
def data(tmp_path):
    return make(tmp_path / "data")


def kinds(root, kind="auto"):
    return sorted({finding.kind for finding in audit(root, kind, workers=1).findings})


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
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


@pytest.mark.skipif("HARMONYLIB_SAMPLE" not in os.environ, reason="HARMONYLIB_SAMPLE names no folder")
def test_genuine_triples_are_clean():
    report = audit(os.environ["HARMONYLIB_SAMPLE"], workers=1)
    assert len(report.manifest) == 2 and not report.findings


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side: int) -> bytes:
    """A small PNG that claims side x side pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


def jpeg(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("part", [COMPOSITE, MASK, REAL])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="zero bytes"),
        pytest.param(b"no picture at all", id="no image"),
        pytest.param(jpeg(picture(1))[:-400], id="truncated"),
        pytest.param(bomb(12_000), id="over the bound"),
        pytest.param(bomb(60_000), id="decompression bomb"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_are_named(data, part, content):
    (data / part).write_bytes(content)
    (finding,) = audit(data, workers=1).findings
    assert finding.kind == "unreadable" and finding.message.startswith(str(data / part)) and ";" in finding.message


@pytest.mark.parametrize(
    "change, word",
    [
        pytest.param(lambda image: image.convert("CMYK"), "CMYK", id="CMYK"),
        pytest.param(lambda image: image.convert("L"), "greyscale", id="greyscale"),
        pytest.param(lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
                     "more than 8 bits", id="16 bit"),
        pytest.param(lambda image: [image.putalpha(128), image][1], "transparent", id="alpha"),
    ],
)  # fmt: skip
def test_odd_pictures_are_read_and_reported(data, change, word):
    image = change(Image.open(data / REAL))
    path = data / REAL
    path.unlink()
    image.save(path.with_suffix(".tif"))
    assert read_image(path.with_suffix(".tif")).shape == (48, 64, 3)
    found = [f for f in audit(data, workers=1).findings if f.kind == "format"]
    assert len(found) == 1 and word in found[0].message and "c1.tif" in found[0].message


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_a_channel_are_reported(data, suffix):
    """Pillow reads such a picture as 8-bit RGB without a word."""
    deep = read_image(data / REAL)[..., ::-1].astype(np.uint16) * 257
    (data / REAL).unlink()
    cv2.imwrite(str((data / REAL).with_suffix(suffix)), deep)
    (finding,) = audit(data, workers=1).findings
    assert finding.kind == "format" and "more than 8 bits" in finding.message


@pytest.mark.parametrize("part, kind", [(REAL, "format"), (MASK, "mask")])
def test_exif_rotation_is_obeyed_and_reported(data, part, kind):
    """The pixels lie on their side and the tag sets them upright: arrays are as before."""
    before = read_image(data / part)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.rot90(before)).save(data / part, exif=exif)
    np.testing.assert_array_equal(read_image(data / part), before)
    assert kinds(data) == [kind]


@pytest.mark.parametrize("top, found", [(1, []), (2, ["faint mask"]), (100, ["faint mask"]), (254, [])])
def test_masks_with_other_levels(data, top, found):
    Image.fromarray(disc().astype(np.uint8) * np.uint8(top)).save(data / MASK)
    assert kinds(data) == found and read_mask(data / MASK).any() == (not found)


def ramp():
    return Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1)))


@pytest.mark.parametrize(
    "image, expected",
    [
        pytest.param(Image.new("L", (64, 48), 255), "full mask", id="full"),
        pytest.param(Image.new("L", (64, 48), 0), "empty mask", id="empty"),
        pytest.param(Image.fromarray(disc()), None, id="PIL mode 1"),
        pytest.param(Image.fromarray(~disc()), "inverted mask", id="inverted"),
        pytest.param(ramp(), "soft mask", id="soft"),
        pytest.param(Image.fromarray(disc((24, 32))), "size", id="size"),
        pytest.param(Image.fromarray(disc()[..., None] * np.uint8([255, 200, 0])), "mask", id="coloured"),
        pytest.param(Image.merge("LA", [Image.new("L", (64, 48), 255), Image.fromarray(disc() * np.uint8(255))]),
                     "mask", id="transparent"),
    ],
)  # fmt: skip
def test_masks(data, image, expected):
    image.save(data / MASK)
    found = kinds(data)
    assert expected in found if expected else not found


def test_masks_saved_as_jpeg_may_ring(data):
    Image.fromarray(disc((480, 640)) * np.uint8(255)).save(data / "HCOCO/masks/c1_1.jpg", quality=80)
    (data / MASK).unlink()
    for part in (COMPOSITE, REAL):
        write_image(data / part, np.asarray(Image.fromarray(read_image(data / part)).resize((640, 480))))
    composite = np.where(disc((480, 640))[..., None], read_image(data / COMPOSITE), read_image(data / REAL))
    write_image(data / COMPOSITE, composite)
    assert kinds(data) == []


def test_inverted_masks_of_plain_photos(tmp_path):
    write_image(tmp_path / "images/a.png", picture(0))
    write_image(tmp_path / "masks/a.png", disc())
    assert kinds(tmp_path) == []
    write_image(tmp_path / "masks/a.png", ~disc())
    assert kinds(tmp_path) == ["inverted mask"]


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


def test_second_partners_and_empty_lists_are_named(data):
    write_image(data / "HCOCO/masks/c1_1.bmp", disc())
    (data / "IHD_test.txt").write_text("\n")
    messages = [finding.message for finding in audit(data, workers=1).findings]
    assert any("a second file beside c1_1" in message for message in messages)
    assert any("the test list is empty" in message for message in messages)


def test_lists_with_windows_ends_and_doubles(data):
    (data / "IHD_train.txt").write_bytes(b"\xef\xbb\xbf" + TRAIN.replace("/", "\\").encode() + b"\r\n\r\n")
    assert kinds(data) == []
    (data / "IHD_train.txt").write_text(
        f"{TRAIN}\n/elsewhere/iHarmony4/{TRAIN}\n{COMPOSITE[:-5]}9.png\n../secret.png\n"
    )
    findings = audit(data, workers=1).findings
    assert sorted(f.kind for f in findings) == ["listed twice", "missing", "missing"]
    assert "line 2" in findings[-1].message and "IHD_train.txt, line 1" in findings[-1].message


def test_a_list_that_is_not_utf8_is_named_though_not_in_use(data):
    (data / "HCOCO/HCOCO_train.txt").write_bytes(b"c\xe9_1_1.png\n")
    with pytest.raises(HarmonyError, match=r"HCOCO_train\.txt: not a UTF-8 text file"):
        audit(data, workers=1)


def test_capital_suffixes(data):
    for part in (MASK, REAL):
        (data / part).rename((data / part).with_suffix(".PNG"))
    assert kinds(data) == []


def test_a_photo_in_both_splits(data):
    """The same file, or a smaller and recompressed copy under another name."""
    write_list(data, "test", [TEST, TRAIN])
    assert kinds(data) == ["listed twice", "train and test"]
    copy = np.asarray(Image.fromarray(picture(1)).resize((56, 42), Image.Resampling.BILINEAR))
    mask = disc((42, 56))
    pair = write_pair(data, "HFlickr", "f3", 1, copy, mask, ".jpg")
    changed = np.where(mask[..., None], copy // 2, copy)
    write_list(data, "test", [TEST, write_composite(data, "HFlickr", pair, 1, changed, ".jpg")])
    (finding,) = audit(data, workers=1).findings
    assert finding.kind == "train and test" and "f3.jpg: looks like " in finding.message
    assert "mirrored" not in finding.message
    pair = write_pair(data, "HFlickr", "f4", 1, copy[:, ::-1], mask, ".jpg")
    write_list(data, "test", [TEST, write_composite(data, "HFlickr", pair, 1, changed[:, ::-1], ".jpg")])
    (finding,) = audit(data, workers=1).findings
    assert finding.kind == "train and test" and finding.message.endswith("mirrored; keep it in one of them")


def test_other_files_are_not_passed_over(data):
    (data / "HCOCO/composite_images/holiday.heic").write_bytes(b"x")
    shutil.copy(data / COMPOSITE, data / "HCOCO/composite_images/c1_1_2.png")
    notes = audit(data, workers=1).notes
    assert len(notes) == 2 and "c1_1_2.png" in notes[0] and "holiday.heic" in notes[1]


def test_symlinks_and_relative_roots(data, tmp_path, monkeypatch):
    os.symlink(data, tmp_path / "link")
    real = data / REAL
    real.rename(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", real)
    monkeypatch.chdir(tmp_path)
    assert kinds("link") == kinds("data/../link") == []
    (tmp_path / "elsewhere.png").unlink()
    assert kinds("data") == ["missing"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_file_names_that_are_no_utf8(tmp_path, capfd):
    write_image(tmp_path / "photos/masks/a.png", disc())
    (tmp_path / "photos/images").mkdir()
    path = os.fsencode(tmp_path / "photos/images") + b"/\xff.png"
    Path(os.fsdecode(path)).write_bytes(b"x")
    write_image(tmp_path / "photos/images/a.png", picture(0))
    files = [str(tmp_path / name) for name in ("report.json", "manifest.csv")]
    arguments = ["check-data", str(tmp_path / "photos"), "--workers", "1", "--json", files[0], "--manifest", files[1]]
    assert run(app, "harmonylib", arguments) == 1
    assert r"\udcff.png: no mask named" in capfd.readouterr().out
    (finding,) = json.loads(Path(files[0]).read_text())["findings"]
    assert os.fsencode(finding["message"]).startswith(path)


def test_the_command(data, tmp_path, capsys):
    out, table = tmp_path / "report.json", tmp_path / "manifest.csv"
    arguments = ["check-data", str(data), "--workers", "1", "--json", str(out), "--manifest", str(table)]
    assert run(app, "harmonylib", arguments) == 0
    assert "nothing wrong" in capsys.readouterr().out and len(table.read_text().splitlines()) == 3
    (data / MASK).write_bytes(b"")
    assert run(app, "harmonylib", arguments) == 1
    printed = capsys.readouterr().out
    assert "unreadable: 1" in printed and str(data / MASK) in printed
    report = json.loads(out.read_text())
    assert report["by_kind"] == {"unreadable": 1} and len(report["findings"]) == 1 and len(report["counts"]) == 2
    assert run(app, "harmonylib", ["check-data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such data folder" in capsys.readouterr().err
