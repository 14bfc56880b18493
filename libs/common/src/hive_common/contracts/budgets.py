"""What model calls of several attempts may use together. Capability tokens say it, and the router counts."""

from typing import Final

import msgspec

from hive_common.contracts.jobdocument import Budget
from hive_common.kernel.money import parse_usd

JOB: Final = "job"
TASK: Final = "task"
TOKENS_MAX: Final = 10**15
"""No budget is larger."""


class SharedBudget(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all calls on one account may use, in however many attempts. None: no such limit.

    Args:
        subject: `job:<id>`: all calls of a job, those of judges too. `task:<id>`: those of all attempts of a task,
            and of all that it forked.
        nano_usd: on routes that cost something.
        tokens: of prompts and completions, on every route.
    """

    subject: str
    nano_usd: int | None = None
    tokens: int | None = None


def shared(subject: str, budget: Budget) -> SharedBudget:
    """Return the budget of a job document as it is counted, on the account of `subject`.

    Raises:
        InvalidArgument: it has an amount of dollars that is none, or is too large or too fine.
    """
    # Through its shortest decimal form, which is what was written: nothing is reckoned with floats.
    nano_usd = None if budget.usd is None else parse_usd(repr(budget.usd), "usd")
    return SharedBudget(subject, nano_usd, budget.tokens)
