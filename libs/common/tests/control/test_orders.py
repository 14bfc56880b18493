"""Kill orders: which one may follow, what it stops, and which are refused."""

import base64

import pytest
from hive_common.contracts.messages import KillOrder
from hive_common.control import keys
from hive_common.control.orders import (
    STANDING_MAX,
    Order,
    Stopped,
    check_follows,
    following,
    order_bytes,
    parse_order,
)
from hive_common.control.verifier import FORGED, LOWER_EPOCH, MALFORMED, NO_KEY, REFUSED, REPLAYED, Verifier
from hive_common.kernel.errors import Conflict, FailedPrecondition, HiveError, InvalidArgument, PermissionDenied
from hive_common.kernel.ids import new_id
from hypothesis import given
from hypothesis import strategies as st

JOB, DEVICE = new_id(), new_id()
PEM = keys.new_key()
KEY = keys.private_key(PEM, "here")
PUBLIC = keys.public_text(KEY)

TARGETS = (("all", ""), ("agent", "square"), ("agent", "square@1.0.0"), ("executor", DEVICE), ("job", JOB))


def order(known: Order | None, action: str, scope: str, target: str = "", reason: str = "") -> Order:
    return following(known, action, scope, target, reason, 1)  # type: ignore[arg-type]


def refused(reason: str) -> float:
    return REFUSED.labels(reason)._value.get()


# --- what follows what ---


@given(st.lists(st.tuples(st.sampled_from(("kill", "lift")), st.sampled_from(TARGETS)), max_size=30))
def test_what_is_stopped_is_what_was_killed_and_not_lifted(steps: list[tuple[str, tuple[str, str]]]) -> None:
    known, model = None, set()
    for action, (scope, target) in steps:
        entry = scope if scope == "all" else f"{scope}:{target}"
        fits = (entry in model) == (action == "lift")
        try:
            made = order(known, action, scope, target)
        except (Conflict, FailedPrecondition):
            assert not fits
            continue
        assert fits
        model.symmetric_difference_update({entry})
        assert made.epoch == (known.epoch if known else 0) + 1
        assert set(made.standing) == model
        check_follows(known, made)
        assert parse_order(order_bytes(made)) == made
        known = made


def test_two_mistakes_are_told_in_one_sentence_each() -> None:
    first = order(None, "kill", "agent", "square")
    with pytest.raises(Conflict, match="agent square is stopped already"):
        order(first, "kill", "agent", "square")
    with pytest.raises(FailedPrecondition, match="everything is not stopped"):
        order(first, "lift", "all")


def test_an_order_that_hides_what_stands_does_not_follow() -> None:
    first = order(None, "kill", "agent", "square")
    alone = order(None, "kill", "job", JOB)
    with pytest.raises(InvalidArgument, match="standing"):
        check_follows(first, alone)


def test_no_more_than_an_order_can_name_is_stopped() -> None:
    known = None
    for number in range(STANDING_MAX):
        known = order(known, "kill", "agent", f"a{number}")
    with pytest.raises(FailedPrecondition, match="256 kill orders stand"):
        order(known, "kill", "job", JOB)


@pytest.mark.parametrize(
    ("scope", "target"),
    [("all", "x"), ("agent", ""), ("agent", "a b"), ("agent", "a@"), ("executor", "laptop"), ("job", "1")],
)
def test_a_target_that_is_none_is_refused(scope: str, target: str) -> None:
    with pytest.raises(InvalidArgument, match="target"):
        order(None, "kill", scope, target)


def test_what_an_entry_stops() -> None:
    stopped = Stopped(("agent:square@1.0.0", f"executor:{DEVICE}", f"job:{JOB}"))
    other = new_id()
    assert stopped.attempt(other, "square", "1.0.0", other) == "agent:square@1.0.0"
    assert stopped.attempt(other, "square", "1.0.1", other) is None
    assert stopped.attempt(DEVICE, "other", "1.0.0", other) == f"executor:{DEVICE}"
    assert stopped.attempt(other, "other", "1.0.0", JOB) == f"job:{JOB}"
    assert Stopped(("agent:square",)).agent("square", "7.0.0") == "agent:square"
    assert Stopped(("all",)).executor(other) == "all"
    assert Stopped(("all",)).agent("square", "1.0.0") is None


# --- who obeys what ---


def test_orders_are_obeyed_in_rising_epochs_and_gaps_do_not_matter() -> None:
    verifier = Verifier(PUBLIC)
    first = order(None, "kill", "agent", "square")
    second = order(first, "kill", "job", JOB)
    third = order(second, "lift", "agent", "square")
    verifier.take(keys.sign(KEY, first))
    verifier.take(keys.sign(KEY, third))
    assert (verifier.epoch, list(verifier.stopped)) == (3, [f"job:{JOB}"])


def forged(signed: KillOrder) -> KillOrder:
    return KillOrder(order=signed.order.replace('"kill"', '"lift"'), signature=signed.signature)


FIRST = order(None, "kill", "all")
SECOND = order(FIRST, "lift", "all")


def unspaced(made: Order) -> KillOrder:
    data = order_bytes(made).replace(b'":', b'": ')
    return KillOrder(order=data.decode(), signature=base64.b64encode(KEY.sign(b"hive-kill-order:" + data)).decode())


@pytest.mark.parametrize(
    ("shown", "reason", "error"),
    [
        (forged(keys.sign(KEY, order(SECOND, "kill", "all"))), FORGED, PermissionDenied),
        (keys.sign(keys.private_key(keys.new_key(), ""), order(SECOND, "kill", "all")), FORGED, PermissionDenied),
        (KillOrder(order="{}", signature="no base64"), FORGED, PermissionDenied),
        (keys.sign(KEY, FIRST), LOWER_EPOCH, Conflict),
        (keys.sign(KEY, SECOND), REPLAYED, Conflict),
        (unspaced(order(SECOND, "kill", "all")), MALFORMED, InvalidArgument),
    ],
    ids=["changed", "other key", "no signature", "older", "again", "not canonical"],
)
def test_what_is_not_obeyed_is_counted_and_changes_nothing(
    shown: KillOrder, reason: str, error: type[HiveError]
) -> None:
    verifier = Verifier(PUBLIC)
    verifier.take(keys.sign(KEY, FIRST))
    verifier.take(keys.sign(KEY, SECOND))
    before = refused(reason)
    with pytest.raises(error) as raised:
        verifier.take(shown)
    assert raised.value.fields["reason"] == reason
    assert (refused(reason), verifier.epoch) == (before + 1, 2)


def test_a_signature_over_the_bare_order_is_none() -> None:
    data = order_bytes(FIRST)
    bare = KillOrder(order=data.decode(), signature=base64.b64encode(KEY.sign(data)).decode())
    with pytest.raises(PermissionDenied, match="not signed"):
        Verifier(PUBLIC).take(bare)


def test_who_has_no_key_obeys_nobody() -> None:
    before = refused(NO_KEY)
    with pytest.raises(PermissionDenied, match="no key"):
        Verifier("").take(keys.sign(KEY, FIRST))
    assert refused(NO_KEY) == before + 1


def test_who_decides_takes_only_the_next_one() -> None:
    verifier = Verifier(PUBLIC)
    with pytest.raises(Conflict, match="expected 1"):
        verifier.check_next(keys.sign(KEY, SECOND))
    assert verifier.check_next(keys.sign(KEY, FIRST)) == FIRST


def test_a_key_that_is_none_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidArgument, match="kill_public_key"):
        Verifier("abc")
    with pytest.raises(InvalidArgument, match="secrets/kill-key"):
        keys.private_key("nothing", "secrets/kill-key")
