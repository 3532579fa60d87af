"""What propagation gives: components, paths of them, and the feature vector at a path's start; how two features compare."""

__all__ = ["Component", "ComponentPath", "FeatureVector", "cosine", "coupling", "coupling_matrix", "layernorm_angle"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError


@dataclass(frozen=True)
class Component:
    """One stop on a path: a head of block ``layer``'s attention that reads at ``token``, that block's MLP, or the embedding.

    token: where the component reads, negative from the end; an MLP and the embedding read where the path already is.
    """

    kind: Literal["attn", "mlp", "embedding"]
    layer: int = 0
    head: int | None = None
    token: int = -1

    def __str__(self) -> str:
        if self.kind == "embedding":
            return f"embedding@{self.token}"
        return f"{self.kind}{self.layer}{'' if self.head is None else f'.{self.head}'}@{self.token}"


class ComponentPath(tuple[Component, ...]):
    """A path from late to early.

    >>> str(ComponentPath([Component("attn", 13, 11, 5), Component("mlp", 2, token=5)]))
    'attn13.11@5 <= mlp2@5'
    """

    def __str__(self) -> str:
        return " <= ".join(map(str, self)) if self else "direct"


@dataclass(frozen=True, eq=False)
class FeatureVector:
    """A direction y of hidden space: the observable's first-order change for activation x there is gain * (y . x).

    vector: float32, in the residual stream before the norm of the path's first component (of a network that is no decoder:
    of the input of module ``layer``, flattened). layer: that block's index; as many as there are blocks means the stream
    before the final norm. stream: "residual" before the block, "middle" between its attention and its MLP, "input" of a
    module. token: where x is read, in the pair's prompts. gain: product of the attention weights along the path, 1 without
    prompts. boundary_found: False where the observable does not change its sign between the prompts at some MLP.
    normalised: the vector has length 1, so that only its direction means something; weights_only: the norms' scales were
    left out, so that lengths do not compare between layers.
    offset: token, counted from the word that differs between the prompts; None where it is the last token or not known.
    """

    vector: Float[Tensor, " width"]
    layer: int | str
    stream: Literal["residual", "middle", "input"] = "residual"
    token: int = -1
    gain: float = 1.0
    path: ComponentPath | tuple[str, ...] = field(default_factory=ComponentPath)
    boundary_found: bool = True
    normalised: bool = False
    weights_only: bool = False
    offset: int | None = None
    pair: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def direction(self) -> Float[Tensor, " width"]:
        """The vector with length 1."""
        return self.vector / self.vector.norm()

    def score(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row"]:
        """y . x of activations at this feature's place."""
        return x.float() @ self.vector.to(x.device)

    def __str__(self) -> str:
        return str(self.path) if isinstance(self.path, ComponentPath) else " <= ".join(self.path)


def _vector(y: FeatureVector | Tensor) -> Tensor:
    vector = (y.vector if isinstance(y, FeatureVector) else torch.as_tensor(y)).double()
    if vector.ndim != 1 or not bool(vector.any()) or not bool(torch.isfinite(vector).all()):
        raise InputError(f"a feature is one vector, finite and not zero; got shape {tuple(vector.shape)}")
    return vector


def _two(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor) -> tuple[Tensor, Tensor]:
    one, two = _vector(y1), _vector(y2)
    if len(one) != len(two):
        raise InputError(f"features of width {len(one)} and {len(two)} do not compare")
    return one, two


def coupling(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor) -> float:
    """C(y1 -> y2) = y1 . y2 / ||y1||^2: how far y2's score moves when y1's moves by one, in the middle of isotropic activations.

    Not symmetric: lengths count, so normalised features raise InputError (theirs is the `cosine`), as do weights-only
    features of two layers.

    >>> coupling(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0]))
    0.5
    """
    features = [y for y in (y1, y2) if isinstance(y, FeatureVector)]
    if any(y.normalised for y in features):
        raise InputError("the coupling of normalised features is only their cosine; propagate with normalise=False")
    if any(y.weights_only for y in features) and len({y.layer for y in features}) > 1:
        raise InputError(
            "without prompts the lengths of features are not comparable between layers; propagate with a pair of prompts, or "
            "take the cosine"
        )
    one, two = _two(y1, y2)
    return float(one @ two / (one @ one))


def cosine(y1: FeatureVector | Tensor, y2: FeatureVector | Tensor) -> float:
    """y1 . y2 / (||y1|| ||y2||).

    >>> cosine(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]))
    0.0
    """
    one, two = _two(y1, y2)
    return float(one @ two / (one.norm() * two.norm()))


def coupling_matrix(features: Iterable[FeatureVector | Tensor]) -> Float[Tensor, "feature feature"]:
    """C(y_i -> y_j) at [i, j]; the diagonal is 1.

    >>> coupling_matrix([torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])])
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    given: Sequence[FeatureVector | Tensor] = list(features)
    if not given:
        raise InputError("need at least one feature")
    return torch.tensor([[coupling(one, two) for two in given] for one in given])


def layernorm_angle(
    x: Float[Tensor, "row width"], n: Float[Tensor, "row width"] | Float[Tensor, " width"], kind: str
) -> Float[Tensor, " row"]:
    """Angle in radians between n and the gradient of n . norm(x) by x, in closed form.

        gradient = P n / scale,   cos(angle) = ||P n|| / ||n||                                        (theorem 1)

    P projects away x - mean(x) and the vector of ones (kind "layer", a LayerNorm without its affine part), or x alone
    (kind "rms"). For random n in R^d the mean of cos^2 is (d - 2)/d, or (d - 1)/d: norms keep directions.

    Raises InputError for other kinds, and for rows whose direction the norm cannot scale (zero, or for "layer" constant).

    >>> layernorm_angle(torch.tensor([[0.0, 2.0]]), torch.tensor([3.0, 0.0]), "rms")
    tensor([0.])
    """
    kinds = {"layer": "layer", "layernorm": "layer", "ln": "layer", "rms": "rms", "rmsnorm": "rms"}
    if kind.lower() not in kinds:
        raise InputError(f"kind must be 'layer' or 'rms', got {kind!r}")
    if x.ndim != 2 or n.shape[-1] != x.shape[1] or n.ndim > 2:
        raise InputError(
            f"x must be (rows, width) and n (width,) or the same, got {tuple(x.shape)} and {tuple(n.shape)}"
        )
    layer = kinds[kind.lower()] == "layer"
    rows, normal = x.double(), n.double().expand(x.shape)
    taken = torch.zeros_like(normal)
    if layer:
        rows = rows - rows.mean(dim=1, keepdim=True)
        taken = normal.mean(dim=1, keepdim=True).expand_as(normal)
    square = (rows * rows).sum(dim=1, keepdim=True)
    if bool((square <= 1e-24 * x.double().square().sum(dim=1, keepdim=True)).any()) or not bool(
        normal.any(dim=1).all()
    ):
        raise InputError("x or n has a row that is zero, or x a row that is constant: it has no direction for the norm")
    taken = taken + (normal * rows).sum(dim=1, keepdim=True) / square * rows
    return torch.atan2(taken.norm(dim=1), (normal - taken).norm(dim=1)).to(x.dtype)
