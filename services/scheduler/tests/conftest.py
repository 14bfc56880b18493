"""A whole scheduler on real Postgres and NATS, and an executor that speaks its protocol and runs a script."""

import asyncio
import contextlib
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.artifacts.manifest import AgentManifest, manifest_json
from hive_common.bus import nats as bus
from hive_common.contracts import events, messages, values
from hive_common.contracts.events import (
    AgentVersionPublished,
    AgentVersionYanked,
    Capabilities,
    ExecutorEnrolled,
    ExecutorRegistered,
    PermissionGranted,
    PermissionRevoked,
    SigningKeyDistrusted,
    SigningKeyTrusted,
)
from hive_common.contracts.messages import (
    Assignment,
    AttemptKey,
    AttemptReport,
    PullReply,
    PullRequest,
    ReportReply,
    ReportRequest,
)
from hive_common.control.kill_log import stream_of
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent, Stored
from hive_common.kernel.errors import HiveError
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import PostgresConfig, ServiceConfig, write_config
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_common.permissions import named
from hive_common.permissions.grants import Grant
from hive_common.rpc.client import bearer, call, open_channel
from hive_common.testing.fixtures import Database
from hive_common.testing.kills import KillKey
from hive_common.testing.nats import EmbeddedNats
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from hive_scheduler.bootstrap import main
from psycopg.conninfo import conninfo_to_dict

OWNER = derive_id("owner")
KEY = "a-key-of-this-test"
TOKEN_KEY = "5a" * 32
REQUEST_S = 20.0
AUTHOR = "a0" * 32
"""The key that signed what `Cluster.publish` publishes."""


class Control:
    """A scheduler that runs in this process, and what a client needs to talk to it."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.stop = Stop()
        self._task: asyncio.Task[None] | None = None
        self.channel = open_channel(f"127.0.0.1:{config.grpc_port}")
        self.jobs: Any = jobs_pb2_grpc.JobsStub(self.channel)

    async def start(self, wait: bool = True) -> None:
        self.stop = Stop()
        self._task = asyncio.create_task(main(self.config, self.stop))
        if wait:
            await self.ready()

    def assert_alive(self) -> None:
        assert self._task is None or not self._task.done(), self._task.exception()

    async def ready(self) -> None:
        while True:
            self.assert_alive()
            with contextlib.suppress(HiveError):
                await call(self.jobs.List(jobs_pb2.ListRequest(limit=1), metadata=bearer(KEY), timeout=2))
                return
            await asyncio.sleep(0.02)

    async def shut_down(self) -> None:
        self.stop.set("test")
        if self._task is not None:
            await self._task
            self._task = None

    async def close(self) -> None:
        await self.shut_down()
        await self.channel.close()

    async def submit(self, document: dict[str, Any], **fields: Any) -> str:
        return (await self.submit_full(document, **fields)).job_id

    async def submit_full(
        self, document: dict[str, Any], metadata: tuple[Any, ...] = (), **fields: Any
    ) -> jobs_pb2.SubmitResponse:
        request = jobs_pb2.SubmitRequest(document_json=msgspec.json.encode(document), caller="me", **fields)
        return await call(self.jobs.Submit(request, metadata=(*bearer(KEY), *metadata), timeout=REQUEST_S))

    async def watch(self, job_id: str, from_position: int = 0) -> list[jobs_pb2.JobEvent]:
        """Return every event of a job; ends when the job has."""
        request = jobs_pb2.WatchRequest(job_id=job_id, from_position=from_position)
        return [event async for event in self.jobs.Watch(request, metadata=bearer(KEY), timeout=60)]

    async def watch_batches(self, job_id: str) -> list[list[jobs_pb2.JobEvent]]:
        """Return every event of a job in the messages in which they came; ends when the job has."""
        batches = self.jobs.WatchBatches(jobs_pb2.WatchRequest(job_id=job_id), metadata=bearer(KEY), timeout=60)
        return [list(batch.events) async for batch in batches]

    async def get(self, job_id: str, min_position: int = 0) -> jobs_pb2.Job:
        request = jobs_pb2.GetRequest(job_id=job_id, min_position=min_position)
        return await call(self.jobs.Get(request, metadata=bearer(KEY), timeout=REQUEST_S))

    async def finish(self, job_id: str) -> jobs_pb2.Job:
        """Wait for the end of a job and return it."""
        seen = await self.watch(job_id)
        return await self.get(job_id, seen[-1].position)

    async def rpc(self, method: str, request: Any) -> Any:
        return await call(getattr(self.jobs, method)(request, metadata=bearer(KEY), timeout=REQUEST_S))


class ControlProcess(Control):
    """A scheduler in a process of its own, which can be killed and stopped for real."""

    def __init__(self, config: ServiceConfig, folder: Path) -> None:
        super().__init__(config)
        self.file = folder / f"scheduler-{config.grpc_port}.json"
        write_config(self.file, config)
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0

    async def start(self, wait: bool = True) -> None:
        command = (sys.executable, "-m", "hive_scheduler", "--config", str(self.file))
        with self.file.with_suffix(".log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        if wait:
            await self.ready()

    def assert_alive(self) -> None:
        assert self.process is not None
        assert self.process.returncode is None, self.file.with_suffix(".log").read_text()[-2000:]

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def crash(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        await self.process.wait()

    async def supervise(self) -> None:
        """Start it again whenever it ends, as the supervisor does."""
        while True:
            await self.start(wait=False)
            assert self.process is not None
            await self.process.wait()
            self.restarts += 1

    async def shut_down(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.send(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                raise


def succeeded(assignment: Assignment, session: str, output: Any) -> AttemptReport:
    raw = values.encode_json(output)
    return AttemptReport(
        task=assignment.task,
        attempt=assignment.attempt,
        session=session,
        status="succeeded",
        output=values.inline(raw),
    )


def failed(assignment: Assignment, session: str, code: str, message: str = "") -> AttemptReport:
    return AttemptReport(
        task=assignment.task,
        attempt=assignment.attempt,
        session=session,
        status="failed",
        code=code,
        message=message,
    )


class FakeExecutor:
    """Speaks the executor's side of the protocol; agents are Python functions by name.

    A function gets the assignment and its decoded input, and returns an output, raises `Failure`, or is a
    coroutine function that does.
    """

    def __init__(self, client: Any, executor: str, agents: dict[str, Callable[..., Any]], slots: int = 4) -> None:
        self.client = client
        self.id = executor
        self.agents = agents
        self.slots = slots
        self.session = secrets.token_hex(8)
        self.sequence = 0
        self.held: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.spool: dict[tuple[str, int], AttemptReport] = {}
        self.ran: list[tuple[str, int]] = []
        self.replies: list[PullReply] = []
        self.results: list[messages.ReportResult] = []
        self.superseded = False
        self.reporting = True
        self._wake = asyncio.Event()
        self._freed = asyncio.Event()
        self._new_leader = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._loops = [asyncio.create_task(self._pull_loop()), asyncio.create_task(self._report_loop())]

    async def stop(self) -> None:
        """Die at once: nothing is reported any more."""
        for task in (*self._loops, *self.held.values()):
            task.cancel()
        await asyncio.gather(*self._loops, *self.held.values(), return_exceptions=True)
        self._loops = []

    def restarted(self) -> "FakeExecutor":
        """Return this executor after a restart: a new session, and the spool that was on disk."""
        again = FakeExecutor(self.client, self.id, self.agents, self.slots)
        again.spool = dict(self.spool)
        return again

    def pull_request(self, **changes: Any) -> PullRequest:
        self.sequence += 1
        fields: dict[str, Any] = {
            "session": self.session,
            "sequence": self.sequence,
            "slots_free": self.slots - len(self.held),
            "memory_free_bytes": 8 << 30,
            "held": tuple(AttemptKey(*key) for key in self.held if key not in self.spool),
            "spooled": tuple(AttemptKey(*key) for key in self.spool),
        }
        return PullRequest(**{**fields, **changes})

    async def pull(self, request: PullRequest, timeout_s: float = 5.0) -> PullReply:
        return await bus.request(self.client, messages.pull_subject(self.id), request, PullReply, timeout_s)

    async def report(self, *reports: AttemptReport) -> ReportReply:
        request = ReportRequest(session=self.session, reports=reports)
        return await bus.request(self.client, messages.report_subject(self.id), request, ReportReply, 5.0)

    async def _on_leader(self, message: Any) -> None:
        self._freed.set()
        self._new_leader.set()

    async def _pull_loop(self) -> None:
        await self.client.subscribe(messages.LEADER_SUBJECT, cb=self._on_leader)
        while not self.superseded:
            reply = await self._pull_until_slots_are_free()
            if reply is None:
                await asyncio.sleep(0.05)
                continue
            self.replies.append(reply)
            self.superseded = reply.superseded
            for key in reply.cancel:
                task = self.held.get((key.task, key.attempt))
                if task is not None:
                    task.cancel()
            for assignment in reply.assignments:
                self.accept(assignment)
            if reply.error is not None or reply.unknown:
                await asyncio.sleep(0.05)

    async def _pull_until_slots_are_free(self) -> PullReply | None:
        """Pull; a pull that offered no slots is replaced as soon as there is one."""
        while True:
            request = self.pull_request()
            self._freed.clear()
            pull = asyncio.create_task(self.pull(request))
            freed = asyncio.create_task((self._new_leader if request.slots_free else self._freed).wait())
            self._new_leader.clear()
            try:
                await asyncio.wait({pull, freed}, return_when=asyncio.FIRST_COMPLETED)
                if pull.done():
                    return pull.result()
            except HiveError:
                return None
            finally:
                freed.cancel()
                pull.cancel()

    def accept(self, assignment: Assignment) -> None:
        key = assignment.task, assignment.attempt
        if key in self.held or key in self.spool or key in self.ran:
            return
        self.ran.append(key)
        self.held[key] = asyncio.create_task(self._run(assignment))

    async def _run(self, assignment: Assignment) -> None:
        key = assignment.task, assignment.attempt
        try:
            given = None if assignment.input.raw is None else msgspec.json.decode(assignment.input.raw)
            output = self.agents[assignment.agent.name](assignment, given)
            if asyncio.iscoroutine(output):
                output = await output
            self.spool[key] = (
                output if isinstance(output, AttemptReport) else succeeded(assignment, self.session, output)
            )
        except Failure as failure:
            self.spool[key] = failed(assignment, self.session, failure.code, str(failure))
        finally:
            self.held.pop(key, None)
            self._wake.set()
            self._freed.set()

    async def _report_loop(self) -> None:
        while True:
            if not self.spool or not self.reporting:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self._wake.wait()
                continue
            batch = list(self.spool.items())
            try:
                reply = await self.report(*(report for _, report in batch))
            except HiveError:
                await asyncio.sleep(0.05)
                continue
            if reply.error is not None:
                await asyncio.sleep(0.05)
                continue
            self.results += reply.results
            for key, _ in batch:
                self.spool.pop(key, None)


class Failure(Exception):
    """An attempt ends with this code."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message)
        self.code = code


class Cluster:
    """The database, NATS, and helpers to fill the log as the registry would."""

    def __init__(self, database: Database, nats_server: EmbeddedNats, folder: Path) -> None:
        self.database = database
        self.nats = nats_server
        self.folder = folder
        self.reader = LogReader(database.role_dsn("scheduler"))
        self.controls: list[Control] = []
        self.executors: list[FakeExecutor] = []
        self._clients: list[Any] = []
        self.kill_key = KillKey()
        self._speaker: Any = None
        self.decisions: dict[str, int] = {}
        self._trusts = False

    async def order(self, signed: messages.KillOrder) -> None:
        """Write a kill order as the registry does; `signed` is the newest one of `kill_key`."""
        event = self.kill_key.event(signed)
        position = await self.append(stream_of("default"), event.epoch, event)
        await self.hint(position, "KillOrdered")

    async def hint(self, position: int, *types: str) -> None:
        hint = messages.HeadHint(position=position, types=types)
        if self._speaker is None:
            self._speaker = await bus.connect(self.nats.issuer.service("registry", self.folder), "registry")
            self._clients.append(self._speaker)
        await self._speaker.publish(messages.HEAD_SUBJECT, msgspec.json.encode(hint))

    def config(self, dsn: str | None = None, lease_ms: int = 0) -> ServiceConfig:
        info = conninfo_to_dict(dsn or self.database.role_dsn("scheduler"))
        secrets_dir = self.folder / "secrets"
        secrets_dir.mkdir(exist_ok=True)
        for name, secret in (("postgres", str(info["password"])), ("key", KEY), ("token-key", TOKEN_KEY)):
            file = secrets_dir / name
            file.write_text(secret)
            file.chmod(0o600)
        return ServiceConfig(
            service="scheduler",
            owner=OWNER,
            postgres=PostgresConfig(
                host=str(info["host"]),
                port=int(str(info["port"])),
                user=str(info["user"]),
                password_file=str(secrets_dir / "postgres"),
                database=str(info["dbname"]),
            ),
            nats=self.nats.issuer.service("scheduler", secrets_dir),
            ops_port=free_port(),
            grpc_port=free_port(),
            extra={
                "token_key_file": msgspec.Raw(msgspec.json.encode(str(secrets_dir / "token-key"))),
                **({"lease_ms": msgspec.Raw(b"%d" % lease_ms)} if lease_ms else {}),
            },
            service_key_file=str(secrets_dir / "key"),
            artifacts_dir=str(self.folder / "artifacts"),
            kill_public_key=self.kill_key.public,
        )

    def control(self, dsn: str | None = None, lease_ms: int = 0) -> Control:
        control = Control(self.config(dsn, lease_ms))
        self.controls.append(control)
        return control

    def control_process(self, dsn: str | None = None, lease_ms: int = 0) -> ControlProcess:
        control = ControlProcess(self.config(dsn, lease_ms), self.folder)
        self.controls.append(control)
        return control

    async def publish(self, *manifests: AgentManifest, signer: str = AUTHOR) -> None:
        for manifest in manifests:
            stream = derive_id("agent", "default", manifest.name, manifest.version)
            raw = manifest_json(manifest)
            digest = values.digest_of(raw)
            signed = {"signer": signer, "signature": digest if signer else ""}
            event = AgentVersionPublished(manifest.name, manifest.version, digest, msgspec.Raw(raw), **signed)
            await self.append(stream, 1, event)
        if not self._trusts:
            self._trusts = True
            await self.trust(AUTHOR, "author")

    async def trust(self, public_key: str, name: str, version: int = 1) -> int:
        """Trust a signing key as the registry does; the first `publish` does it for `AUTHOR`."""
        return await self._about(public_key, version, SigningKeyTrusted(public_key, name))

    async def distrust(self, public_key: str, reason: str, version: int = 2) -> int:
        return await self._about(public_key, version, SigningKeyDistrusted(reason))

    async def yank(self, name: str, version: str, reason: str) -> int:
        position = await self.append(derive_id("agent", "default", name, version), 2, AgentVersionYanked(reason))
        await self.hint(position, "AgentVersionYanked")
        return position

    async def _about(self, public_key: str, version: int, event: events.Event) -> int:
        position = await self.append(derive_id("signer", "default", public_key), version, event)
        await self.hint(position, type(event).__name__)
        return position

    async def register(
        self, name: str, slots: int = 4, runtimes: tuple[str, ...] = ("python",), **more: Any
    ) -> str:
        executor = new_id()
        capabilities = Capabilities(
            "linux", "x86_64", 4, 16 << 30, slots, runtimes, **({"device": f"device {name}"} | more)
        )
        await self.append(executor, 1, ExecutorEnrolled(name, f"nkey of {name}", OWNER))
        await self.append(executor, 2, ExecutorRegistered(name, capabilities))
        return executor

    async def grant(self, agent: str, *grants: Grant) -> int:
        """Grant permissions as the registry does, and say so; one call for each agent and stretch of its stream."""
        position = 0
        for grant in grants:
            (name,) = named(grant.granted)
            event = PermissionGranted(agent, name, grant.granted, grant.asked, grant.ask, grant.until_us)
            position = await self._decided(agent, event)
        return position

    async def revoke(self, agent: str, permission: str) -> int:
        return await self._decided(agent, PermissionRevoked(agent, permission))

    async def _decided(self, agent: str, event: events.Event) -> int:
        self.decisions[agent] = self.decisions.get(agent, 0) + 1
        position = await self.append(derive_id("grants", "default", agent), self.decisions[agent], event)
        await self.hint(position, type(event).__name__)
        return position

    async def append(self, stream: str, version: int, event: events.Event) -> int:
        async with await LogWriter.open(self.database.role_dsn("registry")) as writer:
            new = NewEvent(stream, version, type(event).__name__, 1, events.encode(event), 1, "registry", OWNER)
            return await writer.append(Append((new,)))

    async def executor(
        self, name: str, agents: dict[str, Callable[..., Any]], slots: int = 4, start: bool = True, **more: Any
    ) -> FakeExecutor:
        executor = await self.register(name, slots, **more)
        fake = FakeExecutor(await self.client(executor), executor, agents, slots)
        return self.run(fake) if start else fake

    def run(self, fake: FakeExecutor) -> FakeExecutor:
        self.executors.append(fake)
        fake.start()
        return fake

    async def client(self, executor: str) -> Any:
        config = self.nats.issuer.executor(executor, self.folder)
        client = await bus.connect(config, executor, inbox=messages.inbox_prefix(executor))
        self._clients.append(client)
        return client

    async def log(self, stream: str | None = None) -> list[Stored]:
        return await self.reader.read(0, 10_000, streams=None if stream is None else [stream])

    async def close(self) -> None:
        for executor in self.executors:
            await executor.stop()
        for control in self.controls:
            await control.close()
        for client in self._clients:
            await client.close()
        await self.reader.close()


@pytest.fixture
async def cluster(database: Database, nats_server: EmbeddedNats, tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(database, nats_server, tmp_path)
    yield cluster
    await cluster.close()


@pytest.fixture
async def control(cluster: Cluster) -> Control:
    """A scheduler that leads, with the agents `square` and `total` published."""
    await cluster.publish(agent("square"), agent("total"))
    control = cluster.control()
    await control.start()
    return control


def agent(name: str, **fields: Any) -> AgentManifest:
    return AgentManifest(name=name, version="1.0.0", runtime="python", entry="agent.py", **fields)


@pytest.fixture
def fail() -> type[Failure]:
    return Failure


@pytest.fixture
def one_step() -> dict[str, Any]:
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "one",
        "input": {"n": 3},
        "tasks": [{"id": "square", "agent": "square@1.0.0", "input": {"n": "${input.n}"}}],
        "output": "${tasks.square.output}",
    }
