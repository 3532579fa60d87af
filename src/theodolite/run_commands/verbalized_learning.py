"""``theodolite run verbalized-learning``."""

__all__ = ["command"]

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_TEST = 100


@subject_flags
def command(
    flags: SubjectFlags,
    prior: Annotated[str, typer.Option(help="what is known about the task, in words")] = "",
    labels: Annotated[
        str | None, typer.Option(help="words for the classes in sorted order, separated by commas: no,yes")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="address of an OpenAI-compatible endpoint, which learns; without it nothing is trained"),
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="the endpoint's model; without --endpoint smollm2 or a Hugging Face folder")
    ] = None,
    rows: Annotated[int, typer.Option(help="rows to learn from, three tenths of which judge", min=10)] = 60,
    batch_size: Annotated[int, typer.Option(help="rows of a step", min=1)] = 10,
    max_calls: Annotated[int | None, typer.Option(help="most requests to learn with", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write every step to")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """A model whose parameters are a paragraph: give --data with --prior or --endpoint; or a subject as for the survey.

    An endpoint is trained for --epochs (1). A local language model is only told the prior, and scores the labels.
    """
    if not (prior or endpoint or language_model):
        chart("verbalized-learning", flags, seconds, memory, as_json)
        return
    if flags.data is None or flags.subject or flags.model or flags.test:
        raise InputError(
            "give the rows with --data FILE and --target NAME; --subject, --model and --test are of no use here"
        )
    from sklearn.base import clone

    from theodolite.core.files import write_whole
    from theodolite.hyperparameters.verbalized import (
        VerbalizedClassifier,
        VerbalizedRegressor,
        reference_scores,
        training_report,
    )
    from theodolite.language import connect

    X, y, X_test, y_test, regression = _read(flags, rows)
    epochs = flags.epochs if flags.epochs is not None else int(endpoint is not None)
    trained = {"validation": 0.3, "accept": "if-better"} if epochs else {}
    shared: dict[str, Any] = {
        "prior": prior, "batch_size": batch_size, "epochs": epochs, "max_calls": max_calls, "seed": flags.seed, **trained
    }  # fmt: skip
    learner = connect(endpoint, language_model)
    model: Any
    if regression:
        if labels is not None:
            raise InputError("--labels is for classes; these targets are numbers")
        model = VerbalizedRegressor(learner, **shared)
    else:
        words = tuple(word.strip() for word in labels.split(",")) if labels else ()
        mode = "score" if endpoint is None else "generate"
        model = VerbalizedClassifier(learner, labels=words, mode=mode, **shared)
    Console(stderr=True).print(
        f"about {model.forecast_calls(len(y)):,} requests to learn, {2 * len(y_test)} to test", markup=False
    )
    model.fit(X, y)
    result: dict[str, Any] = {
        "told": model.theta_initial_,
        "learned": model.theta_ if model.theta_ != model.theta_initial_ else "nothing beyond what it was told",
        "held_out": _quality(model, X_test, y_test, regression, flags.seed),
    }
    if epochs:
        learned, model.theta_ = model.theta_, model.theta_initial_
        result["untrained"] = _quality(model, X_test, y_test, regression, flags.seed)
        model.theta_ = learned
    else:
        plain: Any = clone(model)
        plain.set_params(prior="").fit(X, y)
        result["without_the_prior"] = _quality(plain, X_test, y_test, regression, flags.seed)
    result |= reference_scores(X, y, X_test, y_test, regression=regression, seed=flags.seed)
    result |= {
        "rows_to_learn_and_to_test": [len(y), len(y_test)],
        "steps": len(model.history_), "calls_to_learn": model.calls_, "tokens_to_learn": model.tokens_,
        "answers_not_read": model.unparsed_, "updates_not_read": model.failed_updates_, "ended": model.stopped_,
    }  # fmt: skip
    if report is not None:
        write_whole(report, f'<!doctype html><meta charset="utf-8"><title>training</title>{training_report(model)}\n')
        result["report"] = str(report)
    tell(result, as_json)


def _read(flags: SubjectFlags, rows: int) -> tuple[Any, Any, Any, Any, bool]:
    """Rows to learn from with their targets, rows to test with theirs, drawn at random, and whether targets are numbers."""
    import numpy as np

    from theodolite.core.loading.labels import find_target, numbers, read_labels
    from theodolite.core.loading.options import Wanted
    from theodolite.core.loading.tables import read_table
    from theodolite.core.loading.texts import find_text

    path, options = Path(str(flags.data)), flags.options()
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    frame: Any = read_table(path, options).frame
    target = find_target([str(name) for name in frame.columns], options)
    inputs = frame.drop(columns=target)
    text = find_text(inputs, options)
    inputs = inputs if text is None else inputs[[text]]
    holes = inputs.isna().any(axis=1) | frame[target].isna()
    if holes.any() and flags.missing != "drop":
        raise DataError(f"{int(holes.sum())} of {len(frame)} rows have missing values; --missing drop leaves them out")
    if int((~holes).sum()) < 20:
        raise DataError(f"{path} has {int((~holes).sum())} whole rows; 20 at least are needed")
    inputs, found = inputs[~holes].reset_index(drop=True), read_labels(frame[target][~holes], options, Wanted())
    regression = found.task == "regression"
    y = found.y.astype(float) if regression else np.array(found.classes)[found.y]
    for name in inputs.columns:
        if text is None and (values := numbers(inputs[name])) is not None:
            inputs[name] = values
    order = np.random.default_rng(flags.seed).permutation(len(y))
    test, seen = order[: min(_TEST, len(y) // 3)], order[min(_TEST, len(y) // 3) :][:rows]
    X: Any = inputs[text].tolist() if text is not None else inputs
    parts = [[X[i] for i in part] if text is not None else X.iloc[part] for part in (seen, test)]
    return parts[0], y[seen], parts[1], y[test], regression


def _quality(model: Any, X: Any, y: Any, regression: bool, seed: int) -> Any:
    """Accuracy or mean squared error on held-out rows; an answer that cannot be read is wrong, or the mean of the targets."""
    import numpy as np

    from theodolite.core.estimate import bootstrap, proportion

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ of \d+ answers could not be read", UserWarning)
        said = model.predict(X)
    if regression:
        return bootstrap((np.where(np.isnan(said), np.mean(y), said) - y) ** 2, seed=seed, unit="squared error")
    return proportion(sum(a == b for a, b in zip(said.tolist(), y.tolist(), strict=True)), len(y), unit="accuracy")
