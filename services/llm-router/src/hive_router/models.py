"""`hive.models.v1.Models`: what can be called, calls, and why they went where they went."""

from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
from hive_common.contracts.events import ModelCallFinished, ModelCandidate
from hive_common.inference.calls import PATHS, Answer, Head, ModelCall, OfferedModel, narrowed
from hive_common.kernel.errors import InvalidArgument, NotFound
from hive_common.kernel.ids import is_id
from hive_common.rpc.rules import NO_RULES, KeyRules, rules_of
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

from hive_router.explanations import Explanations
from hive_router.spending import Spending
from hive_router.waterfall import Asker, Waterfall

LIST_DEFAULT: Final = 200
LIST_MAX: Final = 1_000

DEADLINE_DEFAULT_MS: Final = 600_000
"""For a call without a deadline of its own."""

_SLACK_MS_MAX: Final = 200
"""So much before the deadline an answer ends by itself, in words that reach the caller."""

_ACTOR: Final = "router"


class ModelsServicer(models_pb2_grpc.ModelsServicer):
    """`hive.models.v1.Models`.

    Args:
        waterfall: makes the calls.
        explanations: of calls.
        spending: answers what is asked about money.
        owner: pseudonym of the installation's owner, whose calls these are.
    """

    def __init__(self, waterfall: Waterfall, explanations: Explanations, spending: Spending, owner: str) -> None:
        self._spending = spending
        self._waterfall = waterfall
        self._explanations = explanations
        self._owner = owner

    async def List(
        self, request: models_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.ListResponse:
        """Return the models that can be called now, each once, with the executors that serve it."""
        if not 0 <= request.limit <= LIST_MAX:
            raise InvalidArgument(f"limit: got {request.limit}; expected 1 to {LIST_MAX}", path="limit")
        offered = (await self._waterfall.offered())[: request.limit or LIST_DEFAULT]
        return models_pb2.ListResponse(models=[_model(one) for one in offered])

    async def begin(
        self, request: models_pb2.CompleteRequest, remaining_s: float | None, rules: KeyRules = NO_RULES
    ) -> Answer:
        """Begin a call, under the rules of a key. Raises as the port of model calls says."""
        call = _call(request, remaining_s, rules)
        return await self._waterfall.complete(call, Asker(self._owner, call.caller, call.caller or _ACTOR))

    async def Complete(
        self, request: models_pb2.CompleteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[models_pb2.CompleteResponse]:
        """Make one call. A caller that goes away cancels it."""
        rules = rules_of(context.invocation_metadata())
        # The gateway passes on what an outsider wrote: of its key only the gateway's own word counts.
        request.key, request.cloud = rules.key, rules.cloud
        answer = await self.begin(request, context.time_remaining(), rules)
        chunks = answer.chunks
        try:
            # Its first piece is there already.
            yield models_pb2.CompleteResponse(head=head_of(answer.head, await anext(chunks, b"")))
            async for chunk in chunks:
                yield models_pb2.CompleteResponse(chunk=chunk)
        finally:
            await chunks.aclose()

    async def Explain(
        self, request: models_pb2.ExplainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.Explanation:
        """Say why a call went where it went."""
        if not is_id(request.call_id):
            raise InvalidArgument("call_id: expected a UUID", path="call_id")
        rules = rules_of(context.invocation_metadata())
        found = await self._explanations.of(request.call_id)
        if rules.only and found.key != rules.key:
            raise NotFound(f"no model call {request.call_id}")
        return _explanation(request.call_id, found)

    async def Usage(
        self, request: models_pb2.UsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.UsageResponse:
        """Sum up what calls have used."""
        return await self._spending.usage(request)

    async def GetJobUsage(
        self, request: models_pb2.JobUsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.JobUsage:
        """Say what a job's calls have used, and what of its budget that is."""
        return await self._spending.job(request, rules_of(context.invocation_metadata()).only)

    async def Budgets(
        self, request: models_pb2.BudgetsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.BudgetsResponse:
        """Return limits, and what of them is used."""
        return await self._spending.budgets(request)

    async def SetBudget(
        self, request: models_pb2.SetBudgetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.Budget:
        """Set limits; they hold at once."""
        return await self._spending.set_budget(request)

    async def ReturnUnaccounted(
        self, request: models_pb2.ReturnUnaccountedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.Budget:
        """Count as not spent what routers that died have left of their blocks."""
        return await self._spending.return_unaccounted(request)


def head_of(head: Head, chunk: bytes) -> models_pb2.CompleteHead:
    """Return a head as it travels, with the first piece of the body."""
    return models_pb2.CompleteHead(
        status=head.status,
        content_type=head.content_type,
        route=head.route,
        executor=head.executor,
        chunk=chunk,
    )


def _call(request: models_pb2.CompleteRequest, remaining_s: float | None, rules: KeyRules) -> ModelCall:
    if not is_id(request.call_id):
        raise InvalidArgument("call_id: expected a UUID", path="call_id")
    if request.endpoint not in PATHS:
        raise InvalidArgument(f"endpoint: got {request.endpoint!r}; expected {', '.join(PATHS)}", path="endpoint")
    if not request.model:
        raise InvalidArgument("model: expected a name", path="model")
    left_ms = DEADLINE_DEFAULT_MS if remaining_s is None else int(remaining_s * 1000)
    return ModelCall(
        id=request.call_id,
        endpoint=request.endpoint,
        model=request.model,
        body=request.body,
        stream=request.stream,
        deadline_ms=max(1, left_ms - min(_SLACK_MS_MAX, left_ms // 20)),
        caller=request.caller,
        key=request.key,
        pin=narrowed(rules.pin, request.pin),
        counts_only=rules.counts_only or request.counts_only,
        cloud=request.cloud,
    )


def _model(offered: OfferedModel) -> models_pb2.Model:
    return models_pb2.Model(
        name=offered.name,
        executors=offered.executors,
        family=offered.family,
        size_bytes=offered.size_bytes,
        quantisation=offered.quantisation,
        context_tokens=offered.context_tokens,
        loaded=offered.loaded,
        providers=offered.providers,
    )


def _explanation(call_id: str, event: ModelCallFinished) -> models_pb2.Explanation:
    return models_pb2.Explanation(
        call_id=call_id,
        model=event.model,
        route=event.route,
        executor=event.executor,
        pin=event.pin,
        outcome=event.code or "succeeded",
        candidates=[_candidate(one) for one in event.candidates],
        provider=event.provider,
        nano_usd=event.nano_usd,
        estimated=event.estimated,
    )


def _candidate(one: ModelCandidate) -> models_pb2.Candidate:
    return models_pb2.Candidate(
        executor=one.executor,
        route=one.route,
        backend=one.backend,
        score=one.score,
        rejected=one.rejected,
        detail=one.detail,
        tried=one.tried,
    )
