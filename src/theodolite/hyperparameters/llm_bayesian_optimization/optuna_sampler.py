"""The optimiser as a sampler of optuna's."""

__all__ = ["make_sampler"]

import math
from typing import TYPE_CHECKING, Any

from theodolite.core.errors import InputError, require
from theodolite.hyperparameters.space import Float, Int, Trial

if TYPE_CHECKING:
    from theodolite.hyperparameters.llm_bayesian_optimization.optimizer import LLAMBO


def make_sampler(search: "LLAMBO") -> Any:
    """A ``BaseSampler`` that answers each trial of a study with what ``search`` would evaluate next."""
    optuna = require("optuna", "search")
    space = search.space
    known: dict[str, Any] = {}
    for name, one in space.items():
        if isinstance(one, Int):
            known[name] = optuna.distributions.IntDistribution(one.low, one.high, log=one.scale == "log")
        elif isinstance(one, Float):
            known[name] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.scale == "log")
        else:
            known[name] = optuna.distributions.CategoricalDistribution(one.values)
    random = optuna.samplers.RandomSampler(seed=search.seed)

    class LLAMBOSampler(optuna.samplers.BaseSampler):
        """Parameters of the space by the language model, others at random."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return dict(known)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            if len(study.directions) != 1:
                raise InputError("the sampler works on one objective; the study has several")
            if (study.direction == optuna.study.StudyDirection.MINIMIZE) != search.lower_is_better:
                raise InputError("the study's direction is not that of the task's context (lower_is_better)")
            done = [
                Trial({name: one.params[name] for name in space}, math.nan if one.value is None else one.value)
                for one in study.get_trials(deepcopy=False)
                if one.state.is_finished() and set(space) <= set(one.params)
            ]
            complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            if complete and not done:
                missing = ", ".join(sorted(set(space) - set(complete[-1].params)))
                raise InputError(
                    f"the objective does not suggest {missing}; it has to suggest all parameters of the space"
                )
            return search.after(done)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return random.sample_independent(study, trial, param_name, param_distribution)

    return LLAMBOSampler()
