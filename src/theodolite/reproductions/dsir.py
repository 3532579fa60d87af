"""Claims of Xie et al., 2023, arXiv:2302.03169, on a mix of five domains of real text, with small word models."""

__all__ = ["claims"]

import contextlib
import gzip
import importlib
import io
import itertools
import json
import math
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.sources import find_data
from theodolite.data.importance_resampling import (
    Corpus,
    HashedNgrams,
    ImportanceResampler,
    chunk_words,
    resample,
    select_heuristic,
    select_random,
)
from theodolite.data.importance_resampling.keys import gumbel
from theodolite.data.importance_resampling.measures import kl_gain, shares
from theodolite.reproductions.claim import Claim, Comparator, Scale

_FILES = {
    "HuffPost": "texts/huffpost.json.gz", "Wikipedia": "texts/all_wiki_sents.txt", "Reuters": "texts/reuters.json",
    "CLINC": "texts/clinc150-data_full.json.gz",
}  # fmt: skip
_TARGET, _TEST, _SELECTED, _VOCABULARY, _CONTEXT = 250, 150, 600, 2000, 3
_THINNED = {"Python": 8, "HuffPost": 2}
_METHODS = ("random", "heuristic classification", "heuristic, top k", "DSIR", "DSIR, unigrams")
_PREDICTS = (
    "KL reduction, known before any training, predicts how well a model trained on the selection does",
    "r = 0.89 with downstream accuracy, over selection methods and 8 targets",
    "r >= 0.85, each target's mean removed",
)
_BETTER = (
    "DSIR does better than heuristic classification, which does better than random selection",
    "82.30 / 79.85 / 80.25 on GLUE",
    "DSIR beats noisy heuristic classification in KL reduction and loss on >= 3 of 4 targets, and random on all by >= 0.3 nats",
)
_FINDS = (
    "DSIR finds the target's domain in the mix",
    "none given",
    ">= 0.90 of the selection for each of HuffPost, Wikipedia and CLINC",
)
_SAME = (
    "log weights are the published ones",
    "PyPI data-selection 1.0.3",
    "equal to 1e-8 relative on 500 documents, and the bucket of 'alice' is 6720",
)
_SCALES = (
    "scales out with the same code: in process, two processes and a cluster of two workers select the same documents",
    "none given (Pile, 1.7 billion documents)",
    "identical rows in all six runs, threshold equal to numpy's partition",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; when quick with part of the texts and shorter training, and where data are missing the claim says which."""
    missing = [name for name in _FILES.values() if find_data(name) is None]
    needs = f"needs {', '.join(missing)} in the folder THEODOLITE_DATA" if missing else ""
    mix = None if missing else _mix()
    if mix is None:
        for about in (_PREDICTS, _BETTER, _FINDS):
            yield Claim(*about[:2], None, about[2], None, scaled=needs)
    else:
        yield from _on_the_mix(mix, scale, seed)
    yield _published_weights(mix, needs)
    yield _sampling_law(seed)
    yield _scales_out(mix, needs, scale, seed)
    yield _more_costs_nothing(scale, seed)


# ---- the mix of domains


def _mix() -> dict[str, list[str]]:
    """Chunks of 128 words by domain."""
    texts = {name: _texts(Path(str(find_data(file)))) for name, file in _FILES.items()}
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if not {"test", "tests", "site-packages"} & set(path.parts))
    texts["Python"] = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    chunks = {name: chunk_words([" ".join(parts)]) for name, parts in texts.items()}
    return {name: [chunk for chunk in found if chunk.count(" ") == 127] for name, found in chunks.items()}


def _texts(path: Path) -> list[str]:
    content = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    if "clinc" in path.name:
        return [text for rows in json.loads(content).values() for text, _ in rows]
    if path.suffix == ".txt":
        return content.splitlines()
    return [json.loads(line)["raw"] for line in content.splitlines() if line.strip()]


@dataclass(frozen=True, eq=False)
class _Task:
    """A target, test text of its domain, and the pool with the domain of each chunk; the three share no chunk."""

    domain: str
    target: list[str]
    test: list[str]
    pool: list[str]
    domains: np.ndarray

    @classmethod
    def of(cls, mix: dict[str, list[str]], domain: str, seed: int) -> "_Task":
        own = mix[domain]
        order = np.random.default_rng(seed).permutation(len(own))
        t = min(_TARGET, len(own) // 4)
        target, test, rest = np.split(order, [t, t + _TEST])
        pool = {**mix, domain: [own[i] for i in np.sort(rest)]}
        return cls(
            domain,
            [own[i] for i in target],
            [own[i] for i in test],
            [chunk for chunks in pool.values() for chunk in chunks],
            np.repeat(list(pool), [len(chunks) for chunks in pool.values()]),
        )

    def select(self, featurizer: HashedNgrams, seed: int) -> dict[str, np.ndarray]:
        """Rows of the pool by every method; unigrams have a featurizer of their own."""
        made = [
            ImportanceResampler(features, seed=seed).fit(self.pool, self.target).select(_SELECTED).indices
            for features in (featurizer, HashedNgrams(ngrams=1))
        ]
        heuristic = [
            select_heuristic(self.pool, self.target, _SELECTED, noisy=noisy, featurizer=featurizer, seed=seed)
            for noisy in (True, False)
        ]
        return dict(zip(_METHODS, (select_random(self.pool, _SELECTED, seed=seed), *heuristic, *made), strict=True))


# ---- a small language model


class _WordModel(nn.Module):
    """Logits of the next word from the three before it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(words, 32), nn.Linear(_CONTEXT * 32, 96), nn.Linear(96, words)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(context).flatten(1))))


def _vocabulary(mix: dict[str, list[str]]) -> dict[str, int]:
    """The commonest words when each domain counts the same; the last number is for all others."""
    share: Counter[str] = Counter()
    for chunks in mix.values():
        words = Counter(word for chunk in chunks for word in chunk.lower().split())
        total = words.total()
        share.update({word: count / total for word, count in words.items()})  # type: ignore[arg-type]
    return {word: i for i, (word, _) in enumerate(share.most_common(_VOCABULARY - 1))}


def _windows(chunks: Sequence[str], vocabulary: dict[str, int]) -> torch.Tensor:
    """Every run of four words (n, 4) as numbers."""
    other = len(vocabulary)
    ids = torch.tensor([[vocabulary.get(word, other) for word in chunk.lower().split()] for chunk in chunks])
    return ids.unfold(1, _CONTEXT + 1, 1).flatten(0, 1)


def _losses(train: list[torch.Tensor], test: list[torch.Tensor], words: int, steps: int, seed: int) -> list[float]:
    """Test loss in nats a word after training on each."""
    found = []
    for own, held in zip(train, test, strict=True):
        torch.manual_seed(seed)
        model = _WordModel(words)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = own[torch.randint(len(own), (256,), generator=order)]
            loss = F.cross_entropy(model(rows[:, :-1]), rows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            parts = [
                F.cross_entropy(model(part[:, :-1]), part[:, -1], reduction="sum").item() for part in held.split(2048)
            ]
        found.append(sum(parts) / len(held))
    return found


# ---- claims on the mix


def _on_the_mix(mix: dict[str, list[str]], scale: Scale, seed: int) -> Iterator[Claim]:
    full, names = scale is Scale.FULL, tuple(_FILES)
    steps, every = (400, 1) if full else (60, 8)
    if not full:  # parts of the two largest domains, from all over them
        mix = {name: chunks[:: _THINNED.get(name, 1)] for name, chunks in mix.items()}
    vocabulary = _vocabulary(mix)
    tasks = [_Task.of(mix, name, seed) for name in names]
    featurizer = HashedNgrams()
    chosen = [task.select(featurizer, seed) for task in tasks]
    gain = np.array([_gains(task, by, featurizer) for task, by in zip(tasks, chosen, strict=True)])
    train, test = [], []
    for task, by in zip(tasks, chosen, strict=True):
        held = _windows(task.test, vocabulary)[::every]
        train += [_windows([task.pool[i] for i in rows], vocabulary) for rows in by.values()]
        test += [held] * len(by)
    loss = np.reshape(_losses(train, test, len(vocabulary) + 1, steps, seed), gain.shape)
    setting = (
        f"{sum(map(len, mix.values())):,} chunks of 128 words from five domains; targets {', '.join(names)} of "
        f"{'/'.join(str(len(task.target)) for task in tasks)} chunks; {_SELECTED} selected; word models with three words of "
        f"context and {_VOCABULARY:,} words, {steps} steps, loss on {_TEST} other chunks of the domain"
    )
    yield _predicts(gain, loss, setting)
    yield _better(gain, loss, setting, names)
    yield _finds(tasks, chosen, setting)


def _gains(task: _Task, by: dict[str, np.ndarray], featurizer: HashedNgrams) -> list[float]:
    """KL reduction of each selection; the pool is counted once for all of them."""
    pool, target = (featurizer.transform(texts) for texts in (task.pool, task.target))
    raw, wanted = (shares(np.asarray(rows.sum(axis=0)).ravel()) for rows in (pool, target))
    return [kl_gain(np.asarray(pool[rows].sum(axis=0)).ravel(), raw, wanted[:, None]) for rows in by.values()]


def _predicts(gain: np.ndarray, loss: np.ndarray, setting: str) -> Claim:
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (gain, -loss))
    r = float((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    spread = 1.96 / math.sqrt(max(1, gain.size - len(gain) - 2))  # Fisher's z; each mean that is removed costs a point
    low, high = (math.tanh(math.atanh(r) + step) for step in (-spread, spread))
    across = float(np.corrcoef(gain.ravel(), -loss.ravel())[0, 1])
    return Claim(
        *_PREDICTS[:2], Estimate(r, low, high, "Pearson r", gain.size), _PREDICTS[2], r >= 0.85,
        Comparator("r without removing the targets' means", across),
        f"{setting}; {len(_METHODS)} selections ({', '.join(_METHODS)}); test loss for accuracy on GLUE",
    )  # fmt: skip


def _better(gain: np.ndarray, loss: np.ndarray, setting: str, names: Sequence[str]) -> Claim:
    random, noisy, _, ours, _ = range(len(_METHODS))
    wins = (gain[:, ours] > gain[:, noisy]) & (loss[:, ours] < loss[:, noisy])
    ahead = loss[:, random] - loss[:, ours]
    holds = bool(wins.sum() >= math.ceil(0.75 * len(names)) and (ahead >= 0.3).all())
    table = "; ".join(
        f"{method}: KL reduction {'/'.join(f'{v:.2f}' for v in gain[:, i])}, loss {'/'.join(f'{v:.2f}' for v in loss[:, i])}"
        for i, method in enumerate(_METHODS)
    )
    return Claim(
        *_BETTER[:2], mean_of_runs(ahead, unit="nats a word below random"), _BETTER[2], holds,
        Comparator("heuristic classification, nats a word below random", float((loss[:, random] - loss[:, noisy]).mean())),
        f"{setting}. DSIR beats noisy heuristic classification on both in {int(wins.sum())} of {len(names)}; smallest lead over "
        f"random {ahead.min():.2f}. {table}",
    )  # fmt: skip


def _finds(tasks: list[_Task], chosen: list[dict[str, np.ndarray]], setting: str) -> Claim:
    found = {
        task.domain: {name: task.domains[rows] == task.domain for name, rows in by.items()}
        for task, by in zip(tasks, chosen, strict=True)
        if task.domain != "Reuters"
    }
    worst = min(found, key=lambda name: found[name]["DSIR"].mean())
    hits = found[worst]["DSIR"]
    told = ", ".join(f"{name} {by['DSIR'].mean():.3f} (random {by['random'].mean():.3f})" for name, by in found.items())
    return Claim(
        *_FINDS[:2], proportion(int(hits.sum()), len(hits)), _FINDS[2],
        all(by["DSIR"].mean() >= 0.9 for by in found.values()),
        Comparator("random selection, its largest share", max(float(by["random"].mean()) for by in found.values())),
        f"{setting}; measured: the smallest share. {told}. Reuters has fewer chunks than are selected",
    )  # fmt: skip


# ---- oracles


def _published_weights(mix: dict[str, list[str]] | None, needs: str) -> Claim:
    if mix is None:
        return Claim(*_SAME[:2], None, _SAME[2], None, scaled=needs)
    try:
        peer: Any = importlib.import_module("data_selection")
    except ImportError:
        return Claim(*_SAME[:2], None, _SAME[2], None, scaled="needs the package data-selection")
    raw = [chunk for chunks in mix.values() for chunk in chunks[:100]]
    target = mix["Reuters"][100:200]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("raw.jsonl", "target.jsonl")]
        for file, texts in zip(files, (raw, target), strict=True):
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        theirs = peer.HashedNgramDSIR([str(files[0])], [str(files[1])], f"{folder}/cache", num_proc=1)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            theirs.fit_importance_estimator(num_tokens_to_fit="all")
        expected = np.array([theirs.importance_estimator(theirs.featurizer(text)) for text in raw])
    made = ImportanceResampler(max_ngrams_to_fit="all").fit(raw, target)
    off = float((np.abs(made.log_weights(raw) - expected) / np.abs(expected)).max())
    bucket = made.featurizer.bucket("alice")
    return Claim(
        *_SAME[:2], Estimate.exact(off, "largest relative difference"), _SAME[2], off <= 1e-8 and bucket == 6720,
        Comparator("bucket of 'alice'", float(bucket)), f"{len(raw)} chunks of five domains, {len(target)} of Reuters as target",
    )  # fmt: skip


def _sampling_law(seed: int) -> Claim:
    log_w, k, draws = np.array([0.1, 1, 2, 0.5, 0]), 2, 40_000
    w, exact = np.exp(log_w), np.zeros(5)
    for order in itertools.permutations(range(5), k):
        chance, left = 1.0, w.sum()
        for i in order:
            chance, left = chance * w[i] / left, left - w[i]
        exact[list(order)] += chance
    noisy = log_w + gumbel(np.arange(5 * draws), seed).reshape(draws, 5)
    drawn = np.bincount(np.argsort(-noisy, axis=1)[:, :k].ravel(), minlength=5) / draws
    proportional = 1 - (1 - w / w.sum()) ** k
    same = all(
        resample(log_w, k, seed=s).tolist() == sorted(np.argsort(-(log_w + gumbel(np.arange(5), s)))[:k].tolist())
        for s in range(100)
    )
    off = float(np.abs(drawn - exact).max())
    return Claim(
        "adding Gumbel noise and keeping the k largest is sampling without replacement in proportion to the weights",
        "a theorem",
        Estimate.exact(off, "largest difference of a frequency"),
        "<= 0.01 from the exact 0.2072, 0.4787, 0.8227, 0.3033, 0.1881",
        off <= 0.01 and same and np.allclose(exact, [0.2072, 0.4787, 0.8227, 0.3033, 0.1881], atol=5e-5),
        Comparator("drawing with replacement, largest difference", float(np.abs(proportional - exact).max())),
        f"{draws:,} draws of 2 of 5, exact by all ordered pairs; 100 of them also through the selection itself",
    )


# ---- size


def _scales_out(mix: dict[str, list[str]] | None, needs: str, scale: Scale, seed: int) -> Claim:
    if mix is None:
        return Claim(*_SCALES[:2], None, _SCALES[2], None, scaled=needs)
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        return Claim(*_SCALES[:2], None, _SCALES[2], None, scaled="needs the extra theodolite[distributed]")
    raw = [chunk for chunks in mix.values() for chunk in chunks[: None if scale is Scale.FULL else 60]]
    target, k = mix["Reuters"][-150:], len(raw) // 10
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "raw.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in raw), encoding="utf-8")
        cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        # a pool that starts its processes afresh: a copy of this one would hold torch's threads
        pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        found, weights = [], np.empty(0)
        with cluster, distributed.Client(cluster) as client, pool:
            for executor in (None, pool, client.get_executor()):
                for block in (1 << 16, 1 << 20):
                    corpus = Corpus.from_files(file, block_bytes=block)
                    made = ImportanceResampler(seed=seed, executor=executor).fit(corpus, target)
                    found.append(made.select(k))
                    if executor is None:
                        weights = made.log_weights(corpus)
    noisy = weights + gumbel(np.arange(len(raw)), seed)
    noisy = np.delete(noisy, [i for i, text in enumerate(raw) if text in set(target)])
    kth = float(np.partition(noisy, len(noisy) - k)[len(noisy) - k])
    different = sum(not np.array_equal(one.indices, found[0].indices) for one in found)
    different += sum(one.threshold != kth for one in found)
    return Claim(
        *_SCALES[:2], Estimate.exact(different, "rows or thresholds that differ"), _SCALES[2], different == 0,
        Comparator("threshold by numpy's partition", kth),
        f"{len(raw):,} chunks in one file, blocks of 64 KiB and 1 MiB, {k} selected; all on this machine",
    )  # fmt: skip


def _more_costs_nothing(scale: Scale, seed: int) -> Claim:
    n = 2_000_000 if scale is Scale.FULL else 400_000
    weights = np.random.default_rng(seed).normal(-300, 40, n)
    sizes = {"1 %": n // 100, "50 %": n // 2}
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(3):
        for name, k in sizes.items():
            began = time.perf_counter()
            resample(weights, k, seed=seed)
            taken[name].append(time.perf_counter() - began)
    few, many = (np.array(taken[name]) for name in sizes)
    ratio = many / few
    return Claim(
        "selecting more documents costs nothing",
        "353.7 s for 10 million documents, 352.7 s for 100 million",
        Estimate(float(np.median(ratio)), float(ratio.min()), float(ratio.max()), "times as long"),
        "50 % of the documents in at most 1.5 times the time of 1 %",
        float(np.median(ratio)) <= 1.5,
        Comparator("seconds for 1 %", float(np.median(few))),
        f"{n:,} made-up weights, three runs in turns; the interval is their range",
    )
