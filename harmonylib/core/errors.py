"""What a user is meant to read: one kind of error, one kind of warning, each of one line."""

import warnings


class HarmonyError(ValueError):
    """Bad input or settings. The message is one line that names the file or setting and says how to mend it."""

    def __init__(self, message: str = ""):
        super().__init__(" ".join(str(message).splitlines()))


class HarmonyWarning(UserWarning):
    """Something was left out or done in another way, and the work goes on. One line; commands print it on stderr."""


def note(message: str) -> None:
    """Warn in one line."""
    warnings.warn(HarmonyWarning(" ".join(str(message).splitlines())), stacklevel=2)
