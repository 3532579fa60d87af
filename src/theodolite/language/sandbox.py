"""Runs a program that a language model wrote, in a process that has given up what it could do harm with.

A snippet defines a function of one argument; `run_sandboxed` calls it on each input and gives the results. Three layers:

- **Before**: the program's tree is read. Imports other than math, numpy, scipy, re and string, names such as ``eval`` and
  ``open``, attributes that begin with an underscore, attributes named like other modules or like numpy's readers and
  writers, and format strings that reach into objects are `UnsafeCode`, and nothing runs.
- **The process**: a child of a helper process that started without the environment's variables (so without its keys), with
  few builtins. Limits of the kernel: address space, processor time, no file can grow, and no descriptor can be opened: no
  file and no socket. A timer of the kernel ends it when an input takes too long; no ``except`` can catch that. Where they
  are to be had, a network namespace of its own and a filter that refuses every system call but memory, time, reading and
  writing open descriptors, and leaving (Linux on x86-64). `Sandbox.guards` names the layers in force.
- **After**: results come back as JSON over a pipe, of bounded size, and are never unpickled.

What holds against a determined attacker: with the system call filter, code that escapes Python altogether can still only
compute, for a bounded time in bounded memory, and write bytes that are read as JSON. It sees what the helper process has in
memory: Python, numpy, scipy and the snippet. Without the filter (other systems, older kernels) files and sockets are still
shut by the limit on descriptors, but processes are kept from forking only by the audit hook and, for users other than root,
by the limit on processes; code that escapes Python can then signal the user's other processes. Windows has none of this and
is refused. No layer hides how long a program takes.
"""

__all__ = ["Sandbox", "SandboxFailure", "SandboxUnavailable", "UnsafeCode", "check_code", "run_sandboxed"]

import ast
import atexit
import contextlib
import functools
import json
import os
import string
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from theodolite.core.errors import InputError, TheodoliteError

ALLOWED_IMPORTS = ("math", "numpy", "scipy", "re", "string")
"""What a snippet may import."""

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_LONGEST = 50_000  # characters of a snippet
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # of the environment: what Python may need to start
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_RESTARTS = 2  # of a worker that an input ended
_LONGEST_RUN, _MOST_MEMORY = 3600, 1 << 20  # seconds of an input, MiB
_names = "eval exec compile open input breakpoint getattr setattr delattr vars globals locals dir help exit quit type memoryview"
_NAMES = frozenset(_names.split())
# numpy's, scipy's and string's ways to files, native code, code from text, and what leads from an object to a frame
_attributes = (
    "load loads load_npz save save_npz savez savez_compressed savetxt loadtxt genfromtxt fromfile tofile fromregex memmap "
    "open_memmap DataSource dump dumps ctypes ctypeslib as_ctypes lib f2py distutils testing core show_config info source "
    "lookfor get_include LowLevelCallable Formatter format_map gi_frame gi_code gi_yieldfrom cr_frame cr_code ag_frame ag_code "
    "f_back f_builtins f_code f_globals f_locals tb_frame tb_next mro with_traceback bltns npyio mmio"
)
# names of modules of the standard library that are also names of harmless functions
_harmless = "array bisect cmath copy math random re select signal statistics string trace types numbers"
_ATTRIBUTES = (frozenset(_attributes.split()) | frozenset(sys.stdlib_module_names)) - frozenset(_harmless.split())


class UnsafeCode(TheodoliteError):
    """A program uses what it may not; ``name`` is what. Nothing was run."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"the program was not run: {name}: {why}")
        self.name = name


class SandboxUnavailable(TheodoliteError):
    """This system cannot confine a program, so none was run."""


@dataclass(frozen=True)
class SandboxFailure:
    """Why there is no result for an input.

    reason: "syntax" (the program does not compile), "error" (it raised, or its result is not JSON), "timeout", "memory",
    "output" (a result, or all of them, too large), "crash" (the process ended in another way). message: more, in words.
    """

    reason: str
    message: str = ""


def run_sandboxed(code: str, inputs: Iterable[Any], timeout_s: float = 2, memory_mb: int = 256) -> list[Any]:
    """The results of the function that ``code`` defines, one an input; a `SandboxFailure` where there is none.

    The function is the one called ``function`` or ``f``, otherwise the last one defined. inputs: what JSON can hold. Results
    are what JSON can hold; numpy's numbers and arrays come back as numbers and lists. timeout_s: seconds of processor time
    for each input (ten times as many on the clock), and for the program's top level. memory_mb: MiB above what Python and
    the imported modules take. An input that ends the process costs a new one; from the third on all later inputs get the
    same failure. Names, modules and state of a snippet are gone with it.

    Raises UnsafeCode, InputError for limits that are none, SandboxUnavailable on Windows.

    >>> run_sandboxed("def f(x): return x ** 2", [3, 0.5])
    [9, 0.25]
    >>> run_sandboxed("def f(x): return 1 / x", [0])
    [SandboxFailure(reason='error', message='ZeroDivisionError: division by zero')]
    """
    return _shared(os.getpid()).run(code, inputs, timeout_s=timeout_s, memory_mb=memory_mb)


@functools.cache
def _shared(_process: int) -> "Sandbox":
    """One for each process: after a fork two of them would read each other's answers."""
    made = Sandbox()
    atexit.register(made.close)
    return made


def check_code(code: str) -> ast.Module | None:
    """The tree of a program that may run, None where it does not compile. Raises UnsafeCode naming what it may not use."""
    if len(code) > _LONGEST:
        raise UnsafeCode("length", f"it has {len(code):,} characters, at most {_LONGEST:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an escape in a text, say: such a program runs all the same
            tree = ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    nodes = list(ast.walk(tree))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    plain = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _is_plain_format(node.func)}
    for node in nodes:
        for name in _identifiers(node):
            if name.startswith("__") and name != "__name__":
                raise UnsafeCode(name, "names that begin with two underscores may not be used")
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            _check_module("." * node.level + (node.module or ""))
            for alias in node.names:
                _check_attribute(alias.name)
        elif isinstance(node, ast.Attribute) and id(node) not in plain:
            _check_attribute(node.attr)
        elif isinstance(node, ast.MatchClass):
            for name in node.kwd_attrs:
                _check_attribute(name)
        elif isinstance(node, ast.Name) and node.id in _NAMES - own:
            raise UnsafeCode(node.id, "this name may not be used")
        elif isinstance(node, ast.ClassDef | ast.AsyncFunctionDef):
            raise UnsafeCode(node.name, "only plain functions may be defined")
    return tree


def _identifiers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Constant):
        return []
    found = [value for _, value in ast.iter_fields(node)]
    found += [one for value in found if isinstance(value, list) for one in value]
    return [value for value in found if isinstance(value, str)]


def _check_module(name: str) -> None:
    root, *inner = name.split(".")
    if root not in ALLOWED_IMPORTS:
        raise UnsafeCode(name, f"only {', '.join(ALLOWED_IMPORTS)} may be imported")
    for part in inner:
        _check_attribute(part)


def _check_attribute(name: str) -> None:
    if name == "*":
        raise UnsafeCode(name, "what is imported must be named")
    if name.startswith("_"):
        raise UnsafeCode(name, "names that begin with an underscore may not be reached")
    if name == "format":
        raise UnsafeCode(name, "a format that reaches into objects, or that is not a text in quotes, may not be used")
    if name in _ATTRIBUTES:
        raise UnsafeCode(name, "this attribute may not be used")


def _is_plain_format(function: ast.expr) -> bool:
    """Whether a call's function is ``"text".format`` whose fields reach into nothing."""
    if not (isinstance(function, ast.Attribute) and function.attr == "format"):
        return False
    if not (isinstance(function.value, ast.Constant) and isinstance(function.value.value, str)):
        return False
    try:
        fields = list(string.Formatter().parse(function.value.value))
    except ValueError:
        return False
    return not any(set(".[") & set(field or "") or "{" in (spec or "") for _, field, spec, _ in fields)


def _roots(tree: ast.Module) -> list[str]:
    """The modules that a program imports, without what stands after a dot."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return sorted({name.split(".")[0] for name in names})


def _defined(tree: ast.Module) -> list[str]:
    """What a program's top level binds, in order: functions, and names that may hold one."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


class Sandbox:
    """A helper process that runs snippets, each in a child of its own; started when first needed and after it was lost.

    guards: the layers in force: "limits" and "audit hook" always, "network namespace" and "system call filter" where this
    machine has them. Calls from several threads wait for each other. Use as a context manager, or call `close`.
    """

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise SandboxUnavailable("Windows has no way to confine a program that this package uses; run it on Linux")
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._guards: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def guards(self) -> tuple[str, ...]:
        """The layers in force on this machine."""
        with self._lock:
            self._pipes()
        return self._guards

    def run(self, code: str, inputs: Iterable[Any], *, timeout_s: float = 2, memory_mb: int = 256) -> list[Any]:
        """As `run_sandboxed`."""
        if not 0 < timeout_s <= _LONGEST_RUN or not 1 <= memory_mb <= _MOST_MEMORY:
            raise InputError(
                f"need timeout_s above 0 and up to {_LONGEST_RUN:,} s, and memory_mb from 1 to {_MOST_MEMORY:,} MiB, got "
                f"{timeout_s} and {memory_mb}"
            )
        tree = check_code(code)
        waiting = [_plain(value) for value in inputs]
        if tree is None:
            return [SandboxFailure("syntax", "the program does not compile")] * len(waiting)
        job = {
            "code": code, "imports": _roots(tree), "defined": _defined(tree), "timeout": timeout_s,
            "memory": round(memory_mb * 2**20),
        }  # fmt: skip
        results: list[Any] = []
        for _ in range(1 + _RESTARTS):
            if len(results) == len(waiting):
                return results
            results += self._ask(job | {"inputs": waiting[len(results) :]})
        return results + results[-1:] * (len(waiting) - len(results))

    def close(self) -> None:
        """End the helper process; a later call starts another."""
        with self._lock:
            self._end()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """End the helper process with the last one who could use it."""
        if hasattr(self, "_process"):  # not there on Windows
            self._end()

    def _ask(self, job: dict[str, Any]) -> list[Any]:
        """Results up to and with the one that ended the process."""
        with self._lock:
            try:
                send, receive = self._pipes()
                send.write(json.dumps(job).encode() + b"\n")
                send.flush()
                lines = json.loads(receive.readline())
            except (OSError, ValueError):
                self._end()
                return [SandboxFailure("crash", "the process that runs programs was lost")]
            except BaseException:  # Ctrl-C: its answer would be taken for that of the next program
                self._end()
                raise
        results: list[Any] = []
        for line in lines:
            kind, value = _read(line)
            if kind == "start":
                return [SandboxFailure(*value)] * len(job["inputs"])
            results.append(value if kind == "value" else SandboxFailure(*value))
        return results

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._end()
            self._owner = os.getpid()
            # -I: no settings from the environment or the folder; what can be imported is told, so that it is the same here
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                env={name: value for name, value in os.environ.items() if name in _KEPT} | _ONE_THREAD,
            )  # fmt: skip
            self._guards = tuple(json.loads(cast(IO[bytes], self._process.stdout).readline()))
        return cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # after a fork it is the other process's
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent yet has nobody to go to
                    pipe.close()
        process.kill()
        process.wait()


def _plain(value: Any) -> Any:
    """An input as JSON has it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"an input of a program must be what JSON can hold: {error}") from None
    return value


def _read(line: str) -> tuple[str, Any]:
    """What the child wrote: (kind, value), a failure where it is nothing of the kind."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(line):
            case ["value", value]:
                return "value", value
            case ["start" | "end" | "failure" as kind, [str(reason), str(message)]]:
                return kind, (reason, message)
    return "failure", ("output", "what it wrote is not a result")
