"""What REST answers, and how it comes from the messages of the services behind it.

The structs are encoded as they are and described in the OpenAPI document from the same definition. Times are
microseconds since the epoch. JSON that a service passes on as bytes stays those bytes.
"""

import base64
from typing import Any

import msgspec
from hive_proto.agents.v1 import agents_pb2
from hive_proto.audit.v1 import audit_pb2
from hive_proto.control.v1 import control_pb2
from hive_proto.executors.v1 import executors_pb2
from hive_proto.jobs.v1 import jobs_pb2
from hive_proto.models.v1 import models_pb2
from msgspec import UNSET, Raw, UnsetType


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all answers."""


class Submitted(View, frozen=True, kw_only=True):
    """A job that was accepted. `existed`: the idempotency key had been used for the same job before."""

    job_id: str
    position: int
    existed: bool


class TaskCounts(View, frozen=True, kw_only=True):
    """Tasks by state."""

    total: int
    blocked: int
    ready: int
    active: int
    succeeded: int
    failed: int
    cancelled: int


class StepCounts(View, frozen=True, kw_only=True):
    """Tasks of one step of the job document, by state."""

    step: str
    agent: str
    tasks: TaskCounts


class JobError(View, frozen=True, kw_only=True):
    """Why a job did not succeed. `task` is the task that decided it."""

    code: str
    message: str
    task: str | None


class Job(View, frozen=True, kw_only=True):
    """A job. A job that succeeded has its output in `output`, or as a blob under `output_digest`.

    `state` is running, cancelling, succeeded, failed or cancelled. `position` is the last event of the log that
    this view has seen. So many things wait until a person decides as `approvals_open` says. `canary` is the id of
    the canary that an executor is given with it; nobody asked for the job then.
    """

    job_id: str
    name: str
    state: str
    priority: str
    submitted_us: int
    ended_us: int | None
    deadline_us: int
    tasks: TaskCounts
    attempts: int
    position: int
    steps: tuple[StepCounts, ...] = ()
    error: JobError | None = None
    output: Raw | UnsetType = UNSET
    output_digest: str | UnsetType = UNSET
    approvals_open: int = 0
    canary: str = ""


class JobPage(View, frozen=True, kw_only=True):
    """Jobs, newest first, without their outputs. `next` is the `after` of the next page."""

    jobs: tuple[Job, ...]
    next: str | None


class TaskError(View, frozen=True, kw_only=True):
    """Why a task did not succeed."""

    code: str
    message: str


class Judging(View, frozen=True, kw_only=True):
    """What a judge is for: `kind` is critic, test, vector, pairs, senior or integrator.

    `task` is the one whose results it judges, `attempts` are which; null and empty for an integrator.
    """

    kind: str
    task: str | None
    attempts: tuple[int, ...]


class KeptOutput(View, frozen=True, kw_only=True):
    """One of several outputs of a task; neither `output` nor `output_digest` where all would be too large."""

    attempt: int
    size_bytes: int
    output: Raw | UnsetType = UNSET
    output_digest: str | UnsetType = UNSET


class Task(View, frozen=True, kw_only=True):
    """A task. `index` is null where its step does not fork; `executor` is the one of the latest attempt, or where
    results were judged of the winner.

    `parent` is the task that forked this one, null for a task of the job file; with one, `index` is the place among
    what that one forked. `approvals_open` are those that its attempt waits for, and `waits_for` says which machine
    it lacks, null where it waits for nothing but its turn.

    With `replicas`, so many attempts were planned at first, whose results are judged; `decided`: the decision is
    there. `judging` is null for all but judges, which count in no `tasks` of a job. Where all valid results are
    kept, `output` is their list; where that cannot be shown, `kept` has them one by one.
    """

    task_id: str
    job_id: str
    step: str
    index: int | None
    agent: str
    parent: str | None
    state: str
    attempts: int
    executor: str | None
    created_us: int
    ended_us: int | None
    error: TaskError | None = None
    output: Raw | UnsetType = UNSET
    output_digest: str | UnsetType = UNSET
    approvals_open: tuple[str, ...] = ()
    waits_for: str | None = None
    replicas: int = 0
    decided: bool = False
    judging: Judging | None = None
    kept: tuple[KeptOutput, ...] = ()


class TaskPage(View, frozen=True, kw_only=True):
    """Tasks of a job. `next` is the `after` of the next page."""

    tasks: tuple[Task, ...]
    next: str | None


class Event(View, frozen=True, kw_only=True):
    """One event of the log. `stream` is the id of the job or the task; `data` is null where it was erased."""

    position: int
    stream: str
    type: str
    ts_us: int
    version: int
    actor: str
    data: Raw


class EventPage(View, frozen=True, kw_only=True):
    """Events of a job in the order of the log. `next` is the `from_position` of the next page."""

    events: tuple[Event, ...]
    next: int | None


class AttemptLog(View, frozen=True, kw_only=True):
    """The log of one attempt as it was reported: in `lines`, or as a blob under `log_digest`."""

    task_id: str
    step: str
    index: int | None
    attempt: int
    lines: Raw | UnsetType = UNSET
    log_digest: str | UnsetType = UNSET


class Logs(View, frozen=True, kw_only=True):
    """Logs of a job's attempts."""

    logs: tuple[AttemptLog, ...]


class Cancelled(View, frozen=True, kw_only=True):
    """A cancel that was committed; the job ends when all its tasks have."""

    job_id: str
    state: str
    position: int


class AgentReputation(View, frozen=True, kw_only=True):
    """What an executor gave for one agent, `name@version`. `in_a_row`: valid results since the last invalid one."""

    agent: str
    in_a_row: int
    valid: int
    invalid: int
    late: int
    lost: int


class Reputation(View, frozen=True, kw_only=True):
    """What is known of an executor's results: `new`, `known` or `quarantined`, and why.

    `in_a_row` counts among the last 20 that were judged. `agents` only where one executor is asked for.
    """

    standing: str
    in_a_row: int
    valid: int
    invalid: int
    late: int
    lost: int
    agents: tuple[AgentReputation, ...] = ()


class Executor(View, frozen=True, kw_only=True):
    """A device that runs tasks. `state` is online, offline, drained, revoked, or unknown.

    `owner_name` is empty where it is the installation's owner.
    """

    executor_id: str
    name: str
    owner: str
    state: str
    capabilities: Raw
    registered_us: int
    last_seen_us: int | None
    slots: int
    running: int
    position: int
    owner_name: str
    revoked: bool
    reputation: Reputation | None


class IssuedToken(View, frozen=True, kw_only=True):
    """A token with which one machine may join, once. It is shown here and kept nowhere."""

    token_id: str
    token: str
    expires_us: int


class Stop(View, frozen=True, kw_only=True):
    """Something that is stopped, by the order of `epoch`. `scope` says what `target` is; `name` is for people."""

    scope: str
    target: str
    epoch: int
    reason: str
    issued_us: int
    name: str


class Standing(View, frozen=True, kw_only=True):
    """What is stopped, and the newest signed order; `epoch` is 0 and `order` empty before the first one."""

    epoch: int
    order: str
    signature: str
    stops: tuple[Stop, ...]


class Credentials(View, frozen=True, kw_only=True):
    """What an executor connects with: a user JWT for NATS, which its own key completes, and where to connect."""

    executor_id: str
    owner: str
    nats_jwt: str
    expires_us: int
    nats_url: str
    blobs_url: str
    kill_public_key: str
    token_public_key: str


class ExecutorPage(View, frozen=True, kw_only=True):
    """Executors. `next` is the `after` of the next page."""

    executors: tuple[Executor, ...]
    next: str | None


class AgentVersion(View, frozen=True, kw_only=True):
    """A published version of an agent; it never changes.

    `digest` names its OCI manifest, `signature_digest` that of the signature by the key `signer`. `yanked_us` is
    null where new jobs may use the version.
    """

    name: str
    version: str
    digest: str
    manifest: Raw
    published_us: int
    size_bytes: int
    position: int
    signer: str
    signature_digest: str
    yanked_us: int | None
    yank_reason: str


class Signer(View, frozen=True, kw_only=True):
    """A key of an author (Ed25519, in hex), and whether what it signed may be published and run."""

    public_key: str
    name: str
    trusted: bool
    since_us: int
    reason: str
    position: int


class Signers(View, frozen=True, kw_only=True):
    """Keys that are or were trusted, the former first."""

    keys: tuple[Signer, ...]


class AgentPage(View, frozen=True, kw_only=True):
    """Versions of agents. `next` is the `after` of the next page."""

    versions: tuple[AgentVersion, ...]
    next: str | None


class Grant(View, frozen=True, kw_only=True):
    """One permission of an agent. `granted` and `asked` are null where it is not.

    `state`: `granted`, `asked`, `expired`, `stale` (the newest version asks for more than a person decided on) or
    `unused` (it does not ask). `words` say what is granted, or else asked for; `until_us` is null where it does not
    end.
    """

    permission: str
    state: str
    words: str
    granted: Raw
    asked: Raw
    ask: bool
    until_us: int | None
    granted_us: int | None
    position: int


class Grants(View, frozen=True, kw_only=True):
    """What an agent asks for, in its newest `version`, and was granted."""

    name: str
    version: str
    grants: tuple[Grant, ...]


class KeptValue(View, frozen=True, kw_only=True):
    """A value that an agent keeps."""

    key: str
    value: Raw


class KeptKeys(View, frozen=True, kw_only=True):
    """A page of keys. `next` goes into `after` for the page behind it."""

    keys: tuple[str, ...]
    next: str | None = None


class Removed(View, frozen=True, kw_only=True):
    """The key is not there any more."""

    key: str


class Verification(View, frozen=True, kw_only=True):
    """What the auditor found when it read the whole log. Hashes are hexadecimal."""

    ok: bool
    events: int
    head: int
    head_hash: str
    first_bad_position: int | None
    reason: str | None
    log_id: str


class LogEvent(View, frozen=True, kw_only=True):
    """A stored envelope with its payload. Where bytes are not JSON, they stand in the `_base64` member instead.

    `hash` and `salt` are hexadecimal. An export, not this, is what a hash is checked against.
    """

    position: int
    hash: str
    salt: str
    erased: bool
    event: Raw | UnsetType = UNSET
    event_base64: str | UnsetType = UNSET
    payload: Raw | UnsetType = UNSET
    payload_base64: str | UnsetType = UNSET


class LogPage(View, frozen=True, kw_only=True):
    """Events of the log. `next` is the `from` of the next page."""

    events: tuple[LogEvent, ...]
    next: int | None


class ModelCandidate(View, frozen=True, kw_only=True):
    """What could have served a model call. `rejected` names why it could not; `tried` says what came of trying."""

    executor: str
    route: str
    backend: str
    score: float
    rejected: str | None
    detail: str
    tried: str | None


class ModelExplanation(View, frozen=True, kw_only=True):
    """Why a model call went where it went. `outcome` is `succeeded` or the code of an error."""

    call_id: str
    model: str
    route: str
    executor: str
    pin: str
    outcome: str
    candidates: tuple[ModelCandidate, ...]
    provider: str
    nano_usd: int
    estimated: bool


class Status(View, frozen=True, kw_only=True):
    """Health of this process. `problems` names what is not ready."""

    status: str
    problems: tuple[str, ...] = ()


class Stored(View, frozen=True, kw_only=True):
    """A blob that is in the store now."""

    digest: str
    size_bytes: int


NULL = Raw(b"null")


def counts(message: jobs_pb2.TaskCounts) -> TaskCounts:
    """Return the view of task counts."""
    return TaskCounts(
        total=message.total,
        blocked=message.blocked,
        ready=message.ready,
        active=message.active,
        succeeded=message.succeeded,
        failed=message.failed,
        cancelled=message.cancelled,
    )


def job(message: jobs_pb2.Job) -> Job:
    """Return the view of a job."""
    error = None
    if message.error_code:
        error = JobError(code=message.error_code, message=message.error_message, task=message.error_task or None)
    return Job(
        job_id=message.job_id,
        name=message.name,
        state=message.state,
        priority=message.priority,
        submitted_us=message.submitted_us,
        ended_us=message.ended_us or None,
        deadline_us=message.deadline_us,
        tasks=counts(message.tasks),
        attempts=message.attempts,
        position=message.position,
        steps=tuple(StepCounts(step=s.step, agent=s.agent, tasks=counts(s.tasks)) for s in message.steps),
        error=error,
        output=_raw(message.output_json),
        output_digest=message.output_digest or UNSET,
        approvals_open=message.approvals_open,
        canary=message.canary,
    )


def task(message: jobs_pb2.Task) -> Task:
    """Return the view of a task."""
    error = None
    if message.error_code:
        error = TaskError(code=message.error_code, message=message.error_message)
    return Task(
        task_id=message.task_id,
        job_id=message.job_id,
        step=message.step,
        index=_index(message.index),
        agent=message.agent,
        parent=message.parent or None,
        state=message.state,
        attempts=message.attempts,
        executor=message.executor or None,
        created_us=message.created_us,
        ended_us=message.ended_us or None,
        error=error,
        output=_raw(message.output_json),
        output_digest=message.output_digest or UNSET,
        approvals_open=tuple(message.approvals_open),
        waits_for=message.waits_for or None,
        replicas=message.replicas,
        decided=message.decided,
        judging=_judging(message),
        kept=tuple(
            KeptOutput(
                attempt=one.attempt,
                size_bytes=one.size_bytes,
                output=_raw(one.output_json),
                output_digest=one.output_digest or UNSET,
            )
            for one in message.kept
        ),
    )


def _judging(message: jobs_pb2.Task) -> Judging | None:
    if not message.judging:
        return None
    return Judging(kind=message.judging, task=message.judged or None, attempts=tuple(message.judged_attempts))


def event(message: jobs_pb2.JobEvent) -> Event:
    """Return the view of an event of a job. Its JSON has no line breaks, so that it fits a line of a stream."""
    return Event(
        position=message.position,
        stream=message.stream,
        type=message.type,
        ts_us=message.ts_us,
        version=message.version,
        actor=message.actor,
        data=Raw(one_line(message.data_json)) if message.data_json else NULL,
    )


def attempt_log(message: jobs_pb2.AttemptLog) -> AttemptLog:
    """Return the view of an attempt's log."""
    return AttemptLog(
        task_id=message.task_id,
        step=message.step,
        index=_index(message.index),
        attempt=message.attempt,
        lines=_raw(message.log_json),
        log_digest=message.log_digest or UNSET,
    )


def reputation(message: executors_pb2.Reputation) -> Reputation:
    """Return the view of what is known of an executor's results."""
    return Reputation(
        standing=message.standing,
        in_a_row=message.in_a_row,
        valid=message.valid,
        invalid=message.invalid,
        late=message.late,
        lost=message.lost,
        agents=tuple(
            AgentReputation(
                agent=one.agent,
                in_a_row=one.in_a_row,
                valid=one.valid,
                invalid=one.invalid,
                late=one.late,
                lost=one.lost,
            )
            for one in message.agents
        ),
    )


def executor(message: executors_pb2.Executor) -> Executor:
    """Return the view of an executor."""
    return Executor(
        executor_id=message.executor_id,
        name=message.name,
        owner=message.owner,
        state=message.state,
        capabilities=Raw(message.capabilities_json or b"null"),
        registered_us=message.registered_us,
        last_seen_us=message.last_seen_us or None,
        slots=message.slots,
        running=message.running,
        position=message.position,
        owner_name=message.owner_name,
        revoked=message.revoked,
        reputation=reputation(message.reputation) if message.HasField("reputation") else None,
    )


def credentials(message: executors_pb2.Credentials) -> Credentials:
    """Return the view of an executor's credentials."""
    return Credentials(
        executor_id=message.executor_id,
        owner=message.owner,
        nats_jwt=message.nats_jwt,
        expires_us=message.expires_us,
        nats_url=message.nats_url,
        blobs_url=message.blobs_url,
        kill_public_key=message.kill_public_key,
        token_public_key=message.token_public_key,
    )


def standing(message: control_pb2.Standing) -> Standing:
    """Return the view of what is stopped."""
    return Standing(
        epoch=message.epoch,
        order=message.order,
        signature=message.signature,
        stops=tuple(
            Stop(
                scope=one.scope,
                target=one.target,
                epoch=one.epoch,
                reason=one.reason,
                issued_us=one.issued_us,
                name=one.name,
            )
            for one in message.stops
        ),
    )


def agent_version(message: agents_pb2.AgentVersion) -> AgentVersion:
    """Return the view of an agent version."""
    return AgentVersion(
        name=message.name,
        version=message.version,
        digest=message.digest,
        manifest=Raw(message.manifest_json or b"null"),
        published_us=message.published_us,
        size_bytes=message.size_bytes,
        position=message.position,
        signer=message.signer,
        signature_digest=message.signature_digest,
        yanked_us=message.yanked_us or None,
        yank_reason=message.yank_reason,
    )


def signer(message: agents_pb2.SigningKey) -> Signer:
    """Return the view of a signing key."""
    return Signer(
        public_key=message.public_key,
        name=message.name,
        trusted=message.trusted,
        since_us=message.since_us,
        reason=message.reason,
        position=message.position,
    )


def grants(message: agents_pb2.GrantsResponse) -> Grants:
    """Return the view of an agent's grants."""
    return Grants(
        name=message.name,
        version=message.version,
        grants=tuple(
            Grant(
                permission=one.permission,
                state=one.state,
                words=one.words,
                granted=Raw(one.granted_json or b"null"),
                asked=Raw(one.asked_json or b"null"),
                ask=one.ask,
                until_us=one.until_us or None,
                granted_us=one.granted_us or None,
                position=one.position,
            )
            for one in message.grants
        ),
    )


def verification(message: audit_pb2.VerifyResponse) -> Verification:
    """Return the view of a verification."""
    return Verification(
        ok=message.ok,
        events=message.events,
        head=message.head,
        head_hash=message.head_hash.hex(),
        first_bad_position=message.first_bad_position or None,
        reason=message.reason or None,
        log_id=message.log_id,
    )


def log_event(message: audit_pb2.Event) -> LogEvent:
    """Return the view of a stored envelope. It may have been tampered with, so its bytes may be anything."""
    return LogEvent(
        position=message.position,
        hash=message.hash.hex(),
        salt=message.salt.hex(),
        erased=message.erased,
        **_json_or_base64("event", message.event_json),
        **_json_or_base64("payload", message.payload),
    )


def model_explanation(message: models_pb2.Explanation) -> ModelExplanation:
    """Return the view of an explanation."""
    return ModelExplanation(
        call_id=message.call_id,
        model=message.model,
        route=message.route,
        executor=message.executor,
        pin=message.pin,
        outcome=message.outcome,
        provider=message.provider,
        nano_usd=message.nano_usd,
        estimated=message.estimated,
        candidates=tuple(
            ModelCandidate(
                executor=one.executor,
                route=one.route,
                backend=one.backend,
                score=one.score,
                rejected=one.rejected or None,
                detail=one.detail,
                tried=one.tried or None,
            )
            for one in message.candidates
        ),
    )


def one_line(data: bytes) -> bytes:
    """Return JSON without line breaks. A break cannot stand inside a JSON string, so layout is all that goes."""
    return msgspec.json.format(data, indent=-1) if b"\n" in data or b"\r" in data else data


def _raw(data: bytes) -> Raw | UnsetType:
    return Raw(data) if data else UNSET


def _index(index: int) -> int | None:
    return None if index < 0 else index


def _json_or_base64(name: str, data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    try:
        str(data, "utf-8")
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {f"{name}_base64": base64.b64encode(data).decode()}
    return {name: Raw(one_line(data))}
