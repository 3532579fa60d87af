import importlib.util
import itertools
import json
import warnings
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe
from theodolite.explanations import graph_fidelity as gf
from theodolite.explanations.graph_fidelity import (
    GCN,
    GIN,
    DropEdges,
    EdgeWeightIgnoredError,
    Graph,
    UnsupportedTaskError,
    alpha_sweep,
    ba_2motifs,
    characterization_score,
    coherence,
    edge_saliency,
    engine,
    fidelity_table,
    load_mutag,
    rewired,
    robust_fidelity,
    train_on_graphs,
    train_on_nodes,
    tree_cycles,
    tree_grid,
)
from theodolite.explanations.graph_fidelity.agreement import _spearman, candidates
from theodolite.explanations.graph_fidelity.engine import Scorer
from theodolite.explanations.graph_fidelity.graph import explained_pairs
from theodolite.explanations.graph_fidelity.scores import Scheme, removals

QUICK = settings(max_examples=25, deadline=None)
needs_pyg = pytest.mark.skipif(
    importlib.util.find_spec("torch_geometric") is None,
    reason="needs torch_geometric: pip install 'theodolite[graphs]'",
)


def network(kind=GCN, features=2, seed=0, **options):
    model = kind(seed=seed, hidden=8, **options)
    model.materialize(features)
    return model.double().eval()


def random_graph(seed, n=7, m=10, features=2):
    x = np.random.default_rng(seed).normal(size=(n, features)) * 2
    return Graph.from_networkx(nx.gnm_random_graph(n, m, seed=seed), x)


def edges_of(graph):
    return [(int(u), int(v)) for u, v in graph.ends]


def by_hand(model, graph, kept):
    a = torch.zeros(1, graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    for u, v in kept:
        a[0, u, v] = a[0, v, u] = 1
    with torch.no_grad():
        return model(a, torch.ones(1, graph.num_nodes, dtype=torch.bool), graph.x[None]).softmax(-1)[0].numpy()


def pyg(*names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [importlib.import_module(name) for name in names]


# ---- the oracle


@pytest.mark.parametrize("kind", [GCN, GIN])
def test_ordinary_scores_are_direct_deletion(kind):
    model, graph = network(kind), random_graph(1)
    every, chosen = set(edges_of(graph)), set(edges_of(graph)[:4])
    found = robust_fidelity(model, graph, list(chosen), label=1, alpha1=1, alpha2=0)
    whole, without, alone = (by_hand(model, graph, kept)[1] for kept in (every, every - chosen, chosen))
    assert found.plus == pytest.approx(whole - without, abs=1e-12)
    assert found.minus == pytest.approx(whole - alone, abs=1e-12)
    assert (found.ordinary_plus, found.ordinary_minus) == (found.plus, found.minus)
    assert found.delta == found.ordinary_delta == found.plus - found.minus
    assert (found.plus_se, found.minus_se, found.delta_se) == (0, 0, 0)
    assert found.sparsity == pytest.approx(0.6)
    assert found.probability == pytest.approx(whole)


def test_exact_expectations_are_the_sum_over_all_subsets():
    model, graph = network(), random_graph(2)
    chosen = edges_of(graph)[:6]
    rest = edges_of(graph)[6:]
    found = robust_fidelity(model, graph, chosen, label=0, alpha1=0.3, alpha2=0.6, sampling="exact")
    whole = by_hand(model, graph, edges_of(graph))[0]
    for side, share, value in ((chosen, 0.3, found.plus), (rest, 0.4, found.minus)):
        total = 0.0
        for size in range(len(side) + 1):
            for gone in itertools.combinations(side, size):
                p = by_hand(model, graph, set(edges_of(graph)) - set(gone))[0]
                total += share**size * (1 - share) ** (len(side) - size) * p
        assert value == pytest.approx(whole - total, abs=1e-12)
    drawn = robust_fidelity(model, graph, chosen, label=0, alpha1=0.3, alpha2=0.6, n_samples=20_000)
    assert abs(drawn.plus - found.plus) <= 4 * drawn.plus_se
    assert abs(drawn.minus - found.minus) <= 4 * drawn.minus_se
    assert found == robust_fidelity(model, graph, chosen, label=0, alpha1=0.3, alpha2=0.6, sampling="exact", seed=9)


def test_standard_errors_are_those_of_repeated_draws():
    model, graph = network(), random_graph(3)
    runs = [robust_fidelity(model, graph, edges_of(graph)[:5], alpha1=0.4, alpha2=0.5, seed=s) for s in range(200)]
    for name in ("plus", "minus", "delta"):
        spread = np.std([getattr(run, name) for run in runs])
        assert spread == pytest.approx(np.mean([getattr(run, f"{name}_se") for run in runs]), rel=0.2)


def test_count_removes_exactly_so_many():
    rng = np.random.default_rng(0)
    subsets = np.array([[True] * 5 + [False] * 7, [True] * 10 + [False] * 2])
    scheme = Scheme(n_samples=20, sampling="count")
    gone = removals(subsets, 0.1, scheme, rng, kept=False)
    assert (~gone.keep).sum(axis=1).tolist() == [1] * 40
    assert not (~gone.keep & ~subsets[gone.owner]).any()
    left = removals(~subsets, 0.9, scheme, rng, kept=True)  # 7 and 2 edges, of which 6 and 2 stay
    assert (~left.keep).sum(axis=1).tolist() == [1] * 20 + [0] * 20
    assert left.keep[left.owner == 0][:, :5].all()


def test_explanation_edges_stay_in_every_sample_of_minus_and_pairs_fall_together():
    graph, seen = random_graph(4), []

    def model(A, node_mask, x):
        seen.append(A.clone())
        return torch.stack([A.sum(dim=(1, 2)), A.sum(dim=(1, 2)) * 0], dim=1) * 0.1

    chosen = edges_of(graph)[:3]
    robust_fidelity(model, graph, chosen, label=0, alpha1=0.0, alpha2=0.3, n_samples=200)
    a = torch.cat(seen[3:])  # after the probe's three
    assert torch.equal(a, a.transpose(1, 2))
    kept = torch.stack([a[:, u, v] for u, v in chosen]).bool()
    others = torch.stack([a[:, u, v] for u, v in edges_of(graph)[3:]]).bool()
    # one graph, the ordinary Fid+, has lost the explanation and kept all else
    lost = ~kept.all(dim=0)
    assert int(lost.sum()) == 1
    assert bool(others[:, lost].all())


def test_shares_are_kept_per_undirected_edge():
    subsets = np.ones((1, 10), dtype=bool)
    gone = removals(subsets, 0.3, Scheme(n_samples=4000), np.random.default_rng(0), kept=False)
    assert (~gone.keep).mean() == pytest.approx(0.3, abs=0.01)


def test_degrees_are_worked_out_anew():
    graph = Graph.from_networkx(nx.star_graph(3), np.array([[1.0], [2.0], [3.0], [4.0]]))
    model = network(GCN, features=1, layers=1, readout="node")
    found = robust_fidelity(model, graph, [(0, 1)], label=0, target_node=0, alpha1=1.0, alpha2=0.0)
    with torch.no_grad():
        h = (1 / 3) * 1.0 + sum(x / (3**0.5 * 2**0.5) for x in (3.0, 4.0))  # degrees 3 and 2 with self-loops
        layer = model.layers[0]
        p = model.head(torch.relu(layer(torch.tensor([[h]], dtype=torch.float64)))).softmax(-1)[0, 0]
    assert found.probability - found.plus == pytest.approx(float(p), abs=1e-12)


# ---- identities, on any input


@QUICK
@given(seed=st.integers(0, 10_000), size=st.integers(0, 10), alpha=st.sampled_from([0.0, 0.1, 0.5, 0.83, 1.0]))
def test_the_complement_mirrors_the_explanation(seed, size, alpha):
    model, graph = network(), random_graph(seed)
    order = np.random.default_rng(seed).permutation(10)
    every = edges_of(graph)
    chosen, rest = [every[i] for i in order[:size]], [every[i] for i in order[size:]]
    plus = robust_fidelity(model, graph, rest, label=1, alpha1=alpha, sampling="exact")
    minus = robust_fidelity(model, graph, chosen, label=1, alpha2=1 - alpha, sampling="exact")
    assert plus.plus == pytest.approx(minus.minus, abs=1e-9)
    assert plus.ordinary_plus == pytest.approx(minus.ordinary_minus, abs=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000), size=st.integers(0, 10), form=st.sampled_from(["probability", "accuracy"]))
def test_nothing_removed_is_nothing_lost(seed, size, form):
    model, graph = network(GIN), random_graph(seed)
    found = robust_fidelity(model, graph, edges_of(graph)[:size], alpha1=0, alpha2=1, form=form, seed=seed)
    assert (found.plus, found.minus, found.delta) == (0, 0, 0)
    assert -1 <= found.ordinary_plus <= 1
    if form == "accuracy":  # of the predicted label: 1 before, 0 or 1 after
        assert found.ordinary_plus in (0, 1)
        assert found.ordinary_minus in (0, 1)


def test_a_constant_network_scores_nothing():
    def constant(A, node_mask, x):
        return torch.tensor([[0.3, -1.0]]).repeat(len(A), 1)

    found = robust_fidelity(constant, random_graph(1), [], label=0)
    for score in (found.plus, found.minus, found.ordinary_plus, found.ordinary_minus):
        assert score == pytest.approx(0, abs=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000))
def test_dense_batches_and_lists_of_edges_agree(seed):
    graph = random_graph(seed, n=9, m=12)
    for kind, readout in itertools.product((GCN, GIN), ("max", "maxmean", "mean", "node")):
        model = network(kind, readout=readout, seed=seed)
        scorer = Scorer(model, graph, 3 if readout == "node" else None)
        keep = torch.from_numpy(np.random.default_rng(seed).random((4, 12)) < 0.6).double()
        with torch.no_grad():
            dense = scorer.logits(keep)
            scorer.dense = False
            assert torch.allclose(scorer.logits(keep), dense, atol=1e-10)


def test_a_large_graph_goes_by_lists_of_edges():
    graph = Graph.from_networkx(nx.random_labeled_tree(engine.LARGEST_DENSE + 50, seed=0))
    model = network(GIN, features=1)
    scorer = Scorer(model, graph)
    assert not scorer.dense
    found = robust_fidelity(model, graph, edges_of(graph)[:20], n_samples=10)
    assert found.plus_se > 0 or found.plus == 0
    # in chunks or in one go, the same
    keep = np.random.default_rng(0).random((30, scorer.n_pairs)) < 0.5
    whole, _ = scorer.probabilities(keep)
    engine._STEP_BYTES, before = 1 << 12, engine._STEP_BYTES
    try:
        assert np.allclose(scorer.probabilities(keep)[0], whole, atol=1e-12)
    finally:
        engine._STEP_BYTES = before


def test_equal_graphs_are_shown_once():
    scorer = Scorer(network(), random_graph(1))
    keep = np.ones((50, 10), dtype=bool)
    keep[7, 3] = False
    found, seen = scorer.probabilities(keep)
    assert seen == 2
    assert len(np.unique(found[:, 0])) == 2
    assert found[7, 0] != found[0, 0]


# ---- inputs of other forms


def test_models_of_every_form_give_the_same():
    graph, inner = random_graph(5), network(GIN)

    def by_name(x, edge_index, batch=None, edge_weight=None):
        return inner.forward_edges(x, edge_index, edge_weight, batch)

    def by_place(features, ei, w, which):
        return inner.forward_edges(features, ei, w, which)

    def dense(adjacency, there, features):
        return inner(adjacency, there, features)

    class Bare(nn.Module):
        def forward(self, x, edge_index, batch):
            return inner.forward_edges(x, edge_index, x.new_ones(edge_index.shape[1]), batch)

    expected = robust_fidelity(inner, graph, edges_of(graph)[:4])
    for model in (by_name, by_place, dense, DropEdges(Bare())):
        found = robust_fidelity(model, graph, edges_of(graph)[:4])
        assert found.delta == pytest.approx(expected.delta, abs=1e-10)
        assert found.ordinary_delta == pytest.approx(expected.ordinary_delta, abs=1e-10)


def test_explanations_of_every_form_are_the_same_edges():
    graph = random_graph(6)
    chosen = edges_of(graph)[2:5]
    mask = torch.tensor([(u, v) in chosen or (v, u) in chosen for u, v in graph.edge_index.T.tolist()])
    soft = mask.double() * 0.5 + torch.linspace(0, 0.3, 20)
    forms = [
        (chosen, {}), ([(v, u) for u, v in chosen], {}), (set(chosen), {}), (np.array(chosen), {}), (mask, {}),
        (mask.float(), {}), (mask.numpy(), {}), (mask.tolist(), {}), (SimpleNamespace(edge_mask=mask.float()), {}),
        (soft, {"threshold": 0.4}), (soft, {"top_k": 3}),
    ]  # fmt: skip
    for form, options in forms:
        assert explained_pairs(graph, form, **options).nonzero()[0].tolist() == [2, 3, 4]


def test_directed_graphs_keep_their_directions():
    graph = Graph.from_networkx(nx.DiGraph([(0, 1), (1, 0), (1, 2)]))
    assert not graph.undirected
    assert len(graph.ends) == 3
    assert explained_pairs(graph, [(1, 0)]).tolist() == [False, True, False]

    def model(A, node_mask, x):
        return torch.stack([A[:, 2, 1] * 3, A[:, 0, 1] + A[:, 1, 0]], dim=1)

    assert robust_fidelity(model, graph, [(1, 2)], label=0).ordinary_plus > 0.3
    assert not Graph.from_dense([[0, 1], [0, 0]] @ np.eye(2)).undirected
    assert Graph.from_dense(np.array([[0, 1], [0, 0]])).edge_index.tolist() == [[1], [0]]
    assert Graph.from_dense(np.array([[0, 1], [1, 0]])).undirected


def test_self_loops_are_never_dropped():
    edges = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, 2, 1]])
    graph = Graph(torch.ones(3, 1), edges)
    assert graph.pair.tolist() == [-1, 0, 0, 1, 1]

    def model(A, node_mask, x):
        assert (A[:, 0, 0] == 1).all()
        return torch.stack([A.sum(dim=(1, 2)), A[:, 0, 0]], dim=1)

    found = robust_fidelity(model, graph, torch.tensor([1, 1, 1, 0, 0]), label=0)
    assert found.sparsity == 0.5


def test_hops_leave_the_scores_of_the_whole_graph():
    graph = Graph.from_networkx(nx.random_labeled_tree(40, seed=3), np.random.default_rng(0).normal(size=(40, 2)))
    model = network(GCN, layers=2, readout="node")
    chosen = [edge for edge in edges_of(graph) if 5 in edge]
    whole = robust_fidelity(model, graph, chosen, label=1, target_node=5, alpha1=0.5)
    near = robust_fidelity(model, graph, chosen, label=1, target_node=5, alpha1=0.5, hops=2)
    assert near.probability == pytest.approx(whole.probability, abs=1e-12)
    assert near.ordinary_plus == pytest.approx(whole.ordinary_plus, abs=1e-12)
    assert near.sparsity < whole.sparsity
    steps = nx.single_source_shortest_path_length(nx.Graph(edges_of(graph)), 5)
    inside = [edge for edge in edges_of(graph) if max(steps[edge[0]], steps[edge[1]]) <= 2]
    assert near.sparsity == pytest.approx(1 - len(chosen) / len(inside))


@needs_pyg
def test_torch_geometric_models_data_and_explanations_work_as_they_are():
    gnn, data, explain = pyg("torch_geometric.nn", "torch_geometric.data", "torch_geometric.explain")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = gnn.GCNConv(2, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x, edge_index, edge_weight=None, batch=None):
            return self.head(gnn.global_max_pool(self.conv(x, edge_index, edge_weight).relu(), batch))

    torch.manual_seed(0)
    model, graph = Network().double(), random_graph(7)
    made = data.Data(x=graph.x, edge_index=graph.edge_index)
    explainer = explain.Explainer(
        model.eval(), algorithm=explain.GNNExplainer(epochs=3), explanation_type="model", edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"},
    )  # fmt: skip
    explanation = explainer(graph.x, graph.edge_index)
    model.train()
    found = robust_fidelity(model, made, explanation, top_k=4)
    assert model.training
    assert found.sparsity == pytest.approx(0.6)
    mine = network(GCN, layers=1)
    with torch.no_grad():
        mine.layers[0].weight.copy_(model.conv.lin.weight)
        mine.layers[0].bias.copy_(model.conv.bias)
        mine.head.load_state_dict(model.head.state_dict())
    same = robust_fidelity(mine, graph, explanation, top_k=4)
    assert found.delta == pytest.approx(same.delta, abs=1e-10)
    with pytest.raises(InputError, match="soft mask"):
        robust_fidelity(model, made, explanation)
    nodes = gnn.GCN(2, 8, num_layers=2, out_channels=3).double()
    assert robust_fidelity(nodes, made, edges_of(graph)[:3], target_node=0).n_forward > 3
    with pytest.raises(
        EdgeWeightIgnoredError, match="DropEdges"
    ):  # torch_geometric's GIN takes edge_weight and drops it
        robust_fidelity(gnn.GIN(2, 8, num_layers=2, out_channels=3).double(), made, edges_of(graph)[:3], target_node=0)


# ---- tables and sweeps


def test_a_table_has_a_row_a_graph():
    model, graphs = network(), [random_graph(s) for s in range(3)]
    masks = [edges_of(g)[: i + 2] for i, g in enumerate(graphs)]
    table = fidelity_table(model, graphs, masks, torch.tensor([0, 1, 0]), sampling="exact")
    assert isinstance(table, pd.DataFrame)
    for i in range(3):
        one = robust_fidelity(model, graphs[i], masks[i], label=[0, 1, 0][i], sampling="exact")
        assert table.loc[i, "delta"] == pytest.approx(one.delta)
        assert table.loc[i, "characterization"] == characterization_score(one.ordinary_plus, one.ordinary_minus)
    with pytest.raises(InputError, match="graph 1: the explanation names edge"):
        fidelity_table(model, graphs, [masks[0], [(0, 99)], masks[2]])
    with pytest.raises(InputError, match="one explanation a graph"):
        fidelity_table(model, graphs, masks[:2])
    with pytest.raises(InputError, match="labels"):
        fidelity_table(model, graphs, masks, [0])


def test_a_sweep_ends_at_the_ordinary_scores():
    model, graph = network(), random_graph(8)
    table = alpha_sweep(model, graph, edges_of(graph)[:4], [0.0, 0.5, 1.0], [1.0, 0.0], label=0)
    one = robust_fidelity(model, graph, edges_of(graph)[:4], label=0)
    assert table[["alpha1", "alpha2"]].to_numpy().tolist() == [[a, b] for a in (0.0, 0.5, 1.0) for b in (1.0, 0.0)]
    assert table["delta"].iloc[-1] == pytest.approx(one.ordinary_delta, abs=1e-12)
    assert (table["plus"].iloc[0], table["minus"].iloc[0]) == (0, 0)
    with pytest.raises(InputError, match="alpha1"):
        alpha_sweep(model, graph, [], [1.5])


@needs_pyg
@QUICK
@given(plus=st.floats(0.01, 1), minus=st.floats(-0.5, 0.99), weight=st.sampled_from([0.25, 0.5, 0.75]))
def test_characterization_is_torch_geometrics(plus, minus, weight):
    (metric,) = pyg("torch_geometric.explain.metric")
    theirs = metric.characterization_score(torch.tensor(plus), torch.tensor(minus), weight, 1 - weight)
    assert characterization_score(plus, minus, plus_weight=weight) == pytest.approx(float(theirs), rel=1e-4)


def test_characterization_has_no_value_below_zero():
    assert (
        characterization_score(-0.1, 0.2) == characterization_score(0.0, 0.2) == characterization_score(0.5, 1.0) == 0
    )
    with pytest.raises(InputError, match="plus_weight"):
        characterization_score(0.5, 0.5, plus_weight=1)


def test_saliency_is_the_gradient_by_finite_differences():
    model, graph = network(), random_graph(9)
    found = edge_saliency(model, graph, 1)
    scorer, step = Scorer(model, graph), 1e-6
    weight = torch.ones(10, dtype=torch.float64)
    with torch.no_grad():
        for i in range(10):
            ends = weight.clone(), weight.clone()
            ends[0][i] += step
            ends[1][i] -= step
            up, down = (scorer.logits(end[None]).softmax(-1)[0, 1] for end in ends)
            assert torch.allclose(found[graph.pair == i], (up - down) / (2 * step), atol=1e-8)
    with pytest.raises(ModelError, match="differentiated"):
        edge_saliency(lambda A, node_mask, x: A.sum(dim=(1, 2))[:, None].detach() * torch.ones(2), graph)


# ---- agreement with the truth


def ideal(graph, mask):
    """A network that counts the edges of one graph's explanation and never sees the rest."""
    pairs = edges_of(graph)
    wanted = [pairs[i] for i in explained_pairs(graph, mask).nonzero()[0]]

    def model(A, node_mask, x):
        return torch.stack([sum(A[:, u, v] for u, v in wanted), torch.zeros(len(A))], dim=1)

    return model


def test_an_ideal_network_agrees_fully_on_lost_edges():
    made = ba_2motifs(1, seed=3)
    found = coherence(
        ideal(made.graphs[0], made.explanations[0]), made.graphs, made.explanations, gold=("lost", "ratio"), labels=[0],
        n_samples=200
    )  # fmt: skip
    assert found.rho.loc["ordinary_minus", "lost"] == pytest.approx(1)
    assert found.rho.loc["minus", "lost"] > 0.9
    assert found.rho.loc["plus", "lost"] < -0.9
    assert found.surface.shape == (7, 5, 5)
    assert found.distance.shape == (2, 5, 5)
    estimate = found.estimate("delta", "ratio")
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.n == 1
    with pytest.raises(InputError, match="standards"):
        found.estimate("delta", "edit")


def test_candidates_lose_and_gain_what_they_should():
    true = np.array([True] * 5 + [False] * 10)
    sets = candidates(true, np.array([0, 0.4, 0.8]), np.random.default_rng(0)).reshape(3, 3, 15)
    assert sets[:, :, :5].sum(axis=2).tolist() == [[5] * 3, [3] * 3, [1] * 3]
    assert sets[:, :, 5:].sum(axis=2).tolist() == [[0, 4, 8]] * 3


def test_rank_correlation_is_scipys_and_0_for_a_constant():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 25)).astype(float), rng.normal(size=(3, 25))
    found = _spearman(a, b)
    for i, j in itertools.product(range(2), range(3)):
        assert found[i, j] == pytest.approx(spearmanr(a[i], b[j]).statistic)
    assert _spearman(np.ones((1, 25)), b).tolist() == [[0, 0, 0]]


def test_coherence_refuses_what_it_cannot_rank():
    made = ba_2motifs(2, seed=0)
    model = network(GIN, features=1)
    for options, words in (
        ({"grid": (0.5,)}, "two different shares"), ({"grid": (0, 2)}, "shares"), ({"gold": ("wrong",)}, "gold standards"),
        ({"labels": [0]}, "labels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            coherence(model, made.graphs, made.explanations, **options)
    with pytest.raises(InputError, match="graph 1: the true explanation holds no edge"):
        coherence(model, made.graphs, [made.explanations[0], []])
    with pytest.raises(InputError, match="one explanation a graph"):
        coherence(model, made.graphs, [])
    flat = coherence(
        lambda A, node_mask, x: torch.tensor([[1.0, 0.0]]).repeat(len(A), 1),
        made.graphs,
        made.explanations,
        n_samples=2,
    )
    assert flat.rho.loc["delta"].tolist() == [0, 0, 0]


# ---- data sets and training


def test_motifs_are_what_they_say():
    made = ba_2motifs(20, base=(6, 9), seed=1)
    assert len(made) == 20
    sizes = set()
    for graph, label, mask in zip(made.graphs, made.labels.tolist(), made.explanations, strict=True):
        motif = nx.Graph(graph.edge_index[:, mask].T.tolist())
        assert nx.is_isomorphic(motif, nx.house_graph() if label else nx.cycle_graph(5))
        whole = nx.Graph(graph.edge_index.T.tolist())
        assert nx.is_connected(whole)
        assert whole.number_of_edges() == graph.num_nodes - 1 + (2 if label else 1)
        sizes.add(graph.num_nodes - 5)
    assert sizes == {6, 7, 8, 9}
    assert len(made.part(slice(2, 5)).explanations) == 3
    for options in ({"n": 0}, {"base": (5, 4)}):
        with pytest.raises(InputError):
            ba_2motifs(**options)


@pytest.mark.parametrize(("make", "nodes", "edges"), [(tree_cycles, 6, 6), (tree_grid, 9, 12)])
def test_trees_carry_their_motifs(make, nodes, edges):
    task = make(depth=3, n_motifs=4, seed=0)
    assert task.graph.num_nodes == 15 + 4 * nodes
    assert int(task.labels.sum()) == 4 * nodes == len(task.explanations)
    for node, mask in task.explanations.items():
        assert int(mask.sum()) == 2 * edges
        assert node in task.graph.edge_index[:, mask]
    with pytest.raises(InputError):
        make(depth=0)


def test_rewiring_moves_the_motif_and_keeps_the_count():
    made = ba_2motifs(2, seed=2)
    graph, mask = made.graphs[1], made.explanations[1]
    moved = rewired(graph, mask, seed=0)
    assert moved.edge_index.shape == graph.edge_index.shape
    old = {tuple(e) for e in graph.edge_index[:, mask].T.tolist()}
    new = {tuple(e) for e in moved.edge_index.T.tolist()}
    assert not old & new
    assert {tuple(e) for e in graph.edge_index[:, ~mask].T.tolist()} <= new
    with pytest.raises(InputError, match="too few pairs"):
        rewired(Graph.from_networkx(nx.complete_graph(3)), [(0, 1)])


def test_a_network_of_nodes_learns_and_its_motif_matters():
    task = tree_cycles(depth=4, n_motifs=8, seed=0)
    model = train_on_nodes(
        GIN(readout="node", hidden=16), task.graph, task.labels, recipe=Recipe(epochs=150, batch_size=79, lr=1e-2)
    )
    nodes = [n for n in task.explanations if n % 3 == 0][:6]
    graphs, masks = [task.graph] * len(nodes), [task.explanations[n] for n in nodes]
    table = fidelity_table(model, graphs, masks, [1] * len(nodes), target_nodes=nodes, hops=3)
    assert table["probability"].mean() > 0.9
    assert table["ordinary_plus"].mean() > 0.5
    with pytest.raises(InputError, match="readout='node'"):
        train_on_nodes(GIN(), task.graph, task.labels)


def test_training_that_fails_is_told():
    made = ba_2motifs(20, seed=0)
    with pytest.raises(TrainingCollapsedError, match="most frequent"):
        train_on_graphs(GIN(), made.graphs, made.labels, recipe=Recipe(epochs=1, lr=1e-9))
    with pytest.raises(InputError, match="a label for each graph"):
        train_on_graphs(GIN(), made.graphs, made.labels[:3])
    first, second = (GIN(seed=4), GIN(seed=4))
    for model in (first, second):
        model.materialize(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for options in ({"classes": 1}, {"hidden": 0}, {"readout": "sum"}):
        with pytest.raises(InputError):
            GCN(**options)


def test_the_molecules_are_read(tmp_path):
    path = find_data("mutag/MUTAG.txt")
    if path is None:
        pytest.skip("needs mutag/MUTAG.txt: set THEODOLITE_DATA")
    made = load_mutag(path)
    assert len(made) == 188
    assert int(made.labels.sum()) == 125
    assert sum(g.num_nodes for g in made.graphs) == 3371
    assert sum(len(g.ends) for g in made.graphs) == 3721
    assert made.explanations is None
    broken = tmp_path / "broken.txt"
    for text in ("", "2\n1 0\n0 0\n", "1\n2 0\n0 1 1\n9 1 0\n", "1\n2 0\n0 1 1\n0 0\n", "name,label\n"):
        broken.write_text(text)
        with pytest.raises(DataError):
            load_mutag(broken)
    with pytest.raises(DataError, match="cannot read"):
        load_mutag(tmp_path / "none.txt")


# ---- errors


@pytest.mark.parametrize(
    ("explanation", "options", "words"),
    [
        (torch.ones(3), {}, "each of the 20 columns"),
        (torch.ones(10), {}, "one value for each undirected edge"),
        ([(0, 50)], {}, r"names edge \(0, 50\)"),
        (torch.linspace(0, 1, 20), {}, "soft mask"),
        (torch.linspace(0, 1, 20), {"threshold": 0.5, "top_k": 3}, "not both"),
        (torch.linspace(0, 1, 20), {"top_k": 11}, "top_k must be"),
        (torch.full((20,), torch.nan), {"top_k": 3}, "not finite"),
        ([(0, 1)], {"top_k": 3}, "list of edges"),
        (SimpleNamespace(edge_mask=None), {}, "no edge_mask"),
        (torch.eye(20)[0], {}, "in one direction only"),
        ([], {"alpha1": 1.2}, "alpha1"),
        ([], {"alpha2": -0.1}, "alpha2"),
        ([], {"alpha2": float("nan")}, "alpha2"),
        ([], {"n_samples": 1}, "n_samples"),
        ([], {"form": "logit"}, "form"),
        ([], {"sampling": "other"}, "sampling"),
        ([], {"label": 2}, "label must be"),
        ([], {"label": "true"}, "label must be"),
        ([], {"target_node": 7}, "target_node must be"),
        ([], {"target_node": -1}, "target_node must be"),
        ([], {"hops": 2}, "hops needs"),
        ([], {"target_node": 1}, "scores for each of 7 nodes"),
    ],
)
def test_what_does_not_fit_is_told(explanation, options, words):
    with pytest.raises(ValueError, match=words):
        robust_fidelity(network(), random_graph(1), explanation, **options)


def test_the_uneven_edge_is_named():
    graph = random_graph(1)
    mask = torch.zeros(20)
    mask[0] = 1
    u, v = sorted(graph.edge_index[:, 0].tolist())
    with pytest.raises(InputError, match=rf"edge \({u}, {v}\)"):
        robust_fidelity(network(), graph, mask)


def test_empty_and_complete_explanations_are_flagged():
    graph = random_graph(1)
    empty = robust_fidelity(network(), graph, [])
    assert (empty.plus, empty.ordinary_plus, empty.sparsity, empty.degenerate) == (0, 0, 1, "empty")
    complete = robust_fidelity(network(), graph, torch.ones(20, dtype=torch.bool))
    assert (complete.minus, complete.ordinary_minus, complete.sparsity, complete.degenerate) == (0, 0, 0, "complete")
    assert robust_fidelity(network(), graph, edges_of(graph)[:2]).degenerate is None


def test_graphs_that_are_none_are_told():
    x, edges = torch.ones(3, 1), torch.tensor([[0, 1], [1, 0]])
    for bad, words in (
        ((x * torch.nan, edges), "not finite"), ((x, edges + 2), "outside 0..2"), ((x, edges[:, :1]), r"edge \(0, 1\) has no"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            Graph(*bad)
    with pytest.raises(InputError, match="no edges to explain"):
        robust_fidelity(network(features=1), Graph(x, edges[:, :0]), [])
    with pytest.raises(InputError, match="within 2 hops"):
        robust_fidelity(network(features=1, readout="node"), Graph(x, edges), [], target_node=2, hops=2)
    with pytest.raises(DataError, match="square"):
        Graph.from_dense(np.ones((2, 3)))
    with pytest.raises(DataError, match="only 0 and 1"):
        Graph.from_dense(np.array([[0, 0.5], [0.5, 0]]))
    with pytest.raises(DataError, match="needs x and edge_index"):
        Graph.from_pyg(SimpleNamespace(x=None, edge_index=edges))
    with pytest.raises(DataError, match="edges have weights"):
        Graph.from_pyg(SimpleNamespace(x=x, edge_index=edges, edge_weight=torch.tensor([1.0, 0.5])))
    assert Graph.from_pyg(SimpleNamespace(x=x, edge_index=edges, edge_weight=torch.ones(2))).undirected


def test_models_that_cannot_be_scored_are_told():
    graph = random_graph(1)

    def regression(A, node_mask, x):
        return A.sum(dim=(1, 2))

    for one in (regression, lambda A, node_mask, x: A.sum(dim=(1, 2))[:, None]):
        with pytest.raises(UnsupportedTaskError, match="one number"):
            robust_fidelity(one, graph, [])
    with pytest.raises(ModelError, match="not finite"):
        robust_fidelity(lambda A, node_mask, x: A.sum(dim=1)[:, :2] / 0, graph, [])
    with pytest.raises(ModelError, match="return a tensor"):
        robust_fidelity(lambda A, node_mask, x: (A, x), graph, [])
    with pytest.raises(ModelError, match="give target_node"):
        robust_fidelity(network(readout="node"), graph, [])
    with pytest.raises(ModelError, match="must take"):
        robust_fidelity(lambda x: x, graph, [])


def test_a_model_that_ignores_edge_weights_is_told():
    graph, inner = random_graph(1), network(GIN)

    def ignores(x, edge_index, edge_weight, batch):
        return inner.forward_edges(x, edge_index, torch.ones_like(edge_weight), batch)

    def reads_no_edges(x, edge_index, edge_weight, batch):
        return torch.zeros(int(batch.max()) + 1, 2, dtype=x.dtype).index_add(0, batch, x)

    def has_none(x, edge_index, batch):
        return inner.forward_edges(x, edge_index, x.new_ones(edge_index.shape[1]), batch)

    for model in (ignores, reads_no_edges, has_none):
        with pytest.raises(EdgeWeightIgnoredError, match="DropEdges"):
            robust_fidelity(model, graph, edges_of(graph)[:2])
    same = Graph(torch.ones(7, 2, dtype=torch.float64), graph.edge_index)  # constant features do not hide it
    with pytest.raises(EdgeWeightIgnoredError):
        robust_fidelity(ignores, same, [])


def test_a_graph_on_which_edges_happen_not_to_matter_is_no_error():
    ring = Graph.from_networkx(nx.cycle_graph(6), np.ones((6, 2)))
    found = robust_fidelity(network(GCN), ring, [(0, 1)])
    assert abs(found.plus) < 1


def test_everything_public_is_exported():
    for name in gf.__all__:
        assert getattr(gf, name).__doc__


def saved_graphs(folder, **more):
    for i in range(3):
        graph = random_graph(i)
        first = graph.pair == 0
        arrays = {"x": graph.x.numpy(), "edge_index": graph.edge_index.numpy(), "label": np.array(0), **more}
        np.savez(folder / f"{i}.npz", edge_mask_a=first, edge_mask_b=~first, **arrays)


def test_the_command_ranks_explainers_and_names_the_file_that_is_wrong(tmp_path):
    saved_graphs(tmp_path)
    asked = [
        "run",
        "graph-fidelity",
        "--model",
        "theodolite.explanations.graph_fidelity:GIN",
        "--graphs",
        str(tmp_path),
    ]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert sorted(found["robust_fidelity_ranks"]) == ["a", "b"]
    means = [np.mean([row["delta"] for row in found[f"{name}_by_graph"].values()]) for name in "ab"]
    assert found["robust_fidelity_ranks"] == ["a", "b"][:: 1 if means[0] > means[1] else -1]
    assert ("note" in found) == (found["robust_fidelity_ranks"] != found["ordinary_fidelity_ranks"])
    assert "a mean delta" in CliRunner().invoke(app, asked).stdout
    graph = random_graph(0)
    np.savez(tmp_path / "1.npz", x=graph.x.numpy(), edge_index=graph.edge_index.numpy(), edge_mask=graph.pair == 0)
    for more, words in (({}, "1.npz holds edge_mask"), ({"label": np.array([1, 2])}, "one whole number")):
        if more:
            saved_graphs(tmp_path, **more)
        result = CliRunner().invoke(app, asked)
        assert isinstance(result.exception, DataError)
        assert words in str(result.exception)
    np.savez(
        tmp_path / "0.npz", x=graph.x.numpy(), edge_index=graph.edge_index.numpy() + 99, edge_mask_a=graph.pair == 0
    )
    assert "0.npz: edge_index names nodes outside" in str(CliRunner().invoke(app, asked).exception)
