"""Predicting ten candidates by a local language model: what they share run once, or each prompt run whole.

The peer is the design of the authors' code, which sends the whole prompt again for each candidate; their code itself needs an
Azure endpoint and cannot run here. Both read the probabilities of the ten digits, so both give the same numbers. Times are of
the processor. Beside it: drawing ten candidates after the same trials by transformers' own generate (five continuations of each
of two prompts, a copy of the prompt's keys for each) or by this package, for each token that is written; and milliseconds of
one trial that are not the language model's, with a script in its place.

Run: python benchmarks/llm_optimisation_prefix.py [PATH]      writes llm_optimisation_prefix.json beside this file, or PATH
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.tree import DecisionTreeClassifier

from theodolite.hyperparameters.llm_bayesian_optimization import (
    LLAMBO,
    CandidateSampler,
    DiscriminativeSurrogate,
    TaskContext,
    known_space,
)
from theodolite.hyperparameters.space import SearchSpace, Trial
from theodolite.language import connect
from theodolite.language.local import LocalModel
from theodolite.language.scripted import ScriptedLanguageModel

OBSERVED, CANDIDATES, TRIALS, TOKENS = 10, 10, 20, 71


def surrogate_seconds(space: SearchSpace, context: TaskContext) -> dict[str, float]:
    llm = connect(cache=False)
    configs, candidates = space.sample(OBSERVED, seed=0), space.sample(CANDIDATES, seed=1)
    scores = np.random.default_rng(0).uniform(0.4, 0.95, OBSERVED).tolist()
    surrogate = DiscriminativeSurrogate(space, context, llm, n_templates=1).fit(configs, scores)
    surrogate.predict(candidates[:1])  # the weights are read at the first call
    began = time.process_time()
    together, _ = surrogate.predict(candidates)
    middle = time.process_time()
    alone = np.concatenate([surrogate.predict([candidate])[0] for candidate in candidates])
    ended = time.process_time()
    return {
        "ratio, whole prompts / shared prefix": round((ended - middle) / (middle - began), 2),
        "largest difference of a predicted score": float(np.abs(together - alone).max()),
    }


def writing_ratio(space: SearchSpace, context: TaskContext) -> float:
    llm = LocalModel(cache=None)
    scores = np.random.default_rng(0).uniform(0.4, 0.95, OBSERVED).tolist()
    trials = [Trial(config, score) for config, score in zip(space.sample(OBSERVED, seed=0), scores, strict=True)]
    prompts = CandidateSampler(space, context, llm).prompts(trials, 0.97)
    llm.generate(prompts[0][:50], max_tokens=2)  # the weights are read at the first call
    began = time.process_time()
    made = llm.generate_many(prompts, CANDIDATES // 2, temperature=0.8, top_p=0.95, max_tokens=TOKENS)
    middle = time.process_time()
    for prompt in prompts:
        ids = llm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=0.95, top_k=0,
            num_return_sequences=CANDIDATES // 2, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        )  # fmt: skip
    ended = time.process_time()
    ours = (middle - began) / sum(one.completion_tokens for row in made for one in row)
    return round((ended - middle) / (len(prompts) * (CANDIDATES // 2) * TOKENS) / ours, 2)


def overhead(space: SearchSpace, context: TaskContext) -> float:
    names = ", ".join(f"{name}: {{}}" for name in space)
    rng = np.random.default_rng(0)

    def answer(prompt: str) -> str:
        if "Predict" in prompt:
            return "0.5 ##"
        (config,) = space.sample(1, seed=rng)
        return names.format(*(one.text(config[name]) for name, one in space.items())) + " ##"

    search = LLAMBO(space, context, ScriptedLanguageModel(answer), warm_start="random")
    began = time.process_time()
    search.optimize(lambda config: config["max_features"], TRIALS)
    return round(1000 * (time.process_time() - began) / TRIALS, 2)


def main() -> None:
    space = known_space(DecisionTreeClassifier())
    if space is None:
        raise SystemExit("no space is known for a decision tree")
    context = TaskContext("DecisionTreeClassifier", "classification", "accuracy", n_samples=142, n_features=13)
    result = {
        "name": f"{CANDIDATES} candidates after {OBSERVED} trials by SmolLM2-135M, one core",
        "peer": "the design of the authors' code: the whole prompt for each candidate (run here with the same model)",
        **surrogate_seconds(space, context),
        "ratio, transformers' generate / this package, drawing candidates": writing_ratio(space, context),
        "milliseconds of a trial that are not the language model's": overhead(space, context),
        "command": "OMP_NUM_THREADS=1 python benchmarks/llm_optimisation_prefix.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
