"""A language model that is a function: for tests and examples. Nothing that it answers is a result about language models."""

__all__ = ["ScriptedLanguageModel"]

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from theodolite.language.model import AnswerCache, Completion, LanguageModel, Scored, ScoringUnavailable, Token


class ScriptedLanguageModel(LanguageModel):
    """Answers every prompt with ``answer(prompt)``, called once for each continuation; of a conversation the last message.

    log_probability: (prompt, continuation) -> log p, for what scores; without it scoring raises ScoringUnavailable, as an
    endpoint without log-probabilities does. Tokens are counted as words. Requests are made one after the other.

    It is a test double: it shows that what surrounds a language model works, never what a language model can do.

    >>> ScriptedLanguageModel(str.upper).generate("abc", 2)[1].text
    'ABC'
    """

    def __init__(
        self,
        answer: Callable[[str], str],
        *,
        log_probability: Callable[[str, str], float] | None = None,
        cache: AnswerCache | None = None,
    ) -> None:
        super().__init__("scripted", cache=cache, concurrency=1)
        self._answer, self._log_probability = answer, log_probability

    def _identity(self) -> dict[str, Any]:
        return {"scripted": getattr(self._answer, "__qualname__", type(self._answer).__name__)}

    def _made(self, prompt: str, request: dict[str, Any]) -> Completion:
        text = self._answer(prompt)
        cuts = [text.find(stop) for stop in request["stop"] if stop in text]
        text = text[: min(cuts)] if cuts else text
        return Completion(text, prompt_tokens=len(prompt.split()), completion_tokens=len(text.split()))

    def _chat(self, request: dict[str, Any]) -> Completion:
        return self._made(request["messages"][-1]["content"], request)

    def _generate(self, request: dict[str, Any]) -> list[Completion]:
        return [self._made(request["prompt"], request) for _ in range(request["n"])]

    def _score(self, prompts: Sequence[str], continuations: Sequence[str]) -> Iterator[Scored]:
        if self._log_probability is None:
            raise ScoringUnavailable(
                "this scripted model was given no log_probability, so it cannot tell how likely a text is"
            )
        for prompt in prompts:
            words = len(prompt.split()) + sum(len(text.split()) for text in continuations)
            yield Scored(tuple(float(self._log_probability(prompt, text)) for text in continuations), words)

    def _tokens(self, text: str) -> tuple[list[Token], int]:
        raise ScoringUnavailable("a scripted model has no tokens")
