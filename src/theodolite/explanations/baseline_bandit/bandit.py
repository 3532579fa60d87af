"""A bandit that learns, for one metric, which baselines give good maps of which inputs, and returns the best map it drew."""

__all__ = ["BanditExplanation", "BaselineBandit"]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from torch import Tensor

from theodolite.core.attribution_metrics import (
    HIGHER_IS_BETTER,
    attribution_scores,
    metric_name,
    rows_per_score,
    target_probabilities,
)
from theodolite.core.capture import activations
from theodolite.core.errors import InputError
from theodolite.core.view import ModelView, model_input
from theodolite.explanations.baseline_bandit.baselines import BaselineFamily
from theodolite.explanations.baseline_bandit.engine import Arm, Draws
from theodolite.explanations.baseline_bandit.paths import ConstantMapWarning
from theodolite.explanations.baseline_bandit.split import head_input
from theodolite.explanations.baseline_bandit.thompson import BetaBernoulli, Policy, ThompsonLogistic, UniformChoice

_COMPONENTS = 100


@dataclass(frozen=True, eq=False)
class BanditExplanation:
    """The best of the maps drawn for one input, by the bandit's metric.

    map: (H, W) float32 in [0, 1]; of a table (features,). score: its own, which chose it; so compare it only with the best of as
    many maps of others. scores (T,), arms (T,): of every draw in order, NaN where the gradient was not finite; arms index
    ``arm_names``. baseline_score: of the zero baseline's map, NaN where its gradient was not finite. target: the class
    explained. n_forward: rows that went through the network or its upper part. n_constant: draws whose map was the same
    everywhere.
    """

    map: Float[Tensor, "..."]
    score: float
    family: str
    layer: str
    scores: Float[np.ndarray, " draw"]
    arms: Int[np.ndarray, " draw"]
    arm_names: tuple[Arm, ...]
    baseline_score: float
    target: int
    metric: str
    n_forward: int
    n_constant: int
    _mixture: Callable[[Tensor | None], dict[str, float]] = field(repr=False)

    @property
    def n_dropped(self) -> int:
        """Draws without a score, as their gradient was not finite."""
        return int(np.isnan(self.scores).sum())

    def mixture(self, x: Tensor | None = None) -> dict[str, float]:
        """Probability of each family after these draws, for this input or another one, from 1,000 posterior samples."""
        return self._mixture(x)


@dataclass(frozen=True, eq=False)
class _Context:
    """Pooled features of the network on fixed principal axes, of unit length, and a 1; without axes only the 1."""

    node: str | None
    mean: np.ndarray
    axes: np.ndarray  # (features, components)

    @classmethod
    def fit(cls, draws: Draws, x: Tensor, memory: int | None) -> "_Context":
        split = next(iter(draws.splits.values()))
        node = head_input(split.model, x)
        rows = cls._pooled(draws, node, x, memory)
        mean = rows.mean(axis=0)
        _, sizes, axes = np.linalg.svd(rows - mean, full_matrices=False)
        count = min(_COMPONENTS, len(rows) - 1, int((sizes > 1e-6 * max(sizes[0], 1e-30)).sum()))
        return cls(node, mean, axes[:count].T)

    @staticmethod
    def _pooled(draws: Draws, node: str | None, x: Tensor, memory: int | None) -> np.ndarray:
        split = next(iter(draws.splits.values()))
        if node is None:
            a = split.grid(split.lower_all(x, memory=memory)).values
        else:
            a = activations(split.model, x, [node], memory=memory)[node]
        if node is None and a.ndim > 2:
            a = a.flatten(2).mean(dim=2)
        elif a.ndim > 2:
            a = a.flatten(1, -2).mean(dim=1)
        return a.double().cpu().numpy()

    def __call__(self, draws: Draws, x: Tensor, memory: int | None) -> np.ndarray:
        found = (self._pooled(draws, self.node, x, memory) - self.mean) @ self.axes
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.concatenate([found / np.where(length > 0, length, 1), np.ones((len(x), 1))], axis=1)


class BaselineBandit(BaseEstimator):
    """Learns on inputs which (layer, family of baselines) makes maps that do well by ``metric``, and explains others.

    metric: one of `HIGHER_IS_BETTER`. layers: "auto" (the ends of the last two feature stages) or names. families: the first
    so many, or a list of names and callables. steps: points of a path. draws: maps an explanation chooses from. context:
    "penultimate" (the explained network's own features), "none" (one mixture for all inputs), or "uniform" (learns nothing:
    the control). combine, output: as in `path_attributions`. removed, metric_steps: as in `attribution_scores`.
    finetune: whether draws for an input go on teaching a copy of the posterior. train_mean: inputs averaged by the train
    family.

    A draw is rewarded with +1 where its score beats a reference, else -1: while fitting, the zero baseline's map; while
    explaining, the median of the maps drawn so far. A constant map is rewarded with -1; a draw whose gradient is not finite
    is left out and counted. After `fit`: arms_, chosen_ and rewards_ of each round, policy_, n_dropped_.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    >>> bandit = BaselineBandit("deletion", draws=4).fit(net, images[:10])
    >>> bandit.explain(images[10]).map.shape
    torch.Size([6, 6])
    """

    def __init__(
        self,
        metric: str,
        layers: str | Sequence[str] = "auto",
        families: int | Sequence[BaselineFamily] = 5,
        steps: int = 10,
        draws: int = 20,
        context: str = "penultimate",
        combine: str = "relu-product",
        *,
        output: str = "logit",
        removed: float | Tensor | str = 0.0,
        metric_steps: int = 10,
        finetune: bool = True,
        train_mean: int = 1,
        channels_last: bool = False,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        self.metric = metric
        self.layers = layers
        self.families = families
        self.steps = steps
        self.draws = draws
        self.context = context
        self.combine = combine
        self.output = output
        self.removed = removed
        self.metric_steps = metric_steps
        self.finetune = finetune
        self.train_mean = train_mean
        self.channels_last = channels_last
        self.memory = memory
        self.seed = seed

    def fit(
        self,
        model: Any,
        X: Float[Tensor, "row ..."],
        targets: Int[Tensor, " row"] | int | None = None,
        bank: Float[Tensor, "bank ..."] | None = None,
    ) -> "BaselineBandit":
        """One draw for each row of ``X`` in random order. targets: classes to explain; None: the predicted ones.

        bank: inputs for the train family, of which the first 100 are used; where families is a number and there is no
        bank, the rows of ``X``.
        """
        name = metric_name(self.metric)
        if self.context not in ("penultimate", "none", "uniform"):
            raise InputError(f"context must be penultimate, none or uniform, got {self.context!r}")
        _positive("draws", self.draws)
        X = model_input(model, X)
        bank = None if bank is None else model_input(model, bank)
        _checked_rows(X)
        self.draws_ = Draws.of(
            model, X, layers=self.layers, families=self.families, bank=bank, steps=self.steps, combine=self.combine,
            output=self.output, train_mean=self.train_mean, channels_last=self.channels_last, memory=self.memory,
        )  # fmt: skip
        self.view_ = ModelView(model, memory=self.memory)
        self.arms_ = tuple(self.draws_.arms)
        self.metric_ = name
        self.shape_ = tuple(X.shape[1:])
        chosen, plain = target_probabilities(self.view_, X, targets)
        contexts, self.context_ = np.ones((len(X), 1)), None
        if self.context == "penultimate":
            self.context_ = _Context.fit(self.draws_, X, self.memory)
            contexts = self.context_(self.draws_, X, self.memory)
        seeds = [self.seed, 0]
        count = len(self.arms_)
        self.policy_: Policy = (
            ThompsonLogistic(count, contexts.shape[1], seed=seeds) if self.context == "penultimate"
            else BetaBernoulli(count, seed=seeds) if self.context == "none" else UniformChoice(count, seed=seeds)
        )  # fmt: skip
        rng = torch.Generator().manual_seed(self.seed)
        pulled, rewards, self.n_dropped_ = [], [], 0
        for i in torch.randperm(len(X), generator=rng).tolist():
            row = slice(i, i + 1)
            arm = self.policy_.choose(contexts[i])
            zero = self._draw(Arm(self.arms_[0].layer, "zero"), X[row], chosen[row], plain[row], rng)
            drawn = self._draw(self.arms_[arm], X[row], chosen[row], plain[row], rng)
            if drawn is None or zero is None:
                self.n_dropped_ += 1
                continue
            reward = 1.0 if drawn.differs and self._beats(drawn.score, zero.score) else -1.0
            self.policy_.update(arm, contexts[i], reward)
            pulled.append(arm)
            rewards.append(reward)
        if not rewards:
            raise InputError("no draw had a finite gradient; check the inputs and the network's weights")
        self.chosen_, self.rewards_ = np.array(pulled), np.array(rewards)
        return self

    def explain(
        self, x: Float[Tensor, "..."], target: int | None = None, draws: int | None = None
    ) -> BanditExplanation:
        """Draw ``draws`` maps of one input, (channels, height, width) or (features,), and return the best one.

        target: the class to explain, None: the predicted one. The same input gives the same answer. Warns with
        ConstantMapWarning where the best map has no differences.
        """
        x = self._one(x)
        count = self.draws if draws is None else draws
        _positive("draws", count)
        chosen, plain = target_probabilities(self.view_, x, target)
        context = self._contexts(x)[0]
        policy, rng = self.policy_.reseeded([self.seed, 1]), torch.Generator().manual_seed(self.seed)
        held: dict[str, Tensor] = {}
        zero = self._draw(Arm(self.arms_[0].layer, "zero"), x, chosen, plain, rng, held)
        scores, pulled, maps, constant = [], [], [], 0
        for _ in range(count):
            arm = policy.choose(context)
            drawn = self._draw(self.arms_[arm], x, chosen, plain, rng, held)
            pulled.append(arm)
            if drawn is None:
                scores.append(np.nan)
                maps.append(None)
                continue
            before = [score for score in scores if not np.isnan(score)]
            reference = float(np.median(before)) if before else drawn.score if zero is None else zero.score
            constant += not drawn.differs
            if self.finetune:
                good = drawn.differs and self._beats(drawn.score, reference)
                policy.update(arm, context, 1.0 if good else -1.0)
            scores.append(drawn.score)
            maps.append(drawn)
        table = np.array(scores)
        if np.isnan(table).all():
            raise InputError(f"the gradient of class {int(chosen)} is not finite at this input, whatever the baseline")
        best = int(np.nanargmax(table) if HIGHER_IS_BETTER[self.metric_] else np.nanargmin(table))
        if not maps[best].differs:
            warnings.warn("the best map is constant and given as zeros", ConstantMapWarning, stacklevel=2)
        finite = int((~np.isnan(table)).sum())
        arm = self.arms_[pulled[best]]
        return BanditExplanation(
            map=maps[best].map, score=float(table[best]), family=arm.family, layer=arm.layer, scores=table,
            arms=np.array(pulled), arm_names=self.arms_, baseline_score=np.nan if zero is None else zero.score,
            target=int(chosen), metric=self.metric_,
            n_forward=2 + len(held) + (count + 1) * self.steps
            + (finite + (zero is not None)) * rows_per_score(self.metric_, self.metric_steps),
            n_constant=constant, _mixture=partial(self._mixture_of, policy, context),
        )  # fmt: skip

    def fresh(self, x: Float[Tensor, "..."], found: BanditExplanation, *, seed: int = 0) -> tuple[Tensor, float]:
        """A new map by the arm that ``found`` chose, and its score, which chose nothing: how far the choice was luck."""
        x = self._one(x)
        chosen, plain = target_probabilities(self.view_, x, found.target)
        rng = torch.Generator().manual_seed(seed + 1_000_003)
        drawn = self._draw(Arm(found.layer, found.family), x, chosen, plain, rng)
        if drawn is None:
            raise InputError("the gradient of a fresh draw is not finite")
        return drawn.map, drawn.score

    def mixture(self, x: Float[Tensor, "..."]) -> dict[str, float]:
        """Probability of each family for one input after `fit`, from 1,000 posterior samples."""
        return self._by_family(self.policy_.probabilities(self._contexts(self._one(x))[0]))

    # ---- parts

    def _mixture_of(self, policy: Policy, context: np.ndarray, other: Tensor | None) -> dict[str, float]:
        return self._by_family(policy.probabilities(context if other is None else self._contexts(self._one(other))[0]))

    def _by_family(self, probabilities: np.ndarray) -> dict[str, float]:
        out = dict.fromkeys((arm.family for arm in self.arms_), 0.0)
        for arm, p in zip(self.arms_, probabilities, strict=True):
            out[arm.family] += float(p)
        return out

    def _one(self, x: Tensor) -> Tensor:
        if not hasattr(self, "policy_"):
            raise InputError("call fit(model, X) first")
        x = model_input(self.view_.model, x)
        if x.ndim == len(self.shape_):
            x = x[None]
        if x.ndim != len(self.shape_) + 1 or len(x) != 1:
            raise InputError(f"explain takes one input at a time, got shape {tuple(x.shape)}")
        _checked_rows(x)
        return x

    def _contexts(self, x: Tensor) -> np.ndarray:
        return np.ones((len(x), 1)) if self.context_ is None else self.context_(self.draws_, x, self.memory)

    def _beats(self, score: float, reference: float) -> bool:
        return score > reference if HIGHER_IS_BETTER[self.metric_] else score < reference

    def _draw(
        self,
        arm: Arm,
        x: Tensor,
        target: Tensor,
        plain: Tensor,
        rng: torch.Generator,
        held: dict[str, Tensor] | None = None,
    ) -> "_Drawn | None":
        """One map of one row with its score; None where the gradient is not finite. held: activations by layer."""
        held = {} if held is None else held
        if arm.layer not in held:
            held[arm.layer] = self.draws_.splits[arm.layer].lower(x)
        shape = tuple(x.shape[2:]) if x.ndim == 4 else tuple(x.shape[1:])
        maps = self.draws_.maps(arm, held[arm.layer], target, shape, rng)
        if bool(torch.isnan(maps).any()):
            return None
        score = attribution_scores(
            self.metric_, self.view_, x, maps, target, removed=self.removed, steps=self.metric_steps, plain=plain,
            memory=self.memory,
        )  # fmt: skip
        return _Drawn(maps[0], float(score), bool(maps.amax() > 0))


@dataclass(frozen=True, eq=False)
class _Drawn:
    map: Tensor
    score: float
    differs: bool


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def _checked_rows(x: Tensor) -> None:
    if x.ndim not in (2, 4) or len(x) == 0:
        raise InputError(f"inputs are (n, channels, height, width) or (n, features), got {tuple(x.shape)}")
    if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
        raise InputError("inputs must be finite floating-point numbers")
