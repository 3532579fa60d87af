"""Edits of a few features: what to add to an activation so that it acts as if an attribute had another value.

Each gives a change of the activation, so that what the dictionary does not reconstruct stays in place.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366, section 4.
"""

__all__ = ["Edit", "aware_edit", "greedy_edit"]

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks

_AGAIN, _STARTS = 2, 8


@dataclass(frozen=True, eq=False)
class Edit:
    """change: what to add to the activations. removed: which features were taken away or moved."""

    change: Float[Tensor, "row width"]
    removed: Bool[Tensor, "row code"]


def aware_edit(
    clean: Float[Tensor, "row code"],
    counterfactual: Float[Tensor, "_ _"],
    decoder: Float[Tensor, "_ width"],
    old: Float[Tensor, "row code"],
    new: Float[Tensor, "row code"],
    k: int,
) -> Edit:
    """Exchange the features that stand for the old value for those that stand for the new one.

    clean, counterfactual: codes of the two prompts. old, new: how well each feature tells the row's old and new value (F1, from
    other prompts). Of the features that are on, the k best ones for the old value are taken out with their clean codes, and
    the k best ones for the new value put in with their codes on the counterfactual prompt; fewer where fewer are on.
    """
    _check(clean, counterfactual, decoder, k)
    out, into = _best_active(clean, old, k), _best_active(counterfactual, new, k)
    return Edit((counterfactual * into - clean * out) @ decoder, out)


def _best_active(codes: Tensor, score: Tensor, k: int) -> Tensor:
    ranked = score.masked_fill(codes == 0, -torch.inf)
    places = ranked.topk(min(k, codes.shape[1]), dim=1).indices
    return torch.zeros_like(codes, dtype=torch.bool).scatter(1, places, True) & (codes != 0)


def greedy_edit(
    clean: Float[Tensor, "row code"],
    counterfactual: Float[Tensor, "_ _"],
    decoder: Float[Tensor, "_ width"],
    wanted: Float[Tensor, "row width"],
    k: int,
    *,
    memory: int | None = None,
) -> Edit:
    """Move at most k features to their counterfactual codes, so that the change comes near ``wanted`` = x_cf - x.

    Greedy: one at a time the feature that lowers |x + change - x_cf| the most, none that raises it. Of features that help only
    together greedy takes none, and ends up to 2.5 times as far away as the best k (12 latents, k = 3). So for k > 1 the whole is
    begun from each of the eight best first features too, then taking k of them whether or not one helps yet, and each choice
    is made once more with the others as they are, twice over; the best end counts. Distances are kept up to date by inner
    products of the decoder's rows.
    """
    _check(clean, counterfactual, decoder, k)
    inner = decoder @ decoder.T
    count = min(k, clean.shape[1])
    moved = torch.zeros_like(clean, dtype=torch.bool)
    for part in chunks(len(clean), 32.0 * clean.shape[1], memory):
        step = counterfactual[part] - clean[part]
        wished = wanted[part] @ decoder.T
        least = torch.full((len(step), 1), torch.inf, dtype=step.dtype, device=step.device)
        for start in range(min(_STARTS, clean.shape[1]) if count > 1 else 1):
            search = _Search(step, wished, inner)
            chosen = [search.take(start if i == 0 else 0, forced=start > 0) for i in range(count)]
            for i in [*range(count)] * (_AGAIN if count > 1 else 0):
                search.put_back(chosen[i])
                chosen[i] = search.take()
            made = step * search.taken
            # |change|^2 - 2 change . wanted, which is the squared distance but for a constant
            distance = (made * (made @ inner - 2 * wished)).sum(dim=1, keepdim=True)
            moved[part] = torch.where(distance < least, search.taken, moved[part])
            least = torch.minimum(distance, least)
    return Edit(((counterfactual - clean) * moved) @ decoder, moved)


class _Search:
    """Which features of each row are moved, and what is still missing as inner products with the decoder's rows."""

    def __init__(self, step: Tensor, left: Tensor, inner: Tensor) -> None:
        self.step, self.left, self.inner = step, left, inner
        self.taken = torch.zeros_like(step, dtype=torch.bool)
        self._cost = step.square() * inner.diagonal()
        self._idle = step == 0

    def take(self, rank: int = 0, *, forced: bool = False) -> tuple[Tensor, Tensor]:
        """Move the best feature of each row, or the one of that ``rank``: its place, and by how much (0: none was moved).

        None is moved that does not help, unless ``forced``.
        """
        gain = (2 * self.step * self.left - self._cost).masked_fill(self.taken | self._idle, -torch.inf)
        best, place = (one[:, -1:] for one in gain.topk(rank + 1, dim=1))
        moved = best > (-torch.inf if forced else 0)
        length = torch.where(moved, self.step.gather(1, place), torch.zeros(()).to(self.step))
        self.left = self.left - length * self.inner[place[:, 0]]
        self.taken = self.taken.scatter(1, place, moved | self.taken.gather(1, place))
        return place, length

    def put_back(self, chosen: tuple[Tensor, Tensor]) -> None:
        """Undo one choice."""
        place, length = chosen
        self.left = self.left + length * self.inner[place[:, 0]]
        self.taken = self.taken.scatter(1, place, (length == 0) & self.taken.gather(1, place))


def value_scores(f1: Float[Tensor, "code value"], places: Int[Tensor, " row"]) -> Float[Tensor, "row code"]:
    """The F1 of every feature for each row's value."""
    return f1.T[places]


def _check(clean: Tensor, counterfactual: Tensor, decoder: Tensor, k: int) -> None:
    if clean.shape != counterfactual.shape or clean.shape[1] != decoder.shape[0]:
        raise InputError(
            f"codes {tuple(clean.shape)} and {tuple(counterfactual.shape)}, decoder {tuple(decoder.shape)}: they do not go "
            "together"
        )
    if k < 1:
        raise InputError(f"an edit changes at least one feature, got k={k}")
