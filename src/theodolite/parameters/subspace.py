"""Intrinsic dimension: the fewest coordinates of a random subspace of weight space in which a network still trains.

    theta = theta_0 + P z,   z in R^d starts at 0,   P in R^(D x d) fixed with unit columns                     (eq. 2)

theta_0 is the ordinary random start of all D trainable parameters, frozen. The intrinsic dimension at 90 % is the smallest d
whose trained quality reaches 0.9 of a reference: the same network trained directly, or an absolute quality. Training in the
subspace needs much larger steps than training directly (Adam with lr 0.3 and cosine decay is a good start).

Source: Li, Farkhoor, Liu, Yosinski, 2018, arXiv:1804.08838 (Measuring the Intrinsic Dimension of Objective Landscapes).
"""

__all__ = ["IntrinsicDimension", "SubspaceModel", "make_projection", "measure_intrinsic_dimension"]

import copy
import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError, ModelError
from theodolite.core.functional import call_with, tensor_places
from theodolite.core.parallel import open_pool, spread
from theodolite.core.train import seeded
from theodolite.parameters.coordinate_files import fingerprint, read_coordinates, restore_buffers, write_coordinates
from theodolite.parameters.reparametrization import KINDS, make_projection
from theodolite.parameters.weights import as_patterns, matches

_SEED_BITS, _FLOAT_BITS = 64, 32
_ABOUT = {"projection", "seed", "start_seed", "D", "names", "start", "include", "exclude"}


class SubspaceModel(nn.Module):
    """A network whose trainable parameters are theta_0 + P z, with z the only thing that trains.

    module: the network at its random start (copied). dimension: d. projection: kind of P (`make_projection`). seed: of P.
    include, exclude: names or patterns of parameters or submodules ("head", "conv*") that are in the subspace, or not; those
    left out stay as they are. Buffers (BatchNorm statistics) are kept out of it and go on as usual; tied weights count once.

    coordinates: nn.Parameter (d,), zeros. forward takes what the module takes.

    Raises InputError for d < 1 or d > D, and ModelError where nothing is left to train or a parameter is not a real number
    in memory (complex, on "meta", lazily initialised).

    >>> net = SubspaceModel(nn.Linear(4, 3), 5)
    >>> net.total_dimension, net.coordinates.shape, net(torch.ones(2, 4)).shape
    (15, torch.Size([5]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        module: nn.Module,
        dimension: int | np.integer,
        *,
        projection: str = "hashed",
        seed: int | np.integer = 0,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self._include, self._exclude = as_patterns(include), as_patterns(exclude)
        self._names = _trainable_names(module, self._include, self._exclude)
        self._start_seed = torch.initial_seed()  # most often what theta_0 was drawn from; `load` tries it, and checks
        self.module = copy.deepcopy(module)
        self._places = tensor_places(self.module)
        parameters = dict(self.module.named_parameters())
        self._open = [name for name, parameter in parameters.items() if parameter.requires_grad]
        self._pieces = [parameters[name].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self._pieces]
        self.total_dimension = sum(self._sizes)
        first = parameters[self._names[0]]
        precise = torch.float64 if any(parameters[n].dtype == torch.float64 for n in self._names) else torch.float32
        self.map = make_projection(
            projection, dimension, self.total_dimension, seed=seed, dtype=precise, device=first.device
        )
        self.projection, self.seed = projection, int(seed)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.coordinates = nn.Parameter(torch.zeros(self.map.shape[1], dtype=precise, device=first.device))

    @property
    def dimension(self) -> int:
        """d."""
        return len(self.coordinates)

    def weights(self) -> dict[str, Tensor]:
        """The module's parameters that lie in the subspace, by name, as they are at the present coordinates."""
        parameters = dict(self.module.named_parameters())
        pieces = self.map(self.coordinates).split(self._sizes)
        return {
            name: parameters[name] + piece.view(shape).to(parameters[name])
            for name, shape, piece in zip(self._names, self._pieces, pieces, strict=True)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives at theta_0 + P z."""
        return call_with(self.module, self.weights(), args, kwargs, places=self._places)

    def squared_norm(self) -> Float[Tensor, ""]:
        """Squared norm of theta itself: what weight decay has to act on, not on z."""
        return torch.stack([weight.square().sum() for weight in self.weights().values()]).sum()

    def materialize(self) -> nn.Module:
        """An ordinary copy of the module with the weights written in, trainable as before."""
        plain = copy.deepcopy(self.module)
        parameters = dict(plain.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights().items():
                parameters[name].copy_(weight)
        for name in self._open:
            parameters[name].requires_grad_(True)
        return plain

    def get_extra_state(self) -> Tensor:
        """Which P this is: the state dict holds theta_0 and z, and both mean nothing with another P."""
        return torch.tensor([list(KINDS).index(self.projection), self.seed])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state that was made with another P."""
        kind, seed = state.tolist()
        if (list(KINDS)[kind], seed) != (self.projection, self.seed):
            raise ModelError(
                f"this state belongs to the {list(KINDS)[kind]} projection of seed {seed}, the model has the "
                f"{self.projection} one of seed {self.seed}; make the model with the same projection and seed"
            )

    def save(self, path: str | Path) -> None:
        """Write coordinates, seeds and the buffers of the state dict; about 4 d bytes where there are no buffers."""
        about = {
            "projection": self.projection,
            "seed": self.seed,
            "start_seed": self._start_seed,
            "D": self.total_dimension,
            "names": _name_hash(self._names),  # a large network has more names than the file has numbers
            "start": fingerprint(self.module),
            "include": self._include,
            "exclude": self._exclude,
        }
        write_coordinates(path, about, {"coordinates": self.coordinates}, self.module)

    @classmethod
    def load(cls, path: str | Path, build: Callable[..., nn.Module]) -> "SubspaceModel":
        """Rebuild from a file and the function that makes the same random start, build() or build(seed).

        Raises ModelError where the architecture or the random start is another than the one that was saved.
        """
        about, arrays = read_coordinates(path, _ABOUT, "subspace model")
        coordinates = torch.from_numpy(arrays["coordinates"])
        module = _same_start(path, build, about)
        made = cls(
            module,
            len(coordinates),
            projection=about["projection"],
            seed=about["seed"],
            include=about["include"],
            exclude=about["exclude"],
        )
        made._start_seed = about["start_seed"]
        with torch.no_grad():
            made.coordinates.copy_(coordinates)
        restore_buffers(path, arrays, made.module)
        return made


def _same_start(path: str | Path, build: Callable[..., nn.Module], about: dict[str, Any]) -> nn.Module:
    """The network that `build` makes with the seed of the file: its own default, that of P, or that of the start."""
    attempts = [None, about["seed"]] + [about["start_seed"]] * (about["start_seed"] < 2**32)
    problem = "build() or build(seed) takes other arguments"
    for seed in dict.fromkeys(attempts):
        if not _accepts(build, seed):
            continue
        with seeded(about["start_seed"]):
            module = build() if seed is None else build(seed)
        names = _trainable_names(module, about["include"], about["exclude"])
        size = sum(parameter.numel() for name, parameter in module.named_parameters() if name in set(names))
        if size != about["D"] or _name_hash(names) != about["names"]:
            problem = f"it is of another architecture (D = {about['D']} there, {size} here, or other parameter names)"
        elif fingerprint(module) != about["start"]:
            problem = (
                "it starts from other weights; give a function that makes the start of then, such as lambda: build(3)"
            )
        else:
            return module
    raise ModelError(f"{path} does not fit the network that build makes: {problem}")


def _accepts(build: Callable[..., nn.Module], seed: int | None) -> bool:
    try:
        inspect.signature(build).bind(*([] if seed is None else [seed]))
    except (TypeError, ValueError):
        return False
    return True


def _name_hash(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]


def _trainable_names(module: nn.Module, include: list[str] | None, exclude: list[str] | None) -> list[str]:
    every = dict(module.named_parameters())
    lazy = [name for name, parameter in every.items() if is_lazy(parameter)]
    if lazy:
        raise ModelError(f"{', '.join(lazy)} is not initialised yet; run one batch through the module first")
    names = [
        name
        for name, parameter in every.items()
        if parameter.requires_grad
        and (include is None or matches(name, include))
        and not (exclude is not None and matches(name, exclude))
    ]
    if not names:
        closed = "" if any(p.requires_grad for p in every.values()) else ", and none of them requires a gradient"
        raise ModelError(
            f"no trainable parameter is left after include={include} and exclude={exclude}; "
            f"the module has: {', '.join(every) or 'none'}{closed}"
        )
    for name in names:
        if not every[name].is_floating_point():
            raise ModelError(
                f"{name} holds {every[name].dtype} numbers; only real floating point weights have a subspace, exclude it"
            )
        if every[name].is_meta:
            raise ModelError(f"{name} is on the meta device and has no values; load the weights first")
    return names


@dataclass(frozen=True, eq=False)
class IntrinsicDimension:
    """Result of a search.

    dimension: the smallest tried d whose mean quality over seeds reaches threshold x reference, None where none does.
    standard_error: of d, by bootstrap over runs. reference: quality that the threshold refers to. curve: quality at every
    tried d with the untrained network's as its chance. compression: D / d. description_bits: d numbers of 32 bits and two
    seeds of 64, an upper bound on the network's description beside its code.
    """

    dimension: int | None
    standard_error: float | None
    threshold: float
    reference: float
    total_dimension: int
    curve: QualityCurve
    projection: str
    seeds: tuple[int, ...]
    compression: float | None
    description_bits: int | None


def measure_intrinsic_dimension(
    build: Callable[..., nn.Module],
    fit: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], float],
    dimensions: Iterable[SupportsInt],
    *,
    threshold: float | int = 0.9,
    baseline: str | float | int = "direct",
    projection: str = "hashed",
    seeds: Iterable[SupportsInt] = (0, 1, 2),
    search: str = "grid",
    bootstrap: int = 100,
    executor: Executor | int | None = None,
) -> IntrinsicDimension:
    """Find the intrinsic dimension of the task that fit and evaluate stand for.

    build(seed): a network at its random start. fit(module): trains module.parameters() that require a gradient, in place.
    evaluate(module): a quality, larger is better. dimensions: increasing candidates for d. baseline: "direct" trains the
    same network without a subspace, once a seed, and takes the mean; a number is an absolute quality. search: "grid" tries
    every d, which gives the whole curve; "bisect" halves the grid, the same answer where quality grows with d, in a third
    of the trainings. Every d is run with each of the seeds: of the start, of P and of torch's generator during the run.
    executor: spreads the runs over the seeds, and over d where search is "grid" (`theodolite.core.parallel.spread`); build,
    fit and evaluate must then be picklable.

    Raises InputError for dimensions that are empty, not increasing, below 1 or above D, for a reference that is not above 0,
    and where evaluate gives NaN (naming d and seed).

    >>> def build(seed):
    ...     torch.manual_seed(seed)
    ...     return nn.Linear(9, 1, bias=False)
    >>> def loss(model):
    ...     return (model(torch.eye(9)[:3]) - 1).square().sum()  # three equations
    >>> def fit(model):
    ...     free = [p for p in model.parameters() if p.requires_grad]
    ...     descent = torch.optim.LBFGS(free, max_iter=200, line_search_fn="strong_wolfe")
    ...     def closure():
    ...         descent.zero_grad()
    ...         value = loss(model)
    ...         value.backward()
    ...         return value
    ...     descent.step(closure)
    >>> quality = lambda model: math.exp(-float(loss(model).detach()))
    >>> measure_intrinsic_dimension(build, fit, quality, [1, 2, 3, 4], projection="dense", threshold=0.99).dimension
    3
    """
    asked, seeds = list(dimensions), tuple(int(seed) for seed in seeds)
    grid = [int(d) for d in asked]
    if not grid or grid != asked or any(b <= a for a, b in itertools.pairwise(grid)):
        raise InputError(f"dimensions must be whole numbers that increase without repeats, got {asked}")
    if grid[0] < 1:
        raise InputError(f"a subspace needs at least one dimension, got d = {grid[0]}")
    if search not in ("grid", "bisect"):
        raise InputError(f'search is "grid" or "bisect", got {search!r}')
    if not 0 < threshold <= 1 or bootstrap < 1:
        raise InputError(f"need 0 < threshold <= 1 and bootstrap >= 1; got {threshold} and {bootstrap}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"need at least one seed and each once, got {seeds}")
    if isinstance(baseline, str) and baseline != "direct":
        raise InputError(f'baseline is "direct" or a number, got {baseline!r}')
    if not isinstance(baseline, str):
        _check_reference(baseline, threshold)
    with seeded(seeds[0]):  # the largest d is tried on: whatever cannot be built fails before anything is trained
        total = SubspaceModel(_start(build, seeds[0]), grid[-1], projection=projection, seed=seeds[0]).total_dimension

    with open_pool(executor) as pool:

        def qualities(tasks: Iterable[tuple[int, int | None, bool]]) -> list[float]:
            work = [(build, fit, evaluate, projection, *task) for task in tasks]
            return spread(_run, work, executor=pool)

        untrained = float(np.mean(qualities((seed, None, False) for seed in seeds)))
        if isinstance(baseline, str):
            reference = float(np.mean(qualities((seed, None, True) for seed in seeds)))
        else:
            reference = float(baseline)
        _check_reference(reference, threshold)
        runs: dict[int, list[float]] = {}

        def passes(d: int) -> bool:
            runs[d] = qualities((seed, d, True) for seed in seeds)
            return float(np.mean(runs[d])) >= threshold * reference

        if search == "grid":
            found = qualities((seed, d, True) for d in grid for seed in seeds)
            runs |= {d: found[i * len(seeds) : (i + 1) * len(seeds)] for i, d in enumerate(grid)}
        else:
            _bisect(grid, passes)
    curve = QualityCurve.from_runs(
        runs, chance=untrained, reference=reference, name="random subspace", total_dimension=total
    )
    smallest = curve.smallest_reaching(threshold * reference, resamples=bootstrap, seed=seeds[0])
    d = smallest.dimension
    return IntrinsicDimension(
        dimension=d,
        standard_error=smallest.standard_error,
        threshold=threshold,
        reference=reference,
        total_dimension=total,
        curve=curve,
        projection=projection,
        seeds=seeds,
        compression=None if d is None else total / d,
        description_bits=None if d is None else d * _FLOAT_BITS + 2 * _SEED_BITS,
    )


def _run(
    build: Callable[..., nn.Module],
    fit: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], float],
    projection: str,
    seed: int,
    d: int | None,
    train: bool,
) -> float:
    """Quality of one run in d dimensions; None is all of them, without a subspace."""
    with seeded(seed):
        module = _start(build, seed)
        # a copy: a build that gives one and the same network each time must not give a trained one to the next run
        module = copy.deepcopy(module) if d is None else SubspaceModel(module, d, projection=projection, seed=seed)
        if train:
            fit(module)
        value = float(evaluate(module))
    if not math.isfinite(value):
        at = f"d = {d}" if d is not None else "d = D (direct training)" if train else "d = 0 (untrained)"
        raise InputError(f"evaluate gave {value} at {at}, seed {seed}; a quality must be a finite number")
    return value


def _start(build: Callable[..., nn.Module], seed: int) -> nn.Module:
    return build(seed) if _accepts(build, seed) else build()


def _check_reference(reference: float, threshold: float) -> None:
    if not 0 < reference < math.inf:
        raise InputError(
            f"{threshold:.0%} of a reference needs one above 0, got {reference}; choose another quality or baseline"
        )


def _bisect(grid: Sequence[int], passes: Callable[[int], bool]) -> None:
    """Try the middle of what is left; the smallest that passes and its lower neighbour are always tried."""
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(grid[middle]) else (middle, high)
