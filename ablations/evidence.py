"""The evidence run: the papers' claims on hundreds of photos, in a clone of its own (`make evidence PHOTOS=folder`).

The clone, data/evidence-run, holds the commit that it was made of, the profile `evidence`, the sets and DVC's state;
the checkout's params.yaml and dvc.lock stay as they are. A run that was stopped goes on where it was; results come to
reports/evidence one by one.
"""

import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import typer

from harmonylib.core.errors import HarmonyError
from harmonylib.core.files import atomic_path
from harmonylib.core.json_files import read_json, write_json
from harmonylib.core.progress import progress
from harmonylib.core.seeds import rng
from harmonylib.core.settings import enter_root
from harmonylib.data.layout import read_lines, write_list
from harmonylib.data.sources import make_data
from harmonylib.tools.terminal import run as run_application

CLONE, RESULTS = Path("data/evidence-run"), Path("reports/evidence")
PAIRS, TEST_PAIRS, OTHER_PAIRS = 600, 120, 80  # of each subset
SMALL = {"HFlickr": 480, "Hday2night": 20}  # training composites: 7,449 to 311, as published
LEAST = {"": 300, "other": 200}  # test photos
# {stage: its results}. Verdicts an hour decide the order: the shipped weights, short trainings, then what needs the
# inverse model. `dvc repro` makes what a stage needs before it.
TABLES = {
    "shipped_models": "shipped", "table_4": "table_4", "table_VI": "table_VI", "more@style": "table_style",
    "table_5": "table_5", "more@readings": "table_readings", "classifier": "classifier", "candidates": "candidates",
    "table_2": "table_2", "more@IV": "table_IV", "more@VII": "table_VII",
}  # fmt: skip
PILOT = 10  # times fewer steps, and one seed
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


# ---- the sets ----


def rows_of(photos: Path, indices: list[Path], seed: int = 0) -> list[dict]:
    """Rows (image, mask, split, set) of the indices, one mask an image, which a seed chooses.

    Two masks of one photo would count as two photos. Raises HarmonyError for an index that is missing or lacks columns.
    """
    by_image = {}
    for path in indices:
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise HarmonyError(f"{path}: {error.strerror}; name the photos' index, a CSV") from None
        if not rows or not {"image", "mask", "split"} <= rows[0].keys():
            raise HarmonyError(f"{path}: no rows, or no columns image, mask and split; mend the index")
        for row in rows:
            by_image.setdefault(row["image"], []).append(row)
    return [own[int(rng(seed, "mask", image).integers(len(own)))] for image, own in sorted(by_image.items())]


def photos_digest(photos: Path, indices: list[Path]) -> str:
    """A hash of every file below `photos`, names and contents, and of the indices."""
    digest = hashlib.blake2b(digest_size=16)
    files = [file for file in sorted(photos.rglob("*")) if file.is_file()]
    for file in progress([*files, *indices], desc="photos as they are", unit="file"):
        name = file.relative_to(photos) if file.is_relative_to(photos) else file.name
        digest.update(f"{name}\n".encode() + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def make_sets(photos: Path, indices: list[Path], people: list[str], root: Path) -> dict:
    """The sets of the run at `root`, unless they are there: training and test composites; in other/ composites of sets
    that no training may see (rows with split other); in people/ those of the test photos of the sets named `people`.

    Without an index a tenth of the photos is for testing and there is nothing of another domain. Returns what
    root/photos.json says: digest, and photos and composites of each part. Raises HarmonyError where the photos are not
    those that the sets were made of, or too few.
    """
    digest, note = photos_digest(photos, indices), root / "photos.json"
    if note.is_file():
        if (made := read_json(note))["digest"] != digest:
            raise HarmonyError(f"{photos}: not the photos that {root} was made of; give those, or remove {CLONE}")
        return made
    shutil.rmtree(root, ignore_errors=True)
    rows = rows_of(photos, indices)
    parts = {"": ([r for r in rows if r["split"] in ("train", "test")], PAIRS, TEST_PAIRS, 2)}
    parts["other"] = ([r | {"split": "test"} for r in rows if r["split"] == "other"], 0, OTHER_PAIRS, 1)
    seen = [r for r in rows if r["split"] == "test" and r.get("set") in people]
    parts["people"] = (seen, 0, OTHER_PAIRS, 1)
    building, made = root.with_name(f".{root.name}.building"), {"digest": digest}
    shutil.rmtree(building, ignore_errors=True)
    for name, (chosen, pairs, test_pairs, variants) in parts.items():
        if chosen or (not rows and not name):
            index = None if not rows else _write_index(root.with_name(f"{name or 'benchmark'}.csv"), chosen)
            make_data(photos, building / name, index, pairs, variants, test_pairs=test_pairs, workers=1)
            made[name or "benchmark"] = _cut(building / name)
    for name, least in LEAST.items():
        found = made.get(name or "benchmark", {}).get("test_photos", 0)
        if found < least:
            print(f"warning: {found} test photos of {name or 'unseen'} ones; {least} are wanted", file=sys.stderr)
    made["shares"] = _large_shares(photos, [r for r in rows if r.get("set") in people])
    write_json(building / note.name, made)
    building.rename(root)
    return made


def _write_index(path: Path, rows: list[dict]) -> Path:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "mask", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _cut(root: Path) -> dict:
    """Shorten the lists: one composite a test pair, and the small subsets as small as published beside each other."""
    about = {}
    for split in ("train", "test"):
        kept, counts = [], {}
        for line in read_lines(root / f"IHD_{split}.txt"):
            subset, first = line.split("/")[0], line.rpartition("_")[2].startswith("1.")
            small = split == "train" and subset in SMALL
            if (first or (split == "train" and not small)) and counts.get(subset, 0) < (
                SMALL[subset] if small else 1e9
            ):
                kept.append(line)
                counts[subset] = counts.get(subset, 0) + 1
        write_list(root, split, kept)
        about[f"{split}_photos"] = len({line.split("/")[-1].split("-")[0].split("_")[0] for line in kept})
        about[f"{split}_composites"] = counts
    return about


def _large_shares(photos: Path, rows: list[dict]) -> list[float]:
    """Shares of the picture that the foregrounds of these rows cover (Figure 2)."""
    from harmonylib.core.images import read_mask

    return [round(float(read_mask(photos / row["mask"]).mean()), 4) for row in rows]


# ---- the run ----


def make_clone(root: Path) -> None:
    """A clone of HEAD, unless it is there; it stays at its commit, so that a run that goes on is the same run."""
    if (root / ".dvc").is_dir():
        return
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ".", str(root)], check=True)


def write_settings(root: Path, pilot: bool) -> None:
    """The clone's params.yaml by its profile; of the pilot with a tenth of the steps and one seed."""
    _call(root, sys.executable, "-m", "harmonylib.tools.cli", "profile", "evidence")
    if pilot:
        path = root / "params.yaml"
        text = path.read_text(encoding="utf-8")
        text = re.sub(
            r"(?m)^(  (?!inference)\w+_steps: )(\d+)", lambda found: f"{found[1]}{-(-int(found[2]) // PILOT)}", text
        )
        path.write_text(re.sub(r"(?m)^(  seeds: )\d+", r"\g<1>1", text), encoding="utf-8")


def _call(root: Path, *command: str, log=None) -> int:
    """Run a command in the clone, with its own code and one thread."""
    own = {"PYTHONPATH": str(root.resolve()), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=root, env=environment, stdout=log, stderr=log, check=log is None).returncode


def reproduce(root: Path, stage: str, logs: Path) -> float:
    """`dvc repro` of one stage; returns its hours. Raises HarmonyError where it fails, naming its log."""
    logs.mkdir(parents=True, exist_ok=True)
    log, began = logs / f"{stage.replace('@', '-')}.log", time.monotonic()
    target = stage if stage == "classifier" else f"ablations/dvc.yaml:{stage}"
    command = [sys.executable, "-m", "dvc", "repro", target]
    while True:
        with open(log, "a", encoding="utf-8") as file:
            start = file.tell()
            code = _call(root, *command, log=file)
        if not code:
            return (time.monotonic() - began) / 3600
        if not re.search(r"(?i)unable to acquire lock|is busy", log.read_text("utf-8", "replace")[start:]):
            raise HarmonyError(f"{stage}: failed; {log} says why")
        time.sleep(10)  # the other run holds DVC's lock, or makes what both need


def collect(root: Path, name: str, target: Path, hours: float) -> None:
    """Copy a table's results to `target` with commit, machine, hours (what it needed before it included) and photos."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    made = read_json(root / "data/evidence/photos.json")
    about = {"commit": commit.stdout.strip(), "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}"}
    about |= {"threads": 1, "hours": hours, "sets": {key: value for key, value in made.items() if key != "shares"}}
    write_json(target / f"{name}.json", read_json(root / f"reports/metrics/{name}.json") | {"evidence": about})


def skipped(power: Path) -> set[str]:
    """Tables all of whose claims are out of reach by the power note (`report.power`), if there is one."""
    claims = read_json(power)["claims"] if power.is_file() else []
    files = {claim["file"] for claim in claims}
    return {file for file in files if all(claim["out_of_reach"] for claim in claims if claim["file"] == file)}


@app.command()
def run(
    photos: Path = typer.Argument(metavar="PHOTOS", help="a folder of photos with masks"),
    index: list[Path] = typer.Option([], help="CSV with columns image, mask and split (train, test or other)"),
    people: str = typer.Option("ccp,human290,pennfudan,coco_person", help="sets of person photos (column set)"),
    pilot: bool = typer.Option(False, help="a tenth of the steps and one seed, for the power note"),
    only: list[str] = typer.Option([], help="only these tables"),
    jobs: int = typer.Option(2, min=1, help="tables side by side, a thread each"),
    sets_only: bool = typer.Option(False, help="make the sets and stop"),
) -> None:
    """Make the sets, run the tables and copy the results to reports/evidence; call it again after a stop."""
    enter_root()
    if unknown := set(only) - TABLES.keys():
        raise HarmonyError(f"{min(unknown)}: no such table; they are {', '.join(TABLES)}")
    if not photos.is_dir():
        raise HarmonyError(f"{photos}: no such folder of photos; name one: make evidence PHOTOS=folder")
    make_clone(CLONE)
    make_sets(photos.resolve(), index, people.split(","), CLONE / "data/evidence")
    if sets_only:
        return
    write_settings(CLONE, pilot)
    kind, target = ("pilot", RESULTS / "pilot") if pilot else ("run", RESULTS)
    logs, book = CLONE / "logs" / kind, CLONE / f"hours-{kind}.json"
    hours = read_json(book) if book.is_file() else {}
    out_of_reach = set() if pilot else skipped(RESULTS / "power.json")

    def table(stage: str) -> None:
        name = TABLES[stage]
        hours[name] = hours.get(name, 0) + reproduce(CLONE, stage, logs)
        write_json(book, hours)
        collect(CLONE, name, target, hours[name])
        print(f"{time.strftime('%H:%M')} {stage}: {hours[name]:.2f} h", flush=True)

    chosen = [stage for stage, name in TABLES.items() if stage in (only or TABLES) and name not in out_of_reach]
    with ThreadPoolExecutor(jobs) as pool:
        errors = [future.exception() for future in [pool.submit(table, stage) for stage in chosen]]
    for error in filter(None, errors):
        print(f"error: {error}", file=sys.stderr)
    if any(errors):
        raise HarmonyError(f"{sum(map(bool, errors))} of {len(chosen)} tables failed; mend it and call this again")


if __name__ == "__main__":
    sys.exit(run_application(app, "python -m ablations.evidence"))
