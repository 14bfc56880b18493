"""Responses over HTTP that are lost after the work was done, on a running installation: whole, or a part of them.

The command line and the executors ask again, and what was done is done once. The cases are held against the
clients: a method without one fails.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hive_cli.api import Api
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import Unavailable
from hive_common.kernel.ids import new_id
from hive_common.testing.ports import calls_of
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.scripted import text_of
from hive_common.testing.wire import http_answered
from hive_executor.blobs import BlobClient, FolderCache
from hive_executor.gateway import Gateway
from hive_proto.jobs.v1 import jobs_pb2

from tests.chaos.answers import MODEL, TOKENS, Rig, cancelled_once, document, submitted_once


@pytest.fixture
async def door(rig: Rig) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(int(rig.url.rpartition(":")[2])) as proxy:
        yield proxy


class ThroughDoor:
    """An `Api` whose connections go through a proxy."""

    def __init__(self, rig: Rig, proxy: TcpProxy) -> None:
        self.proxy = proxy
        self.api = rig.api()
        self.api._client.base_url = httpx.URL(f"http://127.0.0.1:{proxy.port}")

    async def __call__(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(getattr(self.api, method), *args)


async def api_get(rig: Rig, api: ThroughDoor) -> None:
    assert (await api("get", f"/v1/jobs/{rig.job_id}"))["state"] == "succeeded"


async def api_post(rig: Rig, api: ThroughDoor) -> None:
    answer = await api("post", "/v1/jobs", json.loads(document(2, 1)), {"idempotency-key": new_id()})
    assert answer["existed"]
    await submitted_once(rig, None, jobs_pb2.SubmitResponse(job_id=answer["job_id"]))


async def api_delete(rig: Rig, api: ThroughDoor) -> None:
    job_id = await rig.submit(2, 50_000)
    await api("delete", f"/v1/jobs/{job_id}")
    await cancelled_once(rig, jobs_pb2.CancelRequest(job_id=job_id), None)


async def api_pages(rig: Rig, api: ThroughDoor) -> None:
    found = await asyncio.to_thread(lambda: list(api.api.pages(f"/v1/jobs/{rig.job_id}/events", "events", "from")))
    assert [event["position"] for event in found] == rig.events


async def api_get_blob(rig: Rig, api: ThroughDoor) -> None:
    assert digest_of(await api("get_blob", rig.digest)) == rig.digest


async def api_put_blob(rig: Rig, api: ThroughDoor) -> None:
    data = new_id().encode() * 1000
    await api("put_blob", data, digest_of(data))
    assert await api("get_blob", digest_of(data)) == data


async def api_download(rig: Rig, api: ThroughDoor) -> None:
    """Nothing is resumed: it says Unavailable, and another download is whole."""

    def download() -> list[dict[str, Any]]:
        with api.api.download("/v1/audit/export") as chunks:
            return [json.loads(line) for line in b"".join(chunks).splitlines()]

    with pytest.raises(Unavailable):
        await asyncio.to_thread(download)
    *lines, trailer = await asyncio.to_thread(download)
    assert trailer["count"] == len(lines) - 1 >= rig.head


async def api_events(rig: Rig, api: ThroughDoor) -> None:
    path = f"/v1/jobs/{rig.job_id}/stream"
    found = await asyncio.to_thread(lambda: list(api.api.events(path)))
    assert [int(event.id) for event in found] == rig.events


async def api_answer_events(rig: Rig, api: ThroughDoor) -> None:
    """Nothing is sent again by itself: it says Unavailable, at whichever point it broke; another call is whole."""
    said = new_id()
    seen: list[str] = []

    def ask() -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": said}], "stream": True}
        seen.clear()
        with api.api.answer_events("/v1/chat/completions", body) as (_, events):
            seen.extend(event.data for event in events)

    async def recorded(count: int) -> bool:
        payloads = [record.payload or b"" for record in await rig.records()]
        found = sum(said.encode() in payload for payload in payloads)
        assert found <= count, "it was sent again"
        return found == count

    with pytest.raises(Unavailable):
        await asyncio.to_thread(ask)
    assert seen == []
    await rig.until(lambda: recorded(1), "the call whose answer was lost is recorded")
    cut = api.proxy.cut_inside_next_answer(2_000)
    with pytest.raises(Unavailable):
        await asyncio.to_thread(ask)
    assert cut.is_set() and seen and "[DONE]" not in seen
    await rig.until(lambda: recorded(2), "the call whose answer broke off is recorded")
    await asyncio.to_thread(ask)
    assert seen[-1] == "[DONE]"
    deltas = [choice["delta"] for data in seen[:-1] for choice in json.loads(data)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == text_of(TOKENS)
    await rig.until(lambda: recorded(3), "the call that was answered is recorded")


API: dict[str, Callable[[Rig, ThroughDoor], Awaitable[None]]] = {
    "get": api_get,
    "post": api_post,
    "delete": api_delete,
    "pages": api_pages,
    "get_blob": api_get_blob,
    "put_blob": api_put_blob,
    "download": api_download,
    "events": api_events,
    "answer_events": api_answer_events,
}


def test_every_call_of_the_command_line_has_a_case() -> None:
    assert API.keys() == {name for name, found in vars(Api).items() if callable(found) and name[0] != "_"}


@pytest.mark.parametrize("name", API)
async def test_a_response_to_the_command_line_is_lost(rig: Rig, door: TcpProxy, name: str) -> None:
    api = ThroughDoor(rig, door)
    # An upload asks first whether the blob is there; that answer has no body.
    for until, skip in ((b"\r\n\r\n", 0), (http_answered, 1)) if name == "put_blob" else ((http_answered, 0),):
        cut = door.cut_next_answer(until, skip=skip)
        await API[name](rig, api)
        assert cut.is_set()


def blob_client(rig: Rig, door: TcpProxy, folder: Path) -> tuple[BlobClient, Gateway]:
    cache = FolderCache(folder, 1 << 20)
    header = {"Authorization": f"Bearer {rig.home.api_key()}"}
    gateway = Gateway(lambda: f"http://127.0.0.1:{door.port}", lambda: header)
    return BlobClient(gateway, cache, 60_000), gateway


async def blob_store(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """The response to the upload is lost: it is sent again, and is there."""
    data = new_id().encode() * 10_000
    client, gateway = blob_client(rig, door, folder)
    cut = door.cut_next_answer(http_answered)
    assert await client.store(data) == digest_of(data)
    assert cut.is_set() and door.connections == 2
    assert await client.fetch(digest_of(data)) == data
    await client.close()
    await gateway.close()


async def blob_fetch(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """Lost whole, in its head, in its body and at its last byte: what is kept is whole."""
    data = new_id().encode() * 10_000
    client, gateway = blob_client(rig, door, folder)
    await client.store(data)
    for lose in (
        lambda: door.cut_next_answer(http_answered),
        lambda: door.cut_inside_next_answer(10),
        lambda: door.cut_inside_next_answer(len(data) // 2),
        lambda: door.cut_inside_next_answer(len(data)),
    ):
        for kept in folder.iterdir():
            kept.unlink()
        cut = lose()
        assert await client.fetch(digest_of(data)) == data
        assert cut.is_set()
        assert [kept.read_bytes() for kept in folder.iterdir()] == [data]
    await client.close()
    await gateway.close()


async def blob_close(rig: Rig, door: TcpProxy, folder: Path) -> None:
    """Closing asks for nothing that could be lost."""
    client, gateway = blob_client(rig, door, folder)
    await client.fetch(rig.digest)
    cut = door.cut_next_answer()
    await client.close()
    await gateway.close()
    assert not cut.is_set()


BLOBS = {"store": blob_store, "fetch": blob_fetch, "close": blob_close}


def test_every_call_of_an_executor_for_blobs_has_a_case() -> None:
    assert BLOBS.keys() == calls_of(BlobClient)


@pytest.mark.parametrize("name", BLOBS)
async def test_a_response_to_an_executor_is_lost(rig: Rig, door: TcpProxy, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    await BLOBS[name](rig, door, folder)
