"""The checkpoints that a merge starts from, checked to be versions of one model, and their tensors in groups."""

__all__ = ["Sources", "layer_groups", "read_sources"]

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.parameters.weights import as_patterns, matches

State = Mapping[str, Tensor]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_VOCABULARY = ("emb", "lm_head", "wte", "output.weight", "decoder.weight")
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Sources:
    """The sources of a merge and their base, one dict of tensors each, in the memory of the models they came from.

    states: K of them. base: the common start, or None. merged: names of the tensors that are merged, each tied one once.
    aliases: {other name of a tied tensor: the name in ``merged``}. copied: names that are taken from the base, or from
    the first source, as they are (statistics of BatchNorm, counters, what ``ignore`` names). statistics: those of them
    that have to be computed anew after a merge.
    """

    states: tuple[State, ...]
    base: State | None
    merged: tuple[str, ...]
    aliases: dict[str, str]
    copied: tuple[str, ...]
    statistics: tuple[str, ...]

    def copy_of(self, name: str) -> Tensor:
        """Where a tensor that is not merged comes from: the base, unless it has none of that shape."""
        first, start = self.states[0][name], None if self.base is None else self.base.get(name)
        return first if start is None or start.shape != first.shape else start


def as_state(source: Any, what: str) -> State:
    """The tensors of a module or of a dict of tensors, by name, not copied."""
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping) and source and all(isinstance(value, Tensor) for value in source.values()):
        return source
    raise InputError(
        f"{what} must be an nn.Module or a dict of named tensors (a state_dict), got {type(source).__name__}"
    )


def read_sources(
    sources: Any,
    base: Any = None,
    *,
    ignore: Iterable[str] | str | None = None,
    needs_base: str | None = None,
    distinct: bool = True,
) -> Sources:
    """Check that all sources (and the base) are versions of one model and sort their tensors.

    needs_base: the name of a method that cannot do without a base, or None. ignore: patterns of tensors that may
    differ in name or shape; they are taken from the base, or from the first source. distinct: refuse equal sources.

    Raises InputError for fewer than two sources, a missing base and identical sources, ModelError where names, shapes,
    vocabularies, ties or kinds of numbers differ.
    """
    if isinstance(sources, (nn.Module, Mapping, str)) or not isinstance(sources, Sequence) or len(sources) < 2:
        number = len(sources) if isinstance(sources, Sequence) else "no list"
        raise InputError(f"a merge needs a list of at least two sources, got {number}; add a second checkpoint")
    if needs_base is not None and base is None:
        raise InputError(
            f"{needs_base} merges differences to a common base; give base=, the model that all sources were tuned from, "
            "or use method='linear'"
        )
    states = tuple(as_state(source, f"source {k + 1}") for k, source in enumerate(sources))
    start = None if base is None else as_state(base, "base")
    labelled = [(f"source {k + 1}", state) for k, state in enumerate(states)]
    if start is not None:
        labelled.append(("base", start))
    patterns = as_patterns(ignore) or []
    _same_names_and_shapes(labelled, patterns)
    names = list(states[0])
    aliases = _ties(labelled, names, patterns)
    copied, merged, statistics = list[str](), list[str](), list[str]()
    for name in names:
        if name.rpartition(".")[2] in _STATISTICS:
            copied.append(name)
            statistics.append(name)
        elif matches(name, patterns):
            copied.append(name)
        elif name not in aliases:
            (merged if _can_be_merged(name, labelled) else copied).append(name)
    if not merged:
        raise ModelError(f"no tensor is left to merge after ignore={patterns}; the sources have {len(names)} tensors")
    for (i, one), (k, other) in combinations(enumerate(states, start=1), 2):
        if distinct and all(torch.equal(one[name], other[name]) for name in merged):
            raise InputError(f"source {k} holds the same weights as source {i}; leave one of them out")
    return Sources(states, start, tuple(merged), aliases, tuple(copied), tuple(statistics))


def _same_names_and_shapes(labelled: list[tuple[str, State]], patterns: list[str]) -> None:
    first_label, first = labelled[0]
    wanted = {name for name in first if not matches(name, patterns)}
    for label, state in labelled[1:]:
        found = {name for name in state if not matches(name, patterns)}
        odd = [f"{name} only in {first_label}" for name in first if name in wanted - found]
        odd += [f"{name} only in {label}" for name in state if name in found - wanted]
        if odd:
            raise ModelError(
                f"{first_label} and {label} differ in {len(odd)} tensor names: {'; '.join(odd[:_SHOWN])}"
                f"{', ...' if len(odd) > _SHOWN else ''}. Give versions of one model, or leave tensors out of the merge "
                "with ignore=[patterns]"
            )
        shapes = [(name, tuple(first[name].shape), tuple(state[name].shape)) for name in first if name in wanted]
        bad = [(name, a, b) for name, a, b in shapes if a != b]
        for name, a, b in bad:
            if len(a) == len(b) == 2 and a[1] == b[1] and any(word in name.lower() for word in _VOCABULARY):
                raise ModelError(
                    f"vocabulary sizes differ: {name} has {a[0]:,} rows in {first_label} and {b[0]:,} in {label}. Rows stand "
                    "for tokens and are not cut silently: bring both to one tokenizer (resize_token_embeddings), or keep "
                    f"those of the first with ignore=['{name}']"
                )
        if bad:
            listed = "; ".join(f"{name} {a} v {b}" for name, a, b in bad[:_SHOWN])
            raise ModelError(
                f"{first_label} and {label} differ in the shape of {len(bad)} tensors: {listed}"
                f"{', ...' if len(bad) > _SHOWN else ''}. Give versions of one model, or leave them out with ignore=[patterns]"
            )


def _ties(labelled: list[tuple[str, State]], names: list[str], patterns: list[str]) -> dict[str, str]:
    """{alias: owner} of tensors that are one in memory in any source, checked to be equal in all."""
    aliases: dict[str, str] = {}
    for _, state in labelled:
        seen: dict[tuple[Any, ...], str] = {}
        for name in names:
            if name not in state or matches(name, patterns) or state[name].numel() == 0 or state[name].is_meta:
                continue
            tensor = state[name]
            owner = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
            if owner != name:
                aliases[name] = aliases.get(owner, owner)
    for alias, owner in aliases.items():
        for label, state in labelled:
            if not torch.equal(state[alias], state[owner]):
                raise ModelError(
                    f"{alias} and {owner} are one tied tensor in another source but hold different numbers in {label}; "
                    f"tie them there, or leave both out with ignore=['{alias}', '{owner}']"
                )
    return aliases


def _can_be_merged(name: str, labelled: list[tuple[str, State]]) -> bool:
    """Whether a tensor holds real numbers; one that does not is copied where all sources agree on it."""
    tensors = [state[name] for _, state in labelled]
    for (label, _), tensor in zip(labelled, tensors):
        if tensor.is_meta:
            raise ModelError(f"{name} of {label} is on the meta device and has no values; load the weights first")
        if tensor.is_quantized or (tensor.dtype.itemsize == 1 and tensor.is_floating_point()):
            raise ModelError(
                f"{name} of {label} is quantised ({tensor.dtype}); merge the float weights and quantise after"
            )
    if tensors[0].is_floating_point() and all(tensor.is_floating_point() for tensor in tensors):
        for (label, _), tensor in zip(labelled, tensors):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{name} of {label} holds NaN or infinite numbers; repair that checkpoint first")
        return True
    if all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        return False
    kinds = sorted({str(tensor.dtype) for tensor in tensors})
    raise ModelError(
        f"{name} holds {', '.join(kinds)} numbers that differ between the sources; only real floating-point numbers can be "
        f"averaged: dequantise the models, or keep the first with ignore=['{name}']"
    )


def warn_of_statistics(sources: Sources, recompute: object) -> None:
    """Say that BatchNorm's statistics belong to other weights, where nobody computes them anew."""
    if sources.statistics and recompute is None:
        warnings.warn(
            f"{len(sources.statistics)} running statistics (BatchNorm) are copied and do not fit the merged weights; give "
            "recompute_statistics=, rows of training inputs",
            UserWarning,
            stacklevel=3,
        )


# ---- groups


def layer_groups(model: Any, granularity: int = 1, filters: Sequence[str] | str = ()) -> dict[str, list[str]]:
    """The tensors of ``model`` in groups that share their weights in a merge: input, blocks, output, in its order.

    A block is all below the first number in a tensor's name ("layers.3", "0"); what stands before the first block is the
    group "input" (the embedding), what stands after the last is "output" (final norm and head). A model without numbered
    parts has one group for each module that owns tensors.

    model: an nn.Module or a state dict. granularity: consecutive blocks of one list to a group. filters: parts of names
    ("attn", "mlp"); every group is split by the first that a name contains, and "rest". A tied tensor stands where it
    occurs first; BatchNorm's running statistics belong to no group.

    Raises InputError for granularity < 1 and for a filter that no name contains.

    >>> layer_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    {'0': ['0.weight', '0.bias'], '2': ['2.weight', '2.bias']}
    """
    if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
        raise InputError(f"granularity is a number of blocks of at least 1, got {granularity!r}")
    filters = as_patterns(filters) or []
    state = as_state(model, "model")
    tied = _ties([("model", state)], list(state), [])
    names = [name for name in state if name not in tied and name.rpartition(".")[2] not in _STATISTICS]
    for part in filters:
        if not any(part in name for name in names):
            raise InputError(f"no tensor name contains the filter {part!r}; names are like {', '.join(names[:_SHOWN])}")
    keys = _block_keys(names)
    label = _joined(list(dict.fromkeys(keys)), granularity)
    groups: dict[str, list[str]] = {}
    for name, key in zip(names, keys):
        part = next((part for part in filters if part in name), "rest") if filters else ""
        groups.setdefault(f"{label[key]} {part}".strip(), []).append(name)
    return groups


def _block_keys(names: list[str]) -> list[str]:
    """For each tensor the block that it belongs to."""
    numbered = [_numbered(name) for name in names]
    places = [i for i, key in enumerate(numbered) if key is not None]
    owners = [name.rpartition(".")[0] or "model" for name in names]
    if not places:
        return owners
    first, last = places[0], places[-1]
    return [
        key if key is not None else "input" if i < first else "output" if i > last else owner
        for i, (key, owner) in enumerate(zip(numbered, owners))
    ]


def _numbered(name: str) -> str | None:
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: depth + 1])
    return None


def _joined(keys: list[str], granularity: int) -> dict[str, str]:
    """{block: name of its group}, ``granularity`` neighbours of one list together."""
    runs: list[list[str]] = [[keys[0]]] if keys else []
    for before, key in pairwise(keys):
        same_list = _numbered(key) == key and _numbered(before) == before and _list_of(key) == _list_of(before)
        if same_list and len(runs[-1]) < granularity:
            runs[-1].append(key)
        else:
            runs.append([key])
    return {key: run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs for key in run}


def _list_of(key: str) -> str:
    return key.rpartition(".")[0]
