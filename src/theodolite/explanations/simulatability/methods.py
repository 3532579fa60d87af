"""Five explanations of one answer as people read them: LIME, anchor, decision boundary, prototype and all of them.

LIME        weights w of the values of an input: ridge on z_i in {0, 1} (value kept), weighted by exp(-||1 - z||^2 / width^2)
anchor      a rule under which the answer stays, with its precision and coverage
boundary    the steps of the smallest known change that flips the answer, each with the evidence log(p_1 / p_0)
prototype   the nearest prototype side by side, and what the input's values add to the answer

An explainer is made without a model (`Lime(top=5)`), and `explainer.bind(protocol)` gives one that explains its model.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 3).
"""

__all__ = ["Anchor", "Attribution", "Composite", "DecisionBoundary", "Explanation", "Lime", "Prototype", "Shuffled"]

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.stats import spearmanr
from torch import nn

from theodolite.core.errors import InputError
from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import attribute
from theodolite.explanations.simulatability.anchors import find_rule
from theodolite.explanations.simulatability.protocol import SimulationProtocol, positive
from theodolite.explanations.simulatability.prototype_network import PrototypeNetwork

Slots = Int[np.ndarray, " slot"]
_IMPUTED = 50
_EPOCHS = 60  # to a model's own answers, which have no noise, a network fits soon


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a reader is shown about one answer: ``text``, and what a program reads of it.

    answer: class 0 or 1; probability: of class 1. weights: column of a value -> evidence for class 1, those shown. rule:
    columns that keep the answer. path: codes of the inputs on the way over the boundary, the last one flips. neighbours:
    (codes, class) of shown examples. stability: mean rank agreement of weights over seeds; precision, coverage: of the rule.
    """

    text: str
    answer: int
    probability: float
    weights: Mapping[int, float] = field(default_factory=dict)
    rule: tuple[int, ...] | None = None
    path: tuple[Slots, ...] = ()
    neighbours: tuple[tuple[Slots, int], ...] = ()
    stability: float | None = None
    precision: float | None = None
    coverage: float | None = None

    @property
    def html(self) -> str:
        """The text for a page, escaped."""
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True, eq=False)
class Explainer(ABC):
    """Base of the explainers; seed: of their samples. Equal seeds give equal explanations, whatever was explained before."""

    protocol: SimulationProtocol | None = None
    seed: int = field(default=0, kw_only=True)

    @property
    def name(self) -> str:
        """What the method is called in tables."""
        return {"DecisionBoundary": "boundary"}.get(type(self).__name__, type(self).__name__.lower())

    def bind(self, protocol: SimulationProtocol) -> "Explainer":
        """The same explainer for the model and data of ``protocol``."""
        return replace(self, protocol=protocol)

    @property
    def on(self) -> SimulationProtocol:
        """The protocol; InputError where none is bound."""
        if self.protocol is None:
            raise InputError(f"{type(self).__name__} knows no model yet; use explainer.bind(protocol)")
        return self.protocol

    def explain(self, x: Any) -> Explanation:
        """Explain the model's answer on one raw input; a row of a data frame is read by the names of its columns."""
        domain = self.on.domain
        x = domain.in_order(x)
        rows = [x] if self.on.kind == "text" else domain.as_rows([x])  # type: ignore[attr-defined]
        codes = domain.encode(rows)[0]
        probability = float(positive(self.on.model, rows)[0])
        return self._explain(codes, x, probability)

    @abstractmethod
    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation: ...

    def _label(self, probability: float) -> str:
        return self.on.labels[int(probability > 0.5)]

    def _rng(self, offset: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, offset])


def evidence(probability: Any) -> Any:
    """log(p_1 / p_0), with p kept off 0 and 1 by 1e-9."""
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(p / (1 - p))


@dataclass(frozen=True, eq=False)
class Lime(Explainer):
    """Locally weighted ridge; the ``top`` strongest values are shown. stability: seeds to tell rank agreement over, 0 for none.

    samples: inputs drawn. width: of the kernel, in units of the root of the number of values.

    Source: Hase, Bansal, 2020, arXiv:2005.01831; Ribeiro, Singh, Guestrin, 2016, arXiv:1602.04938.
    """

    top: int = field(default=5, kw_only=True)
    samples: int = field(default=500, kw_only=True)
    width: float = field(default=0.75, kw_only=True)
    ridge: float = field(default=1.0, kw_only=True)
    stability: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.top < 1 or self.samples < 10 or not self.width > 0 or not self.ridge > 0 or self.stability < 0:
            raise InputError("need top >= 1, samples >= 10, width > 0, ridge > 0, stability >= 0")

    def fit(self, codes: Slots, x: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """(columns, weights, intercept) of the surrogate of the probability of class 1."""
        domain = self.on.domain
        columns = np.unique(domain.columns(codes[None])[0])
        columns = columns[columns >= 0]
        drawn = domain.switched(codes, self.samples, rng)
        drawn[0] = codes
        z = domain.one_hot(drawn)[:, columns]
        p = self.on.answer(drawn, x)
        near = np.exp(-((1 - z) ** 2).sum(axis=1) / (self.width**2 * max(1, len(columns))))
        mean, centre = near @ z / near.sum(), near @ p / near.sum()
        away = z - mean
        gram = (away * near[:, None]).T @ away + self.ridge * np.eye(len(columns))
        weights = np.linalg.solve(gram, (away * near[:, None]).T @ (p - centre))
        return columns, weights, float(centre - mean @ weights)

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        columns, weights, start = self.fit(codes, x, self._rng())
        order = np.argsort(-np.abs(weights), kind="stable")[: self.top]
        order = order[np.argsort(-weights[order], kind="stable")]
        agreement = None
        if self.stability > 1 and len(columns) > 1:
            fits = [self.fit(codes, x, self._rng(1 + i))[1] for i in range(self.stability)]
            found: Any = spearmanr(np.abs(fits), axis=1)
            ranks = np.atleast_2d(found.statistic)
            pairs = ranks[np.triu_indices(len(fits), 1)] if ranks.shape[0] == len(fits) else ranks.ravel()
            agreement = float(pairs.mean())
        return weighed(self, columns[order], weights[order], probability, agreement, start + float(weights.sum()))


def weighed(
    explainer: Explainer,
    columns: np.ndarray,
    weights: np.ndarray,
    probability: float,
    agreement: float | None,
    fitted: float,
) -> Explanation:
    """An explanation by weights: evidence for class 1 in units of its probability."""
    names, one = explainer.on.domain.names, explainer.on.labels[1]
    lines = [f"Evidence for {one!r}:", *(f"{names[c]} | {w:+.2f}" for c, w in zip(columns, weights, strict=True))]
    lines.append(f"Baseline: {fitted - weights.sum():.2f}\nTotal evidence: {probability:.2f}")
    if agreement is not None:
        lines.append(f"Rank agreement over seeds: {agreement:.2f}")
    kept = {int(c): float(w) for c, w in zip(columns, weights, strict=True)}
    return Explanation("\n".join(lines), int(probability > 0.5), probability, weights=kept, stability=agreement)


@dataclass(frozen=True, eq=False)
class Attribution(Explainer):
    """Weights of one of the methods of `theodolite.explanations.local_approximation`, for numeric tables.

    method: "KernelSHAP", "Occlusion", "Integrated Gradients", ...; features go back to the mean of X. Weights per unit of a
    feature (SmoothGrad, C-LIME, Vanilla Gradients) are multiplied by the feature's distance from that mean.
    """

    method: str = field(default="KernelSHAP", kw_only=True)
    top: int = field(default=5, kw_only=True)

    @property
    def name(self) -> str:
        """The attribution method's own name."""
        return self.method

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        if self.on.kind != "tabular" or not isinstance(self.on.X, np.ndarray) or self.on.X.dtype.kind not in "fiub":
            raise InputError(f"{self.method} moves numbers; these inputs are not a table of numbers")
        rows = self.on.X.astype(np.float64)
        mean = torch.as_tensor(rows.mean(axis=0))
        model = self.on.model
        if isinstance(model, nn.Module):
            view: Any = ModelView(model)
            target = 1 if view(torch.as_tensor(rows[:1]).float()).shape[1] == 2 else 0
        else:
            view, target = (lambda batch: torch.as_tensor(positive(model, batch.numpy()))), 0
        point = torch.as_tensor(np.asarray(x, dtype=np.float64))[None]
        options: dict[str, Any] = {"seed": self.seed}
        additive = self.method.casefold().replace("-", "") in ("smoothgrad", "clime", "vanilla gradients")
        if not additive:
            options["baseline"] = mean
        if isinstance(view, ModelView):
            point, mean = point.float(), mean.float()
            options |= {} if additive else {"baseline": mean}
        found = attribute(self.method, view, point, target, **options).weights[0].double().numpy()
        if additive:
            found = found * (point - mean)[0].double().numpy()
        columns = self.on.domain.columns(codes[None])[0]
        order = np.argsort(-np.abs(found), kind="stable")[: self.top]
        order = order[np.argsort(-found[order], kind="stable")]
        return weighed(self, columns[order], found[order], probability, None, probability)


@dataclass(frozen=True, eq=False)
class Anchor(Explainer):
    """A rule that keeps the answer with at least ``precision``. beam, delta, tolerance, gap, batch: of the search.

    A condition on a number names a bin, so numbers are drawn from all of it, not kept at the input's own. Near a boundary no
    rule may be that precise; the explanation then says so, and its ``precision`` is that of all conditions together.

    Source: Hase, Bansal, 2020, arXiv:2005.01831; Ribeiro, Singh, Guestrin, 2018, AAAI.
    """

    precision: float = field(default=0.95, kw_only=True)
    beam: int = field(default=10, kw_only=True)
    delta: float = field(default=0.05, kw_only=True)
    tolerance: float = field(default=0.1, kw_only=True)
    gap: float = field(default=0.05, kw_only=True)
    batch: int = field(default=50, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.precision < 1 or self.beam < 1 or not 0 < self.delta < 1 or self.batch < 1:
            raise InputError("need precision and delta between 0 and 1, beam and batch at least 1")

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        on, rng, answer = self.on, self._rng(), probability > 0.5
        columns = on.domain.columns(codes[None])[0]

        def draw(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            drawn = on.domain.background(codes, keep, rng)
            kept = drawn == codes if on.domain.one_by_one else keep
            return (on.answer(drawn, x, rng) > 0.5) == answer, kept

        def covered(rule: tuple[int, ...]) -> float:
            return float(on.domain.holds([int(columns[s]) for s in rule], on.codes).mean())

        found = find_rule(
            draw, covered, on.domain.changeable(codes), len(codes), precision=self.precision, beam=self.beam,
            delta=self.delta, tolerance=self.tolerance, gap=self.gap, batch=self.batch,
        )  # fmt: skip
        rule, label = tuple(int(columns[s]) for s in found.slots), self._label(probability)
        lines = [
            f"Conditions for the model answering {label!r}:" if found.reached
            else f"No conditions keep the answer {label!r} in {100 * self.precision:g} % of cases, not even all of them:"
        ]  # fmt: skip
        lines += [f"{i}. {on.domain.names[c]}" for i, c in enumerate(rule, 1)]
        lines.append(
            f"They keep the answer in {100 * found.precision:.0f} % of cases, and hold on {100 * found.coverage:.1f} % of inputs "
            f"({len(rule)} {'condition' if len(rule) == 1 else 'conditions'})."
        )
        return Explanation(
            "\n".join(lines), int(answer), probability, rule=rule, precision=found.precision, coverage=found.coverage
        )


@dataclass(frozen=True, eq=False)
class DecisionBoundary(Explainer):
    """Steps over the boundary. Of ``samples`` perturbations that flip the answer the one with the fewest edits is taken, plus
    the squared distance of ``latent`` (rows the model takes -> (n, k); None: the two probabilities); its edits are ordered
    so that each step changes the evidence least, and the last ``steps`` are shown. most: edits, doubled until one flips.
    """

    samples: int = field(default=10_000, kw_only=True)
    steps: int = field(default=4, kw_only=True)
    most: int = field(default=3, kw_only=True)
    latent: Any = field(default=None, kw_only=True)

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        on, rng, answer = self.on, self._rng(), probability > 0.5
        most, slots = self.most, len(on.domain.changeable(codes))
        path: tuple[Slots, ...] = ()
        while slots:
            tried = np.unique(on.domain.perturb(codes, self.samples, rng, most=most), axis=0)
            p = on.answer(tried, x)
            flips = np.flatnonzero((p > 0.5) != answer)
            if len(flips):
                best = self._nearest(codes, tried[flips], p[flips], x, probability)
                path = self._ordered(codes, tried[flips[best]], x)
                break
            if most >= slots:
                break
            most = min(2 * most, slots)
        lines = [f"Evidence for {on.labels[1]!r}: {evidence(probability):+.2f}"]
        if path:
            lines.append(f"Edits that change the answer to {on.labels[int(not answer)]!r}:")
            margins = evidence(on.answer(np.stack(path), x))
            for i, (step, margin) in enumerate(zip(path, margins, strict=True), 1):
                lines.append(f"Step {i}, evidence {margin:+.2f}:\n{on.domain.change(codes, step)}")
        else:
            lines.append("No small edit was found that changes the answer.")
        return Explanation("\n".join(lines), int(answer), probability, path=path)

    def _nearest(self, codes: Slots, found: np.ndarray, p: np.ndarray, x: Any, probability: float) -> int:
        edits = (found != codes).sum(axis=1)
        if self.latent is None:
            away = 2 * (p - probability) ** 2
        else:
            places = np.asarray(self.latent(self.on.domain.realise(np.vstack([codes, found]), x)), dtype=np.float64)
            away = ((places[1:] - places[0]) ** 2).sum(axis=1)
        return int((edits + away).argmin())

    def _ordered(self, codes: Slots, end: Slots, x: Any) -> tuple[Slots, ...]:
        here, left, path = codes.copy(), np.flatnonzero(codes != end), []
        now = evidence(self.on.answer(here[None], x))[0]
        while len(left):
            options = np.tile(here, (len(left), 1))
            options[np.arange(len(left)), left] = end[left]
            margins = evidence(self.on.answer(options, x))
            best = int(np.abs(margins - now).argmin())
            here, now, left = options[best], margins[best], np.delete(left, best)
            path.append(here)
        return tuple(path[-self.steps :])


@dataclass(frozen=True, eq=False)
class Prototype(Explainer):
    """The nearest prototype of the answer's class beside the input, and what the input's values add.

    network: a fitted `PrototypeNetwork` over the one-hot codes of the protocol's `pool`; None: one is fitted there to the
    model's own answers when bound, so that no tested input is ever shown. importance: prediction minus the prediction with the
    feature imputed (its value drawn as it comes, 50 times).
    """

    network: PrototypeNetwork | None = field(default=None, kw_only=True)
    per_class: int = field(default=20, kw_only=True)
    top: int = field(default=6, kw_only=True)

    def bind(self, protocol: SimulationProtocol) -> "Explainer":
        """Fit the network on the protocol's pool where none is given."""
        network = self.network
        if network is None:
            pool = protocol.pool
            fewest = int(np.bincount(protocol.outputs[pool], minlength=2).min())
            network = PrototypeNetwork(
                min(self.per_class, max(1, fewest // 2)),
                epochs=_EPOCHS,
                push_from=_EPOCHS // 2,
                lr=0.01,
                seed=self.seed,
            )
            network.fit(protocol.domain.one_hot(protocol.codes[pool]), protocol.outputs[pool])
        return replace(self, protocol=protocol, network=network)

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        on, answer = self.on, int(probability > 0.5)
        if self.network is None:
            raise InputError("Prototype has no network yet; use explainer.bind(protocol)")
        likeness, own = self.network.similarities(on.domain.one_hot(codes[None]))[0], self.network.prototype_classes_
        best = int(np.where(own == answer, likeness, -np.inf).argmax())
        row = int(on.pool[self.network.prototypes_[best]])
        shown = on.codes[row]
        rng, columns = self._rng(), on.domain.columns(codes[None])[0]
        free = on.domain.changeable(codes)
        keep = np.repeat(np.arange(len(codes)) != free[:, None], _IMPUTED, axis=0)
        without = on.answer(on.domain.background(codes, keep, rng), x).reshape(len(free), -1).mean(axis=1)
        added = {int(columns[slot]): float(probability - p) for slot, p in zip(free, without, strict=True)}
        strongest = sorted(added, key=lambda c: -abs(added[c]))[: self.top]
        lines = [f"Nearest prototype (answer {on.labels[answer]!r}), similarity {likeness[best]:.2f}"]
        lines += ["Prototype:", on.domain.show(shown), "This input:", on.domain.show(codes), "Informative values:"]
        lines += [f"{on.domain.names[c]} | {added[c]:+.2f}" for c in sorted(strongest, key=lambda c: -added[c])]
        return Explanation("\n".join(lines), answer, probability, neighbours=((shown, answer),))


@dataclass(frozen=True, eq=False)
class Composite(Explainer):
    """LIME and the anchor in one panel, the last step over the boundary and the nearest prototype in the other."""

    parts: tuple[Explainer, ...] = field(
        default=(Lime(), Anchor(), DecisionBoundary(steps=1), Prototype()), kw_only=True
    )

    def bind(self, protocol: SimulationProtocol) -> "Explainer":
        """All parts bound to the protocol."""
        parts = tuple(replace(part, seed=self.seed).bind(protocol) for part in self.parts)
        return replace(self, protocol=protocol, parts=parts)

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        found = [part._explain(codes, x, probability) for part in self.parts]
        rules = [one for one in found if one.rule is not None]
        return Explanation(
            "\n----\n".join(one.text for one in found), int(probability > 0.5), probability,
            weights={c: w for one in found for c, w in one.weights.items()},
            rule=rules[0].rule if rules else None,
            path=next((one.path for one in found if one.path), ()),
            neighbours=tuple(pair for one in found for pair in one.neighbours),
            precision=rules[0].precision if rules else None,
            coverage=rules[0].coverage if rules else None,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shuffled(Explainer):
    """The control: explanations by weights, whose weights stand beside other values of the same input, at random."""

    of: Explainer = field(default=Lime(), kw_only=True)

    @property
    def name(self) -> str:
        """The method's name, shuffled."""
        return f"shuffled {self.of.name}"

    def bind(self, protocol: SimulationProtocol) -> "Explainer":
        """The explainer that is shuffled, bound to the protocol."""
        return replace(self, protocol=protocol, of=self.of.bind(protocol))

    def _explain(self, codes: Slots, x: Any, probability: float) -> Explanation:
        found = self.of._explain(codes, x, probability)
        if not found.weights:
            raise InputError(f"only explanations by weights can be shuffled; {self.of.name} has none")
        rng = np.random.default_rng([self.seed, *np.maximum(codes, 0).tolist()])
        columns = self.on.domain.columns(codes[None])[0]
        columns = np.unique(columns[columns >= 0])
        taken = rng.choice(columns, len(found.weights), replace=False)
        weights = rng.permutation(np.array(list(found.weights.values())))
        return weighed(self, taken, weights, probability, None, probability)
