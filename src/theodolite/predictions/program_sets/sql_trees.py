"""SQL as a tree, by sqlglot's parser, which is watched to learn where in the text each node stands.

What runs for every step of the parser is not type-checked at run time.
"""

__all__ = ["sketch_sql"]

import functools
from typing import Any, no_type_check

from theodolite.core.errors import require
from theodolite.predictions.program_sets.trees import ProgramSyntaxError, Sketch


def sketch_sql(code: str, dialect: str | None = None) -> Sketch:
    """The tree of ``code`` in sqlglot's ``dialect``; raises ProgramSyntaxError, MissingExtraError."""
    sqlglot = require("sqlglot", "code")
    speech = sqlglot.Dialect.get_or_raise(dialect)
    parser = _watched(speech.parser_class)(dialect=speech)
    parser.places = {}
    try:
        statements = [found for found in parser.parse(speech.tokenize(code), code) if found is not None]
    except (sqlglot.errors.SqlglotError, RecursionError) as error:
        raise ProgramSyntaxError(f"the text is not SQL: {error}") from error
    if not statements:
        raise ProgramSyntaxError("the text holds no SQL statement")
    reader = _Reader(parser.places, speech)
    if len(statements) == 1:
        root, pending = reader.sketch(statements[0], "", False)
        root.span = (0, len(code))
    else:
        root, pending = (
            Sketch("Script", "", (0, len(code))),
            [(None, found, "statements", True) for found in statements],
        )
    while pending:
        parent, found, slot, in_list = pending.pop()
        child, more = reader.sketch(found, slot, in_list)
        (root if parent is None else parent).children.append(child)
        pending += more
    return root


@functools.cache
@no_type_check
def _watched(parser_class: Any) -> Any:
    """The parser, with a note of the text that each of its steps took for the node that it returns."""
    expression = require("sqlglot", "code").exp.Expression

    def watch(step: Any) -> Any:
        @functools.wraps(step)
        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            first = self._index
            found = step(self, *args, **kwargs)
            if isinstance(found, expression) and self._index > first:
                start, end = self._tokens[first].start, self._tokens[self._index - 1].end + 1
                kept = self.places.get(id(found), (found, start, end))  # the node too, so that no other can get its id
                self.places[id(found)] = (found, min(start, kept[1]), max(end, kept[2]))
            return found

        return watched

    steps = {name: watch(getattr(parser_class, name)) for name in dir(parser_class) if name.startswith("_parse_")}
    return type("WatchedParser", (parser_class,), {"__slots__": ("places",), **steps})


@no_type_check
class _Reader:
    """Nodes of sqlglot's tree, of its places by id and its dialect."""

    def __init__(self, places: dict[int, tuple[Any, int, int]], speech: Any) -> None:
        self._places, self._speech = places, speech
        expressions = require("sqlglot", "code").exp
        self._node, self._identifier = expressions.Expression, expressions.Identifier
        self._literal = expressions.Literal

    def sketch(self, node: Any, slot: str, in_list: bool) -> tuple[Sketch, list[tuple[Sketch | None, Any, str, bool]]]:
        """One node, and its children that are still to be made; a lone identifier is part of the node that it names."""
        says, children = self._read(node)
        span = self._span(node)
        if len(children) == 1 and isinstance(children[0][0], self._identifier):
            says += self._read(children[0][0])[0]
            inner, children = self._span(children[0][0]), []
            span = inner if span[0] == span[1] else (min(span[0], inner[0]), max(span[1], inner[1]))
        sketch = Sketch(type(node).__name__, " ".join(says), span, slot, in_list)
        return sketch, [(sketch, *child) for child in children]

    def _span(self, node: Any) -> tuple[int, int]:
        if id(node) in self._places:
            return self._places[id(node)][1:]
        start, last = (
            node.meta.get("start"),
            node.meta.get("end"),
        )  # names and literals that no step of its own returned
        return (0, 0) if start is None or last is None else (start, last + 1)

    def _read(self, node: Any) -> tuple[list[str], list[tuple[Any, str, bool]]]:
        if isinstance(node, self._identifier):
            # quoted or not, what the dialect takes for one name is one name
            return [repr(self._speech.normalize_identifier(node.copy()).this)], []
        if isinstance(node, self._literal):
            return [repr(node.this) if node.is_string else str(node.this)], []
        says: list[str] = []
        children: list[tuple[Any, str, bool]] = []
        for name, value in node.args.items():
            several = isinstance(value, (list, tuple))
            for place, item in enumerate(value if several else [value]):
                if isinstance(item, self._node):
                    children.append((item, name, several))
                elif item is not None and item is not False:
                    says.append(f"{name}[{place}]={item!s}".upper() if several else f"{name}={item!s}".upper())
        return says, children
