"""``theodolite run validated-inference``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, lines, tell


@subject_flags
def command(
    flags: SubjectFlags,
    validate: Annotated[bool, typer.Option(help="check every algorithm exactly on small programs")] = False,
    demo: Annotated[str | None, typer.Option(help="hmm: filter a hidden Markov model whose evidence is known")] = None,
    probs: Annotated[Path | None, typer.Option(help=".npy file of held-out probabilities, rows x classes")] = None,
    truth: Annotated[Path | None, typer.Option(help="text file: the true class of each row, 0, 1, ...")] = None,
    particles: Annotated[int, typer.Option(help="particles", min=2)] = 500,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Validate algorithms, run a demo, recalibrate probabilities from --probs and --truth, or chart a subject."""
    if validate:
        tell(_validate(), as_json)
    elif demo is not None:
        if demo != "hmm":
            raise InputError(f"the demo is called hmm, got {demo!r}")
        tell(_demo(particles, flags.seed), as_json)
    elif probs is None and truth is None:
        chart("validated-inference", flags, seconds, memory, as_json)
    elif probs is None or truth is None:
        raise InputError("give both --probs (a .npy file) and --truth (a text file of class numbers)")
    else:
        tell(_recalibrate(probs, truth, particles, flags.seed), as_json)


def _validate() -> dict[str, Any]:
    from theodolite.predictions.inference import SUITE, collapse, mcmc_program, rmsmc_program, smc_program
    from theodolite.predictions.inference import validate as check

    small = tuple(example for example in SUITE if example.grid == 2)
    reports = {
        f"smc_{resampler}": check(
            lambda m, resampler=resampler: collapse(smc_program(m, particles=2, resampler=resampler))
        )
        for resampler in ("multinomial", "stratified", "systematic")
    }
    reports["mcmc"] = check(lambda m: mcmc_program(m, steps=1))
    for name, freeze in (("rmsmc", False), ("rmsmc_frozen", True)):
        reports[name] = check(
            lambda m, freeze=freeze: collapse(rmsmc_program(m, particles=2, moves=1, freeze=freeze)), small
        )
    return {
        name: f"{'valid' if report else 'NOT valid'}, largest difference {report.difference:.1e} on {len(report.checks)} programs"
        for name, report in reports.items()
    }


def _demo(particles: int, seed: int) -> dict[str, Any]:
    from theodolite.predictions.inference import hmm, hmm_log_evidence, pooled_log_evidence, smc

    runs = [smc(hmm(), particles=particles, rng=seed * 10 + i) for i in range(10)]
    return {
        "log_evidence": pooled_log_evidence(runs),
        "exactly": hmm_log_evidence(),
        "effective_sample_size": round(runs[0].ess, 1),
    }


def _recalibrate(probs: Path, truth: Path, particles: int, seed: int) -> dict[str, Any]:
    import numpy as np

    from theodolite.predictions.inference import recalibration, rmsmc

    p = array(probs)
    names = lines(truth)
    if not all(name.isdecimal() for name in names):
        raise DataError(f"{truth} must hold a class number 0, 1, ... a line")
    if p.ndim != 2 or p.shape[1] < 2 or not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-3):
        raise DataError(f"{probs} must hold probabilities, rows x at least 2 classes, each row with sum 1")
    y = np.array([int(name) for name in names])
    logp = np.log(p.clip(min=1e-12))
    found = rmsmc(recalibration(logp, y), particles=particles, moves=2, rng=seed)
    temperature = np.array([value[0] for value in found.values])
    order = np.argsort(temperature)
    ends = np.searchsorted(np.cumsum(found.weights[order]), [0.025, 0.975]).clip(max=len(order) - 1)
    return {
        "rows": len(y),
        "temperature": round(found.expectation(lambda theta: theta[0]), 4),
        "temperature_95_percent": [round(float(v), 4) for v in temperature[order][ends]],
        "lapse_rate": round(found.expectation(lambda theta: theta[1]), 5),
        "nats_over_the_probabilities_as_they_are": round(
            found.log_evidence - float(logp[np.arange(len(y)), y].sum()), 2
        ),
        "effective_sample_size": round(found.ess, 1),
    }
