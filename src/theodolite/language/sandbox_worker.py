"""The other side of `theodolite.language.sandbox`: runs as a program of its own, imports nothing of this package.

One process waits for snippets as lines of JSON and forks a child for each. The child gives up what it could do harm with
before it compiles a line of what it was given: `_lock` is the whole list.
"""

__all__: list[str] = []

import ctypes
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import unicodedata  # noqa: F401, for names of letters in texts, which a locked process can no longer load it for
from collections.abc import Callable
from typing import Any

_LARGEST, _ALL = 1 << 20, 16 << 20  # bytes of one result, and of all that one process gives
_WAITING = 10  # seconds on the clock that one second of time-out may take on a loaded machine
# numpy and scipy load their parts when they are first used, which a locked process can no longer do
_numpy = "char fft linalg ma polynomial random rec strings"
_scipy = (
    "cluster constants fft fftpack integrate interpolate linalg ndimage optimize signal sparse spatial special stats"
)
_PRELOADED = {
    "numpy": ("numpy", *(f"numpy.{part}" for part in _numpy.split())),
    "scipy": ("scipy", *(f"scipy.{part}" for part in _scipy.split())),
    "math": ("math",),
    "re": ("re",),
    "string": ("string",),
}
_builtins = (
    "abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float frozenset hash hex "
    "id int isinstance issubclass iter len list map max min next oct ord pow range repr reversed round set slice sorted str "
    "sum tuple zip True False None NotImplemented "
    "BaseException SystemExit KeyboardInterrupt Exception ArithmeticError AssertionError AttributeError IndexError KeyError "
    "LookupError NameError NotImplementedError OverflowError RecursionError RuntimeError StopIteration TypeError ValueError "
    "ZeroDivisionError UnicodeError"
)
_REFUSED = (
    "open", "os.", "socket.", "subprocess.", "ctypes.", "import", "shutil.", "tempfile.", "mmap.", "fcntl.", "signal.",
    "resource.", "sys._", "sys.set", "sys.addaudithook", "glob.", "pty.", "pickle.", "marshal.", "urllib.", "syslog.",
)  # fmt: skip

# what a child of Linux on x86-64 may ask of the kernel once it is locked; all else is answered with "not permitted"
_SYSTEM_CALLS = (
    0,  # read, of the descriptors that are open: the result's pipe and /dev/null
    1,  # write, to the same
    9, 10, 11, 12, 25, 28,  # mmap mprotect munmap brk mremap madvise: memory
    14, 15,  # rt_sigprocmask rt_sigreturn
    24, 39, 60, 96, 202, 228, 231, 318,  # sched_yield getpid exit gettimeofday futex clock_gettime exit_group getrandom
    38,  # setitimer, the time-out of the next input
)  # fmt: skip


def _confine() -> list[str]:
    """Leave the network before anything is imported, where the kernel lets us; what was reached."""
    if sys.platform != "linux":
        return []
    new_user, new_network = 0x10000000, 0x40000000
    return ["network namespace"] if ctypes.CDLL(None).unshare(new_user | new_network) == 0 else []


def _filter() -> Callable[[], bool] | None:
    """What sets the list of permitted system calls; None where this machine has none. Made while libraries can be read."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # errno EPERM; kill the process
    load, equal, back, architecture = 0x20, 0x15, 0x06, 0xC000003E
    rows = [(load, 0, 0, 4), (equal, 1, 0, architecture), (back, 0, 0, kill), (load, 0, 0, 0)]
    for i, number in enumerate(_SYSTEM_CALLS):
        rows.append((equal, len(_SYSTEM_CALLS) - i, 0, number))
    rows += [(back, 0, 0, refuse), (back, 0, 0, allow)]
    program = b"".join(struct.pack("HBBI", *row) for row in rows)
    held = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rows), ctypes.addressof(held)), 16)
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def apply(_keep: Any = held) -> bool:  # the header points into it
        no_new_privileges, seccomp = 38, 22
        return prctl(no_new_privileges, 1, 0, 0, 0) == 0 and prctl(seccomp, 2, ctypes.addressof(header), 0, 0) == 0

    return apply


def _pages() -> int:
    """Bytes of address space in use; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _lock(memory: int, seconds: float, filtered: Callable[[], bool] | None) -> None:
    """Give up, for good: memory beyond ``memory``, files, sockets, processes, and after the audit hook asking for them."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 0,  # what is open stays so; nothing else can be opened, a socket as little as a file
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_AS: _pages() + memory,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    if filtered is not None and not filtered():
        os._exit(3)
    sys.addaudithook(_refuse)


def _refuse(event: str, _: Any) -> None:
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not permitted here")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result must be JSON, got {type(value).__name__}")


def _permitted_import(name: str, _globals: Any = None, _locals: Any = None, wanted: Any = (), level: int = 0) -> Any:
    if level or name.split(".")[0] not in _PRELOADED or name not in sys.modules:
        raise ImportError(f"{name} cannot be imported here")
    return sys.modules[name] if wanted else sys.modules[name.split(".")[0]]


def _function(namespace: dict[str, Any], defined: list[str]) -> Any:
    """The function called ``function`` or ``f``, otherwise the last one that was defined."""
    made = [name for name in defined if callable(namespace.get(name))]
    wanted = next((name for name in ("function", "f") if name in made), made[-1] if made else "")
    return namespace.get(wanted)


def _child(job: dict[str, Any], out: int, filtered: Callable[[], bool] | None) -> None:
    import builtins

    inputs, seconds = job["inputs"], job["timeout"]
    names = {name: getattr(builtins, name) for name in _builtins.split() if hasattr(builtins, name)}
    names |= {"__import__": _permitted_import, "print": lambda *_, **__: None}
    namespace: dict[str, Any] = {"__builtins__": names, "__name__": "snippet"}

    def tell(kind: str, value: Any) -> None:
        text = json.dumps([kind, value], default=_plain)
        if len(text) > _LARGEST:
            text = json.dumps(["failure", ["output", f"the result has {len(text):,} characters"]])
        line = text.encode() + b"\n"
        while line:
            line = line[os.write(out, line) :]

    # the timer's signal ends the process in the kernel, where no except clause is
    _lock(job["memory"], seconds * (len(inputs) + 1), filtered)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        exec(compile(job["code"], "snippet", "exec"), namespace)
        function = _function(namespace, job["defined"])
    except BaseException as error:
        tell("start", _told(error))
        return
    if function is None:
        tell("start", ["error", "it defines no function"])
        return
    for value in inputs:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            tell("value", function(value))
        except BaseException as error:
            tell("failure", _told(error))


def _told(error: BaseException) -> list[str]:
    if isinstance(error, MemoryError):
        return ["memory", "more memory than permitted"]
    return ["error", f"{type(error).__name__}: {error}"[:300]]


def _ended(status: int) -> list[str]:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM):
            return ["timeout", "it took longer than permitted"]
        return ["crash", f"it was ended by {signal.Signals(number).name}"]
    return ["crash", f"it left with status {os.WEXITSTATUS(status)}"]


def _run(job: dict[str, Any], filtered: Callable[[], bool] | None) -> list[str]:
    """Fork, read a line for each input, and say of what is missing why: at most one line more than there are inputs."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receive)
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            os.closerange(3, send)
            os.closerange(send + 1, 256)
            _child(job, send, filtered)
        finally:
            os._exit(0)
    os.close(send)
    lines, rest, reason, size = [], b"", None, 0
    patience = _WAITING * job["timeout"]
    until = time.monotonic() + patience  # of a whole line: who sends a byte now and then is not waited for for ever
    while True:
        if not select.select([receive], [], [], max(0.0, until - time.monotonic()))[0]:
            reason = ["timeout", f"no answer in {patience:g} s"]
            break
        piece = os.read(receive, 1 << 16)
        if not piece:
            break
        *whole, rest = (rest + piece).split(b"\n")
        lines += whole
        size += len(piece)
        if whole:
            until = time.monotonic() + patience
        if len(rest) > 2 * _LARGEST or size > _ALL or len(lines) > len(job["inputs"]):
            reason = ["output", "it wrote more than its results"]
            break
    os.close(receive)
    if reason is not None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    told = [line.decode("utf-8", "replace") for line in lines[: len(job["inputs"])]]
    if len(told) < len(job["inputs"]):
        told.append(json.dumps(["end", reason or _ended(status)]))
    return told


def main() -> None:
    """Answer lines of JSON on standard input, each with one line, until there are no more."""
    guards = ["limits", "audit hook", *_confine()]
    sys.path[:] = json.loads(sys.argv[1])
    filtered = _filter()
    if filtered is not None:
        pid = os.fork()  # whether the kernel takes the filter is tried out in a child
        if pid == 0:
            os._exit(0 if filtered() else 1)
        if os.waitpid(pid, 0)[1]:
            filtered = None
        else:
            guards.append("system call filter")
    write = sys.stdout.buffer
    write.write(json.dumps(guards).encode() + b"\n")
    write.flush()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        for root in job["imports"]:
            for name in _PRELOADED[root]:
                if name not in sys.modules:
                    __import__(name)
        write.write(json.dumps(_run(job, filtered)).encode() + b"\n")
        write.flush()


if __name__ == "__main__":
    main()
