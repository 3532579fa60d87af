"""The tensor operations of a network in order, recorded while one batch passes through it."""

__all__ = ["LAYERS", "NORMS", "Operation", "Recording", "record"]

import builtins
import operator
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from theodolite.core.errors import ModelError

LAYERS = (nn.Linear, _ConvNd)
"""Layers whose outputs are units."""
NORMS = (_BatchNorm,)
"""Layers that keep numbers for each unit of the layer before them."""

_VALUE = "value"
_PLAIN: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class _Alone(nn.Module):
    """The network as a part of another, so that its optional arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _Recorder(fx.Tracer):
    """Runs each operation on the example as it is recorded, so that shapes are numbers and conditions have an answer."""

    def __init__(self, example: Tensor | None, leaves: bool) -> None:
        super().__init__()
        self.example, self.leaves, self._running = example, leaves, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, *NORMS)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        target, kwargs = _without_inplace(kind, target, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if self.example is None or kind == "output":
            return proxy
        self._running = True
        try:
            value = self._run(proxy.node, self.example)
        finally:
            self._running = False
        if not _holds_tensor(value):  # a size, a type, a device: the same for every later use of this recording
            self.graph.erase_node(proxy.node)
            return value
        proxy.node.meta[_VALUE] = value
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.example is None else _Known(node, self)

    def _run(self, node: fx.Node, example: Tensor) -> Any:
        if node.op == "placeholder":
            return example
        if node.op == "get_attr":
            return _attribute(self.root, node)

        def known(used: fx.Node) -> Any:
            return used.meta[_VALUE] if _VALUE in used.meta else _attribute(self.root, used)

        args, kwargs = (fx.map_arg(part, known) for part in (node.args, node.kwargs))
        out = _call(node, self.root, args, kwargs)
        if self.leaves and node.op == "call_module" and isinstance(self.root.get_submodule(str(node.target)), LAYERS):
            return out if out.requires_grad else out.requires_grad_(True)
        return out


class _Known(fx.Proxy):
    """A recorded tensor whose shape and type are known."""

    def __getattr__(self, k: str) -> Any:
        value = self.node.meta.get(_VALUE)
        known = k in {"shape", "dtype", "device", "ndim", "is_cuda", "layout"}
        return builtins.getattr(value, k) if known and isinstance(value, Tensor) else super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.node.meta[_VALUE])


def _call(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = root.get_submodule(str(node.target))
    inplace = module.__dict__.get("inplace")
    if not inplace:
        return module.forward(*args, **kwargs)
    module.__dict__["inplace"] = False  # what is recorded must not be written over
    try:
        return module.forward(*args, **kwargs)
    finally:
        module.__dict__["inplace"] = inplace


def _attribute(root: nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(root)


def _without_inplace(kind: str, target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operation that leaves its input as it is."""
    if kind == "call_method" and target.endswith("_") and not target.endswith("__"):
        return target[:-1], kwargs
    if kind == "call_function":
        name = getattr(target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            target = getattr(torch, name[:-1], target)
        return _PLAIN.get(target, target), kwargs | {"inplace": False} if kwargs.get("inplace") else kwargs
    return target, kwargs


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of a network: what is done to which earlier steps, and what came out for the example.

    kind: "linear", "conv", "batchnorm", else the name of the module or function in small letters without underscores and
    dimensions ("relu", "maxpool", "adaptiveavgpool", "add", "flatten"); "input", "constant". name: of the module in the
    network, else of the node.
    """

    node: fx.Node
    root: nn.Module

    @property
    def name(self) -> str:
        """Of the module in the network ("layers.0"), else of the node ("add_1")."""
        target = str(self.node.target)
        return target.removeprefix("model.") if self.node.op == "call_module" else self.node.name

    @cached_property
    def module(self) -> nn.Module | None:
        """The module that does it, None for a function."""
        return self.root.get_submodule(str(self.node.target)) if self.node.op == "call_module" else None

    @cached_property
    def kind(self) -> str:
        """What is done."""
        node, module = self.node, self.module
        if node.op in ("placeholder", "get_attr"):
            return "input" if node.op == "placeholder" else "constant"
        if module is None:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        else:
            if isinstance(module, nn.Linear):
                return "linear"
            if isinstance(module, _ConvNd):
                return "convtranspose" if module.transposed else "conv"
            name = next(
                (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.") and c is not nn.Module),
                type(module).__name__,
            )  # fmt: skip
        return re.sub(r"[123]d$", "", name.lower()).replace("_", "")

    @property
    def type_name(self) -> str:
        """As its author calls it."""
        return type(self.module).__name__ if self.module is not None else self.kind

    @cached_property
    def sources(self) -> list[fx.Node]:
        """The steps it takes tensors from, without constants and sizes, each once."""
        return [node for node in self.node.all_input_nodes if node.op != "get_attr"]

    @property
    def value(self) -> Any:
        """What came out for the example."""
        return self.node.meta[_VALUE]

    def inputs(self) -> list[Any]:
        """What its sources gave for the example."""
        return [node.meta[_VALUE] for node in self.sources]

    def apply(self, *inputs: Tensor) -> Any:
        """The same step on other ``inputs``, one for each of the sources."""
        given = dict(zip(self.sources, inputs, strict=True))

        def value(used: fx.Node) -> Any:
            return given[used] if used in given else _attribute(self.root, used)

        args, kwargs = (fx.map_arg(part, value) for part in (self.node.args, self.node.kwargs))
        return _call(self.node, self.root, args, kwargs)


@dataclass(frozen=True, eq=False)
class Recording:
    """The operations of a network in the order in which they ran, and the step whose tensor is the network's output."""

    operations: tuple[Operation, ...]
    output: fx.Node

    def followers(self) -> dict[fx.Node, list[Operation]]:
        """The operations that use each step."""
        found: dict[fx.Node, list[Operation]] = {operation.node: [] for operation in self.operations}
        for operation in self.operations:
            for source in operation.sources:
                found[source].append(operation)
        return found

    def joined_norms(self) -> dict[fx.Node, Operation]:
        """The batch norm that alone follows a layer, by the layer's step: the two are one affine map in eval mode."""
        modules = {operation.node: operation.module for operation in self.operations}
        joined = {}
        for node, after in self.followers().items():
            alone = len(after) == 1 and node is not self.output
            if alone and isinstance(modules[node], LAYERS) and isinstance(after[0].module, NORMS):
                joined[node] = after[0]
        return joined


def record(model: nn.Module, example: Tensor | None = None, *, leaves: bool = False) -> Recording:
    """The operations of ``model`` on the batch ``example``, with everything that came out on the way.

    Runs in the model's present mode and records gradients where the caller has them on; leaves=True has every layer's
    output require one. Operations that write over their input are replaced by those that do not. Without an example only
    the structure is recorded, and the forward must not ask for shapes in conditions.

    Raises ModelError where the forward cannot be followed (it turns tensors into Python numbers) or gives no single tensor.

    >>> [op.kind for op in record(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3)).operations]
    ['input', 'linear', 'relu']
    """
    root = _Alone(model)
    recorder = _Recorder(example, leaves)
    try:
        followed = recorder.trace(root)
    except (TraceError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        hint = "" if example is not None else "; give example_input, so that conditions on shapes have an answer"
        raise ModelError(
            f"the forward of {type(model).__name__} cannot be followed step by step: {error}{hint}"
        ) from error
    except RecursionError as error:  # what is run on the way makes further operations without end
        raise ModelError(
            f"the forward of {type(model).__name__} computes with its weights in a way that is not followed"
        ) from error
    *nodes, last = followed.nodes
    output = last.args[0]
    if not isinstance(output, fx.Node):
        raise ModelError(f"{type(model).__name__} must give one tensor, it gives {type(output).__name__}")
    return Recording(tuple(Operation(node, root) for node in nodes), output)
