"""Which explanation to choose: how far each surrogate is from the model, on moves that fitted none of them.

No free lunch (Theorem 1): an explanation that is faithful in one neighbourhood is, in another one, as unfaithful as the best
surrogate at its worst place. So faithfulness is a table, methods by neighbourhoods, and a method is chosen by the
neighbourhood that matters to its reader.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (Section 4).
"""

__all__ = ["NEIGHBOURHOODS", "faithfulness", "faithfulness_by_row", "faithfulness_table", "recommend"]

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.explanations.local_approximation.engine import LocalApproximation, LocalExplanation, move_weights
from theodolite.explanations.local_approximation.local import LocalFunction
from theodolite.explanations.local_approximation.methods import METHODS
from theodolite.explanations.local_approximation.neighbourhood import Neighbourhood, NotDifferentiableError
from theodolite.explanations.local_approximation.solve import logistic_loss

NEIGHBOURHOODS: dict[str, Neighbourhood] = {
    "binary": Neighbourhood.binary(),
    "one-hot": Neighbourhood.one_hot(),
    "gaussian": Neighbourhood.gaussian(0.1),
    "path": Neighbourhood.path(),
}
"""On/off changes of many features, of one feature, small continuous changes, and the way from the baseline."""

_HELD_OUT = 1  # stream of draws that no fit uses


def faithfulness(
    f: Any,
    X: Tensor | np.ndarray,
    weights: Tensor | np.ndarray,
    intercept: Tensor | np.ndarray | float,
    neighbourhood: Neighbourhood,
    loss: str = "squared",
    *,
    target: Any = None,
    surrogate: str = "linear",
    n_samples: int = 1000,
    seed: int = 0,
    memory: int | None = None,
) -> Float[Tensor, " row"]:
    """Loss (n,) of given surrogates on fresh draws of ``neighbourhood``; 0 is perfect.

    weights (n, d), intercept (n,) or one number: in the coordinates of that neighbourhood (multiplicative weights belong to
    x * slope). The squared loss is a mean weighted by the kernel; "gradient" is the mean squared distance of the gradients.
    Moves are drawn anew, also for the seed that fitted the weights; where a neighbourhood is listed whole there is no other.
    """
    _check_options(loss, surrogate)
    local = LocalFunction(f, X, target, neighbourhood, memory=memory)
    w = torch.as_tensor(weights, dtype=torch.float64, device=local.x.device)
    b = torch.as_tensor(intercept, dtype=torch.float64, device=local.x.device)
    if w.shape != (len(local), local.features):
        raise InputError(f"weights must be {(len(local), local.features)} for these rows, got {tuple(w.shape)}")
    if b.ndim > 1 or b.numel() not in (1, len(local)):
        raise InputError(f"intercept must be one number or {len(local)}, got shape {tuple(b.shape)}")
    if loss == "gradient":
        local.require_gradient()
    return _loss(local, w, b.expand(len(local)), loss, surrogate, n_samples, seed).float()


def _loss(
    local: LocalFunction, w: Tensor, b: Tensor, loss: str, surrogate: str, n_samples: int, seed: int
) -> Float[Tensor, " row"]:
    draws = local.neighbourhood.draws(local.features, n_samples, seed=seed, stream=_HELD_OUT)
    out = torch.zeros_like(b)
    width = local.features if loss == "gradient" else 1
    for rows in chunks(len(local), 8.0 * 4 * draws.size, local.memory // 4):
        weights, done = move_weights(local, draws, rows), 0
        for block in draws:
            chosen = slice(done, done + len(block))
            done = chosen.stop
            z = block.to(local.x)
            for part in chunks(rows.stop - rows.start, 8.0 * 5 * len(block) * width, local.memory // 4):
                here = slice(rows.start + part.start, rows.start + part.stop)
                pi = weights[:, chosen] if len(weights) == 1 else weights[part, chosen]
                found = local.gradients(here, z).double() if loss == "gradient" else local.values(here, z)
                if surrogate == "logistic":
                    distance = logistic_loss(z, found, w[here], b[here])
                elif loss == "gradient":
                    distance = (found - w[here, None]).square_().sum(dim=2)
                else:
                    distance = (found - w[here] @ z.double().T - b[here, None]).square()
                out[here] += (pi * distance).sum(dim=1)
    return out


def faithfulness_by_row(
    f: Any,
    X: Tensor | np.ndarray,
    methods: Mapping[str, LocalApproximation] = METHODS,
    neighbourhoods: Mapping[str, Neighbourhood] = NEIGHBOURHOODS,
    *,
    target: Any = None,
    n_samples: int = 1000,
    seed: int = 0,
    memory: int | None = None,
) -> dict[tuple[str, str], Float[Tensor, " row"]]:
    """Held-out loss (n,) of each method in each neighbourhood, by (method, neighbourhood).

    A linear surrogate is taken as the plane that it is, and written in the coordinates of each neighbourhood, so that a
    method is not called unfaithful for speaking of x * slope instead of slope. The loss is the squared one, on a path the
    gradient loss. Methods that need gradients are left out where f has none.
    """
    if not methods or not neighbourhoods:
        raise InputError("need at least one method and one neighbourhood")
    explained = {}
    for name, method in methods.items():
        if method.surrogate != "linear":
            raise InputError(
                f"{name} has a logistic surrogate, which other coordinates cannot express; use faithfulness"
            )
        try:
            explained[name] = method.explain(f, X, target)
        except NotDifferentiableError:
            continue
    if not explained:
        raise NotDifferentiableError(
            "f gives no gradient, and all methods need one; add LIME, KernelSHAP, Occlusion or C-LIME"
        )
    planes = {name: _plane(f, X, found, memory) for name, found in explained.items()}
    out = {}
    for place, neighbourhood in neighbourhoods.items():
        local = LocalFunction(f, X, target, neighbourhood, memory=memory)
        loss = neighbourhood.natural_loss if _differentiable(local) else "squared"
        for name, (slopes, at_x) in planes.items():
            w, b = local.from_slopes(slopes, at_x)
            out[name, place] = _loss(local, w, b, loss, "linear", n_samples, seed)
    return out


def faithfulness_table(
    f: Any,
    X: Tensor | np.ndarray,
    methods: Mapping[str, LocalApproximation] = METHODS,
    neighbourhoods: Mapping[str, Neighbourhood] = NEIGHBOURHOODS,
    **options: Any,
) -> pd.DataFrame:
    """Mean held-out loss over the rows of ``X``, methods by neighbourhoods; options and meaning as in `faithfulness_by_row`."""
    by_row = faithfulness_by_row(f, X, methods, neighbourhoods, **options)
    names = [name for name in methods if (name, next(iter(neighbourhoods))) in by_row]
    means = [[float(by_row[name, place].mean()) for place in neighbourhoods] for name in names]
    return pd.DataFrame(
        means, index=pd.Index(names, name="method"), columns=pd.Index(neighbourhoods, name="neighbourhood")
    )


def recommend(
    f: Any,
    X: Tensor | np.ndarray,
    neighbourhood: Neighbourhood,
    *,
    methods: Mapping[str, LocalApproximation] = METHODS,
    **options: Any,
) -> tuple[str, pd.DataFrame]:
    """The method with the lowest held-out loss in ``neighbourhood``, and a table of all, the best first.

    Columns: loss (mean over rows), low and high (95 % over rows), times_best (ratio to the best one's loss). Choose on other
    rows than those the loss is then reported on.
    """
    place = "here"
    by_row = faithfulness_by_row(f, X, methods, {place: neighbourhood}, **options)
    rows = {}
    for (name, _), losses in by_row.items():
        mean = float(losses.mean())
        half = 1.96 * float(losses.std(correction=0)) / math.sqrt(max(1, len(losses) - 1))
        rows[name] = {"loss": mean, "low": mean - half, "high": mean + half}
    table = pd.DataFrame.from_dict(rows, orient="index").sort_values("loss", kind="stable")
    best = float(table["loss"].iloc[0])
    table["times_best"] = [loss / best if best > 0 else (1.0 if loss == 0 else math.inf) for loss in table["loss"]]
    return str(table.index[0]), table


def _plane(f: Any, X: Tensor | np.ndarray, found: LocalExplanation, memory: int | None) -> tuple[Tensor, Tensor]:
    """Slopes (n, entries) and value at x of a linear surrogate."""
    local = LocalFunction(f, X, found.target, found.method.neighbourhood, memory=memory)
    weights = found.weights.double()
    return local.slopes(weights, found.standard_error), local.at_x(weights, found.intercept.double())


def _differentiable(local: LocalFunction) -> bool:
    try:
        local.require_gradient()
    except NotDifferentiableError:
        return False
    return True


def _check_options(loss: str, surrogate: str) -> None:
    if loss not in ("squared", "gradient"):
        raise InputError(f"loss must be squared or gradient, got {loss!r}")
    if surrogate not in ("linear", "logistic"):
        raise InputError(f"surrogate must be linear or logistic, got {surrogate!r}")
