"""`/v1/canaries`: tasks with known answers that executors are given among those of others."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from hive_common.kernel.ids import ID_PATTERN
from hive_proto.canaries.v1 import canaries_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway.bodies import read_command
from hive_gateway.canary_views import Canary, CanaryPage, canary
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.upstream import UpstreamDep

_ID = ID_PATTERN.pattern.replace(r"\Z", "$")
CanaryId = Annotated[str, Path(pattern=f"^{_ID}", description="id of a canary")]
OfAgent = Annotated[str, Query(max_length=160, description="only those of this name@version")]


class CanaryBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A task whose answer is known. `input` and `answer` are JSON texts; under `exact` each byte of it counts.

    Of the answer a key is kept, and nothing else.
    """

    agent: str
    input: str
    answer: str
    equal: Literal["exact", "json"] = "json"


def router(peers: Peers) -> APIRouter:
    """Return the paths of canaries."""
    api = APIRouter(prefix="/v1/canaries", tags=["canaries"])

    @api.post(
        "",
        operation_id="addCanary",
        responses=answers(Canary, 400, 404, 409, 413, status=201),
        openapi_extra=struct_body(CanaryBody),
        response_class=Response,
        status_code=201,
    )
    async def add(request: Request, upstream: UpstreamDep) -> Response:
        """Have executors be given a task whose answer is known, now and then. The same one again is the same."""
        body = await read_command(request, CanaryBody)
        message = canaries_pb2.AddRequest(
            agent=body.agent,
            input_json=body.input.encode(),
            answer_json=body.answer.encode(),
            equal=body.equal,
            caller=upstream.caller.pseudonym,
        )
        return reply(canary(await upstream.ask(peers.scheduler, peers.canaries.Add, message)), 201)

    @api.get("", operation_id="listCanaries", responses=answers(CanaryPage), response_class=Response)
    async def list_(upstream: UpstreamDep, agent: OfAgent = "") -> Response:
        """List them, without their answers."""
        message = canaries_pb2.ListRequest(agent=agent)
        found = await upstream.ask(peers.scheduler, peers.canaries.List, message)
        return reply(CanaryPage(canaries=tuple(map(canary, found.canaries))))

    @api.delete(
        "/{canary_id}", operation_id="removeCanary", responses=answers(Canary, 404), response_class=Response
    )
    async def remove(upstream: UpstreamDep, canary_id: CanaryId) -> Response:
        """Give one to nobody any more."""
        message = canaries_pb2.RemoveRequest(canary_id=canary_id, caller=upstream.caller.pseudonym)
        return reply(canary(await upstream.ask(peers.scheduler, peers.canaries.Remove, message)))

    return api
