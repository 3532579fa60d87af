"""Merging formulas: several fine-tuned versions of one model into one, by weights per group of tensors and source.

With sources theta_k, a common base theta_0, task vectors tau_k = theta_k - theta_0, weights w_k and densities rho_k:

    linear           sum_k w_k theta_k / sum_k w_k
    slerp            sin((1-t) a)/sin a theta_1 + sin(t a)/sin a theta_2,   a the angle of the two flattened tensors
    task_arithmetic  theta_0 + lam sum_k w_k tau_k
    ties             tau_k keeps its int(rho n) largest entries; each entry elects sign(sum_k w_k tau_k) (zero: +);
                     theta_0 + lam sum_k w_k tau_k m_k / sum_k w_k m_k,   m_k: entry agrees with the sign elected
    dare_linear      tau_k <- tau_k b_k / rho_k, b_k ~ Bernoulli(rho_k); then task arithmetic
    dare_ties        the same masks instead of the trim; then the election of ties, by default without its division

DARE divides by rho. Some tools bring masked tensors back to their L1 norm instead, which gives other numbers.

Source: Akiba, Shing, Tang, Sun, Ha, 2024, arXiv:2403.13187 (section 3.1); ties: Yadav et al., 2023, arXiv:2306.01708;
DARE: Yu et al., 2023, arXiv:2311.03099; task arithmetic: Ilharco et al., 2022, arXiv:2212.04089.
"""

__all__ = ["METHODS", "Merger", "dare", "elect_signs", "merge", "slerp", "task_vector", "trim"]

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET, bytes_per_row, chunks
from theodolite.core.view import evaluation_mode, model_input
from theodolite.parameters.merging.formulas import (
    METHODS,
    arc_weights,
    combine,
    cosine,
    dare,
    elect_signs,
    exact,
    keep_mask,
    kept_largest,
    linear_divisor,
    magnitude_ranks,
    method_named,
    slerp,
    trim,
)
from theodolite.parameters.merging.states import State, as_state, read_sources, warn_of_statistics

_CHUNK = 1 << 14  # entries worked on at a time: a handful of such arrays stay in a core's cache and the heap
_LEVELS = 1 << 16  # a random mask keeps the entries whose 16 random bits lie below a cut


def merge(
    sources: Any,
    *,
    base: Any = None,
    method: str = "dare_ties",
    weights: Any,
    densities: Any = 1.0,
    normalize: bool | None = None,
    lam: float | int = 1.0,
    groups: Mapping[str, Sequence[str]] | None = None,
    recompute_statistics: Any = None,
    seed: int = 0,
    sign_method: str = "sum",
    ignore: Iterable[str] | str | None = None,
) -> dict[str, Tensor]:
    """The state dict of the merge of ``sources``, in the number format of the first, computed in float32.

    sources: K modules or state dicts of one architecture. base: the model that they were tuned from; all methods but
    linear and slerp need it. method: of `METHODS`. weights: one number per source (K,), a table (groups, K), or
    {group: (K,)}; slerp takes two and its t is w_2 / (w_1 + w_2). densities: share of task-vector entries kept, in
    (0, 1]; one number, (K,), or as the weights. normalize: divide by the sum of the weights (None: linear and ties
    do, the others not). lam: scale of the merged task vector. groups: {group: tensor names} (`layer_groups`); None puts all
    tensors into one. sign_method: "sum" or "count" (`elect_signs`). seed: of DARE's masks, which depend on it, the tensor
    and the source only; their densities are rounded to 1/65536. ignore: patterns of tensors to take from the base (else
    from the first source) as they are. recompute_statistics: input rows, or an iterable of batches, from which
    BatchNorm's running statistics are computed for the merged weights; a source must then be a module.

    A tied tensor is merged once. One source with weight 1, the others with 0, density 1 and lam 1 give that source
    exactly. Peak memory: the result, and 6 bytes (ties: 8) per entry and source for what is kept.

    Raises InputError for wrong weights, densities, options or fewer than two sources, and ModelError where the sources
    are not versions of one model.

    >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    >>> merge([a, b], method="linear", weights=[1, 3])
    {'w': tensor([2.5000, 5.0000])}
    """
    merger = Merger(
        sources,
        base=base,
        method=method,
        groups=groups,
        normalize=normalize,
        lam=lam,
        sign_method=sign_method,
        seed=seed,
        ignore=ignore,
        recompute_statistics=recompute_statistics,
    )
    return merger.state_dict(merger.table(weights, "weights"), merger.table(densities, "densities"))


def task_vector(model: Any, base: Any) -> dict[str, Tensor]:
    """What fine-tuning changed: tau = theta - theta_0 by tensor name, in float32 (float64 where the model is).

    Tied tensors occur once; statistics and whole-number tensors are left out. Raises as `merge`.

    >>> task_vector({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    {'w': tensor([2.])}
    """
    state, start = as_state(model, "model"), as_state(base, "base")
    return {
        name: exact(state[name]) - exact(start[name]) for name in read_sources([state, start], distinct=False).merged
    }


class Merger:
    """Merges one set of sources as often as wanted; only weights and densities change between merges.

    What a density keeps is settled once: ranks by magnitude (ties) or fixed random bits (DARE) for each entry and source,
    so that another density costs one comparison an entry and the same density always keeps the same entries. They are
    kept while they fit ``memory`` bytes (default 1 GiB) and made anew each time beyond that.

    Options as in `theodolite.parameters.merging.merge`, which is one use of this class. groups: {group: names}.
    """

    def __init__(
        self,
        sources: Any,
        *,
        base: Any = None,
        method: str = "dare_ties",
        groups: Mapping[str, Sequence[str]] | None = None,
        normalize: bool | None = None,
        lam: float | int = 1.0,
        sign_method: str = "sum",
        seed: int = 0,
        ignore: Iterable[str] | str | None = None,
        recompute_statistics: Any = None,
        memory: int | None = None,
    ) -> None:
        self.kind = method_named(method)
        if sign_method not in ("sum", "count"):
            raise InputError(f"sign_method is 'sum' or 'count', got {sign_method!r}")
        if isinstance(lam, bool) or not np.isfinite(lam):
            raise InputError(f"lam scales the merged task vector and must be a finite number, got {lam!r}")
        if method == "slerp" and isinstance(sources, Sequence) and len(sources) != 2:
            raise InputError(f"slerp takes exactly two sources, got {len(sources)}; use method='linear' for more")
        self.method, self.lam, self.sign_method, self.seed = method, float(lam), sign_method, int(seed)
        self.normalize = self.kind.normalize if normalize is None else bool(normalize)
        self.sources = read_sources(sources, base, ignore=ignore, needs_base=method if self.kind.base else None)
        self.frame = next((given for given in (*sources, base) if isinstance(given, nn.Module)), None)
        self.batches = None if recompute_statistics is None else _as_batches(recompute_statistics)
        if self.batches is not None and self.frame is None:
            raise InputError("recompute_statistics needs a source that is an nn.Module, which the rows run through")
        warn_of_statistics(self.sources, recompute_statistics)
        self.groups = self._checked(groups)
        self._kept: dict[tuple[str, int, str], Tensor] = {}
        self._memory = DEFAULT_BUDGET if memory is None else memory
        self._angles: dict[str, float] = {}

    @property
    def count(self) -> int:
        """K, the number of sources."""
        return len(self.sources.states)

    def regrouped(self, groups: Mapping[str, Sequence[str]]) -> "Merger":
        """The same merge with other groups; what is settled about its tensors is shared."""
        other = copy.copy(self)
        other.groups = self._checked(groups)
        return other

    def with_method(self, method: str) -> "Merger":
        """The same sources merged by another method with its defaults; what is settled about the tensors is shared."""
        other = copy.copy(self)
        other.method, other.kind, other.lam = method, method_named(method), 1.0
        other.normalize = other.kind.normalize
        return other

    def check_divisors(self, weights: np.ndarray) -> None:
        """Raise ModelError where a merge of sources themselves would divide by a sum of weights near zero."""
        if self.method == "slerp" or (self.method == "linear" and self.normalize):
            for row in weights.tolist():
                linear_divisor(row)

    def _checked(self, groups: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
        merged = set(self.sources.merged)
        if groups is None:
            return {"all": list(self.sources.merged)}
        found: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        for group, names in groups.items():
            for name in names:
                if name not in self.sources.states[0]:
                    raise InputError(f"group {group!r} names {name!r}, which the sources do not have")
                name = self.sources.aliases.get(name, name)
                if owner.setdefault(name, group) != group:
                    raise InputError(
                        f"{name} stands in the groups {owner[name]!r} and {group!r}; it can have one weight"
                    )
                if name in merged and name not in found.setdefault(group, []):
                    found[group].append(name)
        missing = [name for name in self.sources.merged if name not in owner]
        if missing:
            raise InputError(
                f"{len(missing)} tensors stand in no group: {', '.join(missing[:5])}; put them into one or leave them out "
                "of the merge with ignore=[patterns]"
            )
        return {group: names for group, names in found.items() if names}

    def table(self, given: Any, what: str) -> Float[np.ndarray, "group source"]:
        """One number, (K,), (groups, K) or {group: (K,)} as a checked table (groups, K)."""
        shape = (len(self.groups), self.count)
        if isinstance(given, Mapping):
            unknown, missing = sorted(given.keys() - self.groups.keys()), sorted(self.groups.keys() - given.keys())
            if unknown or missing:
                raise InputError(f"{what} by group: unknown groups {unknown}, missing groups {missing}")
            rows = [np.broadcast_to(np.asarray(given[group], dtype=np.float64), shape[1:]) for group in self.groups]
            given = np.stack(rows)
        try:
            table = np.asarray(given, dtype=np.float64)
            table = np.broadcast_to(table, shape)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{what} must be one number per source ({shape[1]}), a table of {shape[0]} groups x {shape[1]} sources or "
                f"a dict by group, got {given!r}"
            ) from error
        if not np.isfinite(table).all():
            raise InputError(f"{what} must be finite numbers, got {table.tolist()}")
        if what == "densities" and not bool(((table > 0) & (table <= 1)).all()):
            raise InputError(f"a density is the share of entries kept, in (0, 1]; got {table.tolist()}")
        return table

    def state_dict(self, weights: np.ndarray, densities: np.ndarray) -> dict[str, Tensor]:
        """A new state dict of the merge, with tied tensors one in memory."""
        first, owned = self.sources.states[0], dict[str, Tensor]()
        for name in first:
            if name not in self.sources.aliases:
                owned[name] = torch.empty_like(first[name], memory_format=torch.contiguous_format)
        made = {name: owned[self.sources.aliases.get(name, name)] for name in first}
        whole = self._write(made, weights, densities)
        if self.batches is not None and self.frame is not None and self.sources.statistics and whole is None:
            model = copy.deepcopy(self.frame)
            model.load_state_dict(made)
            recompute_statistics(model, self.batches)
            computed = model.state_dict()
            for name in self.sources.statistics:
                made[name].copy_(computed[name])
        return made

    def into(self, model: nn.Module, weights: np.ndarray, densities: np.ndarray) -> None:
        """Write the merge into ``model`` itself, statistics of BatchNorm included."""
        whole = self._write(model.state_dict(), weights, densities)
        if self.batches is not None and self.sources.statistics and whole is None:
            recompute_statistics(model, self.batches)

    @torch.no_grad()
    def _write(self, out: State, weights: np.ndarray, densities: np.ndarray) -> int | None:
        """Write the merged tensors into those of ``out``; returns the source that the whole merge is, if it is one.

        weights, densities: (groups, K), as `table` gives them. Statistics come from that one source, else from the base
        or the first source.
        """
        found = [self._only_source(w, rho) for w, rho in zip(weights.tolist(), densities.tolist())]
        whole = found[0] if len(set(found)) == 1 else None
        for names, w, rho, only in zip(self.groups.values(), weights.tolist(), densities.tolist(), found):
            for name in names:
                if only is not None:
                    out[name].copy_(self.sources.states[only][name])
                else:
                    self._write_tensor(name, out[name], w, rho)
        for name in self.sources.copied:
            own = whole is not None and name in self.sources.statistics
            out[name].copy_(self.sources.states[whole or 0][name] if own else self.sources.copy_of(name))
        for alias, owner in self.sources.aliases.items():
            if out[alias].data_ptr() != out[owner].data_ptr():
                out[alias].copy_(out[owner])
        return whole

    def _only_source(self, weights: list[float], densities: list[float]) -> int | None:
        """The source that the merge is, if it is one: theta_0 + (theta_k - theta_0) would round differently."""
        active = [k for k, weight in enumerate(weights) if weight != 0]
        if len(active) != 1:
            return None
        (k,) = active
        factor = 1.0 if self.method == "slerp" or self.normalize else weights[k]
        if self.kind.base:
            factor *= self.lam
        return k if factor == 1.0 and (not self.kind.keeps or densities[k] == 1.0) else None

    def _write_tensor(self, name: str, out: Tensor, weights: list[float], densities: list[float]) -> None:
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        flat = target.view(-1)
        parts = [state[name].reshape(-1) for state in self.sources.states]
        if self.kind.base:
            self._write_task(name, flat, parts, weights, densities)
        else:
            self._write_average(name, flat, parts, weights)
        if target is not out:
            out.copy_(target)

    def _write_average(self, name: str, flat: Tensor, parts: list[Tensor], weights: list[float]) -> None:
        if self.method == "slerp":
            if name not in self._angles:
                self._angles[name] = cosine(exact(parts[0]), exact(parts[1]))
            weights = list(arc_weights(weights[1] / linear_divisor(weights), self._angles[name]))
            divisor = 1.0
        else:
            divisor = linear_divisor(weights) if self.normalize else 1.0
        for start in range(0, len(flat), _CHUNK):
            some = slice(start, start + _CHUNK)
            mixed = exact(parts[0][some].to(flat.device)) * weights[0]
            for part, weight in zip(parts[1:], weights[1:]):
                mixed.add_(exact(part[some].to(flat.device)), alpha=weight)
            flat[some].copy_(mixed.div_(divisor) if divisor != 1.0 else mixed)

    def _write_task(
        self, name: str, flat: Tensor, parts: list[Tensor], weights: list[float], densities: list[float]
    ) -> None:
        base = (self.sources.base or {})[name].reshape(-1)
        active = [k for k, weight in enumerate(weights) if weight != 0]
        if not active:
            flat.copy_(base)
            return
        kept = {k: self._keep(k, name, densities[k]) for k in active}
        for start in range(0, len(flat), _CHUNK):
            some = slice(start, start + _CHUNK)
            origin = exact(base[some].to(flat.device))
            deltas = list[Tensor]()
            for k in active:
                delta = exact(parts[k][some].to(flat.device)) - origin
                if (keep := kept[k]) is not None:
                    order, cut, share = keep
                    delta.mul_(keep_mask(order[some], cut)).div_(-share)
                deltas.append(delta)
            mixed = combine(
                deltas,
                [weights[k] for k in active],
                elects=self.kind.elects,
                normalize=self.normalize,
                sign_method=self.sign_method,
            )
            if self.lam != 1.0:
                mixed.mul_(self.lam)
            flat[some].copy_(mixed.add_(origin))

    def _keep(self, k: int, name: str, density: float) -> tuple[Tensor, int, float] | None:
        """(order of each entry, first order that is dropped, what is divided by); None where all are kept."""
        if not self.kind.keeps or density == 1.0:
            return None
        order = self._order(k, name)
        if self.kind.keeps == "largest":
            return order, kept_largest(density, order.numel()), 1.0
        cut = max(1, round(density * _LEVELS))
        return None if cut == _LEVELS else (order, cut - _LEVELS // 2, cut / _LEVELS)

    def _order(self, k: int, name: str) -> Tensor:
        key = (self.kind.keeps, k, name)
        if key in self._kept:
            return self._kept[key]
        source, device = self.sources.states[k][name], self.sources.states[0][name].device
        if self.kind.keeps == "largest":
            order = magnitude_ranks(exact(source.to(device)) - exact((self.sources.base or {})[name].to(device)))
        else:
            generator = torch.Generator().manual_seed(_seed_of(self.seed, name, k))
            low, high = -_LEVELS // 2, _LEVELS // 2
            order = torch.randint(low, high, (source.numel(),), generator=generator, dtype=torch.int16).to(device)
        if sum(kept.nbytes for kept in self._kept.values()) + order.nbytes <= self._memory:
            self._kept[key] = order
        return order


def _seed_of(seed: int, name: str, source: int) -> int:
    digest = hashlib.sha256(f"{seed}/{source}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def _as_batches(given: Any) -> list[Any]:
    if hasattr(given, "__array__"):
        return [given]
    batches = list(given)
    if not batches:
        raise InputError("recompute_statistics holds no batch; give rows of training inputs")
    return batches


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Compute BatchNorm's running statistics anew, as averages over ``batches``, the rest in eval mode.

    batches: of what the model takes (a tensor, a tuple of arguments or a dict of keyword arguments); a tensor is cut into
    pieces that fit 1 GiB. Raises ModelError where the model has no running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    if not norms:
        raise ModelError(f"{type(model).__name__} keeps no running statistics, so there is nothing to recompute")
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # None: the plain average over batches
            norm.train()
        try:
            for batch in batches:
                _run(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        batch = model_input(model, batch)
        with evaluation_mode(model):
            row_bytes = bytes_per_row(model, batch[:1], gradients=False)
        for part in chunks(len(batch), row_bytes):
            model(batch[part])
