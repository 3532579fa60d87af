"""Networks that are trained here: a sensible one for each kind of data, and the recipe for any other."""

__all__ = [
    "Automatic",
    "ImageNetwork",
    "Made",
    "SeriesNetwork",
    "TableNetwork",
    "default_recipe",
    "train_made",
]

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import ModelError
from theodolite.core.loading.data import Loaded
from theodolite.core.loading.options import Wanted
from theodolite.core.subject import Dataset
from theodolite.core.train import Loss, Recipe, loss_function, seeded, train
from theodolite.core.view import ModelView, evaluation_mode


@dataclass(frozen=True, eq=False)
class Made:
    """A model for a data set: the predictor, and how to make and train another where that can be done."""

    predictor: Any
    description: str
    build: Callable[[int], nn.Module] | None = None
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()


class TargetScale(nn.Module):
    """y = mean + deviation * x: lets a network that starts near 0 answer in the units of the target."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean]))
        self.register_buffer("deviation", torch.tensor([deviation]))

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, 1) in the target's units."""
        return self.mean + self.deviation * x


@dataclass(frozen=True)
class TableNetwork:
    """Makes a network of fully connected layers; ``target`` is the mean and deviation of a regression's target."""

    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    target: tuple[float, float] | None = None

    def __call__(self, seed: int) -> nn.Module:
        """An untrained network."""
        with seeded(seed):
            return nn.Sequential(OrderedDict(_head(self.inputs, self.hidden, self.outputs, self.target)))


def _head(
    inputs: int, hidden: tuple[int, ...], outputs: int, target: tuple[float, float] | None
) -> Iterator[tuple[str, nn.Module]]:
    for i, width in enumerate(hidden, start=1):
        yield f"hidden{i}", nn.Linear(inputs, width)
        yield f"hidden{i}_relu", nn.ReLU()
        inputs = width
    yield "output", nn.Linear(inputs, outputs)
    if target is not None:
        yield "units", TargetScale(*target)


@dataclass(frozen=True)
class ImageNetwork:
    """Makes a small convolutional network: layers of 16, 32, 64, ... channels, halved until 7 x 7 or less is left."""

    shape: tuple[int, int, int]
    outputs: int
    target: tuple[float, float] | None = None

    def __call__(self, seed: int) -> nn.Module:
        """An untrained network."""
        channels, height, width = self.shape
        layers = OrderedDict[str, nn.Module]()
        with seeded(seed):
            for i in range(1, 12):
                wider = min(64, 8 * 2**i)
                layers[f"conv{i}"] = nn.Conv2d(channels, wider, 3, padding=1)
                layers[f"relu{i}"] = nn.ReLU()
                channels, pool = wider, (2 if height > 7 else 1, 2 if width > 7 else 1)
                if pool != (1, 1):
                    layers[f"pool{i}"] = nn.MaxPool2d(pool)
                    height, width = height // pool[0], width // pool[1]
                if height <= 7 and width <= 7:
                    break
            layers["flatten"] = nn.Flatten()
            layers.update(_head(channels * height * width, (64,), self.outputs, self.target))
        return nn.Sequential(layers)


@dataclass(frozen=True)
class SeriesNetwork:
    """Makes a small network for series (n, steps, channels): convolutions along time, halved until 12 steps or less are left.

    forecasts: the network answers the last value of the first channel and what it adds to it; target is then the mean and
    deviation of what is added.
    """

    shape: tuple[int, int]
    outputs: int
    target: tuple[float, float] | None = None
    forecasts: bool = False

    def __call__(self, seed: int) -> nn.Module:
        """An untrained network."""
        steps, channels = self.shape
        layers = OrderedDict[str, nn.Module](time_last=TimeLast())
        with seeded(seed):
            for i in range(1, 20):
                layers[f"conv{i}"] = nn.Conv1d(channels, 32, 5, padding=2)
                layers[f"relu{i}"] = nn.ReLU()
                channels = 32
                if steps > 12:
                    layers[f"pool{i}"] = nn.MaxPool1d(2)
                    steps //= 2
                if steps <= 12:
                    break
            layers["flatten"] = nn.Flatten()
            layers.update(_head(channels * steps, (64,), self.outputs, self.target))
        network = nn.Sequential(layers)
        return FromLast(network) if self.forecasts else network


class FromLast(nn.Module):
    """The last value of the first channel plus what ``change`` answers to the window less its last values: so the level of
    a series, which drifts, does not matter.
    """

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, 1) of series (n, steps, channels)."""
        return x[:, -1, :1] + self.change(x - x[:, -1:])


class TimeLast(nn.Module):
    """(n, steps, channels) as (n, channels, steps), which convolutions along time take."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers with time as the last axis."""
        return x.transpose(1, 2)


class Automatic:
    """The network that is trained where the user names no model."""

    wanted = Wanted()

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made:
        """Train a network on the training rows."""
        data = loaded.data
        outputs, target = max(1, len(data.classes)), None
        if data.task == "regression":
            target = (float(data.train.y.mean()), float(data.train.y.std()))
        if data.modality == "image":
            channels, height, width = data.shape
            build, what = ImageNetwork((channels, height, width), outputs, target), "a small convolutional network"
        elif data.modality == "series":
            steps, channels = data.shape
            if data.forecasts:
                change = data.train.y - data.train.x[:, -1, 0]
                target = (float(change.mean()), float(change.std()))
            build = SeriesNetwork((steps, channels), outputs, target, forecasts=data.forecasts)
            what = "a small network of convolutions along time"
        elif data.modality == "text":
            build, what = TableNetwork(data.shape[0], (64,), outputs, target), "a network of one hidden layer of 64"
        else:
            build, what = TableNetwork(data.shape[0], (64, 64), outputs, target), "a network of two hidden layers of 64"
        recipe = default_recipe(build(seed), data, epochs)
        if epochs is None and data.modality != "image":
            recipe = _best_length(build, data, recipe, seed)
        return train_made(build, data, recipe, seed, what)


def _best_length(build: Callable[[int], nn.Module], data: Dataset, recipe: Recipe, seed: int) -> Recipe:
    """The recipe at full length, a third or a tenth of it, whichever has the lowest loss on the validation rows."""

    def loss(candidate: Recipe) -> float:
        model = train_made(build, data, candidate, seed, "").predictor
        return float(loss_function(recipe.loss)(ModelView(model, output="raw")(data.validation.x), data.validation.y))

    lengths = sorted({max(1, recipe.epochs // share) for share in (1, 3, 10)})
    return min((replace(recipe, epochs=length) for length in lengths), key=loss)


def train_made(build: Callable[[int], nn.Module], data: Dataset, recipe: Recipe, seed: int, what: str) -> Made:
    """Train ``build(seed)`` on the training rows by ``recipe``."""
    model = build(seed)
    train(model, data.train.x, data.train.y, recipe=recipe.with_seed(seed))
    told = (
        f"{what}, trained here for {recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''} on {len(data.train):,} rows"
    )
    return Made(model, told, build, recipe)


def default_recipe(model: nn.Module, data: Dataset, epochs: int | None) -> Recipe:
    """Adam for about 3,000 steps (images: 1,500; texts and series: 600), with the loss that fits the outputs of ``model``.

    Raises ModelError where the model cannot take the rows or its outputs do not fit the labels.
    """
    steps, low, high = {"image": (1_500, 3, 30), "series": (600, 3, 30), "text": (600, 5, 30)}.get(
        data.modality, (3_000, 10, 300)
    )
    batch = 64 if len(data.train) <= 10_000 else 128
    per_epoch = -(-len(data.train) // batch)
    recipe = Recipe(epochs=epochs or min(high, max(low, steps // per_epoch)), batch_size=batch, lr=2e-3)
    return replace(recipe, loss=_loss(model, data))


def _loss(model: nn.Module, data: Dataset) -> Loss:
    try:
        with torch.no_grad(), evaluation_mode(model):
            out = model(data.train.x[:2])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"the model cannot take rows of shape {data.shape} from {data.name}: {error}") from error
    if not isinstance(out, Tensor) or out.shape[:1] != (2,) or out.ndim > 2:
        given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(f"for 2 rows the model must give a tensor (2, classes) or (2,) or (2, 1), it gave {given}")
    width = 1 if out.ndim == 1 else out.shape[1]
    if data.task == "regression":
        if width != 1:
            raise ModelError(
                f"the model gives {width} values a row, but a regression has one; or --task classification"
            )
        return "squared"
    if width == 1 and len(data.classes) == 2:
        return "binary"
    if width != len(data.classes):
        raise ModelError(
            f"the model gives {width} scores a row, but the rows read from {data.name} have {len(data.classes)} classes; "
            "where a sample of the rows lacks a rare class, a larger --max-rows has it"
        )
    return "cross-entropy"
