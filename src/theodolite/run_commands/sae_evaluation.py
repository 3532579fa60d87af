"""``theodolite run sae-evaluation``."""

__all__ = ["command"]

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
    prompts: Annotated[int, typer.Option(help="prompts for --ioi, half to fit and half to score", min=40)] = 240,
    heads: Annotated[int, typer.Option(help="heads for --ioi, each with its own TopK autoencoder", min=1)] = 4,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Score sparse autoencoders: of a subject's layer, of a SAELens folder on activations, or of a decoder's heads on IOI."""
    if ioi:
        if sae is not None or activations is not None:
            raise InputError("--ioi trains its own autoencoders; give it without --sae and --activations")
        tell(_on_ioi(flags, prompts, heads, memory << 20, as_json), as_json)
        return
    if sae is None and activations is None:
        chart("sae-evaluation", flags, seconds, memory, as_json)
        return
    if sae is None or activations is None:
        raise InputError("give both --sae, a SAELens folder, and --activations, a .npy array (rows, width)")
    tell(_of_folder(sae, activations, memory << 20), as_json)


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


def _on_ioi(flags: SubjectFlags, prompts: int, heads: int, memory: int, as_json: bool) -> dict[str, Any]:
    import json

    from theodolite.activations.dictionary import SparseAutoencoder, train_sae
    from theodolite.activations.dictionary_evaluation import PatchedRuns, evaluate_dictionary, ioi_task, writing_heads
    from theodolite.language.pretrained import load_decoder

    model, tokenizer = load_decoder(flags.model or "smollm2")
    task = ioi_task(tokenizer, None, prompts, seed=flags.seed)
    fit, held = task.split(0.5, seed=flags.seed, by=("IO", "S"))
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
