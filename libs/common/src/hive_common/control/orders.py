"""Kill orders: their bytes, and the one state machine that says what an order makes of what was stopped before.

    nothing is stopped (epoch 0) ── kill ──→ stopped: {target} ── kill, lift ──→ stopped: {…} (epoch + 1 each)

An order carries all that is stopped once it holds. So the newest one is all that anybody needs: who missed those
before it misses nothing, and only its epoch has to be remembered. Pure: no clock, no key, no transport.
"""

from collections.abc import Iterable, Iterator
from typing import Final, Literal

import msgspec

from hive_common.contracts.limits import KIB
from hive_common.kernel.errors import Conflict, FailedPrecondition, InvalidArgument
from hive_common.kernel.ids import is_id

Action = Literal["kill", "lift"]
Scope = Literal["all", "agent", "executor", "job"]

ALL: Final = "all"
STANDING_MAX: Final = 256
"""Targets that are stopped at once; an order names all of them."""

REASON_CHARACTERS_MAX: Final = 200
TARGET_CHARACTERS_MAX: Final = 200
ORDER_BYTES_MAX: Final = 128 * KIB
EPOCH_MAX: Final = (1 << 53) - 1
_VERSION: Final = 1
_DOMAIN: Final = b"hive-kill-order:"


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was ordered.

    Attributes:
        epoch: one more than that of the order before.
        action: `kill` stops the target, `lift` lets it start again.
        scope: what `target` is: the id of an executor or of a job, or `name` or `name@version` of an agent; with
            `all` it is empty.
        reason: for people.
        issued_us: when, on the clock of who gave it.
        standing: everything that is stopped once this order holds, as `entry_of` writes it, sorted.
    """

    epoch: int
    action: Action
    scope: Scope
    target: str
    reason: str
    issued_us: int
    standing: tuple[str, ...]
    v: int = _VERSION

    @property
    def entry(self) -> str:
        """Return its target as it stands in `standing`."""
        return entry_of(self.scope, self.target)


def entry_of(scope: str, target: str) -> str:
    """Return `all`, `agent:<name>`, `agent:<name>@<version>`, `executor:<id>` or `job:<id>`."""
    return ALL if scope == ALL else f"{scope}:{target}"


def target_of(entry: str) -> tuple[str, str]:
    """Return scope and target of an entry."""
    scope, _, target = entry.partition(":")
    return scope, target


def in_words(entry: str) -> str:
    """Return an entry as people say it."""
    scope, target = target_of(entry)
    return "everything" if scope == ALL else f"{scope} {target}"


def options_of(entry: str) -> str:
    """Return the options of `hive kill` and `hive unkill` that mean an entry."""
    scope, target = target_of(entry)
    return "--all" if scope == ALL else f"--{scope} {target}"


def following(known: Order | None, action: Action, scope: Scope, target: str, reason: str, issued_us: int) -> Order:
    """Return the order that may follow `known` (None: none was ever given).

    Raises:
        InvalidArgument: the target or the reason is none.
        Conflict: it is stopped already.
        FailedPrecondition: it is not stopped, or too much is.
    """
    _check(scope, target, reason)
    entry = entry_of(scope, target)
    standing = set(known.standing if known else ())
    if action == "kill":
        if entry in standing:
            raise Conflict(f"{in_words(entry)} is stopped already; see: hive kill list", entry=entry)
        if len(standing) >= STANDING_MAX:
            raise FailedPrecondition(
                f"{STANDING_MAX} kill orders stand already; lift some (see: hive kill list), or use --all"
            )
        standing.add(entry)
    elif entry in standing:
        standing.remove(entry)
    else:
        raise FailedPrecondition(f"{in_words(entry)} is not stopped; see: hive kill list", entry=entry)
    return Order(
        epoch=(known.epoch if known else 0) + 1,
        action=action,
        scope=scope,
        target=target,
        reason=reason,
        issued_us=issued_us,
        standing=tuple(sorted(standing)),
    )


def check_follows(known: Order | None, order: Order) -> None:
    """Make sure that `order` is what `following` would have made, but for its epoch.

    Raises:
        HiveError: as `following`; InvalidArgument where it says that something else is stopped.
    """
    made = following(known, order.action, order.scope, order.target, order.reason, order.issued_us)
    if made.standing != order.standing:
        raise InvalidArgument("standing: is not what this order makes of what was stopped before", path="standing")


def order_bytes(order: Order) -> bytes:
    """Return the canonical JSON of an order: sorted members, no blanks (as RFC 8785 has it for what is in it)."""
    return msgspec.json.encode(order, order="sorted")


def signed_bytes(order: bytes) -> bytes:
    """Return what is signed: the order, after words that keep the signature from meaning anything else."""
    return _DOMAIN + order


def parse_order(data: bytes) -> Order:
    """Return the order that some bytes are.

    Raises:
        InvalidArgument: they are none, or not written as `order_bytes` would.
    """
    if len(data) > ORDER_BYTES_MAX:
        raise InvalidArgument(f"order: {len(data)} bytes; expected at most {ORDER_BYTES_MAX}", path="order")
    try:
        order = msgspec.json.decode(data, type=Order)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"order: {error}", path="order") from error
    if order.v != _VERSION:
        raise InvalidArgument(f"order.v: got {order.v}; expected {_VERSION}", path="order.v")
    if not 1 <= order.epoch <= EPOCH_MAX:
        raise InvalidArgument(f"order.epoch: got {order.epoch}; expected 1 or more", path="order.epoch")
    if len(order.standing) > STANDING_MAX or list(order.standing) != sorted(set(order.standing)):
        raise InvalidArgument(f"order.standing: expected {STANDING_MAX} at most, sorted", path="order.standing")
    _check(order.scope, order.target, order.reason)
    if order_bytes(order) != data:
        raise InvalidArgument("order: is not written canonically: sorted members, no blanks", path="order")
    return order


def _check(scope: Scope, target: str, reason: str) -> None:
    match scope:
        case "all":
            fits, expected = not target, "nothing, since everything is meant"
        case "agent":
            name, at, version = target.partition("@")
            plain = target.isascii() and target.isprintable() and " " not in target
            fits = bool(name) and plain and (bool(version) or not at) and len(target) <= TARGET_CHARACTERS_MAX
            expected = "the name of an agent, or name@version"
        case "executor" | "job":
            fits, expected = is_id(target), f"the id of {'an executor' if scope == 'executor' else 'a job'}"
    if not fits:
        raise InvalidArgument(f"target: got {target[:TARGET_CHARACTERS_MAX]!r}; expected {expected}", path="target")
    if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
        raise InvalidArgument(
            f"reason: expected at most {REASON_CHARACTERS_MAX} printable characters", path="reason"
        )


class Stopped:
    """What is stopped, in the shape in which it is asked for. Immutable.

    Args:
        entries: of the newest order.
    """

    __slots__ = ("_entries", "everything")

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._entries = frozenset(entries)
        self.everything = ALL in self._entries

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def executors(self) -> frozenset[str]:
        """The executors that are stopped by an order of their own."""
        return frozenset(target for scope, target in map(target_of, self._entries) if scope == "executor")

    def executor(self, executor: str) -> str | None:
        """Return the entry by which an executor is stopped: its own, or all; None where it is not."""
        return self._first(f"executor:{executor}")

    def agent(self, name: str, version: str) -> str | None:
        """Return the entry by which an agent is stopped, None where no order names it."""
        for entry in (f"agent:{name}", f"agent:{name}@{version}"):
            if entry in self._entries:
                return entry
        return None

    def job(self, job: str) -> str | None:
        """Return the entry by which a job is stopped, None where no order names it."""
        entry = f"job:{job}"
        return entry if entry in self._entries else None

    def attempt(self, executor: str, name: str, version: str, job: str) -> str | None:
        """Return the entry by which an attempt is stopped, None where it may go on."""
        return self.executor(executor) or self.agent(name, version) or self.job(job)

    def _first(self, entry: str) -> str | None:
        if self.everything:
            return ALL
        return entry if entry in self._entries else None


NOTHING: Final = Stopped()
