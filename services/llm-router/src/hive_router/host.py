"""The back ends on the gateway's host."""

import asyncio
from collections.abc import Callable
from typing import Final

from hive_common.contracts.events import Power
from hive_common.inference.backends import BackEnds
from hive_common.inference.calls import Answer, Completer, ModelCall

from hive_router.domain.selection import BackEnd
from hive_router.fleet import Fleet
from hive_router.settings import RouterSettings

LOOK_AGAIN_S: Final = 1.0
"""For a model that nobody has the host's servers are asked at most so often."""


class Host:
    """What serves models on the gateway's host, one back end for each base URL.

    Args:
        settings: the URLs, and the executors of the host.
        fleet: is kept current.
        owner: whose device the host is.
        changed: is called when something may be different.
    """

    def __init__(self, settings: RouterSettings, fleet: Fleet, owner: str, changed: Callable[[], None]) -> None:
        self._settings = settings
        self._fleet = fleet
        self._owner = owner
        self._changed = changed
        self._servers = BackEnds(settings.model_urls)
        self._by_id: dict[str, Completer] = {}
        self._looked = 0.0
        self._looking = asyncio.Lock()

    async def open(self) -> None:
        """Connect, and look for the first time. Raises InvalidArgument where a key cannot be read."""
        await self._servers.open()
        self._by_id = {server.url: server for server in self._servers.all}
        self._update()

    async def close(self) -> None:
        """Close all connections."""
        await self._servers.close()

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(self._settings.refresh_ms / 1000)
            await self.look()

    async def look_for_missing(self) -> None:
        """Look now, unless that was done a moment ago: somebody asks for a model that may be new."""
        async with self._looking:
            if asyncio.get_running_loop().time() - self._looked >= LOOK_AGAIN_S:
                await self.look()

    async def look(self) -> None:
        """Bring the fleet up to date."""
        await self._servers.look()
        self._update()

    async def complete(self, call: ModelCall, backend: BackEnd) -> Answer:
        """Begin a call at one of them (`Completer.complete`)."""
        return await self._by_id[backend.id].complete(call)

    def _update(self) -> None:
        device = self._settings.host_executors[0] if self._settings.host_executors else ""
        found = []
        for server in self._servers.all:
            # What an executor of the host reports about it is not known here.
            known = self._fleet.get(server.url)
            found.append(
                BackEnd(
                    id=server.url,
                    executor=device,
                    name=server.url,
                    owner=self._owner,
                    is_host=True,
                    models={model.name: model for model in server.found},
                    slots=self._settings.in_flight_max,
                    region=known.region if known else "",
                    power=known.power if known else Power(),
                )
            )
        self._fleet.put(*found)
        self._looked = asyncio.get_running_loop().time()
        self._changed()
