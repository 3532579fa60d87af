"""A network that stores far fewer weights than it has from the first training step on: all are read from one shared array.

    W_i = lambda_l(i) g_i psi[h(i)],   psi in R^m,   h(i) a seeded slot,   g_i a seeded sign,   lambda_l std of layer / sigma
    dL/dpsi[s] <- dL/dpsi[s] / Gamma[s],   Gamma = (sum of lambda over the k weights of slot s)^2 / k        (STABLE-RPS)

Memory of weights, gradients and optimiser state falls n / m times; the arithmetic of a forward pass does not fall at all.

Source: Desai, Shrivastava, 2023, arXiv:2310.11611 (In defense of parameter sharing for model-compression).
"""

__all__ = [
    "FoldMap",
    "HashedMap",
    "RoastMap",
    "SharedEmbedding",
    "SharedModel",
    "best_step_sizes",
    "check_optimizer",
    "compression_curve",
    "inner_product_variance",
    "share_parameters",
    "sketch_inner_product",
]

from theodolite.parameters.sharing.curve import best_step_sizes, compression_curve
from theodolite.parameters.sharing.embedding import SharedEmbedding
from theodolite.parameters.sharing.maps import FoldMap, HashedMap, RoastMap
from theodolite.parameters.sharing.model import SharedModel, check_optimizer, share_parameters
from theodolite.parameters.sharing.theory import inner_product_variance, sketch_inner_product
