"""Which feature stands for which value of which attribute, and how much of a reconstruction each feature makes up."""

__all__ = ["FeatureScores", "feature_f1", "feature_weights"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations.dictionary_evaluation.task import need_values
from theodolite.core.errors import InputError
from theodolite.core.memory import chunks


@dataclass(frozen=True, eq=False)
class FeatureScores:
    """How well each feature's pattern f > 0 tells each value of each attribute.

    f1, precision, recall: a row for each feature, a column for each (attribute, value). best: for each feature the attribute and
    value it tells best, and F1. groups: for each feature and attribute the union of values that it tells best ("values",
    "f1").
    """

    best: pd.DataFrame
    f1: pd.DataFrame
    precision: pd.DataFrame
    recall: pd.DataFrame
    groups: pd.DataFrame

    def best_by_value(self, attribute: str) -> pd.Series:
        """The best F1 that any feature has for each value of ``attribute``."""
        return self.f1[attribute].max(axis=0)

    def interpretable(self, threshold: float = 0.8) -> np.ndarray:
        """Whether each feature tells a value, or a union of values, with an F1 of at least ``threshold``."""
        groups: Any = self.groups
        by_group = groups.groupby("feature")["f1"].max().reindex(self.best.index).to_numpy()
        return np.maximum(self.best["f1"].to_numpy(), by_group) >= threshold


def feature_f1(active: Any, attributes: pd.DataFrame | Mapping[str, Any], max_group: int = 10) -> FeatureScores:
    """F1 of every feature for every value, from which features are on, ``active`` (n, h) of bool, and the attributes of n rows.

    A feature that is never on for a value that never occurs has F1 0. max_group: values that a union has at most; unions grow
    by falling F1 of their values. Two matrix products, whatever the number of features.

    >>> active = torch.tensor([[True, False], [True, True], [False, True]])
    >>> feature_f1(active, {"a": ["x", "x", "y"]}).f1.round(2).to_numpy().tolist()
    [[1.0, 0.0], [0.5, 0.67]]
    """
    on = active if isinstance(active, Tensor) else torch.as_tensor(np.array(active))
    table = pd.DataFrame(attributes)
    if on.ndim != 2 or on.dtype != torch.bool:
        raise InputError(f"active is (n, features) of bool (codes > 0), got {on.dtype} of shape {tuple(on.shape)}")
    if len(on) != len(table) or len(on) == 0 or max_group < 1:
        raise InputError(
            f"{len(on)} rows of features, {len(table)} of attributes, groups of {max_group}; need as many, and at least 1"
        )
    if table.columns.empty:
        raise InputError("need at least one attribute")
    need_values(table)
    columns = [(name, value) for name in table.columns for value in sorted(set(table[name]), key=str)]
    truth = torch.as_tensor(np.stack([(table[name] == value).to_numpy(bool) for name, value in columns], axis=1))
    hits = torch.zeros(on.shape[1], truth.shape[1], dtype=torch.float64)
    for part in chunks(len(on), 4.0 * (on.shape[1] + truth.shape[1])):  # float32 counts up to 2^24 rows exactly
        hits += (on[part].float().T.cpu() @ truth[part].float()).double()
    fired, there = on.sum(dim=0).double().cpu(), truth.sum(dim=0).double()
    f1 = _ratio(2 * hits, fired[:, None] + there)
    names = pd.MultiIndex.from_tuples(columns, names=["attribute", "value"])

    def frame(values: Tensor) -> pd.DataFrame:
        return pd.DataFrame(values.numpy(), columns=names).rename_axis(index="feature")

    top = f1.argmax(dim=1).numpy()
    best = pd.DataFrame(
        {
            "attribute": [columns[i][0] for i in top],
            "value": [columns[i][1] for i in top],
            "f1": f1.max(dim=1).values.numpy(),
        }
    ).rename_axis(index="feature")
    return FeatureScores(
        best, frame(f1), frame(_ratio(hits, fired[:, None])), frame(_ratio(hits, there[None])),
        _groups(columns, hits, fired, there, f1, max_group),
    )  # fmt: skip


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Above / below, 0 where both are 0."""
    return torch.where(below > 0, above / below.clamp_min(1), torch.zeros(()).double())


def _groups(
    columns: list[tuple[Any, Any]], hits: Tensor, fired: Tensor, there: Tensor, f1: Tensor, largest: int
) -> pd.DataFrame:
    parts = []
    for attribute in dict.fromkeys(name for name, _ in columns):
        at = torch.tensor([i for i, (name, _) in enumerate(columns) if name == attribute])
        size = min(largest, max(1, len(at) - 1))  # the union of all values tells nothing
        order = f1[:, at].argsort(dim=1, descending=True, stable=True)[:, :size]
        both = hits[:, at].gather(1, order).cumsum(dim=1)
        wanted = there[at][order].cumsum(dim=1)
        united = _ratio(2 * both, fired[:, None] + wanted)
        score, length = united.max(dim=1)
        values = [columns[int(i)][1] for i in at]
        parts.append(
            pd.DataFrame(
                {
                    "feature": np.arange(len(fired)),
                    "attribute": attribute,
                    "values": [
                        tuple(values[j] for j in row[: n + 1])
                        for row, n in zip(order.tolist(), length.tolist(), strict=True)
                    ],
                    "f1": score.numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def feature_weights(
    f: Float[Tensor, "row code"], decoder: Float[Tensor, "_ width"], bias: Float[Tensor, " _"] | None = None
) -> Float[Tensor, "row code"]:
    """w_j = f_j d_j . (x_hat - b) / |x_hat - b|^2 with x_hat = f D + b; each row sums to 1, or is 0 where x_hat = b.

    The bias drops out of the formula; it is taken so that a whole dictionary can be handed over, and only its width is looked at.

    >>> feature_weights(torch.tensor([[3.0, 1.0]]), torch.eye(2)).tolist()
    [[0.8999999761581421, 0.10000000149011612]]
    """
    if f.shape[1] != decoder.shape[0] or (bias is not None and bias.shape != decoder.shape[1:]):
        raise InputError(
            f"codes {tuple(f.shape)}, decoder {tuple(decoder.shape)} and bias {None if bias is None else tuple(bias.shape)} do "
            "not go together"
        )
    largest = f.abs().amax(dim=1, keepdim=True)
    f = f / torch.where(largest > 0, largest, 1.0)  # the weights keep no scale, so no square need over- or underflow
    whole = f @ decoder
    size = whole.square().sum(dim=1, keepdim=True)
    return torch.where(size > 0, f * (whole @ decoder.T) / size.clamp_min(1e-30), torch.zeros(()).to(f))
