"""What tasks are given and what a job gives: expressions over values that are inline or blobs."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from hive_common.contracts import values
from hive_common.contracts.events import AgentRef, Judging
from hive_common.contracts.judgement import Producer
from hive_common.contracts.limits import MIB, TASK_INPUT_BYTES_MAX
from hive_common.contracts.values import Value
from hive_common.judgement.joins import Given
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

from hive_scheduler.domain import joining, verdicts
from hive_scheduler.domain.expressions import Template
from hive_scheduler.domain.job import BlobsNeeded, Inputs, JobState, StepState
from hive_scheduler.domain.joining import Output
from hive_scheduler.domain.schemas import Check, Schemas
from hive_scheduler.domain.task import TaskState

SCOPE_BYTES_MAX: Final = 256 * MIB
"""What the expressions of one step may look at in all, decoded in memory."""

NULL: Final = values.inline(b"null")


class Evaluator(Inputs):
    """Makes inputs and outputs with what it was given; what is missing it asks for with `BlobsNeeded`.

    Args:
        schemas: compiled schemas of agents.
        loaded: blobs at hand by digest; None for one that is not in the store.
        stored: digests that are known to be in the store.
    """

    def __init__(
        self, schemas: Schemas, loaded: Mapping[str, bytes | None], stored: set[str] | frozenset[str]
    ) -> None:
        self._schemas = schemas
        self._loaded = loaded
        self._stored = stored

    def expand(self, job: JobState, state: StepState) -> int:
        """Evaluate a step's fork (job.Inputs)."""
        fork = state.step.fork
        assert fork is not None
        found = fork.resolve(self._scope(job, (fork,)))
        if not isinstance(found, list):
            raise InvalidArgument(
                f"{fork.path}: expected a list, got {_kind(found)}", path=fork.path, expected="a list"
            )
        state.items = found
        return len(found)

    def input_of(self, job: JobState, state: StepState, index: int) -> Value:
        """Return the input of one task of a step (job.Inputs)."""
        template = state.step.input
        passed = _passed_on(job, template)
        value = passed if passed is not None else self._resolved_input(job, state, index)
        check = self._schemas.input_of(job.agents[state.step.agent])
        if not (check.trivial and value.raw is None):
            self._check(check, value, state, index)
        return value

    def forked_input(self, job: JobState, given: bytes) -> Value:
        """Return the input of a task that another one forked (job.Inputs); it was checked with the report."""
        return self._value(given, job.takes_inline(len(given)))

    def output_of(self, job: JobState) -> Value:
        """Return the output of a job, null where its document asks for none (job.Inputs)."""
        template = job.spec.output
        if template is None:
            return NULL
        passed = _passed_on(job, template)
        if passed is not None:
            return passed
        data = values.encode_json(template.resolve(self._scope(job, (template,))))
        return self._value(data, values.fits_inline(data))

    def payload(self, value: Value) -> bytes:
        """Return the bytes of a value (job.Inputs)."""
        return self._bytes_of(value)

    def question(self, job: JobState, task: TaskState, judging: Judging, agent: str) -> Value:
        """Return what a judge is given (job.Inputs)."""
        assert task.input is not None and judging.kind != "integrator"
        read = [task.input, *(task.outputs[attempt] for attempt in judging.attempts)]
        self._require(read)
        given, *outputs = [msgspec.Raw(self._bytes_of(value)) for value in read]
        data = values.encode_json(verdicts.question(judging.kind, given, outputs))
        where = f"what {agent} ({judging.kind}) is given"
        self._check_question(data, where, job.agents[agent])
        return self._value(data, values.fits_inline(data) and job.takes_inline(len(data)))

    def integration(self, job: JobState, state: StepState) -> Value:
        """Return what the integrator of a step is given (job.Inputs)."""
        given = joining.integration_of(state)
        agent = state.step.join.integrator
        where = f"what {agent} (integrator of `{state.step.id}`) is given"
        read = [job.input, *(one.value for one in given.results if one.value is not None)]
        byte_count = sum(value.size_bytes for value in read)
        if byte_count > TASK_INPUT_BYTES_MAX:
            raise InvalidArgument(f"{where}: has {byte_count} bytes; expected at most {TASK_INPUT_BYTES_MAX}")
        self._require(read)
        data = values.encode_json(
            {
                "input": self._raw(job.input),
                "results": [self._given(one) for one in given.results],
                "partial": given.partial,
                "succeeded": given.succeeded,
                "size": given.size,
            }
        )
        self._check_question(data, where, job.agents[agent])
        return self._value(data, values.fits_inline(data) and job.takes_inline(len(data)))

    def _given(self, one: Given) -> dict[str, Any]:
        found: dict[str, Any] = {"index": one.index, "status": one.status}
        if one.value is not None:
            found["value"] = self._raw(one.value)
        if one.score is not None:
            found["score"] = one.score
        if one.code:
            found["code"] = one.code
        return found

    def trust(self, job: JobState, task: TaskState, producer: Producer) -> int | None:
        """Check every result (job.Inputs): nothing is known of executors here."""
        return None

    def may_extend(self, job: JobState, task: TaskState) -> bool:
        """Suppose that somebody can (job.Inputs)."""
        return True

    def gone(self, job: JobState, task: TaskState) -> int:
        """Suppose that nobody was revoked (job.Inputs)."""
        return 0

    def _resolved_input(self, job: JobState, state: StepState, index: int) -> Value:
        template = state.step.input
        if state.scope is None:
            state.scope = self._scope(job, (template,))
            if state.step.fork is not None and state.items is None:
                self.expand(job, state)
        scope = state.scope
        if state.items is not None:
            scope["item"], scope["index"] = state.items[index], index
        data = values.encode_json(template.resolve(scope))
        if len(data) > TASK_INPUT_BYTES_MAX:
            raise InvalidArgument(
                f"{_where(state, index)}: has {len(data)} bytes; expected at most {TASK_INPUT_BYTES_MAX}",
                path=template.path,
            )
        return self._value(data, values.fits_inline(data) and job.takes_inline(len(data)))

    def _check(self, check: Check, value: Value, state: StepState, index: int) -> None:
        violation = check.violation(self._bytes_of(value))
        if violation is None:
            return
        raise InvalidArgument(
            f"{_where(state, index)}: does not fit the input schema of {state.step.agent}: {violation}",
            path=state.step.input.path,
        )

    def _check_question(self, data: bytes, where: str, agent: AgentRef) -> None:
        if len(data) > TASK_INPUT_BYTES_MAX:
            raise InvalidArgument(f"{where}: has {len(data)} bytes; expected at most {TASK_INPUT_BYTES_MAX}")
        violation = self._schemas.input_of(agent).violation(data)
        if violation is not None:
            raise InvalidArgument(f"{where}: does not fit its input schema: {violation}")

    def _scope(self, job: JobState, templates: Iterable[Template]) -> dict[str, Any]:
        roots = frozenset[str]().union(*(template.roots for template in templates))
        steps = frozenset[str]().union(*(template.steps for template in templates))
        forked = frozenset[str]().union(*(template.forked for template in templates))
        read: list[Value] = [job.input] if "input" in roots else []
        for step in steps:
            read += _values_of(joining.output_of(job.steps[step]))
            if step in forked:
                read += [task.output for task in job.steps[step].children if task.output is not None]
        self._require(read)
        scope: dict[str, Any] = {}
        if "input" in roots:
            scope["input"] = self._plain(job.input)
        if steps:
            outputs = {step: joining.output_of(job.steps[step]) for step in steps}
            scope["tasks"] = {step: {"output": self._plain_output(one)} for step, one in outputs.items()}
            for step in forked:
                scope["tasks"][step]["forked"] = self._forked(job, job.steps[step])
        return scope

    def _plain_output(self, output: Output) -> Any:
        if isinstance(output, Value):
            return self._plain(output)
        return [self._plain_output(one) for one in output]

    def _forked(self, job: JobState, state: StepState) -> list[dict[str, Any]]:
        """Return what the tasks of a step forked: each child followed by what it forked itself.

        One that did not succeed is left out, or has the default, as the step says of its tasks.
        """
        if not state.children:
            return []
        default = values.inline(state.step.default) if state.step.on_failure == "default" else None
        below = (job.tasks[one] for task in state.tasks for one in job.forks.descendants(task.id))
        outputs = ((task.agent, default if task.output is None else task.output) for task in below)
        return [{"agent": agent, "output": self._plain(output)} for agent, output in outputs if output is not None]

    def _require(self, read: list[Value]) -> None:
        if sum(value.size_bytes for value in read) > SCOPE_BYTES_MAX:
            raise PayloadTooLarge(f"the expressions read more than {SCOPE_BYTES_MAX} bytes of earlier outputs")
        missing = {value.digest for value in read if value.digest is not None} - self._loaded.keys()
        if missing:
            raise BlobsNeeded(load=frozenset(missing))

    def _bytes_of(self, value: Value) -> bytes:
        if value.raw is not None:
            return value.raw
        assert value.digest is not None
        if value.digest not in self._loaded:
            raise BlobsNeeded(load=frozenset({value.digest}))
        data = self._loaded[value.digest]
        if data is None:
            raise InvalidArgument(f"the blob {value.digest} is not in the artifact store", digest=value.digest)
        return data

    def _raw(self, value: Value) -> msgspec.Raw:
        """Return a value as it is, once it is known to be JSON."""
        try:
            return msgspec.json.decode(self._bytes_of(value), type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidArgument(f"{value.digest or 'a value'} is not JSON: {error}") from error

    def _plain(self, value: Value) -> Any:
        try:
            return msgspec.json.decode(self._bytes_of(value))
        except (msgspec.DecodeError, RecursionError) as error:
            name = value.digest or "a value"
            raise InvalidArgument(f"{name} is not JSON: {error}") from error

    def _value(self, data: bytes, inline: bool) -> Value:
        if inline:
            return values.inline(data)
        value = values.by_digest(data)
        assert value.digest is not None
        if value.digest not in self._stored:
            raise BlobsNeeded(store=(data,))
        return value


def _where(state: StepState, index: int) -> str:
    path = state.step.input.path
    return path if state.step.fork is None else f"{path} (element {index} of the fork)"


def _passed_on(job: JobState, template: Template) -> Value | None:
    """Return the value where the template is exactly one output of one task: it need not be looked at."""
    whole = template.whole_output_of
    return None if whole is None else joining.single_output_of(job.steps[whole])


def _values_of(output: Output) -> list[Value]:
    if isinstance(output, Value):
        return [output]
    return [value for one in output for value in _values_of(one)]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def check_static(job: JobState, inputs: Inputs) -> None:
    """Check what can be known of a job before it runs: forks and inputs that read nothing but its input.

    Raises:
        InvalidArgument: a fork over what is not a list, more tasks than the limit, an input that cannot be
            made or does not fit its agent's schema.
        BlobsNeeded: try again with these.
    """
    for state in job.steps.values():
        fork = state.step.fork
        if fork is None:
            state.size = 1
        elif not fork.steps:
            state.size = inputs.expand(job, state)
        if state.size is not None and fork is not None:
            joining.check_size(state.step, state.size)
    total = sum(1 if state.size is None else state.size for state in job.steps.values())
    if total > job.spec.fan_out:
        raise InvalidArgument(
            f"limits.fan_out: the job would have {total} tasks or more, and {job.spec.fan_out} are allowed",
            path="limits.fan_out",
            expected=f"at most {job.spec.fan_out} tasks",
        )
    for state in job.steps.values():
        if state.size is not None and not state.step.input.steps:
            for index in range(state.size):
                inputs.input_of(job, state, index)
