"""A network as a chain of sections f_{l+1} = F_l(f_l) between named nodes, checked to be one.

`Sections` chains callables; `ModuleSections` cuts any nn.Module at named tensors (see `theodolite.core.capture`): F_l puts
f_l in place at node l and reads node l+1. A chain is only a chain where each node is a function of the one before it; a
connection that goes around a node is found by running F_l on one row's surroundings with another row's f_l.
"""

__all__ = ["ModuleSections", "SectionError", "Sections", "sections_of"]

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from theodolite.core.capture import check_finite, forward_nodes, main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import bytes_per_row
from theodolite.core.view import evaluation_mode

_CHECKED_ROWS = 16


class SectionError(ModelError):
    """A node is not a function of the node before it."""


class Sections:
    """A chain of callables F_0 .. F_{L-1}, each (n, d_l) or (n, p_l, d_l) -> the same with d_{l+1}; nodes 0 .. L.

    names: one per node, "node 0" .. where left out. Modules among the callables run in eval mode and are put back.

    >>> chain = Sections([nn.Linear(2, 3), nn.ReLU()])
    >>> [tuple(node.shape) for node in chain.nodes(torch.ones(4, 2))]
    [(4, 2), (4, 3), (4, 3)]
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], names: Sequence[str] | None = None) -> None:
        if len(functions) == 0 or not all(callable(function) for function in functions):
            raise InputError(f"need a list of at least one callable, got {functions!r}")
        self.functions = tuple(functions)
        self.names = tuple(names) if names is not None else tuple(f"node {i}" for i in range(len(functions) + 1))
        if len(self.names) != len(self.functions) + 1:
            raise InputError(f"{len(functions)} sections have {len(functions) + 1} nodes, got {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.functions)

    def nodes(self, x: Tensor, *, first: int = 0, last: int | None = None, gradients: bool = False) -> list[Tensor]:
        """f_first .. f_last of the rows ``x`` in one pass (not chunked); with ``gradients`` in one graph."""
        last = len(self) if last is None else last
        before = self.run(x, 0, first)
        node = before.detach().requires_grad_() if gradients else before
        found = [node]
        with self._calm(gradients):
            for function in self.functions[first:last]:
                node = main_tensor(function(node.clone()))  # a function in place must not change the node before
                if gradients and not node.requires_grad:
                    node = node.detach().requires_grad_()
                found.append(node)
        return found

    def run(self, f: Tensor, layer: int, until: int | None = None, *, gradients: bool = False) -> Tensor:
        """What node ``until`` (default: the last) is when node ``layer`` is ``f``; with ``gradients`` as a graph of ``f``."""
        with self._calm(gradients):
            for function in self.functions[layer:until]:
                f = main_tensor(function(f.clone()))
        return f

    def row_bytes(self, x: Tensor, *, gradients: bool) -> float:
        """Bytes that one more row costs in a pass through all sections."""
        with self._calm(False):
            return bytes_per_row(partial(self.run, layer=0), x[:1], gradients=gradients)

    def check(self, x: Tensor) -> None:
        """Raise SectionError where a section is not a function of each row's node alone (random, mixing rows).

        The rows of one batch must come out the same when half of them are left out.
        """
        x = x[:_CHECKED_ROWS]
        if x.ndim not in (2, 3):
            raise SectionError(f"rows have shape {tuple(x.shape)}; a node is (rows, width) or (rows, positions, width)")
        nodes = self.nodes(x)
        for layer, (before, after) in enumerate(pairwise(nodes)):
            check_finite(before, self.names[layer])
            check_finite(after, self.names[layer + 1])
            if after.ndim not in (2, 3) or len(after) != len(before):
                raise SectionError(
                    f"section {layer} gives shape {tuple(after.shape)} for {len(before)} rows; a node is (rows, width) or "
                    "(rows, positions, width)"
                )
            half = (len(x) + 1) // 2
            _same(self.run(before[:half], layer, layer + 1), after[:half], self.names[layer], self.names[layer + 1])

    def _calm(self, gradients: bool) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no batched backward pass
        for function in self.functions:
            if isinstance(function, nn.Module):
                stack.enter_context(evaluation_mode(function))
        return stack


class ModuleSections(Sections):
    """The chain that the named nodes of one nn.Module make; made by `sections_of`.

    surroundings: one row of input, which the module runs on wherever only a node is given.
    """

    def __init__(self, model: nn.Module, nodes: Sequence[str], surroundings: Tensor) -> None:
        self.model, self._surroundings = model, surroundings
        steps = [partial(self.run, layer=i, until=i + 1) for i in range(len(nodes) - 1)]
        super().__init__(steps, nodes)

    def nodes(self, x: Tensor, *, first: int = 0, last: int | None = None, gradients: bool = False) -> list[Tensor]:
        """f_first .. f_last for the model's inputs ``x`` in one forward pass (not chunked)."""
        names = self.names[first : len(self) + 1 if last is None else last + 1]
        found = forward_nodes(self.model, x, names, gradients=gradients)
        return [found[name] for name in names]

    def run(self, f: Tensor, layer: int, until: int | None = None, *, gradients: bool = False) -> Tensor:
        """What node ``until`` (default: the last) is when node ``layer`` is ``f``; with ``gradients`` as a graph of ``f``."""
        until = len(self) if until is None else until
        if layer == until:
            return f
        x = self._surroundings.expand(len(f), *self._surroundings.shape[1:]).contiguous()
        target = self.names[until]
        return forward_nodes(self.model, x, [target], replace={self.names[layer]: f}, gradients=gradients)[target]

    def row_bytes(self, x: Tensor, *, gradients: bool) -> float:
        """Bytes that one more row costs in a pass through the module."""
        with evaluation_mode(self.model):
            return bytes_per_row(self.model, x[:1], gradients=gradients)


def sections_of(model: nn.Module, nodes: Sequence[str], x: Tensor) -> ModuleSections:
    """Cut ``model`` at ``nodes`` (in order; "output" is added where it is not the last) and check on rows of ``x``.

    Raises SectionError, naming both nodes, where one is not a function of the one before it (F_l(f_l) differs from the
    captured f_{l+1} by more than 1e-4 of its largest value), CaptureError for names that are not there, InputError for
    integer nodes (start at the embedding) and fewer than one node.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> sections_of(net, ["input", "1"], torch.ones(4, 2)).names
    ('input', '1', 'output')
    """
    names = list(nodes)
    if not names:
        raise InputError("need the name of at least one node")
    if isinstance(nodes, str):
        raise InputError(f"nodes must be a list of names, got the string {nodes!r}")
    if len(set(names)) != len(names):
        raise InputError(f"a node is named twice: {names}")
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"need at least one row of input, got shape {tuple(x.shape)}")
    sample = x[: _CHECKED_ROWS + 1]
    if "output" not in names:
        whole = forward_nodes(model, sample, [names[-1], "output"])
        last = whole[names[-1]]
        if last.shape != whole["output"].shape or not torch.equal(last, whole["output"]):
            names.append("output")
    alone = len(x) == 1
    chain = ModuleSections(model, names, torch.zeros_like(x[:1]) if alone else x[:1].clone())
    values = chain.nodes(sample)
    for name, value in zip(names, values, strict=True):
        if not value.is_floating_point() and not value.is_complex():
            raise InputError(f"{name} holds {value.dtype} numbers, which have no gradient; start at the embedding")
        if value.ndim not in (2, 3):
            raise SectionError(
                f"{name} has shape {tuple(value.shape)}; a node is (rows, width) or (rows, positions, width)"
            )
        check_finite(value, name)
    for layer, (before, after) in enumerate(pairwise(values)):
        rows = slice(0 if alone else 1, None)
        _same(chain.run(before[rows], layer, layer + 1), after[rows], names[layer], names[layer + 1])
    return chain


def _same(made: Tensor, captured: Tensor, before: str, after: str) -> None:
    scale = float(captured.abs().max())
    if made.shape != captured.shape or float((made - captured).abs().max()) > 1e-4 * max(scale, 1e-30):
        raise SectionError(
            f"{after!r} is not a function of {before!r} alone: a connection goes around {before!r}, or the section is "
            "random or mixes rows; choose nodes that everything passes through, such as the residual stream"
        )
