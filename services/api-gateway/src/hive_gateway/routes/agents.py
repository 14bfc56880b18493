"""`/v1/agents`: published versions of agents."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from hive_common.contracts.values import is_digest
from hive_common.kernel.errors import InvalidArgument, NotFound
from hive_proto.agents.v1 import agents_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import SUBMIT_S, Peers
from hive_gateway.replies import After, PageLimit, reply
from hive_gateway.upstream import Upstream, UpstreamDep

AgentName = Annotated[str, Path(max_length=200, description="name of an agent")]
AgentRelease = Annotated[str, Path(max_length=200, description="version of an agent")]


class PushBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What to publish: the digests of the OCI manifests of an agent and of its signature, put before as blobs."""

    manifest_digest: str
    signature_digest: str = ""


class YankBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why nobody should use the version any more; for those who do."""

    reason: str


def router(peers: Peers) -> APIRouter:
    """Return the paths of agents."""
    api = APIRouter(prefix="/v1", tags=["agents"])

    async def page(upstream: Upstream, limit: int, after: str, name: str = "") -> views.AgentPage:
        message = agents_pb2.ListRequest(limit=limit, name=name, after=after)
        found = (await upstream.ask(peers.registry, peers.agents.List, message)).versions
        following = f"{found[-1].name}@{found[-1].version}" if len(found) == limit else None
        return views.AgentPage(versions=tuple(map(views.agent_version, found)), next=following)

    @api.get("/agents", operation_id="listAgents", responses=answers(views.AgentPage, 400), response_class=Response)
    async def list_agents(upstream: UpstreamDep, limit: PageLimit = 100, after: After = "") -> Response:
        """List all versions of all agents."""
        return reply(await page(upstream, limit, after))

    @api.post(
        "/agents",
        operation_id="publishAgent",
        responses=answers(views.AgentVersion, 400, 403, 404, 409, 413, status=201),
        openapi_extra=struct_body(PushBody),
        response_class=Response,
        status_code=201,
    )
    async def publish(request: Request, upstream: UpstreamDep) -> Response:
        """Publish a signed version. The same digest again is no error; another one under the same version is."""
        command = await read_command(request, PushBody)
        if not is_digest(command.manifest_digest):
            raise InvalidArgument(
                "body.manifest_digest: expected `sha256:` and 64 hex digits", path="manifest_digest"
            )
        message = agents_pb2.PushRequest(
            manifest_digest=command.manifest_digest,
            signature_digest=command.signature_digest,
            caller=upstream.caller.pseudonym,
        )
        version = await upstream.ask(peers.registry, peers.agents.Push, message, SUBMIT_S)
        location = f"/v1/agents/{version.name}/{version.version}"
        return reply(views.agent_version(version), 201, {"Location": location})

    @api.get(
        "/agents/{name}",
        operation_id="listAgentVersions",
        responses=answers(views.AgentPage, 400, 404),
        response_class=Response,
    )
    async def list_versions(
        name: AgentName, upstream: UpstreamDep, limit: PageLimit = 100, after: After = ""
    ) -> Response:
        """List the versions of one agent."""
        found = await page(upstream, limit, after, name)
        if not found.versions and not after:
            raise NotFound(f"there is no agent `{name}`", name=name)
        return reply(found)

    @api.get(
        "/agents/{name}/{version}",
        operation_id="getAgentVersion",
        responses=answers(views.AgentVersion, 400, 404),
        response_class=Response,
    )
    async def get_version(name: AgentName, version: AgentRelease, upstream: UpstreamDep) -> Response:
        """Look at one version of an agent."""
        message = agents_pb2.GetRequest(name=name, version=version)
        return reply(views.agent_version(await upstream.ask(peers.registry, peers.agents.Get, message)))

    @api.post(
        "/agents/{name}/{version}/yank",
        operation_id="yankAgentVersion",
        responses=answers(views.AgentVersion, 400, 404, 413),
        openapi_extra=struct_body(YankBody),
        response_class=Response,
    )
    async def yank(request: Request, name: AgentName, version: AgentRelease, upstream: UpstreamDep) -> Response:
        """Let no new job use a version; what runs goes on."""
        command = await read_command(request, YankBody)
        message = agents_pb2.YankRequest(
            name=name, version=version, reason=command.reason, caller=upstream.caller.pseudonym
        )
        return reply(views.agent_version(await upstream.ask(peers.registry, peers.agents.Yank, message, SUBMIT_S)))

    return api
