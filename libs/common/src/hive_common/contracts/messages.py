"""The JSON bodies on NATS (`proto/subjects.md` says who sends which where).

Each body carries `v`. A receiver refuses a version it does not know, with `invalid_argument`.
"""

import msgspec

from hive_common.contracts.events import AgentRef, Capabilities, Child, KvWrite, Usage
from hive_common.contracts.values import Value
from hive_common.kernel.errors import ErrorBody


class Message(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of all bodies."""

    v: int = 1


class AttemptKey(msgspec.Struct, frozen=True):
    """An attempt: its task and its number."""

    task: str
    attempt: int


class KillOrder(Message, frozen=True, kw_only=True):
    """`hive.control.kill`: an order that stops something, or lifts an order (`hive_common.control`).

    `order` is the text that was signed, JSON itself; `signature` is Ed25519, in base64.
    """

    order: str
    signature: str


class PullRequest(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.pull`: heartbeat and long poll.

    `slots_free` is how many more attempts it takes, and `ahead` how many would wait for a slot there then, with
    those that wait already. `held` are attempts that wait or run; `spooled` have ended and their report is on disk,
    not yet answered. `kill_epoch` is that of the newest kill order that this executor obeys.
    """

    session: str
    sequence: int
    slots_free: int
    memory_free_bytes: int = 0
    held: tuple[AttemptKey, ...] = ()
    spooled: tuple[AttemptKey, ...] = ()
    draining: bool = False
    kill_epoch: int = 0
    ahead: int = 0


class Assignment(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt to run. `timeout_ms` counts from the start of the guest; `pin` and `counts_only` are the job's.

    `token` is the capability token of the attempt; without one it may do nothing beyond computing.
    """

    task: str
    attempt: int
    job: str
    step: str
    agent: AgentRef
    input: Value
    timeout_ms: int
    memory_bytes: int
    fuel: int
    index: int | None = None
    pin: str = ""
    token: str = ""
    counts_only: bool = False


class PullReply(Message, frozen=True, kw_only=True):
    """Answer to a pull: the lease is renewed for `lease_ms` from the *sending* of the request.

    `superseded`: a newer session of this executor pulls; this process must stop.
    `unknown`: the control plane does not know this executor; say hello and pull again.
    `signers`: position of the last event about signing keys. Who knows less says hello before it runs anything.
    `kill`: the newest kill order, where the executor does not have it yet. It counts before all else in here.
    """

    epoch: int = 0
    lease_ms: int = 0
    assignments: tuple[Assignment, ...] = ()
    cancel: tuple[AttemptKey, ...] = ()
    drained: bool = False
    superseded: bool = False
    unknown: bool = False
    signers: int = 0
    kill: KillOrder | None = None
    error: ErrorBody | None = None


class AttemptReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one attempt stands. `status` is `started`, `succeeded`, `failed`, or `cancelled` (given back unrun).

    With `done_permille`, `started` says how many thousandths of the work are done, and is no event: 1 to 1,000.

    `session` is the one the attempt was assigned to, which after a restart is not the one that reports. `forks` are
    the tasks that an attempt which succeeded wants to have made.
    """

    task: str
    attempt: int
    session: str
    status: str
    started_us: int = 0
    ended_us: int = 0
    output: Value | None = None
    code: str | None = None
    message: str = ""
    detail: str = ""
    usage: Usage = Usage()
    log: Value | None = None
    forks: tuple[Child, ...] = ()
    done_permille: int = 0


class ReportRequest(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.report`: a batch of outcomes."""

    session: str
    reports: tuple[AttemptReport, ...]


class ReportResult(msgspec.Struct, frozen=True):
    """Verdict on one report: `accepted`, `late` (changed nothing), or `rejected` (malformed; drop it)."""

    task: str
    attempt: int
    verdict: str


class ReportReply(Message, frozen=True, kw_only=True):
    """Answer to a report: everything that `results` names is committed. With `error` nothing was taken."""

    results: tuple[ReportResult, ...] = ()
    error: ErrorBody | None = None


class HelloRequest(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.hello`: what the device is and can do."""

    name: str
    session: str
    capabilities: Capabilities


class HelloReply(Message, frozen=True, kw_only=True):
    """Answer to a hello. `position` is where the registry's knowledge of this executor stands in the log.

    `signers` are the keys (Ed25519, in hex) whose agents may run, as of `signers_position`. `kill` is the newest
    kill order, if there ever was one.
    """

    position: int = 0
    blobs_url: str = ""
    drained: bool = False
    signers: tuple[str, ...] = ()
    signers_position: int = 0
    kill: KillOrder | None = None
    error: ErrorBody | None = None


class CallRequest(Message, frozen=True, kw_only=True):
    """What is common to requests about model calls.

    `op` `call`: a call, in `parts` pieces of its body; its answer are `StreamChunk`s, at most `credit` ahead of
    what was granted. `op` `credit` grants `credit` more; `op` `cancel` ends the call: nobody waits for it any more.
    """

    op: str
    call: str
    endpoint: str = ""
    model: str = ""
    stream: bool = False
    body: str = ""
    part: int = 0
    parts: int = 1
    credit: int = 0
    deadline_ms: int = 0


class InferRequest(CallRequest, frozen=True, kw_only=True):
    """`hive.exec.<id>.infer`: a model call for a device of the pool, answered on `hive.exec.<id>.stream.<call>`."""


class StreamChunk(Message, frozen=True, kw_only=True):
    """One numbered piece of the answer to a model call, on `hive.exec.<id>.stream.<call>` or at an inbox.

    `sequence` counts from 0 without a gap. The first chunk carries `status` and `content_type`; the last one is
    marked `end`. With `error` it is the last one too, and tells what went wrong.
    """

    sequence: int
    data: str = ""
    status: int = 0
    content_type: str = ""
    route: str = ""
    executor: str = ""
    end: bool = False
    error: ErrorBody | None = None


class ModelCallRequest(CallRequest, frozen=True, kw_only=True):
    """`hive.exec.<id>.call.model`: an executor asks for a model call, for a guest or for a program on its device.

    It is answered at the reply subject; `op` `models` asks for a list of `OfferedModel`. `token` is that of the
    attempt whose guest asks, with the first part of a call: the router takes job, task and attempt from it. Without
    one a program on the device asks. With `counts_only` the log gets no prompt and no completion.
    """

    pin: str = ""
    tokens_max: int = 0
    token: str = ""
    counts_only: bool = False


class ModelCallReport(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.call.model-done`: a call that the device served itself. Answered when it is committed.

    `token` as in `ModelCallRequest`; it may have expired since.
    """

    call: str
    endpoint: str
    model: str
    code: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wall_ms: int = 0
    first_byte_ms: int = 0
    pin: str = "any"
    token: str = ""
    request: Value | None = None
    response: Value | None = None


class Committed(Message, frozen=True, kw_only=True):
    """Answer of a service that has committed what it was told, or says why not."""

    error: ErrorBody | None = None


class KvRequest(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.call.kv`: `op` `get` a key, `list` keys, or `stage` what an attempt wrote, all at once.

    `token` says whose attempt it is and which namespace it may use. To stage the same again changes nothing.
    """

    op: str
    token: str
    namespace: str
    key: str = ""
    prefix: str = ""
    after: str = ""
    limit: int = 0
    writes: tuple[KvWrite, ...] = ()


class KvReply(Message, frozen=True, kw_only=True):
    """Answer to `call.kv`: the value if there is one; keys in order, and whether there are `more` behind them."""

    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    keys: tuple[str, ...] = ()
    more: bool = False
    error: ErrorBody | None = None


class ApproveRequest(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.call.approve`: an attempt may do something only if a person says so. A long poll.

    `token` says whose attempt it is; it may have expired while that waited. `action` is canonical JSON.
    """

    token: str
    action: str


class ApproveReply(Message, frozen=True, kw_only=True):
    """Answer to `call.approve`: `status` is `pending` (ask again), `approved`, `denied` or `expired`.

    `token` comes with `approved`: that of the attempt made anew, which names the hash of this action too. `id` is
    the approval's, `reason` that of whoever denied it.
    """

    status: str = ""
    id: str = ""
    token: str = ""
    reason: str = ""
    error: ErrorBody | None = None


class HeadHint(Message, frozen=True, kw_only=True):
    """`hive.log.head`: the log has grown to `position`. Only a hint; readers poll besides.

    `types` are those of the events that this writer has committed since its last hint; None: of any type.
    """

    position: int
    types: tuple[str, ...] | None = None


class LeaderAnnouncement(Message, frozen=True, kw_only=True):
    """`hive.control.leader`: a scheduler took the lead; executors drop their pending pull and pull again."""

    epoch: int


class LogLine(msgspec.Struct, frozen=True):
    """One line of a guest's log."""

    ts_us: int
    level: str
    text: str


class LogBatch(Message, frozen=True, kw_only=True):
    """`hive.exec.<id>.log.<attempt>`: lines as they come, best effort."""

    job: str
    task: str
    attempt: int
    lines: tuple[LogLine, ...]


def pull_subject(executor: str) -> str:
    """Where an executor pulls."""
    return f"hive.exec.{executor}.pull"


def report_subject(executor: str) -> str:
    """Where an executor reports."""
    return f"hive.exec.{executor}.report"


def hello_subject(executor: str) -> str:
    """Where an executor says hello."""
    return f"hive.exec.{executor}.hello"


def log_subject(executor: str, task: str, attempt: int) -> str:
    """Where the log lines of an attempt go while it runs."""
    return f"hive.exec.{executor}.log.{task}-{attempt}"


def infer_subject(executor: str) -> str:
    """Where a device takes model calls."""
    return f"hive.exec.{executor}.infer"


def stream_subject(executor: str, call: str) -> str:
    """Where a device answers a model call."""
    return f"hive.exec.{executor}.stream.{call}"


def call_subject(executor: str, capability: str) -> str:
    """Where an executor asks a service for what is beyond its device."""
    return f"hive.exec.{executor}.call.{capability}"


def inbox_prefix(executor: str) -> str:
    """The only reply subjects an executor may ask an answer at (checked by responders)."""
    return f"_INBOX.{executor}"


HEAD_SUBJECT = "hive.log.head"
LEADER_SUBJECT = "hive.control.leader"
KILL_SUBJECT = "hive.control.kill"
EVENTS_STREAM = "HIVE_EVENTS"
EVENTS_SUBJECTS = "hive.events.>"


def event_subject(kind: str, event_type: str) -> str:
    """Where the relay publishes an envelope."""
    return f"hive.events.{kind}.{event_type}"
