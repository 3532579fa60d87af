"""Numbers that a search of merges maximises: accuracy, negative perplexity, and weighted means of several."""

__all__ = ["Fitness", "accuracy_fitness", "multi_fitness", "perplexity_fitness"]

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode, model_input

_NOT_COUNTED = -100  # a target that no loss is taken of


class Fitness:
    """A number for a model, larger is better, and the standard error that its examples leave in it.

    measure: (model) -> (value, standard error); it runs in eval mode without gradients. name: for tables and figures.
    """

    def __init__(self, measure: Callable[[nn.Module], tuple[float, float]], name: str) -> None:
        self._measure = measure
        self.name = name

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """The value and its standard error."""
        with torch.no_grad(), evaluation_mode(model):
            return self._measure(model)

    def __call__(self, model: nn.Module) -> float:
        """The value alone."""
        return self.measure(model)[0]


def accuracy_fitness(x: Any, y: Any, *, memory: int | None = None) -> Fitness:
    """Share of the rows ``x`` whose largest score is at ``y``, in pieces that fit ``memory`` bytes (default 1 GiB).

    x, y: (n, ...) rows and (n,) class indices, tensors or arrays. Its standard error is binomial. Raises DataError for no
    rows and for targets that are of another number or no class indices.

    >>> accuracy_fitness(torch.eye(3), torch.tensor([0, 1, 1]))(nn.Identity())
    0.6666666666666666
    """
    x, y = model_input(None, x), model_input(None, y)
    if len(x) == 0 or y.shape != x.shape[:1] or y.is_floating_point():
        raise DataError(
            f"need as many targets as rows and at least one, each a class index; got {len(x)} rows and targets of shape "
            f"{tuple(y.shape)}, {y.dtype}"
        )
    cost = list[float]()

    def measure(model: nn.Module) -> tuple[float, float]:
        rows, right = model_input(model, x), torch.zeros((), dtype=torch.long, device=y.device)
        for part in chunks(len(rows), _row_cost(cost, model, rows), memory):
            right += (_scores(model, rows[part]).argmax(dim=-1) == y[part]).sum()
        share = int(right) / len(x)
        return share, math.sqrt(share * (1 - share) / len(x))

    return Fitness(measure, f"accuracy on {len(x):,} rows")


def perplexity_fitness(tokens: Any, *, mask: Any = None, memory: int | None = None) -> Fitness:
    """Minus the perplexity exp(mean negative log-likelihood of a next token) of a causal language model.

    tokens: rows of equal length. mask: (row, position), False for padding that is neither read nor counted. The standard
    error treats rows as independent. Raises DataError for rows of fewer than two tokens.
    """
    tokens, mask = model_input(None, tokens), None if mask is None else model_input(None, mask)
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
        raise DataError(f"perplexity needs rows of at least two tokens, got {tuple(tokens.shape)}")
    if mask is not None and mask.shape != tokens.shape:
        raise DataError(f"the mask must have the shape of the tokens {tuple(tokens.shape)}, got {tuple(mask.shape)}")
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    if not bool(counted.any()):
        raise DataError("the mask leaves no token to predict")
    wanted = torch.full_like(tokens, _NOT_COUNTED)
    wanted[:, :-1] = tokens[:, 1:].where(counted, _NOT_COUNTED)
    cost = list[float]()

    def measure(model: nn.Module) -> tuple[float, float]:
        sums = torch.empty(len(tokens), dtype=torch.float64)
        for part in chunks(len(tokens), _row_cost(cost, model, tokens), memory):
            options = {} if mask is None else {"attention_mask": mask[part].long()}
            scores = _scores(model, tokens[part], **options).flatten(0, 1).float()  # a view: a copy is gigabytes
            losses = F.cross_entropy(scores, wanted[part].flatten(), ignore_index=_NOT_COUNTED, reduction="none")
            sums[part] = losses.view(wanted[part].shape).double().sum(dim=1).cpu()
        counts = counted.sum(dim=1).cpu()
        mean = float(sums.sum() / counts.sum())
        spread = float((sums - mean * counts).square().sum().sqrt() / counts.sum())  # of a ratio, over rows
        if mean > 700:
            return -math.inf, math.inf
        return -math.exp(mean), math.exp(mean) * spread

    return Fitness(measure, f"negative perplexity on {len(tokens):,} texts")


def multi_fitness(fitnesses: Any, *, weights: Sequence[float] | None = None) -> Fitness:
    """The weighted mean of several fitnesses; ``weights`` are divided by their sum (None: all alike).

    The standard error takes the parts as independent, and a part that is a plain function as exact.

    >>> half = multi_fitness([lambda model: 1.0, lambda model: 0.0], weights=[3, 1])
    >>> half(nn.Identity())
    0.75
    """
    if not isinstance(fitnesses, Sequence) or not fitnesses or not all(map(callable, fitnesses)):
        raise InputError("multi_fitness needs a list of at least one fitness, each a function of a model")
    given = [1.0] * len(fitnesses) if weights is None else [float(w) for w in weights]
    if len(given) != len(fitnesses) or min(given) < 0 or sum(given) <= 0:
        raise InputError(f"need {len(fitnesses)} weights of at least 0 and not all 0, got {weights}")
    shares = [w / sum(given) for w in given]

    def measure(model: nn.Module) -> tuple[float, float]:
        parts = [value_and_error(fitness, model) for fitness in fitnesses]
        errors = [share * (error or 0.0) for share, (_, error) in zip(shares, parts)]
        return math.fsum(share * value for share, (value, _) in zip(shares, parts)), math.hypot(*errors)

    return Fitness(measure, " and ".join(getattr(fitness, "name", "a function") for fitness in fitnesses))


def value_and_error(fitness: Callable[[nn.Module], float], model: nn.Module) -> tuple[float, float | None]:
    """The fitness of a model and its standard error, None where a plain function does not tell."""
    if isinstance(fitness, Fitness):
        return fitness.measure(model)
    with torch.no_grad(), evaluation_mode(model):
        value: Any = fitness(model)
    try:
        return float(value), None
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a fitness must give one number for a model, it gave {type(value).__name__}") from error


def _scores(model: nn.Module, rows: Tensor, **options: Any) -> Tensor:
    out = model(rows, **options)
    return getattr(out, "logits", out)


def _row_cost(known: list[float], model: nn.Module, x: Tensor) -> float:
    """Bytes a row costs, measured with the first model only: later ones have the same layers."""
    if not known:
        known.append(bytes_per_row(lambda rows: _scores(model, rows), x[:1], gradients=False))
    return known[0]
