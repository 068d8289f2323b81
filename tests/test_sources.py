from types import SimpleNamespace

import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_mask, write_image
from harmonylib.data import sources
from harmonylib.data.audit import audit
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.data.recipes import RecipeSettings
from harmonylib.data.transfers import TRANSFERS
from harmonylib.tools.cli import app, run


def picture(seed):
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 60 * 1j, 0 : 1 : 80 * 1j]
    image = draw.uniform(80, 150, 3) + np.stack([x, y, x * y], -1) * draw.uniform(-80, 80, 3)
    image += draw.normal(0, 8, (60, 80, 3))
    return image.clip(0, 255).astype(np.uint8), (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.06


@pytest.fixture
def folder(tmp_path):
    """Two sets below one folder, with equal, awkward and foreign names."""
    for index, name in enumerate(("a/1", "a/2_b", "a/Ж 3", "b/1", "b/2-b", "b/6")):
        part, stem = name.split("/")
        image, mask = picture(index)
        write_image(tmp_path / "photos" / part / "images" / f"{stem}.jpg", image)
        write_image(tmp_path / "photos" / part / "masks" / f"{stem}.png", mask)
    return tmp_path / "photos"


def data(source, path=None, subsets=("HCOCO", "Hday2night"), clipped=0.1):
    amounts = {"size": 40, "train_pairs": 3, "test_pairs": 2, "train_variants": 2, "test_variants": 1}
    made = {"restyle_share": 0.0, "transfers": ["reinhard", "xiao-ma"], "clipped": clipped}
    return SimpleNamespace(source=source, path=path and str(path), subsets=list(subsets), **made, **amounts)


def iharmony4(root):
    image, mask = picture(0)
    for photo, split in (("c1", "train"), ("c2", "test")):
        pairs = {subset: write_pair(root, subset, photo, 1, image, mask) for subset in ("HCOCO", "HFlickr")}
        changed = np.where(mask[..., None], 255 - image, image)
        write_list(root, split, [write_composite(root, subset, pair, 1, changed) for subset, pair in pairs.items()])
    return root


def command(*arguments):
    return run(app, "harmonylib", ["make-data", *map(str, arguments), "--workers", "1"])


def test_a_folder_of_photos_is_split_by_photo_and_named_safely(folder):
    photos = sources.folder_photos(folder, seed=0)
    names = [photo.name for photo in photos]
    assert len(set(names)) == 6 and all(name.isalnum() and name.isascii() for name in names)
    assert sum(photo.split == "test" for photo in photos) == 2
    assert [p.split for p in sources.folder_photos(folder, seed=0)] == [p.split for p in photos]
    assert len({tuple(p.split for p in sources.folder_photos(folder, seed)) for seed in range(6)}) > 1
    assert photos[0].image.shape == (60, 80, 3)
    np.testing.assert_array_equal(photos[0].masks["foreground"], picture(0)[1])


def test_photos_without_any_masks_get_superpixels(folder, capsys):
    for path in [*folder.rglob("masks/*.png"), *folder.rglob("masks")]:
        path.rmdir() if path.is_dir() else path.unlink()
    photos = sources.folder_photos(folder, seed=0)
    assert len(photos) == 6 and "no masks; pieces of the pictures" in capsys.readouterr().err
    masks = [photo.masks["foreground"] for photo in photos]
    assert all(0 < mask.mean() < 1 for mask in masks)
    np.testing.assert_array_equal(masks[0], sources.folder_photos(folder, seed=1)[0].masks["foreground"])


def test_photos_become_a_benchmark_by_the_settings(folder, tmp_path, monkeypatch):
    rows = sources.prepare(data("photos", folder), tmp_path / "benchmark", seed=0)
    assert rows.groupby(["subset", "split"]).size().to_dict() == {
        (subset, split): count for subset in ("HCOCO", "Hday2night") for split, count in (("train", 6), ("test", 2))
    }
    assert not set(rows[rows["split"] == "train"]["photo"]) & set(rows[rows["split"] == "test"]["photo"])
    assert len(read_triples(tmp_path / "benchmark", "train")) == 12
    seen = []
    monkeypatch.setattr(sources, "make_benchmark", lambda root, photos, amounts, recipes, *rest: seen.append(recipes))
    sources.prepare(data("photos", folder, clipped=0.3), tmp_path / "benchmark", seed=0)
    assert seen == [RecipeSettings(transfers=["reinhard", "xiao-ma"], clipped=0.3)]


def test_the_embedded_photos_need_no_path(tmp_path):
    rows = sources.prepare(data("embedded", subsets=["Hday2night"]), tmp_path / "benchmark", seed=0)
    assert len(rows) == 3 * 2 + 2 and (rows["tries"] >= 1).all()
    pointed = sources.prepare(data("iharmony4", iharmony4(tmp_path / "i"), ["HCOCO"]), tmp_path / "b", seed=0)
    assert set(pointed.columns) <= set(rows.columns) and list(rows.columns[:4]) == list(pointed.columns[:4])


def test_iharmony4_is_pointed_at(tmp_path):
    genuine, root = iharmony4(tmp_path / "iHarmony4"), tmp_path / "benchmark"
    (root / "HCOCO").mkdir(parents=True)
    rows = sources.prepare(data("iharmony4", genuine, ["HFlickr"]), root, seed=0)
    assert {path.name for path in root.iterdir()} == {"IHD_train.txt", "IHD_test.txt", "ROOT", "PICTURES"}
    assert (root / "ROOT").read_text() == f"{genuine.resolve()}\n"
    assert read_triples(root, "test") == read_triples(genuine, "test", ["HFlickr"])
    assert list(rows["name"]) == ["c1_1_1", "c2_1_1"] and list(rows["split"]) == ["train", "test"]
    assert rows["plausible"].all() and (rows["tries"] == 0).all()
    before = (root / "PICTURES").read_text()
    with open(read_triples(root, "test")[0].mask, "ab") as file:
        file.write(b"another")
    sources.prepare(data("iharmony4", genuine, ["HFlickr"]), root, seed=0)
    assert (root / "PICTURES").read_text() != before


def test_make_data_command(folder, tmp_path, capsys):
    """The index decides the split, the set audits clean, and nothing is overwritten unasked."""
    files = sorted(folder.rglob("images/*.jpg"))
    lines = [f"{p.relative_to(folder)},{p.parent.parent.relative_to(folder)}/masks/{p.stem}.png" for p in files]
    lines = [f"{line},{'test' if 'b/' in line else 'train'}" for line in lines]
    index, out = tmp_path / "index.csv", tmp_path / "set"
    index.write_text("\n".join(["image,mask,split", *lines]))
    arguments = [folder, out, "--index", index, "--size", "64"]
    assert command(*arguments) == 0
    printed = capsys.readouterr().out
    assert "composites kept although no draw was plausible" in printed
    assert "beside iHarmony4's own" in printed and "genuine" in printed and "Hday2night" in printed
    for split, stems in (("train", {"1", "2b", "3"}), ("test", {"1x3", "2bx4", "6"})):
        triples = read_triples(out, split)
        assert len(triples) == 4 * 3 and {t.photo for t in triples} == stems
    assert not audit(out, workers=1).findings and max(triples[0].load()[1].shape) == 64
    assert command(*arguments) == 1 and "exists; choose another folder" in capsys.readouterr().err
    fewer = [*arguments, "--force", "--pairs", "2", "--seed", "1", "--leave-out", "histogram"]
    assert command(*fewer) == 0 and len(read_triples(out, "test")) == 4 * 2
    fewer += [word for name in TRANSFERS for word in ("--leave-out", name)]
    assert command(*fewer) == 1 and "keep some of reinhard" in capsys.readouterr().err
    for target, words in ((folder, "holds the photos"), (folder.parent, "holds the photos"), (index, "is no data set")):
        assert command(folder, target, "--force") == 1 and words in capsys.readouterr().err
    assert len(list(folder.rglob("*.jpg"))) == 6


def test_bad_settings_are_named(folder, tmp_path):
    mine = tmp_path / "benchmark" / "mine"
    mine.mkdir(parents=True)
    for match, *arguments in (
        ("no such folder", "iharmony4", tmp_path / "nowhere"),
        ("no images/ folder", "photos", folder / "a" / "images"),
        ("no such list", "iharmony4", folder),
        ("which this stage replaces", "photos", mine),
    ):
        with pytest.raises(HarmonyError, match=match):
            sources.prepare(data(*arguments), tmp_path / "benchmark", seed=0)
    assert mine.is_dir()


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((60, 80), bool), "no foreground"),
        (np.ones((60, 80), bool), "no background"),
        (np.eye(30, dtype=bool), r"mask is \(30, 30\) but its photo is \(80, 60\)"),
    ],
)
def test_unfit_photos_are_named(folder, mask, message):
    write_image(folder / "a/masks/1.png", mask)
    with pytest.raises(HarmonyError, match=f"1.png: .*{message}"):
        _ = sources.folder_photos(folder, seed=0)[0].masks
    with pytest.raises(HarmonyError, match="3 photos; give at least four"):
        sources.folder_photos(folder / "a", seed=0)


def test_bad_photos_are_left_out_and_the_masks_of_a_few_stay_whole(folder, tmp_path, capsys):
    first, second = [photo for photo in sources.folder_photos(folder, seed=0) if photo.split == "train"][:2]
    first.image_file.write_bytes(b"no picture")
    write_image(second.mask_file, np.zeros((60, 80), bool))
    assert command(folder, tmp_path / "set", "--size", "80") == 1
    err = capsys.readouterr().err
    assert err.count("left out: ") == 2 and str(first.image_file) in err and str(second.mask_file) in err
    photos = {triple.photo for triple in read_triples(tmp_path / "set", "train")}
    assert len(photos) == 2 and not photos & {first.name, second.name}
    masks = {read_mask(path).sum() for path in (tmp_path / "set").rglob("masks/*.png")}
    assert masks <= {read_mask(path).sum() for path in folder.rglob("masks/*")}
