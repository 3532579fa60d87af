"""DSIR beside data-selection, the authors' package: weights of documents, and 100 MB of JSON Lines from end to end.

Peer: `pip install data-selection`. Texts are Python sources of this environment, in chunks of 128 words. Times of one process are
CPU seconds, so that other load does not count; the run of 100 MB also tells elapsed seconds and the load of the machine.
NLTK 3.10, which the peer uses, takes superscript digits for no word characters and Python's re does: texts that the two cut
otherwise are left out of the comparison of weights, since one of them shifts the shares that all weights are made of.

Run: python benchmarks/text_selection.py [PATH]      writes text_selection.json beside this file, or PATH
"""

import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from theodolite.data.importance_resampling import HashedNgrams, ImportanceResampler, chunk_words

CHUNKS, TARGETS, MEGABYTES = 4000, 250, 100
UNIGRAMS = HashedNgrams(ngrams=1)


def chunks() -> Iterator[str]:
    """Chunks of 128 words of the Python sources that are here, the standard library's first."""
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            yield from chunk_words([path.read_text(encoding="utf-8", errors="ignore")])


def cut_alike(text: str) -> bool:
    """Whether the peer's tokenizer finds the tokens of ours."""
    nltk: Any = importlib.import_module("nltk")
    theirs = nltk.WordPunctTokenizer().tokenize(text.lower())
    return [UNIGRAMS.bucket(token) for token in theirs] == UNIGRAMS.indices(text).tolist()


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def peer_weights(folder: Path, raw: list[str], target: list[str]) -> tuple[np.ndarray, float]:
    """The peer's log weights and its CPU seconds for them; fitting is not counted."""
    package: Any = importlib.import_module("data_selection")
    write(folder / "raw.jsonl", raw)
    write(folder / "target.jsonl", target)
    made = package.HashedNgramDSIR(
        [str(folder / "raw.jsonl")], [str(folder / "target.jsonl")], str(folder / "cache"), num_proc=1
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        made.fit_importance_estimator(num_tokens_to_fit="all")
        began = time.process_time()
        made.compute_importance_weights()
        seconds = time.process_time() - began
    return np.load(made.log_importance_weights_dir / "0.npy"), seconds


def our_weights(raw: list[str], target: list[str], hash: str) -> tuple[np.ndarray, float]:
    made = ImportanceResampler(HashedNgrams(hash=hash), max_ngrams_to_fit="all").fit(raw, target)
    began = time.process_time()
    found = made.log_weights(raw)
    return found, time.process_time() - began


def from_end_to_end(folder: Path, workers: int) -> dict[str, Any]:
    """Seconds and memory of the command on the file of 100 MB; memory with the shared parts of processes in each."""
    command = [
        sys.executable, "-m", "theodolite", "run", "dsir", "--raw", str(folder / "large.jsonl"), "--target",
        str(folder / "target.jsonl"), "--select", "10000", "--out", str(folder / f"{workers}.jsonl"), "--block", "4", "--json",
        *(["--workers", str(workers)] if workers > 1 else []),
    ]  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    largest = together = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        me = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = [0]
            with contextlib.suppress(psutil.Error):
                for one in [me, *me.children(recursive=True)]:
                    sizes.append(one.memory_info().rss)
            largest, together = max(largest, *sizes), max(together, sum(sizes))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "elapsed seconds": round(time.perf_counter() - began, 1),
        "CPU seconds": round(cpu, 1),
        "CPU seconds / workers (elapsed where as many cores are free)": round(cpu / workers, 1),
        "largest process, MB": round(largest / 1e6),
        "all processes together, MB": round(together / 1e6),
        "load of the machine at the end": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = chunks()
        shared = (text for text in source if cut_alike(text))
        few = [next(shared) for _ in range(CHUNKS + TARGETS)]
        raw, target = few[:CHUNKS], few[CHUNKS:]
        theirs, peer = peer_weights(folder, raw, target)
        ours, seconds = our_weights(raw, target, "sha256")
        _, murmur = our_weights(raw, target, "murmur3")
        size = documents = 0
        with open(folder / "large.jsonl", "w", encoding="utf-8") as file:
            for text in source:
                size += file.write(json.dumps({"text": text}) + "\n")
                documents += 1
                if size >= MEGABYTES * 1e6:
                    break
        runs: dict[str, dict[str, Any]] = {
            f"{n} process{'es' if n > 1 else ''}": from_end_to_end(folder, n) for n in (1, 2)
        }
        one, two = runs.values()
        same = (folder / "1.jsonl").read_bytes() == (folder / "2.jsonl").read_bytes()
    result = {
        "name": "log weights of documents, and a selection from 100 MB",
        "peer": "data-selection 1.0.3",
        "weights": {
            "documents": CHUNKS,
            "peer / ours, CPU seconds": round(peer / seconds, 2),
            "peer / ours with murmur3, CPU seconds": round(peer / murmur, 2),
            "largest relative difference of a weight": float(np.abs(ours / theirs - 1).max()),
            "documents a second, ours": round(CHUNKS / seconds),
            "documents a second, peer": round(CHUNKS / peer),
        },
        "from end to end": {
            "megabytes": round(size / 1e6),
            "documents": documents,
            **runs,
            "one process / two, CPU seconds of a worker": round(2 * one["CPU seconds"] / two["CPU seconds"], 2),
            "same file": same,
        },
        "command": "OMP_NUM_THREADS=1 python benchmarks/text_selection.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
