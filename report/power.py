"""The power note: of an evidence run's pilot, the smallest effect that its photos can show for each claim.

Run as `python -m report.power` after `python -m ablations.evidence PHOTOS --pilot`; writes reports/evidence/power.json.
"""

import re
import sys
from pathlib import Path

from harmonylib.core.json_files import write_json
from harmonylib.core.settings import enter_root
from harmonylib.evaluation.published import load

from .claims import CLAIMS, measure_claim, read_evidence

RESULTS = Path("reports/evidence")
REACH = (1.96 + 0.84) / (2 * 1.96)  # of an interval's width: 80 % power at the 5 % level


def power_note(files: dict) -> dict:
    """{"power", "level", "claims": [{"claim", "file", "published", "smallest_effect", "photos", "out_of_reach"}]}.

    files: the pilot's, as `read_evidence` gives them. A claim without a published effect in dB, or that something stays
    the same, is never out of reach. Errors shrink with the pilot's steps and grow with its one seed: a rough figure.
    """
    published, claims = load(), []
    for claim in CLAIMS:
        found = measure_claim(claim, files, published)
        low, high = found["interval"]
        least = None if low is None else round(REACH * (high - low), 3)
        number = re.fullmatch(r"([+-][\d.]+) dB", found["published"])
        effect = float(number[1]) if number else None
        beyond = None not in (least, effect) and claim.margin is None and abs(effect) < least
        claims.append({"claim": claim.text, "file": claim.file, "published": effect, "smallest_effect": least,
                       "photos": found["photos"], "out_of_reach": beyond})  # fmt: skip
    return {"power": 0.8, "level": 0.05, "claims": claims}


def as_table(note: dict) -> str:
    """The note as a table in Markdown."""
    lines = ["| claim | published, dB | smallest effect at 80 % | photos | out of reach |", "|---|---|---|---|---|"]
    for claim in note["claims"]:
        cells = ["–" if claim[key] is None else claim[key] for key in ("published", "smallest_effect", "photos")]
        lines.append(f"| {' | '.join(map(str, (claim['claim'], *cells, 'yes' if claim['out_of_reach'] else '')))} |")
    return "\n".join(lines)


def main() -> None:
    enter_root()
    note = power_note(read_evidence(RESULTS / "pilot"))
    write_json(RESULTS / "power.json", note)
    print(as_table(note))


if __name__ == "__main__":
    sys.exit(main())
