"""The contrastive ResUNet: its loss against a loop over patches, what the term costs in training, inference and memory.

On CUDA with the paper's network (28.37 M parameters, 256 px, batch 8), elsewhere with the `mini` profile's. Weights and
images are random, which costs the same.
"""

import torch

from harmonylib.core.devices import autocast, has_bf16, pick_device
from harmonylib.models.contrastive import RegionContrastiveLoss, ResUNetLoss, sample_cells
from harmonylib.models.resunet import ContrastiveResUNet

from .paired import can_compile, paired, paired_memory


def images(device, batch: int, size: int):
    """(composite, real, mask) with a foreground of a quarter of the picture."""
    composite, real = torch.rand(2, batch, 3, size, size, device=device) * 2 - 1
    mask = torch.zeros(batch, 1, size, size, device=device)
    mask[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    return composite, real, mask


def network(device, large: bool = False) -> ContrastiveResUNet:
    """The paper's network (`large`, and on CUDA), else that of `mini`."""
    torch.manual_seed(0)
    model = ContrastiveResUNet() if large or device.type == "cuda" else ContrastiveResUNet(16, 4, 1)
    return model.to(device)


def weight(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


def patch_by_patch(loss: RegionContrastiveLoss, output, real, mask) -> torch.Tensor:
    """Reading B as written: one crop and one embedding at a time, one image after another."""
    cells, total = sample_cells(mask, loss.stride, loss.patches)[:2], 0.0
    side = mask.shape[-1]

    def embed(image, cell):
        corner = (min(max(int(part) * 4 - 2, 0), side - 8) for part in divmod(int(cell), -(-side // 4)))
        top, left = corner
        return torch.nn.functional.normalize(loss.mlp(image[:, top : top + 8, left : left + 8].flatten()), dim=0)

    for i in range(len(mask)):
        foreground = torch.stack([embed(output[i], cell) for cell in cells[0][i].tolist()])
        background = torch.stack([embed(real[i], cell) for cell in cells[1][i].tolist()]).detach()
        for k, query in enumerate(foreground):
            others = torch.cat([foreground[:k], foreground[k + 1 :]])
            logits = torch.cat([(query @ background[k])[None], others @ query]) / loss.temperature
            total = total + logits.logsumexp(0) - logits[0]
    return total / loss.patches / len(mask)


def loss_row(device, batch: int = 8, size: int = 256) -> dict:
    output, real, mask = images(device, batch, size)
    loss = RegionContrastiveLoss(masked=False).to(device)
    output.requires_grad_()
    timing = paired(
        lambda: loss(output, real, mask).backward(), lambda: patch_by_patch(loss, output, real, mask).backward(), 5
    )
    return {"name": f"contrastive loss, forward and backward, K 256, {batch} x {size} px: batched / a loop", **timing}


def step_rows(device) -> list[dict]:
    """A training step as we make it, against fp32 in contiguous memory, one without the term, and compiled."""
    count, size = (8, 256) if device.type == "cuda" else (8, 64)
    batch = dict(zip(("composite", "real", "mask"), images(device, count, size), strict=True))
    last = network(device).to(memory_format=torch.channels_last)

    def stepping(model, term, precision):
        parameters = [*model.parameters(), *term.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=1e-6, fused=precision == "auto")

        def step():
            with autocast(device, precision):
                terms = term(model, batch)
            terms["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step

    ours, plain, without = (ResUNetLoss((0.4, 0.5, weight)).to(device) for weight in (0.1, 0.1, 0.0))
    step, name = stepping(last, ours, "auto"), f"ResUNet ({weight(last)}) training step, {count} x {size} px"
    others = {
        "channels-last, mixed precision, fused / none of them": stepping(network(device), plain, "fp32"),
        "with / without the contrastive term": stepping(last, without, "auto"),
    }
    rows = [{"name": f"{name}: {what}", **paired(step, other)} for what, other in others.items()]
    if can_compile(device):
        compiled = stepping(torch.compile(last), ours, "auto")
        rows.append({"name": f"{name}: compiled / eager", **paired(compiled, step)})
    return rows


@torch.inference_mode()
def forward(model, composite, mask, precision: str):
    with autocast(composite.device, precision):
        return model(composite, mask)


def inference_rows(device) -> list[dict]:
    """Images per second, plain (fp32, contiguous) against channels-last, and against channels-last with bf16."""
    rows, cases = [], [(256, False), (512, False), (1024, False)]
    if device.type != "cuda":  # where all of them are of the paper's network
        cases.append((256, True))
    for size, large in cases:
        batch = max(1, 1024 // size if device.type == "cuda" else 1)
        composite, _, mask = images(device, batch, size)
        plain, last = (network(device, large).eval() for _ in range(2))
        last = last.to(memory_format=torch.channels_last)
        for precision in ("fp32", *(["bf16"] if has_bf16(device) else [])):
            timing = paired(
                lambda p=precision, m=last, c=composite, k=mask: forward(m, c, k, p),
                lambda m=plain, c=composite, k=mask: forward(m, c, k, "fp32"),
                5,
            )
            rates = {side: batch / timing[side] for side in ("ours", "baseline")}
            name = f"ResUNet ({weight(last)}) inference at {size} px: channels-last {precision} / contiguous fp32"
            rows.append({"name": name, **timing, **rates, "unit": "images/s"})
    return rows


def memory_row(device, size: int = 1024) -> list[dict]:
    """MiB that one image needs at its peak beyond weights and images; no row where that cannot be read."""
    best = "bf16" if has_bf16(device) else "fp32"
    plain, last = network(device).eval(), network(device).eval().to(memory_format=torch.channels_last)
    composite, _, mask = images(device, 1, size)
    memory = paired_memory(
        lambda: forward(last, composite, mask, best), lambda: forward(plain, composite, mask, "fp32")
    )
    name = f"ResUNet ({weight(last)}) peak memory at {size} px: channels-last {best} / contiguous fp32"
    return [{"name": name, **memory}] if memory else []


def rows() -> list[dict]:
    """Rows of benchmarks/results.json; a ratio above 1 means that ours is better."""
    device = pick_device()
    return [loss_row(device), *step_rows(device), *inference_rows(device), *memory_row(device)]
