"""Real prompts with right answers: functions of Python files up to one of their `return`s, and the rest of that line."""

__all__ = ["ReturnLine", "return_lines"]

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theodolite.core.errors import DataError
from theodolite.predictions.program_sets.trees import ProgramSyntaxError, parse_program

_NOT_CODE = ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings")


@dataclass(frozen=True)
class ReturnLine:
    """prompt: a function up to and with the word return. rest: what follows it. file: where it stands."""

    prompt: str
    rest: str
    file: str


def return_lines(
    sources: str | Path | None = None, *, count: int = 200, per_file: int = 1, longest: int = 400, seed: int = 0
) -> list[ReturnLine]:
    """At most ``count`` lines, at most ``per_file`` of a file and one of a function, in random order.

    sources: a folder of Python files or one; the standard library where None. longest: of a prompt, in characters. Only
    returns of a value on one line count. Raises DataError where there is none.
    """
    root = Path(sysconfig.get_path("stdlib")) if sources is None else Path(sources).expanduser()
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    if sources is None:
        files = [file for file in files if not set(_NOT_CODE) & set(file.relative_to(root).parts)]
    rng = np.random.default_rng(seed)
    found: list[ReturnLine] = []
    for place in rng.permutation(len(files)).tolist():
        if len(found) >= count:
            break
        lines = _lines_of(files[place], str(files[place].relative_to(root)) if root.is_dir() else root.name, longest)
        chosen = rng.permutation(len(lines))[:per_file]
        found += [lines[i] for i in chosen.tolist()]
    if not found:
        raise DataError(f"{root} holds no function with a return of a value on one line")
    return found[:count]


def _lines_of(file: Path, name: str, longest: int) -> list[ReturnLine]:
    try:
        code = file.read_text(encoding="utf-8")
        tree = ast.parse(code)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return []  # sources hold templates and old syntax too; what cannot be read is no sample
    lines = code.split("\n")
    made = []
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Return) or node.value is None or node.lineno != node.end_lineno:
                continue
            line = lines[node.lineno - 1]
            if not line.isascii() or not line[node.col_offset :].startswith("return "):
                continue
            start = node.col_offset + len("return")
            prompt = "\n".join([*lines[function.lineno - 1 : node.lineno - 1], line[:start]])
            rest = line[start : node.end_col_offset]
            if len(prompt) <= longest and _is_program(rest):
                made.append(ReturnLine(prompt, rest, name))
                break
    return made


def _is_program(text: str) -> bool:
    try:
        parse_program(text)
    except ProgramSyntaxError:
        return False
    return True
