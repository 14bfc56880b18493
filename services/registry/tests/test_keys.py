"""API keys: made once, shown once, revoked for ever."""

import asyncio
import hashlib
from typing import Any

import pytest
from hive_common.contracts.events import JoinTokenUsed, KeyCreated, KeyRevoked, decode
from hive_common.kernel.errors import Conflict, HiveError, InvalidArgument, NotFound, UnknownEvent
from hive_common.kernel.ids import derive_id
from hive_common.rpc.client import call
from hive_proto.keys.v1 import keys_pb2 as pb
from hive_proto.keys.v1 import keys_pb2_grpc
from hive_registry.domain.keys import NEVER_CREATED, KeyState, create, evolve_key, revoke

from .conftest import Registry

DIGEST = "0" * 64
KEY = KeyCreated("ci", DIGEST)


def stub_of(registry: Registry) -> keys_pb2_grpc.KeysStub:
    return keys_pb2_grpc.KeysStub(registry.channel)


async def made(registry: Registry, name: str = "ci", **fields: Any) -> pb.Created:
    request = pb.CreateRequest(name=name, caller="admin-1", **fields)
    return await call(stub_of(registry).Create(request, metadata=registry.key))


async def found(registry: Registry, secret: str) -> pb.FindResponse:
    request = pb.FindRequest(digest=hashlib.sha256(secret.encode()).hexdigest())
    return await call(stub_of(registry).Find(request, metadata=registry.key))


async def test_a_secret_is_in_the_answer_and_nowhere_else(registry: Registry) -> None:
    created = await made(registry, pin="pool", counts_only=True, cloud=True)
    assert created.secret.startswith("hive_")
    key = (await found(registry, created.secret)).key
    assert (key.name, key.scope, key.pin, key.counts_only, key.cloud) == ("ci", "user", "pool", True, True)
    assert key.pseudonym == derive_id("caller", registry.config.owner, "ci")
    (stored,) = await registry.events()
    assert (stored.type, stored.actor) == ("KeyCreated", "admin-1")
    assert created.secret.encode() not in (stored.payload or b"")
    event = decode(stored.type, stored.schema, stored.payload or b"")
    assert event == KeyCreated(
        "ci", hashlib.sha256(created.secret.encode()).hexdigest(), "user", "pool", True, True
    )
    assert not (await found(registry, "hive_other")).HasField("key")


async def test_the_same_key_again_after_an_answer_that_was_lost_is_the_same(registry: Registry) -> None:
    first = await made(registry, digest=DIGEST)
    assert await made(registry, digest=DIGEST) == first
    assert first.secret == ""
    with pytest.raises(Conflict, match="ci"):
        await made(registry, digest="1" * 64)
    assert len(await registry.events()) == 1


async def test_of_several_who_make_a_name_at_once_one_gets_it(registry: Registry) -> None:
    outcomes = await asyncio.gather(*(made(registry) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, pb.Created) for one in outcomes) == 1
    assert {type(one) for one in outcomes} == {pb.Created, Conflict}


async def test_revoked_is_for_ever_and_twice_is_no_error(registry: Registry) -> None:
    created = await made(registry)
    request = pb.RevokeRequest(name="ci", reason="leaked", caller="admin-1")
    stub = stub_of(registry)
    revoked = await call(stub.Revoke(request, metadata=registry.key))
    assert revoked.revoked_us > 0
    assert await call(stub.Revoke(request, metadata=registry.key)) == revoked
    assert (await found(registry, created.secret)).key.revoked_us > 0
    with pytest.raises(Conflict, match="never used"):
        await made(registry)
    assert [event.type for event in await registry.events()] == ["KeyCreated", "KeyRevoked"]


async def test_keys_are_listed_in_pages(registry: Registry) -> None:
    for name in ("c", "a", "b"):
        await made(registry, name)
    stub = stub_of(registry)
    first = await call(stub.List(pb.ListRequest(limit=2), metadata=registry.key))
    rest = await call(stub.List(pb.ListRequest(limit=2, after="b"), metadata=registry.key))
    assert [key.name for key in (*first.keys, *rest.keys)] == ["a", "b", "c"]
    with pytest.raises(NotFound, match="hive key list"):
        await call(stub.Get(pb.GetRequest(name="d"), metadata=registry.key))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": ""}, "name"),
        ({"name": "CI"}, "name"),
        ({"name": "owner"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"scope": "root"}, "scope"),
        ({"pin": "mars"}, "pin"),
        ({"digest": "secret"}, "digest"),
    ],
)
def test_what_is_no_key_is_refused_with_its_path(fields: dict[str, str], path: str) -> None:
    key = KeyCreated(**{"name": "ci", "digest": DIGEST, **fields})
    with pytest.raises(InvalidArgument) as caught:
        create(NEVER_CREATED, key)
    assert caught.value.fields["path"] == path


def test_decisions_follow_from_the_state() -> None:
    good = evolve_key(NEVER_CREATED, KEY)
    revoked = evolve_key(good, KeyRevoked())
    assert (good, revoked) == (KeyState(1, KEY), KeyState(2, KEY, True))
    assert revoke(good, "ci", "x") == (KeyRevoked("x"),)
    assert revoke(revoked, "ci", "x") == ()
    cases: list[tuple[KeyState, type[HiveError]]] = [(revoked, Conflict), (good, Conflict)]
    for state, kind in cases:
        with pytest.raises(kind):
            create(state, KeyCreated("ci", "1" * 64))
    with pytest.raises(NotFound):
        revoke(NEVER_CREATED, "ci", "")
    with pytest.raises(UnknownEvent):
        evolve_key(good, JoinTokenUsed("x"))
