"""Maps of a network's answer by integrating gradients along the way from a baseline, all points of a path in one batch."""

__all__ = ["COMBINE", "ConstantMapWarning", "grad_cam", "path_attributions", "path_map"]

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.core.view import model_input
from theodolite.explanations.baseline_bandit.baselines import scaled
from theodolite.explanations.baseline_bandit.split import SplitModel

COMBINE = ("relu-product", "integrated", "product")


class ConstantMapWarning(UserWarning):
    """A map is the same everywhere, so that it ranks nothing; it is given as zeros."""


def path_attributions(
    split: SplitModel,
    a: Float[Tensor, "row ..."],
    target: Int[Tensor, " row"] | int,
    baseline: Float[Tensor, "..."],
    n_steps: int = 10,
    combine: str = "relu-product",
    *,
    output: str = "logit",
    rule: str = "right",
    memory: int | None = None,
) -> Float[Tensor, "row ..."]:
    """Mean over the path of what each number of the activations ``a`` contributes, of the shape of ``a``, not scaled.

        v_j = b + t_j (a - b),  t_j = j/n (rule "right") or (j - 1/2)/n ("midpoint"),  g_j = ds/dv_j
        "relu-product": relu(g_j) relu(v_j);  "product": g_j v_j;  "integrated": g_j (a - b), which sums to s(a) - s(b)

    s is the target's logit or, with output="probability", its probability. Where the part above the split is linear in
    its activations the logit's gradient is the same along the whole path: take the probability or an earlier layer. A model
    with one logit counts as binary. n_steps rows an input go through the upper part, in chunks that fit ``memory``.
    """
    if combine not in COMBINE or output not in ("logit", "probability") or rule not in ("right", "midpoint"):
        raise InputError(
            f"combine is one of {', '.join(COMBINE)}, output logit or probability, rule right or midpoint; got {combine!r}, "
            f"{output!r}, {rule!r}"
        )
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise InputError(f"n_steps must be a whole number of at least 1, got {n_steps!r}")
    try:
        b = baseline.to(a).expand(a.shape)
    except RuntimeError as error:
        raise InputError(f"the baseline is {tuple(baseline.shape)}, the activations {tuple(a.shape)}") from error
    index = torch.as_tensor(target, device=a.device).expand(len(a))
    total = torch.zeros_like(a)
    shift = 0.0 if rule == "midpoint" else 0.5
    lead = (-1,) + (1,) * (a.ndim - 1)
    for part in chunks(len(a) * n_steps, split.row_bytes(a) + 4.0 * a[0].numel() * a.element_size(), memory):
        flat = torch.arange(part.start, part.stop, device=a.device)
        row, t = flat // n_steps, ((flat % n_steps + 0.5 + shift) / n_steps).to(a).reshape(lead)
        # (1 - t) b + t a is a itself at t = 1, to the last digit
        v = ((1 - t) * b[row] + t * a[row]).detach().requires_grad_()
        with torch.enable_grad():
            score = target_score(split.upper(v), index[row], output)
            (g,) = torch.autograd.grad(score.sum(), v, allow_unused=True)
        g = torch.zeros_like(v) if g is None else g
        v = v.detach()
        if combine == "integrated":
            found = g * (a[row] - b[row])
        else:
            found = g * v if combine == "product" else g.relu() * v.relu()
        total.index_add_(0, row, found / n_steps)
    return total


def target_score(scores: Tensor, target: Tensor, output: str) -> Float[Tensor, " row"]:
    """Logit or probability of each row's target; one column is the logit of class 1 against class 0."""
    scores = scores[:, None] if scores.ndim == 1 else scores
    columns = scores.shape[1]
    if bool((target < 0).any()) or bool((target >= max(2, columns)).any()):
        raise InputError(f"target must be 0..{max(2, columns) - 1}, got {target.tolist()[:5]}")
    if columns == 1:
        signed = torch.where(target == 1, scores[:, 0], -scores[:, 0])
        return signed if output == "logit" else torch.sigmoid(signed)
    picked = scores if output == "logit" else torch.softmax(scores, dim=1)
    return picked.gather(1, target[:, None])[:, 0]


def raw_maps(split: SplitModel, attributions: Tensor, size: tuple[int, ...] | None) -> Float[Tensor, "row ..."]:
    """Sum over channels, enlarged to ``size``; the class token has no place in a map."""
    values = split.grid(attributions).values
    if values.ndim == 2:
        return values
    summed = values.sum(dim=1, keepdim=True)
    if size is not None and tuple(size) != tuple(summed.shape[2:]):
        summed = functional.interpolate(summed, size=tuple(size), mode="bicubic", align_corners=False)
    return summed[:, 0]


def path_map(
    split: SplitModel,
    x: Any,
    target: Int[Tensor, " row"] | int,
    baseline: Any,
    n_steps: int = 10,
    combine: str = "relu-product",
    size: tuple[int, int] | None = None,
    *,
    output: str = "logit",
    memory: int | None = None,
) -> Float[Tensor, "row ..."]:
    """Maps (n, H, W) in [0, 1] of inputs ``x``, of the size of the images or ``size``; of tables (n, features).

    baseline: of the shape of the layer's activations, one or one a row. Warns with ConstantMapWarning where a map has no
    differences (zeros are given); raises InputError where a gradient is not finite. Options as in `path_attributions`.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3))
    >>> split = SplitModel(net, "1")
    >>> path_map(split, torch.rand(5, 1, 6, 6), 0, torch.zeros(2, 4, 4)).shape
    torch.Size([5, 6, 6])
    """
    x = model_input(split.model, x)
    a = split.lower_all(x, memory=memory)
    found = path_attributions(
        split, a, target, torch.as_tensor(baseline), n_steps, combine, output=output, memory=memory
    )
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            f"the gradient at {split.layer!r} is NaN or infinite; check the input and the network's weights"
        )
    return _told(scaled(raw_maps(split, found, size or _size(x))))


def _size(x: Tensor) -> tuple[int, ...] | None:
    return tuple(x.shape[2:]) if x.ndim == 4 else None


def _told(maps: Tensor) -> Tensor:
    constant = int((maps.flatten(1).amax(dim=1) == 0).sum())
    if constant:
        warnings.warn(
            f"{constant} of {len(maps)} maps are constant and given as zeros", ConstantMapWarning, stacklevel=3
        )
    return maps


def grad_cam(
    split: SplitModel,
    x: Float[Tensor, "row ..."],
    target: Int[Tensor, " row"] | int,
    size: tuple[int, int] | None = None,
    *,
    memory: int | None = None,
) -> Float[Tensor, "row ..."]:
    """Grad-CAM at the split: relu of the channels weighted by their mean gradient; (n, H, W) in [0, 1].

    Source: Selvaraju et al., 2017, arXiv:1610.02391.
    """
    a = split.lower_all(x, memory=memory)
    index = torch.as_tensor(target, device=a.device).expand(len(a))
    cams = []
    for rows in chunks(len(a), split.row_bytes(a), memory):
        v = a[rows].detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(target_score(split.upper(v), index[rows], "logit").sum(), v)
        weights = split.grid(g).values.mean(dim=(2, 3), keepdim=True)
        cams.append((weights * split.grid(v.detach()).values).sum(dim=1, keepdim=True).relu())
    cam = torch.cat(cams)
    whole = size or _size(x)
    if whole is not None:
        cam = functional.interpolate(cam, size=whole, mode="bicubic", align_corners=False)
    return _told(scaled(cam[:, 0]))
