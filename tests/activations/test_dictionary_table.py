"""The table of all dictionaries: known answers for an identity, and every kind of dictionary in it."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from typer.testing import CliRunner

from theodolite.activations.ast_probe import ASTProbe, SyntaxTree
from theodolite.activations.dictionary import SparseAutoencoder, load_sae, train_sae
from theodolite.activations.dictionary_evaluation import SupervisedDictionary, compare_dictionaries
from theodolite.activations.interaction_basis import InteractionBasis
from theodolite.activations.local_interaction_basis import LocalInteractionBasis
from theodolite.activations.relative import RelativeProjection
from theodolite.core.dictionary import Dictionary, LinearDictionary, explained_variance, kept_codes_curve
from theodolite.core.errors import DataError, InputError
from theodolite.core.store import ActivationStore
from theodolite.run_commands import run_app
from tiny_language_model import save_tiny_model, sentences

SCALES = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])  # of variance 25, 16, 9, 4, 1 and 1/4 of 55.25
HEAD = torch.tensor(
    [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.3], [0.1, 0.2, 0.0], [0.0, 0.0, 0.0]]
)


def states(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(n) % 3
    rows = torch.randn(n, 6, generator=generator)
    rows[:, :3] += 2 * torch.nn.functional.one_hot(kind, 3)
    return rows * SCALES, kind


FIT, FIT_KIND = states()
HELD, KIND = states(300, seed=1)


def loss(held, targets_of):
    return torch.nn.functional.cross_entropy(held @ HEAD, KIND[targets_of], reduction="none")


def network():
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6))
        net[0].bias.fill_(100.0)
        net[2].weight.copy_(HEAD.T)
        net[2].bias.fill_(0.0)
    return net


def probe():
    tree = SyntaxTree.from_nested(("s", ("a", "x", "y"), ("b", "z", "w")))
    hidden = [FIT[i : i + 4] for i in range(0, 80, 4)]
    return ASTProbe(rank=4, min_steps=5, max_epochs=1).fit(hidden, [tree] * len(hidden))


def every_kind(seed=0):
    sae = SparseAutoencoder(6, 12, "topk", k=2, seed=seed)
    train_sae(sae, FIT, epochs=20, lr=3e-3, batch_size=64, seed=seed)
    basis = InteractionBasis.from_module(network(), ["input"]).fit(FIT)
    local = LocalInteractionBasis.from_module(network(), ["input"]).fit(FIT)
    return {
        "neurons": LinearDictionary.neurons(6),
        "principal components": LinearDictionary.principal_components(FIT, 2),
        "random": LinearDictionary.random(6, 2, seed=seed, centre=FIT.mean(dim=0)),
        "interaction basis": basis.layers_[0],
        "local interaction basis": local.layers_[0],
        "sparse autoencoder": sae,
        "supervised": SupervisedDictionary().fit(FIT, {"class": FIT_KIND.tolist()}),
        "relative": RelativeProjection(6, similarity="inner", seed=seed).fit(FIT),
        "syntax probe": probe(),
    }


def test_an_identity_keeps_all_moves_all_and_its_d90_is_counted_by_hand():
    table = compare_dictionaries({"neurons": LinearDictionary.neurons(6)}, FIT, HELD, loss, moved=6)
    row = table.frame.loc["neurons"]
    assert row["explained"] == row["recovered"] == pytest.approx(1.0, abs=1e-6)
    assert row["control"] == pytest.approx(1.0, abs=1e-5)  # every coordinate moved is the whole patch
    assert (row["codes"], row["active"], row["dead"]) == (6, 6, 0)
    shares = (HELD - FIT.mean(dim=0)).square().sum(dim=0)
    kept = shares.cumsum(0) / shares.sum()
    assert row["d90"] == int((kept < 0.9).sum()) + 1 == 3
    assert np.isnan(row["stability"])
    assert table.notes == ()
    clean, ablated = table.loss
    assert clean.value == pytest.approx(float(loss(HELD, torch.arange(300)).mean()), abs=1e-6)
    mean = FIT.mean(dim=0).expand_as(HELD)
    assert ablated.value == pytest.approx(float(loss(mean, torch.arange(300)).mean()), abs=1e-6)


def test_a_part_of_the_coordinates_by_hand():
    """Codes 0 and 1 of the coordinates, about the mean: explained, recovered and control are formulas."""
    eye, mean = torch.eye(6)[:2], FIT.mean(dim=0)
    table = compare_dictionaries({"two": LinearDictionary(eye, eye, mean)}, FIT, HELD, loss, moved=1, seed=3)
    rebuilt = torch.cat([HELD[:, :2], mean[2:].expand(300, 4)], dim=1)
    lost, about = (HELD - rebuilt).square().sum(), (HELD - HELD.mean(dim=0)).square().sum()
    own = torch.arange(300)
    clean, without, kept = (float(loss(x, own).mean()) for x in (HELD, mean.expand_as(HELD), rebuilt))
    row = table.frame.loc["two"]
    assert row["explained"] == pytest.approx(1 - float(lost / about), abs=1e-5)
    assert row["recovered"] == pytest.approx((kept - without) / (clean - without), abs=1e-5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    assert bool((other != own).all())
    step = HELD[other] - HELD
    larger = step[:, :2].abs().argmax(dim=1)
    edited = HELD.clone()
    edited[own, larger] = HELD[other][own, larger]
    idle, edit, patch = (float(loss(x, other).mean()) for x in (HELD, edited, HELD[other]))
    assert row["control"] == pytest.approx((idle - edit) / (idle - patch), abs=1e-5)
    assert table.estimate("two", "control").low <= row["control"] <= table.estimate("two", "control").high
    assert table.estimate("two", "codes").value == 2


def test_every_kind_of_dictionary_stands_in_one_table():
    made, again = every_kind(), every_kind(seed=1)
    assert all(isinstance(one, Dictionary) for one in made.values())
    table = compare_dictionaries(made, FIT, HELD, loss, again=again)
    frame = table.frame
    assert list(frame.index) == list(made)
    assert not frame.isna().any(axis=None), table.notes
    for name, one in made.items():
        assert frame.loc[name, "explained"] == pytest.approx(explained_variance(one, HELD), abs=1e-5)
    for column in ("explained", "recovered", "control"):
        assert (frame[f"{column}_low"] <= frame[column]).all()
        assert (frame[column] <= frame[f"{column}_high"]).all()
    # all coordinates of the output's three scores: two differences are what the loss uses
    assert frame.loc["interaction basis", "recovered"] == pytest.approx(1.0, abs=1e-3)
    assert frame.loc["principal components", "explained"] > frame.loc["random", "explained"]
    assert frame.loc["sparse autoencoder", "active"] <= 2
    assert frame.loc["supervised", "active"] == 1
    assert frame.loc["relative", "explained"] == pytest.approx(1.0, abs=1e-4)  # six anchors span six dimensions
    drawn_of_nothing = ["neurons", "principal components", "interaction basis", "supervised", "syntax probe"]
    assert np.allclose(frame.loc[drawn_of_nothing, "stability"], 1.0, atol=1e-5)
    assert frame.loc["relative", "stability"] < 0.999
    assert "recovered_low" not in str(table)
    assert "syntax probe" in str(table)


def test_states_with_tokens_are_inputs_with_one_loss_each():
    held = HELD.reshape(60, 5, 6)

    def of_texts(given, targets_of):
        assert given.shape == held.shape
        return loss(given.reshape(-1, 6), (targets_of[:, None] * 5 + torch.arange(5)).flatten()).view(60, 5).mean(dim=1)

    made = {"components": LinearDictionary.principal_components(FIT, 3)}
    flat = compare_dictionaries(made, FIT, HELD, loss).frame.loc["components"]
    by_text = compare_dictionaries(made, FIT, held, of_texts, groups=np.arange(60) // 2).frame.loc["components"]
    for column in ("explained", "recovered", "d90", "active"):
        assert by_text[column] == pytest.approx(flat[column], abs=1e-5)


def test_memory_does_not_change_it():
    made = {"neurons": LinearDictionary.neurons(6), "two": LinearDictionary.principal_components(FIT, 2)}
    one, two = (compare_dictionaries(made, FIT, HELD, loss, memory=memory).frame for memory in (None, 1))
    assert np.allclose(one, two, atol=1e-5, equal_nan=True)


def test_without_a_loss_nothing_is_said_of_the_model():
    table = compare_dictionaries({"neurons": LinearDictionary.neurons(6)}, FIT, HELD)
    assert np.isnan(table.frame.loc["neurons", ["recovered", "control"]].to_numpy(float)).all()
    assert table.frame.loc["neurons", "d90"] == 3
    assert "no loss" in table.notes[0]
    assert table.loss is None


def test_a_layer_that_does_not_matter_gets_no_share():
    def same(held, targets_of):
        return torch.ones(len(held))

    table = compare_dictionaries({"neurons": LinearDictionary.neurons(6)}, FIT, HELD, same)
    assert np.isnan(table.frame.loc["neurons", ["recovered", "control"]].to_numpy(float)).all()
    assert [note.split(",")[0] for note in table.notes] == [
        "the layer does not matter for the loss on these inputs",
        "another input's states do not change the loss",
    ]


class Lengthless(BaseEstimator):
    """Only the direction of what two coordinates add up to: codes do not add up."""

    directions = torch.eye(6)[:2]

    def encode(self, x):
        return x[..., :2]

    def decode(self, codes):
        return torch.nn.functional.normalize(codes @ self.directions, dim=-1)


def test_a_dictionary_that_does_not_add_up_is_told():
    table = compare_dictionaries({"lengthless": Lengthless()}, FIT, HELD, loss)
    row = table.frame.loc["lengthless"]
    assert np.isnan(row["d90"])
    assert np.isnan(row["control"])
    assert not np.isnan(row["recovered"])
    assert "lengthless: Lengthless does not add its codes up" in table.notes[0]


def test_d90_is_found_by_the_same_curve_as_by_reconstructing_for_every_count():
    sae = every_kind()["sparse autoencoder"]
    curve = kept_codes_curve(sae, HELD, fit=FIT, blocks=3)
    mean = sae.encode(FIT).mean(dim=0).detach()
    order = (sae.encode(FIT).var(dim=0) * (sae.W_dec / sae.scale).square().sum(dim=1)).argsort(descending=True)
    for k in (1, 5, 12):
        codes = mean.expand(300, 12).clone()
        codes[:, order[:k]] = sae.encode(HELD)[:, order[:k]].detach()
        off = (HELD - sae.decode(codes).detach()).square().sum(dim=1)
        about = (HELD - HELD.mean(dim=0)).square().sum(dim=1)
        wanted = [1 - float(a.sum() / b.sum()) for a, b in zip(off.split(100), about.split(100), strict=True)]
        assert np.allclose(curve.runs[k - 1], wanted, atol=1e-4)
    assert curve.reference == pytest.approx(curve.mean[-1])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: compare_dictionaries({}, FIT, HELD), "at least one dictionary"),
        (lambda: compare_dictionaries({"x": LinearDictionary.neurons(6)}, FIT, HELD, moved=0), "one code to move"),
        (lambda: compare_dictionaries({"x": LinearDictionary.neurons(6)}, FIT, HELD[:1]), "at least two inputs"),
        (lambda: compare_dictionaries({"x": LinearDictionary.neurons(5)}, FIT, HELD), "width 5"),
        (
            lambda: compare_dictionaries({"x": LinearDictionary.neurons(6)}, FIT, HELD, lambda held, _: held.mean()),
            "one each",
        ),
    ],
)
def test_what_cannot_be_compared_is_told(call, text):
    with pytest.raises(InputError, match=text):
        call()


def test_the_command_trains_on_states_kept_on_disk(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("\n\n".join(sentences(80)))
    given = ["--model", model, "--data", str(tmp_path / "notes.txt"), "--task", "language", "--tokens", "2560"]
    told = CliRunner().invoke(run_app, ["sae-evaluation", *given, "--store", str(tmp_path / "kept"), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    store, made = ActivationStore(tmp_path / "kept"), load_sae(found["autoencoder"])
    assert found["states on disk"] == len(store[store.names[0]]) == 36 * 63  # 40 rows of 64 tokens, a tenth held out
    rows = store.tensor(store.names[0])
    assert explained_variance(made, rows) > explained_variance(LinearDictionary.random(16, 2, seed=0), rows)
    assert found["table"]["sparse autoencoder"]["explained"] > found["table"]["random directions"]["explained"]
    short = CliRunner().invoke(
        run_app, ["sae-evaluation", *given, "--store", str(tmp_path / "kept"), "--tokens", "2000"]
    )
    assert isinstance(short.exception, DataError)  # the folder holds the states of other rows
