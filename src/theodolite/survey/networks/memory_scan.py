"""The chart of HiPPO memories: how long a memory the series ask for, and how long the network's layers have."""

__all__ = ["memory_words", "needed_words"]

import copy

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import nn

from theodolite.core.estimate import Comparison, Control, Estimate, format_number, mean_of_runs, proportion
from theodolite.core.parallel import seeds_for
from theodolite.core.subject import Subject
from theodolite.networks.hippo import MemoryScan, memory_scan, timescale_report
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding
from theodolite.survey.networks.layers import Kernel, channel_memory, gallery, kernels_of, lengths_read, memory_bars

_NAMES = {"legs": "LegS", "legt": "LegT", "fout": "FouT", "foud": "FouD", "lagt": "LagT"}
_SHORTEST, _FEWEST = 16, 10  # steps, and rows of each part
_BLOCKS = 5  # stretches of test times below which no gain is called sure: fewer agree by chance in more than 1 of 20
_DEALS = 5  # random choices of channels
_GALLERY = (
    "the kernels of five channels, from the shortest to the longest memory, over the basis functions that they started from "
    "(grey, where the start has some); last, the memory, 1/dt, of all channels."
)


def needed_words(scan: MemoryScan, target: str) -> str:
    """What the memory is needed for, in a sentence without its end; target: what is told from it."""
    error, last = (format_number(round(e.value, 3)) for e in (scan.needed_error, scan.last_error))
    unit = scan.needed_error.unit
    if scan.needed_measure is None:
        return f"{target} needs no memory: read from the last values alone the error is {last} {unit}, and no memory beats it"
    more = "at least " if scan.wanted else ""
    if not _sure(scan):
        why = "which these rows do not tell apart"
        if scan.gain.n is not None and scan.gain.n < _BLOCKS:
            stretches = "1 independent stretch is" if scan.gain.n == 1 else f"{scan.gain.n} independent stretches are"
            why = f"and {stretches} too few to tell"
        return (
            f"{target} shows no sure gain from memory: of {more}about {scan.needed:.0f} steps the error is {error} {unit}, from "
            f"the last values {last}, {why}"
        )
    return (
        f"{target} needs {more}about {scan.needed:.0f} steps of memory: read from it the error is {error} {unit}, from the "
        f"last values {last}"
    )


def _sure(scan: MemoryScan) -> bool:
    """Whether memory gains on the test rows; an interval over a few stretches of one series says nothing."""
    return scan.gain.low > 0 and (scan.gain.n is None or scan.gain.n >= _BLOCKS)


def memory_words(scan: MemoryScan) -> str:
    """What the best states hold of the windows, in a sentence without its end."""
    measure, steps = scan.chosen
    ours, random = (format_number(round(e.value, 3)) for e in (scan.chosen_recall, scan.random_recall))
    return (
        f"{scan.n_state} states of {_NAMES[measure]} over {steps:.0f} steps rebuild windows of {scan.steps} with error "
        f"{ours} {scan.chosen_recall.unit}, random frequencies with {random}"
    )


def _refusal(subject: Subject) -> str | None:
    return None if kernels_of(subject.predictor) else _not_scanned(subject)


def _not_scanned(subject: Subject) -> str | None:
    """Why the data cannot be scanned, None where they can."""
    if subject.data.modality != "series":
        return f"needs series data, or a network that holds state space layers; these data are {subject.data.modality}"
    steps = subject.data.train.x.shape[1]
    if steps < _SHORTEST:
        return f"needs series of at least {_SHORTEST} steps; these have {steps}"
    if not bool((subject.data.train.x.std(dim=(0, 1)) > 0).any()):
        return "needs series that change; these are constant"
    if any(bool((part.y == part.y[:1]).all()) for part in (subject.data.train, subject.data.test)):
        return "needs a target that changes in the training and the test rows"
    return None


def _cost(subject: Subject) -> float:
    if _not_scanned(subject) is not None:
        return 10.0
    length, channels = subject.data.shape
    rows = sum(min(3000, len(part)) for part in subject.data.parts.values())
    return 2 + 2e-6 * rows * length * min(8, channels) * np.log2(max(2, length)) / 8


@chart("hippo", needs=Needs(rows=_FEWEST, test=_refusal), cost=_cost)
def memory(subject: Subject, budget: Budget) -> Finding:
    """How long a memory the series and their target ask for, and how long the network's layers have."""
    kernels = kernels_of(subject.predictor)
    if _not_scanned(subject) is not None:
        return _inside(subject, kernels, budget)
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
        "error less than from the last values, on the same rows": scan.gain,
        "error of the rebuilt windows": scan.chosen_recall,
        "memory that rebuilds the windows best": Estimate.exact(scan.chosen[1], "steps"),
    }
    target = "The next value" if subject.data.forecasts else "The class" if subject.data.classes else "The target"
    headline = f"{needed_words(scan, target)}; {memory_words(scan)}"
    steps = _memory_of(subject, scan.steps)
    if steps is not None:
        short, covers = int((steps < scan.needed).sum()), int((steps >= scan.steps).sum())
        numbers["channels of the network that remember less than the target needs"] = proportion(short, len(steps))
        numbers["channels of the network whose memory covers the series"] = proportion(covers, len(steps))
        numbers["median memory of the network's channels"] = Estimate.exact(float(np.median(steps)), "steps")
        headline += f"; {short} of the network's {len(steps)} channels remember less than the target needs"
    return Finding(
        slug="hippo",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(subject, scan, kernels, steps),
        reading="Above: how well a linear readout rebuilds all lags of a window from states that remember so many steps; 1 is "
        "what the mean alone gives. LegT and FouT end at their memory, LegS fades. Below it: how well the states at a "
        "window's end tell the target."
        + (
            f" Then {_GALLERY}"
            if kernels
            else ""
            if steps is None
            else " Last, the memory, 1/dt, of the network's channels."
        ),
        advice=_advice(scan, steps),
        seed=budget.seed,
        caveats=(
            "Both readouts are linear, so a network may need less or more memory than they do.",
            "The memory was chosen on the validation rows (for the target the shortest within one standard error of the best); "
            "the errors are those on the test rows.",
        ),
    )


def _memory_of(subject: Subject, steps: int) -> np.ndarray | None:
    """1/dt of the network's channels, of layers that are not this package's too; None where there are none."""
    if not subject.is_network or all(n.split(".")[-1] != "log_dt" for n, _ in subject.predictor.named_parameters()):
        return None
    return timescale_report(subject.predictor, steps).memory_steps.to_numpy()


# ---- a network with such layers, whatever its data


def _inside(subject: Subject, kernels: dict[str, Kernel], budget: Budget) -> Finding:
    """How long the channels remember, and what the network loses without those that remember longest."""
    network, data = subject.predictor, subject.data
    steps = channel_memory(kernels)
    lengths = lengths_read(network, kernels, data.test.x[:1])
    longest = max(lengths.values(), default=0)
    count = max(1, len(steps) // 4)
    whole = subject.quality()
    cut = subject.quality(_silenced(network, np.argsort(-steps, kind="stable")[:count]))
    by_chance = [
        subject.quality(_silenced(network, np.random.default_rng(seed).permutation(len(steps))[:count])).value
        for seed in seeds_for(budget.seed, _DEALS)
    ]
    chance = mean_of_runs(by_chance, unit=subject.metric)
    comparison = Comparison(
        f"{subject.metric} without the {count} channels that remember longest",
        cut,
        (
            Control(f"without {count} random channels", chance, "random"),
            Control("the whole network", whole, "reference"),
        ),
        larger_is_better=False,
    )
    low, middle, high = np.quantile(steps, [0.1, 0.5, 0.9])
    numbers = {
        f"{subject.metric} of the network": whole,
        f"{subject.metric} without the {count} channels that remember longest": cut,
        f"{subject.metric} without {count} random channels": chance,
        "median memory of the network's channels": Estimate.exact(float(middle), "steps"),
    }
    headline = (
        f"Four fifths of the network's {len(steps)} state space channels remember {low:.0f} to {high:.0f} steps, the median "
        f"{middle:.0f}"
    )
    if longest:
        covers = np.concatenate(
            [1 / k.dt.detach().double().cpu().numpy() >= lengths.get(n, longest) for n, k in kernels.items()]
        )
        numbers["channels of the network whose memory covers what they read"] = proportion(
            int(covers.sum()), len(steps)
        )
        headline += f", of {longest:,} that they read"
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.16)
    gallery(figure, kernels, lengths, row=1)
    memory_bars(figure, steps, longest or None, row=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, height=640)
    return Finding(
        slug="hippo",
        headline=f"{headline}; without the {count} that remember longest {subject.metric} is {cut.value:.3f}, without {count} "
        f"random ones {chance.value:.3f} (all: {whole.value:.3f}).",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading=f"Above: {_GALLERY} The dotted line is what the layers read.",
        advice=_inside_advice(comparison, float(steps.max()), longest),
        seed=budget.seed,
        caveats=(
            "A channel is silenced by an output row C of zero; what it passes straight on stays. Memory is 1/dt, which the "
            "real parts of A stretch where they were trained.",
            f"The random control is the mean of {_DEALS} choices; its interval is over them, the other over rows.",
        ),
    )  # fmt: skip


def _silenced(network: nn.Module, channels: np.ndarray) -> nn.Module:
    """A copy in which these channels, numbered through all layers, have no output weights."""
    again = copy.deepcopy(network)
    first = 0
    with torch.no_grad():
        for kernel in kernels_of(again).values():
            here = channels[(channels >= first) & (channels < first + kernel.d_model)] - first
            kernel.C[torch.from_numpy(here).to(kernel.C.device)] = 0.0
            first += kernel.d_model
    return again


def _inside_advice(comparison: Comparison, longest: float, read: int) -> str:
    text = (
        "The answer hangs on the long memories: keep time steps that small when the network is trained again."
        if comparison.beats(comparison.controls[0])
        else "Channels with a long memory are needed no more, for sure, than others are: shorter memories may do."
    )
    if read and longest < read:
        text += f" No channel remembers all that it reads; where early steps may matter, start with dt_min near {1 / read:.2g}."
    return f"{text} theodolite.networks.hippo.timescale_report(network, length) gives every channel."


def _advice(scan: MemoryScan, lengths: np.ndarray | None) -> str:
    if scan.needed_measure is None:
        text = "A model of this target need not look further back than its last values."
    elif not _sure(scan):
        text = "Memory gains nothing that these test rows could tell: a model of the last values is the simpler start."
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


def _figure(subject: Subject, scan: MemoryScan, kernels: dict[str, Kernel], steps: np.ndarray | None) -> go.Figure:
    rows = 2 + bool(kernels) + (steps is not None)
    figure = make_subplots(rows=rows, cols=1, vertical_spacing=0.3 / rows)
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
    if kernels:
        gallery(figure, kernels, lengths_read(subject.predictor, kernels, subject.data.test.x[:1]), row=3)
    if steps is not None:
        memory_bars(figure, steps, scan.needed, row=rows)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.08}, height=300 * rows
    )
    return figure
