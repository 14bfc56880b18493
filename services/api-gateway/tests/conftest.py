"""A gateway that really listens, in front of peers that really serve gRPC from memory."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import msgspec
import pytest
from hive_common.bus import assertion
from hive_common.bus.authority import Authority
from hive_common.bus.jwt import new_seed, public_nkey
from hive_common.kernel.errors import Conflict, FailedPrecondition, HiveError, InvalidArgument, NotFound, body_of
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import NatsConfig, PostgresConfig, ServiceConfig
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_common.rpc.frames import Frames
from hive_common.rpc.rules import KeyRules, rules_of
from hive_common.rpc.server import RpcServer, key_check
from hive_common.testing.identities import Issuer
from hive_gateway.bootstrap import Gateway
from hive_proto.agents.v1 import agents_pb2, agents_pb2_grpc
from hive_proto.approvals.v1 import approvals_pb2, approvals_pb2_grpc
from hive_proto.audit.v1 import audit_pb2, audit_pb2_grpc
from hive_proto.canaries.v1 import canaries_pb2, canaries_pb2_grpc
from hive_proto.control.v1 import control_pb2, control_pb2_grpc
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from hive_proto.keys.v1 import keys_pb2, keys_pb2_grpc
from hive_proto.models.v1 import models_pb2, models_pb2_grpc
from hive_proto.pain.v1 import pain_pb2, pain_pb2_grpc
from hive_proto.values.v1 import values_pb2, values_pb2_grpc

TOKEN_ID = "01890000-0000-7000-8000-00000000000a"
OWNER = "01890000-0000-7000-8000-000000000001"


class JobsPeer(jobs_pb2_grpc.JobsServicer):
    def __init__(self) -> None:
        self.jobs: dict[str, jobs_pb2.Job] = {}
        self.events: dict[str, list[jobs_pb2.JobEvent]] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.changed = asyncio.Condition()
        self.watching = 0
        self.ended_watches = 0
        self.views_lag = False
        self.gets = 0
        self.decision = b""
        self.tasks: list[jobs_pb2.Task] = []
        self.more = False
        self.break_watches_after: int | None = None
        self._position = 1

    def _seen(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))

    def find(self, job_id: str) -> jobs_pb2.Job:
        if job_id not in self.jobs:
            raise NotFound(f"there is no job {job_id}", job=job_id)
        return self.jobs[job_id]

    def add(self, job_id: str = "", **fields: Any) -> jobs_pb2.Job:
        job = jobs_pb2.Job(
            job_id=job_id or new_id(), **{"name": "squares", "state": "running", "priority": "normal"} | fields
        )
        self.jobs[job.job_id] = job
        self.events[job.job_id] = []
        return job

    async def record(self, job_id: str, event_type: str, data: bytes = b"{}", stream: str = "") -> int:
        self._position += 1
        event = jobs_pb2.JobEvent(
            position=self._position,
            stream=stream or job_id,
            type=event_type,
            ts_us=7,
            data_json=data,
            actor="scheduler",
        )
        async with self.changed:
            self.events[job_id].append(event)
            if event_type in ("JobSucceeded", "JobFailed", "JobCancelled"):
                self.jobs[job_id].state = event_type.removeprefix("Job").lower()
            self.changed.notify_all()
        return self._position

    async def Submit(self, request, context):
        self._seen(request, context)
        document = msgspec.json.decode(request.document_json)
        if "tasks" not in document:
            raise InvalidArgument("job: tasks: expected at least one task", file="job", path="tasks")
        job_id = derive_id(request.caller, request.idempotency_key) if request.idempotency_key else new_id()
        if job_id in self.jobs:
            if self.jobs[job_id].name != document["name"]:
                raise Conflict("the idempotency key was used for another job")
            return jobs_pb2.SubmitResponse(job_id=job_id, position=self.jobs[job_id].position, existed=True)
        self.add(job_id, name=document["name"])
        self.jobs[job_id].position = await self.record(job_id, "JobSubmitted")
        return jobs_pb2.SubmitResponse(job_id=job_id, position=self.jobs[job_id].position)

    async def Get(self, request, context):
        self._seen(request, context)
        self.gets += 1
        job = jobs_pb2.Job()
        job.CopyFrom(self.find(request.job_id))
        if self.views_lag and request.min_position < self.events[request.job_id][-1].position:
            job.state = "running"
        return job

    async def List(self, request, context):
        self._seen(request, context)
        newest = sorted(self.jobs.values(), key=lambda job: job.job_id, reverse=True)
        chosen = [j for j in newest if not request.state or j.state == request.state]
        return jobs_pb2.ListResponse(
            jobs=[j for j in chosen if not request.after or j.job_id < request.after][: request.limit]
        )

    async def Cancel(self, request, context):
        self._seen(request, context)
        job = self.find(request.job_id)
        job.state = "cancelling"
        return jobs_pb2.CancelResponse(
            state=job.state, position=await self.record(request.job_id, "JobCancelRequested")
        )

    async def Watch(self, request, context):
        self._seen(request, context)
        self.find(request.job_id)
        self.watching += 1
        sent = 0
        position = request.from_position
        try:
            while True:
                for event in [e for e in self.events[request.job_id] if e.position > position]:
                    if self.break_watches_after is not None and sent == self.break_watches_after:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
                    position = event.position
                    sent += 1
                    yield event
                if request.history_only or self.jobs[request.job_id].state in ("succeeded", "failed", "cancelled"):
                    return
                async with self.changed:
                    if self.events[request.job_id][-1:] and self.events[request.job_id][-1].position > position:
                        continue
                    await self.changed.wait()
        finally:
            self.watching -= 1
            self.ended_watches += 1

    async def WatchBatches(self, request, context):
        # Pairs where it can be: a batch must not be taken for one event.
        batch = []
        async with contextlib.aclosing(self.Watch(request, context)) as events:
            async for event in events:
                batch.append(event)
                is_last = event is self.events[request.job_id][-1]
                if len(batch) == 2 or is_last:
                    yield jobs_pb2.JobEvents(events=batch)
                    batch = []
        if batch:
            yield jobs_pb2.JobEvents(events=batch)

    async def Explain(self, request, context):
        self._seen(request, context)
        if request.task_id not in self.jobs:
            raise NotFound(f"there is no task {request.task_id}")
        return jobs_pb2.ExplainResponse(explanation_json=b'{"task": "x", "decisions": []}')

    async def GetDecision(self, request, context):
        self._seen(request, context)
        if request.task_id not in self.jobs:
            raise NotFound(f"there is no task {request.task_id}")
        if not self.decision:
            raise FailedPrecondition(f"the task {request.task_id} was not judged")
        return jobs_pb2.GetDecisionResponse(decision_json=self.decision)

    async def Tasks(self, request, context):
        self._seen(request, context)
        self.find(request.job_id)
        tasks = [
            jobs_pb2.Task(
                task_id=new_id(), job_id=request.job_id, step="square", index=i, state="succeeded", output_json=b"4"
            )
            for i in range(3)
        ]
        tasks.append(jobs_pb2.Task(task_id=new_id(), step="total", index=-1, state="failed", error_code="timeout"))
        return jobs_pb2.TasksResponse(tasks=(self.tasks or tasks)[: request.limit], more=self.more)

    async def Logs(self, request, context):
        self._seen(request, context)
        self.find(request.job_id)
        return jobs_pb2.LogsResponse(
            logs=[jobs_pb2.AttemptLog(task_id=new_id(), step="square", attempt=1, log_json=b'[{"text": "hello"}]')]
        )


class ExecutorsPeer(executors_pb2_grpc.ExecutorsServicer):
    def __init__(self) -> None:
        self.executor = executors_pb2.Executor(
            executor_id=new_id(), name="executor-1", state="online", capabilities_json=b'{"cores": 2}', slots=2
        )
        self.requests: list[Any] = []
        self.keys: dict[str, executors_pb2.Key] = {}
        self.lookups = 0
        self.enrol_error: HiveError | None = None

    def credentials(self, executor: str) -> executors_pb2.Credentials:
        return executors_pb2.Credentials(
            executor_id=executor,
            owner="o",
            nats_jwt="jwt",
            expires_us=7,
            nats_url="nats://n",
            blobs_url="http://b",
            kill_public_key="kill",
            token_public_key="token",
        )

    async def Keys(self, request, context):
        self.lookups += 1
        return executors_pb2.KeysResponse(keys=[self.keys[i] for i in request.executor_ids if i in self.keys])

    async def IssueToken(self, request, context):
        self.requests.append(request)
        return executors_pb2.IssueTokenResponse(token_id=TOKEN_ID, secret="the-secret", expires_us=5)

    async def Enrol(self, request, context):
        self.requests.append(request)
        if self.enrol_error is not None:
            raise self.enrol_error
        return self.credentials("enrolled")

    async def Renew(self, request, context):
        self.requests.append(request)
        return self.credentials(request.executor_id)

    async def Revoke(self, request, context):
        self.requests.append(request)
        self.executor.state = "revoked"
        self.executor.revoked = True
        return self.executor

    async def List(self, request, context):
        return executors_pb2.ListResponse(executors=[self.executor])

    async def Get(self, request, context):
        if request.executor_id not in (self.executor.executor_id, self.executor.name):
            raise NotFound(f"there is no executor {request.executor_id}")
        return self.executor

    async def Drain(self, request, context):
        self.requests.append(request)
        await self.Get(executors_pb2.GetRequest(executor_id=request.executor_id), context)
        self.executor.state = "online" if request.undrain else "drained"
        return self.executor

    async def Trust(self, request, context):
        self.requests.append(request)
        self.executor.reputation.standing = "new"
        return self.executor


class AgentsPeer(agents_pb2_grpc.AgentsServicer):
    def __init__(self) -> None:
        self.version = agents_pb2.AgentVersion(
            name="square", version="1.0.0", digest="sha256:" + "0" * 64, manifest_json=b'{"name": "square"}'
        )
        self.requests: list[Any] = []

        self.key = agents_pb2.SigningKey(public_key="a0" * 32, name="ada", trusted=True, since_us=5, position=7)

    async def Push(self, request, context):
        self.requests.append(request)
        return self.version

    async def Yank(self, request, context):
        self.requests.append(request)
        return agents_pb2.AgentVersion(name="square", version="1.0.0", yanked_us=9, yank_reason=request.reason)

    async def Trust(self, request, context):
        self.requests.append(request)
        return self.key

    async def Distrust(self, request, context):
        self.requests.append(request)
        return agents_pb2.SigningKey(public_key="a0" * 32, name="ada", reason=request.reason)

    async def Signers(self, request, context):
        return agents_pb2.SignersResponse(keys=[self.key])

    async def Grant(self, request, context):
        self.requests.append(request)
        return await self.Grants(request, context)

    async def Ungrant(self, request, context):
        self.requests.append(request)
        return await self.Grants(request, context)

    async def Grants(self, request, context):
        held = agents_pb2.Grant(
            permission="model",
            granted_json=b'{"model":{"names":["a"],"max_tokens":1}}',
            words="model: …",
            state="unused",
        )
        asked = agents_pb2.Grant(permission="scratch", asked_json=b'{"scratch_bytes":1}', state="asked", until_us=9)
        return agents_pb2.GrantsResponse(name=request.name, version="1.0.0", grants=[held, asked])

    async def List(self, request, context):
        return agents_pb2.ListResponse(versions=[self.version] if request.name in ("", "square") else [])

    async def Get(self, request, context):
        if (request.name, request.version) != ("square", "1.0.0"):
            raise NotFound(f"there is no {request.name}@{request.version}")
        return self.version


class ValuesPeer(values_pb2_grpc.ValuesServicer):
    async def Get(self, request, context):
        return values_pb2.Found(value=b'{"kept": true}')

    async def List(self, request, context):
        return values_pb2.Page(keys=["a", "b"], more=True)

    async def Delete(self, request, context):
        return values_pb2.Deleted()


class ApprovalsPeer(approvals_pb2_grpc.ApprovalsServicer):
    """A scheduler's approvals: one, over an action with the hash `a…a`."""

    def __init__(self) -> None:
        self.decided: list[approvals_pb2.DecideRequest] = []

    def found(self, **changes: Any) -> approvals_pb2.Approval:
        fields = {"approval_id": TOKEN_ID, "state": "pending", "hash": "a" * 64, "action": "{}", "shown": ["a: b"]}
        return approvals_pb2.Approval(**{**fields, **changes})

    async def List(self, request, context):
        return approvals_pb2.ListResponse(approvals=[self.found(job_id=request.job_id)])

    async def Get(self, request, context):
        return self.found(approval_id=request.approval_id)

    async def Decide(self, request, context):
        self.decided.append(request)
        if request.hash != self.found().hash:
            raise Conflict("look again")
        return self.found(state=request.verdict, by=request.caller, reason=request.reason)


class CanariesPeer(canaries_pb2_grpc.CanariesServicer):
    """A scheduler's canaries: what was added last."""

    def __init__(self) -> None:
        self.added: list[canaries_pb2.AddRequest] = []

    def found(self, **changes: Any) -> canaries_pb2.Canary:
        last = self.added[-1] if self.added else canaries_pb2.AddRequest(input_json=b"{}", equal="json")
        fields = {"canary_id": TOKEN_ID, "agent": last.agent, "input_json": last.input_json, "equal": last.equal}
        return canaries_pb2.Canary(**{**fields, "key": "sha256:0", **changes})

    async def Add(self, request, context):
        self.added.append(request)
        return self.found()

    async def List(self, request, context):
        return canaries_pb2.ListResponse(canaries=[self.found(agent=request.agent)])

    async def Remove(self, request, context):
        if request.canary_id != TOKEN_ID:
            raise NotFound("there is no such canary")
        return self.found(removed=True)


class KeysPeer(keys_pb2_grpc.KeysServicer):
    """A registry's keys in memory; `finds` counts how often it was asked whose a secret is."""

    def __init__(self) -> None:
        self.keys: dict[str, keys_pb2.Key] = {}
        self.requests: list[Any] = []
        self.finds = 0

    def add(self, name: str, **fields: Any) -> str:
        """Have a key, and return its secret."""
        secret = f"hive_{secrets.token_hex(16)}"
        pseudonym = derive_id("caller", OWNER, name)
        key = keys_pb2.Key(**{"name": name, "scope": "user", "pin": "any", "pseudonym": pseudonym, **fields})
        self.keys[hashlib.sha256(secret.encode()).hexdigest()] = key
        return secret

    def named(self, name: str) -> keys_pb2.Key:
        for key in self.keys.values():
            if key.name == name:
                return key
        raise NotFound(f"there is no key {name}")

    async def Create(self, request, context):
        self.requests.append(request)
        return keys_pb2.Created(key=keys_pb2.Key(name=request.name, scope=request.scope), secret="hive_new")

    async def List(self, request, context):
        return keys_pb2.ListResponse(keys=list(self.keys.values()))

    async def Get(self, request, context):
        return self.named(request.name)

    async def Revoke(self, request, context):
        self.requests.append(request)
        key = self.named(request.name)
        key.revoked_us = 7
        return key

    async def Find(self, request, context):
        self.finds += 1
        return keys_pb2.FindResponse(key=self.keys.get(request.digest))


class PainPeer(pain_pb2_grpc.PainServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.group = pain_pb2.Group(fingerprint="0123456789abcdef", agent="a", failures=3, nano_usd=7)

    async def List(self, request, context):
        self.requests.append(request)
        return pain_pb2.ListResponse(groups=[self.group], position=9, truncated=True)

    async def Get(self, request, context):
        self.requests.append(request)
        example = pain_pb2.Example(job_id="j", task_id="t", message="m", position=4)
        return pain_pb2.GetResponse(group=self.group, examples=[example])


class AuditPeer(audit_pb2_grpc.AuditServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.verifying = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.hold_verify = False
        self.break_export = False

    async def Verify(self, request, context):
        self.requests.append(request)
        self.verifying.set()
        try:
            while self.hold_verify:
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return audit_pb2.VerifyResponse(ok=True, events=3, head=3, head_hash=b"\1" * 32, log_id="log")

    async def Decisions(self, request, context):
        self.requests.append(request)
        check = audit_pb2.DecisionCheck(
            task_id=request.task_id, position=7, outcome="decided", result="differs", reasons=["a", "b"]
        )
        return audit_pb2.DecisionsResponse(checks=[check], next_after=0 if request.task_id else 7)

    async def Events(self, request, context):
        self.requests.append(request)
        first = getattr(request, "from")
        for position in range(first, min(first + request.limit, 6)):
            payload = b"\xff\x00" if position == 5 else b'{\n"a": 1}'
            yield audit_pb2.Event(
                position=position, event_json=b'{"v": 1}', hash=b"\2" * 32, payload=payload, salt=b"\3" * 32
            )

    async def Export(self, request, context):
        yield audit_pb2.ExportChunk(lines=b'{"header": 1}\n')
        if self.break_export:
            raise RuntimeError("disk on fire")
        yield audit_pb2.ExportChunk(lines=b'{"position": 1}\n')


class ModelsPeer(models_pb2_grpc.ModelsServicer):
    """A router that plays parts of an answer; `error` instead of the first, `breaks` after the last."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.rules: list[KeyRules] = []
        self.parts: list[bytes] = [b'{"id": "x", "choices": []}']
        self.error: HiveError | None = None
        self.breaks: HiveError | None = None
        self.settings: list[Any] = []
        self.hold = False
        self.answering = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def List(self, request, context):
        return models_pb2.ListResponse(models=[models_pb2.Model(name="smollm2:135m", executors=["e"], loaded=True)])

    async def Complete(self, request, context):
        self.requests.append(request)
        if context is not None:
            self.rules.append(rules_of(context.invocation_metadata()))
        if self.error is not None:
            raise self.error
        kind = "text/event-stream" if request.stream else "application/json"
        head = models_pb2.CompleteHead(status=200, content_type=kind, route="pool", executor="e")
        yield models_pb2.CompleteResponse(head=head)
        try:
            for part in self.parts:
                yield models_pb2.CompleteResponse(chunk=part)
            self.answering.set()
            if self.hold:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.breaks is not None:
            raise self.breaks

    async def Usage(self, request, context):
        row = models_pb2.UsageRow(name="ci", calls=2, nano_usd=5)
        return models_pb2.UsageResponse(rows=[row], position=9)

    async def GetJobUsage(self, request, context):
        self.rules.append(rules_of(context.invocation_metadata()))
        row = models_pb2.UsageRow(name=request.job_id, calls=2, nano_usd=5, core=1)
        return models_pb2.JobUsage(used=row, budget=self.budget(f"job:{request.job_id}"), position=9)

    async def Budgets(self, request, context):
        return models_pb2.BudgetsResponse(budgets=[self.budget(request.subject or "total")])

    async def SetBudget(self, request, context):
        self.settings.append(request)
        return self.budget(request.subject)

    async def ReturnUnaccounted(self, request, context):
        self.settings.append(request)
        return self.budget(request.subject)

    def budget(self, subject: str) -> models_pb2.Budget:
        limit = models_pb2.BudgetLimit(per="month", unit="usd", amount=10)
        return models_pb2.Budget(subject=subject, limits=[models_pb2.BudgetState(limit=limit, spent=3)])

    async def Explain(self, request, context):
        if not self.requests or request.call_id != self.requests[-1].call_id:
            raise NotFound(f"nothing is known of the model call {request.call_id}")
        rejected = models_pb2.Candidate(executor="f", route="pool", rejected="offline", detail="not seen for 9 s")
        return models_pb2.Explanation(call_id=request.call_id, model="m", route="pool", candidates=[rejected])


class ExchangePeer(models_pb2_grpc.ExchangeServicer):
    """The same on one connection. What a stream may send is not looked at, but kept in `grants`."""

    def __init__(self, models: ModelsPeer) -> None:
        self.models = models
        self.connections = 0
        self.grants: list[int] = []
        self._server: asyncio.Server | None = None
        self._open: set[Frames[models_pb2.ExchangeRequest]] = set()

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(self._connected, "127.0.0.1", 0)

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for frames in list(self._open):
            frames.abort()

    async def Open(self, request, context):
        return models_pb2.OpenResponse(port=self._server.sockets[0].getsockname()[1], ticket=b"ticket")

    def _connected(self) -> Frames[models_pb2.ExchangeRequest]:
        running: dict[str, asyncio.Task[None]] = {}
        admitted: list[bytes] = []

        def took(request: models_pb2.ExchangeRequest) -> None:
            if not admitted:
                assert request.ticket == b"ticket"
                admitted.append(request.ticket)
            elif request.cancel:
                running[request.cancel].cancel()
            elif request.grant:
                self.grants.append(request.grant_bytes)
            else:
                running[request.call.call_id] = asyncio.create_task(self._make(request.call, frames))

        def lost() -> None:
            self._open.discard(frames)
            for task in running.values():
                task.cancel()

        self.connections += 1
        frames = Frames(models_pb2.ExchangeRequest.FromString, took, lost)
        self._open.add(frames)
        return frames

    async def _make(self, call: Any, frames: Frames[Any]) -> None:
        try:
            async for part in self.models.Complete(call, None):
                whole = {"head": part.head} if part.HasField("head") else {"chunk": part.chunk}
                frames.send(models_pb2.ExchangeResponse(call_id=call.call_id, **whole))
            frames.send(models_pb2.ExchangeResponse(call_id=call.call_id, last=True))
        except HiveError as error:
            told = msgspec.json.encode(body_of(error))
            frames.send(models_pb2.ExchangeResponse(call_id=call.call_id, error_json=told, last=True))


class ControlPeer(control_pb2_grpc.ControlServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.standing = control_pb2.Standing()

    async def State(self, request, context):
        return self.standing

    async def Order(self, request, context):
        self.requests.append(request)
        stop = control_pb2.Stop(scope="agent", target="square", epoch=1, reason="hostile", issued_us=5)
        self.standing = control_pb2.Standing(
            epoch=1, order=request.order, signature=request.signature, stops=[stop]
        )
        return self.standing


class IntakePeer(jobs_pb2_grpc.IntakeServicer):
    def __init__(self, jobs: JobsPeer) -> None:
        self.jobs = jobs
        self.calls: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    async def SubmitMany(self, request, context):
        self.calls.append(len(request.submits))
        await self.open.wait()
        results = []
        for submit in request.submits:
            try:
                results.append(jobs_pb2.SubmitResult(taken=await self.jobs.Submit(submit, context)))
            except HiveError as error:
                results.append(jobs_pb2.SubmitResult(error_json=msgspec.json.encode(body_of(error))))
        return jobs_pb2.SubmitManyResponse(results=results)


class World:
    """The gateway of a test, its peers, and ways to talk to it."""

    def __init__(self, folder: Path, nats: NatsConfig) -> None:
        self.folder = folder
        self.nats = nats
        self.service_key = secrets.token_hex(8)
        self.keys = {"admin": secrets.token_urlsafe(24)}
        self.seed = new_seed("user")
        self.device = new_id()
        self.jobs, self.executors, self.agents = JobsPeer(), ExecutorsPeer(), AgentsPeer()
        self.intake = IntakePeer(self.jobs)
        self.audit, self.models, self.keyring = AuditPeer(), ModelsPeer(), KeysPeer()
        self.exchange = ExchangePeer(self.models)
        self.control = ControlPeer()
        self.approvals, self.pain = ApprovalsPeer(), PainPeer()
        self.canaries = CanariesPeer()
        self.servers: dict[str, RpcServer] = {}
        self.peers: dict[str, str] = {}

    def secret(self, name: str, value: str) -> str:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(value)
        return str(path)

    async def start_peer(self, name: str, port: int = 0) -> None:
        # Of these no connection gets one meanwhile, where a peer comes back at the same.
        server = RpcServer("127.0.0.1", port or free_port(), key_check(self.service_key))
        if name == "scheduler":
            jobs_pb2_grpc.add_JobsServicer_to_server(self.jobs, server.server)
            jobs_pb2_grpc.add_IntakeServicer_to_server(self.intake, server.server)
            pain_pb2_grpc.add_PainServicer_to_server(self.pain, server.server)
            approvals_pb2_grpc.add_ApprovalsServicer_to_server(self.approvals, server.server)
            canaries_pb2_grpc.add_CanariesServicer_to_server(self.canaries, server.server)
        elif name == "registry":
            executors_pb2_grpc.add_ExecutorsServicer_to_server(self.executors, server.server)
            agents_pb2_grpc.add_AgentsServicer_to_server(self.agents, server.server)
            control_pb2_grpc.add_ControlServicer_to_server(self.control, server.server)
            values_pb2_grpc.add_ValuesServicer_to_server(ValuesPeer(), server.server)
            keys_pb2_grpc.add_KeysServicer_to_server(self.keyring, server.server)
        elif name == "audit":
            audit_pb2_grpc.add_AuditServicer_to_server(self.audit, server.server)
        else:
            models_pb2_grpc.add_ModelsServicer_to_server(self.models, server.server)
            models_pb2_grpc.add_ExchangeServicer_to_server(self.exchange, server.server)
            await self.exchange.start()
        self.peers[name] = f"127.0.0.1:{await server.start()}"
        self.servers[name] = server

    async def stop_peer(self, name: str) -> int:
        if name == "router":
            self.exchange.stop()
        await self.servers.pop(name).stop(0)
        return int(self.peers[name].rsplit(":", 1)[1])

    def config(self, **extra: Any) -> ServiceConfig:
        keys = [
            {"name": name, "scope": name, "file": self.secret(f"key-{name}", key)}
            for name, key in self.keys.items()
        ]
        settings = {"http_port": 0, "keys": keys} | extra
        return ServiceConfig(
            service="gateway",
            owner=OWNER,
            postgres=PostgresConfig("127.0.0.1", 1, "hive_gateway", self.secret("pg", "x")),
            nats=self.nats,
            ops_port=free_port(),
            grpc_port=0,
            service_key_file=self.secret("service-key", self.service_key),
            artifacts_dir=str(self.folder / "artifacts"),
            peers=self.peers,
            extra={key: msgspec.Raw(msgspec.json.encode(value)) for key, value in settings.items()},
        )

    def enrol(self, revoked: bool = False) -> None:
        """Have the registry know the device."""
        self.executors.keys[self.device] = executors_pb2.Key(
            executor_id=self.device, public_key=public_nkey(self.seed), owner="o", revoked=revoked
        )

    def assertion(self, off_s: float = 0.0, executor: str = "") -> str:
        """Return what the device shows, with a clock that is `off_s` ahead."""
        return assertion.make(assertion.private_key(self.seed), executor or self.device, time.time() + off_s)

    @property
    def caller(self) -> str:
        return derive_id("caller", OWNER, "admin")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.http_port}"

    def session(self, key: str | None = "admin") -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.keys[key]}"} if key else {}
        return aiohttp.ClientSession(self.url, headers=headers, timeout=aiohttp.ClientTimeout(30))

    async def run(self, stack: contextlib.AsyncExitStack) -> None:
        for name in ("scheduler", "registry", "audit", "router"):
            await self.start_peer(name)
        stack.push_async_callback(self._stop_peers)
        self.gateway = Gateway(self.config())
        self.stop = Stop()
        stack.push_async_callback(self.gateway.peers.close)
        await self.gateway.start(self.stop, stack)

    async def _stop_peers(self) -> None:
        for name in list(self.servers):
            await self.stop_peer(name)


@contextlib.asynccontextmanager
async def _world(folder: Path, nats: NatsConfig) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        world = World(folder, nats)
        await world.run(stack)
        yield world
        assert not world.stop.is_set(), world.stop.reason


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Everything but NATS, which the gateway must be able to do without."""
    nobody = Issuer(Authority.new(), f"nats://127.0.0.1:{free_port()}")
    async with _world(tmp_path, nobody.service("gateway", tmp_path)) as built:
        yield built


@pytest.fixture
async def world_with_nats(tmp_path: Path, nats_server: Any) -> AsyncIterator[World]:
    async with _world(tmp_path, nats_server.issuer.service("gateway", tmp_path)) as built:
        yield built


@pytest.fixture
async def http(world: World) -> AsyncIterator[aiohttp.ClientSession]:
    async with world.session() as session:
        yield session


@pytest.fixture
def eventually() -> Any:
    """Await until a condition holds; the bound is only there so that a failure ends."""

    async def wait(condition: Any, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def read_sse() -> Any:
    """Read server-sent events of a response until it ends or `count` have come; comments are left out."""

    async def read(response: aiohttp.ClientResponse, count: int | None = None) -> list[dict[str, str]]:
        events: list[dict[str, str]] = []
        current: dict[str, str] = {}
        async for raw in response.content:
            line = raw.decode().rstrip("\n")
            if line.startswith(":"):
                continue
            if line:
                field, _, value = line.partition(": ")
                current[field] = value
            elif "data" in current:
                events.append(current)
                current = {}
                if count is not None and len(events) == count:
                    break
            else:
                current = {}
        return events

    return read
