import re

import numpy as np
import pytest
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_mask, write_image
from harmonylib.data.audit import audit
from harmonylib.data.layout import read_triples, write_composite, write_pair
from harmonylib.data.readers import Runs, detect, imaterialist_pairs, photo_pairs, read_examples, scan

MASK = np.zeros((12, 16), bool)
MASK[3:9, 4:10] = True


def noise(seed=0, shape=(12, 16)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def photo(folder, *names):
    for seed, name in enumerate(names):
        write_image(folder / "images" / f"{name}.png", noise(seed))
        write_image(folder / "masks" / f"{name}.png", MASK)


def test_iharmony4_by_its_own_or_its_subsets_lists(tmp_path):
    for subset, name in (("HCOCO", "c1"), ("HFlickr", "f1")):
        pair = write_pair(tmp_path, subset, name, 1, noise(), MASK)
        write_composite(tmp_path, subset, pair, 2, noise(1))
        (tmp_path / subset / f"{subset}_train.txt").write_text(f"{pair}_2.jpg\r\n")
    (tmp_path / "HCOCO" / "HCOCO_test.txt").write_text("HCOCO\\composite_images\\c1_1_2.jpg")
    examples = read_examples(tmp_path)
    assert detect(tmp_path) == "iharmony4"
    assert [(e.subset, e.split, e.name) for e in examples] == [
        ("HCOCO", "train", "c1_1_2"), ("HFlickr", "train", "f1_1_2"), ("HCOCO", "test", "c1_1_2")]  # fmt: skip
    assert read_triples(tmp_path, "train") == examples[:2]
    (tmp_path / "IHD_train.txt").write_text("HFlickr/composite_images/f1_1_2.jpg\n")
    assert [e.name for e in read_examples(tmp_path)] == ["f1_1_2", "c1_1_2"]  # the root's list comes first
    (tmp_path / "IHD_train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HarmonyError, match="not a UTF-8 text file"):
        read_examples(tmp_path)


def test_what_is_no_data_set_is_named(tmp_path):
    write_image(tmp_path / "HCOCO" / "composite_images" / "c1_1_1.png", noise())
    for folder, kind, message in (
        (tmp_path, "auto", "no IHD_train.txt or IHD_test.txt"),
        (tmp_path / "nowhere", "auto", "nowhere: no such data folder"),
        (tmp_path, "coco", "kind 'coco' is unknown"),
        (tmp_path, "photos", "no images/ folder beside a masks/ folder"),
    ):
        with pytest.raises(HarmonyError, match=message):
            read_examples(folder, kind)


ROWS = ["image,mask,split", *(f"a/images/{n}.png,a/masks/{n}.png,{s}" for n, s in (("one", "train"), ("two", "test")))]
CSV = "\n".join(ROWS) + "\n"


@pytest.fixture
def photos(tmp_path):
    photo(tmp_path / "a", "one", "two")
    return tmp_path


def test_photos_without_an_index(photos):
    found = read_examples(photos)
    assert [(e.subset, e.split, e.name, e.composite) for e in found] == [("a", "", n, None) for n in ("one", "two")]
    (photos / "a/masks/two.png").unlink()
    with pytest.raises(HarmonyError, match=r"two\.png: no mask named two\.\*"):
        photo_pairs(photos)
    assert [type(item).__name__ for item in scan(photos)] == ["Triple", "HarmonyError"]


@pytest.mark.parametrize(
    "data",
    [
        CSV.replace(",", ";").encode(),
        CSV.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig"),
        b"sep=;\r\n" + CSV.replace(",", ";").encode() + b";;\n",
        CSV.replace(",", "\t").encode(),
        CSV.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
        CSV.replace("image,mask,split", "Image, Mask ,SPLIT").encode(),
        CSV.replace(",", ", ").replace("test", "Test ").encode(),
        CSV.replace("/", "\\").encode(),
        CSV.replace("split", "split,licence").replace("train", "train,CC0").replace("test", "test,").encode(),
    ],
)
def test_indexes_as_spreadsheets_write_them(photos, data):
    (photos / "index.csv").write_bytes(data)
    for split, name in (("train", "one"), ("test", "two")):
        expected = [(photos / f"a/images/{name}.png", photos / f"a/masks/{name}.png")]
        assert photo_pairs(photos, photos / "index.csv", split) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,mask\n", "no column split"),
        ("image,mask,split\na/images/one.png,a/masks/one.png,val\n", "line 2: split 'val' is unknown"),
        ("image,mask,split\na/images/three.png,a/masks/one.png,test\n", "line 2: .*three.png: no such file"),
        ("image,mask,split\na/images/one.png,a/masks/one.png,test\n", "no row with split train"),
        ("image,mask,split\n/etc/hostname,../x.png,train\n", "csv, line 2: .*'/etc/hostname' is no file inside it"),
        ("", "No columns"),
    ],
)
def test_errors_of_an_index_are_named(photos, text, message):
    (photos / "index.csv").write_text(text)
    with pytest.raises(HarmonyError, match=message):
        photo_pairs(photos, photos / "index.csv", "train")


def test_pictures_that_would_be_passed_over_are_named(tmp_path):
    photo(tmp_path, "one")
    for name in (".hidden.jpg", "notes.txt", "two.heic"):
        (tmp_path / "images" / name).write_bytes(b"x")
    write_image(tmp_path / "masks/three.png", MASK)
    write_image(tmp_path / "masks/one.bmp", MASK)
    double, example, *errors = scan(tmp_path)
    assert example.name == "one"
    assert str(double).endswith("masks/one.png: a second file beside one.bmp; keep the right one")
    assert [str(error).split("/")[-1] for error in errors] == [
        "two.heic: .heic is no type that is read; convert or remove it",
        "images; add it or remove the mask",
    ]
    assert "masks/three.png: no picture named three.*" in str(errors[1])


def test_folders_behind_links_are_read_once(tmp_path):
    """The loop ends, and two sets may share one folder of pictures."""
    photo(tmp_path / "elsewhere", "one")
    for part in ("images", "masks"):
        (tmp_path / "root/b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root/b" / part).symlink_to(tmp_path / "elsewhere" / part)
    (tmp_path / "root/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    assert [(e.subset, e.name) for e in read_examples(tmp_path / "root")] == [("a", "one"), ("b", "one")]
    for part in ("composite", "gt", "mask"):
        write_image(tmp_path / "elsewhere" / f"9_{part}.png", noise())
    assert detect(tmp_path / "root") == "realhm" and len(read_examples(tmp_path / "root")) == 1


def test_dih99_has_composites_and_no_real(tmp_path):
    photo(tmp_path, "7")
    (example,) = read_examples(tmp_path, "dih99")
    assert (example.subset, example.name, example.real) == ("DIH99", "7", None)
    assert example.composite == tmp_path / "images/7.png" and (example.read_mask() == MASK).all()


def test_realhm(tmp_path):
    folder = tmp_path / "vendor [1]" / "dog"
    for part in ("composite", "gt", "small"):
        write_image(folder / f"9_{part}.jpg", noise())
    with pytest.raises(HarmonyError, match=r"9_composite\.jpg: no 9_mask"):
        read_examples(tmp_path)
    write_image(folder / "9_mask.png", MASK)
    (example,) = read_examples(tmp_path)
    assert (example.subset, example.split, example.name) == ("RealHM", "test", "9")
    files = [path.name for path in (example.composite, example.mask, example.real)]
    assert files == ["9_composite.jpg", "9_mask.png", "9_gt.jpg"]


@pytest.fixture
def fashion(tmp_path):
    """Two photos of 16 x 12 pixels; one has two segments that overlap."""
    write_image(tmp_path / "train" / "street.jpg", noise())
    write_image(tmp_path / "train" / "shop.jpg", noise(1))
    rows = ["street,1 2 5 1,12,16,0", "street,2 2,12,16,31", "shop,40 6 52 6,12,16,1"]
    (tmp_path / "train.csv").write_text("\n".join(["ImageId,EncodedPixels,Height,Width,ClassId", *rows]))
    return tmp_path


def test_imaterialist_unites_segments(fashion):
    assert detect(fashion) == "imaterialist" and [e.name for e in read_examples(fashion)] == ["shop", "street"]
    (fashion / "ids.txt").write_text("street\r\n")
    assert imaterialist_pairs(fashion, fashion / "masks", workers=1) == (
        [(fashion / "train/street.jpg", fashion / "masks/street.png")], [])  # fmt: skip
    expected = np.zeros((12, 16), bool)
    expected[[0, 1, 2, 4], 0] = True  # runs go down the columns
    np.testing.assert_array_equal(read_mask(fashion / "masks/street.png"), expected)


def turned(file):
    """Run lengths speak of the stored pixels: a mask beside a photo that is turned upside down would lie elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(noise()).save(file, exif=exif)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("train/street.jpg", turned, r"street\.jpg: turned by its EXIF orientation"),
        ("train/street.jpg", lambda file: write_image(file, noise(shape=(9, 16))),
         r"street\.jpg: is 16x9, .*train\.csv, street says 16x12"),
        ("train/street.jpg", lambda file: file.unlink(), r"street\.jpg: no such photo"),
        ("ids.txt", lambda file: file.write_text("street\nhat\n"), r"ids\.txt: hat is not in .*train\.csv"),
        ("ids.txt", lambda file: file.write_text("shop\n../../victim\n"), "no file inside it"),
        ("train.csv", lambda file: file.write_text(file.read_text().replace("2 2,12", "2 x,12")), "run lengths do not"),
    ],
)  # fmt: skip
def test_imaterialist_damage_is_left_out_and_told(fashion, name, damage, message):
    damage(fashion / name)
    pairs, left_out = imaterialist_pairs(fashion, fashion / "masks", workers=1)
    assert len(pairs) == 1 and len(left_out) == 1 and re.search(message, left_out[0])
    for photo in (fashion / "train").glob("*.jpg"):
        photo.unlink()
    with pytest.raises(HarmonyError, match="no such photo"):
        imaterialist_pairs(fashion, fashion / "masks", workers=1)
    (fashion / "train.csv").write_text("ImageId,Height\n")
    with pytest.raises(HarmonyError, match=r"train\.csv: .*give the data set's train"):
        imaterialist_pairs(fashion, fashion / "masks", workers=1)


def test_imaterialist_is_audited(fashion):
    write_image(fashion / "train/street.jpg", noise(shape=(9, 16)))
    assert [finding.kind for finding in audit(fashion, workers=1).findings] == ["size"]


@pytest.mark.parametrize("size", ["abc,16", ",16", "12.5,16", "-1,16", "0,16", "12", "600000,800000"])
def test_imaterialist_sizes_are_checked(fashion, size):
    (fashion / "train.csv").write_text(f"ImageId,EncodedPixels,Height,Width\nstreet,1 2,{size}\nshop,1 2,12,16\n")
    example, error = scan(fashion)
    assert example.name == "shop" and "train.csv, street: " in str(error) and "no size of a photo" in str(error)


def test_run_lengths_are_checked():
    for text in ("12 2", "0 1", "3", "x 1", "1 0", "-1 2", "1 1.5", "", "99999999999999999999 1"):
        with pytest.raises(HarmonyError, match="here: run lengths do not fit a 3x4 image"):
            Runs((text,), (4, 3), "here").decode()
    assert Runs(("1 12",), (4, 3), "here").decode().all()
    np.testing.assert_array_equal(Runs(("5 2", "6 1"), (4, 3), "").decode()[:, 1], [True, True, False, False])


def test_unicode_of_both_forms_is_one_name(tmp_path):
    photo(tmp_path, "caf\u00e9")
    (tmp_path / "masks/caf\u00e9.png").rename(tmp_path / "masks/cafe\u0301.png")
    for part in ("images", "masks"):
        (tmp_path / ".ipynb_checkpoints" / part).mkdir(parents=True)
    (tmp_path / ".ipynb_checkpoints/images/a.png").touch()
    assert len(read_examples(tmp_path, "photos")) == 1
    (tmp_path / "index.csv").write_text("image,mask,split\nimages/cafe\u0301.png,masks/caf\u00e9.png,test\n", "utf-8")
    assert len(photo_pairs(tmp_path, tmp_path / "index.csv", "test")) == 1
