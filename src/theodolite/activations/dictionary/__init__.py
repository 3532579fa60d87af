"""Sparse autoencoders: hidden states as sums of few directions out of many.

    f = relu((x - b_dec) W_enc + b_enc),     x_hat = f W_dec + b_dec,     rows of W_dec of norm 1        (app. on training)

`SparseAutoencoder` has four kinds (vanilla, gated, TopK, attribution), `train_sae` trains one on activations that are an array,
`load_sae` and `save_sae` read and write folders as SAELens has them. Each is a dictionary as `theodolite.core.dictionary`
measures them. Whether its features are of use is asked by `theodolite.activations.dictionary_evaluation`.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366 (Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control).
"""

__all__ = ["History", "SAEOutput", "SparseAutoencoder", "load_sae", "save_sae", "train_sae"]

from theodolite.activations.dictionary.autoencoder import SAEOutput, SparseAutoencoder
from theodolite.activations.dictionary.files import load_sae, save_sae
from theodolite.activations.dictionary.training import History, train_sae
