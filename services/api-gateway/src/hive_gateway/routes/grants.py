"""`/v1/agents/{name}/grants`: what an agent may do, decided by people."""

from typing import Any

from fastapi import APIRouter, Request
from hive_proto.agents.v1 import agents_pb2
from msgspec import Struct
from msgspec.json import encode
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.routes.agents import AgentName
from hive_gateway.upstream import UpstreamDep


class GrantBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What to grant: permissions, with what is to be narrower than in the manifest; null for all it asks for.

    `ask`: a person is asked at each use. `until_us`: when it ends, in µs since 1970; 0: never.
    """

    permissions: dict[str, Any]
    ask: bool = False
    until_us: int = 0


class UngrantBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What to take back; without permissions all that is granted. The reason is kept in the log."""

    permissions: tuple[str, ...] = ()
    reason: str = ""


def router(peers: Peers) -> APIRouter:
    """Return the paths of grants."""
    api = APIRouter(prefix="/v1/agents/{name}", tags=["agents"])

    @api.get(
        "/grants",
        operation_id="listGrants",
        responses=answers(views.Grants, 400, 404),
        response_class=Response,
    )
    async def show(name: AgentName, upstream: UpstreamDep) -> Response:
        """Say what an agent asks for and was granted."""
        message = agents_pb2.GrantsRequest(name=name)
        return reply(views.grants(await upstream.ask(peers.registry, peers.agents.Grants, message)))

    @api.post(
        "/grants",
        operation_id="grantPermissions",
        responses=answers(views.Grants, 400, 404, 413),
        openapi_extra=struct_body(GrantBody),
        response_class=Response,
    )
    async def grant(request: Request, name: AgentName, upstream: UpstreamDep) -> Response:
        """Let all versions of an agent do what the newest one asks for, or less."""
        command = await read_command(request, GrantBody)
        message = agents_pb2.GrantRequest(
            name=name,
            permissions_json=encode(command.permissions),
            ask=command.ask,
            until_us=command.until_us,
            caller=upstream.caller.pseudonym,
        )
        return reply(views.grants(await upstream.ask(peers.registry, peers.agents.Grant, message)))

    @api.post(
        "/ungrant",
        operation_id="revokePermissions",
        responses=answers(views.Grants, 400, 404, 413),
        openapi_extra=struct_body(UngrantBody, required=False),
        response_class=Response,
    )
    async def ungrant(request: Request, name: AgentName, upstream: UpstreamDep) -> Response:
        """Take permissions back: tasks that are not given out yet do not get them any more."""
        command = await read_command(request, UngrantBody)
        message = agents_pb2.UngrantRequest(
            name=name,
            permissions=command.permissions,
            reason=command.reason,
            caller=upstream.caller.pseudonym,
        )
        return reply(views.grants(await upstream.ask(peers.registry, peers.agents.Ungrant, message)))

    return api
