import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from torch import nn

from theodolite.core.builtin import BUILTIN, builtin
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.core.train import Recipe


def rows(n, seed, columns=3, regression=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, columns, generator=generator)
    return Rows(x, x[:, 0] * 2 if regression else (x[:, 0] > 0).long())


def dataset(regression=False, **changes):
    parts = {name: rows(60, i, regression=regression) for i, name in enumerate(("train", "validation", "test"))}
    task = "regression" if regression else "classification"
    classes = () if regression else ("no", "yes")
    options = {"name": "d", "modality": "tabular", "task": task, "classes": classes, **parts, **changes}
    return Dataset(**options)


@pytest.mark.parametrize("name", list(BUILTIN))
def test_a_builtin_subject_beats_chance_and_repeats(name):
    first, second = builtin(name, seed=1), builtin(name, seed=1)
    assert first.quality().low > first.data.chance
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != builtin(name, seed=2).fingerprint


def test_parts_of_a_builtin_share_no_row():
    data = builtin("breast-cancer").data
    seen = [tuple(row.tolist()) for part in data.parts.values() for row in part.x]
    assert len(set(seen)) == len(seen)


def test_quality_of_a_black_box_and_of_a_regression():
    data = dataset()
    forest = RandomForestClassifier(10, random_state=0).fit(data.train.x.numpy(), data.train.y.numpy())
    right = (forest.predict(data.test.x.numpy()) == data.test.y.numpy()).mean()
    subject = Subject("s", data, forest)
    assert subject.quality().value == pytest.approx(right)
    assert not subject.is_network
    regression = dataset(regression=True)
    trees = RandomForestRegressor(10, random_state=0).fit(regression.train.x.numpy(), regression.train.y.numpy())
    measured = Subject("r", regression, trees)
    assert measured.metric == "R2"
    assert measured.quality().value == pytest.approx(
        trees.score(regression.test.x.numpy(), regression.test.y.numpy()), abs=1e-5
    )
    values = measured.correct(trees, regression.test)
    assert ((values >= 0) & (values <= 1)).all()


def test_a_network_with_one_output_answers_two_classes():
    subject = Subject("s", dataset(), nn.Sequential(nn.Linear(3, 1)))
    assert 0 <= subject.quality().value <= 1


def test_it_can_be_trained_again():
    subject = Subject(
        "s", dataset(), nn.Linear(3, 2), build=lambda seed: nn.Linear(3, 2), recipe=Recipe(epochs=30, lr=0.1)
    )
    assert subject.retrainable
    assert subject.quality(subject.fit(subject.build(0))).value > 0.9
    assert subject.training_seconds > 0


def nan_rows():
    bad = rows(60, 0)
    bad.x[3, 1] = np.nan
    return bad


@pytest.mark.parametrize(("make", "text"), [
    (lambda: dataset(train=rows(0, 0)), "no rows"),
    (lambda: dataset(train=nan_rows()), "--missing"),
    (lambda: dataset(train=Rows(torch.randn(5, 3), torch.zeros(4).long())), "5 inputs but 4 targets"),
    (lambda: dataset(test=rows(60, 0, columns=4)), "another shape"),
    (lambda: dataset(classes=("only",)), "two classes"),
    (lambda: dataset(train=Rows(torch.randn(5, 3), torch.ones(5).long())), "one class"),
    (lambda: dataset(train=Rows(torch.randn(5, 3), torch.arange(5))), "class indices"),
    (lambda: dataset(features=("a",)), "feature names"),
])  # fmt: skip
def test_data_that_cannot_be_used_are_told(make, text):
    with pytest.raises(DataError, match=text):
        make()


class _Answers(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 2), float("nan"))


@pytest.mark.parametrize(("model", "text"), [
    (nn.Linear(4, 2), "cannot take rows"),
    (nn.Linear(3, 5), "5 scores a row but the data have 2 classes"),
    (_Answers(), "NaN"),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_told(model, text):
    with pytest.raises(ModelError, match=text):
        Subject("s", dataset(), model)


def test_an_unknown_builtin_is_told():
    with pytest.raises(InputError, match="digits"):
        builtin("digit")


def test_weights_and_buffers_of_every_shape_have_a_fingerprint():
    """A batch normalisation counts its batches in a tensor of no dimension."""

    def made(batches):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        for parameter in network.parameters():
            nn.init.constant_(parameter, 0.5)
        network[1].num_batches_tracked.fill_(batches)
        return Subject("s", dataset(), network)

    assert made(3).fingerprint == made(3).fingerprint
    assert made(3).fingerprint != made(4).fingerprint
