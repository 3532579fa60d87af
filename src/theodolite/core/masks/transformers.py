"""The units of Hugging Face transformers: the hidden numbers of their feed-forward parts (MLPs).

The forward of such a model cannot be followed step by step, but its MLPs are known by the names of their layers: one or two
write the hidden numbers (with two, an activated gate times a linear branch), one reads them. Unit i is row i of the writers
and column i of the reader.
"""

__all__ = ["Mlp", "answer", "is_transformer", "mlps", "set_config_width"]

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from theodolite.core.errors import InputError, ModelError

_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM
    (("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, MiniLM, ViT
    (("fc1",), "fc2"),  # OPT, Phi, CLIP, BART
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom
    (("wi_0", "wi_1"), "wo"),  # T5 with a gate
    (("wi",), "wo"),  # T5
    (("lin1",), "lin2"),  # DistilBERT
)
_WIDTHS = ("intermediate_size", "ffn_dim", "d_ff")


class Mlp(NamedTuple):
    """One MLP: names of the layers that write its hidden numbers (the last one linearly), and of the one that reads them."""

    writers: tuple[str, ...]
    reader: str
    width: int


def is_transformer(model: object) -> bool:
    """Whether it is a model of the package transformers (which is not imported for it)."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(model).__mro__]
    return ("transformers.modeling_utils", "PreTrainedModel") in kinds


def mlps(model: nn.Module) -> list[Mlp]:
    """The MLPs of ``model`` in order; ModelError where it has none of a known form."""
    found, modules = list[Mlp](), dict(model.named_modules())
    for name in modules:
        prefix = f"{name}." if name else ""
        for writers, reader in _FORMS:
            names = [f"{prefix}{part}" for part in (*writers, reader)]
            layers: list[Any] = [modules.get(one) for one in names]
            if all(isinstance(one, nn.Linear) and not is_parametrized(one) for one in layers):
                width = layers[-1].in_features
                if all(one.out_features == width for one in layers[:-1]):
                    found.append(Mlp(tuple(names[:-1]), names[-1], width))
                    break
    if not found:
        forms = "; ".join(f"{', '.join(writers)} -> {reader}" for writers, reader in _FORMS)
        raise ModelError(
            f"{type(model).__name__} has no MLP of linear layers with names that are known ({forms}), so its units cannot "
            "be told"
        )
    return found


def answer(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> Tensor:
    """What ``model`` gives for a batch: its tensor; of a transformer the logits, or the last hidden states.

    batch: what the model takes; of a transformer token ids (n, length), or the mapping that its tokenizer returns.
    """
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not is_transformer(model):
        return out
    found = out if isinstance(out, Tensor) else getattr(out, "logits", out[0])
    if not isinstance(found, Tensor):
        raise InputError(f"{type(model).__name__} gives no tensor of logits or hidden states")
    return found


def set_config_width(model: nn.Module) -> None:
    """Tell a transformer's config how wide its MLPs are by now, where they are all alike, so that it can be saved and loaded."""
    widths, config = {mlp.width for mlp in mlps(model)}, getattr(model, "config", None)
    names = [name for name in _WIDTHS if hasattr(config, name)]
    if len(widths) == 1 and len(names) == 1:
        setattr(config, names[0], widths.pop())
