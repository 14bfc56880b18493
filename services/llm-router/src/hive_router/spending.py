"""What is asked about money: usage, budgets, and setting them."""

import re
from typing import Final

from hive_common.contracts.budgets import JOB, SharedBudget
from hive_common.contracts.events import BudgetLimit, BudgetReturned
from hive_common.kernel.errors import InvalidArgument, NotFound
from hive_common.kernel.ids import is_id
from hive_proto.models.v1 import models_pb2

from hive_router.domain.budgets import NOTHING, REQUEST, check_subject, windows
from hive_router.jobs import Jobs
from hive_router.ledger import BY, Ledger, Unaccounted, UsageRow
from hive_router.treasury import Treasury

ROWS_DEFAULT: Final = 200
ROWS_MAX: Final = 1_000
LIMITS_MAX: Final = 8
REASON_CHARACTERS_MAX: Final = 500
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d\Z")
_ACTOR: Final = "router"


class Spending:
    """Answers.

    Args:
        treasury: has the budgets.
        ledger: reads the views.
        jobs: says with which budgets jobs were submitted.
    """

    def __init__(self, treasury: Treasury, ledger: Ledger, jobs: Jobs) -> None:
        self._jobs = jobs
        self._treasury = treasury
        self._ledger = ledger

    async def usage(self, request: models_pb2.UsageRequest) -> models_pb2.UsageResponse:
        """Sum up. Raises InvalidArgument, Unavailable."""
        if request.by not in BY:
            raise InvalidArgument(f"by: got {request.by[:40]!r}; expected {', '.join(BY)}", path="by")
        if request.since_day and not _DAY.match(request.since_day):
            raise InvalidArgument("since_day: expected a day such as 2026-11-26", path="since_day")
        if not 0 <= request.limit <= ROWS_MAX:
            raise InvalidArgument(f"limit: got {request.limit}; expected 1 to {ROWS_MAX}", path="limit")
        if request.job and not is_id(request.job):
            raise InvalidArgument("job: expected a UUID", path="job")
        limit = request.limit or ROWS_DEFAULT
        rows, position = await self._ledger.usage(request.by, request.since_day, limit, request.job)
        return models_pb2.UsageResponse(rows=[_row(row) for row in rows], position=position)

    async def job(self, request: models_pb2.JobUsageRequest, only: str) -> models_pb2.JobUsage:
        """Return what a job's calls have used, and what of its budget that is.

        Args:
            request: which job.
            only: pseudonym of the caller, who sees no other's jobs; empty for one who sees all.

        Raises:
            InvalidArgument, NotFound, Unavailable.
        """
        job = request.job_id
        facts = await self._jobs.of(job) if is_id(job) else None
        if facts is None or only not in ("", facts.caller):
            raise NotFound(f"there is no job {job[:80]}", job=job[:80])
        rows, position = await self._ledger.usage("job", "", 1, job)
        used = _row(rows[0]) if rows else models_pb2.UsageRow(name=job)
        budget = await self._budget(f"{JOB}:{job}", facts.budget)
        return models_pb2.JobUsage(used=used, budget=budget, position=position)

    async def budgets(self, request: models_pb2.BudgetsRequest) -> models_pb2.BudgetsResponse:
        """Return one budget, or all that are set. Raises InvalidArgument, Unavailable."""
        if request.subject:
            check_subject(request.subject)
        subjects = [request.subject] if request.subject else self._treasury.subjects()[:ROWS_MAX]
        return models_pb2.BudgetsResponse(budgets=[await self._budget(subject) for subject in subjects])

    async def set_budget(self, request: models_pb2.SetBudgetRequest) -> models_pb2.Budget:
        """Set limits. Raises InvalidArgument, Unavailable."""
        if len(request.limits) > LIMITS_MAX:
            raise InvalidArgument(f"limits: expected at most {LIMITS_MAX}", path="limits")
        new = [BudgetLimit(one.per, one.unit, one.amount) for one in request.limits]
        if not new and not request.clear:
            raise InvalidArgument("limits: expected one or more, or clear", path="limits")
        await self._treasury.set(request.subject, new, clear=request.clear, actor=request.caller or _ACTOR)
        return await self._budget(request.subject)

    async def return_unaccounted(self, request: models_pb2.ReturnUnaccountedRequest) -> models_pb2.Budget:
        """Count what nobody accounts for as not spent. Raises InvalidArgument, Unavailable."""
        check_subject(request.subject)
        reason = request.reason[:REASON_CHARACTERS_MAX] or "somebody looked, and it was not spent"
        for one in await self._ledger.unaccounted(request.subject, self._treasury.block):
            usd, tokens = one.amount.nano_usd, one.amount.tokens
            event = BudgetReturned(request.subject, one.block, one.day, usd, tokens, reason)
            await self._treasury.give_back(event, request.caller or _ACTOR)
        return await self._budget(request.subject)

    async def _budget(self, subject: str, asked: SharedBudget | None = None) -> models_pb2.Budget:
        account, held, free, day = await self._treasury.state(subject)
        left = await self._ledger.unaccounted(subject, self._treasury.block)
        at = windows(day)
        states = []
        for limit in self._treasury.limits(subject, asked):
            counted = NOTHING if limit.per == REQUEST else account.counted.get(at[limit.per], NOTHING)
            used = NOTHING if limit.per == REQUEST else counted.minus(held).minus(free)
            states.append(
                models_pb2.BudgetState(
                    limit=models_pb2.BudgetLimit(per=limit.per, unit=limit.unit, amount=limit.amount),
                    spent=used.of(limit.unit),
                    reserved=0 if limit.per == REQUEST else held.of(limit.unit),
                    unaccounted=0 if limit.per == REQUEST else _within(left, limit, at[limit.per]),
                )
            )
        inherited = self._treasury.is_inherited(subject) and asked is None
        return models_pb2.Budget(subject=subject, limits=states, inherited=inherited)


def _row(row: UsageRow) -> models_pb2.UsageRow:
    return models_pb2.UsageRow(
        name=row.name,
        calls=row.calls,
        failed=row.failed,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        nano_usd=row.nano_usd,
        estimated=row.estimated,
        core=row.core,
    )


def _within(left: list[Unaccounted], limit: BudgetLimit, window: str) -> int:
    """Return how much of what is unaccounted counts in a window."""
    return sum(one.amount.of(limit.unit) for one in left if window in windows(one.day).values())
