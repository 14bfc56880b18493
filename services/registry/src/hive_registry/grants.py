"""What agents may do: granted and taken back by people, an event each."""

from collections.abc import Callable
from typing import Any

import msgspec
from hive_common.artifacts import manifest as manifests
from hive_common.artifacts.documents import nearest, refuse
from hive_common.artifacts.names import is_name
from hive_common.contracts.events import Event
from hive_common.contracts.permissions import NONE, PERMISSIONS
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import NotFound, VersionConflict
from hive_common.kernel.ids import derive_id
from hive_common.permissions import in_words, named, only
from hive_common.permissions.grants import standing
from hive_proto.agents.v1 import agents_pb2

from hive_registry.domain import grants
from hive_registry.domain.grants import Asking, GrantsState
from hive_registry.grant_views import GrantRow, GrantViews, state_of
from hive_registry.log_access import TRIES_MAX, LogAccess
from hive_registry.views import Views


class GrantDesk:
    """What the registry does with the grants of one agent at a time.

    Args:
        views: of agents.
        grant_views: of grants.
        log: writes.
        clock: says whether one has expired.
    """

    def __init__(self, views: Views, grant_views: GrantViews, log: LogAccess, clock: Clock) -> None:
        self._views = views
        self._grants = grant_views
        self._log = log
        self._clock = clock

    async def grant(self, request: agents_pb2.GrantRequest, actor: str) -> agents_pb2.GrantsResponse:
        """Grant permissions.

        Raises:
            NotFound: there is no such agent.
            InvalidArgument: unknown, not asked for, or wider than that.
        """
        asking = await self._asking(request.name)
        if asking is None:
            raise await self._nobody(request.name)
        wanted = _wanted(request.permissions_json)
        now_us = self._clock.now_us()

        def decide(state: GrantsState) -> tuple[Event, ...]:
            return grants.grant(state, asking, wanted, ask=request.ask, until_us=request.until_us, now_us=now_us)

        return await self._change(request.name, actor, decide)

    async def ungrant(self, request: agents_pb2.UngrantRequest, actor: str) -> agents_pb2.GrantsResponse:
        """Take permissions back.

        Raises:
            NotFound: there is no such agent, and never was one with a grant.
            InvalidArgument: unknown.
        """
        if not is_name(request.name):
            raise await self._nobody(request.name)
        names = tuple(request.permissions)
        return await self._change(
            request.name, actor, lambda state: grants.revoke(state, request.name, names, request.reason)
        )

    async def show(self, agent: str) -> agents_pb2.GrantsResponse:
        """Return what an agent asks for and was granted.

        Raises:
            NotFound: there is no such agent, and never was one with a grant.
        """
        asking, rows = await self._asking(agent), await self._grants.of(agent)
        if asking is None and not rows:
            raise await self._nobody(agent)
        return self._message(agent, asking, rows)

    async def _change(
        self, agent: str, actor: str, decide: Callable[[GrantsState], tuple[Event, ...]]
    ) -> agents_pb2.GrantsResponse:
        stream = derive_id("grants", self._log.ns, agent)
        for tries_left in reversed(range(TRIES_MAX)):
            state = state_of(await self._grants.of(agent))
            events = decide(state)
            if not events:
                break
            try:
                await self._log.append(stream, state.version, events, actor)
                break
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        return await self.show(agent)

    async def _asking(self, agent: str) -> Asking | None:
        """Return what the newest version that is not yanked asks for, or None where there is none.

        Raises:
            NotFound: no agent can be called so.
        """
        if not is_name(agent):
            raise await self._nobody(agent)
        for version in await self._views.version_names(agent):
            row = await self._views.agent(agent, version)
            if row is not None and not row.yanked_us:
                found = manifests.from_json(row.manifest, f"{agent}@{version}")
                return Asking(agent, version, found.asked, found.permissions)
        return None

    async def _nobody(self, agent: str) -> NotFound:
        close = nearest(agent, await self._views.agent_names())
        hint = f"; the nearest is {close}" if close else ""
        return NotFound(f"there is no agent {agent[:80]!r}{hint}", nearest=close or "")

    def _message(self, agent: str, asking: Asking | None, rows: dict[str, GrantRow]) -> agents_pb2.GrantsResponse:
        asked = NONE if asking is None else asking.asked
        now_us = self._clock.now_us()
        answer = agents_pb2.GrantsResponse(name=agent, version="" if asking is None else asking.version)
        for name in PERMISSIONS:
            row, wanted = rows.get(name), only(asked, name)
            held = None if row is None else row.grant
            if held is None and not named(wanted):
                continue
            shown = wanted if held is None else _with_ask(held.granted, name, held.ask)
            answer.grants.append(
                agents_pb2.Grant(
                    permission=name,
                    granted_json=b"" if held is None else msgspec.json.encode(held.granted),
                    asked_json=msgspec.json.encode(wanted) if named(wanted) else b"",
                    words=in_words(shown)[0],
                    ask=held is not None and held.ask,
                    until_us=0 if held is None else held.until_us,
                    state=standing(wanted, held, now_us),
                    granted_us=0 if held is None or row is None else row.since_us,
                    position=0 if row is None else row.position,
                )
            )
        return answer


def _with_ask(granted: Any, name: str, ask: bool) -> Any:
    return msgspec.structs.replace(granted, asks=(name,)) if ask else granted


def _wanted(text: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        refuse("grant", "permissions_json", f"is no JSON object: {error}", 'such as `{"model": null}`')
