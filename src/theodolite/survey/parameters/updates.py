"""The chart of low-rank structure: how much of a real weight update a small core, or a matrix of equal size, can hold."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import InputError, ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.parameters.tucker import budget_ranks, compare_structures, parameter_count
from theodolite.parameters.weights import weight_tensors
from theodolite.survey.chart import Budget, Needs, chart, trainings
from theodolite.survey.figures import INKS, band_line, blank
from theodolite.survey.finding import Finding

_SHARES = (0.05, 0.1, 0.2, 0.4)
_SHOWN = 0.2
_SMALLEST = 256  # entries of a kernel below which no structure saves anything
_RUNS = 3
_NAMES = {
    "tucker": "a Tucker core and its factors",
    "matrix": "a matrix of low rank",
    "cp": "a sum of rank-one kernels",
}


def _no_kernel(subject: Subject) -> str | None:
    try:
        weight_tensors(subject.predictor, kinds=["conv"], min_size=_SMALLEST)
    except ModelError:
        return f"needs a convolution of at least {_SMALLEST} weights; of a matrix the plain low rank is best anyway"
    return None


def _update(subject: Subject, seed: int) -> dict[str, Tensor]:
    """What training changes in each convolution kernel, from the start of ``seed``."""
    if subject.build is None:
        raise InputError(f"{subject.name} cannot be trained again")
    model = subject.build(seed)
    before = {
        weight.name: weight.parameter.detach().clone()
        for weight in weight_tensors(model, kinds=["conv"], min_size=_SMALLEST)
    }
    subject.fit(model, seed=seed)
    after = dict(model.named_parameters())
    return {name: after[name].detach() - start for name, start in before.items()}


def _held(update: Mapping[str, Tensor], seed: int) -> dict[str, list[float]]:
    """Share of the squared norm of all kernels' updates that each structure holds, by share of the numbers."""
    energy = {name: float(delta.square().sum()) for name, delta in update.items()}
    total = sum(energy.values())
    held: dict[str, list[float]] = {method: [] for method in _NAMES}
    for share in _SHARES:
        lost = dict.fromkeys(_NAMES, 0.0)
        for row in compare_structures(update, [share]).to_dict("records"):
            if row["method"] in lost:
                lost[row["method"]] += row["relative_error"] ** 2 * energy[row["layer"]]
        for method, squares in lost.items():
            held[method].append(1 - squares / total)
    held["random"] = [
        sum(_held_at_random(delta, share, seed) for delta in update.values()) / total for share in _SHARES
    ]
    return held


def _held_at_random(delta: Tensor, share: float, seed: int) -> float:
    """Squared norm of what is left of an update in random orthonormal factors of the ranks that the budget has."""
    budget = int(share * delta.numel())
    if budget < parameter_count(delta.shape, [1] * delta.ndim):
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    for mode, rank in enumerate(budget_ranks(delta.shape, budget)):
        factor, _ = torch.linalg.qr(torch.randn(delta.shape[mode], rank, generator=generator))
        delta = torch.tensordot(delta.movedim(mode, -1), factor, dims=1).movedim(-1, mode)
    return float(delta.square().sum())


@chart("flora", needs=Needs(network=True, retrainable=True, test=_no_kernel), cost=trainings(_RUNS + 1))
def tucker_updates(subject: Subject, budget: Budget) -> Finding:
    """How much of what training does to the convolutions fits into few numbers that keep the kernels' axes."""
    seeds = range(budget.seed, budget.seed + _RUNS)
    runs = [_held(_update(subject, seed), seed) for seed in seeds]
    shown = _SHARES.index(_SHOWN)

    def held(method: str, point: int) -> Estimate:
        return mean_of_runs([run[method][point] for run in runs], unit="of the update", within=(0, 1))

    ours, matrix = held("tucker", shown), held("matrix", shown)
    comparison = Comparison(
        f"share of the update in {_SHOWN:.0%} of the numbers",
        ours,
        (
            Control("a matrix of low rank, at most as many numbers", matrix, "closed-form"),
            Control("a sum of rank-one kernels", held("cp", shown), "closed-form"),
            Control("a Tucker core in random directions", held("random", shown), "random"),
        ),
    )
    kernels = weight_tensors(subject.predictor, kinds=["conv"], min_size=_SMALLEST)
    numbers = {
        f"{name}, {share:.0%} of the numbers": held(method, i)
        for method, name in _NAMES.items()
        for i, share in enumerate(_SHARES)
        if share in (0.1, _SHOWN)
    }
    numbers["weights of the convolutions"] = Estimate.exact(sum(w.parameter.numel() for w in kernels), "numbers")
    figure = blank("share of the kernels' numbers", "share of the update that is held")
    lines = {**_NAMES, "random": "a Tucker core in random directions"}
    for (method, name), ink in zip(lines.items(), (INKS[0], INKS[1], INKS[2], INKS[6]), strict=True):
        table = np.array([run[method] for run in runs])
        band_line(
            figure, _SHARES, table.mean(axis=0).tolist(), name=name, ink=ink, low=table.min(axis=0).tolist(),
            high=table.max(axis=0).tolist(), dash="dot" if method == "random" else None,
        )  # fmt: skip
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    names = [repr(kernel.name.rpartition(".")[0]) for kernel in kernels]
    layers = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    verdict = "more than" if ours.value > matrix.value else "not more than"
    return Finding(
        slug="flora",
        headline=f"A Tucker core with {_SHOWN:.0%} of the numbers holds {ours.value:.0%} of what training changes in the "
        f"convolutions ({len(kernels)} of them), {verdict} a matrix of at most that size ({matrix.value:.0%}); a sum of "
        f"rank-one kernels holds {held('cp', shown).value:.0%}.",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="The network is trained from fresh starts, and the change of each convolution kernel is approximated: by a small "
        "core with a factor for each axis, by the best matrix of low rank, by a sum of rank-one kernels, and in random "
        "directions. The higher at the left, the fewer numbers an adapter needs; bands span the runs.",
        advice=f"Adapt the convolutions by theodolite.parameters.tucker.adapt(model, ranks={_SHOWN}, include=[{layers}]) instead "
        "of training them whole, where the first line is high; where it is low, the update has no such structure and needs "
        "more numbers.",
        seed=budget.seed,
        caveats=(
            f"{_RUNS} trainings from fresh starts; the update of a fine-tuning is often of lower rank than that of a training.",
            "A share of the update's squared norm is not a share of the quality.",
        ),
    )
