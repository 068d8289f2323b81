"""The `harmonylib` command. Each command imports what it needs itself, so that --help stays quick."""

import os
import sys

import typer

from ..core.errors import HarmonyError
from .cli_pictures import DEVICE, MASK_FROM, pictures
from .terminal import run

HELP = "Image harmonization: make a pasted foreground match its background."
app = typer.Typer(help=HELP, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(pictures)


@app.command()
def profile(
    name: str = typer.Argument(metavar="NAME", help="smoke, mini, gpu, paper or shipped: profiles/NAME.yaml"),
) -> None:
    """Write params.yaml from profiles/NAME.yaml."""
    from ..core.settings import write_profile

    typer.echo(f"{os.path.relpath(write_profile(name))} written from profiles/{name}.yaml")


@app.command()
def preflight(
    gpus: int = typer.Option(1, "--gpus", min=1, help="how many the hours are counted for"),
) -> None:
    """Say what this run needs and what of it is missing, before anything runs; exit code 1 where a stage would fail."""
    from ..core.settings import enter_root, settings
    from .preflight import preflight

    enter_root()
    found = preflight(settings(), gpus)
    for line in found.lines:
        typer.echo(line)
    for line in found.notes:
        typer.echo(f"note: {line}")
    for number, line in enumerate(found.missing, start=1):
        typer.echo(f"missing {number}: {line}")
    if found.missing:
        raise typer.Exit(1)
    typer.echo("nothing is missing")


@app.command()
def repro(
    targets: list[str] = typer.Argument(None, metavar="[TARGET...]", help="as of `dvc repro`; all stages unless given"),
    gpus: int = typer.Option(1, "--gpus", min=1, help="processes that share the work, one a GPU"),
) -> None:
    """Run the pipeline (`dvc repro`) on several GPUs."""
    import subprocess

    import torch

    from ..core.settings import enter_root
    from .notebooks import PROCESSES

    if 0 < torch.cuda.device_count() < gpus:
        raise HarmonyError(f"--gpus {gpus}: there are {torch.cuda.device_count()}; give at most so many")
    enter_root()
    command = [sys.executable, "-m", "dvc", "repro", *(targets or [])]
    raise typer.Exit(subprocess.run(command, env=os.environ | {PROCESSES: str(gpus)}).returncode)


@app.command()
def generate(
    data: str = typer.Argument(metavar="DATA", help="an iHarmony4-layout folder, or images/ and masks/ at any depth"),
    out: str = typer.Argument(metavar="OUT", help="the folder to write; call again to go on with a stopped run"),
    model: str = typer.Option("artifacts/diffharmony/inverse", help="the folder of an inverse model"),
    k: int = typer.Option(10, "-k", help="candidates per (real, mask) pair"),
    split: str = typer.Option("train", help="which list of an iHarmony4-layout folder: train or test"),
    seed: int = typer.Option(0),
    size: int = typer.Option(None, help="longest side in pixels; default: as the photos are"),
    steps: int = typer.Option(5, help="denoising steps"),
    temperature: float = typer.Option(1.0, help="scale of the initial noise"),
    mask_from: str = MASK_FROM,
    suffix: str = typer.Option(".png", help=".png, or .jpg, which keeps the background only nearly as it is"),
    precision: str = typer.Option("auto", help="auto, fp32, bf16 or fp16"),
    device: str = DEVICE,
) -> None:
    """Draw candidate composites of real photos; `torchrun -m harmonylib.tools.cli generate ...` shares out the work."""
    from dataclasses import replace

    from ..augmentation.candidates import MANIFEST, generate_candidates, pairs_of, visible_pairs
    from ..augmentation.sets import photo_pairs_of
    from ..data.layout import read_triples
    from ..data.readers import detect, photo_pairs
    from ..models.pipeline import DiffHarmonyPipeline

    listed = detect(data) == "iharmony4"
    pairs = pairs_of(read_triples(data, split)) if listed else photo_pairs_of(photo_pairs(data))
    pairs = [replace(pair, mask_from=mask_from) for pair in pairs]
    pipeline = DiffHarmonyPipeline.from_pretrained(model, device=device)
    kept = visible_pairs(pairs, size, pipeline.factor)
    if len(kept) < len(pairs):
        typer.echo(f"{len(pairs) - len(kept)} of {len(pairs)} masks are too small for the model: left out", err=True)
    if generate_candidates(pipeline, kept, out, k, seed, size, steps, temperature, suffix, precision):
        typer.echo(os.path.join(out, MANIFEST))


@app.command()
def evaluate(
    predictions: str = typer.Argument(metavar="PRED_DIR", help="NAME.png of every composite NAME, or SUBSET/NAME.png"),
    data: str = typer.Argument(metavar="DATA_DIR", help="a data set in iHarmony4's layout"),
    protocol: str = typer.Option("standard", help="standard, diffharmony, saic, hdnet, dovenet or iih"),
    split: str = typer.Option("test", help="the list to score: test or train"),
    paste: bool = typer.Option(False, help="put the composite's background on the predictions first"),
    against: str = typer.Option(None, metavar="DIR", help="another model's predictions: adds the paired differences"),
    json: str = typer.Option(None, help="where to write the averages with their intervals"),
    csv: str = typer.Option(None, help="where to write the table of every image"),
) -> None:
    """Score predictions against the real photos: every image, each subset, each foreground size and all."""
    from pathlib import Path

    import pandas as pd

    from ..core.files import atomic_path
    from ..core.json_files import write_json
    from ..evaluation.folder import score_folder
    from ..evaluation.metrics import METRICS, PROTOCOLS, buckets, compare, summarise

    folders = [predictions, against] if against else [predictions]
    names = [Path(folder).resolve().name for folder in folders]
    if names[0] in names[1:]:
        raise HarmonyError(f"{against}: has the name of {predictions}, and names tell models apart; rename one")
    table = pd.concat([score_folder(folder, data, protocol, split, paste) for folder in folders], ignore_index=True)
    summary, sizes = summarise(table), buckets(table, protocol=protocol)
    differences = {}
    if against:
        groups = {"all": table} | {str(name): part for name, part in table.groupby("subset")}
        differences[" vs ".join(names)] = {name: compare(part, *names) for name, part in groups.items()}

    def line(label, values):
        typer.echo(f"  {label:33s}" + "".join(f"{'–' if v is None else format(v, '.4g'):>12s}" for v in values))

    note = PROTOCOLS[protocol].note
    typer.echo(
        f"protocol {protocol}" + (", composite background pasted" if paste else "") + (f" ({note})" if note else "")
    )
    typer.echo(f"{'':20s}{'n':>7s}{'photos':>8s}" + "".join(f"{metric:>12s}" for metric in METRICS))
    for model, parts in summary.items():
        typer.echo(model)
        for group, part in (parts | {size: part for size, part in sizes[model].items() if size != "all"}).items():
            line(f"{group:18s}{part['n']:7d}{part['photos']:8d}", map(part.get, METRICS))
        for end, word in enumerate(("from", "to")):
            interval = parts["all"]["interval"]
            line(f"all, 95 % {word}", (interval[metric][end] if metric in interval else None for metric in METRICS))
        if "status" in parts["all"]:
            typer.echo("  " + parts["all"]["status"])
    for pair, parts in differences.items():
        typer.echo(f"{pair}, image by image")
        for group, part in parts.items():
            for place, word in enumerate(("mean", "95 % from", "95 % to")):
                line(f"{group}, {word}", (part.get(metric, (None,) * 3)[place] for metric in METRICS))
            if "status" in part:
                typer.echo("  " + part["status"])
    if csv:
        with atomic_path(csv) as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    if json:
        about = {"protocol": protocol + (", composite background pasted" if paste else ""), "split": split}
        about |= {"reported_by_its_code": PROTOCOLS[protocol].reports, "n": summary[names[0]]["all"]["n"]}
        about |= {"photos": int(table["photo"].nunique()), "models": summary, "buckets": sizes}
        write_json(json, about | ({"paired": differences} if differences else {}))


@app.command()
def study(
    page: str = typer.Argument(metavar="PAGE.html", help="the page to write; it works offline"),
    folders: list[str] = typer.Argument(metavar="METHOD=FOLDER...", help="the results of two methods or more"),
) -> None:
    """Write a blind preference study: participants open the page, vote and save a file for `harmonylib votes`."""
    from ..evaluation.study import read_folders, write_page

    named = dict(folder.partition("=")[::2] for folder in folders)
    if len(named) < len(folders) or not all(named.values()):
        raise HarmonyError(f"{' '.join(folders)}: must be METHOD=FOLDER, each method once")
    write_page(page, read_folders(named))
    typer.echo(page)


@app.command()
def votes(
    files: list[str] = typer.Argument(metavar="FILE...", help="what the participants saved"),
    json: str = typer.Option(None, help="where to write the table, e.g. reports/metrics/votes.json for the report"),
) -> None:
    """Count the votes of a preference study: votes, preference and its 95 % interval per method."""
    from ..core.json_files import write_json
    from ..evaluation.study import count_votes, read_votes

    table = count_votes(read_votes(files))
    typer.echo(f"{table['n']} votes of {table['participants']} participants on {table['photos']} images")
    for method, parts in table["models"].items():
        part = parts["all"]
        low, high = part["interval"]["preference_percent"]
        typer.echo(f"{method:24s}{part['votes']:6d}{part['preference_percent']:8.2f} %  [{low:.2f}, {high:.2f}]")
    if json:
        write_json(json, table)


@app.command()
def pretrain(
    photos: str = typer.Argument(metavar="PHOTOS", help="a folder with images/ and masks/, at any depth"),
    out: str = typer.Argument(metavar="OUT", help="the folder to write"),
    index: str = typer.Option(None, help="CSV with columns image, mask and split; rows with split=train are used"),
    autoencoder_steps: int = typer.Option(6500, min=0),
    unet_steps: int = typer.Option(1900, min=0),
    batch_size: int = typer.Option(16, min=1),
    start: str = typer.Option(None, metavar="DIR", help="train this base further (a part with 0 steps is kept)"),
    seed: int = typer.Option(0),
    device: str = typer.Option("auto", help="auto, cuda, mps or cpu"),
) -> None:
    """Train the small latent-diffusion base (autoencoder, then inpainting UNet) on photos with masks."""
    from types import SimpleNamespace

    from ..core.checkpoints import discard_finished
    from ..core.distributed import by_first
    from ..core.json_files import write_json
    from ..data.batches import load_pairs
    from ..data.readers import photo_pairs
    from ..models.base import open_base, train_base

    points, section = f"{out}/.checkpoints", {"source": "pipeline" if start else "small", "path": start}
    section |= {"autoencoder_channels": [16, 32, 64, 128], "autoencoder_steps": autoencoder_steps}
    section |= {"autoencoder_learning_rate": 2e-3, "autoencoder_size": 128, "batch_size": batch_size}
    section |= {"unet_channels": [64, 128], "unet_steps": unet_steps, "unet_learning_rate": 1e-3, "size": 192}
    machine = {"compile": False, "accumulation": 1, "checkpointing": False}
    run = SimpleNamespace(seed=seed, device=device, **machine, precision="auto", base=SimpleNamespace(**section))

    photos = load_pairs(photo_pairs(photos, index, "train" if index else None))
    pipeline = open_base(run.base, seed)
    histories = train_base(pipeline, photos, run, points)

    def save():
        import torch

        pipeline.to(torch.float16).save_pretrained(out)
        write_json(f"{out}/training.json", {"settings": section, "seed": seed, "start": start, "histories": histories})
        discard_finished(points)

    by_first(save, device)
    typer.echo(out)


@app.command("check-data")
def check_data(
    folder: str = typer.Argument(metavar="DIR", help="a data set: iHarmony4's layout, or another that --kind names"),
    kind: str = typer.Option("auto", help="auto, iharmony4, photos, imaterialist, realhm or dih99"),
    json: str = typer.Option(None, metavar="FILE", help="write counts, notes and all findings here"),
    manifest: str = typer.Option(None, metavar="FILE", help="write one CSV row per example here"),
    workers: int = typer.Option(None, min=1, help="processes; one a core unless given"),
    mask_from: str = MASK_FROM,
) -> None:
    """Read every file of a data set and report all that is wrong; exit code 1 if anything is."""
    from ..core.files import atomic_path
    from ..core.json_files import write_json
    from ..data.audit import audit

    report = audit(folder, kind, workers, mask_from)
    if json:
        write_json(json, report.as_json())
    if manifest:
        with atomic_path(manifest) as temporary:
            report.manifest.to_csv(temporary, index=False, errors="backslashreplace")
    typer.echo(report.as_text())
    if report.findings:
        raise typer.Exit(1)


@app.command("make-data")
def make_data(
    photos: str = typer.Argument(metavar="PHOTOS", help="a folder with images/ and masks/, at any depth"),
    out: str = typer.Argument(metavar="OUT", help="the data set to write, in iHarmony4's layout"),
    index: str = typer.Option(
        None, help="CSV with columns image, mask and split (train or test) that decides the split"
    ),
    pairs: int = typer.Option(None, min=2, help="photos per subset and split; all unless given"),
    variants: int = typer.Option(1, min=1, help="composites of each photo and subset"),
    size: int = typer.Option(256, min=16, help="long side in pixels"),
    leave_out: list[str] = typer.Option(None, help="a colour transfer that no composite is to be made by"),
    clipped: float = typer.Option(0.1, min=0, help="share of the foreground that may newly reach 0 or 255"),
    jitter: int = typer.Option(0, min=0, help="dilate or erode masks by up to so many pixels first"),
    seed: int = typer.Option(0),
    force: bool = typer.Option(False, help="replace OUT where it is a data set"),
    workers: int = typer.Option(None, min=1, help="processes; one a core unless given"),
    mask_from: str = MASK_FROM,
) -> None:
    """Make composites of photos by the four recipes; a tenth of the photos is for testing unless --index says which."""
    from ..data.iharmony4_statistics import beside
    from ..data.recipes import RecipeSettings
    from ..data.sources import make_data as make
    from ..data.transfers import TRANSFERS

    transfers = [name for name in TRANSFERS if name not in (leave_out or [])]
    recipes = RecipeSettings(transfers=transfers, clipped=clipped)
    rows = make(photos, out, index, pairs, variants, size, seed, recipes, jitter, force, workers, mask_from)
    typer.echo(rows.groupby(["subset", "split"], sort=False).size().to_string())
    typer.echo(f"{(~rows['plausible']).sum()} of {len(rows)} composites kept although no draw was plausible")
    typer.echo("Strength (fMSE) and size (share of the picture) of the foregrounds, beside iHarmony4's own:")
    typer.echo(beside(rows).to_string(float_format="{:.3g}".format))
    for line in rows.attrs["left_out"]:
        typer.echo(f"left out: {line}", err=True)
    if rows.attrs["left_out"]:
        raise typer.Exit(1)


cache_app = typer.Typer(help="The caches of resized images and posterior moments.")
app.add_typer(cache_app, name="cache")


@cache_app.command("clear")
def cache_clear(
    checkpoints: bool = typer.Option(False, "--checkpoints", help="resume points, too: stopped trainings start anew"),
) -> None:
    """Delete the caches of this repository; they are made again when needed."""
    from ..core.cache import clear
    from ..core.checkpoints import RESUME_POINTS, discard_all
    from ..core.settings import enter_root

    enter_root()
    freed = clear() + (discard_all(RESUME_POINTS) if checkpoints else 0)
    typer.echo(f"{freed / 1e6:.1f} MB freed")


def main() -> None:
    """Entry point of the `harmonylib` command."""
    sys.exit(run(app, "harmonylib"))


if __name__ == "__main__":
    main()
