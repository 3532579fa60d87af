"""Claims of Moschella et al., 2022, arXiv:2209.15430, on word vectors, questions and digits with models of this machine."""

__all__ = ["claims"]

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from torch import Tensor, nn

from theodolite.activations.relative import (
    RelativeLayer,
    RelativeProjection,
    embed_texts,
    item_agreement,
    latent_agreement,
    relative,
    stitching_table,
)
from theodolite.core.dictionary import LinearDictionary
from theodolite.core.errors import DataError
from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.language.pretrained import WHEELS, load_decoder, load_encoder
from theodolite.reproductions.claim import Claim, Comparator, Scale

_TREC = ("texts/TREC.train.all", "texts/TREC.test.all")
_WORDS = (
    "unrelated word spaces become searchable: MiniLM's words found among SmolLM2's, 300 uniform anchors",
    "mean reciprocal rank 0.93 against 0.00 with absolute coordinates (FastText to word2vec, 20,000 words)",
    "MRR >= 0.40 and Jaccard@10 >= 0.06; absolute (PCA-300) and permuted anchors MRR <= 0.01",
)
_THOUSAND = (
    "unrelated word spaces become searchable: the same with 1,000 anchors",
    "none given",
    "MRR >= 0.55; permuted anchors <= 0.01",
)
_MORE = (
    "more anchors, better: MRR at 50, 100, 300 and 1,000 anchors",
    "as its figures show",
    "strictly increasing; measured: the smallest step",
)
_CENTRED = (
    "centring by the anchors helps word vectors: MRR with 300 anchors, centred over as they are",
    "none given (the paper does not centre)",
    "centred >= 2 x uncentred",
)
_STITCHED = (
    "zero-shot stitching across architectures: a linear head on SmolLM2's layer 8 reads MiniLM (TREC questions)",
    "stitched close to own on its text benchmarks (table 4)",
    "macro F1 >= 0.60 stitched, >= 0.75 own; permuted anchors <= 0.25",
)
_UNSCALED = (
    "hidden states of a transformer need standardising: the same head's own macro F1 with preprocess='none'",
    "none given",
    "own macro F1 <= 0.30, the warning case",
)
_CLASSES = (
    "seeds and widths interchange (classification): five encoders of digits in front of each other's heads",
    "relative stitched 0.90 to 0.97 against chance with absolute coordinates",
    "stitched mean >= 0.90, own within 0.02 of the absolute own; absolute stitched <= 0.30",
)
_IMAGES = (
    "and for reconstruction: four autoencoders of digits in front of each other's decoders",
    "stitched MSE a few times the own one, absolute far off (table 3)",
    "stitched / own MSE <= 3 and stitched below the variance of the pixels; absolute: ratio >= 8 and above the variance",
)
_INVARIANT = (
    "oracle: relative vectors do not change under a rotation and a scale for each sample",
    "exact (section 3)",
    "largest difference <= 1e-5; absolute mean cosine within 0.1 of 0",
)
_SHIFTED = (
    "oracle: a shift changes relative vectors, and not those that are centred by the anchors",
    "none given",
    "difference > 0.05 with 'none', <= 1e-5 with 'center'",
)
_BASIS = (
    "oracle: basis similarity with as many independent anchors as coordinates gives the vector back",
    "none given (in the official code)",
    "largest error of anchors^T b <= 1e-4",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick takes fewer words, questions, networks and draws of anchors."""
    yield from _on_words(scale, seed)
    yield from _on_questions(scale, seed)
    yield _classification(scale, seed)
    yield _reconstruction(scale, seed)
    yield from _oracles(seed)


def _missing_models() -> str:
    gone = [package.replace("_", "-") for package in WHEELS.values() if importlib.util.find_spec(package) is None]
    return f"needs the packages {' and '.join(gone)} (make models)" if gone else ""


def _untold(rows: tuple[tuple[str, str, str], ...], why: str) -> Iterator[Claim]:
    for claim, paper, threshold in rows:
        yield Claim(claim, paper, None, threshold, None, scaled=why)


# ---- word vectors


def word_vectors(count: int) -> tuple[Tensor, Tensor]:
    """Input embeddings of the words that MiniLM (n, 384) and SmolLM2 (n, 576) share, the first ``count`` by SmolLM2's numbers.

    Words are pieces of MiniLM's vocabulary of at least four ASCII letters that are one token of SmolLM2 behind a space.
    """
    (small, pieces), (large, tokens) = load_encoder("minilm"), load_decoder("smollm2")
    here, there = pieces.get_vocab(), tokens.get_vocab()
    shared = sorted(
        (there["Ġ" + word], number)
        for word, number in here.items()
        if word.isascii() and word.isalpha() and len(word) >= 4 and "Ġ" + word in there
    )[:count]
    columns = [[number for _, number in shared], [number for number, _ in shared]]
    one, two = (
        model.get_input_embeddings().weight.detach()[rows].clone()
        for model, rows in zip((small, large), columns, strict=True)
    )
    return one, two


@dataclass(frozen=True)
class _Search:
    """What the search of SmolLM2's words by MiniLM's found, a number for each draw of the anchors."""

    mrr: list[float]
    jaccard: list[float]
    permuted: list[float]


def _search(a: Tensor, b: Tensor, anchors: int, items: int, draws: int, seed: int, preprocess: Any) -> _Search:
    """Over ``draws`` of the anchors; the last ``items`` words of each draw's order are searched."""
    found = _Search([], [], [])
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        order = rng.permutation(len(a))
        index, rest = order[:anchors], torch.as_tensor(order[-items:])
        ra, rb = (
            RelativeProjection(preprocess=preprocess).fit(space, anchor_index=index).transform(space[rest])
            for space in (a, b)
        )
        agreement = latent_agreement(ra, rb)
        found.mrr.append(agreement.mrr)
        found.jaccard.append(agreement.jaccard)
        shuffled = torch.as_tensor(rng.permutation(anchors))
        found.permuted.append(float(item_agreement(ra[:, shuffled], rb).reciprocal_rank.mean()))
    return found


def _on_words(scale: Scale, seed: int) -> Iterator[Claim]:
    missing = _missing_models()
    if missing:
        yield from _untold((_WORDS, _THOUSAND, _MORE, _CENTRED), missing)
        return
    count, draws = (2_500, 2) if scale is Scale.QUICK else (6_000, 3)
    a, b = word_vectors(count)
    rest = count - 300
    setting = (
        f"{count:,} shared words, {draws} draws of the anchors, centred; input embeddings for FastText and word2vec"
    )
    main = _search(a, b, 300, rest, draws, seed, "center")
    absolute = _absolute_rank(a, b)
    ours = mean_of_runs(main.mrr, unit="MRR", within=(0, 1))
    jaccard, permuted = float(np.mean(main.jaccard)), float(np.mean(main.permuted))
    yield Claim(
        _WORDS[0], _WORDS[1], ours, _WORDS[2],
        ours.value >= 0.40 and jaccard >= 0.06 and absolute <= 0.01 and permuted <= 0.01,
        Comparator("absolute coordinates cut to 300 by PCA, MRR", absolute),
        f"{setting}; {rest:,} held-out words; Jaccard@10 {jaccard:.3f}, permuted anchors {permuted:.4f}",
    )  # fmt: skip
    items = count - 1_000
    curve = {m: _search(a, b, m, items, draws, seed, "center") for m in (50, 100, 300, 1_000)}
    most = mean_of_runs(curve[1_000].mrr, unit="MRR", within=(0, 1))
    permuted = float(np.mean(curve[1_000].permuted))
    same = f"{setting}; the same {items:,} held-out words for every number of anchors"
    yield Claim(
        _THOUSAND[0], _THOUSAND[1], most, _THOUSAND[2], most.value >= 0.55 and permuted <= 0.01,
        Comparator("permuted anchors, MRR", permuted), same,
    )  # fmt: skip
    sizes = list(curve)
    steps = [mean_of_runs(np.subtract(curve[high].mrr, curve[low].mrr), unit="MRR") for low, high in pairwise(sizes)]
    least = min(steps, key=lambda step: step.value)
    yield Claim(
        _MORE[0], _MORE[1], least, _MORE[2], least.value > 0,
        Comparator("MRR with 50 anchors", float(np.mean(curve[50].mrr))),
        f"{same}; MRR " + ", ".join(f"{m:,}: {np.mean(found.mrr):.3f}" for m, found in curve.items()),
    )  # fmt: skip
    plain = _search(a, b, 300, items, draws, seed, "none")
    ratio = mean_of_runs(np.divide(curve[300].mrr, plain.mrr), unit="times")
    yield Claim(
        _CENTRED[0], _CENTRED[1], ratio, _CENTRED[2], ratio.value >= 2,
        Comparator("uncentred, MRR", float(np.mean(plain.mrr))), same,
    )  # fmt: skip


def _absolute_rank(a: Tensor, b: Tensor) -> float:
    """Mean reciprocal rank of absolute coordinates, each space cut to its 300 principal components."""
    one, two = (LinearDictionary.principal_components(space, 300).encode(space) for space in (a, b))
    return float(item_agreement(one, two).reciprocal_rank.mean())


# ---- questions


@dataclass(frozen=True, eq=False)
class _Questions:
    """Sentence vectors of MiniLM and of SmolLM2's layer 8, classes; the first ``train`` rows are for training."""

    minilm: np.ndarray
    smollm2: np.ndarray
    y: np.ndarray
    train: int


def _questions(train_rows: int, test_rows: int, seed: int) -> _Questions:
    texts: list[str] = []
    labels: list[int] = []
    for name, count in zip(_TREC, (train_rows, test_rows), strict=True):
        path = find_data(name)
        if path is None:
            raise DataError(f"there is no {name} in the folder THEODOLITE_DATA")
        lines = path.read_text(encoding="latin-1").splitlines()
        for i in np.random.default_rng([seed, count]).permutation(len(lines))[:count]:
            label, text = lines[i].split(" ", 1)
            texts.append(text)
            labels.append(int(label))
    small = embed_texts(load_encoder("minilm"), texts)
    large = embed_texts(load_decoder("smollm2"), texts, layer=8)
    return _Questions(small, large, np.array(labels), train_rows)


@dataclass(frozen=True)
class _Heads:
    """Macro F1 of SmolLM2's head on its own vectors, on MiniLM's, and on MiniLM's with the anchors in another order."""

    own: float
    stitched: float
    permuted: float


def _heads(data: _Questions, anchors: int, preprocess: Any, seed: int) -> _Heads:
    rows, test = np.arange(data.train), slice(data.train, None)
    spaces = {"MiniLM": data.minilm, "SmolLM2": data.smollm2}
    first = RelativeProjection(anchors, preprocess=preprocess, normalize=True, seed=seed).fit(data.minilm[rows])
    made = {
        name: RelativeProjection(preprocess=preprocess, normalize=True).fit(z[rows], anchor_index=first.anchor_index_)
        for name, z in spaces.items()
    }
    fit = np.setdiff1d(rows, first.anchor_index_)
    head = GridSearchCV(
        LogisticRegression(max_iter=5_000),
        {"C": [1.0, 10.0, 100.0]},
        cv=KFold(3, shuffle=True, random_state=seed),  # not by class: the rarest one may have fewer rows than folds
    )
    head.fit(made["SmolLM2"].transform(data.smollm2[fit]), data.y[fit])
    table = stitching_table(
        made, {"SmolLM2": head.best_estimator_}, {name: z[test] for name, z in spaces.items()}, data.y[test],
        scorer="f1_macro", seed=seed,
    )  # fmt: skip
    score, permuted = (dict(zip(table.index.get_level_values(0), table[c], strict=True)) for c in ("score", "permuted"))
    return _Heads(float(score["SmolLM2"]), float(score["MiniLM"]), float(permuted["MiniLM"]))


def _on_questions(scale: Scale, seed: int) -> Iterator[Claim]:
    missing = _missing_models()
    gone = [name for name in _TREC if find_data(name) is None]
    if gone:
        missing = f"needs {', '.join(gone)} in the folder THEODOLITE_DATA" + (f"; {missing}" if missing else "")
    if missing:
        yield from _untold((_STITCHED, _UNSCALED), missing)
        return
    train_rows, test_rows, anchors, draws = (400, 150, 100, 3) if scale is Scale.QUICK else (1_500, 500, 200, 5)
    data = _questions(train_rows, test_rows, seed)
    setting = (
        f"{train_rows:,} training and {test_rows} test questions, {anchors} anchors that the head does not see, {draws} draws of "
        "them; mean of the tokens, of the decoder without the first; the head's penalty by cross-validation on training rows"
    )
    runs = [_heads(data, anchors, "standardize", seed * draws + draw) for draw in range(draws)]
    stitched = mean_of_runs([run.stitched for run in runs], unit="macro F1", within=(0, 1))
    own, permuted = (float(np.mean([getattr(run, name) for run in runs])) for name in ("own", "permuted"))
    yield Claim(
        _STITCHED[0], _STITCHED[1], stitched, _STITCHED[2], stitched.value >= 0.60 and own >= 0.75 and permuted <= 0.25,
        Comparator("permuted anchors, macro F1", permuted), f"{setting}; standardised; own macro F1 {own:.3f}",
    )  # fmt: skip
    plain = [_heads(data, anchors, "none", seed * draws + draw) for draw in range(draws)]
    bare = mean_of_runs([run.own for run in plain], unit="macro F1", within=(0, 1))
    yield Claim(
        _UNSCALED[0], _UNSCALED[1], bare, _UNSCALED[2], bare.value <= 0.30,
        Comparator("standardised, own macro F1", own),
        f"{setting}; stitched as they are {np.mean([run.stitched for run in plain]):.3f}",
    )  # fmt: skip


# ---- digits


_ANCHORS, _LATENT = 64, 64
_ENCODERS: tuple[tuple[int, type[nn.Module]], ...] = (
    (64, nn.ReLU), (128, nn.GELU), (256, nn.Tanh), (128, nn.ReLU), (64, nn.Tanh),
)  # fmt: skip


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images in [0, 1] and labels: 1,200 and 597 rows."""
    bunch: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    x, y = torch.as_tensor(bunch.data[order]).float() / 16, torch.as_tensor(bunch.target[order]).long()
    return x[:1_200], y[:1_200], x[1_200:], y[1_200:]


def _pieces(
    x: Tensor, targets: Tensor, encoders: int, latent: int, tail: Callable[[int], nn.Module], loss: Any, relative_: bool,
    epochs: int, seed: int,
) -> list[tuple[nn.Module, nn.Module]]:  # fmt: skip
    """Encoders (with their relative layer where asked for) and heads, each pair trained end to end from a seed of its own."""
    made = []
    for i, (width, act) in enumerate(_ENCODERS[:encoders]):
        torch.manual_seed(seed * len(_ENCODERS) + i)
        encoder = nn.Sequential(nn.Linear(64, width), act(), nn.Linear(width, latent))
        front = RelativeLayer(encoder, x[:_ANCHORS]) if relative_ else encoder
        head = tail(_ANCHORS if relative_ else latent)
        recipe = Recipe(epochs=epochs, batch_size=128, lr=2e-3, loss=loss, seed=i)
        train(nn.Sequential(front, head), x, targets, recipe=recipe)
        made.append((front.eval(), head.eval()))
    return made


def _own_and_stitched(
    pieces: list[tuple[nn.Module, nn.Module]], score: Callable[[nn.Module], float]
) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([[score(nn.Sequential(front, head)) for _, head in pieces] for front, _ in pieces])
    return table.diagonal(), table[~np.eye(len(table), dtype=bool)]


def _per_encoder(off_diagonal: np.ndarray, encoders: int) -> np.ndarray:
    """The mean over heads for each encoder: runs that share no encoder."""
    return off_diagonal.reshape(encoders, encoders - 1).mean(axis=1)


def _classification(scale: Scale, seed: int) -> Claim:
    encoders = 3 if scale is Scale.QUICK else 5
    x, y, test_x, test_y = _digits(seed)
    found = {}
    for kind in (True, False):
        pieces = _pieces(
            x, y, encoders, _LATENT,
            lambda width: nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)), "cross-entropy", kind, 40, seed,
        )  # fmt: skip
        found[kind] = _own_and_stitched(pieces, lambda net: accuracy(net, test_x, test_y))
    (own, stitched), (absolute_own, absolute) = found[True], found[False]
    ours = mean_of_runs(_per_encoder(stitched, encoders), unit="accuracy", within=(0, 1))
    return Claim(
        _CLASSES[0], _CLASSES[1], ours, _CLASSES[2],
        bool(ours.value >= 0.90 and own.mean() >= absolute_own.mean() - 0.02 and absolute.mean() <= 0.30),
        Comparator("absolute coordinates, stitched accuracy", float(absolute.mean())),
        f"digits, {encoders} encoders (64 to 256 wide; ReLU, GELU, Tanh), {_ANCHORS} anchors, 40 epochs; own {own.mean():.3f}, "
        f"absolute own {absolute_own.mean():.3f}; the paper has CIFAR-10 and pretrained vision models; interval over encoders",
    )  # fmt: skip


def _reconstruction(scale: Scale, seed: int) -> Claim:
    encoders = 3 if scale is Scale.QUICK else 4
    x, _, test_x, _ = _digits(seed)
    variance = float(test_x.var(dim=0, correction=0).mean())

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(test_x) - test_x).square().mean())

    def tail(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64))

    def measured(relative_: bool, epochs: int) -> tuple[np.ndarray, np.ndarray]:
        return _own_and_stitched(_pieces(x, x, encoders, 32, tail, "squared", relative_, epochs, seed), error)

    own, stitched = measured(True, 40)
    absolute_own, absolute = measured(False, 40)
    ratio = mean_of_runs(_per_encoder(stitched, encoders) / own, unit="times the own MSE")
    far = float(absolute.mean() / absolute_own.mean())
    longer = ""
    if scale is Scale.FULL:
        more, more_stitched = measured(True, 120)
        longer = (
            f"; after 120 epochs {more_stitched.mean():.4f} / {more.mean():.4f}, {more_stitched.mean() / more.mean():.1f} times, "
            "for the own error falls faster"
        )
    return Claim(
        _IMAGES[0], _IMAGES[1], ratio, _IMAGES[2],
        bool(ratio.value <= 3 and stitched.mean() < variance and far >= 8 and absolute.mean() > variance),
        Comparator("absolute coordinates, stitched / own MSE", far),
        f"digits, {encoders} autoencoders of 32 latents, {_ANCHORS} anchors, 40 epochs; stitched {stitched.mean():.4f}, own "
        f"{own.mean():.4f}, absolute {absolute.mean():.4f} / {absolute_own.mean():.4f}, variance {variance:.4f}{longer}",
    )  # fmt: skip


# ---- oracles


def _oracles(seed: int) -> Iterator[Claim]:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(1_000, 128, generator=draw)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=draw)).Q
    moved = (z @ turn) * (0.1 + 10 * torch.rand(1_000, 1, generator=draw))
    index = np.arange(100)
    off = _largest_change(z, moved, index, "none")
    cosine = float(item_agreement(z, moved).cosine.mean())
    drawn = "1,000 normal vectors of width 128, float32, 100 anchors; one draw, so no interval"
    yield Claim(
        _INVARIANT[0], _INVARIANT[1], Estimate.exact(off), _INVARIANT[2], off <= 1e-5 and abs(cosine) <= 0.1,
        Comparator("mean cosine of the absolute vectors", cosine), drawn,
    )  # fmt: skip
    shifted = z + torch.randn(128, generator=draw)
    plain, centred = (_largest_change(z, shifted, index, one) for one in ("none", "center"))
    yield Claim(
        _SHIFTED[0], _SHIFTED[1], Estimate.exact(centred), _SHIFTED[2], plain > 0.05 and centred <= 1e-5,
        Comparator("largest difference with 'none'", plain), drawn,
    )  # fmt: skip
    anchors = z[:128]
    rest = z[128:]
    back = relative(rest, anchors, similarity="basis").double() @ anchors.double()
    errors = (back - rest.double()).abs().amax(dim=1)
    closed = torch.linalg.solve(anchors.double().mT, rest.double().mT).mT
    difference = float((relative(rest, anchors, similarity="basis").double() - closed).abs().max())
    yield Claim(
        _BASIS[0], _BASIS[1], bootstrap(errors.numpy(), np.max, seed=seed), _BASIS[2], float(errors.max()) <= 1e-4,
        Comparator("largest difference of b to the closed form", difference), "128 anchors of width 128, 872 vectors, float32",
    )  # fmt: skip


def _largest_change(one: Tensor, two: Tensor, index: np.ndarray, preprocess: Any) -> float:
    ra, rb = (
        RelativeProjection(preprocess=preprocess).fit(z, anchor_index=index).transform(z[100:]) for z in (one, two)
    )
    return float((ra - rb).abs().max())
