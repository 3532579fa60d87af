"""Layer-wise relevance propagation through a recorded network."""

__all__ = ["check_options", "first_scores", "relevance", "relevance_of", "row_parts"]

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError
from theodolite.core.masks.trace import LAYERS, Recording, record
from theodolite.core.masks.transformers import is_transformer
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode, model_input
from theodolite.parameters.relevance_pruning.rules import RULES, AffineMap, add_rule, choose_rule
from theodolite.parameters.relevance_pruning.targets import RelevanceError, read_targets
from theodolite.parameters.relevance_pruning.transformers import transformer_relevance


def relevance(
    model: nn.Module,
    inputs: object,
    targets: object,
    *,
    rule: str | Mapping[str, str] = "zplus",
    start: str = "logit",
    memory: int | None = None,
) -> Mapping[str, Tensor]:
    """Relevance of every layer's output for the score of the true class, by layer-wise relevance propagation.

        R_i = sum_j a_i w_ij^+ / (sum_k a_k w_kj^+ + eps) R_j,     w^+ = max(w, 0), no bias          (alpha = 1, beta = 0)

    with a^+ w^+ + a^- w^- in place of a w^+ where inputs can be negative. What follows a layer keeps the sum of R: an
    activation passes it on, a maximum gives it to the winner, averages and sums of branches divide it in proportion. A
    batch norm after a layer is folded into it (the network is not changed). Runs in eval mode.

    inputs: (n, ...) rows, a tensor, array or table. targets: (n,) class indices; for a network of one output numbers
    (relevance starts from the output itself, also for a binary classifier). rule: of linear and convolutional layers,
    "zplus" or "epsilon" (R_i = sum_j a_i w_ij / z_j R_j, bias in z), or a mapping from "conv", "linear", a type or a layer's
    name to a rule; other types of layers may have "pass", "winner" or "proportional". start: "logit" starts from the true
    class's score, "one" from 1.

    A Hugging Face transformer takes token ids (n, length), or the mapping that its tokenizer returns, and as targets the
    tokens (n, length) of its own ``labels``, -100 for none, or classes (n,); its rule is that of `transformer_relevance`.

    Returns {layer: R} with R float32 of the output's shape (after a folded batch norm), and "input". A layer that is used
    again has "NAME@2" for its second use. Of a transformer R of the hidden numbers of each MLP, and of the embeddings.

    Raises UnsupportedLayerError, DataError (targets) and RelevanceError where R is not finite.
    Source: Yeom et al., 2021, arXiv:1912.08881, eq. 4.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[2].weight.data.copy_(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    >>> relevance(net, torch.tensor([[2.0, 1.0]]), [0])["0"]
    tensor([[2., 3.]])
    """
    check_options(model, rule, start)
    found = _followed(model, inputs, targets, rule=rule, start=start, memory=memory)
    if is_transformer(model):
        found = transformer_relevance(model, inputs, targets, start=start, memory=memory)
    pieces: dict[str, list[Tensor]] = {}
    for piece in found:
        for name, R in piece.items():
            pieces.setdefault(name, []).append(R.float())
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _followed(
    model: nn.Module, inputs: object, targets: object, *, rule: str | Mapping[str, str], start: str, memory: int | None
) -> Iterator[dict[str, Tensor]]:
    """As `relevance`, one chunk of rows after the other."""
    x = model_input(model, inputs)
    target = read_targets(targets, first_scores(model, x), len(x))
    for part in row_parts(model, x, memory):
        with torch.no_grad(), evaluation_mode(model):
            recording = record(model, x[part])
            yield relevance_of(recording, target[part].start(recording.output.meta["value"], start), rule)


def check_options(model: nn.Module, rule: object, start: object) -> None:
    """Raise InputError for a rule or a start that does not exist, or a rule for a transformer, which has its own."""
    if is_transformer(model) and rule != "zplus":
        raise InputError(
            f"{type(model).__name__} is a transformer, whose relevance has one rule of its own; leave rule out"
        )
    rules = rule.values() if isinstance(rule, Mapping) else [rule]
    wrong = [given for given in rules if given not in RULES]
    if wrong or (isinstance(rule, str) and rule not in ("zplus", "epsilon")):
        raise InputError(f"rule must be 'zplus' or 'epsilon', or a mapping to one of {', '.join(RULES)}; got {rule!r}")
    if start not in ("logit", "one"):
        raise InputError(f"start must be 'logit' or 'one', got {start!r}")


def first_scores(model: nn.Module, x: Tensor) -> Tensor:
    """The scores of the first row, after a look at the rows."""
    if x.ndim < 1 or len(x) == 0:
        raise DataError(f"need at least one row, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise DataError(f"inputs must be finite floating point numbers, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum()) if x.ndim > 1 else 1
        raise DataError(f"inputs must be finite floating point numbers; {bad} of {len(x)} rows hold NaN or infinity")
    with torch.no_grad(), evaluation_mode(model):
        scores = model(x[:1])
    if not isinstance(scores, Tensor):
        raise DataError(f"the network must give one tensor, it gives {type(scores).__name__}")
    return scores


def row_parts(model: nn.Module, x: Tensor, memory: int | None) -> Iterator[slice]:
    """Slices of the rows that keep what is recorded within the byte budget."""
    with evaluation_mode(model):
        cost = 2 * bytes_per_row(model, x[:1], gradients=True)  # activations and relevance of every step
    yield from chunks(len(x), cost, memory)


def relevance_of(recording: Recording, start: Tensor, rule: str | Mapping[str, str]) -> dict[str, Tensor]:
    """As `relevance`, of the rows that were recorded; start: relevance of their output."""
    norms = recording.joined_norms()
    folded = {norm.node for norm in norms.values()}
    chosen = {op.node: choose_rule(op, rule) for op in recording.operations if op.sources}
    arrived = {recording.output: start}
    found = list[tuple[str, Tensor]]()
    for operation in reversed(recording.operations):
        R = arrived.pop(operation.node, None)
        if R is None:
            continue
        if operation.kind in ("input", "constant"):
            if operation.kind == "input":
                found.append(("input", R))
            continue
        if operation.node in folded or not isinstance(operation.module, LAYERS):
            handed = [R] if operation.node in folded else add_rule(operation, chosen[operation.node], R)
        else:
            found.append((operation.name, R))
            norm = norms.get(operation.node)
            linear = AffineMap.of(operation.module, None if norm is None else norm.module)
            handed = [linear.share(chosen[operation.node], operation.inputs()[0], R)]
            if not bool(torch.isfinite(handed[0].sum())):
                raise RelevanceError(
                    f"relevance is not finite below {operation.name}; check the weights and inputs for NaN and overflow"
                )
        for source, share in zip(operation.sources, handed, strict=True):
            arrived[source] = arrived[source] + share if source in arrived else share
    named: dict[str, Tensor] = {}
    for name, R in reversed(found):
        uses = sum(other == name or other.startswith(f"{name}@") for other in named)
        named[f"{name}@{uses + 1}" if uses else name] = R
    return named
