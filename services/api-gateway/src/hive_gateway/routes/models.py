"""`/v1/models`: what the devices of the pool serve, in OpenAI's shape."""

from fastapi import APIRouter
from hive_proto.models.v1 import models_pb2
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.documents import answers
from hive_gateway.peers import Peers
from hive_gateway.replies import PageLimit, reply
from hive_gateway.upstream import UpstreamDep


def router(peers: Peers) -> APIRouter:
    """Return the paths of models."""
    api = APIRouter(prefix="/v1", tags=["models"])

    @api.get("/models", operation_id="listModels", responses=answers(views.ModelList, 400), response_class=Response)
    async def list_models(upstream: UpstreamDep, limit: PageLimit = 200) -> Response:
        """List models."""
        message = models_pb2.ListRequest(limit=limit)
        found = (await upstream.ask(peers.router, peers.models.List, message)).models
        return reply(views.ModelList(object="list", data=tuple(map(views.model, found))))

    return api
