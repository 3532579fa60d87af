"""Fitted scikit-learn estimators from skops files, as black boxes that take the features of a data set."""

__all__ = ["BlackBox", "SkopsModel", "load_skops"]

import importlib
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import skops.io
from sklearn.base import is_classifier, is_regressor
from sklearn.exceptions import InconsistentVersionWarning, NotFittedError
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from theodolite.core.errors import InputError, ModelError, UnsafeFileError
from theodolite.core.loading.automatic import Made
from theodolite.core.loading.columns import Encoding
from theodolite.core.loading.data import Loaded
from theodolite.core.loading.images import check_size
from theodolite.core.loading.labels import class_name
from theodolite.core.loading.options import Wanted

_CLASSES_OF = ("sklearn.", "scipy.sparse.", "scipy.interpolate.", "scipy.spatial.", "numpy.random.")
_FUNCTIONS_OF = ("sklearn.feature_selection.", "sklearn.metrics.")


def load_skops(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The estimator of a skops file, with notes; UnsafeFileError, and nothing run, where it is not made of known parts.

    Known are what skops trusts, the classes of scikit-learn and of the parts of scipy and numpy that it uses, and the
    scores and kernels of scikit-learn.
    """
    try:
        unknown = [name for name in skops.io.get_untrusted_types(file=path) if not _is_known(name)]
        if unknown:
            raise UnsafeFileError(
                f"{path} holds objects that are not of scikit-learn and could run code, so it was not read: "
                f"{', '.join(unknown[:5])}; bring such a model as package.module:factory or as .onnx"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator = skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except zipfile.BadZipFile as error:
        raise UnsafeFileError(
            f"{path} is not a skops file (perhaps a pickle under another name, which could run code), so it was not read; "
            "write it with skops.io.dump(model, path)"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, IndexError, EOFError, RuntimeError) as error:
        raise ModelError(f"{path} is not a whole skops file: {type(error).__name__}: {error}") from error
    old = [str(item.message) for item in caught if issubclass(item.category, InconsistentVersionWarning)]
    return estimator, (f"written by another version of scikit-learn: {old[0].split('.', 1)[0]}",) if old else ()


def _is_known(name: str) -> bool:
    """Whether ``module.name`` is a class of a known library, or one of its scores and kernels, at its own address."""
    module_name, _, attribute = name.rpartition(".")
    if not f"{module_name}.".startswith(_CLASSES_OF):
        return False
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError:
        return False
    if getattr(found, "__module__", None) != module_name:  # reached through a module that only imports it
        return False
    return isinstance(found, type) or name.startswith(_FUNCTIONS_OF)


class BlackBox:
    """A fitted estimator as a function of a data set's features.

    columns: the names it was fitted with. encoding: given where it was fitted on the columns as the file has them, which
    are then made from the features again.
    """

    def __init__(self, estimator: Any, columns: tuple[str, ...] = (), encoding: Encoding | None = None) -> None:
        self.estimator = estimator
        self._columns = columns
        self._encoding = encoding

    def _rows(self, x: np.ndarray) -> Any:
        if self._encoding is not None:
            return self._encoding.decode(x)
        return pd.DataFrame(x, columns=list(self._columns)) if self._columns else x

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Values (n,) of a regression, or class indices (n,)."""
        found = self.estimator.predict(self._rows(x))
        return self._index(found) if hasattr(self.estimator, "classes_") else np.asarray(found, dtype=np.float64)

    def _index(self, found: np.ndarray) -> np.ndarray:
        classes = [class_name(value) for value in self.estimator.classes_]
        return pd.Series(np.asarray(found).tolist()).map(class_name).map(classes.index).to_numpy(dtype=np.int64)

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (n, classes); 1 for the predicted class of an estimator that gives none."""
        if hasattr(self.estimator, "predict_proba"):
            return np.asarray(self.estimator.predict_proba(self._rows(x)), dtype=np.float64)
        return np.eye(len(self.estimator.classes_))[self.predict(x)]


class _PipelineTexts:
    """The steps of a fitted text pipeline before its last: texts in, vectors out."""

    note = "texts as the vectors that the model's own pipeline makes of them"

    def __init__(self, steps: Pipeline) -> None:
        self._steps = steps

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing is learnt: the pipeline is fitted already."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (n, dimensions), float32."""
        found = self._steps.transform(list(texts))
        check_size(found.shape[0] * found.shape[1])
        return np.asarray(found.todense() if hasattr(found, "todense") else found, dtype=np.float32)

    def features(self) -> tuple[str, ...]:
        """Names of the vectors' dimensions, where the pipeline knows them."""
        try:
            names: Any = self._steps.get_feature_names_out()
            return tuple(map(str, names))
        except (AttributeError, ValueError):
            return ()


class SkopsModel:
    """Any fitted scikit-learn classifier or regressor of a skops file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._estimator, self._notes = load_skops(path)
        what = type(self._estimator).__name__
        if not (is_classifier(self._estimator) or is_regressor(self._estimator)):
            raise ModelError(f"{path} holds a {what}, which is neither a classifier nor a regressor")
        try:
            check_is_fitted(self._estimator)
        except NotFittedError as error:
            raise ModelError(f"{path} holds a {what} that is not fitted; fit it before it is saved") from error
        classes = getattr(self._estimator, "classes_", ())
        if is_classifier(self._estimator) and (len(classes) < 2 or np.ndim(classes[0])):
            raise ModelError(f"{path} holds a {what} that does not choose one of several classes for a row")
        names: Any = getattr(self._estimator, "feature_names_in_", ())
        embedding = None
        if isinstance(self._estimator, Pipeline) and isinstance(
            self._estimator.steps[0][1], (CountVectorizer, HashingVectorizer)
        ):
            embedding = _PipelineTexts(self._estimator[:-1])
        self.wanted = Wanted(
            trained=True,
            task="classification" if is_classifier(self._estimator) else "regression",
            classes=tuple(map(class_name, classes)) if is_classifier(self._estimator) else (),
            columns=tuple(map(str, names)),
            embedding=embedding,
        )

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made:
        """The estimator, taking the features of the data."""
        if epochs is not None:
            raise InputError("--epochs is for networks that are trained here; a skops file holds a trained model")
        estimator, encoding, data = self._estimator, loaded.encoding, loaded.data
        notes, columns = list(self._notes), self.wanted.columns
        if self.wanted.embedding is not None:
            estimator = estimator[-1]
        elif columns:
            raw = encoding is not None and tuple(column.name for column in encoding.columns) == columns
            encoding = encoding if raw else None
            notes.append(
                "columns matched to the model by name"
                + ("; the model gets them as the file has them" if raw else "; categories as one column per level")
            )
        else:
            encoding, takes, width = None, getattr(estimator, "n_features_in_", None), int(np.prod(data.shape))
            if takes is not None and takes != width:
                raise ModelError(
                    f"the model takes {takes} columns and has no names for them, but {data.name} gives {width} "
                    f"({', '.join(data.features[:6])}, ...); fit it on a DataFrame, so that it knows their names"
                )
            notes.append("the model has no names of columns, so they were matched by position")
        if data.task == "classification" and not hasattr(estimator, "predict_proba"):
            notes.append("the model gives no probabilities; the class that it chooses counts as probability 1")
        box = BlackBox(estimator, columns, encoding)
        return Made(box, f"the {type(self._estimator).__name__} of {self._path}", notes=tuple(notes))
