"""A pretrained language model with a fresh head, and texts as its columns of tokens, arXiv:2012.13255, section 3."""

__all__ = ["BuildTextClassifier", "TextClassifier", "token_columns"]

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.language.pretrained import Pretrained, load_encoder

_CAUSAL = ("CausalLM", "LMHeadModel")


class TextClassifier(nn.Module):
    """A language model's states of a text, pooled, then dropout and a linear layer with fresh weights.

    body: what `load_encoder` gives. outputs: classes, or 1 for a regression. last: take the state of the last token, which
    in a decoder is the only one that has read the whole text; otherwise the mean over the tokens. Padding is on the right.
    """

    def __init__(self, body: Any, outputs: int, *, last: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.body, self.last = body, last
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(body.config.hidden_size, outputs)

    def forward(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Int[Tensor, "text token"]
    ) -> Float[Tensor, "text output"]:
        """Scores (n, outputs)."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.last:
            pooled = states[torch.arange(len(states), device=states.device), attention_mask.sum(dim=1) - 1]
        else:
            mask = attention_mask[..., None].to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return self.classifier(self.dropout(pooled))


@dataclass(frozen=True)
class BuildTextClassifier:
    """build(seed) for `fine_tuning_dimension`: a pretrained language model with a head drawn from ``seed``.

    name: "minilm", "smollm2", a Hugging Face folder or a name on the hub. outputs: classes, or 1 for a regression.
    pretrained: whether the body has its weights, or new ones from ``seed`` (the control). layers: how many of its first
    blocks are kept, None for all. Raises ModelError where the model is not there or is an encoder and a decoder.
    """

    name: str
    outputs: int = 2
    pretrained: bool = True
    layers: int | None = None

    def __call__(self, seed: int) -> TextClassifier:
        """A network of its own, in training mode."""
        stored, last = _body(self.name, self.layers)
        torch.manual_seed(seed)  # only now: the first call of a process draws weights before it reads them
        body = copy.deepcopy(stored) if self.pretrained else _without_pooler(type(stored)(copy.deepcopy(stored.config)))
        return TextClassifier(body, self.outputs, last=last).train()


def token_columns(
    name: str,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int] | Sequence[float],
    *,
    longest: int = 128,
    keep: Literal["first", "last"] = "first",
) -> dict[str, Tensor]:
    """Texts, or pairs of texts, as columns for `fine_tuning_dimension`: input_ids, attention_mask (n, tokens), labels (n,).

    longest: tokens kept of a text, its ``keep`` ones. Raises InputError without texts or with another number of labels.
    """
    if not texts or len(texts) != len(labels) or longest < 2:
        raise InputError(
            f"need as many labels as texts, at least one, and longest >= 2; got {len(texts)}, {len(labels)}"
        )
    tokenizer = _pretrained(name).tokenizer
    tokenizer.truncation_side = "left" if keep == "last" else "right"
    found = tokenizer(list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt")
    return {
        "input_ids": found["input_ids"],
        "attention_mask": found["attention_mask"],
        "labels": torch.as_tensor(labels),
    }


@lru_cache(maxsize=2)
def _pretrained(name: str) -> Pretrained:
    return load_encoder(name)


@lru_cache(maxsize=2)
def _body(name: str, layers: int | None) -> tuple[Any, bool]:
    """The model without a pooler, cut to its first blocks, and whether it is a decoder."""
    body = _without_pooler(copy.deepcopy(_pretrained(name).model))
    if getattr(body.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} has an encoder and a decoder; models with one of them can be used")
    if layers is not None:
        blocks = max((m for m in body.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
        if not 1 <= layers <= len(blocks):
            raise ModelError(f"{name} has {len(blocks)} blocks, of which {layers} cannot be kept")
        del blocks[layers:]
        body.config.num_hidden_layers = layers
    return body, any(kind.endswith(_CAUSAL) for kind in body.config.architectures or ())


def _without_pooler(body: Any) -> Any:
    """A pooler's weights would get no gradient here, since the states themselves are read."""
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body
