"""The recipes for batches against those for single pictures, and the trainings of pretrained/gpu, two steps of each."""

import numpy as np
import pytest
import torch
from conftest import COLOUR, save_resunet
from PIL import Image

from harmonylib.core.seeds import rng
from harmonylib.data import recipes as singles
from harmonylib.data import transfers
from harmonylib.data.iharmony4_statistics import GENUINE, LEVELS
from harmonylib.models import edge_features
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.models.resunet import ContrastiveResUNet
from pretrained.gpu import diffharmony, recipes, resunet
from pretrained.gpu.photos import read_photos

CPU = torch.device("cpu")


def picture(seed, size=64):
    """HxWx3 uint8 of smooth colours with some grain, and an HxW bool mask of a random ellipse."""
    draw = rng("picture", seed)
    coarse = torch.from_numpy(draw.uniform(0.1, 0.9, (1, 3, 1, 1)) + draw.uniform(-0.3, 0.3, (1, 3, 4, 4)))
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0].permute(1, 2, 0).numpy()
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    (y, x), (h, w) = draw.uniform(-0.5, 0.5, 2), draw.uniform(0.2, 0.6, 2)
    grain = draw.normal(0, 0.03, image.shape)
    return np.uint8((image + grain).clip(0, 1) * 255), ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    for name in ("images", "masks"):
        (path / name).mkdir()
    for number in range(40):
        image, mask = picture(number)
        Image.fromarray(image).save(path / f"images/{number}.png")
        Image.fromarray(mask).save(path / f"masks/{number}.png")
    return path


@pytest.fixture(scope="module")
def photos(folder):
    return read_photos(folder, size=48, pieces=8)


def batched(array) -> torch.Tensor:
    """NxC -> 1xCxN float32."""
    return torch.from_numpy(np.float32(array)).T[None]


@pytest.mark.parametrize("recipe", recipes.EDITS)
def test_edits_equal_those_of_arrays(recipe):
    for seed in range(5):
        image, mask = picture(seed)
        pixels, places = np.float32(image[mask]) / 255, singles._places(mask)
        parameters = 1.5 * singles.draw_parameters(singles.EDITS[recipe], rng(seed))
        looks = [torch.from_numpy(x).view(1, 2, 1) for x in (places.mean(0), places.std(0))]
        given = batched(pixels), batched(places), *looks, torch.from_numpy(np.float32(parameters))[None]
        expected = singles.EDITS[recipe](pixels, places, parameters)
        assert np.abs(recipes.EDITS[recipe](*given)[0].T.numpy() - expected).max() < 1 / 255


@pytest.mark.parametrize("name", ("reinhard", "xiao_ma", "distribution"))
def test_transfers_equal_those_of_arrays(name):
    single = transfers.TRANSFERS[name.replace("_", "-")]
    for seed in range(5):
        (image, mask), (other, region) = picture(seed), picture(seed + 100)
        own, reference = np.float32(image[mask]) / 255, np.float32(other[region]) / 255
        found = getattr(recipes, name)(batched(own), batched(own), batched(reference))[0].T.numpy()
        off = np.abs(found - single(np.float64(own), np.float64(reference))) * 255
        assert off.mean() < 1.5 if name == "distribution" else off.max() < 1


def test_strengths_are_the_genuine_ones(photos):
    composites = recipes.Composites(photos, 400, 0, CPU, restyle=0, jitter=0, weak=0)
    batch = composites(0)
    change = ((batch["composite"] - batch["real"]) * 127.5).square()
    assert not (change * (1 - batch["mask"])).any() and batch["mask"].flatten(1).any(1).all()
    fmse = change.sum((1, 2, 3)) / (3 * batch["mask"].sum((1, 2, 3)))
    for recipe, rows in composites.quarters.items():
        ratio = np.quantile(fmse[rows], LEVELS) / GENUINE[recipe].fmse
        assert (np.abs(ratio[1:4] - 1) < 0.25).all(), recipe
    levels = (batch["composite"] + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-2, rtol=0)


def test_jittered_masks_and_soft_edges(photos):
    batch = recipes.Composites(photos, 64, 1, CPU, jitter=1.0)(0)
    near = torch.nn.functional.max_pool2d(batch["mask"], 5, 1, 2)
    assert not ((batch["composite"] - batch["real"]).abs() * (1 - near)).any()
    composites, masks = recipes.Composites(photos, 64, 1, CPU), batch["mask"]
    composites.draws.manual_seed(0)
    jittered = composites._jittered(masks)
    drawn = torch.randint(-3, 4, (64, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    for by, mask, found in zip(drawn, masks, jittered, strict=True):
        assert np.array_equal(found[0].numpy() > 0.5, singles.jitter(mask[0].numpy() > 0.5, Always(int(by))))
    composites.draws.manual_seed(0)
    blurred, sigma = (
        composites._blurred(masks),
        0.4 + 0.6 * torch.rand(64, 1, generator=composites.draws.manual_seed(0)),
    )
    black, white = np.zeros((48, 48, 3), np.uint8), np.full((48, 48, 3), 255, np.uint8)
    expected = singles.soften(white, black, masks[0, 0].numpy() > 0.5, float(sigma[0]))[..., 0]
    assert np.abs(blurred[0, 0].numpy() * 255 - expected).max() <= 0.51


class Always:
    """A generator that draws one number."""

    def __init__(self, number):
        self.integers = lambda *bounds: number


def test_pixels_are_those_drawn_row_by_row():
    draws = torch.Generator().manual_seed(0)
    sides = torch.randint(0, 64, (12, 2, 1, 1), generator=draws)
    at = torch.arange(64)
    regions = (at[:, None] < sides[:, 0]) & (at < sides[:, 1])
    regions[0], regions[1], regions[2] = True, False, at.eq(5) & at[:, None].lt(3)
    for count in (1, 128, 256):
        assert torch.equal(edge_features._draw_at_once(regions, count), edge_features.draw_pixels(regions, count))
        full = regions[regions.flatten(1).sum(1) >= count]
        ways = (edge_features._draw_at_once, edge_features.draw_pixels)
        assert torch.equal(*(draw(full, count, torch.Generator().manual_seed(1)) for draw in ways))


def test_two_steps_of_each_training(folder, tmp_path):
    tiny = {"size": 64, "pieces": 2, "device": "cpu"}
    start = save_resunet(tmp_path / "start", **COLOUR)
    resunet.main(folder, tmp_path / "resunet", start=start, steps=2, batch_size=4, **tiny)
    before, after = (ContrastiveResUNet.from_pretrained(path).state_dict() for path in (start, tmp_path / "resunet"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    diffharmony.main(folder, tmp_path / "one", steps=(2, 2, 2, 2), batch_sizes=(6, 4, 4, 4), **tiny)
    diffharmony.main(
        folder, tmp_path / "two", start=tmp_path / "one", minutes=(0, 0, 1e-3, 0), batch_sizes=(6, 4, 4, 4), **tiny
    )
    for path in (tmp_path / "one/base", tmp_path / "one/diffharmony++", tmp_path / "two/diffharmony++"):
        image, mask = picture(0)
        pipeline = DiffHarmonyPipeline.from_pretrained(path, device="cpu")
        assert pipeline(Image.fromarray(image), mask).images[0].size == (64, 64)
