"""Which units of a network stand or fall together: filters that are added up, their norms, and the columns that read them."""

__all__ = ["Coupling", "coupled_units", "coupling_of"]

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from theodolite.core.errors import ModelError
from theodolite.core.masks.trace import LAYERS, NORMS, Operation, Recording, record
from theodolite.core.masks.transformers import is_transformer, mlps
from theodolite.core.view import evaluation_mode

_SAME = {
    "relu", "relu6", "leakyrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "sigmoid",
    "hardswish", "hardsigmoid", "hardtanh", "clamp", "clip", "logsigmoid", "tanhshrink", "abs", "square", "identity",
    "dropout", "alphadropout", "featurealphadropout", "maxpool", "avgpool", "lppool", "adaptiveavgpool", "adaptivemaxpool",
    "pad", "zeropad", "constantpad", "reflectionpad", "replicationpad", "upsample", "interpolate", "contiguous", "clone",
    "detach", "float", "double", "to",
}  # fmt: skip
"""What acts on each channel alone."""
_JOIN = {"add", "sub", "mul", "maximum", "minimum"}
_FLATTEN = {"flatten", "view", "reshape"}
_SIZES = {"size", "dim", "numel", "getattr", "len"}


@dataclass(frozen=True, eq=False)
class Coupling:
    """The removable units of a network.

    rows: for every layer and batch norm the unit that each output belongs to, -1 where it cannot go. columns: for every
    layer the unit that each input column reads, -1 likewise. layers: names of the linear and convolutional layers in
    order. units: how many there are; numbered by first layer and index. fixed: why outputs of a layer cannot go.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    layers: tuple[str, ...]
    units: int
    fixed: dict[str, str]

    @property
    def prunable(self) -> tuple[str, ...]:
        """The layers of which some unit can be removed."""
        return tuple(name for name in self.layers if bool((self.rows[name] >= 0).any()))


@dataclass(frozen=True, eq=False)
class _Channels:
    """The unit that each channel of a tensor belongs to, and where the channels are.

    place: "axis1" before ``dims`` axes of positions, "last", "blocks" (flattened, each channel a block of entries of yet
    unknown length) or "tiled" (flattened, the channels one after the other, over and over).
    """

    ids: Tensor
    place: Literal["axis1", "last", "blocks", "tiled"]
    dims: int = 0


@dataclass
class _Walk:
    """What is known while the steps of a network are gone through."""

    states: dict[fx.Node, _Channels | Literal["size"] | None] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    same: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    total: int = 0

    def new(self, n: int) -> Tensor:
        self.total += n
        return torch.arange(self.total - n, self.total)

    def freeze(self, state: object, why: str) -> None:
        if isinstance(state, _Channels):
            self.frozen.append((state.ids, why))

    def join(self, a: Tensor, b: Tensor) -> None:
        self.same.append((a, b))


def coupled_units(model: nn.Module, example_input: Tensor | None = None) -> Coupling:
    """The units of ``model`` that can be removed, with everything that has to go when one goes.

    A unit is an output of a linear or convolutional layer. Outputs that are added or multiplied, and the input and output
    channels of a depthwise convolution, are one unit. What reaches the network's output, or flows into something that is
    not understood, stays; `Coupling.fixed` says why.

    Of a Hugging Face transformer the units are the hidden numbers of its MLPs; its forward is not followed.

    Raises ModelError where the forward cannot be followed (see `record`; with example_input more of them can), and for a
    transformer whose MLPs have other names than those known.

    >>> found = coupled_units(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
    >>> found.units, found.columns["2"].tolist(), found.fixed["2"]
    (2, [0, 0, 0, 0, 1, 1, 1, 1], "they are the network's output")
    """
    if is_transformer(model):
        return _mlp_units(model)
    with torch.no_grad(), evaluation_mode(model):  # in train mode a batch norm would take the example in
        return coupling_of(record(model, None if example_input is None else example_input[:1]))


def coupling_of(recording: Recording) -> Coupling:
    """As `coupled_units`, of a network that has been recorded."""
    walk = _Walk()
    for operation in recording.operations:
        walk.states[operation.node] = _step(walk, operation)
    walk.freeze(walk.states[recording.output], "they are the network's output")
    _freeze_shared(walk, recording)
    return _settle(walk)


def _mlp_units(model: nn.Module) -> Coupling:
    rows, columns, total = dict[str, Tensor](), dict[str, Tensor](), 0
    for mlp in mlps(model):
        ids = torch.arange(total, total + mlp.width)
        rows |= dict.fromkeys(mlp.writers, ids)
        columns[mlp.reader] = ids
        total += mlp.width
    return Coupling(rows, columns, tuple(rows), total, {})


def _step(walk: _Walk, operation: Operation) -> _Channels | Literal["size"] | None:
    states = [walk.states[node] for node in operation.sources]
    tensors = [state for state in states if not isinstance(state, str)]
    if operation.kind in _SIZES or (states and not tensors):
        return "size"
    if isinstance(operation.module, LAYERS):
        return _layer(walk, operation, tensors[0])
    if isinstance(operation.module, NORMS):
        return _norm(walk, operation, tensors[0])
    if all(state is None for state in tensors):
        return None
    found = _same_channels(walk, operation, tensors)
    if found is None:
        for state in tensors:
            walk.freeze(state, f"they flow into {operation.type_name} at {operation.name}")
    return found


def _same_channels(walk: _Walk, operation: Operation, states: list[_Channels | None]) -> _Channels | None:
    kind, first = operation.kind, states[0]
    constants = any(node.op == "get_attr" for node in operation.node.all_input_nodes)
    known = [state for state in states if state is not None]
    if len(known) != len(states) or first is None or constants:  # a stored tensor may have a number for each channel
        return None
    if kind in _SAME or (kind == "prelu" and getattr(operation.module, "num_parameters", 0) == 1):
        return first if len(known) == 1 else None
    if kind in _JOIN | {"truediv", "div"} and all(
        len(s.ids) == len(first.ids) and s.place == first.place for s in known
    ):
        for other in known[1:]:
            walk.join(first.ids, other.ids)
        return first if kind in _JOIN or len(known) == 1 else None
    if kind in ("cat", "concat") and all(s.place in ("axis1", "last") and s.place == first.place for s in known):
        parts: Any = operation.node.args[0] if operation.node.args else operation.node.kwargs["tensors"]
        axis = operation.node.kwargs.get("dim", operation.node.args[1] if len(operation.node.args) > 1 else 0)
        order = [walk.states[node] for node in parts]  # a tensor may stand there twice
        if axis == (1 if first.place == "axis1" else -1) or (axis == 1 and first.place == "last" and first.dims == 1):
            return replace(first, ids=torch.cat([s.ids for s in order if s is not None and not isinstance(s, str)]))
    if kind in ("mean", "sum") and first.place == "axis1":
        return _pooled(operation, first)
    if kind in _FLATTEN and _flattens(operation):
        if first.place in ("axis1", "last"):
            return replace(first, place="blocks" if first.place == "axis1" else "tiled", dims=0)
        return first
    return None


def _argument(operation: Operation, position: int, name: str, default: object) -> object:
    if operation.module is not None:
        return getattr(operation.module, name, default)
    args = operation.node.args
    return args[position] if len(args) > position else operation.node.kwargs.get(name, default)


def _pooled(operation: Operation, state: _Channels) -> _Channels | None:
    given = _argument(operation, 1, "dim", None)
    axes = [given] if isinstance(given, int) else list(given) if isinstance(given, Iterable) else []
    positive = [axis + state.dims + 2 if isinstance(axis, int) and axis < 0 else axis for axis in axes]
    if not positive or any(not isinstance(axis, int) or axis < 2 for axis in positive):
        return None
    if _argument(operation, 2, "keepdim", False):
        return state
    return replace(state, dims=left) if (left := state.dims - len(positive)) else replace(state, place="blocks", dims=0)


def _flattens(operation: Operation) -> bool:
    """Whether all but the first axis become one."""
    if operation.kind == "flatten":
        start, end = _argument(operation, 1, "start_dim", 0), _argument(operation, 2, "end_dim", -1)
        return start == 1 and end == -1
    shape = operation.node.args[1:]
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return len(shape) == 2


def _read(state: _Channels, width: int) -> Tensor | None:
    """The unit behind each of ``width`` columns, None where the two do not fit."""
    n = len(state.ids)
    if state.place in ("axis1", "last") or width % n:
        return state.ids if n == width else None
    return state.ids.repeat_interleave(width // n) if state.place == "blocks" else state.ids.repeat(width // n)


def _layer(walk: _Walk, operation: Operation, state: _Channels | None) -> _Channels | None:
    layer: Any = operation.module
    name = operation.name
    if isinstance(layer, nn.Linear):
        outputs, inputs, place, dims, groups = layer.out_features, layer.in_features, "last", 1, 1
        if state is not None and state.place == "axis1":
            walk.freeze(state, f"{name} does not read them by channel")
            state = None
    else:
        outputs, inputs, groups = layer.out_channels, layer.in_channels, layer.groups
        place, dims = "axis1", len(layer.kernel_size)
        if state is not None and state.place != "axis1":
            walk.freeze(state, f"{name} does not read them by channel")
            state = None
    if name not in walk.rows:
        walk.layers.append(name)
        walk.rows[name] = walk.new(outputs)
    made = _Channels(walk.rows[name], place, dims)
    if groups == 1 and operation.kind != "convtranspose":
        _reads(walk, name, state, inputs)
    elif groups == inputs and state is not None and len(state.ids) == inputs:  # depthwise: output i needs input i
        walk.join(made.ids, state.ids.repeat_interleave(outputs // inputs))
    else:
        why = f"{name} is {'transposed' if groups == 1 else 'a convolution in groups'}"
        walk.freeze(state, why)
        walk.freeze(made, why)
    if is_parametrized(layer):
        walk.freeze(state, f"{name} has a parametrization")
        walk.freeze(made, f"{name} has a parametrization")
    return made


def _reads(walk: _Walk, name: str, state: _Channels | None, width: int) -> None:
    ids = None if state is None else _read(state, width)
    if ids is None:
        walk.freeze(state, f"{name} does not read them by channel")
        ids = walk.new(width)
        walk.frozen.append((ids, "input"))
    if name in walk.columns:
        walk.join(walk.columns[name], ids)
    walk.columns.setdefault(name, ids)


def _norm(walk: _Walk, operation: Operation, state: _Channels | None) -> _Channels | None:
    norm: Any = operation.module
    width = int(norm.num_features)
    ids = None if state is None else _read(state, width)
    if ids is None:
        walk.freeze(state, f"{operation.name} does not read them by channel")
        return None
    if operation.name in walk.rows:
        walk.join(walk.rows[operation.name], ids)
    walk.rows.setdefault(operation.name, ids)
    return state


def _freeze_shared(walk: _Walk, recording: Recording) -> None:
    """A weight that two layers own cannot lose a row of one alone."""
    owners: dict[int, set[str]] = {}
    for operation in recording.operations:
        if isinstance(operation.module, LAYERS):
            owners.setdefault(id(operation.module.weight), set()).add(operation.name)
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            for ids in (walk.rows[name], walk.columns.get(name)):
                if ids is not None:
                    walk.frozen.append((ids, f"the weight of {name} is shared"))


def _settle(walk: _Walk) -> Coupling:
    if not walk.layers:
        raise ModelError("the network has no linear or convolutional layer, so it has no units")
    first = torch.cat([a for a, _ in walk.same]).numpy() if walk.same else np.empty(0, dtype=np.int64)
    second = torch.cat([b for _, b in walk.same]).numpy() if walk.same else np.empty(0, dtype=np.int64)
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(walk.total, walk.total))
    _, group = connected_components(edges, directed=False)
    reasons: dict[int, str] = {}
    for ids, why in walk.frozen:
        for g in np.unique(group[ids.numpy()]).tolist():
            reasons.setdefault(g, why)
    order = np.concatenate([group[walk.rows[name].numpy()] for name in walk.layers])
    free = order[~np.isin(order, list(reasons))]
    _, at = np.unique(free, return_index=True)
    units = free[np.sort(at)]
    number = np.full(walk.total, -1)
    number[units] = np.arange(len(units))

    def settled(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(number[group[ids.numpy()]]) for name, ids in found.items()}

    fixed = {}
    for name in walk.layers:
        why = [reasons[g] for g in np.unique(group[walk.rows[name].numpy()]).tolist() if g in reasons]
        if why:
            fixed[name] = why[0]
    return Coupling(settled(walk.rows), settled(walk.columns), tuple(walk.layers), len(units), fixed)
