"""Calls between processes whose answers are lost after the work was done, on a running installation.

gRPC: the connection breaks, or the deadline passes, when the answer is on its way. HTTP: the same with a response,
whole or in the middle of it. The caller hears of it, asks again, and what was done is done once. The cases are held
against the contracts and the clients: a method without one fails.
"""

import asyncio
import contextlib
import json
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
import yaml
from google.protobuf.message import Message
from hive_cli.api import Api
from hive_cli.home import Home
from hive_common.bus.assertion import private_key
from hive_common.bus.jwt import claims_of, new_seed, public_nkey
from hive_common.contracts.events import JOB_TERMINAL
from hive_common.contracts.joining import proof_of
from hive_common.contracts.values import digest_of
from hive_common.eventlog.log import LogReader, Stored
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.rpc.client import bearer, call, open_channel, stream
from hive_common.testing.installation import Installation
from hive_common.testing.ports import calls_of
from hive_common.testing.proxy import TcpProxy, Whole
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess, text_of
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
    "Exchange": ("router", models_pb2_grpc.ExchangeStub),
}
"""Services of the contracts: who answers."""
INTERNAL = {"Presence", "Intake", "Exchange"}
"""Between services only; the gateway does not publish them."""
WITHHELD = {"Executors.Enrol", "Executors.Renew", "Executors.Keys"}
"""Methods of a published service that are between services only: executors come over REST."""
TASKS = 12
MODEL = "scripted"
TOKENS = 40
CALLS = 12
"""On one exchange."""
DEADLINE_S = 3.0
WITHIN_S = 60.0
ASKED_MAX = 20


class Rig:
    """The installation, a finished job and a finished model call in it, and its log."""

    def __init__(self, installation: Installation, back_end: ScriptedProcess) -> None:
        self.installation = installation
        self.back_end = back_end
        self.home = Home(installation.home)
        self.url = self.home.settings().endpoints.http
        self.job_id = ""
        self.task_id = ""
        self.executor_id = ""
        self.digest = ""
        self.signature_digest = ""
        self.head = 0
        self.events: list[int] = []
        self.calls: list[str] = []
        """Ids of model calls, as they were made here."""
        self.heard: list[int] = []
        """What has come of the stream that is listened to. gRPC goes on asking for requests of one that broke; they
        end when this is another one.
        """

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
        ((self.digest, self.signature_digest),) = [
            (one["digest"], one["signature"]) for one in found if one["name"] == "spin"
        ]
        with self.api() as api:
            page = await asyncio.to_thread(
                lambda: list(api.pages(f"/v1/jobs/{self.job_id}/events", "events", "from"))
            )
        self.events = [event["position"] for event in page]
        assert len(self.events) > 4 * TASKS
        await self.until(self._serves_the_model, "the model can be called")
        async with self.owner("Models") as (models, metadata):
            answer = [part async for part in stream(models.Complete(self.completion(), metadata=metadata))]
        assert tokens_of(answer) == list(range(TOKENS))

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


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Installation, ScriptedProcess]]:
    """An installation with a model; others that are shared have none."""
    folder = Path(tempfile.mkdtemp(prefix="hive-answers-"))
    installation = Installation(folder / "home")
    try:
        with ScriptedProcess(folder, Script(models=(ScriptedModel(name=MODEL),), tokens=TOKENS)) as back_end:
            installation.hive("init", "--free-ports", "--executors", "2")
            installation.hive("up", "--detach", "--model-url", back_end.url)
            yield installation, back_end
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
async def rig(served: tuple[Installation, ScriptedProcess]) -> Rig:
    made = Rig(*served)
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
    return agents_pb2.PushRequest(
        manifest_digest=rig.digest, signature_digest=rig.signature_digest, caller="somebody"
    )


async def published_once(rig: Rig, request: Any, answer: Any) -> None:
    async with rig.reader() as reader:
        events = await reader.read(0, 1000, types=["AgentVersionPublished"])
    assert [json.loads(event.payload or b"{}")["digest"] for event in events].count(rig.digest) == 1


async def yank_request(rig: Rig) -> Message:
    """Of a version that was published for this: yanked is for ever."""
    folder = Path(tempfile.mkdtemp(dir=rig.home.root))
    shutil.copytree(HERE / "agents" / "spin", folder, dirs_exist_ok=True)
    manifest, version = folder / "manifest.yaml", f"2.0.{secrets.randbelow(10**8)}"
    manifest.write_text(manifest.read_text().replace("version: 1.0.0", f"version: {version}"))
    await asyncio.to_thread(rig.installation.hive, "agent", "push", str(folder))
    return agents_pb2.YankRequest(name="spin", version=version, reason="it leaks", caller="somebody")


async def yanked_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.yank_reason == "it leaks"
    stream = derive_id("agent", "default", request.name, request.version)
    assert await rig.types_of(stream) == ["AgentVersionPublished", "AgentVersionYanked"]


async def trust_request(rig: Rig) -> Message:
    key = secrets.token_hex(32)
    return agents_pb2.TrustRequest(public_key=key, name=f"k{key[:16]}", caller="somebody")


async def trusted_once(rig: Rig, request: Any, answer: Any) -> None:
    assert await rig.types_of(derive_id("signer", "default", request.public_key)) == ["SigningKeyTrusted"]


async def distrust_request(rig: Rig) -> Message:
    request = await trust_request(rig)
    async with rig.owner("Agents") as (agents, metadata):
        await call(agents.Trust(request, metadata=metadata))
    return agents_pb2.DistrustRequest(key=request.public_key, reason="lost", caller="somebody")


async def distrusted_once(rig: Rig, request: Any, answer: Any) -> None:
    types = await rig.types_of(derive_id("signer", "default", request.key))
    assert types == ["SigningKeyTrusted", "SigningKeyDistrusted"]


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


async def revoke_request(rig: Rig) -> Message:
    """Of an executor that joined for this: revoked is for ever."""
    async with rig.owner("Executors") as (executors, metadata):
        guest = await call(executors.Enrol(await enrol_request(rig), metadata=metadata))
    return executors_pb2.RevokeRequest(executor_id=guest.executor_id, reason="lost", caller="somebody")


async def revoked_once(rig: Rig, request: Any, answer: Any) -> None:
    assert answer.executor_id == request.executor_id
    assert await rig.types_of(request.executor_id) == ["ExecutorEnrolled", "ExecutorRevoked"]


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
    "Executors.Keys": reading(
        lambda rig: executors_pb2.KeysRequest(executor_ids=[rig.executor_id, new_id()]),
        lambda rig, answer: [(key.executor_id, key.revoked) for key in answer.keys] == [(rig.executor_id, False)],
    ),
    "Presence.List": reading(
        lambda rig: executors_pb2.PresenceRequest(),
        lambda rig, answer: rig.executor_id in {one.executor_id for one in answer.executors},
    ),
    "Agents.Push": Unary(push_request, lambda rig, answer: answer.digest == rig.digest, published_once),
    "Agents.Yank": Unary(yank_request, lambda rig, answer: answer.yanked_us > 0, yanked_once),
    "Agents.Trust": Unary(trust_request, lambda rig, answer: answer.trusted, trusted_once),
    "Agents.Distrust": Unary(distrust_request, lambda rig, answer: not answer.trusted, distrusted_once),
    "Agents.Signers": reading(
        lambda rig: agents_pb2.SignersRequest(),
        lambda rig, answer: ("author", True) in {(key.name, key.trusted) for key in answer.keys},
    ),
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
    "Models.List": reading(
        lambda rig: models_pb2.ListRequest(), lambda rig, answer: MODEL in {model.name for model in answer.models}
    ),
    "Models.Explain": reading(
        lambda rig: models_pb2.ExplainRequest(call_id=rig.calls[0]),
        lambda rig, answer: (answer.call_id, answer.outcome) == (rig.calls[0], "succeeded"),
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


# --- gRPC, streams ---


class Streamed(NamedTuple):
    """The request after what has come so far, or requests, and the positions that an item of the stream brings.

    `ended` says when the last of it is on its way; `holds` is what must hold in the log at last.
    """

    request: Callable[[Rig, list[int]], Message | AsyncIterator[Message]]
    positions: Callable[[Any], list[int]]
    whole: Callable[[Rig], list[int]]
    resumes: bool = True
    ended: bytes | Whole = grpc_answered
    holds: Callable[[Rig], Awaitable[None]] | None = None


def exported(chunk: Any) -> list[int]:
    lines = [json.loads(line) for line in chunk.lines.splitlines()]
    return [json.loads(line["event"])["position"] for line in lines if "event" in line]


async def exchanged(rig: Rig, seen: list[int]) -> AsyncIterator[Message]:
    """Yield the calls that have no answer yet, each after the answer to the one before."""
    while len(seen) < CALLS:
        answered = len(seen)
        call_made = rig.completion(streams=False)
        yield models_pb2.ExchangeRequest(call=call_made, deadline_ms=int(WITHIN_S * 1000))
        while len(seen) == answered:
            if rig.heard is not seen:
                return
            await asyncio.sleep(0.005)


def answered_calls(message: Any) -> list[int]:
    assert message.last and not message.error_json, message
    (choice,) = json.loads(message.part.head.chunk)["choices"]
    assert choice["message"]["content"] == text_of(TOKENS)
    return [1]


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
    "Exchange.Calls": Streamed(
        exchanged,
        answered_calls,
        lambda rig: [1] * CALLS,
        ended=b'"usage"',
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
                proxy.cut_next_answer(case.ended)
                if after_bytes is None
                else proxy.cut_inside_next_answer(after_bytes)
            )
            while True:
                rig.heard = seen
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
@pytest.mark.parametrize(("name", "door"), through_doors("Models.Complete", "Exchange.Calls"))
async def test_a_model_call_whose_connection_breaks_ends_its_generation(rig: Rig, name: str, door: str) -> None:
    async def generates(count: int) -> bool:
        return (await rig.generations())[1] == count

    async def is_recorded() -> bool:
        return bool(await rig.records(call_id))

    async with reached(rig, name, door) as (proxy, method, metadata):
        seen: list[int] = []
        rig.heard = seen
        pending = method(STREAMED[name].request(rig, seen), metadata=metadata, timeout=10 * WITHIN_S)
        heard = asyncio.create_task(hear_out(pending))
        await rig.until(lambda: generates(1), "the call is being answered")
        call_id = rig.calls[-1]
        assert await rig.records(call_id) == []
        proxy.cut_all()
        with pytest.raises(Unavailable):
            await heard
        rig.heard = []
        await rig.until(lambda: generates(0), "the generation has ended")
        await rig.until(is_recorded, "the call is recorded")
    (record,) = await rig.records(call_id)
    assert json.loads(record.payload or b"{}")["code"] == "cancelled"


async def hear_out(pending: Any) -> None:
    async for _ in stream(pending):
        pass


# --- HTTP ---


@pytest.fixture
async def door(rig: Rig) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(int(rig.url.rpartition(":")[2])) as proxy:
        yield proxy


class ThroughDoor:
    """An `Api` whose connections go through a proxy."""

    def __init__(self, rig: Rig, proxy: TcpProxy) -> None:
        self.proxy = proxy
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


async def api_answer_events(rig: Rig, api: ThroughDoor) -> None:
    """Nothing is sent again by itself: it says Unavailable, at whichever point it broke; another call is whole."""
    said = new_id()
    seen: list[str] = []

    def ask() -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": said}], "stream": True}
        seen.clear()
        with api.api.answer_events("/v1/chat/completions", body) as (_, events):
            seen.extend(event.data for event in events)

    async def recorded(count: int) -> bool:
        payloads = [record.payload or b"" for record in await rig.records()]
        found = sum(said.encode() in payload for payload in payloads)
        assert found <= count, "it was sent again"
        return found == count

    with pytest.raises(Unavailable):
        await asyncio.to_thread(ask)
    assert seen == []
    await rig.until(lambda: recorded(1), "the call whose answer was lost is recorded")
    cut = api.proxy.cut_inside_next_answer(2_000)
    with pytest.raises(Unavailable):
        await asyncio.to_thread(ask)
    assert cut.is_set() and seen and "[DONE]" not in seen
    await rig.until(lambda: recorded(2), "the call whose answer broke off is recorded")
    await asyncio.to_thread(ask)
    assert seen[-1] == "[DONE]"
    deltas = [choice["delta"] for data in seen[:-1] for choice in json.loads(data)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == text_of(TOKENS)
    await rig.until(lambda: recorded(3), "the call that was answered is recorded")


API: dict[str, Callable[[Rig, ThroughDoor], Awaitable[None]]] = {
    "get": api_get,
    "post": api_post,
    "delete": api_delete,
    "pages": api_pages,
    "get_blob": api_get_blob,
    "put_blob": api_put_blob,
    "download": api_download,
    "events": api_events,
    "answer_events": api_answer_events,
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
