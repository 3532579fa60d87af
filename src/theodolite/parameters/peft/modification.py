"""How a method changes a frozen model, in five choices, and the methods that have a name.

    h <- compose(h, Delta h),   Delta h = f(input W_down) W_up                                   (section 3, table 1)

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366.
"""

__all__ = ["PRESETS", "Method", "Modification", "named", "resolve"]

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from theodolite.core.errors import InputError

_FORMS = ("relu", "identity", "softmax")
PLACES = ("ffn", "attention", "heads", "query", "key", "value", "output", "ffn_in", "ffn_gate", "ffn_out", "fused")
"""Where Delta h is added: to the output of a sub-block, to the heads, or to the output of one linear map of the block."""
_WHOLE = ("input", "bias", "weights")
_INSERTIONS = ("parallel", "sequential", "after_norm")
_COMPOSITIONS = ("add", "scale", "learned_scale", "gate")


@dataclass(frozen=True)
class Modification:
    """One change of a hidden state of every block.

    form: f, "relu", "identity", "softmax" (attention over ``bottleneck`` trained keys and values per head: a prefix) or a
    function of a tensor. bottleneck: r, or the number l of prefixes. where: "ffn" and "attention" are the outputs of the two
    sub-blocks, "heads" the output of each head before the output projection, "query", "key", "value", "output", "ffn_in",
    "ffn_gate", "ffn_out", "fused" (one map for query, key and value) that of one linear map; three are no hidden states:
    "input" (l trained vectors beside the embedded tokens), "bias" and "weights" (of the model itself).
    insertion: "parallel" computes Delta h from what the sub-block reads, "sequential" from its output h, "after_norm" from h
    after residual and LayerNorm (and normalises the sum again). composition: "add" h + Delta h; "scale" h + s Delta h with
    s = ``scale``; "learned_scale" starts there and trains s; "gate" (1 - lam) h + lam Delta h with the attention's lam(x)
    for a softmax and else a trained number that starts at 0. init: "lora" starts at Delta h = 0 (W_down Kaiming-uniform,
    W_up = 0), "bert" draws both from N(0, 0.02). layer_norm: of the "in"put of W_down or of the "out"put of W_up.
    dropout: inside the bottleneck, before W_down for the identity. generator: width of the MLP that makes all prefixes
    from one embedding while they train; None trains them directly.

    Raises InputError for values that are none of these or do not go together.

    >>> Modification(bottleneck=32, composition="scale", scale=4.0).insertion
    'parallel'
    """

    form: str | Callable[..., Any] = "relu"
    bottleneck: int = 16
    where: str = "ffn"
    insertion: str = "parallel"
    composition: str = "add"
    scale: float | int = 4.0
    init: str = "lora"
    layer_norm: str | None = None
    dropout: float | int = 0.0
    generator: int | None = None

    def __post_init__(self) -> None:
        _among("form", self.form, _FORMS, callable(self.form))
        _among("where", self.where, (*PLACES, *_WHOLE))
        _among("insertion", self.insertion, _INSERTIONS)
        _among("composition", self.composition, _COMPOSITIONS)
        _among("init", self.init, ("lora", "bert"))
        _among("layer_norm", self.layer_norm, ("in", "out"), self.layer_norm is None)
        if isinstance(self.bottleneck, bool) or not isinstance(self.bottleneck, Integral) or self.bottleneck < 0:
            raise InputError(f"a bottleneck is a whole number, got {self.bottleneck!r}")
        if self.bottleneck < 1 and self.where not in ("bias", "weights"):
            raise InputError(f"a bottleneck must be at least 1, got {self.bottleneck}")
        if not isinstance(self.scale, Real) or not 0 < self.scale < math.inf:
            raise InputError(f"a scale must be a number above 0, got {self.scale!r}; 0 would leave nothing to train")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), got {self.dropout}")
        # plain numbers, so that a modification can be written to a file whatever it was made from
        object.__setattr__(self, "bottleneck", int(self.bottleneck))
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "dropout", float(self.dropout))
        if self.form == "softmax" and (self.where != "heads" or self.insertion != "parallel"):
            raise InputError(
                'a softmax attends to prefixes inside the heads: use where="heads" and insertion="parallel", '
                f"got {self.where!r} and {self.insertion!r}"
            )
        if self.form == "softmax" and self.composition == "learned_scale":
            raise InputError('prefixes are composed with "gate", "add" or "scale"')
        if self.insertion == "after_norm" and self.where not in ("ffn", "attention"):
            raise InputError(f'insertion="after_norm" is for "ffn" and "attention", got {self.where!r}')
        if self.generator is not None and (self.form != "softmax" or self.generator < 1):
            raise InputError("generator is the width of the MLP that makes prefixes: it needs a softmax and at least 1")

    @property
    def hidden(self) -> bool:
        """Whether a hidden state is changed, and not inputs or weights of the model."""
        return self.where not in _WHOLE

    @property
    def prefix(self) -> bool:
        """Whether it is a prefix of keys and values."""
        return self.form == "softmax"

    @property
    def mergeable(self) -> bool:
        """Whether it is a low-rank change of the weight of one linear map."""
        return (
            self.form == "identity"
            and self.insertion == "parallel"
            and self.where in PLACES[3:]
            and self.composition != "gate"
            and self.layer_norm is None
        )


def _among(name: str, value: object, allowed: Sequence[str], also: bool = False) -> None:
    if not also and value not in allowed:
        raise InputError(f"{name} is one of {', '.join(map(repr, allowed))}; got {value!r}")


Method = str | Modification | Sequence[Modification]
"""A preset by name, one modification, or several."""


def houlsby(bottleneck: int = 16, *, init: str = "lora", **more: Any) -> list[Modification]:
    """Sequential adapters after attention and FFN (Houlsby et al., 2019, arXiv:1902.00751)."""
    return [
        Modification(bottleneck=bottleneck, where=where, insertion="sequential", init=init, **more)
        for where in ("attention", "ffn")
    ]


def pfeiffer(bottleneck: int = 32, *, init: str = "lora", **more: Any) -> list[Modification]:
    """One adapter after the FFN's LayerNorm (Pfeiffer et al., 2021, arXiv:2005.00247)."""
    return [Modification(bottleneck=bottleneck, insertion="after_norm", init=init, **more)]


def parallel(bottleneck: int = 32, *, where: str = "ffn", **more: Any) -> list[Modification]:
    """The adapter beside a sub-block, h + Delta h."""
    return [Modification(bottleneck=bottleneck, where=where, **more)]


def scaled_parallel(bottleneck: int = 32, *, where: str = "ffn", scale: float = 4.0, **more: Any) -> list[Modification]:
    """The adapter beside a sub-block, h + s Delta h."""
    return [Modification(bottleneck=bottleneck, where=where, composition="scale", scale=scale, **more)]


def multihead_parallel(bottleneck: int = 48, **more: Any) -> list[Modification]:
    """One adapter of r / heads for each head, read from the block's input."""
    return [Modification(bottleneck=bottleneck, where="heads", **more)]


def lora(
    bottleneck: int = 8, *, alpha: float = 16.0, where: str | Sequence[str] = ("query", "value"), dropout: float = 0.0
) -> list[Modification]:
    """Low-rank changes of weights, h + (alpha / r) x W_d W_u (Hu et al., 2021, arXiv:2106.09685)."""
    places = [where] if isinstance(where, str) else where
    plain = [Modification("identity", bottleneck, place, composition="scale", dropout=dropout) for place in places]
    return [replace(one, scale=alpha / one.bottleneck) for one in plain]


def prefix(bottleneck: int = 16, *, generator: int | None = None) -> list[Modification]:
    """l trained keys and values in front of those of the tokens (Li and Liang, 2021, arXiv:2101.00190)."""
    return [Modification("softmax", bottleneck, "heads", composition="gate", generator=generator)]


def prompt(bottleneck: int = 16) -> list[Modification]:
    """l trained vectors beside the embedded tokens (Lester et al., 2021, arXiv:2104.08691)."""
    return [Modification("identity", bottleneck, "input")]


def bitfit() -> list[Modification]:
    """Every bias of the model (Ben Zaken et al., 2021, arXiv:2106.10199)."""
    return [Modification("identity", 0, "bias")]


def full() -> list[Modification]:
    """Every weight of the model's blocks: what the others are compared with. Embeddings stay as they are."""
    return [Modification("identity", 0, "weights")]


def head() -> list[Modification]:
    """Nothing but the head."""
    return []


def mam(
    bottleneck: int = 16, *, prefixes: int | None = None, scale: float = 4.0, generator: int | None = None
) -> list[Modification]:
    """The mix-and-match adapter: a short prefix at attention, a scaled parallel adapter at the FFN (section 4.6).

    bottleneck: r of the FFN, and l where ``prefixes`` is None. The paper takes r = 512, l = 30, s = 4 for generation with
    large models and r = l = 16, s = 2 for classification.
    """
    return [
        *prefix(bottleneck if prefixes is None else prefixes, generator=generator),
        *scaled_parallel(bottleneck, scale=scale),
    ]


PRESETS: dict[str, Callable[..., list[Modification]]] = {
    made.__name__: made
    for made in (
        houlsby, pfeiffer, parallel, scaled_parallel, multihead_parallel, lora, prefix, prompt, bitfit, mam, full, head
    )
}  # fmt: skip
"""Names and what makes their modifications; every option of a factory is an option of `apply`."""


def resolve(method: object, **options: Any) -> tuple[Modification, ...]:
    """The modifications of a method: a name of `PRESETS` with its options, one modification, or several.

    Raises InputError for an unknown name or option.
    """
    if isinstance(method, str):
        if method not in PRESETS:
            raise InputError(f"no method is called {method!r}; there are {', '.join(PRESETS)}")
        make = PRESETS[method]
        known = list(inspect.signature(make).parameters)
        if "more" in known:
            known = [name for name in known if name != "more"] + list(Modification.__dataclass_fields__)
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise InputError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        return tuple(make(**options))
    if options:
        raise InputError(f"{', '.join(options)}: options go with the name of a preset; a modification holds its own")
    made = (method,) if isinstance(method, Modification) else tuple(method) if isinstance(method, Sequence) else ()
    if (not made and method not in ([], ())) or not all(isinstance(one, Modification) for one in made):
        raise InputError(f"a method is a name, a Modification or a list of them; got {method!r}")
    return made


def named(method: object) -> str:
    """What a method is called in a table: its preset's name, or its five choices."""
    if isinstance(method, str):
        return method
    parts = [
        f"{m.form if isinstance(m.form, str) else m.form.__name__} {m.where} {m.insertion} {m.composition}"
        for m in resolve(method)
    ]
    return " + ".join(parts) or "head"
