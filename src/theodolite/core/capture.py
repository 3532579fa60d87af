"""What a network holds inside: capture, gradients and replacement of any tensor by the name of its module.

A name is that of a submodule ("layers.3.mlp") and means its output; "NAME:input" means what goes into it (the head outputs
of attention are the input of its output projection); "input" and "output" are the whole network's. Where a module gives a
tuple or a mapping, its first tensor (of a language model: the logits) is meant. Weights are never copied, hooks are always
removed, eval mode is forced and each submodule put back into the mode it had.
"""

__all__ = [
    "ActivationError",
    "CaptureError",
    "Captured",
    "Moments",
    "activations",
    "activations_and_gradients",
    "check_finite",
    "forward_nodes",
    "gram",
    "main_tensor",
]

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode


class CaptureError(ModelError):
    """A tensor inside the network cannot be captured or replaced under the name that was given."""


class ActivationError(DataError):
    """Activations that no statistics can be made of: not finite, not real, of no row at all."""


class _Done(Exception):
    """Ends a forward pass early."""


def main_tensor(value: Any) -> Tensor:
    """The tensor that stands for a module's output: itself, the first of a tuple, the logits (or first) of a mapping.

    >>> main_tensor((torch.ones(2), None))
    tensor([1., 1.])
    """
    return _parts(value)[0]


def _parts(value: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The main tensor, and how to put another one in its place."""
    if isinstance(value, Tensor):
        return value, lambda new: new
    if isinstance(value, Mapping):
        names = [name for name, item in value.items() if isinstance(item, Tensor)]
        if names:
            name = "logits" if "logits" in names else names[0]
            return value[name], partial(_put_under, value, name)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            if isinstance(item, Tensor):
                return item, partial(_put_into, value, i)
    raise CaptureError(f"a module gave {type(value).__name__} with no tensor in it; name a module that gives a tensor")


def _put_under(value: Mapping[str, Any], name: str, new: Tensor) -> Any:
    make = cast("Callable[..., Any]", type(value))
    changed = dict(value) | {name: new}
    return make(**changed) if hasattr(value, "to_tuple") else make(changed)


def _put_into(value: tuple[Any, ...] | list[Any], i: int, new: Tensor) -> Any:
    make = cast("Callable[..., Any]", type(value))
    changed = [*value[:i], new, *value[i + 1 :]]
    return make(*changed) if hasattr(value, "_fields") else make(changed)


def _find(model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The module of a node's name and whether its input is meant."""
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name], False
    if name in ("input", "output"):
        return model, name == "input"
    stem, _, side = name.rpartition(":")
    if side == "input" and stem in modules:
        return modules[stem], True
    near = difflib.get_close_matches(name, [key for key in modules if key], n=3, cutoff=0.3)
    there = near or [key for key in modules if key][:8]
    raise CaptureError(
        f"the network has no module called {name!r}; near it: {', '.join(there) or 'none'}. Name a submodule, "
        "'SUBMODULE:input', 'input' or 'output'"
    )


def forward_nodes(
    model: nn.Module,
    x: Tensor,
    names: Iterable[str],
    *,
    replace: Mapping[str, Tensor] | None = None,
    gradients: bool = False,
) -> dict[str, Tensor]:
    """One forward pass on ``x``: the tensors at ``names``, ending as soon as all are there. Not chunked.

    replace: a tensor to put in place at each name, of the same shape as what is there. With ``gradients`` the tensors
    hang together in one graph (and require a gradient even where all weights are frozen), so that `torch.autograd.grad`
    of a later one by an earlier one is their Jacobian. What is returned is safe from operations in place further on.

    Raises CaptureError for a name that is not there, not reached, or reached more than once in one pass.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> forward_nodes(net, torch.ones(4, 2), ["0", "output"])["0"].shape
    torch.Size([4, 3])
    """
    wanted, given = dict.fromkeys(names), dict(replace or {})
    found: dict[str, Tensor] = {}
    put: set[str] = set()

    def at(name: str, tensor: Tensor) -> Tensor:
        if name in found or name in put:
            raise CaptureError(f"{name!r} runs more than once in one forward pass; give each use a module of its own")
        if name in given:
            if given[name].shape != tensor.shape:
                raise CaptureError(
                    f"{name!r} has shape {tuple(tensor.shape)}, its replacement {tuple(given[name].shape)}"
                )
            tensor = given[name]
            put.add(name)
        if name in wanted:
            if gradients and not tensor.requires_grad and tensor.is_floating_point():
                tensor = tensor.detach().requires_grad_()
            found[name] = tensor
            if len(found) == len(wanted):
                raise _Done
            return tensor.clone()  # an operation in place further on must not change what was captured
        return tensor

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(evaluation_mode(model))
        # the fused attention kernels have no batched backward pass
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for name in given | wanted:
            module, before = _find(model, name)
            hook = _before(name, at) if before else _after(name, at)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handle = register(hook, with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(_Done):
            model(x)
        missed = [name for name in [*given, *wanted] if name not in found and name not in put]
    if missed:
        raise CaptureError(
            f"{', '.join(map(repr, missed))} was not reached in the forward pass"
            + (f" before {', '.join(map(repr, found))}; give the names in the order they run" if found else "")
        )
    return found


def _after(name: str, at: Callable[[str, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tensor, put = _parts(output)
        return put(at(name, tensor))

    return hook


def _before(name: str, at: Callable[[str, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for i, item in enumerate(args):
            if isinstance(item, Tensor):
                return (*args[:i], at(name, item), *args[i + 1 :]), kwargs
        for key, item in kwargs.items():
            if isinstance(item, Tensor):
                return args, kwargs | {key: at(name, item)}
        raise CaptureError(f"{name!r} takes no tensor")

    return hook


def activations(
    model: nn.Module, x: Tensor, names: Sequence[str], *, memory: int | None = None
) -> dict[str, Shaped[Tensor, "row ..."]]:
    """The tensors at ``names`` for all rows of ``x``, without gradients, in chunks that fit ``memory`` bytes.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> sorted(activations(net, torch.ones(4, 2), ["0", "1"]))
    ['0', '1']
    """
    _some_rows(x)
    with evaluation_mode(model):
        cost = bytes_per_row(model, x[:1], gradients=False)
    parts = [forward_nodes(model, x[rows], names) for rows in chunks(len(x), cost, memory)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


@dataclass(frozen=True, eq=False)
class Captured:
    """Tensors at named places and the gradient of each row's target with respect to them, both by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    target: Float[Tensor, " row"]


def activations_and_gradients(
    model: nn.Module,
    x: Tensor,
    names: Sequence[str],
    target: Callable[[Tensor, slice], Tensor],
    *,
    memory: int | None = None,
) -> Captured:
    """The tensors at ``names`` and the gradient of each row's target by them, in chunks that fit ``memory`` bytes.

    target(output, rows) gives one number for each row of the chunk ``rows`` of ``x``, for instance
    ``lambda out, rows: cross_entropy(out, y[rows], reduction="none")``. A place that the target does not depend on has
    gradient 0.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> found = activations_and_gradients(net, torch.ones(4, 2), ["1"], lambda out, rows: out.sum(dim=1))
    >>> bool((found.gradients["1"] == 1).all())
    True
    """
    _some_rows(x)
    with evaluation_mode(model):
        cost = bytes_per_row(model, x[:1], gradients=True)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    slopes: dict[str, list[Tensor]] = {name: [] for name in names}
    targets = []
    for rows in chunks(len(x), cost, memory):
        found = forward_nodes(model, x[rows], [*names, "output"], gradients=True)
        with torch.enable_grad():
            numbers = target(found["output"], rows)
        if numbers.shape != x[rows].shape[:1]:
            raise InputError(f"target must give one number a row, ({len(x[rows])},), got {tuple(numbers.shape)}")
        graded = torch.autograd.grad(numbers.sum(), [found[name] for name in names], allow_unused=True)
        for name, slope in zip(names, graded, strict=True):
            values[name].append(found[name].detach())
            slopes[name].append(torch.zeros_like(found[name]) if slope is None else slope)
        targets.append(numbers.detach())
    return Captured(
        {name: torch.cat(parts) for name, parts in values.items()},
        {name: torch.cat(parts) for name, parts in slopes.items()},
        torch.cat(targets),
    )


def _some_rows(x: Tensor) -> None:
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"need at least one row, got a tensor of shape {tuple(x.shape)}")


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> None:
    """Raise ActivationError with layer and row where ``tensor`` (n, ...) holds NaN or an infinite number."""
    if tensor.is_complex():
        raise ActivationError(
            f"{name} holds complex numbers; pass their real and imaginary parts as separate coordinates "
            "(torch.view_as_real)"
        )
    good = torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ActivationError(
            f"{name} holds NaN or infinite values, first in row {first_row + row}; check that input row"
        )


class Moments:
    """Mean, covariance and second moment of rows that come in parts, in float64, merged without cancellation.

    The centred scatter of two parts is the sum of theirs and of n_a n_b / (n_a + n_b) (m_a - m_b)(m_a - m_b)^T, so a mean
    far larger than the spread costs no digits.

    >>> moments = Moments(2)
    >>> moments.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.mean, moments.covariance[0, 0], moments.second_moment[0, 0]
    (tensor([2., 0.], dtype=torch.float64), tensor(1., dtype=torch.float64), tensor(5., dtype=torch.float64))
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Shaped[Tensor, "... width"]) -> None:
        """Take in rows (all but the last axis count as rows)."""
        part = rows.detach().reshape(-1, rows.shape[-1]).to(torch.float64)
        if len(part) == 0:
            return
        mean = part.mean(dim=0)
        part = part - mean
        total = self.count + len(part)
        off = mean - self.mean
        self._scatter += part.T @ part + torch.outer(off, off) * (self.count * len(part) / total)
        self.mean = self.mean + off * (len(part) / total)
        self.count = total

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """(1/n) sum (f - mean)(f - mean)^T."""
        return self._scatter / max(1, self.count)

    @property
    def second_moment(self) -> Float[Tensor, "width width"]:
        """(1/n) sum f f^T."""
        return self.covariance + torch.outer(self.mean, self.mean)


def gram(rows: Shaped[Tensor, "... width"], *, center: bool = True, memory: int | None = None) -> Float[Tensor, "w w"]:
    """(1/n) sum f f^T of rows in float64, about their mean or about 0, without a float64 copy of all rows.

    >>> gram(torch.tensor([[1.0], [3.0]]), center=False)
    tensor([[5.]], dtype=torch.float64)
    """
    flat = rows.reshape(-1, rows.shape[-1])
    _some_rows(flat)
    moments = Moments(flat.shape[1], device=flat.device)
    for part in chunks(len(flat), 32.0 * flat.shape[1], memory):
        moments.add(flat[part])
    return moments.covariance if center else moments.second_moment
