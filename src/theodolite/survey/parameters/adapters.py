"""The chart of parameter-efficient tuning: what a language model gains or loses on its texts by the numbers trained or kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.masks import prune_units, remove_units
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Rows, Subject
from theodolite.parameters.finetuning_dimension import FineTuningSubspace
from theodolite.parameters.peft import apply, find_blocks
from theodolite.parameters.peft.comparison import train_steps
from theodolite.parameters.relevance_pruning import unit_scores
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import blank
from theodolite.survey.finding import Finding
from theodolite.survey.parameters.pareto import Point, draw, largest_update, not_beaten
from theodolite.survey.parameters.pruning_language import not_followed

_WORDS = {
    "lora": "low rank (LoRA)",
    "houlsby": "adapters (Houlsby)",
    "prefix": "prefixes",
    "mam": "mix-and-match adapter (MAM)",
    "bitfit": "all biases",
    "tucker": "Tucker cores",
    "sharing": "changes read from one shared array",
    "pruning": "MLP units kept by relevance",
}
_CONTROL = "sharing"  # each of its numbers moves the weights that LoRA changes in one random direction
_RATES = {  # the likelier one first: what loses on validation rows is not tested
    "lora": (5e-3, 1e-3),
    "houlsby": (5e-3, 1e-3),
    "prefix": (1e-2, 1e-1),
    "mam": (1e-2, 1e-3),
    "bitfit": (1e-2, 1e-3),
    "tucker": (1e-3, 5e-3),
    "sharing": (1e-2, 1e-3),
}
_SHARES = (0.001, 0.005)
_SCALES = (1, 10, 100)  # of the shares: a small model holds too few numbers for the smallest bottleneck
_PRUNED = (0.1, 0.2, 0.4)  # shares of the MLPs' units
_BATCH, _LENGTH = 2, 48
_CHECKED, _TESTED, _REFERENCES = 8, 12, 8  # rows of the validation, test and training parts
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
        trainings = _trainings(self.sizes)
        rows = 2 * self.steps * _BATCH * trainings + (trainings + 1) * (_CHECKED + _TESTED)
        rows += len(_PRUNED) * _TESTED + 3 * _REFERENCES
        return 2 * self.parameters * _LENGTH * rows / _SPEED


def _trainings(sizes: dict[str, tuple[float | None, ...]]) -> int:
    return sum(len(_RATES[name]) + len(of) - 1 for name, of in sizes.items())


def _plan(model: nn.Module, seconds: float) -> _Plan:
    """What fits the model and the time. Raises ModelError where no method does."""
    find_blocks(model)
    total = sum(p.numel() for p in model.parameters())
    for scale in _SCALES:
        sizes = {name: _sizes(model, name, scale) for name in _RATES}
        sizes = {name: found for name, found in sizes.items() if found}
        if len(sizes.get("lora", ())) == len(_SHARES) or ("lora" in sizes and scale == _SCALES[-1]):
            work = 4 * total * _BATCH * _LENGTH * _trainings(sizes)
            return _Plan(sizes, int(np.clip(seconds * _SPEED / work, *_STEPS)), total)
    raise ModelError(f"{type(model).__name__} is so small that no change of it is small beside it")


def _sizes(model: nn.Module, method: str, scale: int) -> tuple[float | None, ...]:
    sizes = (None,) if method == "bitfit" else tuple(scale * share for share in _SHARES)
    if method == "sharing":  # as many numbers as one likes
        return sizes
    found = []
    for size in sizes:
        try:
            with _changed(model, method, size, seed=0):
                found.append(size)
        except InputError:  # no biases, no smaller bottleneck, another attention function: what the others do not need
            continue
    return tuple(found)


@contextmanager
def _changed(model: nn.Module, method: str, size: float | None, *, seed: int) -> Iterator[tuple[nn.Module, int]]:
    """The model with a method's changes, and how many numbers those are: at most a share ``size`` of its own.

    At the end the model is as before. Tucker cores and the shared array are of the weights that LoRA changes: those of the
    queries and values. Raises InputError where the changes do not fit.
    """
    budget = 0 if size is None else int(size * sum(p.numel() for p in model.parameters()))
    slots = {
        id(slot): slot
        for block in find_blocks(model)
        for slot in (block.slots["query"].module, block.slots["value"].module)
    }
    names = [name for name, module in model.named_modules() if id(module) in slots]
    if method == "sharing":
        weights = [f"{name}.weight" for name in names]
        whole = sum(model.get_parameter(name).numel() for name in weights)
        shared = FineTuningSubspace(
            model, min(budget, whole), method="did", include=weights, exclude=None, head=None, seed=seed
        )
        yield shared, shared.dimension
    elif method == "tucker":
        update = largest_update(model, budget, include=names, types={type(slot) for slot in slots.values()}, seed=seed)
        if update is None:
            raise InputError(f"{budget:,} numbers are too few for a core of rank 1 in each of {len(names)} weights")
        try:
            yield model, sum(p.numel() for p in update.trainable_parameters())
        finally:
            update.remove()
    else:
        made = apply(model, method, budget=size, seed=seed, probe=False, train_head=False)
        try:
            yield made, made.parameter_count.method
        finally:
            made.remove()


def _no_place(subject: Subject) -> str | None:
    try:
        _plan(subject.predictor, 1.0)
    except ModelError as error:
        return f"needs a transformer whose blocks are known: {str(error)[:160]}"
    return None


@dataclass(frozen=True)
class _Measured:
    """A changed model: numbers that it trains or keeps, what each test row gains in nats a token, and for a trained one what
    the validation rows gain and its step size.
    """

    numbers: int
    gains: np.ndarray
    checked: float = -np.inf
    rate: float = 0.0


class _Tuner:
    """Changes the subject's model and looks at what its rows gain."""

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

    def trained(self, method: str, size: float | None, rate: float, *, beat: float = -np.inf) -> _Measured | None:
        """The model with a method's changes of a size, trained; None where validation rows do not gain more than ``beat``."""
        with _changed(self.model, method, size, seed=self.budget.seed) as (model, numbers):
            self._fit(model, rate)
            checked = float((self.before[0] - self._losses(model, self.checked)).mean())
            if checked <= beat:
                return None
            return _Measured(numbers, self.before[1] - self._losses(model, self.tested), checked, rate)

    def curve(self, method: str) -> list[_Measured]:
        """One point a size; the step size is the one that the validation rows gain most from at the first size."""
        first, *others = self.plan.sizes[method]
        best = None
        for rate in _RATES[method]:
            best = self.trained(method, first, rate, beat=best.checked if best else -np.inf) or best
        if best is None:
            raise ModelError(f"the loss is not finite after {self.plan.steps} steps of {_WORDS[method]}")
        more = [self.trained(method, size, best.rate) for size in others]
        return [best, *(point for point in more if point is not None)]

    def pruned(self) -> list[_Measured]:
        """The model without the units of its MLPs that relevance puts last, not trained again; one point a share."""
        references = self.train[:_REFERENCES]
        scores = unit_scores(
            self.model,
            (references, references),
            criterion="lrp",
            abs=True,
            seed=self.budget.seed,
            memory=self.budget.memory,
        )
        found = []
        for amount in _PRUNED:
            smaller = remove_units(self.model, prune_units(self.model, scores, amount=amount))
            kept = sum(p.numel() for p in smaller.parameters())
            found.append(_Measured(kept, self.before[1] - self._losses(smaller, self.tested)))
        return found

    def chance(self) -> float:
        """What the test rows gain where each token is guessed by its share of the training tokens, one more of each."""
        counts = torch.bincount(self.train.flatten(), minlength=self.model.get_input_embeddings().num_embeddings) + 1
        loss = -(counts / counts.sum()).double().log()[self.tested.x[:, 1:_LENGTH]].mean()
        return float(self.before[1].mean() - loss)

    def over_texts(self, values: np.ndarray) -> Estimate:
        """Mean over the test rows with an interval by texts, or by rows where there is but one text."""
        texts = self.tested.y.numpy()
        groups = texts if len(np.unique(texts)) > 1 else None
        return bootstrap(values, groups=groups, seed=self.budget.seed, unit="nats a token")


def _cost(subject: Subject) -> float:
    return _plan(subject.predictor, Budget().seconds).seconds


@chart("unified-peft", needs=Needs(language_model=True, rows=_CHECKED, test=_no_place), cost=_cost)
def adapters(subject: Subject, budget: Budget) -> Finding:
    """What next tokens gain from a few steps of LoRA, Tucker cores, adapters, prefixes, MAM, biases and a shared array, and
    lose with the units that pruning takes, against the numbers trained or kept.
    """
    plan = _plan(subject.predictor, budget.seconds)
    tuner = _Tuner(subject, plan, budget)
    curves = {method: tuner.curve(method) for method in plan.sizes}
    method, best = max(
        ((name, point) for name, points in curves.items() if name != _CONTROL for point in points),
        key=lambda pair: pair[1].checked,
    )
    random = min(curves[_CONTROL], key=lambda point: (point.numbers < best.numbers, abs(point.numbers - best.numbers)))
    unpruned = not_followed(subject)
    if unpruned is None:
        curves["pruning"] = tuner.pruned()
    base = tuner.over_texts(tuner.before[1])
    ways = {
        _WORDS[name]: [Point(point.numbers, tuner.over_texts(point.gains)) for point in points]
        for name, points in curves.items()
    }
    gain, share = tuner.over_texts(best.gains), best.numbers / plan.parameters
    comparison = Comparison(
        f"what a next token gains from {_WORDS[method]} with {best.numbers:,} numbers",
        gain,
        (
            Control("no tuning", Estimate.exact(0.0, "nats a token"), "null"),
            Control(
                f"{random.numbers:,} random directions of the weights that LoRA changes (one shared array)",
                tuner.over_texts(random.gains), "random",
            ),
        ),
    )  # fmt: skip
    numbers = {"loss of the model as it is": base} | {
        f"gain from {name}, {point.coordinates:,} numbers": point.quality
        for name, points in ways.items()
        for point in points
    }
    front = dict.fromkeys(name for name, _, _ in not_beaten(ways, nothing=0.0))
    figure = blank(
        "numbers trained beside the model, or kept of it", "nats a next token gains on test rows", log_x=True
    )
    draw(
        figure, ways, nothing=0.0, levels={"model as it is": 0.0, "chance": tuner.chance()}, control=[_WORDS[_CONTROL]]
    )
    figure.update_layout(legend={"y": 1.2}, height=560)
    after = base.value - gain.value
    told = (
        f"{plan.steps} steps on {best.numbers:,} numbers ({share:.2%} of the model) take the loss of the next token from "
        f"{base.value:.3f} to {after:.3f} nats (perplexity {np.exp(base.value):.1f} to {np.exp(after):.1f})"
    )
    tuned = len(plan.sizes) - 1
    headline = (
        f"{told}: {_WORDS[method]} does best of {tuned} methods on validation rows."
        if gain.value > 0
        else f"None of {tuned} methods helps in {plan.steps} steps: the best on validation rows, {_WORDS[method]}, "
        f"changes the loss of the next token from {base.value:.3f} to {after:.3f} nats."
    )
    left_out = [words for name, words in _WORDS.items() if name not in curves and name != "pruning"]
    return Finding(
        slug="unified-peft",
        headline=headline,
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="On the left the model's weights are frozen, and a few trained numbers change its weights or hidden states; the "
        "further left, the less is kept for each task. On the right the units of its MLPs that relevance puts last are removed, "
        "without training again; the further left, the less there is of the model. 0 is the model as it is, and chance guesses "
        "each token by its share of the texts. Each tuning has the better of two step sizes, found on validation rows; bands "
        "are 95 % over texts. The black line joins what no point with as few numbers reaches: "
        f"{', '.join(front) or 'none, since no way gains'}.",
        advice=_advice(method, share),
        seed=budget.seed,
        caveats=(
            f"{plan.steps} steps of {_BATCH} rows of at most {_LENGTH} tokens and one seed: this shows which method learns soon, "
            "not where each ends; prefixes in particular start away from the model and want more steps.",
            "A trained number comes on top of the model and a kept one is all that there is, so pruning saves memory and time "
            "where tuning saves what is stored for each task.",
            f"{len(tuner.tested)} test rows of {len(tuner.tested.y.unique())} texts.",
            *((f"Not possible in this model: {', '.join(left_out)}.",) if left_out else ()),
            *((f"Without pruning, which {unpruned}",) if unpruned is not None else ()),
        ),
    )


def _advice(method: str, share: float) -> str:
    if method == "tucker":
        return (
            "theodolite.parameters.tucker.adapt(model, ranks=...) puts such cores on a model; train its "
            "trainable_parameters() for longer, and merge() writes them into the weights."
        )
    budget = "" if method == "bitfit" else f", budget={share:.1g}"
    return (
        f"theodolite run unified-peft --task language --model MODEL --data TEXTS --method {method} --out FOLDER trains such "
        f'changes for longer and saves them; in Python theodolite.parameters.peft.apply(model, "{method}"{budget}).'
    )
