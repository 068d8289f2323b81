"""`harmonylib harmonize` on files and folders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_resunet
from PIL import Image

from harmonylib.core.errors import HarmonyError
from harmonylib.tools import cli, harmonize_files


@pytest.fixture
def folder(tmp_path):
    """pictures/{a.png,b_2.jpg}, masks/{a.png,b.png} and a random ResUNet in net/."""
    draw = np.random.default_rng(0)
    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    mask = np.zeros((24, 32), np.uint8)
    mask[4:20, 8:24] = 255
    for picture, region in (("a.png", "a.png"), ("b_2.jpg", "b.png")):
        small = Image.fromarray(draw.integers(0, 256, (3, 4, 3), np.uint8))
        small.resize((32, 24), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / picture)
        Image.fromarray(mask).save(tmp_path / "masks" / region)
    save_resunet(tmp_path / "net")
    return tmp_path


def harmonize(folder, picture, mask, output, *options):
    paths = [str(folder / path) for path in (picture, mask, output, "net")]
    arguments = ["harmonize", *paths[:2], "-o", paths[2], "--model", paths[3], "--device", "cpu", *options]
    return cli.run(cli.app, "harmonylib", arguments)


def test_one_picture(folder, capsys):
    assert harmonize(folder, "pictures/a.png", "masks/a.png", "new/out.png") == 0
    assert capsys.readouterr().out == f"{folder}/new/out.png\n"
    before, after = (np.asarray(Image.open(folder / name)) for name in ("pictures/a.png", "new/out.png"))
    region = np.asarray(Image.open(folder / "masks/a.png")) > 127
    assert np.array_equal(after[~region], before[~region]) and not np.array_equal(after[region], before[region])

    written = (folder / "new/out.png").read_bytes()
    assert harmonize(folder, "pictures/a.png", "masks/a.png", "new/out.png", "--strength", "0.5") == 1
    assert "exists already" in capsys.readouterr().err and (folder / "new/out.png").read_bytes() == written
    assert harmonize(folder, "pictures/a.png", "masks/a.png", "new/out.png", "--strength", "0", "--force") == 0
    assert np.array_equal(np.asarray(Image.open(folder / "new/out.png")), before)


def test_a_folder(folder, capsys):
    assert harmonize(folder, "pictures", "masks", "out") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.png", "b_2.png"]
    assert harmonize(folder, "pictures", "masks", "out", "--format", "jpg") == 0
    capsys.readouterr()

    Image.new("L", (8, 8), 255).save(folder / "masks/b.png")
    assert harmonize(folder, "pictures", "masks", "again") == 1
    lines = re.findall(r"error: [^\r\n]*", capsys.readouterr().err)
    assert "masks/b.png: is 8x8" in lines[0] and "1 of 2 pictures" in lines[1] and len(lines) == 2
    assert [path.name for path in (folder / "again").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.png", "masks/a.png", "out.png"), "none.png: no such file"),
        (("pictures/a.png", "none.png", "out.png"), "none.png: no such file"),
        (("pictures/a.png", "masks", "out.png"), "two files or two folders"),
        (("pictures/a.png", "masks/a.png", "out.gif"), "cannot write this kind"),
        (("pictures/a.png", "masks/a.png", "net"), "cannot write this kind"),
        (("pictures", "masks", "pictures/a.png"), "is a file"),
        (("pictures", "masks", "pictures/a.png/b"), "cannot be written to"),
        (("pictures", "net", "out"), "a.png: no mask named a.*"),
        (("net", "masks", "out"), "no pictures"),
        (("pictures", "masks", "pictures"), "a.png: exists already"),
        (("pictures/a.png", "masks/a.png", "out.png", "--strength", "2"), "strength is 2"),
        (("pictures/a.png", "masks/a.png", "out.png", "--device", "abacus"), "abacus"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    assert harmonize(folder, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_processes_of_torchrun_share_a_folder(folder, monkeypatch):
    everything = harmonize_files.plan(folder / "pictures", folder / "masks", folder / "out")
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(harmonize_files.plan(folder / "pictures", folder / "masks", folder / "out"))
        assert harmonize(folder, "pictures", "masks", "out") == 0  # later processes do not mind the first one's files
    assert [len(share) for share in shares] == [1, 1, 0] and shares[0] + shares[1] == everything
    assert all(job.output.is_file() for job in everything)
    assert len(harmonize_files.plan(folder / "pictures/a.png", folder / "masks/a.png", folder / "one.png")) == 1


def test_a_read_only_folder(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(HarmonyError, match="cannot be written to"):
        harmonize_files.plan(folder / "pictures/a.png", folder / "masks/a.png", folder / "out.png")


def test_two_pictures_of_one_stem(folder):
    Image.open(folder / "pictures/a.png").save(folder / "pictures/a.jpg")
    with pytest.raises(HarmonyError, match=r"a.png: a.jpg would have the same output"):
        harmonize_files.plan(folder / "pictures", folder / "masks", folder / "out")


def test_transparent_picture_to_jpeg(folder):
    layer = Image.open(folder / "pictures/a.png").convert("RGBA")
    layer.putpixel((0, 0), (0, 0, 0, 254))
    layer.save(folder / "pictures/a.png")
    Image.new("L", (32, 24)).save(folder / "masks/a.png")
    jobs = harmonize_files.plan(folder / "pictures/a.png", folder / "masks/a.png", folder / "out.jpg")
    with pytest.raises(HarmonyError, match="transparency"):
        harmonize_files.run(jobs, "cpu", folder / "net")


@pytest.mark.skipif(os.name == "nt", reason="measured by resource")
def test_twelve_megapixels_fit_in_four_gigabytes(folder):
    """Peak memory of a fresh process, most of the picture being foreground."""
    code = """
import resource, numpy as np, harmonylib as hl
image = np.zeros((3000, 4000, 3), np.uint8) + np.linspace(0, 250, 4000).astype(np.uint8)[:, None]
mask = np.zeros((3000, 4000), bool)
mask[100:, 100:] = True
after = np.asarray(hl.harmonize(image, mask, model="net", device="cpu", feather=9))
assert (after[~mask] == image[~mask]).all() and (after != image).any()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(harmonize_files.__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 4, f"{ran.stdout} GiB"


def test_whatever_is_raised_costs_one_picture(folder, capsys, monkeypatch):
    save = Image.Image.save

    def broken(self, target, *words, **options):
        if "b_2" in str(target):
            raise RuntimeError("two\nlines")
        return save(self, target, *words, **options)

    monkeypatch.setattr(Image.Image, "save", broken)
    (folder / "pictures/c.heic").write_bytes(b"x")
    assert harmonize(folder, "pictures", "masks", "out") == 1
    lines = re.findall(r"error: [^\r\n]*", capsys.readouterr().err)
    assert "b_2.jpg: RuntimeError: two lines" in lines[0] and "c.heic: .heic is no type that is read" in lines[1]
    assert "2 of 3 pictures could not be" in lines[2] and [p.name for p in (folder / "out").iterdir()] == ["a.png"]
    assert harmonize(folder, "pictures/b_2.jpg", "masks/b.png", "b_2.png") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_names_as_people_have_them(folder, capsys):
    """Hidden files are passed over; other names of JPEG, Unicode of both forms, long and broken names are not."""
    picture, mask = folder / "pictures/a.png", folder / "masks/a.png"
    names = {"caf\u00e9.png": "cafe\u0301.png", "é" + "a" * 249 + ".png": None, "b.jfif": "b.png", "x\udce9.png": None}
    for part in ("pictures", "masks"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        for hidden in ("._a.png", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.png", "Thumbs.db"):
            (folder / part / hidden).write_bytes(b"x")
    for name, other in names.items():
        Image.open(picture).convert("RGB").save(folder / "pictures" / name, "JPEG" if "jfif" in name else "PNG")
        (folder / "masks" / (other or name)).write_bytes(mask.read_bytes())
    assert harmonize(folder, "pictures", "masks", "out") == 0, capsys.readouterr().err
    stems = {"a", "b_2", *(name.rsplit(".", 1)[0] for name in names)}
    assert {path.name for path in (folder / "out").iterdir()} == {f"{stem}.png" for stem in stems}
