"""`python -m pretrained.gpu.resunet PHOTOS OUT --index all.csv`: train a ResUNet on one GPU."""

import sys
from pathlib import Path

import torch
import typer

from harmonylib.core.devices import autocast, pick_device
from harmonylib.core.json_files import write_json
from harmonylib.core.seeds import seed_for
from harmonylib.models.contrastive import ResUNetLoss
from harmonylib.models.resunet import ContrastiveResUNet, build
from harmonylib.tools.terminal import run
from harmonylib.training import TrainSettings

from .loop import train
from .photos import read_photos
from .recipes import Composites

NEW = {"residual_convs": 1, "head": "colour", "encoder": "tf_efficientnet_lite0", "base_channels": 16}
app = typer.Typer(add_completion=False)


@app.command()
def main(photos: Path, out: Path, index: Path = None, start: Path = None, minutes: float = 10, steps: int = 0,
         batch_size: int = 1024, learning_rate: float = 1e-3, warmup: float = 0.03, ema: float = 0.996,
         pieces: int = 4000, size: int = 256, seed: int = 0, device: str = "auto"):  # fmt: skip
    """Train on composites of PHOTOS and save to OUT. start: the folder of a ResUNet to go on from; steps go before
    minutes; warmup: a share of the run."""
    at, data = pick_device(device), read_photos(photos, index, size, pieces, seed)
    torch.manual_seed(seed)
    network = (ContrastiveResUNet.from_pretrained(start) if start else build(size, **NEW)).to(at)
    context = network._context

    def in_bf16(*view):
        with autocast(at):
            return context(*view)

    network._context = in_bf16
    schedule = {"learning_rate": learning_rate, "warmup": warmup, "ema_decay": ema}
    settings = TrainSettings(steps or 10_000, batch_size, schedule="cosine", weight_decay=0.01, **schedule)
    batches, draws = Composites(data, batch_size, seed, at), torch.Generator(at).manual_seed(seed_for(seed, "resunet"))
    loss = ResUNetLoss((0.0, 1.0, 0.0), "rmse")
    history = train("ResUNet", network, loss, batches, settings, None if steps else minutes, draws)
    del network._context
    network.save_pretrained(out)
    write_json(out / "training.json", history)


if __name__ == "__main__":
    sys.exit(run(app, "python -m pretrained.gpu.resunet"))
