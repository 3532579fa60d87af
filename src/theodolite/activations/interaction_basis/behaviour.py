"""How far a network's outputs move when its weights do, and the exact second derivative of that."""

__all__ = ["Behaviour", "behavioural_hessian", "behavioural_loss"]

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.functional import call_with
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode, model_input

_MOST_HESSIAN = 8192


class Behaviour:
    """L_B(w) = (1/n) sum_x |f_w(x) - f_w*(x)|^2 of chosen parameters around their present values w*.

    names: of the parameters; all that require a gradient where None. center: w* as one vector (P,). L_B is 0 at w*, and
    its Hessian there (2/n) sum_x J^T J exactly: the residual is 0, so no second derivative of the network is in it.
    """

    def __init__(
        self, model: nn.Module, X: Any, params: Iterable[str] | None = None, *, memory: int | None = None
    ) -> None:
        self.model, self.memory = model, memory
        self.x = model_input(model, X)
        if self.x.ndim == 0 or len(self.x) == 0:
            raise InputError(f"need at least one row, got shape {tuple(self.x.shape)}")
        every = dict(model.named_parameters())
        self._rest = {name: p.detach() for name, p in every.items()}
        self.names = [name for name, p in every.items() if p.requires_grad] if params is None else _names(params)
        unknown = [name for name in self.names if name not in every]
        if unknown or not self.names:
            raise InputError(
                f"the network has no parameters called {', '.join(unknown) or '(none are left)'}; "
                f"it has: {', '.join(every) or 'none'}"
            )
        self.shapes = [every[name].shape for name in self.names]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.center = torch.cat([every[name].detach().reshape(-1) for name in self.names])
        with evaluation_mode(model):
            self._cost = bytes_per_row(model, self.x[:1], gradients=True)
            with torch.no_grad():
                parts = [self._flat(model(self.x[rows])) for rows in chunks(len(self.x), self._cost, memory)]
        self.target = torch.cat(parts)
        if not bool(torch.isfinite(self.target).all()):
            raise ModelError("the network's outputs on these rows are not finite; check the rows and the weights")

    @staticmethod
    def _flat(output: Any) -> Tensor:
        output = main_tensor(output)
        return output.reshape(len(output), -1)

    def split(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """The parameters by name that the vector stands for."""
        pieces = vector.split(self.sizes)
        return {n: piece.view(shape) for n, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def outputs(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f_w(x), flat (n, outputs)."""
        return self._flat(call_with(self.model, self._rest | dict(params), (x,)))

    def loss(self, params: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """L_B; gradients are recorded where the given parameters ask for them."""
        with evaluation_mode(self.model):
            total = torch.zeros((), dtype=self.target.dtype, device=self.target.device)
            for rows in chunks(len(self.x), self._cost, self.memory):
                total = total + (self.outputs(params, self.x[rows]) - self.target[rows]).square().sum()
            return total / len(self.x)

    def losses(self, vectors: Float[Tensor, "m P"]) -> Float[Tensor, " m"]:
        """L_B at many points at once, in chunks, without gradients."""
        one = vmap(lambda v: (self.outputs(self.split(v), self.x) - self.target).square().sum() / len(self.x))
        with torch.no_grad(), evaluation_mode(self.model):
            return torch.cat(
                [one(vectors[part]) for part in chunks(len(vectors), self._cost * len(self.x), self.memory)]
            )

    def jacobian(self, x: Tensor) -> Float[Tensor, "n outputs P"]:
        """df_w(x)/dw at w*, not chunked."""

        def one(vector: Tensor, row: Tensor) -> Tensor:
            return self.outputs(self.split(vector), row[None])[0]

        with evaluation_mode(self.model), sdpa_kernel(SDPBackend.MATH):
            return vmap(jacrev(one), in_dims=(None, 0))(self.center, x)

    def hessian(self) -> Float[Tensor, "P P"]:
        """(2/n) sum_x J^T J in float64."""
        P = len(self.center)
        if P > _MOST_HESSIAN:
            raise InputError(
                f"the Hessian of {P} parameters takes {8 * P**2 / 2**30:.1f} GiB; name at most {_MOST_HESSIAN} parameters "
                "with params=, or use method='sgld'"
            )
        total = torch.zeros(P, P, dtype=torch.float64, device=self.center.device)
        cost = (self._cost + 16.0 * P) * self.target.shape[1]
        for rows in chunks(len(self.x), cost, self.memory):
            J = self.jacobian(self.x[rows]).reshape(-1, P).to(torch.float64)
            total.addmm_(J.T, J)
        return total * (2 / len(self.x))


def _names(params: Iterable[str]) -> list[str]:
    return [params] if isinstance(params, str) else list(params)


def behavioural_loss(model: nn.Module, X: Any) -> Callable[[Mapping[str, Tensor]], Float[Tensor, ""]]:
    """The function L_B(params) = (1/n) sum_x |f_params(x) - f_now(x)|^2, with f_now the network as it is at this call.

    params: tensors by parameter name; those left out stay as they are now. No labels are in it. Eval mode is forced and
    restored.

    Source: Bushnaq et al., 2024, arXiv:2405.10927.

    >>> net = nn.Linear(2, 1)
    >>> loss = behavioural_loss(net, torch.ones(3, 2))
    >>> round(float(loss({"bias": net.bias.detach() + 2})), 4)
    4.0
    """
    behaviour = Behaviour(model, X)
    return behaviour.loss


def behavioural_hessian(
    model: nn.Module, X: Any, params: Iterable[str] | None = None, *, memory: int | None = None
) -> Float[Tensor, "P P"]:
    """Hessian of the behavioural loss at the present weights, (2/n) sum_x J^T J, float64.

    params: names of the parameters in the order of the matrix; all that require a gradient where None. Raises InputError
    for more than 8,192 weights. For a weight matrix W (d_out, d_in) the block is (2/n) sum_x (J_pre^T J_pre) ⊗ (f f^T).

    Source: Bushnaq et al., 2024, arXiv:2405.10927.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> behavioural_hessian(net, torch.tensor([[1.0, 2.0]]))
    tensor([[2., 4.],
            [4., 8.]], dtype=torch.float64)
    """
    return Behaviour(model, X, params, memory=memory).hessian()
