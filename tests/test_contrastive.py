import math

import pytest
import torch
from torch.nn import functional as F

from harmonylib import RegionContrastiveLoss
from harmonylib.models.contrastive import (
    ResUNetLoss,
    crop_patches,
    foreground_error,
    sample_cells,
)


def batch(count=2, height=32, width=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    output, real, composite = (torch.rand(count, 3, height, width, generator=draw) * 2 - 1 for _ in range(3))
    mask = torch.zeros(count, 1, height, width)
    mask[0, :, 4:20, 8:29] = 1
    mask[1:, :, height // 2 :, :7] = 1
    return output, real, mask, composite


def loss_of(reading="B", **settings):
    torch.manual_seed(0)
    return RegionContrastiveLoss(reading, **{"patches": 12, **settings})


def seeded(value=3):
    return torch.Generator().manual_seed(value)


def patch_by_patch(loss, output, real, mask, composite):
    """Eq. 8-12 as plain loops, on the cells that the loss draws."""
    fg_cells, bg_cells, _ = sample_cells(mask, loss.stride, loss.patches, seeded())
    height, width = mask.shape[2:]
    columns = math.ceil(width / loss.stride)

    def embed(image, cell):
        top = int(cell) // columns * loss.stride + loss.stride // 2 - loss.patch // 2
        left = int(cell) % columns * loss.stride + loss.stride // 2 - loss.patch // 2
        top, left = min(max(top, 0), height - loss.patch), min(max(left, 0), width - loss.patch)
        vector = loss.mlp(image[:, top : top + loss.patch, left : left + loss.patch].reshape(-1))
        return vector / vector.norm()

    t, total = loss.temperature, 0.0
    for i in range(len(mask)):
        n = [embed(output[i], cell) for cell in fg_cells[i]]
        p = [embed(real[i], cell) for cell in bg_cells[i]]
        c = [embed(composite[i], cell) for cell in fg_cells[i]]
        v_bg, v_fg = (sum(v) / sum(v).norm() for v in (p, n))
        for k in range(loss.patches):
            if loss.reading == "A":
                positive, negatives = v_bg @ p[k], [v_fg @ other for other in n]
            elif loss.reading == "B":
                positive, negatives = n[k] @ p[k], [n[k] @ other for j, other in enumerate(n) if j != k]
            else:
                positive, negatives = n[k] @ p[k], [n[k] @ other for other in c]
            top = torch.exp(positive / t)
            total = total - torch.log(top / (top + sum(torch.exp(x / t) for x in negatives))) / loss.patches
    return total / len(mask)


@pytest.mark.parametrize("size", [(32, 40), (30, 37)])
@pytest.mark.parametrize("reading", ["A", "B", "C"])
def test_vectorised_equals_a_loop_over_patches(reading, size):
    loss, (output, real, mask, composite) = loss_of(reading, masked=False), batch(2, *size)
    found = loss(output, real, mask, composite, seeded())
    torch.testing.assert_close(found, patch_by_patch(loss, output, real, mask, composite))
    loss.masked = True  # Eq. 8, 9: patches of H M, I (1 - M), and for reading C of the composite's foreground
    masked = loss(output, real, mask, composite, seeded())
    parts = output * mask, real * (1 - mask), mask, composite * mask
    torch.testing.assert_close(masked, patch_by_patch(loss, *parts))
    assert masked != found


@pytest.mark.parametrize("size", [(32, 40), (30, 37), (8, 8), (5, 3), (1, 1)])
def test_cells_lie_in_their_region_and_patches_inside_the_image(size):
    mask = (torch.rand(3, 1, *size, generator=seeded(1)) > 0.5).float()
    foreground, background, keep = sample_cells(mask, 4, 6, seeded())
    assert keep.any() or size in [(5, 3), (1, 1)]
    columns = -(-size[1] // 4)
    for i in range(3):
        for cells, inside in ((foreground[i], True), (background[i], False)):
            for cell in cells.tolist():
                row, column = cell // columns * 4, cell % columns * 4
                share = mask[i, 0, row : row + 4, column : column + 4].mean()
                assert not keep[i] or (share > 0.5) == inside
    patches = crop_patches(torch.rand(3, 3, *size), foreground, 4, 8)
    assert patches.shape == (3, 6, 192) and patches.isfinite().all()


def test_cells_differ_when_the_region_has_enough_and_repeat_evenly_otherwise():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :8, :12] = 1  # 6 cells
    foreground, background, _ = sample_cells(mask, 4, 18, seeded())
    assert len(set(background[0].tolist())) == 18
    assert foreground[0].bincount().unique().tolist() == [0, 3]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("reading, towards", [("A", False), ("B", True), ("C", True)])
def test_which_readings_pull_the_foreground_towards_the_background(reading, towards):
    """Foreground and background embeddings live in orthogonal halves, so that only an intended pull can join them."""
    foreground = torch.cat([unit(1, 8, 16), torch.zeros(1, 8, 16)], -1).requires_grad_()
    background = torch.cat([torch.zeros(1, 8, 16), unit(1, 8, 16, seed=1)], -1)
    composite = torch.cat([unit(1, 8, 16, seed=2), torch.zeros(1, 8, 16)], -1)
    loss = RegionContrastiveLoss(reading).contrast(foreground, background, composite)
    (gradient,) = torch.autograd.grad(loss.sum(), foreground)
    pull = -(gradient * background).sum(-1)  # how a descent step moves each N_i along its P_i
    assert (pull > 0).all() if towards else (pull == 0).all()
    if reading == "A":  # what is left pushes the foreground away from its own mean
        mean = F.normalize(foreground.mean(1, keepdim=True), dim=-1)
        assert (-(gradient * mean).sum(-1)).mean() < 0


def test_gradients_stop_at_the_background_and_reach_output_and_mlp():
    loss, (output, real, mask, composite) = loss_of("C"), batch()
    tensors = [x.requires_grad_() for x in (output, real, composite)]
    loss(output, real, mask, composite).backward()
    assert output.grad.abs().sum() > 0 and loss.mlp[0].weight.grad.abs().sum() > 0
    assert all(x.grad is None or not x.grad.any() for x in tensors[1:])


@pytest.mark.parametrize("reading", ["A", "B", "C"])
def test_images_without_both_regions_drop_out(reading):
    loss, (output, real, mask, composite) = loss_of(reading, patches=512), batch(3)
    alone = loss(output[:1], real[:1], mask[:1], composite[:1], seeded())
    mask[1], mask[2] = 0, 1
    output.requires_grad_()
    mixed = loss(output, real, mask, composite, seeded())
    torch.testing.assert_close(mixed, alone)  # the first image draws the same cells in either batch
    mixed.backward()
    assert output.grad[0].any() and not output.grad[1:].any()
    output.grad = None
    nothing = loss(output, real, torch.zeros_like(mask), composite, seeded())
    nothing.backward()
    assert nothing == 0 and not output.grad.any()


@pytest.mark.parametrize("reading", ["A", "B", "C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_images_one_cell_regions_and_half_precision_are_finite(reading, dtype):
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:8, 4:8], mask[1, :, 8, 8] = 1, 1
    for image in (torch.full((2, 3, 16, 16), 0.5), torch.rand(2, 3, 16, 16)):
        output = image.to(dtype, copy=True).requires_grad_()
        loss = loss_of(reading)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(output, image.to(dtype), mask.to(dtype), image.to(dtype))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite() and output.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_kinds_of_foreground_error_by_hand():
    real, mask = torch.zeros(3, 3, 4, 4), torch.zeros(3, 1, 4, 4)
    mask[:2, :, :2] = 1
    output = torch.full_like(real, 9.0)  # counts where the mask is not set: nowhere
    output[0, :, :2], output[1, :, :2] = 0.5, torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    squares = [0.25, 0.14 / 3]
    assert foreground_error(output, real, mask).item() == pytest.approx((1.5 + 0.6) / 2)
    root = sum(3 * math.sqrt(square + 1e-4) for square in squares) / 2
    assert foreground_error(output, real, mask, "rmse").item() == pytest.approx(root)
    log = sum(math.log(square + 3e-4) for square in squares) / 2
    assert foreground_error(output, real, mask, "log").item() == pytest.approx(log)
    for kind in ("l1", "rmse", "log"):
        same = real.clone().requires_grad_()
        foreground_error(same, real, mask, kind).backward()
        assert same.grad.isfinite().all() and foreground_error(output, real, mask * 0, kind) == 0


def test_the_resunets_loss_is_the_weighted_sum():
    output, real, mask, composite = batch()
    loss, images = ResUNetLoss(reading="C", patches=8), {"composite": composite, "real": real, "mask": mask}
    terms = loss(lambda *arguments: output, images, seeded())
    assert list(terms) == ["l1", "foreground", "contrastive", "loss"]
    torch.testing.assert_close(terms["l1"], (output - real).abs().mean())
    torch.testing.assert_close(terms["contrastive"], loss.contrastive(output, real, mask, composite, seeded()))
    expected = 0.4 * terms["l1"] + 0.5 * terms["foreground"] + 0.1 * terms["contrastive"]
    torch.testing.assert_close(terms["loss"], expected)
    terms = ResUNetLoss((1.0, 0.0, 0.0), "log")(lambda *arguments: output, images)
    assert "contrastive" not in terms and torch.equal(terms["loss"], terms["l1"])
    assert torch.equal(terms["foreground"], foreground_error(output, real, mask, "log"))
