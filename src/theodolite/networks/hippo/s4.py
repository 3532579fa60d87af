"""The trainable layer that starts from a named memory, and what its time steps say about its memory."""

__all__ = ["S4", "S4Recurrence", "timescale_report"]

import pandas as pd
import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn

from theodolite.core.convolution import causal_convolution
from theodolite.core.errors import InputError, ModelError
from theodolite.networks.hippo.s4_kernel import S4Kernel, Stepper


class S4(nn.Module):
    """y = K * u + D u for each of H channels, K the kernel of A = Lambda - P P* that starts as ``measure``.

    Input (B, L, H), output (B, L, H) and the state after it (B, H, N/2) complex. The calls are those of
    `diagonal_ssm.S4D`, so either layer takes the other's place; the state is exact, so a series read in chunks, each with
    the state of the last, gives the outputs of the series read at once. `step` reads one sample; `recurrence` is a module of
    its own that does so with prepared weights, for a stream that runs for long or for torch.export. Each channel has its own
    time step, log-uniform in [dt_min, dt_max]: it remembers about 1/dt steps, so dt_min ~ 1 / (the longest dependency).

    rank: of P; more than the measure's own adds rows that start near 0. l_max: longest series; None grows with what comes.
    bidirectional: a second kernel reads the series backwards; such a layer has no `step`. normalize: scale B so that a
    white input gives states of size 1. seed: None draws from torch's own generator.

    Raises InputError for an odd n_state, an unknown measure, a rank below the measure's, dt_min >= dt_max, a series longer
    than l_max, an input or state of another shape or type.

    Source: Gu, Goel, Re, 2021, arXiv:2111.00396; Gu et al., 2022, arXiv:2206.12037 (initialisations and time steps).

    >>> layer = S4(3, n_state=16, seed=0)
    >>> with torch.no_grad():
    ...     series = torch.randn(1, 90, 3, generator=torch.Generator().manual_seed(1))
    ...     whole, _ = layer(series)
    ...     start, state = layer(series[:, :60])
    ...     y, state = layer.step(series[:, 60], state)
    >>> bool(torch.allclose(y, whole[:, 60], atol=1e-4))
    True
    """

    def __init__(
        self,
        d_model: int,
        n_state: int = 64,
        measure: str = "legs",
        rank: int | None = None,
        l_max: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        *,
        normalize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def kernel() -> S4Kernel:
            return S4Kernel(
                d_model, n_state, measure, rank, l_max, dt_min, dt_max, normalize=normalize, generator=generator
            )

        self.kernel = kernel()
        self.backward_kernel = kernel() if bidirectional else None
        self.D = nn.Parameter(torch.randn(d_model, generator=generator))
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "batch length channel"], Complex[Tensor, "batch channel half"]]:
        """Outputs (B, L, H) and the state after the last sample; state: what an earlier call ended with."""
        self._check_input(u, state)
        with torch.autocast(u.device.type, enabled=False):
            inputs = u.transpose(1, 2).to(self.D.dtype)
            free, final = self.kernel.carry(inputs, state)
            y = self._convolved(inputs)
            return self.dropout((y if free is None else y + free).transpose(1, 2)), final

    def convolve(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "batch length channel"]:
        """The outputs of `forward` alone, which cost less: for those who do not go on from the last state."""
        if state is not None:
            return self.forward(u, state)[0]
        self._check_input(u, None)
        with torch.autocast(u.device.type, enabled=False):
            return self.dropout(self._convolved(u.transpose(1, 2).to(self.D.dtype)).transpose(1, 2))

    def step(
        self, u: Shaped[Tensor, "..."], state: Shaped[Tensor, "..."]
    ) -> tuple[Float[Tensor, "batch channel"], Complex[Tensor, "batch channel half"]]:
        """Read one sample u (B, H): its output (B, H) and the next state, O(N) a channel.

        The first step under torch.no_grad turns C~ into C once, and later ones use it until a weight changes.
        """
        self._check_causal()
        if u.ndim != 2 or u.shape[1] != self.d_model or not u.is_floating_point():
            raise InputError(f"step takes real (batch, {self.d_model}), got {_told(u)}")
        self._check_state(state, u.shape[0])
        y, state = self.kernel.step(u, state)
        return self.dropout(y + self.D * u), state

    def initial_state(self, batch: int) -> Complex[Tensor, "{batch} channel half"]:
        """The state before anything was read: zeros (B, H, N/2)."""
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        self._check_causal()
        half = self.kernel.n_state // 2
        return torch.zeros(batch, self.d_model, half, dtype=self.D.dtype.to_complex(), device=self.D.device)

    def recurrence(self) -> "S4Recurrence":
        """`step` in eval mode as a module without parameters: its weights are a prepared copy of today's."""
        self._check_causal()
        with torch.no_grad():
            return S4Recurrence(self.kernel.stepper(), self.D)

    def _convolved(self, u: Tensor) -> Tensor:
        y = u * self.D[:, None] + causal_convolution(u, self.kernel(u.shape[-1]))
        if self.backward_kernel is not None:
            y = y + causal_convolution(u.flip(-1), self.backward_kernel(u.shape[-1])).flip(-1)
        return y

    def _check_input(self, u: Tensor, state: Tensor | None) -> None:
        if u.ndim != 3 or u.shape[2] != self.d_model or 0 in u.shape or not u.is_floating_point():
            raise InputError(
                f"this layer takes real (batch, length, {self.d_model}) of at least one step, got {_told(u)}"
            )
        if state is not None:
            if self.backward_kernel is not None:
                raise InputError("a bidirectional layer needs the whole series at once, so it takes no state")
            self._check_state(state, u.shape[0])

    def _check_causal(self) -> None:
        if self.backward_kernel is not None:
            raise InputError(
                "a bidirectional layer reads the future, so it cannot go step by step; set bidirectional=False"
            )

    def _check_state(self, state: Tensor, batch: int) -> None:
        shape, dtype = (batch, self.d_model, self.kernel.n_state // 2), self.D.dtype.to_complex()
        if tuple(state.shape) != shape or state.dtype != dtype:
            raise InputError(
                f"the state must be {shape} of {dtype}, got {_told(state)}; `initial_state({batch})` makes one"
            )


class S4Recurrence(nn.Module):
    """One sample a call, O(N) a channel, made by `S4.recurrence`; (u (B, H), state (B, H, N/2)) -> (y, state).

    The weights are those of a step, complex ones as real pairs, so that a saved module holds real numbers only; torch.export
    takes it as it is.
    """

    skip: Tensor

    def __init__(self, weights: Stepper, skip: Tensor) -> None:
        super().__init__()
        for name, value in weights._asdict().items():
            self.register_buffer(name, (torch.view_as_real(value) if value.is_complex() else value).detach().clone())
        self._complex = frozenset(name for name, value in weights._asdict().items() if value.is_complex())
        self.register_buffer("skip", skip.detach().clone())

    def forward(
        self, u: Float[Tensor, "batch channel"], state: Complex[Tensor, "batch channel half"]
    ) -> tuple[Float[Tensor, "batch channel"], Complex[Tensor, "batch channel half"]]:
        """The output for one sample, and the next state."""
        found = {name: getattr(self, name) for name in Stepper._fields}
        weights = {name: torch.view_as_complex(v) if name in self._complex else v for name, v in found.items()}
        y, state = Stepper(**weights).step(u, state)
        return y + self.skip * u, state


def timescale_report(layer: nn.Module, sequence_length: int) -> pd.DataFrame:
    """How long each channel remembers: columns channel, dt, memory_steps = 1/dt, covers_sequence (memory_steps >= length).

    layer: an S4 or S4D layer, or a network that holds some; every parameter named log_dt is read, in their order.
    Raises ModelError where there is none, InputError for a sequence_length < 1.

    >>> timescale_report(S4(2, 8, dt_min=0.099, dt_max=0.1, seed=0), 100).covers_sequence.tolist()
    [False, False]
    """
    if sequence_length < 1:
        raise InputError(f"sequence_length must be at least 1, got {sequence_length}")
    steps = [p.detach().double().exp() for name, p in layer.named_parameters() if name.split(".")[-1] == "log_dt"]
    if not steps:
        raise ModelError(f"{type(layer).__name__} holds no state space layer (no parameter named log_dt)")
    dt = torch.cat([step.flatten() for step in steps]).cpu().numpy()
    memory = 1 / dt
    return pd.DataFrame(
        {"channel": range(len(dt)), "dt": dt, "memory_steps": memory, "covers_sequence": memory >= sequence_length}
    )


def _told(value: Tensor) -> str:
    return f"{tuple(value.shape)} of {value.dtype}"
