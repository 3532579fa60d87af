"""Python code as a tree, by the standard library's parser."""

__all__ = ["sketch_python"]

import ast
import re
import warnings
from typing import Any

from theodolite.predictions.program_sets.trees import ProgramSyntaxError, Sketch

_LINE = re.compile(r".*?(?:\r\n|\r|\n|\Z)", re.DOTALL)
_FORMATTED = ("JoinedStr", "TemplateStr")  # before Python 3.12 the places inside them are wrong, so they are leaves
_LAYOUT = ("ctx", "kind", "type_comment", "type_ignores")


def sketch_python(code: str) -> Sketch:
    """The tree of ``code``; raises ProgramSyntaxError."""
    body, places = _parse(code)
    if not body:
        raise ProgramSyntaxError("the text holds no Python statement")
    if len(body) == 1:
        root, pending = _sketch(body[0], places, "body", True)
        root.span = (0, len(code))
    else:
        root = Sketch("Module", "", (0, len(code)))
        pending = []
        for statement in body:
            child, more = _sketch(statement, places, "body", True)
            root.children.append(child)
            pending += more
    while pending:  # not by recursion: generated code can be deeper than Python's stack
        parent, node, slot, in_list = pending.pop()
        child, more = _sketch(node, places, slot, in_list)
        parent.children.append(child)
        pending += more
    return root


def _parse(code: str) -> tuple[list[ast.stmt], "_Places"]:
    first = next((line for line in code.splitlines() if line.strip()), "")
    indented = first[:1].isspace()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the generated text, which is only looked at
            tree = ast.parse("if 1:\n" + code if indented else code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramSyntaxError(f"the text is not Python: {error}") from error
    if not indented:
        return tree.body, _Places(code, 1)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.If) or tree.body[0].orelse:
        raise ProgramSyntaxError("the text is not Python: a later line is indented less than the first")
    return tree.body[0].body, _Places(code, 2)


class _Places:
    """Characters of the parser's lines and columns; its columns count UTF-8 bytes. first: what it calls the first line."""

    def __init__(self, code: str, first: int) -> None:
        self._lines = [match.group() for match in _LINE.finditer(code)]
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._first = first

    def span(self, node: Any) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _at(self, line: int, column: int) -> int:
        text = self._lines[line - self._first]
        characters = column if text.isascii() else len(text.encode()[:column].decode())
        return self._starts[line - self._first] + characters


_Pending = list[tuple[Sketch, ast.AST, str, bool]]


def _sketch(node: ast.AST, places: _Places, slot: str, in_list: bool) -> tuple[Sketch, _Pending]:
    """One node, and its children that are still to be made."""
    span = places.span(node)
    if isinstance(node, ast.Expr):  # the statement says nothing that its expression does not
        node = node.value
    name = type(node).__name__
    if name in _FORMATTED:
        return Sketch(name, ast.dump(node), span, slot, in_list), []
    says: list[str] = []
    children: list[tuple[ast.AST, str, bool]] = []
    _read(node, "", says, children)
    sketch = Sketch(name, " ".join(says), span, slot, in_list)
    return sketch, [(sketch, *child) for child in children]


def _read(node: ast.AST, path: str, says: list[str], children: list[tuple[ast.AST, str, bool]]) -> None:
    """What a node says by itself, and its children; nodes without a place are read as part of it."""
    for name, value in ast.iter_fields(node):
        if name in _LAYOUT or value is None:
            continue
        several = isinstance(value, list)
        for place, item in enumerate(value if several else [value]):
            at = f"{path}{name}[{place}]" if several else f"{path}{name}"
            if not isinstance(item, ast.AST):
                says.append(f"{at}={item!r}")  # None too, in the keys of {**rest}
            elif hasattr(item, "lineno"):
                children.append((item, f"{path}{name}", several))
            elif not item._fields:
                says.append(f"{at}={type(item).__name__}")
            else:
                _read(item, f"{at}.", says, children)
