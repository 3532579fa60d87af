"""Maps of what a network looks at, with the baseline chosen for the input and for the metric that the user cares about.

A path-integrated map depends on its baseline, what a missing feature looks like, and no baseline is best by every metric. Here
the baseline is drawn inside the network, at a layer a = f_low(x), from one of five families. With s = f_up(a)_y and
v_j = b + (j/n)(a - b) the map is

    m(b) = scaled(resized(sum over channels and j of relu(ds/dv_j) relu(v_j)))

and a bandit (Thompson sampling by Bayesian logistic regression on the network's own features) learns which layer and family
pay off by the chosen metric, draws T maps of an input, goes on learning while it draws, and returns the best.

The authors' published script stops before the bandit's loop. Taken here, in its place: a reward of +1 where a map beats the
median of those drawn before it (the first one: the zero baseline's map); the network's penultimate features on principal axes
as the context, where they train another network for it; maps multiply pixels, so that what is removed becomes what
``removed`` says, and not the grey that a normalised 0 is; baselines are given by their moments.

Source: Barkan, Elisha, Weill, Koenigstein, 2024, arXiv:2412.17512.
"""

__all__ = [
    "BanditExplanation",
    "BaselineBandit",
    "BaselineFamily",
    "BetaBernoulli",
    "ConstantMapWarning",
    "FAMILIES",
    "FamilyScores",
    "HIGHER_IS_BETTER",
    "SplitError",
    "SplitModel",
    "TABLE_FAMILIES",
    "ThompsonLogistic",
    "UniformChoice",
    "adp",
    "add",
    "aic",
    "attribution_scores",
    "compare_families",
    "deletion",
    "draw_baselines",
    "family_scores",
    "feature_layers",
    "grad_cam",
    "insertion",
    "negative",
    "path_attributions",
    "path_map",
    "pic",
    "positive",
    "random_smooth_maps",
    "sic",
]

from theodolite.core.attribution_metrics import (
    HIGHER_IS_BETTER,
    add,
    adp,
    aic,
    attribution_scores,
    deletion,
    insertion,
    negative,
    pic,
    positive,
    sic,
)
from theodolite.explanations.baseline_bandit.bandit import BanditExplanation, BaselineBandit
from theodolite.explanations.baseline_bandit.baselines import (
    FAMILIES,
    TABLE_FAMILIES,
    BaselineFamily,
    draw_baselines,
    random_smooth_maps,
)
from theodolite.explanations.baseline_bandit.compare import FamilyScores, compare_families, family_scores
from theodolite.explanations.baseline_bandit.paths import ConstantMapWarning, grad_cam, path_attributions, path_map
from theodolite.explanations.baseline_bandit.split import SplitError, SplitModel, feature_layers
from theodolite.explanations.baseline_bandit.thompson import BetaBernoulli, ThompsonLogistic, UniformChoice
