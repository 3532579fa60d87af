"""The model seen from each input: F(z) = f(x moved by z), one number for each row and move, and its gradient in z."""

__all__ = ["LocalFunction"]

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET, bytes_per_row, chunk_rows, chunks
from theodolite.core.view import ModelView, evaluation_mode
from theodolite.explanations.local_approximation.neighbourhood import (
    DegenerateNeighbourhoodError,
    Neighbourhood,
    NotDifferentiableError,
    OneHot,
    group_index,
    whole_number,
)

_MAX_ROWS = 200_000


class LocalFunction:
    """F(z) of every row of ``X``, with the score of its target class, averaged over the baselines of the neighbourhood.

    f: an nn.Module (softmax of its class scores; what has one output, or gives probabilities already, is taken as it is), an
    estimator (predict_proba, or predict of a regressor), a callable batch -> (n,) or (n, classes) that is taken as it is, or
    a ModelView that says which of these.
    target: class index, one or one for each row; None is the predicted class of each row.
    """

    def __init__(self, f: Any, X: Any, target: Any, neighbourhood: Neighbourhood, *, memory: int | None = None) -> None:
        self.memory = DEFAULT_BUDGET if memory is None else memory
        whole_number("memory", self.memory, 1)
        self.neighbourhood = neighbourhood
        self.view = view_of(f)
        x = _checked_rows(X, self.view)
        self.shape = tuple(x.shape)
        self.x = x.reshape(len(x), -1)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        self._format = torch.channels_last if last else torch.contiguous_format  # f may be faster in the one X has
        self.index = (
            None if neighbourhood.groups is None else group_index(neighbourhood.groups, self.shape).to(x.device)
        )
        self.features = self.x.shape[1] if self.index is None else int(self.index.max()) + 1
        baseline = getattr(neighbourhood, "baseline", 0.0)
        self.baselines = _baselines(baseline, x) if neighbourhood.multiplicative else self.x[:1]
        self._cost: dict[bool, float] = {}
        scores = self._scores(x)
        if isinstance(f, nn.Module) and scores.shape[1] > 1 and not _are_probabilities(scores):
            self.view, scores = ModelView(f, output="probability"), torch.softmax(scores, dim=1)
            self._cost.clear()
        self.target = self.view.targets(x, _class_index(target, scores.device), scores)
        self.anchor = _finite(scores.gather(1, self.target[:, None])[:, 0].double(), "f at X")
        self.evaluations = len(x)
        if neighbourhood.multiplicative:
            moved = torch.stack([(self.x != one).any(dim=1) for one in self.baselines])
            stuck = (~moved.any(dim=0)).nonzero().ravel().tolist()
            if stuck:
                raise DegenerateNeighbourhoodError(
                    f"rows {stuck[:10]} equal the baseline in every coordinate, so no feature can be switched off; "
                    "choose another baseline, or an additive neighbourhood (Neighbourhood.gaussian)"
                )

    def share(self, parts: int) -> int:
        """One of so many equal parts of the memory, in bytes."""
        return max(1, self.memory // parts)

    def __len__(self) -> int:
        return len(self.x)

    def squared_offset(self, rows: slice) -> Float[Tensor, "row feature"]:
        """Squared distance between input and baseline that each feature stands for, averaged over the baselines."""
        mean = self.baselines.double().mean(dim=0)
        spread = self.baselines.double().var(dim=0, correction=0)
        total = (self.x[rows].double() - mean).square() + spread
        return self._to_features(total[:, None], rows)[:, 0]

    def require_gradient(self) -> None:
        """Raise NotDifferentiableError unless f has a gradient."""
        message = (
            "f gives no gradient, which a gradient loss needs; LIME, KernelSHAP, Occlusion and C-LIME need none "
            "(loss='squared')"
        )
        if not self.view.differentiable:
            raise NotDifferentiableError(message)
        if torch.is_inference_mode_enabled():
            raise NotDifferentiableError("torch.inference_mode() is on, so f cannot be differentiated; call outside it")
        with torch.enable_grad(), self._mode():
            row = self._inputs(self.x[:1]).detach().clone().requires_grad_(True)
            try:  # the same call went through without gradients, so what fails here fails because of them
                scores = self.view.apply(row.clone())
            except RuntimeError as error:
                raise NotDifferentiableError(message) from error
        if not scores.requires_grad:
            raise NotDifferentiableError(message)

    def values(self, rows: slice, moves: Tensor) -> Float[Tensor, "row move"]:
        """What g has to match, in double precision; moves: (m, features), or (rows, m, features) with each row's own.

        That is F(z), and for one-hot moves xi the change f(x) - F(1 - xi).
        """
        out = torch.zeros(len(self.x[rows]), moves.shape[-2], dtype=torch.float64, device=self.x.device)
        for part, of_moves, points, _ in self._points(rows, moves, gradients=False):
            with torch.no_grad(), self._mode():
                scores = self._picked(points, part)
            _add(out[_shifted(part, rows)], of_moves, scores.double() / len(self.baselines))
        out = _finite(out, "f near X")
        return self.anchor[rows, None] - out if isinstance(self.neighbourhood, OneHot) else out

    def gradients(self, rows: slice, moves: Tensor) -> Float[Tensor, "row move feature"]:
        """Gradient of F with respect to the move (not to the input: a multiplicative move brings the factor x - b0)."""
        r, m = len(self.x[rows]), moves.shape[-2]
        out = torch.zeros(r, m, self.features, dtype=self.x.dtype, device=self.x.device)
        for part, of_moves, points, offset in self._points(rows, moves, gradients=True):
            with torch.enable_grad(), self._mode():
                points.requires_grad_(True)
                # a copy, since f may write into what it is given
                scores = self._picked(points.clone(), part)
                (slope,) = torch.autograd.grad(scores.sum(), points, materialize_grads=True)
            if offset is not None:
                slope = slope * offset
            _add(out[_shifted(part, rows)], of_moves, self._to_features(slope, part) / len(self.baselines))
        return _finite(out, "the gradient of f near X")

    def same_coordinates(self, other: "LocalFunction") -> bool:
        """Whether a weight means the same change of the input here and in ``other``, which has the same rows."""
        if not (self.neighbourhood.multiplicative and other.neighbourhood.multiplicative):
            return False
        if (self.index is None) != (other.index is None) or not torch.equal(self.baselines, other.baselines):
            return False
        return self.index is None or other.index is None or torch.equal(self.index, other.index)

    def slopes(self, weights: Tensor, standard_error: Tensor, rows: slice) -> Float[Tensor, "row entry"]:
        """Slope per entry of the input that weights of this neighbourhood stand for (least norm within a group).

        A multiplicative weight is the change over the whole way from baseline to input. Where the two are equal it says
        nothing about the slope, and near there its sampling noise would be blown up: such weights within three standard
        errors of 0 count as slope 0.
        """
        if self.neighbourhood.multiplicative:
            weights = torch.where(weights.abs() > 3 * standard_error, weights, 0.0)
            offset = self._offset(rows)
            length = self._to_features(offset.square()[:, None], rows)[:, 0]
            share = torch.where(length > 0, weights / length.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            return self._to_entries(share[:, None], rows)[:, 0] * offset
        ones = torch.ones_like(self.x[rows], dtype=torch.float64)
        members = self._to_features(ones[:, None], rows)[:, 0]
        return self._to_entries((weights / members.clamp_min(1))[:, None], rows)[:, 0]

    def weights_of(self, slopes: Tensor, rows: slice) -> Float[Tensor, "row feature"]:
        """The plane with these slopes per entry, in the coordinates of this neighbourhood."""
        change = slopes * self._offset(rows) if self.neighbourhood.multiplicative else slopes
        return self._to_features(change[:, None], rows)[:, 0]

    def intercept_for(self, weights: Tensor, at_x: Tensor, rows: slice) -> Float[Tensor, " row"]:
        """The intercept with which a linear g says ``at_x`` at x."""
        if isinstance(self.neighbourhood, OneHot):
            return self.anchor[rows] - at_x
        return at_x - weights.sum(dim=1) if self.neighbourhood.multiplicative else at_x

    def at_x(self, weights: Tensor, intercept: Tensor) -> Float[Tensor, " row"]:
        """What a linear g of all rows with this intercept says at x."""
        if isinstance(self.neighbourhood, OneHot):
            return self.anchor - intercept
        return intercept + weights.sum(dim=1) if self.neighbourhood.multiplicative else intercept

    def _offset(self, rows: slice) -> Float[Tensor, "row entry"]:
        """x minus the (mean) baseline."""
        return self.x[rows].double() - self.baselines.double().mean(dim=0)

    def _points(self, rows: slice, moves: Tensor, *, gradients: bool) -> Iterator[tuple[slice, Tensor, Tensor, Any]]:
        """Moved inputs in batches that fit the memory: (rows, number of the move, inputs (rows, moves, entries), x - b0)."""
        first, last, _ = rows.indices(len(self.x))
        m, many = moves.shape[-2], len(self.baselines)
        limit = chunk_rows(self._row_cost(gradients), self._batch_bytes(), at_most=_MAX_ROWS)
        variants = m * many
        per_rows, per_variants = (limit // variants, variants) if variants <= limit else (1, limit)
        for start in range(first, last, per_rows):
            part = slice(start, min(last, start + per_rows))
            x = self.x[part, None]
            own = moves[part.start - first : part.stop - first] if moves.ndim == 3 else moves
            for chosen in torch.arange(variants).split(per_variants):
                of_moves = chosen % m
                z = self._to_entries(own[..., of_moves, :].to(self.x), part)
                self.evaluations += len(chosen) * (part.stop - part.start)
                if not self.neighbourhood.multiplicative:
                    yield part, of_moves, x + z, None
                    continue
                baseline = self.baselines[chosen // m] if many > 1 else self.baselines
                offset = x - baseline
                keep = 1 - z if isinstance(self.neighbourhood, OneHot) else z
                yield part, of_moves, torch.addcmul(baseline.expand(1, -1, -1), keep, offset), offset

    def _picked(self, points: Tensor, part: slice) -> Tensor:
        """Scores (rows, moves) of each row's target."""
        r, m = points.shape[:2]
        scores = self.view.apply(self._inputs(points))
        return scores.reshape(r, m, -1).gather(2, self.target[part, None, None].expand(r, m, 1))[..., 0]

    def _inputs(self, points: Tensor) -> Float[Tensor, "input ..."]:
        """(..., entries) -> as many inputs, in the shape and the memory format of X."""
        return points.reshape(-1, *self.shape[1:]).contiguous(memory_format=self._format)

    def _to_entries(self, of_features: Tensor, part: slice = slice(None)) -> Tensor:
        """(..., features) -> (..., entries): every entry has the value of its feature."""
        if self.index is None:
            return of_features
        if len(self.index) == 1:
            return of_features[..., self.index[0]]
        index = self.index[part]
        own = of_features if of_features.ndim == 3 else of_features[None].expand(len(index), -1, -1)
        return own.gather(2, index[:, None].expand(-1, own.shape[1], -1))

    def _to_features(self, of_entries: Tensor, part: slice = slice(None)) -> Tensor:
        """(rows, m, entries) -> (rows, m, features): sum over the entries of each feature."""
        if self.index is None:
            return of_entries
        index = (self.index if len(self.index) == 1 else self.index[part])[:, None].expand(of_entries.shape)
        out = of_entries.new_zeros(*of_entries.shape[:2], self.features)
        return out.scatter_add_(2, index, of_entries)

    def _scores(self, x: Tensor) -> Float[Tensor, "row output"]:
        """Scores of the rows themselves. A failure here is of f or of the shape of X, and is said in those words."""
        found = []
        with torch.no_grad(), self._mode():
            try:
                for part in chunks(len(x), self._row_cost(gradients=False), self._batch_bytes()):
                    found.append(self.view.apply(x[part].clone()))  # f may write into what it is given
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise ModelError(f"f failed on rows of shape {tuple(x.shape[1:])}: {error}") from error
        shapes = {tuple(part.shape) for part in found}
        if any(len(shape) != 2 for shape in shapes) or sum(len(part) for part in found) != len(x):
            raise ModelError(f"f must give (n,) or (n, classes) scores, got {sorted(shapes)} for {len(x)} rows")
        return torch.cat(found)

    def _batch_bytes(self) -> int:
        """Memory for one call of f. On a CPU small batches are as fast, and large ones spend their time on fresh pages."""
        return self.share(8 if self.x.device.type == "cpu" else 2)

    def _row_cost(self, gradients: bool) -> float:
        if gradients not in self._cost:
            row = self._inputs(self.x[:1])
            moving = 4 * row.numel() * row.element_size() + 64 * row.numel()
            if not self.view.is_estimator:
                with self._mode():
                    moving += bytes_per_row(_Scores(self.view), row.clone(), gradients=gradients)
            self._cost[gradients] = moving
        return self._cost[gradients]

    def _mode(self):
        return evaluation_mode(self.view.model) if self.view.is_module else nullcontext()


class _Scores(nn.Module):
    """The scores of a view, as the module whose memory can be measured."""

    def __init__(self, view: ModelView) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return self.view.apply(x)


def view_of(f: Any) -> ModelView:
    """A view of ``f`` whose numbers are what is explained."""
    if isinstance(f, ModelView):
        return f
    if isinstance(f, nn.Module):
        return ModelView(f, output="raw")
    if hasattr(f, "predict") and not isinstance(f, type):
        return ModelView(f, output="probability" if hasattr(f, "predict_proba") else "value")
    if not callable(f) or isinstance(f, type):
        raise ModelError(f"f must be an nn.Module, a fitted estimator or a callable, got {f!r}")
    return ModelView(_tensor_valued(f), output="raw")


def _are_probabilities(scores: Tensor) -> bool:
    """Whether each row is a distribution, as after a softmax, which a second one would flatten."""
    off = (scores.double().sum(dim=1) - 1).abs()
    return bool((scores >= 0).all()) and bool((off < 1e-4 + 2 * torch.finfo(scores.dtype).eps).all())


def _tensor_valued(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def scores(x: Tensor) -> Tensor:
        out = torch.as_tensor(f(x), device=x.device)
        if out.ndim not in (1, 2):
            raise ModelError(f"f must give (n,) or (n, classes) scores, got {tuple(out.shape)} for {len(x)} rows")
        return out

    return scores


def _checked_rows(X: Any, view: ModelView) -> Tensor:
    try:
        x = X.detach() if isinstance(X, Tensor) else torch.as_tensor(_numbers(np.asarray(X)))
    except (TypeError, ValueError) as error:
        raise DataError(f"X must be an array of numbers, (n, d) or (n, channels, height, width): {error}") from error
    if x.ndim < 2 or x.numel() == 0:
        raise DataError(f"X must be (n, d) or (n, channels, height, width) with at least one row, got {tuple(x.shape)}")
    if x.is_complex():
        raise DataError(f"X must be real numbers, got {x.dtype}")
    x = x if x.is_floating_point() else x.float()
    broken = (~torch.isfinite(x)).nonzero()
    if len(broken):
        where = broken[0].tolist()
        raise DataError(f"X has {len(broken)} values that are not finite, the first is {x[tuple(where)]} at {where}")
    weight = next((p for p in view.model.parameters() if p.is_floating_point()), None) if view.is_module else None
    return x if weight is None else x.to(weight)


def _numbers(values: np.ndarray) -> np.ndarray:
    """Numbers that a table keeps as objects, as floats; text is refused."""
    if values.dtype.kind in "USO" and any(isinstance(value, str) for value in values.ravel()):
        raise TypeError("it has text in it")
    if values.dtype.kind == "O":
        return values.astype(np.float64)
    return values if values.flags.writeable else values.copy()


def _class_index(target: Any, device: torch.device) -> Tensor | int | None:
    if target is None:
        return None
    try:
        given = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"target must be a class index, one or one per row, got {target!r}") from error
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.ndim > 1:
        raise InputError(f"target must be a class index (an integer), one or one per row, got {target!r}")
    return int(given) if given.ndim == 0 else given.long()


def _baselines(baseline: Any, x: Tensor) -> Tensor:
    """(m, entries): one baseline, or the background set."""
    try:
        given = torch.as_tensor(baseline, device=x.device).to(x.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"baseline must be numbers, got {baseline!r}") from error
    one = tuple(x.shape[1:])
    if given.ndim == x.ndim and given.shape[1:] == x.shape[1:] and len(given):
        out = given.reshape(len(given), -1)
    else:
        try:
            out = given.expand(one).reshape(1, -1)
        except RuntimeError as error:
            raise InputError(
                f"baseline must be a number, one input {one} or a background set (m, ...) of them, got {tuple(given.shape)}"
            ) from error
    return _finite(out, "the baseline")


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{what} is not finite in {int((~torch.isfinite(values)).sum())} places; it must be everywhere")
    return values


def _shifted(part: slice, rows: slice) -> slice:
    start = rows.start or 0
    return slice(part.start - start, part.stop - start)


def _add(out: Tensor, of_moves: Tensor, found: Tensor) -> None:
    """Add to out (rows, m, ...) what was found for some moves, of which several may be the same one at other baselines."""
    out.index_add_(1, of_moves.to(out.device), found)
