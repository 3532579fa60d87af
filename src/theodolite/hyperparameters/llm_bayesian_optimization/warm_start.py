"""Starting points proposed by a language model that has seen no evaluation (section 4), or by a plain design."""

__all__ = ["warm_start"]

from theodolite.core.errors import InputError
from theodolite.hyperparameters.llm_bayesian_optimization.asking import Account, Asker, seed_of
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.space import Config, SearchSpace
from theodolite.language import LanguageModel

_ROUNDS = 3  # times that a model is asked for more, where answers could not be read


def warm_start(
    space: SearchSpace,
    context: TaskContext,
    llm: LanguageModel | None,
    n: int = 5,
    level: str = "full",
    *,
    anonymize: bool = False,
    account: Account | None = None,
    seed: int = 0,
) -> list[Config]:
    """n different configurations to start from.

    level: what the model is told ("none" its name and the ranges, "partial" the task too, "full" facts and statistics of the
    data), or a design that asks no model: "random", "sobol", "latin_hypercube". Where fewer than n of the model's answers
    can be read, random ones stand in and are counted in ``account``. Raises EndpointError where the model does not answer.

    Source: Liu et al., 2024, arXiv:2402.03921, section 4 (zero-shot warm-starting).
    """
    if n < 1:
        raise InputError(f"need at least one starting point, got {n}")
    if level in ("random", "sobol", "latin_hypercube"):
        if level == "random":
            return space.sample(n, seed=seed)
        return space.sobol(n, seed=seed) if level == "sobol" else space.latin_hypercube(n, seed=seed)
    if level not in ("full", "partial", "none"):
        raise InputError(f"a warm start is full, partial, none, random, sobol or latin_hypercube; got {level!r}")
    if llm is None:
        raise InputError("a warm start by words needs a language model (theodolite.language.connect)")
    asker = Asker(space, context, llm, context_level=level, anonymize=anonymize, account=account, seed=seed)
    prompt, found = _prompt(asker, n), dict[tuple, Config]()
    asker.account.note([prompt])
    for attempt in range(_ROUNDS):
        (made,) = llm.generate(
            prompt, temperature=0.8, top_p=0.95, max_tokens=100 + n * 4 * len(asker.wording.ranges()),
            stop=["]"], seed=seed_of(seed, 101, attempt),
        )  # fmt: skip
        configs, bad = asker.wording.read_dictionaries(made.text)
        asker.account.rejected += bad
        asker.account.unreadable += bad
        for config in configs:
            if space.key(config) in found:
                asker.account.rejected += 1
            found.setdefault(space.key(config), config)
        if len(found) >= n:
            break
    missing = n - len(found)
    if missing > 0:
        asker.account.fallbacks += missing
        for config in space.sample(missing * 20, seed=seed):
            if len(found) < n:
                found.setdefault(space.key(config), config)
    chosen = list(found.values())[:n]
    return chosen + space.sample(n - len(chosen), seed=seed)  # a space of fewer than n configurations


def _prompt(asker: Asker, n: int) -> str:
    wording = asker.wording
    facts = wording.statistics() if wording.level == "full" else ""
    bare = "" if wording.level == "none" else ", None values or the ends of the ranges"
    example = ", ".join(f'"{name}": ...' for name in wording.names.values())
    return (
        f"You help to choose hyperparameters of {wording.subject()}. The score is {wording.metric}; {wording.direction}.\n"
        f"{facts}The hyperparameters and their ranges:\n{wording.ranges()}\n\n"
        f"Recommend {n} good configurations to try first, as different from each other as is sensible. Answer with a Python "
        f"list of {n} dictionaries and nothing else, without comments{bare}: [{{{example}}}, ...]\n\n["
    )
