"""The profile `paper` in miniature, every path kept: made-up copies of its data sets and a stand-in Stable Diffusion.

`python tests/long/paper_smoke.py` writes them to data/paper-smoke; the test runs the chain on them (`make test-long`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import harmonylib  # noqa: F401  (first: the torchvision guard)
from harmonylib.core.images import write_image
from harmonylib.core.seeds import rng
from harmonylib.data.embedded_photos import load_photos, random_crop
from harmonylib.data.layout import SUBSETS, write_composite, write_list, write_pair
from harmonylib.data.recipes import make_composite
from harmonylib.evaluation.published import PROTOCOLS
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.diffusion import base_scheduler

ROOT = Path(__file__).parents[2]
WHERE = Path("data/paper-smoke")
VANISHED = ("HFlickr", 5)  # subset and photo of a test mask


def crops(*words):
    """Endless (photo number, picture, mask) of the embedded photos' objects."""
    photos, number = load_photos(), 0
    while True:
        photo = photos[number % len(photos)]
        name = list(photo.masks)[number // len(photos) % len(photo.masks)]
        yield number, *random_crop(photo.image, photo.masks[name], rng("paper smoke", *words, number))
        number += 1


def write_iharmony4(root: Path) -> None:
    """Six photos a subset, two composites each; the last two photos are for testing. One test mask is a bar between the
    cells of the diffusion models' latent grid, and nothing of it is left there."""
    lists = {"train": [], "test": []}
    for subset in SUBSETS:
        for number, real, mask in crops(subset):
            if number == 6:
                break
            if (subset, number) == VANISHED:
                mask = np.zeros_like(mask)
                mask[:, round(0.03 * mask.shape[1]) : round(0.065 * mask.shape[1])] = True
            pair = write_pair(root, subset, f"{subset[1]}{number}", 1, real, mask)
            for variant in (1, 2):
                composite, _ = make_composite(
                    subset, real, mask, ("paper smoke", number, variant), (real[::-1], mask[::-1])
                )
                line = write_composite(root, subset, pair, variant, composite)
                lists["test" if number >= 4 else "train"].append(line)
    for split, lines in lists.items():
        write_list(root, split, lines)


def write_imaterialist(root: Path) -> None:
    """Twelve photos with two segments each, as run lengths down the columns."""
    rows = []
    for number, real, mask in crops("fashion"):
        if number == 12:
            break
        write_image(root / "train" / f"p{number:02d}.jpg", real)
        upper = mask.copy()
        upper[mask.shape[0] // 2 :] = False
        for part in (upper, mask & ~upper):
            ends = np.flatnonzero(np.diff(np.r_[0, part.flatten(order="F"), 0]))
            if len(ends):
                runs = " ".join(f"{start + 1} {stop - start}" for start, stop in ends.reshape(-1, 2))
                rows.append([f"p{number:02d}", runs, *mask.shape, 1])
    pd.DataFrame(rows, columns=["ImageId", "EncodedPixels", "Height", "Width", "ClassId"]).to_csv(
        root / "train.csv", index=False
    )


def write_real_composites(root: Path) -> None:
    """RealHM and DIH99 as they come, a dozen composites each."""
    for number, real, mask in crops("real composites"):
        if number == 12:
            break
        composite, _ = make_composite("HCOCO", real, mask, ("real", number), (real[::-1], mask[::-1]))
        for part, picture in (("composite.jpg", composite), ("mask.png", mask), ("gt.jpg", real)):
            write_image(root / "RealHM" / f"r{number}_{part}", picture)
        write_image(root / "DIH99/images" / f"d{number}.jpg", composite)
        write_image(root / "DIH99/masks" / f"d{number}.png", mask)


def write_stable_diffusion(root: Path) -> None:
    """A folder of Stable Diffusion inpainting's layout, of tiny random networks, and an autoencoder beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    base, prompt = root / "stable-diffusion", 32
    for folder in (base / "vae", root / "vae"):
        build_autoencoder((8, 8, 16, 16), layers=2).save_pretrained(folder)
    build_unet((32, 32), prompt_dim=prompt).save_pretrained(base / "unet")
    base_scheduler("epsilon").save_pretrained(base / "scheduler")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (base / "tokenizer").mkdir(exist_ok=True)
    (base / "tokenizer/vocab.json").write_text(json.dumps(words))
    (base / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(base / "tokenizer").save_pretrained(base / "tokenizer")
    text = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=prompt, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModel(text).save_pretrained(base / "text_encoder")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionInpaintPipeline"}))


def write_all(root: Path) -> None:
    write_iharmony4(root / "iHarmony4")
    write_imaterialist(root / "imaterialist")
    write_real_composites(root)
    write_stable_diffusion(root)


def test_the_paper_profile_in_miniature(tmp_path):
    """The chain, and ablations of every kind, by two processes, from the data sets as they come to the report."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    write_all(clone / WHERE)
    environment = os.environ | {"PYTHONPATH": str(clone), "DVC_SITE_CACHE_DIR": str(tmp_path / "dvc")}

    def command(*words):
        subprocess.run([sys.executable, "-m", "harmonylib.tools.cli", *words], cwd=clone, env=environment, check=True)

    command("profile", "paper-smoke")
    command("repro", "--gpus", "2")
    shared = ("table_4", "table_5", "table_VI", "human_harmony")
    command("repro", "--gpus", "2", *(f"ablations/dvc.yaml:{name}" for name in shared))
    command("repro", "ablations/dvc.yaml")

    def read(name):
        return json.loads((clone / f"reports/metrics/{name}.json").read_text())

    tables = {name: read(f"table_{name}") for name in ("2", "3", "4", "5", "IV", "VI", "VII", "style", "readings")}
    tables |= {name: read("evaluation_details") for name in ("1", "III")}
    for name, table in tables.items():
        assert table["n"] and table["protocol"] == "standard, composite background pasted", name
        assert table["scored_at"] == ([32, 64] if name == "IV" else 32), name  # evaluation.size, ablations.sizes
        assert table["as_published"][name]["protocol"] == PROTOCOLS.get(name, "standard"), name
    for name, count, published in (("2", 6, 8), ("4", 14, 16), ("5", 14, 16), ("VI", 16, 16)):
        table = tables[name]  # VANISHED has two composites: in no standard table that diffusion models stand in
        assert (table["n"], (table | table["as_published"][name])["n"]) == (count, published), name
    assert tables["3"]["n"]["benchmark"] == tables["1"]["n"] == 14 and tables["1"]["left_out"] == 2
    for name in ("1", "III"):
        assert {part["all"]["n"] for part in tables[name]["as_published"][name]["models"].values()} == {16}, name
    for row in tables["IV"]["rows"].values():
        assert {size: part["scored_at"] for size, part in row.items()} == {"32px": 32, "64px": 64}
    assert read("evaluation")["scored_at"] == read("resunet")["scored_at"] == 32


if __name__ == "__main__":
    write_all(ROOT / WHERE)
