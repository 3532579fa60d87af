"""Claims of Gu et al., 2022, arXiv:2206.11893: closed forms, memory without training, digits as series, and the cost."""

__all__ = ["claims"]

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import signal
from scipy.linalg import block_diag
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from theodolite.core.estimate import Estimate, mean_of_runs
from theodolite.core.memory import peak_memory
from theodolite.core.parallel import one_thread, seeds_for, spread
from theodolite.core.train import accuracy
from theodolite.networks.diagonal_ssm import (
    INITS,
    S4D,
    DiagonalSSMKernel,
    S4DClassifier,
    initial_input,
    initial_spectrum,
    ssm_parameter_groups,
)
from theodolite.networks.hippo import basis, normal_plus_low_rank, weight
from theodolite.reproductions.claim import Claim, Comparator, Scale

_STRUCTURED = ("lin", "inv", "legs")
_LENGTH = 512
_BIN, _BINS = 0.1, 40
_WEAK = {16: 0.249, 64: 0.064, 256: 0.0085, 1024: 0.0010}
_DELAY, _CUT, _RIDGE = 200, 0.05, 1e-6
_SPANS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
_EPOCHS, _BATCH = 5, 16
_VARIANTS: dict[str, dict[str, Any]] = {
    "zero-order hold, exp, B fixed": {},
    "bilinear": {"discretization": "bilinear"},
    "softplus": {"real_transform": "softplus"},
    "B trained": {"train_B": True},
}
_DIGITS = (
    f"network of 2 layers, H 32, N 32, {_EPOCHS} epochs in batches of {_BATCH} with AdamW (0.01, dynamics 0.001, cosine) on "
    "scikit-learn's digits scaled to 16 x 16 and read as 256 pixels; intervals over seeds; no Long Range Arena"
)
_TRAINED = (
    "trained, all structured initialisations learn digits read pixel by pixel",
    "85.5 (S4D-Inv), 84.9 (LegS), 78.4 (Lin) on average in Long Range Arena",
    "test accuracy of lin, inv and legs >= 0.80 each",
)
_REAL = (
    "trained, every structured initialisation is far better than the real one",
    "Real fails the long tasks",
    "lin, inv and legs each at least 0.15 above real",
)
_ABLATED = (
    "discretisation, transform of Re A and training of B hardly matter once trained",
    "within about a point of each other",
    "accuracies within 0.05 of each other",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; the trained ones need minutes and are measured at full scale only."""
    yield from _one_model(seed)
    yield _weak_limit(scale)
    yield _normal_part()
    yield from _memory(scale, seed)
    yield from _trained(scale, seed)
    yield _cost(seed)


# ---- one model in three forms


def _one_model(seed: int) -> Iterator[Claim]:
    for dtype, name, bar in ((torch.float32, "float32", 1e-4), (torch.float64, "float64", 1e-10)):
        worst, steps = 0.0, 0.0
        for init in INITS:
            layer = S4D(2, init=init, seed=seed).double()
            u = torch.randn(1, _LENGTH, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            wanted = _by_scipy(layer, u[0].numpy())
            layer, u = layer.to(dtype), u.to(dtype)
            with torch.no_grad():
                y = layer(u)[0]
                state, outputs = layer.initial_state(1), []
                for sample in u.unbind(dim=1):
                    out, state = layer.step(sample, state)
                    outputs.append(out)
            steps = max(steps, float((torch.stack(outputs, dim=1) - y).abs().max()))
            worst = max(worst, steps, float(np.abs(y[0].double().numpy() - wanted).max()))
        yield Claim(
            f"convolution, recurrence and dense state space model are one function ({name})", "exact", Estimate.exact(worst),
            f"largest difference <= {bar:g}", worst <= bar,
            Comparator("largest difference of convolution and recurrence", steps),
            f"all {len(INITS)} initialisations, N 64, {_LENGTH} random inputs; against scipy.signal.cont2discrete and dlsim",
        )  # fmt: skip


def _by_scipy(layer: S4D, u: np.ndarray) -> np.ndarray:
    """Outputs (L, H) for one series (L, H), with a dense real 2 x 2 block for each conjugate pair."""
    out = np.empty(u.shape)
    kernel = layer.kernel
    with torch.no_grad():
        parts: list[Any] = [
            v.numpy() for v in (kernel.eigenvalues(), torch.view_as_complex(kernel.B), kernel.output_weights)
        ]
        D, dt = layer.D.numpy(), kernel.dt.tolist()
    for h in range(u.shape[1]):
        a, b, c = parts[0][h], parts[1][h], parts[2][h]
        A = block_diag(*[np.array([[z.real, -z.imag], [z.imag, z.real]]) for z in a])
        B, C = np.stack([b.real, b.imag], axis=1).reshape(-1, 1), np.stack([c.real, -c.imag], axis=1).reshape(1, -1)
        discrete: Any = signal.cont2discrete((A, B, C, np.array([[D[h]]])), dt[h])
        Abar, Bbar = discrete[:2]
        # scipy reads the state before the sample is in, the layer after: hence C Abar and C Bbar + D
        out[:, h] = signal.dlsim((Abar, Bbar, C @ Abar, C @ Bbar + D[h], dt[h]), u[:, h])[1][:, 0]
    return out


# ---- the closed forms


def _legs_in_bins(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the first six kernels in bins and of the first pointwise, both relative in L2, on [0, 4]."""
    found = normal_plus_low_rank("legs", size)
    V, A, B = found.V[:6, size // 2 :], initial_spectrum("legs", size), initial_input("legs", size)
    edges = np.arange(_BINS + 1) * _BIN
    integral = np.exp(np.outer(A, edges)) / A[:, None]
    ours = 2 * np.real((V * B) @ np.diff(integral, axis=1)) / _BIN
    nodes, weights = np.polynomial.legendre.leggauss(16)
    times = (edges[:-1, None] + _BIN * (nodes + 1) / 2).ravel()
    exact = basis("legs", 6, times) * weight("legs", times)[:, None]
    wanted = (exact.reshape(_BINS, 16, 6) * weights[:, None] / 2).sum(axis=1).T
    in_bins = np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    fine = np.arange(20_000) * (_BIN * _BINS / 20_000)
    kernel = np.zeros(len(fine))
    for v, a, b in zip(V[0], A, B, strict=True):
        kernel += 2 * np.real(v * b * np.exp(fine * a))
    pointwise = np.linalg.norm(kernel - np.exp(-fine)) / np.linalg.norm(np.exp(-fine))
    return in_bins, np.array(pointwise)


def _weak_limit(scale: Scale) -> Claim:
    sizes = [size for size in _WEAK if scale is Scale.FULL or size <= 256]
    found = {size: _legs_in_bins(size) for size in sizes}
    first = [float(found[size][0][0]) for size in sizes]
    within = all(abs(error / _WEAK[size] - 1) <= 0.2 for size, error in zip(sizes, first, strict=True))
    least = min(float(found[size][1]) for size in sizes)
    told = ", ".join(f"N {size}: {error:.2g}" for size, error in zip(sizes, first, strict=True))
    others = "; ".join(f"n = {n}: " + ", ".join(f"{found[size][0][n]:.2g}" for size in sizes) for n in range(1, 6))
    return Claim(
        "the diagonal part of LegS gives the kernels of LegS as N grows, in the mean over bins and not pointwise",
        "exact in the limit", Estimate.exact(first[-1], "relative L2, largest N"),
        "kernel 0 in bins: " + ", ".join(f"{_WEAK[size]:g}" for size in sizes)
        + " within 20 % and falling; pointwise above 0.5",
        within and first == sorted(first, reverse=True) and least > 0.5,
        Comparator("least pointwise error of kernel 0", least),
        f"{told} on [0, 4] in bins of {_BIN}; {others}" + ("" if scale is Scale.FULL else "; N 1,024 at full scale only"),
    )  # fmt: skip


def _normal_part() -> Claim:
    largest, real = [], []
    for size in (64, 256):
        found = initial_spectrum("legs", size)
        largest.append(abs(float(np.imag(found).max()) / (size**2 / math.pi) - 1))
        real.append(float(np.abs(np.real(found) + 0.5).max()))
    worst = max(largest)
    return Claim(
        "the normal part of LegS has real parts -1/2 and a largest frequency of N^2/pi", "as stated",
        Estimate.exact(worst, "relative"), "largest frequency within 0.1 %, real parts within 1e-10",
        worst <= 1e-3 and max(real) <= 1e-10, Comparator("largest distance of a real part to -1/2", max(real)),
        "N 64 and 256",
    )  # fmt: skip


# ---- memory without training


def _band_limited(n: int, seed: int) -> np.ndarray:
    """Noise without the frequencies above the cut (cycles a step), of variance 1."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    spectrum[np.fft.rfftfreq(n) > _CUT] = 0
    u = np.fft.irfft(spectrum, n)
    return u / u.std()


def _recall_error(init: str, seed: int) -> float:
    """Test RMSE, in units of the signal's deviation, of a ridge readout of 64 frozen states for the input 200 steps ago.

    The span of time is chosen on rows between those that fit and those that report.
    """
    n, drop, fit, chosen = 12_000, 2_000, 5_000, 7_500
    u = _band_limited(n, seed)
    kernel = DiagonalSSMKernel(len(_SPANS), 64, init, real_states=init == "real", seed=seed).double()
    with torch.no_grad():
        kernel.log_dt.copy_((torch.tensor(_SPANS, dtype=torch.float64) / _DELAY).log())
        kernel.imag.copy_(kernel.imag[:1].expand_as(kernel.imag))  # random: the same draw at every span
        Abar, Bbar = (value.numpy() for value in kernel.discretize())
    y = u[drop - _DELAY : n - _DELAY]
    errors = []
    for poles, inputs in zip(Abar, Bbar, strict=True):
        x = np.stack(
            [signal.lfilter([b], [1, -a], u.astype(complex))[drop:] for a, b in zip(poles, inputs, strict=True)], 1
        )
        states = np.real(x) if init == "real" else np.concatenate([np.real(x), np.imag(x)], axis=1)
        states = states / np.maximum(states[:fit].std(axis=0), 1e-300)
        gram = states[:fit].T @ states[:fit] / fit
        w = np.linalg.solve(gram + _RIDGE * np.eye(len(gram)), states[:fit].T @ y[:fit] / fit)
        off = states @ w - y
        errors.append(
            [np.sqrt((off[rows] ** 2).mean()) / y[rows].std() for rows in (slice(fit, chosen), slice(chosen, None))]
        )
    select, report = np.array(errors).T
    return float(report[select.argmin()])


def _memory(scale: Scale, seed: int) -> Iterator[Claim]:
    seeds = seeds_for(seed, 3 if scale is Scale.QUICK else 10)
    errors = {
        init: mean_of_runs([_recall_error(init, s) for s in seeds], unit="of the deviation", within=(0, math.inf))
        for init in (*_STRUCTURED, "real", "random")
    }
    setting = (
        f"band-limited noise (cut {_CUT} cycles a step), delay {_DELAY}, 64 frozen states, ridge {_RIDGE:g}; time span chosen on "
        f"rows of its own; intervals over {len(seeds)} draws; root mean squared errors: "
        + ", ".join(f"{init} {error.value:.3f}" for init, error in errors.items())
    )
    worst = max((errors[init] for init in _STRUCTURED), key=lambda one: one.value)
    yield Claim(
        "frozen states of every structured initialisation remember 200 steps", "none given", worst,
        "error of lin, inv and legs <= 0.45 each", worst.value <= 0.45,
        Comparator("S4D-Real, as many states", errors["real"].value), f"{setting}; measured: the worst of the three",
    )  # fmt: skip
    for init, bar, words in (("real", 0.85, "real eigenvalues"), ("random", 0.55, "random frequencies")):
        yield Claim(
            f"frozen states with {words} do not remember 200 steps", "such models fail or fall behind when trained",
            errors[init], f"error >= {bar}", errors[init].value >= bar,
            Comparator("the worst structured initialisation", worst.value), setting,
        )  # fmt: skip


# ---- trained on digits, pixel by pixel


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised series (n, 256, 1) and classes to train on, then to test on."""
    bunch: Any = load_digits()
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None], size=(16, 16), mode="nearest")
    x, y = images.reshape(-1, 256, 1), torch.from_numpy(bunch.target)
    fit, test = train_test_split(np.arange(len(y)), test_size=0.2, stratify=bunch.target, random_state=seed)
    x = (x - x[fit].mean()) / x[fit].std()
    return x[fit], y[fit], x[test], y[test]


def _trained_accuracy(seed: int, **options: Any) -> float:
    x, y, x_test, y_test = _digits(seed)
    network = S4DClassifier(1, 10, d_model=32, n_state=32, n_layers=2, seed=seed, **options)
    optimizer = torch.optim.AdamW(ssm_parameter_groups(network, lr=1e-2))
    order = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * math.ceil(len(x) / _BATCH))
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(x), generator=order).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return accuracy(network, x_test, y_test)


def _trained(scale: Scale, seed: int) -> Iterator[Claim]:
    if scale is Scale.QUICK:
        for claim, paper, threshold in (_TRAINED, _REAL, _ABLATED):
            yield Claim(
                claim, paper, None, threshold, None, scaled="several minutes of training: measured at full scale only"
            )
        return
    seeds = seeds_for(seed, 3)

    def runs(**options: Any) -> Estimate:
        return mean_of_runs([_trained_accuracy(s, **options) for s in seeds], unit="accuracy", within=(0, 1))

    with one_thread():
        by_init = {init: runs(init=init) for init in (*_STRUCTURED, "real")}
        by_variant = {name: runs(**options) if options else by_init["lin"] for name, options in _VARIANTS.items()}
    real = by_init["real"]
    worst = min((by_init[init] for init in _STRUCTURED), key=lambda one: one.value)
    setting = f"{_DIGITS}; " + ", ".join(f"{init} {found.value:.3f}" for init, found in by_init.items())
    yield Claim(
        *_TRAINED[:2], worst, _TRAINED[2], worst.value >= 0.8, Comparator("S4D-Real, same budget", real.value),
        f"{setting}; measured: the worst of the three",
    )  # fmt: skip
    yield Claim(
        *_REAL[:2], Estimate.exact(worst.value - real.value, "accuracy"), _REAL[2], worst.value - real.value >= 0.15,
        Comparator("S4D-Real, same budget", real.value), f"{setting}; measured: the worst of the three less real",
    )  # fmt: skip
    means = [found.value for found in by_variant.values()]
    yield Claim(
        *_ABLATED[:2], Estimate.exact(max(means) - min(means), "accuracy"), _ABLATED[2], max(means) - min(means) <= 0.05,
        Comparator("accuracy of the default", means[0]),
        f"{_DIGITS}; S4D-Lin; " + ", ".join(f"{name} {found.value:.3f}" for name, found in by_variant.items()),
    )  # fmt: skip


# ---- the cost of a kernel


def _direct(kernel: DiagonalSSMKernel, length: int) -> Tensor:
    """The formula as it stands: one exponential for each channel, state and step."""
    _, Bbar = kernel.discretize()
    steps = torch.arange(length) * kernel.dt[:, None]
    table = torch.exp(kernel.eigenvalues()[..., None] * steps[:, None])
    return torch.einsum("hn,hnl->hl", kernel.output_weights * Bbar, table).real


def _seconds(call: Callable[[], Tensor]) -> float:
    """Processor time of forward and backward: the least of three after one to warm up."""
    found = []
    for _ in range(4):
        began = time.thread_time()
        call().square().sum().backward()
        found.append(time.thread_time() - began)
    return min(found[1:])


def _peak_bytes(seed: int) -> int | None:
    """The most that one forward and backward of the kernel takes, after a small one has loaded what is loaded once."""
    kernel = DiagonalSSMKernel(64, 64, seed=seed)
    kernel(16).square().sum().backward()
    with one_thread(), peak_memory() as peak:
        kernel(4096).square().sum().backward()
    return peak.bytes


def _cost(seed: int) -> Claim:
    # in a process of its own: here what earlier claims gave back would be used again and not be seen
    (used,) = spread(_peak_bytes, [(seed,)], executor=1)
    kernel = DiagonalSSMKernel(64, 64, seed=seed)
    with one_thread():
        ours, direct = _seconds(lambda: kernel(4096)), _seconds(lambda: _direct(kernel, 4096))
    with torch.no_grad():
        ours_values, direct_values = kernel(4096), _direct(kernel, 4096)
        off = float((ours_values - direct_values).abs().max() / direct_values.abs().max())
    return Claim(
        "the kernel costs little: two tables of sqrt(L) powers instead of L",
        "two lines of code, linear cost in theory", Estimate.exact(direct / ours, "times as fast"),
        ">= 8 times as fast as the direct formula, < 64 MB more at the peak",
        direct / ours >= 8 and (used is None or used < 64e6), Comparator("milliseconds of the direct formula", 1000 * direct),
        f"forward and backward, H 64, N 64, L 4,096, one core, processor time; relative difference {off:.1e}; "
        + ("peak memory is not told by this system" if used is None else f"{used / 1e6:.1f} MB more at the peak")
        + "; the direct formula's table alone takes 67 MB",
    )  # fmt: skip
