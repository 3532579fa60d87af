"""Explanations beside captum, quantus and dice-ml in one run: where definitions coincide, so do numbers.

captum is among the tools of development. quantus and dice-ml are run where they can be imported (install them by hand with
--no-deps: their own requirements hold back numpy and pandas), and are told as not run otherwise.

quantus     PixelFlipping, one pixel (of a real network's images 256) a step, black: p after each step, most relevant pixels
            first. With p(x) put before it, the area by trapezoids over the share of pixels is `deletion` with as many steps.
            Average drop is in none of them; it is written here as it is defined: max(0, p(x) - p(x * m)) / p(x), one by one.
dice-ml     its random and genetic searches for the same rows (its kd-tree took two minutes a row here), one counterfactual
            each, with our scores of them: share that is valid, that break a limit (the first four columns may not change, all
            stay within the ranges of the training rows), mean cost (sum of |change| in units of the training ranges) and
            columns left as they were, beside our closest ones.

Ratios are times of the peer over ours on the same inputs; "difference" is the largest one, in units of the largest value. Peaks
are of resident memory beyond what the process had: ours stays within the budget of 1 GiB, whatever the batch.

Run: OMP_NUM_THREADS=1 python benchmarks/explanation_peers.py [PATH]     writes explanation_peers.json beside this file, or PATH
"""

import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from theodolite.core.attribution_metrics import attribution_scores, target_probabilities
from theodolite.core.builtin import builtin
from theodolite.core.memory import PeakMemory, peak_memory
from theodolite.core.sources import find_data
from theodolite.explanations.baseline_bandit import SplitModel, grad_cam, path_attributions, path_map
from theodolite.explanations.counterfactuals import ClosestCounterfactual
from theodolite.explanations.surrogate import SurrogateExplainer
from theodolite.reproductions.efficientnet import load_network, read_images, weights_file

IMAGES, STEPS, ROUNDS, ROWS, HELD = 20, 32, 3, 10, 4
REAL_LAYER = "blocks.11:input"


def side_by_side(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Any]:
    """Largest difference of the two answers, the median ratio of their times, in turns, and the peaks of the first calls."""
    pairs, peaks, times = list[np.ndarray](), list[float | None](), []
    for call in (ours, peer):
        with peak_memory() as peak:
            pairs.append(np.asarray(call(), dtype=np.float64))
        peaks.append(None if peak.bytes is None else round(peak.bytes / 2**20, 1))
    for _ in range(rounds):
        spent = []
        for call in (peer, ours):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        times.append(spent[0] / spent[1])
    largest = float(np.abs(pairs[0] - pairs[1]).max() / max(np.abs(pairs[1]).max(), 1e-30))
    ratio = round(statistics.median(times), 2)
    return {"difference": largest, "time, peer / ours": ratio, "peak MiB, ours": peaks[0], "peak MiB, peer": peaks[1]}


def captum(network: nn.Module, x: Tensor, target: Tensor, place: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """place: the layer, as SplitModel names it; captum is given the module that "NAME:input" goes into."""
    attr = importlib.import_module("captum.attr")
    name, _, side = place.partition(":")
    layer, at = dict(network.named_modules())[name], {"attribute_to_layer_input": bool(side)}
    inputs, inner = SplitModel(network, "input"), SplitModel(network, place)
    a = inner.lower_all(x)
    integrated = attr.IntegratedGradients(network)
    cam = attr.LayerGradCam(network, layer)

    def scaled_cam() -> np.ndarray:
        found = cam.attribute(x, target=target, relu_attributions=True, **at).detach()
        low, high = found.amin(dim=(1, 2, 3), keepdim=True), found.amax(dim=(1, 2, 3), keepdim=True)
        return ((found - low) / (high - low).clamp_min(1e-12))[:, 0].numpy()

    def by_layer() -> np.ndarray:
        found = attr.LayerIntegratedGradients(network, layer).attribute(
            x, torch.zeros_like(x), target=target, n_steps=STEPS, method="riemann_right", **at
        )
        return found.detach().numpy()

    dark = inner.lower_all(torch.zeros_like(x))
    return {
        "integrated gradients, zero baseline": side_by_side(
            lambda: path_attributions(inputs, x, target, torch.zeros_like(x), STEPS, "integrated").numpy(),
            lambda: integrated.attribute(x, target=target, n_steps=STEPS, method="riemann_right").detach().numpy(), rounds,
        ),
        "layer integrated gradients, from the layer's answer to zeros": side_by_side(
            lambda: path_attributions(inner, a, target, dark, STEPS, "integrated").numpy(), by_layer, rounds
        ),
        "Grad-CAM at the layer's own size": side_by_side(
            lambda: grad_cam(inner, x, target, (a.shape[2], a.shape[3])).numpy(), scaled_cam, rounds
        ),
    }  # fmt: skip


def stand_in_for_torchvision() -> None:
    """quantus imports zennit, which names blocks of torchvision on import; nothing here uses them."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
            sys.modules.setdefault(name, types.ModuleType(name))
        for block in ("Bottleneck", "BasicBlock"):
            setattr(sys.modules["torchvision.models.resnet"], block, type(block, (), {}))


def flipping(
    network: nn.Module, x: Tensor, target: Tensor, place: str, *, black: float, at_once: int = 1, rounds: int = ROUNDS
) -> dict[str, Any] | str:
    """at_once: pixels a step."""
    if importlib.util.find_spec("quantus") is None:
        return "not run: quantus is not installed"
    stand_in_for_torchvision()
    metric = importlib.import_module("quantus").PixelFlipping(
        features_in_step=at_once, perturb_baseline=black, disable_warnings=True
    )
    steps = x[0, 0].numel() // at_once
    # no two pixels are equally relevant: which of them goes first is not defined
    maps = path_map(SplitModel(network, place), x, target, torch.zeros(1))
    maps = maps + 1e-4 * torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))

    def theirs() -> np.ndarray:
        curves = metric(
            model=network, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=maps[:, None].numpy(), softmax=True
        )
        with torch.no_grad():
            whole = network(x).softmax(dim=1)[torch.arange(len(x)), target].double().numpy()
        return np.trapezoid(np.column_stack([whole, np.array(curves)]), axis=1) / steps

    def ours() -> np.ndarray:
        return attribution_scores("deletion", network, x, maps, target, removed=black, steps=steps).numpy()

    return side_by_side(ours, theirs, rounds)


class _Grey(nn.Module):
    """A network asked about grey images: quantus takes out channels one by one, and here a pixel goes as a whole."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def real_size() -> dict[str, Any] | str:
    """The same on images of a real network, where batches are large: one timed call each."""
    archive = find_data("imagenet-1000.tar")
    if archive is None or weights_file() is None:
        return "not run: needs imagenet-1000.tar in the folder THEODOLITE_DATA and the weights of EfficientNet-Lite0"
    network = load_network().eval()
    pixels = read_images(Path(str(archive)), every=250, start=0)[:4]
    x = nn.functional.interpolate(pixels, size=(160, 160), mode="bilinear", antialias=True, align_corners=False)
    target, _ = target_probabilities(network, x)
    return captum(network, x, target, REAL_LAYER, 1) | {
        "quantus's PixelFlipping, 100 steps": flipping(
            network, x, target, REAL_LAYER, black=-1.0, at_once=256, rounds=1
        )
    }


def average_drop(network: nn.Module, x: Tensor, target: Tensor) -> dict[str, Any]:
    maps = path_map(SplitModel(network, "relu2"), x, target, torch.zeros(1))

    def chance(image: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(network(image[None]).softmax(dim=1)[0, y])

    def drop() -> list[float]:
        pairs = [(chance(i, y), chance(i * m, y)) for i, m, y in zip(x, maps, target, strict=True)]
        return [100 * max(0.0, whole - part) / whole for whole, part in pairs]

    return side_by_side(lambda: attribution_scores("adp", network, x, maps, target).numpy(), drop)


class _Probabilities:
    """A network as dice-ml asks it: a data frame in, probabilities out."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def predict_proba(self, frame: pd.DataFrame) -> np.ndarray:
        with torch.no_grad():
            return self.network(torch.as_tensor(frame.to_numpy(dtype=np.float32))).softmax(dim=1).numpy()

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        return self.predict_proba(frame).argmax(axis=1)


def dice(seed: int = 0) -> dict[str, Any]:
    subject = builtin("breast-cancer")
    train, rows = subject.flat("train"), subject.flat("test")
    network, span, names = _Probabilities(subject.predictor.eval()), np.ptp(train, axis=0), list(subject.data.features)
    rows = rows[network.predict(pd.DataFrame(rows)) == 0][:ROWS]

    held, low, high = names[:HELD], train.min(axis=0), train.max(axis=0)

    def told(points: np.ndarray, seconds: float, peak: PeakMemory) -> dict[str, Any]:
        off = np.abs(points - rows)[:, :HELD].max(axis=1) > 1e-6
        off |= ((points < np.minimum(low, rows) - 1e-5) | (points > np.maximum(high, rows) + 1e-5)).any(axis=1)
        return {
            "valid": float((network.predict(pd.DataFrame(points)) == 1).mean()),
            "that break a limit": int(off.sum()),
            "mean cost": round(float((np.abs(points - rows) / span).sum(axis=1).mean()), 4),
            "columns left as they were": round(float((np.abs(points - rows) < 1e-6).mean()), 3),
            "seconds a row": round(seconds / len(rows), 4),
            "peak MiB": None if peak.bytes is None else round(peak.bytes / 2**20, 1),
        }

    with peak_memory() as peak:
        start = time.perf_counter()
        method = ClosestCounterfactual(norm=1, seed=seed, names=names, immutable=held)
        found = method.fit(subject.predictor, train).generate(rows, 1)
        seconds = time.perf_counter() - start
    out: dict[str, Any] = {"closest, ours": told(found.counterfactuals, seconds, peak)}
    recomputed = (np.abs(found.counterfactuals - rows) / span).sum(axis=1)
    out["our cost against the sum written out"] = {"difference": float(np.abs(found.cost - recomputed).max())}
    if importlib.util.find_spec("dice_ml") is None:
        return out | {"dice-ml": "not run: dice-ml is not installed"}
    peer = importlib.import_module("dice_ml")
    table = pd.DataFrame(train, columns=names).assign(answer=network.predict(pd.DataFrame(train)))
    data = peer.Data(dataframe=table, continuous_features=names, outcome_name="answer")
    model = peer.Model(model=network, backend="sklearn")
    for method in ("random", "genetic"):
        search = peer.Dice(data, model, method=method)
        more: dict[str, Any] = {"random_seed": seed} if method == "random" else {}
        with peak_memory() as peak:
            start, points = time.perf_counter(), []
            for row in rows:
                asked = pd.DataFrame(row[None], columns=names)
                made = search.generate_counterfactuals(
                    asked, total_CFs=1, desired_class=1, verbose=False, features_to_vary=names[HELD:], **more
                )
                points.append(made.cf_examples_list[0].final_cfs_df[names].to_numpy(dtype=np.float64)[0])
            seconds = time.perf_counter() - start
        out[f"dice-ml, {method}"] = told(np.stack(points), seconds, peak)
    return out


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
        "name": "explanations beside captum, quantus and dice-ml; one core",
        "captum, run": captum(network, x, target, "relu2") | {"permutation importance": permutation()},
        "quantus's PixelFlipping": flipping(network, x, target, "relu2", black=0.0),
        "EfficientNet-Lite0 at 160 px, 4 images": real_size(),
        "average drop, one by one": average_drop(network, x, target),
        "counterfactuals beside dice-ml's": dice(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/explanation_peers.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
