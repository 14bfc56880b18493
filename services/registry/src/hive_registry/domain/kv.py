"""What agents keep between tasks: which writes a namespace takes."""

from collections.abc import Mapping, Sequence

import msgspec
from hive_common.contracts.events import KvStaged, KvWrite
from hive_common.contracts.limits import (
    KV_PENDING_MAX,
    KV_STAGED_BYTES_MAX,
    KV_VALUE_BYTES_MAX,
)
from hive_common.kernel.errors import BudgetExhausted, Conflict, InvalidArgument, PayloadTooLarge, RateLimited
from hive_common.permissions.kept import is_key, size_of


class Staged(msgspec.Struct, frozen=True):
    """What one attempt has written, while it is not decided whether it counts."""

    task: str
    attempt: int
    writes: tuple[KvWrite, ...]


class NamespaceState(msgspec.Struct, frozen=True):
    """A namespace, as far as a decision needs it.

    Attributes:
        version: of its stream.
        used_bytes: by keys and values that can be read.
        sizes: of those keys that somebody is about to write.
        pending: staged writes in their order.
    """

    version: int = 0
    used_bytes: int = 0
    sizes: Mapping[str, int] = {}
    pending: tuple[Staged, ...] = ()


def check_writes(writes: Sequence[KvWrite]) -> None:
    """Check what an attempt has written, before anything else is asked about it.

    Raises:
        InvalidArgument: nothing, a key that is none, or the same key twice.
        PayloadTooLarge: a value, or all of it.
    """
    if not writes or len({write.key for write in writes}) < len(writes):
        raise InvalidArgument("writes: expected one or more, of different keys", path="writes")
    total = 0
    for index, write in enumerate(writes):
        if not is_key(write.key):
            raise InvalidArgument(f"writes[{index}].key: {write.key[:80]!r} is no key", path=f"writes[{index}].key")
        size = size_of(write)
        if size > KV_VALUE_BYTES_MAX + len(write.key):
            raise PayloadTooLarge(f"the value of {write.key!r} is larger than {KV_VALUE_BYTES_MAX} bytes")
        total += size
    if total > KV_STAGED_BYTES_MAX:
        raise PayloadTooLarge(f"{total} bytes in one attempt; expected {KV_STAGED_BYTES_MAX} at most")


def stage(
    state: NamespaceState, namespace: str, task: str, attempt: int, writes: tuple[KvWrite, ...], quota_bytes: int
) -> tuple[KvStaged, ...]:
    """Take what an attempt has written, unless the namespace could outgrow its quota whatever becomes of it.

    Returns:
        Nothing where the attempt has said just that before.

    Raises:
        Conflict: the attempt has said something else before.
        BudgetExhausted: the quota.
        RateLimited: too many attempts are not decided yet.
    """
    for one in state.pending:
        if (one.task, one.attempt) == (task, attempt):
            if one.writes == writes:
                return ()
            raise Conflict(f"attempt {attempt} of task {task} has staged other values before")
    if len(state.pending) >= KV_PENDING_MAX:
        raise RateLimited(f"namespace {namespace}: {KV_PENDING_MAX} attempts with values are not decided yet")
    staged = Staged(task, attempt, writes)
    most = most_bytes(state, staged)
    if most > quota_bytes:
        raise BudgetExhausted(
            f"namespace {namespace} would grow to {most} bytes of keys and values; its quota is {quota_bytes}",
            limit=quota_bytes,
            spent=state.used_bytes,
        )
    return (KvStaged(namespace=namespace, task=task, attempt=attempt, writes=writes),)


def most_bytes(state: NamespaceState, staged: Staged) -> int:
    """Return what the namespace can hold at most, whichever of its attempts come to count, in whichever order.

    The first one that writes a key has its old value to give back. Another one may find that gone, so it counts
    whole.
    """
    touched: set[str] = set()
    total = state.used_bytes
    for one in (*state.pending, staged):
        grows = sum(
            size_of(write) - (0 if write.key in touched else state.sizes.get(write.key, 0)) for write in one.writes
        )
        touched.update(write.key for write in one.writes)
        # One that is not decided need not come to count; the new one that does gives back what it frees.
        total += grows if one is staged else max(0, grows)
    return total
