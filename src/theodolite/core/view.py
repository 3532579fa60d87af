"""A model seen as a function from a batch to one number per row, whatever the model is."""

__all__ = ["ModelView", "evaluation_mode", "model_input"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import bytes_per_row, chunks

Output = Literal["probability", "logit", "value", "raw"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put every submodule into eval mode, and each back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def model_input(model: Any, x: Any) -> Tensor:
    """``x`` as a tensor in the precision and on the device of the network's weights; for any other model as it is.

    >>> model_input(nn.Linear(2, 1), np.zeros((3, 2))).dtype
    torch.float32
    """
    if hasattr(x, "__array__") and not isinstance(x, Tensor):
        x = np.require(x, requirements="W")  # torch wants a copy of what cannot be written to, as a table's values
        if min(x.strides, default=0) < 0:  # and of what is read backwards
            x = x.copy()
    rows = torch.as_tensor(x)
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    like = next((p for p in weights if p.is_floating_point() and not nn.parameter.is_lazy(p)), None)
    return rows if like is None or not rows.is_floating_point() else rows.to(like.device, like.dtype)


class ModelView:
    """Probability, logit or value of a model, batched within a byte budget, without touching the model's state.

    model: an nn.Module (batch -> (n,) or (n, classes) raw scores), a fitted scikit-learn estimator, or a callable on
    tensors (taken as it is). output: "probability" applies softmax (sigmoid for one column) to a module's scores and
    asks an estimator for predict_proba; "logit" gives a module's scores (log-probabilities of an estimator); "value"
    is a regressor's prediction; "raw" passes scores on untouched.
    """

    def __init__(self, model: Any, *, output: Output = "probability", memory: int | None = None) -> None:
        self.model = model
        self.output: Output = output
        self.memory = memory
        self._row_bytes: dict[tuple[tuple[int, ...], bool], float] = {}
        self.is_module = isinstance(model, nn.Module)
        self.is_estimator = not self.is_module and hasattr(model, "predict") and not isinstance(model, type)
        if not (self.is_module or self.is_estimator or callable(model)):
            raise ModelError(f"expected an nn.Module, a fitted estimator or a callable, got {type(model).__name__}")
        if self.is_estimator and output in ("probability", "logit") and not hasattr(model, "predict_proba"):
            raise ModelError(f"{type(model).__name__} has no predict_proba; use output='value'")

    @property
    def differentiable(self) -> bool:
        """Whether gradients can be asked for (a callable says so when it is tried)."""
        return not self.is_estimator

    def _row_cost(self, x: Tensor, gradients: bool) -> float:
        key = (tuple(x.shape[1:]), gradients)
        if key not in self._row_bytes:
            if self.is_estimator:
                self._row_bytes[key] = 64.0 * max(1, x[:1].numel())
            else:
                with self._mode():
                    self._row_bytes[key] = bytes_per_row(self.model, x[:1].detach(), gradients=gradients)
        return self._row_bytes[key]

    def _squash(self, scores: Any) -> Tensor:
        if not isinstance(scores, Tensor):
            raise ModelError(f"a model must answer with a tensor, got {type(scores).__name__}")
        if scores.ndim == 1:
            scores = scores[:, None]
        if self.output == "probability" and self.is_module:
            return torch.sigmoid(scores) if scores.shape[1] == 1 else torch.softmax(scores, dim=1)
        return scores

    def apply(self, x: Tensor) -> Float[Tensor, "batch output"]:
        """One unchunked call, (n, classes) or (n, 1); gradients are recorded where the caller has them on."""
        if self.is_estimator:
            return self._estimate(x)
        return self._squash(self.model(x))

    def _estimate(self, x: Tensor) -> Tensor:
        rows = x.detach().cpu().numpy()
        rows = rows.reshape(len(rows), -1)
        if hasattr(self.model, "feature_names_in_"):  # fitted on a data frame, and warns where it is given none
            rows = pd.DataFrame(rows, columns=self.model.feature_names_in_)
        if self.output == "value" or self.output == "raw":
            out = np.asarray(self.model.predict(rows), dtype=np.float64)
        else:
            out = np.asarray(self.model.predict_proba(rows), dtype=np.float64)
            if self.output == "logit":
                out = np.log(np.clip(out, 1e-12, None))
        out = out.reshape(len(rows), -1)
        return torch.as_tensor(out, dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)

    def __call__(self, x: Tensor | np.ndarray) -> Float[Tensor, "batch output"]:
        """Scores of all rows, in chunks that fit the budget; no gradients."""
        x = torch.as_tensor(x)
        if len(x) == 0:
            raise InputError("cannot score zero rows")
        with torch.no_grad(), self._mode():
            return torch.cat([self.apply(x[part]) for part in chunks(len(x), self._row_cost(x, False), self.memory)])

    def predict(self, x: Tensor | np.ndarray) -> Int[Tensor, " batch"]:
        """The index of the largest score per row (of a single column: 1 where it passes one half or, as a logit, 0)."""
        scores = self(x)
        if scores.shape[1] == 1:
            return (scores[:, 0] > (0.5 if self.output == "probability" else 0.0)).long()
        return scores.argmax(dim=1)

    def target_scores(self, x: Tensor, target: Int[Tensor, " batch"] | int | None = None) -> Float[Tensor, " batch"]:
        """Score of each row's target (None: its own predicted class), in chunks, without gradients."""
        scores = self(x)
        return scores.gather(1, self.targets(x, target, scores)[:, None])[:, 0]

    def targets(
        self, x: Tensor, target: Int[Tensor, " batch"] | int | None, scores: Tensor | None = None
    ) -> Int[Tensor, " batch"]:
        """One column index per row: as given, or the predicted class; raises where it is out of range."""
        scores = self(x) if scores is None else scores
        n, classes = scores.shape
        if target is None:
            return scores.argmax(dim=1)
        index = torch.as_tensor(target, dtype=torch.long, device=scores.device)
        index = index.expand(n) if index.ndim == 0 else index
        if index.shape != (n,) or bool((index < 0).any()) or bool((index >= classes).any()):
            raise InputError(f"target must be 0..{classes - 1}, one or one per row ({n} rows), got {target}")
        return index

    def gradients(self, x: Tensor, target: Int[Tensor, " batch"] | int | None = None) -> Float[Tensor, "batch ..."]:
        """Gradient of each row's target score with respect to that row, shape of ``x``, in chunks."""
        index = self.targets(x, target)
        out = torch.empty_like(x)
        with torch.enable_grad(), self._mode():
            for part in chunks(len(x), self._row_cost(x, True), self.memory):
                rows = x[part].detach().requires_grad_(True)
                picked = self.apply(rows).gather(1, index[part][:, None]).sum()
                (out[part],) = torch.autograd.grad(picked, rows)
        return out

    def _mode(self):
        return evaluation_mode(self.model) if self.is_module else _unchanged()


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def as_view(model: Any, **options: Any) -> ModelView:
    """``model`` itself where it is a view already, otherwise a view of it."""
    return model if isinstance(model, ModelView) else ModelView(model, **options)
