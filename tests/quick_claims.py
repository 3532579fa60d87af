"""What every quick reproduction must give: a report that is JSON, and for each claim a number with its interval or a reason."""

import json
import math

from theodolite.reproductions.report import reproduce


def quick_claims(slug, topics):
    """The claims of the quick reproduction by the words of theirs that ``topics`` lists, in order."""
    report = reproduce(slug, seed=0)
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["slug"] == slug
    assert len(report.claims) == len(topics)
    for topic, claim in zip(topics, report.claims, strict=True):
        assert topic in claim.claim
        assert claim.paper
        assert claim.threshold
        assert claim.scaled
        if claim.measured is None:
            assert claim.holds is None
            continue
        assert claim.measured.low <= claim.measured.value <= claim.measured.high
        assert claim.holds is not None
        assert claim.comparator is None or math.isfinite(claim.comparator.measured)
    return dict(zip(topics, report.claims, strict=True))
