"""`/v1/model-usage` and `/v1/model-budgets`: what calls of models have used, and what they may."""

from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from hive_proto.models.v1 import models_pb2
from msgspec import Struct
from starlette.responses import Response

from hive_gateway import money_views
from hive_gateway.bodies import read_command
from hive_gateway.documents import answers, struct_body
from hive_gateway.peers import Peers
from hive_gateway.replies import PageLimit, reply
from hive_gateway.upstream import UpstreamDep

By = Annotated[str, Query(max_length=20, description="key, job, agent, model, route, provider or day")]
Day = Annotated[str, Query(max_length=10, description="first day, in UTC, such as 2026-11-26")]
Subject = Annotated[
    str, Query(max_length=210, description="total, key:<name>, job:<id>, task:<id> or agent:<name>")
]
JobId = Annotated[str, Path(max_length=100)]


class BudgetBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits for a subject, in place of those of the same period and unit; with `clear` in place of all."""

    subject: str
    limits: tuple[money_views.LimitBody, ...] = ()
    clear: bool = False


class ReturnBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose unaccounted money was not spent, and how that is known. It is kept in the log."""

    subject: str
    reason: str = ""


def limits_of(limits: Iterable[money_views.LimitBody]) -> list[models_pb2.BudgetLimit]:
    """Return limits as the router takes them; it says what is wrong with them."""
    return [models_pb2.BudgetLimit(per=one.per, unit=one.unit, amount=_int64(one.amount)) for one in limits]


def _int64(amount: int) -> int:
    # What does not fit is refused there as well: it is beyond every bound.
    return max(-1, min(amount, (1 << 63) - 1))


def router(peers: Peers) -> APIRouter:
    """Return the paths of money."""
    api = APIRouter(prefix="/v1", tags=["models"])

    @api.get(
        "/model-usage",
        operation_id="getModelUsage",
        responses=answers(money_views.Usage, 400),
        response_class=Response,
    )
    async def usage(upstream: UpstreamDep, by: By = "key", since: Day = "", limit: PageLimit = 200) -> Response:
        """Sum up what calls have used."""
        message = models_pb2.UsageRequest(by=by, since_day=since, limit=limit)
        return reply(money_views.usage(by, await upstream.ask(peers.router, peers.models.Usage, message)))

    @api.get(
        "/jobs/{job_id}/model-usage",
        operation_id="getJobModelUsage",
        responses=answers(money_views.JobUsage, 404),
        response_class=Response,
    )
    async def job_usage(job_id: JobId, upstream: UpstreamDep) -> Response:
        """Say what the model calls of a job have used, and what of its budget that is."""
        message = models_pb2.JobUsageRequest(job_id=job_id)
        return reply(money_views.job_usage(await upstream.ask(peers.router, peers.models.GetJobUsage, message)))

    @api.get(
        "/model-budgets",
        operation_id="listModelBudgets",
        responses=answers(money_views.Budgets, 400),
        response_class=Response,
    )
    async def budgets(upstream: UpstreamDep, subject: Subject = "") -> Response:
        """Show budgets, and what of them is used."""
        message = models_pb2.BudgetsRequest(subject=subject)
        found = await upstream.ask(peers.router, peers.models.Budgets, message)
        return reply(money_views.Budgets(budgets=tuple(map(money_views.budget, found.budgets))))

    @api.post(
        "/model-budgets",
        operation_id="setModelBudget",
        responses=answers(money_views.Budget, 400, 413),
        openapi_extra=struct_body(BudgetBody),
        response_class=Response,
    )
    async def set_budget(request: Request, upstream: UpstreamDep) -> Response:
        """Set limits; they hold for the next call."""
        command = await read_command(request, BudgetBody)
        message = models_pb2.SetBudgetRequest(
            subject=command.subject,
            limits=limits_of(command.limits),
            clear=command.clear,
            caller=upstream.caller.pseudonym,
        )
        return reply(money_views.budget(await upstream.ask(peers.router, peers.models.SetBudget, message)))

    @api.post(
        "/model-budgets/return",
        operation_id="returnUnaccounted",
        responses=answers(money_views.Budget, 400, 413),
        openapi_extra=struct_body(ReturnBody),
        response_class=Response,
    )
    async def return_unaccounted(request: Request, upstream: UpstreamDep) -> Response:
        """Count as not spent what a router that died had set aside, once its provider's bill says so."""
        command = await read_command(request, ReturnBody)
        message = models_pb2.ReturnUnaccountedRequest(
            subject=command.subject, reason=command.reason, caller=upstream.caller.pseudonym
        )
        return reply(money_views.budget(await upstream.ask(peers.router, peers.models.ReturnUnaccounted, message)))

    return api
