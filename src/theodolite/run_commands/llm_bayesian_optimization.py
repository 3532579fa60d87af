"""``theodolite run llm-bayesian-optimization``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    language_model: Annotated[
        str | None, typer.Option(help="the language model's name; smollm2 or a Hugging Face folder needs no --endpoint")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="address of an OpenAI-compatible endpoint")] = None,
    space: Annotated[
        Path | None,
        typer.Option(
            help='JSON file {"name": ["int" | "float" | "ordinal" | "categorical", scale, [low, high] or values]}'
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="evaluations after the 5 starting points", min=1)] = 25,
    resume: Annotated[Path | None, typer.Option(help="file to keep the search in, and to continue it from")] = None,
    anonymize: Annotated[bool, typer.Option("--anonymize", help="do not tell the parameters' names")] = False,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Tune a decision tree, or the subject's own scikit-learn model, on a table; without --language-model chart a subject."""
    if language_model is None:
        if endpoint is not None or space is not None or resume is not None:
            raise InputError("name the language model too: --language-model")
        chart("llm-bayesian-optimization", flags, seconds, memory, as_json)
        return
    import numpy as np
    from sklearn.model_selection import cross_val_score

    from theodolite.core.files import read_json
    from theodolite.hyperparameters.llm_bayesian_optimization import LLAMBO, TaskContext, rank_agreement
    from theodolite.hyperparameters.space import SearchSpace
    from theodolite.language import connect
    from theodolite.survey.hyperparameters.llm_bayesian_optimization import estimator_of, with_values

    subject = flags.load()
    if subject.data.modality != "tabular":
        raise InputError(f"tunes a model of a table; these data are {subject.data.modality}")
    estimator, wanted, _ = estimator_of(subject)
    if space is not None:
        spec = read_json(space)
        if not isinstance(spec, dict):
            raise InputError(f"{space} must hold an object of parameters by name")
        wanted = SearchSpace.from_spec(spec)
    unknown = sorted(set(wanted) - set(estimator.get_params()))
    if unknown:
        raise InputError(f"{type(estimator).__name__} has no parameters {', '.join(unknown)}")
    x, y = subject.data.train.x.double().numpy(), subject.data.train.y.numpy()
    scoring = "accuracy" if subject.data.task == "classification" else "r2"
    llm = connect(endpoint, language_model)
    # a model that does not answer ends the search, which --resume goes on with, and is not replaced by chance unseen
    search = LLAMBO(
        wanted, TaskContext.from_data(estimator, x, y, scoring), llm, anonymize=anonymize, fallback="raise", seed=flags.seed
    )  # fmt: skip

    def objective(config: dict[str, Any]) -> float:
        return float(np.mean(cross_val_score(with_values(estimator, config), x, y, cv=5, scoring=scoring)))

    found = search.optimize(objective, trials, file=resume)
    agreement = rank_agreement(found.predicted, found.scores)
    told: dict[str, Any] = {
        "estimator": type(estimator).__name__,
        f"best_cross_validated_{scoring}": found.best.score,
        "best": found.best.config,
        "evaluations": len(found.scores),
        "requests": found.calls,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "rejected_answers": found.n_rejected,
        "random_stood_in": found.n_fallback,
        "seconds": round(found.seconds, 1),
    }
    if agreement is not None:
        told["rank_agreement_of_forecasts"] = agreement
        if agreement.value <= 0:
            told["verdict"] = "model too weak: its forecasts do not rank configurations; use TPE or a Gaussian process"
    tell(told, as_json)
