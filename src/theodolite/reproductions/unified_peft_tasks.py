"""What He et al., 2022, arXiv:2110.04366, is reproduced on: retrieval in Cranfield, and texts with two classes."""

__all__ = ["Classifier", "Retrieval"]

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.view import evaluation_mode
from theodolite.parameters.peft import tokenized
from theodolite.parameters.peft.comparison import train_steps
from theodolite.reproductions.unified_peft_data import Cranfield, reciprocal_rank


class Retrieval:
    """Cranfield as a `Task`: contrastive training of titles against bodies, mean reciprocal rank of queries over titles."""

    steps, batch_size, temperature = 80, 16, 0.05

    def __init__(self, data: Cranfield, tokenizer: Any) -> None:
        self._data = data
        self._titles = tokenized(tokenizer, data.titles, max_length=24)
        self._queries = tokenized(tokenizer, data.queries, max_length=32)
        cut = {"truncation": True, "padding": True, "return_tensors": "pt"}
        self._pairs = [
            tokenizer([pair[side] for pair in data.pairs], max_length=length, **cut)
            for side, length in ((0, 24), (1, 40))
        ]
        self.areas = list[float]()  # under the loss, one per training
        self.ranks = list[np.ndarray]()  # of every query, one per test

    @staticmethod
    def _embed(model: nn.Module, batch: Any, rows: Tensor) -> Tensor:
        mask = batch["attention_mask"][rows]
        used = mask.any(dim=0)
        mask = mask[:, used]
        states = model(input_ids=batch["input_ids"][rows][:, used], attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return F.normalize((states * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)

    def _all(self, model: nn.Module, batch: Any, rows: Tensor) -> Tensor:
        order = batch["attention_mask"][rows].sum(dim=1).argsort()  # like lengths together
        with torch.no_grad(), evaluation_mode(model):
            found = torch.cat([self._embed(model, batch, part) for part in rows[order].split(100)])
        return found[order.argsort()]

    def _order(self, seed: int) -> tuple[Tensor, Tensor]:
        shuffled = torch.randperm(len(self._data.pairs), generator=torch.Generator().manual_seed(seed))
        used = 80 * self.batch_size  # whatever the number of steps, the same pairs are held out
        return shuffled[:used], shuffled[used:]

    def fit(self, model: nn.Module, *, epochs: int, learning_rate: float, seed: int) -> None:
        """Train for `steps` steps on pairs of the seed's order; dropout is off, the area under the loss is kept."""
        rows = self._order(seed)[0].view(-1, self.batch_size)
        model.eval()

        def loss(step: int) -> Tensor:
            title, body = (self._embed(model, side, rows[step]) for side in self._pairs)
            return F.cross_entropy(title @ body.T / self.temperature, torch.arange(self.batch_size))

        losses = train_steps(model, loss, self.steps, learning_rate=learning_rate, warmup=0.1, clip=None, decay=False)
        self._seed = seed
        self.areas.append(float(np.mean(losses)))

    def quality(self, model: nn.Module, part: str) -> float:
        """Mean reciprocal rank at 10. Test: queries over titles. Validation: held-out titles over their bodies."""
        if part == "test":
            titles, queries = (
                self._all(model, batch, torch.arange(len(batch["input_ids"])))
                for batch in (self._titles, self._queries)
            )
            self.ranks.append(reciprocal_rank(queries @ titles.T, self._data.relevant))
            return float(self.ranks[-1].mean())
        held = self._order(self._seed)[1]
        titles, bodies = (self._all(model, side, held) for side in self._pairs)
        return float(reciprocal_rank(titles @ bodies.T, tuple(frozenset({i}) for i in range(len(held)))).mean())


class Classifier(nn.Module):
    """A copy of an encoder with a fresh linear head on the mean of its states."""

    def __init__(self, encoder: nn.Module, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(encoder.config.hidden_size, 2)  # type: ignore[union-attr,arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores of the classes (n, 2)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states.dtype)
        return self.head((states * weight).sum(dim=1) / weight.sum(dim=1))
