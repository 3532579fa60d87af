"""How faithful an attribution map is: nine metrics on images and tables, each with its direction in one table.

With p the probability of the target, x * m the input with features faded out by a map m in [0, 1]:

    ADP = 100 max(0, p(x) - p(x * m)) / p(x)            PIC = 100 [p(x * m) > p(x)]
    ADD = 100 (p(x) - p(x * (1 - m))) / p(x)
    insertion, deletion: area under p while features are put in, or taken out, the most relevant first
    positive, negative: area under accuracy while the most, or the least, relevant features are taken out
    SIC, AIC: area under min(1, p / p(x)), or accuracy, against the information in a blurred image whose most relevant
    pixels are shown (compressed size; 0 for the blurred image, 1 for the whole), as a monotone envelope

A removed feature becomes ``removed``, in the units of the model's input: for a network that takes normalised images that is
what a black pixel is after normalisation, not 0, which is grey there. A model with one logit is taken as binary.

Source: Chattopadhay et al., 2018, arXiv:1710.11063 (ADP, PIC); Jung and Oh, 2021, arXiv:2102.05228 (ADD); Petsiuk et al., 2018,
arXiv:1806.07421 (insertion, deletion); Chefer et al., 2021, arXiv:2012.09838 (positive, negative); Kapishnikov et al., 2019,
arXiv:1906.02825 (SIC, AIC).
"""

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "adp",
    "add",
    "aic",
    "attribution_scores",
    "blurred",
    "deletion",
    "insertion",
    "metric_name",
    "negative",
    "pic",
    "positive",
    "rows_per_score",
    "sic",
    "target_probabilities",
]

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.core.view import ModelView, as_view, model_input

HIGHER_IS_BETTER: dict[str, bool] = {
    "pic": True,
    "adp": False,
    "add": True,
    "insertion": True,
    "deletion": False,
    "positive": False,
    "negative": True,
    "sic": True,
    "aic": True,
}
"""The direction of every metric: the one place where it stands."""

METRICS: tuple[str, ...] = tuple(HIGHER_IS_BETTER)
_SHORT = {"ins": "insertion", "del": "deletion", "pos": "positive", "neg": "negative"}
_FADING = ("pic", "adp", "add")
_SHOWN = (0.005, 0.01, 0.03, 0.08, 0.10, 0.21, 0.34, 0.5, 0.75)
"""Shares of pixels that SIC and AIC show."""
_STEPS = 10

Removed = float | Tensor | str


def metric_name(name: str) -> str:
    """The name that the table of directions has for ``name``: any case, and INS, DEL, POS, NEG.

    >>> metric_name("INS")
    'insertion'
    """
    known = _SHORT.get(str(name).lower(), str(name).lower())
    if known not in HIGHER_IS_BETTER:
        raise InputError(f"there is no metric called {name!r}; there are: {', '.join(METRICS)}")
    return known


def rows_per_score(metric: str, steps: int = _STEPS) -> int:
    """How many rows the model is asked for one score, p(x) of the input itself not counted."""
    name = metric_name(metric)
    if name in _FADING:
        return 1
    return len(_SHOWN) + 2 if name == "aic" else len(_SHOWN) + 1 if name == "sic" else steps + 1


def attribution_scores(
    metric: str,
    model: Any,
    x: Num[Tensor, "row ..."],
    maps: Float[Tensor, "row ..."],
    target: Any = None,
    *,
    removed: Removed = 0.0,
    steps: int = _STEPS,
    plain: Float[Tensor, " row"] | None = None,
    memory: int | None = None,
) -> Float[Tensor, " row"]:
    """Score (n,) of each row's map by ``metric``, float64; `HIGHER_IS_BETTER` tells the direction.

    x: images (n, channels, height, width) with maps (n, height, width), or tables (n, features) with maps of that shape;
    whole numbers are taken as real ones, since features fade. target: the class by its position, one or one a row, or by its
    name where an estimator has names; None: the predicted one.
    removed: what a removed feature becomes: a number, a tensor that broadcasts to ``x``, or "blur" (the image, blurred);
    SIC and AIC always start from the blurred image. steps: how many equal groups of features go one after the other.
    plain: p(x) of the target where it is known already, as `target_probabilities` gives both. Fading metrics (PIC, ADP, ADD)
    need maps in [0, 1]; the others only rank, equal values by position.

    >>> share = lambda x: x.mean(dim=1, keepdim=True)
    >>> attribution_scores("deletion", share, torch.ones(1, 4), torch.rand(1, 4), 0, steps=4)
    tensor([0.5000], dtype=torch.float64)
    """
    name = metric_name(metric)
    view = as_view(model, memory=memory)
    x = x if x.is_floating_point() else model_input(view.model, x.to(torch.get_default_dtype()))
    _check(name, x, maps, steps)
    columns = _Columns(view, memory)
    known = plain is not None and isinstance(target, Tensor) and target.shape == x.shape[:1]
    chosen = target if known else columns.targets(x, target)
    assert isinstance(chosen, Tensor)
    if plain is None:
        plain = columns.at(x, chosen)[0]
    if name in _FADING:
        kept = 1 - maps if name == "add" else maps
        p = columns.at(_mixed(x, _empty(x, removed), _as_features(kept, x)), chosen)[0]
        if name == "pic":
            return 100.0 * (p > plain).double()
        drop = 100.0 * (plain - p) / plain.clamp_min(1e-300)
        return drop.clamp_min(0) if name == "adp" else drop
    if name in ("sic", "aic"):
        return _information_curve(columns, x, maps, chosen, plain, accuracy=name == "aic")
    empty = _empty(x, removed)
    rank = _ranks(maps, most_first=name != "negative")
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
    p, right = columns.curve(x, empty, rank, shares, chosen, shown=name == "insertion")
    return torch.trapezoid(right if name in ("positive", "negative") else p, shares, dim=1)


def target_probabilities(
    model: Any,
    x: Float[Tensor, "row ..."],
    target: Any = None,
    *,
    memory: int | None = None,
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """The class of each row (None: its predicted one; of one logit 0 or 1) and its probability, both (n,)."""
    columns = _Columns(as_view(model, memory=memory), memory)
    chosen = columns.targets(x, target)
    return chosen, columns.at(x, chosen)[0]


# ---- the model


@dataclass(frozen=True, eq=False)
class _Columns:
    """A model as a table of class probabilities; one logit of a module makes two columns."""

    view: ModelView
    memory: int | None

    def __call__(self, x: Tensor) -> Float[Tensor, "row column"]:
        p = self.view(x).double()
        binary = p.shape[1] == 1 and self.view.is_module and self.view.output == "probability"
        return torch.cat([1 - p, p], dim=1) if binary else p

    def targets(self, x: Tensor, target: Any) -> Int[Tensor, " row"]:
        names = None if target is None or isinstance(target, Tensor) else np.asarray(target)
        if names is not None and names.dtype.kind in "OSU":
            place = {str(name): i for i, name in enumerate(getattr(self.view.model, "classes_", ()))}
            unknown = sorted({str(name) for name in names.ravel()} - set(place))
            if unknown:
                raise InputError(
                    f"target names {', '.join(unknown[:5])}; the model's classes are {', '.join(place) or 'not named'}"
                )
            names = np.array([place[str(name)] for name in names.ravel()]).reshape(names.shape)
        if names is not None:
            target = torch.as_tensor(names) if names.ndim else names.item()
        return self.view.targets(x, target, self(x))

    def at(self, x: Tensor, target: Int[Tensor, " row"]) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """Probability of the target, and whether it is the answer."""
        p = self(x)
        return p.gather(1, target[:, None])[:, 0], p.argmax(dim=1) == target

    def curve(
        self,
        x: Tensor,
        empty: Tensor,
        rank: Int[Tensor, "row feature"],
        shares: Float[Tensor, " step"],
        target: Tensor,
        *,
        shown: bool,
    ) -> tuple[Float[Tensor, "row step"], Float[Tensor, "row step"]]:
        """p and accuracy with the first ``shares`` of the ranked features ``shown`` (or taken out), within the budget."""
        n, steps = len(x), len(shares)
        counts = (shares * rank.shape[1]).round().long()
        p = torch.empty(n * steps, dtype=torch.float64, device=x.device)
        right = torch.empty_like(p)
        for part in chunks(n * steps, 4.0 * x[0].numel() * x.element_size(), self.memory):
            index = torch.arange(part.start, part.stop, device=x.device)
            row, step = index // steps, index % steps
            first = rank[row] < counts[step][:, None]
            kept = (first if shown else ~first).to(x.dtype).reshape(len(index), *_plane(x))
            p[part], ok = self.at(_mixed(x[row], empty[row], _as_features(kept, x)), target[row])
            right[part] = ok.double()
        return p.reshape(n, steps), right.reshape(n, steps)


# ---- inputs with features taken out


def _plane(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[2:]) if x.ndim == 4 else tuple(x.shape[1:])


def _as_features(maps: Tensor, x: Tensor) -> Tensor:
    return maps[:, None] if x.ndim == 4 else maps


def _mixed(x: Tensor, empty: Tensor, kept: Tensor) -> Tensor:
    kept = kept.to(x.dtype)
    return x * kept + empty * (1 - kept)


def _empty(x: Tensor, removed: Removed) -> Tensor:
    if isinstance(removed, str):
        if removed != "blur":
            raise InputError(f"removed must be a number, a tensor or 'blur', got {removed!r}")
        return blurred(x)
    value = torch.as_tensor(removed, dtype=x.dtype, device=x.device)
    if not bool(torch.isfinite(value).all()):
        raise InputError("removed must be finite")
    try:
        return value.expand(x.shape)
    except RuntimeError as error:
        raise InputError(
            f"removed has shape {tuple(value.shape)}, which does not fit inputs {tuple(x.shape)}"
        ) from error


def blurred(x: Float[Tensor, "row ..."], sigma: float | None = None) -> Float[Tensor, "row ..."]:
    """Images under a Gaussian of ``sigma`` pixels (default: a tenth of the shorter side), which ends at the border."""
    if x.ndim != 4:
        raise InputError(f"only images (n, channels, height, width) can be blurred, got {tuple(x.shape)}")
    sigma = max(1.0, min(x.shape[2:]) / 10) if sigma is None else sigma

    def kernel(size: int) -> Tensor:
        place = torch.arange(size, dtype=x.dtype, device=x.device)
        return torch.softmax(-0.5 * ((place[:, None] - place) / sigma).square(), dim=1)

    return kernel(x.shape[2]) @ x @ kernel(x.shape[3]).T


def _ranks(maps: Tensor, *, most_first: bool) -> Int[Tensor, "row feature"]:
    return maps.flatten(1).argsort(dim=1, descending=most_first, stable=True).argsort(dim=1)


def _information_curve(
    columns: _Columns, x: Tensor, maps: Tensor, target: Tensor, plain: Tensor, *, accuracy: bool
) -> Float[Tensor, " row"]:
    if x.ndim != 4:
        raise InputError("SIC and AIC measure the information in an image; these inputs are no images")
    empty, rank = blurred(x), _ranks(maps, most_first=True)
    shares = torch.tensor([0.0, *_SHOWN], dtype=torch.float64, device=x.device)
    p, right = columns.curve(x, empty, rank, shares, target, shown=True)
    whole = columns.at(x, target)[1].double() if accuracy else torch.ones_like(plain)
    quality = right if accuracy else (p / plain.clamp_min(1e-300)[:, None]).clamp_max(1)
    counts = (shares * rank.shape[1]).round().long().tolist()
    out = []
    for i in range(len(x)):
        low, high = x[i].min(), x[i].max()
        sizes = []
        for count in (*counts, rank.shape[1]):
            shown = (rank[i] < count).reshape(_plane(x))
            sizes.append(_compressed_size(torch.where(shown, x[i], empty[i]), low, high))
        share = np.array([0.0, *shares[1:].tolist(), 1.0])
        span = sizes[-1] - sizes[0]
        # where the whole image takes no more bytes than the blurred one, the share of pixels stands in for information
        information = np.clip((np.array(sizes) - sizes[0]) / span, 0, 1) if span > 0 else share
        order = np.argsort(information, kind="stable")
        y = np.array([*quality[i].tolist(), float(whole[i])])[order]
        out.append(float(np.trapezoid(np.maximum.accumulate(y), information[order])))
    return torch.tensor(out, dtype=torch.float64, device=x.device)


def _compressed_size(image: Tensor, low: Tensor, high: Tensor) -> int:
    """Bytes of the image in 256 levels, as differences between neighbours, after DEFLATE: what a PNG file does."""
    levels = ((image - low) / (high - low).clamp_min(1e-30) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return len(zlib.compress(np.diff(levels, axis=2, prepend=np.uint8(0)).tobytes(), 6))


def _check(name: str, x: Tensor, maps: Tensor, steps: int) -> None:
    if x.ndim not in (2, 4) or len(x) == 0:
        raise InputError(f"x must be (n, channels, height, width) or (n, features) with n >= 1, got {tuple(x.shape)}")
    if tuple(maps.shape) != (len(x), *_plane(x)):
        raise InputError(f"maps must be {(len(x), *_plane(x))} for inputs {tuple(x.shape)}, got {tuple(maps.shape)}")
    if not bool(torch.isfinite(maps).all()):
        raise InputError("a map holds NaN or infinite values")
    if name in _FADING and (float(maps.min()) < 0 or float(maps.max()) > 1):
        raise InputError(
            f"{name} fades features by a map in [0, 1]; this one lies in [{maps.min():.3g}, {maps.max():.3g}]"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")


# ---- one function a metric


def _mean(metric: str, model: Any, x: Any, map: Any, target: Any, options: dict[str, Any]) -> float:
    x, maps = model_input(model.model if isinstance(model, ModelView) else model, x), torch.as_tensor(map)
    if x.ndim == 3 and maps.shape[:1] == (1,):
        maps = maps.reshape(maps.shape[-2:])
    if (x.ndim, maps.ndim) in ((1, 1), (3, 2)):
        x, maps = x[None], maps[None]
    elif (x.ndim, maps.ndim) in ((2, 1), (4, 2)):
        maps = maps.expand(len(x), *maps.shape)
    return float(attribution_scores(metric, model, x, maps.to(x.device), target, **options).mean())


def adp(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Average drop in %: how much of p is lost when only the map's part is kept; lower is better.

    One input (channels, height, width) or (features,) with its map, or a batch, of which the mean is given; options as in
    `attribution_scores`, here and in the other metrics.

    >>> adp(lambda x: x.mean(dim=1, keepdim=True), torch.ones(4), torch.tensor([1.0, 1.0, 0.5, 0.5]), 0)
    25.0
    """
    return _mean("adp", model, x, map, target, options)


def pic(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Percentage of inputs whose p rises when only the map's part is kept; higher is better."""
    return _mean("pic", model, x, map, target, options)


def add(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Average drop in % when the map's part is taken out; negative where p rises; higher is better."""
    return _mean("add", model, x, map, target, options)


def insertion(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under p while features are put in, the most relevant first; higher is better."""
    return _mean("insertion", model, x, map, target, options)


def deletion(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under p while features are taken out, the most relevant first; lower is better."""
    return _mean("deletion", model, x, map, target, options)


def positive(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under accuracy while features are taken out, the most relevant first; lower is better."""
    return _mean("positive", model, x, map, target, options)


def negative(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under accuracy while features are taken out, the least relevant first; higher is better."""
    return _mean("negative", model, x, map, target, options)


def sic(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under min(1, p / p(x)) against the information shown; images only; higher is better."""
    return _mean("sic", model, x, map, target, options)


def aic(model: Any, x: Any, map: Any, target: Any = None, **options: Any) -> float:
    """Area under accuracy against the information shown; images only; higher is better."""
    return _mean("aic", model, x, map, target, options)
