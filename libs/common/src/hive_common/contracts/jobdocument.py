"""The job document `apiVersion: hive/v1, kind: Job` as people write it: its words, and the JSON Schema of them.

What the words may say together is checked in the scheduler. Constraints stand here for editors (`_said`), and are
checked there as well, where errors can say more.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hive_common.contracts.events import Tier
from hive_common.contracts.judgement import REPLICAS_MAX, Distinct, OnNone
from hive_common.contracts.limits import ATTEMPTS_MAX, FAN_OUT_DEFAULT, FAN_OUT_MAX

SCHEMA_ID: Final = "urn:hivefabric:schema:hive-v1:job"
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
STEPS_MAX: Final = 1_000
"""Tasks that a job file may name; what a fork makes of them is bounded by `limits.fan_out`."""

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
STEP_PATTERN: Final = r"^[a-z][a-z0-9_]{0,62}$"
AGENT_PATTERN: Final = r"^[a-z][a-z0-9-]{0,62}@[0-9A-Za-z.+-]{1,64}$"


def _said(text: str, **schema: Any) -> Meta:
    """Describe a word for editors, without a constraint that msgspec would check."""
    return Meta(description=text, extra_json_schema=schema)


def _between(text: str, least: int, most: int) -> Meta:
    return _said(text, minimum=least, maximum=most)


Duration = Annotated[str, _said("A number with ms, s, m, h or d.", pattern=r"^[0-9]{1,18}(ms|s|m|h|d)$")]
AgentName = Annotated[str, _said("An agent and its version.", pattern=AGENT_PATTERN, examples=["review@1.0.0"])]
StepId = Annotated[str, _said("Id of a task of this job.", pattern=STEP_PATTERN)]
Template = Annotated[Any, _said("A value; text may hold `${…}`: JMESPath over input, tasks, item and index.")]
Priority = Literal["high", "normal", "low"]


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what stands in a job document."""


class Budget(Word, frozen=True):
    """What its model calls may cost at most."""

    usd: Annotated[float | None, _said("US dollars.", minimum=0)] = None
    tokens: Annotated[int | None, _said("Tokens, those of prompts and of completions.", minimum=0)] = None


class Place(Word, frozen=True):
    """Where attempts may run."""

    tier: Annotated[Tier | None, _said("The class of the machine, as its owner has set it.")] = None
    executors: Annotated[tuple[str, ...], _said("Names or ids of executors; none: any.")] = ()
    labels: Annotated[dict[str, str], _said("Labels that the executor has to have.")] = {}


class Limits(Word, frozen=True):
    """What bounds the job."""

    deadline: Annotated[Duration | None, _said("From submit to the end of the job; an hour unless it is said.")] = (
        None
    )
    fan_out: Annotated[int, _between("Tasks of the job in all.", 1, FAN_OUT_MAX)] = FAN_OUT_DEFAULT
    budget: Annotated[Budget | None, _said("Of all model calls of the job, those of judges too.")] = None


class Retry(Word, frozen=True):
    """How often and how soon a task that failed is tried again."""

    max_attempts: Annotated[int, _between("Attempts in all.", 1, ATTEMPTS_MAX)] = 1
    backoff: Annotated[Duration, _said("The first pause; it doubles.")] = "1s"
    codes: Annotated[tuple[str, ...], _said("Codes of failures after which it is tried again; none: all.")] = ()


class HedgeByProgress(Word, frozen=True):
    """Another replica starts when no attempt has said in time how far it is (`from hive import progress`)."""

    progress: Annotated[
        float,
        _said("The part of the work, in steps of 0.05: 0.1 is a tenth.", minimum=0.05, maximum=0.95),
    ]
    within: Annotated[Duration, _said("Since the attempt was assigned, and so the replica's own time as well.")]


class Speculate(Word, frozen=True):
    """The task is done several times."""

    replicas: Annotated[
        int, _between("How often; that of `verify.quorum.of`, where there is one.", 1, REPLICAS_MAX)
    ] = 1
    distinct: Annotated[Distinct, _said("What replicas must not have in common, and who has one vote.")] = "device"
    keep: Annotated[
        Literal["first", "all"], _said("`all`: every result that passes goes to the join, with its score.")
    ] = "first"
    hedge_after: Annotated[
        Duration | Literal["p95"] | HedgeByProgress | None,
        _said(
            "Further replicas start only when the first is slower than this; `p95`: than 95 % of the last attempts "
            "of its agent; `{progress: 0.1, within: 5s}`: when it has not said within 5 s that a tenth is done. "
            "Unless it is said, all start at once."
        ),
    ] = None


class NumericEquality(Word, frozen=True):
    """Numbers are equal when they differ by `max(absolute, relative x the greater)` at most."""

    absolute: Annotated[float, _said("In the numbers' own unit.", minimum=0)] = 0.0
    relative: Annotated[float, _said("As a share: 0.01 is one percent.", minimum=0, exclusiveMaximum=1)] = 0.0


class EmbeddingEquality(Word, frozen=True):
    """Results are equal when the vectors that an agent makes of them have at least this cosine."""

    min: Annotated[float, _said("The least cosine.", minimum=-1, maximum=1)]
    agent: Annotated[AgentName, _said("An agent that is asked for the vector of each result.")]


class AgentWord(Word, frozen=True):
    """An agent that is asked."""

    agent: AgentName


class EqualBy(Word, frozen=True):
    """One of these says what is equal."""

    numeric: NumericEquality | UnsetType = UNSET
    embedding: EmbeddingEquality | UnsetType = UNSET
    critic: Annotated[AgentWord | UnsetType, _said("An agent that is asked about each pair.")] = UNSET


# The bounds are of the object: text has no properties.
Equal = Annotated[
    Literal["exact", "json"] | EqualBy, _said("When two results are the same.", minProperties=1, maxProperties=1)
]


class Quorum(Word, frozen=True):
    """`k` of `of` results have to be equal."""

    k: Annotated[int, _between("Votes that a result needs.", 1, REPLICAS_MAX)]
    of: Annotated[int, _between("Results that are asked for.", 1, REPLICAS_MAX)]
    equal: Equal = "json"
    on_none: Annotated[
        OnNone, _said("When no result has the votes: one more attempt, a senior agent, or the task fails.")
    ] = "extend"
    extend_to: Annotated[
        int | None,
        _between(
            "Attempts that `extend` makes in all; twice `of` unless said. With k: 1, of: 1: until one passes.",
            1,
            REPLICAS_MAX,
        ),
    ] = None
    adaptive: Annotated[
        bool, _said("One attempt is enough of an executor whose results were valid; it is checked now and then.")
    ] = False


class Critic(Word, frozen=True):
    """An agent that gives each result a score."""

    agent: AgentName
    min_score: Annotated[float | None, _said("Results below it do not count.")] = None


class Verify(Word, frozen=True):
    """What a result has to be so that it counts."""

    schema: Annotated[dict[str, Any] | None, _said("JSON Schema of the result.")] = None
    quorum: Quorum | None = None
    critic: Critic | None = None
    test: Annotated[AgentWord | None, _said("An agent that passes results or does not.")] = None
    senior: Annotated[AgentWord | None, _said("The agent that `on_none: escalate` gives the results to.")] = None


class Rank(Word, frozen=True):
    """Results by the score of `verify.critic`, the best first."""

    top: Annotated[int | None, _said("How many; all unless it is said.", minimum=1)] = None


class Vote(Word, frozen=True):
    """The result that most are equal to."""

    equal: Equal = "json"


class Integrator(Word, frozen=True):
    """An agent that is given all results."""

    agent: AgentName
    reserve: Annotated[
        Duration | None,
        _said(
            "So long before the job's deadline it gets what there is by then; unless it is said the timeouts of "
            "the agent and of the tasks that follow, and half of the time that the job has at most."
        ),
    ] = None


class JoinBy(Word, frozen=True):
    """One of these makes one output of the results."""

    rank: Rank | UnsetType = UNSET
    vote: Vote | UnsetType = UNSET
    integrator: Integrator | UnsetType = UNSET


class Task(Word, frozen=True):
    """A task, or with `fork` one for each element of a list."""

    id: StepId
    agent: AgentName
    needs: Annotated[tuple[StepId, ...], _said("Tasks that have to have succeeded.")] = ()
    fork: Annotated[Any, _said("A list, or one `${…}` that gives one.")] = None
    input: Template = {}
    join: Annotated[
        Literal["all", "rank", "vote"] | JoinBy,
        _said("What becomes of several results.", minProperties=1, maxProperties=1),
    ] = "all"
    timeout: Annotated[Duration | None, _said("Of one attempt.")] = None
    retry: Retry = Retry()
    speculate: Speculate | None = None
    verify: Verify | None = None
    on_failure: Annotated[
        Literal["fail", "skip", "default"],
        _said(
            "When a task fails for good: the job fails, it is left out, or `default` stands in its place. Unless "
            "it is `fail`, what has not ended shortly before the job's deadline is not waited for."
        ),
    ] = "fail"
    default: Annotated[
        Any, _said("What stands in the place of a task that failed, under `on_failure: default`.")
    ] = UNSET
    minimum: Annotated[
        int, _said("Tasks of the fork that have to succeed, whatever `on_failure` says.", minimum=0)
    ] = 0
    place: Place | None = None
    budget: Annotated[
        Budget | None, _said("Of the model calls of each task, in all its attempts and all that it forks.")
    ] = None


class Models(Word, frozen=True):
    """What holds for calls of models."""

    pin: Annotated[str, _said("Where the job's data may go: own-devices, pool, region:<name> or any.")] = ""


class Job(Word, frozen=True):
    """A job: a graph of tasks."""

    apiVersion: Literal["hive/v1"]
    kind: Literal["Job"]
    name: Annotated[str, _said("Lower-case letters, digits, `-`, `_` and `.`.", pattern=NAME_PATTERN)]
    tasks: Annotated[tuple[Task, ...], _said("In any order.", minItems=1, maxItems=STEPS_MAX)]
    input: Annotated[Any, _said("The job's input, unless one is given when it is run.")] = UNSET
    limits: Limits = Limits()
    priority: Priority = "normal"
    output: Annotated[Any, _said("A value with `${…}`; the job's output.")] = None
    models: Models = Models()


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the document."""
    return {"$schema": DIALECT, "$id": SCHEMA_ID, "title": "HiveFabric job", **msgspec.json.schema(Job)}
