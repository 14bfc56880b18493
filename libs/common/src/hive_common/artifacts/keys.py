"""Keys of authors: Ed25519 (RFC 8032), in PEM as OpenSSL and cosign read it (RFC 8410).

The private key is PKCS #8, the public one SubjectPublicKeyInfo. Elsewhere a public key is its 32 bytes in hex.
"""

import re
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import read_secret
from hive_common.ops.files import replace_file

KEY_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_HEX: Final = re.compile(r"[0-9a-f]{64}\Z")
_PEM_BYTES_MAX: Final = 4_096


def is_public_key(text: str) -> bool:
    """Say whether `text` is a public key in hex."""
    return _HEX.match(text) is not None


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half, in hex."""
    return key.public_key().public_bytes_raw().hex()


def public_pem(public_key: str) -> bytes:
    """Return a public key, given in hex, as PEM."""
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_key(private: Path, public: Path) -> str:
    """Make a key, write both halves, the private one with mode 0600, and return the public one in hex.

    Raises:
        OSError: something cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    replace_file(private, pem, mode=0o600)
    replace_file(public, public_pem(public_hex(key)), mode=0o644)
    return public_hex(key)


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        InvalidArgument: it cannot be read, others may read it, or it is no Ed25519 key without a passphrase.
    """
    text = read_secret(str(file))
    try:
        key = serialization.load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _refused(file, "private", "PKCS #8 PEM of an Ed25519 key without a passphrase") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _refused(file, "private", "Ed25519; make one with: hive agent key new NAME")
    return key


def read_public_key(file: Path) -> str:
    """Read a public key, and return it in hex.

    Raises:
        InvalidArgument: it cannot be read, or is no Ed25519 key.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(_PEM_BYTES_MAX)
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refused(file, "public", "the PEM file that `hive agent key new` writes as NAME.pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _refused(file, "public", "Ed25519")
    return key.public_bytes_raw().hex()


def _refused(file: Path, half: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{file}: is not such a {half} key; expected {expected}", file=str(file))
