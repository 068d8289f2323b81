"""`python -m benchmarks.cards`: writes what was measured into the texts: the figures of pretrained/scores.json into the
model cards, these and the last run's (reports/metrics/) into docs/results.md, a few of them and the course into README.

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is replaced; the text around it is by hand.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from harmonylib.core.files import atomic_path
from harmonylib.core.json_files import read_json
from report.course import contents

from .shipped import SCORES

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "reports/metrics"
SHIPPED = {  # what each is for
    "contrastive-resunet": "the default of `harmonylib harmonize`; one pass, any size",
    "diffharmony++": "the diffusion paper's models, small; two steps",
    "base": "what the diffusion models start from",
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
    """Every model, every set."""
    names = list(found["sets"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model in next(iter(found["sets"].values()))["real_photos"]:
        cells = []
        for result in found["sets"].values():
            part = result["against_composite"].get(model, {}).get("all")
            cells.append(f"{part['psnr'][0]:+.1f} dB, fMSE {-part['reduction'][0]:+.0%}" if part else "not run")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last_run(models: dict, details: dict) -> str:
    """The last run's evaluation, with intervals of the PSNR."""
    names = ("diffharmony++ vs diffharmony", "diffharmony++ vs composite")
    lines = ["| method | PSNR ↑ (95 % interval) | MSE ↓ | fMSE ↓ | SSIM ↑ | fSSIM ↑ |", "|---|---|---|---|---|---|"]
    for name, parts in models.items():
        part, (low, high) = parts["all"], details["models"][name]["all"]["interval"]["psnr"]
        errors = f"{part['mse']:.0f} | {part['fmse']:.0f} | {part['ssim']:.3f} | {part['fssim']:.3f}"
        lines.append(f"| {name} | {part['psnr']:.2f} ({low:.2f} – {high:.2f}) | {errors} |")
    decoders = read_json(METRICS / "harmony_vae-harmonize.json")["decoders"]
    judge = read_json(METRICS / "classifier.json")
    judges = {"the classifier": judge, "the classifier with the mask": judge["with_mask"]}
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
    """The ablations: every difference in PSNR that they test, ours and as published."""
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


def _judged(claim: dict) -> list:
    """Cells of a claim: the effect with its interval, the number of photos, the verdict."""
    here = "–"
    if claim["effect"] is not None:
        ends = [f"{end:+.2f}" if end is not None else "–" for end in claim["interval"]]
        here = f"{claim['effect']:+.2f} ({' to '.join(ends)}) {claim['metric']}"
    return [here, claim["photos"] or "–", claim["verdict"]]


def claims(found: list[dict]) -> str:
    """Both papers' claims as the report judges them."""
    heads = ("paper", "claim", "paper says", "`make repro` (95 % interval)", "photos", "verdict",
             "`make evidence` (95 % interval)", "photos", "verdict")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for claim in found:
        cells = [f"{claim['paper']}, {claim['place']}", claim["claim"], claim["published"]]
        cells += _judged(claim) + _judged(claim["evidence"])
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def headline(sets: dict, models: dict, details: dict, found: list[dict]) -> str:
    """README's few lines."""
    lines, model = [], "contrastive-resunet"
    kinds = {"unseen": "of unseen photos", "other": "of photo sets that no training saw"}
    for name, words in (kinds | {"whole": "of whole objects in unseen photos"}).items():
        part = sets[name]["against_composite"][model]["all"]
        (gain, low, high), less = part["psnr"], part["reduction"][0]
        lines.append(f"**{model}**, as shipped, on {part['n']} composites {words} ({part['photos']}): {gain:+.1f} dB "
                     f"PSNR ({low:.1f} to {high:.1f}), {less:.0%} less fMSE")  # fmt: skip
    psnr = {name: parts["all"]["psnr"] for name, parts in models.items()}
    names = ("composite", "diffharmony", "diffharmony++", model)
    lines.append(f"`make repro`, {details['n']} composites of {details['photos']} photos, mean PSNR: "
                 + ", ".join(f"{name} {psnr[name]:.1f}" for name in names) + " dB")  # fmt: skip
    for run, judged in (("in that run", found), ("on hundreds of photos", [claim["evidence"] for claim in found])):
        counts = Counter(claim["verdict"] for claim in judged)
        lines.append(f"the {len(found)} claims {run}: " + ", ".join(f"{v} {n}" for v, n in counts.items()))
    return "".join(f"- {line}.\n" for line in lines)


def weights() -> str:
    """The shipped models: parameters and megabytes of their files."""
    lines = ["| model | parameters | download | what it is for |", "|---|---|---|---|"]
    for name, words in SHIPPED.items():
        files, count = sorted((ROOT / "pretrained" / name).rglob("*.safetensors")), 0
        for path in files:
            with safe_open(path, "pt") as tensors:
                count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        size = sum(path.stat().st_size for path in files)
        lines.append(f"| [{name}](pretrained/{name}/README.md) | {count / 1e6:.1f} M | {size / 1e6:.1f} MB | {words} |")
    return "\n".join(lines) + "\n"


def replaced(text: str, parts: dict[str, str]) -> str:
    for name, part in parts.items():
        marked = re.compile(rf"(?s)(<!-- {name} -->\n).*?(<!-- end of {name} -->)")
        assert marked.search(text), name
        text = marked.sub(lambda mark, part=part: mark[1] + part + mark[2], text)
    return text


def texts() -> dict[Path, str]:
    """{file: what it should hold}."""
    found = json.loads(SCORES.read_text(encoding="utf-8"))
    run = {name: json.loads((METRICS / f"{name}.json").read_text(encoding="utf-8"))
           for name in ("evaluation", "evaluation_details", "report")}  # fmt: skip
    models, details, judged = run["evaluation"]["models"], run["evaluation_details"], run["report"]["claims"]
    tested = {name.partition(":")[0]: name for name in next(iter(found["sets"].values()))["real_photos"]}
    parts = {
        ROOT / "README.md": {
            "headline": headline(found["sets"], models, details, judged),
            "course": contents("notebooks/", "docs/course/"),
            "weights": weights(),
        },
        ROOT / "docs/results.md": {
            "figures": overview(found),
            "run": last_run(models, details),
            "claims": claims(judged),
            "ablations": ablations(),
        },
    }
    parts |= {ROOT / "pretrained" / name / "README.md": {"figures": card(found, key)} for name, key in tested.items()
              if name != "diffharmony"}  # fmt: skip
    return {path: replaced(path.read_text(encoding="utf-8"), part) for path, part in parts.items()}


def main() -> None:
    for path, text in texts().items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
