"""Claims of Xiao, Bamler, Schölkopf and Liu, 2025, arXiv:2406.04344, with SmolLM2-135M on sentences of film reviews.

What needs a strong language model runs where THEODOLITE_ENDPOINT and THEODOLITE_LANGUAGE_MODEL name one, and is told as not run
otherwise.
"""

__all__ = ["claims", "example"]

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.hyperparameters.verbalized import (
    NO_FORMULA,
    ONE_DECIMAL,
    Candidate,
    VerbalizedClassifier,
    VerbalizedRegressor,
    candidate_search,
    in_context,
)
from theodolite.language import ENDPOINT, MODEL, connect, named_model
from theodolite.language.local import LocalModel
from theodolite.language.model import AnswerCache, Scored
from theodolite.language.pretrained import model_folder
from theodolite.reproductions.claim import Claim, Comparator, Scale

_FILES = ("rt-polarity/rt-polarity.neg", "rt-polarity/rt-polarity.pos")
_CLASSES = ("negative", "positive")
_TASK = "Classify the input."
_PRIOR = "Movie reviews. Is the review positive or negative?"
_SECOND = "Movie reviews. Is the review good or bad?"
_CANDIDATES = (
    Candidate(_TASK, ("A", "B")),
    Candidate("Every input has one of two classes.", ("A", "B"), "Class"),
    Candidate(_PRIOR, _CLASSES, "Sentiment"),
    Candidate(_PRIOR, _CLASSES),
    Candidate(_SECOND, ("bad", "good")),
    Candidate("A critic writes about a film. Does the critic like the film?", ("no", "yes"), "Answer"),
    Candidate("Sentences about films, each in favour of the film or against it.", _CLASSES),
    Candidate("What a critic says about a film is sad or happy.", ("sad", "happy"), "Mood"),
)
_UNINFORMATIVE, _QUICK = _CANDIDATES[:2], (0, 3, 4)
_TOPICS = (
    ("prior knowledge enters through words", "shown on two circles, text and images (GPT-4o, Llama-3-70B)",
     "AUC >= .80 with the prior, <= .60 without"),
    ("prior knowledge enters through words: a second wording, good or bad", "none given", "AUC >= .68"),
    ("the training loop is the algorithm", "Algorithm 1",
     "exact counts of calls; at most 4 messages; theta_0 begins every prompt; batches in order"),
    ("it fits: a stand-in that computes, on the linear task", "MSE near the noise (Llama-3-70B)",
     "inside-range MSE <= .02 and within .005 of least squares on the last batch"),
    ("updates are interpretable", "by design",
     "every update has reasoning, both losses and its batch; each begins with the descriptions that the last one left"),
    ("selection works offline", "none given",
     "chosen test accuracy >= .68, >= worst + .10, >= median - .02; an uninformative description is never chosen"),
    ("deterministic and resumable", "none given", "identical history; a second fit makes 0 calls"),
    ("regression: linear", "MSE near the noise (Llama-3-70B)", "inside MSE <= .1"),
    ("regression: polynomial", "MSE near the noise (Llama-3-70B)", "inside MSE <= 2"),
    ("regression: sine", "MSE near the noise with the prior (GPT-4o)", "inside MSE <= .05"),
    ("regression: the prior 'periodic' helps outside the range of a sine", "lower MSE outside with it",
     "outside MSE lower with the prior than without"),
)  # fmt: skip
_COMMAND = f"{ENDPOINT}=http://HOST/v1 {MODEL}=NAME theodolite reproduce verbalized-learning --full"


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick takes fewer reviews, one draw, and three of the eight descriptions."""
    missing = _missing()
    if missing:
        local = [_claim(k, None, None, missing) for k in (0, 1, 2, 4, 5, 6)]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            local = list(_local(Path(scratch), scale, seed))
    stand_in = "not a result of a language model: checked by the tests against an HTTP server that computes its answers"
    yield from local[:3]
    yield _claim(3, None, None, stand_in)
    yield from local[3:]
    yield from _regressions(scale, seed)


def _claim(which: int, measured: Estimate | None, holds: bool | None, scaled: str, comparator: Any = None) -> Claim:
    claim, paper, bar = _TOPICS[which]
    return Claim(claim, paper, measured, bar, holds, comparator, scaled)


def _missing() -> str:
    if any(find_data(name) is None for name in _FILES):
        return f"needs {' and '.join(_FILES)} in the folder THEODOLITE_DATA"
    return "" if model_folder("smollm2") else "needs SmolLM2 (make models)"


class _Recorded(LocalModel):
    """SmolLM2 that notes what it is asked, whether it or its cache answers."""

    def __init__(self, cache: Path, loaded: Any = None) -> None:
        super().__init__("smollm2", cache=AnswerCache(cache))
        self._loaded = loaded
        self.prompts: list[str] = []
        self.conversations: list[Sequence[Any]] = []

    def score_many(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Scored]:
        self.prompts += prompts
        return super().score_many(prompts, continuations)

    def chat(self, messages: Sequence[Any], **options: Any) -> Any:
        self.conversations.append(messages)
        return super().chat(messages, **options)


@dataclass(frozen=True)
class _Reviews:
    texts: list[str]
    labels: np.ndarray

    def part(self, rows: slice) -> "_Reviews":
        return _Reviews(self.texts[rows], self.labels[rows])


def _reviews(count: int, longest: int, seed: int) -> _Reviews:
    """As many of each class, shorter than ``longest``, in random order with the classes in turns."""
    rng = np.random.default_rng(seed)
    drawn = []
    for name in _FILES:
        lines = Path(str(find_data(name))).read_text(encoding="latin-1").split("\n")
        short = sorted({line.strip() for line in lines if 0 < len(line.strip()) < longest})
        drawn.append([short[i] for i in rng.choice(len(short), count // 2, replace=False)])
    texts = [text for pair in zip(*drawn, strict=True) for text in pair]
    return _Reviews(texts, np.array(_CLASSES * (count // 2)))


def _local(scratch: Path, scale: Scale, seed: int) -> Iterator[Claim]:
    quick = scale is Scale.QUICK
    model = _Recorded(scratch / "answers.sqlite")
    reviews = _reviews(30 if quick else 140, 60 if quick else 110, seed)
    yield from _priors(model, reviews, quick, seed)
    few = reviews.part(slice(12))
    trained, loop = _loop(model, few)
    yield loop
    yield _interpretable(trained)
    yield _selection(model, reviews, quick, seed)
    yield _resumable(scratch, model, few, quick)


def _auc(model: LocalModel, reviews: _Reviews, prior: str, labels: tuple[str, ...], seed: int) -> Estimate:
    learner = VerbalizedClassifier(model, task=_TASK, prior=prior, labels=labels, mode="score", epochs=0)
    p = learner.fit(reviews.texts, reviews.labels).predict_proba(reviews.texts)
    # the probabilities of two labels, as log odds: near 0 and 1 they would tie
    odds = np.log(p[:, 1].clip(1e-300)) - np.log(p[:, 0].clip(1e-300))
    pairs = np.stack([reviews.labels == "positive", odds], axis=1)
    return bootstrap(pairs, _area, seed=seed, unit="AUC")


def _area(pairs: np.ndarray) -> float:
    return float(roc_auc_score(pairs[:, 0], pairs[:, 1])) if 0 < pairs[:, 0].sum() < len(pairs) else 0.5


def _priors(model: LocalModel, reviews: _Reviews, quick: bool, seed: int) -> Iterator[Claim]:
    without = _auc(model, reviews, "", ("A", "B"), seed)
    told = _auc(model, reviews, _PRIOR, _CLASSES, seed)
    second = _auc(model, reviews, _SECOND, ("bad", "good"), seed)
    rows = f"{len(reviews.texts)} sentences of under {60 if quick else 110} characters"
    swapped = "" if quick else f"; with the labels swapped {_auc(model, reviews, _PRIOR, _CLASSES[::-1], seed)}"
    yield _claim(
        0, told, told.value >= 0.80 and without.value <= 0.60,
        f"SmolLM2-135M, scored labels, {rows}, in place of GPT-4o and Llama-3-70B; without a prior {without}{swapped}",
        Comparator("no prior, labels A and B", without.value),
    )  # fmt: skip
    yield _claim(
        1, second, second.value >= 0.68, f"as above, {rows}", Comparator("no prior, labels A and B", without.value)
    )


def _learner(model: LocalModel, **options: Any) -> VerbalizedClassifier:
    """Two steps of five rows, two rows set aside."""
    return VerbalizedClassifier(
        model,
        task=_TASK,
        prior=_PRIOR,
        mode="score",
        batch_size=5,
        epochs=1,
        validation=1 / 6,
        max_tokens=16,
        accept="if-better",
        **options,
    )


def _loop(model: _Recorded, few: _Reviews) -> tuple[VerbalizedClassifier, Claim]:
    model.prompts.clear()
    model.conversations.clear()
    trained = _learner(model).fit(few.texts, few.labels)
    batches = [row for update in trained.history_ for row in update.batch]
    judged = 2 * (1 + sum(update.theta_after != update.theta_before for update in trained.history_))
    read = sum(update.accepted for update in trained.history_)
    first = all(prompt.startswith(trained.theta_initial_) for prompt in model.prompts)
    short = all(len(one) <= 4 for one in model.conversations)
    ordered = batches == sorted(batches) and len(batches) == 10
    extra = len(model.prompts) - 10
    exact = len(model.conversations) == 2 and extra >= judged and extra % 2 == 0
    told = (
        f"SmolLM2 as learner and optimizer, 10 reviews in 2 steps: {len(model.prompts)} prompts of the learner ({extra} of them "
        f"on the 2 reviews set aside), {len(model.conversations)} conversations of the optimizer; theta_0 first in "
        f"{'every' if first else 'not every'} prompt, {'at most' if short else 'more than'} 4 messages, batches "
        f"{'in' if ordered else 'out of'} order; {read} updates were accepted, {trained.failed_updates_} could not be read. 50 "
        "steps of a task that is learned are checked by the tests"
    )
    measured = Estimate.exact(10 + len(model.conversations), "calls of training")
    return trained, _claim(2, measured, exact and first and short and ordered, told, Comparator("by Algorithm 1", 12.0))


def _interpretable(trained: VerbalizedClassifier) -> Claim:
    updates = trained.history_
    whole = sum(
        bool(one.reasoning.strip()) and one.loss_after_validation is not None and len(one.batch) == 5 for one in updates
    )
    chained = all(one.theta_after == two.theta_before for one, two in pairwise(updates))
    told = (
        f"{len(updates)} updates by SmolLM2, {trained.failed_updates_} of which could not be read (a model of this size does not "
        "keep the format: its whole answer is then the reasoning, and the descriptions stay)"
    )
    measured = Estimate.exact(whole / len(updates), "share of updates that are whole")
    return _claim(4, measured, whole == len(updates) and chained, told)


def _selection(model: LocalModel, reviews: _Reviews, quick: bool, seed: int) -> Claim:
    """Splits of the same reviews, so that every description is scored once on each of them."""
    candidates = [_CANDIDATES[i] for i in (_QUICK if quick else range(len(_CANDIDATES)))]
    base = VerbalizedClassifier(model, task=_TASK, mode="score")
    aside, blind, rows = (12, 0, []) if quick else (40, 0, [])
    for split in range(1 if quick else 3):
        order = np.random.default_rng([seed, split]).permutation(len(reviews.texts))
        judge, test = ([reviews.texts[i] for i in part] for part in (order[:aside], order[aside:]))
        found = candidate_search(base, judge, reviews.labels[order[:aside]], candidates)
        truth = reviews.labels[order[aside:]]
        scores = [1 - candidate_search(base, test, truth, [one]).losses[0] for one in candidates]
        blind += found.candidates[found.chosen] in _UNINFORMATIVE
        rows.append((scores[found.chosen], min(scores), np.median(scores), scores[0], np.mean(scores)))
    told = mean_of_runs([row[0] for row in rows], unit="accuracy", within=(0, 1))
    low, middle, theta_0, random = np.mean(rows, axis=0)[1:].tolist()
    return _claim(
        5, told, told.value >= 0.68 and told.value >= low + 0.10 and told.value >= middle - 0.02 and blind == 0,
        f"SmolLM2, scored labels, {len(candidates)} descriptions, {aside} reviews choose, {len(reviews.texts) - aside} test; "
        f"{len(rows)} splits of the same {len(reviews.texts)} reviews; worst {low:.3f}, median {middle:.3f}, theta_0 "
        f"{theta_0:.3f}; one without information was chosen {blind} times",
        Comparator("a random description", random),
    )  # fmt: skip


def _resumable(scratch: Path, model: _Recorded, few: _Reviews, quick: bool) -> Claim:
    """A fit that its budget ends after one step, the same fit to the end, and once more; full: and one that knows nothing."""
    fresh = _Recorded(scratch / "resumed.sqlite", model._load())
    stopped = _learner(fresh, max_calls=8).fit(few.texts, few.labels)
    resumed = _learner(fresh).fit(few.texts, few.labels)
    before = fresh.usage.calls
    again = _learner(fresh).fit(few.texts, few.labels)
    calls = fresh.usage.calls - before
    same = stopped.history_ == resumed.history_[:1] and resumed.history_ == again.history_
    whole = ""
    if not quick:
        alone = _learner(_Recorded(scratch / "alone.sqlite", model._load())).fit(few.texts, few.labels)
        same = same and alone.history_ == resumed.history_
        whole = ", and so does a fit that was never stopped and shares no answers"
    return _claim(
        6, Estimate.exact(calls, "calls of the second fit"), same and calls == 0 and stopped.stopped_ == "budget",
        f"SmolLM2, 2 steps; stopped after the first by its budget, resumed and repeated: histories "
        f"{'agree' if same else 'differ'}{whole}; a kill after step 20 of 30 is checked by the tests",
        Comparator("calls up to there", float(before)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Example:
    X: np.ndarray
    y: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    truth: Any
    instructions: str


def example(kind: str, seed: int) -> _Example:
    """A regression of the paper, 100 points of two decimals, and the points inside and outside their range that test it.

    kind: "linear", "polynomial" or "sine"; the tests are 40 equally spaced points on the range widened by 1, 2 or 3.
    """
    low, high, wider, noise, truth, instructions = {
        "linear": (0.0, 2.0, 1.0, 0.1, lambda x: 4 + 3 * x, NO_FORMULA),
        "polynomial": (-3.0, 1.0, 2.0, 1.0, lambda x: 3 * x**2 + x + 2, ONE_DECIMAL),
        "sine": (-3.0, 3.0, 3.0, 0.01, lambda x: np.sin(x) + 2, ONE_DECIMAL),
    }[kind]
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, high, 100).round(2)
    y = (truth(x) + noise * rng.normal(size=100)).round(2)
    grid = np.linspace(low - wider, high + wider, 40).round(2)
    within = (low <= grid) & (grid <= high)
    return _Example(x[:, None], y, grid[within][:, None], grid[~within][:, None], truth, instructions)


def _regressions(scale: Scale, seed: int) -> Iterator[Claim]:
    place = named_model()
    if place is None:
        for k in range(7, 11):
            yield _claim(k, None, None, f"not run here: needs a language model of the size of GPT-4o: {_COMMAND}")
        return
    model, name = connect(*place, concurrency=10), place[1]
    epochs = 1 if scale is Scale.QUICK else 5
    bars = {"linear": 0.1, "polynomial": 2.0, "sine": 0.05}
    outside = {}
    for k, (kind, bar) in enumerate(bars.items(), 7):
        about = example(kind, seed)
        base = VerbalizedRegressor(model, epochs=epochs, instructions=about.instructions, seed=seed)
        if kind == "sine":
            outside["without"] = _errors(base.fit(about.X, about.y), about, about.outside)
            base.set_params(prior="The relation is periodic.")
        fitted = base.fit(about.X, about.y)
        if kind == "sine":
            outside["with"] = _errors(fitted, about, about.outside)
        found = bootstrap(_errors(fitted, about, about.inside), seed=seed, unit="squared error")
        shots = float(_errors(in_context(base, about.X[:10], about.y[:10]), about, about.inside).mean())
        cubic = make_pipeline(PolynomialFeatures(3), LinearRegression()).fit(about.X, about.y).predict(about.inside)
        closed = float(np.mean((cubic - about.truth(about.inside[:, 0])) ** 2))
        yield _claim(
            k, found, found.value <= bar,
            f"{name}, {epochs} epochs, {fitted.calls_} calls; ten examples in the prompt {shots:.3g}, cubic fit {closed:.3g}",
            Comparator("ten examples in the prompt", shots),
        )  # fmt: skip
    differences = outside["without"] - outside["with"]
    gained = bootstrap(differences, seed=seed, unit="squared error")
    yield _claim(
        10, gained, gained.value > 0, f"{name}, {epochs} epochs; measured: outside MSE without the prior minus with it",
        Comparator("outside MSE without the prior", float(outside["without"].mean())),
    )  # fmt: skip


def _errors(model: Any, about: _Example, grid: np.ndarray) -> np.ndarray:
    """Squared errors to the truth without noise; an answer that cannot be read counts as the mean of the targets."""
    answers = model.predict(grid)
    return (np.where(np.isnan(answers), about.y.mean(), answers) - about.truth(grid[:, 0])) ** 2
