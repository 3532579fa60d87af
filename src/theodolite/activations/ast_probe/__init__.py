"""Whether a language model's hidden states hold the syntax tree, in which layer, and in how many dimensions.

    s_i = B h_i,   B B^T = 1        one orthogonal projection of the vectors of a snippet's words
    ||s_i - s_{i+1}||^2             is ordered like the height of the lowest node above words i and i + 1
    <s_{i+1} - s_i, C_k>            is largest for that node's label, <s_i, U_k> for the labels right above a word

These three read the WHOLE labelled tree (`tuple_to_tree`), not parts of it. Works for any tree over words: `parse_python`,
`parse_code` (any tree-sitter grammar), `SyntaxTree.from_nested`. Split snippets into training and test sets by file
(`Parsed.split`), not by function, and show F1 beside `random_weights_like` and layer 0: the probe learns some of the grammar
from the words alone. Of a causal model a word's vector has not seen later words; it is not shifted.

Source: Hernández López, Weyssow, Sánchez Cuadrado, Sahraoui, 2022, arXiv:2206.11719 (AST-Probe: Recovering abstract syntax
trees from hidden representations of pre-trained language models).
"""

__all__ = [
    "BAD_ROOT",
    "EMPTY",
    "SEPARATOR",
    "F1",
    "ASTProbe",
    "AlignmentError",
    "Check",
    "ParseError",
    "Parsed",
    "ParserWarning",
    "SyntaxTree",
    "TreeScores",
    "TreeTuple",
    "borrowed_states",
    "constituent_f1",
    "layer_sweep",
    "majority_tree",
    "parse_code",
    "parse_python",
    "parse_snippets",
    "python_functions",
    "random_weights_like",
    "rank_curve",
    "rank_sweep",
    "score_trees",
    "shuffle_labels",
    "subspace_similarity",
    "subword_counts",
    "tree_to_tuple",
    "tuple_to_tree",
    "word_states",
]

from theodolite.activations.ast_probe.parsing import (
    Parsed,
    ParseError,
    ParserWarning,
    parse_code,
    parse_python,
    parse_snippets,
    python_functions,
)
from theodolite.activations.ast_probe.probe import ASTProbe, Check
from theodolite.activations.ast_probe.states import AlignmentError, random_weights_like, subword_counts, word_states
from theodolite.activations.ast_probe.study import (
    borrowed_states,
    layer_sweep,
    rank_curve,
    rank_sweep,
    subspace_similarity,
)
from theodolite.activations.ast_probe.trees import (
    BAD_ROOT,
    EMPTY,
    F1,
    SEPARATOR,
    SyntaxTree,
    TreeScores,
    TreeTuple,
    constituent_f1,
    majority_tree,
    score_trees,
    shuffle_labels,
    tree_to_tuple,
    tuple_to_tree,
)
