"""The recipe of a merge, one weight for each group of tensors and source, found by evolution on a fitness.

Genes are the weights w_gk and, for methods that keep a share of the task vectors, the densities rho_gk; all start at 0.5 and
CMA-ES moves them with first steps of 1/6. The sources themselves, their uniform merge and the start are candidates too, and
the best candidate ever evaluated is returned. Beside it stand the baselines of `baselines`, on the same examples.

Source: Akiba, Shing, Tang, Sun, Ha, 2024, arXiv:2403.13187 (section 3.1).
"""

__all__ = ["MergeResult", "evolve", "evolve_weights"]

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET
from theodolite.core.parallel import one_thread
from theodolite.parameters.merging.baselines import BASELINES, measure_baselines
from theodolite.parameters.merging.fitness import value_and_error
from theodolite.parameters.merging.methods import Merger
from theodolite.parameters.merging.routing import RoutingResult, block_lists, evolve_routing
from theodolite.parameters.merging.search import cma_search
from theodolite.parameters.merging.states import layer_groups
from theodolite.parameters.weights import as_patterns

Measure = Callable[[nn.Module], float]

_LOWEST_DENSITY = 0.01
_SMALL_MODEL = 4_000_000  # weights below which one thread is as fast and the numbers do not depend on the cores


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The best merge that a search found.

    weights: a DataFrame (group, source, weight, density). fitness: its value in the search, which is too good, being the
    best of many on the same examples; standard_error: of that value, where the fitness tells it. validation: of the
    examples given for it, else the fitness. test: of examples that neither fitted nor selected anything, None where none
    were given. history: a DataFrame (evaluation, best, mean). baselines: a DataFrame (baseline, fitness, validation, test,
    evaluations). dropped: candidates without a finite fitness. normalize: whether weights were divided by their sum.
    """

    weights: pd.DataFrame
    fitness: float
    validation: float
    test: float | None
    history: pd.DataFrame
    baselines: pd.DataFrame
    standard_error: float | None
    evaluations: int
    dropped: int
    method: str
    normalize: bool
    seed: int
    state: dict[str, Tensor] = field(repr=False)
    template: nn.Module = field(repr=False)

    def model(self) -> nn.Module:
        """The merge as a plain model, a copy of the first source with the merged weights, in eval mode."""
        made = copy.deepcopy(self.template)
        made.load_state_dict(self.state)
        return made.eval()

    @property
    def not_beaten(self) -> tuple[str, ...]:
        """Baselines that are at least as good, on the most independent examples there are."""
        column = "validation" if self.test is None else "test"
        own = self.validation if self.test is None else self.test
        return tuple(self.baselines.loc[self.baselines[column] >= own, "baseline"])

    def summary(self) -> str:
        """What a person should know: method, numbers, baselines, which source each end of the model comes from."""
        error = "" if self.standard_error is None else f" (standard error {self.standard_error:.2g})"
        told = f"fitness {self.fitness:.4g}{error}, validation {self.validation:.4g}"
        told += "" if self.test is None else f", test {self.test:.4g}"
        lines = [f"evolved {self.method}, normalize={self.normalize}, {self.evaluations} evaluations: {told}"]
        column = "validation" if self.test is None else "test"
        lines += [f"  {name}: {value:.4g}" for name, value in zip(self.baselines["baseline"], self.baselines[column])]
        share = self.weights.assign(size=self.weights["weight"].abs() * self.weights["density"])
        main = share.loc[share.groupby("group", sort=False)["size"].idxmax()]
        lines += [
            "  most of " + ", ".join(f"{group}: {source}" for group, source in zip(main["group"], main["source"]))
        ]
        if self.not_beaten:
            lines.append(f"  not better than: {', '.join(self.not_beaten)}")
        return "\n".join(lines)


class Genes:
    """The genes of a merge: which numbers of a vector are the weights and the densities of which group and source."""

    def __init__(self, merger: Merger, *, allow_negative: bool, initial: float) -> None:
        self.shape = (len(merger.groups), merger.count)
        self.slerp, self.sparse = merger.method == "slerp", bool(merger.kind.keeps)
        self.allow_negative, self.initial = allow_negative, float(initial)

    @property
    def number(self) -> int:
        """How many genes there are."""
        groups, sources = self.shape
        return groups if self.slerp else groups * sources * (2 if self.sparse else 1)

    def start(self) -> Float[np.ndarray, " gene"]:
        """Where the search begins."""
        return np.full(self.number, self.initial)

    def decode(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weights, densities), each (groups, K)."""
        if self.slerp:
            t = genes if self.allow_negative else np.clip(genes, 0.0, 1.0)
            return np.stack([1 - t, t], axis=1), np.ones(self.shape)
        half = self.shape[0] * self.shape[1]
        weights = genes[:half].reshape(self.shape)
        densities = np.ones(self.shape)
        if self.sparse:
            densities = np.clip(genes[half:], _LOWEST_DENSITY, 1.0).reshape(self.shape)
        return weights if self.allow_negative else np.abs(weights), densities

    def encode(self, weights: Sequence[float] | np.ndarray) -> Float[np.ndarray, " gene"]:
        """The genes of weights (K,) in every group, all densities 1."""
        if self.slerp:
            return np.full(self.number, float(weights[1]))
        table = np.broadcast_to(np.asarray(weights, dtype=np.float64), self.shape).ravel()
        return np.concatenate([table, np.ones_like(table)]) if self.sparse else table.copy()

    def draw(self, generator: np.random.Generator, number: int) -> np.ndarray:
        """Random genes, uniform in [0, 1]: what a random search tries."""
        return generator.uniform(0.0, 1.0, (number, self.number))


def evolve_weights(
    sources: Any,
    fitness: Measure,
    *,
    base: Any = None,
    method: str = "dare_ties",
    granularity: int = 1,
    filters: Sequence[str] | str = (),
    max_evaluations: int = 300,
    sigma: float | int = 1 / 6,
    population: int | None = None,
    allow_negative: bool = True,
    batch_evaluate: Callable[[list[dict[str, Tensor]]], Any] | None = None,
    screen: Measure | None = None,
    seed: int = 0,
    patience: int | None = None,
    initial: float | int = 0.5,
    validation: Measure | None = None,
    test: Measure | None = None,
    normalize: bool | None = None,
    lam: float | int = 1.0,
    sign_method: str = "sum",
    ignore: Iterable[str] | str | None = None,
    recompute_statistics: Any = None,
    baselines: Iterable[str] | str = BASELINES,
    on_generation: Callable[[int, float], None] | None = None,
) -> MergeResult:
    """Find the weights (and densities) for each group of tensors and source whose merge has the largest ``fitness``.

    sources: K modules or state dicts of one architecture, at least one of them or the base a module. fitness(model):
    larger is better; it is called in eval mode without gradients, with one module that is written anew for each
    candidate. screen: a cheaper fitness, such as the same on half of the rows; of every generation only the half that is
    better on it is asked the fitness itself. validation, test: the same on other examples, asked once for the result and
    once for each baseline; never the rows of the fitness.
    granularity, filters: `layer_groups`. max_evaluations: calls of fitness in the search; the random search among the
    ``baselines`` takes as many again, the grid of global weights up to 125 (names of `BASELINES`; () for none).
    population: candidates a generation, 4 + floor(3 ln n) where None. allow_negative: else the magnitudes of the genes
    are the weights. batch_evaluate: state dicts of several candidates -> their fitness, in place of one call each.
    patience: generations without progress before the end. initial: of every gene. Others: as in `merge`.

    Memory: one model beside the sources, and 1 GiB of what densities keep.

    Raises InputError for wrong options, ModelError for sources that do not fit and where no candidate has a finite
    fitness, MissingExtraError without the package cma; warns where the fitness is flat.

    >>> one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> small = lambda model: -model.bias.detach().abs().item()
    >>> found = evolve_weights([one, two], small, method="linear", max_evaluations=40)
    >>> found.fitness >= max(small(one), small(two))
    True
    """
    if not callable(fitness):
        raise InputError(f"fitness must be a function of a model, got {type(fitness).__name__}; see accuracy_fitness")
    wanted = as_patterns(baselines) or []
    if unknown := [name for name in wanted if name not in BASELINES]:
        raise InputError(f"there are no baselines {unknown}; choose from {', '.join(BASELINES)}")
    if screen is not None and batch_evaluate is not None:
        raise InputError("screen saves calls of the fitness; with batch_evaluate there are none, leave one of them out")
    whole = Merger(
        sources, base=base, method=method, normalize=normalize, lam=lam, ignore=ignore, sign_method=sign_method, seed=seed,
        recompute_statistics=recompute_statistics,
    )  # fmt: skip
    frame = whole.frame
    if frame is None or frame.state_dict().keys() != whole.sources.states[0].keys():
        raise InputError(
            "a source must be an nn.Module with the tensors of the first: it is the frame that candidates are evaluated in"
        )
    groups = _merged_groups(layer_groups(frame, granularity, filters), whole)
    merger = whole.regrouped(groups)
    genes = Genes(merger, allow_negative=allow_negative, initial=initial)
    candidate = copy.deepcopy(frame)
    score = _Scorer(merger, candidate, fitness, batch_evaluate, screen)
    generation = itertools.count()

    def evaluate(many: np.ndarray) -> np.ndarray:  # the start and the sources are asked all, whatever the screen
        return score([genes.decode(one) for one in many], screened=next(generation) > 0)

    def others(model: nn.Module, value: float) -> tuple[float, float | None]:
        return (
            value if validation is None else value_and_error(validation, model)[0],
            None if test is None else value_and_error(test, model)[0],
        )

    uniform = [1 / merger.count] * merger.count
    elite = [genes.encode(row) for row in (*np.eye(merger.count), uniform)]
    small = sum(tensor.numel() for tensor in merger.sources.states[0].values()) < _SMALL_MODEL
    with one_thread(small):
        found = cma_search(
            evaluate,
            genes.start(),
            sigma=float(sigma),
            max_evaluations=max_evaluations,
            population=population,
            seed=seed,
            patience=patience,
            first=elite,
            on_generation=on_generation,
        )
        weights, densities = genes.decode(found.genes)
        state = merger.state_dict(weights, densities)
        candidate.load_state_dict(state)
        value, error = (found.value, None) if batch_evaluate else value_and_error(fitness, candidate)
        validated, tested = others(candidate, value)
        table = measure_baselines(
            wanted, merger=merger, candidate=candidate, score=score, genes=genes, others=others,
            evaluations=max_evaluations, seed=seed,
        )  # fmt: skip
    return MergeResult(
        weights=_weight_table(groups, merger.count, weights, densities),
        fitness=value,
        validation=validated,
        test=tested,
        history=found.history,
        baselines=table,
        standard_error=error,
        evaluations=found.evaluations,
        dropped=found.dropped - score.screened,
        method=method,
        normalize=merger.normalize,
        seed=seed,
        state=state,
        template=frame,
    )


_SPACES = ("weights", "routing", "both")


def evolve(
    sources: Sequence[Any], fitness: Measure, *, space: str = "weights", base: Any = None, **options: Any
) -> MergeResult | RoutingResult:
    """Search a merge of the ``sources`` in ``space`` "weights", "routing" or "both".

    base: for the weights, see `evolve_weights`. options: of `evolve_weights` and `evolve_routing` by name; with "both" each
    goes to the search that has it, such as ``seed``, ``test`` and ``max_evaluations`` to both. "both" evolves the weights
    first; the merge is then source 1 of the paths, before the given sources, so that the fitness never falls below that of
    the weights. Its result is a `RoutingResult` with the merge under ``weights``.

    Raises InputError for another space and for options that its searches do not have, and as they do.

    >>> one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> evolve([one, two], lambda m: -m.bias.detach().abs().item(), method="linear", max_evaluations=30).method
    'linear'
    """
    if space not in _SPACES:
        raise InputError(f"space is one of {', '.join(_SPACES)}, got {space!r}")
    of_weights, of_routing = (_options(function) for function in (evolve_weights, evolve_routing))
    known = {"weights": of_weights, "routing": of_routing, "both": of_weights | of_routing}[space]
    if unknown := sorted(options.keys() - known):
        raise InputError(f"a search of space={space!r} has no options {unknown}; it has {', '.join(sorted(known))}")
    for_paths = {name: value for name, value in options.items() if name in of_routing}
    if space == "routing":
        return evolve_routing(sources, fitness, **for_paths)
    if space == "both":
        block_lists(sources, options.get("blocks"))  # raises before the long search of the weights
    merged = evolve_weights(
        sources, fitness, base=base, **{name: value for name, value in options.items() if name in of_weights}
    )
    if space == "weights":
        return merged
    return replace(evolve_routing([merged.model(), *sources], fitness, **for_paths), weights=merged)


def _options(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} - {"base"}


class _Scorer:
    """Fitness of recipes (weights, densities): each merged into one reused model, or several at once as state dicts."""

    def __init__(
        self,
        merger: Merger,
        candidate: nn.Module,
        fitness: Measure,
        batch_evaluate: Callable[[list[dict[str, Tensor]]], Any] | None,
        screen: Measure | None,
    ) -> None:
        self.merger, self.candidate, self.fitness, self.batch_evaluate = merger, candidate, fitness, batch_evaluate
        self.screen, self.screened = screen, 0
        size = sum(t.numel() * t.element_size() for t in merger.sources.states[0].values())
        self.at_once = max(1, DEFAULT_BUDGET // max(1, size))

    def __call__(
        self, recipes: list[tuple[np.ndarray, np.ndarray]], merger: Merger | None = None, *, screened: bool = False
    ) -> np.ndarray:
        merger = self.merger if merger is None else merger
        able = [i for i, recipe in enumerate(recipes) if _possible(merger, recipe[0])]
        values = np.full(len(recipes), np.nan)
        if self.batch_evaluate is not None:
            return self._together(merger, recipes, able, values)
        if self.screen is not None and screened:
            quick = [self._ask(self.screen, merger, recipes[i]) for i in able]
            order = np.argsort(np.where(np.isnan(quick), np.inf, -np.array(quick)), kind="stable")
            kept = sorted(able[place] for place in order[: -(-len(able) // 2)])
            self.screened += len(able) - len(kept)
            able = kept
        for i in able:
            values[i] = self._ask(self.fitness, merger, recipes[i])
        return values

    def _ask(self, measure: Measure, merger: Merger, recipe: tuple[np.ndarray, np.ndarray]) -> float:
        merger.into(self.candidate, *recipe)
        return value_and_error(measure, self.candidate)[0]

    def _together(
        self, merger: Merger, recipes: list[tuple[np.ndarray, np.ndarray]], able: list[int], values: np.ndarray
    ) -> np.ndarray:
        ask: Any = self.batch_evaluate
        for start in range(0, len(able), self.at_once):
            some = able[start : start + self.at_once]
            with torch.no_grad():
                answers = ask([merger.state_dict(*recipes[i]) for i in some])
            answers = np.asarray(answers, dtype=np.float64)
            if answers.shape != (len(some),):
                raise InputError(f"batch_evaluate must give {len(some)} numbers, got an array of shape {answers.shape}")
            values[some] = answers
        return values


def _possible(merger: Merger, weights: np.ndarray) -> bool:
    """Whether a linear merge can be divided by the sum of these weights."""
    try:
        merger.check_divisors(weights)
    except ModelError:
        return False
    return True


def _merged_groups(groups: dict[str, list[str]], merger: Merger) -> dict[str, list[str]]:
    """The groups without tensors that are not merged."""
    merged = set(merger.sources.merged)
    kept = {
        group: [name for name in (merger.sources.aliases.get(n, n) for n in names) if name in merged]
        for group, names in groups.items()
    }
    return {group: names for group, names in kept.items() if names}


def _weight_table(
    groups: dict[str, list[str]], sources: int, weights: np.ndarray, densities: np.ndarray
) -> pd.DataFrame:
    rows = [
        (group, f"source {k + 1}", weights[g, k], densities[g, k])
        for g, group in enumerate(groups)
        for k in range(sources)
    ]
    return pd.DataFrame(rows, columns=["group", "source", "weight", "density"])
