"""Evaluation of dictionaries: least squares, brute force and scikit-learn as oracles; a tiny decoder run whole; every error."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import nn

from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.activations.dictionary_evaluation import (
    Location,
    PatchedRuns,
    SupervisedDictionary,
    Task,
    aware_edit,
    evaluate_dictionary,
    feature_f1,
    feature_weights,
    greedy_edit,
    head_location,
    ioi_task,
    locate,
    occlusion_curve,
    recovered_share,
    splitting_curve,
    tabular_task,
    weakened,
    writing_heads,
)
from theodolite.core.capture import CaptureError
from theodolite.core.dictionary import Dictionary, LinearDictionary, explained_variance, measure
from theodolite.core.errors import DataError, InputError

# ---- supervised codes


def factorial():
    return pd.DataFrame(list(itertools.product("xyz", range(2), range(4))), columns=["a", "b", "c"])


def test_mean_and_mse_codes_agree_where_attributes_are_balanced():
    table, rng = factorial(), np.random.default_rng(0)
    acts = rng.normal(size=(len(table), 7))
    mean, mse = (SupervisedDictionary(kind).fit(acts, table) for kind in ("mean", "mse"))
    for name in table.columns:
        assert torch.allclose(mean.codes_[name], mse.codes_[name], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 40))
def test_mse_codes_are_least_squares_of_least_norm_and_never_fit_worse(seed, n):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"a": np.r_[0, 1, rng.integers(0, 3, n - 2)], "b": np.r_[0, 1, rng.integers(0, 4, n - 2)]})
    acts = rng.normal(size=(n, 5))
    one_hot = np.concatenate([pd.get_dummies(table[name]).to_numpy(float) for name in table], axis=1)
    wanted = np.linalg.lstsq(one_hot, acts - acts.mean(axis=0), rcond=None)[0]
    mse, mean = (SupervisedDictionary(kind).fit(acts, table) for kind in ("mse", "mean"))
    assert np.allclose(torch.cat(list(mse.codes_.values())), wanted, atol=1e-8)
    errors = [float((torch.as_tensor(acts) - made.reconstruct(table)).square().sum()) for made in (mse, mean)]
    assert errors[0] <= errors[1] + 1e-9
    assert np.allclose(mse.weights(table).sum(axis=1), 1)


def test_a_supervised_edit_moves_one_attribute():
    table = factorial()
    codes = {name: torch.randn(table[name].nunique(), 6, dtype=torch.float64) for name in table}
    places = {name: table[name].astype("category").cat.codes.to_numpy().copy() for name in table}
    acts = sum(codes[name][places[name]] for name in table)
    made = SupervisedDictionary().fit(acts, table)
    new = ["y" if value == "x" else "x" for value in table["a"]]
    wanted = acts - codes["a"][places["a"]] + codes["a"][[1 if value == "y" else 0 for value in new]]
    assert torch.allclose(made.edit(acts, "a", table["a"].tolist(), new), wanted)
    assert torch.allclose(made.reconstruct(table), acts)
    every = made.edit(acts, "a", table["a"], "y")
    assert torch.equal(every, made.edit(acts, "a", table["a"], ["y"] * len(acts)))
    joined = SupervisedDictionary(products=(("a", "b"),)).fit(acts, table)
    pairs = list(zip(table["a"], table["b"], strict=True))
    wanted = joined.edit(acts, ("a", "b"), pairs, [("y", 0)] * len(acts))
    assert torch.equal(joined.edit(acts, ("a", "b"), pairs, ("y", 0)), wanted)
    with pytest.raises(InputError, match=f"{len(acts)} rows need as many values of 'a' or one for all, got 2"):
        made.edit(acts, "a", table["a"], ["y", "y"])


def test_products_are_attributes_of_their_own():
    table = factorial()
    acts = torch.randn(len(table), 6)
    made = SupervisedDictionary("mse", products=(("a", "b"),)).fit(acts, table)
    assert set(made.codes_) == {"c", ("a", "b")}
    assert made.codes_["a", "b"].shape == (6, 6)
    assert made.values_["a", "b"][0] == ("x", 0)
    assert np.allclose(made.weights(table).sum(axis=1), 1)


def test_a_supervised_dictionary_stands_in_one_table_with_the_others():
    table = factorial()
    rows = pd.concat([table] * 5, ignore_index=True)
    codes = [3 * torch.randn(table[name].nunique(), 12) for name in table]
    acts = sum(
        code[rows[name].astype("category").cat.codes.to_numpy().copy()] for code, name in zip(codes, table, strict=True)
    )
    acts = acts + 0.05 * torch.randn(acts.shape)
    made = SupervisedDictionary().fit(acts, rows)
    assert isinstance(made, Dictionary)
    found = {
        one.name: one
        for one in measure({"supervised": made, "pca": LinearDictionary.principal_components(acts, 3)}, acts)
    }
    assert found["supervised"].active == 3
    assert found["supervised"].explained > 0.99
    assert explained_variance(made, acts) == found["supervised"].explained


def test_what_supervised_codes_cannot_be_made_of():
    acts = torch.randn(4, 3)
    with pytest.raises(DataError, match="'a' has a single value, 1"):
        SupervisedDictionary().fit(acts, {"a": [1, 1, 1, 1]})
    with pytest.raises(DataError, match="'a' has missing values"):
        SupervisedDictionary().fit(acts, {"a": ["p", None, "q", "q"]})
    with pytest.raises(NotFittedError):
        SupervisedDictionary().reconstruct({"a": ["p"]})
    with pytest.raises(InputError, match="4 activations but 3"):
        SupervisedDictionary().fit(acts, {"a": [1, 1, 2]})
    with pytest.raises(InputError, match="kind"):
        SupervisedDictionary("median").fit(acts, {"a": [1, 1, 2, 2]})
    with pytest.raises(InputError, match="no attribute 'z'"):
        SupervisedDictionary(products=(("a", "z"),)).fit(acts, {"a": [1, 1, 2, 2]})
    made = SupervisedDictionary().fit(acts, {"a": ["p", "p", "q", "q"]})
    with pytest.raises(InputError, match="never had the value 'r'"):
        made.edit(acts, "a", ["p"] * 4, ["q", "q", "q", "r"])
    with pytest.raises(InputError, match="no attribute 'b'"):
        made.edit(acts, "b", ["p"] * 4, ["q"] * 4)
    with pytest.raises(InputError, match="width 3"):
        made.encode(torch.randn(2, 5))


# ---- features


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(3, 40), st.integers(1, 6))
def test_f1_is_that_of_scikit_learn(seed, n, features):
    rng = np.random.default_rng(seed)
    active = rng.random((n, features)) < rng.random()
    table = pd.DataFrame({"a": rng.integers(0, 4, n), "b": rng.random(n) < 0.3})
    scores = feature_f1(active, table)
    for (name, value), column in scores.f1.items():
        truth = (table[name] == value).to_numpy()
        for j in range(features):
            assert column.iloc[j] == pytest.approx(f1_score(truth, active[:, j], zero_division=0))
            assert scores.precision[name, value].iloc[j] == pytest.approx(
                precision_score(truth, active[:, j], zero_division=0)
            )
            assert scores.recall[name, value].iloc[j] == pytest.approx(
                recall_score(truth, active[:, j], zero_division=0)
            )
    assert not scores.f1.isna().any().any()


def test_a_feature_of_a_group_is_found():
    table = pd.DataFrame({"name": ["Ann", "Eve", "Bob", "Tom"] * 5})
    active = table["name"].isin(["Ann", "Eve"]).to_numpy()[:, None]
    scores = feature_f1(np.concatenate([active, np.zeros_like(active)], axis=1), table)
    assert scores.best["f1"].iloc[0] == pytest.approx(2 / 3)
    group = scores.groups[scores.groups["feature"] == 0].iloc[0]
    assert set(group["values"]) == {"Ann", "Eve"}
    assert group["f1"] == 1
    assert scores.interpretable().tolist() == [True, False]
    assert feature_f1(active, table, max_group=1).groups["f1"].iloc[0] == pytest.approx(2 / 3)


def test_patterns_are_of_bool_and_not_of_codes():
    with pytest.raises(InputError, match="of bool"):
        feature_f1(torch.rand(4, 2), {"a": [0, 0, 1, 1]})
    with pytest.raises(DataError, match="'a' has missing values"):
        feature_f1(torch.rand(4, 2) > 0, {"a": [0, np.nan, 1, 1]})
    with pytest.raises(InputError, match="at least one attribute"):
        feature_f1(torch.rand(4, 2) > 0, pd.DataFrame(index=range(4)))
    with pytest.raises(InputError, match="4 rows of features, 3"):
        feature_f1(torch.rand(4, 2) > 0, {"a": [0, 0, 1]})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_weights_sum_to_one(seed):
    rng = torch.Generator().manual_seed(seed)
    f, decoder = torch.randn(20, 9, generator=rng).relu(), torch.randn(9, 5, generator=rng)
    f[0] = 0
    for size in (1, 1e-20, 1e25):
        total = feature_weights(size * f, decoder, torch.randn(5, generator=rng)).sum(dim=1)
        assert torch.allclose(total, (f > 0).any(dim=1).float(), atol=1e-4)  # a row with no feature on has no weights
    with pytest.raises(InputError, match="do not go together"):
        feature_weights(f, decoder[:4])


# ---- edits


def drawn_edit(seed, n=1):
    rng = torch.Generator().manual_seed(seed)
    decoder = nn.functional.normalize(torch.randn(12, 8, generator=rng), dim=1)
    clean, other = (torch.randn(n, 12, generator=rng).relu() for _ in range(2))
    return decoder, clean, other, torch.randn(n, 8, generator=rng)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_edits_come_near_the_best_subset(k):
    ratios = []
    for seed in range(200 if k == 1 else 70):
        decoder, clean, other, wanted = drawn_edit(seed)
        ours = float((wanted - greedy_edit(clean, other, decoder, wanted, k).change).norm())
        step = (other - clean)[0, :, None] * decoder
        subsets = [list(s) for size in range(k + 1) for s in itertools.combinations(range(12), size)]
        best = min(float((wanted[0] - step[s].sum(dim=0)).norm()) for s in subsets)
        ratios.append(ours / best)
        assert ours <= float(wanted.norm()) + 1e-5
    assert max(ratios) <= (1.0001 if k == 1 else 1.3)


def test_features_that_help_only_together_are_found():
    # moving one of the two overshoots, moving both is exact; the third helps a little by itself
    decoder = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1, 0.0], [-1.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    clean, other = torch.zeros(1, 3), torch.tensor([[4.0, 4.0, 0.05]])
    wanted = other[:, :2] @ decoder[:2]
    edit = greedy_edit(clean, other, decoder, wanted, 2)
    assert edit.removed.tolist() == [[True, True, False]]
    assert torch.allclose(edit.change, wanted, atol=1e-6)


def test_edits_of_many_rows_are_those_of_each_and_do_not_depend_on_memory():
    decoder, clean, other, wanted = drawn_edit(1, n=9)
    whole = greedy_edit(clean, other, decoder, wanted, 3)
    assert int(whole.removed.sum(dim=1).max()) <= 3
    assert torch.equal(whole.removed, greedy_edit(clean, other, decoder, wanted, 3, memory=1).removed)
    alone = greedy_edit(clean[4:5], other[4:5], decoder, wanted[4:5], 3)
    assert torch.allclose(alone.change, whole.change[4:5], atol=1e-6)


def test_aware_edits_exchange_the_best_active_features():
    decoder = torch.eye(4)
    clean, other = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    old, new = torch.tensor([[0.9, 0.1, 1.0, 0.0]]), torch.tensor([[0.0, 0.2, 0.8, 1.0]])
    edit = aware_edit(clean, other, decoder, old, new, 1)
    assert edit.change.tolist() == [[-2.0, 0.0, 3.0, 0.0]]
    assert edit.removed.tolist() == [[True, False, False, False]]
    wide = aware_edit(clean, other, decoder, old, new, 10)  # no more than are on
    assert wide.change.tolist() == [[-2.0, 0.0, 3.0, 0.0]]
    assert int(wide.removed.sum()) == 2
    with pytest.raises(InputError, match="at least one feature"):
        aware_edit(clean, other, decoder, old, new, 0)
    with pytest.raises(InputError, match="do not go together"):
        aware_edit(clean, other[:, :3], decoder, old, new, 1)


# ---- tasks and runs on a network


def table_setting(n=240, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"class": rng.integers(0, 3, n), "side": rng.integers(0, 2, n)})
    torch.manual_seed(seed)
    x = 0.3 * torch.randn(n, 6)
    x[torch.arange(n), torch.tensor(table["class"].tolist())] += 2
    x[:, 4] += 2.0 * torch.tensor(table["side"].tolist())
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(x), torch.tensor(table["class"].tolist()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, tabular_task(x, table)


def identity(width):
    sae = SparseAutoencoder(width, 2 * width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(width), -torch.eye(width)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def test_the_identity_keeps_everything_and_leaves_nothing():
    network, task = table_setting()
    report = evaluate_dictionary(network, task, Location("1"), identity(10), k_edit=(1, 20))
    row = report.approximation.set_index("method").loc["dictionary"]
    assert row["recovered"] == pytest.approx(1, abs=1e-4)
    assert row["necessity"] == pytest.approx(1, abs=1e-4)
    control = report.control[report.control["attribute"] == "class"].set_index(["method", "k"])
    assert control.loc[("full patch", 0), "agreement"] == 1
    assert control.loc[("no edit", 0), "effect"] == 0
    assert control.loc[("agnostic", 20), "agreement"] == 1  # all features moved is the patch
    assert control.loc[("supervised", 0), "agreement"] >= 0.9
    assert control.loc[("supervised", 0), "effect"] > control.loc[("supervised, random codes", 0), "effect"] + 0.5
    shuffled = report.approximation.set_index("method").loc["shuffled attributes", "recovered"]
    assert shuffled < 0.3
    assert "recovers 100 % of the outcome" in report.summary()
    assert len(report.plot().data) > 3


def test_edits_keep_the_error_of_the_reconstruction():
    network, task = table_setting()
    blind = SparseAutoencoder(10, 4, "topk", k=1)
    with torch.no_grad():
        blind.b_enc.fill_(-1e6)  # nothing is ever on: an edit changes nothing, though the reconstruction is a constant
    report = evaluate_dictionary(network, task, Location("1"), blind, attributes=["class"], k_edit=(1,))
    control = report.control.set_index("method")
    assert control.loc["aware", "effect"] == pytest.approx(0, abs=1e-6)
    assert control.loc["agnostic", "agreement"] == control.loc["no edit", "agreement"]
    assert report.interpretability["dead"].tolist() == [4, 4]


def test_effect_leads_where_no_edit_already_agrees():
    network, task = table_setting()
    report = evaluate_dictionary(network, task, Location("1"), identity(10), k_edit=(1,))
    leads = report.control.groupby("attribute")["leads"].first()
    assert leads["class"] == "agreement"
    assert leads["side"] == "effect"


def test_the_same_seed_gives_the_same_report():
    network, task = table_setting()
    one, two = (evaluate_dictionary(network, task, Location("1"), identity(10), k_edit=(1,), seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one.control, two.control)
    pd.testing.assert_frame_equal(one.approximation, two.approximation)


def test_means_and_codes_come_from_the_prompts_that_were_fitted():
    network, task = table_setting()
    fit, held = task.split(0.5)
    far = Task(held.prompts + 100, held.attributes, held.counterfactual, held.outcome)
    states = PatchedRuns(network, fit, [Location("0")]).states[Location("0")]
    moved = PatchedRuns(network, far, [Location("0")]).states[Location("0")]
    made = SupervisedDictionary().fit(states, fit.attributes)
    assert torch.allclose(made.mean_.float(), states.mean(dim=0), atol=1e-5)
    assert float((made.mean_ - moved.mean(dim=0)).norm()) > 10


def test_splits_are_disjoint_and_keep_groups_whole():
    _, task = table_setting()
    one, two = task.split(0.6, by=("class", "side"))
    pairs = [set(map(tuple, part.attributes.to_numpy().tolist())) for part in (one, two)]
    assert not pairs[0] & pairs[1]
    assert len(one) + len(two) == len(task)


def test_the_partner_of_a_row_differs_in_one_attribute_where_it_can():
    _, task = table_setting()
    prompts, other = task.counterfactual("class", 1)
    assert (other["class"] != task.attributes["class"]).all()
    assert (other["side"] == task.attributes["side"]).all()
    assert prompts.shape == task.prompts.shape
    with pytest.raises(InputError, match="no attribute 'colour'"):
        task.counterfactual("colour", 0)


def test_what_cannot_be_evaluated():
    network, task = table_setting()
    with pytest.raises(InputError, match="width 9, the activations there 10"):
        evaluate_dictionary(network, task, Location("1"), SparseAutoencoder(9, 4))
    with pytest.raises(InputError, match="2 locations need as many"):
        evaluate_dictionary(network, task, [Location("0"), Location("1")], [identity(10)])
    with pytest.raises(InputError, match="no attribute 'hue'"):
        evaluate_dictionary(network, task, Location("1"), identity(10), attributes=["hue"])
    with pytest.raises(InputError, match="at least one feature"):
        evaluate_dictionary(network, task, Location("1"), identity(10), k_edit=(0,))
    with pytest.raises(CaptureError, match="no module called 'head'"):
        evaluate_dictionary(network, task, Location("head"), identity(10))
    with pytest.raises(CaptureError, match="have no tokens"):
        evaluate_dictionary(network, task, Location("1", -1), identity(10))
    with pytest.raises(CaptureError, match="columns"):
        evaluate_dictionary(network, task, Location("1", None, (4, 40)), identity(10))
    idle = Task(task.prompts, task.attributes, task.counterfactual, lambda out, rows: torch.ones(len(out)))
    with pytest.raises(InputError, match="does not matter for this outcome"):
        evaluate_dictionary(network, idle, Location("1"), identity(10))
    with pytest.raises(DataError, match="single value"):
        tabular_task(torch.randn(4, 2), {"a": [0, 0, 1, 1], "b": [1, 1, 1, 1]})
    with pytest.raises(DataError, match="missing values"):
        tabular_task(torch.randn(4, 2), {"a": [0, None, 1, 1]})
    with pytest.raises(DataError, match="4 prompts but 2"):
        tabular_task(torch.randn(4, 2), {"a": [0, 1]}, target=[0, 1])


def test_a_value_without_a_code_is_named():
    network, task = table_setting()
    few = task.subset(np.flatnonzero(task.attributes["class"] < 2))
    with pytest.raises(InputError, match="never had the value 2"):
        evaluate_dictionary(network, task, Location("1"), identity(10), fit=few, k_edit=(1,))


def test_no_share_is_told_where_nothing_changes():
    with pytest.raises(InputError, match="does not matter"):
        recovered_share(np.ones(5), np.ones(5), np.ones(5) + 1e-5)
    assert recovered_share(np.full(5, 1.2), np.ones(5), np.zeros(5)).value == pytest.approx(1.2)


# ---- a decoder


NAMES = ["Ann", "Bob", "Eve", "Tom", "Joe", "Kim"]
TEMPLATES = ["then [A] and [B] met . [S] called", "then [A] and [B] left . [S] saw"]


def tokenizer():
    import tokenizers

    others = ["then", "and", "met", "left", ".", "called", "saw", "to"]
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *NAMES, *others])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def decoder(family="llama"):
    torch.manual_seed(0)
    size = {"vocab_size": 20, "max_position_embeddings": 32}
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.4, **size,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=32, n_embd=16, n_layer=3, n_head=4, initializer_range=0.4
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.4, **size
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def task_of(n=60, **options):
    return ioi_task(tokenizer(), NAMES, n, TEMPLATES, **options)


def test_prompts_have_the_attributes_they_say():
    task, words = task_of(), tokenizer()
    for ids, row in zip(task.prompts.tolist(), task.attributes.to_dict("records"), strict=True):
        text = words.decode(ids).split()
        assert text.count(row["S"]) == 2
        assert text.count(row["IO"]) == 1
        assert (text[1] == row["IO"]) == (row["Pos"] == "IO first")
    for attribute in ("IO", "S", "Pos"):
        prompts, other = task.counterfactual(attribute, 0)
        assert (other[attribute] != task.attributes[attribute]).all()
        rest = [name for name in task.attributes if name != attribute]
        assert (other[rest] == task.attributes[rest]).all().all()
        assert (other["IO"] != other["S"]).all()
        assert prompts.shape == task.prompts.shape
    logits = torch.randn(60, 20)
    io, s = (torch.tensor([words.convert_tokens_to_ids(name) for name in task.attributes[who]]) for who in ("IO", "S"))
    rows = torch.arange(60)
    assert torch.equal(task.outcome(logits, rows), logits[rows, io] - logits[rows, s])
    assert (task.prompts[rows, task.positions["S2"]] == s).all()
    assert (task.prompts[rows, task.positions["IO"]] == io).all()
    kept = list(range(40, 10, -1))
    part = task.subset(kept)
    assert torch.equal(part.outcome(logits[kept], torch.arange(30)), task.outcome(logits, rows)[kept])


def test_prompts_that_do_not_go_together():
    with pytest.raises(InputError, match="of several tokens here: Ann Bob"):
        ioi_task(tokenizer(), [*NAMES, "Ann Bob"], 10, TEMPLATES)
    with pytest.raises(DataError, match="unequal lengths"):
        ioi_task(tokenizer(), NAMES, 10, [*TEMPLATES, "then [A] and [B] met to met . [S] saw"])
    with pytest.raises(InputError, match="each of"):
        ioi_task(tokenizer(), NAMES, 10, ["then [A] met [B]"])
    with pytest.raises(InputError, match="at least 4"):
        ioi_task(tokenizer(), NAMES[:3], 10, TEMPLATES)
    with pytest.raises(DataError, match="make 120 prompts"):
        ioi_task(tokenizer(), NAMES, 500, TEMPLATES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_runs_that_start_late_are_whole_runs(family):
    model, task = decoder(family), task_of(30)
    places = [head_location(model, 1, 2), head_location(model, 2, 0)]
    runs = PatchedRuns(model, task, places)
    with torch.no_grad():
        logits = model(task.prompts).logits[:, -1]
    assert torch.allclose(runs.clean.outcome, task.outcome(logits, torch.arange(30)), atol=1e-4)
    theirs = PatchedRuns(
        model, Task(task.counterfactual("IO", 0)[0], task.attributes, task.counterfactual, task.outcome), places
    )

    def at(name, columns, value):
        module = model.get_submodule(name.removesuffix(":input"))

        def hook(module, args):
            changed = args[0].clone()
            changed[:, -1, slice(*columns)] = value
            return (changed, *args[1:])

        return module.register_forward_pre_hook(hook)

    handles = [at(one.name, one.columns, theirs.states[one]) for one in places]
    with torch.no_grad():
        patched = model(task.prompts).logits[:, -1]
    for handle in handles:
        handle.remove()
    found = runs.run(theirs.states)
    assert torch.allclose(found.outcome, task.outcome(patched, torch.arange(30)), atol=1e-4)
    assert torch.equal(found.top, patched.argmax(dim=1))
    later = runs.run({places[1]: runs.states[places[1]]})
    assert torch.allclose(later.outcome, runs.clean.outcome, atol=1e-4)
    few = PatchedRuns(model, task, places, memory=1)
    assert torch.allclose(few.run(theirs.states).outcome, found.outcome, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_positions_may_differ_from_prompt_to_prompt():
    model, task = decoder(), task_of(30)
    place = Location("model.layers.1:input", "IO")
    runs = PatchedRuns(model, task, [place])
    with torch.no_grad():
        states = model(task.prompts, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(runs.states[place], states[torch.arange(30), task.positions["IO"]], atol=1e-5)
    assert torch.allclose(runs.run(runs.states).outcome, runs.clean.outcome, atol=1e-4)
    with pytest.raises(CaptureError, match="no position 'verb'"):
        PatchedRuns(model, task, [Location("model.layers.1:input", "verb")])
    with pytest.raises(CaptureError, match="names token 40"):
        PatchedRuns(model, task, [Location("model.layers.1:input", 40)])


def test_locate_ranks_heads_by_patching_each_alone():
    model, task = decoder(), task_of(24)
    found = locate(model, task, "IO", top=12, prompts=24, seed=2)
    assert len(found) == 12
    assert [abs(one.score) for one in found] == sorted((abs(one.score) for one in found), reverse=True)
    other = Task(task.counterfactual("IO", 2)[0], task.attributes, task.counterfactual, task.outcome)
    for one in found[:4]:
        runs, theirs = PatchedRuns(model, task, [one]), PatchedRuns(model, other, [one])
        change = (runs.clean.outcome - runs.run(theirs.states).outcome).mean()
        assert float(change) == pytest.approx(one.score, abs=1e-4)
    assert {one.label.split()[0] for one in locate(model, task, "IO", kind="value", top=3, layers=[1])} <= {
        "1.0",
        "1.1",
    }
    with pytest.raises(InputError, match="no attribute 'Who'"):
        locate(model, task, "Who")
    with pytest.raises(InputError, match="no 9"):
        head_location(model, 0, 9)
    with pytest.raises(InputError, match="kind is one of"):
        head_location(model, 0, 0, kind="mlp")


def test_writing_heads_are_ranked_by_what_they_add_to_the_outcome():
    model, task = decoder(), task_of(24)
    found = writing_heads(model, task, top=12, prompts=24)
    assert len({one.label for one in found}) == 12
    assert found[0].score >= found[-1].score


def test_a_dictionary_of_heads_is_scored_whole():
    model, task = decoder(), task_of(100)
    places = writing_heads(model, task, top=2)
    states = PatchedRuns(model, task, places).states
    saes = {}
    for one in places:
        saes[one] = SparseAutoencoder(4, 16, "topk", k=2)
        train_sae(saes[one], states[one], epochs=30, lr=3e-3, batch_size=32)
    report = evaluate_dictionary(model, task, places, saes, k_edit=(1, 2))
    assert set(report.control["attribute"]) == {"IO", "S", "Pos"}
    assert set(report.interpretability["location"]) == {str(one) for one in places}
    assert report.interpretability["mean_best_f1"].between(0, 1).all()
    assert (report.control.loc[report.control["method"] == "full patch", "agreement"] == 1).all()
    with pytest.raises(InputError, match="no dictionary for"):
        evaluate_dictionary(model, task, places, {places[0]: saes[places[0]]})


# ---- toys


def test_the_smaller_attribute_is_occluded_and_the_supervised_code_is_not():
    curve = occlusion_curve(lambda d: SparseAutoencoder(d, 64, "topk", k=1), [0.8], n=4000, epochs=20)
    assert curve.a[0] >= 0.85
    assert curve.b[0] <= 0.35
    assert curve.supervised[0] >= 0.97
    with pytest.raises(InputError, match="ratio"):
        occlusion_curve(lambda d: SparseAutoencoder(d, 64, "topk", k=1), [])


def test_wider_autoencoders_split_one_attribute():
    curve = splitting_curve(lambda d, w: SparseAutoencoder(d, w, "topk", k=1), [4, 64])
    assert curve.best[1] < 0.4 < curve.best[0]
    assert curve.split[1] >= 50
    assert curve.supervised >= 0.99


def test_a_weakened_attribute_has_a_smaller_code():
    table = factorial()
    acts = torch.randn(len(table), 6)
    made = SupervisedDictionary().fit(acts, table)
    half = SupervisedDictionary().fit(weakened(acts, table, "a", 0.5, supervised=made), table)
    assert torch.allclose(half.codes_["a"], made.codes_["a"] / 2, atol=1e-6)
    with pytest.raises(InputError, match="alpha"):
        weakened(acts, table, "a", 2.0, supervised=made)
