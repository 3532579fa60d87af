"""``theodolite run ast-probe``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    sources: Annotated[Path | None, typer.Option(help="folder of Python files, or one; or 'stdlib'")] = None,
    layers: Annotated[str, typer.Option(help="layers with commas between (0: embeddings), or all")] = "all",
    rank: Annotated[int, typer.Option(help="dimensions of the probe", min=1)] = 64,
    functions: Annotated[int, typer.Option(help="functions to use at most", min=10)] = 300,
    steps: Annotated[int, typer.Option(help="training steps of each probe at least", min=1)] = 1500,
    snippet: Annotated[Path | None, typer.Option(help="a Python file whose tree the best layer's probe tells")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """F1 of the syntax tree at each layer of --model (smollm2, minilm, a Hugging Face folder or name) on the functions of
    --sources, beside random weights; or chart a subject as the survey.
    """
    if sources is None:
        if snippet is not None:
            raise InputError("--snippet needs a probe: give --sources to learn it from, and --model")
        chart("ast-probe", flags, seconds, memory, as_json)
        return
    chosen_layers = None if layers == "all" else _numbers(layers)
    from theodolite.activations.ast_probe import (
        ASTProbe,
        parse_python,
        python_functions,
        random_weights_like,
        word_states,
    )
    from theodolite.activations.ast_probe.states import layer_count
    from theodolite.language.pretrained import load_encoder

    if not str(sources) == "stdlib" and not sources.exists():
        raise DataError(f"there is no file or folder {sources}")
    found = python_functions(None if str(sources) == "stdlib" else sources, count=functions, seed=flags.seed)
    train, held, test = found.split([round(share * len(found)) for share in (0.6, 0.13, 0.27)], seed=flags.seed)
    model, tokenizer = load_encoder(flags.model or "smollm2")  # of a decoder too: what it needs no head for
    blocks = layer_count(model)
    words = [tree.leaves for tree in found.trees]
    states = word_states(model, tokenizer, words, chosen_layers)
    random_layer = max(1, round(0.2 * blocks))
    random = word_states(random_weights_like(model, seed=flags.seed), tokenizer, words, [random_layer])[random_layer]

    def of(rows: Any, vectors: list[Any]) -> tuple[list[Any], list[Any]]:
        return [vectors[i] for i in rows], [found.trees[i] for i in rows]

    def scored(vectors: list[Any]) -> tuple[ASTProbe, dict[str, float]]:
        options = {"lr": 3e-3, "batch_size": 64, "min_steps": steps, "random_state": flags.seed}
        probe = ASTProbe(rank, **options).fit(*of(train, vectors), of(held, vectors))
        return probe, {name: round(value, 4) for name, value in probe.score(*of(test, vectors))._asdict().items()}

    console = Console(stderr=True)
    probes = {
        layer: scored(vectors)
        for layer, vectors in track(states.items(), "probing layers", console=console, disable=as_json)
    }
    chosen = {layer: probe.score(*of(held, states[layer])).f1 for layer, (probe, _) in probes.items()}
    best = max(chosen, key=chosen.__getitem__)
    result: dict[str, Any] = {
        "functions": {"training": len(train), "validation": len(held), "test": len(test), "skipped": found.skipped},
        "rank": rank,
        "layers": {str(layer): scores for layer, (_, scores) in probes.items()},
        f"random_weights_layer_{random_layer}": scored(random)[1],
        "best_layer_on_validation_functions": best,
        "orthogonality_error": probes[best][0].orthogonality_error_,
    }
    if snippet is not None:
        leaves = parse_python(snippet.read_text(encoding="utf-8")).leaves
        own = word_states(model, tokenizer, [leaves], [best])[best]
        result["tree"] = probes[best][0].predict(own, [leaves])[0].render()
    tell(result, as_json)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--layers are whole numbers with commas between, or all; got {text!r}") from error
