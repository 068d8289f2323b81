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


def data(source, path=None, subsets=("HCOCO", "Hday2night")):
    amounts = {"size": 40, "train_pairs": 3, "test_pairs": 2, "train_variants": 2, "test_variants": 1}
    path = None if path is None else str(path)
    made = {"restyle_share": 0.0, "transfers": ["reinhard", "xiao-ma"], "clipped": 0.1}
    return SimpleNamespace(source=source, path=path, subsets=list(subsets), **made, **amounts)


def iharmony4(root):
    for photo, split in (("c1", "train"), ("c2", "test")):
        image, mask = picture(len(photo))
        lines = []
        for subset in ("HCOCO", "HFlickr"):
            pair = write_pair(root, subset, photo, 1, image, mask)
            changed = np.where(mask[..., None], 255 - image, image)
            lines.append(write_composite(root, subset, pair, 1, changed))
        write_list(root, split, lines)
    return root


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
    for mask in folder.rglob("masks/*.png"):
        mask.unlink()
    for masks in list(folder.rglob("masks")):
        masks.rmdir()
    photos = sources.folder_photos(folder, seed=0)
    assert len(photos) == 6 and "no masks; pieces of the pictures" in capsys.readouterr().err
    masks = [photo.masks["foreground"] for photo in photos]
    assert all(0 < mask.mean() < 1 for mask in masks)
    np.testing.assert_array_equal(masks[0], sources.folder_photos(folder, seed=1)[0].masks["foreground"])


def test_photos_become_a_benchmark(folder, tmp_path):
    manifest = sources.prepare(data("photos", folder), tmp_path / "benchmark", seed=0)
    assert manifest.groupby(["subset", "split"]).size().to_dict() == {
        (subset, split): count for subset in ("HCOCO", "Hday2night") for split, count in (("train", 6), ("test", 2))
    }
    train, test = (set(manifest.loc[manifest["split"] == split, "photo"]) for split in ("train", "test"))
    assert not train & test
    assert len(read_triples(tmp_path / "benchmark", "train")) == 12


def test_the_embedded_photos_need_no_path(tmp_path):
    manifest = sources.prepare(data("embedded", subsets=["Hday2night"]), tmp_path / "benchmark", seed=0)
    assert len(manifest) == 3 * 2 + 2 and (manifest["tries"] >= 1).all()


def test_iharmony4_is_pointed_at(tmp_path):
    genuine, root = iharmony4(tmp_path / "iHarmony4"), tmp_path / "benchmark"
    (root / "HCOCO").mkdir(parents=True)
    manifest = sources.prepare(data("iharmony4", genuine, ["HFlickr"]), root, seed=0)
    assert {path.name for path in root.iterdir()} == {"IHD_train.txt", "IHD_test.txt", "ROOT", "PICTURES"}
    assert (root / "ROOT").read_text() == f"{genuine.resolve()}\n"
    assert read_triples(root, "test") == read_triples(genuine, "test", ["HFlickr"])
    assert list(manifest["name"]) == ["c1_1_1", "c2_1_1"] and list(manifest["split"]) == ["train", "test"]
    assert manifest["plausible"].all() and (manifest["tries"] == 0).all()
    before = (root / "PICTURES").read_text()
    with open(read_triples(root, "test")[0].mask, "ab") as file:
        file.write(b"another")
    sources.prepare(data("iharmony4", genuine, ["HFlickr"]), root, seed=0)
    assert (root / "PICTURES").read_text() != before


def test_both_kinds_have_the_same_first_columns(folder, tmp_path):
    made = sources.prepare(data("photos", folder, ["HCOCO"]), tmp_path / "a", seed=0)
    pointed = sources.prepare(data("iharmony4", iharmony4(tmp_path / "i"), ["HCOCO"]), tmp_path / "b", seed=0)
    assert set(pointed.columns) <= set(made.columns) and list(made.columns[:4]) == list(pointed.columns[:4])


def test_filter_and_transfers_follow_the_settings(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sources, "make_benchmark", lambda root, photos, amounts, recipes, *rest: seen.append(recipes))
    settings = data("photos", folder)
    settings.clipped = 0.3
    sources.prepare(settings, tmp_path / "benchmark", seed=0)
    assert seen == [RecipeSettings(transfers=("reinhard", "xiao-ma"), clipped=0.3)]


def test_make_data_command(folder, tmp_path, capsys):
    """The index decides the split, the set audits clean, and nothing is overwritten unasked."""
    files = sorted(folder.rglob("images/*.jpg"))
    lines = [f"{p.relative_to(folder)},{p.parent.parent.relative_to(folder)}/masks/{p.stem}.png" for p in files]
    index, out = tmp_path / "index.csv", tmp_path / "set"
    index.write_text(
        "\n".join(["image,mask,split", *(f"{line},{'test' if 'b/' in line else 'train'}" for line in lines)])
    )
    arguments = ["make-data", str(folder), str(out), "--index", str(index), "--size", "64", "--workers", "1"]
    assert run(app, "harmonylib", arguments) == 0
    printed = capsys.readouterr().out
    assert "composites kept although no draw was plausible" in printed
    assert "beside iHarmony4's own" in printed and "genuine" in printed and "Hday2night" in printed
    for split, stems in (("train", {"1", "2b", "3"}), ("test", {"1x3", "2bx4", "6"})):
        triples = read_triples(out, split)
        assert len(triples) == 4 * 3 and {t.photo for t in triples} == stems
    assert not audit(out, workers=1).findings
    assert max(read_triples(out, "test")[0].load()[1].shape) == 64
    assert run(app, "harmonylib", arguments) == 1 and "exists; choose another folder" in capsys.readouterr().err
    fewer = [*arguments, "--force", "--pairs", "2", "--seed", "1", "--leave-out", "histogram"]
    assert run(app, "harmonylib", fewer) == 0 and len(read_triples(out, "test")) == 4 * 2
    fewer += [word for name in TRANSFERS for word in ("--leave-out", name)]
    assert run(app, "harmonylib", fewer) == 1 and "transfers must be some of" in capsys.readouterr().err
    for target, words in ((folder, "holds the photos"), (folder.parent, "holds the photos"), (index, "is no data set")):
        assert run(app, "harmonylib", ["make-data", str(folder), str(target), "--force"]) == 1
        assert words in capsys.readouterr().err
    assert len(list(folder.rglob("*.jpg"))) == 6


def test_bad_settings_are_named(folder, tmp_path):
    def refused(match, *arguments):
        with pytest.raises(HarmonyError, match=match):
            sources.prepare(data(*arguments), tmp_path / "benchmark", seed=0)

    refused("data.source 'coco' is unknown; use embedded, photos or iharmony4", "coco")
    refused("data.source photos needs data.path", "photos")
    refused("no such folder", "iharmony4", tmp_path / "nowhere")
    refused("no images/ folder", "photos", folder / "a" / "images")
    refused("no such list", "iharmony4", folder)
    (tmp_path / "benchmark" / "mine").mkdir(parents=True)
    refused("which this stage replaces", "photos", tmp_path / "benchmark" / "mine")
    assert (tmp_path / "benchmark" / "mine").is_dir()


def test_unfit_photos_are_named(folder):
    images, masks = folder / "a" / "images", folder / "a" / "masks"
    with pytest.raises(HarmonyError, match="3 photos; give at least four"):
        sources.folder_photos(folder / "a", seed=0)
    for array, message in (
        (np.zeros((60, 80), bool), "no foreground"),
        (np.ones((60, 80), bool), "no background"),
        (np.eye(30, dtype=bool), r"mask is \(30, 30\) but its photo is \(80, 60\)"),
    ):
        write_image(masks / "1.png", array)
        with pytest.raises(HarmonyError, match=f"1.png: .*{message}"):
            _ = sources.folder_photos(folder, seed=0)[0].masks
    (masks / "1.png").unlink()
    with pytest.raises(HarmonyError, match=r"1\.jpg: no mask"):
        sources.folder_photos(folder, seed=0)
    assert (images / "1.jpg").is_file()


def test_measures_of_a_hand_made_triple(tmp_path):
    real, mask = np.full((64, 64, 3), 100, np.uint8), np.zeros((64, 64), bool)
    mask[:, :16] = True
    composite = np.where(mask[..., None], np.uint8(110), real)
    for split in ("train", "test"):
        pair = write_pair(tmp_path, "HCOCO", "c1", 1, real, mask, ".png")
        variants = 4 if split == "train" else 1
        lines = [write_composite(tmp_path, "HCOCO", pair, k, composite, ".png") for k in range(variants)]
        write_list(tmp_path, split, lines)
    table = sources.measure(tmp_path, at_most=3, seed=0, workers=1)
    assert list(table["split"]) == ["train"] * 3 + ["test"]
    np.testing.assert_allclose(table["share"], 0.25)
    np.testing.assert_allclose(table["fmse"], 100)
    np.testing.assert_allclose(table["psnr"], 10 * np.log10(255**2 / (100 / 4)), atol=0.1)  # the edge is blurred
    np.testing.assert_allclose(table["delta_e"], 4.0, atol=0.3)  # L* 42.4 -> 46.4
    write_image(tmp_path / "HCOCO" / "masks" / "c1_1.png", np.zeros((64, 64), bool))
    with pytest.raises(HarmonyError, match=r"c1_1\.png: the mask has no foreground"):
        sources.measure(tmp_path, at_most=1, seed=0, workers=1)


def test_the_masks_of_a_few_photos_stay_whole(folder, tmp_path):
    sources.make_data(folder, tmp_path / "set", size=80, workers=1)
    masks = {read_mask(path).sum() for path in (tmp_path / "set").rglob("masks/*.png")}
    assert masks <= {read_mask(path).sum() for path in folder.rglob("masks/*")}


def test_bad_photos_are_left_out_and_named(folder, tmp_path, capsys):
    first, second = [photo for photo in sources.folder_photos(folder, seed=0) if photo.split == "train"][:2]
    first.image_file.write_bytes(b"no picture")
    write_image(second.mask_file, np.zeros((60, 80), bool))
    code = run(app, "harmonylib", ["make-data", str(folder), str(tmp_path / "set"), "--size", "64", "--workers", "1"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("left out: ") == 2
    assert str(first.image_file) in err and str(second.mask_file) in err
    photos = {triple.photo for triple in read_triples(tmp_path / "set", "train")}
    assert len(photos) == 2 and not photos & {first.name, second.name}
