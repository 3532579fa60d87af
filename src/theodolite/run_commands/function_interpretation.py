"""``theodolite run function-interpretation``."""

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
    functions: Annotated[
        int | None, typer.Option(help="benchmark on so many generated functions instead of charting a subject", min=1)
    ] = None,
    category: Annotated[str, typer.Option(help="of generated functions: numeric or strings")] = "numeric",
    reader: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint of the interpreter, up to and with /v1")
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
    """Test interpreters on functions with known answers (--functions, --reader), or describe a subject's own curves."""
    if functions is None and reader is None and reader_model is None:
        chart("function-interpretation", flags, seconds, memory, as_json)
        return
    if category not in ("numeric", "strings"):
        raise InputError(f"--category is numeric or strings, got {category!r}")
    from theodolite.core.files import write_whole
    from theodolite.explanations.function_interpretation import (
        LanguageModelInterpreter,
        SymbolicInterpreter,
        benchmark,
        make_numeric,
        make_strings,
    )

    runners: list[Any] = []
    if category == "numeric":
        runners += [SymbolicInterpreter(), SymbolicInterpreter(scan=False)]
    if reader is not None or reader_model is not None:
        from theodolite.language import connect

        runners.append(LanguageModelInterpreter(connect(reader, reader_model)))
    if not runners:
        raise InputError("strings need a language model: give --reader and --reader-model")
    count = functions or 20
    made: list[Any] = (
        make_numeric(count, flags.seed) if category == "numeric" else list(make_strings(count, flags.seed))
    )
    found = benchmark(made, runners, seed=flags.seed, rounds=rounds)
    frame = found.frame()
    if table is not None:
        write_whole(table, frame.to_csv(index=False))
    result: dict[str, Any] = {"functions": count}
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
    tell(result, as_json)
