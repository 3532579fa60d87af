"""What each node of a generated program costs: the surprise of the tokens that its own text is made of."""

__all__ = ["Generation", "TokenAlignmentError", "TokenLogprob", "check_alignment", "generate", "node_costs"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError
from theodolite.language import LanguageModel
from theodolite.language.model import LogprobsUnavailable
from theodolite.language.model import Token as TokenLogprob
from theodolite.predictions.program_sets.trees import ProgramTree

_OFFICIAL_RANGE = (0.0, 10.0)
_ROUNDING = 1e-4  # log-probabilities this far above 0 are what servers' arithmetic gives


class TokenAlignmentError(DataError):
    """Tokens put together are not the text. position: the first character that differs."""

    def __init__(self, position: int, found: str, expected: str) -> None:
        self.position = position
        super().__init__(
            f"the tokens do not give the generated text: at character {position} they have {found!r} where the text has "
            f"{expected!r}; give each token's text as the model made it, with its spaces"
        )


@dataclass(frozen=True)
class Generation:
    """What a model wrote, with its tokens; tokens may go on where the text was cut."""

    text: str
    tokens: tuple[TokenLogprob, ...]

    @property
    def logprob(self) -> float:
        """log p of the text: the sum over the tokens that are part of it."""
        return math.fsum(token.logprob or 0.0 for token in self.tokens if token.start < len(self.text))


def generate(
    model: LanguageModel, prompts: Sequence[str], stop: str | Sequence[str] = "\n", max_tokens: int = 64
) -> list[Generation]:
    """The likeliest continuation of each prompt, token by token, cut before ``stop``, with log-probabilities.

    Raises LogprobsUnavailable where the model does not tell them, EndpointError as `LanguageModel.generate`.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    made = []
    for prompt in prompts:
        answer = model.generate(prompt, max_tokens=max_tokens, stop=stops, logprobs=True)[0]
        if answer.text and not answer.tokens:
            raise LogprobsUnavailable(
                f"{model!r} gave a text without log-probabilities (the answer's field logprobs is empty); program sets need "
                "the log-probability of each token"
            )
        made.append(Generation(answer.text, tuple(answer.tokens or ())))
    return made


def check_alignment(code: str, tokens: Sequence[TokenLogprob]) -> None:
    """Raises TokenAlignmentError where the tokens put together do not begin with ``code``."""
    at = 0
    for token in tokens:
        if at >= len(code):
            return
        expected = code[at : at + len(token.text)]
        if token.start != at or not token.text.startswith(expected):
            same = 0
            while token.start == at and same < len(expected) and token.text[same] == expected[same]:
                same += 1
            raise TokenAlignmentError(at + same, token.text[same:], code[at + same : at + same + 20])
        at += len(token.text)
    if at < len(code):
        raise TokenAlignmentError(at, "", code[at : at + 20])


def node_costs(tree: ProgramTree, tokens: Sequence[TokenLogprob], cost: str = "split") -> Float[np.ndarray, " node"]:
    """Negative log-likelihood of the own text of each node (n,), in nats, at least 0.

    "split": the -log p of a token is shared out over its visible characters and summed by node, so that the sum over the
    nodes is -log p of the program. A token without any goes to the node of the next visible character, at the end to the
    root. "official", as the authors' code has it: each node pays for every token that touches its own text in full, so that
    a token across two nodes counts twice, and at most 10. Tokens beyond the end of the code cost nothing.

    Raises TokenAlignmentError, LogprobsUnavailable for tokens without a log-probability, InputError for one that is none.

    >>> from theodolite.predictions.program_sets.trees import parse_program
    >>> tokens = [TokenLogprob("f(", -1.0, 0), TokenLogprob("a", -0.5, 2), TokenLogprob(")", -0.25, 3)]
    >>> node_costs(parse_program("f(a)"), tokens).tolist()
    [0.75, 0.5, 0.5]
    """
    if cost not in ("split", "official"):
        raise InputError(f'cost must be "split" or "official", got {cost!r}')
    check_alignment(tree.code, tokens)
    out = np.zeros(len(tree))
    visible = np.array([not character.isspace() for character in tree.code], dtype=bool)
    for token in tokens:
        if token.start >= len(tree.code):
            break
        surprise = _surprise(token)
        within = slice(token.start, token.start + len(token.text))
        owners = tree.owner[within][visible[within]]
        if not len(owners):
            later = np.flatnonzero(visible[within.stop :])
            owners = tree.owner[within.stop + later[:1]] if len(later) else np.zeros(1, dtype=np.int64)
        if cost == "split":
            np.add.at(out, owners, surprise / len(owners))
        else:
            out[np.unique(owners)] += surprise
    return out if cost == "split" else np.clip(out, *_OFFICIAL_RANGE)


@no_type_check
def _surprise(token: TokenLogprob) -> float:
    if token.logprob is None:
        raise LogprobsUnavailable(f"the token {token.text!r} at character {token.start} has no log-probability")
    if not math.isfinite(token.logprob) or token.logprob > _ROUNDING:
        raise InputError(
            f"the token {token.text!r} at character {token.start} has the log-probability {token.logprob}; it must be a "
            "finite number, at most 0"
        )
    return max(0.0, -token.logprob)
