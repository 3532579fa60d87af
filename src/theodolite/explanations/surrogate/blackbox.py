"""A network, an estimator or a function as what is copied: a table in, class probabilities or one value out."""

__all__ = ["BlackBox", "NotProbabilitiesError"]

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import bytes_per_row, chunk_rows, chunks
from theodolite.core.view import ModelView, evaluation_mode

_OFF = 1e-3  # by how much a row's sum may differ from 1
_STACKED = 32  # copies of the table in one call of a model that has to be run whole


class NotProbabilitiesError(InputError):
    """The model's outputs are not finite, or rows of several outputs are not probabilities."""


class BlackBox:
    """Answers of ``model`` to rows (n, d) as float64: probabilities (n, classes), or one value (n, 1) for a regression.

    model: an nn.Module, a fitted scikit-learn estimator, or a callable from an array (n, d). logits: True where the outputs
    are scores to be put through a softmax (a single one through a sigmoid), False where they are probabilities; None:
    a module's outputs are scores unless its rows sum to 1, all others are probabilities. A single output is a value
    unless ``logits`` is True. names: of the table's columns, by which estimators that were fitted on a data frame find theirs.

    Raises NotProbabilitiesError for outputs that are not finite, negative, or do not sum to 1 (to 1e-3).
    """

    def __init__(self, model: Any, *, logits: bool | None = None, names: list[str] | None = None) -> None:
        self.model = model
        self.is_module = isinstance(model, nn.Module)
        self.logits = logits
        known = list(getattr(model, "feature_names_in_", ()))
        # by name where the table's columns have the model's names, in whatever order, otherwise by place
        self._names = (names if names is not None and set(names) == set(known) else known) if known else None
        self._known = known
        is_estimator = not self.is_module and hasattr(model, "predict") and not isinstance(model, type)
        if not (self.is_module or is_estimator or callable(model)):
            raise ModelError(f"expected an nn.Module, a fitted estimator or a callable, got {type(model).__name__}")
        self._ask: Any = model
        if is_estimator:
            self._ask = model.predict_proba if hasattr(model, "predict_proba") else model.predict
        self._front = _linear_front(model) if self.is_module else None

    @property
    def classes(self) -> np.ndarray | None:
        """Labels of the columns where the model has them (a fitted classifier)."""
        found = getattr(self.model, "classes_", None)
        return None if found is None else np.asarray(found)

    def tensor(self, x: np.ndarray) -> Tensor:
        """Rows as the module takes them."""
        parameter = next(iter(self.model.parameters()), torch.zeros((), dtype=torch.float32))
        return torch.as_tensor(x, dtype=parameter.dtype, device=parameter.device)

    def __call__(self, x: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row output"]:
        """Probabilities or values of all rows."""
        if self.is_module:
            return self._finish(ModelView(self.model, output="raw")(self.tensor(x)))
        if self._names is None:
            return self._finish(self._ask(x))
        if len(self._names) != x.shape[1]:
            raise ModelError(f"the model was fitted on {len(self._known)} columns, the table has {x.shape[1]}")
        return self._finish(self._ask(pd.DataFrame(x, columns=self._names)[self._known]))

    def _finish(self, raw: Any) -> np.ndarray:
        out = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else np.asarray(raw)
        if out.dtype.kind not in "fiub":
            raise NotProbabilitiesError(
                f"the model answers with {out.dtype}, not with numbers; give one that has predict_proba"
            )
        out = out.astype(np.float64).reshape(len(out), -1)
        if not np.isfinite(out).all():
            row = int(np.argmin(np.isfinite(out).all(axis=1)))
            raise NotProbabilitiesError(f"the model's answer to row {row} is not finite: {out[row][:5].tolist()}")
        if out.shape[1] == 1:
            if not self.logits:
                return out
            positive = 1 / (1 + np.exp(-np.clip(out, -500, 500)))
            return np.hstack([1 - positive, positive])
        total = out.sum(axis=1)
        wrong = (out < -_OFF).any(axis=1) | (np.abs(total - 1) > _OFF)
        if self.logits is None:
            self.logits = self.is_module and bool(wrong.any())
        if self.logits:
            out = np.exp(out - out.max(axis=1, keepdims=True))
            return out / out.sum(axis=1, keepdims=True)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise NotProbabilitiesError(
                f"outputs must be probabilities, but row {row} has the least entry {out[row].min():.4g} and sums to "
                f"{total[row]:.4g}; where these are scores before a softmax, say logits=True"
            )
        return out

    def edited(
        self,
        x: Float[np.ndarray, "row column"],
        columns: Int[np.ndarray, " edit"],
        values: Float[np.ndarray, "edit row"],
    ) -> Iterator[tuple[slice, Float[np.ndarray, "some row output"]]]:
        """Answers with one column replaced at a time: edit i puts values[i] into column columns[i].

        Where a network starts with a linear layer only that layer's outputs are updated, x W^T + (v - x_j) W_j^T, so an edit
        costs n x hidden numbers and not n x d; any other model is run on stacked copies of the table.
        """
        n, d = x.shape
        if self._front is not None:
            linear, rest = self._front
            with torch.no_grad(), evaluation_mode(self.model):
                before, rows = linear(self.tensor(x)), self.tensor(x)
                for part in chunks(len(columns), n * (bytes_per_row(rest, before[:1], gradients=False) + 8), 1 << 28):
                    moved = self.tensor(values[part]) - rows[:, columns[part]].T
                    hidden = before + moved[:, :, None] * linear.weight[:, columns[part]].T[:, None, :]
                    yield part, self._finish(rest(hidden.flatten(0, 1))).reshape(len(moved), n, -1)
            return
        at_once = chunk_rows(2.0 * x.nbytes, at_most=_STACKED)
        for start in range(0, len(columns), at_once):
            part = slice(start, min(start + at_once, len(columns)))
            copies = np.repeat(x[None], part.stop - start, axis=0)
            copies[np.arange(len(copies)), :, columns[part]] = values[part]
            yield part, self(copies.reshape(-1, d)).reshape(len(copies), n, -1)


def _linear_front(model: Any) -> tuple[nn.Linear, nn.Module] | None:
    """(first layer, the layers after it) of a sequential network that takes rows straight into a linear layer."""

    def layers(module: nn.Module) -> Iterator[nn.Module]:
        if type(module) is nn.Sequential and not module._forward_hooks and not module._forward_pre_hooks:
            yield from itertools.chain.from_iterable(layers(child) for child in module)
        else:
            yield module

    if type(model) is not nn.Sequential:
        return None
    flat = list(layers(model))
    while flat and isinstance(flat[0], (nn.Flatten, nn.Identity, nn.Dropout)):
        flat = flat[1:]
    if not flat or type(flat[0]) is not nn.Linear or flat[0]._forward_hooks or flat[0]._forward_pre_hooks:
        return None
    return flat[0], nn.Sequential(*flat[1:])
