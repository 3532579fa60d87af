"""``theodolite run intrinsic-dimension-finetuning``."""

__all__ = ["command"]

import sys
import time
from typing import Annotated, Any

import typer

from theodolite.commands import Dask, Json, SubjectFlags, Workers, executor_of, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands._text_tables import is_text_model, read_texts
from theodolite.run_commands.shared import Memory, tell

_RATES, _FULL_RATES, _HEAD_RATES, _BATCH = (0.1, 0.3), (3e-5, 1e-4, 1e-3), (1e-3, 1e-2), 16


@subject_flags
def command(
    flags: SubjectFlags,
    dimensions: Annotated[
        str, typer.Option(help="numbers of coordinates to try, increasing, with commas")
    ] = "50,200,1000",
    tokens: Annotated[int, typer.Option(help="tokens of a text that are read", min=4)] = 64,
    bits: Annotated[int, typer.Option(help="bits of a coordinate in the bound on the risk", min=1, max=24)] = 8,
    workers: Workers = None,
    dask: Dask = None,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """d90 of a pretrained language model (--model minilm, a Hugging Face folder or name) on a table of texts (--data)."""
    if not is_text_model(flags):
        raise InputError(
            "give a pretrained language model (--model minilm, a Hugging Face folder or name) and a table of texts (--data)"
        )
    with executor_of(workers, dask) as executor:
        tell(_measure(flags, _numbers(dimensions), tokens, bits, memory << 20, executor), as_json)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--dimensions are whole numbers with commas between, such as 50,200,1000; got {text!r}"
        ) from None


def _measure(
    flags: SubjectFlags, grid: list[int], tokens: int, bits: int, memory: int, executor: Any
) -> dict[str, Any]:
    from torch import nn

    from theodolite.parameters.finetuning_dimension import (
        BuildTextClassifier,
        FineTuningSubspace,
        compression_certificate,
        fine_tune,
        fine_tuning_dimension,
    )

    model, seed, epochs = str(flags.model), flags.seed, flags.epochs or 3
    data, parts = read_texts(flags, tokens)
    classifies = data.task == "classification"
    build = BuildTextClassifier(model, len(data.classes) if classifies else 1)
    first = build(seed)
    embeddings = [f"{name}.*" for name, module in first.named_modules() if isinstance(module, nn.Embedding)]
    exclude = ("*embeddings*", *embeddings)
    metric = "accuracy" if classifies else "r2"
    tried = len(grid) * len(_RATES)
    _forecast(first, parts["train"], epochs, tried + len(_FULL_RATES) + len(_HEAD_RATES) + classifies, metric)
    found = fine_tuning_dimension(
        build, parts, dimensions=grid, metric=metric, learning_rates=_RATES, full_learning_rates=_FULL_RATES,
        head_learning_rates=_HEAD_RATES, epochs=epochs, batch_size=_BATCH, seeds=(seed,), exclude=exclude,
        executor=executor,
    )  # fmt: skip
    at = found.d90_above_chance or grid[-1]
    result: dict[str, Any] = {
        "d90": found.d90,
        "d90_above_chance": found.d90_above_chance,
        metric: {d: round(float(q), 4) for d, q in zip(found.curve.dimensions, found.curve.mean, strict=True)},
        "full_fine_tuning": round(found.full, 4),
        "head_only": round(found.head_only, 4),
        "head_parameters": found.head_parameters,
        "chance": round(found.chance, 4),
        "test_rows": len(data.test),
        "training_rows": len(data.train),
        "adapted_parameters": found.projected_parameters,
        "parameters": found.total_dimension,
        "learning_rates": found.best_learning_rate,
        "movement": {name: round(value, 4) for name, value in found.movement.items()},
        "classes": list(data.classes),
        "notes": list(data.notes),
    }
    if not classifies:
        return result
    tuned = FineTuningSubspace(build(seed), at, exclude=exclude, seed=seed)
    fine_tune(tuned, parts["train"], lr=found.best_learning_rate[at], epochs=epochs, batch_size=_BATCH, seed=seed)
    bound = compression_certificate(tuned, parts["train"], bits=bits, configurations=tried, memory=memory)
    return result | {
        f"risk_bound_at_{at}_coordinates_of_{bits}_bits": round(bound.bound, 4),
        "bound_says_something": not bound.vacuous,
        "training_risk_of_the_quantised_model": round(bound.empirical_risk, 4),
        "risk_of_a_constant_answer": round(bound.chance_risk, 4),
    }


def _forecast(model: Any, train: dict[str, Any], epochs: int, trainings: int, metric: str) -> None:
    """Tell on stderr how long it will take, from the time of two steps; the model is trained by them."""
    from theodolite.parameters.finetuning_dimension import fine_tune

    few = {name: values[: 2 * _BATCH] for name, values in train.items()}
    began = time.perf_counter()
    fine_tune(model, few, lr=1e-5, epochs=1, batch_size=_BATCH, metric=metric)
    rows = len(train["labels"])
    minutes = (time.perf_counter() - began) / len(few["labels"]) * rows * epochs * trainings / 60
    print(f"{trainings} trainings of {rows:,} rows, about {minutes:.0f} minutes on one process", file=sys.stderr)
