"""Hidden classes of unlabelled data from several domains that mix the same classes in different shares.

Where every class looks the same everywhere, p_d(x, y) = p_d(y) p(x | y), the probability of a row's domain depends on the row
only through its class,

    p(d | x) = sum_y p(d | y) p(y | x)                                              (`class_posterior` solves it for p(y | x))

so a classifier of the domains sees the classes, even those whose members look nothing alike. `LatentLabelShift` scores rows
by a domain classifier out of fold, cuts the scores into clusters, factorises the clusters' shares in the domains into
p(cluster | y) p_d(y), and classifies each row in its own domain. It needs at least as many domains as classes, shares of
full rank, and for each class rows that are of no other (anchors). With few domains (three, say) and a few hundred rows
plain k-means is often better.

`shift_test` asks whether label shift explains the domains, `count_classes` how many classes there are,
`simulate_label_shift` makes domains out of labelled rows. For a finite set of inputs leave the classifier out: give
`cluster_shares` of the inputs themselves to `factorize_shares` (inputs are words, domains documents, classes topics).

Source: Roberts, Mani, Garg, Lipton, 2022, arXiv:2207.13179 (Unsupervised Learning under Latent Label Shift; there called
DDFA). Out-of-fold scores, several starts, domains of unequal size, the test and the count of classes are added here.
"""

__all__ = [
    "ClassCount",
    "DomainsAlikeError",
    "Factorization",
    "LatentLabelShift",
    "Matching",
    "NotIdentifiableError",
    "ShiftTest",
    "Simulation",
    "class_posterior",
    "cluster_shares",
    "count_classes",
    "domain_posterior",
    "factorize_shares",
    "kmeans_labels",
    "match_labels",
    "naive_labels",
    "share_error",
    "shift_test",
    "simulate_label_shift",
]

from theodolite.core.clustering import Matching, match_labels
from theodolite.data.latent_label_shift.baselines import kmeans_labels, naive_labels
from theodolite.data.latent_label_shift.checks import ClassCount, ShiftTest, count_classes, shift_test
from theodolite.data.latent_label_shift.estimator import LatentLabelShift
from theodolite.data.latent_label_shift.factors import Factorization, factorize_shares
from theodolite.data.latent_label_shift.posterior import class_posterior, domain_posterior
from theodolite.data.latent_label_shift.shares import (
    DomainsAlikeError,
    NotIdentifiableError,
    cluster_shares,
    share_error,
)
from theodolite.data.latent_label_shift.simulate import Simulation, simulate_label_shift
