from dataclasses import replace

import numpy as np
import pytest

from harmonylib.core.errors import HarmonyError
from harmonylib.data.build import BenchmarkSettings, draw_pair, make_benchmark
from harmonylib.data.embedded_photos import Photo
from harmonylib.data.iharmony4_statistics import beside
from harmonylib.data.layout import SUBSETS, read_triples
from harmonylib.data.recipes import EDITS, RecipeSettings, foreground_mse

SMALL = BenchmarkSettings(train_pairs=4, test_pairs=2, train_variants=2, test_variants=1, size=40)
RECIPES = RecipeSettings()


def photo(seed, split, objects=2):
    """A smooth colourful picture with some texture and elliptical objects."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 60 * 1j, 0 : 1 : 80 * 1j]
    slopes, base = draw.uniform(-80, 80, (2, 3)), draw.uniform(90, 160, 3)
    image = base + slopes[0] * (y[..., None] - 0.5) + slopes[1] * (x[..., None] - 0.5) + draw.normal(0, 8, (60, 80, 3))
    centres = draw.uniform(0.3, 0.7, (objects, 2))
    masks = {f"object {k}": (y - v) ** 2 + (x - h) ** 2 < 0.06 for k, (v, h) in enumerate(centres)}
    return Photo(f"photo_{seed}", split, False, "made up", "none", image.clip(0, 255).astype(np.uint8), masks)


@pytest.fixture(scope="module")
def photos():
    return [photo(seed, "train" if seed < 3 else "test") for seed in range(5)]


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "benchmark"
    return root, make_benchmark(root, photos, SMALL, RECIPES, seed=0, workers=1)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_counts_rows_and_splits(made):
    root, rows = made
    assert rows.groupby(["subset", "split"]).size().to_dict() == {
        (subset, split): count for subset in SUBSETS for split, count in (("train", 8), ("test", 2))
    }
    for split, names in (("train", {"photo0", "photo1", "photo2"}), ("test", {"photo3", "photo4"})):
        own, triples = rows[rows["split"] == split], read_triples(root, split)
        assert [t.name for t in triples] == list(own["name"]) and set(own["photo"]) == names
        assert [t.photo for t in triples] == list(own["photo"])
    assert len(contents(root)) == len(rows) + 2 * 4 * (4 + 2) + 2  # composites, reals and masks, lists
    assert not list(root.parent.glob(".*"))
    uses = rows.query("split == 'train'").groupby(["subset", "photo"]).size()
    assert len(uses) == 4 * 3 and uses.between(2, 4).all()  # every photo serves every subset about equally


def test_composites_differ_from_the_real_in_the_foreground_only(made):
    root, rows = made
    changes = rows.set_index(["subset", "name"])
    for triple in read_triples(root, "train"):
        composite, mask, real = triple.load()
        assert max(mask.shape) <= SMALL.size and 0 < mask.mean() < 1
        assert np.abs(composite.astype(int) - real)[~mask].mean() < 4  # JPEG
        row = changes.loc[(triple.subset, triple.name)]
        assert foreground_mse(real, composite, mask) == pytest.approx(row["fmse"], rel=0.3)  # JPEG
        assert mask.mean() == row["share"]
    for one, two in zip(*[iter(read_triples(root, "train"))] * 2, strict=True):  # variants of transfers may be alike
        assert one.pair == two.pair
        assert one.subset not in EDITS or one.composite.read_bytes() != two.composite.read_bytes()


def test_the_seed_decides_every_byte_and_the_number_of_processes_none(made, photos, tmp_path):
    root, rows = made
    again = make_benchmark(tmp_path / "again", photos, SMALL, RECIPES, seed=0, workers=2)
    assert contents(tmp_path / "again") == contents(root)
    assert again.equals(rows)
    make_benchmark(tmp_path / "other", photos, SMALL, RECIPES, seed=1, subsets=["HFlickr"], workers=1)
    other = {data for name, data in contents(tmp_path / "other").items() if "composite_images" in name}
    assert len(other) == 4 * 2 + 2 and not other & set(contents(root).values())


def test_more_pairs_leave_the_first_ones_as_they_are(made, photos, tmp_path):
    more = replace(SMALL, train_pairs=5, train_variants=3)
    make_benchmark(tmp_path / "more", photos, more, RECIPES, seed=0, subsets=["HFlickr"], workers=1)
    before = {name: data for name, data in contents(made[0]).items() if name.startswith("HFlickr/")}
    assert before.items() <= contents(tmp_path / "more").items()


def test_an_earlier_set_is_replaced_when_the_new_one_is_complete(photos, tmp_path):
    root, settings = tmp_path / "benchmark", replace(SMALL, train_pairs=1, test_pairs=1)
    for leftover in (root / "ROOT", tmp_path / ".benchmark.building" / "HCOCO" / "half.jpg"):
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_text("old")
    with pytest.raises(KeyError):
        make_benchmark(root, photos, SMALL, RECIPES, seed=0, subsets=["HNight"], workers=2)
    assert contents(root) == {"ROOT": b"old"}
    make_benchmark(root, photos, settings, RECIPES, seed=0, subsets=["HCOCO"], workers=1)
    assert not (root / "ROOT").exists() and not (root / "HCOCO" / "half.jpg").exists()
    assert len(read_triples(root, "train")) == 2


def test_a_split_needs_two_photos_and_something_to_make(photos, tmp_path):
    with pytest.raises(HarmonyError, match="the test split has 1 photos; give at least two"):
        make_benchmark(tmp_path / "a", photos[:4], SMALL, RECIPES, seed=0)
    with pytest.raises(HarmonyError, match="nothing to make"):
        make_benchmark(tmp_path / "b", photos, replace(SMALL, train_pairs=0, test_pairs=0), RECIPES, seed=0)
    trained = make_benchmark(tmp_path / "c", photos[:4], replace(SMALL, test_pairs=0), RECIPES, 0, ["HFlickr"], 1)
    assert set(trained["split"]) == {"train"}


def test_a_pair_has_a_foreground_of_the_wanted_share(photos):
    whole, own = replace(SMALL, min_crop=1.0, size=80), list(photos[0].masks.values())
    image, mask = draw_pair(photos[0], 0, own[1].mean() * 1.1, whole, (0,))
    np.testing.assert_array_equal(image, photos[0].image)
    assert any(np.array_equal(mask, one) for one in own)
    part = draw_pair(photos[0], 0, 0.03, whole, (0,))[1]
    assert 0.01 < part.mean() < 0.09 and any((part & ~one).sum() < 0.1 * part.sum() for one in own)
    drawn = [draw_pair(photos[0], number, 0.2, SMALL, (0,)) for number in range(4)]
    assert len({image.tobytes() for image, _ in drawn}) == 4  # windows of their own
    assert all(max(mask.shape) <= SMALL.size and 0 < mask.mean() < 1 for _, mask in drawn)


def test_shares_and_strengths_are_near_the_genuine_ones(photos, tmp_path):
    """Not at the table's ends, which few photos of 40 pixels have; medians within a factor of two."""
    many = replace(SMALL, train_pairs=40, train_variants=1, test_pairs=0)
    table = beside(make_benchmark(tmp_path / "many", photos, many, RECIPES, 0, ["HAdobe5k", "HFlickr"], workers=1))
    middle = table.xs(0.5, level="quantile").xs("ratio", axis=1, level=1)
    assert middle["share"].between(0.5, 2).all() and 0.5 < middle.loc["HAdobe5k", "fmse"] < 2


@pytest.mark.parametrize("full, gone", [(False, "foreground"), (True, "background")])
def test_masks_that_vanish_at_the_size_are_named(photos, tmp_path, full, gone):
    mask = np.full(photos[0].image.shape[:2], full)
    mask[1, 1] = not full
    speck = replace(photos[0], masks={"speck": mask})
    whole = replace(SMALL, min_crop=1.0, size=20)
    with pytest.raises(HarmonyError, match=f"photo photo_0: at 20 px no {gone} is left"):
        make_benchmark(tmp_path / "a", [speck, *photos[1:]], whole, RECIPES, 0, ["HCOCO"], workers=1)


def test_restyling_changes_training_photos_only(made, photos, tmp_path):
    make_benchmark(tmp_path / "restyled", photos, replace(SMALL, restyle_share=1.0), RECIPES, 0, ["HCOCO"], workers=1)
    before, after = contents(made[0]), contents(tmp_path / "restyled")
    reals = {split: {t.real.name for t in read_triples(tmp_path / "restyled", split)} for split in ("train", "test")}
    for name in (path for path in after if "real_images" in path):
        assert (before[name] == after[name]) == (name.rsplit("/", 1)[1] in reals["test"])
