"""Many continuations of a few texts at once: each text is read once, and its keys and values are kept once.

    softmax(q [K_text; K_own]^T) [V_text; V_own]     for the queries q of every continuation of a text

All queries of a text meet its keys in one product, and each continuation's queries the few keys of its own. The copies of a
text's keys that a plain batch makes for each continuation, and moves at each token, are not there.
"""

__all__ = ["Branches", "Text", "draw", "last_places", "read_text", "shares"]

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from theodolite.core.errors import ModelError

_NAME = "theodolite_branches"
_TOP = 64  # likeliest tokens among which the smallest set of at least top_p is looked for before all are sorted


class Text(NamedTuple):
    """A text that was read. logits: of the token after it. cache: its keys and values, as transformers keeps them."""

    length: int
    logits: Float[Tensor, " vocabulary"]
    cache: Any


def read_text(model: Any, ids: Sequence[int]) -> Text:
    """One forward pass over the tokens of a text."""
    out = model(torch.tensor([list(ids)]), use_cache=True, **last_places(model, 1))
    # under the name that this version of transformers gives it
    return Text(len(ids), out.logits[0, -1], out["cache"] if "cache" in out else out["past_key_values"])


def shares(model: Any) -> bool:
    """Whether continuations of a text can share its keys and values: every layer is plain attention, by transformers' interface."""
    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and model._can_set_attn_implementation()
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


class Branches:
    """Continuations of texts. texts: each with the number of its continuations, whose rows follow each other. most: tokens that
    a continuation may have.

    A network of which `shares` is not true has a copy of the text for each row, and then there is one text.
    """

    def __init__(self, model: Any, texts: Sequence[tuple[Text, int]], most: int) -> None:
        self._model, self._own = model, 0
        self._lengths = torch.tensor([text.length for text, count in texts for _ in range(count)])
        self._layers: list[_Layer] = []
        if shares(model):
            counts = [count for _, count in texts]
            for layer in zip(*(text.cache.layers for text, _ in texts), strict=True):
                self._layers.append(_Layer([(one.keys, one.values) for one in layer], counts, most))
            self._cache = Cache(layers=list(self._layers))
        elif len(texts) == 1:
            (text, count) = texts[0]
            self._cache = text.cache
            self._cache.batch_repeat_interleave(count)
        else:
            raise ModelError("this network goes on from one text at a time")

    def step(self, tokens: Int[Tensor, "row place"], last: int = 1) -> Float[Tensor, "row last vocabulary"]:
        """Append tokens to each row; the logits after the last places of each."""
        width = tokens.shape[1]
        given: dict[str, Any] = {"use_cache": True, **last_places(self._model, last)}
        names = inspect.signature(self._model.forward).parameters
        given["cache" if "cache" in names else "past_key_values"] = self._cache
        if self._layers:
            places = torch.arange(self._own, self._own + width)
            seen = torch.arange(self._own + width) <= places[:, None]  # of its own tokens; all of the text is seen
            with _attending(self._model, self._layers):
                out = self._model(
                    tokens, attention_mask=seen[None, None], position_ids=self._lengths[:, None] + places, **given
                )
        else:
            out = self._model(tokens, **given)
        self._own += width
        return out.logits[:, -last:]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, given in their order."""
        chosen = torch.tensor(rows)
        self._lengths = self._lengths[chosen]
        if self._layers:
            for layer in self._layers:
                layer.keep(chosen)
        else:
            self._cache.batch_select_indices(chosen)


def last_places(model: Any, count: int) -> dict[str, Any]:
    """What spares the logits of all but the last places, where the network can."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _Layer(DynamicLayer):
    """Keys and values of one layer: of the texts as they are, and of the rows in space that was taken beforehand."""

    def __init__(self, texts: list[tuple[Tensor, Tensor]], counts: list[int], most: int) -> None:
        super().__init__()
        self.texts, self.counts, self.most, self.used = texts, counts, most, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.most, size)
        self.values = value_states.new_empty(rows, heads, self.most, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, before : self.used] = key_states
        self.values[:, :, before : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.texts[0][0].shape[2] + self.used

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        of = np.repeat(np.arange(len(self.counts)), self.counts)[rows.numpy()]
        self.counts = [int((of == i).sum()) for i in range(len(self.counts))]


_layers: ContextVar[list[_Layer]] = ContextVar("layers")


@contextmanager
def _attending(model: Any, layers: list[_Layer]) -> Iterator[None]:
    """The network attends to texts and own tokens inside, and as it is set outside."""
    before, token = model.config._attn_implementation, _layers.set(layers)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _layers.reset(token)


def _attend(
    module: Any,
    query: Float[Tensor, "row head place size"],
    key: Float[Tensor, "row group own size"],
    value: Float[Tensor, "row group own wide"],
    attention_mask: Bool[Tensor, "1 1 place own"],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "row place head wide"], None]:
    """Attention of each row to its text and to its own tokens; heads of a group have the same keys."""
    rows, heads, width, size = query.shape
    groups, own = key.shape[1:3]
    layer = _layers.get()[module.layer_idx]
    asked = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows, groups, -1, size)
    near = asked @ key.transpose(2, 3)
    if width > 1:
        near = (
            near.view(rows, groups, -1, width, own).masked_fill(~attention_mask[:, :, None], -torch.inf).flatten(2, 3)
        )
    out = []
    start = 0
    for (text_keys, text_values), count in zip(layer.texts, layer.counts, strict=True):
        if not count:
            continue
        part = slice(start, start + count)
        start += count
        # all rows of a text as one matrix for each group of heads
        folded = asked[part].transpose(0, 1).reshape(groups, -1, size)
        far = (folded @ text_keys[0].transpose(1, 2)).view(groups, count, -1, text_keys.shape[2])
        p = torch.cat([far, near[part].transpose(0, 1)], dim=-1).softmax(-1)
        of_text, of_own = p.split([text_keys.shape[2], own], dim=-1)
        told = (of_text.flatten(1, 2) @ text_values[0]).view(groups, count, -1, value.shape[-1]).transpose(0, 1)
        out.append(told + of_own.transpose(0, 1) @ value[part])
    return torch.cat(out).view(rows, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)


def draw(
    logits: Float[Tensor, "row vocabulary"], temperature: float, top_p: float, places: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """The next token of each row: the likeliest at temperature 0, else drawn from the smallest set of at least top_p.

    places: uniform numbers in [0, 1), at which the tokens stand when they are laid out in the vocabulary's order, each as long as it
    is likely; so a row has the same token whatever stands beside it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        least = _least(p, min(_TOP, p.shape[1]), top_p)
        p = p.masked_fill(p < least[:, None], 0.0)
    ends = p.cumsum(-1)
    at = torch.searchsorted(ends, (places * ends[:, -1])[:, None], right=True)[:, 0]
    return at.clamp(max=p.shape[1] - 1)


def _least(p: Float[Tensor, "row vocabulary"], top: int, top_p: float) -> Float[Tensor, " row"]:
    """Of each row the smallest probability that belongs to the smallest set of at least top_p."""
    likeliest = p.topk(top).values
    sums = likeliest.cumsum(-1)
    count = (sums - likeliest < top_p).sum(-1)
    least = likeliest.gather(1, count[:, None] - 1)[:, 0]
    wide = (sums[:, -1] < top_p).nonzero()[:, 0]
    if len(wide) and top < p.shape[1]:
        least[wide] = _least(p[wide], p.shape[1], top_p)
    return least
