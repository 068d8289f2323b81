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
