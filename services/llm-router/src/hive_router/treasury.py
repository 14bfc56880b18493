"""Money for calls to providers: set aside in the log in blocks, and drawn from these in memory (law 7).

An event reserves a block for a subject, with the version of the subject's stream: of several routers none can give
out what another has. What is left of blocks is returned when the process ends; what is left when it is killed stays
counted as spent. Subjects that nobody calls for are forgotten, their blocks returned, and read again when
somebody does: there is one for each job.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Final, Protocol

from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import (
    SCHEMA,
    BudgetLimit,
    BudgetReserved,
    BudgetReturned,
    BudgetSet,
    Event,
    encode,
)
from hive_common.eventlog.log import Append, NewEvent
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import BudgetExhausted, HiveError, Unavailable, VersionConflict
from hive_common.kernel.ids import derive_id, new_id

from hive_router.domain.budgets import (
    BLOCK_CALLS,
    NOTHING,
    Account,
    Amount,
    Purse,
    Shortage,
    asked_of,
    block,
    block_calls,
    changed,
    check_limits,
    check_subject,
    has_budget,
    limits_of,
    over_request,
    windows,
    with_asked,
)
from hive_router.metrics import BLOCKS

log = logging.getLogger(__name__)

TRIES_MAX: Final = 5
"""Against routers that reserve for the same subject at the same moment."""

BOOKS_MAX: Final = 1_000
"""Subjects that are kept at hand. Those with calls under way are, however many there are."""

IDLE_S: Final = 300.0
"""What nobody called for in this time is forgotten; by then its block would be money that others cannot have."""

AT_ONCE: Final = 64
"""Blocks that are returned together: the log commits them as one."""

ROUTER: Final = "router"


class Writer(Protocol):
    """Appends to the log (`LogWriter`)."""

    async def append(self, append: Append) -> int:
        """Append, and return the position."""
        ...


Load = Callable[[str], Awaitable[Account]]
"""Reads an account from the view, once that contains all that is committed. Raises Unavailable."""


class Hold:
    """Money that is reserved for one call, under all its subjects. It MUST be ended once: settled or released."""

    __slots__ = ("_need", "_parts", "_treasury")

    def __init__(self, treasury: "Treasury", need: Amount, parts: list[tuple["_Book", Purse]]) -> None:
        self._treasury = treasury
        self._need = need
        self._parts = parts

    @property
    def need(self) -> Amount:
        """What is reserved."""
        return self._need

    def settle(self, cost: Amount) -> None:
        """End it: the call has cost this."""
        parts, self._parts = self._parts, []
        for book, purse in parts:
            purse.settle(self._need, cost)
            self._treasury._ended(book, purse)

    def keep(self) -> None:
        """End it: nobody says what the call has cost, so it counts as what was reserved."""
        self.settle(self._need)

    def release(self) -> None:
        """End it: nothing was generated."""
        self.settle(NOTHING)


class _Book:
    """A subject at work: its account and its purse. `asked`: limits with which its job was submitted."""

    def __init__(self, account: Account, day: str) -> None:
        self.account = account
        self.asked: tuple[BudgetLimit, ...] = ()
        self.purse = Purse(day)
        self.retired: list[Purse] = []
        self.waiting = NOTHING
        self.calls = BLOCK_CALLS
        self.filled_s = 0.0
        self.filling: asyncio.Task[None] | None = None
        self.used_s = 0.0
        self.lock = asyncio.Lock()
        """Around appends to its stream."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way for it: no call, and no append."""
        is_filling = self.filling is not None and not self.filling.done()
        busy = is_filling or self.retired or self.lock.locked()
        return not busy and self.waiting == NOTHING and self.purse.held == NOTHING


class Treasury:
    """Reserves and settles.

    Args:
        writer: of the log.
        load: of accounts.
        clock: says which day it is.
        owner: pseudonym of the installation's owner.
        ns: the namespace.
        books_max: subjects that are kept at hand.

    Attributes:
        block: names what this process sets aside.
    """

    def __init__(
        self, writer: Writer, load: Load, clock: Clock, *, owner: str, ns: str, books_max: int = BOOKS_MAX
    ) -> None:
        self._writer = writer
        self._load = load
        self._clock = clock
        self._owner = owner
        self._ns = ns
        self._limits: dict[str, tuple[BudgetLimit, ...]] = {}
        self._books_max = books_max
        self._books: OrderedDict[str, _Book] = OrderedDict()
        self._forgetting: asyncio.Task[None] | None = None
        self._loading: dict[str, asyncio.Task[_Book]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.block = new_id()

    # --- limits ---

    def know(self, limits: Mapping[str, tuple[BudgetLimit, ...]]) -> None:
        """Take over all limits that are set, at the start."""
        self._limits = dict(limits)

    def subjects(self) -> list[str]:
        """Return the subjects that have limits, in order."""
        return sorted(subject for subject, limits in self._limits.items() if limits)

    def limits(self, subject: str, asked: SharedBudget | None = None) -> Sequence[BudgetLimit]:
        """Return the limits that hold for a subject.

        Args:
            subject: whose.
            asked: of a job: with which it was submitted. While it is at work that is known here.
        """
        book = self._books.get(subject)
        known = () if book is None else book.asked
        return self._limits_with(subject, known if asked is None else asked_of(asked))

    def _limits_with(self, subject: str, asked: Sequence[BudgetLimit]) -> Sequence[BudgetLimit]:
        limits = limits_of(subject, self._limits)
        return with_asked(limits, self._limits.get(subject, ()), asked) if asked else limits

    def is_inherited(self, subject: str) -> bool:
        """Say whether a subject has no limits of its own."""
        return not self._limits.get(subject)

    def has_budget(self, subjects: Sequence[str]) -> bool:
        """Say whether somebody has set a budget in money, over time, for any of these subjects.

        What a job was submitted with is none: whoever submits it may take less of what was set, not more.
        """
        return any(has_budget(limits_of(subject, self._limits)) for subject in subjects)

    async def set(self, subject: str, new: Sequence[BudgetLimit], *, clear: bool, actor: str) -> None:
        """Set limits; they hold from here on.

        Raises:
            InvalidArgument: the subject or a limit is none.
            Unavailable: the log cannot be reached.
        """
        check_subject(subject)
        check_limits(new)
        book = await self._book(subject)

        def decide() -> Event:
            return BudgetSet(subject, changed(book.account.limits, new, clear=clear))

        await self._append(book, decide, actor)
        self._limits[subject] = book.account.limits
        for other in tuple(self._books.values()):
            if other is book or limits_of(other.account.subject, self._limits) is book.account.limits:
                await self._reserve_anew(other)

    # --- calls ---

    async def hold(self, subjects: Sequence[str], need: Amount, shared: Sequence[SharedBudget] = ()) -> Hold:
        """Reserve the most that a call can cost, under all of its subjects or under none.

        Args:
            subjects: whose limits hold, where they have any.
            need: the most that it can cost.
            shared: budgets with which its job was submitted; they are subjects too.

        Raises:
            BudgetExhausted: a limit does not leave so much; says which, and who may raise it.
            Unavailable: a block has to be reserved, and the log cannot be reached.
        """
        hold = Hold(self, need, [])
        asked = {one.subject: asked_of(one) for one in shared}
        try:
            for subject in dict.fromkeys((*subjects, *asked)):
                limits = self._limits_with(subject, asked.get(subject, ()))
                if limits:
                    short = over_request(subject, limits, need)
                    if short is not None:
                        raise _exhausted(short)
                    book = await self._at_work(subject)
                    book.asked = asked.get(subject, book.asked)
                    hold._parts.append((book, await self._draw(book, need)))
        except BaseException:
            hold.release()
            raise
        return hold

    async def state(self, subject: str) -> tuple[Account, Amount, Amount, str]:
        """Return an account, what this process holds for calls, what it has free, and the day."""
        book = await self._book(subject)
        purse = self._today(book)
        return book.account, purse.held, purse.free, purse.day

    async def close(self) -> None:
        """Return what is free of all blocks. What is held stays counted: what runs is cut off, and costs."""
        for task in tuple(self._background):
            await asyncio.wait({task})
        for book in tuple(self._books.values()):
            if book.filling is not None:
                await asyncio.wait({book.filling})
            for purse in (book.purse, *book.retired):
                try:
                    await self._give_back(book, purse, "the router ends")
                except HiveError as error:
                    log.warning("%s: what is left of its blocks stays counted: %s", book.account.subject, error)

    async def give_back(self, event: BudgetReturned, actor: str) -> None:
        """Count an amount as not spent. Raises Unavailable."""
        book = await self._book(event.subject)
        await self._append(book, lambda: event, actor)

    async def run(self) -> None:
        """Forget for ever what nobody calls for any more."""
        while True:
            await asyncio.sleep(IDLE_S / 5)
            await self.forget_idle(IDLE_S)

    async def forget_idle(self, idle_s: float) -> None:
        """Forget the subjects for which nobody has called for so long, and return their blocks."""
        until_s = asyncio.get_running_loop().time() - idle_s
        await self._forget([book for book in self._books.values() if book.used_s <= until_s])

    # --- inside ---

    def _limits_of(self, book: _Book) -> Sequence[BudgetLimit]:
        return self._limits_with(book.account.subject, book.asked)

    async def _at_work(self, subject: str) -> _Book:
        """Return the book of a subject for whom somebody calls now."""
        while True:
            book = self._books.get(subject) or await self._book(subject)
            # It may have been forgotten between its reading and this.
            if self._books.get(subject) is book:
                self._books.move_to_end(subject)
                book.used_s = asyncio.get_running_loop().time()
                return book

    async def _make_room(self) -> None:
        """Have the subjects forgotten that were not used for longest; wait for it where there are far too many."""
        over = len(self._books) - self._books_max
        if over < 0:
            return
        if self._forgetting is None or self._forgetting.done():
            oldest = list(islice(self._books.values(), over + self._books_max // 4 + 1))
            self._forgetting = asyncio.create_task(self._forget(oldest), name="budgets to forget")
            self._background.add(self._forgetting)
            self._forgetting.add_done_callback(self._background.discard)
        if over >= self._books_max:
            await asyncio.shield(self._forgetting)

    async def _forget(self, books: Sequence[_Book]) -> None:
        for start in range(0, len(books), AT_ONCE):
            await asyncio.gather(*map(self._forget_one, books[start : start + AT_ONCE]))

    async def _forget_one(self, book: _Book) -> None:
        subject = book.account.subject
        if not book.is_idle:
            return
        try:
            await self._give_back(book, book.purse, "nobody calls for it any more")
        except HiveError as error:
            log.warning("%s: what is left of its blocks stays counted: %s", subject, error)
        # Meanwhile somebody may have called.
        if book.is_idle and book.purse.free == NOTHING and self._books.get(subject) is book:
            del self._books[subject]

    async def _draw(self, book: _Book, need: Amount) -> Purse:
        while True:
            purse = self._today(book)
            if purse.reserve(need):
                self._fill_ahead(book, purse, need)
                return purse
            if book.filling is None or book.filling.done():
                wanted = book.waiting.plus(need)
                decided = block(book.account, self._limits_of(book), purse, need, wanted, book.calls)
                if isinstance(decided, Shortage):
                    raise _exhausted(decided)
                book.filling = asyncio.create_task(self._fill(book, purse, need, wanted, book.calls))
                # Whoever waited for it may be gone when it fails.
                book.filling.add_done_callback(lambda task: task.cancelled() or task.exception())
            book.waiting = book.waiting.plus(need)
            try:
                # Others wait for the same block; one of them who leaves must not take it away.
                await asyncio.shield(book.filling)
            finally:
                book.waiting = book.waiting.minus(need)

    def _fill_ahead(self, book: _Book, purse: Purse, need: Amount) -> None:
        """Reserve the next block before the last one is used up, so that hardly any call waits for one."""
        ahead = need.times(book.calls // 2)
        if purse.free.covers(ahead) or (book.filling is not None and not book.filling.done()):
            return
        if isinstance(block(book.account, self._limits_of(book), purse, ahead, ahead), Shortage):
            return
        book.filling = self._later(self._fill(book, purse, ahead, ahead, 2), book)

    async def _fill(self, book: _Book, purse: Purse, need: Amount, wanted: Amount, calls: int) -> None:
        subject = book.account.subject
        granted = NOTHING

        def decide() -> Event | None:
            nonlocal granted
            decided = block(book.account, self._limits_of(book), purse, need, wanted, calls)
            granted = NOTHING if isinstance(decided, Shortage) else decided
            if granted == NOTHING:
                return None
            return BudgetReserved(subject, self.block, purse.day, granted.nano_usd, granted.tokens)

        now_s = asyncio.get_running_loop().time()
        book.calls, book.filled_s = block_calls(book.calls, now_s - book.filled_s), now_s
        await self._append(book, decide, ROUTER)
        purse.fill(granted)
        BLOCKS.inc()
        if purse is not book.purse and purse not in book.retired:
            # Its day ended meanwhile, and what was left of it has been returned.
            self._later(self._give_back(book, purse, "the day is over"), book)

    async def _reserve_anew(self, book: _Book) -> None:
        """Return what is free: it was reserved under other limits."""
        if book.filling is not None:
            await asyncio.wait({book.filling})
        await self._give_back(book, book.purse, "the limits are others now")

    def _today(self, book: _Book) -> Purse:
        day = day_of(self._clock.now_us())
        old = book.purse
        if old.day != day:
            book.purse = Purse(day)
            book.retired.append(old)
            kept = windows(day).values()
            book.account.counted = {at: amount for at, amount in book.account.counted.items() if at in kept}
            self._ended(book, old)
        return book.purse

    def _ended(self, book: _Book, purse: Purse) -> None:
        """A call of `purse` has ended. What is left of a day that is over is returned once nothing is under way."""
        if purse is not book.purse and purse.held == NOTHING and purse in book.retired:
            book.retired.remove(purse)
            self._later(self._give_back(book, purse, "the day is over"), book)

    async def _give_back(self, book: _Book, purse: Purse, reason: str) -> None:
        free, subject = purse.emptied(), book.account.subject
        left = Amount(max(0, free.nano_usd), max(0, free.tokens))
        over = Amount(max(0, -free.nano_usd), max(0, -free.tokens))
        if over != NOTHING:
            # A provider charged more than it was asked for. That is spent, whatever the limit.
            charged = BudgetReserved(subject, self.block, purse.day, over.nano_usd, over.tokens)
            await self._append(book, lambda: charged, ROUTER)
        if left != NOTHING:
            returned = BudgetReturned(subject, self.block, purse.day, left.nano_usd, left.tokens, reason)
            await self._append(book, lambda: returned, ROUTER)

    def _later(self, work: Awaitable[None], book: _Book) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except HiveError as error:
                log.warning("budget of %s: %s", book.account.subject, error)

        task = asyncio.create_task(run(), name="budget")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _append(self, book: _Book, decide: Callable[[], Event | None], actor: str) -> None:
        """Append what `decide` says, which looks at the account anew after another router changed it."""
        async with book.lock:
            for tries_left in reversed(range(TRIES_MAX)):
                event = decide()
                if event is None:
                    return
                try:
                    await self._writer.append(self._new(book.account, event, actor))
                except VersionConflict:
                    if not tries_left:
                        raise Unavailable("others change this budget all the time; try again") from None
                    book.account = await self._load(book.account.subject)
                else:
                    book.account.evolve(event)
                    return

    def _new(self, account: Account, event: Event, actor: str) -> Append:
        return Append(
            (
                NewEvent(
                    stream=stream_of(self._ns, account.subject),
                    version=account.version + 1,
                    type=type(event).__name__,
                    schema=SCHEMA,
                    payload=encode(event),
                    ts_us=self._clock.now_us(),
                    actor=actor,
                    owner=self._owner,
                    ns=self._ns,
                ),
            )
        )

    async def _book(self, subject: str) -> _Book:
        book = self._books.get(subject)
        if book is not None:
            return book
        task = self._loading.get(subject)
        if task is None:
            task = self._loading[subject] = asyncio.create_task(self._open(subject))
            task.add_done_callback(lambda _: self._loading.pop(subject, None))
        return await asyncio.shield(task)

    async def _open(self, subject: str) -> _Book:
        await self._make_room()
        account = await self._load(subject)
        book = self._books[subject] = _Book(account, day_of(self._clock.now_us()))
        book.used_s = asyncio.get_running_loop().time()
        return book


def stream_of(ns: str, subject: str) -> str:
    """Return the stream of a subject's budget."""
    return derive_id("budget", ns, subject)


def day_of(ts_us: int) -> str:
    """Return the day of a time, in UTC."""
    return datetime.fromtimestamp(ts_us // 1_000_000, UTC).strftime("%Y-%m-%d")


def _exhausted(short: Shortage) -> BudgetExhausted:
    limit = short.limit
    return BudgetExhausted(
        short.message,
        subject=short.subject,
        per=limit.per,
        unit=limit.unit,
        limit=limit.amount,
        spent=short.spent,
        reserved=short.reserved,
        needed=short.need,
    )
