"""An executor against a scripted control plane: a scheduler, a registry and a gateway that do as a test says."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.package import AgentPackage, pack
from hive_common.artifacts.signing import sign
from hive_common.bus import assertion
from hive_common.bus.jwt import new_seed, public_nkey, read_credentials
from hive_common.bus.nats import connect, respond
from hive_common.contracts.events import AgentRef
from hive_common.contracts.limits import LEASE_MS
from hive_common.contracts.messages import (
    LEADER_SUBJECT,
    Assignment,
    AttemptKey,
    AttemptReport,
    HelloReply,
    HelloRequest,
    KillOrder,
    LeaderAnnouncement,
    LogBatch,
    Message,
    PullReply,
    PullRequest,
    ReportReply,
    ReportRequest,
    ReportResult,
)
from hive_common.contracts.values import Value, digest_of, encode_json, inline
from hive_common.kernel.errors import HiveError, Unavailable, body_of
from hive_common.kernel.ids import new_id
from hive_common.kernel.nkey import public_key
from hive_common.ops.config import NatsConfig, write_config
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_common.testing.identities import EVERYTHING, Issuer
from hive_common.testing.nats import EmbeddedNats
from hive_executor.bootstrap import main
from hive_executor.config import ExecutorConfig
from hive_executor.sandbox import prepare_python_runtime
from hive_executor.sandbox.warm import default_cache_dir
from nats.aio.client import Client

WAIT_S = 20.0
"""Far more than anything here takes; a test that needs it has failed."""

AGENT = """
import time
from hive import log, progress

def run(input):
    log.info("got %d keys", len(input))
    for line in range(input.get("log_lines", 0)):
        log.info("line %d " + "x" * 200, line)
    if "raise" in input:
        raise ValueError(input["raise"])
    for fraction in input.get("progress", []):
        progress(fraction)
    time.sleep(input.get("sleep_s", 0))
    if "large" in input:
        return {"text": "x" * input["large"]}
    return {"n": input.get("n", 0), "size": len(input.get("text", ""))}
"""
MANIFEST = """
apiVersion: hive/v1
kind: Agent
name: probe
version: 1.0.0
runtime: python
entry: agent.py
"""


AUTHOR = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
"""Signs the agents of tests; the registry of a test trusts it."""


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s until {what}"
        await asyncio.sleep(0.01)


class Gateway:
    """Blobs over HTTP. `failures` counts down: so many requests are answered 503."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures = 0
        self.corrupt: set[str] = set()
        self.seeds: dict[str, str] = {}
        self.issuer: Issuer | None = None
        self.valid_s = 3600
        self.renewals = 0
        self.refusals = 0
        self.problem: dict[str, Any] | None = None
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/v1/blobs/{digest}", self._answer)
        app.router.add_post("/v1/executors/{executor}/credentials", self._renew)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        port = free_port()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def keep(self, data: bytes) -> str:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def publish(self, package: AgentPackage, key: Ed25519PrivateKey = AUTHOR) -> AgentRef:
        manifest = package.manifest
        signature = sign(package.digest, manifest.name, key)
        self.blobs |= package.blobs | signature.blobs
        return AgentRef(
            name=manifest.name,
            version=manifest.version,
            digest=package.digest,
            runtime=manifest.runtime,
            memory_bytes=manifest.resources.memory_bytes,
            timeout_ms=manifest.resources.timeout_ms,
            fuel=manifest.resources.fuel,
            signer=signature.signer,
            signature=signature.digest,
        )

    def header(self) -> dict[str, str]:
        """Return what an executor that is known here shows."""
        executor, seed = new_id(), new_seed("user")
        self.seeds[executor] = seed
        token = assertion.make(assertion.private_key(seed), executor, time.time())
        return {"Authorization": f"Bearer {token}"}

    def _knows(self, request: web.Request) -> str:
        """Return which executor shows an assertion of its own, or nothing."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            executor = assertion.executor_of(token)
            key = public_key(public_nkey(self.seeds[executor]))
            return assertion.verify(token, key, time.time()).executor
        except (HiveError, KeyError):
            return ""

    async def _renew(self, request: web.Request) -> web.Response:
        executor = self._knows(request)
        if executor != request.match_info["executor"]:
            return web.json_response({"code": "unauthenticated", "detail": "who is this?"}, status=401)
        if self.problem is not None:
            self.refusals += 1
            return web.json_response(self.problem, status=403)
        self.renewals += 1
        assert self.issuer is not None
        made = self.issuer.authority.executor(executor, self.seeds[executor], int(time.time()), self.valid_s)
        return web.json_response({"nats_jwt": made.jwt, "expires_us": 1})

    async def _answer(self, request: web.Request) -> web.Response:
        digest = request.match_info["digest"]
        self.requests.append((request.method, digest))
        if not self._knows(request):
            return web.Response(status=401)
        if self.failures:
            self.failures -= 1
            return web.Response(status=503)
        if request.method == "PUT":
            data = await request.read()
            if digest_of(data) != digest:
                return web.Response(status=400)
            self.blobs[digest] = data
            return web.Response(status=201)
        if digest not in self.blobs:
            return web.Response(status=404)
        data = self.blobs[digest]
        if digest in self.corrupt:
            self.corrupt.discard(digest)
            data = b"?" + data[1:]
        return web.Response(body=data)


class ControlPlane:
    """Registry and scheduler of one executor, with the scheduler's rules for sessions and sequences.

    Attributes:
        signers: keys that are trusted; what a hello is told of them, unless `is_telling_signers` is false.
        is_registry_away: whether hellos get an error.
        is_known: whether pulls are answered with work, or with `unknown` until the next hello.
        report_mode: `commit`, `refuse` (an error), or `ignore` (no answer).
        answer_s: how long a pull without work is kept.
    """

    def __init__(self, executor_id: str, gateway: Gateway) -> None:
        self.executor_id = executor_id
        self.gateway = gateway
        self.hellos: list[HelloRequest] = []
        self.pulls: list[PullRequest] = []
        self.pull_error: HiveError | None = None
        self.reports: list[AttemptReport] = []
        self.report_requests: list[ReportRequest] = []
        self.order: list[str] = []
        self.logs: list[LogBatch] = []
        self.is_known = True
        self.is_drained = False
        self.is_pulling_answered = True
        self.lease_ms = LEASE_MS
        self.kill: KillOrder | None = None
        self.kill_of_hello: KillOrder | None = None
        self.signers = {public_hex(AUTHOR)}
        self.signers_position = 1
        self.is_telling_signers = True
        self.is_registry_away = False
        self.superseded: set[str] = set()
        self.report_mode = "commit"
        self.verdicts: dict[AttemptKey, str] = {}
        self.answer_s = 0.3
        self.epoch = 1
        self.jobs_id = new_id()
        self._waiting: list[Assignment] = []
        self._given: dict[str, dict[AttemptKey, Assignment]] = {}
        self._cancel: list[AttemptKey] = []
        self._latest = 0
        self._session = ""
        self._changed = asyncio.Event()
        self._client: Client | None = None

    async def start(self, nats: NatsConfig) -> None:
        self._client = await connect(nats, "control plane")
        for verb, kind, handler in (
            ("hello", HelloRequest, self._hello),
            ("pull", PullRequest, self._pull),
            ("report", ReportRequest, self._report),
        ):
            await respond(self._client, f"hive.exec.*.{verb}", kind, handler, self._error)  # type: ignore[arg-type]
        await self._client.subscribe("hive.exec.*.log.*", cb=self._log)
        await self._client.flush()

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.close()

    def assign(self, agent: AgentRef, input_: Any, **changes: Any) -> AttemptKey:
        """Queue a first attempt of a new task."""
        value = input_ if isinstance(input_, Value) else inline(encode_json(input_))
        assignment = Assignment(
            task=new_id(),
            attempt=1,
            job=self.jobs_id,
            step="probe",
            agent=agent,
            input=value,
            timeout_ms=30_000,
            memory_bytes=agent.memory_bytes,
            fuel=agent.fuel,
        )
        assignment = msgspec.structs.replace(assignment, **changes)
        self.resend(assignment)
        return AttemptKey(assignment.task, assignment.attempt)

    def resend(self, assignment: Assignment) -> None:
        self._waiting.append(assignment)
        self._wake()

    def given(self, key: AttemptKey) -> Assignment:
        return next(given[key] for given in self._given.values() if key in given)

    def decide_signers(self, *keys: Ed25519PrivateKey) -> None:
        """Trust these keys and no others; pulls are told that there is news."""
        self.signers = {public_hex(key) for key in keys}
        self.signers_position += 1
        self._wake()

    def cancel(self, key: AttemptKey) -> None:
        self._cancel.append(key)
        self._wake()

    async def announce(self, epoch: int) -> None:
        assert self._client is not None
        self.epoch = epoch
        await self._client.publish(LEADER_SUBJECT, msgspec.json.encode(LeaderAnnouncement(epoch=epoch)))

    @property
    def held(self) -> set[AttemptKey]:
        """What the last pull named as held."""
        return set(self.pulls[-1].held) if self.pulls else set()

    @property
    def spooled(self) -> set[AttemptKey]:
        """What the last pull named as spooled."""
        return set(self.pulls[-1].spooled) if self.pulls else set()

    def outcomes(self, key: AttemptKey) -> list[AttemptReport]:
        return [r for r in self.reports if (r.task, r.attempt) == (key.task, key.attempt) and r.status != "started"]

    async def outcome(self, key: AttemptKey) -> AttemptReport:
        await until(lambda: self.outcomes(key), f"{key} was reported")
        return self.outcomes(key)[0]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @staticmethod
    def _error(error: BaseException) -> Message:
        return PullReply(error=body_of(error))

    async def _hello(self, executor: str, body: HelloRequest) -> Message:
        assert executor == self.executor_id
        self.hellos.append(body)
        if self.is_registry_away:
            return HelloReply(error=body_of(Unavailable("away")))
        self.order.append("hello")
        self.is_known = True
        told = {"signers": tuple(self.signers), "signers_position": self.signers_position}
        fields = {"blobs_url": self.gateway.url, "kill": self.kill_of_hello} | (
            told if self.is_telling_signers else {}
        )
        return HelloReply(position=1, **fields)

    async def _pull(self, executor: str, body: PullRequest) -> Message:
        assert executor == self.executor_id
        self.pulls.append(body)
        self.order.append("pull")
        if self.pull_error is not None:
            return PullReply(error=body_of(self.pull_error))
        if not self.is_pulling_answered:
            await asyncio.sleep(3600)
        if body.session in self.superseded:
            return PullReply(superseded=True)
        if not self.is_known:
            return PullReply(unknown=True)
        if body.session != self._session:
            self._session, self._latest = body.session, 0
        self._latest = max(self._latest, body.sequence)
        self._wake()
        given = self._given.setdefault(body.session, {})
        deadline = time.monotonic() + self.answer_s
        while (left_s := deadline - time.monotonic()) > 0:
            if body.sequence < self._latest or body.session != self._session:
                break
            known = {*body.held, *body.spooled}
            lost = [a for key, a in given.items() if key not in known and not self.outcomes(key)]
            fresh = self._waiting[: max(0, body.slots_free - len(lost))]
            if lost or fresh or self._cancel:
                del self._waiting[: len(fresh)]
                for assignment in fresh:
                    given[AttemptKey(assignment.task, assignment.attempt)] = assignment
                cancel, self._cancel = self._cancel, []
                for key in cancel:
                    given.pop(key, None)
                return self._reply(assignments=(*lost, *fresh), cancel=tuple(cancel))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
        return self._reply()

    def _reply(self, **fields: Any) -> PullReply:
        told = {"drained": self.is_drained, "kill": self.kill, "signers": self.signers_position}
        return PullReply(epoch=self.epoch, lease_ms=self.lease_ms, **told, **fields)

    async def _report(self, executor: str, body: ReportRequest) -> Message:
        assert executor == self.executor_id
        self.report_requests.append(body)
        self.order.append("report")
        if self.report_mode == "ignore":
            await asyncio.sleep(3600)
        if self.report_mode == "refuse":
            return ReportReply(error=body_of(Unavailable("the log cannot be reached")))
        results = []
        for report in body.reports:
            self.reports.append(report)
            verdict = self.verdicts.get(AttemptKey(report.task, report.attempt), "accepted")
            results.append(ReportResult(report.task, report.attempt, verdict))
        return ReportReply(results=tuple(results))

    async def _log(self, message: Any) -> None:
        self.logs.append(msgspec.json.decode(message.data, type=LogBatch))


class Home:
    """The folder, identity and configuration of one executor, and the executors that tests start in it."""

    def __init__(
        self, folder: Path, nats: EmbeddedNats, gateway: Gateway, cache_dir: Path, executor_id: str = ""
    ) -> None:
        self.folder = folder
        self.executor_id = executor_id or new_id()
        self.nats = nats.issuer.executor(self.executor_id, folder)
        gateway.issuer = nats.issuer
        gateway.seeds[self.executor_id] = read_credentials(self.nats.credentials_file).seed
        self.services_nats = nats.issuer.service(EVERYTHING, folder)
        self.config = ExecutorConfig(
            name="probe",
            executor_id=self.executor_id,
            nats=self.nats,
            state_dir=str(folder / "state"),
            cache_dir=str(cache_dir),
            blobs_url=gateway.url,
            ops_port=free_port(),
            slots=2,
            memory_bytes=1 << 30,
            model_urls=(),
        )

    @property
    def spool_dir(self) -> Path:
        return self.folder / "state" / "spool"

    def has_on_disk(self, keys: Iterable[AttemptKey]) -> bool:
        """Whether the outcomes are written: before that, a process that is killed loses them."""
        written = b"".join(file.read_bytes() for file in self.spool_dir.glob("*.spool"))
        return all(key.task.encode() in written for key in keys)

    @contextlib.asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[Stop]:
        """Run an executor in this process; it is stopped at the end of the block."""
        config = msgspec.structs.replace(self.config, ops_port=free_port(), **changes)
        stop = Stop()
        task = asyncio.create_task(main(config, stop))
        task.add_done_callback(lambda _: stop.set("main ended"))
        stop.ops_url = f"http://127.0.0.1:{config.ops_port}"  # type: ignore[attr-defined]
        try:
            yield stop
        finally:
            stop.set("the test ends")
            async with asyncio.timeout(WAIT_S):
                await task

    @contextlib.asynccontextmanager
    async def process(self, **changes: Any) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run an executor as its own process; it is killed at the end of the block if it still runs."""
        config = msgspec.structs.replace(self.config, ops_port=free_port(), **changes)
        file = self.folder / f"executor-{config.ops_port}.json"
        write_config(file, config)
        log = (self.folder / "executor.log").open("ab")
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hive_executor", "--config", str(file), stdout=log, stderr=log
        )
        log.close()
        try:
            yield child
        finally:
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
                await child.wait()


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where the Python runtime is compiled, once for all runs on this machine."""
    folder = Path(os.environ.get("HIVE_TEST_CACHE_DIR") or default_cache_dir())
    asyncio.run(prepare_python_runtime(folder))
    return folder


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    server = Gateway()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def home(tmp_path: Path, nats_server: EmbeddedNats, gateway: Gateway, cache_dir: Path) -> Home:
    folder = tmp_path / "home"
    folder.mkdir()
    return Home(folder, nats_server, gateway, cache_dir)


@pytest.fixture
async def control(home: Home, gateway: Gateway) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(home.executor_id, gateway)
    await plane.start(home.services_nats)
    yield plane
    await plane.stop()


@pytest.fixture
def new_home() -> type[Home]:
    return Home


@pytest.fixture
def new_control() -> type[ControlPlane]:
    return ControlPlane


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentPackage]:
    folder = tmp_path_factory.mktemp("agent")
    (folder / "agent.py").write_text(AGENT)
    (folder / "manifest.yaml").write_text(MANIFEST)
    yield pack(folder)


@pytest.fixture
def agent(gateway: Gateway, package: AgentPackage) -> AgentRef:
    return gateway.publish(package)
