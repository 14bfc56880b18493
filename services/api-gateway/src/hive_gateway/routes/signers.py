"""`/v1/signers`: keys of authors, whose agents may be published and run."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from hive_proto.agents.v1 import agents_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import SUBMIT_S, Peers
from hive_gateway.replies import reply
from hive_gateway.upstream import UpstreamDep

SignerKey = Annotated[str, Path(max_length=100, description="name of a trusted key, or its 64 hex digits")]


class TrustBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Which key, as 64 hex digits (Ed25519), and whose it is."""

    public_key: str
    name: str


class DistrustBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why; for people."""

    reason: str = ""


def router(peers: Peers) -> APIRouter:
    """Return the paths of signing keys."""
    api = APIRouter(prefix="/v1", tags=["agents"])

    @api.get("/signers", operation_id="listSigners", responses=answers(views.Signers), response_class=Response)
    async def list_signers(upstream: UpstreamDep) -> Response:
        """List the keys that are or were trusted."""
        keys = (await upstream.ask(peers.registry, peers.agents.Signers, agents_pb2.SignersRequest())).keys
        return reply(views.Signers(keys=tuple(map(views.signer, keys))))

    @api.post(
        "/signers",
        operation_id="trustSigner",
        responses=answers(views.Signer, 400, 409, 413),
        openapi_extra=struct_body(TrustBody),
        response_class=Response,
    )
    async def trust(request: Request, upstream: UpstreamDep) -> Response:
        """Let what a key signs be published and run."""
        command = await read_command(request, TrustBody)
        message = agents_pb2.TrustRequest(
            public_key=command.public_key, name=command.name, caller=upstream.caller.pseudonym
        )
        return reply(views.signer(await upstream.ask(peers.registry, peers.agents.Trust, message, SUBMIT_S)))

    @api.post(
        "/signers/{key}/distrust",
        operation_id="distrustSigner",
        responses=answers(views.Signer, 400, 404, 413),
        openapi_extra=struct_body(DistrustBody, required=False),
        response_class=Response,
    )
    async def distrust(request: Request, key: SignerKey, upstream: UpstreamDep) -> Response:
        """Let nothing that a key signed be published or run any more; what runs ends."""
        command = await read_command(request, DistrustBody)
        message = agents_pb2.DistrustRequest(key=key, reason=command.reason, caller=upstream.caller.pseudonym)
        return reply(views.signer(await upstream.ask(peers.registry, peers.agents.Distrust, message, SUBMIT_S)))

    return api
