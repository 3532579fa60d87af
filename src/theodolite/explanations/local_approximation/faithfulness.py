"""Which explanation to choose: how far each surrogate is from the model, on moves that fitted none of them.

No free lunch (Theorem 1): an explanation that is faithful in one neighbourhood is, in another one, as unfaithful as the best
surrogate at its worst place. So faithfulness is a table, methods by neighbourhoods, and a method is chosen by the
neighbourhood that matters to its reader.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (Section 4).
"""

__all__ = ["NEIGHBOURHOODS", "faithfulness", "faithfulness_by_row", "faithfulness_table", "recommend"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.estimate import mean_of_runs
from theodolite.core.memory import chunks
from theodolite.explanations.local_approximation.engine import LocalApproximation, LocalExplanation, move_weights
from theodolite.explanations.local_approximation.local import LocalFunction
from theodolite.explanations.local_approximation.methods import METHODS
from theodolite.explanations.local_approximation.neighbourhood import (
    Neighbourhood,
    NotDifferentiableError,
    whole_number,
)
from theodolite.explanations.local_approximation.solve import logistic_loss

NEIGHBOURHOODS: dict[str, Neighbourhood] = {
    "binary": Neighbourhood.binary(),
    "one-hot": Neighbourhood.one_hot(),
    "gaussian": Neighbourhood.gaussian(0.1),
    "path": Neighbourhood.path(),
}
"""On/off changes of many features, of one feature, small continuous changes, and the way from the baseline."""

_HELD_OUT = 1  # stream of draws that no fit uses


Surrogates = Callable[[LocalFunction, slice], tuple[Tensor, Tensor]]  # weights and intercepts of some rows


def faithfulness(
    f: Any,
    X: Any,
    weights: Any,
    intercept: Any,
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
    The infinite weights of the Shapley kernel at both ends are left out.

    >>> plane = lambda x: x @ torch.tensor([1.0, -2.0])
    >>> x = torch.tensor([[3.0, 1.0]])
    >>> faithfulness(plane, x, torch.tensor([[3.0, -2.0]]), 0.0, Neighbourhood.binary())
    tensor([0.])
    """
    _check_options(loss, surrogate, n_samples, seed)
    local = LocalFunction(f, X, target, neighbourhood, memory=memory)
    w = torch.as_tensor(weights, dtype=torch.float64, device=local.x.device)
    b = torch.as_tensor(intercept, dtype=torch.float64, device=local.x.device)
    if w.shape != (len(local), local.features):
        raise InputError(f"weights must be {(len(local), local.features)} for these rows, got {tuple(w.shape)}")
    if b.ndim > 1 or b.numel() not in (1, len(local)):
        raise InputError(f"intercept must be one number or {len(local)}, got shape {tuple(b.shape)}")
    if not bool(torch.isfinite(w).all() and torch.isfinite(b).all()):
        raise InputError("weights and intercept must be finite numbers")
    if loss == "gradient":
        local.require_gradient()
    b = b.expand(len(local))
    return _losses(local, [lambda _, rows: (w[rows], b[rows])], loss, surrogate, n_samples, seed)[0].float()


def _losses(
    local: LocalFunction, planes: Sequence[Surrogates], loss: str, surrogate: str, n_samples: int, seed: int
) -> Float[Tensor, "plane row"]:
    """Held-out loss of several surrogates, which share the evaluations of f."""
    draws = local.neighbourhood.draws(local.features, n_samples, seed=seed, stream=_HELD_OUT)
    out = torch.zeros(len(planes), len(local), dtype=torch.float64, device=local.x.device)
    width = local.features if loss == "gradient" else 1
    row_bytes = 8.0 * (4 * draws.size + 2 * (len(planes) + 2) * local.x.shape[1])
    for rows in chunks(len(local), row_bytes, local.share(4)):
        weights, done = move_weights(local, draws, rows), 0
        surrogates = [plane(local, rows) for plane in planes]
        for block in draws:
            chosen = slice(done, done + len(block))
            done = chosen.stop
            z = block.to(local.x)
            for part in chunks(rows.stop - rows.start, 8.0 * 5 * len(block) * width, local.share(4)):
                here = slice(rows.start + part.start, rows.start + part.stop)
                pi = weights[:, chosen] if len(weights) == 1 else weights[part, chosen]
                found = local.gradients(here, z).double() if loss == "gradient" else local.values(here, z)
                for i, (w, b) in enumerate(surrogates):
                    if surrogate == "logistic":
                        distance = logistic_loss(z, found, w[part], b[part])
                    elif loss == "gradient":
                        distance = (found - w[part, None]).square_().sum(dim=2)
                    else:
                        distance = (found - w[part] @ z.double().T - b[part, None]).square()
                    out[i, here] += (pi * distance).sum(dim=1)
    return out


@dataclass(frozen=True, eq=False)
class _Plane:
    """A linear surrogate as the plane that it is, which any neighbourhood can write in its own coordinates.

    shuffle: seed of the control whose weights are those of other features.
    """

    found: LocalExplanation
    home: LocalFunction
    shuffle: int | None = None

    def __call__(self, local: LocalFunction, rows: slice) -> tuple[Tensor, Tensor]:
        weights = self.found.weights.double()
        at_x = self.home.at_x(weights, self.found.intercept.double())[rows]
        if self.home.same_coordinates(local):
            weights = self._shuffled(weights[rows])
        else:
            slopes = self.home.slopes(weights[rows], self.found.standard_error[rows].double(), rows)
            weights = local.weights_of(self._shuffled(slopes), rows)
        return weights, local.intercept_for(weights, at_x, rows)

    def _shuffled(self, of_features: Tensor) -> Tensor:
        return of_features if self.shuffle is None else of_features[:, _another(of_features.shape[1], self.shuffle)]


def _another(features: int, seed: int) -> Int[Tensor, " feature"]:
    """For each feature another one, along one random circle through all of them."""
    circle = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(circle)
    out[circle] = circle.roll(1)
    return out


def _constant(local: LocalFunction, rows: slice) -> tuple[Tensor, Tensor]:
    """The surrogate that says f(x) everywhere."""
    weights = torch.zeros(len(local.x[rows]), local.features, dtype=torch.float64, device=local.x.device)
    return weights, local.intercept_for(weights, local.anchor[rows], rows)


def faithfulness_by_row(
    f: Any,
    X: Any,
    methods: Mapping[str, LocalApproximation | LocalExplanation] = METHODS,
    neighbourhoods: Mapping[str, Neighbourhood] = NEIGHBOURHOODS,
    *,
    target: Any = None,
    controls: bool = False,
    n_samples: int = 1000,
    seed: int = 0,
    memory: int | None = None,
) -> dict[tuple[str, str], Float[Tensor, " row"]]:
    """Held-out loss (n,) of each method in each neighbourhood, by (method, neighbourhood).

    methods: to explain with, or explanations of these very rows. A linear surrogate is taken as the plane that it is, and
    written in the coordinates of each neighbourhood, so that a method is not called unfaithful for speaking of x * slope
    instead of slope. The loss is the squared one; on a path, where that sees only the sum of the weights, the gradient
    loss, if f has gradients. Methods that need gradients are left out where f has none. seed, n_samples: of the held-out
    draws. controls: also "constant", which says f(x) everywhere, and "NAME, shuffled" for each method, which gives its
    weights to other features.
    """
    _check_options("squared", "linear", n_samples, seed)
    if not methods or not neighbourhoods:
        raise InputError("need at least one method and one neighbourhood")
    explained = _explained(f, X, methods, target, memory)
    planes: dict[str, Surrogates] = {}
    for name, found in explained.items():
        home = LocalFunction(f, X, found.target, found.method.neighbourhood, memory=memory)
        planes[name] = _Plane(found, home)
        if controls:
            planes[f"{name}, shuffled"] = _Plane(found, home, seed)
    if controls:
        planes["constant"] = _constant
    target = next(iter(explained.values())).target
    out = {}
    for place, neighbourhood in neighbourhoods.items():
        local = LocalFunction(f, X, target, neighbourhood, memory=memory)
        loss = neighbourhood.natural_loss if _differentiable(local) else "squared"
        losses = _losses(local, list(planes.values()), loss, "linear", n_samples, seed)
        out |= {(name, place): losses[i] for i, name in enumerate(planes)}
    return out


def _explained(
    f: Any, X: Any, methods: Mapping[str, LocalApproximation | LocalExplanation], target: Any, memory: int | None
) -> dict[str, LocalExplanation]:
    out = {}
    for name, method in methods.items():
        surrogate = (method.method if isinstance(method, LocalExplanation) else method).surrogate
        if surrogate != "linear":
            raise InputError(
                f"{name} has a logistic surrogate, which other coordinates cannot express; use faithfulness"
            )
        if isinstance(method, LocalExplanation):
            if len(method.target) != len(X):
                raise InputError(
                    f"{name} explains {len(method.target)} rows, but X has {len(X)}; they must be the same"
                )
            out[name] = method
            continue
        bounded = method if memory is None else replace(method, memory=memory)
        try:
            out[name] = bounded.explain(f, X, target)
        except NotDifferentiableError:
            continue
    if not out:
        raise NotDifferentiableError(
            "f gives no gradient, and all methods need one; add LIME, KernelSHAP, Occlusion or C-LIME"
        )
    targets = {tuple(found.target.tolist()) for found in out.values()}
    if len(targets) > 1:
        raise InputError("the explanations are of different classes; give them the same target")
    return out


def faithfulness_table(
    f: Any,
    X: Any,
    methods: Mapping[str, LocalApproximation | LocalExplanation] = METHODS,
    neighbourhoods: Mapping[str, Neighbourhood] = NEIGHBOURHOODS,
    **options: Any,
) -> pd.DataFrame:
    """Mean held-out loss over the rows of ``X``, methods by neighbourhoods; options and meaning as in `faithfulness_by_row`.

    >>> curve = lambda x: x.square().sum(dim=1)
    >>> table = faithfulness_table(curve, torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    >>> table.idxmin()["gaussian"]
    'C-LIME'
    """
    by_row = faithfulness_by_row(f, X, methods, neighbourhoods, **options)
    names = list(dict.fromkeys(name for name, _ in by_row))
    means = [[float(by_row[name, place].mean()) for place in neighbourhoods] for name in names]
    return pd.DataFrame(
        means, index=pd.Index(names, name="method"), columns=pd.Index(neighbourhoods, name="neighbourhood")
    )


def recommend(
    f: Any,
    X: Any,
    neighbourhood: Neighbourhood,
    *,
    methods: Mapping[str, LocalApproximation | LocalExplanation] = METHODS,
    **options: Any,
) -> tuple[str, pd.DataFrame]:
    """The method with the lowest held-out loss in ``neighbourhood``, and a table of all, the best first.

    Columns: loss (mean over rows), low and high (95 % over rows), times_best (ratio to the best one's loss), and two
    controls: shuffled (loss with the weights given to other features) and constant (loss of f(x) everywhere). Choose on
    other rows than those the loss is then reported on.
    """
    place = "here"
    by_row = faithfulness_by_row(f, X, methods, {place: neighbourhood}, controls=True, **options)
    rows = {}
    for name in methods:
        if (name, place) not in by_row:
            continue
        loss = mean_of_runs(by_row[name, place].cpu().numpy())
        shuffled, constant = (float(by_row[key, place].mean()) for key in (f"{name}, shuffled", "constant"))
        rows[name] = {
            "loss": loss.value, "low": loss.low, "high": loss.high, "shuffled": shuffled, "constant": constant,
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index").sort_values("loss", kind="stable")
    best = float(table["loss"].iloc[0])
    ratios = [loss / best if best > 0 else (1.0 if loss == 0 else math.inf) for loss in table["loss"]]
    table.insert(3, "times_best", ratios)
    return str(table.index[0]), table


def _differentiable(local: LocalFunction) -> bool:
    try:
        local.require_gradient()
    except NotDifferentiableError:
        return False
    return True


def _check_options(loss: str, surrogate: str, n_samples: object, seed: object) -> None:
    if loss not in ("squared", "gradient"):
        raise InputError(f"loss must be squared or gradient, got {loss!r}")
    if surrogate not in ("linear", "logistic"):
        raise InputError(f"surrogate must be linear or logistic, got {surrogate!r}")
    whole_number("n_samples", n_samples, 1)
    whole_number("seed", seed, 0)
