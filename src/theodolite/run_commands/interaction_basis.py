"""``theodolite run interaction-basis``."""

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
        str | None, typer.Option(help="hidden layers by name, with commas between, in the order they run")
    ] = None,
    rows: Annotated[int, typer.Option(help="training rows to use", min=2)] = 2000,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """The basis of the named layers, the modules they fall into and the free weights; or chart a subject as the survey."""
    if nodes is None:
        chart("interaction-basis", flags, seconds, memory, as_json)
        return
    from theodolite.activations.interaction_basis import InteractionBasis, degeneracy, find_modules, interactions

    subject, names = network_nodes(flags, nodes)
    x = subject.data.train.x[:rows]
    options: dict[str, Any] = {"memory": memory << 20, "seed": flags.seed}
    basis = InteractionBasis.from_module(subject.predictor, names, **options).fit(x)
    report = degeneracy(subject.predictor, x, **options)
    modules = find_modules(interactions(basis, x), seed=flags.seed)
    layers = {
        name: {
            "width": layer.width,
            "directions": layer.rank,
            "rank_gram": layer.rank_gram,
            "rank_jacobian": layer.rank_jacobian,
            "identified": int(layer.identified.sum()),
            "eigenvalues": layer.eigenvalues[:20].tolist(),
        }
        for name, layer in zip(basis.sections_.names, basis.layers_, strict=True)
    }
    result: dict[str, Any] = {"layers": layers}  # a key of its own: names of layers are printed as they are
    result |= {"modules": modules.count, "modularity": modules.q, "modularity_of_rewired_graphs": modules.q_null}
    result |= {"free_directions": report.free_directions, "weights_of_linear_layers": report.parameters}
    tell(result, as_json)
