"""Subjects from a user's own model and data: `load_subject` for files, `load_subject_function` for everything else."""

__all__ = ["DataOptions", "load_subject", "load_subject_function"]

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from theodolite.core.errors import InputError, ModelError, UnsafeFileError
from theodolite.core.loading.automatic import Automatic, Made
from theodolite.core.loading.data import Loaded, load_data
from theodolite.core.loading.estimators import SkopsModel
from theodolite.core.loading.models import FactoryModel, call, find_function
from theodolite.core.loading.options import DataOptions, Wanted
from theodolite.core.subject import Subject

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PICKLES = (".pkl", ".pickle", ".joblib", ".sav", ".dill")


@runtime_checkable
class _Model(Protocol):
    """A model before it has met the data."""

    wanted: Wanted

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made: ...


def load_subject(
    *,
    model: str = "auto",
    data: str | Path,
    weights: str | Path | None = None,
    options: DataOptions | None = None,
    epochs: int | None = None,
) -> Subject:
    """A subject from a model and the data it is used on.

    model: "package.module:factory" (a network; trained here where no ``weights`` are given), a .skops or .onnx file, a
    Hugging Face folder or name (for texts), or "auto" (train a network that suits the data). data: a CSV, TSV, Parquet,
    NPZ or JSON Lines file, a folder of images by class, or a folder saved by ``datasets``. epochs: of one training.
    What the data leave open is a DataError that names the flag, and so the field of ``options``, that settles it.
    Raises DataError, ModelError, UnsafeFileError (a file that could run code) and MissingExtraError.
    """
    options = options or DataOptions()
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {epochs}")
    found = _find_model(model, Path(weights) if weights is not None else None)
    loaded = load_data(str(data), options, found.wanted)
    made = found.make(loaded, epochs, options.seed)
    notes = made.notes
    if found.wanted.trained and not any(note.startswith("test rows as given") for note in loaded.data.notes):
        notes = (
            *notes,
            "the model may have been trained on some of the test rows; --test FILE gives rows it has not seen",
        )
    name = Path(str(data)).stem or Path(str(data)).resolve().name
    return Subject(
        name,
        loaded.data,
        made.predictor,
        build=made.build,
        recipe=made.recipe,
        description=made.description,
        notes=notes,
    )


def _find_model(model: str, weights: Path | None) -> _Model:
    path = Path(model).expanduser()
    suffix = path.suffix.lower()
    if weights is not None and (":" not in model or path.exists()):
        raise InputError(f"--weights goes with a factory (package.module:factory), not with --model {model}")
    if model == "auto":
        return Automatic()
    if suffix in (".skops", ".onnx"):
        if not path.is_file():
            raise ModelError(f"--model {model}: there is no such file")
        if suffix == ".skops":
            return SkopsModel(path)
        from theodolite.core.loading.onnx_files import OnnxModel

        return OnnxModel(path)
    if suffix in _PICKLES:
        raise UnsafeFileError(f"{model}: a pickle can run code and is not read; save it with skops.io.dump as .skops")
    if suffix in _WEIGHTS and (path.is_file() or ":" not in model):
        raise ModelError(f"{model} holds only weights; name the network with --model package.module:factory too")
    if path.is_file():
        raise ModelError(
            f"--model {model}: expected a .skops or .onnx file, a Hugging Face folder or package.module:factory"
        )
    if ":" in model and not path.exists():
        return FactoryModel(model, weights)
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"--model {model}: there is no such file or folder, and it is no name on the Hugging Face hub")
    from theodolite.core.loading.encoders import EncoderModel

    return EncoderModel(model)


def load_subject_function(path: str) -> Subject:
    """The subject that the function ``package.module:function`` returns."""
    found = call(path, find_function(path))
    if not isinstance(found, Subject):
        raise ModelError(f"{path} must return a theodolite.Subject, it returned {type(found).__name__}")
    return found
