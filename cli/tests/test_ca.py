"""The private CA: what its certificates are good for, as Python's ssl sees it, and when they are made anew."""

import asyncio
import ssl
import stat
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from hive_cli.home import Home
from hive_cli.supervisor import ca, certificates
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.tls import client_context, fingerprint_of, server_context

ADDRESS = "192.0.2.7"


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(home, ADDRESS)
    return home


def pem(home, name):
    return certificates.files(home, name).certificate.read_text()


@asynccontextmanager
async def listening(home, name="gateway"):
    """A server with a certificate of this home, and its port."""

    async def answer(reader, writer):
        writer.write(b"hello")
        await writer.drain()
        writer.close()

    own = certificates.files(home, name)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context(own.certificate, own.key))
    async with server:
        yield server.sockets[0].getsockname()[1]


async def read_from(port, context, name):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        return await reader.read()
    finally:
        writer.close()


def strict(home):
    context = client_context(certificates.files(home, ca.AUTHORITY).certificate)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.parametrize("name", [ADDRESS, "localhost", "127.0.0.1", "::1"])
@pytest.mark.parametrize("server", ca.SERVERS)
async def test_a_server_is_who_its_certificate_says(home, server, name):
    async with listening(home, server) as port:
        assert await read_from(port, strict(home), name) == b"hello"


async def test_another_name_is_refused(home):
    async with listening(home) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch.*192\.0\.2\.8"):
            await read_from(port, strict(home), "192.0.2.8")


async def test_the_ca_of_another_installation_is_refused(home, tmp_path):
    other = Home(tmp_path / "other")
    other.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(other, ADDRESS)
    async with listening(home) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            await read_from(port, strict(other), ADDRESS)


async def test_a_connection_without_tls_gets_nothing(home):
    async with listening(home) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"hello" not in await reader.read()
        writer.close()


def test_a_server_certificate_cannot_sign_others(home):
    found = x509.load_pem_x509_certificate(pem(home, "nats").encode())
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not found.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_keys_are_for_their_owner_only(home):
    for name in (ca.AUTHORITY, *ca.SERVERS):
        assert stat.S_IMODE(certificates.files(home, name).key.stat().st_mode) == 0o600


def test_nothing_is_made_twice(home):
    before = {name: pem(home, name) for name in (ca.AUTHORITY, *ca.SERVERS)}
    ca.ensure_certificates(home, ADDRESS)
    assert {name: pem(home, name) for name in before} == before


def test_another_address_gets_new_certificates_and_the_ca_stays(home):
    before = {name: pem(home, name) for name in (ca.AUTHORITY, *ca.SERVERS)}
    ca.ensure_certificates(home, "desktop.lan")
    assert pem(home, ca.AUTHORITY) == before[ca.AUTHORITY]
    assert all(pem(home, name) != before[name] for name in ca.SERVERS)


class Later(datetime):
    days = 0

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=cls.days)


@pytest.mark.parametrize(
    ("days", "renewed"), [(ca.SERVER_DAYS - ca.RENEW_DAYS - 1, False), (300, True), (-3, True)]
)
def test_certificates_are_renewed_before_they_run_out_and_after_a_clock_was_set_back(
    home, monkeypatch, days, renewed
):
    before = {name: pem(home, name) for name in (ca.AUTHORITY, *ca.SERVERS)}
    monkeypatch.setattr(Later, "days", days)
    monkeypatch.setattr(ca, "datetime", Later)
    ca.ensure_certificates(home, ADDRESS)
    assert [pem(home, name) != before[name] for name in ca.SERVERS] == [renewed] * len(ca.SERVERS)
    assert pem(home, ca.AUTHORITY) == before[ca.AUTHORITY]


def test_a_clock_that_is_behind_still_finds_them_good(home):
    for name in (ca.AUTHORITY, *ca.SERVERS):
        found = x509.load_pem_x509_certificate(pem(home, name).encode())
        assert found.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)


def test_the_fingerprint_is_that_of_the_der(home):
    from cryptography.hazmat.primitives import hashes

    text = pem(home, ca.AUTHORITY)
    assert fingerprint_of(text) == x509.load_pem_x509_certificate(text.encode()).fingerprint(hashes.SHA256()).hex()
    with pytest.raises(InvalidArgument, match="not a certificate"):
        fingerprint_of("hello")


def test_a_damaged_key_is_named(home):
    file = certificates.files(home, ca.AUTHORITY).key
    file.write_text("nothing")
    with pytest.raises(InvalidArgument, match=str(file)):
        ca.ensure_certificates(home, "desktop.lan")
