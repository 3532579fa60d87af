"""A Hugging Face decoder in this process, with the same interface as an endpoint."""

__all__ = ["LocalModel"]

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunks
from theodolite.language.model import AnswerCache, Completion, LanguageModel, Scored, Token
from theodolite.language.pretrained import WHEELS, load_decoder


class LocalModel(LanguageModel):
    """name: "smollm2", a Hugging Face folder or a name on the hub. The weights are loaded when they are first needed.

    memory: bytes that a batch of continuations may take; 1 GiB where None. Raises as `load_decoder`.
    """

    def __init__(self, name: str = "smollm2", *, cache: AnswerCache | None = None, memory: int | None = None) -> None:
        super().__init__(name, cache=cache, concurrency=1)
        self._memory = memory
        self._loaded: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> "LocalModel":
        """A model that is loaded already; its answers are not kept, since its weights may change."""
        made = cls(name)
        made._loaded = (model, tokenizer)
        return made

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
        return self._continue(self._ids(text, special=False), request | {"n": 1, "top_p": 1.0})[0]

    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        return self._continue(self._ids(request["prompt"], special=True), request)

    @torch.no_grad()
    def _continue(self, ids: list[int], request: dict[str, Any]) -> list[Completion]:
        if not ids:
            raise InputError(f"the prompt has no tokens for {self.name}")
        self._fits(len(ids), "the prompt")
        most = request["max_tokens"] if self.window is None else min(request["max_tokens"], self.window - len(ids))
        generator = torch.Generator().manual_seed(request["seed"])
        count = request["n"]
        out = self.model(torch.tensor([ids]), use_cache=True, **self._only(1))
        logits, past = out.logits[:, -1], _cache_of(out)
        if count > 1:
            past.batch_repeat_interleave(count)
            logits = logits.expand(count, -1)
        ends = _end_tokens(self.model, self.tokenizer)
        rows: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        finish = ["length"] * count
        for _ in range(most):
            chosen, told = _draw(logits, request["temperature"], request["top_p"], generator)
            for i in range(count):
                if finish[i] == "length":
                    if int(chosen[i]) in ends:
                        finish[i] = "stop"
                        continue
                    rows[i].append(int(chosen[i]))
                    logprobs[i].append(float(told[i]))
                    if any(stop in self.tokenizer.decode(rows[i]) for stop in request["stop"]):
                        finish[i] = "stop"
            if "length" not in finish:
                break
            out = self.model(chosen[:, None], use_cache=True, **_with_cache(self.model, past))
            logits, past = out.logits[:, -1], _cache_of(out)
        return [
            self._completion(row, told, end, request, len(ids))
            for row, told, end in zip(rows, logprobs, finish, strict=True)
        ]

    def _completion(
        self, row: list[int], told: list[float], finish: str, request: dict[str, Any], prompt: int
    ) -> Completion:
        tokens = _with_places(self.tokenizer, row, told)
        text = "".join(token.text for token in tokens)
        cuts = [text.find(stop) for stop in request["stop"] if stop in text]
        if cuts:
            text = text[: min(cuts)]
            tokens = [token for token in tokens if token.start < len(text)]
        return Completion(text, tuple(tokens) if request["logprobs"] else None, finish, prompt, len(row))

    @torch.no_grad()
    def _score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Scored]:
        """One forward pass for what all prompts begin with, one row for each prompt with all of a continuation but its last
        token; continuations of one token share the row of their prompt.
        """
        starts = [self._ids(prompt, special=True) for prompt in prompts]
        if not all(starts):
            raise InputError(f"a prompt has no tokens for {self.name}; give at least one word")
        ends = [self._ids(text, special=False) for text in continuations]
        if not all(ends):
            raise InputError(f"a continuation has no tokens for {self.name}; give at least one word")
        self._fits(max(map(len, starts)) + max(map(len, ends)) - 1, "a prompt with its continuation")
        columns = zip(*(start[:-1] for start in starts), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        past = None
        if shared:
            past = _cache_of(self.model(torch.tensor([starts[0][:shared]]), use_cache=True, **self._only(1)))
        readings: dict[tuple[int, ...], list[int]] = {}
        for j, end in enumerate(ends):
            readings.setdefault(tuple(end[:-1]), []).append(j)
        rows = [(i, middle) for i in range(len(starts)) for middle in readings]
        rows.sort(key=lambda row: len(starts[row[0]]) + len(row[1]))  # rows of one length together: little is padded
        found = [[0.0] * len(ends) for _ in starts]
        width = max(len(start) - shared for start in starts) + max(map(len, readings))
        for part in chunks(len(rows), self._bytes(shared, width), self._memory):
            ids = [[*starts[i][shared:], *middle] for i, middle in rows[part]]
            first = min(len(starts[i]) - shared - 1 for i, _ in rows[part])  # before it no row is read
            for (i, middle), row, told in zip(rows[part], ids, self._after(ids, first, shared, past), strict=True):
                # what follows the prompt, and what follows each token of the middle
                asked = told[len(row) - len(middle) - 1 - first : len(row) - first].float().log_softmax(-1)
                for j in readings[middle]:
                    found[i][j] = sum(float(asked[at, token]) for at, token in enumerate(ends[j]))
        read = sum(map(len, ends))
        return [Scored(tuple(row), len(start) + read) for row, start in zip(found, starts, strict=True)]

    def _bytes(self, shared: int, width: int) -> float:
        """Of a row: keys and values of every layer (twice while they grow), logits, and what a layer works on."""
        config = self.model.config
        heads = config.num_attention_heads
        ratio = (getattr(config, "num_key_value_heads", None) or heads) / heads
        kept = 2 * config.num_hidden_layers * config.hidden_size * ratio * (shared + width)
        return 4.0 * (2 * kept + width * config.vocab_size + 16 * width * config.hidden_size)

    def _after(self, rows: list[list[int]], first: int, shared: int, past: Any) -> Tensor:
        """Logits of every next token from place ``first`` on, (rows, places, vocabulary); ``past`` serves all rows."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        there = torch.tensor([[1] * (shared + len(row)) + [0] * (width - len(row)) for row in rows])
        more = self._only(width - first)
        if past is not None:
            kept = copy.deepcopy(past)
            kept.batch_repeat_interleave(len(rows))
            more |= _with_cache(self.model, kept)
        logits = self.model(ids, attention_mask=there, use_cache=past is not None, **more).logits
        return logits[:, first - width :]

    def _only(self, last: int) -> dict[str, Any]:
        """What spares the logits of all but the last places, where the network can."""
        return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    @torch.no_grad()
    def _tokens(self, text: str) -> tuple[list[Token], int]:
        ids = self._ids(text, special=False)
        if not ids:
            raise InputError(f"the text has no tokens for {self.name}")
        self._fits(len(ids), "the text")
        logits = self.model(torch.tensor([ids])).logits[0, :-1].float()
        told = -nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none") if len(ids) > 1 else []
        return _with_places(self.tokenizer, ids, [None, *map(float, told)]), len(ids)


def _cache_of(out: Any) -> Any:
    """Keys and values of a forward pass, under the name that this version of transformers gives them."""
    return out["cache"] if "cache" in out else out["past_key_values"]


def _with_cache(model: Any, cache: Any) -> dict[str, Any]:
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    named = model.generation_config.eos_token_id
    several = named if isinstance(named, (list, tuple)) else [named]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability under the model itself, before temperature and top_p."""
    told = logits.float().log_softmax(-1)
    if temperature == 0:
        chosen = told.argmax(-1)
    else:
        p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the smallest set of at least top_p
        chosen = order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
    return chosen, told.gather(1, chosen[:, None])[:, 0]


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
