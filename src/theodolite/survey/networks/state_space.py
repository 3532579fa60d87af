"""The chart of diagonal state space models: what the layers of a network remember, or what such a network makes of series."""

__all__ = ["kernels_of"]

import copy
import math
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor, nn

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.parallel import one_thread, seeds_for
from theodolite.core.subject import Rows, Subject
from theodolite.core.train import Recipe, train
from theodolite.networks.diagonal_ssm import DiagonalSSMKernel, S4DClassifier, kernel_summary
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding
from theodolite.survey.networks import layers
from theodolite.survey.networks.layers import changed, lengths_read, memory_bars

_MOVED = 0.1
_DEALS = 5  # random choices of the steps that kernels keep
_CURVE_ROWS = 256
_STRONGEST = 4
_RATE = 50_000  # samples a second that the baseline is trained with on one slow core: sets its epochs, so they repeat
_MOST_EPOCHS, _FEWEST_EPOCHS = 20, 3
_LAST = 32  # steps that a linear forecast reads; of series with a class or a value each it reads all, within _COLUMNS
_COLUMNS = 1024
_NEARLY = 0.95
_KINDS: tuple[Literal["closed-form", "null"], ...] = ("closed-form", "null")


def kernels_of(network: Any) -> dict[str, DiagonalSSMKernel]:
    """The diagonal state space kernels inside a network by name; none in what is no network."""
    return {
        name: kernel for name, kernel in layers.kernels_of(network).items() if isinstance(kernel, DiagonalSSMKernel)
    }


def _refusal(subject: Subject) -> str | None:
    if kernels_of(subject.predictor) or subject.data.modality == "series":
        return None
    return "needs series data, or a network that holds S4D layers"


def _cost(subject: Subject) -> float:
    if kernels_of(subject.predictor):
        return 20.0
    rows, epochs = _training_size(subject, 60.0)
    return 10.0 + rows * epochs * subject.data.shape[0] / _RATE


@chart("diagonal-state-space", needs=Needs(rows=10, test=_refusal), cost=_cost)
def diagonal_state_space(subject: Subject, budget: Budget) -> Finding:
    """The memory of a network's state space layers; for series and another model, what such a network reaches."""
    with one_thread():
        if kernels_of(subject.predictor):
            return _inside(subject, budget)
        return _beside(subject, budget)


# ---- a network with such layers


def _inside(subject: Subject, budget: Budget) -> Finding:
    network, data = subject.predictor, subject.data
    kernels = kernels_of(network)
    lengths = lengths_read(network, kernels, data.test.x[:1])
    longest = max(lengths.values(), default=0)
    table = _summary(kernels, lengths)
    median = round(float(np.median(table["effective_length"])))
    moved, states = _moved(kernels)
    whole = subject.quality()
    with changed(kernels, _newest(median)):
        cut = subject.quality(network)
    dealt = []
    for seed in seeds_for(budget.seed, _DEALS):
        with changed(kernels, _dealt(median, seed)):
            dealt.append(subject.quality(network).value)
    numbers = {
        "median memory of a kernel": Estimate.exact(median, "steps"),
        f"{subject.metric} of the network": whole,
        "layers' kernels": Estimate.exact(len(kernels)),
    }
    headline = f"The median memory of the {len(table):,} kernels is {median:,} steps"
    if longest:
        numbers["length of the series"] = Estimate.exact(longest, "steps")
        headline += f" (series have {longest:,})"
    if states:
        share = 100 * moved / states
        numbers["states that moved by more than 10 % in frequency"] = Estimate.exact(share, "%")
        headline += f"; {share:.0f} % of the states moved by more than 10 % in frequency"
        numbers[f"{subject.metric} with the initial eigenvalues put back"] = subject.quality(_put_back(network))
    comparison = Comparison(
        f"{subject.metric} with every kernel cut after {median:,} steps",
        cut,
        (
            Control(
                f"{median:,} random steps of every kernel kept", mean_of_runs(dealt, unit=subject.metric), "random"
            ),
            Control("whole kernels", whole, "reference"),
        ),
    )
    figure = _panels(kernels, table, longest, "steps that are needed")
    _curve(figure, subject, kernels, longest, budget.seed)
    return Finding(
        slug="diagonal-state-space",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="Every channel of a state space layer is a sum of damped oscillators. Top left: their eigenvalues, pale where "
        "they started; height is frequency, distance to the left of 0 is decay. Top right: the strongest channels' kernels, "
        "the weight of an input by its age. Bottom left: the fewest steps that hold 95 % of a kernel's energy. Bottom right: "
        "the score on validation rows when kernels keep only their newest steps (blue), and as many at random (orange).",
        advice=_inside_advice(median, longest, cut, whole),
        seed=budget.seed,
        caveats=(
            "Frequencies are those of A; the time steps of the channels, which stretch them all, are not counted.",
            f"The random control is the mean of {_DEALS} choices; its interval is over them, the other over rows.",
            *(() if states else ("Where the eigenvalues started is not known: they were drawn at random.",)),
        ),
    )  # fmt: skip


def _summary(kernels: dict[str, DiagonalSSMKernel], lengths: dict[str, int]) -> Any:
    tables = [kernel_summary(kernel, length=lengths.get(name)) for name, kernel in kernels.items()]
    return pd.concat(tables, ignore_index=True)


def _known(kernel: DiagonalSSMKernel) -> bool:
    return kernel.init != "random"


def _moved(kernels: dict[str, DiagonalSSMKernel]) -> tuple[int, int]:
    """States whose Im A moved by more than a tenth of |A| at the start, and states whose start is known."""
    moved = states = 0
    for kernel in filter(_known, kernels.values()):
        start, now = kernel.initial_eigenvalues(), kernel.eigenvalues().detach().cpu()
        moved += int(((now.imag - start.imag).abs() > _MOVED * start.abs()).sum())
        states += start.numel()
    return moved, states


def _put_back(network: nn.Module) -> nn.Module:
    again = copy.deepcopy(network)
    for kernel in filter(_known, kernels_of(again).values()):
        kernel.set_eigenvalues(kernel.initial_eigenvalues().to(kernel.real.device))
    return again


def _newest(steps: int) -> Any:
    """Keep the newest ``steps`` of a kernel (H, L)."""
    return lambda _, __, kernel: kernel * (torch.arange(kernel.shape[1], device=kernel.device) < steps)


def _dealt(steps: int, seed: int) -> Any:
    """Keep ``steps`` random steps of each channel's kernel (H, L), the same at every call."""

    def keep(_: nn.Module, __: Any, kernel: Tensor) -> Tensor:
        drawn = torch.rand(kernel.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
        return kernel * (drawn < steps).to(kernel.device)

    return keep


def _panels(kernels: dict[str, DiagonalSSMKernel], table: Any, longest: int, last: str) -> go.Figure:
    titles = ("eigenvalues", "kernels of the strongest channels", "memory of the channels", last)
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.12, vertical_spacing=0.16)
    start = [k.initial_eigenvalues().flatten() for k in kernels.values() if _known(k)]
    now = torch.cat([k.eigenvalues().detach().cpu().flatten() for k in kernels.values()]).numpy()
    for name, values, ink, size in (
        ("at the start", np.unique(torch.cat(start).numpy()) if start else None, INKS[6], 9),
        ("now", now, INKS[0], 4),
    ):
        if values is not None:
            figure.add_scatter(
                x=np.real(values).tolist(), y=np.imag(values).tolist(), mode="markers", name=name,
                marker={"color": ink, "size": size, "opacity": 0.5}, row=1, col=1,
            )  # fmt: skip
    shown = longest or int(table["effective_length"].max())
    for ink, (label, values) in zip(INKS, _strongest(kernels, shown), strict=False):
        figure.add_scatter(
            x=list(range(shown)),
            y=values.tolist(),
            mode="lines",
            name=label,
            line={"color": ink, "width": 1},
            row=1,
            col=2,
        )
    memory_bars(figure, table["effective_length"].to_numpy(), None, row=2)
    for row, col, x, y in ((1, 1, "real part", "imaginary part"), (1, 2, "age of the input, steps", "weight")):
        figure.update_xaxes(title_text=x, row=row, col=col)
        figure.update_yaxes(title_text=y, row=row, col=col)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 60, "b": 50}, height=720, showlegend=False)
    return figure


def _strongest(kernels: dict[str, DiagonalSSMKernel], length: int) -> list[tuple[str, Tensor]]:
    """The channels with most energy in their kernels over ``length`` steps, by layer and number."""
    found = []
    for name, kernel in kernels.items():
        with torch.no_grad():
            values = kernel(length).double().cpu()
        found += [(float(row.square().sum()), f"{name}, channel {h}", row) for h, row in enumerate(values)]
    found.sort(key=lambda one: -one[0])
    return [(label, row) for _, label, row in found[:_STRONGEST]]


def _curve(figure: go.Figure, subject: Subject, kernels: dict[str, DiagonalSSMKernel], longest: int, seed: int) -> None:
    """Scores on validation rows by the number of steps that every kernel keeps."""
    if longest < 2:
        return
    rows = subject.data.validation.head(_CURVE_ROWS)
    steps = sorted({*(2**i for i in range(int(math.log2(longest)) + 1)), longest})
    for name, ink, keep in (
        ("newest steps kept", INKS[0], _newest),
        ("random steps kept", INKS[1], lambda kept: _dealt(kept, seed)),
    ):
        found = []
        for kept in steps:
            with changed(kernels, keep(kept)):
                found.append(float(subject.correct(subject.predictor, rows).mean()))
        band_line(figure, steps, found, name=name, ink=ink, row=2, col=2)
    figure.update_xaxes(type="log", title_text="steps kept", row=2, col=2)
    figure.update_yaxes(title_text=subject.metric, row=2, col=2)


def _inside_advice(median: int, longest: int, cut: Estimate, whole: Estimate) -> str:
    every = "theodolite.networks.diagonal_ssm.kernel_summary(layer) gives every channel."
    if longest and median >= _NEARLY * longest:
        return (
            "Half of the channels hold nearly the whole series. Where some need less, a larger dt_max gives shorter kernels to "
            f"start from. {every}"
        )
    if cut.high >= whole.value:
        return (
            f"The network does nearly as well when each layer sees no more than its last {median:,} steps, so windows of that "
            f"length for each layer may do. {every}"
        )
    return (
        f"The network needs more than the {median:,} steps that half of its kernels hold: do not cut its input into windows; "
        f"S4D.recurrence() streams it with a state that carries the whole past. {every}"
    )


# ---- beside another model of the same series


class _Scaled(nn.Module):
    """A network that was trained on standardised series, and values where there are some, on series as they are.

    forecasts: it sees series less their last values and tells the change of the first channel, since levels drift.
    """

    def __init__(
        self, network: nn.Module, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor] | None, forecasts: bool
    ) -> None:
        super().__init__()
        self.network, self.x, self.y, self.forecasts = network, x, y, forecasts

    def forward(self, x: Tensor) -> Tensor:
        seen = x - x[:, -1:] if self.forecasts else x
        out = self.network((seen - self.x[0]) / self.x[1])
        if self.y is not None:
            out = out * self.y[1] + self.y[0]
        return out + x[:, -1, :1] if self.forecasts else out


def _moments(values: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    deviation = values.std(dim=over)
    return values.mean(dim=over), torch.where(deviation > 0, deviation, 1.0)


def _training_size(subject: Subject, seconds: float) -> tuple[int, int]:
    """Rows and epochs that the budget allows, the same on every machine."""
    samples = 0.7 * seconds * _RATE
    n, length = len(subject.data.train), subject.data.shape[0]
    rows = min(n, max(64, int(samples / (_FEWEST_EPOCHS * length))))
    return rows, min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, int(samples / (rows * length))))


def _baseline(subject: Subject, rows: Rows, epochs: int, seed: int) -> _Scaled:
    data, values = subject.data, subject.data.task == "regression"
    seen, target = rows.x, rows.y
    if data.forecasts:
        seen, target = seen - seen[:, -1:], target - rows.x[:, -1, 0]
    x, y = _moments(seen, (0, 1)), _moments(target, (0,)) if values else None
    network = S4DClassifier(
        seen.shape[2], 1 if values else len(data.classes), d_model=32, n_state=32, seed=seed,
        pooling="last" if data.forecasts else "mean",
    )  # fmt: skip
    recipe = Recipe(epochs=epochs, batch_size=16, lr=1e-2, seed=seed, loss="squared" if values else "cross-entropy")
    train(network, (seen - x[0]) / x[1], target if y is None else (target - y[0]) / y[1], recipe=recipe)
    return _Scaled(network, x, y, data.forecasts).eval()


def _linear(subject: Subject, rows: Rows, steps: int) -> Any:
    """A linear model of the last ``steps`` steps, fitted."""
    width = steps * rows.x.shape[2]
    last: Any = FunctionTransformer(_last_columns, kw_args={"width": width})
    top: Any = (
        RidgeCV(np.logspace(-3, 5, 17)) if subject.data.task == "regression" else LogisticRegression(max_iter=2000)
    )
    return make_pipeline(last, StandardScaler(), top).fit(rows.x.flatten(1).double().numpy(), rows.y.numpy())


def _last_columns(x: np.ndarray, width: int) -> np.ndarray:
    return x[:, -width:]


def _beside(subject: Subject, budget: Budget) -> Finding:
    data = subject.data
    count, epochs = _training_size(subject, budget.seconds)
    rows = data.train.head(count)
    steps = min(data.shape[0], _LAST if data.forecasts else max(_LAST, _COLUMNS // data.shape[1]))
    last = f"all {steps} steps" if steps == data.shape[0] else f"the last {steps} steps"
    trained = _baseline(subject, rows, epochs, budget.seed)
    kernels = kernels_of(trained)
    table = _summary(kernels, dict.fromkeys(kernels, data.shape[0]))
    median = round(float(np.median(table["effective_length"])))
    ours, own, linear = subject.quality(trained), subject.quality(), subject.quality(_linear(subject, rows, steps))
    simple = {f"a linear model of {last}": linear, _guess(subject): Estimate.exact(data.chance)}
    comparison = Comparison(
        f"test {subject.metric} of an S4D network trained here",
        ours,
        (
            *(Control(name, found, kind) for (name, found), kind in zip(simple.items(), _KINDS, strict=True)),
            Control(f"the subject's own {subject.model_name}", own, "reference"),
        ),
    )
    figure = _panels(kernels, table, data.shape[0], "the models")
    bars = {"S4D": ours, "linear": linear, subject.model_name: own}
    figure.add_bar(
        x=list(bars), y=[e.value for e in bars.values()], marker_color=[INKS[0], INKS[1], INKS[6]],
        error_y={
            "type": "data", "symmetric": False, "array": [e.high - e.value for e in bars.values()],
            "arrayminus": [e.value - e.low for e in bars.values()],
        },
        row=2, col=2,
    )  # fmt: skip
    figure.update_yaxes(title_text=subject.metric, row=2, col=2)
    return Finding(
        slug="diagonal-state-space",
        headline=f"A state space network trained here reaches {subject.metric} {ours.value:.3f}, the subject's own model "
        f"{own.value:.3f}, a linear model of {last} {linear.value:.3f}; the median memory of its kernels is "
        f"{median:,} steps.",
        numbers={
            f"{subject.metric} of the S4D network": ours,
            f"{subject.metric} of the subject's own model": own,
            f"{subject.metric} of a linear model of {last}": linear,
            "median memory of a kernel": Estimate.exact(median, "steps"),
            "epochs of training": Estimate.exact(epochs),
            "rows of training": Estimate.exact(len(rows)),
        },
        comparison=comparison,
        figure=figure,
        reading="A small network of two diagonal state space layers was trained on the same series. Top left: the eigenvalues of "
        "its layers, pale where they started. Top right: the kernels of its strongest channels, the weight of an input by its "
        "age. Bottom left: the fewest steps that hold 95 % of a kernel's energy. Bottom right: the models on the test rows.",
        advice=_beside_advice(ours, own, simple, epochs),
        seed=budget.seed,
        caveats=(
            f"The network has one fixed size (32 channels, 2 layers) and {epochs} epochs on {len(rows):,} rows, set by the time "
            "to plan for; nothing was tuned.",
        ),
    )  # fmt: skip


def _guess(subject: Subject) -> str:
    if subject.data.forecasts:
        return "answering with the last value"
    return "the commonest class" if subject.data.classes else "the mean of the targets"


def _beside_advice(ours: Estimate, own: Estimate, simple: dict[str, Estimate], epochs: int) -> str:
    name, best = max(simple.items(), key=lambda one: one[1].value)
    if ours.low <= best.high:
        return (
            f"It is not told apart from the simplest rival ({name}, {best.value:.3f}): that tells what there is, or the series "
            "are too few for a sequence model. Start from the simple one."
        )
    if ours.value > own.value:
        return (
            "Try theodolite.networks.diagonal_ssm.S4DClassifier in place of the subject's model: it does better after "
            f"{epochs} epochs, and its step() reads a stream at constant cost."
        )
    return (
        f"The subject's own model is ahead of {epochs} epochs of a small S4D network; with more time (--seconds) the network "
        "may grow better."
    )
