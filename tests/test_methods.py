import itertools
import weakref

import numpy as np
import pytest
import torch

from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import write_image
from harmonylib.data import layout
from harmonylib.data.batches import TripleSet
from harmonylib.evaluation import methods as evaluate
from harmonylib.evaluation.methods import Method
from harmonylib.evaluation.metrics import METRICS, score
from harmonylib.models.diffusion import latent_mask
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.training import TrainingDiverged

SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six composites of three photos in two subsets; the fourth equals its real image, files are PNG."""
    root, rng, lines = tmp_path_factory.mktemp("set"), np.random.default_rng(0), []
    for number, (subset, photo) in enumerate(itertools.product(("HCOCO", "HFlickr"), "abc")):
        real = rng.integers(40, 200, (SIZE, SIZE, 3)).astype(np.uint8)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[4 : 10 + 2 * number, 6:26] = True
        composite = np.where(mask[..., None] & (number != 3), real + 20, real).astype(np.uint8)
        pair = layout.write_pair(root, subset, f"{photo}-1", 1, real, mask, ".png")
        lines.append(layout.write_composite(root, subset, pair, 1, composite, ".png"))
    layout.write_list(root, "test", lines)
    before, cache.ROOT = cache.ROOT, root / "cache"
    yield TripleSet(layout.read_triples(root, "test"), SIZE)
    cache.ROOT = before


@pytest.fixture
def resunet():
    torch.manual_seed(0)
    model = ContrastiveResUNet(4, 3, 0).eval()
    torch.nn.init.normal_(model.residual_head.weight, std=0.05)
    return model


def outputs(method, data, batch_size=16):
    return np.array([row[-1] for row in evaluate.predict(method, data, batch_size)])


def test_predict_yields_the_files_and_pastes_the_background(data):
    invert = Method("invert", lambda composite, mask, names: -composite)
    for triple, composite, mask, real, output in evaluate.predict(invert, data, batch_size=4):
        on_disk = triple.load()
        assert all(np.array_equal(a, b) for a, b in zip((composite, mask, real), on_disk, strict=True))
        assert np.array_equal(output[~mask], composite[~mask])
        assert np.array_equal(output[mask], 255 - composite[mask])


def test_identity_scores_are_those_of_the_composite(data):
    table = evaluate.evaluate([evaluate.identity_method()], data)
    assert list(table["name"]) == [t.name for t in data.triples]
    assert list(table["photo"]) == ["a", "b", "c"] * 2 and set(table["subset"]) == {"HCOCO", "HFlickr"}
    for row, triple in zip(table.to_dict("records"), data.triples, strict=True):
        composite, mask, real = triple.load()
        expected = score(composite, real, mask, "standard")
        assert all(row[m] == pytest.approx(expected[m], nan_ok=True) for m in METRICS)
        assert row["foreground_ratio"] == pytest.approx(mask.mean())
    assert table["fmse"][0] == pytest.approx(400) and table["mse"][3] == 0 and np.isinf(table["psnr"][3])


def test_one_output_is_scored_under_every_protocol(data):
    seen = []
    whiten = Method("whiten", lambda composite, mask, names: seen.append(len(names)) or composite * 0 + 0.999)
    table = evaluate.evaluate([whiten], data, protocols=("standard", "diffharmony"))
    assert sum(seen) == len(data) and set(table["scored_at"]) == {SIZE}
    standard, published = (table[table["protocol"] == name].reset_index() for name in ("standard", "diffharmony"))
    for number, triple in enumerate(data.triples):
        _, mask, real = triple.load()
        white = np.full(real.shape, 254.8725, np.float32)
        expected = score(
            white, real, mask, "diffharmony"
        )  # 254 in the foreground, the real background: standard has 255
        assert all(published[m][number] == pytest.approx(expected[m]) for m in ("mse", "psnr", "fmse"))
        assert standard["fmse"][number] == pytest.approx(score(white, real, mask, "standard")["fmse"])
    assert (published["bmse"] == 0).all() and (standard["fmse"] > published["fmse"]).all()


def test_every_method_covers_every_image_once(data, tiny_pipeline, resunet):
    methods = [
        evaluate.identity_method(),
        *map(evaluate.classical_method, evaluate.CLASSICAL),
        evaluate.diffusion_method(tiny_pipeline, "diffharmony++", seed=0, steps=2),
        evaluate.resunet_method(resunet, precision="fp32"),
    ]
    table = evaluate.evaluate(methods, data, batch_size=4)
    assert len(table) == len(methods) * len(data)
    assert not table.duplicated(["model", "subset", "name"]).any()
    assert list(table["model"].unique()) == [m.name for m in methods]
    assert np.isfinite(table[["mse", "fmse", "ssim", "fssim"]].to_numpy()).all()
    gains = table[table["name"] != "a-1_1_1"].groupby("model", sort=False)["fmse"].mean()
    assert gains.nunique() == len(methods)
    assert table["bmse"].eq(0).all()  # the composites differ from the real images in the foreground only


def test_masks_that_vanish_on_the_latent_grid_are_left_out_of_the_standard_rows_of_every_method(data, tiny_pipeline):
    factor = tiny_pipeline.factor
    for size in (SIZE, SIZE // 2, 12):  # 12: the grid's last cell is cut
        mask = evaluate.resize_pair(*(data.batch(range(6))[part] for part in ("real", "mask")), size)[1]
        side = -(-size // factor)
        padded = torch.nn.functional.pad(mask, [0, side * factor - size] * 2)
        expected = latent_mask(padded, (side, side)).flatten(1).any(1).tolist()
        assert evaluate.visible(data, tiny_pipeline.vae, size).tolist() == expected
        assert evaluate.on_latent_grid(mask, factor).tolist() == expected
    larger = [TripleSet(data.triples[:1], 64), TripleSet(data.triples, 64)]
    assert evaluate.visible(data, tiny_pipeline.vae, 64, larger).all()
    seen = np.arange(6) != 1
    methods = [evaluate.identity_method(), evaluate.classical_method("reinhard")]
    table = evaluate.evaluate(methods, data, protocols=("standard", "diffharmony"), seen=seen)
    names = [triple.name for triple in data.triples]
    for (_, protocol), rows in table.groupby(["model", "protocol"]):
        assert list(rows["name"]) == (names if protocol == "diffharmony" else names[:1] + names[2:]), protocol
    with pytest.raises(HarmonyError, match="all 6 masks vanish on the latent grid; run at a larger size"):
        evaluate.evaluate(methods, data, seen=np.zeros(6, bool))


def test_diffusion_noise_belongs_to_the_image_not_to_the_batch(data, tiny_pipeline):
    method = evaluate.diffusion_method(tiny_pipeline, "diffharmony++", seed=0, steps=2)
    whole = outputs(method, data).astype(int)
    assert np.abs(whole - outputs(method, data, batch_size=2)).max() <= 1  # fp32 differs by 1e-6 between batch sizes
    other = outputs(evaluate.diffusion_method(tiny_pipeline, "diffharmony++", seed=1, steps=2), data)
    assert np.abs(whole - other).max() > 1


def test_models_may_run_at_another_size(data, tiny_pipeline, resunet):
    batch = data.batch(range(2))
    for method in (
        evaluate.diffusion_method(tiny_pipeline, "diffusion", seed=0, size=16, steps=1),
        evaluate.resunet_method(resunet, size=16, precision="fp32"),
    ):
        output = method.call(batch["composite"], batch["mask"], ["x", "y"])
        assert output.shape == batch["composite"].shape and output.abs().max() <= 1


def test_predictions_of_other_methods_are_rows_like_ours(data, tmp_path):
    for number, triple in enumerate(data.triples):
        real = triple.load()[2]
        real = real if number else real.repeat(2, 0).repeat(2, 1)  # of any size
        path = tmp_path / triple.subset / triple.name
        path.parent.mkdir(exist_ok=True)
        np.save(path.with_suffix(".npy"), real.astype(np.float32)) if number else write_image(f"{path}.png", real)
    method = evaluate.external_method("HDNet", tmp_path, data.triples)
    table = evaluate.evaluate([method], data, batch_size=4)
    assert (
        set(table["model"]) == {"HDNet"}
        and len(table) == len(data)
        and table["fmse"][1:].max() < 1e-6 < table["fmse"][0]
    )
    path.with_suffix(".npy").unlink()
    with pytest.raises(HarmonyError, match="1 of 6 predictions are missing"):
        evaluate.external_method("HDNet", tmp_path, data.triples)


@pytest.mark.parametrize("spoil", [lambda x: x * float("nan"), lambda x: x[..., :16, :16], lambda x: x[:1]])
def test_broken_predictions_are_errors_naming_the_method(data, spoil):
    with pytest.raises(HarmonyError, match="broken"):
        evaluate.evaluate([Method("broken", lambda composite, mask, names: spoil(composite))], data)


def test_memory_is_bounded_by_the_batch_not_by_the_set(data):
    alive, most = weakref.WeakSet(), []

    def call(composite, mask, names):
        alive.add(output := composite.clone())
        most.append(len(alive))
        return output

    evaluate.evaluate([Method("counted", call)], data, batch_size=1)
    assert len(most) == len(data) and max(most) <= 2 and not alive  # the batch in work and the one before it


def test_stored_outputs_are_handed_out_in_order_and_must_be_finite():
    images = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 2, 2) / 24
    method = evaluate.stored_method("stored", images)
    assert torch.equal(method.call(None, None, ["a"])[0], torch.from_numpy(images[0]))
    assert torch.equal(method.call(None, None, ["b"])[0], torch.from_numpy(images[1]))
    with pytest.raises(TrainingDiverged, match="broken: the outputs are not finite"):
        evaluate.stored_method("broken", images * np.nan)
