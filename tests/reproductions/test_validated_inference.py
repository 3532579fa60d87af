import math

import numpy as np
import pytest

from quick_claims import quick_claims
from theodolite.reproductions import validated_inference as paper

TOPICS = [
    "enumeration is exact", "SMC keeps", "trace Metropolis-Hastings", "evidence is unbiased", "SMC is accurate",
    "resample-move beats", "one suite", "50,000 binds",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    claims = quick_claims("validated-inference", TOPICS)
    for topic in (*TOPICS[:3], "50,000 binds"):
        assert claims[topic].holds is True, topic
    assert claims["one suite"].measured.value < claims["one suite"].comparator.measured


def test_the_nile_as_it_is_published():
    assert len(paper.NILE) == 100
    assert np.mean(paper.NILE) == 919.35
    assert (min(paper.NILE), max(paper.NILE)) == (456, 1370)


def test_the_filter_is_the_joint_normal():
    flows, sd = paper.NILE[:4], 40.0
    mean, variance = paper._START[0], paper._START[1] ** 2
    times = np.arange(1, 5)
    levels = variance + sd**2 * np.minimum(times[:, None], times)
    cov = levels + paper._FLOW_SD**2 * np.eye(4)
    off = np.array(flows) - mean
    exact = -0.5 * (off @ np.linalg.solve(cov, off) + np.linalg.slogdet(2 * math.pi * cov)[1])
    last = mean + levels[-1] @ np.linalg.solve(cov, off)
    assert paper.kalman(flows, sd) == pytest.approx((last, exact))
