"""A network whose weights are all read from one shared array, and its training."""

__all__ = ["SharedModel", "check_optimizer", "share_parameters"]

import copy
import hashlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from theodolite.core.errors import InputError, ModelError
from theodolite.parameters.sharing.embedding import SharedEmbedding
from theodolite.parameters.sharing.gradients import gradient_weights, scale_gradient
from theodolite.parameters.sharing.maps import MAPPERS, FoldMap, HashedMap, JoinedMap, RoastMap, SlotMap, stream_key
from theodolite.parameters.weights import WeightTensor, weight_tensors

_SCOPES, _INITS, _OPTIMIZERS = ("global", "local"), ("normal", "model"), ("sgd", "adam")


@dataclass(frozen=True)
class _Layer:
    """A compressed tensor at the positions lo..hi-1.

    names: of a tied one all. dtype: None where it is that of the array. by_rows: an embedding, read row by row.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype | None
    lo: int
    hi: int
    scale: float
    by_rows: bool

    @property
    def piece(self) -> tuple[int, int, float]:
        """As `gradient_weights` takes it."""
        return self.lo, self.hi, self.scale


class _Read(torch.autograd.Function):
    """psi -> lambda_l(i) g_i psi[h(i)] of neighbouring layers, a tensor for each; signs: g, drawn once for both directions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(psi: Tensor, map_: SlotMap, layers: Sequence[_Layer], signs: Tensor) -> tuple[Tensor, ...]:
        flat = map_.read(psi, layers[0].lo, layers[-1].hi, signs)
        pieces = flat.split([layer.hi - layer.lo for layer in layers], dim=-1)
        return tuple(piece.mul_(layer.scale).view(layer.shape) for layer, piece in zip(layers, pieces, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.map, ctx.layers, ctx.signs = inputs

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return _Collect.apply(ctx.map, ctx.layers, ctx.signs, *grad), None, None, None


class _Collect(torch.autograd.Function):
    """The adjoint of `_Read`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(map_: SlotMap, layers: Sequence[_Layer], signs: Tensor, *grads: Tensor) -> Tensor:
        # under vmap the gradient of some layers may have a batch and that of others none
        out = torch.cat([grad.flatten()[:1] for grad in grads]).new_zeros(map_.m)
        parts = signs.split([layer.hi - layer.lo for layer in layers])
        for layer, grad, part in zip(layers, grads, parts, strict=True):
            map_.add_into(out, grad.flatten(), layer.lo, layer.hi, part, layer.scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.map, ctx.layers, ctx.signs = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return None, None, None, *_Read.apply(grad[0], ctx.map, ctx.layers, ctx.signs)


class SharedModel(nn.Module):
    """A network with one small trainable array in place of its weights; made by `share_parameters`.

    array: nn.Parameter (m,), all that is stored of the compressed weights (under ``optimizer="adam"`` in units of each
    slot's step). Biases, norms and what was left out stay dense, in ``module``. forward takes what the module takes.
    The state dict holds the array, the dense leftovers and a record of map and scales: no indices.

    >>> net = share_parameters(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2)), compression=10)
    >>> net.stored_parameters, net.original_parameters, net(torch.ones(4, 20)).shape
    (66, 660, torch.Size([4, 2]))
    """

    gradient_weight: Tensor
    step_size: Tensor

    def __init__(
        self, module: nn.Module, map_: SlotMap, layers: Sequence[_Layer], psi: Tensor, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module, self.map, self.options = module, map_, dict(options)
        self.array = nn.Parameter(psi)
        self.register_buffer("gradient_weight", torch.ones_like(psi), persistent=False)
        adam = self.options["optimizer"] == "adam"
        self.register_buffer("step_size", torch.ones_like(psi if adam else psi[:1]), persistent=False)
        self._set_layers(layers)
        with torch.no_grad():
            self.array.div_(self.step_size)

    def _set_layers(self, layers: Sequence[_Layer]) -> None:
        """Everything that follows from the layers and their scales."""
        self._layers = list(layers)
        adam = self.options["optimizer"] == "adam"
        kind = "none" if adam else self.options["gradient_scale"]
        weight, step = gradient_weights(self.map, [layer.piece for layer in layers], kind)
        self.gradient_weight.copy_(weight)
        if adam:
            self.step_size.copy_(step)
        # neighbours are read in one go, embeddings by themselves
        groups = itertools.groupby(layers, key=lambda layer: layer.names if layer.by_rows else None)
        self._runs = [list(group) for _, group in groups]
        for layer in layers:
            if layer.by_rows:
                self.module.get_submodule(_holder(layer.names[0])).scale = layer.scale  # type: ignore[assignment]

    @property
    def scales(self) -> dict[str, float]:
        """lambda of every compressed tensor."""
        return {layer.names[0]: layer.scale for layer in self._layers}

    @property
    def load(self) -> Int[Tensor, " slot"]:
        """How many weights read each slot, (m,)."""
        return self.map.load()

    @property
    def stored_parameters(self) -> int:
        """m."""
        return self.map.m

    @property
    def original_parameters(self) -> int:
        """n: the compressed weights of the network, tied ones once."""
        return self.map.n

    @property
    def compression(self) -> float:
        """n / m."""
        return self.map.n / self.map.m

    @property
    def dense_parameters(self) -> int:
        """Numbers that are stored as they are: biases, norms, whatever was left out."""
        return sum(p.numel() for p in self.module.parameters())

    def psi(self) -> Float[Tensor, " slot"]:
        """The numbers that the weights read; their gradient is rescaled on its way back."""
        if self.options["optimizer"] == "adam":
            return self.array * self.step_size
        return scale_gradient(self.array, self.gradient_weight)

    def weight(self, name: str) -> Tensor:
        """One compressed tensor as it is now, by any of its names, in the shape of the original."""
        for layer in self._layers:
            if name in layer.names:
                return self._read([layer])[0]
        raise InputError(f"{name!r} is not compressed; these are: {', '.join(self.scales)}")

    def _read(self, run: list[_Layer], psi: Tensor | None = None) -> list[Tensor]:
        """The weights of neighbouring layers."""
        signs = self.map.signs(run[0].lo, run[-1].hi)
        found = _Read.apply(self.psi() if psi is None else psi, self.map, run, signs)
        return [one if layer.dtype is None else one.to(layer.dtype) for layer, one in zip(run, found, strict=True)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with its weights read from the array."""
        with self._in_place():
            return self.module(*args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside the block the weights stand where the module looks for them, as tensors that autograd follows."""
        psi, put = self.psi(), list[tuple[nn.Module, str]]()
        try:
            for run in self._runs:
                values = [psi] if run[0].by_rows else self._read(run, psi)
                for layer, value in zip(run, values, strict=True):
                    for name in layer.names:
                        owner = self.module.get_submodule(_holder(name))
                        attribute = "array" if layer.by_rows else _attribute(name)
                        owner.__dict__[attribute] = value
                        put.append((owner, attribute))
            yield
        finally:
            for owner, attribute in put:
                del owner.__dict__[attribute]

    def materialize(self) -> nn.Module:
        """An ordinary network with the weights written out: of the original's size, and no longer shared."""
        plain = copy.deepcopy(self.module)
        for layer in self._layers:
            with torch.no_grad():
                weight = nn.Parameter(self.weight(layer.names[0]).clone())
            if layer.by_rows:
                holder = _holder(layer.names[0])
                table = plain.get_submodule(holder)
                dense = nn.Embedding(*layer.shape, padding_idx=table.padding_idx, _weight=weight)  # type: ignore[arg-type]
                with torch.no_grad():
                    dense.weight[[] if dense.padding_idx is None else [dense.padding_idx]] = 0
                plain = _replaced(plain, holder, dense.train(table.training))
                continue
            for name in layer.names:
                plain.get_submodule(_holder(name))._parameters[_attribute(name)] = weight
        return plain

    def quantized_array(self) -> tuple[Tensor, float]:
        """The array as int8 and the factor that brings it back, to within half the factor; for storage after training.

        >>> net = share_parameters(nn.Linear(20, 30), compression=10)
        >>> whole, factor = net.quantized_array()
        >>> bool((whole * factor - net.array).abs().max() <= 0.51 * factor)
        True
        """
        values = self.array.detach()
        factor = float(values.abs().max()) / 127 or 1.0
        return (values / factor).round().to(torch.int8), factor

    def get_extra_state(self) -> Tensor:
        """Which map this is, and the scales: the array means nothing without them."""
        scales = torch.tensor([layer.scale for layer in self._layers], dtype=torch.float64)
        return torch.cat([torch.tensor(self._record()), scales.view(torch.int64)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the scales of a state, which `load_state_dict` has checked."""
        scales = state[len(self._record()) :].cpu().view(torch.float64).tolist()
        self._set_layers([replace(layer, scale=scale) for layer, scale in zip(self._layers, scales, strict=True)])

    def _record(self) -> list[int]:
        about = self.options
        names = "\0".join(f"{layer.names} {tuple(layer.shape)}" for layer in self._layers)
        digest = int.from_bytes(hashlib.sha256(names.encode()).digest()[:7], "big")
        kinds = (_SCOPES.index(about["scope"]), _OPTIMIZERS.index(about["optimizer"]))
        seed = (about["seed"] + (1 << 63)) % (1 << 64) - (1 << 63)  # all that the maps take of it, as an int64
        return [seed, MAPPERS.index(about["mapper"]), *about["block"], *kinds, self.map.n, self.map.m, digest]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the state of another map or network before anything is changed."""
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            labels = ("seed", "mapper", "block", "block", "scope", "optimizer", "weights", "slots", "architecture")
            given, wanted = state.tolist()[: len(labels)], self._record()
            wrong = [label for label, a, b in zip(labels, given, wanted, strict=True) if a != b]
            if wrong:
                raise ModelError(
                    f"this state was saved with another {' and '.join(dict.fromkeys(wrong))} (saved {given}, here {wanted});"
                    " share the same network with the same seed, mapper, scope, block and budget"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _holder(name: str) -> str:
    return name.rpartition(".")[0]


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]


def _replaced(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """The root with its submodule ``name`` exchanged, wherever else that one stands too."""
    old = root.get_submodule(name)
    if old is root:
        return new
    for parent in list(root.modules()):
        for child, module in parent._modules.items():  # named_children() leaves out what it has met already
            if module is old:
                parent._modules[child] = new
    return root


def share_parameters(
    model: nn.Module,
    *,
    compression: float | None = None,
    budget: int | None = None,
    mapper: str = "fold",
    scope: str = "global",
    gradient_scale: str = "v1",
    init: str = "normal",
    sigma: float = 0.05,
    min_size: int = 0,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    block: tuple[int, int] = (32, 32),
    seed: int = 0,
    optimizer: str = "sgd",
    scales: Mapping[str, float] | None = None,
) -> SharedModel:
    """A copy of ``model`` that stores m numbers in place of the n weights of its Linear, Conv and Embedding layers.

        W_i = lambda_l(i) g_i psi[h(i)],   lambda_l = (std of layer l as it is in ``model``) / sigma

    compression: n / m; or budget: m. mapper: h, "fold", "hashed" or "roast" (`theodolite.parameters.sharing.maps`). scope:
    "global" for one array, "local" for a part of it for each tensor. gradient_scale: what the gradient of a slot is divided
    by; the default v1 moves each weight by the average gradient of its slot, whatever sigma is; "none" is the true gradient.
    init: "normal" draws psi with root mean square sigma; "model" fits psi to the weights of ``model`` (exact at m = n).
    include, exclude, min_size: which tensors, as in `theodolite.parameters.weights`; frozen ones and all others stay dense.
    block: tile of "roast". optimizer: what will train it. "sgd" (momentum and weight decay welcome) is the paper's; under
    Adam the division has no effect, so "adam" gives each slot its own step sqrt(k) / sum(lambda), an extension made here.
    scales: by tensor name, the standard deviation its weights shall have, in place of the one they have in ``model``.

    Memory falls, work does not: the weights are written out for every forward pass, except those of an nn.Embedding (not
    tied), of which only the rows asked for are made. Activation checkpointing goes around the whole SharedModel: inside it
    the weights are gone when a part is run again. The step size that is best grows with compression: try 0.05 to 1.

    Raises InputError for a compression below 1, a budget outside 1..n or below one tile, unknown options or scales;
    ModelError where no weight is left, a layer has std 0, or weights cannot be compressed (lazy, meta, complex, max_norm).
    """
    for name, value, known in (
        ("mapper", mapper, MAPPERS), ("scope", scope, _SCOPES), ("init", init, _INITS), ("optimizer", optimizer, _OPTIMIZERS),
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"{name} is one of {', '.join(known)}, got {value!r}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma must be above 0, got {sigma}")
    found = _compressible(model, include, exclude, min_size)
    unknown = set(scales or {}) - {weight.name for weight in found}
    if unknown:
        raise InputError(
            f"scales names {', '.join(sorted(unknown))}; what is shared is {', '.join(weight.name for weight in found)}"
        )
    n = sum(weight.parameter.numel() for weight in found)
    m = _slots(n, compression, budget)
    module = copy.deepcopy(model)
    first = found[0].parameter
    device = first.device
    precise = torch.float64 if any(w.parameter.dtype == torch.float64 for w in found) else torch.float32
    map_ = _make_map(mapper, scope, [weight.shape for weight in found], m, block, seed).to(device)
    layers, lo = [], 0
    for weight in found:
        hi = lo + weight.parameter.numel()
        by_rows = type(weight.module) is nn.Embedding and not weight.tied
        scale = _std(weight, scales) / sigma
        names = (weight.name, *weight.tied)
        dtype = None if weight.parameter.dtype == precise else weight.parameter.dtype
        layers.append(_Layer(names, weight.parameter.shape, dtype, lo, hi, scale, by_rows))
        if by_rows:
            padding = weight.module.padding_idx
            table = SharedEmbedding(*weight.shape, None, map=map_, offset=lo, scale=scale, padding_idx=padding)  # type: ignore
            module = _replaced(module, _holder(weight.name), table.train(weight.module.training))
        else:
            for name in names:
                module.get_submodule(_holder(name))._parameters[_attribute(name)] = None
        lo = hi
    psi = _start(map_, layers, found, sigma, seed) if init == "model" else _normal(m, sigma, seed)
    options = {
        "mapper": mapper, "scope": scope, "gradient_scale": gradient_scale, "block": tuple(block), "seed": int(seed),
        "optimizer": optimizer,
    }  # fmt: skip
    return SharedModel(module, map_, layers, psi.to(device, precise), options)


def _compressible(model: nn.Module, include: Any, exclude: Any, min_size: int) -> list[WeightTensor]:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ModelError(f"{', '.join(lazy)} is not initialised yet; run one batch through the module first")
    every = weight_tensors(model, include=include, exclude=exclude, min_size=min_size)
    found = [weight for weight in every if weight.parameter.requires_grad]
    if not found:
        raise ModelError(
            f"every weight that could be shared is frozen: {', '.join(weight.name for weight in every)}; set requires_grad"
        )
    for weight in found:
        if not weight.parameter.is_floating_point() or weight.parameter.is_meta:
            raise ModelError(
                f"{weight.name} holds {weight.parameter.dtype} on {weight.parameter.device}; only real floating point "
                "weights with values can be shared, exclude it"
            )
        if isinstance(weight.module, nn.Embedding) and (weight.module.max_norm or weight.module.scale_grad_by_freq):
            raise ModelError(
                f"{weight.name} has max_norm or scale_grad_by_freq, which no shared table can keep; exclude it"
            )
    return found


def _slots(n: int, compression: float | None, budget: int | None) -> int:
    if (compression is None) == (budget is None):
        raise InputError("give either compression= (weights per stored number) or budget= (stored numbers)")
    if compression is not None:
        if not compression >= 1:
            raise InputError(f"compression must be at least 1 (1 loses nothing), got {compression}")
        return max(1, int(n / compression))
    if not 1 <= int(budget) <= n:  # type: ignore[arg-type]
        raise InputError(f"the budget must be 1 to {n}, the number of weights (compression 1), got {budget}")
    return int(budget)  # type: ignore[arg-type]


def _std(weight: WeightTensor, scales: Mapping[str, float] | None) -> float:
    if scales is not None and weight.name in scales:
        std = float(scales[weight.name])
    else:
        std = float(weight.parameter.detach().double().std(correction=0))
    if not (math.isfinite(std) and std > 0):
        raise ModelError(
            f"{weight.name} has standard deviation {std} at the start, so its weights would all be 0 or not finite; "
            f"initialise it, exclude it or give scales={{{weight.name!r}: ...}}"
        )
    return std


def _make_map(
    mapper: str, scope: str, shapes: list[tuple[int, ...]], m: int, block: tuple[int, int], seed: int
) -> SlotMap:
    sizes = [math.prod(shape) for shape in shapes]
    if scope == "global":
        if mapper == "roast":
            return RoastMap(shapes, m, block, seed)
        return (FoldMap if mapper == "fold" else HashedMap)(sum(sizes), m, seed)
    if m < len(shapes):
        raise InputError(f"scope='local' needs a slot for each of {len(shapes)} tensors, got a budget of {m}")
    # every tensor at least one slot, the rest in proportion; the last ones go to the largest remainders
    exact = np.array(sizes) / sum(sizes) * m
    share = np.maximum(1, np.floor(exact).astype(int))
    while share.sum() > m:
        share[np.argmax(share)] -= 1
    for i in np.argsort(share - exact, kind="stable")[: m - share.sum()]:
        share[i] += 1
    maps = [
        _make_map(mapper, "global", [shape], min(int(own), math.prod(shape)), block, stream_key(seed, 8 + i))
        for i, (shape, own) in enumerate(zip(shapes, share, strict=True))
    ]
    return JoinedMap(maps)


def _normal(m: int, sigma: float, seed: int) -> Tensor:
    """Normal numbers with root mean square exactly sigma."""
    generator = torch.Generator().manual_seed(stream_key(seed, 5) & ((1 << 63) - 1))
    psi = torch.randn(m, generator=generator, dtype=torch.float64)
    return psi * (sigma / psi.square().mean().sqrt())


def _start(map_: SlotMap, layers: list[_Layer], found: list[WeightTensor], sigma: float, seed: int) -> Tensor:
    """The psi whose weights are nearest those of the model; empty slots as at random."""
    total = torch.zeros(map_.m, dtype=torch.float64, device=map_.unit.device)
    for layer, weight in zip(layers, found, strict=True):
        total += map_.collect(weight.parameter.detach().to(total).flatten() * layer.scale, layer.lo, layer.hi)
    inverse, _ = gradient_weights(map_, [layer.piece for layer in layers], "v5")
    return torch.where(map_.load() > 0, total * inverse, _normal(map_.m, sigma, seed).to(total))


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` fits what the shared parts of ``model`` were made for; warns where it does not.

    >>> net = share_parameters(nn.Linear(20, 30), compression=10)
    >>> check_optimizer(net, torch.optim.SGD(net.parameters(), lr=0.1))
    True
    """
    kind = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
    made = {m.options["optimizer"] for m in model.modules() if isinstance(m, SharedModel)}
    if made <= {kind}:
        return True
    warnings.warn(
        f"{type(optimizer).__name__} trains a model that was shared with optimizer={', '.join(sorted(made))!r}. Optimisers "
        "that normalise the gradient, such as Adam, cancel its scale: a weight then moves by lr times lambda of its layer. "
        f"Use SGD, or share_parameters(..., optimizer={kind!r})",
        stacklevel=2,
    )
    return False
