"""A gRPC server that asks for a key, maps errors once, counts calls and answers health checks."""

# grpc's classes take type arguments in their stubs only, not when the module runs.
from __future__ import annotations

import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hive_common.kernel.errors import HiveError, Unauthenticated, body_of
from hive_common.ops.telemetry import DURATION, IN_FLIGHT, REQUESTS
from hive_common.ops.tls import netloc
from hive_common.rpc.errors import abort

log = logging.getLogger(__name__)

# Finding the series of some labels takes longer than counting. Only methods that there are come here.
_requests = functools.cache(REQUESTS.labels)
_duration = functools.cache(DURATION.labels)

HEALTH_PREFIX = "/grpc.health.v1.Health/"
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),
]


def bearer_is(metadata: Any, key: str) -> bool:
    """Say whether call metadata carries `authorization: Bearer <key>`, in constant time."""
    given = dict(metadata or ()).get("authorization", "")
    return hmac.compare_digest(str(given).encode(), f"Bearer {key}".encode())


Authorise = Callable[[str, Any], Awaitable[None] | None]
"""Takes the method and the call's metadata; raises a `HiveError` to refuse, at once or when it is awaited."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Checks the key, turns errors into statuses, measures.

    Args:
        authorise: takes the method and the call's metadata; raises a `HiveError` to refuse.
    """

    def __init__(self, authorise: Authorise) -> None:
        self._authorise = authorise

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one call (grpc.aio.ServerInterceptor)."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        metadata = handler_call_details.invocation_metadata
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, metadata, handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, metadata, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, metadata, handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, metadata, handler.stream_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler

    def _unary(self, method: str, metadata: Any, inner: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            start = time.perf_counter()
            try:
                if (looked_up := self._authorise(method, metadata)) is not None:
                    await looked_up
                with IN_FLIGHT.track_inprogress():
                    response = await inner(request, context)
            except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
                return await self._fail(method, context, error)
            finally:
                _duration(method).observe(time.perf_counter() - start)
            _requests(method, "ok").inc()
            return response

        return call

    def _stream(self, method: str, metadata: Any, inner: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            start = time.perf_counter()
            answered = False
            try:
                if (looked_up := self._authorise(method, metadata)) is not None:
                    await looked_up
                with IN_FLIGHT.track_inprogress():
                    async for response in inner(request, context):
                        if not answered:
                            answered = True
                            _duration(method).observe(time.perf_counter() - start)
                        yield response
            except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
                await self._fail(method, context, error)
            finally:
                if not answered:
                    _duration(method).observe(time.perf_counter() - start)
            _requests(method, "ok").inc()

        return call

    async def _fail(self, method: str, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        _requests(method, body_of(error).code).inc()
        if not isinstance(error, HiveError):
            log.exception("%s failed", method)
        await abort(context, error)


def key_check(key: str) -> Callable[[str, Any], None]:
    """Return an `authorise` that wants one key for everything."""

    def check(method: str, metadata: Any) -> None:
        if not bearer_is(metadata, key):
            raise Unauthenticated("this call needs the metadata `authorization: Bearer <key>`")

    return check


class RpcServer:
    """One port with the servicers of a service and the standard health service (grpc.health.v1).

    Args:
        host: address to bind.
        port: port to bind; 0 takes a free one.
        authorise: called with method and metadata of each call; raises where it may not go on.
        credentials: makes it a TLS port.
    """

    def __init__(
        self,
        host: str,
        port: int,
        authorise: Authorise,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._address = netloc(host, port)
        self._credentials = credentials
        self.server = grpc.aio.server(interceptors=[CallInterceptor(authorise)], options=OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self) -> int:
        """Listen and return the port. Raises RuntimeError when it is taken."""
        if self._credentials is None:
            port = self.server.add_insecure_port(self._address)
        else:
            port = self.server.add_secure_port(self._address, self._credentials)
        await self.server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, give the others `grace_s`, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
