"""T-Rex on a batch, beside the same search one row at a time, the published design, and ellice.

The loop follows the authors' code: one row, fresh draws of k = 1000 in every step, forward and backward through all of them.
ellice (`pip install ellice`) makes counterfactuals that hold for an ellipsoid of models of about the same loss; it is run on the
same network, rows and limits (immutable and one-way columns, ranges, one-hot groups), and judged by the same retrained networks.
Where it is not installed the file says so.

Run: THEODOLITE_DATA=FOLDER python benchmarks/counterfactual_loop.py [PATH]
writes counterfactual_loop.json beside this file, or PATH
"""

import contextlib
import importlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from theodolite.core.memory import peak_memory
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe
from theodolite.explanations.robust_counterfactuals import (
    Cchvae,
    ClosestCounterfactual,
    NearestNeighbour,
    Revise,
    TRex,
    TRexLatent,
    TRexNearest,
    retrain,
    robust_validity,
    train_autoencoder,
)
from theodolite.explanations.table_schema import TableSchema

ROWS, LOOPED, PEER_ROWS, STEPS, SIGMA = 100, 5, 20, 100, 0.05


def network(d: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


def one_row(net: nn.Module, base: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """The published design: STEPS steps, each with its own draws; no early stop, so that all are counted."""
    generator, x = torch.Generator().manual_seed(seed), base.clone()
    for _ in range(STEPS):
        x = x.detach().requires_grad_(True)
        around = torch.sigmoid(net(x + SIGMA * torch.randn(k, len(x), generator=generator)))[:, 0]
        here = torch.sigmoid(net(x[None]))[0, 0]
        (around.mean() - (here - around).abs().mean()).backward()
        assert x.grad is not None
        x = (x + 0.01 * x.grad / x.grad.norm().clamp_min(1e-12)).detach()
        x = (base + (x - base) * (1 / (x - base).norm().clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)
    return x


def seconds(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    out = call()
    return time.perf_counter() - began, out


def speed() -> dict[str, Any]:
    """39 columns, 100 rows, 100 steps for all of them: tau is out of reach, so no row leaves early."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(ROWS, 39))
    box = np.vstack([np.zeros(39), np.ones(39), x])
    net = network(39, 0).eval()
    with torch.no_grad():  # an untrained network is flat; steeper, it looks like a trained one
        last: Any = net[4]
        last.weight *= 10
        last.bias -= torch.quantile(net(torch.as_tensor(x).float()), 0.6)
    near = ClosestCounterfactual(steps=50, binary_search_steps=2)
    method = TRex(base=near, tau=0.9999, max_steps=STEPS, k=1000)
    method.fit(net, box)
    base_seconds, base = seconds(lambda: near.fit(net, box).generate(x))
    ours, found = seconds(lambda: method.generate(x))
    rows = torch.as_tensor(base.counterfactuals[~base.unchanged]).float()
    loop, _ = seconds(lambda: [one_row(net, row, 1000, i) for i, row in enumerate(rows[:LOOPED])])
    small, _ = seconds(lambda: [one_row(net, row, 128, i) for i, row in enumerate(rows[:LOOPED])])
    many = int((~found.unchanged).sum())
    mine = (ours - base_seconds) / many
    return {
        "rows that were searched": many,
        "steps a row, mean": float(found.steps[~found.unchanged].mean()),
        "ours, seconds for 100 rows with their base counterfactuals": round(ours, 2),
        "loop of k = 1000 / ours, seconds a row": round(loop / LOOPED / mine, 1),
        "loop of k = 128 / ours, seconds a row": round(small / LOOPED / mine, 1),
    }


def german() -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame] | None:
    """Training rows in [0, 1], their labels (1: good credit), and test rows in the same units."""
    paths = [find_data(f"rocerf/german-{part}.csv") for part in ("train", "test")]
    if paths[0] is None or paths[1] is None:
        return None
    train, test = (pd.read_csv(path) for path in paths if path is not None)
    y = train.pop("credit-risk").to_numpy()
    low, span = train.min(), (train.max() - train.min()).replace(0, 1)
    x, held = (train - low) / span, ((test[list(train.columns)] - low) / span).clip(0, 1)
    return x, y, pd.DataFrame(held)


@dataclass(frozen=True)
class Limits:
    """The same limits for both libraries: what may not change, what goes one way, one-hot groups, all within [0, 1]."""

    immutable: list[str]
    increasing: list[str]
    decreasing: list[str]
    groups: list[list[str]]

    @classmethod
    def of(cls, names: list[str]) -> "Limits":
        """Limits of the German credit table: one-hot columns are named group_member."""
        stems = sorted({name.rsplit("_", 1)[0] for name in names if "_" in name})
        groups = [[name for name in names if name.startswith(f"{stem}_")] for stem in stems]
        person = [name for name in names if name.startswith("personal-status-sex_")]
        return cls([*person, "foreign-worker", "people-liable"], ["age"], ["amount"], groups)

    def ours(self) -> dict[str, Any]:
        """As options of the generators here."""
        return {
            "immutable": self.immutable, "increasing": self.increasing, "decreasing": self.decreasing, "groups": self.groups,
            "bounds": (0.0, 1.0),
        }  # fmt: skip

    def theirs(self, names: list[str]) -> dict[str, Any]:
        """As arguments of ellice."""
        ways = dict.fromkeys(self.increasing, "increase") | dict.fromkeys(self.decreasing, "decrease")
        grouped = {name for group in self.groups for name in group}
        return {
            "features_to_vary": [name for name in names if name not in self.immutable], "one_way_change": ways,
            "permitted_range": {name: [0.0, 1.0] for name in names if name not in grouped}, "one_hot_groups": self.groups,
        }  # fmt: skip

    def broken(self, points: pd.DataFrame, rows: pd.DataFrame) -> int:
        """Points that break one of the limits by more than rounding in single precision."""
        move, near = points - rows, 1e-5
        bad = (move[self.immutable].abs() > near).any(axis=1) | (move[self.increasing] < -near).any(axis=1)
        bad |= (move[self.decreasing] > near).any(axis=1) | ((points < -near) | (points > 1 + near)).any(axis=1)
        for group in self.groups:
            bad |= (points[group].sum(axis=1) - 1).abs() > near
            bad |= (points[group].sub(points[group].round()).abs() > near).any(axis=1)
        return int(bad.sum())


def beside_ellice() -> dict[str, Any]:
    """German credit: the same network, rows, limits and 8 retrained networks for both libraries."""
    data = german()
    if data is None:
        return {"not run": "set THEODOLITE_DATA to a folder with rocerf/german-train.csv"}
    train, y, test = data
    names = [str(name) for name in train.columns]
    limits, recipe = Limits.of(names), Recipe(epochs=50, batch_size=64, schedule="constant")
    base, *retrained = retrain(lambda seed: network(len(names), seed), train, y, 9, recipe=recipe, seed=0)
    with torch.no_grad():
        refused = (base(torch.as_tensor(test.to_numpy()).float())[:, 0] < 0).numpy()
    rows = test[refused].head(PEER_ROWS).reset_index(drop=True)

    def judged(call: Any) -> tuple[dict[str, Any], pd.DataFrame]:
        """What a method did: ``call`` gives points for all rows, NaN where it found none."""
        with peak_memory() as peak:
            taken, points = seconds(call)
        there = points.notna().all(axis=1)
        there &= (
            robust_validity(points.to_numpy(), [base]) == 1
        )  # ellice hands back the row itself where it finds nothing
        kept = points[there]
        told = {
            "rows with a counterfactual": f"{int(there.sum())} of {len(rows)}",
            "that break a limit": limits.broken(kept, rows.loc[there]),
            "L2 cost": round(float(np.linalg.norm(kept - rows.loc[there], axis=1).mean()), 3) if len(kept) else None,
            "robust validity": round(float(robust_validity(kept.to_numpy(), retrained).mean()), 3)
            if len(kept)
            else None,
            "seconds a row": round(taken / len(rows), 4),
            "peak MiB": None if peak.bytes is None else round(peak.bytes / 2**20, 1),
        }
        return told, points

    coder = train_autoencoder(TableSchema.of(train, **limits.ours()), train)
    latent: dict[str, Any] = limits.ours() | {"autoencoder": coder}
    methods: dict[str, Any] = {
        "closest": ClosestCounterfactual(**limits.ours()), "nearest row": NearestNeighbour(**limits.ours()),
        **{f"T-Rex {tau}": TRex(tau=tau, **limits.ours()) for tau in (0.75, 0.9, 0.97)},
        "T-Rex:NN 0.75": TRexNearest(**limits.ours()), "T-Rex in a code, 0.75": TRexLatent(**latent),
        "C-CHVAE": Cchvae(**latent), "REVISE": Revise(**latent),
    }  # fmt: skip
    result: dict[str, Any] = {}
    nearest = pd.DataFrame()
    for name, method in methods.items():
        result[name], points = judged(
            lambda method=method: pd.DataFrame(
                method.fit(base, train).generate(rows).counterfactuals, columns=pd.Index(names)
            )
        )
        nearest = points if name == "nearest row" else nearest
    try:
        peer: Any = importlib.import_module("ellice")
    except ImportError:
        return result | {"ellice": "not installed here: pip install ellice"}
    frame = train.assign(label=y)

    def theirs(method: str, epsilon: float) -> pd.DataFrame:
        explainer = peer.Explainer(base, peer.Data(frame, "label"), backend="pytorch", device="cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            found = explainer.generate_counterfactuals(
                rows, method=method, robustness_epsilon=epsilon, progress_bar=False, **limits.theirs(names)
            )
        return found.set_index("original_index").reindex(rows.index)[names].astype(float)

    for name, method, epsilon in (
        ("ellice, continuous, epsilon 0.01", "continuous", 0.01), ("ellice, continuous, epsilon 0.05", "continuous", 0.05),
        ("ellice, rows of the data, epsilon 0.01", "data_supported", 0.01),
    ):  # fmt: skip
        result[name], _ = judged(lambda method=method, epsilon=epsilon: theirs(method, epsilon))
    # with an ellipsoid of no size its rows of the data are the nearest ones that the network accepts
    told, points = judged(lambda: theirs("data_supported", 1e-12))
    there = nearest.notna().all(axis=1)
    result["ellice, rows of the data, epsilon 0, against nearest row"] = {
        "largest difference of a column": float((points - nearest)[there].abs().max().max()),
        "rows": f"{int(there.sum())}; ellice: {told['rows with a counterfactual']}",
        "seconds a row": told["seconds a row"],
    }
    return result


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "name": "T-Rex on a batch of rows, one core",
        "peer": "the published design, one row at a time with fresh draws (written here); ellice where installed",
        "speed": speed(),
        "German credit, the same limits": beside_ellice(),
        "command": "OMP_NUM_THREADS=1 THEODOLITE_DATA=FOLDER python benchmarks/counterfactual_loop.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
