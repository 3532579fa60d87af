"""Built-in subjects: small networks that are trained in seconds on data that come with scikit-learn."""

__all__ = ["BUILTIN", "BuiltIn", "builtin"]

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from theodolite.core.errors import InputError
from theodolite.core.subject import Dataset, Modality, Rows, Subject
from theodolite.core.train import Recipe, train


def _digits_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 16, 3, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(256, 64),
            relu3=nn.ReLU(),
            output=nn.Linear(64, 10),
        )
    )


def _breast_cancer_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(30, 32),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(32, 32),
            relu2=nn.ReLU(),
            output=nn.Linear(32, 2),
        )
    )


def _digits() -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    bunch: Any = load_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 16
    return x, torch.from_numpy(bunch.target).long(), (), tuple(str(name) for name in bunch.target_names)


def _breast_cancer() -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    bunch: Any = load_breast_cancer()
    x, y = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).long()
    return x, y, tuple(map(str, bunch.feature_names)), tuple(map(str, bunch.target_names))


@dataclass(frozen=True)
class BuiltIn:
    """How one built-in subject is made."""

    description: str
    modality: Modality
    rows: Callable[[], tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]]  # x, classes y, features, class names
    build: Callable[[int], nn.Module]
    recipe: Recipe
    standardise: bool
    note: str


BUILTIN: dict[str, BuiltIn] = {
    "digits": BuiltIn(
        "a small convolutional network on scikit-learn's handwritten digits (8 x 8 grey images)",
        "image",
        _digits,
        _digits_network,
        Recipe(epochs=20, batch_size=64, lr=3e-3),
        False,
        "grey values divided by 16, so that they lie in [0, 1]",
    ),
    "breast-cancer": BuiltIn(
        "a small network on scikit-learn's breast cancer table (30 measurements of a cell sample)",
        "tabular",
        _breast_cancer,
        _breast_cancer_network,
        Recipe(epochs=30, batch_size=32, lr=2e-3),
        True,
        "every column standardised with the mean and deviation of the training rows",
    ),
}
"""The built-in subjects by name."""


def builtin(name: str, *, seed: int = 0, made: BuiltIn | None = None) -> Subject:
    """Train and return the built-in subject ``name`` ("digits", "breast-cancer"); a few seconds.

    made: how it is made, where it is not one of BUILTIN. The rows are split 60 / 20 / 20 into train, validation and test,
    by class.
    """
    if made is None and name not in BUILTIN:
        raise InputError(f"there is no built-in subject called {name!r}; there are: {', '.join(BUILTIN)}")
    made = made or BUILTIN[name]
    x, y, features, classes = made.rows()
    rest, test = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=seed)
    fit, validation = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=seed)
    scaling: tuple[tuple[float, float], ...] = ()
    if made.standardise:
        shift, scale = x[fit].mean(dim=0), x[fit].std(dim=0)
        x, scaling = (x - shift) / scale, tuple(zip(shift.tolist(), scale.tolist(), strict=True))
    train_rows, validation_rows, test_rows = (Rows(x[part], y[part]) for part in (fit, validation, test))
    data = Dataset(
        name, made.modality, "classification", train_rows, validation_rows, test_rows, features, classes,
        notes=(made.note, "split at random by class: 60 % train, 20 % validation, 20 % test"), scaling=scaling,
    )  # fmt: skip
    model = made.build(seed)
    train(model, data.train.x, data.train.y, recipe=made.recipe.with_seed(seed))
    return Subject(name, data, model, build=made.build, recipe=made.recipe, description=made.description)
