"""What REST answers about failures, in groups of what failed in the same way."""

from hive_proto.pain.v1 import pain_pb2

from hive_gateway.views import View


class FailureGroup(View, frozen=True, kw_only=True):
    """Failures with the same fingerprint: that of the agent, the code, and what in the message is always the same.

    `agents` (`name@version`) and `executors` (ids) are some of them. `wall_ms`, `model_calls`, `tokens` and
    `nano_usd` are what all those attempts took.
    """

    fingerprint: str
    agent: str
    code: str
    message: str
    failures: int
    jobs: int
    agents: tuple[str, ...]
    executors: tuple[str, ...]
    executor_count: int
    first_us: int
    last_us: int
    wall_ms: int
    model_calls: int
    tokens: int
    nano_usd: int


class FailureGroups(View, frozen=True, kw_only=True):
    """Groups, those with most failures first. `position` is that of the log up to which they are counted.

    `truncated`: there are more failures than are looked at; the newest are.
    """

    groups: tuple[FailureGroup, ...]
    position: int
    truncated: bool


class FailureExample(View, frozen=True, kw_only=True):
    """One failure. `attempt` is null where the task failed without one."""

    job_id: str
    task_id: str
    step: str
    attempt: int | None
    agent: str
    executor: str | None
    message: str
    input_digest: str
    at_us: int
    position: int
    wall_ms: int


class FailureExamples(View, frozen=True, kw_only=True):
    """A group and some of its failures, newest first."""

    group: FailureGroup
    examples: tuple[FailureExample, ...]


def failure_groups(message: pain_pb2.ListResponse) -> FailureGroups:
    """Return the view of groups."""
    return FailureGroups(
        groups=tuple(map(_group, message.groups)), position=message.position, truncated=message.truncated
    )


def failure_examples(message: pain_pb2.GetResponse) -> FailureExamples:
    """Return the view of a group with examples."""
    return FailureExamples(group=_group(message.group), examples=tuple(map(_example, message.examples)))


def _group(message: pain_pb2.Group) -> FailureGroup:
    return FailureGroup(
        fingerprint=message.fingerprint,
        agent=message.agent,
        code=message.code,
        message=message.message,
        failures=message.failures,
        jobs=message.jobs,
        agents=tuple(message.agents),
        executors=tuple(message.executors),
        executor_count=message.executor_count,
        first_us=message.first_us,
        last_us=message.last_us,
        wall_ms=message.wall_ms,
        model_calls=message.model_calls,
        tokens=message.tokens,
        nano_usd=message.nano_usd,
    )


def _example(message: pain_pb2.Example) -> FailureExample:
    return FailureExample(
        job_id=message.job_id,
        task_id=message.task_id,
        step=message.step,
        attempt=message.attempt or None,
        agent=message.agent,
        executor=message.executor or None,
        message=message.message,
        input_digest=message.input_digest,
        at_us=message.at_us,
        position=message.position,
        wall_ms=message.wall_ms,
    )
