"""The hidden layer that the chart of dictionaries looks at: its states, the loss with others in their place, and every
dictionary of it that can be made.
"""

__all__ = ["BATCH", "FIT_TEXTS", "STEPS", "TEST_TEXTS", "Layer", "dictionaries_of", "layer_of"]

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.activations._basis import jacobian_grams, layer_basis
from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.activations.dictionary_evaluation import SupervisedDictionary
from theodolite.activations.dictionary_evaluation.runs import started_at
from theodolite.activations.relative import RelativeProjection
from theodolite.core.capture import activations, forward_nodes, gram, main_tensor
from theodolite.core.dictionary import Dictionary, LinearDictionary
from theodolite.core.errors import TheodoliteError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.sections import sections_of
from theodolite.core.subject import Subject
from theodolite.core.transformer import decoder_parts
from theodolite.core.view import evaluation_mode
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget

FIT_TEXTS, TEST_TEXTS = 48, 8
STEPS, BATCH = 400, 128
_LR = 3e-3
_ROWS, _TEST_ROWS = 4_000, 1_000
_BASIS_TEXTS, _PROBES, _BASIS_ROWS = 4, 4, 1_000
_TOKENS = 64  # with a code of their own; all others share one


@dataclass(frozen=True, eq=False)
class Layer:
    """One hidden layer of a subject.

    fit: (row, width) states of training inputs; label, labels: what is known of each of them ("class", "current token"), None
    where nothing is. states: of test inputs, (input, width), or (input, token, width) of a decoder, without first tokens. loss:
    on these inputs with other states in place, as `compare_dictionaries` takes it. groups: which inputs belong together.
    influence: K of the layer, (1/n) sum J^T J of the network's end (of a decoder: the last stream) by the layer; may raise.
    """

    name: str
    fit: Tensor
    label: str
    labels: list[int] | None
    states: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    groups: np.ndarray
    influence: Callable[[], Tensor]
    is_text: bool


def layer_of(subject: Subject, budget: Budget) -> Layer:
    """Of a decoder the stream before the block two thirds up, of another network the last hidden layer."""
    return _of_text(subject, budget) if subject.is_language_model else _of_rows(subject, budget)


def _some(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:_ROWS]


def _of_text(subject: Subject, budget: Budget) -> Layer:
    model, parts = subject.predictor, decoder_parts(subject.predictor)
    depth = max(1, 2 * len(parts) // 3) if len(parts) > 1 else 0
    node = f"{parts.blocks[depth].name}:input"
    train, test = subject.data.train.x[:FIT_TEXTS].to(parts.device), subject.data.test.head(TEST_TEXTS)
    ids = test.x.to(parts.device)

    def streams(ids: Tensor) -> Tensor:
        cost = 160.0 * ids.shape[1] * parts.width
        return torch.cat(
            [forward_nodes(model, ids[part], [node])[node] for part in chunks(len(ids), cost, budget.memory)]
        )

    whole = streams(ids)
    # a decoder without its head: what it ends in is the last stream
    body, name = model.base_model, node.removeprefix(f"{model.base_model_prefix}.")
    blocks = [block.module for block in parts.blocks[: depth + 1]]
    in_tuples = _gives_tuples(model, blocks[0], ids)
    logits = 16.0 * ids.shape[1] * parts.vocabulary

    @torch.no_grad()
    def loss(states: Tensor, targets_of: Tensor) -> Tensor:
        held = torch.cat([whole[:, :1], states.to(whole)], dim=1)
        losses = []
        with evaluation_mode(model):
            for part in chunks(len(ids), logits, budget.memory):
                with started_at(blocks, held[part], in_tuples):
                    out = main_tensor(model(ids[part], use_cache=False))[:, :-1].float()
                wanted = ids[targets_of[part], 1:]
                each = nn.functional.cross_entropy(out.flatten(0, 1), wanted.flatten(), reduction="none")
                losses.append(each.view(wanted.shape).mean(dim=1))
        return torch.cat(losses)

    def influence() -> Tensor:
        few = train[:_BASIS_TEXTS]
        mask = torch.ones(few.shape, dtype=torch.bool)
        mask[:, 0] = False
        options = {"mask": mask, "jacobian": "hutchinson", "n_probes": _PROBES, "memory": budget.memory}
        return jacobian_grams(sections_of(body, [name], few), few, seed=budget.seed, **options)[0]

    chosen = _some(len(train) * (train.shape[1] - 1), budget.seed)
    fit = streams(train)[:, 1:].flatten(0, 1).float().cpu()[chosen]
    tokens = train[:, 1:].flatten().cpu()[chosen].tolist()
    own = {token for token, _ in Counter(tokens).most_common(_TOKENS - 1)}
    return Layer(
        f"the stream before block {depth}", fit, "current token", [t if t in own else -1 for t in tokens],
        whole[:, 1:].float().cpu(), loss, test.y.numpy(), influence, True,
    )  # fmt: skip


@torch.no_grad()
def _gives_tuples(model: nn.Module, block: nn.Module, ids: Tensor) -> bool:
    found = []
    handle = block.register_forward_hook(lambda module, args, output: found.append(isinstance(output, tuple)))
    try:
        with evaluation_mode(model):
            model(ids[:1, :2])
    finally:
        handle.remove()
    return found[0]


def _of_rows(subject: Subject, budget: Budget) -> Layer:
    model, node, data = subject.predictor, flat_nodes(subject)[-1], subject.data
    test, chosen = data.test.head(_TEST_ROWS), _some(len(data.train), budget.seed)
    x = data.train.x[chosen]
    held, fit = (activations(model, rows, [node], memory=budget.memory)[node].float() for rows in (test.x, x))
    with evaluation_mode(model):
        cost = bytes_per_row(model, x[:1], gradients=False)

    def loss(states: Tensor, targets_of: Tensor) -> Tensor:
        losses = []
        for part in chunks(len(test), cost, budget.memory):
            put = {node: states[part].to(held)}
            out = forward_nodes(model, test.x[part], ["output"], replace=put)["output"].float()
            losses.append(_row_loss(data.task, out.reshape(len(out), -1), test.y[targets_of[part]]))
        return torch.cat(losses)

    def influence() -> Tensor:
        few = x[:_BASIS_ROWS]
        return jacobian_grams(sections_of(model, [node], few), few, seed=budget.seed, memory=budget.memory)[0]

    labels = data.train.y[chosen].tolist() if data.task == "classification" else None
    return Layer(node, fit, "class", labels, held, loss, np.arange(len(test)), influence, False)


def _row_loss(task: str, scores: Tensor, y: Tensor) -> Tensor:
    if task == "regression":
        return (scores[:, 0] - y).square()
    if scores.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], y.float(), reduction="none")
    return nn.functional.cross_entropy(scores, y, reduction="none")


# ---- dictionaries


def dictionaries_of(
    layer: Layer, k: int, seed: int
) -> tuple[dict[str, Dictionary], dict[str, Dictionary], tuple[str, ...]]:
    """Every kind with k codes on where it can; what another seed makes of each; and what cannot be made, with why."""
    fit, width = layer.fit, layer.fit.shape[1]
    mean = fit.mean(dim=0)
    rows = torch.eye(width)[fit.var(dim=0).argsort(descending=True)[:k]]
    fixed: dict[str, Dictionary] = {
        "principal components": LinearDictionary.principal_components(fit, k),
        "single neurons": LinearDictionary(rows, rows, mean),
    }
    notes = []
    try:
        basis = layer_basis(mean.double(), gram(fit), layer.influence().cpu(), rtol=1e-10, name=layer.name)
        fixed["interaction basis"] = LinearDictionary(
            basis.C_pinv[:k].float(), basis.C.mT[:k].float().contiguous(), mean
        )
    except (TheodoliteError, RuntimeError) as error:
        notes.append(f"no interaction basis: {str(error)[:200]}")
    if layer.labels is None:
        notes.append("no supervised dictionary: the data have no classes")
    elif len(set(layer.labels)) < 2:
        notes.append(f"no supervised dictionary: all states have one {layer.label}")
    else:
        codes = SupervisedDictionary().fit(fit, {layer.label: layer.labels})
        fixed[f"supervised by {layer.label}"] = codes

    def drawn(seed: int) -> dict[str, Dictionary]:
        anchors = RelativeProjection(k, preprocess="standardize" if layer.is_text else "center", seed=seed)
        return {
            "sparse autoencoder": _autoencoder(fit, k, seed),
            "relative to anchors": anchors.fit(fit),
            "random directions": LinearDictionary.random(width, k, seed=seed, centre=mean),
        }

    first, second = drawn(seed), drawn(seed + 1)
    made = {"sparse autoencoder": first.pop("sparse autoencoder"), **fixed, **first}
    if layer.is_text:  # its probes are drawn, and drawing them again is not worth the time
        fixed.pop("interaction basis", None)
    return made, fixed | second, tuple(notes)


def _autoencoder(fit: Tensor, k: int, seed: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(fit.shape[1], 2 * fit.shape[1], "topk", k=k, seed=seed)
    batches = -(-len(fit) // BATCH)
    train_sae(sae, fit, epochs=max(1, round(STEPS / batches)), batch_size=BATCH, lr=_LR, seed=seed)
    return sae
