"""How a network is fine-tuned and scored on columns of tensors (token ids and masks, or images), arXiv:2012.13255, section 4."""

__all__ = ["METRICS", "chance_level", "check_fit", "fine_tune", "quality", "read_part", "scores"]

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import f1_score, matthews_corrcoef, r2_score
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.memory import bytes_per_row, chunk_rows
from theodolite.core.view import evaluation_mode, model_input
from theodolite.parameters.finetuning_dimension.subspace import FineTuningSubspace

METRICS = ("accuracy", "f1", "matthews", "r2")
"""What quality can be measured in; all but r2 are of a classification."""

_ROWS = 256

Columns = Mapping[str, Tensor]


def read_part(part: Any, name: str, metric: str) -> dict[str, Tensor]:
    """``part`` with its columns as tensors; DataError unless they are of one length, with usable labels."""
    if metric not in METRICS:
        raise InputError(f"metric is one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(part, Mapping) or "labels" not in part or len(part) < 2:
        given = sorted(part) if isinstance(part, Mapping) else type(part).__name__
        raise DataError(f'{name} must be columns of tensors with "labels" and at least one input, got {given}')
    try:
        part = {column: model_input(None, values) for column, values in part.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"columns of {name} must be tensors or arrays of numbers: {error}") from error
    labels = part["labels"]
    lengths = {column: len(values) for column, values in part.items()}
    if len(set(lengths.values())) > 1 or len(labels) == 0:
        raise DataError(f"all columns of {name} need the same number of rows and at least one, got {lengths}")
    if metric == "r2":
        if not bool(torch.isfinite(labels).all()):
            raise DataError(f"labels of {name} hold NaN or infinite values")
        return part
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(
            f"labels of {name} must be class indices (n,), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise DataError(f"labels of {name} must be class indices from 0, got {int(labels.min())}")
    if name == "train" and len(torch.unique(labels)) < 2:
        raise DataError(f"all training rows are of class {int(labels[0])}; fine-tuning needs at least two classes")
    return part


def check_fit(model: nn.Module, parts: Mapping[str, Columns], metric: str) -> None:
    """Raise before any training where the model cannot take the rows or has no score for a label."""
    for name, part in parts.items():
        two = {column: values[:2] for column, values in part.items()}
        try:
            found = scores(model, two)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            given = {column: tuple(values.shape) for column, values in two.items() if column != "labels"}
            raise ModelError(f"the model cannot take the rows of {name}, {given}: {error}") from error
        width = found.shape[1] if found.ndim > 1 else 1
        if metric == "r2":
            if width != 1:
                raise ModelError(f"a regression needs one score a row, the model gives {width}")
        elif width < 2 or int(part["labels"].max()) >= width:
            raise DataError(
                f"the model gives {width} scores, so labels lie in 0..{width - 1}; {name} has {int(part['labels'].max())}"
            )


def quality(found: Float[Tensor, "row *score"], labels: Tensor, metric: str) -> float:
    """Accuracy, F1 (of class 1, or the mean over more than two classes), Matthews correlation or R2; larger is better."""
    if metric == "r2":
        return float(r2_score(labels.reshape(-1).numpy(), found.reshape(-1).numpy()))
    return _of_answers(found.argmax(dim=1).numpy(), labels.numpy(), metric)


def _of_answers(answers: np.ndarray, labels: np.ndarray, metric: str) -> float:
    if metric == "accuracy":
        return float((answers == labels).mean())
    if metric == "matthews":
        return float(matthews_corrcoef(labels, answers))
    average = "binary" if max(answers.max(), labels.max()) <= 1 else "macro"
    return float(f1_score(labels, answers, average=average, zero_division=0.0))  # type: ignore[arg-type]


def chance_level(labels: Tensor, metric: str) -> float:
    """What the best constant answer reaches: the majority rate for accuracy, 0 for r2.

    >>> round(chance_level(torch.tensor([0, 1, 1]), "accuracy"), 3), chance_level(torch.tensor([0, 1, 1]), "f1")
    (0.667, 0.8)
    """
    if metric == "r2":
        return 0.0
    values = labels.cpu().numpy()
    return max(_of_answers(np.full_like(values, answer), values, metric) for answer in np.unique(values))


@torch.no_grad()
def scores(model: nn.Module, part: Columns, *, memory: int | None = None) -> Float[Tensor, "row *score"]:
    """Scores of every row, on the CPU: batches within a byte budget, eval mode, coordinates merged meanwhile."""
    rows = len(part["labels"])
    with evaluation_mode(model), _merged(model):
        one = bytes_per_row(
            lambda index: _answer(model, part, index), torch.zeros(1, dtype=torch.long), gradients=False
        )
        size = chunk_rows(one, memory, at_most=_ROWS)
        return torch.cat([_answer(model, part, index).float().cpu() for index in torch.arange(rows).split(size)])


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Weights are worked out once and not once a batch."""
    if not isinstance(model, FineTuningSubspace) or model.merged:
        yield
        return
    model.merge_()
    try:
        yield
    finally:
        model.unmerge_()


def fine_tune(
    model: nn.Module,
    train: Columns,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 16,
    warmup: float = 0.06,
    metric: str = "accuracy",
    seed: int = 0,
    what: str = "",
) -> tuple[float, ...]:
    """Train what requires a gradient, in place: AdamW without decay, warm-up, then a cosine to 0; the loss of each epoch.

    The loss is the cross-entropy, for metric "r2" the squared error. Dropout is as in the model, drawn from ``seed``.
    Raises TrainingCollapsedError where the loss is not finite, naming ``what`` and the learning rate.
    """
    if epochs < 1 or batch_size < 1 or not lr > 0 or not 0 <= warmup < 1:
        raise InputError(
            f"need epochs >= 1, batch_size >= 1, lr > 0 and 0 <= warmup < 1; got {epochs}, {batch_size}, {lr}, {warmup}"
        )
    if isinstance(model, FineTuningSubspace) and model.merged:
        raise ModelError("the coordinates are merged into the model and get no gradient; unmerge_() comes first")
    labels = train["labels"]
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not chosen:
        raise ModelError("no parameter requires a gradient, so there is nothing to train")
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(labels) / batch_size)
    step, history = 0, list[float]()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            total = torch.zeros((), dtype=torch.float64)
            for index in torch.randperm(len(labels), generator=order).split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = lr * _share(step, steps, warmup)
                found = _answer(model, train, index)
                target = labels[index].to(found.device)
                if metric == "r2":
                    loss = nn.functional.mse_loss(found.reshape(-1), target.reshape(-1).to(found.dtype))
                else:
                    loss = nn.functional.cross_entropy(found, target.long())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach().cpu().double() * len(index)
                step += 1
            history.append(float(total) / len(labels))
            if not math.isfinite(history[-1]):
                at = f"{what}, " if what else ""
                raise TrainingCollapsedError(
                    f"the loss became {history[-1]} in epoch {len(history)} at {at}lr = {lr}; leave out this learning rate"
                )
    model.eval()
    return tuple(history)


def _share(step: int, steps: int, warmup: float) -> float:
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _answer(model: nn.Module, part: Columns, index: Tensor) -> Tensor:
    """Scores of the rows ``index``; columns of padding that no row needs are cut off at the right."""
    device = next(model.parameters()).device
    batch = {column: values[index] for column, values in part.items() if column != "labels"}
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        used = mask.any(dim=0).nonzero()
        width, full = int(used[-1]) + 1 if len(used) else 1, mask.shape[1]
        batch = {
            column: values[:, :width] if values.ndim > 1 and values.shape[1] == full else values
            for column, values in batch.items()
        }
    batch = {column: model_input(model, values).to(device) for column, values in batch.items()}
    inner = model.model if isinstance(model, FineTuningSubspace) else model
    out = model(**batch) if _by_keyword(inner, batch) else model(*batch.values())
    found = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
    if not isinstance(found, Tensor):
        raise ModelError(f"the model answers {type(out).__name__}; scores must be a tensor or its .logits")
    return found


def _by_keyword(module: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether ``forward`` names the columns; a network of layers takes its one input by place."""
    try:
        inspect.signature(module.forward).bind(**batch)
    except TypeError:
        return False
    return True
