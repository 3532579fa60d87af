"""Training a syntax probe and turning trees into tuples, beside the design of the paper's own code.

Peer: martin-wey/ast-probe does not install with today's tree-sitter (its `Language.build_library` is gone since 0.22), so its
design is written here: the language model runs again in every epoch; trees are networkx graphs that are taken
apart and put together by recursion. Model: all-MiniLM-L6-v2 (make models), all six blocks.

Run: python benchmarks/ast_probe_training.py [PATH]      writes ast_probe_training.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import torch

from theodolite.activations.ast_probe import (
    ASTProbe,
    SyntaxTree,
    python_functions,
    tree_to_tuple,
    tuple_to_tree,
    word_states,
)
from theodolite.language.pretrained import load_encoder

SNIPPETS, HELD, BATCH, EPOCHS = 64, 16, 32, 20
ROUNDS = 3


def median(call: Callable[[], Any]) -> float:
    """Median CPU seconds of a few calls, so that other load on the machine counts less."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)


def recursive_tuple(graph: nx.DiGraph, node: int) -> tuple[int, list[int], list[str], list[str]]:
    """(d, c, u) by recursion over a graph with lists that are joined, after it was made binary."""
    label, children = graph.nodes[node]["label"], sorted(graph.successors(node))
    if not children:
        return 0, [], [], [graph.nodes[node].get("unary", "EMPTY")]
    parts = [recursive_tuple(graph, child) for child in children]
    (hl, dl, cl, ul), (hr, dr, cr, ur) = parts
    h = max(hl, hr) + 1
    return h, [*dl, h, *dr], [*cl, label, *cr], [*ul, *ur]


def binary(tree: SyntaxTree) -> nx.DiGraph:
    """The tree as a binary graph, changed in place step by step."""
    graph = tree.to_networkx()
    for node in list(graph):
        while node in graph and graph.out_degree(node) == 1:
            (child,) = graph.successors(node)
            if graph.out_degree(child):
                graph.nodes[node]["label"] += "+" + graph.nodes[child]["label"]
                for grandchild in list(graph.successors(child)):
                    graph.add_edge(node, grandchild)
                graph.remove_node(child)
            else:
                graph.nodes[node]["unary"] = graph.nodes[node]["label"]
                graph.nodes[node]["label"] = graph.nodes[child]["label"]
                graph.remove_node(child)
    for node in list(graph):
        at = node
        while graph.out_degree(at) > 2:
            _, *others = sorted(graph.successors(at))
            # a key between the first child and the next, so that sorting keeps the order
            new = others[0] - 0.5 if others[0] - 0.5 not in graph else others[0] - 0.25
            graph.add_node(new, label="EMPTY")
            graph.add_edge(at, new)
            for other in others:
                graph.remove_edge(at, other)
                graph.add_edge(new, other)
            at = new
    return graph


def recursive_tree(d: list[int], c: list[str], u: list[str], leaves: list[str]) -> Any:
    """Nested tuples of (d, c, u), by recursion with slices, without the nodes that binarisation added."""
    if not d:
        word: Any = leaves[0]
        for label in reversed([] if u[0] == "EMPTY" else u[0].split("+")):
            word = (label, word)
        return [word]
    k = d.index(max(d))
    below = recursive_tree(d[:k], c[:k], u[: k + 1], leaves[: k + 1])
    below += recursive_tree(d[k + 1 :], c[k + 1 :], u[k + 1 :], leaves[k + 1 :])
    if c[k] == "EMPTY":
        return below
    *above, last = c[k].split("+")
    made: Any = (last, *below)
    for label in reversed(above):
        made = (label, made)
    return [made]


def trees() -> dict[str, Any]:
    """Snippets a second, there and back, of functions of 40 to 60 words."""
    found = python_functions(count=60, min_leaves=40, max_leaves=60).trees

    def ours() -> list[SyntaxTree]:
        return [tuple_to_tree(*tree_to_tuple(tree), tree.leaves) for tree in found]

    def peer() -> list[SyntaxTree]:
        made = []
        for tree in found:
            _, d, c, u = recursive_tuple(binary(tree), 0)
            made.append(SyntaxTree.from_nested(recursive_tree(d, c, u, tree.leaves)[0]))
        return made

    same = ours() == peer()
    one, other = median(ours), median(peer)
    return {
        "same trees": same,
        "ours, snippets a second": round(len(found) / one),
        "peer's design, snippets a second": round(len(found) / other),
        "ratio, peer / ours": round(other / one, 1),
    }


def training() -> dict[str, Any]:
    """CPU seconds of 20 epochs with vectors made once, and with the model run again in every epoch.

    The peer's design differs by the passes of the model: one is timed and counted once for us, 20 times for it.
    """
    found = python_functions(count=SNIPPETS + HELD, min_leaves=8, max_leaves=45)
    model, tokenizer = load_encoder("minilm")
    words, trees = [tree.leaves for tree in found.trees], list(found.trees)
    layer = len(model.encoder.layer)
    word_states(model, tokenizer, words[:2], [layer])  # the first pass allocates
    began = time.process_time()
    vectors = word_states(model, tokenizer, words, [layer], batch_size=BATCH)[layer]
    once = time.process_time() - began
    probe = ASTProbe(64, batch_size=BATCH, max_epochs=EPOCHS, min_steps=1, patience=EPOCHS)
    began = time.process_time()
    probe.fit(vectors[:SNIPPETS], trees[:SNIPPETS], (vectors[SNIPPETS:], trees[SNIPPETS:]))
    fitting = time.process_time() - began
    return {
        "one pass of the model, CPU seconds": round(once, 2),
        "20 epochs of the probe alone": round(fitting, 2),
        "ours": round(once + fitting, 2),
        "peer's design": round(EPOCHS * once + fitting, 2),
        "ratio, peer / ours": round((EPOCHS * once + fitting) / (once + fitting), 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "name": "training a syntax probe and converting trees, one core",
        "peer": "design of martin-wey/ast-probe (which does not install today), written here",
        f"{EPOCHS} epochs on MiniLM, {SNIPPETS} snippets": training(),
        "trees of 40 to 60 words": trees(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/ast_probe_training.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
