"""One small trainer for everything that trains here, and ensembles of it in one batched run."""

__all__ = ["Ensemble", "Recipe", "TrainLog", "accuracy", "seeded", "train", "train_ensemble"]

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

from theodolite.core.errors import InputError, TrainingCollapsedError
from theodolite.core.functional import call_with
from theodolite.core.view import ModelView, evaluation_mode

Loss = Literal["cross-entropy", "binary", "squared"]


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the model, the data and who watches.

    schedule: "cosine" decays the step size to 0 over all epochs, "constant" keeps it. patience: epochs without a better
    validation loss before stopping (None: no early stop; needs validation data). l2: weight of the squared norm of the
    parameters that the optimiser sees. clip: largest gradient norm, None for none.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.0
    l2: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    loss: Loss = "cross-entropy"
    patience: int | None = None
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InputError(
                f"need epochs >= 1, batch_size >= 1, lr > 0; got {self.epochs}, {self.batch_size}, {self.lr}"
            )

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe with another order of the rows."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class TrainLog:
    """Loss after each epoch (mean over its batches), validation loss where validation data were given, and the stop."""

    loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    stopped_early: bool


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of torch from ``seed`` inside the block, and from where they were after it; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def loss_function(name: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean loss of (scores, targets)."""
    if name == "cross-entropy":
        return F.cross_entropy
    if name == "binary":
        return lambda scores, y: F.binary_cross_entropy_with_logits(scores.reshape(y.shape), y.to(scores.dtype))
    return lambda scores, y: F.mse_loss(scores.reshape(y.shape), y.to(scores.dtype))


def _optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    chosen = [p for p in parameters if p.requires_grad]
    if not chosen:
        raise InputError("no parameter requires a gradient, so there is nothing to train")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(chosen, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.l2)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(chosen, lr=recipe.lr, weight_decay=recipe.l2)


def _step_size(recipe: Recipe, step: int, steps: int) -> float:
    return recipe.lr * (0.5 * (1 + math.cos(math.pi * step / steps)) if recipe.schedule == "cosine" else 1.0)


def train(
    model: nn.Module,
    x: Shaped[Tensor, "row ..."],
    y: Shaped[Tensor, "target ..."],
    *,
    recipe: Recipe | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> TrainLog:
    """Train ``model`` in place on rows ``x`` and targets ``y``; with ``patience`` the best epoch's weights are kept.

    penalty: an extra term of the loss, called once a step. on_epoch(epoch, loss) is called after each epoch (progress).
    Raises TrainingCollapsedError when the loss stops being finite.
    """
    recipe = recipe or Recipe()
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"need as many targets as rows and at least one, got {len(x)} rows and {len(y)} targets")
    if recipe.patience is not None and validation is None:
        raise InputError("early stopping (patience) needs validation data")
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = _optimizer(recipe, model.parameters())
    mean_loss = loss_function(recipe.loss)
    per_epoch = math.ceil(len(x) / recipe.batch_size)
    losses: list[float] = []
    checks: list[float] = []
    best, best_state, stale = math.inf, None, 0
    model.train()
    for epoch in range(recipe.epochs):
        total = torch.zeros((), dtype=torch.float64)
        for batch, rows in enumerate(torch.randperm(len(x), generator=order).split(recipe.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = _step_size(recipe, epoch * per_epoch + batch, recipe.epochs * per_epoch)
            loss = mean_loss(model(x[rows]), y[rows])
            full = loss if penalty is None else loss + penalty()
            optimizer.zero_grad(set_to_none=True)
            full.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            total += loss.detach().cpu().double() * len(rows)
        losses.append(float(total) / len(x))
        if not math.isfinite(losses[-1]):
            raise TrainingCollapsedError(
                f"the loss became {losses[-1]} in epoch {epoch + 1}; try a smaller step size than lr={recipe.lr}"
            )
        if validation is not None:
            with torch.no_grad(), evaluation_mode(model):
                checks.append(float(mean_loss(ModelView(model, output="raw")(validation[0]), validation[1])))
            if checks[-1] < best:
                best, stale = checks[-1], 0
                if recipe.patience is not None:
                    best_state = copy.deepcopy(model.state_dict())
            else:
                stale += 1
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
        if recipe.patience is not None and stale > recipe.patience:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return TrainLog(tuple(losses), tuple(checks), len(losses) < recipe.epochs)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, memory: int | None = None) -> float:
    """Share of rows whose largest score is at the right class."""
    return float((ModelView(model, output="logit", memory=memory).predict(x) == y).double().mean())


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Networks of one architecture that were trained together; `scores` runs them all at once."""

    template: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: Float[Tensor, "epoch member"]

    def __len__(self) -> int:
        return self.loss.shape[1]

    def scores(self, x: Tensor) -> Float[Tensor, "member row ..."]:
        """Scores of every member on the same rows, (members, n, classes)."""
        with torch.no_grad(), evaluation_mode(self.template):
            return vmap(lambda p, b: call_with(self.template, p | b, (x,)))(self.parameters, self.buffers)

    def member(self, i: int) -> nn.Module:
        """An ordinary copy of one member."""
        model = copy.deepcopy(self.template)
        model.load_state_dict({k: v[i] for k, v in (self.parameters | self.buffers).items()}, strict=False)
        return model.eval()


def train_ensemble(
    models: Sequence[nn.Module],
    x: Shaped[Tensor, "row ..."],
    y: Shaped[Tensor, "..."],
    *,
    recipe: Recipe | None = None,
    lrs: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> Ensemble:
    """Train many networks of one architecture at once with Adam or SGD, each in its own row order and step size.

    y: targets (n,) shared by all, or (members, n) with one labelling each. lrs, seeds: one per member; the member that
    has the recipe's lr and seed ends where `train` would, to float tolerance. Members must not keep running
    statistics (BatchNorm) and must not draw random numbers in forward.
    """
    recipe = recipe or Recipe()
    if not models:
        raise InputError("an ensemble needs at least one model")
    if recipe.patience is not None or recipe.optimizer == "adamw" or recipe.momentum:
        raise InputError("train_ensemble knows plain adam and sgd without early stopping; use train for the rest")
    members = len(models)
    step_sizes = torch.tensor([recipe.lr] * members if lrs is None else list(lrs))
    orders = [torch.Generator().manual_seed(s) for s in ([recipe.seed] * members if seeds is None else seeds)]
    if len(step_sizes) != members or len(orders) != members:
        raise InputError(f"need one lr and one seed per model: {members} models")
    template = copy.deepcopy(models[0])
    template.train()
    parameters, buffers = stack_module_state(list(models))
    parameters = {k: v.detach().clone() for k, v in parameters.items()}
    mean_loss = loss_function(recipe.loss)
    labels = y if y.ndim > 1 and y.shape[0] == members and y.shape[1:2] == x.shape[:1] else None

    def loss_of(p: dict[str, Tensor], b: dict[str, Tensor], rows: Tensor, target: Tensor) -> Tensor:
        return mean_loss(call_with(template, p | b, (rows,)), target)

    gradient = vmap(grad_and_value(loss_of))
    first = {k: torch.zeros_like(v) for k, v in parameters.items()}
    second = {k: torch.zeros_like(v) for k, v in parameters.items()}
    steps, per_epoch = 0, math.ceil(len(x) / recipe.batch_size)
    history = torch.empty(recipe.epochs, members)
    for epoch in range(recipe.epochs):
        shuffled = torch.stack([torch.randperm(len(x), generator=g) for g in orders])
        total = torch.zeros(members)
        for rows in shuffled.split(recipe.batch_size, dim=1):
            targets = y[rows] if labels is None else labels.gather(1, rows)
            gradients, losses = gradient(parameters, buffers, x[rows], targets)
            decay = _step_size(recipe, steps, recipe.epochs * per_epoch) / recipe.lr
            steps += 1
            for k, p in parameters.items():
                g = gradients[k] + recipe.l2 * p if recipe.l2 else gradients[k]
                rate = (step_sizes * decay).view(-1, *[1] * (p.ndim - 1)).to(p)
                if recipe.optimizer == "sgd":
                    p -= rate * g
                    continue
                first[k].mul_(0.9).add_(g, alpha=0.1)
                second[k].mul_(0.999).addcmul_(g, g, value=0.001)
                p -= rate / (1 - 0.9**steps) * first[k] / ((second[k] / (1 - 0.999**steps)).sqrt() + 1e-8)
            total += losses.detach() * rows.shape[1]
        history[epoch] = total / len(x)
    if not bool(torch.isfinite(history[-1]).all()):
        broken = (~torch.isfinite(history[-1])).nonzero().ravel().tolist()
        raise TrainingCollapsedError(f"the loss of members {broken} is not finite; try smaller step sizes")
    return Ensemble(template.eval(), parameters, dict(buffers), history)
