"""Calls over gRPC whose answers are lost after the work was done, on a running installation.

The connection breaks, or the deadline passes, when the answer is on its way. The caller hears of it, asks again,
and what was done is done once. The cases are held against the contracts: a method without one fails.
"""

import asyncio
import contextlib
import importlib
import json
import pkgutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import hive_proto
import pytest
from google.protobuf.message import Message
from hive_common.bus.assertion import private_key
from hive_common.bus.jwt import claims_of, new_seed, public_nkey
from hive_common.contracts.joining import proof_of
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import read_secret
from hive_common.rpc.client import bearer, call, open_channel, stream
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.wire import grpc_answered
from hive_proto.agents.v1 import agents_pb2
from hive_proto.audit.v1 import audit_pb2
from hive_proto.executors.v1 import executors_pb2
from hive_proto.jobs.v1 import jobs_pb2
from hive_proto.models.v1 import models_pb2
from hive_proto.pain.v1 import pain_pb2

from tests.chaos import approval_cases, canary_cases, owner_cases
from tests.chaos.answers import (
    MODEL,
    STUBS,
    TASKS,
    TOKENS,
    WITHIN_S,
    Rig,
    Unary,
    cancelled_once,
    document,
    reading,
    submitted_once,
    tokens_of,
)

CONTRACTS = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(hive_proto.__path__, "hive_proto.")
    if module.name.endswith("_pb2")
]
INTERNAL = {"Presence", "Intake", "Exchange"}
"""Between services only; the gateway does not publish them."""
WITHHELD = {"Executors.Enrol", "Executors.Renew", "Executors.Keys", "Keys.Find"}
"""Methods of a published service that are between services only: executors come over REST."""
DEADLINE_S = 3.0
ASKED_MAX = 20


# --- unary ---


async def submit_request(rig: Rig) -> Message:
    return jobs_pb2.SubmitRequest(document_json=document(2, 1), idempotency_key=new_id(), caller="somebody")


async def submit_many_request(rig: Rig) -> Message:
    return jobs_pb2.SubmitManyRequest(submits=[await submit_request(rig) for _ in range(3)])


async def each_submitted_once(rig: Rig, request: Any, answer: Any) -> None:
    assert len({result.taken.job_id for result in answer.results}) == 3
    for result in answer.results:
        await submitted_once(rig, None, result.taken)


async def cancel_request(rig: Rig) -> Message:
    return jobs_pb2.CancelRequest(job_id=await rig.submit(2, 50_000), reason="enough", caller="somebody")


async def push_request(rig: Rig) -> Message:
    return agents_pb2.PushRequest(
        manifest_digest=rig.digest, signature_digest=rig.signature_digest, caller="somebody"
    )


async def published_once(rig: Rig, request: Any, answer: Any) -> None:
    async with rig.reader() as reader:
        events = await reader.read(0, 1000, types=["AgentVersionPublished"])
    assert [json.loads(event.payload or b"{}")["digest"] for event in events].count(rig.digest) == 1


async def drain_request(rig: Rig) -> Message:
    return executors_pb2.DrainRequest(executor_id=rig.executor_id, reason="r", caller="somebody")


async def drained_once(rig: Rig, request: Any, answer: Any) -> None:
    """Its events alternate: asked twice, it was drained once. Then it is taken back."""
    with rig.api() as api:
        await asyncio.to_thread(api.post, f"/v1/executors/{rig.executor_id}/undrain", {})
    marks = [t for t in await rig.types_of(rig.executor_id) if t in ("ExecutorDrainRequested", "ExecutorUndrained")]
    assert marks == ["ExecutorDrainRequested", "ExecutorUndrained"] * (len(marks) // 2)


async def issue_request(rig: Rig) -> Message:
    return executors_pb2.IssueTokenRequest(valid_s=600, owner=f"owner {new_id()}", caller="somebody")


async def each_token_is_harmless(rig: Rig, request: Any, answer: Any) -> None:
    """Each ask made a token of its own. The one that arrived admits a machine; nobody knows the others' secrets."""
    async with rig.reader() as reader:
        issued = await reader.read(0, 10_000, types=["JoinTokenIssued"])
    asked = [one.stream for one in issued if json.loads(one.payload or b"{}").get("owner_name") == request.owner]
    assert answer.token_id in asked and len(set(asked)) == len(asked) >= 2
    async with rig.owner("Executors") as (executors, metadata):
        await call(executors.Enrol(shown(answer), metadata=metadata))
    for token in asked:
        used = ["JoinTokenUsed"] if token == answer.token_id else []
        assert await rig.types_of(token) == ["JoinTokenIssued", *used]


def shown(token: Any) -> executors_pb2.EnrolRequest:
    """Return what a machine with a new key shows to join."""
    seed, name = new_seed("user"), "guest"
    return executors_pb2.EnrolRequest(
        token_id=token.token_id,
        secret=token.secret,
        public_key=public_nkey(seed),
        name=name,
        proof=private_key(seed).sign(proof_of(token.token_id, name)),
    )


async def enrol_request(rig: Rig) -> executors_pb2.EnrolRequest:
    async with rig.owner("Executors") as (executors, metadata):
        return shown(await call(executors.IssueToken(executors_pb2.IssueTokenRequest(), metadata=metadata)))


async def enrolled_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.executor_id == derive_id("executor", request.public_key)
    assert await rig.types_of(answer.executor_id) == ["ExecutorEnrolled"]
    assert await rig.types_of(request.token_id) == ["JoinTokenIssued", "JoinTokenUsed"]


async def trust_executor_request(rig: Rig) -> Message:
    return executors_pb2.TrustRequest(executor_id=rig.executor_id, reason="r", caller="somebody")


async def trusted_in_the_end(rig: Rig, request: Any, answer: Any) -> None:
    """Asked twice, its records began twice, which is what begins them once."""
    assert "ExecutorTrusted" in await rig.types_of(rig.executor_id)
    with rig.api() as api:
        found = await asyncio.to_thread(api.get, f"/v1/executors/{rig.executor_id}")
    assert found["reputation"]["standing"] == "new"


async def revoke_request(rig: Rig) -> Message:
    """Of an executor that joined for this: revoked is for ever."""
    async with rig.owner("Executors") as (executors, metadata):
        guest = await call(executors.Enrol(await enrol_request(rig), metadata=metadata))
    return executors_pb2.RevokeRequest(executor_id=guest.executor_id, reason="lost", caller="somebody")


async def revoked_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.executor_id == request.executor_id
    assert await rig.types_of(request.executor_id) == ["ExecutorEnrolled", "ExecutorRevoked"]


UNARY: dict[str, Unary] = {
    **owner_cases.CASES,
    **approval_cases.CASES,
    **canary_cases.CASES,
    "Jobs.Submit": Unary(submit_request, lambda rig, answer: answer.existed, submitted_once),
    "Intake.SubmitMany": Unary(
        submit_many_request,
        lambda rig, answer: all(result.taken.existed for result in answer.results),
        each_submitted_once,
    ),
    "Jobs.Cancel": Unary(
        cancel_request, lambda rig, answer: answer.state in ("cancelling", "cancelled"), cancelled_once
    ),
    "Jobs.Get": reading(
        lambda rig: jobs_pb2.GetRequest(job_id=rig.job_id), lambda rig, answer: answer.state == "succeeded"
    ),
    "Jobs.List": reading(
        lambda rig: jobs_pb2.ListRequest(limit=1000),
        lambda rig, answer: rig.job_id in {job.job_id for job in answer.jobs},
    ),
    "Jobs.Tasks": reading(
        lambda rig: jobs_pb2.TasksRequest(job_id=rig.job_id), lambda rig, answer: len(answer.tasks) == TASKS
    ),
    "Jobs.Logs": reading(
        lambda rig: jobs_pb2.LogsRequest(job_id=rig.job_id), lambda rig, answer: answer.IsInitialized()
    ),
    "Jobs.Explain": reading(
        lambda rig: jobs_pb2.ExplainRequest(task_id=rig.task_id),
        lambda rig, answer: json.loads(answer.explanation_json)["state"] == "succeeded",
    ),
    "Jobs.GetDecision": reading(
        lambda rig: jobs_pb2.GetDecisionRequest(task_id=rig.judged_id),
        lambda rig, answer: json.loads(answer.decision_json)["task"] == rig.judged_id,
    ),
    "Executors.List": reading(
        lambda rig: executors_pb2.ListRequest(),
        lambda rig, answer: rig.executor_id in {one.executor_id for one in answer.executors},
    ),
    "Executors.Get": reading(
        lambda rig: executors_pb2.GetRequest(executor_id=rig.executor_id),
        lambda rig, answer: answer.executor_id == rig.executor_id,
    ),
    "Executors.Drain": Unary(drain_request, lambda rig, answer: answer.state == "drained", drained_once),
    "Executors.IssueToken": Unary(
        issue_request, lambda rig, answer: bool(answer.secret and answer.expires_us), each_token_is_harmless
    ),
    "Executors.Enrol": Unary(
        enrol_request,
        lambda rig, answer: claims_of(answer.nats_jwt)["name"] == answer.executor_id,
        enrolled_once,
    ),
    "Executors.Renew": reading(
        lambda rig: executors_pb2.RenewRequest(executor_id=rig.executor_id),
        lambda rig, answer: claims_of(answer.nats_jwt)["name"] == answer.executor_id == rig.executor_id,
    ),
    "Executors.Revoke": Unary(
        revoke_request, lambda rig, answer: answer.revoked and answer.state == "revoked", revoked_once
    ),
    "Executors.Trust": Unary(
        trust_executor_request,
        lambda rig, answer: answer.executor_id == rig.executor_id,
        trusted_in_the_end,
    ),
    "Executors.Keys": reading(
        lambda rig: executors_pb2.KeysRequest(executor_ids=[rig.executor_id, new_id()]),
        lambda rig, answer: [(key.executor_id, key.revoked) for key in answer.keys] == [(rig.executor_id, False)],
    ),
    "Presence.List": reading(
        lambda rig: executors_pb2.PresenceRequest(),
        lambda rig, answer: rig.executor_id in {one.executor_id for one in answer.executors},
    ),
    "Agents.Push": Unary(push_request, lambda rig, answer: answer.digest == rig.digest, published_once),
    "Agents.List": reading(
        lambda rig: agents_pb2.ListRequest(name="spin"), lambda rig, answer: answer.versions[0].digest == rig.digest
    ),
    "Agents.Get": reading(
        lambda rig: agents_pb2.GetRequest(name="spin", version="1.0.0"),
        lambda rig, answer: answer.digest == rig.digest,
    ),
    "Audit.Verify": reading(
        lambda rig: audit_pb2.VerifyRequest(), lambda rig, answer: answer.ok and answer.events >= rig.head
    ),
    "Pain.List": reading(
        lambda rig: pain_pb2.ListRequest(),
        lambda rig, answer: rig.fingerprint in [group.fingerprint for group in answer.groups],
    ),
    "Pain.Get": reading(
        lambda rig: pain_pb2.GetRequest(fingerprint=rig.fingerprint),
        lambda rig, answer: answer.examples[0].message != "" and answer.group.agent == "spin",
    ),
    "Audit.Decisions": reading(
        lambda rig: audit_pb2.DecisionsRequest(task_id=rig.judged_id),
        lambda rig, answer: [(one.task_id, one.result) for one in answer.checks] == [(rig.judged_id, "same")],
    ),
    "Models.List": reading(
        lambda rig: models_pb2.ListRequest(), lambda rig, answer: MODEL in {model.name for model in answer.models}
    ),
    "Models.Explain": reading(
        lambda rig: models_pb2.ExplainRequest(call_id=rig.calls[0]),
        lambda rig, answer: (answer.call_id, answer.outcome) == (rig.calls[0], "succeeded"),
    ),
    # Each ask has a ticket of its own; those that nobody got run out.
    "Exchange.Open": reading(
        lambda rig: models_pb2.OpenRequest(), lambda rig, answer: answer.port > 0 and answer.ticket
    ),
}


def methods(streaming: bool) -> set[str]:
    return {
        f"{service.name}.{method.name}"
        for contract in CONTRACTS
        for service in contract.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.server_streaming == streaming
    }


def test_every_unary_method_of_the_contracts_has_a_case() -> None:
    assert UNARY.keys() == methods(streaming=False)


def test_every_stream_of_the_contracts_has_a_case() -> None:
    assert STREAMED.keys() == methods(streaming=True)


@contextlib.asynccontextmanager
async def reached(rig: Rig, name: str, door: str) -> AsyncIterator[tuple[TcpProxy, Any, Any]]:
    """Yield a proxy in front of whoever serves the method, the method, and the metadata of its calls."""
    service, _, method = name.partition(".")
    owner, stub = STUBS[service]
    if door == "gateway":
        port, key = int(rig.home.settings().endpoints.grpc.rpartition(":")[2]), rig.home.api_key()
    else:
        config = rig.config(owner)
        port, key = config.grpc_port, read_secret(config.service_key_file)
    async with TcpProxy(port) as proxy:
        channel = open_channel(f"127.0.0.1:{proxy.port}")
        try:
            async with asyncio.timeout(WITHIN_S):
                await channel.channel_ready()
            yield proxy, getattr(stub(channel), method), bearer(key)
        finally:
            await channel.close()


async def ask_again(method: Any, request: Message, metadata: Any) -> Any:
    """Ask until there is an answer: the channel may not have noticed yet that its connection is gone."""
    for _ in range(ASKED_MAX):
        with contextlib.suppress(Unavailable):
            return await call(method(request, metadata=metadata, timeout=WITHIN_S, wait_for_ready=True))
    raise AssertionError(f"no answer to {ASKED_MAX} calls")


def through_doors(*names: str) -> list[tuple[str, str]]:
    """Return the methods, each with the doors that lead to it."""
    published = [name for name in names if name.partition(".")[0] not in INTERNAL and name not in WITHHELD]
    return [(name, "service") for name in names] + [(name, "gateway") for name in published]


@pytest.mark.parametrize(("name", "door"), through_doors(*UNARY))
async def test_an_answer_over_grpc_is_lost_with_its_connection(rig: Rig, name: str, door: str) -> None:
    case = UNARY[name]
    request = await case.request(rig)
    async with reached(rig, name, door) as (proxy, method, metadata):
        cut = proxy.cut_next_answer(grpc_answered)
        with pytest.raises(Unavailable):
            await call(method(request, metadata=metadata, timeout=WITHIN_S))
        assert cut.is_set()
        answer = await ask_again(method, request, metadata)
    assert case.fits(rig, answer)
    if case.holds is not None:
        await case.holds(rig, request, answer)


@pytest.mark.parametrize("name", [name for name, case in UNARY.items() if case.holds is not None])
async def test_the_deadline_passes_while_the_work_is_done(rig: Rig, name: str) -> None:
    case = UNARY[name]
    request = await case.request(rig)
    async with reached(rig, name, "service") as (proxy, method, metadata):
        silenced = proxy.silence_next_answer(grpc_answered)
        asked = 0
        while not silenced.is_set():  # on a busy machine the time may be over before the work is
            assert asked < ASKED_MAX
            asked += 1
            with pytest.raises(DeadlineExceeded):
                await call(method(request, metadata=metadata, timeout=DEADLINE_S, wait_for_ready=True))
        proxy.cut_all()
        answer = await ask_again(method, request, metadata)
    assert case.fits(rig, answer)
    assert case.holds is not None
    await case.holds(rig, request, answer)


# --- streams ---


class Streamed(NamedTuple):
    """The request after what has come so far, and the positions that an item of the stream brings.

    `holds` is what must hold in the log at last.
    """

    request: Callable[[Rig, list[int]], Message]
    positions: Callable[[Any], list[int]]
    whole: Callable[[Rig], list[int]]
    resumes: bool = True
    holds: Callable[[Rig], Awaitable[None]] | None = None


def exported(chunk: Any) -> list[int]:
    lines = [json.loads(line) for line in chunk.lines.splitlines()]
    return [json.loads(line["event"])["position"] for line in lines if "event" in line]


async def each_generation_is_recorded_once(rig: Rig) -> None:
    """Whoever heard of it or not: none goes on, and each has its one record."""

    async def all_recorded() -> bool:
        begun, active = await rig.generations()
        return not active and len(await rig.records()) >= begun

    await rig.until(all_recorded, "every generation is over and recorded")
    records = await rig.records(*rig.calls)
    assert len({record.stream for record in records}) == len(records)
    (last,) = [record for record in records if record.stream == rig.calls[-1]]
    assert json.loads(last.payload or b"{}").get("code", "") == ""


STREAMED: dict[str, Streamed] = {
    # Nothing of a call is kept for who comes back: it is asked anew, as another call.
    "Models.Complete": Streamed(
        lambda rig, seen: rig.completion(),
        lambda part: tokens_of([part]),
        lambda rig: list(range(TOKENS)),
        resumes=False,
        holds=each_generation_is_recorded_once,
    ),
    "Jobs.Watch": Streamed(
        lambda rig, seen: jobs_pb2.WatchRequest(job_id=rig.job_id, from_position=seen[-1] if seen else 0),
        lambda event: [event.position],
        lambda rig: rig.events,
    ),
    "Jobs.WatchBatches": Streamed(
        lambda rig, seen: jobs_pb2.WatchRequest(job_id=rig.job_id, from_position=seen[-1] if seen else 0),
        lambda batch: [event.position for event in batch.events],
        lambda rig: rig.events,
    ),
    "Audit.Events": Streamed(
        lambda rig, seen: audit_pb2.EventsRequest(**{"from": len(seen) + 1, "to": rig.head, "limit": 10_000}),
        lambda event: [event.position],
        lambda rig: list(range(1, rig.head + 1)),
    ),
    "Audit.Export": Streamed(
        lambda rig, seen: audit_pb2.ExportRequest(to=rig.head),
        exported,
        lambda rig: list(range(1, rig.head + 1)),
        resumes=False,
    ),
}


@pytest.mark.parametrize(("name", "door"), through_doors(*STREAMED))
async def test_a_stream_over_grpc_that_breaks_says_so_and_is_taken_up(rig: Rig, name: str, door: str) -> None:
    case = STREAMED[name]
    async with reached(rig, name, door) as (proxy, method, metadata):
        # Nothing of it arrives; a part of it does; only its end is lost.
        for after_bytes in (0, 2_000, None):
            seen: list[int] = []
            broken = 0
            cut = (
                proxy.cut_next_answer(grpc_answered)
                if after_bytes is None
                else proxy.cut_inside_next_answer(after_bytes)
            )
            while True:
                pending = method(case.request(rig, seen), metadata=metadata, timeout=WITHIN_S, wait_for_ready=True)
                try:
                    async for item in stream(pending):
                        seen += case.positions(item)
                except Unavailable:
                    # More than once where the channel has not noticed yet that its connection is gone.
                    broken += 1
                    assert cut.is_set() and broken < ASKED_MAX
                    seen = [*seen] if case.resumes else []
                    continue
                break
            assert broken, "the stream ended as if nothing had happened"
            assert seen == case.whole(rig)
    if case.holds is not None:
        await case.holds(rig)


@pytest.fixture
def hanging(rig: Rig) -> Iterator[None]:
    """A back end that says half of each answer, and then nothing more."""
    rig.back_end.play(hang_after=TOKENS // 2)
    yield
    rig.back_end.play(hang_after=None)


@pytest.mark.usefixtures("hanging")
@pytest.mark.parametrize(("name", "door"), through_doors("Models.Complete"))
async def test_a_model_call_whose_connection_breaks_ends_its_generation(rig: Rig, name: str, door: str) -> None:
    async def generates(count: int) -> bool:
        return (await rig.generations())[1] == count

    async def is_recorded() -> bool:
        return bool(await rig.records(call_id))

    async with reached(rig, name, door) as (proxy, method, metadata):
        seen: list[int] = []
        pending = method(STREAMED[name].request(rig, seen), metadata=metadata, timeout=10 * WITHIN_S)
        heard = asyncio.create_task(hear_out(pending))
        await rig.until(lambda: generates(1), "the call is being answered")
        call_id = rig.calls[-1]
        assert await rig.records(call_id) == []
        proxy.cut_all()
        with pytest.raises(Unavailable):
            await heard
        await rig.until(lambda: generates(0), "the generation has ended")
        await rig.until(is_recorded, "the call is recorded")
    (record,) = await rig.records(call_id)
    assert json.loads(record.payload or b"{}")["code"] == "cancelled"


async def hear_out(pending: Any) -> None:
    async for _ in stream(pending):
        pass
