"""A pretrained network that is fine-tuned in d numbers: theta_0 + lambda P theta, arXiv:2012.13255, equations 2 to 5."""

__all__ = ["FineTuningSubspace"]

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from theodolite.core.errors import InputError, ModelError
from theodolite.core.functional import call_with, tensor_places
from theodolite.core.parallel import seeds_for
from theodolite.parameters.coordinate_files import fingerprint, read_coordinates, restore_buffers, write_coordinates
from theodolite.parameters.reparametrization import KINDS, make_projection
from theodolite.parameters.weights import as_patterns, matches

Method = Literal["said", "did"]
Groups = Literal["layer", "tensor"]

_ABOUT = {"method", "groups", "projection", "seed", "include", "exclude", "head", "start", "projected"}


class FineTuningSubspace(nn.Module):
    """A pretrained network whose adapted tensors are theta_0 + lambda P theta, with theta and lambda all that trains.

        DID    theta_i = theta_0,i + P_i theta,                 theta in R^d                                     (eq. 2)
        SAID   theta_i = theta_0,i + lambda_l(i) P_i theta,     theta in R^(d - m), one lambda for each of m groups (eq. 5)

    model: the pretrained network with its head (copied; the head is part of theta_0 and of the subspace). dimension: d,
    which counts the scales. method: "said" (structure aware) or "did" (direct). groups: "layer" gives one scale to each
    numbered block (`encoder.layer.3`), one to the head and one to each other module with adapted parameters; "tensor" one
    to each tensor. projection: "hashed" is one balanced map over all adapted entries, P_i being its rows; "fastfood",
    "sparse" and "dense" are a map of its own for each tensor, unit columns each, fed by the same theta (where a tensor has
    fewer entries than theta, theta is cut into blocks of that size with a map each, and their images are summed).
    include, exclude: patterns of parameters or modules that are adapted, or not; the head always is, unless excluded. What
    is excluded by default are embeddings as BERT names them; others name them "*wte*" and "*wpe*" (GPT-2) or
    "*embed_tokens*" (Llama).
    head: name of the classifier's module, as in "classifier" for `bert.classifier`; None where there is none to name.
    seed: of P.

    coordinates: nn.Parameter (d - m,), zeros. scales: nn.Parameter (m,), ones; None with DID. Tied tensors count once;
    buffers are left alone. forward takes what the model takes and gives what it gives.

    Raises InputError where d does not fit (SAID needs d > m), ModelError for a model without that head or without
    parameters to adapt.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned = FineTuningSubspace(net, 7, head="2")
    >>> tuned.group_names, tuned.coordinates.shape, tuned.projected_parameters
    (('0', 'head'), torch.Size([5]), 58)
    """

    def __init__(
        self,
        model: nn.Module,
        dimension: int | np.integer,
        *,
        method: str = "said",
        groups: str = "layer",
        projection: str = "hashed",
        include: Iterable[str] | str | None = None,
        exclude: Iterable[str] | str | None = ("*embeddings*",),
        head: str | None = "classifier",
        seed: int | np.integer = 0,
    ) -> None:
        super().__init__()
        _check_options(method, groups, projection)
        self._include, self._exclude, self._head = as_patterns(include), as_patterns(exclude), head
        self.method, self.groups, self.projection, self.seed = method, groups, projection, int(seed)
        heads = _heads(model, head)
        places = tensor_places(model)
        self._names = _adapted_names(model, places, self._include, self._exclude, heads)
        labels = [name if groups == "tensor" else _layer(name, heads) for name in self._names]
        self.group_names: tuple[str, ...] = tuple(dict.fromkeys(labels))
        self._group_of = [self.group_names.index(label) for label in labels]
        spent = len(self.group_names) if method == "said" else 0
        if dimension <= spent:
            raise InputError(
                f"a dimension of {dimension} leaves no coordinate beside the {spent} scales of SAID; "
                f'take at least {spent + 1}, or method="did"' + (', or groups="layer"' if groups == "tensor" else "")
                if spent
                else f"a subspace needs at least one dimension, got d = {dimension}"
            )
        count = int(dimension) - spent
        self.model = copy.deepcopy(model)
        parameters = dict(self.model.named_parameters())
        self._open = [name for name, parameter in parameters.items() if parameter.requires_grad]
        self._places = places
        self._shapes = [parameters[name].shape for name in self._names]
        self.projected_parameters: int = sum(shape.numel() for shape in self._shapes)
        self.total_parameters: int = sum(parameter.numel() for parameter in parameters.values())
        first = parameters[self._names[0]]
        precise = torch.float64 if any(parameters[n].dtype == torch.float64 for n in self._names) else torch.float32
        if count > self.projected_parameters:
            raise InputError(
                f"a subspace of {count} coordinates does not fit into D = {self.projected_parameters} parameters, those that "
                "are adapted; take fewer, or adapt more of the model"
            )
        self.maps = _maps(projection, count, [shape.numel() for shape in self._shapes], self.seed, precise)
        self.maps.to(first.device)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.coordinates = nn.Parameter(torch.zeros(count, dtype=precise, device=first.device))
        self.scales = nn.Parameter(torch.ones(spent, dtype=precise, device=first.device)) if spent else None
        self._kept: dict[str, Tensor] | None = None
        self.register_state_dict_pre_hook(_check_unmerged)
        self.train(model.training)

    @property
    def dimension(self) -> int:
        """d: the coordinates and the scales together."""
        return len(self.coordinates) + (0 if self.scales is None else len(self.scales))

    @property
    def merged(self) -> bool:
        """Whether the model's own parameters hold theta_0 + lambda P theta (`merge_`)."""
        return self._kept is not None

    def trained(self) -> list[nn.Parameter]:
        """All that trains: the coordinates, and with SAID the scales."""
        return [self.coordinates] if self.scales is None else [self.coordinates, self.scales]

    def steps(self) -> dict[str, Tensor]:
        """P_i theta of every adapted tensor by name, in the tensor's shape, without its scale."""
        sizes = [shape.numel() for shape in self._shapes]
        if self.projection == "hashed":
            pieces = self.maps[0](self.coordinates).split(sizes)
        else:
            pieces = [_summed(blocks, self.coordinates) for blocks in self.maps]
        return {name: piece.view(shape) for name, shape, piece in zip(self._names, self._shapes, pieces, strict=True)}

    def weights(self) -> dict[str, Tensor]:
        """The adapted parameters by name, as they are at the present coordinates and scales."""
        parameters = dict(self.model.named_parameters())
        if self.merged:
            return {name: parameters[name] for name in self._names}
        scales = None if self.scales is None else self.scales.unbind()
        return {
            name: _moved(parameters[name], step, None if scales is None else scales[group])
            for (name, step), group in zip(self.steps().items(), self._group_of, strict=True)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives at theta_0 + lambda P theta."""
        if self.merged:
            return self.model(*args, **kwargs)
        return call_with(self.model, self.weights(), args, kwargs, places=self._places)

    @torch.no_grad()
    def merge_(self) -> "FineTuningSubspace":
        """Write theta_0 + lambda P theta into the model, so that it runs at its own speed; theta_0 is kept beside it."""
        if self.merged:
            raise ModelError("the coordinates are merged into the model already; unmerge_() comes first")
        parameters = dict(self.model.named_parameters())
        weights = self.weights()
        self._kept = {name: parameters[name].clone() for name in self._names}
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        return self

    @torch.no_grad()
    def unmerge_(self) -> "FineTuningSubspace":
        """Put theta_0 back, bit by bit."""
        if self._kept is None:
            raise ModelError("nothing is merged into the model; merge_() comes first")
        parameters = dict(self.model.named_parameters())
        for name, value in self._kept.items():
            parameters[name].copy_(value)
        self._kept = None
        return self

    def materialize(self) -> nn.Module:
        """An ordinary copy of the model at the present coordinates, trainable as before: save or generate with it."""
        plain = copy.deepcopy(self.model)
        parameters = dict(plain.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights().items():
                parameters[name].copy_(weight)
        for name in self._open:
            parameters[name].requires_grad_(True)
        return plain

    @torch.no_grad()
    def group_movement(self) -> dict[str, float]:
        """How far each group has moved: ||lambda P theta|| / ||theta_0|| over its tensors (0 where theta_0 is 0)."""
        _check_unmerged(self)
        parameters = dict(self.model.named_parameters())
        moved, size = torch.zeros(len(self.group_names), dtype=torch.float64), torch.zeros(len(self.group_names))
        for (name, step), group in zip(self.steps().items(), self._group_of, strict=True):
            scale = 1.0 if self.scales is None else float(self.scales[group])
            moved[group] += float(step.double().square().sum()) * scale**2
            size[group] += float(parameters[name].double().square().sum())
        ratio = (moved / size.double().clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
        return dict(zip(self.group_names, torch.where(size > 0, ratio, 0.0).tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Write the coordinates, the scales, what rebuilds P, a checksum of theta_0 and the buffers of the state dict."""
        _check_unmerged(self)
        about = {
            "method": self.method,
            "groups": self.groups,
            "projection": self.projection,
            "seed": self.seed,
            "include": self._include,
            "exclude": self._exclude,
            "head": self._head,
            "projected": self.projected_parameters,
            "start": fingerprint(self.model),
        }
        arrays = {"coordinates": self.coordinates} | ({} if self.scales is None else {"scales": self.scales})
        write_coordinates(path, about, arrays, self.model)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> "FineTuningSubspace":
        """Rebuild from a file and the pretrained model that it started from, with the same fresh head.

        Raises ModelError where the file is something else or theta_0 is another.
        """
        about, arrays = read_coordinates(path, _ABOUT, "fine-tuning subspace")
        coordinates, scales = arrays["coordinates"], arrays.get("scales", np.zeros(0))
        if about["start"] != fingerprint(model):
            raise ModelError(
                f"{path} belongs to other base weights (checksum {about['start']}, this model has {fingerprint(model)}); "
                "load the same pretrained model, with a head drawn from the same seed"
            )
        options = {
            name: about[name] for name in ("method", "groups", "projection", "seed", "include", "exclude", "head")
        }
        made = cls(model, len(coordinates) + len(scales), **options)
        with torch.no_grad():
            made.coordinates.copy_(torch.from_numpy(coordinates))
            if made.scales is not None:
                made.scales.copy_(torch.from_numpy(scales))
        restore_buffers(path, arrays, made.model)
        return made


def _check_options(method: str, groups: str, projection: str) -> None:
    for name, given, known in (
        ("method", method, ("said", "did")),
        ("groups", groups, ("layer", "tensor")),
        ("projection", projection, tuple(KINDS)),
    ):
        if given not in known:
            raise InputError(f"{name} is one of {', '.join(known)}, got {given!r}")


def _check_unmerged(tuned: FineTuningSubspace, *_: Any) -> None:
    """Also before a state dict is made, whose reader would add the coordinates a second time."""
    if tuned.merged:
        raise ModelError("the start is not in the model while the coordinates are merged; unmerge_() comes first")


def _maps(projection: str, d: int, sizes: list[int], seed: int, dtype: torch.dtype) -> nn.ModuleList:
    """One map over all entries (hashed), or for each tensor the maps of the blocks that theta is cut into."""
    if projection == "hashed":
        return nn.ModuleList([make_projection(projection, d, sum(sizes), seed=seed, dtype=dtype)])
    maps = nn.ModuleList()
    for size, own in zip(sizes, seeds_for(seed, len(sizes)), strict=True):
        # a tensor of `size` entries has room for as many coordinates
        widths = [min(size, d - start) for start in range(0, d, size)]
        seeds = seeds_for(own, len(widths))
        maps.append(
            nn.ModuleList(
                make_projection(projection, width, size, seed=s, dtype=dtype)
                for width, s in zip(widths, seeds, strict=True)
            )
        )
    return maps


def _summed(blocks: Any, coordinates: Tensor) -> Tensor:
    parts = coordinates.split(blocks[0].shape[1])
    total = blocks[0](parts[0])
    for block, part in zip(blocks[1:], parts[1:], strict=True):
        total = total + block(part)
    return total


def _moved(start: Tensor, step: Tensor, scale: Tensor | None) -> Tensor:
    if start.dtype != step.dtype:
        return start + (step if scale is None else step * scale).to(start.dtype)
    return start + step if scale is None else torch.addcmul(start, step, scale)


def _heads(model: nn.Module, head: str | None) -> list[str]:
    """Full names of the modules that ``head`` names."""
    if head is None:
        return []
    modules = [name for name, _ in model.named_modules() if name]
    # a full name means that module alone, even where a block holds one of the same name ("2" and "0.2")
    found = [head] if head in modules else [n for n in modules if matches(n, [head]) or n.endswith(f".{head}")]
    if not found:
        numbered = [name for name in modules if not any(part.isdigit() for part in name.split("."))]
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        there = [name for name in linear if name in set(numbered)] or linear[-3:]
        raise ModelError(
            f"the model has no module {head!r} to be the head; candidates: {', '.join(there) or 'none'}; "
            "name one with head=, or head=None"
        )
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _adapted_names(
    model: nn.Module,
    places: Mapping[str, Sequence[str]],
    include: list[str] | None,
    exclude: list[str] | None,
    heads: list[str],
) -> list[str]:
    """Parameters that the patterns name by any of their places, and those of the head."""
    every: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    names = [
        name
        for name in every
        if (include is None or any(matches(place, include) or _inside(place, heads) for place in places[name]))
        and not (exclude is not None and any(matches(place, exclude) for place in places[name]))
    ]
    if not names:
        raise ModelError(
            f"no parameter is left after include={include} and exclude={exclude}; "
            f"the model has: {', '.join(list(every)[:20]) or 'none'}"
        )
    for name in names:
        if is_lazy(every[name]) or every[name].is_meta:
            raise ModelError(f"{name} has no values yet; load the weights, or run one batch through the model, first")
        if not every[name].is_floating_point():
            raise ModelError(f"{name} holds {every[name].dtype} numbers, which cannot be moved along P; exclude it")
    return names


def _inside(name: str, heads: Iterable[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


def _layer(name: str, heads: Iterable[str]) -> str:
    """The numbered block that holds a parameter ("encoder.layer.3"), else "head", "embeddings" or its own module."""
    if _inside(name, heads):
        return "head"
    parts = name.split(".")
    if any("embed" in part for part in parts):
        return "embeddings"
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1]) or name
