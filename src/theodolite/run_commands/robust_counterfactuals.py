"""``theodolite run robust-counterfactuals``."""

__all__ = ["command"]

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    rows: Annotated[
        int | None, typer.Option(help="test rows to find counterfactuals for; leave out for a chart", min=1)
    ] = None,
    wanted: Annotated[
        str | None, typer.Option(help="name of the wanted class; the second of two where left out")
    ] = None,
    tau: Annotated[float, typer.Option(help="stability to reach, between 0 and 1")] = 0.75,
    immutable: Annotated[
        list[str] | None, typer.Option(help="column, or a whole category, that may not change; repeat for more")
    ] = None,
    increasing: Annotated[list[str] | None, typer.Option(help="column that may only grow; repeat for more")] = None,
    decreasing: Annotated[list[str] | None, typer.Option(help="column that may only fall; repeat for more")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="one-hot group: its columns with commas between them; repeat for more (default: the categories of the file)"
        ),
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN=NUMBER: what a change over the column's range costs, 1 where not told; repeat for more"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write the counterfactuals to, in the units of the file")
    ] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Counterfactuals that retrained models accept, too: with --rows for so many test rows, else a chart as in the survey."""
    if rows is None:
        if wanted or immutable or increasing or decreasing or group or cost or out:
            raise InputError(
                "--wanted, --immutable, --increasing, --decreasing, --group, --cost and --out go with --rows"
            )
        chart("robust-counterfactuals", flags, seconds, memory, as_json)
        return
    import numpy as np
    import pandas as pd

    from theodolite.core.files import write_whole
    from theodolite.explanations.robust_counterfactuals import TRex, TRexNearest
    from theodolite.survey.explanations.counterfactuals import one_hot_groups

    subject = flags.load()
    data = subject.data
    if data.modality != "tabular" or data.task != "classification":
        raise DataError(f"counterfactuals need a table with classes; these data are {data.modality}, {data.task}")
    if wanted is None and len(data.classes) > 2:
        raise InputError(f"say with --wanted which class is wanted: {', '.join(data.classes)}")
    if wanted is not None and wanted not in data.classes:
        raise InputError(f"there is no class {wanted!r}; there are: {', '.join(data.classes)}")
    target = 1 if wanted is None else data.classes.index(wanted)
    view = subject.view("probability", memory=memory << 20)
    chosen = subject.flat("test")[(view.predict(data.test.x) != target).numpy()][:rows]
    if len(chosen) == 0:
        raise DataError(f"the model answers {data.classes[target]} for every test row, so there is nothing to change")
    options: dict[str, Any] = {
        "tau": tau, "names": data.features, "immutable": _features(data, immutable or ()), "increasing": increasing,
        "decreasing": decreasing,
        "groups": [one.split(",") for one in group] if group else one_hot_groups(data), "seed": flags.seed,
        "costs": _costs(data, cost or ()), "memory": memory << 20,
    }  # fmt: skip
    method = (TRex if subject.is_network else TRexNearest)(**options)
    found = method.fit(subject.predictor, subject.flat("train")).generate(chosen, target)
    names = list(data.features) or [f"column {i}" for i in range(chosen.shape[1])]
    shift, scale = np.array(data.scaling or [(0.0, 1.0)] * len(names)).T  # to the units of the file
    if out is not None:
        told_back = (shift + scale * found.counterfactuals).astype(np.float32)  # the model's own precision
        write_whole(out, pd.DataFrame(told_back, columns=names).to_csv(index=False))
    told = []
    for i in range(len(chosen)):
        change = scale * (found.counterfactuals[i] - chosen[i])
        moved = {names[c]: round(float(change[c]), 6) for c in range(len(names)) if found.valid[i] and change[c] != 0}
        told.append(
            {
                "valid": bool(found.valid[i]),
                "reached": bool(found.reached[i]),
                "stability": round(float(found.stability[i]), 4) if found.valid[i] else None,
                "cost": round(float(found.cost[i]), 4) if found.valid[i] else None,
                "changes": moved,
            }
        )
    tell(
        {
            "method": type(method).__name__,
            "wanted": data.classes[target],
            "rows": len(chosen),
            "valid": int(found.valid.sum()),
            "reached": int(found.reached.sum()),
            "counterfactuals": told,
        },
        as_json,
    )


def _costs(data: Any, told: Iterable[str]) -> dict[str, float]:
    """What a change of each feature costs: that of a category for each of its levels."""
    found = dict[str, float]()
    for text in told:
        column, _, number = text.rpartition("=")
        value = float("nan")
        try:
            value = float(number)
        except ValueError:
            column = ""
        if not column:
            raise InputError(f"--cost {text}: need COLUMN=NUMBER, such as age=5")
        levels = [feature for feature, (name, _) in data.levels.items() if name == column]
        found |= dict.fromkeys(levels or [column], value)
    return found


def _features(data: Any, columns: Iterable[str]) -> list[str]:
    """Names of features: of a category of the file that of its first level, since one holds the whole group."""
    firsts = {column.name: column.features[0] for column in data.columns if column.kind == "category"}
    return [name if name in data.features else firsts.get(name, name) for name in columns]
