"""Claims of Kang et al., 2023, arXiv:2307.02460, on pen digits, scikit-learn's digits and exact examples."""

__all__ = ["claims"]

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from theodolite.core.estimate import Estimate, mean_of_runs
from theodolite.core.parallel import seeds_for
from theodolite.core.sources import find_data
from theodolite.data.transport_scaling import (
    Source,
    TransportScaling,
    choose_form,
    dataset_transport,
    label_distances,
    mix_gradient,
    project,
)
from theodolite.data.transport_scaling.forms import FORMS, FORMS_WITHOUT_TRANSPORT, Law
from theodolite.data.transport_scaling.tables import PilotTable, Pool, make_table, train_and_score
from theodolite.data.transport_scaling.transport import distances
from theodolite.reproductions.claim import Claim, Comparator, Scale

_PEN = "tables/pendigits.csv"
_WITH = ("ot", "pl", "pq_notebook", "pq", "ot_root")
_POLYNOMIALS = ("linear", "quadratic", "quadratic_cross")
_VALIDATION, _TARGET = 1500, 400
_MIXES = ((0.34, 0.33, 0.33), (0.6, 0.2, 0.2), (0.2, 0.2, 0.6))


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick runs take fewer repetitions and a coarser grid."""
    quick = scale is Scale.QUICK
    name, X, y = _data()
    seeds = seeds_for(seed, 1 if quick else 3)
    studies = [_study(X, y, one, quick) for one in seeds]
    yield from _extrapolates(studies, name)
    yield _interpolates(studies, name, seed)
    yield _tracks(studies, [_noisy_study(X, y, one, quick) for one in seeds], name)
    yield _gradient(seed)
    yield from _exact(seed)
    yield _identity()
    yield _projects(X, y, seeds_for(seed + 1, 1 if quick else 3), name, quick)
    yield from _selects(X, y, seeds_for(seed + 2, 1 if quick else 3), name, quick)


def _data() -> tuple[str, np.ndarray, np.ndarray]:
    path = find_data(_PEN)
    if path is None:
        digits: Any = load_digits()
        return f"scikit-learn's digits ({_PEN} is not in the folder THEODOLITE_DATA)", digits.data / 16, digits.target
    table = np.genfromtxt(path, delimiter=",", skip_header=1)[:, 1:]
    return "pen digits", table[:, :-1] / 100, table[:, -1].astype(np.int64)


def _model() -> LogisticRegression:
    return LogisticRegression(C=10, max_iter=2000)


# ---- sources


@dataclass(frozen=True, eq=False)
class _Rows:
    """Validation rows and what is left to draw sources from, row numbers."""

    X: np.ndarray
    y: np.ndarray
    validation: np.ndarray
    rest: np.ndarray

    @classmethod
    def split(cls, X: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> "_Rows":
        order = rng.permutation(len(X))
        n = min(_VALIDATION, len(X) // 3)
        return cls(X, y, order[:n], order[n:])

    def draw(self, shares: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """n rows with the given shares of the classes, each row at most once where there are enough."""
        counts = rng.multinomial(n, shares)
        parts = []
        for c, count in enumerate(counts.tolist()):
            members = rng.permutation(self.rest[self.y[self.rest] == c])
            parts.append(members[:count] if count <= len(members) else rng.choice(members, count))
        return rng.permutation(np.concatenate(parts))


def _by_class(rows: _Rows, n: int, rng: np.random.Generator) -> list[Source]:
    """Three sources: 4, 3, 3 classes heavy, every other class 1.5 %."""
    groups = np.split(rng.permutation(10), [4, 7])
    sources = []
    for name, heavy in zip("ABC", groups, strict=True):
        shares = np.full(10, 0.015)
        shares[heavy] = (1 - 0.015 * (10 - len(heavy))) / len(heavy)
        chosen = rows.draw(shares, n, rng)
        sources.append(Source(name, rows.X[chosen], rows.y[chosen]))
    return sources


def _half_and_noise(rows: _Rows, n: int, rng: np.random.Generator) -> list[Source]:
    """Two sources with half of the classes heavy each, and one with all classes and 60 % random labels."""
    sources = []
    for name, heavy in zip("AB", (range(5), range(5, 10)), strict=True):
        shares = np.full(10, 0.02)
        shares[list(heavy)] = 0.18
        chosen = rows.draw(shares, n, rng)
        sources.append(Source(name, rows.X[chosen], rows.y[chosen]))
    chosen = rows.draw(np.full(10, 0.1), n, rng)
    labels = np.where(rng.random(n) < 0.6, rng.integers(0, 10, n), rows.y[chosen])
    return [*sources, Source("noisy", rows.X[chosen], labels)]


def _fit(rows: _Rows, sources: list[Source], sizes: tuple[int, int], seed: int, step: float, n_repeats: int) -> Any:
    scaling = TransportScaling(_model(), sizes=sizes, grid_step=step, n_repeats=n_repeats, seed=seed)
    with warnings.catch_warnings():
        # real sets have a few equal rows; rows here are drawn from disjoint parts
        warnings.filterwarnings("ignore", "[0-9]+ validation rows equal", UserWarning)
        warnings.filterwarnings("ignore", "the pilot samples of", UserWarning)
        return scaling.fit(sources, rows.X[rows.validation], rows.y[rows.validation])


# ---- stage one


@dataclass(frozen=True, eq=False)
class _Tracking:
    """Correlation of distance and score over a grid of mixes, and that of a distance to validation rows with shuffled labels."""

    labels: float
    shuffled: float


@dataclass(frozen=True, eq=False)
class _Study:
    """One split of the classes into sources: tables at 200 and 300 rows, and how the distance tracks at 150 and 300."""

    extrapolated: PilotTable
    interpolated: PilotTable
    tracking: list[_Tracking]


def _errors(table: PilotTable, fitted: np.ndarray) -> dict[str, float]:
    """Mean absolute error in points on mixes that were not fitted, by form."""
    p, far, score = table.p, table.transport, table.score
    out = {}
    for form in (*FORMS, "forest"):
        law = Law.fit(form, p[fitted], far[fitted], score[fitted])
        out[form] = 100 * float(np.abs(law(p[~fitted], far[~fitted]) - score[~fitted]).mean())
    out["auto"] = out[choose_form(p[fitted], far[fitted], score[fitted])]
    return out


def _study(X: np.ndarray, y: np.ndarray, seed: int, quick: bool) -> _Study:
    rng, n_repeats = np.random.default_rng(seed), 2 if quick else 3
    rows = _Rows.split(X, y, rng)
    fitted = _fit(rows, _by_class(rows, 600, rng), (150, 300), seed, 0.125 if quick else 0.1, n_repeats)
    one, two = fitted.tables_
    middle = make_table(fitted.pool_, _model(), "accuracy", one.p, 200, n_repeats, seed=seed)
    return _Study(middle, two, _tracking(fitted, rng))


def _noisy_study(X: np.ndarray, y: np.ndarray, seed: int, quick: bool) -> list[_Tracking]:
    """How the distance tracks the score where one source has wrong labels."""
    rng = np.random.default_rng(seed)
    rows = _Rows.split(X, y, rng)
    step, n_repeats = (0.2, 2) if quick else (0.1, 3)
    return _tracking(_fit(rows, _half_and_noise(rows, 600, rng), (150, 300), seed, step, n_repeats), rng)


def _tracking(fitted: Any, rng: np.random.Generator) -> list[_Tracking]:
    pool: Pool = fitted.pool_
    wrong = rng.permutation(pool.y_val)
    centre, scale = pool.X_val.mean(axis=0), np.where(pool.X_val.std(axis=0) > 0, pool.X_val.std(axis=0), 1.0)
    a, b = (pool.X - centre) / scale, (pool.X_val[:_TARGET] - centre) / scale
    table = label_distances(b, wrong[:_TARGET], b, wrong[:_TARGET])
    cost = distances(a, b, 2) + table[np.searchsorted(np.unique(wrong), pool.y)][:, wrong[:_TARGET]]
    blind = Pool(pool.X, pool.y, pool.source, cost, pool.X_val, wrong)
    out = []
    for known in fitted.tables_:
        other = make_table(blind, _no_model, "", known.p, known.size, 1, seed=int(rng.integers(2**31)))
        found = (float(np.corrcoef(far, known.score)[0, 1]) for far in (known.transport, other.transport))
        out.append(_Tracking(*found))
    return out


def _no_model(*_: Any) -> float:
    return 0.0


def _listed(errors: dict[str, float]) -> str:
    return ", ".join(f"{form} {error:.2f}" for form, error in errors.items())


def _mean_errors(runs: list[dict[str, float]]) -> dict[str, float]:
    return {form: float(np.mean([run[form] for run in runs])) for form in runs[0]}


def _extrapolates(studies: list[_Study], name: str) -> Iterator[Claim]:
    runs = [_errors(study.extrapolated, study.extrapolated.p[:, 1] < 0.5 - 1e-9) for study in studies]
    mean = _mean_errors(runs)
    worst = max(min(mean[form] for form in _WITH), mean["auto"])
    table = studies[0].extrapolated
    spread = 100 * float(np.mean([study.extrapolated.score_runs.std(axis=1, ddof=1).mean() for study in studies]))
    draws = np.random.default_rng(0).normal(size=(100_000, table.n_repeats))
    floor = spread * float(np.abs(np.median(draws, axis=1)).mean())
    where = (
        f"{name} for CIFAR, logistic regression for a ResNet, N = {table.size}, {len(runs)} splits of the classes, "
        f"{len(table.p)} mixes; {_listed(mean)}; repetitions of one mix differ by {spread:.1f} points (standard "
        f"deviation), so that a law without error would be off by about {floor:.1f} points from their medians"
    )
    for claim, without, note in (
        (
            "transport predicts the score of unseen mixes better than the composition alone (p_2 >= 0.5 held out)",
            min(FORMS_WITHOUT_TRANSPORT, key=mean.__getitem__),
            "; a source that is split by class is known by its name, so the mix alone says as much as the distance, where a "
            "form can bend near a share of 0 (a forest, roots of the shares)",
        ),
        (
            "transport predicts the score of unseen mixes better than the paper's laws of the composition",
            min(_POLYNOMIALS, key=mean.__getitem__),
            "",
        ),
    ):
        yield Claim(
            claim,
            "by a wide margin (its tables)",
            mean_of_runs([run["auto"] for run in runs], unit="points, mean absolute error of auto", within=(0, np.inf)),
            "best form with transport, and auto, <= 0.5 x the best form without, in the mean",
            worst <= 0.5 * mean[without],
            Comparator(f"best form without transport ({without})", mean[without]),
            where + note,
        )


def _interpolates(studies: list[_Study], name: str, seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    runs = []
    for study in studies:
        n = len(study.interpolated.p)
        for _ in range(20):
            runs.append(
                _errors(study.interpolated, np.isin(np.arange(n), rng.choice(n, min(20, n // 2), replace=False)))
            )
    mean = _mean_errors(runs)
    best = min((form for form in mean if form != "auto"), key=mean.__getitem__)
    table = studies[0].interpolated
    return Claim(
        "the same between mixes that were seen: random parts of the grid",
        "pseudo-quadratic best (its tables)",
        mean_of_runs([run["auto"] for run in runs], unit="points, mean absolute error of auto", within=(0, np.inf)),
        "auto within 1.15 x of the best form of all",
        mean["auto"] <= 1.15 * mean[best],
        Comparator(f"best form ({best})", mean[best]),
        f"{name}, N = {table.size}, 20 splits of {min(20, len(table.p) // 2)} fitted mixes a study; "
        f"splits of a study share its table, so the interval is too narrow; {_listed(mean)}",
    )


def _tracks(studies: list[_Study], noisy: list[list[_Tracking]], name: str) -> Claim:
    split = [one for study in studies for one in study.tracking]
    wrong = [one for study in noisy for one in study]
    both = [one.labels for one in (*split, *wrong)]
    shuffled = float(np.mean([one.shuffled for one in wrong]))
    gain = shuffled - float(np.mean([one.labels for one in wrong]))
    return Claim(
        "the distance tracks the score over the grid",
        "its figure 2 (number not given)",
        mean_of_runs(both, unit="correlation", within=(-1, 1)),
        "<= -0.55 for every split at both sizes; weaker by >= 0.2 with shuffled validation labels, where a source has wrong ones",
        max(both) <= -0.55 and gain >= 0.2,
        Comparator("validation labels shuffled, sources with wrong labels", shuffled),
        f"{name}; N = 150 and 300; sources split by class: {_listed_pairs(split)}; one source with 60 % random labels: "
        f"{_listed_pairs(wrong)}. Shuffling takes nothing away where sources differ by class: their features and the shares of "
        "their classes are as far from the validation rows as before",
    )


def _listed_pairs(found: list[_Tracking]) -> str:
    return ", ".join(f"{one.labels:.2f} (shuffled {one.shuffled:.2f})" for one in found)


# ---- claims that hold exactly


def _gradient(seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    y = np.concatenate([rng.choice(3, 40, p=p) for p in ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))])
    v = rng.choice(3, 60, p=(0.2, 0.3, 0.5))
    X, V = (rng.normal(size=(len(labels), 4)) + 3 * np.eye(4)[labels] for labels in (y, v))
    source = np.repeat(np.arange(3), 40)
    weights = rng.uniform(1 - 1e-3, 1 + 1e-3, len(X))
    weights /= weights.sum()
    found = mix_gradient(dataset_transport(X, y, V, v, weights=weights).source_potentials, source, weights, 3)
    numeric = []
    for i in range(3):
        own, others = (np.where(mine, weights, 0) / weights[mine].sum() for mine in (source == i, source != i))
        up, down = (
            dataset_transport(X, y, V, v, weights=weights + sign * 1e-7 * (own - others)).value for sign in (1, -1)
        )
        numeric.append((up - down) / 2e-7)
    off = float((np.abs(found - numeric) / np.abs(numeric)).max())
    return Claim(
        "the gradient of the distance in the shares is exact",
        "its theorem on the gradient",
        Estimate.exact(off, "largest relative error over sources"),
        "< 1e-3 for each source",
        off < 1e-3,
        Comparator("largest derivative by central differences, step 1e-7", float(np.abs(numeric).max())),
        f"three classes in four dimensions, 120 rows to 60; ours {', '.join(f'{g:.4f}' for g in found)}",
    )


def _exact(seed: int) -> Iterator[Claim]:
    rng = np.random.default_rng(seed)
    a, b, label = rng.normal(size=200), rng.normal(1, 2, size=200), np.zeros(200)

    def line(power: float) -> float:
        return dataset_transport(a[:, None], label, b[:, None], label, lambda_y=0, power=power).value

    off = max(
        abs(line(2) - float(np.mean((np.sort(a) - np.sort(b)) ** 2))), abs(line(1) - float(wasserstein_distance(a, b)))
    )
    yield Claim(
        "the distance is exact on a line",
        "none given (a check of the implementation)",
        Estimate.exact(off, "largest difference, q = 1 and 2"),
        "<= 1e-9",
        off <= 1e-9,
        Comparator("scipy.stats.wasserstein_distance", float(wasserstein_distance(a, b))),
        "200 points each, labels off",
    )
    scales, shift = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.0, 1.0])
    one, two = rng.normal(size=(20_000, 3)), rng.normal(size=(20_000, 3)) * scales + shift
    found = float(label_distances(one, np.zeros(20_000), two, np.zeros(20_000), "gaussian")[0, 0])
    truth = float((shift**2).sum() + ((scales - 1) ** 2).sum())
    yield Claim(
        "the distance of labels with normal features is Bures' closed form",
        "none given (a check of the implementation)",
        Estimate.exact(abs(found / truth - 1), "relative error"),
        "<= 0.03",
        abs(found / truth - 1) <= 0.03,
        Comparator("closed form", truth),
        "20,000 draws from two normal distributions with diagonal covariances",
    )


def _identity() -> Claim:
    off = 0.0
    for response in ("log_error", "score"):
        off = max(off, float(np.abs(project(0.6, 0.8, 100, 300, [100, 300], response) - [0.6, 0.8]).max()))

    def law(n: float) -> float:
        return 1 + 1e-6 - 2.0 * n**-0.4

    tenfold = float(project(law(100), law(300), 100, 300, 3000))
    off = max(off, abs(tenfold - law(3000)))
    linear = float(project(law(100), law(300), 100, 300, 3000, "score"))
    return Claim(
        "the projection gives both pilot scores back, and follows a power law of the error exactly",
        "its equation 6",
        Estimate.exact(off, "largest error"),
        "<= 1e-12, at 10 x N_1 too",
        off <= 1e-12,
        Comparator("published form (linear in log N) at 10 x N_1, error", abs(linear - law(3000))),
        "error = 2 N^-0.4, N_0 = 100, N_1 = 300",
    )


# ---- stage two and selection


def _scores(rows: _Rows, sources: list[Source], p: Any, size: int, n_repeats: int, rng: np.random.Generator) -> float:
    """Mean true score at a mix of large sources."""
    found = []
    for _ in range(n_repeats):
        counts = np.floor(np.asarray(p) * size + 0.5).astype(int)
        taken = [rng.permutation(len(source.X))[:count] for source, count in zip(sources, counts)]
        X, y = (np.concatenate([getattr(source, part)[t] for source, t in zip(sources, taken)]) for part in ("X", "y"))
        found.append(train_and_score(_model(), "accuracy", X, y, rows.X[rows.validation], rows.y[rows.validation]))
    return float(np.mean(found))


def _projects(X: np.ndarray, y: np.ndarray, seeds: list[int], name: str, quick: bool) -> Claim:
    errors: dict[str, list[float]] = {"log_error": [], "score": [], "no change": []}
    outside = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = _Rows.split(X, y, rng)
        large = _by_class(rows, 2400, rng)
        for p in _MIXES:
            start, after = (_scores(rows, large, p, n, 5, rng) for n in (150, 300))
            for n in (600, 1500, 3000):
                truth = _scores(rows, large, p, n, 1 if quick else 3, rng)
                for response in ("log_error", "score"):
                    guess = float(project(start, after, 150, 300, n, response))
                    errors[response].append(100 * abs(guess - truth))
                    outside += response == "log_error" and not 0 <= guess <= 1
                errors["no change"].append(100 * abs(after - truth))
    ours, published, same = (float(np.mean(errors[key])) for key in errors)
    return Claim(
        "the projection by the log of the error is useful at 2 to 10 times the larger pilot",
        "the published form is linear in log N",
        mean_of_runs(errors["log_error"], unit="points, mean absolute error", within=(0, np.inf)),
        "<= 0.6 x that of the published form; never outside [0, 1]",
        ours <= 0.6 * published and outside == 0,
        Comparator("published form", published),
        f"{name}; N_0 = 150, N_1 = 300 (means of 5) to 600, 1,500, 3,000, three mixes, {len(seeds)} splits of the classes; no "
        f"change {same:.2f} points; a source has 2,400 rows, some of them twice",
    )


def _selects(X: np.ndarray, y: np.ndarray, seeds: list[int], name: str, quick: bool) -> Iterator[Claim]:
    size, gains, noisy, chosen, notes = 1500, [], [], [], []
    to_half, trained, most = [], 0, 0
    during: list[int] = []

    def telling(*_: Any) -> float:
        during.append(1)
        return 0.5

    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = _Rows.split(X, y, rng)
        large = _half_and_noise(rows, size, rng)
        pilot = [Source(source.name, source.X[:200], source.y[:200]) for source in large]
        fitted = _fit(rows, pilot, (100, 200), seed, 0.2 if quick else 0.1, 2 if quick else 3)
        fitted.estimator = telling
        found = fitted.select(size)
        trained, most = fitted.n_trainings_, 2 * len(fitted.tables_[0].p) * fitted.n_repeats
        repeats = 2 if quick else 5
        p = {"chosen": found.p, "uniform": np.full(3, 1 / 3), "(.5, .5, 0)": np.array([0.5, 0.5, 0.0])}
        p |= {key: found.baselines[key].p for key in ("best single source", "random", "Shapley")}
        true = {key: 100 * _scores(rows, large, mix, size, repeats, rng) for key, mix in p.items()}
        gains.append(true["chosen"] - true["uniform"])
        to_half.append(true["chosen"] - true["(.5, .5, 0)"])
        noisy.append(float(found.p[2]))
        chosen.append("/".join(f"{share:.2f}" for share in found.p) + f" by {fitted.form_}")
        notes.append(", ".join(f"{key} {value:.1f}" for key, value in true.items()))
    yield Claim(
        "selects a good mix where one source has 60 % random labels",
        "beats its baselines (tables)",
        mean_of_runs(gains, unit="points over the uniform mix"),
        "p_3 <= 0.15, true score >= uniform + 1.5 points and >= (.5, .5, 0) - 2.5, each in the mean",
        bool(np.mean(noisy) <= 0.15 and np.mean(gains) >= 1.5 and np.mean(to_half) >= -2.5),
        Comparator("share of the noisy source, mean", float(np.mean(noisy))),
        f"{name}, pilot of 200 rows a source (tables at 100 and 200), chosen for N = {size}: {'; '.join(chosen)}; true scores "
        f"{'; '.join(notes)}",
    )
    yield Claim(
        "cheaper than laws that train at the target size: selection trains nothing",
        "none given in numbers",
        Estimate.exact(trained, "trainings, all on pilot rows"),
        "<= 2 x grid x repeats, none of them in select",
        trained <= most and not during,
        Comparator("trainings of an exact Shapley value at N, with as many repeats", 7 * fitted.n_repeats),
        f"pilot trainings have at most 200 rows; the Shapley value needs groups of sources at {size:,} rows that nobody has yet",
    )
