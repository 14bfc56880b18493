"""Grants at a running registry: events, a view that can be made anew, and answers in words."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import PermissionGranted, decode
from hive_common.contracts.permissions import KvPermission, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, NotFound
from hive_common.kernel.ids import derive_id
from hive_common.rpc.client import call
from hive_proto.agents.v1 import agents_pb2 as pb

from .conftest import Registry

ASKS = "{model: {names: [small], max_tokens: 100}, kv: {namespace: notes, quota: 1Mi}}"
MODEL = Permissions(model=ModelPermission(("small",), 100))


async def grant(registry: Registry, wanted: Any, name: str = "asks", **fields: Any) -> pb.GrantsResponse:
    request = pb.GrantRequest(name=name, permissions_json=msgspec.json.encode(wanted), **fields)
    return await call(registry.agents.Grant(request, metadata=registry.key))


async def ungrant(registry: Registry, *names: str, **fields: Any) -> pb.GrantsResponse:
    request = pb.UngrantRequest(name="asks", permissions=names, **fields)
    return await call(registry.agents.Ungrant(request, metadata=registry.key))


async def grants(registry: Registry, name: str = "asks") -> pb.GrantsResponse:
    return await call(registry.agents.Grants(pb.GrantsRequest(name=name), metadata=registry.key))


def states(answer: pb.GrantsResponse) -> dict[str, str]:
    return {one.permission: one.state for one in answer.grants}


async def test_a_grant_is_an_event_and_is_said_in_words(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    before = await grants(registry)
    assert states(before) == {"model": "asked", "kv": "asked"}
    assert before.version == "1.0.0"
    answer = await grant(registry, {"model": None, "kv": {"quota": "1Ki"}}, ask=True, caller="me")
    assert states(answer) == {"model": "granted", "kv": "granted"}
    assert [one.words for one in answer.grants] == [
        "model: send what it knows to the language model small, wherever it runs, for at most 100 tokens "
        "per attempt; a person is asked each time",
        "kv: keep up to 1 KiB in the namespace 'notes', where later tasks and other agents with the same "
        "permission read them; a person is asked each time",
    ]
    stored = [event for event in await registry.events() if event.type == "PermissionGranted"]
    assert [event.actor for event in stored] == ["me", "me"]
    assert answer.grants[1].position == stored[1].position
    found = [decode(event.type, event.schema, event.payload) for event in stored if event.payload]
    assert found == [
        PermissionGranted("asks", "model", MODEL, MODEL, True),
        PermissionGranted(
            "asks",
            "kv",
            Permissions(kv=KvPermission("notes", 1 << 10)),
            Permissions(kv=KvPermission("notes", 1 << 20)),
            True,
        ),
    ]
    assert await grants(registry) == answer
    # The same again is no event.
    await grant(registry, {"model": None}, ask=True)
    assert len(await registry.events()) == 1 + len(stored)


async def test_what_is_taken_back_is_asked_for_only(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    await grant(registry, {"model": None, "kv": None})
    assert states(await ungrant(registry, "kv", reason="no more")) == {"model": "granted", "kv": "asked"}
    assert states(await ungrant(registry)) == {"model": "asked", "kv": "asked"}
    types = [event.type for event in await registry.events()]
    assert types.count("PermissionRevoked") == 2
    await ungrant(registry)
    assert len(await registry.events()) == len(types)
    assert states(await grant(registry, {"kv": None})) == {"model": "asked", "kv": "granted"}


async def test_a_version_that_asks_for_more_is_seen_to_need_a_new_grant(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    await grant(registry, {"model": None, "kv": None})
    more = "{model: {names: [small], max_tokens: 101}}"
    await registry.push(await registry.upload(package("asks", "1.1.0", permissions=more)))
    assert states(await grants(registry)) == {"model": "stale", "kv": "unused"}
    assert states(await grant(registry, {"model": None}))["model"] == "granted"
    with pytest.raises(InvalidArgument, match=r"asks@1\.1\.0 does not ask for it"):
        await grant(registry, {"kv": None})
    # A version that is yanked does not decide what is asked for.
    await call(
        registry.agents.Yank(pb.YankRequest(name="asks", version="1.1.0", reason="bad"), metadata=registry.key)
    )
    assert (await grants(registry)).version == "1.0.0"


async def test_a_grant_that_is_over_is_seen_to_have_expired(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    # As if it was granted long ago: now nobody could grant it until then.
    await registry.write(
        derive_id("grants", "default", "asks"), PermissionGranted("asks", "model", MODEL, MODEL, until_us=9)
    )
    while states(await grants(registry))["model"] != "expired":
        await asyncio.sleep(0.02)
    assert (await grants(registry)).grants[0].until_us == 9
    assert states(await grant(registry, {"model": None}))["model"] == "granted"


async def test_many_who_decide_at_once_do_not_lose_a_decision(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    await asyncio.gather(*(grant(registry, {name: None}) for name in ("model", "kv") * 3))
    assert states(await grants(registry)) == {"model": "granted", "kv": "granted"}
    assert [event.type for event in await registry.events()].count("PermissionGranted") == 2


async def test_an_agent_that_is_not_there_is_named_with_the_nearest(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    for ask in (grants(registry, "ask"), grant(registry, {"model": None}, "ask")):
        with pytest.raises(NotFound, match="asks"):
            await ask
    for name in ("a\x00", "", "A", "a" * 10_000):
        with pytest.raises(NotFound):
            await grants(registry, name)
        with pytest.raises(NotFound):
            await call(registry.agents.Ungrant(pb.UngrantRequest(name=name), metadata=registry.key))


async def test_nonsense_is_refused(registry: Registry, package: Any) -> None:
    await registry.push(await registry.upload(package("asks", permissions=ASKS)))
    for text in (b"[]", b"{", b'{"model"', b"[" * 10_000):
        request = pb.GrantRequest(name="asks", permissions_json=text)
        with pytest.raises(InvalidArgument):
            await call(registry.agents.Grant(request, metadata=registry.key))
