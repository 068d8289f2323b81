import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from skimage import data

from harmonylib.augmentation import sets
from harmonylib.augmentation.candidates import Pair, pairs_of
from harmonylib.augmentation.sets import build_human_harmony, clean_photos, human_photos, mix, mix_count, photo_pairs_of
from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import paste, resize_image, write_image
from harmonylib.core.json_files import write_json
from harmonylib.core.seeds import rng
from harmonylib.data.audit import audit
from harmonylib.data.layout import read_lines, read_triples, write_composite, write_list, write_pair

K = 5
VARIANTS = {("HFlickr", "f0_1"): 1, ("HFlickr", "f0_2"): 4, ("HFlickr", "f1_1"): 2, ("Hday2night", "d0_1"): 3}


def photo(words, height=40, width=48):
    mask = np.zeros((height, width), bool)
    mask[8:30, 8:28] = True
    return rng(words).integers(0, 256, (height, width, 3), dtype=np.uint8), mask


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """HFlickr: 3 pairs with 1, 4 and 2 composites (N1 = 3, N2 = 7). Hday2night: one pair with 3. One test composite."""
    root = tmp_path_factory.mktemp("set")
    lines = []
    for (subset, name), variants in {**VARIANTS, ("HFlickr", "f9_1"): 1}.items():
        stem, number = name.split("_")
        real, mask = photo(stem)
        write_pair(root, subset, stem, number, real, mask)
        lines += [write_composite(root, subset, name, v, 255 - real) for v in range(variants)]
    write_list(root, "train", lines[:-1])
    write_list(root, "test", lines[-1:])
    return root


def write_candidates(root, source, shrink=1, unusable=()):
    """Candidates of the pairs of `source`."""
    rows, pairs = [], {pair.key: pair for pair in pairs_of(read_triples(source, "train"))}
    for subset, name in VARIANTS:
        for index in range(K):
            real, mask = photo(name.split("_")[0])
            real[mask] = 10 * index
            image = resize_image(real, (40 // shrink, 48 // shrink))
            row = {"subset": subset, "pair": name, "index": index, "inputs": pairs[subset, name].digest()}
            row |= {"status": "nan" if (name, index) in unusable else "ok", "strength": 10.0 * index}
            rows.append(row | {"file": write_composite(root, subset, name, f"g{index}", image, ".png")})
    write_json(root / "manifest.json", {"settings": {"k": K}, "candidates": rows})
    return root


@pytest.fixture(scope="module")
def candidates(root, tmp_path_factory):
    return write_candidates(tmp_path_factory.mktemp("candidates"), root)


def generated(out, name):
    return [line for line in read_lines(out / "IHD_train.txt") if f"/{name}_g" in line]


@pytest.mark.parametrize(
    ("gamma", "n2", "n1", "count"),
    [(1, 7, 3, 3), (1.0, 6, 3, 2), (0, 7, 3, 0), (0.1, 10, 1, 1), (0.1, 30, 1, 3), (0.7, 100, 10, 7), (1.1, 10, 1, 11),
     (1e-9, 1, 1000, 1), (1, 7449, 4400, 2)],
)  # fmt: skip
def test_mix_count(gamma, n2, n1, count):
    assert mix_count(gamma, n2, n1) == count


def test_bad_gammas(root, candidates, tmp_path):
    for gamma in (-0.1, float("nan"), float("inf")):
        with pytest.raises(HarmonyError, match="gamma"):
            mix(root, candidates, tmp_path / "out", gamma, 0)
    with pytest.raises(HarmonyError, match="the training list is empty"):
        mix_count(1.0, 0, 0)
    assert not list(tmp_path.iterdir())


def test_counts_of_uneven_pairs(root, candidates, tmp_path):
    report = mix(root, candidates, tmp_path / "out", 1.0, seed=0)
    assert report["HFlickr"] == {"pairs": 3, "composites": 7, "per_pair": 3, "generated": 9}
    assert report["Hday2night"] == {"pairs": 1, "composites": 3, "per_pair": 3, "generated": 3}
    assert all(len(generated(tmp_path / "out", name)) == 3 for _, name in VARIANTS)
    train = read_triples(tmp_path / "out", "train")
    before, after = (set(read_lines(folder / "IHD_train.txt")) for folder in (root, tmp_path / "out"))
    assert len(train) == 10 + 12 and before < after
    assert (tmp_path / "out" / "IHD_test.txt").read_bytes() == (root / "IHD_test.txt").read_bytes()
    assert len(read_triples(tmp_path / "out", "test")) == 1
    for triple in train:
        composite, mask, real = triple.load()
        if "_g" in triple.name:
            assert composite[mask].std() == 0 and real[mask].std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    summary = json.loads((tmp_path / "out/made_by_harmonylib.json").read_text())
    assert summary["gamma"] == 1.0 and summary["strength"] == [0.0, None]  # plain JSON


def test_choice_depends_on_the_seed_and_grows_with_gamma(root, candidates, tmp_path):
    for name, gamma, seed in (("a", 0.5, 0), ("b", 0.5, 0), ("c", 1.0, 0), ("d", 0.5, 1)):
        mix(root, candidates, tmp_path / name, gamma, seed)
    a, b, c, d = (set(read_lines(tmp_path / name / "IHD_train.txt")) for name in "abcd")
    assert a == b and a < c and a != d
    assert mix(root, tmp_path / "nothing", tmp_path / "zero", 0, 0)["HFlickr"]["generated"] == 0  # needs no candidates
    assert read_lines(tmp_path / "zero/IHD_train.txt") == read_lines(root / "IHD_train.txt")
    subset = mix(root, candidates, tmp_path / "e", 0.5, 0, subsets=["HFlickr"])
    assert list(subset) == ["HFlickr"] and set(read_lines(tmp_path / "e" / "IHD_train.txt")) < a


def test_too_few_candidates(root, candidates, tmp_path):
    with pytest.raises(HarmonyError, match="asks for 7 generated composites but 5 are usable"):
        mix(root, candidates, tmp_path / "out", 3.0, 0)
    unusable = write_candidates(tmp_path / "unusable", root, unusable={("f1_1", i) for i in range(3)})
    with pytest.raises(HarmonyError, match="f1_1: .* 3 .* 2 are usable"):
        mix(root, unusable, tmp_path / "out", 1.0, 0)
    assert mix(root, unusable, tmp_path / "out", 0.6, 0)["HFlickr"]["per_pair"] == 2
    report = mix(root, unusable, tmp_path / "out", 1.0, 0, leave_out={("HFlickr", "f1_1")})
    assert report["HFlickr"] == {"pairs": 3, "composites": 7, "per_pair": 3, "generated": 6}
    assert not generated(tmp_path / "out", "f1_1") and len(generated(tmp_path / "out", "f0_1")) == 3
    with pytest.raises(HarmonyError, match="strength"):
        mix(root, candidates, tmp_path / "out2", 1.0, 0, strength=(25, 45))


def test_what_cannot_be_mixed(root, candidates, tmp_path):
    with pytest.raises(HarmonyError, match="incomplete"):
        mix(root, tmp_path, tmp_path / "out", 1.0, 0)
    mix(root, candidates, tmp_path / "out", 1.0, 0)
    with pytest.raises(HarmonyError, match="already"):
        mix(tmp_path / "out", candidates, tmp_path / "other", 0.1, 0)
    shutil.copytree(root, tmp_path / "set")
    made = write_candidates(tmp_path / "made", tmp_path / "set")
    write_image(next((tmp_path / "set/HFlickr/real_images").glob("f1.*")), 255 - photo("f1")[0])
    with pytest.raises(HarmonyError, match=r"f1\..*: changed .* run `harmonylib generate` again"):
        mix(tmp_path / "set", made, tmp_path / "other", 1.0, 0)
    write_list(tmp_path / "set", "train", [])
    with pytest.raises(HarmonyError, match="the train list has no composites"):
        mix(tmp_path / "set", candidates, tmp_path / "other", 1.0, 0)
    assert not (tmp_path / "other").exists()


def test_small_candidates_are_brought_to_the_reals_size(root, tmp_path):
    small = write_candidates(tmp_path / "small", root, shrink=2)
    mix(root, small, tmp_path / "out", 1.0, 0)
    for triple in read_triples(tmp_path / "out", "train"):
        composite, mask, real = triple.load()
        if "_g" in triple.name:
            assert np.array_equal(composite[~mask], real[~mask])
            assert abs(int(composite[19, 18, 0]) - 10 * int(triple.name[-1])) <= 1


def full(*_):
    raise OSError(28, "No space left on device")


def test_an_interrupted_mix_leaves_the_old_set(root, candidates, tmp_path, monkeypatch):
    out = tmp_path / "out"
    mix(root, candidates, out, 0.2, 0)
    before = (out / "IHD_train.txt").read_bytes()
    monkeypatch.setattr(sets, "write_list", full)
    with pytest.raises(OSError, match="No space"):
        mix(root, candidates, out, 1.0, 0)
    monkeypatch.undo()
    assert (out / "IHD_train.txt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    mix(root, candidates, out, 1.0, 0)
    assert len(read_triples(out, "train")) == 22


def test_foreign_folders_are_never_replaced(root, candidates, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, root, root.parent, candidates):
        with pytest.raises(HarmonyError, match="choose another folder"):
            mix(root, candidates, out, 1.0, 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def human(folder, names):
    """(pairs, choices) of photos, each with the kept candidate g3 and a rejected one."""
    files = []
    for name in names:
        files.append((folder / "images" / f"{name}.png", folder / "masks" / f"{name}.png"))
        for path, part in zip(files[-1], photo(name), strict=True):
            write_image(path, part)
    pairs, rows = photo_pairs_of(files), []
    for number, pair in enumerate(pairs):
        real, mask = pair.load(24)
        composite = paste(np.full_like(real, number), real, mask)
        line = write_composite(folder / "candidates", pair.subset, pair.name, "g3", composite, ".png")
        rows += [(*pair.key, folder / "candidates" / line, kept) for kept in (True, False)]
    return pairs, pd.DataFrame(rows, columns=["subset", "pair", "path", "kept"])


def test_human_harmony(tmp_path):
    pairs, choices = human(tmp_path, [f"woman-{n:02d}" for n in range(25)])
    sources, dropped = {"woman_03": ("a museum", "CC0")}, {"small": [], "plain": ["x", "y"]}
    counts = build_human_harmony(pairs, choices, tmp_path / "out", 0, 24, sources, dropped=dropped)
    assert (counts["photos"], counts["train"], counts["test"]) == (25, 22, 3)
    train, test = (read_triples(tmp_path / "out", split) for split in ("train", "test"))
    assert len({t.photo for t in train}) == 22 and not {t.photo for t in train} & {t.photo for t in test}
    for triple in (*train, *test):
        composite, mask, real = triple.load()
        assert np.array_equal(composite[~mask], real[~mask]) and not np.array_equal(composite, real)
    assert not audit(tmp_path / "out", workers=1).findings
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("| a museum | CC0 | 1 |", "| not stated | not stated | 24 |", "| 25 | 25 | 22 | 3 | 100% |",
                 "left out: 2 plain.", "drew 2 usable", "7,404"):  # fmt: skip
        assert text in card
    again = tmp_path / "again"
    build_human_harmony(pairs[::-1], choices[::-1], again, 0, size=24)
    assert {t.name for t in read_triples(again, "test")} == {t.name for t in test}


def test_the_split_of_human_harmony(tmp_path, monkeypatch):
    pairs, choices = human(tmp_path, ["a", "b", "c"])
    assert round(29103 * sets.TEST_SHARE) == 2946  # the paper's own
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(sets, "write_json", full)  # the last file of all
        build_human_harmony(pairs, choices, tmp_path / "out", 0, size=24)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    with pytest.raises(HarmonyError, match="training list has no photo left of 1"):
        build_human_harmony(pairs[:1], choices[:2], tmp_path / "one", 0, size=24)
    counts = build_human_harmony(pairs, choices, tmp_path / "out", 0, size=24, test={"a", "b"})
    assert (counts["train"], counts["test"]) == (1, 2)
    assert {t.photo for t in read_triples(tmp_path / "out", "test")} == {"a", "b"}
    assert "7,404" not in (tmp_path / "out" / "README.md").read_text()
    for names, missing in (({"a", "b", "c"}, "training"), ({"x"}, "test")):
        with pytest.raises(HarmonyError, match=f"the {missing} list has no photo"):
            build_human_harmony(pairs, choices, tmp_path / "none", 0, size=24, test=names)


def test_embedded_portraits(tmp_path):
    settings = SimpleNamespace(source="embedded", path=None, pairs=5)
    pairs, sources, test, _ = human_photos(settings, tmp_path, 0)
    assert [p.name for p in pairs] == [f"{n}_1" for n in ("astronaut-000", "gracehopper-000", "astronaut-001",
                                                          "gracehopper-001", "astronaut-002")]  # fmt: skip
    assert {p.photo for p in pairs} == set(sources) == {"astronaut", "gracehopper"} and test == {"gracehopper"}
    windows = [pair.load() for pair in pairs]
    assert len({real.tobytes() for real, _ in windows}) == 5
    assert all(0.02 <= mask.mean() <= 0.8 for _, mask in windows)
    again, *_ = human_photos(settings, tmp_path / "again", 0)
    assert all(np.array_equal(a.load()[0], b[0]) for a, b in zip(again, windows, strict=True))


def test_photos_of_a_folder_and_their_names(tmp_path):
    human(tmp_path, ["a-1", "b"])
    pairs, sources, test, _ = human_photos(SimpleNamespace(source="photos", path=str(tmp_path)), tmp_path / "work", 0)
    assert [p.photo for p in pairs] == ["a_1", "b"] == list(sources) and test is None
    twins = photo_pairs_of([(Path(f"{where}/images/1.jpg"), Path("m")) for where in ("ccp", "coco")])
    assert [pair.photo for pair in twins] == ["ccp_1", "coco_1"]
    with pytest.raises(HarmonyError, match="a_1.jpg: a second photo named a_1"):
        photo_pairs_of([(Path("x/a-1.jpg"), Path("m")), (Path("x/a_1.jpg"), Path("m"))])


def test_clean_photos(tmp_path):
    def pair(name, real, mask):
        write_image(tmp_path / f"{name}.png", real)
        write_image(tmp_path / f"{name}_mask.png", mask)
        return Pair("HumanHarmony", f"{name}_1", name, tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png")

    real, mask = photo("good", 80, 80)
    tiny = np.zeros_like(mask)
    tiny[1:7, 1:7] = True
    pairs = [pair("good", real, mask), pair("tiny", real, tiny), pair("full", real, mask | True),
             pair("small", real[:40], mask[:40])]  # fmt: skip
    kept, dropped = clean_photos(pairs, foreground=(0.001, 0.95))
    assert [p.photo for p in kept] == ["good"]
    assert dropped == {"small": ["small_1"], "foreground": ["tiny_1", "full_1"], "no face": []}
    kept, _ = clean_photos(pairs[:2], factor=4, foreground=(0.001, 0.95))  # a finer grid sees the tiny one
    assert [p.photo for p in kept] == ["good", "tiny"]
    with pytest.raises(HarmonyError, match="no photo is left after cleaning .0 small, 1 foreground, 0 no face"):
        clean_photos(pairs[2:3])
    person, thing = data.astronaut()[:256, 80:336], data.coffee()[:256, :256]
    pairs = [pair(name, picture, np.eye(256) > 0) for name, picture in (("person", person), ("thing", thing))]
    kept, dropped = clean_photos(pairs, foreground=(0, 1), factor=1, faces=True)
    assert [p.photo for p in kept] == ["person"] and dropped["no face"] == ["thing_1"]


def test_imaterialist_photos(tmp_path):
    for name in ("abc", "plain"):
        write_image(tmp_path / "train" / f"{name}.jpg", photo(name, 80, 70)[0])
    write_image(tmp_path / "train" / "plain.jpg", np.full((80, 70, 3), 250, np.uint8))
    rows = "".join(f"{name},801 2000,80,70,0\n{name},3001 800,80,70,31\n" for name in ("abc", "plain"))
    write_image(tmp_path / "train" / "bad.jpg", photo("bad", 80, 70)[0])
    rows += "bad,9000 2,80,70,0\n"
    (tmp_path / "train.csv").write_text("ImageId,EncodedPixels,Height,Width,ClassId\n" + rows)
    settings = SimpleNamespace(source="imaterialist", path=str(tmp_path), pairs=0)
    pairs, sources, test, left_out = human_photos(settings, tmp_path / "work", 0)
    assert [p.photo for p in pairs] == ["abc", "plain"] == list(sources) and test is None
    assert "iMaterialist" in sources["abc"][0] and pairs[0].load()[1].sum() == 2800  # the union of two segments
    assert len(left_out) == 1 and "bad: run lengths" in left_out[0]
    assert clean_photos(pairs)[0] == pairs
    with pytest.raises(HarmonyError, match="0 small, 0 foreground, 2 no face"):
        clean_photos(pairs, faces=True)
