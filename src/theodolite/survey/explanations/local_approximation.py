"""The chart of attribution methods: which suits the model, and how far its answers hold."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import (
    METHODS,
    NEIGHBOURHOODS,
    LocalApproximation,
    LocalExplanation,
    Neighbourhood,
    NotDifferentiableError,
    faithfulness_by_row,
    perturbation_curve,
    square_patches,
)
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_ROWS = {"tabular": 64, "image": 24}
"""Rows explained of each part: enough for an interval, and few where each of them is thousands of numbers."""

_MOST_FEATURES = 300
_PATCHES = 7  # an image is cut into about so many squares a side
_WORDS = {
    "binary": "features switched off",
    "one-hot": "one feature switched off",
    "gaussian": "small changes of all",
    "path": "the way from the mean",
}
_LOSSES = tuple[str, str]


class _NetworkInUnits(nn.Module):
    """A network as a function of inputs in standard deviations from the training rows' mean."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z * self.scale + self.shift)


class _EstimatorInUnits:
    """An estimator as a function of inputs in standard deviations from the training rows' mean."""

    def __init__(self, model: Any, shift: Tensor, scale: Tensor) -> None:
        self._model, self._shift, self._scale = model, shift.numpy().ravel(), scale.numpy().ravel()

    def predict(self, z: np.ndarray) -> np.ndarray:
        return self._model.predict(z * self._scale + self._shift)

    def predict_proba(self, z: np.ndarray) -> np.ndarray:
        return self._model.predict_proba(z * self._scale + self._shift)


@dataclass(frozen=True, eq=False)
class _Explained:
    """The subject in units that mean the same for every feature, and what can be asked of it there."""

    model: ModelView
    shift: Tensor
    scale: Tensor
    groups: Tensor | None
    features: int

    @classmethod
    def of(cls, subject: Subject, memory: int | None = None) -> "_Explained":
        """0 is the mean of the training rows, 1 one standard deviation; an image is cut into squares."""
        x = subject.data.train.x
        shift = x.mean(dim=0)
        scale = x.std(dim=0) if x.ndim == 2 else (x - shift).std()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        output = "probability" if subject.data.task == "classification" else "value"
        kind = _NetworkInUnits if subject.is_network else _EstimatorInUnits
        model = ModelView(kind(subject.predictor, shift, scale.expand_as(shift)), output=output, memory=memory)
        if x.ndim == 2:
            return cls(model, shift, scale, None, x.shape[1])
        height, width = x.shape[2:]
        groups = square_patches(height, width, max(1, round(min(height, width) / _PATCHES)))
        return cls(model, shift, scale, groups, int(groups.max()) + 1)

    def rows(self, x: Tensor) -> Tensor:
        """Inputs in the units."""
        return (x - self.shift) / self.scale

    @property
    def samples(self) -> int:
        """Moves drawn around a row: several for each feature."""
        return max(300, 5 * self.features)

    def methods(self, memory: int, seed: int) -> dict[str, LocalApproximation]:
        """The eight methods on these features."""
        return {
            name: replace(
                method, neighbourhood=self.here(method.neighbourhood), memory=memory, seed=seed,
                n_samples=min(method.n_samples, self.samples) if method.n_samples < 1000 else self.samples,
            )
            for name, method in METHODS.items()
        }  # fmt: skip

    def here(self, neighbourhood: Neighbourhood) -> Neighbourhood:
        """The same neighbourhood over the squares of an image, its kernel as wide as half of the features reach."""
        changes = {} if self.groups is None else {"groups": self.groups}
        if neighbourhood.weighs_inputs:
            changes["width"] = 0.75 * self.shift.numel() ** 0.5
        return replace(neighbourhood, **changes)

    @property
    def neighbourhoods(self) -> dict[str, Neighbourhood]:
        """The four neighbourhoods on these features; three without gradients: values along one line tell no weights."""
        return {
            name: self.here(neighbourhood)
            for name, neighbourhood in NEIGHBOURHOODS.items()
            if name != "path" or self.model.differentiable
        }


def _too_many(subject: Subject) -> str | None:
    features = int(np.prod(subject.data.shape))
    if subject.data.modality == "tabular" and features > _MOST_FEATURES:
        return f"explains up to {_MOST_FEATURES} features; these data have {features}"
    return None


def _forecast(subject: Subject) -> float:
    """Seconds for the moves of all rows, from the time of one pass over some of them."""
    explained = _Explained.of(subject)
    explained_rows = 2 * _ROWS[subject.data.modality]
    rows = explained.rows(subject.data.train.x[:128])
    explained.model(rows)
    started = time.perf_counter()
    explained.model(rows)
    passes = explained_rows * explained.samples * (3 + 4 + 6 * subject.is_network) / len(rows)
    return (time.perf_counter() - started) * passes


def _sample(subject: Subject, part: Literal["validation", "test"], seed: int) -> Tensor:
    x = subject.data.parts[part].x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[: _ROWS[subject.data.modality]]]


def _explain(methods: Mapping[str, LocalApproximation], model: ModelView, x: Tensor) -> dict[str, LocalExplanation]:
    """Explanations by every method that this model can be explained with."""
    found = {}
    for name, method in methods.items():
        try:
            found[name] = method.explain(model, x)
        except NotDifferentiableError:
            continue
    return found


@chart(
    "local-function-approximation",
    needs=Needs(modalities=("tabular", "image"), test=_too_many),
    cost=_forecast,
)
def local_function_approximation(subject: Subject, budget: Budget) -> Finding:
    """Which attribution method to trust for which kind of change, chosen on validation and reported on test rows."""
    explained = _Explained.of(subject, budget.memory)
    methods, places = explained.methods(budget.memory, budget.seed), explained.neighbourhoods
    options: dict[str, Any] = {"n_samples": explained.samples, "seed": budget.seed, "memory": budget.memory}
    validation = explained.rows(_sample(subject, "validation", budget.seed))
    chosen_on = faithfulness_by_row(
        explained.model, validation, _explain(methods, explained.model, validation), places, **options
    )
    names = list(dict.fromkeys(name for name, _ in chosen_on))
    best = {place: min(names, key=lambda name: float(chosen_on[name, place].mean())) for place in places}
    test = explained.rows(_sample(subject, "test", budget.seed))
    explanations = _explain(methods, explained.model, test)
    losses = faithfulness_by_row(explained.model, test, explanations, places, controls=True, **options)
    shown = {key: mean_of_runs(values.cpu().numpy(), within=(0, np.inf)) for key, values in losses.items()}
    on, small = best["binary"], best["gaussian"]
    comparison = Comparison(
        f"held-out squared error of {on}, {_WORDS['binary']}",
        shown[on, "binary"],
        (
            Control("its weights given to other features", shown[f"{on}, shuffled", "binary"], "random"),
            Control("a constant answer", shown["constant", "binary"], "null"),
        ),
        larger_is_better=False,
    )
    numbers = dict[str, Estimate]()
    for place in (place for place in places if place != "one-hot"):
        numbers[f"held-out error of {best[place]}, {_WORDS[place]}"] = shown[best[place], place]
        numbers[f"error of a constant answer, {_WORDS[place]}"] = shown["constant", place]
    if on != small:
        numbers[f"held-out error of {small}, {_WORDS['binary']}"] = shown[small, "binary"]
        numbers[f"held-out error of {on}, {_WORDS['gaussian']}"] = shown[on, "gaussian"]
    return Finding(
        slug="local-function-approximation",
        headline=_headline(on, small, shown),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(subject, explained, test, explanations, shown, best, budget),
        reading="How far each method's linear surrogate is from the model where features are switched off, changed a little, or "
        "moved along the way from the training mean: held-out squared error as a share of that of a surrogate that never "
        "changes its answer (below 1 the explanation helps). Diamonds: chosen on validation rows. Below, how much the answer "
        "changes when the features that a method ranks lowest are disturbed; lower is better.",
        advice=f"Explain with {on} when you ask what would happen without a feature, with {small} when you ask what small "
        f'changes do: theodolite.explanations.local_approximation.attribute("{on}", model, rows).',
        seed=budget.seed,
        caveats=(
            "Features count in standard deviations of the training rows; switched off means set to their mean"
            + (", and an image is cut into squares that move together." if explained.groups is not None else "."),
            f"{len(validation)} validation rows to choose, {len(test)} test rows to report, each method's surrogate of the "
            "answer for the predicted class.",
        ),
    )


def _headline(on: str, small: str, shown: Mapping[_LOSSES, Estimate]) -> str:
    constant = shown["constant", "binary"].value
    kept = 1 - shown[on, "binary"].value / constant if constant > 0 else 0.0
    if on == small:
        return (
            f"{on} is the most faithful both where features are switched off and where they change a little; it explains "
            f"{max(0.0, kept):.0%} of what switching features off does."
        )
    times = _ratio(shown[small, "binary"], shown[on, "binary"])
    back = _ratio(shown[on, "gaussian"], shown[small, "gaussian"])
    return (
        f"For features switched off trust {on}, for small changes trust {small}; the other choice is {times} and {back} times "
        "less faithful."
    )


def _ratio(worse: Estimate, better: Estimate) -> str:
    if better.value == 0:
        return "infinitely many" if worse.value > 0 else "1"
    ratio = worse.value / better.value
    if ratio > 1000:
        return "over 1,000"
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _figure(
    subject: Subject,
    explained: _Explained,
    test: Tensor,
    explanations: Mapping[str, LocalExplanation],
    shown: Mapping[_LOSSES, Estimate],
    best: Mapping[str, str],
    budget: Budget,
) -> go.Figure:
    figure = make_subplots(
        rows=2, cols=2, specs=[[{"colspan": 2}, None], [{}, {}]], row_heights=[0.58, 0.42], vertical_spacing=0.16,
        subplot_titles=("held-out error, as a share of a constant answer's", "lowest ranked features switched off",
                        "lowest ranked features changed a little"),
    )  # fmt: skip
    names = list(explanations)[::-1]
    share = np.array([[_share(shown, name, place) for place in best] for name in names])
    figure.add_trace(
        go.Heatmap(
            z=np.log10(np.clip(share, 1e-4, 1e4)), x=[_WORDS[place] for place in best], y=names,
            text=[[f"{value:.2g}" + (" ◆" if best[place] == name else "") for value, place in zip(row, best, strict=True)]
                  for row, name in zip(share, names, strict=True)],
            texttemplate="%{text}", colorscale="RdBu_r", zmid=0, zmin=-2, zmax=2, showscale=False,
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    counts = list(range(1, min(11, explained.features) + 1))
    random = torch.rand(len(test), explained.features, generator=torch.Generator().manual_seed(budget.seed))
    lines = {best["binary"]: INKS[0], best["gaussian"]: INKS[1]}
    for column, kind in enumerate(("binary", "gaussian"), start=1):
        for name, ink in [*lines.items(), ("random ranking", INKS[6])]:
            weights = random if name == "random ranking" else explanations[name].weights
            curve = perturbation_curve(
                explained.model, test, weights, kind, "bottom", counts, draws=20, groups=explained.groups,
                seed=budget.seed, memory=budget.memory,
            )  # fmt: skip
            band_line(
                figure, counts, curve.mean.tolist(), name=name, ink=ink, row=2, col=column,
                dash="dot" if name == "random ranking" else None, legend=column == 1,
            )  # fmt: skip
    what = "probability" if subject.data.task == "classification" else "answer"
    figure.update_xaxes(title_text="features disturbed", row=2)
    figure.update_yaxes(title_text=f"change of the {what}", row=2, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 40, "b": 50}, height=620, legend={"orientation": "h", "y": -0.14}
    )
    return figure


def _share(shown: Mapping[_LOSSES, Estimate], name: str, place: str) -> float:
    constant = shown["constant", place].value
    return shown[name, place].value / constant if constant > 0 else 1.0
