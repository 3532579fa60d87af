"""The chart of validated inference: the posterior of a classifier's temperature and lapse rate, from its held-out rows."""

import warnings
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.optimize import minimize_scalar

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.subject import Subject
from theodolite.predictions.inference import Chain, InferenceWarning, Particles, Program, mcmc, recalibration, rmsmc
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS
from theodolite.survey.finding import Finding

_PARTICLES, _MOVES, _RUNS = 60, 2, 3
_STEPS, _BURN_IN = 1200, 300
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
    chain, moved = _chain(model, budget.seed)
    trace = np.array([one[0] for one in chain.samples])
    agrees = temperature.low <= float(trace[_BURN_IN:].mean()) <= temperature.high
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
            "steps that the Markov chain accepted": moved,
        },
        comparison=comparison,
        figure=_figure(theta, weights, best, temperature, trace),
        reading="Left, each dot is a temperature and a lapse rate that agree with the validation rows, larger where "
        "likelier. To the right of the dotted line the model is surer than it should be, to the left less sure. The "
        "lapse rate is the share of rows that a model would have to answer at random. The right panel is a Markov chain "
        "over the same two numbers, step by step: once it has forgotten its start (pale) it should wander about the "
        "band, the 95 % interval of the dots' temperature.",
        advice=_advice(temperature, gain),
        seed=budget.seed,
        caveats=(
            "The posterior comes from the validation rows, the gain is of the test rows. Probabilities are floored at 1e-12.",
            f"{_RUNS} runs of resample-move SMC, {_PARTICLES} particles; the interval of the evidence is the runs' "
            "spread. Priors: temperature gamma(2, 1), lapse rate beta(1, 20).",
            f"The chain of {_STEPS:,} steps accepted {moved.value:.1%} of them; its mean temperature after {_BURN_IN} is "
            f"{trace[_BURN_IN:].mean():.2f}, {'inside' if agrees else 'outside'} the interval. It draws anew from the prior, so "
            "with many rows it seldom moves; the numbers above are the particles'.",
        ),
    )  # fmt: skip


def _chain(model: Program, seed: int) -> tuple[Chain, Estimate]:
    """A chain with its burn-in, and the share of its steps that were accepted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)  # of few accepted steps, which the finding tells
        chain = mcmc(model, steps=_STEPS, rng=np.random.default_rng([seed, _RUNS]))
    return chain, Estimate.exact(float(chain.accepted.mean()))


def _figure(theta: np.ndarray, weights: np.ndarray, best: float, temperature: Estimate, trace: np.ndarray) -> go.Figure:
    """The posterior, and the trace of a chain beside the interval of its temperature."""
    figure = make_subplots(rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.14)
    size = 4 + 10 * np.sqrt(weights / weights.max())
    figure.add_scatter(
        x=theta[:, 0].tolist(), y=theta[:, 1].tolist(), mode="markers", name="posterior",
        marker={"size": size.tolist(), "color": INKS[0], "opacity": 0.5}, row=1, col=1,
    )  # fmt: skip
    figure.add_scatter(
        x=[best], y=[0.0], mode="markers", name="maximum likelihood",
        marker={"size": 10, "color": INKS[1], "symbol": "x"}, row=1, col=1,
    )  # fmt: skip
    figure.add_vline(x=1.0, line_dash="dot", line_width=1, line_color=INKS[6], row=1, col=1)  # type: ignore[arg-type]
    steps = list(range(1, len(trace) + 1))
    for name, part, opacity in (("burn-in", slice(0, _BURN_IN), 0.35), ("chain", slice(_BURN_IN - 1, None), 1.0)):
        figure.add_scatter(
            x=steps[part], y=trace[part].round(4).tolist(), mode="lines", name=name, opacity=opacity,
            line={"color": INKS[2], "width": 1, "shape": "hv"}, showlegend=name == "chain", row=1, col=2,
        )  # fmt: skip
    figure.add_hrect(
        y0=temperature.low, y1=temperature.high, fillcolor=INKS[0], opacity=0.16, line_width=0, row=1, col=2,  # type: ignore[arg-type]
    )  # fmt: skip
    figure.update_xaxes(title_text="temperature", row=1, col=1)
    figure.update_yaxes(title_text="lapse rate", row=1, col=1)
    figure.update_xaxes(title_text="step", row=1, col=2)
    figure.update_yaxes(title_text="temperature", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.12})
    return figure


def _advice(temperature: Estimate, gain: Estimate) -> str:
    if temperature.low <= 1 <= temperature.high:
        return "Leave the probabilities as they are, or give more validation rows to tell a smaller error of them."
    if gain.high < 0:
        return "The temperature is off on the validation rows, but correcting it harms the test rows: look for a shift."
    if gain.low <= 0:
        return (
            f"The temperature is off on the validation rows, but {gain.n:,} test rows cannot tell whether correcting it pays: "
            "leave the probabilities as they are, or give more rows."
        )
    return f"Divide the logits by {temperature.value:.2f} before the softmax where probabilities are used as such."
