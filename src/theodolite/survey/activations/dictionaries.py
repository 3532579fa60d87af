"""The chart of dictionaries: how much of a hidden layer, and of what the model does with it, a few directions keep."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.core.capture import activations, forward_nodes
from theodolite.core.dictionary import Dictionary, LinearDictionary, measure, stability
from theodolite.core.errors import TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.subject import Subject
from theodolite.core.transformer import decoder_parts
from theodolite.core.view import evaluation_mode
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_SAE, _PCA, _NEURONS, _RANDOM = "sparse autoencoder", "principal components", "single neurons", "random directions"
_FIT_TEXTS, _TEST_TEXTS, _ROWS, _TEST_ROWS = 48, 12, 4_000, 1_000
_STEPS, _BATCH, _LR = 400, 128, 3e-3
_LEAST = 1e-3
_WIDEST = 2_048
_FIRST_TOKEN = "The first token of each text is left out and left as it is: its state is often larger than all others."


@dataclass(frozen=True, eq=False)
class _Layer:
    """Where the layer is, its states on training rows, and on test rows as the model holds them.

    ids, y: the test rows. states: (row, width), or (row, token, width) of a decoder, with the first token among them.
    """

    node: str
    name: str
    fit: Tensor
    inputs: Tensor
    y: Tensor
    groups: np.ndarray
    states: Tensor
    is_text: bool

    @property
    def shown(self) -> Tensor:
        """Test states without first tokens, one a row."""
        return self.states[:, 1:].flatten(0, 1) if self.is_text else self.states


def _not_applicable(subject: Subject) -> str | None:
    if not subject.is_language_model:
        if flat_nodes(subject):
            return None
        return f"needs a hidden layer with activations (rows, width) of at most {_WIDEST:,}; this network has none"
    try:
        width = decoder_parts(subject.predictor).width
    except TheodoliteError as error:
        return f"needs a decoder whose residual stream can be named: {str(error)[:200]}"
    return None if width <= _WIDEST else f"needs a stream of width at most {_WIDEST:,}; this one has {width:,}"


def _forecast(subject: Subject) -> float:
    """Seconds, from the time of a few rows and of the products that a step of training takes."""
    x = subject.data.train.x[:4]
    with evaluation_mode(subject.predictor), torch.no_grad():
        subject.predictor(x)
        started = time.perf_counter()
        subject.predictor(x)
    each = (time.perf_counter() - started) / len(x)
    width = decoder_parts(subject.predictor).width if subject.is_language_model else 64
    rows = _FIT_TEXTS / 2 + 6 * _TEST_TEXTS if subject.is_language_model else 6_000 / 100
    return 2 + each * rows + 2 * _STEPS * _BATCH * 12 * width * 2 * width / 4e10


@chart("sae-evaluation", needs=Needs(network=True, language_model=None, test=_not_applicable), cost=_forecast)
def dictionaries(subject: Subject, budget: Budget) -> Finding:
    """A TopK sparse autoencoder of one hidden layer beside components, neurons and random directions with as many codes on."""
    layer = _of_text(subject, budget) if subject.is_language_model else _of_rows(subject, budget)
    width = layer.fit.shape[1]
    k = max(1, min(16, width // 8))
    made = _dictionaries(layer.fit, width, k, budget.seed)
    again = _autoencoder(layer.fit, width, k, budget.seed + 1)
    table = {row.name: row for row in measure(made, layer.shown, memory=budget.memory)}
    clean = _losses(subject, layer, layer.states, budget)
    ablated = _losses(subject, layer, layer.fit.mean(dim=0).expand_as(layer.states), budget)
    kept = {name: _losses(subject, layer, _rebuilt(one, layer.states), budget) for name, one in made.items()}
    explained = {name: _explained(one, layer, budget.seed) for name, one in made.items()}
    matters = bool(ablated.mean() - clean.mean() > _LEAST * max(float(clean.mean()), _LEAST))
    recovered = (
        {name: _recovered(losses, clean, ablated, layer.groups, budget.seed) for name, losses in kept.items()}
        if matters
        else {}
    )
    shown, what = (recovered, "loss recovered") if matters else (explained, "variance explained")
    numbers = {f"{name}: variance explained, {k} of {table[name].codes} codes": explained[name] for name in made}
    numbers |= {f"{name}: loss recovered": value for name, value in recovered.items()}
    numbers["loss on these rows, as the model is"] = bootstrap(
        clean, seed=budget.seed, groups=layer.groups, unit="nats" if _in_nats(subject) else ""
    )
    numbers["loss with the layer's mean in its place"] = bootstrap(ablated, seed=budget.seed, groups=layer.groups)
    sae = table[_SAE]
    numbers[f"{_SAE}: codes that are never on"] = Estimate.exact(round(sae.dead * sae.codes), f"of {sae.codes}")
    numbers[f"{_SAE}: cosine of matched directions of two seeds"] = Estimate.exact(
        stability(made[_SAE], again), "cosine"
    )
    comparison = Comparison(
        f"{what} at {layer.name} by a {_SAE} with {k} codes on",
        shown[_SAE],
        (
            Control(_RANDOM, shown[_RANDOM], "random"),
            Control(_PCA, shown[_PCA], "closed-form"),
            Control(_NEURONS, shown[_NEURONS], "closed-form"),
            Control("the layer's mean in its place", Estimate.exact(0.0), "null"),
        ),
    )
    dead = round(sae.dead * sae.codes)
    return Finding(
        slug="sae-evaluation",
        headline=f"With {k} of {sae.codes} codes on, a sparse autoencoder of {layer.name} keeps {_percent(explained[_SAE])} of "
        f"the variance of held-out states" + (f" and {_percent(recovered[_SAE])} of the loss" if matters else "")
        + f"; {k} principal components keep {_percent(explained[_PCA])}"
        + (f" and {_percent(recovered[_PCA])}" if matters else "") + f"; {dead} codes are never on.",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(explained, recovered),
        reading="For each dictionary with the same number of codes on: the share of the variance of held-out states that it "
        "keeps, and how much of the loss is kept when the layer holds its reconstruction instead (0: the layer's mean in its "
        "place, 1: the layer untouched). A dictionary can keep the variance and lose what the model uses.",
        advice="Variance kept says nothing about steering. With a task whose attributes are known, score edits with "
        "theodolite.activations.dictionary_evaluation.evaluate_dictionary, beside codes that need no training.",
        seed=budget.seed,
        caveats=(
            f"Trained on {len(layer.fit):,} states in {_STEPS} steps; a dictionary for use takes far more of both. The "
            f"autoencoder chooses its {k} codes anew for each state out of {sae.codes}, the others always use the same {k}.",
            *((_FIRST_TOKEN,) if layer.is_text else ()),
            *(() if matters else ("The layer does not matter for the loss on these rows, so no share of it is told.",)),
        ),
    )  # fmt: skip


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.0f} %"


def _in_nats(subject: Subject) -> bool:
    return subject.data.task != "regression"


# ---- the layer


def _of_text(subject: Subject, budget: Budget) -> _Layer:
    """The stream before the block two thirds up."""
    parts = decoder_parts(subject.predictor)
    depth = max(1, 2 * len(parts) // 3) if len(parts) > 1 else 0
    node = f"{parts.blocks[depth].name}:input"
    train, test = subject.data.train.x[:_FIT_TEXTS], subject.data.test.head(_TEST_TEXTS)

    def streams(ids: Tensor) -> Tensor:
        ids, cost = ids.to(parts.device), 160.0 * ids.shape[1] * parts.width
        found = [
            forward_nodes(subject.predictor, ids[part], [node])[node] for part in chunks(len(ids), cost, budget.memory)
        ]
        return torch.cat(found).float().cpu()

    fit = streams(train)[:, 1:].flatten(0, 1)
    return _Layer(
        node, f"the stream before block {depth}", _some(fit, budget.seed), test.x, test.y, test.y.numpy(), streams(test.x), True
    )  # fmt: skip


def _of_rows(subject: Subject, budget: Budget) -> _Layer:
    """The last hidden layer."""
    node = flat_nodes(subject)[-1]
    data = subject.data
    test = data.test.head(_TEST_ROWS)
    fit = _some(data.train.x, budget.seed)
    held = activations(subject.predictor, test.x, [node], memory=budget.memory)[node].float()
    states = activations(subject.predictor, fit, [node], memory=budget.memory)[node].float()
    return _Layer(node, node, states, test.x, test.y, np.arange(len(test)), held, False)


def _some(rows: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:_ROWS]]


# ---- dictionaries


def _dictionaries(fit: Tensor, width: int, k: int, seed: int) -> dict[str, Dictionary]:
    mean = fit.mean(dim=0)
    largest = fit.var(dim=0).argsort(descending=True)[:k]
    rows = torch.eye(width)[largest]
    return {
        _SAE: _autoencoder(fit, width, k, seed),
        _PCA: LinearDictionary.principal_components(fit, k),
        _NEURONS: LinearDictionary(rows, rows, mean),
        _RANDOM: LinearDictionary.random(width, k, seed=seed, centre=mean),
    }


def _autoencoder(fit: Tensor, width: int, k: int, seed: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(width, 2 * width, "topk", k=k, seed=seed)
    batches = -(-len(fit) // _BATCH)
    train_sae(sae, fit, epochs=max(1, round(_STEPS / batches)), batch_size=_BATCH, lr=_LR, seed=seed)
    return sae


@torch.no_grad()
def _rebuilt(dictionary: Dictionary, states: Tensor) -> Tensor:
    return dictionary.decode(dictionary.encode(states))


def _explained(dictionary: Dictionary, layer: _Layer, seed: int) -> Estimate:
    """Share of the variance of held-out states that is kept, by texts or rows."""
    x = layer.shown
    lost = (x - _rebuilt(dictionary, x)).double().square().sum(dim=1)
    about = (x.double() - x.double().mean(dim=0)).square().sum(dim=1)
    pairs = torch.stack([lost, about], dim=1).reshape(len(layer.states), -1, 2).sum(dim=1).numpy()
    return bootstrap(
        pairs, lambda r: float(1 - r[:, 0].sum() / r[:, 1].sum()) if r[:, 1].sum() > 0 else 0.0, seed=seed, resamples=400,
        groups=layer.groups, unit="of the variance",
    )  # fmt: skip


def _recovered(losses: np.ndarray, clean: np.ndarray, ablated: np.ndarray, groups: np.ndarray, seed: int) -> Estimate:
    rows = np.stack([losses, clean, ablated], axis=1)

    def share(part: np.ndarray) -> float:
        loss, best, worst = part.mean(axis=0)
        return float((worst - loss) / (worst - best)) if worst != best else 0.0

    return bootstrap(rows, share, seed=seed, resamples=400, groups=groups, unit="of the loss")


# ---- the loss with other states in place


@torch.no_grad()
def _losses(subject: Subject, layer: _Layer, states: Tensor, budget: Budget) -> np.ndarray:
    """The loss of each test row where the layer holds ``states``; first tokens of texts stay as they are."""
    model, x = subject.predictor, layer.inputs
    if layer.is_text:
        states = torch.cat([layer.states[:, :1], states[:, 1:]], dim=1)
        parts = decoder_parts(model)
        cost = 4.0 * x.shape[1] * parts.vocabulary * 4
    else:
        with evaluation_mode(model):
            cost = bytes_per_row(model, x[:1], gradients=False)
    losses = []
    for part in chunks(len(x), cost, budget.memory):
        out = forward_nodes(model, x[part], ["output"], replace={layer.node: states[part].to(layer.states)})[
            "output"
        ].float()
        losses.append(_loss(subject, out, x[part], layer.y[part]).cpu())
    return torch.cat(losses).double().numpy()


def _loss(subject: Subject, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if subject.is_language_model:
        each = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        return each.view(len(x), -1).mean(dim=1)
    scores = out.reshape(len(out), -1)
    if subject.data.task == "regression":
        return (scores[:, 0] - y).square()
    if scores.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], y.float(), reduction="none")
    return nn.functional.cross_entropy(scores, y, reduction="none")


def _figure(explained: Mapping[str, Estimate], recovered: Mapping[str, Estimate]) -> go.Figure:
    figure = blank("", "share kept")
    for i, (name, table) in enumerate((("variance explained", explained), ("loss recovered", recovered))):
        if not table:
            continue
        values = list(table.values())
        figure.add_trace(
            go.Bar(
                x=list(table), y=[one.value for one in values], name=name, marker_color=INKS[i],
                error_y={
                    "type": "data", "symmetric": False, "array": [one.high - one.value for one in values],
                    "arrayminus": [one.value - one.low for one in values],
                },
            )
        )  # fmt: skip
    figure.update_layout(barmode="group")
    figure.update_yaxes(tickformat=".0%")
    return figure
