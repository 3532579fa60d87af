"""Changes a model goes through in use: trained again, trained without some rows, its weights disturbed.

All numbers of robustness here are shares of such changed models that still give the answer.
"""

__all__ = ["perturbed_weights", "retrain", "robust_validity"]

import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import seeds_for, spread
from theodolite.core.train import Recipe, train, train_ensemble
from theodolite.explanations.stability import ClassScore
from theodolite.explanations.table_schema import plain_rows

PAPER_RECIPE = Recipe(epochs=50, batch_size=256, lr=1e-3, schedule="constant")


def retrain(
    model_factory: Callable[..., Any],
    X: Any,
    y: Any,
    n_models: int,
    *,
    mode: Literal["seed", "leave-one-out", "bootstrap"] = "seed",
    leave_out: int = 1,
    recipe: Recipe | None = None,
    seed: int = 0,
    executor: Executor | int | None = None,
) -> list[Any]:
    """Models trained again, each from its own initial weights and in its own order of the rows.

    model_factory: called with a seed where it has an argument without a default (or one called seed), else without: an
    untrained network, made under torch's generator with that seed, or an estimator with ``fit``, whose random_state is set to
    the seed where it is None. y: (n,) class numbers for networks, any labels for estimators. mode: "seed" keeps the rows,
    "leave-one-out" drops ``leave_out`` rows at random, "bootstrap" draws as many with replacement. recipe: as in
    `theodolite.core.train` (default 50 epochs of Adam). Plain networks are trained in one stacked run where the rows are the
    same; else ``executor`` spreads them.

    Raises InputError where the models cannot differ: the same initial weights, or an estimator without randomness on the same
    rows.
    """
    if n_models < 1 or mode not in ("seed", "leave-one-out", "bootstrap"):
        raise InputError(f"need n_models >= 1 and a known mode, got {n_models} and {mode!r}")
    rows, labels = plain_rows(X), np.array(y.detach().cpu().numpy() if isinstance(y, Tensor) else y)
    if labels.shape != (len(rows),) or (mode == "leave-one-out" and not 1 <= leave_out < len(rows)):
        raise DataError(
            f"{len(rows)} rows, labels of shape {labels.shape}, {leave_out} to leave out: one label is needed "
            "for each of the rows, and some rows have to be left"
        )
    seeds = seeds_for(seed, n_models)
    models = [_made(model_factory, s % (1 << 31)) for s in seeds]
    chosen = [_rows_of(mode, len(rows), leave_out, s) for s in seeds]
    if not isinstance(models[0], nn.Module):
        return _fitted(models, rows, labels, chosen, seeds, mode)
    _check_differ(models)
    recipe = _fitting(recipe or PAPER_RECIPE, models[0], rows, labels)
    dtype = next(models[0].parameters()).dtype
    x = torch.as_tensor(rows, dtype=dtype)
    target = torch.as_tensor(labels).long() if recipe.loss == "cross-entropy" else torch.as_tensor(labels, dtype=dtype)
    if mode == "seed" and _stackable(models[0], recipe):
        ensemble = train_ensemble(models, x, target, recipe=recipe, seeds=seeds)
        return [ensemble.member(i) for i in range(n_models)]
    tasks = [(m, x[kept], target[kept], recipe.with_seed(s)) for m, kept, s in zip(models, chosen, seeds, strict=True)]
    return spread(_trained, tasks, executor=executor)


def _made(model_factory: Callable[..., Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = inspect.signature(model_factory).parameters
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if "seed" in given:
            return model_factory(seed=seed)
        asked = any(p.kind in kinds and p.default is p.empty for p in given.values())
        return model_factory(seed) if asked else model_factory()


def _fitted(
    models: list[Any], rows: np.ndarray, labels: np.ndarray, chosen: list[np.ndarray], seeds: Sequence[int], mode: str
) -> list[Any]:
    """Estimators trained on their rows; refused where the same rows and no randomness make them one and the same."""
    out, answers = list[Any](), list[np.ndarray]()
    for model, kept, seed in zip(models, chosen, seeds, strict=True):
        if hasattr(model, "get_params") and model.get_params().get("random_state", 0) is None:
            model.set_params(random_state=seed % (1 << 31))
        out.append(model.fit(rows[kept], labels[kept]))
        if mode == "seed" and hasattr(model, "predict_proba"):
            answers.append(np.asarray(model.predict_proba(rows)))
    if any(np.array_equal(answers[0], other) for other in answers[1:]):
        raise InputError(
            f"{type(out[0]).__name__} is the same after each training on the same rows, so every retrained model would agree; "
            'take mode="bootstrap" or "leave-one-out", or leave its random_state at None'
        )
    return out


def _trained(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> nn.Module:
    if recipe.patience is not None:
        held = max(1, len(x) // 10)
        train(model, x[held:], y[held:], recipe=recipe, validation=(x[:held], y[:held]))
    else:
        train(model, x, y, recipe=recipe)
    return model


def _rows_of(mode: str, n: int, leave_out: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if mode == "bootstrap":
        return rng.integers(0, n, n)
    return np.arange(n) if mode == "seed" else np.delete(np.arange(n), rng.choice(n, leave_out, replace=False))


def _check_differ(models: Sequence[nn.Module]) -> None:
    first = [p.detach() for p in models[0].parameters()]
    for other in models[1:]:
        if all(torch.equal(a, b) for a, b in zip(first, other.parameters(), strict=True)):
            raise InputError(
                "model_factory gives the same initial weights for different seeds, so every retrained model would agree "
                "with every other; seed the weights with its argument (torch.manual_seed(seed))"
            )


def _fitting(recipe: Recipe, model: nn.Module, rows: np.ndarray, labels: np.ndarray) -> Recipe:
    """The recipe with the loss that fits the network's output, one logit or one score a class, if the labels do."""
    parameter = next(model.parameters())
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(torch.as_tensor(rows[:2]).to(parameter))
    single = out.ndim == 1 or out.shape[1] == 1
    classes = 2 if single else out.shape[1]
    if labels.dtype.kind not in "biuf" or not np.isin(labels, np.arange(classes)).all():
        raise DataError(
            f"this network learns class numbers 0..{classes - 1}, got labels like {np.unique(labels)[:5].tolist()}"
        )
    return replace(recipe, loss="binary" if single else "cross-entropy")


def _stackable(model: nn.Module, recipe: Recipe) -> bool:
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    plain = recipe.patience is None and recipe.optimizer != "adamw" and not recipe.momentum and recipe.clip is None
    return plain and not any(isinstance(module, kinds) for module in model.modules())


def perturbed_weights(model: nn.Module, n_models: int, *, scale: float = 0.05, seed: int = 0) -> list[nn.Module]:
    """Copies of ``model`` whose weights carry Gaussian noise of ``scale`` times the root mean square of their own tensor."""
    if n_models < 1 or not scale > 0:
        raise InputError(f"need n_models >= 1 and scale > 0, got {n_models} and {scale}")
    out = []
    for one in seeds_for(seed, n_models):
        generator, changed = torch.Generator().manual_seed(one), copy.deepcopy(model).eval()
        with torch.no_grad():
            for p in changed.parameters():
                p += scale * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator).to(p)
        out.append(changed)
    return out


def robust_validity(cfs: Any, models: Sequence[Any], *, target: int | None = None) -> Float[np.ndarray, " row"]:
    """Share of ``models`` that answer the target class at each counterfactual (n,); 0 where there is none.

    cfs: what a generator gave (anything with ``counterfactuals``), or points (n, d) in the models' units; a row that is not
    finite is none. What counts is the target class, not "another class".

    >>> up = lambda x: (x[:, 0] > 0).double()
    >>> robust_validity(np.array([[1.0], [-1.0], [np.nan]]), [up, lambda x: 1 - up(x), up]).round(3).tolist()
    [0.667, 0.333, 0.0]
    """
    given = getattr(cfs, "counterfactuals", cfs)
    points = np.array(given.detach().cpu().numpy() if isinstance(given, Tensor) else given, dtype=np.float64)
    if points.ndim != 2:
        raise DataError(f"points must be (n, features), got shape {points.shape}")
    if len(models) == 0:
        raise InputError("robust validity needs at least one changed model")
    out = np.zeros(len(points))
    there = np.isfinite(points).all(axis=1)
    if there.any():
        x = torch.as_tensor(points[there])
        out[there] = np.mean([(ClassScore(model, target, x)(x) >= 0.5).numpy() for model in models], axis=0)
    return out
