"""The three tests: approximation, sparse control, interpretability.

recovered = (O_recon - O_abl) / (O_clean - O_abl);  necessity = 1 - (O_nec - O_abl) / (O_clean - O_abl), where O_nec is the
outcome with a_bar + (x - x_hat) in place of x; effect of an edit = (O_clean - O_edit) / (O_clean - O_patch).

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366, sections 3 to 5.
"""

__all__ = ["evaluate_dictionary", "recovered_share"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from theodolite.activations.dictionary.autoencoder import SparseAutoencoder
from theodolite.activations.dictionary_evaluation.edits import Edit, aware_edit, greedy_edit, value_scores
from theodolite.activations.dictionary_evaluation.features import FeatureScores, feature_f1, feature_weights
from theodolite.activations.dictionary_evaluation.report import MOSTLY, DictionaryReport
from theodolite.activations.dictionary_evaluation.runs import Answers, Location, PatchedRuns
from theodolite.activations.dictionary_evaluation.supervised import SupervisedDictionary
from theodolite.activations.dictionary_evaluation.task import Task
from theodolite.core.dictionary import Dictionary, decoder_of, measure
from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate, bootstrap, proportion

_LEAST = 1e-3
_RESAMPLES = 400
_RANDOM_ON = 3


def recovered_share(
    with_it: Tensor | np.ndarray,
    clean: Tensor | np.ndarray,
    without: Tensor | np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Estimate:
    """(mean with_it - mean without) / (mean clean - mean without), with its interval over prompts, by ``groups`` where given.

    Raises InputError where clean and without differ by less than 1e-3 of the outcome's scale: there is no ratio then.

    >>> recovered_share(np.array([1.5, 1.5]), np.array([2.0, 2.0]), np.array([1.0, 1.0])).value
    0.5
    """
    rows = np.stack([np.asarray(values, dtype=np.float64) for values in (with_it, clean, without)], axis=1)
    scale = float(np.abs(rows[:, 1:]).mean())
    gap = float(rows[:, 1].mean() - rows[:, 2].mean())
    if abs(gap) < _LEAST * scale or gap == 0:
        raise InputError(
            f"the location does not matter for this outcome: it is {rows[:, 1].mean():.4g} as it is and {rows[:, 2].mean():.4g} "
            "with the activations replaced, so no share is told; choose other locations (locate) or another outcome"
        )

    def ratio(part: np.ndarray) -> float:
        mean = part.mean(axis=0)
        below = mean[1] - mean[2]
        return float((mean[0] - mean[2]) / below) if abs(below) > 1e-12 * scale else 0.0

    return bootstrap(rows, ratio, seed=seed, resamples=_RESAMPLES, groups=groups)


@dataclass(frozen=True, eq=False)
class _Site:
    """What is known of one location: dictionaries, and codes and scores on the prompts that were fitted."""

    location: Location
    dictionary: Dictionary
    supervised: SupervisedDictionary
    decoder: Tensor
    bias: Tensor
    scores: FeatureScores

    @property
    def mean(self) -> Tensor:
        return self.supervised.mean_.float()

    def by_value(self, attribute: str, values: Sequence[Any]) -> Tensor:
        """F1 of each feature for each row's value, 0 for a value that was not there when fitted."""
        table: Any = self.scores.f1[attribute]
        full = table.reindex(columns=list(dict.fromkeys([*table.columns, *values])), fill_value=0.0)
        places = torch.as_tensor(full.columns.get_indexer(pd.Index(list(values))).copy())
        return value_scores(torch.as_tensor(full.to_numpy(copy=True)).float(), places)


def evaluate_dictionary(
    model: nn.Module,
    task: Task,
    locations: Sequence[Location] | Location,
    dictionary: Dictionary | Sequence[Dictionary] | Mapping[Location, Dictionary],
    *,
    k_edit: Sequence[int] = (1, 2, 4),
    supervised: SupervisedDictionary
    | Sequence[SupervisedDictionary]
    | Mapping[Location, SupervisedDictionary]
    | None = None,
    fit: Task | None = None,
    attributes: Sequence[str] | None = None,
    interpretable: float = 0.8,
    max_group: int = 10,
    seed: int = 0,
    memory: int | None = None,
) -> DictionaryReport:
    """Score ``dictionary`` beside supervised codes on ``task``, at all ``locations`` at once.

    dictionary: one for each location, in their order or by location (one alone for a single location). fit: other prompts,
    from which means, supervised codes and the F1 that ranks features come; half of ``task`` where None, and the other half is
    scored. supervised: codes that are there already. attributes: to edit, all where None. k_edit: features that an edit changes.
    interpretable: F1 from which a feature counts.

    Edits keep the reconstruction's error in place. They are compared with patching in the counterfactual's activations, not with
    the label. Controls: mean ablation (0 by definition), shuffled attributes, no edit, supervised codes replaced by random
    ones of their norm, random unit directions in place of the dictionary's.

    Raises InputError where the locations do not matter for the outcome, where widths differ, and for a value that a
    counterfactual asks for and no fitted prompt had.
    """
    places = (locations,) if isinstance(locations, Location) else tuple(locations)
    learned = _aligned(places, dictionary, "dictionary")
    if not k_edit or min(k_edit) < 1:
        raise InputError(f"an edit changes at least one feature, got k_edit={tuple(k_edit)}")
    if fit is None:
        fit, task = task.split(0.5, seed=seed)
    edited = list(task.attributes.columns) if attributes is None else list(attributes)
    absent = [name for name in edited if name not in task.attributes.columns]
    if absent:
        raise InputError(
            f"there is no attribute {absent[0]!r}; there are: {', '.join(map(str, task.attributes.columns))}"
        )
    fitted = PatchedRuns(model, fit, places, memory=memory)
    runs = PatchedRuns(model, task, places, memory=memory)
    theirs = {}
    for name in edited:
        theirs[name] = counterfactual_runs(runs, name, seed=seed, memory=memory)
    return evaluate_runs(
        fitted, runs, theirs, dict(zip(places, learned, strict=True)), k_edit=k_edit, interpretable=interpretable,
        max_group=max_group, seed=seed,
        supervised=None if supervised is None else dict(
            zip(places, _aligned(places, supervised, "supervised dictionary"), strict=True)
        ),
    )  # fmt: skip


def counterfactual_runs(runs: PatchedRuns, attribute: str, *, seed: int = 0, memory: int | None = None) -> PatchedRuns:
    """The same model and locations on the counterfactual prompts of ``attribute``."""
    task = runs.task
    prompts, table = task.counterfactual(attribute, seed)
    varied = table.loc[:, [name for name in table.columns if len(set(table[name])) > 1]]
    other = Task(prompts, varied, task.counterfactual, task.outcome, task.positions)
    return PatchedRuns(runs.model, other, runs.locations, memory=memory)


def evaluate_runs(
    fitted: PatchedRuns,
    runs: PatchedRuns,
    theirs: Mapping[str, PatchedRuns],
    dictionaries: Mapping[Location, Dictionary],
    *,
    k_edit: Sequence[int],
    supervised: Mapping[Location, SupervisedDictionary] | None = None,
    interpretable: float = 0.8,
    max_group: int = 10,
    seed: int = 0,
) -> DictionaryReport:
    """`evaluate_dictionary` on open runs: of the prompts to fit on, of those to score, and of their counterfactuals by attribute.

    For several dictionaries of one model, whose runs then cost once. The locations are those of ``dictionaries``.
    """
    table = fitted.task.attributes
    sites = list[_Site]()
    for one, made in dictionaries.items():
        width = made.directions.shape[1]
        if width != fitted.states[one].shape[1]:
            raise InputError(
                f"the dictionary for {one} has width {width}, the activations there {fitted.states[one].shape[1]}"
            )
        code = SupervisedDictionary("mse").fit(fitted.states[one], table) if supervised is None else supervised[one]
        sites.append(_site(one, made, code, fitted.states[one], table, max_group))
    approximation = _approximation(runs, sites, interpretable, seed)
    random = [
        _site(
            site.location,
            _random_dictionary(site, seed + i),
            site.supervised,
            fitted.states[site.location],
            table,
            max_group,
        )
        for i, site in enumerate(sites)
    ]
    rows = []
    for attribute, other in theirs.items():
        rows += _control(runs, other, sites, random, attribute, k_edit, seed)
    return DictionaryReport(
        approximation, pd.DataFrame(rows), _interpretability(runs, sites, interpretable), interpretable
    )


def _aligned(places: tuple[Location, ...], given: Any, what: str) -> list[Any]:
    if isinstance(given, Mapping):
        missing = [str(one) for one in places if one not in given]
        if missing:
            raise InputError(f"there is no {what} for {', '.join(missing)}")
        return [given[one] for one in places]
    made = list(given) if isinstance(given, Sequence) else [given]
    if len(made) != len(places):
        raise InputError(f"{len(places)} locations need as many of {what}, got {len(made)}")
    return made


@torch.no_grad()
def _site(
    one: Location, made: Dictionary, code: SupervisedDictionary, acts: Tensor, table: pd.DataFrame, max_group: int
) -> _Site:
    decoder, bias = decoder_of(made)
    return _Site(one, made, code, decoder, bias, feature_f1(made.encode(acts) > 0, table, max_group))


@torch.no_grad()
def _random_dictionary(site: _Site, seed: int) -> SparseAutoencoder:
    """Random unit directions, as many as the dictionary has, of which the three that fit best are on."""
    count, width = site.decoder.shape
    made = SparseAutoencoder(width, count, "topk", k=min(_RANDOM_ON, count), seed=seed)
    made.b_dec.copy_(site.mean)
    return made


# ---- approximation


@torch.no_grad()
def _approximation(runs: PatchedRuns, sites: list[_Site], threshold: float, seed: int) -> pd.DataFrame:
    table, n = runs.task.attributes, len(runs.task)
    order = np.random.default_rng(seed).permutation(n)
    shuffled = table.iloc[order].reset_index(drop=True)
    without = runs.run({site.location: site.mean.expand(n, -1) for site in sites}).outcome
    clean = runs.clean.outcome
    methods: dict[str, dict[Location, Tensor]] = {"dictionary": {}, "interpretable features only": {}, "supervised": {}}
    methods["shuffled attributes"] = {}
    for site in sites:
        codes = site.dictionary.encode(runs.states[site.location])
        known = torch.as_tensor(site.scores.interpretable(threshold))
        methods["dictionary"][site.location] = site.dictionary.decode(codes)
        methods["interpretable features only"][site.location] = site.dictionary.decode(codes * known)
        methods["supervised"][site.location] = site.supervised.reconstruct(table).float()
        methods["shuffled attributes"][site.location] = site.supervised.reconstruct(shuffled).float()
    rows = []
    for method, made in methods.items():
        kept = runs.run(made).outcome
        left = runs.run(
            {site.location: site.mean + runs.states[site.location] - made[site.location] for site in sites}
        ).outcome
        recovered = recovered_share(kept, clean, without, seed=seed)
        lost = recovered_share(left, clean, without, seed=seed)
        rows.append(
            {
                "method": method,
                "recovered": recovered.value, "recovered_low": recovered.low, "recovered_high": recovered.high,
                "necessity": 1 - lost.value, "necessity_low": 1 - lost.high, "necessity_high": 1 - lost.low,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


# ---- control


@torch.no_grad()
def _control(
    runs: PatchedRuns,
    other: PatchedRuns,
    sites: list[_Site],
    random: list[_Site],
    attribute: str,
    k_edit: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    task, table = runs.task, other.task.attributes
    theirs = {site.location: other.states[site.location] for site in sites}
    old, new = task.attributes[attribute].tolist(), table[attribute].tolist()
    patched = runs.run(theirs)
    idle = proportion(int((runs.clean.top == patched.top).sum()), len(task))
    leads = "effect" if idle.value > MOSTLY else "agreement"

    def row(method: str, k: int, answers: Answers, magnitude: float) -> dict[str, Any]:
        return {
            "attribute": attribute, "method": method, "k": k, **_effect(runs.clean, answers, patched, seed),
            "magnitude": magnitude, "leads": leads,
        }  # fmt: skip

    rows = [row("full patch", 0, patched, math.nan), row("no edit", 0, runs.clean, 0.0)]
    changes, norms, weights = {}, {}, []
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        x = runs.states[site.location]
        name = _code_name(site.supervised, attribute)
        if name == attribute:
            before, after = old, new
        else:
            before, after = (
                list(zip(*(one[part].tolist() for part in name), strict=True)) for one in (task.attributes, table)
            )
        changes[site.location] = site.supervised.edit(x, name, before, after)
        values = site.supervised.codes_[name].float()
        drawn = nn.functional.normalize(torch.randn(values.shape, generator=generator), dim=1)
        drawn = drawn * values.norm(dim=1, keepdim=True)
        places = [torch.as_tensor(_places_of(site.supervised, name, part)) for part in (before, after)]
        norms[site.location] = x - drawn[places[0]] + drawn[places[1]]
        shares: Any = site.supervised.weights(task.attributes)
        weights.append(
            float(shares[name].mean() if not isinstance(name, tuple) else shares.loc[:, [name]].mean().iloc[0])
        )
    rows.append(row("supervised", 0, runs.run(changes), float(np.mean(weights))))
    rows.append(row("supervised, random codes", 0, runs.run(norms), math.nan))
    for k in k_edit:
        for method, made in (
            ("aware", _edits(runs, sites, theirs, attribute, old, new, k, greedy=False)),
            ("agnostic", _edits(runs, sites, theirs, attribute, old, new, k, greedy=True)),
            ("random directions", _edits(runs, random, theirs, attribute, old, new, k, greedy=False)),
        ):
            values, magnitude = made
            rows.append(row(method, k, runs.run(values), magnitude))
    return rows


def _code_name(supervised: SupervisedDictionary, attribute: str) -> Any:
    """The name under which an attribute has codes: its own, or that of the product it is in."""
    if attribute in supervised.codes_:
        return attribute
    for name in supervised.codes_:
        if isinstance(name, tuple) and attribute in name:
            return name
    raise InputError(f"the supervised dictionary has no codes for {attribute!r}")


def _places_of(supervised: SupervisedDictionary, name: Any, values: Sequence[Any]) -> list[int]:
    at = {value: i for i, value in enumerate(supervised.values_[name])}
    return [at[value] for value in values]


def _edits(
    runs: PatchedRuns,
    sites: list[_Site],
    theirs: Mapping[Location, Tensor],
    attribute: str,
    old: Sequence[Any],
    new: Sequence[Any],
    k: int,
    *,
    greedy: bool,
) -> tuple[dict[Location, Tensor], float]:
    """Edited activations at every location, and the mean weight of what was taken out."""
    values, weights = {}, []
    for site in sites:
        x, wanted = runs.states[site.location], theirs[site.location]
        clean, counter = site.dictionary.encode(x), site.dictionary.encode(wanted)
        edit: Edit = (
            greedy_edit(clean, counter, site.decoder, wanted - x, k)
            if greedy
            else aware_edit(
                clean, counter, site.decoder, site.by_value(attribute, old), site.by_value(attribute, new), k
            )
        )
        values[site.location] = x + edit.change  # what the dictionary does not reconstruct stays
        shares = feature_weights(clean, site.decoder, site.bias)
        weights.append(float((shares * edit.removed).sum(dim=1).mean()))
    return values, float(np.mean(weights))


def _effect(clean: Answers, edited: Answers, patched: Answers, seed: int) -> dict[str, Any]:
    agreed = proportion(int((edited.top == patched.top).sum()), len(clean.top))
    found: dict[str, Any] = {
        "agreement": agreed.value, "agreement_low": agreed.low, "agreement_high": agreed.high,
        "effect": math.nan, "effect_low": math.nan, "effect_high": math.nan, "note": "",
    }  # fmt: skip
    try:
        kept = recovered_share(edited.outcome, clean.outcome, patched.outcome, seed=seed)
    except InputError:
        return found | {"note": "the full patch does not change the outcome, so edits have no effect to share"}
    return found | {"effect": 1 - kept.value, "effect_low": 1 - kept.high, "effect_high": 1 - kept.low}


# ---- interpretability


@torch.no_grad()
def _interpretability(runs: PatchedRuns, sites: list[_Site], threshold: float) -> pd.DataFrame:
    """On the scored prompts; the F1 that rank features in edits are those of the fitted ones."""
    rows = []
    table = runs.task.attributes
    for site in sites:
        x = runs.states[site.location]
        codes = site.dictionary.encode(x)
        held = feature_f1(codes > 0, table)
        known = site.supervised.reconstruct(table).float()
        (quality,) = measure({"": site.dictionary}, x)
        for attribute in table.columns:
            f1 = _held_best(site.scores.f1[attribute], held.f1[attribute])
            name = _code_name(site.supervised, attribute)
            units = nn.functional.normalize(site.supervised.codes_[name].float(), dim=1)
            cosine = (units @ nn.functional.normalize(site.decoder, dim=1).T).max(dim=1).values.mean()
            groups: Any = site.scores.groups
            told = groups[(groups["attribute"] == attribute) & (groups["f1"] >= threshold)]
            rows.append(
                {
                    "location": str(site.location), "attribute": attribute, "mean_best_f1": float(f1.mean()),
                    "covered": float((f1 >= threshold).mean()), "groups": int((told["values"].map(len) > 1).sum()),
                    "cosine": float(cosine), "fvu": 1 - quality.explained, "l0": quality.active,
                    "dead": round(quality.dead * quality.codes), "codes": quality.codes,
                    "supervised_fvu": float((x - known).square().sum() / (x - x.mean(dim=0)).square().sum()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _held_best(fitted: Any, held: Any) -> np.ndarray:
    """For each value of the scored prompts the F1, there, of the feature that was best for it on the fitted ones."""
    shared = [value for value in held.columns if value in fitted.columns]
    return np.array([held[value].iloc[int(fitted[value].to_numpy().argmax())] for value in shared])
