"""What a token says beside what a device says: the narrower of both holds."""

from typing import cast

import pytest
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogReader
from hive_common.inference.calls import PIN_ANY, ModelCall, narrowest
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import BudgetExhausted, InvalidArgument, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.testing.tokens import TokenKey
from hive_router.attempts import Attempts
from hive_router.bodies import prepared
from hive_router.tokens import CapabilityTokens
from hypothesis import given
from hypothesis import strategies as st

KEY = TokenKey()
TOKENS = CapabilityTokens(KEY.public, SystemClock(), KillLog(cast(LogReader, None), "default", ""))
PINS = ("any", "pool", "own-devices", "region:eu", "region:us")

pins = st.sampled_from(PINS)


def call(**fields: object) -> ModelCall:
    values = {
        "id": new_id(),
        "endpoint": "chat",
        "model": "m",
        "body": b"{}",
        "stream": False,
        "deadline_ms": 1_000,
    }
    return ModelCall(**{**values, "origin": "e1", **fields})  # type: ignore[arg-type]


def within_all(pin: str, *bounds: str) -> bool:
    """Say whether a pin lets data go to no place to which one of the bounds does not."""
    return all(narrowest(pin, bound) == pin for bound in bounds)


@given(said=pins, of_job=st.sampled_from(("", *PINS)), granted=pins, counts=st.booleans(), job_counts=st.booleans())
def test_a_call_goes_no_further_than_message_job_and_grant_and_keeps_no_more(
    said: str, of_job: str, granted: str, counts: bool, job_counts: bool
) -> None:
    permissions = Permissions(model=ModelPermission(("m",), 10, granted))
    token = KEY.token("e1", permissions, pin=of_job, counts_only=job_counts)
    asked = call(pin=said, counts_only=counts)
    try:
        found = TOKENS.within(asked, token)
    except PermissionDenied:
        # Two of them exclude each other.
        bounds = [pin for pin in (said, of_job, granted) if pin not in ("", PIN_ANY, "pool")]
        assert len(set(bounds)) > 1
        return
    assert within_all(found.pin, said, of_job or PIN_ANY, granted)
    assert found.pin in (said, of_job, granted)
    assert found.counts_only is (counts or job_counts)


@given(
    asked=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(("told", "kept", "failed"))), max_size=30),
    granted=st.integers(1, 60),
)
def test_calls_of_an_attempt_generate_together_what_was_granted(asked: list[tuple[int, str]], granted: int) -> None:
    attempts, token = Attempts(), KEY.token("e1", Permissions(model=ModelPermission(("m",), granted)))
    generated = 0
    for most, outcome in asked:
        try:
            made = attempts.reserve(TOKENS.within(call(tokens_max=most), token))
        except BudgetExhausted:
            assert generated == granted
            continue
        assert 0 < made.tokens_max <= granted - generated
        if outcome == "failed":
            attempts.release(made)
        else:
            generated += made.tokens_max
    # Another attempt has its own.
    other = KEY.token("e1", Permissions(model=ModelPermission(("m",), granted)), attempt=2)
    assert attempts.reserve(TOKENS.within(call(), other)).tokens_max == granted


def test_attempts_are_forgotten_those_first_that_were_silent_longest() -> None:
    attempts = Attempts(remembered=2)
    for attempt in (1, 2, 1, 3):
        attempts.reserve(call(job="j", task="t", attempt=attempt, tokens_max=1, attempt_tokens_max=2))
    with pytest.raises(BudgetExhausted):
        attempts.reserve(call(job="j", task="t", attempt=1, tokens_max=1, attempt_tokens_max=2))
    assert len(attempts._spent) == 2


@pytest.mark.parametrize(
    ("endpoint", "body", "sent"),
    [
        ("chat", b"{}", b'{"max_tokens":12}'),
        ("chat", b'{"max_tokens":5}', b'{"max_tokens":5}'),
        ("chat", b'{"max_tokens":5,"max_tokens":500}', b'{"max_tokens":12}'),
        ("chat", b'{"max_tokens":500,"max_tokens":5}', b'{"max_tokens":5}'),
        ("chat", b'{"max_tokens":500,"max_completion_tokens":5}', b'{"max_tokens":12,"max_completion_tokens":5}'),
        ("chat", b'{"n_predict":500}', b'{"n_predict":12,"max_tokens":12}'),
        ("chat", b'{"n":4}', b'{"n":4,"max_tokens":3}'),
        ("completions", b'{"best_of":2,"prompt":["a","b"]}', b'{"best_of":2,"prompt":["a","b"],"max_tokens":3}'),
    ],
)
def test_a_body_is_lowered_whatever_it_calls_its_limit_and_however_many_answers_it_asks_for(
    endpoint: str, body: bytes, sent: bytes
) -> None:
    assert prepared(call(endpoint=endpoint, body=body, tokens_max=12)).body == sent


@pytest.mark.parametrize("body", [b'{"n":13}', b'{"max_tokens":0}', b'{"n_predict":-1}', b'{"n":1000}'])
def test_a_body_that_cannot_be_lowered_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        prepared(call(body=body, tokens_max=12))
