"""Hugging Face models for texts: their frozen embeddings, with a linear layer on top that is trained here."""

__all__ = ["EncoderModel"]

import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from theodolite.core.errors import ModelError, UnsafeFileError, require
from theodolite.core.loading.automatic import Made, TableNetwork, default_recipe, train_made
from theodolite.core.loading.data import Loaded
from theodolite.core.loading.options import Wanted
from theodolite.core.memory import chunk_rows

_LONGEST = 256  # tokens of a text that are read


class _MeanOfTokens:
    """The mean of a model's last hidden states over a text's tokens; of a decoder without the first token.

    The first token of a decoder sees nothing but itself and often has a state so large that it alone decides the mean.
    """

    def __init__(self, name: str) -> None:
        transformers = require("transformers", "language")
        try:
            with warnings.catch_warnings():
                # torch warns of pickles that it may not understand; it then refuses them, which is handled here
                warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                self._model: Any = transformers.AutoModel.from_pretrained(name, trust_remote_code=False)
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(
                f"{name}: its weights could run code when they are read, so they were not read"
            ) from error
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            ImportError,
            SafetensorError,
        ) as error:
            raise ModelError(
                f"{name} is no folder with a Hugging Face model, or not one that can be had from the hub: {str(error)[:300]}"
            ) from error
        self._model.eval().requires_grad_(False)
        config = self._model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{name} has an encoder and a decoder; models with one of them can be used")
        self._decoder = any(kind.endswith(("CausalLM", "LMHeadModel")) for kind in config.architectures or ())
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise ModelError(f"{name}: its tokenizer has neither a padding nor an end token")
        self._tokenizer.padding_side = "right"
        self._longest = min(
            _LONGEST, self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", _LONGEST)
        )
        self.width = int(config.hidden_size)
        without = " without the first" if self._decoder else ""
        self.note = f"texts as the mean of the last hidden states of {name} over up to {self._longest} tokens{without}"

    def features(self) -> tuple[str, ...]:
        """The dimensions have no names."""
        return ()

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing is learnt: the model is frozen."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (n, width), float32; texts of like length go together, as many as fit the memory budget."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        out = np.empty((len(texts), self.width), dtype=np.float32)
        # a token costs some 40 numbers per dimension of the hidden state and its row of the attention maps
        size = chunk_rows(self._longest * 4 * (40 * self.width + 16 * self._longest), at_most=64)
        with torch.no_grad():
            for rows in np.array_split(order, max(1, -(-len(order) // size))):
                batch = self._tokenizer(
                    [texts[i] for i in rows],
                    padding=True,
                    truncation=True,
                    max_length=self._longest,
                    return_tensors="pt",
                )
                hidden = self._model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).last_hidden_state
                mask = batch["attention_mask"].clone()
                if self._decoder:
                    mask[:, 0] = mask[:, 0] * (mask.sum(dim=1) == 1)
                weight = mask[:, :, None].to(hidden.dtype)
                out[rows] = ((hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)).float().numpy()
        return out


class EncoderModel:
    """A Hugging Face folder or name: its embeddings are the inputs, a linear layer on them is what is surveyed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.wanted = Wanted(embedding=_MeanOfTokens(name))

    def make(self, loaded: Loaded, epochs: int | None, seed: int) -> Made:
        """Train the linear layer on the training texts' embeddings."""
        data = loaded.data
        target = None
        if data.task == "regression":
            target = (float(data.train.y.mean()), float(data.train.y.std()))
        build = TableNetwork(data.shape[0], (), max(1, len(data.classes)), target)
        what = f"a linear layer on the frozen embeddings of {self._name}"
        return train_made(build, data, default_recipe(build(seed), data, epochs), seed, what)
