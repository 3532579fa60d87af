"""``theodolite run local-interaction-basis``."""

__all__ = ["command"]

from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.run_commands._nodes import network_nodes
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    nodes: Annotated[
        str | None, typer.Option(help="layers by name, with commas between, in the order they run")
    ] = None,
    against: Annotated[
        str, typer.Option(help="bases to compare with, of pca, neuron and random, with commas between")
    ] = "pca,neuron",
    drop: Annotated[float, typer.Option(help="loss of quality that counts as none", min=0)] = 0.01,
    rows: Annotated[int, typer.Option(help="training rows to use", min=2)] = 1000,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Edges required between the named layers in each basis, on validation rows; or chart a subject as the survey does."""
    if nodes is None:
        chart("local-interaction-basis", flags, seconds, memory, as_json)
        return
    import torch
    from torch import Tensor, nn

    from theodolite.activations.local_interaction_basis import LocalInteractionBasis, edges, edges_required
    from theodolite.core.subject import Rows

    subject, names = network_nodes(flags, nodes)
    held = subject.data.validation
    order = torch.randperm(len(subject.data.train), generator=torch.Generator().manual_seed(flags.seed))[:rows]
    x = subject.data.train.x[order]

    def score(outputs: Tensor) -> float:
        return float(subject.correct(nn.Identity(), Rows(outputs, held.y)).mean())

    options: dict[str, Any] = {"memory": memory << 20, "seed": flags.seed}
    found = LocalInteractionBasis.from_module(subject.predictor, names, **options).fit(x)
    kinds = ["lib", *(kind.strip() for kind in against.split(",") if kind.strip())]
    layers = found.sections_.names
    result: dict[str, Any] = {"drop": drop, "rows": len(x), "validation_rows": len(held)}
    for kind in kinds:
        basis = found if kind == "lib" else found.baseline(kind)
        result[kind] = {}
        for layer in range(len(layers) - 1):
            E = edges(basis, x, layer)
            result[kind][f"{layers[layer]} -> {layers[layer + 1]}"] = {
                "edges_required": edges_required(basis, held.x, score, layer, drop=drop, edges=E),
                "matrix": list(E.shape),
            }
    tell(result, as_json)
