"""One step of the path search and all head norms, beside the design of the official notebooks.

Peer: the official code (github.com/jacobdunefsky/ObservablePropagation) scores each head and source token in a Python loop,
and path patching (TransformerLens) runs the model once for every candidate. Both designs are written anew here, on SmolLM2
and the same pair of prompts; of the runs of the model only some are timed and the time is multiplied.

Run: python benchmarks/observable_paths.py [PATH]      writes observable_paths.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from theodolite.activations.observables import Observable, head_norms, head_scores
from theodolite.core.transformer import decoder_parts, run_decoder
from theodolite.language.pretrained import load_decoder

ROUNDS, TIMED_RUNS = 5, 5
PROMPTS = ("Well, Mary truly is a kind neighbour, isn't", "Well, John truly is a kind neighbour, isn't")


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median processor time of each call, taken in turns so that other load hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_decoder("smollm2")
    observable = Observable.from_tokens([" she"], [" he"], tokenizer)
    parts = decoder_parts(model)
    ids = torch.stack([torch.tensor(tokenizer(prompt).input_ids) for prompt in PROMPTS])
    layers, tokens = list(range(len(parts))), ids.shape[1]

    @torch.no_grad()
    def looped_norms() -> torch.Tensor:
        """A full matrix product for each head."""
        y = parts.final_norm.direction(observable.read_back(parts.unembedding_weight))
        rows = torch.empty(len(parts), parts.heads)
        for block in parts.blocks:
            attention = block.attention
            for head in range(parts.heads):
                both = attention.output_weight[:, head] @ attention.value_weight[attention.kv_head(head)]
                rows[block.index, head] = block.attention_norm.direction(both.T @ y).norm()
        return rows

    @torch.no_grad()
    def looped_scores() -> torch.Tensor:
        """A loop over heads and tokens on what one pass over both prompts gave."""
        run = run_decoder(parts, ids, before=[*layers, len(parts)], maps=layers)
        y = parts.final_norm.direction(observable.read_back(parts.unembedding_weight))
        y = y * parts.final_norm.scale(run.before[len(parts)][:, -1].mean(dim=0))
        rows = torch.empty(len(parts), parts.heads, tokens)
        for block in parts.blocks:
            attention = block.attention
            inside = block.attention_norm.module(run.before[block.index])
            for head in range(parts.heads):
                vector = (y @ attention.output_weight[:, head]) @ attention.value_weight[attention.kv_head(head)]
                for token in range(tokens):
                    weight = run.maps[block.index][:, head, -1, token].mean()
                    rows[block.index, head, token] = weight * (vector @ (inside[0, token] - inside[1, token]))
        return rows

    def some_runs() -> None:
        for _ in range(TIMED_RUNS):
            run_decoder(parts, ids[:1])

    taken = seconds({
        "head norms": lambda: head_norms(model, observable), "head norms, a loop over heads": looped_norms,
        "scores": lambda: head_scores(model, observable, ids), "scores, a loop over heads and tokens": looped_scores,
        "runs": some_runs,
    })  # fmt: skip
    ours, theirs = head_scores(model, observable, ids), looped_scores()
    candidates = len(parts) * parts.heads * tokens
    patched = taken["runs"] / TIMED_RUNS * candidates
    result = {
        "name": f"all {len(parts) * parts.heads} heads of SmolLM2 and {tokens} source tokens, one core",
        "peer": "the designs of the official notebooks and of path patching, written anew (see the docstring)",
        "ratio, head norms, ours / loop": round(taken["head norms"] / taken["head norms, a loop over heads"], 4),
        "ratio, one step of the search, ours / loop": round(taken["scores"] / taken["scores, a loop over heads and tokens"], 4),
        "ratio, one step of the search, ours / a run for each candidate": round(taken["scores"] / patched, 6),
        "largest relative difference of the scores to the loop's": round(
            float((ours - theirs).abs().max() / theirs.abs().max()), 4
        ),
        "processor seconds": {name: round(value, 4) for name, value in (taken | {"a run for each candidate": patched}).items()},
        "command": "OMP_NUM_THREADS=1 python benchmarks/observable_paths.py",
    }  # fmt: skip
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
