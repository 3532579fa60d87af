"""Runs of a model with the activations at some locations replaced, as cheap as they can be made.

In a decoder what stands before the first replaced token and below the first replaced block does not change. So keys and values
of the earlier tokens are kept from one run to the next, and a run starts at the first replaced block from its stream: at the
last token of 18 and in the upper third of the blocks it costs a fiftieth of a whole run.
"""

__all__ = ["Answers", "Location", "PatchedRuns", "started_at"]

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.activations.dictionary_evaluation.task import Task
from theodolite.core.capture import CaptureError, check_finite, main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET, bytes_per_row, chunks
from theodolite.core.transformer import decoder_parts
from theodolite.core.view import evaluation_mode


@dataclass(frozen=True)
class Location:
    """A place whose activations are read and replaced.

    name: of a module (its output) or "NAME:input", as in `theodolite.core.capture`. position: of the token, from 0 or from the
    end (-1), or the name of one in the task's positions; None in a network whose activations are (rows, width). columns: first
    and one past the last, None for all. score: what a search ranked it by.
    """

    name: str
    position: int | str | None = None
    columns: tuple[int, int] | None = None
    label: str = ""
    score: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return self.label or self.name


@dataclass(frozen=True, eq=False)
class Answers:
    """The task's outcome and the place of the largest score for each prompt."""

    outcome: Float[Tensor, " prompt"]
    top: Int[Tensor, " prompt"]


@dataclass
class _Chunk:
    """Prompts that run together: their rows, and what the first run left of the tokens before ``start``."""

    rows: Tensor
    ids: Tensor
    cache: Any
    streams: dict[int, Tensor]


class PatchedRuns:
    """A model on the prompts of a task, ready to run with replaced activations at ``locations``.

    states: {location: (n, d)} as the model has them, clean: its answers. repeat: each prompt so many times in a row (row i is
    prompt i // repeat), for different replacements of one prompt.

    Raises CaptureError for places that are not there or have no such token or columns, ModelError where the model gives no
    scores, ActivationError for NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        locations: Sequence[Location],
        *,
        repeat: int = 1,
        memory: int | None = None,
    ) -> None:
        self.model, self.task, self.repeat = model, task, repeat
        self.locations = tuple(locations)
        if len(set(self.locations)) < len(self.locations) or not self.locations:
            raise InputError("need at least one location, each once")
        self._modules = {one.name: _module(model, one.name) for one in self.locations}
        prompts = task.prompts
        self.is_decoder = hasattr(model, "get_output_embeddings") and prompts.dtype == torch.long and prompts.ndim == 2
        self._places = {one: self._tokens(one) for one in self.locations}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluation_mode(model))
            self._open(memory)
            answers, states = self._first()
        self.clean = answers
        self.states: dict[Location, Tensor] = states
        for one, state in states.items():
            check_finite(state, str(one))

    # ---- what is where

    def _tokens(self, one: Location) -> Tensor | None:
        n, length = len(self.task), self.task.prompts.shape[1] if self.is_decoder else 0
        if not self.is_decoder:
            if one.position is not None:
                raise CaptureError(
                    f"{one} names token {one.position!r}, but the network's rows have no tokens; leave it out"
                )
            return None
        if isinstance(one.position, str):
            if one.position not in self.task.positions:
                raise CaptureError(
                    f"the task has no position {one.position!r}; it has: {', '.join(self.task.positions) or 'none'}"
                )
            found = torch.as_tensor(self.task.positions[one.position])
        else:
            at = -1 if one.position is None else one.position
            found = torch.full((n,), at + length if at < 0 else at)
        if int(found.min()) < 0 or int(found.max()) >= length:
            raise CaptureError(f"{one} names token {one.position}, the prompts have {length}")
        return found.repeat_interleave(self.repeat)

    def _open(self, memory: int | None) -> None:
        rows = torch.arange(len(self.task))
        prompts = self.task.prompts
        self._blocks: list[tuple[str, nn.Module]] = []
        if not self.is_decoder:
            self.start = 0
            cost = bytes_per_row(self.model, prompts[:1].to(self._device), gradients=False) * self.repeat
            self._chunks = [_Chunk(rows[part], prompts[part], None, {}) for part in chunks(len(rows), cost, memory)]
            return
        tokens = [places for places in self._places.values() if places is not None]
        self.start = min(int(places.min()) for places in tokens)
        names = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        with suppress(ModelError):  # a layout that is not known runs from its first block, as any model can
            self._blocks = [(block.name, block.module) for block in decoder_parts(self.model).blocks]
        config: Any = self.model.config
        length = prompts.shape[1]
        width = int(getattr(config, "hidden_size", 0) or config.n_embd)
        depth = max(1, len(self._blocks))
        logits = 8 * int(config.vocab_size) * (1 if self._options else length - self.start)
        each = 4 * width * length * (16 + 4 * depth) + logits
        self._chunks = [
            _Chunk(rows[part], prompts[part].to(self._device), None, {})
            for part in chunks(len(rows), float(each) * self.repeat, memory or DEFAULT_BUDGET)
        ]

    def _block_of(self, name: str) -> int:
        found = [i for i, (block, _) in enumerate(self._blocks) if name.startswith((f"{block}.", f"{block}:"))]
        return found[0] if found else 0

    # ---- running

    def _first(self) -> tuple[Answers, dict[Location, Tensor]]:
        """The clean run, which leaves behind what later ones start from."""
        answers, states = [], {one: list[Tensor]() for one in self.locations}
        for chunk in self._chunks:
            if self.is_decoder and self.start > 0:
                out = self.model(chunk.ids[:, : self.start], use_cache=True, **self._options)
                chunk.cache = out[self._cache_name]
                if self.repeat > 1:
                    chunk.cache.batch_repeat_interleave(self.repeat)
            with ExitStack() as stack:
                for i, (_, block) in enumerate(self._blocks):
                    stack.callback(block.register_forward_pre_hook(_keep(chunk.streams, i)).remove)
                    stack.callback(block.register_forward_hook(self._note_shape).remove)
                for part in self._hook(chunk, {}, states):
                    stack.callback(part.remove)
                answers.append(self._answer(chunk))
        return _joined(answers), {one: torch.cat(parts) for one, parts in states.items()}

    @torch.no_grad()
    def run(self, values: Mapping[Location, Tensor]) -> Answers:
        """The model's answers where the activations at the locations of ``values`` are these, (n, d) each."""
        for one, value in values.items():
            if one not in self._places:
                raise InputError(f"{one} is not among the locations of these runs")
            if value.shape != self.states[one].shape:
                raise InputError(f"{one} holds {tuple(self.states[one].shape)}, its replacement {tuple(value.shape)}")
        first = min((self._block_of(one.name) for one in values), default=0)
        answers = []
        with evaluation_mode(self.model):
            for chunk in self._chunks:
                with ExitStack() as stack:
                    for handle in self._hook(chunk, values, {}):
                        stack.callback(handle.remove)
                    if first > 0:
                        blocks = [block for _, block in self._blocks[: first + 1]]
                        stack.enter_context(started_at(blocks, chunk.streams[first], self._in_tuples))
                    answers.append(self._answer(chunk))
        return _joined(answers)

    def _note_shape(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_tuples = isinstance(output, tuple)

    def _answer(self, chunk: _Chunk) -> Answers:
        rows = chunk.rows.repeat_interleave(self.repeat)
        if self.is_decoder:
            ids = chunk.ids[:, self.start :].repeat_interleave(self.repeat, dim=0)
            given = {} if chunk.cache is None else {self._cache_name: copy.deepcopy(chunk.cache)}
            scores = main_tensor(self.model(ids, use_cache=chunk.cache is not None, **given, **self._options))
            scores = scores[:, -1].float()
        else:
            scores = main_tensor(self.model(chunk.ids.to(self._device).repeat_interleave(self.repeat, dim=0)))
            scores = scores[:, None] if scores.ndim == 1 else scores
        if scores.ndim != 2:
            raise ModelError(f"the model gives {tuple(scores.shape)} for {len(rows)} rows; scores are (rows, scores)")
        outcome = self.task.outcome(scores, rows)
        if outcome.shape != rows.shape:
            raise InputError(
                f"the outcome gives {tuple(outcome.shape)} for {len(rows)} rows; it must give a number a row"
            )
        top = scores.argmax(dim=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()
        return Answers(outcome.cpu(), top.cpu())

    def _hook(
        self, chunk: _Chunk, values: Mapping[Location, Tensor], states: Mapping[Location, list[Tensor]]
    ) -> Iterator[Any]:
        """Hooks that put ``values`` in place and append what is at the locations to ``states``."""
        rows = chunk.rows * self.repeat
        at = (rows[:, None] + torch.arange(self.repeat)).flatten()
        wanted = dict.fromkeys([*values, *states])
        for name in dict.fromkeys(one.name for one in wanted):
            here = [one for one in wanted if one.name == name]

            def change(tensor: Tensor, here: list[Location] = here) -> Tensor:
                for one in here:
                    index = self._index(one, tensor, at)
                    if one in states:
                        states[one].append(tensor[index].detach().float().cpu())
                    if one in values:
                        tensor = tensor.clone()
                        tensor[index] = values[one][at].to(tensor)
                return tensor

            module, before = self._modules[name]
            yield _on(module, before, change)

    def _index(self, one: Location, tensor: Tensor, at: Tensor) -> tuple[Any, ...]:
        columns = slice(*one.columns) if one.columns else slice(None)
        places = self._places[one]
        if tensor.ndim != (2 if places is None else 3) or len(tensor) != len(at):
            raise CaptureError(
                f"{one} has shape {tuple(tensor.shape)}; activations are (rows, width), of a decoder (rows, tokens, width)"
            )
        if one.columns and not 0 <= one.columns[0] < one.columns[1] <= tensor.shape[-1]:
            raise CaptureError(f"{one} names columns {one.columns}, the activations there have {tensor.shape[-1]}")
        if places is None:
            return (slice(None), columns)
        return (torch.arange(len(at)), places[at] - self.start, columns)


def _joined(parts: list[Answers]) -> Answers:
    return Answers(torch.cat([part.outcome for part in parts]), torch.cat([part.top for part in parts]))


def _module(model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    stem, before = name.removesuffix(":input"), name.endswith(":input")
    try:
        return model.get_submodule(stem), before
    except AttributeError as error:
        raise CaptureError(f"the network has no module called {stem!r}") from error


def _on(module: nn.Module, before: bool, change: Callable[[Tensor], Tensor]) -> Any:
    def pre(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise CaptureError(
                f"{type(module).__name__} is not called with a tensor first, so its input cannot be replaced"
            )
        return (change(args[0]), *args[1:])

    def post(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_pre_hook(pre) if before else module.register_forward_hook(post)


def _keep(streams: dict[int, Tensor], i: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        streams[i] = args[0].detach()

    return hook


@contextmanager
def started_at(blocks: Sequence[nn.Module], stream: Tensor, in_tuples: bool) -> Iterator[None]:
    """All of a decoder's first ``blocks`` but the last pass on what they get; the last starts from ``stream``.

    in_tuples: whether blocks give their stream as the first of a tuple.
    """

    def start(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (stream, *args[1:])

    with ExitStack() as stack:
        # prepended: a replacement at this block's own input comes after it
        stack.callback(blocks[-1].register_forward_pre_hook(start, prepend=True).remove)
        for block in blocks[:-1]:
            block.forward = _pass_on_tuple if in_tuples else _pass_on
            stack.callback(delattr, block, "forward")
        yield


def _pass_on(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return stream


def _pass_on_tuple(stream: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (stream,)
