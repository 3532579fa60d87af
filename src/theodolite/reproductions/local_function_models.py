"""The models of Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254, and the rows that are explained; one of images besides."""

__all__ = ["PaperModel", "deeper_networks", "image_network", "official_network", "table", "trained_network"]

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from theodolite.core.errors import DataError
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, train
from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import (
    METHODS,
    NEIGHBOURHOODS,
    LocalApproximation,
    Neighbourhood,
    square_patches,
    with_options,
)


@dataclass(frozen=True, eq=False)
class PaperModel:
    """A model and the rows of the test set that are explained; groups: superpixels, width: of LIME's kernel."""

    name: str
    f: ModelView
    x: Tensor
    quality: str
    groups: Tensor | None = None
    width: float = 1.0
    ks: range = range(1, 12)

    def methods(self, seed: int) -> dict[str, LocalApproximation]:
        """All methods, on these features."""
        lime = METHODS["LIME"]
        wide = replace(lime, neighbourhood=replace(lime.neighbourhood, width=self.width))
        return with_options(METHODS | {"LIME": wide}, groups=self.groups, seed=seed)

    def neighbourhoods(self) -> dict[str, Neighbourhood]:
        """All neighbourhoods, on these features."""
        return with_options(NEIGHBOURHOODS | {"binary": Neighbourhood.binary(width=self.width)}, groups=self.groups)


def _read(name: str) -> np.ndarray:
    path = find_data(name)
    if path is None:
        raise DataError(f"needs {name} in the folder THEODOLITE_DATA")
    return pd.read_csv(path).to_numpy(dtype=np.float32)


def table(data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows, their labels, and the 100 rows to explain; features in [0, 1], the label is the last column."""
    fit = torch.from_numpy(_read(f"lfa/{data}-clean-train80-normalized.csv{'.gz' if data == 'heloc' else ''}"))
    shown = torch.from_numpy(_read(f"lfa/{data}-clean-test20-normalized-subset.csv"))
    return fit[:, :-1], fit[:, -1], shown[:, :-1]


def _layers(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    pairs = [(nn.Linear(a, b), activation()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*list(itertools.chain.from_iterable(pairs))[:-1])


def official_network() -> PaperModel:
    """HELOC network A (23-8-8-1) with the weights that the authors published."""
    weights = load_file(str(find_data("lfa/official-heloc-ffnnA.safetensors")))
    net = _layers([23, 8, 8, 1], nn.ReLU)
    for i, layer in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
        layer.load_state_dict({part: weights[f"linear{i + 1}.{part}"] for part in ("weight", "bias")})
    shown = torch.from_numpy(_read("lfa/heloc-clean-test20-normalized-subset.csv"))
    right = float(((net(shown[:, :-1])[:, 0] > 0) == (shown[:, -1] > 0.5)).float().mean())
    return PaperModel(
        "HELOC network A", ModelView(net), shown[:, :-1], f"the authors' weights, accuracy {right:.2f} on these rows"
    )


def trained_network(data: str, depth: int, seed: int) -> PaperModel:
    """A network of width 8 trained here on "heloc" (ReLU, probability) or "who" (tanh, years of life)."""
    x, y, shown = table(data)
    torch.manual_seed(seed)
    heloc = data == "heloc"
    net = _layers([x.shape[1], *[8] * (depth - 1), 1], nn.ReLU if heloc else nn.Tanh)
    log = train(net, x, y, recipe=Recipe(20, 64, 5e-3, loss="binary" if heloc else "squared", seed=seed))
    view = ModelView(net, output="probability" if heloc else "value")
    quality = f"Adam, 20 epochs, last training loss {log.loss[-1]:.4g}"
    return PaperModel(f"{data.upper()} network of {depth} layers", view, shown, quality)


def deeper_networks(seed: int) -> list[PaperModel]:
    """The other networks of the paper."""
    return [
        trained_network("heloc", 5, seed),
        trained_network("heloc", 8, seed),
        *(trained_network("who", depth, seed) for depth in (3, 5, 8)),
    ]


def image_network(seed: int) -> list[PaperModel]:
    """A small convolutional network on MNIST, whose features are squares of 4 x 4 pixels; none without mnist.npz."""
    path = find_data("mnist.npz")
    if path is None:
        return []
    with np.load(path, allow_pickle=False) as file:
        x, y, shown, truth = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    pixels, rows = (torch.from_numpy(part / np.float32(255))[:, None] for part in (x[:10_000], shown[:50]))
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )  # fmt: skip
    train(net, pixels, torch.from_numpy(y[:10_000]).long(), recipe=Recipe(3, 64, 2e-3, seed=seed))
    right = float((net(rows).argmax(dim=1).numpy() == truth[:50]).mean())
    quality = f"squares of 4 x 4 pixels, LIME's width 10; accuracy {right:.2f} on these rows"
    # half of the squares are black: fewer changed ones than that say nothing
    many, squares = range(24, 45, 2), square_patches(28, 28, 4)
    return [PaperModel("convolutional network on MNIST", ModelView(net), rows, quality, squares, 10.0, many)]
