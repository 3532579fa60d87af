"""The chart of relative representations: whether two trainings of a network build the same space, up to its coordinates."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from theodolite.activations.relative import RelativeProjection, item_agreement, latent_agreement, select_anchors
from theodolite.core.capture import activations
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.subject import Subject
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_ANCHORS = 300
_ROWS = 4_000
_TEST = 2_000
_SIZES = (10, 30, 100, 300)


def _refusal(subject: Subject) -> str | None:
    if not flat_nodes(subject):
        return "needs a hidden layer with activations (rows, width); this network has none"
    if len(subject.data.train) < 200:
        return f"needs at least 200 training rows, of which some are anchors; there are {len(subject.data.train)}"
    return None


@dataclass(frozen=True, eq=False)
class _Space:
    """Activations of one network's layer on the training rows that are used and on the test rows."""

    train: Tensor
    test: Tensor


def _space(model: nn.Module, layer: str, train: Tensor, test: Tensor, memory: int) -> _Space:
    first, second = (activations(model, x, [layer], memory=memory)[layer].float() for x in (train, test))
    return _Space(first, second)


def _projections(one: _Space, two: _Space, index: np.ndarray) -> tuple[RelativeProjection, RelativeProjection]:
    made = [
        # encode() gives a row on which no unit of the layer fires the cosine 0; a linear head wants vectors of length 1
        RelativeProjection(preprocess="standardize", normalize=True).fit(space.train, anchor_index=index)
        for space in (one, two)
    ]
    return made[0], made[1]


class _Head:
    """A linear head: logistic for classes, ridge for values; tells for each row of vectors how good its answer is."""

    def __init__(self, subject: Subject, vectors: Tensor, y: Tensor) -> None:
        self.classifies = subject.data.task == "classification"
        self.model: Any = LogisticRegression(max_iter=5_000, C=10.0) if self.classifies else Ridge(alpha=0.1)
        self.model.fit(vectors.numpy(), y.numpy())

    @property
    def unit(self) -> str:
        """What the score is."""
        return "accuracy" if self.classifies else "R2"

    def right(self, vectors: Tensor, y: Tensor) -> np.ndarray:
        """For each row whether the class is right, or 1 - squared error / variance of the rows."""
        return self._right(self.model.predict(vectors.numpy()), y)

    def _right(self, answers: np.ndarray, y: Tensor) -> np.ndarray:
        if self.classifies:
            return (answers == y.numpy()).astype(np.float64)
        truth = y.double().numpy()
        return 1 - (answers - truth) ** 2 / (truth.var() or 1.0)

    def score(self, vectors: Tensor, y: Tensor) -> Estimate:
        """Accuracy or R2 with a bootstrap interval over rows."""
        return bootstrap(self.right(vectors, y), unit=self.unit)

    def chance(self, y: Tensor, train_y: Tensor) -> Estimate:
        """The commonest class of the training rows, or their mean, as the answer to every row."""
        usual = float(torch.bincount(train_y).argmax()) if self.classifies else float(train_y.double().mean())
        return bootstrap(self._right(np.full(len(y), usual), y), unit=self.unit)


def _cost(subject: Subject) -> float:
    return 8 + subject.training_seconds


@chart(
    "relative-representations",
    needs=Needs(network=True, retrainable=True, modalities=("tabular", "image", "text"), test=_refusal),
    cost=_cost,
)
def relative_representations(subject: Subject, budget: Budget) -> Finding:
    """How well a head for this network's hidden layer reads the same network trained from another seed."""
    data, layer = subject.data, flat_nodes(subject)[-1]
    assert subject.build is not None
    other = subject.fit(subject.build(budget.seed + 1), seed=budget.seed + 1)
    networks = {"this network": subject.predictor, "another seed": other, "untrained": subject.build(budget.seed + 2)}
    train, test = data.train.head(_ROWS), data.test.head(_TEST)
    spaces = {name: _space(net, layer, train.x, test.x, budget.memory) for name, net in networks.items()}
    one, two, blank_ = spaces.values()
    count = min(_ANCHORS, len(train) // 4)
    index = select_anchors(train.x.reshape(len(train), -1).float(), count, seed=budget.seed)
    fit = torch.as_tensor(np.setdiff1d(np.arange(len(train)), index))
    p, q = _projections(one, two, index)
    untrained = _projections(one, blank_, index)[1]
    head = _Head(subject, p.encode(one.train[fit]), train.y[fit])
    plain = _Head(subject, _standardized(one, one.train[fit]), train.y[fit])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(budget.seed))
    vectors = q.encode(two.test)
    stitched = head.score(vectors, test.y)
    own = head.score(p.encode(one.test), test.y)
    loss = bootstrap(head.right(p.encode(one.test), test.y) - head.right(vectors, test.y), unit=head.unit)
    comparison = Comparison(
        f"{stitched.unit} of a head for {layer} that is put behind another seed's network, through {count} anchors",
        stitched,
        (
            Control("always the commonest class" if head.classifies else "always the mean", head.chance(test.y, train.y), "null"),
            Control("the anchors in another order", head.score(vectors[:, order], test.y), "random"),
            Control("no anchors: the layer's own coordinates", plain.score(_standardized(two, two.test), test.y), "closed-form"),
            Control("an untrained network in place of the other seed", head.score(untrained.encode(blank_.test), test.y), "null"),
            Control("the head behind its own network", own, "reference"),
        ),
    )  # fmt: skip
    curves = _curves(one, two, blank_, index, budget.seed)
    found = curves["relative"][-1]
    absolute = latent_agreement_of(one.test, two.test)
    shuffled = curves["anchors in another order"][-1]
    numbers = {
        "own: the head behind its own network": own,
        "stitched: the head behind another seed's network": stitched,
        "what the head loses by it, the same rows": loss,
        "mean reciprocal rank of a test row in the other network's space": found,
        "the same with the anchors in another order": shuffled,
        "the same in an untrained network's space": curves["an untrained network"][-1],
        "the same without anchors, by absolute cosine": absolute,
        "linear CKA of the two spaces' relative vectors": Estimate.exact(
            latent_agreement(*_given_direction(p.encode(one.test), q.encode(two.test)), k=1).cka
        ),
    }
    headline = (
        f"A head trained on {layer} reads the same network trained from another seed at {stitched.unit} {stitched.value:.3f} "
        f"through {count} anchors (own {own.value:.3f}, without anchors {comparison.controls[2].estimate.value:.3f})"
    )
    if comparison.loses_to:
        best = max(comparison.loses_to, key=lambda control: control.estimate.value)
        headline += f", not surely better than the control, {best.name} ({best.estimate.value:.3f})"
    return Finding(
        slug="relative-representations",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(comparison, curves, count),
        reading="Left: what a linear head that was trained on this network's hidden layer reaches on test rows behind each "
        "encoder, all described by similarities to the same training rows. Right: how high a test row itself comes (mean "
        "reciprocal rank, 1 is best) when the other network's space is searched with this network's vector of it.",
        advice=_advice(comparison, loss),
        seed=budget.seed,
        caveats=(
            "The second network is the same architecture trained here by the subject's recipe from another seed; compare with a "
            "model of your own by: theodolite run relative-representations --first A.npy --second B.npy.",
            "A trained classifier keeps the classes and drops what tells rows of one class apart, so a low rank of single rows "
            "goes with good stitching; an untrained network keeps much of the inputs, so its rank can be the higher one.",
            f"Activations are standardised by the anchors; up to {_ROWS:,} training and {_TEST:,} test rows.",
        ),
    )


def _standardized(space: _Space, rows: Tensor) -> Tensor:
    """The layer's own coordinates in units of their deviation on the training rows, for the head without anchors."""
    deviation = space.train.std(dim=0)
    return (rows - space.train.mean(dim=0)) / torch.where(deviation > 0, deviation, 1.0)


def _given_direction(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a direction in both spaces (where no unit fires there is none)."""
    kept = (a.abs().amax(dim=1) > 0) & (b.abs().amax(dim=1) > 0)
    return a[kept], b[kept]


def latent_agreement_of(a: Tensor, b: Tensor) -> Estimate:
    """Mean reciprocal rank from A to B with a bootstrap interval over items; rows without direction are left out."""
    one, two = _given_direction(a, b)
    return bootstrap(item_agreement(one, two, k=1).reciprocal_rank, unit="MRR")


def _curves(one: _Space, two: _Space, untrained: _Space, index: np.ndarray, seed: int) -> dict[str, list[Estimate]]:
    """Mean reciprocal rank with the first so many anchors, for each number of them."""
    curves: dict[str, list[Estimate]] = {"relative": [], "anchors in another order": [], "an untrained network": []}
    drawn = np.random.default_rng(seed).permutation(index)
    for count in _sizes(len(index)):
        p, q = _projections(one, two, drawn[:count])
        r = _projections(one, untrained, drawn[:count])[1]
        a, b = p.encode(one.test), q.encode(two.test)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        curves["relative"].append(latent_agreement_of(a, b))
        curves["anchors in another order"].append(latent_agreement_of(a[:, order], b))
        curves["an untrained network"].append(latent_agreement_of(a, r.encode(untrained.test)))
    return curves


def _sizes(count: int) -> list[int]:
    return sorted({*(size for size in _SIZES if size < count), count})


def _figure(comparison: Comparison, curves: dict[str, list[Estimate]], count: int) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.14)
    chance, permuted, plain, untrained, own = (control.estimate for control in comparison.controls)
    bars = {
        "own network": own, "another seed": comparison.estimate, "no anchors": plain, "permuted anchors": permuted,
        "untrained": untrained, "chance": chance,
    }  # fmt: skip
    figure.add_trace(
        go.Bar(
            x=list(bars), y=[bar.value for bar in bars.values()], showlegend=False, name="head",
            marker={"color": [INKS[2], INKS[0], INKS[1], INKS[1], INKS[6], INKS[6]]},
            error_y={
                "type": "data", "symmetric": False, "array": [bar.high - bar.value for bar in bars.values()],
                "arrayminus": [bar.value - bar.low for bar in bars.values()],
            },
        ), row=1, col=1,
    )  # fmt: skip
    for (name, found), ink in zip(curves.items(), (INKS[0], INKS[1], INKS[6]), strict=True):
        band_line(
            figure, _sizes(count), [each.value for each in found], name=name, ink=ink,
            low=[each.low for each in found], high=[each.high for each in found], row=1, col=2,
        )  # fmt: skip
    figure.update_yaxes(title_text=comparison.estimate.unit, row=1, col=1)
    figure.update_xaxes(title_text="anchors", type="log", row=1, col=2)
    figure.update_yaxes(title_text="mean reciprocal rank", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.2}, height=430)
    return figure


def _advice(comparison: Comparison, loss: Estimate) -> str:
    if comparison.loses_to:
        names = "; ".join(control.name for control in comparison.loses_to)
        return (
            f"These rows do not show that stitching works: it does not surely beat {names}. Take more test rows or a task that "
            "needs the hidden layer before an encoder is exchanged."
        )
    how = "fit RelativeProjection on both networks with the same anchor_index, and put them together by stitch"
    if loss.low > 0:
        return f"A new training of this network can serve behind the old head at a loss of {loss}, without training: {how}."
    return f"A new training of this network can serve behind the old head without training and without a loss that shows: {how}."
