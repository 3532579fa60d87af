"""Probes over layers and ranks, on trees that neither fitted nor chose them; and how alike two subspaces are."""

__all__ = ["borrowed_states", "layer_sweep", "rank_curve", "rank_sweep", "subspace_similarity"]

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations.ast_probe.probe import ASTProbe
from theodolite.activations.ast_probe.trees import SyntaxTree, TreeScores, majority_tree, score_trees
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError

States = Sequence[Tensor]
Trees = Sequence[SyntaxTree]

_BLOCKS = 5


def layer_sweep(
    train: Mapping[int, States],
    train_trees: Trees,
    test: Mapping[int, States],
    test_trees: Trees,
    *,
    probe: ASTProbe | None = None,
    validation: Mapping[int, States] | None = None,
    validation_trees: Trees = (),
) -> pd.DataFrame:
    """A probe at each layer of ``train``, scored on ``test``: columns layer, precision, recall, f1.

    train, test, validation: {layer: [(words, width), ...]} as `word_states` gives it. probe: the options (default `ASTProbe()`,
    rank cut to the width); it is not changed.
    """
    absent = sorted(set(train) - set(test if validation is None else set(test) & set(validation)))
    if absent:
        raise InputError(f"layer {absent[0]} has states to train on, but none to test or validate on")
    rows = []
    for layer in sorted(train):
        held = None if validation is None else (validation[layer], validation_trees)
        found = _fitted(probe, train[layer], train_trees, held).score(test[layer], test_trees)
        rows.append({"layer": layer, **found._asdict()})
    return pd.DataFrame(rows)


def rank_sweep(
    train: States,
    train_trees: Trees,
    test: States,
    test_trees: Trees,
    ranks: Sequence[int],
    *,
    probe: ASTProbe | None = None,
    validation: tuple[States, Trees] | None = None,
) -> pd.DataFrame:
    """A probe of each rank on one layer: columns rank, precision, recall, f1, orthogonality_error. Otherwise as `layer_sweep`."""
    scores = _by_rank(train, train_trees, test, test_trees, ranks, probe, validation)
    return pd.DataFrame(
        [
            {"rank": rank, **found.mean._asdict(), "orthogonality_error": fitted.orthogonality_error_}
            for rank, (fitted, found) in scores.items()
        ]
    )


def rank_curve(
    train: States,
    train_trees: Trees,
    test: States,
    test_trees: Trees,
    ranks: Sequence[int],
    *,
    probe: ASTProbe | None = None,
    validation: tuple[States, Trees] | None = None,
) -> QualityCurve:
    """F1 against the rank: chance is the majority tree's F1, the reference the best mean, runs are blocks of snippets."""
    scores = _by_rank(train, train_trees, test, test_trees, ranks, probe, validation)
    return curve_of({rank: found.f1 for rank, (_, found) in scores.items()}, train_trees, test_trees, test[0].shape[1])


def curve_of(f1: Mapping[int, np.ndarray], train_trees: Trees, test_trees: Trees, width: int) -> QualityCurve:
    """F1 of each snippet at each rank as a curve over blocks of snippets."""
    blocks = min(_BLOCKS, min(map(len, f1.values())))
    runs = {rank: [float(part.mean()) for part in np.array_split(values, blocks)] for rank, values in f1.items()}
    chance = score_trees(test_trees, [majority_tree(train_trees, tree.leaves) for tree in test_trees]).mean.f1
    best = max(float(values.mean()) for values in f1.values())
    return QualityCurve.from_runs(
        runs, chance=chance, reference=best, name="dimensions of the probe", metric="F1", total_dimension=width
    )


def _by_rank(
    train: States,
    train_trees: Trees,
    test: States,
    test_trees: Trees,
    ranks: Sequence[int],
    probe: ASTProbe | None,
    validation: tuple[States, Trees] | None,
) -> dict[int, tuple[ASTProbe, TreeScores]]:
    if not ranks or sorted(set(ranks)) != list(ranks):
        raise InputError(f"ranks must increase, got {list(ranks)}")
    found = {}
    for rank in ranks:
        options = {} if probe is None else probe.get_params()
        made = ASTProbe(**{**options, "rank": rank}).fit(train, train_trees, validation)
        found[rank] = (made, made.score_snippets(test, test_trees))
    return found


def _fitted(probe: ASTProbe | None, states: States, trees: Trees, held: tuple[States, Trees] | None) -> ASTProbe:
    made = ASTProbe(rank=min(ASTProbe().rank, states[0].shape[-1])) if probe is None else ASTProbe(**probe.get_params())
    return made.fit(states, trees, held)


def borrowed_states(hidden: States, *, seed: int = 0) -> list[Float[Tensor, "_ _"]]:
    """A control: for each snippet the vectors of another one, drawn at random, cut or repeated to its length.

    A probe that reads a tree from the states cannot read it from these; what it still gets is what all snippets share.
    """
    if len(hidden) < 2 or min(map(len, hidden)) == 0:
        raise InputError("need at least two snippets, each with vectors, to borrow from")
    order = np.random.default_rng(seed).permutation(len(hidden)).tolist()
    lender = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        hidden[lender[i]][torch.arange(len(own), device=own.device) % len(hidden[lender[i]])]
        for i, own in enumerate(hidden)
    ]


def subspace_similarity(B1: Float[Tensor, "one width"], B2: Float[Tensor, "two _"]) -> Float[Tensor, " angle"]:
    """Cosines of the principal angles between the row spaces of two bases, largest first: 1 shared, 0 orthogonal.

    Rows need not be orthonormal. Raises InputError for bases of different width, or whose rows are dependent.

    >>> subspace_similarity(torch.eye(3)[:2], torch.eye(3)[1:])
    tensor([1., 0.])
    """
    if B1.shape[1] != B2.shape[1]:
        raise InputError(f"bases of width {B1.shape[1]} and {B2.shape[1]} lie in different spaces")
    for basis in (B1, B2):
        if int(torch.linalg.matrix_rank(basis.detach().double())) < len(basis):
            raise InputError(f"a basis of {len(basis)} rows spans fewer dimensions; leave out dependent rows")
    one, two = (torch.linalg.qr(basis.detach().double().mT).Q for basis in (B1, B2))
    return torch.linalg.svdvals(one.mT @ two).clamp(max=1).to(B1.dtype)
