"""Answers by the Frechet mean, beside a matrix product over all labels, scikit-learn's argmax and hiclass.

Peers: a dense product of probabilities and all squared distances, which is how the rule is usually written; scikit-learn,
whose classifiers answer by argmax; hiclass (`pip install hiclass`), which trains a classifier at every inner node of a label
tree and cannot use a model that was trained before. Where hiclass is not installed the file says so.

Run: python benchmarks/frechet_answers.py [PATH]      writes frechet_answers.json beside this file, or PATH
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from theodolite.predictions.label_geometry import FrechetPredictor, LabelMetric, random_tree_metric

ROUNDS, ROWS = (5, 60), 200
SIZES = ((1000, 100), (1000, 500), (1000, 1000), (20_000, 100), (20_000, 2000), (20_000, 5000))


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of each call, taken in turns so that other load hits all alike; quick calls more often."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < ROUNDS[0] or (
        time.perf_counter() - began < 1 and len(next(iter(times.values()))) < ROUNDS[1]
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def dense_answers(p: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """The rule as one product over all labels."""
    return (p @ squared).argmin(axis=1)


def ours_after(model: Any, made: FrechetPredictor, x: np.ndarray) -> np.ndarray:
    """The rule behind a model that was trained before."""
    return made.predict(model.predict_proba(x))


def on_random_trees() -> dict[str, dict[str, float]]:
    """Answers on random trees by the predictor and by the matrix product, whose distances are there beforehand."""
    found = {}
    for size, observed in SIZES:
        rng = np.random.default_rng(0)
        metric = random_tree_metric(range(size))
        kept = rng.choice(size, observed, replace=False)
        p = rng.dirichlet(np.full(observed, 10 / observed), size=ROWS)
        squared = metric.squared(kept)
        made = FrechetPredictor(metric, kept)
        taken = milliseconds({"ours": partial(made.predict_indices, p), "dense": partial(dense_answers, p, squared)})
        same = float((made.predict_indices(p) == dense_answers(p, squared)).mean())
        found[f"{size:,} labels, {observed:,} observed"] = {
            "ours / dense product": round(taken["ours"] / taken["dense"], 4),
            "ours, microseconds a row": round(1000 * taken["ours"] / ROWS, 2),
            "dense, microseconds a row": round(1000 * taken["dense"] / ROWS, 2),
            "same answers": same,
        }
    return found


def beside_classifiers() -> dict[str, Any]:
    """Ten digits under a tree of their names (0-1, 2-4, 5-7, 8-9; low and high): seconds, and squared tree distance."""
    groups = {0: "0-1", 1: "0-1", 2: "2-4", 3: "2-4", 4: "2-4", 5: "5-7", 6: "5-7", 7: "5-7", 8: "8-9", 9: "8-9"}
    half = {"0-1": "low", "2-4": "low", "5-7": "high", "8-9": "high"}
    edges = [("all", "low"), ("all", "high"), *((half[g], g) for g in half), *((groups[d], str(d)) for d in groups)]
    metric = LabelMetric.from_edges(edges, [str(d) for d in range(10)])
    x, y = load_digits(return_X_y=True)
    names = y.astype(str)
    x_train, x_test, y_train, y_test = train_test_split(x, names, test_size=0.5, random_state=0, stratify=y)
    truth = metric.index(y_test)

    def squared(answers: Any) -> float:
        return round(float(metric.squared_pairs(truth, metric.index(answers)).mean()), 3)

    result: dict[str, Any] = {}
    for title, kept in (("10 of 10 digits observed", range(10)), ("5 of 10 digits observed", (0, 3, 4, 6, 9))):
        rows = np.isin(y_train, [str(d) for d in kept])
        began = time.perf_counter()
        flat = LogisticRegression(max_iter=3000).fit(x_train[rows], y_train[rows])
        trained = time.perf_counter() - began
        made = FrechetPredictor.from_estimator(flat, metric)
        taken = milliseconds({"argmax": partial(flat.predict, x_test), "ours": partial(ours_after, flat, made, x_test)})
        one: dict[str, Any] = {
            "seconds": {
                "training the flat model": round(trained, 3),
                "argmax": round(taken["argmax"] / 1000, 5),
                "ours, on the same model": round(taken["ours"] / 1000, 5),
            },
            "mean squared tree distance": {
                "argmax": squared(flat.predict(x_test)),
                "ours": squared(made.predict(flat.predict_proba(x_test))),
            },
            "ratio, ours / argmax, seconds": round(taken["ours"] / taken["argmax"], 2),
        }
        peer = hierarchical()
        if peer is not None:
            paths = np.array([[half[groups[int(d)]], groups[int(d)], d] for d in y_train[rows]])
            began = time.perf_counter()
            model = peer(LogisticRegression(max_iter=3000)).fit(x_train[rows], paths)
            answers = [str(path[-1]) for path in model.predict(x_test)]
            seconds = time.perf_counter() - began
            one["seconds"]["hiclass, training and answers"] = round(seconds, 3)
            one["mean squared tree distance"]["hiclass"] = squared(answers)
            one["ratio, ours / hiclass, seconds to answers from a trained flat model"] = round(
                taken["ours"] / 1000 / seconds, 5
            )
        result[title] = one
    return result


def hierarchical() -> Any:
    try:
        package: Any = importlib.import_module("hiclass")
    except ImportError:
        return None
    return package.LocalClassifierPerParentNode


def main() -> None:
    result = {
        "name": "answers by the Frechet mean, one core",
        "peer": "dense matrix product (numpy); scikit-learn's argmax; hiclass"
        + ("" if hierarchical() is not None else " (not installed here: pip install hiclass)"),
        "random trees": on_random_trees(),
        "digits": beside_classifiers(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/frechet_answers.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
