"""``theodolite run pac-program-sets``."""

__all__ = ["command"]

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from theodolite.commands import Json, Seed, Workers
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import lines, tell

_PROMPTED, _WRITTEN = {"prompt", "reference"}, {"text", "tokens", "reference"}


def command(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help='JSON Lines: {"prompt", "reference"} a line for a model to write, or {"text", "tokens", "reference"} with '
            'tokens [{"token", "logprob"}, ...] as a server gave them'
        ),
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="folder of Python files, or stdlib: return lines to complete, instead of PAIRS")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="smollm2, a Hugging Face folder or name; with --endpoint its name there")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="address of an OpenAI-compatible endpoint, up to /v1")] = None,
    epsilon: Annotated[float, typer.Option(help="share of prompts whose set may miss the right program")] = 0.1,
    delta: Annotated[float, typer.Option(help="1 - confidence of the promise")] = 0.1,
    max_holes: Annotated[int, typer.Option(help="most holes in a program", min=1)] = 3,
    language: Annotated[str, typer.Option(help="python or sql")] = "python",
    dialect: Annotated[str | None, typer.Option(help="of SQL, as sqlglot names it")] = None,
    match: Annotated[str, typer.Option(help="structural, or official (looser)")] = "structural",
    stop: Annotated[str, typer.Option(help="text that ends a program; \\n is a new line")] = "\\n",
    max_tokens: Annotated[int, typer.Option(help="of a program", min=1)] = 64,
    test_share: Annotated[float, typer.Option(help="share of the pairs kept apart to measure coverage on")] = 0.3,
    count: Annotated[int, typer.Option(help="return lines to take from --sources at most", min=1)] = 150,
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file for the partial programs of the pairs kept apart")
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Calibrate partial programs on pairs of prompt and right program, and measure them on pairs kept apart."""
    if (pairs is None) == (sources is None):
        raise InputError("give either PAIRS (a JSON Lines file) or --sources (a folder of Python files, or stdlib)")
    if not 0 < test_share < 1:
        raise InputError(f"--test-share must lie strictly between 0 and 1, got {test_share}")
    import numpy as np

    from theodolite.core.files import write_whole
    from theodolite.predictions.program_sets import (
        Generation,
        ProgramSetCalibrator,
        TokenLogprob,
        generate,
        k_errors,
    )
    from theodolite.predictions.program_sets.returns import return_lines

    rows: list[dict[str, Any]]
    if pairs is not None:
        rows = _rows(pairs)
    else:
        found = return_lines(None if sources == "stdlib" else sources, count=count, seed=seed)
        rows = [{"prompt": one.prompt, "reference": one.rest} for one in found]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    kept_apart = max(1, round(test_share * len(rows)))
    k_errors(max(1, len(rows) - kept_apart), epsilon, delta)  # before any model is asked
    if "tokens" in rows[0]:
        generations = []
        for row in rows:
            tokens, start = [], 0
            for token in row["tokens"]:
                tokens.append(TokenLogprob(token["token"], token["logprob"], start))
                start += len(token["token"])
            generations.append(Generation(row["text"], tuple(tokens)))
    else:
        from theodolite.language import connect

        writer = connect(endpoint, model)
        shown = track(rows, "writing programs", console=Console(stderr=True), disable=as_json)
        generations = [
            generate(writer, [row["prompt"]], stop.encode().decode("unicode_escape"), max_tokens)[0] for row in shown
        ]
    references = [row["reference"] for row in rows]
    test, calibration = order[:kept_apart], order[kept_apart:]

    def of(places: list[int]) -> tuple[list[Generation], list[str]]:
        return [generations[i] for i in places], [references[i] for i in places]

    options = {"language": language, "dialect": dialect, "match": match}
    calibrator = ProgramSetCalibrator(max_holes, executor=workers, **options).fit(*of(calibration), epsilon, delta)
    point = ProgramSetCalibrator(max_holes, solver="none", **options)
    written, right = of(test)
    whole = point.families(written)
    unparsable = np.array([family[0].tree.unparsed for family in whole])
    exact = float((~point.errors(whole, right)[:, 0] & ~unparsable).mean())
    sets = [calibrator.predict(one) for one in (written[:3] if out is None else written)]
    if out is not None:
        write_whole(
            out,
            "".join(
                json.dumps({"text": one.text, "partial": made.text}, ensure_ascii=False) + "\n"
                for one, made in zip(written, sets, strict=True)
            ),
        )
    score = calibrator.score(written, right)
    tell(
        {
            "pairs": {"calibration": len(calibration), "test": len(test)},
            "promise": f"with confidence {1 - delta:g} the right program is in the set for at least a share {1 - epsilon:g}",
            "tau": calibrator.tau_ if calibrator.tau_ < 1 else "none: every set is one hole at the root",
            "allowed_errors": calibrator.k_,
            "errors": calibrator.errors_.tolist(),
            "unparsable": calibrator.unparsable_,
            "test": dataclasses.asdict(score),
            "point_prediction_coverage": exact,
            "examples": [made.text for made in sets[:3]],
        },
        as_json,
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, pair {number} is not JSON: {error}") from error
        keys = set(row) if isinstance(row, dict) else set()
        wanted = next((names for names in (_WRITTEN, _PROMPTED) if names <= keys), None)
        if wanted is None or (rows and wanted - set(rows[0])):
            raise DataError(
                f'{path}, pair {number}: every line must have "prompt" and "reference", or every line "text", "tokens" and '
                f'"reference"; this one has {", ".join(sorted(keys)) or "none of them"}'
            )
        if not all(isinstance(row[name], str) for name in wanted - {"tokens"}):
            raise DataError(f"{path}, pair {number}: prompt, text and reference must be texts")
        if "tokens" in wanted and not _are_tokens(row["tokens"]):
            raise DataError(
                f'{path}, pair {number}: tokens must be a list of {{"token": text, "logprob": number}}; where a server gave an '
                "empty list, it tells no log-probabilities"
            )
        rows.append({name: row[name] for name in wanted})
    if not rows:
        raise DataError(f"{path} holds no pairs")
    return rows


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(one, dict) and isinstance(one.get("token"), str) and isinstance(one.get("logprob"), (int, float))
            for one in value
        )
    )
