"""The kernel of S4: a diagonal plus low-rank state matrix, its transfer function at the nodes of a Fourier transform."""

__all__ = ["S4Kernel", "Stepper"]

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy.fft import next_fast_len
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.networks.hippo.matrices import check_measure, normal_plus_low_rank

_TABLE = 64 << 20
"""Bytes of the table of 1 / (z - Lambda) and its like up to which it is kept whole for the gradients."""
_PART = 8 << 20
"""Bytes of it that exist at a time where it is larger; more of them take longer, since they leave the processor's cache."""
_BLOCK = 32


class Stepper(NamedTuple):
    """What one step of the recurrence needs, (H, N/2) unless said: Abar = D' (2/dt + A), Bbar = 2 D' B with
    D' = (2/dt - A)^-1 = D - D P (1 + P* D P)^-1 P* D."""

    Lambda: Tensor
    P: Tensor  # (H, r, N/2)
    B: Tensor
    D: Tensor
    inner: Tensor  # (1 + P* D P)^-1 (H, r, r)
    twice: Tensor  # 2/dt (H, 1)
    C: Tensor

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """C x (B, H) and x = Abar state + Bbar u (B, H, N/2), O(N) a channel."""
        x = (self.twice + self.Lambda) * state - _low_rank(self.P, self.P, state) + 2 * self.B * u[..., None]
        x = self.D * x
        projected = torch.einsum("hij,bhj->bhi", self.inner, _inner(self.P, x))
        x = x - self.D * torch.einsum("bhr,hrn->bhn", projected.to(x.dtype), self.P)
        return 2 * (self.C * x).real.sum(dim=-1), x


class S4Kernel(nn.Module):
    """K_l = C Abar^l Bbar of H channels, A = Lambda - P P* with N/2 conjugate pairs, by the bilinear rule with step dt.

        Khat_k = R(C~, B) - Y R(C~, P) (1 + Y R(P*, P))^-1 R(P*, B),   R(a, b)_k = sum_n a_n b_n / (X - Y Lambda_n)
        X = (1 - w)/dt,  Y = (1 + w)/2,  w_k = rho e^(-2 pi i k/M),  C~ = C (1 - rho^M Abar^M),  K_l = rho^-l ifft(Khat)_l

    This is the paper's Cauchy sum with z = X / Y, multiplied through by Y so that w = -1 is no special case, and with nodes
    on a circle of radius rho = e^(-1/M): on the unit circle itself the eigenvalues of legt and fout, which are imaginary,
    are poles. All sums take both halves of the pairs together, (2 Re(v) X - 2 Re(v conj(Lambda)) Y) over a denominator with
    real coefficients, at half of the nodes, in one table of at most 64 MB or, where that is not enough, in parts of 8 MB that
    are computed again for the gradients (which then have no gradients of their own).

    Parameters: log_dt (H,), real and imag of Lambda (H, N/2; a positive real part counts as 0), P (H, r, N/2, 2),
    B and C (H, N/2, 2) as pairs. C holds C~ for the M >= l_max nodes that the buffer ``nodes`` tells (0: plain C until the
    first call), so that training needs no power of Abar. `ssm_parameters` names those that want their own step size and no
    weight decay.

    Source: Gu, Goel, Re, 2021, arXiv:2111.00396, section 3 and appendix C; initialised as Gu et al., 2022, arXiv:2206.12037.
    """

    ssm_parameters: ClassVar[tuple[str, ...]] = ("log_dt", "real", "imag", "P", "B")
    nodes: Tensor

    def __init__(
        self,
        d_model: int,
        n_state: int = 64,
        measure: str = "legs",
        rank: int | None = None,
        l_max: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        *,
        normalize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_measure(measure, n_state)
        if n_state % 2:
            raise InputError(f"n_state counts conjugate pairs, so it must be even, got {n_state}")
        if d_model < 1 or (l_max is not None and l_max < 1):
            raise InputError(f"d_model and l_max must be at least 1, got {d_model} and {l_max}")
        if not 0 < dt_min < dt_max < math.inf:
            raise InputError(f"need 0 < dt_min < dt_max, got {dt_min} and {dt_max}")
        found = normal_plus_low_rank(measure, n_state)
        own = len(found.P)
        if rank is not None and rank < own:
            raise InputError(f"{measure} needs a correction of rank {own}, got rank {rank}")
        self.d_model, self.n_state, self.measure, self.l_max = d_model, n_state, measure, l_max
        upper = slice(n_state // 2, None)
        eigenvalues, P, B = found.eigenvalues[upper], found.P[:, upper], found.B[upper]
        if normalize:
            if not np.abs(eigenvalues).min() > 0:
                raise InputError(f"normalize divides by the eigenvalues, and {measure} has one that is 0")
            B = B / np.sqrt((2 * np.abs(B / eigenvalues) ** 2).sum())
        dtype = torch.get_default_dtype()
        more = torch.randn((rank or own) - own, n_state // 2, 2, dtype=dtype, generator=generator)
        # a row of P that starts at exactly 0 would have no gradient
        pairs = torch.cat([_pairs(P, dtype), 1e-5 * more])
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(d_model, dtype=dtype, generator=generator))
        self.real = nn.Parameter(torch.tensor(np.real(eigenvalues), dtype=dtype).repeat(d_model, 1))
        self.imag = nn.Parameter(torch.tensor(np.imag(eigenvalues), dtype=dtype).repeat(d_model, 1))
        self.P = nn.Parameter(pairs.repeat(d_model, 1, 1, 1))
        self.B = nn.Parameter(_pairs(B, dtype).repeat(d_model, 1, 1))
        self.C = nn.Parameter(torch.randn(d_model, n_state // 2, 2, dtype=dtype, generator=generator) * math.sqrt(0.5))
        self.register_buffer("nodes", torch.tensor(0))
        self._steps: tuple[tuple, Stepper] | None = None
        if l_max is not None:
            self._span(l_max)

    @property
    def dt(self) -> Float[Tensor, " channel"]:
        """The time step of each channel."""
        return self.log_dt.exp()

    def forward(self, length: int) -> Float[Tensor, "channel {length}"]:
        """K (H, length). Raises InputError for a length below 1 or, where l_max was given, above it."""
        if length < 1:
            raise InputError(f"a kernel needs a length of at least 1, got {length}")
        if self.l_max is not None and length > self.l_max:
            raise InputError(
                f"a length of {length} exceeds l_max = {self.l_max}; build the layer with a larger l_max, or None"
            )
        if length > int(self.nodes):
            self._span(length)
        count = int(self.nodes)
        angle = torch.arange(count // 2 + 1, dtype=torch.float64, device=self.C.device) * (2 * math.pi / count)
        w = torch.polar(torch.full_like(angle, math.exp(-1 / count)), -angle)
        kind = self.C.dtype.to_complex()
        # products of both halves at once: sum_n v/(X - Y L) + conj = (2 Re(v) X - 2 Re(v conj(L)) Y) / den
        Lambda, P = self._lambda(), torch.view_as_complex(self.P)
        left = torch.cat([torch.view_as_complex(self.C)[:, None], P.conj()], dim=1)
        right = torch.cat([torch.view_as_complex(self.B)[:, None], P], dim=1)
        v = (left[:, :, None] * right[:, None]).flatten(1, 2)
        weights = 2 * torch.cat([v.real, (v * Lambda.conj()[:, None]).real], dim=1)
        X, Y = (1 - w).to(kind) / self.dt[:, None], ((1 + w) / 2).to(kind)
        row_bytes = 4 * self.d_model * self.n_state // 2 * self.C.element_size() * 2
        if row_bytes * len(w) > _TABLE:
            parts = list(chunks(len(w), row_bytes, _PART))
            found: Tensor = _InParts.apply(X, Y, Lambda, weights, parts)  # pyright: ignore[reportAssignmentType]
        else:
            found = _transfer(X, Y, Lambda, weights)
        grow = torch.exp(torch.arange(length, device=self.C.device, dtype=self.C.dtype) / count)
        return torch.fft.irfft(found, n=count)[:, :length] * grow

    def dense(self) -> tuple[Float[Tensor, "channel n n"], Float[Tensor, "channel n"], Float[Tensor, "channel n"]]:
        """Abar, Bbar and the plain C of each channel as real float64 matrices in the coordinates (Re x, Im x)."""
        Abar, Bbar = self._bilinear()
        return Abar, Bbar, 2 * self._plain_row(Abar)

    def carry(
        self, u: Float[Tensor, "batch channel length"], state: Complex[Tensor, "batch channel half"] | None
    ) -> tuple[Float[Tensor, "batch channel length"] | None, Complex[Tensor, "batch channel half"]]:
        """What ``state`` alone adds to the outputs (None without one), and the state after u; in float64, block by block."""
        Abar, Bbar = self._bilinear()
        length = u.shape[-1]
        block = min(_BLOCK, length)
        sizes = [size for size in (length % block, *[block] * (length // block)) if size]
        jumps = {size: torch.linalg.matrix_power(Abar, size) for size in set(sizes)}
        drive = [Bbar]
        for _ in range(1, block):
            drive.append((Abar @ drive[-1][..., None])[..., 0])
        driven, x, start = torch.stack(drive[::-1], dim=1), Abar.new_zeros(*u.shape[:2], self.n_state), 0
        for size in sizes:
            local = torch.einsum("bhl,hln->bhn", u[..., start : start + size].to(Abar.dtype), driven[:, block - size :])
            x = torch.einsum("bhn,hmn->bhm", x, jumps[size]) + local
            start += size
        if state is None:
            return None, self._halves(x)
        rows = [2 * self._plain_row(Abar)[:, None] @ Abar]
        for _ in range(1, block):
            rows.append(rows[-1] @ Abar)
        read, left, free = torch.cat(rows, dim=1), torch.cat([state.real, state.imag], dim=-1).to(Abar.dtype), []
        for size in sizes:
            free.append(torch.einsum("bhn,hln->bhl", left, read[:, :size]))
            left = torch.einsum("bhn,hmn->bhm", left, jumps[size])
        return torch.cat(free, dim=-1).to(u.dtype), self._halves(x + left)

    def step(
        self, u: Float[Tensor, "batch channel"], state: Complex[Tensor, "batch channel half"]
    ) -> tuple[Float[Tensor, "batch channel"], Complex[Tensor, "batch channel half"]]:
        """C x and x = Abar state + Bbar u, O(N) a channel."""
        return self.stepper().step(u, state)

    def stepper(self) -> Stepper:
        """The weights of a step: prepared anew where they changed, or for gradients."""
        key = tuple((p.data_ptr(), p._version, p.dtype) for p in (*self.parameters(), self.nodes))
        fresh = torch.is_grad_enabled()
        if not fresh and self._steps is not None and self._steps[0] == key:
            return self._steps[1]
        Lambda, P, B = self._lambda(), torch.view_as_complex(self.P), torch.view_as_complex(self.B)
        twice = 2 / self.dt[:, None]
        D = 1 / (twice - Lambda)
        eye = torch.eye(P.shape[1], dtype=self.C.dtype, device=self.C.device)
        inner = torch.linalg.inv(eye + 2 * torch.einsum("hin,hn,hjn->hij", P.conj(), D, P).real)
        row = self._plain_row(self._bilinear()[0]).to(self.C.dtype)
        half = self.n_state // 2
        found = Stepper(Lambda, P, B, D, inner, twice, torch.complex(row[:, :half], -row[:, half:]))
        if not fresh:
            self._steps = (key, found)
        return found

    def _halves(self, x: Tensor) -> Tensor:
        half = self.n_state // 2
        return torch.complex(x[..., :half], x[..., half:]).to(self.C.dtype.to_complex())

    def _lambda(self) -> Complex[Tensor, "channel half"]:
        return torch.complex(self.real.clamp(max=0), self.imag)

    def _bilinear(self) -> tuple[Tensor, Tensor]:
        real, imag = torch.diag_embed(self.real.clamp(max=0).double()), torch.diag_embed(self.imag.double())
        A = torch.cat([torch.cat([real, -imag], dim=2), torch.cat([imag, real], dim=2)], dim=1)
        P = self.P.double().transpose(2, 3).flatten(2)
        A = A - 2 * P.transpose(1, 2) @ P
        B = self.B.double().transpose(1, 2).flatten(1)
        dt = self.dt.double()[:, None, None]
        eye = torch.eye(self.n_state, dtype=torch.float64, device=A.device)
        both = torch.linalg.solve(eye - dt / 2 * A, torch.cat([eye + dt / 2 * A, dt * B[..., None]], dim=2))
        return both[..., :-1], both[..., -1]

    def _plain_row(self, Abar: Tensor) -> Tensor:
        """(Re C, -Im C) (H, N) of the plain C, from C~."""
        row = torch.cat([self.C[..., 0], -self.C[..., 1]], dim=1).double()
        count = int(self.nodes)
        return row if count == 0 else torch.linalg.solve(_wrap(Abar, count), row[:, None], left=False)[:, 0]

    def _span(self, length: int) -> None:
        """Let C~ stand for enough nodes for ``length``, with the same plain C."""
        count = int(next_fast_len(length, real=True) or length)
        with torch.no_grad():
            Abar, _ = self._bilinear()
            row = (self._plain_row(Abar)[:, None] @ _wrap(Abar, count))[:, 0]
            half = self.n_state // 2
            self.C.copy_(torch.stack([row[:, :half], -row[:, half:]], dim=-1))
            self.nodes.fill_(count)


def _pairs(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.stack([np.real(values), np.imag(values)], axis=-1), dtype=dtype)


def _wrap(Abar: Tensor, count: int) -> Tensor:
    """1 - rho^M Abar^M: what turns C into C~."""
    eye = torch.eye(Abar.shape[-1], dtype=Abar.dtype, device=Abar.device)
    return eye - math.exp(-1) * torch.linalg.matrix_power(Abar, count)


def _inner(P: Tensor, x: Tensor) -> Tensor:
    """P* x over both halves (B, H, r), real."""
    return 2 * torch.einsum("hrn,bhn->bhr", P.conj(), x).real


def _low_rank(P: Tensor, Q: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bhr,hrn->bhn", _inner(Q, x).to(x.dtype), P)


def _transfer(X: Tensor, Y: Tensor, Lambda: Tensor, weights: Tensor) -> Tensor:
    """Khat (H, K) from X (H, K), Y (K,), Lambda (H, N/2) and the products' weights (H, 2 (1 + r)^2, N/2)."""
    x, low = X[:, None], Lambda[..., None]
    table = torch.view_as_real(1 / ((x - Y * low) * (x - Y * low.conj()))).flatten(2)
    sums = torch.view_as_complex((weights @ table).unflatten(2, (-1, 2)))
    first, second = sums.chunk(2, dim=1)
    size = math.isqrt(first.shape[1])
    R = (x * first - Y * second).unflatten(1, (size, size))
    # C (..)^-1 B by elimination of the low-rank rows; their pivots have real parts of at least 1
    G = {(i, j): R[:, i, j] * (Y if j else 1) + (1 if i == j and i else 0) for i in range(size) for j in range(size)}
    for p in range(size - 1, 0, -1):
        for i in range(p):
            factor = G[i, p] / G[p, p]
            for j in range(p):
                G[i, j] = G[i, j] - factor * G[p, j]
    return G[0, 0]


class _InParts(torch.autograd.Function):
    """`_transfer` for some nodes at a time, computed again for the gradients; a part leaves nothing in memory but its answer."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor, Lambda: Tensor, weights: Tensor, parts: list[slice]) -> Tensor:
        ctx.save_for_backward(X, Y, Lambda, weights)
        ctx.parts = parts
        found = torch.empty_like(X)
        for k in parts:
            found[:, k] = _transfer(X[:, k], Y[k], Lambda, weights)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        X, Y, *shared = ctx.saved_tensors
        by_X, by_shared = torch.empty_like(X), [torch.zeros_like(one) for one in shared]
        for k in ctx.parts:
            given = [one.detach().requires_grad_() for one in (X[:, k], *shared)]
            with torch.enable_grad():
                found = _transfer(given[0], Y[k], given[1], given[2])
            by_X[:, k], *more = torch.autograd.grad(found, given, grad[:, k])
            for total, one in zip(by_shared, more, strict=True):
                total += one
        return by_X, None, *by_shared, None
