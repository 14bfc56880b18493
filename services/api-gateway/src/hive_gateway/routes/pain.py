"""`/v1/pain`: failures, in groups of what failed in the same way."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from hive_proto.pain.v1 import pain_pb2
from starlette.responses import Response

from hive_gateway.documents import answers
from hive_gateway.pain_views import FailureExamples, FailureGroups, failure_examples, failure_groups
from hive_gateway.peers import Peers
from hive_gateway.replies import reply
from hive_gateway.upstream import UpstreamDep

Since = Annotated[int, Query(ge=0, lt=1 << 63, description="failures from this time on, in µs since the epoch")]
Fingerprint = Annotated[str, Path(pattern="^[0-9a-f]{4,16}$", description="a fingerprint, or how one begins")]


def router(peers: Peers) -> APIRouter:
    """Return the paths of failures."""
    api = APIRouter(prefix="/v1/pain", tags=["pain"])

    @api.get("", operation_id="listFailures", responses=answers(FailureGroups, 400), response_class=Response)
    async def list_(
        upstream: UpstreamDep,
        since_us: Since = 0,
        agent: Annotated[str, Query(max_length=130, description="`name` or `name@version`")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = 20,
    ) -> Response:
        """List what fails again and again, most often first."""
        message = pain_pb2.ListRequest(since_us=since_us, agent=agent, limit=limit)
        return reply(failure_groups(await upstream.ask(peers.scheduler, peers.pain.List, message)))

    @api.get(
        "/{fingerprint}",
        operation_id="getFailures",
        responses=answers(FailureExamples, 400, 404, 409),
        response_class=Response,
    )
    async def get(
        upstream: UpstreamDep,
        fingerprint: Fingerprint,
        since_us: Since = 0,
        examples: Annotated[int, Query(ge=1, le=20)] = 5,
    ) -> Response:
        """Look at one group, with examples."""
        message = pain_pb2.GetRequest(fingerprint=fingerprint, since_us=since_us, examples=examples)
        return reply(failure_examples(await upstream.ask(peers.scheduler, peers.pain.Get, message)))

    return api
