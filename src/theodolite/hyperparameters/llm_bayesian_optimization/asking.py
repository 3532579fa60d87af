"""What all that asks a language model about trials shares: the wording, the prompts, what fits the window, the account."""

__all__ = ["Account", "Asker", "seed_of"]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from theodolite.core.errors import InputError
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.llm_bayesian_optimization.wording import Wording
from theodolite.hyperparameters.space import SearchSpace, Trial
from theodolite.language import LanguageModel
from theodolite.language.local import LocalModel

_CHARACTERS = 3  # a token of an endpoint, whose tokenizer is not known here; most have more


@dataclass
class Account:
    """rejected: answers that were no new configuration or no number; unreadable: those of them that could not be read.

    fallbacks: times that a random choice stood in. prompts: all that were sent, where they are kept.
    """

    rejected: int = 0
    unreadable: int = 0
    fallbacks: int = 0
    keep: bool = False
    prompts: list[str] = field(default_factory=list)

    def note(self, prompts: Sequence[str]) -> None:
        """Keep the prompts where they are kept."""
        if self.keep:
            self.prompts.extend(prompts)


class Asker:
    """n_templates: prompts with the trials in different orders, whose answers are put together. level, anonymize, log10: as in
    `Wording`. context_window: tokens that the model can read; a local model's own where None, no limit for an endpoint.
    """

    def __init__(
        self,
        space: SearchSpace,
        context: TaskContext,
        llm: LanguageModel,
        *,
        n_templates: int = 2,
        context_level: str = "full",
        anonymize: bool = False,
        log10: bool = False,
        context_window: int | None = None,
        account: Account | None = None,
        seed: int = 0,
    ) -> None:
        if n_templates < 1:
            raise InputError(f"n_templates must be at least 1, got {n_templates}")
        if context_window is not None and context_window < 1:
            raise InputError(f"context_window must be at least 1 token, got {context_window}")
        self.wording = Wording(space, context, context_level, anonymize, log10)
        self.space, self.context, self.llm = space, context, llm
        self.n_templates, self.context_window, self.seed = n_templates, context_window, seed
        self.account = Account() if account is None else account

    def _fitting(self, trials: Sequence[Trial], build: Callable[[Sequence[Trial]], str], reserve: int) -> list[Trial]:
        """The trials whose prompt, with ``reserve`` tokens of answer, fits the window: the best half and the most recent half."""
        window = self.context_window
        if window is None:
            window = self.llm.window if isinstance(self.llm, LocalModel) else None
            if window is None:
                return list(trials)

        def fits(some: Sequence[Trial]) -> bool:
            return self._tokens(build(some)) + reserve <= window

        if fits(trials):
            return list(trials)
        least, most = 0, len(trials) - 1
        while least < most:
            middle = -(-(least + most) // 2)
            least, most = (middle, most) if fits(self._best_and_recent(trials, middle)) else (least, middle - 1)
        if least < 1:
            raise InputError(
                f"a prompt with one trial takes {self._tokens(build(trials[:1]))} tokens and {reserve} of answer, more than the "
                f"window of {window}; use a model with a longer one, fewer parameters or a lower context level"
            )
        warnings.warn(
            f"{least} of {len(trials)} trials fit the model's window of {window} tokens: the best half and the most recent half "
            "are told",
            stacklevel=4,
        )
        return self._best_and_recent(trials, least)

    def _best_and_recent(self, trials: Sequence[Trial], count: int) -> list[Trial]:
        sign = 1 if self.context.lower_is_better else -1
        best = sorted(range(len(trials)), key=lambda i: sign * trials[i].score)[: -(-count // 2)]
        others = [i for i in range(len(trials)) if i not in set(best)]
        return [trials[i] for i in sorted([*best, *others[len(others) - (count - len(best)) :]])]

    def _tokens(self, text: str) -> int:
        if isinstance(self.llm, LocalModel):
            return len(self.llm.tokenizer(text, verbose=False)["input_ids"])
        return -(-len(text) // _CHARACTERS)


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, small enough for every endpoint."""
    return int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1)[0] >> 1)
