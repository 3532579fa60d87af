"""Hidden states of a language model, one vector a word, and the same model with random weights."""

__all__ = ["AlignmentError", "random_weights_like", "subword_counts", "word_states"]

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.capture import check_finite, forward_nodes
from theodolite.core.errors import DataError, InputError, ModelError

Pooling = Literal["mean", "first", "last"]


class AlignmentError(DataError):
    """Words and vectors of a snippet that do not belong to each other."""


class _Masked(nn.Module):
    """A language model as a function of padded token ids alone: 0 or more, and -1 for padding."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, ids: Tensor) -> Any:
        """The model's answer, with a mask where there is padding."""
        there = ids >= 0
        return self.model(input_ids=ids.masked_fill(~there, self.padding), attention_mask=there.long())


def _body(model: nn.Module) -> nn.Module:
    """The part that makes hidden states of the input: of an encoder-decoder its encoder."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return model.get_encoder()  # type: ignore[operator]
    return model


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks and its name: the outermost as long as its configuration says, or the longest at all."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise ModelError(f"{type(model).__name__} holds no list of blocks, so it has no layers to look into")
    said = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return max(
        lists, key=lambda item: (len(item[1]) == said, len(item[1]))
    )  # the first of equals; experts are lists too


def layer_count(model: nn.Module) -> int:
    """How many blocks the model has: its layers are 0 (embeddings) to that number."""
    return len(_blocks(_body(model))[1])


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _subwords(tokenizer: Any, words: Sequence[str], number: int) -> list[list[int]]:
    """Sub-word ids of each word, which is tokenised alone with a space before it."""
    if not words:
        raise AlignmentError(f"snippet {number} has no words")
    found = tokenizer([" " + word for word in words], add_special_tokens=False).input_ids
    for i, ids in enumerate(found):
        if not ids:
            raise AlignmentError(
                f"snippet {number}: word {i} ({words[i]!r}) has no sub-word in the tokenizer's vocabulary"
            )
    return found


def subword_counts(tokenizer: Any, token_lists: Sequence[Sequence[str]]) -> list[int]:
    """How many sub-words each snippet has, which is what a forward pass costs."""
    return [sum(map(len, _subwords(tokenizer, words, i))) for i, words in enumerate(token_lists)]


@torch.no_grad()
def word_states(
    model: nn.Module,
    tokenizer: Any,
    token_lists: Sequence[Sequence[str]],
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    pooling: Pooling = "mean",
) -> dict[int, list[Float[Tensor, "_ _"]]]:
    """Vectors of the words of each snippet at each layer: {layer: [(words, width), ...]}, float32.

    Layer 0 is what goes into the first block (embeddings, of a model with rotary positions without any context), layer l the
    output of block l, before any last norm; layers: all where None. The model runs once, up to the last layer asked for. Words
    are tokenised one by one with a space before them, so that sub-words never straddle two; a word's vector is the mean (first,
    last) of its sub-words'. Special tokens are given to the model and left out. A causal model's vector of a word has not seen
    later words.

    A snippet longer than the model's context gets (0, width) vectors, which the probe leaves out, with a warning that counts
    them. Raises AlignmentError for a word without sub-words, ActivationError (which names the layer) for states that are not
    finite, InputError for layers that are not there.
    """
    body = _body(model)
    name, blocks = _blocks(body)
    wanted = sorted(set(range(len(blocks) + 1) if layers is None else layers))
    if not wanted or wanted[0] < 0 or wanted[-1] > len(blocks):
        raise InputError(f"layers are 0 (embeddings) to {len(blocks)}, got {list(layers or [])}")
    if batch_size < 1 or pooling not in ("mean", "first", "last"):
        raise InputError(f"need batch_size >= 1 and pooling mean, first or last, got {batch_size} and {pooling!r}")
    if not token_lists:
        raise InputError("there are no snippets")
    nodes = {f"model.{name}.{layer - 1}" if layer else f"model.{name}.0:input": layer for layer in wanted}
    before, after = _ends(tokenizer)
    words = [_subwords(tokenizer, one, i) for i, one in enumerate(token_lists)]
    lengths = [len(before) + sum(map(len, one)) + len(after) for one in words]
    context = getattr(getattr(body, "config", None), "max_position_embeddings", None)
    fits = [i for i, length in enumerate(lengths) if context is None or length <= context]
    if len(fits) < len(words):
        warnings.warn(
            f"{len(words) - len(fits)} of {len(words)} snippets are longer than the model's context of {context} tokens and "
            "are left out",
            stacklevel=2,
        )
    if not fits:
        raise DataError(f"no snippet fits the model's context of {context} tokens")
    masked = _Masked(body, tokenizer.pad_token_id or 0)
    device = next(body.parameters()).device
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(words) for layer in wanted}
    fits.sort(key=lengths.__getitem__)  # like with like, so that little is padding
    for start in range(0, len(fits), batch_size):
        part = fits[start : start + batch_size]
        ids = torch.full((len(part), lengths[part[-1]]), -1)
        for row, i in enumerate(part):
            ids[row, : lengths[i]] = torch.tensor([*before, *(token for word in words[i] for token in word), *after])
        states = forward_nodes(masked, ids.to(device), list(nodes))
        for node, layer in nodes.items():
            for row, i in enumerate(part):
                own = states[node][row, len(before) : lengths[i] - len(after)].float()
                check_finite(own, f"layer {layer} on snippet {i}")
                found[layer][i] = _pooled(own, words[i], pooling)
    for vectors in found.values():
        width = vectors[fits[0]].shape[1]
        for i in set(range(len(words))) - set(fits):
            vectors[i] = torch.empty(0, width, device=device)
    return found


def _pooled(states: Tensor, words: list[list[int]], pooling: Pooling) -> Tensor:
    counts = torch.tensor([len(word) for word in words], device=states.device)
    if pooling != "mean":
        ends = counts.cumsum(0)
        return states[ends - 1 if pooling == "last" else ends - counts]
    owner = torch.repeat_interleave(counts)
    return torch.zeros(len(words), states.shape[1], device=states.device).index_add_(0, owner, states) / counts[:, None]


@torch.no_grad()
def random_weights_like(
    model: nn.Module, keep_embeddings: bool = True, *, seed: int = 0, std: float = 0.02
) -> nn.Module:
    """A copy of the model whose blocks have random weights: matrices normal(0, ``std``), norms 1, biases 0.

    All outside the blocks (embeddings, positions, the head) stays as trained, so that layer 0 is the same; without
    keep_embeddings the tables of embeddings are random too, which is easier to beat.
    """
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = [_blocks(_body(made))[1]]
    if not keep_embeddings:
        parts += [module for module in made.modules() if isinstance(module, nn.Embedding)]
    for part in parts:
        for name, weight in part.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator).to(weight) * std)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return made
