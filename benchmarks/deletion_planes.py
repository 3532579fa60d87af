"""Exact cutting planes for deletion-robust counterfactuals, beside the search of the paper's code, and their size.

Peer: the paper's code minimises relu(-f(x'))^2 + m |x' - x| with Adam (0.5) for one plane that is fixed at the query, and
searches m by doubling, halving and bisection. There is no package of it; the search is written again in
`theodolite.reproductions.explanations_under_deletion.adam_search` (numpy, at most 2,000 steps for each of 16 multipliers; the
original allows 100,000 in torch, so the ratio here is a floor).
ellice (`pip install ellice`) keeps a point accepted for all models of about the same loss (an ellipsoid), which says nothing of
rows but holds for deletions too; it is given the same logistic regression and rows, all within the ranges of the training rows.

Run: THEODOLITE_DATA=FOLDER python benchmarks/deletion_planes.py [PATH]      writes deletion_planes.json beside this file, or PATH
"""

import contextlib
import importlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from theodolite.core.influence import ExactRetrainer, LogisticInfluence
from theodolite.core.memory import peak_memory
from theodolite.core.sources import find_data
from theodolite.explanations.deletion_robust import DeletionRobustCounterfactual, validity_under_deletion
from theodolite.reproductions.explanations_under_deletion import adam_search, german

ROUNDS = 9


def median_seconds(made: DeletionRobustCounterfactual, queries: np.ndarray) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        made.generate(queries)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def beside_the_search() -> dict[str, Any]:
    data = german()
    if data is None:
        return {"not run": "set THEODOLITE_DATA to a folder with rocerf/german-train.csv"}
    at_query = DeletionRobustCounterfactual(0.01, worst_set="at-factual", influence="first-order-damped")
    refreshed = DeletionRobustCounterfactual(0.01, influence="first-order-damped")
    at_query.fit(data.x, data.y)
    refreshed.fit(data.x, data.y)
    rows = []
    for query in data.queries[:2]:
        tilted = np.append(query, 1)
        directions = at_query.directions_
        w = at_query.weights_ + directions[np.argsort(directions @ tilted)[: at_query.k_]].sum(axis=0)
        began = time.perf_counter()
        _, searched = adam_search(query, w)
        seconds = time.perf_counter() - began
        one, many = (median_seconds(made, query[None]) for made in (at_query, refreshed))
        robust = refreshed.generate(query[None])
        rows.append(
            {
                "cost, exact": round(float(at_query.generate(query[None]).cost[0]), 4),
                "cost, search": round(searched, 4),
                "cost, worst rows found again": round(float(robust.cost[0]), 4),
                "planes": int(robust.planes[0]),
                "ratio, search / exact, seconds": round(seconds / one),
                "ratio, search / worst rows found again, seconds": round(seconds / many),
                "exact, milliseconds": round(1000 * one, 3),
            }
        )
    return {"German credit, k = 1 %": rows}


def beside_ellice() -> dict[str, Any]:
    """The same logistic regression and rejected rows: cost, and what random and worst deletions of 1 % leave accepted."""
    data = german()
    if data is None:
        return {}
    k, w = 0.01, ExactRetrainer(data.x, data.y).weights
    result: dict[str, Any] = {}

    def judged(call: Callable[[], np.ndarray]) -> dict[str, Any]:
        with peak_memory() as peak:
            began = time.perf_counter()
            points = call()
            taken = time.perf_counter() - began
        # ellice hands back the row itself where it finds nothing
        there = np.nan_to_num(points @ w[:-1] + w[-1], nan=-1.0) > 0
        points = np.where(there[:, None], points, np.nan)
        return {
            "accepted": f"{int(there.sum())} of {len(points)}",
            "L2 cost": round(float(np.nanmean(np.linalg.norm(points - data.queries, axis=1))), 3)
            if there.any()
            else None,
            "accepted after random deletions": round(
                float(validity_under_deletion(points, data.x, data.y, k, draws=20).mean()), 3
            ),
            "accepted after the worst deletion": round(
                float(validity_under_deletion(points, data.x, data.y, k, "worst").mean()), 3
            ),
            "milliseconds a row, fit included": round(1000 * taken / len(points), 2),
            "peak MiB": None if peak.bytes is None else round(peak.bytes / 2**20, 1),
        }

    inside: Any = {
        "bounds": (data.x.min(axis=0), data.x.max(axis=0))
    }  # ellice keeps to the ranges of the training rows
    for name, made in (
        ("closest", DeletionRobustCounterfactual(0, **inside)), ("robust", DeletionRobustCounterfactual(k, **inside)),
        ("verified", DeletionRobustCounterfactual(k, verify=True, **inside)),
    ):  # fmt: skip
        result[name] = judged(
            lambda made=made: (
                made.fit(data.x, data.y).generate(np.clip(data.queries, *inside["bounds"])).counterfactuals
            )
        )
    try:
        peer: Any = importlib.import_module("ellice")
    except ImportError:
        return result | {"ellice": "not installed here: pip install ellice"}
    names = [f"x{i}" for i in range(data.x.shape[1])]
    head = nn.Linear(len(names), 1)
    with torch.no_grad():
        head.weight[:], head.bias[:] = torch.as_tensor(w[None, :-1]), torch.as_tensor(w[-1:])
    frame = pd.DataFrame(data.x, columns=pd.Index(names)).assign(label=data.y)
    rows = pd.DataFrame(data.queries, columns=pd.Index(names))
    differences: dict[float, float] = {}
    for epsilon in (0.0001, 0.001, 0.01):

        def theirs(epsilon: float = epsilon) -> np.ndarray:
            model = nn.Sequential(nn.Identity(), head)
            explainer = peer.Explainer(model, peer.Data(frame, "label"), backend="pytorch", device="cpu")
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = explainer.generate_counterfactuals(
                    rows, method="continuous", robustness_epsilon=epsilon, progress_bar=False, return_probs=True
                )
            differences[epsilon] = _of_worst_logits(data, w, epsilon, found, names)
            return found.set_index("original_index").reindex(rows.index)[names].to_numpy(dtype=np.float64)

        told = judged(theirs)
        result[f"ellice, epsilon {epsilon:g}"] = told | {
            "its worst logit against ours, difference": differences[epsilon]
        }
    return result


def _of_worst_logits(data: Any, w: np.ndarray, epsilon: float, found: pd.DataFrame, names: list[str]) -> float:
    """ellice's worst logit is f - |x~|, by the inverse of H / (2 epsilon): with the H of `LogisticInfluence` it is the same."""
    h = LogisticInfluence(data.x, data.y, w, np.full(len(w), 1e-4)).hessian  # 1e-4 and 1e-6: what ellice adds to it
    tilted = np.column_stack([found[names].to_numpy(dtype=np.float64), np.ones(len(found))])
    inverse = np.linalg.inv(h / (2 * epsilon) + 1e-6 * np.eye(len(w)))
    ours = tilted @ w - np.sqrt(np.einsum("ij,jk,ik->i", tilted, inverse, tilted))
    p = found["worst_case_prob_target"].to_numpy(dtype=np.float64)
    return float(np.abs(ours - np.log(p / (1 - p))).max())


def retraining() -> dict[str, Any]:
    """One retraining without 8 rows by Newton's method from the weights of all rows, beside scikit-learn's from scratch."""
    data = german()
    if data is None:
        return {}
    from sklearn.linear_model import LogisticRegression

    made, rows, kept = ExactRetrainer(data.x, data.y), np.arange(8), np.arange(8, len(data.y))
    times: dict[str, list[float]] = {"newton": [], "lbfgs": []}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        w = made.without(rows)
        times["newton"].append(time.perf_counter() - began)
        began = time.perf_counter()
        peer = LogisticRegression(tol=1e-8, max_iter=5000).fit(data.x[kept], data.y[kept])
        times["lbfgs"].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "ratio, scikit-learn (lbfgs, tol 1e-8) / ours, seconds": round(medians["lbfgs"] / medians["newton"], 2),
        "largest difference of a weight": float(np.abs(w[:-1] - peer.coef_[0]).max()),
    }


def at_size() -> dict[str, Any]:
    """200 queries on Adult (36,177 rows), k = 5 %, without retraining."""
    path = find_data("rocerf/adult-train.csv")
    if path is None:
        return {"not run": "set THEODOLITE_DATA to a folder with rocerf/adult-train.csv"}
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    x, y = table[:, :-1], table[:, -1].astype(np.int64)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    began = time.perf_counter()
    made = DeletionRobustCounterfactual(0.05).fit(x, y)
    fitted = time.perf_counter() - began
    queries = x[x @ made.weights_[:-1] + made.weights_[-1] < 0][:200]
    began, cpu = time.perf_counter(), time.process_time()
    found = made.generate(queries)
    return {
        "rows": len(y),
        "queries": len(queries),
        "valid": int(found.valid.sum()),
        "planes, at most": int(found.planes.max()),
        "seconds to fit": round(fitted, 3),
        "seconds for all queries": round(time.perf_counter() - began, 3),
        "seconds of the processor for all queries": round(time.process_time() - cpu, 3),
    }


def main() -> None:
    result = {
        "name": "deletion-robust counterfactuals by exact cutting planes, one core",
        "peer": "the search of the paper's code, written again; ellice where installed; scikit-learn for retraining",
        "search": beside_the_search(),
        "German credit, k = 1 %, beside ellice": beside_ellice(),
        "retraining": retraining(),
        "Adult, k = 5 %": at_size(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/deletion_planes.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
