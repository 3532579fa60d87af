import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import r2_score
from sklearn.svm import LinearSVC
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.explanations.surrogate import (
    BlackBox,
    ConstantModelWarning,
    ConvAutoencoderClassifier,
    NotProbabilitiesError,
    OverlapWarning,
    SelfAttentionNetwork,
    SurrogateExplainer,
    fit_surrogate,
    measure_fidelity,
)
from theodolite.explanations.surrogate.importance import correlation_clusters, pick_apart


def logistic(weights, sharp=1.0):
    """Probabilities of softmax(sharp x W); a function of an array."""
    weights = np.asarray(weights, dtype=np.float64)

    def f(x):
        z = sharp * x @ weights
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return z / z.sum(axis=1, keepdims=True)

    return f


def table(n=400, d=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def fitted(seed=0, d=8, classes=3, **options):
    rng = np.random.default_rng(seed)
    x, f = table(500, d, seed), logistic(rng.normal(size=(d, classes)), 2.0)
    options = {"k": min(4, d), "seed": 0, **options}
    return SurrogateExplainer(**options).fit(f, x[:300], x[300:400]), x, f


# ---- oracles


def test_an_additive_model_has_its_closed_forms():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 6)) * np.array([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    f = lambda x: 3 * x[:, 0] - 2 * x[:, 1]
    explainer = SurrogateExplainer(k=2, surrogate="ridge", seed=0).fit(f, x[:20_000], x[20_000:])
    found, variance = explainer.importance_, x[20_000:].var(axis=0)
    assert np.allclose(found["permutation"][:2], 2 * np.array([9, 4]) * variance[:2], rtol=0.05)
    assert np.allclose(found["permutation"][2:], 0, atol=1e-12)
    scale = x[:20_000].std(axis=0)
    assert np.allclose(found["sensitivity"], np.array([3, 2, 0, 0, 0, 0]) * scale, atol=1e-6)
    assert set(explainer.top_) == {0, 1}
    assert explainer.fidelity(table(1000, 6, 5)).r2 >= 1 - 1e-6
    assert explainer.fidelity(table(1000, 6, 5)).agreement is None
    assert "no gradients" in explainer.notes_[0]


def test_rules_are_the_tree():
    for redundancy in ("penalise", "none"):
        explainer, x, _ = fitted(redundancy=redundancy)
        rules = explainer.rules(max_rules=None, prune=False)
        met = np.stack([rule.holds(x) for rule in rules])
        assert (met.sum(axis=0) == 1).all()
        answer = np.array([rule.index for rule in rules])[met.argmax(axis=0)]
        assert (answer == explainer.predict_proba(x).argmax(axis=1)).all()
        assert sum(rule.support for rule in rules) == 300
        leaves = explainer.tree_.model.apply(x[:, explainer.columns_])
        assert len(rules) == explainer.tree_.model.get_n_leaves()
        assert len(np.unique(leaves)) <= len(rules)
        assert min(rule.support for rule in rules) >= 3


def test_a_rule_in_other_units_holds_for_the_same_rows():
    explainer, x, _ = fitted()
    scaling = [(10.0 * j - 3, 0.5 + j) for j in range(x.shape[1])]
    other = np.stack([shift + scale * x[:, j] for j, (shift, scale) in enumerate(scaling)], axis=1)
    for rule in explainer.rules():
        told = rule.rescaled(scaling)
        assert (told.holds(other) == rule.holds(x)).mean() > 0.999  # single precision at the border
        assert (told.support, told.purity, told.class_) == (rule.support, rule.purity, rule.class_)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 4))
def test_a_counterfactual_is_the_nearest_leaf(seed, classes):
    explainer, x, f = fitted(seed, classes=classes)
    columns, tree = explainer.columns_, explainer.tree_.model.tree_
    if tree.node_count == 1:
        return
    row, scale = x[450], x[:300].std(axis=0)[columns]
    own = explainer.predict_proba(row[None])[0].argmax()

    def walk(node, low, high):
        """Every leaf by recursion, apart from how the method walks."""
        if tree.children_left[node] < 0:
            value = tree.value[node][:, 0]
            value = np.array([1 - value[0], value[0]]) if classes == 2 else value
            change = np.maximum(low - row[columns], 0) + np.maximum(row[columns] - high, 0)
            yield value.argmax(), float((change / scale).sum())
            return
        j, t = tree.feature[node], tree.threshold[node]
        yield from walk(tree.children_left[node], low, np.where(np.arange(len(high)) == j, np.minimum(high, t), high))
        yield from walk(tree.children_right[node], np.where(np.arange(len(low)) == j, np.maximum(low, t), low), high)

    k = len(columns)
    costs = [cost for answer, cost in walk(0, np.full(k, -np.inf), np.full(k, np.inf)) if answer != own]
    if not costs:
        with pytest.raises(InputError, match="no leaf"):
            explainer.counterfactual(row)
        return
    found = explainer.counterfactual(row)
    assert abs(found.cost - min(costs)) <= 1e-9
    assert found.flips_surrogate
    assert explainer.predict_proba(found.x_new[None])[0].argmax() != own
    assert found.flips_black_box == (f(found.x_new[None])[0].argmax() != f(row[None])[0].argmax())
    spent = np.abs(found.x_new[columns] - row[columns]) / scale
    assert abs(spent.sum() - found.cost) <= 1e-5
    assert set(found.changes) == {explainer.features_[j] for j in np.flatnonzero(found.x_new != row)}


def test_fidelity_is_scikit_learns_weighted_r2_and_known_numbers():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 50), rng.dirichlet(np.ones(4), 50)
    found = measure_fidelity(p, q, rng.integers(0, 4, 50), k=3, surrogate="tree")
    assert found.r2 == pytest.approx(r2_score(p, q, multioutput="variance_weighted"))
    assert found.agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert measure_fidelity(np.eye(2), np.eye(2)[::-1], k=1, surrogate="tree").js == pytest.approx(1.0)
    same = measure_fidelity(p, p, k=3, surrogate="tree")
    assert (same.r2, same.agreement, same.accuracy_black_box) == (1.0, 1.0, None)
    assert same.js == pytest.approx(0.0, abs=1e-12)


def test_the_quick_way_through_the_first_layer_is_the_whole_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(7, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)
    )
    net.train()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    x = table(60, 7).astype(np.float32).astype(np.float64)
    columns, values = np.array([0, 3, 6]), table(3, 60, 1)
    quick, whole = BlackBox(net), BlackBox(Whole())
    assert quick._front is not None
    assert whole._front is None
    quick(x), whole(x)
    one, other = (np.concatenate([p for _, p in box.edited(x, columns, values)]) for box in (quick, whole))
    assert one.shape == (3, 60, 3)
    assert np.allclose(one, other, atol=1e-6)
    assert net.training


def test_permutation_importance_is_scikit_learns():
    x, y = load_breast_cancer(return_X_y=True)
    model = LogisticRegression(max_iter=10_000).fit(x[:300], y[:300])
    explainer = SurrogateExplainer(k=5, scores=("permutation",), repeats=30, seed=0)
    ours = explainer.fit(model, x[:300], x[300:], y[300:]).importance_
    peer = permutation_importance(model, x[300:], y[300:], scoring="neg_log_loss", n_repeats=30, random_state=1)
    off = np.abs(ours["permutation"] - peer.importances_mean)
    assert (off <= 5 * peer.importances_std / np.sqrt(30) + 0.02 * np.abs(peer.importances_mean) + 1e-6).all()


def test_gradients_are_the_closed_form():
    linear = nn.Linear(5, 3)
    x = table(80, 5)
    explainer = SurrogateExplainer(k=2, scores=("gradient",), seed=0).fit(linear, x[:40], x[40:])
    w = linear.weight.detach().double().numpy()
    centred = (w - w.mean(axis=0))[BlackBox(linear)(x[40:]).argmax(axis=1)]
    assert np.allclose(explainer.importance_["gradient"], np.abs(centred * x[40:]).mean(axis=0), atol=1e-6)
    assert np.allclose(
        explainer.importance_["gradient_se"] * np.sqrt(40), np.abs(centred * x[40:]).std(axis=0, ddof=1), atol=1e-6
    )


def test_comprehensiveness_and_sufficiency_by_hand():
    f = logistic([[2.0, -2.0], [0.5, -0.5], [0.0, 0.0]])
    x = table(300, 3)
    for replacement in ("median", "zero", "random"):
        explainer = SurrogateExplainer(k=1, replacement=replacement, seed=0).fit(f, x[:100], x[100:200])
        assert explainer.top_.tolist() == [0]
        test = x[200:]
        p, y = f(test), f(test).argmax(axis=1)
        if replacement != "random":
            value = np.median(x[:100], axis=0) if replacement == "median" else np.zeros(3)
            without, only = test.copy(), test.copy()
            without[:, 0], only[:, 1:] = value[0], value[1:]
            rows = np.arange(100)
            assert explainer.comprehensiveness(test)[0] == pytest.approx((p - f(without))[rows, y].mean())
            assert explainer.sufficiency(test)[0] == pytest.approx((p - f(only))[rows, y].mean())
        assert explainer.comprehensiveness(test)[0] > explainer.comprehensiveness(test, columns=[2])[0] + 0.1
        assert explainer.sufficiency(test)[0] < explainer.sufficiency(test, columns=[2])[0] - 0.1


# ---- properties


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_answers_stay_probabilities_and_repeat(seed):
    explainer, x, f = fitted(seed, surrogate="extra")
    q = explainer.predict_proba(x[400:])
    assert (q >= 0).all()
    assert np.allclose(q.sum(axis=1), 1)
    again = clone(explainer).fit(f, x[:300], x[300:400])
    assert (again.predict_proba(x[400:]) == q).all()
    pd.testing.assert_frame_equal(again.importance_, explainer.importance_)
    assert again.overlap_.to_numpy().diagonal().tolist() == [1.0, 1.0]
    assert sorted(explainer.importance_["rank"]) == list(range(1, 9))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pruned_rules_lose_less_than_a_point(seed):
    explainer, x, _ = fitted(seed)
    whole = explainer.rules(max_rules=None, prune=False)
    short = explainer.rules(max_rules=None)
    assert len(short) <= len(whole)
    assert sum(len(rule.conditions) for rule in short) <= sum(len(rule.conditions) for rule in whole)
    assert min(rule.purity for rule in short) >= min(rule.purity for rule in whole) - 0.01
    weights = [rule.support * rule.purity for rule in short]
    assert weights == sorted(weights, reverse=True)
    assert np.stack([rule.holds(x[:300]) for rule in short]).any(axis=0).all()
    listed = explainer.rule_list(5)
    assert len(listed.rules) <= 5
    assert set(listed.predict(x)) <= {0, 1, 2}
    assert str(listed).endswith(f"otherwise {listed.default}")


def test_repeated_columns_are_found_together_and_picked_apart():
    x = table(300, 5)
    x[:, 1] = x[:, 0] + 0.01 * table(300, 1, 9)[:, 0]
    f = logistic([[1.0, -1.0], [1.0, -1.0], [0.6, -0.6], [0.0, 0.0], [0.0, 0.0]])
    plain = SurrogateExplainer(k=2, redundancy="none", seed=0).fit(f, x[:150], x[150:])
    apart = SurrogateExplainer(k=2, seed=0).fit(f, x[:150], x[150:])
    assert set(plain.columns_) == set(apart.top_) == {0, 1}
    assert set(apart.columns_) in ({0, 2}, {1, 2})
    assert plain.clusters_ == ((0, 1),) or plain.clusters_ == ((1, 0),)
    assert correlation_clusters(x, np.array([2, 3])) == ()
    assert pick_apart(np.array([0.0, 0.0, 0.0, 0.0, 1.0]), x, np.arange(5), 5)[0] == 4


def test_wide_tables_are_screened_first():
    rng = np.random.default_rng(0)
    weights = np.zeros((700, 2))
    weights[[3, 77, 400]] = [[2, -2], [-2, 2], [1.5, -1.5]]
    x, f = rng.normal(size=(300, 700)), logistic(weights)
    rows = {"asked": 0}

    def counted(x):
        rows["asked"] += len(x)
        return f(x)

    explainer = SurrogateExplainer(k=3, screen=50, repeats=2, seed=0).fit(counted, x[:200], x[200:])
    assert set(explainer.top_) == {3, 77, 400}
    assert int(explainer.importance_["permutation"].notna().sum()) == 50
    assert rows["asked"] <= 200 + 100 * 2 + 700 * 64 + 50 * 3 * 100
    assert any("50 of 700" in note for note in explainer.notes_)
    net = nn.Linear(700, 2)
    with torch.no_grad():
        net.weight.copy_(torch.as_tensor(weights.T))
    assert set(SurrogateExplainer(k=3, seed=0).fit(net, x[:200], x[200:]).top_) == {3, 77, 400}


def test_k_is_chosen_on_the_validation_rows():
    explainer, x, _ = fitted(k="auto", d=12, surrogate="ridge")
    assert explainer.curve_.dimensions == (5, 10, 12)
    best = explainer.curve_.mean.max()
    assert explainer.curve_.mean[explainer.curve_.dimensions.index(explainer.k_)] >= best - 0.02
    curve = explainer.fidelity_curve([1, 5, 12], X=x[400:], surrogates=("tree", "ridge"))
    assert curve.shape == (6, 5)
    ridge = curve[curve["surrogate"] == "ridge"]["r2"].to_numpy()
    assert ridge[-1] > ridge[0]
    assert len(explainer.top_) == len(explainer.columns_) == explainer.k_
    few, x, _ = fitted(k="auto", d=2)
    assert few.k_ == 2
    one = SurrogateExplainer(seed=0).fit(logistic([[1.0, -1.0]]), x[:200, :1], x[200:, :1])
    assert one.k_ == 1
    assert one.counterfactual(x[0, :1]).flips_surrogate


def test_all_copies_are_fitted_and_the_best_is_named():
    explainer, x, _ = fitted(surrogate="all")
    r2 = {name: explainer.fidelity(x[300:400], surrogate=name).r2 for name in explainer.surrogates_}
    assert set(r2) == {"tree", "forest", "boosting", "extra", "ridge"}
    assert explainer.surrogate_ == max(r2, key=r2.get)
    hard, x, _ = fitted(targets="hard")
    assert set(np.unique(hard._copy("tree", hard.columns_).model.tree_.value.round(9)[0])) - {0, 1}
    assert hard.fidelity(x[400:]).agreement > 0.5


# ---- kinds of models and tables


def test_a_rule_list_follows_the_black_box_and_counts_what_is_left():
    x, y = load_breast_cancer(return_X_y=True)
    model = RandomForestClassifier(30, random_state=0).fit(x[:280], y[:280])
    explainer = SurrogateExplainer(k=10, seed=0).fit(model, x[:280], x[280:380], y[280:380])
    listed, said = explainer.rule_list(), model.predict(x[380:])
    assert (listed.predict(x[380:]) == said).mean() > max(said.mean(), 1 - said.mean()) + 0.15
    answer = model.predict_proba(x[:280]).argmax(axis=1)
    left, unseen = np.ones(280, dtype=bool), np.ones(100, dtype=bool)
    for rule in listed.rules:
        assert rule.conditions
        met, seen = left & rule.holds(x[:280]), unseen & rule.holds(x[280:380])
        assert rule.support == met.sum()
        assert rule.purity == pytest.approx((answer[met] == rule.index).mean())
        assert rule.purity > 0.5
        assert rule.precision == (pytest.approx((y[280:380][seen] == rule.index).mean()) if seen.any() else None)
        left, unseen = left & ~met, unseen & ~seen
    assert len(explainer.rule_list(1).rules) == 1
    with pytest.raises(InputError, match="max_rules"):
        explainer.rule_list(0)
    frame = pd.DataFrame(x, columns=explainer.features_)
    turned = frame[frame.columns[::-1]]
    assert np.array_equal(listed.predict(frame), listed.predict(x))
    assert np.array_equal(listed.predict(turned), listed.predict(x))


def test_frames_names_and_classes_go_through():
    bunch = load_breast_cancer(as_frame=True)
    x, y = bunch.data, bunch.target_names[bunch.target]
    model = RandomForestClassifier(20, random_state=0).fit(x[:300], y[:300])
    explainer = SurrogateExplainer(k=5, seed=0).fit(model, x[:300], x[300:450], y[300:450])
    assert explainer.features_ == list(x.columns)
    assert set(explainer.classes_) == {"benign", "malignant"}
    found = explainer.fidelity(x[450:], y[450:])
    assert found.r2 > 0.6
    assert found.accuracy_black_box > 0.9
    assert None not in (found.mcc_surrogate, found.f1_surrogate, found.accuracy_surrogate)
    rules = explainer.rules("malignant")
    assert {rule.class_ for rule in rules} == {"malignant"}
    assert all(str(rule).startswith("if ") and "\n" not in str(rule) for rule in rules)
    assert "then malignant (" in str(rules[0])
    assert rules[0].precision is not None
    local = explainer.explain(x.iloc[500])
    assert local.prediction in ("benign", "malignant")
    assert local.agrees == (local.prediction == local.black_box)
    assert str(local.prediction) in str(local)
    assert len(local.alternatives) == 1
    feature = explainer.features_[explainer.columns_[0]]
    answers = explainer.what_if(x.iloc[500], [{feature: 0.0}, {feature: 1e4}])
    assert answers["edit"].tolist()[0] == "as it is"
    assert len(answers) == 3
    written = json.loads(json.dumps(explainer.to_json(), allow_nan=False))
    assert written["k"] == 5
    assert written["rules"][0]["text"] == str(explainer.rules()[0])
    turned = x[x.columns[::-1]]  # columns are found by name, never by place
    assert explainer.fidelity(turned[450:]) == explainer.fidelity(x[450:])
    for row in (x.iloc[500][::-1], turned.iloc[[500]], x.iloc[500].to_numpy()):
        assert explainer.explain(row) == local
    with pytest.raises(InputError, match="more than one mean area"):
        SurrogateExplainer(k=1).fit(model, x.rename(columns={"mean radius": "mean area"}), x)
    with pytest.raises(InputError, match="lacks the columns"):
        explainer.fidelity(x[x.columns[:3]])


def test_a_model_of_a_data_frame_takes_its_columns_by_name_or_by_place():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(200, 3)), columns=list("abc"))
    model = RandomForestClassifier(10, random_state=0).fit(frame, frame["b"] > 0)
    for train, val, names in (
        (frame[:120], frame[120:], None),
        (frame[:120][list("cab")], frame[120:], None),
        (frame[:120], frame[120:], ["one", "two", "three"]),
        (frame.to_numpy()[:120], frame.to_numpy()[120:], None),
    ):
        explainer = SurrogateExplainer(k=1, feature_names=names).fit(model, train, val)
        assert explainer.features_[explainer.top_[0]] in ("b", "two", "x1")
    with pytest.raises(ModelError, match="fitted on 3 columns"):
        SurrogateExplainer(k=1).fit(model, frame.to_numpy()[:120, :2], frame.to_numpy()[120:, :2])


def test_a_regression_is_copied_too():
    x = table(400, 6)
    y = 2 * x[:, 1] + np.sign(x[:, 4])
    model = RandomForestRegressor(20, random_state=0).fit(x[:200], y[:200])
    explainer = SurrogateExplainer(k=2, seed=0).fit(model, x[:200], x[200:300], y[200:300])
    assert set(explainer.top_) == {1, 4}
    assert explainer.fidelity(x[300:], y[300:]).r2 > 0.8
    rule = explainer.rules()[0]
    assert rule.class_ is None
    assert f"then {rule.value:.4g} (" in str(rule)
    local = explainer.explain(x[350])
    assert isinstance(local.prediction, float)
    assert explainer.comprehensiveness(x[300:])[0] > explainer.comprehensiveness(x[300:], columns=[0, 2])[0]
    with pytest.raises(InputError, match="classes"):
        explainer.counterfactual(x[0])
    with pytest.raises(InputError, match="values"):
        explainer.rule_list()
    with pytest.raises(InputError, match="class_"):
        explainer.rules("a")


def test_a_network_that_memorised_has_no_faithful_copy():
    x = table(200, 30)
    y = np.random.default_rng(1).integers(0, 2, 200)
    model = RandomForestClassifier(50, random_state=0).fit(x[:100], y[:100])
    explainer = SurrogateExplainer(k=5, seed=0).fit(model, x[:100], x[100:150], y[100:150])
    trained, held = explainer.fidelity(x[:100]).r2, explainer.fidelity(x[150:]).r2
    assert trained > 0.5 > 0.2 > held


@pytest.mark.parametrize("attention", ["full", "diagonal", "low-rank"])
def test_the_attention_network_learns_and_its_attention_is_a_vote(attention):
    torch.manual_seed(0)
    x = torch.randn(400, 10)
    y = (x[:, 2] > 0).long()
    net = SelfAttentionNetwork(10, 2, heads=2, hidden=16, attention=attention)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    assert torch.allclose(net.attention_weights(x).sum(dim=1), torch.ones(400), atol=1e-5)
    explainer = SurrogateExplainer(k=1, scores=("attention", "permutation", "gradient"), seed=0)
    explainer.fit(net, x[:200], x[200:300], y[200:300])
    assert explainer.top_.tolist() == [2]
    assert explainer.importance_["attention"].sum() == pytest.approx(1, abs=1e-4)
    assert explainer.overlap_.shape == (3, 3)


@pytest.mark.parametrize("d", [7, 20, 33])
def test_the_autoencoder_gives_back_the_shape_and_its_loss_falls(d):
    torch.manual_seed(0)
    net, x, y = ConvAutoencoderClassifier(d, 3, code=8), torch.randn(60, d), torch.randint(3, (60,))
    assert net.decode(net.encode(x)).shape == x.shape
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    before = net.loss(x, y).item()
    for _ in range(30):
        optimizer.zero_grad()
        net.loss(x, y).backward()
        optimizer.step()
    assert net.loss(x, y).item() < before
    net.eval()
    code = net.encode(x)
    by_hand = ((net.decode(code) - x) ** 2).mean() * 2 + nn.functional.cross_entropy(net.classify(code), y)
    assert net.loss(x, y, weight=2.0).item() == pytest.approx(by_hand.item(), rel=1e-5)


# ---- errors


def test_what_cannot_be_done_is_said():
    x, f = table(), logistic(np.eye(8, 2))
    for k in (0, 9, -1, 2.5, "many", True):
        with pytest.raises(InputError, match="k must"):
            SurrogateExplainer(k=k).fit(f, x[:200], x[200:])
    for name, value in (
        ("surrogate", "net"), ("replacement", "mean"), ("redundancy", "some"), ("targets", "x"), ("scores", ()),
        ("scores", ("shap",)), ("scores", "gradient"), ("repeats", 0), ("feature_names", ["a"]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="feature names" if name == "feature_names" else name):
            SurrogateExplainer(**{"k": 2, name: value}).fit(f, x[:200], x[200:])
    with pytest.raises(ValueError, match="X_val is X_train"):
        SurrogateExplainer(k=2).fit(f, x, x.copy())
    with pytest.warns(OverlapWarning, match="100 of 300"):
        SurrogateExplainer(k=2, seed=0).fit(f, x[:200], x[100:])
    with pytest.raises(InputError, match="table"):
        SurrogateExplainer(k=2).fit(f, x[0], x[1])
    with pytest.raises(InputError, match="7 columns"):
        SurrogateExplainer(k=2).fit(f, x[:200], x[200:, :7])
    with pytest.raises(InputError, match="infinite"):
        SurrogateExplainer(k=2).fit(f, np.where(x > 3, np.inf, x), x[200:] + 1)
    with pytest.raises(InputError, match="numbers"):
        SurrogateExplainer(k=2).fit(f, x[:200].astype(str), x[200:])
    with pytest.raises(InputError, match="numbers"):
        SurrogateExplainer(k=2).fit(f, pd.DataFrame({"a": ["u", "v"], "b": [1, 2]}), x[200:])
    with pytest.raises(InputError, match="labels 7"):
        SurrogateExplainer(k=2).fit(f, x[:200], x[200:], np.full(200, 7))
    with pytest.raises(InputError, match="one label a row"):
        SurrogateExplainer(k=2).fit(f, x[:200], x[200:], np.zeros(3))
    explainer, x, _ = fitted()
    with pytest.raises(InputError, match="already"):
        explainer.counterfactual(x[0], explainer.explain(x[0]).prediction)
    with pytest.raises(InputError, match="target"):
        explainer.counterfactual(x[0], "none")
    with pytest.raises(InputError, match="one row"):
        explainer.explain(x[:2])
    with pytest.raises(InputError, match="every k"):
        explainer.fidelity_curve([9])
    with pytest.raises(InputError, match="no surrogate"):
        explainer.fidelity(x, surrogate="forest")
    with pytest.raises(InputError, match="no feature"):
        explainer.what_if(x[0], [{"nothing": 1.0}])
    with pytest.raises(InputError, match="columns must"):
        explainer.sufficiency(x, columns=[8])
    with pytest.raises(InputError, match="surrogate must"):
        fit_surrogate("net", x, x[:, :1], np.arange(2))


def test_outputs_that_are_no_probabilities_are_refused_or_put_through_a_softmax():
    x = table()
    scores = lambda x: x[:, :3]
    with pytest.raises(NotProbabilitiesError, match="logits=True"):
        SurrogateExplainer(k=2).fit(scores, x[:200], x[200:])
    found = BlackBox(scores, logits=True)(x)
    assert np.allclose(found, np.exp(x[:, :3]) / np.exp(x[:, :3]).sum(axis=1, keepdims=True))
    SurrogateExplainer(k=2, logits=True, seed=0).fit(scores, x[:200], x[200:])
    with pytest.raises(NotProbabilitiesError, match="not finite"):
        SurrogateExplainer(k=2).fit(lambda x: np.full((len(x), 2), np.nan), x[:200], x[200:])
    words = LinearSVC().fit(x, np.where(x[:, 0] > 0, "a", "b"))
    with pytest.raises(NotProbabilitiesError, match="predict_proba"):
        SurrogateExplainer(k=2).fit(words, x[:200], x[200:])
    with pytest.raises(ModelError, match="expected"):
        SurrogateExplainer(k=2).fit(3, x[:200], x[200:])
    one = nn.Linear(8, 1)
    p = BlackBox(one, logits=True)(x)
    assert np.allclose(p[:, 1], torch.sigmoid(one(torch.as_tensor(x).float()))[:, 0].detach().numpy())
    assert BlackBox(one)(x).shape == (400, 1)
    soft = nn.Sequential(nn.Linear(8, 3), nn.Softmax(dim=1))
    assert np.allclose(BlackBox(soft)(x), soft(torch.as_tensor(x).float()).detach().numpy())
    with pytest.raises(NotProbabilitiesError):
        BlackBox(nn.Linear(8, 3), logits=False)(x)


def test_a_constant_black_box_has_no_r2_but_agreement():
    x = table()
    constant = lambda x: np.tile([0.7, 0.3], (len(x), 1))
    for k in (2, "auto"):
        explainer = SurrogateExplainer(k=k, seed=0).fit(constant, x[:200], x[200:300])
        with pytest.warns(ConstantModelWarning, match="undefined"):
            found = explainer.fidelity(x[300:])
        assert np.isnan(found.r2)
        assert found.agreement == 1.0
        assert str(explainer.rules()[0]) == "always, then 0 (200 rows, 100%)"
        with pytest.raises(InputError, match="no leaf"):
            explainer.counterfactual(x[0])


def test_missing_values_are_for_boosting():
    x = table()
    x[::7, 2] = np.nan
    y = (x[:, 0] > 0).astype(int)
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(x[:200], y[:200])
    with pytest.raises(ValueError, match="x2"):
        SurrogateExplainer(k=3).fit(model, x[:200], x[200:])
    with pytest.raises(ValueError, match="in b"):
        SurrogateExplainer(k=3).fit(model, pd.DataFrame(x[:200], columns=list("acbdefgh")), x[200:])
    explainer = SurrogateExplainer(k=3, surrogate="boosting", seed=0).fit(model, x[:200], x[200:300], y[200:300])
    assert explainer.top_[0] == 0
    assert explainer.fidelity(x[300:]).r2 > 0.8
    with pytest.raises(InputError, match="without missing"):
        explainer.rules()


def test_gradients_that_are_not_there_are_left_out():
    class Steps(nn.Module):
        def forward(self, x):
            return torch.stack([(x[:, 0] > 0).float(), (x[:, 0] <= 0).float()], dim=1)

    x = table()
    explainer = SurrogateExplainer(k=1, seed=0).fit(Steps(), x[:200], x[200:])
    assert explainer.top_.tolist() == [0]
    assert "not differentiable" in explainer.notes_[0]
    assert "gradient" not in explainer.importance_
    for model in (Steps(), LinearRegression().fit(x, x[:, 0])):
        with pytest.raises(ModelError, match="no score is left"):
            SurrogateExplainer(k=1, scores=("gradient", "attention")).fit(model, x[:200], x[200:])


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="diagonal"):
        SelfAttentionNetwork(20_000, 2)
    with pytest.raises(InputError, match="attention"):
        SelfAttentionNetwork(5, 2, attention="none")
    with pytest.raises(InputError, match="classes"):
        SelfAttentionNetwork(5, 1)
    with pytest.raises(InputError, match="code"):
        ConvAutoencoderClassifier(5, 2, code=0)
