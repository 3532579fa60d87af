"""A batch of learner calls at once, beside one after the other with pauses, against a server that takes 200 ms a call.

Peer: the design of the official example's loop (one request after the other, three seconds of pause a batch), written anew
here; its pauses are counted, not waited for. And scoring: labels of many reviews by one table, beside one prompt at a time, on
SmolLM2, where both are there (THEODOLITE_DATA, make models).

Run: python benchmarks/verbalized_calls.py [PATH]      writes verbalized_calls.json beside this file, or PATH
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.core.sources import find_data
from theodolite.hyperparameters.verbalized import VerbalizedRegressor
from theodolite.language import connect
from theodolite.language.pretrained import WHEELS, model_folder

DELAY, BATCH, ROUNDS, PAUSE, REVIEWS = 0.2, 10, 5, 3.0, 24


class Slow(BaseHTTPRequestHandler):
    """Answers every chat with 7.00 after the delay."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart; together they would wait for each other

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_POST(self) -> None:
        """One answer."""
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(DELAY)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Output: [7.00]"}}
        body = json.dumps({"choices": [choice], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def slow_server() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def calls() -> dict[str, Any]:
    """Seconds of a batch of ten and of one call."""
    X = np.arange(BATCH, dtype=float)[:, None]
    with slow_server() as url:
        together = VerbalizedRegressor(connect(url, "m", cache=False, concurrency=BATCH), task="Predict.")
        alone = VerbalizedRegressor(connect(url, "m", cache=False, concurrency=1), task="Predict.")
        together.predict(X)  # connections are opened once
        taken: dict[str, list[float]] = {"batch": [], "one": [], "one after the other": []}
        for _ in range(ROUNDS):
            for name, model, rows in (("batch", together, X), ("one", alone, X[:1]), ("one after the other", alone, X)):
                began = time.perf_counter()
                model.predict(rows)
                taken[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "ratio, batch of 10 / one call": round(seconds["batch"] / seconds["one"], 2),
        "ratio, ours / one after the other": round(seconds["batch"] / seconds["one after the other"], 3),
        "ratio, ours / one after the other with the official pause": round(
            seconds["batch"] / (seconds["one after the other"] + PAUSE), 3
        ),
    }


def scoring() -> dict[str, Any] | str:
    """CPU seconds of labels for reviews, as one table and one prompt at a time."""
    path = find_data("rt-polarity/rt-polarity.pos")
    if path is None or model_folder("smollm2") is None:
        return f"not run: needs rt-polarity in THEODOLITE_DATA and {WHEELS['smollm2']}"
    lines = [line.strip() for line in path.read_text(encoding="latin-1").split("\n")]
    reviews = [line for line in lines if 0 < len(line) < 110][:REVIEWS]
    theta = "Movie reviews. Is the review positive or negative?"
    prompts = [f"{theta}\nInput: {review}\nLabel:" for review in reviews]
    labels = [" positive", " negative"]
    model = connect(cache=False)
    model.score_table(prompts[:2], labels)  # loads
    began = time.process_time()
    table = model.score_table(prompts, labels)
    ours = time.process_time() - began
    began = time.process_time()
    # the usual way: each pair of prompt and label is a text of its own
    pairs = [[model.score(prompt, [label])[0] for label in labels] for prompt in prompts]
    single = time.process_time() - began
    return {
        "ratio, one table / each pair alone, CPU": round(ours / single, 3),
        "reviews a CPU second": round(REVIEWS / ours, 1),
        "largest difference, nats": round(float(np.abs(table - np.array(pairs)).max()), 6),
    }


def main() -> None:
    result = {
        "name": "learner calls of a batch, and scored labels",
        "peer": "the official loop's design, written anew; scoring one prompt and label at a time",
        "calls": calls(),
        "scoring": scoring(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/verbalized_calls.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
