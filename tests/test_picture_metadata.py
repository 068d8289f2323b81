"""Picture files in and out: what they carry survives; what cannot be handled is one line."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from harmonylib.core.errors import HarmonyError
from harmonylib.core.picture_metadata import check_output, open_picture, read_region, save_picture, write_picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def scene():
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = orientation, "A camera"
    return tags


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_metadata_survives(tmp_path, scene, suffix):
    scene.save(tmp_path / f"a{suffix}", exif=exif(6), icc_profile=PROFILE, dpi=(300, 300))
    upright = open_picture(tmp_path / f"a{suffix}")
    assert upright.size == scene.size[::-1]  # orientation 6: turned by 90 degrees
    save_picture(upright, tmp_path / f"b{suffix}")
    again = Image.open(tmp_path / f"b{suffix}")
    assert again.size == upright.size and again.info["icc_profile"] == PROFILE
    assert again.getexif().get(0x0112, 1) == 1
    assert suffix == ".tif" or again.getexif()[0x010F] == "A camera"
    if suffix != ".jpg":
        assert np.array_equal(np.asarray(again.convert("RGB")), np.asarray(upright))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"a{suffix}", f"b{suffix}"]


def test_transparency_survives(tmp_path, scene):
    bands = np.dstack([np.asarray(scene), np.tile(np.arange(56, dtype=np.uint8) * 4, (40, 1))])
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        write_picture(Image.fromarray(bands), file, kind)
        assert np.array_equal(np.asarray(open_picture(file, "a")), bands)
    palette = scene.quantize(8)
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_picture(tmp_path / "p.png").mode == "RGBA"
    with pytest.raises(HarmonyError, match="transparency; write .png"):
        save_picture(Image.fromarray(bands), tmp_path / "a.jpg")


@pytest.mark.parametrize(("quality", "subsampling"), [(60, 2), (90, 0)])
def test_jpeg_of_a_jpeg_keeps_its_quantisation(tmp_path, scene, quality, subsampling):
    scene.save(tmp_path / "a.jpg", quality=quality, subsampling=subsampling)
    before = open_picture(tmp_path / "a.jpg")
    save_picture(before, tmp_path / "b.jpg")
    first, second = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "b.jpg")
    assert first.quantization == second.quantization
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < (4 if subsampling else 0.5)
    before.info = {}
    save_picture(before, tmp_path / "c.jpg")
    assert Image.open(tmp_path / "c.jpg").quantization != first.quantization


def test_bit_depths_and_grey(scene):
    wide = Image.fromarray(np.asarray(scene.convert("L"), np.uint16) * 257)
    file = io.BytesIO()
    wide.save(file, "PNG", icc_profile=PROFILE[:16] + b"GRAY" + PROFILE[20:])
    opened = open_picture(file, "a")
    assert opened.mode == "RGB" and "icc_profile" not in opened.info
    assert np.array_equal(np.asarray(opened)[..., 0], np.asarray(scene.convert("L")))


def test_what_is_refused(tmp_path, scene):
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
    with pytest.raises(HarmonyError, match="frames"):
        read_region(tmp_path / "moving.gif")
    with pytest.raises(HarmonyError, match="HxW"):
        read_region(np.zeros((2, 2, 3), np.uint8))
    for path, words in (("whole.png", "--force"), ("a.gif", "kind of file"), (".", "kind of file")):
        with pytest.raises(HarmonyError, match=words):
            check_output(tmp_path / path)
    check_output(tmp_path / "whole.png", force=True)
