"""Commands as people meet them: an exit code, and one line of any terminal's characters for whatever goes wrong."""

import errno
import sys
import warnings

import typer

from ..core.errors import HarmonyError, HarmonyWarning


def run(application: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """Run a typer application and return its exit code: 1 for bad input, 2 for bad usage, 130 for Ctrl-C.

    HarmonyError, usage errors and errors of the operating system (no space left, no permission) become one line, and so
    do HarmonyWarnings. What the terminal's encoding lacks is printed as an escape.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", HarmonyWarning)
            warnings.showwarning = _show_warning
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


def _show_warning(message, category, *where, usual=warnings.showwarning) -> None:
    if issubclass(category, HarmonyWarning):
        print(f"warning: {message}", file=sys.stderr, flush=True)
    else:
        usual(message, category, *where)
