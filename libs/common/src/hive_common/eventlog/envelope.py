"""Events before and after they are stored: `NewEvent`, `Append`, `Stored`, and the bytes between.

The envelope's bytes are made once, here, except for `position` and `prev`, which are known only under the
log's lock: `log_append` sets `{"position":N,"prev":"<hex>",` in front of what `prepare` returns. What is
stored is what was hashed (law 10).
"""

import hmac
from hashlib import sha256

import msgspec

from hive_common.kernel.errors import CorruptLog, InvalidArgument, PayloadTooLarge

EVENTS_PER_CALL_MAX = 1_000
"""What one call of `log_append` takes: bounds how long the log's lock is held."""
PAYLOAD_BYTES_MAX = 4 * 1024 * 1024
"""One payload: a job document (1 MiB), its inline input and the agents it names, with room."""
STREAM_BYTES_MAX = 200
TYPE_BYTES_MAX = 200
BODY_BYTES_MAX = 65_000
"""An envelope carries ids and pseudonyms only; with its first two fields it stays under 64 KiB."""
VERSION_MAX = 2**31 - 1
SALT_BYTES = 32
GENESIS_PREV = "0" * 64
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))
_INNER_PAD = b"\x36" * (64 - SALT_BYTES)
_OUTER_PAD = b"\x5c" * (64 - SALT_BYTES)


class NewEvent(msgspec.Struct, frozen=True):
    """One event to append.

    Attributes:
        stream: id of the aggregate.
        version: the version the stream will have with it, that is its expected version + 1.
        type: stable name, such as `TaskAssigned`; never a class path.
        schema: version of the payload's shape, from 1.
        payload: JSON bytes, stored as they are.
        ts_us: when it happened, microseconds since the epoch.
        actor, owner, subject: pseudonyms: who did it, who it belongs to, whose data it is.
        correlation: what it is part of, such as the job's id.
        causation: what it followed from, such as the id of a request.
    """

    stream: str
    version: int
    type: str
    schema: int
    payload: bytes
    ts_us: int
    actor: str
    owner: str
    ns: str = "default"
    subject: str | None = None
    correlation: str = ""
    causation: str = ""


class Append(msgspec.Struct, frozen=True):
    """Events that go in together or not at all.

    Attributes:
        events: at least one; versions of one stream follow each other.
        expect: further streams, only read, that must stand at this version; 0 for one that must not exist.
    """

    events: tuple[NewEvent, ...]
    expect: dict[str, int] = {}


class Stored(msgspec.Struct, frozen=True):
    """One event as it was read.

    Attributes:
        payload: None when it was erased, or was not asked for.
        event: the envelope's bytes.
        hash: SHA-256(0x00 ‖ event), the RFC 6962 leaf hash.
    """

    position: int
    stream: str
    version: int
    type: str
    schema: int
    ts_us: int
    actor: str
    owner: str
    ns: str
    subject: str | None
    correlation: str
    causation: str
    payload: bytes | None
    event: bytes
    hash: bytes


class Envelope(msgspec.Struct, frozen=True):
    """What stands in the envelope, in the order in which it stands there."""

    position: int
    prev: str
    log: str
    ns: str
    stream: str
    version: int
    type: str
    schema: int
    ts_us: int
    actor: str
    owner: str
    correlation: str
    causation: str
    payload_commit: str
    subject: str | None = None


class _Body(msgspec.Struct, frozen=True, omit_defaults=True):
    log: str
    ns: str
    stream: str
    version: int
    type: str
    schema: int
    ts_us: int
    actor: str
    owner: str
    subject: str | msgspec.UnsetType
    correlation: str
    causation: str
    payload_commit: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Envelope).decode


def payload_commit(salt: bytes, payload: bytes) -> bytes:
    """Return HMAC-SHA-256(salt, payload): commits to the payload without showing it once the salt is gone."""
    if len(salt) != SALT_BYTES:
        return hmac.digest(salt, payload, "sha256")
    # RFC 2104 spelled out for a key of 32 bytes: two calls of SHA-256 take half the time of hmac.digest.
    inner = sha256(salt.translate(_INNER) + _INNER_PAD + payload).digest()
    return sha256(salt.translate(_OUTER) + _OUTER_PAD + inner).digest()


def leaf_hash(event: bytes) -> bytes:
    """Return the RFC 6962 leaf hash of an envelope."""
    return sha256(b"\x00" + event).digest()


def prepare(log_id: str, event: NewEvent, salt: bytes) -> tuple[bytes, bytes]:
    """Return the envelope's bytes from its third field on, and the commitment to its payload.

    Raises:
        InvalidArgument: a field that can never be stored.
        PayloadTooLarge: more than `PAYLOAD_BYTES_MAX`.
    """
    check(event)
    commit = payload_commit(salt, event.payload)
    try:
        encoded = _encode(
            _Body(
                log_id,
                event.ns,
                event.stream,
                event.version,
                event.type,
                event.schema,
                event.ts_us,
                event.actor,
                event.owner,
                msgspec.UNSET if event.subject is None else event.subject,
                event.correlation,
                event.causation,
                commit.hex(),
            )
        )
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"event {event.type}: a field is not valid Unicode ({error.reason})") from error
    if len(encoded) > BODY_BYTES_MAX:
        raise PayloadTooLarge(
            f"event {event.type}: its envelope has {len(encoded)} bytes, expected at most {BODY_BYTES_MAX}"
        )
    return encoded[1:], commit


def splice(position: int, prev: str, body: bytes) -> bytes:
    """Set position and prev in front of a prepared body, as `log_append` does in SQL."""
    return b'{"position":%d,"prev":"%s",' % (position, prev.encode()) + body


def check(event: NewEvent) -> None:
    """Refuse what the database would refuse, so that one bad event does not fail the batch it is in.

    Raises:
        InvalidArgument, PayloadTooLarge: names the field.
    """
    if not 0 < event.version <= VERSION_MAX:
        raise InvalidArgument(f"event {event.type}: version {event.version}, expected 1 to {VERSION_MAX}")
    if len(event.payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"event {event.type}: payload of {len(event.payload)} bytes, expected at most {PAYLOAD_BYTES_MAX}"
        )
    _check_name("stream", event.stream, STREAM_BYTES_MAX)
    _check_name("type", event.type, TYPE_BYTES_MAX)


def _check_name(field: str, value: str, bytes_max: int) -> None:
    if value.isascii() and 0 < len(value) <= bytes_max and "\x00" not in value:
        return  # nearly always; the rest has to be encoded to be measured
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{field} {value!r}: expected valid Unicode") from error
    if not 0 < size <= bytes_max or "\x00" in value:
        raise InvalidArgument(f"{field} {value[:80]!r}: expected 1 to {bytes_max} bytes without NUL")


def envelope_of(event: bytes) -> Envelope:
    """Decode an envelope's bytes.

    Raises:
        CorruptLog: they are not an envelope.
    """
    try:
        return _decode(event)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise CorruptLog(f"an envelope does not decode: {error}") from error


def stored_of(position: int, event: bytes, hash_: bytes, payload: bytes | None) -> Stored:
    """Return the event of a row.

    Raises:
        CorruptLog: the envelope does not decode or stands at another position than it says.
    """
    envelope = envelope_of(event)
    if envelope.position != position:
        raise CorruptLog(f"position {position}: its envelope says position {envelope.position}", position=position)
    return Stored(
        position,
        envelope.stream,
        envelope.version,
        envelope.type,
        envelope.schema,
        envelope.ts_us,
        envelope.actor,
        envelope.owner,
        envelope.ns,
        envelope.subject,
        envelope.correlation,
        envelope.causation,
        payload,
        event,
        hash_,
    )
