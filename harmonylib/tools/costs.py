"""What a run with Stable Diffusion's networks costs: work and peak memory, counted without memory (fake tensors).

    python -m harmonylib.tools.costs        # counts what the profile `paper` needs, for the tables of docs/scaling.md

A call takes a minute to count, so that what was counted is kept in costs.json; remove it to count anew.
"""

import contextlib
import re
import sys
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..core.devices import in_parts, rows_at_once
from ..core.files import atomic_path
from ..core.json_files import read_json, write_json
from ..core.settings import find_root, read_profile
from ..models.diffusion import base_scheduler
from ..models.pipeline import DiffHarmonyPipeline, PromptEmbedding, decode
from ..models.refinement import RefinementUNet
from ..models.resunet import build
from ..models.start import SHAPE
from ..models.vae import HarmonyVAE
from .storage import COMPOSITES, HUMAN_PAIRS, SMALL_PAIRS, TEST, UNET, disk

RATES = {"bf16": 300e12, "fp32": 100e12}  # FLOP/s of one GPU, assumed: 30 % of an H100's in bf16, TF32 convolutions
CARDS = (24, 48, 80)  # GB
ALL = 10**6  # GPUs: as many as there are
COUNTED = Path(__file__).with_suffix(".json")
FREE = 0.92  # share of a card that is left beside CUDA's own


class Peak(TorchDispatchMode):
    """Bytes of the storages made inside that still live (`now`), and the most there were (`peak`)."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **options or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return made

    def _freed(self, storage: int, size: int) -> None:
        self.live.discard(storage)
        self.now -= size


def gpu_rules():
    """Normalisations in fp32 under autocast, as on GPUs; CPUs, whose kinds of tensors are counted, keep bf16."""

    def in_fp32(function):
        return lambda x, *arguments, **options: function(x.float(), *arguments, **options)

    names = ("group_norm", "layer_norm", "batch_norm", "softmax")
    return patch.multiple(F, **{name: in_fp32(getattr(F, name)) for name in names})


class Counter:
    """Counts calls on fake networks: counter(call) -> (FLOPs, peak bytes with the networks that `make` has made)."""

    def __init__(self, precision: str):
        self.precision, self.fake, self.memory = precision, FakeTensorMode(allow_non_fake_inputs=True), Peak()

    def make(self, build):
        with self.fake, self.memory:
            return build()

    def __call__(self, call) -> tuple[float, int]:
        self.memory.peak = self.memory.now
        flops = FlopCounterMode(display=False)
        with contextlib.ExitStack() as stack:
            if self.precision == "bf16":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
                stack.enter_context(gpu_rules())
            for mode in (self.fake, self.memory, flops):
                stack.enter_context(mode)
            call()
        return flops.get_total_flops(), self.memory.peak

    def training(self, model, loss) -> tuple[float, int]:
        """One step of a model: to what is counted come Adam's moments and the EMA, which are there all the time."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        work, peak = self(lambda: loss().backward())
        model.zero_grad()
        return work, peak + 8 * trained + 4 * sum(p.numel() for p in model.parameters())


def zeros(rows: int, channels: int, size: int) -> torch.Tensor:
    return torch.zeros(rows, channels, size, size)


def counted(function):
    """The function's result, of costs.json where that has it, else counted and kept there while it can be written."""

    @cache
    def known(*arguments):
        table = read_json(COUNTED) if COUNTED.is_file() else {}
        key = f"{function.__name__}{arguments}"
        if key not in table:
            print(f"counting {key}", file=sys.stderr, flush=True)
            table[key] = function(*arguments)
            with contextlib.suppress(OSError):  # a folder of the system's
                write_json(COUNTED, dict(sorted(table.items())))
        return table[key]

    return known


# ---- the largest calls: (FLOPs, peak bytes) ----


@counted
def unet_step(rows: int, size: int, checkpointing: bool) -> tuple[float, int]:
    """A step of DiffHarmony on `rows` images, latents cached."""
    counter = Counter("bf16")
    unet = counter.make(lambda: UNet2DConditionModel(in_channels=9, cross_attention_dim=768))
    assert sum(p.numel() for p in unet.parameters()) == UNET  # Stable Diffusion 1.5 inpainting
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def loss():
        prediction = unet(zeros(rows, 9, size // 8), torch.zeros(rows), torch.zeros(rows, 77, 768)).sample
        return prediction.float().square().mean()

    return counter.training(unet, loss)


@counted
def harmony_vae_step(rows: int, size: int, checkpointing: bool) -> tuple[float, int]:
    """A step of Harmony-VAE, encoder frozen."""
    counter = Counter("bf16")
    vae = counter.make(HarmonyVAE)
    vae.set_trainable(True)
    if checkpointing:
        vae.enable_gradient_checkpointing()

    def loss():
        output = vae.decode(zeros(rows, 4, size // 8), zeros(rows, 3, size), zeros(rows, 1, size)).sample
        return (output.float() - zeros(rows, 3, size)).square().mean()

    return counter.training(vae, loss)


@counted
def resunet_step(rows: int, size: int, shape: tuple) -> tuple[float, int]:
    """A step of the ResUNet whose (name, value) pairs of settings are `shape`; without its loss's patches."""
    counter = Counter("bf16")
    model = counter.make(lambda: build(size, **dict(shape)))
    return counter.training(model, lambda: model(zeros(rows, 3, size), zeros(rows, 1, size)).float().square().mean())


@counted
def refiner_step(rows: int, size: int, channels: tuple) -> tuple[float, int]:
    """A step of Table 4's refiner."""
    counter = Counter("bf16")
    model = counter.make(lambda: RefinementUNet(block_out_channels=channels, norm_num_groups=min(32, channels[0] // 2)))
    return counter.training(model, lambda: model(zeros(rows, 7, size)).float().square().mean())


@counted
def encoding(rows: int, size: int) -> tuple[float, int]:
    """What makes cached latents, in fp32."""
    counter = Counter("fp32")
    vae = counter.make(HarmonyVAE)
    return counter(torch.no_grad()(lambda: vae.encode(zeros(rows, 3, size)).latent_dist.parameters))


@counted
def sampling(rows: int, size: int, candidates: int) -> dict[str, tuple[float, int]]:
    """{"encode", "denoise" (one time step, with the encoding), "decode", "plain decode"} of a batch in the pipeline."""
    counter = Counter("bf16")
    unet, vae, prompt = counter.make(
        lambda: (UNet2DConditionModel(in_channels=9, cross_attention_dim=768), HarmonyVAE(), PromptEmbedding())
    )
    pipeline = DiffHarmonyPipeline(vae, unet, base_scheduler("epsilon"), prompt)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(scheduler=None)
    pipeline.scheduler = SimpleNamespace(  # its tables are no fake tensors
        set_timesteps=lambda *_, **__: None, init_noise_sigma=1.0, timesteps=[0], scale_model_input=lambda x, t: x,
        step=lambda change, t, x, generator: SimpleNamespace(prev_sample=x + change),
    )  # fmt: skip
    image, mask = counter.make(lambda: (zeros(rows, 3, size), zeros(rows, 1, size)))
    latents = counter.make(lambda: zeros(rows * candidates, 4, size // 8))

    @torch.no_grad()
    def encode():
        return in_parts(lambda part: vae.encode(part).latent_dist.parameters, image, pixels=size**2)

    @torch.no_grad()
    def denoise():
        return pipeline._denoise(image, mask, 1, None, prompt.embeds, candidates, 1.0)

    @torch.no_grad()
    def decoded():
        return decode(vae, latents, image, mask)

    plain = torch.no_grad()(lambda: in_parts(lambda z: vae.decode(z).sample, latents, pixels=size**2))
    calls = {"encode": encode, "denoise": denoise, "decode": decoded, "plain decode": plain}
    return {name: counter(call) for name, call in calls.items()}


def steps(run) -> dict[str, tuple]:
    """{stage: (function of parts and checkpointing -> (FLOPs, peak bytes) of a part of its batch, batch)}."""
    vae, unet, resunet, refiner = run.harmony_vae, run.diffharmony, run.resunet, run.ablations
    shape = tuple((name, getattr(resunet, name)) for name in (*SHAPE, "style", "head", "encoder", "view"))
    side, channels = resunet.crop or resunet.size, tuple(refiner.refinement_channels)
    found = {
        "harmony_vae": (lambda n, c: harmony_vae_step(n, vae.crop or vae.size, c), vae.batch_size),
        "diffharmony": (lambda n, c: unet_step(n, unet.crop or unet.size, c), unet.batch_size),
        "resunet": (lambda n, c: resunet_step(n, side, shape), resunet.batch_size),
        "table_4": (lambda n, c: refiner_step(n, run.evaluation.size, channels), refiner.refinement_batch_size),
    }
    return found


def largest_calls(run) -> dict[str, int]:
    """{stage: peak bytes of its largest call}, the trainings' with the accumulation and checkpointing of the run."""
    found = {
        name: step(max(1, batch // run.accumulation), run.checkpointing)[1]
        for name, (step, batch) in steps(run).items()
    }
    size, side = run.evaluation.diffusion_size, run.diffharmony.size
    test = sampling(run.evaluation.batch_size, size, 1)
    drawn = sampling(1, run.human_harmony.size, run.human_harmony.candidates)
    found["caches"] = encoding(rows_at_once(side**2), side)[1]
    found["candidates"] = max(drawn[name][1] for name in ("denoise", "decode"))
    found["evaluation"] = max(peak for _, peak in test.values())
    return found


# ---- work ----


def work(run) -> dict[str, tuple[float, int, str]]:
    """{part of the run: (FLOPs, how many GPUs can share it, precision)}, of iHarmony4 and Human Harmony."""
    one = {name: step(batch, False)[0] / batch for name, (step, batch) in steps(run).items()}
    size, k, count = run.evaluation.diffusion_size, run.human_harmony.candidates, run.diffharmony.inference_steps
    vae, unet, resunet, A = run.harmony_vae, run.diffharmony, run.resunet, run.ablations

    def sample(size, decoder="decode"):
        """One image, encoded, denoised and decoded."""
        parts = {name: flops for name, (flops, _) in sampling(1, size, 1).items()}
        return parts["encode"] + count * (parts["denoise"] - parts["encode"]) + parts[decoder]

    encode = {side: encoding(n := rows_at_once(side**2), side)[0] / n for side in (vae.size, unet.size)}
    drawn = {name: flops for name, (flops, _) in sampling(1, run.human_harmony.size, k).items()}
    drawn = drawn["encode"] + count * (drawn["denoise"] - drawn["encode"]) + drawn["decode"]
    table_4 = sum(2 * sample(side) for side in A.resolutions) * A.seeds * (A.refinement_composites + TEST)
    refiners = 2 * len(A.resolutions) * A.seeds * A.refinement_steps * A.refinement_batch_size
    runs = {"VI": 4, "VII": 4, "IV": 2, "style": 3, "readings": 4}
    return {
        "latents of both sizes, with mirror images": (4 * COMPOSITES * sum(encode.values()), ALL, "fp32"),
        "Harmony-VAE, both tasks": (
            (vae.steps + vae.inverse_steps) * vae.batch_size * one["harmony_vae"], vae.batch_size, "bf16"),
        "DiffHarmony, both tasks": (
            (unet.steps + unet.inverse_steps) * unet.batch_size * one["diffharmony"], unet.batch_size, "bf16"),
        "ResUNet": (resunet.steps * resunet.batch_size * one["resunet"], resunet.batch_size, "bf16"),
        "candidates of the small subsets": (SMALL_PAIRS * drawn, ALL, "bf16"),
        "candidates of Human Harmony": (HUMAN_PAIRS * drawn, ALL, "bf16"),
        "evaluation, DiffHarmony": (TEST * sample(size, "plain decode"), ALL, "bf16"),
        "evaluation, DiffHarmony++": (TEST * sample(size), ALL, "bf16"),
        "Table 2": (
            4 * A.seeds * A.augmentation_steps * unet.batch_size * one["diffharmony"], 2 * A.seeds, "bf16"),
        "Table 3, trained on Human Harmony, too": (
            vae.steps * vae.batch_size * one["harmony_vae"] + unet.steps * unet.batch_size * one["diffharmony"]
            + resunet.steps * resunet.batch_size * one["resunet"], unet.batch_size, "bf16"),
        "Table 4, stage 1": (table_4, ALL, "bf16"),
        "Table 4, refiners": (refiners * one["table_4"], 2 * len(A.resolutions) * A.seeds, "bf16"),
        "Table 5": (4 * A.seeds * A.harmony_vae_steps * vae.batch_size * one["harmony_vae"], 4 * A.seeds, "bf16"),
        "Tables VI, VII, IV, styles, readings": (
            sum(runs.values()) * A.seeds * A.resunet_steps * resunet.batch_size * one["resunet"],
            min(runs.values()) * A.seeds, "bf16"),
    }  # fmt: skip


def hours(run, gpus: int) -> dict[str, float]:
    """{part of the run: hours at the assumed rates}, without communication, input and output."""
    return {name: flops / RATES[kind] / 3600 / min(gpus, most) for name, (flops, most, kind) in work(run).items()}


# ---- the page ----


def _table(head: list, rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def page(run) -> str:
    """The tables of docs/scaling.md."""
    peaks, parts = largest_calls(run), work(run)
    spent = {gpus: hours(run, gpus) for gpus in (1, 8, 64)}
    lines = [
        [name, kind, f"{flops / 1e18:.2f}", "all" if most == ALL else most, *(f"{h[name]:.1f}" for h in spent.values())]
        for name, (flops, most, kind) in parts.items()
    ]
    exa = sum(flops for flops, _, _ in parts.values()) / 1e18
    lines.append(["all", "", f"{exa:.1f}", "", *(f"{sum(h.values()):.1f}" for h in spent.values())])
    cards = []
    for name, (step, batch) in steps(run).items():
        rows, held = [batch >> k for k in range(batch.bit_length())], {}  # images at a time
        for checkpointing in (False, True) if name in ("harmony_vae", "diffharmony") else (False,):
            one, whole = (step(n, checkpointing)[1] for n in (1, batch))
            slope = (whole - one) / (batch - 1)  # memory grows in proportion to the images
            held |= {(n, checkpointing): (one + (n - 1) * slope) / 1e9 for n in rows}
        fits = [next((o for o, gb in held.items() if gb < FREE * card), None) for card in CARDS]
        words = [
            "too small" if o is None else f"accumulation: {batch // o[0]}" + (", checkpointing" if o[1] else "")
            for o in fits
        ]
        cards.append([name, batch, f"{held[batch, False]:.1f}", *words])
    stored = disk(run, COMPOSITES, COMPOSITES)
    return "\n".join([
        _table(["largest call of", "GB"], [[name, f"{peak / 1e9:.1f}"] for name, peak in sorted(peaks.items())]),
        _table(["training of", "batch", "GB for all at once", *(f"{card} GB card" for card in CARDS)], cards),
        _table(["part", "precision", "EFLOP", "GPUs that can share it", *(f"{n} GPU, h" for n in spent)], lines),
        _table(["on disk", "GB"], [[name, f"{size / 1e9:.0f}"] for name, size in stored.items()]
               + [["all", f"{sum(stored.values()) / 1e9:.0f}"]]),
    ])  # fmt: skip


def main() -> None:
    path = find_root() / "docs/scaling.md"
    before, _, after = re.split(r"(?s)(?<=<!-- counted -->\n)(.*?)(?=<!-- end -->)", path.read_text(encoding="utf-8"))
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}\n{page(read_profile('paper'))}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
