"""The figure that quality and numbers are drawn in, and the vision chart's points with their counts."""

import math

import plotly.graph_objects as go
import pytest
import torch
from torch import nn

from theodolite.core.builtin import builtin
from theodolite.core.estimate import Estimate
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.core.train import Recipe
from theodolite.parameters.weights import weight_tensors
from theodolite.survey.chart import Budget, load_charts
from theodolite.survey.parameters import storage
from theodolite.survey.parameters.pareto import Point, draw, largest_update, not_beaten


def point(numbers, value, half=0.1):
    return Point(numbers, Estimate(value, value - half, value + half))


WAYS = {"a": [point(100, 0.8), point(10, 0.5)], "b": [point(10, 0.6)], "c": [point(50, 0.55), point(5, 0.2)]}

# ---- the front and the figure


def test_the_front_is_what_no_point_with_as_few_numbers_reaches():
    assert not_beaten(WAYS, nothing=0.0) == [("c", 5, 0.2), ("b", 10, 0.6), ("a", 100, 0.8)]
    assert not_beaten(WAYS, nothing=0.3) == [("b", 10, 0.6), ("a", 100, 0.8)]
    assert not_beaten(WAYS, nothing=0.9) == []


def test_every_point_its_interval_the_levels_and_the_front_are_drawn():
    figure = go.Figure()
    draw(figure, WAYS, nothing=0.3, levels={"whole": 0.9, "chance": 0.3, "far": -40.0}, control=["c"])
    lines = {trace.name: trace for trace in figure.data}
    assert lines["a"].x == (10, 100)
    assert lines["a"].y == (0.5, 0.8)
    band = lines["a, interval"]
    assert band.x == (10, 100, 100, 10)
    assert band.y == pytest.approx((0.6, 0.9, 0.7, 0.4))
    assert lines["b"].error_y.array == pytest.approx((0.1,))
    assert lines["b"].error_y.arrayminus == pytest.approx((0.1,))
    assert lines["a"].error_y.array is None
    assert lines["c"].line.dash == "dot"
    assert lines["c"].line.color not in (lines["a"].line.color, lines["b"].line.color)
    front = lines["not beaten with as few numbers"]
    assert (front.x, front.y) == ((10, 100), (0.6, 0.8))
    assert {line.y0 for line in figure.layout.shapes} == {0.9, 0.3}
    assert {note.text for note in figure.layout.annotations} == {"whole", "chance", "far: -40, below this range"}


def test_more_ways_than_colours_are_told_apart():
    figure = go.Figure()
    draw(figure, {str(i): [point(10, i), point(20, i)] for i in range(9)}, nothing=0.0, levels={})
    lines = [trace for trace in figure.data if trace.name.isdigit()]
    assert len({(line.line.color, line.line.dash) for line in lines}) == 9


def test_nothing_better_than_nothing_has_no_front():
    figure = go.Figure()
    draw(figure, WAYS, nothing=1.0, levels={"above": 9.0})
    assert "not beaten with as few numbers" not in {trace.name for trace in figure.data}
    assert figure.layout.annotations[0].text == "above: 9, above this range"


@pytest.mark.parametrize(("kind", "budget", "rank"), [
    ("tucker", 4, None), ("tucker", 9, 1), ("tucker", 19, 1), ("tucker", 20, 2), ("tucker", 10_000, 3),
    ("lora", 7, None), ("lora", 8, 1), ("lora", 15, 1), ("lora", 16, 2), ("lora", 10_000, 3),
])  # fmt: skip
def test_the_largest_update_that_fits(kind, budget, rank):
    model = nn.Sequential(nn.Linear(3, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = largest_update(model, budget, kind=kind)
    if rank is None:
        assert made is None
    else:
        size = rank * 8 + (rank * rank if kind == "tucker" else 0)
        assert sum(p.numel() for p in made.trainable_parameters()) == size <= budget
        made.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# ---- the vision chart


WEIGHTS = 16 * 9 + 16 * 16 * 9 + 64 * 256 + 10 * 64  # of the digits network
ROUNDS = {4.0: WEIGHTS // 4, 20.0: WEIGHTS // 20, 100.0: WEIGHTS // 100}


def of_lora(rank):
    shapes = [(16, 9), (16, 144), (64, 256), (10, 64)]
    return sum(min(rank, *shape) * sum(shape) for shape in shapes)


def of_tucker(rank):
    """Channel axes are cut to the rank, and to what the other axes can fill; kernels are whole."""
    first = (min(rank, 9), 1)
    second = (min(rank, 16), min(rank, 16))
    total = math.prod(first) * 9 + 16 * first[0] + 1 + 9 + 9
    total += math.prod(second) * 9 + 16 * second[0] + 16 * second[1] + 9 + 9
    for out, into in ((64, 256), (10, 64)):
        r = min(rank, out)
        total += r * r + r * (out + into)
    return total


@pytest.fixture(scope="module")
def digits():
    return builtin("digits")


@pytest.mark.parametrize("compression", [4.0, 20.0, 100.0])
def test_the_numbers_of_every_way_counted_by_hand(digits, compression):
    learner, budget = storage._Learner.of(digits), ROUNDS[compression]
    assert sum(weight.parameter.numel() for weight in weight_tensors(digits.predictor)) == WEIGHTS
    others = 16 + 16 + 64 + 10
    for method in ("sharing", "subspace", "random"):
        made = learner.start(method, compression, 0)
        assert made.stored == budget
    for method in ("sharing", "subspace"):
        made = learner.start(method, compression, 0)
        assert sum(p.numel() for p in made.network.parameters() if p.requires_grad) == budget + others
    for method, count in (("lora", of_lora), ("tucker", of_tucker)):
        made = learner.start(method, compression, 0)
        ranks = [rank for rank in range(1, 100) if count(rank) <= budget]
        if not ranks:
            assert made is None
            continue
        assert made.stored == count(max(ranks))
        assert sum(p.numel() for p in made.network.parameters() if p.requires_grad) == made.stored + others
    assert learner.start("houlsby", compression, 0) is None
    assert learner.start("prefix", compression, 0) is None


def test_what_is_pruned_before_training_keeps_as_many(digits):
    made = storage._Learner.of(digits).start("synflow", 20.0, 0)
    layers = [module for module in made.network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert made.stored == ROUNDS[20.0] == sum(int((layer.weight != 0).sum()) for layer in layers)


# ---- a network that looks: a transformer of images hosts adapters and prefixes


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4,
            num_channels=1, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vit = transformers.ViTForImageClassification(config)

    def forward(self, x):
        return self.vit(x).logits


def build(seed):
    torch.manual_seed(seed)
    return Looks()


@pytest.fixture(scope="module")
def looks():
    generator = torch.Generator().manual_seed(0)

    def rows(n):  # whether the upper or the lower half is brighter
        x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 2
        x[torch.arange(n), 0, 4 * y] += 3
        return Rows(x, y)

    data = Dataset("halves", "image", "classification", rows(64), rows(40), rows(40), classes=("upper", "lower"))
    model = build(0).eval()
    return Subject("looks", data, model, build=build, recipe=Recipe(epochs=1, batch_size=32, lr=3e-3))


def test_on_a_vision_transformer_all_ways_appear(looks, monkeypatch):
    for name, value in {"_COMPRESSIONS": (4.0,), "_SHOWN": 4.0, "_SEEDS": 2}.items():
        monkeypatch.setattr(storage, name, value)
    chart = load_charts()["parameter-sharing"]
    assert chart.needs.refusal(looks) is None
    learner = storage._Learner.of(looks)
    weights = sum(weight.parameter.numel() for weight in weight_tensors(looks.predictor))
    assert weights == 16 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 16
    for compression in (4.0, 20.0):
        budget = int(weights / compression)
        houlsby, prefix = (learner.start(method, compression, 0) for method in ("houlsby", "prefix"))
        adapters = [2 * 2 * (2 * 16 * r + r + 16) for r in range(1, 17)]
        assert houlsby.stored == max(size for size in adapters if size <= budget)
        assert prefix.stored == max(2 * 2 * 16 * many for many in range(1, 200) if 2 * 2 * 16 * many <= budget)
    before = {name: value.clone() for name, value in looks.predictor.state_dict().items()}
    finding = chart.draw(looks, Budget())
    assert all(torch.equal(value, before[name]) for name, value in looks.predictor.state_dict().items())
    names = {trace["name"] for trace in finding.to_json()["figure"]["data"]}
    assert set(storage._WORDS.values()) <= names
    assert not any("not drawn" in text for text in finding.caveats)
    assert {control.kind for control in finding.comparison.controls} == {"random", "closed-form", "reference"}


def test_why_a_convolutional_network_has_no_prefixes_is_told(digits):
    runs = {method: dict.fromkeys((4.0, 20.0, 100.0), storage._Runs(1, [0.5])) for method in storage._ways(digits)}
    (told,) = storage._left_out(digits, runs)
    assert "attention" in told
    assert "convolution" in told
    del runs["lora"][20.0], runs["lora"][100.0], runs["tucker"]
    _, short = storage._left_out(digits, runs)
    assert f"{storage._WORDS['lora']} at 20, 100 times fewer" in short
    assert f"{storage._WORDS['tucker']} at 4, 20, 100 times fewer" in short
