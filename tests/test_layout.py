import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.data.layout import read_lines, read_triples, write_composite, write_list, write_pair


def arrays(seed=0, height=20):
    draw = np.random.default_rng(seed)
    real = np.kron(draw.integers(0, 256, (height // 5, 6, 3)), np.ones((5, 5, 1))).astype(np.uint8)
    mask = np.zeros((height, 30), bool)
    mask[5:15, 10:20] = True
    return np.where(mask[..., None], 255 - real, real), mask, real


def write(root, subset="HFlickr", photo="f55", composites=("1",), suffix=".png", seed=0):
    """One pair with its composites; returns their list lines."""
    composite, mask, real = arrays(seed)
    pair = write_pair(root, subset, photo, 1, real, mask, suffix)
    return [write_composite(root, subset, pair, variant, composite, suffix) for variant in composites]


@pytest.fixture
def data(tmp_path):
    """A data set with a photo for training and one for testing."""
    write_list(tmp_path, "train", write(tmp_path, composites=("1", "2")))
    write_list(tmp_path, "test", write(tmp_path, "HCOCO", "c7", seed=1))
    return tmp_path


def test_triples_come_back_as_written(data):
    first, second = read_triples(data, "train")
    assert (first.subset, first.name, second.name, first.split) == ("HFlickr", "f55_1_1", "f55_1_2", "train")
    assert first.pair == second.pair == ("HFlickr", "f55_1") and first.photo == "f55"
    assert first.composite == data / "HFlickr/composite_images/f55_1_1.png"
    assert (first.mask, first.real) == (data / "HFlickr/masks/f55_1.png", data / "HFlickr/real_images/f55.png")
    for loaded, written in zip(first.load(), arrays(), strict=True):
        assert loaded.dtype == written.dtype
        np.testing.assert_array_equal(loaded, written)
    np.testing.assert_array_equal(read_triples(data, "test")[0].load()[2], arrays(1)[2])


def test_jpeg_is_close_its_mask_exact_and_names_may_be_of_any_alphabet(tmp_path):
    root = tmp_path / "Мои фото 1"
    write_list(root, "train", write(root, photo="été à", suffix=".jpg"))
    (triple,) = read_triples(root, "train")
    composite, mask, real = triple.load()
    assert triple.photo == "été à" and (mask == arrays()[1]).all()
    assert np.abs(composite.astype(int) - arrays()[0]).mean() < 4 > np.abs(real.astype(int) - arrays()[2]).mean()


def test_subsets_keep_list_order_and_captures_of_one_scene_are_one_photo(tmp_path):
    lines = [write(tmp_path, "Hday2night", f"d90000008-{capture}")[0] for capture in (7, 3)]
    write_list(tmp_path, "train", [lines[0], *write(tmp_path, "HCOCO"), lines[1]])
    triples = read_triples(tmp_path, "train", ["Hday2night"])
    assert [t.name for t in triples] == ["d90000008-7_1_1", "d90000008-3_1_1"]
    assert {t.photo for t in triples} == {"d90000008"} and len({t.pair for t in triples}) == 2
    with pytest.raises(HarmonyError, match="no composites of HAdobe5k"):
        read_triples(tmp_path, "train", ["HAdobe5k"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", ["{}\r\n\r\n  {}  \r\n", "/some/other/disk/iHarmony4/{}"])
def test_lists_as_windows_and_others_write_them(data, text, encoding):
    line = read_lines(data / "IHD_train.txt")[0]
    for written in (line, line.replace("/", "\\")):
        (data / "IHD_train.txt").write_text(text.format(written, written), encoding)
        assert [t.composite for t in read_triples(data, "train")] == [data / line]


def test_a_root_file_says_where_the_pictures_are(data, tmp_path):
    lists = tmp_path / "lists"
    for split in ("train", "test"):
        write_list(lists, split, read_triples(data, split))
    assert (lists / "IHD_train.txt").read_bytes() == (data / "IHD_train.txt").read_bytes()
    with pytest.raises(HarmonyError, match="f55_1_1.png: listed but missing"):
        read_triples(lists, "train")
    (lists / "ROOT").write_text(f"{data}\n")
    assert read_triples(lists, "train") == read_triples(data, "train")


@pytest.mark.parametrize("content", [b"", b"nowhere\n", b"\xff\xfe", b"\xff"])
def test_a_root_file_that_names_no_folder(data, content):
    (data / "ROOT").write_bytes(content)
    with pytest.raises(HarmonyError, match="ROOT: ('(nowhere)?' is no folder|not a UTF-8 text file)"):
        read_triples(data, "train")


def test_partners_may_be_of_another_type_but_there_is_one(data):
    real = data / "HFlickr/real_images/f55.png"
    other = real.rename(real.with_suffix(".JPEG"))
    assert read_triples(data, "train")[0].real == other
    real.write_bytes(other.read_bytes())
    with pytest.raises(HarmonyError, match=r"f55\.png: a second file beside f55\.JPEG"):
        read_triples(data, "train")


@pytest.mark.parametrize(
    "gone, message",
    [
        ("composite_images/f55_1_1.png", r"f55_1_1\.png: listed but missing; add the file or remove the line"),
        ("masks/f55_1.png", r"f55_1_1\.png: no masks/f55_1\.\* for it"),
        ("real_images/f55.png", r"f55_1_1\.png: no real_images/f55\.\* for it"),
    ],
)
def test_a_missing_partner_is_named(data, gone, message):
    (data / "HFlickr" / gone).unlink()
    with pytest.raises(HarmonyError, match=message):
        read_triples(data, "train")


def test_missing_folder_list_and_empty_list(data):
    with pytest.raises(HarmonyError, match="nowhere: no such data folder"):
        read_triples(data / "nowhere", "train")
    (data / "IHD_train.txt").write_text("\r\n\n")
    with pytest.raises(HarmonyError, match="the train list has no composites"):
        read_triples(data, "train")
    (data / "IHD_train.txt").unlink()
    with pytest.raises(HarmonyError, match=r"IHD_train\.txt: no such list"):
        read_triples(data, "train")


@pytest.mark.parametrize(
    "line", ["f55_1_1.png", "HFlickr/real_images/f55.png", "HFlickr/composite_images/f55_1.png", "HFlickr"]
)
def test_a_line_that_is_no_composite_is_shown(data, line):
    (data / "IHD_train.txt").write_text(line)
    with pytest.raises(HarmonyError, match=f"'{line}' is not SUBSET/composite_images"):
        read_triples(data, "train")


def test_sizes_that_differ_are_refused(data):
    found = read_triples(data, "train")[0]
    write_pair(data, "HFlickr", "f55", 1, arrays()[2], arrays(height=25)[1], ".png")
    with pytest.raises(HarmonyError, match=r"f55_1_1\.png: .*differ in size.*\(30, 25\)"):
        found.load()
