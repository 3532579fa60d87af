"""A frozen model with a few trained changes: apply a method, count, switch off, merge, save.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366.
"""

__all__ = ["PEFTModel", "ParameterCount", "apply", "bottleneck_for_budget"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.parameters.peft import host, sizes
from theodolite.parameters.peft.blocks import Block, Slot, find_blocks
from theodolite.parameters.peft.changes import Bottleneck, Prefix, PrefixGenerator, Prompt
from theodolite.parameters.peft.modification import Modification, resolve
from theodolite.parameters.peft.probe import run_probe

_MARK = "_theodolite_peft"


@dataclass(frozen=True)
class ParameterCount:
    """Numbers that a method keeps per task.

    method: of its changes, with prefixes as plain keys and values. head: of the head. training: all that trains now,
    the generator of prefixes included. base: of the model without its head.
    """

    method: int
    head: int
    training: int
    base: int

    @property
    def share(self) -> float:
        """Of the base, without the head."""
        return self.method / self.base

    @property
    def share_with_head(self) -> float:
        """Of the base and its head, with the head."""
        return (self.method + self.head) / (self.base + self.head)


class _Switch:
    """Has switched changes on or off already; as a context it switches back at the end."""

    def __init__(self, back: Callable[[], object]) -> None:
        self._back = back

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._back()


class PEFTModel(nn.Module):
    """A model whose weights are frozen and whose hidden states are changed by a few trained modules; made by `apply`.

    base: the model itself, hooked and not copied. changes: the trained modules by block and place. Calling it is calling
    the model, `generate` included. Weights of the model that train too (biases, a head) are kept beside their old values.
    """

    def __init__(
        self,
        base: nn.Module,
        modifications: tuple[Modification, ...],
        blocks: tuple[Block, ...],
        layers: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.base = base
        self.modifications, self.layers = modifications, layers
        self.changes = nn.ModuleDict()
        self._blocks = blocks
        self._open = {name: p.requires_grad for name, p in base.named_parameters()}
        self._kept: dict[str, Tensor] = {}  # old values of the base's weights that train
        self._head: set[str] = set()
        self._all_head = set(sizes.head_names(base, True, blocks))  # also where it does not train
        self._handles: host.Handles = []
        self._active = False

    def forward(self, *args: Any, **batch: Any) -> Any:
        """What the model gives with its changes."""
        return self.base(*args, **batch)

    def generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, with its changes."""
        return self.base.generate(*args, **options)  # type: ignore[operator]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if any(isinstance(change, Prefix) for change in self.changes.values()):
            host.register_attention()  # a copy may be read in another process

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What trains, each once: for the optimiser."""
        return (p for p in self.parameters() if p.requires_grad)

    @property
    def parameter_count(self) -> ParameterCount:
        """How many numbers the method keeps, with and without the head, and their share of the base."""
        base = dict(self.base.named_parameters())
        head = sum(base[name].numel() for name in self._head)
        own = sum(base[name].numel() for name in self._kept if name not in self._head)
        generators = {
            id(p) for c in self.changes.values() if isinstance(c, Prefix) and c.shared for p in c.parameters()
        }
        plain = sum(p.numel() for p in self.changes.parameters() if id(p) not in generators)
        plain += sum(
            2 * c.shape[0] * c.shape[1] * c.shape[2]
            for c in self.changes.values()
            if isinstance(c, Prefix) and c.shared is not None
        )
        everything = sum(p.numel() for p in self.base.parameters())
        named_head = head or sum(p.numel() for name, p in base.items() if name in self._all_head)
        return ParameterCount(
            plain + own, head, sum(p.numel() for p in self.trainable_parameters()), everything - named_head
        )

    @property
    def head(self) -> frozenset[str]:
        """Names of the head's parameters that train."""
        return frozenset(self._head)

    @property
    def own_weights(self) -> tuple[str, ...]:
        """Names of the base's parameters that train: biases, blocks, the head."""
        return tuple(self._kept)

    def slot(self, key: str) -> tuple[Slot, str]:
        """The linear map that a change belongs to, and its name in the base."""
        layer, _, where = key.split("-")
        slot = self._blocks[int(layer)].slots[where]
        return slot, next(name for name, module in self.base.named_modules() if module is slot.module)

    @property
    def active(self) -> bool:
        """Whether the changes are in place."""
        return self._active

    def enable(self) -> _Switch:
        """Put the changes in place, for good or for a with block."""
        was = self._active
        self._switch(True)
        return _Switch(lambda: self._switch(was))

    def disable(self) -> _Switch:
        """Take the changes out, so that the model is the base bit for bit, for good or for a with block."""
        was = self._active
        self._switch(False)
        return _Switch(lambda: self._switch(was))

    def _switch(self, on: bool) -> None:
        if on == self._active:
            return
        if on:
            self._attach()
        else:
            for undo in reversed(self._handles):
                undo()
            self._handles = []
        base = dict(self.base.named_parameters())
        with torch.no_grad():
            for name, other in self._kept.items():
                mine = base[name].detach().clone()
                base[name].copy_(other)
                self._kept[name] = mine
        self._active = on

    def _build(self, generator: torch.Generator | None) -> None:
        """Make the changes, on the device and of the type of the model."""
        first = next(self.base.parameters())
        for index, m in enumerate(self.modifications):
            if m.where == "input":
                width = host.backbone(self.base).get_input_embeddings().embedding_dim
                self.changes[f"x-{index}-input"] = Prompt(m, width, generator=generator)
            if not m.hidden:
                continue
            shared = None
            if m.generator is not None:
                width = self._blocks[self.layers[0]].width
                shared = PrefixGenerator(m.bottleneck, width, m.generator, generator=generator)
            for at in self.layers:
                block = self._blocks[at]
                key = f"{at}-{index}-{m.where}"
                if m.prefix:
                    self.changes[key] = Prefix(m, block.kv_heads, block.head_width, shared=shared, generator=generator)
                else:
                    width_in, width_out, heads = sizes.widths(m, block)
                    self.changes[key] = Bottleneck(m, width_in, width_out, heads=heads, generator=generator)
        self.changes.to(device=first.device, dtype=first.dtype)
        self.changes.train(self.base.training)
        self.training = self.base.training

    def _open_weights(self, head: Sequence[str]) -> None:
        """Freeze the base but for its own weights that train, and keep what those were."""
        self._head = set(head)
        opened = set(head)
        for m in self.modifications:
            if m.where in ("bias", "weights"):
                opened |= set(sizes.own_weights(self.base, m, self._blocks, self.layers))
        for name, p in self.base.named_parameters():
            p.requires_grad_(name in opened)
            if name in opened:
                self._kept[name] = p.detach().clone()
        for module in self._marked():
            setattr(module, _MARK, True)

    def _marked(self) -> list[nn.Module]:
        """The modules that tell that a model has changes: itself, and its blocks where a part of it is asked."""
        return [self.base, *{id(b.module): b.module for b in self._blocks if b.module is not self.base}.values()]

    def _attach(self) -> None:
        for key, change in self.changes.items():
            if isinstance(change, Prompt):
                self._handles += host.attach_prompt(change, self.base)
                continue
            block = self._blocks[int(key.split("-")[0])]
            if isinstance(change, Prefix):
                self._handles += host.attach_prefix(change, block)
            elif isinstance(change, Bottleneck):
                self._handles += host.attach(change, block)

    def gate_prefixes(self, gated: bool = True) -> None:
        """Attend to prefixes and tokens apart and mix them by lam(x), or together; the outputs are the same."""
        for change in self.changes.values():
            if isinstance(change, Prefix) and change.modification.composition == "gate":
                change.gated = gated

    def settle(self) -> None:
        """Replace the generator of prefixes by the plain prefixes that it makes."""
        for change in self.changes.values():
            if isinstance(change, Prefix):
                change.settle()

    def remove(self) -> nn.Module:
        """The base as it was before: no hook, no attribute, every weight and every gradient flag as before."""
        self._switch(False)
        for name, p in self.base.named_parameters():
            p.requires_grad_(self._open[name])
        for module in self._marked():
            if hasattr(module, _MARK):
                delattr(module, _MARK)
        return self.base

    def merge(self) -> nn.Module:
        """The base with low-rank changes added to its weights, W + s W_u^T W_d^T, and without hooks; a head stays trained.

        Raises ModelError for changes that are not low-rank changes of one weight, naming them.
        """
        other = [m for m in self.modifications if not m.mergeable]
        if other or any(not isinstance(change, Bottleneck) for change in self.changes.values()):
            m = other[0]
            raise ModelError(
                f"only LoRA can be merged: a {m.form!r} change of {m.where!r} ({m.insertion}, {m.composition}) is no change "
                "of one weight matrix; keep the changes apart, or switch them on and off with enable() and disable()"
            )
        owners = dict[tuple[int, int], str]()
        for key in self.changes:
            layer, _, where = key.split("-")
            slot = self._blocks[int(layer)].slots[where]
            if owners.setdefault((id(slot.module.weight), slot.start), layer) != layer:
                raise ModelError(f"blocks share the weights of {where!r}, so one change cannot be merged for each")
        self._switch(True)
        with torch.no_grad():
            for key, change in self.changes.items():
                layer, _, where = key.split("-")
                slot = self._blocks[int(layer)].slots[where]
                weight: Any = slot.module.weight
                delta = change.weight_change().to(weight.dtype)  # type: ignore[operator]
                if isinstance(slot.module, nn.Linear):
                    weight[slot.start : slot.stop] += delta
                else:
                    weight[:, slot.start : slot.stop] += delta.T
        self._kept = {}  # what has trained stays
        return self.remove()

    def save(self, path: str | Path) -> None:
        """Write the changes and the trained weights of the base into a folder; LoRA in the format of the peft library."""
        from theodolite.parameters.peft.files import save

        save(self, path)

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, **options: Any) -> "PEFTModel":
        """Put the changes of a folder onto the same model; folders that peft wrote for LoRA are read too.

        options: ``blocks`` and ``probe`` as in `apply`. Raises ModelError for another model or another format.
        """
        from theodolite.parameters.peft.files import load

        return load(model, path, **options)


def apply(
    model: nn.Module,
    method: object,
    *,
    layers: Sequence[int] | None = None,
    budget: float | int | None = None,
    train_head: bool | str | Sequence[str] = True,
    seed: int | None = None,
    blocks: object = None,
    probe: object = None,
    **preset_args: Any,
) -> PEFTModel:
    """Freeze ``model`` and put a method's changes into it, in place.

    method: a name of `PRESETS`, a `Modification` or a list of them ([]: the head alone). layers: numbers of the blocks that
    are changed, all by default. budget: the most numbers that the changes may hold, a share of the base where it is below 1;
    the bottleneck follows. train_head: what lies behind the blocks trains too, or the parameters that patterns name.
    seed: of the changes' start. blocks: the parts of an unknown architecture (`find_blocks` says what they are). probe: a
    batch (dict of inputs) that is run once to see that every change is reached and matters; None makes one for a model of
    tokens or images, False leaves the check out. preset_args: options of the preset, as ``bottleneck=32``.

    Raises InputError for choices that do not fit the model, ModelError for a model without the parts they need, for one
    that has changes already, and where a change has no effect.

    >>> layer = nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
    >>> parts = {"attention": layer, "query": layer["q"], "output": layer["o"], "ffn_in": layer["up"], "ffn_out": layer["down"]}
    >>> apply(layer, "scaled_parallel", bottleneck=2, blocks=[parts]).parameter_count.method
    42
    """
    if any(hasattr(module, _MARK) for module in model.modules()):
        raise ModelError(
            f"this {type(model).__name__} has changes already; remove() them first, or give one list of both"
        )
    if next(model.parameters(), None) is None:
        raise ModelError(f"{type(model).__name__} has no parameters")
    if budget is not None:
        r = bottleneck_for_budget(model, method, budget, layers=layers, blocks=blocks, **preset_args)
        modifications = sizes.with_bottleneck(method, r, **preset_args)
    else:
        modifications = resolve(method, **preset_args)
    found = find_blocks(model, blocks) if blocks is not None or sizes.needs_blocks(modifications) else ()
    chosen = sizes.chosen_layers(layers, len(found)) if found else ()
    sizes.check(model, modifications, found, chosen)
    head = sizes.head_names(model, train_head, found)
    if not modifications and not head:
        raise ModelError(
            f"nothing is left to train: {type(model).__name__} has no head behind its blocks; name one with train_head="
        )
    made = PEFTModel(model, modifications, found, chosen)
    made._build(torch.Generator().manual_seed(seed) if seed is not None else None)
    made._open_weights(head)
    made.enable()
    if probe is not False:
        try:
            run_probe(model, dict(made.changes.items()), probe)
        except BaseException:
            made.remove()
            raise
    return made


def bottleneck_for_budget(
    model: nn.Module,
    method: object,
    budget: float | int,
    *,
    layers: Sequence[int] | None = None,
    blocks: object = None,
    **preset_args: Any,
) -> int:
    """The largest bottleneck with which a method's changes hold at most ``budget`` numbers (a share of the base below 1).

    All bottlenecks of a method are that wide, unless an option of the preset sets one. Raises InputError where a method has
    no bottleneck, and where even the smallest is over the budget.

    >>> layer = nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
    >>> parts = {"attention": layer, "query": layer["q"], "output": layer["o"], "ffn_in": layer["up"], "ffn_out": layer["down"]}
    >>> bottleneck_for_budget(layer, "parallel", 60, blocks=[parts])
    3
    """
    if not budget > 0:
        raise InputError(f"a budget must be above 0, got {budget}")
    preset_args.pop("bottleneck", None)
    first = resolve(method, **preset_args)
    if not any(m.hidden or m.where == "input" for m in first):
        raise InputError(f"{method!r} has no bottleneck, so it holds what it holds; leave the budget out")
    found = find_blocks(model, blocks) if sizes.needs_blocks(first) else ()
    chosen = sizes.chosen_layers(layers, len(found)) if found else ()
    sizes.check(model, [m for m in first if not m.hidden], found, chosen)
    head = set(sizes.head_names(model, True, found))
    base = sum(p.numel() for name, p in model.named_parameters() if name not in head)
    limit = budget * base if budget < 1 else budget
    step = next((found[at].heads for m in first if m.where == "heads" and not m.prefix for at in chosen), 1)
    most = max(
        [min(sizes.widths(m, found[at])[:2]) for m in first if m.hidden and not m.prefix for at in chosen], default=4096
    )

    def held(r: int) -> int:
        return sizes.count(model, sizes.with_bottleneck(method, r, **preset_args), found, chosen)

    r = sizes.largest(lambda r: held(r) <= limit, step, most)
    if r == 0:
        raise InputError(
            f"the smallest bottleneck, {step}, holds {held(step):,} numbers, over the budget of {limit:,.0f}"
        )
    return r
