"""Machines that join, with a real log and a real NATS server: once, by one of two, and until they are revoked."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import pytest
from hive_common.bus.assertion import private_key
from hive_common.bus.authority import Authority
from hive_common.bus.claims import push_account
from hive_common.bus.jwt import Credentials, claims_of, credentials_text, new_seed, public_nkey
from hive_common.bus.nats import connect, request
from hive_common.contracts.joining import proof_of
from hive_common.contracts.messages import HelloReply, HelloRequest, hello_subject, inbox_prefix
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from hive_common.kernel.ids import derive_id, new_id
from hive_common.ops.config import NatsConfig, ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.services import running_service, service_config
from hive_proto.executors.v1 import executors_pb2 as pb
from hive_registry.bootstrap import main
from nats.aio.client import Client

from .conftest import CAPABILITIES, Registry, identities

NATS = nats
WITHIN_S = 20.0
"""Far more than anything here takes; a test that needs it has failed."""


class Machine:
    """A machine that wants to join."""

    def __init__(self, name: str = "desktop") -> None:
        self.seed = new_seed("user")
        self.key = public_nkey(self.seed)
        self.name = name

    def shows(self, token: pb.IssueTokenResponse, **changes: Any) -> pb.EnrolRequest:
        proof = private_key(self.seed).sign(proof_of(token.token_id, self.name))
        shown = {"token_id": token.token_id, "secret": token.secret, "public_key": self.key}
        return pb.EnrolRequest(**shown | {"name": self.name, "proof": proof} | changes)

    def nats(self, credentials: pb.Credentials, folder: Path) -> NatsConfig:
        """Return how the machine connects with what it was given."""
        file = folder / f"{credentials.executor_id}.creds"
        file.touch(mode=0o600)
        file.write_text(credentials_text(Credentials(credentials.nats_jwt, self.seed)))
        return NatsConfig(credentials.nats_url, str(file))


async def issue(registry: Registry, **fields: Any) -> pb.IssueTokenResponse:
    return await call(registry.executors.IssueToken(pb.IssueTokenRequest(**fields), metadata=registry.key))


async def enrol(registry: Registry, shown: pb.EnrolRequest) -> pb.Credentials:
    return await call(registry.executors.Enrol(shown, metadata=registry.key))


async def revoke(registry: Registry, executor: str) -> pb.Executor:
    return await call(registry.executors.Revoke(pb.RevokeRequest(executor_id=executor), metadata=registry.key))


async def hello(client: Client, executor: str) -> HelloReply:
    body = HelloRequest(name="desktop", session="s", capabilities=CAPABILITIES)
    return await request(client, hello_subject(executor), body, HelloReply, WITHIN_S)


async def test_a_machine_joins_connects_and_is_known(registry: Registry, tmp_path: Path) -> None:
    machine = Machine()
    token = await issue(registry, valid_s=120, owner="Grandma")
    credentials = await enrol(registry, machine.shows(token))
    owner = derive_id("owner", registry.config.owner, "Grandma")
    assert (credentials.owner, credentials.blobs_url) == (owner, "http://127.0.0.1:8500")
    assert credentials.executor_id == derive_id("executor", machine.key)
    assert claims_of(credentials.nats_jwt)["exp"] * 1_000_000 == credentials.expires_us
    client = await connect(machine.nats(credentials, tmp_path), "m", inbox=inbox_prefix(credentials.executor_id))
    assert (await hello(client, credentials.executor_id)).error is None
    await client.close()
    issued, used, enrolled, registered = await registry.events()
    assert [e.type for e in (issued, used, enrolled, registered)] == [
        "JoinTokenIssued",
        "JoinTokenUsed",
        "ExecutorEnrolled",
        "ExecutorRegistered",
    ]
    assert (issued.stream, used.stream, enrolled.stream) == (
        token.token_id,
        token.token_id,
        credentials.executor_id,
    )
    # What an executor says belongs to its owner; the token was the installation's.
    assert (issued.owner, used.owner) == (registry.config.owner,) * 2
    assert (enrolled.owner, registered.owner) == (owner, owner)
    for event in (issued, used, enrolled):
        assert token.secret.encode() not in event.event and token.secret.encode() not in (event.payload or b"")
        assert b"Grandma" not in event.event
    got = await call(registry.executors.Get(pb.GetRequest(executor_id="desktop"), metadata=registry.key))
    assert (got.owner, got.owner_name, got.revoked) == (owner, "Grandma", False)
    (key,) = (
        await call(
            registry.executors.Keys(
                pb.KeysRequest(executor_ids=[credentials.executor_id, new_id()]), metadata=registry.key
            )
        )
    ).keys
    assert (key.public_key, key.owner, key.revoked) == (machine.key, owner, False)


async def test_a_machine_of_the_installations_owner_is_the_owners(registry: Registry) -> None:
    credentials = await enrol(registry, Machine().shows(await issue(registry)))
    assert credentials.owner == registry.config.owner


async def test_an_answer_that_was_lost_is_given_again(registry: Registry) -> None:
    machine = Machine()
    token = await issue(registry)
    first = await enrol(registry, machine.shows(token))
    again = await enrol(registry, machine.shows(token))
    assert (first.executor_id, first.owner) == (again.executor_id, again.owner)
    assert len(await registry.events()) == 3


async def test_of_two_who_show_one_token_at_the_same_time_one_gets_in(registry: Registry) -> None:
    machines = [Machine(f"m{n}") for n in range(6)]
    token = await issue(registry)
    answers = await asyncio.gather(
        *(enrol(registry, machine.shows(token)) for machine in machines), return_exceptions=True
    )
    admitted = [answer for answer in answers if isinstance(answer, pb.Credentials)]
    refused = [answer for answer in answers if isinstance(answer, FailedPrecondition)]
    assert (len(admitted), len(refused)) == (1, 5)
    assert {error.message for error in refused} == {
        "this token was used by another machine; each works once: make a new one on the first machine with: "
        "hive executor token"
    }
    assert [e.type for e in await registry.events()] == ["JoinTokenIssued", "JoinTokenUsed", "ExecutorEnrolled"]


async def test_the_same_machine_may_come_several_times_at_once(registry: Registry) -> None:
    machine = Machine()
    token = await issue(registry)
    answers = await asyncio.gather(*(enrol(registry, machine.shows(token)) for _ in range(6)))
    assert len({answer.executor_id for answer in answers}) == 1
    assert len(await registry.events()) == 3


async def test_a_key_that_joined_does_not_use_up_a_second_token(registry: Registry) -> None:
    machine = Machine()
    await enrol(registry, machine.shows(await issue(registry)))
    second = await issue(registry)
    with pytest.raises(Conflict, match="joined already, with another token"):
        await enrol(registry, machine.shows(second))
    assert (await enrol(registry, Machine().shows(second))).executor_id


FOREIGN = pb.IssueTokenResponse(token_id=new_id(), secret="of another installation")


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"token_id": FOREIGN.token_id}, Unauthenticated, "this installation never issued such a token"),
        ({"token_id": "x"}, InvalidArgument, "token_id"),
        ({"secret": "wrong"}, Unauthenticated, "the secret of this token is wrong"),
        ({"public_key": "U"}, InvalidArgument, "not the public nkey of a user"),
        ({"proof": bytes(64)}, InvalidArgument, "proof"),
        ({"name": ""}, InvalidArgument, "name: is empty"),
    ],
)
async def test_who_does_not_get_in_changes_nothing(
    registry: Registry, changes: dict[str, Any], kind: type[HiveError], sentence: str
) -> None:
    token = await issue(registry)
    machine = Machine()
    with pytest.raises(kind, match=sentence):
        await enrol(registry, machine.shows(token, **changes))
    assert [e.type for e in await registry.events()] == ["JoinTokenIssued"]
    assert (await enrol(registry, machine.shows(token))).executor_id


async def test_an_expired_token_is_refused(config: ServiceConfig, database: Database, nats_server: Any) -> None:
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        token = await issue(registry, valid_s=60)
        async with _an_hour_later():
            with pytest.raises(FailedPrecondition, match="this token has expired; make a new one"):
                await enrol(registry, Machine().shows(token))
        await enrol(registry, Machine().shows(token))
        await registry.close()


@contextlib.asynccontextmanager
async def _an_hour_later() -> AsyncIterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        now_us = SystemClock.now_us
        patch.setattr(SystemClock, "now_us", lambda self: now_us(self) + 3_600_000_000)
        yield


@pytest.mark.parametrize("fields", [{"valid_s": 59}, {"valid_s": -1}, {"valid_s": 604_801}, {"owner": "a\nb"}])
async def test_a_token_beyond_its_bounds_is_not_made(registry: Registry, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await issue(registry, **fields)
    assert await registry.events() == []


async def test_a_hello_of_an_executor_that_is_not_enrolled_is_refused(registry: Registry) -> None:
    reply = await registry.hello(new_id())
    assert reply.error is not None
    assert reply.error.code == "failed_precondition"
    assert "join with: hive executor join TOKEN" in reply.error.message
    assert await registry.events() == []


async def test_credentials_are_for_who_is_enrolled(registry: Registry) -> None:
    for executor, kind in ((new_id(), NotFound), ("x", InvalidArgument)):
        with pytest.raises(kind):
            await call(registry.executors.Renew(pb.RenewRequest(executor_id=executor), metadata=registry.key))
    executor = await registry.joined()
    renewed = await call(registry.executors.Renew(pb.RenewRequest(executor_id=executor), metadata=registry.key))
    assert claims_of(renewed.nats_jwt)["name"] == executor


async def test_executors_of_this_machine_are_enrolled_at_the_start_and_another_key_takes_the_place_of_one(
    config: ServiceConfig, database: Database, nats_server: Any, tmp_path: Path
) -> None:
    def local(executor: str, seed: str) -> ServiceConfig:
        entries = [{"id": executor, "name": "executor-1", "public_key": public_nkey(seed)}]
        return msgspec.structs.replace(
            config, extra=config.extra | {"local_executors": msgspec.Raw(msgspec.json.encode(entries))}
        )

    def nats_of(seed: str) -> NatsConfig:
        made = nats_server.issuer.authority.executor(executor, seed, int(time.time()))
        file = tmp_path / f"{public_nkey(seed)}.creds"
        file.touch(mode=0o600)
        file.write_text(credentials_text(made))
        return NatsConfig(nats_server.url, str(file))

    executor, first, second = new_id(), new_seed("user"), new_seed("user")
    for seed, other, events in ((first, "", 1), (first, "", 1), (second, first, 2), (first, second, 3)):
        async with running_service(main, local(executor, seed)) as channel:
            registry = Registry(config, channel, database, nats_server)
            assert [e.type for e in await registry.events()] == ["ExecutorEnrolled"] * events
            (key,) = (
                await call(registry.executors.Keys(pb.KeysRequest(executor_ids=[executor]), metadata=registry.key))
            ).keys
            assert key.public_key == public_nkey(seed)
            # What was signed for the key before is refused, and what comes back is taken.
            async with asyncio.timeout(WITHIN_S):
                while (other and not await _refused(nats_of(other))) or await _refused(nats_of(seed)):
                    await asyncio.sleep(0.05)
            await registry.close()


async def test_a_name_means_the_machine_that_is_in_and_not_one_that_was_revoked(registry: Registry) -> None:
    first = await enrol(registry, Machine("laptop").shows(await issue(registry)))
    await revoke(registry, "laptop")
    second = await enrol(registry, Machine("laptop").shows(await issue(registry)))
    assert (await revoke(registry, "laptop")).executor_id == second.executor_id
    with pytest.raises(Conflict, match="several executors have the name laptop"):
        await revoke(registry, "laptop")
    assert (await revoke(registry, first.executor_id)).revoked


async def _refused(nats: NatsConfig) -> bool:
    """Say whether the server refuses these credentials."""
    client = Client()
    creds = nats.credentials_file
    with contextlib.suppress(NATS.errors.Error):
        await client.connect(nats.url, user_credentials=creds, allow_reconnect=False, connect_timeout=5)
        await client.flush()
        await client.close()
        return False
    return True


@pytest.fixture
def own_nats(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    server = EmbeddedNats(tmp_path / "own-nats", authority=Authority.new())
    server.start()
    yield server
    server.stop()


async def test_a_revoked_executor_is_disconnected_at_once_and_stays_out_whatever_is_started_again(
    own_nats: EmbeddedNats, database: Database, tmp_path: Path
) -> None:
    extra = {"blobs_url": "http://127.0.0.1:8500", "identities": identities(own_nats.issuer, tmp_path)}
    config = service_config("registry", database, own_nats, tmp_path, extra=extra)
    machine, other = Machine("lost"), Machine("kept")
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, own_nats)
        credentials = await enrol(registry, machine.shows(await issue(registry)))
        kept = await enrol(registry, other.shows(await issue(registry)))
        lost = asyncio.Event()

        async def disconnected() -> None:
            lost.set()

        out = machine.nats(credentials, tmp_path)
        client = await connect(out, "m", inbox=inbox_prefix(credentials.executor_id), on_disconnect=disconnected)
        assert (await hello(client, credentials.executor_id)).error is None
        answer = await revoke(registry, "lost")
        assert (answer.state, answer.revoked) == ("revoked", True)
        # The answer came after the server had been told.
        async with asyncio.timeout(WITHIN_S):
            await lost.wait()
        assert await _refused(out)
        await client.close()
        assert (await revoke(registry, credentials.executor_id)).revoked
        with pytest.raises(PermissionDenied, match="revoked") as error:
            await call(
                registry.executors.Renew(
                    pb.RenewRequest(executor_id=credentials.executor_id), metadata=registry.key
                )
            )
        assert error.value.fields["reason"] == "revoked"
        with pytest.raises(PermissionDenied, match="join with a new one"):
            await enrol(registry, machine.shows(await issue(registry)))
        assert not await _refused(other.nats(kept, tmp_path))

        # NATS loses all that it was told, and is told again when it is back.
        own_nats.stop()
        for file in (tmp_path / "own-nats" / "accounts").glob("*.jwt"):
            file.unlink()
        own_nats.start()
        async with asyncio.timeout(WITHIN_S):
            while not await _refused(out):
                await asyncio.sleep(0.05)
        assert not await _refused(other.nats(kept, tmp_path))

    # Somebody gives the server an account without revocations while the registry is away: it takes it back.
    system = await connect(
        msgspec.structs.replace(config.nats, credentials_file=str(tmp_path / "nats-registry-system.creds")),
        "registry-system",
    )
    await push_account(system, own_nats.issuer.authority.account_jwt(int(time.time())))
    await system.close()
    assert not await _refused(out)
    async with running_service(main, config), asyncio.timeout(WITHIN_S):
        while not await _refused(out):
            await asyncio.sleep(0.05)
