"""An interpreter without a language model: it asks on a grid, fits families of formulas, and looks for a corrupted interval.

Every candidate is  y = sum_k a_k phi_k(x)  with the a_k by least squares and the few numbers inside the phi_k (a frequency, a
place, a width) by a search over starting values and a local descent. The choice is by

    BIC = n log(RSS / n + floor) + k log n

with k all fitted numbers. A corrupted interval is then looked for in the best candidates: outside the interval the formula,
inside a constant, RSS of all pairs of ends by downdating the normal equations; it is kept where BIC falls.
"""

__all__ = ["SymbolicInterpreter"]

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from theodolite.explanations.function_interpretation.loop import BlackBox, Interpretation, Mode

_FLOOR = 1e-11  # of the variance of y: better fits count as exact
_SCANNED = 4  # of the best candidates in which an interval is looked for, beside those without inner numbers
_FEWEST = 4  # points inside an interval
_ENDS = 72  # ends of an interval that are tried at first
_HALF = 128.0  # half of the range in the interpreter's own units
_BATCH = 4_000_000  # numbers of a batch of columns


@dataclass(frozen=True, eq=False)
class _Candidate:
    """columns (n, k) and their texts; inner: how many numbers were fitted inside the columns."""

    words: str
    texts: tuple[str, ...]
    columns: np.ndarray
    inner: int = 0
    interval: tuple[float, float] | None = None
    level: float = 0.0
    coefficients: tuple[float, ...] = ()
    bic: float = math.inf


class SymbolicInterpreter:
    """Fits formulas to a black box of numbers. scan: whether it looks for a corrupted interval.

    It asks for 257 equally spaced points of the range and for up to 121 drawn from its middle tenth, from ``seed``, where
    frequencies too high for the grid are told apart; fewer where the budget is smaller. Values that are not finite are left
    out. Works on any range; a family whose place is fixed (a root, a logarithm) has it at zero.
    """

    numeric_only = True

    def __init__(self, *, scan: bool = True, seed: int = 0) -> None:
        self.scan, self.seed = scan, seed
        self.name = "symbolic" if scan else "symbolic without scan"

    def interpret(self, blackbox: BlackBox, *, mode: Mode = "agent", rounds: int = 20) -> Interpretation:
        """Ask once, fit, and answer with a sentence, the interval and a program. In "single_round" the examples are all."""
        low, high = blackbox.bounds
        if mode == "single_round":
            wanted = list(blackbox.examples)
        else:
            most = min(blackbox.left, 378)
            even = min(257, most - most // 3)
            inner = np.random.default_rng([self.seed, 9]).uniform(-0.1, 0.1, most - even)
            wanted = [*np.linspace(low, high, even), *((low + high) / 2 + inner * (high - low))]
        before = len(blackbox.log)
        pairs = np.array(sorted(set(blackbox.query(wanted[: blackbox.left])))).reshape(-1, 2)
        asked = tuple(given for given, _ in blackbox.log[before:])
        pairs = pairs[np.isfinite(pairs[:, 1])]
        if len(pairs) < _FEWEST:
            words = f"{len(pairs)} finite values were seen, too few for a formula"
            return Interpretation(words, "none", rounds=1, queries=len(asked), asked=asked)
        x, y = pairs.T
        middle, unit = (low + high) / 2, (high - low) / 2 / _HALF
        size = float(np.abs(y).max()) or 1.0  # squares of very large and very small values are no numbers
        best = _fit((x - middle) / unit, y / size, self.scan)
        best = replace(best, coefficients=tuple(a * size for a in best.coefficients), level=best.level * size)
        interval = None if best.interval is None else (
            best.interval[0] * unit + middle, best.interval[1] * unit + middle
        )  # fmt: skip
        domain = "none" if interval is None else f"({interval[0]:.10g}, {interval[1]:.10g})"
        if (middle, unit) != (0.0, 1.0):
            best = replace(best, words=f"{best.words}, with {low:.6g} to {high:.6g} taken as x from -128 to 128")
        words = best.words
        if interval is not None:
            words += f", but about {best.level:.4g} on ({interval[0]:.6g}, {interval[1]:.6g})"
        return Interpretation(
            words, domain, _program(best, middle, unit), rounds=1, queries=len(asked), asked=asked,
        )  # fmt: skip


def _program(best: _Candidate, middle: float, unit: float) -> str:
    terms = " + ".join(f"{a!r} * ({text})" for a, text in zip(best.coefficients, best.texts, strict=True) if a != 0)
    lines = ["import numpy as np", "", "def function(x):", "    x = np.asarray(x, dtype=float)"]
    if (middle, unit) != (0.0, 1.0):
        lines.append(f"    x = (x - {middle!r}) / {unit!r}")
    lines.append(f"    y = {terms or '0.0 * x'}")
    if best.interval is not None:
        low, high = best.interval
        inside = [f"(x > {low!r})"] * math.isfinite(low) + [f"(x < {high!r})"] * math.isfinite(high)
        lines.append(f"    y = np.where({' & '.join(inside)}, {best.level!r}, y)")
    return "\n".join([*lines, "    return y", ""])


# ---- least squares


def _rss(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Residual sums of squares of a batch of columns (m, n, k)."""
    q, _ = np.linalg.qr(columns)
    return np.maximum(y @ y - ((y @ q) ** 2).sum(axis=-1), 0)


def _score(rss: float, n: int, k: int, spread: float) -> float:
    return n * math.log(rss / n + _FLOOR * spread) + k * math.log(n)


def _solved(one: _Candidate, y: np.ndarray) -> _Candidate:
    """With its coefficients and BIC; infinite where a column is not finite."""
    columns = one.columns
    if not np.isfinite(columns).all() or columns.shape[1] >= len(y):
        return one
    size = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    a, *_ = np.linalg.lstsq(columns / size, y, rcond=1e-13)
    rss = float(((y - columns / size @ a) ** 2).sum())
    spread = float(y.var()) or 1.0
    k = columns.shape[1] + one.inner + 1
    return replace(one, coefficients=tuple((a / size).tolist()), bic=_score(rss, len(y), k, spread))


def _fit(x: np.ndarray, y: np.ndarray, scan: bool) -> _Candidate:
    """The best of all candidates in x of [-128, 128]."""
    plain = [_solved(one, y) for one in _candidates(x, y)]
    plain = sorted((one for one in plain if math.isfinite(one.bic)), key=lambda one: one.bic)
    if not scan:
        return plain[0]
    looked = plain[:_SCANNED] + [one for one in plain[_SCANNED:] if one.inner == 0 and one.columns.shape[1] <= 6]
    return min([plain[0], *(found for one in looked if (found := _scanned(one, x, y)))], key=lambda one: one.bic)


def _scanned(one: _Candidate, x: np.ndarray, y: np.ndarray) -> _Candidate | None:
    """The candidate with the interval that lowers its RSS most, all pairs of ends tried; None where none can be."""
    n, k = one.columns.shape
    if n < k + _FEWEST + 2:
        return None
    q, _ = np.linalg.qr(one.columns / np.maximum(np.abs(one.columns).max(axis=0), 1e-300))
    ends = np.unique(np.linspace(0, n, min(n + 1, _ENDS)).astype(int))
    sums = _Sums(q, y)
    i, j = sums.best(*(index.ravel() for index in np.meshgrid(ends, ends, indexing="ij")))
    width = math.ceil(n / (len(ends) - 1)) + 1
    near = [np.arange(max(0, end - width), min(n, end + width) + 1) for end in (i, j)]
    i, j = sums.best(*(index.ravel() for index in np.meshgrid(*near, indexing="ij")))
    outside = np.ones(n, dtype=bool)
    outside[i:j] = False
    if i == j or outside.sum() < k:
        return None
    rest = _solved(replace(one, columns=one.columns[outside]), y[outside])
    if not rest.coefficients:
        return None
    level = float(np.median(y[i:j]))
    rss = float(((y[outside] - rest.columns @ np.array(rest.coefficients)) ** 2).sum() + ((y[i:j] - level) ** 2).sum())
    low = -math.inf if i == 0 else float(x[i - 1] + x[i]) / 2
    high = math.inf if j == n else float(x[j - 1] + x[j]) / 2
    bic = _score(rss, n, k + one.inner + 4, float(y.var()) or 1.0)
    return replace(rest, columns=one.columns, interval=(low, high), level=level, bic=bic)


class _Sums:
    """Sums over prefixes of the rows, from which the fit without any block of rows follows."""

    def __init__(self, q: np.ndarray, y: np.ndarray) -> None:
        def prefix(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros((1, *rows.shape[1:])), np.cumsum(rows, axis=0)])

        self.n, self.k = q.shape
        y = y / (np.abs(y).max() or 1.0)
        self._gram = prefix(q[:, :, None] * q[:, None, :])
        self._cross = prefix(q * y[:, None])
        self._first, self._second = prefix(y), prefix(y**2)

    def best(self, start: np.ndarray, stop: np.ndarray) -> tuple[int, int]:
        """The block [start, stop) that leaves the least RSS, of those with enough rows inside and outside; (0, 0) if none."""
        length = stop - start
        kept = (length >= _FEWEST) & (self.n - length >= self.k + 2)
        start, stop, length = start[kept], stop[kept], length[kept]
        if len(start) == 0:
            return 0, 0
        inside = self._second[stop] - self._second[start] - (self._first[stop] - self._first[start]) ** 2 / length
        gram = self._gram[-1] - (self._gram[stop] - self._gram[start])
        cross = self._cross[-1] - (self._cross[stop] - self._cross[start])
        square = self._second[-1] - (self._second[stop] - self._second[start])
        gram = gram + 1e-10 * np.eye(self.k)  # a block may hold all rows that a column is not zero in
        solved = np.linalg.solve(gram, cross[:, :, None])[:, :, 0]
        at = int(np.argmin(np.maximum(inside, 0) + np.maximum(square - (solved * cross).sum(axis=1), 0)))
        return int(start[at]), int(stop[at])


# ---- candidates


def _powers(x: np.ndarray, degree: int) -> tuple[list[str], list[np.ndarray]]:
    """1, z, .., z^degree with z = x / 128, so that the columns have one size."""
    texts = ["1.0", "x / 128", *(f"(x / 128) ** {d}" for d in range(2, degree + 1))][: degree + 1]
    return texts, [(x / _HALF) ** d for d in range(degree + 1)]


def _made(words: str, texts: Iterable[str], columns: Iterable[np.ndarray], inner: int = 0) -> _Candidate:
    return _Candidate(words, tuple(texts), np.stack(list(columns), axis=1), inner)


def _candidates(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    with np.errstate(all="ignore"):
        one = np.ones_like(x)
        for degree in range(6):
            words = ("a constant", "linear in x")[degree] if degree < 2 else f"a polynomial of degree {degree}"
            yield _made(words, *_powers(x, degree))
        yield _made("the absolute value of x, scaled and shifted", ["1.0", "np.abs(x)"], [one, np.abs(x)])
        yield _made(
            "linear, with another slope below zero", ["1.0", "x", "np.maximum(x, 0)"], [one, x, np.maximum(x, 0)]
        )
        yield _made("the square root of x, scaled and shifted", ["1.0", "np.sqrt(x)"], [one, np.sqrt(x)])
        yield _made("the logarithm of x, scaled and shifted", ["1.0", "np.log(x)"], [one, np.log(x)])
        yield _made("proportional to 1 / x, shifted", ["1.0", "1 / x"], [one, 1 / x])
        yield _made("a step at zero", ["1.0", "(x > 0)", "(x == 0)"], [one, 1.0 * (x > 0), 1.0 * (x == 0)])
        yield from _placed(x, y)
        yield from _bumps(x, y)
        waves = list(_waves(x, y))
        yield from waves
        squares = list(_squares(x, y, waves))
        yield from squares
        boxes = list(_boxes(x, y))
        yield from boxes
        yield from _rationals(x, y)
        yield from _composed(x, [*squares, *boxes])


def _searched(
    x: np.ndarray, y: np.ndarray, starts: np.ndarray, columns: Callable[[np.ndarray], np.ndarray], *, keep: int = 2
) -> list[np.ndarray]:
    """Inner numbers (m, p) of the least RSS among ``starts``, each then improved by a simplex; the best first.

    columns: inner numbers (m, p) to columns (m, n, k).
    """
    size = max(1, _BATCH // (len(x) * columns(starts[:1]).shape[2]))
    rss = np.concatenate([_safe(columns(starts[i : i + size]), y) for i in range(0, len(starts), size)])
    found = []
    for at in np.argsort(rss)[:keep]:
        start = starts[at]
        simplex = np.vstack(
            [start, *(start + np.eye(len(start))[d] * (0.05 * abs(start[d]) + 0.02) for d in range(len(start)))]
        )
        made = minimize(
            lambda p: float(np.log(_safe(columns(p[None]), y)[0] + 1e-300)), start, method="Nelder-Mead",
            options={"maxiter": 150, "initial_simplex": simplex, "xatol": 1e-9, "fatol": 1e-6},
        )  # fmt: skip
        found.append((made.fun, made.x))
    return [p for _, p in sorted(found, key=lambda pair: pair[0])]


def _safe(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """RSS of a batch, infinite where a column is not finite."""
    fine = np.isfinite(columns).all(axis=(1, 2))
    out = np.full(len(columns), math.inf)
    if fine.any():
        out[fine] = _rss(columns[fine], y)
    return out


def _with_one(*columns: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(columns[0]), *columns], axis=-1)


def _placed(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    """A step and a bend anywhere."""
    places = np.unique((x[1:] + x[:-1]) / 2)
    places = places[:: max(1, len(places) // 128)]
    above = 1.0 * (x[None, :] > places[:, None])
    at = float(places[int(np.argmin(_safe(_with_one(above), y)))])
    yield _made(f"a step at {at:.4g}", ["1.0", f"(x > {at!r})"], [np.ones_like(x), 1.0 * (x > at)], 1)
    line = np.broadcast_to(x / _HALF, above.shape)
    at = float(places[int(np.argmin(_safe(_with_one(line, np.maximum(x[None, :] - places[:, None], 0)), y)))])
    texts = ["1.0", "x", f"np.maximum(x - {at!r}, 0)"]
    yield _made(f"linear, with another slope below {at:.4g}", texts, [np.ones_like(x), x, np.maximum(x - at, 0)], 1)


def _bumps(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    """A bell and a smooth step: (place, width)."""
    grid = np.stack(np.meshgrid(np.arange(-120.0, 121, 4), np.geomspace(1, 64, 10)), axis=-1).reshape(-1, 2)

    def bell(p: np.ndarray) -> np.ndarray:
        return _with_one(np.exp(-0.5 * ((x - p[:, :1]) / p[:, 1:]) ** 2))

    for place, width in _searched(x, y, grid, bell, keep=1):
        text = f"np.exp(-0.5 * ((x - {float(place)!r}) / {float(width)!r}) ** 2)"
        columns = bell(np.array([[place, width]]))[0]
        yield _Candidate(f"a bell around {place:.4g} of standard deviation {abs(width):.4g}", ("1.0", text), columns, 2)

    def smooth(p: np.ndarray) -> np.ndarray:
        return _with_one(np.tanh((x - p[:, :1]) / p[:, 1:]))

    places = np.concatenate([np.arange(-10.0, 10.1, 0.5), np.arange(-120.0, 121, 8)])
    grid = np.stack(np.meshgrid(places, np.geomspace(0.02, 60, 14)), axis=-1).reshape(-1, 2)
    for place, width in _searched(x, y, grid, smooth, keep=1):
        text = f"np.tanh((x - {float(place)!r}) / {float(width)!r})"
        columns = smooth(np.array([[place, width]]))[0]
        yield _Candidate(f"a hyperbolic tangent around {place:.4g}, {abs(width):.4g} wide", ("1.0", text), columns, 2)


def _waves(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    """A sine: its frequency from the dense middle and from the whole, improved on the middle first."""

    def sine(f: np.ndarray, at: np.ndarray) -> np.ndarray:
        phase = 2 * np.pi * f * at
        return _with_one(np.sin(phase), np.cos(phase))

    middle = np.abs(x) <= _HALF / 5
    starts: list[float] = []
    for part, frequencies in (
        (middle, np.arange(0.02, 10.6, 0.01)),
        (np.ones_like(middle), np.arange(0.001, 0.5, 0.001)),
    ):
        if part.sum() >= 8:
            t = x[part]
            rss = _safe(sine(frequencies[:, None], t), y[part])
            for f in frequencies[np.argsort(rss)[:3]]:
                starts += _searched(t, y[part], np.array([[f]]), lambda p, t=t: sine(p, t), keep=1)[0].tolist()
    rss = _safe(sine(np.array(starts)[:, None], x), y)
    for at in np.argsort(rss)[:2]:
        (f,) = _searched(x, y, np.array([[starts[at]]]), lambda p: sine(p, x), keep=1)[0]
        turn = f"2 * np.pi * {float(f)!r} * x"
        texts = ("1.0", f"np.sin({turn})", f"np.cos({turn})")
        yield _Candidate(f"a sine wave of period {1 / max(f, 1e-9):.4g}", texts, sine(np.array([[f]]), x)[0], 1)


def _square(x: np.ndarray, period: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return np.where(np.sin(2 * np.pi * (x - shift) / period) > 0, 1.0, -1.0)


def _squares(x: np.ndarray, y: np.ndarray, waves: list[_Candidate]) -> Iterator[_Candidate]:
    """A square wave: period and shift by grids that get finer as the part of x that they are fitted to grows."""
    for wave in waves:
        period = float(wave.words.rsplit(" ", 1)[1])
        if not 0.5 <= period <= _HALF:
            continue
        shift, spread, phase = 0.0, 0.12, 1.0
        for reach in (_HALF / 10, _HALF / 4, _HALF):
            part = np.abs(x) <= max(reach, 1.5 * period)
            periods = period * (1 + spread * np.linspace(-1, 1, 49))
            shifts = shift + phase * period * np.linspace(-0.5, 0.5, 41)
            p, s = (index.ravel()[:, None] for index in np.meshgrid(periods, shifts))
            columns = _square(x[part], p, s)
            t = y[part] - y[part].mean()
            centred = columns - columns.mean(axis=1, keepdims=True)
            gain = (centred @ t) ** 2 / np.maximum((centred**2).sum(axis=1), 1e-9)
            best = np.flatnonzero(gain >= gain.max() * (1 - 1e-9))
            period, shift = float(np.median(p[best])), float(np.median(s[best]))
            if not np.isclose(gain[best], gain.max()).all() or len(best) > 1:
                near = best[np.argmin(np.abs(p[best, 0] - period) / period + np.abs(s[best, 0] - shift) / period)]
                period, shift = float(p[near, 0]), float(s[near, 0])
            spread, phase = spread / 8, phase / 8
        column = _square(x, np.array(period), np.array(shift))
        text = f"np.where(np.sin(2 * np.pi * (x - {shift!r}) / {period!r}) > 0, 1.0, -1.0)"
        yield _made(f"a square wave of period {period:.4g}", ["1.0", text], [np.ones_like(x), column], 2)


def _boxes(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    """A box around zero: its half width from the places between points."""
    size = np.unique(np.abs(x))
    halves = (size[1:] + size[:-1]) / 2
    halves = halves[halves <= _HALF / 2]
    if len(halves) == 0:
        return
    columns = 1.0 * (np.abs(x)[None, :] <= halves[:, None])
    half = float(halves[int(np.argmin(_safe(_with_one(columns), y)))])
    text = f"(np.abs(x) <= {half!r})"
    yield _made(
        f"a box around zero, {2 * half:.4g} wide", ["1.0", text], [np.ones_like(x), 1.0 * (np.abs(x) <= half)], 1
    )


def _rationals(x: np.ndarray, y: np.ndarray) -> Iterator[_Candidate]:
    """Fractions of polynomials, below of degree 1 to 5, above of one less: N - y D = 0, weighted by 1 / |D| again and again."""
    scale = 8.0
    z, size = x / scale, max(float(np.abs(y).max()), 1e-300)
    t = y / size
    for degree in range(1, 6):
        powers = z[:, None] ** np.arange(degree + 1)
        weights = np.ones_like(x)
        below = np.zeros(degree + 1)
        for _ in range(6):
            system = np.hstack([powers[:, :-1], -t[:, None] * powers]) * weights[:, None]
            norms = np.linalg.norm(system, axis=0)
            norms[norms == 0] = 1.0
            solution = np.linalg.svd(system / norms, full_matrices=False)[2][-1] / norms
            below = solution[degree:]
            values = np.abs(powers @ below)
            weights = 1 / np.maximum(values, 1e-12 * values.max() + 1e-300)
            weights /= weights.max()
        above = solution[:degree]
        column = (powers[:, :-1] @ above) / (powers @ below)
        text = f"np.polyval({above[::-1].tolist()!r}, x / {scale}) / np.polyval({below[::-1].tolist()!r}, x / {scale})"
        yield _made(
            f"a fraction of polynomials, below of degree {degree}", ["1.0", text], [np.ones_like(x), column], 2 * degree
        )


def _composed(x: np.ndarray, shapes: list[_Candidate]) -> Iterator[_Candidate]:
    """Sums and products of two: a polynomial with a step, a bend, a box, a square wave or rounding, and those with each other."""
    above, one = 1.0 * (x > 0), np.ones_like(x)
    bend, up, down = np.maximum(x, 0), np.ceil(x), np.floor(x)
    parts = [
        ("a step at zero", "(x > 0)", above, 0), ("a bend at zero", "np.maximum(x, 0)", bend, 0),
        ("x rounded up", "np.ceil(x)", up, 0), ("x rounded down", "np.floor(x)", down, 0),
        *((shape.words, shape.texts[1], shape.columns[:, 1], shape.inner) for shape in shapes),
    ]  # fmt: skip
    for name, text, column, inner in parts:
        for degree in range(1, 6):
            texts, powers = _powers(x, degree)
            times = [f"{text} * ({power})" for power in texts]
            products = [column * power for power in powers]
            words = f"a polynomial of degree {degree}"
            yield _made(f"{words} plus {name}", [*texts, text], [*powers, column], inner)
            if name == "a step at zero":  # scaled and shifted, so that the polynomial alone is there below zero
                yield _made(f"{words}, times {name}", [*texts, *times], [*powers, *products])
            elif name == "a bend at zero":
                yield _made(f"{words}, times {name}", [*texts[1:], *times], [*powers[1:], *products])
            else:
                yield _made(f"{words} times {name}", ["1.0", *times], [one, *products], inner)
        if inner:
            with_step = [one, column, above, column * above]
            yield _made(f"{name} and a step at zero", ["1.0", text, "(x > 0)", f"{text} * (x > 0)"], with_step, inner)
            with_bend = [one, column, x, bend, column * x, column * bend]
            texts = ["1.0", text, "x", "np.maximum(x, 0)", f"{text} * x", f"{text} * np.maximum(x, 0)"]
            yield _made(f"{name} and a bend at zero", texts, with_bend, inner)
            for words, rounded, values in (("up", "np.ceil(x)", up), ("down", "np.floor(x)", down)):
                yield _made(f"{name} plus x rounded {words}", ["1.0", text, rounded], [one, column, values], inner)
    for words, rounded, values in (("up", "np.ceil(x)", up), ("down", "np.floor(x)", down)):
        yield _made(
            f"x rounded {words}, above and below zero",
            ["1.0", rounded, "(x > 0)", f"{rounded} * (x > 0)"],
            [one, values, above, values * above],
        )
    rounded = {"np.ceil(x)": up, "np.floor(x)": down}
    rounded |= {f"{a} * {b}": rounded[a] * rounded[b] for a in list(rounded) for b in list(rounded) if a <= b}
    yield _made("a product or a sum of two roundings of x", ["1.0", *rounded], [one, *rounded.values()])
