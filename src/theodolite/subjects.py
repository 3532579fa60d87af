"""The built-in subjects: small networks that are trained in seconds, one of them on series, and a pretrained language model."""

__all__ = ["SUBJECTS", "subject"]

from torch import Tensor, nn

from theodolite.core.builtin import BUILTIN, BuiltIn, builtin
from theodolite.core.errors import InputError
from theodolite.core.subject import Subject
from theodolite.core.train import Recipe
from theodolite.language.subjects import language_subject


def _pixels() -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    x, y, _, classes = BUILTIN["digits"].rows()
    larger = nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
    return larger.reshape(len(x), 256, 1), y, ("grey",), classes


def _pixels_network(seed: int) -> nn.Module:
    from theodolite.networks.diagonal_ssm import S4DClassifier

    return S4DClassifier(1, 10, d_model=32, n_layers=2, n_state=32, seed=seed)


_PIXELS = BuiltIn(
    "a network of two state space layers on scikit-learn's handwritten digits, read as series of 256 pixels",
    "series",
    _pixels,
    _pixels_network,
    Recipe(epochs=6, batch_size=16, lr=1e-2),
    False,
    "digits scaled to 16 x 16 pixels and read row by row; grey values divided by 16, so that they lie in [0, 1]",
)

SUBJECTS: dict[str, str] = {name: made.description for name, made in BUILTIN.items()} | {
    "pixels": _PIXELS.description,
    "smollm2": "the pretrained language model SmolLM2-135M-Instruct (make models) on Python's documentation strings",
}
"""What each built-in subject is, by name."""


def subject(name: str, *, seed: int = 0) -> Subject:
    """The built-in subject ``name``: "digits", "breast-cancer", "pixels" (trained here) or "smollm2" (pretrained)."""
    if name == "smollm2":
        return language_subject(name, seed=seed)
    if name == "pixels":
        return builtin(name, seed=seed, made=_PIXELS)
    if name not in SUBJECTS:
        raise InputError(f"there is no built-in subject called {name!r}; there are: {', '.join(SUBJECTS)}")
    return builtin(name, seed=seed)
