"""The settings of a run: params.yaml, its presets in profiles/, and the schema of them all, profiles/mini.yaml."""

import difflib
import os
from pathlib import Path
from types import SimpleNamespace

from .errors import HarmonyError

SCHEMA_PROFILE = "mini"  # its keys and types are those of every profile and of params.yaml
MAY_BE_NULL = {"harmony_vae.start", "diffharmony.start", "resunet.start", "resunet.encoder"}


class Settings(SimpleNamespace):
    """Settings with their keys as attributes; nested mappings are Settings too."""


def _folder_above(names: tuple[str, ...]) -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if all((folder / name).exists() for name in names):
            return folder
    raise HarmonyError(f"{here}: no {' and '.join(names)} here or in a folder above; change into the repository first")


def find_root() -> Path:
    """The repository: the nearest folder from the working directory upwards with params.yaml and dvc.yaml."""
    return _folder_above(("params.yaml", "dvc.yaml"))


def enter_root() -> Path:
    """Make the repository the working directory, so that a notebook runs alike from there and from notebooks/."""
    root = find_root()
    os.chdir(root)
    return root


def read_yaml(path):
    """Parse a YAML 1.2 file, as DVC does: 1e-4 is a number and `no` a string. Raises HarmonyError naming the line."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such file; `harmonylib profile NAME` writes params.yaml") from None
    except UnicodeDecodeError:
        raise HarmonyError(f"{path}: not a UTF-8 text file") from None


def parse_yaml(text: str, source):
    """Parse YAML 1.2 text; `source` names it in the HarmonyError raised when it is not valid."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise HarmonyError(f"{source}{where}: not valid YAML ({' '.join(problem.split())})") from None


def did_you_mean(name: str, known) -> str:
    """A question with the close matches of `name` to end an error message, or "" when there are none."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def same_type(value, example) -> bool:
    """Whether `value` may stand where `example` stands: equal types, an int for a float, anything for None."""
    if example is None:
        return True
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(example, bool) and isinstance(value, bool)
    if isinstance(example, float):
        return isinstance(value, (int, float))
    if isinstance(example, list) and isinstance(value, list):
        return not example or all(any(same_type(item, kind) for kind in example) for item in value)
    return isinstance(value, type(example))


def type_name(value) -> str:
    """The type of a setting in a reader's words, with its article."""
    if isinstance(value, list) and value:
        return f"a list (of {type_name(value[0])})"
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string", list: "a list", dict: "a mapping"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a": {"b": 1}, "a.b": 1}: every key by its dotted name."""
    flat = {}
    for key, value in values.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _check(values, schema: dict, source) -> None:
    if not isinstance(values, dict):
        raise HarmonyError(f"{source}: must be a mapping of settings; `harmonylib profile NAME` writes a full one")
    flat, known = _flat(values), _flat(schema)
    free = tuple(f"{name}." for name, example in known.items() if example is None)  # below a null all is allowed
    for name in flat:
        if name not in known and not name.startswith(free):
            raise HarmonyError(f"{source}: unknown key {name}{did_you_mean(name, known)}")
    for name, example in known.items():
        if name not in flat:
            raise HarmonyError(f"{source}: missing key {name}; profiles/{SCHEMA_PROFILE}.yaml shows it")
        if not same_type(flat[name], example) and not (flat[name] is None and name in MAY_BE_NULL):
            found = f"{flat[name]!r} ({type_name(flat[name])})"
            raise HarmonyError(f"{source}: {name} must be {type_name(example)}, not {found}")


def _profiles(root: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((root / "profiles").glob("*.yaml"))}


def _schema(root: Path) -> dict:
    return read_yaml(root / "profiles" / f"{SCHEMA_PROFILE}.yaml")


def load_params(path=None) -> dict:
    """params.yaml (or another file) of this repository as a nested dict.

    Raises HarmonyError naming the dotted key that is unknown, missing or of another type than in profiles/mini.yaml.
    """
    root = find_root()
    path = root / "params.yaml" if path is None else Path(path)
    values = read_yaml(path)
    _check(values, _schema(root), path.name)
    return values


def settings(path=None) -> Settings:
    """`load_params` with its keys as attributes: settings().train.steps."""
    return _settings(load_params(path))


def _settings(value):
    if isinstance(value, dict):
        return Settings(**{key: _settings(item) for key, item in value.items()})
    return value


def write_profile(name: str) -> Path:
    """Write params.yaml from profiles/NAME.yaml, comments included, and return its path.

    Raises HarmonyError for a profile that does not exist or does not have the keys and types of profiles/mini.yaml.
    """
    from .files import atomic_path

    root = _folder_above(("profiles", "dvc.yaml"))  # params.yaml itself may be missing
    profiles = _profiles(root)
    if name not in profiles:
        raise HarmonyError(f"no profile {name}{did_you_mean(name, profiles)} (profiles/ has {', '.join(profiles)})")
    _check(read_yaml(profiles[name]), _schema(root), f"profiles/{name}.yaml")
    header = f"# Written by `harmonylib profile {name}` from profiles/{name}.yaml; change values here as you like.\n"
    with atomic_path(root / "params.yaml") as temporary:
        temporary.write_text(header + profiles[name].read_text(encoding="utf-8"), encoding="utf-8")
    return root / "params.yaml"


def check_profiles() -> list[str]:
    """The names of all profiles. Raises HarmonyError when one differs from profiles/mini.yaml in its keys or types."""
    root = find_root()
    schema = _schema(root)
    for name, path in _profiles(root).items():
        _check(read_yaml(path), schema, f"profiles/{name}.yaml")
    return list(_profiles(root))
