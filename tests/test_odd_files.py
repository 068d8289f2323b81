"""Masks read by their meaning or refused by name, deep pixels, and masks in the raw orientation of their photo."""

import io
import struct

import numpy as np
import odd
import pytest
from PIL import Image

from harmonylib.core.decoding import turn_along
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, read_mask, read_pair
from harmonylib.core.picture_metadata import open_picture
from harmonylib.inference import harmonize
from harmonylib.models.pipeline import read_inputs

TRUE = odd.region()
OTHER = np.roll(TRUE, 9, axis=1)
PHOTO = np.asarray(odd.photo())
CUT = np.where(TRUE[..., None], PHOTO, 0)


def grey(on=255, dtype=np.uint8):
    return Image.fromarray(np.where(TRUE, on, 0).astype(dtype))


def palette(colours, values=None):
    image = Image.fromarray(TRUE.astype(np.uint8) if values is None else values).convert("P")
    image.putpalette(colours)
    return image


def white_is_zero(image, bits):
    """An uncompressed TIFF of one channel with PhotometricInterpretation 0."""
    own = [(258, 3, 1, struct.pack("<I", bits)), (262, 3, 1, bytes(4)), (277, 3, 1, struct.pack("<I", 1))]
    data = odd.tiff_with(image=image)
    for tag, kind, count, value in own:
        at = data.index(struct.pack("<HHI", tag, kind, count)) + 8
        data = data[:at] + value + data[at + 4 :]
    return data


WHITE, TIFF = np.where(TRUE, 255, 0).astype(np.uint8), {"kind": "TIFF"}
MASKS = {
    "cut-out": (odd.layers(CUT, TRUE), {}),
    "dark cut-out": (odd.layers(CUT // 3, TRUE), {}),
    "cut-out with its background hidden": (odd.layers(PHOTO, TRUE), {}),
    "cut-out as TIFF": (odd.layers(CUT, TRUE), TIFF),
    "cut-out as WebP": (odd.layers(CUT, TRUE), {"kind": "WEBP", "lossless": True}),
    "grey cut-out": (Image.merge("LA", [Image.new("L", (32, 24), 90), grey()]), {}),
    "white brush": (odd.layers((255, 255, 255), TRUE), {}),
    "black brush": (odd.layers((0, 0, 0), TRUE), {}),
    "red brush": (odd.layers((255, 0, 0), TRUE), {}),
    "white on transparent black": (grey(), {"transparency": 0}),
    "opaque": (odd.layers(np.dstack([WHITE] * 3), WHITE * 0 + 255), {}),
    "equally transparent": (odd.layers(np.dstack([WHITE] * 3), WHITE * 0 + 100), {}),
    "0 and 1": (grey(1), {}),
    "0 and 1 of 16 bits": (grey(1, np.uint16), {}),
    "float 0 and 1": (grey(1, np.float32), TIFF),
    "float 0 and 255": (grey(255, np.float32), TIFF),
    "16 bits": (grey(65535, np.uint16), {}),
    "255 of 16 bits": (grey(255, np.uint16), {}),
    "32 bits": (grey(2**31 - 1, np.int32), TIFF),
    "1 bit": (Image.fromarray(TRUE), {}),
    "group 4": (Image.fromarray(TRUE), TIFF | {"compression": "group4"}),
    "CMYK": (grey().convert("RGB").convert("CMYK"), {"kind": "JPEG", "quality": 95}),
    "palette of greys": (palette([0, 0, 0, 255, 255, 255]), {}),
    "white is zero, 8 bits": (white_is_zero(Image.fromarray(255 - WHITE), 8), {}),
    "white is zero, 16 bits": (white_is_zero(Image.fromarray(65535 - WHITE.astype("<u2") * 257), 16), {}),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_by_their_meaning(tmp_path, name):
    image, options = MASKS[name]
    (tmp_path / "mask").write_bytes(image if isinstance(image, bytes) else odd.encoded(image, **options))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask"), TRUE)
    assert (read_inputs(PHOTO, Image.open(tmp_path / "mask"))[1][0, 0].numpy() == TRUE).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (odd.layers(np.dstack([np.where(OTHER & TRUE, 255, 0)] * 3), TRUE), "alpha and its luminance are masks that"),
        (odd.layers(np.dstack([WHITE] * 3), OTHER), "--mask-from alpha or --mask-from luminance"),
        (odd.layers(np.dstack([255 - WHITE] * 3), TRUE), "--mask-from alpha or --mask-from luminance"),
        (palette([0, 0, 0, 128, 0, 0]), r"indices of a palette \(0, 1\)"),
        (palette([0, 0, 0, 128, 0, 0] + [224, 224, 192] * 254, np.where(OTHER, 255, TRUE).astype(np.uint8)),
         r"\(0, 1, 255; 255 is a void border\)"),
        (Image.fromarray(np.where(OTHER & ~TRUE, 255, TRUE * 15).astype(np.uint8)), r"labels \(0, 15, 255; 255 is a"),
        (Image.fromarray(np.where(TRUE, 1, -1).astype(np.float32)), "run from -1 to 1"),
        (grey(np.nan, np.float32), "run from nan"),
        (Image.merge("LAB", [grey()] * 3), "LAB"),
    ],
)  # fmt: skip
def test_masks_that_could_mean_two_things_are_named(tmp_path, image, words):
    deep = image.mode in ("F", "LAB")
    (tmp_path / "mask").write_bytes(odd.encoded(image, "TIFF" if deep else "PNG"))
    with pytest.raises(HarmonyError, match=f"mask: .*{words}"):
        read_mask(tmp_path / "mask")


def test_mask_from_decides(tmp_path):
    image = odd.layers(np.dstack([WHITE] * 3), OTHER)
    for source, region in (("alpha", OTHER), ("luminance", TRUE)):
        np.testing.assert_array_equal(read_mask(image, mask_from=source), region)
    for source, words in (("alpha", "no transparency"), ("white", "'white' is unknown")):
        with pytest.raises(HarmonyError, match=words):
            read_mask(grey(), mask_from=source)


def test_deep_pixels(tmp_path):
    greys = np.asarray(odd.photo().convert("L"))
    for name, array in (("unit.tif", greys.astype(np.float32) / 255), ("deep.png", greys.astype(np.uint16) * 257)):
        Image.fromarray(array).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], greys)
    Image.fromarray(greys.astype(np.float32) / 100).save(tmp_path / "a.tif")
    with pytest.raises(HarmonyError, match="a.tif: its values run from .* to 2.*float from 0 to 1"):
        read_image(tmp_path / "a.tif")
    deep = greys.astype(np.uint16) * 257
    deep[:4] = 65_535
    data = odd.png_with(odd.chunk(b"tRNS", b"\xff\xff"), image=Image.fromarray(deep))
    image = np.asarray(open_picture(io.BytesIO(data), "a"))
    assert ((image[..., 3] == 0) == (deep == 65_535)).all() and (image[4:, :, 0] == greys[4:]).all()


@pytest.mark.parametrize(("turn", "name"), [(5, "TRANSPOSE"), (6, "ROTATE_270"), (7, "TRANSVERSE"), (8, "ROTATE_90")])
def test_a_raw_mask_is_turned_with_its_photo(tmp_path, turn, name):
    block = odd.exif((0x112, 3, 1, struct.pack("<HH", turn, 0)))
    (tmp_path / "photo.png").write_bytes(odd.png_with(odd.chunk(b"eXIf", block[6:])))
    grey().save(tmp_path / "raw.png")
    upright = np.asarray(Image.fromarray(TRUE).transpose(Image.Transpose[name]))
    image, mask = read_pair(tmp_path / "photo.png", tmp_path / "raw.png")
    np.testing.assert_array_equal(mask, upright)
    after = np.asarray(harmonize(tmp_path / "photo.png", tmp_path / "raw.png", device="cpu"))
    changed = (after != image).any(-1)
    assert changed[upright].any() and not changed[~upright].any()
    assert turn_along(upright, image.shape, turn) is upright  # a mask that is upright already


def test_a_turned_mask_is_never_squashed(tmp_path):
    small = Image.fromarray(TRUE).resize((12, 16)).convert("L")
    with pytest.raises(HarmonyError, match="the mask: is 12x16 but the picture is 32x24; one of them is turned"):
        harmonize(odd.photo(), small, fit_mask=True, device="cpu")
