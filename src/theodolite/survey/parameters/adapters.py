"""The chart of parameter-efficient tuning: what a language model gains on its texts from few trained numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Rows, Subject
from theodolite.parameters.finetuning_dimension import FineTuningSubspace
from theodolite.parameters.peft import apply, find_blocks, pareto_front, quality_against_parameters
from theodolite.parameters.peft.comparison import train_steps
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, blank, level_line
from theodolite.survey.finding import Finding

_METHODS = {
    "lora": "LoRA",
    "houlsby": "adapters (Houlsby)",
    "prefix": "prefixes",
    "mam": "mix-and-match adapter (MAM)",
    "bitfit": "all biases",
}
_RATES = {
    "lora": (1e-3, 5e-3),
    "houlsby": (1e-3, 5e-3),
    "prefix": (1e-2, 1e-1),
    "mam": (1e-3, 1e-2),
    "bitfit": (1e-3, 1e-2),
    "random": (1e-3, 1e-2),
}
_SHARES = (0.001, 0.005)
_SCALES = (1, 10, 100)  # of the shares: a small model holds too few numbers for the smallest bottleneck
_BATCH, _LENGTH = 2, 64
_CHECKED, _TESTED = 8, 12  # rows of the validation and test parts
_STEPS = (8, 60)
_SPEED = 1e11  # operations a second of two cores, that the number of steps is planned with on every machine


@dataclass(frozen=True)
class _Plan:
    """Methods by size (None: they have but one), and steps of one training; the same on every machine."""

    sizes: dict[str, tuple[float | None, ...]]
    steps: int
    parameters: int

    @property
    def seconds(self) -> float:
        """Forecast: a training passes forth and back through frozen weights, a look at rows only forth."""
        rows = 2 * self.steps * _BATCH * self.trainings + (self.trainings + 1) * (_CHECKED + _TESTED)
        return 2 * self.parameters * _LENGTH * rows / _SPEED

    @property
    def trainings(self) -> int:
        return _trainings(self.sizes)


def _trainings(sizes: dict[str, tuple[float | None, ...]]) -> int:
    searched = {name: len(_RATES[name]) for name in (*sizes, "random")}
    return sum(searched.values()) + sum(len(of) - 1 for of in sizes.values())


def _plan(model: nn.Module, seconds: float) -> _Plan:
    """What fits the model and the time. Raises ModelError where no method does."""
    find_blocks(model)
    total = sum(p.numel() for p in model.parameters())
    for scale in _SCALES:
        sizes = {name: _sizes(model, name, scale) for name in _METHODS}
        sizes = {name: found for name, found in sizes.items() if found}
        if len(sizes.get("lora", ())) == len(_SHARES) or ("lora" in sizes and scale == _SCALES[-1]):
            work = 4 * total * _BATCH * _LENGTH * _trainings(sizes)
            return _Plan(sizes, int(np.clip(seconds * _SPEED / work, *_STEPS)), total)
    raise ModelError(f"{type(model).__name__} is so small that no change of it is small beside it")


def _sizes(model: nn.Module, method: str, scale: int) -> tuple[float | None, ...]:
    found = []
    for share in (None,) if method == "bitfit" else _SHARES:
        try:
            apply(
                model, method, budget=None if share is None else scale * share, probe=False, train_head=False
            ).remove()
        except InputError:  # no biases, no smaller bottleneck, another attention function: what the others do not need
            continue
        found.append(None if share is None else scale * share)
    return tuple(found)


def _no_place(subject: Subject) -> str | None:
    try:
        _plan(subject.predictor, 1.0)
    except ModelError as error:
        return f"needs a transformer whose blocks are known: {str(error)[:160]}"
    return None


@dataclass(frozen=True)
class _Point:
    """A trained model: numbers that it keeps, what each validation and test row gains in nats a token, and its step size."""

    parameters: int
    checked: float
    gains: np.ndarray
    rate: float


class _Tuner:
    """Trains changes of the subject's model for a few steps and looks at what its rows gain."""

    def __init__(self, subject: Subject, plan: _Plan, budget: Budget) -> None:
        self.model, self.plan, self.budget = subject.predictor, plan, budget
        data = subject.data
        self.train = data.train.x[:, :_LENGTH]
        self.checked, self.tested = data.validation.head(_CHECKED), data.test.head(_TESTED)
        self.before = [self._losses(self.model, rows) for rows in (self.checked, self.tested)]

    def _losses(self, model: nn.Module, rows: Rows) -> np.ndarray:
        found = next_tokens(model, rows.x[:, :_LENGTH], memory=self.budget.memory)
        return found.loss.double().mean(dim=1).numpy()

    def _fit(self, model: nn.Module, rate: float) -> None:
        def loss(step: int) -> Tensor:
            ids = self.train[torch.arange(step * _BATCH, (step + 1) * _BATCH) % len(self.train)]
            scores = main_tensor(model(ids))[:, :-1]
            return F.cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten())

        train_steps(model, loss, self.plan.steps, learning_rate=rate, warmup=0.2)

    def _point(self, model: nn.Module, parameters: int, rate: float) -> _Point:
        self._fit(model, rate)
        gains = [old - self._losses(model, rows) for old, rows in zip(self.before, (self.checked, self.tested))]
        return _Point(parameters, float(gains[0].mean()), gains[1], rate)

    def changed(self, method: str, size: float | None, rate: float) -> _Point:
        """The model with a method's changes of a size, trained and then taken out again."""
        made = apply(self.model, method, budget=size, seed=self.budget.seed, probe=False, train_head=False)
        try:
            return self._point(made, made.parameter_count.method, rate)
        finally:
            made.remove()

    def in_a_random_subspace(self, dimension: int, rate: float) -> _Point:
        """The weights that LoRA changes, moved in random directions: as many numbers, without a method's structure."""
        weights = {
            id(block.slots[name].module.weight)
            for block in find_blocks(self.model)
            for name in ("query", "value")
        }  # fmt: skip
        names = [name for name, p in self.model.named_parameters() if id(p) in weights]
        whole = sum(p.numel() for p in self.model.parameters() if id(p) in weights)
        made = FineTuningSubspace(
            self.model,
            min(dimension, whole),
            method="did",
            include=names,
            exclude=None,
            head=None,
            seed=self.budget.seed,
        )
        return self._point(made, made.dimension, rate)

    def best(self, name: str, make: Callable[[float], _Point]) -> _Point:
        """The point of the step size that the validation rows gain most from."""
        return max((make(rate) for rate in _RATES[name]), key=lambda point: point.checked)

    def curve(self, method: str) -> list[_Point]:
        """One point a size; the step size is chosen at the first."""
        first, *others = self.plan.sizes[method]
        points = [self.best(method, lambda rate: self.changed(method, first, rate))]
        return points + [self.changed(method, size, points[0].rate) for size in others]

    def over_texts(self, values: np.ndarray) -> Estimate:
        """Mean over the test rows with an interval by texts, or by rows where there is but one text."""
        texts = self.tested.y.numpy()
        groups = texts if len(np.unique(texts)) > 1 else None
        return bootstrap(values, groups=groups, seed=self.budget.seed, unit="nats a token")

    def gain(self, point: _Point) -> Estimate:
        """What the test rows gain."""
        return self.over_texts(point.gains)


def _cost(subject: Subject) -> float:
    return _plan(subject.predictor, Budget().seconds).seconds


@chart("unified-peft", needs=Needs(language_model=True, rows=_CHECKED, test=_no_place), cost=_cost)
def adapters(subject: Subject, budget: Budget) -> Finding:
    """What next tokens gain from a few steps of LoRA, adapters, prefixes, MAM and biases, against the numbers trained."""
    plan = _plan(subject.predictor, budget.seconds)
    tuner = _Tuner(subject, plan, budget)
    curves = {method: tuner.curve(method) for method in plan.sizes}
    method, best = max(
        ((name, point) for name, points in curves.items() for point in points), key=lambda pair: pair[1].checked
    )
    random = tuner.best("random", lambda rate: tuner.in_a_random_subspace(best.parameters, rate))
    base = tuner.over_texts(tuner.before[1])
    gain, share = tuner.gain(best), best.parameters / plan.parameters
    comparison = Comparison(
        f"what a next token gains from {_METHODS[method]} with {best.parameters:,} numbers",
        gain,
        (
            Control("no tuning", Estimate.exact(0.0, "nats a token"), "null"),
            Control("as many random directions of the weights that LoRA changes", tuner.gain(random), "random"),
        ),
    )
    table = pd.DataFrame(
        [{"method": _METHODS[name], "parameters": point.parameters, "runs": (float(point.gains.mean()),)}
         for name, points in curves.items() for point in points]
    )  # fmt: skip
    reached = float(max(row[0] for row in table["runs"]))
    front = pareto_front(
        quality_against_parameters(table, chance=0.0, reference=reached, metric="gain", total=plan.parameters)
    )
    front = [name for name, _, value in front if value > 0]
    numbers = {"loss of the model as it is": base} | {
        f"gain from {_METHODS[name]}, {point.parameters:,} numbers": tuner.gain(point)
        for name, points in curves.items()
        for point in points
    }
    figure = blank("numbers trained", "loss of the next token on test rows, nats", log_x=True)
    for name, points in curves.items():
        found = [tuner.gain(point) for point in points]
        band_line(
            figure, [point.parameters for point in points], [base.value - one.value for one in found],
            name=_METHODS[name], ink=INKS[list(_METHODS).index(name)],
            low=[base.value - one.high for one in found], high=[base.value - one.low for one in found],
        )  # fmt: skip
    band_line(
        figure, [random.parameters], [base.value - float(random.gains.mean())], name="random directions", ink=INKS[6],
        dash="dot",
    )  # fmt: skip
    level_line(figure, base.value, "as it is")
    after = base.value - gain.value
    told = (
        f"{plan.steps} steps on {best.parameters:,} numbers ({share:.2%} of the model) take the loss of the next token from "
        f"{base.value:.3f} to {after:.3f} nats (perplexity {np.exp(base.value):.1f} to {np.exp(after):.1f})"
    )
    headline = (
        f"{told}: {_METHODS[method]} does best of {len(curves)} methods on validation rows."
        if gain.value > 0
        else f"None of {len(curves)} methods helps in {plan.steps} steps: the best on validation rows, {_METHODS[method]}, "
        f"changes the loss of the next token from {base.value:.3f} to {after:.3f} nats."
    )
    left_out = [words for name, words in _METHODS.items() if name not in curves]
    return Finding(
        slug="unified-peft",
        headline=headline,
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="The model's weights are frozen, and a few trained numbers change its hidden states; the lower the line, the "
        "better the texts are predicted, and the further left, the less is kept for each task. Each method has the better of "
        "two step sizes, found on validation rows; bands are 95 % over texts. Not beaten by a point with as few numbers: "
        f"{', '.join(dict.fromkeys(front)) or 'none'}.",
        advice=f"theodolite run unified-peft --task language --model MODEL --data TEXTS --method {method} --out FOLDER trains "
        "such changes for longer and saves them; in Python theodolite.parameters.peft.apply(model, "
        f'"{method}"{"" if method == "bitfit" else f", budget={share:.1g}"}).',
        seed=budget.seed,
        caveats=(
            f"{plan.steps} steps of {_BATCH} rows of at most {_LENGTH} tokens and one seed: this shows which method learns soon, "
            "not where each ends; prefixes in particular start away from the model and want more steps.",
            f"{len(tuner.tested)} test rows of {len(tuner.tested.y.unique())} texts.",
            *((f"Not possible in this model: {', '.join(left_out)}.",) if left_out else ()),
        ),
    )  # fmt: skip
