"""What the registry does with one executor at a time, and its hello on NATS."""

from collections.abc import Callable
from typing import Final

from hive_common.contracts.events import Event, ExecutorEnrolled
from hive_common.contracts.messages import HelloReply, HelloRequest
from hive_common.control.kill_log import KillLog
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import InvalidArgument, NotFound, VersionConflict, body_of
from hive_common.kernel.ids import is_id

from hive_registry.domain.executors import UNKNOWN, ExecutorState, say_hello
from hive_registry.log_access import TRIES_MAX, LogAccess
from hive_registry.lookup import GatheredLookup
from hive_registry.signers import SignerDesk
from hive_registry.views import ExecutorRow, Views

MESSAGE_VERSION: Final = 1


class ExecutorDesk:
    """What the registry does with one executor at a time: decide on its state, write, answer from the view.

    Args:
        views: reads.
        log: writes.
        clock: tells when a hello came.
        blobs_url: base URL at which executors fetch and store blobs.
        kills: what is stopped, which a hello is told.
        signers: knows whose agents may run, which a hello is told.
    """

    def __init__(
        self,
        views: Views,
        log: LogAccess,
        clock: Clock,
        blobs_url: str,
        kills: KillLog,
        signers: SignerDesk,
    ) -> None:
        self._lookup = GatheredLookup(views.executors)
        self._log = log
        self._clock = clock
        self._blobs_url = blobs_url
        self._signers = signers
        self._kills = kills
        self._last_hello_us: dict[str, int] = {}

    async def hello(self, executor: str, request: HelloRequest) -> HelloReply:
        """Answer `hive.exec.<id>.hello`. What it tells is committed, and in the views, before the answer.

        Raises:
            InvalidArgument: the id, the version of the message or what it says cannot be accepted.
            FailedPrecondition: the executor is not enrolled.
            PermissionDenied: it is revoked.
            Unavailable: the log or the views cannot be reached.
        """
        if not is_id(executor):
            raise InvalidArgument("the subject's third token is not an executor id; expected a UUID")
        if request.v != MESSAGE_VERSION:
            raise InvalidArgument(f"v: got {request.v}; expected {MESSAGE_VERSION}", path="v")
        row = await self.change(
            executor, executor, lambda state: say_hello(state, request.name, request.capabilities)
        )
        self._last_hello_us[executor] = self._clock.now_us()
        kill = self._kills.verifier.signed
        trusted, position = await self._signers.trusted()
        return HelloReply(
            position=row.position,
            blobs_url=self._blobs_url,
            drained=row.drained,
            kill=kill,
            signers=trusted,
            signers_position=position,
        )

    async def change(
        self, executor: str, actor: str, decide: Callable[[ExecutorState], tuple[Event, ...]]
    ) -> ExecutorRow:
        """Decide on the executor's state, append what comes of it, and return its row afterwards.

        Raises:
            VersionConflict: others wrote to its stream again and again.
        """
        for tries_left in reversed(range(TRIES_MAX)):
            row = await self._lookup.get(executor)
            state = UNKNOWN if row is None else row.state
            events = decide(state)
            if not events and row is not None:
                return row
            try:
                await self._log.append(executor, state.version, events, actor, _owner_after(state, events))
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        row = await self._lookup.get(executor)
        if row is None:
            raise NotFound(f"there is no executor {executor}")
        return row

    async def look(self, executor: str) -> ExecutorRow | None:
        """Return its row, or None."""
        return await self._lookup.get(executor)

    def last_hello_us(self, executor: str) -> int:
        """Return when its last hello came to this process, 0 where none did."""
        return self._last_hello_us.get(executor, 0)


def _owner_after(state: ExecutorState, events: tuple[Event, ...]) -> str:
    for event in events:
        if isinstance(event, ExecutorEnrolled):
            return event.owner
    return state.owner


def hello_refused(error: BaseException) -> HelloReply:
    """Return the reply that carries an error."""
    return HelloReply(error=body_of(error))
