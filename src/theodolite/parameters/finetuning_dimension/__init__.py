"""Fine-tuning dimension: how many free directions it takes to fine-tune a pretrained network, arXiv:2012.13255.

    DID    theta_i = theta_0,i + P_i theta,               theta in R^d                                              (eq. 2)
    SAID   theta_i = theta_0,i + lambda_l(i) P_i theta,   theta in R^(d - m), one lambda for each of m layers        (eq. 5)

d90 is the smallest d whose quality reaches 0.9 of full fine-tuning. `FineTuningSubspace` is the network in d numbers,
`fine_tuning_dimension` measures d90 beside full fine-tuning, the head alone and chance, `pretraining_trajectory` does so
along checkpoints, and `compression_certificate` turns d into a bound on the risk. `BuildTextClassifier` and
`token_columns` make all of that out of a Hugging Face model and texts.

Source: Aghajanyan, Zettlemoyer, Gupta, 2020, arXiv:2012.13255 (Intrinsic Dimensionality Explains the Effectiveness of
Language Model Fine-Tuning); the bound after Arora, Ge, Neyshabur, Zhang, 2018, arXiv:1802.05296.
"""

__all__ = [
    "BuildTextClassifier",
    "CompressionCertificate",
    "FineTuningDimension",
    "FineTuningSubspace",
    "TextClassifier",
    "compression_bound",
    "compression_certificate",
    "fine_tune",
    "fine_tuning_dimension",
    "pretraining_trajectory",
    "quantize_coordinates",
    "scores",
    "token_columns",
]

from theodolite.parameters.finetuning_dimension.bound import (
    CompressionCertificate,
    compression_bound,
    compression_certificate,
    quantize_coordinates,
)
from theodolite.parameters.finetuning_dimension.search import (
    FineTuningDimension,
    fine_tuning_dimension,
    pretraining_trajectory,
)
from theodolite.parameters.finetuning_dimension.subspace import FineTuningSubspace
from theodolite.parameters.finetuning_dimension.texts import BuildTextClassifier, TextClassifier, token_columns
from theodolite.parameters.finetuning_dimension.training import fine_tune, scores
