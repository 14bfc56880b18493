"""Public nkeys of NATS users: Ed25519 keys in NATS's text form (base32 of a kind, 32 bytes and a CRC-16)."""

import base64
import binascii
from typing import Final

import nkeys  # type: ignore[import-untyped]
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hive_common.kernel.errors import InvalidArgument

CHARACTERS: Final = 56
_RAW_BYTES: Final = 32


def public_key(text: str, path: str = "public_key") -> Ed25519PublicKey:
    """Return the key that an nkey of a user (`U` and 55 characters) stands for.

    Raises:
        InvalidArgument: it is not one; names `path`.
    """
    try:
        raw = base64.b32decode(text) if len(text) == CHARACTERS else b""
    except (binascii.Error, ValueError):
        raw = b""
    body, checksum = raw[:-2], raw[-2:]
    kind, key = body[:1], body[1:]
    fits = len(key) == _RAW_BYTES and kind[0] == nkeys.PREFIX_BYTE_USER
    if not fits or nkeys.crc16(bytearray(body)).to_bytes(2, "little") != checksum:
        raise InvalidArgument(
            f"{path}: not the public nkey of a user; expected `U` and {CHARACTERS - 1} characters", path=path
        )
    return Ed25519PublicKey.from_public_bytes(key)


def is_signed(signature: bytes, data: bytes, by: Ed25519PublicKey) -> bool:
    """Say whether `signature` is that of `data` by the key (Ed25519, RFC 8032)."""
    try:
        by.verify(signature, data)
    except InvalidSignature:
        return False
    return True
