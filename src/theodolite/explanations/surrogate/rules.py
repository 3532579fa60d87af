"""A tree as rules in words, and the nearest box of another answer."""

__all__ = ["Condition", "LeafBoxes", "Rule", "RuleList"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from theodolite.explanations.surrogate.copies import Surrogate

_LOSS = 0.01  # purity that dropping conditions may cost in all


@dataclass(frozen=True)
class Condition:
    """low < value of a column <= high, in the units of the table; infinite ends are open."""

    column: int
    feature: str
    low: float
    high: float

    def holds(self, x: Any) -> Bool[np.ndarray, " row"]:
        """Which rows of a table (rows, columns) meet it; of a data frame that has the column by name, that one is read.

        Values are rounded to single precision first, as the tree does.
        """
        if isinstance(x, pd.DataFrame):
            place = (
                list(map(str, x.columns)).index(self.feature) if self.feature in map(str, x.columns) else self.column
            )
            column: Any = x.iloc[:, place].to_numpy()
        else:
            column = np.asarray(x)[:, self.column]
        values = column.astype(np.float32)
        return (values > self.low) & (values <= self.high)

    def rescaled(self, shift: float, scale: float) -> "Condition":
        """The same condition on shift + scale * value; scale > 0."""
        return replace(self, low=shift + scale * self.low, high=shift + scale * self.high)

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.feature} <= {self.high:.4g}"
        if math.isinf(self.high):
            return f"{self.feature} > {self.low:.4g}"
        return f"{self.low:.4g} < {self.feature} <= {self.high:.4g}"


@dataclass(frozen=True)
class Rule:
    """If all conditions hold, the black box answers ``class_`` (for a regression about ``value``).

    support: training rows that meet the conditions. purity: share of them that the black box gives this class (for a
    regression: a value within half a standard deviation of ``value``). precision: share of the validation rows that
    meet the conditions and truly are of this class; None without labels or without such rows. index: position of the class
    among the model's outputs.
    """

    conditions: tuple[Condition, ...]
    class_: object
    support: int
    purity: float
    precision: float | None
    value: float = float("nan")
    index: int = 0

    def holds(self, x: Any) -> Bool[np.ndarray, " row"]:
        """Which rows of a whole table, an array or a data frame, meet every condition."""
        met = np.ones(len(x), dtype=bool)
        for condition in self.conditions:
            met &= condition.holds(x)
        return met

    def rescaled(self, scaling: Sequence[tuple[float, float]]) -> "Rule":
        """The same rule on a table whose column j is shift + scale * x, with (shift, scale) = scaling[j]."""
        return replace(self, conditions=tuple(c.rescaled(*scaling[c.column]) for c in self.conditions))

    def __str__(self) -> str:
        head = "if " + " and ".join(map(str, self.conditions)) if self.conditions else "always"
        answer = f"{self.value:.4g}" if self.class_ is None else str(self.class_)
        rows = "row" if self.support == 1 else "rows"
        return f"{head}, then {answer} ({self.support} {rows}, {self.purity:.0%})"


@dataclass(frozen=True)
class RuleList:
    """Rules asked in order; the first that holds answers, and the default where none does.

    Support, purity and precision of a rule are of the rows that no earlier one holds for.
    """

    rules: tuple[Rule, ...]
    default: object
    default_index: int = 0

    def predict(self, x: Any) -> Int[np.ndarray, " row"]:
        """Position of the class that each row of a whole table, an array or a data frame, is given."""
        answer, open_ = np.full(len(x), self.default_index), np.ones(len(x), dtype=bool)
        for rule in self.rules:
            met = open_ & rule.holds(x)
            answer[met] = rule.index
            open_ &= ~met
        return answer

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rules), f"otherwise {self.default}"])


@dataclass(frozen=True, eq=False)
class LeafBoxes:
    """The leaves of a tree as boxes over its columns: low < x <= high.

    leaf: node number of each leaf; answer: what the surrogate gives there, (leaves, outputs).
    """

    columns: Int[np.ndarray, " k"]
    leaf: Int[np.ndarray, " leaf"]
    low: Float[np.ndarray, "leaf k"]
    high: Float[np.ndarray, "leaf k"]
    answer: Float[np.ndarray, "leaf output"]

    @classmethod
    def of(cls, surrogate: Surrogate) -> "LeafBoxes":
        """Every root-to-leaf path, its conditions merged per column."""
        tree, k = surrogate.model.tree_, len(surrogate.columns)
        found = list[tuple[int, np.ndarray, np.ndarray]]()
        stack = [(0, np.full(k, -np.inf), np.full(k, np.inf))]
        while stack:
            node, low, high = stack.pop()
            left, right = tree.children_left[node], tree.children_right[node]
            if left == right:
                found.append((node, low, high))
                continue
            j, threshold = tree.feature[node], tree.threshold[node]
            below, above = high.copy(), low.copy()
            below[j], above[j] = min(high[j], threshold), max(low[j], threshold)
            stack += [(right, above, high), (left, low, below)]
        nodes, low, high = zip(*found, strict=True)
        leaf = np.array([int(node) for node in nodes], dtype=np.int64)
        value = tree.value[leaf][:, :, 0]
        if surrogate.paired:
            value = np.hstack([1 - value, value])
        return cls(surrogate.columns, leaf, np.array(low), np.array(high), value)

    def __len__(self) -> int:
        return len(self.leaf)

    def conditions(self, i: int, features: list[str]) -> tuple[Condition, ...]:
        """The box of leaf i without its open sides."""
        limits = zip(self.columns.tolist(), self.low[i].tolist(), self.high[i].tolist(), strict=True)
        return tuple(
            Condition(j, features[j], low, high)
            for j, low, high in limits
            if not (math.isinf(low) and math.isinf(high))
        )

    def costs(self, x: Float[np.ndarray, " k"], scale: Float[np.ndarray, " k"]) -> Float[np.ndarray, " leaf"]:
        """The smallest change that reaches each box: sum over columns of |clip(x, low, high) - x| / scale."""
        return (np.abs(np.clip(x, self.low, self.high) - x) / scale).sum(axis=1)

    def into(self, i: int, x: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        """x moved into box i: at an end, to the nearest single-precision number inside it."""
        low, high = self.low[i], self.high[i]
        seen = x.astype(np.float32)
        up, down = low.astype(np.float32), high.astype(np.float32)
        up = np.where(up > low, up, np.nextafter(up, np.float32(np.inf)))
        down = np.where(down <= high, down, np.nextafter(down, np.float32(-np.inf)))
        return np.where(seen <= low, up.astype(np.float64), np.where(seen > high, down.astype(np.float64), x))


def rule_of(
    conditions: tuple[Condition, ...],
    x: np.ndarray,
    p: np.ndarray,
    answer: np.ndarray,
    classes: list[object],
    truth: tuple[np.ndarray, np.ndarray] | None,
) -> Rule:
    """The rule with these conditions, measured on rows x with black-box answers p; truth: (rows, class indices)."""
    index = int(answer.argmax())
    draft = Rule(conditions, classes[index], 0, 0.0, None, float(answer[0]), index)
    met = draft.holds(x)
    right = _right(p, answer)
    precision = None
    if truth is not None and p.shape[1] > 1 and (seen := draft.holds(truth[0])).any():
        precision = float((truth[1][seen] == index).mean())
    value = float(answer[0]) if p.shape[1] == 1 else float("nan")
    purity = float(right[met].mean()) if met.any() else 0.0
    return Rule(conditions, classes[index], int(met.sum()), purity, precision, value, index)


def _right(p: np.ndarray, answer: np.ndarray) -> np.ndarray:
    if p.shape[1] > 1:
        return p.argmax(axis=1) == answer.argmax()
    return np.abs(p[:, 0] - answer[0]) <= p[:, 0].std() / 2


def pruned(
    conditions: tuple[Condition, ...], x: np.ndarray, p: np.ndarray, answer: np.ndarray
) -> tuple[Condition, ...]:
    """Conditions left after dropping, one by one, the one whose loss keeps most purity, while less than a point is lost.

    A leaf that is no purer than all rows together says nothing that fewer conditions would not, so it is left as it is.
    """
    right = _right(p, answer)
    if right.all():
        return ()
    met = np.array([condition.holds(x) for condition in conditions]).reshape(len(conditions), len(x))
    kept = list(range(len(conditions)))
    whole = met.all(axis=0)
    own = float(right[whole].mean()) if whole.any() else 0.0
    while len(kept) > 1 and own > right.mean():
        without = [met[[j for j in kept if j != i]].all(axis=0) for i in kept]
        purity = [float(right[rows].mean()) for rows in without]
        best = int(np.argmax(purity))
        if purity[best] <= own - _LOSS:
            break
        kept.pop(best)
    return tuple(conditions[i] for i in kept)


def ordered_list(
    rules: Sequence[Rule],
    x: np.ndarray,
    p: np.ndarray,
    truth: tuple[np.ndarray, np.ndarray] | None,
    *,
    max_rules: int,
    classes: Sequence[object],
) -> RuleList:
    """Rules in an order: each time the one that is right on most of the rows left over, less those that it is wrong on."""
    answer, left = p.argmax(axis=1), np.ones(len(x), dtype=bool)
    unseen = None if truth is None else np.ones(len(truth[0]), dtype=bool)
    met = np.array([rule.holds(x) for rule in rules]).reshape(len(rules), len(x))
    right = met & (answer == np.array([rule.index for rule in rules])[:, None])
    taken = list[Rule]()
    while len(taken) < max_rules and rules and left.any():
        support, good = (met & left).sum(axis=1), (right & left).sum(axis=1)
        best = int(np.argmax(2 * good - support))
        if 2 * good[best] <= support[best]:
            break
        precision = None
        if truth is not None and unseen is not None:
            seen = unseen & rules[best].holds(truth[0])
            precision = float((truth[1][seen] == rules[best].index).mean()) if seen.any() else None
            unseen &= ~seen
        n = int(support[best])
        taken.append(replace(rules[best], support=n, purity=float(good[best] / n), precision=precision))
        left &= ~met[best]
    default = int(np.bincount(answer[left] if left.any() else answer, minlength=p.shape[1]).argmax())
    return RuleList(tuple(taken), classes[default], default)
