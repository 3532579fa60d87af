"""``theodolite run relative-representations``."""

__all__ = ["command"]

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, lines, tell


@subject_flags
def command(
    flags: SubjectFlags,
    first: Annotated[
        str | None,
        typer.Option(help=".npy file of latents, rows x width; or a text model: minilm, smollm2, a Hugging Face name"),
    ] = None,
    second: Annotated[str | None, typer.Option(help="the other model's latents of the same rows, or its name")] = None,
    texts: Annotated[Path | None, typer.Option(help="text file, one text a line, for models given by name")] = None,
    first_layer: Annotated[int | None, typer.Option(help="hidden layer of the first text model; the last")] = None,
    second_layer: Annotated[int | None, typer.Option(help="hidden layer of the second text model; the last")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="text file: the class of each row; adds heads of one model before the other")
    ] = None,
    anchors: Annotated[int, typer.Option(help="number of anchors, drawn at random from the rows", min=2)] = 300,
    preprocess: Annotated[str, typer.Option(help="none, center or standardize, by the anchors")] = "standardize",
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Compare two models on the same rows: give --first and --second, or a subject as for the survey."""
    if first is None and second is None:
        chart("relative-representations", flags, seconds, memory, as_json)
        return
    if first is None or second is None:
        raise InputError("give both --first and --second: two .npy files with the same rows, or two text models")
    from theodolite.activations.relative import RelativeProjection

    read = _texts(texts, first, second)
    a, b = _latents(first, read, first_layer), _latents(second, read, second_layer)
    if preprocess not in ("none", "center", "standardize"):
        raise InputError(f"--preprocess is none, center or standardize, got {preprocess!r}")
    options: dict[str, Any] = {"preprocess": preprocess}
    one = RelativeProjection(anchors, seed=flags.seed, **options).fit(a)
    if len(a) != len(b):
        raise DataError(f"both models must encode the same rows, got {len(a)} and {len(b)}")
    two = RelativeProjection(**options).fit(b, anchor_index=one.anchor_index_)
    result = _agreement(a, b, one, two, flags.seed)
    if labels is not None:
        result["stitching"] = _stitching(a, b, one.anchor_index_, lines(labels), options, flags.seed)
    tell(result, as_json)


def _texts(path: Path | None, *names: str) -> list[str]:
    if all(name.endswith(".npy") for name in names):
        return []
    if path is None:
        raise InputError("models given by name encode texts: name a file with one text a line by --texts")
    return lines(path)


def _latents(name: str, texts: list[str], layer: int | None) -> Any:
    if name.endswith(".npy"):
        import torch

        from theodolite.core.capture import check_finite

        rows = array(Path(name))
        check_finite(torch.as_tensor(rows), name)
        return rows
    from theodolite.activations.relative import embed_texts
    from theodolite.language.pretrained import load_decoder, load_encoder

    return embed_texts(load_decoder(name) if name == "smollm2" else load_encoder(name), texts, layer=layer)


def _agreement(a: Any, b: Any, one: Any, two: Any, seed: int) -> dict[str, Any]:
    """Both directions on the rows that are no anchors, with the anchors in another order, and without anchors."""
    import warnings

    import numpy as np

    from theodolite.activations.relative import RelativeWarning, latent_agreement

    index = one.anchor_index_
    ra, rb = one.transform(a), two.transform(b)
    rest = len(a) - len(index)
    if rest < 2:
        raise InputError(f"{len(index)} anchors leave {rest} of {len(a)} rows to compare; give fewer --anchors")
    given = {"exclude": index, "k": min(10, rest)}
    order = np.random.default_rng(seed).permutation(len(index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RelativeWarning)  # the name of the line says that widths were made alike
        absolute = latent_agreement(a, b, **given)
    name = "absolute_coordinates" if a.shape[1] == b.shape[1] else "absolute_coordinates_cut_to_one_width_by_PCA"
    found = {
        "first_to_second": latent_agreement(ra, rb, **given),
        "second_to_first": latent_agreement(rb, ra, **given),
        "permuted_anchors": latent_agreement(ra[:, order], rb, **given),
        name: absolute,
    }
    return {"items": rest, "anchors": len(index)} | {key: dataclasses.asdict(value) for key, value in found.items()}


def _stitching(
    a: Any, b: Any, index: Any, names: list[str], options: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Macro F1 of logistic heads on each model's relative vectors, before either model, on a third of the rows."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from theodolite.activations.relative import RelativeProjection, stitching_table

    if len(names) != len(a):
        raise DataError(f"--labels must hold one class for each of the {len(a)} rows, got {len(names)} lines")
    y = np.array(names)
    rest = np.setdiff1d(np.arange(len(a)), index)
    rest = np.random.default_rng(seed).permutation(rest)
    test, fit = rest[: len(rest) // 3], rest[len(rest) // 3 :]
    if len(test) == 0 or len(set(y[fit].tolist())) < 2:
        raise DataError("the rows that are no anchors must hold at least two classes, and some rows to test on")
    latents = {"first": a, "second": b}
    spaces = {
        name: RelativeProjection(normalize=True, **options).fit(z, anchor_index=index) for name, z in latents.items()
    }
    heads = {
        name: LogisticRegression(max_iter=5_000, C=10.0).fit(spaces[name].transform(z[fit]), y[fit])
        for name, z in latents.items()
    }
    table = stitching_table(
        spaces, heads, {name: z[test] for name, z in latents.items()}, y[test], scorer="f1_macro", seed=seed
    )
    return [
        {"encoder": encoder, "head": head, "macro_F1": score, "with_permuted_anchors": permuted}
        for (encoder, head), score, permuted in zip(table.index, table.score, table.permuted, strict=True)
    ]
