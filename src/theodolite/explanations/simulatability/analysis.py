"""What each explanation adds to the share of right predictions, with intervals over readers and items.

    effect_m = Post_m - Pre_m,   Pre_m = pooled + B (mean_m - pooled),   B = max(0, 1 - s^2 / var_m(mean_m))

Before treatment all readers see the same, so differences of Pre between methods are noise by design: its estimate is partially
pooled, with s^2 the sampling variance of a method's mean and B from moments (in place of the paper's mixed model, which has no
singular fits to discard). Intervals: readers within methods and items across methods are drawn again, by counts.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 4.4, Appendix C).
"""

__all__ = ["effects", "rating_effect"]

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks

_USERS, _ITEMS = 3, 8


def effects(responses: pd.DataFrame, draws: int = 10_000, seed: int = 0, *, balanced: bool = False) -> pd.DataFrame:
    """Effect of each method in each test: columns method, test, n, pre, effect, low, high, p.

    responses: columns user, item, method, test, pre, post, model, of `run` or `import_responses`; an answer is right where it
    equals ``model``. Pairs with a missing answer are left out. low, high: 95 % percentile interval. p: share of the draws,
    centred, at least as far from 0 as the effect. balanced: one more test "both", the mean of the tests with equal weight.
    For a part of the study (one domain, some readers) give that part.

    Raises ValueError (DataError) for fewer than 3 readers or 8 items in a cell, where no interval could be told.

    >>> rng = np.random.default_rng(0)
    >>> table = pd.DataFrame([(u, i, m, "forward") for m in "ab" for u in range(9) for i in range(16)],
    ...     columns=["user", "item", "method", "test"]).assign(model=1, pre=lambda t: rng.random(len(t)) < 0.6, post=1)
    >>> effects(table, 500).round(2)[["method", "n", "effect"]].values.tolist()
    [['a', 144, 0.46], ['b', 144, 0.46]]
    """
    if draws < 100:
        raise InputError(f"need at least 100 draws, got {draws}")
    table = _complete(responses)
    rng = np.random.default_rng(seed)
    out, drawn = [], {}
    for test, part in table.groupby("test", sort=True):
        methods = sorted(part["method"].unique())
        items = np.unique(part["item"].to_numpy())
        counts = _counts(rng, draws, len(items))
        pre, post = np.empty((len(methods), draws + 1)), np.empty((len(methods), draws + 1))
        sizes = []
        for m, method in enumerate(methods):
            own: Any = part[part["method"] == method]
            users = np.asarray(own["user"].unique())
            if len(users) < _USERS or own["item"].nunique() < _ITEMS:
                raise DataError(
                    f"{method}, {test}: {len(users)} readers and {own['item'].nunique()} items; an interval needs at least "
                    f"{_USERS} and {_ITEMS}"
                )
            sizes.append(len(own))
            before, after, mask = _grids(own, users, items)
            mine = _counts(rng, draws, len(users))
            total = _weigh(mask, mine, counts)
            pre[m], post[m] = _weigh(before, mine, counts) / total, _weigh(after, mine, counts) / total
        started = _pooled(pre)
        change = post - started
        for m, method in enumerate(methods):
            drawn.setdefault(method, []).append((sizes[m], started[m], change[m]))
            out.append(_row(method, str(test), sizes[m], started[m], change[m]))
    if balanced:
        for method, parts in drawn.items():
            n = sum(size for size, *_ in parts)
            started, change = (np.mean([one[k] for one in parts], axis=0) for k in (1, 2))
            out.append(_row(method, "both", n, started, change))
    return pd.DataFrame(out)


def _complete(responses: pd.DataFrame) -> pd.DataFrame:
    wanted = ["user", "item", "method", "test", "pre", "post", "model"]
    missing = [name for name in wanted if name not in responses.columns]
    if missing:
        raise InputError(f"responses need the columns {wanted}; missing: {missing}")
    table = responses.dropna(subset=["pre", "post", "model"])
    if not len(table):
        raise DataError("no reader answered both before and after; there is nothing to estimate")
    if table.duplicated(["user", "item", "method", "test"]).any():
        raise DataError("a reader answered an item of a method and test twice; keep one of the rows")
    return table.assign(
        before=(table["pre"] == table["model"]).astype(float), after=(table["post"] == table["model"]).astype(float)
    )


def _counts(rng: np.random.Generator, draws: int, n: int) -> Float[np.ndarray, "draw one"]:
    """How often each of n comes in each draw; the first row is the sample itself."""
    return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=draws)])


def _grids(own: pd.DataFrame, users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    place = (pd.Index(users).get_indexer(pd.Index(own["user"])), np.searchsorted(items, own["item"].to_numpy()))
    grids = np.zeros((3, len(users), len(items)))
    for grid, values in zip(grids, (own["before"], own["after"], 1.0), strict=True):
        grid[place] = values
    return grids[0], grids[1], grids[2]


def _weigh(grid: np.ndarray, users: np.ndarray, items: np.ndarray) -> Float[np.ndarray, " draw"]:
    return np.einsum("di,di->d", users @ grid, items)


def _pooled(pre: Float[np.ndarray, "method draw"]) -> Float[np.ndarray, "method draw"]:
    if len(pre) < 2:
        return pre
    own = pre - np.nanmean(pre, axis=0)  # the items' common share of the noise is in all methods alike
    sampling = np.nanvar(own[:, 1:], axis=1).mean() * len(pre) / (len(pre) - 1)
    between = pre[:, 0].var(ddof=1)
    shrink = max(0.0, 1 - sampling / between) if between > 0 else 0.0
    return np.nanmean(pre, axis=0) + shrink * own


def _row(method: str, test: str, n: int, pre: np.ndarray, change: np.ndarray) -> dict[str, object]:
    value, spread = float(change[0]), change[1:][np.isfinite(change[1:])]
    low, high = np.quantile(spread, [0.025, 0.975])
    far = np.abs(spread - spread.mean()) >= abs(value) - 1e-12
    return {
        "method": method, "test": test, "n": n, "pre": float(pre[0]), "effect": value,
        "low": float(min(low, value)), "high": float(max(high, value)), "p": float(far.mean()),
    }  # fmt: skip


def rating_effect(responses: pd.DataFrame, draws: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Whether explanations that readers rate higher help more: per method and "all", columns method, n, slope, low, high, p.

    slope: of a logistic regression of a right answer after explanations on the rating (1 to 7), log-odds a point; interval and
    p as in `effects`. Rows without a rating are left out. Raises DataError where none is left, or all ratings are equal.
    """
    if "rating" not in responses.columns:
        raise InputError("responses need a column rating")
    table: Any = _complete(responses).dropna(subset=["rating"])
    if not len(table) or table["rating"].nunique() < 2:
        raise DataError("no two different ratings; simulated readers do not rate, people do (export_forms)")
    rng, out = np.random.default_rng(seed), []
    parts = [("all", table), *table.groupby("method", sort=True)]
    for name, own in parts:
        if own["rating"].nunique() < 2:
            continue
        levels, level = np.unique(own["rating"].to_numpy(dtype=np.float64), return_inverse=True)
        users, user = np.unique(own["user"].astype(str) + "\0" + own["method"].astype(str), return_inverse=True)
        items, item = np.unique(own["item"].astype(str), return_inverse=True)
        if len(users) < _USERS or len(items) < _ITEMS:
            raise DataError(f"{name}: {len(users)} readers and {len(items)} items; need at least {_USERS} and {_ITEMS}")
        weight = _counts(rng, draws, len(users)), _counts(rng, draws, len(items))
        right, total = np.zeros((draws + 1, len(levels))), np.zeros((draws + 1, len(levels)))
        after = own["after"].to_numpy()
        member = np.eye(len(levels))[level]
        for part in chunks(draws + 1, 24.0 * len(own)):
            w = weight[0][part][:, user] * weight[1][part][:, item]
            total[part], right[part] = w @ member, (w * after) @ member
        slopes = _slopes(levels, right, total)
        row = _row(str(name), "", len(own), np.zeros(1), slopes)
        out.append({"method": name, "n": len(own), "slope": row["effect"]} | {k: row[k] for k in ("low", "high", "p")})
    return pd.DataFrame(out)


def _slopes(
    levels: Float[np.ndarray, " level"], right: Float[np.ndarray, "draw level"], total: Float[np.ndarray, "draw level"]
) -> Float[np.ndarray, " draw"]:
    """Newton's method for all draws at once, with a ridge of 0.01 on the slope so that separated draws have an end."""
    x = levels - levels.mean()
    a, b = np.zeros(len(right)), np.zeros(len(right))
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * x, -30, 30)))
        g0, g1 = (right - total * p).sum(1) - 0.01 * a, ((right - total * p) * x).sum(1) - 0.01 * b
        h = total * p * (1 - p)
        h00, h01, h11 = h.sum(1) + 0.01, (h * x).sum(1), (h * x * x).sum(1) + 0.01
        det = h00 * h11 - h01**2
        a, b = (
            a + np.clip((h11 * g0 - h01 * g1) / det, -2, 2),
            b + np.clip((h00 * g1 - h01 * g0) / det, -2, 2),
        )
    return b
