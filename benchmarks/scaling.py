"""`python -m benchmarks.scaling`: work and memory of the `paper` profile, counted, and hours at a rate one assumes.

FLOPs are counted on networks without memory (torch's fake tensors) by running forward and backward passes once.
"""

from functools import partial

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from harmonylib.core.settings import read_profile
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.models.vae import HarmonyVAE

COMPOSITES, TEST, CANDIDATE_PAIRS = 65_742, 7_404, 29_106  # facts of iHarmony4 and Human Harmony
RATE = 300e12  # FLOP/s of one GPU: 30 % of an H100's 989e12 in bf16; assumed, not measured
LINK = 50e9  # bytes/s from one GPU to the others; assumed, not measured


def flops(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count() -> dict[str, float]:
    """FLOPs of one image: UNet and autoencoder forward passes and training steps."""
    from diffusers import UNet2DConditionModel  # after harmonylib

    with FakeTensorMode():
        unet = UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
        vae = HarmonyVAE()
        resunet = ContrastiveResUNet()
        zeros = torch.zeros

        def denoise(size):
            return unet(zeros(1, 9, size // 8, size // 8), torch.zeros(1), zeros(1, 77, 768)).sample

        def decode(size):
            return vae.decode(
                zeros(1, 4, size // 8, size // 8), zeros(1, 3, size, size), zeros(1, 1, size, size)
            ).sample

        found = {
            "UNet training step, 512 px": flops(lambda: denoise(512).sum().backward()),
            "ResUNet training step, 256 px": flops(
                lambda: resunet(zeros(1, 3, 256, 256), zeros(1, 1, 256, 256)).sum().backward()
            ),
        }
        vae.requires_grad_(False)
        vae.set_trainable(True)
        found["Harmony-VAE training step, 256 px"] = flops(lambda: decode(256).sum().backward())
        with torch.no_grad():
            found["UNet pass, 1024 px"] = flops(lambda: denoise(1024))
            found["Harmony-VAE decode, 1024 px"] = flops(lambda: decode(1024))
            for size in (256, 512, 1024):
                picture = zeros(1, 3, size, size)
                found[f"encode, {size} px"] = flops(partial(vae.encode, picture))
    assert sum(p.numel() for p in unet.parameters()) == 859_535_364  # Stable Diffusion 1.5 inpainting
    return found


def work(one: dict[str, float]) -> dict[str, float]:
    """FLOPs of each part of the `paper` profile."""
    paper = read_profile("paper")
    vae, unet, resunet = paper.harmony_vae, paper.diffharmony, paper.resunet
    k, steps = paper.human_harmony.candidates, unet.inference_steps
    sample = steps * one["UNet pass, 1024 px"] + one["Harmony-VAE decode, 1024 px"]
    both = vae.steps + vae.inverse_steps, unet.steps + unet.inverse_steps
    return {
        "caches (256 and 512 px, mirrored)": 4 * COMPOSITES * (one["encode, 256 px"] + one["encode, 512 px"]),
        "Harmony-VAE, both tasks": both[0] * vae.batch_size * one["Harmony-VAE training step, 256 px"],
        "DiffHarmony, both tasks": both[1] * unet.batch_size * one["UNet training step, 512 px"],
        "contrastive ResUNet": resunet.steps * resunet.batch_size * one["ResUNet training step, 256 px"],
        f"{k * CANDIDATE_PAIRS:,} candidates, 1024 px": CANDIDATE_PAIRS * (k * sample + one["encode, 1024 px"]),
        "evaluation, 1024 px": TEST * (sample + one["encode, 1024 px"]),
    }


def main() -> None:
    one = count()
    print("| of one image | TFLOP |\n|---|---|")
    print("".join(f"| {name} | {value / 1e12:.2f} |\n" for name, value in one.items()))
    print("| part of `paper` | EFLOP | 1 GPU, h | 8 GPUs, h | 64 GPUs, h |\n|---|---|---|---|---|")
    parts = work(one)
    most = dict(zip(parts, (64, 16, 16, 8, 64, 1), strict=True))  # GPUs: batch sizes; the evaluation notebook uses one
    for name, value in (parts | {"all": sum(parts.values())}).items():
        chosen = parts if name == "all" else [name]
        hours = [sum(parts[part] / RATE / 3600 / min(gpus, most[part]) for part in chosen) for gpus in (1, 8, 64)]
        print(f"| {name} | {value / 1e18:.1f} | " + " | ".join(f"{hour:.1f}" for hour in hours) + " |")
    gradients = 4 * 859_535_364
    compute = one["UNet training step, 512 px"] / RATE
    print(f"\nUNet: gradients {gradients / 1e9:.2f} GB; {2 * gradients / LINK:.3f} s to average at the assumed link,")
    print(f"{compute:.3f} s to compute one image at the assumed rate.")


if __name__ == "__main__":
    main()
