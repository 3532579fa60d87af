"""What the two commands on named layers of a network share."""

__all__ = ["network_nodes"]

from typing import TYPE_CHECKING

from theodolite.commands import SubjectFlags
from theodolite.core.errors import InputError

if TYPE_CHECKING:  # torch comes with it, and every command waits for what is imported here
    from theodolite.core.subject import Subject


def network_nodes(flags: SubjectFlags, nodes: str) -> "tuple[Subject, list[str]]":
    """The subject of the flags, which has to be a network, and the names in ``nodes``."""
    subject = flags.load()
    if not subject.is_network:
        raise InputError(f"--nodes names layers of a network; {subject.name} is a {subject.model_name}")
    return subject, [name.strip() for name in nodes.split(",") if name.strip()]
