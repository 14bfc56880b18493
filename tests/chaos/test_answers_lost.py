"""Calls between processes whose answers are lost after the work was done, on a running installation.

gRPC: the connection breaks, or the deadline passes, when the answer is on its way. HTTP: the same with a response,
whole or in the middle of it. The caller hears of it, asks again, and what was done is done once. The cases are held
against the contracts and the clients: a method without one fails.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
import yaml
from google.protobuf.message import Message
from hive_cli.api import Api
from hive_cli.home import Home
from hive_common.contracts.events import JOB_TERMINAL
from hive_common.contracts.values import digest_of
from hive_common.eventlog.log import LogReader
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.rpc.client import bearer, call, open_channel, stream
from hive_common.testing.installation import Installation
from hive_common.testing.ports import calls_of
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.wire import grpc_answered, http_answered
from hive_executor.blobs import BlobClient, FolderCache
from hive_executor.gateway import Gateway
from hive_proto.agents.v1 import agents_pb2, agents_pb2_grpc
from hive_proto.audit.v1 import audit_pb2, audit_pb2_grpc
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

HERE = Path(__file__).parent
CONTRACTS = (agents_pb2, audit_pb2, executors_pb2, jobs_pb2, models_pb2)
STUBS: dict[str, tuple[str, Any]] = {
    "Agents": ("registry", agents_pb2_grpc.AgentsStub),
    "Executors": ("registry", executors_pb2_grpc.ExecutorsStub),
    "Presence": ("scheduler", executors_pb2_grpc.PresenceStub),
    "Jobs": ("scheduler", jobs_pb2_grpc.JobsStub),
    "Intake": ("scheduler", jobs_pb2_grpc.IntakeStub),
    "Audit": ("audit", audit_pb2_grpc.AuditStub),
    "Models": ("router", models_pb2_grpc.ModelsStub),
}
"""Services of the contracts: who answers."""
INTERNAL = {"Presence", "Intake"}
"""Between services only; the gateway does not publish them."""
TASKS = 12
DEADLINE_S = 3.0
WITHIN_S = 60.0
ASKED_MAX = 20


class Rig:
    """The installation, a finished job in it, and its log."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.home = Home(installation.home)
        self.url = self.home.settings().endpoints.http
        self.job_id = ""
        self.task_id = ""
        self.executor_id = ""
        self.digest = ""
        self.head = 0
        self.events: list[int] = []

    async def prepare(self) -> None:
        await asyncio.to_thread(self.installation.hive, "agent", "push", str(HERE / "agents" / "spin"))
        self.job_id = await self.submit(TASKS, 1)
        await self.types_of(self.job_id, until_ended=True)
        async with self.reader() as reader:
            created = await reader.read(0, 10_000, types=["TaskCreated"])
            (self.task_id, *_) = [e.stream for e in created if json.loads(e.payload or b"{}")["job"] == self.job_id]
            (registered, *_) = await reader.read(0, 1, types=["ExecutorRegistered"])
            published = await reader.read(0, 1000, types=["AgentVersionPublished"])
            self.head = await reader.head()
        self.executor_id = registered.stream
        found = [json.loads(event.payload or b"{}") for event in published]
        (self.digest,) = [one["digest"] for one in found if one["name"] == "spin"]
        with self.api() as api:
            page = await asyncio.to_thread(
                lambda: list(api.pages(f"/v1/jobs/{self.job_id}/events", "events", "from"))
            )
        self.events = [event["position"] for event in page]
        assert len(self.events) > 4 * TASKS

    def reader(self) -> LogReader:
        return LogReader(self.installation.admin_dsn())

    def api(self) -> Api:
        return Api(self.home)

    def config(self, service: str) -> ServiceConfig:
        return msgspec.json.decode(self.home.config_file(service).read_bytes(), type=ServiceConfig)

    async def submit(self, numbers: int, ms: int) -> str:
        body = json.loads(document(numbers, ms))
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


def document(numbers: int, ms: int) -> bytes:
    job = yaml.safe_load((HERE / "job.yaml").read_text())
    return json.dumps({**job, "input": {"numbers": list(range(numbers)), "ms": ms}}).encode()


@pytest.fixture(scope="module")
async def rig(hive_home: Installation) -> Rig:
    made = Rig(hive_home)
    await made.prepare()
    return made


# --- gRPC, unary ---


class Unary(NamedTuple):
    """A request, what its answer must be when it is asked again, and what must hold in the log then."""

    request: Callable[[Rig], Awaitable[Message]]
    fits: Callable[[Rig, Any], bool]
    holds: Callable[[Rig, Any, Any], Awaitable[None]] | None = None


def reading(build: Callable[[Rig], Message], fits: Callable[[Rig, Any], bool]) -> Unary:
    async def request(rig: Rig) -> Message:
        return build(rig)

    return Unary(request, fits)


async def submit_request(rig: Rig) -> Message:
    return jobs_pb2.SubmitRequest(document_json=document(2, 1), idempotency_key=new_id(), caller="somebody")


async def submitted_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(answer.job_id, until_ended=True)
    assert (types.count("JobSubmitted"), types.count("JobSucceeded")) == (1, 1)


async def submit_many_request(rig: Rig) -> Message:
    return jobs_pb2.SubmitManyRequest(submits=[await submit_request(rig) for _ in range(3)])


async def each_submitted_once(rig: Rig, request: Any, answer: Any) -> None:
    assert len({result.taken.job_id for result in answer.results}) == 3
    for result in answer.results:
        await submitted_once(rig, None, result.taken)


async def cancel_request(rig: Rig) -> Message:
    return jobs_pb2.CancelRequest(job_id=await rig.submit(2, 50_000), reason="enough", caller="somebody")


async def cancelled_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(request.job_id, until_ended=True)
    assert (types.count("JobCancelRequested"), types.count("JobCancelled")) == (1, 1)


async def push_request(rig: Rig) -> Message:
    return agents_pb2.PushRequest(manifest_digest=rig.digest, caller="somebody")


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


UNARY: dict[str, Unary] = {
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
    "Executors.List": reading(
        lambda rig: executors_pb2.ListRequest(),
        lambda rig, answer: rig.executor_id in {one.executor_id for one in answer.executors},
    ),
    "Executors.Get": reading(
        lambda rig: executors_pb2.GetRequest(executor_id=rig.executor_id),
        lambda rig, answer: answer.executor_id == rig.executor_id,
    ),
    "Executors.Drain": Unary(drain_request, lambda rig, answer: answer.state == "drained", drained_once),
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
    "Models.List": reading(lambda rig: models_pb2.ListRequest(), lambda rig, answer: answer.IsInitialized()),
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


DOORS = [
    (name, door)
    for name in UNARY
    for door in ("service", "gateway")
    if door == "service" or name.partition(".")[0] not in INTERNAL
]


@pytest.mark.parametrize(("name", "door"), DOORS)
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


# --- gRPC, streams ---


class Streamed(NamedTuple):
    """The request after what has come so far, and the positions that an item of the stream brings."""

    request: Callable[[Rig, list[int]], Message]
    positions: Callable[[Any], list[int]]
    whole: Callable[[Rig], list[int]]
    resumes: bool = True


def exported(chunk: Any) -> list[int]:
    lines = [json.loads(line) for line in chunk.lines.splitlines()]
    return [json.loads(line["event"])["position"] for line in lines if "event" in line]


STREAMED: dict[str, Streamed] = {
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


@pytest.mark.parametrize("door", ["service", "gateway"])
@pytest.mark.parametrize("name", STREAMED)
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
                    if not case.resumes:
                        seen = []
                    continue
                break
            assert broken, "the stream ended as if nothing had happened"
            assert seen == case.whole(rig)


# --- HTTP ---


@pytest.fixture
async def door(rig: Rig) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(int(rig.url.rpartition(":")[2])) as proxy:
        yield proxy


class ThroughDoor:
    """An `Api` whose connections go through a proxy."""

    def __init__(self, rig: Rig, proxy: TcpProxy) -> None:
        self.api = rig.api()
        self.api._client.base_url = httpx.URL(f"http://127.0.0.1:{proxy.port}")

    async def __call__(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(getattr(self.api, method), *args)


async def api_get(rig: Rig, api: ThroughDoor) -> None:
    assert (await api("get", f"/v1/jobs/{rig.job_id}"))["state"] == "succeeded"


async def api_post(rig: Rig, api: ThroughDoor) -> None:
    answer = await api("post", "/v1/jobs", json.loads(document(2, 1)), {"idempotency-key": new_id()})
    assert answer["existed"]
    await submitted_once(rig, None, jobs_pb2.SubmitResponse(job_id=answer["job_id"]))


async def api_delete(rig: Rig, api: ThroughDoor) -> None:
    job_id = await rig.submit(2, 50_000)
    await api("delete", f"/v1/jobs/{job_id}")
    await cancelled_once(rig, jobs_pb2.CancelRequest(job_id=job_id), None)


async def api_pages(rig: Rig, api: ThroughDoor) -> None:
    found = await asyncio.to_thread(lambda: list(api.api.pages(f"/v1/jobs/{rig.job_id}/events", "events", "from")))
    assert [event["position"] for event in found] == rig.events


async def api_get_blob(rig: Rig, api: ThroughDoor) -> None:
    assert digest_of(await api("get_blob", rig.digest)) == rig.digest


async def api_put_blob(rig: Rig, api: ThroughDoor) -> None:
    data = new_id().encode() * 1000
    await api("put_blob", data, digest_of(data))
    assert await api("get_blob", digest_of(data)) == data


async def api_download(rig: Rig, api: ThroughDoor) -> None:
    """Nothing is resumed: it says Unavailable, and another download is whole."""

    def download() -> list[dict[str, Any]]:
        with api.api.download("/v1/audit/export") as chunks:
            return [json.loads(line) for line in b"".join(chunks).splitlines()]

    with pytest.raises(Unavailable):
        await asyncio.to_thread(download)
    *lines, trailer = await asyncio.to_thread(download)
    assert trailer["count"] == len(lines) - 1 >= rig.head


async def api_events(rig: Rig, api: ThroughDoor) -> None:
    path = f"/v1/jobs/{rig.job_id}/stream"
    found = await asyncio.to_thread(lambda: list(api.api.events(path)))
    assert [int(event.id) for event in found] == rig.events


API: dict[str, Callable[[Rig, ThroughDoor], Awaitable[None]]] = {
    "get": api_get,
    "post": api_post,
    "delete": api_delete,
    "pages": api_pages,
    "get_blob": api_get_blob,
    "put_blob": api_put_blob,
    "download": api_download,
    "events": api_events,
}


def test_every_call_of_the_command_line_has_a_case() -> None:
    assert API.keys() == {name for name, found in vars(Api).items() if callable(found) and name[0] != "_"}


@pytest.mark.parametrize("name", API)
async def test_a_response_to_the_command_line_is_lost(rig: Rig, door: TcpProxy, name: str) -> None:
    api = ThroughDoor(rig, door)
    # An upload asks first whether the blob is there; that answer has no body.
    for until, skip in ((b"\r\n\r\n", 0), (http_answered, 1)) if name == "put_blob" else ((http_answered, 0),):
        cut = door.cut_next_answer(until, skip=skip)
        await API[name](rig, api)
        assert cut.is_set()


def blob_client(rig: Rig, door: TcpProxy, folder: Path) -> tuple[BlobClient, Gateway]:
    cache = FolderCache(folder, 1 << 20)
    header = {"Authorization": f"Bearer {rig.home.api_key()}"}
    gateway = Gateway(lambda: f"http://127.0.0.1:{door.port}", lambda: header)
    return BlobClient(gateway, cache, 60_000), gateway


async def blob_store(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """The response to the upload is lost: it is sent again, and is there."""
    data = new_id().encode() * 10_000
    client, gateway = blob_client(rig, door, folder)
    cut = door.cut_next_answer(http_answered)
    assert await client.store(data) == digest_of(data)
    assert cut.is_set() and door.connections == 2
    assert await client.fetch(digest_of(data)) == data
    await client.close()
    await gateway.close()


async def blob_fetch(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """Lost whole, in its head, in its body and at its last byte: what is kept is whole."""
    data = new_id().encode() * 10_000
    client, gateway = blob_client(rig, door, folder)
    await client.store(data)
    for lose in (
        lambda: door.cut_next_answer(http_answered),
        lambda: door.cut_inside_next_answer(10),
        lambda: door.cut_inside_next_answer(len(data) // 2),
        lambda: door.cut_inside_next_answer(len(data)),
    ):
        for kept in folder.iterdir():
            kept.unlink()
        cut = lose()
        assert await client.fetch(digest_of(data)) == data
        assert cut.is_set()
        assert [kept.read_bytes() for kept in folder.iterdir()] == [data]
    await client.close()
    await gateway.close()


async def blob_close(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """Closing asks for nothing that could be lost."""
    client, gateway = blob_client(rig, door, folder)
    await client.fetch(rig.digest)
    cut = door.cut_next_answer()
    await client.close()
    await gateway.close()
    assert not cut.is_set()


BLOBS = {"store": blob_store, "fetch": blob_fetch, "close": blob_close}


def test_every_call_of_an_executor_for_blobs_has_a_case() -> None:
    assert BLOBS.keys() == calls_of(BlobClient)


@pytest.mark.parametrize("name", BLOBS)
async def test_a_response_to_an_executor_is_lost(rig: Rig, door: TcpProxy, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    await BLOBS[name](rig, door, folder)
