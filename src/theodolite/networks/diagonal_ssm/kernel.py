"""The kernel of a diagonal state space model: damped oscillators, summed on a grid of steps in two levels of powers."""

__all__ = ["DiagonalSSMKernel"]

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import InputError, ModelError
from theodolite.core.train import seeded
from theodolite.networks.diagonal_ssm.spectrum import check_states, initial_input, initial_spectrum

_DISCRETIZATIONS = ("zoh", "bilinear", "dss")
_TRANSFORMS = ("exp", "softplus", "relu", "none")
_SMALL = 1e-3  # below, (exp(z) - 1) / z is told by its series, whose next term is under 1e-14


class DiagonalSSMKernel(nn.Module):
    """K_l = 2 Re sum_n C_n Bbar_n Abar_n^l of H channels with N/2 conjugate pairs of states each.

    zoh: Abar = exp(dt A), Bbar = (Abar - 1) / A B. bilinear: Abar = (1 + dt A/2) / (1 - dt A/2), Bbar = dt B / (1 - dt A/2).
    dss: row n of the kernel is C_n B_n / A_n exp(dt A_n l) / sum_l exp(dt A_n l), which depends on the whole length.

    Parameters: log_dt (H,), real and imag (H, N/2) of A (real before ``real_transform``: Re A = -exp, -softplus, -relu of
    it or itself), C and B (H, N/2, 2) as pairs. `ssm_parameters` names those that want their own step size and no weight
    decay. dt is log-uniform in [dt_min, dt_max], C complex normal with variance 1. train_B: B is learned; otherwise it
    stays what `initial_input` gives. frequency_scale multiplies the initial imaginary parts. real_states: N real states
    instead of N/2 pairs (the paper's ablation; needs init "real"). seed: None draws from torch's own generator.

    With b = 2^ceil(log2(L)/2), Abar^(ib+j) = Abar^(ib) Abar^j: the powers are two short tables and their product over n is
    one batched matrix product, O(H N sqrt(L)) exponentials and memory instead of O(H N L).

    Raises InputError for sizes or options that mean nothing; a spectrum that grows (real_transform "none" with Re A > 0)
    raises ModelError with the channels when the kernel is asked for.

    Source: Gu, Gupta, Goel, Re, 2022, arXiv:2206.11893, sections 3 and 4; Gupta, Gu, Berant, 2022, arXiv:2203.14343 (dss).

    >>> kernel = DiagonalSSMKernel(4, n_state=8, seed=0)
    >>> tuple(kernel(100).shape)
    (4, 100)
    """

    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "real", "imag", "B")
    imag: Tensor
    B: Tensor

    def __init__(
        self,
        d_model: int,
        n_state: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        real_transform: str = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        train_A: bool = True,
        train_B: bool = False,
        seed: int | None = None,
        *,
        frequency_scale: float = 1.0,
        official_scaling: bool = False,
        real_states: bool = False,
    ) -> None:
        super().__init__()
        check_states(n_state)
        if d_model < 1:
            raise InputError(f"d_model must be at least 1, got {d_model}")
        if discretization not in _DISCRETIZATIONS:
            raise InputError(f"discretization is one of {', '.join(_DISCRETIZATIONS)}, got {discretization!r}")
        if real_transform not in _TRANSFORMS:
            raise InputError(f"real_transform is one of {', '.join(_TRANSFORMS)}, got {real_transform!r}")
        if not 0 < dt_min < dt_max < math.inf:
            raise InputError(f"need 0 < dt_min < dt_max, got {dt_min} and {dt_max}")
        if real_states and init != "real":
            raise InputError(f"real states differ by their decay alone, so real_states needs init 'real', got {init!r}")
        self.d_model, self.n_state, self.init = d_model, n_state, init
        self.discretization, self.real_transform = discretization, real_transform
        self.real_states = real_states
        self.frequency_scale = frequency_scale
        kinds = 2 * n_state if real_states else n_state
        with seeded(seed):
            A = self._drawn_spectra() if init == "random" else self.initial_eigenvalues()
            low, high = math.log(dt_min), math.log(dt_max)
            self.log_dt = nn.Parameter(low + (high - low) * torch.rand(d_model))
            parts = 1 if real_states else 2
            self.C = nn.Parameter(torch.randn(d_model, A.shape[1], parts) * math.sqrt(1 / parts))
        dtype = torch.get_default_dtype()
        real, imag = A.real.to(dtype), A.imag.to(dtype)
        self.real = nn.Parameter(_untransformed(real, real_transform), requires_grad=train_A)
        B = np.tile(initial_input(init, kinds, official_scaling=official_scaling), (d_model, 1))
        B = torch.view_as_real(torch.from_numpy(B))[..., :parts].to(dtype)
        if real_states:
            self.register_buffer("imag", imag)
        else:
            self.imag = nn.Parameter(imag, requires_grad=train_A)
        if train_B:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)

    @property
    def dt(self) -> Float[Tensor, " channel"]:
        """The time step of each channel."""
        return self.log_dt.exp()

    @property
    def states(self) -> int:
        """Complex numbers that a channel carries: N/2, or N where they are real."""
        return self.real.shape[1]

    def eigenvalues(self) -> Complex[Tensor, "channel half"]:
        """A (H, N/2). Raises ModelError where a real part is positive, so that the kernel would grow."""
        if self.real_transform == "none":
            real, grows = self.real, self.real > 0
            if bool(grows.any()):
                channels = grows.any(dim=1).nonzero()[:, 0].tolist()
                raise ModelError(
                    f"A has positive real parts in channels {_some(channels)}, so their kernels grow without bound; "
                    "use real_transform='exp', or make the parameter `real` negative there"
                )
        elif self.real_transform == "relu":
            real = -F.relu(self.real)
        else:
            real = -(self.real.exp() if self.real_transform == "exp" else F.softplus(self.real))
        return torch.complex(real, self.imag)

    def initial_eigenvalues(self) -> Complex[Tensor, "channel half"]:
        """Where A started, (H, N/2) in complex128. Raises InputError for init "random", which is drawn and not kept."""
        if self.init == "random":
            raise InputError("init 'random' draws its eigenvalues, so where they started is not known")
        size = 2 * self.n_state if self.real_states else self.n_state
        spectrum = initial_spectrum(self.init, size, frequency_scale=self.frequency_scale)
        return torch.from_numpy(spectrum).expand(self.d_model, -1)

    @torch.no_grad()
    def set_eigenvalues(self, A: Complex[Tensor, "channel half"]) -> None:
        """Make ``A`` (H, N/2) the eigenvalues. Raises InputError for another shape or a real part that is not negative."""
        if A.shape != self.real.shape or not bool((A.real < 0).all()):
            raise InputError(f"A must be {tuple(self.real.shape)} with negative real parts, got {tuple(A.shape)}")
        self.real.copy_(_untransformed(A.real.to(self.real), self.real_transform))
        self.imag.copy_(A.imag)

    def _drawn_spectra(self) -> Tensor:
        seeds = torch.randint(2**31, (self.d_model,)).tolist()
        drawn = [initial_spectrum("random", self.n_state, frequency_scale=self.frequency_scale, seed=s) for s in seeds]
        return torch.from_numpy(np.stack(drawn))

    def discretize(
        self, rate: float = 1.0, *, length: int | None = None
    ) -> tuple[Complex[Tensor, "channel half"], Complex[Tensor, "channel half"]]:
        """Abar and Bbar (H, N/2) for the step ``rate`` * dt; rate 2 reads a series of every second sample.

        length: what the sums of "dss" run over; without it "dss" raises InputError, since it has no recurrence.
        Raises InputError for a rate that is not positive.
        """
        log_step, Bbar = self._discretize(rate, length)
        return log_step.exp(), Bbar

    def forward(self, length: int, rate: float = 1.0) -> Float[Tensor, "channel {length}"]:
        """K (H, length). Raises InputError for a length below 1 or a rate that is not positive."""
        if length < 1:
            raise InputError(f"a kernel needs a length of at least 1, got {length}")
        log_step, Bbar = self._discretize(rate, length)
        return _sum_powers((self.output_weights * Bbar)[None], log_step, length)[0]

    def impulse_response(self, times: Float[Tensor, " time"]) -> Float[Tensor, "channel time"]:
        """The continuous kernel K(t) = 2 Re sum_n C_n B_n exp(t A_n) at ``times`` of x' = A x + B u; K_l ~ dt K(l dt)."""
        weights, A = self.output_weights * _complex(self.B), self.eigenvalues()
        powers = torch.exp(A[..., None] * torch.as_tensor(times).to(self.real))
        return torch.einsum("hn,hnt->ht", weights, powers).real

    def free_response(self, state: Tensor, length: int, rate: float = 1.0) -> Float[Tensor, "batch channel {length}"]:
        """What ``state`` (B, H, N/2) alone gives at the next steps: 2 Re sum_n C_n Abar_n^(l+1) x_n."""
        log_step, _ = self._discretize(rate, None)
        return _sum_powers(self.output_weights * log_step.exp() * state, log_step, length)

    def final_state(
        self, u: Float[Tensor, "batch channel length"], state: Tensor | None = None, rate: float = 1.0
    ) -> Complex[Tensor, "batch channel half"]:
        """The state after the inputs u (B, H, L): sum_l Abar^(L-1-l) Bbar u_l + Abar^L state, exactly."""
        log_step, Bbar = self._discretize(rate, None)
        found = Bbar * _gather_powers(u, log_step)
        return found if state is None else found + (log_step * u.shape[-1]).exp() * state

    def readout(self, state: Complex[Tensor, "batch channel half"]) -> Float[Tensor, "batch channel"]:
        """2 Re(C x)."""
        return (self.output_weights * state).real.sum(dim=-1)

    @property
    def output_weights(self) -> Complex[Tensor, "channel half"]:
        """2 C (H, N/2), the 2 standing for the conjugate halves (C of real states): y = Re(output_weights x)."""
        return _complex(self.C) * (1 if self.real_states else 2)

    def _discretize(self, rate: float, length: int | None) -> tuple[Tensor, Tensor]:
        """log Abar and Bbar."""
        if not 0 < rate < math.inf:
            raise InputError(f"rate must be a positive number, got {rate}")
        A, dt = self.eigenvalues(), (self.dt * rate)[:, None]
        z = dt * A
        if self.discretization == "bilinear":
            return _log_bilinear(z / 2), dt * _complex(self.B) / (1 - z / 2)
        Bbar = dt * _complex(self.B) * _expm1(z, over=True)
        if self.discretization == "dss":
            if length is None:
                raise InputError(
                    "discretization 'dss' divides by a sum over the whole length, so it has no recurrence and no state; "
                    "use 'zoh' to stream or to read in chunks"
                )
            Bbar = Bbar / _expm1(z * length)
        return z, Bbar


def _untransformed(real: Tensor, transform: str) -> Tensor:
    """The parameter that ``transform`` turns into ``real`` < 0."""
    if transform == "none":
        return real
    decay = -real
    if transform == "relu":
        return decay
    return decay.log() if transform == "exp" else decay + torch.log(-torch.expm1(-decay))


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2) pairs or (..., 1) reals as complex (...)."""
    if pairs.shape[-1] == 2:
        return torch.view_as_complex(pairs)
    return torch.complex(pairs[..., 0], torch.zeros_like(pairs[..., 0]))


def _expm1(z: Tensor, *, over: bool = False) -> Tensor:
    """exp(z) - 1, which torch has for reals only; ``over``: divided by z, with its limit at 0."""
    a, b = z.real, z.imag
    value = torch.complex(torch.expm1(a) * b.cos() - 2 * (b / 2).sin() ** 2, a.exp() * b.sin())
    if not over:
        return value
    small = z.abs() < _SMALL
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4))
    return torch.where(small, series, value / torch.where(small, 1, z))


def _log_bilinear(w: Tensor) -> Tensor:
    """log((1 + w) / (1 - w)), finite also where 1 + w is 0."""
    a, b = w.real, w.imag
    least = torch.finfo(a.dtype).eps - 1
    size = torch.log1p((4 * a / ((1 - a) ** 2 + b**2)).clamp(min=least)) / 2
    return torch.complex(size, torch.atan2(b, 1 + a) + torch.atan2(b, 1 - a))


def _tables(log_step: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real and imaginary parts of Abar^j (H, M, b), j < b, and of Abar^(ib) (H, M, a), a b >= length."""
    inner = 2 ** math.ceil(math.log2(length) / 2)
    steps = torch.arange(inner, device=log_step.device, dtype=log_step.real.dtype)
    jumps = torch.arange(-(-length // inner), device=log_step.device, dtype=log_step.real.dtype) * inner
    found = []
    for times in (steps, jumps):
        size, angle = (log_step.real[..., None] * times).exp(), log_step.imag[..., None] * times
        found += [size * angle.cos(), size * angle.sin()]
    return found[0], found[1], found[2], found[3]


def _sum_powers(weights: Tensor, log_step: Tensor, length: int) -> Tensor:
    """Re sum_n weights_n Abar_n^l (B, H, length) of weights (B, H, M)."""
    low_re, low_im, high_re, high_im = _tables(log_step, length)
    re, im = weights.real[..., None], weights.imag[..., None]
    high = torch.cat([re * high_re - im * high_im, -(re * high_im + im * high_re)], dim=-2)
    both = torch.einsum("bhni,hnj->bhij", high, torch.cat([low_re, low_im], dim=-2))
    return both.flatten(2)[..., :length]


def _gather_powers(u: Tensor, log_step: Tensor) -> Tensor:
    """sum_l Abar_n^(L-1-l) u_l (B, H, M) of u (B, H, L)."""
    low_re, low_im, high_re, high_im = _tables(log_step, u.shape[-1])
    blocks, inner = high_re.shape[-1], low_re.shape[-1]
    lack = blocks * inner - u.shape[-1]
    rows = (F.pad(u, (lack, 0)) if lack else u).unflatten(-1, (blocks, inner))
    within = torch.einsum("bhij,hnj->bhni", rows, torch.cat([low_re, low_im], dim=-2).flip(-1))
    re, im = within.chunk(2, dim=-2)
    high_re, high_im = high_re.flip(-1), high_im.flip(-1)
    return torch.complex((re * high_re - im * high_im).sum(-1), (re * high_im + im * high_re).sum(-1))


def _some(channels: list[int]) -> str:
    return ", ".join(map(str, channels[:10])) + (f" and {len(channels) - 10} more" if len(channels) > 10 else "")
