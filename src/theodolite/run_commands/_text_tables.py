"""What the commands on pretrained language models and tables of labelled texts share."""

__all__ = ["is_text_model", "read_texts"]

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theodolite.commands import SubjectFlags

if TYPE_CHECKING:
    from theodolite.core.subject import Dataset, Rows


class _TokenIds:
    """Texts as rows of token ids, -1 where there is none: what the loader of tables takes for an embedding."""

    def __init__(self, model: str, longest: int) -> None:
        self.model, self.longest = model, longest
        self.note = f"texts as up to {longest} tokens of {model}"

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing is learnt."""

    def features(self) -> tuple[str, ...]:
        """The places of the tokens have no names."""
        return ()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Ids (n, longest), float32, which holds them exactly."""
        from theodolite.parameters.finetuning_dimension import token_columns

        found = token_columns(self.model, texts, [0] * len(texts), longest=self.longest)
        out = np.full((len(texts), self.longest), -1, dtype=np.float32)
        ids, there = found["input_ids"].numpy(), found["attention_mask"].numpy() == 1
        out[:, : ids.shape[1]] = np.where(there, ids, -1)
        return out


def is_text_model(flags: SubjectFlags) -> bool:
    """Whether --model names a language model, and not a factory or a file of another kind."""
    model = flags.model
    if flags.data is None or model in (None, "auto") or flags.task == "language":
        return False
    return Path(model).is_dir() or not (":" in model or Path(model).suffix.lower() in (".skops", ".onnx"))


def read_texts(flags: SubjectFlags, longest: int) -> "tuple[Dataset, dict[str, dict[str, Any]]]":
    """The table of texts of --data, and its parts as columns: input_ids, attention_mask and labels."""
    from theodolite.core.loading.data import load_data
    from theodolite.core.loading.options import Wanted

    wanted = Wanted(embedding=_TokenIds(str(flags.model), longest))
    data = load_data(str(flags.data), flags.options(), wanted).data
    return data, {name: _columns(rows) for name, rows in data.parts.items()}


def _columns(rows: "Rows") -> dict[str, Any]:
    ids = rows.x.long()
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": rows.y}
