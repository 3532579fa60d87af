"""What every language model offers, wherever it runs: chat, continuations, scores, and an account of what was asked.

    chat(messages)                  an answer to a conversation
    generate(prompt, n)             n continuations of a text
    score(prompt, continuations)    log p(continuation | prompt), the sum over the continuation's tokens
    score_many(prompts, ...)        the same for many prompts; what they all begin with is run once
    token_logprobs(text)            log p of each token of a text given those before it, with its place

`theodolite.language.connect` gives one: an endpoint that speaks the OpenAI protocol, or a local Hugging Face model. Answers
are kept on disk under everything that they depend on, so that a run that is repeated or continued asks nothing twice.
"""

__all__ = [
    "AnswerCache",
    "Completion",
    "EndpointError",
    "EndpointUnavailable",
    "LanguageModel",
    "LogprobsUnavailable",
    "Message",
    "Scored",
    "ScoringUnavailable",
    "Token",
    "Usage",
    "default_cache",
]

import hashlib
import json
import os
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.core.errors import InputError, TheodoliteError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


class EndpointError(TheodoliteError):
    """An endpoint refused a request (wrong key, wrong model, wrong request); asking again would not help.

    status: of HTTP, None where there is none.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class EndpointUnavailable(EndpointError):
    """An endpoint did not answer, or not with what the protocol says, however often it was asked within the bound."""


class ScoringUnavailable(EndpointError):
    """This model cannot tell the probability of a text that is given to it."""


class LogprobsUnavailable(ScoringUnavailable):
    """Log-probabilities were asked for, accepted, and not given."""


@dataclass(frozen=True)
class Token:
    """One token. logprob: natural logarithm, None for the first token of a text. start: where it begins in the text."""

    text: str
    logprob: float | None
    start: int


@dataclass(frozen=True)
class Completion:
    """One answer. tokens: with log-probabilities where they were asked for. finish: "stop", or "length" where it was cut."""

    text: str
    tokens: tuple[Token, ...] | None = None
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Scored:
    """Continuations of one prompt. logprobs: log p of each. tokens: of the prompt and of the continuations, as they were read
    (of an endpoint that reads the prompt again for each continuation: every time).
    """

    logprobs: tuple[float, ...]
    tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Usage:
    """Counts since the model was connected; answers that came from the cache count as cached, and their tokens not again.

    calls: questions that were asked. retries, malformed: requests more than that, after failures that may pass and after
    answers that are not what the protocol says. prompt_tokens: read, in scoring with the continuations; completion_tokens:
    written.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    malformed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AnswerCache:
    """Answers as JSON text in one SQLite file: nothing that is read from it can run code.

    A file that is damaged or in use elsewhere for long is an error of SQLite's; delete the file to start over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @staticmethod
    def key(request: Mapping[str, Any]) -> str:
        """SHA-256 of everything that an answer depends on."""
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """The stored answer, None where there is none."""
        with self._lock:
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> None:
        """Store an answer whole."""
        text = json.dumps(answer, ensure_ascii=False)
        with self._lock:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))


def default_cache() -> Path:
    """Where answers are kept unless told otherwise: language.sqlite in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "theodolite" / "language.sqlite"


class LanguageModel(ABC):
    """Base of the models. name: of the model. usage: what was asked of it so far.

    A model can be pickled, as a fitted estimator that asks it is; what it holds of this process is made anew.
    """

    name: str
    _unsaved: frozenset[str] = frozenset({"_counting"})

    def __init__(self, name: str, *, cache: AnswerCache | None = None, concurrency: int = 8) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, got {concurrency}")
        self.name, self._cache, self._concurrency = name, cache, concurrency
        self._usage, self._counting = Usage(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._unsaved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._counting = threading.Lock()

    @property
    def usage(self) -> Usage:
        """Counts since the model was connected."""
        return self._usage

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What tells this model from every other: part of every cache key."""

    @abstractmethod
    def _chat(self, request: dict[str, Any]) -> Completion:
        """One answer, without the cache."""

    @abstractmethod
    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        """Continuations, without the cache."""

    @abstractmethod
    def _score(self, prompts: Sequence[str], continuations: Sequence[str]) -> Iterable[Scored]:
        """Continuations of each prompt, in their order, without the cache; each is kept as soon as it is given."""

    @abstractmethod
    def _tokens(self, text: str) -> tuple[list[Token], int]:
        """Tokens of a text with log-probabilities, and how many tokens were read for it, without the cache."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int = 0,
        logprobs: bool = False,
        top_logprobs: int = 0,
        stop: Sequence[str] = (),
    ) -> Completion:
        """The answer to a conversation. logprobs: with the tokens' log-probabilities, or LogprobsUnavailable.

        Raises InputError for messages of another form, EndpointError and EndpointUnavailable.
        """
        for message in messages:
            if set(message) != {"role", "content"} or not isinstance(message["content"], str):
                raise InputError(f'a message is {{"role": ..., "content": text}}, got {dict(message)!r}')
        if not messages:
            raise InputError("a conversation needs at least one message")
        request = _sampling(temperature, max_tokens, seed, stop) | {
            "messages": [dict(message) for message in messages],
            "logprobs": logprobs or top_logprobs > 0,
            "top_logprobs": top_logprobs,
        }
        return self._remembered("chat", request, lambda: [self._chat(request)])[0]

    def chat_many(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[Completion]:
        """`chat` for several conversations, as many at a time as the model was connected for, in their order."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(lambda messages: self.chat(messages, **options), conversations))

    def generate(
        self,
        prompt: str,
        n: int = 1,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
    ) -> list[Completion]:
        """n continuations of ``prompt`` (of an endpoint: answers to it), cut before the first of ``stop``."""
        return self.generate_many(
            [prompt],
            n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )[0]

    def generate_many(self, prompts: Sequence[str], n: int = 1, **options: Any) -> list[list[Completion]]:
        """`generate` with its options for several prompts, in their order: an endpoint is asked for as many at a time as it
        was connected for, a local model writes all at the same time as far as its memory allows.
        """
        requests = [_continuation(prompt, n, **options) for prompt in prompts]
        keys = [self._key("generate", request) for request in requests]
        found: dict[str, list[Completion]] = {}
        for key in dict.fromkeys(keys):
            if (kept := self._kept(key)) is not None:
                found[key] = [_completion(row) for row in kept]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        if missing:
            for key, made in zip(missing, self._generate_each(list(missing.values())), strict=True):
                self._keep_completions(key, made)
                found[key] = made
        return [found[key] for key in keys]

    def _generate_each(self, requests: Sequence[dict[str, Any]]) -> Iterator[list[Completion]]:
        """Continuations of each prompt, in their order, without the cache; the requests differ in the prompt alone."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            yield from pool.map(self._generate, requests)

    def score(self, prompt: str, continuations: Sequence[str]) -> np.ndarray:
        """log p(continuation | prompt) for each, (n,) float64: the sum over all tokens of the continuation.

        The prompt and each continuation are made into tokens on their own, so that a continuation has the same tokens after
        every prompt; give the space between them to the continuation. Raises ScoringUnavailable where the model cannot tell.
        """
        return self.score_table([prompt], continuations)[0]

    def score_table(self, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray:
        """log p(continuation | prompt), (prompts, continuations) float64: each row is what `score` gives."""
        return np.array([one.logprobs for one in self.score_many(prompts, continuations)], dtype=np.float64)

    def score_many(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Scored]:
        """`score` for several prompts, in their order, with the tokens of each.

        A local model runs what all prompts begin with once, and the prompts in batches; an endpoint is asked for several at
        a time. Answers are kept by prompt, so that a table that is made again or grows asks for the new rows only.
        """
        if isinstance(continuations, str) or not continuations or not all(continuations):
            raise InputError("need at least one continuation, and none of them empty")
        if isinstance(prompts, str) or not prompts:
            raise InputError("need at least one prompt, in a list")
        wanted = list(continuations)
        keys = [self._key("scored", {"prompt": prompt, "continuations": wanted}) for prompt in prompts]
        found: dict[str, Scored] = {}
        for key in dict.fromkeys(keys):
            if (kept := self._kept(key)) is not None:
                found[key] = Scored(tuple(kept["logprobs"]), kept["tokens"], cached=True)
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        if missing:
            for key, made in zip(missing, self._score(list(missing.values()), wanted), strict=True):
                self._keep(key, {"logprobs": made.logprobs, "tokens": made.tokens})
                self._count(prompt_tokens=made.tokens)
                found[key] = made
        return [found[key] for key in keys]

    def token_logprobs(self, text: str) -> tuple[Token, ...]:
        """The tokens of ``text`` with log p of each given those before it (None for the first)."""
        if not text:
            raise InputError("an empty text has no tokens")

        def ask() -> list[dict[str, Any]]:
            tokens, read = self._tokens(text)
            self._count(prompt_tokens=read)
            return [asdict(token) for token in tokens]

        return tuple(Token(**row) for row in self._remembered("tokens", {"text": text}, ask, plain=True))

    def _key(self, kind: str, request: dict[str, Any]) -> str:
        return AnswerCache.key({"kind": kind, "model": self._identity(), "request": request})

    def _kept(self, key: str) -> Any | None:
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is not None:
            self._count(cached=1)
        return kept

    def _keep(self, key: str, answer: Any) -> None:
        self._count(calls=1)
        if self._cache is not None:
            self._cache.put(key, answer)

    def _remembered(self, kind: str, request: dict[str, Any], ask: Any, *, plain: bool = False) -> Any:
        key = self._key(kind, request)
        kept = self._kept(key)
        if kept is not None:
            return kept if plain else [_completion(row) for row in kept]
        made = ask()
        if plain:
            self._keep(key, made)
        else:
            self._keep_completions(key, made)
        return made

    def _keep_completions(self, key: str, made: Sequence[Completion]) -> None:
        self._keep(key, [asdict(one) for one in made])
        self._count(
            prompt_tokens=sum(one.prompt_tokens for one in made),
            completion_tokens=sum(one.completion_tokens for one in made),
        )

    def _count(self, **more: int) -> None:
        with self._counting:
            self._usage = replace(self._usage, **{name: getattr(self._usage, name) + n for name, n in more.items()})


def _sampling(temperature: float, max_tokens: int, seed: int, stop: Sequence[str]) -> dict[str, Any]:
    if temperature < 0 or max_tokens < 1:
        raise InputError(f"need temperature >= 0 and max_tokens >= 1, got {temperature} and {max_tokens}")
    if isinstance(stop, str) or not all(stop):
        raise InputError(f"stop is a sequence of texts, none of them empty; got {stop!r}")
    return {"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "stop": list(stop)}


def _continuation(
    prompt: str,
    n: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: bool = False,
) -> dict[str, Any]:
    if n < 1 or not 0 < top_p <= 1:
        raise InputError(f"need n >= 1 and 0 < top_p <= 1, got {n} and {top_p}")
    return _sampling(temperature, max_tokens, seed, stop) | {
        "prompt": prompt, "n": n, "top_p": top_p, "logprobs": logprobs,
    }  # fmt: skip


def _completion(row: dict[str, Any]) -> Completion:
    tokens = None if row["tokens"] is None else tuple(Token(**token) for token in row["tokens"])
    return Completion(**(row | {"tokens": tokens, "cached": True}))
