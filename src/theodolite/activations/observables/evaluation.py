"""How well a feature predicts the observable, beside what labelled prompts give."""

__all__ = ["FeatureReport", "Readings", "baselines", "compare_baselines", "evaluate", "read", "read_all", "report"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from theodolite.activations.observables.feature import FeatureVector
from theodolite.activations.observables.observable import Observable, Prompts, as_prompts, varying_tokens
from theodolite.activations.observables.propagation import all_paths
from theodolite.core.capture import forward_nodes
from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.transformer import decoder_parts, run_decoder, same_length
from theodolite.core.view import evaluation_mode, model_input

Tokens = Sequence[int] | int | Literal["mean"] | None
_RANDOM = 20
_SAME = 1e-6  # share of the numbers' size that the rounding of float32 makes up; no more than that is no difference


@dataclass(frozen=True, eq=False)
class FeatureReport:
    """How well y . x predicts the observable over prompts, pooled over all of them.

    r2: squared correlation; the line is observable = intercept + slope * (y . x), where the intercept holds what does not
    vary (biases of the values among it). auc: of y . x against binary labels, None without labels. n: prompts. from_pair:
    how many of them are the pair's own.
    """

    r2: float
    slope: float
    intercept: float
    auc: float | None
    n: int
    from_pair: int = 0


@dataclass(frozen=True, eq=False)
class Readings:
    """Activations at a feature's place and the observable, a row for each prompt."""

    x: Float[Tensor, "prompt width"]
    observed: Float[Tensor, " prompt"]


def read(
    model: Any,
    feature: FeatureVector,
    observable: Observable,
    prompts: Prompts,
    *,
    tokens: Tokens = None,
    memory: int | None = None,
) -> Readings:
    """Activations at the feature's place and the observable for each prompt; prompts of one length run in one batch.

    tokens: where to read, one number or one for each prompt (negative from the end), or "mean" over all tokens. By default
    the last token where the feature reads the last; otherwise as far from the word that varies among prompts of the same
    length as the feature's token lies from the word that differs in its pair, so that templates may differ in length.
    Raises InputError where that word cannot be told.
    """
    return read_all(model, [feature], observable, prompts, tokens=tokens, memory=memory)[0]


def read_all(
    model: Any,
    features: Sequence[FeatureVector],
    observable: Observable,
    prompts: Prompts,
    *,
    tokens: Tokens = None,
    memory: int | None = None,
) -> list[Readings]:
    """`read` for several features of one model in one pass."""
    if not features:
        raise InputError("need at least one feature")
    if any(feature.stream == "input" for feature in features):
        return [_read_modules(model, feature, observable, prompts, memory) for feature in features]
    parts = decoder_parts(model)
    ids = as_prompts(prompts, observable.tokenizer)
    for feature in features:
        if not isinstance(feature.layer, int) or len(feature.vector) != parts.width:
            raise InputError(f"the feature has width {len(feature.vector)}, the model's stream {parts.width}")
    observable.check(parts.vocabulary)
    places = [_places(feature, ids, tokens) for feature in features]
    x = torch.empty(len(features), len(ids), parts.width, device=parts.device)
    observed = torch.empty(len(ids), device=parts.device)
    before = sorted({int(one.layer) for one in features if one.stream == "residual"})
    between = sorted({int(one.layer) for one in features if one.stream == "middle"})
    kept = 12 + len(before) + len(between)
    for length, group in same_length(ids).items():
        for part in chunks(len(group), 4.0 * (3 * parts.vocabulary + kept * length * parts.width), memory):
            rows = group[part]
            run = run_decoder(
                parts, torch.stack([ids[row] for row in rows]), before=before, between=between, memory=memory
            )
            observed[rows] = observable.score(run.logits)
            for i, (feature, at) in enumerate(zip(features, places, strict=True)):
                stream = (run.before if feature.stream == "residual" else run.between)[int(feature.layer)]
                x[i, rows] = stream.mean(dim=1) if at is None else stream[range(len(rows)), [at[row] for row in rows]]
    return [Readings(one, observed) for one in x]


def _places(feature: FeatureVector, ids: list[Tensor], tokens: Tokens) -> list[int] | None:
    """Where to read each prompt; None for the mean."""
    if tokens == "mean":
        return None
    lengths = [len(one) for one in ids]
    if tokens is not None:
        given = [tokens] * len(ids) if isinstance(tokens, int) else [int(token) for token in tokens]
        if len(given) != len(ids):
            raise InputError(f"{len(ids)} prompts need as many tokens to read at, got {len(given)}")
    elif feature.pair is None or feature.token == len(feature.pair[0]) - 1:
        given = [feature.token if feature.pair is None else -1] * len(ids)
    else:
        given = _aligned(feature, ids)
    for length, token in zip(lengths, given, strict=True):
        if not -length <= token < length:
            raise InputError(
                f"cannot read at token {token} of a prompt of {length} tokens; give tokens=, one for each prompt"
            )
    return [token % length for length, token in zip(lengths, given, strict=True)]


def _aligned(feature: FeatureVector, ids: list[Tensor]) -> list[int]:
    given = list[int]()
    for ours, varies in zip(ids, varying_tokens(ids), strict=True):
        if feature.offset is not None and varies is not None:
            given.append(varies + feature.offset)
        elif feature.pair is not None and len(ours) == len(feature.pair[0]):
            given.append(feature.token)
        else:
            raise InputError(
                "cannot tell where to read: give several prompts of each template that differ in one word, or tokens=, the "
                "token to read at in each prompt"
            )
    return given


def _rows(model: Any, inputs: Any) -> Tensor:
    """Inputs of a network that is no decoder, as one batch in its precision."""
    if hasattr(inputs, "__array__"):
        return model_input(model, inputs)
    return torch.stack([model_input(model, one) for one in inputs]) if len(inputs) else torch.empty(0)


def _read_modules(
    model: Any, feature: FeatureVector, observable: Observable, inputs: Any, memory: int | None
) -> Readings:
    x = _rows(model, inputs)
    if len(x) == 0:
        raise InputError("need at least one input")
    node = f"{feature.layer}:input"
    with evaluation_mode(model):
        cost = bytes_per_row(model, x[:1], gradients=False)
    values, observed = [], []
    for part in chunks(len(x), cost, memory):
        found = forward_nodes(model, x[part], [node, "output"])
        values.append(found[node].flatten(1).float())
        observed.append(observable.score(found["output"]))
    return Readings(torch.cat(values), torch.cat(observed))


def evaluate(
    model: Any,
    feature: FeatureVector,
    observable: Observable,
    prompts: Prompts,
    *,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    tokens: Tokens = None,
    memory: int | None = None,
) -> FeatureReport:
    """How well y . x predicts the model's observable over ``prompts``, and labels (0 or 1 each) where they are given.

    tokens: as for `read`. Raises DataError for fewer than three prompts beside the pair's own, an observable or a score that
    is the same for all of them, labels of one class.
    """
    found = read(model, feature, observable, prompts, tokens=tokens, memory=memory)
    own = _from_pair(model, feature, prompts, observable)
    if len(found.observed) - own < 3:
        raise DataError(
            f"{len(found.observed)} prompts of which {own} are the pair that the feature was made from tell nothing; give at "
            "least three others"
        )
    return report(feature, found, labels=labels, from_pair=own)


def report(feature: FeatureVector, found: Readings, *, labels: Any = None, from_pair: int = 0) -> FeatureReport:
    """`evaluate` on what was read already."""
    scores = feature.score(found.x).double().cpu().numpy()
    observed = found.observed.double().cpu().numpy()
    truth = None if labels is None else _binary(labels, len(scores))
    slope, intercept = _line(scores, observed)
    auc = None if truth is None else float(roc_auc_score(truth, scores))
    return FeatureReport(_r2(scores, observed), slope, intercept, auc, len(scores), from_pair)


def _from_pair(model: Any, feature: FeatureVector, prompts: Any, observable: Observable) -> int:
    if feature.pair is None:
        return 0
    rows = _rows(model, prompts) if feature.stream == "input" else as_prompts(prompts, observable.tokenizer)
    return sum(any(torch.equal(row, own) for own in feature.pair) for row in rows)


def _binary(labels: Any, n: int) -> np.ndarray:
    truth = np.asarray(labels)
    if truth.shape != (n,):
        raise DataError(f"need one label for each of {n} prompts, got shape {truth.shape}")
    if set(np.unique(truth).tolist()) != {0, 1}:
        raise DataError("labels must be 0 and 1 (or False and True), and both must be there")
    return truth.astype(bool)


def _line(scores: np.ndarray, observed: np.ndarray) -> tuple[float, float]:
    for what, values in (("the score y . x", scores), ("the observable", observed)):
        if not np.isfinite(values).all():
            raise DataError(
                f"{what} is NaN or infinite for {int((~np.isfinite(values)).sum())} of {len(values)} prompts; check the inputs "
                "and the model's weights"
            )
        if np.ptp(values) <= _SAME * np.abs(values).max():
            raise DataError(
                f"{what} is the same for all prompts, so nothing can be predicted; give prompts that differ in it"
            )
    slope = float(np.cov(scores, observed)[0, 1] / scores.var(ddof=1))
    return slope, float(observed.mean() - slope * scores.mean())


def _r2(scores: np.ndarray, observed: np.ndarray) -> float:
    if np.ptp(scores) == 0 or np.ptp(observed) == 0:
        return 0.0
    return float(np.corrcoef(scores, observed)[0, 1] ** 2)


# ---- beside labelled prompts


def compare_baselines(
    model: Any,
    feature: FeatureVector,
    observable: Observable,
    prompts: Prompts,
    *,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    n_train: Sequence[int] = (1, 3, 10, 30),
    n_splits: int = 5,
    tokens: Tokens = None,
    seed: int = 0,
    memory: int | None = None,
) -> pd.DataFrame:
    """The feature beside what N labelled prompts a class give at the same place, scored on the prompts not used.

    A row for each method and N: "feature" and "gradient" (all paths at the pair's first prompt; not for networks that are no
    decoder) with n_train = 0, "random direction" (median of 20), "linear regression" of the observable, "mean difference" of
    the classes, "logistic regression" of the class. Columns: method, n_train, r2 (mean over splits of the squared
    correlation, pooled over templates), r2_low, r2_high (extremes), auc (of the labels).

    labels: 0 or 1 each; by default whether the observable is over its median. An N is left out where fewer than three of a
    class would remain.
    """
    found = read(model, feature, observable, prompts, tokens=tokens, memory=memory)
    others = dict[str, Tensor]()
    if feature.pair is not None and feature.stream == "residual":
        layer, token = int(feature.layer), feature.token
        others["gradient"] = all_paths(model, observable, feature.pair[0], layer=layer, token=token).vector
    return baselines(feature, found, others, labels=labels, n_train=n_train, n_splits=n_splits, seed=seed)


def baselines(
    feature: FeatureVector,
    found: Readings,
    others: Mapping[str, Tensor],
    *,
    labels: Any,
    n_train: Sequence[int],
    n_splits: int,
    seed: int,
) -> pd.DataFrame:
    """`compare_baselines` on what was read already; others: vectors by name that are scored as the feature is."""
    x, observed = found.x.double().cpu().numpy(), found.observed.double().cpu().numpy()
    truth = _binary(observed > np.median(observed) if labels is None else labels, len(x))
    _line(feature.score(found.x).double().cpu().numpy(), observed)
    sizes = [n for n in n_train if n >= 1 and n + 3 <= min(truth.sum(), (~truth).sum())]
    if not sizes or n_splits < 1:
        raise InputError(
            f"no N of {list(n_train)} leaves three prompts of each class ({int(truth.sum())} and {int((~truth).sum())}); give "
            "more prompts or smaller N"
        )
    fixed = {name: v.double().cpu().numpy() for name, v in {"feature": feature.vector, **others}.items()}
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(_RANDOM, x.shape[1]))
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for n in sizes:
        for _ in range(n_splits):
            fit = np.concatenate([rng.permutation(np.flatnonzero(truth == side))[:n] for side in (True, False)])
            rest = np.setdiff1d(np.arange(len(x)), fit)
            scores: dict[tuple[str, int], np.ndarray] = {(name, 0): x[rest] @ v for name, v in fixed.items()}
            scores |= {(name, n): made(x[fit], observed[fit], truth[fit])(x[rest]) for name, made in _FITTED.items()}
            for key, values in scores.items():
                runs.setdefault(key, []).append(_judge(values, observed[rest], truth[rest]))
            random = [_judge(x[rest] @ direction, observed[rest], truth[rest]) for direction in directions]
            runs.setdefault(("random direction", 0), []).append(_median(random))
    rows = []
    for (name, n), values in runs.items():
        r2, auc = np.array(values).T
        rows.append((name, n, r2.mean(), r2.min(), r2.max(), auc.mean()))
    return pd.DataFrame(rows, columns=["method", "n_train", "r2", "r2_low", "r2_high", "auc"])


def _judge(scores: np.ndarray, observed: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    return _r2(scores, observed), float(roc_auc_score(truth, scores))


def _median(values: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of r2 and of how far the area is from one half, as a direction has no sign."""
    r2, auc = np.array(values).T
    return float(np.median(r2)), float(np.median(np.maximum(auc, 1 - auc)))


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def _regression(x: np.ndarray, observed: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return LinearRegression().fit(x, observed).predict


def _difference(x: np.ndarray, observed: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    direction = x[truth].mean(axis=0) - x[~truth].mean(axis=0)
    return lambda rows: rows @ direction


def _logistic(x: np.ndarray, observed: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, truth).decision_function


_FITTED: dict[str, Fit] = {
    "linear regression": _regression,
    "mean difference": _difference,
    "logistic regression": _logistic,
}
