import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from language_server import protocol_server
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.explanations.simulatability import (
    Anchor,
    Attribution,
    CannotBalance,
    Composite,
    DecisionBoundary,
    DegenerateModel,
    Explanation,
    LanguageModelSimulator,
    Lime,
    NoFlips,
    Panel,
    Prototype,
    PrototypeNetwork,
    Shuffled,
    SimulationProtocol,
    StudentSimulator,
    effects,
    export_forms,
    import_responses,
    rating_effect,
    run,
)
from theodolite.explanations.simulatability.anchors import bounds
from theodolite.explanations.simulatability.domain import TextDomain
from theodolite.explanations.simulatability.study import edit_distance
from theodolite.language import connect

NAMES = ["a", "b", "c", "d"]


def kinds(n=600, d=4, levels=3, seed=0):
    return np.random.default_rng(seed).integers(0, levels, (n, d))


def additive(rows):
    """A model whose probability is a sum over values, so that every surrogate can be checked against it."""
    rows = np.asarray(rows)
    return 0.5 + 0.3 * (rows[:, 0] == 0) - 0.2 * (rows[:, 1] == 1) - 0.05


def protocol(seed=0, **options):
    X = kinds()
    y = np.where(np.random.default_rng(9).random(len(X)) < 0.7, additive(X) > 0.5, additive(X) <= 0.5).astype(int)
    return SimulationProtocol(additive, X, y, NAMES, categorical=NAMES, seed=seed, **options)


# ---- the tests themselves


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), user=st.integers(0, 50))
def test_a_forward_test_is_balanced_disjoint_and_the_same_for_all_readers(seed, user):
    made = protocol(seed)
    test, other = made.forward(user), made.forward(user + 1)
    assert len(np.intersect1d(test.ids, test.learning_ids)) == 0
    assert len(np.unique(test.ids)) == 32
    assert (test.ids == other.ids).all()
    assert sorted(test.post_order) == list(range(32))
    cells = np.bincount(2 * made.y[test.ids] + test.model_outputs, minlength=4)
    assert cells.tolist() == [8, 8, 8, 8]
    assert np.bincount(2 * made.y[test.learning_ids] + test.learning_outputs).tolist() == [4] * 4
    assert (np.asarray(test.items) == made.X[test.ids]).all()


def test_half_of_the_perturbations_flip_and_change_one_to_three_slots():
    made = protocol()
    test = made.counterfactual()
    assert test.flips.mean() == 0.5
    assert ((additive(test.perturbed) > 0.5) == test.perturbed_outputs).all()
    changes = (test.perturbed_codes != test.codes).sum(axis=1)
    assert changes.min() >= 1
    assert changes.max() <= 3
    for y, said in itertools.product((0, 1), (0, 1)):
        cell = (made.y[test.ids] == y) & (test.model_outputs == said)
        assert cell.sum() == 8
        assert test.flips[cell].sum() == 4
    assert len(np.intersect1d(test.ids, made.forward().ids)) == 0


def test_equal_seeds_give_equal_tests():
    first, second, third = protocol(1), protocol(1), protocol(2)
    assert (first.forward(3).learning_ids == second.forward(3).learning_ids).all()
    assert (first.counterfactual().perturbed == second.counterfactual().perturbed).all()
    assert (first.forward().ids != third.forward().ids).any()


def test_only_what_all_models_answer_alike_is_used():
    def other(rows):
        return np.where(np.asarray(rows)[:, 3] == 0, 1 - additive(rows), additive(rows))

    made = protocol(agree_with=[other])
    forward, changed = made.forward(), made.counterfactual()
    for rows in (forward.items, forward.learning, changed.items, changed.perturbed):
        assert ((other(rows) > 0.5) == (additive(rows) > 0.5)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(1, 4))
def test_perturbations_take_other_values_uniformly(seed, most):
    made = protocol()
    codes = made.domain.perturb(made.codes[0], 4000, np.random.default_rng(seed), most=most)
    changed = codes != made.codes[0]
    count = np.bincount(changed.sum(axis=1), minlength=most + 1)
    assert count[0] == 0
    assert len(count) == most + 1
    assert np.abs(count[1:] / 4000 - 1 / most).max() < 0.05
    assert np.ptp(changed.mean(axis=0)) < 0.08
    assert codes.min() >= 0
    assert codes.max() <= 2


def test_numbers_are_cut_at_their_quartiles_and_bins_are_shown():
    X = np.arange(400.0)[:, None] % 100
    made = SimulationProtocol(
        lambda x: (x[:, 0] >= 50) * 1.0, X, X[:, 0] > 40, ["n"], balance="outputs", test=4, learning=4
    )
    assert np.bincount(made.codes[:, 0]).tolist() == [100] * 4
    assert made.domain.names == ("n = up to 24", "n = over 24, up to 49", "n = over 49, up to 74", "n = over 74")


# ---- explanations


def test_lime_gives_the_weights_of_an_additive_model():
    made = protocol()
    lime = Lime(top=4, samples=20_000, ridge=1e-6).bind(made)
    row = np.array([0, 1, 2, 2])
    weights = lime.explain(row).weights
    first, second, third, _ = (int(c) for c in made.domain.columns(row[None])[0])
    assert weights[first] == pytest.approx(0.3, abs=1e-3)
    assert weights[second] == pytest.approx(-0.2, abs=1e-3)
    assert weights[third] == pytest.approx(0.0, abs=1e-3)


def test_a_row_of_a_data_frame_is_read_by_name():
    frame = pd.DataFrame(kinds(), columns=NAMES)
    made = SimulationProtocol(additive, frame, kinds()[:, 0] == 0, categorical=NAMES, balance="outputs")
    lime, row = Lime().bind(made), frame.iloc[3]
    expected = lime.explain(row.tolist()).weights
    assert lime.explain(row[::-1]).weights == lime.explain(frame[NAMES[::-1]].iloc[[3]]).weights == expected
    with pytest.raises(InputError, match="4 values, got 2"):
        lime.explain([0, 1])
    fixed = kinds().astype(float)
    fixed.setflags(write=False)
    bounded = nn.Sequential(nn.Linear(4, 2))
    assert (
        SimulationProtocol(bounded, fixed, kinds()[:, 0] == 0, NAMES, balance="outputs", test=4, learning=4).X
        is not None
    )


def test_lime_weights_are_evidence_for_class_one_whatever_is_answered():
    made = protocol()
    row = np.array([1, 1, 0, 0])
    assert additive(row[None])[0] < 0.5
    explained = Lime(top=4).bind(made).explain(row)
    assert explained.answer == 0
    assert explained.weights[int(made.domain.columns(row[None])[0][1])] < 0


@pytest.mark.parametrize(
    "explainer", [Lime(stability=5), Anchor(), DecisionBoundary(samples=500), Shuffled(), Prototype()]
)
def test_equal_seeds_give_equal_bytes(explainer):
    made = protocol()
    row = made.row(7)
    bound = explainer.bind(made)
    first = bound.explain(row)
    bound.explain(made.row(8))
    assert bound.explain(row).text.encode() == first.text.encode()
    assert "<pre>" in first.html
    if isinstance(explainer, Lime):
        assert -1 <= first.stability <= 1


def test_an_anchor_is_the_shortest_rule_that_keeps_the_answer():
    def model(rows):
        return ((rows[:, 0] == 0) & (rows[:, 2] == 1)) * 1.0

    made = SimulationProtocol(model, kinds(), kinds()[:, 0] == 0, NAMES, categorical=NAMES, balance="outputs")
    found = Anchor().bind(made).explain(np.array([0, 2, 1, 0]))
    assert [made.domain.names[c] for c in found.rule] == ["a = 0", "c = 1"]
    assert found.precision == 1
    assert found.coverage == pytest.approx(made.domain.holds(found.rule, made.codes).mean())
    single = Anchor().bind(made).explain(np.array([1, 2, 2, 0]))
    assert len(single.rule) == 1
    assert "hold on" in single.text


def test_an_anchor_of_a_number_holds_in_its_whole_bin():
    X = np.random.default_rng(0).uniform(0, 4, (400, 2))
    made = SimulationProtocol(lambda x: (x[:, 0] > 1.5) * 1.0, X, X[:, 0] > 1.6, ["n", "m"], balance="outputs")
    (inside,) = np.flatnonzero((X[:, 0] > 1.6) & (X[:, 0] < 1.7))[:1]
    missed = Anchor().bind(made).explain(X[inside])
    assert missed.precision < 0.9
    assert "No conditions keep the answer 'True' in 95 % of cases, not even all of them" in missed.text
    assert f"{100 * missed.precision:.0f} % of cases" in missed.text
    far = Anchor().bind(made).explain(X[np.argmax(X[:, 0])])
    assert far.precision >= 0.95
    assert "Conditions for the model answering 'True':" in far.text
    assert "(1 condition)." in far.text


def test_bounds_solve_their_equation():
    mean, n = np.array([0.2, 0.9, 1.0]), np.array([50.0, 200.0, 100.0])
    low, high = bounds(mean, n, 3.0)
    for q, p, k in zip(low, mean, n, strict=True):
        p = min(p, 1 - 1e-9)
        assert k * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) == pytest.approx(3, abs=1e-3)
    assert (low <= mean).all()
    assert (mean <= high + 1e-8).all()
    assert low[2] == pytest.approx(np.exp(-3 / 100), abs=1e-4)


def test_the_boundary_takes_the_fewest_edits_and_orders_them():
    def model(rows):
        return 0.9 - 0.35 * (np.asarray(rows)[:, 0] != 0) - 0.2 * (np.asarray(rows)[:, 1] != 0)

    made = SimulationProtocol(model, kinds(), kinds()[:, 0] == 0, NAMES, categorical=NAMES, balance="outputs")
    row = np.array([0, 0, 1, 1])
    path = DecisionBoundary().bind(made).explain(row).path
    assert [int((step != made.codes[0] * 0 + row).sum()) for step in path] == [1, 2]
    assert model(path[-1][None])[0] < 0.5
    assert path[0][0] == 0  # the edit that moves the evidence least comes first
    assert path[0][1] != 0


def test_attributions_of_another_room_can_be_read():
    X = np.random.default_rng(0).normal(size=(300, 4))
    linear = LogisticRegression().fit(X, X[:, 0] > 0)
    made = SimulationProtocol(linear, X, X[:, 0] + X[:, 1] > 0, NAMES, balance="outputs")
    explained = Attribution(method="Occlusion").bind(made).explain(X[3])
    strongest = max(explained.weights, key=lambda c: abs(explained.weights[c]))
    assert made.domain.names[strongest].startswith("a =")
    network = nn.Sequential(nn.Linear(4, 2))
    smooth = SimulationProtocol(
        network, X.astype(np.float32), X[:, 0] > 0, NAMES, balance="outputs", test=8, learning=8
    )
    for method in ("SmoothGrad", "Integrated Gradients"):
        assert Attribution(method=method).bind(smooth).explain(smooth.row(0)).weights
    frame = pd.DataFrame(X, columns=NAMES)
    tabled = SimulationProtocol(lambda f: (f["a"] > 0) * 1.0, frame, X[:, 0] > 0, balance="outputs")
    with pytest.raises(InputError, match="not a table of numbers"):
        Attribution().bind(tabled).explain(tabled.row(0))


def test_composite_holds_all_parts():
    made = protocol()
    found = Composite().bind(made).explain(made.row(0))
    assert found.weights
    assert found.rule is not None
    assert found.path
    assert found.neighbours
    assert found.text.count("----") == 3


def test_prototypes_shown_are_never_tested_inputs():
    made = protocol()
    bound = Prototype().bind(made)
    shown = set(made.pool[bound.network.prototypes_].tolist())
    assert not shown & set(made.forward().ids.tolist())


# ---- the prototype network


def blobs(n=400, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return rng.normal(size=(n, 5)) + 2.5 * y[:, None], y


def test_every_prototype_is_a_training_input_of_its_class():
    X, y = blobs()
    made = PrototypeNetwork(10, 6, epochs=30, push_from=20).fit(X, y)
    assert np.abs(made.latents(X[made.prototypes_]) - made.vectors_.detach().numpy()).max() < 1e-6
    assert (y[made.prototypes_] == made.prototype_classes_).all()
    assert len(np.unique(made.prototypes_)) == 20
    assert (made.predict(X) == y).mean() > 0.95
    assert made.predict_proba(X).sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("base", [nn.Linear(5, 2), LogisticRegression()])
def test_any_black_box_can_be_the_start(base):
    X, y = blobs()
    made = PrototypeNetwork(5, epochs=10).fit(X, y, base=base if isinstance(base, nn.Module) else base.fit(X, y))
    assert made.predict(X).shape == y.shape


def test_frozen_weights_do_not_move():
    X, y = blobs()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))
    frozen = PrototypeNetwork(5, epochs=5, freeze_extractor=True).fit(X, y, base=base)
    free = PrototypeNetwork(5, epochs=5).fit(X, y, base=base)
    assert torch.equal(frozen.extractor_[0].weight, base[0].weight)
    assert not torch.equal(free.extractor_[0].weight, base[0].weight)


def test_the_prototype_network_says_what_does_not_fit():
    X, y = blobs(50)
    with pytest.raises(DataError, match="at least 40 rows"):
        PrototypeNetwork(40).fit(X, y)
    with pytest.raises(InputError, match="have predict"):
        PrototypeNetwork(5).fit(X, y, base="a name")
    with pytest.raises(DataError, match="does not have"):
        PrototypeNetwork(5).fit(X, y, base=LogisticRegression().fit(X, y + 5))
    with pytest.raises(InputError, match="not fitted"):
        PrototypeNetwork().predict(X)
    with pytest.raises(DataError, match="finite"):
        PrototypeNetwork(5).fit(X * np.nan, y)


# ---- readers


def panel(made, ids, explanations=None):
    return Panel(made.domain, made.labels, made.codes[ids], made.outputs[ids], explanations)


def test_the_student_uses_each_explanation_as_written():
    made = protocol()
    test = made.forward()
    ids, items = test.learning_ids, made.codes[test.ids]
    base = LogisticRegression(C=1.0, max_iter=1000).fit(made.domain.one_hot(made.codes[ids]), made.outputs[ids])
    value = base.decision_function(made.domain.one_hot(items))
    student = StudentSimulator()
    assert (student.forward(panel(made, ids), items) == (value > 0)).all()

    told = tuple(Lime().bind(made).explain(made.row(i)) for i in ids)
    table = np.zeros(made.domain.width)
    for column in range(made.domain.width):
        shown = [one.weights[column] for one in told if column in one.weights]
        table[column] = np.mean(shown) if shown else 0
    learnt = made.domain.one_hot(made.codes[ids]) @ table
    expected = value + 3 * (made.domain.one_hot(items) @ table - np.median(learnt)) / np.abs(learnt).mean()
    assert (student.forward(panel(made, ids, told), items) == (expected > 0)).all()
    alone = np.array([student.forward(panel(made, ids, told), items[i : i + 1])[0] for i in range(len(items))])
    assert (alone == (expected > 0)).all()  # what is tested besides has no part in it

    rule = Explanation("", 1, 0.9, rule=(0,))
    ruled = student.forward(panel(made, ids, (rule,) * len(ids)), items)
    assert ruled[items[:, 0] == 0].all()
    assert (ruled == (value > 0))[items[:, 0] != 0].all()

    path = Explanation("", 1, 0.9, path=(np.array([2, 2, 2, 2]),))
    more = LogisticRegression(C=1.0, max_iter=1000).fit(
        made.domain.one_hot(np.vstack([made.codes[ids], np.full((16, 4), 2)])), np.append(made.outputs[ids], [0] * 16)
    )
    assert (student.forward(panel(made, ids, (path,) * 16), items) == more.predict(made.domain.one_hot(items))).all()


def test_the_student_answers_on_perturbations_as_written():
    made = protocol()
    learnt = panel(made, made.forward().learning_ids)
    codes = np.array([[0, 0, 0, 0], [0, 0, 0, 0]])
    changed = np.array([[1, 0, 0, 0], [0, 1, 0, 0]])
    outputs = np.array([1, 1])
    weights = Explanation("", 1, 0.8, weights={0: 0.5, 3: 0.2})
    edit = Explanation("", 1, 0.8, path=(np.array([2, 0, 0, 0]),))
    student = StudentSimulator()
    for told, expected in ((weights, [0, 1]), (edit, [0, 1])):
        shown = Panel(made.domain, made.labels, codes, outputs, (told, told))
        assert student.counterfactual(learnt, shown, changed).tolist() == expected


def test_readers_do_better_with_lime_than_with_its_weights_shuffled():
    made = protocol()
    table = run(made, [Lime(), Shuffled()], StudentSimulator(), 8)
    assert list(table.columns) == ["user", "item", "method", "test", "pre", "post", "model", "rating"]
    assert len(table) == 2 * 2 * 8 * 32
    found = effects(table, 500).set_index(["test", "method"])
    assert found.loc[("forward", "shuffled lime"), "effect"] < found.loc[("forward", "lime"), "effect"]
    pd.testing.assert_frame_equal(table, run(protocol(), [Lime(), Shuffled()], StudentSimulator(), 8))
    by_item = table[table["test"] == "forward"].groupby("item")["model"].nunique()
    assert (by_item == 1).all()


def test_a_language_model_reads_the_panel_through_the_real_protocol(tmp_path):
    made = protocol(learning=4, test=8, labels=["no", "certainly"])
    with protocol_server() as server:
        reader = LanguageModelSimulator(connect(server.url, "m", cache=tmp_path / "answers.sqlite"))
        table = run(made, [Lime()], reader, 1)
        prompts = [body["prompt"] for _, body, _ in server.seen]
    assert (table["post"] == 0).all()  # the server gives shorter words more
    tested = made.domain.show(made.codes[made.forward().ids[0]])
    asked = [p for p in prompts if p.split("Input:")[-1].strip().startswith(tested)]
    assert asked
    assert any("Evidence for" in p for p in prompts)
    for prompt in prompts:
        if "changed:" not in prompt:
            assert "Evidence for" not in prompt.split("Input:")[-1]  # no explanation of what is tested


def test_a_language_model_that_tells_no_probabilities_is_asked_in_a_chat(tmp_path):
    made = protocol(learning=4, test=8, labels=["no", "certainly"])

    def answer(messages):
        asked = messages[-1]["content"]
        if "Answer with 'no' or 'certainly' and nothing else." not in asked:
            return "asked for log-probabilities"
        return "Certainly!" if "Evidence for" in asked else "I cannot tell."

    with protocol_server(*["no logprobs"] * 200, answer=answer) as server:
        reader = LanguageModelSimulator(connect(server.url, "m", cache=tmp_path / "answers.sqlite"))
        table = run(made, [Lime()], reader, 1, tests=("forward",))
    assert (table["post"] == 1).all()
    assert table["pre"].isna().all()
    with pytest.raises(DataError, match="no reader answered both"):
        effects(table, 200)


# ---- texts


TEXTS = [
    f"{first} {middle} {last}"
    for first, middle, last in itertools.product(
        ("a good", "a bad", "a fine", "a poor", "the good", "the bad"),
        ("film about love", "movie about war", "film about war", "movie about love"),
        ("with heart .", "with noise .", "with music ."),
    )
]


def good(texts):
    return np.array([0.9 if "good" in text or "fine" in text else 0.1 for text in texts])


def test_texts_are_perturbed_explained_and_read():
    y = np.arange(len(TEXTS)) % 2
    made = SimulationProtocol(good, TEXTS, y, kind="text", learning=8, test=16, most_changes=4)
    assert len(made.forward().items) == 16
    found = Lime().bind(made).explain("a good film about snow")
    strongest = max(found.weights, key=lambda c: found.weights[c])
    assert made.domain.names[strongest] == "good"
    assert Anchor().bind(made).explain("a good film about love with heart .").precision >= 0.95
    table = run(made, [Lime(), DecisionBoundary(samples=300), Prototype()], StudentSimulator(), 3, tests=("forward",))
    assert set(effects(table, 200)["method"]) == {"lime", "boundary", "prototype"}


def test_texts_of_different_lengths_are_read_in_both_tests():
    texts = [text + " and so on and so on" * (i % 3) for i, text in enumerate(TEXTS * 2)]
    y = np.arange(len(texts)) // 2 % 2
    made = SimulationProtocol(good, texts, y, kind="text", learning=8, test=16, most_changes=4)
    table = run(made, [Lime(samples=100), DecisionBoundary(samples=100)], StudentSimulator(), 1)
    assert set(table["test"]) == {"forward", "counterfactual"}
    changed = made.counterfactual()
    assert ((good(changed.perturbed) > 0.5) == (changed.perturbed_outputs == 1)).all()
    by_path = table[(table["method"] == "boundary") & (table["test"] == "counterfactual")]
    assert set(by_path["post"]) <= {0, 1}


def test_a_text_keeps_unknown_words_and_its_neighbours_share_company():
    domain = TextDomain(TEXTS)
    codes = domain.encode(["a good snow film"])
    assert domain.realise(codes, "a good snow film") == ["a good snow film"]
    rng = np.random.default_rng(0)
    changed = domain.perturb(codes[0], 50, rng, most=2)
    assert all(text.split()[2] == "snow" for text in domain.realise(changed, "a good snow film"))
    assert domain.show(codes[0]) == "a good ? film"


# ---- people


def test_forms_go_out_and_come_back(tmp_path):
    made = protocol(labels=("below", "above"))
    bound = [Lime().bind(made)]
    test = made.forward()
    folder = export_forms(test, bound, tmp_path / "forms")
    post = pd.read_csv(folder / "lime-post.csv")
    assert "explanation" not in post.columns
    assert "model" not in post.columns
    learning = pd.read_csv(folder / "lime-learning.csv")
    assert not set(learning["id"]) & set(post["id"])
    first = pd.read_csv(folder / "lime-first.csv")  # what is learnt before any explanation was seen
    assert list(first.columns) == ["id", "input", "model"]
    assert first["id"].tolist() == learning["id"].tolist() == test.learning_ids.tolist()
    assert learning["explanation"].str.contains("Evidence").all()
    names = np.array(["below", "above"])
    truth = dict(zip(test.ids.tolist(), test.model_outputs.tolist(), strict=True))
    for user in range(4):
        for phase in ("pre", "post"):
            form = pd.read_csv(folder / f"lime-{phase}.csv", dtype={"answer": str})
            form["answer"] = [names[truth[i]] for i in form["id"]]
            form.loc[0, "answer"] = "Abvoe " if truth[form.loc[0, "id"]] else "belo"
            if user == 0 and phase == "pre":
                form.loc[1, "answer"] = "no idea"
            form["rating"] = 5.0 if user else 5
            form.to_csv(folder / f"reader{user}.lime-{phase}.csv", index=False)
    table = import_responses(folder)
    assert len(table) == 4 * 32 - 1
    assert (table["post"] == table["model"]).all()
    assert (table["rating"] == 5).all()
    ((file, _, said),) = table.attrs["dropped"]
    assert (file, said) == ("reader0.lime-pre.csv", "no idea")
    assert effects(table, 200).loc[0, "pre"] == 1
    (folder / "reader1.lime-post.csv").unlink()
    with pytest.raises(DataError, match="both are needed"):
        import_responses(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="export_forms"):
        import_responses(folder)


def test_counterfactual_forms_show_the_original_and_its_explanation(tmp_path):
    made = protocol()
    test = made.counterfactual()
    lime = Lime().bind(made)
    folder = export_forms(test, [lime], tmp_path)
    post = pd.read_csv(folder / "lime-post.csv")
    assert post.loc[0, "explanation"] == lime.explain(made.row(int(post.loc[0, "id"]))).text
    assert "explanation" not in pd.read_csv(folder / "lime-pre.csv").columns


@given(st.text("ab", max_size=5), st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


# ---- estimates


def study(pre, post, methods=("a",), users=6, items=10):
    table = pd.DataFrame(
        list(itertools.product(methods, range(users), range(items))), columns=["method", "user", "item"]
    ).assign(test="forward", model=1, rating=np.nan)
    return table.assign(pre=pre(table), post=post(table))


def test_an_effect_is_post_minus_pre_and_pre_is_pooled():
    rng = np.random.default_rng(0)
    table = study(lambda t: (rng.random(len(t)) < 0.5) * 1, lambda t: (rng.random(len(t)) < 0.8) * 1, "abc")
    found = effects(table, 500)
    assert np.ptp(found["pre"]) < np.ptp(table.groupby("method")["pre"].mean())
    assert found["pre"].mean() == pytest.approx(table["pre"].mean())
    raw = table.groupby("method")["post"].mean().to_numpy()
    assert found["effect"].to_numpy() == pytest.approx(raw - found["pre"].to_numpy())
    far = study(lambda t: (t["method"] == "a") * 1, lambda t: 1)
    assert effects(far, 200).loc[0, "effect"] == 0


def test_the_bootstrap_by_counts_is_the_bootstrap_by_rows():
    rng = np.random.default_rng(1)
    table = study(lambda t: (rng.random(len(t)) < 0.5) * 1, lambda t: (rng.random(len(t)) < 0.7) * 1)
    found = effects(table, 4000).loc[0]
    grid = (table["post"] - table["pre"]).to_numpy().reshape(6, 10)
    drawn = [grid[rng.integers(0, 6, 6)][:, rng.integers(0, 10, 10)].mean() for _ in range(4000)]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    centred = np.abs(np.array(drawn) - np.mean(drawn)) >= abs(grid.mean())
    assert found["p"] == pytest.approx(centred.mean(), abs=0.03)


def test_answers_of_one_reader_are_not_independent():
    table = study(lambda t: 0, lambda t: t["user"] % 2, users=6, items=200)
    found = effects(table, 1000).loc[0]
    rows = 1.96 * 0.5 / len(table) ** 0.5
    assert found["high"] - found["low"] > 5 * 2 * rows


def test_pairs_with_a_gap_are_left_out_whole():
    table = study(lambda t: 0.0, lambda t: 1.0)
    table.loc[3, "post"] = np.nan
    table.loc[5, "pre"] = np.nan
    assert effects(table, 200).loc[0, "n"] == len(table) - 2


def test_tests_can_be_balanced():
    one = study(lambda t: 0, lambda t: 1)
    other = study(lambda t: 1, lambda t: 1, items=30).assign(test="counterfactual")
    found = effects(pd.concat([one, other]), 200, balanced=True).set_index("test")
    assert found.loc["both", "effect"] == pytest.approx(0.5)


def test_ratings_that_tell_are_found():
    rng = np.random.default_rng(0)
    table = study(lambda t: 0, lambda t: 0, users=20, items=20)
    table["rating"] = rng.integers(1, 8, len(table))
    p = 1 / (1 + np.exp(-0.5 * (table["rating"] - 4)))
    table["post"] = (rng.random(len(table)) < p).astype(int)
    found = rating_effect(table, 500).set_index("method")
    assert found.loc["all", "low"] < 0.5 < found.loc["all", "high"]
    assert found.loc["all", "p"] < 0.05
    with pytest.raises(DataError, match="do not rate"):
        rating_effect(table.assign(rating=np.nan))
    with pytest.raises(InputError, match="column rating"):
        rating_effect(table.drop(columns="rating"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["user"] < 2], "needs at least 3"),
        (lambda t: t[t["item"] < 7], "needs at least 3 and 8"),
        (lambda t: t.drop(columns="post"), "missing"),
        (lambda t: pd.concat([t, t]), "twice"),
        (lambda t: t.assign(pre=np.nan), "nothing to estimate"),
    ],
)
def test_studies_without_an_interval_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        effects(change(study(lambda t: 0, lambda t: 1)), 200)


# ---- what does not fit


def test_what_does_not_fit_is_said():
    X, y = kinds(), kinds()[:, 0] == 0
    with pytest.raises(CannotBalance, match="largest test") as caught:
        SimulationProtocol(additive, X, additive(X) > 0.5, NAMES, categorical=NAMES)
    assert (caught.value.have, caught.value.need, caught.value.largest) == (0, 12, 0)
    with pytest.raises(DegenerateModel, match="all 600 rows"):
        SimulationProtocol(lambda rows: np.full(len(rows), 0.2), X, y, NAMES)
    with pytest.raises(InputError, match="multiples of 4"):
        protocol(test=30)
    with pytest.raises(InputError, match="multiple of 8"):
        protocol(test=36).counterfactual()
    with pytest.raises(DataError, match="3 classes"):
        SimulationProtocol(additive, X, X[:, 0], NAMES)
    with pytest.raises(ModelError, match=r"\(600, 3\)"):
        SimulationProtocol(lambda rows: np.full((len(rows), 3), 1 / 3), X, y, NAMES)
    with pytest.raises(ModelError, match="between 0 and 1"):
        SimulationProtocol(lambda rows: rows[:, 0] * 5.0, X, y, NAMES)
    with pytest.raises(InputError, match="different names"):
        SimulationProtocol(additive, X, y, ["a", "a", "b", "c"])
    with pytest.raises(InputError, match="no column"):
        SimulationProtocol(additive, X, y, NAMES, categorical=["z"])
    with pytest.raises(InputError, match="bind"):
        Lime().explain(X[0])
    with pytest.raises(InputError, match="different names"):
        run(protocol(), [Lime(), Lime()], StudentSimulator())
    with pytest.raises(InputError, match="only explanations by weights"):
        Shuffled(of=Anchor()).bind(protocol()).explain(X[0])


def test_text_in_a_column_needs_to_be_named():
    frame = pd.DataFrame({"colour": ["red", "blue"] * 100, "size": np.arange(200.0)})

    def model(rows):
        return np.where(rows["size"] > 100, 0.9, 0.1)

    with pytest.raises(DataError, match="colour"):
        SimulationProtocol(model, frame, frame["size"] > 90, balance="outputs")
    made = SimulationProtocol(model, frame, frame["size"] > 90, categorical=["colour"], balance="outputs")
    assert list(made.counterfactual().perturbed.columns) == ["colour", "size"]
    assert "colour = red" in made.domain.show(made.codes[0])
    missing = frame.assign(size=frame["size"].where(frame["size"] != 3))
    with pytest.raises(DataError, match="1 missing"):
        SimulationProtocol(model, missing, frame["size"] > 90, categorical=["colour"])


def test_a_model_that_hardly_ever_flips_is_refused():
    X = np.column_stack([np.arange(400) % 2, kinds(400, 8)])

    def stubborn(rows):
        return np.where((np.asarray(rows)[:, 1:] == 0).sum(axis=1) >= 4, 0.9, 0.1) * 1.0

    with pytest.raises(NoFlips, match="most_changes"):
        SimulationProtocol(
            stubborn, X, np.arange(400) % 2, [f"x{i}" for i in range(9)], categorical=range(9), most_changes=1, seed=0
        ).counterfactual()
