"""Which writes a namespace takes: never more than its quota, whatever becomes of the attempts that wrote."""

from random import Random

import msgspec
import pytest
from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import KV_PENDING_MAX, KV_STAGED_BYTES_MAX, KV_VALUE_BYTES_MAX
from hive_common.kernel.errors import (
    BudgetExhausted,
    Conflict,
    HiveError,
    InvalidArgument,
    PayloadTooLarge,
    RateLimited,
)
from hive_common.permissions.kept import is_key, is_prefix, size_of
from hive_registry.domain.kv import NamespaceState, Staged, check_writes, stage


def put(key: str, size_bytes: int) -> KvWrite:
    """A value of so many bytes together with its key."""
    value = b'"' + b"x" * (size_bytes - len(key) - 2) + b'"'
    return KvWrite(key, msgspec.Raw(value))


def state(used: dict[str, int], *pending: Staged, version: int = 1) -> NamespaceState:
    return NamespaceState(version, sum(used.values()), used, pending)


def test_keys_are_what_stands_in_no_need_of_quoting() -> None:
    assert all(map(is_key, ("a", "A-1_b.c/d:e@f=g", "x" * 256)))
    assert not any(map(is_key, ("", "a b", "ä", "a\n", "a*", "x" * 257, "..\\a", "a\x00")))
    assert is_prefix("")


def test_the_bytes_of_keys_and_values_count() -> None:
    assert size_of(KvWrite("key", msgspec.Raw(b"null"))) == 7
    assert size_of(KvWrite("key")) == 0


@pytest.mark.parametrize(
    ("writes", "error"),
    [
        ((), InvalidArgument),
        ((KvWrite(""),), InvalidArgument),
        ((KvWrite("a b"),), InvalidArgument),
        ((KvWrite("a"), KvWrite("a")), InvalidArgument),
        ((put("a", KV_VALUE_BYTES_MAX + 2),), PayloadTooLarge),
        (tuple(put(str(n), KV_VALUE_BYTES_MAX) for n in range(5)), PayloadTooLarge),
    ],
)
def test_writes_that_are_none_are_refused(writes: tuple[KvWrite, ...], error: type[HiveError]) -> None:
    with pytest.raises(error):
        check_writes(writes)


def test_as_much_as_is_allowed_is_taken() -> None:
    check_writes((put("a", KV_VALUE_BYTES_MAX + 1), KvWrite("b")))
    check_writes(tuple(put(str(n), KV_STAGED_BYTES_MAX // 4) for n in range(4)))


def test_a_namespace_takes_what_its_quota_covers_and_not_a_byte_more() -> None:
    ((event),) = stage(state({"old": 50}), "n", "t", 1, (put("new", 50),), 100)
    assert (event.namespace, event.task, event.attempt) == ("n", "t", 1)
    with pytest.raises(BudgetExhausted, match="101 bytes of keys and values; its quota is 100"):
        stage(state({"old": 50}), "n", "t", 1, (put("new", 51),), 100)


def test_what_is_overwritten_or_deleted_gives_back_its_bytes() -> None:
    assert stage(state({"old": 100}), "n", "t", 1, (put("old", 100),), 100)
    assert stage(state({"old": 100}), "n", "t", 1, (KvWrite("old"), put("new", 100)), 100)


def test_the_same_again_changes_nothing_and_something_else_is_a_conflict() -> None:
    writes = (put("a", 10),)
    before = state({}, Staged("t", 1, writes))
    assert stage(before, "n", "t", 1, writes, 10) == ()
    with pytest.raises(Conflict):
        stage(before, "n", "t", 1, (put("a", 11),), 100)
    # Another attempt of the task is another one, though only one of them can come to count.
    assert stage(before, "n", "t", 2, writes, 20)


def test_what_is_not_decided_yet_counts_as_if_it_came() -> None:
    before = state({}, Staged("other", 1, (put("a", 60),)))
    with pytest.raises(BudgetExhausted):
        stage(before, "n", "t", 1, (put("b", 50),), 100)
    with pytest.raises(RateLimited):
        stage(
            state({}, *(Staged(str(n), 1, (KvWrite("x"),)) for n in range(KV_PENDING_MAX))),
            *("n", "t", 1, (put("b", 50),), 100),
        )


@pytest.mark.parametrize("seed", range(200))
def test_whatever_comes_to_count_in_whichever_order_the_quota_holds(seed: int) -> None:
    random = Random(seed)
    quota, values = 100, dict[str, int]()
    pending: list[Staged] = []
    taken = 0
    for number in range(60):
        if pending and random.random() < 0.4:
            # One is decided, out of order, for or against.
            decided = pending.pop(random.randrange(len(pending)))
            if random.random() < 0.7:
                for write in decided.writes:
                    values.pop(write.key, None)
                    if size := size_of(write):
                        values[write.key] = size
            assert sum(values.values()) <= quota
            continue
        keys = random.sample("abcd", random.randint(1, 3))
        writes = tuple(KvWrite(key) if random.random() < 0.4 else put(key, random.randint(5, 60)) for key in keys)
        try:
            stage(state(values, *pending), "n", str(number), 1, writes, quota)
        except BudgetExhausted:
            continue
        taken += 1
        pending.append(Staged(str(number), 1, writes))
    assert taken > 0
