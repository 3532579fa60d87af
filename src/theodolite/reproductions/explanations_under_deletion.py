"""Claims of Krishna, Ma and Lakkaraju, 2023, arXiv:2302.04288, on their German credit data and on breast cancer."""

__all__ = ["adam_search", "claims", "german"]

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from torch import nn

from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs, proportion
from theodolite.core.influence import ExactRetrainer, LogisticInfluence
from theodolite.core.sources import find_data
from theodolite.explanations.deletion_robust import (
    DeletionRobustCounterfactual,
    validity_under_deletion,
    worst_deletion,
)
from theodolite.explanations.deletion_robust.linear import rows_to_delete
from theodolite.explanations.deletion_robust.solver import Feasible, nearest, robust_to_weight_box
from theodolite.explanations.robust_counterfactuals import Cchvae
from theodolite.reproductions.claim import Claim, Comparator, Scale

_TRAIN, _TEST = "rocerf/german-train.csv", "rocerf/german-test.csv"
_SHARES = (0.005, 0.01, 0.02, 0.05)
_RATIOS = (1.66, 2.08, 2.71, 3.9)  # measured before with the same settings; the paper shows bars without numbers
_MODES = {
    "at-factual, damped": {"worst_set": "at-factual", "influence": "first-order-damped"},
    "at-factual, first-order": {"worst_set": "at-factual", "influence": "first-order"},
    "refreshed, first-order": {"influence": "first-order"},
    "refreshed, leverage": {"influence": "leverage"},
    "verified": {"verify": True},
}
_BOX = 0.1  # the paper's ROAR
_FRONTIER = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_ON_GERMAN = (
    ("deletions of random rows break ordinary counterfactuals", "none given in numbers (figure)", "plain <= 0.70 at every k"),
    ("counterfactuals made for deletions survive them, by every kind of influence", "1.00 (figure)", ">= 0.99 at every k"),
    ("the extra cost is bounded, grows with k, and stays under that of ROAR", "lower than ROAR's (figure)",
     "within 10 % of 1.66 / 2.08 / 2.71 / 3.9 at k = 0.5 / 1 / 2 / 5 %, rising; ROAR(0.1) costs >= 1.5 times as much at every k"),
    ("the worst set with true retraining: only verified points survive", "none given", "plain 0.00, first-order <= 0.1, "
     "verified >= 0.95 at a cost <= 6 times plain"),
    ("worst pair under real retraining: influence with leverage finds it", "none given", "in >= 8 of 10 queries, and where "
     "not, losing <= 5 % of the shift"),
    ("leave-one-out: predicted against true changes of scores", "none given", "first-order correlation >= 0.995 and slope in "
     "[0.83, 0.97]; leverage slope in [0.98, 1.02], on German credit and on breast cancer"),
    ("exact cutting planes beat the paper's search", "about 30 s a query", "cost <= search + 1e-6, >= 100 times faster"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _German:
    """Training rows (800, 60) and labels, test rows, all in units of the training rows; queries: test rows that are rejected."""

    x: np.ndarray
    y: np.ndarray
    test: np.ndarray
    queries: np.ndarray


def german() -> _German | None:
    """The authors' German credit split, standardised by the training rows; None where it is not on this machine."""
    paths = [find_data(name) for name in (_TRAIN, _TEST)]
    if paths[0] is None or paths[1] is None:
        return None
    names = paths[0].read_text().splitlines()[0].split(",")
    label = names.index("credit-risk")
    train, test = (np.loadtxt(path, delimiter=",", skiprows=1) for path in paths if path is not None)
    x, y, held = np.delete(train, label, axis=1), train[:, label].astype(np.int64), np.delete(test, label, axis=1)
    x, held = _units(x, x), _units(held, x)
    w = ExactRetrainer(x, y).weights
    return _German(x, y, held, held[held @ w[:-1] + w[-1] < 0])


def _units(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    scale = by.std(axis=0)
    return (rows - by.mean(axis=0)) / np.where(scale > 0, scale, 1.0)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim of the card; quick draws fewer deletions."""
    data = german()
    if data is None:
        for claim, paper, threshold in _ON_GERMAN:
            yield Claim(claim, paper, None, threshold, None, None, f"needs {_TRAIN} and {_TEST}: set THEODOLITE_DATA")
    else:
        yield from _random_deletions(data, scale, seed)
        yield _worst_deletions(data)
        yield _worst_pair(data, scale, seed)
        yield _leave_one_out(data, seed)
        yield _exact_beats_search(data, seed)
    yield _top_k(seed)
    yield _projection(seed)
    yield _network(scale, seed)


def _generate(data: _German, share: float) -> dict[str, np.ndarray]:
    """Points of every method at one share, plain and ROAR among them."""
    found = {"plain": DeletionRobustCounterfactual(0).fit(data.x, data.y).generate(data.queries).counterfactuals}
    for name, options in _MODES.items():
        found[name] = _maker(k=share, **options).fit(data.x, data.y).generate(data.queries).counterfactuals
    w = ExactRetrainer(data.x, data.y).weights
    for delta in _FRONTIER:
        found[f"ROAR({delta:g})"] = np.stack([robust_to_weight_box(query, w, delta) for query in data.queries])
    return found


def _growing_spheres(data: _German, scale: Scale, seed: int) -> np.ndarray:
    """Points of C-CHVAE for the same logistic regression: plausible by its autoencoder, made without a thought of deletion."""
    w = torch.as_tensor(ExactRetrainer(data.x, data.y).weights)
    made = Cchvae(samples=200 if scale is Scale.QUICK else 1000, k=2, seed=seed)
    made.fit(lambda rows: torch.sigmoid(rows @ w[:-1] + w[-1]), data.x)
    return made.generate(data.queries).counterfactuals


def _random_deletions(data: _German, scale: Scale, seed: int) -> Iterator[Claim]:
    draws = 8 if scale is Scale.QUICK else 20
    validity: dict[float, dict[str, np.ndarray]] = {}
    ratios: dict[float, dict[str, float]] = {}
    spheres = _growing_spheres(data, scale, seed)
    for share in _SHARES:
        found = _generate(data, share) | {"C-CHVAE": spheres}
        stacked = np.concatenate(list(found.values()))
        told = validity_under_deletion(stacked, data.x, data.y, share, draws=draws, seed=seed).reshape(len(found), -1)
        validity[share] = dict(zip(found, told, strict=True))
        costs = {
            name: float(np.nanmean(np.linalg.norm(points - data.queries, axis=1))) for name, points in found.items()
        }
        ratios[share] = {name: cost / costs["plain"] for name, cost in costs.items()}
    said = f"{len(data.queries)} rejected test rows, {draws} draws at each k" + (
        "" if draws == 20 else " instead of 20"
    )
    worst_plain = max(_SHARES, key=lambda share: validity[share]["plain"].mean())
    plain = bootstrap(validity[worst_plain]["plain"], seed=seed, unit="share still accepted")
    by_spheres = ", ".join(f"{validity[share]['C-CHVAE'].mean():.2f}" for share in _SHARES)
    lowest = min(float(validity[share][name].mean()) for share in _SHARES for name in _MODES)
    where = min(itertools.product(_SHARES, _MODES), key=lambda at: float(validity[at[0]][at[1]].mean()))
    robust = bootstrap(validity[where[0]][where[1]], seed=seed, unit="share still accepted")
    listed = ", ".join(f"{validity[share]['plain'].mean():.2f}" for share in _SHARES)
    yield Claim(
        *_ON_GERMAN[0][:2], plain, _ON_GERMAN[0][2], plain.value <= 0.70, Comparator("robust, the lowest", lowest),
        f"{said}; the largest share of the four k is given (all: {listed}); interval over rows",
    )  # fmt: skip
    yield Claim(
        *_ON_GERMAN[1][:2], robust, _ON_GERMAN[1][2], robust.value >= 0.99, Comparator("plain at the same k",
        float(validity[where[0]]["plain"].mean())), f"{said}; the lowest of {len(_MODES)} modes at four k ({where[1]}); "
        f"C-CHVAE, which knows nothing of deletions: {by_spheres} at the four k, for "
        f"{ratios[_SHARES[0]]['C-CHVAE']:.2f} times the plain cost, {int(np.isfinite(spheres[:, 0]).sum())} points found",
    )  # fmt: skip
    ours = [ratios[share]["at-factual, first-order"] for share in _SHARES]
    box = ratios[_SHARES[0]][f"ROAR({_BOX:g})"]
    near = all(abs(found / wanted - 1) <= 0.1 for found, wanted in zip(ours, _RATIOS, strict=True))
    dearest = max(ratios[share][name] for share in _SHARES for name in _MODES if name != "verified")
    held = near and ours == sorted(ours) and all(box >= 1.5 * found for found in ours)
    frontier = ", ".join(
        f"{delta:g}: cost {ratios[_SHARES[0]][f'ROAR({delta:g})']:.2f}, accepted "
        f"{min(float(validity[share][f'ROAR({delta:g})'].mean()) for share in _SHARES):.2f}"
        for delta in _FRONTIER
    )
    yield Claim(
        *_ON_GERMAN[2][:2], Estimate.exact(ours[1], "times plain, k = 1 %"), _ON_GERMAN[2][2], held,
        Comparator(f"ROAR({_BOX:g}) / plain", box),
        f"{said}; at the four k {', '.join(f'{found:.2f}' for found in ours)} (worst rows at the factual, first order; the "
        f"dearest mode without retraining at 5 %: {dearest:.2f}); ROAR by its box, exact, with the lowest validity over k: "
        f"{frontier} - a box tuned by hand is cheaper against random deletions, but nothing tells which",
    )  # fmt: skip


def _maker(**options: Any) -> DeletionRobustCounterfactual:
    return DeletionRobustCounterfactual(**options)


def _worst_deletions(data: _German) -> Claim:
    rates: dict[str, list[float]] = {"plain": [], "first-order": [], "verified": []}
    kept, total, ratios = 0, 0, list[float]()
    for share in _SHARES:
        for name, options in (("plain", {"k": 0}), ("first-order", {"k": share, "influence": "first-order"}),
                              ("verified", {"k": share, "verify": True})):  # fmt: skip
            found = _maker(**options).fit(data.x, data.y).generate(data.queries)
            told = validity_under_deletion(found, data.x, data.y, share, "worst")
            rates[name].append(float(told.mean()))
            if name == "verified":
                kept, total = kept + int(told.sum()), total + len(told)
                ratios.append(float(found.cost.mean() / found.plain_cost.mean()))
    verified = proportion(kept, total, unit="share still accepted")
    holds = max(rates["plain"]) == 0 and max(rates["first-order"]) <= 0.1 and min(rates["verified"]) >= 0.95
    return Claim(
        *_ON_GERMAN[3][:2], verified, _ON_GERMAN[3][2], holds and max(ratios) <= 6,
        Comparator("first-order, on its boundary", max(rates["first-order"])),
        f"the set that influence finds worst at each returned point, retrained without it; plain {max(rates['plain']):.2f}; "
        f"verified costs {', '.join(f'{ratio:.2f}' for ratio in ratios)} times plain at k = 0.5 / 1 / 2 / 5 %; the set is not "
        "proved to be the worst under retraining",
    )  # fmt: skip


def _worst_pair(data: _German, scale: Scale, seed: int) -> Claim:
    """All 780 pairs of 40 rows, retrained; over several draws of the rows and of three features."""
    rng = np.random.default_rng(seed)
    draws = 3 if scale is Scale.QUICK else 10
    pairs = list(itertools.combinations(range(40), 2))
    hits: dict[str, list[bool]] = {"leverage": [], "first-order": []}
    losses = list[float]()
    for _ in range(draws):
        rows = rng.choice(len(data.x), 40, replace=False)
        columns = rng.choice([0, 1, 2, 3, 4], 3, replace=False)  # the features of many values
        part = data.x[rows][:, columns]
        x, y = _units(part, part), data.y[rows]
        retrainer = ExactRetrainer(x, y)
        weights = np.array([retrainer.without(pair) for pair in pairs])
        queries = _units(data.test[:, columns], part)
        for query in queries[rng.choice(len(queries), 10, replace=False)]:
            scores = weights @ np.append(query, 1)
            shift = float(np.append(query, 1) @ retrainer.weights - scores.min())
            for kind, found in hits.items():
                pair = worst_deletion(None, x, y, query, 2, kind, exact=False).rows
                lost = float(np.append(query, 1) @ retrainer.without(pair) - scores.min()) / shift
                found.append(lost < 1e-9)
                if kind == "leverage":
                    losses.append(lost)
    share = proportion(sum(hits["leverage"]), len(losses), unit="queries")
    return Claim(
        *_ON_GERMAN[4][:2], share, _ON_GERMAN[4][2], share.value >= 0.8 and max(losses) <= 0.05,
        Comparator("first-order, share of queries", float(np.mean(hits["first-order"]))),
        f"{draws} draws of 40 rows and 3 features, 780 retrainings and 10 queries each; the largest loss of the shift is "
        f"{100 * max(losses):.1f} %, the mean {100 * np.mean(losses):.2f} %",
    )  # fmt: skip


def _slopes(x: np.ndarray, y: np.ndarray, points: np.ndarray, seed: int) -> dict[str, tuple[float, float]]:
    """Correlation and slope of predicted against true changes of the scores of points, over 60 single deletions."""
    retrainer = ExactRetrainer(x, y)
    influence = LogisticInfluence(x, y, retrainer.weights, 1 / len(y))
    rows = np.random.default_rng(seed).choice(len(y), 60, replace=False)
    tilted = np.column_stack([points, np.ones(len(points))])
    true = np.array([tilted @ (retrainer.without([int(i)]) - retrainer.weights) for i in rows]).ravel()
    found = {}
    for kind in ("first-order-damped", "first-order", "leverage"):
        told = (influence.directions(kind)[rows] @ tilted.T).ravel()
        found[kind] = (float(np.corrcoef(told, true)[0, 1]), float(np.polyfit(true, told, 1)[0]))
    return found


def _leave_one_out(data: _German, seed: int) -> Claim:
    x, y, held = _breast_cancer()
    told = {"German": _slopes(data.x, data.y, data.test, seed), "breast cancer": _slopes(x, y, held, seed)}
    leverage = [found["leverage"][1] for found in told.values()]
    first = [found["first-order"] for found in told.values()]
    holds = all(0.98 <= slope <= 1.02 for slope in leverage) and all(
        correlation >= 0.995 and 0.83 <= slope <= 0.97 for correlation, slope in first
    )
    words = "; ".join(
        f"{name}: " + ", ".join(f"{kind} correlation {c:.4f} slope {s:.3f}" for kind, (c, s) in found.items())
        for name, found in told.items()
    )
    return Claim(
        *_ON_GERMAN[5][:2], Estimate.exact(leverage[0], "slope, leverage, German"), _ON_GERMAN[5][2], holds,
        Comparator("slope, first-order, German", first[0][1]), f"60 retrainings each; {words}",
    )  # fmt: skip


def adam_search(x: np.ndarray, w: np.ndarray, *, steps: int = 2000, multipliers: int = 16) -> tuple[np.ndarray, float]:
    """The search of the paper's code for one plane: the nearest accepted point it saw, and its distance.

    Adam (0.5) on relu(-f(x'))^2 + m |x' - x|; m starts at 2.5, doubles while a point is accepted, halves while none is, then
    bisects; a run stops where a step is relatively below 1e-5. Here in numpy, which takes less time a step than torch does.
    """
    best, distance, m, accepted_at, refused_at = x, np.inf, 2.5, None, None
    for _ in range(multipliers):
        point, first, second = x.copy(), np.zeros_like(x), np.zeros_like(x)
        reached = False
        for t in range(1, steps + 1):
            away = point - x
            far = float(np.sqrt(away @ away))
            score = float(point @ w[:-1] + w[-1])
            if score >= 0:
                reached = True
                if far < distance:
                    best, distance = point.copy(), far
            gradient = -2 * max(-score, 0.0) * w[:-1] + (m / far * away if far > 0 else 0.0)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            step = 0.5 * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
            point = point - step
            if step @ step <= 1e-10 * (point @ point):
                break
        if reached:
            accepted_at = m
        else:
            refused_at = m
        if accepted_at is None:
            m /= 2
        elif refused_at is None:
            m *= 2
        else:
            m = 0.5 * (accepted_at + refused_at)
    return best, distance


def _exact_beats_search(data: _German, seed: int) -> Claim:
    made = DeletionRobustCounterfactual(0.01, worst_set="at-factual", influence="first-order-damped").fit(
        data.x, data.y
    )
    queries = data.queries[np.random.default_rng(seed).choice(len(data.queries), 2, replace=False)]
    excess, ratios, words = list[float](), list[float](), list[str]()
    for query in queries:
        times = list[float]()
        for _ in range(5):
            began = time.perf_counter()
            exact = float(made.generate(query[None]).cost[0])
            times.append(time.perf_counter() - began)
        tilted = np.append(query, 1)
        w = made.weights_ + made.directions_[np.argsort(made.directions_ @ tilted)[: made.k_]].sum(axis=0)
        began = time.perf_counter()
        _, searched = adam_search(query, w)
        ratios.append((time.perf_counter() - began) / float(np.median(times)))
        excess.append(exact - searched)
        words.append(f"{exact:.3f} against {searched:.3f}")
    return Claim(
        *_ON_GERMAN[6][:2], Estimate.exact(min(ratios), "times as fast, the lesser of two queries"), _ON_GERMAN[6][2],
        max(excess) <= 1e-6 and min(ratios) >= 100, Comparator("cost of exact less cost of search", max(excess)),
        f"2 queries, one plane fixed at the query as in the paper's code; costs {'; '.join(words)}; at most 2,000 steps for "
        "each of 16 multipliers, in numpy",
    )  # fmt: skip


# ---- oracles that need no data


def _top_k(seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(12, 3)), np.tile([0, 1], 6)
    w = ExactRetrainer(x, y).weights
    directions = LogisticInfluence(x, y, w, 1 / 12).directions("leverage")
    sets = [list(found) for found in itertools.combinations(range(12), 3)]
    off = 0.0
    for point in rng.normal(size=(10, 3)):
        tilted = np.append(point, 1)
        least = min(float(tilted @ (w + directions[found].sum(axis=0))) for found in sets)
        off = max(off, abs(worst_deletion(None, x, y, point, 3).predicted_score - least))
    return Claim(
        "the sum of the k smallest is the minimum over all sets", "by additivity", Estimate.exact(off, "logits"),
        "equal to 1e-10", off <= 1e-10, Comparator("sets enumerated", float(len(sets))), "n = 12, k = 3, 10 points",
    )  # fmt: skip


def _projection(seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    closed, other, free = 0.0, 0.0, Feasible.everything(6)
    for _ in range(20):
        x, planes = rng.normal(size=6), rng.normal(size=(5, 7)) + np.array([2.0, 0, 0, 0, 0, 0, -3])
        w = planes[0]
        gap = max(0.0, float(-x @ w[:-1] - w[-1]))
        one = nearest(x, w[None], 0.0, free)
        many = nearest(x, planes, 0.0, free)
        inside = {
            "type": "ineq",
            "fun": lambda v, p=planes: p[:, :-1] @ v + p[:, -1],
            "jac": lambda v, p=planes: p[:, :-1],
        }
        peer = minimize(
            lambda v, x=x: 0.5 * ((v - x) ** 2).sum(), x, jac=lambda v, x=x: v - x, method="SLSQP",
            constraints=inside, options={"ftol": 1e-14},
        )  # fmt: skip
        if one is None or many is None:
            return Claim(*_PROJECTION[:2], None, _PROJECTION[2], None, None, "a drawn set of half-spaces was empty")
        closed = max(closed, float(np.abs(one - x - gap / (w[:-1] @ w[:-1]) * w[:-1]).max()))
        other = max(other, float(np.abs(many - peer.x).max()))
    return Claim(
        *_PROJECTION[:2], Estimate.exact(other, "largest difference of a coordinate, five planes"), _PROJECTION[2],
        closed <= 1e-8 and other <= 1e-4, Comparator("largest difference, one plane against its formula", closed), "20 draws",
    )  # fmt: skip


_PROJECTION = (
    "the projection is the nearest point", "none given", "one plane: closed form to 1e-8; many: SLSQP to 1e-4",
)  # fmt: skip


# ---- a network


class _CentredSoftplus(nn.Module):
    """softplus(beta z) / beta less its value at 0."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(z) - float(np.log(2))


def _breast_cancer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 rows to train on and 169 held out, standardised by the first, in a fixed random order."""
    bunch: Any = load_breast_cancer()
    x, y = bunch.data, bunch.target
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return _units(x[:400], x[:400]), y[:400], _units(x[400:], x[:400])


def _train(x: np.ndarray, y: np.ndarray, seed: int, epochs: int) -> nn.Module:
    """d-2d-2d-1 with centred softplus, SGD 1e-2, batches of 32; the seed fixes the first weights and the order."""
    torch.manual_seed(seed)
    d = x.shape[1]
    model = nn.Sequential(
        nn.Linear(d, 2 * d), _CentredSoftplus(), nn.Linear(2 * d, 2 * d), _CentredSoftplus(), nn.Linear(2 * d, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    inputs, labels = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[rows])[:, 0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def _network(scale: Scale, seed: int) -> Claim:
    x, y, held = _breast_cancer()
    k, epochs = rows_to_delete(8, y), 100
    retrainings = 4 if scale is Scale.QUICK else 8

    def score(model: nn.Module, points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.as_tensor(points, dtype=torch.float32)).double().numpy()[:, 0]

    model = _train(x, y, seed, epochs)
    queries = held[score(model, held) < 0][:30]
    found = {
        damping: DeletionRobustCounterfactual(k, damping=damping).fit(x, y, model).generate(queries)
        for damping in (1e-3, 1e-2)
    }
    plain = DeletionRobustCounterfactual(0).fit(x, y, model).generate(queries)
    rng = np.random.default_rng(seed)
    accepted: dict[str, list[float]] = {"plain": [], "0.001": [], "0.01": []}
    for _ in range(retrainings):
        kept = np.setdiff1d(np.arange(len(y)), rng.choice(len(y), k, replace=False))
        again = _train(x[kept], y[kept], seed, epochs)
        for name, made in (("plain", plain), ("0.001", found[1e-3]), ("0.01", found[1e-2])):
            there = made.valid
            accepted[name].append(float((score(again, made.counterfactuals[there]) >= 0).sum() / len(queries)))
    robust = mean_of_runs(accepted["0.001"], unit="share still accepted", within=(0, 1))
    ratio = float(np.nanmean(found[1e-3].cost) / np.nanmean(found[1e-3].plain_cost))
    base = float(np.mean(accepted["plain"]))
    return Claim(
        "a network: last-layer influence keeps counterfactuals accepted after random deletions and retraining",
        "none given in numbers (figure)", robust, "plain <= 0.80, robust >= 0.90, cost <= 1.3 times plain",
        base <= 0.80 and robust.value >= 0.90 and ratio <= 1.3, Comparator("plain", base),
        f"breast cancer, 400 rows, k = 8, {len(queries)} queries, {retrainings} retrainings from the same first weights; cost "
        f"{ratio:.3f} times plain at damping 1e-3; at 1e-2 accepted {np.mean(accepted['0.01']):.3f}",
    )  # fmt: skip
