"""How the results of a task are judged: the rule, what it was applied to, and the decision as the log keeps it.

The rules themselves stand in `hive_common.judgement`. Fields are only ever added, with defaults; a later `v` of a
decision is upcast in `parse_decision`, in this one place.
"""

from typing import Final, Literal

import msgspec

from hive_common.kernel.errors import UnknownEvent

Distinct = Literal["none", "executor", "device", "owner"]
OnNone = Literal["extend", "escalate", "fail"]
Ended = Literal["decided", "kept", "escalated", "failed"]
JudgeKind = Literal["critic", "test", "vector", "pairs", "senior"]

REPLICAS_MAX: Final = 100
"""Attempts of one task that are compared: pairs grow with the square."""
DECISION_VERSION: Final = 1


class Exact(msgspec.Struct, frozen=True, tag_field="by", tag="exact"):
    """Equal are the same bytes."""


class CanonicalJson(msgspec.Struct, frozen=True, tag_field="by", tag="json"):
    """Equal is the same JSON: neither the order of members, nor blanks, nor the spelling of a number counts."""


class Numeric(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="by", tag="numeric"):
    """Equal is JSON of the same shape whose numbers differ by `max(absolute, relative x the greater)` at most."""

    absolute: float = 0.0
    relative: float = 0.0


class Embedding(msgspec.Struct, frozen=True, tag_field="by", tag="embedding"):
    """Equal are outputs whose vectors, which an agent makes of each, have at least this cosine."""

    min: float


class PairCritic(msgspec.Struct, frozen=True, tag_field="by", tag="critic"):
    """Equal is what an agent, asked about each pair, says is equal."""


Equality = Exact | CanonicalJson | Numeric | Embedding | PairCritic


class Rule(msgspec.Struct, frozen=True, omit_defaults=True):
    """What makes one of several results the result.

    Attributes:
        k: votes that the winner needs; with 1 nothing is compared, and the first valid result wins.
        of: attempts that are made before `on_none` applies.
        extend_to: attempts that `extend` may make in all.
        equal: when two results are the same.
        distinct: results of one owner, device or executor are one vote.
        on_none: what follows when no result can have `k` votes.
        keep: `all`: no winner is chosen; every valid result goes on, where there are at least `k`.
        min_score: what a critic has to give a result so that it counts; None: none is asked.
        tested: a test agent has to pass a result so that it counts.
    """

    k: int = 1
    of: int = 1
    extend_to: int = 0
    equal: Equality = CanonicalJson()
    distinct: Distinct = "device"
    on_none: OnNone = "extend"
    keep: Literal["first", "all"] = "first"
    min_score: float | None = None
    tested: bool = False


class Producer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt and where it runs, or ran. What is not known of two of them is taken to be the same."""

    attempt: int
    executor: str
    device: str = ""
    owner: str = ""


class Candidate(Producer, frozen=True, omit_defaults=True):
    """An attempt that gave a result.

    Attributes:
        digest: of the result's bytes (`sha256:…`).
        key: under `exact` and `json`: equal results have equal keys (`hive_common.judgement.key_of`).
        score, passed: what the critic and the test said; None while they have not.
    """

    digest: str = ""
    key: str = ""
    score: float | None = None
    passed: bool | None = None


class Pair(msgspec.Struct, frozen=True):
    """Whether two candidates are equal, where no key says so. The lower attempt is `a`."""

    a: int
    b: int
    equal: bool


class Judge(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who said what the rule went by: an attempt of an agent, and of which candidates it judged."""

    kind: JudgeKind
    agent: str
    task: str
    by: Producer
    judged: tuple[int, ...]


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was decided over a task, by which rule, from what: enough to apply the rule again.

    Attributes:
        outcome: `decided`: `winner` won; `kept`: `votes` all go on; `escalated`: a senior agent was given the
            candidates and chose `winner`, or none of them; `failed`: for `reason`.
        votes: attempts that voted for the winner, one for each owner, device or executor that counts.
        candidates, pairs, judges: what was known.
        running: attempts that might still have given results; they were cancelled.
        coming: attempts that were to be made and had no executor.
        gone: so many of these that nobody was left for, since machines were revoked.
        spent: attempts that ended without a result.
    """

    v: int
    task: str
    rule: Rule
    outcome: Ended
    winner: int | None = None
    votes: tuple[int, ...] = ()
    reason: str = ""
    candidates: tuple[Candidate, ...] = ()
    pairs: tuple[Pair, ...] = ()
    judges: tuple[Judge, ...] = ()
    running: tuple[Producer, ...] = ()
    coming: int = 0
    spent: int = 0
    gone: int = 0


_decoder = msgspec.json.Decoder(Decision)


def parse_decision(data: bytes) -> Decision:
    """Return a decision from its JSON.

    Raises:
        UnknownEvent: it is of a later version, or does not fit.
    """
    try:
        decision = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnknownEvent(f"a decision that does not fit its schema: {error}") from error
    if decision.v != DECISION_VERSION:
        raise UnknownEvent(f"a decision of version {decision.v}; known is {DECISION_VERSION}")
    return decision
