"""The job document `apiVersion: hive/v1, kind: Job`: read strictly, refused with the path of what is wrong."""

import graphlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

import msgspec
from hive_common.artifacts.documents import nearest, refuse, refuse_validation
from hive_common.artifacts.quantities import parse_duration
from hive_common.contracts.events import FAILURE_CODES, RetryPolicy
from hive_common.contracts.limits import (
    ATTEMPTS_MAX,
    DEADLINE_DEFAULT_MS,
    DEADLINE_MAX_MS,
    FAN_OUT_DEFAULT,
    FAN_OUT_MAX,
    JOB_BYTES_MAX,
    TIMEOUT_MAX_MS,
)
from hive_common.inference.calls import PINS, is_pin
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

from hive_scheduler.domain.expressions import Template, compile_template

STEPS_MAX = 1_000
"""Tasks that a job file may name; what a fork makes of them is bounded by `limits.fan_out`."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?\Z")
_STEP_ID = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
_AGENT = re.compile(r"[a-z][a-z0-9-]{0,62}@[0-9A-Za-z.+-]{1,64}\Z")

_EVERYWHERE = frozenset({"input", "tasks"})
_IN_FORK = _EVERYWHERE | {"item", "index"}

Priority = Literal["high", "normal", "low"]
Duration = str


class _Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    deadline: Duration | None = None
    fan_out: int = FAN_OUT_DEFAULT


class _Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_attempts: int = 1
    backoff: Duration = "1s"
    codes: tuple[str, ...] = ()


class _Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    agent: str
    needs: tuple[str, ...] = ()
    fork: Any = None
    input: Any = {}
    join: Literal["all"] = "all"
    timeout: Duration | None = None
    retry: _Retry = _Retry()


class _Models(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pin: str = ""


class _Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    apiVersion: Literal["hive/v1"]
    kind: Literal["Job"]
    name: str
    tasks: tuple[_Task, ...]
    input: Any = msgspec.UNSET
    limits: _Limits = _Limits()
    priority: Priority = "normal"
    output: Any = None
    models: _Models = _Models()


class Step(msgspec.Struct, frozen=True):
    """One entry under `tasks`: a task, or with `fork` one task for each element of a list."""

    id: str
    agent: str
    needs: tuple[str, ...]
    fork: Template | None
    input: Template
    timeout_ms: int | None
    retry: RetryPolicy


class JobSpec(msgspec.Struct, frozen=True):
    """A job document that was found good.

    `steps` are in topological order; `input` may be UNSET; `pin` says where models may see the data, empty: any.
    """

    name: str
    input: Any
    deadline_ms: int
    fan_out: int
    priority: Priority
    steps: tuple[Step, ...]
    output: Template | None
    pin: str = ""

    @property
    def agents(self) -> frozenset[str]:
        """The `name@version` of every agent that the job uses."""
        return frozenset(step.agent for step in self.steps)


def parse_job(document: bytes) -> JobSpec:
    """Read a job document.

    Args:
        document: JSON bytes.

    Raises:
        PayloadTooLarge: it has more than `JOB_BYTES_MAX` bytes.
        InvalidArgument: with `path` in its fields, and what was expected there in the message.
    """
    if len(document) > JOB_BYTES_MAX:
        raise PayloadTooLarge(
            f"the job document has {len(document)} bytes, and {JOB_BYTES_MAX} are the most; "
            "large data belongs into the input"
        )
    try:
        job = msgspec.json.decode(document, type=_Job)
    except msgspec.ValidationError as error:
        refuse_validation(error, "", _Job)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the job document is not JSON: {error}", path="") from error
    _require(_NAME.match(job.name), "name", "lower-case letters, digits, `-`, `_` and `.`, 63 at most", job.name)
    _require(0 < len(job.tasks) <= STEPS_MAX, "tasks", f"1 to {STEPS_MAX} tasks", len(job.tasks))
    _require(1 <= job.limits.fan_out <= FAN_OUT_MAX, "limits.fan_out", f"1 to {FAN_OUT_MAX}", job.limits.fan_out)
    steps = [_step(task, f"tasks[{index}]") for index, task in enumerate(job.tasks)]
    return JobSpec(
        name=job.name,
        input=job.input,
        deadline_ms=_duration(job.limits.deadline, "limits.deadline", DEADLINE_MAX_MS) or DEADLINE_DEFAULT_MS,
        fan_out=job.limits.fan_out,
        priority=job.priority,
        steps=_ordered(steps),
        output=_output(job.output, steps),
        pin=_pin(job.models.pin),
    )


def _pin(pin: str) -> str:
    _require(not pin or is_pin(pin), "models.pin", PINS, pin)
    return pin


def unknown_task(path: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise the error for a task that is named and does not exist."""
    close = nearest(name, known)
    refuse("", path, f"there is no task `{name}`", f"`{close}`" if close else "the id of a task of this job")


def _step(task: _Task, path: str) -> Step:
    _require(_STEP_ID.match(task.id), f"{path}.id", "`[a-z][a-z0-9_]*`, 63 characters at most", task.id)
    _require(_AGENT.match(task.agent), f"{path}.agent", "`name@version`", task.agent)
    fork = None
    if task.fork is not None:
        fork = compile_template(task.fork, f"{path}.fork", _EVERYWHERE)
        _require(
            isinstance(task.fork, list) or (isinstance(task.fork, str) and not fork.constant),
            f"{path}.fork",
            "a list, or one `${…}` that gives a list",
            task.fork,
        )
    template = compile_template(task.input, f"{path}.input", _EVERYWHERE if fork is None else _IN_FORK)
    retry = task.retry
    _require(
        1 <= retry.max_attempts <= ATTEMPTS_MAX,
        f"{path}.retry.max_attempts",
        f"1 to {ATTEMPTS_MAX}",
        retry.max_attempts,
    )
    for code in retry.codes:
        _require(code in FAILURE_CODES, f"{path}.retry.codes", f"codes out of {sorted(FAILURE_CODES)}", code)
    return Step(
        id=task.id,
        agent=task.agent,
        needs=task.needs,
        fork=fork,
        input=template,
        timeout_ms=_duration(task.timeout, f"{path}.timeout", TIMEOUT_MAX_MS),
        retry=RetryPolicy(
            max_attempts=retry.max_attempts,
            backoff_ms=_duration(retry.backoff, f"{path}.retry.backoff", TIMEOUT_MAX_MS) or 0,
            codes=retry.codes,
        ),
    )


def _ordered(steps: list[Step]) -> tuple[Step, ...]:
    by_id: dict[str, Step] = {}
    for index, step in enumerate(steps):
        _require(step.id not in by_id, f"tasks[{index}].id", "ids that differ", step.id)
        by_id[step.id] = step
    for index, step in enumerate(steps):
        for need in step.needs:
            if need not in by_id:
                unknown_task(f"tasks[{index}].needs", need, by_id)
    sorter = graphlib.TopologicalSorter({step.id: step.needs for step in steps})
    try:
        order = tuple(sorter.static_order())
    except graphlib.CycleError as error:
        circle = error.args[1]
        path = f"tasks[{[step.id for step in steps].index(circle[0])}].needs"
        refuse("", path, f"the tasks need each other in a circle: {' → '.join(reversed(circle))}")
    _check_reads(steps, by_id, order)
    return tuple(by_id[step] for step in order)


def _check_reads(steps: list[Step], by_id: Mapping[str, Step], order: tuple[str, ...]) -> None:
    """A task may read the outputs of what it needs, directly or through others, and of nothing else."""
    ancestors: dict[str, set[str]] = {}
    for step in order:
        ancestors[step] = set(by_id[step].needs).union(*(ancestors[need] for need in by_id[step].needs))
    for index, entry in enumerate(steps):
        for field, template in (("fork", entry.fork), ("input", entry.input)):
            for read in sorted(template.steps if template else ()):
                path = f"tasks[{index}].{field}"
                if read not in by_id:
                    unknown_task(path, read, by_id)
                if read not in ancestors[entry.id]:
                    refuse("", path, f"reads the output of `{read}`", f"`{read}` in tasks[{index}].needs")


def _output(value: Any, steps: list[Step]) -> Template | None:
    if value is None:
        return None
    template = compile_template(value, "output", _EVERYWHERE)
    known = [step.id for step in steps]
    for read in sorted(template.steps):
        if read not in known:
            unknown_task("output", read, known)
    return template


def _duration(value: Duration | None, path: str, most_ms: int) -> int | None:
    if value is None:
        return None
    duration_ms = parse_duration(value, path=path)
    _require(0 <= duration_ms <= most_ms, path, f"at most {most_ms // 1000} s", value)
    return duration_ms


def _require(holds: object, path: str, expected: str, got: object) -> None:
    if not holds:
        text = msgspec.json.encode(got).decode()
        shown = text if len(text) <= 80 else text[:77] + "..."
        refuse("", path, f"got {shown}", expected)
