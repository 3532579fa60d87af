"""Scoring code that an interpreter wrote: this package's sandbox beside a fresh interpreter for each snippet, and ``exec``.

Peers: the published scripts of the benchmark run ``exec`` in the process itself, without protection; the usual safe design
starts ``python -I`` for each snippet. Both designs are implemented here. Times of the symbolic fit and of the grid stand beside.

Run: python benchmarks/function_interpretation.py [PATH]      writes function_interpretation.json beside this file, or PATH
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.explanations.function_interpretation import BlackBox, SymbolicInterpreter, interpret, make_numeric
from theodolite.explanations.function_interpretation.numeric import GRID
from theodolite.language.sandbox import run_sandboxed

CODE = "import numpy as np\n\ndef function(x):\n    return np.where(x > 0, 3.0 * x, np.abs(x)) + {}\n"
INPUTS = GRID.tolist()
_CHILD = (
    "import json, sys\njob = json.load(sys.stdin)\nspace = {}\nexec(job['code'], space)\n"
    "print(json.dumps([float(space['function'](x)) for x in job['inputs']]))"
)


def fresh(code: str) -> list[float]:
    """A new interpreter for the snippet."""
    job = json.dumps({"code": code, "inputs": INPUTS})
    run = subprocess.run([sys.executable, "-I", "-c", _CHILD], input=job, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def unprotected(code: str) -> list[float]:
    """In the process itself."""
    space: dict[str, Any] = {}
    exec(code, space)
    return [float(space["function"](x)) for x in INPUTS]


def per_snippet(call: Callable[[str], Any], rounds: int) -> float:
    """Median seconds of different snippets."""
    times = []
    for i in range(rounds):
        began = time.perf_counter()
        call(CODE.format(i))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Write the ratios."""
    run_sandboxed(CODE.format(0), INPUTS)  # the helper process starts once
    assert run_sandboxed(CODE.format(1), INPUTS) == fresh(CODE.format(1)) == unprotected(CODE.format(1))
    ours, other, bare = (
        per_snippet(call, n) for call, n in ((lambda c: run_sandboxed(c, INPUTS), 40), (fresh, 8), (unprotected, 40))
    )
    functions = make_numeric(20, 0, mix=(1, 0, 0, 0))
    began = time.process_time()
    for fn in functions:
        interpret(BlackBox(fn), SymbolicInterpreter())
    fit = (time.process_time() - began) / len(functions)
    began = time.perf_counter()
    for fn in make_numeric(1000, 0, mix=(1, 0, 0, 0)):
        fn.clean(GRID)
    grid = time.perf_counter() - began
    result = {
        "sandbox / fresh interpreter, time of a snippet on 256 inputs": round(ours / other, 4),
        "sandbox / exec without protection, the same": round(ours / bare, 2),
        "snippets a second, sandbox": round(1 / ours, 1),
        "seconds of processor a symbolic fit with scan": round(fit, 3),
        "seconds to draw 1,000 functions and evaluate them on the grid": round(grid, 3),
        "numpy": np.__version__,
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
