"""A Hugging Face decoder in this process, with the same interface as an endpoint."""

__all__ = ["LocalModel"]

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET, chunks
from theodolite.language.model import AnswerCache, Completion, LanguageModel, Scored, Token
from theodolite.language.pretrained import WHEELS, load_decoder

if TYPE_CHECKING:
    from theodolite.language.branches import Text


_KEPT = 0.25  # of the memory: what texts that were read may take until others are


class _Row:
    """A continuation of a text as it is written. places: where each token is drawn, by the seed and the continuation's number."""

    def __init__(self, text: int, limit: int, seed: int, number: int) -> None:
        self.text, self.limit, self.finish = text, limit, "length"
        self.places = np.random.default_rng([seed % 2**64, number]).random(limit).tolist()
        self.ids: list[int] = []
        self.logprobs: list[float] = []


class LocalModel(LanguageModel):
    """name: "smollm2", a Hugging Face folder or a name on the hub. The weights are loaded when they are first needed.

    memory: bytes that a batch of continuations may take; 1 GiB where None. Raises as `load_decoder`.
    """

    _unsaved = LanguageModel._unsaved | {"_named"}  # the files of a folder may have changed when it is read again

    def __init__(self, name: str = "smollm2", *, cache: AnswerCache | None = None, memory: int | None = None) -> None:
        super().__init__(name, cache=cache, concurrency=1)
        self._memory = memory
        self._loaded: tuple[Any, Any] | None = None
        self._fixed = True
        self._texts: dict[tuple[int, ...], Text] = {}

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> "LocalModel":
        """A model that is loaded already; its answers are not kept, since its weights may change."""
        made = cls(name)
        made._loaded, made._fixed = (model, tokenizer), False
        return made

    def __getstate__(self) -> dict[str, Any]:
        """A model that is known by its name is loaded again, one that was given goes along."""
        return super().__getstate__() | {"_texts": {}} | ({"_loaded": None} if self._fixed else {})

    def _identity(self) -> dict[str, Any]:
        return self._named

    @cached_property
    def _named(self) -> dict[str, Any]:
        """A folder is known by its files too: weights that were trained on give other answers."""
        folder = Path(self.name).expanduser()
        if self.name in WHEELS or not folder.is_dir():
            return {"local": self.name}
        files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir())]
        return {"local": str(folder.resolve()), "files": files}

    @property
    def model(self) -> Any:
        """The network."""
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._load()[1]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = tuple(load_decoder(self.name))  # type: ignore[assignment]
        return self._loaded  # type: ignore[return-value]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    @property
    def window(self) -> int | None:
        """Tokens that it can read, None where it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _fits(self, tokens: int, what: str) -> None:
        if self.window is not None and tokens > self.window:
            raise InputError(f"{what} has {tokens:,} tokens, more than the window of {self.window:,} of {self.name}")

    def _chat(self, request: dict[str, Any]) -> Completion:
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{self.name} has no chat template, so it cannot hold a conversation; use generate")
        text = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        return next(self._continue([self._ids(text, special=False)], request | {"n": 1, "top_p": 1.0}))[0]

    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        return next(self._generate_each([request]))

    def _generate_each(self, requests: Sequence[dict[str, Any]]) -> Iterator[list[Completion]]:
        # they differ in the prompt alone
        yield from self._continue([self._ids(one["prompt"], special=True) for one in requests], requests[0])

    def _continue(self, starts: list[list[int]], request: dict[str, Any]) -> Iterator[list[Completion]]:
        """Continuations of each text, as many at a time as the memory allows."""
        from theodolite.language.branches import shares

        if not all(starts):
            raise InputError(f"the prompt has no tokens for {self.name}")
        longest, count = max(map(len, starts)), request["n"]
        self._fits(longest, "the prompt")
        together = shares(self.model)
        rows = [(i, j) for i in range(len(starts)) for j in range(count)]
        # keys of the text and of what is written, and some numbers for each token that may be next
        size = self._bytes(longest / count if together else longest, self._most(longest, request), 16)
        made: list[Completion] = []
        for batch in [rows] if together else [rows[at : at + count] for at in range(0, len(rows), count)]:
            for part in chunks(len(batch), size, self._memory):
                made += self._written(starts, batch[part], request)
                while len(made) >= count:
                    yield made[:count]
                    made = made[count:]

    def _most(self, read: int, request: dict[str, Any]) -> int:
        """Tokens that may be written after ``read`` tokens."""
        return request["max_tokens"] if self.window is None else min(request["max_tokens"], self.window - read)

    @torch.no_grad()
    def _written(
        self, starts: list[list[int]], rows: list[tuple[int, int]], request: dict[str, Any]
    ) -> list[Completion]:
        """rows: (text, number of its continuation). What a row draws depends on the seed and its number alone."""
        from theodolite.language.branches import Branches, draw

        written = [_Row(i, self._most(len(starts[i]), request), request["seed"], j) for i, j in rows]
        ends = _end_tokens(self.model, self.tokenizer)
        stops = [(stop, len(stop.encode()) + 1) for stop in request["stop"]]
        going = [row for row in written if row.limit]  # a text that fills the window has no room for more
        if going:
            counts = Counter(row.text for row in going)
            texts = list(zip(self._read([starts[i] for i in counts]), counts.values(), strict=True))
            branches = Branches(self.model, texts, max(row.limit for row in going))
            logits = torch.cat([text.logits.expand(count, -1) for text, count in texts])
        while going:
            places = torch.tensor([row.places[len(row.ids)] for row in going], device=logits.device)
            chosen = draw(logits, request["temperature"], request["top_p"], places)
            told = (
                logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist() if request["logprobs"] else []
            )
            for at, (row, token) in enumerate(zip(going, chosen.tolist(), strict=True)):
                if token in ends:
                    row.finish = "stop"
                    continue
                row.ids.append(token)
                row.logprobs += told[at : at + 1]
                # a token has at least a byte, so that the last tokens hold a stop text that has just been written
                if any(stop in self.tokenizer.decode(row.ids[-last:]) for stop, last in stops):
                    row.finish = "stop"
            left = [at for at, row in enumerate(going) if row.finish == "length" and len(row.ids) < row.limit]
            if 0 < len(left) < len(going):
                branches.keep(left)
                chosen = chosen[left]
            going = [going[at] for at in left]
            if going:
                logits = branches.step(chosen[:, None])[:, -1]
        return [self._completion(row, request, len(starts[row.text])) for row in written]

    def _read(self, starts: list[list[int]]) -> list["Text"]:
        """What the network makes of each text; the last few are kept, as a text is often gone on from again."""
        from theodolite.language.branches import read_text

        keys = [tuple(ids) for ids in starts]
        kept = {key: self._texts[key] if key in self._texts else read_text(self.model, key) for key in keys}
        budget = DEFAULT_BUDGET if self._memory is None else self._memory
        small = self._bytes(sum(map(len, keys)), 0, 0) <= budget * _KEPT
        self._texts = kept if self._fixed and small else {}
        return [kept[key] for key in keys]

    def _completion(self, row: "_Row", request: dict[str, Any], prompt: int) -> Completion:
        tokens = _with_places(self.tokenizer, row.ids, row.logprobs) if request["logprobs"] else None
        text = self.tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cuts = [text.find(stop) for stop in request["stop"] if stop in text]
        if cuts:
            text = text[: min(cuts)]
        if tokens is not None:
            tokens = tuple(token for token in tokens if token.start < len(text) or not cuts)
        return Completion(text, tokens, "stop" if cuts else row.finish, prompt, len(row.ids))

    @torch.no_grad()
    def _score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Scored]:
        """One forward pass for what all prompts begin with, one row for each prompt with all of a continuation but its last
        token; continuations of one token share the row of their prompt.
        """
        from theodolite.language.branches import read_text

        starts = [self._ids(prompt, special=True) for prompt in prompts]
        if not all(starts):
            raise InputError(f"a prompt has no tokens for {self.name}; give at least one word")
        ends = [self._ids(text, special=False) for text in continuations]
        if not all(ends):
            raise InputError(f"a continuation has no tokens for {self.name}; give at least one word")
        self._fits(max(map(len, starts)) + max(map(len, ends)) - 1, "a prompt with its continuation")
        columns = zip(*(start[:-1] for start in starts), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        past = read_text(self.model, starts[0][:shared]) if shared else None
        readings: dict[tuple[int, ...], list[int]] = {}
        for j, end in enumerate(ends):
            readings.setdefault(tuple(end[:-1]), []).append(j)
        rows = [(i, middle) for i in range(len(starts)) for middle in readings]
        rows.sort(key=lambda row: len(starts[row[0]]) + len(row[1]))  # rows of one length together: little is padded
        found = [[0.0] * len(ends) for _ in starts]
        width = max(len(start) - shared for start in starts) + max(map(len, readings))
        for part in chunks(len(rows), self._bytes(shared, width, width), self._memory):
            ids = [[*starts[i][shared:], *middle] for i, middle in rows[part]]
            first = min(len(starts[i]) - shared - 1 for i, _ in rows[part])  # before it no row is read
            for (i, middle), row, told in zip(rows[part], ids, self._after(ids, first, past), strict=True):
                # what follows the prompt, and what follows each token of the middle
                asked = told[len(row) - len(middle) - 1 - first : len(row) - first].float().log_softmax(-1)
                for j in readings[middle]:
                    found[i][j] = sum(float(asked[at, token]) for at, token in enumerate(ends[j]))
        read = sum(map(len, ends))
        return [Scored(tuple(row), len(start) + read) for row, start in zip(found, starts, strict=True)]

    def _bytes(self, read: float, own: int, places: int) -> float:
        """Of a row: keys and values of every layer (twice while they grow), logits, and what a layer works on."""
        config = self.model.config
        heads = config.num_attention_heads
        ratio = (getattr(config, "num_key_value_heads", None) or heads) / heads
        kept = 2 * config.num_hidden_layers * config.hidden_size * ratio * (read + own)
        return 4.0 * (2 * kept + places * config.vocab_size + 16 * places * config.hidden_size)

    def _after(self, rows: list[list[int]], first: int, past: "Text | None") -> Tensor:
        """Logits of every next token from place ``first`` on, (rows, places, vocabulary); ``past`` serves all rows."""
        from theodolite.language.branches import Branches, last_places

        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.model.device)
        if past is not None:
            return Branches(self.model, [(past, len(rows))], width).step(ids, width - first)
        logits = self.model(ids, use_cache=False, **last_places(self.model, width - first)).logits
        return logits[:, first - width :]

    @torch.no_grad()
    def _tokens(self, text: str) -> tuple[list[Token], int]:
        ids = self._ids(text, special=False)
        if not ids:
            raise InputError(f"the text has no tokens for {self.name}")
        self._fits(len(ids), "the text")
        logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, :-1].float()
        after = torch.tensor(ids[1:], device=logits.device)
        told = -nn.functional.cross_entropy(logits, after, reduction="none") if len(ids) > 1 else []
        return _with_places(self.tokenizer, ids, [None, *map(float, told)]), len(ids)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    named = model.generation_config.eos_token_id
    several = named if isinstance(named, (list, tuple)) else [named]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _with_places(tokenizer: Any, ids: Sequence[int], logprobs: Sequence[float | None]) -> list[Token]:
    """Tokens whose texts put together are the whole text: each is what it adds to what is decoded before it.

    A character of several tokens appears with the last of them; the others are "" there.
    """
    tokens, text = [], ""
    for at, logprob in enumerate(logprobs, 1):
        now = tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if at < len(ids) and now.endswith("\ufffd"):
            now = text  # the first bytes of a character
        tokens.append(Token(now[len(text) :], logprob, len(text)))
        text = now
    return tokens
