"""A training run as a page that people can read and audit."""

__all__ = ["training_report"]

import difflib
import html

from theodolite.core.errors import InputError
from theodolite.core.estimate import format_number
from theodolite.hyperparameters.verbalized.training import VerbalizedModel


def training_report(model: VerbalizedModel) -> str:
    """HTML fragment: theta_0, the descriptions in use, and every step with its losses, its reasoning and what it changed.

    All that a language model wrote is escaped. Raises InputError for a model that is not fitted.
    """
    if not hasattr(model, "history_"):
        raise InputError("this model is not fitted, so there is nothing to report; call fit first")
    head = "".join(f"<th>{name}</th>" for name in ("step", "loss", "validation", "kept", "descriptions", "reasoning"))
    body = "".join(
        f"<tr><td>{one.step}</td><td>{format_number(one.loss_before)}</td>"
        f"<td>{'' if one.loss_after_validation is None else format_number(one.loss_after_validation)}</td>"
        f"<td>{'yes' if one.accepted else 'no'}</td><td>{_changes(one.theta_before, one.theta_after)}</td>"
        f"<td><details><summary>reasoning</summary>{html.escape(one.reasoning)}</details></td></tr>"
        for one in model.history_
    )
    told = (
        f"{len(model.history_)} steps, {model.calls_} calls, {model.tokens_} tokens, {model.unparsed_} answers that could not "
        f"be read, {model.failed_updates_} updates that could not be read; ended: {model.stopped_}"
    )
    return (
        '<section class="verbalized">'
        f"<p><b>Always told:</b> {html.escape(model.theta_initial_)}</p>"
        f"<p><b>In use:</b> {html.escape(model.theta_)}</p><p>{told}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _changes(before: str, after: str) -> str:
    """Words that went and words that came, in their place."""
    old, new = before.split(), after.split()
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = html.escape(" ".join(old[a:b])), html.escape(" ".join(new[c:d]))
        if kind == "equal":
            parts.append(gone)
        else:
            parts += [f"<del>{gone}</del>"] * bool(gone) + [f"<ins>{come}</ins>"] * bool(come)
    return " ".join(parts)
