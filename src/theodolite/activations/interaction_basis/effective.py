"""Effective parameters: how fast the volume of weights that behave alike shrinks with the difference that is allowed.

N_eff(eps) = 2 lambda_B(eps),   lambda_B(eps) = d log V(eps) / d log eps,   V(eps) = volume of {w: L_B(w) < eps}
"""

__all__ = ["ConvergenceWarning", "EffectiveParameters", "effective_parameters"]

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from theodolite.activations.interaction_basis.behaviour import Behaviour
from theodolite.core.errors import InputError
from theodolite.core.view import evaluation_mode

_STEPS = (1e-4, 3e-5, 1e-5)
_WORST_R_HAT = 1.1
_MOST_VOLUME = 12
_FEWEST_HITS = 50


class ConvergenceWarning(UserWarning):
    """The chains of the sampler do not agree; the number is not to be trusted."""


@dataclass(frozen=True, eq=False)
class EffectiveParameters:
    """N_eff beside the plain count of parameters.

    value: N_eff at the first eps. per_eps: at every eps ("sgld" has no eps: the key is the mean loss it measured at).
    parameters: P. diagnostics: of "hessian" the eigenvalues and the radius; of "sgld" r-hat, the spread over chains, the
    step taken, every step tried, the loss trace (chains, draws) and the share that the localisation takes; of "volume" the
    hits and standard error at each eps.
    """

    value: float
    per_eps: dict[float, float]
    method: str
    parameters: int
    diagnostics: dict[str, Any] = field(default_factory=dict)


def effective_parameters(
    model: nn.Module,
    X: Any,
    *,
    eps: float | Sequence[float] | None,
    params: Iterable[str] | None = None,
    method: str = "hessian",
    radius: float | None = None,
    step: float | None = None,
    localisation: float = 100.0,
    burn_in: int = 200,
    draws: int = 800,
    chains: int = 4,
    batch_size: int | None = None,
    samples: int = 400_000,
    memory: int | None = None,
    seed: int = 0,
) -> EffectiveParameters:
    """Number of parameters that the network's behaviour on ``X`` depends on, when it may change by ``eps``.

    params: names of the parameters that are probed (all trainable where None), P weights w*.
    method "hessian": eigenvalues h with h R^2 / 2 > eps, R = ``radius`` (Frobenius norm of the probed weights where None).
    "sgld": 2 n beta (mean of L_B over draws), beta = 1 / log n, drawn near exp(-n beta L_B - localisation/2 |w - w*|^2) by
    Langevin steps (``chains`` at once, gradient of all rows or of ``batch_size``); eps is not used. With step None the
    largest of 1e-4, 3e-5, 1e-5 whose chains agree (r-hat <= 1.1) is taken, and ConvergenceWarning says when none does.
    Directions whose n beta h is not far above ``localisation`` count only in part: give more rows, or lower it.
    "volume": slope of log V between eps/2 and 2 eps from ``samples`` uniform points of the ball of ``radius``; P <= 12.

    At a regular minimum all three tend to the rank of the Hessian.

    Raises InputError for settings that mean nothing, more than 12 parameters with "volume", or an eps that too few
    samples reach.

    Source: Bushnaq et al., 2024, arXiv:2405.10927; Lau et al., 2023, arXiv:2308.12108 (sampling).

    >>> net = nn.Linear(3, 1, bias=False)
    >>> effective_parameters(net, torch.eye(3), eps=1e-6).value
    3.0
    """
    levels = [] if eps is None else [float(e) for e in (eps if isinstance(eps, Sequence) else [eps])]
    if method not in ("hessian", "sgld", "volume"):
        raise InputError(f"method must be 'hessian', 'sgld' or 'volume', got {method!r}")
    if any(not (math.isfinite(e) and e > 0) for e in levels) or (not levels and method != "sgld"):
        raise InputError(f"eps must be one or more numbers above 0, got {eps!r}")
    if radius is not None and not radius > 0:
        raise InputError(f"radius must be above 0, got {radius}")
    behaviour = Behaviour(model, X, params, memory=memory)
    radius = float(behaviour.center.double().norm()) if radius is None else float(radius)
    if method == "hessian":
        return _from_hessian(behaviour, levels, radius)
    if method == "volume":
        return _from_volume(behaviour, levels, radius, samples, seed)
    if not localisation > 0 or (step is not None and not step > 0) or min(burn_in, draws - 3, chains - 1) < 1:
        raise InputError("need localisation > 0, step > 0, burn_in >= 1, draws >= 4 and at least two chains to compare")
    return _from_sampling(
        behaviour, _STEPS if step is None else (step,), localisation, burn_in, draws, chains, batch_size, seed
    )


# ---- Hessian


def _from_hessian(behaviour: Behaviour, levels: list[float], radius: float) -> EffectiveParameters:
    eigenvalues = torch.linalg.eigvalsh(behaviour.hessian()).flip(0)
    counts = {eps: float((0.5 * eigenvalues * radius**2 > eps).sum()) for eps in levels}
    about = {"eigenvalues": eigenvalues, "radius": radius}
    return EffectiveParameters(counts[levels[0]], counts, "hessian", len(behaviour.center), about)


# ---- volume


def _from_volume(
    behaviour: Behaviour, levels: list[float], radius: float, samples: int, seed: int
) -> EffectiveParameters:
    P = len(behaviour.center)
    if P > _MOST_VOLUME:
        raise InputError(f"'volume' needs at most {_MOST_VOLUME} parameters, got {P}; use 'hessian' or 'sgld'")
    if radius == 0:
        raise InputError("all probed weights are 0, so their norm gives no radius; pass radius=")
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for start in range(0, samples, 100_000):
        many = min(100_000, samples - start)
        direction = torch.randn(many, P, generator=generator, dtype=torch.float64)
        length = torch.rand(many, 1, generator=generator, dtype=torch.float64) ** (1 / P) * radius
        points = direction / direction.norm(dim=1, keepdim=True) * length
        losses.append(behaviour.losses(behaviour.center + points.to(behaviour.center)).double().cpu())
    loss = torch.cat(losses)
    slopes, hits, errors = {}, {}, {}
    for eps in levels:
        below, above = int((loss < eps / 2).sum()), int((loss < 2 * eps).sum())
        if below < _FEWEST_HITS:
            raise InputError(
                f"only {below} of {samples} points of the ball of radius {radius:.3g} have a loss below {eps / 2:.3g}; "
                f"take eps >= {2 * float(loss.sort().values[min(_FEWEST_HITS, samples - 1)]):.2g}, a smaller radius or "
                "more samples"
            )
        slopes[eps] = 2 * math.log(above / below) / math.log(4)
        hits[eps] = (below, above)
        errors[eps] = 2 * math.sqrt(1 / below - 1 / above) / math.log(4) if above > below else 0.0
    about = {"hits": hits, "standard_error": errors, "radius": radius, "samples": samples}
    return EffectiveParameters(slopes[levels[0]], slopes, "volume", P, about)


# ---- sampling


def _from_sampling(
    behaviour: Behaviour,
    steps: Sequence[float],
    localisation: float,
    burn_in: int,
    draws: int,
    chains: int,
    batch_size: int | None,
    seed: int,
) -> EffectiveParameters:
    n = len(behaviour.x)
    if n < 3:
        raise InputError(f"'sgld' needs at least 3 rows for beta = 1 / log n, got {n}")
    heat = n / math.log(n)
    tried: dict[float, dict[str, float]] = {}
    best: tuple[float, Tensor, Tensor] | None = None
    for step in steps:
        trace, drift = _langevin(behaviour, step, heat, localisation, burn_in, draws, chains, batch_size, seed)
        finite = bool(torch.isfinite(trace).all())
        r_hat = _split_r_hat(trace) if finite else math.inf
        tried[step] = {"r_hat": r_hat, "value": 2 * heat * float(trace.mean()) if finite else math.nan}
        if finite and (best is None or r_hat < tried[best[0]]["r_hat"]):
            best = step, trace, drift
        if r_hat <= _WORST_R_HAT:
            break
    if best is None:
        raise InputError(
            f"the sampler leaves the minimum at every step size tried, {', '.join(map(str, tried))}; give a smaller step"
        )
    step, trace, drift = best
    r_hat, value = tried[step]["r_hat"], tried[step]["value"]
    if r_hat > _WORST_R_HAT:
        told = ", ".join(f"step {s:g}: r-hat {t['r_hat']:.2f}, value {t['value']:.3g}" for s, t in tried.items())
        warnings.warn(
            f"the chains do not agree ({told}; r-hat should be <= {_WORST_R_HAT}); take more draws, a larger localisation "
            "or another step",
            ConvergenceWarning,
            stacklevel=3,
        )
    mean_loss = float(trace.mean())
    per_chain = 2 * heat * trace.mean(dim=1)
    about = {
        "r_hat": r_hat, "spread": float(per_chain.std()), "per_chain": per_chain.tolist(), "step": step,
        "tried": tried, "trace": trace.numpy(), "converged": r_hat <= _WORST_R_HAT, "n_beta": heat,
        "localisation_share": float(localisation * drift.square().sum(dim=1).mean() / len(behaviour.center)),
    }  # fmt: skip
    return EffectiveParameters(value, {mean_loss: value}, "sgld", len(behaviour.center), about)


def _langevin(
    behaviour: Behaviour,
    step: float,
    heat: float,
    localisation: float,
    burn_in: int,
    draws: int,
    chains: int,
    batch_size: int | None,
    seed: int,
) -> tuple[Float[Tensor, "chain draw"], Float[Tensor, "chain P"]]:
    """Losses after the burn-in of w <- w - step/2 (n beta grad L_B + localisation (w - w*)) + sqrt(step) noise."""
    generator = torch.Generator().manual_seed(seed)
    n, center = len(behaviour.x), behaviour.center

    def loss(vector: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return (behaviour.outputs(behaviour.split(vector), x) - target).square().sum() / len(x)

    slope = vmap(grad_and_value(loss), in_dims=(0, None, None))
    w = center.repeat(chains, 1)
    trace = torch.full((chains, draws), math.nan, dtype=torch.float64)
    x, target = behaviour.x, behaviour.target
    with evaluation_mode(behaviour.model):
        for i in range(burn_in + draws):
            if batch_size is not None and batch_size < n:
                rows = torch.randint(0, n, (batch_size,), generator=generator)
                x, target = behaviour.x[rows], behaviour.target[rows]
            gradient, value = slope(w, x, target)
            if i >= burn_in:
                trace[:, i - burn_in] = value.double().cpu()
                if not bool(torch.isfinite(value).all()):
                    break
            noise = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
            w = w - step / 2 * (heat * gradient + localisation * (w - center)) + math.sqrt(step) * noise
    return trace, (w - center).double().cpu()


def _split_r_hat(trace: Float[Tensor, "chain draw"]) -> float:
    """Potential scale reduction of the halves of every chain (Gelman et al., 2013)."""
    half = trace.shape[1] // 2
    parts = np.concatenate([trace[:, :half].numpy(), trace[:, half : 2 * half].numpy()])
    within = parts.var(axis=1, ddof=1).mean()
    between = half * parts.mean(axis=1).var(ddof=1)
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return float(math.sqrt(((half - 1) / half * within + between / half) / within))
