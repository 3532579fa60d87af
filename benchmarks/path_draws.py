"""A path map of a layer in one batch through the upper part, beside one call a point and captum's LayerIntegratedGradients.

Peers: the loop that calls the whole network once for each point of the path (the design of the published script: batch 1); captum
(`pip install captum`), whose layer integrated gradients run the lower part on every point. Numbers are compared where the
definitions coincide: gradients times (activation - baseline) with the same points of the path (captum's rule "riemann_right").

Run: python benchmarks/path_draws.py [PATH]      writes path_draws.json beside this file, or PATH
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.attribution_metrics import attribution_scores, target_probabilities
from theodolite.core.builtin import builtin
from theodolite.core.capture import forward_nodes
from theodolite.core.view import ModelView
from theodolite.explanations.baseline_bandit import SplitModel, path_attributions, path_map
from theodolite.reproductions.efficientnet import load_network, weights_file

ROUNDS, STEPS = 4, 10


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of each call, taken in turns so that other load hits all alike; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def one_point_a_call(network: nn.Module, layer: str, x: Tensor, a: Tensor, b: Tensor, target: int) -> Tensor:
    """The same sum, the whole network called for each point with the activation put in place."""
    total = torch.zeros_like(a)
    for j in range(1, STEPS + 1):
        v = (b + j / STEPS * (a - b)).detach()
        found = forward_nodes(network, x, [layer, "output"], replace={layer: v}, gradients=True)
        (g,) = torch.autograd.grad(found["output"][:, target].sum(), found[layer])
        total += g * (a - b) / STEPS
    return total


def captum_attributions(
    network: nn.Module, module: nn.Module, x: Tensor, target: int, before: bool
) -> Callable[[], Tensor]:
    """Captum's layer integrated gradients from the zero input's activations."""
    captum: Any = importlib.import_module("captum.attr")
    method = captum.LayerIntegratedGradients(network, module)

    def call() -> Tensor:
        found = method.attribute(
            x,
            torch.zeros_like(x),
            target=target,
            n_steps=STEPS,
            method="riemann_right",
            attribute_to_layer_input=before,
        )
        return (found[0] if isinstance(found, tuple) else found).detach()

    return call


def on(name: str, network: nn.Module, layer: str, x: Tensor) -> dict[str, float | str]:
    """Times and largest differences on one input of one network."""
    split = SplitModel(network, layer)
    a, b = split.lower(x), split.lower(torch.zeros_like(x))
    target = int(network(x).argmax())
    module = dict(network.named_modules())[layer.removesuffix(":input")]
    captum = captum_attributions(network, module, x, target, layer.endswith(":input"))

    def ours() -> Tensor:
        return path_attributions(split, a, target, b, STEPS, "integrated")

    def loop() -> Tensor:
        return one_point_a_call(network, layer, x, a, b, target)

    view = ModelView(network)
    chosen, plain = target_probabilities(view, x, target)

    def draw() -> Tensor:
        maps = path_map(split, x, target, b, STEPS)
        return attribution_scores("adp", view, x, maps, chosen, removed=-1.0, plain=plain)

    taken = milliseconds({"ours": ours, "loop": loop, "captum": captum, "a whole draw with ADP": draw})
    scale = float(loop().abs().max())
    return {
        "network": name,
        "one call a point / ours": round(taken["loop"] / taken["ours"], 2),
        "captum / ours": round(taken["captum"] / taken["ours"], 2),
        "largest difference to one call a point": float((ours() - loop()).abs().max()) / scale,
        "largest difference to captum": float((ours() - captum()).abs().max()) / scale,
        "ours, ms": round(taken["ours"], 2),
        "a whole draw with ADP, ms": round(taken["a whole draw with ADP"], 1),
    }


def main() -> None:
    digits = builtin("digits")
    found = [on("digits, relu2", digits.predictor, "relu2", digits.data.test.x[:1])]
    if weights_file() is not None:
        x = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found.append(on("EfficientNet-Lite0 at 160 px, blocks.11:input", load_network(), "blocks.11:input", x))
    result = {
        "name": f"one draw of {STEPS} path points, one core; differences are shares of the largest contribution",
        "peer": "the whole network once a point (the published script's design); captum LayerIntegratedGradients, riemann_right",
        "networks": found,
        "command": "OMP_NUM_THREADS=1 python benchmarks/path_draws.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
