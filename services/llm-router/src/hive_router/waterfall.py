"""The waterfall: a call goes to the best back end, and to the next where one fails before its first byte."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from hive_common.inference.calls import Answer, Head, ModelCall, OfferedModel
from hive_common.kernel.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    NotFound,
    RateLimited,
    Unavailable,
    body_of,
)

from hive_router.admission import Admission, Place
from hive_router.attempts import Attempts
from hive_router.bodies import prepared
from hive_router.cloud import Cloud
from hive_router.domain.selection import BackEnd, model_of, route_to
from hive_router.fleet import Fleet
from hive_router.flight import CANCELLED, Flight
from hive_router.metrics import RETRIES, count, first_byte
from hive_router.paying import Reserved
from hive_router.providers import Providers, metered
from hive_router.response_cache import CACHE, Entry, ResponseCache, asking, fingerprint
from hive_router.streaming import Stream, begun, gathered, pieces, verdict_on
from hive_router.treasury import Treasury

log = logging.getLogger(__name__)

SSE_TYPE: Final = "text/event-stream"
REASON_PERHAPS_PAID: Final = "perhaps_paid"

Way = Callable[[ModelCall, BackEnd], Awaitable[Answer]]
"""Begins a call at a back end. Raises what `Completer.complete` raises."""

Finished = Callable[[Flight], None]


class Asker(msgspec.Struct, frozen=True):
    """Who a call is for: owner, whose data it is, and who made it, as pseudonyms."""

    owner: str
    subject: str
    actor: str


class RoutedAnswer:
    """An answer on its way (`hive_common.inference.calls.Answer`)."""

    __slots__ = ("chunks", "head")

    def __init__(self, head: Head, chunks: AsyncGenerator[bytes, None]) -> None:
        self.head = head
        self.chunks = chunks


class Outside:
    """Providers, and the way of calls to them.

    Args:
        fleet: has the providers.
        providers: make calls.
        cloud: says which calls may.
        treasury: reserves what they can cost.
    """

    def __init__(self, fleet: Fleet, providers: Providers, cloud: Cloud, treasury: Treasury) -> None:
        self._fleet = fleet
        self.providers = providers
        self.cloud = cloud
        self._treasury = treasury

    def serves(self, model: str) -> bool:
        """Say whether a provider has a model."""
        return any(one.provider for one in self._fleet.serving(model))

    async def reserve(self, flight: Flight, call: ModelCall, backend: BackEnd) -> ModelCall:
        """Reserve what a call can cost at a provider, and return it as it goes there.

        Raises:
            BudgetExhausted: a budget does not leave so much.
            InvalidArgument: nobody could tell what it would cost.
            Unavailable: a block has to be reserved, and the log cannot be reached.
        """
        assert flight.passage is not None
        bounded = self.providers.bounded(call, backend)
        hold = await self._treasury.hold(flight.passage.subjects, bounded.need, call.budgets)
        flight.hold = Reserved(hold, bounded, backend.provider, self._treasury.block)
        return bounded.call


class Waterfall:
    """Routes calls.

    Args:
        fleet: what there is.
        admission: gives places.
        host, pool: ways to a back end on the gateway's host, and to a device of the pool.
        host_executors: ids of executors on the gateway's host.
        begun: is told of each call as it begins.
        finished: is told of each call that has ended. It MUST NOT block.
        missing: looks for models that nobody had until now; may be awaited often.
        outside: providers, and what lets calls go there; None without any.
        refused: returns the error of a call that a kill order stops, or None.
        cache: of answers that are the same each time; None without one.
        treasury: counts the tokens of calls whose job or task has a budget of them.
    """

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        *,
        host: Way,
        pool: Way,
        host_executors: frozenset[str],
        begun: Finished,
        finished: Finished,
        missing: Callable[[], Awaitable[None]],
        outside: "Outside | None" = None,
        refused: Callable[[ModelCall], HiveError | None] = lambda _: None,
        cache: ResponseCache | None = None,
        treasury: Treasury | None = None,
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._ways = {True: host, False: pool}
        self._host_executors = host_executors
        self._begun = begun
        self._finished = finished
        self._missing = missing
        self._outside = outside
        self._refused = refused
        self._cache = cache
        self._treasury = treasury
        self._attempts = Attempts()
        self._flights: set[Flight] = set()

    async def complete(self, call: ModelCall, asker: Asker) -> Answer:
        """Begin a call (`Completer.complete`).

        Raises:
            NotFound: nobody serves the model.
            InvalidArgument: the back end refuses the body, or no back end can do what it asks for.
            RateLimited: too many wait.
            Unavailable: nobody who may have it can be reached; says why.
            DeadlineExceeded: its time is up.
            BudgetExhausted: only a provider could serve it, and that may not cost what it would; or the attempt has
                generated all that it may; or its job or task has no tokens left.
            PermissionDenied: likewise; or a kill order stops it.
        """
        if not self._fleet.serving(call.model):
            await self._missing()
        # From here to where it is known as a flight, which an order stops, nothing is awaited.
        if (refused := self._refused(call)) is not None:
            raise refused
        flight = self._flight(call, asker)
        self._begun(flight)
        self._flights.add(flight)
        try:
            async with flight.timed():
                if self._outside is not None and self._outside.serves(call.model):
                    flight.allowed(await self._outside.cloud.passage(call))
                return await self._cached(flight) or await self._begin(flight)
        except TimeoutError:
            late = flight.stopped or DeadlineExceeded(f"no answer within {call.deadline_ms} ms")
            self._end(flight, late.code)
            raise late from None
        except asyncio.CancelledError:
            self._end(flight, CANCELLED)
            raise
        except Exception as error:
            self._end(flight, body_of(error).code)
            raise

    def _flight(self, call: ModelCall, asker: Asker) -> Flight:
        call = self._attempts.reserve(call)
        try:
            body = prepared(call)
        except HiveError:
            self._attempts.release(call)
            raise
        return Flight(call, body, owner=asker.owner, subject=asker.subject, actor=asker.actor)

    def stop_refused(self) -> None:
        """End the calls on their way that a kill order stops."""
        for flight in list(self._flights):
            error = self._refused(flight.call)
            if error is not None:
                flight.stop(error)

    async def offered(self) -> list[OfferedModel]:
        """Return what can be called now, in order of name. Where devices disagree, sizes are the largest."""
        if not self._fleet.offered():
            # A server that has started a moment ago, as with `hive up`, was not there at the last look.
            await self._missing()
        return [_offered(name, serving) for name, serving in sorted(self._fleet.offered().items())]

    async def _cached(self, flight: Flight) -> Answer | None:
        """Return an answer that is known already, as if it came now; it costs nothing."""
        if self._cache is None or flight.body is None:
            return None
        flight.asking = asking(flight.call, flight.body.body, flight.owner)
        if flight.asking is None:
            return None
        model = flight.call.model
        prints = {fingerprint(one, model): None for one in self._fleet.serving(model)}
        entry = await self._cache.find(flight.asking, list(prints))
        if entry is None:
            return None
        flight.asking, flight.route = None, CACHE
        flight.tally.prompt_tokens, flight.tally.completion_tokens = entry.prompt_tokens, entry.completion_tokens
        first_byte(CACHE).observe(flight.first_byte())
        head = Head(entry.status, entry.content_type, CACHE, "")
        if flight.call.stream:
            flight.streamed = True
            first, rest = entry.events()
            return RoutedAnswer(head, Stream(flight, first, rest, partial(self._stream_ended, flight, None, 0.0)))
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._whole_ended, flight, None, 0.0, entry.body)
        return RoutedAnswer(head, pieces(entry.body))

    def _keep(self, flight: Flight, place: Place, body: bytes) -> None:
        if self._cache is not None and flight.asking is not None and flight.head is not None:
            tally, head = flight.tally, flight.head
            entry = Entry(head.status, head.content_type, tally.prompt_tokens, tally.completion_tokens, body)
            self._cache.store(flight.asking, fingerprint(place.backend, flight.call.model), entry)

    async def _begin(self, flight: Flight) -> Answer:
        last: HiveError | None = None
        while True:
            try:
                place = await self._admission.enter(flight)
            except (InvalidArgument, Unavailable):
                # What was tried has said more than that nothing is left.
                if last is not None:
                    raise last from None
                raise
            flight.going_to(place.backend, route_to(place.backend, flight.ask, self._host_executors))
            try:
                return await self._try(flight, place)
            except HiveError as error:
                last = self._next_or_raise(flight, place.backend, error)

    async def _try(self, flight: Flight, place: Place) -> Answer:
        """Begin at one back end. Its place is given back where this raises."""
        backend, start = place.backend, asyncio.get_running_loop().time()
        body = flight.body
        assert body is not None
        call = msgspec.structs.replace(flight.call, body=body.body, deadline_ms=flight.left_ms())
        try:
            if backend.provider:
                assert self._outside is not None
                call = await self._outside.reserve(flight, call, backend)
                answer = await self._outside.providers.complete(call, backend)
            else:
                if call.metered:
                    await self._meter(flight, call, backend)
                answer = await self._ways[backend.is_host](call, backend)
            # Its first piece comes before anything is answered: until then another back end may do better.
            streams = answer.head.content_type.startswith(SSE_TYPE)
            first = await (begun(answer) if streams else gathered(answer))
        except HiveError as error:
            if flight.hold is not None:
                flight.hold.failed(error)
                flight.paid()
            self._admission.leave(place, verdict_on(error))
            raise
        except BaseException as error:
            if flight.hold is not None:
                flight.hold.unknown()
                flight.paid()
            self._admission.leave(place, None if isinstance(error, asyncio.CancelledError) else False)
            raise
        first_byte_s = asyncio.get_running_loop().time() - start
        first_byte(flight.route).observe(flight.first_byte())
        head = flight.head = Head(answer.head.status, answer.head.content_type, flight.route, flight.executor)
        if streams:
            flight.streamed = True
            ended = partial(self._stream_ended, flight, place, first_byte_s)
            return RoutedAnswer(head, Stream(flight, first, answer.chunks, ended))
        # After the next turn of the loop, in which the answer goes: its reader does not wait for what is noted.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._whole_ended, flight, place, first_byte_s, first)
        return RoutedAnswer(head, pieces(first))

    async def _meter(self, flight: Flight, call: ModelCall, backend: BackEnd) -> None:
        """Reserve the tokens of a call that costs no money.

        Raises:
            BudgetExhausted: the budget of its job, or of its task, does not leave so many.
            Unavailable: nobody counts here, or a block has to be reserved, and the log cannot be reached.
        """
        if self._treasury is None:
            raise Unavailable("this router counts no budgets")
        bounded = metered(call, model_of(backend, call.model))
        counted = [one for one in call.budgets if one.tokens is not None]
        hold = await self._treasury.hold((), bounded.need, counted)
        flight.hold = Reserved(hold, bounded, "", self._treasury.block)

    def _next_or_raise(self, flight: Flight, backend: BackEnd, error: HiveError) -> HiveError:
        """Return the error where the next back end may do better, else raise it."""
        flight.came_of_it(backend, error.code)
        if flight.estimated:
            # It may have been answered, and paid for: another try would pay for it twice.
            raise error if isinstance(error, DeadlineExceeded) else _perhaps_paid(backend, error)
        if isinstance(error, DeadlineExceeded) or (isinstance(error, InvalidArgument) and not _lacks(error)):
            raise error
        if isinstance(error, BudgetExhausted) and not backend.provider:
            # Its tokens count wherever it goes.
            raise error
        if _lacks(error):
            backend.lacks.add((flight.call.model, str(error.fields.get("need"))))
        RETRIES.labels(error.code).inc()
        log.info("call %s: %s: %s", flight.call.id, backend.name, error.message)
        if isinstance(error, NotFound | RateLimited | Unavailable | InvalidArgument | BudgetExhausted):
            return error
        # A key it does not take, or a defect there: nothing that the caller could mend.
        return Unavailable(f"{backend.name} cannot serve `{flight.call.model}`: {error.message}")

    def _end(self, flight: Flight, code: str) -> None:
        flight.end(code)
        self._flights.discard(flight)
        self._attempts.ended(flight)
        tally = flight.tally
        count(flight.call.model, flight.route, code, tally.prompt_tokens, tally.completion_tokens)
        self._finished(flight)

    def _whole_ended(self, flight: Flight, place: Place | None, first_byte_s: float, body: bytes) -> None:
        flight.tally.whole(body)
        if flight.hold is not None:
            flight.hold.answered(flight.tally)
            flight.paid()
        if place is not None:
            self._keep(flight, place, body)
            self._admission.leave(place, True, first_byte_s)
            flight.came_of_it(place.backend, "succeeded")
        self._end(flight, "")

    def _stream_ended(
        self, flight: Flight, place: Place | None, first_byte_s: float, verdict: bool | None, code: str
    ) -> None:
        if flight.hold is not None:
            flight.hold.answered(flight.tally)
            flight.paid()
        if place is not None:
            if not code and not flight.tally.truncated:
                self._keep(flight, place, flight.tally.kept)
            self._admission.leave(place, verdict, first_byte_s)
            flight.came_of_it(place.backend, code or "succeeded")
        self._end(flight, code)


def _lacks(error: HiveError) -> bool:
    """Whether a back end says that it cannot do what the body asks for, which another one may."""
    return isinstance(error, InvalidArgument) and "need" in error.fields


def _perhaps_paid(backend: BackEnd, error: HiveError) -> Unavailable:
    return Unavailable(
        f"{error.message}; {backend.name} may have answered and charged for it, so nobody else was asked",
        reason=REASON_PERHAPS_PAID,
    )


def _offered(name: str, serving: Sequence[tuple[BackEnd, Any]]) -> OfferedModel:
    models = [model for _, model in serving]
    return OfferedModel(
        name=name,
        backend=models[0].backend,
        family=max(model.family for model in models),
        size_bytes=max(model.size_bytes for model in models),
        quantisation=max(model.quantisation for model in models),
        context_tokens=max(model.context_tokens for model in models),
        loaded=any(model.loaded for model in models),
        executors=tuple(sorted({backend.executor for backend, _ in serving if backend.executor})),
        providers=tuple(sorted({backend.provider for backend, _ in serving if backend.provider})),
    )
