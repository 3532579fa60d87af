"""``theodolite run observable-propagation``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, lines, tell


@subject_flags
def command(
    flags: SubjectFlags,
    positive: Annotated[
        list[str] | None, typer.Option(help="token whose logit counts up (' she'); may be given again")
    ] = None,
    negative: Annotated[list[str] | None, typer.Option(help="token whose logit counts down (' he')")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="text file, a prompt a line: first the pair (positive, negative), then prompts to evaluate on"
        ),
    ] = None,
    first_token: Annotated[bool, typer.Option(help="let the first piece stand for a word of several tokens")] = False,
    length: Annotated[int, typer.Option(help="components on a path at most", min=1)] = 2,
    beam: Annotated[int, typer.Option(help="paths that are kept and extended", min=1)] = 10,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Paths that make a decoder prefer one token to another: give --positive, --negative, --prompts, or a subject."""
    if not positive and not negative and prompts is None:
        chart("observable-propagation", flags, seconds, memory, as_json)
        return
    if prompts is None or not (positive or negative):
        raise InputError("give --positive and --negative tokens and --prompts, a text file that starts with the pair")
    from theodolite.activations.observables import Observable, find_paths, head_norms, read_all
    from theodolite.activations.observables.evaluation import report
    from theodolite.language.pretrained import load_decoder

    given = lines(prompts)
    if len(given) < 2:
        raise InputError(
            f"{prompts} must hold at least two prompts, one a line: the positive and the negative of the pair"
        )
    model, tokenizer = load_decoder(flags.model or "smollm2")
    observable = Observable.from_tokens(positive or [], negative or [], tokenizer, first_token=first_token)
    pair, others = given[:2], given[2:]
    found = find_paths(model, observable, pair, max_length=length, beam=beam)
    norms = head_norms(model, observable)
    strongest = [divmod(int(place), norms.shape[1]) for place in norms.flatten().topk(min(5, norms.numel())).indices]
    kept = found[:beam]
    enough = len(others) >= 3
    readings = read_all(model, [one.feature for one in kept], observable, others, memory=memory << 20) if enough else []
    rows = list[dict[str, Any]]()
    for i, one in enumerate(kept):
        row: dict[str, Any] = {"path": str(one.path), "score": round(one.score, 4), "gain": round(one.feature.gain, 4)}
        if enough:
            told = report(one.feature, readings[i])
            row |= {"r2": round(told.r2, 4), "slope": round(told.slope, 4), "prompts": told.n}
        rows.append(row)
    result: dict[str, Any] = {"observable": str(observable), "strongest_heads_by_weights": strongest, "paths": rows}
    if not as_json:
        result["paths"] = "".join("\n  " + ", ".join(f"{name} {value}" for name, value in row.items()) for row in rows)
    tell(result, as_json)
