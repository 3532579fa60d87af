"""Encoders in front of heads that were trained on other encoders, without training."""

__all__ = ["RelativeLayer", "stitch", "stitching_table"]

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import check_scoring
from torch import Tensor, nn

from theodolite.activations.relative.agreement import RelativeWarning
from theodolite.activations.relative.projection import RelativeProjection
from theodolite.activations.relative.similarity import SIMILARITIES, Rows, latents, similarities
from theodolite.core.errors import InputError
from theodolite.core.view import evaluation_mode


class RelativeLayer(nn.Module):
    """An encoder whose output is relative: similarities of each input's latent to those of the anchor inputs.

    The anchors are encoded anew at every forward pass, with gradient, so the encoder learns through them too; in eval mode
    whatever the mode of the encoder, so that dropout does not shake the axes and batch statistics are not of the anchors.
    With ``layer_norm`` a LayerNorm follows, which a network that is trained on similarities wants (the official code has it).
    A latent of zeros has cosine 0 to every anchor. One pass costs the memory of the batch and of all anchors.

    encoder: module, inputs (batch, ...) -> latents (batch, width). anchor_inputs: (anchor, ...), kept as a buffer.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 4.2.

    >>> import torch
    >>> layer = RelativeLayer(nn.Linear(4, 3), torch.randn(5, 4))
    >>> layer(torch.randn(2, 4)).shape
    torch.Size([2, 5])
    """

    anchor_inputs: Tensor

    def __init__(
        self, encoder: nn.Module, anchor_inputs: Tensor, *, similarity: str = "cosine", layer_norm: bool = True
    ) -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        if anchor_inputs.ndim == 0 or len(anchor_inputs) == 0:
            raise InputError("need at least one anchor input")
        self.encoder = encoder
        self.similarity = similarity
        self.register_buffer("anchor_inputs", anchor_inputs)
        self.norm = nn.LayerNorm(len(anchor_inputs)) if layer_norm else nn.Identity()

    def set_anchors(self, inputs: Tensor) -> None:
        """Put other anchor inputs in place, as many as before: what follows reads their number of columns."""
        if len(inputs) != len(self.anchor_inputs):
            raise InputError(
                f"what follows reads {len(self.anchor_inputs)} anchors, so give as many, got {len(inputs)}"
            )
        self.anchor_inputs = inputs.to(self.anchor_inputs.device)

    def forward(self, x: Tensor) -> Float[Tensor, "batch anchor"]:
        """Relative vectors of a batch of inputs."""
        rows = _pooled(self.encoder(x))
        with evaluation_mode(self.encoder):
            anchors = _pooled(self.encoder(self.anchor_inputs))
        return self.norm(similarities(rows, anchors, self.similarity))


class _Stitched(nn.Module):
    """encoder -> relative vectors -> head."""

    def __init__(
        self, encoder: Callable[[Tensor], Tensor], head: Callable[[Tensor], Any], projection: RelativeProjection
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.projection = projection

    def forward(self, x: Tensor) -> Any:
        return self.head(self.projection.transform(_pooled(self.encoder(x))))


def stitch(
    encoder: Callable[[Tensor], Tensor], head: Callable[[Tensor], Any], *, projection: RelativeProjection
) -> nn.Module:
    """One network out of an encoder, the projection fitted on that encoder's latents, and a head trained on another's.

    encoder: module or function, inputs -> latents (batch, width). head: module or function on relative vectors (batch,
    anchors). The module is in eval mode. Raises InputError where a head that tells its width reads another number of columns.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 4.2.

    >>> import torch
    >>> encoder, head = nn.Linear(4, 3), nn.Linear(5, 2)
    >>> projection = RelativeProjection(5).fit(encoder(torch.randn(20, 4)).detach())
    >>> stitch(encoder, head, projection=projection)(torch.randn(7, 4)).shape
    torch.Size([7, 2])
    """
    made = getattr(projection, "_n_features_out", None)
    if made is None:
        raise InputError("the projection is not fitted: fit it on this encoder's latents of the anchor samples")
    read = _columns_read(head)
    if read is not None and read != made:
        raise InputError(
            f"the head reads {read} columns, the projection has {made}: give both encoders the same anchors"
        )
    return _Stitched(encoder, head, projection).eval()


def stitching_table(
    spaces: Mapping[str, RelativeProjection | Rows],
    heads: Mapping[str, Any],
    X: Mapping[str, Rows] | Rows | None,
    y: Any,
    *,
    scorer: str | Callable[[Any, Any, Any], float],
    seed: int = 0,
) -> pd.DataFrame:
    """Score of every encoder in front of every head, indexed (encoder, head).

    spaces: by name of the encoder a fitted projection, or the items' vectors themselves (row, column), say absolute ones.
    heads: fitted models by the name of the encoder each was trained on. X: latents of the items (row, width) by name of the
    encoder (one array where all have the same); not needed for names whose vectors are given. y: targets (row,). scorer: a
    name of scikit-learn's ("accuracy", "f1_macro") or a function (head, vectors, y) -> number.

    Columns: score; stitched, True where encoder and head differ; representation, "relative" or "absolute"; permuted, the
    control, the score with the encoder's columns in another order. No item should be an anchor.

    Raises InputError where the encoders have different numbers of anchors or X lacks one of them; warns with `RelativeWarning`
    where two have the same anchors in another order.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 5.
    """
    if not spaces or not heads:
        raise InputError("need at least one space and one head")
    _tell_sorted({name: space for name, space in spaces.items() if isinstance(space, RelativeProjection)})
    targets = np.asarray(y)
    vectors = {name: _vectors(name, space, X) for name, space in spaces.items()}
    widths = {name: each.shape[1] for name, each in vectors.items()}
    if len(set(widths.values())) > 1:
        raise InputError(
            f"the spaces have different numbers of columns ({', '.join(f'{n}: {w}' for n, w in widths.items())}): give all "
            "encoders the same anchors; cut absolute latents to one width first"
        )
    for name, each in vectors.items():
        if len(each) != len(targets):
            raise InputError(f"space {name!r} has {len(each)} rows for {len(targets)} targets")
    width = next(iter(widths.values()))
    order = np.random.default_rng(seed).permutation(width)
    rows = {}
    for encoder, each in vectors.items():
        for head, model in heads.items():
            read = _columns_read(model)
            if read is not None and read != width:
                raise InputError(
                    f"head {head!r} reads {read} columns, the spaces have {width}: give all the same anchors"
                )
            scored: Any = check_scoring(model, scoring=scorer) if isinstance(scorer, str) else scorer
            rows[encoder, head] = {
                "score": float(scored(model, each, targets)),
                "stitched": encoder != head,
                "representation": "relative" if isinstance(spaces[encoder], RelativeProjection) else "absolute",
                "permuted": float(scored(model, each[:, order], targets)),
            }
    index = pd.MultiIndex.from_tuples(list(rows), names=["encoder", "head"])
    return pd.DataFrame(list(rows.values()), index=index)


def _tell_sorted(projections: dict[str, RelativeProjection]) -> None:
    """Warn where two spaces have the same anchors in another order, as when they were sorted in one of them."""
    fitted = [(name, made.anchor_index_) for name, made in projections.items() if hasattr(made, "anchor_index_")]
    for (one, first), (other, second) in pairwise(fitted):
        if not np.array_equal(first, second) and np.array_equal(np.sort(first), np.sort(second)):
            warnings.warn(
                f"{one!r} and {other!r} have the same anchors in another order, so their columns do not go together: fit both "
                "with one list, anchor_index=first.anchor_index_",
                RelativeWarning,
                stacklevel=3,
            )


def _vectors(name: str, space: RelativeProjection | Rows, X: Any) -> Any:
    if not isinstance(space, RelativeProjection):
        latents(space, f"space {name!r}")
        return space.to_numpy() if isinstance(space, pd.DataFrame) else space
    if isinstance(X, Mapping):
        if name not in X:
            raise InputError(f"X has no latents of {name!r}; it has {', '.join(map(repr, X)) or 'none'}")
        return space.transform(X[name])
    if X is None:
        raise InputError(f"space {name!r} is a projection, so X must hold the latents of the items in it")
    return space.transform(X)


def _pooled(z: Tensor) -> Tensor:
    if z.ndim != 2:
        raise InputError(
            f"the encoder gives shape {tuple(z.shape)}, not (batch, width): pool it to one vector for each input first "
            "(theodolite.activations.relative.pool_tokens)"
        )
    return z


def _columns_read(head: Any) -> int | None:
    """The width that a head tells of itself: a scikit-learn model, or a network by its first linear layer or LayerNorm."""
    if not isinstance(head, nn.Module):
        return getattr(head, "n_features_in_", None)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if not isinstance(module, nn.Sequential) and any(True for _ in module.parameters(recurse=False)):
            return None
    return None
