"""Every available paper's quick reproduction runs, gives a number with an interval for each claim, and says what it left out."""

import json
import math

import pytest

from theodolite.catalog import CATALOG
from theodolite.reproductions.report import reproduce

# claims about our own exactness, which may not fail: (slug, part of the claim's text)
EXACT = {
    "adaptive-data-analysis": ["algorithm"],
    "intrinsic-dimension": ["toy problem", "unit columns"],
}


@pytest.mark.slow
@pytest.mark.parametrize("slug", [about.slug for about in CATALOG if about.state == "available"])
def test_quick_reproduction(slug):
    report = reproduce(slug, seed=0)
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["slug"] == slug
    assert len(written["claims"]) >= 3
    for claim in report.claims:
        assert claim.claim
        assert claim.threshold
        if claim.measured is None:
            assert claim.holds is not True
            assert claim.scaled or claim.holds is False, f"{claim.claim}: no number and no reason"
        else:
            assert math.isfinite(claim.measured.value)
            assert claim.holds is not None
    for text in EXACT.get(slug, ()):
        found = [claim for claim in report.claims if text.lower() in claim.claim.lower()]
        assert found, f"no claim about {text}"
        assert all(claim.holds for claim in found)
