"""The words of judgement in a job file: what they mean, and what of them is refused, with the path."""

from typing import Any

import msgspec
import pytest
from hive_common.contracts.jobdocument import Task
from hive_common.contracts.judgement import CanonicalJson, Embedding, Exact, Numeric, PairCritic, Rule
from hive_common.judgement.quorum import check_rule
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.judging import Judging, judging_of


def task(**words: Any) -> dict[str, Any]:
    return {"id": "guess", "agent": "guess@1", **words}


def judging(**words: Any) -> Judging:
    made = judging_of(msgspec.convert(task(**words), Task), "tasks[0]")
    assert made is not None
    check_rule(made.rule)
    return made


def quorum(**words: Any) -> dict[str, Any]:
    return {"quorum": {"k": 2, "of": 3, **words}}


def refused(**words: Any) -> InvalidArgument:
    document = {"apiVersion": "hive/v1", "kind": "Job", "name": "guesses", "tasks": [task(**words)]}
    with pytest.raises(InvalidArgument) as caught:
        parse_job(msgspec.json.encode(document))
    return caught.value


def test_a_task_without_the_words_has_no_rule() -> None:
    assert judging_of(msgspec.convert(task(), Task), "tasks[0]") is None
    assert judging_of(msgspec.convert(task(join="all", fork=[1]), Task), "tasks[0]") is None


def test_a_quorum_makes_as_many_attempts_on_distinct_devices() -> None:
    assert judging(verify=quorum()).rule == Rule(k=2, of=3, extend_to=6, distinct="device", on_none="extend")
    assert judging(verify=quorum(extend_to=4)).rule.extend_to == 4
    assert judging(verify=quorum(on_none="fail"), speculate={"replicas": 3, "distinct": "owner"}).rule == Rule(
        k=2, of=3, distinct="owner", on_none="fail"
    )
    assert judging(verify={"quorum": {"k": 51, "of": 90}}).rule.extend_to == 100


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("exact", Exact()),
        ("json", CanonicalJson()),
        ({"numeric": {"absolute": 0.5}}, Numeric(absolute=0.5)),
        ({"numeric": {"relative": 0.01}}, Numeric(relative=0.01)),
        ({"embedding": {"min": 0.9, "agent": "vector@1"}}, Embedding(0.9)),
        ({"critic": {"agent": "same@1"}}, PairCritic()),
    ],
)
def test_what_is_equal(words: Any, rule: Any) -> None:
    made = judging(verify=quorum(equal=words))
    assert made.rule.equal == rule
    assert made.vector == ("vector@1" if isinstance(rule, Embedding) else "")
    assert made.pair_critic == ("same@1" if isinstance(rule, PairCritic) else "")
    assert made.agents == {agent for agent in (made.vector, made.pair_critic) if agent}


def test_critic_test_and_senior_agent() -> None:
    made = judging(
        verify={
            **quorum(on_none="escalate"),
            "critic": {"agent": "critic@1", "min_score": 0.5},
            "test": {"agent": "test@1"},
            "senior": {"agent": "senior@1"},
        }
    )
    assert (made.rule.min_score, made.rule.tested, made.rule.on_none) == (0.5, True, "escalate")
    assert made.agents == {"critic@1", "test@1", "senior@1"}


def test_replicas_without_a_quorum_end_with_the_first_that_passes() -> None:
    made = judging(speculate={"replicas": 2, "hedge_after": "500ms", "distinct": "executor"})
    assert made.rule == Rule(k=1, of=2, distinct="executor", on_none="fail")
    assert made.hedge_after_ms == 500


@pytest.mark.parametrize(("said", "permille"), [(0.05, 50), (0.1, 100), (0.15, 150), (0.35, 350), (0.95, 950)])
def test_a_hedge_may_go_by_progress(said: float, permille: int) -> None:
    made = judging(speculate={"replicas": 3, "hedge_after": {"progress": said, "within": "2s"}})
    assert (made.hedged, made.planned) == (True, 1)
    assert (made.hedge_after_ms, made.hedge_unless_permille) == (2_000, permille)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ({"progress": 0, "within": "1s"}, ".progress"),
        ({"progress": 1, "within": "1s"}, ".progress"),
        ({"progress": -0.05, "within": "1s"}, ".progress"),
        ({"progress": 0.12, "within": "1s"}, ".progress"),
        ({"progress": 1e300, "within": "1s"}, ".progress"),
        ({"progress": "10%", "within": "1s"}, ".progress"),
        ({"progress": 0.1, "within": "2d"}, ".within"),
        ({"progress": 0.1, "within": 1}, ".within"),
        ({"progress": 0.1, "after": "1s"}, ".after"),
        ({"progress": 0.1}, ""),
        ({"within": "1s"}, ""),
        (1, ""),
    ],
)
def test_progress_that_cannot_be_meant_is_refused_with_its_path(words: Any, path: str) -> None:
    error = refused(speculate={"replicas": 2, "hedge_after": words})
    assert error.fields["path"] == f"tasks[0].speculate.hedge_after{path}", error.message
    alone = refused(speculate={"hedge_after": {"progress": 0.1, "within": "1s"}})
    assert alone.fields["path"] == "tasks[0].speculate.hedge_after"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"verify": {"critic": {"agent": "critic@1", "min_score": "high"}}},
            "verify.critic.min_score: got text; expected a number",
        ),
        (
            {"verify": {"critic": {"agent": "critic@1", "min_score": [1]}}},
            "verify.critic.min_score: got a list; expected a number",
        ),
        ({"verify": {"quorum": {"k": "two", "of": 3}}}, "verify.quorum.k: got text; expected a whole number"),
        ({"verify": {"critic": "critic@1"}}, "verify.critic: got text; expected a mapping"),
        ({"join": 3}, "join: got a whole number; expected text or a mapping"),
    ],
)
def test_what_is_no_such_thing_is_said_in_the_words_of_the_file(words: Any, said: str) -> None:
    assert refused(**words).message.startswith(f"tasks[0].{said}")


def test_joins() -> None:
    critic = {"critic": {"agent": "critic@1"}}
    assert judging(fork=[1, 2], join="vote").join.equal is not None
    assert judging(fork=[1, 2], join={"rank": {"top": 2}}, verify=critic).join.top == 2
    several = judging(speculate={"replicas": 3, "keep": "all"}, join={"integrator": {"agent": "sum@1"}})
    assert (several.rule.keep, several.join.kind, several.agents) == ("all", "integrator", {"sum@1"})


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ({"verify": quorum(k=4)}, "verify.quorum.k"),
        ({"verify": quorum(k=0)}, "verify.quorum.k"),
        ({"verify": quorum(of=101)}, "verify.quorum.of"),
        ({"verify": quorum(extend_to=2)}, "verify.quorum.extend_to"),
        ({"verify": quorum(extend_to=4, on_none="fail")}, "verify.quorum.extend_to"),
        ({"verify": quorum(on_none="escalate")}, "verify.quorum.on_none"),
        ({"verify": {**quorum(), "senior": {"agent": "senior@1"}}}, "verify.senior"),
        ({"verify": quorum(equal={"numeric": {}})}, "verify.quorum.equal.numeric"),
        ({"verify": quorum(equal={"numeric": {"relative": 1}})}, "verify.quorum.equal.numeric.relative"),
        ({"verify": quorum(equal={"numeric": {"absolute": -1}})}, "verify.quorum.equal.numeric.absolute"),
        ({"verify": quorum(equal={"embedding": {"min": 2, "agent": "a@1"}})}, "verify.quorum.equal.embedding.min"),
        ({"verify": quorum(equal={"embedding": {"min": 0, "agent": ""}})}, "verify.quorum.equal.embedding.agent"),
        (
            {"verify": quorum(equal={"embedding": {"min": 0, "agent": "guess@1"}})},
            "verify.quorum.equal.embedding.agent",
        ),
        ({"verify": quorum(equal={})}, "verify.quorum.equal"),
        ({"verify": quorum(equal={"numeric": {"absolute": 1}, "critic": {"agent": "a@1"}})}, "verify.quorum.equal"),
        ({"verify": quorum(equal={"critic": {"agent": "guess@1"}})}, "verify.quorum.equal.critic.agent"),
        ({"verify": quorum(equal={"critic": {"agent": "guess"}})}, "verify.quorum.equal.critic.agent"),
        ({"verify": {"critic": {"agent": "guess@1"}}}, "verify.critic.agent"),
        ({"verify": {"critic": {"agent": "critic"}}}, "verify.critic.agent"),
        ({"verify": {"critic": {"agent": ""}}}, "verify.critic.agent"),
        ({"verify": {"test": {"agent": ""}}}, "verify.test.agent"),
        ({"verify": {"test": {"agent": "guess@1"}}}, "verify.test.agent"),
        (
            {"verify": {**quorum(on_none="escalate"), "senior": {"agent": "guess@1"}}},
            "verify.senior.agent",
        ),
        ({"verify": {"schema": {"type": "nothing"}}}, "verify.schema.type"),
        ({"verify": {"quorum": {"k": 2, "of": 3, "max": 4}}}, "verify.quorum.max"),
        ({"verify": quorum(), "speculate": {"replicas": 2}}, "speculate.replicas"),
        ({"verify": quorum(), "speculate": {"keep": "all"}}, "speculate.keep"),
        ({"verify": quorum(), "speculate": {"hedge_after": "1s"}}, "speculate.hedge_after"),
        ({"speculate": {"replicas": 101}}, "speculate.replicas"),
        ({"speculate": {"hedge_after": "1s"}}, "speculate.hedge_after"),
        ({"speculate": {"replicas": 2, "hedge_after": "1"}}, "speculate.hedge_after"),
        ({"speculate": {"replicas": 2, "hedge_after": "2d"}}, "speculate.hedge_after"),
        ({"speculate": {"keep": "all"}}, "speculate.keep"),
        ({"speculate": {"replica": 2}}, "speculate.replica"),
        ({"join": "vote"}, "join"),
        ({"join": "rank", "fork": [1]}, "join"),
        ({"join": {}, "fork": [1]}, "join"),
        ({"join": {"rank": {"top": 0}}, "fork": [1]}, "join.rank.top"),
        ({"join": {"integrator": {"agent": "sum"}}, "fork": [1]}, "join.integrator.agent"),
        (
            {"join": {"vote": {"equal": {"critic": {"agent": "guess@1"}}}}, "fork": [1]},
            "join.vote.equal.critic",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_path(words: dict[str, Any], path: str) -> None:
    error = refused(**words)
    assert error.fields["path"] == f"tasks[0].{path}", error.message
    assert "not supported yet" not in error.message
