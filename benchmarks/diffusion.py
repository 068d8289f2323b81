"""DiffHarmony++ against a plain implementation written from the papers: every step encodes its images and the prompt
anew, in fp32. On CUDA at Stable Diffusion's size, elsewhere at that of the small base (which has no text encoder);
weights are random, which costs the same. What caching gains in one precision and what bf16 adds are separate rows.
"""

from collections.abc import Iterator

import torch
from torch import nn

from harmonylib.core.devices import autocast, has_bf16, pick_device
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.diffusion import (
    base_scheduler,
    denoising_loss,
    latent_mask,
    sample_posterior,
    scale_latents,
    training_attention,
)
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.refinement import RefinementUNet, refinement_loss
from harmonylib.models.vae import HarmonyVAE, harmony_vae_loss

from .paired import paired


class System:
    """Random models and a batch of `size` pixels; `large`: Stable Diffusion's widths with a text encoder of CLIP's."""

    def __init__(self, device, large: bool, size: int, batch: int = 4):
        torch.manual_seed(0)
        if large:
            from diffusers import UNet2DConditionModel  # after harmonylib, which mends torchvision

            vae, unet = HarmonyVAE(), UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
            prompt = PromptEmbedding()
            layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
            self.text = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to(device).eval()
        else:
            vae = HarmonyVAE.from_vae(build_autoencoder((16, 32, 64, 128)))
            unet, prompt, self.text = build_unet((64, 128)), PromptEmbedding(1, 32), None
        self.pipeline = DiffHarmonyPipeline(vae, unet, base_scheduler("epsilon"), prompt).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.vae, self.unet, self.prompt = vae, unet, prompt.embeds
        self.real, self.composite = torch.rand(2, batch, 3, size, size, device=device) * 2 - 1
        self.mask = torch.zeros(batch, 1, size, size, device=device)
        self.mask[..., size // 4 : size // 2, size // 4 : size // 2] = 1
        self.device, self.generator = device, torch.Generator().manual_seed(0)
        self.scheduler, self.alphas = base_scheduler("epsilon"), base_scheduler("epsilon").alphas_cumprod.to(device)

    @torch.no_grad()
    def encode(self, image):
        """Posterior moments."""
        return self.vae.encode(image).latent_dist.parameters

    def encode_prompt(self):
        with torch.no_grad():
            return self.prompt if self.text is None else self.text(self.prompt)


def step(parameters, loss, precision="fp32", device=None):
    """A call that makes one optimiser step on loss()."""
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def work():
        with autocast(device, precision):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return work


def unet_steps(s: System):
    """UNet training steps: (ours with cached moments and prompt, plain)."""
    moments = s.encode(s.real), s.encode(s.composite)
    small = latent_mask(s.mask, moments[0].shape[-2:])

    def ours():
        target, condition = (scale_latents(sample_posterior(m, s.generator), s.vae) for m in moments)
        return denoising_loss(s.unet, s.scheduler, target, condition, small, s.prompt, s.generator)

    def plain():
        target, condition = (
            (mean + (logvar / 2).exp() * torch.randn_like(mean)) * 0.18215
            for mean, logvar in (s.encode(image).chunk(2, dim=1) for image in (s.real, s.composite))
        )
        t = torch.randint(0, 1000, (len(target),), device=s.device)
        noise, alpha = torch.randn_like(target), s.alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * target + (1 - alpha).sqrt() * noise
        mask = nn.functional.interpolate(s.mask, target.shape[-2:])
        prompt = s.encode_prompt().expand(len(target), -1, -1)
        with training_attention(target):  # what it gains has a row of its own in training.py
            error = (s.unet(torch.cat([noisy, mask, condition], 1), t, prompt).sample - noise) * mask
        weight = (mask[0].numel() / mask.sum((1, 2, 3))).clamp(1, 5)
        return (error.square().mean((1, 2, 3)) * weight).mean()

    return ours, plain


def vae_steps(s: System):
    """Harmony-VAE training steps: (ours with cached moments of the target, plain)."""
    batch = {"moments": s.encode(s.real), "target": s.real, "condition": s.composite, "mask": s.mask}

    def plain():
        mean, logvar = s.encode(s.real).chunk(2, dim=1)
        latents = mean + (logvar / 2).exp() * torch.randn_like(mean)
        return (s.vae.decode(latents, s.composite, s.mask).sample - s.real).square().mean()

    return lambda: harmony_vae_loss()(s.vae, batch, s.generator)["loss"], plain


def refiner_steps(s: System):
    """((ours with stage-1 outputs made before, plain), refiner): widths as in the papers, or of the `mini` profile."""
    channels = (128, 256, 512, 512) if s.text else (16, 32, 64, 64)
    model = RefinementUNet(block_out_channels=channels, norm_num_groups=min(32, channels[0] // 2)).to(s.device)
    batch = {"output": plain_inference(s, s.composite, s.mask), "mask": s.mask}
    batch |= {"composite": s.composite, "real": s.real}

    def plain():
        anew = {"output": plain_inference(s, s.composite, s.mask).float()}
        return refinement_loss(model, batch | anew)["loss"]

    return (lambda: refinement_loss(model, batch)["loss"], plain), model


def in_precisions(name: str, kind: str, device, work, repeats: int = 7) -> Iterator[dict]:
    """Rows of (ours, plain) = work(precision): both in fp32; with bf16 also both in bf16, and ours in it alone."""
    ours, plain = work("fp32")
    yield {"name": f"{name}, fp32 ({kind})", **paired(ours, plain, repeats)}
    if has_bf16(device):
        half, plain_half = work("bf16")
        yield {"name": f"{name}, bf16 ({kind})", **paired(half, plain_half, repeats)}
        yield {"name": f"{name}, bf16 / fp32 ({kind})", **paired(half, plain, repeats)}


@torch.no_grad()
def plain_inference(s: System, image, mask, steps: int = 5):
    """Euler ancestral from the formulas, the prompt encoded anew in every step, all in fp32."""
    sigmas = ((1 - s.alphas) / s.alphas).sqrt()
    times = torch.linspace(999, 0, steps, device=s.device)
    low = times.floor().long()
    between = sigmas[low] + (times - low) * (sigmas[(low + 1).clamp(max=999)] - sigmas[low])
    between = torch.cat([between, between.new_zeros(1)])
    mean, logvar = s.encode(image).chunk(2, dim=1)
    small = nn.functional.interpolate(mask, mean.shape[-2:])
    composite = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * 0.18215
    x = torch.randn_like(mean) * between[0]
    for t, now, after in zip(times, between, between[1:], strict=False):
        prompt = s.encode_prompt().expand(len(x), -1, -1)
        noise = s.unet(torch.cat([x / (now**2 + 1).sqrt(), small, composite], 1), t, prompt).sample
        up = (after**2 * (now**2 - after**2) / now**2).sqrt()
        x = x + noise * ((after**2 - up**2).sqrt() - now) + torch.randn_like(x) * up
    return s.vae.decode(x / 0.18215, image, mask).sample


def decoding(s: System, precision: str):
    """A call that decodes one image under its condition."""
    image, mask = s.composite[:1], s.mask[:1]
    latents = s.encode(image).chunk(2, dim=1)[0]

    @torch.no_grad()
    def work():
        with autocast(s.device, precision):
            s.vae.decode(latents, image, mask)

    return work


def measure() -> Iterator[dict]:
    """Yield each row as soon as it is measured."""
    device = pick_device()
    large = device.type == "cuda"
    kind = "SD size, CUDA" if large else f"small base, {device.type}"
    size = 512 if large else 96
    s = System(device, large, size)
    s.vae.set_trainable()
    models = (("UNet", unet_steps(s), s.unet), ("Harmony-VAE", vae_steps(s), s.vae), ("refiner", *refiner_steps(s)))
    for name, losses, model in models:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def work(precision, losses=losses, parameters=parameters):
            return [step(parameters, loss, precision, device) for loss in losses]

        yield from in_precisions(f"{name} training step {size} px: cached / anew in every step", kind, device, work)
    for size in (256, 512):
        s = System(device, large, size, batch=1)

        def inference(precision, s=s, candidates=1):
            def ours():
                with autocast(device, precision):
                    s.pipeline(s.composite, s.mask, output_type="pt", candidates=candidates)

            def plain():
                with autocast(device, precision):
                    for _ in range(candidates):
                        plain_inference(s, s.composite, s.mask)

            return ours, plain

        if large or size == 256:  # minutes on a CPU
            yield from in_precisions(f"5-step inference {size} px: ours / plain", kind, device, inference, 5)
            name = f"5-step inference {size} px, four candidates sharing the condition"
            yield {"name": f"{name} ({kind})", **paired(*inference("fp32", candidates=4), repeats=3)}
        if has_bf16(device):
            half, full = decoding(s, "bf16"), decoding(s, "fp32")
            yield {"name": f"conditional decode {size} px: bf16 / fp32 ({kind})", **paired(half, full)}


def rows() -> list[dict]:
    """Rows {"name", "ours", "baseline", "ratio", "unit", "spread"}; a ratio above 1: ours is better."""
    return list(measure())


if __name__ == "__main__":
    for row in measure():
        print(row, flush=True)
