"""The `harmonylib` command. Each command imports what it needs itself, so that --help stays quick."""

import errno
import os
import sys

import typer

from .errors import HarmonyError

app = typer.Typer(
    help="Image harmonization: make a pasted foreground match its background.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Keeps `harmonylib` a group of commands."""


@app.command()
def profile(
    name: str = typer.Argument(metavar="NAME", help="smoke, mini, gpu, paper: a file of profiles/, without .yaml"),
) -> None:
    """Write params.yaml from profiles/NAME.yaml."""
    from .params import write_profile

    typer.echo(f"{os.path.relpath(write_profile(name))} written from profiles/{name}.yaml")


@app.command()
def harmonize(
    composite: str = typer.Argument(metavar="COMPOSITE", help="the picture with the pasted foreground"),
    mask: str = typer.Argument(metavar="MASK", help="its mask, white where the foreground is"),
    output: str = typer.Option(..., "--output", "-o", help="where to write the harmonized picture"),
    model: str = typer.Option("diffharmony++", help="diffharmony++, diffharmony, contrastive-resunet or a folder"),
    seed: int = typer.Option(0, help="seed of the noise"),
    device: str = typer.Option("auto", help="auto, cuda, mps or cpu"),
    force: bool = typer.Option(False, help="overwrite OUTPUT where it exists"),
) -> None:
    """Harmonize one composite; size and background stay as they are."""
    import numpy as np

    from .images import write_image
    from .inference import harmonize as run_model

    if os.path.exists(output) and not force:
        raise HarmonyError(f"{output}: exists already; choose another name or add --force")
    write_image(output, np.asarray(run_model(composite, mask, model=model, seed=seed, device=device)))
    typer.echo(output)


@app.command()
def evaluate(
    predictions: str = typer.Argument(metavar="PRED_DIR", help="NAME.png of every composite NAME, or SUBSET/NAME.png"),
    data: str = typer.Argument(metavar="DATA_DIR", help="a data set in iHarmony4's layout"),
    protocol: str = typer.Option("standard", help="standard, diffharmony, saic, hdnet, dovenet or iih"),
    split: str = typer.Option("test", help="the list to score: test or train"),
    paste: bool = typer.Option(False, help="put the composite's background on the predictions first"),
    json: str = typer.Option(None, help="where to write the averages with their intervals"),
    csv: str = typer.Option(None, help="where to write the table of every image"),
) -> None:
    """Score predictions against the real photos: every image, each subset, each foreground size and all."""
    from .files import atomic_path
    from .jsonio import write_json
    from .metrics import METRICS, PROTOCOLS, buckets, summarise
    from .scoring import score_folder

    table = score_folder(predictions, data, protocol, split, paste)
    (name, parts), *_ = summarise(table).items()
    sizes = buckets(table)
    groups = parts | {size: part for size, part in sizes[name].items() if size != "all"}
    typer.echo(f"protocol {protocol}" + (", composite background pasted" if paste else ""))
    typer.echo(f"{'':12s}{'n':>7s}{'photos':>8s}" + "".join(f"{metric:>12s}" for metric in METRICS))
    for group, part in groups.items():
        values = "".join(f"{'–' if part[metric] is None else format(part[metric], '.4g'):>12s}" for metric in METRICS)
        typer.echo(f"{group:12s}{part['n']:7d}{part['photos']:8d}{values}")
    for edge, word in enumerate(("95 % from", "to")):
        ends = "".join(f"{parts['all']['interval'][metric][edge]:12.4g}" for metric in METRICS)
        typer.echo(f"all, {word:22s}{ends}")
    if parts["all"].get("status"):
        typer.echo(parts["all"]["status"])
    if csv:
        with atomic_path(csv) as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    if json:
        about = {"protocol": protocol + (", composite background pasted" if paste else ""), "split": split}
        about |= {"reported_by_its_code": PROTOCOLS[protocol].reports, "n": len(table)}
        write_json(json, about | {"photos": parts["all"]["photos"], "models": {name: parts}, "buckets": sizes})


@app.command()
def study(
    page: str = typer.Argument(metavar="PAGE.html", help="the page to write; it works offline"),
    folders: list[str] = typer.Argument(metavar="METHOD=FOLDER...", help="the results of two methods or more"),
) -> None:
    """Write a blind preference study: participants open the page, vote and save a file for `harmonylib votes`."""
    from .study import read_folders, write_page

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
    from .jsonio import write_json
    from .study import count_votes, read_votes

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
    autoencoder_steps: int = typer.Option(6500),
    autoencoder_learning_rate: float = typer.Option(2e-3),
    autoencoder_size: int = typer.Option(64, help="training crop in pixels"),
    unet_steps: int = typer.Option(1900),
    unet_learning_rate: float = typer.Option(1e-3),
    unet_size: int = typer.Option(64, help="training crop in pixels"),
    batch_size: int = typer.Option(16),
    chroma_weight: float = typer.Option(4.0, help="weight of chroma beside luma in the autoencoder's loss"),
    seed: int = typer.Option(0),
    device: str = typer.Option("auto", help="auto, cuda, mps or cpu"),
) -> None:
    """Train the small latent-diffusion base (autoencoder, then inpainting UNet) on photos with masks."""
    from . import pretrain as base
    from .datasets import indexed_pairs, load_pairs, photo_pairs
    from .training import TrainSettings

    pairs = indexed_pairs(photos, index, "train") if index else photo_pairs(photos)
    common = {"batch_size": batch_size, "schedule": "cosine"}
    settings = base.BaseSettings(
        autoencoder=TrainSettings(
            autoencoder_steps, learning_rate=autoencoder_learning_rate, ema_decay=0.995, **common
        ),
        unet=TrainSettings(unet_steps, learning_rate=unet_learning_rate, ema_decay=0.998, **common),
        autoencoder_size=autoencoder_size,
        unet_size=unet_size,
        chroma_weight=chroma_weight,
    )
    base.pretrain(load_pairs(pairs), out, settings, seed, device, checkpoints=f"{out}/.checkpoints")
    typer.echo(out)


cache_app = typer.Typer(help="The caches of resized images and posterior moments.")
app.add_typer(cache_app, name="cache")


@cache_app.callback()
def _cache_commands() -> None:
    """Keeps `harmonylib cache` a group of commands."""


@cache_app.command("clear")
def cache_clear() -> None:
    """Delete the caches of this repository; they are made again when needed."""
    from .cache import clear
    from .params import enter_root

    enter_root()
    typer.echo(f"{clear() / 1e6:.1f} MB freed")


def run(application: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """Run a typer application and return its exit code: 1 for bad input, 2 for bad usage, 130 for Ctrl-C.

    HarmonyError, usage errors and errors of the operating system (no space left, no permission) become one line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = application(arguments or ["--help"], prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except HarmonyError as error:
        message, code = str(error), 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        mend = "; make room and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message, code = f"{where}{error.strerror or error}{mend}", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of typer's: a defect, shown in full
            raise
        message, code = f"{error.format_message()} (see {name} --help)", 2
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the `harmonylib` command."""
    sys.exit(run(app, "harmonylib"))


if __name__ == "__main__":
    main()
