"""Picture files in and out: what they carry survives; odd metadata never costs a picture; refusals are one line."""

import io
import struct
import zlib

import numpy as np
import odd
import pytest
from PIL import Image

from harmonylib.core.errors import HarmonyError, HarmonyWarning
from harmonylib.core.images import read_mask
from harmonylib.core.picture_metadata import check_output, open_picture, save_picture, write_picture
from harmonylib.inference import harmonize

PHOTO = np.asarray(odd.photo())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_metadata_survives(tmp_path, suffix):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "A camera"
    odd.photo().save(tmp_path / f"a{suffix}", exif=tags, icc_profile=odd.SRGB, dpi=(300, 300))
    upright = open_picture(tmp_path / f"a{suffix}")
    assert upright.size == odd.photo().size[::-1]  # orientation 6: turned by 90 degrees
    save_picture(upright, tmp_path / f"b{suffix}")
    again = Image.open(tmp_path / f"b{suffix}")
    assert again.size == upright.size and again.info["icc_profile"] == odd.SRGB
    assert again.getexif().get(0x0112, 1) == 1
    assert suffix == ".tif" or again.getexif()[0x010F] == "A camera"
    if suffix != ".jpg":
        assert np.array_equal(np.asarray(again.convert("RGB")), np.asarray(upright))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"a{suffix}", f"b{suffix}"]


def test_transparency_survives(tmp_path):
    bands = np.dstack([PHOTO, np.tile(np.arange(32, dtype=np.uint8) * 4, (24, 1))])
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        write_picture(Image.fromarray(bands), file, kind)
        assert np.array_equal(np.asarray(open_picture(file, "a")), bands)
    odd.photo().quantize(8).save(tmp_path / "p.png", transparency=0)
    assert open_picture(tmp_path / "p.png").mode == "RGBA"
    with pytest.raises(HarmonyError, match="transparency; write .png"):
        save_picture(Image.fromarray(bands), tmp_path / "a.jpg")
    save_picture(odd.photo().convert("RGBA"), tmp_path / "a.jpg")  # nothing to be seen through
    assert Image.open(tmp_path / "a.jpg").mode == "RGB"


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 60, "subsampling": 2},
        {"quality": 90, "subsampling": 0},
        {"qtables": [[5] * 64, [9] * 64, [20] * 64]},
    ],
)
def test_jpeg_of_a_jpeg_keeps_its_quantisation(tmp_path, options):
    odd.photo().save(tmp_path / "a.jpg", **options)
    before = harmonize(
        open_picture(tmp_path / "a.jpg"), odd.region(), strength=0, device="cpu"
    )  # a picture of a picture
    save_picture(before, tmp_path / "b.jpg")
    first, second = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "b.jpg")
    assert first.quantization == second.quantization
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < (
        0.5 if options.get("quality") == 90 else 5
    )
    before.info = {}
    save_picture(before, tmp_path / "c.jpg")
    assert Image.open(tmp_path / "c.jpg").quantization != first.quantization


def test_what_is_refused(tmp_path):
    scene = odd.photo()
    scene.convert("CMYK").save(tmp_path / "cmyk.jpg")
    scene.save(tmp_path / "moving.gif", save_all=True, append_images=[scene.rotate(90)])
    (tmp_path / "text.png").write_text("no picture")
    scene.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    scene.save(tmp_path / "bomb.bmp")
    bomb = bytearray((tmp_path / "bomb.bmp").read_bytes())
    for name, height in (("bomb.bmp", 5_000), ("larger.bmp", 10_000)):
        struct.pack_into("<ii", bomb, 18, 20_000, height)  # the header's width and height
        (tmp_path / name).write_bytes(bomb)
    for name, words in {
        "cmyk.jpg": "CMYK; convert it to RGB",
        "moving.gif": "2 frames; save the one you want",
        "text.png": "not a readable image",
        "cut.png": "not a readable image",
        "bomb.bmp": "20000x5000 is 100 megapixels or more",
        "larger.bmp": "over 100 megapixels",
        "none.png": "no such file",
    }.items():
        with pytest.raises(HarmonyError, match=f"{name}: .*{words}"):
            open_picture(tmp_path / name)
    for mask, words in ((tmp_path / "moving.gif", "frames"), (np.zeros((2, 2, 3), np.uint8), "HxW")):
        with pytest.raises(HarmonyError, match=words):
            read_mask(mask)
    for path, words in (("whole.png", "--force"), ("a.gif", "kind of file"), (".", "kind of file")):
        with pytest.raises(HarmonyError, match=words):
            check_output(tmp_path / path)
    check_output(tmp_path / "whole.png", force=True)


MANY = [odd.chunk(b"zTXt", b"w%d\0\0" % n + zlib.compress(bytes(1_000_000))) for n in range(70)]
GREY_PROFILE = odd.SRGB[:16] + b"GRAY" + odd.SRGB[20:]
ODD = {
    "no EXIF in a JPEG": (odd.jpeg_with(odd.segment(1, b"Exif\0\0no tiff header")), None),
    "no EXIF in a text": (odd.png_with(odd.chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzzzz")), "exif"),
    "a profile twice": (odd.jpeg_with(*[odd.segment(2, b"ICC_PROFILE\0\1\1" + odd.SRGB)] * 2), None),
    "a profile of three bytes": (odd.jpeg_with(odd.segment(2, b"ICC_PROFILE\0\1\1abc")), "colour profile"),
    "half a profile": (odd.jpeg_with(odd.segment(2, b"ICC_PROFILE\0\1\2" + odd.SRGB)), "colour profile"),
    "a grey profile": (odd.png_with(odd.chunk(b"iCCP", b"x\0\0" + zlib.compress(GREY_PROFILE))), "colour profile"),
    "text of 2 MB": (odd.png_with(odd.chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2_000_000)))), "texts"),
    "70 texts of 1 MB": (odd.png_with(*MANY), "texts"),
    "a damaged chunk": (odd.png_with(odd.chunk(b"tIME", b"abc", damage=1)), "details"),
    "resolution 0/0": (odd.tiff_with((282, 5, 1, bytes(4)), (283, 5, 1, bytes(4))), None),
    "a mistyped orientation": (odd.tiff_with((274, 2, 4, b"abc\0")), None),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_metadata_never_costs_a_picture(recwarn, name):
    data, lost = ODD[name]
    image = open_picture(io.BytesIO(data), "a")
    expected = Image.open(io.BytesIO(odd.jpeg_with() if data[:2] == b"\xff\xd8" else odd.png_with())).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    said = [str(warning.message) for warning in recwarn if warning.category is HarmonyWarning]
    assert not lost or (len(said) == 1 and said[0].startswith("a: ") and lost in said[0])
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        write_picture(image, io.BytesIO(), kind)


@pytest.mark.parametrize(
    ("entries", "lost"),
    [
        ([(0x10F, 2, 4, b"abc\0")], False),
        ([(0x11A, 2, 4, b"abcd"), (0x11B, 9, 1, struct.pack("<i", -5))], True),
        ([(0x8769, 4, 1, struct.pack("<I", 99999)), (0x8825, 3, 2, b"\1\0\2\0")], False),
    ],
)
def test_a_turn_is_seen_beside_broken_entries(tmp_path, recwarn, entries, lost):
    block = odd.exif(odd.TURN, *entries)
    for data in (
        odd.png_with(odd.chunk(b"eXIf", block[6:])),
        odd.encoded(odd.photo(), "WEBP", lossless=True, exif=block),
    ):
        image = open_picture(io.BytesIO(data), "a")
        np.testing.assert_array_equal(np.asarray(image), np.rot90(PHOTO, -1))
        save_picture(image, tmp_path / "b.png")
        again = Image.open(tmp_path / "b.png").getexif()
        assert again.get(0x112, 1) == 1 and (again.get(0x10F) == "abc") == (len(entries) == 1)
        assert lost == any("exif" in str(w.message) for w in recwarn if w.category is HarmonyWarning)


def test_what_a_format_cannot_hold_is_said(tmp_path):
    tags = Image.Exif()
    tags[0x10E] = "workflow " * 10_000
    large = open_picture(io.BytesIO(odd.encoded(odd.photo(), exif=tags)), "a")
    for name in ("b.jpg", "b.bmp", "b.tif"):
        with pytest.warns(HarmonyWarning, match=f"{name}: exif cannot be kept"):
            save_picture(large, tmp_path / name)
    save_picture(large, tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").info["exif"] == large.info["exif"]
    for kind, side in (("webp", 16_384), ("jpg", 65_501)):
        with pytest.raises(HarmonyError, match=f"wide.{kind}: {side} pixels, .* holds {side - 1} a side"):
            save_picture(Image.new("RGB", (side, 1)), tmp_path / f"wide.{kind}")
    assert not list(tmp_path.glob("*wide*"))
