"""What the scheduler knows of executors and agents: the registry's events, followed in the log."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

from hive_common.artifacts import manifest as manifests
from hive_common.contracts import events
from hive_common.contracts.events import AgentRef, Capabilities
from hive_common.eventlog.log import LogReader, Stored
from hive_common.permissions import agent_covers
from hive_common.permissions.grants import Grant

from hive_scheduler.signers import Signers

log = logging.getLogger(__name__)

URGENT_TYPES: Final = ("AgentVersionYanked", "SigningKeyTrusted", "SigningKeyDistrusted", "PermissionRevoked")
"""What counts at once, and is read without waiting for more."""

TYPES: Final = (
    "AgentVersionPublished",
    *URGENT_TYPES,
    "PermissionGranted",
    "ExecutorEnrolled",
    "ExecutorRegistered",
    "ExecutorCapabilitiesChanged",
    "ExecutorDrainRequested",
    "ExecutorUndrained",
    "ExecutorRevoked",
    "ExecutorTrusted",
)


class KnownExecutor:
    """An executor as the log has it."""

    def __init__(self, executor: str, owner: str, name: str, capabilities: Capabilities) -> None:
        self.executor = executor
        self.owner = owner
        self.name = name
        self.capabilities = capabilities
        self.drained = False
        self.revoked = False


class Catalogue:
    """Agents by `name@version` with what each asks for, grants by agent and permission, and executors by id.

    Args:
        reader: of the log.
        on_executor: called with the id of an executor about which something is new.
        on_signers: called when keys of authors were trusted or distrusted.
        on_trusted: called with the id of an executor that a person trusts anew, and the position at which.
    """

    def __init__(
        self,
        reader: LogReader,
        on_executor: Callable[[str], None],
        on_signers: Callable[[], None] = lambda: None,
        on_trusted: Callable[[str, int], None] = lambda executor, position: None,
    ) -> None:
        self._reader = reader
        self._on_executor = on_executor
        self._on_signers = on_signers
        self._on_trusted = on_trusted
        self._lock = asyncio.Lock()
        self.executors: dict[str, KnownExecutor] = {}
        self.agents: dict[str, AgentRef] = {}
        self.grants: dict[str, dict[str, Grant]] = {}
        self.keys: dict[str, str] = {}
        self.signers = Signers()
        self.yanked: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self.position = 0
        self.wake = asyncio.Event()

    async def catch_up(self) -> None:
        """Read what is new, one caller after the other: what was in the log at the call is known afterwards.

        Raises:
            Unavailable: the log cannot be read.
            UnknownEvent: an event that this code does not know.
        """
        async with self._lock:
            while True:
                scan = await self._reader.scan(self.position, types=TYPES)
                for stored in scan.events:
                    self._apply(stored)
                reached_end = len(scan.events) == 0 or scan.through >= await self._reader.head()
                self.position = scan.through
                if reached_end:
                    return

    async def follow(self) -> None:
        """Follow the log until cancelled."""
        async for scan in self._reader.scans(self.position, wake=self.wake, types=TYPES):
            async with self._lock:
                for stored in scan.events:
                    if stored.position > self.position:
                        self._apply(stored)
                self.position = max(self.position, scan.through)

    def is_revoked(self, executor: str) -> bool:
        """Say whether an executor is out, for ever."""
        known = self.executors.get(executor)
        return known is not None and known.revoked

    def revoked(self) -> list[str]:
        """Return the ids of all executors that are out."""
        return [known.executor for known in self.executors.values() if known.revoked]

    def versions(self, name: str) -> list[str]:
        """Return the `name@version`s of an agent that are not yanked; of a `name@version`, itself if it exists."""
        if "@" in name:
            return [name] if name in self.agents else []
        # Looks at all of them: only jobs whose agents may fork ask this.
        return [one for one in self.agents if agent_covers(name, one) and one not in self.yanked]

    def agents_named(self) -> Iterable[str]:
        """Return every `name@version`."""
        return self.agents.keys()

    def _apply(self, stored: Stored) -> None:
        if stored.payload is None:
            return
        event = events.decode(stored.type, stored.schema, stored.payload)
        known = self.executors.get(stored.stream)
        match event:
            case events.AgentVersionPublished():
                self._publish(event, stored.stream)
                return
            case events.AgentVersionYanked():
                self.yanked[self._versions[stored.stream]] = event.reason
                return
            case events.SigningKeyTrusted():
                self.signers.trust(stored.stream, event.public_key, event.name, stored.position)
                self._on_signers()
                return
            case events.SigningKeyDistrusted():
                self.signers.distrust(stored.stream, event.reason, stored.position)
                self._on_signers()
                return
            case events.PermissionGranted():
                grant = Grant(event.granted, event.asked, event.ask, event.until_us)
                self.grants.setdefault(event.agent, {})[event.permission] = grant
                return
            case events.PermissionRevoked():
                self.grants.get(event.agent, {}).pop(event.permission, None)
                return
            case events.ExecutorTrusted():
                self._on_trusted(stored.stream, stored.position)
                return
            case events.ExecutorEnrolled():
                self.keys[stored.stream] = event.public_key
                return
            case events.ExecutorRegistered():
                self.executors[stored.stream] = KnownExecutor(
                    stored.stream, stored.owner, event.name, event.capabilities
                )
            case events.ExecutorCapabilitiesChanged() if known is not None:
                known.capabilities = event.capabilities
            case events.ExecutorDrainRequested() if known is not None:
                known.drained = True
            case events.ExecutorUndrained() if known is not None:
                known.drained = False
            case events.ExecutorRevoked() if known is not None:
                known.revoked = True
        self._on_executor(stored.stream)

    def _publish(self, event: events.AgentVersionPublished, stream: str) -> None:
        found = manifests.from_json(bytes(event.manifest), f"{event.name}@{event.version}")
        asked = found.asked
        self._versions[stream] = found.reference
        self.agents[found.reference] = AgentRef(
            name=found.name,
            version=found.version,
            digest=event.digest,
            runtime=found.runtime,
            memory_bytes=found.resources.memory_bytes,
            timeout_ms=found.resources.timeout_ms,
            fuel=found.resources.fuel,
            input_schema=found.input,
            output_schema=found.output,
            model=asked.model,
            http=asked.http,
            kv=asked.kv,
            fork=asked.fork,
            scratch_bytes=asked.scratch_bytes,
            signer=event.signer,
            signature=event.signature,
        )
