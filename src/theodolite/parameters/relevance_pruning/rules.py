"""How the relevance of an operation's output is handed to its inputs; each rule keeps the sum.

Source: Yeom et al., 2021, arXiv:1912.08881 (section 3); Bach et al., 2015, PLoS ONE 10(7).
"""

__all__ = ["RULES", "AffineMap", "Rule", "UnsupportedLayerError", "add_rule", "choose_rule"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from theodolite.core.errors import InputError, ModelError
from theodolite.core.masks.trace import LAYERS, Operation
from theodolite.parameters.weights import matches

Rule = Literal["zplus", "epsilon", "proportional", "pass", "winner"]
RULES = ("zplus", "epsilon", "proportional", "pass", "winner")

_TINY, _EPSILON = 1e-9, 1e-6
_PASS = {
    "relu", "relu6", "leakyrelu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "tanh",
    "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "clamp", "clip", "identity", "dropout", "alphadropout",
    "featurealphadropout", "batchnorm", "contiguous", "clone", "detach", "float", "double", "to",
}  # fmt: skip
_WINNER = {
    "maxpool", "adaptivemaxpool", "amax", "flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze",
    "unsqueeze", "pad", "zeropad", "getitem",
}  # fmt: skip
_PROPORTIONAL = {"avgpool", "adaptiveavgpool", "mean", "sum"}


class UnsupportedLayerError(ModelError):
    """The network has a layer that no relevance rule is known for."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A linear or convolutional layer with the batch norm that follows it folded in: F_w(a) + b.

    Works on any subclass whose forward is affine in its weight, such as a convolution that pads in its own way.
    """

    layer: nn.Module
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: Any, norm: Any | None) -> "AffineMap":
        """The map of ``layer``, and of ``norm`` in eval mode after it."""
        if is_parametrized(layer):
            raise ModelError(
                f"{type(layer).__name__} has a parametrization; call torch.nn.utils.parametrize.remove_parametrizations"
            )
        weight = layer.weight.detach()
        outputs = 1 if getattr(layer, "transposed", False) else 0
        bias = weight.new_zeros(weight.shape[outputs]) if layer.bias is None else layer.bias.detach()
        if norm is None:
            return cls(layer, weight, bias)
        if norm.running_var is None:
            raise ModelError("a batch norm without running statistics is no fixed map; train it with them")
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias.detach() - norm.running_mean * scale
        sides = [1] * weight.ndim
        sides[outputs] = -1
        return cls(layer, weight * scale.view(sides), bias * scale + shift)

    def __call__(self, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """F with other numbers."""
        parameters = {"weight": weight} if self.layer.bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.layer, parameters, (a,))

    def share(self, rule: str, a: Tensor, relevance: Tensor) -> Tensor:
        """What each entry of the input ``a`` gets of the output's relevance, by "zplus" or "epsilon"."""
        if rule == "epsilon":
            return self._handed_back([(a, self.weight)], lambda z: _stabilised(self._with_bias(z), _EPSILON), relevance)
        parts = [(a, self.weight.clamp(min=0))]
        if float(a.min()) < 0:
            parts = [(a.clamp(min=0), parts[0][1]), (a.clamp(max=0), self.weight.clamp(max=0))]
        return self._handed_back(parts, lambda z: z + _TINY, relevance)  # no summand of z is below 0

    def _handed_back(
        self, parts: list[tuple[Tensor, Tensor]], denominator: Callable[[Tensor], Tensor], relevance: Tensor
    ) -> Tensor:
        """Sum over the parts (a, w) of a * F_w^T s with s = R / denominator(z), z the sum of F_w(a)."""
        given = [a.detach().requires_grad_(True) for a, _ in parts]
        none = torch.zeros_like(self.bias)
        with torch.enable_grad():
            each = [self(a, w, none) for a, (_, w) in zip(given, parts, strict=True)]
        z = each[0].detach() if len(each) == 1 else each[0].detach() + each[1].detach()
        s = relevance / denominator(z)
        back = torch.autograd.grad(each, given, [s] * len(each))
        shares = [a.detach() * g for a, g in zip(given, back, strict=True)]
        return shares[0] if len(shares) == 1 else shares[0] + shares[1]

    def _with_bias(self, z: Tensor) -> Tensor:
        sides = [1] * z.ndim
        sides[-1 if isinstance(self.layer, nn.Linear) else 1] = -1
        return z + self.bias.view(sides)


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    return z + torch.where(z >= 0, epsilon, -epsilon).to(z)


def choose_rule(operation: Operation, rule: str | Mapping[str, str]) -> str:
    """The rule of one operation: by its name, its type or kind in ``rule``, else the one that fits its kind.

    Raises UnsupportedLayerError where there is none, and InputError for a rule that does not exist or does not fit.
    """
    layer = isinstance(operation.module, LAYERS)
    found = rule if isinstance(rule, str) and layer else None
    if isinstance(rule, Mapping):
        kind = "conv" if operation.kind == "convtranspose" else operation.kind
        named = [
            value for key, value in rule.items() if operation.module is not None and matches(operation.name, [key])
        ]
        found = next(iter(named), None) or rule.get(operation.type_name) or rule.get(kind)
    if found is not None:
        if found not in RULES or layer != (found in ("zplus", "epsilon")):
            fitting = "zplus or epsilon" if layer else "proportional, pass or winner"
            raise InputError(f"the rule of {operation.type_name} at {operation.name} must be {fitting}, got {found!r}")
        return found
    if layer:
        return "zplus"
    constants = len(operation.sources) == 1
    if operation.kind in _PASS or (operation.kind in {"add", "sub", "mul", "truediv", "div"} and constants):
        return "pass"
    if operation.kind in _WINNER:
        return "winner"
    if operation.kind in _PROPORTIONAL | {"add", "cat", "concat"}:
        return "winner" if operation.kind in ("cat", "concat") else "proportional"
    raise UnsupportedLayerError(
        f"no relevance rule for {operation.type_name} at {operation.name}; pass rule={{{operation.type_name!r}: ...}} with "
        "'pass', 'winner' or 'proportional'"
    )


def add_rule(operation: Operation, rule: str, relevance: Tensor) -> list[Tensor]:
    """What each source of an operation that is no layer gets.

    "pass": all of it, entry by entry. "winner": s = R is sent back by the operation's own derivative, which for a maximum,
    a copy or a concatenation is 1 at the entry that was taken. "proportional": a * J^T (R / z), z = sum of J a; for a sum
    of branches and for averages the shares are those of the summands.
    """
    inputs = operation.inputs()
    if not all(isinstance(a, Tensor) for a in inputs):
        raise UnsupportedLayerError(
            f"{operation.type_name} at {operation.name} takes one of several tensors; it has no rule"
        )
    if rule == "pass":
        if len(inputs) != 1 or inputs[0].shape != relevance.shape:
            raise UnsupportedLayerError(
                f"the relevance of {operation.type_name} at {operation.name} cannot be passed on entry by entry: its output "
                f"is {tuple(relevance.shape)}, its inputs are {[tuple(a.shape) for a in inputs]}"
            )
        return [relevance]
    given = [a.detach().requires_grad_(True) for a in inputs]
    with torch.enable_grad():
        z = operation.apply(*given)
    if rule == "winner":
        return list(torch.autograd.grad(z, given, relevance))
    back = torch.autograd.grad(z, given, relevance / _stabilised(z.detach(), _TINY))
    return [a.detach() * g for a, g in zip(given, back, strict=True)]
