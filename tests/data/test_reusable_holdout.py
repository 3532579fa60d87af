import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from theodolite.core.errors import BudgetExhausted, DataError, DiskError, InputError
from theodolite.data.reusable_holdout import (
    Empirical,
    GaussianNoise,
    HoldoutLeakError,
    Ladder,
    Ledger,
    NotAStatisticalQuery,
    PrivateMultiplicativeWeights,
    QueryRangeError,
    RepeatedSeedWarning,
    SampleSplitting,
    SparseValidate,
    Thresholdout,
    adaptive_bias,
    audit,
    default_noise,
    fingerprint,
    freedman_attack,
    holdout_ledger,
    max_safe_queries,
    required_sample_size,
    reusable_scorer,
)


def samples(n=100, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * n, 3))
    y = (x[:, 0] > 0).astype(float)
    return x[:n], y[:n], x[n:], y[n:]


def make(n=100, **options):
    return Thresholdout(*samples(n), **options)


class Recorded(Thresholdout):
    """Thresholdout whose noise comes from a list."""

    def __init__(self, draws, *arguments, **options):
        self.draws = iter(draws)
        self.scales = []
        super().__init__(*arguments, **options)

    def _draw(self, scale):
        self.scales.append(scale)
        return next(self.draws) * scale


def reference(train, holdout, threshold, sigma, budget, draws):
    """The published algorithm, written down straight."""
    draws = iter(draws)
    gamma = next(draws) * 2 * sigma
    out = []
    for t, h in zip(train, holdout, strict=True):
        if budget < 1:
            out.append(None)
            continue
        eta = next(draws) * 4 * sigma
        if abs(h - t) > threshold + gamma + eta:
            value = h + next(draws) * sigma
            gamma = next(draws) * 2 * sigma
            budget -= 1
            out.append((value, "holdout", budget))
        else:
            out.append((t, "train", budget))
    return out


def test_it_is_the_published_algorithm_draw_for_draw():
    rng = np.random.default_rng(3)
    train, holdout = rng.uniform(size=(200, 50)), rng.uniform(size=(200, 50))
    draws = rng.laplace(size=1000).tolist()
    x, y, hx, hy = samples(50)
    ours = Recorded(draws, x, y, hx, hy, threshold=0.05, sigma=0.01, budget=20)
    expected = reference(train.mean(axis=1), holdout.mean(axis=1), 0.05, 0.01, 20, draws)
    for t, h, wanted in zip(train, holdout, expected, strict=True):
        if wanted is None:
            with pytest.raises(BudgetExhausted):
                ours.ask((t, h))
            continue
        answer = ours.ask((t, h))
        assert answer.value == pytest.approx(wanted[0], abs=1e-12)
        assert (answer.source, answer.budget_left) == wanted[1:]
    assert expected[-1] is None


def test_noise_is_laplace_with_scales_two_four_one():
    class Spy(Thresholdout):
        def _draw(self, scale):
            value = super()._draw(scale)
            seen.setdefault(scale, []).append(value)
            return value

    seen = {}
    sigma = 0.01
    spy = Spy(*samples(), threshold=0.0, sigma=sigma, budget=10**9)
    one, zero = np.ones(100), np.zeros(100)
    for _ in range(20_000):
        spy.ask((zero, one))
    assert {round(scale / sigma) for scale in seen} == {1, 2, 4}
    for scale, draws in seen.items():
        assert stats.kstest(draws, stats.laplace(scale=scale).cdf).pvalue > 0.01


def test_the_budget_is_spent_only_on_disagreement():
    rng = np.random.default_rng(0)
    n = 5000
    x = rng.normal(size=(2 * n, 2))
    y = rng.integers(0, 2, 2 * n)
    holdout = Thresholdout(x[:n], y[:n], x[n:], y[n:], preset="theory", tolerance=0.1)
    before = holdout.remaining
    values = rng.uniform(size=(1000, n))
    answers = holdout.ask_many(values, np.roll(values, 1, axis=1))
    assert holdout.remaining == before
    assert [a.value for a in answers] == pytest.approx(values.mean(axis=1).tolist(), abs=1e-12)
    assert {a.source for a in answers} == {"train"}


def test_ask_many_is_ask_one_after_another():
    rng = np.random.default_rng(1)
    train, holdout = rng.uniform(size=(60, 100)), rng.uniform(size=(60, 100))
    alone, together = (make(threshold=0.02, sigma=0.01, budget=100) for _ in range(2))
    one = [alone.ask(pair) for pair in zip(train, holdout, strict=True)]
    many = together.ask_many(train, holdout)
    assert [(a.source, a.budget_left, a.index) for a in one] == [(a.source, a.budget_left, a.index) for a in many]
    assert [a.value for a in one] == pytest.approx([a.value for a in many])


@pytest.mark.parametrize(("d", "scaled", "expected"), [
    (100, 0, 0.5996), (1000, 0, 0.7875), (4000, 0, 0.9447), (100, 1, 0.5708), (1000, 1, 0.7137), (4000, 1, 0.8704),
    (100, 3, 0.5318), (1000, 3, 0.5996), (4000, 3, 0.6931),
])  # fmt: skip
def test_the_closed_form_of_the_bias(d, scaled, expected):
    assert adaptive_bias(d, 1000, scaled / math.sqrt(1000)) == pytest.approx(expected, abs=1e-4)


def test_the_closed_form_is_what_an_attack_reaches():
    n, d, rng = 500, 500, np.random.default_rng(0)
    reached = []
    for _ in range(30):
        x, y = rng.normal(size=(n, d)), rng.choice([-1.0, 1.0], n)
        votes = np.sign(y @ x)
        reached.append((np.sign(x @ votes) == y).mean())
    assert np.mean(reached) == pytest.approx(adaptive_bias(d, n), abs=0.015)


def test_multiplicative_weights_equals_a_straight_reference():
    size, rng = 64, np.random.default_rng(2)
    index = rng.integers(0, 16, 400)
    mechanism = PrivateMultiplicativeWeights(size, index, threshold=0.1, max_queries=50, seed=5)
    noise = np.random.default_rng(5)
    weights = np.full(size, 1 / size)
    for _ in range(50):
        q = (rng.uniform(size=size) < 0.5).astype(float)
        a = q[index].mean() + noise.laplace(0, 0.1 / (4 * math.log(200)))
        difference = a - weights @ q
        answer = mechanism.ask(q)
        if abs(difference) <= 0.1:
            assert answer.source == "hypothesis"
            assert answer.value == pytest.approx(weights @ q)
        else:
            assert answer.value == pytest.approx(min(1, max(0, a)))
            weights = weights * np.exp(-0.05 * (q if difference < 0 else 1 - q))
            weights /= weights.sum()
    assert mechanism.updates > 0
    np.testing.assert_allclose(mechanism.hypothesis, weights)


def test_the_standard_holdout_is_fooled_and_thresholdout_is_not():
    standard = freedman_attack(1500, 1500, [75], mechanism="standard", repeats=5)
    ours = freedman_attack(1500, 1500, [75], mechanism="thresholdout", repeats=5)
    assert standard.reported.mean() > 0.58
    assert standard.fresh.mean() == pytest.approx(0.5, abs=0.03)
    assert ours.error < standard.error / 2


def test_the_other_mechanisms_answer():
    x, y, *_ = samples()
    values = np.linspace(0, 1, 100)
    assert Empirical(x, y).ask(values).value == pytest.approx(0.5)
    assert Empirical(x, y).ask(lambda x, y: y).value == pytest.approx(y.mean())
    noisy = GaussianNoise(x, y, sigma=0.01)
    assert noisy.ask(values).value == pytest.approx(0.5, abs=0.05)
    parts = SampleSplitting(x, y, max_queries=4)
    seen = []

    def remember(x, y):
        seen.extend(x[:, 0].tolist())
        return y

    for _ in range(4):
        parts.ask(remember)
    assert len(set(seen)) == 100
    with pytest.raises(BudgetExhausted):
        parts.ask(remember)
    checker = SparseValidate(x, y, tolerance=0.2, budget=2, sigma=0.001)
    assert checker.ask(values, claim=0.55).value == 1.0
    assert checker.ask(values, claim=0.9).value == 0.0
    assert checker.remaining == 1
    ladder = Ladder(x, y, step=0.1)
    assert ladder.ask(np.full(100, 0.62)).value == pytest.approx(0.6)
    assert ladder.ask(np.full(100, 0.66)).value == pytest.approx(0.6)
    assert ladder.ask(np.full(100, 0.75)).value == pytest.approx(0.8, abs=0.051)


def test_default_noise_weighs_bias_against_noise():
    s = default_noise(5000, 500)
    here = adaptive_bias(5000, 500, s) - 0.5 + 2 * s
    for other in (0.0, s / 2, 2 * s):
        assert here <= adaptive_bias(5000, 500, other) - 0.5 + 2 * other + 1e-9


def test_bounds_grow_as_the_theory_says_and_invert():
    assert (
        required_sample_size(400, 0.1, mechanism="empirical").n
        == 4 * required_sample_size(100, 0.1, mechanism="empirical").n
    )
    assert required_sample_size(100, 0.1, mechanism="fixed").constant_known
    assert not required_sample_size(100, 0.1, mechanism="gaussian").constant_known
    for mechanism, options in (("fixed", {}), ("splitting", {}), ("empirical", {}), ("thresholdout", {"budget": 4})):
        m = max_safe_queries(5000, 0.1, mechanism=mechanism, **options)
        assert required_sample_size(m, 0.1, mechanism=mechanism, **options).n <= 5000
        if m < 2**59:
            assert required_sample_size(m + 1, 0.1, mechanism=mechanism, **options).n > 5000


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 10))
def test_the_bias_is_an_accuracy_that_noise_lowers(d, n, sigma):
    bias = adaptive_bias(d, n, sigma)
    assert 0.5 <= bias <= 1.0
    assert bias <= adaptive_bias(d, n) + 1e-12


# the ledger


def test_the_budget_survives_a_restart_and_another_name(tmp_path):
    path = tmp_path / "ledger.jsonl"
    x, y, hx, hy = samples()
    first = Thresholdout(x, y, hx, hy, threshold=0.0, sigma=0.0, budget=3, ledger=path, seed=1)
    first.ask((np.zeros(100), np.ones(100)), name="a")
    first.ask((np.zeros(100), np.zeros(100)), name="b")
    second = Thresholdout(x * 2, y, hx.copy(), hy.copy(), threshold=0.0, sigma=0.0, budget=3, ledger=path, seed=2)
    assert second.remaining == 2
    assert "2 of the budget" in second.note
    assert second.ask((np.zeros(100), np.zeros(100))).index == 2
    assert list(first.log["name"]) == ["a", "b"]
    other = Thresholdout(x, y, hx + 1, hy, threshold=0.0, sigma=0.0, budget=3, ledger=path)
    assert other.remaining == 3


def test_the_same_noise_again_is_a_warning(tmp_path):
    path = tmp_path / "ledger.jsonl"
    make(ledger=path, seed=4)
    with pytest.warns(RepeatedSeedWarning, match="seed 4"):
        make(ledger=path, seed=4)


def test_a_damaged_line_counts_against_the_budget(tmp_path):
    path = tmp_path / "ledger.jsonl"
    make(ledger=path, threshold=0.0, sigma=0.0, budget=5, seed=0).ask((np.zeros(100), np.ones(100)))
    with path.open("a") as file:
        file.write('{"fingerprint": "cut o')
    again = make(ledger=path, threshold=0.0, sigma=0.0, budget=5, seed=1)
    assert again.remaining == 3
    assert Ledger(path, "x").damaged == 1


def test_a_ledger_that_cannot_be_read_at_all_counts_too(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("{not\nJSON\n")
    again = make(ledger=path, budget=5)
    assert again.remaining == 3
    assert "2 lines of the ledger cannot be read" in again.note
    with pytest.raises(DiskError, match="cannot read"):
        make(ledger=tmp_path)


def test_kill_9_loses_no_answer_that_was_given(tmp_path):
    path, given = tmp_path / "ledger.jsonl", tmp_path / "given"
    script = f"""
import numpy as np
from theodolite.data.reusable_holdout import Thresholdout
x = np.arange(200.0)[:, None]
h = Thresholdout(x[:100], x[:100, 0], x[100:], x[100:, 0], threshold=0.0, sigma=0.0, budget=100000, ledger={str(path)!r})
with open({str(given)!r}, "w") as out:
    while True:
        print(h.ask((np.zeros(100), np.ones(100))).index, file=out, flush=True)
"""
    run = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not given.exists() or given.stat().st_size < 50:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    answered = len([line for line in given.read_text().splitlines() if line.strip()])
    x = np.arange(200.0)[:, None]
    again = Thresholdout(
        x[:100], x[:100, 0], x[100:], x[100:, 0], threshold=0.0, sigma=0.0, budget=100000, ledger=path, seed=9
    )
    assert again.remaining <= 100000 - answered
    assert again.remaining >= 100000 - answered - 2


def test_the_context_manager_keeps_the_account_of_all_inside(tmp_path):
    with holdout_ledger(tmp_path / "l.jsonl"):
        make().ask((np.zeros(100), np.zeros(100)))
    make().ask((np.zeros(100), np.zeros(100)))
    _, _, hx, hy = samples()
    assert len(Ledger(tmp_path / "l.jsonl", fingerprint(hx, hy)).records) == 1


def test_an_audit_counts_looks_and_bounds_their_bias(tmp_path):
    path = tmp_path / "ledger.jsonl"
    holdout = make(ledger=path, threshold=0.0, sigma=0.0, budget=10)
    for i in range(7):
        holdout.ask((np.zeros(100), np.full(100, float(i % 2))))
    report = audit(path)
    assert (report.looks, report.hits, report.rows) == (7, 3, 100)
    assert report.careless_accuracy == adaptive_bias(7, 100)
    assert audit(holdout.log) == report
    assert audit(path.rename(tmp_path / "account.json")) == report  # a ledger by any other name
    holdout.log.to_csv(tmp_path / "log.csv")
    assert audit(tmp_path / "log.csv") == report
    pd.DataFrame({"score": [0.1, 0.2]}).to_csv(tmp_path / "plain.csv")
    assert audit(tmp_path / "plain.csv", rows=50).looks == 2
    with pytest.raises(DataError, match="rows"):
        audit(tmp_path / "plain.csv")
    with pytest.raises(DataError, match="no log"):
        audit(tmp_path / "nowhere.csv")


def test_an_unwritable_ledger_gives_no_answer(tmp_path):
    with pytest.raises(DiskError, match="no answer"):
        make(ledger=tmp_path / "missing" / "ledger.jsonl")


# the scikit-learn bridge


def test_a_scorer_asks_the_holdout():
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    fit, select, hold = slice(0, 200), slice(200, 380), slice(380, None)
    holdout = Thresholdout(x[select], y[select], x[hold], y[hold], preset="science")
    model = LogisticRegression(max_iter=500).fit(x[fit], y[fit])
    for metric in ("accuracy", "brier", "clipped_log_loss"):
        score = reusable_scorer(metric, holdout)(model, None, None)
        assert 0.8 < score <= 1.0
    assert list(holdout.log["name"]) == ["accuracy", "brier", "clipped_log_loss"]
    expected = (model.predict(x[select]) == y[select]).mean()
    assert holdout.log["value"][0] == pytest.approx(expected)


def test_queries_and_scorers_get_the_data_frames_that_were_given():
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"a": rng.normal(size=120), "kind": rng.choice(["x", "long kind"], 120)})
    y = pd.Series(np.where(frame["kind"] == "x", "yes", "nein"))
    columns = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    model = make_pipeline(columns, LogisticRegression()).fit(frame[:40], y[:40])
    holdout = Thresholdout(frame[40:80], y[40:80], frame[80:], y[80:], preset="science")
    assert reusable_scorer("accuracy", holdout)(model) == 1.0
    assert 0.9 < reusable_scorer("brier", holdout)(model) <= 1.0
    below = float((frame["a"][40:80] < 0).mean())
    assert holdout.ask(lambda x, y: x["a"] < 0).value == pytest.approx(below)
    splitting = SampleSplitting(frame, y, max_queries=4)
    assert splitting.ask(lambda x, y: (x["kind"] == "x") == (y == "yes")).value == 1.0


@pytest.mark.parametrize(
    ("train", "holdout"),
    [
        (np.linspace(0, 1, 30).reshape(10, 3), np.linspace(0, 1, 30, dtype=np.float32).reshape(10, 3)[::-1]),
        (np.arange(30).reshape(10, 3), np.arange(30.0).reshape(10, 3)),
        (pd.DataFrame({"a": ["x", "y"]}), pd.DataFrame({"a": ["a long one", "x"]})),
    ],
)
def test_the_same_rows_in_another_type_are_a_leak(train, holdout):
    y = np.zeros(len(train))
    with pytest.raises(HoldoutLeakError, match="are in the training set too"):
        Thresholdout(train, y, holdout, y)
    moved = holdout + 0.7 if isinstance(holdout, np.ndarray) else holdout + "!"
    assert Thresholdout(train, y, moved, y).remaining == 1


def test_what_is_no_mean_is_refused_without_its_sensitivity():
    holdout = make(preset="science")
    with pytest.raises(NotAStatisticalQuery, match="mean over rows"):
        reusable_scorer("roc_auc", holdout)
    with pytest.raises(NotAStatisticalQuery, match="one number"):
        reusable_scorer(lambda e, x, y: 0.5, holdout)(None)
    assert reusable_scorer(lambda e, x, y: float(y.max()), holdout, sensitivity=0.01)(None) == pytest.approx(
        1.0, abs=0.5
    )
    with pytest.raises(InputError, match="one of"):
        reusable_scorer("accurracy", holdout)


# errors


def test_nothing_of_the_holdout_can_be_seen():
    holdout = make(preset="science")
    assert "array" not in repr(holdout)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(holdout)
    assert set(holdout.log.columns) == {
        "index",
        "name",
        "value",
        "source",
        "error_bound",
        "budget_left",
        "time",
        "rows",
    }


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: make().ask((np.full(100, 1.5), np.zeros(100))), QueryRangeError, "maximum of 1.5"),
    (lambda: make().ask((np.zeros(100), np.full(100, np.nan))), QueryRangeError, "minimum of nan"),
    (lambda: make().ask((np.zeros(99), np.zeros(100))), QueryRangeError, "100 rows"),
    (lambda: make().ask_many(np.zeros((2, 99)), np.zeros((2, 100))), InputError, "shape"),
    (lambda: make(budget=0).ask((np.zeros(100), np.zeros(100))), BudgetExhausted, "no answer"),
    (lambda: make(preset="theory", tolerance=0.05), InputError, "smallest tolerance"),
    (lambda: make(preset="magic"), InputError, "preset"),
    (lambda: make(threshold=-1.0), InputError, "negative"),
    (lambda: make(budget=-1), InputError, "negative"),
    (lambda: make(confidence=1.0), InputError, "in \\(0, 1\\)"),
    (lambda: Thresholdout(np.ones((3, 1)), np.ones(3), np.ones((3, 1)), np.ones(3)), HoldoutLeakError, "3 of 3"),
    (lambda: Thresholdout(np.ones((0, 1)), np.ones(0), np.ones((3, 1)), np.ones(3)), DataError, "training"),
    (lambda: Thresholdout(np.full((3, 1), np.nan), np.ones(3), np.ones((3, 1)), np.ones(3)), DataError, "NaN"),
    (lambda: Thresholdout(*samples()[:2], np.ones((9, 2)), np.ones(9)), DataError, r"\(3,\) and \(2,\)"),
    (lambda: make(max_queries=0), InputError, "max_queries"),
    (lambda: make(preset="science", confidence=1.5), InputError, "in \\(0, 1\\)"),
    (lambda: adaptive_bias(10, 10, float("nan")), InputError, "sigma"),
    (lambda: SparseValidate(*samples()[:2], tolerance=0.1, budget=1).ask(np.zeros(100), claim=math.nan), InputError, "claim"),
    (lambda: SparseValidate(*samples()[:2], tolerance=0.1, budget=1, sigma=-1.0), InputError, "sigma"),
    (lambda: Empirical(np.array([["a", None]], dtype=object), ["x"]), DataError, "NaN"),
    (lambda: Empirical(sparse.eye(3).tocsr(), np.ones(3)), DataError, "toarray"),
    (lambda: Empirical([], []), DataError, "at least one"),
    (lambda: SampleSplitting(*samples()[:2], max_queries=101), InputError, r"1\.\.100"),
    (lambda: GaussianNoise(*samples()[:2], sigma=-1.0), InputError, "sigma"),
    (lambda: PrivateMultiplicativeWeights(1, np.zeros(3, int)), DataError, "2 points"),
    (lambda: PrivateMultiplicativeWeights(4, np.array([5])), DataError, r"0\.\.3"),
    (lambda: PrivateMultiplicativeWeights(4, np.array([1])).ask(np.zeros(3)), QueryRangeError, "4 points"),
    (lambda: SparseValidate(*samples()[:2], tolerance=2.0, budget=1), InputError, "tolerance"),
    (lambda: Ladder(*samples()[:2], step=0.0), InputError, "step"),
    (lambda: freedman_attack(10, 5, [6]), InputError, "k <= d"),
    (lambda: freedman_attack(10, 5, [1], signal=True), InputError, "20"),
    (lambda: freedman_attack(10, 5, [1], mechanism="x"), InputError, "mechanism"),
    (lambda: adaptive_bias(-1, 10), InputError, "d >= 0"),
    (lambda: required_sample_size(10, 0.1, mechanism="pmw"), InputError, "universe"),
    (lambda: required_sample_size(10, 2.0), InputError, "tolerance"),
])  # fmt: skip
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()
