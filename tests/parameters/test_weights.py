import pytest
from torch import nn

from theodolite.core.errors import ModelError
from theodolite.parameters.weights import matches, weight_tensors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.positions = nn.Parameter(nn.init.zeros_(nn.Parameter(nn.Linear(3, 4).weight)))


def test_a_tied_tensor_is_there_once_with_all_its_names():
    found = weight_tensors(Tied())
    assert [(w.name, w.kind, w.tied) for w in found] == [
        ("embed.weight", "embedding", ("head.weight",)),
        ("block.0.weight", "linear", ()),
    ]
    assert [w.name for w in weight_tensors(Tied(), kinds=["other"])] == ["positions"]


def test_patterns_name_parameters_or_what_holds_them():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.Linear(5, 7), nn.Linear(7, 2))
    assert [w.name for w in weight_tensors(model, exclude="1")] == ["0.weight", "2.weight"]
    assert [w.name for w in weight_tensors(model, include=["2*"])] == ["2.weight"]
    assert weight_tensors(model, kinds=["conv"])[0].shape == (6, 1, 3, 3)
    assert [w.name for w in weight_tensors(model, min_size=30)] == ["0.weight", "1.weight"]
    assert [w.name for w in weight_tensors(Tied(), include="head")] == ["embed.weight"]
    assert matches("a.b.weight", ["a.*.weight"])
    assert not matches("ab.weight", ["a"])


def test_nothing_left_names_what_there_is():
    with pytest.raises(ModelError, match=r"0\.weight \(Linear\)"):
        weight_tensors(nn.Sequential(nn.Linear(2, 2)), include="nothing")
