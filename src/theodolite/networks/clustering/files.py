"""A fitted TELL as a folder: settings and history as JSON, weights and labels as safetensors; nothing that runs code."""

__all__ = ["load", "save"]

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from theodolite.core.errors import DataError, ModelError
from theodolite.core.files import make_folder, read_json, write_bytes, write_json
from theodolite.networks.clustering.training import Epoch

if TYPE_CHECKING:
    from theodolite.networks.clustering.estimator import TELL

_ABOUT, _WEIGHTS = "tell.json", "tell.safetensors"
_SCHEMA = 1
_OWN = "module"  # in place of a module of the user's own
_MEASURED = ("n_found_", "inertia_", "reconstruction_r2_")


def save(model: "TELL", folder: Path) -> Path:
    """Write ``model`` into ``folder``."""
    make_folder(folder)
    settings = {
        name: _OWN if isinstance(value, nn.Module) else _plain(value)
        for name, value in model.get_params(deep=False).items()
    }
    about: dict[str, Any] = {
        "schema": _SCHEMA, "settings": settings, "input_shape": list(model.input_shape_),
        "n_features_in": model.n_features_in_, "steps": model._steps, "unit": model._unit,
        "feature_names": list(map(str, getattr(model, "feature_names_in_", ()))),
        "measured": {name: getattr(model, name) for name in _MEASURED if hasattr(model, name)},
        "history": [dataclasses.asdict(epoch) for epoch in getattr(model, "history_", ())],
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for prefix, module in _modules(model).items():
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    if hasattr(model, "labels_"):
        tensors["labels"] = torch.as_tensor(model.labels_)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(folder / _WEIGHTS, safetensors.torch.save(plain))
    write_json(folder / _ABOUT, about)
    return folder


def load(kind: "type[TELL]", folder: Path, encoder: nn.Module | None, decoder: nn.Module | None) -> "TELL":
    """Read a `TELL` from ``folder``."""
    for name in (_ABOUT, _WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder} holds no {name}; TELL.save writes {_ABOUT} and {_WEIGHTS}")
    about = read_json(folder / _ABOUT)
    try:
        tensors = safetensors.torch.load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("schema") != _SCHEMA:
        raise DataError(f"{folder / _ABOUT} has another layout than version {_SCHEMA}")
    try:
        return _made(kind, about, tensors, {"encoder": encoder, "decoder": decoder})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / _ABOUT} is not whole: {error}") from error
    except RuntimeError as error:  # of load_state_dict
        raise ModelError(f"the weights in {folder} do not fit: {error}") from error


def _made(
    kind: "type[TELL]", about: dict[str, Any], tensors: dict[str, Tensor], own: dict[str, nn.Module | None]
) -> "TELL":
    settings = dict(about["settings"])
    for name, module in own.items():
        if (settings[name] == _OWN) != (module is not None):
            given = (
                "needs the module it was fitted with" if module is None else "was fitted without a module of its own"
            )
            raise ModelError(f"this TELL {given} as {name}: load(path, {name}=...)")
        settings[name] = settings[name] if module is None else module
    model = kind(**settings)
    shape = tuple(about["input_shape"])
    model.n_features_in_, model.input_shape_ = int(about["n_features_in"]), shape
    if about["feature_names"]:
        setattr(model, "feature_names_in_", np.array(about["feature_names"], dtype=object))  # noqa: B010 - scikit-learn sets it
    rows = torch.arange(2, dtype=torch.float32).reshape(2, *[1] * len(shape)).expand(2, *shape) + 1
    with torch.random.fork_rng(devices=[]):
        model._build(rows)  # the scale of these rows is replaced with the stored one
    for prefix, module in _modules(model).items():
        start = f"{prefix}."
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    model._steps, model._unit = int(about["steps"]), float(about["unit"])
    model._trainer = model._make_trainer()
    model.history_ = [Epoch(**epoch) for epoch in about["history"]]
    for name, value in about["measured"].items():
        if name in _MEASURED:
            setattr(model, name, value)
    if "labels" in tensors:
        model.labels_ = tensors["labels"].numpy()
    return model


def _modules(model: "TELL") -> dict[str, nn.Module]:
    found = {"encoder": model.encoder_, "layer": model.layer_}
    return found if model.decoder_ is None else found | {"decoder": model.decoder_}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
