"""The sequence layer: a causal convolution for a whole series, a recurrence for a stream, with the same weights."""

__all__ = ["S4D", "Recurrence", "ssm_parameter_groups"]

from typing import Any

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn

from theodolite.core.convolution import causal_convolution
from theodolite.core.errors import InputError
from theodolite.core.train import seeded
from theodolite.networks.diagonal_ssm.kernel import DiagonalSSMKernel


class S4D(nn.Module):
    """y = K * u + D u for each of H channels: input (B, L, H), output (B, L, H) and the state after it (B, H, N/2) complex.

    kernel: options of `DiagonalSSMKernel`. dropout: share of the outputs set to 0 in training. bidirectional: a second
    kernel reads the series backwards, so that every output sees all of it; such a layer has no `step`. transposed: input
    and output are (B, H, L). The state is exact, so a series read in chunks, each with the state of the last, gives the
    outputs of the series read at once; `step` reads one sample, and `recurrence` is a module of its own that does so with
    the discretised weights, for a stream that runs for long or for torch.export.

    Raises InputError for an input of another shape, a complex or an empty one, a state of another shape or type, rate <= 0.

    Source: Gu, Gupta, Goel, Re, 2022, arXiv:2206.11893.

    A sensor is read in chunks, then sample by sample, as if it had been read at once:

    >>> layer = S4D(3, n_state=16, seed=0).eval()
    >>> series = torch.randn(1, 100, 3, generator=torch.Generator().manual_seed(1))
    >>> with torch.no_grad():
    ...     whole, _ = layer(series)
    ...     start, state = layer(series[:, :60])
    ...     more, state = layer(series[:, 60:90], state)
    ...     stream, live = layer.recurrence(), []
    ...     for sample in series[:, 90:].unbind(dim=1):
    ...         y, state = stream(sample, state)
    ...         live.append(y)
    >>> pieces = torch.cat([start, more, torch.stack(live, dim=1)], dim=1)
    >>> bool(torch.allclose(pieces, whole, atol=1e-4))
    True
    """

    def __init__(
        self,
        d_model: int,
        n_state: int = 64,
        dropout: float = 0.0,
        bidirectional: bool = False,
        transposed: bool = False,
        **kernel: Any,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")
        with seeded(kernel.pop("seed", None)):
            self.kernel = DiagonalSSMKernel(d_model, n_state, **kernel)
            self.backward_kernel = DiagonalSSMKernel(d_model, n_state, **kernel) if bidirectional else None
            self.D = nn.Parameter(torch.randn(d_model))
        self.d_model, self.transposed = d_model, transposed
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."] | None = None, *, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch _ _"], Complex[Tensor, "batch channel half"] | None]:
        """Outputs of the shape of ``u`` and the state after its last sample (None where "dss" has none).

        state: what an earlier call ended with. rate: see `DiagonalSSMKernel.discretize`.
        """
        y = self.convolve(u, state, rate=rate)
        if self.kernel.discretization == "dss":
            return y, None
        with torch.autocast(u.device.type, enabled=False):
            inputs = u if self.transposed else u.transpose(1, 2)
            return y, self.kernel.final_state(inputs.to(self.D.dtype), state, rate)

    def convolve(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."] | None = None, *, rate: float = 1.0
    ) -> Float[Tensor, "batch _ _"]:
        """The outputs of `forward` alone, for those who do not go on from the last state."""
        self._check_input(u)
        if state is not None:
            if self.backward_kernel is not None:
                raise InputError("a bidirectional layer needs the whole series at once, so it takes no state")
            self._check_state(state, u.shape[0])
        channels_first = u if self.transposed else u.transpose(1, 2)
        with torch.autocast(u.device.type, enabled=False):  # a kernel in bfloat16 has two digits
            inputs = channels_first.to(self.D.dtype) if torch.is_autocast_enabled(u.device.type) else channels_first
            length = inputs.shape[-1]
            y = inputs * self.D[:, None] + causal_convolution(inputs, self.kernel(length, rate))
            if self.backward_kernel is not None:
                y = y + causal_convolution(inputs.flip(-1), self.backward_kernel(length, rate)).flip(-1)
            if state is not None:
                y = y + self.kernel.free_response(state, length, rate)
        return self.dropout(y if self.transposed else y.transpose(1, 2))

    def step(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."], *, rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch channel"], Complex[Tensor, "batch channel half"]]:
        """Read one sample u (B, H): its output (B, H) and the next state.

        The weights are discretised anew each time, so that gradients reach them; `recurrence` does it once.
        """
        self._check_causal()
        if u.ndim != 2 or u.shape[1] != self.d_model or u.is_complex():
            raise InputError(f"step takes real (batch, {self.d_model}), got {_told(u)}")
        self._check_state(state, u.shape[0])
        Abar, Bbar = self.kernel.discretize(rate)
        state = Abar * state + Bbar * u[..., None]
        return self.dropout(self.kernel.readout(state) + self.D * u), state

    def initial_state(self, batch: int) -> Complex[Tensor, "{batch} channel half"]:
        """The state before anything was read: zeros (B, H, N/2)."""
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        self._check_causal()
        return torch.zeros(
            batch, self.d_model, self.kernel.states, dtype=self.D.dtype.to_complex(), device=self.D.device
        )

    def recurrence(self, rate: float = 1.0) -> "Recurrence":
        """`step` in eval mode as a module without parameters: its weights are a discretised copy of today's."""
        self._check_causal()
        with torch.no_grad():
            Abar, Bbar = self.kernel.discretize(rate)
            C = torch.view_as_real(self.kernel.output_weights)
            return Recurrence(torch.view_as_real(Abar), torch.view_as_real(Bbar), C.clone(), self.D.clone())

    def _check_input(self, u: Tensor) -> None:
        wanted = f"(batch, {self.d_model}, length)" if self.transposed else f"(batch, length, {self.d_model})"
        if u.ndim != 3 or u.shape[1 if self.transposed else 2] != self.d_model:
            raise InputError(f"this layer takes {wanted}, got {_told(u)}")
        if not u.is_floating_point():
            raise InputError(f"this layer takes real numbers {wanted}, got {_told(u)}")
        if 0 in u.shape:
            raise InputError(f"this layer needs at least one row and one step, got {_told(u)}")

    def _check_causal(self) -> None:
        if self.backward_kernel is not None:
            raise InputError(
                "a bidirectional layer reads the future, so it cannot go step by step; set bidirectional=False"
            )

    def _check_state(self, state: Tensor, batch: int) -> None:
        shape, dtype = (batch, self.d_model, self.kernel.states), self.D.dtype.to_complex()
        if tuple(state.shape) != shape or state.dtype != dtype:
            raise InputError(
                f"the state must be {shape} of {dtype}, got {_told(state)}; `initial_state({batch})` makes one"
            )


class Recurrence(nn.Module):
    """x <- Abar x + Bbar u, y = Re(C x) + D u: one sample a call, made by `S4D.recurrence`; (u, state) -> (y, state).

    The weights are real pairs (H, N/2, 2), so that a saved module holds real numbers only; torch.export takes it as it is.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def __init__(self, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
        super().__init__()
        for name, value in zip("ABCD", (A, B, C, D), strict=True):
            self.register_buffer(name, value)

    def forward(
        self, u: Float[Tensor, "batch channel"], state: Complex[Tensor, "batch channel half"]
    ) -> tuple[Float[Tensor, "batch channel"], Complex[Tensor, "batch channel half"]]:
        """The output for one sample, and the next state."""
        state = torch.view_as_complex(self.A) * state + torch.view_as_complex(self.B) * u[..., None]
        return (torch.view_as_complex(self.C) * state).real.sum(dim=-1) + self.D * u, state


def ssm_parameter_groups(
    module: nn.Module, lr: float, ssm_lr: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: the dynamics (ssm_lr, no weight decay) and everything else (lr, weight_decay).

    The dynamics are what the modules inside name in ``ssm_parameters``: time steps, A and B. Weight decay would pull a
    time constant towards an arbitrary one. Frozen parameters are in neither; lr and ssm_lr must be positive.

    >>> [len(group["params"]) for group in ssm_parameter_groups(S4D(2), lr=0.01)]
    [3, 2]
    """
    if not (lr > 0 and ssm_lr > 0 and weight_decay >= 0):
        raise InputError(f"need lr > 0, ssm_lr > 0 and weight_decay >= 0, got {lr}, {ssm_lr} and {weight_decay}")
    dynamics = {
        id(parameter)
        for inside in module.modules()
        for name, parameter in inside.named_parameters(recurse=False)
        if name in getattr(inside, "ssm_parameters", ())
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in dynamics], "lr": ssm_lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) not in dynamics], "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _told(value: Tensor) -> str:
    return f"{tuple(value.shape)} of {value.dtype}"
