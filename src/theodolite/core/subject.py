"""What is surveyed: a model, the data it is used on, and how to train it again."""

__all__ = ["Answer", "Column", "Dataset", "Holdout", "Rows", "Subject"]

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from theodolite.core.errors import DataError, ModelError
from theodolite.core.estimate import Estimate, bootstrap, proportion
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.next_token import next_tokens
from theodolite.core.train import Recipe, train
from theodolite.core.view import ModelView, Output, evaluation_mode

Modality = Literal["tabular", "image", "text", "series", "graph", "interactions"]
Task = Literal["classification", "regression", "language"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs ``x`` (n, ...) float and targets ``y`` (n,): class indices (long) or values (float).

    For a language model x are token ids (n, length), long and without padding, and y is the number of the text that each
    row comes from: rows of one text belong together. Of a series, groups (n,) tells which rows are neighbours in time:
    an interval is then over groups, not over rows. domain (n,): the number of each row's site, a level of the data's
    ``domains``.
    """

    x: Tensor
    y: Tensor
    groups: Tensor | None = None
    domain: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"Rows({len(self):,} of shape {tuple(self.x.shape[1:])})"

    @property
    def blocks(self) -> np.ndarray | None:
        """The groups as an array, None where each row stands for itself: what `bootstrap` takes."""
        return None if self.groups is None else self.groups.numpy()

    def head(self, n: int) -> "Rows":
        """The first ``n`` rows (rows are in random order already)."""
        groups, domain = (None if part is None else part[:n] for part in (self.groups, self.domain))
        return Rows(self.x[:n], self.y[:n], groups, domain)


@dataclass(frozen=True)
class Column:
    """One column of a table as it was found in the file."""

    name: str
    kind: Literal["numeric", "category", "boolean"]
    missing: int
    levels: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features it becomes: its own, or "column=level" for each level of a category."""
        return tuple(f"{self.name}={level}" for level in self.levels) if self.kind == "category" else (self.name,)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows in three disjoint parts: one to fit on, one to select on, one to report on.

    x of every part is what the model takes: (n, features) for a table, (n, channels, height, width) for images,
    (n, dimensions) for texts that were embedded, (n, steps, channels) for series: y is then the class of each, or the
    value of the first channel that comes next. features names the columns of a table's x or a series' channels.
    classes[i] is the name of class i, () for a regression. notes tell what the loader found and did, for people to read.
    scaling: (shift, scale) of each of a table's features, whose value in the file is shift + scale * x; () where x is in
    the file's units. domains: the column that names each row's site, where the user named one. unlabelled: x (n, features)
    of a table's rows whose class nobody has named; they are in no part.
    """

    name: str
    modality: Modality
    task: Task
    train: Rows
    validation: Rows
    test: Rows
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()
    scaling: tuple[tuple[float, float], ...] = ()
    domains: Column | None = None
    unlabelled: Tensor | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(rows):,}" for part, rows in self.parts.items())
        return f"Dataset({self.name!r}, {self.modality}, {self.task}, rows of shape {self.shape}: {sizes})"

    def __post_init__(self) -> None:
        if self.scaling and len(self.scaling) != len(self.features):
            raise DataError(f"{self.name}: {len(self.scaling)} scales for {len(self.features)} features")
        for part, rows in self.parts.items():
            if len(rows) == 0:
                raise DataError(f"{self.name}: the {part} part has no rows; give more data or another split")
            if len(rows.x) != len(rows.y):
                raise DataError(f"{self.name}: {len(rows.x)} inputs but {len(rows.y)} targets in the {part} part")
            if not bool(torch.isfinite(rows.x).all()) or not bool(torch.isfinite(rows.y.double()).all()):
                raise DataError(
                    f"{self.name}: the {part} part holds NaN or infinite values; settle them with --missing"
                )
            if rows.x.shape[1:] != self.train.x.shape[1:]:
                raise DataError(f"{self.name}: {part} rows have another shape than train rows")
            if self.task == "language" and (rows.x.dtype != torch.long or rows.x.ndim != 2 or rows.x.shape[1] < 2):
                raise DataError(f"{self.name}: rows for a language model are token ids (n, at least 2), dtype long")
        if self.task == "classification":
            if len(self.classes) < 2:
                raise DataError(f"{self.name}: a classification needs at least two classes, found {list(self.classes)}")
            labels = torch.cat([rows.y for rows in self.parts.values()])
            if labels.dtype != torch.long or int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
                raise DataError(f"{self.name}: labels must be class indices 0..{len(self.classes) - 1}")
            if len(torch.unique(self.train.y)) < 2:
                raise DataError(f"{self.name}: all training rows are of one class, so there is nothing to learn")
        if self.modality == "series" and self.train.x.ndim != 3:
            raise DataError(f"{self.name}: series are (n, steps, channels), got {tuple(self.train.x.shape)}")
        if self.features and len(self.features) != (width := self.train.x.shape[2 if self.modality == "series" else 1]):
            raise DataError(f"{self.name}: {len(self.features)} feature names for {width} columns")

    @property
    def parts(self) -> dict[str, Rows]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    @cached_property
    def levels(self) -> dict[str, tuple[str, str]]:
        """The column and the level that a feature stands for, of those that are 1 in rows of one level of a category."""
        return {
            feature: (one.name, level)
            for one in self.columns
            if one.kind == "category"
            for feature, level in zip(one.features, one.levels, strict=True)
        }

    @property
    def forecasts(self) -> bool:
        """Whether the target of a window is the next value of its first channel."""
        return self.modality == "series" and self.task == "regression" and self.train.groups is not None

    @cached_property
    def chance(self) -> float:
        """Test accuracy of always answering the commonest training class (or token); of a forecast the R2 of answering with
        the last value; 0 for another regression (R2 of the mean).
        """
        if self.forecasts:
            return float(r2_score(self.test.y.numpy(), self.test.x[:, -1, 0].numpy()))
        if self.task == "regression":
            return 0.0
        if self.task == "language":
            tokens, counts = self.train.x.unique(return_counts=True)
            return float((self.test.x[:, 1:] == tokens[counts.argmax()]).double().mean())
        commonest = int(torch.bincount(self.train.y).argmax())
        return float((self.test.y == commonest).double().mean())


@runtime_checkable
class Answer(Protocol):
    """What a holdout answers: the value, a bound on its error, the looks left (None: not counted)."""

    @property
    def value(self) -> float:
        """The answer."""
        ...

    @property
    def error_bound(self) -> float:
        """How far it may be off."""
        ...

    @property
    def budget_left(self) -> int | None:
        """Answers that may still come from the test rows."""
        ...


@runtime_checkable
class Holdout(Protocol):
    """Answers questions about the test rows so that later questions may depend on earlier answers."""

    def ask(self, query: tuple[np.ndarray, np.ndarray], *, name: str = "") -> Answer:
        """Mean over the test rows of values in [0, 1], given as (on the validation rows, on the test rows)."""
        ...


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its data: all that a chart may look at.

    predictor: an nn.Module (rows -> (n, classes) scores, or (n,) / (n, 1) values), a fitted scikit-learn style
    estimator, or for the task "language" a causal language model (token ids -> logits) with its tokenizer. build(seed)
    makes a fresh untrained network of the same architecture; with a recipe the model can be trained again. holdout is how
    selection loops ask the test rows; every chart shares it.
    """

    name: str
    data: Dataset
    predictor: Any
    build: Callable[[int], nn.Module] | None = None
    recipe: Recipe | None = None
    description: str = ""
    holdout: Holdout | None = None
    notes: tuple[str, ...] = field(default=())
    tokenizer: Any = None

    def __repr__(self) -> str:
        return f"Subject({self.name!r}, {self.model_name}, {self.data!r})"

    def __post_init__(self) -> None:
        """Ask the model for two rows, so that what does not fit is told before any work starts."""
        rows = self.data.train.x[:2]
        if self.is_language_model:
            self._try_tokens(rows)
            return
        try:
            out = self.view("raw" if self.is_network else "probability" if self._classifies else "value")(rows)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"{self.name}: the model cannot take rows of shape {self.data.shape}: {error}") from error
        width = out.shape[1]
        if self._classifies and width not in {len(self.data.classes), 1 if len(self.data.classes) == 2 else -1}:
            raise ModelError(
                f"{self.name}: the model gives {width} scores a row but the data have {len(self.data.classes)} classes "
                f"({', '.join(self.data.classes[:5])}{', ...' if len(self.data.classes) > 5 else ''})"
            )
        if not bool(torch.isfinite(out).all()):
            raise ModelError(f"{self.name}: the model answers NaN or infinity on the first rows of the data")

    def _try_tokens(self, rows: Tensor) -> None:
        if not self.is_network:
            raise ModelError(f"{self.name}: a language model must be an nn.Module, got {self.model_name}")
        try:
            found = next_tokens(self.predictor, rows)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(
                f"{self.name}: the model cannot take token ids of shape {self.data.shape}: {error}"
            ) from error
        if not bool(torch.isfinite(found.loss).all()):
            raise ModelError(f"{self.name}: the model answers NaN or infinity on the first rows of the data")

    @property
    def is_language_model(self) -> bool:
        """Whether the predictor is a causal language model over token ids."""
        return self.data.task == "language"

    @property
    def is_network(self) -> bool:
        """Whether the predictor is a network: differentiable, with named layers."""
        return isinstance(self.predictor, nn.Module)

    @property
    def model_name(self) -> str:
        """The kind of model; of a wrapped estimator its own."""
        return type(getattr(self.predictor, "estimator", self.predictor)).__name__

    @property
    def retrainable(self) -> bool:
        """Whether the network can be trained again from its start."""
        return self.build is not None and self.recipe is not None

    @property
    def _classifies(self) -> bool:
        return self.data.task == "classification"

    @property
    def metric(self) -> str:
        """What quality is measured in."""
        if self.is_language_model:
            return "next-token accuracy"
        return "accuracy" if self._classifies else "R2"

    def view(self, output: Output = "probability", *, memory: int | None = None) -> ModelView:
        """The predictor as a batched function."""
        return ModelView(self.predictor, output=output, memory=memory)

    def with_holdout(self, holdout: Holdout) -> "Subject":
        """The same subject, whose selection loops ask ``holdout``."""
        return replace(self, holdout=holdout)

    def fit(self, model: nn.Module, *, seed: int = 0) -> nn.Module:
        """Train ``model`` in place on the training rows by the subject's recipe."""
        if self.recipe is None:
            raise ModelError(f"{self.name} has no recipe, so it cannot be trained again")
        train(model, self.data.train.x, self.data.train.y, recipe=self.recipe.with_seed(seed))
        return model

    def correct(self, model: Any, rows: Rows) -> np.ndarray:
        """Per row in [0, 1]: whether the class is right, or for a regression 1 minus the squared error in units of the
        variance of the training targets, cut at 0 (so that its mean is a floor of R2 and can be asked of a holdout); for a
        language model the share of the row's next tokens that it predicts.
        """
        if self.is_language_model:
            return next_tokens(model, rows.x).right.double().mean(dim=1).numpy()
        if self._classifies:
            return (ModelView(model, output=self._scores(model)).predict(rows.x) == rows.y).double().numpy()
        error = (ModelView(model, output="value")(rows.x)[:, 0].double() - rows.y.double()) ** 2
        return (1 - error / self.data.train.y.double().var()).clamp(0, 1).numpy()

    def quality(self, model: Any | None = None, *, part: Literal["train", "validation", "test"] = "test") -> Estimate:
        """Accuracy with its exact interval, or R2 (by rows) or next-token accuracy (by texts) with a bootstrap interval."""
        if model is None:
            if part not in self._qualities:
                self._qualities[part] = self.quality(self.predictor, part=part)
            return self._qualities[part]
        rows = self.data.parts[part]
        if self._classifies:
            right = self.correct(model, rows)
            return proportion(int(right.sum()), len(right), unit="accuracy")
        if self.is_language_model:
            return bootstrap(self.correct(model, rows), groups=rows.y.numpy(), unit=self.metric)
        pairs = np.stack([rows.y.numpy(), ModelView(model, output="value")(rows.x)[:, 0].numpy()], axis=1)
        return bootstrap(
            pairs, lambda p: float(r2_score(p[:, 0], p[:, 1])) if len(p) > 1 else 0.0, unit="R2",
            groups=rows.blocks,
        )  # fmt: skip

    @cached_property
    def _qualities(self) -> dict[str, Estimate]:
        """Of the subject's own model, by part, once asked."""
        return {}

    @staticmethod
    def _scores(model: Any) -> Output:
        return "logit" if isinstance(model, nn.Module) else "probability"

    @cached_property
    def parameter_count(self) -> int | None:
        """Trainable numbers of a network, tied ones once; None for a black box."""
        return sum(p.numel() for p in self.predictor.parameters()) if self.is_network else None

    @cached_property
    def is_small(self) -> bool:
        """Whether a batch of the network is so little work that one thread does it soonest; False for a black box."""
        if not self.is_network or self.parameter_count is None or self.parameter_count > 1_000_000:
            return False
        with evaluation_mode(self.predictor):
            return bytes_per_row(self.predictor, self.data.train.x[:1], gradients=False) * 64 < 1 << 23

    @cached_property
    def training_seconds(self) -> float:
        """What one training by the recipe takes here, from the time of a few steps."""
        if self.build is None or self.recipe is None:
            raise ModelError(f"{self.name} cannot be trained again, so there is no time to tell")
        per_epoch = -(-len(self.data.train) // self.recipe.batch_size)
        timed = min(20, per_epoch)
        rows = self.data.train.head(self.recipe.batch_size * timed)
        one_epoch = replace(self.recipe, epochs=1, patience=None)
        model, first = self.build(0), rows.head(self.recipe.batch_size)
        train(model, first.x, first.y, recipe=one_epoch)  # the first step allocates
        started = time.perf_counter()
        train(model, rows.x, rows.y, recipe=one_epoch)
        return (time.perf_counter() - started) / timed * per_epoch * self.recipe.epochs

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the data and of the model (its weights, or a black box's answers to the first rows)."""
        digest = hashlib.sha256("\0".join((*self.data.features, *self.data.classes)).encode())
        for rows in self.data.parts.values():
            digest.update(rows.x.contiguous().numpy().tobytes())
            digest.update(rows.y.contiguous().numpy().tobytes())
        if self.data.domains is not None:
            digest.update(repr(self.data.domains).encode())
        for more in (*(rows.domain for rows in self.data.parts.values()), self.data.unlabelled):
            if more is not None:
                digest.update(more.contiguous().numpy().tobytes())
        if self.is_network:
            for name, value in self.predictor.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        else:
            output: Output = "probability" if self._classifies else "value"
            digest.update(self.view(output)(self.data.test.x[:256]).numpy().round(6).tobytes())
        return digest.hexdigest()

    def flat(self, part: Literal["train", "validation", "test"]) -> np.ndarray:
        """Inputs of one part as (n, numbers) float64."""
        rows = self.data.parts[part].x
        out = np.empty((len(rows), int(np.prod(self.data.shape))), dtype=np.float64)
        for piece in chunks(len(rows), out.shape[1] * 8):
            out[piece] = rows[piece].reshape(len(rows[piece]), -1).double().numpy()
        return out
