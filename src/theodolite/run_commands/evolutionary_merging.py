"""``theodolite run evolutionary-merging``."""

__all__ = ["command"]

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.run_commands.shared import Memory, Seconds, chart, lines, tell

if TYPE_CHECKING:
    from theodolite.core.estimate import Estimate
    from theodolite.parameters.merging import Fitness

    Measured = tuple[Fitness, Callable[[Any], Estimate]]
    """A fitness, and the same with its interval."""

_ROWS = 2_000  # that a candidate is scored on
_TOKENS = 128  # of a text that are read
_PARTS = ("fitness, too good: the best of all candidates", "validation", "test")


@subject_flags
def command(
    flags: SubjectFlags,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="two or more checkpoints of one architecture: weight files for --model package.module:factory, or Hugging "
            "Face folders of language models"
        ),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="the checkpoint that all of them were tuned from")] = None,
    method: Annotated[
        str | None, typer.Option(help="merging formula; dare_ties where there is a --base, linear where there is none")
    ] = None,
    granularity: Annotated[int, typer.Option(help="blocks that share their weights in the merge", min=1)] = 1,
    evaluations: Annotated[int, typer.Option(help="candidates that are scored", min=1)] = 300,
    out: Annotated[Path | None, typer.Option(help=".safetensors file to write the merge to")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Merge checkpoints of one model by evolved weights: give two or more and --data, or a subject as for the survey.

    With Hugging Face folders --data is a text file of one text a line, and what is measured is minus the perplexity.
    """
    if not checkpoints:
        if base is not None or out is not None:
            raise InputError("name the checkpoints to merge: theodolite run evolutionary-merging A B --base BASE ...")
        chart("evolutionary-merging", flags, seconds, memory, as_json)
        return
    if len(checkpoints) < 2:
        raise InputError(f"a merge needs at least two checkpoints, got {checkpoints[0]} alone")
    if flags.data is None:
        raise InputError("a merge is chosen by what it does on data that no checkpoint was tuned on: --data FILE")
    if out is not None and (out.suffix != ".safetensors" or not out.parent.is_dir()):
        raise InputError(f"--out {out}: expected a file name ending in .safetensors in a folder that exists")
    from safetensors.torch import save

    from theodolite.core.files import write_bytes
    from theodolite.parameters.merging import evolve_weights

    folders = [path.is_dir() for path in (*checkpoints, *([base] if base else []))]
    if any(folders) and not all(folders):
        raise InputError("give either weight files or Hugging Face folders, not some of each")
    read = _language_models if all(folders) else _networks
    sources, start, parts, rows = read(flags, checkpoints, base, memory << 20)
    fitness, validation, test = (measure for measure, _ in parts)
    found = evolve_weights(
        sources, fitness, base=start, method=method or ("linear" if base is None else "dare_ties"), granularity=granularity,
        max_evaluations=evaluations, seed=flags.seed, validation=validation, test=test,
        recompute_statistics=rows,
    )  # fmt: skip
    names = {f"source {k}": str(path) for k, path in enumerate(checkpoints, start=1)}
    weights, controls = found.weights.replace({"source": names}), found.baselines.replace({"baseline": names})
    model = found.model()
    result: dict[str, Any] = {
        "method": found.method,
        "normalize": found.normalize,
        "evaluations": found.evaluations,
        "dropped": found.dropped,
        **{f"{name} ({measure.name})": interval(model) for name, (measure, interval) in zip(_PARTS, parts)},
        "not_better_than": [names.get(name, name) for name in found.not_beaten],
    }
    if out is not None:
        # a file holds every tensor by itself, tied ones under each of their names, so that any loader can read it
        write_bytes(out, save({name: tensor.clone() for name, tensor in found.state.items()}))
        result["written"] = str(out)
    tables = {"weights": weights, "baselines": controls.astype(object).where(controls.notna(), None)}
    for name, table in tables.items():
        result[name] = table.to_dict("records") if as_json else "\n" + table.to_string(index=False)
    tell(result, as_json)


Read = tuple[list[Any], Any, "list[Measured]", Any]  # sources, base, search/validation/test, rows for BatchNorm


def _networks(flags: SubjectFlags, checkpoints: list[Path], base: Path | None, memory: int) -> Read:
    """The factory's network with the first weights, the other weights, and the share of rows that are right."""
    from dataclasses import replace

    from theodolite.core.estimate import Estimate, bootstrap, proportion
    from theodolite.core.loading.models import load_weights
    from theodolite.core.subject import Rows
    from theodolite.parameters.merging import Fitness

    if flags.model is None or ":" not in flags.model:
        raise InputError("weight files need the network that they belong to: --model package.module:factory")
    if flags.weights is not None:
        raise InputError("the checkpoints are named without a flag; leave out --weights")
    subject = replace(flags, weights=checkpoints[0]).load()

    def measured(rows: Rows, part: str) -> "Measured":
        def measure(model: Any) -> tuple[float, float]:
            right = subject.correct(model, rows)
            return float(right.mean()), float(right.std() / len(rows) ** 0.5)

        def interval(model: Any) -> Estimate:
            right = subject.correct(model, rows)
            return proportion(int(right.sum()), len(right)) if classifies else bootstrap(right)

        name = "accuracy" if classifies else "1 - squared error / variance, at least 0"
        return Fitness(measure, f"{name} on {len(rows):,} {part} rows"), interval

    data = subject.data
    classifies = data.task == "classification"
    others = [load_weights(path) for path in checkpoints[1:]]
    parts = [(data.train.head(_ROWS), "search"), (data.validation, "validation"), (data.test, "test")]
    return (
        [subject.predictor, *others],
        None if base is None else load_weights(base),
        [measured(*part) for part in parts],
        parts[0][0].x if any(name.endswith("running_var") for name in subject.predictor.state_dict()) else None,
    )


def _language_models(flags: SubjectFlags, folders: list[Path], base: Path | None, memory: int) -> Read:
    """Causal language models, and minus their perplexity on half, a quarter and a quarter of the lines of a file."""
    import torch

    from theodolite.core.estimate import Estimate
    from theodolite.language.pretrained import load_decoder
    from theodolite.parameters.merging import perplexity_fitness

    if flags.model is not None:
        raise InputError("Hugging Face folders hold their own networks; leave out --model")
    texts = lines(Path(str(flags.data)))
    if len(texts) < 8:
        raise DataError(
            f"--data {flags.data}: expected a text file of at least 8 lines, one text a line, found {len(texts)}"
        )
    models = list[Any]()
    for folder in (*folders, *([base] if base else [])):
        model, tokenizer = load_decoder(str(folder))
        kinds = model.config.architectures or [""]
        if not any(kind.endswith(("CausalLM", "LMHeadModel")) for kind in kinds):
            raise ModelError(
                f"{folder} holds {', '.join(kinds)}, which does not continue texts; give weight files and --model "
                "package.module:factory for other networks"
            )
        models.append(model)
        if folder == folders[0]:
            read = tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=_TOKENS, padding_side="right"
            )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(flags.seed))
    half, quarter = len(texts) // 2, len(texts) // 4
    parts = order[:half], order[half : half + quarter], order[half + quarter :]

    def measured(rows: Any) -> "Measured":
        fitness = perplexity_fitness(read.input_ids[rows], mask=read.attention_mask[rows], memory=memory)

        def interval(model: Any) -> Estimate:
            value, error = fitness.measure(model)
            return Estimate(value, value - 1.96 * error, value + 1.96 * error, n=len(rows))

        return fitness, interval

    return models[: len(folders)], models[len(folders)] if base else None, [measured(rows) for rows in parts], None
