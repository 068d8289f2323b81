import weakref

import numpy as np
import pytest
import torch

from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError
from harmonylib.data import layout
from harmonylib.data.batches import TripleSet
from harmonylib.evaluation import methods as evaluate
from harmonylib.evaluation.methods import Method
from harmonylib.evaluation.metrics import METRICS, score
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.models.vae import HarmonyVAE
from harmonylib.training import TrainingDiverged

SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six composites of three photos in two subsets; the fourth equals its real image, files are PNG."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    lines = []
    for number, (subset, photo) in enumerate([(s, p) for s in ("HCOCO", "HFlickr") for p in ("a", "b", "c")]):
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


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    vae = build_autoencoder([8, 8, 16])
    unet = build_unet([32, 32])
    prompt = PromptEmbedding(1, unet.config.cross_attention_dim)
    return DiffHarmonyPipeline(HarmonyVAE.from_vae(vae), unet, DDPMScheduler(prediction_type="v_prediction"), prompt)


@pytest.fixture(scope="module")
def resunet():
    torch.manual_seed(0)
    model = ContrastiveResUNet(4, 3, 0)
    torch.nn.init.normal_(model.residual_head.weight, std=0.05)
    return evaluate.put_on(model, "cpu")


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


def test_every_method_covers_every_image_once(data, pipeline, resunet):
    methods = [
        evaluate.identity_method(),
        *map(evaluate.classical_method, evaluate.CLASSICAL),
        evaluate.diffusion_method(pipeline, "diffharmony++", seed=0, steps=2),
        evaluate.resunet_method(resunet, precision="fp32"),
    ]
    table = evaluate.evaluate(methods, data, batch_size=4)
    assert len(table) == len(methods) * len(data)
    assert not table.duplicated(["model", "subset", "name"]).any()
    assert list(table["model"].unique()) == [m.name for m in methods]
    assert np.isfinite(table[["mse", "fmse", "ssim", "fssim"]].to_numpy()).all()
    assert table["bmse"].eq(0).all()  # the composites differ from the real images in the foreground only


def test_classical_methods_change_the_foreground_only(data):
    method = evaluate.classical_method("mean-std")
    batch = data.batch([0, 1])
    changed = (method.call(batch["composite"], batch["mask"], ["x", "y"]) - batch["composite"]).abs()
    inside = batch["mask"] > 0.5
    assert (changed * ~inside).max() < 1e-6 and (changed * inside).max() > 0.01


def test_diffusion_noise_belongs_to_the_image_not_to_the_batch(data, pipeline):
    method = evaluate.diffusion_method(pipeline, "diffharmony++", seed=0, steps=2)
    whole = outputs(method, data).astype(int)
    assert np.abs(whole - outputs(method, data, batch_size=2)).max() <= 1  # fp32 differs by 1e-6 between batch sizes
    other = outputs(evaluate.diffusion_method(pipeline, "diffharmony++", seed=1, steps=2), data)
    assert np.abs(whole - other).max() > 1


@pytest.mark.parametrize("kind", ["diffusion", "resunet"])
def test_models_may_run_at_another_size(data, pipeline, resunet, kind):
    if kind == "diffusion":
        method = evaluate.diffusion_method(pipeline, kind, seed=0, size=16, steps=1)
    else:
        method = evaluate.resunet_method(resunet, size=16, precision="fp32")
    batch = data.batch(range(2))
    output = method.call(batch["composite"], batch["mask"], ["x", "y"])
    assert output.shape == batch["composite"].shape and output.abs().max() <= 1


def test_resize_is_antialiased_and_keeps_what_fits():
    image = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    assert evaluate.resize(image, SIZE) is image and evaluate.resize(image, None) is image
    stripes = torch.ones(1, 3, SIZE, SIZE)
    stripes[..., ::2] = -1
    assert evaluate.resize(stripes, SIZE // 4)[..., 1:-1].abs().max() < 0.1
    mask = (torch.rand(1, 1, SIZE, SIZE) > 0.5).float()
    assert set(evaluate.resize_pair(image, mask, 12)[1].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "broken",
    [
        lambda composite, mask, names: composite * float("nan"),
        lambda composite, mask, names: composite[..., :16, :16],
        lambda composite, mask, names: composite[:1],
    ],
    ids=["nan", "size", "count"],
)
def test_broken_predictions_are_errors_naming_the_method(data, broken):
    with pytest.raises(HarmonyError, match="broken"):
        evaluate.evaluate([Method("broken", broken)], data)


def test_memory_is_bounded_by_the_batch_not_by_the_set(data):
    alive, most = weakref.WeakSet(), []

    def call(composite, mask, names):
        alive.add(output := composite.clone())
        most.append(len(alive))
        return output

    evaluate.evaluate([Method("counted", call)], data, batch_size=1)
    assert len(most) == len(data) and max(most) <= 2 and not alive  # the batch in work and the one before it


def test_put_on_gives_an_evaluating_model():
    model = evaluate.put_on(ContrastiveResUNet(4, 2, 0).train(), "cpu")
    assert not model.training and next(model.parameters()).device.type == "cpu"


def test_stored_outputs_are_handed_out_in_order_and_must_be_finite():
    images = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 2, 2) / 24
    method = evaluate.stored_method("stored", images)
    assert torch.equal(method.call(None, None, ["a"])[0], torch.from_numpy(images[0]))
    assert torch.equal(method.call(None, None, ["b"])[0], torch.from_numpy(images[1]))
    with pytest.raises(TrainingDiverged, match="broken: the outputs are not finite"):
        evaluate.stored_method("broken", images * np.nan)
