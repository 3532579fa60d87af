"""A small copying Transformer from questions to SQL, as the reproduction of program sets trains it on GeoQuery and ATIS."""

__all__ = ["CopyTransformer", "TextToSQL", "train_text_to_sql"]

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from theodolite.predictions.program_sets import Generation, TokenLogprob

_PIECE = re.compile(r'\s?(?:"|[^\s"]+)')
_PAD, _START, _END, _UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
_LONGEST, _RATE = 160, 2e-3


class CopyTransformer(nn.Module):
    """p(next piece) = g softmax(W h) + (1 - g) sum of the attention on the source words that are that piece.

    copies (source words,): number of the target piece that each source word is, -1 for none.
    """

    def __init__(self, sources: int, targets: int, copies: Tensor, *, width: int, layers: int) -> None:
        super().__init__()
        options = {"batch_first": True, "norm_first": True, "dropout": 0.1, "dim_feedforward": 2 * width}
        self.source, self.target = nn.Embedding(sources, width), nn.Embedding(targets, width)
        self.place = nn.Parameter(0.02 * torch.randn(_LONGEST, width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, **options), layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, 4, **options), layers, nn.LayerNorm(width)
        )
        self.out, self.gate, self.query = nn.Linear(width, targets), nn.Linear(width, 1), nn.Linear(width, width)
        self.register_buffer("copies", copies)

    def encode(self, source: Tensor) -> Tensor:
        """Hidden states (n, words, width) of source words (n, words), 0 where there is none."""
        x = self.source(source) + self.place[: source.shape[1]]
        return self.encoder(x, src_key_padding_mask=source == 0)

    def forward(self, source: Tensor, memory: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities (n, pieces, targets) of the piece after each of ``target`` (n, pieces)."""
        length = target.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.target(target) + self.place[:length]
        h = self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=source == 0)
        written = self.out(h).log_softmax(-1)
        attention = self.query(h) @ memory.mT / memory.shape[-1] ** 0.5
        piece: Tensor = self.copies[source]  # type: ignore[index]
        attention = attention.masked_fill((piece < 0)[:, None], -1e9).softmax(-1)
        index = piece.clamp(min=0)[:, None].expand_as(attention)
        copied = torch.zeros_like(written).scatter_add_(2, index, attention)
        gate = self.gate(h)
        # nothing to copy: everything is written
        gate = torch.where((piece >= 0).any(dim=1)[:, None, None], gate, 30.0)
        return torch.logaddexp(
            functional.logsigmoid(gate) + written, functional.logsigmoid(-gate) + (copied + 1e-12).log()
        )


@dataclass(frozen=True, eq=False)
class TextToSQL:
    """What the trained model writes for questions that it was not trained on, and the right queries."""

    generations: list[Generation]
    references: list[str]
    trained_on: int
    parameters: int


def train_text_to_sql(
    path: Path,
    *,
    width: int = 128,
    layers: int = 2,
    epochs: int = 60,
    longest: int = _LONGEST - 2,
    seed: int = 0,
) -> TextToSQL:
    """Train on the question split's training part of a text2sql-data file; write SQL for its dev and test parts.

    path: .json or .json.gz. longest: questions whose query has more pieces than this are left out.
    """
    data = path.read_bytes()
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "rest": []}
    for query in json.loads(gzip.decompress(data) if path.suffix == ".gz" else data):
        if len(_PIECE.findall(query["sql"][0])) > longest:
            continue
        for sentence in query["sentences"]:
            part = "train" if sentence["question-split"] == "train" else "rest"
            pairs[part].append((sentence["text"], query["sql"][0]))
    sources = [_PAD, _UNKNOWN, *sorted({word for text, _ in pairs["train"] for word in text.split()})]
    targets = [_PAD, _START, _END, *sorted({piece for _, sql in pairs["train"] for piece in _PIECE.findall(sql)})]
    source_of = {word: i for i, word in enumerate(sources)}
    target_of = {piece: i for i, piece in enumerate(targets)}
    copies = torch.tensor([-1 if i < 2 else target_of.get(word, -1) for i, word in enumerate(sources)])
    torch.manual_seed(seed)
    model = CopyTransformer(len(sources), len(targets), copies, width=width, layers=layers)
    source = [[source_of.get(word, 1) for word in text.split()] for text, _ in pairs["train"]]
    target = [[1, *(target_of[piece] for piece in _PIECE.findall(sql)), 2] for _, sql in pairs["train"]]
    _train(model, source, target, epochs, seed)
    questions = [[source_of.get(word, 1) for word in text.split()] for text, _ in pairs["rest"]]
    return TextToSQL(
        _write(model, questions, targets), [sql for _, sql in pairs["rest"]], len(source),
        sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def _rows(rows: Sequence[Sequence[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row[:_LONGEST]) for row in rows], batch_first=True)


def _train(model: CopyTransformer, source: list[list[int]], target: list[list[int]], epochs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = np.argsort([len(row) for row in target], kind="stable")  # rows of a length together: little padding
    batches = np.array_split(order, max(1, len(order) // 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * len(batches), pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for place in rng.permutation(len(batches)).tolist():
            x, y = _rows([source[i] for i in batches[place]]), _rows([target[i] for i in batches[place]])
            told = model(x, model.encode(x), y[:, :-1])
            loss = functional.nll_loss(told.flatten(0, 1), y[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def _write(model: CopyTransformer, questions: list[list[int]], targets: list[str]) -> list[Generation]:
    """The likeliest piece after the other, for all questions at once; those that have ended leave the batch."""
    pieces: list[list[int]] = [[] for _ in questions]
    told: list[list[float]] = [[] for _ in questions]
    x = _rows(questions)
    memory, going = model.encode(x), torch.arange(len(questions))
    y = torch.ones(len(questions), 1, dtype=torch.long)
    for _ in range(_LONGEST - 1):
        logprob, chosen = model(x[going], memory[going], y)[:, -1].max(dim=-1)
        on = chosen > 2  # neither an end nor padding
        for row, piece, value in zip(going[on].tolist(), chosen[on].tolist(), logprob[on].tolist(), strict=True):
            pieces[row].append(piece)
            told[row].append(value)
        y, going = torch.cat([y, chosen[:, None]], dim=1)[on], going[on]
        if not len(going):
            break
    made = []
    for row, values in zip(pieces, told, strict=True):
        tokens, start = [], 0
        for piece, value in zip(row, values, strict=True):
            tokens.append(TokenLogprob(targets[piece], min(value, 0.0), start))
            start += len(targets[piece])
        made.append(Generation("".join(targets[piece] for piece in row), tuple(tokens)))
    return made
