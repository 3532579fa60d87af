"""The built-in subjects: small networks that are trained in seconds, and a pretrained language model."""

__all__ = ["SUBJECTS", "subject"]

from theodolite.core.builtin import BUILTIN, builtin
from theodolite.core.errors import InputError
from theodolite.core.subject import Subject
from theodolite.language.subjects import language_subject

SUBJECTS: dict[str, str] = {name: made.description for name, made in BUILTIN.items()} | {
    "smollm2": "the pretrained language model SmolLM2-135M-Instruct (make models) on Python's documentation strings"
}
"""What each built-in subject is, by name."""


def subject(name: str, *, seed: int = 0) -> Subject:
    """The built-in subject ``name``: "digits", "breast-cancer" (trained here, a few seconds) or "smollm2" (pretrained)."""
    if name == "smollm2":
        return language_subject(name, seed=seed)
    if name not in SUBJECTS:
        raise InputError(f"there is no built-in subject called {name!r}; there are: {', '.join(SUBJECTS)}")
    return builtin(name, seed=seed)
