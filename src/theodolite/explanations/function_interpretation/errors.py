"""What an interpreter can do wrong, told to it as text, and what stops a run."""

__all__ = ["DomainError", "QueryBudgetExceeded"]

from theodolite.core.errors import BudgetExhausted, DataError


class QueryBudgetExceeded(BudgetExhausted):
    """More inputs were asked for than the black box answers; none of them was answered."""


class DomainError(DataError):
    """An input is not one that the black box takes; none of the inputs was answered."""
