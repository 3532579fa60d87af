"""The chart of validated inference: the posterior of a classifier's temperature and lapse rate, from its held-out rows."""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.subject import Subject
from theodolite.predictions.inference import Particles, recalibration, rmsmc
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_PARTICLES, _MOVES, _RUNS = 60, 2, 3
_SMALLEST = 1e-12


def _log_probabilities(subject: Subject, part: str, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (n, classes), floored, and labels (n,) of a part of the data."""
    rows = subject.data.parts[part]
    p = subject.view("probability", memory=memory)(rows.x).double().numpy()
    if p.shape[1] == 1:
        p = np.concatenate([1 - p, p], axis=1)
    p = p.clip(min=_SMALLEST)
    return np.log(p / p.sum(axis=1, keepdims=True)), rows.y.numpy()


def _recalibrated(logp: np.ndarray, temperature: float, lapse: float) -> np.ndarray:
    scaled = logp / temperature
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return (1 - lapse) * p / p.sum(axis=1, keepdims=True) + lapse / logp.shape[1]


def _of_labels(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log(p[np.arange(len(y)), y])


def _best_temperature(logp: np.ndarray, y: np.ndarray) -> float:
    """By maximum likelihood, without lapses."""

    def loss(log_temperature: float) -> float:
        return -float(_of_labels(_recalibrated(logp, float(np.exp(log_temperature)), 0.0) + 1e-300, y).sum())

    found: Any = minimize_scalar(loss, bounds=(-3, 4), method="bounded")
    return float(np.exp(found.x))


def _interval(theta: np.ndarray, weights: np.ndarray, unit: str) -> Estimate:
    """Posterior mean and the weighted 2.5 and 97.5 % points."""
    order = np.argsort(theta)
    ends = theta[order][np.searchsorted(np.cumsum(weights[order]), [0.025, 0.975]).clip(max=len(theta) - 1)]
    mean = float(weights @ theta)
    return Estimate(mean, min(mean, float(ends[0])), max(mean, float(ends[1])), unit)


@chart("validated-inference", needs=Needs(task="classification"), cost=seconds(6))
def recalibrate(subject: Subject, budget: Budget) -> Finding:
    """How over-confident a classifier is, with its uncertainty, and what recalibrating it gains on rows it never saw."""
    logp, y = _log_probabilities(subject, "validation", budget.memory)
    model = recalibration(logp, y)
    seeds = [np.random.default_rng(child) for child in np.random.SeedSequence(budget.seed).spawn(_RUNS)]
    runs: list[Particles] = [rmsmc(model, particles=_PARTICLES, moves=_MOVES, rng=rng) for rng in seeds]
    theta = np.concatenate([np.array(run.values) for run in runs])
    weights = np.concatenate([run.weights for run in runs]) / _RUNS
    temperature, lapse = _interval(theta[:, 0], weights, ""), _interval(theta[:, 1], weights, "")
    advantages = np.array([run.log_evidence for run in runs]) - float(_of_labels(np.exp(logp), y).sum())
    advantage = Estimate(float(advantages.mean()), float(advantages.min()), float(advantages.max()), "nats", _RUNS)

    test_logp, test_y = _log_probabilities(subject, "test", budget.memory)
    before = _of_labels(np.exp(test_logp), test_y)
    mixed = sum(w * _recalibrated(test_logp, *one) for w, one in zip(weights.tolist(), theta.tolist()))
    gains = _of_labels(np.asarray(mixed), test_y) - before
    best = _best_temperature(logp, y)
    scaled = _of_labels(_recalibrated(test_logp, best, 0.0) + 1e-300, test_y) - before
    gain = bootstrap(gains, seed=budget.seed, unit="nats a row")
    reference = bootstrap(scaled, seed=budget.seed, unit="nats a row")
    comparison = Comparison(
        "log-likelihood of test rows gained by averaging over the posterior", gain,
        (
            Control("the probabilities as they are", Estimate.exact(0.0, "nats a row"), "null"),
            Control(f"one temperature by maximum likelihood ({best:.2f})", reference, "reference"),
        ),
    )  # fmt: skip
    if temperature.low > 1:
        verdict = "the model is over-confident"
    elif temperature.high < 1:
        verdict = "the model is under-confident"
    else:
        verdict = "neither over- nor under-confidence can be told"
    side = "beats" if advantage.value > 0 else "falls short of"
    figure = blank("temperature", "lapse rate")
    size = 4 + 10 * np.sqrt(weights / weights.max())
    figure.add_scatter(
        x=theta[:, 0].tolist(), y=theta[:, 1].tolist(), mode="markers", name="posterior",
        marker={"size": size.tolist(), "color": INKS[0], "opacity": 0.5},
    )  # fmt: skip
    figure.add_scatter(
        x=[best], y=[0.0], mode="markers", name="maximum likelihood",
        marker={"size": 10, "color": INKS[1], "symbol": "x"},
    )  # fmt: skip
    figure.add_vline(x=1.0, line_dash="dot", line_width=1, line_color=INKS[6])
    return Finding(
        slug="validated-inference",
        headline=f"Posterior temperature {temperature.value:.2f} [{temperature.low:.2f}, {temperature.high:.2f}]: {verdict}; the "
        f"log evidence {side} the probabilities as they are by {abs(advantage.value):.1f} nats.",
        numbers={
            "temperature": temperature,
            "lapse rate": lapse,
            "log evidence over the probabilities as they are": advantage,
            "log-likelihood of a test row as it is": bootstrap(before, seed=budget.seed, unit="nats"),
            "log-likelihood gained a test row": gain,
        },
        comparison=comparison,
        figure=figure,
        reading="Each dot is a temperature and a lapse rate that agree with the validation rows, larger where likelier. Right of "
        "the dotted line the model is surer than it should be, left of it less sure. The lapse rate is the share of rows that a "
        "model would have to answer at random.",
        advice=_advice(temperature, gain),
        seed=budget.seed,
        caveats=(
            "The posterior comes from the validation rows, the gain is of the test rows. Probabilities are floored at 1e-12.",
            f"{_RUNS} runs of resample-move SMC, {_PARTICLES} particles; the interval of the evidence is the runs' "
            "spread. Priors: temperature gamma(2, 1), lapse rate beta(1, 20).",
        ),
    )  # fmt: skip


def _advice(temperature: Estimate, gain: Estimate) -> str:
    if temperature.low <= 1 <= temperature.high:
        return "Leave the probabilities as they are, or give more validation rows to tell a smaller error of them."
    if gain.low <= 0:
        return "The temperature is off on the validation rows, but correcting it does not pay on the test rows: look for a shift."
    return f"Divide the logits by {temperature.value:.2f} before the softmax where probabilities are used as such."
