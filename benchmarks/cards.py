"""`python -m benchmarks.cards`: writes the figures of pretrained/scores.json into the model cards and README, those of
the last run and its ablations (reports/metrics/*.json) into README, and notebook 0's picture to docs/results.jpg.

What stands between `<!-- figures -->` and `<!-- end of figures -->` is replaced (likewise `run` and `ablations`); the
text around it is by hand and has no figures.
"""

import json
import re
from pathlib import Path

from PIL import Image

from harmonylib.core.files import atomic_path
from harmonylib.core.json_files import read_json

from .shipped import SCORES

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "reports/metrics"
PICTURE = ROOT / "reports/figures/tour/harmonized.png"
WIDTH = 1100  # pixels of README's picture
MARKS = {
    name: re.compile(rf"(?s)(<!-- {name} -->\n).*?(<!-- end of {name} -->)") for name in ("figures", "run", "ablations")
}
TITLES = {"subset": "by recipe", "strength": "by the composite's fMSE", "share": "by the foreground's share"}


def _plain(label: str) -> str:
    """ "[260.0, 500.0)" of a table's cut as "260 to 500"."""
    if "," not in label:
        return label
    low, high = (float(end) for end in label.strip("[]()").split(","))
    return f"{max(low, 0):g} to {high:g}" if high < float("inf") else f"over {low:g}"


def _row(name: str, part: dict) -> str:
    (gain, low, high), (less, least, most) = part["psnr"], part["reduction"]
    figures = f"{gain:+.2f} ({low:+.2f} to {high:+.2f}) | {-less:+.0%} ({-most:+.0%} to {-least:+.0%})"
    return f"| {name} | {part['n']} | {part['photos']} | {figures} |"


def card(found: dict, model: str) -> str:
    """The figures of one model in Markdown: gains over the composite on every set, then by group on the first."""
    head = ["| | composites | photos | PSNR, dB | fMSE |", "|---|---|---|---|---|"]
    sets = {name: result for name, result in found["sets"].items() if model in result["against_composite"]}
    lines = ["Gain over the composite, mean and 95 % interval over photos:", "", *head]
    lines += [_row(name, result["against_composite"][model]["all"]) for name, result in sets.items()]
    for group, title in TITLES.items():
        name, result = next(iter(sets.items()))
        lines += ["", f"On `{name}` {title}:", "", *head]
        lines += [_row(_plain(label), part) for label, part in result["against_composite"][model][group].items()]
    lines += ["", "A real photo given with its own mask comes back at: " + ", ".join(
        f"{r['real_photos'][model]['psnr']:.1f} dB (fMSE {r['real_photos'][model]['fmse']:.1f}) on `{n}`"
        for n, r in sets.items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def overview(found: dict) -> str:
    """README's table: every model, every set."""
    names = list(found["sets"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model in next(iter(found["sets"].values()))["real_photos"]:
        cells = []
        for result in found["sets"].values():
            part = result["against_composite"][model]["all"]
            cells.append(f"{part['psnr'][0]:+.1f} dB, fMSE {-part['reduction'][0]:+.0%}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last_run() -> str:
    """README's table of the last run's evaluation, with intervals of the PSNR."""
    models, details = (read_json(METRICS / f"{name}.json") for name in ("evaluation", "evaluation_details"))
    models, names = models["models"], ("diffharmony++ vs diffharmony", "diffharmony++ vs composite")
    lines = ["| method | PSNR ↑ (95 % interval) | MSE ↓ | fMSE ↓ | SSIM ↑ | fSSIM ↑ |", "|---|---|---|---|---|---|"]
    for name, parts in models.items():
        part, (low, high) = parts["all"], details["models"][name]["all"]["interval"]["psnr"]
        errors = f"{part['mse']:.0f} | {part['fmse']:.0f} | {part['ssim']:.3f} | {part['fssim']:.3f}"
        lines.append(f"| {name} | {part['psnr']:.2f} ({low:.2f} – {high:.2f}) | {errors} |")
    decoders = read_json(METRICS / "harmony_vae-harmonize.json")["decoders"]
    judge = read_json(METRICS / "classifier.json")
    judges = {"the classifier": judge} | ({"with the mask": judge["with_mask"]} if "with_mask" in judge else {})
    lines += ["", *(f"- PSNR, {name}: {_effect(details['paired'][name]['all']['psnr'])} dB" for name in names)]
    lines += [f"- reconstruction of real photos: {decoders['harmony']['psnr']:.1f} dB by Harmony-VAE, "
              f"{decoders['plain']['psnr']:.1f} dB by the plain autoencoder"]  # fmt: skip
    lines += [f"- AUC of {name} on unseen photos: {found['auc']:.2f} ({found['auc_interval'][0]:.2f} to "
              f"{found['auc_interval'][1]:.2f})" for name, found in judges.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def _effect(effect) -> str:
    value, low, high = effect
    return "not run" if value is None else f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def ablations() -> str:
    """README's table of the ablations: every difference in PSNR that they test, ours and as published."""
    lines = ["| table | difference in PSNR, dB | ours (95 % interval) | published |", "|---|---|---|---|"]
    for path in sorted(METRICS.glob("table_*.json")):
        data = read_json(path)
        for found in (found for found in data["differences"] if found["metric"] == "psnr"):
            name = f"{found['after']} over {found['before']}"
            name += "" if found["subset"] == "all" else f", {found['subset']}"
            printed = "–" if found["published"] is None else f"{found['published']:+.2f}"
            effect = _effect((found["improvement"], *found["interval"]))
            lines.append(f"| {data['table']} | {name} | {effect} | {printed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = json.loads(SCORES.read_text(encoding="utf-8"))
    models = {name.partition(":")[0]: name for name in next(iter(found["sets"].values()))["real_photos"]}
    texts = {ROOT / "README.md": {"figures": overview(found), "run": last_run(), "ablations": ablations()}}
    texts |= {ROOT / "pretrained" / name / "README.md": {"figures": card(found, key)} for name, key in models.items()
              if name != "diffharmony"}  # fmt: skip
    for path, parts in texts.items():
        written = path.read_text(encoding="utf-8")
        for name, text in parts.items():
            written = MARKS[name].sub(lambda mark, text=text: mark[1] + text + mark[2], written)
        with atomic_path(path) as temporary:
            temporary.write_text(written, encoding="utf-8")
    if PICTURE.is_file():
        with Image.open(PICTURE) as picture, atomic_path(ROOT / "docs/results.jpg") as temporary:
            size = (WIDTH, round(picture.height * WIDTH / picture.width))
            picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(temporary, "JPEG", quality=90)


if __name__ == "__main__":
    main()
