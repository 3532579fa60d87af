"""Claims of Desai and Shrivastava, 2023, arXiv:2310.11611, on MNIST and in closed form."""

__all__ = ["claims"]

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.errors import TrainingCollapsedError
from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.parameters.pruning_at_init import pruning_scores
from theodolite.parameters.sharing import (
    FoldMap,
    HashedMap,
    RoastMap,
    best_step_sizes,
    compression_curve,
    inner_product_variance,
    share_parameters,
    sketch_inner_product,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale

_SIZES = (784, 300, 100, 10)
_WEIGHTS = sum(a * b for a, b in itertools.pairwise(_SIZES))
_BIASES = sum(_SIZES[1:])
_TRAIN, _VALIDATION = 20_000, 5_000

_STABLE = (
    "training does not depend on sigma, the arbitrary scale of the array (10x fewer weights)",
    "STABLE-RPS is stable where ROAST is not; no number given",
    "accuracies over sigma within 0.005 and >= 0.90; without the division (ROAST) they spread by >= 0.2",
)
_PRUNING = (
    "at 300x sharing beats pruning at initialisation of the same number of weights (MNIST)",
    "better than SNIP, GraSP, SynFlow, magnitude and random at high compression; a figure, no number",
    "sharing >= 0.85, and above SynFlow by 0.04, SNIP by 0.08, GraSP by 0.1, magnitude by 0.4, random by 0.5",
)
_NARROW = (
    "sharing beats a narrower dense network of the same storage (MNIST)",
    "better than small dense networks; a figure, no number",
    "above it by >= 0.02 at each compression",
)
_MARGINS = {"synflow": 0.04, "snip": 0.08, "grasp": 0.1, "magnitude": 0.4, "random": 0.5}


@dataclass(frozen=True, eq=False)
class _Mnist:
    """Rows to train on, to choose step sizes on, and to report on."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; those on MNIST with fewer methods, seeds and step sizes when quick."""
    data = _load_mnist()
    yield from _nothing_lost(data, scale, seed)
    if data is None:
        for claim, paper, threshold in (_STABLE, _PRUNING, _NARROW):
            yield Claim(claim, paper, None, threshold, None, scaled="needs mnist.npz in the folder THEODOLITE_DATA")
    else:
        yield _stability(data, seed)
        yield from _high_compression(data, scale, seed)
    yield _load(seed)
    yield _theory(seed)
    yield _std(seed)
    yield _scores(seed)


def fully_connected(seed: int, sizes: tuple[int, ...] = _SIZES) -> nn.Module:
    """ReLU network, He-normal weights, biases 0 (the pruned rivals do better from it than from torch's own start)."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


def convolutional(seed: int) -> nn.Module:
    """Two convolutions with batch norm and a dense layer, for 28 x 28 images in rows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 10),
    )  # fmt: skip


def narrow_sizes(storage: int) -> tuple[int, ...]:
    """The widest 784-a-b-10 whose weights and biases fit into ``storage``: first a, then b up to 100.

    >>> narrow_sizes(1297)
    (784, 1, 41, 10)
    """
    first = max(1, (storage - 21) // 796)  # a second layer of one unit needs a + 11 numbers and 10 biases
    second = max(1, min(100, (storage - 785 * first - 10) // (first + 11)))
    return 784, first, second, 10


def _load_mnist() -> _Mnist | None:
    path = find_data("mnist.npz")
    if path is None:
        return None
    with np.load(path) as stored:
        x, x_test = (torch.from_numpy(stored[f"x_{part}"]).float().flatten(1) / 255 for part in ("train", "test"))
        y, y_test = (torch.from_numpy(stored[f"y_{part}"]).long() for part in ("train", "test"))
    a, b = _TRAIN, _TRAIN + _VALIDATION
    return _Mnist(x[:a], y[:a], x[a:b], y[a:b], x_test, y_test)


def _recipe(lr: float, seed: int, epochs: int = 2) -> Recipe:
    return Recipe(epochs=epochs, batch_size=100, lr=lr, optimizer="sgd", momentum=0.9, schedule="constant", seed=seed)


# ---- nothing is lost at compression 1


def _nothing_lost(data: _Mnist | None, scale: Scale, seed: int) -> Iterator[Claim]:
    """Exactly in double precision; in single precision beside an ordinary network that starts one rounding away."""
    seeds = [seed, seed + 1, seed + 2] if scale is Scale.FULL else [seed]
    permutation, start = True, 0.0
    apart: dict[torch.dtype, list[float]] = {torch.float32: [], torch.float64: []}
    nearby = list[float]()
    for one, build, dtype in itertools.product(seeds, (fully_connected, convolutional), apart):
        generator = torch.Generator().manual_seed(one)
        random = torch.rand(5000, 784, generator=generator), torch.randint(0, 10, (5000,), generator=generator)
        for x, y in [random] if data is None else [random, (data.x[:5000], data.y[:5000])]:
            plain = build(one).to(dtype)
            shared = share_parameters(plain, compression=1, init="model", seed=one)
            n = shared.original_parameters
            permutation &= bool(torch.equal(shared.map.indices(0, n).sort().values, torch.arange(n)))
            for name in shared.scales:
                start = max(start, float((shared.weight(name) - plain.get_parameter(name)).detach().abs().max()))
            rounded = _one_rounding_away(plain, generator)
            for net in (plain, shared, rounded) if dtype is torch.float32 else (plain, shared):
                recipe = Recipe(1, 100, 0.05, "sgd", momentum=0.9, l2=1e-4, schedule="constant", seed=one)
                train(net, x.to(dtype), y, recipe=recipe)
            apart[dtype].append(_largest_difference(plain, shared.materialize()))
            if dtype is torch.float32:
                nearby.append(_largest_difference(plain, rounded))
    roast = RoastMap([(b, a) for a, b in itertools.pairwise(_SIZES)], _WEIGHTS, seed=seed)
    unused = float((roast.load() == 0).double().mean())
    setting = (
        f"784-300-100-10 and a CNN with batch norm, random images{'' if data is None else ' and MNIST'}, 50 steps of SGD at "
        f"batch 100, lr 0.05, momentum 0.9, decay 1e-4, {len(seeds)} seed(s)"
    )
    worst = max(apart[torch.float64])
    yield Claim(
        "nothing is lost at compression 1: the network trains as if it were not shared (MLP and CNN)",
        "Pareto-continuity of the fold map; ROAST does not have it",
        Estimate.exact(worst, "largest difference of a weight after 50 steps, float64"),
        "slots of all layers together are a permutation; weights start equal to 1e-6 and after 50 steps of SGD with momentum "
        "and decay differ by <= 1e-10 in float64; roast is no permutation",
        permutation and start <= 1e-6 and worst <= 1e-10 and unused > 0,
        Comparator("share of slots that roast leaves unused at compression 1", unused),
        f"not scaled down; {setting}; {start:.0e} apart at the start",
    )
    single = apart[torch.float32]
    yield Claim(
        "the same in single precision, where a rounding may turn a ReLU on or off",
        "Pareto-continuity of the fold map",
        Estimate.exact(max(single), "largest difference of a weight after 50 steps, float32"),
        "<= 1e-4 in every training",
        max(single) <= 1e-4,
        Comparator("an ordinary network that starts one rounding away, the same difference", max(nearby)),
        f"{setting}; above 1e-4 in {sum(one > 1e-4 for one in single)} of {len(single)} trainings, for the ordinary network "
        f"one rounding away in {sum(one > 1e-4 for one in nearby)}",
    )


def _one_rounding_away(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy whose weights are larger or smaller by about half the spacing of their precision, each by chance."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for weight in copied.parameters():
            up = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps / 2 * up)
    return copied


def _largest_difference(one: nn.Module, other: nn.Module) -> float:
    there = dict(other.named_parameters())
    return max(float((there[name] - p).detach().abs().max()) for name, p in one.named_parameters())


# ---- MNIST


def _stability(data: _Mnist, seed: int) -> Claim:
    sigmas, lr = (1e-3, 0.05, 1.0), 0.05
    found: dict[str, list[float]] = {"v1": [], "none": []}
    diverged = []
    for kind, sigma in itertools.product(found, sigmas):
        model = share_parameters(fully_connected(seed), compression=10, sigma=sigma, gradient_scale=kind, seed=seed)
        try:
            train(model, data.x, data.y, recipe=_recipe(lr, seed, epochs=3))
        except TrainingCollapsedError:
            diverged.append(f"{kind} at sigma {sigma:g}")
        found[kind].append(accuracy(model, data.x_test, data.y_test))
    spread = {kind: max(values) - min(values) for kind, values in found.items()}
    worst = proportion(
        round(min(found["v1"]) * len(data.y_test)), len(data.y_test), unit="accuracy, the worst over sigma"
    )
    told = "; ".join(
        f"{name}: " + ", ".join(f"{value:.4f}" for value in found[kind])
        for kind, name in (("v1", "divided"), ("none", "not divided"))
    )
    return Claim(
        *_STABLE[:2], worst, _STABLE[2],
        spread["v1"] <= 0.005 and min(found["v1"]) >= 0.90 and spread["none"] >= 0.2,
        Comparator("spread over sigma without the division", spread["none"]),
        f"784-300-100-10, {_TRAIN:,} rows, 3 epochs of SGD, lr {lr}, momentum 0.9, one seed; sigma "
        f"{', '.join(f'{s:g}' for s in sigmas)}; {told}"
        + (f" (broke off: {', '.join(diverged)})" if diverged else ""),
    )  # fmt: skip


def _high_compression(data: _Mnist, scale: Scale, seed: int) -> Iterator[Claim]:
    full = scale is Scale.FULL
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    rates = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0] if full else [0.1, 1.0]
    pruned = list(_MARGINS) if full else ["synflow"]

    def fit(net: nn.Module, lr: float, start: int) -> None:
        train(net, data.x, data.y, recipe=_recipe(lr, start))

    def evaluate(net: nn.Module) -> dict[str, float]:
        chosen = accuracy(net, data.x_validation, data.y_validation)
        return {"quality": chosen, "test": accuracy(net, data.x_test, data.y_test)}

    def narrow(net: nn.Module, compression: float, start: int) -> nn.Module:
        return fully_connected(start, narrow_sizes(int(_WEIGHTS / compression) + _BIASES))

    def curve(methods: dict[str, Any], compression: float) -> list[dict[str, Any]]:
        frame = compression_curve(
            fully_connected, fit, evaluate, methods, [compression], seeds=seeds, learning_rates=rates,
            data=(data.x[:256], data.y[:256]),
        )  # fmt: skip
        return [dict(row) for row in best_step_sizes(frame).to_dict("records")]

    best = curve({"fold": "fold", "narrow": narrow, **{name: name for name in pruned}}, 300)
    reached = {name: [row["test"] for row in best if row["method"] == name] for name in ("fold", "narrow", *pruned)}
    mean = {name: float(np.mean(values)) for name, values in reached.items()}
    steps = {name: next(row["lr"] for row in best if row["method"] == name) for name in reached}
    setting = (
        f"784-300-100-10 (266,200 weights, 887 stored, 410 biases on each side), 20,000 rows, 2 epochs, momentum 0.9, "
        f"{len(seeds)} seed(s), each at its best step size of {rates} on 5,000 other rows"
    )
    ours = _over_seeds(reached["fold"], len(data.y_test))
    rival = max(pruned, key=lambda name: mean[name])
    yield Claim(
        *_PRUNING[:2], ours, _PRUNING[2],
        mean["fold"] >= 0.85 and all(mean["fold"] >= mean[name] + _MARGINS[name] for name in pruned),
        Comparator(f"best of the pruned: {rival}", mean[rival]),
        f"{setting}; " + ", ".join(f"{name} {mean[name]:.4f} (lr {steps[name]:g})" for name in mean)
        + ("" if full else "; the other methods, seeds and step sizes with --full"),
    )  # fmt: skip
    gaps = {300: mean["fold"] - mean["narrow"]}
    told = [f"300x: {mean['fold']:.4f} v {mean['narrow']:.4f}"]
    if full:
        other = curve({"fold": "fold", "narrow": narrow}, 100)
        milder = {
            name: float(np.mean([row["test"] for row in other if row["method"] == name])) for name in ("fold", "narrow")
        }
        gaps[100] = milder["fold"] - milder["narrow"]
        told.append(f"100x: {milder['fold']:.4f} v {milder['narrow']:.4f}")
    yield Claim(
        *_NARROW[:2], ours, _NARROW[2],
        min(gaps.values()) >= 0.02,
        Comparator("narrower network, 300x", mean["narrow"]),
        f"{setting}; the narrower network may use as many numbers, biases included; {', '.join(told)}"
        + ("" if full else "; 100x with --full"),
    )  # fmt: skip


def _over_seeds(values: list[float], rows: int) -> Estimate:
    """Mean over seeds; for one seed the exact interval over test rows."""
    if len(values) > 1:
        return mean_of_runs(values, unit="accuracy", within=(0, 1))
    return proportion(round(values[0] * rows), rows, unit="accuracy")


# ---- counts and closed forms


def _load(seed: int) -> Claim:
    sizes = [1_000, 8_873, 26_620, 100_000, 200_001, _WEIGHTS]
    uneven, ratio = 0, []
    for m in sizes:
        fold, hashed = FoldMap(_WEIGHTS, m, seed).load(), HashedMap(_WEIGHTS, m, seed).load()
        uneven = max(uneven, int(fold.max() - fold.min()))
        ratio.append(int(hashed.max()) / _poisson_maximum(_WEIGHTS / m, m))
    return Claim(
        "every slot of a fold gets the same number of weights, to within one",
        "optimal load",
        Estimate.exact(uneven, "most minus fewest weights in a slot"),
        "max - min <= 1 for fold; the largest load under hashing is within 30 % of that of as many Poisson numbers",
        uneven <= 1 and all(0.7 <= one <= 1.3 for one in ratio),
        Comparator("largest load under hashing over the median of the Poisson maximum, furthest from 1",
                   max(ratio, key=lambda one: abs(one - 1))),
        f"not scaled down: n = 266,200, m = {', '.join(f'{m:,}' for m in sizes)}",
    )  # fmt: skip


def _poisson_maximum(mean: float, m: int) -> int:
    """Median of the largest of m Poisson numbers."""
    term, total, k = math.exp(-mean), math.exp(-mean), 0
    while total**m < 0.5:
        k += 1
        term *= mean / k
        total += term
    return k


def _theory(seed: int) -> Claim:
    theta, x = np.random.default_rng(seed).standard_normal((2, 300))
    draws, exact = 20_000, float(theta @ x)
    errors, ratios, variances = [], {}, {}
    for mapper in ("fold", "hashed", "pruning"):
        drawn = sketch_inner_product(theta, x, 50, mapper=mapper, samples=draws, seed=seed).numpy()
        variances[mapper] = inner_product_variance(theta, x, 50, mapper)
        errors.append(abs(drawn.mean() - exact) / math.sqrt(variances[mapper] / draws))
        ratios[mapper] = float(drawn.var() / variances[mapper])
    worst = max(ratios.values(), key=lambda one: abs(one - 1))
    return Claim(
        "a shared linear model is unbiased, with the stated variance; a fold has less of it than hashing",
        "closed forms",
        Estimate.exact(worst, "measured variance over the closed form, furthest from 1"),
        "mean within 4 standard errors of <theta, x>, variance within 5 % for fold, hashed and pruning; fold <= hashed",
        max(errors) <= 4
        and all(abs(one - 1) <= 0.05 for one in ratios.values())
        and variances["fold"] <= variances["hashed"],
        Comparator("variance of random pruning", variances["pruning"]),
        f"n = 300, m = 50, {draws:,} draws, one normal theta and x; largest error of a mean {max(errors):.2f} standard errors; "
        + ", ".join(f"{name} {value:.0f}" for name, value in variances.items()),
    )


def _std(seed: int) -> Claim:
    plain = fully_connected(seed)
    shared = share_parameters(plain, compression=30, seed=seed)
    ratios = {
        name: float(shared.weight(name).detach().std() / plain.get_parameter(name).detach().std())
        for name in shared.scales
        if plain.get_parameter(name).numel() > 10_000
    }
    worst = max(ratios.values(), key=lambda one: abs(one - 1))
    return Claim(
        "weights start with the standard deviation of their layer's own start (30x)",
        "by construction",
        Estimate.exact(worst, "ratio of standard deviations, furthest from 1"),
        "within 0.97 to 1.03 in every layer of more than 10,000 weights",
        all(0.97 <= one <= 1.03 for one in ratios.values()),
        # numbers uniform in (-sigma, sigma), scaled as if sigma were their standard deviation
        Comparator("the same ratio for an array uniform in (-sigma, sigma), in closed form", 1 / math.sqrt(3)),
        "not scaled down: 784-300-100-10; " + ", ".join(f"{name} {one:.4f}" for name, one in ratios.items()),
    )


def _scores(seed: int) -> Claim:
    torch.manual_seed(seed)
    net = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((4, 5, 3, 2))]).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 2, (9,))
    W = [layer.weight.detach() for layer in net]  # type: ignore[union-attr]
    paths = [torch.zeros_like(weight) for weight in W]
    for i, j, k, o in itertools.product(range(4), range(5), range(3), range(2)):
        path = float((W[0][j, i] * W[1][k, j] * W[2][o, k]).abs())
        for total, at in zip(paths, ((j, i), (k, j), (o, k)), strict=True):
            total[at] += path
    error = (torch.softmax(x @ W[0].T @ W[1].T @ W[2].T, dim=1) - nn.functional.one_hot(y, 2)) / len(x)
    gradients = [(error @ W[2] @ W[1]).T @ x, (error @ W[2]).T @ (x @ W[0].T), error.T @ (x @ W[0].T @ W[1].T)]
    off = {}
    for method, wanted in (("synflow", paths), ("snip", [(w * g).abs() for w, g in zip(W, gradients, strict=True)])):
        found = pruning_scores(net, method, data=(x, y)).values()
        off[method] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    return Claim(
        "the scores that the rivals are pruned by are the published ones",
        "|w dL/dw| (SNIP) and the sum over all paths through a weight (SynFlow)",
        Estimate.exact(max(off.values()), "largest relative error"),
        "equal to hand-made gradients and to enumerated paths, to 1e-10",
        max(off.values()) <= 1e-10,
        Comparator("paths enumerated", 4 * 5 * 3 * 2),
        "a linear network 4-5-3-2, float64; the kept count is exact by construction and tested",
    )
