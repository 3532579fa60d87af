"""Source code as trees over words: by tree-sitter's grammars, or by Python's own parser."""

__all__ = [
    "ParseError",
    "Parsed",
    "ParserWarning",
    "parse_code",
    "parse_python",
    "parse_snippets",
    "python_functions",
]

import ast
import io
import os
import re
import sysconfig
import token
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.activations.ast_probe.trees import SyntaxTree
from theodolite.core.errors import DataError, InputError, MissingExtraError, require

_STRINGS = frozenset(("string", "string_literal", "template_string", "char_literal", "interpreted_string_literal"))
_NO_WORDS = frozenset(("comment", "line_comment", "block_comment", "line_continuation"))
_ELSEWHERE = frozenset(("site-packages", "dist-packages", "test", "tests", "__pycache__"))
_LAYOUT = frozenset((token.ENDMARKER, token.INDENT, token.DEDENT, token.NEWLINE, tokenize.NL, tokenize.COMMENT))

_Items = list[tuple[str, int, bool]]  # label, depth, whether it is a word; in preorder


class ParseError(DataError):
    """Source code that is not wholly grammatical, or in which there is no word."""


class ParserWarning(UserWarning):
    """Another parser than the usual one was used, whose trees have other labels."""


def parse_python(code: str) -> SyntaxTree:
    """The concrete syntax tree of Python code over its tokens, without comments and docstrings; a string is one word.

    By tree-sitter; where it is not installed by Python's own `ast` (other labels, fewer nodes), with a `ParserWarning`.
    Raises ParseError for code with a syntax error or without a word.

    >>> parse_python("x = f(1)").leaves
    ['x', '=', 'f', '(', '1', ')']
    """
    try:
        return parse_code(code, "python")
    except MissingExtraError:
        warnings.warn(
            "tree-sitter and tree-sitter-python are not installed (pip install 'theodolite[code]'), so Python's own "
            "ast makes the trees; their labels are not those of tree-sitter",
            ParserWarning,
            stacklevel=2,
        )
        return _by_ast(code)


def parse_code(code: str, language: str) -> SyntaxTree:
    """The tree of ``code`` by the grammar in the package tree-sitter-LANGUAGE ("python", "json", "javascript", ...).

    Children are in the order of the source (spans are UTF-8 bytes), comments and Python's docstrings are left out, a string
    is one word. Raises ParseError as `parse_python`, MissingExtraError where tree-sitter or the grammar is not installed.
    """
    try:
        source = code.encode()
    except UnicodeEncodeError as error:
        raise ParseError(
            f"character {error.start} is half of a pair (a surrogate), which no source text holds"
        ) from error
    root = _parser(language).parse(source).root_node
    if root.has_error:
        line = _first_error(root).start_point[0] + 1
        raise ParseError(f"line {line} is not grammatical {language}: {_line(code, line)!r}")
    items, stack = _Items(), [(root, 0)]
    while stack:
        node, depth = stack.pop()
        children = [] if node.type in _STRINGS else node.children
        if children:
            kept = [child for child in children if child.type not in _NO_WORDS]
            if language == "python" and _has_docstring(node, kept, source):
                kept = kept[1:]
            items.append((node.type, depth, False))
            stack += [(child, depth + 1) for child in reversed(kept)]
        else:
            word = source[node.start_byte : node.end_byte].decode()
            if word.strip():
                items.append((word, depth, True))
    return _assembled(items)


@cache
def _parser(language: str) -> Any:
    if not re.fullmatch(r"\w+", language):
        raise InputError(f"a language is a name such as 'python' or 'json', got {language!r}")
    tree_sitter = require("tree_sitter", "code")
    if language == "python":
        grammar = require("tree_sitter_python", "code")
    else:
        try:
            grammar = require(f"tree_sitter_{language}", "code")
        except MissingExtraError as error:
            raise MissingExtraError(
                f"the grammar of {language} is not installed: pip install tree-sitter-{language.replace('_', '-')}"
            ) from error
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def _first_error(root: Any) -> Any:
    """The first node that is an error or stands for something missing."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node.is_error or node.is_missing:
            return node
        stack += [child for child in reversed(node.children) if child.has_error]
    return root


def _line(code: str, number: int) -> str:
    lines = code.splitlines()
    return lines[number - 1].strip()[:60] if number <= len(lines) else ""


def _has_docstring(node: Any, children: Sequence[Any], source: bytes) -> bool:
    """Whether the first of the children is the docstring of a module, class or function."""
    of = node.type == "module" or (
        node.type == "block" and node.parent.type in ("function_definition", "class_definition")
    )
    if not of or not children or children[0].type != "expression_statement" or children[0].child_count != 1:
        return False
    (text,) = children[0].children
    prefix = source[text.start_byte : text.start_byte + 3].lower().partition(source[text.end_byte - 1 : text.end_byte])
    return text.type in ("string", "concatenated_string") and not set(prefix[0]) & set(b"fbt")


def _assembled(items: _Items) -> SyntaxTree:
    """The tree of nodes in preorder, without nodes below which there is no word."""
    labels, arities = list[str](), list[int]()
    waiting = [0] * (max((depth for _, depth, _ in items), default=0) + 2)  # nodes of each depth without a parent yet
    for label, depth, word in reversed(items):
        arity, waiting[depth + 1] = waiting[depth + 1], 0
        if word or arity:
            labels.append(label)
            arities.append(0 if word else arity)
            waiting[depth] += 1
    if not labels:
        raise ParseError("there is no word in the snippet once comments and docstrings are gone")
    return SyntaxTree(tuple(labels[::-1]), tuple(arities[::-1]))


# ---- Python's own parser

_Place = tuple[int, int]  # line from 1, UTF-8 byte in it


def _by_ast(code: str) -> SyntaxTree:
    """Nodes of `ast` over the tokens that lie in them; a token hangs below the smallest node around it."""
    try:
        module = ast.parse(code)
        words = list(_words(code))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ParseError(f"not grammatical python: {error}") from error
    nodes, dropped = _places(module)
    kept = [(start, end, word) for start, end, word in words if not any(a <= start and end <= b for a, b in dropped)]
    # by start, the longer first, outer before inner, nodes before words
    order = sorted(
        [(start, (-end[0], -end[1]), i, label, False) for i, (start, end, label) in enumerate(nodes)]
        + [(start, (-end[0], -end[1]), len(nodes), word, True) for start, end, word in kept]
    )
    items, open_ = [("Module", 0, False)], list[_Place]()
    for start, (line, column), _, label, word in order:
        while open_ and open_[-1] <= start:
            open_.pop()
        items.append((label, len(open_) + 1, word))
        if not word:
            open_.append((-line, -column))
    return _assembled(items)


def _words(code: str) -> Iterator[tuple[_Place, _Place, str]]:
    """(start, end, text) of each token; an f-string, which newer Pythons take apart, whole."""
    lines = code.splitlines(keepends=True)

    def place(position: tuple[int, int]) -> _Place:
        line, column = position
        return line, len(lines[line - 1][:column].encode()) if line <= len(lines) else 0

    depth, began = 0, (1, 0)
    for found in tokenize.generate_tokens(io.StringIO(code).readline):
        name = token.tok_name[found.type]
        if name.endswith("STRING_START"):
            began, depth = (found.start if depth == 0 else began), depth + 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                yield place(began), place(found.end), _between(lines, began, found.end)
        elif depth == 0 and found.type not in _LAYOUT and found.string.strip():
            yield place(found.start), place(found.end), found.string


def _between(lines: Sequence[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    text = "".join(lines[start[0] - 1 : end[0]])
    return text[start[1] : len(text) - len(lines[end[0] - 1]) + end[1]]


def _places(module: ast.Module) -> tuple[list[tuple[_Place, _Place, str]], list[tuple[_Place, _Place]]]:
    """(start, end, label) of all nodes that have a place or children with one, in preorder; and of docstrings."""
    order, stack = list[tuple[ast.AST, int]](), [(child, -1) for child in ast.iter_child_nodes(module)][::-1]
    dropped = list[tuple[_Place, _Place]]()
    for owner in ast.walk(module):
        if isinstance(owner, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and owner.body:
            first = owner.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                dropped.append(_extent(first))
    while stack:
        node, parent = stack.pop()
        here = len(order)
        order.append((node, parent))
        if not isinstance(node, ast.JoinedStr):
            stack += [(child, here) for child in ast.iter_child_nodes(node)][::-1]
    extents: list[tuple[_Place, _Place] | None] = [
        _extent(node) if hasattr(node, "lineno") else None for node, _ in order
    ]
    for i in range(len(order) - 1, -1, -1):  # a parent reaches around its children, of which decorators lie outside
        parent, own = order[i][1], extents[i]
        if parent >= 0 and own is not None:
            around = extents[parent]
            extents[parent] = own if around is None else (min(own[0], around[0]), max(own[1], around[1]))
    nodes = [
        (own[0], own[1], type(node).__name__)
        for (node, _), own in zip(order, extents, strict=True)
        if own is not None and not isinstance(node, (ast.Name, ast.Constant, ast.JoinedStr))
    ]
    return nodes, dropped


def _extent(node: Any) -> tuple[_Place, _Place]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


# ---- many snippets


@dataclass(frozen=True, eq=False)
class Parsed:
    """Trees of the snippets that were kept.

    kept: (n,) which snippets they are. skipped: {reason: how many}. codes: their source. files: the file each is from, ()
    where they are from none.
    """

    trees: tuple[SyntaxTree, ...]
    kept: np.ndarray
    skipped: dict[str, int]
    codes: tuple[str, ...]
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.trees)

    def split(self, sizes: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
        """Disjoint sets of at most ``sizes`` snippets, none of which shares a file with another set.

        Files come in random order and fill one set after the other; a file that is only needed in part is left out elsewhere.
        """
        files = np.array(self.files if self.files else [str(i) for i in range(len(self))])
        names = np.random.default_rng(seed).permutation(np.unique(files)).tolist()
        members = {name: np.flatnonzero(files == name) for name in names}
        parts = []
        for size in sizes:
            part = list[int]()
            while len(part) < size and names:
                part += members[names.pop()].tolist()
            if not part:
                raise DataError(f"{len(self)} snippets of {len(members)} files do not make sets of {list(sizes)}")
            parts.append(np.array(part[:size]))
        return parts


def parse_snippets(
    codes: Iterable[str],
    *,
    parse: Callable[[str], SyntaxTree] = parse_python,
    min_leaves: int = 3,
    max_leaves: int = 100,
    files: Sequence[str] = (),
) -> Parsed:
    """Trees of all ``codes`` that are grammatical and have ``min_leaves`` to ``max_leaves`` words; the others are counted.

    Raises DataError where more than half are not grammatical, or none is kept.

    >>> parse_snippets(["x = 1", "x = (", "f()"]).skipped
    {'not grammatical': 1}
    """
    given, trees, kept = list(codes), list[SyntaxTree](), list[int]()
    skipped, example = Counter[str](), ""
    for i, code in enumerate(given):
        try:
            tree = parse(code)
        except ParseError as error:
            skipped["not grammatical"] += 1
            example = example or str(error)
            continue
        size = tree.arities.count(0)
        if min_leaves <= size <= max_leaves:
            trees.append(tree)
            kept.append(i)
        else:
            skipped["too short" if size < min_leaves else "too long"] += 1
    if 2 * skipped["not grammatical"] > len(given):
        raise DataError(
            f"{skipped['not grammatical']} of {len(given)} snippets do not parse (the first: {example}); check the language "
            "and that each snippet is whole"
        )
    if not trees:
        raise DataError(f"none of {len(given)} snippets has {min_leaves} to {max_leaves} words")
    return Parsed(
        tuple(trees),
        np.array(kept),
        {reason: n for reason, n in skipped.items() if n},
        tuple(given[i] for i in kept),
        tuple(files[i] for i in kept) if files else (),
    )


def python_functions(
    folder: Path | None = None,
    *,
    count: int | None = None,
    min_leaves: int = 3,
    max_leaves: int = 100,
    per_file: int = 6,
    seed: int = 0,
) -> Parsed:
    """Functions of the Python files below ``folder`` (default: Python's own standard library), each a snippet with its file.

    Files, and the functions of a file, come in random order; at most ``per_file`` of a file are kept and ``count`` in all.
    Files that cannot be read as Python are counted in ``skipped``. Raises DataError where there is none.
    """
    home = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = [home] if home.is_file() else _python_files(home)
    rng = np.random.default_rng(seed)
    trees, codes, files, skipped = list[SyntaxTree](), list[str](), list[str](), Counter[str]()
    for k in rng.permutation(len(paths)).tolist():
        if count is not None and len(trees) >= count:
            break
        try:
            functions = _functions(paths[k].read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            skipped["files that are not Python"] += 1
            continue
        own = 0
        for i in rng.permutation(len(functions)).tolist():
            if own == per_file or (count is not None and len(trees) >= count):
                break
            try:
                tree = parse_python(functions[i])
            except ParseError:
                skipped["not grammatical"] += 1
                continue
            if not min_leaves <= tree.arities.count(0) <= max_leaves:
                skipped["too short or too long"] += 1
                continue
            trees.append(tree)
            codes.append(functions[i])
            files.append(str(paths[k].relative_to(home)) if paths[k] != home else home.name)
            own += 1
    if not trees:
        raise DataError(
            f"{home} holds no Python function of {min_leaves} to {max_leaves} words; name a folder or a .py file"
        )
    return Parsed(tuple(trees), np.arange(len(trees)), dict(skipped), tuple(codes), tuple(files))


def _python_files(home: Path) -> list[Path]:
    found = list[Path]()
    for folder, below, files in os.walk(home):
        below[:] = [name for name in below if name not in _ELSEWHERE]
        found += [Path(folder) / name for name in files if name.endswith(".py")]
    return sorted(found)


def _functions(text: str) -> list[str]:
    """The source of each function and method, without decorators and not indented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of escapes in other people's strings
        module = ast.parse(text)
    lines = text.splitlines(keepends=True)
    return [
        "".join(_outdented(line, node.col_offset) for line in lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(module)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def _outdented(line: str, by: int) -> str:
    """A line with at most ``by`` blanks fewer in front; a string or comment may begin further left than its function."""
    return line[min(by, len(line) - len(line.lstrip(" \t"))) :]
