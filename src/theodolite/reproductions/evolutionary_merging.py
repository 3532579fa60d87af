"""Claims of Akiba et al., 2024, arXiv:2403.13187, on MNIST halves, a damaged residual network and SmolLM2-135M."""

__all__ = ["claims"]

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, train
from theodolite.parameters.merging import (
    METHODS,
    Fitness,
    MergeResult,
    RoutedModel,
    RoutingResult,
    accuracy_fitness,
    dare,
    evolve,
    evolve_routing,
    evolve_weights,
    layer_groups,
    merge,
    task_vector,
)
from theodolite.reproductions import evolutionary_merging_encoder as encoder
from theodolite.reproductions import evolutionary_merging_language as language
from theodolite.reproductions.claim import Claim, Comparator, Scale

_NEEDS_MNIST = "needs mnist.npz in the folder THEODOLITE_DATA"


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; those of language models are left to --full."""
    yield _formulas(seed)
    yield _planted(seed)
    digits = _load_mnist(scale)
    if digits is None:
        for claim, paper, threshold in (_SKILL, _CONTROLS, _ROUTING, _PATH_CONTROL, _HYBRID, _SAME):
            yield Claim(claim, paper, None, threshold, None, scaled=_NEEDS_MNIST)
    else:
        yield from _mnist(digits, scale, seed)
    yield from encoder.claims(scale, seed)
    yield from language.claims(scale, seed)


# ---- formulas and a planted optimum


def _tensors(seed: int, number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 30), "b": (30,)}
    return [{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(number)]


def _by_hand(
    method: str, base: np.ndarray, thetas: list[np.ndarray], w: np.ndarray, rho: float, normalize: bool
) -> np.ndarray:
    """The formula in NumPy and float64, entry by entry where signs are elected; for the methods without random masks."""
    if method == "linear":
        return np.tensordot(w, thetas, 1) / w.sum()
    if method == "slerp":
        a, b = thetas[:2]
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        t = w[1] / (w[0] + w[1])
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    taus = [theta - base for theta in thetas]
    if method == "task_arithmetic":
        return base + np.tensordot(w, taus, 1)
    merged = np.zeros(base.size)
    kept = []
    for tau in taus:
        flat = tau.ravel().copy()
        flat[np.argsort(-np.abs(flat), kind="stable")[int(rho * flat.size) :]] = 0
        kept.append(flat)
    for i, entries in enumerate(zip(*kept)):
        votes = w * np.array(entries)
        agree = np.sign(votes) == (1 if votes.sum() >= 0 else -1)
        merged[i] = votes[agree].sum() / ((w[agree].sum() or 1) if normalize else 1)
    return base + merged.reshape(base.shape)


def _formulas(seed: int) -> Claim:
    worst, weights, rho = 0.0, np.array([0.7, 0.4, -0.3]), 0.4
    for method in ("linear", "slerp", "task_arithmetic", "ties"):
        count = 2 if method == "slerp" else 3
        base, *sources = _tensors(seed, 1 + count)
        made = merge(sources, base=base, method=method, weights=weights[:count], densities=rho)
        for name in base:
            many = [s[name].double().numpy() for s in sources]
            wanted = _by_hand(
                method, base[name].double().numpy(), many, weights[:count], rho, METHODS[method].normalize
            )
            off = np.abs(made[name].double().numpy() - wanted) / np.maximum(
                1, np.abs(wanted)
            )  # float32 rounds relatively
            worst = max(worst, float(off.max()))
    base, one, two = _tensors(seed, 3)
    exact = all(
        torch.equal(merge([one, two], base=base, method=method, weights=[1, 0])[name], one[name])
        for method in METHODS
        for name in one
    )
    tau = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    draws = torch.stack([dare(tau, 0.3, torch.Generator().manual_seed(seed * 2000 + s)) for s in range(2000)])
    off = float(((draws.mean(dim=0) - tau).abs() / draws.std(dim=0) * 2000**0.5).max())
    return Claim(
        "the merges are the stated formulas",
        "formulas of the methods it merges with",
        Estimate.exact(worst, "largest difference of an entry, relative above 1"),
        "<= 1e-6 from NumPy in float64; one weight of 1 gives that source bit by bit; DARE unbiased within 4 standard errors",
        worst <= 1e-6 and exact and off <= 4,
        Comparator("DARE, mean of 2,000 draws against tau, in standard errors", off),
        "not scaled down; random tensors, three sources, the four methods without random masks entry by entry; one source "
        f"bit by bit in all six methods: {exact}",
    )


def _planted(seed: int) -> Claim:
    def net(s: int) -> nn.Module:
        torch.manual_seed(1000 * seed + s)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    base, *sources = (net(s) for s in range(3))
    groups, wanted = layer_groups(base), np.random.default_rng(seed).uniform(-0.5, 1.5, (3, 2))
    target = merge(sources, base=base, method="task_arithmetic", weights=wanted, groups=groups)

    def distance(model: nn.Module) -> float:
        return -sum(float((t - target[n]).square().sum()) for n, t in model.state_dict().items())

    found = evolve_weights(
        sources, distance, base=base, method="task_arithmetic", max_evaluations=600, baselines=["random"], seed=seed
    )
    weights = found.weights["weight"].to_numpy().reshape(3, 2)
    start, taus = base.state_dict(), [task_vector(source, base) for source in sources]
    solved = []
    for names in groups.values():
        left = np.column_stack([torch.cat([tau[n].ravel() for n in names]).numpy() for tau in taus])
        right = torch.cat([(target[n] - start[n]).ravel() for n in names]).numpy()
        solved.append(np.linalg.lstsq(left, right, rcond=None)[0])
    off = float(np.abs(weights - np.array(solved)).max())
    return Claim(
        "evolution finds planted layer-wise weights",
        "none given",
        Estimate.exact(off, "largest error of a weight"),
        "within 0.02 of the least-squares solution after 600 evaluations",
        off <= 0.02 and float(np.abs(weights - wanted).max()) <= 0.02,
        Comparator("squared distance that as many random candidates leave", -float(found.baselines["fitness"].iloc[0])),
        f"three groups of two sources; squared distance left {-found.fitness:.1e}",
    )


# ---- MNIST


_SEARCHED = {Scale.QUICK: 1000, Scale.FULL: 2000}
"""Rows that a candidate is scored on."""


class Digits:
    """MNIST as (60,000, 784) rows in [0, 1] and labels; ``searched`` training rows decide, the test rows report."""

    def __init__(self, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, searched: int) -> None:
        self.x, self.y, self.searched = x, y, searched
        self.test = accuracy_fitness(x_test, y_test)
        self.test_rows = len(x_test)

    def order(self, seed: int) -> Tensor:
        """A random order of the training rows: the first 50,000 to train on, the last 10,000 to search on."""
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))

    def fitness(self, seed: int) -> Fitness:
        """Accuracy on rows that no network was trained on."""
        rows = self.order(seed)[50_000:][: self.searched]
        return accuracy_fitness(self.x[rows], self.y[rows])

    def fit(self, model: nn.Module, rows: Tensor, recipe: Recipe) -> nn.Module:
        """The model, trained on these rows."""
        train(model, self.x[rows], self.y[rows], recipe=recipe)
        return model.eval()


def _load_mnist(scale: Scale) -> Digits | None:
    path = find_data("mnist.npz")
    if path is None:
        return None
    with np.load(path) as stored:
        images = [torch.from_numpy(stored[f"x_{part}"]).float().flatten(1) / 255 for part in ("train", "test")]
        labels = [torch.from_numpy(stored[f"y_{part}"]).long() for part in ("train", "test")]
    return Digits(images[0], labels[0], images[1], labels[1], _SEARCHED[scale])


def halves(digits: Digits, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """A base MLP trained on 300 images, and two fine-tuned from it on 6,000 of digits 0-4 and of 5-9, three epochs."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    order = digits.order(seed)
    digits.fit(base, order[:300], Recipe(epochs=20, batch_size=32, seed=seed))
    rest = order[300:50_000]
    tuned = []
    for part in (digits.y[rest] < 5, digits.y[rest] >= 5):
        tuned.append(digits.fit(copy.deepcopy(base), rest[part][:6000], Recipe(epochs=3, seed=seed)))
    return base, tuned


_SKILL = (
    "a merge has a skill that no source has: all ten digits from two networks tuned on five each",
    "52.0 against 30.0 of the best source (MGSM-JA accuracy)",
    "mean >= best source + 0.30, base + 0.03 and uniform average + 0.004; in each seed >= average - 0.004",
)
_CONTROLS = (
    "evolved layer-wise weights are no worse than a grid of global weights and random search with equal budget",
    "none given",
    "mean >= best global grid and >= random search - 0.001",
)
_ROUTING = (
    "data-flow search repairs a model without touching weights",
    "DFS alone 36.4 against 30.0 of the best source (unverified)",
    "start equals A exactly; mean >= 0.93 of the undamaged network, >= best source + 0.4, >= weight average + 0.2",
)
_PATH_CONTROL = (
    "the search of paths finds better ones than equally many random paths",
    "none given",
    "gain in test accuracy over the best of as many random paths, its whole interval above 0",
)
_HYBRID = (
    "paths after weights are never worse than the weights alone",
    "55.6 against 52.0 (repository table)",
    "fitness >= that of the evolved weights in every run, and the search of paths starts exactly there",
)
_SAME = (
    "the same seed gives the same search",
    "none given",
    "identical weights, paths and histories in two runs with 1 and 2 threads",
)


def _mnist(digits: Digits, scale: Scale, seed: int) -> Iterator[Claim]:
    seeds = [seed, seed + 1, seed + 2]
    runs = [(halves(digits, s), s) for s in seeds]
    found = [
        evolve_weights(
            tuned, digits.fitness(s), base=base, max_evaluations=300, seed=s, test=digits.test,
            baselines=["sources", "average", "grid", "random"],
        )
        for (base, tuned), s in runs
    ]  # fmt: skip
    yield _skill(found, [digits.test(base) for (base, _), _ in runs], digits.searched)
    yield _against_controls(found)
    path_seeds = seeds if scale is Scale.FULL else seeds[:1]
    damaged = [damaged_pair(digits, s) for s in path_seeds]
    routed = [
        evolve_routing(
            [a, b], digits.fitness(s), max_evaluations=800, seed=s, test=digits.test, control=scale is Scale.FULL
        )
        for (_, a, b), s in zip(damaged, path_seeds)
    ]
    yield _routing(digits, damaged, routed)
    if scale is Scale.FULL:
        yield _against_random_paths(routed)
    else:
        yield Claim(
            *_PATH_CONTROL[:2], None, _PATH_CONTROL[2], None, scaled="measured with --full only: 800 more paths a seed"
        )
    yield _hybrid(digits, scale, damaged, path_seeds)
    yield _same(digits, runs[0][0], damaged[0][1:], seed)


def _baseline(results: list[MergeResult], start: str) -> list[float]:
    """Test accuracy of the best baseline of that kind, per run."""
    return [float(r.baselines.loc[r.baselines["baseline"].str.startswith(start), "test"].max()) for r in results]


def _tests(results: list[MergeResult]) -> list[float]:
    return [r.test for r in results if r.test is not None]


def _skill(found: list[MergeResult], base: list[float], searched: int) -> Claim:
    ours, source, average = _tests(found), _baseline(found, "source"), _baseline(found, "uniform average")
    mean = mean_of_runs(ours, unit="accuracy", within=(0, 1))
    holds = (
        mean.value >= np.mean(source) + 0.30
        and mean.value >= np.mean(base) + 0.03
        and mean.value >= np.mean(average) + 0.004
        and all(a >= b - 0.004 for a, b in zip(ours, average))
    )
    return Claim(
        _SKILL[0], _SKILL[1], mean, _SKILL[2], bool(holds),
        Comparator("uniform average", float(np.mean(average))),
        f"MNIST, MLP 784-128-128-10, dare_ties, 300 evaluations on {searched:,} rows, 3 seeds: evolved "
        + ", ".join(f"{v:.4f}" for v in ours)
        + f"; uniform average {_listed(average)}; best source {_listed(source)}; base {_listed(base)}; the value in the "
        f"search was {np.mean([r.fitness for r in found]):.4f} on average",
    )  # fmt: skip


def _against_controls(found: list[MergeResult]) -> Claim:
    ours, grid, random = _tests(found), _baseline(found, "best global weights"), _baseline(found, "random search")
    mean = mean_of_runs(ours, unit="accuracy", within=(0, 1))
    return Claim(
        _CONTROLS[0], _CONTROLS[1], mean, _CONTROLS[2],
        bool(mean.value >= np.mean(grid) and mean.value >= np.mean(random) - 0.001),
        Comparator("random search, 300 evaluations", float(np.mean(random))),
        f"as above; grid of 120 global weights {_listed(grid)}; random search {_listed(random)}",
    )  # fmt: skip


def _listed(values: list[float]) -> str:
    return " / ".join(f"{value:.4f}" for value in values)


# ---- paths


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class ResidualNet(nn.Module):
    """A residual MLP of six blocks on MNIST rows."""

    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(784, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def damaged_pair(digits: Digits, seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A residual network, and copies with N(0, 0.25^2) added to blocks 3 and 4 (A) and to blocks 0 and 1 (B)."""
    torch.manual_seed(seed)
    whole = digits.fit(ResidualNet(), digits.order(seed)[:3000], Recipe(epochs=3, seed=seed))
    copies = []
    with torch.no_grad():
        for blocks in ((3, 4), (0, 1)):
            one: Any = copy.deepcopy(whole)
            for block in blocks:
                for parameter in one.blocks[block].parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.25)
            copies.append(one)
    return whole, copies[0], copies[1]


def _routing(
    digits: Digits, damaged: list[tuple[nn.Module, nn.Module, nn.Module]], routed: list[RoutingResult]
) -> Claim:
    whole = [digits.test(net) for net, _, _ in damaged]
    ours = [r.test for r in routed if r.test is not None]
    source = [float(r.controls["test"].iloc[:2].max()) for r in routed]
    average, exact = [], True
    rows = digits.x[:200]
    for _, a, b in damaged:
        mean = copy.deepcopy(a)
        mean.load_state_dict(merge([a, b], method="linear", weights=[1, 1]))
        average.append(digits.test(mean))
        own = [(0, i) for i in range(6)]
        with torch.no_grad():
            exact &= torch.equal(RoutedModel([a, b], own)(rows), a(rows))
    estimate = _over_runs(ours, digits.test_rows)
    holds = (
        exact
        and estimate.value >= 0.93 * np.mean(whole)
        and estimate.value >= np.mean(source) + 0.4
        and estimate.value >= np.mean(average) + 0.2
    )
    return Claim(
        _ROUTING[0], _ROUTING[1], estimate, _ROUTING[2], bool(holds),
        Comparator("uniform weight average", float(np.mean(average))),
        f"residual MLP of 6 blocks, 24 slots, 800 evaluations, {len(ours)} seed(s); undamaged {_listed(whole)}, best "
        f"source {_listed(source)}, found {_listed(ours)}; start equals A: {exact}; path of the first seed: "
        + " ".join(f"{'AB'[s]}{b}" for s, b in routed[0].path),
    )  # fmt: skip


def _over_runs(values: list[float], rows: int) -> Estimate:
    if len(values) > 1:
        return mean_of_runs(values, unit="accuracy", within=(0, 1))
    return proportion(round(values[0] * rows), rows, unit="accuracy")


def _against_random_paths(routed: list[RoutingResult]) -> Claim:
    ours = [r.test for r in routed if r.test is not None]
    random = [float(r.controls["test"].iloc[-1]) for r in routed]
    gain = mean_of_runs([a - b for a, b in zip(ours, random)], unit="accuracy")
    return Claim(
        _PATH_CONTROL[0], _PATH_CONTROL[1], gain, _PATH_CONTROL[2], gain.low > 0,
        Comparator("best of 800 random paths with scales 1", float(np.mean(random))),
        f"as above, {len(ours)} seed(s): evolved {_listed(ours)}, random {_listed(random)}; a block of this network can be "
        "left out or change places at little cost, so many paths are good",
    )  # fmt: skip


def _hybrid(
    digits: Digits, scale: Scale, damaged: list[tuple[nn.Module, nn.Module, nn.Module]], seeds: list[int]
) -> Claim:
    number = 300 if scale is Scale.FULL else 100
    gains, starts, merged, tests = [], True, [], []
    for (_, a, b), seed in zip(damaged, seeds):
        both = evolve(
            [a, b], digits.fitness(seed), space="both", seed=seed, test=digits.test,
            method="linear", max_evaluations=number, baselines=(), repeats=1, control=False,
        )  # fmt: skip
        if isinstance(both, RoutingResult) and both.weights is not None:
            gains.append(both.fitness - both.weights.fitness)
            starts &= both.start == both.weights.fitness
            merged.append(both.weights.test or 0.0)
            tests.append(both.test or 0.0)
    gain = Estimate(float(np.mean(gains)), min(gains), max(gains), "accuracy gained in the search", len(gains))
    return Claim(
        _HYBRID[0], _HYBRID[1], gain, _HYBRID[2], min(gains) >= 0 and starts,
        Comparator("test accuracy of the evolved weights", float(np.mean(merged))),
        f"the damaged residual networks, linear merge, {number} evaluations each, {len(gains)} seed(s); test accuracy of "
        f"paths after weights {_listed(tests)}; the MLP of the other claims has no blocks to route",
    )  # fmt: skip


def _same(digits: Digits, pair: tuple[nn.Module, list[nn.Module]], damaged: tuple[nn.Module, ...], seed: int) -> Claim:
    before, results = torch.get_num_threads(), []
    base, tuned = pair
    for threads in (1, 2):
        torch.set_num_threads(threads)
        merged = evolve_weights(tuned, digits.fitness(seed), base=base, max_evaluations=60, seed=seed, baselines=())
        paths = evolve_routing(damaged, digits.fitness(seed), max_evaluations=60, seed=seed, control=False)
        results.append((merged, paths))
    torch.set_num_threads(before)
    (one, first), (two, second) = results
    same = (
        one.weights.equals(two.weights)
        and one.history.equals(two.history)
        and first.history.equals(second.history)
        and (first.path, first.scales) == (second.path, second.scales)
    )
    off = float((one.weights["weight"] - two.weights["weight"]).abs().max())
    return Claim(
        _SAME[0], _SAME[1], Estimate.exact(off, "largest difference of a weight"), _SAME[2], same,
        None, "not scaled down; 60 evaluations of both searches on MNIST",
    )  # fmt: skip
