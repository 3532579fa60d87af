"""Masks of a network's units, what stands or falls with each, and their removal for good."""

__all__ = [
    "Coupling",
    "Footprint",
    "UnitMask",
    "apply_mask",
    "coupled_units",
    "footprint",
    "prune_units",
    "remove_units",
]

from theodolite.core.masks.coupling import Coupling, coupled_units
from theodolite.core.masks.units import Footprint, UnitMask, apply_mask, footprint, prune_units, remove_units
