"""Any endpoint that speaks the OpenAI protocol, through the `openai` client, with its failures told apart and counted."""

__all__ = ["Endpoint"]

import json
import os
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from theodolite.core.errors import InputError, require
from theodolite.language.model import (
    AnswerCache,
    Completion,
    EndpointError,
    EndpointUnavailable,
    LanguageModel,
    LogprobsUnavailable,
    ScoringUnavailable,
    Token,
)

_MALFORMED = 2  # times that an answer which is not what the protocol says is asked for again


class Endpoint(LanguageModel):
    """url: up to and with ``/v1``. model: as the endpoint names it. api_key_env: the environment variable with the key.

    timeout: seconds of one request. retries: of a request that timed out, was refused for its rate (429, waiting as long as
    the endpoint says) or failed on the server (5xx). The key is read when a request is made, and is in no text, log or file.

    Raises InputError for an address that is none.
    """

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
        self._openai = require("openai", "language")
        # servers on one's own machine ask for no key, but the client wants one
        key = os.environ.get(api_key_env) or "none"
        self._client = self._openai.OpenAI(base_url=self.url, api_key=key, timeout=timeout, max_retries=retries)

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
        problem = ""
        for _ in range(1 + _MALFORMED):
            try:
                raw = create(model=self.name, **body)
            except self._openai.APIStatusError as error:
                kind = EndpointUnavailable if error.status_code == 429 or error.status_code >= 500 else EndpointError
                raise kind(f"{self.url} refused {what} with status {error.status_code}: {self._said(error)}") from None
            except self._openai.APIConnectionError as error:
                because, tries = error.__cause__ or error, 1 + self._client.max_retries
                raise EndpointUnavailable(
                    f"{self.url} did not answer {what} in {tries} tries ({type(because).__name__}: {because})"
                ) from None
            self._count(retries=raw.retries_taken)
            try:
                return read(json.loads(raw.content))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
                self._count(malformed=1)
        raise EndpointUnavailable(
            f"{self.url} answered {what} {1 + _MALFORMED} times with something other than the protocol says ({problem})"
        )

    def _said(self, error: Any) -> str:
        body = error.body
        text = body.get("message", body) if isinstance(body, Mapping) else body or error.message
        return str(text)[:300].replace(self._client.api_key, "(key)")  # some servers repeat it

    def _chat(self, request: dict[str, Any]) -> Completion:
        body = {key: request[key] for key in ("messages", "temperature", "max_tokens", "seed")}
        if request["stop"]:
            body["stop"] = request["stop"]
        if request["logprobs"]:
            body |= {"logprobs": True} | ({"top_logprobs": request["top_logprobs"]} if request["top_logprobs"] else {})
        create = self._client.chat.completions.with_raw_response.create
        made = self._ask("a chat", create, _read_chat, **body)
        if request["logprobs"] and made.text and not made.tokens:
            raise LogprobsUnavailable(
                f"{self.url} took a request for log-probabilities and gave none; {self.name} cannot be used where they are needed"
            )
        return made

    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        asked = {"messages": [{"role": "user", "content": request["prompt"]}], "top_logprobs": 0} | {
            key: request[key] for key in ("temperature", "max_tokens", "stop", "logprobs")
        }
        # one request a continuation: many endpoints ignore the protocol's own n
        return [self._chat(asked | {"seed": request["seed"] + i}) for i in range(request["n"])]

    def _score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        found = []
        for text in continuations:
            tokens = self._tokens(prompt + text)
            inside = [token for token in tokens if token.start >= len(prompt)]
            if not inside or inside[0].start != len(prompt):
                raise ScoringUnavailable(
                    f"no token of {self.name} begins where the continuation {text!r} does; begin it with a space or a new line"
                )
            found.append(sum(token.logprob for token in inside if token.logprob is not None))
        return found

    def _tokens(self, text: str) -> list[Token]:
        create = self._client.completions.with_raw_response.create
        try:
            tokens = self._ask(
                "log-probabilities of a given text", create, lambda answer: _read_echo(answer, text),
                prompt=text, max_tokens=1, echo=True, logprobs=0, temperature=0,
            )  # fmt: skip
        except EndpointUnavailable:
            raise
        except EndpointError as error:
            raise ScoringUnavailable(
                f"{self.url} tells no log-probabilities of a text that is given (completions with echo and logprobs): {error}"
            ) from None
        if not tokens:
            raise LogprobsUnavailable(
                f"{self.url} took a request for log-probabilities and gave none; {self.name} cannot be used where they are needed"
            )
        return tokens


def _read_chat(answer: Any) -> Completion:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
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
        tokens.append(Token(piece, float(row["logprob"]), start))
        start += len(piece)
    usage = answer.get("usage") or {}
    return Completion(
        text, tuple(tokens) if tokens else None, choice.get("finish_reason") or "stop",
        int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)),
    )  # fmt: skip


def _read_echo(answer: Any, text: str) -> list[Token]:
    """Tokens of the prompt, which an echo puts before the one token that has to be made."""
    told = answer["choices"][0].get("logprobs") or {}
    pieces, numbers = told.get("tokens") or [], told.get("token_logprobs") or []
    places = told.get("text_offset") or []
    if not numbers:
        return []
    if not len(pieces) == len(numbers) == len(places):
        raise ValueError("tokens, log-probabilities and offsets are not of one length")
    rows = [
        Token(str(piece), None if number is None else float(number), int(place))
        for piece, number, place in zip(pieces, numbers, places)
        if int(place) < len(text)
    ]
    if "".join(row.text for row in rows) != text:
        raise ValueError("the tokens put together are not the text")
    return rows
