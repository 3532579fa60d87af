"""Labelled ordered trees over words, their lossless form as three sequences, and how well one tree recovers another."""

__all__ = [
    "BAD_ROOT",
    "EMPTY",
    "F1",
    "SEPARATOR",
    "SyntaxTree",
    "TreeScores",
    "TreeTuple",
    "constituent_f1",
    "majority_tree",
    "score_trees",
    "shuffle_labels",
    "tree_to_tuple",
    "tuple_to_tree",
]

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate, bootstrap

EMPTY = "EMPTY"
"""The label of nodes that binarisation adds, and of words without a chain of their own."""
SEPARATOR = "+"
"""Stands between the labels of a chain of nodes with one child each."""
BAD_ROOT = "bad_root"
"""The label of a predicted tree whose topmost label is `EMPTY`; it matches nothing."""
_ESCAPE = "\\"


@dataclass(frozen=True)
class SyntaxTree:
    """A tree with labelled inner nodes over words, in preorder: the label of each node and how many children it has.

    A node without children is a leaf and its label is the word. Trees are equal where all labels and shapes are.
    Nothing here recurses, so a tree may be as deep as it likes.

    >>> tree = SyntaxTree.from_nested(("assignment", "x", "=", ("call", "f", ("arguments", "(", ")"))))
    >>> tree.leaves
    ['x', '=', 'f', '(', ')']
    >>> tree.constituents()["call", (2, 3, 4)]
    1
    """

    labels: tuple[str, ...]
    arities: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.arities) or not self.labels:
            raise InputError(f"a tree needs one arity a label, got {len(self.labels)} and {len(self.arities)}")
        open_ = 1
        for i, arity in enumerate(self.arities):
            open_ += arity - 1
            if arity < 0 or (open_ <= 0) != (i == len(self.arities) - 1):
                raise InputError("the arities do not describe one whole tree in preorder")

    @classmethod
    def from_nested(cls, nested: Any) -> "SyntaxTree":
        """Of (label, child, ..., child), a tuple or a list, where a child that is a string is a word.

        Raises InputError for a node without children, or with anything but strings and such nodes in it.
        """
        labels, arities, stack = list[str](), list[int](), [nested]
        while stack:
            node = stack.pop()
            if isinstance(node, str):
                labels.append(node)
                arities.append(0)
            elif isinstance(node, (tuple, list)) and len(node) > 1 and isinstance(node[0], str):
                labels.append(node[0])
                arities.append(len(node) - 1)
                stack.extend(node[:0:-1])
            else:
                raise InputError(f"a node is a word or (label, child, ..., child), got {str(node)[:80]!r}")
        return cls(tuple(labels), tuple(arities))

    @property
    def leaves(self) -> list[str]:
        """The words in order."""
        return [label for label, arity in zip(self.labels, self.arities, strict=True) if arity == 0]

    def spans(self) -> list[tuple[int, int, int]]:
        """(node, first leaf, one past the last leaf) of every inner node."""
        found, ends = list[tuple[int, int, int]](), list[int]()
        last = self.arities.count(0)
        for node in range(len(self.arities) - 1, -1, -1):  # from the right, so children come before their parent
            arity = self.arities[node]
            if arity == 0:
                ends.append(last)
                last -= 1
            else:  # the first child lies on top; the node ends where its last child does
                end = ends[-arity]
                del ends[-arity:]
                ends.append(end)
                found.append((node, last, end))
        return found[::-1]

    def constituents(self) -> "Counter[tuple[str, tuple[int, ...]]]":
        """How often each (label, positions of the leaves below) stands on an inner node."""
        return Counter((self.labels[node], tuple(range(first, end))) for node, first, end in self.spans())

    def to_networkx(self) -> nx.DiGraph:
        """A graph from parents to children, whose nodes are numbered in preorder and carry label, word (bool), position."""
        graph, open_ = nx.DiGraph(), list[list[int]]()
        for node, (label, arity) in enumerate(zip(self.labels, self.arities, strict=True)):
            while open_ and open_[-1][1] == 0:
                open_.pop()
            graph.add_node(node, label=label, word=arity == 0, position=node)
            if open_:
                open_[-1][1] -= 1
                graph.add_edge(open_[-1][0], node)
            if arity:
                open_.append([node, arity])
        return graph

    def render(self) -> str:
        """One line a node, indented by depth, words in quotes."""
        lines, open_ = list[str](), list[int]()
        for label, arity in zip(self.labels, self.arities, strict=True):
            while open_ and open_[-1] == 0:
                open_.pop()
            lines.append("  " * len(open_) + (label if arity else repr(label)))
            if open_:
                open_[-1] -= 1
            if arity:
                open_.append(arity)
        return "\n".join(lines)


class TreeTuple(NamedTuple):
    """A tree of n + 1 words without its words.

    d: (n,) height of the lowest node of the binary tree above words i and i + 1. c: (n,) that node's label. u: (n + 1,) the
    labels between a word and the lowest node with more than one child, `EMPTY` where there are none.
    """

    d: list[int]
    c: list[str]
    u: list[str]


def _escaped(label: str) -> str:
    """A label of the user's that means itself between separators."""
    if label == EMPTY:
        return _ESCAPE + label
    if _ESCAPE in label or SEPARATOR in label:
        return label.replace(_ESCAPE, _ESCAPE * 2).replace(SEPARATOR, _ESCAPE + SEPARATOR)
    return label


def _chain(joined: str) -> list[str]:
    """The labels of a chain, from the top."""
    if _ESCAPE not in joined:
        return joined.split(SEPARATOR)
    labels, i = [""], 0
    while i < len(joined):
        if joined[i] == _ESCAPE and i + 1 < len(joined):
            i += 1
            labels[-1] += joined[i]
        elif joined[i] == SEPARATOR:
            labels.append("")
        else:
            labels[-1] += joined[i]
        i += 1
    return labels


def tree_to_tuple(tree: SyntaxTree) -> TreeTuple:
    """The tree as heights, labels and unary labels, all that is needed to build it again over the same words.

    Nodes with one child are merged with it (labels joined by `SEPARATOR`) or, above a word, become its unary label; of a
    node with more than two children all but the first go below a new node labelled `EMPTY`, and so on. In time
    proportional to the number of nodes.

    >>> block = ("block", ("expression_statement", ("assignment", "selected", "=", "element")), ("break_statement", "break"))
    >>> found = tree_to_tuple(SyntaxTree.from_nested(block))
    >>> found.d, found.c
    ([2, 1, 3], ['expression_statement+assignment', 'EMPTY', 'block'])
    >>> found.u
    ['EMPTY', 'EMPTY', 'EMPTY', 'break_statement']
    """
    first = tree.arities.count(0)
    d, c, u = [0] * (first - 1), [EMPTY] * (first - 1), [EMPTY] * first
    done = list[tuple[int, int, int]]()  # height, first leaf, where its own split is (-1: it is a word)
    for label, arity in zip(reversed(tree.labels), reversed(tree.arities), strict=True):
        if arity == 0:
            first -= 1
            done.append((0, first, -1))
        elif arity == 1:
            _, start, split = done[-1]
            own = _escaped(label)
            if split >= 0:
                c[split] = own if c[split] == EMPTY else own + SEPARATOR + c[split]
            else:
                u[start] = own if u[start] == EMPTY else own + SEPARATOR + u[start]
        else:  # the first child lies on top, the last deepest
            height, after, _ = done[-arity]
            for child_height, start, _ in done[1 - arity :]:
                height = max(child_height, height) + 1
                split = after - 1
                d[split] = height
                after = start
            c[split] = _escaped(label)
            del done[-arity:]
            done.append((height, after, split))
    return TreeTuple(d, c, u)


def tuple_to_tree(
    d: Sequence[float] | np.ndarray | Tensor, c: Sequence[str], u: Sequence[str], leaves: Sequence[str]
) -> SyntaxTree:
    """The tree of (d, c, u) over the words ``leaves``, the inverse of `tree_to_tuple` for any increasing function of d.

    Words are split where d is largest (the first place on ties), and each part again. Then nodes labelled `EMPTY` give their
    children to their parent, joined labels become chains, and unary labels stand above their words. A topmost `EMPTY` becomes
    `BAD_ROOT`.

    Raises InputError where lengths do not fit or d is not finite.
    """
    heights = d.tolist() if isinstance(d, (np.ndarray, Tensor)) else list(d)
    n = len(leaves) - 1
    if n < 0 or len(heights) != n or len(c) != n or len(u) != n + 1:
        raise InputError(
            f"{n + 1} words need {max(n, 0)} heights and labels and {n + 1} unary labels, got {len(heights)}, {len(c)}, {len(u)}"
        )
    if not all(map(math.isfinite, heights)):
        raise InputError("heights must be finite numbers")
    left, right, order = _splits(heights)
    count = [0] * n  # children of each split once nodes labelled EMPTY are gone
    for i in reversed(order):
        count[i] = sum(count[j] if j >= 0 and c[j] == EMPTY else 1 for j in (left[i], right[i]))
    labels, arities = list[str](), list[int]()
    stack = [order[0] if order else -1]
    word = 0
    while stack:
        i = stack.pop()
        if i < 0:
            above = [] if u[word] == EMPTY else _chain(u[word])
            labels += [*above, leaves[word]]
            arities += [*(1 for _ in above), 0]
            word += 1
            continue
        if c[i] != EMPTY or not labels:
            names = [BAD_ROOT] if c[i] == EMPTY else _chain(c[i])
            labels += names
            arities += [1] * (len(names) - 1) + [count[i]]
        stack += [right[i], left[i]]
    return SyntaxTree(tuple(labels), tuple(arities))


def _splits(heights: Sequence[float]) -> tuple[list[int], list[int], list[int]]:
    """The binary tree of splits: left and right child of each (-1: a word) and a preorder, by one pass with a stack."""
    left, right = [-1] * len(heights), [-1] * len(heights)
    spine = list[int]()
    for i, height in enumerate(heights):
        below = -1
        while spine and heights[spine[-1]] < height:  # an equal height to the left stays above
            below = spine.pop()
        left[i] = below
        if spine:
            right[spine[-1]] = i
        spine.append(i)
    order, stack = list[int](), spine[:1]
    while stack:
        i = stack.pop()
        order.append(i)
        stack += [j for j in (right[i], left[i]) if j >= 0]
    return left, right, order


# ---- how well one tree recovers another


class F1(NamedTuple):
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def constituent_f1(true: SyntaxTree, pred: SyntaxTree) -> F1:
    """Agreement of the labelled constituents of two trees over the same number of words.

    Two trees without inner nodes agree fully.

    >>> constituent_f1(SyntaxTree.from_nested(("a", "x", ("b", "y"))), SyntaxTree.from_nested(("a", "x", "y")))
    F1(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    return _agreement(*_two(true, pred))


def _two(true: SyntaxTree, pred: SyntaxTree) -> "tuple[Counter[Any], Counter[Any]]":
    if true.arities.count(0) != pred.arities.count(0):
        raise InputError(
            f"the trees have {true.arities.count(0)} and {pred.arities.count(0)} words; compare trees over the same words"
        )
    # the first and last leaf stand for all between
    wanted, got = (Counter((t.labels[i], a, b) for i, a, b in t.spans()) for t in (true, pred))
    return wanted, got


def _agreement(wanted: "Counter[Any]", got: "Counter[Any]") -> F1:
    hits, of, made = sum((wanted & got).values()), sum(wanted.values()), sum(got.values())
    if of == made == 0:
        return F1(1.0, 1.0, 1.0)
    return F1(hits / made if made else 0.0, hits / of if of else 0.0, 2 * hits / (of + made))


@dataclass(frozen=True, eq=False)
class TreeScores:
    """Agreement of predicted with true trees.

    precision, recall, f1: (snippet,). by_label: {label: (constituents found, constituents there)}, commonest first.
    """

    precision: Float[np.ndarray, " snippet"]
    recall: Float[np.ndarray, " snippet"]
    f1: Float[np.ndarray, " snippet"]
    by_label: dict[str, tuple[int, int]]

    @property
    def mean(self) -> F1:
        """Averages over snippets."""
        return F1(float(self.precision.mean()), float(self.recall.mean()), float(self.f1.mean()))

    def estimate(self, *, groups: np.ndarray | None = None, seed: int = 0) -> Estimate:
        """Mean F1 with its bootstrap interval over snippets, by whole ``groups`` (files) where there are several."""
        several = groups is not None and len(np.unique(groups)) > 1  # of a single file the snippets are all that varies
        return bootstrap(self.f1, seed=seed, unit="F1", groups=groups if several else None)


def score_trees(true: Iterable[SyntaxTree], predicted: Iterable[SyntaxTree]) -> TreeScores:
    """`constituent_f1` of each pair, and the recall of each label over all of them.

    >>> tree = SyntaxTree.from_nested(("a", "x", ("b", "y")))
    >>> score_trees([tree], [tree]).by_label
    {'a': (1, 1), 'b': (1, 1)}
    """
    scores, found, there = list[F1](), Counter[str](), Counter[str]()
    for one, other in zip(true, predicted, strict=True):
        wanted, got = _two(one, other)
        scores.append(_agreement(wanted, got))
        for (label, _, _), times in wanted.items():
            there[label] += times
        for (label, _, _), times in (wanted & got).items():
            found[label] += times
    if not scores:
        raise InputError("there are no trees to score")
    table = np.array(scores, dtype=np.float64)
    return TreeScores(table[:, 0], table[:, 1], table[:, 2], {k: (found[k], n) for k, n in there.most_common()})


# ---- what needs no states


def majority_tree(trees: Iterable[SyntaxTree], leaves: Sequence[str]) -> SyntaxTree:
    """The answer without looking: right-branching over ``leaves``, with the commonest label and unary label of ``trees``."""
    tuples = [tree_to_tuple(tree) for tree in trees]
    c, u = (Counter(label for one in tuples for label in labels(one)) for labels in (lambda t: t.c, lambda t: t.u))
    n = len(leaves) - 1
    label, unary = (one.most_common(1)[0][0] if one else EMPTY for one in (c, u))
    return tuple_to_tree(range(n, 0, -1), [label] * n, [unary] * (n + 1), leaves)


def shuffle_labels(trees: Sequence[SyntaxTree], *, seed: int = 0) -> list[SyntaxTree]:
    """The control task: the same shapes over the same words, with the labels of all inner nodes dealt out at random."""
    inner = [label for t in trees for label, arity in zip(t.labels, t.arities, strict=True) if arity]
    dealt = iter(np.random.default_rng(seed).permutation(len(inner)).tolist())
    return [
        SyntaxTree(
            tuple(inner[next(dealt)] if arity else label for label, arity in zip(t.labels, t.arities, strict=True)),
            t.arities,
        )
        for t in trees
    ]
