"""The loop of the trainings on one GPU, by the clock or by steps, from which nothing resumes."""

import math
import time

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from harmonylib.core.progress import progress
from harmonylib.training import TrainingDiverged, TrainSettings, learning_rate_at

LOOKS = 50  # entries in the history of a run; the GPU is waited for at each


def train(name, model, loss, batches, settings: TrainSettings, minutes: float | None, draws) -> list[dict]:
    """Train `model`, and a loss that is a module, where they are; leave the EMA weights in them. Returns the history.

    loss(model, batch, draws) and batches(step) as of `training.train`, but batches lie on the device. minutes: the
    length of the run, with settings.steps only the grain of the schedule; None: settings.steps. Raises
    TrainingDiverged when the loss is not finite.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    modules = [module.train() for module in (model, loss) if isinstance(module, nn.Module)]
    weights = [weight for module in modules for weight in module.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=settings.weight_decay, fused=True)
    ema = EMAModel(weights, decay=settings.ema_decay, foreach=True)
    step, done, began, history, losses = 0, 0.0, time.monotonic(), [], []
    with progress(desc=name, unit=" images") as bar:
        while done < 1:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(int(done * settings.steps), settings)
            value = loss(model, batches(step), draws)["loss"]
            value.backward()
            nn.utils.clip_grad_norm_(trained, settings.grad_clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.step(weights)
            losses.append(value.detach())
            step, passed = step + 1, time.monotonic() - began
            done = passed / (60 * minutes) if minutes else step / settings.steps
            bar.update(settings.batch_size)
            if done >= 1 or LOOKS * done > len(history) + 1:
                mean, losses = torch.stack(losses).mean().item(), []
                if not math.isfinite(mean):
                    raise TrainingDiverged(f"{name}: the loss is not finite at step {step}; lower the learning rate")
                history.append({"step": step, "seconds": time.monotonic() - began, "loss": mean})
                bar.set_postfix_str(f"loss {mean:.4f}")
    ema.copy_to(weights)
    for module in modules:
        module.eval()
    return history
