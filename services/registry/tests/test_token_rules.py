"""Tokens and enrolment as decisions: who gets in, who does not and why, whatever comes in which order."""

from collections.abc import Callable
from typing import Any

import msgspec
import nkeys
import pytest
from hive_common.contracts.events import ExecutorEnrolled, ExecutorRevoked, JobCancelled, JoinTokenUsed
from hive_common.contracts.joining import proof_of
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    UnknownEvent,
)
from hive_common.kernel.ids import new_id
from hive_registry.domain.executors import UNKNOWN, ExecutorState, evolve, revoke
from hive_registry.domain.tokens import (
    NEVER_ISSUED,
    VALID_S_MAX,
    Enrolment,
    TokenState,
    digest_of_secret,
    enrol,
    evolve_token,
    issue,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

NOW_US = 1_790_000_000_000_000
HOUR_US = 3_600_000_000
TOKEN_ID = new_id()
SECRET = "a secret of many characters"


class Machine:
    """A machine with a key, that joins."""

    def __init__(self, number: int) -> None:
        seed = nkeys.encode_seed(bytes([number]) * 32, nkeys.PREFIX_BYTE_USER)
        self.pair = nkeys.from_seed(bytearray(seed))
        self.key = self.pair.public_key.decode()

    def shows(self, token_id: str = TOKEN_ID, secret: str = SECRET, name: str = "laptop") -> Enrolment:
        return Enrolment(token_id, secret, self.key, name, self.pair.sign(proof_of(token_id, name)))


LAPTOP, DESKTOP = Machine(1), Machine(2)


def token_after(*events: Any, start: TokenState = NEVER_ISSUED) -> TokenState:
    for event in events:
        start = evolve_token(start, event)
    return start


OPEN = token_after(*issue(digest_of_secret(SECRET), 0, "owner-1", "Grandma", NOW_US))
USED = token_after(JoinTokenUsed(executor=LAPTOP.shows().executor), start=OPEN)
JOINED = evolve(UNKNOWN, ExecutorEnrolled(name="laptop", public_key=LAPTOP.key, owner="owner-1", token=TOKEN_ID))


def test_a_token_admits_the_machine_that_shows_it() -> None:
    admitted = enrol(OPEN, UNKNOWN, LAPTOP.shows(), NOW_US)
    executor = LAPTOP.shows().executor
    assert admitted.token == (JoinTokenUsed(executor=executor),)
    (enrolled,) = admitted.executor
    assert enrolled == ExecutorEnrolled(
        name="laptop", public_key=LAPTOP.key, owner="owner-1", token=TOKEN_ID, owner_name="Grandma"
    )


def test_the_secret_is_not_kept() -> None:
    (issued,) = issue(digest_of_secret(SECRET), 60, "o", "", NOW_US)
    assert SECRET.encode() not in msgspec.json.encode(issued)
    assert SECRET not in repr(LAPTOP.shows())


@pytest.mark.parametrize("valid_s", [-1, 1, 59, VALID_S_MAX + 1])
def test_how_long_a_token_is_good_is_bounded(valid_s: int) -> None:
    with pytest.raises(InvalidArgument, match="expected 60 to 604800 seconds"):
        issue(digest_of_secret(SECRET), valid_s, "o", "", NOW_US)


def test_an_hour_is_what_a_token_is_good_for_unless_said_otherwise() -> None:
    assert OPEN.expires_us == NOW_US + HOUR_US


@pytest.mark.parametrize(
    ("token", "executor", "change", "at_us", "kind", "sentence"),
    [
        (NEVER_ISSUED, UNKNOWN, {}, 0, Unauthenticated, "never issued such a token; make a new one"),
        (OPEN, UNKNOWN, {"secret": "wrong"}, 0, Unauthenticated, "the secret of this token is wrong"),
        (OPEN, UNKNOWN, {"secret": ""}, 0, Unauthenticated, "the secret of this token is wrong"),
        (OPEN, UNKNOWN, {}, HOUR_US, FailedPrecondition, "this token has expired; make a new one"),
        (OPEN, UNKNOWN, {"public_key": "U" * 56}, 0, InvalidArgument, "not the public nkey of a user"),
        (OPEN, UNKNOWN, {"public_key": DESKTOP.key}, 0, InvalidArgument, "proof: not this key's signature"),
        (OPEN, UNKNOWN, {"name": "another"}, 0, InvalidArgument, "proof: not this key's signature"),
        (OPEN, UNKNOWN, {"proof": b""}, 0, InvalidArgument, "proof: not this key's signature"),
        (OPEN, UNKNOWN, {"name": ""}, 0, InvalidArgument, "name: is empty"),
        (OPEN, UNKNOWN, {"name": "a\x1b[2J"}, 0, InvalidArgument, "name: expected at most"),
        (OPEN, JOINED, {}, 0, Conflict, "joined already, with another token"),
        (OPEN, evolve(JOINED, ExecutorRevoked()), {}, 0, PermissionDenied, "revoked, for ever"),
        (USED, evolve(JOINED, ExecutorRevoked()), {}, 0, PermissionDenied, "revoked, for ever"),
    ],
)
def test_each_refusal_says_what_is_wrong(
    token: TokenState,
    executor: ExecutorState,
    change: dict[str, Any],
    at_us: int,
    kind: type[HiveError],
    sentence: str,
) -> None:
    shown = msgspec.structs.replace(LAPTOP.shows(), **change)
    with pytest.raises(kind, match=sentence) as error:
        enrol(token, executor, shown, NOW_US + at_us)
    assert SECRET not in error.value.message


def test_a_used_token_is_refused_to_another_machine() -> None:
    with pytest.raises(FailedPrecondition, match="used by another machine; each works once: make a new one"):
        enrol(USED, UNKNOWN, DESKTOP.shows(), NOW_US)


def test_the_same_machine_may_ask_again_also_when_the_token_has_expired_meanwhile() -> None:
    for at_us in (NOW_US, NOW_US + 2 * HOUR_US):
        admitted = enrol(USED, JOINED, LAPTOP.shows(), at_us)
        assert admitted.token == admitted.executor == ()


def test_who_does_not_know_the_secret_does_not_learn_whether_it_was_used() -> None:
    for token in (OPEN, USED):
        with pytest.raises(Unauthenticated, match="secret"):
            enrol(token, UNKNOWN, DESKTOP.shows(secret="wrong"), NOW_US + 2 * HOUR_US)


def test_an_event_of_another_kind_stops_the_reader() -> None:
    with pytest.raises(UnknownEvent):
        evolve_token(OPEN, JobCancelled())


class Joining(RuleBasedStateMachine):
    """Three tokens, three machines, and a clock: they show what they like, and an admin revokes whom he likes."""

    def __init__(self) -> None:
        super().__init__()
        self.now_us = NOW_US
        self.machines = [Machine(number) for number in (1, 2, 3)]
        self.ids = [new_id() for _ in range(3)]
        self.tokens = [NEVER_ISSUED] * 3
        self.executors: dict[str, ExecutorState] = {}
        self.admitted: list[tuple[int, str]] = []

    @rule(token=st.integers(0, 2), valid_s=st.integers(60, 7200))
    def issues(self, token: int, valid_s: int) -> None:
        if self.tokens[token].version == 0:
            events = issue(digest_of_secret(self.ids[token]), valid_s, "o", "", self.now_us)
            self.tokens[token] = token_after(*events)

    @rule(seconds=st.integers(0, 3600))
    def time_passes(self, seconds: int) -> None:
        self.now_us += seconds * 1_000_000

    @rule(machine=st.integers(0, 2))
    def revokes(self, machine: int) -> None:
        executor = self.machines[machine].shows().executor
        if executor in self.executors:
            for event in revoke(self.executors[executor], ""):
                self.executors[executor] = evolve(self.executors[executor], event)

    @rule(token=st.integers(0, 2), machine=st.integers(0, 2), good=st.booleans())
    def shows(self, token: int, machine: int, good: bool) -> None:
        shown = self.machines[machine].shows(self.ids[token], self.ids[token] if good else "wrong")
        before = self.executors.get(shown.executor, UNKNOWN)
        try:
            admitted = enrol(self.tokens[token], before, shown, self.now_us)
        except HiveError:
            return
        assert good
        assert not before.revoked
        if admitted.executor:
            assert self.now_us < self.tokens[token].expires_us
            self.admitted.append((token, shown.executor))
            self.tokens[token] = token_after(*admitted.token, start=self.tokens[token])
            for event in admitted.executor:
                self.executors[shown.executor] = evolve(before, event)
        assert self.tokens[token].executor == shown.executor

    @invariant()
    def each_token_admits_one_and_each_key_joins_once(self) -> None:
        tokens = [token for token, _ in self.admitted]
        executors = [executor for _, executor in self.admitted]
        assert len(set(tokens)) == len(tokens)
        assert len(set(executors)) == len(executors)


TestJoining: Callable[[], None] = Joining.TestCase
