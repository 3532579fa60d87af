"""The chart of tuning by a language model: what it reaches in a few evaluations, and whether it can predict scores at all."""

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
from plotly.subplots import make_subplots
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.subject import Subject
from theodolite.hyperparameters.llm_bayesian_optimization import (
    LLAMBO,
    DiscriminativeSurrogate,
    GaussianProcessSearch,
    RandomSearch,
    TaskContext,
    TPESearch,
    evaluate_surrogate,
    known_space,
)
from theodolite.hyperparameters.space import Config, SearchResult, SearchSpace
from theodolite.language import ENDPOINT, MODEL, connect
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_TRIALS, _HELD, _ROWS = 15, 20, 2000


def _refusal(subject: Subject) -> str | None:
    if not os.environ.get(MODEL):
        return (
            f"needs a language model: set {MODEL} to its name, and {ENDPOINT} to the address of its endpoint "
            "(smollm2 or a Hugging Face folder needs no address)"
        )
    return None


def estimator_of(subject: Subject) -> tuple[Any, SearchSpace, bool]:
    """What is tuned, its space, and whether it is the subject's own kind; a decision tree where no space is known."""
    own = getattr(subject.predictor, "estimator", subject.predictor)
    space = known_space(own)
    if space is not None:
        return clone(own), space, True
    kind = DecisionTreeClassifier if subject.data.task == "classification" else DecisionTreeRegressor
    tree = kind(random_state=0)
    return tree, SearchSpace(known_space(tree) or {}), False


def with_values(estimator: Any, config: Config) -> Any:
    """A fresh copy of the estimator with these hyperparameters."""
    made: Any = clone(estimator)
    return made.set_params(**config)


@chart("llm-bayesian-optimization", needs=Needs(modalities=("tabular",), test=_refusal), cost=seconds(300))
def llm_bayesian_optimization(subject: Subject, budget: Budget) -> Finding:
    """Test score of what each optimiser chose after the same number of evaluations, and how the model's forecasts rank."""
    estimator, space, own = estimator_of(subject)
    train = subject.data.train.head(_ROWS)
    x, y = train.x.double().numpy(), train.y.numpy()
    scoring = "accuracy" if subject.data.task == "classification" else "r2"
    context = TaskContext.from_data(estimator, x, y, scoring)

    def objective(config: Config) -> float:
        return float(np.mean(cross_val_score(with_values(estimator, config), x, y, cv=5, scoring=scoring)))

    llm = connect(os.environ.get(ENDPOINT), os.environ[MODEL])
    start = space.sample(5, seed=budget.seed)
    search = LLAMBO(space, context, llm, initial=start, fallback="raise", seed=budget.seed)
    runs: dict[str, SearchResult] = {llm.name: search.optimize(objective, _TRIALS)}
    others: dict[str, Any] = {"random": RandomSearch, "Gaussian process": GaussianProcessSearch}
    if find_spec("optuna") is not None:
        others["TPE"] = TPESearch
    for name, kind in others.items():
        runs[name] = kind(space, initial=start, seed=budget.seed).optimize(objective, _TRIALS)
    held = space.sample(_HELD, seed=budget.seed + 1)
    asked = DiscriminativeSurrogate(space, context, llm, seed=budget.seed)
    known, truth = [objective(config) for config in start], [objective(config) for config in held]
    report = evaluate_surrogate(asked, start, known, held, truth)
    reached = {name: _on_test(subject, estimator, run.best.config, x, y) for name, run in runs.items()}
    ours, result = reached[llm.name], runs[llm.name]
    rank = report.spearman
    agreement = (
        "not defined (all forecasts are equal)"
        if rank is None
        else f"{rank.value:+.2f} [{rank.low:+.2f}, {rank.high:+.2f}]"
    )
    what = "the subject's own kind of model" if own else "a decision tree"
    numbers = {f"test {scoring} of the choice of {name}": value for name, value in reached.items()}
    numbers |= {
        f"cross-validated {scoring} of the best of {name}": Estimate.exact(run.best.score) for name, run in runs.items()
    }
    numbers["tokens of the language model"] = Estimate.exact(result.tokens, "tokens")
    if rank is not None:
        numbers["rank agreement of its forecasts with held-out scores"] = rank
    weak = report.verdict == "model too weak"
    return Finding(
        slug="llm-bayesian-optimization",
        headline=f"After {5 + _TRIALS} evaluations {llm.name} chose hyperparameters of {what} with test {scoring} "
        f"{ours.value:.3f}, random {reached['random'].value:.3f}; rank agreement of its forecasts {agreement}"
        f"{': model too weak' if weak else ''}.",
        numbers=numbers,
        comparison=Comparison(
            f"test {scoring} of what {llm.name} chose",
            ours,
            tuple(
                Control(f"{name}, as many evaluations", reached[name], "random" if name == "random" else "closed-form")
                for name in others
            ),
        ),
        figure=_figure(runs, report, scoring),
        reading=f"Left: the best cross-validated {scoring} so far, from the same 5 random starts. Right: what the language model "
        f"expected of {_HELD} random configurations that it was not told about, and what they reached; points on a rising line "
        "mean that it can predict.",
        advice=(
            f"Do not tune with {llm.name}: its forecasts do not rank configurations. Use a stronger model, or TPE or a Gaussian "
            "process (theodolite.hyperparameters.llm_bayesian_optimization.TPESearch)."
            if weak
            else "Where an evaluation is expensive, let it choose the first ten or twenty and go on with a Gaussian process: "
            "theodolite.hyperparameters.llm_bayesian_optimization.LLAMBO."
        ),
        seed=budget.seed,
        caveats=(
            "One run of each optimiser: intervals are over the test rows and say nothing of other runs.",
            f"{result.calls} requests, {result.n_rejected} answers that were no new configuration, {result.n_fallback} times a "
            "random choice stood in.",
            *(() if own else ("No search space is known for the subject's model, so a decision tree on its data is tuned.",)),
        ),
    )  # fmt: skip


def _on_test(subject: Subject, estimator: Any, config: Config, x: np.ndarray, y: np.ndarray) -> Estimate:
    """Score on the test rows, which no search has seen."""
    fitted = with_values(estimator, config).fit(x, y)
    rows = subject.data.test
    answers, truth = fitted.predict(rows.x.double().numpy()), rows.y.numpy()
    if subject.data.task == "classification":
        return bootstrap((answers == truth).astype(np.float64), unit="accuracy")

    def r2(pairs: np.ndarray) -> float:
        spread = float(((pairs[:, 1] - pairs[:, 1].mean()) ** 2).sum())
        return 1 - float(((pairs[:, 0] - pairs[:, 1]) ** 2).sum()) / spread if spread > 0 else 0.0

    return bootstrap(np.stack([answers, truth], axis=1), r2, unit="R2")


def _figure(runs: dict[str, SearchResult], report: Any, scoring: str) -> Any:
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    for ink, (name, run) in zip(INKS, runs.items(), strict=False):
        steps = list(range(1, len(run.scores) + 1))
        band_line(figure, steps, run.best_so_far.tolist(), name=name, ink=ink, row=1, col=1)
    figure.add_scatter(
        x=report.mean.tolist(), y=report.truth.tolist(), mode="markers", name="held-out configurations",
        marker={"color": INKS[6]}, row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(title_text="evaluations", row=1, col=1)
    figure.update_yaxes(title_text=f"best {scoring} so far", row=1, col=1)
    figure.update_xaxes(title_text="expected", row=1, col=2)
    figure.update_yaxes(title_text="reached", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.12})
    return figure
