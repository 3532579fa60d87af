"""Any endpoint that speaks the OpenAI protocol, through the `openai` client, with its failures told apart and counted."""

__all__ = ["Endpoint"]

import json
import math
import os
import threading
import warnings
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from theodolite.core.errors import InputError, require
from theodolite.language.model import (
    AnswerCache,
    Completion,
    EndpointError,
    EndpointUnavailable,
    LanguageModel,
    LogprobsUnavailable,
    Scored,
    ScoringUnavailable,
    Token,
)

_MALFORMED = 2  # times that an answer which is not what the protocol says is asked for again
_REFUSED = (400, 422)  # statuses by which servers say that they do not take a parameter
_MAY_BE_LEFT_OUT = ("seed", "temperature", "top_p", "stop")
_TOPS = (20, 5)  # likeliest first tokens of an answer: the most that the protocol gives, and what many servers give


class Endpoint(LanguageModel):
    """url: up to and with ``/v1``. model: as the endpoint names it. api_key_env: the environment variable with the key.

    timeout: seconds without a byte of the answer, after which a request counts as failed. retries: of a request that timed
    out, was refused for its rate (429) or failed on the server (5xx); between them it waits as long as the endpoint says, up to
    two minutes, or half a second, doubled each time. concurrency: requests at a time, of all threads together. The key is read
    when the endpoint is connected to (anew where it is unpickled), and is in no text, log or file.

    Endpoints differ in what they take. One that refuses ``max_tokens`` is sent ``max_completion_tokens``; one that refuses a
    seed, a temperature or top_p is asked without it, with a warning once that answers follow the endpoint's own; stop texts that
    it refuses are cut off here. A score comes from ``completions`` with echo where the endpoint has that, for every text; else
    from the likeliest first tokens of a chat answer (20, or 5), for continuations of one token.

    Raises InputError for an address that is none.
    """

    _unsaved = LanguageModel._unsaved | {"_openai", "_client", "_key_given", "_at_once"}

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        cache: AnswerCache | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
    ) -> None:
        super().__init__(model, cache=cache, concurrency=concurrency)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"an endpoint is an address such as http://localhost:8000/v1, got {url!r}")
        if not model:
            raise InputError("an endpoint needs the name of a model")
        if timeout <= 0 or retries < 0:
            raise InputError(f"need timeout > 0 and retries >= 0, got {timeout} and {retries}")
        self.url = url.rstrip("/")
        self._options = {"timeout": timeout, "max_retries": retries}
        self._key_env = api_key_env
        self._connect()
        self._left_out: frozenset[str] = frozenset()
        self._renamed = False
        self._no_echo: ScoringUnavailable | None = None
        self._tops: Sequence[int] = _TOPS

    def _connect(self) -> None:
        self._openai = require("openai", "language")
        self._key_given = (os.environ.get(self._key_env) or "").strip()
        if not self._key_given.isascii() or any(c.isspace() for c in self._key_given):
            raise InputError(f"the key in {self._key_env} has characters that no key has; set it anew")
        # servers on one's own machine ask for no key, but the client wants one
        self._client = self._openai.OpenAI(base_url=self.url, api_key=self._key_given or "none", **self._options)
        self._at_once = threading.BoundedSemaphore(self._concurrency)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._connect()

    def __del__(self) -> None:
        """Close the connections that are kept open between requests."""
        client = getattr(self, "_client", None)  # not there where an argument was wrong
        if client is not None:
            client.close()

    def _identity(self) -> dict[str, Any]:
        return {"endpoint": self.url, "model": self.name}

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.name!r})"

    def _ask(self, what: str, create: Any, read: Any, **body: Any) -> Any:
        """One request; ``read`` takes the answer's JSON, and what it cannot read is asked for again, within a bound."""
        problem, malformed = "", 0
        while malformed <= _MALFORMED:
            sent = self._taken(body)
            try:
                with self._at_once:
                    raw = create(model=self.name, **sent)
            except self._openai.APIStatusError as error:
                if error.status_code in _REFUSED and self._does_without(error, sent):
                    continue
                kind = EndpointUnavailable if error.status_code == 429 or error.status_code >= 500 else EndpointError
                bare = error.status_code == 404 and not urlsplit(self.url).path
                raise kind(
                    f"{self.url} refused {what} with status {error.status_code}: {self._said(error)}"
                    + ("; its address may have to end with /v1" if bare else ""),
                    error.status_code,
                ) from None
            except self._openai.APIConnectionError as error:
                because, tries = error.__cause__ or error, 1 + self._client.max_retries
                raise EndpointUnavailable(
                    f"{self.url} did not answer {what} in {tries} tries ({type(because).__name__}: {self._hidden(because)})"
                ) from None
            self._count(retries=raw.retries_taken)
            try:
                answer = json.loads(raw.content)
                if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
                    raise ValueError(f"an error with status 200, {answer['error']}")
                return read(answer)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                problem, malformed = self._hidden(f"{type(error).__name__}: {error}"), malformed + 1
                self._count(malformed=1)
        raise EndpointUnavailable(
            f"{self.url} answered {what} {1 + _MALFORMED} times with something other than the protocol says ({problem})"
        )

    def _taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as this endpoint takes it."""
        sent = {name: value for name, value in body.items() if name not in self._left_out}
        if self._renamed and "max_tokens" in sent and "messages" in sent:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        return sent

    def _does_without(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether a refusal was for a parameter that was sent and that can be left out or renamed; then it is, from now on."""
        said = f"{error.message} {error.body or ''}"
        if "max_tokens" in sent and "messages" in sent and "max_completion_tokens" in said:
            self._renamed = True
            return True
        # a refusal that repeats the whole request names several, and is for none of them
        named = [error.param] if error.param else [one for one in _MAY_BE_LEFT_OUT if _names(said, one)]
        name = named[0] if len(named) == 1 else ""
        if name not in _MAY_BE_LEFT_OUT or name not in sent:
            return False
        with self._counting:
            first = name not in self._left_out
            self._left_out |= {name}
        if first and name != "stop":  # stop texts are cut off here
            warnings.warn(
                f"{self.url} does not take {name} for {self.name}, so it is asked without: answers follow the endpoint's own"
                + (" and may differ from run to run" if name != "top_p" else ""),
                stacklevel=2,
            )
        return True

    def _said(self, error: Any) -> str:
        body = error.body
        text = body.get("message", body) if isinstance(body, Mapping) else body or error.message
        return self._hidden(text)

    def _hidden(self, text: Any) -> str:
        """The text without the key, which some servers repeat."""
        shown = str(text)
        return (shown.replace(self._key_given, "(key)") if self._key_given else shown)[:300]

    def _chat(self, request: dict[str, Any]) -> Completion:
        body = {name: request[name] for name in ("messages", "temperature", "max_tokens", "seed")}
        if request["stop"]:
            body["stop"] = request["stop"]
        if request.get("top_p", 1.0) < 1:
            body["top_p"] = request["top_p"]
        if request["logprobs"]:
            body |= {"logprobs": True} | ({"top_logprobs": request["top_logprobs"]} if request["top_logprobs"] else {})
        made = self._asked_to_chat(_read_chat, body)
        if request["logprobs"] and made.text and not made.tokens:
            raise self._gave_none()
        return _cut(made, request["stop"])

    def _asked_to_chat(self, read: Any, body: dict[str, Any]) -> Any:
        try:
            return self._ask("a chat", self._client.chat.completions.with_raw_response.create, read, **body)
        except EndpointUnavailable:
            raise
        except EndpointError as error:
            if "logprobs" in body and "logprob" in str(error):
                raise LogprobsUnavailable(f"{self.name} tells no log-probabilities: {error}") from None
            raise

    def _gave_none(self) -> LogprobsUnavailable:
        return LogprobsUnavailable(
            f"{self.url} took a request for log-probabilities and gave none; {self.name} cannot be used where they are needed"
        )

    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        asked = {"messages": [{"role": "user", "content": request["prompt"]}], "top_logprobs": 0} | {
            name: request[name] for name in ("temperature", "max_tokens", "stop", "logprobs", "top_p")
        }
        # one request a continuation: many endpoints ignore the protocol's own n
        each = [asked | {"seed": request["seed"] + i} for i in range(request["n"])]
        if len(each) == 1:
            return [self._chat(each[0])]
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self._chat, each))

    def _score(self, prompts: Sequence[str], continuations: Sequence[str]) -> Iterator[Scored]:
        if len(prompts) == 1:
            yield self._scored(prompts[0], continuations)
            return
        with ThreadPoolExecutor(self._concurrency) as pool:
            yield from pool.map(lambda prompt: self._scored(prompt, continuations), prompts)

    def _scored(self, prompt: str, continuations: Sequence[str]) -> Scored:
        if self._no_echo is None:
            try:
                return self._scored_by_echo(prompt, continuations)
            except _NoEcho as error:
                self._no_echo = error.reason
        try:
            return self._scored_by_first_token(prompt, continuations)
        except EndpointError as error:
            if isinstance(error, EndpointUnavailable) or error.status == 401:
                raise
            kind = type(self._no_echo)
            raise kind(f"{self._no_echo}. Nor by the first token of an answer: {error}") from None

    def _scored_by_echo(self, prompt: str, continuations: Sequence[str]) -> Scored:
        found, read = [], 0
        for text in continuations:
            tokens, used = self._echoed(prompt + text)
            read += used
            inside = [token for token in tokens if token.start >= len(prompt)]
            if not inside or inside[0].start != len(prompt):
                raise ScoringUnavailable(
                    f"no token of {self.name} begins where the continuation {text!r} does; begin it with a space or a new line"
                )
            found.append(sum(token.logprob for token in inside if token.logprob is not None))
        return Scored(tuple(found), read)

    def _scored_by_first_token(self, prompt: str, continuations: Sequence[str]) -> Scored:
        """log p that the answer to the prompt begins with the token of each continuation, without the space before it.

        What is not among the likeliest tokens has the probability of the least of them, which is the most that it can be.
        """
        told, used = self._first_tokens(prompt)
        if not told:
            raise self._gave_none()
        said = [(piece.strip(), logprob) for piece, logprob in told]
        least, found, seen = min(logprob for _, logprob in said), [], False
        for text in (one.strip() for one in continuations):
            same = [logprob for piece, logprob in said if piece == text]
            if not same and any(piece and text.startswith(piece) for piece, _ in said):
                raise ScoringUnavailable(f"{text!r} is more than one token of {self.name}; take words of one token")
            seen |= bool(same)
            found.append(float(np.logaddexp.reduce(same)) if same else least)  # " yes" and "yes" are one answer
        if not seen:
            shown = ", ".join(repr(piece) for piece, _ in said[:5])
            raise ScoringUnavailable(
                f"none of the continuations is among the likeliest tokens of {self.name} ({shown})"
            )
        return Scored(tuple(found), used)

    def _first_tokens(self, prompt: str) -> tuple[list[tuple[str, float]], int]:
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 1, "logprobs": True}
        for top in self._tops:
            try:
                return self._asked_to_chat(_read_first, body | {"top_logprobs": top})
            except LogprobsUnavailable as error:
                if top == self._tops[-1] or "top_logprobs" not in str(error):
                    raise
                self._tops = self._tops[1:]
        raise self._gave_none()

    def _tokens(self, text: str) -> tuple[list[Token], int]:
        try:
            return self._echoed(text)
        except _NoEcho as error:
            raise error.reason from None

    def _echoed(self, text: str) -> tuple[list[Token], int]:
        create = self._client.completions.with_raw_response.create
        try:
            tokens, used = self._ask(
                "log-probabilities of a given text", create, lambda answer: _read_echo(answer, text),
                prompt=text, max_tokens=1, echo=True, logprobs=0, temperature=0,
            )  # fmt: skip
        except EndpointUnavailable:
            raise
        except EndpointError as error:
            if error.status == 401:
                raise
            raise _NoEcho(
                ScoringUnavailable(
                    f"{self.url} tells no log-probabilities of a text that is given (completions with echo and logprobs): {error}"
                )
            ) from None
        if not tokens:
            raise _NoEcho(self._gave_none())
        return tokens, used


class _NoEcho(Exception):
    """The endpoint does not have completions with echo; ``reason`` is what a caller is told."""

    def __init__(self, reason: ScoringUnavailable) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _names(said: str, parameter: str) -> bool:
    """Whether a refusal names the parameter in one of the ways that servers have: in quotes, or as what is unsupported."""
    quoted = any(f"{mark}{parameter}{mark}" in said for mark in "'\"`")
    return quoted or f"{parameter} is not supported" in said or f"unsupported parameter: {parameter}" in said.lower()


def _cut(made: Completion, stop: Sequence[str]) -> Completion:
    """Without what stands after a stop text, where the endpoint did not stop there."""
    at = min((made.text.find(one) for one in stop if one in made.text), default=-1)
    if at < 0:
        return made
    tokens = None if made.tokens is None else tuple(token for token in made.tokens if token.start < at)
    return Completion(made.text[:at], tokens, "stop", made.prompt_tokens, made.completion_tokens)


def _used(answer: Any, which: str) -> int:
    return int((answer.get("usage") or {}).get(which) or 0)


def _number(logprob: Any) -> float:
    """A log-probability; ValueError, as of an answer that is none, where it is not a number."""
    value = float(logprob)
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return value


def _read_chat(answer: Any) -> Completion:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if isinstance(text, list):  # parts, of which models that think aloud give several
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise TypeError("the content of the message is not text")
    rows = (choice.get("logprobs") or {}).get("content") or []
    # a character may be split over tokens, whose texts then are no text: their bytes are, and it belongs to the last of them
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    tokens, start = [], 0
    for row in rows:
        piece = row["token"] if row.get("bytes") is None else decoder.decode(bytes(row["bytes"]))
        tokens.append(Token(piece, _number(row["logprob"]), start))
        start += len(piece)
    return Completion(
        text, tuple(tokens) if tokens else None, choice.get("finish_reason") or "stop",
        _used(answer, "prompt_tokens"), _used(answer, "completion_tokens"),
    )  # fmt: skip


def _read_first(answer: Any) -> tuple[list[tuple[str, float]], int]:
    """The likeliest first tokens with their log-probabilities, and the tokens that were read."""
    rows = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    told = [(str(one["token"]), _number(one["logprob"])) for one in (rows[0].get("top_logprobs") or [])] if rows else []
    return told, _used(answer, "prompt_tokens")


def _read_echo(answer: Any, text: str) -> tuple[list[Token], int]:
    """Tokens of the prompt, which an echo puts before the one token that has to be made, and how many were read; none where
    the endpoint took the request and did not echo.
    """
    choice = answer["choices"][0]
    told, used = choice.get("logprobs") or {}, _used(answer, "prompt_tokens")
    pieces, numbers = [str(one) for one in told.get("tokens") or []], told.get("token_logprobs") or []
    places = told.get("text_offset") or []
    if not numbers or not str(choice["text"]).startswith(text):
        return [], used
    if len(pieces) != len(numbers):
        raise ValueError("tokens and log-probabilities are not of one length")
    special = next((k for k in range(min(3, len(pieces))) if "".join(pieces[k:]).startswith(text)), None)
    if special is not None:  # after tokens that begin every text and are not of it, which some servers tell too
        pieces, numbers = pieces[special:], numbers[special:]
        places = [0, *accumulate(map(len, pieces))][:-1]
    elif len(places) != len(pieces) or places[0] != 0 or sorted(places) != list(places):
        raise ValueError("the tokens put together are not the text")
    rows = [(int(place), number) for place, number in zip(places, numbers, strict=True) if int(place) < len(text)]
    ends = [*(place for place, _ in rows[1:]), len(text)]
    return [
        Token(text[place:end], None if number is None else _number(number), place)
        for (place, number), end in zip(rows, ends, strict=True)
    ], used
