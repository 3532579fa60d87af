"""Programs as trees in which every character of the source belongs to exactly one node."""

__all__ = ["ProgramNode", "ProgramSyntaxError", "ProgramTree", "parse_program", "unparsed_program"]

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import no_type_check

import numpy as np
from jaxtyping import Int

from theodolite.core.errors import DataError, InputError

_UNPARSED = "Unparsed"


class ProgramSyntaxError(DataError):
    """A text is not a program of its language."""


@dataclass(frozen=True)
class ProgramNode:
    """One node. own_spans: [start, end) of the characters that no child covers. span: of the whole subtree.

    label: what the node says apart from its children (names, operators, constants), whatever the layout. parent: number of
    the parent, -1 at the root. children: their numbers, by place in the text. slot: the field of the parent that it fills;
    in_list: whether that field holds any number of nodes.
    """

    type: str
    label: str
    own_spans: tuple[tuple[int, int], ...]
    span: tuple[int, int]
    parent: int
    children: tuple[int, ...]
    slot: str = ""
    in_list: bool = False


@dataclass(frozen=True, eq=False)
class ProgramTree:
    """A parsed program. nodes: in preorder, the root first, so that parents come before children."""

    code: str
    language: str
    nodes: tuple[ProgramNode, ...]

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def unparsed(self) -> bool:
        """Whether this stands for a text that is no program."""
        return self.nodes[0].type == _UNPARSED

    @cached_property
    def parents(self) -> Int[np.ndarray, " node"]:
        """Number of each node's parent; -1 for the root."""
        return np.array([node.parent for node in self.nodes])

    @cached_property
    def owner(self) -> Int[np.ndarray, " character"]:
        """Number of the node that each character of the code belongs to."""
        found = np.zeros(len(self.code), dtype=np.int64)
        for number, node in enumerate(self.nodes):
            for start, end in node.own_spans:
                found[start:end] = number
        return found


@dataclass(eq=False)
class Sketch:
    """A node while its tree is built: the parsers make these, `plant` numbers them and shares out the characters."""

    type: str
    label: str
    span: tuple[int, int]
    slot: str = ""
    in_list: bool = False
    children: list["Sketch"] = field(default_factory=list)


def parse_program(code: str, language: str = "python", dialect: str | None = None) -> ProgramTree:
    """The syntax tree of ``code``; language "python" (the standard library's parser) or "sql" (sqlglot's, of ``dialect``).

    A text of a common indentation is read as it stands. Nodes without a place in the text (operators, contexts, arguments)
    are part of their parent; so are wrappers that say nothing (a module of one statement, the statement of an expression).

    Raises ProgramSyntaxError where the text is empty or does not parse, MissingExtraError for SQL without sqlglot.

    >>> tree = parse_program("f(a, 1)")
    >>> [(node.type, "".join(tree.code[s:e] for s, e in node.own_spans)) for node in tree.nodes]
    [('Call', '(, )'), ('Name', 'f'), ('Name', 'a'), ('Constant', '1')]
    """
    if language == "python":
        from theodolite.predictions.program_sets.python_trees import sketch_python

        root = sketch_python(code)
    elif language == "sql":
        from theodolite.predictions.program_sets.sql_trees import sketch_sql

        root = sketch_sql(code, dialect)
    else:
        raise InputError(f'language must be "python" or "sql", got {language!r}')
    return plant(code, language, root)


def unparsed_program(code: str, language: str) -> ProgramTree:
    """One node for a text that is no program."""
    return plant(code, language, Sketch(_UNPARSED, "", (0, len(code))))


def plant(code: str, language: str, root: Sketch) -> ProgramTree:
    """Number the nodes in preorder; each character goes to the deepest node around it, what is around none to the root."""
    order: list[Sketch] = []
    parents: list[int] = []
    stack = [(root, -1)]
    while stack:
        sketch, parent = stack.pop()
        number = len(order)
        order.append(sketch)
        parents.append(parent)
        sketch.children.sort(key=lambda child: child.span)
        stack += [(child, number) for child in reversed(sketch.children)]
    spans = [sketch.span for sketch in order]
    children: list[list[int]] = [[] for _ in order]
    for number in range(len(order) - 1, 0, -1):
        parent = parents[number]
        children[parent].append(number)
        spans[parent] = _hull(spans[parent], spans[number])
    owner = np.zeros(len(code), dtype=np.int64)
    for number, (start, end) in enumerate(spans[1:], 1):
        owner[start:end] = number
    own: list[list[tuple[int, int]]] = [[] for _ in order]
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(code)] if len(code) else []
    for start, end in itertools.pairwise(edges):
        own[owner[start]].append((start, end))
    nodes = [
        ProgramNode(
            sketch.type, sketch.label, tuple(own[i]), spans[i] if i else (0, len(code)), parents[i],
            tuple(reversed(children[i])), sketch.slot, sketch.in_list,
        )
        for i, sketch in enumerate(order)
    ]  # fmt: skip
    return ProgramTree(code, language, tuple(nodes))


@no_type_check
def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The least span around both; an empty one is nowhere."""
    if a[0] == a[1]:
        return b
    if b[0] == b[1]:
        return a
    return min(a[0], b[0]), max(a[1], b[1])
