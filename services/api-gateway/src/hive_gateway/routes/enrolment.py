"""`/v1/executors/…`: tokens with which machines join, joining, credentials, and being shut out."""

from collections.abc import Callable
from typing import Final

from fastapi import APIRouter, Request
from hive_common.contracts.joining import EnrolBody, JoinToken
from hive_common.kernel.errors import PermissionDenied
from hive_common.ops.tls import fingerprint_of
from hive_proto.executors.v1 import executors_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.admission import AddressLimit
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.routes.executors import ExecutorKey
from hive_gateway.upstream import UpstreamDep

BURST: Final = 10
PER_MINUTE: Final = 10


class TokenBody(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the token is good, 60 to 604800 seconds (an hour when 0), and who will own the machine."""

    valid_s: int = 0
    owner: str = ""


class RevokeBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why the executor is shut out. It is kept in the log."""

    reason: str = ""


def router(peers: Peers, ca: str, public_url: Callable[[], str]) -> APIRouter:
    """Return the paths of joining.

    Args:
        peers: the registry is among them.
        ca: certificate of the installation's CA in PEM; empty on plain loopback.
        public_url: of this gateway, for machines that may join.
    """
    api = APIRouter(prefix="/v1/executors", tags=["executors"])
    fingerprint = fingerprint_of(ca) if ca else ""
    limit = AddressLimit(BURST, PER_MINUTE)

    @api.post(
        "/tokens",
        operation_id="issueJoinToken",
        responses=answers(views.IssuedToken, 400, 409, 413, status=201),
        openapi_extra=struct_body(TokenBody, required=False),
        response_class=Response,
        status_code=201,
    )
    async def issue_token(request: Request, upstream: UpstreamDep) -> Response:
        """Make a token with which one machine may join, once. It is shown here and kept nowhere."""
        command = await read_command(request, TokenBody)
        message = executors_pb2.IssueTokenRequest(
            valid_s=command.valid_s, owner=command.owner, caller=upstream.caller.pseudonym
        )
        issued = await upstream.ask(peers.registry, peers.executors.IssueToken, message)
        token = JoinToken(
            url=public_url(),
            fingerprint=fingerprint,
            token_id=issued.token_id,
            secret=issued.secret,
            expires_us=issued.expires_us,
        )
        answer = views.IssuedToken(token_id=issued.token_id, token=token.text(), expires_us=issued.expires_us)
        return reply(answer, 201, {"Cache-Control": "no-store"})

    @api.post(
        "/enrol",
        operation_id="enrolExecutor",
        responses=answers(views.Credentials, 400, 409, 413, 429),
        openapi_extra=struct_body(EnrolBody) | {"security": []},
        response_class=Response,
    )
    async def enrol(request: Request) -> Response:
        """Join with a token. Needs no key: the token is one."""
        limit.take(request.client.host if request.client is not None else "")
        shown = await read_command(request, EnrolBody)
        message = executors_pb2.EnrolRequest(
            token_id=shown.token_id,
            secret=shown.secret,
            public_key=shown.public_key,
            name=shown.name,
            proof=shown.proof,
        )
        return _credentials(await peers.registry.ask(peers.executors.Enrol, message, None))

    @api.post(
        "/{executor}/credentials",
        operation_id="renewCredentials",
        responses=answers(views.Credentials, 400, 404, 409),
        response_class=Response,
    )
    async def renew(executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Get new credentials for NATS. Only the executor itself may, with an assertion that its key signed."""
        if upstream.caller.scope != "executor" or upstream.caller.name != executor:
            raise PermissionDenied("credentials go to the executor itself, which signs its call with its own key")
        message = executors_pb2.RenewRequest(executor_id=executor)
        return _credentials(await upstream.ask(peers.registry, peers.executors.Renew, message))

    @api.post(
        "/{executor}/revoke",
        operation_id="revokeExecutor",
        responses=answers(views.Executor, 400, 404, 409, 413),
        openapi_extra=struct_body(RevokeBody, required=False),
        response_class=Response,
    )
    async def revoke(request: Request, executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Disconnect an executor at once, and shut it out for ever."""
        command = await read_command(request, RevokeBody)
        message = executors_pb2.RevokeRequest(
            executor_id=executor, reason=command.reason, caller=upstream.caller.pseudonym
        )
        return reply(views.executor(await upstream.ask(peers.registry, peers.executors.Revoke, message)))

    return api


def _credentials(message: executors_pb2.Credentials) -> Response:
    return reply(views.credentials(message), 200, {"Cache-Control": "no-store"})
