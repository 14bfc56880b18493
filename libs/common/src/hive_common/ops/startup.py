"""Starting while what one needs is starting too: bounded patience instead of an early death."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg

from hive_common.kernel.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

START_WITHIN_S = 30.0
_RETRY_S = 0.2


async def eventually(action: Callable[[], Awaitable[T]], what: str, within_s: float = START_WITHIN_S) -> T:
    """Return what `action` returns, trying again while what it needs cannot be reached.

    Args:
        action: raises `Unavailable` or `psycopg.OperationalError` for "not yet"; other errors pass through.
        what: for the log and the error, such as "Postgres".
        within_s: how long in all, counted from now.

    Raises:
        Unavailable: it did not succeed in time; the last cause is chained.
    """
    cause: Exception | None = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    return await action()
                except (Unavailable, psycopg.OperationalError) as error:
                    if cause is None:
                        log.info("waiting for %s: %s", what, error)
                    cause = error
                await asyncio.sleep(_RETRY_S)
    except TimeoutError as error:
        raise Unavailable(f"{what} did not come within {within_s:g} s: {cause or 'no answer'}") from (
            cause or error
        )
