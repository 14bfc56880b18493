"""Blobs and large inputs while answers of the artifact store are lost."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hive_common.artifacts.store import FolderStore
from hive_common.bus.authority import Authority
from hive_common.contracts.limits import INLINE_BYTES_MAX
from hive_common.contracts.values import digest_of
from hive_common.ops.ports import free_port
from hive_common.testing.answers import AnswersLost, every_other
from hive_common.testing.identities import Issuer

from .conftest import World, _world

DATA = b"x" * 100_000
LARGE = json.dumps(["x" * 100] * (INLINE_BYTES_MAX // 100)).encode()
DOCUMENT = b'{"apiVersion": "hive/v1", "kind": "Job", "name": "n", "tasks": [{"id": "a"}], "input": ' + LARGE + b"}"
ASKED_MAX = 5


@pytest.fixture
def losing() -> list[AnswersLost]:
    return []


@pytest.fixture
async def world(tmp_path: Path, losing: list[AnswersLost], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    def open_store(root: str) -> AnswersLost:
        losing.append(AnswersLost(FolderStore(root), every_other))
        return losing[0]

    monkeypatch.setattr("hive_gateway.bootstrap.FolderStore", open_store)
    nobody = Issuer(Authority.new(), f"nats://127.0.0.1:{free_port()}")
    async with _world(tmp_path, nobody.service("gateway", tmp_path)) as built:
        yield built


async def until_answered(http: Any, method: str, path: str, **request: Any) -> tuple[list[int], bytes]:
    """Ask again while the answer is 503, as clients do; return the statuses and the last body."""
    statuses: list[int] = []
    while not statuses or statuses[-1] == 503:
        assert len(statuses) < ASKED_MAX
        async with http.request(method, path, **request) as answer:
            statuses.append(answer.status)
            said = await answer.read()
    return statuses, said


async def test_a_blob_is_put_and_fetched_by_asking_again(
    world: World, http: Any, losing: list[AnswersLost]
) -> None:
    path = f"/v1/blobs/{digest_of(DATA)}"
    statuses, _ = await until_answered(http, "PUT", path, data=DATA)
    # 503 after it was looked for, 503 after it was stored; then it was there already.
    assert statuses[-1] == 200
    assert set(statuses[:-1]) == {503}
    for method, body in (("HEAD", b""), ("GET", DATA)):
        statuses, said = await until_answered(http, method, path)
        assert (statuses[-1], said) == (200, body)
    assert losing[0].lost.keys() >= {"has", "put_stream", "size"}
    assert [file.name for file in Path(world.folder, "artifacts/blobs/sha256").iterdir()] == [
        digest_of(DATA).removeprefix("sha256:")
    ]


async def test_a_job_with_a_large_input_is_submitted_once(
    world: World, http: Any, losing: list[AnswersLost]
) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    statuses, said = await until_answered(http, "POST", "/v1/jobs", data=DOCUMENT, headers=headers)
    assert statuses == [503, 201]
    assert losing[0].lost == {"put": 1}
    assert list(world.jobs.jobs) == [json.loads(said)["job_id"]]
    assert world.jobs.requests[-1].input_digest == digest_of(LARGE)
