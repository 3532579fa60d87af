"""``theodolite run simulatability``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_METHODS = ("lime", "anchor", "boundary", "prototype", "composite")


@subject_flags
def command(
    flags: SubjectFlags,
    methods: Annotated[
        str, typer.Option(help=f"explanations, of {', '.join(_METHODS)}")
    ] = "lime,anchor,boundary,prototype",
    export: Annotated[Path | None, typer.Option(help="folder to write both tests to, as forms for people")] = None,
    responses: Annotated[
        Path | None, typer.Option(help="folder of one test with the forms that people returned")
    ] = None,
    reader: Annotated[
        str | None, typer.Option(help="address of an OpenAI-compatible endpoint that reads in their stead")
    ] = None,
    reader_model: Annotated[
        str | None, typer.Option(help="the reader's name; without --reader smollm2 or a Hugging Face folder")
    ] = None,
    readers: Annotated[int, typer.Option(help="how many readers the language model stands for", min=3)] = 3,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Which explanation helps predict the model: simulated students, a language model, or forms for people."""
    if sum(given is not None for given in (export, responses, reader or reader_model)) > 1:
        raise InputError("give one of --export, --responses and --reader")
    if export is None and responses is None and reader is None and reader_model is None:
        chart("simulatability", flags, seconds, memory, as_json)
        return
    if responses is not None:
        from theodolite.explanations.simulatability import effects, import_responses

        table = import_responses(responses)
        answers: dict[str, Any] = {"answers": len(table), "not_read": [list(one) for one in table.attrs["dropped"]]}
        tell(answers | {"effects": effects(table, seed=flags.seed).to_dict("records")}, as_json)
        return
    from theodolite.survey.explanations.simulatability import protocol_of

    subject = flags.load()
    if subject.data.modality != "tabular" or subject.data.task != "classification":
        raise InputError(
            f"needs a classifier of a table; this is a {subject.data.task} of {subject.data.modality} data"
        )
    from theodolite.explanations.simulatability import CannotBalance, NoFlips

    told = {}
    try:  # people, and language models too, know the task, and must gain nothing by that
        protocol = protocol_of(subject, seed=flags.seed, memory=memory << 20, balance="errors")
    except CannotBalance as error:
        protocol = protocol_of(subject, seed=flags.seed, memory=memory << 20)
        told["balance"] = (
            f"the model's answers alone, since there are {error.have} held-out rows that are {error.cell}: a reader who knows "
            "the task predicts most answers without understanding the model, so compare effects, not shares of right answers"
        )
    chosen = _explainers(methods, flags.seed)
    if export is not None:
        from theodolite.explanations.simulatability import export_forms

        bound = [explainer.bind(protocol) for explainer in chosen]
        export_forms(protocol.forward(), bound, export / "forward")
        try:
            export_forms(protocol.counterfactual(), bound, export / "counterfactual")
        except (CannotBalance, NoFlips) as error:
            told["no_counterfactual_test"] = str(error)
        tell(told | {"forms": str(export), "next": "theodolite run simulatability --responses FOLDER/forward"}, as_json)
        return
    from theodolite.explanations.simulatability import LanguageModelSimulator, effects, run
    from theodolite.language import connect

    simulator = LanguageModelSimulator(connect(reader, reader_model))
    table = run(protocol, chosen, simulator, readers)
    found = effects(table, seed=flags.seed).to_dict("records")
    reads = {"reader": f"{simulator.model.name} (simulated reader)", "readers": readers, "effects": found}
    tell(reads | told, as_json)


def _explainers(methods: str, seed: int) -> list[Any]:
    from theodolite.explanations import simulatability as room

    made = {
        "lime": room.Lime, "anchor": room.Anchor, "boundary": room.DecisionBoundary, "prototype": room.Prototype,
        "composite": room.Composite,
    }  # fmt: skip
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names or set(names) - set(made):
        raise InputError(f"--methods takes some of {', '.join(made)}, separated by commas; got {methods!r}")
    return [made[name](seed=seed) for name in dict.fromkeys(names)]
