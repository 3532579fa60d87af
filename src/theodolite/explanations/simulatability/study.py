"""Forms for people: a test as CSV and HTML files, and their answers read back.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (the forms follow the published ones).
"""

__all__ = ["export_forms", "import_responses", "read_label"]

import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from theodolite.core.errors import DataError, InputError
from theodolite.core.files import make_folder, read_json, write_json, write_whole
from theodolite.explanations.simulatability.methods import Explainer
from theodolite.explanations.simulatability.protocol import CounterfactualTest, ForwardTest

_FARTHEST = 2
_KEY = "key.json"


def export_forms(
    test: ForwardTest | CounterfactualTest, explainers: Sequence[Explainer], directory: str | Path
) -> Path:
    """Write the forms of ``test`` for every explainer (bound to its protocol) into ``directory``, and the key beside them.

    The forms of a forward test, in the order in which a reader gets them, are METHOD-first.csv (inputs with the model's
    answers), METHOD-pre.csv, METHOD-learning.csv (the same inputs, explained) and METHOD-post.csv; of a counterfactual test
    METHOD-pre.csv and METHOD-post.csv; each also as HTML to read. A reader fills in the column answer (and rating, 1 to 7, where
    there is one), and gives the file back as NAME.METHOD-pre.csv. The key (key.json) has the model's answers: do not hand it
    out. Readers know the task, so make the protocol with balance="errors" where the rows allow it.
    """
    if not explainers:
        raise InputError("need at least one explainer")
    folder, on = make_folder(Path(directory)), explainers[0].on
    forward = isinstance(test, ForwardTest)
    ids = test.ids.tolist()
    truth = test.model_outputs if isinstance(test, ForwardTest) else test.perturbed_outputs
    key: dict[str, Any] = {
        "test": "forward" if forward else "counterfactual", "labels": list(on.labels),
        "methods": [one.name for one in explainers],
        "answers": {str(i): int(a) for i, a in zip(ids, truth, strict=True)},
    }  # fmt: skip
    for explainer in explainers:
        if isinstance(test, ForwardTest):
            first = [
                {"id": row, "input": on.domain.show(on.codes[row]), "model": on.labels[output]}
                for row, output in zip(test.learning_ids.tolist(), test.learning_outputs, strict=True)
            ]
            learning = [shown | {"explanation": explainer.explain(on.row(shown["id"])).text} for shown in first]
            pre = [{"id": i, "input": on.domain.show(on.codes[i]), "answer": ""} for i in ids]
            post = [pre[i] for i in test.post_order.tolist()]
            _write(folder, f"{explainer.name}-first", first)
            _write(folder, f"{explainer.name}-learning", learning)
        else:
            pre, post = [], []
            for k, row in enumerate(ids):
                shown = {"id": row, "input": on.domain.show(test.codes[k]), "model": on.labels[test.model_outputs[k]]}
                changed = {"change": on.domain.change(test.codes[k], test.perturbed_codes[k]), "answer": ""}
                pre.append(shown | changed)
                post.append(shown | {"explanation": explainer.explain(on.row(row)).text} | changed | {"rating": ""})
        _write(folder, f"{explainer.name}-pre", pre)
        _write(folder, f"{explainer.name}-post", post)
    write_json(folder / _KEY, key)
    return folder


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_whole(folder / f"{name}.csv", text.getvalue())
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td><pre>{html.escape(str(value))}</pre></td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    write_whole(
        folder / f"{name}.html",
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(name)}</title><table border="1">'
        f"<tr>{head}</tr>{body}</table>\n",
    )


def import_responses(directory: str | Path) -> pd.DataFrame:
    """What readers gave back: the table that `effects` takes. Files NAME.METHOD-pre.csv and NAME.METHOD-post.csv.

    An answer is the label that it names, or is nearest to, at most 2 letters off; what cannot be read is left out and listed in
    ``table.attrs["dropped"]`` as (file, id, what stood there). Raises DataError where no form, or no key, is there.
    """
    folder = Path(directory)
    if not (folder / _KEY).exists():
        raise DataError(
            f"{folder} has no {_KEY}; give the folder that export_forms wrote, with the returned files in it"
        )
    key = read_json(folder / _KEY)
    truth, labels = {int(i): int(a) for i, a in key["answers"].items()}, list(key["labels"])
    dropped: list[tuple[str, str, str]] = []
    parts = []
    for method in key["methods"]:
        for before in sorted(folder.glob(f"*.{method}-pre.csv")):
            user = before.name.removesuffix(f".{method}-pre.csv")
            after = folder / f"{user}.{method}-post.csv"
            if not after.exists():
                raise DataError(f"{before.name} is there but {after.name} is not; both are needed")
            pre, _ = _answers(before, labels, dropped)
            post, ratings = _answers(after, labels, dropped)
            for item in sorted(set(pre) & set(post) & set(truth)):
                parts.append(
                    (user, item, method, key["test"], pre[item], post[item], truth[item], ratings.get(item, np.nan))
                )
    if not parts:
        raise DataError(
            f"{folder} has no returned forms that can be read (NAME.METHOD-pre.csv and NAME.METHOD-post.csv)"
        )
    names = ["user", "item", "method", "test", "pre", "post", "model", "rating"]
    table = pd.DataFrame(parts, columns=names)
    table.attrs["dropped"] = dropped
    return table


def _answers(
    path: Path, labels: list[str], dropped: list[tuple[str, str, str]]
) -> tuple[dict[int, int], dict[int, float]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"id", "answer"} <= set(rows[0]):
        raise DataError(f"{path.name} has no columns id and answer")
    answers, ratings = {}, {}
    for row in rows:
        said = read_label(row["answer"] or "", labels)
        if said is None or not (row["id"] or "").strip().isdigit():
            dropped.append((path.name, row["id"] or "", row["answer"] or ""))
            continue
        answers[int(row["id"])] = said
        rating = (row.get("rating") or "").strip().removesuffix(".0")  # spreadsheets write 5 as 5.0
        if rating in list("1234567"):
            ratings[int(row["id"])] = float(rating)
    return answers, ratings


def read_label(text: str, labels: Sequence[str]) -> int | None:
    """The label that ``text`` names, or else is nearest to; None where two are as near, or none is near.

    >>> [read_label(said, ["no", "yes"]) for said in ("Yes.", "yse", "I think no", "yes or no")]
    [1, 1, 0, None]
    """
    said, names = " ".join(text.casefold().split()), [" ".join(label.casefold().split()) for label in labels]
    named = [name for name in names if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said)]
    named = [name for name in named if not any(name != other and name in other for other in named)]
    if len(named) == 1:
        return names.index(named[0])
    away = [edit_distance(said, name) for name in names]
    best = int(np.argmin(away))
    lone = away.count(away[best]) == 1
    return best if said and lone and away[best] <= _FARTHEST and away[best] < max(1, len(names[best])) else None


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, delete or replace.

    >>> edit_distance("above", "abvoe")
    2
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
