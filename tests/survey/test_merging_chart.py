"""The chart of merging on small subjects of four classes, one with BatchNorm."""

import json

import pytest
import torch
from torch import nn

from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.core.train import Recipe
from theodolite.survey.chart import load_charts
from theodolite.survey.run import measure


def subject(norm: bool, classes: int = 4) -> Subject:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(6, 16), *middle, nn.ReLU(), nn.Linear(16, classes))

    torch.manual_seed(1)
    centres = torch.randn(classes, 6) * 2
    y = torch.arange(900) % classes
    rows = Rows(centres[y] + torch.randn(900, 6), y)
    parts = [Rows(rows.x[a:b], rows.y[a:b]) for a, b in ((0, 500), (500, 700), (700, 900))]
    data = Dataset("blobs", "tabular", "classification", *parts, classes=tuple("abcdefgh"[:classes]))
    made = Subject("blobs", data, build(0), build=build, recipe=Recipe(epochs=8, batch_size=32))
    made.fit(made.predictor)
    return made


@pytest.mark.parametrize("norm", [False, True])
def test_the_merge_is_shown_beside_its_sources_average_and_random_search(norm):
    found = measure("evolutionary-merging", subject(norm), seed=0, seconds=60)
    names = [control.name for control in found.comparison.controls]
    assert [name.split(" (")[0] for name in names] == [
        "the plain average of the two", "best global weights", "the best of 150 random recipes", "the better copy alone",
        "the base that both were tuned from",
    ]  # fmt: skip
    assert all(control.estimate.n == 200 for control in found.comparison.controls)
    alone = found.numbers["copy tuned on the first half of the classes"].value
    assert found.comparison.estimate.value >= alone
    assert f"{found.comparison.estimate.value:.1%}" in found.headline
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["control"]["kind"] == "closed-form"


def test_three_classes_are_told():
    refusal = load_charts()["evolutionary-merging"].needs.refusal(subject(False, classes=3))
    assert refusal == "needs at least 4 classes; there are 3"
