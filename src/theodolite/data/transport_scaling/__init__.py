"""Which mix of several data sources to buy, and what score a model will reach on it, from a small sample of each.

    C((x, y), (x', y')) = lambda_x d(x, x')^q + lambda_y W_q^q(mu_y, mu_y'),   OT(D, V) = min over couplings of <pi, C>
    L(N, p) = [log(N / N_0) L(N_1, p) - log(N / N_1) L(N_0, p)] / log(N_1 / N_0)

Stage one predicts the score of a model trained on any mix p from the transport distance between the mix and the validation
rows, at two sizes N_0 < N_1 that the samples allow; stage two extrapolates to N without a free parameter. `TransportScaling`
does both and `select` searches the best mix along the exact gradient of the distance, without training a model.

The rational scaling function that the paper compares with is left out: its form is not given.

Source: Kang, Just, Sahu, Jia, 2023, arXiv:2307.02460 (Performance Scaling via Optimal Transport; there called projektor).
"""

__all__ = [
    "Baseline",
    "MixSelection",
    "PilotTable",
    "Source",
    "Transport",
    "TransportScaling",
    "choose_form",
    "dataset_transport",
    "label_distances",
    "mix_gradient",
    "project",
    "region_errors",
    "simplex_grid",
]

from theodolite.data.transport_scaling.forms import choose_form, project, region_errors
from theodolite.data.transport_scaling.mixes import simplex_grid
from theodolite.data.transport_scaling.scaling import TransportScaling
from theodolite.data.transport_scaling.selection import Baseline, MixSelection
from theodolite.data.transport_scaling.tables import PilotTable, Source
from theodolite.data.transport_scaling.transport import Transport, dataset_transport, label_distances, mix_gradient
