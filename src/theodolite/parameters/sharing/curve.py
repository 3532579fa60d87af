"""Quality against stored weights: sharing, pruning at initialisation and whatever else is given, over one grid of step sizes.

Source: Desai, Shrivastava, 2023, arXiv:2310.11611, experiments.
"""

__all__ = ["best_step_sizes", "compression_curve"]

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from theodolite.core.errors import InputError, TrainingCollapsedError
from theodolite.parameters.pruning_at_init import METHODS, LayerCollapseWarning, apply_masks, prune_at_init
from theodolite.parameters.sharing.maps import MAPPERS
from theodolite.parameters.sharing.model import SharedModel, share_parameters
from theodolite.parameters.weights import weight_tensors

Make = Callable[[nn.Module, float, int], nn.Module]


def compression_curve(
    build: Callable[[int], nn.Module],
    fit: Callable[[nn.Module, float, int], Any],
    evaluate: Callable[[nn.Module], float | Mapping[str, float]],
    methods: Sequence[str] | Mapping[str, str | Make],
    compressions: Iterable[float],
    *,
    seeds: Iterable[int] = (0,),
    learning_rates: Iterable[float] = (0.05, 0.1, 0.2, 0.5, 1.0),
    data: Any = None,
    loss: Any = None,
) -> pd.DataFrame:
    """Train every method at every compression, seed and step size: one row a training.

    build(seed): a network at its random start. fit(net, lr, seed): trains it in place. evaluate(net): its quality, or
    several by name (say "quality" on validation rows and "test"). methods: names among "fold", "hashed", "roast" (sharing)
    and "random", "magnitude", "snip", "grasp", "synflow" (pruning), or a mapping from any name to one of these or to a
    function (net, compression, seed) -> net, for example to a narrower network. data, loss: for the pruning methods that
    look at data, see `prune_at_init`.

    Columns: method, compression, seed, lr, stored (weights that are kept, without biases and norms on either side),
    collapsed (layers without a weight), diverged (training broke off; the quality is that of what was left), and quality or
    what else evaluate gives.

    Raises InputError for unknown methods and empty grids, before anything is trained.

    >>> frame = compression_curve(lambda seed: nn.Linear(20, 2), lambda net, lr, seed: None, lambda net: 0.5,
    ...     ["fold", "random"], [4], learning_rates=[0.1])
    >>> frame[["method", "stored", "quality"]].values.tolist()
    [['fold', 10, 0.5], ['random', 10, 0.5]]
    """
    named = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
    grid, starts, rates = list(compressions), list(seeds), list(learning_rates)
    for name, given in (("methods", named), ("compressions", grid), ("seeds", starts), ("learning_rates", rates)):
        if not given:
            raise InputError(f"{name} is empty; give at least one")
    known = (*MAPPERS, *METHODS)
    unknown = [one for one in named.values() if isinstance(one, str) and one not in known]
    if unknown:
        raise InputError(f"unknown methods {unknown}; give {', '.join(known)} or a function")
    table = list[dict[str, Any]]()
    for seed, (name, how), compression in itertools.product(starts, named.items(), grid):
        net, collapsed = _compressed(build(seed), how, compression, seed, data, loss)
        for lr in rates:
            trained, diverged = copy.deepcopy(net), False
            try:
                fit(trained, lr, seed)
            except TrainingCollapsedError:
                diverged = True
            quality = evaluate(trained)
            about = {"method": name, "compression": compression, "seed": seed, "lr": lr, "stored": _stored(net)}
            about |= {"collapsed": collapsed, "diverged": diverged}
            table.append(about | (dict(quality) if isinstance(quality, Mapping) else {"quality": quality}))
    return pd.DataFrame(table)


def best_step_sizes(frame: pd.DataFrame, *, by: str = "quality") -> pd.DataFrame:
    """The rows of `compression_curve` at each method's own best step size: best mean of column ``by`` over seeds.

    >>> frame = pd.DataFrame({"method": "fold", "compression": 2, "lr": [0.1, 0.2], "quality": [0.7, 0.8]})
    >>> best_step_sizes(frame)["lr"].tolist()
    [0.2]
    """
    if by not in frame:
        raise InputError(f"there is no column {by!r}; the columns are {', '.join(map(str, frame.columns))}")
    rows = frame.to_dict("records")
    runs = dict[tuple[Any, Any], dict[float, list[float]]]()
    for row in rows:
        runs.setdefault((row["method"], row["compression"]), {}).setdefault(row["lr"], []).append(row[by])
    best = {key: max(tried, key=lambda lr, tried=tried: np.mean(tried[lr])) for key, tried in runs.items()}
    return pd.DataFrame([row for row in rows if best[row["method"], row["compression"]] == row["lr"]])


def _compressed(
    net: nn.Module, how: str | Make, compression: float, seed: int, data: Any, loss: Any
) -> tuple[nn.Module, str]:
    """The network that is trained, and the names of the layers that have no weight left."""
    if not isinstance(how, str):
        return how(net, compression, seed), ""
    if how in MAPPERS:
        return share_parameters(net, compression=compression, mapper=how, seed=seed), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)  # told in the table
        masks = prune_at_init(net, how, compression, data=data, loss=loss, seed=seed)
    return apply_masks(net, masks), " ".join(name for name, mask in masks.items() if not bool(mask.any()))


def _stored(net: nn.Module) -> int:
    """Weights that are kept: slots of an array, entries of masks, or all."""
    if isinstance(net, SharedModel):
        return net.stored_parameters
    masks = [int(buffer.sum()) for name, buffer in net.named_buffers() if name.endswith(".0.mask")]
    return sum(masks) if masks else sum(weight.parameter.numel() for weight in weight_tensors(net))
