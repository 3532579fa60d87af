"""Greedy search for the paths that carry an observable, from one pair of prompts."""

__all__ = ["ComponentScores", "ScoredPath", "find_paths", "head_scores"]

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations.observables.feature import Component, ComponentPath, FeatureVector
from theodolite.activations.observables.observable import Observable, Prompts, check_pair
from theodolite.activations.observables.propagation import Pair, extend, follow
from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError
from theodolite.core.transformer import decoder_parts
from theodolite.core.view import evaluation_mode


@dataclass(frozen=True, eq=False)
class ScoredPath:
    """A path, what it carries (positive minus negative prompt, in units of the observable), and the feature at its start."""

    path: ComponentPath
    score: float
    feature: FeatureVector

    def __str__(self) -> str:
        return f"{self.score:+.3f}  {self.path}"


class ComponentScores:
    """Scores of all components that may come next on a path, from what both prompts hold; nothing is run again."""

    def __init__(self, pair: Pair, *, mlps: bool) -> None:
        self.pair, self.mlps = pair, mlps
        parts, run = pair.parts, pair.run
        self.values, self.outputs, mlp = list[Tensor](), list[Tensor](), list[Tensor]()
        with torch.no_grad(), evaluation_mode(parts.model):
            for block in parts.blocks:
                dtype = block.attention.value_weight.dtype
                inside = block.attention_norm.module(run.before[block.index].to(dtype)).float()
                values = torch.einsum("td,ksd->tks", inside[0] - inside[1], block.attention.value_weight.float())
                self.values.append(values.repeat_interleave(parts.heads // block.attention.kv_heads, dim=1))
                if mlps:
                    out = main_tensor(block.mlp(block.mlp_norm.module(run.between[block.index].to(dtype))))
                    mlp.append((out[0] - out[1]).float())
        self.mlp_outputs = torch.stack(mlp) if mlps else None

    def candidates(
        self, y: Tensor, token: int, gain: float, height: int
    ) -> tuple[Float[Tensor, "layer head token"], Float[Tensor, " layer"] | None, float]:
        """Change of the observable by each head's input at each token, by each MLP's, and by the embedding, below ``height``."""
        parts, pair = self.pair.parts, self.pair
        tokens, heads = pair.tokens, parts.heads
        found = torch.full((len(parts), heads, tokens), torch.nan, device=y.device)
        with torch.no_grad():
            for block in parts.blocks:
                if 2 * block.index >= height:
                    break
                inner = torch.einsum("d,dhs->hs", y, block.attention.output_weight.float())
                carried = torch.einsum("hs,ths->ht", inner, self.values[block.index])
                found[block.index] = gain * pair.attention(block.index)[:, token] * carried
            found[..., token + 1 :] = torch.nan
            through = None
            if self.mlp_outputs is not None:
                through = gain * (self.mlp_outputs[:, token] @ y)
                for block in parts.blocks:
                    if 2 * block.index + (not block.parallel) >= height:
                        through[block.index] = torch.nan
            ends = pair.run.before[0][:, token]
            return found, through, gain * float((ends[0] - ends[1]) @ y)


def head_scores(model: Any, observable: Observable, prompts: Prompts) -> Float[Tensor, "layer head token"]:
    """What each head carries straight to the observable from each token: the first step of `find_paths` as a table.

    Positive minus negative prompt, in units of the observable, attention held fixed midway between the two.
    """
    parts = decoder_parts(model)
    pair = Pair.of(parts, check_pair(prompts, observable.tokenizer), list(range(len(parts))), "boundary")
    start = follow(parts, observable, ComponentPath(), pair)
    return ComponentScores(pair, mlps=False).candidates(start.vector, start.token, 1.0, 2 * len(parts))[0]


def find_paths(
    model: Any,
    observable: Observable,
    prompts: Prompts,
    *,
    max_length: int = 4,
    beam: int = 10,
    mlps: bool = True,
    kind: Literal["largest", "smallest"] = "largest",
) -> list[ScoredPath]:
    """The paths that carry most of the observable's difference between the two prompts (``kind`` "smallest": against it).

    Every head at every earlier token and every MLP is scored by the change of the observable when its input alone is
    swapped for the other prompt's and carried along the path so far, attention held fixed midway between the prompts; the
    best ``beam`` are kept and extended backwards, up to ``max_length`` components. "embedding" ends a path. The result
    holds the kept paths of every length, best first.

    prompts: (positive, negative), of the same number of tokens. Costs two forward passes, and for each step matrix products
    in layers x heads x tokens, times ``beam``.
    """
    if max_length < 1 or beam < 1:
        raise InputError(f"need max_length and beam of at least 1, got {max_length} and {beam}")
    if kind not in ("largest", "smallest"):
        raise InputError(f"kind is 'largest' or 'smallest', got {kind!r}")
    parts = decoder_parts(model)
    pair = Pair.of(parts, check_pair(prompts, observable.tokenizer), list(range(len(parts))), "boundary")
    scores, sign = ComponentScores(pair, mlps=mlps), 1.0 if kind == "largest" else -1.0
    found = list[ScoredPath]()
    frontier = [ScoredPath(ComponentPath(), 0.0, follow(parts, observable, ComponentPath(), pair))]
    for _ in range(max_length):
        options = list[tuple[float, ScoredPath, Component]]()
        for one in frontier:
            options += _best(one, scores, beam, sign)
        options.sort(key=lambda option: -sign * option[0])
        frontier = []
        for score, before, stop in options[:beam]:
            path = ComponentPath([*before.path, stop])
            made = ScoredPath(path, score, extend(parts, before.feature, stop, pair))
            found.append(made)
            if stop.kind != "embedding":
                frontier.append(made)
    return sorted(found, key=lambda one: -sign * one.score)


def _best(
    one: ScoredPath, scores: ComponentScores, beam: int, sign: float
) -> list[tuple[float, ScoredPath, Component]]:
    """The best ``beam`` ways to extend one path."""
    parts, last = scores.pair.parts, one.path[-1] if one.path else None
    height = 2 * len(parts)
    if last is not None:
        height = 2 * last.layer + (last.kind == "mlp" and not parts.blocks[last.layer].parallel)
    token = one.feature.token
    heads, through, embedding = scores.candidates(one.feature.vector, token, one.feature.gain, height)
    options = [(embedding, one, Component("embedding", 0, None, token))]
    flat = (sign * heads.flatten()).nan_to_num(nan=-torch.inf)
    for place in flat.topk(min(beam, flat.numel())).indices.tolist():
        layer, rest = divmod(place, heads.shape[1] * heads.shape[2])
        head, source = divmod(rest, heads.shape[2])
        if torch.isfinite(flat[place]):
            options.append((float(heads[layer, head, source]), one, Component("attn", layer, head, source)))
    if through is not None:
        options += [
            (float(value), one, Component("mlp", layer, None, token))
            for layer, value in enumerate(through)
            if torch.isfinite(value)
        ]
    return options
