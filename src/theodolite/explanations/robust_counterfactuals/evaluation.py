"""Generators side by side: what a counterfactual costs and how many retrained models still accept it."""

__all__ = ["benchmark"]

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.neighbors import LocalOutlierFactor

from theodolite.core.errors import InputError
from theodolite.explanations.counterfactuals import Generator
from theodolite.explanations.model_changes import robust_validity


def benchmark(
    methods: Mapping[str, Generator] | Sequence[Generator],
    model: Any,
    retrained: Sequence[Any],
    X: Any,
    X_train: Any,
    *,
    target: int | None = None,
) -> pd.DataFrame:
    """One line a method: mean cost, base and robust validity, LOF, stability and seconds, on the rows of X.

    Costs, LOF and stability are means over the rows with a counterfactual; lof is the mean of +1 (plausible) and -1, by a
    `LocalOutlierFactor` of one neighbour fitted on the training rows in units of their ranges, as in the paper's protocol.
    """
    named = methods if isinstance(methods, Mapping) else {type(m).__name__: m for m in methods}
    if len(named) < len(methods):
        raise InputError("two methods are of one kind; name them: benchmark({'tau .6': TRex(tau=0.6), ...}, ...)")
    lines = []
    outliers = None
    for name, method in named.items():
        began = time.perf_counter()
        found = method.fit(model, X_train).generate(X, target)
        seconds = time.perf_counter() - began
        schema = method.schema
        if outliers is None:
            rows = schema.scaled(schema.rows(X_train)).numpy()
            outliers = LocalOutlierFactor(n_neighbors=1, novelty=True).fit(rows)
        there = found.valid
        lof = (
            outliers.predict(schema.scaled(found.counterfactuals[there]).numpy()) if there.any() else np.array([np.nan])
        )
        lines.append(
            {
                "method": name,
                "cost": float(found.cost[there].mean()) if there.any() else np.nan,
                "base_validity": float(there.mean()),
                "robust_validity": float(robust_validity(found, retrained, target=target).mean()),
                "lof": float(lof.mean()),
                "stability": float(found.stability[there].mean()) if there.any() else np.nan,
                "seconds": seconds,
            }
        )
    return pd.DataFrame(lines)
