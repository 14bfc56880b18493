"""`hive.models.v1.Models`: what the devices of the pool serve. Calls come with a later issue."""

from typing import Any, Final

import grpc.aio
from hive_common.kernel.errors import InvalidArgument
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

from hive_router.views import ModelRow, Views

LIST_DEFAULT: Final = 200
LIST_MAX: Final = 1_000


class ModelsServicer(models_pb2_grpc.ModelsServicer):
    """`hive.models.v1.Models`.

    Args:
        views: reads.
    """

    def __init__(self, views: Views) -> None:
        self._views = views

    async def List(
        self, request: models_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.ListResponse:
        """Return the models of the pool, each once, with the executors that serve it."""
        if not 0 <= request.limit <= LIST_MAX:
            raise InvalidArgument(f"limit: got {request.limit}; expected 1 to {LIST_MAX}", path="limit")
        rows = await self._views.models(request.limit or LIST_DEFAULT)
        return models_pb2.ListResponse(models=[_message(row) for row in rows])


def _message(row: ModelRow) -> models_pb2.Model:
    return models_pb2.Model(
        name=row.name,
        executors=row.executors,
        family=row.family,
        size_bytes=row.size_bytes,
        quantisation=row.quantisation,
        context_tokens=row.context_tokens,
        loaded=row.loaded,
    )
