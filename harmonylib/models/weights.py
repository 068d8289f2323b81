"""Loading weights strictly (a folder with missing or foreign keys is an error, not a warning), and shipping them.

diffusers takes three seconds to import, so nothing here does until one of its models is loaded.

python -m harmonylib.models.weights artifacts/contrastive_resunet pretrained/contrastive-resunet
"""

import inspect
import os
import sys
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..core.errors import HarmonyError
from ..core.files import atomic_path
from ..core.json_files import read_json, write_json

PRETRAINED = [Path(__file__).resolve().parents[up] / "pretrained" for up in (1, 2)]  # in a wheel, in a clone
WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers calls them
HUB_FILES = ["*.json", "*.txt", "*.safetensors"]


def shipped_folder(name: str) -> Path:
    """The folder of a shipped model: the first there is in $HARMONYLIB_PRETRAINED, the installed package and the clone.

    Where there is none, the clone's, which is missing.
    """
    own = os.environ.get("HARMONYLIB_PRETRAINED")
    folders = [Path(root) / name for root in ([own] if own else []) + PRETRAINED]
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def hub_folder(name: str, revision: str) -> Path:
    """The folder of ORG/NAME at a revision in the Hugging Face hub's cache, filled from there where the network allows.

    No pickled weights are read. Raises HarmonyError where it cannot be had.
    """
    from huggingface_hub import snapshot_download  # late: `import harmonylib` stays quick

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # of the network, of names, of access
        raise HarmonyError(f"{name}@{revision} {mend(name, error, MEND)}") from None


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MEND = "train it or restore the folder"
OFFLINE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "NetworkError", "Timeout"}


def mend(name: str, error: Exception, otherwise: str) -> str:
    """Why `name` could not be loaded and what to do: of what is in no folder here, what the hub's client ran into.

    otherwise: the mend where `name` is a folder, or is meant to be one.
    """
    if Path(name).exists() or Path(name).is_absolute() or Path(name).parts[:1] in (("artifacts",), ("pretrained",)):
        return f"cannot be loaded ({first_line(error)}); {otherwise}"
    kinds, cause = set(), error
    while cause:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if kinds & OFFLINE:
        return "is not, or not wholly, on disk and there is no network; go online once, or name a folder that has it"
    return f"is no folder here, and not on the hub either ({first_line(error)}); mend the name or the revision"


def at_revision(name) -> tuple[str, dict]:
    """(ID, {"revision": REVISION}) of `ID@REVISION`, for a `from_pretrained`; (name, {}) of folders and other names."""
    name, mark, revision = str(name).rpartition("@")
    if not mark or Path(f"{name}@{revision}").exists():
        return f"{name}{mark}{revision}", {}
    return name, {"revision": revision}


def load_part(load, folder, **options):
    """load(folder, **options), `load` being a `from_pretrained`; folder may be a hub id, with `@REVISION`.

    Raises HarmonyError for a folder that is not there or damaged.
    """
    from diffusers.utils import logging

    name, revision = at_revision(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what diffusers logs of missing files stands in its error, too
    try:
        return load(name, **revision, **options)
    except Exception as error:  # diffusers, transformers, safetensors and pickle raise many kinds
        raise HarmonyError(f"{_place(folder, options)} {mend(name, error, MEND)}") from None
    finally:
        logging.set_verbosity(verbosity)


def load_strict(load, folder, **options):
    """`load_part` of a model (.safetensors, or .bin without code) that forgets its folder, which would be saved along.

    HarmonyError also names keys that are missing or foreign, where diffusers would warn and fill in random weights.
    """
    model, info = load_part(load, folder, output_loading_info=True, **options)
    if "_name_or_path" in (config := getattr(model, "_internal_dict", ())):  # diffusers', which cannot be changed
        model._internal_dict = type(config)({key: config[key] for key in config if key != "_name_or_path"})
    _check_keys(model, _place(folder, options), info["missing_keys"], info["unexpected_keys"])
    return model


def _place(folder, options: dict) -> str:
    return "/".join(filter(None, (str(folder), options.get("subfolder"))))


def _check_keys(model, place, missing, unexpected) -> None:
    for kind, keys in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if keys:
            found = f"{len(keys)} {kind} keys ({', '.join(keys[:3] + ['...'] * (len(keys) > 3))})"
            raise HarmonyError(f"{place}: {found}; not the weights of a {type(model).__name__}")


class Config(dict):
    """What a network was built with, as keys and as attributes."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class FolderModel(nn.Module):
    """A network with a `config`, kept in a folder as diffusers' ModelMixin keeps it (float32; no hub)."""

    def __init__(self, arguments: dict):
        """arguments: the constructor's `locals()`."""
        super().__init__()
        self.config = Config({name: arguments[name] for name in inspect.signature(type(self)).parameters})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder) -> None:
        """Write config.json and the weights, each atomically."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(Path(folder, WEIGHTS)) as temporary:
            temporary.write_bytes(save(tensors, {"format": "pt"}))  # save_file would let only its owner read it
        write_json(Path(folder, "config.json"), {"_class_name": type(self).__name__, **self.config})

    @classmethod
    def from_pretrained(cls, folder) -> Self:
        """Raises HarmonyError for a folder that is not there, damaged or of another model."""
        try:
            config = read_json(Path(folder, "config.json"))
            model = cls(**{name: value for name, value in config.items() if not name.startswith("_")})
            found = model.load_state_dict(load_file(Path(folder, WEIGHTS)), strict=False)
        except Exception as error:  # of safetensors and torch, and of what damaged settings lead to
            raise HarmonyError(f"{folder} cannot be loaded ({first_line(error)}); {MEND}") from None
        _check_keys(model, folder, found.missing_keys, found.unexpected_keys)
        return model


class Published:
    """Mixin of models that read published folders: strictly, and with attention weights as 1x1 convolutions, as old
    files have them (their old names are mapped by diffusers)."""

    @classmethod
    def from_pretrained(cls, folder, **options) -> Self:
        """ModelMixin's through `load_strict`."""
        return load_strict(super().from_pretrained, folder, **options)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        for name, tensor in state_dict.items():
            if ".attentions." in name and tensor.ndim == 4:
                state_dict[name] = tensor[..., 0, 0]


def ship(source, target) -> None:
    """Copy the .safetensors (floating point as fp16) and .json files of a model's folder; others in `target` stay.

    Raises HarmonyError where `source` holds no weights.
    """
    source, target = Path(source), Path(target)
    weights, texts = sorted(source.rglob("*.safetensors")), sorted(source.rglob("*.json"))
    if not weights:
        raise HarmonyError(f"{source}: no weights (*.safetensors) there; train the model first")
    for path in weights:
        with atomic_path(target / path.relative_to(source)) as temporary:
            tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
            temporary.write_bytes(save(tensors, {"format": "pt"}))  # save_file would let only its owner read it
    for path in texts:
        values = read_json(path)
        if isinstance(values, dict):
            values.pop("_name_or_path", None)  # where the trainer had read it: a path of its machine
        write_json(target / path.relative_to(source), values)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: python -m harmonylib.models.weights FROM TO, two folders")
    try:
        ship(*sys.argv[1:])
    except HarmonyError as error:
        sys.exit(f"error: {error}")
