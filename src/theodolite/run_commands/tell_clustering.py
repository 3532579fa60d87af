"""``theodolite run tell-clustering``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, lines, tell


@subject_flags
def command(
    flags: SubjectFlags,
    vectors: Annotated[
        Path | None,
        typer.Option(help=".npy file: rows x columns, or images rows x (channels x) height x width"),
    ] = None,
    clusters: Annotated[int, typer.Option(help="number of clusters")] = 10,
    encoder: Annotated[
        str, typer.Option(help="none (rows scaled to length 1), mlp, conv, or auto: conv for images, mlp for tables")
    ] = "auto",
    warmup: Annotated[
        int, typer.Option(help="epochs of reconstruction before the --epochs; centres then from k-means")
    ] = 20,
    truth: Annotated[
        Path | None, typer.Option(help="text file: the label of each row, to compare with, never learnt from")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write the model to (JSON and safetensors)")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Cluster vectors or images and say what each cluster is: give --vectors, or a subject as for the survey."""
    if vectors is None:
        chart("tell-clustering", flags, seconds, memory, as_json)
        return
    import numpy as np

    from theodolite.networks.clustering import TELL, baseline_labels, clustering_metrics

    if encoder not in ("none", "mlp", "conv", "auto"):
        raise InputError(f"--encoder must be none, mlp, conv or auto, got {encoder!r}")
    x = array(vectors)
    if x.dtype.kind not in "biuf" or x.ndim not in (2, 3, 4):
        raise DataError(f"{vectors} must hold numbers, rows x columns or images; it has shape {x.shape} of {x.dtype}")
    known = None if truth is None else np.array(lines(truth))
    if known is not None and len(known) != len(x):
        raise DataError(f"{truth} has {len(known)} labels for {len(x)} rows")
    kind = None if encoder == "none" else encoder
    model = TELL(
        clusters, encoder=kind, init="kmeans", warmup_epochs=0 if kind is None else warmup,
        epochs=flags.epochs or (20 if kind is None else 80), batch_size=min(64, len(x)), seed=flags.seed,
    ).fit(x)  # fmt: skip
    labels = {"tell": model.labels_} | baseline_labels(x, clusters, names=["k-means"], seed=flags.seed)
    labels |= {
        f"{name}_on_its_codes": found
        for name, found in baseline_labels(model.transform(x), clusters, names=["k-means"], seed=flags.seed).items()
    }
    explained = [model.explain(j, x) for j in range(clusters)]
    result: dict[str, Any] = {
        "rows": len(x),
        "clusters_with_rows": model.n_found_,
        "sizes": [one.size for one in explained],
        "nearest_rows": [one.nearest_index for one in explained],
        "reconstruction_r2": model.reconstruction_r2_,
    }
    if known is not None:
        for name, found in labels.items():
            scores = clustering_metrics(known, found, n_clusters=max(clusters, len(np.unique(known))))
            result[name.replace("-", "_")] = {"nmi": scores.nmi, "ari": scores.ari, "accuracy": scores.accuracy}
    if out is not None:
        model.save(out)
        result["written"] = str(out)
    if as_json:
        result["labels"] = model.labels_.tolist()
    tell(result, as_json)
