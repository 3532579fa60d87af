"""Units that answer to words: told by the words that move them most, and tested on words that were not shown."""

__all__ = ["ExemplarInterpreter", "activation_tests", "testable"]

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError
from theodolite.explanations.function_interpretation.judges import UnitTest
from theodolite.explanations.function_interpretation.loop import BlackBox, Interpretation, Mode

_FEWEST = 20  # words that tests can be made of
_HIGH, _LOW = 0.1, 0.5  # shares of the words that activate a unit, and that do not


class ExemplarInterpreter:
    """The words that activate a unit most, of those that it is shown: what tools that find a unit's exemplars show.

    count: of words in the description. For units of words only.
    """

    name = "exemplars"

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise InputError(f"count must be at least 1, got {count}")
        self.count = count

    def interpret(self, blackbox: BlackBox, *, mode: Mode = "agent", rounds: int = 20) -> Interpretation:
        """Ask for the black box's examples, whatever the mode, and name the strongest."""
        if blackbox.modality != "neuron":
            raise InputError(
                f"exemplars are of units that answer to words with a number; this one is {blackbox.modality}"
            )
        pairs = blackbox.query(list(blackbox.examples)[: blackbox.left])
        strongest = sorted((pair for pair in pairs if np.isfinite(pair[1])), key=lambda pair: -pair[1])[: self.count]
        told = ", ".join(word for word, _ in strongest) or "no finite value was seen"
        return Interpretation(told, "none", rounds=1, queries=len(pairs), asked=tuple(word for word, _ in pairs))


def activation_tests(
    words: Sequence[str], activations: Float[np.ndarray, " word"], *, n: int = 10, seed: int = 0
) -> list[UnitTest]:
    """``n`` tests as the published ones of neurons: a word that activates the unit beside two that do not.

    The one is drawn from the tenth of ``words`` with the highest activations; the others have lower ones than all of these, and
    are of the lower half where that has two such words. Raises DataError for fewer than 20 words, and where fewer than two
    have lower activations than the highest tenth.
    """
    values = np.asarray(activations, dtype=np.float64)
    if len(words) != len(values) or len(values) < _FEWEST or not np.isfinite(values).all():
        raise DataError(
            f"need at least {_FEWEST} words with a finite activation each, got {len(words)} and {len(values)}"
        )
    high, low = _ends(values)
    if len(low) < 2:
        raise DataError("the activations hardly differ from word to word, so no test can be made of them")
    rng = np.random.default_rng([seed, 13])
    tests = []
    for _ in range(n):
        three = [words[int(rng.choice(high))], *(words[i] for i in rng.choice(low, 2, replace=False))]
        answer = int(rng.integers(3))
        three[0], three[answer] = three[answer], three[0]
        tests.append(UnitTest(tuple(three), answer + 1))
    return tests


def testable(activations: Float[np.ndarray, " word"]) -> bool:
    """Whether `activation_tests` can be made of these activations."""
    values = np.asarray(activations, dtype=np.float64)
    return len(values) >= _FEWEST and bool(np.isfinite(values).all()) and len(_ends(values)[1]) >= 2


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of what activates, and of what does not."""
    order = np.argsort(values, kind="stable")
    high = order[len(order) - max(1, round(_HIGH * len(order))) :]
    below = order[values[order] < values[high[0]]]
    lower = below[: int(_LOW * len(order))]
    return high, lower
