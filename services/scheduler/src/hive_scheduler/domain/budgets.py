"""Budgets of jobs and tasks, read strictly. The router counts what is used of them."""

from typing import Final

from hive_common.artifacts.documents import refuse
from hive_common.contracts.budgets import TOKENS_MAX
from hive_common.contracts.jobdocument import Budget
from hive_common.kernel.money import parse_usd

from hive_scheduler.domain.words import require

_WORDS: Final = "`usd`, `tokens` or both"


def check_budget(budget: Budget | None, path: str) -> Budget | None:
    """Return a budget, if it is one. Raises InvalidArgument with the path of what is wrong."""
    if budget is None:
        return None
    if budget.usd is None and budget.tokens is None:
        refuse("", path, "nothing is limited", _WORDS)
    if budget.usd is not None:
        parse_usd(repr(budget.usd), f"{path}.usd")
    if budget.tokens is not None:
        require(0 <= budget.tokens <= TOKENS_MAX, f"{path}.tokens", f"0 to {TOKENS_MAX}", budget.tokens)
    return budget
