import itertools
import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from theodolite.core.errors import DataError, DiskError, InputError, require
from theodolite.data import importance_resampling as room
from theodolite.data.importance_resampling import (
    Corpus,
    FingerprintMismatch,
    HashedNgrams,
    ImportanceResampler,
    NotEnoughDocumentsError,
    chunk_words,
    keys,
    kl_reduction,
    passes,
    quality_mask,
    resample,
    select_heuristic,
    select_oracle_domain,
    select_random,
)
from theodolite.language.subjects import language_subject
from theodolite.run_commands import run_app
from theodolite.survey.chart import Budget, load_charts
from tiny_language_model import save_tiny_model, sentences

_NEWS = "the bank said shares of the company rose in early trading on monday after a strong quarter"
_CODE = "def return self import class for in if not none value key list dict raise error ( ) : = ."
NEWS, CODE = _NEWS.split(), _CODE.split()


def documents(words, n, length, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, int(size))) for size in rng.integers(length // 2, length + 1, n)]


def pool(n=300, length=40, seed=0):
    """Two parts code, one part news, in an order of chance; and which are news."""
    rng = np.random.default_rng(seed)
    news = rng.random(n) < 1 / 3
    texts = [documents(NEWS if is_news else CODE, 1, length, [seed, i])[0] for i, is_news in enumerate(news)]
    return texts, news


RAW, IS_NEWS = pool()
TARGET = documents(NEWS, 60, 40, 99)


def read_lines(path):
    return Path(path).read_text().splitlines()


def fitted(raw=None, target=None, **options):
    options = {"min_words": 5} | options
    return ImportanceResampler(**options).fit(RAW if raw is None else raw, TARGET if target is None else target)


# ---- oracles


@pytest.mark.parametrize("n", [1, 2, 3])
def test_weights_are_those_of_the_peer(tmp_path, n):
    peer = pytest.importorskip("data_selection")
    raw = [*RAW, "short", "Ärger über Ölfarbe -- 12 % ...", ""]
    for name, texts in (("raw", raw), ("target", TARGET)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    dsir = peer.HashedNgramDSIR(
        [str(tmp_path / "raw.jsonl")], [str(tmp_path / "target.jsonl")], str(tmp_path / "cache"), num_proc=1, ngrams=n
    )
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    features = [dsir.featurizer(text) for text in raw]
    theirs = np.array([dsir.importance_estimator(one) for one in features])
    words = np.array([dsir.get_perexample_metadata(None, one) for one in features])
    made = fitted(raw, max_ngrams_to_fit="all", featurizer=HashedNgrams(n))
    assert np.allclose(made.log_weights(raw), theirs, rtol=1e-8, atol=1e-9)
    assert np.allclose(made.raw_, dsir.raw_probs, rtol=1e-12)
    kept = np.flatnonzero(words >= 5)
    top = fitted(raw, featurizer=HashedNgrams(n)).select(40, "top_k")
    assert top.n_eligible == len(kept)
    assert set(top.indices) == set(kept[np.argsort(-theirs[kept], kind="stable")[:40]])


def test_weights_are_the_formula():
    made = fitted(smoothing=0.5, eps=1e-6)
    feature = made.featurizer.transform
    p_t = np.asarray(feature(TARGET).sum(axis=0)).ravel() + 0.5
    p_r = np.asarray(feature(RAW).sum(axis=0)).ravel()
    ratio = np.log(p_t / p_t.sum() + 1e-6) - np.log(p_r / p_r.sum() + 1e-6)
    expected = feature(RAW) @ ratio
    assert np.allclose(made.log_weights(RAW), expected, rtol=1e-10)
    words = np.array([len(text.split()) for text in RAW])
    assert np.allclose(fitted(smoothing=0.5, eps=1e-6, normalize="per_token").log_weights(RAW), expected / words)


def inclusion(w, k):
    """Exact probability that each is among k drawn one after the other without replacement, over all ordered ones."""
    found = np.zeros(len(w))
    for order in itertools.permutations(range(len(w)), k):
        chance, left = 1.0, w.sum()
        for i in order:
            chance, left = chance * w[i] / left, left - w[i]
        found[list(order)] += chance
    return found


def test_sampling_law():
    log_w = np.array([0.1, 1, 2, 0.5, 0])
    exact = inclusion(np.exp(log_w), 2)
    assert np.allclose(exact, [0.2072, 0.4787, 0.8227, 0.3033, 0.1881], atol=5e-5)
    draws = 40_000
    rows = np.arange(5 * draws)
    noisy = log_w + keys.gumbel(rows, 7).reshape(draws, 5)
    top = np.argsort(-noisy, axis=1)[:, :2]
    assert np.allclose(np.bincount(top.ravel(), minlength=5) / draws, exact, atol=0.01)
    few = np.bincount(np.concatenate([resample(log_w, 2, seed=seed) for seed in range(400)]), minlength=5) / 400
    assert np.allclose(few, exact, atol=0.1)


def test_noise_is_gumbel_and_depends_on_seed_stream_and_row_only():
    noise = keys.gumbel(np.arange(100_000), 3)
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert (keys.gumbel(np.array([5, 99_999]), 3) == noise[[5, 99_999]]).all()
    assert np.isfinite(noise).all()
    for other in (keys.gumbel(np.arange(100_000), 4), keys.gumbel(np.arange(100_000), 3, 1), np.roll(noise, 1)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02


VALUES = st.lists(st.floats(-1e300, 1e300) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324]), min_size=1, max_size=60)


def test_a_random_choice_does_not_look_at_the_weights():
    steep = np.linspace(0, 500, 40)
    drawn = [resample(steep, 10, "random", seed=seed) for seed in range(400)]
    assert drawn[3].tolist() == resample(-steep, 10, "random", seed=3).tolist()
    often = np.bincount(np.concatenate(drawn), minlength=40) / 400
    assert abs(often - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)


@settings(max_examples=150, deadline=None)
@given(values=VALUES, data=st.data())
def test_the_k_largest_of_any_numbers(values, data):
    w = np.array(values)
    k = data.draw(st.integers(0, len(w)))
    order = np.lexsort((np.arange(len(w)), -w))
    assert resample(w, k, "top_k").tolist() == sorted(order[:k].tolist())
    bits = keys.ordered(w)
    assert (np.sign(np.subtract.outer(w, w)) == np.sign(bits[:, None].astype(object) - bits[None].astype(object))).all()
    assert [keys.as_float(int(b)) for b in bits] == (w + 0.0).tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 200), parts=st.integers(1, 5), data=st.data())
def test_radix_selection_over_parts_is_a_sort(seed, n, parts, data):
    rng = np.random.default_rng(seed)
    w = np.round(rng.normal(size=(n, 1)) * 3) if data.draw(st.booleans()) else rng.normal(size=(n, 1))
    words = rng.integers(-2, 10, n).astype(np.int32)
    draw = keys.Draw(data.draw(st.sampled_from(["gumbel", "top_k"])), seed, 2.0, 3)
    borders = np.sort(np.r_[0, rng.integers(0, n + 1, parts - 1), n])
    cut = [keys.Weights(w[a:b], words[a:b], int(a), int(b - a)) for a, b in itertools.pairwise(borders)]
    free = np.flatnonzero(words >= 3)
    k = data.draw(st.integers(0, len(free)))
    found = keys.find_cut(
        k,
        lambda prefix, known: keys.histogram(cut, draw, [], prefix, known),
        lambda key, most: np.concatenate([keys.ties(part, draw, [], key, most) for part in cut])[:most],
    )
    rows = np.concatenate([keys.taken(part, draw, [found])[0] for part in cut])
    value = w[:, 0] / 2 + (keys.gumbel(np.arange(n), seed) if draw.method == "gumbel" else 0)
    best = free[np.lexsort((free, -value[free]))[:k]]
    assert rows.tolist() == sorted(best.tolist())
    if k:
        assert keys.as_float(found.key) == np.partition(value[free], len(free) - k)[len(free) - k]


def test_kl_reduction_by_hand():
    featurizer = HashedNgrams(1, 50)
    raw, selected, target = ["a a b c"], ["a b"], ["a b b"]

    def share(texts):
        counts = np.bincount([featurizer.bucket(w) for t in texts for w in t.split()], minlength=50)
        return counts / counts.sum()

    def kl(p, q):
        return sum(a * (math.log(a + 1e-8) - math.log(b + 1e-8)) for a, b in zip(p, q, strict=True) if a > 0)

    expected = kl(share(target), share(raw)) - kl(share(target), share(selected))
    assert math.isclose(kl_reduction(selected, raw, target, featurizer), expected, rel_tol=1e-12)
    other = ["c"]
    second = kl(share(other), share(raw)) - kl(share(other), share(selected))
    assert math.isclose(kl_reduction(selected, raw, [target, other], featurizer), (expected + second) / 2)
    assert kl_reduction(raw, raw, target) == 0
    # the other way round it is another number
    assert not math.isclose(expected, kl(share(raw), share(target)) - kl(share(selected), share(target)))
    for parts in (([], raw, target), (selected, [""], target), (selected, raw, [[]])):
        with pytest.raises(DataError, match="no n-grams"):
            kl_reduction(*parts)


# ---- what a selection is


def test_it_finds_the_target_and_says_what_it_did():
    made = fitted()
    chosen = made.select(50)
    assert len(chosen.indices) == 50
    assert (np.diff(chosen.indices) > 0).all()
    assert IS_NEWS[chosen.indices].mean() == 1
    assert (chosen.n_eligible, chosen.n_filtered, len(chosen.target_of)) == (300, 0, 50)
    texts = [RAW[i] for i in chosen.indices]
    assert math.isclose(chosen.kl_reduction, kl_reduction(texts, RAW, TARGET), rel_tol=1e-9)
    assert chosen.kl_reduction > kl_reduction([RAW[i] for i in select_random(RAW, 50)], RAW, TARGET)
    w, noise = made.log_weights(RAW), keys.gumbel(np.arange(300), 0)
    assert chosen.threshold == np.partition(w + noise, 250)[250]
    top = made.select(50, "top_k")
    assert top.overlap_with_top_k == 1
    assert chosen.overlap_with_top_k == np.isin(chosen.indices, top.indices).mean()
    assert math.isclose(chosen.spread_over_noise, w.std() / (math.pi / math.sqrt(6)), rel_tol=1e-9)
    words = [len(text.split()) for text in RAW]
    assert math.isclose(chosen.length_correlation, np.corrcoef(w, words)[0, 1], rel_tol=1e-9)
    assert "as much as the noise" in chosen.note
    assert "none is drawn" in top.note
    gained = [f.ngram for f in chosen.top_features if f.selected > f.raw]
    lost = [f.ngram for f in chosen.top_features if f.selected < f.raw]
    assert set(gained) & set(NEWS)
    assert set(lost) & set(CODE)
    assert len(gained) == len(lost) == 20
    assert made.select(300).indices.tolist() == list(range(300))


def test_seed_temperature_and_length():
    w = fitted(temperature=0.5).log_weights(RAW)
    assert (w == fitted().log_weights(RAW)).all()
    assert not (fitted(seed=1).select(50).indices == fitted().select(50).indices).all()
    warm = fitted(temperature=1e6).select(50)
    assert warm.overlap_with_top_k < 0.5
    assert "are the documents with the largest weights" in warm.note
    assert "so that sampling is nearly taking the top" not in warm.note
    cold = fitted(temperature=1e-3).select(50)
    assert cold.overlap_with_top_k == 1
    assert "so that sampling is nearly taking the top" in cold.note
    sizes = np.random.default_rng(0).integers(5, 200, 200)
    long = fitted([documents(NEWS, 1, 2 * size, i)[0] for i, size in enumerate(sizes)]).select(20)
    assert abs(long.length_correlation) > 0.5
    assert "documents are preferred" in long.note
    assert long.note.endswith('or use normalize="per_token".')
    assert "per_token" not in replace(long, normalize="per_token").note


def test_no_documents_are_a_selection_too():
    none = fitted().select(0)
    assert none.indices.shape == none.target_of.shape == (0,)
    assert (none.kl_reduction, none.overlap_with_top_k, none.top_features) == (None, None, ())
    assert none.threshold == math.inf
    assert none.note == "Nothing was selected."


def test_target_documents_in_the_pool_are_not_selected():
    raw = [*RAW, *TARGET[:10], "too short"]
    chosen = fitted(raw).select(100)
    assert chosen.left_out == {"shorter than 5 words": 1, "also in the target": 10, "cannot be read": 0}
    assert not set(chosen.indices) & set(range(300, 311))
    assert chosen.n_filtered == 11


def test_several_targets_in_order_and_none_twice():
    code = documents(CODE, 30, 40, 5)
    made = fitted(target=[TARGET, code, TARGET], separate_targets=True)
    w = made.log_weights(RAW)
    assert w.shape == (300, 3)
    grams = [HashedNgrams().transform(t).sum() for t in (TARGET, code, TARGET)]
    assert np.allclose(made.proportions_, np.array(grams) / sum(grams))
    for method in ("gumbel", "top_k"):
        chosen = made.select(121, method)
        free, expected = np.ones(300, bool), {}
        sizes = [int(121 * p) for p in made.proportions_]
        sizes[-1] += 121 - sum(sizes)
        for target, k in enumerate(sizes):
            noise = keys.gumbel(np.arange(300), 0, target) if method == "gumbel" else 0
            value = np.where(free, w[:, target] + noise, -np.inf)
            best = np.lexsort((np.arange(300), -value))[:k]
            expected |= dict.fromkeys(best.tolist(), target)
            free[best] = False
            assert chosen.threshold[target] == value[best].min()
        assert dict(zip(chosen.indices.tolist(), chosen.target_of.tolist(), strict=True)) == expected
    even = fitted(target=[TARGET, code], separate_targets=True, target_proportions=[3, 1]).select(40)
    assert np.bincount(even.target_of).tolist() == [30, 10]
    assert IS_NEWS[even.indices[even.target_of == 0]].all()
    assert not IS_NEWS[even.indices[even.target_of == 1]].any()
    gain = kl_reduction([RAW[i] for i in even.indices], RAW, [TARGET, code])
    assert math.isclose(even.kl_reduction, gain, rel_tol=1e-9)
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(InputError, match="one number a target"):
            fitted(target=[TARGET, code], separate_targets=True, target_proportions=wrong)


def test_the_limit_of_ngrams_is_spread_over_shards(tmp_path):
    texts = [*documents(CODE, 200, 40, 1), *documents(NEWS, 200, 40, 2)]
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = Corpus.from_files(path, block_bytes=path.stat().st_size // 4)
    made = fitted(corpus, max_ngrams_to_fit=2000)
    sizes = np.array([2 * len(t.split()) - 1 for t in texts])
    starts = np.cumsum([0, *(sum(1 for _ in shard.texts()) for shard in corpus.shards)])
    counts = np.zeros(10_000)
    for a, b in itertools.pairwise(starts):
        # up to and with the document that exceeds the shard's part
        kept = int((np.cumsum(sizes[a:b]) <= 2000 // len(corpus.shards)).sum()) + 1
        kept = min(kept, b - a)
        counts += np.asarray(HashedNgrams().transform(texts[a : a + kept]).sum(axis=0)).ravel()
    assert np.allclose(made.raw_, counts / counts.sum())
    assert made.raw_[HashedNgrams().bucket("monday")] > 0  # not of the first shards alone


# ---- the same everywhere


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("a", slice(0, 120)), ("b", slice(120, 300))):
        rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(RAW)][part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "target.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TARGET))
    pq.write_table(pa.table({"text": RAW, "id": range(300)}), folder / "c.parquet", row_group_size=70)
    return folder


def selected(files, block, executor=None, **options):
    made = fitted(Corpus.from_files(f"{files}/[ab].jsonl", block_bytes=block), executor=executor, **options)
    return made.select(80)


def test_blocks_forms_and_threads_change_nothing(files):
    here = fitted().select(80)
    with ThreadPoolExecutor(3) as threads:
        others = [selected(files, block) for block in (1 << 11, 1 << 13, 1 << 26)]
        others += [
            selected(files, 1 << 12, threads),
            fitted(Corpus.from_files(files / "c.parquet"), Corpus.from_files(files / "target.jsonl")).select(80),
        ]
    for other in others:
        assert (other.indices == here.indices).all()
        assert other.threshold == here.threshold
        assert math.isclose(other.kl_reduction, here.kl_reduction, rel_tol=1e-12)
        assert other.overlap_with_top_k == here.overlap_with_top_k


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_two_processes_and_a_real_dask_cluster_change_nothing(files, tmp_path):
    here = fitted().select(80)
    distributed = require("distributed", "distributed")
    several = {"separate_targets": True, "target": [TARGET, documents(CODE, 30, 40, 5)]}
    two = fitted(Corpus.from_files(f"{files}/[ab].jsonl", block_bytes=1 << 12), **several).select(81)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster,
        distributed.Client(cluster) as client,
    ):
        for executor, block in ((2, 1 << 12), (client.get_executor(), 1 << 16), (client.get_executor(), 1 << 12)):
            there = selected(files, block, executor)
            assert (there.indices == here.indices).all()
            assert there.threshold == here.threshold
        made = fitted(
            Corpus.from_files(f"{files}/[ab].jsonl", block_bytes=1 << 11), executor=client.get_executor(), **several
        )
        again = made.select(81)
        assert (again.indices == two.indices).all()
        assert (again.target_of == two.target_of).all()
        command = ["dsir", "--raw", f"{files}/[ab].jsonl", "--target", str(files / "target.jsonl"), "--min-words", "5"]
        for name, options in (("one", []), ("dask", ["--dask", cluster.scheduler_address])):
            told = CliRunner().invoke(
                run_app, [*command, "-k", "80", "--out", str(tmp_path / f"{name}.jsonl"), "--json", *options]
            )
            assert told.exit_code == 0, told.output
    lines = (tmp_path / "one.jsonl").read_text()
    assert lines == (tmp_path / "dask.jsonl").read_text()
    assert [json.loads(line)["id"] for line in lines.splitlines()] == here.indices.tolist()


def test_a_stopped_run_is_continued(files, tmp_path, monkeypatch):
    corpus = Corpus.from_files(f"{files}/[ab].jsonl", block_bytes=1 << 12)
    expected = selected(files, 1 << 12)
    real, calls = passes.document_weights, []

    def stops(*given):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(passes, "document_weights", stops)
    with pytest.raises(KeyboardInterrupt):
        fitted(corpus, folder=tmp_path).select(80)
    assert len(list(tmp_path.glob("manifest-*.json"))) == 3
    assert not list(tmp_path.glob(".*unfinished"))
    monkeypatch.setattr(passes, "document_weights", real)
    read = []
    monkeypatch.setattr(passes, "_count", lambda texts, *rest, real=passes._count: read.append(1) or real(texts, *rest))
    again = fitted(corpus, folder=tmp_path)
    assert len(read) == 1  # the target; the raw corpus was counted before
    monkeypatch.setattr(passes, "document_weights", lambda *given: calls.append(2) or real(*given))
    calls.clear()
    chosen = again.select(80)
    assert len(calls) == len(corpus.shards) - 3
    assert (chosen.indices == expected.indices).all()
    assert chosen.top_features
    # another target is other weights, in the same folder
    other = fitted(corpus, documents(CODE, 60, 40, 3), folder=tmp_path).select(80)
    assert not IS_NEWS[other.indices].any()


@pytest.mark.slow
def test_a_run_that_was_killed_is_continued_with_the_same_result(files, tmp_path):
    # large enough that the kill falls between the first weights and the last
    rows = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40) for text in RAW)
    (tmp_path / "raw.jsonl").write_text(rows)
    options = ["--raw", tmp_path / "raw.jsonl", "--target", files / "target.jsonl", "--min-words", 5, "-k", 500]
    work = ["--work", tmp_path / "work", "--out", tmp_path / "out.jsonl", "--block", 1]
    with subprocess.Popen(
        [sys.executable, "-m", "theodolite", "run", "dsir", *map(str, [*options, *work])], stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list((tmp_path / "work").glob("manifest-*")):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    assert run_command(*options, *work).exit_code == 0
    assert run_command(*options, "--out", tmp_path / "at-once.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "at-once.jsonl").read_text()


@pytest.fixture
def tight_disk():
    """Files cannot grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_nothing_unfinished(files, tmp_path, tight_disk):
    corpus = Corpus.from_files(f"{files}/[ab].jsonl")
    made = fitted(corpus, folder=tmp_path / "work")
    tight_disk(1000)  # of weights: 128 bytes of header and 8 for each of 300 documents
    with pytest.raises(DiskError, match=r"cannot write .*work: .*Free some space"):
        made.select(80)
    tight_disk(1 << 20)
    assert not list((tmp_path / "work").glob(".*"))
    chosen = made.select(80)
    tight_disk(1000)
    for out in ("one.jsonl", "parts"):
        with pytest.raises(DiskError, match=r"cannot write .*part-00000-of-00002\.jsonl: .*Free some space"):
            made.write(chosen, tmp_path / out)
    tight_disk(1 << 20)
    assert not list(tmp_path.rglob("*unfinished"))
    made.write(chosen, tmp_path / "one.jsonl")
    assert len(read_lines(tmp_path / "one.jsonl")) == 80


def test_progress_is_told_shard_by_shard(files):
    corpus, told = Corpus.from_files(f"{files}/[ab].jsonl", block_bytes=1 << 13), []
    fitted(corpus, on_shard=lambda *what: told.append(what)).select(80)
    n = len(corpus.shards)
    assert [done for what, done, of in told if what == "counting n-grams" and of == n] == list(range(1, n + 1))
    assert [done for what, done, of in told if what == "weighing documents" and of == n] == list(range(1, n + 1))
    assert {what for what, _, _ in told} == {
        "reading the target", "counting n-grams", "weighing documents", "reading what was selected",
    }  # fmt: skip


def test_workers_and_the_command_do_without_torch():
    code = "import sys, theodolite.cli, theodolite.data.importance_resampling; print(*{'torch', 'pandas'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


def test_temporary_weights_go_with_the_resampler():
    made = fitted()
    made.select(3)
    folder = made._temporary
    assert len(list(folder.iterdir())) == 3
    del made
    assert not folder.exists()


def test_written_is_what_was_selected(files, tmp_path):
    corpus = Corpus.from_files([f"{files}/[ab].jsonl"], block_bytes=1 << 12)
    made = fitted(corpus)
    chosen = made.select(80)
    assert made.write(chosen, tmp_path / "one.jsonl") == [str(tmp_path / "one.jsonl")]
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == chosen.indices.tolist()
    source = "".join((files / f"{name}.jsonl").read_text() for name in "ab").splitlines()
    assert lines == [source[i] for i in chosen.indices]
    names = made.write(chosen, tmp_path / "parts")
    assert len(names) == len(corpus.shards)
    assert [line for name in names for line in read_lines(name)] == lines
    assert made.write(chosen, tmp_path / "parts") == names
    with pytest.raises(DataError, match="parts of another selection"):
        fitted(Corpus.from_files(f"{files}/[ab].jsonl")).write(chosen, tmp_path / "parts")
    parquet = fitted(Corpus.from_files(files / "c.parquet"))
    parquet.write(chosen, tmp_path / "one.parquet")
    assert pq.read_table(tmp_path / "one.parquet").column("id").to_pylist() == chosen.indices.tolist()
    parquet.write(chosen, tmp_path / "json.jsonl")
    assert [json.loads(x)["id"] for x in read_lines(tmp_path / "json.jsonl")] == chosen.indices.tolist()
    with pytest.raises(InputError, match=r"this one is jsonl: write \.jsonl"):
        made.write(chosen, tmp_path / "one.parquet")
    fitted().write(chosen, tmp_path / "memory.jsonl")
    assert [json.loads(x)["text"] for x in read_lines(tmp_path / "memory.jsonl")] == [RAW[i] for i in chosen.indices]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write into the folder"):
        made.write(chosen, tmp_path / "file" / "parts")


def test_what_is_read_is_never_written_over(files, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes((files / "a.jsonl").read_bytes())
    made = fitted(Corpus.from_files(source))
    chosen, before = made.select(3), source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for out in (source, f"{tmp_path}/x/../a.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="one of the files that are read"):
            made.write(chosen, out)
    shard = tmp_path / "pile" / "part-00000-of-00001.jsonl"
    shard.parent.mkdir()
    shard.write_bytes(before)
    of_shard = fitted(Corpus.from_files(shard))
    with pytest.raises(InputError, match="one of the files that are read"):
        of_shard.write(of_shard.select(3), shard.parent)
    assert source.read_bytes() == shard.read_bytes() == before


def test_a_folder_of_parts_keeps_what_is_not_of_this_run(files, tmp_path):
    made = fitted(Corpus.from_files(files / "a.jsonl"))
    folder = tmp_path / "one.jsonl.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / ".part-00000-of-00009.jsonl.unfinished").write_text("of a run that was killed")
    made.write(made.select(3), tmp_path / "one.jsonl")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert len(read_lines(tmp_path / "one.jsonl")) == 3


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        ("out.jsonl.gz", InputError, "not compressed"),
        ("out.parquet", InputError, r"write \.jsonl"),
        ("here.jsonl", DataError, "is a folder, and its name that of a file"),
        ("file/out.jsonl", DataError, "file is a file"),
        ("target.jsonl", InputError, "would be written over"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(files, tmp_path, monkeypatch, out, error, words):
    (tmp_path / "here.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    target = tmp_path / "target.jsonl"
    target.write_bytes((files / "target.jsonl").read_bytes())
    monkeypatch.setattr(ImportanceResampler, "fit", lambda *_: pytest.fail("began to work"))
    told = run_command("--raw", files / "a.jsonl", "--target", target, "-k", 3, "--out", tmp_path / out)
    assert isinstance(told.exception, error)
    assert re.search(words, str(told.exception))


def test_unreadable_documents_keep_their_number_and_are_not_selected(tmp_path):
    path = tmp_path / "raw.jsonl"
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(RAW)]
    lines[7], lines[200] = "{broken", json.dumps({"id": 200})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"raw\.jsonl, byte"):
        fitted(Corpus.from_files(path))
    made = fitted(Corpus.from_files(path, on_error="skip"))
    chosen = made.select(298)
    assert chosen.left_out["cannot be read"] == 2
    assert chosen.indices.tolist() == [i for i in range(300) if i not in (7, 200)]
    made.write(chosen, tmp_path / "out.jsonl")
    assert [json.loads(x)["id"] for x in read_lines(tmp_path / "out.jsonl")] == chosen.indices.tolist()
    empty = ImportanceResampler(min_words=0).fit(Corpus.from_files(path, on_error="skip"), TARGET)
    assert not {7, 200} & set(empty.select(298).indices.tolist())


def test_saved_and_loaded(files, tmp_path):
    made = fitted()
    made.save(tmp_path / "weights.npz")
    again = ImportanceResampler(min_words=5).load(tmp_path / "weights.npz")
    assert (again.log_weights(RAW) == made.log_weights(RAW)).all()
    with pytest.raises(InputError, match="which corpus"):
        again.select(5)
    there, here = again.select(50, raw=RAW), made.select(50)
    assert (there.indices == here.indices).all()
    assert there.top_features == here.top_features
    with pytest.raises(FingerprintMismatch, match="'ngrams': 2"):
        ImportanceResampler(featurizer=HashedNgrams(1)).load(tmp_path / "weights.npz")
    with pytest.raises(FingerprintMismatch, match="separate_targets"):
        ImportanceResampler(separate_targets=True).load(tmp_path / "weights.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for name in ("other.npz", "none.npz"):
        with pytest.raises(DataError, match=r"is not what ImportanceResampler\.save writes"):
            ImportanceResampler().load(tmp_path / name)


# ---- errors


def test_more_documents_than_there_are():
    with pytest.raises(NotEnoughDocumentsError, match=r"301 documents are asked for and 300 may be taken"):
        fitted().select(301)
    with pytest.raises(
        NotEnoughDocumentsError, match=r"0 may be taken; left out: 300 shorter than 500 words, 0 also in"
    ):
        fitted(min_words=500).select(1)


def test_empty_corpora_and_small_targets():
    for raw, target, name in (([], TARGET, "the raw corpus"), (RAW, [], "target 0"), ([" ", ""], TARGET, "the raw")):
        with pytest.raises(DataError, match=f"{name}.* has no n-grams"):
            fitted(raw, target)
    with pytest.warns(UserWarning, match="has 37 n-grams only"):
        fitted(
            target=[
                "the bank said shares of the company rose on monday after a strong quarter in early trading today x"
            ]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(target=["the bank said"], smoothing=1.0)


def test_weights_that_are_not_finite_name_the_document(files):
    raw = [*RAW[:100], "unseen words of none " * 10]
    with pytest.raises(DataError, match=r"log weight of document \d+ is \[-inf\]"):
        fitted(raw, eps=0.0).select(3)
    with pytest.raises(DataError, match=r"a\.jsonl, byte \d+ is"):
        fitted(Corpus.from_files(f"{files}/[ab].jsonl"), eps=0.0).select(3)
    with pytest.raises(DataError, match="weight of document 1 is nan"):
        resample(np.array([0.0, math.nan]), 1)


def test_arguments_that_cannot_be():
    for options, words in (
        ({"smoothing": -1}, "must not be negative"), ({"max_ngrams_to_fit": 0}, '"auto", "all" or a number'),
        ({"eps": math.nan}, "must not be negative"),
        ({"temperature": 0}, "above 0"), ({"temperature": math.inf}, "finite"), ({"min_words": -1}, "not be negative"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            ImportanceResampler(**options)
    with pytest.raises(InputError, match="fit a raw corpus and a target first"):
        ImportanceResampler().log_weights(RAW)
    with pytest.raises(InputError, match="k must be a whole number"):
        fitted().select(-1)
    with pytest.raises(InputError, match="k from 0 to N"):
        resample(np.zeros(3), 4)
    with pytest.raises(InputError, match="a corpus is a list of strings"):
        fitted().log_weights("one string")
    for function in (HashedNgrams().transform, chunk_words, quality_mask):
        with pytest.raises(InputError, match="several texts are needed, got one: 'one string'"):
            function("one string")


# ---- baselines and texts


def test_baselines():
    assert select_random(RAW, 300).tolist() == list(range(300))
    assert select_random(RAW, 30, seed=1).tolist() != select_random(RAW, 30, seed=2).tolist()
    assert IS_NEWS[select_oracle_domain(IS_NEWS, True, 40)].all()
    exact = select_heuristic(RAW, TARGET, 60, noisy=False)
    noisy = select_heuristic(RAW, TARGET, 60)
    assert IS_NEWS[exact].all()
    assert IS_NEWS.mean() < IS_NEWS[noisy].mean()
    assert len(np.unique(noisy)) == 60
    assert select_heuristic(RAW, TARGET, 300).tolist() == list(range(300))  # until enough are kept
    for call in (select_random, lambda raw, k: select_heuristic(raw, TARGET, k)):
        with pytest.raises(NotEnoughDocumentsError):
            call(RAW, 301)
    with pytest.raises(NotEnoughDocumentsError):
        select_oracle_domain(IS_NEWS, "sport", 1)
    with pytest.raises(DataError, match="documents of both kinds"):
        select_heuristic(RAW, [], 3)
    with pytest.raises(InputError, match="must not be negative"):
        select_random(RAW, -1)


def test_pareto_draws_keep_by_score(monkeypatch):
    # the chance to keep a document in one draw is P(X > 1 - s) = (2 - s)^-9
    draws = np.random.default_rng(0).pareto(9, 100_000)
    for score in (0.2, 0.9):
        assert abs((draws > 1 - score).mean() - (2 - score) ** -9) < 0.01


def test_chunks():
    assert chunk_words(["a b\nc", "", "d"], 2) == ["a b", "c", "d"]
    assert [len(c.split()) for c in chunk_words([" ".join("x" * 300)])] == [128, 128, 44]
    with pytest.raises(InputError, match="at least one word"):
        chunk_words(["a"], 0)


GOOD = (
    "the river runs through a valley of old farms and small towns where people have lived by growing apples for many years "
    "and in the autumn they carry the fruit to markets near the sea , which are open until late ; boats wait there ."
)


def test_quality():
    words = GOOD.split()
    shown = [
        GOOD, " ".join(words[:40]), " ".join(words * 13), "the " * 60 + GOOD,
        " ".join(w for w in words if len(w) > 4) * 3, "the a of and to in by " * 9, GOOD + " 1 2 3 4 5 6 7 8 9" * 2, "",
    ]  # fmt: skip
    assert quality_mask(shown).tolist() == [True, *[False] * 7]
    assert quality_mask(iter([])).shape == (0,)


# ---- command and chart


def run_command(*options):
    return CliRunner().invoke(run_app, ["dsir", *map(str, options)])


def test_the_command_tells_and_writes(files, tmp_path):
    given_files = (
        "--raw",
        files / "a.jsonl",
        "--raw",
        files / "b.jsonl",
        "--target",
        files / "target.jsonl",
        "--min-words",
        5,
    )
    told = run_command(*given_files, "--select", 80, "--out", tmp_path / "out.jsonl", "--json")
    assert told.exit_code == 0, told.output
    found, here = json.loads(told.stdout), fitted().select(80)
    assert [json.loads(x)["id"] for x in read_lines(tmp_path / "out.jsonl")] == here.indices.tolist()
    assert found["selected"] == 80
    assert math.isclose(found["nats_closer_to_the_target"], here.kl_reduction)
    assert math.isclose(found["nats_closer_by_a_random_choice"], fitted().select(80, "random").kl_reduction)
    assert found["nats_closer_by_a_random_choice"] < found["nats_closer_to_the_target"]
    assert found["note"] == here.note
    assert found["written"] == [str(tmp_path / "out.jsonl")]
    rows = json.loads(run_command(*given_files, "-k", 9, "--method", "top_k", "--json").stdout)
    assert rows["rows"] == fitted().select(9, "top_k").indices.tolist()
    people = run_command(*given_files, "-k", 9, "--work", tmp_path / "work", "--separate-targets")
    assert people.exit_code == 0
    assert "nats closer to the target" in people.stdout
    assert list((tmp_path / "work").glob("manifest-*"))
    parquet = run_command("--raw", files / "c.parquet", *given_files[4:], "-k", 80, "--out", tmp_path / "out.parquet")
    assert parquet.exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == here.indices.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--raw", "a.jsonl"], "give --raw"),
        (["--raw", "a.jsonl", "--target", "b.jsonl"], "give --raw"),
        (["--raw", "a.jsonl", "--target", "b.jsonl", "-k", "1", "--model", "smollm2"], "leave them out"),
        (["--raw", "a.jsonl", "--target", "b.jsonl", "-k", "1", "--method", "best"], "gumbel or top_k"),
        (["--raw", "none.jsonl", "--target", "b.jsonl", "-k", "1"], "there is no file"),
    ],
)
def test_commands_that_cannot_be(options, words):
    told = run_command(*options)
    assert words in str(told.exception)


def test_the_chart_of_a_language_model(tmp_path):
    pytest.importorskip("transformers")
    chart = load_charts()["dsir"]
    model = save_tiny_model(tmp_path / "model")
    # two kinds of texts, so that the rows differ
    texts = [text + (" b c d e" if i % 2 else " v w x y") * 4 for i, text in enumerate(sentences(120))]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    subject = language_subject(model, tmp_path / "texts.jsonl", length=16)
    assert chart.needs.refusal(subject) is None
    finding = chart.draw(subject, Budget())
    first = finding.comparison.estimate
    assert f"{abs(first.value):.3f} nats" in finding.headline
    assert {control.kind for control in finding.comparison.controls} == {"random", "closed-form"}
    assert first.value == finding.numbers["DSIR over random rows"].value
    assert len(finding.figure.data) == 4
    assert "theodolite run dsir" in finding.caveats[0]
    assert json.dumps(finding.to_json())


def test_advice_follows_the_interval():
    from theodolite.core.estimate import Estimate
    from theodolite.survey.data.text_selection import _advice

    ends = ((0.1, 0.3, "Select from your raw corpus"), (-0.1, 0.3, "not surely matter"), (-0.3, -0.1, "Do not select"))
    for low, high, words in ends:
        assert words in _advice(Estimate((low + high) / 2, low, high, "nats"))


def test_names_are_all_there():
    assert all(hasattr(room, name) for name in room.__all__)
