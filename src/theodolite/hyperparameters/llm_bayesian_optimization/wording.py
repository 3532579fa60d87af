"""Configurations, scores and the task in words, and back: what is sent to a language model and what is read of its answers.

Answers are fenced in ## ... ##. A text model goes on after the opening fence that the prompt ends with; a chat model may open
one of its own. What stands outside fences is not read: a reply may repeat the prompt's numbers.
"""

__all__ = ["FENCE", "Wording", "decimals", "read_answer", "read_score"]

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from theodolite.core.errors import InputError
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.space import Config, Float, Parameter, SearchSpace, Trial

T = TypeVar("T")
LEVELS = ("full", "partial", "none")
FENCE = "##"
_LONGEST = 20_000  # characters of a reply that are read
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Wording:
    """How a task is told. level: "full" with facts of the data, "partial" without them, "none" the model and ranges only.

    anonymize: parameters are called X1, X2, ... log10: parameters on a log scale are written as their logarithms.
    """

    space: SearchSpace
    context: TaskContext
    level: str = "full"
    anonymize: bool = False
    log10: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(f"a context level is one of {', '.join(LEVELS)}; got {self.level!r}")

    @cached_property
    def names(self) -> dict[str, str]:
        """What each parameter is called."""
        return {name: f"X{i}" if self.anonymize else name for i, name in enumerate(self.space, 1)}

    @cached_property
    def shown(self) -> dict[str, Parameter]:
        """The parameters as they are written."""
        return {
            name: Float(math.log10(one.low), math.log10(one.high))
            if isinstance(one, Float) and self._warped(one)
            else one
            for name, one in self.space.items()
        }

    def _warped(self, parameter: Parameter) -> bool:
        return self.log10 and isinstance(parameter, Float) and parameter.scale == "log"

    @property
    def metric(self) -> str:
        """What the score is called."""
        return "a metric" if self.level == "none" else self.context.metric

    @property
    def direction(self) -> str:
        """Which way is better."""
        return "lower is better" if self.context.lower_is_better else "higher is better"

    def subject(self) -> str:
        """The model and its task, as the end of a sentence."""
        about = self.context
        if self.level == "none":
            return about.model
        told = f"{about.model} on a {about.task} task"
        if self.level == "partial":
            return told
        facts = [
            f"{number} {word}"
            for number, word in (
                (about.n_samples, "samples"),
                (about.n_features, "features"),
                (about.n_classes, "classes"),
            )
            if number is not None
        ]
        if about.n_categorical:
            facts.append(f"{about.n_categorical} of the features categorical")
        return f"{told} ({', '.join(facts)})" if facts else told

    def statistics(self) -> str:
        """One line about the data, "" where nothing is known."""
        about, told = self.context, []
        if about.class_shares:
            shares = ", ".join(f"{share:.2f}" for share in about.class_shares[:10])
            told.append(f"shares of the classes: {shares}{', ...' if len(about.class_shares) > 10 else ''}")
        for word, values in (("skewness", about.skewness), ("kurtosis", about.kurtosis)):
            if len(values) == 3:
                told.append(f"{word} of the features from {values[0]} to {values[2]}, middle {values[1]}")
        if about.n_target_correlations is not None:
            told.append(f"features correlated above 0.5 with the target: {about.n_target_correlations}")
        if about.n_feature_correlations is not None:
            told.append(f"pairs of features correlated above 0.5: {about.n_feature_correlations}")
        return f"About the data: {'; '.join(told)}.\n" if told else ""

    def ranges(self) -> str:
        """A line for each parameter."""
        lines = [
            f"- {self.names[name]}: {one.describe()}{' (base-10 logarithm)' if self._warped(self.space[name]) else ''}"
            for name, one in self.shown.items()
        ]
        return "\n".join(lines)

    def values(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Each parameter's value as it is written."""
        return {
            name: one.text(min(one.high, max(one.low, math.log10(config[name]))))
            if self._warped(self.space[name]) and isinstance(one, Float)
            else one.text(config[name])
            for name, one in self.shown.items()
        }

    def sentence(self, config: Mapping[str, Any]) -> str:
        """ "name is value, name is value": how the surrogate reads a configuration."""
        return ", ".join(f"{self.names[name]} is {text}" for name, text in self.values(config).items())

    def pairs(self, config: Mapping[str, Any]) -> str:
        """ "name: value, name: value": how the sampler reads and writes one."""
        return ", ".join(f"{self.names[name]}: {text}" for name, text in self.values(config).items())

    def read_pairs(self, text: str) -> Config:
        """The configuration that `pairs` wrote; InputError where a parameter is missing, twice there or out of range."""
        found: list[tuple[int, int, str]] = []
        for name, shown in self.names.items():
            hits = list(re.finditer(rf"(?<![\w.]){re.escape(shown)}[\"']?\s*(?::|=|\bis\b)\s*", text))
            if len(hits) != 1:
                raise InputError(f"{shown} is named {len(hits)} times")
            found.append((hits[0].start(), hits[0].end(), name))
        found.sort()
        ends = [start for start, _, _ in found[1:]] + [len(text)]
        values = {name: text[at:end].strip(" \t\n,;\"'{}") for (_, at, name), end in zip(found, ends, strict=True)}
        return self.read_values(values)

    def read_values(self, values: Mapping[str, Any]) -> Config:
        """The configuration of values by the space's names, as texts or as they are."""
        out = {}
        for name, parameter in self.space.items():
            value, shown = values[name], self.shown[name]
            read = shown.parse(value) if isinstance(value, str) else shown.check(value)
            out[name] = parameter.from_unit(shown.to_unit(read)) if self._warped(parameter) else read
        return self.space.check(out)

    def read_dictionaries(self, text: str) -> tuple[list[Config], int]:
        """The configurations of a list of dictionaries, and how many of its dictionaries are none."""
        back = {shown: name for name, shown in self.names.items()}
        good, bad = [], 0
        for piece in re.findall(r"\{[^{}]*\}", text[:_LONGEST]):
            try:
                read = _dictionary(piece)
                good.append(self.read_values({back[key]: value for key, value in read.items()}))
            except (InputError, KeyError):
                bad += 1
        return good, bad

    def shuffled(self, trials: Sequence[Trial], template: int, *, bootstrap: bool = False) -> list[Trial]:
        """The trials in the order of one template; with ``bootstrap`` as many drawn with replacement."""
        rng = np.random.default_rng(template)
        order = rng.integers(0, len(trials), len(trials)) if bootstrap else rng.permutation(len(trials))
        return [trials[i] for i in order]


def decimals(trials: Sequence[Trial]) -> int:
    """How many decimals scores are written with: six, or as many as tell the worst from the best in three digits."""
    scores = [trial.score for trial in trials]
    spread = max(scores) - min(scores)
    return 6 if spread == 0 else min(15, max(6, 3 - math.floor(math.log10(spread))))


def _dictionary(piece: str) -> dict[str, Any]:
    for read in (ast.literal_eval, json.loads):  # Python's words and JSON's; neither runs anything
        try:
            value = read(piece)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
    raise InputError("not a dictionary of values")


def read_answer(text: str, read: Callable[[str], T], *, whole: bool = True) -> T | None:
    """What ``read`` makes of the fenced part of a reply, None where it makes nothing of it.

    The reply goes on after a fence that the prompt opened ("0.91 ## ..."), or has its own ("... ## 0.91 ##"). whole: without
    a closing fence the reply counts only if it was not cut off.
    """
    pieces = text[:_LONGEST].split(FENCE)
    if len(pieces) == 1:
        wanted = pieces if whole else []
    else:
        fenced = pieces[1::2] if whole or len(pieces) % 2 else pieces[1:-1:2]
        # what goes on after the prompt's fence comes first; after other words the last fence counts, as examples may be repeated
        wanted = [pieces[0], *fenced[-1:]] if pieces[0].strip() else fenced[:1]
    for piece in wanted:
        try:
            return read(piece)
        except InputError:
            continue
    return None


def read_score(text: str) -> float:
    """A number and nothing else; InputError where it is not that, or not finite."""
    written = text.strip()
    if not _NUMBER.fullmatch(written) or not math.isfinite(value := float(written)):
        raise InputError(f"{written[:40]!r} is not a number")
    return value
