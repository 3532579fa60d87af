"""Measure the claims of every available method and store what came out, for the catalogue and the documentation.

python docs/measure_claims.py [--quick] [SLUG ...]
"""

import sys
from pathlib import Path

import theodolite
from theodolite.catalog import CATALOG
from theodolite.core.files import write_json

MEASURED = Path(theodolite.__file__).parent / "reproductions" / "measured"


def main() -> None:
    """Write one JSON file a method."""
    full = "--quick" not in sys.argv[1:]
    named = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    MEASURED.mkdir(exist_ok=True)
    for entry in CATALOG:
        if entry.state == "available" and (not named or entry.slug in named):
            report = theodolite.reproduce(entry.slug, full=full)
            write_json(MEASURED / f"{entry.slug}.json", report.to_json())
            held = [claim.holds for claim in report.claims]
            print(
                f"{entry.slug}: {held.count(True)} hold, {held.count(False)} do not, {report.seconds:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
