"""The papers' claims, and what the metrics files say about each: effect, interval, n, verdict.

Claims about the main chain read evaluation_details.json, as notebooks/09_evaluation.ipynb writes it, and votes.json
(`harmonylib votes`); the others an ablation's table_<T>.json (T = 2, 4, 5, IV, VI, VII or "style"):

    {"profile", "n", "photos", "rows": {row: summary, or {subset: summary}},
     "differences": [{"before", "after", "metric", "improvement", "interval": [lo, hi], "subset"?, "status"?}],
     "scored_at", "protocol", "as_published": {T: {"protocol", and the rows as it scored them}}}

with summary = {metric: mean, "interval": {metric: [lo, hi]}, "status"?}, rows named as published, and improvements
positive where "after" is better. Table 4 also compares gains: after "Harmony-VAE gain at low resolution", before
"Harmony-VAE gain at high resolution"; after "Harmony-VAE + refinement", before "Harmony-VAE"; after "refinement",
before "no refinement". Table IV compares "high resolution" with "low resolution".

The evidence run (`make evidence`) leaves the same files in reports/evidence; what the shipped weights do stands for the
main chain there, and power.json says which claims the photos are too few for.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harmonylib.core.json_files import read_json
from harmonylib.evaluation.statistics import NOT_RUN, TOO_FEW, verdict

OUT_OF_REACH = "out of reach"

PLUS, CONTRASTIVE = "DiffHarmony++", "Region-wise contrastive"
AGAINST = "diffharmony++ vs contrastive-resunet"
BUCKETS = {"0-5%": 3835 / 7404, "5-15%": 1951 / 7404, "15-100%": 1618 / 7404}  # the weights of Table 3's N_samples


@dataclass(frozen=True)
class Claim:
    """One claim and where its measured effect lies: `path` inside reports/metrics/<file>.json, ending at the dict that
    holds `metric` as [mean, lo, hi] with "n" and "photos". sign turns effects so that positive supports the claim; with
    a margin the claim is that the effect stays within it. published: (table, {(row, subset): weight}), a sum of PSNRs.
    """

    text: str
    paper: str
    place: str
    file: str
    path: tuple
    metric: str = "psnr"
    sign: int = 1
    margin: float | None = None
    published: tuple | str = ""


def _versus(text, paper, table, a, b, subset="all", place=None, **more):
    """A claim about two rows of one published table."""
    cells = (table, {(a, subset): 1, (b, subset): -1})
    path = ("paired", f"{a} vs {b}", subset)
    return Claim(text, paper, place or f"Table {table}", f"table_{table}", path, published=cells, **more)


LOW, HIGH, WITH = "512px", "1024px", " + Harmony-VAE"
CLAIMS = (
    Claim("DiffHarmony++ comes closer to the real image than the composite does", PLUS, "Table 1", "evaluation_details",
          ("paired", "diffharmony++ vs composite", "all"), published="its Composite row is another method's"),
    Claim("Harmony-VAE improves on the plain autoencoder", PLUS, "Table 4", "evaluation_details",
          ("paired", "diffharmony++ vs diffharmony", "all"),
          published=("4", {(LOW + WITH, "all"): 1, (LOW, "all"): -1})),
    Claim("Harmony-VAE helps more at low resolution than at high", PLUS, "Table 4", "table_4",
          ("paired", "Harmony-VAE gain at low resolution vs Harmony-VAE gain at high resolution", "all"),
          published=("4", {(LOW + WITH, "all"): 1, (LOW, "all"): -1, (HIGH + WITH, "all"): -1, (HIGH, "all"): 1})),
    Claim("Refinement adds little once there is Harmony-VAE (under 0.2 dB)", PLUS, "Table 4", "table_4",
          ("paired", "Harmony-VAE + refinement vs Harmony-VAE", "all"), margin=0.2,
          published=("4", {(HIGH + WITH + " + refinement", "all"): 1, (HIGH + WITH, "all"): -1})),
    Claim("Refinement helps the plain autoencoder", PLUS, "Table 4", "table_4",
          ("paired", "refinement vs no refinement", "all"),
          published=("4", {(HIGH + " + refinement", "all"): 1, (HIGH, "all"): -1})),
    _versus("Zero initialisation is needed", PLUS, "5", "Ec + D, zero init", "Ec + D, random init"),
    _versus("Training the decoder too adds to training the conditional encoder", PLUS, "5",
            "Ec + D, zero init", "Ec, zero init"),
    _versus("Augmentation helps small sets: HFlickr", PLUS, "2", "augmented", "base", "HFlickr"),
    _versus("Augmentation helps small sets: Hday2night", PLUS, "2", "augmented", "base", "Hday2night"),
    *(Claim(f"Generated composites help more than as many of the recipe's: {subset}", PLUS, "Table 2, with a control",
            "table_2", ("paired", "augmented vs recipes", subset), published="no such control")
      for subset in ("HFlickr", "Hday2night")),
    Claim("Five denoising steps do as well as twenty (within 0.2 dB)", PLUS, "Section 5.2", "shipped",
          ("paired", "20 steps vs 5 steps", "all"), margin=0.2, published="five, without a comparison"),
    Claim("The mean of four draws comes closer to the real image than one draw", PLUS, "beyond the paper", "shipped",
          ("paired", "mean of 4 draws vs 5 steps", "all"), published="one draw"),
    Claim("Candidates differ more under seeds of their own than under the published code's", PLUS, "Section 4.2, code",
          "candidates", ("paired", "own seeds vs published seeds", "all"), "spread", published="not measured"),
    Claim("Human Harmony foregrounds are large (share above 20 % of the image, minus the benchmark's share)", PLUS,
          "Figure 2", "evaluation_details", ("above_a_fifth",), "difference",
          published="about 70 % against under 15 %"),
    *(Claim(f"Diffusion wins on large foregrounds (15-100 %): {label}; comparator here: contrastive ResUNet", PLUS,
            "Table 3", "evaluation_details", ("paired_large", key),
            published=("3", {("DiffHarmony++", f"{label} 15-100%"): 1, ("HDNet512", f"{label} 15-100%"): -1}))
      for label, key in (("iHarmony4", "benchmark"), ("Human Harmony", "human_harmony"))),
    Claim("By Table 3's own buckets the peer (HDNet) leads overall; comparator here: contrastive ResUNet", PLUS,
          "Table 3, recomputed", "evaluation_details", ("paired", AGAINST, "all"), sign=-1,
          published=("3", {(row, f"iHarmony4 {b}"): sign * w for row, sign in (("HDNet512", 1), ("DiffHarmony++", -1))
                           for b, w in BUCKETS.items()})),
    Claim("The contrastive ResUNet comes closer to the real image than the composite does", CONTRASTIVE, "Table II",
          "evaluation_details", ("paired", "contrastive-resunet vs composite", "all"),
          published=("II", {("Ours", "all"): 1, ("input composite", "all"): -1})),
    _versus("The foreground loss helps", CONTRASTIVE, "VI", "2: L1 + Lpixel", "1: L1"),
    _versus("Style fusion helps", CONTRASTIVE, "VI", "3: L1 + Lpixel + style fusion", "2: L1 + Lpixel"),
    _versus("The contrastive loss helps", CONTRASTIVE, "VI", "4: L1 + Lpixel + style fusion + LHCL",
            "3: L1 + Lpixel + style fusion"),
    *(Claim(f"Style fusion beats {name}", CONTRASTIVE, "Figures 8 and 9", "table_style",
            ("paired", f"style-fusion vs {name.lower()}", "all"), published="curves only")
      for name in ("AdaIN", "RAIN", "none")),
    *(Claim(f"The contrastive loss helps, reading {reading} of Eq. 10", CONTRASTIVE, "Section III.C", "table_readings",
            ("paired", f"{reading} vs no contrastive term", "all"), published="one reading, not said which")
      for reading in "ABC"),
    *(_versus(f"K = 256 patches are better than {k}", CONTRASTIVE, "VII", "K = 256", f"K = {k}")
      for k in (128, 512, 1024)),
    Claim("Quality is stable across resolutions (within 0.5 dB)", CONTRASTIVE, "Table IV", "table_IV",
          ("paired", "high resolution vs low resolution", "all"), margin=0.5,
          published=("IV", {("Ours", "HAdobe5k 1024px"): 1, ("Ours", "HAdobe5k 256px"): -1})),
    Claim("People prefer the contrastive network on real composites", CONTRASTIVE, "Table V", "votes",
          ("paired", "contrastive-resunet vs composite", "all"), "preference_percent",
          published=("V", {("Ours", "DIH99"): 1, ("Copy-paste", "DIH99"): -1})),
)  # fmt: skip


def from_ablation(data: dict) -> dict:
    """An ablation's file with "models" and "paired" as in evaluation_details.json; other files as they are."""
    if "rows" not in data:
        return data
    common = {key: data.get(key) for key in ("n", "photos")}
    models, paired = {}, {}
    for name, row in data["rows"].items():
        subsets = {k: v for k, v in row.items() if isinstance(v, dict) and "interval" in v} or {"all": row}
        models[name] = {subset: common | part for subset, part in subsets.items()}
    for d in data.get("differences", []):
        pair = paired.setdefault(f"{d['after']} vs {d['before']}", {})
        part = pair.setdefault(d.get("subset", "all"), common | {k: d[k] for k in ("n", "photos", "status") if k in d})
        if d.get("improvement") is not None:
            part[d["metric"]] = [d["improvement"], *(d.get("interval") or (None, None))]
    bare = {key: value for key, value in data.items() if key != "as_published"}
    scored = {table: from_ablation(bare | part) for table, part in data.get("as_published", {}).items()}
    return data | {"models": models, "paired": paired, "as_published": scored}


def measure_claim(claim: Claim, metrics: dict, published: pd.DataFrame) -> dict:
    """A claim with its effect (oriented so that positive supports it), interval, n, photos, source and verdict."""
    file = found = metrics.get(claim.file)
    for key in claim.path:
        found = (found or {}).get(key)
    found = found or {}
    effect, low, high = found.get(claim.metric) or (None, None, None)
    if effect is not None:
        effect *= claim.sign
        low, high = (None, None) if None in (low, high) else sorted((claim.sign * low, claim.sign * high))
    judged = [effect, low, high]
    if claim.margin is not None and effect is not None:
        ends = (None, None) if low is None else (max(abs(low), abs(high)), max(low, -high, 0.0))  # of |effect|
        judged = [claim.margin - abs(effect), *(None if end is None else claim.margin - end for end in ends)]
    judgement, hint = verdict(*judged, found.get("photos") or 0), None
    if judgement == TOO_FEW:
        hint = "so far it points " + ("the paper's way" if judged[0] > 0 else "the other way")
    return {
        "claim": claim.text, "paper": claim.paper, "place": claim.place, "metric": claim.metric,
        "published": _published_effect(claim, published), "effect": effect, "interval": [low, high],
        "n": found.get("n"), "photos": found.get("photos"), "profile": file.get("profile", "") if file else None,
        "verdict": judgement, "status": "; ".join(filter(None, (hint, found.get("status")))) or None,
        "source": f"{claim.file}.json" + ("" if effect is None else ": " + " / ".join((*claim.path, claim.metric))),
    }  # fmt: skip


def read_evidence(folder) -> dict:
    """The files of an evidence run as `measure_claim` takes them; {} where there is none."""
    files = {path.stem: from_ablation(read_json(path)) for path in sorted(Path(folder).glob("*.json"))}
    return files | ({"evaluation_details": files["shipped"]} if "shipped" in files else {})


def measure_evidence(claim: Claim, files: dict, published: pd.DataFrame) -> dict:
    """`measure_claim` of an evidence run, with "hours"; what was not run, being out of the photos' reach, says so."""
    found, file = measure_claim(claim, files, published), files.get(claim.file, {})
    power = {row["claim"]: row for row in files.get("power", {}).get("claims", ())}.get(claim.text, {})
    if found["verdict"] == NOT_RUN and power.get("out_of_reach"):
        found |= {"verdict": OUT_OF_REACH, "status": f"under {power['smallest_effect']} dB nothing shows"}
    return found | {"hours": file.get("evidence", {}).get("hours")}


def _published_effect(claim: Claim, published: pd.DataFrame) -> str:
    if isinstance(claim.published, str):
        return claim.published
    table, weights = claim.published
    metric, unit = (claim.metric, " points") if claim.metric == "preference_percent" else ("psnr", " dB")
    values = published.set_index(["table", "metric", "row", "subset"])["value"]
    return f"{sum(weight * values[table, metric, *cell] for cell, weight in weights.items()):+.2f}{unit}"
