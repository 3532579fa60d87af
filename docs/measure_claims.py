"""Measure the claims of every available method and store what came out, for the catalogue and the documentation.

python docs/measure_claims.py [--quick] [SLUG ...]
"""

import sys
from pathlib import Path

import theodolite
from theodolite.catalog import CATALOG
from theodolite.core.files import read_json, write_json

MEASURED = Path(theodolite.__file__).parent / "reproductions" / "measured"


def main() -> None:
    """Write one JSON file a method."""
    full = "--quick" not in sys.argv[1:]
    named = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    MEASURED.mkdir(exist_ok=True)
    kept = list[str]()
    for entry in CATALOG:
        if entry.state == "available" and (not named or entry.slug in named):
            report = theodolite.reproduce(entry.slug, full=full)
            file = MEASURED / f"{entry.slug}.json"
            before = (
                {c["claim"] for c in read_json(file)["claims"] if c["holds"] is not None} if file.exists() else set()
            )
            lost = [claim for claim in report.claims if claim.holds is None and claim.claim in before]
            if full and lost:  # without a data set or a model the file would lose what it tells
                kept.append(f"{entry.slug}: not stored, since {len(lost)} claims were told before: {lost[0].scaled}")
                continue
            write_json(file, report.to_json())
            held = [claim.holds for claim in report.claims]
            print(
                f"{entry.slug}: {held.count(True)} hold, {held.count(False)} do not, {report.seconds:.0f} s", flush=True
            )
    if kept:
        sys.exit("\n".join(kept))


if __name__ == "__main__":
    main()
