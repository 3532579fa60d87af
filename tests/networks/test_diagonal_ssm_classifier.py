import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from theodolite.core.errors import InputError
from theodolite.core.train import Recipe, accuracy, train
from theodolite.networks.diagonal_ssm import S4DClassifier, ssm_parameter_groups


def small(**options):
    return S4DClassifier(2, 3, d_model=6, **{"seed": 0, "n_state": 8, **options}).eval()


def series(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_blocks_are_what_the_paper_says():
    network, x = small(n_layers=1), series(4, 30, 2)
    (block,) = network.blocks
    h = network.encoder(x)
    y, _ = block.layer(h)
    gates = block.mix(F.gelu(y))
    h = block.norm(h + gates[..., :6] * torch.sigmoid(gates[..., 6:]))
    assert torch.allclose(network(x), network.decoder(h.mean(dim=1)), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_stream_gives_the_scores_of_the_series_so_far(pooling):
    network, x = small(pooling=pooling), series(3, 40, 2)
    state = network.initial_state(3)
    with torch.no_grad():
        for t in range(40):
            scores, state = network.step(x[:, t], state)
            if t in (0, 17, 39):
                assert torch.allclose(scores, network(x[:, : t + 1]), atol=1e-5)
    assert state.samples == 40


def test_series_of_one_channel_need_no_axis_for_it():
    network = S4DClassifier(1, 2, d_model=4, n_state=4, seed=0)
    x = series(3, 20)
    assert torch.equal(network(x), network(x[..., None]))


def test_the_ends_of_a_bidirectional_network_see_each_other():
    x = series(1, 30, 2)
    other = x.clone()
    other[:, -1] += 1
    for both_ways, changes in ((False, False), (True, True)):
        network = small(bidirectional=both_ways)
        first = [network.blocks[0](network.encoder(value))[:, 0] for value in (x, other)]
        assert torch.allclose(first[0], first[1], atol=1e-6) is not changes


def test_a_copy_a_saved_one_and_a_seed_are_the_same_network():
    network, x = small(), series(2, 25, 2)
    again = small(seed=1)
    assert not torch.equal(network(x), again(x))
    again.load_state_dict(network.state_dict())
    assert torch.equal(network(x), again(x))
    assert torch.equal(network(x), copy.deepcopy(network)(x))
    assert torch.equal(network(x), small()(x))
    torch.manual_seed(3)
    one = S4DClassifier(2, 3, d_model=6, n_state=8)
    torch.manual_seed(3)
    assert torch.equal(one(x), S4DClassifier(2, 3, d_model=6, n_state=8)(x))


def test_it_learns_by_the_package_trainer_and_by_its_own_groups():
    digits = load_digits()
    keep = digits.target < 2
    x = torch.from_numpy(digits.images[keep]).float().reshape(-1, 64, 1) / 8 - 1
    y = torch.from_numpy(digits.target[keep])
    network = S4DClassifier(1, 2, d_model=8, n_state=8, n_layers=1, seed=0, dt_min=0.01, dt_max=0.5)
    train(network, x[:300], y[:300], recipe=Recipe(epochs=12, batch_size=25, lr=1e-2))
    assert accuracy(network, x[300:], y[300:]) > 0.8
    network = S4DClassifier(1, 2, d_model=8, n_state=8, n_layers=1, seed=0, dt_min=0.01, dt_max=0.5)
    optimizer = torch.optim.AdamW(ssm_parameter_groups(network, lr=1e-2))
    for _ in range(12):
        for part in torch.arange(300).split(25):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    assert accuracy(network.eval(), x[300:], y[300:]) > 0.8


def test_a_value_for_each_series():
    network = S4DClassifier(1, 1, d_model=4, n_state=4, n_layers=1, seed=0)
    x = series(16, 10)
    log = train(network, x, x[:, -1], recipe=Recipe(epochs=8, batch_size=8, lr=1e-2, loss="squared"))
    assert log.loss[-1] < log.loss[0]


def test_errors():
    network = small()
    for bad in (series(2, 10), series(2, 10, 3), series(2, 2, 10), series(2, 10, 2).long(), series(2, 10, 2).cfloat()):
        with pytest.raises(InputError, match=r"takes real \(batch, length, 2\), got"):
            network(bad)
    with pytest.raises(InputError, match="at least one row and one step"):
        network(torch.zeros(2, 0, 2))
    with pytest.raises(InputError, match=r"step takes real \(batch, 2\)"):
        network.step(series(2, 3), network.initial_state(2))
    with pytest.raises(InputError, match="reads the future"):
        small(bidirectional=True).initial_state(2)
    with pytest.raises(InputError, match="pooling is mean or last"):
        small(pooling="max")
    with pytest.raises(InputError, match="sizes must be at least 1"):
        S4DClassifier(0, 2)
    with pytest.raises(InputError, match="must be even"):
        small(n_state=3)
