"""The point between two activations at which a function is linearised."""

__all__ = ["At", "point_on_segment"]

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

At = Literal["boundary", "positive", "negative", "mean"]
_GRID, _STEPS = (
    33,
    5,
)  # a batch of points costs a network little more than one, so the segment is cut by 16 to 32 a step


def point_on_segment(
    value: Callable[[Float[Tensor, "row width"]], Float[Tensor, " row"]],
    negative: Float[Tensor, " width"],
    positive: Float[Tensor, " width"],
    at: At,
) -> tuple[Float[Tensor, " width"], bool]:
    """The point, and whether the value crosses zero there (True where that was not asked).

    "boundary": among the places on the segment where ``value`` changes its sign the one nearest to the middle; where it keeps
    its sign, the place where its square is least. Found on ever finer grids.

    >>> point, crossed = point_on_segment(lambda x: x[:, 0] - 1, torch.zeros(1), torch.full((1,), 4.0), "boundary")
    >>> round(float(point), 4), crossed
    (1.0, True)
    """
    if at != "boundary":
        return {"positive": positive, "negative": negative, "mean": (positive + negative) / 2}[at], True

    def on(t: Tensor) -> Tensor:
        with torch.no_grad():
            return value(negative + t[:, None] * (positive - negative))

    low, high, crossed = 0.0, 1.0, True
    for step in range(_STEPS):
        grid = torch.linspace(low, high, _GRID, device=positive.device)
        values = on(grid)
        signs = (values[:-1] * values[1:] <= 0).nonzero()[:, 0]
        if step == 0:
            crossed = len(signs) > 0
        if crossed and len(signs):
            left = int(signs[((grid[signs] + grid[signs + 1]) / 2 - 0.5).abs().argmin()])
            low, high = float(grid[left]), float(grid[left + 1])
        else:
            best = int(values.square().argmin())
            low, high = float(grid[max(0, best - 1)]), float(grid[min(_GRID - 1, best + 1)])
    return negative + (low + high) / 2 * (positive - negative), crossed
