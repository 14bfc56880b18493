"""The catalogue of events: payload types, their stream kinds, and which of them are terminal.

Stored payloads change by addition only. A type that is not here stops its reader (law 11).
"""

from typing import Any, Final, Literal

import msgspec

from hive_common.contracts.judgement import Decision, JudgeKind
from hive_common.contracts.permissions import (
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.contracts.values import Value
from hive_common.kernel.errors import UnknownEvent


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all event payloads. The class name is the stable type name in the log."""


# --- job ---------------------------------------------------------------------------------------------------


class AgentRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """An agent version as a job uses it, with what placement and limits need of its manifest.

    `model`, `http`, `kv`, `fork` and `scratch_bytes` are what it may do: what its manifest asks for and was granted
    when the job was submitted. `asks` names the permissions for which a person is asked at each use. `signer` is
    the key (Ed25519, in hex) that signed it, `signature` the digest of the manifest of that signature.
    """

    name: str
    version: str
    digest: str
    runtime: str
    memory_bytes: int
    timeout_ms: int
    fuel: int
    input_schema: dict[str, Any] = {}
    output_schema: dict[str, Any] = {}
    model: ModelPermission | None = None
    http: HttpPermission | None = None
    kv: KvPermission | None = None
    fork: ForkPermission | None = None
    scratch_bytes: int = 0
    asks: tuple[str, ...] = ()
    signer: str = ""
    signature: str = ""

    @property
    def permissions(self) -> Permissions:
        """What it may do."""
        return Permissions(
            model=self.model,
            http=self.http,
            kv=self.kv,
            fork=self.fork,
            scratch_bytes=self.scratch_bytes,
            asks=self.asks,
        )


class JobSubmitted(Event, frozen=True):
    """A job was accepted. `document` is the validated job document as JSON bytes.

    `pin` and `counts_only` are of the key that submitted it, and hold for model calls of its guests besides what
    the document says: where their data may go, and whether no prompt and no completion of theirs are kept.
    `canary` is the id of the canary that is given to an executor with it; nobody asked for the job then.
    """

    name: str
    document: msgspec.Raw
    input: Value
    agents: dict[str, AgentRef]
    request_digest: str
    deadline_us: int
    priority: str = "normal"
    caller: str = ""
    pin: str = "any"
    counts_only: bool = False
    canary: str = ""


class JobCancelRequested(Event, frozen=True):
    """Somebody asked for the end of the job. From here on reports of its attempts are late."""

    reason: str = ""


class StepJoined(Event, frozen=True):
    """What became of the results of a step, for all that read its output.

    Results are numbered by their place in the fork; those of a single task that keeps all, by attempt.

    Args:
        kind: `all`, `rank`, `vote` or `integrator`.
        order: numbers of the results that go on, in their order; under `vote` the winner alone.
        votes: numbers of those that voted for the winner.
        tied: one of each answer that has as many votes.
        missing, defaulted: numbers of those of which there is nothing, and of those for which the default stands.
        partial: not everything succeeded.
        closed: the time of the job was running out, and what had not ended was not waited for.
        task: the integrator; its output is the step's.
        by: the rule of equality under `vote`, as in a job document.
    """

    step: str
    kind: str
    order: tuple[int, ...] = ()
    votes: tuple[int, ...] = ()
    tied: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    defaulted: tuple[int, ...] = ()
    partial: bool = False
    closed: bool = False
    task: str = ""
    by: str = ""


class JobSucceeded(Event, frozen=True):
    """All tasks succeeded and the job's output is known."""

    output: Value


class JobFailed(Event, frozen=True):
    """The job cannot succeed any more and all its tasks have ended."""

    code: str
    message: str
    task: str | None = None


class JobCancelled(Event, frozen=True):
    """All tasks have ended after a cancel."""

    reason: str = ""


# --- task --------------------------------------------------------------------------------------------------


class RetryPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """How often and how soon a failed task is tried again. An empty `codes` means every retryable code."""

    max_attempts: int = 1
    backoff_ms: int = 1_000
    codes: tuple[str, ...] = ()


class Judging(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a task is for that judges results of another one, or joins those of a step.

    Attributes:
        kind: how it judges; `integrator` joins the results of its step.
        task: whose results it judges; empty for an integrator.
        attempts: which of them, as it is given them; two under `pairs`.
    """

    kind: JudgeKind | Literal["integrator"]
    task: str = ""
    attempts: tuple[int, ...] = ()


class TaskCreated(Event, frozen=True):
    """A task of a job. Without `input` it is blocked until `TaskReady`; with it, it is ready at once.

    `index` is the place in the list that the step forks over. With `parent`, the id of the task that forked this
    one (`AttemptSucceeded.forks`), it is the place among what that one forked.

    With `replicas`, its results are judged (`TaskDecided`), and so many attempts are made to begin with; 0: the
    first success decides. `judging` says of a task that it is a judge.
    """

    job: str
    step: str
    agent: str
    index: int | None = None
    input: Value | None = None
    timeout_ms: int = 0
    retry: RetryPolicy = RetryPolicy()
    parent: str | None = None
    replicas: int = 0
    judging: Judging | None = None


class TaskReady(Event, frozen=True):
    """What the task needs has succeeded, and its input is known."""

    input: Value


class Placement(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why an executor was picked: how many were looked at, the score, and counts of rejections by reason."""

    considered: int
    score: float
    rejected: dict[str, int] = {}


class TaskAssigned(Event, frozen=True):
    """An attempt was given to a session of an executor. Attempt numbers start at 1 and are never reused.

    `device` and `owner` are those of the executor: of attempts that are judged, and of judges.
    """

    attempt: int
    executor: str
    session: str
    lease_ms: int
    placement: Placement | None = None
    device: str = ""
    owner: str = ""


class AttemptStarted(Event, frozen=True):
    """The executor says that the attempt runs; only sent for attempts that run long."""

    attempt: int
    started_us: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an attempt used, as the executor tells it."""

    wall_ms: int = 0
    fuel: int = 0
    memory_bytes: int = 0


class Child(msgspec.Struct, frozen=True):
    """A task that another one forks: its agent, `name@version`, and its input, JSON."""

    agent: str
    input: msgspec.Raw


class AttemptSucceeded(Event, frozen=True):
    """An executor's claim of success (law 8); the decision over the task is `TaskSucceeded`.

    `forks` are the tasks that become its children once it has decided its task.
    """

    attempt: int
    output: Value
    usage: Usage = Usage()
    log: Value | None = None
    forks: tuple[Child, ...] = ()


class AttemptFailed(Event, frozen=True):
    """The attempt ended with a code of `failure_codes`."""

    attempt: int
    code: str
    message: str = ""
    detail: str = ""
    usage: Usage = Usage()
    log: Value | None = None


class AttemptLost(Event, frozen=True):
    """Nothing more is expected of the attempt: its lease ran out, its session ended, or it was given back."""

    attempt: int
    reason: str


class AttemptLate(Event, frozen=True):
    """A report came for an attempt that was not live any more. At most one per attempt; it changes nothing."""

    attempt: int
    status: str


class TaskRetryScheduled(Event, frozen=True):
    """The task becomes ready again at `not_before_us`."""

    not_before_us: int


class TaskExtended(Event, frozen=True):
    """More attempts of a task whose results are judged.

    Args:
        attempts: how many more.
        reason: `retry` and `lost`: in place of one that failed or was lost; `hedge`: the first is slow; `check`:
            its executor is not trusted, or is looked at again; `extend`: the results do not agree.
        not_before_us: none is assigned before.
    """

    attempts: int
    reason: str
    not_before_us: int = 0


class TaskDecided(Event, frozen=True):
    """What was decided over the results of a task, and from what; the end of the task follows from it.

    `trust`: valid results in a row of the executor, for which its result was taken without another one.
    """

    decision: Decision
    trust: int = 0


class TaskSucceeded(Event, frozen=True):
    """The decision: the output of `attempt` is the task's output.

    Where all valid results are kept (`Decision.outcome`), its output is the list of them; `attempt` is the first.
    """

    attempt: int


class TaskFailed(Event, frozen=True):
    """No attempt decided the task and no retry is left."""

    code: str
    message: str = ""
    attempt: int | None = None


class TaskCancelled(Event, frozen=True):
    """The task ended without a decision: its job was cancelled, failed, or ran out of time."""

    reason: str


# --- executor ----------------------------------------------------------------------------------------------


Tier = Literal["edge", "worker", "core"]
"""Class of a machine, as its owner has set it; the later, the more it can do."""
TIERS: Final[tuple[Tier, ...]] = ("edge", "worker", "core")


class Power(msgspec.Struct, frozen=True, omit_defaults=True):
    """Power state of a device. `battery_percent` is None where there is no battery."""

    battery_percent: int | None = None
    charging: bool = True


class Gpu(msgspec.Struct, frozen=True, omit_defaults=True):
    """A graphics processor that models could use."""

    name: str
    memory_bytes: int = 0


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that something on the device serves.

    `abilities` are `completion`, `tools`, `embedding` and others, by Ollama's names; without any, nobody tells.
    `digest` is of its weights, where a server tells it.
    """

    name: str
    backend: str
    family: str = ""
    size_bytes: int = 0
    quantisation: str = ""
    context_tokens: int = 0
    loaded: bool = False
    abilities: tuple[str, ...] = ()
    digest: str = ""


class Capabilities(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device can do, as its executor reports it. `scratch`: it can give guests folders of a limited size.

    `device` names the machine, for results of distinct machines: executors on one have one. `tier` is `edge`,
    `worker` or `core`.
    """

    os: str
    arch: str
    cores: int
    memory_bytes: int
    slots: int
    runtimes: tuple[str, ...]
    engine: str = ""
    version: str = ""
    gpus: tuple[Gpu, ...] = ()
    power: Power = Power()
    models: tuple[Model, ...] = ()
    labels: dict[str, str] = {}
    scratch: bool = False
    device: str = ""
    tier: str = "worker"


class ExecutorRegistered(Event, frozen=True):
    """An executor said hello for the first time."""

    name: str
    capabilities: Capabilities


class ExecutorCapabilitiesChanged(Event, frozen=True):
    """A later hello differed from what was known (changes of battery percentage within a band do not count)."""

    capabilities: Capabilities


class ExecutorDrainRequested(Event, frozen=True):
    """No new attempts are given to this executor; what it runs may end."""

    reason: str = ""


class ExecutorUndrained(Event, frozen=True):
    """The executor takes new attempts again."""


class ExecutorEnrolled(Event, frozen=True):
    """A machine joined, or a local one got another key. `public_key` is the nkey it made (Ed25519); it proved to
    hold the seed. `owner` is the pseudonym in the envelopes of this executor's events, `owner_name` is for people.
    """

    name: str
    public_key: str
    owner: str
    token: str = ""
    owner_name: str = ""


class ExecutorRevoked(Event, frozen=True):
    """The machine is out, for ever: it may neither connect nor report."""

    reason: str = ""


class ExecutorTrusted(Event, frozen=True):
    """A person trusts the executor again, or anew: its records begin with nothing, and its quarantine has ended."""

    reason: str = ""


# --- token -------------------------------------------------------------------------------------------------


class JoinTokenIssued(Event, frozen=True):
    """Somebody made a token with which one machine may join. Of its secret only the digest is kept."""

    digest: str
    expires_us: int
    owner: str
    owner_name: str = ""


class JoinTokenUsed(Event, frozen=True):
    """The token was used, which works once."""

    executor: str


# --- model -------------------------------------------------------------------------------------------------


class ModelCandidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A back end that a call could have gone to: its score, or the named reason against it."""

    executor: str
    route: str
    backend: str = ""
    score: float = 0.0
    rejected: str = ""
    detail: str = ""
    tried: str = ""


class ModelCallFinished(Event, frozen=True):
    """A model call came to its end. `code` is empty where it succeeded.

    `request` and `response` are kept unless the key says `counts_only`; the envelope's subject is the caller.
    `nano_usd` is what it cost on priced routes, failed tries included; `estimated`: some of that is what was
    reserved for it, since an answer did not say what it used. `block` is whose blocks of money, or of tokens, paid
    for it. `agent` is the guest's. `core`: an executor of tier `core`, or a provider, has answered it.
    """

    endpoint: str
    model: str
    key: str
    route: str
    executor: str
    code: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wall_ms: int = 0
    first_byte_ms: int = 0
    pin: str = "any"
    job: str = ""
    task: str = ""
    attempt: int = 0
    candidates: tuple[ModelCandidate, ...] = ()
    request: Value | None = None
    response: Value | None = None
    provider: str = ""
    agent: str = ""
    nano_usd: int = 0
    estimated: bool = False
    block: str = ""
    core: bool = False


# --- key ---------------------------------------------------------------------------------------------------


class KeyCreated(Event, frozen=True):
    """Somebody made an API key. Of its secret only the digest is kept; a name is used once, for ever.

    Args:
        name: for people; what the key spends counts under it.
        digest: SHA-256 of the secret, in hex.
        scope: `user` may call models and submit jobs, `admin` may do everything.
        pin: where the data of its model calls may go.
        counts_only: keep no prompt and no completion of its model calls.
        cloud: its calls may go to providers outside, within a budget.
    """

    name: str
    digest: str
    scope: str = "user"
    pin: str = "any"
    counts_only: bool = False
    cloud: bool = False


class KeyRevoked(Event, frozen=True):
    """Nobody may use the key any more."""

    reason: str = ""


# --- budget ------------------------------------------------------------------------------------------------


class BudgetLimit(msgspec.Struct, frozen=True):
    """At most so much in a period.

    Args:
        per: `request`, `day` and `month` (UTC), or `ever`.
        unit: `usd` or `tokens`.
        amount: nano-USD, or tokens.
    """

    per: str
    unit: str
    amount: int


class BudgetSet(Event, frozen=True):
    """The limits of a subject are these now, in place of all earlier ones. `subject` is `total`, `key:<name>`,
    `job:<id>`, `task:<id>`, `agent:<name>`, or a key, job or agent with `*`: each that has no limits of its own.
    """

    subject: str
    limits: tuple[BudgetLimit, ...]


class BudgetReserved(Event, frozen=True):
    """Money and tokens were set aside for calls of a day (UTC, `2026-11-26`). All of it counts as spent until some
    of it is returned. `block` names the router's process, which draws from what it has set aside.
    """

    subject: str
    block: str
    day: str
    nano_usd: int
    tokens: int


class BudgetReturned(Event, frozen=True):
    """What was left of a block, or of several, did not cost anything."""

    subject: str
    block: str
    day: str
    nano_usd: int
    tokens: int
    reason: str = ""


# --- agent -------------------------------------------------------------------------------------------------


class AgentVersionPublished(Event, frozen=True):
    """A version of an agent. The stream is the version's; it never changes and is never published twice.

    `signer` is the public key under whose signature it came, `signature` the digest of the OCI manifest that holds
    it; events before there were signatures have neither.
    """

    name: str
    version: str
    digest: str
    manifest: msgspec.Raw
    size_bytes: int = 0
    signer: str = ""
    signature: str = ""


class AgentVersionYanked(Event, frozen=True):
    """Nobody may use the version in a new job any more; it stays what it is. The stream is that of the version."""

    reason: str


class SigningKeyTrusted(Event, frozen=True):
    """What this key signs may be published here. `public_key` is Ed25519, in hex; the stream is the key's."""

    public_key: str
    name: str


class SigningKeyDistrusted(Event, frozen=True):
    """What this key signed may be neither published nor run any more."""

    reason: str = ""


# --- grant -------------------------------------------------------------------------------------------------


class PermissionGranted(Event, frozen=True):
    """All versions of an agent may do something. The stream is the agent's grants.

    Args:
        agent: its name.
        permission: one of `PERMISSIONS`.
        granted: with this permission alone; no wider than what was asked for.
        asked: what the manifest asked for when a person decided; a version that asks for more needs a new grant.
        ask: a person is asked at each use.
        until_us: when it ends; 0: never.
    """

    agent: str
    permission: str
    granted: Permissions
    asked: Permissions
    ask: bool = False
    until_us: int = 0


class PermissionRevoked(Event, frozen=True):
    """A grant was taken back; tasks that are not placed yet do not get it any more."""

    agent: str
    permission: str
    reason: str = ""


# --- kill --------------------------------------------------------------------------------------------------


class KillOrdered(Event, frozen=True):
    """A signed order was accepted: what it names ends and starts no more (law 9), or may start again.

    Args:
        epoch: rises with every order of the installation.
        order: its very bytes, which were signed.
        signature: Ed25519, in base64.
    """

    epoch: int
    order: str
    signature: str


# --- kv ----------------------------------------------------------------------------------------------------


class KvWrite(msgspec.Struct, frozen=True, omit_defaults=True):
    """One write; without a value the key is deleted. `value` is JSON, and may be `null`."""

    key: str
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class KvStaged(Event, frozen=True):
    """Writes of an attempt. They become visible when the attempt decides its task, else never."""

    namespace: str
    task: str
    attempt: int
    writes: tuple[KvWrite, ...]


# --- approval ----------------------------------------------------------------------------------------------


class ApprovalRequested(Event, frozen=True):
    """An attempt waits until a person decides whether it may do something. The stream is that of the task and the
    action, so that a later attempt which wants the same finds the same decision.

    Args:
        attempt: the first that asked.
        agent: `name@version`.
        permission: one of `PERMISSIONS`.
        action: what exactly it wants, as canonical JSON (`hive_common.permissions.actions`).
        hash: SHA-256 of the bytes of `action`, in hex.
        expires_us: nobody may decide any more from then on.
    """

    job: str
    task: str
    attempt: int
    agent: str
    permission: str
    action: str
    hash: str
    expires_us: int


class ApprovalDecided(Event, frozen=True):
    """A person decided. It holds for the action with this hash alone, in attempts of this task.

    Args:
        verdict: `approved` or `denied`.
        by: pseudonym of the key that said so.
        until_us: an approval holds until then.
    """

    verdict: str
    hash: str
    by: str
    reason: str = ""
    until_us: int = 0


class ApprovalExpired(Event, frozen=True):
    """Nobody decided in time, or the task ended meanwhile."""

    reason: str = ""


# --- canary ------------------------------------------------------------------------------------------------


class CanaryAdded(Event, frozen=True):
    """A task whose answer is known is given to executors now and then, among those of others.

    `agent` is `name@version`. `key` is the answer's under `equal` (judgement.equality.key_of): the answer itself is
    kept nowhere.
    """

    agent: str
    input: Value
    key: str
    equal: Literal["exact", "json"] = "json"


class CanaryJudged(Event, frozen=True):
    """An executor has answered a canary, in `task`: rightly, wrongly, or not at all (`lost`)."""

    executor: str
    agent: str
    ending: Literal["valid", "invalid", "lost"]
    task: str


class CanaryRemoved(Event, frozen=True):
    """It is given to nobody any more; what is under way with it judges nobody."""


# --- log ---------------------------------------------------------------------------------------------------


class LogCreated(Event, frozen=True):
    """The genesis event, position 1. It names the log."""

    log: str


KINDS: Final[dict[str, tuple[type[Event], ...]]] = {
    "log": (LogCreated,),
    "job": (JobSubmitted, JobCancelRequested, StepJoined, JobSucceeded, JobFailed, JobCancelled),
    "task": (
        TaskCreated,
        TaskReady,
        TaskAssigned,
        AttemptStarted,
        AttemptSucceeded,
        AttemptFailed,
        AttemptLost,
        AttemptLate,
        TaskRetryScheduled,
        TaskExtended,
        TaskDecided,
        TaskSucceeded,
        TaskFailed,
        TaskCancelled,
    ),
    "executor": (
        ExecutorRegistered,
        ExecutorCapabilitiesChanged,
        ExecutorDrainRequested,
        ExecutorUndrained,
        ExecutorEnrolled,
        ExecutorRevoked,
        ExecutorTrusted,
    ),
    "token": (JoinTokenIssued, JoinTokenUsed),
    "model": (ModelCallFinished,),
    "key": (KeyCreated, KeyRevoked),
    "budget": (BudgetSet, BudgetReserved, BudgetReturned),
    "agent": (AgentVersionPublished, AgentVersionYanked),
    "signer": (SigningKeyTrusted, SigningKeyDistrusted),
    "grant": (PermissionGranted, PermissionRevoked),
    "kill": (KillOrdered,),
    "kv": (KvStaged,),
    "approval": (ApprovalRequested, ApprovalDecided, ApprovalExpired),
    "canary": (CanaryAdded, CanaryJudged, CanaryRemoved),
}

TYPES: Final[dict[str, type[Event]]] = {cls.__name__: cls for kind in KINDS.values() for cls in kind}
KIND_OF: Final[dict[str, str]] = {cls.__name__: kind for kind, classes in KINDS.items() for cls in classes}
SCHEMA: Final = 1
"""Schema version of every payload so far. A later one is upcast in `decode`, in this one place."""

TASK_TERMINAL: Final = frozenset({"TaskSucceeded", "TaskFailed", "TaskCancelled"})
JOB_TERMINAL: Final = frozenset({"JobSucceeded", "JobFailed", "JobCancelled"})

FAILURE_CODES: Final = frozenset(
    {
        "agent_error",
        "invalid_output",
        "timeout",
        "fuel_exhausted",
        "memory_exceeded",
        "output_exceeded",
        "trap",
        "invalid_module",
        "permission_denied",
        "budget_exhausted",
        "killed",
        "runner_died",
        "lost",
    }
)
NOT_COUNTED_CODES: Final = frozenset({"lost", "runner_died"})
"""Failures of the device, not of the agent: they do not count against `max_attempts`."""

_DECODERS = {name: msgspec.json.Decoder(cls) for name, cls in TYPES.items()}
_encode = msgspec.json.Encoder().encode


def encode(event: Event) -> bytes:
    """Return the payload bytes of an event, to be stored as they are (law 10)."""
    return _encode(event)


def kind_of(type_name: str, schema: int) -> str:
    """Return the kind of a stored event's stream, without looking at its payload.

    Raises:
        UnknownEvent: the type or the schema version is not in the catalogue.
    """
    kind = KIND_OF.get(type_name)
    if kind is None or schema != SCHEMA:
        raise UnknownEvent(f"unknown event {type_name} with schema {schema}", type=type_name, schema=schema)
    return kind


def decode(type_name: str, schema: int, payload: bytes) -> Event:
    """Return the event of a stored payload.

    Raises:
        UnknownEvent: the type or the schema version is not in the catalogue, or the payload does not fit it.
    """
    decoder = _DECODERS.get(type_name)
    if decoder is None or schema != SCHEMA:
        raise UnknownEvent(f"unknown event {type_name} with schema {schema}", type=type_name, schema=schema)
    try:
        return decoder.decode(payload)
    except msgspec.ValidationError as error:
        raise UnknownEvent(
            f"the payload of {type_name} does not fit its schema: {error}", type=type_name
        ) from error
