"""`/v1/executors`: which devices there are, and which of them take work."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from hive_proto.executors.v1 import executors_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import After, PageLimit, reply
from hive_gateway.upstream import Upstream, UpstreamDep

ExecutorKey = Annotated[str, Path(max_length=200, description="id or name of an executor")]


class TrustBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why an executor is trusted anew. It is kept in the log."""

    reason: str = ""


class DrainBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Why an executor gets no new attempts. It is kept in the log."""

    reason: str = ""


def router(peers: Peers) -> APIRouter:
    """Return the paths of executors."""
    api = APIRouter(prefix="/v1", tags=["executors"])

    async def drain(upstream: Upstream, executor: str, reason: str, undrain: bool) -> Response:
        message = executors_pb2.DrainRequest(
            executor_id=executor, undrain=undrain, reason=reason, caller=upstream.caller.pseudonym
        )
        answer = await upstream.ask(peers.registry, peers.executors.Drain, message)
        return reply(views.executor(answer))

    @api.get(
        "/executors",
        operation_id="listExecutors",
        responses=answers(views.ExecutorPage, 400),
        response_class=Response,
    )
    async def list_executors(upstream: UpstreamDep, limit: PageLimit = 100, after: After = "") -> Response:
        """List executors."""
        message = executors_pb2.ListRequest(limit=limit, after=after)
        page = (await upstream.ask(peers.registry, peers.executors.List, message)).executors
        following = page[-1].executor_id if len(page) == limit else None
        return reply(views.ExecutorPage(executors=tuple(map(views.executor, page)), next=following))

    @api.get(
        "/executors/{executor}",
        operation_id="getExecutor",
        responses=answers(views.Executor, 400, 404),
        response_class=Response,
    )
    async def get_executor(executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Look at one executor."""
        message = executors_pb2.GetRequest(executor_id=executor)
        return reply(views.executor(await upstream.ask(peers.registry, peers.executors.Get, message)))

    @api.post(
        "/executors/{executor}/drain",
        operation_id="drainExecutor",
        responses=answers(views.Executor, 400, 404, 413),
        openapi_extra=struct_body(DrainBody, required=False),
        response_class=Response,
    )
    async def drain_executor(request: Request, executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Give an executor no new attempts; what it runs may end."""
        command = await read_command(request, DrainBody)
        return await drain(upstream, executor, command.reason, undrain=False)

    @api.post(
        "/executors/{executor}/undrain",
        operation_id="undrainExecutor",
        responses=answers(views.Executor, 400, 404, 413),
        openapi_extra=struct_body(DrainBody, required=False),
        response_class=Response,
    )
    async def undrain_executor(request: Request, executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Give an executor work again."""
        command = await read_command(request, DrainBody)
        return await drain(upstream, executor, command.reason, undrain=True)

    @api.post(
        "/executors/{executor}/trust",
        operation_id="trustExecutor",
        responses=answers(views.Executor, 400, 404, 409, 413),
        openapi_extra=struct_body(TrustBody, required=False),
        response_class=Response,
    )
    async def trust_executor(request: Request, executor: ExecutorKey, upstream: UpstreamDep) -> Response:
        """Begin new records of an executor's results: its quarantine, if it is in one, has ended."""
        command = await read_command(request, TrustBody)
        message = executors_pb2.TrustRequest(
            executor_id=executor, reason=command.reason, caller=upstream.caller.pseudonym
        )
        answer = await upstream.ask(peers.registry, peers.executors.Trust, message)
        return reply(views.executor(answer))

    return api
