"""Rules that keep a model's answer, found by a beam search over which values of an input to keep.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 3); the search and its bounds: Ribeiro, Singh, Guestrin, 2018, AAAI.
"""

__all__ = ["Rule", "find_rule"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

Draw = Callable[[Bool[np.ndarray, "sample slot"]], tuple[Bool[np.ndarray, " sample"], Bool[np.ndarray, "sample slot"]]]
"""Slots to keep, a row an input -> whether the model's answer stays on an input that keeps them, and which slots it has kept.

A slot may be kept by chance; where slots are drawn one by one, such an input is also one of the longer rule's.
"""


@dataclass(frozen=True)
class Rule:
    """Slots to keep. precision: share of fresh inputs under the rule with the same answer; coverage: rows it holds on.

    reached: whether the precision is what was asked for; where no rule has it, all slots are kept and their own is told.
    """

    slots: tuple[int, ...]
    precision: float
    coverage: float
    samples: int
    reached: bool


def bounds(
    mean: Float[np.ndarray, " arm"], n: Float[np.ndarray, " arm"], level: float
) -> tuple[Float[np.ndarray, " arm"], Float[np.ndarray, " arm"]]:
    """Lowest and highest rate q with n KL(mean, q) <= level, by bisection."""
    mean = np.clip(mean, 1e-9, 1 - 1e-9)

    def divergence(q: np.ndarray) -> np.ndarray:
        return mean * np.log(mean / q) + (1 - mean) * np.log((1 - mean) / (1 - q))

    ends = []
    for far in (1e-9, 1 - 1e-9):
        near, out = mean.copy(), np.full_like(mean, far)
        for _ in range(30):
            middle = (near + out) / 2
            inside = n * divergence(middle) <= level
            near, out = np.where(inside, middle, near), np.where(inside, out, middle)
        ends.append(near)
    return ends[0], ends[1]


def find_rule(
    draw: Draw,
    covered: Callable[[tuple[int, ...]], float],
    free: np.ndarray,
    slots: int,
    *,
    precision: float,
    beam: int,
    delta: float,
    tolerance: float,
    gap: float,
    batch: int,
    most_samples: int = 4000,
) -> Rule:
    """The widest of the shortest rules that reach ``precision``, each confirmed on 1,000 fresh samples.

    A level of the search is a best-arm problem: of all rules with one more slot the ``beam`` best are told apart up to
    ``tolerance``, then those that may reach the precision are sampled until their bound tells within ``gap``. A level stops
    after most_samples draws of one rule. Samples of shorter rules that happen to keep a longer one's slots count for it.
    Without any such rule all slots are kept.
    """
    parents: list[tuple[int, ...]] = [()]
    used, drawn = 0, list[tuple[np.ndarray, np.ndarray]]()  # of this level: what was kept, whether the answer stayed

    def sample(chosen: Sequence[tuple[int, ...]], n: int) -> Float[np.ndarray, " rule"]:
        """Of n fresh inputs under each rule, how many keep the answer."""
        nonlocal used
        used += n * len(chosen)
        keep = np.zeros((len(chosen), slots), dtype=bool)
        for line, rule in zip(keep, chosen, strict=True):
            line[list(rule)] = True
        stays, kept = draw(np.repeat(keep, n, axis=0))
        drawn.append((kept, stays))
        return stays.reshape(len(chosen), n).sum(axis=1).astype(np.float64)

    for length in range(1, len(free) + 1):
        rules = sorted({tuple(sorted({*rule, int(s)})) for rule in parents for s in free if s not in rule})
        n, right = _known(rules, drawn)
        drawn.clear()
        few = np.flatnonzero(n < batch)
        if len(few):
            right[few] += sample([rules[arm] for arm in few], batch)
            n[few] += batch
        level = np.log(1 / delta) + np.log(max(1.0, len(rules) * length))
        top = np.argsort(-right / n, kind="stable")[:beam]
        while len(top) < len(rules):
            low, high = bounds(right / n, n, level)
            top = np.argsort(-right / n, kind="stable")[:beam]
            rest = np.setdiff1d(np.arange(len(rules)), top)
            weakest, rival = low[top].min(), high[rest].max()
            if rival - weakest < tolerance or n[top].max() >= most_samples / 4:
                break
            rest = rest[np.argsort(-high[rest], kind="stable")[:beam]]
            # a rule that is told apart from the others already needs no more samples
            arms = np.concatenate([top[rival - low[top] >= tolerance], rest[high[rest] - weakest >= tolerance]])
            right[arms] += sample([rules[arm] for arm in arms], batch)
            n[arms] += batch
        while True:
            mean = right[top] / n[top]
            low, high = bounds(mean, n[top], float(np.log(1 / delta)))
            unclear = np.where(mean >= precision, low < precision - gap, high >= precision + gap / 2)
            unclear &= n[top] < most_samples
            if not unclear.any():
                break
            right[top[unclear]] += sample([rules[arm] for arm in top[unclear]], batch)
            n[top[unclear]] += batch
        good = [rules[arm] for arm in top[(mean >= precision) & (low >= precision - gap)]]
        for rule in sorted(good, key=covered, reverse=True):
            confirmed = float(sample([rule], 1000)[0]) / 1000
            if confirmed >= precision:
                return Rule(rule, confirmed, covered(rule), used, True)
        parents = [rules[arm] for arm in top]
    every = tuple(map(int, free))
    confirmed = float(sample([every], 1000)[0]) / 1000
    return Rule(every, confirmed, covered(every), used, confirmed >= precision)


def _known(
    rules: Sequence[tuple[int, ...]], drawn: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[Float[np.ndarray, " rule"], Float[np.ndarray, " rule"]]:
    """For each rule how many of the inputs drawn for shorter rules keep all its slots, and on how many the answer stays."""
    if not drawn:
        return np.zeros(len(rules)), np.zeros(len(rules))
    kept, stays = np.concatenate([part for part, _ in drawn]).T.copy(), np.concatenate([part for _, part in drawn])
    found = [np.logical_and.reduce([kept[slot] for slot in rule]) for rule in rules]
    return np.array([float(one.sum()) for one in found]), np.array([float((one & stays).sum()) for one in found])
