"""Simulation tests: who can predict what the model answers, before and after explanations were seen.

Forward: learn from inputs with the model's answers, predict its answers on new inputs; then see explanations of the learning
inputs and predict the same new inputs again. Counterfactual: predict the answer on a perturbation of a shown input, without
and with the explanation of the original. Explanations of what is tested are never shown.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 4).
"""

__all__ = ["CannotBalance", "CounterfactualTest", "DegenerateModel", "ForwardTest", "NoFlips", "SimulationProtocol"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.view import ModelView
from theodolite.explanations.simulatability.domain import Domain, TableDomain, TextDomain

_DRAWS = 500


class CannotBalance(DataError):
    """A kind of prediction is too rare for a balanced test; ``largest`` is the largest test that these rows allow."""

    def __init__(self, cell: str, have: int, need: int, largest: int) -> None:
        self.cell, self.have, self.need, self.largest = cell, have, need, largest
        super().__init__(
            f"a balanced test needs {need} rows that are {cell}, there are {have}; the largest test with this learning set "
            f"has {largest} items. Give more rows, a smaller test or learning set, or balance='outputs'"
        )


class NoFlips(DataError):
    """For too many inputs no small perturbation changes the model's answer."""


class DegenerateModel(ModelError):
    """The model gives all rows the same answer, so there is nothing to predict."""


@dataclass(frozen=True, eq=False)
class ForwardTest:
    """A forward test. items are predicted twice, in the order they stand and then in ``post_order``.

    learning, items: raw inputs. model_outputs: class (0 or 1) of each item. ids: rows of X that the items are, learning_ids
    those of the learning inputs, with the model's learning_outputs.
    """

    learning: Any
    items: Any
    model_outputs: Int[np.ndarray, " item"]
    ids: Int[np.ndarray, " item"]
    learning_ids: Int[np.ndarray, " learning"]
    learning_outputs: Int[np.ndarray, " learning"]
    post_order: Int[np.ndarray, " item"]


@dataclass(frozen=True, eq=False)
class CounterfactualTest:
    """A counterfactual test. perturbed: what the model takes. flips: whether its answer changes. replaced: inputs without a flip.

    model_outputs: class of each original item; codes: of items and perturbations in the domain's values.
    """

    items: Any
    perturbed: Any
    flips: Bool[np.ndarray, " item"]
    ids: Int[np.ndarray, " item"]
    model_outputs: Int[np.ndarray, " item"]
    codes: Int[np.ndarray, "item slot"]
    perturbed_codes: Int[np.ndarray, "item slot"]
    replaced: int

    @property
    def perturbed_outputs(self) -> Int[np.ndarray, " item"]:
        """Class that the model gives each perturbation."""
        return np.where(self.flips, 1 - self.model_outputs, self.model_outputs)


class SimulationProtocol:
    """Leak-free tests of how well a reader predicts a model of two classes.

    model: an nn.Module, an estimator with predict_proba, or a callable rows -> (n,), (n, 1) or (n, 2) probabilities. X: (n,
    features) array or data frame, or a sequence of texts (kind="text"). y: (n,) true labels. categorical: columns whose
    values are kinds. learning, test: sizes. labels: the two answers in words. balance: "errors" takes true and false
    positives and negatives in equal numbers, so that knowing the true label gains nothing; "outputs" only the answers, for
    readers who know nothing of the task. agree_with: other models; only rows and perturbations that all answer alike are used.

    Raises DegenerateModel, CannotBalance, NoFlips (by `counterfactual`), and InputError or DataError for what does not fit.

    >>> X = np.random.default_rng(0).normal(size=(400, 3))
    >>> protocol = SimulationProtocol(lambda x: (x[:, 0] > 0) * 1.0, X, X[:, 0] + X[:, 1] > 0, ["a", "b", "c"])
    >>> test = protocol.forward()
    >>> len(test.learning), len(test.items), float(test.model_outputs.mean())
    (16, 32, 0.5)
    """

    def __init__(
        self,
        model: Any,
        X: Any,
        y: Any,
        feature_names: Sequence[str] | None = None,
        *,
        kind: Literal["tabular", "text"] = "tabular",
        categorical: Sequence[str | int] | None = None,
        seed: int = 0,
        learning: int = 16,
        test: int = 32,
        labels: Sequence[str] | None = None,
        balance: Literal["errors", "outputs"] = "errors",
        agree_with: Sequence[Any] = (),
        most_changes: int = 3,
    ) -> None:
        if kind not in ("tabular", "text") or balance not in ("errors", "outputs"):
            raise InputError(f"kind is tabular or text, balance errors or outputs; got {kind!r} and {balance!r}")
        cells = 4 if balance == "errors" else 2
        if learning < cells or test < cells or learning % cells or test % cells or most_changes < 1:
            raise InputError(
                f"learning and test must be multiples of {cells} to be balanced, and most_changes at least 1; got "
                f"{learning}, {test} and {most_changes}"
            )
        self.model, self.seed, self.learning, self.test = model, int(seed), learning, test
        self.kind, self.balance, self.most_changes, self._agree = kind, balance, most_changes, tuple(agree_with)
        self.X = list(X) if kind == "text" else X if isinstance(X, pd.DataFrame) else _table(X)
        self.domain: Domain = self._make_domain(feature_names, categorical)
        self.codes = self.domain.encode(self.X)
        self.probabilities = positive(model, self.X)
        self.outputs = (self.probabilities > 0.5).astype(np.int64)
        if len(self.probabilities) != len(self.X):
            raise ModelError(f"the model gave {len(self.probabilities)} answers for {len(self.X)} rows")
        if len(np.unique(self.outputs)) < 2:
            raise DegenerateModel(f"the model answers class {self.outputs[0]} on all {len(self.X)} rows")
        self.y, names = self._labels(y)
        if labels is not None and len(labels) != 2:
            raise InputError(f"labels must be two names, got {list(labels)}")
        self.labels: tuple[str, ...] = tuple(map(str, labels)) if labels is not None else names
        self._usable = np.ones(len(self.X), dtype=bool)
        for other in self._agree:
            self._usable &= (positive(other, self.X) > 0.5) == self.outputs
        self._test_ids = self._choose(self.test, np.random.default_rng([self.seed, 1]), self._usable, self.learning)
        self._tested = np.zeros(len(self.X), dtype=bool)
        self._tested[self._test_ids] = True

    def _make_domain(self, names: Sequence[str] | None, categorical: Sequence[str | int] | None) -> Domain:
        X: Any = self.X
        if self.kind == "text":
            return TextDomain(X)
        if names is None:
            names = list(map(str, X.columns)) if isinstance(X, pd.DataFrame) else [f"x{i}" for i in range(X.shape[1])]
        return TableDomain(X, names, categorical)

    def _labels(self, y: Any) -> tuple[np.ndarray, tuple[str, ...]]:
        given = np.asarray(y).ravel()
        if len(given) != len(self.X):
            raise DataError(f"y has {len(given)} labels for {len(self.X)} rows")
        classes = np.asarray(getattr(self.model, "classes_", np.unique(given)))
        if len(classes) != 2:
            raise DataError(
                f"a simulation test asks for one of two answers; there are {len(classes)} classes. Ask about one of them: "
                "model=lambda X: model.predict_proba(X)[:, k], y=(y == k)"
            )
        if not np.isin(given, classes).all():
            raise DataError(f"y has labels that the model does not know; it knows {classes.tolist()}")
        return (given == classes[1]).astype(np.int64), tuple(str(name) for name in classes)

    def _cells(self) -> dict[str, np.ndarray]:
        said, true = self.outputs == 1, self.y == 1
        if self.balance == "outputs":
            return {"answered positive": said, "answered negative": ~said}
        return {
            "true positives": said & true,
            "false positives": said & ~true,
            "true negatives": ~said & ~true,
            "false negatives": ~said & true,
        }

    def _choose(self, n: int, rng: np.random.Generator, free: np.ndarray, spare: int = 0) -> np.ndarray:
        """n rows of ``free`` in random order, as many of each cell; ``spare`` more must be left over."""
        cells = {name: np.flatnonzero(of & free) for name, of in self._cells().items()}
        each, left = n // len(cells), spare // len(cells)
        scarce = min(cells, key=lambda name: len(cells[name]))
        have = len(cells[scarce])
        if have < each + left:
            raise CannotBalance(scarce, have, each + left, max(0, have - left) * len(cells))
        return rng.permutation(np.concatenate([rng.choice(rows, each, replace=False) for rows in cells.values()]))

    @property
    def pool(self) -> Int[np.ndarray, " row"]:
        """Rows that no forward test asks about: what may be explained, or shown as an example."""
        return np.flatnonzero(~self._tested)

    def rows(self, ids: Any) -> Any:
        """Raw inputs by row number."""
        if self.kind == "text":
            return [self.X[i] for i in np.asarray(ids)]
        return self.X.iloc[ids] if isinstance(self.X, pd.DataFrame) else self.X[ids]

    def row(self, index: int | np.integer) -> Any:
        """One raw input."""
        if isinstance(self.X, pd.DataFrame):
            return self.X.iloc[index].to_numpy(dtype=object)
        return self.X[index]

    def answer(
        self, codes: Int[np.ndarray, "row slot"], row: Any, rng: np.random.Generator | None = None
    ) -> Float[np.ndarray, " row"]:
        """The model's probability of class 1 on inputs that differ from ``row`` as ``codes`` says; rng: within bins too."""
        return positive(self.model, self.domain.realise(codes, row, rng))

    def forward(self, user: int = 0) -> ForwardTest:
        """The forward test of reader number ``user``: the same items for all, learning inputs of their own."""
        free = self._usable & ~self._tested
        learning = self._choose(self.learning, np.random.default_rng([self.seed, 2, user]), free)
        order = np.random.default_rng([self.seed, 3, user]).permutation(self.test)
        return ForwardTest(
            self.rows(learning), self.rows(self._test_ids), self.outputs[self._test_ids], self._test_ids, learning,
            self.outputs[learning], order,
        )  # fmt: skip

    def counterfactual(self) -> CounterfactualTest:
        """The counterfactual test: of each cell half of the perturbations change the model's answer.

        Each perturbation changes 1 to most_changes slots and is one of 500; where none of them flips, of 5,000; an input
        without any is replaced by another of its cell. Raises NoFlips where that is more than a fifth of those tried.
        """
        cells = self._cells()
        if self.test % (2 * len(cells)):
            raise InputError(
                f"a counterfactual test must have a multiple of {2 * len(cells)} items to be balanced, got {self.test}"
            )
        rng, each = np.random.default_rng([self.seed, 4]), self.test // len(cells)
        self._choose(self.test, rng, self._usable & ~self._tested)  # says so if there are too few
        ids, new, flips, tried, replaced = [], [], [], 0, 0
        for name, of in cells.items():
            waiting = rng.permutation(np.flatnonzero(of & self._usable & ~self._tested)).tolist()
            for k in range(each):
                wanted = k < each // 2
                while True:
                    if not waiting:
                        raise NoFlips(
                            f"of {name} too few have a perturbation of up to {self.most_changes} changes that "
                            f"{'changes' if wanted else 'keeps'} the model's answer; raise most_changes or give more rows"
                        )
                    row = int(waiting.pop())
                    found = self._perturbation(row, wanted, rng)
                    tried += 1
                    if found is not None:
                        break
                    replaced += 1
                ids.append(row)
                new.append(found)
                flips.append(wanted)
        if replaced > 0.2 * tried:
            raise NoFlips(
                f"{replaced} of {tried} inputs have no perturbation of up to {self.most_changes} changes that flips the model's "
                "answer; what is left would be a test of unusual inputs. Raise most_changes"
            )
        order = rng.permutation(len(ids))
        ids, codes = np.array(ids)[order], np.stack(new)[order]
        realised = [self.domain.realise(codes[i : i + 1], self.row(ids[i])) for i in range(len(ids))]
        return CounterfactualTest(
            self.rows(ids), _joined(realised), np.array(flips)[order], ids, self.outputs[ids], self.codes[ids], codes,
            replaced,
        )  # fmt: skip

    def _perturbation(self, row: int, flip: bool, rng: np.random.Generator) -> np.ndarray | None:
        if not len(self.domain.changeable(self.codes[row])):
            return None
        for n in (_DRAWS, 10 * _DRAWS):
            codes = self.domain.perturb(self.codes[row], n, rng, most=self.most_changes)
            rows = self.domain.realise(codes, self.row(row))
            answer = positive(self.model, rows) > 0.5
            good = (answer != self.outputs[row]) == flip
            for other in self._agree:
                good &= (positive(other, rows) > 0.5) == answer
            if good.any():
                return codes[rng.choice(np.flatnonzero(good))]
        return None


def positive(model: Any, rows: Any) -> Float[np.ndarray, " row"]:
    """Probability of class 1 for each row, from a network, an estimator or a callable."""
    if isinstance(model, nn.Module):
        if isinstance(rows, list):
            raise ModelError("a network takes numbers; give a callable texts -> probabilities")
        numbers = np.require(np.asarray(rows), np.float64, ["C", "W"])  # torch wants what it could write to
        weight = next(iter(model.parameters()), torch.zeros(0))
        found = ModelView(model)(torch.as_tensor(numbers).to(weight)).double().cpu().numpy()
    else:
        call = getattr(model, "predict_proba", model)
        if not callable(call):
            raise ModelError(f"model must be a network, have predict_proba or be callable, got {type(model).__name__}")
        found = np.asarray(call(rows), dtype=np.float64)
    if found.ndim == 2 and found.shape[1] in (1, 2):
        found = found[:, -1]
    if found.ndim != 1:
        raise ModelError(
            f"the model must give (n,), (n, 1) or (n, 2) probabilities, got {found.shape}; for more classes ask about one: "
            "model=lambda X: model.predict_proba(X)[:, k], y=(y == k)"
        )
    if not np.isfinite(found).all() or (found < 0).any() or (found > 1).any():
        raise ModelError("the model must give probabilities between 0 and 1; wrap scores in a sigmoid")
    return found


def _table(X: Any) -> np.ndarray:
    rows = np.asarray(X)
    if rows.ndim != 2 or not rows.size:
        raise DataError(f"X must be a table (n, features) with rows, got shape {rows.shape}")
    return rows


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], list):
        return [text for part in parts for text in part]
    return pd.concat(parts, ignore_index=True) if isinstance(parts[0], pd.DataFrame) else np.concatenate(parts)
