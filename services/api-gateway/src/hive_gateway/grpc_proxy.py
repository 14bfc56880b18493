"""The public gRPC port: calls of published services go to their owners as the bytes they are.

Which methods there are, and which of them stream, is read from the descriptors; a new method needs no code here.
"""

# grpc's classes take type arguments in their stubs only, not when the module runs.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from grpc_reflection.v1alpha import reflection
from hive_common.kernel.errors import FailedPrecondition, body_of
from hive_common.ops.telemetry import REQUESTS
from hive_common.rpc.errors import TRAILER
from hive_common.rpc.server import RpcServer
from hive_proto.agents.v1 import agents_pb2
from hive_proto.approvals.v1 import approvals_pb2
from hive_proto.audit.v1 import audit_pb2
from hive_proto.canaries.v1 import canaries_pb2
from hive_proto.control.v1 import control_pb2
from hive_proto.executors.v1 import executors_pb2
from hive_proto.jobs.v1 import jobs_pb2
from hive_proto.keys.v1 import keys_pb2
from hive_proto.models.v1 import models_pb2
from hive_proto.pain.v1 import pain_pb2
from hive_proto.values.v1 import values_pb2

from hive_gateway.holders import Holders
from hive_gateway.keys import Caller
from hive_gateway.peers import STREAM_S, UNARY_S, VERIFY_S, Peer, Peers
from hive_gateway.settings import KeyPair

HEALTH_SERVICE = "grpc.health.v1.Health"
CALLER_FIELD = "caller"

Context = grpc.aio.ServicerContext[bytes, bytes]


def published(peers: Peers) -> dict[ServiceDescriptor, Peer]:
    """Return the services that outsiders may call, each with its owner. Presence and Intake are not among them."""
    return {
        _service(jobs_pb2, "Jobs"): peers.scheduler,
        _service(approvals_pb2, "Approvals"): peers.scheduler,
        _service(pain_pb2, "Pain"): peers.scheduler,
        _service(canaries_pb2, "Canaries"): peers.scheduler,
        _service(executors_pb2, "Executors"): peers.registry,
        _service(agents_pb2, "Agents"): peers.registry,
        _service(control_pb2, "Control"): peers.registry,
        _service(values_pb2, "Values"): peers.registry,
        _service(audit_pb2, "Audit"): peers.audit,
        _service(models_pb2, "Models"): peers.router,
        _service(keys_pb2, "Keys"): peers.registry,
    }


WITHHELD = frozenset({"Enrol", "Renew", "Keys", "Find"})
"""Methods of `Executors` that are not for outsiders with a key: executors enrol and renew over REST, where the
gateway recognises each by its signature; whoever could renew for another would get credentials in its name."""


def _service(module: Any, name: str) -> ServiceDescriptor:
    service: ServiceDescriptor = module.DESCRIPTOR.services_by_name[name]
    return service


class Proxy(grpc.GenericRpcHandler):
    """Forwards unary calls and server streams.

    Args:
        services: what is published, and who answers.
        keys: the server has checked the key already; here it says who calls.
    """

    def __init__(self, services: dict[ServiceDescriptor, Peer], keys: Holders) -> None:
        self._keys = keys
        self._handlers = {
            f"/{service.full_name}/{method.name}": self._handler(
                f"/{service.full_name}/{method.name}", method, peer
            )
            for service, peer in services.items()
            for method in service.methods
            if method.name not in WITHHELD
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return the handler of a published method (grpc.GenericRpcHandler)."""
        return self._handlers.get(handler_call_details.method)

    def _handler(self, path: str, method: MethodDescriptor, peer: Peer) -> grpc.RpcMethodHandler[bytes, bytes]:
        if method.client_streaming:
            raise FailedPrecondition(f"{path}: streams of requests are not forwarded")
        forward = Forward(path, peer, _caller_tag(method), self._keys)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(forward.stream)
        return grpc.unary_unary_rpc_method_handler(forward.unary)


class Forward:
    """One published method.

    Args:
        path: `/package.Service/Method`.
        peer: who answers.
        caller_tag: wire tag of the request's `caller` field, empty where it has none.
        keys: who a key belongs to.
    """

    def __init__(self, path: str, peer: Peer, caller_tag: bytes, keys: Holders) -> None:
        self._path = path
        self._peer = peer
        self._caller_tag = caller_tag
        self._keys = keys
        self._unary: Callable[..., Any] = peer.channel.unary_unary(path)
        self._stream: Callable[..., Any] = peer.channel.unary_stream(path)
        # Only verification reads so much that the common deadline would cut it.
        self._unary_s = VERIFY_S if path.endswith(("/Verify", "/Decisions")) else UNARY_S

    async def unary(self, request: bytes, context: Context) -> bytes:
        """Forward a unary call."""
        call = await self._call(self._unary, request, context, self._unary_s)
        try:
            response: bytes = await call
            context.set_trailing_metadata(await call.trailing_metadata())
        except grpc.aio.AioRpcError as failure:
            await self._fail(context, failure)
            raise
        finally:
            # Does nothing to a call that is done; ends one whose caller went away.
            call.cancel()
        return response

    async def stream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Forward a server stream."""
        call = await self._call(self._stream, request, context, STREAM_S)
        try:
            async for response in call:
                yield response
            context.set_trailing_metadata(await call.trailing_metadata())
        except grpc.aio.AioRpcError as failure:
            await self._fail(context, failure)
        finally:
            call.cancel()

    async def _call(self, method: Callable[..., Any], request: bytes, context: Context, default_s: float) -> Any:
        caller = await self._keys.caller_of_rpc(context.invocation_metadata())
        return method(
            self._stamped(request, caller),
            timeout=_time_left(context, default_s),
            metadata=self._peer.metadata(caller),
        )

    def _stamped(self, request: bytes, caller: Caller) -> bytes:
        """Set `caller` in the request whatever stands there: of a field that comes twice the last one counts.

        See "Last One Wins" in the protobuf encoding documentation.
        """
        if not self._caller_tag:
            return request
        text = caller.pseudonym.encode()
        return request + self._caller_tag + bytes([len(text)]) + text

    async def _fail(self, context: Context, failure: grpc.aio.AioRpcError) -> None:
        trailers = tuple(failure.trailing_metadata() or ())
        error = self._peer.error(failure)
        said_by_peer = any(key == TRAILER for key, _ in trailers)
        if not said_by_peer or failure.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise error from failure
        REQUESTS.labels(self._path, body_of(error).code).inc()
        await context.abort(failure.code(), failure.details() or "", trailers)


def _caller_tag(method: MethodDescriptor) -> bytes:
    field: FieldDescriptor | None = method.input_type.fields_by_name.get(CALLER_FIELD)
    if field is None:
        return b""
    tag, length_delimited = field.number << 3, 2
    if tag >= 0x80:
        raise FailedPrecondition(f"{method.full_name}: the number of `{CALLER_FIELD}` must be under 16")
    return bytes([tag | length_delimited])


def _time_left(context: Context, default_s: float) -> float:
    left: float | None = context.time_remaining()
    return default_s if left is None else max(0.0, min(left, VERIFY_S * 2))


def _credentials(tls: KeyPair) -> grpc.ServerCredentials:
    pair = Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes()
    return grpc.ssl_server_credentials([pair])


class PublicRpc:
    """The public gRPC port: the proxy, reflection and health.

    Args:
        peers: who answers.
        keys: who may ask.
        host: address to bind.
        port: port to bind; 0 takes a free one.
        tls: of the listener; None listens without.
    """

    def __init__(self, peers: Peers, keys: Holders, host: str, port: int, tls: KeyPair | None = None) -> None:
        self._services = published(peers)
        self._keys = keys
        self._host = host
        self._port = port
        self._credentials = _credentials(tls) if tls else None
        self._rpc: RpcServer | None = None

    async def start(self) -> int:
        """Listen and return the port. Raises FailedPrecondition when it is taken."""
        port = await self._listen()
        if port is None:
            # A server of grpc that never served has to go while its loop still runs.
            self._rpc = None
            await asyncio.sleep(0)
            raise FailedPrecondition(
                f"{self._host}:{self._port}: cannot listen for gRPC; expected a free port", port=self._port
            )
        return port

    async def stop(self) -> None:
        """Take no more calls, give the others a moment, then cut them."""
        if self._rpc is not None:
            await self._rpc.stop()

    async def _listen(self) -> int | None:
        self._rpc = RpcServer(self._host, self._port, self._keys.authorise_rpc, self._credentials)
        self._rpc.server.add_generic_rpc_handlers((Proxy(self._services, self._keys),))
        names = [service.full_name for service in self._services]
        reflection.enable_server_reflection([*names, HEALTH_SERVICE, reflection.SERVICE_NAME], self._rpc.server)
        try:
            return await self._rpc.start()
        except RuntimeError:
            return None
