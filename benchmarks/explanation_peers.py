"""Explanations beside captum, and beside the scores that quantus and dice-ml define: where definitions coincide, so do numbers.

captum is run. quantus and dice-ml are not: their definitions as we understand them are written down here, one input and one step
at a time as they work, and have not been checked against the packages:

quantus     PixelFlipping: p after the i most relevant features went black, i = 1 .. n; area by trapezoids of width 1. With
            p(x) put before it and divided by n that is `deletion` with a step for each feature.
            Average drop (of its relatives): max(0, p(x) - p(x * m)) / p(x), one image at a time.
dice-ml     validity: share of counterfactuals with the wanted class; proximity: minus the mean |change| over the columns, here
            in units of the training ranges, so that `cost` with norm 1 is minus the number of columns times it; sparsity: share
            of columns that are left as they were.

Ratios are times of the peer over ours on the same inputs; "difference" is the largest one, in units of the largest value.

Run: OMP_NUM_THREADS=1 python benchmarks/explanation_peers.py [PATH]     writes explanation_peers.json beside this file, or PATH
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.attribution_metrics import attribution_scores, target_probabilities
from theodolite.core.builtin import builtin
from theodolite.explanations.baseline_bandit import SplitModel, grad_cam, path_attributions, path_map
from theodolite.explanations.counterfactuals import ClosestCounterfactual
from theodolite.explanations.model_changes import robust_validity
from theodolite.explanations.surrogate import SurrogateExplainer

IMAGES, STEPS, ROUNDS, ROWS = 20, 32, 3, 10


def side_by_side(ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, float]:
    """Largest difference of the two answers and the median ratio of their times, measured in turns."""
    pairs, times = (np.asarray(ours(), dtype=np.float64), np.asarray(peer(), dtype=np.float64)), []
    for _ in range(ROUNDS):
        spent = []
        for call in (peer, ours):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        times.append(spent[0] / spent[1])
    largest = float(np.abs(pairs[0] - pairs[1]).max() / max(np.abs(pairs[1]).max(), 1e-30))
    return {"difference": largest, "time, peer / ours": round(statistics.median(times), 2)}


def captum(network: nn.Module, x: Tensor, target: Tensor) -> dict[str, Any]:
    attr = importlib.import_module("captum.attr")
    layer = dict(network.named_modules())["relu2"]
    inputs, inner = SplitModel(network, "input"), SplitModel(network, "relu2")
    a = inner.lower_all(x)
    integrated = attr.IntegratedGradients(network)
    cam = attr.LayerGradCam(network, layer)

    def scaled_cam() -> np.ndarray:
        found = cam.attribute(x, target=target, relu_attributions=True).detach()
        low, high = found.amin(dim=(1, 2, 3), keepdim=True), found.amax(dim=(1, 2, 3), keepdim=True)
        return ((found - low) / (high - low).clamp_min(1e-12))[:, 0].numpy()

    def by_layer() -> np.ndarray:
        found = attr.LayerIntegratedGradients(network, layer).attribute(
            x, torch.zeros_like(x), target=target, n_steps=STEPS, method="riemann_right"
        )
        return found.detach().numpy()

    dark = inner.lower_all(torch.zeros_like(x))
    return {
        "integrated gradients, black baseline": side_by_side(
            lambda: path_attributions(inputs, x, target, torch.zeros_like(x), STEPS, "integrated").numpy(),
            lambda: integrated.attribute(x, target=target, n_steps=STEPS, method="riemann_right").detach().numpy(),
        ),
        "layer integrated gradients, from the layer's answer to black": side_by_side(
            lambda: path_attributions(inner, a, target, dark, STEPS, "integrated").numpy(), by_layer
        ),
        "Grad-CAM at the layer's own size": side_by_side(
            lambda: grad_cam(inner, x, target, tuple(a.shape[2:])).numpy(), scaled_cam
        ),
    }


def quantus(network: nn.Module, x: Tensor, target: Tensor) -> dict[str, Any]:
    maps = path_map(SplitModel(network, "relu2"), x, target, torch.zeros(1))
    n = x[0, 0].numel()

    def chance(image: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(network(image[None]).softmax(dim=1)[0, y])

    def flipping() -> list[float]:
        scores = []
        for image, heat, y in zip(x, maps, target, strict=True):
            left, p = image.clone(), []
            for pixel in heat.flatten().argsort(descending=True, stable=True):
                left.flatten(1)[:, pixel] = 0.0
                p.append(chance(left, y))
            area = float(np.trapezoid(p, dx=1))
            scores.append((area + (chance(image, y) + p[0]) / 2) / n)
        return scores

    def drop() -> list[float]:
        pairs = [(chance(i, y), chance(i * m, y)) for i, m, y in zip(x, maps, target, strict=True)]
        return [100 * max(0.0, whole - part) / whole for whole, part in pairs]

    return {
        "pixel flipping": side_by_side(
            lambda: attribution_scores("deletion", network, x, maps, target, steps=n).numpy(), flipping
        ),
        "average drop": side_by_side(lambda: attribution_scores("adp", network, x, maps, target).numpy(), drop),
    }


def dice(seed: int = 0) -> dict[str, Any]:
    subject = builtin("breast-cancer")
    train, rows = subject.flat("train"), subject.flat("test")
    network, span = subject.predictor, np.ptp(train, axis=0)

    def answer(points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.as_tensor(points, dtype=torch.float32)).argmax(dim=1).numpy()

    rows = rows[answer(rows) == 0][:ROWS]
    found = ClosestCounterfactual(norm=1, seed=seed).fit(network, train).generate(rows, 1)
    points, d = found.counterfactuals, train.shape[1]
    proximity = []
    for point, row in zip(points, rows, strict=True):
        proximity.append(-float(np.mean([abs(a - b) / s for a, b, s in zip(point, row, span, strict=True)])))
    return {
        "validity": {
            "ours": float(robust_validity(found, [network], target=1).mean()),
            "by dice-ml's definition": float(np.mean([answer(p[None])[0] == 1 for p in points])),
        },
        "cost against -proximity x columns": {
            "difference": float(np.abs(found.cost + d * np.array(proximity)).max() / found.cost.max())
        },
        "sparsity by dice-ml's definition": float(np.mean(points == rows)),
    }


def permutation() -> dict[str, Any]:
    """captum's FeaturePermutation measures the change of the output; ours that of the log-loss: agreement of ranks only."""
    attr, subject = importlib.import_module("captum.attr"), builtin("breast-cancer")
    network, x = subject.predictor, subject.data.validation.x
    y = subject.data.validation.y
    torch.manual_seed(0)

    def loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(network(rows), y)

    theirs = np.mean([-attr.FeaturePermutation(loss).attribute(x).numpy().mean(axis=0) for _ in range(20)], axis=0)
    ours = SurrogateExplainer(k=5, scores=("permutation",), repeats=20, logits=True)
    ours.fit(network, subject.flat("train"), x.numpy(), y.numpy())
    told = ours.importance_["permutation"].to_numpy()
    return {"correlation of the increases of the log-loss": round(float(np.corrcoef(told, theirs)[0, 1]), 4)}


def main() -> None:
    torch.set_num_threads(1)
    subject = builtin("digits")
    network, x = subject.predictor.eval(), subject.data.test.x[:IMAGES]
    target, _ = target_probabilities(network, x)
    found: dict[str, Any] = {
        "name": "where the definitions of captum, quantus and dice-ml coincide with ours; one core",
        "captum, run": captum(network, x, target) | {"permutation importance": permutation()},
        "quantus, its definitions": quantus(network, x, target),
        "dice-ml, its definitions": dice(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/explanation_peers.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
