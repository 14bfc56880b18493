"""`/v1/control`: what is stopped, and signed orders that stop more or lift what stands."""

from fastapi import APIRouter, Request
from hive_proto.control.v1 import control_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.upstream import UpstreamDep


class KillBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A signed order: its JSON as the text that was signed, and its signature (Ed25519, base64)."""

    order: str
    signature: str


def router(peers: Peers) -> APIRouter:
    """Return the paths of kill orders."""
    api = APIRouter(prefix="/v1/control", tags=["control"])

    @api.get("/kill", operation_id="getStanding", responses=answers(views.Standing), response_class=Response)
    async def get_standing(upstream: UpstreamDep) -> Response:
        """Look at what is stopped, and at the newest order, which says the epoch of the next one."""
        answer = await upstream.ask(peers.registry, peers.control.State, control_pb2.StateRequest())
        return reply(views.standing(answer))

    @api.post(
        "/kill",
        operation_id="giveKillOrder",
        responses=answers(views.Standing, 400, 404, 409, 413),
        openapi_extra=struct_body(KillBody),
        response_class=Response,
    )
    async def give_order(request: Request, upstream: UpstreamDep) -> Response:
        """Stop something, or lift an order that stands. It counts once it is signed with the kill key."""
        command = await read_command(request, KillBody)
        message = control_pb2.OrderRequest(
            order=command.order, signature=command.signature, caller=upstream.caller.pseudonym
        )
        return reply(views.standing(await upstream.ask(peers.registry, peers.control.Order, message)))

    return api
