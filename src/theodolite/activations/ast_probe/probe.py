"""The probe: one orthogonal projection of word vectors in which the whole labelled tree can be read."""

__all__ = ["ASTProbe", "Check"]

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional

from theodolite.activations.ast_probe.states import AlignmentError
from theodolite.activations.ast_probe.trees import (
    EMPTY,
    F1,
    SyntaxTree,
    TreeScores,
    score_trees,
    tree_to_tuple,
    tuple_to_tree,
)
from theodolite.core.errors import DataError, InputError, TrainingCollapsedError
from theodolite.core.memory import chunks

_EVERY = 50  # steps between two looks at the validation loss where an epoch has fewer
_IGNORED = -100
_SMALLEST_RATE = 2.0**-10
_HELD_OUT = 0.1
_INIT = 0.05


@dataclass(frozen=True)
class Check:
    """One look during training: the steps made, both losses (penalty included), the learning rate."""

    step: int
    training_loss: float
    validation_loss: float
    lr: float


@dataclass(frozen=True, eq=False)
class _Corpus:
    """Word vectors of all snippets one after the other, and the numbers of their trees, padded.

    d is 0 and c and u are -100 where there is nothing.
    """

    states: Float[Tensor, "word width"]
    first: Int[Tensor, " snippet"]
    words: Int[Tensor, " snippet"]
    d: Float[Tensor, "snippet gap"]
    c: Int[Tensor, "snippet gap"]
    u: Int[Tensor, "snippet longest"]

    def __len__(self) -> int:
        return len(self.words)


class ASTProbe(BaseEstimator):
    """Reads the labelled tree of a snippet from its word vectors h_i, through s_i = B h_i with B (rank, width) orthonormal.

        distance of neighbours   d_i = ||s_i - s_{i+1}||^2      ordered like the heights of their lowest common node
        its label                c_i = argmax_k <s_{i+1} - s_i, C_k>
        labels above a word      u_i = argmax_k <s_i, U_k>
        loss = rank loss of d (hinge, margin 1, over pairs of different height) + cross entropy of c and of u
               + orthogonality ||B B^T - 1||_F^2

    Adam; the learning rate falls where the validation loss does not improve, and the checkpoint of the best one is kept. Where
    max_epochs make fewer than min_steps steps, min_steps are made, the validation loss is looked at every 50, and the rate is
    halved (else every epoch, and divided by 10; training ends after ``patience`` looks without improvement).

    normalise: "rms" scales each vector to norm scale x sqrt(width), "zscore" each coordinate to deviation ``scale`` on the
    training words, None leaves them. An orthonormal B cannot rescale its input and the hinge has margin 1, so it is the scale
    that decides; states of decoders have norms from 2 to 25,000. max_pairs: of d that one step compares; None: all.

    Fitted: basis_ (rank, width), label_vectors_ {"c", "u"} and labels_ {"c", "u"} (one a row), orthogonality_error_ (largest
    |B B^T - 1|), history_. The subspace is a dictionary of hidden space: `directions`, `encode`, `decode`.

    Source: Hernández López, Weyssow, Sánchez Cuadrado, Sahraoui, 2022, arXiv:2206.11719, section 3.
    """

    def __init__(
        self,
        rank: int = 128,
        orthogonality: float = 5.0,
        lr: float = 1e-3,
        batch_size: int = 32,
        max_epochs: int = 20,
        min_steps: int = 1500,
        patience: int = 5,
        normalise: Literal["rms", "zscore"] | None = "rms",
        scale: float = 0.25,
        max_pairs: int | None = None,
        random_state: int = 42,
    ) -> None:
        self.rank = rank
        self.orthogonality = orthogonality
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.min_steps = min_steps
        self.patience = patience
        self.normalise = normalise
        self.scale = scale
        self.max_pairs = max_pairs
        self.random_state = random_state

    # ---- fitting

    def fit(
        self,
        hidden: Sequence[Float[Tensor, "_ _"]],
        trees: Sequence[SyntaxTree],
        validation: tuple[Sequence[Float[Tensor, "_ _"]], Sequence[SyntaxTree]] | None = None,
    ) -> "ASTProbe":
        """Learn B, C and U of word vectors ``hidden`` [(words, width), ...] and the trees over the same words.

        validation: (hidden, trees) that choose the checkpoint; where None a tenth of the snippets, by random_state. Snippets
        with no vectors (left out by `word_states`) are left out.

        Raises AlignmentError where a snippet has not one vector a word, InputError for a rank above the width or an option out
        of range, DataError for vectors that are not finite or too few snippets, TrainingCollapsedError where the loss is not
        finite.
        """
        return self._fit(hidden, trees, validation, None)

    def transfer(
        self,
        hidden: Sequence[Float[Tensor, "_ _"]],
        trees: Sequence[SyntaxTree],
        validation: tuple[Sequence[Float[Tensor, "_ _"]], Sequence[SyntaxTree]] | None = None,
    ) -> "ASTProbe":
        """A new probe with this one's subspace, whose label vectors alone are learned on other trees (another language).

        Arguments and errors as of `fit`.
        """
        check_is_fitted(self)
        return ASTProbe(**self.get_params())._fit(hidden, trees, validation, self)

    def _fit(
        self,
        hidden: Sequence[Tensor],
        trees: Sequence[SyntaxTree],
        validation: tuple[Sequence[Tensor], Sequence[SyntaxTree]] | None,
        subspace: "ASTProbe | None",
    ) -> "ASTProbe":
        self._check_options()
        vectors, kept = _aligned(hidden, trees)
        width = vectors[0].shape[1]
        if self.rank > width:
            raise InputError(
                f"rank {self.rank} is more than the {width} dimensions of the vectors; choose rank <= {width}"
            )
        generator = torch.Generator().manual_seed(self.random_state)
        if validation is None:
            if len(kept) < 2:
                raise DataError("need at least two snippets, one to learn from and one to choose the checkpoint by")
            order = torch.randperm(len(kept), generator=generator).tolist()
            out = max(1, round(_HELD_OUT * len(kept)))
            held = ([vectors[i] for i in order[:out]], [kept[i] for i in order[:out]])
            vectors, kept = [vectors[i] for i in order[out:]], [kept[i] for i in order[out:]]
        else:
            held = _aligned(*validation)
        if held[0][0].shape[1] != width:
            raise InputError(f"the vectors have width {width}, those of the validation {held[0][0].shape[1]}")
        self._learn_scale(vectors)
        tuples = [tree_to_tuple(tree) for tree in kept]
        self.labels_ = {
            part: [EMPTY, *sorted({label for one in tuples for label in getattr(one, part)} - {EMPTY})] for part in "cu"
        }
        sizes = ((self.rank, width), *((len(self.labels_[part]), self.rank) for part in "cu"))
        weights = [((torch.rand(size, generator=generator) * 2 - 1) * _INIT).to(vectors[0]) for size in sizes]
        free = weights
        if subspace is not None:
            if subspace.n_features_in_ != width:
                raise InputError(f"the subspace lies in {subspace.n_features_in_} dimensions, the vectors in {width}")
            self.centre_ = subspace.centre_
            if self.normalise == "zscore":
                self._deviation = subspace._deviation
            weights[0] = subspace.basis_.to(vectors[0])
            free = weights[1:]
        self._train(self._corpus(vectors, kept), self._corpus(*held), weights, free, generator)
        return self

    def _check_options(self) -> None:
        whole = {name: getattr(self, name) for name in ("rank", "batch_size", "max_epochs", "min_steps", "patience")}
        wrong = [name for name, value in whole.items() if value < 1]
        wrong += [name for name in ("lr", "scale") if not 0 < getattr(self, name) < math.inf]
        if self.max_pairs is not None and self.max_pairs < 1:
            wrong.append("max_pairs")
        if wrong or not 0 <= self.orthogonality < math.inf:
            raise InputError(f"{', '.join(wrong) or 'orthogonality'} of the probe must be positive; got {self}")
        if self.normalise not in (None, "rms", "zscore"):
            raise InputError(f"normalise is None, 'rms' or 'zscore', got {self.normalise!r}")

    def _train(
        self,
        train: _Corpus,
        check: _Corpus,
        weights: list[Tensor],
        free: list[Tensor],
        generator: torch.Generator,
    ) -> None:
        device = weights[0].device
        for weight in free:
            weight.requires_grad_()
        optimiser = torch.optim.Adam(free, lr=self.lr)
        steps = self.max_epochs * math.ceil(len(train) / self.batch_size)
        few = steps < self.min_steps
        every = _EVERY if few else math.ceil(len(train) / self.batch_size)
        best, best_weights, waited = math.inf, weights, 0
        history, since = list[Check](), 0.0
        batches = self._batches(len(train), generator)
        total = max(steps, self.min_steps)
        with torch.enable_grad():
            for step in range(1, total + 1):
                loss = self._loss(train, next(batches).to(device), weights, generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                since += float(loss.detach())
                if step % every and step != total:
                    continue
                with torch.no_grad():
                    value = float(self._whole_loss(check, weights))
                done = step % every or every
                rate = optimiser.param_groups[0]["lr"]
                history.append(Check(step, since / done, value, rate))
                since = 0.0
                if not math.isfinite(value):
                    raise TrainingCollapsedError(
                        f"the probe's loss is {value} after {step} steps; lower lr, or normalise='rms' where vectors are large"
                    )
                if value < best:
                    best, waited = value, 0
                    best_weights = [weight.detach().clone() for weight in weights]
                else:
                    waited += 1
                    optimiser.param_groups[0]["lr"] = rate * (0.5 if few else 0.1)
                # where the rate is spent further steps change nothing
                if rate < self.lr * _SMALLEST_RATE or (not few and waited >= self.patience and step >= self.min_steps):
                    break
        self.basis_, c, u = best_weights
        self.label_vectors_ = {"c": c, "u": u}
        self.history_ = tuple(history)
        self.n_features_in_ = self.basis_.shape[1]
        gram = self.basis_ @ self.basis_.T
        self.orthogonality_error_ = float((gram - torch.eye(len(gram), device=device)).abs().max())

    def _batches(self, n: int, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(n, generator=generator).split(self.batch_size)

    def _corpus(self, vectors: list[Tensor], trees: list[SyntaxTree]) -> _Corpus:
        words = torch.tensor([len(v) for v in vectors])
        longest = int(words.max())
        place = {part: {label: k for k, label in enumerate(self.labels_[part])} for part in "cu"}
        d = torch.zeros(len(trees), longest - 1)
        c, u = (torch.full((len(trees), size), _IGNORED) for size in (longest - 1, longest))
        for i, tree in enumerate(trees):
            own = tree_to_tuple(tree)
            n = len(own.d)
            d[i, :n] = torch.tensor(own.d, dtype=torch.float32)
            # a label that training does not know (validation) has no vector to be taught
            c[i, :n] = torch.tensor([place["c"].get(label, _IGNORED) for label in own.c], dtype=torch.long)
            u[i, : n + 1] = torch.tensor([place["u"].get(label, _IGNORED) for label in own.u])
        states = self._scaled(torch.cat(vectors))
        device = states.device
        return _Corpus(states, *(t.to(device) for t in (words.cumsum(0) - words, words, d, c, u)))

    def _whole_loss(self, corpus: _Corpus, weights: list[Tensor]) -> Tensor:
        """The loss of all snippets, in chunks: a mean of chunks weighted by their snippets."""
        n, gaps = len(corpus), corpus.d.shape[1]
        parts = chunks(n, 16.0 * gaps * gaps + 4.0 * (gaps + 1) * (corpus.states.shape[1] + 3 * self.rank), 1 << 28)
        every = torch.arange(n, device=corpus.words.device)
        losses = [(self._loss(corpus, every[part], weights, None), len(every[part])) for part in parts]
        return torch.stack([loss * size for loss, size in losses]).sum() / n

    def _loss(
        self, corpus: _Corpus, batch: Int[Tensor, " b"], weights: list[Tensor], generator: torch.Generator | None
    ) -> Float[Tensor, ""]:
        basis, C, U = weights
        words = corpus.words[batch]
        longest = int(words.max())
        there = torch.arange(longest, device=words.device) < words[:, None]
        rows = (corpus.first[batch, None] + torch.arange(longest, device=words.device))[there]
        s = corpus.states[rows] @ basis.T
        steps = s[1:] - s[:-1]  # those from one snippet to the next are not looked at
        inside = there[:, 1:]
        gap = torch.zeros(there.shape, dtype=torch.bool, device=words.device)
        gap[:, :-1] = inside
        gap = gap[there][:-1]
        loss = _cross_entropy(s @ U.T, corpus.u[batch, :longest][there])
        if bool(inside.any()):
            steps = steps[gap]
            loss = loss + _cross_entropy(steps @ C.T, corpus.c[batch, : longest - 1][inside])
            d_hat = torch.zeros(inside.shape, device=s.device).masked_scatter(inside, steps.square().sum(dim=1))
            loss = loss + self._rank_loss(corpus.d[batch, : longest - 1], d_hat, inside, generator)
        gram = basis @ basis.T
        return loss + self.orthogonality * (gram - torch.eye(len(gram), device=gram.device)).square().sum()

    def _rank_loss(
        self,
        d: Float[Tensor, "b gap"],
        d_hat: Float[Tensor, "b gap"],
        inside: Bool[Tensor, "b gap"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, ""]:
        """Mean of ReLU(1 - (d^_i - d^_j)) over the ordered pairs of a snippet with d_i > d_j, all snippets together."""
        n, gaps = d.shape
        if generator is not None and self.max_pairs is not None and n * gaps * gaps > self.max_pairs:
            size = (n, 2, math.ceil(self.max_pairs / n))
            drawn = (torch.rand(size, generator=generator).to(d.device) * inside.sum(dim=1)[:, None, None]).long()
            one, two = drawn.unbind(dim=1)
            sign = (d.gather(1, one) - d.gather(1, two)).sign()
            terms = functional.relu(1 - sign * (d_hat.gather(1, one) - d_hat.gather(1, two)))
            pairs = sign != 0
        else:
            terms = functional.relu(1 - (d_hat[:, :, None] - d_hat[:, None, :]))
            pairs = (d[:, :, None] > d[:, None, :]) & inside[:, None, :]
        return (terms * pairs).sum() / pairs.sum().clamp(min=1)

    # ---- the scale of the input

    def _learn_scale(self, vectors: list[Tensor]) -> None:
        rows = torch.cat(vectors)
        self.centre_ = rows.double().mean(dim=0).to(rows.dtype)
        if self.normalise == "zscore":
            deviation = rows.double().std(dim=0, correction=0).to(rows.dtype)
            self._deviation = torch.where(deviation > 0, deviation, 1.0)

    def _scaled(self, rows: Float[Tensor, "word width"]) -> Float[Tensor, "word width"]:
        if self.normalise == "rms":
            # in float64, where no square over- or underflows; a vector of zeros has no direction and stays
            norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
            factor = self.scale * math.sqrt(rows.shape[1]) / torch.where(norm > 0, norm, 1.0)
            return rows * factor.to(rows.dtype)
        if self.normalise == "zscore":
            return (rows - self.centre_) / self._deviation * self.scale
        return rows

    # ---- answers

    @torch.no_grad()
    def predict(self, hidden: Sequence[Float[Tensor, "_ _"]], leaves: Sequence[Sequence[str]]) -> list[SyntaxTree]:
        """The tree of each snippet, over its words ``leaves``.

        Raises AlignmentError where a snippet has not one vector a word (none at all included).
        """
        check_is_fitted(self)
        if len(hidden) != len(leaves):
            raise InputError(f"got vectors of {len(hidden)} snippets and words of {len(leaves)}")
        made = []
        for i, (vectors, words) in enumerate(zip(hidden, leaves, strict=True)):
            _check_snippet(vectors, words, i, self.n_features_in_)
            s = self._scaled(vectors.to(self.basis_)) @ self.basis_.T
            steps = s[1:] - s[:-1]
            c = (steps @ self.label_vectors_["c"].T).argmax(dim=1).tolist()
            u = (s @ self.label_vectors_["u"].T).argmax(dim=1).tolist()
            known_c, known_u = self.labels_["c"], self.labels_["u"]
            d = steps.square().sum(dim=1)
            made.append(tuple_to_tree(d, [known_c[k] for k in c], [known_u[k] for k in u], words))
        return made

    def score_snippets(self, hidden: Sequence[Float[Tensor, "_ _"]], trees: Sequence[SyntaxTree]) -> TreeScores:
        """F1 of each snippet and the recall of each label; snippets with no vectors are left out."""
        check_is_fitted(self)
        vectors, kept = _aligned(hidden, trees)
        return score_trees(kept, self.predict(vectors, [tree.leaves for tree in kept]))

    def score(self, hidden: Sequence[Float[Tensor, "_ _"]], trees: Sequence[SyntaxTree]) -> F1:
        """Precision, recall and F1 of the labelled constituents, averaged over snippets."""
        return self.score_snippets(hidden, trees).mean

    def unseen_labels(self, trees: Sequence[SyntaxTree]) -> dict[str, int]:
        """Joined labels of ``trees`` that training had none of, and how often each occurs: all of them count as missed."""
        check_is_fitted(self)
        found: dict[str, int] = {}
        for one in map(tree_to_tuple, trees):
            for part in "cu":
                for label in getattr(one, part):
                    if label not in self.labels_[part]:
                        found[label] = found.get(label, 0) + 1
        return found

    # ---- a dictionary of hidden space

    @property
    def directions(self) -> Float[Tensor, "code width"]:
        """Orthonormal directions of hidden space that span what the probe reads; near the rows of the basis."""
        check_is_fitted(self)
        read = self.basis_ / self._deviation if self.normalise == "zscore" else self.basis_
        left, _, right = torch.linalg.svd(read, full_matrices=False)
        return left @ right

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row code"]:
        """Coordinates in the subspace, about the mean of the training words; vectors are not normalised here."""
        return (x - self.centre_) @ self.directions.mT

    def decode(self, codes: Float[Tensor, "*row code"]) -> Float[Tensor, "*row width"]:
        """The vectors of the subspace with these coordinates."""
        return codes @ self.directions + self.centre_


def _cross_entropy(logits: Float[Tensor, "row label"], targets: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Mean over the rows whose label is known, 0 where there is none."""
    total = functional.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="sum")
    return total / (targets != _IGNORED).sum().clamp(min=1)


def _aligned(hidden: Sequence[Tensor], trees: Sequence[SyntaxTree]) -> tuple[list[Tensor], list[SyntaxTree]]:
    """Float32 vectors and trees of the snippets that have vectors, each checked."""
    if len(hidden) != len(trees):
        raise InputError(f"got vectors of {len(hidden)} snippets and {len(trees)} trees")
    vectors, kept, width = list[Tensor](), list[SyntaxTree](), None
    for i, (own, tree) in enumerate(zip(hidden, trees, strict=True)):
        if own.ndim == 2 and len(own) == 0:
            continue
        width = own.shape[-1] if width is None else width
        _check_snippet(own, tree.leaves, i, width)
        vectors.append(own.detach().float())
        kept.append(tree)
    if not kept:
        raise DataError("no snippet has vectors")
    return vectors, kept


def _check_snippet(vectors: Tensor, words: Sequence[str], number: int, width: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise InputError(f"snippet {number} has vectors of shape {tuple(vectors.shape)}, expected (words, {width})")
    if len(vectors) != len(words):
        at = min(len(vectors), len(words))
        what = (
            f"the first without one is word {at} ({words[at]!r})" if at < len(words) else f"the first too many is {at}"
        )
        raise AlignmentError(
            f"snippet {number} ({' '.join(words)[:60]!r}) has {len(words)} words but {len(vectors)} vectors: {what}; feed the "
            "tree's leaves to word_states, not the source text"
        )
    if not bool(torch.isfinite(vectors).all()):
        row = int((~torch.isfinite(vectors).all(dim=1)).nonzero()[0])
        raise DataError(f"the vector of word {row} ({words[row]!r}) of snippet {number} is not finite")
