"""Searches in the code of an autoencoder: T-Rex in its latent form, C-CHVAE and REVISE."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.explanations.robust_counterfactuals import (
    AutoencoderWarning,
    Cchvae,
    ClosestCounterfactual,
    Revise,
    TRex,
    TRexLatent,
    benchmark,
    train_autoencoder,
)
from theodolite.explanations.table_schema import TableSchema

D, GROUP = 6, (3, 4, 5)


def table(n=300, seed=0):
    """Two numbers that go together, one that does not, and a one-hot group of three that depends on the first."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(size=n)
    kind = np.clip((3 * first + 0.3 * rng.normal(size=n)).astype(int), 0, 2)
    second = 100 * (first + 0.05 * rng.normal(size=n))
    return np.column_stack([first, second, rng.uniform(size=n), np.eye(3)[kind]])


@pytest.fixture(scope="module")
def coder():
    return train_autoencoder(TableSchema.of(table(), groups=[GROUP]), table())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.as_tensor(table()).float() / torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0, 1.0])
    y = (x[:, 0] + 0.3 * x[:, 2] > 0.7).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # to take the table in its own units
        model[0].weight[:, 1] /= 100
    return model.eval()


def makers(coder, **options):
    near = ClosestCounterfactual(steps=60)
    share = {"autoencoder": coder, "groups": [GROUP], "k": 50} | options
    return {
        "T-Rex": TRexLatent(base=near, search_k=32, **share),
        "C-CHVAE": Cchvae(samples=100, **share),
        "REVISE": Revise(steps=100, **share),
    }


NAMES = ["T-Rex", "C-CHVAE", "REVISE"]


def answers(model, rows):
    with torch.no_grad():
        return model(torch.as_tensor(rows).float()).argmax(dim=1).numpy()


# ---- the autoencoder


def test_the_autoencoder_tells_unseen_rows_apart_and_repeats(coder):
    schema, new = TableSchema.of(table(), groups=[GROUP]), table(200, seed=1)
    z = schema.scaled(new)
    out = coder.decode(coder.encode(z), z)
    assert 0.7 < coder.explained <= 1
    assert float((out - z).square().sum() / (z - z.mean(dim=0)).square().sum()) < 0.3
    assert torch.allclose(out[:, list(GROUP)].sum(dim=1), torch.ones(200, dtype=torch.float64), atol=1e-6)
    assert ((out > 0) & (out < 1)).all()
    code = coder.encode(z)
    assert code.shape == (200, 8)
    assert code.dtype == torch.float64
    again = train_autoencoder(schema, table())
    assert all(torch.equal(a, b) for a, b in zip(coder.parameters(), again.parameters(), strict=True))
    other = train_autoencoder(schema, table(), seed=1)
    assert not torch.equal(next(coder.parameters()), next(other.parameters()))


def test_the_generator_of_random_numbers_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train_autoencoder(TableSchema.of(table(40)), table(40))
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_held_is_a_condition_of_the_decoder():
    """The second column follows the first: where that is held, decoded rows must follow it at any code."""
    schema = TableSchema.of(table(), immutable=[0], groups=[GROUP])
    made = train_autoencoder(schema, table())
    assert made.held == (0,)
    like = torch.zeros(50, D, dtype=torch.float64)
    like[:25, 0], like[25:, 0] = 0.1, 0.9
    code = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = made.decode(code, like)[:, 1]
    assert float(out[25:].mean() - out[:25].mean()) > 0.4


def test_tables_that_an_autoencoder_cannot_learn():
    schema = TableSchema.of(table())
    with pytest.raises(DataError, match="at least 20"):
        train_autoencoder(schema, table(19))
    with pytest.raises(InputError, match="code"):
        train_autoencoder(schema, table(), code=0)
    with pytest.raises(DataError, match="columns"):
        train_autoencoder(schema, table()[:, :3])
    noise = np.random.default_rng(0).uniform(size=(60, 40))
    with pytest.warns(AutoencoderWarning, match="of the variance"):
        train_autoencoder(TableSchema.of(noise), noise, code=1, hidden=2)


# ---- the searches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [0, 1])
def test_the_class_asked_for_is_reached_within_the_table(name, target, coder, net):
    x = table(20, seed=3)
    found = makers(coder)[name].fit(net, table()).generate(x, target)
    assert found.valid.mean() >= 0.9
    points = found.counterfactuals[found.valid]
    assert (answers(net, points) == target).all()
    assert (found.counterfactuals[found.unchanged] == x[found.unchanged]).all()
    assert np.isin(points[:, 3:], (0, 1)).all()
    assert (points[:, 3:].sum(axis=1) == 1).all()
    span = np.ptp(table(), axis=0)
    assert np.allclose(found.cost[found.valid], np.linalg.norm((points - x[found.valid]) / span, axis=1), atol=1e-6)
    moved = found.valid & ~found.unchanged
    assert (found.steps[moved] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_may_not_change_does_not(name, net):
    options = {"immutable": [2], "increasing": [1], "bounds": {0: (0.05, 0.95)}, "groups": [GROUP]}
    made = train_autoencoder(TableSchema.of(table(), **options), table())
    x = table(20, seed=3)
    x[:, 0] = np.clip(x[:, 0], 0.05, 0.95)
    found = makers(made, **options)[name].fit(net, table()).generate(x)
    points, rows = found.counterfactuals[found.valid], x[found.valid]
    assert found.valid.mean() > 0.8
    assert (points[:, 2] == rows[:, 2]).all()
    assert (points[:, 1] >= rows[:, 1]).all()
    assert ((points[:, 0] >= 0.05) & (points[:, 0] <= 0.95)).all()
    assert np.isin(points[:, 3:], (0, 1)).all()
    assert np.isnan(found.counterfactuals[~found.valid]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_gets_what_it_gets_in_a_batch(name, coder, net):
    x = table(30, seed=4)
    x = x[answers(net, x) == 0][:3]
    method = makers(coder)[name].fit(net, table())
    whole = method.generate(x)
    assert np.array_equal(whole.counterfactuals, method.generate(x).counterfactuals, equal_nan=True)
    for i in range(len(x)):
        alone = method.generate(x[i : i + 1])
        assert np.allclose(alone.counterfactuals, whole.counterfactuals[i : i + 1], atol=1e-4, equal_nan=True)
    small = makers(coder, memory=200_000)[name].fit(net, table()).generate(x)
    assert np.allclose(small.counterfactuals, whole.counterfactuals, atol=1e-4, equal_nan=True)


def test_growing_spheres_take_the_nearest_decoded_point_of_the_first_shell(coder, net):
    x = table(30, seed=4)
    x = x[answers(net, x) == 0][:1]
    found = Cchvae(autoencoder=coder, groups=[GROUP], samples=50, seed=7).fit(net, table()).generate(x)
    schema = TableSchema.of(table(), groups=[GROUP])
    region, generator = schema.region(x), torch.Generator().manual_seed(7)
    centre = coder.encode(schema.scaled(x))
    for shell in range(found.steps[0]):
        moves = torch.randn(50, 8, generator=generator, dtype=torch.float64)
        far = 0.05 * (shell + torch.rand(50, 1, generator=generator, dtype=torch.float64))
        codes = centre + moves * far / moves.norm(dim=1, keepdim=True)
        points = region.project(coder.decode(codes, schema.scaled(x).expand(50, -1)))
        points[:, 3:] = nn.functional.one_hot(points[:, 3:].argmax(dim=1), 3).double()
        accepted = answers(net, schema.unscaled(points).numpy()) == 1
        assert accepted.any() == (shell == found.steps[0] - 1)
    cost = (points - schema.scaled(x)).norm(dim=1).numpy()
    assert found.cost[0] == pytest.approx(cost[accepted].min(), abs=1e-9)


def test_growing_spheres_need_no_gradient_and_the_others_say_so(coder):
    forest = RandomForestClassifier(20, random_state=0).fit(table(), table()[:, 0] > 0.6)
    x = table(10, seed=5)
    found = Cchvae(autoencoder=coder, groups=[GROUP], samples=100, k=50).fit(forest, table()).generate(x)
    assert found.valid.all()
    assert (forest.predict(found.counterfactuals) == 1).all()
    for name in ("T-Rex", "REVISE"):
        with pytest.raises(ModelError, match="needs gradients"):
            makers(coder)[name].fit(forest, table()).generate(x)


def test_a_class_that_no_code_has_is_told_as_not_found(coder):
    never = nn.Linear(D, 1)
    with torch.no_grad():
        never.weight.zero_()
        never.bias.fill_(-3.0)
    for method in (
        Cchvae(autoencoder=coder, groups=[GROUP], samples=20, max_steps=3, k=20),
        Revise(autoencoder=coder, groups=[GROUP], steps=3, k=20),
        TRexLatent(autoencoder=coder, groups=[GROUP], base="nearest", max_steps=3, k=20, search_k=8),
    ):
        found = method.fit(never, table()).generate(table(3, seed=6))
        assert not found.valid.any()
        assert np.isnan(found.counterfactuals).all()


def test_latent_stability_climbs_and_tells_where_it_does_not_arrive(coder, net):
    x = table(40, seed=8)
    x = x[answers(net, x) == 0][:8]
    low, high = (
        TRexLatent(autoencoder=coder, groups=[GROUP], base="nearest", tau=tau, search_k=64, k=400)
        .fit(net, table())
        .generate(x)
        for tau in (0.55, 0.9)
    )
    assert low.valid.all()
    assert high.stability.mean() > low.stability.mean()
    assert (high.reached == (high.stability >= 0.9)).all()
    stuck = TRexLatent(autoencoder=coder, groups=[GROUP], tau=0.99, max_steps=0, k=50).fit(net, table()).generate(x)
    assert stuck.valid.all()
    assert not stuck.reached.any()


def test_an_autoencoder_of_another_table_is_refused(coder, net):
    for options in ({}, {"groups": [GROUP], "immutable": [0]}):
        with pytest.raises(InputError, match="made for other columns"):
            Cchvae(autoencoder=coder, **options).fit(net, table())
    with pytest.raises(InputError, match="samples"):
        Cchvae(samples=0)
    with pytest.raises(InputError, match="lam"):
        Revise(lam=-1.0)


def test_growing_spheres_as_the_base_of_a_search(coder, net):
    x = table(40, seed=8)
    x = x[answers(net, x) == 0][:4]
    share = {"groups": [GROUP], "k": 50}
    made = TRex(base=Cchvae(autoencoder=coder, samples=100), search_k=32, max_steps=20, **share).fit(net, table())
    assert made.generate(x).valid.all()
    with pytest.raises(InputError, match="before its fit"):
        TRex(base=Cchvae(), **share).fit(net, table()).generate(x)


def test_one_is_trained_where_none_is_given_and_they_stand_in_the_table_of_methods(net):
    x = table(30, seed=4)
    methods = [Cchvae(groups=[GROUP], samples=50, k=50), Revise(groups=[GROUP], steps=50, k=50)]
    frame = benchmark(methods, net, [net], x[answers(net, x) == 0][:4], table())
    assert frame["method"].tolist() == ["Cchvae", "Revise"]
    assert (frame["base_validity"] > 0).all()
    assert np.isfinite(frame["lof"]).all()
