"""The three tests of a dictionary as tables, a figure and a text."""

__all__ = ["DictionaryReport"]

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from theodolite.core.estimate import format_number

MOSTLY = 0.5
"""Above this share of prompts on which no edit already agrees, agreement says little and the effect leads."""


@dataclass(frozen=True, eq=False)
class DictionaryReport:
    """What `evaluate_dictionary` found, on prompts that neither fitted nor selected anything.

    approximation: per method, recovered and necessity with their intervals. 1 is the whole outcome; above 1 is an outcome larger
    than the clean one, not a better reconstruction.
    control: per attribute, method and k: agreement (share of prompts whose likeliest token is that of the full patch), effect
    (share of the patch's change of the outcome), their intervals, and magnitude (weight of what was taken out). leads: which of
    the two to read first. note: why a ratio is missing.
    interpretability: per location and attribute: mean_best_f1 over its values, covered (share of values with a feature of F1
    at least the threshold), groups (features that tell a union of values), cosine (mean over values of the largest cosine of a
    direction to the supervised code); and of the location fvu, l0, dead.
    """

    approximation: pd.DataFrame
    control: pd.DataFrame
    interpretability: pd.DataFrame
    threshold: float = field(default=0.8)

    def summary(self) -> str:
        """What it comes to, in a few lines."""
        told = []
        for row in self.approximation.to_dict("records"):
            told.append(
                f"{row['method']}: recovers {_share(row['recovered'])} of the outcome, necessity {_share(row['necessity'])}."
            )
        for attribute in self.control["attribute"].unique():
            table: Any = self.control[self.control["attribute"] == attribute]
            if table["effect"].isna().all():
                told.append(f"{attribute}: {table['note'].iloc[0]}.")
                continue
            leads = table["leads"].iloc[0]
            parts = [
                f"{row['method']}" + (f" (k={row['k']})" if row["k"] else "") + f" {_share(row[leads])}"
                for row in table.to_dict("records")
            ]
            told.append(f"{attribute}, {leads} of edits: {', '.join(parts)}.")
        for attribute in self.interpretability["attribute"].unique():
            table = self.interpretability[self.interpretability["attribute"] == attribute]
            told.append(
                f"{attribute}: mean best F1 {format_number(float(table['mean_best_f1'].mean()))}; "
                f"{_share(float(table['covered'].mean()))} of its values have a feature of F1 >= {self.threshold}."
            )
        dead, codes = int(self.interpretability["dead"].iloc[0]), int(self.interpretability["codes"].iloc[0])
        place = self.interpretability["location"].iloc[0]
        told.append(f"Dead codes at {place}: {dead} of {codes}.")
        return "\n".join(told)

    def plot(self) -> go.Figure:
        """Edits: what they reach against how much they take out; a good edit is high and to the left."""
        figure = go.Figure()
        shown = self.control.dropna(subset=["magnitude", "effect"])
        for attribute in shown["attribute"].unique():
            of: Any = shown[shown["attribute"] == attribute]
            leads = of["leads"].iloc[0]
            for method, table in of.groupby("method", sort=False):
                figure.add_trace(
                    go.Scatter(
                        x=table["magnitude"].tolist(), y=table[leads].tolist(), mode="markers+lines",
                        name=f"{attribute}: {method}",
                        text=[f"k = {k}" if k else "" for k in table["k"]],
                    )
                )  # fmt: skip
        figure.update_xaxes(title_text="edit magnitude (weight of what was taken out)")
        figure.update_yaxes(title_text="agreement with the full patch, or share of its effect")
        return figure


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
