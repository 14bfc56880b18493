"""`hive.exec.<id>.call.model-done`: calls that a device has served itself, of which the log is told as well."""

import re
from typing import Final

from hive_common.contracts.events import ModelCallFinished, ModelCandidate
from hive_common.contracts.messages import Committed, ModelCallReport
from hive_common.contracts.values import Value, inline_bytes, is_digest
from hive_common.eventlog.log import LogReader, LogWriter
from hive_common.inference.calls import PATHS, PINS, is_pin, narrowest
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import Conflict, InvalidArgument, PermissionDenied, VersionConflict, body_of
from hive_common.kernel.ids import is_id

from hive_router.devices import Devices
from hive_router.domain.selection import LOCAL
from hive_router.metrics import count
from hive_router.recorder import Recorder, record
from hive_router.tokens import Attempt, CapabilityTokens

VALUE_BYTES_MAX: Final = 256 * 1024
_CODE: Final = re.compile(r"[a-z_]{0,64}\Z")
_NAME_CHARS_MAX: Final = 200
_NUMBER_MAX: Final = 1 << 40


class Reports:
    """Takes reports in.

    Args:
        writer, reader: of the log.
        recorder: knows which ids were used here.
        devices: knows whose device an executor is.
        clock: gives the events their time.
        ns: the namespace.
        tokens: read what guests showed.
    """

    def __init__(
        self,
        writer: LogWriter,
        reader: LogReader,
        recorder: Recorder,
        devices: Devices,
        clock: Clock,
        ns: str,
        tokens: CapabilityTokens,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._recorder = recorder
        self._devices = devices
        self._clock = clock
        self._ns = ns
        self._tokens = tokens

    async def report(self, executor: str, report: ModelCallReport) -> Committed:
        """Commit a report. The same one again is as good as the first.

        Raises:
            InvalidArgument: it cannot be stored.
            PermissionDenied: nobody knows the executor, or it was revoked, or shows a token that is not its own, or
                one that has the data elsewhere.
            Conflict: the id belongs to another call.
            Unavailable: the log cannot be reached; report again later.
        """
        owner = self._devices.owner_of(executor)
        if owner is None:
            raise PermissionDenied("this executor is not known here, or was revoked")
        _check(report)
        if self._recorder.knows(report.call):
            raise Conflict(f"call {report.call} is one of the router's")
        is_core = self._devices.is_core(executor) and not report.code
        event = _event(executor, report, self._tokens.attempt_of(executor, report.token), is_core)
        append = record(
            report.call,
            event,
            ts_us=self._clock.now_us(),
            actor=executor,
            owner=owner,
            subject=owner,
            ns=self._ns,
        )
        try:
            await self._writer.append(append)
        except VersionConflict:
            stored = await self._reader.read(0, 1, streams=[report.call], payloads=False)
            if not stored or (stored[0].actor, stored[0].type) != (executor, ModelCallFinished.__name__):
                raise Conflict(f"call {report.call} is not one of this executor") from None
        else:
            count(event.model, event.route, event.code, event.prompt_tokens, event.completion_tokens)
        return Committed()


def report_refused(error: BaseException) -> Committed:
    """Return the answer that tells an error."""
    return Committed(error=body_of(error))


def _check(report: ModelCallReport) -> None:
    if not is_id(report.call):
        raise InvalidArgument("call: expected a UUID", path="call")
    if report.endpoint not in PATHS:
        raise InvalidArgument(f"endpoint: expected {', '.join(PATHS)}", path="endpoint")
    if not 0 < len(report.model) <= _NAME_CHARS_MAX:
        raise InvalidArgument(f"model: expected 1 to {_NAME_CHARS_MAX} characters", path="model")
    if not is_pin(report.pin):
        raise InvalidArgument(f"pin: expected {PINS}", path="pin")
    if not _CODE.match(report.code):
        raise InvalidArgument("code: expected the code of an error", path="code")
    for name in ("prompt_tokens", "completion_tokens", "wall_ms", "first_byte_ms"):
        if not 0 <= getattr(report, name) <= _NUMBER_MAX:
            raise InvalidArgument(f"{name}: expected 0 to {_NUMBER_MAX}", path=name)
    for name, value in (("request", report.request), ("response", report.response)):
        _check_value(name, value)


def _check_value(name: str, value: Value | None) -> None:
    if value is None:
        return
    if inline_bytes(value) > VALUE_BYTES_MAX:
        raise InvalidArgument(f"{name}: longer than {VALUE_BYTES_MAX} bytes; send its digest", path=name)
    if (value.digest is None) == (value.raw is None) or not is_digest(value.digest or "sha256:" + "0" * 64):
        raise InvalidArgument(f"{name}: expected a value or its digest", path=name)


def _event(executor: str, report: ModelCallReport, of: Attempt, is_core: bool) -> ModelCallFinished:
    keeps = not of.counts_only
    return ModelCallFinished(
        endpoint=report.endpoint,
        model=report.model,
        key="",
        route=LOCAL,
        executor=executor,
        code=report.code,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        wall_ms=report.wall_ms,
        first_byte_ms=report.first_byte_ms,
        job=of.job,
        task=of.task,
        attempt=of.attempt,
        pin=narrowest(of.pin, report.pin),
        candidates=(ModelCandidate(executor, LOCAL, tried=report.code or "succeeded"),),
        request=report.request if keeps else None,
        response=report.response if keeps else None,
        core=is_core,
    )
