"""Model calls: why they went where they went. The calls themselves are answered by `hive_gateway.surfaces`."""

from fastapi import APIRouter
from hive_proto.models.v1 import models_pb2
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.documents import answers
from hive_gateway.peers import Peers
from hive_gateway.replies import CallId, reply
from hive_gateway.upstream import UpstreamDep


def router(peers: Peers) -> APIRouter:
    """Return the paths of model calls."""
    api = APIRouter(prefix="/v1", tags=["models"])

    @api.get(
        "/model-calls/{call_id}/explain",
        operation_id="explainModelCall",
        responses=answers(views.ModelExplanation, 400, 404),
        response_class=Response,
    )
    async def explain(call_id: CallId, upstream: UpstreamDep) -> Response:
        """Say why a call went where it went: all candidates, with reasons."""
        message = models_pb2.ExplainRequest(call_id=call_id)
        found = await upstream.ask(peers.router, peers.models.Explain, message)
        return reply(views.model_explanation(found))

    return api
