import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.subject import Dataset, Rows
from theodolite.parameters.finetuning_dimension import (
    FineTuningSubspace,
    compression_bound,
    compression_certificate,
    fine_tune,
    fine_tuning_dimension,
    pretraining_trajectory,
    quantize_coordinates,
    scores,
)
from theodolite.parameters.finetuning_dimension.training import chance_level, quality
from theodolite.parameters.reparametrization import KINDS, fastfood, make_projection

F64 = torch.float64


class Net(nn.Module):
    """Embeddings, two numbered layers, a norm, a head of the right name; one tied tensor."""

    def __init__(self, seed=0, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embeddings = nn.Embedding(9, 6)
        self.layer = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm = nn.LayerNorm(6)
        self.twin = self.layer[1]
        self.classifier = nn.Linear(6, classes)

    def forward(self, input_ids):
        h = self.embeddings(input_ids).mean(dim=1)
        for layer in self.layer:
            h = layer(h).tanh()
        return self.classifier(self.norm(self.twin(h)))


IDS = torch.tensor([[1, 2, 3], [4, 5, 8]])


def dense_maps(tuned):
    """P_i of every adapted tensor as a matrix, from the maps' own to_dense."""
    sizes = [shape.numel() for shape in tuned._shapes]
    if tuned.projection == "hashed":
        return tuned.maps[0].to_dense().split(sizes)
    return [torch.cat([block.to_dense() for block in blocks], dim=1) for blocks in tuned.maps]


def rows(n, seed, classes=2):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return {"input": x, "labels": (x[:, 0] > 0).long() + (classes > 2) * (x[:, 1] > 1).long()}


DATA = {"train": rows(120, 0), "validation": rows(80, 1), "test": rows(80, 2)}


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


QUICK = {
    "head": "2",
    "epochs": 15,
    "seeds": (0,),
    "learning_rates": (0.1,),
    "full_learning_rates": (0.02,),
    "head_learning_rates": (0.1,),
}


@pytest.mark.parametrize("method", ["said", "did"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_stated_sum(method, kind):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tuned = FineTuningSubspace(net, 7, method=method, projection=kind, head="2")
    with torch.no_grad():
        tuned.coordinates.normal_()
        if tuned.scales is not None:
            tuned.scales.copy_(torch.tensor([0.7, -1.3]))
    x, y = torch.randn(4, 5, dtype=F64), torch.tensor([0, 2, 1, 1])
    nn.functional.cross_entropy(tuned(x), y).backward()
    plain = tuned.materialize()
    nn.functional.cross_entropy(plain(x), y).backward()
    g = [parameter.grad.ravel() for parameter in plain.parameters()]
    P, theta = dense_maps(tuned), tuned.coordinates.detach()
    scale = torch.ones(2, dtype=F64) if tuned.scales is None else tuned.scales.detach()
    start = [parameter.detach().ravel() for parameter in net.parameters()]
    for i, weight in enumerate(tuned.weights().values()):
        assert torch.allclose(weight.ravel(), start[i] + scale[i // 2] * P[i] @ theta, rtol=1e-12, atol=1e-12)
    wanted = sum(scale[i // 2] * P[i].T @ g[i] for i in range(4))
    assert torch.allclose(tuned.coordinates.grad, wanted, rtol=1e-9, atol=1e-13)
    if tuned.scales is not None:
        moved = torch.stack([sum(g[i] @ (P[i] @ theta) for i in pair) for pair in ((0, 1), (2, 3))])
        assert torch.allclose(tuned.scales.grad, moved, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["said", "did"])
def test_gradcheck(method):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    tuned = FineTuningSubspace(net, 7, method=method, projection="fastfood", head="2")
    x, count = torch.randn(5, 3, dtype=F64), len(tuned.coordinates)

    def out(all_of_it):
        values = {"coordinates": all_of_it[:count]} | ({"scales": all_of_it[count:]} if method == "said" else {})
        return torch.func.functional_call(tuned, values, (x,))

    at = torch.randn(7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(out, at)
    assert torch.autograd.gradgradcheck(out, at)


@pytest.mark.parametrize("kind", ["fastfood", "sparse", "dense"])
def test_every_tensor_is_fed_by_the_same_coordinates_through_unit_columns_of_its_own(kind):
    tuned = FineTuningSubspace(Net(), 20, method="did", projection=kind).double()
    P = dense_maps(tuned)
    for one, shape in zip(P, tuned._shapes, strict=True):
        assert one.shape == (shape.numel(), 20)  # biases of 6 entries too: no coordinate is dropped
        norms = one.norm(dim=0)
        if kind != "fastfood" or shape.numel() & (shape.numel() - 1) == 0:
            assert torch.allclose(norms, torch.ones(20, dtype=F64), atol=1e-5)
        assert float(norms.min()) > 0.2
    drawn_apart = P[0][:, :4], P[2][:, :4]
    assert not torch.allclose(*drawn_apart)


def test_hashed_is_one_balanced_map_over_all_adapted_entries():
    tuned = FineTuningSubspace(Net(), 20, method="did").double()
    P = torch.cat(dense_maps(tuned))
    assert P.shape == (tuned.projected_parameters, 20)
    assert torch.allclose(P.T @ P, torch.eye(20, dtype=F64), atol=1e-6)
    per_coordinate = (P != 0).sum(dim=0)
    assert int(per_coordinate.max() - per_coordinate.min()) <= 1


@pytest.mark.parametrize("L", [64, 4096])
@pytest.mark.parametrize("d", [3, 50])
def test_the_kronecker_shortcut_is_the_same_transform(L, d):
    generator = torch.Generator().manual_seed(d)
    draws = {
        "signs": torch.randint(0, 2, (L,), generator=generator) * 2.0 - 1,
        "permutation": torch.randperm(L, generator=generator),
        "gaussian": torch.randn(L, generator=generator),
    }
    z = torch.randn(d, generator=generator)
    plain = fastfood(nn.functional.pad(z, (0, L - d)), L - 3, **draws)  # of full length: nothing repeats
    assert torch.allclose(fastfood(z, L - 3, **draws), plain, rtol=1e-5, atol=1e-5)
    linear = make_projection("fastfood", d, L - 3, seed=0)
    unit = linear.to_dense()
    assert torch.allclose(linear(z), unit @ z, atol=1e-5)
    g = torch.randn(L - 3, generator=generator)
    assert torch.allclose(linear.adjoint(g), unit.T @ g, atol=1e-4)


@pytest.mark.parametrize("method", ["said", "did"])
@pytest.mark.parametrize("kind", ["hashed", "fastfood", "sparse"])
def test_it_starts_at_the_pretrained_network_and_unmerges_bit_by_bit(method, kind):
    net = Net()
    tuned = FineTuningSubspace(net, 20, method=method, projection=kind)
    assert torch.equal(tuned(IDS), net(IDS))
    assert torch.equal(tuned(input_ids=IDS), net(IDS))
    with torch.no_grad():
        tuned.coordinates.normal_()
    moved = tuned.eval()(IDS)
    assert not torch.allclose(moved, net(IDS), atol=1e-3)
    tuned.merge_()
    assert tuned.merged
    assert torch.allclose(tuned(IDS), moved, atol=1e-5)
    assert torch.allclose(copy.deepcopy(tuned).unmerge_()(IDS), moved, atol=1e-5)
    tuned.unmerge_()
    for one, other in zip(tuned.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(tuned.materialize()(IDS), moved, atol=1e-5)


def test_what_is_adapted_and_how_it_is_grouped():
    tuned = FineTuningSubspace(Net(), 20)
    assert tuned.group_names == ("layer.0", "layer.1", "norm", "head")
    assert tuned.scales.tolist() == [1.0] * 4
    assert len(tuned.coordinates) + len(tuned.scales) == tuned.dimension == 20
    assert tuned.projected_parameters == 2 * 42 + 12 + 21  # the tied layer once, the norm too, no embeddings
    assert tuned.total_parameters == tuned.projected_parameters + 54
    assert [n for n, p in tuned.named_parameters() if p.requires_grad] == ["coordinates", "scales"]
    each = FineTuningSubspace(Net(), 20, groups="tensor")
    assert (len(each.scales), len(each.coordinates)) == (8, 12)
    assert each.group_names[0] == "layer.0.weight"
    direct = FineTuningSubspace(Net(), 20, method="did")
    assert direct.scales is None
    assert len(direct.coordinates) == 20
    every = FineTuningSubspace(Net(), 20, exclude=None)
    assert every.group_names[0] == "embeddings"
    assert every.projected_parameters == every.total_parameters
    some = FineTuningSubspace(Net(), 20, include="layer.1")
    assert some.group_names == ("layer.1", "head")  # the head is never left out by accident
    assert FineTuningSubspace(Net(), 5, include="layer.1", exclude="classifier").group_names == ("layer.1",)
    assert all(p.requires_grad for p in tuned.materialize().parameters())


def test_group_movement_is_the_relative_length_of_the_step():
    net = Net()
    tuned = FineTuningSubspace(net, 20)
    assert set(tuned.group_movement().values()) == {0.0}
    with torch.no_grad():
        tuned.coordinates.normal_()
        tuned.scales[1] = -2.0
    weights = tuned.weights()
    before = {name: p.detach() for name, p in net.named_parameters()}
    names = ["layer.1.weight", "layer.1.bias"]
    moved = math.sqrt(sum(float((weights[n] - before[n]).detach().square().sum()) for n in names))
    size = math.sqrt(sum(float(before[n].square().sum()) for n in names))
    assert tuned.group_movement()["layer.1"] == pytest.approx(moved / size, rel=1e-4)


def test_a_hugging_face_model_answers_with_its_own_output_and_saves(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    tuned = FineTuningSubspace(bert, 30).eval()
    out = tuned(**batch)
    assert type(out) is type(bert(**batch))
    assert torch.equal(out.logits, bert(**batch).logits)
    assert tuned.group_names == ("bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense", "head")
    with torch.no_grad():
        tuned.coordinates.normal_()
    tuned.materialize().save_pretrained(tmp_path / "plain")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(again(**batch).logits, tuned(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("method", ["said", "did"])
def test_a_saved_subspace_is_small_and_the_same(tmp_path, method):
    path = tmp_path / "t.npz"
    tuned = FineTuningSubspace(Net(3), 20, method=method, seed=5, include="layer.*").eval()
    with torch.no_grad():
        for values in tuned.trained():
            values.normal_()
    tuned.save(path)
    assert path.stat().st_size < 4 * 20 + 2500
    again = FineTuningSubspace.load(path, Net(3)).eval()
    assert torch.equal(again(IDS), tuned(IDS))
    with pytest.raises(ModelError, match="other base weights"):
        FineTuningSubspace.load(path, Net(4))
    np.savez(path, coordinates=np.zeros(3))
    with pytest.raises(ModelError, match="not a saved"):
        FineTuningSubspace.load(path, Net(3))
    with pytest.raises(ModelError, match="not a saved"):
        FineTuningSubspace.load(tmp_path / "nothing", Net(3))


def test_buffers_go_on_and_are_saved(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    tuned = FineTuningSubspace(net, 6, head="2").train()
    tuned(torch.randn(8, 6))
    assert not torch.equal(tuned.model[1].running_mean, torch.zeros(4))
    tuned.save(tmp_path / "t.npz")
    again = FineTuningSubspace.load(tmp_path / "t.npz", net)
    assert torch.equal(again.model[1].running_mean, tuned.model[1].running_mean)


def test_half_precision_weights_move_in_float32_coordinates():
    tuned = FineTuningSubspace(Net().bfloat16(), 20)
    assert tuned.coordinates.dtype == torch.float32
    with torch.no_grad():
        tuned.coordinates.normal_()
    out = tuned(IDS)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(tuned.coordinates.grad).all())


def test_the_bound_is_the_closed_form_and_monotone():
    wanted = 0.05 + math.sqrt((200 * 8 * math.log(2) + math.log(20)) / 100_000)
    assert compression_bound(0.05, 50_000, 200, 8) == pytest.approx(wanted, abs=1e-12)
    assert compression_bound(0.05, 50_000, 200, 8) == pytest.approx(0.15545, abs=5e-6)
    by_d = [compression_bound(0.05, 50_000, d, 8) for d in (10, 100, 1000)]
    by_n = [compression_bound(0.05, n, 200, 8) for n in (100, 1000, 10_000)]
    assert by_d == sorted(by_d)
    assert by_n == sorted(by_n, reverse=True)
    assert compression_bound(0.05, 50_000, 200, 8, extra_bits=64) == compression_bound(0.05, 50_000, 208, 8)
    with pytest.raises(InputError, match="risk"):
        compression_bound(1.2, 10, 1, 1)
    with pytest.raises(InputError, match="bits >= 1"):
        compression_bound(0.1, 10, 1, 0)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_quantised_coordinates_take_few_values_of_their_range(bits):
    tuned = FineTuningSubspace(Net(), 60)
    with torch.no_grad():
        tuned.coordinates.normal_()
        tuned.scales.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    before = tuned.coordinates.detach().clone()
    small = quantize_coordinates(tuned, bits)
    assert torch.equal(tuned.coordinates, before)
    for ours, whole in zip(small.trained(), tuned.trained(), strict=True):
        ours, whole = ours.detach(), whole.detach()
        span = float(whole.max() - whole.min())
        assert len(torch.unique(ours)) <= 2**bits
        assert float((ours - whole).abs().max()) <= 0.5 * span / (2**bits - 1) + 1e-6
        assert (float(ours.min()), float(ours.max())) == pytest.approx((float(whole.min()), float(whole.max())))
    with pytest.raises(InputError, match="between 1 and 24"):
        quantize_coordinates(tuned, 0)
    with pytest.raises(InputError, match="unmerge_"):
        quantize_coordinates(tuned.merge_(), 4)


def test_the_certificate_is_of_the_quantised_model():
    tuned = FineTuningSubspace(mlp(0), 10, head="2")
    fine_tune(tuned, DATA["train"], lr=0.1, epochs=10)
    found = compression_certificate(tuned, DATA["train"], bits=2, configurations=16)
    small = quantize_coordinates(tuned, 2)
    wrong = float((small(DATA["train"]["input"]).argmax(dim=1) != DATA["train"]["labels"]).double().mean())
    assert found.empirical_risk == wrong
    assert found.description_bits == 10 * 2 + 64 + 2 * 64 + 4
    assert found.bound == compression_bound(wrong, 120, 10, 2, extra_bits=64 + 128 + 4)
    assert found.vacuous == (found.bound >= found.chance_risk)
    assert found.vacuous  # 216 bits for 120 rows
    assert found.unquantised_risk <= 0.2
    with pytest.raises(DataError, match="labels"):
        compression_certificate(tuned, {"input": torch.ones(3, 6)})
    with pytest.raises(InputError, match="configurations"):
        compression_certificate(tuned, DATA["train"], configurations=0)


def test_d90_counts_directions_beside_full_fine_tuning_head_and_chance():
    found = fine_tuning_dimension(mlp, DATA, method="did", dimensions=(1, 40), random_build=mlp, **QUICK)
    assert found.d90 == found.d90_above_chance == 40
    assert found.full > 0.9
    assert found.chance == chance_level(DATA["test"]["labels"], "accuracy")
    assert found.chance < found.head_only <= 1
    assert found.head_parameters == 18
    assert (found.total_dimension, found.projected_parameters) == (74, 74)
    assert found.curve.dimensions == (1, 40)
    assert found.best_learning_rate == {1: 0.1, 40: 0.1}
    assert np.array_equal(found.random_curve.runs, found.curve.runs)  # the same network is its own control
    assert found.random_d90_above_chance == 40
    assert found.scales == {}
    assert set(found.movement) == {"0", "head"}


def test_the_step_size_is_chosen_on_validation_rows_and_the_reference_can_be_a_number():
    options = QUICK | {"learning_rates": (1e-6, 0.1), "seeds": (0, 1)}
    found = fine_tuning_dimension(mlp, DATA, dimensions=(5, 30), reference=0.99, threshold=0.5, **options)
    assert found.best_learning_rate[30] == 0.1
    assert found.full == 0.99
    assert found.d90 == 5  # half of 0.99 is what one class alone nearly reaches ...
    assert found.curve.runs.shape == (2, 2)
    assert len(found.scales) == 2
    again = fine_tuning_dimension(mlp, DATA, dimensions=(5, 30), reference=0.99, threshold=0.5, **options)
    assert np.array_equal(again.curve.runs, found.curve.runs)


def test_a_constant_answer_can_pass_the_papers_line_but_not_ours():
    skewed = {
        name: {"input": part["input"], "labels": (part["input"][:, 0] > 0.8).long()} for name, part in DATA.items()
    }
    options = QUICK | {"learning_rates": (1e-6,)}  # learns nothing

    def constant(seed):
        net = mlp(seed)
        nn.init.constant_(net[2].weight, 0)
        net[2].bias.data = torch.tensor([1.0, 0.0])
        return net

    found = fine_tuning_dimension(
        constant, skewed, dimensions=(3,),
        reference=0.83, **options,
    )  # fmt: skip
    assert found.selection.chance > 0.9 * 0.83
    assert found.d90 == 3  # the paper's number says that three coordinates do
    assert found.d90_above_chance is None


def test_a_dataset_and_regression_work():
    x = {name: part["input"] for name, part in DATA.items()}
    table = Dataset("t", "tabular", "classification", *(Rows(x[n], DATA[n]["labels"]) for n in x), classes=("a", "b"))
    same = fine_tuning_dimension(mlp, table, dimensions=(5,), reference=0.9, **QUICK)
    ours = fine_tuning_dimension(mlp, DATA, dimensions=(5,), reference=0.9, **QUICK)
    assert np.array_equal(same.curve.runs, ours.curve.runs)
    arrays = {name: {column: v.numpy() for column, v in part.items()} for name, part in DATA.items()}
    arrays["train"]["input"] = arrays["train"]["input"].astype(np.float64)
    same = fine_tuning_dimension(mlp, arrays, dimensions=(5,), reference=0.9, **QUICK)
    assert np.array_equal(same.curve.runs, ours.curve.runs)
    values = {name: {"input": part, "labels": part[:, 0] + 0.5 * part[:, 1]} for name, part in x.items()}

    def line(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    found = fine_tuning_dimension(line, values, dimensions=(40,), metric="r2", **QUICK)
    assert found.chance == 0
    assert found.d90 == 40


def test_a_trajectory_is_a_table_with_missing_dimensions():
    options = QUICK | {"learning_rates": (1e-6,), "reference": 1.0}
    table = pretraining_trajectory({100: mlp, 0: mlp}, DATA, dimensions=(5,), **options)
    assert table["step"].tolist() == [0, 100]
    assert table["d90"].isna().all()
    assert table["full"].tolist() == [1.0, 1.0]
    assert "quality at 5" in table
    with pytest.raises(InputError, match="checkpoint"):
        pretraining_trajectory({}, DATA)


def test_padding_that_no_row_needs_is_cut_and_changes_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.classifier, self.seen = nn.Embedding(9, 4), nn.Linear(4, 2), []

        def forward(self, input_ids, attention_mask):
            self.seen.append(input_ids.shape[1])
            weight = attention_mask[..., None].float()
            return self.classifier((self.embed(input_ids) * weight).sum(dim=1) / weight.sum(dim=1))

    wide = {
        "input_ids": nn.functional.pad(IDS, (0, 7)),
        "attention_mask": nn.functional.pad(torch.ones_like(IDS), (0, 7)),
    }
    model = Masked()
    whole = model(**wide)
    assert torch.allclose(scores(model, wide | {"labels": torch.tensor([0, 1])}), whole, atol=1e-6)
    assert model.seen[-1] == 3


def test_metrics_have_their_chance():
    y = torch.tensor([0, 0, 0, 1])
    right = nn.functional.one_hot(y).float()
    assert [quality(right, y, metric) for metric in ("accuracy", "f1", "matthews")] == [1, 1, 1]
    assert [chance_level(y, metric) for metric in ("accuracy", "f1", "matthews")] == [0.75, 0.4, 0]
    three = torch.tensor([0, 1, 2, 2])
    assert chance_level(three, "f1") == pytest.approx(2 / 3 / 3)


@pytest.mark.parametrize(("options", "message"), [
    ({"dimension": 4}, "4 leaves no coordinate beside the 4 scales.*at least 5"),
    ({"dimension": 8, "groups": "tensor"}, "at least 9.*groups=\"layer\""),
    ({"dimension": 0, "method": "did"}, "at least one dimension"),
    ({"dimension": 500, "method": "did"}, "does not fit into D = 117"),
    ({"dimension": 20, "method": "both"}, "method is one of said, did"),
    ({"dimension": 20, "groups": "all"}, "groups is one of"),
    ({"dimension": 20, "projection": "none"}, "projection is one of"),
    ({"dimension": 20, "include": "nothing", "exclude": "classifier"}, "no parameter is left"),
    ({"dimension": 20, "head": "score"}, "no module 'score' to be the head; candidates: classifier"),
])  # fmt: skip
def test_what_does_not_fit_is_said(options, message):
    with pytest.raises(InputError, match=message):
        FineTuningSubspace(Net(), options.pop("dimension"), **options)


def test_merging_twice_and_training_while_merged_are_refused(tmp_path):
    tuned = FineTuningSubspace(Net(), 20)
    with pytest.raises(ModelError, match="nothing is merged"):
        tuned.unmerge_()
    tuned.merge_()
    with pytest.raises(ModelError, match="already"):
        tuned.merge_()
    with pytest.raises(ModelError, match="no gradient"):
        fine_tune(tuned, {"input_ids": IDS, "labels": torch.tensor([0, 1])}, lr=0.1, epochs=1)
    with pytest.raises(ModelError, match="unmerge_"):
        tuned.state_dict()
    with pytest.raises(ModelError, match="unmerge_"):
        tuned.save(tmp_path / "x.npz")
    with pytest.raises(ModelError, match="unmerge_"):
        tuned.group_movement()
    with pytest.raises(ModelError, match="meta"), torch.device("meta"):
        raise_of_meta()


def raise_of_meta():
    try:
        FineTuningSubspace(nn.Linear(3, 2), 2, head=None)
    except ModelError as error:
        raise ModelError(f"meta: {error}") from error


def changed(part, **columns):
    return DATA | {part: DATA[part] | columns}


@pytest.mark.parametrize(("data", "message"), [
    (changed("train", labels=torch.zeros(120, dtype=torch.long)), "at least two classes"),
    (changed("train", labels=torch.arange(120) % 3), "labels lie in 0..1; train has 2"),
    (changed("test", labels=torch.arange(80) % 2 - 1), "from 0, got -1"),
    (changed("test", labels=torch.ones(80)), "class indices"),
    (changed("test", labels=torch.ones(79, dtype=torch.long)), "same number of rows"),
    (changed("test", input=torch.ones(80, 4)), "cannot take the rows of test"),
    (changed("test", labels=np.array(["a"] * 80)), "arrays of numbers"),
    ({"train": DATA["train"]}, "parts train, validation and test"),
    ({"train": {"labels": DATA["train"]["labels"]}, "validation": {}, "test": {}}, "at least one input"),
])  # fmt: skip
def test_data_that_cannot_be_used_are_refused_before_any_training(data, message):
    with pytest.raises(InputError, match=message):
        fine_tuning_dimension(mlp, data, dimensions=(5,), **QUICK)


@pytest.mark.parametrize(("options", "message"), [
    ({"dimensions": (5, 5)}, "increase"),
    ({"dimensions": ()}, "increase"),
    ({"dimensions": (2, 10)}, "at least 3"),
    ({"dimensions": (5,), "learning_rates": ()}, "learning_rates"),
    ({"dimensions": (5,), "threshold": 0}, "threshold"),
    ({"dimensions": (5,), "seeds": (0, 0)}, "each once"),
    ({"dimensions": (5,), "metric": "rouge"}, "metric is one of"),
    ({"dimensions": (5,), "head": "classifier"}, "candidates: 0, 2"),
    ({"dimensions": (5,), "epochs": 0}, "epochs >= 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        fine_tuning_dimension(mlp, DATA, **(QUICK | options))


def test_a_reference_that_learned_nothing_has_no_d90():
    with pytest.raises(TrainingCollapsedError, match="reference learned nothing"):
        fine_tuning_dimension(mlp, DATA, dimensions=(5,), **(QUICK | {"full_learning_rates": (1e-9,), "epochs": 1}))


def test_a_loss_that_is_not_finite_names_dimension_and_step_size():  # with no head to name, none is trained alone
    def broken(seed):
        net = mlp(seed)
        net.register_forward_hook(lambda module, args, out: out * math.nan if module.training else out)
        return net

    with pytest.raises(TrainingCollapsedError, match=r"nan in epoch 1 at d = 5, lr = 0.1"):
        fine_tuning_dimension(broken, DATA, method="did", dimensions=(5,), reference=0.9, **(QUICK | {"head": None}))


def test_runs_spread_over_processes_give_the_same_numbers():
    options = dict(dimensions=(5,), reference=0.9, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = fine_tuning_dimension(mlp, DATA, **options)
    there = fine_tuning_dimension(mlp, DATA, executor=1, **options)
    assert np.array_equal(here.curve.runs, there.curve.runs)


class Decoder(nn.Module):
    """One matrix for the embeddings and for the scores, as in many language models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.layer = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 9, bias=False)
        self.classifier.weight = self.embed.weight

    def forward(self, input_ids):
        return self.classifier(self.layer(self.embed(input_ids).mean(dim=1)))


def test_a_tied_matrix_counts_once_and_moves_in_both_places():
    tuned = FineTuningSubspace(Decoder(), 10)
    assert tuned.projected_parameters == 36 + 20
    with torch.no_grad():
        tuned.coordinates.normal_()
    out = tuned(IDS)
    made = tuned.materialize()
    assert made.classifier.weight is made.embed.weight
    assert torch.allclose(made(IDS), out, atol=1e-5)
    out.square().sum().backward()
    made(IDS).square().sum().backward()
    full = torch.cat([p.grad.ravel() for p in made.parameters()])
    scale = torch.cat([tuned.scales[g].expand(n) for g, n in zip(tuned._group_of, (36, 16, 4), strict=True)])
    assert torch.allclose(tuned.coordinates.grad, tuned.maps[0].adjoint(full * scale), rtol=1e-3, atol=1e-3)


def test_a_network_that_is_shared_stays_as_it_was():
    net = Net()
    tuned = FineTuningSubspace(net, 20)
    with torch.no_grad():
        tuned.coordinates.normal_()
    tuned(IDS)
    for one, other in zip(tuned.model.parameters(), net.parameters(), strict=True):
        assert isinstance(one, nn.Parameter)
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["said", "did"])
@pytest.mark.parametrize("kind", ["hashed", "fastfood"])
def test_a_decoder_with_a_classification_head(kind, method):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ModelError, match="candidates: score"):
        FineTuningSubspace(gpt, 40)
    tuned = FineTuningSubspace(
        gpt, 40, method=method, projection=kind, head="score", exclude=("*wte*", "*wpe*"), seed=2
    )
    assert tuned.group_names == ("transformer.h.0", "transformer.h.1", "transformer.ln_f", "head")
    assert torch.equal(tuned(input_ids=IDS).logits, gpt(input_ids=IDS).logits)
    with torch.no_grad():
        tuned.coordinates.normal_()
    moved = tuned(input_ids=IDS).logits
    assert torch.allclose(tuned.merge_()(input_ids=IDS).logits, moved, atol=1e-5)
    for one, other in zip(tuned.unmerge_().model.parameters(), gpt.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_tied_head_is_the_head_by_either_name():
    assert FineTuningSubspace(Decoder(), 10, include="layer").projected_parameters == 36 + 20
    assert FineTuningSubspace(Decoder(), 10, exclude="embed").projected_parameters == 20
    assert FineTuningSubspace(Decoder(), 10, exclude="classifier").projected_parameters == 20


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.fc = nn.Linear(outputs, outputs)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu()
        return h * self.fc(h.mean((2, 3)))[:, :, None, None].sigmoid()


class Images(nn.Module):
    """Blocks with a layer called like the head, one of them under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(Block(1, 4), Block(4, 4))
        self.again, self.fc = self.layer1[1], nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.again(self.layer1(x)).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_convolutional_backbone(dtype, tmp_path):
    net, x = Images().to(dtype).eval(), torch.randn(5, 1, 8, 8, dtype=dtype)
    tuned = FineTuningSubspace(net, 30, head="fc")
    assert tuned.group_names == ("layer1.0", "layer1.1", "head")  # not the fc inside the blocks
    assert tuned.projected_parameters == sum(p.numel() for p in net.parameters())
    assert not tuned.training  # as the network is
    with torch.no_grad():
        tuned.coordinates.normal_()
    moved = tuned(x)
    assert moved.dtype == dtype
    assert torch.allclose(tuned.materialize()(x), moved, atol=1e-5)
    assert all(isinstance(p, nn.Parameter) for p in tuned.model.parameters())
    tuned.save(tmp_path / "t.npz")
    assert torch.equal(FineTuningSubspace.load(tmp_path / "t.npz", net)(x), moved)


def test_a_full_name_of_the_head_is_that_module_alone():
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2))
    assert FineTuningSubspace(nested, 20, head="2").group_names == ("0", "head")


@pytest.mark.parametrize("kind", KINDS)
def test_more_coordinates_than_weights_are_refused_by_every_map(kind):
    with pytest.raises(InputError, match="146 coordinates does not fit into D = 117"):
        FineTuningSubspace(Net(), 150, projection=kind)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_whole_type_work(dtype):
    data = {name: {"input": part["input"], "labels": part["labels"].to(dtype)} for name, part in DATA.items()}
    found = fine_tuning_dimension(mlp, data, dimensions=(40,), reference=0.9, **QUICK | {"epochs": 2})
    plain = fine_tuning_dimension(mlp, DATA, dimensions=(40,), reference=0.9, **QUICK | {"epochs": 2})
    assert np.array_equal(found.curve.runs, plain.curve.runs)


def test_values_that_are_not_finite_are_no_target():
    data = changed("validation", labels=torch.full((80,), math.nan))
    with pytest.raises(DataError, match="validation hold NaN"):
        fine_tuning_dimension(mlp, data, dimensions=(5,), metric="r2", **QUICK)
