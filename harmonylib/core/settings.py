"""The settings of a run: params.yaml, checked, and the profiles that it is written from (`sections` has the keys)."""

import difflib
import io
import os
import re
import reprlib
from pathlib import Path

from pydantic import ValidationError

from .errors import HarmonyError
from .files import atomic_path
from .json_files import write_json
from .settings_schema import Settings

PROFILES = ("profiles", "dvc.yaml")  # params.yaml itself may be missing
COMPLETE = "mini"  # the profile with every key; the others hold what differs from it
SCHEMA = "profiles/schema.json"  # for editors; written anew with params.yaml, which names it


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


def settings(path=None) -> Settings:
    """The settings of params.yaml (or another file), keys as attributes: settings().resunet.steps. They are frozen.

    Raises HarmonyError naming the file, the key, its value and what it must be.
    """
    path = find_root() / "params.yaml" if path is None else Path(path)
    return _checked(read_yaml(path), path.name)


def read_profile(name: str) -> Settings:
    """The settings of profile `name`. Raises HarmonyError as `write_profile` does."""
    return _profile(name)[1]


def write_profile(name: str) -> Path:
    """Write params.yaml, profiles/mini.yaml with what profiles/NAME.yaml has instead, and return its path.

    Raises HarmonyError for a profile that does not exist, and as `settings` does.
    """
    text, _ = _profile(name)
    root = _folder_above(PROFILES)
    write_json(root / SCHEMA, Settings.model_json_schema())
    with atomic_path(root / "params.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return root / "params.yaml"


def _profile(name: str) -> tuple[str, Settings]:
    """params.yaml as a profile has it, as text and checked."""
    from ruamel.yaml import YAML

    folder = _folder_above(PROFILES) / "profiles"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise HarmonyError(f"no profile {name}{did_you_mean(name, names)} (profiles/ has {', '.join(names)})")
    mini, own = (read_yaml(folder / f"{which}.yaml", "rt") or {} for which in (COMPLETE, name))
    values = _changed(_changed(mini, own), {"profile": name})
    checked = _checked(values, f"profiles/{name}.yaml")
    written = f"Written by `harmonylib profile {name}` from profiles/{name}.yaml; change values here as you like."
    values.yaml_set_start_comment(f"yaml-language-server: $schema={SCHEMA}\n{written}")
    yaml, text = YAML(), io.StringIO()
    yaml.width = 1000  # no line is broken
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.dump(values, text)
    return text.getvalue(), checked


def _changed(base, changes):
    """`base` with the values of `changes`, in place where it can be: that keeps the comments."""
    if isinstance(base, dict) and isinstance(changes, dict):
        for key, value in changes.items():
            base[key] = _changed(base.get(key), value)
        return base
    if isinstance(base, list) and isinstance(changes, list):
        base[:] = changes
        return base
    return changes


def _checked(values, source) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        found = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")  # a misspelt key first
        raise HarmonyError(f"{source}: {_in_words(found)}") from None


def _in_words(mistake: dict) -> str:
    """A mistake that pydantic found, for readers of the file."""
    key, value, kind = ".".join(map(str, mistake["loc"])), mistake["input"], mistake["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        fields = Settings.model_fields
        below = [f"{name}.{own}" for name in fields for own in getattr(fields[name].annotation, "model_fields", ())]
        return f"unknown key {key}{did_you_mean(key, [*fields, *below])}"
    if kind == "missing":
        return f"missing key {key}; profiles/{COMPLETE}.yaml shows it"
    rule = re.sub(r".* should (.*?)( after validation.*)?$", r"it must \1", mistake["msg"])
    rule = rule.removeprefix("Value error, ")  # of our own checks; those of several keys begin with one
    hint = did_you_mean(str(value), re.findall("'(.+?)'", rule)) if kind == "literal_error" else ""
    if kind == "value_error" and isinstance(value, dict):
        return ".".join(filter(None, [key, rule]))
    return f"{key or 'the file'} is {reprlib.repr(value)}; {rule}{hint}"


def read_yaml(path, typ: str = "safe"):
    """Parse a YAML 1.2 file, as DVC does: 1e-4 is a number and `no` a string. Raises HarmonyError naming the line."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"), path, typ)
    except FileNotFoundError:
        raise HarmonyError(f"{path}: no such file; `harmonylib profile NAME` writes params.yaml") from None
    except UnicodeDecodeError:
        raise HarmonyError(f"{path}: not a UTF-8 text file") from None


def parse_yaml(text: str, source, typ: str = "safe"):
    """Parse YAML 1.2 text. Raises HarmonyError naming `source` when it is not valid. typ "rt" keeps the comments."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ=typ, pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise HarmonyError(f"{source}{where}: not valid YAML ({' '.join(problem.split())})") from None


def did_you_mean(name: str, known) -> str:
    """A question with the close matches of `name` to end an error message, or "" when there are none."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
