"""The chart of HiPPO memories: how long a memory the series ask for, and how long the network's layers have."""

__all__ = ["memory_words", "needed_words"]

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import nn

from theodolite.core.estimate import Comparison, Control, Estimate, format_number, proportion
from theodolite.core.subject import Subject
from theodolite.networks.hippo import MemoryScan, memory_scan, timescale_report
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_NAMES = {"legs": "LegS", "legt": "LegT", "fout": "FouT", "foud": "FouD", "lagt": "LagT"}
_SHORTEST = 16


def needed_words(scan: MemoryScan, target: str) -> str:
    """What the memory is needed for, in a sentence without its end; target: what is told from it."""
    error, last = (format_number(round(e.value, 3)) for e in (scan.needed_error, scan.last_error))
    unit = scan.needed_error.unit
    if scan.needed_measure is None:
        return f"{target} needs no memory: read from the last values alone the error is {last} {unit}, and no memory beats it"
    more = "at least " if scan.wanted else ""
    if not scan.needed_error.high < scan.last_error.low:
        return (
            f"{target} shows no sure gain from memory: of {more}about {scan.needed:.0f} steps the error is {error} {unit}, from "
            f"the last values {last}, which these rows do not tell apart"
        )
    return (
        f"{target} needs {more}about {scan.needed:.0f} steps of memory: read from it the error is {error} {unit}, from the "
        f"last values {last}"
    )


def memory_words(scan: MemoryScan) -> str:
    """What the best states hold of the windows, in a sentence without its end."""
    measure, steps = scan.chosen
    return (
        f"{scan.n_state} states of {_NAMES[measure]} over {steps:.0f} steps rebuild windows of {scan.steps} with error "
        f"{scan.chosen_recall.value:.2f} {scan.chosen_recall.unit}, random frequencies with {scan.random_recall.value:.2f}"
    )


def _refusal(subject: Subject) -> str | None:
    steps = subject.data.train.x.shape[1]
    if steps < _SHORTEST:
        return f"needs series of at least {_SHORTEST} steps; these have {steps}"
    if not bool((subject.data.train.x.std(dim=(0, 1)) > 0).any()):
        return "needs series that change; these are constant"
    return None


def _cost(subject: Subject) -> float:
    length, channels = subject.data.shape
    rows = sum(min(3000, len(part)) for part in subject.data.parts.values())
    return 2 + 2e-6 * rows * length * min(8, channels) * np.log2(max(2, length)) / 8


@chart("hippo", needs=Needs(modalities=("series",), test=_refusal), cost=_cost)
def memory(subject: Subject, budget: Budget) -> Finding:
    """How long a memory the series and their target ask for, and how many of the network's channels have one."""
    scan = memory_scan(subject.data, seed=budget.seed)
    comparison = Comparison(
        f"error of all of a window rebuilt from {scan.n_state} states a channel",
        scan.chosen_recall,
        (
            Control(f"{scan.n_state} random frequencies, best memory", scan.random_recall, "random"),
            Control("the same states on windows in random order", scan.shuffled_recall, "null"),
        ),
        larger_is_better=False,
    )
    numbers = {
        "memory that the target needs": Estimate.exact(scan.needed, "steps"),
        "error of the target from that memory": scan.needed_error,
        "error of the target from the last values": scan.last_error,
        "error of the rebuilt windows": scan.chosen_recall,
        "memory that rebuilds the windows best": Estimate.exact(scan.chosen[1], "steps"),
    }
    target = "The next value" if subject.data.forecasts else "The class" if subject.data.classes else "The target"
    headline = f"{needed_words(scan, target)}; {memory_words(scan)}"
    layers = _layers(subject)
    lengths = np.concatenate([timescale_report(layer, scan.steps).memory_steps for layer in layers]) if layers else None
    if lengths is not None:
        short, covers = int((lengths < scan.needed).sum()), int((lengths >= scan.steps).sum())
        numbers["channels of the network that remember less than the target needs"] = proportion(short, len(lengths))
        numbers["channels of the network whose memory covers the series"] = proportion(covers, len(lengths))
        numbers["median memory of the network's channels"] = Estimate.exact(float(np.median(lengths)), "steps")
        headline += f"; {short} of the network's {len(lengths)} channels remember less than the target needs"
    return Finding(
        slug="hippo",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(scan, lengths),
        reading="Above: how well a linear readout rebuilds all lags of a window from states that remember so many steps; 1 is "
        "what the mean alone gives. LegT and FouT end at their memory, LegS fades. In the middle: how well the states at a "
        "window's end tell the target."
        + (" Below: the memory, 1/dt, that the channels of the network's layers have." if lengths is not None else ""),
        advice=_advice(scan, lengths),
        seed=budget.seed,
        caveats=(
            "Both readouts are linear, so a network may need less or more memory than they do.",
            "The memory was chosen on the validation rows (for the target the shortest within one standard error of the best); "
            "the errors are those on the test rows.",
        ),
    )


def _layers(subject: Subject) -> list[nn.Module]:
    """The network, where it holds a state space layer."""
    if not subject.is_network:
        return []
    steps = [name for name, _ in subject.predictor.named_parameters() if name.split(".")[-1] == "log_dt"]
    return [subject.predictor] if steps else []


def _advice(scan: MemoryScan, lengths: np.ndarray | None) -> str:
    if scan.needed_measure is None:
        text = "A model of this target need not look further back than its last values."
    else:
        text = (
            f"As features take theodolite.networks.hippo.HippoMemory({scan.needed_measure!r}, {scan.n_state}, "
            f"memory_steps={scan.needed:.0f}); in a state space layer let dt_min be about {1 / scan.needed:.2g}."
        )
        if lengths is not None and bool((lengths < scan.needed).all()):
            text += " No channel of the network remembers that long: train it again with smaller time steps."
    if scan.wanted:
        text += " The scan ended before the error did: give longer windows."
    return text


def _figure(scan: MemoryScan, lengths: np.ndarray | None) -> go.Figure:
    rows = 2 if lengths is None else 3
    figure = make_subplots(rows=rows, cols=1, vertical_spacing=0.14)
    grid = scan.memory_steps.tolist()
    for place, measure in enumerate(scan.measures):
        ink, name = INKS[place], _NAMES[measure]
        band_line(figure, grid, scan.recall[place].tolist(), name=name, ink=ink, row=1, col=1)
        band_line(figure, grid, scan.target[place].tolist(), name=name, ink=ink, row=2, col=1, legend=False)
    band_line(figure, grid, scan.random.tolist(), name="random frequencies", ink=INKS[6], dash="dot", row=1, col=1)
    level_line(figure, scan.last_error.value, "last values alone", row=2)
    figure.update_xaxes(title_text="memory, steps", type="log", row=2, col=1)
    figure.update_xaxes(type="log", row=1, col=1)
    figure.update_yaxes(title_text="error of the window", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="error of the target", rangemode="tozero", row=2, col=1)
    if lengths is not None:
        edges = np.geomspace(lengths.min() * 0.999, lengths.max() * 1.001, 13)
        counts, _ = np.histogram(lengths, edges)
        middles = np.sqrt(edges[1:] * edges[:-1])
        figure.add_trace(
            go.Bar(x=middles, y=counts, width=np.diff(edges) * 0.9, marker_color=INKS[5], showlegend=False),
            row=3,
            col=1,
        )
        figure.add_vline(x=scan.needed, line_dash="dot", line_width=1, line_color=INKS[6], row=3, col=1)  # pyright: ignore[reportArgumentType]
        figure.update_xaxes(title_text="memory of the network's channels, steps", type="log", row=3, col=1)
        figure.update_yaxes(title_text="channels", row=3, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.08}, height=300 * rows
    )
    return figure
