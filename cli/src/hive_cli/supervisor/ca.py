"""The private certificate authority of a home, and the certificates of what listens off the loopback.

Keys are ECDSA P-256 and never leave `secrets/`. The authority is made once: devices know it by its fingerprint.
"""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.files import replace_file

from hive_cli.home import Home
from hive_cli.supervisor import names
from hive_cli.supervisor.certificates import Files, files

AUTHORITY = "ca"
SERVERS = (names.NATS, names.GATEWAY)
"""What listens off the loopback. Each has a key of its own."""

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
RENEW_DAYS = 100
"""A certificate that is good for less than this is made anew at `up`."""

BACKDATED = timedelta(days=1)
"""A device whose clock is behind must be able to say so, rather than to meet a certificate of the future."""

_ALWAYS = ("localhost", "127.0.0.1", "::1")


def ensure_certificates(home: Home, address: str) -> None:
    """Make what is missing: the authority once, certificates for `address` where they fit no more or soon run out.

    Args:
        home: has its folders.
        address: IP address or host name under which other machines connect.

    Raises:
        InvalidArgument: a file of these is damaged.
        OSError: something cannot be written.
    """
    home.tls_dir.mkdir(exist_ok=True, mode=0o700)
    now = datetime.now(UTC)
    authority = _authority(home, now)
    wanted = list(dict.fromkeys((address, *_ALWAYS)))
    for name in SERVERS:
        place = files(home, name)
        if not _is_good(place, authority[0], wanted, now):
            _write(place, *_issue(authority, name, wanted, now))


def expiry(home: Home, name: str) -> datetime:
    """Return until when the certificate of `ca` or of one of `SERVERS` is good. Raises InvalidArgument."""
    return _certificate(files(home, name).certificate).not_valid_after_utc


def _authority(home: Home, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    place = files(home, AUTHORITY)
    # The certificate is written last: a key without one was never used.
    if place.certificate.exists():
        return _certificate(place.certificate), _key(place.key)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name("HiveFabric installation CA")
    made = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(place, made, key)
    return made, key


def _issue(
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey], name: str, wanted: list[str], now: datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    issuer, signer = authority
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        _builder(_name(f"HiveFabric {name}"), issuer.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(one) for one in wanted]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    return made, key


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _is_good(place: Files, issuer: x509.Certificate, wanted: list[str], now: datetime) -> bool:
    if not (place.certificate.exists() and place.key.exists()):
        return False
    found, key = _certificate(place.certificate), _key(place.key)
    names_in_it = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    try:
        found.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError):
        return False
    return (
        found.not_valid_after_utc - now > timedelta(days=RENEW_DAYS)
        and found.not_valid_before_utc <= now
        and found.public_key() == key.public_key()
        and list(names_in_it) == [_alternative(one) for one in wanted]
    )


def _write(place: Files, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    replace_file(place.key, encoded, mode=0o600)
    replace_file(place.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"{file}: expected a certificate in PEM: {error}; restore the file from a backup", file=str(file)
        ) from error


def _key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"{file}: expected a key in PEM: {error}; restore the file from a backup", file=str(file)
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidArgument(f"{file}: expected a key on an elliptic curve", file=str(file))
    return key
