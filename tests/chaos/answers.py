"""A running installation with a finished job and a finished model call, for answers that are lost on the way."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from google.protobuf.message import Message
from hive_cli.api import Api
from hive_cli.home import Home
from hive_common.contracts.events import JOB_TERMINAL
from hive_common.eventlog.log import LogReader, Stored
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.rpc.client import bearer, call, open_channel, stream
from hive_common.testing.installation import Installation
from hive_common.testing.scripted import ScriptedProcess
from hive_proto.agents.v1 import agents_pb2_grpc
from hive_proto.approvals.v1 import approvals_pb2_grpc
from hive_proto.audit.v1 import audit_pb2_grpc
from hive_proto.canaries.v1 import canaries_pb2_grpc
from hive_proto.control.v1 import control_pb2_grpc
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2_grpc
from hive_proto.keys.v1 import keys_pb2_grpc
from hive_proto.models.v1 import models_pb2, models_pb2_grpc
from hive_proto.pain.v1 import pain_pb2_grpc
from hive_proto.values.v1 import values_pb2_grpc

HERE = Path(__file__).parent
STUBS: dict[str, tuple[str, Any]] = {
    "Agents": ("registry", agents_pb2_grpc.AgentsStub),
    "Executors": ("registry", executors_pb2_grpc.ExecutorsStub),
    "Presence": ("scheduler", executors_pb2_grpc.PresenceStub),
    "Jobs": ("scheduler", jobs_pb2_grpc.JobsStub),
    "Intake": ("scheduler", jobs_pb2_grpc.IntakeStub),
    "Audit": ("audit", audit_pb2_grpc.AuditStub),
    "Models": ("router", models_pb2_grpc.ModelsStub),
    "Exchange": ("router", models_pb2_grpc.ExchangeStub),
    "Control": ("registry", control_pb2_grpc.ControlStub),
    "Keys": ("registry", keys_pb2_grpc.KeysStub),
    "Values": ("registry", values_pb2_grpc.ValuesStub),
    "Approvals": ("scheduler", approvals_pb2_grpc.ApprovalsStub),
    "Canaries": ("scheduler", canaries_pb2_grpc.CanariesStub),
    "Pain": ("scheduler", pain_pb2_grpc.PainStub),
}
"""Services of the contracts: who answers."""
TASKS = 12
MODEL = "scripted"
TOKENS = 40
WITHIN_S = 60.0


class Rig:
    """The installation, a finished job and a finished model call in it, and its log."""

    def __init__(self, installation: Installation, back_end: ScriptedProcess) -> None:
        self.installation = installation
        self.back_end = back_end
        self.home = Home(installation.home)
        self.url = self.home.settings().endpoints.http
        self.job_id = ""
        self.task_id = ""
        self.judged_id = ""
        self.executor_id = ""
        self.digest = ""
        self.signature_digest = ""
        self.head = 0
        self.fingerprint = ""
        self.has_values = False
        self.events: list[int] = []
        self.calls: list[str] = []
        """Ids of model calls, as they were made here."""

    async def prepare(self) -> None:
        await asyncio.to_thread(self.installation.hive, "agent", "push", str(HERE / "agents" / "spin"))
        await self.submit(1, 1, input={"n": "${item}", "ms": "no number"}, retry={"max_attempts": 1})
        self.job_id = await self.submit(TASKS, 1)
        judged = await self.submit(1, 1, speculate={"replicas": 2, "distinct": "none"})
        for job in (self.job_id, judged):
            await self.types_of(job, until_ended=True)
        async with self.reader() as reader:
            created = await reader.read(0, 10_000, types=["TaskCreated"])
            (self.task_id, *_) = [e.stream for e in created if json.loads(e.payload or b"{}")["job"] == self.job_id]
            (decided,) = await reader.read(0, 10, types=["TaskDecided"])
            self.judged_id = decided.stream
            (registered, *_) = await reader.read(0, 1, types=["ExecutorRegistered"])
            published = await reader.read(0, 1000, types=["AgentVersionPublished"])
            self.head = await reader.head()
        self.executor_id = registered.stream
        found = [json.loads(event.payload or b"{}") for event in published]
        ((self.digest, self.signature_digest),) = [
            (one["digest"], one["signature"]) for one in found if one["name"] == "spin"
        ]
        with self.api() as api:
            page = await asyncio.to_thread(
                lambda: list(api.pages(f"/v1/jobs/{self.job_id}/events", "events", "from"))
            )
        self.events = [event["position"] for event in page]
        assert len(self.events) > 4 * TASKS
        await self.until(self._has_failed, "a failure is counted")
        await self.until(self._serves_the_model, "the model can be called")
        async with self.owner("Models") as (models, metadata):
            answer = [part async for part in stream(models.Complete(self.completion(), metadata=metadata))]
        assert tokens_of(answer) == list(range(TOKENS))

    async def _has_failed(self) -> bool:
        with self.api() as api:
            groups = (await asyncio.to_thread(api.get, "/v1/pain", agent="spin"))["groups"]
        self.fingerprint = groups[0]["fingerprint"] if groups else ""
        return bool(groups)

    async def _serves_the_model(self) -> bool:
        async with self.owner("Models") as (models, metadata):
            listed = await call(models.List(models_pb2.ListRequest(), metadata=metadata))
        return MODEL in {model.name for model in listed.models}

    def completion(self, *, streams: bool = True) -> models_pb2.CompleteRequest:
        """Return a call of the model that was not made before."""
        self.calls.append(new_id())
        body = json.dumps({"model": MODEL, "messages": [], "stream": streams}).encode()
        return models_pb2.CompleteRequest(
            call_id=self.calls[-1], endpoint="chat", model=MODEL, body=body, stream=streams
        )

    @contextlib.asynccontextmanager
    async def owner(self, service: str) -> AsyncIterator[tuple[Any, Any]]:
        """Yield the stub of a service, straight to who serves it, and the metadata of its calls."""
        name, stub = STUBS[service]
        config = self.config(name)
        channel = open_channel(f"127.0.0.1:{config.grpc_port}")
        try:
            yield stub(channel), bearer(read_secret(config.service_key_file))
        finally:
            await channel.close()

    async def until(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        try:
            async with asyncio.timeout(WITHIN_S):
                while not await holds():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {WITHIN_S:g} s: {what}") from None

    async def records(self, *calls: str) -> list[Stored]:
        """Return the records of these model calls, or of all, that are in the log by now."""
        async with self.reader() as reader:
            return await reader.read(0, 10_000, types=["ModelCallFinished"], streams=list(calls) or None)

    async def generations(self) -> tuple[int, int]:
        """Return how many generations the back end has begun, and how many of them go on."""
        counts = await asyncio.to_thread(lambda: self.back_end.counts)
        ended = counts.completed + counts.cancelled + counts.dropped + counts.failed
        return ended + counts.active, counts.active

    def reader(self) -> LogReader:
        return LogReader(self.installation.admin_dsn())

    def api(self) -> Api:
        return Api(self.home)

    def config(self, service: str) -> ServiceConfig:
        return msgspec.json.decode(self.home.config_file(service).read_bytes(), type=ServiceConfig)

    async def submit(self, numbers: int, ms: int, **words: Any) -> str:
        """Submit a job, with further words in its task."""
        body = json.loads(document(numbers, ms))
        body["tasks"][0] |= words
        with self.api() as api:
            answer = await asyncio.to_thread(api.post, "/v1/jobs", body, {"idempotency-key": new_id()})
        job_id: str = answer["job_id"]
        return job_id

    async def types_of(self, stream_id: str, *, until_ended: bool = False) -> list[str]:
        """Return the types of a stream's events, if wanted when the job has ended."""
        async with self.reader() as reader, asyncio.timeout(WITHIN_S):
            while True:
                types = [stored.type for stored in await reader.read(0, 10_000, streams=[stream_id])]
                if not until_ended or JOB_TERMINAL & set(types):
                    return types
                await asyncio.sleep(0.05)


class Unary(NamedTuple):
    """A request, what its answer must be when it is asked again, and what must hold in the log then."""

    request: Callable[[Rig], Awaitable[Message]]
    fits: Callable[[Rig, Any], bool]
    holds: Callable[[Rig, Any, Any], Awaitable[None]] | None = None


def reading(build: Callable[[Rig], Message], fits: Callable[[Rig, Any], bool]) -> Unary:
    async def request(rig: Rig) -> Message:
        return build(rig)

    return Unary(request, fits)


def document(numbers: int, ms: int) -> bytes:
    job = yaml.safe_load((HERE / "job.yaml").read_text())
    return json.dumps({**job, "input": {"numbers": list(range(numbers)), "ms": ms}}).encode()


def tokens_of(parts: list[models_pb2.CompleteResponse]) -> list[int]:
    """Return the numbers of the tokens in pieces of a stream, each of which holds whole events."""
    body = b"".join(part.chunk or part.head.chunk for part in parts)
    found: list[int] = []
    for line in body.splitlines():
        data = line.removeprefix(b"data: ")
        if data in (b"", b"[DONE]"):
            continue
        event = json.loads(data)
        assert "error" not in event, event
        for choice in event["choices"]:
            found += map(int, (choice["delta"].get("content") or "").split())
    return found


async def submitted_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(answer.job_id, until_ended=True)
    assert (types.count("JobSubmitted"), types.count("JobSucceeded")) == (1, 1)


async def cancelled_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(request.job_id, until_ended=True)
    assert (types.count("JobCancelRequested"), types.count("JobCancelled")) == (1, 1)
