from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonylib.core import cache
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, write_image
from harmonylib.data import batches
from harmonylib.data.batches import LatentBatches, PhotoBatches, PixelBatches, TripleSet, load_pairs, prefetched
from harmonylib.data.layout import read_triples, write_composite, write_list, write_pair
from harmonylib.data.readers import photo_pairs
from harmonylib.data.recipes import RecipeSettings


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three composites of two pairs of 40x48 pixels; the cache lies in tmp_path."""
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    draw, lines = np.random.default_rng(0), []
    for photo, variants in (("a", 2), ("b", 1)):
        real = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        mask = np.zeros((40, 48), bool)
        mask[8:30, 10:30] = True
        pair = write_pair(tmp_path, "HFlickr", photo, 1, real, mask, suffix=".png")
        for variant in range(variants):
            composite = np.where(mask[..., None], 255 - real, real).astype(np.uint8)
            lines.append(write_composite(tmp_path, "HFlickr", pair, variant, composite, suffix=".png"))
    write_list(tmp_path, "train", lines)
    return read_triples(tmp_path, "train")


def test_triples_share_their_real_image(data):
    triples = TripleSet(data, 32)
    assert len(triples) == 3 and triples.reals.shape == (2, 32, 32, 3) and triples.real_of.tolist() == [0, 0, 1]
    batch = triples.batch([0, 2])
    assert batch["mask"].unique().tolist() == [0, 1] and batch["composite"].abs().max() <= 1
    outside = (batch["mask"] == 0).expand(-1, 3, -1, -1)
    agree = (batch["composite"] - batch["real"]).abs()[outside] < 0.02
    assert agree.float().mean() > 0.8  # the resize blends along the mask's edge


def test_caches_are_made_once_and_keyed_by_content(data, tiny_vae, monkeypatch):
    first = TripleSet(data, 32)
    first.composites  # noqa: B018
    moments = cache.moments(tiny_vae, first.files["composite"], "cpu")
    files = sorted(cache.ROOT.glob("*.npy"))
    monkeypatch.setattr(cache, "read_image", lambda path: pytest.fail("decoded twice"))
    again = TripleSet(data, 32)
    assert np.array_equal(first.composites, again.composites)
    assert sorted(cache.ROOT.glob("*.npy")) == files and not list(cache.ROOT.glob(".*"))
    torch.nn.init.zeros_(tiny_vae.quant_conv.weight)
    monkeypatch.setattr(cache, "read_image", read_image)
    other = cache.moments(tiny_vae, first.files["composite"], "cpu")  # other weights, other entry
    assert not np.array_equal(other, moments)
    assert cache.clear() > 0 and not cache.ROOT.exists()


def test_what_needs_no_pixels_or_is_large_stores_none(data, tiny_vae, monkeypatch):
    """Training the UNet on cached latents keeps masks and moments; above STORED pixels a set decodes when asked."""
    LatentBatches(TripleSet(data, 32), tiny_vae, "harmonize", 2, "test", pixels=False)(0)
    kinds = sorted(np.load(path, mmap_mode="r").dtype.name for path in cache.ROOT.glob("*.npy"))
    assert kinds == ["bool", "float16", "float16"]
    stored = TripleSet(data, 64).batch([0, 2])
    files = sorted(cache.ROOT.glob("*.npy"))
    monkeypatch.setattr(batches, "STORED", 48)
    large = TripleSet(data, 64).batch([0, 2])
    assert all(torch.equal(large[name], value) for name, value in stored.items())
    assert sorted(cache.ROOT.glob("*.npy")) == files


def test_moments_of_mirror_images(data, tiny_vae):
    triples = TripleSet(data, 32)
    moments = cache.moments(tiny_vae, triples.files["real"], "cpu")
    image = torch.from_numpy(np.array(triples.reals)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        for mirrored, tensor in enumerate((image, image.flip(-1))):
            expected = tiny_vae.encode(tensor).latent_dist.parameters.numpy()
            assert np.allclose(moments[mirrored], expected, atol=5e-3)


@pytest.mark.parametrize("task", ["harmonize", "inverse"])
@pytest.mark.parametrize(("recolor", "crop", "tolerance"), [(0.0, 0, 5e-3), (1.0, 0, 5e-3), (1.0, 16, 1e-5)])
def test_latent_batches_keep_pixels_and_moments_together(data, tiny_vae, task, recolor, crop, tolerance):
    """Encoding a batch's own pixels gives its moments, mirrored or not; target and condition swap with the task."""
    options = {"batch_size": 8, "seed": "test", "crop": crop}
    batches = LatentBatches(TripleSet(data, 32), tiny_vae, task, recolor=recolor, **options)
    batch, again = batches(3), batches(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        for image, moments in ((batch["target"], batch["moments"]), (batch["condition"], batch["condition_moments"])):
            assert torch.allclose(tiny_vae.encode(image).latent_dist.parameters, moments, atol=tolerance)
    real, made = ("target", "condition") if task == "harmonize" else ("condition", "target")
    fixed = LatentBatches(TripleSet(data, 32), tiny_vae, task, **options)(3)
    assert torch.equal(batch[real], fixed[real]) and torch.equal(batch[made], fixed[made]) == (recolor == 0)
    inside = (batch["mask"] > 0).expand(-1, 3, -1, -1)
    assert recolor or (batch["target"] - batch["condition"]).abs()[inside].mean() > 0.1
    bare = LatentBatches(TripleSet(data, 32), tiny_vae, task, pixels=False, recolor=recolor, **options)(3)
    assert set(bare) == {"mask", "moments", "condition_moments"} and torch.equal(bare["moments"], batch["moments"])


def test_whole_real_images_are_encoded_once(data, tiny_vae, monkeypatch):
    batches = LatentBatches(TripleSet(data, 32), tiny_vae, "harmonize", 2, "test", recolor=1.0)
    seen, encode = [], tiny_vae.encode
    monkeypatch.setattr(tiny_vae, "encode", lambda images: seen.append(images) or encode(images))
    batch = batches(0)
    assert len(seen) == 1 and torch.equal(seen[0], batch["condition"])


def test_the_next_batch_is_made_in_one_thread_and_the_trainings_precision():
    threads, device = torch.get_num_threads(), torch.device("cpu")
    a = torch.full((2, 2), 1 + 2**-12)  # 1 in bf16

    def batches(step):
        return {"x": a @ torch.eye(2), "threads": torch.tensor(torch.get_num_threads())}

    torch.set_num_threads(2)
    for precision, kept in (("fp32", True), ("fp16", True), ("bf16", False)):
        ((step, batch),) = prefetched(batches, range(3, 4), device, precision)
        assert step == 3 and batch["threads"] == 1 and torch.get_num_threads() == 2
        assert (batch["x"].float().max() > 1) == kept
    with ThreadPoolExecutor(1) as pool:  # a thread that starts later is as before
        assert pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(threads)


def test_prefetching_leaves_a_steps_cast_weights_alone():
    weight, x = torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2)

    def cast(y):
        return next(node for node, _ in y.grad_fn.next_functions if node)

    with torch.autocast("cpu", torch.bfloat16):
        first = x @ weight
        list(prefetched(lambda step: {"x": x @ weight.detach()}, range(2), torch.device("cpu"), "bf16"))
        assert cast(x @ weight) is cast(first)


def test_latent_crops_are_aligned(data, tiny_vae):
    batch = LatentBatches(TripleSet(data, 32), tiny_vae, "harmonize", 4, "test", crop=16)(0)
    assert batch["target"].shape[-2:] == (16, 16) and batch["moments"].shape[-2:] == (2, 2)


def test_composites_are_decoded_only_where_they_are_used(data):
    triples = TripleSet(data, 32)
    key = triples.key(composites=False)
    batch = PixelBatches(triples, 4, "test", recolor=1.0)(0)
    assert "composites" not in vars(triples) and not torch.equal(batch["composite"], batch["real"])
    PixelBatches(triples, 4, "test", recolor=0.5)
    assert "composites" in vars(triples) and triples.key() != key == triples.key(composites=False)


def test_a_key_tells_data_and_options_apart(data):
    options = [{}, {"recolor": 1.0}, {"recolor": 1.0, "recipes": RecipeSettings(transfers=["xiao-ma"])}, {"crop": 16}]
    batches = [PixelBatches(TripleSet(data, 32), 4, "test", **some) for some in options]
    batches += [PixelBatches(TripleSet(data, 24), 4, "test"), PixelBatches(TripleSet(data[:2], 32), 4, "test")]
    renamed = [replace(triple, subset="HCOCO") for triple in data]  # whose composites another recipe makes
    batches += [PixelBatches(TripleSet(renamed, 32), 4, "test")]
    assert len({str(some.key) for some in batches}) == len(batches)
    assert PixelBatches(TripleSet(data, 32), 4, "test").key == batches[0].key


def test_a_share_is_recoloured_by_the_subsets_recipe_and_the_settings(data, monkeypatch):
    calls = []

    def recolor(recipe, real, mask, rng, reference, settings, fmse):
        calls.append((recipe, settings))
        return real

    monkeypatch.setattr("harmonylib.data.batches.recolor", recolor)
    settings = RecipeSettings(transfers=["xiao-ma"])
    batches = PixelBatches(TripleSet(data, 32), 8, "test", recolor=0.5, recipes=settings)
    for step in range(8):
        batch = batches(step)
    assert all(call == ("HFlickr", settings) for call in calls) and 16 < len(calls) < 48
    assert batch["composite"].shape == batch["real"].shape


def test_jittered_masks_move_and_edges_are_soft(data):
    plain, jittered = (PixelBatches(TripleSet(data, 32), 8, "test", recolor=1.0, jitter=j)(0) for j in (0.0, 1.0))
    sizes = jittered["mask"].sum((1, 2, 3)) - plain["mask"].sum((1, 2, 3))
    assert (sizes > 0).any() and (sizes < 0).any() and torch.equal(plain["real"], jittered["real"])
    assert set(jittered["mask"].unique().tolist()) == {0, 1}
    changed = (jittered["composite"] != jittered["real"]).any(1, keepdim=True)
    near = torch.nn.functional.max_pool2d(jittered["mask"], 5, 1, padding=2) > 0
    assert (changed & (jittered["mask"] == 0)).any() and not (changed & ~near).any()  # pixels beside the edge, no more


def test_restyled_photos_keep_composite_and_background_together(data):
    plain, restyled = (PixelBatches(TripleSet(data, 32), 4, "test", recolor=1.0, restyle=s)(0) for s in (0.0, 1.0))
    assert not torch.equal(plain["real"], restyled["real"]) and torch.equal(plain["mask"], restyled["mask"])
    for batch in (plain, restyled):
        outside = (batch["mask"] == 0).expand_as(batch["real"])
        assert torch.equal(batch["composite"][outside], batch["real"][outside])
        assert not torch.equal(batch["composite"], batch["real"])


def test_pixel_batches_crop_and_flip_each_triple_by_itself(data):
    triples = TripleSet(data, 32)
    triples.composites = triples.reals = np.broadcast_to(
        np.arange(32 * 32 * 3).reshape(1, 32, 32, 3) % 251, (99, 32, 32, 3)
    )
    batch = PixelBatches(triples, 8, "test", crop=24)(0)
    assert torch.equal(batch["composite"], batch["real"]) and batch["mask"].shape == (8, 1, 24, 24)
    assert len({tuple(image.flatten().tolist()) for image in batch["real"]}) > 2  # not one window, mirrored or not
    for crop in (0, 32):  # a window as large as the picture leaves no room
        as_it_is = {tuple(x.flatten().tolist()) for x in PixelBatches(triples, 8, "test", crop, flip=False)(1)["real"]}
        assert as_it_is == {tuple(triples.batch([0])["real"].flatten().tolist())}
        assert len({tuple(x.flatten().tolist()) for x in PixelBatches(triples, 8, "test", crop)(1)["real"]}) == 2
    with pytest.raises(HarmonyError, match="crop 33"):
        PixelBatches(triples, 4, "test", crop=33)


def test_photos_with_masks_are_cropped_together(tmp_path):
    for name in ("one", "two"):  # the mask is drawn into the picture: wherever a crop lands, both agree
        mask = np.hypot(*np.mgrid[-1:1:60j, -1:1:80j]) < 0.6
        write_image(tmp_path / "images" / f"{name}.png", mask[..., None].repeat(3, axis=2).astype(np.uint8) * 255)
        write_image(tmp_path / "masks" / f"{name}.png", mask)
    pairs = load_pairs(photo_pairs(tmp_path), longest=40)
    assert len(pairs) == 2 and pairs[0][0].shape == (30, 40, 3)
    batch = PhotoBatches(pairs, 16, 8, "test")(0)
    assert batch["real"].shape == (8, 3, 16, 16) and set(batch["mask"].unique().tolist()) == {0, 1}
    assert ((batch["real"][:, :1] > 0) == (batch["mask"] > 0)).float().mean() > 0.93
    assert len({tuple(mask.flatten().tolist()) for mask in batch["mask"]}) > 4
    masks = PhotoBatches(pairs, 16, 64, "test", inpainting=True)(0)["mask"]
    assert masks.flatten(1).any(1).all() and set(masks.unique().tolist()) == {0, 1}  # something is to be painted
