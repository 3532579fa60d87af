"""The chart of observables: the direction behind one preference of the model, from one pair of inputs."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from theodolite.activations.observables import (
    NAMES,
    OBJECT_TEMPLATES,
    SUBJECT_TEMPLATES,
    Component,
    FeatureVector,
    NamedPrompts,
    Observable,
    Readings,
    cosine,
    coupling,
    head_scores,
    measure_effect,
    named_prompts,
    projection_patch,
    propagate,
    read,
    read_all,
)
from theodolite.core.errors import DataError, TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, mean_of_runs, proportion
from theodolite.core.subject import Subject
from theodolite.core.transformer import decoder_parts, run_decoder
from theodolite.core.view import evaluation_mode
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_NAMES = 8  # of each group, of which the first are the pair
_RANDOM = 20
_PAIRS = 10
_WIDEST = 20_000
_TEXTS = 4
_TASKS = (("she − he", SUBJECT_TEMPLATES, " she", " he"), ("her − him", OBJECT_TEMPLATES, " her", " him"))


# ---- whether it applies


def _not_applicable(subject: Subject) -> str | None:
    if not subject.is_language_model:
        if len(_layers(subject)) >= 2:
            return None
        return "needs a network with at least two linear or convolutional layers; of one layer the weights are the directions"
    try:
        decoder_parts(subject.predictor)
        for _, templates, positive, negative in _TASKS:
            Observable.from_tokens([positive], [negative], subject.tokenizer)
            named_prompts(templates, (NAMES["female"], NAMES["male"]), subject.tokenizer, per_group=_NAMES)
    except TheodoliteError as error:
        return f"needs a decoder whose tokens hold English names and pronouns: {str(error)[:200]}"
    return None


def _forecast(subject: Subject) -> float:
    """Seconds, from the time of one prompt or one batch."""
    x = subject.data.train.x
    with evaluation_mode(subject.predictor), torch.no_grad():
        if not subject.is_language_model:
            started = time.perf_counter()
            subject.predictor(x[:64])
            return 1 + 60 * _PAIRS * (time.perf_counter() - started)
        subject.predictor(x[:1, :12])
        started = time.perf_counter()
        subject.predictor(x[:1, :12])
    return 5 + (time.perf_counter() - started) * 2.5 * len(_TASKS) * 3 * 2 * _NAMES


@chart(
    "observable-propagation",
    needs=Needs(network=True, language_model=None, task="classification", test=_not_applicable),
    cost=_forecast,
)
def observable_propagation(subject: Subject, budget: Budget) -> Finding:
    """How well a direction from one pair of inputs predicts a preference of the model, beside equally cheap directions."""
    return _of_a_decoder(subject, budget) if subject.is_language_model else _of_a_classifier(subject, budget)


def _r2(rows: np.ndarray) -> float:
    return float(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1] ** 2) if np.ptp(rows, axis=0).all() else 0.0


def _random_r2(x: Tensor, observed: Tensor, seed: int) -> list[float]:
    directions = torch.randn(_RANDOM, x.shape[1], generator=torch.Generator().manual_seed(seed))
    seen = observed.cpu().numpy()
    return [_r2(np.stack([scores, seen], axis=1)) for scores in (x.cpu() @ directions.T).T.numpy()]


# ---- a decoder


@dataclass(frozen=True, eq=False)
class _Task:
    """A pronoun task: the strongest head that reads the name, and what other prompts hold where it reads."""

    name: str
    observable: Observable
    prompts: NamedPrompts
    kept: np.ndarray
    feature: FeatureVector
    stop: Component
    readings: Readings
    ends: Tensor

    @property
    def names(self) -> np.ndarray:
        return np.array(self.prompts.names)[self.kept]

    @property
    def labels(self) -> np.ndarray:
        return self.prompts.labels[self.kept]

    @property
    def titles(self) -> list[str]:
        """What to call each held-out prompt."""
        return [f"{self.prompts.names[i]}, template {self.prompts.templates[i] + 1}" for i in self.kept]

    def table(self, feature: FeatureVector) -> np.ndarray:
        """Score and observable of each held-out prompt."""
        return np.stack([feature.score(self.readings.x).cpu().numpy(), self.readings.observed.cpu().numpy()], axis=1)

    def r2(self, feature: FeatureVector, seed: int) -> Estimate:
        return bootstrap(self.table(feature), _r2, seed=seed, resamples=400, groups=self.names, unit="r2")


def _task(subject: Subject, name: str, templates: tuple[str, ...], positive: str, negative: str, memory: int) -> _Task:
    model, tokenizer = subject.predictor, subject.tokenizer
    observable = Observable.from_tokens([positive], [negative], tokenizer)
    prompts = named_prompts(templates, (NAMES["female"], NAMES["male"]), tokenizer, per_group=_NAMES)
    her, him = prompts.names[0], prompts.names[_NAMES]
    pair, token = prompts.pair(0, her, him), prompts.tokens[0]
    table = head_scores(model, observable, pair)[..., token]
    layer, head = divmod(int(table.argmax()), table.shape[1])
    feature = propagate(model, observable, (Component("attn", layer, head, token),), prompts=pair)
    own = {her, him}
    kept = np.array([i for i, one in enumerate(prompts.names) if one not in own])
    given = [*(prompts.prompts[i] for i in kept), *pair]
    where = [*(prompts.tokens[i] for i in kept), token, token]
    (readings,) = read_all(model, [feature], observable, given, tokens=where, memory=memory)
    held = Readings(readings.x[:-2], readings.observed[:-2])
    return _Task(name, observable, prompts, kept, feature, Component("attn", layer, head, token), held, readings.x[-2:])


def _of_a_decoder(subject: Subject, budget: Budget) -> Finding:
    tasks = [_task(subject, *task, budget.memory) for task in _TASKS]
    numbers, panels = dict[str, Estimate](), []
    for task in tasks:
        feature, stop = task.feature, task.stop
        place = f"attn{stop.layer}.{stop.head} at the name"
        numbers[f"{task.name}: r2 of {place}"] = task.r2(feature, budget.seed)
        seen = task.readings.observed.cpu().numpy()
        apart = np.stack([task.labels, seen], axis=1)
        numbers[f"{task.name}: area under the curve of the model's own answers, by the name"] = bootstrap(
            apart, _area, seed=budget.seed, resamples=400, groups=task.names, unit="AUC"
        )
        panels.append((task, place))
    task, place = panels[0]
    feature = task.feature
    difference = replace(feature, vector=task.ends[0] - task.ends[1])
    random = _random_r2(task.readings.x, task.readings.observed, budget.seed)
    comparison = Comparison(
        f"share of the variance of {task.name} that the direction of {place} predicts, from one pair of prompts",
        numbers[f"{task.name}: r2 of {place}"],
        (
            Control("random directions at the same place", mean_of_runs(random, unit="r2", within=(0, 1)), "random"),
            Control("the pair's difference of activations there", task.r2(difference, budget.seed), "closed-form"),
        ),
    )  # fmt: skip
    for name, share in _shares(subject, task, budget).items():
        numbers[f"{task.name}: share of the gap moved by a patch along {name}"] = share
    told, tokens = _on_texts(subject, tasks, budget)
    numbers |= told
    alike = numbers["cosine of the two tasks' directions at that head"].value
    areas = [numbers[f"{one.name}: area under the curve of the model's own answers, by the name"] for one in tasks]
    head = f"attn{task.stop.layer}.{task.stop.head}"
    headline = (
        f"One pair of prompts gives a direction at {head} that predicts {task.name} with r² {comparison.estimate.value:.2f} on "
        f"{len(task.kept)} other prompts (random directions {float(np.mean(random)):.2f}); {tasks[1].name} is read by that head "
        f"along a direction with cosine {alike:.2f}."
    )
    caveats = [
        f"The observables are built in ({', '.join(f'{one.name}' for one in tasks)}), on {3 * 2 * _NAMES} prompts each with "
        f"{_NAMES} English names a group; name your own with: theodolite run observable-propagation --positive ' is' --negative "
        "' are' --prompts FILE.",
        "Intervals are over names. The prompts of the pair's two names are left out of all scores.",
    ]
    if areas[0].low <= 0.6:
        caveats.append(
            f"The model itself hardly tells the names apart here (area under the curve {areas[0]}): there is little to predict."
        )
    tables = [(f"{one.name}, {where}", one.table(one.feature)) for one, where in panels]
    return Finding(
        slug="observable-propagation",
        headline=headline,
        numbers=numbers,
        comparison=comparison,
        figure=_scatter(tables, [one.titles for one in tasks]),
        reading="Each point is a prompt with another name: across, the product of the direction with the activation at the name; "
        "up, how much more the model wants the first pronoun than the second at the end of the prompt. The direction was made "
        "from the weights and one pair of prompts, whose names are not shown. On a line, the one head explains the preference.",
        advice=f"In your texts the direction is strongest at {', '.join(tokens)}. Steer or remove it with "
        "theodolite.activations.observables.steer and ablate, and look at what else changes before you use it to debias.",
        seed=budget.seed,
        caveats=tuple(caveats),
    )


def _area(rows: np.ndarray) -> float:
    """Share of pairs of one prompt of each group that the observable puts in order; one half where a group is missing."""
    ones, zeros = rows[rows[:, 0] == 1, 1], rows[rows[:, 0] == 0, 1]
    if len(ones) == 0 or len(zeros) == 0:
        return 0.5
    return float((ones[:, None] > zeros).mean() + 0.5 * (ones[:, None] == zeros).mean())


def _shares(subject: Subject, task: _Task, budget: Budget) -> dict[str, Estimate]:
    """How much of the gap between the two groups a patch along the feature moves, and along a random direction."""
    first = np.array(task.prompts.templates)[task.kept] == 0
    ones, zeros = np.flatnonzero(first & (task.labels == 1)), np.flatnonzero(first & (task.labels == 0))
    prompts = [task.prompts.prompts[task.kept[i]] for i in zeros]
    gap = (task.readings.observed[ones] - task.readings.observed[zeros]).cpu().numpy()
    theirs, feature = task.readings.x[ones], task.feature
    random = torch.randn(len(feature.vector), generator=torch.Generator().manual_seed(budget.seed))
    found = {}
    for name, vector in (("the direction", feature.vector), ("a random direction", random)):
        made = replace(feature, vector=vector)

        def edit(rows: slice, made: FeatureVector = made) -> Any:
            return projection_patch(subject.predictor, made, theirs[rows])

        change = measure_effect(subject.predictor, task.observable, prompts, edit, memory=budget.memory).change.cpu()
        rows = np.stack([change.numpy(), gap], axis=1)
        found[name] = bootstrap(rows, lambda r: float(r[:, 0].mean() / r[:, 1].mean()), seed=budget.seed, unit="share")
    return found


def _on_texts(subject: Subject, tasks: list[_Task], budget: Budget) -> tuple[dict[str, Estimate], list[str]]:
    """How the two tasks' features at the first one's head couple on the user's texts, and where the first is strongest."""
    first, second = tasks
    stop = first.stop
    pair = second.prompts.pair(0, second.prompts.names[0], second.prompts.names[_NAMES])
    other = propagate(
        subject.predictor, second.observable, (replace(stop, token=second.prompts.tokens[0]),), prompts=pair
    )
    rows = subject.data.test.x[:_TEXTS]
    parts = decoder_parts(subject.predictor)
    stream = run_decoder(parts, rows, before=[stop.layer], memory=budget.memory).before[stop.layer][:, 1:]
    ours, theirs = first.feature.score(stream).cpu().numpy(), other.score(stream).cpu().numpy()

    def slope(table: np.ndarray) -> float:
        return float(np.polyfit(table[:, 0].ravel(), table[:, 1].ravel(), 1)[0])

    numbers = {
        "cosine of the two tasks' directions at that head": Estimate.exact(cosine(first.feature, other), "cosine"),
        "slope of the second score by the first, from the weights (coupling)": Estimate.exact(
            coupling(first.feature, other)
        ),
        "slope of the second score by the first, on your texts": bootstrap(
            np.stack([ours, theirs], axis=1), slope, seed=budget.seed, resamples=200
        ),
    }
    order = np.argsort(-np.abs(ours).ravel())
    tokens = dict[str, None]()
    for place in order:
        row, at = np.unravel_index(place, ours.shape)
        sign = "+" if ours[row, at] > 0 else "−"
        tokens[f"{subject.tokenizer.decode([int(rows[row, at + 1])])!r} ({sign})"] = None
        if len(tokens) == 5:
            break
    return numbers, list(tokens)


def _scatter(panels: list[tuple[str, np.ndarray]], texts: list[list[str]] | None = None) -> go.Figure:
    figure = blank("score of the feature, y · x (standardised)", "observable")
    for i, (name, table) in enumerate(panels):
        score = (table[:, 0] - table[:, 0].mean()) / max(1e-12, float(table[:, 0].std()))
        figure.add_trace(
            go.Scatter(
                x=score.tolist(), y=table[:, 1].tolist(), mode="markers", name=f"{name} (r² {_r2(table):.2f})",
                marker={"color": INKS[i], "size": 6, "opacity": 0.7}, text=None if texts is None else texts[i],
            )
        )  # fmt: skip
    return figure


# ---- a classifier


def _layers(subject: Subject) -> list[str]:
    """Linear and convolutional layers that run once, in the order they run, and whose input is not too wide."""
    model, seen = subject.predictor, list[tuple[str, int]]()

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append((name, args[0][0].numel()))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                handle = module.register_forward_pre_hook(partial(note, name))
                stack.callback(handle.remove)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        model(subject.data.train.x[:2])
    order = [name for name, _ in seen]
    return [name for name, width in seen if width <= _WIDEST and order.count(name) == 1]


def _rows(subject: Subject, side: int) -> bool:
    """Whether a class has a row to make a feature from and three to score it on."""
    return bool((subject.data.train.y == side).any()) and int((subject.data.test.y == side).sum()) >= 3


def _confused(subject: Subject, budget: Budget) -> tuple[int, int, Observable]:
    """The two classes that validation rows are most often mistaken between, and their difference of scores."""
    data = subject.data
    scores = subject.view("raw", memory=budget.memory)(data.validation.x)
    if scores.shape[1] == 1:
        return 1, 0, Observable(torch.ones(1), f"{data.classes[1]} − {data.classes[0]}")
    k = scores.shape[1]
    p = scores.softmax(dim=1)
    mass = torch.zeros(k, k).index_add(0, data.validation.y, p.cpu())  # softer than counts, which may all be zero
    enough = torch.tensor([_rows(subject, c) for c in range(k)])
    mass = torch.where((enough[:, None] & enough).triu(1), mass + mass.T, -1.0)
    if float(mass.max()) < 0:
        raise DataError("no two classes have a training row and three test rows each, so no observable can be scored")
    i, j = divmod(int(mass.argmax()), k)
    observable = Observable.from_classes(i, j, k)
    return i, j, replace(observable, name=f"{data.classes[i]} − {data.classes[j]}")


def _of_a_classifier(subject: Subject, budget: Budget) -> Finding:
    model, data = subject.predictor, subject.data
    i, j, observable = _confused(subject, budget)
    rng = np.random.default_rng(budget.seed)
    of = {side: np.flatnonzero(data.train.y.numpy() == side) for side in (i, j)}
    pairs = [(int(rng.choice(of[i])), int(rng.choice(of[j]))) for _ in range(_PAIRS)]
    test = data.test.x[torch.isin(data.test.y, torch.tensor([i, j]))]
    layers = _layers(subject)[:-1][-3:]
    runs: dict[str, dict[str, list[float]]] = {}
    shown = np.empty((0, 2))
    crossed = 0
    for layer in layers:
        found = runs.setdefault(layer, {"feature": [], "difference": [], "random": []})
        for a, b in pairs:
            ends = torch.stack([data.train.x[a], data.train.x[b]])
            feature = propagate(model, observable, [layer], prompts=ends)
            x = read(model, feature, observable, torch.cat([ends, test]), memory=budget.memory)
            seen = x.observed[2:].cpu().numpy()
            for name, vector in (("feature", feature.vector), ("difference", x.x[0] - x.x[1])):
                rows = np.stack([(x.x[2:] @ vector).cpu().numpy(), seen], axis=1)
                found[name].append(_r2(rows))
                shown = rows if name == "feature" else shown
            crossed += feature.boundary_found
        found["random"] = _random_r2(x.x[2:], x.observed[2:], budget.seed)
    deepest = layers[-1]
    told = {name: mean_of_runs(values, unit="r2", within=(0, 1)) for name, values in runs[deepest].items()}
    comparison = Comparison(
        f"share of the variance of {observable} on test rows that one pair's direction before {deepest} predicts",
        told["feature"],
        (
            Control("random directions at the same place", told["random"], "random"),
            Control("the pair's difference of activations there", told["difference"], "closed-form"),
        ),
    )
    numbers = {
        f"before {layer}: r2 from one pair": mean_of_runs(found["feature"], unit="r2", within=(0, 1))
        for layer, found in runs.items()
    }
    numbers["pairs with the boundary between them"] = proportion(crossed, _PAIRS * len(layers), unit="of pairs")
    value = told["feature"].value
    return Finding(
        slug="observable-propagation",
        headline=f"One pair of rows gives a direction before {deepest} that predicts {observable} on {len(test)} test rows with "
        f"r² {value:.2f}; the pair's difference of activations reaches {told['difference'].value:.2f}, a random direction "
        f"{told['random'].value:.2f}.",
        numbers=numbers,
        comparison=comparison,
        figure=_scatter([(f"before {deepest}, last pair", shown)]),
        reading=f"Each point is a test row of {data.classes[i]} or {data.classes[j]}: across, the product of the direction with "
        "the activation, up, the difference of the two scores. The direction is the gradient of that difference where it is zero "
        "between two training rows. On a line, the layer tells these classes apart in one direction.",
        advice="Where the points bend or split, one direction is not enough: several kinds of rows use several. Take the "
        "direction with theodolite.activations.observables.propagate, and remove it with ablate to see what depends on it.",
        seed=budget.seed,
        caveats=(
            f"Intervals are over {_PAIRS} random pairs of training rows, on the same test rows. The classes are those that "
            "validation rows are most often mistaken between.",
        ),
    )  # fmt: skip
