"""How likely a class is at a point and around it: the score that counterfactuals are searched and rated with.

    R(x) = (1/k) sum_i [ m(x_i) - |m(x) - m(x_i)| ],   x_i ~ N(x, sigma^2 I)        (the relaxed stability)

Source: Hamman, Noorani, Mishra, Magazzeni, Dutta, 2023, arXiv:2305.11997.
"""

__all__ = ["ClassScore", "Form", "TrainModeWarning", "draws", "samples_needed", "stability", "stability_guarantee"]

import math
import operator
import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunks
from theodolite.core.view import ModelView, evaluation_mode

Form = Literal["relaxed", "lipschitz", "given"]
_SMALLEST = 1e-12
_MOST_ROWS = 200_000


class TrainModeWarning(UserWarning):
    """The model was in training mode, where dropout or batch statistics change its answers; it was asked in eval mode."""


class ClassScore:
    """m(x): the probability of one class against its strongest rival, so that m >= 1/2 exactly where it is the answer.

    model: a network ((n, classes) scores or (n, 1) logits), a callable on tensors that returns the probability of class 1
    (n,) or of all classes (n, classes), or an estimator with predict_proba. target: the wanted class; None is class 1 of two.
    With two classes m is the plain probability. Raises ModelError (a ValueError) where there are more classes and no target.
    """

    def __init__(self, model: Any, target: int | None, example: Tensor, *, memory: int | None = None) -> None:
        if (
            hasattr(model, "predict")
            and not isinstance(model, (nn.Module, type))
            and not hasattr(model, "predict_proba")
        ):
            raise ModelError(
                f"{type(model).__name__} gives no probabilities; fit one that has predict_proba, for example by "
                "sklearn.calibration.CalibratedClassifierCV"
            )
        self.view = ModelView(model, output="logit" if isinstance(model, nn.Module) else "probability", memory=memory)
        weights = list(model.parameters()) if isinstance(model, nn.Module) else []
        self.dtype = weights[0].dtype if weights else torch.float64
        self.device = weights[0].device if weights else example.device
        out = self.view(self.cast(example[:1]))
        if self.view.is_estimator and out.shape[1] < 2:
            raise ModelError(f"{type(model).__name__} knows one class only; it was fitted on labels without another")
        classes = max(2, out.shape[1])
        if target is None and classes > 2:
            raise ModelError(f"the model tells {classes} classes apart; say with target= which of them is wanted")
        try:
            self.target = 1 if target is None else operator.index(target)
        except TypeError:
            raise InputError(f"target is the place of a class among the model's answers, got {target!r}") from None
        if not 0 <= self.target < classes:
            raise InputError(f"target must be 0..{classes - 1}, got {target}")
        self.rivals = [c for c in range(out.shape[1]) if c != self.target]

    @property
    def differentiable(self) -> bool:
        """Whether gradients can be asked for."""
        return self.view.differentiable

    def cast(self, x: Tensor) -> Tensor:
        """Rows in the model's own precision and place."""
        return x.to(self.device, self.dtype)

    def log_odds(self, x: Tensor) -> Float[Tensor, " row"]:
        """log m / (1 - m) of the rows in one call, with gradients where they are on; of probabilities cut at 1e-12."""
        out = self.view.apply(self.cast(x))
        if self.view.is_module:
            if out.shape[1] == 1:
                return out[:, 0] if self.target == 1 else -out[:, 0]
            return out[:, self.target] - out[:, self.rivals].amax(dim=1)
        ours, theirs = self._pair(out)
        return ours.clamp_min(_SMALLEST).log() - theirs.clamp_min(_SMALLEST).log()

    def apply(self, x: Tensor) -> Float[Tensor, " row"]:
        """m of the rows in one call, with gradients where they are on."""
        if self.view.is_module:
            return torch.sigmoid(self.log_odds(x))
        ours, theirs = self._pair(self.view.apply(self.cast(x)))
        return ours / (ours + theirs).clamp_min(_SMALLEST)

    def _pair(self, p: Tensor) -> tuple[Tensor, Tensor]:
        if p.shape[1] == 1:
            one = p[:, 0]
            return (one, 1 - one) if self.target == 1 else (1 - one, one)
        return p[:, self.target], p[:, self.rivals].amax(dim=1)

    def __call__(self, x: Tensor) -> Float[Tensor, " row"]:
        """m of all rows in chunks, without gradients, in double precision."""
        if len(x) == 0:
            return torch.zeros(0, dtype=torch.float64)
        with torch.no_grad(), self.quiet():
            found = torch.cat([self.apply(x[part]).double().cpu() for part in self.parts(x, 1, gradients=False)])
        if not bool(((found >= -1e-6) & (found <= 1 + 1e-6)).all()):
            raise ModelError("the model's probabilities are not finite numbers in [0, 1]")
        return found

    def parts(self, x: Tensor, copies: int, *, gradients: bool) -> Any:
        """Slices of the rows such that ``copies`` of each fit the memory budget, and at most 200,000 rows at once."""
        cost = max(self.view._row_cost(self.cast(x[:1]), gradients), 1.0)
        limit = int(min(self.view.memory or 1 << 30, cost * _MOST_ROWS))
        return chunks(len(x), copies * cost, max(1, limit))

    def quiet(self):
        """Eval mode for the length of a block; every submodule gets its mode back."""
        return evaluation_mode(self.view.model if self.view.is_module else nn.Identity())


def warn_of_training(model: Any) -> None:
    """Say so where ``model`` stands in training mode and that would change its answers."""
    noisy = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    if isinstance(model, nn.Module) and any(m.training and isinstance(m, noisy) for m in model.modules()):
        warnings.warn(
            "the model is in training mode and has dropout or batch normalisation; it is asked in eval mode and put back",
            TrainModeWarning,
            stacklevel=3,
        )


def draws(k: int, features: int, seed: int) -> Float[Tensor, "draw feature"]:
    """k standard normal draws, the same for every row of a call."""
    return torch.randn(int(k), features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_noise(sigma: float, k: int) -> None:
    """Raise InputError (a ValueError) where sigma or k cannot be used."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma must be a positive number, got {sigma}")
    if k < 2 or k != int(k):
        raise InputError(f"k must be a whole number of at least 2 draws, got {k}")


def stability(
    model: Any,
    X: Any,
    *,
    sigma: float = 0.05,
    k: int = 1000,
    target: int | None = None,
    form: Form = "relaxed",
    lipschitz: float | np.ndarray | None = None,
    noise: Any = None,
    units: Any = None,
    seed: int = 0,
    memory: int | None = None,
) -> Float[np.ndarray, " row"]:
    """Stability of each row (n,): how surely a natural change of the model leaves the target class its answer there.

    form: "relaxed" is the mean of m(x_i) - |m(x) - m(x_i)|, which is what is used in practice and carries no proof;
    "given" is the paper's measure, the mean of m(x_i) - lipschitz |x - x_i|, with a Lipschitz constant that you know (one, or
    one a row); "lipschitz" estimates that constant from the same draws, max |m(x_i) - m(x_j)| / (|x_i - x_j| + 1e-8), which
    is a lower bound of it. In more than a dozen features the last two are mostly far below 1/2: they lose lipschitz * sigma *
    sqrt(d). X: (n, d) in the model's own inputs. units: (d,) what counts as 1 in each column (the range of the training rows);
    sigma and distances are in these units, 1 where left out. noise: (k, d) standard normal draws instead of drawing them by
    ``seed``; all rows share them, so that a row's value does not depend on the others. memory: bytes.

    Raises InputError (a ValueError) for sigma <= 0, k < 2, rows that are not finite, or shapes that do not fit.

    >>> flat = lambda x: torch.full((len(x),), 0.7)
    >>> stability(flat, np.zeros((2, 3)), k=10).round(6).tolist()
    [0.7, 0.7]
    """
    x = _rows(X)
    check_noise(sigma, k if noise is None else len(noise))
    shared = draws(k, x.shape[1], seed) if noise is None else torch.as_tensor(np.array(noise, dtype=np.float64))
    if shared.shape[1:] != x.shape[1:] or not bool(torch.isfinite(shared).all()):
        raise InputError(f"noise must be (k, {x.shape[1]}) finite numbers, got shape {tuple(shared.shape)}")
    if form not in ("relaxed", "lipschitz", "given") or (form == "given") != (lipschitz is not None):
        raise InputError('form is "relaxed", "lipschitz" or "given"; "given", and only it, needs lipschitz=')
    scale = _numbers("units", 1.0 if units is None else units, x.shape[1])
    known = None if lipschitz is None else _numbers("lipschitz", lipschitz, len(x))
    warn_of_training(model)
    if len(x) == 0:
        return np.zeros(0)
    score = ClassScore(model, target, x, memory=memory)
    here = score(x)
    reach = sigma * shared.norm(dim=1)
    apart = sigma * torch.cdist(shared, shared) + 1e-8 if form == "lipschitz" else None
    out = torch.empty(len(x), dtype=torch.float64)
    with torch.no_grad(), score.quiet():
        for part in score.parts(x, len(shared), gradients=False):
            # as large as one row at a time where even that is more than the budget, and then in pieces
            m = _around(score, x[part], sigma * shared * scale)
            if form == "relaxed":
                out[part] = (m - (here[part, None] - m).abs()).mean(dim=1)
            elif apart is not None:
                steep = torch.stack([((row[:, None] - row).abs() / apart).max() for row in m])
                out[part] = m.mean(dim=1) - steep * reach.mean()
            elif known is not None:
                out[part] = m.mean(dim=1) - known[part] * reach.mean()
    return out.numpy()


def _around(score: ClassScore, x: Tensor, moves: Tensor) -> Float[Tensor, "row draw"]:
    rows = (x[:, None] + moves).reshape(-1, x.shape[1])
    found = [score.apply(rows[part]).double().cpu() for part in score.parts(rows, 1, gradients=False)]
    return torch.cat(found).reshape(len(x), len(moves))


def _numbers(name: str, given: Any, n: int) -> Float[Tensor, " number"]:
    """One number, or n of them, none below 0."""
    found = torch.as_tensor(np.array(given, dtype=np.float64))
    if found.shape not in ((), (n,)) or not bool(((found >= 0) & torch.isfinite(found)).all()):
        raise InputError(f"{name} must be one number >= 0 or {n} of them, got shape {tuple(found.shape)}")
    return found.expand(n)


def _rows(X: Any) -> Float[Tensor, "row feature"]:
    x = torch.as_tensor(np.array(X.detach().cpu().numpy() if isinstance(X, Tensor) else X, dtype=np.float64))
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(f"rows must be (n, features), got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise InputError("rows hold NaN or infinite values; fill or drop them first")
    return x


def stability_guarantee(epsilon: float, k: int, sigma: float, gamma: float, gamma_m: float) -> float:
    """Least probability that M(x) >= R(x) - epsilon: 1 - exp(-k epsilon^2 / (8 (gamma + gamma_m)^2 sigma^2)).

    R(x) by form "given" with gamma, the Lipschitz constant of the changed model M near x; gamma_m is that of the present
    model. It holds where the local bias of the change is below epsilon / 2, that is where M and m agree on average over the
    draws; a change that moves a whole neighbourhood up or down breaks it. So R(x) >= 1/2 + epsilon makes x robust.

    >>> round(stability_guarantee(0.1, 1000, 0.05, 1.0, 1.0), 6)
    1.0
    """
    _check_guarantee(epsilon, sigma, gamma, gamma_m)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    spread = 8 * (gamma + gamma_m) ** 2 * sigma**2
    return 1.0 if spread == 0 else -math.expm1(-k * epsilon**2 / spread)


def samples_needed(probability: float, epsilon: float, sigma: float, gamma: float, gamma_m: float) -> int:
    """Draws k with which `stability_guarantee` reaches ``probability``.

    >>> samples_needed(0.99, 0.1, 0.05, 1.0, 1.0)
    37
    """
    _check_guarantee(epsilon, sigma, gamma, gamma_m)
    if not 0 < probability < 1:
        raise InputError(f"probability must be between 0 and 1, got {probability}")
    return max(1, math.ceil(-8 * (gamma + gamma_m) ** 2 * sigma**2 * math.log1p(-probability) / epsilon**2))


def _check_guarantee(epsilon: float, sigma: float, gamma: float, gamma_m: float) -> None:
    if not (epsilon > 0 and sigma > 0 and gamma >= 0 and gamma_m >= 0):
        raise InputError(
            "need epsilon > 0, sigma > 0 and Lipschitz constants >= 0, got "
            f"epsilon={epsilon}, sigma={sigma}, gamma={gamma}, gamma_m={gamma_m}"
        )
