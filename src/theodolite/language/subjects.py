"""Language models as subjects: a causal language model with the texts it is read on."""

__all__ = ["default_texts", "language_subject", "read_texts"]

import ast
import glob
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import DataError, InputError
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.language.pretrained import WHEELS, load_decoder

_LENGTH, _ROWS = 64, {"train": 256, "validation": 64, "test": 64}
_PER_TEXT = 16  # rows, so that a few long texts do not make up a part
_FEWEST = 20  # texts from which whole texts go to one part; fewer are cut into pieces
_SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
_LARGEST = 64 << 20  # bytes of text that are read


def language_subject(
    model: str = "smollm2",
    text: str | Path | None = None,
    *,
    column: str = "text",
    length: int | None = None,
    seed: int = 0,
) -> Subject:
    """A causal language model on texts: rows of ``length`` tokens, each text in one of train, validation and test.

    model: "smollm2", a Hugging Face folder, or a name on the hub. text: a text file, a folder or pattern of text files, or
    JSON Lines with the text in ``column``; the documentation strings of Python's standard library where None. length: of a
    row in tokens; 64, or fewer where most texts are shorter. At most 256, 64 and 64 rows are kept, drawn from ``seed``.

    Raises DataError where the texts are not there or too short to fill each part, ModelError as `load_decoder`.
    """
    if length is not None and not 8 <= length <= 4096:
        raise InputError(f"rows must have between 8 and 4,096 tokens, got {length}")
    texts = default_texts() if text is None else read_texts(text, column=column)
    loaded, tokenizer = load_decoder(model)
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    length = _length_for(encoded) if length is None else length
    rows, groups, pieces = _rows(encoded, length)
    parts, kept = _split(rows, groups, seed)
    name = "documentation strings" if text is None else Path(str(text)).stem or str(text)
    notes = (
        f"{len(texts):,} texts as {len(rows):,} rows of {length} tokens without padding, at most {_PER_TEXT} of a text or "
        f"piece; {kept:,} of them kept",
        "each text is in one part only" if pieces == 1 else f"few texts, so each was cut into {pieces} consecutive pieces, "
        "and each piece is in one part only",
    )  # fmt: skip
    data = Dataset(name, "text", "language", parts["train"], parts["validation"], parts["test"], notes=notes)
    what = "SmolLM2-135M-Instruct" if model == "smollm2" else model
    source = "Python's documentation strings" if text is None else str(text)
    return Subject(
        model if text is None and model in WHEELS else f"{Path(model).name} on {name}",
        data, loaded, description=f"the language model {what} on {source}", tokenizer=tokenizer,
        notes=("the model may have been trained on these texts",),
    )  # fmt: skip


def default_texts() -> list[str]:
    """The documentation strings of Python's standard library, one text a module: prose that every machine has."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
        if found:
            texts.append("\n\n".join(found))
    return texts


def read_texts(source: str | Path, *, column: str = "text") -> list[str]:
    """Texts of a file, of a folder or pattern of files, or of the ``column`` of JSON Lines; UTF-8, at most 64 MiB.

    Raises DataError naming what is wrong: nothing there, not UTF-8, a line without the column, only blank texts.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and file.suffix in (".txt", ".md", ".py", ".rst")
        )
        hint = "a folder of texts needs files ending in .txt, .md, .rst or .py"
    elif path.is_file():
        files, hint = [path], ""
    else:
        files, hint = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()), ""
    if not files:
        raise DataError(f"{source}: there are no texts to read there" + (f"; {hint}" if hint else ""))
    size = sum(file.stat().st_size for file in files)
    if size > _LARGEST:
        raise DataError(
            f"{source} holds {size >> 20} MiB of text; give at most {_LARGEST >> 20} MiB, a sample is enough"
        )
    texts = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file} as UTF-8 text: {error}") from error
        texts += _lines(file, content, column) if file.suffix == ".jsonl" else [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{source}: all texts are blank")
    return texts


def _lines(file: Path, content: str, column: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            there = ", ".join(map(str, row))[:200] if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{file}, line {number} has no text under {column!r}; it has: {there}; say which with --text"
            )
        texts.append(row[column])
    return texts


def _length_for(encoded: Sequence[Sequence[int]]) -> int:
    """64, or the largest power of two, at least 8, that half of the texts reach."""
    median = int(np.median([len(ids) for ids in encoded]))
    return min(_LENGTH, max(8, 1 << (max(1, median).bit_length() - 1)))


def _rows(encoded: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor, int]:
    """Rows (n, length) of the texts' tokens, the number of the text (or of its piece) of each, and pieces per text."""
    whole = [torch.tensor(ids[: len(ids) // length * length]).view(-1, length) for ids in encoded if len(ids) >= length]
    pieces = 1 if len(whole) >= _FEWEST else -(-_FEWEST // max(1, len(whole)))
    groups = [part[:_PER_TEXT] for rows in whole for part in rows.tensor_split(min(pieces, len(rows)))]
    if len(groups) < 5:
        total = sum(map(len, encoded))
        raise DataError(
            f"the texts give {total} tokens, {len(groups)} pieces of {length}; five at least are needed for three parts: "
            "give more text, or shorter rows"
        )
    numbers = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(groups)])
    return torch.cat(groups), numbers, pieces


def _split(rows: Tensor, groups: Tensor, seed: int) -> tuple[dict[str, Rows], int]:
    """Whole groups to each part, as many as its share of the rows asks for; then rows drawn down to what is kept."""
    rng = np.random.default_rng(seed)
    counts = torch.bincount(groups)
    order = rng.permutation(len(counts))
    parts: dict[str, list[int]] = {name: [] for name in _SHARES}
    filled = dict.fromkeys(_SHARES, 0)
    for group in order.tolist():  # to the part that is furthest behind its share
        name = min(_SHARES, key=lambda part: filled[part] / _SHARES[part])
        parts[name].append(group)
        filled[name] += int(counts[group])
    made, kept = {}, 0
    for name, members in parts.items():
        places = torch.isin(groups, torch.tensor(members)).nonzero()[:, 0].numpy()
        chosen = torch.from_numpy(np.sort(rng.permutation(places)[: _ROWS[name]]))
        chosen = chosen[torch.from_numpy(rng.permutation(len(chosen)))]
        made[name] = Rows(rows[chosen], groups[chosen])
        kept += len(chosen)
    return made, kept
