"""The one exception a user is meant to read."""


class HarmonyError(ValueError):
    """Bad input or settings. The message is one line that names the file or setting and says how to mend it."""

    def __init__(self, message: str = ""):
        super().__init__(" ".join(str(message).splitlines()))
