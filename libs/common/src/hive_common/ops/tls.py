"""TLS of an installation: one private CA, which is all that its processes and devices trust."""

import hashlib
import ipaddress
import ssl
from pathlib import Path

from hive_common.kernel.errors import InvalidArgument


def is_loopback(host: str) -> bool:
    """Say whether what listens on `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_listener(field: str, host: str, *, engine_network: bool) -> None:
    """Refuse an address for a server that speaks no TLS.

    Args:
        field: of the configuration, for the message.
        host: address that the server would listen on.
        engine_network: the process has a network of a container engine to itself and its peers, which decides what
            is published of it.

    Raises:
        ValueError: others than this machine could connect. In a struct, msgspec makes it a ValidationError.
    """
    if not engine_network and not is_loopback(host):
        raise ValueError(
            f"{field} is {host!r}, and this listener has no TLS: expected an address of the loopback; "
            "`hive up --public ADDRESS` adds listeners that have"
        )


def netloc(host: str, port: int) -> str:
    """Return `host:port` as it stands in a URL (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fingerprint_of(pem: str) -> str:
    """Return the SHA-256 of a certificate's DER, in hex.

    Raises:
        InvalidArgument: `pem` is not one certificate.
    """
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.strip())
    except ValueError as error:
        raise InvalidArgument(f"not a certificate in PEM: {error}") from error
    return hashlib.sha256(der).hexdigest()


def client_context(ca_file: str | Path) -> ssl.SSLContext:
    """Return what a client connects with that trusts this CA and no other, and checks names.

    Raises:
        InvalidArgument: the file cannot be read or holds no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidArgument(f"{ca_file}: cannot be used as CA: {reason}", file=str(ca_file)) from error
    return context


def server_context(cert_file: str | Path, key_file: str | Path) -> ssl.SSLContext:
    """Return what a server listens with.

    Raises:
        InvalidArgument: the files cannot be read or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(
            f"{cert_file}, {key_file}: cannot be used as certificate and key: {error}", file=str(cert_file)
        ) from error
    return context
