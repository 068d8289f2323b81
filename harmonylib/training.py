"""The one training loop: optimiser, schedule, EMA, mixed precision, logging, checkpoint and exact resume.

A notebook gives it a model, a loss and batches. Every random draw of a step is seeded by (seed, name, step), so the
state of a run is its weights, optimiser, EMA and step number, and nothing else. Under torchrun the processes share each
step's batch. As a program it trains a stage without its notebook (`tools/train.py`):

    python -m harmonylib.training params.yaml harmony_vae --task inverse
    torchrun --nproc-per-node 8 -m harmonylib.training params.yaml diffharmony
"""

import contextlib
import functools
import hashlib
import inspect
import math
import runpy
import time
from dataclasses import asdict, dataclass, fields

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save, save_file
from torch import nn

from .core.cache import settings_of, weights_digest
from .core.checkpoints import Checkpoints, code_hash, stop_signals
from .core.devices import autocast, pick_device
from .core.distributed import ShareOfDraws, join_group, rank_and_world
from .core.errors import HarmonyError, note
from .core.files import atomic_path, only_one
from .core.json_files import write_json
from .core.progress import progress
from .core.seeds import generator
from .data.batches import prefetched

CHECK = 20  # steps between looks at the loss on a GPU, which must wait for each look


class TrainingDiverged(HarmonyError):
    """The loss or its gradient became NaN or infinite."""


# ---- settings ----


@dataclass(frozen=True)
class TrainSettings:
    """Optimiser and schedule of one training run (DiffHarmony++ Sec. 5.2 unless a stage says otherwise).

    warmup is a share of steps; schedule is "constant" or "cosine" (to zero) after it; ema_decay 0 switches EMA off.
    compile: through torch.compile, which needs a C++ compiler or Triton and takes its time at the start of a run.
    accumulation: into so many parts a process's share of a batch is cut, which take turns; checkpointing: activations
    are computed again in the backward pass. Both need less memory for the same result, up to rounding.
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
    compile: bool = False
    accumulation: int = 1
    checkpointing: bool = False
    checkpoint_seconds: float = 60.0

    @classmethod
    def of(cls, run, name: str, task: str = "harmonize") -> "TrainSettings":
        """The training fields of section `name` of the run's settings; <task>_steps goes before steps, and so on."""
        section = vars(getattr(run, name))
        names = [field.name for field in fields(cls)]
        values = {name: section[key] for name in names for key in (name, f"{task}_{name}") if key in section}
        values |= {"precision": run.precision, "compile": run.compile}
        return cls(**values, accumulation=run.accumulation, checkpointing=run.checkpointing)


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up over `warmup * steps`, then constant or half a cosine down to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())


# ---- one step ----


class _Step(nn.Module):
    """The loss of a batch as a module's forward pass: what DistributedDataParallel wraps to average gradients."""

    def __init__(self, model, loss, compiled: bool):
        super().__init__()
        self.model, self.loss = model, loss
        # In a tuple: no second owner of the weights. Methods of the model beside forward stay as they are.
        self.called = (torch.compile(model) if compiled else model,)

    def forward(self, batch, generator):
        return self.loss(*self.called, batch, generator)


class _Run:
    """What one training run changes as it goes: weights, optimiser, EMA and loss scale, saved and restored together."""

    def __init__(self, model, loss, settings: TrainSettings, device: torch.device):
        self.settings, self.device, self.model = settings, device, model
        self.modules = [model, *([loss] if isinstance(loss, nn.Module) else [])]  # a loss may have weights, too
        for module in self.modules:
            module.to(device, memory_format=torch.channels_last).train()
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.optimiser = torch.optim.AdamW(self.parameters, fused=device.type != "mps", **rates)
        self.ema = EMAModel(model.parameters(), decay=settings.ema_decay) if settings.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.others = [self.optimiser, self.scaler, *([self.ema] if self.ema else [])]
        self.loss = _Step(model, loss, settings.compile)
        self.rank, self.world = rank_and_world()
        if settings.checkpointing and getattr(model, "_supports_gradient_checkpointing", False):
            model.enable_gradient_checkpointing()
        # A batch that does not divide by the processes is shared out by fewer: several compute the same share.
        self.shares = math.gcd(settings.batch_size, self.world)
        self.parts = math.gcd(settings.batch_size // self.shares, settings.accumulation)

    def state(self, finished: bool = False) -> dict:
        modules = {"modules": [module.state_dict() for module in self.modules]}
        return modules | ({} if finished else {"others": [part.state_dict() for part in self.others]})

    def restore(self, state: dict) -> None:
        """Take up a `state`; that of a finished run has weights alone."""
        for part, saved in zip([*self.modules, *self.others], state["modules"] + state.get("others", []), strict=False):
            part.load_state_dict(saved)
        if self.ema:
            self.ema.to(self.device)

    def share_out(self, step: int) -> None:
        """Join the other processes, if there are any; from here on `step` averages gradients over them."""
        if self.world == 1:
            return
        if self.shares < self.world and self.rank == 0:
            note(
                f"a batch of {self.settings.batch_size} is shared by {self.shares} of {self.world} processes at a time"
            )
        join_group(self.device)
        ends = torch.tensor([step, -step], device=self.device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN)
        if ends[0] != -ends[1]:
            raise HarmonyError("the processes go on from different steps; their checkpoints must be in a shared folder")
        self.loss = nn.parallel.DistributedDataParallel(self.loss)

    def step(self, step: int, batch: dict, draws: torch.Generator) -> tuple[dict, torch.Tensor]:
        """One update; returns the loss's terms over this process's share, and a number, finite if all is well."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.settings)
        start, found = draws.get_state(), []
        for part in range(self.parts):
            draws.set_state(start)
            last = part == self.parts - 1 or self.world == 1
            with contextlib.nullcontext() if last else self.loss.no_sync():
                found.append(self._part(batch, draws, self.rank % self.shares * self.parts + part))
        terms = {name: torch.stack([part[name] for part in found]).mean(0) for name in found[0]}
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(self.model.parameters())
        # fp16's loss scale makes gradients overflow now and then, and skips such a step: there the loss alone counts
        return terms, terms["loss"] if self.scaler.is_enabled() else terms["loss"] + 0 * norm

    def _part(self, batch: dict, draws: torch.Generator, number: int) -> dict:
        """Add the gradient of one of the parts that the batch is cut into; returns its loss's terms."""
        count = self.shares * self.parts
        rows = self.settings.batch_size // count
        share = slice(number * rows, (number + 1) * rows)
        batch = {name: value[share].to(self.device, non_blocking=True) for name, value in batch.items()}
        shared = ShareOfDraws(draws, rows, number, count) if count > 1 else contextlib.nullcontext()
        with autocast(self.device, self.settings.precision), shared:
            terms = self.loss(batch, draws)
        self.scaler.scale(terms["loss"] / self.parts).backward()
        return {name: value.detach().float() for name, value in terms.items()}

    def observed(self, observe) -> dict:
        """What `observe` says of the model with its EMA weights; the training weights come back afterwards."""
        self.model.eval()
        if self.ema:
            self.ema.store(self.model.parameters())
            self.ema.copy_to(self.model.parameters())
        with torch.no_grad():
            found = observe(self.model)
        if self.ema:
            self.ema.restore(self.model.parameters())
        self.model.train()
        return found


# ---- the loop ----


def _start(module) -> list:
    """A module's weights, its architecture, and which of its parameters are trained."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [weights_digest(module), settings_of(module.config) if hasattr(module, "config") else repr(module), trained]


def _key(modules, loss, batches, settings: TrainSettings, name: str, seed: int) -> dict:
    """All that decides a run's result: a resume point is taken up by a run with the same key only.
    Batches and loss may have a `key` of their own, for what neither the first batch nor the loss's source shows."""
    first = {name: value.contiguous() for name, value in batches(0).items()} if settings.steps else {}
    source = ""
    with contextlib.suppress(OSError, TypeError):  # typed at a prompt, or no function
        source = inspect.getsource(type(loss) if isinstance(loss, nn.Module) else loss)  # it may stand in a notebook
    return {
        "name": name,
        "seed": seed,
        "settings": asdict(settings),
        "start": [_start(module) for module in modules],
        "batches": [getattr(batches, "key", None), hashlib.sha256(save(first)).hexdigest()],
        "loss": [getattr(loss, "key", None), source],
        "code": code_hash(),
    }


def train(model, loss, batches, settings: TrainSettings, *, name: str, seed: int, device="auto", observe=None,
          checkpoints=None, curve=None) -> list[dict]:  # fmt: skip
    """Train `model` in place and leave the EMA weights in it, in eval mode.

    loss(model, batch, generator) returns a dict of scalar tensors with "loss", means over the batch, and draws only
    from `generator`; a loss that is a Module is trained along. batches(step) returns a dict of CPU tensors, their first
    dimension the batch, and is called one step ahead in a thread. observe(model) -> dict of numbers is called ten times
    with the EMA weights. checkpoints: a folder for resume points. Returns the history: a list of {"step", "loss", ...},
    each the mean over 1/50 of the run. curve: a JSON file of the history so far, for who watches.

    Killed at any moment and called again, it ends with the same weights, bit by bit on one machine. Ctrl-C and SIGTERM
    end the step, save and raise KeyboardInterrupt. Under torchrun the checkpoints' folder must be one that all see;
    models without BatchNorm end as with one process, up to rounding, if the loss is a plain mean over images.
    Raises TrainingDiverged when loss or gradient is not finite (the batch lies with the checkpoints), and HarmonyError
    when another process trains the same.
    """
    run, store = _Run(model, loss, settings, pick_device(device)), None
    if checkpoints:
        key = _key(run.modules, loss, batches, settings, name, seed)
        store = Checkpoints(checkpoints, key | {"observed": observe is not None})
    with only_one(store.folder) if store and run.rank == 0 else contextlib.nullcontext():
        show = functools.partial(_write_curve, curve) if curve and run.rank == 0 else lambda history: None
        history = _loop(run, batches, name, seed, observe, store, show)
        show(history)  # also of a run that had finished before
    for module in run.modules:
        module.eval()
    return history


def _write_curve(path, history: list[dict]) -> None:
    names = dict.fromkeys(name for entry in history for name in entry)  # DVC draws what every entry has
    write_json(path, [{name: entry.get(name) for name in names} for entry in history])


def _loop(run: _Run, batches, name: str, seed: int, observe, store, show) -> list[dict]:
    steps, on_cpu, writes = run.settings.steps, run.device.type == "cpu", store is not None and run.rank == 0

    # Go on where an earlier run of the same key stopped; a finished one is only read.
    state = {"step": 0, "history": [], "sums": {}}
    if saved := store.load() if store else None:
        run.restore(saved)
        state = {key: saved[key] for key in state}
        if "others" not in saved:
            return state["history"]
        state["sums"] = {term: value.to(run.device) for term, value in state["sums"].items()}
    elif writes:
        store.tell_of_others()
    run.share_out(state["step"])

    window = max(1, steps // 50)  # steps of an entry in the history
    first_bad = torch.full((), float("inf"), device=run.device)  # stays on the GPU, which needs not wait for it
    began, began_at = time.monotonic(), state["step"]
    last_save, save_seconds = began, 0.0
    bar = progress(total=steps, desc=name, unit="step")
    bar.update(began_at)
    made = functools.partial(prefetched, batches, device=run.device, precision=run.settings.precision)
    ahead = made(range(began_at, steps))
    with stop_signals() as caught, bar, contextlib.closing(ahead):
        for step, batch in ahead:
            terms, health = run.step(step, batch, generator(seed, name, "step", step))
            first_bad = torch.where(health.isfinite(), first_bad, first_bad.clamp(max=step))
            for term, value in terms.items():
                state["sums"][term] = state["sums"].get(term, 0) + value
            state["step"] = done = step + 1
            bar.update()
            last, look = done == steps, on_cpu or done % CHECK == 0

            # No entry and no resume point may hold what a NaN has touched.
            if (look or last or caught or done % window == 0) and first_bad.isfinite():
                raise TrainingDiverged(_diverged(int(first_bad), made, name, seed, store))

            if done % window == 0 or last:
                means = torch.stack(list(state["sums"].values())) / (done % window or window)
                if run.world > 1:
                    torch.distributed.all_reduce(means)
                entry = {"step": done, **dict(zip(state["sums"], (means / run.world).tolist(), strict=True))}
                state["sums"] = {}
                if observe and (done % max(1, steps // 10) < window or last):
                    entry |= run.observed(observe)
                state["history"].append(entry)
                show(state["history"])  # the whole, so that a resumed run neither repeats nor loses an entry
                rate = (done - began_at) * run.settings.batch_size / (time.monotonic() - began)
                bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:.3g} images/s")

            # A large state takes its time to save: with the default, at most a sixtieth of the whole.
            due = time.monotonic() - last_save > run.settings.checkpoint_seconds * max(1.0, save_seconds)
            if writes and not last and (caught or (due and look)):
                started = time.monotonic()
                store.save(state | run.state())
                last_save, save_seconds = time.monotonic(), time.monotonic() - started
            if caught and not last:
                raise KeyboardInterrupt(f"{name}: stopped after step {done}; run it again to go on")

    if run.ema:
        run.ema.copy_to(run.model.parameters())
    for buffer in run.model.buffers() if run.world > 1 else ():  # BatchNorm's are each process's own until now
        torch.distributed.broadcast(buffer, 0)
    if writes:
        store.finish(state | run.state(finished=True))
    if caught:
        raise KeyboardInterrupt
    return state["history"]


def _diverged(step: int, made, name: str, seed: int, store) -> str:
    """What to tell of a loss that is not finite; the step's batch is made again and saved with the checkpoints."""
    where = ""
    if store:
        path = store.folder / f"diverged-{step:08d}.safetensors"
        with atomic_path(path) as temporary:
            ((_, batch),) = made(range(step, step + 1))
            tensors = {key: value.contiguous() for key, value in batch.items()}
            save_file(tensors, temporary, {"name": name, "seed": str(seed), "step": str(step)})
        where = f"; its batch is in {path}"
    return f"{name}: loss or gradient is not finite at step {step + 1}{where}; lower learning_rate"


if __name__ == "__main__":  # by name: training imports no model, and none of the tools
    runpy.run_module("harmonylib.tools.train", run_name="__main__")
