"""One draw of a map: which layers and families there are, a baseline, the path, the scaled map."""

__all__ = ["Arm", "Draws"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError
from theodolite.explanations.baseline_bandit.baselines import (
    FAMILIES,
    TABLE_FAMILIES,
    BaselineFamily,
    draw_baselines,
    family_name,
    scaled,
)
from theodolite.explanations.baseline_bandit.paths import path_attributions, raw_maps
from theodolite.explanations.baseline_bandit.split import SplitModel, feature_layers

_BANK = 100  # training inputs kept for the train family


class Arm(NamedTuple):
    """What the bandit pulls: a layer and a family of baselines."""

    layer: str
    family: str


@dataclass(frozen=True, eq=False)
class Draws:
    """Maps of one network by layers and families; the bank's activations are computed once.

    splits: by layer. families: by name. bank: activations of training inputs by layer, {} where there are none.
    """

    splits: dict[str, SplitModel]
    families: dict[str, BaselineFamily]
    bank: dict[str, Tensor]
    steps: int
    combine: str
    output: str
    train_mean: int
    memory: int | None

    @classmethod
    def of(
        cls,
        model: Any,
        x: Float[Tensor, "row ..."],
        *,
        layers: str | Sequence[str] = "auto",
        families: int | Sequence[BaselineFamily] = 5,
        bank: Float[Tensor, "bank ..."] | None = None,
        steps: int = 10,
        combine: str = "relu-product",
        output: str = "logit",
        train_mean: int = 1,
        channels_last: bool = False,
        memory: int | None = None,
    ) -> "Draws":
        """Check what was asked for on rows of ``x``. An int of families: the first so many, with ``x`` as bank if none is given.

        A family named "train" (on tables: any) without a bank is an InputError.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"baselines inside a network need an nn.Module, got {type(model).__name__}")
        table = x.ndim == 2
        if isinstance(families, int):
            there = TABLE_FAMILIES if table else FAMILIES
            if isinstance(families, bool) or not 1 <= families <= len(FAMILIES):
                raise InputError(f"families must be 1..{len(FAMILIES)} or a list of families, got {families}")
            chosen: Sequence[BaselineFamily] = there[:families]
            bank = x if bank is None else bank
        else:
            chosen = [families] if isinstance(families, str) or callable(families) else list(families)
        named = {family_name(family): family for family in chosen}
        if not named or len(named) < len(chosen):
            raise InputError(f"need at least one family, each under a name of its own, got {list(chosen)}")
        if bank is None and ("train" in named or (table and named.keys() & set(TABLE_FAMILIES))):
            raise InputError(
                "the train family" + (" (on tables any)" if table else "") + " needs a bank: pass training inputs"
            )
        wanted = feature_layers(model, x) if layers == "auto" else [layers] if isinstance(layers, str) else list(layers)
        if not wanted:
            raise InputError("need at least one layer")
        splits = {layer: SplitModel(model, layer, channels_last=channels_last) for layer in wanted}
        for split in splits.values():
            split.check(x[:1])
        held = {} if bank is None else {name: s.lower_all(bank[:_BANK], memory=memory) for name, s in splits.items()}
        return cls(splits, named, held, steps, combine, output, train_mean, memory)

    @property
    def arms(self) -> list[Arm]:
        """Every pair of layer and family, the families of one layer next to each other."""
        return [Arm(layer, family) for layer in self.splits for family in self.families]

    def maps(
        self,
        arm: Arm,
        a: Float[Tensor, "row ..."],
        target: Int[Tensor, " row"],
        shape: tuple[int, ...],
        rng: torch.Generator,
    ) -> Float[Tensor, "row ..."]:
        """One map in [0, 1] a row from a fresh baseline each; NaN in a row whose gradient is not finite.

        a: activations at the arm's layer. shape: of a map, (height, width) or (features,).
        """
        split = self.splits[arm.layer]
        family = self.families.get(arm.family, arm.family)
        b = draw_baselines(
            family, a, rng, self.bank.get(arm.layer), train_mean=self.train_mean, channels_last=split.channels_last
        )
        found = path_attributions(split, a, target, b, self.steps, self.combine, output=self.output, memory=self.memory)
        size = shape if len(shape) == 2 else None
        broken = ~torch.isfinite(found).flatten(1).all(dim=1)
        maps = scaled(raw_maps(split, torch.nan_to_num(found, posinf=0.0, neginf=0.0), size)).float()
        maps[broken] = torch.nan
        return maps
