"""``theodolite run function-interpretation``."""

__all__ = ["command"]

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_CATEGORIES = ("numeric", "strings", "neurons_entities", "neurons_relations")


@subject_flags
def command(
    flags: SubjectFlags,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="minilm, a Hugging Face folder or name: describe the dimensions of its sentence embeddings by the common "
            "words of --data (texts; Python's documentation strings without it)"
        ),
    ] = None,
    functions: Annotated[
        int | None, typer.Option(help="benchmark on so many functions instead of charting a subject", min=1)
    ] = None,
    category: Annotated[str, typer.Option(help=f"of functions: {', '.join(_CATEGORIES)}")] = "numeric",
    published: Annotated[
        Path | None, typer.Option(help="folder of the published functions; generated ones without it", file_okay=False)
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="CSV file to score: columns function, description, domain, code (as --table writes it)"),
    ] = None,
    reader: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint of the interpreter or judge, up to and with /v1")
    ] = None,
    reader_model: Annotated[
        str | None, typer.Option(help="the endpoint's model; alone: smollm2 or a Hugging Face folder")
    ] = None,
    rounds: Annotated[int, typer.Option(help="of the dialogue, 1 to 20")] = 20,
    table: Annotated[Path | None, typer.Option(help="CSV file to write all rows to")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Describe a subject's own curves or units, or an --encoder's; test interpreters (--functions, --reader); score or judge
    --answers.

    Answers about numeric functions and generated strings are scored by their code; about published strings by their code, and
    about published neurons by their description, on the published tests (by a sentence encoder, or by --reader).
    """
    if encoder is not None:
        _describe(encoder, flags, as_json)
        return
    asked = reader is not None or reader_model is not None
    if functions is None and not asked and answers is None and published is None:
        chart("function-interpretation", flags, seconds, memory, as_json)
        return
    if category not in _CATEGORIES:
        raise InputError(f"--category is one of {', '.join(_CATEGORIES)}, got {category!r}")
    if published is None and category.startswith("neurons"):
        raise InputError("neurons are published ones: give their folder with --published")
    if answers is None and published is not None and category != "numeric":
        raise InputError(f"published {category} have tests and no function to ask: give --answers to judge")
    model = None
    if asked:
        from theodolite.language import connect

        model = connect(reader, reader_model)
    made = _functions(category, published, functions, flags.seed, whole=answers is not None)
    if answers is not None:
        tell(_scored(made, category, _read(answers), model, published is not None), as_json)
        return
    tell(_benchmark(made, category, model, flags.seed, rounds, table), as_json)


def _describe(encoder: str, flags: SubjectFlags, as_json: bool) -> None:
    """Print the finding of an encoder's dimensions."""
    from theodolite.language.subjects import default_texts, read_texts
    from theodolite.survey.chart import Budget
    from theodolite.survey.explanations.probe_words import described_encoder

    if flags.subject or flags.model:
        raise InputError("--encoder names the model; --subject and --model are of no use beside it")
    texts = default_texts() if flags.data is None else read_texts(flags.data, column=flags.text or "text")
    finding = described_encoder(encoder, texts, Budget(seed=flags.seed))
    if as_json:
        print(json.dumps(finding.to_json(), ensure_ascii=False))
    else:
        Console().print(str(finding), markup=False)


def _functions(category: str, published: Path | None, count: int | None, seed: int, *, whole: bool) -> list[Any]:
    from theodolite.explanations.function_interpretation import load_published, make_numeric, make_strings

    if published is not None:
        return load_published(published, category)[: count or (None if whole else 20)]
    make: Any = make_numeric if category == "numeric" else make_strings
    return list(make(count or 20, seed))


def _benchmark(
    made: list[Any], category: str, model: Any, seed: int, rounds: int, table: Path | None
) -> dict[str, Any]:
    """Interpreters on functions, in a table."""
    from theodolite.core.files import write_whole
    from theodolite.explanations.function_interpretation import (
        LanguageModelInterpreter,
        SymbolicInterpreter,
        benchmark,
    )

    runners: list[Any] = [SymbolicInterpreter(), SymbolicInterpreter(scan=False)] if category == "numeric" else []
    if model is not None:
        runners.append(LanguageModelInterpreter(model))
    if not runners:
        raise InputError("strings need a language model: give --reader and --reader-model")
    found = benchmark(made, runners, seed=seed, rounds=rounds)
    frame = found.frame()
    if table is not None:
        write_whole(table, frame.to_csv(index=False))
    result: dict[str, Any] = {"functions": len(made)}
    for name in dict.fromkeys(row.interpreter for row in found.rows):
        rows: Any = frame[frame["interpreter"] == name]
        if category == "numeric":
            result[f"{name}: r2_nmse < .1"] = found.success(name)
            result[f"{name}: published success"] = found.success(name, measure="nmse")
            if rows["local_nmse"].notna().any():
                result[f"{name}: local_nmse < .1 where detectable"] = found.success(name, measure="local_nmse")
            if rows["domain_iou"].notna().any():
                result[f"{name}: mean domain_iou of corrupted ones"] = float(rows["domain_iou"].mean())
        else:
            result[f"{name}: mean share of identical outputs"] = float(rows["exact"].mean())
        calls, tokens = int(rows["calls"].sum()), int((rows["prompt_tokens"] + rows["completion_tokens"]).sum())
        if calls:
            result[f"{name}: calls and tokens"] = f"{calls}, {tokens}"
    return result


def _read(path: Path) -> dict[str, Any]:
    """Answers by the function's name; of a table of several interpreters those of the first."""
    import pandas as pd

    from theodolite.explanations.function_interpretation import Interpretation

    try:
        frame: Any = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as CSV: {error}") from error
    if "function" not in frame or not {"description", "code"} & set(frame):
        raise DataError(f"{path} needs the columns function, and description or code; it has: {', '.join(frame)[:200]}")
    if "interpreter" in frame:
        frame = frame[frame["interpreter"] == frame["interpreter"].iloc[0]] if len(frame) else frame
    if frame["function"].duplicated().any():
        raise DataError(f"{path} has two answers for {frame['function'][frame['function'].duplicated()].iloc[0]}")
    return {
        row["function"]: Interpretation(row.get("description", ""), row.get("domain", ""), row.get("code", ""))
        for row in frame.to_dict("records")
    }


def _scored(made: list[Any], category: str, answers: dict[str, Any], model: Any, published: bool) -> dict[str, Any]:
    from theodolite.core.estimate import proportion
    from theodolite.explanations.function_interpretation import (
        EmbeddingJudge,
        ExecutionJudge,
        LanguageModelJudge,
        score_numeric,
        score_strings,
        unit_test,
    )
    from theodolite.explanations.function_interpretation.table import string_inputs

    there = [fn for fn in made if fn.name in answers]
    if not there:
        raise DataError(f"no answer is about one of these functions, such as {made[0].name}")
    told = [answers[fn.name] for fn in there]
    result: dict[str, Any] = {"functions answered": f"{len(there)} of {len(made)}"}
    if category == "numeric":
        scores = [score_numeric(fn, one) for fn, one in zip(there, told, strict=True)]
        result["r2_nmse < .1"] = proportion(sum(s.r2_nmse < 0.1 for s in scores), len(scores))
        result["published success"] = proportion(sum(s.success for s in scores), len(scores))
        if local := [s.local_nmse for s in scores if s.local_nmse is not None]:
            result["local_nmse < .1 where detectable"] = proportion(sum(one < 0.1 for one in local), len(local))
        if failed := [s.reason for s in scores if s.reason]:
            result["code that failed"] = ", ".join(f"{failed.count(why)} {why}" for why in dict.fromkeys(failed))
        return result
    if not published:
        shares = [score_strings(fn, one, string_inputs(40, 0)) for fn, one in zip(there, told, strict=True)]
        return result | {"mean share of identical outputs": sum(shares) / len(shares)}
    judge: Any = LanguageModelJudge(model) if model is not None else EmbeddingJudge()
    words = [one.description for one in told]
    if category == "strings" and model is None:
        judge, words = ExecutionJudge(), [one.code for one in told]
    for name, given in (
        ("tests answered", words),
        ("tests answered from another's description", words[1:] + words[:1]),
    ):
        scores = [unit_test(one, fn.tests, judge) for fn, one in zip(there, given, strict=True)]
        result[name] = proportion(sum(round(s.accuracy * s.n) for s in scores), sum(s.n for s in scores))
        result[f"{name}: not parsed"] = sum(s.unparsed for s in scores)
    return result | {"chance": 1 / 3}
