"""``theodolite run graph-fidelity``."""

__all__ = ["command"]

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, Seed
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.run_commands.shared import tell

_MASK = "edge_mask"
_COLUMNS = (
    "plus", "minus", "delta", "ordinary_plus", "ordinary_minus", "ordinary_delta", "sparsity", "characterization",
)  # fmt: skip


def command(
    model: Annotated[str | None, typer.Option(help="package.module:factory of a graph network")] = None,
    weights: Annotated[Path | None, typer.Option(help=".safetensors or weights-only .pt file for the factory")] = None,
    graphs: Annotated[
        Path | None,
        typer.Option(
            help="folder of .npz files: x, edge_index, label where it is known, and edge_mask (the explanation), or "
            "edge_mask_NAME for each of several explainers"
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="a soft mask's edges above it are the explanation")] = None,
    top_k: Annotated[int | None, typer.Option(help="so many edges of a soft mask are the explanation")] = None,
    alpha1: Annotated[float, typer.Option(help="share of the explanation that is removed")] = 0.1,
    alpha2: Annotated[float, typer.Option(help="share of the other edges that is kept")] = 0.9,
    samples: Annotated[int, typer.Option(help="draws behind each score")] = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How good explanations of a graph network are; without --model and --graphs, which score to trust on known motifs."""
    if (model is None) != (graphs is None):
        raise InputError("give both --model (package.module:factory) and --graphs (a folder of .npz files), or neither")
    if graphs is None or model is None:
        if weights is not None or threshold is not None or top_k is not None:
            raise InputError("--weights, --threshold and --top-k go with --model and --graphs")
        tell(_known_motifs(alpha1, alpha2, samples, seed), as_json)
        return
    from torch import nn

    from theodolite.core.loading.models import call, find_function, load_weights
    from theodolite.explanations.graph_fidelity import fidelity_table

    network = call(model, find_function(model))
    if not isinstance(network, nn.Module):
        raise ModelError(f"{model} must return a torch.nn.Module, it returned {type(network).__name__}")
    if weights is not None:
        try:
            network.load_state_dict(load_weights(weights))
        except RuntimeError as error:
            raise ModelError(f"{weights} does not fit the network of {model}: {error}") from error
    files = sorted(graphs.glob("*.npz"))
    if not files:
        raise DataError(f"{graphs} holds no .npz files")
    made, masks, labels = zip(*(_read(path) for path in files), strict=True)
    names = sorted(masks[0])
    for path, found in zip(files, masks, strict=True):
        if sorted(found) != names:
            raise DataError(
                f"{path} holds {', '.join(sorted(found))}, {files[0]} {', '.join(names)}; give all the same"
            )
    known = None if any(label is None for label in labels) else list(labels)
    tables = {
        name: fidelity_table(
            network, made, [found[name] for found in masks], known, alpha1=alpha1, alpha2=alpha2, n_samples=samples,
            threshold=threshold, top_k=top_k, seed=seed,
        )
        for name in names
    }  # fmt: skip
    result: dict[str, Any] = {"graphs": len(files), "labels": "predicted" if known is None else "given"}
    if len(names) > 1:
        result |= _ranked(tables)
    for name, table in tables.items():
        said = "" if len(names) == 1 else f"{name.removeprefix(_MASK + '_')}_"
        result |= {f"{said}mean_{column}": float(table[column].to_numpy().mean()) for column in _COLUMNS}
        if as_json:
            result[f"{said}by_graph"] = {
                path.stem: row for path, row in zip(files, table.to_dict("records"), strict=True)
            }
    tell(result, as_json)


def _ranked(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The explainers in the order of each FidΔ, the best first, and whether the two orders begin with the same one."""
    result: dict[str, Any] = {}
    for column, kind in (("delta", "robust"), ("ordinary_delta", "ordinary")):
        means = {name.removeprefix(f"{_MASK}_"): float(table[column].mean()) for name, table in tables.items()}
        result[f"{kind}_fidelity_ranks"] = sorted(means, key=lambda name: -means[name])
    first, other = result["robust_fidelity_ranks"][0], result["ordinary_fidelity_ranks"][0]
    if first != other:
        result["note"] = (
            f"robust fidelity puts {first} first, ordinary fidelity {other}; the ordinary one shows the network graphs unlike "
            "any that it was trained on"
        )
    return result


def _read(path: Path) -> tuple[Any, dict[str, Any], int | None]:
    """A graph, its explanations by name and its label."""
    import numpy as np
    import torch

    from theodolite.explanations.graph_fidelity import Graph

    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as an .npz file of arrays: {error}") from error
    masks = {name: mask for name, mask in arrays.items() if name == _MASK or name.startswith(f"{_MASK}_")}
    missing = [name for name in ("x", "edge_index") if name not in arrays] + ([] if masks else [_MASK])
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    if not np.issubdtype(arrays["edge_index"].dtype, np.integer):
        raise DataError(f"{path}: edge_index must hold whole numbers, it is {arrays['edge_index'].dtype}")

    class Columns:
        x = torch.from_numpy(arrays["x"])
        edge_index = torch.from_numpy(arrays["edge_index"].astype(np.int64))

    label = arrays.get("label")
    if label is not None and (label.size != 1 or label.dtype.kind not in "iu"):
        raise DataError(f"{path}: label must be one whole number, it is an array {label.shape} of {label.dtype}")
    try:
        return Graph.from_pyg(Columns), masks, None if label is None else int(label.item())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _known_motifs(alpha1: float, alpha2: float, samples: int, seed: int) -> dict[str, Any]:
    from theodolite.core.train import Recipe
    from theodolite.explanations.graph_fidelity import GIN, ba_2motifs, coherence, graph_accuracy, train_on_graphs

    made = ba_2motifs(540, seed=seed)
    train, test = made.part(slice(0, 500)), made.part(slice(500, None))
    recipe = Recipe(epochs=100, batch_size=50, lr=5e-3, seed=seed)
    network = train_on_graphs(GIN(seed=seed), train.graphs, train.labels, recipe=recipe)
    accuracy = graph_accuracy(network, test.graphs, test.labels)
    found = coherence(
        network,
        test.graphs,
        test.explanations or (),
        labels=test.labels,
        alpha1=alpha1,
        alpha2=alpha2,
        n_samples=samples,
        seed=seed,
    )
    result: dict[str, Any] = {"data": "BA-2motifs, 40 test graphs, GIN", "test_accuracy": accuracy}
    for name in ("delta", "ordinary_delta", "plus", "ordinary_plus", "minus", "ordinary_minus", "sparsity"):
        result[f"{name}_with_jaccard_distance"] = found.estimate(name, "jaccard")
    best = "robust" if found.rho.loc["delta", "jaccard"] < found.rho.loc["ordinary_delta", "jaccard"] else "ordinary"  # type: ignore[operator]
    result["closer_to_the_truth"] = f"{best} FidΔ"
    if accuracy < 0.95:
        result["note"] = (
            "the network tells less than 95 % of the test graphs, so no score can agree well; try another --seed"
        )
    return result
