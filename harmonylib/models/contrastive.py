"""Region-wise contrastive loss and the whole training loss ("Region-wise Contrastive Learning", Sec. III-B, III-C)."""

import torch
from torch import nn
from torch.nn import functional as F


def sample_cells(mask: torch.Tensor, stride: int, patches: int, generator=None) -> tuple[torch.Tensor, ...]:
    """Draw `patches` cells of the stride-`stride` sampling map inside the foreground and inside the background.

    mask Bx1xHxW. A cell is foreground where more than half of its pixels are. Returns (foreground, background, keep):
    flat cell indices BxK over the ceil(H/stride) x ceil(W/stride) map, all different where the region has K cells and
    repeated evenly where it has fewer, and keep (B, bool): False where either region has no cell (indices are then
    meaningless).
    """
    foreground = F.avg_pool2d(mask.float(), stride, ceil_mode=True).flatten(1) > 0.5
    device = mask.device if generator is None else generator.device
    scores = torch.rand(foreground.shape, generator=generator, device=device).to(mask.device)
    turn = torch.arange(patches, device=mask.device)
    cells = []
    for region in (foreground, ~foreground):
        shuffled = torch.where(region, scores, -1.0).argsort(dim=1, descending=True)  # the region's cells come first
        cells.append(shuffled.gather(1, turn % region.sum(1, keepdim=True).clamp_min(1)))
    return *cells, foreground.any(1) & ~foreground.all(1)


def crop_patches(image: torch.Tensor, cells: torch.Tensor, stride: int, patch: int) -> torch.Tensor:
    """Cut the patch x patch square centred on each cell: BxCxHxW and BxK flat cell indices -> BxKx(C*patch*patch).

    A square that would leave the image is moved inside; an image smaller than the square has its border repeated.
    """
    batch, channels, height, width = image.shape
    row, column = cells // -(-width // stride), cells % -(-width // stride)
    steps = torch.arange(patch, device=image.device)

    def span(cell, size):
        start = (cell * stride + stride // 2 - patch // 2).clamp(0, max(size - patch, 0))
        return (start[..., None] + steps).clamp_max(size - 1)

    pixels = span(row, height)[..., :, None] * width + span(column, width)[..., None, :]  # BxKxPxP
    values = image.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, channels, -1))
    return values.unflatten(2, (cells.shape[1], -1)).transpose(1, 2).flatten(2)


class RegionContrastiveLoss(nn.Module):
    r"""Contrast patches of the harmonized foreground with patches of the real background (Eq. 8-12).

    K patches of 8x8 are cut around cells of a stride-4 map, inside each region, and embedded by one two-layer MLP
    (192-256-256) with L2-normalised output. They are patches of the masked images H M and I (1 - M) (Eq. 8, 9): what a
    patch has of the other region is 0, mid-grey; masked=False leaves it in. With these, N_i from the harmonized
    foreground, P_i from the real background. Give the MLP's parameters to the optimiser. With t the temperature, per
    image

    paper (Eq. 11): 1/K sum_i -log  exp(v_bg.P_i / t) / [exp(v_bg.P_i / t) + sum_k exp(v_fg.N_k / t)]

    where the queries v_bg and v_fg are left undefined. Three readings are offered:

    - "A", literal: v_bg = mean of P and v_fg = mean of N, L2-normalised. The generator is reached through v_fg.N_k
      only: foreground patches are pushed apart from their own mean and never towards the background.
    - "B", default: every foreground patch is a query, with the other foreground patches as its negatives,
      1/K sum_i -log  exp(N_i.P_i / t) / [exp(N_i.P_i / t) + sum_{k != i} exp(N_i.N_k / t)],  P held constant:
      pulls the foreground towards the real background, which is the paper's stated aim, from the paper's own sets.
    - "C", triplet-like: negatives are the composite's foreground patches C_k at the same cells,
      1/K sum_i -log  exp(N_i.P_i / t) / [exp(N_i.P_i / t) + sum_k exp(N_i.C_k / t)],  P and C held constant.

    Computed in float32 whatever the autocast. An image without a foreground or background cell drops out of the mean
    over images (Eq. 12); if all do, the loss is 0 and still has a gradient (of zeros).
    """

    def __init__(self, reading="B", patches: int = 256, temperature=0.07, patch: int = 8, stride: int = 4,
                 masked: bool = True):  # fmt: skip
        super().__init__()
        assert reading in ("A", "B", "C")
        self.reading, self.patches, self.temperature = reading, patches, temperature
        self.patch, self.stride, self.masked = patch, stride, masked
        self.mlp = nn.Sequential(nn.Linear(3 * patch * patch, 256), nn.ReLU(), nn.Linear(256, 256))

    def embed(self, image: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Bx3xHxW and BxK cells -> BxKxD float32 of unit length."""
        patches = crop_patches(image, cells, self.stride, self.patch)
        return F.normalize(self.mlp(patches.to(self.mlp[0].weight.dtype)).float(), dim=-1)

    def contrast(self, foreground, background, composite=None) -> torch.Tensor:
        """The reading's loss per image (B) from unit embeddings BxKxD: N, P and, for reading C, the composite's."""
        if self.reading == "A":
            query_bg, query_fg = (F.normalize(e.mean(1, keepdim=True), dim=-1) for e in (background, foreground))
            positive = (query_bg * background).sum(-1, keepdim=True)
            negative = (query_fg * foreground).sum(-1)[:, None].expand(-1, positive.shape[1], -1)
        else:
            positive = (foreground * background.detach()).sum(-1, keepdim=True)
            if self.reading == "B":
                own = torch.eye(foreground.shape[1], dtype=torch.bool, device=foreground.device)
                negative = (foreground @ foreground.transpose(1, 2)).masked_fill(own, float("-inf"))
            else:
                negative = foreground @ composite.detach().transpose(1, 2)
        logits = torch.cat([positive, negative], dim=-1) / self.temperature
        return (logits.logsumexp(-1) - logits[..., 0]).mean(1)

    def forward(
        self, output: torch.Tensor, real: torch.Tensor, mask: torch.Tensor, composite: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Scalar. output, real and composite Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}; generator draws the cells."""
        assert output.shape == real.shape and mask.shape == (len(output), 1, *output.shape[2:])
        assert self.reading != "C" or composite is not None
        with torch.autocast(output.device.type, enabled=False):
            foreground_cells, background_cells, keep = sample_cells(mask, self.stride, self.patches, generator)
            if self.masked:
                output, real = output * mask, real * (1 - mask)
                composite = None if composite is None else composite * mask
            per_image = self.contrast(
                self.embed(output, foreground_cells),
                self.embed(real, background_cells),
                self.embed(composite, foreground_cells) if self.reading == "C" else None,
            )
            return (per_image * keep).sum() / keep.sum().clamp_min(1)


def foreground_error(output, real, mask, kind: str = "l1") -> torch.Tensor:
    """The foreground's error, averaged over images: float32 scalar of Bx3xHxW twice and Bx1xHxW in {0, 1}.

    "l1" is the paper's L_pixel: sum |output - real| M over pixels and channels / sum M, three times the foreground's
    mean absolute error. "rmse" (the root of the mean square, three times for the same scale) and "log" (the logarithm
    of the mean square, so that a weak change counts as much as a strong one) are ours. Images with an empty mask drop
    out; if all are empty the error is 0.
    """
    assert kind in ("l1", "rmse", "log")
    assert output.shape == real.shape and mask.shape == (len(output), 1, *output.shape[2:])
    area, change = mask.float().sum((1, 2, 3)), output.float() - real.float()
    error = ((change.abs() if kind == "l1" else change.square()) * mask.float()).sum((1, 2, 3)) / area.clamp_min(1)
    if kind != "l1":
        error = 3 * (error / 3 + 1e-4).sqrt() if kind == "rmse" else (error / 3 + 3e-4).log()
    return (error * (area > 0)).sum() / (area > 0).sum().clamp_min(1)


# ---- training ----


def resunet_batches(data, section, seed: int, recipes=None):
    """The `PixelBatches` that `ResUNetLoss` takes, by the settings' section `resunet`."""
    from ..data.batches import DEFAULTS, PixelBatches, augmentation  # which a finished model does without

    return PixelBatches(data, seed=(seed, "resunet"), recipes=recipes or DEFAULTS, **augmentation(section))


class ResUNetLoss(nn.Module):
    """Eq. 13 for `training.train` of a ResUNet: w1 L1 + w2 L_pixel + w3 L_HCL; batch {"composite", "real", "mask"}.

    Returns the unweighted "l1" (of the whole output, background included), "foreground" (`foreground_error`, error: its
    kind) and "contrastive", and their weighted sum "loss". A weight of 0 for the contrastive term switches it off
    (Table VI); else its MLP trains along. That is drawn from torch's global generator: make the loss after the network.
    """

    def __init__(self, weights=(0.4, 0.5, 0.1), error: str = "l1", reading: str = "B", patches: int = 256, masked=True):
        super().__init__()
        self.weights, self.error = weights, error
        self.contrastive = RegionContrastiveLoss(reading, patches, masked=masked) if weights[2] else None
        self.key = [list(weights), error, reading, patches, masked]

    def forward(self, network, batch, generator=None) -> dict[str, torch.Tensor]:
        composite, real, mask = batch["composite"], batch["real"], batch["mask"]
        output = network(composite, mask, generator)
        terms = {"l1": F.l1_loss(output.float(), real.float())}
        terms["foreground"] = foreground_error(output, real, mask, self.error)
        if self.contrastive is not None:
            terms["contrastive"] = self.contrastive(output, real, mask, composite, generator)
        return {**terms, "loss": sum(w * term for w, term in zip(self.weights, terms.values(), strict=False))}


def resunet_loss(section) -> ResUNetLoss:
    """The loss that the settings' section `resunet` describes."""
    return ResUNetLoss(section.weights, section.error, section.reading, section.patches, section.masked_patches)
