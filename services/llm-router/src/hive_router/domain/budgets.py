"""What may be spent: limits, what counts against them, and what one process may draw without asking anybody.

An account is what the log says of a subject: its limits, and what was set aside for it by day, month and for ever.
A purse is what this process has set aside of that, durably, and not used yet: calls draw from it in memory.

    reserve   free → held     before a call: the most that it can cost
    settle    held → spent    after it: what it cost; the rest is free again
    release   held → free     it failed before anything was generated

What a process that dies had in its purse stays counted as spent.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from hive_common.contracts.budgets import JOB, TASK, TOKENS_MAX, SharedBudget
from hive_common.contracts.events import BudgetLimit, BudgetReserved, BudgetReturned, BudgetSet, Event
from hive_common.kernel.errors import InvalidArgument, UnknownEvent
from hive_common.kernel.ids import is_id
from hive_common.kernel.money import NANO_PER_USD, USD_MAX, show_usd

REQUEST: Final = "request"
DAY: Final = "day"
MONTH: Final = "month"
EVER: Final = "ever"
PERIODS: Final = (REQUEST, DAY, MONTH, EVER)

USD: Final = "usd"
TOKENS: Final = "tokens"
UNITS: Final = (USD, TOKENS)

TOTAL: Final = "total"
KEY: Final = "key"
AGENT: Final = "agent"
EACH: Final = "*"
"""In place of a name: each one that has no limits of its own. Of tasks there is none: their jobs say it."""

BLOCK_CALLS: Final = 8
"""A block is enough for so many calls like the one that needs it: what a crash costs is bounded by that."""

BLOCK_CALLS_MAX: Final = 512
_SOON_S: Final = 0.5
_LONG_S: Final = 4.0
_SHARE: Final = 4
"""Beyond what calls wait for, a block takes no more than this part of what a limit leaves."""

_NAME_CHARACTERS_MAX: Final = 200
_IN_WORDS: Final = {REQUEST: "for one call", DAY: "today (UTC)", MONTH: "this month (UTC)", EVER: "so far"}


class Amount(msgspec.Struct, frozen=True):
    """Money and tokens."""

    nano_usd: int = 0
    tokens: int = 0

    def plus(self, other: "Amount") -> "Amount":
        """Return the sum."""
        return Amount(self.nano_usd + other.nano_usd, self.tokens + other.tokens)

    def minus(self, other: "Amount") -> "Amount":
        """Return the difference."""
        return Amount(self.nano_usd - other.nano_usd, self.tokens - other.tokens)

    def times(self, count: int) -> "Amount":
        """Return so many times it."""
        return Amount(self.nano_usd * count, self.tokens * count)

    def covers(self, other: "Amount") -> bool:
        """Say whether there is at least as much of both."""
        return self.nano_usd >= other.nano_usd and self.tokens >= other.tokens

    def of(self, unit: str) -> int:
        """Return how much of a unit."""
        return self.nano_usd if unit == USD else self.tokens


NOTHING: Final = Amount()


class Account(msgspec.Struct):
    """A subject as the log has it. `counted` is by window (`windows`), and may lack windows of earlier times."""

    subject: str
    version: int = 0
    limits: tuple[BudgetLimit, ...] = ()
    counted: dict[str, Amount] = {}

    def evolve(self, event: Event) -> None:
        """Take in the next event of its stream. Raises UnknownEvent for one that is not of budgets (law 11)."""
        match event:
            case BudgetSet():
                self.limits = event.limits
            case BudgetReserved() | BudgetReturned():
                amount = Amount(event.nano_usd, event.tokens)
                for window in windows(event.day).values():
                    before = self.counted.get(window, NOTHING)
                    self.counted[window] = (
                        before.plus(amount) if isinstance(event, BudgetReserved) else before.minus(amount)
                    )
            case _:
                raise UnknownEvent(f"a budget's stream holds a {type(event).__name__}")
        self.version += 1


class Purse:
    """What this process has set aside for calls of one day.

    Attributes:
        free: may be drawn. Negative where a provider charged more than was reserved.
        held: by calls that run.
    """

    __slots__ = ("day", "free", "held")

    def __init__(self, day: str) -> None:
        self.day = day
        self.free = NOTHING
        self.held = NOTHING

    def reserve(self, need: Amount) -> bool:
        """Hold `need` where that much is free."""
        if not self.free.covers(need):
            return False
        self.free, self.held = self.free.minus(need), self.held.plus(need)
        return True

    def settle(self, need: Amount, cost: Amount) -> None:
        """End a reservation of `need` that came to cost `cost`."""
        self.held = self.held.minus(need)
        self.free = self.free.plus(need).minus(cost)

    def fill(self, block: Amount) -> None:
        """Add what was set aside."""
        self.free = self.free.plus(block)

    def emptied(self) -> Amount:
        """Return what is free, and take it out."""
        free, self.free = self.free, NOTHING
        return free


class Shortage(msgspec.Struct, frozen=True):
    """A limit that does not leave enough. `used` is spent and reserved; both are in the limit's unit."""

    subject: str
    limit: BudgetLimit
    spent: int
    reserved: int
    need: int

    @property
    def message(self) -> str:
        """Say so to people: what was spent, the limit, and who may raise it with which command."""
        limit, name = self.limit, in_words(self.subject)
        most = show(limit.unit, limit.amount)
        need = show(limit.unit, self.need)
        if limit.per == REQUEST:
            text = f"one call of {name} may cost {most}, and this one may cost {need}: ask for fewer tokens"
        else:
            spent, held = show(limit.unit, self.spent), show(limit.unit, self.reserved)
            running = f", {held} are reserved for calls that run" if self.reserved else ""
            text = (
                f"{name} has spent {spent} of {most} {_IN_WORDS[limit.per]}{running}, and this call may cost {need}"
            )
        return (
            f"{text}. The owner, or who has a key made with --admin, may raise it: {command(self.subject, limit)}"
        )


def windows(day: str) -> dict[str, str]:
    """Return the windows that a day lies in, by period."""
    return {DAY: day, MONTH: day[:7], EVER: EVER}


def over_request(subject: str, limits: Sequence[BudgetLimit], need: Amount) -> Shortage | None:
    """Return the limit of single calls that `need` is beyond, or None."""
    for limit in limits:
        if limit.per == REQUEST and need.of(limit.unit) > limit.amount:
            return Shortage(subject, limit, 0, 0, need.of(limit.unit))
    return None


def block_calls(calls: int, lasted_s: float) -> int:
    """Return for how many calls the next block is, where one for `calls` has lasted so long.

    Under load a block is for about a second of calls, so that hardly any of them waits for the log.
    """
    if lasted_s < _SOON_S:
        return min(2 * calls, BLOCK_CALLS_MAX)
    return max(calls // 2, BLOCK_CALLS) if lasted_s > _LONG_S else calls


def block(
    account: Account,
    limits: Sequence[BudgetLimit],
    purse: Purse,
    need: Amount,
    wanted: Amount,
    calls: int = BLOCK_CALLS,
) -> Amount | Shortage:
    """Decide on a further block for a purse that does not cover `need`.

    Args:
        account: of the subject.
        limits: that hold for it.
        purse: of the day.
        need: of the call.
        wanted: of all calls that wait, this one among them.
        calls: for so many it should be.
    """
    missing = Amount(max(0, need.nano_usd - purse.free.nano_usd), max(0, need.tokens - purse.free.tokens))
    granted = {
        unit: max(missing.of(unit), wanted.of(unit), calls * need.of(unit)) if missing.of(unit) else 0
        for unit in UNITS
    }
    at = windows(purse.day)
    for limit in limits:
        if limit.per == REQUEST:
            continue
        counted = account.counted.get(at[limit.per], NOTHING).of(limit.unit)
        room = limit.amount - counted
        if missing.of(limit.unit) > max(room, 0):
            held, free = purse.held.of(limit.unit), purse.free.of(limit.unit)
            return Shortage(account.subject, limit, counted - held - free, held, need.of(limit.unit))
        share = max(missing.of(limit.unit), wanted.of(limit.unit), room // _SHARE)
        granted[limit.unit] = min(granted[limit.unit], share, max(room, 0))
    return Amount(granted[USD], granted[TOKENS])


def has_budget(limits: Sequence[BudgetLimit]) -> bool:
    """Say whether limits bound what may be spent in money over time, which a cloud call needs (law 7)."""
    return any(limit.unit == USD and limit.per != REQUEST for limit in limits)


def limits_of(subject: str, limits: Mapping[str, Sequence[BudgetLimit]]) -> Sequence[BudgetLimit]:
    """Return the limits that hold for a subject: its own, else those of each one of its kind."""
    own = limits.get(subject)
    if own:
        return own
    kind, colon, _ = subject.partition(":")
    return limits.get(f"{kind}:{EACH}", ()) if colon else ()


def asked_of(budget: SharedBudget) -> tuple[BudgetLimit, ...]:
    """Return the limits with which a job was submitted."""
    asked = ((USD, budget.nano_usd), (TOKENS, budget.tokens))
    return tuple(BudgetLimit(EVER, unit, amount) for unit, amount in asked if amount is not None)


def with_asked(
    limits: Sequence[BudgetLimit], own: Sequence[BudgetLimit], asked: Sequence[BudgetLimit]
) -> Sequence[BudgetLimit]:
    """Return the limits that hold where a job was submitted with some.

    Args:
        limits: those that hold without.
        own: those of them that somebody has set for just this subject: they raise, or lower, what was asked for.
        asked: with which it was submitted. They take nothing away from what is set for each one.
    """
    by_place = {(one.per, one.unit): one for one in limits}
    for one in asked:
        place = (one.per, one.unit)
        if place not in {(other.per, other.unit) for other in own}:
            by_place[place] = min(one, by_place.get(place, one), key=lambda limit: limit.amount)
    return tuple(by_place.values())


def subjects_of(key: str, job: str, agent: str) -> tuple[str, ...]:
    """Return whose budgets a call counts against."""
    named = ((KEY, key), (JOB, job), (AGENT, agent))
    return (TOTAL, *(f"{kind}:{name}" for kind, name in named if name))


def changed(before: Sequence[BudgetLimit], new: Sequence[BudgetLimit], *, clear: bool) -> tuple[BudgetLimit, ...]:
    """Return the limits after some of them were set anew; a limit of the same period and unit is replaced."""
    by_place = {} if clear else {(one.per, one.unit): one for one in before}
    by_place |= {(one.per, one.unit): one for one in new}
    return tuple(
        by_place[place] for place in sorted(by_place, key=lambda place: (PERIODS.index(place[0]), place[1]))
    )


def check_subject(subject: str) -> None:
    """Refuse what is no subject. Raises InvalidArgument."""
    kind, colon, name = subject.partition(":")
    kinds = (KEY, JOB, TASK, AGENT)
    good = subject == TOTAL or (colon and kind in kinds and 0 < len(name) <= _NAME_CHARACTERS_MAX)
    if good and (kind == TASK or (kind == JOB and name != EACH)):
        good = is_id(name)
    if not good or not subject.isprintable():
        raise InvalidArgument(
            f"subject: got {subject[:80]!r}; expected total, key:<name>, job:<id>, task:<id> or agent:<name>,"
            " with * in place of a name for each key, job or agent",
            path="subject",
        )


def check_limits(limits: Sequence[BudgetLimit]) -> None:
    """Refuse what is no limit. Raises InvalidArgument."""
    for number, limit in enumerate(limits):
        at = f"limits[{number}]"
        if limit.per not in PERIODS:
            raise InvalidArgument(
                f"{at}.per: got {limit.per[:40]!r}; expected {', '.join(PERIODS)}", path=f"{at}.per"
            )
        if limit.unit not in UNITS:
            raise InvalidArgument(f"{at}.unit: got {limit.unit[:40]!r}; expected usd or tokens", path=f"{at}.unit")
        most = USD_MAX * NANO_PER_USD if limit.unit == USD else TOKENS_MAX
        if not 0 <= limit.amount <= most:
            raise InvalidArgument(f"{at}.amount: got {limit.amount}; expected 0 to {most}", path=f"{at}.amount")


def in_words(subject: str) -> str:
    """Return a subject for people."""
    kind, _, name = subject.partition(":")
    return "this installation" if subject == TOTAL else f"{kind} `{name}`"


def show(unit: str, amount: int) -> str:
    """Return an amount of a unit for people."""
    return show_usd(amount) if unit == USD else f"{amount:,} tokens"


def command(subject: str, limit: BudgetLimit) -> str:
    """Return the command that sets such a limit anew."""
    kind, _, name = subject.partition(":")
    whom = "--total" if subject == TOTAL else f"--{kind} {name}"
    what = "--usd AMOUNT" if limit.unit == USD else "--tokens NUMBER"
    return f"hive model budget set {whom} {what} --per {limit.per}"
