import copy
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.loading import load_subject
from theodolite.core.train import Recipe, accuracy, train
from theodolite.parameters.reparametrization import KINDS, fastfood, fwht, make_projection
from theodolite.parameters.subspace import SubspaceModel, measure_intrinsic_dimension
from theodolite.survey.parameters import subspace as chart
from theodolite.survey.run import measure

F64 = torch.float64


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("L", [2**k for k in range(10)])
def test_fwht_is_scipys_hadamard_matrix(L):
    x = torch.randn(3, L, dtype=F64)
    wanted = torch.from_numpy(hadamard(L) @ x.numpy().T).T
    assert torch.allclose(fwht(x), wanted, rtol=1e-10, atol=1e-10)


def test_fastfood_is_the_stated_product():
    L, D, d = 16, 11, 5
    rng = np.random.default_rng(0)
    B, G, order = rng.choice([-1.0, 1.0], L), rng.normal(size=L), rng.permutation(L)
    H, permute = hadamard(L), np.eye(L)[order]
    s = math.sqrt(L * (G**2).sum()) * math.sqrt(D / L)
    P = (H @ np.diag(G) @ permute @ H @ np.diag(B) / s)[:D, :d]
    x = rng.normal(size=d)
    made = fastfood(
        torch.from_numpy(x), D, signs=torch.from_numpy(B), permutation=torch.from_numpy(order),
        gaussian=torch.from_numpy(G),
    )  # fmt: skip
    assert np.allclose(made.numpy(), P @ x)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(D=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_every_map_is_its_matrix_and_the_adjoint_its_transpose(kind, D, share, seed):
    d = max(1, round(share * D))
    linear = make_projection(kind, d, D, seed=seed, dtype=F64)
    P = linear.to_dense()
    assert P.shape == (D, d) == linear.shape
    z, g = torch.randn(2, d, dtype=F64), torch.randn(2, D, dtype=F64)
    assert torch.allclose(linear(z), z @ P.T)
    assert torch.allclose(linear.adjoint(g), g @ P)
    assert torch.allclose(linear.column_norms(), P.norm(dim=0))
    assert torch.equal(make_projection(kind, d, D, seed=seed, dtype=F64).to_dense(), P)
    if kind != "fastfood" or D & (D - 1) == 0:
        assert torch.allclose(P.norm(dim=0), torch.ones(d, dtype=F64), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact(kind):
    linear = make_projection(kind, 4, 9, seed=3, dtype=F64)
    z = torch.randn(4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, z)
    assert torch.autograd.gradgradcheck(linear, z)
    assert torch.autograd.gradcheck(linear.adjoint, torch.randn(9, dtype=F64, requires_grad=True))
    many = torch.func.vmap(linear)(torch.randn(5, 4, dtype=F64))
    assert many.shape == (5, 9)


def test_fastfood_columns_have_about_norm_one_where_padded():
    norms = make_projection("fastfood", 300, 5000, seed=0).column_norms()
    assert float((norms - 1).abs().max()) < 0.15


def test_hashed_gives_every_coordinate_its_weights_and_d_equal_D_is_the_full_space():
    P = make_projection("hashed", 7, 30, seed=0, dtype=F64).to_dense()
    assert set((P != 0).sum(dim=0).tolist()) == {4, 5}
    assert torch.allclose(P.T @ P, torch.eye(7, dtype=F64))
    full = make_projection("hashed", 12, 12, seed=0, dtype=F64).to_dense()
    assert torch.equal(full.abs().sum(dim=0), torch.ones(12, dtype=F64))
    assert torch.equal(full.abs().sum(dim=1), torch.ones(12, dtype=F64))


def test_sparse_entries_have_the_stated_density_and_independent_signs():
    P = make_projection("sparse", 50, 10_000, seed=0, dtype=F64).to_dense()
    assert abs(float((P != 0).double().mean()) * 100 - 1) < 0.05
    assert abs(float(torch.sign(P).sum()) / float((P != 0).sum())) < 0.05


def test_columns_are_normalised_over_the_whole_network_and_not_per_layer():
    model = SubspaceModel(network(), 10, projection="dense")
    start = {name: p.clone() for name, p in model.module.named_parameters()}
    with torch.no_grad():
        model.coordinates[3] = 1
    moved = sum(float((w - start[name]).detach().square().sum()) for name, w in model.weights().items())
    assert moved == pytest.approx(1, abs=1e-5)


def test_at_zero_it_is_the_start_and_materialize_is_the_same_function():
    plain = network()
    model = SubspaceModel(plain, 5)
    x = torch.randn(4, 6)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        model.coordinates.normal_()
    made = model.materialize()
    assert torch.allclose(made(x), model(x), atol=1e-6)
    assert all(p.requires_grad for p in made.parameters())
    assert [p.requires_grad for p in plain.parameters()] == [True] * 4
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["coordinates"]


def test_the_gradient_is_the_adjoint_of_the_full_gradient():
    model = SubspaceModel(network().double(), 7, projection="fastfood")
    x = torch.randn(5, 6, dtype=F64)
    model(x).square().sum().backward()
    plain = network().double()
    plain(x).square().sum().backward()
    full = torch.cat([p.grad.ravel() for p in plain.parameters()])
    assert torch.allclose(model.coordinates.grad, model.map.adjoint(full))


class Tied(nn.Module):
    """Tied weights, BatchNorm, two inputs, a keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(5)

    def forward(self, a, b, *, scale=1.0):
        return self.second(self.norm(self.first(a)) + b) * scale


def test_tied_weights_count_once_and_buffers_stay_out(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return Tied()

    model = SubspaceModel(build(1), 6, seed=1)
    assert model.total_dimension == 25 + 5 + 5 + 10
    a, b = torch.randn(8, 5), torch.randn(8, 5)
    with torch.no_grad():
        model.coordinates.normal_()
    model.train()
    model(a, b, scale=2.0).sum().backward()
    assert not torch.equal(model.module.norm.running_mean, torch.zeros(5))
    made = model.materialize()
    assert made.second.weight is made.first.weight
    model.eval()
    made.eval()
    assert torch.allclose(made(a, b), model(a, b), atol=1e-5)
    model.save(tmp_path / "m.npz")
    again = SubspaceModel.load(tmp_path / "m.npz", build).eval()
    assert torch.equal(again(a, b), model(a, b))


def test_state_dict_and_deepcopy_work():
    model = SubspaceModel(network(), 5, projection="sparse")
    with torch.no_grad():
        model.coordinates.normal_()
    x = torch.randn(3, 6)
    other = SubspaceModel(network(seed=9), 5, projection="sparse")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert not any("map" in key for key in model.state_dict())


def test_include_and_exclude_leave_the_rest_as_it_is():
    model = SubspaceModel(network(), 5, exclude=["2.*"])
    assert model.total_dimension == 6 * 8 + 8
    assert set(model.weights()) == {"0.weight", "0.bias"}
    assert SubspaceModel(network(), 3, include=["*.bias"]).total_dimension == 11
    assert SubspaceModel(network(), 3, include="2").total_dimension == 27
    assert all(p.requires_grad for p in model.materialize().parameters())
    head = network()
    head[0].requires_grad_(False)
    model = SubspaceModel(head, 3)
    assert model.total_dimension == 27
    assert [p.requires_grad for p in model.materialize().parameters()] == [False, False, True, True]


def test_weight_decay_is_of_theta_and_not_of_z():
    model = SubspaceModel(network(), 5)
    wanted = sum(float(p.square().sum().detach()) for p in network().parameters())
    assert float(model.squared_norm().detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_saved_model_is_small_and_answers_the_same_in_a_fresh_process(tmp_path):
    model = SubspaceModel(network(3), 20, seed=3)
    with torch.no_grad():
        model.coordinates.normal_(generator=torch.Generator().manual_seed(0))
    path = tmp_path / "small.npz"
    model.save(path)
    assert path.stat().st_size <= 4 * 20 + 2000
    script = (
        "import sys, torch\nfrom torch import nn\nfrom theodolite.parameters.subspace import SubspaceModel\n"
        "def build(seed):\n    torch.manual_seed(seed)\n"
        "    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "print(SubspaceModel.load(sys.argv[1], build)(torch.ones(1, 6)).tolist()[0])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert np.allclose(eval(done.stdout), model(torch.ones(1, 6)).tolist()[0], atol=1e-6)


def test_loading_into_something_else_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    SubspaceModel(network(0), 5).save(path)
    with pytest.raises(ModelError, match="another architecture"):
        SubspaceModel.load(path, lambda seed: nn.Linear(6, 3))
    with pytest.raises(ModelError, match="other weights"):
        SubspaceModel.load(path, lambda: network(8))
    path.write_bytes(b"junk")
    with pytest.raises(ModelError, match="not a saved"):
        SubspaceModel.load(path, network)


def test_a_saved_model_is_found_again_whatever_its_seeds(tmp_path):
    path = tmp_path / "m.npz"
    SubspaceModel(network(4), 5, seed=9, include="0").save(path)  # the start has another seed than P
    again = SubspaceModel.load(path, network)
    assert (again.seed, again.total_dimension) == (9, 56)
    assert torch.equal(again(torch.ones(1, 6)), network(4)(torch.ones(1, 6)))
    assert SubspaceModel.load(path, lambda: network(4)).total_dimension == 56
    torch.manual_seed(12)
    SubspaceModel(nn.Linear(4, 3), 5).save(path)
    before = torch.get_rng_state()
    assert SubspaceModel.load(path, lambda: nn.Linear(4, 3)).total_dimension == 15  # seeds of its own it has none
    assert torch.equal(torch.get_rng_state(), before)
    again.save(path)
    assert SubspaceModel.load(path, network).seed == 9


def test_every_kind_of_number_is_saved(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.table = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
            self.register_buffer("count", torch.tensor(3, dtype=torch.bfloat16))
            self.register_buffer("mask", torch.ones(10_000), persistent=False)

        def forward(self, x):
            return self.scale * self.table.float() @ x + self.count

    path = tmp_path / "odd.npz"
    model = SubspaceModel(Odd(), 3)
    with torch.no_grad():
        model.coordinates.fill_(1.5)
        model.module.count += 2
    model.save(path)
    assert path.stat().st_size < 2500
    x = torch.ones(2)
    assert torch.equal(SubspaceModel.load(path, Odd)(x), model(x))

    class Other(Odd):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

    with pytest.raises(ModelError, match="no buffer like count"):
        SubspaceModel.load(path, Other)


OTHER = {"coordinates": np.zeros(3), "about": np.frombuffer(b"[1]", dtype=np.uint8)}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {"coordinates": np.zeros(3)}, OTHER])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "m.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="not a saved"):
        SubspaceModel.load(path, network)
    with pytest.raises(ModelError, match="not a saved"):
        SubspaceModel.load(tmp_path / "nothing.npz", network)


def test_a_state_of_another_projection_is_refused():
    model = SubspaceModel(network(), 5, seed=1)
    with pytest.raises(ModelError, match="hashed projection of seed 1"):
        SubspaceModel(network(), 5, seed=2).load_state_dict(model.state_dict())
    with pytest.raises(ModelError, match="same projection"):
        SubspaceModel(network(), 5, seed=1, projection="sparse").load_state_dict(model.state_dict())


@pytest.mark.parametrize("made", [
    (lambda: nn.LSTM(3, 5), (4, 2, 3)),
    (lambda: nn.GRU(3, 5), (4, 2, 3)),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (2, 3)),
    (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (2, 5, 6)),
    (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (2, 1, 5, 5)),
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_it_works_for_any_module(made, training):
    build, shape = made
    torch.manual_seed(0)
    model, x = SubspaceModel(build(), 7), torch.randn(shape)
    with torch.no_grad():
        model.coordinates.normal_()
    model.train(training)
    plain = copy.deepcopy(model).materialize()
    first = lambda out: out[0] if isinstance(out, tuple) else out
    ours, theirs = first(model(x)), first(plain(x))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, first(model.module(x)), atol=1e-3)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    gradients = dict(plain.named_parameters())
    full = torch.cat([gradients[name].grad.ravel() for name in model.weights()])
    assert torch.allclose(model.coordinates.grad, model.map.adjoint(full), rtol=1e-3, atol=1e-3)


def test_it_compiles_without_a_graph_break():
    script = """
import torch
from torch import nn
from theodolite.parameters.subspace import SubspaceModel
for kind in ("dense", "sparse", "fastfood", "hashed"):
    model = SubspaceModel(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), 5, projection=kind)
    with torch.no_grad():
        model.coordinates.normal_()
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), model.coordinates)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), model.coordinates)
    print(kind, torch.allclose(ours, theirs, atol=1e-5))
"""  # in a process of its own: the shape checks of the test run are no code that can be compiled
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dense", "True", "sparse", "True", "fastfood", "True", "hashed", "True"]


def test_it_moves_to_double_with_its_map():
    model = SubspaceModel(network(), 5, projection="fastfood").double()
    out = model(torch.ones(1, 6, dtype=F64))
    out.sum().backward()
    assert out.dtype == model.coordinates.grad.dtype == F64


class Sums(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=F64))

    def forward(self):
        return (self.theta.view(6, 10).sum(dim=1) - torch.arange(1.0, 7, dtype=F64)).square().sum()


def descend(model):
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(chosen, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def toy(**options):
    given = {"dimensions": range(1, 13), "baseline": 1.0, "threshold": 0.99, "seeds": (0, 1)} | options
    return measure_intrinsic_dimension(Sums, descend, lambda m: math.exp(-float(m().detach())), **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["grid", "bisect"])
def test_a_problem_of_known_codimension(kind, search):
    found = toy(projection=kind, search=search)
    assert found.dimension == 6
    assert found.total_dimension == 60
    assert found.compression == 10
    assert found.description_bits == 6 * 32 + 128
    assert found.projection == kind
    assert found.curve.dimensions[-1] >= 6


def test_grid_gives_the_whole_curve_and_bisection_a_third_of_the_work():
    whole, part = toy(search="grid"), toy(search="bisect")
    assert whole.curve.dimensions == tuple(range(1, 13))
    assert whole.curve.runs.shape == (12, 2)
    assert float(whole.curve.mean[:5].max()) <= 0.01
    assert float(whole.curve.mean[5:].min()) >= 0.999
    assert len(part.curve.dimensions) <= 4
    assert set(part.curve.dimensions) >= {5, 6}


@settings(max_examples=25, deadline=None)
@given(grid=st.sets(st.integers(1, 60), min_size=1), wanted=st.integers(1, 70))
def test_bisection_and_grid_agree_where_quality_grows(grid, wanted):
    def evaluate(model):
        return 1.0 if isinstance(model, SubspaceModel) and model.dimension >= wanted else 0.0

    grid = sorted(grid)
    found = [
        measure_intrinsic_dimension(Sums, lambda m: None, evaluate, grid, baseline=1.0, seeds=(0,), search=search)
        for search in ("grid", "bisect")
    ]
    assert [one.dimension for one in found] == [next((d for d in grid if d >= wanted), None)] * 2


def test_the_mean_over_seeds_counts_and_not_a_lucky_one():
    def evaluate(model):
        return 1.0 if isinstance(model, SubspaceModel) and (model.seed == 0 or model.dimension > 2) else 0.0

    found = measure_intrinsic_dimension(Sums, lambda m: None, evaluate, [1, 2, 3, 4], baseline=1.0, seeds=(0, 1, 2))
    assert found.dimension == 3


def test_the_standard_error_is_that_of_the_bootstrap_over_runs():
    def evaluate(model):  # at d = 2 two runs of three pass: some resamples stop there
        return float(
            isinstance(model, SubspaceModel) and (model.dimension > 2 or (model.dimension == 2 and model.seed > 0))
        )

    found = measure_intrinsic_dimension(
        Sums, lambda m: None, evaluate, [1, 2, 3], baseline=1.0, seeds=(0, 1, 2), bootstrap=4000
    )
    share = (2 / 3) ** 3  # of the resamples at d = 2 that hold the run that fails no time
    assert found.dimension == 3
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share)), abs=0.03)


def test_the_same_seeds_give_the_same_numbers_and_leave_the_generator_alone():
    def build(seed):
        return nn.Linear(3, 2)  # draws from torch's generator without setting it

    def fit(model):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p))

    before = torch.get_rng_state()
    runs = [
        measure_intrinsic_dimension(
            build, fit, lambda m: float(m(torch.ones(1, 3)).sum().detach()), [2, 4], baseline=1.0
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(runs[0].curve.runs, runs[1].curve.runs)
    assert len(set(runs[0].curve.runs[0])) == 3


def test_numbers_of_numpy_are_numbers():
    found = toy(dimensions=np.array([5, 6, 7]), seeds=np.arange(2), baseline=1, search="bisect")
    assert (found.dimension, found.seeds) == (6, (0, 1))
    assert SubspaceModel(network(), np.int64(3), seed=np.int64(4)).dimension == 3


def test_none_where_no_dimension_passes():
    found = toy(dimensions=[1, 2, 3])
    assert found.dimension is None
    assert found.compression is None
    assert found.standard_error is None


def test_direct_reference_and_chance_on_real_digits():
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()

    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def fit(model):
        lr = 0.3 if isinstance(model, SubspaceModel) else 3e-3
        train(model, x[:1200], y[:1200], recipe=Recipe(epochs=15, batch_size=64, lr=lr))

    found = measure_intrinsic_dimension(
        build, fit, lambda m: accuracy(m, x[1200:], y[1200:]), [2, 8, 32, 128, 512], seeds=(0, 1), search="bisect"
    )
    assert found.reference > 0.85
    assert found.curve.chance < 0.3
    assert found.dimension in (32, 128)
    assert found.standard_error is not None


@pytest.mark.parametrize(("options", "text"), [
    ({"dimensions": [61]}, "d = 61 .* D = 60"),
    ({"dimensions": [3, 2]}, "increase"),
    ({"dimensions": [2, 2]}, "increase"),
    ({"dimensions": []}, "increase"),
    ({"dimensions": [0, 1]}, "at least one"),
    ({"dimensions": [1.5]}, "whole numbers"),
    ({"baseline": -1.0}, "above 0"),
    ({"baseline": math.nan}, "above 0"),
    ({"seeds": ()}, "at least one seed"),
    ({"seeds": (1, 1)}, "each once"),
    ({"bootstrap": 0}, "bootstrap"),
    ({"baseline": 0.0}, "above 0"),
    ({"baseline": "other"}, "baseline"),
    ({"search": "random"}, "search"),
    ({"threshold": 0.0}, "threshold"),
    ({"projection": "magic"}, "hashed"),
])  # fmt: skip
def test_bad_searches_are_told_before_work(options, text):
    def work(model):
        raise RuntimeError("work has started")

    given = {"dimensions": [1, 2], "baseline": 1.0} | options
    with pytest.raises(InputError, match=text):
        measure_intrinsic_dimension(Sums, work, work, **given)


def test_a_reference_that_is_not_above_zero_is_told_before_the_search():
    with pytest.raises(InputError, match="above 0"):
        measure_intrinsic_dimension(Sums, lambda m: None, lambda m: -1.0, [1, 2])


def test_a_quality_that_is_not_a_number_names_d_and_seed():
    with pytest.raises(InputError, match=r"d = 2, seed 5"):
        measure_intrinsic_dimension(
            Sums, lambda m: None, lambda m: math.nan if isinstance(m, SubspaceModel) else 1.0, [2], seeds=(5,)
        )


def test_bad_models_and_dimensions():
    with pytest.raises(InputError, match=r"d = 100 .* D = 83"):
        SubspaceModel(network(), 100)
    with pytest.raises(InputError, match="at least one"):
        SubspaceModel(network(), 0)
    with pytest.raises(ModelError, match=r"0\.weight"):
        SubspaceModel(network(), 2, include=["nothing"])
    with pytest.raises(ModelError, match="meta"):
        SubspaceModel(nn.Linear(2, 2, device="meta"), 2)
    with pytest.raises(ModelError, match="one batch"):
        SubspaceModel(nn.LazyLinear(3), 2)
    spins = nn.Module()
    spins.spin = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match="complex64"):
        SubspaceModel(spins, 2)
    frozen = network().requires_grad_(False)
    with pytest.raises(ModelError, match="none of them requires a gradient"):
        SubspaceModel(frozen, 2)
    with pytest.raises(ModelError, match="no trainable"):
        SubspaceModel(nn.ReLU(), 2)
    with pytest.raises(InputError, match="adjoint takes 4"):
        make_projection("hashed", 2, 4, seed=0).adjoint(torch.zeros(3))
    four = torch.ones(4)
    with pytest.raises(InputError, match="L = 4"):
        fastfood(torch.zeros(5), 3, signs=four, permutation=torch.arange(4), gaussian=four)
    with pytest.raises(InputError, match="power of two"):
        fwht(torch.zeros(3))
    with pytest.raises(InputError, match="GiB"):
        make_projection("dense", 2000, 100_000, seed=0)
    with pytest.raises(InputError, match="takes 2 coordinates"):
        make_projection("hashed", 2, 4, seed=0)(torch.zeros(3))


def test_a_build_that_gives_one_network_each_time_never_starts_from_a_trained_one():
    def quality(model):
        return math.exp(-float(model().detach()))

    net = Sums(0)
    start = copy.deepcopy(net.state_dict())
    shared = measure_intrinsic_dimension(lambda: net, descend, quality, [2, 5, 6, 20], threshold=0.99, seeds=(0,))
    fresh = measure_intrinsic_dimension(Sums, descend, quality, [2, 5, 6, 20], threshold=0.99, seeds=(0,))
    assert shared.dimension == fresh.dimension == 6
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())


def test_a_seed_below_zero_is_refused():
    for make in (lambda: make_projection("hashed", 2, 10, seed=-1), lambda: SubspaceModel(network(), 2, seed=-1)):
        with pytest.raises(InputError, match="seed at least 0"):
            make()


def test_the_chart_does_not_praise_what_a_constant_answer_has_too(tmp_path, monkeypatch):
    monkeypatch.setattr(chart, "_GRID", (2, 8))
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(600, 3)), columns=["a", "b", "c"])
    table["label"] = np.where(rng.random(600) < 0.15, "rare", "common")  # nothing to be learned
    table.to_csv(tmp_path / "lopsided.csv", index=False)
    finding = measure("intrinsic-dimension", load_subject(data=tmp_path / "lopsided.csv", epochs=5))
    assert "not shown to beat the commonest class as every answer" in finding.headline
    assert "Do not read this number alone" in finding.advice
