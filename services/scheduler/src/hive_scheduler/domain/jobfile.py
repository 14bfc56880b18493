"""The job document `apiVersion: hive/v1, kind: Job`: read strictly, refused with the path of what is wrong."""

import graphlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import msgspec
from hive_common.artifacts.documents import nearest, refuse, refuse_validation
from hive_common.contracts.events import FAILURE_CODES, RetryPolicy
from hive_common.contracts.jobdocument import (
    NAME_PATTERN,
    STEP_PATTERN,
    STEPS_MAX,
    Budget,
    Job,
    Place,
    Priority,
    Task,
)
from hive_common.contracts.limits import (
    ATTEMPTS_MAX,
    DEADLINE_DEFAULT_MS,
    DEADLINE_MAX_MS,
    FAN_OUT_MAX,
    JOB_BYTES_MAX,
    TIMEOUT_MAX_MS,
)
from hive_common.contracts.values import encode_json
from hive_common.inference.calls import PINS, is_pin
from hive_common.judgement.joins import OnFailure
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge
from msgspec import UNSET

from hive_scheduler.domain.budgets import check_budget
from hive_scheduler.domain.expressions import Template, compile_template
from hive_scheduler.domain.judging import PLAIN_JOIN, Join, Judging, judging_of
from hive_scheduler.domain.words import duration_ms, require, require_agent

_NAME = re.compile(NAME_PATTERN)
_STEP_ID = re.compile(STEP_PATTERN)

_EVERYWHERE = frozenset({"input", "tasks"})
_IN_FORK = _EVERYWHERE | {"item", "index"}


class Step(msgspec.Struct, frozen=True):
    """One entry under `tasks`: a task, or with `fork` one task for each element of a list.

    Attributes:
        judging: how results of its tasks are judged; None where the first success decides.
        join: what becomes of several results.
        default: JSON that stands in the place of a task that failed, under `on_failure: default`.
        minimum: tasks that have to succeed.
        schema: JSON Schema of the results, besides that of the agent.
        place: where attempts may run.
        budget: of the model calls of each task.
    """

    id: str
    agent: str
    needs: tuple[str, ...]
    fork: Template | None
    input: Template
    timeout_ms: int | None
    retry: RetryPolicy
    judging: Judging | None = None
    join: Join = PLAIN_JOIN
    on_failure: OnFailure = "fail"
    default: bytes = b"null"
    minimum: int = 0
    place: Place = Place()
    budget: Budget | None = None
    schema: dict[str, Any] | None = None

    @property
    def agents(self) -> frozenset[str]:
        """The `name@version` of every agent that it names."""
        asked = frozenset[str]() if self.judging is None else self.judging.agents
        by_join = "" if self.join.equal is None else self.join.equal.agent
        return asked | {self.agent, *filter(None, (self.join.integrator, by_join))}


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
    budget: Budget | None = None

    @property
    def agents(self) -> frozenset[str]:
        """The `name@version` of every agent that the job uses."""
        return frozenset[str]().union(*(step.agents for step in self.steps))


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
        job = msgspec.json.decode(document, type=Job)
    except msgspec.ValidationError as error:
        refuse_validation(error, "", Job)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the job document is not JSON: {error}", path="") from error
    require(_NAME.fullmatch(job.name), "name", "lower-case letters, digits, `-`, `_` and `.`, 63 at most", job.name)
    require(0 < len(job.tasks) <= STEPS_MAX, "tasks", f"1 to {STEPS_MAX} tasks", len(job.tasks))
    require(1 <= job.limits.fan_out <= FAN_OUT_MAX, "limits.fan_out", f"1 to {FAN_OUT_MAX}", job.limits.fan_out)
    steps = [_step(task, f"tasks[{index}]") for index, task in enumerate(job.tasks)]
    deadline_ms = duration_ms(job.limits.deadline, "limits.deadline", DEADLINE_MAX_MS) or DEADLINE_DEFAULT_MS
    for index, step in enumerate(steps):
        reserve_ms, path = step.join.reserve_ms or 0, f"tasks[{index}].join.integrator.reserve"
        require(reserve_ms < deadline_ms, path, f"less than limits.deadline, {deadline_ms} ms", f"{reserve_ms} ms")
    return JobSpec(
        name=job.name,
        input=job.input,
        deadline_ms=deadline_ms,
        fan_out=job.limits.fan_out,
        priority=job.priority,
        steps=_ordered(steps),
        output=_output(job.output, steps),
        pin=_pin(job.models.pin),
        budget=check_budget(job.limits.budget, "limits.budget"),
    )


def _pin(pin: str) -> str:
    require(not pin or is_pin(pin), "models.pin", PINS, pin)
    return pin


def unknown_task(path: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise the error for a task that is named and does not exist."""
    close = nearest(name, known)
    refuse("", path, f"there is no task `{name}`", f"`{close}`" if close else "the id of a task of this job")


def _step(task: Task, path: str) -> Step:
    require(_STEP_ID.fullmatch(task.id), f"{path}.id", "`[a-z][a-z0-9_]*`, 63 characters at most", task.id)
    require_agent(task.agent, f"{path}.agent")
    fork = None
    if task.fork is not None:
        fork = compile_template(task.fork, f"{path}.fork", _EVERYWHERE)
        require(
            isinstance(task.fork, list) or (isinstance(task.fork, str) and not fork.constant),
            f"{path}.fork",
            "a list, or one `${…}` that gives a list",
            task.fork,
        )
    template = compile_template(task.input, f"{path}.input", _EVERYWHERE if fork is None else _IN_FORK)
    retry = task.retry
    require(
        1 <= retry.max_attempts <= ATTEMPTS_MAX,
        f"{path}.retry.max_attempts",
        f"1 to {ATTEMPTS_MAX}",
        retry.max_attempts,
    )
    for code in retry.codes:
        require(code in FAILURE_CODES, f"{path}.retry.codes", f"codes out of {sorted(FAILURE_CODES)}", code)
    judging = judging_of(task, path)
    _check_failure(task, path)
    return Step(
        id=task.id,
        agent=task.agent,
        needs=task.needs,
        fork=fork,
        input=template,
        timeout_ms=duration_ms(task.timeout, f"{path}.timeout", TIMEOUT_MAX_MS),
        retry=RetryPolicy(
            max_attempts=retry.max_attempts,
            backoff_ms=duration_ms(retry.backoff, f"{path}.retry.backoff", TIMEOUT_MAX_MS) or 0,
            codes=retry.codes,
        ),
        judging=judging if judging is not None and judging.planned else None,
        join=PLAIN_JOIN if judging is None else judging.join,
        on_failure=task.on_failure,
        default=b"null" if task.default is UNSET else encode_json(task.default),
        minimum=task.minimum,
        place=task.place or Place(),
        budget=check_budget(task.budget, f"{path}.budget"),
        schema=None if task.verify is None else task.verify.schema,
    )


def _check_failure(task: Task, path: str) -> None:
    by_default = task.on_failure == "default"
    if by_default and task.default is UNSET:
        refuse("", f"{path}.on_failure", "nothing is said to stand in its place", "`default` beside it")
    if task.default is not UNSET and not by_default:
        refuse("", f"{path}.default", "nothing ever takes it", "`on_failure: default` beside it")
    require(task.minimum >= 0, f"{path}.minimum", "0 or more", task.minimum)
    require(task.minimum <= 1 or task.fork is not None, f"{path}.minimum", "1 at most without `fork`", task.minimum)


def _ordered(steps: list[Step]) -> tuple[Step, ...]:
    by_id: dict[str, Step] = {}
    for index, step in enumerate(steps):
        require(step.id not in by_id, f"tasks[{index}].id", "ids that differ", step.id)
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
