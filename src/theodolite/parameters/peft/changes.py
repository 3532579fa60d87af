"""The computed changes Delta h: bottlenecks, and attention to trained keys and values with its exact gate.

    Attn(q, [P_k; K], [P_v; V]) = (1 - lam) Attn(q, K, V) + lam Attn(q, P_k, P_v)                          (eq. 6)
    lam(x) = sum_i exp(q P_k,i / sqrt(d_h)) / (sum_i exp(q P_k,i / sqrt(d_h)) + sum_j exp(q K_j / sqrt(d_h) + mask_j))

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366.
"""

__all__ = ["Bottleneck", "Prefix", "PrefixGenerator", "Prompt", "gated_attention", "prefix_gate", "with_prefix"]

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import InputError, ModelError
from theodolite.parameters.peft.modification import Modification


class Bottleneck(nn.Module):
    """Delta h = f(x W_d + b_d) W_u + b_u, and how it is composed with h; the identity has no biases.

    With ``heads`` > 1 every head has r / heads of the r columns of W_d and its own W_u of r / heads rows, and the heads'
    changes stand side by side; the work is one batched product, not one per head.

    >>> change = Bottleneck(Modification(bottleneck=4), 8, 8)
    >>> sum(p.numel() for p in change.parameters()), bool((change(torch.ones(2, 8)) == 0).all())
    (76, True)
    """

    def __init__(
        self,
        modification: Modification,
        width_in: int,
        width_out: int,
        *,
        heads: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.modification, self.heads = modification, heads
        r, affine = modification.bottleneck, modification.form != "identity"
        self.down_weight = nn.Parameter(torch.empty(r, width_in))
        self.up_weight = nn.Parameter(torch.zeros(heads, width_out // heads, r // heads))
        self.down_bias = nn.Parameter(torch.zeros(r)) if affine else None
        self.up_bias = nn.Parameter(torch.zeros(width_out)) if affine else None
        self.norm = nn.LayerNorm(width_in if modification.layer_norm == "in" else width_out)
        if modification.layer_norm is None:
            self.norm = None
        learned = modification.composition in ("learned_scale", "gate")
        start = modification.scale if modification.composition == "learned_scale" else 0.0
        self.factor = nn.Parameter(torch.tensor(float(start))) if learned else None
        self.seen: Tensor | None = None
        self.called = False
        if modification.init == "bert":
            nn.init.normal_(self.down_weight, std=0.02, generator=generator)
            nn.init.normal_(self.up_weight, std=0.02, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5), generator=generator)

    @staticmethod
    def size(modification: Modification, width_in: int, width_out: int, heads: int = 1) -> int:
        """How many numbers such a change trains, without making one."""
        r = modification.bottleneck
        count = r * width_in + r * width_out // heads
        if modification.form != "identity":
            count += r + width_out
        if modification.layer_norm is not None:
            count += 2 * (width_in if modification.layer_norm == "in" else width_out)
        return count + (modification.composition in ("learned_scale", "gate"))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch out"]:
        """Delta h of x, before it is scaled."""
        m = self.modification
        if m.layer_norm == "in" and self.norm is not None:
            x = self.norm(x)
        if m.form == "identity":
            z = F.linear(F.dropout(x, m.dropout, self.training) if m.dropout else x, self.down_weight)
        else:
            z = F.linear(x, self.down_weight, self.down_bias)
            z = F.relu(z) if isinstance(m.form, str) else m.form(z)
            z = F.dropout(z, m.dropout, self.training) if m.dropout else z
        if self.heads == 1:
            out = F.linear(z, self.up_weight[0], self.up_bias)
        else:
            out = torch.einsum("...hr,hor->...ho", z.unflatten(-1, (self.heads, -1)), self.up_weight).flatten(-2)
            out = out if self.up_bias is None else out + self.up_bias
        return self.norm(out) if m.layer_norm == "out" and self.norm is not None else out

    def compose(self, h: Tensor, x: Tensor) -> Tensor:
        """h <- compose(h, Delta h(x)), of the type of h."""
        self.called = True
        delta = self(x.to(self.down_weight.dtype)).to(h.dtype)
        kind = self.modification.composition
        if kind == "add":
            return h + delta
        if kind == "scale":
            return torch.add(h, delta, alpha=self.modification.scale)
        if self.factor is None:
            raise ModelError(f"this change has no trained factor for {kind!r}; build it anew from its modification")
        factor = self.factor.to(h.dtype)
        return h + factor * delta if kind == "learned_scale" else (1 - factor) * h + factor * delta

    def weight_change(self) -> Float[Tensor, "out d"]:
        """s W_u^T W_d^T as a matrix (out, in), for a change that is linear."""
        kind = self.modification.composition
        change = self.up_weight[0] @ self.down_weight
        if self.factor is not None:
            return self.factor * change
        return self.modification.scale * change if kind == "scale" else change


class PrefixGenerator(nn.Module):
    """An embedding (l, d) through d -> hidden and tanh, shared by the prefixes of all blocks while they train."""

    def __init__(self, length: int, width: int, hidden: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.weight = nn.Parameter(torch.empty(hidden, width))
        self.bias = nn.Parameter(torch.zeros(hidden))
        nn.init.normal_(self.embedding, generator=generator)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)

    def forward(self) -> Float[Tensor, "prefix hidden"]:
        """tanh(E W + b), from which every block makes its keys and values."""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class Prefix(nn.Module):
    """l keys and values per (grouped) head, trained as they are or made by a shared `PrefixGenerator`.

    gated: attend to tokens and to prefixes apart and mix by lam, instead of attending to both in one go. Both give the
    same; the gated path is what shows lam, and what other compositions than the gate need.
    """

    def __init__(
        self,
        modification: Modification,
        kv_heads: int,
        head_width: int,
        *,
        shared: PrefixGenerator | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.modification, self.shape = modification, (kv_heads, modification.bottleneck, head_width)
        self.gated = modification.composition != "gate"
        self.called = False
        self.shared = shared
        if shared is None:
            self.key, self.value = (
                nn.Parameter(torch.empty(self.shape).normal_(std=0.02, generator=generator)) for _ in range(2)
            )
        else:
            self.last = nn.Linear(shared.weight.shape[0], 2 * kv_heads * head_width)
            nn.init.kaiming_uniform_(self.last.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.last.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each (kv_heads, l, d_h)."""
        if self.shared is None:
            return self.key, self.value
        both = self.last(self.shared()).view(-1, 2, self.shape[0], self.shape[2]).permute(1, 2, 0, 3)
        return both[0], both[1]

    def settle(self) -> None:
        """Keep plain P_k and P_v and drop the generator that made them."""
        with torch.no_grad():
            key, value = (part.clone() for part in self())
        if self.shared is not None:
            self.shared = None
            del self.last
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)


class Prompt(nn.Module):
    """l trained vectors (l, d) that stand beside the embedded tokens."""

    def __init__(self, modification: Modification, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.modification = modification
        self.vectors = nn.Parameter(torch.empty(modification.bottleneck, width).normal_(std=0.02, generator=generator))
        self.called = False

    def forward(self, like: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch prompt d"]:
        """The vectors for every row of a batch."""
        self.called = True
        return self.vectors.to(like.dtype).expand(len(like), -1, -1)


def _scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """q k^T * scaling, (batch, heads, tokens, keys), for q of more heads than k where k's are shared by groups."""
    groups = q.unflatten(1, (k.shape[-3], -1)).flatten(2, 3)
    return (scaling * groups @ k.mT).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights v, (batch, heads, tokens, d_h), with the same sharing of heads."""
    groups = weights.unflatten(1, (v.shape[-3], -1)).flatten(2, 3)
    return (groups @ v).unflatten(2, (-1, weights.shape[2])).flatten(1, 2)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    mask = mask[..., : scores.shape[-1]]
    if mask.dtype == torch.bool:  # not -inf: a row without any token to see must stay a number
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def prefix_gate(q: object, K: object, P_k: object, mask: object = None) -> Float[Tensor, "batch heads tokens"]:
    """The weight lam(x) in (0, 1) that attention gives to the prefixes (eq. 6), (batch, heads, tokens).

    q: (batch, heads, tokens, d_h). K: (batch, heads or grouped heads, keys, d_h). P_k: ([batch,] heads or grouped heads, l,
    d_h). mask: (batch, 1 or heads, tokens, keys), added to the scores of the tokens, or bool, True where one may look; the
    prefixes are never masked. Scores are divided by sqrt(d_h) on both sides. No prefixes (l = 0) give 0.

    Raises InputError where shapes do not go together.

    >>> q, K, P_k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(2, 1, 4)
    >>> prefix_gate(q, K, P_k)[0, 0].tolist()
    [0.25, 0.25, 0.25]
    """
    if not (isinstance(q, Tensor) and isinstance(K, Tensor) and isinstance(P_k, Tensor)):
        raise InputError("q, K and P_k must be tensors")
    if q.ndim != 4 or K.ndim != 4 or P_k.ndim not in (3, 4) or not q.shape[-1] == K.shape[-1] == P_k.shape[-1]:
        raise InputError(
            "need q (batch, heads, tokens, d_h), K (batch, heads, keys, d_h) and P_k (heads, l, d_h) of one d_h; got "
            f"{tuple(q.shape)}, {tuple(K.shape)} and {tuple(P_k.shape)}"
        )
    if q.shape[1] % K.shape[1] or P_k.shape[-3] != K.shape[1]:
        raise InputError(f"{q.shape[1]} heads cannot share {K.shape[1]} of K and {P_k.shape[-3]} of P_k")
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError("mask must be a tensor or None")
    scaling = q.shape[-1] ** -0.5
    tokens = torch.logsumexp(_masked(_scores(q, K, scaling), mask), dim=-1)
    return torch.sigmoid(torch.logsumexp(_scores(q, P_k, scaling), dim=-1) - tokens)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor],
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    compose: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to tokens and to prefixes apart, composed; and lam. Shapes as in `prefix_gate`; scores are computed once.

    compose(h, Delta h, lam) is the gate (1 - lam) h + lam Delta h where it is None.
    """
    scores = _masked(_scores(q, k, scaling), mask)
    of_prefix = _scores(q, prefix[0].to(q.dtype), scaling)
    total, total_prefix = (torch.logsumexp(part, dim=-1, keepdim=True) for part in (scores, of_prefix))
    h = _mix(F.dropout((scores - total).exp(), dropout), v)
    delta = _mix(F.dropout((of_prefix - total_prefix).exp(), dropout), prefix[1].to(v.dtype))
    lam = torch.sigmoid(total_prefix - total)
    return ((1 - lam) * h + lam * delta if compose is None else compose(h, delta, lam)), lam.squeeze(-1)


def with_prefix(
    prefix: Prefix,
    plain: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a model, with the keys and values of ``prefix``; ``plain`` is the one without.

    Keys come rotated and prefixes are added after that, so they have no position; they are never masked and never cached.
    """
    prefix.called = True
    own_key, own_value = prefix()
    tokens, keys = query.shape[2], key.shape[2]
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if attention_mask is None and causal and tokens > 1:
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if prefix.gated:
        s, kind = prefix.modification.scale, prefix.modification.composition
        compose = {
            "gate": None,
            "add": lambda h, delta, lam: h + delta,
            "scale": lambda h, delta, lam: h + s * delta,
        }[kind]
        scaling = more.get("scaling")
        out, _ = gated_attention(
            query, key, value, (own_key, own_value), attention_mask, compose=compose,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, dropout=more.get("dropout", 0.0),
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    rows = len(query)
    key, value = (
        torch.cat((own.to(rest.dtype).expand(rows, -1, -1, -1), rest), dim=2)
        for own, rest in ((own_key, key), (own_value, value))
    )
    if attention_mask is not None:
        attention_mask = attention_mask[..., :keys]
        open_ = 1 if attention_mask.dtype == torch.bool else 0
        attention_mask = F.pad(attention_mask, (own_key.shape[1], 0), value=open_)
    return plain(module, query, key, value, attention_mask, **more)
