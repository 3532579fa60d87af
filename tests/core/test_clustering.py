"""The Hungarian match against every injective map."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theodolite.core.clustering import cluster_scores, clustering_accuracy, match_labels
from theodolite.core.errors import InputError

labels = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=30)


def by_force(true, pred):
    classes, clusters = sorted(set(true)), sorted(set(pred))
    padded = classes + [None] * len(clusters)
    return max(
        sum(dict(zip(clusters, image))[p] == t for t, p in zip(true, pred)) / len(true)
        for image in set(permutations(padded, len(clusters)))
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=15), st.booleans())
def test_accuracy_is_the_best_over_all_one_to_one_maps(pairs, swapped):
    true, pred = (list(side) for side in zip(*pairs))
    if swapped:
        true, pred = pred, true
    assert clustering_accuracy(np.array(true), np.array(pred)) == pytest.approx(by_force(true, pred))


@given(labels, st.permutations(range(6)))
def test_names_of_clusters_do_not_matter(pairs, names):
    true, pred = (np.array(side) for side in zip(*pairs))
    renamed = np.array(names)[pred]
    assert clustering_accuracy(true, renamed) == pytest.approx(clustering_accuracy(true, pred))
    scores, other = cluster_scores(true, pred), cluster_scores(true, renamed)
    assert (scores.nmi, scores.ari) == pytest.approx((other.nmi, other.ari))


@given(labels)
def test_the_permutation_gives_the_accuracy(pairs):
    pred, true = (np.array(side) for side in zip(*pairs))
    matching = match_labels(pred, true)
    assert len(set(matching.permutation.values())) == len(matching.permutation)
    hits = [matching.permutation.get(p) == t for p, t in zip(pred.tolist(), true.tolist())]
    assert matching.accuracy == pytest.approx(np.mean(hits))


def test_many_clusters_are_not_mapped_to_one_class():
    assert clustering_accuracy(np.zeros(4, int), np.arange(4)) == 0.25


def test_labels_may_be_a_column_of_text_objects():
    true, pred = np.array(["a", "b", "b"], dtype=object), np.array(["x", "y", "y"], dtype=object)
    assert match_labels(pred, true).permutation == {"x": "a", "y": "b"}


def test_unequal_lengths_are_refused():
    with pytest.raises(InputError, match=r"\(3,\) and \(2,\)"):
        match_labels(np.zeros(3), np.zeros(2))
    with pytest.raises(InputError, match="length >= 1"):
        match_labels(np.array([]), np.array([]))
