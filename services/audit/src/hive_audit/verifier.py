"""The check of the chain, row by row, with nothing of the code that writes it.

Pure: rows go in, in the order of their positions, and the first position that does not hold comes out. What
is checked for each row:

- positions are gapless from 1, and position 1 is the genesis event, which names the log;
- `hash` is SHA-256(0x00 ‖ event) (RFC 6962, section 2.1), and `prev` is the hash of the row before;
- the columns say what the envelope says;
- versions of a stream are gapless from 1, and a stream has at most one terminal event;
- the payload is there and is the one the envelope commits to: HMAC-SHA-256(salt, payload), salt of 32 bytes.

It does not interpret events, so a type that it does not know does not stop it.
"""

import contextlib
import hmac
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final

import msgspec

Row = tuple[int, str, int, str, bytes, bytes, bytes | None, bytes | None]
"""position, stream, version, type, event, hash, payload, salt."""

GENESIS_TYPE: Final = "LogCreated"
NO_HASH: Final = bytes(32)
TERMINAL_TYPES: Final = frozenset(
    {"TaskSucceeded", "TaskFailed", "TaskCancelled", "JobSucceeded", "JobFailed", "JobCancelled"}
)
SALT_BYTES: Final = 32
_RARE_TYPES: Final = TERMINAL_TYPES | {GENESIS_TYPE}

# HMAC (RFC 2104) over a key of 32 bytes, spelled out: two calls of SHA-256 take half the time of hmac.digest.
_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))
_INNER_PAD: Final = b"\x36" * 32
_OUTER_PAD: Final = b"\x5c" * 32


class _Envelope(msgspec.Struct, gc=False):
    position: int
    prev: str
    log: str
    stream: str
    version: int
    type: str
    payload_commit: str


class _Genesis(msgspec.Struct):
    log: str


_decode = msgspec.json.Decoder(_Envelope).decode
_decode_genesis = msgspec.json.Decoder(_Genesis).decode


class Break(msgspec.Struct, frozen=True):
    """The first position that does not hold, and why in one sentence."""

    position: int
    reason: str


class Head(msgspec.Struct, frozen=True):
    """An event that a log must contain: its position and its hash."""

    position: int
    hash: bytes


class Result(msgspec.Struct, frozen=True):
    """Outcome of a check.

    Attributes:
        events: how many events hold.
        head: position of the last event that holds.
        head_hash: its hash in hex.
        first_bad_position: 0 where the log is good.
        reason: empty where the log is good.
    """

    ok: bool
    events: int
    head: int
    head_hash: str
    first_bad_position: int
    reason: str
    log_id: str


class StreamHeads:
    """At which version each stream stands, and whether it has ended. Bounded.

    Once it had to forget, or when the check did not begin at the first event, a stream that is not in it may
    still exist: `unknown` says which ones have to be looked up before the next rows are fed.

    Args:
        streams_max: about 150 bytes each.
        complete: every stream so far is in it.
    """

    def __init__(self, streams_max: int | None = None, *, complete: bool = True) -> None:
        self.states: dict[str, int] = {}
        self.complete = complete
        self._streams_max = streams_max

    def unknown(self, streams: Iterable[str]) -> list[str]:
        """Return which of `streams` must be passed to `learn` before rows of them are fed."""
        if self.complete:
            return []
        return list({stream for stream in streams if stream not in self.states})

    def learn(self, stream: str, version: int, ended: bool) -> None:
        """Take over where a stream stands; version 0 for one that does not exist."""
        self.states[stream] = version << 1 | ended

    def trim(self) -> None:
        """Forget the streams seen first when there are too many."""
        if self._streams_max is not None and len(self.states) > self._streams_max:
            keep = list(self.states.items())[len(self.states) // 2 :]
            self.states = dict(keep)
            self.complete = False


class Verifier:
    """Checks a log from its beginning, or from a head that was checked before.

    Args:
        start: the head that was checked before.
        log_id: of the log that `start` belongs to.
        heads: where the streams stand at `start`.
        against: an event that the log must contain, such as the head of an earlier export.
        assume: take the first event of a stream that `heads` does not know for the one that follows: `assumed`
            then says after which version, and somebody else has to find that true.
    """

    def __init__(
        self,
        start: Head | None = None,
        *,
        log_id: str = "",
        heads: StreamHeads | None = None,
        against: Head | None = None,
        assume: bool = False,
    ) -> None:
        self.position = start.position if start else 0
        self.head_hash = start.hash if start else NO_HASH
        self.log_id = log_id
        self.heads = heads or StreamHeads(complete=start is None)
        self.broken: Break | None = None
        self.assumed: dict[str, int] | None = {} if assume else None
        self._first = self.position
        self._against = against

    def feed(self, rows: Sequence[Row]) -> Break | None:
        """Check the rows that follow. Returns the first break; after one nothing more is looked at."""
        if self.broken is None and rows:
            if self.position == 0:
                self.broken = self._genesis(rows[0])
                rows = rows[1:]
            self.broken = self.broken or self._chain(rows)
        return self.broken

    def finish(self) -> Result:
        """Return the outcome for a log that ends here."""
        if self.broken is None:
            self.broken = self._end()
        found = self.broken or Break(0, "")
        return Result(
            ok=self.broken is None,
            events=self.position - self._first,
            head=self.position,
            head_hash=self.head_hash.hex(),
            first_bad_position=found.position,
            reason=found.reason,
            log_id=self.log_id,
        )

    def _chain(self, rows: Sequence[Row]) -> Break | None:
        # The hot loop: one condition for all that must hold. Which part did not is found out afterwards.
        states = self.heads.states
        assumed = self.assumed
        log_id = self.log_id
        start = expected = self.position
        hash_ = self.head_hash
        prev = hash_.hex()
        found: Break | None = None
        for row in rows:
            position, stream, version, type_, event, row_hash, payload, salt = row
            expected += 1
            try:
                envelope = _decode(event)
                state = states.get(stream, -1)
                if state < 0:
                    state = 0
                    if assumed is not None and version > 1:
                        assumed[stream] = version - 1
                        state = (version - 1) << 1
                holds = (
                    position == expected == envelope.position
                    and sha256(b"\x00" + event).digest() == row_hash
                    and envelope.prev == prev
                    and envelope.log == log_id
                    and envelope.stream == stream
                    and envelope.version == version == (state >> 1) + 1
                    and envelope.type == type_
                    and len(salt) == SALT_BYTES  # type: ignore[arg-type] # None raises TypeError
                    and sha256(
                        salt.translate(_OUTER)  # type: ignore[union-attr]
                        + _OUTER_PAD
                        + sha256(salt.translate(_INNER) + _INNER_PAD + payload).digest()  # type: ignore
                    ).hexdigest()
                    == envelope.payload_commit
                )
                if type_ in _RARE_TYPES:
                    holds = holds and (not state & 1 if type_ in TERMINAL_TYPES else expected == 1)
                    state = 1
            except (TypeError, ValueError, msgspec.DecodeError):
                holds = False
            if not holds:
                found = explain(row, expected, Head(expected - 1, hash_), log_id, states)
                expected -= 1
                break
            states[stream] = version << 1 | state & 1
            hash_ = row_hash
            prev = hash_.hex()
        self.position = expected
        self.head_hash = hash_
        return self._against_rows(rows, start) or found

    def _genesis(self, row: Row) -> Break | None:
        # The log is named by its first envelope; `_chain` says whether that one holds at all.
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, TypeError):
            self.log_id = _decode(row[4]).log
        bad = self._chain((row,))
        if bad is None:
            reason = _genesis_reason(row, self.log_id)
            if reason is not None:
                self.position, self.head_hash = 0, NO_HASH
                bad = Break(1, f"position 1: {reason}")
        return bad

    def _against_rows(self, rows: Sequence[Row], start: int) -> Break | None:
        if self._against is None or not start < self._against.position <= self.position:
            return None
        found = rows[self._against.position - start - 1][5]
        if hmac.compare_digest(found, self._against.hash):
            return None
        return Break(
            self._against.position,
            f"position {self._against.position}: hash {found.hex()[:16]}…, but an earlier export has "
            f"{self._against.hash.hex()[:16]}…: the log was rewritten here or before",
        )

    def _end(self) -> Break | None:
        if self.position == 0:
            return Break(1, "position 1 is missing: the log is empty")
        if self._against is not None and self.position < self._against.position:
            return Break(
                self.position + 1,
                f"position {self.position + 1} is missing: an earlier export goes to position "
                f"{self._against.position}, the log ends at {self.position}: its tail was cut",
            )
        return None


def explain(row: Row, expected: int, before: Head, log_id: str, states: dict[str, int]) -> Break:
    """Return which position is bad, and why, for a row that does not hold."""
    position = row[0]
    if position is None or position < expected:
        return Break(expected, f"position {position} stands where {expected} should")
    if position > expected:
        return Break(expected, f"position {expected} is missing: the next is {position}")
    reason = (
        _bytes_reason(row)
        or _envelope_reason(row, before, log_id)
        or _stream_reason(row, states)
        or _payload_reason(row)
        or "does not hold"
    )
    return Break(expected, f"position {expected}: {reason}")


def _genesis_reason(row: Row, log_id: str) -> str | None:
    if row[3] != GENESIS_TYPE:
        return f"expected {GENESIS_TYPE}, found {row[3]}"
    try:
        named = _decode_genesis(row[6] or b"").log
    except msgspec.DecodeError as error:
        return f"the payload of the genesis event does not decode ({error})"
    return None if named == log_id else f"the genesis event names log {named}, its envelope {log_id}"


def _bytes_reason(row: Row) -> str | None:
    # Constraints can be dropped, so also what the types exclude may come.
    event: bytes | None = row[4]
    hash_: bytes | None = row[5]
    if event is None or hash_ is None:
        return "event or hash is NULL"
    if sha256(b"\x00" + event).digest() != hash_:
        return "the hash is not that of the event's bytes"
    try:
        _decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"the envelope does not decode ({error})"
    return None


def _envelope_reason(row: Row, before: Head, log_id: str) -> str | None:
    position, stream, version, type_, event = row[:5]
    envelope = _decode(event)
    for column, found, told in (
        ("position", position, envelope.position),
        ("stream", stream, envelope.stream),
        ("version", version, envelope.version),
        ("type", type_, envelope.type),
    ):
        if found != told:
            return f"the column {column} says {found!r}, the envelope {told!r}"
    if envelope.prev != before.hash.hex():
        return (
            f"prev is {envelope.prev[:16]}…, but the hash of position {before.position} is "
            f"{before.hash.hex()[:16]}…: one of the two was replaced"
        )
    if envelope.log != log_id:
        return f"belongs to log {envelope.log}, expected {log_id}"
    return None


def _stream_reason(row: Row, states: dict[str, int]) -> str | None:
    _, stream, version, type_ = row[:4]
    state = states.get(stream, 0)
    if version != (state >> 1) + 1:
        return f"version {version} of stream {stream} does not follow {state >> 1}"
    if type_ in TERMINAL_TYPES and state & 1:
        return f"{type_} is a second terminal event of stream {stream}"
    if type_ == GENESIS_TYPE and row[0] != 1:
        return f"{GENESIS_TYPE} may stand at position 1 only"
    return None


def _payload_reason(row: Row) -> str | None:
    payload, salt = row[6], row[7]
    if payload is None:
        # Erasure comes with an event type of its own; the catalogue has none yet, so that every gap is a break.
        return "the payload is missing, and no event says that it was erased"
    if salt is None or len(salt) != SALT_BYTES:
        return f"the salt has {len(salt or b'')} bytes, expected {SALT_BYTES}"
    if hmac.digest(salt, payload, "sha256").hex() != _decode(row[4]).payload_commit:
        return "payload or salt is not what the envelope commits to"
    return None
