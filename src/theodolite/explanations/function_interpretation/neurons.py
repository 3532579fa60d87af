"""Concept neurons: how much a word has to do with a concept, and the partner of a word under a relation.

entity(word)   = P("1") / (P("0") + P("1")) that a language model continues with when asked whether the word belongs to the
                 concept, or the squashed cosine of sentence embeddings; of two concepts the larger
relation(word) = what the language model names as the partner of the word; "undefined" where there is none
"""

__all__ = ["EmbeddingBackend", "EntityNeuron", "LanguageModelBackend", "Relation", "RelationNeuron", "make_neurons"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from theodolite.core.errors import InputError
from theodolite.explanations.function_interpretation.judges import sentence_embeddings
from theodolite.language.model import LanguageModel

_WORDS = ("music", "winter", "engine", "doctor", "river", "painting", "football", "bread", "planet", "law")


@runtime_checkable
class NeuronBackend(Protocol):
    """What knows about words."""

    def relatedness(self, concept: str, words: Sequence[str]) -> np.ndarray:
        """How much each word has to do with the concept, (n,) in [0, 1]."""
        ...

    def partner(self, relation: "Relation", word: str) -> str:
        """The partner of a word, "undefined" where it has none."""
        ...


class EmbeddingBackend:
    """Relatedness from sentence embeddings, offline: 1 / (1 + exp(-(cosine - .3) / .05)). embed: MiniLM where None."""

    def __init__(self, embed: Callable[[list[str]], np.ndarray] | None = None) -> None:
        self._embed = embed

    def relatedness(self, concept: str, words: Sequence[str]) -> np.ndarray:
        """One number a word."""
        rows = np.asarray((self._embed or sentence_embeddings)([concept, *words]), dtype=np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return 1 / (1 + np.exp(-(rows[1:] @ rows[0] - 0.3) / 0.05))

    def partner(self, relation: "Relation", word: str) -> str:
        """Not to be had from embeddings."""
        raise InputError("a relation needs a language model as its backend; embeddings cannot name a partner")


class LanguageModelBackend:
    """A language model: continuations "0" and "1" scored for entities, a short answer for relations."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def relatedness(self, concept: str, words: Sequence[str]) -> np.ndarray:
        """One number a word."""
        prompts = [f'Answer 1 if "{word}" has to do with {concept}, otherwise 0.\nAnswer:' for word in words]
        table = self.model.score_table(prompts, [" 0", " 1"])
        return 1 / (1 + np.exp(np.clip(table[:, 0] - table[:, 1], -500, 500)))

    def partner(self, relation: "Relation", word: str) -> str:
        """The first line of the answer."""
        question = (
            f'The input is "{word}". If it is {relation.source}, answer with {relation.target} and nothing else; '
            "otherwise answer: undefined"
        )
        text = self.model.chat([{"role": "user", "content": question}], max_tokens=24).text.strip()
        return text.splitlines()[0].strip().rstrip(".") if text else "undefined"


@dataclass(frozen=True)
class Relation:
    """Maps ``source`` ("a country") to ``target`` ("the capital of that country"); inputs of ``exception`` are undefined."""

    source: str
    target: str
    exception: str | None = None


@dataclass(frozen=True, eq=False)
class EntityNeuron:
    """``fn(words)`` gives an activation in [0, 1] for each word: the larger one of its concepts'."""

    concepts: tuple[str, ...]
    backend: Any
    examples: tuple[str, ...] = _WORDS

    modality = "neuron"

    def __call__(self, words: str | Sequence[str]) -> np.ndarray:
        """(n,) for n words."""
        rows = [words] if isinstance(words, str) else list(words)
        return np.max([self.backend.relatedness(concept, rows) for concept in self.concepts], axis=0)

    @property
    def description(self) -> str:
        """The truth in words."""
        return " or ".join(self.concepts)

    kind = description


@dataclass(frozen=True, eq=False)
class RelationNeuron:
    """``fn(word)`` gives the partner of a word, "undefined" outside the relation and in its exception."""

    relation: Relation
    backend: Any
    examples: tuple[str, ...] = _WORDS

    modality = "string"

    def __call__(self, word: str) -> str:
        """The partner."""
        exception = self.relation.exception
        if exception and float(self.backend.relatedness(exception, [word])[0]) > 0.5:
            return "undefined"
        return self.backend.partner(self.relation, word)

    @property
    def description(self) -> str:
        """The truth in words."""
        told = f"maps {self.relation.source} to {self.relation.target}"
        return f"{told}, except {self.relation.exception}" if self.relation.exception else told

    kind = description


def make_neurons(concepts: Sequence[Any], backend: Any = "embedding") -> list[EntityNeuron | RelationNeuron]:
    """A neuron for each of ``concepts``: a text, a pair of texts (the larger activation counts) or a `Relation`.

    backend: "embedding" (MiniLM, offline, entities only), a `LanguageModel`, or an object with the methods of a backend.
    """
    made_backend = (
        EmbeddingBackend() if isinstance(backend, str) and backend == "embedding"
        else LanguageModelBackend(backend) if isinstance(backend, LanguageModel) else backend
    )  # fmt: skip
    if not hasattr(made_backend, "relatedness"):
        raise InputError(f'a backend is "embedding", a language model or has relatedness(), got {backend!r}')
    if isinstance(concepts, str):
        raise InputError(f"concepts is a list of them, got one text, {concepts!r}")
    made: list[EntityNeuron | RelationNeuron] = []
    for one in concepts:
        if isinstance(one, Relation):
            if isinstance(made_backend, EmbeddingBackend):
                raise InputError("a relation needs a language model as its backend; embeddings cannot name a partner")
            made.append(RelationNeuron(one, made_backend))
            continue
        names = (one,) if isinstance(one, str) else tuple(one) if isinstance(one, tuple | list) else ()
        if not 1 <= len(names) <= 2 or not all(isinstance(name, str) and name.strip() for name in names):
            raise InputError(f"a concept is a text, a pair of texts or a Relation, got {one!r}")
        made.append(EntityNeuron(names, made_backend))
    return made
