import pytest
import torch

from harmonylib.models.edge_features import (
    DEPTHS,
    INSIDE,
    QUANTILES,
    SIDESTEPS,
    STATISTICS,
    draw_pixels,
    edge_pixels,
    edge_strips,
    region_colours,
)


def half_plane(axis, mirrored, size=64):
    """(image, mask): foreground of one half; red and green tell the column and the row, blue the region."""
    at = torch.arange(size) / size * 2 - 1
    rows, columns = at[:, None].expand(size, size), at[None].expand(size, size)
    mask = ((columns if axis else rows) < 0).float()
    mask = 1 - mask if mirrored else mask
    return torch.stack([columns, rows, mask * 2 - 1])[None], mask[None, None]


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("axis", (0, 1))
def test_strips_across_a_straight_edge_lie_where_they_should(axis, mirrored):
    image, mask = half_plane(axis, mirrored)
    colours, masks, places = edge_strips(image, mask, 40)
    assert colours.shape == (1, 40, len(DEPTHS), len(SIDESTEPS), 3) and masks.shape == colours.shape[:-1]
    assert masks[:, :, :INSIDE].eq(1).all() and masks[:, :, INSIDE:].eq(0).all()
    assert torch.equal(colours[..., 2], masks * 2 - 1)
    pixels = (colours[0, ..., :2] + 1) * 32  # (column, row)
    across, along = pixels[..., 1 - axis], pixels[..., axis]
    outward = -1 if mirrored else 1
    expected = (32 if mirrored else 31) + outward * torch.tensor(DEPTHS, dtype=torch.float32)
    torch.testing.assert_close(across, expected[None, :, None].expand_as(across))
    inner = along[5:-5] - along[5:-5, :, :1]  # away from the border, where strips repeat it
    assert inner.abs().amax((0, 1)).tolist() == [0, 3, 3] and torch.equal(inner[..., 1], -inner[..., 2])
    torch.testing.assert_close(places[0], colours[0, :, DEPTHS.index(0), 0, :2])
    assert places[0, :, axis].unique().numel() == 40


def test_the_pictures_border_is_no_edge():
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[:, 4:, :5] = True
    edge = edge_pixels(inside)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4, :5], expected[4:, 4] = True, True
    assert torch.equal(edge, expected)
    assert not edge_pixels(torch.ones(1, 4, 4, dtype=torch.bool)).any()


def test_pixels_are_spread_evenly_and_repeat_where_there_are_few():
    region = torch.zeros(3, 10, 10, dtype=torch.bool)
    region[0, 2:] = True  # pixels 20 to 99
    region[1].view(-1)[[7, 55]] = True
    drawn = draw_pixels(region, 8)
    assert torch.equal(drawn, draw_pixels(region, 8))
    assert drawn[0].tolist() == list(range(25, 100, 10))
    assert drawn[1].tolist() == [7, 55] * 4 and drawn[2].tolist() == [0] * 8
    seeded, again, other = (draw_pixels(region, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(seeded, again) and not torch.equal(seeded, other)
    assert ((seeded[0] - 20) // 10).tolist() == list(range(8))  # each inside its own eighth


def test_region_colours_are_those_of_each_region():
    image, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., :8] = 1
    image[:, 0], image[:, 1, :, 8:] = 0.5, -0.25
    image[:, 2, :, 8:] = torch.linspace(-1, 1, 32)[:, None]
    found = region_colours(image, mask)
    assert found.shape == (1, STATISTICS)
    one = 3 * QUANTILES + 3 + 9
    foreground, background = found[0, :one], found[0, one:-1]
    torch.testing.assert_close(foreground, torch.cat([torch.full((QUANTILES,), 0.5), torch.zeros(one - QUANTILES)]))
    ramp = background[2 * QUANTILES : 3 * QUANTILES]
    assert background[QUANTILES : 2 * QUANTILES].eq(-0.25).all() and (ramp.diff() > 0).all() and ramp[0] == -1
    assert background[one - 1].item() == pytest.approx(4 * image[0, 2, :, 8].var(correction=0).item(), rel=0.05)
    assert found[0, -1].item() == pytest.approx(torch.tensor(0.25).log().item())
