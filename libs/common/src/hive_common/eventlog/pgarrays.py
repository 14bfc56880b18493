"""One-dimensional arrays in PostgreSQL's binary format, packed from pieces that were made beforehand.

psycopg dumps lists element by element in Python, under the one task that drains the queue. Here each element
is packed where its event is prepared, and a batch is one join. Format: `array_send` in PostgreSQL's
`src/backend/utils/adt/arrayfuncs.c`.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.adapt import Dumper
from psycopg.pq import Format

_INT4_OID = 23
# dimensions, has nulls, element type, size, lower bound
_HEADER = Struct(">iiIii")
_EMPTY = Struct(">iiI")
# size and value
_INT = Struct(">ii")
_BIGINT = Struct(">iq")


class _IntElements(dict[int, bytes]):
    """Packed integers: nearly all are counts, indices and low versions, so those are at hand."""

    def __missing__(self, value: int) -> bytes:
        return _INT.pack(4, value)


_INT_ELEMENTS = _IntElements({value: _INT.pack(4, value) for value in range(1_024)})


class TextArray(bytes):
    """A packed `text[]`."""

    oid = 1009
    element_oid = 25


class ByteaArray(bytes):
    """A packed `bytea[]`."""

    oid = 1001
    element_oid = 17


class IntArray(bytes):
    """A packed `integer[]`."""

    oid = 1007
    element_oid = _INT4_OID


class BigintArray(bytes):
    """A packed `bigint[]`."""

    oid = 1016
    element_oid = 20


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


class _TextArrayDumper(_PackedDumper):
    oid = TextArray.oid


class _ByteaArrayDumper(_PackedDumper):
    oid = ByteaArray.oid


class _IntArrayDumper(_PackedDumper):
    oid = IntArray.oid


class _BigintArrayDumper(_PackedDumper):
    oid = BigintArray.oid


def register(conn: AsyncConnection[Any] | Connection[Any]) -> None:
    """Let `conn` take packed arrays as parameters."""
    conn.adapters.register_dumper(TextArray, _TextArrayDumper)
    conn.adapters.register_dumper(ByteaArray, _ByteaArrayDumper)
    conn.adapters.register_dumper(IntArray, _IntArrayDumper)
    conn.adapters.register_dumper(BigintArray, _BigintArrayDumper)


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
    return IntArray(_header(len(values), _INT4_OID) + b"".join(map(_INT_ELEMENTS.__getitem__, values)))


def bigint_array(values: Sequence[int]) -> BigintArray:
    """Return the array of `values`."""
    packed = b"".join([_BIGINT.pack(8, value) for value in values])
    return BigintArray(_header(len(values), BigintArray.element_oid) + packed)


def ints_of(packed: bytes) -> list[int]:
    """Return the values of an `integer[]` that the database sent, which has no nulls."""
    return [value for _, value in _INT.iter_unpack(packed[_HEADER.size :])]


def bigints_of(packed: bytes) -> list[int]:
    """Return the values of a `bigint[]` that the database sent, which has no nulls."""
    return [value for _, value in _BIGINT.iter_unpack(packed[_HEADER.size :])]


def _header(count: int, element_oid: int) -> bytes:
    return _HEADER.pack(1, 0, element_oid, count, 1) if count else _EMPTY.pack(0, 0, element_oid)
