"""One-dimensional arrays in PostgreSQL's binary format, packed from pieces that were made beforehand.

psycopg dumps lists element by element in Python, under the one task that drains the queue. Here each element
is packed where its event is prepared, and a batch is one join. Format: `array_send` in PostgreSQL's
`src/backend/utils/adt/arrayfuncs.c`.
"""

from collections.abc import Sequence
from struct import Struct, pack
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.adapt import Dumper
from psycopg.pq import Format

_INT4_OID = 23
# dimensions, has nulls, element type, size, lower bound
_HEADER = Struct(">iiIii")
_EMPTY = Struct(">iiI")


class TextArray(bytes):
    """A packed `text[]`."""

    element_oid = 25


class ByteaArray(bytes):
    """A packed `bytea[]`."""

    element_oid = 17


class IntArray(bytes):
    """A packed `integer[]`."""

    element_oid = _INT4_OID


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _TextArrayDumper(_PackedDumper):
    oid = 1009


class _ByteaArrayDumper(_PackedDumper):
    oid = 1001


class _IntArrayDumper(_PackedDumper):
    oid = 1007


def register(conn: AsyncConnection[Any] | Connection[Any]) -> None:
    """Let `conn` take packed arrays as parameters."""
    conn.adapters.register_dumper(TextArray, _TextArrayDumper)
    conn.adapters.register_dumper(ByteaArray, _ByteaArrayDumper)
    conn.adapters.register_dumper(IntArray, _IntArrayDumper)


def element(data: bytes) -> bytes:
    """Return one element: its length and its bytes."""
    return len(data).to_bytes(4) + data


def text_array(elements: Sequence[bytes]) -> TextArray:
    """Return the array of packed `elements`."""
    return TextArray(_header(len(elements), TextArray.element_oid) + b"".join(elements))


def bytea_array(elements: Sequence[bytes]) -> ByteaArray:
    """Return the array of packed `elements`."""
    return ByteaArray(_header(len(elements), ByteaArray.element_oid) + b"".join(elements))


def int_array(values: Sequence[int]) -> IntArray:
    """Return the array of `values`."""
    interleaved = [4] * (2 * len(values))
    interleaved[1::2] = values
    return IntArray(_header(len(values), _INT4_OID) + pack(f">{len(interleaved)}i", *interleaved))


def _header(count: int, element_oid: int) -> bytes:
    return _HEADER.pack(1, 0, element_oid, count, 1) if count else _EMPTY.pack(0, 0, element_oid)
