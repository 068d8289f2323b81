"""Loading weights strictly (a folder with missing or foreign keys is an error, not a warning), and shipping them.

python -m harmonylib.models.weights artifacts/contrastive_resunet pretrained/contrastive-resunet
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from safetensors.torch import load_file, save

from ..core.errors import HarmonyError
from ..core.files import atomic_path

SHIPPED = Path(__file__).resolve().parents[2] / "pretrained"


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def quiet():
    """Inside, diffusers logs nothing: what it says of missing files stands in the error that it raises, too."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def at_revision(name) -> tuple[str, dict]:
    """What `ID@REVISION` says to a `from_pretrained`: (ID, {"revision": REVISION}), so that a hub's files are the same
    for ever. A folder, and a name without a revision, is left as it is."""
    name, mark, revision = str(name).rpartition("@")
    if not mark or Path(f"{name}@{revision}").exists():
        return f"{name}{mark}{revision}", {}
    return name, {"revision": revision}


def load_strict(load, folder, **options):
    """load(folder, **options), `load` being a diffusers class's from_pretrained; .safetensors, or .bin without code.

    folder may be a hub id, with `@REVISION` (`at_revision`).

    Raises HarmonyError for a folder that is not there or damaged, and naming keys that are missing, foreign or of
    another shape (diffusers fills such parameters at random and warns).
    """
    where = "/".join(filter(None, (str(folder), options.get("subfolder"))))
    try:
        with quiet():
            name, revision = at_revision(folder)
            model, info = load(name, output_loading_info=True, **revision, **options)
    except Exception as error:  # diffusers, safetensors and pickle raise many kinds
        raise HarmonyError(f"{where} cannot be loaded ({first_line(error)}); train it or restore the folder") from None
    for kind in ("missing", "unexpected"):
        if keys := info[f"{kind}_keys"]:
            names = ", ".join([*sorted(keys)[:3], *(["..."] if len(keys) > 3 else [])])
            raise HarmonyError(
                f"{where}: {len(keys)} {kind} keys ({names}); not the weights of a {type(model).__name__}"
            )
    return model


class LegacyAttention:
    """Mixin: in old files attention weights may be 1x1 convolutions, besides their names (which diffusers maps)."""

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        for name, tensor in state_dict.items():
            if ".attentions." in name and tensor.ndim == 4:
                state_dict[name] = tensor[..., 0, 0]


class _LegacyAutoencoder(LegacyAttention, AutoencoderKL):
    pass


def load_autoencoder(folder, **options) -> AutoencoderKL:
    """A plain autoencoder, strictly, attention names of old files included. Raises HarmonyError as `load_strict`."""
    vae = load_strict(_LegacyAutoencoder.from_pretrained, folder, **options)
    vae.__class__ = AutoencoderKL  # the same layout; saved folders must name the class that everybody has
    return vae


def ship(source, target) -> None:
    """Copy the .safetensors (floating point as fp16) and .json files of a model's folder; others in `target` stay.

    Raises HarmonyError where `source` holds no weights.
    """
    source, target = Path(source), Path(target)
    files = [path for path in sorted(source.rglob("*")) if path.suffix in (".safetensors", ".json")]
    if not any(path.suffix == ".safetensors" for path in files):
        raise HarmonyError(f"{source}: no weights (*.safetensors) there; train the model first")
    for path in files:
        with atomic_path(target / path.relative_to(source)) as temporary:
            if path.suffix == ".json":
                values = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(values, dict):
                    values.pop("_name_or_path", None)  # where the trainer had read it: a path of its machine
                temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
                continue
            tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
            temporary.write_bytes(save(tensors, {"format": "pt"}))  # save_file would let only its owner read it


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: python -m harmonylib.models.weights FROM TO, two folders")
    try:
        ship(*sys.argv[1:])
    except HarmonyError as error:
        sys.exit(f"error: {error}")
