import itertools
import json
import sys

import networkx as nx
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, T5Config, T5Model
from typer.testing import CliRunner

from theodolite.activations import ast_probe as ap
from theodolite.activations.ast_probe import (
    BAD_ROOT,
    EMPTY,
    AlignmentError,
    ASTProbe,
    ParseError,
    SyntaxTree,
    borrowed_states,
    constituent_f1,
    layer_sweep,
    majority_tree,
    parse_code,
    parse_python,
    parse_snippets,
    parsing,
    python_functions,
    random_weights_like,
    rank_curve,
    rank_sweep,
    score_trees,
    shuffle_labels,
    states,
    subspace_similarity,
    subword_counts,
    tree_to_tuple,
    tuple_to_tree,
    word_states,
)
from theodolite.core.capture import ActivationError
from theodolite.core.dictionary import Dictionary, explained_variance
from theodolite.core.errors import DataError, InputError, MissingExtraError, ModelError, TrainingCollapsedError
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.run_commands import run_app
from theodolite.survey.activations import ast_probe as chart_module
from theodolite.survey.chart import Budget, load_charts

QUICK = settings(max_examples=60, deadline=None)
BLOCK = ("block", ("expression_statement", ("assignment", "selected", "=", "element")), ("break_statement", "break"))

LABELS = st.sampled_from(["a", "b", "long_name", "x+y", "+", "EMPTY", "\\", "\\+", "bad\\EMPTY", "ü"])
WORDS = st.sampled_from(["x", "(", "+", "EMPTY", "ü", "'a b'"])
NESTED = st.recursive(
    WORDS,
    lambda child: st.tuples(LABELS, st.lists(child, min_size=1, max_size=6)).map(lambda t: (t[0], *t[1])),
    max_leaves=40,
)


def tree(nested):
    return SyntaxTree.from_nested(nested)


# ---- trees and tuples, exactly


def test_published_example():
    found = tree_to_tuple(tree(BLOCK))
    assert found.d == [2, 1, 3]
    assert found.c == ["expression_statement+assignment", EMPTY, "block"]
    assert found.u == [EMPTY, EMPTY, EMPTY, "break_statement"]
    assert tuple_to_tree(*found, tree(BLOCK).leaves) == tree(BLOCK)


def test_published_f1():
    true = tree(BLOCK)
    predicted = tree(("block", ("expression_statement", ("call", "selected", "=", "element")), "break"))
    score = constituent_f1(true, predicted)
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(2 / 4)
    assert score.f1 == pytest.approx(4 / 7)


def binary(nested):
    """The binary tree by its definition, recursively: (label or word, unary, children)."""
    labels = []
    while not isinstance(nested, str) and len(nested) == 2:
        labels.append(nested[0])
        nested = nested[1]
    if isinstance(nested, str):
        return nested, "+".join(labels) or EMPTY, []
    label, *children = nested
    children = [binary(child) for child in children]
    while len(children) > 2:
        children = [*children[:-2], (EMPTY, None, children[-2:])]
    return "+".join([*labels, label]), None, children


def by_definition(node):
    """(height, d, c, u) of a binary tree, recursively."""
    label, unary, children = node
    if not children:
        return 0, [], [], [unary]
    (hl, dl, cl, ul), (hr, dr, cr, ur) = (by_definition(child) for child in children)
    h = max(hl, hr) + 1
    return h, [*dl, h, *dr], [*cl, label, *cr], [*ul, *ur]


PLAIN = st.recursive(
    st.sampled_from("xyz"),
    lambda child: st.tuples(st.sampled_from("abc"), st.lists(child, min_size=1, max_size=6)).map(
        lambda t: (t[0], *t[1])
    ),
    max_leaves=30,
)


@QUICK
@given(PLAIN)
def test_tuples_are_those_of_the_recursive_definition(nested):
    found = tree_to_tuple(tree(nested))
    _, d, c, u = by_definition(binary(nested))
    assert (found.d, found.c, found.u) == (d, c, u)
    # d is the height of the lowest common ancestor of neighbouring words
    assert len(found.d) == len(found.c) == len(found.u) - 1


@QUICK
@given(NESTED)
def test_round_trip_is_exact_whatever_the_labels_and_under_monotone_maps(nested):
    one = tree(nested)
    d, c, u = tree_to_tuple(one)
    assert tuple_to_tree(d, c, u, one.leaves) == one
    assert tuple_to_tree([3 * x + 1 for x in d], c, u, one.leaves) == one
    assert tuple_to_tree(np.exp(np.array(d, dtype=float)), c, u, one.leaves) == one
    assert tuple_to_tree(torch.tensor(d, dtype=torch.float64), c, u, one.leaves) == one


def split_at_largest(d, c, u, leaves):
    """The decoding by its definition, recursively, before anything is removed."""
    if not d:
        return leaves[0], u[0]
    k = max(range(len(d)), key=lambda i: (d[i], -i))
    return (
        c[k],
        split_at_largest(d[:k], c[:k], u[: k + 1], leaves[: k + 1]),
        split_at_largest(d[k + 1 :], c[k + 1 :], u[k + 1 :], leaves[k + 1 :]),
    )


def cleaned(node):
    if len(node) == 2:
        word, unary = node
        for label in reversed([] if unary == EMPTY else unary.split("+")):
            word = (label, word)
        return [word]
    label, left, right = node
    children = cleaned(left) + cleaned(right)
    if label == EMPTY:
        return children
    *above, last = label.split("+")
    made = (last, *children)
    for name in reversed(above):
        made = (name, made)
    return [made]


@QUICK
@given(st.data(), st.integers(1, 25))
def test_any_d_c_u_decodes_as_by_the_recursive_definition(data, n):
    d = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))  # with ties
    c = data.draw(st.lists(st.sampled_from([EMPTY, "a", "b+c"]), min_size=n, max_size=n))
    u = data.draw(st.lists(st.sampled_from([EMPTY, "p", "q+r"]), min_size=n + 1, max_size=n + 1))
    leaves = [f"w{i}" for i in range(n + 1)]
    found = cleaned(split_at_largest(d, c, u, leaves))
    expected = tree(found[0]) if len(found) == 1 else tree((BAD_ROOT, *found))
    assert tuple_to_tree(d, c, u, leaves) == expected


def test_an_empty_top_is_a_bad_root_and_counts_as_wrong():
    bad = tuple_to_tree([2, 1], [EMPTY, "b"], [EMPTY] * 3, "xyz")
    assert bad == tree((BAD_ROOT, "x", ("b", "y", "z")))
    assert constituent_f1(tree(("a", "x", ("b", "y", "z"))), bad).f1 == 0.5


def test_very_deep_trees():
    labels, arities = ["a", "b"] * 20_000, [1, 2] * 20_000
    one = SyntaxTree((*labels, *["x"] * 20_001), (*arities, *[0] * 20_001))
    assert tuple_to_tree(*tree_to_tuple(one), one.leaves) == one
    assert len(one.spans()) == 40_000


@QUICK
@given(PLAIN)
def test_constituents_graph_and_text(nested):
    one = tree(nested)

    def walk(node, first):
        if isinstance(node, str):
            return first + 1, []
        after, found = first, []
        for child in node[1:]:
            after, below = walk(child, after)
            found += below
        return after, [(node[0], tuple(range(first, after))), *found]

    assert sorted(one.constituents().elements()) == sorted(walk(nested, 0)[1])
    graph = one.to_networkx()
    assert graph.number_of_nodes() == len(one.labels)
    assert [graph.nodes[i]["label"] for i in nx.dfs_preorder_nodes(graph, 0)] == list(one.labels)
    assert [graph.nodes[i]["label"] for i in sorted(graph) if graph.nodes[i]["word"]] == one.leaves
    assert nx.is_arborescence(graph) or len(graph) == 1
    assert len(one.render().splitlines()) == len(one.labels)
    assert constituent_f1(one, one).f1 == 1


def test_render():
    assert tree(("a", "x", ("b", "y"))).render() == "a\n  'x'\n  b\n    'y'"


@pytest.mark.parametrize("nested", [("a",), ("a", ()), (), ("a", 3), (["a"], "x"), 5])
def test_what_is_no_tree_is_refused(nested):
    with pytest.raises(InputError, match="label, child"):
        tree(nested)


@pytest.mark.parametrize(
    ("labels", "arities"), [((), ()), (("a",), (1,)), (("a", "x", "y"), (1, 0, 0)), (("a", "x"), (0, 0))]
)
def test_arities_must_be_one_tree(labels, arities):
    with pytest.raises(InputError):
        SyntaxTree(labels, arities)


def test_tuples_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="3 words need 2 heights"):
        tuple_to_tree([1], ["a"], [EMPTY] * 3, "xyz")
    with pytest.raises(InputError, match="words"):
        tuple_to_tree([], [], [], [])
    with pytest.raises(InputError, match="finite"):
        tuple_to_tree([float("nan")], ["a"], [EMPTY] * 2, "xy")


# ---- scores


def test_f1_is_averaged_over_snippets_not_constituents():
    small, large = tree(("a", "x", "y")), tree(("a", *[("b", "x", "y")] * 9))
    wrong = tree(("c", *["x"] * 18))
    scores = score_trees([small, large], [small, wrong])
    assert scores.mean.f1 == 0.5
    assert scores.by_label == {"b": (0, 9), "a": (1, 2)}
    assert scores.estimate().low < 0.5 < scores.estimate().high
    assert scores.estimate(groups=np.array(["f", "f"])) == scores.estimate()


def test_repeated_constituents_count_as_often_as_they_are_there():
    true, once = tree(("a", ("a", "x", "y"))), tree(("a", "x", "y"))
    assert constituent_f1(true, once) == (1.0, 0.5, pytest.approx(2 / 3))


def test_scores_of_words_alone_and_of_other_words():
    assert constituent_f1(tree("x"), tree("y")).f1 == 1
    assert constituent_f1(tree(("a", "x")), tree("x")) == (0, 0, 0)
    with pytest.raises(InputError, match="1 and 2 words"):
        constituent_f1(tree("x"), tree(("a", "x", "y")))
    with pytest.raises(InputError, match="no trees"):
        score_trees([], [])


def test_binary_nodes_do_not_count():
    # all heights wrong but the labels EMPTY: nothing is found, as the nodes added by binarisation are no constituents
    true = tree(("a", *"wxyz"))
    d, _, u = tree_to_tuple(true)
    assert constituent_f1(true, tuple_to_tree(d, [EMPTY] * 3, u, "wxyz")).f1 == 0


def test_majority_tree_is_right_branching_with_the_commonest_labels():
    trees = [tree(("a", "x", ("a", "y", "z"))), tree(("b", ("u", "x"), ("u", "y")))]
    assert majority_tree(trees, ["p", "q", "r"]) == tree(("a", "p", ("a", "q", "r")))
    flat = [tree(("a", *"vwxyz"))]  # EMPTY is commonest
    assert majority_tree(flat, "pqr") == tree((BAD_ROOT, *"pqr"))
    assert majority_tree(flat, "p") == tree("p")


def test_shuffled_labels_keep_shapes_words_and_the_labels_as_a_whole():
    trees = [tree(BLOCK), tree(("a", "x", ("b", "y")))]
    dealt = shuffle_labels(trees, seed=1)
    assert [t.arities for t in dealt] == [t.arities for t in trees]
    assert [t.leaves for t in dealt] == [t.leaves for t in trees]
    assert sorted(label for t in dealt for label in t.labels) == sorted(label for t in trees for label in t.labels)
    assert dealt != trees
    assert dealt == shuffle_labels(trees, seed=1)


# ---- parsing

CODE = '''
@decorate
async def f(a, *, b: int = 1, **k) -> str:
    """The docstring."""
    # a comment
    x = f"a{b}c" "lit" 'ö' + a.é
    for i in range(3):
        "no docstring"
    print(x, end="")
    return b"x" + -1 \\
        + 2


class C:
    r"""Another."""
    def g(self): f"none"
'''
TOKENS = (
    (
        '@ decorate async def f ( a , * , b : int = 1 , ** k ) -> str : x = f"a{b}c" "lit" \'ö\' + a . é for i in range ( 3 ) : '
        '"no^docstring" print ( x , end = "" ) return b"x" + - 1 + 2 class C : def g ( self ) : f"none"'
    )
    .replace("^", "\0")
    .split(" ")
)
TOKENS = [word.replace("\0", " ") for word in TOKENS]


def test_words_of_python_without_comments_and_docstrings():
    found = parse_python(CODE)
    assert found.leaves == TOKENS
    assert found.labels[0] == "module"
    assert ("assignment", tuple(range(22, 31))) in found.constituents()
    assert "string" not in found.labels
    assert "comment" not in found.labels
    assert parsing._by_ast(CODE).leaves == TOKENS


def test_trees_of_both_parsers_on_a_known_snippet():
    assert parse_python("x = f(1)") == tree(
        ("module", ("expression_statement", ("assignment", "x", "=", ("call", "f", ("argument_list", "(", "1", ")")))))
    )
    assert parsing._by_ast("x = f(1)") == tree(("Module", ("Assign", "x", "=", ("Call", "f", "(", "1", ")"))))


def test_both_parsers_find_the_same_words_in_the_standard_library():
    found = python_functions(count=60, seed=5)
    for code, one in zip(found.codes, found.trees, strict=True):
        assert parsing._by_ast(code).leaves == one.leaves


def test_spans_are_in_bytes():
    assert parse_python("é = 'ö' + 'ü'").leaves == ["é", "=", "'ö'", "+", "'ü'"]
    assert parsing._by_ast("é = 'ö' + 'ü'; y = (é)").leaves[-5:] == ["y", "=", "(", "é", ")"]


def test_an_empty_body_leaves_no_node():
    found = parse_python('def f():\n    """Nothing else."""\n')
    assert found.leaves == ["def", "f", "(", ")", ":"]
    assert "block" not in found.labels


@pytest.mark.parametrize(
    "code", ["x = (", "def f(:\n  pass", "", "# nothing", '"""only a docstring"""', "x = '\ud800'"]
)
@pytest.mark.parametrize("parse", [parse_python, parsing._by_ast])
def test_what_does_not_parse_is_told(parse, code):
    with pytest.raises(ParseError):
        parse(code)


def test_the_line_of_an_error_is_told():
    with pytest.raises(ParseError, match=r"line 2 is not grammatical python: 'y = \(\('"):
        parse_python("x = 1\ny = ((\n")


def test_without_tree_sitter_pythons_own_parser_is_used_with_a_warning(monkeypatch):
    parsing._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.warns(ap.ParserWarning, match=r"theodolite\[code\]"):
        found = parse_python("x = 1")
    assert found == tree(("Module", ("Assign", "x", "=", "1")))
    with pytest.raises(MissingExtraError, match=r"theodolite\[code\]"):
        parse_code("x", "python")
    parsing._parser.cache_clear()


def test_a_grammar_that_is_not_there_is_named():
    with pytest.raises(MissingExtraError, match="pip install tree-sitter-no-such-language"):
        parse_code("x", "no_such_language")
    with pytest.raises(InputError, match="a language is a name"):
        parse_code("x", "os.path")


def test_snippets_are_skipped_and_counted():
    found = parse_snippets(["x = 1", "x = (", "f(" + "a," * 60 + ")", "x", "y = 2"], max_leaves=100)
    assert found.kept.tolist() == [0, 4]
    assert found.skipped == {"not grammatical": 1, "too long": 1, "too short": 1}
    with pytest.raises(DataError, match="2 of 3 snippets do not parse"):
        parse_snippets(["(", ")", "x = 1"])
    with pytest.raises(DataError, match="none of 2"):
        parse_snippets(["x", "y"])


def test_functions_of_a_folder_and_sets_that_share_no_file(tmp_path):
    for k in range(8):
        body = "".join(f"def f{i}(a):\n    return a + {i}\n\n\n" for i in range(9))
        (tmp_path / f"m{k}.py").write_text(f"class C:\n    @x\n    def g(self):\n        return 1\n\n{body}")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("def left_out(a):\n    return a\n")
    found = python_functions(tmp_path, seed=1)
    assert len(found) == 48
    assert found.skipped == {"files that are not Python": 2}
    assert all(code.startswith("def ") for code in found.codes)
    one, two = found.split([20, 15], seed=2)
    assert (len(one), len(two)) == (20, 15)
    assert {found.files[i] for i in one}.isdisjoint({found.files[i] for i in two})
    again = python_functions(tmp_path, seed=1)
    assert again.codes == found.codes
    assert len(python_functions(tmp_path, count=5)) == 5
    assert len(python_functions(tmp_path / "m0.py")) == 6
    with pytest.raises(DataError, match="do not make sets"):
        found.split([48, 1])
    with pytest.raises(DataError, match="no Python function"):
        python_functions(tmp_path, min_leaves=90)


def test_round_trip_of_real_functions():
    for one in python_functions(count=100, seed=2).trees:
        d, c, u = tree_to_tuple(one)
        assert tuple_to_tree(d, c, u, one.leaves) == one
        assert tuple_to_tree([3 * x + 1 for x in d], c, u, one.leaves) == one


# ---- hidden states


class Letters:
    """A tokenizer of single characters, between two special tokens where asked; a space has no sub-word of its own."""

    pad_token_id = 0

    def __init__(self, special=True):
        self.special = special

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            ids = [self(one, add_special_tokens).input_ids for one in text]
        else:
            ids = [3 + ord(letter) % 60 for letter in text if letter not in " \x01"]
            ids = [1, *ids, 2] if add_special_tokens and self.special else ids
        return type("Encoded", (), {"input_ids": ids})()


def small(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(
            BertConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=40,
            )
        ).eval()
    if kind == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=64, n_positions=40, n_embd=16, n_layer=3, n_head=2)).eval()
    if kind == "t5":
        return T5Model(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=40,
        )
    ).eval()


LISTS = [["def", "f", "("], ["x"], ["alpha", "=", "12", "+", "b"], ["if", "yes"]]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("special", [True, False])
def test_states_are_means_of_the_models_own_at_each_layer(kind, special):
    model, tokenizer = small(kind), Letters(special)
    found = word_states(model, tokenizer, LISTS, batch_size=3)
    assert sorted(found) == [0, 1, 2, 3]
    body = model.get_encoder() if kind == "t5" else model
    for i, words in enumerate(LISTS):
        ids = tokenizer("".join(words)).input_ids
        with torch.no_grad():
            own = body(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in (0, 1, 2):  # the last one that the model tells is after its last norm
            at = int(special)
            for j, word in enumerate(words):
                assert torch.allclose(found[layer][i][j], own[layer][0, at : at + len(word)].mean(dim=0), atol=1e-5)
                at += len(word)


def test_layers_batches_and_pooling():
    model, tokenizer = small("llama"), Letters()
    every = word_states(model, tokenizer, LISTS)
    some = word_states(model, tokenizer, LISTS, [2, 0], batch_size=1)
    assert sorted(some) == [0, 2]
    for layer in some:
        for a, b in zip(some[layer], every[layer], strict=True):
            assert a.dtype == torch.float32
            assert torch.allclose(a, b, atol=1e-5)
    first = word_states(model, tokenizer, LISTS, [0], pooling="first")[0]
    last = word_states(model, tokenizer, LISTS, [0], pooling="last")[0]
    table = model.get_input_embeddings().weight
    assert torch.allclose(first[0][0], table[3 + ord("d") % 60])
    assert torch.allclose(last[0][0], table[3 + ord("f") % 60])
    assert subword_counts(tokenizer, LISTS) == [5, 1, 10, 5]


def test_the_model_runs_only_as_far_as_asked_and_keeps_its_mode():
    model, ran = small("llama").train(), []
    for k, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    word_states(model, Letters(), LISTS[:1], [1])
    assert ran == [0]
    assert model.training
    assert states.layer_count(model) == 3


def test_blocks_are_told_from_experts():
    model = small("llama")
    for block in model.model.layers:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    assert states.layer_count(model) == 3


def test_words_are_tokenised_alone():
    # fed as source text "ab" and "c" could share a sub-word; here each word's vectors depend on its own sub-words at layer 0
    one = word_states(small("llama"), Letters(), [["ab", "c"]], [0])[0][0]
    two = word_states(small("llama"), Letters(), [["ab"]], [0])[0][0]
    assert torch.equal(one[0], two[0])


def test_a_causal_model_has_not_seen_later_words():
    model = small("llama")
    one, two = word_states(model, Letters(), [["ab", "c", "d"], ["ab", "c", "zzz"]], [3])[3]
    assert torch.allclose(one[:2], two[:2], atol=1e-5)
    assert not torch.allclose(one[2], two[2], atol=1e-2)


def test_snippets_longer_than_the_context_are_left_out_and_counted():
    model = small("llama")
    with pytest.warns(UserWarning, match="1 of 2 snippets are longer than the model's context of 40"):
        found = word_states(model, Letters(), [["a"] * 50, ["b", "c"]], [0, 1])
    assert [tuple(v.shape) for v in found[1]] == [(0, 16), (2, 16)]
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(DataError, match="no snippet fits"):
        word_states(model, Letters(), [["a"] * 50])


def test_errors_of_states():
    model = small("llama")
    with pytest.raises(InputError, match=r"layers are 0 \(embeddings\) to 3"):
        word_states(model, Letters(), LISTS, [4])
    with pytest.raises(AlignmentError, match=r"snippet 1: word 1 \('\\x01'\) has no sub-word"):
        word_states(model, Letters(), [["a"], ["b", "\x01"]])
    with pytest.raises(AlignmentError, match="snippet 0 has no words"):
        word_states(model, Letters(), [[]])
    with pytest.raises(InputError, match="no snippets"):
        word_states(model, Letters(), [])
    with pytest.raises(InputError, match="batch_size"):
        word_states(model, Letters(), LISTS, batch_size=0)
    with pytest.raises(ModelError, match="no list of blocks"):
        word_states(nn.Linear(2, 2), Letters(), LISTS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ActivationError, match="layer 2 on snippet"):
        word_states(model, Letters(), LISTS)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_random_weights_keep_the_embeddings_unless_told(kind):
    model = small(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = random_weights_like(model, seed=1)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    true, random = word_states(model, Letters(), LISTS), word_states(made, Letters(), LISTS)
    assert all(torch.equal(a, b) for a, b in zip(true[0], random[0], strict=True))
    assert not torch.allclose(true[1][0], random[1][0], atol=1e-3)
    blocks = [w for n, w in made.named_parameters() if w.ndim > 1 and any(part.isdigit() for part in n.split("."))]
    assert 0.015 < torch.cat([w.flatten() for w in blocks[:3]]).std() < 0.025
    other = random_weights_like(model, keep_embeddings=False)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    again = random_weights_like(model, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


# ---- the probe


def planted(trees, known):
    """States from which everything can be read: heights, labels and unary labels of ``known`` trees, a coordinate each."""
    tuples = [tree_to_tuple(one) for one in known]
    c = {label: k for k, label in enumerate(sorted({label for t in tuples for label in t.c}))}
    u = {label: k for k, label in enumerate(sorted({label for t in tuples for label in t.u}))}
    made = []
    for one in trees:
        own = tree_to_tuple(one)
        h = torch.zeros(len(own.u), 1 + len(c) + len(u))
        steps = torch.zeros(len(own.d), 1 + len(c))
        steps[:, 0] = (4 * torch.tensor(own.d, dtype=torch.float32)).sqrt() * (-1.0) ** torch.arange(len(own.d))
        for i, label in enumerate(own.c):
            steps[i, 1 + c[label]] = 1
        h[1:, : 1 + len(c)] = steps.cumsum(dim=0)
        for i, label in enumerate(own.u):
            h[i, 1 + len(c) + u[label]] = 1
        made.append(h)
    return made


def random_trees(n, seed):
    rng = np.random.default_rng(seed)

    def grow(depth):
        if depth == 0 or rng.random() < 0.25:
            return "w" if rng.random() < 0.7 else (str(rng.choice(["p", "q"])), "w")
        return (str(rng.choice(["a", "b", "c"])), *(grow(depth - 1) for _ in range(int(rng.integers(2, 4)))))

    found = []
    while len(found) < n:
        nested = grow(3)
        if not isinstance(nested, str) and tree(nested).arities.count(0) >= 3:
            found.append(tree(nested))
    return found


@pytest.fixture(scope="module")
def exact():
    """Planted states of 80 training and 40 test trees, and a probe that was fitted on the first."""
    train, test = random_trees(80, 0), random_trees(40, 1)
    hidden, held = planted(train, train + test), planted(test, train + test)
    width = hidden[0].shape[1]
    probe = ASTProbe(rank=width, normalise=None, lr=1e-2, batch_size=32, min_steps=600, max_epochs=1)
    return hidden, train, held, test, probe.fit(hidden, train)


def test_planted_states_are_read_and_others_are_not(exact):
    hidden, train, held, test, probe = exact
    assert probe.score(hidden, train).f1 > 0.99
    assert probe.score(held, test).f1 > 0.95
    noise = [torch.randn(h.shape, generator=torch.Generator().manual_seed(0)) for h in held]
    assert probe.score(noise, test).f1 < 0.3
    assert probe.score(borrowed_states(held), test).f1 < 0.3
    assert probe.orthogonality_error_ < 0.05


def test_what_is_fitted(exact):
    hidden, _, held, test, probe = exact
    width = hidden[0].shape[1]
    assert probe.basis_.shape == (width, width)
    assert probe.labels_["c"][0] == probe.labels_["u"][0] == EMPTY
    assert probe.label_vectors_["c"].shape == (len(probe.labels_["c"]), width)
    assert probe.label_vectors_["u"].shape == (len(probe.labels_["u"]), width)
    assert [check.step for check in probe.history_][:2] == [50, 100]
    assert min(check.validation_loss for check in probe.history_) < probe.history_[0].validation_loss
    rates = [check.lr for check in probe.history_]
    assert all(b in (a, a / 2) for a, b in itertools.pairwise(rates))
    scores = probe.score_snippets(held, test)
    assert scores.mean == probe.score(held, test)
    predicted = probe.predict(held, [one.leaves for one in test])
    assert [one.leaves for one in predicted] == [one.leaves for one in test]
    assert score_trees(test, predicted).f1.tolist() == scores.f1.tolist()
    assert probe.unseen_labels(test) == {}
    assert probe.unseen_labels([tree(("new", "x", ("p", "y")))]) == {"new": 1}


def test_it_is_an_estimator_and_repeats(exact):
    hidden, train, _, _, probe = exact
    copy = clone(probe)
    assert copy.get_params() == probe.get_params()
    assert not hasattr(copy, "basis_")
    short = copy.set_params(min_steps=60, rank=4, random_state=7)
    one, two = (clone(short).fit(hidden, train) for _ in range(2))
    assert torch.equal(one.basis_, two.basis_)
    assert not torch.equal(one.basis_, clone(short).set_params(random_state=8).fit(hidden, train).basis_)


def test_the_loss_is_the_published_one(exact):
    hidden, train, _, _, probe = exact
    vectors, trees = hidden[:7], train[:7]
    corpus = probe._corpus(vectors, trees)
    weights = [probe.basis_ * 0.7, probe.label_vectors_["c"], probe.label_vectors_["u"]]
    order = torch.tensor([4, 0, 2, 6])
    found = probe._loss(corpus, order, weights, None)
    hinge, c_terms, u_terms = [], [], []
    for i in order.tolist():
        s, own = vectors[i] @ weights[0].T, tree_to_tuple(trees[i])
        d_hat = [float((a - b).square().sum()) for a, b in itertools.pairwise(s)]
        for x, dx in zip(own.d, d_hat, strict=True):
            hinge += [max(0.0, 1 - (dx - dy)) for y, dy in zip(own.d, d_hat, strict=True) if x > y]
        for k, label in enumerate(own.c):
            c_terms.append(-((s[k + 1] - s[k]) @ weights[1].T).log_softmax(0)[probe.labels_["c"].index(label)])
        for k, label in enumerate(own.u):
            u_terms.append(-(s[k] @ weights[2].T).log_softmax(0)[probe.labels_["u"].index(label)])
    gram = weights[0] @ weights[0].T - torch.eye(len(weights[0]))
    expected = np.mean(hinge) + np.mean(c_terms) + np.mean(u_terms) + 5 * float(gram.square().sum())
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_rank_loss_on_few_pairs_is_near_that_on_all(exact):
    hidden, train, _, _, probe = exact
    corpus = probe._corpus(hidden, train)
    words = corpus.words
    inside = torch.arange(corpus.d.shape[1]) < (words - 1)[:, None]
    d_hat = torch.rand(corpus.d.shape, generator=torch.Generator().manual_seed(0)) * 3
    generator = torch.Generator().manual_seed(1)
    few = clone(probe).set_params(max_pairs=800)
    d = corpus.d[:1].repeat(400, 1), d_hat[:1].repeat(400, 1), inside[:1].repeat(400, 1)
    whole = float(probe._rank_loss(*d, generator))
    assert float(few._rank_loss(*d, generator)) == pytest.approx(whole, rel=0.1)
    few.set_params(min_steps=30, max_epochs=1).fit(hidden, train)
    assert np.isfinite(few.history_[-1].training_loss)


def test_normalising_scales_each_vector(exact):
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 4, 50)[:, None]
    probe = ASTProbe()
    probe._learn_scale([rows])
    assert torch.allclose(probe._scaled(rows).norm(dim=1), torch.full((50,), 0.25 * 4), atol=1e-5)
    for size in (1e-30, 1e30):
        assert torch.allclose(probe._scaled(rows / 1e4 * size), probe._scaled(rows), atol=1e-5)
    assert torch.equal(probe._scaled(torch.zeros(1, 576)), torch.zeros(1, 576))
    z = ASTProbe(normalise="zscore", scale=2.0)
    z._learn_scale([rows])
    assert torch.allclose(z._scaled(rows).std(dim=0, correction=0), torch.full((16,), 2.0), atol=1e-4)
    assert torch.equal(ASTProbe(normalise=None)._scaled(rows), rows)


def test_without_scaling_large_states_break_orthogonality(exact):
    hidden, train, *_ = exact
    large = [200 * h for h in hidden]
    options = {"rank": 6, "min_steps": 400, "max_epochs": 1, "lr": 3e-3}
    kept = ASTProbe(**options).fit(large, train).orthogonality_error_
    lost = ASTProbe(**options, normalise=None).fit(large, train).orthogonality_error_
    assert kept < 0.1 < lost


def test_without_the_penalty_the_basis_is_not_orthonormal(exact):
    hidden, train, *_ = exact
    options = {"rank": 6, "min_steps": 400, "max_epochs": 1, "lr": 1e-2}
    assert ASTProbe(**options).fit(hidden, train).orthogonality_error_ < 0.1
    assert ASTProbe(**options, orthogonality=0.0).fit(hidden, train).orthogonality_error_ > 0.2


def test_many_snippets_are_counted_in_epochs(exact):
    hidden, train, *_ = exact
    probe = ASTProbe(rank=4, batch_size=8, max_epochs=4, min_steps=5, patience=1, lr=1e-3).fit(hidden, train)
    assert [check.step for check in probe.history_] == [9, 18, 27, 36][: len(probe.history_)]


def test_given_validation_is_used_alone_for_the_checkpoint(exact):
    hidden, train, held, test, _ = exact
    probe = ASTProbe(rank=5, min_steps=100, max_epochs=1).fit(hidden, train, (held, test))
    check = probe._corpus([h.float() for h in held], list(test))
    weights = [probe.basis_, probe.label_vectors_["c"], probe.label_vectors_["u"]]
    assert float(probe._whole_loss(check, weights)) == pytest.approx(
        min(c.validation_loss for c in probe.history_), rel=1e-5
    )


def test_validation_trees_with_none_of_the_known_labels(exact):
    hidden, train, *_ = exact
    others = [
        SyntaxTree(tuple("new" if k else x for x, k in zip(t.labels, t.arities, strict=True)), t.arities) for t in train
    ]
    probe = ASTProbe(rank=2, min_steps=5, max_epochs=1).fit(hidden, train, (hidden[:1], others[:1]))
    assert np.isfinite(probe.history_[-1].validation_loss)


def test_transfer_keeps_the_subspace(exact):
    hidden, train, held, test, probe = exact
    renamed = [
        SyntaxTree(tuple(f"other_{x}" if k else x for x, k in zip(t.labels, t.arities, strict=True)), t.arities)
        for t in train
    ]
    moved = probe.transfer(hidden, renamed)
    assert torch.equal(moved.basis_, probe.basis_)
    assert moved.score(hidden, renamed).f1 > 0.95
    assert set(moved.labels_["c"]) == {EMPTY, *(f"other_{x}" for x in probe.labels_["c"] if x != EMPTY)}
    assert probe.score(held, test).f1 > 0.95
    with pytest.raises(InputError, match="subspace lies in"):
        probe.transfer([torch.cat([h, h[:, :1]], dim=1) for h in hidden], renamed)


@pytest.mark.parametrize("normalise", [None, "rms", "zscore"])
def test_the_subspace_is_a_dictionary(exact, normalise):
    hidden, train, *_ = exact
    probe = ASTProbe(rank=5, min_steps=150, max_epochs=1, normalise=normalise).fit(hidden, train)
    assert isinstance(probe, Dictionary)
    V = probe.directions
    assert torch.allclose(V @ V.T, torch.eye(5), atol=1e-4)
    read = probe.basis_ / probe._deviation if normalise == "zscore" else probe.basis_
    assert torch.allclose(subspace_similarity(V, read), torch.ones(5), atol=1e-4)
    rows = torch.cat(hidden)
    codes = probe.encode(rows)
    assert torch.allclose(probe.encode(probe.decode(codes)), codes, atol=1e-3)
    assert 0 < explained_variance(probe, rows) < 1


def test_snippets_without_vectors_are_left_out(exact):
    hidden, train, held, test, probe = exact
    gone = [torch.empty(0, hidden[0].shape[1]), *held[1:]]
    assert probe.score(gone, test) == probe.score(held[1:], test[1:])
    ASTProbe(rank=2, min_steps=5, max_epochs=1).fit([*hidden, gone[0]], [*train, test[0]])
    with pytest.raises(DataError, match="no snippet has vectors"):
        probe.score(gone[:1], test[:1])


def test_snippets_of_one_word(exact):
    trees = [tree(("p", "x")), tree("x")] * 4
    hidden = [torch.randn(1, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    probe = ASTProbe(rank=2, min_steps=5, max_epochs=1).fit(hidden, trees)
    assert len(probe.predict(hidden, [t.leaves for t in trees])) == 8


def test_errors_of_the_probe(exact):
    hidden, train, held, test, probe = exact
    width = hidden[0].shape[1]
    with pytest.raises(InputError, match=f"rank {width + 1} is more than the {width} dimensions"):
        ASTProbe(rank=width + 1).fit(hidden, train)
    with pytest.raises(AlignmentError, match=r"snippet 1 .* words but .* vectors: the first without one is word \d+"):
        ASTProbe(rank=2).fit([hidden[0], hidden[1][:-1]], train[:2])
    with pytest.raises(AlignmentError, match="the first too many is"):
        probe.score([torch.cat([held[0], held[0][:1]])], test[:1])
    with pytest.raises(AlignmentError, match="0 vectors"):
        probe.predict([held[0][:0]], [test[0].leaves])
    broken = [hidden[0].clone(), hidden[1]]
    broken[0][2, 0] = float("nan")
    with pytest.raises(DataError, match=r"word 2 .* of snippet 0 is not finite"):
        ASTProbe(rank=2).fit(broken, train[:2])
    with pytest.raises(InputError, match="vectors of shape"):
        ASTProbe(rank=2).fit([hidden[0], hidden[1][:, :3]], train[:2])
    with pytest.raises(InputError, match="of 2 snippets and 1 trees"):
        probe.score(held[:2], test[:1])
    with pytest.raises(InputError, match="of 2 snippets and words of 1"):
        probe.predict(held[:2], [test[0].leaves])
    with pytest.raises(DataError, match="at least two snippets"):
        ASTProbe(rank=2).fit(hidden[:1], train[:1])
    with pytest.raises(InputError, match="those of the validation"):
        ASTProbe(rank=2).fit(hidden, train, ([h[:, :3] for h in held], test))
    for wrong in (
        {"rank": 0},
        {"lr": 0.0},
        {"batch_size": 0},
        {"max_pairs": 0},
        {"scale": -1.0},
        {"orthogonality": -1.0},
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} of the probe must be positive"):
            ASTProbe(**wrong).fit(hidden, train)
    with pytest.raises(InputError, match="normalise"):
        ASTProbe().set_params(normalise="both").fit(hidden, train)
    with pytest.raises(TrainingCollapsedError, match="lower lr"):
        ASTProbe(rank=4, normalise=None, min_steps=60, max_epochs=1).fit([1e30 * h for h in hidden], train)


# ---- studies


def test_sweeps(exact):
    hidden, train, held, test, probe = exact
    width = hidden[0].shape[1]
    short = clone(probe).set_params(min_steps=150, rank=width)
    noise = [torch.randn(h.shape, generator=torch.Generator().manual_seed(i)) for i, h in enumerate(hidden + held)]
    by_layer = layer_sweep(
        {0: noise[: len(hidden)], 3: hidden}, train, {0: noise[len(hidden) :], 3: held}, test, probe=short,
        validation={0: noise[len(hidden) :], 3: held}, validation_trees=test,
    )  # fmt: skip
    assert by_layer.columns.tolist() == ["layer", "precision", "recall", "f1"]
    assert by_layer["layer"].tolist() == [0, 3]
    assert by_layer["f1"][1] > by_layer["f1"][0] + 0.3
    by_rank = rank_sweep(hidden, train, held, test, [1, width], probe=short)
    assert by_rank["rank"].tolist() == [1, width]
    assert by_rank["f1"][1] > by_rank["f1"][0]
    assert (by_rank["orthogonality_error"] < 0.2).all()
    curve = rank_curve(hidden, train, held, test, [1, width], probe=short)
    assert curve.mean[1] == pytest.approx(by_rank["f1"][1], abs=0.02)
    assert curve.reference == pytest.approx(by_rank["f1"].max())
    assert curve.smallest().dimension == width
    assert short.rank == width
    with pytest.raises(InputError, match="layer 3 has states to train on"):
        layer_sweep({0: hidden, 3: hidden}, train, {0: held}, test, probe=short)
    with pytest.raises(InputError, match="ranks must increase"):
        rank_sweep(hidden, train, held, test, [4, 2])


def test_similarity_of_subspaces():
    one, two = (
        torch.linalg.qr(torch.randn(9, k, generator=torch.Generator().manual_seed(k)).double()).Q.T for k in (3, 5)
    )
    found = subspace_similarity(one, two)
    assert found.shape == (3,)
    assert torch.allclose(found, torch.linalg.svdvals(one @ two.T))
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double() @ one
    assert torch.allclose(subspace_similarity(mixed, one), torch.ones(3, dtype=torch.float64))
    with pytest.raises(InputError, match="different spaces"):
        subspace_similarity(one, two[:, :4])
    with pytest.raises(InputError, match="dependent rows"):
        subspace_similarity(torch.ones(2, 4), torch.eye(4))


def test_borrowed_states_are_anothers():
    hidden = [torch.full((n, 2), float(n)) for n in (2, 5, 3, 9)]
    made = borrowed_states(hidden, seed=3)
    assert [len(m) for m in made] == [2, 5, 3, 9]
    lenders = [float(m[0, 0]) for m in made]
    assert sorted(lenders) == [2, 3, 5, 9]
    assert all(lender != len(own) for lender, own in zip(lenders, hidden, strict=True))
    with pytest.raises(InputError, match="two snippets"):
        borrowed_states(hidden[:1])


# ---- the chart and the command


def language_model(tokenizer):
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return Rows(torch.randint(3, 60, (n, 12), generator=generator), torch.arange(n) % 5)

    data = Dataset("tokens", "text", "language", rows(20), rows(20), rows(20))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=600,
        )
    ).eval()  # fmt: skip
    return Subject("small", data, model, tokenizer=tokenizer)


def test_the_chart_tells_of_a_small_model_and_repeats(monkeypatch):
    monkeypatch.setattr(chart_module, "_STEPS", 20)
    monkeypatch.setattr(chart_module, "_SNIPPETS", (40, 40))
    torch.manual_seed(0)
    subject, chart = language_model(Letters()), load_charts()["ast-probe"]
    assert chart.needs.refusal(subject) is None
    assert chart.cost(subject) > 0
    finding = chart.draw(subject, Budget(seconds=30))
    assert "of 3 holds the syntax tree" in finding.headline
    assert {control.kind for control in finding.comparison.controls} == {"random", "null", "closed-form"}
    assert all(0 <= one.value <= 1 for name, one in finding.numbers.items() if name.startswith(("F1", "recall")))
    # a model that learned nothing holds no more than its embeddings, and the advice says so
    assert finding.beaten
    again = chart.draw(subject, Budget(seconds=30))
    assert dict(again.numbers) == dict(finding.numbers)
    assert again.figure.to_json() == finding.figure.to_json()


def test_the_chart_says_what_is_missing():
    needs = load_charts()["ast-probe"].needs
    assert "tokenizer" in needs.refusal(language_model(None))
    assert "looked into" in needs.refusal(language_model(object()))


def test_the_drawn_tree_marks_what_was_found():
    figure = go.Figure().set_subplots(2, 2)
    true, wrong = tree(("a", "x", ("b", "y", ("c", "z")))), tree(("a", "x", ("d", "y", ("c", "z"))))
    chart_module._draw_tree(figure, true, wrong)
    by_name = {trace.name: list(trace.text) for trace in figure.data if trace.text is not None}
    assert by_name == {"word": ["x", "y", "z"], "found": ["a", "c"], "missed": ["b"]}


@pytest.fixture
def sources(tmp_path):
    for k in range(12):
        body = "".join(f"def f{i}(a, b={k}):\n    return g(a) + [{i}]\n\n\n" for i in range(3))
        (tmp_path / f"m{k}.py").write_text(body)
    return tmp_path


def test_the_command_measures_layers_and_predicts_a_tree(sources, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("theodolite.language.pretrained.load_encoder", lambda name: (small("bert"), Letters()))
    given = ["--sources", str(sources), "--model", "any", "--rank", "4", "--steps", "20", "--json"]
    found = CliRunner().invoke(run_app, ["ast-probe", *given, "--snippet", str(sources / "m0.py"), "--layers", "0,2"])
    assert found.exit_code != 0  # this file is longer than the small model's context
    (sources / "one.py").write_text("x = 1")
    found = CliRunner().invoke(run_app, ["ast-probe", *given, "--snippet", str(sources / "one.py")])
    assert found.exit_code == 0, found.output
    result = json.loads(found.output)
    assert list(result["layers"]) == ["0", "1", "2", "3"]
    assert "'x'" in result["tree"]
    assert "random_weights_layer_1" in result


def test_the_command_says_what_is_wrong(sources):
    for options, message in (
        (["--sources", str(sources / "nowhere")], "there is no file or folder"),
        (["--snippet", str(sources)], "--snippet needs a probe"),
        (["--sources", str(sources), "--layers", "one"], "whole numbers"),
    ):
        found = CliRunner().invoke(run_app, ["ast-probe", *options])
        assert found.exit_code != 0
        assert message in str(found.exception)
