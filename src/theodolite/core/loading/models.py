"""Networks from a factory of the user's: ``package.module:factory``, with safetensors or weights-only weights."""

__all__ = ["Factory", "FactoryModel", "find_function", "load_weights"]

import importlib
import inspect
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError, TheodoliteError, UnsafeFileError
from theodolite.core.loading.automatic import Made, default_recipe, train_made
from theodolite.core.loading.data import Loaded
from theodolite.core.loading.options import Wanted
from theodolite.core.train import seeded

# what code of a user's may raise when it is imported or called
_FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
             SyntaxError, TypeError, ValueError)  # fmt: skip


def find_function(path: str) -> Callable[..., Any]:
    """The function ``package.module:name``, looked for in the working directory as well."""
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise InputError(f"expected package.module:function, got {path!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: there is no module {error.name!r} here ({here}) or among the installed ones"
        ) from error
    except TheodoliteError:
        raise
    except _FAILURES as error:
        raise InputError(f"{path}: the module cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: the module {module_name} has no function {name!r}")
    return function


def call(path: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the user's; what it raises becomes a ModelError that names it."""
    try:
        return function(*arguments, **options)
    except TheodoliteError:
        raise
    except _FAILURES as error:
        raise ModelError(f"{path} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Factory:
    """Makes a fresh network from a seed by ``package.module:factory``, called as factory(seed) or factory()."""

    path: str

    @cached_property
    def _function(self) -> Callable[..., Any]:
        return find_function(self.path)

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    @cached_property
    def _how(self) -> str:
        """Whether the seed is given by "name", by "position" or "not" at all."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:  # a function without a signature, written in C
            return "not"
        kinds = inspect.Parameter
        named = [
            p for p in parameters if p.name == "seed" and p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        ]
        needed = [
            p
            for p in parameters
            if p.default is kinds.empty and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        ]
        if named and len(needed) <= 1 and set(needed) <= set(named):
            return "name"
        if len(needed) == 1 and needed[0].kind is not kinds.KEYWORD_ONLY:
            return "position"
        if needed:
            raise ModelError(
                f"{self.path} needs the arguments {', '.join(p.name for p in needed)}; a factory is called as "
                "factory(seed) or factory()"
            )
        return "not"

    def __call__(self, seed: int) -> Any:
        """What the factory makes; torch's random numbers come from ``seed`` either way."""
        arguments, options = (
            ((seed,) if self._how == "position" else ()),
            ({"seed": seed} if self._how == "name" else {}),
        )
        with seeded(seed):
            return call(self.path, self._function, *arguments, **options)


class FactoryModel:
    """A network from a factory: with weights it is taken as it is, without it is trained here."""

    def __init__(self, path: str, weights: Path | None) -> None:
        self._factory = Factory(path)
        self._weights = None if weights is None else load_weights(weights)
        self._source = weights
        self.wanted = Wanted(trained=weights is not None)

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made:
        """Build the network and load or train its weights."""
        path = self._factory.path
        model = self._factory(seed)
        if not isinstance(model, nn.Module):
            raise ModelError(f"{path} must return a torch.nn.Module, it returned {type(model).__name__}")
        recipe = default_recipe(model, loaded.data, epochs)
        if self._weights is None:
            return train_made(self._factory, loaded.data, recipe, seed, f"the network of {path}")
        _fill(model, self._weights, f"{self._source}", path)
        told = f"the network of {path} with the weights of {self._source}"
        return Made(model.eval(), told, self._factory, recipe)


def _fill(model: nn.Module, weights: Mapping[str, Tensor], source: str, path: str) -> None:
    wrapped = weights and all(name.startswith("module.") for name in weights)
    named = {name.removeprefix("module.") if wrapped else name: value for name, value in weights.items()}
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        raise ModelError(f"the weights of {source} do not fit the network of {path}: {error}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file or of what torch.save(model.state_dict()) wrote; nothing in it is run.

    Raises UnsafeFileError for a file that only a full unpickling, which can run code, would read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"--weights {path}: there is no such file")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # torch warns of pickles that it may not understand; it then refuses them, which is handled here
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds more than weights and could run code when it is read, so it was not read; save the weights "
            "with safetensors.torch.save_file(model.state_dict(), path) or torch.save(model.state_dict(), path)"
        ) from error
    except (*_FAILURES, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not a file of weights: {type(error).__name__}: {error}") from error
    inner = next((found[k] for k in ("state_dict", "model_state_dict") if k in found), found) if _maps(found) else found
    if not _maps(inner) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise ModelError(f"{path} must hold tensors by name, as torch.save(model.state_dict(), path) writes them")
    return dict(inner)


def _maps(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
