"""The sparse autoencoder as a module: four kinds with one shape.

Inside, rows are multiplied by ``scale`` so that their mean norm is sqrt(d); codes belong to these scaled rows, what `decode`
gives to the rows as they are.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366; gated: Rajamanoharan et al., 2024, arXiv:2404.16014; TopK and its
auxiliary loss: Gao et al., 2024, arXiv:2406.04093.
"""

__all__ = ["KINDS", "Kind", "SAEOutput", "SparseAutoencoder"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError

Kind = Literal["vanilla", "gated", "topk", "attribution"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_AUXILIARY = 1 / 32  # weight of the loss on dead latents (Gao et al., sec. A.2)


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """What a pass gives. reconstruction: in the units of the input. losses: by name, means over rows in scaled units."""

    reconstruction: Float[Tensor, "row width"]
    latents: Float[Tensor, "row latent"]
    losses: Mapping[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The sum of all parts, what training lowers."""
        return sum(self.losses.values(), start=torch.zeros((), device=self.latents.device))


class SparseAutoencoder(nn.Module):
    """A dictionary of ``n_latents`` directions of a space of width ``d``, of which few are on for any one row.

    kind: what makes codes sparse.
      "vanilla"      f = relu(p), p = (x - b_dec) W_enc + b_enc; loss |x - x_hat|^2 + l1 |f|_1
      "gated"        f = 1[pi > 0] relu(q exp(r_mag) + b_mag), q = (x - b_dec) W_enc, pi = q + b_gate; l1 on relu(pi), and pi has
                     to reconstruct x through a frozen decoder
      "topk"         f = the k largest of relu(p); dead latents have to explain what is left over
      "attribution"  vanilla, and l1 sum_j |f_j (g . d_j)| + |(x - x_hat) . g| for gradients g of an outcome by x
    k: codes that are on at most, for "topk" only. seed: of the first directions.

    Rows of W_dec (n_latents, d) start with norm 1 and W_enc (d, n_latents) as their transpose. `train_sae` sets ``scale`` and
    b_dec from the data. Raises InputError for sizes and kinds that do not go together.

    >>> sae = SparseAutoencoder(4, 8, "topk", k=2)
    >>> int((sae.encode(torch.ones(3, 4)) > 0).sum(dim=1).max()) <= 2
    True
    """

    scale: Tensor
    steps: Tensor
    dead: Tensor

    def __init__(
        self, d: int, n_latents: int, kind: str = "vanilla", k: int | None = None, l1: float = 2.5, *, seed: int = 0
    ) -> None:
        super().__init__()
        if d < 1 or n_latents < 1:
            raise InputError(
                f"a dictionary needs a width and a number of latents of at least 1, got {d} and {n_latents}"
            )
        if kind not in KINDS:
            raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
        if (kind == "topk") != (k is not None):
            raise InputError(f"k is for the kind 'topk' and needed there; got kind={kind!r}, k={k}")
        if k is not None and not 1 <= k <= n_latents:
            raise InputError(f"of {n_latents} latents 1 to that many can be on, got k={k}")
        if not l1 >= 0:
            raise InputError(f"l1 must be at least 0, got {l1}")
        self.kind = cast("Kind", kind)
        self.k, self.l1 = k, float(l1)
        drawn = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(seed))
        rows = nn.functional.normalize(drawn, dim=1)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone())
        self.b_dec = nn.Parameter(torch.zeros(d))
        if kind == "gated":
            self.b_gate, self.b_mag, self.r_mag = (nn.Parameter(torch.zeros(n_latents)) for _ in range(3))
        else:
            self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("dead", torch.zeros(n_latents, dtype=torch.bool), persistent=False)

    @property
    def d(self) -> int:
        """Width of the space."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """Number of codes."""
        return self.W_dec.shape[0]

    @property
    def directions(self) -> Float[Tensor, "latent width"]:
        """The direction of each code, one a row."""
        return self.W_dec.detach()

    def extra_repr(self) -> str:
        """Sizes and kind, for printing."""
        return f"{self.d}, {self.n_latents}, {self.kind!r}" + (f", k={self.k}" if self.k else f", l1={self.l1}")

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row latent"]:
        """Codes of rows in their own units."""
        return self._codes(self._own(x) * self.scale)[0]

    def decode(self, codes: Float[Tensor, "*row latent"]) -> Float[Tensor, "*row width"]:
        """Rows in their own units from codes."""
        return (codes @ self.W_dec + self.b_dec) / self.scale

    def forward(self, x: Float[Tensor, "row width"], gradients: Float[Tensor, "row width"] | None = None) -> SAEOutput:
        """Reconstruction, codes and the parts of the loss; ``gradients`` of the outcome by x, for "attribution"."""
        scaled = self._own(x) * self.scale
        f, p = self._codes(scaled)
        made = f @ self.W_dec + self.b_dec
        off = scaled - made
        losses = {"reconstruction": off.square().sum(dim=1).mean()} | self._penalties(scaled, f, p, off, gradients)
        return SAEOutput(made / self.scale, f, losses)

    def _own(self, x: Tensor) -> Tensor:
        """Activations in the weights' precision, whatever the model's is."""
        if x.shape[-1] != self.d:
            raise InputError(f"the dictionary has width {self.d}, the activations {x.shape[-1]}")
        return x.to(self.W_dec.dtype)

    def _codes(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and what came before they were made sparse (of "gated" the gate)."""
        q = scaled @ self.W_enc - self.b_dec @ self.W_enc  # the second term once, not once a row
        if self.kind == "gated":
            gate = q + self.b_gate
            return (gate > 0) * torch.relu(q * self.r_mag.exp() + self.b_mag), gate
        p = q + self.b_enc
        f = torch.relu(p)
        if self.kind == "topk" and self.k is not None and self.k < self.n_latents:
            f = _largest(f, self.k)
        return f, p

    def _penalties(
        self, scaled: Tensor, f: Tensor, p: Tensor, off: Tensor, gradients: Tensor | None
    ) -> dict[str, Tensor]:
        if self.kind == "topk":
            return {"dead": self._revival(p, off)} if bool(self.dead.any()) else {}
        if self.kind == "gated":
            gate = torch.relu(p)
            by_gate = gate @ self.W_dec.detach() + self.b_dec.detach()
            return {
                "sparsity": self.l1 * gate.sum(dim=1).mean(),
                "gate": (scaled - by_gate).square().sum(dim=1).mean(),
            }
        parts = {"sparsity": self.l1 * f.sum(dim=1).mean()}
        if self.kind == "attribution":
            if gradients is None:
                raise InputError("the kind 'attribution' needs the outcome's gradients by the activations")
            if gradients.shape != scaled.shape:
                raise InputError(f"gradients have shape {tuple(gradients.shape)}, activations {tuple(scaled.shape)}")
            parts["attribution"] = self.l1 * (f * (gradients @ self.W_dec.T)).abs().sum(dim=1).mean()
            parts["unexplained"] = (off * gradients).sum(dim=1).abs().mean()
        return parts

    def _revival(self, p: Tensor, off: Tensor) -> Tensor:
        """|e - e_hat|^2 of the error e, explained by the dead latents alone, d/2 of them at most."""
        few = min(int(self.dead.sum()), max(1, self.d // 2))
        codes = _largest(torch.relu(p[:, self.dead]), few)
        return _AUXILIARY * (off.detach() - codes @ self.W_dec[self.dead]).square().sum(dim=1).mean()


def _largest(f: Tensor, k: int) -> Tensor:
    """f with all but the k largest of each row set to 0."""
    values, places = f.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(f).scatter(-1, places, values)
