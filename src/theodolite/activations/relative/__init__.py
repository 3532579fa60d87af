"""Coordinates in which two networks can be compared: the similarities of each latent vector to the same list of anchor samples.

    r(x) = (s(e(x), e(a_1)), ..., s(e(x), e(a_m))),   s the cosine                                     (section 3)

e is the encoder and a_1 .. a_m an ordered list of samples that each network encodes by itself. r does not change when e is
rotated, mirrored or scaled, in one piece or sample by sample; it does change with a shift and with unequal scales of the
coordinates, against which `RelativeProjection` centres or standardises by the anchors of the space. With it one model's items
are found in another model's space (`latent_agreement`), and a head trained on one model reads another one (`stitch`,
`stitching_table`).

Mean the hidden states of a decoder's tokens without the first one (`pool_tokens`), and standardise them: a few of their
coordinates are up to 1,000 times larger than the rest and make every cosine 1.

Source: Moschella, Maiorca, Fumero, Norelli, Locatello, Rodola, 2022, arXiv:2209.15430 (Relative representations enable
zero-shot latent space communication).
"""

__all__ = [
    "ItemAgreement",
    "LatentAgreement",
    "RelativeLayer",
    "RelativeProjection",
    "RelativeWarning",
    "agreement_curve",
    "embed_texts",
    "item_agreement",
    "latent_agreement",
    "pool_tokens",
    "quality_curve",
    "relative",
    "select_anchors",
    "stitch",
    "stitching_table",
]

from theodolite.activations.relative.agreement import (
    ItemAgreement,
    LatentAgreement,
    RelativeWarning,
    item_agreement,
    latent_agreement,
)
from theodolite.activations.relative.anchors import select_anchors
from theodolite.activations.relative.baselines import agreement_curve, quality_curve
from theodolite.activations.relative.projection import RelativeProjection
from theodolite.activations.relative.similarity import relative
from theodolite.activations.relative.stitching import RelativeLayer, stitch, stitching_table
from theodolite.activations.relative.texts import embed_texts, pool_tokens
