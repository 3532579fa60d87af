"""All dictionaries of one layer in one table, each scored in the same way on the same held-out states.

approximation   explained = 1 - |f - f_hat|^2 / |f - mean|^2
                recovered = (L_mean - L_f_hat) / (L_mean - L_f),  L the model's loss with the layer's mean, f_hat or f in place
control         (L_f - L_edit) / (L_f - L_other),  L the loss on the targets of another input, whose states f' are put in place
                whole or as f + (the codes that bring f nearest to f', few of them, moved to their value at f')
sparsity        active: codes that are on; dead: share of codes that never are
d90             fewest codes that keep 90 % of the variance that all codes keep
stability       mean cosine of the directions of two seeds, matched one to one

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366, whose three tests these are where no attribute of the inputs is known.
"""

__all__ = ["DictionaryTable", "LayerLoss", "compare_dictionaries"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations.dictionary_evaluation.edits import greedy_edit
from theodolite.activations.dictionary_evaluation.evaluation import recovered_share
from theodolite.core.dictionary import Dictionary, decoder_of, kept_codes_curve, measure, stability
from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate, bootstrap
from theodolite.core.memory import chunks

_RESAMPLES = 400
_WITH_INTERVALS = ("explained", "recovered", "control")


LayerLoss = Callable[[Tensor, Tensor], Tensor]
"""loss(states, targets_of) -> (input,): the model's loss on each input where the layer holds ``states`` (input, ...) and the
targets are those of the inputs ``targets_of`` (input,)."""


@dataclass(frozen=True, eq=False)
class DictionaryTable:
    """What `compare_dictionaries` found, on states that fitted nothing.

    frame: a row for each dictionary, by name: codes, active, dead, explained, recovered, control (each with _low and _high),
    d90, stability. NaN is what could not be measured; notes say why. moved: the codes that an edit moves at most. loss: of
    the model as it is and with the layer's mean in place, None where no loss was given.
    """

    frame: pd.DataFrame
    moved: int
    loss: tuple[Estimate, Estimate] | None
    notes: tuple[str, ...]

    def estimate(self, name: str, column: str) -> Estimate:
        """One number of the table, with its interval where it has one."""
        row: Any = self.frame.loc[name]
        if column not in _WITH_INTERVALS:
            return Estimate.exact(float(row[column]))
        return Estimate(float(row[column]), float(row[f"{column}_low"]), float(row[f"{column}_high"]))

    def __str__(self) -> str:
        shown = self.frame.loc[:, [name for name in self.frame.columns if not name.endswith(("_low", "_high"))]]
        return shown.to_string(float_format=lambda value: f"{value:.3g}", na_rep="-")


@torch.no_grad()
def compare_dictionaries(
    dictionaries: Mapping[str, Dictionary],
    fit: Float[Tensor, "row width"],
    states: Float[Tensor, "input *token width"],
    loss: LayerLoss | None = None,
    *,
    again: Mapping[str, Dictionary] | None = None,
    moved: int = 4,
    groups: np.ndarray | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> DictionaryTable:
    """The table of any objects with directions, encode and decode (`theodolite.core.dictionary.Dictionary`).

    fit: states that the dictionaries were made from, for the layer's mean and for the order of codes. states: held-out ones,
    those of each input together. loss: of the model with given states in the layer; without it recovered and control are NaN.
    again: the same kinds from another seed, by the same names; stability is NaN for those that are not there. groups: which
    inputs belong together (texts of one source), for the intervals.

    Raises InputError for a dictionary of another width, for fewer than two inputs and for states that are all the same.

    >>> from theodolite.core.dictionary import LinearDictionary
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0])
    >>> table = compare_dictionaries({"neurons": LinearDictionary.neurons(3)}, x[:100], x[100:])
    >>> float(table.frame.loc["neurons", "explained"]), float(table.frame.loc["neurons", "d90"])
    (1.0, 2.0)
    """
    if not dictionaries or moved < 1:
        raise InputError(
            f"need at least one dictionary and one code to move, got {len(dictionaries)} and moved={moved}"
        )
    if len(states) < 2:
        raise InputError(f"need states of at least two inputs, got {len(states)}")
    flat = states.reshape(-1, states.shape[-1])
    model = None if loss is None else _Model(loss, fit, states, groups, seed, memory)
    notes = ["no loss was given, so nothing is said of what the model does"] if model is None else model.notes
    rows = list[dict[str, Any]]()
    for name, one in dictionaries.items():
        (quality,) = measure({name: one}, flat, memory=memory)
        rebuilt = _rebuilt(one, states, memory)
        found = {
            "explained": _explained(states, rebuilt, groups, seed),
            "recovered": None if model is None else model.recovered(rebuilt),
            "control": None,
        }
        d90 = np.nan
        try:
            d90 = _d90(one, fit, flat)
            found["control"] = None if model is None else model.controlled(one, moved)
        except InputError as error:  # of a dictionary that does not add its codes up
            notes.append(f"{name}: {error}")
        numbers = {"dictionary": name, "codes": quality.codes, "active": quality.active, "dead": quality.dead}
        for column, value in found.items():
            numbers |= _with_interval(column, value)
        other = None if again is None else again.get(name)
        rows.append(numbers | {"d90": d90, "stability": np.nan if other is None else stability(one, other)})
    return DictionaryTable(
        pd.DataFrame(rows).set_index("dictionary"), moved, None if model is None else model.told(), tuple(notes)
    )


class _Model:
    """What the model loses with given states in the layer, and what that is measured against.

    clean, ablated: losses on the inputs' own targets. unmoved, patched: on those of ``other``, each input's other one, with the
    states as they are and with the other's. Arrays (input,).
    """

    def __init__(
        self, loss: LayerLoss, fit: Tensor, states: Tensor, groups: np.ndarray | None, seed: int, memory: int | None
    ) -> None:
        self._loss, self._states, self._groups, self._seed, self._memory = loss, states, groups, seed, memory
        order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
        self._own, self._other = torch.arange(len(states)), torch.empty_like(order)
        self._other[order] = order.roll(1)
        mean = fit.mean(dim=0).to(states).expand_as(states)
        self.clean, self.ablated = self._losses(states, self._own), self._losses(mean, self._own)
        self.unmoved, self.patched = self._losses(states, self._other), self._losses(states[self._other], self._other)
        self.notes = list[str]()
        self._matters = self._share(self.ablated, self.clean, self.ablated) is not None
        self._moves = self._share(self.unmoved, self.patched, self.unmoved) is not None
        if not self._matters:
            self.notes.append("the layer does not matter for the loss on these inputs, so no share of it is told")
        if not self._moves:
            self.notes.append("another input's states do not change the loss, so edits have no effect to share")

    def _losses(self, states: Tensor, targets_of: Tensor) -> np.ndarray:
        found = self._loss(states, targets_of)
        if found.shape != targets_of.shape:
            raise InputError(f"the loss gives {tuple(found.shape)} for {len(targets_of)} inputs; it must give one each")
        return found.detach().cpu().double().numpy()

    def _share(self, held: np.ndarray, best: np.ndarray, worst: np.ndarray) -> Estimate | None:
        try:
            return recovered_share(held, best, worst, groups=self._groups, seed=self._seed)
        except InputError:
            return None

    def recovered(self, rebuilt: Tensor) -> Estimate | None:
        """The share of the loss that a reconstruction keeps."""
        return self._share(self._losses(rebuilt, self._own), self.clean, self.ablated) if self._matters else None

    def controlled(self, dictionary: Dictionary, moved: int) -> Estimate | None:
        """The share of a whole patch's effect that moving a few codes has; what is not reconstructed stays in place."""
        if not self._moves:
            return None
        flat, wanted = (x.reshape(-1, x.shape[-1]) for x in (self._states, self._states[self._other]))
        codes, counterfactual = dictionary.encode(flat), dictionary.encode(wanted)
        decoder, _ = decoder_of(dictionary, codes)
        edit = greedy_edit(codes, counterfactual, decoder, (wanted - flat).to(codes), moved, memory=self._memory)
        edited = self._states + edit.change.to(self._states).reshape(self._states.shape)
        return self._share(self._losses(edited, self._other), self.patched, self.unmoved)

    def told(self) -> tuple[Estimate, Estimate]:
        """The loss of the model as it is, and with the mean in the layer's place."""
        options: dict[str, Any] = {"seed": self._seed, "resamples": _RESAMPLES, "groups": self._groups}
        return bootstrap(self.clean, **options), bootstrap(self.ablated, **options)


def _with_interval(column: str, value: Estimate | None) -> dict[str, float]:
    told = (np.nan,) * 3 if value is None else (value.value, value.low, value.high)
    return dict(zip((column, f"{column}_low", f"{column}_high"), told, strict=True))


def _rebuilt(dictionary: Dictionary, states: Tensor, memory: int | None) -> Tensor:
    flat = states.reshape(-1, states.shape[-1])
    count, width = dictionary.directions.shape
    parts = [
        dictionary.decode(dictionary.encode(flat[part])).to(states)
        for part in chunks(len(flat), 16.0 * (count + width), memory)
    ]
    return torch.cat(parts).reshape(states.shape)


def _explained(states: Tensor, rebuilt: Tensor, groups: np.ndarray | None, seed: int) -> Estimate:
    width = states.shape[-1]
    mean = states.reshape(-1, width).double().mean(dim=0)
    lost, about = (
        x.double().square().reshape(len(states), -1).sum(dim=1)
        for x in (states.double() - rebuilt.double(), states.double() - mean)
    )
    pairs = torch.stack([lost, about], dim=1).cpu().numpy()

    def share(part: np.ndarray) -> float:
        lost, about = part.sum(axis=0)
        return float(1 - lost / about) if about > 0 else 0.0

    return bootstrap(pairs, share, seed=seed, resamples=_RESAMPLES, groups=groups)


def _d90(dictionary: Dictionary, fit: Tensor, flat: Tensor) -> float:
    curve = kept_codes_curve(dictionary, flat, fit=fit, blocks=1)
    if curve.reference <= 0:  # of nothing kept there is no share
        return np.nan
    found = curve.smallest().dimension
    return np.nan if found is None else float(found)
