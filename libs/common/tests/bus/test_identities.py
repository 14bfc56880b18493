"""Credentials against a real server: revoked, expired, renewed, forged ones; and policies that cannot be read."""

import asyncio
import re
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from hive_common.bus.authority import Authority
from hive_common.bus.claims import push_account
from hive_common.bus.jwt import (
    Credentials,
    claims_of,
    credentials_text,
    executor_jwt,
    new_seed,
    public_nkey,
    read_credentials,
    sign,
    user_jwt,
)
from hive_common.bus.nats import connect
from hive_common.bus.policy import EXTENSION, Identity, policy, read_policy
from hive_common.contracts.messages import inbox_prefix
from hive_common.kernel.errors import DeadlineExceeded, Internal, InvalidArgument, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import NatsConfig
from hive_common.testing.nats import EmbeddedNats
from nats.aio.client import Client, RawCredentials

WAIT_S = 20.0


@pytest.fixture
def server(server_dir: Path) -> Iterator[EmbeddedNats]:
    found = EmbeddedNats(server_dir, authority=Authority.new())
    found.start()
    yield found
    found.stop(signal.SIGKILL)


def now() -> int:
    return int(time.time())


async def refused(server: EmbeddedNats, made: Credentials) -> bool:
    """Whether the server takes nobody with these credentials. Any other trouble raises."""
    client = Client()
    try:
        await client.connect(
            server.url,
            user_credentials=RawCredentials(credentials_text(made)),
            allow_reconnect=False,
            error_cb=_quiet,
        )
    except nats.errors.Error as error:
        assert re.search("authorization violation|authentication expired", str(error).lower())
        return True
    await client.close()
    return False


async def _quiet(_: Exception) -> None:
    """The error is raised as well."""


@asynccontextmanager
async def system(server: EmbeddedNats, folder: Path) -> AsyncIterator[Client]:
    client = await connect(server.issuer.service("registry-system", folder), "registry-system")
    try:
        yield client
    finally:
        await client.close()


# --- revocation ---


async def test_a_revoked_executor_is_cut_off_at_once_and_stays_out_after_restarts(
    server: EmbeddedNats, tmp_path: Path
) -> None:
    authority = server.issuer.authority
    cut_off, disturbed = asyncio.Event(), asyncio.Event()

    async def was_cut_off() -> None:
        cut_off.set()

    async def was_disturbed() -> None:
        disturbed.set()

    executor = new_id()
    config = server.issuer.executor(executor, tmp_path)
    revoked = read_credentials(config.credentials_file)
    other_id = new_id()
    other = await connect(
        server.issuer.executor(other_id, tmp_path),
        other_id,
        inbox=inbox_prefix(other_id),
        on_disconnect=was_disturbed,
    )
    client = await connect(config, executor, inbox=inbox_prefix(executor), on_disconnect=was_cut_off)
    account = authority.account_jwt(now(), (public_nkey(revoked.seed),))
    try:
        async with system(server, tmp_path) as pushing:
            await push_account(pushing, account)
        async with asyncio.timeout(WAIT_S):
            await cut_off.wait()
        assert not client.is_connected
        assert await refused(server, revoked)
        # Also with credentials that are issued later, for the same key.
        assert await refused(server, authority.executor(executor, revoked.seed, now() + 3600))
        await other.flush()
        assert other.is_connected and not disturbed.is_set()
    finally:
        await client.close()
        await other.close()
    # The server was configured with an account that revokes nobody; what it was told since is newer, and on disk.
    server.stop(signal.SIGKILL)
    server.start()
    assert await refused(server, revoked)
    assert not await refused(server, authority.executor(executor, new_seed("user"), now()))


async def test_an_account_that_is_given_again_after_its_loss_revokes_again(
    server: EmbeddedNats, tmp_path: Path
) -> None:
    made = server.issuer.authority.executor(new_id(), new_seed("user"), now())
    account = server.issuer.authority.account_jwt(now(), (public_nkey(made.seed),))
    server.stop(signal.SIGKILL)
    shutil.rmtree(server.directory / "accounts")
    server.start()
    assert not await refused(server, made)
    async with system(server, tmp_path) as pushing:
        await push_account(pushing, account)
        assert await refused(server, made)
        # Twice is as good as once.
        await push_account(pushing, account)
        assert await refused(server, made)


async def test_what_is_no_account_is_refused_with_the_reason(server: EmbeddedNats, tmp_path: Path) -> None:
    user = server.issuer.authority.service("gateway", now()).jwt
    async with system(server, tmp_path) as pushing:
        with pytest.raises(Internal, match="NATS refused the account: jwt update resulted in error"):
            await push_account(pushing, user)
        with pytest.raises(InvalidArgument, match="expected a JWT"):
            await push_account(pushing, "garbage")


async def test_a_server_that_is_away_is_said_to_be(server: EmbeddedNats, tmp_path: Path) -> None:
    async with system(server, tmp_path) as pushing:
        server.stop(signal.SIGKILL)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await push_account(pushing, server.issuer.authority.account_jwt(now()), timeout_s=0.2)


# --- expiry and renewal ---


async def test_a_connection_whose_credentials_expire_comes_back_with_renewed_ones(
    server: EmbeddedNats, tmp_path: Path
) -> None:
    authority, executor, seed = server.issuer.authority, new_id(), new_seed("user")
    file = tmp_path / "executor.creds"
    file.touch(mode=0o600)
    file.write_text(credentials_text(authority.executor(executor, seed, now(), valid_s=4)))
    gone, back = asyncio.Event(), asyncio.Event()

    async def disconnected() -> None:
        gone.set()

    async def reconnected() -> None:
        back.set()

    client = await connect(
        NatsConfig(server.url, str(file)),
        executor,
        inbox=inbox_prefix(executor),
        on_disconnect=disconnected,
        on_reconnect=reconnected,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            await gone.wait()
            # To the server the last second is not over yet.
            while not await refused(server, read_credentials(file)):
                await asyncio.sleep(0.05)
            back.clear()
            file.write_text(credentials_text(authority.executor(executor, seed, now())))
            await back.wait()
        assert client.is_connected
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("", 0o600, "is empty"),
        ("a password\n", 0o600, "expected NATS credentials"),
        ("-----BEGIN NATS USER JWT-----\n", 0o600, "expected NATS credentials"),
        ("-----BEGIN NATS USER JWT-----\nx\n-----BEGIN USER NKEY SEED-----\nSU\n", 0o644, "chmod 600"),
        (None, 0o600, "cannot be read"),
    ],
)
async def test_credentials_that_cannot_be_used_are_refused_with_their_file(
    tmp_path: Path, content: str | None, mode: int, said: str
) -> None:
    file = tmp_path / "broken.creds"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(InvalidArgument, match=said) as raised:
        await connect(NatsConfig("nats://127.0.0.1:1", str(file)), "x")
    assert str(file) in raised.value.message


async def test_a_ca_that_cannot_be_used_is_refused_with_its_file(server: EmbeddedNats, tmp_path: Path) -> None:
    good = server.issuer.service("gateway", tmp_path)
    with pytest.raises(InvalidArgument, match=r"no\.pem: cannot be used as CA"):
        await connect(NatsConfig(good.url, good.credentials_file, str(tmp_path / "no.pem")), "gateway")


async def test_nothing_is_said_to_a_server_without_tls_where_a_ca_is_named(
    server: EmbeddedNats, tmp_path: Path
) -> None:
    """Somebody in between could answer in plain text, and relay what signs the connection."""
    said = bytearray()
    heard = asyncio.Event()

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"nonce":"abc","auth_required":true}\r\n')
        said.extend(await reader.read(4096))
        heard.set()
        writer.close()

    good = server.issuer.service("gateway", tmp_path)
    ca = tmp_path / "ca.pem"
    ca.write_text(_certificate())
    pretender = await asyncio.start_server(pretend, "127.0.0.1", 0)
    url = f"tls://127.0.0.1:{pretender.sockets[0].getsockname()[1]}"
    connecting = asyncio.create_task(connect(NatsConfig(url, good.credentials_file, str(ca)), "gateway"))
    try:
        async with asyncio.timeout(WAIT_S):
            await heard.wait()
        assert said[0] == 0x16, "a TLS handshake (RFC 8446, section 5.1)"
        assert b"CONNECT" not in said and b"jwt" not in said
    finally:
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        pretender.close()


def _certificate() -> str:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name, begin = x509.Name([]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


# --- forgery ---


def _by_itself(authority: Authority, executor: str, seed: str) -> str:
    return executor_jwt(seed, authority.account, executor, public_nkey(seed), now())


def _of_another_installation(authority: Authority, executor: str, seed: str) -> str:
    return Authority.new().executor(executor, seed, now()).jwt


def _with_rights_of_its_own(authority: Authority, executor: str, seed: str) -> str:
    claims = claims_of(authority.executor(executor, seed, now()).jwt)
    claims["nats"] |= {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}
    return sign(claims, authority.signing_seed, now())


def _without_an_account(authority: Authority, executor: str, seed: str) -> str:
    claims = claims_of(authority.executor(executor, seed, now()).jwt)
    del claims["nats"]["issuer_account"]
    return sign(claims, authority.signing_seed, now())


def _expired(authority: Authority, executor: str, seed: str) -> str:
    return authority.executor(executor, seed, now() - 100, valid_s=50).jwt


def _altered(authority: Authority, executor: str, seed: str) -> str:
    head, body, signature = authority.executor(executor, seed, now()).jwt.split(".")
    other = authority.executor(new_id(), seed, now()).jwt.split(".")[1]
    assert body != other
    return f"{head}.{other}.{signature}"


def _of_another_key(authority: Authority, executor: str, seed: str) -> str:
    return authority.executor(executor, new_seed("user"), now()).jwt


def _for_a_websocket(authority: Authority, executor: str, seed: str) -> str:
    identity = policy()[EXTENSION].named("x")
    claims = claims_of(user_jwt(authority.account_seed, identity, "x", public_nkey(seed), now()))
    claims["nats"]["allowed_connection_types"] = ["WEBSOCKET"]
    return sign(claims, authority.account_seed, now())


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    found = EmbeddedNats(tmp_path_factory.mktemp("nats"), authority=Authority.new())
    found.start()
    yield found
    found.stop()


@pytest.mark.parametrize(
    "forge",
    [
        _by_itself,
        _of_another_installation,
        _with_rights_of_its_own,
        _without_an_account,
        _expired,
        _altered,
        _of_another_key,
        _for_a_websocket,
    ],
)
async def test_the_server_takes_no_forged_credentials(lasting: EmbeddedNats, forge: Any) -> None:
    authority, executor, seed = lasting.issuer.authority, new_id(), new_seed("user")
    assert not await refused(lasting, authority.executor(executor, seed, now()))
    assert await refused(lasting, Credentials(forge(authority, executor, seed), seed))


@pytest.mark.parametrize(
    ("executor", "user"),
    [
        ("*", None),
        (">", None),
        ("a.b", None),
        ("", None),
        ("fine", "UAAA"),
        pytest.param("fine", public_nkey(new_seed("account")), id="the key of an account"),
    ],
)
def test_no_executor_is_signed_for_whose_name_or_key_is_none(executor: str, user: str | None) -> None:
    """The server would fill a wildcard into its template: whoever is named so may use the subjects of all."""
    authority = Authority.new()
    with pytest.raises(InvalidArgument):
        executor_jwt(
            authority.signing_seed, authority.account, executor, user or public_nkey(new_seed("user")), now()
        )


def test_a_seed_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(InvalidArgument) as raised:
        public_nkey("not-a-seed")
    assert "not-a-seed" not in str(raised.value)


# --- the policy ---

GOOD = '[x]\naccount = "hive"\ninbox = "_SVC.x"\npublish = []\nsubscribe = ["_SVC.x.>"]\n'


def test_whoever_may_publish_nothing_is_denied_everything() -> None:
    """An allow-list that is empty would allow everything."""
    seed = new_seed("account")
    nothing: Identity = read_policy(GOOD)["x"]
    claims = claims_of(user_jwt(seed, nothing, "x", public_nkey(new_seed("user")), now()))
    assert claims["nats"]["pub"] == {"deny": [">"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("publish = []", 'publish = [">"]'), "the first of them no wildcard"),
        (("publish = []", 'publish = ["*.x"]'), "the first of them no wildcard"),
        (("publish = []", 'publish = ["a..b"]'), r"x\.publish: 'a\.\.b'"),
        (("publish = []", 'publish = ["a.>.b"]'), "expected tokens"),
        (("publish = []", 'publish = ["a.b*"]'), "expected tokens"),
        (("publish = []", 'publish = ["a b"]'), "expected tokens"),
        (('subscribe = ["_SVC.x.>"]', "subscribe = []"), "its own inbox"),
        (('account = "hive"', 'account = "root"'), "account"),
        (('account = "hive"', 'account = "hive"\nallow = []'), "allow"),
        (("publish = []\n", ""), "publish"),
        (("[x]", "[x"), "policy.toml"),
    ],
)
def test_a_policy_that_says_too_much_or_nonsense_is_refused(change: tuple[str, str], said: str) -> None:
    assert read_policy(GOOD)
    with pytest.raises(InvalidArgument, match=said):
        read_policy(GOOD.replace(*change))
