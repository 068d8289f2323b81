"""The evidence run: its sets, what it notices, the power note and what the page of claims reads."""

import numpy as np
import pandas as pd
import pytest

from ablations import evidence
from ablations.control import recipe_extras
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import write_image
from harmonylib.core.json_files import read_json, write_json
from harmonylib.data.layout import read_triples
from harmonylib.data.recipes import DEFAULTS
from harmonylib.evaluation.published import load
from report.claims import CLAIMS, OUT_OF_REACH, measure_evidence, read_evidence
from report.power import REACH, as_table, power_note


@pytest.fixture
def photos(tmp_path):
    """A folder of 16 photos and its index: 8 for training, 4 test photos of people, 4 of another domain."""
    rows, draw = [], np.random.default_rng(0)
    for number in range(16):
        image = draw.integers(60, 200, size=(40, 48, 3)).astype(np.uint8)
        mask = np.zeros((40, 48), bool)
        mask[8:30, 10 : 24 + number] = True
        write_image(tmp_path / f"photos/images/p{number}.png", image)
        write_image(tmp_path / f"photos/masks/p{number}.png", mask)
        split = "train" if number < 8 else "test" if number < 12 else "other"
        rows.append({"image": f"images/p{number}.png", "mask": f"masks/p{number}.png", "split": split, "set": split})
    write_image(tmp_path / "photos/masks/p0b.png", ~mask)
    rows.append(rows[0] | {"mask": "masks/p0b.png"})  # a second mask of a photo
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    return tmp_path / "photos"


@pytest.fixture
def made(photos, monkeypatch):
    for name, value in (
        ("PAIRS", 4),
        ("TEST_PAIRS", 3),
        ("OTHER_PAIRS", 2),
        ("SMALL", {"HFlickr": 3, "Hday2night": 1}),
    ):
        monkeypatch.setattr(evidence, name, value)
    root = photos.parent / "evidence"
    return root, evidence.make_sets(photos, [photos.parent / "index.csv"], ["test"], root)


def test_sets_are_split_by_photo_cut_and_labelled(photos, made, capsys):
    root, about = made
    train, test = (read_triples(root, split) for split in ("train", "test"))
    assert not {t.photo for t in train} & {t.photo for t in test}
    counts = about["benchmark"]["train_composites"]
    assert counts == {
        "HCOCO": 8,
        "HAdobe5k": 8,
        "HFlickr": 3,
        "Hday2night": 1,
    }  # two of each pair, and the small sets cut
    assert len(test) == 12 and all(t.name.endswith("_1") for t in test)
    assert {t.photo for t in read_triples(root / "other", "test")} <= {f"p{n}" for n in range(12, 16)}
    assert {t.photo for t in read_triples(root / "people", "test")} <= {f"p{n}" for n in range(8, 12)}
    assert len(about["shares"]) == 4 and about["benchmark"]["test_photos"] <= 4
    assert len(evidence.rows_of(photos, [photos.parent / "index.csv"])) == 16  # one mask a photo


def test_the_same_photos_are_taken_up_and_changed_ones_noticed(photos, made):
    root, about = made
    before = (root / "IHD_train.txt").stat().st_mtime_ns
    assert evidence.make_sets(photos, [photos.parent / "index.csv"], ["test"], root) == about
    assert (root / "IHD_train.txt").stat().st_mtime_ns == before
    write_image(photos / "images/p3.png", np.zeros((40, 48, 3), np.uint8))
    with pytest.raises(HarmonyError, match="not the photos that .* was made of"):
        evidence.make_sets(photos, [photos.parent / "index.csv"], ["test"], root)


def test_a_bad_index_is_named(photos):
    with pytest.raises(HarmonyError, match="none.csv: No such file"):
        evidence.rows_of(photos, [photos / "none.csv"])
    (photos / "bad.csv").write_text("image,split\na,b\n")
    with pytest.raises(HarmonyError, match="bad.csv: no rows, or no columns image, mask and split"):
        evidence.rows_of(photos, [photos / "bad.csv"])


def test_the_control_has_as_many_composites_of_the_same_pairs(made, tmp_path):
    triples = read_triples(made[0], "train", ["HFlickr"])
    extras = recipe_extras(triples, 5, tmp_path / "extras", DEFAULTS, 0)
    assert len({t.composite.read_bytes() for t in extras}) == 5
    assert {t.pair for t in extras} == {t.pair for t in triples}
    for triple in extras:
        composite, mask, real = triple.load()
        assert np.abs(composite.astype(int) - real)[mask].mean() > np.abs(composite.astype(int) - real)[~mask].mean()
    again = recipe_extras(triples, 5, tmp_path / "again", DEFAULTS, 0)
    assert [t.composite.read_bytes() for t in extras] == [t.composite.read_bytes() for t in again]


def ablation(effect, low, high):
    difference = {"after": "2: L1 + Lpixel", "before": "1: L1", "metric": "psnr", "subset": "all", "photos": 300}
    return {"profile": "evidence", "rows": {}, "n": 400, "photos": 300,
            "differences": [difference | {"improvement": effect, "interval": [low, high]}]}  # fmt: skip


def test_power_and_verdicts(tmp_path):
    """Published for row 2 of Table VI: what 300 photos can show of it, and what becomes of it where they cannot."""
    claim = next(claim for claim in CLAIMS if claim.text == "The foreground loss helps")
    row = {}
    for width in (0.1, 20.0):
        write_json(tmp_path / "pilot/table_VI.json", ablation(0.0, -width, width))
        note = power_note(read_evidence(tmp_path / "pilot"))
        write_json(tmp_path / "power.json", note)
        row[width] = next(row for row in note["claims"] if row["claim"] == claim.text)
        assert row[width]["smallest_effect"] == pytest.approx(2 * width * REACH, abs=1e-3)
        assert "The foreground loss helps | " in as_table(note)
    assert not row[0.1]["out_of_reach"] and row[20.0]["out_of_reach"]
    assert "table_VI" not in evidence.skipped(tmp_path / "power.json")  # other claims of it are unknown
    files = read_evidence(tmp_path)
    assert measure_evidence(claim, files, load())["verdict"] == OUT_OF_REACH
    write_json(tmp_path / "table_VI.json", ablation(-0.3, -0.5, -0.1) | {"evidence": {"hours": 0.5}})
    found = measure_evidence(claim, read_evidence(tmp_path), load())
    assert (found["verdict"], found["hours"], found["photos"]) == ("the opposite shows", 0.5, 300)
    assert read_json(tmp_path / "power.json")["power"] == 0.8


def test_the_shipped_weights_stand_for_the_main_chain(tmp_path):
    part = {"n": 9, "photos": 30, "psnr": [1.0, 0.5, 1.5]}
    write_json(
        tmp_path / "shipped.json", {"profile": "evidence", "paired": {"diffharmony++ vs composite": {"all": part}}}
    )
    assert measure_evidence(CLAIMS[0], read_evidence(tmp_path), load())["verdict"] == "holds here"
