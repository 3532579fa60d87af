"""A table of vectors read from a shared array: only the rows that are asked for are ever made."""

__all__ = ["SharedEmbedding"]

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError
from theodolite.parameters.sharing.gradients import gradient_weights, scale_gradient
from theodolite.parameters.sharing.maps import FoldMap, HashedMap, SlotMap

_KINDS: dict[str, type[FoldMap] | type[HashedMap]] = {"fold": FoldMap, "hashed": HashedMap}


class SharedEmbedding(nn.Module):
    """A table (num, dim) whose entry j of row r is scale g_p array[h(p)] with p = offset + r dim + j.

    array: (m,) the stored numbers, trained unless a parameter that is frozen; None where a network gives them at each call.
    map: h and g; by default the map called ``mapper`` ("fold" or "hashed") of this table alone, with ``seed``.
    gradient_scale: as in `share_parameters`. padding_idx: row that is all zeros. Time and memory of a call do not depend on
    num; with the map of this table alone its construction visits every entry once where it is hashed.

    Raises InputError for a table smaller than the array and, when called, for rows out of range.

    >>> table = SharedEmbedding(10**7, 16, torch.randn(1000))
    >>> table(torch.tensor([[0, 9_999_999]])).shape
    torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num: int,
        dim: int,
        array: Tensor | None,
        *,
        mapper: str = "fold",
        seed: int = 0,
        scale: float = 1.0,
        gradient_scale: str = "v1",
        padding_idx: int | None = None,
        map: SlotMap | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__()
        if num < 1 or dim < 1:
            raise InputError(f"a table needs rows and columns, got {num} x {dim}")
        if padding_idx is not None and not -num <= padding_idx < num:
            raise InputError(f"padding_idx must be a row of {num}, got {padding_idx}")
        if map is None:
            if mapper not in _KINDS:
                raise InputError(f"the map of a table is one of {', '.join(_KINDS)}, got {mapper!r}")
            if array is None:
                raise InputError("a table without a map of its network needs an array of its own")
            map = _KINDS[mapper](num * dim, len(array), seed)
        self.num_embeddings, self.embedding_dim = num, dim  # the names that nn.Embedding has
        self.scale, self.offset, self.map = scale, offset, map
        self.padding_idx = None if padding_idx is None else padding_idx % num
        self.register_parameter("array", None)
        if array is not None:
            self.array = array if isinstance(array, nn.Parameter) else nn.Parameter(array.detach().clone())
            piece = (offset, offset + num * dim, scale)
            weight, _ = gradient_weights(map, [piece], gradient_scale)
            self.register_buffer("gradient_weight", weight.to(self.array), persistent=False)

    def forward(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "... {self.embedding_dim}"]:
        """The vectors of ``rows``."""
        if self.array is None:
            raise InputError("this table reads the array of its network: call the network, or materialize() it")
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.num_embeddings):
            raise InputError(
                f"rows run from 0 to {self.num_embeddings - 1}, got {int(rows.min())} to {int(rows.max())}"
            )
        weight = self._buffers.get("gradient_weight")
        psi = self.array if weight is None else scale_gradient(self.array, weight)
        positions = (
            self.offset
            + rows.long()[..., None] * self.embedding_dim
            + torch.arange(self.embedding_dim, device=rows.device)
        )
        vectors = psi[self.map.at(positions)] * (self.scale * self.map.signs_at(positions).to(psi.dtype))
        if self.padding_idx is None:
            return vectors
        return vectors * (rows != self.padding_idx)[..., None]

    @property
    def weight(self) -> Float[Tensor, "{self.num_embeddings} {self.embedding_dim}"]:
        """The whole table, for code that asks an embedding for it; all its rows are made."""
        return self(torch.arange(self.num_embeddings, device=self.map.unit.device))

    def extra_repr(self) -> str:
        """Size of the table, of the array and which map."""
        return f"{self.num_embeddings}, {self.embedding_dim}, slots={self.map.m}, map={type(self.map).__name__}"
