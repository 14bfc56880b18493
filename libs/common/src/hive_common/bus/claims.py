"""Tells a running NATS server what has changed in its account: revocations, and a new template of executors."""

import asyncio
from typing import Final

import msgspec
import nats.errors
from nats.aio.client import Client

from hive_common.bus.jwt import claims_of
from hive_common.kernel.errors import DeadlineExceeded, Internal, Unavailable

UPDATE: Final = "$SYS.REQ.CLAIMS.UPDATE"
TIMEOUT_S: Final = 5.0


class _Problem(msgspec.Struct):
    description: str = ""


class _Done(msgspec.Struct):
    account: str = ""
    code: int = 0


class _Answer(msgspec.Struct):
    data: _Done | None = None
    error: _Problem | None = None


async def push_account(system: Client, account_jwt: str, timeout_s: float = TIMEOUT_S) -> None:
    """Give the server an account anew. Users that it revokes are disconnected and stay refused.

    The server keeps it on disk; the log is the truth all the same, so that it is given at every connect.

    Args:
        system: connected as `registry-system`.
        account_jwt: from `hive_common.bus.jwt.account_jwt`. The server does not look at who has signed it until it
            uses it, and would then take nobody any more.
        timeout_s: how long to wait for its answer.

    Raises:
        Unavailable: the server cannot be reached.
        DeadlineExceeded: it has not answered.
        Internal: it has refused, and says why.
    """
    account = claims_of(account_jwt)["sub"]
    try:
        async with asyncio.timeout(timeout_s):
            reply = await system.request(UPDATE, account_jwt.encode(), timeout=None)  # type: ignore[arg-type]
    except TimeoutError as error:
        raise DeadlineExceeded(f"NATS has not taken the account within {timeout_s:g} s") from error
    except (nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS has not taken the account: {error or type(error).__name__}") from error
    answer = msgspec.json.decode(reply.data, type=_Answer)
    if answer.data is None or answer.data.code != 200 or answer.data.account != account:
        why = answer.error.description if answer.error else reply.data.decode(errors="replace")[:200]
        raise Internal(f"NATS refused the account: {why}")
