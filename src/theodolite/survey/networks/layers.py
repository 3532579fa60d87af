"""State space layers inside a network, of whatever kind: found by name, watched, changed for a while, and drawn."""

__all__ = ["Kernel", "changed", "channel_memory", "gallery", "kernels_of", "lengths_read", "memory_bars"]

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from theodolite.core.view import evaluation_mode
from theodolite.networks.diagonal_ssm import DiagonalSSMKernel
from theodolite.networks.hippo import S4Kernel, basis, weight
from theodolite.survey.figures import INKS

Kernel = DiagonalSSMKernel | S4Kernel
_SHOWN = 5
_POINTS = 400
_LATEST = 4.0  # in units of a channel's memory
_LONGEST = 1 << 14


def kernels_of(network: Any) -> dict[str, Kernel]:
    """The state space kernels inside a network by name; none in what is no network."""
    if not isinstance(network, nn.Module):
        return {}
    return {name: module for name, module in network.named_modules() if isinstance(module, Kernel)}


def lengths_read(network: nn.Module, kernels: dict[str, Any], row: Tensor) -> dict[str, int]:
    """How long a kernel each layer asks for on ``row``; a layer that goes step by step asks for none."""
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _, __, kernel: found.update({name: int(kernel.shape[1])})

    hooks = [kernel.register_forward_hook(note(name)) for name, kernel in kernels.items()]
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(row)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def changed(kernels: dict[str, Any], hook: Any) -> Iterator[None]:
    """Every kernel goes through ``hook`` inside the block."""
    handles = [kernel.register_forward_hook(hook) for kernel in kernels.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_memory(kernels: dict[str, Kernel]) -> np.ndarray:
    """1/dt of every channel, in steps of what its layer reads, in the order of ``kernels``."""
    return torch.cat([1 / kernel.dt.detach().double().cpu() for kernel in kernels.values()]).numpy()


def gallery(figure: go.Figure, kernels: dict[str, Kernel], lengths: dict[str, int], row: int) -> None:
    """Kernels of channels from the shortest to the longest memory, over the basis functions that they started from.

    Age is in units of each channel's memory, and each kernel is divided by its largest weight.
    """
    measures = {_measure(kernel) for kernel in kernels.values()}
    if len(measures) == 1 and (measure := measures.pop()) is not None:
        t = np.linspace(0, _LATEST, _POINTS)
        functions = basis(measure, 2 * _SHOWN, t)[:, :_SHOWN] * weight(measure, t)[:, None]
        for n, values in enumerate(functions.T):
            shown = values / max(float(np.abs(values).max()), 1e-300)
            figure.add_scatter(
                x=t.round(4).tolist(), y=shown.round(4).tolist(), mode="lines", name=f"basis function {n}",
                line={"color": "#bbbbbb", "width": 5}, opacity=0.5, showlegend=False, row=row, col=1,
            )  # fmt: skip
    owners = [(name, h) for name, kernel in kernels.items() for h in range(kernel.d_model)]
    order = np.argsort(channel_memory(kernels), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, _SHOWN).round().astype(int))]
    for ink, place in zip(INKS, chosen.tolist(), strict=False):
        name, h = owners[place]
        dt = float(kernels[name].dt[h].detach())
        values = _kernel(kernels[name], h, lengths.get(name), dt)
        kept = np.unique(np.linspace(0, len(values) - 1, _POINTS).astype(int))
        shown = values[kept] / max(float(np.abs(values).max()), 1e-300)
        figure.add_scatter(
            x=((kept + 0.5) * dt).round(4).tolist(), y=shown.round(4).tolist(), mode="lines",
            name=f"{name}, channel {h}: {1 / dt:.0f} steps", line={"color": ink, "width": 1.5}, showlegend=False,
            row=row, col=1,
        )  # fmt: skip
    figure.update_xaxes(title_text="age in units of the channel's memory", range=[0, _LATEST], row=row, col=1)
    figure.update_yaxes(title_text="weight / largest", row=row, col=1)


def memory_bars(figure: go.Figure, memory: np.ndarray, mark: float | None, row: int) -> None:
    """How many channels have which memory, with a line at ``mark`` steps."""
    edges = np.geomspace(memory.min() * 0.999, memory.max() * 1.001, 13)
    counts, _ = np.histogram(memory, edges)
    middles = np.sqrt(edges[1:] * edges[:-1])
    bars = go.Bar(x=middles, y=counts, width=np.diff(edges) * 0.9, marker_color=INKS[5], showlegend=False)
    figure.add_trace(bars, row=row, col=1)
    if mark is not None:
        figure.add_vline(x=mark, line_dash="dot", line_width=1, line_color=INKS[6], row=row, col=1)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(title_text="memory of the network's channels, steps", type="log", row=row, col=1)
    figure.update_yaxes(title_text="channels", row=row, col=1)


def _measure(kernel: Kernel) -> str | None:
    """The basis that a kernel started from, where it has a closed form."""
    if isinstance(kernel, S4Kernel):
        return kernel.measure
    return "legs" if kernel.init == "legs" else None


def _kernel(kernel: Kernel, channel: int, length: int | None, dt: float) -> np.ndarray:
    """The weights of one channel as far as they are shown; of a copy, since an S4 kernel grows with what it is asked for."""
    wanted = int(min(_LATEST / dt + 1, _LONGEST)) if length is None else length
    if isinstance(kernel, S4Kernel) and kernel.l_max is not None:
        wanted = min(wanted, kernel.l_max)
    with torch.no_grad():
        values = copy.deepcopy(kernel)(max(1, wanted))[channel].double().cpu().numpy()
    return values[: max(2, int(_LATEST / dt) + 1)]
