"""An approval ends once, over the action that was seen, whatever comes in whatever order."""

import pytest
from hive_common.contracts.events import ApprovalDecided, ApprovalExpired, ApprovalRequested
from hive_common.kernel.errors import Conflict, CorruptLog, FailedPrecondition, HiveError
from hive_scheduler.domain import approval as approvals
from hypothesis import given
from hypothesis import strategies as st

HASH, OTHER = "a" * 64, "b" * 64
EXPIRES_US = 1_000
REQUESTED = ApprovalRequested(
    job="j", task="t", attempt=1, agent="a@1", permission="http", action="{}", hash=HASH, expires_us=EXPIRES_US
)

TIMES = st.integers(0, 2 * EXPIRES_US)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("decide"),
            st.sampled_from(approvals.VERDICTS),
            st.sampled_from((HASH, OTHER)),
            st.integers(0, 2_000),
        ),
        st.tuples(st.just("expire")),
    ),
    max_size=12,
)


def requested():
    found = {}
    approvals.evolve(found, "id", REQUESTED)
    return found


@given(STEPS)
def test_it_ends_once_and_never_by_who_saw_another_action_or_came_too_late(steps):
    found = requested()
    approval = found["id"]
    ends = []
    for step in steps:
        before = approval.status
        try:
            if step[0] == "expire":
                decided = approvals.expire(approval, approvals.TIMED_OUT)
            else:
                _, verdict, hash_, now_us = step
                decided = approvals.decide(approval, verdict, hash_, "me", "", now_us, 500)
                assert hash_ == HASH
                # The same decision twice is one; another one is refused.
                assert decided or approval.status == verdict
                assert not decided or now_us < EXPIRES_US
        except HiveError:
            decided = []
        for event in decided:
            assert before == "pending"
            approvals.evolve(found, "id", event)
            ends.append(event)
    assert len(ends) <= 1
    assert (approval.status != "pending") == bool(ends)
    assert approval.version == 1 + len(ends)


@pytest.mark.parametrize(
    "second",
    [REQUESTED, ApprovalExpired(), ApprovalDecided("approved", HASH, "me"), ApprovalDecided("denied", HASH, "me")],
)
def test_a_log_in_which_one_ends_twice_stops_its_reader(second):
    found = requested()
    approvals.evolve(found, "id", ApprovalDecided("denied", HASH, "me"))
    with pytest.raises(CorruptLog):
        approvals.evolve(found, "id", second)


def test_a_decision_over_another_action_stops_its_reader():
    for event in (ApprovalDecided("approved", OTHER, "me"), ApprovalDecided("perhaps", HASH, "me")):
        with pytest.raises(CorruptLog):
            approvals.evolve(requested(), "id", event)


def test_a_changed_action_and_a_late_decision_are_refused_by_name():
    approval = requested()["id"]
    with pytest.raises(Conflict, match=HASH):
        approvals.decide(approval, "approved", OTHER, "me", "", 0, 500)
    with pytest.raises(FailedPrecondition, match="has expired: nobody decided in time"):
        approvals.decide(approval, "approved", HASH, "me", "", EXPIRES_US, 500)


def test_an_approval_holds_for_a_while_and_a_refusal_for_ever():
    approval = requested()["id"]
    assert approvals.decide(approval, "approved", HASH, "me", "fine", 10, 500) == [
        ApprovalDecided("approved", HASH, "me", "fine", 510)
    ]
    assert approvals.decide(approval, "denied", HASH, "me", "no", 10, 500) == [
        ApprovalDecided("denied", HASH, "me", "no", 0)
    ]
