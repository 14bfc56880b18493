"""A scheduler and a registry on real servers, and executors that speak their protocol, honest ones and others."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import hive_registry.bootstrap
import hive_scheduler.bootstrap
import msgspec
from hive_common.artifacts.manifest import AgentManifest, Resources, manifest_json
from hive_common.bus import nats as bus
from hive_common.bus.jwt import credentials_text, new_seed, public_nkey
from hive_common.contracts import events, messages, values
from hive_common.contracts.events import AgentVersionPublished, Capabilities, SigningKeyTrusted
from hive_common.contracts.messages import (
    Assignment,
    AttemptKey,
    AttemptReport,
    HelloReply,
    HelloRequest,
    PullReply,
    PullRequest,
    ReportReply,
    ReportRequest,
)
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.kernel.errors import HiveError
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import NatsConfig
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.services import key_of, running_service, service_config
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from nats.aio.client import Client

CAPABILITIES = Capabilities("linux", "x86_64", 4, 8 << 30, 4, ("python",))
ANSWER_S = 20.0
AGENT = AgentManifest(
    name="double",
    version="1.0.0",
    runtime="python",
    entry="agent.py",
    output={"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}},
    resources=Resources(timeout_ms=1_000),
)


def double(assignment: Assignment) -> dict[str, Any]:
    """What the agent does."""
    assert assignment.input.raw is not None
    return {"n": 2 * msgspec.json.decode(assignment.input.raw)["n"]}


class Executor:
    """One executor with credentials of its own. Whether it keeps to the protocol is up to the test."""

    def __init__(self, executor: str, config: NatsConfig, name: str) -> None:
        self.id = executor
        self.config = config
        self.name = name
        self.session = new_id()
        self.sequence = 0
        self.refused: list[str] = []
        """What the server said about what it may not."""
        self.client: Client
        self._working: asyncio.Task[None] | None = None

    async def connect(self) -> Self:
        """Connect and say hello."""
        self.client = await bus.connect(self.config, self.id, inbox=messages.inbox_prefix(self.id))

        async def note(error: Exception) -> None:
            self.refused.append(str(error).lower())

        self.client._error_cb = note
        body = HelloRequest(name=self.name, session=self.session, capabilities=CAPABILITIES)
        hello = messages.hello_subject(self.id)
        reply = await bus.request(self.client, hello, body, HelloReply, ANSWER_S)
        assert reply.error is None, reply
        return self

    async def close(self) -> None:
        """Stop, without a word to the control plane."""
        await self.stop_working()
        await self.client.close()

    async def pull(self, slots_free: int = 0, held: tuple[AttemptKey, ...] = (), kill_epoch: int = 0) -> PullReply:
        """Pull once, as this executor."""
        self.sequence += 1
        body = PullRequest(
            session=self.session,
            sequence=self.sequence,
            slots_free=slots_free,
            memory_free_bytes=8 << 30,
            held=held,
            kill_epoch=kill_epoch,
        )
        return await bus.request(self.client, messages.pull_subject(self.id), body, PullReply, ANSWER_S)

    async def assigned(self) -> Assignment:
        """Pull until there is something to do."""
        while True:
            reply = await self.pull(1)
            if reply.assignments:
                return reply.assignments[0]
            await asyncio.sleep(0.02 if reply.unknown or reply.error else 0)

    def outcome(self, assignment: Assignment, output: Any, **changes: Any) -> AttemptReport:
        """Return a report of success."""
        report = AttemptReport(
            task=assignment.task,
            attempt=assignment.attempt,
            session=self.session,
            status="succeeded",
            output=values.inline(values.encode_json(output)),
        )
        return msgspec.structs.replace(report, **changes)

    async def report(self, *reports: AttemptReport) -> list[str]:
        """Report, and return the verdicts."""
        body = ReportRequest(session=self.session, reports=reports)
        subject = messages.report_subject(self.id)
        reply = await bus.request(self.client, subject, body, ReportReply, ANSWER_S)
        assert reply.error is None, reply
        return [result.verdict for result in reply.results]

    def work(self, agent: Callable[[Assignment], Any] = double) -> None:
        """Do honestly what is assigned, from now on."""
        self._working = asyncio.create_task(self._work(agent))

    async def stop_working(self) -> None:
        """Pull no more. Raises what ended the work before this did."""
        working, self._working = self._working, None
        if working is not None:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working

    async def _work(self, agent: Callable[[Assignment], Any]) -> None:
        while True:
            try:
                reply = await self.pull(4)
                if reply.unknown or reply.error is not None:
                    await asyncio.sleep(0.02)
                if reply.assignments:
                    await self.report(*(self.outcome(one, agent(one)) for one in reply.assignments))
            except HiveError:
                await asyncio.sleep(0.02)


class Plane:
    """The control plane, and what a user does with it."""

    def __init__(self, database: Database, nats: NatsServer, folder: Path, kill_public_key: str = "") -> None:
        self._database = database
        self._kill_public_key = kill_public_key
        self.registry: Any = None
        self.registry_key: Any = None
        self.nats = nats
        self.folder = folder
        self.executors: dict[str, Executor] = {}
        self._jobs: Any = None
        self._key: Any = None

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncIterator[Self]:
        """Run it, with an executor of each name, connected and enrolled."""
        async with AsyncExitStack() as stack:
            await self._publish()
            locals_ = [self._made(name) for name in names]
            extra = {"blobs_url": "http://127.0.0.1:1", "local_executors": locals_}
            made = partial(service_config, kill_public_key=self._kill_public_key)
            registry = made("registry", self._database, self.nats, self.folder, extra=extra)
            scheduler = made("scheduler", self._database, self.nats, self.folder)
            self.registry = await stack.enter_async_context(running_service(hive_registry.bootstrap.main, registry))
            self.registry_key = key_of(registry)
            channel = await stack.enter_async_context(running_service(hive_scheduler.bootstrap.main, scheduler))
            self._jobs, self._key = jobs_pb2_grpc.JobsStub(channel), key_of(scheduler)
            for executor in self.executors.values():
                await executor.connect()
                stack.push_async_callback(executor.close)
            yield self

    def _made(self, name: str) -> dict[str, str]:
        executor, seed = new_id(), new_seed("user")
        file = self.folder / f"{name}.creds"
        file.touch(mode=0o600)
        file.write_text(credentials_text(self.nats.issuer.authority.executor(executor, seed, int(time.time()))))
        self.executors[name] = Executor(executor, NatsConfig(self.nats.url, str(file)), name)
        return {"id": executor, "name": name, "public_key": public_nkey(seed)}

    async def _publish(self) -> None:
        raw = manifest_json(AGENT)
        digest, author = values.digest_of(raw), "a0" * 32
        signed = {"signer": author, "signature": digest}
        happened = {
            derive_id("signer", "default", author): SigningKeyTrusted(author, "author"),
            derive_id("agent", "default", AGENT.name, AGENT.version): AgentVersionPublished(
                AGENT.name, AGENT.version, digest, msgspec.Raw(raw), **signed
            ),
        }
        new = tuple(
            NewEvent(stream, 1, type(event).__name__, 1, events.encode(event), 1, "registry", new_id())
            for stream, event in happened.items()
        )
        async with await LogWriter.open(self._database.role_dsn("registry")) as writer:
            await writer.append(Append(new))

    @property
    def dsn(self) -> str:
        """Return how to reach the database."""
        return self._database.dsn

    async def submit(self, n: int = 1, max_attempts: int = 1, timeout: str = "") -> str:
        """Submit a job of one task, and return its id."""
        retry = {"max_attempts": max_attempts, "backoff": "1ms"}
        limits = {"timeout": timeout} if timeout else {}
        document = {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "job",
            "tasks": [{"id": "one", "agent": AGENT.reference, "input": {"n": n}, "retry": retry, **limits}],
            "output": "${tasks.one.output}",
        }
        request = jobs_pb2.SubmitRequest(document_json=msgspec.json.encode(document), caller="me")
        response = await call(self._jobs.Submit(request, metadata=self._key, timeout=ANSWER_S))
        job: str = response.job_id
        return job

    async def finished(self, job: str) -> jobs_pb2.Job:
        """Wait for the end of a job."""
        request = jobs_pb2.WatchRequest(job_id=job)
        seen = [event async for event in self._jobs.Watch(request, metadata=self._key, timeout=60)]
        get = jobs_pb2.GetRequest(job_id=job, min_position=seen[-1].position)
        found: jobs_pb2.Job = await call(self._jobs.Get(get, metadata=self._key, timeout=ANSWER_S))
        return found

    async def history(self, job: str) -> list[tuple[str, events.Event]]:
        """Return what the log holds of a job and its tasks: the stream and the event."""
        async with LogReader(self._database.dsn) as reader:
            found = await reader.read(0, 10_000)
        return [
            (one.stream, events.decode(one.type, one.schema, one.payload))
            for one in found
            if one.correlation == job and one.payload is not None
        ]
