"""ONNX models as black boxes, run by onnxruntime (extra ``onnx``)."""

__all__ = ["OnnxBox", "OnnxModel"]

from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from theodolite.core.errors import InputError, ModelError, require
from theodolite.core.loading.automatic import Made
from theodolite.core.loading.columns import Encoding
from theodolite.core.loading.data import Loaded
from theodolite.core.loading.labels import class_name
from theodolite.core.loading.options import Wanted

_TYPES = {
    "float": np.float32,
    "double": np.float64,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
    "string": object,
}


def _session(path: Path) -> Any:
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        raise ModelError(f"{path} is not an ONNX model that can be run: {str(error)[:300]}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes that have no base of their own."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


class OnnxBox:
    """An ONNX model as a function of a data set's features (n, numbers)."""

    def __init__(self, path: Path, shape: tuple[int, ...], classes: tuple[str, ...], encoding: Encoding | None) -> None:
        self._path, self._shape, self._classes, self._encoding = path, shape, classes, encoding
        self._session = _session(path)
        self.gives_probabilities = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._session = _session(self._path)

    def _feeds(self, x: np.ndarray) -> dict[str, np.ndarray]:
        inputs = self._session.get_inputs()
        if len(inputs) == 1:
            kind = _TYPES[_element(inputs[0].type)]
            return {inputs[0].name: x.reshape(len(x), *self._shape).astype(kind)}
        if self._encoding is None:
            raise ModelError(
                f"{self._path} has {len(inputs)} inputs, which are matched to the columns of a table by name"
            )
        frame = self._encoding.decode(x)
        return {i.name: frame[i.name].to_numpy()[:, None].astype(_TYPES[_element(i.type)]) for i in inputs}

    def scores(self, x: np.ndarray) -> np.ndarray:
        """What the model gives: its scores (n, classes) or values (n, 1), as float64."""
        outputs = self._session.get_outputs()
        name = outputs[_score_output(outputs)].name
        fixed = self._session.get_inputs()[0].shape[0] if self._session.get_inputs()[0].shape else None
        size = fixed if isinstance(fixed, int) and fixed > 0 else len(x)
        pieces = []
        for start in range(
            0, len(x), size
        ):  # a model of a fixed batch size gets its last rows with copies of the first
            rows = x[start : start + size]
            full = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
            try:
                (found,) = self._session.run([name], self._feeds(full))
            except _failures() as error:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(f"{self._path} cannot take rows of shape {self._shape}: {str(error)[:300]}") from error
            pieces.append(self._table(found)[: len(rows)])
        return np.concatenate(pieces)

    def _table(self, found: Any) -> np.ndarray:
        if isinstance(found, list):  # one {class: probability} a row
            names = {class_name(key): key for key in found[0]}
            if set(names) != set(self._classes):
                raise ModelError(
                    f"{self._path} knows the classes {', '.join(names)}, but the labels are {', '.join(self._classes)}"
                )
            return np.array([[row[names[name]] for name in self._classes] for row in found], dtype=np.float64)
        return np.asarray(found, dtype=np.float64).reshape(len(found), -1)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Values (n,) of a regression, or class indices (n,)."""
        return self.predict_proba(x).argmax(axis=1) if self._classes else self.scores(x)[:, 0]

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (n, classes)."""
        scores = self.scores(x)
        if scores.shape[1] == 1 and len(self._classes) == 2:
            one = scores if self.gives_probabilities else expit(scores)
            return np.concatenate([1 - one, one], axis=1)
        return scores if self.gives_probabilities else softmax(scores, axis=1)


def _element(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")")


def _score_output(outputs: list[Any]) -> int:
    """Position of the output that holds scores: a list of probabilities by class, or a tensor of real numbers."""
    found = [i for i, output in enumerate(outputs) if output.type.startswith("seq(map(") or "float" in output.type]
    found += [i for i, output in enumerate(outputs) if "double" in output.type and i not in found]
    named = [i for i in found if "prob" in outputs[i].name.lower()]
    if not found:
        raise ModelError(f"the ONNX model gives no scores, only {', '.join(output.type for output in outputs)}")
    return (named or found)[0]


class OnnxModel:
    """An .onnx file: classes by name where the file has them, otherwise in sorted order; columns by name likewise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        session = _session(path)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        strange = [i.type for i in inputs if _element(i.type) not in _TYPES]
        if strange:
            raise ModelError(f"{path} takes {', '.join(strange)}; expected tensors of {', '.join(_TYPES)}")
        labelled = outputs[_score_output(outputs)].type.startswith("seq(map(") or "label" in outputs[0].name.lower()
        self.wanted = Wanted(
            trained=True,
            task="classification" if labelled else None,
            columns=tuple(i.name for i in inputs) if len(inputs) > 1 else (),
        )

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made:
        """The model, checked on some training rows."""
        if epochs is not None:
            raise InputError("--epochs is for networks that are trained here; an ONNX file holds a trained model")
        data = loaded.data
        box = OnnxBox(self._path, data.shape, data.classes, loaded.encoding)
        rows = data.train.x[:256].reshape(min(256, len(data.train)), -1).numpy()
        scores = box.scores(rows)
        notes = ["columns matched to the model's inputs by " + ("name" if self.wanted.columns else "position")]
        if data.task == "regression" and scores.shape[1] != 1:
            raise ModelError(f"{self._path} gives {scores.shape[1]} values a row, but a regression has one")
        if data.task == "classification":
            width = scores.shape[1]
            if width != len(data.classes) and (width, len(data.classes)) != (1, 2):
                raise ModelError(
                    f"{self._path} gives {width} scores a row, but the data have {len(data.classes)} classes"
                )
            inside = bool(((scores >= -1e-6) & (scores <= 1 + 1e-6)).all())
            box.gives_probabilities = inside and (width == 1 or bool(np.allclose(scores.sum(axis=1), 1, atol=1e-3)))
            if not box.gives_probabilities:
                notes.append("the model's scores are no probabilities; they are taken as logits")
            notes.append(f"the model's classes are taken in the order {', '.join(data.classes[:8])}")
        return Made(box, f"the ONNX model {self._path}", notes=tuple(notes))
