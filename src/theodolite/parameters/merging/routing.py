"""Paths through the blocks of several models, their weights untouched, and the search for the best path.

All M blocks of all sources, laid out source after source and repeated r times, are T = M r slots. An indicator I in R^T
says which are executed, in order: slot t where I_t > 0. Between executed blocks i -> j the input of j is multiplied by
W_ij. Embedding, final norm and head are those of source 1. The search starts at I = 2 sigma for source 1's own blocks in the
first round, -2 sigma for all others, and W = 1: the start is source 1.

For many blocks W comes from a small network instead, W_ij(t) = 1 + pi(i / M, j / M, t / T), with pi = 0 at the start.

Source: Akiba, Shing, Tang, Sun, Ha, 2024, arXiv:2403.13187 (section 3.2).
"""

__all__ = ["RoutedModel", "RoutingResult", "evolve_routing"]

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.parallel import one_thread
from theodolite.parameters.merging.fitness import value_and_error
from theodolite.parameters.merging.search import cma_search

if TYPE_CHECKING:
    from theodolite.parameters.merging.evolve import MergeResult

Path = tuple[tuple[int, int], ...]
Measure = Callable[[nn.Module], float]

_FULL_SCALES = 16  # blocks up to which every pair has a scale of its own
_HIDDEN = 6  # units of pi
_SMALL_MODEL = 4_000_000


class _Scale:
    """A forward pre-hook that multiplies a block's first input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * self.factor}
        raise ModelError(f"{type(module).__name__} is called without a first argument, so its input cannot be scaled")


class RoutedModel(nn.Module):
    """Source 1 with its blocks replaced by a path through the blocks of all sources.

    sources: modules with a list of blocks of one hidden size. path: (source, block) pairs, executed in order, any of them
    as often as wanted. scales: what the input of each block on the path is multiplied by. blocks: the dotted name of the
    list of blocks in every source ("model.layers"); None finds the longest list of blocks of one kind.

    Parameters are those of the sources, not copies; forward, generate and config are as of source 1. Each execution of a
    block has its own number (``layer_idx``), so that a key-value cache keeps one slot for each execution.

    Raises InputError for a path or scales that do not fit, ModelError where no blocks are found or hidden sizes differ.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> routed = RoutedModel([net], [(0, 0), (0, 1), (0, 1)], blocks="")
    >>> import torch
    >>> x = torch.ones(1, 2)
    >>> torch.equal(routed(x), net[1](net(x)))
    True
    """

    def __init__(
        self,
        sources: Sequence[nn.Module],
        path: Sequence[tuple[int, int]],
        scales: Sequence[float] | None = None,
        *,
        blocks: str | None = None,
    ) -> None:
        super().__init__()
        name, lists = block_lists(sources, blocks)
        self.path: Path = _checked_path(path, [len(one) for one in lists])
        self.scales = tuple(float(s) for s in ([1.0] * len(self.path) if scales is None else scales))
        if len(self.scales) != len(self.path) or not np.isfinite(self.scales).all():
            raise InputError(f"need {len(self.path)} finite scales, one for each block on the path, got {scales}")
        self.blocks = name
        self.model = _replaced(sources[0], name, lists, self.path, self.scales)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What source 1 gives with the path in place of its blocks."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Text as source 1 generates it, with a cache slot for each execution."""
        if not hasattr(self.model, "generate"):
            raise ModelError(f"{type(self.model).__name__} has no generate")
        generate: Any = self.model.generate
        return generate(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The configuration of source 1, with as many layers as the path; None where it has none."""
        return getattr(self.model, "config", None)

    def exported(self) -> nn.Module:
        """A plain copy of source 1's class with the path's blocks as its own, weights not shared with the sources.

        Raises ModelError where a scale is not 1, which a plain list of blocks cannot hold.
        """
        if any(scale != 1 for scale in self.scales):
            raise ModelError(
                "a path with scales is no plain list of blocks; search with learn_scales=False to export one"
            )
        made = copy.deepcopy(self.model)
        blocks: Any = _at(made, self.blocks)
        for place, block in enumerate(blocks):  # one that stands twice on the path becomes two, as a file has them
            blocks[place] = copy.deepcopy(block)
        return made


def block_lists(sources: Sequence[nn.Module], blocks: str | None) -> tuple[str, list[list[nn.Module]]]:
    """The name of the list of blocks in source 1, and the blocks of every source."""
    if isinstance(sources, nn.Module) or len(sources) < 1 or not all(isinstance(s, nn.Module) for s in sources):
        raise InputError("routing needs a list of nn.Module sources")
    names = [_find_blocks(source, blocks, k) for k, source in enumerate(sources)]
    lists = [list(_at(source, name)) for source, name in zip(sources, names)]  # type: ignore[arg-type]
    widths = [_hidden_size(source, one[0]) for source, one in zip(sources, lists)]
    for k, width in enumerate(widths):
        if width is not None and widths[0] is not None and width != widths[0]:
            raise ModelError(
                f"hidden sizes differ: {widths[0]} in source 1 and {width} in source {k + 1}; blocks of different width "
                "cannot follow each other"
            )
    return names[0], lists


def _at(source: nn.Module, name: str) -> nn.Module:
    return source.get_submodule(name) if name else source


def _find_blocks(source: nn.Module, blocks: str | None, k: int) -> str:
    lists = {
        name: module
        for name, module in source.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    }
    if blocks is not None:
        if blocks not in lists:
            known = ", ".join(repr(name) for name in lists) or "none"
            raise ModelError(f"source {k + 1} has no list of blocks {blocks!r}; its lists are {known}")
        return blocks
    alike = {name: m for name, m in lists.items() if len(m) > 1 and len({type(block) for block in m}) == 1}
    if not alike:
        raise ModelError(
            f"no list of blocks of one kind was found in source {k + 1} ({type(source).__name__}); give blocks=, the dotted "
            f"name of an nn.ModuleList or nn.Sequential. There are: {', '.join(map(repr, lists)) or 'none'}"
        )
    return max(alike, key=lambda name: len(alike[name]))


def _hidden_size(source: nn.Module, block: nn.Module) -> int | None:
    """From the configuration, or else the block's first norm, or else its first linear map; None where neither tells."""
    size = getattr(getattr(source, "config", None), "hidden_size", None)
    if size is not None:
        return int(size)
    for name, parameter in block.named_parameters():
        if "norm" in name.lower() and parameter.ndim == 1:
            return len(parameter)
    return next((m.in_features for m in block.modules() if isinstance(m, nn.Linear)), None)


def _checked_path(path: Sequence[tuple[int, int]], sizes: list[int]) -> Path:
    made = tuple((int(source), int(block)) for source, block in path)
    if not made:
        raise InputError("the path has no block; a model needs at least one")
    for source, block in made:
        if not 0 <= source < len(sizes) or not 0 <= block < sizes[source]:
            raise InputError(
                f"the path names block {block} of source {source}; there are sources 0..{len(sizes) - 1} with "
                f"{', '.join(map(str, sizes))} blocks"
            )
    return made


def _replaced(
    first: nn.Module, name: str, lists: list[list[nn.Module]], path: Path, scales: tuple[float, ...]
) -> nn.Module:
    """Source 1 with other blocks: new module objects around the same parameters."""
    blocks = list[nn.Module]()
    for place, ((source, block), scale) in enumerate(zip(path, scales)):
        one = _same_weights(lists[source][block])
        for module in one.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
        if scale != 1.0:
            one.register_forward_pre_hook(_Scale(scale), with_kwargs=True)
        blocks.append(one)
    held = _at(first, name)
    new = nn.Sequential(*blocks) if isinstance(held, nn.Sequential) else nn.ModuleList(blocks)
    if not name:
        return new.train(first.training)
    model = _same_weights(first, skip=held)
    parent, _, attribute = name.rpartition(".")
    setattr(_at(model, parent), attribute, new.train(held.training))
    _count_layers(first, model, len(lists[0]), path)
    return model


def _same_weights(module: nn.Module, skip: nn.Module | None = None) -> nn.Module:
    """The same tree of modules as new objects that hold the same parameters and buffers; ``skip`` is left as it is."""
    if module is skip:
        return module
    other = module.__new__(type(module))
    other.__dict__ = {
        key: value.copy() if key.startswith("_") and isinstance(value, dict) else value
        for key, value in module.__dict__.items()
    }
    other._modules = {
        name: None if child is None else _same_weights(child, skip) for name, child in module._modules.items()
    }
    return other


def _count_layers(first: nn.Module, model: nn.Module, before: int, path: Path) -> None:
    """Tell a configuration that there are as many layers as the path has blocks."""
    config = getattr(first, "config", None)
    if getattr(config, "num_hidden_layers", None) != before:
        return
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = len(path)  # type: ignore[union-attr]
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        changed.layer_types = [kinds[min(block, before - 1)] for _, block in path]  # type: ignore[union-attr]
    old = {id(m.config) for m in first.modules() if hasattr(m, "config")}
    for module in model.modules():
        if id(getattr(module, "config", None)) in old and module.config.num_hidden_layers == before:  # type: ignore
            module.config = changed  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class RoutingResult:
    """The best path that a search found.

    path: (source, block) pairs. scales: of the inputs of its blocks. fitness: in the search; start: source 1's.
    validation, test: on other examples, where they were given (validation else the fitness). history: a DataFrame
    (evaluation, best, mean). controls: a DataFrame (baseline, fitness, validation, test, evaluations): each source, and
    random paths with equally many evaluations. weights: the weight-space result where that came first. model: a
    `RoutedModel` in eval mode.
    """

    path: Path
    scales: tuple[float, ...]
    fitness: float
    start: float
    validation: float
    test: float | None
    history: pd.DataFrame
    controls: pd.DataFrame
    evaluations: int
    dropped: int
    seed: int
    model: RoutedModel = field(repr=False)
    weights: "MergeResult | None" = field(default=None, repr=False)


class PathGenes:
    """The genes of a path: T indicators, then the scales, each pair's own or those of a small network."""

    def __init__(self, sizes: list[int], repeats: int, sigma: float, learn_scales: bool) -> None:
        self.blocks = [(source, block) for source, size in enumerate(sizes) for block in range(size)]
        self.M, self.T, self.sigma = len(self.blocks), len(self.blocks) * repeats, sigma
        self.own = sizes[0]
        self.kind = "none" if not learn_scales else "matrix" if self.M <= _FULL_SCALES else "network"
        self.scales = {"none": 0, "matrix": self.M**2, "network": 5 * _HIDDEN + 1}[self.kind]

    def start(self) -> Float[np.ndarray, " gene"]:
        """The genes of source 1."""
        indicator = np.full(self.T, -2 * self.sigma)
        indicator[: self.own] = 2 * self.sigma
        if self.kind != "network":
            return np.concatenate([indicator, np.ones(self.scales)])
        inner = np.random.default_rng(0).normal(size=4 * _HIDDEN)  # what pi can say at first; what it says starts at 0
        return np.concatenate([indicator, inner, np.zeros(_HIDDEN + 1)])

    def decode(self, genes: np.ndarray) -> tuple[Path, tuple[float, ...]]:
        """(path, scales); an empty path where no slot is on."""
        slots = np.flatnonzero(genes[: self.T] > 0)
        at = slots % self.M
        path = tuple(self.blocks[i] for i in at)
        if self.kind == "none" or len(slots) < 2:
            return path, (1.0,) * len(slots)
        pairs = list(pairwise(at.tolist()))
        if self.kind == "matrix":
            W = genes[self.T :].reshape(self.M, self.M)
            return path, (1.0, *(float(W[i, j]) for i, j in pairs))
        inner = genes[self.T : self.T + 4 * _HIDDEN].reshape(4, _HIDDEN)
        inputs = np.column_stack([np.array(pairs) / self.M, slots[1:] / self.T, np.ones(len(pairs))])
        out = np.tanh(inputs @ inner) @ genes[self.T + 4 * _HIDDEN : -1] + genes[-1]
        return path, (1.0, *(float(1 + v) for v in out))

    def draw(self, generator: np.random.Generator, number: int) -> np.ndarray:
        """Random genes: each slot on or off with the chance that gives paths as long as source 1 on average, scales 1."""
        genes = np.tile(self.start(), (number, 1))
        on = generator.random((number, self.T)) < self.own / self.T
        genes[:, : self.T] = np.where(on, 1.0, -1.0)
        return genes


def evolve_routing(
    sources: Sequence[nn.Module],
    fitness: Measure,
    *,
    repeats: int = 2,
    max_evaluations: int = 1000,
    population: int | None = 16,
    sigma: float | int = 0.1,
    learn_scales: bool = True,
    seed: int = 0,
    blocks: str | None = None,
    patience: int | None = None,
    validation: Measure | None = None,
    test: Measure | None = None,
    control: bool = True,
    on_generation: Callable[[int, float], None] | None = None,
) -> RoutingResult:
    """Find the path through the blocks of the ``sources``, and the scales along it, with the largest ``fitness``.

    sources: modules with blocks of one hidden size; source 1 gives embedding and head and is the start, so the result is
    never worse than it on the fitness. fitness(model), validation, test: as for `evolve_weights`. repeats: r. sigma: first
    step size. learn_scales: search W too: M^2 numbers for up to 16 blocks in all, 31 of a small network above. control:
    also try as many random paths. A path that was evaluated already is not evaluated again, but counts.

    Raises InputError for wrong options or fewer than two sources, ModelError where blocks are not found (give ``blocks``),
    hidden sizes differ or no candidate has a finite fitness.
    """
    if isinstance(sources, nn.Module) or len(sources) < 2:
        raise InputError("routing needs a list of at least two sources; one alone has only its own path")
    if isinstance(repeats, bool) or repeats < 1:
        raise InputError(f"repeats is how often the sequence of blocks is laid out, at least 1, got {repeats}")
    if not callable(fitness):
        raise InputError(f"fitness must be a function of a model, got {type(fitness).__name__}; see accuracy_fitness")
    sizes = [len(one) for one in block_lists(sources, blocks)[1]]
    genes = PathGenes(sizes, repeats, float(sigma), learn_scales)
    known = dict[tuple[Path, tuple[float, ...]], float]()

    def routed(path: Path, scales: tuple[float, ...]) -> RoutedModel:
        return RoutedModel(sources, path, scales, blocks=blocks).eval()

    def score(many: np.ndarray) -> np.ndarray:
        values = np.full(len(many), math.nan)
        for i, one in enumerate(many):
            key = genes.decode(one)
            if key[0]:
                if key not in known:
                    known[key] = value_and_error(fitness, routed(*key))[0]
                values[i] = known[key]
        return values

    rows = list[tuple[str, float, float, float | None, int]]()

    def tell(name: str, model: nn.Module, value: float, number: int) -> tuple[float, float | None]:
        checked = value if validation is None else value_and_error(validation, model)[0]
        tested = None if test is None else value_and_error(test, model)[0]
        rows.append((name, value, checked, tested, number))
        return checked, tested

    small = sum(p.numel() for source in sources for p in source.parameters()) < _SMALL_MODEL
    with one_thread(small):
        found = cma_search(
            score, genes.start(), sigma=float(sigma), max_evaluations=max_evaluations, population=population, seed=seed,
            patience=patience, on_generation=on_generation,
        )  # fmt: skip
        path, scales = genes.decode(found.genes)
        model = routed(path, scales)
        checked, tested = tell("evolved path", model, found.value, found.evaluations)
        rows.clear()
        for k, source in enumerate(sources):
            tell(f"source {k + 1}", source, value_and_error(fitness, source)[0], 1)
        start = rows[0][1]
        if control:
            generator = np.random.default_rng(seed)
            tries = genes.draw(generator, max_evaluations)
            values = score(tries)
            if np.isfinite(values).any():
                top = int(np.nanargmax(values))
                tell("random paths", routed(*genes.decode(tries[top])), float(values[top]), max_evaluations)
    controls = pd.DataFrame(rows, columns=["baseline", "fitness", "validation", "test", "evaluations"])
    return RoutingResult(
        path=path,
        scales=scales,
        fitness=found.value,
        start=start,
        validation=checked,
        test=tested,
        history=found.history,
        controls=controls.astype({"test": "float64"}),
        evaluations=found.evaluations,
        dropped=found.dropped,
        seed=seed,
        model=model,
    )
