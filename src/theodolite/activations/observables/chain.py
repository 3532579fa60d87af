"""Observables carried backwards through named modules of any network: the gradient rule alone."""

__all__ = ["propagate_modules"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.activations.observables.feature import FeatureVector
from theodolite.activations.observables.observable import Observable
from theodolite.activations.observables.segment import At, point_on_segment
from theodolite.core.capture import activations, forward_nodes
from theodolite.core.errors import InputError, ModelError
from theodolite.core.view import model_input


def propagate_modules(
    model: nn.Module,
    observable: Observable,
    names: Sequence[str],
    *,
    inputs: Any,
    at: At,
    normalise: bool,
) -> FeatureVector:
    """The observable's gradient by the input of the last (earliest) module, along paths through all modules named.

    names: late to early. inputs: (positive, negative), each one row without its batch axis. at: the point between the two
    rows' activations before the earliest module; "boundary" is where the observable itself is zero. A stretch that a
    residual connection leads around a named module is left out, as on a path of components.
    """
    rows = [model_input(model, one) for one in inputs]
    if len(rows) != 2 or rows[0].shape != rows[1].shape or rows[0].ndim == 0:
        raise InputError(f"prompts must be two inputs of one shape, got {[tuple(row.shape) for row in rows]}")
    if len(set(names)) != len(names):
        raise InputError(f"a module is named twice: {list(names)}")
    both, node = torch.stack(rows), f"{names[-1]}:input"
    ends = activations(model, both, [node])[node]
    if not ends.is_floating_point():
        raise InputError(
            f"{node} holds {ends.dtype} numbers, which have no gradient; name a module after the embedding"
        )
    shape = ends.shape[1:]
    width = forward_nodes(model, both[:1], ["output"])["output"].shape
    if len(width) != 2:
        raise ModelError(f"expected one row of class scores for each input, got shape {tuple(width)}")
    observable.check(width[1])

    def value(x: Tensor) -> Tensor:
        surroundings = both[:1].expand(len(x), *both.shape[1:]).contiguous()
        answers = forward_nodes(model, surroundings, ["output"], replace={node: x.unflatten(1, shape)})
        return observable.score(answers["output"])

    flat = ends.flatten(1)
    x0, crossed = point_on_segment(value, flat[1], flat[0], at)
    wanted = dict.fromkeys([*(name for n in names for name in (f"{n}:input", n)), "output"])
    found = forward_nodes(model, both[:1], wanted, replace={node: x0.view(1, *shape)}, gradients=True)
    late: Tensor = observable.score(found["output"]).sum()
    back = torch.ones_like(late)
    for name in names:
        for place in (name, f"{name}:input"):
            (slope,) = torch.autograd.grad(late, found[place], back, retain_graph=True, allow_unused=True)
            if slope is None:
                raise InputError(
                    f"{name!r} does not lead to what comes after it; a path of modules runs from late to early"
                )
            late, back = found[place], slope
    vector = back.detach().flatten().float()
    if normalise:
        vector = vector / vector.norm()
    return FeatureVector(
        vector,
        names[-1],
        "input",
        0,
        1.0,
        tuple(names),
        boundary_found=crossed,
        normalised=normalise,
        pair=(both[0], both[1]),
    )
