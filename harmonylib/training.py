"""The one training loop: optimiser, schedule, EMA, mixed precision, logging, checkpoint and exact resume.

A stage gives it a model, a function from step to batch and a loss closure. Every random draw of a step is seeded by
(seed, step), so the state of a run is its weights, optimiser, EMA and step number, and nothing else.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from .cache import weights_digest
from .devices import autocast, pick_device
from .errors import HarmonyError
from .files import atomic_path
from .progress import progress
from .seeds import generator, rng


class TrainingDiverged(HarmonyError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainSettings:
    """Optimiser and schedule of one training run (DiffHarmony++ Sec. 5.2 unless a stage says otherwise).

    warmup is a share of steps; schedule is "constant" or "cosine" (to zero) after it; ema_decay 0 switches EMA off.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-4
    warmup: float = 0.02
    schedule: str = "constant"
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    precision: str = "auto"
    checkpoint_seconds: float = 60.0

    @classmethod
    def of(cls, run, name: str, task: str = "harmonize") -> "TrainSettings":
        """The training fields of section `name` of the run's settings; the section's other keys are the stage's own.

        Of the two tasks "harmonize" takes `steps` and "inverse" `inverse_steps`.
        """
        section = getattr(run, name)
        names = [field.name for field in fields(cls)]
        values = {name: getattr(section, name) for name in names if hasattr(section, name)}
        values["precision"] = run.precision
        return cls(**values | ({"steps": section.inverse_steps} if task == "inverse" else {}))

    def __post_init__(self):
        if self.steps < 0 or self.batch_size < 1:
            raise HarmonyError(f"steps must be >= 0 and batch_size >= 1, not {self.steps} and {self.batch_size}")
        if self.schedule not in ("constant", "cosine"):
            raise HarmonyError(f"schedule {self.schedule!r} is unknown; use constant or cosine")


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up over `warmup * steps`, then constant or half a cosine down to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())


def batch_indices(step: int, count: int, batch_size: int, seed) -> list[int]:
    """The data-set indices of one step: shuffled epochs laid end to end, a pure function of (seed, step)."""
    if count < 1:
        raise HarmonyError("the training list is empty; check the data folder with `harmonylib check-data`")
    indices, position = [], step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, count)
        order = rng(seed, "order", epoch).permutation(count)[offset : offset + batch_size - len(indices)]
        indices += order.tolist()
        position += len(order)
    return indices


@contextlib.contextmanager
def ema_weights(model, ema):
    """Swap the EMA weights in for validation or saving, and the training weights back afterwards."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


class Checkpoints:
    """Resume points of one run in a folder keyed by settings, data and code; the last two are kept."""

    def __init__(self, root, key: dict):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = Path(root) / digest

    def save(self, state: dict) -> None:
        with atomic_path(self.folder / f"step-{state['step']:08d}.pt") as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def load(self) -> dict | None:
        """The newest readable state, or None. A damaged file is removed and the one before it is used."""
        for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception:
                path.unlink()
        return None

    def clear(self) -> None:
        for path in self.folder.glob("step-*.pt"):
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()


@functools.cache
def code_hash() -> str:
    """Hash of harmonylib's own source, so that changed code never resumes an older run."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def train(
    model,
    loss,
    make_batch,
    settings: TrainSettings,
    *,
    name: str,
    seed: int,
    device="auto",
    extra_modules=(),
    observe=None,
    observations: int = 10,
    checkpoints=None,
    key=None,
) -> list[dict]:
    """Train `model` in place and leave the EMA weights in it, in eval mode.

    loss(model, batch, generator) returns a dict of scalar tensors with "loss"; make_batch(step) returns a dict of CPU
    tensors. extra_modules are trained along (a loss's own MLP). observe(model) -> dict of numbers is called
    `observations` times with the EMA weights. checkpoints: a folder for resume points, keyed by settings, starting
    weights, code and `key` (data and options of the loss). Returns the history: a list of {"step", "loss", ...}, each
    the mean over 1/50 of the run. Raises TrainingDiverged when the loss is not finite.
    """
    device = pick_device(device)
    modules = [m.to(device, memory_format=torch.channels_last) for m in (model, *extra_modules)]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type != "mps"
    )
    ema = EMAModel(model.parameters(), decay=settings.ema_decay) if settings.ema_decay else None
    store = (
        Checkpoints(
            checkpoints,
            {
                "settings": asdict(settings),
                "name": name,
                "seed": seed,
                "start": weights_digest(model),
                "key": key,
                "code": code_hash(),
            },
        )
        if checkpoints
        else None
    )
    history, start = [], 0
    state = store.load() if store else None
    if state:
        for module, saved in zip(modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        optimiser.load_state_dict(state["optimiser"])
        if ema:
            ema.load_state_dict(state["ema"])
            ema.to(device)
        history, start = state["history"], state["step"]
    window = max(1, settings.steps // 50)
    sums, last_save = defaultdict(float), time.monotonic()
    for module in modules:
        module.train()
    bar = progress(range(start, settings.steps), desc=name, unit="step")
    for step in bar:
        batch = {k: v.to(device, non_blocking=True) for k, v in make_batch(step).items()}
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        with autocast(device, settings.precision):
            terms = loss(model, batch, generator(seed, name, "step", step))
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if ema:
            ema.step(model.parameters())
        for term, value in terms.items():
            sums[term] = sums[term] + value.detach().float()
        done = step + 1
        if done % window == 0 or done == settings.steps:
            count = done % window or window
            entry = {"step": done, **{term: (value / count).item() for term, value in sums.items()}}
            sums = defaultdict(float)
            if not torch.isfinite(torch.tensor(entry["loss"])):
                raise TrainingDiverged(f"{name}: the loss is not finite at step {done}; lower learning_rate")
            if observe and (done % max(1, settings.steps // observations) < window or done == settings.steps):
                model.eval()
                with ema_weights(model, ema), torch.no_grad():
                    entry |= observe(model)
                model.train()
            history.append(entry)
            bar.set_postfix(loss=f"{entry['loss']:.4f}")
            if store and done < settings.steps and time.monotonic() - last_save > settings.checkpoint_seconds:
                store.save(
                    {
                        "step": done,
                        "modules": [m.state_dict() for m in modules],
                        "history": history,
                        "optimiser": optimiser.state_dict(),
                        "ema": ema.state_dict() if ema else None,
                    }
                )
                last_save = time.monotonic()
    if ema:
        ema.copy_to(model.parameters())
    for module in modules:
        module.eval()
    if store:
        store.clear()
    return history
