"""Channels between services: the key in the metadata, a deadline on every call, errors of the catalogue."""

from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio

from hive_common.rpc.errors import raised
from hive_common.rpc.server import MESSAGE_BYTES_MAX

R = TypeVar("R")

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A peer that was restarted is found again at once, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a channel to a peer. Connecting happens with the first call."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that shows `key`."""
    return (("authorization", f"Bearer {key}"),)


async def call(pending: Awaitable[R]) -> R:
    """Await a unary call. Raises the catalogue's error where it failed."""
    try:
        return await pending
    except grpc.aio.AioRpcError as error:
        raise raised(error) from error


async def stream(pending: AsyncIterator[R] | Any) -> AsyncIterator[R]:
    """Iterate a server stream. Raises the catalogue's error where it failed."""
    try:
        async for item in pending:
            yield item
    except grpc.aio.AioRpcError as error:
        raise raised(error) from error
