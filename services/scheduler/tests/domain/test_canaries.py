"""Canaries: what an answer says, and of which agents answers are known."""

import msgspec
import pytest
from hive_common.contracts import values
from hive_common.contracts.events import AgentRef, AttemptFailed, AttemptSucceeded
from hive_common.contracts.permissions import KvPermission
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_scheduler.domain.canaries import (
    BYTES_MAX,
    Canary,
    Like,
    answer_key,
    check_agent,
    document,
    ending_of,
    json_of,
)
from hive_scheduler.domain.jobfile import parse_job

ANSWER = b'{"a": 1, "b": [2]}'
REF = AgentRef("square", "1.0.0", "sha256:0", "python", 1 << 20, 1_000, 0)


def canary(equal: str, answer: bytes = ANSWER) -> Canary:
    return Canary("c", "square@1.0.0", b"{}", answer_key(equal, answer), equal)


@pytest.mark.parametrize(
    ("equal", "output", "ending"),
    [
        ("json", b'{"b":[2.0],"a":1e0}', "valid"),
        ("json", b'{"b":[2],"a":2}', "invalid"),
        ("json", b"no json", "invalid"),
        ("exact", ANSWER, "valid"),
        ("exact", b'{"a":1,"b":[2]}', "invalid"),
    ],
)
def test_the_answer_alone_judges(equal, output, ending):
    assert ending_of(canary(equal), AttemptSucceeded(1, values.inline(output))) == ending


def test_what_is_large_is_right_only_by_its_own_bytes():
    large = values.by_digest(ANSWER)
    assert ending_of(canary("exact"), AttemptSucceeded(1, large)) == "valid"
    assert ending_of(canary("exact", b"{}"), AttemptSucceeded(1, large)) == "invalid"
    assert ending_of(canary("json"), AttemptSucceeded(1, large)) == "invalid"


def test_a_failure_is_no_lie():
    assert ending_of(canary("json"), AttemptFailed(1, "agent_error")) == "lost"


def test_agents_whose_answers_are_not_known_by_their_input_have_none():
    check_agent("square@1.0.0", REF)
    check_agent("square@1.0.0", msgspec.structs.replace(REF, scratch_bytes=1))
    with pytest.raises(FailedPrecondition, match="asks for kv"):
        check_agent("square@1.0.0", msgspec.structs.replace(REF, kv=KvPermission("kept", 1)))


def test_texts_are_json_without_blanks_around_it_and_bounded():
    assert json_of("input", b' {"a": 1}\n') == b'{"a": 1}'
    with pytest.raises(InvalidArgument, match="input: has"):
        json_of("input", b" " * (BYTES_MAX + 1))
    with pytest.raises(InvalidArgument, match="answer: is not JSON"):
        json_of("answer", b"{")
    with pytest.raises(InvalidArgument, match="exact or json"):
        answer_key("numeric", b"1")


def test_the_job_is_of_one_task_like_the_real_one():
    spec = parse_job(document(canary("json"), Like("e", "work", 7_000, "low")))
    (step,) = spec.steps
    assert (step.id, step.agent, step.timeout_ms, step.place.executors) == ("work", "square@1.0.0", 7_000, ("e",))
    assert (spec.priority, spec.deadline_ms) == ("low", 187_000)
