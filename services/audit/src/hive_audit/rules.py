"""The rule that a job document gives a task, read with code of the auditor's own."""

from collections.abc import Iterable, Iterator

import msgspec
from hive_common.contracts.jobdocument import EqualBy, Job, Quorum, Task
from hive_common.contracts.judgement import (
    REPLICAS_MAX,
    CanonicalJson,
    Embedding,
    Equality,
    Exact,
    Judge,
    JudgeKind,
    Numeric,
    PairCritic,
    Rule,
)
from hive_common.judgement.reputation import TRUSTED_AFTER
from msgspec import UNSET


def rule_of(task: Task) -> Rule:
    """Return the rule of a task whose words were accepted when its job was submitted."""
    speculate, verify = task.speculate, task.verify
    quorum = verify.quorum if verify else None
    critic = verify.critic if verify else None
    made = quorum.of if quorum else speculate.replicas if speculate else 1
    return Rule(
        k=quorum.k if quorum else 1,
        of=made,
        extend_to=_extend_to(quorum) if quorum else 0,
        equal=equality_of(quorum.equal) if quorum else CanonicalJson(),
        distinct=speculate.distinct if speculate else "device",
        on_none=quorum.on_none if quorum else "fail",
        keep=speculate.keep if speculate else "first",
        min_score=(critic.min_score or 0.0) if critic else None,
        tested=verify is not None and verify.test is not None,
    )


def equality_of(words: str | EqualBy) -> Equality:
    """Return what `equal` says."""
    if not isinstance(words, EqualBy):
        return Exact() if words == "exact" else CanonicalJson()
    if words.numeric is not UNSET:
        return Numeric(words.numeric.absolute, words.numeric.relative)
    if words.embedding is not UNSET:
        return Embedding(words.embedding.min)
    return PairCritic()


def task_of(document: bytes, step: str) -> Task | None:
    """Return a task of a job document; None where there is none of that name.

    Raises:
        msgspec.DecodeError: it is no job document.
    """
    job = msgspec.json.decode(document, type=Job)
    return next((one for one in job.tasks if one.id == step), None)


def other_than(task: Task, rule: Rule, trust: int) -> Iterator[str]:
    """Yield in what a decision's rule is another one than its task asks for.

    Less than that was applied in two cases alone: the executor was trusted, or nobody was left to make one more
    result that is independent of the others. Whether that was so, the record of the decision does not show.
    """
    asked = rule_of(task)
    expected = asked
    quorum = task.verify.quorum if task.verify else None
    if trust >= TRUSTED_AFTER and quorum is not None and quorum.adaptive:
        expected = msgspec.structs.replace(asked, k=1, of=1, extend_to=0)
    elif asked.on_none == "extend" and rule.on_none == "fail" and asked.k <= rule.of:
        expected = msgspec.structs.replace(asked, of=rule.of, extend_to=0, on_none="fail")
    for name in Rule.__struct_fields__:
        said, right = getattr(rule, name), getattr(expected, name)
        if said != right:
            yield f"rule: {name} is {_words(said)}, and the job asks for {_words(right)}"


def judges_other_than(task: Task, judges: Iterable[Judge]) -> Iterator[str]:
    """Yield which judges are not the agents that their task names for what they were asked."""
    named = _judges_of(task)
    for one in judges:
        if one.agent != named.get(one.kind):
            asked = named.get(one.kind) or "nobody"
            yield f"judges: {one.agent} ({one.kind}, task {one.task}) was asked, and the job names {asked}"


def _judges_of(task: Task) -> dict[JudgeKind, str]:
    verify = task.verify
    if verify is None:
        return {}
    named: dict[JudgeKind, str] = {}
    if verify.critic is not None:
        named["critic"] = verify.critic.agent
    if verify.test is not None:
        named["test"] = verify.test.agent
    if verify.senior is not None:
        named["senior"] = verify.senior.agent
    equal = verify.quorum.equal if verify.quorum else None
    if isinstance(equal, EqualBy) and equal.embedding is not UNSET:
        named["vector"] = equal.embedding.agent
    if isinstance(equal, EqualBy) and equal.critic is not UNSET:
        named["pairs"] = equal.critic.agent
    return named


def _extend_to(quorum: Quorum) -> int:
    if quorum.on_none != "extend":
        return 0
    return quorum.extend_to or min(2 * quorum.of, REPLICAS_MAX)


def _words(value: object) -> str:
    return msgspec.json.encode(value).decode()
