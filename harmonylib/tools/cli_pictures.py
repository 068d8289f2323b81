"""The commands that make pictures: harmonize, compose and app."""

import contextlib
import os

import typer

pictures = typer.Typer()
MODEL = typer.Option("contrastive-resunet", help="this, diffharmony++, diffharmony, a folder or ORG/NAME@REVISION")
SEED = typer.Option(0, help="seed of the noise")
DRAWS = typer.Option(1, help="of a diffusion model: the mean of so many outputs, nearer the truth on average")
STRENGTH = typer.Option(1.0, help="0 (no change) to 1 (all of it)")
FEATHER = typer.Option(0.0, help="pixels inside the mask's edge over which the change fades in")
FORCE = typer.Option(False, "--force", help="overwrite files that exist")
DEVICE = typer.Option("auto", "--device", help="auto, cuda, mps or cpu")
MASK_FROM = typer.Option("auto", "--mask-from", help="what of a mask counts: alpha, luminance, auto (a varying alpha)")


def _one_thread(models: list[str]) -> None:
    """Run shipped models on one thread unless OMP_NUM_THREADS says otherwise: two are at best 1.1 times as fast, and
    beside a busy program, where each waits for the other, were up to 70 times as slow."""
    import torch

    from ..inference import MODELS

    if set(models) <= set(MODELS) and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


@pictures.command()
def harmonize(
    composite: str = typer.Argument(metavar="COMPOSITE", help="a picture with a pasted part, a folder or a video"),
    mask: str = typer.Argument(metavar="MASK", help="its mask, white where that part is, or a folder"),
    output: str = typer.Option(..., "--output", "-o", help="the file to write (JPEG is lossy), or a folder"),
    model: str = MODEL,
    seed: int = SEED,
    draws: int = DRAWS,
    device: str = DEVICE,
    strength: float = STRENGTH,
    feather: float = FEATHER,
    resize_mask: bool = typer.Option(False, "--resize-mask", help="resize a mask that has another size"),
    mask_from: str = MASK_FROM,
    kind: str = typer.Option("png", "--format", help="of the files for a folder: png, jpg, webp, tif or bmp"),
    steady: bool = typer.Option(False, "--steady", help="the folder is one shot's frames: no flicker"),
    force: bool = FORCE,
) -> None:
    """Harmonize a composite, or a folder of them with masks of the same names; size and background stay as they are.

    Of a mask's grey levels those above 127 are foreground, and 1 to 254 blend. A video (one shot, without its sound)
    takes a folder of one mask a frame or a video of them, is steady, and is written as a video or a folder of frames.
    """
    from .harmonize_files import plan, run
    from .video import as_folders, is_video

    with contextlib.ExitStack() as stack:
        paths, steady = (composite, mask, output), steady or is_video(composite)
        if is_video(composite):
            paths = stack.enter_context(as_folders(*paths, force))
        jobs = plan(*paths, force, kind, steady)
        found = {"model": model, "seed": seed, "device": device, "draws": draws}
        _one_thread([model])
        run(jobs, found, {"strength": strength, "feather": feather}, resize_mask, mask_from, steady)
    typer.echo(output if len(jobs) == 1 else f"{len(jobs)} pictures in {output}")


@pictures.command()
def compose(
    background: str = typer.Argument(metavar="BACKGROUND", help="the picture to lay it on"),
    cutout: str = typer.Argument(metavar="CUTOUT", help="a picture with transparency"),
    output: str = typer.Option(..., "--output", "-o", help="the file to write (JPEG is lossy)"),
    at: str = typer.Option(None, metavar="X,Y", help="pixel of its upper left corner once scaled; default: centred"),
    scale: float = typer.Option(1.0, help="of its sides"),
    angle: float = typer.Option(0.0, help="degrees counter-clockwise, about its centre"),
    harmonize: bool = typer.Option(False, "--harmonize", help="match its colours to the background at once"),
    model: str = MODEL,
    seed: int = SEED,
    draws: int = DRAWS,
    device: str = DEVICE,
    strength: float = STRENGTH,
    feather: float = FEATHER,
    force: bool = FORCE,
) -> None:
    """Lay a cut-out on a background, blended by its transparency, and harmonize it there with --harmonize."""
    from ..core.picture_metadata import check_output, save_picture
    from ..core.placing import parse_place
    from ..inference import compose

    check_output(output, force)
    place = None if at is None else parse_place(at)
    options = {"model": model, "seed": seed, "draws": draws, "device": device, "strength": strength, "feather": feather}
    _one_thread([model])
    save_picture(compose(background, cutout, place, scale, angle, harmonize, **options), output)
    typer.echo(output)


@pictures.command("app")
def browser_app(
    port: int = typer.Option(7860, help="0 takes a free one"),
    host: str = typer.Option("127.0.0.1", help="127.0.0.1 is this computer alone; 0.0.0.0 lets the network in"),
    model: list[str] = typer.Option([], help="the folder of a trained model to offer too; repeatable"),
    origin: list[str] = typer.Option([], help="https://HOST of a proxy (JupyterHub, Codespaces) before it; repeatable"),
    device: str = DEVICE,
    browser: bool = typer.Option(True, help="open the page in the browser"),
) -> None:
    """Harmonize in the browser, on this computer and offline, until Ctrl-C."""
    from .app import serve

    _one_thread(model)
    serve(port, host, model, device, browser, origin)
