"""Many continuations of a few texts at once: each text is read once, and its keys and values are kept once.

    softmax(q [K_text; K_own]^T) [V_text; V_own]     for the queries q of every continuation of a text

All queries of a text meet its keys in one product, and each continuation's queries the few keys of its own. The copies of a
text's keys that a plain batch makes for each continuation, and moves at each token, are not there.
"""

__all__ = ["Branches", "Text", "draw", "last_places", "read_text", "shares"]

import copy
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
    out = model(torch.tensor([list(ids)], device=model.device), use_cache=True, **last_places(model, 1))
    # under the name that this version of transformers gives it
    return Text(len(ids), out.logits[0, -1], out["cache"] if "cache" in out else out["past_key_values"])


def shares(model: Any) -> bool:
    """Whether continuations of a text can share its keys and values: every layer is plain attention, called by its interface."""
    return (
        getattr(model.config, "_attn_implementation", None) == "sdpa"
        and model._can_set_attn_implementation()
        and not hasattr(model.config, "kv_lora_rank")  # such layers keep something else than their keys
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
        lengths = [text.length for text, count in texts for _ in range(count)]
        self._lengths = torch.tensor(lengths, device=model.device)
        self._layers: list[_Layer] = []
        if shares(model):
            counts = [count for _, count in texts]
            for layer in zip(*(text.cache.layers for text, _ in texts), strict=True):
                self._layers.append(_Layer([(one.keys, one.values) for one in layer], counts, most))
            self._cache = Cache(layers=list(self._layers))
        elif len(texts) == 1:
            (text, count) = texts[0]
            self._cache = copy.deepcopy(text.cache)
            if count > 1:
                if not all(hasattr(layer, "batch_repeat_interleave") for layer in self._cache.layers):
                    raise ModelError(f"{type(model).__name__} can write one continuation at a time only; ask with n=1")
                self._cache.batch_repeat_interleave(count)
        else:
            raise ModelError("this network goes on from one text at a time")

    def step(self, tokens: Int[Tensor, "row place"], last: int = 1) -> Float[Tensor, "row last vocabulary"]:
        """Append tokens to each row; the logits after the last places of each."""
        tokens, width = tokens.to(self._model.device), tokens.shape[1]
        given: dict[str, Any] = {"use_cache": True, **last_places(self._model, last)}
        names = inspect.signature(self._model.forward).parameters
        given["cache" if "cache" in names else "past_key_values"] = self._cache
        if self._layers:
            places = torch.arange(self._own, self._own + width, device=tokens.device)
            # of a row's own tokens; all of its text is seen
            seen = torch.arange(self._own + width, device=tokens.device) <= places[:, None]
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
        chosen = torch.tensor(rows, device=self._model.device)
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
        self.keys: Tensor
        self.values: Tensor
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
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]
        of = np.repeat(np.arange(len(self.counts)), self.counts)[rows.cpu().numpy()]
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
    of_own, own_sum = near.softmax(-1) @ value, near.logsumexp(-1, keepdim=True)
    out = torch.empty_like(of_own)
    start = 0
    for (text_keys, text_values), count in zip(layer.texts, layer.counts, strict=True):
        if count:
            part = slice(start, start := start + count)
            # all rows of a text as one matrix for each group of heads
            folded = asked[part].transpose(0, 1).reshape(1, groups, -1, size)
            of_text, text_sum = (
                one.view(groups, count, near.shape[2], -1).transpose(0, 1)
                for one in _read(folded, text_keys, text_values)
            )
            # the two parts as one softmax: each by its share of the sum of exponentials
            out[part] = torch.lerp(of_own[part], of_text, torch.sigmoid(text_sum - own_sum[part]))
    return out.view(rows, heads, width, -1).transpose(1, 2).contiguous(), None


def _read(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and the logarithm of the sum of exponentials under its softmax."""
    if (
        query.device.type == "cpu" and keys.shape[3] == values.shape[3]
    ):  # the kernel of torch's own attention tells both
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, scale=1.0)
    scores = query @ keys.transpose(2, 3)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


AttentionInterface.register(_NAME, _attend)


def draw(
    logits: Float[Tensor, "row vocabulary"], temperature: float, top_p: float, places: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """The next token of each row: the likeliest at temperature 0, else drawn from the smallest set of at least top_p.

    places: uniform numbers in [0, 1): where the token stands when all are laid out in the vocabulary's order, each as long as it
    is likely. So a row has the same token whatever stands beside it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        least = _least(p, min(_TOP, p.shape[1]), top_p)
        p = p.masked_fill(p < least[:, None], 0.0)
    ends = p.cumsum(-1)
    whole = ends[:, -1]
    wanted = torch.minimum(places * whole, whole.nextafter(torch.zeros_like(whole)))  # the product may be rounded up
    return torch.searchsorted(ends, wanted[:, None], right=True)[:, 0]


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
