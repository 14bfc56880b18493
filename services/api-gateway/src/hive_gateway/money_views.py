"""What REST answers about keys, budgets and usage."""

from hive_proto.keys.v1 import keys_pb2
from hive_proto.models.v1 import models_pb2

from hive_gateway.views import View


class ApiKey(View, frozen=True, kw_only=True):
    """An API key. `scope` is user or admin; `pseudonym` stands in the log for whoever shows it."""

    name: str
    scope: str
    pin: str
    counts_only: bool
    cloud: bool
    created_us: int
    revoked_us: int | None
    pseudonym: str


class CreatedKey(View, frozen=True, kw_only=True):
    """A key that was made. `secret` is shown here and never again; empty where its digest was sent."""

    key: ApiKey
    secret: str


class ApiKeyPage(View, frozen=True, kw_only=True):
    """API keys in order of names. `next` is the `after` of the next page."""

    keys: tuple[ApiKey, ...]
    next: str | None


class UsageRow(View, frozen=True, kw_only=True):
    """What calls of one name have used.

    `estimated` are calls whose cost is what was reserved for them, `core` those that an executor of tier `core`, or
    a provider, has answered.
    """

    name: str
    calls: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    nano_usd: int
    estimated: int
    core: int


class Usage(View, frozen=True, kw_only=True):
    """What calls have used, what cost most first. `position` is that of the log up to which they are counted."""

    by: str
    rows: tuple[UsageRow, ...]
    position: int


class LimitBody(View, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At most `amount` per request, day, month or ever: nano-USD where `unit` is usd, else tokens."""

    per: str
    unit: str
    amount: int


class BudgetLimit(View, frozen=True, kw_only=True):
    """A limit and what of it is used. `unit` is usd (all amounts are nano-USD) or tokens.

    `unaccounted` is what of `spent` a router that died had set aside, with no record of a call.
    """

    per: str
    unit: str
    amount: int
    spent: int
    reserved: int
    unaccounted: int


class Budget(View, frozen=True, kw_only=True):
    """Limits of a subject: total, key:<name>, job:<id>, task:<id> or agent:<name>. `inherited`: those of `*`."""

    subject: str
    limits: tuple[BudgetLimit, ...]
    inherited: bool


class Budgets(View, frozen=True, kw_only=True):
    """All budgets that are set, or the one that was asked for."""

    budgets: tuple[Budget, ...]


class JobUsage(View, frozen=True, kw_only=True):
    """What calls of a job have used, and its budget; that has no limits where it was submitted without.

    `spent` of a limit is what counts against it, with what routers that died had set aside. `position` is that of
    the log up to which calls are counted.
    """

    used: UsageRow
    budget: Budget
    position: int


def key(message: keys_pb2.Key) -> ApiKey:
    """Return the view of a key."""
    return ApiKey(
        name=message.name,
        scope=message.scope,
        pin=message.pin,
        counts_only=message.counts_only,
        cloud=message.cloud,
        created_us=message.created_us,
        revoked_us=message.revoked_us or None,
        pseudonym=message.pseudonym,
    )


def usage(by: str, message: models_pb2.UsageResponse) -> Usage:
    """Return the view of usage."""
    return Usage(by=by, rows=tuple(map(_row, message.rows)), position=message.position)


def job_usage(message: models_pb2.JobUsage) -> JobUsage:
    """Return the view of a job's usage."""
    return JobUsage(used=_row(message.used), budget=budget(message.budget), position=message.position)


def _row(row: models_pb2.UsageRow) -> UsageRow:
    return UsageRow(
        name=row.name,
        calls=row.calls,
        failed=row.failed,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        nano_usd=row.nano_usd,
        estimated=row.estimated,
        core=row.core,
    )


def budget(message: models_pb2.Budget) -> Budget:
    """Return the view of a budget."""
    limits = (
        BudgetLimit(
            per=state.limit.per,
            unit=state.limit.unit,
            amount=state.limit.amount,
            spent=state.spent,
            reserved=state.reserved,
            unaccounted=state.unaccounted,
        )
        for state in message.limits
    )
    return Budget(subject=message.subject, limits=tuple(limits), inherited=message.inherited)
