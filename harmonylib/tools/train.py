"""`python -m harmonylib.training SETTINGS SECTION`: train what a stage trains without its notebook, also by torchrun.

The weights go where the stage writes them. The finished run stays in artifacts/checkpoints, too: `dvc repro` takes it
up there and trains nothing anew.
"""

import sys
from pathlib import Path

import typer

from ..core.checkpoints import RESUME_POINTS
from ..core.distributed import by_first
from ..core.errors import HarmonyError
from ..core.settings import did_you_mean, enter_root, settings
from ..data.batches import TASKS, TripleSet, load_pairs
from ..data.layout import read_triples
from ..data.recipes import RecipeSettings
from ..models.base import open_base, train_base
from ..models.contrastive import resunet_batches, resunet_loss
from ..models.diffusion import DiffHarmonyLoss, diffharmony_batches, edge_and_first_step
from ..models.pipeline import DiffHarmonyPipeline
from ..models.start import initial_harmony_vae, initial_prompt, initial_resunet, initial_unet, start_folder
from ..models.vae import HarmonyVAE, harmony_vae_batches, harmony_vae_loss, skip_norms
from ..training import TrainSettings, train
from .terminal import run as run_application


def base(run, task):
    pipeline = open_base(run.base, run.seed)
    files = {(triple.real, triple.mask) for triple in read_triples("data/benchmark", "train")}
    train_base(pipeline, load_pairs(sorted(files)), run, RESUME_POINTS, "artifacts/base")
    return pipeline, "artifacts/base"


def harmony_vae(run, task):
    section, vae = run.harmony_vae, DiffHarmonyPipeline.from_pretrained("artifacts/base", device=run.device).vae.eval()
    data = TripleSet(read_triples("data/benchmark", "train"), section.size, "centre-crop")
    model = initial_harmony_vae(section, start_folder(section.start, task), vae, run.seed)
    batches = harmony_vae_batches(model, data, task, section, run.seed, recipes(run))
    folder, settings = f"artifacts/harmony_vae/{task}", TrainSettings.of(run, "harmony_vae", task)
    options = {"name": f"harmony-vae {task}", "observe": skip_norms, **loop(run, folder)}
    train(model, harmony_vae_loss(section.loss), batches, settings, **options)
    return model, folder


def diffharmony(run, task):
    section, pipeline = run.diffharmony, DiffHarmonyPipeline.from_pretrained("artifacts/base", device=run.device)
    data = TripleSet(read_triples("data/benchmark", "train"), section.size)
    vae = HarmonyVAE.from_pretrained(f"artifacts/harmony_vae/{task}")
    start = start_folder(section.start, task)
    unet, prompt = initial_unet(section, start, pipeline), initial_prompt(section, start, pipeline, task)
    batches = diffharmony_batches(pipeline.vae, data, task, section, run.seed, recipes(run))
    first_step = edge_and_first_step(section, task)[1]
    loss = DiffHarmonyLoss(pipeline, prompt, section.foreground_loss, first_step)
    settings = TrainSettings.of(run, "diffharmony", task)
    folder = f"artifacts/diffharmony/{task}"
    train(unet, loss, batches, settings, name=f"diffharmony {task}", **loop(run, folder))
    vae.register_to_config(sample_size=section.size)
    trained = DiffHarmonyPipeline(vae, unet, pipeline.scheduler, prompt, section.inference_steps)
    return trained, folder


def resunet(run, task):
    section, data = run.resunet, TripleSet(read_triples("data/benchmark", "train"), run.resunet.size)
    model = initial_resunet(section, start_folder(section.start, "resunet"), run.seed)
    loss = resunet_loss(section)
    batches = resunet_batches(data, section, run.seed, recipes(run))
    folder, settings = "artifacts/contrastive_resunet", TrainSettings.of(run, "resunet")
    train(model, loss, batches, settings, name="contrastive resunet", **loop(run, folder))
    return model, folder


def recipes(run) -> RecipeSettings:
    return RecipeSettings(transfers=run.data.transfers, clipped=run.data.clipped)


def loop(run, folder: str) -> dict:
    return {"seed": run.seed, "device": run.device, "checkpoints": RESUME_POINTS, "curve": f"{folder}/training.json"}


SECTIONS = {"base": base, "harmony_vae": harmony_vae, "diffharmony": diffharmony, "resunet": resunet}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def train_section(
    file: Path = typer.Argument(metavar="SETTINGS", help="params.yaml, or a file like it"),
    section: str = typer.Argument(metavar="SECTION", help="base, harmony_vae, diffharmony or resunet"),
    task: str = typer.Option("harmonize", help="of harmony_vae and diffharmony: harmonize or inverse"),
) -> None:
    """Train the model of a section of the settings and save it where its stage does; torchrun shares out each batch."""
    for name, known in ((section, SECTIONS), (task, TASKS)):
        if name not in known:
            raise HarmonyError(f"{name} cannot be trained{did_you_mean(name, known)} (known: {', '.join(known)})")
    run = settings(file.resolve())
    enter_root()
    model, folder = SECTIONS[section](run, task)
    by_first(lambda: model.save_pretrained(folder), run.device)
    typer.echo(folder)


if __name__ == "__main__":
    sys.exit(run_application(app, "python -m harmonylib.training"))
