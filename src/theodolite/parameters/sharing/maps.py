"""Seeded maps from the weights of a network to the slots of one shared array, computed where they are read, never stored.

    w_i = g_i psi[h(i)],   g_i in {-1, +1},   h: positions 0..n-1 -> slots 0..m-1

    fold     h(p) = (u(p // m) + p mod m) mod m: every run of m positions is one rotation of the array     (RANDOMFOLD)
    hashed   every h(p) uniform and independent                                                            (HashedNets)
    roast    tiles of a weight matrix lie side by side from a random slot on                                    (ROAST)

Starts, slots and signs come from a 64-bit counter mix (splitmix64, constants of Steele, Lea, Flood, 2014) of seed and
position, with one stream for slots and another for signs; one word gives the signs of 64 neighbouring positions.

Source: Desai, Shrivastava, 2023, arXiv:2310.11611; Chen et al., 2015, arXiv:1504.04788 (HashedNets); Desai et al., 2022,
arXiv:2207.10702 (ROAST).
"""

__all__ = ["MAPPERS", "FoldMap", "HashedMap", "JoinedMap", "RoastMap", "SlotMap"]

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.parameters.reparametrization import LinearMap

MAPPERS = ("fold", "hashed", "roast")
"""The maps by name."""

_WORD = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 1 << 16  # positions worked on at a time: what they need stays in the cache
_FEW, _LONG = 4, 1 << 14  # up to so many chunks, or from so long ones on, they go one by one: nothing is copied twice
_EIGHTS = (1 - 2 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1)).to(torch.int8).view(torch.int64).flatten()
"""The eight signs that every byte stands for, as eight int8 in one int64."""


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _mix(word: int) -> int:
    """The output of splitmix64 at one state, an unsigned word; `random_words` does the same for tensors."""
    word &= _WORD
    for multiplier, shift in ((_FIRST, 30), (_SECOND, 27)):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> 31)


def stream_key(seed: int, stream: int) -> int:
    """The start of one stream of random words of a seed."""
    return _signed(_mix(int(seed) + stream * _STEP))


def random_words(counters: Int[Tensor, "..."], key: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """64 random bits for every counter; the same on every device."""
    z = counters * _signed(_STEP) + key
    for multiplier, shift in ((_FIRST, 30), (_SECOND, 27)):
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)  # a shift of int64 copies the sign
        z *= _signed(multiplier)
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def random_below(bound: int, counters: Int[Tensor, "..."], key: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Uniform whole numbers in [0, bound), one for every counter."""
    return (random_words(counters, key) & ((1 << 63) - 1)) % bound


def sign_bits(positions: Int[Tensor, "..."], key: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """0 or 1 for every position: bit p mod 64 of word p // 64."""
    return (random_words(positions >> 6, key) >> (positions & 63)) & 1


class SlotMap(LinearMap):
    """The linear map psi -> (g_i psi[h(i)])_i with its exact adjoint; a subclass gives `at`.

    n: positions. m: slots. seed: of slots and signs. Nothing that grows with n or m is kept in memory.

    Raises InputError unless 1 <= m <= n.
    """

    unit: Tensor

    def __init__(self, n: int | np.integer, m: int | np.integer, seed: int | np.integer = 0) -> None:
        n, m = int(n), int(m)
        if not 1 <= m <= n:
            raise InputError(f"{n} weights can share 1 to {n} slots, got m = {m}; m = n (compression 1) loses nothing")
        super().__init__(m, n)
        self.n, self.m, self.seed = n, m, int(seed)
        self._slot_key, self._sign_key = stream_key(self.seed, 1), stream_key(self.seed, 2)
        self._keep(unit=torch.ones(()))  # tells device and precision

    def at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """h of any positions."""
        raise TypeError(f"{type(self).__name__} defines no slots")

    def signs_at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """g of any positions, -1 or 1."""
        return 1 - 2 * sign_bits(positions, self._sign_key)

    def indices(self, lo: int, hi: int) -> Int[Tensor, " position"]:
        """h of the positions lo..hi-1, int64."""
        self._check(lo, hi)
        return self.at(torch.arange(lo, hi, device=self.unit.device))

    def signs(self, lo: int, hi: int) -> Int8[Tensor, " position"]:
        """g of the positions lo..hi-1, int8.

        >>> bool((FoldMap(1000, 10, 0).signs(0, 1000).abs() == 1).all())
        True
        """
        self._check(lo, hi)
        words = random_words(torch.arange(lo >> 6, (hi + 63) >> 6, device=self.unit.device), self._sign_key)
        eights = _EIGHTS.to(words.device).index_select(0, words.view(torch.uint8).int())
        return eights.view(torch.int8)[lo & 63 : (lo & 63) + hi - lo]

    def load(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, " slot"]:
        """How many of the positions lo..hi-1 (all) read each slot, (m,)."""
        hi = self.n if hi is None else hi
        self._check(lo, hi)
        count = torch.zeros(self.m, dtype=torch.int64, device=self.unit.device)
        for start, stop in _blocks(lo, hi, _BLOCK):
            count += torch.bincount(self.indices(start, stop), minlength=self.m)
        return count

    def read(
        self, psi: Float[Tensor, "*batch slot"], lo: int, hi: int, signs: Int8[Tensor, " position"] | None = None
    ) -> Float[Tensor, "*batch position"]:
        """g_i psi[h(i)] for the positions lo..hi-1; signs: those of lo..hi-1 where they are drawn already."""
        return self._gather(psi, lo, hi).mul_(self.signs(lo, hi) if signs is None else signs)

    def collect(self, g: Float[Tensor, "*batch position"], lo: int, hi: int) -> Float[Tensor, "*batch slot"]:
        """The adjoint of `read`: the signed sum of g over the positions lo..hi-1 of each slot."""
        out = g.new_zeros(*g.shape[:-1], self.m)
        self.add_into(out, g, lo, hi, self.signs(lo, hi))
        return out

    def add_into(
        self,
        out: Float[Tensor, "*batch slot"],
        g: Float[Tensor, "*batch position"],
        lo: int,
        hi: int,
        signs: Int8[Tensor, " position"],
        scale: float = 1.0,
    ) -> None:
        """Add scale times what `collect` gives to ``out``: however many layers there are, they need one array."""
        for start, stop in _blocks(lo, hi, _BLOCK):
            here = slice(start - lo, stop - lo)
            out.index_add_(-1, self.indices(start, stop), g[..., here] * signs[here], alpha=scale)

    def _gather(self, psi: Tensor, lo: int, hi: int) -> Tensor:
        """psi[h(i)] for the positions lo..hi-1, a new tensor."""
        parts = [psi.index_select(-1, self.indices(start, stop)) for start, stop in _blocks(lo, hi, _BLOCK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _apply_map(self, z: Tensor) -> Tensor:
        return self.read(z, 0, self.n)

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        return self.collect(g, 0, self.n)

    def _check(self, lo: int, hi: int) -> None:
        if not 0 <= lo <= hi <= self.n:
            raise InputError(f"positions run from 0 to {self.n}, got [{lo}, {hi})")


def _blocks(lo: int, hi: int, size: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most ``size`` positions; one that is empty where there are none."""
    return ((start, min(hi, start + size)) for start in range(lo, max(hi, lo + 1), size))


class HashedMap(SlotMap):
    """Every position reads its own random slot.

    >>> HashedMap(6, 2, 0).load().sum().item()
    6
    """

    def at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """h of any positions."""
        return random_below(self.m, positions, self._slot_key)


class FoldMap(SlotMap):
    """Every run of m positions reads the whole array, turned by a random start: the most even load there is.

    With m = n it is a permutation of the weights of all layers together, so that nothing is lost.

    >>> FoldMap(10, 4, 0).load().tolist() in ([3, 3, 2, 2], [2, 3, 3, 2], [2, 2, 3, 3], [3, 2, 2, 3])
    True
    """

    def at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """h of any positions."""
        chunk = positions // self.m
        return (random_below(self.m, chunk, self._slot_key) + positions - chunk * self.m) % self.m

    def load(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, " slot"]:
        """How many of the positions lo..hi-1 (all) read each slot, (m,): whole chunks, and those that are cut."""
        hi = self.n if hi is None else hi
        self._check(lo, hi)
        first, last = -(-lo // self.m), hi // self.m  # the chunks from first to last - 1 are whole
        count = torch.full((self.m,), max(0, last - first), dtype=torch.int64, device=self.unit.device)
        for start, stop in [(lo, first * self.m), (last * self.m, hi)] if first <= last else [(lo, hi)]:
            count += torch.bincount(self.indices(start, stop), minlength=self.m)
        return count

    def _gather(self, psi: Tensor, lo: int, hi: int) -> Tensor:
        """psi[h(i)] for the positions lo..hi-1, by one contiguous copy a chunk (two where they go one by one)."""
        first, last = lo // self.m, max(lo // self.m + 1, -(-hi // self.m))
        if self._one_by_one(first, last):
            arcs = (psi[..., one] for _, slots in self._arcs(lo, hi) for one in slots)
            return torch.cat([psi[..., :0], *arcs], dim=-1)
        turns = torch.cat([psi, psi[..., :-1]], dim=-1).unfold(-1, self.m, 1)  # row u: the array turned by u, a view
        rows = turns.index_select(-2, self._starts(first, last)).flatten(-2)
        return rows[..., lo - first * self.m : hi - first * self.m]

    def add_into(
        self,
        out: Float[Tensor, "*batch slot"],
        g: Float[Tensor, "*batch position"],
        lo: int,
        hi: int,
        signs: Int8[Tensor, " position"],
        scale: float = 1.0,
    ) -> None:
        """Add scale times what `collect` gives to ``out``: chunks turned back and added."""
        first, last = -(-lo // self.m), hi // self.m  # the chunks from first to last - 1 are whole
        if self._one_by_one(first, last):
            first = last = hi // self.m + 1
        for start, stop in ((lo, min(hi, first * self.m)), (last * self.m, hi)):
            for place, slots in self._arcs(start, stop):
                for one in slots:
                    here = slice(place - lo, place - lo + one.stop - one.start)
                    out[..., one].add_(g[..., here] * signs[here], alpha=scale)
                    place += one.stop - one.start
        if first == last:
            return
        rows = max(1, _BLOCK // self.m)
        # each row stands beside itself, which makes every turn of it one stretch: where those begin in their block
        turns = torch.arange(last - first, device=g.device).remainder_(rows).mul_(2 * self.m)
        turns.add_(self.m).sub_(self._starts(first, last))
        for chunk, end in _blocks(first, last, rows):
            here = slice(chunk * self.m - lo, end * self.m - lo)
            signed = (g[..., here] * signs[here]).unflatten(-1, (-1, self.m))
            stretches = torch.cat([signed, signed], dim=-1).flatten(-2).unfold(-1, self.m, 1)
            out.add_(stretches.index_select(-2, turns[chunk - first : end - first]).sum(dim=-2), alpha=scale)

    def _one_by_one(self, first: int, last: int) -> bool:
        return self.m >= _LONG or last - first <= _FEW

    def _starts(self, first: int, last: int) -> Tensor:
        """u of the chunks from first to last - 1."""
        return random_below(self.m, torch.arange(first, last, device=self.unit.device), self._slot_key)

    def _arcs(self, lo: int, hi: int) -> Iterator[tuple[int, list[slice]]]:
        """For each chunk's share of the positions lo..hi-1: its first position, and its slots as one or two slices."""
        while lo < hi:
            chunk, offset = divmod(lo, self.m)
            stop = min(hi, (chunk + 1) * self.m)
            begin = ((_mix(self._slot_key + chunk * _STEP) & ((1 << 63) - 1)) % self.m + offset) % self.m
            end = begin + stop - lo
            yield lo, [slice(begin, min(end, self.m))] + [slice(0, end - self.m)] * (end > self.m)
            lo = stop


class RoastMap(SlotMap):
    """Tiles of each weight matrix, (out, rest), lie side by side in the array, each from a random slot on.

    shapes: of the weight tensors, in order. block: rows and columns of a tile; smaller where the matrix is.

    Raises InputError where m is smaller than the largest tile.

    >>> RoastMap([(4, 6)], 12, (2, 3), 0).indices(0, 3).diff().tolist()
    [1, 1]
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        m: int | np.integer,
        block: tuple[int, int] = (32, 32),
        seed: int | np.integer = 0,
    ) -> None:
        matrices = [(int(shape[0]), math.prod(shape[1:])) for shape in shapes]
        if not matrices or min(block) < 1 or min(map(min, matrices)) < 1:
            raise InputError(f"roast needs weight tensors that are not empty and tiles of at least 1 x 1, got {block}")
        super().__init__(sum(rows * columns for rows, columns in matrices), m, seed)
        self.block = (int(block[0]), int(block[1]))
        tiles = [(min(self.block[0], rows), min(self.block[1], columns)) for rows, columns in matrices]
        largest = max(height * width for height, width in tiles)
        if largest > self.m:
            raise InputError(
                f"the largest tile has {largest} weights and the array {self.m} slots; give at least {largest}, or "
                f"smaller tiles than block={self.block}"
            )
        table = np.array([[columns, h, w] for (_, columns), (h, w) in zip(matrices, tiles, strict=True)])
        ends = np.cumsum([rows * columns for rows, columns in matrices])
        self._layers, self._ends = torch.from_numpy(table), torch.from_numpy(ends)
        self._begins = torch.from_numpy(np.r_[0, ends[:-1]])

    def at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """h of any positions."""
        layers, ends, begins = (one.to(positions.device) for one in (self._layers, self._ends, self._begins))
        layer = torch.searchsorted(ends, positions, right=True)
        columns, height, width = layers[layer].unbind(-1)
        inside = positions - begins[layer]
        row, column = inside // columns, inside % columns
        tile = (row // height) * ((columns + width - 1) // width) + column // width
        # a number no other tile has: where its layer begins, which leaves room for all its tiles
        word = random_words(begins[layer] + tile, self._slot_key) & ((1 << 63) - 1)
        start = word % (self.m - height * width + 1)
        return start + (row % height) * width + column % width


class JoinedMap(SlotMap):
    """Several maps side by side, each with positions and slots of its own.

    >>> JoinedMap([FoldMap(4, 2, 0), FoldMap(3, 3, 1)]).load().tolist()
    [2, 2, 1, 1, 1]
    """

    def __init__(self, maps: Sequence[SlotMap]) -> None:
        super().__init__(sum(one.n for one in maps), sum(one.m for one in maps))
        self._every = list(maps)
        self._positions = [0, *np.cumsum([one.n for one in maps]).tolist()]
        self._slots = [0, *np.cumsum([one.m for one in maps]).tolist()]

    def at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """h of any positions."""
        out = torch.empty_like(positions)
        for one, first, slot in zip(self._every, self._positions, self._slots, strict=False):
            inside = (positions >= first) & (positions < first + one.n)
            out[inside] = slot + one.at(positions[inside] - first)
        return out

    def signs_at(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """g of any positions, -1 or 1."""
        out = torch.empty_like(positions)
        for one, first in zip(self._every, self._positions, strict=False):
            inside = (positions >= first) & (positions < first + one.n)
            out[inside] = one.signs_at(positions[inside] - first)
        return out

    def load(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, " slot"]:
        """How many of the positions lo..hi-1 (all) read each slot, (m,)."""
        hi = self.n if hi is None else hi
        self._check(lo, hi)
        count = torch.zeros(self.m, dtype=torch.int64, device=self.unit.device)
        for one, a, b, slots in self._cut(lo, hi):
            count[slots] = one.load(a, b)
        return count

    def signs(self, lo: int, hi: int) -> Int8[Tensor, " position"]:
        """g of the positions lo..hi-1, int8."""
        self._check(lo, hi)
        none = torch.empty(0, dtype=torch.int8, device=self.unit.device)
        return torch.cat([none, *(one.signs(a, b) for one, a, b, _ in self._cut(lo, hi))])

    def add_into(
        self,
        out: Float[Tensor, "*batch slot"],
        g: Float[Tensor, "*batch position"],
        lo: int,
        hi: int,
        signs: Int8[Tensor, " position"],
        scale: float = 1.0,
    ) -> None:
        """Add scale times what `collect` gives to ``out``."""
        at = 0
        for one, a, b, slots in self._cut(lo, hi):
            here = slice(at, at + b - a)
            one.add_into(out[..., slots], g[..., here], a, b, signs[here], scale)
            at += b - a

    def _gather(self, psi: Tensor, lo: int, hi: int) -> Tensor:
        parts = (one._gather(psi[..., slots], a, b) for one, a, b, slots in self._cut(lo, hi))
        return torch.cat([psi[..., :0], *parts], -1)

    def _cut(self, lo: int, hi: int) -> Iterator[tuple[SlotMap, int, int, slice]]:
        """The maps that lo..hi-1 meet, with the positions inside each and its slots."""
        for one, first, slot in zip(self._every, self._positions, self._slots, strict=False):
            a, b = max(lo - first, 0), min(hi - first, one.n)
            if a < b:
                yield one, a, b, slice(slot, slot + one.m)
