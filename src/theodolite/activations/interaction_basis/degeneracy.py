"""Weight directions that can change without changing the network on the data, counted per layer and by their cause."""

__all__ = ["DegeneracyReport", "LayerDegeneracy", "degeneracy", "synchronised", "synchronised_heads"]

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from theodolite.activations._basis import AT_ONCE, Probes, add_gram, check_rtol, effective_rank
from theodolite.core.capture import CaptureError, Moments, check_finite, forward_nodes
from theodolite.core.errors import InputError
from theodolite.core.memory import bytes_per_row, chunk_rows
from theodolite.core.view import evaluation_mode, model_input

_RELU = ("relu", "relu_")
_OTHER = (
    "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "celu", "selu", "mish", "softplus", "hardswish", "hardtanh",
    "relu6", "prelu", "rrelu", "logsigmoid", "softsign", "hardsigmoid",
)  # fmt: skip


@dataclass(frozen=True)
class LayerDegeneracy:
    """One weight matrix W (d_out, d_in), with its bias as one more column where that is trained too.

    rank_gram: r_G of the second moment of what W multiplies (with the constant 1 for a bias). rank_jacobian: r_K of the
    Jacobians of the output by the pre-activation. parameters: weights and biases; free_directions: parameters - r_G r_K,
    the least that is free from these two causes (exactly, where the Jacobian is the same on all data). sync_groups: units
    whose firing patterns are identical; sync_extra: their k^2 - k further directions, not to be added to free_directions.
    dead: number of units that never fire, always_on: of those that always do, apart from the groups, with their numbers.
    activation: the function that follows, "" where none was seen directly after the layer (then there are no patterns).
    """

    name: str
    d_in: int
    d_out: int
    rank_gram: int
    rank_jacobian: int
    parameters: int
    free_directions: int
    sync_groups: tuple[tuple[int, ...], ...]
    sync_extra: int
    dead: int
    always_on: int
    dead_units: tuple[int, ...]
    always_on_units: tuple[int, ...]
    activation: str


@dataclass(frozen=True)
class DegeneracyReport:
    """A row for each linear layer, in the order they run, and what there is to say about the counts."""

    rows: tuple[LayerDegeneracy, ...]
    data_rows: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of all rows together."""
        return sum(row.parameters for row in self.rows)

    @property
    def free_directions(self) -> int:
        """Of all rows together."""
        return sum(row.free_directions for row in self.rows)

    def to_frame(self) -> pd.DataFrame:
        """A table, one row per layer."""
        return pd.DataFrame([vars(row) for row in self.rows], columns=list(LayerDegeneracy.__dataclass_fields__))


def synchronised(patterns: Any) -> list[tuple[int, ...]]:
    """Groups of at least two columns that are identical on all rows, in the order of their first column.

    patterns: (n, d) booleans, whether unit j fires on row i. Columns that are all False (dead) or all True (always on) are
    the degenerate case and in no group.

    >>> synchronised(torch.tensor([[True, False, True, False], [False, True, False, False]]))
    [(0, 2)]
    """
    bits = torch.as_tensor(patterns).detach().cpu().numpy()
    if bits.ndim != 2 or bits.dtype != np.bool_ or len(bits) == 0:
        raise InputError(f"patterns must be booleans of shape (n, d), got {bits.dtype} of shape {bits.shape}")
    fires, rests = np.any(bits, axis=0), np.any(~bits, axis=0)
    return _groups(np.packbits(bits, axis=0), np.asarray(~(fires & rests)))


def _groups(packed: np.ndarray, constant: np.ndarray) -> list[tuple[int, ...]]:
    """Groups of equal columns of ``packed`` (bytes, d), leaving out ``constant`` ones."""
    columns = np.flatnonzero(~constant)
    if columns.size < 2:
        return []
    _, which = np.unique(packed[:, columns].T, axis=0, return_inverse=True)
    which = which.ravel()
    order = np.argsort(which, kind="stable")
    parts = np.split(columns[order], np.flatnonzero(np.diff(which[order])) + 1)
    return sorted(tuple(part.tolist()) for part in parts if part.size > 1)


def synchronised_heads(attention: Float[Tensor, "row head query key"], *, tol: float = 1e-6) -> list[tuple[int, ...]]:
    """Groups of attention heads whose patterns agree on all rows, max |A_h - A_h'| <= tol; the analogue for attention.

    Heads are in one group where they agree with its first head.

    >>> synchronised_heads(torch.ones(2, 3, 4, 4) / 4)
    [(0, 1, 2)]
    """
    if attention.ndim != 4 or not tol >= 0:
        raise InputError(
            f"need patterns (n, heads, queries, keys) and tol >= 0, got {tuple(attention.shape)} and {tol}"
        )
    left, groups = list(range(attention.shape[1])), []
    while left:
        off = (attention[:, left] - attention[:, left[:1]]).abs().amax(dim=(0, 2, 3))
        same = [head for head, distance in zip(left, off.tolist(), strict=True) if distance <= tol]
        same = same or left[:1]  # a pattern with NaN is not even like itself
        groups.append(tuple(same))
        left = [head for head in left if head not in same]
    return [group for group in groups if len(group) > 1]


class _Watch(TorchFunctionMode):
    """Sees which activation function takes the output of each linear layer, as a module or a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self.activation: dict[str, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        first = args[0] if args else None
        known = self.outputs.get(id(first))
        if known is not None and known[1] is first:
            called = getattr(func, "__name__", "")
            if called in _RELU or called in _OTHER:
                self.activation.setdefault(known[0], "relu" if called in _RELU else called)
        return func(*args, **(kwargs or {}))


def _linear_layers(model: nn.Module, row: Tensor) -> dict[str, str]:
    """Names of the linear layers that run on a row, in that order, each with the activation that follows."""
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def hook(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                    watch.outputs[id(output)] = (name, output)

                stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(watch)
        model(row)
    return {name: watch.activation.get(name, "") for name, _ in watch.outputs.values()}


class _Layer:
    """What is gathered for one linear layer."""

    def __init__(self, name: str, module: nn.Linear, activation: str) -> None:
        self.name, self.module, self.activation = name, module, activation
        self.biased = module.bias is not None and module.bias.requires_grad
        device = module.weight.device
        self.inputs = Moments(module.in_features + self.biased, device=device)
        self.slopes = torch.zeros(module.out_features, module.out_features, dtype=torch.float64, device=device)
        self.bits: list[np.ndarray] = []
        self.fires = np.zeros(module.out_features, dtype=bool)
        self.rests = np.zeros(module.out_features, dtype=bool)

    def add(self, f: Tensor, pre: Tensor, atol: float) -> None:
        flat = f.detach().reshape(-1, f.shape[-1])
        self.inputs.add(torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1) if self.biased else flat)
        if self.activation:
            on = (pre.detach().reshape(-1, pre.shape[-1]) > atol).cpu().numpy()
            self.bits.append(np.packbits(on, axis=0))
            self.fires |= on.any(axis=0)
            self.rests |= ~on.all(axis=0)

    def row(self, rtol: float) -> LayerDegeneracy:
        r_G = effective_rank(torch.linalg.eigvalsh(self.inputs.second_moment), rtol)
        r_K = effective_rank(torch.linalg.eigvalsh(self.slopes), rtol)
        d_out, d_in = self.module.out_features, self.module.in_features
        parameters = d_out * (d_in + self.biased)
        groups: list[tuple[int, ...]] = []
        dead = on = np.zeros(0, dtype=int)
        if self.bits:
            groups = _groups(np.concatenate(self.bits), ~self.fires | ~self.rests)
            dead, on = np.flatnonzero(~self.fires), np.flatnonzero(~self.rests)
        return LayerDegeneracy(
            self.name, d_in, d_out, r_G, r_K, parameters, parameters - r_G * r_K, tuple(groups),
            sum(len(group) ** 2 - len(group) for group in groups), len(dead), len(on),
            tuple(dead.tolist()), tuple(on.tolist()), self.activation,
        )  # fmt: skip


def degeneracy(
    model: nn.Module,
    X: Any,
    *,
    layers: Sequence[str] | None = None,
    rtol: float = 1e-10,
    atol_pattern: float = 0.0,
    jacobian: str = "auto",
    n_probes: int | None = None,
    batch_size: int = 256,
    memory: int | None = None,
    seed: int = 0,
) -> DegeneracyReport:
    """Free directions of every linear layer of ``model`` on the rows ``X``, by cause.

    Dependent activations and dependent Jacobians: the behavioural Hessian's block of W is (2/n) sum_x (J^T J) ⊗ (f f^T), so
    its rank is at most r_G r_K. Synchronised nonlinearities: k units that fire on the same rows act as one linear block,
    k^2 - k directions beyond the rescaling that each has. layers: names of nn.Linear modules, all that run where None.
    rtol: share of the largest eigenvalue that counts as 0. A unit fires where its pre-activation exceeds atol_pattern.
    jacobian, n_probes: as for `InteractionBasis`.

    Raises InputError for settings that mean nothing, CaptureError for a name that is no linear layer that runs,
    ActivationError (layer and row) for values that are not finite.

    Source: Bushnaq et al., 2024, arXiv:2405.10927.

    >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    >>> degeneracy(net, torch.eye(3)[:2]).rows[0].rank_gram
    2
    """
    check_rtol(rtol)
    x = model_input(model, X)
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"need at least one row, got shape {tuple(x.shape)}")
    running = _linear_layers(model, x[:1])
    chosen = list(running) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in chosen if name not in running]
    if unknown or not chosen:
        raise CaptureError(
            f"{', '.join(unknown) or 'nothing'} is no nn.Linear that runs on these rows; there are: "
            f"{', '.join(running) or 'none'}"
        )
    found = [_Layer(name, _linear(model, name), running[name]) for name in chosen]
    names = [place for name in chosen for place in (f"{name}:input", name)]
    with evaluation_mode(model):
        cost = bytes_per_row(model, x[:1], gradients=True)
    probes: Probes | None = None
    start, batch = 0, 0
    size = 1  # the first row tells how many outputs there are
    while start < len(x):
        at = forward_nodes(model, x[start : start + size], [*names, "output"], gradients=True)
        for place in names:
            check_finite(at[place], place, start)
        with torch.enable_grad():
            end = at["output"].reshape(len(at["output"]), -1)
        probes = Probes.choose(jacobian, end.shape[1], n_probes, seed + batch)
        side_by_side = min(probes.count, AT_ONCE)
        for vectors in probes.vectors(len(end), end.shape[1], end, side_by_side):
            slopes = torch.autograd.grad(
                end, [at[name] for name in chosen], vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            for layer, slope in zip(found, slopes, strict=True):
                if slope is not None:
                    add_gram(layer.slopes, slope)
        for layer in found:
            layer.add(at[f"{layer.name}:input"], at[layer.name], atol_pattern)
        start, batch = start + size, batch + 1
        size = chunk_rows(cost * (1 + side_by_side), memory, at_most=batch_size)
    rows = tuple(layer.row(rtol) for layer in found)
    return DegeneracyReport(rows, len(x), tuple(_notes(found, probes)))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CaptureError(f"{name!r} is no nn.Linear")
    return module


def _notes(layers: list[_Layer], probes: Probes | None) -> list[str]:
    notes = []
    few = [layer.name for layer in layers if layer.inputs.count < len(layer.inputs.mean)]
    if few:
        notes.append(
            f"fewer rows than inputs in {', '.join(few)}: the rank is at most the number of rows, so part of what is free is "
            "free on these data only"
        )
    soft = sorted({layer.activation for layer in layers if layer.activation not in ("", "relu")})
    if soft:
        notes.append(
            f"{', '.join(soft)} is not ReLU: a unit counts as firing where its pre-activation is positive, and units with one "
            "pattern are candidates, not exactly linear blocks"
        )
    unseen = [layer.name for layer in layers[:-1] if not layer.activation]
    if unseen:
        notes.append(f"no activation function directly after {', '.join(unseen)}: no firing patterns there")
    if probes is not None and not probes.exact:
        notes.append(f"Jacobians from {probes.count} random output vectors a row")
    return notes
