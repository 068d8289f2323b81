"""The one training loop: optimiser, schedule, EMA, mixed precision, logging, checkpoint and exact resume.

A stage gives it a model, a function from step to batch and a loss closure. Every random draw of a step is seeded by
(seed, step), so the state of a run is its weights, optimiser, EMA and step number, and nothing else. Under torchrun the
processes share each step's batch (`torchrun --nproc-per-node 8 -m harmonylib.tools.cli pretrain ...`).
"""

import contextlib
import hashlib
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save, save_file
from torch import nn

from .core.cache import weights_digest
from .core.checkpoints import Checkpoints, code_hash
from .core.devices import autocast, pick_device
from .core.distributed import ShareOfDraws, join_group, rank_and_world
from .core.errors import HarmonyError
from .core.files import atomic_path, only_one
from .core.progress import progress
from .core.seeds import generator, rng


class TrainingDiverged(HarmonyError):
    """The loss or its gradient became NaN or infinite."""


@dataclass(frozen=True)
class TrainSettings:
    """Optimiser and schedule of one training run (DiffHarmony++ Sec. 5.2 unless a stage says otherwise).

    warmup is a share of steps; schedule is "constant" or "cosine" (to zero) after it; ema_decay 0 switches EMA off.
    compile: run the model through torch.compile, which needs a C++ compiler or, on CUDA, Triton, and takes its time at
    the start of a run.
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
    checkpoint_seconds: float = 60.0

    @classmethod
    def of(cls, run, name: str, task: str = "harmonize") -> "TrainSettings":
        """The training fields of section `name` of the run's settings; the section's other keys are the stage's own.

        Of the two tasks "harmonize" takes `steps` and `learning_rate`, "inverse" the keys with that name before them.
        """
        section = getattr(run, name)
        prefix = {"harmonize": "", "inverse": "inverse_"}[task]
        names = [field.name for field in fields(cls)]
        values = {name: getattr(section, name) for name in names if hasattr(section, name)}
        own = ("steps", "learning_rate")
        values |= {name: getattr(section, prefix + name) for name in own if hasattr(section, prefix + name)}
        return cls(**values | {"precision": run.precision, "compile": run.compile})

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


@contextlib.contextmanager
def _signals():
    """Yield a list that Ctrl-C and SIGTERM add to, so that a step is never cut in two; the second one interrupts."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prefetched(make_batch, steps: range, pinned: bool):
    """(step, batch) in order; a thread makes the next batch, in pinned memory if asked, while the caller uses this."""

    def prepare(step):
        batch = make_batch(step)
        return {name: value.pin_memory() for name, value in batch.items()} if pinned else batch

    with ThreadPoolExecutor(1, "prefetch") as pool:
        ahead = pool.submit(prepare, steps[0]) if steps else None
        for step in steps:
            batch = ahead.result()
            ahead = pool.submit(prepare, step + 1) if step + 1 in steps else None
            yield step, batch


class _Step(nn.Module):
    """The loss of a batch as a module's forward pass: what DistributedDataParallel wraps to average gradients.

    compiled: the loss calls the first module through torch.compile (its methods beside forward stay as they are).
    """

    def __init__(self, modules, loss, compiled: bool):
        super().__init__()
        self.parts, self.loss = nn.ModuleList(modules), loss
        self.called = (torch.compile(modules[0]) if compiled else modules[0],)  # in a tuple: no second owner of weights

    def forward(self, batch, generator):
        return self.loss(*self.called, batch, generator)


class _Run:
    """What one training run changes as it goes: modules, optimiser, EMA and loss scale, saved and restored together."""

    def __init__(self, modules, loss, settings: TrainSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.modules = [module.to(device, memory_format=torch.channels_last) for module in modules]
        self.model = self.modules[0]
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        fused = device.type != "mps"
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
        )
        self.ema = EMAModel(self.model.parameters(), decay=settings.ema_decay) if settings.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.loss = _Step(self.modules, loss, settings.compile)
        self.rank, self.world = rank_and_world()

    def state(self) -> dict:
        return {
            "modules": [module.state_dict() for module in self.modules],
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        for module, saved in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        if "optimiser" not in state:  # finished
            return
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)

    def share_out(self, step: int) -> None:
        """Join the other processes, if there are any; from here on `step` averages gradients over them."""
        if self.world == 1:
            return
        if self.settings.batch_size % self.world:
            raise HarmonyError(f"batch_size {self.settings.batch_size} does not divide by {self.world} processes")
        join_group(self.device)
        ends = torch.tensor([step, -step], device=self.device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN)
        if ends[0] != -ends[1]:
            raise HarmonyError("the processes go on from different steps; their checkpoints must be in a shared folder")
        self.loss = nn.parallel.DistributedDataParallel(self.loss)

    def step(self, step: int, batch: dict, draws: torch.Generator) -> tuple[dict, torch.Tensor]:
        """One update; returns the loss's terms over this process's share, and a number, finite if all is well."""
        rows = self.settings.batch_size // self.world
        share = slice(self.rank * rows, (self.rank + 1) * rows)
        batch = {name: value[share].to(self.device, non_blocking=True) for name, value in batch.items()}
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.settings)
        with (
            autocast(self.device, self.settings.precision),
            ShareOfDraws(draws, rows) if self.world > 1 else contextlib.nullcontext(),
        ):
            terms = self.loss(batch, draws)
        self.scaler.scale(terms["loss"]).backward()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(self.model.parameters())
        terms = {name: value.detach().float() for name, value in terms.items()}
        return terms, terms["loss"] if self.scaler.is_enabled() else terms["loss"] + 0 * norm

    def mean(self, sums: dict, count: int) -> dict:
        """The terms' means over `count` steps and all processes, as numbers."""
        values = torch.stack(list(sums.values())) / count
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(sums, (values / self.world).tolist(), strict=True))


CHECK = 20  # steps between looks at the loss on a GPU, which must wait for each look


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

    loss(model, batch, generator) returns a dict of scalar tensors with "loss", means over the batch, and draws only
    from `generator`; make_batch(step) returns a dict of CPU tensors, their first dimension the batch, and is called one
    step ahead in a thread. extra_modules are trained along (a loss's own MLP). observe(model) -> dict of numbers is
    called `observations` times with the EMA weights. checkpoints: a folder for resume points, keyed by settings,
    starting weights, first batch, code and `key` (data and options of the loss). Returns the history: a list of
    {"step", "loss", ...}, each the mean over 1/50 of the run.

    Killed at any moment and called again, it ends with the same weights, bit by bit on one machine. Ctrl-C and SIGTERM
    end the step, save and raise KeyboardInterrupt. Under torchrun each process takes an equal share of every batch and
    the first one writes; the checkpoints' folder must be one that all see. Models without BatchNorm end as with one
    process, up to rounding, if the loss is a plain mean over images.
    Raises TrainingDiverged when loss or gradient is not finite (the batch lies with the checkpoints), and HarmonyError
    when another process trains the same or the batch does not divide by the number of processes.
    """
    run = _Run((model, *extra_modules), loss, settings, pick_device(device))
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoints:
            words = {"settings": asdict(settings), "name": name, "seed": seed, "start": weights_digest(model)}
            first = {k: v.contiguous() for k, v in make_batch(0).items()} if settings.steps else {}
            words |= {"batch": hashlib.sha256(save(first)).hexdigest(), "key": key, "code": code_hash()}
            store = Checkpoints(checkpoints, words)
            if run.rank == 0:
                stack.enter_context(only_one(store.folder))
        history = _loop(run, make_batch, name, seed, observe, observations, store)
    for module in run.modules:
        module.eval()
    return history


def _loop(run: _Run, make_batch, name: str, seed: int, observe, observations: int, store) -> list[dict]:
    settings, on_cpu = run.settings, run.device.type == "cpu"
    state = {"step": 0, "history": [], "sums": {}}
    saved = store.load() if store else None
    if store and not saved and run.rank == 0:
        for line in store.stopped_otherwise():
            print(line, file=sys.stderr)
    if saved:
        run.restore(saved)
        state = {key: saved[key] for key in state}
        state["sums"] = {term: value.to(run.device) for term, value in state["sums"].items()}
        if "optimiser" not in saved:
            return state["history"]
    run.share_out(state["step"])
    for module in run.modules:
        module.train()
    window = max(1, settings.steps // 50)
    first_bad = torch.full((), float("inf"), device=run.device)
    last_save, save_seconds = time.monotonic(), 0.0
    began = state["step"], last_save
    bar = progress(total=settings.steps, desc=name, unit="step")
    bar.update(state["step"])
    batches = _prefetched(make_batch, range(state["step"], settings.steps), run.device.type == "cuda")
    with _signals() as caught, bar, contextlib.closing(batches):
        for step, batch in batches:
            terms, health = run.step(step, batch, generator(seed, name, "step", step))
            first_bad = torch.where(health.isfinite(), first_bad, first_bad.clamp(max=step))
            for term, value in terms.items():
                state["sums"][term] = state["sums"].get(term, 0) + value
            state["step"] = done = step + 1
            bar.update()
            last = done == settings.steps
            if (on_cpu or last or caught or done % CHECK == 0 or done % window == 0) and first_bad.isfinite():
                raise TrainingDiverged(_diverged(int(first_bad), make_batch, name, seed, store))
            if done % window == 0 or last:
                entry = {"step": done, **run.mean(state["sums"], done % window or window)}
                state["sums"] = {}
                if observe and (done % max(1, settings.steps // observations) < window or last):
                    run.model.eval()
                    with ema_weights(run.model, run.ema), torch.no_grad():
                        entry |= observe(run.model)
                    run.model.train()
                state["history"].append(entry)
                rate = (done - began[0]) * settings.batch_size / (time.monotonic() - began[1])
                bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:.3g} images/s")
            # A large state takes its time to save: with the default, at most a sixtieth of the whole.
            due = time.monotonic() - last_save > settings.checkpoint_seconds * max(1.0, save_seconds)
            if store and run.rank == 0 and not last and (caught or (due and (on_cpu or done % CHECK == 0))):
                started = time.monotonic()
                store.save(state | run.state())
                last_save = time.monotonic()
                save_seconds = last_save - started
            if caught and not last:
                raise KeyboardInterrupt(f"{name}: stopped after step {done}; run it again to go on")
    if run.ema:
        run.ema.copy_to(run.model.parameters())
    if store and run.rank == 0:
        store.finish(state | {"modules": [module.state_dict() for module in run.modules]})
    if caught:
        raise KeyboardInterrupt
    return state["history"]


def _diverged(step: int, make_batch, name: str, seed: int, store) -> str:
    """What to tell of a loss that is not finite; the step's batch is made again and saved with the checkpoints."""
    where = ""
    if store:
        with atomic_path(store.folder / f"diverged-{step:08d}.safetensors") as temporary:
            batch = {key: value.contiguous() for key, value in make_batch(step).items()}
            save_file(batch, temporary, {"name": name, "seed": str(seed), "step": str(step)})
        where = f"; its batch is in {store.folder}/diverged-{step:08d}.safetensors"
    return f"{name}: loss or gradient is not finite at step {step + 1}{where}; lower learning_rate"
