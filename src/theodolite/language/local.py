"""A Hugging Face decoder in this process, with the same interface as an endpoint."""

__all__ = ["LocalModel"]

import copy
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunks
from theodolite.language.model import AnswerCache, Completion, LanguageModel, Token
from theodolite.language.pretrained import load_decoder


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
        return {"local": self.name}

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
        generator = torch.Generator().manual_seed(request["seed"])
        count = request["n"]
        out = self.model(torch.tensor([ids]), use_cache=True)
        logits, past = out.logits[:, -1], _cache_of(out)
        if count > 1:
            past.batch_repeat_interleave(count)
            logits = logits.expand(count, -1)
        ends = _end_tokens(self.model, self.tokenizer)
        rows: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        finish = ["length"] * count
        for _ in range(request["max_tokens"]):
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

    def _score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        return self._score_table([prompt], continuations)[0]

    @torch.no_grad()
    def _score_table(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[float]]:
        """One forward pass for what all prompts begin with, one row for each prompt with all of a continuation but its last
        token; continuations of one token share the row of their prompt.
        """
        starts = [self._ids(prompt, special=True) for prompt in prompts]
        if not all(starts):
            raise InputError(f"a prompt has no tokens for {self.name}; give at least one word")
        ends = [self._ids(text, special=False) for text in continuations]
        columns = zip(*(start[:-1] for start in starts), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        past = None
        if shared:
            past = _cache_of(self.model(torch.tensor([starts[0][:shared]]), use_cache=True))
        readings: dict[tuple[int, ...], list[int]] = {}
        for j, end in enumerate(ends):
            readings.setdefault(tuple(end[:-1]), []).append(j)
        rows = [(i, middle) for i in range(len(starts)) for middle in readings]
        rows.sort(key=lambda row: len(starts[row[0]]) + len(row[1]))  # rows of one length together: little is padded
        found = [[0.0] * len(ends) for _ in starts]
        width = max(len(start) - shared for start in starts) + max(map(len, readings))
        cost = 4.0 * width * self.model.config.vocab_size + 8.0 * (shared + width) * self.model.config.hidden_size
        for part in chunks(len(rows), cost, self._memory):
            ids = [[*starts[i][shared:], *middle] for i, middle in rows[part]]
            for (i, middle), row, told in zip(rows[part], ids, self._after(ids, shared, past), strict=True):
                # what follows the prompt, and what follows each token of the middle
                asked = told[len(row) - len(middle) - 1 : len(row)].float().log_softmax(-1)
                for j in readings[middle]:
                    found[i][j] = sum(float(asked[at, token]) for at, token in enumerate(ends[j]))
        return found

    def _after(self, rows: list[list[int]], shared: int, past: Any) -> Tensor:
        """Logits of every next token, (rows, longest row, vocabulary); the keys and values of ``past`` serve all rows."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        there = torch.tensor([[1] * (shared + len(row)) + [0] * (width - len(row)) for row in rows])
        more = {}
        if past is not None:
            kept = copy.deepcopy(past)
            kept.batch_repeat_interleave(len(rows))
            more = _with_cache(self.model, kept)
        return self.model(ids, attention_mask=there, use_cache=past is not None, **more).logits

    @torch.no_grad()
    def _tokens(self, text: str) -> list[Token]:
        ids = self._ids(text, special=False)
        if not ids:
            raise InputError(f"the text has no tokens for {self.name}")
        logits = self.model(torch.tensor([ids])).logits[0, :-1].float()
        told = -nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none") if len(ids) > 1 else []
        return _with_places(self.tokenizer, ids, [None, *map(float, told)])


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
