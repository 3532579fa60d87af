import copy

import pytest
import torch
from torch import nn

from theodolite.core.errors import InputError, TrainingCollapsedError
from theodolite.core.train import Recipe, accuracy, train, train_ensemble


def rows(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_each_member_of_an_ensemble_is_what_train_makes(optimizer):
    x, y = rows()
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, optimizer=optimizer, l2=1e-3)
    models = [network(s) for s in range(3)]
    together = train_ensemble(models, x, y, recipe=recipe, seeds=[5, 6, 7], lrs=[0.05, 0.02, 0.05])
    for i, (seed, lr) in enumerate([(5, 0.05), (6, 0.02), (7, 0.05)]):
        alone = copy.deepcopy(models[i])
        train(alone, x, y, recipe=Recipe(3, 32, lr, optimizer, l2=1e-3, seed=seed))
        for ours, theirs in zip(together.member(i).parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_ensemble_takes_a_labelling_for_each_member():
    x, y = rows()
    recipe = Recipe(epochs=20, batch_size=32, lr=0.05)
    both = train_ensemble([network(0), network(0)], x, torch.stack([y, 1 - y]), recipe=recipe)
    assert accuracy(both.member(0), x, y) > 0.95
    assert accuracy(both.member(1), x, y) < 0.05


def test_same_seed_same_weights():
    x, y = rows()
    first, second = network(), network()
    train(first, x, y, recipe=Recipe(epochs=2, seed=3))
    train(second, x, y, recipe=Recipe(epochs=2, seed=3))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_early_stopping_keeps_the_best_weights():
    x, y = rows()
    noise = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(1))
    model = network()
    log = train(model, x, noise, recipe=Recipe(epochs=100, lr=0.05, patience=3, schedule="constant"), validation=(x, y))
    assert log.stopped_early
    with torch.no_grad():
        best = nn.functional.cross_entropy(model(x), y)
    assert float(best) == pytest.approx(min(log.validation_loss), rel=1e-5)


def test_a_collapsed_run_is_not_a_success():
    x, y = rows()
    recipe = Recipe(epochs=5, lr=1e18, optimizer="sgd", loss="squared")
    with pytest.raises(TrainingCollapsedError, match="step size"):
        train(nn.Linear(4, 1), x * 1e18, y.float(), recipe=recipe)


@pytest.mark.parametrize(("call", "text"), [
    (lambda x, y: train(network(), x, y[:-1]), "as many targets"),
    (lambda x, y: train(network(), x[:0], y[:0]), "at least one"),
    (lambda x, y: train(network().requires_grad_(False), x, y), "nothing to train"),
    (lambda x, y: train(network(), x, y, recipe=Recipe(patience=2)), "validation"),
    (lambda x, y: train_ensemble([], x, y), "at least one model"),
    (lambda x, y: train_ensemble([network()], x, y, seeds=[1, 2]), "one seed per model"),
    (lambda x, y: Recipe(epochs=0), "epochs >= 1"),
])  # fmt: skip
def test_bad_input_is_told(call, text):
    with pytest.raises(InputError, match=text):
        call(*rows())
