"""Sparse autoencoders: formulas of each kind by hand, training on a known dictionary, folders as SAELens has them, errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.activations.dictionary import SparseAutoencoder, load_sae, save_sae, train_sae
from theodolite.core.capture import ActivationError
from theodolite.core.dictionary import Dictionary, LinearDictionary, measure, stability
from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError


def sparse_rows(n=600, d=16, atoms=12, on=2, seed=0, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    atoms_ = torch.nn.functional.normalize(torch.randn(atoms, d, generator=torch.Generator().manual_seed(99)), dim=1)
    codes = torch.zeros(n, atoms)
    places = torch.rand(n, atoms, generator=rng).topk(on, dim=1).indices
    codes.scatter_(1, places, 1 + torch.rand(n, on, generator=rng))
    return codes @ atoms_ + mean, atoms_


def made(kind, **options):
    sae = SparseAutoencoder(5, 9, kind, **options)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_dec", "W_enc"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return sae


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def test_vanilla_is_its_formula():
    sae = made("vanilla", l1=0.7)
    f = torch.relu((X - sae.b_dec) @ sae.W_enc + sae.b_enc)
    out = sae(X)
    assert torch.allclose(sae.encode(X), f, atol=1e-6)
    assert torch.allclose(out.reconstruction, f @ sae.W_dec + sae.b_dec, atol=1e-6)
    wanted = (X - out.reconstruction).square().sum(1).mean() + 0.7 * f.sum(1).mean()
    assert float(out.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_gated_is_its_formula_and_its_gate_trains_through_a_frozen_decoder():
    sae = made("gated", l1=0.7)
    q = (X - sae.b_dec) @ sae.W_enc
    pi = q + sae.b_gate
    f = (pi > 0) * torch.relu(q * sae.r_mag.exp() + sae.b_mag)
    out = sae(X)
    assert torch.allclose(out.latents, f, atol=1e-6)
    aside = (X - torch.relu(pi) @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    assert float(out.losses["gate"].detach()) == pytest.approx(float(aside.detach()), rel=1e-5)
    assert float(out.losses["sparsity"].detach()) == pytest.approx(
        0.7 * float(torch.relu(pi).sum(1).mean().detach()), rel=1e-5
    )
    out.losses["gate"].backward()
    assert sae.W_dec.grad is None or float(sae.W_dec.grad.abs().max()) == 0
    assert float(sae.b_gate.grad.abs().max()) > 0


def test_topk_keeps_the_largest():
    sae = made("topk", k=2)
    p = torch.relu((X - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    least = p.topk(2, dim=1).values[:, -1:]
    assert torch.allclose(sae.encode(X), p * (p >= least), atol=1e-6)


def test_dead_latents_explain_the_error_that_is_left():
    sae = made("topk", k=1)
    assert set(sae(X).losses) == {"reconstruction"}
    sae.dead[:4] = True
    out = sae(X)
    out.losses["dead"].backward()
    assert float(sae.W_dec.grad[:4].abs().max()) > 0
    assert float(sae.W_dec.grad[4:].abs().max()) == 0


def test_attribution_is_its_formula():
    sae = made("attribution", l1=0.5)
    g = torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    out = sae(X, g)
    wanted = 0.5 * (out.latents * (g @ sae.W_dec.T)).abs().sum(1).mean()
    assert float(out.losses["attribution"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted = ((X - out.reconstruction) * g).sum(1).abs().mean()
    assert float(out.losses["unexplained"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    with pytest.raises(InputError, match="needs the outcome's gradients"):
        sae(X)


def test_training_finds_the_atoms_that_rows_are_made_of():
    x, atoms = sparse_rows(2000)
    sae = SparseAutoencoder(16, 24, "topk", k=2)
    history = train_sae(sae, x, epochs=40, lr=3e-3, batch_size=128)
    found = (torch.nn.functional.normalize(atoms, dim=1) @ sae.directions.T).abs().max(dim=1).values
    assert float(found.mean()) > 0.9
    assert history.fvu[-1] < 0.1
    assert history.fvu[-1] < history.fvu[0]
    assert history.l0[-1] <= 2
    assert len(history.dead) == 40
    fresh, _ = sparse_rows(500, seed=5)
    table = measure({"sae": sae, "pca": LinearDictionary.principal_components(x, 2)}, fresh)
    assert isinstance(sae, Dictionary)
    assert table[0].explained > table[1].explained + 0.2
    assert table[0].active <= 2


@pytest.mark.parametrize("kind", ["vanilla", "gated", "topk", "attribution"])
def test_after_training_rows_have_norm_one_and_inputs_norm_root_d(kind):
    x, _ = sparse_rows(mean=30.0)
    options = {"k": 2} if kind == "topk" else {"l1": 0.1}
    sae = SparseAutoencoder(16, 20, kind, **options)
    gradients = torch.ones_like(x) if kind == "attribution" else None
    train_sae(sae, x, epochs=5, gradients=gradients, batch_size=64)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(20), atol=1e-5)
    assert float((x * sae.scale).norm(dim=1).mean()) == pytest.approx(4.0, rel=1e-4)


def test_b_dec_starts_at_the_mean_and_a_second_training_goes_on():
    x, _ = sparse_rows(mean=50.0)
    sae = SparseAutoencoder(16, 20, "topk", k=2)
    train_sae(sae, x, epochs=1, lr=1e-9)
    assert torch.allclose(sae.b_dec / sae.scale, x.mean(dim=0), rtol=1e-4)
    scale = float(sae.scale)
    train_sae(sae, 2 * x, epochs=1)
    assert float(sae.scale) == scale


def test_the_same_seed_gives_the_same_numbers():
    x, _ = sparse_rows(200)
    runs = []
    for _ in range(2):
        sae = SparseAutoencoder(16, 20, "topk", k=2, seed=4)
        runs.append((train_sae(sae, x, epochs=3, seed=2).fvu, sae))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert stability(runs[0][1], runs[1][1]) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["topk", "attribution"])
def test_rows_on_disk_are_trained_on_as_rows_in_memory(kind, tmp_path):
    x, _ = sparse_rows(300)
    slopes = torch.randn(300, 16, generator=torch.Generator().manual_seed(2)) if kind == "attribution" else None
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = []
    for rows in (x, mapped, mapped[:], np.array(mapped)):
        sae = SparseAutoencoder(16, 20, kind, **({"k": 2} if kind == "topk" else {"l1": 0.1}))
        history = train_sae(sae, rows, epochs=3, gradients=slopes, batch_size=64, resample=(2,))
        found.append((history.fvu, sae.W_dec.detach().clone(), sae.scale.clone()))
    for fvu, decoder, scale in found[1:]:
        assert np.array_equal(fvu, found[0][0])
        assert torch.equal(decoder, found[0][1])
        assert torch.equal(scale, found[0][2])


def test_rows_read_in_blocks_give_the_same_start_and_a_like_dictionary(tmp_path):
    x, _ = sparse_rows(2000, mean=30.0)
    np.save(tmp_path / "x.npy", x.half().numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole, parts = (SparseAutoencoder(16, 24, "topk", k=2) for _ in range(2))
    one = train_sae(whole, x.half().float(), epochs=20, lr=3e-3, batch_size=100)
    two = train_sae(
        parts, mapped, epochs=20, lr=3e-3, batch_size=100, memory=8 * 16 * 450, resample=(3,)
    )  # five blocks
    assert float(parts.scale) == pytest.approx(float(whole.scale), rel=1e-5)
    assert int(parts.steps) == int(whole.steps)
    assert two.fvu[-1] == pytest.approx(one.fvu[-1], abs=0.05)
    broken = np.array(mapped)
    broken[1500, 3] = np.nan
    with pytest.raises(ActivationError, match="row 1500"):
        train_sae(SparseAutoencoder(16, 24, "topk", k=2), broken, epochs=1, memory=8 * 16 * 450)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_memory_stays_bounded_on_rows_larger_than_it(tmp_path):
    """96 MiB of rows with 8 MiB to read: in a process of its own, so that what others freed does not count."""
    run = """
import sys
import numpy as np
from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.core.memory import peak_memory
x = np.load(sys.argv[1], mmap_mode="r")
sae = SparseAutoencoder(64, 16, "topk", k=2)
train_sae(sae, np.array(x[:2000]), epochs=1, batch_size=4096)  # what is needed in any case
with peak_memory() as peak:
    train_sae(sae, x, epochs=1, batch_size=4096, memory=8 << 20)
print(peak.bytes)
"""
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (393_216, 64))
    for part in np.split(rows, 24):
        part[:] = np.random.default_rng(0).normal(size=part.shape)
    rows.flush()
    out = subprocess.run([sys.executable, "-c", run, tmp_path / "x.npy"], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 48 << 20


def test_resampled_latents_come_back():
    x, _ = sparse_rows(600)
    dead = {}
    for resample in ((), (5, 10)):
        sae = SparseAutoencoder(16, 40, l1=0.05)
        with torch.no_grad():
            sae.b_enc[:20] = -100.0  # never on again by gradients
        dead[resample] = train_sae(sae, x, epochs=25, resample=resample, batch_size=64, lr=1e-3).dead[-1]
    assert dead[()] >= 20
    assert dead[5, 10] < 20


def test_a_mean_that_is_large_does_not_kill_latents():
    x, _ = sparse_rows(600, mean=100.0)
    sae = SparseAutoencoder(16, 24, "topk", k=2)
    history = train_sae(sae, x, epochs=20, lr=1e-3, batch_size=64)
    assert history.dead[-1] < 12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 1000))
def test_topk_never_has_more_codes_on_than_k(d, n, seed):
    k = 1 + seed % n
    sae = SparseAutoencoder(d, n, "topk", k=k, seed=seed)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(seed))
    f = sae.encode(x)
    assert int((f > 0).sum(dim=1).max()) <= k
    assert float(f.detach().min()) >= 0
    assert torch.allclose(sae.encode(x[None])[0], f)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "topk"])
def test_a_folder_gives_back_the_same_dictionary(tmp_path, kind):
    x, _ = sparse_rows(200, mean=3.0)
    sae = SparseAutoencoder(16, 20, kind, **({"k": 2} if kind == "topk" else {"l1": 0.1}))
    train_sae(sae, x, epochs=3)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    assert torch.allclose(sae.decode(sae.encode(x)), again.decode(again.encode(x)), rtol=1e-3, atol=1e-4)
    assert torch.allclose(sae.encode(x), again.encode(x), rtol=1e-3, atol=1e-4)


def folder(path, weights=None, **about):
    weights = weights or {
        "W_enc": torch.randn(3, 4), "W_dec": torch.randn(4, 3), "b_enc": torch.randn(4), "b_dec": torch.randn(3),
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 3, "d_sae": 4} | about))
    return path, weights


def test_saelens_settings_are_folded_into_the_weights(tmp_path):
    path, w = folder(tmp_path / "a", apply_b_dec_to_input=False)
    x = torch.randn(6, 3)
    assert torch.allclose(load_sae(path).encode(x), torch.relu(x @ w["W_enc"] + w["b_enc"]), atol=1e-5)
    path, w = folder(tmp_path / "b", w, architecture="topk", k=2, rescale_acts_by_decoder_norm=True)
    norms = w["W_dec"].norm(dim=1)
    scaled = torch.relu(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms)
    kept = scaled * (scaled >= scaled.topk(2, dim=1).values[:, -1:])
    wanted = (kept / norms) @ w["W_dec"] + w["b_dec"]
    sae = load_sae(path)
    assert torch.allclose(sae.decode(sae.encode(x)), wanted, atol=1e-5)


def test_folders_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(DataError, match=r"holds no cfg\.json"):
        load_sae(tmp_path)
    path, w = folder(tmp_path / "a", architecture="jumprelu")
    with pytest.raises(ModelError, match="architecture 'jumprelu'; known are standard, gated, topk"):
        load_sae(path)
    folder(path, normalize_activations="expected_average_only_in")
    with pytest.raises(ModelError, match="fold that factor"):
        load_sae(path)
    folder(path, d_in=5)
    with pytest.raises(DataError, match="do not go together"):
        load_sae(path)
    folder(path, {name: value for name, value in w.items() if name != "b_enc"})
    with pytest.raises(DataError, match="has no b_enc"):
        load_sae(path)
    folder(path, architecture="topk")
    with pytest.raises(DataError, match="how many latents are on"):
        load_sae(path)
    (path / "sae_weights.safetensors").write_bytes(b"no weights")
    folder_about = path / "cfg.json"
    folder_about.write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_sae(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0, 3), "width"),
        ((3, 3, "other"), "kind is one of"),
        ((3, 3, "topk"), "k is for the kind 'topk'"),
        ((3, 3, "vanilla", 2), "k is for the kind 'topk'"),
        ((3, 3, "topk", 4), "k=4"),
        ((3, 3, "vanilla", None, -1.0), "l1"),
    ],
)
def test_sizes_that_do_not_go_together(given, words):
    with pytest.raises(InputError, match=words):
        SparseAutoencoder(*given)


def test_rows_of_any_precision_and_size_train_the_same_dictionary():
    x = sparse_rows(300)[0].half().float()

    def trained(rows):
        sae = SparseAutoencoder(16, 24, "topk", k=2)
        return train_sae(sae, rows, epochs=3, lr=3e-3).fvu, sae

    wanted, sae = trained(x)
    for rows in (x.double(), x.half(), x.clone().requires_grad_(), 1e25 * x, 1e-25 * x):
        assert np.allclose(trained(rows)[0], wanted, rtol=1e-3)
    assert torch.allclose(sae.encode(x.double()), sae.encode(x))
    assert torch.allclose(sae(x.bfloat16()).reconstruction, sae(x.bfloat16().float()).reconstruction)


def test_rows_that_cannot_be_trained_on():
    sae = SparseAutoencoder(4, 8)
    with pytest.raises(InputError, match="width 4"):
        train_sae(sae, torch.randn(5, 3), epochs=1)
    with pytest.raises(InputError, match="width 4"):
        sae.encode(torch.randn(5, 3))
    with pytest.raises(InputError, match="all rows are the same"):
        train_sae(sae, torch.ones(5, 4), epochs=1)
    bad = torch.randn(5, 4)
    bad[2, 1] = torch.nan
    with pytest.raises(ActivationError, match="row 2"):
        train_sae(sae, bad, epochs=1)
    with pytest.raises(InputError, match="gradients belong"):
        train_sae(sae, torch.randn(5, 4), epochs=1, gradients=torch.randn(5, 4))
    with pytest.raises(InputError, match="epoch"):
        train_sae(sae, torch.randn(5, 4), epochs=0)


def test_a_run_without_any_living_latent_is_no_success():
    x, _ = sparse_rows(200)
    with pytest.raises(TrainingCollapsedError, match="lower l1"):
        train_sae(SparseAutoencoder(16, 20, l1=1e4), x, epochs=60, lr=3e-2, batch_size=32)
    with pytest.raises(TrainingCollapsedError, match="not finite"):
        train_sae(SparseAutoencoder(16, 20, l1=0.1), x, epochs=60, lr=1e30, batch_size=32)
