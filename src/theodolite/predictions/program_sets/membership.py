"""Whether a program is a completion of a partial program; what runs for every node is not type-checked at run time."""

__all__ = ["contains"]

from collections import defaultdict
from typing import no_type_check

from theodolite.core.errors import InputError
from theodolite.predictions.program_sets.pruning import PartialProgram
from theodolite.predictions.program_sets.trees import ProgramTree


def contains(partial: PartialProgram, tree: ProgramTree, match: str = "structural", *, hole_arity: str = "one") -> bool:
    """Whether ``tree`` is among the completions of ``partial``; layout, quotes and the case of keywords do not matter.

    "structural": a kept node and the one that it stands for have the same type, the same own text and the same child
    slots, filled in the same order; a hole stands for exactly one subtree of its slot, and with hole_arity "any" for any
    number of subtrees where the slot is a list. "official", the looser notion of the authors' code: each kept child occurs
    among the other's children, whatever the order and number.

    >>> from theodolite.predictions.program_sets import parse_program, prune
    >>> partial = prune(parse_program("f(a, b)"), [0, 0, 0, 2], [0.5])[0]
    >>> [contains(partial, parse_program(code)) for code in ("f(a, g(1))", "f( a,b )", "f(b, a)", "f(a)")]
    [True, True, False, False]
    """
    if match not in ("structural", "official"):
        raise InputError(f'match must be "structural" or "official", got {match!r}')
    if hole_arity not in ("one", "any"):
        raise InputError(f'hole_arity must be "one" or "any", got {hole_arity!r}')
    if not partial.kept[0]:
        return True
    ours, theirs = partial.tree.nodes, tree.nodes
    if partial.tree.language != tree.language:
        raise InputError(f"the partial program is {partial.tree.language}, the other {tree.language}")
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, node in enumerate(theirs):
        alike[node.type, node.label].append(number)
    # from the leaves up: the nodes of the other program that each kept node can stand for
    stands: dict[int, set[int]] = {}
    for number in range(len(ours) - 1, -1, -1):
        if not partial.kept[number]:
            continue
        node = ours[number]
        found = set()
        for other in alike.get((node.type, node.label), ()):
            if match == "official":
                fits = _among(node.children, theirs[other].children, stands)
            else:
                fits = _in_order(partial, number, tree, other, stands, hole_arity == "any")
            if fits:
                found.add(other)
        if not found:
            return False
        stands[number] = found
    return 0 in stands[0]


@no_type_check
def _among(children: tuple[int, ...], others: tuple[int, ...], stands: dict[int, set[int]]) -> bool:
    return all(not stands[child].isdisjoint(others) for child in children if child in stands)


@no_type_check
def _in_order(
    partial: PartialProgram, number: int, tree: ProgramTree, other: int, stands: dict[int, set[int]], several: bool
) -> bool:
    ours, theirs = _slots(partial.tree, number), _slots(tree, other)
    for slot in ours.keys() | theirs.keys():
        mine, others = ours.get(slot, []), theirs.get(slot, [])
        if several and mine and partial.tree.nodes[mine[0]].in_list:
            if not _with_gaps(mine, others, stands):
                return False
        elif len(mine) != len(others) or not all(
            b in stands[a] for a, b in zip(mine, others, strict=True) if a in stands
        ):
            return False
    return True


@no_type_check
def _slots(tree: ProgramTree, number: int) -> dict[str, list[int]]:
    slots: dict[str, list[int]] = defaultdict(list)
    for child in tree.nodes[number].children:
        slots[tree.nodes[child].slot].append(child)
    return slots


@no_type_check
def _with_gaps(mine: list[int], others: list[int], stands: dict[int, set[int]]) -> bool:
    """Whether the list ``others`` fits ``mine``, in which each removed node takes any number of elements."""
    reached = {0}  # elements of others that the part of mine so far can have taken
    for a in mine:
        if a in stands:
            reached = {at + 1 for at in reached if at < len(others) and others[at] in stands[a]}
        else:
            reached = set(range(min(reached), len(others) + 1)) if reached else reached
    return len(others) in reached
