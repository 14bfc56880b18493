"""The export file: everything that is needed to check a log without its database.

Lines of JSON, each ended by a newline:

1. `{"hive_export":1,"log":…,"from":1,"to":N,"head_hash":…,"created":…}`
2. one line an event, `{"position":…,"event":…,"hash":…,"payload":…,"salt":…}`: `event` is the text of the very
   bytes that were hashed, `hash` is hex, `payload` and `salt` are base64. An event whose payload is gone has
   `"erased":true` instead of the last two.
3. `{"count":N,"sha256":…}`: how many events, and SHA-256 in hex over all lines before.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec
from hive_common.kernel.errors import CorruptLog, InvalidArgument

from hive_audit.verifier import Break, Head, Result, Row, Verifier

FORMAT: Final = 1
LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""An envelope (64 KiB) and a payload (4 MiB) in base64, with room."""
CHUNK_BYTES: Final = 1024 * 1024
_BATCH_LINES: Final = 1_000


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First line: what the file holds. `created` is ISO 8601, `head_hash` hex."""

    hive_export: int
    log: str
    from_: int = msgspec.field(name="from")
    to: int
    head_hash: str
    created: str


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    position: int
    event: str
    hash: str
    payload: str | None = None
    salt: str | None = None
    erased: bool = False


class _Trailer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: int
    sha256: str


class _Columns(msgspec.Struct, frozen=True, gc=False):
    stream: str
    version: int
    type: str


_encode = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(Header).decode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_trailer = msgspec.json.Decoder(_Trailer).decode
_decode_columns = msgspec.json.Decoder(_Columns).decode


class Writer:
    """Makes the lines of one file, in order: `header`, `events` as often as needed, `trailer`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._count = 0

    def header(self, header: Header) -> bytes:
        """Return the first line."""
        return self._hashed(_encode(header) + b"\n")

    def events(self, rows: Sequence[Row]) -> Iterator[bytes]:
        """Yield the lines of `rows`, joined into pieces of about a MiB.

        Raises:
            CorruptLog: an envelope is not text.
        """
        lines: list[bytes] = []
        size = 0
        for row in rows:
            line = _encode(_line_of(row)) + b"\n"
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield self._hashed(b"".join(lines))
                lines, size = [], 0
        self._count += len(rows)
        if lines:
            yield self._hashed(b"".join(lines))

    def trailer(self) -> bytes:
        """Return the last line, without which the file is no export."""
        return _encode(_Trailer(self._count, self._digest.hexdigest())) + b"\n"

    def _hashed(self, data: bytes) -> bytes:
        self._digest.update(data)
        return data


def _line_of(row: Row) -> _Line:
    position, _, _, _, event, hash_, payload, salt = row
    try:
        text = event.decode()
    except UnicodeDecodeError as error:
        raise CorruptLog(f"position {position}: the envelope is not UTF-8", position=position) from error
    if payload is None or salt is None:
        return _Line(position, text, hash_.hex(), erased=True)
    return _Line(position, text, hash_.hex(), base64.b64encode(payload).decode(), base64.b64encode(salt).decode())


def read_header(path: Path) -> Header:
    """Return the first line of an export. It is not verified.

    Raises:
        InvalidArgument: the file cannot be read or is no export.
    """
    try:
        with path.open("rb") as file:
            return _header_of(file.readline(LINE_BYTES_MAX))
    except _NotExport as error:
        raise InvalidArgument(f"{path}: {error}", file=str(path)) from error
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}", file=str(path)) from error


def head_of(path: Path) -> Head:
    """Verify an export and return its head, to hold a log against it.

    Raises:
        InvalidArgument: the file cannot be read, is no export, or does not verify.
    """
    result = verify_file(path)
    if not result.ok:
        raise InvalidArgument(f"{path}: cannot be compared with: {result.reason}", file=str(path))
    return Head(result.head, bytes.fromhex(result.head_hash))


def verify_file(path: Path, against: Path | None = None) -> Result:
    """Check an export without a database.

    Args:
        path: the export.
        against: an earlier export of the same log, which must be the beginning of this one.

    Returns:
        For a file that was cut, edited or rewritten: not ok, with the first position that does not hold. Where
        all events hold but the file around them was changed, that is the one after its head.

    Raises:
        InvalidArgument: a file cannot be read, or `against` itself does not verify.
    """
    head = head_of(against) if against is not None else None
    result = _verify(path, head)
    if against is None or result.ok:
        return result
    first = _first_difference(path, against)
    if first is None or first > result.first_bad_position:
        return result
    return msgspec.structs.replace(
        result,
        events=first - 1,
        head=first - 1,
        head_hash="",
        first_bad_position=first,
        reason=f"position {first}: differs from {against}: the log was rewritten from here on",
    )


def _verify(path: Path, against: Head | None) -> Result:
    verifier = Verifier(against=against)
    try:
        with path.open("rb") as file:
            reader = _Reader(file)
            while rows := reader.rows():
                if verifier.feed(rows) is not None:
                    return verifier.finish()
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}", file=str(path)) from error
    problem = reader.problem or _header_problem(reader.header, verifier)
    if problem is not None:
        verifier.broken = Break(verifier.position + 1, problem)
    return verifier.finish()


def _header_problem(header: Header | None, verifier: Verifier) -> str | None:
    if header is None:
        return "line 1: there is no header"
    for name, told, found in (
        ("to", header.to, verifier.position),
        ("head_hash", header.head_hash, verifier.head_hash.hex()),
        ("log", header.log, verifier.log_id),
    ):
        if told != found:
            return f"line 1: {name} is {told!r}, but the events say {found!r}"
    return None


class _NotExport(ValueError):
    """The file does not begin as an export does."""


def _header_of(line: bytes) -> Header:
    try:
        header = _decode_header(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _NotExport(f"line 1 is not the header of an export: {error}") from error
    if header.hive_export != FORMAT or header.from_ != 1:
        raise _NotExport(
            f"line 1: expected format {FORMAT} from position 1, found format {header.hive_export} "
            f"from {header.from_}"
        )
    return header


class _Reader:
    """Gives the rows of a file until it ends well, or until `problem` says what is wrong with it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._lines = 1
        self._count = 0
        self._ended = False
        self.problem: str | None = None
        self.header: Header | None = None
        line = file.readline(LINE_BYTES_MAX)
        self._digest.update(line)
        try:
            self.header = _header_of(line)
        except _NotExport as error:
            self.problem = str(error)

    def rows(self) -> list[Row]:
        """Return some rows; none at the end."""
        rows: list[Row] = []
        while len(rows) < _BATCH_LINES and self.problem is None and not self._ended:
            row = self._row()
            if row is not None:
                rows.append(row)
        return rows

    def _row(self) -> Row | None:
        line = self._file.readline(LINE_BYTES_MAX)
        self._lines += 1
        if not line.endswith(b"\n"):
            self.problem = f"line {self._lines}: the file was cut: it ends without its last line" + (
                "" if len(line) < LINE_BYTES_MAX else f" or has a line over {LINE_BYTES_MAX} bytes"
            )
            return None
        if line.startswith(b'{"count":'):
            self._end(line)
            return None
        self._digest.update(line)
        self._count += 1
        try:
            return _row_of(_decode_line(line))
        except (msgspec.DecodeError, UnicodeError, binascii.Error, ValueError) as error:
            self.problem = f"line {self._lines}: not an event: {error}"
            return None

    def _end(self, line: bytes) -> None:
        self._ended = True
        expected = _encode(_Trailer(self._count, self._digest.hexdigest())) + b"\n"
        if line != expected:
            self.problem = f"line {self._lines}: {self._trailer_problem(line)}"
        elif self._file.read(1):
            self.problem = f"line {self._lines + 1}: something follows the last line"

    def _trailer_problem(self, line: bytes) -> str:
        try:
            trailer = _decode_trailer(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return f"not the last line of an export: {error}"
        if trailer.count != self._count:
            return f"the file was cut or edited: it has {self._count} events, its last line says {trailer.count}"
        return "the file was edited: its SHA-256 is not the one of its last line"


def _row_of(line: _Line) -> Row:
    event = line.event.encode()
    columns = _decode_columns(event)
    if line.erased or line.payload is None or line.salt is None:
        payload = salt = None
    else:
        payload = base64.b64decode(line.payload, validate=True)
        salt = base64.b64decode(line.salt, validate=True)
    return (
        line.position,
        columns.stream,
        columns.version,
        columns.type,
        event,
        bytes.fromhex(line.hash),
        payload,
        salt,
    )


def _first_difference(path: Path, against: Path) -> int | None:
    with path.open("rb") as new_file, against.open("rb") as old_file:
        new, old = _Reader(new_file), _Reader(old_file)
        while old_rows := old.rows():
            new_rows = new.rows()
            for new_row, old_row in zip(new_rows, old_rows, strict=False):
                if new_row[5] != old_row[5]:
                    return old_row[0]
            if len(new_rows) < len(old_rows):
                return old_rows[len(new_rows)][0]
    return None
