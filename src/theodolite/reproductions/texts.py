"""Sets of labelled texts that several reproductions read from the data folder (`theodolite.core.sources.find_data`)."""

__all__ = ["film_reviews", "film_sentences", "paraphrases"]

import tarfile
from pathlib import Path

from theodolite.core.errors import DataError


def film_reviews(path: Path) -> tuple[list[str], list[int]]:
    """Texts and their polarity (1: positive) of the archive review_polarity.tar.gz, in the order of their names."""
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".txt")), key=lambda m: m.name)
        texts = [(m.name, file.read().decode("utf-8", "replace")) for m in members if (file := archive.extractfile(m))]
    found = [(text, int("/pos/" in name)) for name, text in texts if "/pos/" in name or "/neg/" in name]
    if not found:
        raise DataError(f"{path} has no texts in folders named pos and neg")
    return [text for text, _ in found], [label for _, label in found]


def paraphrases(path: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Pairs of sentences and whether they say the same, of an MRPC file; its quotation marks are text."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()[1:]
    fields = [line.split("\t") for line in lines if line]
    if not fields or any(len(row) != 5 or row[0] not in ("0", "1") for row in fields):
        raise DataError(f"{path} is not an MRPC file: every row needs a label 0 or 1, two numbers and two sentences")
    return [(row[3], row[4]) for row in fields], [int(row[0]) for row in fields]


def film_sentences(negative: Path, positive: Path) -> tuple[list[str], list[int]]:
    """Sentences about films, each once, and their polarity (1: positive), from a file of each, one sentence a line."""
    found = list[tuple[str, int]]()
    for polarity, path in enumerate((negative, positive)):
        lines = (line.strip() for line in path.read_text(encoding="latin-1").split("\n"))
        found += [(line, polarity) for line in dict.fromkeys(lines) if line]
    if {polarity for _, polarity in found} != {0, 1}:
        raise DataError(f"{negative} and {positive} must both have lines of text")
    return [text for text, _ in found], [polarity for _, polarity in found]
