"""What a language model can be trusted with as a learner: rules in words and examples in a prompt, on three small tables."""

__all__ = ["forecast_of_learner", "not_a_learner", "what_it_learns"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Subject
from theodolite.core.view import evaluation_mode
from theodolite.hyperparameters.verbalized import VerbalizedClassifier, in_context
from theodolite.language.local import LocalModel
from theodolite.survey.chart import Budget
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_TABLES: dict[str, Callable[[], Any]] = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer}
_COLUMNS, _EXAMPLES, _TEST, _CUE = 2, 12, 20, "Answer"
_LETTERS = np.array(["A", "B", "C"])  # names would let a model answer from what it has read about these tables
_ROOM = 300  # tokens of a context that the question, a rule and a row take
_PER_PARAMETER = 3e-7  # seconds, of one core


@dataclass(frozen=True, eq=False)
class _Task:
    """One table: examples and test rows, and a rule of few conditions that the other rows gave, in words."""

    question: str
    examples: pd.DataFrame
    labels: np.ndarray
    test: pd.DataFrame
    truth: np.ndarray
    rule: str
    by_rule: np.ndarray


def not_a_learner(subject: Subject) -> str | None:
    """Why this language model cannot be asked, None where it can."""
    if subject.tokenizer is None:
        return "needs the language model's tokenizer"
    window = getattr(subject.predictor.config, "max_position_embeddings", None)
    if window is not None and window < 2 * _ROOM:
        return f"needs a context of {2 * _ROOM} tokens for examples; this model has {window}"
    return None


def forecast_of_learner(subject: Subject) -> float:
    """Seconds, by the number of parameters."""
    return 5 + _PER_PARAMETER * (subject.parameter_count or 0)


def what_it_learns(subject: Subject, budget: Budget) -> Finding:
    """Accuracy on rows of three tables with examples in the prompt and with a rule in words, beside ordinary learners."""
    model = LocalModel.of(subject.name, subject.predictor, subject.tokenizer)
    rng = np.random.default_rng(budget.seed)
    ways: dict[str, dict[str, np.ndarray]] = {}
    with evaluation_mode(subject.predictor):
        for name, load in _TABLES.items():
            task = _task(load(), budget.seed)
            ways[name] = _answers(model, task, rng.permutation(task.labels))
    names = list(next(iter(ways.values())))
    pooled = {way: np.concatenate([right[way] for right in ways.values()]) for way in names}
    all_rows = {way: _share(right) for way, right in pooled.items()}
    shown, told = all_rows["examples"], all_rows["a rule in words"]
    comparison = Comparison(
        f"accuracy with {_EXAMPLES} examples in the prompt, {len(pooled['examples'])} rows of {len(_TABLES)} tables",
        shown,
        (
            Control("the same examples, labels shuffled", all_rows["shuffled examples"], "random"),
            Control("the commonest class", all_rows["commonest class"], "null"),
            Control("logistic regression on the same examples", all_rows["logistic regression"], "closed-form"),
            Control("the rule, followed exactly", all_rows["the rule"], "reference"),
        ),
    )
    return Finding(
        slug="verbalized-learning",
        headline=f"As a learner of three small tables the model is right on {shown.value:.0%} of the rows with "
        f"{_EXAMPLES} examples in its prompt and on {told.value:.0%} when told a rule that is right on "
        f"{all_rows['the rule'].value:.0%}; logistic regression on the same examples "
        f"{all_rows['logistic regression'].value:.0%}, the commonest class {all_rows['commonest class'].value:.0%}.",
        numbers={
            "with examples in the prompt": shown,
            "with a rule in words": told,
            **{f"{name}, with examples": _share(right["examples"]) for name, right in ways.items()},
            **{f"{name}, with a rule": _share(right["a rule in words"]) for name, right in ways.items()},
        },
        comparison=comparison,
        figure=_figure(ways, names),
        reading="Each group is one way to answer, each bar one table: the share of held-out rows that are right, with 95 % "
        "intervals. The model scores the names of the classes after a row; it writes nothing.",
        advice=_advice(shown, told, all_rows),
        seed=budget.seed,
        caveats=(
            f"{_TEST} test rows and the {_COLUMNS} columns that tell most of each table, one draw of the examples, one wording; "
            "classes are letters, so that a model cannot answer from what it has read about iris, wine or breast cancer.",
            "The rules are those of a small tree on rows that are neither examples nor test rows.",
        ),
    )  # fmt: skip


def _task(bunch: Any, seed: int) -> _Task:
    y = _LETTERS[bunch.target]
    split: Any = train_test_split(bunch.data, y, test_size=_TEST, stratify=y, random_state=seed)
    rest, test, y_rest, truth = split
    best = np.sort(np.argsort(-f_classif(rest, y_rest)[0], kind="stable")[:_COLUMNS])
    columns = [str(bunch.feature_names[j]).split(" (")[0] for j in best]
    split = train_test_split(rest[:, best], y_rest, train_size=_EXAMPLES, stratify=y_rest, random_state=seed)
    examples, others, labels, y_others = split
    tree = DecisionTreeClassifier(max_leaf_nodes=len(np.unique(y)), random_state=seed).fit(others, y_others)
    test = test[:, best]
    return _Task(
        f"Is it {', '.join(np.unique(y)[:-1])} or {np.unique(y)[-1]}?", pd.DataFrame(examples, columns=columns), labels,
        pd.DataFrame(test, columns=columns), truth, _in_words(tree, columns), np.asarray(tree.predict(test)) == truth,
    )  # fmt: skip


def _in_words(tree: DecisionTreeClassifier, columns: list[str]) -> str:
    """Every leaf as a sentence."""
    found: Any = tree.tree_

    def below(node: int, path: list[str]) -> list[str]:
        if found.children_left[node] == found.children_right[node]:
            label = tree.classes_[found.value[node][0].argmax()]
            return [f"If {' and '.join(path)}, it is {label}." if path else f"It is always {label}."]
        name, limit = columns[found.feature[node]], f"{found.threshold[node]:.4g}"
        return below(int(found.children_left[node]), [*path, f"{name} is at most {limit}"]) + below(
            int(found.children_right[node]), [*path, f"{name} is above {limit}"]
        )

    return " ".join(below(0, []))


def _answers(model: LocalModel, task: _Task, shuffled: np.ndarray) -> dict[str, np.ndarray]:
    """Which test rows each way gets right."""
    plain = VerbalizedClassifier(model, task=task.question, mode="score", cue=_CUE, epochs=0)
    told = VerbalizedClassifier(model, task=task.question, prior=task.rule, mode="score", cue=_CUE, epochs=0)
    ordinary = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(task.examples, task.labels)
    names, counts = np.unique(task.labels, return_counts=True)
    return {
        "a rule in words": told.fit(task.examples, task.labels).predict(task.test) == task.truth,
        "examples": in_context(plain, task.examples, task.labels).predict(task.test) == task.truth,
        "shuffled examples": in_context(plain, task.examples, shuffled).predict(task.test) == task.truth,
        "commonest class": task.truth == names[counts.argmax()],
        "logistic regression": np.asarray(ordinary.predict(task.test)) == task.truth,
        "the rule": task.by_rule,
    }


def _share(right: np.ndarray) -> Estimate:
    return proportion(int(right.sum()), len(right), unit="accuracy")


def _figure(ways: dict[str, dict[str, np.ndarray]], names: list[str]) -> go.Figure:
    figure = blank("", "accuracy on held-out rows")
    for (table, right), ink in zip(ways.items(), INKS, strict=False):
        shares = [_share(right[way]) for way in names]
        figure.add_trace(
            go.Bar(
                x=names, y=[one.value for one in shares], name=table, marker_color=ink,
                error_y={
                    "type": "data", "symmetric": False, "array": [one.high - one.value for one in shares],
                    "arrayminus": [one.value - one.low for one in shares],
                },
            )
        )  # fmt: skip
    figure.update_layout(barmode="group")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def _advice(shown: Estimate, told: Estimate, all_rows: dict[str, Estimate]) -> str:
    least = max(all_rows[way].high for way in ("commonest class", "shuffled examples"))
    can = [what for what, one in (("examples", shown), ("rules in words", told)) if one.low > least]
    if not can:
        return (
            "Do not use this model as a learner: neither examples nor rules in its prompt do more than the commonest class. A "
            "stronger one: THEODOLITE_ENDPOINT and THEODOLITE_LANGUAGE_MODEL, or --model."
        )
    text = f"It takes in {' and '.join(can)}"
    if max(shown.high, told.high) < all_rows["logistic regression"].low:
        return text + ", and yet an ordinary classifier on the same examples does better: use that for tables."
    return (
        text
        + ". Try it on a task of your own: theodolite run verbalized-learning --data FILE --target NAME --prior '...'."
    )
