"""The key of kill orders: an Ed25519 key in PEM, as OpenSSL reads it. It stays where `hive kill` runs."""

import base64
import binascii

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from hive_common.contracts.messages import KillOrder
from hive_common.control.orders import Order, order_bytes, signed_bytes
from hive_common.kernel.errors import InvalidArgument

_RAW_BYTES = 32


def new_key() -> str:
    """Return a new private key (PKCS 8, PEM)."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def private_key(pem: str, where: str) -> Ed25519PrivateKey:
    """Return the key in a PEM text. Raises InvalidArgument, naming `where`, if it is none."""
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidArgument(f"{where}: expected an Ed25519 key in PEM (PKCS 8)", file=where)
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public key as configurations have it: its 32 bytes in base64."""
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def public_key(text: str) -> Ed25519PublicKey:
    """Return the key that a configuration has. Raises InvalidArgument if it is none."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _RAW_BYTES:
        raise InvalidArgument(f"kill_public_key: expected {_RAW_BYTES} bytes in base64", path="kill_public_key")
    return Ed25519PublicKey.from_public_bytes(raw)


def sign(key: Ed25519PrivateKey, order: Order) -> KillOrder:
    """Return an order as it travels."""
    data = order_bytes(order)
    return KillOrder(order=data.decode(), signature=base64.b64encode(key.sign(signed_bytes(data))).decode())
