"""Submit and cancel: everything is checked before anything is committed."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

import msgspec
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, JobCancelRequested, JobSubmitted
from hive_common.contracts.jobdocument import STEPS_MAX
from hive_common.contracts.limits import BLOB_BYTES_MAX, INLINE_BYTES_MAX, KIB
from hive_common.contracts.values import Value
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import PAYLOAD_BYTES_MAX, LogReader
from hive_common.inference.calls import narrowest
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import (
    Conflict,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    Unavailable,
)
from hive_common.kernel.ids import derive_id, is_id, new_id
from hive_common.rpc.rules import NO_RULES, KeyRules

from hive_scheduler.blobs import Blobs
from hive_scheduler.catalogue import Catalogue
from hive_scheduler.domain.feasibility import check_places
from hive_scheduler.domain.inputs import Evaluator, check_static
from hive_scheduler.domain.job import BlobsNeeded, JobState
from hive_scheduler.domain.jobfile import JobSpec, parse_job
from hive_scheduler.domain.placement import Device
from hive_scheduler.engine import Engine
from hive_scheduler.permits import Permits
from hive_scheduler.resolution import Resolution

SPECS_MAX: Final = 256
"""Compiled job documents that are kept: the same document is often submitted again and again."""
THREAD_BYTES_MIN: Final = 32 * KIB
"""Documents and inputs from this size on are checked in a thread: the loop has leases to keep."""
KEY_CHARACTERS_MAX: Final = 256
CALLER_CHARACTERS_MAX: Final = 256


class Specs:
    """Compiled job documents, by their bytes."""

    def __init__(self) -> None:
        self._specs: OrderedDict[bytes, JobSpec] = OrderedDict()

    def parse(self, document: bytes) -> JobSpec:
        """Return the compiled document. Raises what `parse_job` raises."""
        key = hashlib.sha256(document).digest()
        found = self._specs.get(key)
        if found is None:
            found = self._specs[key] = parse_job(document)
            if len(self._specs) > SPECS_MAX:
                self._specs.popitem(last=False)
        else:
            self._specs.move_to_end(key)
        return found


class Submission(NamedTuple):
    """What a client sends."""

    document: bytes
    input: bytes
    input_digest: str
    idempotency_key: str
    caller: str
    rules: KeyRules = NO_RULES
    canary: str = ""


class Submitted(NamedTuple):
    """What it gets."""

    job: str
    position: int
    existed: bool


class Submissions:
    """Takes jobs and requests to end them."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        blobs: Blobs,
        reader: LogReader,
        clock: Clock,
        specs: Specs,
        ns: str,
        owner: str,
        kills: KillLog,
        permits: Permits,
        devices: Callable[[], Collection[Device]],
    ) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._devices = devices
        self._blobs = blobs
        self._reader = reader
        self._clock = clock
        self._specs = specs
        self._resolution = Resolution(catalogue, kills, permits)
        self._ns = ns
        self._owner = owner
        self._coming: dict[str, asyncio.Lock] = {}

    async def submit(self, request: Submission) -> Submitted:
        """Check a job, commit `JobSubmitted`, and return.

        Raises:
            InvalidArgument, PayloadTooLarge: with `path` in its fields where it lies in the document.
            Conflict: the idempotency key was used for another request.
            PermissionDenied: an agent asks for what is not granted; says the command that would grant it.
            Unavailable: not committed as far as this process knows; the same key makes asking again safe.
        """
        check_caller(request.caller)
        if not request.idempotency_key:
            return await self._create(new_id(self._clock.now_us() // 1_000), request)
        if len(request.idempotency_key) > KEY_CHARACTERS_MAX:
            raise InvalidArgument(f"the idempotency key is longer than {KEY_CHARACTERS_MAX} characters")
        job_id = derive_id(self._ns, request.caller, request.idempotency_key)
        lock = self._coming.setdefault(job_id, asyncio.Lock())
        try:
            async with lock:
                return await self._existing(job_id, request) or await self._create(job_id, request)
        finally:
            if not lock.locked():
                self._coming.pop(job_id, None)

    async def _existing(self, job_id: str, request: Submission) -> Submitted | None:
        found = await self._reader.read(0, 1, streams=[job_id])
        if not found:
            return None
        payload = found[0].payload
        submitted = None if payload is None else events.decode(found[0].type, found[0].schema, payload)
        if not isinstance(submitted, JobSubmitted) or submitted.request_digest != _digest_of(request):
            raise Conflict("this idempotency key was used for another job; choose a new one", job=job_id)
        return Submitted(job_id, found[0].position, True)

    async def _create(self, job_id: str, request: Submission) -> Submitted:
        large = len(request.document) + len(request.input) >= THREAD_BYTES_MIN
        spec = await self._parse(request.document, large)
        pin = _pin_of(spec, request.rules)
        agents = await self._resolution.agents_of(spec, pin)
        await self._require_places(spec, agents, pin)
        event = JobSubmitted(
            name=spec.name,
            document=msgspec.Raw(request.document),
            input=await self._input_of(spec, request),
            agents=agents,
            request_digest=_digest_of(request),
            deadline_us=self._engine.now_us() + spec.deadline_ms * 1_000,
            priority=spec.priority,
            caller=request.caller,
            pin=request.rules.pin,
            counts_only=request.rules.counts_only,
            canary=request.canary,
        )
        job = JobState(job_id, self._owner, event, spec)
        await self._check(job, large or event.input.raw is None)
        committed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def resolve(position: int) -> None:
            if not committed.done():
                committed.set_result(position)

        self._engine.submit(job, _payload_of(event), request.caller or "anonymous", resolve)
        await self._engine.committer.settled()
        return Submitted(job_id, await committed, False)

    async def _require_places(self, spec: JobSpec, agents: dict[str, AgentRef], pin: str) -> None:
        """Refuse a job for which there are not the machines; those that joined a moment ago are looked for."""
        try:
            check_places(spec, agents, self._owner, pin, self._devices())
        except InvalidArgument:
            await self._catalogue.catch_up()
            check_places(spec, agents, self._owner, pin, self._devices())

    async def _parse(self, document: bytes, large: bool) -> JobSpec:
        try:
            if large:
                return await asyncio.to_thread(self._specs.parse, document)
            return self._specs.parse(document)
        except RecursionError as error:
            raise InvalidArgument("the job document is nested too deeply to be read", path="") from error

    async def _input_of(self, spec: JobSpec, request: Submission) -> Value:
        if request.input_digest:
            return await self._input_blob(request.input_digest)
        if request.input:
            if len(request.input) > INLINE_BYTES_MAX:
                raise PayloadTooLarge(
                    f"input: has {len(request.input)} bytes, expected {INLINE_BYTES_MAX} at most; "
                    "store a larger one as a blob and name its digest",
                    path="input",
                )
            try:
                return values.inline(bytes(msgspec.json.decode(request.input, type=msgspec.Raw)))
            except (msgspec.DecodeError, RecursionError) as error:
                raise InvalidArgument(f"input: is not JSON: {error}", path="input") from error
        plain = {} if spec.input is msgspec.UNSET else spec.input
        return await self._blobs.value_of(values.encode_json(plain))

    async def _input_blob(self, digest: str) -> Value:
        size = await self._blobs.size(digest) if values.is_digest(digest) else None
        if size is None:
            raise InvalidArgument(f"input_digest: there is no blob {digest[:80]}", path="input_digest")
        if size > BLOB_BYTES_MAX:
            raise PayloadTooLarge(f"input_digest: the blob has {size} bytes", path="input_digest")
        return Value(digest=digest, size_bytes=size)

    async def _check(self, job: JobState, large: bool) -> None:
        loaded: dict[str, bytes | None] = {}
        while True:
            evaluator = Evaluator(self._engine.schemas, loaded, self._blobs.stored)
            try:
                if large:
                    await asyncio.to_thread(check_static, job, evaluator)
                else:
                    check_static(job, evaluator)
                return
            except RecursionError as error:
                raise InvalidArgument("the job's input is nested too deeply to be read", path="input") from error
            except BlobsNeeded as needed:
                for digest in needed.load:
                    loaded[digest] = await self._blobs.load(digest)
                for data in needed.store:
                    await self._blobs.put(data)

    # --- cancel ---

    async def cancel(self, job_id: str, reason: str, caller: str) -> tuple[str, int]:
        """Ask for the end of a job; return its state and the log's position once that is committed.

        A job that has ended, or that was cancelled before, stays as it is.

        Raises:
            NotFound: there is no such job.
        """
        check_caller(caller)
        job = self._engine.find_job(job_id)
        if job is None:
            return await self._ended_state(job_id), self._engine.committer.position
        if job.end is None and job.cancel_reason is None:
            event = JobCancelRequested(reason[:KEY_CHARACTERS_MAX])
            self._engine.apply(job, job.id, [event], actor=caller or "anonymous")
            self._engine.settle()
        await self._engine.committer.settled()
        return state_of(job), self._engine.committer.position

    async def _ended_state(self, job_id: str) -> str:
        found = await self._reader.read(0, STEPS_MAX + 10, streams=[job_id]) if is_id(job_id) else []
        if not found or found[0].type != "JobSubmitted":
            raise NotFound(f"there is no job {job_id[:80]}", job=job_id[:80])
        state = STATE_AFTER.get(found[-1].type, "running")
        if state == "running":
            # The one that leads has every open job.
            raise Unavailable("this scheduler leads no more; try again")
        return state


def check_caller(caller: str) -> None:
    """Refuse a pseudonym that cannot stand in an envelope. Raises `InvalidArgument`."""
    if len(caller) > CALLER_CHARACTERS_MAX or "\x00" in caller:
        raise InvalidArgument(f"caller: expected {CALLER_CHARACTERS_MAX} characters at most, without NUL")


def _payload_of(event: JobSubmitted) -> bytes:
    payload = events.encode(event)
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"the job with its input and the schemas of its agents has {len(payload)} bytes,"
            f" expected {PAYLOAD_BYTES_MAX} at most"
        )
    return payload


def _pin_of(spec: JobSpec, rules: KeyRules) -> str:
    try:
        return narrowest(spec.pin, rules.pin)
    except PermissionDenied as error:
        raise PermissionDenied(
            f"models.pin: {error.message}; the key that submits the job pins to `{rules.pin}`", path="models.pin"
        ) from error


STATE_AFTER: Final = {
    "JobSubmitted": "running",
    "JobCancelRequested": "cancelling",
    "JobSucceeded": "succeeded",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
}


def state_of(job: JobState) -> str:
    """Return the name of a job's state, as clients see it."""
    if job.end is not None:
        return STATE_AFTER[type(job.end).__name__]
    return "running" if job.cancel_reason is None else "cancelling"


def _digest_of(request: Submission) -> str:
    """Return a digest of everything that makes a request the same one (its parts cannot run together)."""
    digest = hashlib.sha256()
    for part in (request.document, request.input, request.input_digest.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return "sha256:" + digest.hexdigest()
