"""Many functions, many interpreters, one table, with the baselines in it and what everything cost."""

__all__ = ["BenchmarkRow", "BenchmarkTable", "benchmark", "string_inputs"]

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate, proportion
from theodolite.explanations.function_interpretation.errors import DomainError, QueryBudgetExceeded
from theodolite.explanations.function_interpretation.interpreters import (
    ConstantInterpreter,
    OracleInterpreter,
    PolynomialInterpreter,
)
from theodolite.explanations.function_interpretation.judges import Judge, UnitTest, UnitTestScore, unit_test
from theodolite.explanations.function_interpretation.loop import (
    AnswerError,
    BlackBox,
    Interpretation,
    Interpreter,
    interpret,
)
from theodolite.explanations.function_interpretation.numeric import NumericFunction
from theodolite.explanations.function_interpretation.scores import NumericScore, score_numeric, score_strings
from theodolite.explanations.function_interpretation.strings import StringFunction

_WORDS = (
    "Hello",
    "world",
    "Python",
    "apple",
    "Banana",
    "TEST",
    "code",
    "Zebra",
    "queue",
    "Rhythm",
    "sky",
    "Idea",
    "oUtput",
)
_HELD_OUT = 40


@dataclass(frozen=True, eq=False)
class BenchmarkRow:
    """One interpreter on one function. score: a `NumericScore`, a share for strings, None for neurons; unit: of the judge."""

    function: str
    kind: str
    variant: str
    interpreter: str
    interpretation: Interpretation
    score: NumericScore | float | None
    unit: UnitTestScore | None = None
    shuffled: UnitTestScore | None = None


@dataclass(frozen=True, eq=False)
class BenchmarkTable:
    """Rows of all functions and interpreters. shuffled: the judge on the description of the next function instead."""

    rows: tuple[BenchmarkRow, ...]

    def frame(self) -> pd.DataFrame:
        """One line a row, scores and costs in columns; what does not apply is NaN."""
        lines = []
        for row in self.rows:
            score, told = row.score, row.interpretation
            number = isinstance(score, NumericScore)
            lines.append({
                "function": row.function, "kind": row.kind, "variant": row.variant, "interpreter": row.interpreter,
                "nmse": score.nmse if number else np.nan, "r2_nmse": score.r2_nmse if number else np.nan,
                "local_nmse": np.nan if not number or score.local_nmse is None else score.local_nmse,
                "domain_iou": score.domain_iou if number and row.variant == "corrupted" else np.nan,
                "success": bool(score.success) if number else np.nan, "exact": score if isinstance(score, float) else np.nan,
                "unit_test": np.nan if row.unit is None else row.unit.accuracy,
                "unit_test_shuffled": np.nan if row.shuffled is None else row.shuffled.accuracy,
                "unparsed": 0 if row.unit is None else row.unit.unparsed,
                "rounds": told.rounds, "queries": told.queries, "calls": told.calls,
                "prompt_tokens": told.prompt_tokens, "completion_tokens": told.completion_tokens,
                "reason": told.reason or (score.reason if number else ""),
                "description": told.description, "domain": told.domain, "code": told.code,
            })  # fmt: skip
        return pd.DataFrame(lines)

    def success(self, interpreter: str, variant: str | None = None, *, measure: str = "r2_nmse") -> Estimate:
        """Share of an interpreter's numeric functions below .1 of a measure ("nmse", "r2_nmse", "local_nmse")."""
        frame = self.frame()
        rows = frame[frame["interpreter"] == interpreter]
        rows = rows if variant is None else rows[rows["variant"] == variant]
        values = np.asarray(rows[measure], dtype=np.float64)
        values = values[~np.isnan(values)]
        if len(values) == 0:
            raise InputError(f"{interpreter} has no {measure} on {variant or 'any'} functions here")
        return proportion(int((values < 0.1).sum()), len(values), unit="share of functions")


def benchmark(
    functions: Sequence[Any],
    interpreters: Sequence[Interpreter],
    judge: Judge | None = None,
    seed: int = 0,
    *,
    budget: int = 400,
    mode: str = "agent",
    rounds: int = 20,
    tests: Mapping[str, Sequence[UnitTest]] | None = None,
) -> BenchmarkTable:
    """Every interpreter on every function, beside the cubic and the constant, which are added for numeric functions.

    functions: `NumericFunction`, `StringFunction`, neurons, or any function of an array of numbers (its values are then the
    truth); an interpreter is handed a `BlackBox` only, and no function of texts where it says ``numeric_only``. judge: answers
    unit tests from the descriptions, each also from another function's (shuffled) description; tests: by a function's name,
    made from string functions themselves where they are not given. seed: of held-out string inputs and of tests. Strings are
    scored on inputs that were not asked for. What an interpreter does wrong is a score with a reason, not an exception.
    """
    if not functions or not interpreters:
        raise InputError("need at least one function and one interpreter")
    runners = list(interpreters)
    if any(_modality(fn) == "numeric" for fn in functions):
        there = {one.name for one in runners}
        runners += [one for one in (PolynomialInterpreter(3), ConstantInterpreter()) if one.name not in there]
    names = [getattr(fn, "name", "") or f"function {i}" for i, fn in enumerate(functions)]
    made = dict(tests or {})
    if judge is not None:
        texts = [i for i, fn in enumerate(functions) if isinstance(fn, StringFunction) and names[i] not in made]
        made |= {
            names[i]: _string_tests([functions[j] for j in texts], k, seed)
            for k, i in enumerate(texts)
            if len(texts) > 2
        }
    rows = []
    for runner in runners:
        told = [_interpreted(fn, runner, budget, mode, rounds) for fn in functions]
        for i, fn in enumerate(functions):
            if told[i] is None:
                continue
            asked = made.get(names[i]) if judge is not None else None
            alike = [j for j, one in enumerate(functions) if told[j] is not None and _modality(one) == _modality(fn)]
            other = told[alike[(alike.index(i) + 1) % len(alike)]]
            rows.append(BenchmarkRow(
                names[i], getattr(fn, "kind", ""), getattr(fn, "variant", "clean"), runner.name, told[i],
                _scored(fn, told[i], seed),
                unit_test(told[i].description, asked, judge) if asked and judge else None,
                unit_test(other.description, asked, judge) if asked and judge and len(alike) > 1 else None,
            ))  # fmt: skip
    return BenchmarkTable(tuple(rows))


def _interpreted(fn: Any, runner: Interpreter, budget: int, mode: str, rounds: int) -> Any:
    """None where an interpreter of numbers meets a function that is none."""
    if getattr(runner, "numeric_only", False) and _modality(fn) != "numeric":
        return None
    fn = fn.again() if isinstance(fn, NumericFunction) else fn
    runner = OracleInterpreter(fn) if isinstance(runner, OracleInterpreter) else runner
    box = BlackBox(fn, budget)
    try:
        made = interpret(box, runner, mode, rounds)
    except (DomainError, QueryBudgetExceeded, AnswerError) as error:
        asked = tuple(given for given, _ in box.log)
        return Interpretation("", reason=str(error), rounds=1, queries=len(asked), asked=asked)
    if not isinstance(made, Interpretation):
        raise InputError(f"{runner.name} must give an Interpretation, got {type(made).__name__}")
    return made


def _modality(fn: Any) -> str:
    return getattr(fn, "modality", "numeric")


def _scored(fn: Any, told: Interpretation, seed: int) -> NumericScore | float | None:
    if _modality(fn) == "numeric":
        return score_numeric(fn, told)
    if isinstance(fn, StringFunction):
        return score_strings(fn, told, string_inputs(_HELD_OUT, seed, without=told.asked))
    return None


def string_inputs(n: int, seed: int, *, without: Sequence[str] = ()) -> list[str]:
    """``n`` different texts: words, words with digits, several words, random letters; none of ``without``."""
    rng = np.random.default_rng([seed, 11])
    kept: dict[str, None] = {}
    letters = list(string.ascii_letters + string.digits + " ")
    while len(kept) < n:
        words = [str(one) for one in rng.choice(_WORDS, int(rng.integers(1, 4)))]
        how = int(rng.integers(0, 3))
        text = " ".join(words) if how == 0 else words[0] + str(int(rng.integers(0, 1000)))
        text = "".join(rng.choice(letters, int(rng.integers(1, 16)))) if how == 2 else text
        if text not in without:
            kept.setdefault(text)
    return list(kept)


def _string_tests(functions: Sequence[StringFunction], which: int, seed: int, n: int = 10) -> list[UnitTest]:
    """Tests as the benchmark makes them: one true execution, and two inputs with outputs of other functions."""
    rng = np.random.default_rng([seed, 12, which])
    fn, others = functions[which], [one for k, one in enumerate(functions) if k != which]
    tests: list[UnitTest] = []
    for _ in range(20 * n):
        given = string_inputs(3, int(rng.integers(1 << 31)))
        pair = [others[i] for i in rng.choice(len(others), 2, replace=False)]
        wrong = [one(text) for one, text in zip(pair, given[1:], strict=True)]
        if any(fn(text) == got for text, got in zip(given[1:], wrong, strict=True)):
            continue  # another function's output that happens to be right
        answer = int(rng.integers(3))
        texts = [f"{text} -> {got}" for text, got in zip(given, [fn(given[0]), *wrong], strict=True)]
        texts[0], texts[answer] = texts[answer], texts[0]
        tests.append(UnitTest(tuple(texts), answer + 1))
        if len(tests) == n:
            break
    return tests
