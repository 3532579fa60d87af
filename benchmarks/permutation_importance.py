"""Permutation importance on the log-loss of a torch network, beside scikit-learn's on the same network, wrapped.

Every column, two repeats, the same rows. Ours updates the first layer's output for the one column that changed; scikit-learn
asks the network for the whole table each time.
agreement: correlation of the two. Besides, the whole fit of an explainer on 20,000 columns.

Run: OMP_NUM_THREADS=1 python benchmarks/permutation_importance.py [PATH]     writes permutation_importance.json beside this file
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.inspection import permutation_importance
from torch import nn

from theodolite.core.memory import peak_memory
from theodolite.explanations.surrogate import SurrogateExplainer

ROWS, COLUMNS, WIDE, HIDDEN, REPEATS = 500, 500, 20_000, 32, 2


class Wrapped(ClassifierMixin, BaseEstimator):
    """The network as a scikit-learn classifier."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.classes_ = np.array([0, 1])

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Wrapped":
        """Nothing: the network is trained already."""
        return self

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Probabilities of both classes."""
        with torch.no_grad():
            return self.net(torch.as_tensor(x, dtype=torch.float32)).softmax(dim=1).double().numpy()

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The more probable class."""
        return self.predict_proba(x).argmax(axis=1)


def network(columns: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)).eval()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = network(COLUMNS)
    with torch.no_grad():  # columns that matter to very different degrees, so that there is something to agree about
        net[0].weight.mul_(torch.as_tensor(rng.lognormal(0, 1.5, COLUMNS), dtype=torch.float32))
    x = rng.standard_normal((2 * ROWS, COLUMNS)).astype(np.float32).astype(np.float64)
    wrapped = Wrapped(net)
    y = wrapped.predict(x)
    ours = SurrogateExplainer(k=5, scores=("permutation",), repeats=REPEATS, seed=0)
    ours.fit(net, x[:50], x[50:100])  # the first call of each imports and allocates
    permutation_importance(wrapped, x[:50, :], y[:50], scoring="neg_log_loss", n_repeats=1, max_samples=10)
    began = time.process_time()
    ours.fit(net, x[:ROWS], x[ROWS:], y[ROWS:])
    mine = time.process_time() - began
    began = time.process_time()
    peer = permutation_importance(
        wrapped, x[ROWS:], y[ROWS:], scoring="neg_log_loss", n_repeats=REPEATS, random_state=0
    )
    theirs = time.process_time() - began
    value = ours.importance_["permutation"].to_numpy()
    wide = rng.standard_normal((2 * ROWS, WIDE), dtype=np.float32)
    big = network(WIDE)
    began = time.process_time()
    with peak_memory() as peak:
        SurrogateExplainer(k=15, seed=0).fit(big, wide[:ROWS], wide[ROWS:])
    whole = time.process_time() - began
    result = {
        "name": f"permutation importance of {COLUMNS} columns, {ROWS} rows, {REPEATS} repeats, one core",
        "peers": {"scikit-learn": sklearn.__version__},
        "ratios": {"scikit-learn / ours (a whole fit, its tree included)": round(theirs / mine, 1)},
        "wanted": {"scikit-learn / ours": ">= 5", f"a fit on {WIDE:,} columns": "<= 10 s"},
        "cpu seconds": {
            "ours": round(mine, 3),
            "scikit-learn": round(theirs, 3),
            f"fit on {WIDE:,} columns": round(whole, 2),
        },
        "agreement": {
            "correlation": round(float(np.corrcoef(value, peer.importances_mean)[0, 1]), 4),
        },
        "peak gigabytes beyond the data": None if peak.bytes is None else round(peak.bytes / 1e9, 2),
        "command": "OMP_NUM_THREADS=1 python benchmarks/permutation_importance.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
