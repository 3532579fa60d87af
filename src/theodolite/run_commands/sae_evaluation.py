"""``theodolite run sae-evaluation``."""

__all__ = ["command"]

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    sae: Annotated[Path | None, typer.Option(help="SAELens folder (cfg.json and sae_weights.safetensors)")] = None,
    activations: Annotated[
        Path | None, typer.Option(help=".npy of activations (rows, width), which the autoencoder is measured on")
    ] = None,
    ioi: Annotated[
        bool, typer.Option(help="score edits of names and order in a decoder (--model), heads found by itself")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            help="folder for the states of a decoder's layer on the texts of --data, made or continued where it was stopped; "
            "an autoencoder is trained on them as they lie on disk, also where they are more than fits in memory, and "
            "written to FOLDER/sae as SAELens has it"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of the texts for --store at most", min=2000)] = 50_000,
    prompts: Annotated[int, typer.Option(help="prompts for --ioi, 70 % to fit and the others to score", min=100)] = 240,
    heads: Annotated[int, typer.Option(help="heads for --ioi, each with its own TopK autoencoder", min=1)] = 4,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Every dictionary of a subject's layer in one table; or score a SAELens folder on activations, autoencoders of a decoder's
    heads on indirect objects (--ioi), or one trained on states kept on disk (--store).
    """
    if (ioi or store is not None) and (sae is not None or activations is not None or (ioi and store is not None)):
        raise InputError(
            "--ioi and --store train their own autoencoders; give one of them, without --sae and --activations"
        )
    if store is not None:
        tell(_stored(flags, store, tokens, memory << 20, as_json), as_json)
        return
    if ioi:
        tell(_on_ioi(flags, prompts, heads, memory << 20, as_json), as_json)
        return
    if sae is None and activations is None:
        _chart(flags, seconds, memory, as_json)
        return
    if sae is None or activations is None:
        raise InputError("give both --sae, a SAELens folder, and --activations, a .npy array (rows, width)")
    tell(_of_folder(sae, activations, memory << 20), as_json)


def _chart(flags: SubjectFlags, seconds: float, memory: int, as_json: bool) -> None:
    """The chart of a subject, its numbers "dictionary: column" as a table."""
    if as_json:
        chart("sae-evaluation", flags, seconds, memory, as_json)
        return
    from rich.console import Console
    from rich.table import Table

    from theodolite.core.estimate import Estimate
    from theodolite.survey.run import measure

    finding = measure("sae-evaluation", flags.load(), seed=flags.seed, seconds=seconds, memory=memory << 20)
    rows, others = dict[str, dict[str, str]](), dict[str, str]()
    for name, number in finding.numbers.items():
        dictionary, found, column = name.partition(": ")
        if found:  # units stand in the columns' names
            rows.setdefault(dictionary, {})[column] = str(Estimate(number.value, number.low, number.high))
        else:
            others[name] = str(number)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(box=None)
    table.add_column("", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, overflow="fold")
    for dictionary, row in rows.items():
        table.add_row(dictionary, *(row.get(column, "-") for column in columns))
    console = Console()
    console.print(finding.headline, markup=False)
    console.print(table, markup=False)
    for line in (*(f"{name}: {number}" for name, number in others.items()), *finding.caveats):
        console.print(line, markup=False)


def _of_folder(folder: Path, file: Path, memory: int) -> dict[str, Any]:
    import torch

    from theodolite.activations.dictionary import load_sae
    from theodolite.core.capture import check_finite
    from theodolite.core.dictionary import LinearDictionary, measure

    made = load_sae(folder)
    rows = torch.as_tensor(array(file)).float()
    if rows.ndim != 2 or len(rows) < 4:
        raise DataError(f"{file} must hold at least 4 activations (rows, width), it has shape {tuple(rows.shape)}")
    check_finite(rows, str(file))
    fit, held = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    (first,) = measure({"sparse autoencoder": made}, held, memory=memory)
    k = max(1, min(rows.shape[1], round(first.active)))
    others = {
        f"{k} principal components": LinearDictionary.principal_components(fit, k),
        f"{k} random directions": LinearDictionary.random(rows.shape[1], k, seed=0, centre=fit.mean(dim=0)),
    }
    table = (first, *measure(others, held, memory=memory))
    return {
        "rows measured": len(held),
        **{
            one.name: {
                "variance_explained": round(one.explained, 4), "codes_on": round(one.active, 2), "codes": one.codes,
                "never_on": round(one.dead * one.codes),
            }
            for one in table
        },
    }  # fmt: skip


_LENGTH, _HELD_OUT = 64, 0.1  # tokens of a row; share of rows to score on
_STEPS, _BATCH = 1000, 256


def _stored(flags: SubjectFlags, folder: Path, tokens: int, memory: int, as_json: bool) -> dict[str, Any]:
    """Collect a layer's states into ``folder``, train on them where they lie, score on rows that come after them."""
    import torch

    from theodolite.activations.dictionary import SparseAutoencoder, save_sae, train_sae
    from theodolite.activations.dictionary_evaluation import compare_dictionaries
    from theodolite.core.capture import activations
    from theodolite.core.dictionary import LinearDictionary
    from theodolite.core.store import ActivationStore
    from theodolite.core.transformer import decoder_parts
    from theodolite.language.pretrained import load_decoder
    from theodolite.language.subjects import default_texts, read_texts

    texts = default_texts() if flags.data is None else read_texts(flags.data)
    model, tokenizer = load_decoder(flags.model or "smollm2")
    ids = list[int]()
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // _LENGTH
    if count < 20:
        raise DataError(f"the texts make {count} rows of {_LENGTH} tokens; at least 20 are needed")
    rows = torch.tensor(ids[: count * _LENGTH]).view(count, _LENGTH)
    fitted = count - max(2, round(_HELD_OUT * count))
    parts = decoder_parts(model)
    depth = 2 * len(parts) // 3
    node = f"{parts.blocks[depth].name}:input"
    size = 2 * fitted * (_LENGTH - 1) * parts.width
    store = ActivationStore.collect(
        model, rows[:fitted], [node], folder, positions="not first", half=True, max_bytes=size, memory=memory
    )
    states, k = store[node], max(1, min(16, parts.width // 8))
    sae = SparseAutoencoder(parts.width, 2 * parts.width, "topk", k=k, seed=flags.seed)
    epochs = max(1, round(_STEPS * _BATCH / len(states)))
    train_sae(sae, states, epochs=epochs, batch_size=_BATCH, lr=3e-3, seed=flags.seed, memory=memory)
    held = activations(model, rows[fitted:][:32], [node], memory=memory)[node][:, 1:].float()
    some = store.tensor(node, slice(0, 4000))
    made = {
        "sparse autoencoder": sae,
        "principal components": LinearDictionary.principal_components(some, k),
        "random directions": LinearDictionary.random(parts.width, k, seed=flags.seed, centre=some.mean(dim=0)),
    }
    table = compare_dictionaries(made, some, held, seed=flags.seed, memory=memory)
    return {
        "layer": f"the stream before block {depth}",
        "states on disk": len(states),
        "autoencoder": str(save_sae(sae, folder / "sae")),
        "table": json.loads(str(table.frame.to_json(orient="index"))) if as_json else f"\n{table}",
    }


def _on_ioi(flags: SubjectFlags, prompts: int, heads: int, memory: int, as_json: bool) -> dict[str, Any]:
    from theodolite.activations.dictionary import SparseAutoencoder, train_sae
    from theodolite.activations.dictionary_evaluation import (
        PatchedRuns,
        evaluate_dictionary,
        ioi_task,
        single_token_names,
        writing_heads,
    )
    from theodolite.language.pretrained import load_decoder

    model, tokenizer = load_decoder(flags.model or "smollm2")
    names = single_token_names(tokenizer)[: max(6, prompts // 20)]  # each has to be among the fitted prompts
    task = ioi_task(tokenizer, names, prompts, seed=flags.seed)
    fit, held = task.split(0.7, seed=flags.seed, by=("IO", "S"))
    places = writing_heads(model, fit, top=heads, memory=memory)
    states = PatchedRuns(model, fit, places, memory=memory).states
    made = {}
    for one, x in states.items():
        made[one] = SparseAutoencoder(x.shape[1], 4 * x.shape[1], "topk", k=min(3, x.shape[1]), seed=flags.seed)
        train_sae(made[one], x, epochs=150, lr=3e-3, batch_size=64, seed=flags.seed)
    report = evaluate_dictionary(
        model, held, places, made, fit=fit, attributes=["IO"], k_edit=(1, 2), seed=flags.seed, memory=memory
    )
    if not as_json:
        return {"heads": ", ".join(map(str, places)), "report": "\n" + report.summary()}
    tables = {
        name: json.loads(getattr(report, name).to_json(orient="records"))
        for name in ("approximation", "control", "interpretability")
    }
    return {"heads": [str(one) for one in places], **tables}
