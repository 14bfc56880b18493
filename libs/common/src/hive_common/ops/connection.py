"""A connection to Postgres that leaves nothing behind when whoever opens it is cancelled."""

import asyncio
import traceback
from typing import Any, Self

from psycopg import AsyncConnection


class Connection(AsyncConnection[Any]):
    """What `connect` of psycopg returns, opened with care.

    psycopg leaves the half-open connection of a cancelled `connect` to the garbage collector, and the frames of the
    exception hold it: for as long as that takes, at most its `authentication_timeout` of a minute, the server keeps
    a place for it, and a `DROP DATABASE`, of whatever database, waits.
    """

    @classmethod
    async def connect(cls, *args: Any, **kwargs: Any) -> Self:
        """Connect as `psycopg.AsyncConnection.connect` does; when cancelled, the socket is closed at once."""
        try:
            return await super().connect(*args, **kwargs)
        except asyncio.CancelledError as cancelled:
            traceback.clear_frames(cancelled.__traceback__)
            raise
